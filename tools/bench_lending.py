"""One card that decodes while prompts queue: SMs lent to prefill, or chunks of prompts in the decode steps.

    python tools/bench_lending.py --shape 8b --cases 64x1024,256x1024      # one GPU, nanovllm on PYTHONPATH

A case is BATCHxCONTEXT. `D:P`: decode steps on D SMs while chunks of `--chunk` tokens run on P others, for
`--seconds`; the rates are shares of what each reaches alone on the whole card, and turns of one and the other would
give a sum of 1. `mixed`: chunks of so many tokens inside the decode steps, one pass over the weights. `worst`: the
longest decode step, in steps alone. Everything is replayed from graphs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_pipeline import DEVICE, PAGE_TOKENS, Captured, capture, make_model

from bench_steps import Case
from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.pipeline_ways import PARTITION_TOOLS
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, MixedMetadata, PrefillMetadata
from nanovllm.models.qwen3 import Qwen3ForCausalLM

MIXED_ROWS = (256, 512, 1024, 2048)  # tokens of a chunk and decode rows together


class Work(NamedTuple):
    """Decode rows and a prompt's chunk over one cache, in blocks of their own."""

    model: Qwen3ForCausalLM
    cache: KVCache
    case: Case
    chunk_tokens: int

    def decode_inputs(self) -> tuple[Tensor, Tensor, DecodeMetadata]:
        rows, context = self.case
        columns = -(-context // PAGE_TOKENS)
        tables = torch.arange(rows * columns, device=DEVICE, dtype=torch.int32).view(rows, columns)
        mapping = tables[:, -1].long() * PAGE_TOKENS + (context - 1) % PAGE_TOKENS
        lens = torch.full((rows,), context, dtype=torch.int32, device=DEVICE)
        order = torch.arange(rows, dtype=torch.int32, device=DEVICE)
        ids = torch.randint(self.model.config.vocab_size, (rows,), device=DEVICE)
        positions = torch.full((rows,), context - 1, dtype=torch.int64, device=DEVICE)
        return ids, positions, DecodeMetadata(lens, tables, mapping, context, order)

    def prompt_inputs(self, num_tokens: int) -> tuple[Tensor, Tensor, PrefillMetadata]:
        """The last `num_tokens` of a prompt of `chunk_tokens`."""
        rows, context = self.case
        columns, first = -(-self.chunk_tokens // PAGE_TOKENS), rows * -(-context // PAGE_TOKENS)
        table = torch.arange(first, first + columns, device=DEVICE, dtype=torch.int32)[None]
        positions = torch.arange(self.chunk_tokens - num_tokens, self.chunk_tokens, device=DEVICE)
        mapping = table[0, positions // PAGE_TOKENS].long() * PAGE_TOKENS + positions % PAGE_TOKENS
        starts = torch.tensor([0, num_tokens], dtype=torch.int32, device=DEVICE)
        lens = torch.tensor([self.chunk_tokens], dtype=torch.int32, device=DEVICE)
        host = (num_tokens,), (self.chunk_tokens,)
        ids = torch.randint(self.model.config.vocab_size, (num_tokens,), device=DEVICE)
        return ids, positions, PrefillMetadata(starts, lens, table, mapping, num_tokens, self.chunk_tokens, *host)


def main() -> None:
    args = make_parser().parse_args()
    model = make_model(args.shape)
    print(f"{torch.cuda.get_device_name()}, {args.shape}, chunks of {args.chunk} tokens", flush=True)
    counts = [tuple(map(int, pair.split(":"))) for pair in args.splits.split(",")]
    manager = GreenManager(DEVICE, *counts[0])
    cases = [measure_case(model, case, manager, counts, args) for case in map(Case.parse, args.cases.split(","))]
    print(json.dumps({"shape": args.shape, "device": torch.cuda.get_device_name(), "cases": cases}), flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--cases", default="64x1024,256x1024", metavar="BATCHxCONTEXT,...")
    parser.add_argument("--splits", default="88:44,68:64,52:80,36:96", metavar="D:P,...")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=1.5)
    return parser


def measure_case(
    model: Qwen3ForCausalLM, case: Case, manager: GreenManager, counts: list[Any], args: argparse.Namespace
) -> dict[str, Any]:
    blocks = case.batch * -(-case.tokens // PAGE_TOKENS) + -(-args.chunk // PAGE_TOKENS)
    work = Work(model, KVCache(blocks, PAGE_TOKENS, model.config, torch.bfloat16, DEVICE), case, args.chunk)
    for part in work.cache.pages.split(64):
        part.normal_()
    whole = torch.cuda.Stream(DEVICE)
    decode, prefill = (captured(work, which, whole) for which in (decode_step, prefill_step))
    decode_ms, prefill_ms = (alone_ms(graph, whole, args.seconds / 2) for graph in (decode, prefill))
    print(f"{case.batch}x{case.tokens}: decode step {decode_ms:.2f} ms, chunk {prefill_ms:.2f} ms alone", flush=True)
    ways = {}
    for split in (manager.prepare(*pair) for pair in counts):
        streams = split.attention_stream, split.ffn_stream
        graphs = [
            captured(work, which, stream, sms)
            for which, stream, sms in zip((decode_step, prefill_step), streams, split.granted, strict=True)
        ]
        name = f"{split.granted.attention_sms}:{split.granted.ffn_sms}"
        ways[name] = lent(graphs, streams, decode_ms, prefill_ms, args.seconds)
        print_way(name, ways[name])
    for total in (total for total in MIXED_ROWS if total > case.batch):
        tokens = min(total - case.batch, args.chunk)
        ms = alone_ms(captured(work, mixed_step(tokens), whole), whole, args.seconds / 2)
        rates = decode_ms / ms, tokens / args.chunk * prefill_ms / ms
        ways[f"mixed {tokens}"] = {"decode": rates[0], "prefill": rates[1], "sum": sum(rates), "worst": ms / decode_ms}
        print_way(f"mixed {tokens}", ways[f"mixed {tokens}"])
    return {"case": case, "decode_ms": decode_ms, "prefill_ms": prefill_ms, "ways": ways}


def print_way(name: str, way: dict[str, float]) -> None:
    print(f"  {name:12} " + "  ".join(f"{kind} {value:.3f}" for kind, value in way.items()), flush=True)


# -- what runs


def decode_step(work: Work) -> Callable[[], object]:
    ids, positions, metadata = work.decode_inputs()
    return lambda: work.model.forward_decode(ids, positions, work.cache, metadata)


def prefill_step(work: Work) -> Callable[[], object]:
    ids, positions, metadata = work.prompt_inputs(work.chunk_tokens)
    last = torch.tensor([work.chunk_tokens - 1], device=DEVICE)
    return lambda: work.model.forward_prefill(ids, positions, work.cache, metadata, last)


def mixed_step(num_tokens: int) -> Callable[[Work], Callable[[], object]]:
    def make(work: Work) -> Callable[[], object]:
        ids_B, positions_B, rows = work.decode_inputs()
        ids_T, positions_T, prompt = work.prompt_inputs(num_tokens)
        metadata = MixedMetadata(prompt, rows, torch.cat([prompt.slot_mapping, rows.slot_mapping]))
        ids, positions = torch.cat([ids_T, ids_B]), torch.cat([positions_T, positions_B])
        wanted = torch.arange(num_tokens - 1, num_tokens + len(ids_B), device=DEVICE)
        return lambda: work.model.forward_mixed(ids, positions, work.cache, metadata, wanted)

    return make


def captured(
    work: Work, which: Callable[[Work], Callable[[], object]], stream: Any, num_sms: int | None = None
) -> Captured:
    """A step's graph; on a partition its kernels are told the partition's SMs."""
    backend, model = work.model.attention, work.model
    total = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    limit: AbstractContextManager[object] = (
        nullcontext() if num_sms is None else PARTITION_TOOLS.sized_for(total, num_sms)
    )
    run = which(work)
    torch.cuda.synchronize()
    try:
        model.attention = on_partition(model, num_sms)
        with torch.cuda.stream(stream), torch.inference_mode(), limit:
            return capture(run, torch.cuda.graph_pool_handle())
    finally:
        model.attention = backend


def on_partition(model: Qwen3ForCausalLM, num_sms: int | None) -> AttentionBackend:
    return model.attention if num_sms is None else PARTITION_TOOLS.backend(model, num_sms)


# -- measuring


def alone_ms(graph: Captured, stream: Any, seconds: float) -> float:
    return statistics.median(step_times(graph, stream, time.perf_counter() + seconds))


def step_times(graph: Captured, stream: Any, until: float) -> list[float]:
    """Milliseconds from end to end of each replay, two of them queued at a time, until then."""
    ends: list[torch.cuda.Event] = []
    with torch.cuda.stream(stream):
        while time.perf_counter() < until:
            graph.replay()
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
            if len(ends) > 1:
                ends[-2].synchronize()
        stream.synchronize()
    return [before.elapsed_time(after) for before, after in zip(ends[1:], ends[2:], strict=False)]


def lent(
    graphs: list[Captured], streams: tuple[Any, Any], decode_ms: float, prefill_ms: float, seconds: float
) -> dict[str, float]:
    """Both at once, a thread each."""
    times: dict[int, list[float]] = {}
    until = time.perf_counter() + seconds

    def run(index: int) -> None:
        with torch.cuda.device(DEVICE):
            times[index] = step_times(graphs[index], streams[index], until)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rates = decode_ms / statistics.fmean(times[0]), prefill_ms / statistics.fmean(times[1])
    return {"decode": rates[0], "prefill": rates[1], "sum": sum(rates), "worst": max(times[0]) / decode_ms}


if __name__ == "__main__":
    main()
