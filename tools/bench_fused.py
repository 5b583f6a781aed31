"""Time the fused element-wise kernels against their plain torch twins, both inside CUDA graphs.

    python tools/bench_fused.py            # needs one GPU, and nanovllm installed or on PYTHONPATH
    python tools/bench_fused.py --sweep    # also tile sizes and warps other than the kernels' own

First, each kernel's result is compared with its twin's. Microseconds are of one call: a graph holds many, which
walk through several sets of inputs, so that large ones come from memory and not from L2 (small ones would be in
L2 in an engine as well). GB/s counts every input read once and every output written once; host us is what one
eager launch costs the CPU; the floor is an empty kernel in a graph. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from nanovllm.kernels import qk_norm_rope_store as qk
from nanovllm.kernels import rms_norm, silu_mul

TOKENS = [1, 8, 64, 256, 512, 2048, 8192]
SWEEP_TOKENS = [1, 64, 512, 8192]
EPS, BLOCK_SIZE, MAX_POSITION, DTYPE = 1e-6, 16, 4096, torch.bfloat16
CALLS_PER_GRAPH, REPLAYS, MAX_INPUT_SETS, COLD_BYTES = 24, 7, 8, 256 << 20


class Width(NamedTuple):
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


WIDTHS = {"0.6B": Width(1024, 16, 8, 128, 3072), "8B": Width(4096, 32, 8, 128, 12288)}


class Call:
    """What is timed is `run`; calling this also collects the results to compare."""

    def __init__(self, run: Callable[[], Any], results: Callable[[Any], Any] = lambda result: result) -> None:
        self.run, self.results = run, results

    def __call__(self) -> Any:
        return self.results(self.run())


class Case(NamedTuple):
    """One kernel at one size. `calls`: for each set of inputs, one call of the kernel and one of its twin."""

    kernel: str
    width: str
    tokens: int
    num_bytes: int
    calls: list[tuple[Call, Call]]


@triton.jit
def _empty_kernel() -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also time other tile sizes and numbers of warps")
    args = parser.parse_args()
    torch.manual_seed(0)
    floor_us = time_calls([Call(lambda: _empty_kernel[(1,)]())])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; {DTYPE}")
    print(f"floor: {floor_us:.2f} us a launch in a graph")
    print(f"{'kernel':>20} {'width':>5} {'tokens':>6} {'us':>8} {'GB/s':>6} {'torch us':>9} ratio  host us")
    rows = [measure(case) for case in cases(TOKENS)]
    report = {"floor_us": floor_us, "rows": rows, "device": torch.cuda.get_device_name(), "dtype": str(DTYPE)}
    if args.sweep:
        report["sweep"] = sweep()
    print(json.dumps(report | {"torch": torch.__version__, "triton": triton.__version__}))


def measure(case: Case) -> dict[str, Any]:
    check(case)
    own_us = time_calls([own for own, _ in case.calls])
    twin_us = time_calls([twin for _, twin in case.calls])
    host_us = launch_us(case.calls[0][0])
    gb_per_s = case.num_bytes / own_us / 1e3
    print(
        f"{case.kernel:>20} {case.width:>5} {case.tokens:>6} {own_us:8.2f} {gb_per_s:6.0f} {twin_us:9.2f}"
        f" {twin_us / own_us:5.1f} {host_us:8.1f}",
        flush=True,
    )
    names = {"kernel": case.kernel, "width": case.width, "tokens": case.tokens}
    times = {"us": round(own_us, 3), "torch_us": round(twin_us, 3), "host_us": round(host_us, 1)}
    return names | times | {"gb_per_s": round(gb_per_s, 1)}


def check(case: Case) -> None:
    """Stop if the kernel does not compute what its twin does: at most 1 % of the elements may differ at all."""
    for own, twin in case.calls:
        results = own()  # first: were the twin's keys in the pages already, ours could be missing
        for got, want in zip(results, twin(), strict=True):
            different = float((got != want).float().mean())
            assert different <= 0.01, f"{case.kernel} {case.width} {case.tokens}: {different:.1%} differ"


# -- cases


def cases(tokens: list[int]) -> Iterator[Case]:
    for make in (qk_case, norm_case, silu_case):
        for name in WIDTHS:
            for count in tokens:
                yield make(name, count)


def input_sets(num_bytes: int) -> range:
    return range(min(MAX_INPUT_SETS, max(2, math.ceil(COLD_BYTES / num_bytes))))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(DTYPE)


def qk_case(name: str, tokens: int) -> Case:
    width = WIDTHS[name]
    K, D = width.kv_heads, width.head_dim
    row = (width.heads + 2 * K) * D
    num_bytes = tokens * row * 2 * DTYPE.itemsize + tokens * D * 4
    angles = torch.rand(MAX_POSITION, D // 2, device="cuda") * 6.3
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    weights = randn(D), randn(D)
    blocks = -(-tokens // BLOCK_SIZE)

    def calls() -> tuple[Call, Call]:
        qkv, slots = randn(tokens, row), torch.randperm(blocks * BLOCK_SIZE, device="cuda")[:tokens]
        positions = torch.randint(MAX_POSITION, (tokens,), device="cuda")
        pages, out = randn(blocks, 2, 2, BLOCK_SIZE, K, D), randn(tokens, width.heads, D)
        args = qkv, *weights, cos_sin, positions, pages[:, 1, 0], pages[:, 1, 1], slots, EPS
        where = slots // BLOCK_SIZE, 1, slice(None), slots % BLOCK_SIZE

        def stored(q: Tensor) -> tuple[Tensor, Tensor]:
            return q, pages[where]

        own, twin = qk.qk_norm_rope_store, qk.qk_norm_rope_store_reference
        return Call(lambda: own(*args, out=out), stored), Call(lambda: twin(*args), stored)

    return Case("qk_norm_rope_store", name, tokens, num_bytes, [calls() for _ in input_sets(num_bytes)])


def norm_case(name: str, tokens: int) -> Case:
    hidden = WIDTHS[name].hidden
    num_bytes, weight = tokens * hidden * 4 * DTYPE.itemsize, randn(hidden)

    def calls() -> tuple[Call, Call]:
        x, residual, out, residual_out = (randn(tokens, hidden) for _ in range(4))
        return (
            Call(lambda: rms_norm.add_rms_norm(x, residual, weight, EPS, out=out, residual_out=residual_out)),
            Call(lambda: rms_norm.add_rms_norm_reference(x, residual, weight, EPS)),
        )

    return Case("add_rms_norm", name, tokens, num_bytes, [calls() for _ in input_sets(num_bytes)])


def silu_case(name: str, tokens: int) -> Case:
    intermediate = WIDTHS[name].intermediate
    num_bytes = tokens * intermediate * 3 * DTYPE.itemsize

    def calls() -> tuple[Call, Call]:
        gate_up, out = randn(tokens, 2 * intermediate), randn(tokens, intermediate)
        return (
            Call(lambda: silu_mul.silu_mul(gate_up, out=out), lambda y: (y,)),
            Call(lambda: silu_mul.silu_mul_reference(gate_up), lambda y: (y,)),
        )

    return Case("silu_mul", name, tokens, num_bytes, [calls() for _ in input_sets(num_bytes)])


# -- timing


def time_calls(calls: list[Call]) -> float:
    """Median microseconds of one call, replayed from a graph of CALLS_PER_GRAPH calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        calls[0].run()  # compiles
        with torch.cuda.graph(graph, stream=stream):
            for index in range(CALLS_PER_GRAPH):
                calls[index % len(calls)].run()
        seconds = [replay_seconds(graph) for _ in range(REPLAYS + 2)][2:]
    return statistics.median(seconds) * 1e6 / CALLS_PER_GRAPH


