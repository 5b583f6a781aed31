"""Green contexts used for long: what making and closing them leaves behind, and decode steps on ever another split.

    python tools/bench_green.py --shape 0.6b --rows 256 --switches 1000       # one GPU, nanovllm on PYTHONPATH

Cycles: a split is made, each of its streams runs a kernel, and it is closed; growth is of what the driver has given
out, of torch's tensors, and of resident memory. Load: `--rows` sequences decode at once, each step of all of them on
the next of the splits that `auto` has. `step_ms`: the card's time of the model's part of these steps. `token_gap_ms`:
from token to token of the last sequence, as the engine hears of them. 0 cycles or switches: without that part. The last
line is one JSON object. 0.6B: about 40 s with an empty kernel cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import SHAPES, write_shape
from bench_decode_pipeline import start_on_one_card
from green_ctx import split_device_green_ctx_by_sm_count
from nanovllm import LLM, SamplingParams
from nanovllm.engine import pipeline_runs
from nanovllm.engine.pipeline_choice import SEQUENTIAL, Place, Step, WayChoice

DEVICE = torch.device("cuda", 0)
PRINTED_CYCLES = 10
GROUP_SMS = 44  # asked for; 48 and the remainder are granted on a card of 132


class Memory(NamedTuple):
    """Bytes: that the driver has left, that torch's tensors take on the card, that the process has resident."""

    free_bytes: int
    allocated_bytes: int
    resident_bytes: int

    @classmethod
    def now(cls) -> Memory:
        torch.cuda.synchronize(DEVICE)
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        free_bytes = torch.cuda.mem_get_info(DEVICE)[0]
        return cls(free_bytes, torch.cuda.memory_allocated(DEVICE), resident_pages * os.sysconf("SC_PAGE_SIZE"))

    def growth_since(self, before: Memory) -> dict[str, int]:
        """Of what is taken, in bytes."""
        return {
            "card_bytes": before.free_bytes - self.free_bytes,
            "tensor_bytes": self.allocated_bytes - before.allocated_bytes,
            "resident_bytes": self.resident_bytes - before.resident_bytes,
        }


def main() -> None:
    args = make_parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_green.py divides a GPU's SMs: it needs a CUDA device, and torch sees none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    if args.cycles:
        report["cycles"] = measure_cycles(args)
    if args.switches:
        report["load"] = measure_load(args)
    print(json.dumps(report), flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--switches", type=int, default=1000, help="at least so many")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--ramp", type=int, default=48, help="tokens at each end of an answer that are not counted")
    return parser


# -- making and closing


def measure_cycles(args: argparse.Namespace) -> dict[str, Any]:
    """Growth over the cycles, behind a first one that loads what the driver and torch need once."""
    count, total = args.cycles, torch.zeros(1024, device=DEVICE)
    run_cycle(total)
    rows, started = [Memory.now()], time.perf_counter()
    for number in range(1, count + 1):
        run_cycle(total)
        if number % PRINTED_CYCLES == 0 or number == count:
            rows.append(Memory.now())
            print(f"  {number:4} cycles: {rows[-1].growth_since(rows[0])}", flush=True)
    cycle_ms = (time.perf_counter() - started) / count * 1e3
    if not total.eq(2 * (count + 1)).all():
        raise ArithmeticError(f"kernels did not run: {total.unique().tolist()} in place of {2 * (count + 1)}")
    by_tens = [row.growth_since(rows[0]) for row in rows[1:]]
    a_cycle = {name: round(value / count, 1) for name, value in by_tens[-1].items()}
    print(f"{count} cycles of {cycle_ms:.2f} ms: growth a cycle {a_cycle}", flush=True)
    return {"count": count, "cycle_ms": round(cycle_ms, 3), "growth_a_cycle": a_cycle, "growth": by_tens}


def run_cycle(total: torch.Tensor) -> None:
    """A kernel of each stream adds 1; one after the other, since they add to the same tensor."""
    with split_device_green_ctx_by_sm_count(DEVICE, [GROUP_SMS]) as (streams, _):
        torch.cuda.synchronize(DEVICE)  # the streams do not wait for the one that filled the tensor
        for stream in streams:
            with torch.cuda.stream(stream):
                total.add_(1)
            stream.synchronize()


