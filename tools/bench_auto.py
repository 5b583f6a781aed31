"""`decode_pipeline="auto"` over a grid of batches and contexts: what it chooses, and how that does beside sequential.

    python tools/bench_auto.py --shapes 0.6b,8b,14b            # one GPU, nanovllm on PYTHONPATH

Of each case, graphs of the ways that the roofline lets win are captured. On a card that has run the sequential one
for `--settle-s` (a rested one has a higher clock), the engine's own choice (ChoiceRules) is fed the time of each
replay until it has decided. Then rounds of the sequential graph twice and the chosen one, in turn: `ratio` is
sequential / chosen, `noise` sequential / sequential, medians and extremes of `--repeats` rounds of `--replays`
replays each, one more in each round: the clock of a card bound by power swings, and rounds must not swing with it. With
`--check` rounds have every way that was tried, and `best` says which was the fastest, and sequential / it. Steps that
explored are counted apart, with what they cost more than as many sequential ones. Cases whose pages do not fit are
named as such. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_pipeline import (
    DEVICE,
    PAGE_TOKENS,
    Captured,
    Case,
    Setup,
    Way,
    capture,
    make_model,
    make_parser,
    make_setup,
    pipelined,
    relative_rms,
    replay_for,
    sequential_step,
    time_ms,
)

from nanovllm.engine.green_manager import GreenManager
from nanovllm.engine.pipeline_choice import SEQUENTIAL, PlaceChoice
from nanovllm.engine.pipeline_roofline import roofline_can_win
from nanovllm.engine.pipeline_ways import auto_counts

GRID = "16,64,256,512,1024", "256,512,1024,4096"
SPARE_BYTES = 8 << 30  # for graphs, logits and activations


def main() -> None:
    args = parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16", flush=True)
    manager, ways = make_auto_ways()
    rows: list[dict[str, Any]] = []
    for shape in args.shapes.split(","):
        model = make_model(shape)
        for batch in map(int, args.batches.split(",")):
            for context in map(int, args.contexts.split(",")):
                row = measure(model, ways, Case(batch, context), args)
                rows.append({"shape": shape, "batch": batch, "context": context} | row)
                print(line_of(rows[-1]), flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps({"device": torch.cuda.get_device_name(), "cases": rows}), flush=True)


def parse_args() -> argparse.Namespace:
    parser = make_parser()
    parser.description = __doc__
    parser.add_argument("--shapes", default="0.6b,8b,14b")
    parser.add_argument("--batches", default=GRID[0])
    parser.add_argument("--contexts", default=GRID[1])
    parser.add_argument("--settle-s", type=float, default=1.0)
    parser.add_argument("--check", action="store_true", help="measure the ways that were not chosen, too")
    parser.set_defaults(no_alone=True)
    return parser.parse_args()


def make_auto_ways() -> tuple[GreenManager, list[Way]]:
    """The splits that the engine tries; the manager keeps them."""
    manager = GreenManager(DEVICE, enable_rebalance=True)
    splits = [manager.prepare(*counts) for counts in auto_counts(manager.card)]
    return manager, [Way(f"{split.granted.attention_sms}:{split.granted.ffn_sms}", split, "core") for split in splits]


def measure(model: Any, ways: list[Way], case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """One case; {"error"} where it cannot be run."""
    pages_bytes = case.batch * -(-case.tokens // PAGE_TOKENS) * PAGE_TOKENS * model.config.kv_bytes_per_token(2)
    if pages_bytes + SPARE_BYTES > torch.cuda.mem_get_info()[0]:
        return {"error": f"its pages take {pages_bytes / 1e9:.0f} GB"}
    able = [way for way in ways if roofline_can_win(model.config, *case, way.split.granted)]  # type: ignore[union-attr]
    try:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)), torch.inference_mode():
            return decide(make_setup(model, case), able, args)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def decide(setup: Setup, ways: list[Way], args: argparse.Namespace) -> dict[str, Any]:
    """Capture, let the choice be made, and measure it."""
    graphs, graph_bytes = capture_all(setup, ways, args)
    if args.settle_s and ways:
        replay_for(graphs[SEQUENTIAL], args.settle_s)
    choice, times = PlaceChoice(tuple(graphs)), []
    while ways and not choice.medians_s:
        step = choice.next()
        times.append(time_ms(graphs[step.way], 1) / 1e3)
        choice.observe(step, times[-1])
    others = [way.name for way in ways if way.name != choice.chosen and args.check]
    rounds = [
        [time_ms(graphs[way], args.replays + number) for way in (SEQUENTIAL, choice.chosen, SEQUENTIAL, *others)]
        for number in range(args.repeats)
    ]
    first, chosen, second, *rest = (list(column) for column in zip(*rounds, strict=True))
    ratios = [(a + c) / 2 / b for a, b, c, *_ in rounds]
    base_s = statistics.median(first + second) / 1e3
    steady_ms = {way: statistics.median(times) for way, times in zip(others, rest, strict=True)}
    steady_ms |= {choice.chosen: statistics.median(chosen)} | {SEQUENTIAL: base_s * 1e3}
    best = min(steady_ms, key=lambda way: steady_ms[way])
    return {
        "chosen": choice.chosen,
        "tried": [way.name for way in ways],
        "sequential_ms": round(base_s * 1e3, 4),
        "chosen_ms": round(statistics.median(chosen), 4),
        "ratio": [round(value, 4) for value in (statistics.median(ratios), min(ratios), max(ratios))],
        "noise": [round(f(a / c for a, _, c, *_ in rounds), 4) for f in (min, max)],
        "best": [best, round(base_s * 1e3 / steady_ms[best], 4)],
        "steady_ms": {way: round(ms, 4) for way, ms in steady_ms.items()},
        "medians_ms": {way: round(seconds * 1e3, 4) for way, seconds in choice.medians_s.items()},
        "explored_steps": len(times),
        "explored_ms": round((sum(times) - len(times) * base_s) * 1e3, 2),
        "graph_mb": round(graph_bytes / 1e6, 1),
    }


def capture_all(setup: Setup, ways: list[Way], args: argparse.Namespace) -> tuple[dict[str, Captured], int]:
    """The sequential graph first, and what the memory of the others is, in bytes. Each must give its logits."""
    pool = torch.cuda.graph_pool_handle()
    graphs = {SEQUENTIAL: capture(partial(sequential_step, setup), pool)}
    graphs[SEQUENTIAL].replay()
    expected, before = setup.logits_BV.clone(), torch.cuda.mem_get_info()[0]
    for way in ways:
        graphs[way.name] = capture(pipelined(setup, way, args)["step"], pool)
        setup.logits_BV.fill_(float("nan"))
        graphs[way.name].replay()
        differs = relative_rms(setup.logits_BV, expected)
        if not differs < 0.3:
            raise ArithmeticError(f"{way.name}: logits differ by {differs:.3f} of their RMS")
    return graphs, before - torch.cuda.mem_get_info()[0]


def line_of(row: dict[str, Any]) -> str:
    name = f"{row['shape']:>4} {row['batch']:>4}x{row['context']:<4}"
    if "error" in row:
        return f"{name} {row['error']}"
    ratio, spread = row["ratio"][0], " to ".join(f"{value:.3f}" for value in row["ratio"][1:])
    noise = " to ".join(f"{value:.3f}" for value in row["noise"])
    return (
        f"{name} {row['chosen']:<10} {row['sequential_ms']:8.3f} -> {row['chosen_ms']:8.3f} ms  {ratio:.3f}x "
        f"({spread}; noise {noise})  tried {len(row['tried'])} in {row['explored_steps']} steps, "
        f"{row['explored_ms']:+.1f} ms; {row['graph_mb']:.0f} MB"
        + ("" if row["best"][0] == row["chosen"] else f"; {row['best'][0]} is the fastest, {row['best'][1]:.3f}x")
    )


if __name__ == "__main__":
    main()
