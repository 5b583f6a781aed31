"""Time KV block copies between two cards (or within one), contiguous and scattered.

    python tools/bench_copies.py                 # two GPUs, or one
    python tools/bench_copies.py --device cpu    # runs anywhere; the rates mean nothing

GB/s of the copy itself, by the handle's own events, median of five; host: what launching it cost the caller. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import torch

from nanovllm.engine.kv_cache import KVCache
from nanovllm.models.model_config import ModelConfig

CASES = ((36, 64, 128), (36, 16, 256), (28, 16, 256))  # layers, tokens a block, blocks copied
REPEATS = 5


def make_config(layers: int) -> ModelConfig:
    """Qwen3's KV shape with that many layers: 4,096 bytes a token and layer in bf16."""
    return ModelConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=64,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        dtype="bfloat16",
        rope_scaling=None,
        eos_token_ids=(),
    )


def make_pairs(count: int, scattered: bool) -> list[tuple[int, int]]:
    sources, targets = list(range(count)), list(range(count, 2 * count))
    if scattered:
        random.Random(1).shuffle(sources)
        random.Random(2).shuffle(targets)
    return list(zip(sources, targets, strict=True))


def measure(source: KVCache, target: KVCache, pairs: list[tuple[int, int]]) -> dict[str, float]:
    """Medians over `REPEATS` copies, after one that is not counted."""
    stream = torch.cuda.Stream(source.device) if source.device.type == "cuda" else None
    rates, host = [], []
    for repeat in range(REPEATS + 1):
        started = time.perf_counter()
        handle = source.mirror_to(target, pairs, stream)
        launched = time.perf_counter() - started
        handle.wait()
        if repeat and handle.seconds:
            rates.append(handle.num_bytes / handle.seconds / 1e9)
            host.append(launched * 1e3)
    return {"gb_per_s": statistics.median(rates), "host_ms": statistics.median(host)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gather", action="store_true", help="as where the cards cannot reach each other's memory")
    args = parser.parse_args()
    kind = args.device
    count = torch.cuda.device_count() if kind == "cuda" else 2
    devices = [torch.device(kind, i) if kind == "cuda" else torch.device("cpu") for i in range(min(2, count))]
    rows = []
    for layers, tokens, blocks in CASES if kind == "cuda" else ((1, 16, 8),):
        caches = [KVCache(2 * blocks, tokens, make_config(layers), torch.bfloat16, device) for device in devices]
        for cache in caches:
            cache.pages.normal_()
            cache._peer = False if args.gather else None
            if kind == "cuda":
                torch.cuda.synchronize(cache.device)
        for scattered in (False, True):
            result = measure(caches[0], caches[-1], make_pairs(blocks, scattered))
            rows.append({"blocks": blocks, "mib": caches[0].block_bytes / 2**20, "scattered": scattered, **result})
            row = rows[-1]
            size = f"{blocks:4} x {row['mib']:5.2f} MiB, {'scattered' if scattered else 'one run':9}"
            print(f"{size}: {row['gb_per_s']:7.1f} GB/s, host {row['host_ms']:.2f} ms")
    print(json.dumps({"cards": len(devices), "device": kind, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