def launch_us(call: Call) -> float:
    """Median microseconds of host time that one eager launch takes."""
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        call.run()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds) * 1e6


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# -- other configurations than the kernels' own


def sweep() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print(f"{'sweep, us by tokens':>45} " + " ".join(f"{count:>8}" for count in SWEEP_TOKENS))
    for make, configs in SWEEPS:
        for name in WIDTHS:
            sizes = [make(name, count) for count in SWEEP_TOKENS]
            for config in configs:
                with mock.patch.object(config.module, config.function, config.replacement):
                    times = [round(time_calls([own for own, _ in case.calls]), 3) for case in sizes]
                columns = " ".join(f"{us:8.2f}" for us in times)
                print(f"{sizes[0].kernel:>20} {name:>5} {config.label:>18} {columns}", flush=True)
                rows.append({"kernel": sizes[0].kernel, "width": name, "config": config.label, "us": times})
    return rows


class Config(NamedTuple):
    """A function of a kernel's file that picks its configuration, and what to put in its place."""

    label: str
    module: ModuleType
    function: str
    replacement: Callable[..., Any]


def tiles(q: int, kv: int, warps: int) -> Config:
    def pick(num_heads: int, num_kv_heads: int, head_dim: int) -> qk.Tiles:
        return qk.Tiles(min(q, num_heads), min(kv, num_kv_heads), warps)

    return Config(f"q{q} kv{kv} warps{warps}", qk, "_tiles", pick)


def norm_warps(warps: int) -> Config:
    return Config(f"warps{warps}", rms_norm, "_num_warps", lambda _: warps)


def silu_blocks(block: int, warps: int) -> Config:
    return Config(f"block{block} warps{warps}", silu_mul, "_block_and_warps", lambda _: (block, warps))


TILES = [(16, 8, 4), (32, 8, 4), (16, 8, 8), (16, 8, 2), (8, 8, 4), (8, 8, 2), (8, 8, 1), (4, 4, 1)]
BLOCKS = [(512, 2), (1024, 4), (1024, 2), (2048, 8), (2048, 4), (4096, 8)]
SWEEPS: list[tuple[Callable[[str, int], Case], list[Config]]] = [
    (qk_case, [tiles(*config) for config in TILES]),
    (norm_case, [norm_warps(warps) for warps in (1, 2, 4, 8, 16)]),
    (silu_case, [silu_blocks(*config) for config in BLOCKS]),
]


if __name__ == "__main__":
    main()
