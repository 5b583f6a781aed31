"""How each decode step of a card runs: sequentially, or pipelined over one of its splits, by measured choice.

`auto` chooses place by place (`pipeline_choice`); `static` has one way and takes it; without a pipelined way, and after
a failure, every step is sequential. Whichever it is, logits are the same within the step's own rounding.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from green_ctx import GreenContextError
from nanovllm.engine.green_manager import GreenManager, Split
from nanovllm.engine.pipeline_choice import SEQUENTIAL, ChoiceRules, Place, PlaceChoice, Step, WayChoice, context_bucket
from nanovllm.engine.pipeline_graphs import StageTimer
from nanovllm.engine.pipeline_order import Item, attention_queue, ffn_queue
from nanovllm.engine.step_handle import StepHandle, timed_event
from nanovllm.models.qwen3 import Qwen3ForCausalLM

logger = logging.getLogger("nanovllm.engine.pipeline")

FAILED = "Failed to initialize Green Context: %s; decode goes on over one stream"
NEWEST_WEIGHT = 0.2  # of a value in a moving average
TIMED_EVERY_STEPS = 64
GREEN_DISABLED = "disable_green=True"  # a cause that was asked for


class StepWays(Protocol):
    """The ways a card has, and how to take them. "sequential" is always one, and no split goes with it."""

    num_micro_batches: int

    def bucket_of(self, num_rows: int) -> int:
        """Rows of the step that runs for so many."""

    def names_at(self, place: Place) -> tuple[str, ...]:
        """The pipelined ways worth trying there."""

    def split_of(self, way: str) -> Split | None: ...

    def run(self, way: str, slots: tuple[int, ...], max_context_tokens: int) -> Tensor:
        """Launch a step; float32 logits [len(slots), vocab_size], valid until the next one."""

    def run_timed(self, way: str, slots: tuple[int, ...], max_context_tokens: int) -> tuple[Tensor, StageTimer] | None:
        """The same, with what will know the stages' times when it has ended; None: this way cannot."""

    def close(self) -> None:
        """Let go of everything that uses the splits' streams."""


class Clock(Protocol):
    """When launched work begins and ends."""

    def mark(self) -> Any: ...

    def seconds(self, begin: Any, end: Any) -> float | None:
        """Between two marks; None if the second has not been reached yet. Never waits."""


class CudaClock:
    """Timing events on the current stream."""

    def mark(self) -> torch.cuda.Event:
        return timed_event()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return begin.elapsed_time(end) / 1e3 if end.query() else None


