"""From what was asked for to a running decode pipeline: partitions, ways, graphs; or one stream, and the reason."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable

from nanovllm.engine.green_manager import GreenManager, give_back
from nanovllm.engine.pipeline_graphs import PipelineGraphs
from nanovllm.engine.pipeline_runs import DecodeCard, EagerWays, GraphWays, PipelineOptions, can_win
from nanovllm.engine.pipeline_scheduler import (
    FAILED,
    GREEN_DISABLED,
    CudaClock,
    DecodePipelineScheduler,
    HostClock,
    StepWays,
)
from nanovllm.engine.pipeline_ways import (
    EAGER_TOOLS,
    PARTITION_TOOLS,
    PartitionTools,
    PipelinedWay,
    auto_counts,
    make_way,
)

logger = logging.getLogger("nanovllm.engine.pipeline")


def start_pipeline(
    card: DecodeCard,
    options: PipelineOptions,
    make_manager: Callable[..., GreenManager] = GreenManager,
    tools: PartitionTools | None = None,
) -> DecodePipelineScheduler:
    """The scheduler of a card's decode steps, everything captured. On the card's stream, nothing else running on it.

    `static` raises what keeps it from running: `GreenContextError`, `ValueError` for counts that do not fit, or what a
    capture raised. `auto` says so in a warning and decodes over one stream; with `disable_green` it does so from the
    start.
    """
    if options.disable_green:
        logger.info("decode pipeline: disable_green=True, decode runs over one stream")
        return _scheduler(card, options, None, _prepare(card, [], options), GREEN_DISABLED)
    manager: GreenManager | None = None
    try:
        manager = make_manager(
            card.kv_cache.device, options.attention_sm, options.ffn_sm, enable_rebalance=options.mode == "auto"
        )
        ways = _make_ways(card, options, manager, tools or (PARTITION_TOOLS if card.graphs else EAGER_TOOLS))
        return _scheduler(card, options, manager, _prepare(card, ways, options), None)
    except (RuntimeError, ValueError) as error:  # GreenContextError and what CUDA raises are RuntimeErrors
        traceback.clear_frames(error.__traceback__)  # graphs that were captured must be gone before their streams are
        give_back(manager)
        if options.mode == "static":
            raise
        logger.warning(FAILED, error)
        return _scheduler(card, options, None, _prepare(card, [], options), str(error))


def _make_ways(
    card: DecodeCard, options: PipelineOptions, manager: GreenManager, tools: PartitionTools
) -> list[PipelinedWay]:
    """One way where a split was named, or in static mode; else those of `auto_counts`."""
    splits = manager.splits
    if options.mode == "auto" and not options.names_a_split:
        splits = [manager.prepare(*counts) for counts in auto_counts(manager.card)]
    total = manager.card.total
    return [make_way(card.model, card.kv_cache, total, split, options.boundary, tools) for split in splits]


def _prepare(card: DecodeCard, ways: list[PipelinedWay], options: PipelineOptions) -> StepWays:
    """The ways, ready to be taken: captured where the card has graphs, and a way may win."""
    if card.graphs is None:
        return EagerWays(card, ways, options)
    graphs, started = PipelineGraphs(card.graphs, ways), time.perf_counter()
    for bucket in reversed(card.graphs.buckets):
        for way in ways:
            if can_win(card, options, way, bucket):
                graphs.capture(way.name, bucket)
                if options.profiling:
                    graphs.capture_timed(way.name, bucket)
    if ways:
        graphs.rehearse()
        taken = f"{time.perf_counter() - started:.1f} s, {graphs.graph_bytes / 1e6:.0f} MB"
        logger.info("decode pipeline: %d graphs of %s: %s", len(graphs.captured), ", ".join(graphs.ways), taken)
    return GraphWays(card, graphs, options)


def _scheduler(
    card: DecodeCard, options: PipelineOptions, manager: GreenManager | None, ways: StepWays, cause: str | None
) -> DecodePipelineScheduler:
    return DecodePipelineScheduler(
        card.model,
        manager,
        options.profiling,
        ways=ways,
        clock=CudaClock() if card.kv_cache.device.type == "cuda" else HostClock(),
        static=options.mode == "static",
        cause=cause,
        debug=options.debug,
    )
