"""Time the attention kernels at Qwen3's head shapes, against the memory's read bandwidth, torch's SDPA and FA3.

    python tools/bench_attention.py            # needs one GPU, and nanovllm installed or on PYTHONPATH
    python tools/bench_attention.py --sweep    # also tiles and splits other than the kernels' own
    python tools/bench_attention.py --placement scattered,ordered,interleaved    # only decode, by where blocks lie

Every figure is the median over replays of a CUDA graph. Decode: the graph holds one call for each of 36 layers
of one pool, over blocks scattered through all of it; TB/s counts keys and values, read once, and the share is of
a stream that only reads. Prefill: TFLOP/s counts the causal half. FlashAttention-3 is timed where
`flash_attn_interface` can be imported. A few rows of each case are compared with float64 before it is timed. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nanovllm.kernels.paged_decode import (
    DecodeTiles,
    choose_num_splits,
    count_sms,
    paged_decode,
    paged_decode_reference,
)
from nanovllm.kernels.paged_prefill import PrefillTiles, paged_prefill, paged_prefill_reference, store_kv
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, PrefillMetadata
from nanovllm.layers.attention.flash_attn import FlashAttention, find_module
from nanovllm.layers.attention.triton import TritonAttention

LAYERS, KV_HEADS, HEAD_DIM, DTYPE = 36, 8, 128, torch.bfloat16
POOL_BYTES, STREAM_BYTES, NOISE_ELEMENTS = 60 * 10**9, 8 << 30, 1 << 28
REPLAYS = 5
ERROR_BOUND = 8e-3
PLACEMENTS = ("scattered", "ordered", "interleaved")  # of a row's blocks: anywhere, one by one, in turn with other rows

DECODE_SWEEP = [
    DecodeTiles(*each)
    for each in (
        (32, 2, 4), (32, 4, 4), (64, 2, 2), (64, 2, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3),
        (128, 4, 2), (128, 4, 3), (128, 8, 2), (128, 8, 3),
    )
]  # fmt: skip
PREFILL_SWEEP = [
    PrefillTiles(*each)
    for each in (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 8, 4), (128, 64, 4, 3), (128, 64, 8, 2),
        (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3),
    )
]  # fmt: skip


class DecodeCase(NamedTuple):
    """`contexts`: tokens of each row. `bound`: what the host knows of them, as a captured graph does."""

    name: str
    contexts: list[int]
    heads: int = 32
    page: int = 64
    bound: int | None = None


def decode_cases() -> list[DecodeCase]:
    uneven = random.Random(0)
    return [
        *(DecodeCase(f"{rows}x{n}", [n] * rows) for rows, n in ((64, 1024), (256, 1024), (512, 512))),
        *(DecodeCase(f"{rows}x{n}", [n] * rows) for rows, n in ((64, 4096), (8, 32768))),
        *(DecodeCase(f"64x1024 page {page}", [1024] * 64, page=page) for page in (16, 32, 128, 256)),
        DecodeCase("256x1024 0.6B heads", [1024] * 256, heads=16),
        DecodeCase("256xU[100,2048]", [uneven.randint(100, 2048) for _ in range(256)]),
        *(DecodeCase(f"{rows}x1024 bound 40960", [1024] * rows, bound=40960) for rows in (1, 4, 8, 16, 17, 24, 32)),
    ]


PREFILL_CASES = {"8x2048": (8, 2048), "2x8192": (2, 8192), "32x512": (32, 512)}


@triton.jit
def _stream_kernel(x_ptr: tl.tensor, largest_ptr: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Each program reads one run of BLOCK int32 and writes one number."""
    program = tl.program_id(0)
    x = tl.load(x_ptr + program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(largest_ptr + program, tl.max(x, 0))


def graph_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Median seconds of one call, all of them captured into one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:]) / len(calls)


