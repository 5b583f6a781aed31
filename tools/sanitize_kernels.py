"""Launch every kernel of nanovllm/kernels on small, edgy shapes: what a memory checker runs.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --padding 262144 python tools/sanitize_kernels.py
    TRITON_INTERPRET=1 python tools/sanitize_kernels.py --device cpu    # without a GPU
    python tools/sanitize_kernels.py --plant    # one write past the end of a tensor: the checker must see it

The cases are those of tools/sanitize_cases.py, at whose edges one step too far leaves an allocation. For that each
tensor must be an allocation of its own (the variable above) and its neighbour out of reach (the padding).

Inputs and expected results are made on the CPU, so that only our kernels run under the checker. Results are compared,
floats coarsely: a kernel that wrote nothing was not checked. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import KernelInterface

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what lies beside the package

from nanovllm.kernels.filtered_race import Sizes
from nanovllm.kernels.push_blocks import push_blocks
from nanovllm.kernels.split_gemm import SplitTiles
from nanovllm.sampling_params import SamplingParams
from tools.sanitize_cases import (
    Case,
    Inputs,
    Pages,
    advance_case,
    count_case,
    decode_case,
    filtered_case,
    gather_case,
    norm_case,
    packet_case,
    penalise_case,
    planned_case,
    prefill_case,
    push_case,
    qk_case,
    race_case,
    ring_case,
    silu_case,
    skinny_case,
    skinny_norm_case,
    split_case,
    split_norm_case,
    store_case,
)

ERROR_BOUND = 2e-2  # ‖error‖ / ‖exact‖, of bfloat16 with room; what is not floating point must be equal

WIDE = Pages(group=4, kv_heads=2, head_dim=128, page=64)  # a tile of tokens is one page
NARROW = Pages(group=5, kv_heads=1, head_dim=64, page=16)  # a tile spans pages; a group that is no power of two
LARGE_PAGE = Pages(group=2, kv_heads=2, head_dim=64, page=256)  # a page holds several tiles

FEW = Sizes(slice=128, group=16, list=36, list_tile=16, row_tile=64)  # a list ends within a tile
GREEDY, RANDOM = SamplingParams(temperature=0), SamplingParams(temperature=0.9)
TOP_K, BOTH = SamplingParams(top_k=5), SamplingParams(top_k=5, top_p=0.5)
TOP_P, MIN_P = SamplingParams(top_p=0.02), SamplingParams(temperature=1.3, min_p=0.3)

CASES: dict[str, tuple[Case, ...]] = {  # by module of nanovllm/kernels
    "paged_decode": (
        decode_case(WIDE, (64, 1, 0, 65, 192), num_splits=1),
        decode_case(WIDE, (64, 1, 0, 63, 384), num_splits=3),
        decode_case(NARROW, (1, 15, 17, 160, 0), num_splits=1),
        decode_case(NARROW, (1, 15, 17, 160, 0), num_splits=2, ordered=True),
        decode_case(NARROW, (320,), num_splits=None),
        decode_case(LARGE_PAGE, (3, 512), num_splits=4),
    ),
    "decode_plan": (planned_case(WIDE, (0, 1, 0, 0, 0), num_splits=1),),
    "paged_decode_planned": (
        planned_case(WIDE, (64, 1, 0, 63, 384), num_splits=3),
        planned_case(NARROW, (1, 15, 17, 160, 0), num_splits=2),
        planned_case(LARGE_PAGE, (3, 1100, 5, 0, 1, 256), num_splits=1),
    ),
    "paged_prefill": (
        prefill_case(WIDE, (64, 1, 37), (0, 63, 91)),
        prefill_case(WIDE, (1, 3), (0, 125)),
        prefill_case(NARROW, (33, 1, 20), (0, 47, 28)),
        prefill_case(LARGE_PAGE, (5,), (251,)),
        *(store_case(shape, tokens) for shape in (WIDE, NARROW) for tokens in (1, 17)),
    ),
    "paged_prefill_hopper": (
        prefill_case(WIDE, (64, 1, 37), (0, 63, 91), tma=True),
        prefill_case(WIDE, (40, 0, 17), (0, 0, 175), tma=True),
    ),
    "paged_decode_hopper": (
        ring_case(WIDE, (64, 1, 0, 65, 192), num_sms=3),
        ring_case(Pages(group=5, kv_heads=2, head_dim=128, page=128), (33, 700), num_sms=8),
    ),
    "tile_shares": (ring_case(WIDE, (2000, 3, 130), num_sms=8),),
    "decode_state": (gather_case(16), gather_case(64), advance_case(end_id=42), advance_case(end_id=43)),
    "packet": (packet_case(1, 1), packet_case(7, 300), packet_case(257, 257)),
    "race": (race_case(5000, True), race_case(5000, False), race_case(4096, True)),
    "filtered_race": (
        filtered_case(299, (TOP_P, TOP_K, BOTH), (0, 37, 36), FEW),  # the last list is exactly full
        filtered_case(299, (GREEDY, BOTH, TOP_K), (1, 36, 37), FEW),  # one id more than the last list holds
        filtered_case(299, (TOP_K, BOTH, RANDOM, TOP_P), (5, 299, 0, 299), FEW),
        filtered_case(5000, (MIN_P, TOP_P, TOP_K), (0, 0, 4096), Sizes()),
        filtered_case(5000, (TOP_K, TOP_P, BOTH), (20, 300, 4097), Sizes()),
        filtered_case(4096, (RANDOM, TOP_K, MIN_P), (0, 0, 0), Sizes()),
    ),
    "penalties": (penalise_case(1000), penalise_case(5000), count_case(3, 1000), count_case(129, 33)),
    "qk_norm_rope_store": tuple(qk_case(shape, tokens) for shape in (WIDE, NARROW) for tokens in (1, 17)),
    "rms_norm": tuple(norm_case(3, size, residual) for size in (48, 1024) for residual in (True, False)),
    "skinny_gemm": (
        skinny_case(1, 35, 272),
        skinny_case(3, 35, 2064),
        skinny_case(8, 2200, 2064),
        skinny_norm_case(1, 2200, 272, gated=False, residual=False),
        skinny_norm_case(5, 37, 272, gated=False),
        skinny_norm_case(1, 70, 2064, gated=True),
        skinny_norm_case(8, 70, 272, gated=True),
    ),
    "split_gemm": (
        split_case(9, 112, 272, SplitTiles(64, 64, 1, 3)),
        split_case(33, 112, 272, SplitTiles(64, 64, 2, 4)),
        split_case(17, 112, 272, SplitTiles(64, 64, 1, 4), gated=True),
        split_case(16, 112, 272, SplitTiles(128, 64, 3, 3), gated=True),
        split_norm_case(17, 1024, 4),
    ),
    "silu_mul": tuple(silu_case(3, intermediate) for intermediate in (80, 1536)),
    "push_blocks": (
        push_case(96, ((4, 6), (0, 1), (2, 0))),
        push_case(2 * 8192 + 8, ((4, 6), (0, 1))),  # four 32-bit words more than one piece
        push_case(96, ((0, 4), (3, 1)), within_one_pool=True),
    ),
}


def kernels_of(module: str) -> set[str]:
    """Names of what a module of nanovllm/kernels launches: its jitted functions called …_kernel."""
    names = vars(import_module(f"nanovllm.kernels.{module}")).items()
    return {name for name, value in names if isinstance(value, KernelInterface) and name.endswith("_kernel")}


GLUON = frozenset({"paged_decode_hopper", "tile_shares"})  # Triton's interpreter does not know it: on a card alone


@contextmanager
def launches() -> Iterator[set[str]]:
    """The names of the kernels launched within the block."""
    names: set[str] = set()
    kind: Any = type(vars(import_module("nanovllm.kernels.silu_mul"))["_silu_mul_kernel"])  # compiled or interpreted
    launch = kind.run

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    with mock.patch.object(kind, "run", note):
        yield names


def check(case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of what the kernel wrote against its twin's. `SystemExit` above ERROR_BOUND."""
    got = [each.cpu() for each in case.build(Inputs(device, dtype), case.kernel)]
    exact = case.build(Inputs(torch.device("cpu"), dtype), case.twin)
    errors = [error_of(a, b) for a, b in zip(got, exact, strict=True)]
    if not all(error <= ERROR_BOUND for error in errors):
        raise SystemExit(f"errors {errors} against the twin are above {ERROR_BOUND}")
    return max(errors)


