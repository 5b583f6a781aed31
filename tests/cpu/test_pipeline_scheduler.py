"""`DecodePipelineScheduler` over a simulated card: what it launches, learns from, and tells."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from green_ctx import GreenContextError
from nanovllm.engine.pipeline_choice import SEQUENTIAL, ChoiceRules
from nanovllm.engine.pipeline_graphs import StageSeconds
from nanovllm.engine.pipeline_order import attention_queue, ffn_queue
from nanovllm.engine.pipeline_scheduler import TIMED_EVERY_STEPS, DecodePipelineScheduler, PipelineScheduler

MODEL: Any = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=3))


class SimulatedCard:
    """Ways with a fixed cost, a clock that the steps advance, and a manager of their splits; `late` steps are still
    running when the host asks."""

    num_micro_batches = 2

    def __init__(self, costs: dict[str, float], late: int = 0) -> None:
        self.costs, self.late, self.now_s = costs, late, 0.0
        self.ran: list[str] = []
        self.timed: list[str] = []
        self.marks = 0
        self.splits = {way: SimpleNamespace(granted=(i, 132 - i)) for i, way in enumerate(costs) if way != SEQUENTIAL}
        self.current: Any = None
        self.busy: list[tuple[float, float, float]] = []
        self.fails_after: int | None = None

    # ways

    def bucket_of(self, num_rows: int) -> int:
        return -(-num_rows // 8) * 8

    def names_at(self, place: tuple[int, int]) -> tuple[str, ...]:
        return tuple(self.splits) if place[0] > 8 else ()

    def split_of(self, way: str) -> Any:
        return self.splits.get(way)

    def run(self, way: str, slots: tuple[int, ...], max_context_tokens: int) -> Tensor:
        self.ran.append(way)
        self.now_s += self.costs[way]
        return torch.zeros(len(slots), 5)

    def run_timed(self, way: str, slots: tuple[int, ...], max_context_tokens: int) -> Any:
        if way == SEQUENTIAL:
            return None
        self.timed.append(way)
        cost = self.costs[way]
        return self.run(way, slots, max_context_tokens), SimpleNamespace(
            seconds=lambda: StageSeconds(0.5 * cost, 0.75 * cost, cost)
        )

    def close(self) -> None:
        self.splits = {}

    # a clock

    def mark(self) -> tuple[int, float]:
        self.marks += 1
        return self.marks, self.now_s

    def seconds(self, begin: tuple[int, float], end: tuple[int, float]) -> float | None:
        return None if self.marks - end[0] < 2 * self.late else end[1] - begin[1]

    # a manager

    def rebalance(self, *granted: int) -> None:
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise GreenContextError("lost")
        self.current = next(split for split in self.splits.values() if split.granted == granted)

    def add_busy(self, *seconds: float) -> None:
        self.busy.append(seconds)  # type: ignore[arg-type]

    def stats(self) -> dict[str, float]:
        return {"attention_sm_granted": 44, "ffn_sm_granted": 88}


def scheduler_of(card: SimulatedCard, **options: Any) -> DecodePipelineScheduler:
    profiling = options.pop("enable_profiling", False)
    return DecodePipelineScheduler(MODEL, card, profiling, ways=card, clock=card, **options)  # type: ignore[arg-type]


def decode(scheduler: DecodePipelineScheduler, steps: int, rows: int = 16, context: int = 300) -> None:
    for _ in range(steps):
        assert scheduler.decode_token(tuple(range(rows)), context).shape == (rows, 5)


COSTS = {SEQUENTIAL: 0.010, "44:88 core": 0.008, "60:72 core": 0.012}


@pytest.mark.parametrize("late", [0, 1, 4])
def test_it_settles_on_the_fastest_way_whatever_is_in_flight(late: int) -> None:
    card = SimulatedCard(COSTS, late)
    scheduler = scheduler_of(card)
    decode(scheduler, 100)
    assert card.ran[-60:] == ["44:88 core"] * 60
    stats = scheduler.get_pipeline_statistics()
    assert stats["steps_by_way"] == {way: card.ran.count(way) for way in COSTS}
    assert stats["exploration_steps"] == 2 * 3 * ChoiceRules().trial_steps and stats["way_changes"] == 1
    assert stats["total_tokens"] == 1600 and stats["mode_running"] == "auto"
    (place,) = stats["places"]
    assert (place["rows"], place["context"], place["chosen"]) == (16, 512, "44:88 core")
    assert place["medians_ms"] == pytest.approx({way: cost * 1e3 for way, cost in COSTS.items()})
    assert stats["avg_total_time_ms"] == pytest.approx(8.0, rel=0.01)


def test_places_without_a_way_stay_sequential() -> None:
    card = SimulatedCard(COSTS)
    decode(scheduler_of(card), 50, rows=8)
    assert set(card.ran) == {SEQUENTIAL}


def test_static_takes_its_way_whatever_it_costs_and_moves_nothing() -> None:
    card = SimulatedCard({SEQUENTIAL: 0.01, "16:16 core": 0.05})
    scheduler = scheduler_of(card, static=True)
    decode(scheduler, 40)
    decode(scheduler, 3, rows=4)
    assert card.ran == ["16:16 core"] * 40 + [SEQUENTIAL] * 3 and card.current is None
    assert scheduler.mode_running == "static" and scheduler.get_pipeline_statistics()["exploration_steps"] == 0


@pytest.mark.parametrize("fails_after", [0, 1, 2])
def test_after_a_failing_move_every_step_is_sequential(fails_after: int, caplog: pytest.LogCaptureFixture) -> None:
    card = SimulatedCard(COSTS, late=2)
    card.fails_after = fails_after
    scheduler = scheduler_of(card)
    decode(scheduler, 80)
    assert len(card.ran) == 80, "no step was dropped"
    counts = scheduler.get_pipeline_statistics()["steps_by_way"]
    assert {way: count for way, count in counts.items() if count} == {way: card.ran.count(way) for way in {*card.ran}}
    assert card.ran[-40:] == [SEQUENTIAL] * 40
    assert scheduler.mode_running == "sequential" and scheduler.cause == "lost"
    assert caplog.text.count("Failed to initialize Green Context: lost") == 1


def test_profiling_times_the_stages_now_and_then_and_learns_nothing_else_from_it() -> None:
    card = SimulatedCard(COSTS)
    scheduler = scheduler_of(card, enable_profiling=True)
    decode(scheduler, 5 * TIMED_EVERY_STEPS)
    assert 4 <= len(card.timed) <= 5 and set(card.timed) == {"44:88 core"}
    stats = scheduler.get_pipeline_statistics()
    assert stats["timed_steps"] == len(card.timed) or stats["timed_steps"] == len(card.timed) - 1
    assert scheduler.avg_latency_attention == pytest.approx(0.004) and scheduler.avg_latency_ffn == pytest.approx(0.006)
    assert stats["avg_attention_time_ms"] == pytest.approx(4) and stats["avg_ffn_time_ms"] == pytest.approx(6)
    assert card.busy[0] == pytest.approx((0.004, 0.006, 0.008))
    assert scheduler_of(SimulatedCard(COSTS)).avg_latency_ffn == 0


def test_averages_move() -> None:
    card = SimulatedCard({SEQUENTIAL: 0.010})
    scheduler = scheduler_of(card)
    decode(scheduler, 20)
    card.costs[SEQUENTIAL] = 0.020
    decode(scheduler, 3)
    assert 0.0115 < scheduler.avg_latency_step < 0.016
    decode(scheduler, 60)
    assert scheduler.avg_latency_step == pytest.approx(0.020, rel=1e-3)


def test_queues_are_those_of_the_last_step() -> None:
    card = SimulatedCard({SEQUENTIAL: 0.01, "44:88 core": 0.008, "44:88 projections": 0.009})
    scheduler = scheduler_of(card, static=True)
    assert scheduler.attention_queue == scheduler.ffn_queue == []
    decode(scheduler, 1)
    assert scheduler.attention_queue == attention_queue(2, 3) and scheduler.ffn_queue == ffn_queue(2, 3, lead=True)
    card.splits.pop("44:88 core")
    decode(scheduler, 1)
    assert scheduler.ffn_queue == ffn_queue(2, 3, lead=False)
    decode(scheduler, 1, rows=1)
    assert scheduler.attention_queue == []


def test_the_log_has_the_queues_of_the_step_that_it_tells_of(caplog: pytest.LogCaptureFixture) -> None:
    """Others have been launched by the time a result is known."""
    card = SimulatedCard({SEQUENTIAL: 0.01, "44:88 core": 0.008})
    scheduler = scheduler_of(card, static=True, debug=True)
    handles: list[Any] = []
    for rows in (16, 1):
        decode(scheduler, 1, rows)
        told: Any = SimpleNamespace(tell=lambda listener: listener)
        handles.append(scheduler.watched(told))
    with caplog.at_level(logging.INFO, "nanovllm"):
        for handle in handles:
            handle([7])
    depths = [record.getMessage().partition("queues ")[2].partition(";")[0] for record in caplog.records]
    assert depths == ["attention 6, ffn 8", "attention 0, ffn 0"]


def test_the_seeds_constructor_and_name() -> None:
    scheduler = PipelineScheduler(model=MODEL, green_manager=None, enable_profiling=True)
    assert isinstance(scheduler, DecodePipelineScheduler) and scheduler.mode_running == "sequential"
    with pytest.raises(ValueError, match="pass ways="):
        scheduler.decode_token((0,), 10)


def test_closing_drops_the_ways_ahead_of_the_partitions() -> None:
    order: list[str] = []
    card: Any = SimulatedCard(COSTS)
    manager: Any = SimpleNamespace(close=lambda: order.append("manager"))
    card.close = lambda: order.append("ways")
    DecodePipelineScheduler(MODEL, manager, ways=card).close()
    assert order == ["ways", "manager"]
