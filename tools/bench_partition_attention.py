"""Check and time decode attention on a few SMs: TB/s of keys and values on partitions of a Hopper card.

    python tools/bench_partition_attention.py           # needs one Hopper GPU, nanovllm and green_ctx on PYTHONPATH
    python tools/bench_partition_attention.py ring      # only variants whose name contains one of the words

Every figure is the median over replays of a CUDA graph of a few layers' calls, captured on a green-context stream,
over blocks scattered in a pool of many times the L2. `stream` reads as many bytes in a row; `tiles` reads the same
pages and computes nothing. Every other variant is compared with float64 before it is timed, in a pool of NaN.
Variants run in a child process; one that dies or is silent for too long is left out, and the next child goes on behind
it. The last line is one JSON object, variant → SMs → case → TB/s.
"""

from __future__ import annotations

import json
import queue
import random
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from bench_attention import scattered_tables
from sweep_prefill import compile_ahead, read_lines
from torch import Tensor

from green_ctx import split_device_green_ctx_by_sm_count
from nanovllm.kernels.paged_decode import count_sms, paged_decode, paged_decode_reference
from nanovllm.kernels.paged_decode_hopper import RingShape, paged_decode_ring
from nanovllm.kernels.paged_prefill_hopper import page_descriptor

KV_HEADS, HEADS, HEAD_DIM, PAGE, LAYERS, DTYPE = 8, 32, 128, 64, 8, torch.bfloat16
SMS = (132, 60, 52, 44, 36, 28)
CALLS_PER_GRAPH, REPLAYS = 4, 3
ERROR_BOUND = 8e-3
MOST_STUCK = 2  # then the bench gives up: each costs a timeout and a new child
START_LIMIT_S, SILENCE_LIMIT_S = 90, 15  # of a child before its first variant, and between two lines after that
Run = Callable[..., Any]  # of q, k_pages, v_pages, block_tables, context_lens, max_context_tokens, num_sms


class LoadTiles(NamedTuple):
    """Of a program that does nothing but load."""

    tile_tokens: int = 64
    num_warps: int = 2
    num_stages: int = 3
    programs_per_sm: int = 3


def variants() -> dict[str, Run]:
    rings = [(2, 3), (3, 2), (6, 1)]
    return {
        "stream": read_stream,
        "paged_decode": paged_decode,
        f"ring {rings[0]} no pdl": partial(paged_decode_ring, ring=RingShape(*rings[0]), pdl=False),
        **{f"ring {each}": partial(paged_decode_ring, ring=RingShape(*each)) for each in rings},
        "tiles": partial(read_tiles, tiles=LoadTiles()),
    }


def case_contexts() -> dict[str, list[int]]:
    uneven = random.Random(0)
    cases = {f"{rows}x{n}": [n] * rows for rows, n in ((256, 512), (256, 1024), (128, 1024), (32, 4096))}
    return cases | {"256xU[64,2048]": [uneven.randint(64, 2048) for _ in range(256)]}


# -- reading without computing


