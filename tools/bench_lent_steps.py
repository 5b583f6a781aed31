"""What a card gives while it lends SMs, as the engine drives it: a runner's decode steps and lent steps, a thread each.

    python tools/bench_lent_steps.py --shape 8b --cases 64x1024 --splits 60:72,68:64     # one GPU

A case is BATCHxCONTEXT; contexts grow by a token a step. Rates are shares of what each side reaches alone on the whole
card: turns of one and the other would give a sum of 1. Other than in `bench_lending.py`, decode steps draw on all SMs,
and what steps send and bring back is in their time. `worst`: the longest decode step, in steps alone. The last line is
one JSON object. 8B: about 30 s, most of it for the model and captures.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_pipeline import DEVICE, PAGE_TOKENS, make_model

from bench_steps import Case
from nanovllm import SamplingParams
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.shards import DecodeShard, PrefillChunk, PrefillShard, SamplingRow, SlotEntry
from nanovllm.engine.step_handle import StepHandle
from nanovllm.models.qwen3 import Qwen3ForCausalLM

GROWTH_TOKENS = 1024  # of a context in one measurement, at most
DRAW = SamplingParams(temperature=0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--cases", default="64x1024", metavar="BATCHxCONTEXT,...")
    parser.add_argument("--splits", default="60:72", metavar="D:P,...")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=1.5)
    args = parser.parse_args()
    model, rows = make_model(args.shape), []
    print(f"{torch.cuda.get_device_name()}, {args.shape}, lent steps of {args.chunk} tokens", flush=True)
    for case in map(Case.parse, args.cases.split(",")):
        rows.append(measure_case(model, case, args))
    print(json.dumps({"shape": args.shape, "device": torch.cuda.get_device_name(), "cases": rows}), flush=True)


def measure_case(model: Qwen3ForCausalLM, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    steps = Steps(model, case, args.chunk)
    alone_ms = [period_ms(steps.decode(False), args.seconds / 2), period_ms(steps.prompts(False), args.seconds / 2)]
    decode_ms, prefill_ms = (statistics.median(periods) for periods in alone_ms)
    print(f"{case.batch}x{case.tokens}: decode step {decode_ms:.2f} ms, chunk {prefill_ms:.2f} ms alone", flush=True)
    ways = {}
    for pair in args.splits.split(","):
        try:
            ways[pair] = measure_split(steps, pair, args, decode_ms, prefill_ms)
        except (RuntimeError, ValueError) as error:  # the others still can
            ways[pair] = {"error": str(error)}
        print(f"  {pair}: {ways[pair]}", flush=True)
    return {"case": case, "decode_ms": decode_ms, "prefill_ms": prefill_ms, "ways": ways}


def measure_split(
    steps: Steps, pair: str, args: argparse.Namespace, decode_ms: float, prefill_ms: float
) -> dict[str, Any]:
    decode_sms, prompts_sms = map(int, pair.split(":"))
    free_bytes, started = free(), time.perf_counter()
    steps.runner.start_lending((decode_sms, prompts_sms), args.chunk)
    if not steps.runner.lends:
        raise RuntimeError("no partitions; the warning above says why")
    taken = {"start_s": round(time.perf_counter() - started, 2), "start_mb": round((free_bytes - free()) / 1e6)}
    try:
        beside, lent = both(steps.decode(True), steps.prompts(True), args.seconds)
    finally:
        torch.cuda.synchronize()
        steps.runner.close_pipeline()
    shares = decode_ms / statistics.fmean(beside), prefill_ms / statistics.fmean(lent)
    figures = {"decode": shares[0], "prefill": shares[1], "sum": sum(shares), "worst": max(beside) / decode_ms}
    times_ms = {"decode_ms": statistics.median(beside), "prefill_ms": statistics.median(lent)}
    return {name: round(value, 3) for name, value in (figures | times_ms).items()} | taken


class Steps:
    """A runner, and the steps of one case: rows and a prompt in blocks of their own."""

    def __init__(self, model: Qwen3ForCausalLM, case: Case, chunk_tokens: int) -> None:
        self.case, rng = case, random.Random(0)
        longest = max(case.tokens + GROWTH_TOKENS, chunk_tokens)
        self.columns, chunk_blocks = -(-longest // PAGE_TOKENS), -(-chunk_tokens // PAGE_TOKENS)
        cache = KVCache(case.batch * self.columns + chunk_blocks, PAGE_TOKENS, model.config, model.dtype, DEVICE)
        for part in cache.pages.split(64):
            part.normal_()
        self.runner = ModelRunner(0, model, cache, case.batch, longest)
        self.runner.capture()
        blocks = tuple(range(case.batch * self.columns, cache.num_blocks))[:chunk_blocks]
        tokens = tuple(rng.randrange(model.config.vocab_size) for _ in range(chunk_tokens))
        self.chunk = PrefillChunk(tokens, 0, blocks)
        torch.cuda.synchronize()

    def decode(self, beside_lent: bool) -> Callable[[], StepHandle]:
        """The next decode step, each time; the first one tells the card of its rows anew."""
        slots, entries = tuple(range(self.case.batch)), self._entries()

        def step() -> StepHandle:
            nonlocal entries
            told, entries = entries, ()
            longest = self.columns * PAGE_TOKENS
            return self.runner.run_decode_core(DecodeShard(0, 0, slots, longest, told, (), beside_lent))

        return step

    def _entries(self) -> tuple[SlotEntry, ...]:
        tables = [tuple(range(row * self.columns, (row + 1) * self.columns)) for row in range(self.case.batch)]
        rows = [SamplingRow(DRAW, seed, 0) for seed in range(self.case.batch)]
        return tuple(SlotEntry(slot, slot, self.case.tokens - 1, tables[slot], rows[slot]) for slot in range(len(rows)))

    def prompts(self, lent: bool) -> Callable[[], StepHandle]:
        shard = PrefillShard(0, 0, (self.chunk,), lent)
        return lambda: self.runner.run_prefill(shard)


def both(decode: Callable[[], StepHandle], prompts: Callable[[], StepHandle], seconds: float) -> list[list[float]]:
    """`period_ms` of either, at the same time."""
    periods: list[list[float]] = [[], []]

    def run(index: int, step: Callable[[], StepHandle]) -> None:
        periods[index] = period_ms(step, seconds)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((decode, prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not all(periods):
        raise RuntimeError("a side ran no step; its error is above")
    return periods


def period_ms(step: Callable[[], StepHandle], seconds: float) -> list[float]:
    """Milliseconds from end to end of steps, two of them in flight, for so long. The first one may compile."""
    step().wait()
    until, handles = time.perf_counter() + seconds, [step()]
    while time.perf_counter() < until and len(handles) < GROWTH_TOKENS - 8:
        handles.append(step())
        handles[-2].wait()
    handles[-1].wait()
    ends = [handle.event for handle in handles[1:]]  # the first one began on an idle card
    return [before.elapsed_time(after) for before, after in zip(ends, ends[1:], strict=False)]  # type: ignore[union-attr, arg-type]


def free() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(DEVICE)[0])


if __name__ == "__main__":
    main()
