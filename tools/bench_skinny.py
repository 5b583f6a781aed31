"""Time the skinny products against cuBLAS and the separate kernels that they replace, all inside CUDA graphs.

    python tools/bench_skinny.py            # needs one GPU, and nanovllm installed or on PYTHONPATH
    python tools/bench_skinny.py --sweep    # also other tiles, for M = 1 and 8: the best of each product

Each case is first compared with its twin. Microseconds are of one call; a graph holds many, which walk through the
weights of several layers, more than L2 holds. `fused`: one kernel. `linear`: the product alone is ours, with the
norm and the SiLU product in kernels of their own. `cublas`: torch's product with those kernels. TB/s counts the
weights only, of `fused`; the share is of what the card reads. Then the four products of a layer in a row, with
programmatic dependent launch and without. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear
from triton.runtime.errors import TritonError
from triton.runtime.jit import JITFunction

from nanovllm.kernels.rms_norm import add_rms_norm
from nanovllm.kernels.silu_mul import silu_mul
from nanovllm.kernels.skinny_gemm import SkinnyTiles, choose_tiles, norm_gate_up, norm_linear, skinny_linear

READ_TB_PER_S = 4.45  # an H200's, measured by a stream of reads
EPS, DTYPE, CALLS_PER_GRAPH, REPLAYS = 1e-6, torch.bfloat16, 64, 7
ROWS, SWEEP_ROWS = (1, 4, 8), (1, 8)
Run = Callable[[int], Any]  # of a layer's number


class Width(NamedTuple):
    """`layers`: how many have weights of their own here; the smallest product's then exceed 200 MB."""

    hidden: int
    query: int
    qkv: int
    intermediate: int
    layers: int


WIDTHS = {"0.6B": Width(1024, 2048, 4096, 3072, 64), "8B": Width(4096, 4096, 6144, 12288, 8)}


class Weights:
    """Of all layers of one width."""

    def __init__(self, width: Width) -> None:
        self.width = width
        hidden, query, qkv, intermediate, layers = width
        self.qkv, self.o = randn(layers, qkv, hidden), randn(layers, hidden, query)
        self.gate_up, self.down = randn(layers, 2 * intermediate, hidden), randn(layers, hidden, intermediate)
        for stack in (self.qkv, self.o, self.gate_up, self.down):
            stack.mul_(stack.shape[2] ** -0.5)
        self.norm = randn(hidden).abs_().add_(0.5)


class Case(NamedTuple):
    """One product of M rows: its ways to run, each a function of the layer's number. The first is ours, with tiles."""

    product: str
    N: int
    K: int
    fused: Callable[[int, SkinnyTiles | None], Any]
    linear: Run
    cublas: Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also time other tiles")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}; {DTYPE}; {READ_TB_PER_S} TB/s")
    weights = {name: Weights(width) for name, width in WIDTHS.items()}
    torch.cuda.synchronize()  # the kernels read weights ahead of the wait for what was queued before
    compile_ahead([partial(run, 0) for name in WIDTHS for M in ROWS for run in own_runs(weights[name], M)])
    print(f"{'width':>5} {'M':>2} {'product':>8} {'fused':>7} {'linear':>7} {'cublas':>7} {'TB/s':>5} share  tiles")
    rows = [measure(name, M, case) for name in WIDTHS for M in ROWS for case in cases(weights[name], M)]
    print(f"{'width':>5} {'M':>2} {'layer':>8} {'pdl':>7} {'no pdl':>7} {'cublas':>7} {'TB/s':>5} share")
    layers = [measure_layer(name, weights[name], M) for name in WIDTHS for M in ROWS]
    report = {"rows": rows, "layers": layers, "device": device, "read_tb_per_s": READ_TB_PER_S}
    if args.sweep:
        report["sweep"] = [row for name in WIDTHS for M in SWEEP_ROWS for row in sweep(name, weights[name], M)]
    print(json.dumps(report | {"torch": torch.__version__, "triton": triton.__version__}))


def randn(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device="cuda").normal_()


# -- cases


def cases(weights: Weights, M: int) -> list[Case]:
    return [
        norm_case("qkv", weights, M),
        plain_case("o", weights.o, M),
        gate_up_case(weights, M),
        plain_case("down", weights.down, M),
    ]


def plain_case(product: str, stack: Tensor, M: int) -> Case:
    _, N, K = stack.shape
    x, out = randn(M, K), randn(M, N)
    run = partial(skinny_linear, x, out=out)
    return Case(
        product,
        N,
        K,
        lambda layer, tiles: (run(stack[layer], tiles=tiles),),
        lambda layer: (run(stack[layer]),),
        lambda layer: (linear(x, stack[layer]),),
    )