@triton.jit
def _stream_kernel(x_ptr: tl.tensor, largest_ptr: tl.tensor, BLOCK: tl.constexpr) -> None:
    program = tl.program_id(0)
    x = tl.load(x_ptr + program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(largest_ptr + program, tl.max(x, 0))


def read_stream(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, contexts: Tensor, *_: Any, **__: Any
) -> None:
    """As many bytes of the whole pool's start as the contexts have; not the layer's own pages."""
    programs = tables.numel() * PAGE * KV_HEADS * HEAD_DIM * 2 * DTYPE.itemsize // (8192 * 4)
    pool = k_pages.as_strided([programs * 8192 * 2], [1], 0)
    largest = torch.empty(programs, dtype=torch.int32, device=q.device)
    _stream_kernel[(programs,)](pool.view(torch.int32), largest, BLOCK=8192, num_warps=4)


@triton.jit(do_not_specialize=["num_columns", "num_rows"])
def _tiles_kernel(
    out_ptr: tl.tensor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    tables_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Grid (K, S). The table's pages in equal shares."""
    share, num_shares = tl.program_id(1), tl.num_programs(1)
    total = num_rows * num_columns * (PAGE // TILE)
    largest = tl.zeros([TILE, HEAD_DIM], tl.int16)
    begin, end = share * total // num_shares, (share + 1) * total // num_shares
    block = tl.load(tables_ptr + begin // (PAGE // TILE))
    for tile in tl.range(begin, end, num_stages=STAGES):
        token, column = tile % (PAGE // TILE) * TILE, tl.program_id(0) * HEAD_DIM
        k = k_desc.load([block, token, column]).reshape(TILE, HEAD_DIM)
        v = v_desc.load([block, token, column]).reshape(TILE, HEAD_DIM)
        block = tl.load(tables_ptr + tl.minimum(tile + 1, total - 1) // (PAGE // TILE))
        largest = tl.maximum(largest, tl.maximum(k, v))
    tl.store(out_ptr + share * tl.num_programs(0) + tl.program_id(0), tl.max(largest))


def read_tiles(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables: Tensor,
    contexts: Tensor,
    bound: int,
    *,
    num_sms: int,
    tiles: LoadTiles,
    **_: Any,
) -> None:
    """All pages of the table."""
    shares = num_sms * tiles.programs_per_sm // KV_HEADS
    _tiles_kernel[(KV_HEADS, shares)](
        torch.empty(KV_HEADS * shares, dtype=torch.int16, device=q.device),
        page_descriptor(k_pages.view(torch.int16), tiles.tile_tokens),
        page_descriptor(v_pages.view(torch.int16), tiles.tile_tokens),
        tables,
        *tables.shape,
        HEAD_DIM=HEAD_DIM,
        PAGE=PAGE,
        TILE=tiles.tile_tokens,
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )


# -- inputs


class Inputs(NamedTuple):
    q: Tensor
    views: list[tuple[Tensor, Tensor]]
    tables: Tensor
    contexts: Tensor
    num_bytes: int  # KV of one call

    def call(self, run: Run, layer: int, num_sms: int, out: Tensor | None = None) -> Any:
        bound = self.tables.shape[1] * PAGE
        return run(self.q, *self.views[layer], self.tables, self.contexts, bound, num_sms=num_sms, out=out)


def make_inputs(contexts: list[int], pages: Tensor, tables: Tensor | None = None) -> Inputs:
    q = torch.randn(len(contexts), HEADS + 2 * KV_HEADS, HEAD_DIM, device="cuda").to(DTYPE)[:, :HEADS]
    if tables is None:
        tables = scattered_tables(len(contexts), -(-max(contexts) // PAGE), len(pages))
    views = [(pages[:, layer, 0], pages[:, layer, 1]) for layer in range(LAYERS)]
    lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    return Inputs(q, views, tables, lens, sum(contexts) * KV_HEADS * HEAD_DIM * 2 * DTYPE.itemsize)


def make_pool(num_blocks: int) -> Tensor:
    """Random pages; one block of noise for each, scaled, so that making them costs no time."""
    noise = torch.randn(64, LAYERS, 2, PAGE, KV_HEADS, HEAD_DIM, device="cuda").to(DTYPE)
    return noise.repeat(-(-num_blocks // 64), 1, 1, 1, 1, 1)


def checked_inputs() -> Inputs:
    """Uneven contexts; NaN wherever none reaches, and a table of garbage behind them."""
    contexts = [1, 0, 63, 64, 65, 2049, 127, 500, 0, 1000, 16, 33] + [300 + 7 * i for i in range(60)]
    columns = -(-max(contexts) // PAGE) + 1
    pages = torch.full(
        (columns * len(contexts), LAYERS, 2, PAGE, KV_HEADS, HEAD_DIM), float("nan"), device="cuda", dtype=DTYPE
    )
    tables = torch.randperm(len(pages), device="cuda").int().view(len(contexts), columns)
    for row, context in enumerate(contexts):
        for column in range(-(-context // PAGE)):
            page = pages[tables[row, column], :, :, : min(PAGE, context - column * PAGE)]
            page.copy_(torch.randn(page.shape, device="cuda"))
        tables[row, -(-context // PAGE) :] = 1 << 30
    return make_inputs(contexts, pages, tables)


def worst_error(run: Run, inputs: Inputs, num_sms: int) -> float:
    """Of any row, relative to its norm; infinite for NaN, and where a row of zeros is none."""
    out = torch.full(inputs.q.shape, float("nan"), dtype=DTYPE, device="cuda")
    inputs.call(run, 3, num_sms, out)
    exact = paged_decode_reference(inputs.q, *inputs.views[3], inputs.tables, inputs.contexts)
    norms = exact.flatten(1).norm(dim=1).clamp(min=1e-30)
    error = ((out.double() - exact).flatten(1).norm(dim=1) / norms).max().item()
    return error if error == error else float("inf")


# -- the child


def make_streams() -> dict[int, torch.cuda.Stream]:
    """SMs → a stream on a partition of so many, kept until the process ends."""
    whole = count_sms(torch.device("cuda", 0))
    streams = {whole: torch.cuda.Stream()}
    for num_sms in SMS[1:]:
        asked = num_sms if num_sms % 8 == 0 else whole - num_sms
        made, partition = split_device_green_ctx_by_sm_count(0, [asked]), num_sms % 8 != 0
        streams[made.sm_counts[partition]] = made[0][partition]
    return streams


def graph_seconds(calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream) -> float:
    """Median seconds of one call, all of them captured into one graph on `stream`."""
    graph, times = torch.cuda.CUDAGraph(), []
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        for call in calls:
            call()
        graph.capture_end()
        for _ in range(REPLAYS + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:]) / len(calls)


def run_child(names: list[str]) -> None:
    """One line of JSON before a variant is touched, and one with its result."""
    torch.manual_seed(0)
    streams, checks = make_streams(), checked_inputs()
    contexts = case_contexts()
    pool = make_pool(max(len(each) * -(-max(each) // PAGE) for each in contexts.values()))
    cases = {name: make_inputs(each, pool) for name, each in contexts.items()}
    runs = {name: run for name, run in variants().items() if name in names}
    todo = [
        partial(each.call, run, 0, a) for run in runs.values() for each in (checks, *cases.values()) for a in streams
    ]
    compile_ahead(todo)
    torch.cuda.synchronize()
    print(f"partitions: {list(streams)}", flush=True)
    for name, run in runs.items():
        print(json.dumps({"begin": name}), flush=True)
        print(json.dumps({"name": name, **measure(name, run, checks, cases, streams)}), flush=True)


def measure(
    name: str, run: Run, checks: Inputs, cases: dict[str, Inputs], streams: dict[int, torch.cuda.Stream]
) -> dict[str, Any]:
    try:
        if not name.startswith(("stream", "tiles")):
            error = max(worst_error(run, checks, num_sms) for num_sms in streams)
            if not error <= ERROR_BOUND:
                return {"failed": f"error {error:.1e}"}
        return {str(a): {case: rate(name, run, each, a, streams[a]) for case, each in cases.items()} for a in streams}
    except Exception as error:  # a variant that does not compile or launch: the others go on
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def rate(name: str, run: Run, inputs: Inputs, num_sms: int, stream: torch.cuda.Stream) -> float:
    """TB/s. What reads without computing reads whole tables."""
    out = torch.empty(inputs.q.shape, dtype=DTYPE, device="cuda")
    calls = [partial(inputs.call, run, layer, num_sms, out) for layer in range(CALLS_PER_GRAPH)]
    whole_tables = inputs.tables.numel() * PAGE * KV_HEADS * HEAD_DIM * 2 * DTYPE.itemsize
    num_bytes = whole_tables if name.startswith(("stream", "tiles")) else inputs.num_bytes
    return round(num_bytes / graph_seconds(calls, stream) / 1e12, 3)


# -- the parent


def watch_child(names: list[str]) -> tuple[list[dict[str, Any]], str | None]:
    """Results of one child, and the variant that it was at when it fell silent or died (None: it finished)."""
    child = subprocess.Popen([sys.executable, __file__, "--child", *names], stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=read_lines, args=(child.stdout, lines), daemon=True).start()
    results: list[dict[str, Any]] = []
    at, limit_s = None, START_LIMIT_S
    while True:
        try:
            line = lines.get(timeout=limit_s)
        except queue.Empty:
            child.kill()
            break
        if line is None:
            at = at if child.wait() else ""
            break
        if not line.startswith("{"):
            print(line, end="", flush=True)
            continue
        limit_s = SILENCE_LIMIT_S
        message = json.loads(line)
        at = message.get("begin", at)
        if "name" in message:
            results.append(message)
            show(message)
    if at is None:
        raise SystemExit("the child failed before its first variant")
    return results, at or None


def show(result: dict[str, Any]) -> None:
    print(result["name"], result.get("failed", ""), flush=True)
    for num_sms, rates in result.items():
        if isinstance(rates, dict):
            print(f"  {num_sms:>4} SMs  " + "  ".join(f"{case} {rate:.2f}" for case, rate in rates.items()), flush=True)


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--child"]:
        return run_child(words[1:])
    names = [name for name in variants() if not words or any(word in name for word in words)]
    results, lives = list[dict[str, Any]](), MOST_STUCK + 1
    while names and lives:
        done, stuck = watch_child(names)
        results += done
        if stuck is None:
            break
        print(f"STUCK or dead at: {stuck}", flush=True)
        names, lives = names[names.index(stuck) + 1 :], lives - 1
    print(json.dumps({result.pop("name"): result for result in results}))


if __name__ == "__main__":
    main()