def error_of(got: Tensor, exact: Tensor) -> float:
    """‖error‖ / ‖exact‖; of integers 0, or infinite if one differs."""
    if not got.is_floating_point():
        return 0.0 if torch.equal(got, exact) else math.inf
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def plant(device: torch.device) -> None:
    """Copy a block to the place behind the last one. Outside a memory checker this may do anything."""
    source, target = torch.zeros(3, 1024).to(device), torch.zeros(3, 1024).to(device)
    push_blocks(source, target, [(0, len(target))])
    torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--plant", action="store_true", help="one write past the end of a tensor, nothing else")
    args = parser.parse_args()
    device = torch.device(args.device, 0)
    if args.plant:
        if device.type == "cpu":
            parser.error("--plant writes where it must not: only on a GPU, under a memory checker")
        plant(device)
        return
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter computes bfloat16 wrongly
    chosen = {module: CASES[module] for module in CASES if device.type == "cuda" or module not in GLUON}
    with launches() as launched:
        for module, cases in chosen.items():
            errors = [check(case, device, dtype) for case in cases]
            print(f"{module:20} {len(cases)} cases, largest error {max(errors):.1e}", flush=True)
    if missing := set().union(*map(kernels_of, chosen)) - launched:
        raise SystemExit(f"never launched: {sorted(missing)}")
    report = {"kernels": sorted(launched), "cases": {module: len(cases) for module, cases in chosen.items()}}
    print(json.dumps(report | {"device": str(device), "torch": torch.__version__, "triton": triton.__version__}))


if __name__ == "__main__":
    main()
