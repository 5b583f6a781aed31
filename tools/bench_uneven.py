"""Decode attention over uneven contexts: a plan made on the card against splits by the number of rows alone.

    python tools/bench_uneven.py                               # attention alone, one GPU, about half a minute
    python tools/bench_uneven.py --shape 8b --cases 64:1x32768+63x512,64:64x1024    # steps of two engines in turn

Attention: Qwen3-8B's heads, 36 layers of one pool over scattered blocks, each way in a graph as in a step (the plan is
made once in it), replayed in turn; medians, microseconds a layer, TB/s of keys and values read once. What both know of
the lengths is a bound of 40,960 tokens. `early`: where even batches are split, launched ahead of the end of the kernel
before, as engines do. Each way's longest, shortest and middle row are compared with float64 first.
Steps: (time of 66 tokens - time of 2) / 64 for the batch, of an engine that plans and of one that does not, both in
this process; medians of `--repeats`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what lies beside the package

import torch
from torch import Tensor

import bench
from bench_steps import MANY_TOKENS, step_seconds
from nanovllm import LLM
from nanovllm.kernels.decode_plan import plan_decode
from nanovllm.kernels.paged_decode import choose_num_splits, count_sms, paged_decode, paged_decode_reference
from nanovllm.kernels.paged_decode_planned import paged_decode_planned
from nanovllm.layers.attention import AttentionBackend
from nanovllm.layers.attention.triton import TritonAttention
from tools.bench_attention import DTYPE, HEAD_DIM, KV_HEADS, LAYERS, check, layer_views, make_pool
from tools.captured import capture

DEVICE = "cuda"
PAGE_TOKENS, HEADS, BOUND_TOKENS, REPLAYS = 64, 32, 40960, 15
CASES = (
    "8:1x32768+7x512",
    "16:1x32768+15x512",
    "24:1x32768+23x512",
    "64:1x32768+63x512",
    "64:4x8192+60x512",
    "256:4x32768+252x512",
    "256:random",  # 100 to 2,048 tokens
    "8:8x1024",
    "8:8x32768",
    "16:16x1024",
    "24:24x1024",
    "32:32x1024",
    "64:64x1024",
    "256:256x1024",
    "512:512x512",
)


def contexts_of(case: str) -> list[int]:
    """Tokens of each row of \"rows:NxTOKENS+NxTOKENS+…\", the rows in random order."""
    rng, (rows, _, groups) = random.Random(case), case.partition(":")
    if groups == "random":
        return [rng.randint(100, 2048) for _ in range(int(rows))]
    contexts = []
    for group in groups.split("+"):
        count, _, tokens = group.partition("x")
        contexts += [int(tokens)] * int(count)
    if len(contexts) != int(rows):
        raise ValueError(f"case {case!r} has {len(contexts)} rows")
    rng.shuffle(contexts)
    return contexts


# -- attention alone


class Inputs(NamedTuple):
    q: Tensor
    views: list[tuple[Tensor, Tensor]]
    tables: Tensor
    contexts: Tensor
    order: Tensor


