"""Time the products of 2 to 128 rows against cuBLAS, each with the kernel that reads it, inside CUDA graphs.

    python tools/bench_split.py            # needs one GPU, and nanovllm on PYTHONPATH
    python tools/bench_split.py --sweep    # other tiles too; prints lines for `TILES` of nanovllm/kernels/split_gemm.py

Each case is first compared with cuBLAS. Microseconds are of one call: a product and its reader (qkv: head norms, RoPE
and the KV store; o and down: residual sum and norm; gate_up: SiLU product), walking through the weights of several
layers, more than L2 holds. TB/s counts the weights only; the share is of what the card reads. `layer`: all of them in a
row, as the engine has them, with the tiles that won (`best`), and with cuBLAS. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from bench_skinny import DTYPE, EPS, READ_TB_PER_S, check, compile_ahead, randn, time_us
from torch import Tensor
from torch.nn.functional import linear
from triton.runtime.errors import TritonError

from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store
from nanovllm.kernels.rms_norm import add_rms_norm
from nanovllm.kernels.silu_mul import silu_mul
from nanovllm.kernels.split_gemm import (
    ROW_LIMITS,
    SplitTiles,
    choose_split_tiles,
    should_split,
    split_gate_up,
    split_linear,
)

KV_HEADS, HEAD_DIM, PAGE = 8, 128, 64
SHARED_BYTES = 227 << 10  # of an SM
NUM_SMS = 132
Tiles = SplitTiles | None  # None: cuBLAS


class Width(NamedTuple):
    """`layers`: how many have weights of their own here; the smallest product's then exceed 250 MB."""

    hidden: int
    query: int
    intermediate: int
    layers: int


WIDTHS = {
    "0.6B": Width(1024, 2048, 3072, 64),
    "1.7B": Width(2048, 2048, 6144, 32),
    "4B": Width(2560, 4096, 9728, 14),
    "8B": Width(4096, 4096, 12288, 8),
    "14B": Width(5120, 5120, 17408, 6),
}


class Weights:
    """Of all layers of one width."""

    def __init__(self, width: Width) -> None:
        hidden, query, intermediate, layers = width
        self.width = width
        self.stacks = {
            "qkv": randn(layers, query + 2 * KV_HEADS * HEAD_DIM, hidden),
            "o": randn(layers, hidden, query),
            "gate_up": randn(layers, 2 * intermediate, hidden),
            "down": randn(layers, hidden, intermediate),
        }
        for stack in self.stacks.values():
            stack.mul_(stack.shape[2] ** -0.5)
        self.norm, self.head_norms = randn(hidden).abs_().add_(0.5), randn(2, HEAD_DIM).abs_().add_(0.5)