class HostClock:
    """For a CPU, where a step has ended when its launch returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class Launched(NamedTuple):
    """A step that may still run."""

    place: Place
    step: Step
    num_rows: int
    begin: Any
    end: Any
    timer: StageTimer | None


class DecodePipelineScheduler:
    """Chooses, launches and measures the decode steps of one card. One thread launches; any may read statistics.

    green_manager: owns the splits of `ways`; None: no step is pipelined. enable_profiling: replay, every so many steps,
    one that tells its stages' times. ways: how steps run. clock: None: no step is measured. static: take the first way
    that a place has, whatever it costs. cause: why no step is pipelined, if so.

    `avg_latency_attention`, `avg_latency_ffn`: seconds of all stages of a step in each lane, `avg_latency_step` of the
    model's part of a step; moving averages, 0 until one was timed.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        green_manager: GreenManager | None,
        enable_profiling: bool = False,
        *,
        ways: StepWays | None = None,
        clock: Clock | None = None,
        static: bool = False,
        rules: ChoiceRules | None = None,
        cause: str | None = None,
        debug: bool = False,
    ) -> None:
        self.model, self.green_manager, self.enable_profiling = model, green_manager, enable_profiling
        self.ways, self.debug, self.cause = ways, debug, cause
        self.choice = WayChoice(self._ways_at, rules)
        self.avg_latency_attention = self.avg_latency_ffn = self.avg_latency_step = 0.0
        self.total_tokens = self.timed_steps = 0
        self.last: Launched | None = None
        self._static, self._clock = static, clock
        self._launched: deque[Launched] = deque()
        self._since_timed = 0

    @property
    def mode_running(self) -> str:
        """ "auto", "static" or "sequential", as it is now."""
        if self.cause is not None or self.ways is None:
            return "sequential"
        return "static" if self._static else "auto"

    # -- steps

    def decode_token(self, slots: tuple[int, ...], max_context_tokens: int) -> Tensor:
        """Launch the model's part of a decode step for these slots; float32 logits [len(slots), vocab_size].

        max_context_tokens: a bound of their lengths. Valid until the next call.
        """
        if self.ways is None:
            raise ValueError("a scheduler without ways cannot run a step: pass ways=")
        self._collect()
        place = self.ways.bucket_of(len(slots)), context_bucket(max_context_tokens)
        step = self._next(place)
        begin = self._mark()
        logits, timer = self._run(self.ways, step, slots, max_context_tokens)
        self.last = Launched(place, step, len(slots), begin, self._mark(), timer)
        self.total_tokens += len(slots)
        if self._clock is not None:
            self._launched.append(self.last)
        return logits

    def _next(self, place: Place) -> Step:
        if self.mode_running == "auto":
            step = self.choice.next(place)
            if step.way == SEQUENTIAL or self._move_to(step.way):
                return step
            self.choice.steps_by_way[step.way] -= 1  # it did not come to that
        way = SEQUENTIAL
        if self.mode_running == "static" and self.ways is not None:
            way = next(iter(self.ways.names_at(place)), SEQUENTIAL)
        self.choice.steps_by_way[way] += 1
        return Step(way, "steady")

    def _ways_at(self, place: Place) -> tuple[str, ...]:
        return (SEQUENTIAL, *(self.ways.names_at(place) if self.ways is not None else ()))

    def _move_to(self, way: str) -> bool:
        """Make the way's split the current one. A failure leaves one stream, for good, and says so once."""
        split = self.ways.split_of(way) if self.ways is not None else None
        assert split is not None and self.green_manager is not None, f"{way} has no split"
        if self.green_manager.current is split:
            return True
        try:
            self.green_manager.rebalance(*split.granted)
        except (GreenContextError, ValueError) as error:
            self.cause = str(error)
            logger.warning(FAILED, error)
            return False
        return True

    def _run(
        self, ways: StepWays, step: Step, slots: tuple[int, ...], max_context_tokens: int
    ) -> tuple[Tensor, StageTimer | None]:
        self._since_timed += 1
        if self.enable_profiling and step.kind == "steady" and self._since_timed >= TIMED_EVERY_STEPS:
            if (timed := ways.run_timed(step.way, slots, max_context_tokens)) is not None:
                self._since_timed = 0
                return timed
        return ways.run(step.way, slots, max_context_tokens), None

    def _mark(self) -> Any:
        return None if self._clock is None else self._clock.mark()

    def _collect(self) -> None:
        """Take in the times of steps that have ended."""
        while self._launched and self._clock is not None:
            done = self._launched[0]
            seconds = self._clock.seconds(done.begin, done.end)
            if seconds is None:
                return
            self._launched.popleft()
            if done.timer is None:
                self.choice.observe(done.place, done.step, seconds)
                self.avg_latency_step = _moved(self.avg_latency_step, seconds)
            else:
                self._note_stages(done.timer)

    def _note_stages(self, timer: StageTimer) -> None:
        attention_s, ffn_s, wall_s = timer.seconds()
        self.timed_steps += 1
        self.avg_latency_attention = _moved(self.avg_latency_attention, attention_s)
        self.avg_latency_ffn = _moved(self.avg_latency_ffn, ffn_s)
        if self.green_manager is not None:
            self.green_manager.add_busy(attention_s, ffn_s, wall_s)

    # -- what there is to tell

    @property
    def attention_queue(self) -> list[Item]:
        """(micro-batch, layer) of what the attention lane runs in the last step, in order; none if it had no lanes."""
        return self._queues_of(self.last)[0]

    @property
    def ffn_queue(self) -> list[Item]:
        """The same of the FFN lane."""
        return self._queues_of(self.last)[1]

    def _queues_of(self, launched: Launched | None) -> tuple[list[Item], list[Item]]:
        if launched is None or launched.step.way == SEQUENTIAL or self.ways is None:
            return [], []
        sizes = min(self.ways.num_micro_batches, launched.place[0]), self.model.config.num_hidden_layers
        return attention_queue(*sizes), ffn_queue(*sizes, lead=launched.step.way.endswith(" core"))

    def get_pipeline_statistics(self) -> dict[str, Any]:
        """Since the start. Times in milliseconds: `avg_attention_time_ms` and `avg_ffn_time_ms` are of all stages of a
        step, moving averages over `timed_steps` steps, `avg_total_time_ms` of the model's part of a step. SMs are the
        current split's, granted; 0 where there is none. `exploration_steps` measured other ways than the chosen one.
        `fallbacks`: 1 where steps run over one stream, and that was not asked for."""
        green = self.green_manager.stats() if self.green_manager is not None else {}
        return {
            "mode_running": self.mode_running,
            "fallback_cause": self.cause,
            "fallbacks": int(self.cause not in (None, GREEN_DISABLED)),
            "total_tokens": self.total_tokens,
            "avg_attention_time_ms": self.avg_latency_attention * 1e3,
            "avg_ffn_time_ms": self.avg_latency_ffn * 1e3,
            "avg_total_time_ms": self.avg_latency_step * 1e3,
            "attention_sm": green.get("attention_sm_granted", 0),
            "ffn_sm": green.get("ffn_sm_granted", 0),
            "timed_steps": self.timed_steps,
            "steps_by_way": dict(self.choice.steps_by_way),
            "exploration_steps": self.choice.exploration_steps,
            "way_changes": self.choice.changes,
            "places": [_place_row(*item) for item in list(self.choice.places.items())],
            "green": green,
        }

    def describe(self) -> str:
        """The first of them, in lines for people."""
        values = self.get_pipeline_statistics()
        times = [(name, values[f"avg_{name.lower()}_time_ms"]) for name in ("attention", "FFN", "total")]
        cause = [f"  Over one stream, because: {self.cause}"] if self.cause else []
        return "\n".join(
            [
                "[M2 Pipeline Statistics - GPU1 Decode Card]",
                f"  Mode running: {values['mode_running']}",
                *cause,
                f"  Total tokens: {values['total_tokens']}",
                *(f"  Avg {name} time: {time_ms:.2f} ms" for name, time_ms in times),
                f"  Attention SMs: {values['attention_sm']}",
                f"  FFN SMs: {values['ffn_sm']}",
            ]
        )

    def watched(self, handle: StepHandle) -> StepHandle:
        """The handle of the step just launched, which knows of its stages; with `debug`, its result will be logged."""
        assert self.last is not None, "no step was launched"
        handle.stages = self.last.timer
        return handle.tell(partial(self._log, self.last)) if self.debug else handle

    def _log(self, launched: Launched, token_ids: Sequence[int]) -> None:
        seconds = self._clock.seconds(launched.begin, launched.end) if self._clock is not None else None
        rate = f"{launched.num_rows / seconds:.0f} tok/s" if seconds else "-"
        depths = "attention {}, ffn {}".format(*map(len, self._queues_of(launched)))
        ids, where = list(token_ids), f"{launched.place[0]} rows x {launched.place[1]} tokens"
        logger.info("step %s %s (%s): queues %s; %s; ids %s", *launched.step, where, depths, rate, ids)

    def close(self) -> None:
        """Drop the graphs, then the partitions. No step may run any more."""
        if self.ways is not None:
            self.ways.close()
        if self.green_manager is not None:
            self.green_manager.close()


PipelineScheduler = DecodePipelineScheduler


def _moved(average: float, newest: float) -> float:
    return newest if not average else average + NEWEST_WEIGHT * (newest - average)


def _place_row(place: Place, choice: PlaceChoice) -> dict[str, Any]:
    medians_ms = {way: round(seconds * 1e3, 4) for way, seconds in dict(choice.medians_s).items()}
    return {"rows": place[0], "context": place[1], "chosen": choice.chosen, "medians_ms": medians_ms}