def make_inputs(contexts: Sequence[int], pool: Tensor) -> Inputs:
    """Every block of a context lies somewhere else in the pool, and belongs to one row."""
    views = layer_views(pool, PAGE_TOKENS)
    counts = [-(-tokens // PAGE_TOKENS) for tokens in contexts]
    ids = torch.randperm(views[0][0].shape[0]).int()
    if sum(counts) > len(ids):
        raise ValueError(f"{sum(counts)} blocks, the pool has {len(ids)}")
    tables = torch.zeros(len(contexts), BOUND_TOKENS // PAGE_TOKENS, dtype=torch.int32)
    for row, own in enumerate(ids[: sum(counts)].split(counts)):
        tables[row, : len(own)] = own
    lengths = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    order = lengths.argsort(descending=True).int()
    q = torch.randn(len(contexts), HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
    return Inputs(q, views, tables.to(DEVICE), lengths, order)


def by_rows(inputs: Inputs, early: bool) -> list[Tensor]:
    """What a step's layers launch without a plan."""
    q, views, tables, lengths, order = inputs
    options: dict[str, Any] = {"row_order": order, "pdl": early}
    return [paged_decode(q, *view, tables, lengths, BOUND_TOKENS, **options) for view in views]


def by_plan(inputs: Inputs, early: bool) -> list[Tensor]:
    q, views, tables, lengths, order = inputs
    plan = plan_decode(lengths, order, BOUND_TOKENS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=DTYPE)
    early_layers = [early and layer > 0 for layer in range(len(views))]  # the first lies right behind the plan
    return [
        paged_decode_planned(q, *view, tables, plan, pdl=pdl) for view, pdl in zip(views, early_layers, strict=True)
    ]


def check_rows(name: str, outs: Sequence[Tensor], inputs: Inputs) -> None:
    places = [0, len(inputs.order) // 2, len(inputs.order) - 1]
    rows = inputs.order[places].long()
    exact = paged_decode_reference(inputs.q[rows], *inputs.views[3], inputs.tables[rows], inputs.contexts[rows])
    check(outs[3][rows], exact, name)


def in_turn_us(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """Median microseconds of a layer of each; their replays alternate."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPLAYS + 2):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / LAYERS)
    return {name: statistics.median(each[2:]) for name, each in times.items()}


def bench_case(case: str, pool: Tensor) -> dict[str, Any]:
    contexts = contexts_of(case)
    inputs = make_inputs(contexts, pool)
    splits = choose_num_splits(len(contexts) * KV_HEADS, BOUND_TOKENS, count_sms(pool.device))
    graphs = {}
    for early in (False, True) if splits > 1 else (False,):
        for name, way in (("rows", by_rows), ("plan", by_plan)):
            name += ", early" if early else ""
            check_rows(f"{case} by {name}", way(inputs, early), inputs)
            graphs[name], _ = capture(lambda way=way, early=early: way(inputs, early))  # type: ignore[misc]
    num_bytes = sum(contexts) * KV_HEADS * HEAD_DIM * 2 * DTYPE.itemsize
    us = in_turn_us(graphs)
    return {"splits": splits, "us": us, "tb_s": {name: num_bytes / each / 1e6 for name, each in us.items()}}


def bench_attention(cases: Sequence[str]) -> dict[str, Any]:
    torch.manual_seed(0)
    pool, rows = make_pool(), {}
    print("us a layer (TB/s) by rows alone, by plan; early launches the same again")
    for case in cases:
        try:
            row = rows[case] = bench_case(case, pool)
        except (Exception, SystemExit) as error:  # the other cases may still tell something
            print(f"  {case:24} FAILED: {type(error).__name__}: {str(error)[:200]}", flush=True)
            rows[case] = {"error": str(error)[:200]}
            continue
        text = "".join(f"{row['us'][name]:9.1f} ({row['tb_s'][name]:.2f})" for name in row["us"])
        print(f"  {case:24} {row['splits']:2d} splits {text}", flush=True)
    return {"attention": rows}


# -- steps of engines


def make_engines(shape: str, cases: Sequence[str], stack: ExitStack) -> dict[str, LLM]:
    """Both as large as the largest case needs."""
    folder = bench.write_shape(Path(stack.enter_context(tempfile.TemporaryDirectory())), shape)
    batches = [contexts_of(case) for case in cases]
    blocks = max(sum((tokens + MANY_TOKENS) // PAGE_TOKENS + 3 for tokens in batch) for batch in batches)
    sizes = {"max_num_seqs": max(map(len, batches)), "num_kvcache_blocks": blocks + 64, "load_format": "dummy"}
    with mock.patch.object(TritonAttention, "planned", AttentionBackend.planned):
        rows = stack.enter_context(LLM(str(folder), kvcache_block_size=PAGE_TOKENS, **sizes))
    plan = stack.enter_context(LLM(str(folder), kvcache_block_size=PAGE_TOKENS, **sizes))
    return {"rows": rows, "plan": plan}


def make_prompts(case: str, vocab_size: int) -> list[list[int]]:
    rng = random.Random(case)
    return [[rng.randrange(vocab_size) for _ in range(tokens)] for tokens in contexts_of(case)]


def bench_steps(shape: str, cases: Sequence[str], repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        engines = make_engines(shape, cases, stack)
        for case in cases:
            prompts = make_prompts(case, engines["plan"].model_config.vocab_size)
            times: dict[str, list[float]] = {name: [] for name in engines}
            for repeat in range(repeats + 1):  # the first finds no prompt cached
                for name, llm in engines.items():
                    taken = step_seconds(llm, prompts)["seconds"] * 1e3
                    times[name] += [taken] if repeat else []
            found[case] = {name: {"ms": statistics.median(each), "all": each} for name, each in times.items()}
            text = ", ".join(
                f"by {name} {row['ms']:.3f} ({min(row['all']):.3f} to {max(row['all']):.3f})"
                for name, row in found[case].items()
            )
            print(f"  {shape} {case:24} {text} ms a step", flush=True)
    return {"shape": shape, "steps": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=bench.SHAPES, help="time the steps of engines of it, not attention alone")
    parser.add_argument("--cases", help=f"some with commas between; left out: {','.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cases = args.cases.split(",") if args.cases else CASES
    for case in cases:
        contexts_of(case)
    figures = bench_steps(args.shape, cases, args.repeats) if args.shape else bench_attention(cases)
    print(json.dumps(figures | {"device": torch.cuda.get_device_name()}))
    sys.exit(int(any("error" in row for row in figures.get("attention", {}).values())))


if __name__ == "__main__":
    main()