class Product:
    """One product of M rows and its reader. `run(tiles, layer)` returns what the reader wrote."""

    def __init__(self, name: str, weights: Weights, M: int) -> None:
        self.name, self.M, self.stack = name, M, weights.stacks[name]
        _, self.N, self.K = self.stack.shape
        self.x = randn(M, self.K)
        self.read = {"qkv": self._head_norms, "gate_up": self._silu}.get(name, self._norm)(weights)

    def run(self, tiles: Tiles, layer: int) -> Sequence[Tensor]:
        weight = self.stack[layer]
        if tiles is not None and tiles.splits == 1 and self.name == "gate_up":
            return (split_gate_up(self.x, weight, tiles=tiles),)
        return self.read(linear(self.x, weight) if tiles is None else split_linear(self.x, weight, tiles=tiles))

    def _norm(self, weights: Weights) -> Callable[[Tensor], Sequence[Tensor]]:
        residual, outs = randn(self.M, self.N), randn(2, self.M, self.N)
        return lambda product: add_rms_norm(product, residual, weights.norm, EPS, out=outs[0], residual_out=outs[1])

    def _silu(self, weights: Weights) -> Callable[[Tensor], Sequence[Tensor]]:
        out = randn(self.M, self.N // 2)
        return lambda product: (silu_mul(product, out=out),)

    def _head_norms(self, weights: Weights) -> Callable[[Tensor], Sequence[Tensor]]:
        blocks = -(-self.M // PAGE)
        pages = randn(blocks, 2, PAGE, KV_HEADS, HEAD_DIM)
        cos_sin, positions = torch.randn(self.M, HEAD_DIM, device="cuda"), torch.arange(self.M, device="cuda")
        views, out = (pages[:, 0], pages[:, 1]), randn(self.M, weights.width.query // HEAD_DIM, HEAD_DIM)
        norms = weights.head_norms

        def read(product: Tensor) -> Sequence[Tensor]:
            qk_norm_rope_store(product, norms[0], norms[1], cos_sin, positions, *views, positions, EPS, out=out)
            return out, pages

        return read


class Layer:
    """The products of one layer with their readers in a row; what attention would compute between them is left out."""

    def __init__(self, weights: Weights, M: int) -> None:
        self.products = [Product(name, weights, M) for name in weights.stacks]

    def run(self, chosen: Sequence[Tiles], layer: int) -> None:
        for product, tiles in zip(self.products, chosen, strict=True):
            product.run(tiles, layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also time other tiles")
    parser.add_argument("--models", default=",".join(WIDTHS), help="with commas")
    parser.add_argument("--rows", default=",".join(map(str, ROW_LIMITS)), help="with commas")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}; {DTYPE}; {READ_TB_PER_S} TB/s")
    rows = [int(each) for each in args.rows.split(",")]
    found = [row for name in args.models.split(",") for row in measure_model(name, rows, args.sweep)]
    print(json.dumps({"rows": found, "device": device, "torch": torch.__version__, "triton": triton.__version__}))


def measure_model(name: str, rows: Sequence[int], sweep: bool) -> list[dict[str, Any]]:
    weights, found, lines = Weights(WIDTHS[name]), [], {}
    layers = {M: Layer(weights, M) for M in rows}
    torch.cuda.synchronize()  # the kernels read weights ahead of the wait for what was queued before
    compile_products([p for layer in layers.values() for p in layer.products], candidates if sweep else standing)
    print(f"{'width':>5} {'M':>3} {'product':>8} {'ours':>7} {'cublas':>7} {'TB/s':>5} share  tiles", flush=True)
    for M, layer in layers.items():
        times = {p.name: measure(name, p, sweep) for p in layer.products}
        best = [row["tiles"] if row["us"] < row["cublas_us"] else None for row in times.values()]
        found += [*times.values(), measure_layer(name, layer, M, best)]
        for product, tiles in zip(layer.products, best, strict=True):
            lines.setdefault((product.N, product.K), []).append(tiles)
    for shape, tiles_of_rows in lines.items():  # as `TILES` has them, if all ROW_LIMITS were measured
        print(
            f"    {shape}: ({', '.join('None' if tiles is None else f'T{tuple(tiles)}' for tiles in tiles_of_rows)}),"
        )
    return found


def compile_products(products: Sequence[Product], tiles_of: Callable[[Product], Sequence[SplitTiles]]) -> None:
    todo = [partial(p.run, tiles, 0) for p in products for tiles in (*tiles_of(p), None)]
    compile_ahead(todo)


def standing(product: Product) -> list[SplitTiles]:
    return [choose_split_tiles(product.M, product.N, product.K, DTYPE, NUM_SMS)]


def measure(name: str, product: Product, sweep: bool) -> dict[str, Any]:
    """The best of the tiles tried, and cuBLAS."""
    layers = WIDTHS[name].layers
    cublas = time_us(partial(product.run, None), layers)
    tried = {tiles: try_tiles(product, tiles, layers) for tiles in (candidates if sweep else standing)(product)}
    for tiles in fastest(tried, 5)[1:]:
        print(f"{'':>19}also {tried[tiles]:7.2f} {tuple(tiles)}")
    (best,) = fastest(tried, 1)
    rate = product.N * product.K * DTYPE.itemsize / tried[best] / 1e6
    print(
        f"{name:>5} {product.M:>3} {product.name:>8} {tried[best]:7.2f} {cublas:7.2f} {rate:5.2f} "
        f"{rate / READ_TB_PER_S:5.0%}  {tuple(best)}",
        flush=True,
    )
    row = {"width": name, "rows": product.M, "product": product.name, "tiles": best, "tb_per_s": round(rate, 3)}
    return row | {"us": round(tried[best], 3), "cublas_us": round(cublas, 3)}


def measure_layer(name: str, layer: Layer, M: int, best: Sequence[Tiles]) -> dict[str, Any]:
    ways: dict[str, list[Tiles]] = {
        "engine": [standing(p)[0] if should_split(p.x, p.stack[0]) else None for p in layer.products],
        "best": list(best),
        "cublas": [None] * len(layer.products),
    }
    times = {way: time_us(partial(layer.run, chosen), WIDTHS[name].layers) for way, chosen in ways.items()}
    print(f"{name:>5} {M:>3}    layer " + "  ".join(f"{way} {us:.2f}" for way, us in times.items()), flush=True)
    return {"width": name, "rows": M} | {f"{way}_us": round(us, 3) for way, us in times.items()}


def fastest(tried: dict[SplitTiles, float], count: int) -> list[SplitTiles]:
    return sorted(tried, key=lambda tiles: tried[tiles])[:count]


def try_tiles(product: Product, tiles: SplitTiles, layers: int) -> float:
    """Microseconds; infinite, and said why, for tiles that do not fit the card or do not compute the product."""
    run = partial(product.run, tiles)
    try:
        check(run, partial(product.run, None), f"{product.name} of {product.M} rows by {tiles}")
        return time_us(run, layers)
    except (AssertionError, TritonError) as error:
        print(f"      {error}", flush=True)
        return float("inf")


# -- tiles to try

SIZES = [(64, 64, 4), (64, 64, 6), (64, 128, 3), (64, 128, 4), (64, 128, 5), (64, 256, 3)]  # block_n, block_k, stages
SIZES += [(128, 64, 4), (128, 128, 3), (256, 64, 3)]
MOST_SPLITS = 8


def candidates(product: Product) -> list[SplitTiles]:
    """One to three programs an SM, all of them resident at once where they fit; half as many for 8 splits or more."""
    padded = max(16, triton.next_power_of_2(product.M))
    found: dict[SplitTiles, None] = {}
    for block_n, block_k, num_stages in SIZES:
        resident = SHARED_BYTES // ((block_n + padded) * block_k * DTYPE.itemsize * num_stages)
        if not resident:
            continue
        first = 0.5 if split_count(product, block_n, block_k, 1) == MOST_SPLITS else 1
        for programs in (first, *range(1, 1 + min(3, resident))):
            splits = split_count(product, block_n, block_k, programs)
            found[SplitTiles(block_n, block_k, splits, num_stages)] = None
    return list(found)


def split_count(product: Product, block_n: int, block_k: int, programs: float) -> int:
    """So many that `programs` an SM are made of the product, if that many are allowed; none of them is empty."""
    steps = -(-product.K // block_k)
    splits = max(1, min(MOST_SPLITS, steps // 2, int(programs * NUM_SMS) // -(-product.N // block_n)))
    return -(-steps // -(-steps // splits))


if __name__ == "__main__":
    main()
