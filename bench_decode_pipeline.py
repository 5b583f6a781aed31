"""The decode pipeline in benchmarks: its flags, its start on a single card, and steps with and without it in turn.

    python bench.py --shape 8b --decode-steps --cases 512x512 --decode-pipeline auto       # one card
    python bench.py --shape 8b --decode-steps --cases 512x512 --pipeline-split 44:88       # static
    python bench.py --shape 8b --two-gpus --decode-pipeline auto                           # as in nanovllm.Config

The engine's own switch needs two cards; here a single card's runner is told directly, so that everything can be
measured on one.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm import LLM
    from nanovllm.engine.model_runner import ModelRunner


def add_pipeline_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--enable-decode-pipeline", action="store_true", help="implied by the next two")
    group.add_argument("--decode-pipeline", choices=("auto", "static", "disabled"))
    group.add_argument("--pipeline-split", type=split_counts, metavar="A:F", help="static, attention:FFN SMs")
    group.add_argument("--decode-attention-sm", type=int, metavar="SMS")
    group.add_argument("--decode-ffn-sm", type=int, metavar="SMS")
    group.add_argument("--disable-green", action="store_true", help="no SM partitions: one stream")
    group.add_argument("--decode-pipeline-profiling", action="store_true", help="time both stages now and then")
    group.add_argument("--pipeline-debug", action="store_true", help="log every decode step")


def split_counts(text: str) -> tuple[int, int]:
    """\"44:88\"."""
    attention, separator, ffn = text.partition(":")
    if not (separator and attention.isdigit() and ffn.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not two counts of SMs, for example 44:88")
    return int(attention), int(ffn)


def pipeline_config(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `nanovllm.Config`; {} where no pipeline was asked for. `ValueError`: flags that would do nothing."""
    counts = {"--decode-attention-sm": args.decode_attention_sm, "--decode-ffn-sm": args.decode_ffn_sm}
    switches = {"--decode-pipeline-profiling": args.decode_pipeline_profiling, "--pipeline-debug": args.pipeline_debug}
    if not (args.enable_decode_pipeline or args.decode_pipeline or args.pipeline_split):
        _refuse(counts | switches | {"--disable-green": args.disable_green}, "without --enable-decode-pipeline")
        return {}
    if args.pipeline_split:
        _refuse(counts, "beside --pipeline-split")
    if args.pipeline_debug:
        logging.basicConfig(level=logging.INFO)
    attention_sm, ffn_sm = args.pipeline_split or (args.decode_attention_sm, args.decode_ffn_sm)
    return {
        "enable_decode_pipeline": True,
        "decode_pipeline": args.decode_pipeline or ("static" if args.pipeline_split else "auto"),
        "decode_attention_sm": attention_sm,
        "decode_ffn_sm": ffn_sm,
        "disable_green": args.disable_green,
        "decode_pipeline_profiling": args.decode_pipeline_profiling,
        "pipeline_debug": args.pipeline_debug,
    }


def _refuse(flags: dict[str, object], where: str) -> None:
    if given := [name for name, value in flags.items() if value]:
        raise ValueError(f"{', '.join(given)} would do nothing {where}")


def start_on_one_card(llm: LLM, config: dict[str, Any]) -> None:
    """What the engine does with the same keywords on two cards. Nothing may be decoding."""
    from nanovllm.config import Config
    from nanovllm.engine.cards import pipeline_options

    checked = Config(llm.config.model, enable_two_gpu_pd=True, **config)  # the same mistakes are found
    if checked.pipelines_decode:
        llm.decode_runner.start_pipeline(pipeline_options(checked))
        llm.decode_runner.reserve(llm.config.max_num_batched_tokens)  # captures gave back what torch had kept


def in_turn_with_sequential(llm: LLM, step_seconds: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Steps with the pipeline and, in turn, without: medians, their ratio, what was chosen. Exploration that falls into
    the timed part is counted."""
    runner, ratios, with_s, without_s = llm.decode_runner, [], [], []
    step_seconds()  # every way is tried in here, and one chosen
    before = runner.get_pipeline_statistics()
    for _ in range(repeats):
        with_s.append(step_seconds())
        with sequential(runner):
            without_s.append(step_seconds())
        ratios.append(without_s[-1] / with_s[-1])
    after = runner.get_pipeline_statistics()
    return {
        "pipeline_ms": round(statistics.median(with_s) * 1e3, 4),
        "sequential_ms": round(statistics.median(without_s) * 1e3, 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(min(ratios), 4), round(max(ratios), 4)],
        "ways": {way: count - before["steps_by_way"].get(way, 0) for way, count in after["steps_by_way"].items()},
        "timed_exploration_steps": after["exploration_steps"] - before["exploration_steps"],
        "explored_before": before["exploration_steps"],
        "attention_ms": round(after["avg_attention_time_ms"], 4),
        "ffn_ms": round(after["avg_ffn_time_ms"], 4),
        "mode_running": after["mode_running"],
    }


@contextmanager
def sequential(runner: ModelRunner) -> Iterator[None]:
    """Within, the runner's decode steps are as they would be without a pipeline. Nothing may be decoding."""
    pipeline, runner.pipeline = runner.pipeline, None
    try:
        yield
    finally:
        runner.pipeline = pipeline


def pipeline_line(row: dict[str, Any]) -> str:
    """What a case's line says of it."""
    taken = ", ".join(f"{way} {count}" for way, count in row["ways"].items() if count)
    return (
        f"; with the pipeline ({row['mode_running']}) {row['pipeline_ms']:.3f} ms, in turn without "
        f"{row['sequential_ms']:.3f}: {row['ratio']:.3f}x ({row['ratios'][0]:.3f} to {row['ratios'][1]:.3f}); "
        f"steps: {taken}"
    )