def norm_case(product: str, weights: Weights, M: int) -> Case:
    stack, norm = weights.qkv, weights.norm
    _, N, K = stack.shape
    x, residual, residual_out, normed, out = randn(M, K), randn(M, K), randn(M, K), randn(M, K), randn(M, N)
    add_norm = partial(add_rms_norm, x, residual, norm, EPS, out=normed, residual_out=residual_out)
    fused = partial(norm_linear, x, residual, norm, EPS, out=out, residual_out=residual_out)
    return Case(
        product,
        N,
        K,
        lambda layer, tiles: fused(stack[layer], tiles=tiles),
        lambda layer: (skinny_linear(add_norm()[0], stack[layer], out=out), residual_out),
        lambda layer: (linear(add_norm()[0], stack[layer]), residual_out),
    )


def gate_up_case(weights: Weights, M: int) -> Case:
    stack, norm = weights.gate_up, weights.norm
    _, N, K = stack.shape
    x, residual, residual_out, normed = randn(M, K), randn(M, K), randn(M, K), randn(M, K)
    both, out = randn(M, N), randn(M, N // 2)
    add_norm = partial(add_rms_norm, x, residual, norm, EPS, out=normed, residual_out=residual_out)
    fused = partial(norm_gate_up, x, residual, norm, EPS, out=out, residual_out=residual_out)
    return Case(
        "gate_up",
        N,
        K,
        lambda layer, tiles: fused(stack[layer], tiles=tiles),
        lambda layer: (silu_mul(skinny_linear(add_norm()[0], stack[layer], out=both), out=out), residual_out),
        lambda layer: (silu_mul(linear(add_norm()[0], stack[layer]), out=out), residual_out),
    )


def own_layer(weights: Weights, M: int, pdl: bool | None) -> Run:
    """The four products in a row; what attention would give between them is a constant."""
    hidden, query, qkv, intermediate, _ = weights.width
    x, streams, attended = randn(M, hidden), (randn(M, hidden), randn(M, hidden)), randn(M, query)
    outs = randn(M, qkv), randn(M, hidden), randn(M, intermediate)

    def run(layer: int) -> None:
        norm_linear(x, streams[0], weights.norm, EPS, weights.qkv[layer], out=outs[0], residual_out=streams[1], pdl=pdl)
        skinny_linear(attended, weights.o[layer], out=outs[1], pdl=pdl)
        norm_gate_up(
            outs[1],
            streams[1],
            weights.norm,
            EPS,
            weights.gate_up[layer],
            out=outs[2],
            residual_out=streams[0],
            pdl=pdl,
        )
        skinny_linear(outs[2], weights.down[layer], out=x, pdl=pdl)

    return run


def cublas_layer(weights: Weights, M: int) -> Run:
    hidden, query = weights.width[:2]
    x, stream, attended = randn(M, hidden), randn(M, hidden), randn(M, query)

    def run(layer: int) -> None:
        linear(add_rms_norm(x, stream, weights.norm, EPS)[0], weights.qkv[layer])
        y = linear(attended, weights.o[layer])
        y = silu_mul(linear(add_rms_norm(y, stream, weights.norm, EPS)[0], weights.gate_up[layer]))
        linear(y, weights.down[layer])

    return run


def own_runs(weights: Weights, M: int) -> list[Run]:
    """All that is compiled for M rows."""
    ways = [run for case in cases(weights, M) for run in (partial(run_fused, case, None), case.linear, case.cublas)]
    return [*ways, own_layer(weights, M, None), own_layer(weights, M, False)]


def run_fused(case: Case, tiles: SkinnyTiles | None, layer: int) -> Any:
    return case.fused(layer, tiles)


# -- measuring


def measure(name: str, M: int, case: Case) -> dict[str, Any]:
    runs: dict[str, Run] = {"fused": partial(run_fused, case, None), "linear": case.linear, "cublas": case.cublas}
    for run in (runs["fused"], runs["linear"]):
        check(run, case.cublas, f"{case.product} of {name}, M = {M}")
    times = {way: time_us(run, WIDTHS[name].layers) for way, run in runs.items()}
    rate = case.N * case.K * DTYPE.itemsize / times["fused"] / 1e6
    tiles = choose_tiles(M, case.N, case.K, DTYPE, torch.cuda.get_device_properties(0).multi_processor_count)
    columns = " ".join(f"{us:7.2f}" for us in times.values())
    print(
        f"{name:>5} {M:>2} {case.product:>8} {columns} {rate:5.2f} {rate / READ_TB_PER_S:5.0%}  {tuple(tiles)}",
        flush=True,
    )
    rounded = {f"{way}_us": round(us, 3) for way, us in times.items()}
    return {"width": name, "rows": M, "product": case.product, "tb_per_s": round(rate, 3)} | rounded


def measure_layer(name: str, weights: Weights, M: int) -> dict[str, Any]:
    runs = {
        "pdl": own_layer(weights, M, None),
        "no_pdl": own_layer(weights, M, False),
        "cublas": cublas_layer(weights, M),
    }
    times = {way: time_us(run, weights.width.layers) for way, run in runs.items()}
    stacks = (weights.qkv, weights.o, weights.gate_up, weights.down)
    rate = sum(stack[0].nbytes for stack in stacks) / times["pdl"] / 1e6
    columns = " ".join(f"{us:7.2f}" for us in times.values())
    print(f"{name:>5} {M:>2} {'all four':>8} {columns} {rate:5.2f} {rate / READ_TB_PER_S:5.0%}", flush=True)
    rounded = {f"{way}_us": round(us, 3) for way, us in times.items()}
    return {"width": name, "rows": M, "tb_per_s": round(rate, 3)} | rounded


def check(run: Run, twin: Run, what: str) -> None:
    """Stop if a kernel does not compute what its twin does, up to bfloat16's rounding of sums."""
    results = [result.clone() for result in run(0)]  # both ways write the same buffers
    for got, want in zip(results, twin(0), strict=True):
        error = float((got.float() - want.float()).norm() / want.float().norm())
        assert error <= 1e-2, f"{what}: error {error:.1e}"  # one rounding is 2e-3, and cuBLAS may round twice


def time_us(run: Run, layers: int) -> float:
    """Median microseconds of one call, replayed from a graph of CALLS_PER_GRAPH calls over all layers' weights."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run(0)  # compiles
        with torch.cuda.graph(graph, stream=stream):
            for index in range(CALLS_PER_GRAPH):
                run(index % layers)
        seconds = [replay_seconds(graph) for _ in range(REPLAYS + 2)][2:]
    return statistics.median(seconds) * 1e6 / CALLS_PER_GRAPH


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def compile_ahead(runs: list[Callable[[], Any]]) -> None:
    """Compile in many threads what `runs` launch, without launching it. What fails, fails again when it is run."""
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        return launch(self, *args, **(kwargs | {"warmup": True}))

    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        for run in runs:
            run()


# -- other tiles than the kernels' own

PLAIN_TILES = [(8, 1024, 4), (4, 1024, 4), (16, 1024, 8), (16, 512, 4), (4, 2048, 4), (2, 4096, 4), (4, 4096, 8)]
PLAIN_TILES_STAGED = [(8, 1024, 4, 3), (16, 512, 4, 4)]
DOT_TILES = [(16, 256, 4, 1, 4), (8, 256, 8, 1, 8), (16, 256, 8, 1, 8), (8, 512, 8, 1, 8)]
DOT_TILES_STAGED = [(16, 128, 4, 3, 4), (16, 128, 4, 4, 4), (32, 128, 4, 3, 4), (32, 128, 4, 4, 4), (16, 128, 8, 4, 8)]
DOT_TILES_STAGED += [(64, 64, 4, 4, 4), (64, 128, 8, 3, 4)]


def candidates(M: int, K: int) -> list[SkinnyTiles]:
    """At most 12. No step is longer than a row, rounded up; without stages, `dot` is meant for one step a row."""
    row = triton.next_power_of_2(K)
    tiles = [SkinnyTiles(*sizes) for sizes in PLAIN_TILES + PLAIN_TILES_STAGED if M == 1]
    dot = [sizes for sizes in DOT_TILES if sizes[1] * sizes[4] == row] + DOT_TILES_STAGED
    tiles += [SkinnyTiles(*sizes, dot=True) for sizes in (dot if M > 1 else dot[:3])]
    return [each for each in tiles if each.block_k * each.split_k <= row]


def sweep(name: str, weights: Weights, M: int) -> list[dict[str, Any]]:
    """The best tiles of each product."""
    todo = [(case, tiles) for case in cases(weights, M) for tiles in candidates(M, case.K)]
    compile_ahead([partial(case.fused, 0, tiles) for case, tiles in todo])
    best: dict[str, tuple[float, SkinnyTiles]] = {}
    for case, tiles in todo:
        us = try_tiles(case, tiles, WIDTHS[name].layers)
        print(f"sweep {name:>5} {M:>2} {case.product:>8} {us:7.2f}  {tuple(tiles)}", flush=True)
        best[case.product] = min(best.get(case.product, (us, tiles)), (us, tiles))
    for product, (us, tiles) in best.items():
        print(f"best  {name:>5} {M:>2} {product:>8} {us:7.2f}  {tuple(tiles)}", flush=True)
    return [
        {"width": name, "rows": M, "product": product, "us": round(us, 3), "tiles": tuple(tiles)}
        for product, (us, tiles) in best.items()
    ]


def try_tiles(case: Case, tiles: SkinnyTiles, layers: int) -> float:
    """Microseconds; infinite, and said why, for tiles that do not fit the card or do not compute the product."""
    run = partial(run_fused, case, tiles)
    try:
        check(run, case.cublas, f"{case.product} by {tiles}")
        return time_us(run, layers)
    except (AssertionError, TritonError) as error:
        print(f"      {error}", flush=True)
        return float("inf")


if __name__ == "__main__":
    main()