def stream_bandwidth(pool: Tensor) -> float:
    """TB/s of the best plain read."""
    x = pool.view(torch.int32)[: STREAM_BYTES // 4]
    rates = []
    for block, num_warps in ((8192, 4), (16384, 8), (16384, 16)):
        largest = torch.empty(x.numel() // block, dtype=torch.int32, device="cuda")

        read = partial(_stream_kernel[(largest.numel(),)], x, largest, BLOCK=block, num_warps=num_warps)
        rates.append(x.nbytes / graph_seconds([read] * 2) / 1e12)
    return max(rates)


def make_pool() -> Tensor:
    """Flat random numbers, in a pool that fills most of the card, or 60 GB."""
    num_bytes = min(POOL_BYTES, torch.cuda.mem_get_info()[0] * 3 // 5)
    pool = torch.empty(num_bytes // 2, dtype=DTYPE, device="cuda")
    noise = torch.randn(NOISE_ELEMENTS, dtype=DTYPE, device="cuda")
    for chunk in pool.split(NOISE_ELEMENTS):
        chunk.copy_(noise[: chunk.numel()])
    return pool


def layer_views(pool: Tensor, page: int) -> list[tuple[Tensor, Tensor]]:
    """(k_pages, v_pages) of each layer, [blocks, page, K, D], the block outermost."""
    block_shape = (LAYERS, 2, page, KV_HEADS, HEAD_DIM)
    num_blocks = pool.numel() // torch.Size(block_shape).numel()
    pages = pool[: num_blocks * torch.Size(block_shape).numel()].view(num_blocks, *block_shape)
    return [(pages[:, layer, 0], pages[:, layer, 1]) for layer in range(LAYERS)]


def scattered_tables(rows: int, columns: int, num_blocks: int) -> Tensor:
    """Distinct random blocks of the whole pool; if it has too few, columns past the contexts repeat."""
    ids = torch.randperm(num_blocks, device="cuda").int()
    return ids.repeat(-(-rows * columns // num_blocks))[: rows * columns].view(columns, rows).T.contiguous()


def placed_tables(placement: str, rows: int, columns: int, num_blocks: int) -> Tensor:
    if placement == "scattered":
        return scattered_tables(rows, columns, num_blocks)
    ids = torch.arange(rows * columns, dtype=torch.int32, device="cuda") % num_blocks
    return ids.view(rows, columns) if placement == "ordered" else ids.view(columns, rows).T.contiguous()


def check(out: Tensor, exact: Tensor, name: str) -> None:
    error = ((out.double() - exact).norm() / exact.norm()).item()
    if not error <= ERROR_BOUND:
        raise SystemExit(f"{name}: error {error:.1e} against float64 is above {ERROR_BOUND:.0e}")


class DecodeInputs(NamedTuple):
    q: Tensor
    views: list[tuple[Tensor, Tensor]]
    tables: Tensor
    contexts: Tensor
    bound: int
    num_bytes: int  # KV of one call


def decode_inputs(case: DecodeCase, pool: Tensor, placement: str = "scattered") -> DecodeInputs:
    views = layer_views(pool, case.page)
    bound = case.bound or max(case.contexts)
    q = torch.randn(len(case.contexts), case.heads, HEAD_DIM, device="cuda").to(DTYPE)
    tables = placed_tables(placement, len(case.contexts), -(-bound // case.page), views[0][0].shape[0])
    contexts = torch.tensor(case.contexts, dtype=torch.int32, device="cuda")
    return DecodeInputs(q, views, tables, contexts, bound, sum(case.contexts) * KV_HEADS * HEAD_DIM * 2 * 2)


def time_decode(inputs: DecodeInputs, name: str, **options: Any) -> float:
    """Seconds of one call, launched as usual: many in a row. Its first and last rows are checked."""
    options.setdefault("pdl", False)  # behind its like, an early start places programs unevenly

    def call(layer: int) -> Tensor:
        arguments = inputs.q, *inputs.views[layer], inputs.tables, inputs.contexts
        return paged_decode(*arguments, max_context_tokens=inputs.bound, **options)

    rows = torch.tensor([0, len(inputs.contexts) - 1], device="cuda")
    few = inputs.q[rows], *inputs.views[3], inputs.tables[rows], inputs.contexts[rows]
    check(call(3)[rows], paged_decode_reference(*few), name)
    return graph_seconds([partial(call, layer) for layer in range(LAYERS)])


def time_decode_of(backend: AttentionBackend, inputs: DecodeInputs) -> float:
    slots = torch.zeros(len(inputs.contexts), dtype=torch.int64, device="cuda")
    meta = DecodeMetadata(inputs.contexts, inputs.tables, slots, inputs.bound)
    return graph_seconds([partial(backend.decode, inputs.q, *views, meta) for views in inputs.views])


def bench_decode(pool: Tensor, ceiling: float, fa3: AttentionBackend | None) -> dict[str, dict[str, float]]:
    print(f"\ndecode, K = 8, D = 128, bf16{'':18} splits     us    TB/s   share   FA3 TB/s")
    rows: dict[str, dict[str, float]] = {}
    for case in decode_cases():
        inputs = decode_inputs(case, pool)
        splits = choose_num_splits(len(case.contexts) * KV_HEADS, inputs.bound, count_sms(pool.device))
        seconds = time_decode(inputs, case.name)
        rate = inputs.num_bytes / seconds / 1e12
        row = {"us": seconds * 1e6, "tb_s": rate, "share": rate / ceiling, "splits": splits}
        if fa3 is not None:
            row["fa3_tb_s"] = inputs.num_bytes / time_decode_of(fa3, inputs) / 1e12
        theirs = f"{row['fa3_tb_s']:10.2f}" if fa3 is not None else ""
        print(f"  {case.name:42} {splits:4d} {row['us']:7.1f} {rate:7.2f} {row['share']:7.1%} {theirs}", flush=True)
        rows[case.name] = row
    return rows


def bench_placements(pool: Tensor, placements: Sequence[str]) -> dict[str, float]:
    """TB/s by case and placement."""
    rates = {}
    for case in (case for case in decode_cases() if case.name in ("256x1024", "512x512")):
        for placement in placements:
            name, inputs = f"{case.name} {placement}", decode_inputs(case, pool, placement)
            rates[name] = inputs.num_bytes / time_decode(inputs, name) / 1e12
            print(f"  {name:24} {rates[name]:.3f} TB/s", flush=True)
    return rates


class PrefillInputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    views: list[tuple[Tensor, Tensor]]
    meta: PrefillMetadata
    flops: float


def prefill_inputs(sequences: int, length: int, pool: Tensor, page: int = 64) -> PrefillInputs:
    """Whole prompts, their KV stored in two layers of the pool."""
    views = layer_views(pool, page)[:2]
    tokens = sequences * length
    qkv = torch.randn(tokens, 32 + 2 * KV_HEADS, HEAD_DIM, device="cuda").to(DTYPE)
    q, k, v = qkv.split([32, KV_HEADS, KV_HEADS], dim=1)
    tables = scattered_tables(sequences, -(-length // page), views[0][0].shape[0])
    token = torch.arange(length, device="cuda")
    slots = (tables.long()[:, token // page] * page + token % page).flatten()
    for k_pages, v_pages in views:
        store_kv(k, v, k_pages, v_pages, slots)
    meta = PrefillMetadata(
        cu_seqlens_q=torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda"),
        context_lens=torch.full((sequences,), length, dtype=torch.int32, device="cuda"),
        block_tables=tables,
        slot_mapping=slots,
        max_query_tokens=length,
        max_context_tokens=length,
        host_query_lens=(length,) * sequences,
        host_context_lens=(length,) * sequences,
    )
    return PrefillInputs(q, k, v, views, meta, 4 * 32 * HEAD_DIM * sequences * length * (length + 1) / 2)


def time_prefill(inputs: PrefillInputs, name: str, tiles: PrefillTiles | None = None) -> float:
    meta = inputs.meta

    def call(views: tuple[Tensor, Tensor]) -> Tensor:
        tables = meta.block_tables, meta.cu_seqlens_q, meta.context_lens
        return paged_prefill(inputs.q, *views, *tables, meta.max_query_tokens, tiles=tiles)

    last = slice(int(meta.host_query_lens[0]) * (len(meta.host_query_lens) - 1), None)
    few = meta.block_tables[-1:], meta.cu_seqlens_q[:2], meta.context_lens[-1:]
    if meta.max_query_tokens <= 2048:  # float64 scores of more would not fit
        check(call(inputs.views[0])[last], paged_prefill_reference(inputs.q[last], *inputs.views[0], *few), name)
    return graph_seconds([partial(call, views) for views in inputs.views])


def time_sdpa(inputs: PrefillInputs) -> float:
    sequences = len(inputs.meta.host_query_lens)
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2).contiguous() for x in inputs[:3])

    def call() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return graph_seconds([call] * 2)


def bench_prefill(pool: Tensor, fa3: AttentionBackend | None) -> dict[str, dict[str, float]]:
    print("\nprefill, 32 / 8 heads of 128, bf16, TFLOP/s       ours    SDPA     FA3")
    rows: dict[str, dict[str, float]] = {}
    for name, (sequences, length) in PREFILL_CASES.items():
        inputs = prefill_inputs(sequences, length, pool)
        seconds = {"ours": time_prefill(inputs, name), "sdpa": time_sdpa(inputs)}
        if fa3 is not None:
            seconds["fa3"] = graph_seconds(
                [partial(fa3.prefill, inputs.q, *views, inputs.meta) for views in inputs.views]
            )
        rows[name] = {who: inputs.flops / each / 1e12 for who, each in seconds.items()}
        print(f"  {name:44}" + "".join(f"{rate:8.0f}" for rate in rows[name].values()), flush=True)
    return rows


def sweep_decode_tiles(pool: Tensor, ceiling: float) -> dict[str, dict[str, float]]:
    print("\nsweep: decode, share of the read bandwidth by (tile tokens, warps, stages)")
    names = ("64x1024", "256x1024", "8x32768", "64x1024 page 16", "64x1024 page 128")
    cases = [case for case in decode_cases() if case.name in names]
    results: dict[str, dict[str, float]] = {}
    for tiles in DECODE_SWEEP:
        row = results[str(tuple(tiles))] = {}
        for case in cases:
            inputs = decode_inputs(case, pool)
            row[case.name] = inputs.num_bytes / time_decode(inputs, case.name, tiles=tiles) / 1e12 / ceiling
        print(f"  {tuple(tiles)!s:16}", "  ".join(f"{name} {share:.1%}" for name, share in row.items()), flush=True)
    return results


def sweep_splits(pool: Tensor) -> dict[str, dict[str, float]]:
    print("\nsweep: decode, us by splits / the fewest tokens of one")
    results: dict[str, dict[str, float]] = {}
    for case in decode_cases():
        if case.bound is None and "U[" not in case.name:
            continue
        inputs = decode_inputs(case, pool)
        row = results[case.name] = {}
        for splits, fewest in ((1, 128), (2, 128), (4, 128), (8, 128), (16, 64), (16, 128), (4, 512)):
            options = {"num_splits": splits, "min_split_tokens": fewest}
            row[f"{splits}/{fewest}"] = time_decode(inputs, case.name, **options) * 1e6
        print(f"  {case.name:24}", "  ".join(f"{key} {us:.1f}" for key, us in row.items()), flush=True)
    return results


def sweep_prefill_tiles(pool: Tensor) -> dict[str, dict[str, float]]:
    print("\nsweep: prefill, TFLOP/s by (rows, tile tokens, warps, stages)")
    results: dict[str, dict[str, float]] = {}
    for tiles in PREFILL_SWEEP:
        row = results[str(tuple(tiles))] = {}
        for name, shape in PREFILL_CASES.items():
            for page in (64, 128):
                inputs = prefill_inputs(*shape, pool, page)
                row[f"{name} page {page}"] = inputs.flops / time_prefill(inputs, name, tiles) / 1e12
        print(f"  {tuple(tiles)!s:20}", "  ".join(f"{name} {rate:.0f}" for name, rate in row.items()), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also time other tiles and splits (minutes)")
    parser.add_argument("--placement", type=lambda names: names.split(","), help=f"some of {','.join(PLACEMENTS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.placement or ()) - set(PLACEMENTS):
        parser.error(f"--placement {','.join(unknown)} is none of {','.join(PLACEMENTS)}")
    torch.manual_seed(0)
    pool = make_pool()
    ceiling = stream_bandwidth(pool)
    print(f"{torch.cuda.get_device_name()}: a stream reads {ceiling:.2f} TB/s")
    if arguments.placement:
        print(json.dumps({"stream_tb_s": ceiling, "decode_tb_s": bench_placements(pool, arguments.placement)}))
        return
    fa3_module = find_module("flash_attn_interface")
    fa3 = None if fa3_module is None else FlashAttention(TritonAttention(HEAD_DIM), fa3=fa3_module)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "stream_tb_s": ceiling,
        "decode": bench_decode(pool, ceiling, fa3),
        "prefill_tflop_s": bench_prefill(pool, fa3),
    }
    if arguments.sweep:
        result["sweep_decode_tiles"] = sweep_decode_tiles(pool, ceiling)
        result["sweep_splits_us"] = sweep_splits(pool)
        result["sweep_prefill_tiles"] = sweep_prefill_tiles(pool)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
