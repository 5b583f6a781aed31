"""Counters and histograms of the engine, from jobs made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

import bench_report
from nanovllm import DEMO_MODEL, LLM, EngineDeadError, SamplingParams
from nanovllm.engine.executor import Job
from nanovllm.engine.metrics import EngineMetrics, Histogram
from nanovllm.engine.sequence import Request
from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, PrefillChunk, PrefillShard
from nanovllm.engine.stopwatch import Stopwatch
from tests.cpu.test_scheduler import Plan
from tests.cpu.tiny import make_llm, write_config


def counted(histogram: Histogram) -> list[tuple[float, float]]:
    """(upper bound in milliseconds, count) of every bucket that is not empty."""
    as_dict = histogram.as_dict()
    return [(upper, count) for upper, count in zip(as_dict["upper"], as_dict["counts"], strict=True) if count]


@pytest.mark.parametrize("seconds", [0.0, 1e-6, 27e-6, 0.0123, 0.5, 99.0, 1e6])
def test_a_duration_is_counted_within_2_percent_of_itself(seconds: float) -> None:
    histogram = Histogram()
    histogram.add(seconds)
    ((upper_ms, count),) = counted(histogram)
    assert count == 1 and upper_ms >= seconds * 1e3
    assert upper_ms <= max(1e-3, seconds * 1e3 * 1.02 + 1e-12) or upper_ms == math.inf


def decode_job(idle_s: float | None, num_entries: int = 0, card: int = 1) -> Job:
    shard = DecodeShard(card, 1, (0, 1), 8, entries=(None,) * num_entries)  # type: ignore[arg-type]
    return Job(shard, idle_s=idle_s, seconds=0.005)


def test_gaps_count_only_where_a_sequence_goes_on() -> None:
    metrics = EngineMetrics(2)
    metrics.record(decode_job(0.001), 2)
    metrics.record(decode_job(3.0, num_entries=2), 2)  # nobody waited
    metrics.record(decode_job(None), 2)  # a CPU
    card = metrics.cards[1]
    ((gap_ms, gaps),) = counted(card.decode_gap_ms)
    ((period_ms, periods),) = counted(card.decode_period_ms)
    assert gaps == periods == 1 and 1.0 <= gap_ms <= 1.02 and 6.0 <= period_ms <= 6.12


def test_mixed_steps_count_both_kinds_of_tokens() -> None:
    metrics = EngineMetrics(1)
    chunk = PrefillChunk((1, 2, 3), 0, (0,), samples=(None,))  # type: ignore[arg-type]
    decode = DecodeShard(0, 1, (0, 1), 8)
    metrics.record(Job(MixedShard(0, 1, PrefillShard(0, 1, (chunk,)), decode), idle_s=0.0, seconds=0.5), 3)
    card = metrics.as_dict()["card0"]
    counts = {name: card[name] for name in ("prefill_tokens", "decode_tokens", "mixed_steps", "mixed_seconds")}
    assert counts == {"prefill_tokens": 3, "decode_tokens": 2, "mixed_steps": 1, "mixed_seconds": 0.5}
    assert (card["mixed_prefill_tokens"], card["mixed_decode_tokens"]) == (3, 2)
    assert card["prefill_steps"] == card["decode_steps"] == 0 and card["busy_share"] > 0
    assert sum(card["decode_gap_ms"]["counts"]) == 1


def test_the_report_counts_mixed_steps_apart() -> None:
    """64 rows a step of 10 ms, prompts of 1,000 tokens in 100 ms; nine times both in 0.1 s; 0.1 ms of the host each."""
    metrics = EngineMetrics(1)
    before = {"copies_by_route": {}, **metrics.as_dict()}
    rows, prompt = DecodeShard(0, 1, tuple(range(64)), 10), PrefillShard(0, 1, (PrefillChunk((0,) * 1000, 0, (0,)),))
    metrics.record(Job(prompt, seconds=0.1), 0)
    metrics.record(Job(rows, seconds=0.01), 64)
    for _ in range(9):
        metrics.record(Job(MixedShard(0, 1, prompt, rows), seconds=0.1), 64)
    metrics.loop_seconds = 11 * 1e-4
    after = metrics.as_dict()
    assert bench_report.host_figures(before, after)["loop_ms"] == 0.1
    steps = bench_report.steps_of(before["card0"], after["card0"], 1.01)
    text = bench_report.card_text(steps | {"kv_blocks": 7, "device": "none"})
    assert "prefill 1,000 tokens in 1 steps, 10,000 tok/s; decode 64 tokens in 1 steps, 6,400 tok/s" in text
    assert "both 9,000 + 576 tokens in 9 steps of 100.00 ms" in text and "100.0% busy" in text


def test_exposed_copies_are_those_between_cards() -> None:
    for pools, max_tokens, expected in (((50,), 3, 0), ((50, 50), 3, 3), ((50, 50), 2, 3), ((50, 50), 1, 0)):
        plan = Plan(*pools)
        for num_tokens in (5, 9, 8):
            plan.add(num_tokens, max_tokens)
        plan.drain()
        assert len(plan.scheduler.exposed_copies_s) == expected
        assert all(seconds >= 0 for seconds in plan.scheduler.exposed_copies_s)
        assert [s.request.timeline.resident is not None for s in plan.sequences] == [expected > 0] * 3


def test_stats_hold_them() -> None:
    with LLM(DEMO_MODEL, device="cpu", enable_two_gpu_pd=True) as llm:
        llm.generate([[5] * 40] * 2, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        stats = llm.stats()
    assert sum(stats["exposed_copy_ms"]["counts"]) == 2
    assert len(stats["card1"]["decode_period_ms"]["upper"]) == len(stats["card1"]["decode_gap_ms"]["counts"])


def answered(llm: LLM, lengths: list[int]) -> list[Request]:
    """The engine's own requests, after it has answered one for each length, two answers each."""
    kept: list[Request] = []
    submit = llm._engine.submit

    def keep(request: Request, *rest: Any) -> None:
        kept.append(request)
        submit(request, *rest)

    params = [SamplingParams(max_tokens=length, n=2, ignore_eos=True, temperature=1) for length in lengths]
    with patch.object(llm._engine, "submit", keep):
        llm.generate([[5 + i] * 30 for i in range(len(lengths))], params, use_tqdm=False)
    return kept