# -- changing the split under load


class Alternation(WayChoice):
    """In place of a choice: each step takes the next of the pipelined ways that its place has, so another split.
    `steps_s`: the card's seconds of these steps. ways_at: as there."""

    def __init__(self, ways_at: Callable[[Place], tuple[str, ...]]) -> None:
        super().__init__(ways_at)
        self.steps_s: list[float] = []

    def next(self, place: Place) -> Step:
        ways = self._ways_at(place)[1:]
        way = ways[self.steps_by_way.total() % len(ways)] if ways else SEQUENTIAL
        self.steps_by_way[way] += 1
        return Step(way, "steady")

    def observe(self, place: Place, step: Step, seconds: float) -> None:
        if step.way != SEQUENTIAL:
            self.steps_s.append(seconds)


def measure_load(args: argparse.Namespace) -> dict[str, Any]:
    """An engine on one card, its splits captured for the step of all rows only, whatever the roofline says of it."""

    def captured(config: Any, batch: int, context_tokens: float, split: Any) -> bool:
        return batch == args.rows

    num_outputs = args.switches + 2 * args.ramp
    lengths = {"max_model_len": args.prompt_len + num_outputs, "max_num_seqs": args.rows}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(pipeline_runs, "roofline_can_win", captured):
        model = str(write_shape(Path(folder), args.shape))
        with LLM(model, load_format="dummy", enable_prefix_caching=False, **lengths) as llm:
            start_on_one_card(llm, {"enable_decode_pipeline": True})
            choice = alternate(llm)
            answer(llm, args, args.ramp)  # everything is loaded that will be
            choice.steps_s.clear()
            return {"shape": args.shape, "rows": args.rows} | measure_answers(llm, choice, args, num_outputs)


def alternate(llm: LLM) -> Alternation:
    pipeline = llm.decode_runner.pipeline
    if pipeline is None or pipeline.ways is None or pipeline.mode_running != "auto":
        raise RuntimeError(f"no pipeline: {pipeline.cause if pipeline else 'not started'}")
    names_at = pipeline.ways.names_at
    pipeline.choice = choice = Alternation(lambda place: (SEQUENTIAL, *names_at(place)))
    return choice


def answer(llm: LLM, args: argparse.Namespace, num_outputs: int) -> list[Any]:
    rng = random.Random(0)
    prompts = [[rng.randrange(llm.model_config.vocab_size) for _ in range(args.prompt_len)] for _ in range(args.rows)]
    params = SamplingParams(temperature=0.6, max_tokens=num_outputs, ignore_eos=True)
    return llm.generate(prompts, params, use_tqdm=False)


def measure_answers(llm: LLM, choice: Alternation, args: argparse.Namespace, num_outputs: int) -> dict[str, Any]:
    runner = llm.decode_runner
    switches, memory = runner.get_pipeline_statistics()["green"]["switches"], Memory.now()
    outputs = answer(llm, args, num_outputs)
    growth, stats = Memory.now().growth_since(memory), runner.get_pipeline_statistics()
    figures = {
        "switches": stats["green"]["switches"] - switches,
        "failed_requests": sum(output.outputs[0].num_tokens != num_outputs for output in outputs),
        "fallback_cause": stats["fallback_cause"],
        "steps_by_way": stats["steps_by_way"],
        "growth": growth,
        "step_ms": spread_ms(choice.steps_s),
        "token_gap_ms": spread_ms(outputs[-1].metrics.inter_token[args.ramp : -args.ramp]),
    }
    for name, value in figures.items():
        print(f"  {name}: {value}", flush=True)
    return figures


def spread_ms(seconds: Iterable[float]) -> dict[str, Any]:
    """Of many steps."""
    ms = sorted(second * 1e3 for second in seconds)
    median, p99 = statistics.median(ms), statistics.quantiles(ms, n=100)[98]
    figures = {"median": median, "p99": p99, "max": ms[-1], "max_of_median": ms[-1] / median}
    return {name: round(value, 4) for name, value in figures.items()} | {
        "count": len(ms),
        "longest": [round(value, 3) for value in ms[-5:]],
    }


if __name__ == "__main__":
    main()
