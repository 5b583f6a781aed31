"""torch's attention over unpaged prompts, by backend: the first call of a length, and later ones.

    python tools/bench_sdpa.py

Qwen3-8B's heads, bf16, causal, one CUDA GPU. The host waits for each call. The last line is one JSON object.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, HEAD_DIM, REPEATS = 32, 8, 128, 5
CASES = ((8, 2048), (1, 1999), (1, 2001), (1, 1024), (1, 3000), (1, 777), (1, 778))  # sequences, tokens of each
# torch's own choice first: only then has no other row made its plans.
BACKENDS = {"auto": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def measure(batch: int, tokens: int, backend: SDPBackend | None) -> dict[str, float]:
    shape = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(batch, tokens, HEADS, HEAD_DIM, **shape).transpose(1, 2)
    k, v = (torch.randn(batch, tokens, KV_HEADS, HEAD_DIM, **shape).transpose(1, 2) for _ in range(2))
    torch.cuda.synchronize()
    taken = []
    with nullcontext() if backend is None else sdpa_kernel(backend):
        for _ in range(1 + REPEATS):
            started = time.perf_counter()
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
    flops = 4 * HEADS * HEAD_DIM * batch * tokens * (tokens + 1) / 2
    return {"first_ms": taken[0] * 1e3, "best_ms": min(taken[1:]) * 1e3, "tflops": flops / min(taken[1:]) / 1e12}


def main() -> None:
    rows = []
    for name, backend in BACKENDS.items():
        for batch, tokens in CASES:
            rows.append({"backend": name, "case": f"{batch}x{tokens}", **measure(batch, tokens, backend)})
            row = rows[-1]
            times = f"first {row['first_ms']:8.2f} ms, then {row['best_ms']:6.3f} ms, {row['tflops']:.0f} TFLOP/s"
            print(f"{name:6} {row['case']:>7}: {times}")
    print(json.dumps({"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