@pytest.mark.parametrize("options", [{}, {"enable_two_gpu_pd": True}, {"overlap": False}])
def test_latencies_are_those_of_the_answers(options: dict[str, Any], tmp_path: Path) -> None:
    """Every token once, also where a small pool evicts; sums to rounding."""
    with make_llm(write_config(tmp_path), num_kvcache_blocks=20, max_num_seqs=4, **options) as llm:
        requests = answered(llm, [1, 2, 100, 9, 90, 80])
        stats = llm.stats()
    answers = [sequence for request in requests for sequence in request.sequences]
    times = [sequence.token_times for sequence in answers]
    arrived = [sequence.request.timeline.arrived for sequence in answers]
    admitted = [sequence.request.timeline.admitted for sequence in answers]
    assert stats["evacuations"] + stats["recomputes"] > 0, "the pool was meant to be too small"
    expected = {
        "ttft_ms": [t[0] - a for t, a in zip(times, arrived, strict=True)],
        "inter_token_ms": [later - earlier for t in times for earlier, later in zip(t, t[1:], strict=False)],
        "queue_ms": [b - a for a, b in zip(arrived, admitted, strict=True) if b is not None],
        "prefill_ms": [t[0] - a for t, a in zip(times, admitted, strict=True) if a is not None],
        "decode_ms": [t[-1] - t[0] for t in times],
        "e2e_ms": [t[-1] - a for t, a in zip(times, arrived, strict=True)],
    }
    for name, seconds in expected.items():
        single = Histogram()
        for value in seconds:
            single.add(value)
        assert stats["requests"][name]["counts"] == single.as_dict()["counts"], name
        assert stats["requests"][name]["sum"] == pytest.approx(sum(seconds) * 1e3)
    assert stats["requests"]["finished"] == {"stop": 0, "length": 12, "abort": 0, "error": 0}
    assert stats["prompt_tokens"] == 6 * 30 and stats["sampled_tokens"] == sum(map(len, times))


def test_an_abort_has_no_latency(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path), overlap=False) as llm:
        ended = llm.add_request([1, 2], SamplingParams(max_tokens=99, ignore_eos=True))
        llm.step()
        llm.abort(ended)
        llm.abort(ended)
        while llm.has_unfinished():
            llm.step()
        requests = llm.stats()["requests"]
    assert requests["finished"] == {"stop": 0, "length": 0, "abort": 1, "error": 0}
    assert sum(requests["ttft_ms"]["counts"]) == 1 and sum(requests["e2e_ms"]["counts"]) == 0


def test_a_failed_loop_is_an_error_and_closing_is_none(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    with make_llm(folder) as llm:
        llm.generate([1], SamplingParams(max_tokens=1), use_tqdm=False)
    assert set(llm.stats()["errors"].values()) == {0}
    with make_llm(folder) as llm, pytest.raises(EngineDeadError):
        with patch.object(llm._engine.scheduler, "schedule", side_effect=RuntimeError("planted")):
            llm.generate([1], SamplingParams(max_tokens=1), use_tqdm=False)
    assert {kind: count for kind, count in llm.stats()["errors"].items() if count} == {"engine": 1}


def test_a_stopwatch_counts_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.0, 15.0, 21.0, 30.0])
    monkeypatch.setattr("nanovllm.engine.stopwatch.time", SimpleNamespace(perf_counter=lambda: next(now)))
    watch = Stopwatch()
    watch.set(False)
    assert watch.seconds == 0
    watch.set(True)  # at 10
    watch.set(True)
    assert watch.seconds == 2
    watch.set(False)  # at 15
    assert watch.seconds == watch.seconds == 5
    watch.set(True)  # at 21
    assert watch.seconds == 5 + 9


def test_back_pressure_lasts_while_a_prompt_waits_for_it() -> None:
    """Two slots, a backlog of one at most: the third prompt waits for it, and nobody does at the end."""
    plan = Plan(50, 50, max_num_seqs=2, max_num_batched_tokens=8, decode_backlog_high=1, decode_backlog_low=0)
    for _ in range(5):
        plan.add(8, max_tokens=6)
    plan.run(PrefillShard, CopyShard, until=lambda: plan.scheduler.paused)
    assert plan.scheduler.back_pressure.seconds == 0 or plan.scheduler.waiting
    plan.schedule()
    begun_s = plan.scheduler.back_pressure.seconds
    assert 0 < begun_s < plan.scheduler.back_pressure.seconds, "it runs"
    plan.drain()
    plan.schedule()
    ended_s = plan.scheduler.stats()["back_pressure_seconds"]
    assert plan.scheduler.stats()["back_pressure_seconds"] == ended_s > begun_s, "nobody waits: it stands still"
