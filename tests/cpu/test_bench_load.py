"""Load: arrivals and workloads as they are defined, metrics by hand, routing, and every mode on CPU cards."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats as distributions

import bench
import bench_compare
import bench_curves
import bench_load
import bench_metrics
import bench_replicas
from bench_load import Submission, drive, follow_ups
from bench_metrics import Answer
from bench_workloads import Conversation, Rate, Turn, Workload, arrival_times, most_tokens
from nanovllm import DEMO_MODEL, LLM, RequestOutput, SamplingParams
from tests.cpu.tiny import make_llm, paused, settle, wait_until, write_config

DEMO = ["--model", DEMO_MODEL, "--device", "cpu", "--num-kvcache-blocks", "40", "--max-num-seqs", "8"]
SMALL = [*DEMO, "--num-prompts", "6", "--input-len", "40", "--output-len", "6", "--range-ratio", "0.5"]


def run_bench(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    assert bench.main(arguments) == 0
    table, _, last = capsys.readouterr().out.strip().rpartition("\n")
    return table, json.loads(last)


# -- arrivals and workloads


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness: float) -> None:
    times = arrival_times(20_000, 10.0, burstiness, random.Random(3))
    gaps = np.diff([0.0, *times])
    assert times[-1] == pytest.approx(2_000) and (gaps >= 0).all()
    assert gaps.var() == pytest.approx(1 / (burstiness * 10.0**2), rel=0.05)
    expected = distributions.gamma(burstiness, scale=1 / (10.0 * burstiness))
    assert distributions.kstest(gaps, expected.cdf).pvalue > 0.01


def test_arrivals_come_from_the_seed_and_stretch_with_the_rate() -> None:
    slow, fast = (arrival_times(50, rate, 1.0, random.Random(1)) for rate in (2.0, 8.0))
    assert slow == pytest.approx([4 * time for time in fast])
    assert arrival_times(50, 2.0, 1.0, random.Random(2)) != slow
    assert arrival_times(3, math.inf, 1.0, random.Random(1)) == [0.0, 0.0, 0.0]


def test_rates() -> None:
    assert [Rate.parse(text).label for text in ("29.4", "inf", "0.5x")] == ["29.4", "inf", "0.5x"]
    assert Rate.parse("0.5x").requests_per_s(40.0) == 20.0 and Rate.parse("3").requests_per_s(None) == 3.0


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "infx", "0x", "fast"])
def test_bad_rates(text: str) -> None:
    with pytest.raises(ValueError, match="request rate"):
        Rate.parse(text)


def test_random_lengths_reach_both_ends() -> None:
    drawn = Workload(num_prompts=400, input_len=10, output_len=5, range_ratio=0.3).draw(97, random.Random(0))
    assert {len(turn.new_tokens) for (turn,) in drawn} == set(range(7, 14))
    assert {turn.num_output_tokens for (turn,) in drawn} == {3, 4, 5, 6, 7}
    assert {token for (turn,) in drawn for token in turn.new_tokens} == set(range(97))
    assert Workload(num_prompts=400, input_len=10, output_len=5, range_ratio=0.3).draw(97, random.Random(0)) == drawn


def test_prompts_share_prefixes_and_nothing_else() -> None:
    workload = Workload("prefix", num_prompts=12, input_len=8, output_len=2, num_prefixes=3, prefix_len=20)
    prompts = [turn.new_tokens for (turn,) in workload.draw(10_000, random.Random(0))]
    prefixes = [tuple(prompt[:20]) for prompt in prompts]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [4, 4, 4]
    assert len({tuple(prompt[20:]) for prompt in prompts}) == 12 and {len(prompt) for prompt in prompts} == {28}


def test_a_rate_has_its_own_prompts_and_every_engine_the_same() -> None:
    load = bench_load.Load(Workload(num_prompts=5, input_len=9))
    draw = [load.draw(Rate.parse(text), 5.0, 97) for text in ("5", "5", "6")]
    assert draw[0] == draw[1] and draw[0][0] != draw[2][0]


def test_chats_open_as_much_slower_as_they_have_turns() -> None:
    load = bench_load.Load(Workload("chat", num_prompts=12, turns=3, input_len=4))
    conversations, offsets_s = load.draw(Rate.parse("6"), 6.0, 97)
    assert [len(turns) for turns in conversations] == [3] * 4 and offsets_s[-1] == pytest.approx(4 / (6.0 / 3))
    with pytest.raises(ValueError, match="multiple of turns"):
        Workload("chat", num_prompts=10, turns=3)


def test_longest_request_is_the_last_turn() -> None:
    assert most_tokens([[Turn([1] * 5, 3), Turn([1] * 2, 4)], [Turn([1] * 13, 1)]]) == 14


# -- the loop


def answer_of(submission: Submission, ttft_s: float = 0.01, gap_s: float = 0.001) -> Answer:
    gaps_s = (gap_s,) * (submission.num_output_tokens - 1)
    token_ids = [1000 + submission.turn] * submission.num_output_tokens
    asked = submission.arrival_s, submission.conversation, submission.turn, len(submission.prompt)
    return Answer(*asked, 0, token_ids, 0.0, ttft_s, gaps_s, 0.0)


class Echo:
    """Answers at once, but not before it has got `patience` requests."""

    about: list[dict[str, Any]] = []

    def __init__(self, patience: int = 1) -> None:
        self.got: list[Submission] = []
        self.late_s: list[float] = []
        self._patience = patience
        self._told = 0

    def submit(self, submission: Submission) -> None:
        self.got.append(submission)
        self.late_s.append(time.perf_counter() - submission.arrival_s)

    def collect(self) -> list[Answer]:
        if len(self.got) < self._patience:
            return []
        news, self._told = self.got[self._told :], len(self.got)
        return [answer_of(submission) for submission in news]

    def stats(self) -> list[dict[str, Any]]:
        return []


def test_arrivals_wait_for_no_answer() -> None:
    conversations = [[Turn([index], 2)] for index in range(20)]
    offsets_s = arrival_times(20, 200.0, 1.0, random.Random(0))
    target = Echo(patience=20)
    begin_s, answers = drive(target, conversations, offsets_s, think_s=1.0)
    assert len(answers) == 20 and min(target.late_s) >= 0
    assert [s.conversation for s in target.got] == list(range(20))
    assert [s.arrival_s - begin_s for s in target.got] == pytest.approx(offsets_s)


def test_a_turn_is_all_that_was_said_before_it() -> None:
    chat: Conversation = [Turn([1, 2], 3), Turn([3], 2), Turn([4, 5], 1)]
    target = Echo()
    _, answers = drive(target, [chat, [Turn([9], 1)]], [0.0, 0.0], think_s=0.05)
    first, second, third = [s for s in target.got if s.conversation == 0]
    assert first.prompt == [1, 2]
    assert second.prompt == [*first.prompt, 1000, 1000, 1000, 3]
    assert third.prompt == [*second.prompt, 1001, 1001, 4, 5]
    assert second.arrival_s - first.arrival_s == pytest.approx(0.01 + 2 * 0.001 + 0.05) and len(answers) == 4


def test_no_turn_follows_the_last() -> None:
    last = answer_of(Submission(0.0, 0, 1, [1], 1))
    assert follow_ups([last], [[Turn([1], 1), Turn([2], 1)]], [[1]], 0.1) == []


# -- metrics


def make_answer(ttft_ms: float, *gaps_ms: float, turn: int = 0, arrival_s: float = 0.0, cached: int = 0) -> Answer:
    gaps_s, token_ids = tuple(gap / 1e3 for gap in gaps_ms), [7] * (1 + len(gaps_ms))
    return Answer(arrival_s, 0, turn, 10, cached, token_ids, 0.002, ttft_ms / 1e3, gaps_s, None)


def test_metrics_by_hand() -> None:
    answers = [make_answer(100, 10, 30), make_answer(300, 20, arrival_s=0.5), make_answer(50)]
    figures = bench_metrics.load_figures(answers, begin_s=-0.18, goodput={})
    assert figures["seconds"] == pytest.approx(1.0)  # 0.18 before the first arrival; the last token comes at 0.82
    assert (figures["requests_per_s"], figures["output_tokens_per_s"]) == (3.0, 6.0)
    ttft, tpot, itl, e2e = (figures[name] for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"))
    assert ttft == {"mean": 150.0, "p50": 100.0, "p90": 260.0, "p99": 296.0, "max": 300.0}
    assert (tpot["mean"], tpot["max"]) == (20.0, 20.0), "a single token has no TPOT"
    assert (itl["mean"], itl["p50"], itl["max"]) == (20.0, 20.0, 30.0) and itl["p99.9"] > itl["p99"]
    assert (e2e["max"], e2e["p50"]) == (320.0, 140.0)
    assert figures["second_token_ms"]["p50"] == 15.0 and figures["late_ms"]["max"] == 2.0
    assert figures["exposed_copy_ms"]["p50"] is None and figures["good_per_s"] is None


def test_single_tokens_alone() -> None:
    figures = bench_metrics.load_figures([make_answer(100)], 0.0, {"tpot": 1.0})
    assert set(figures["itl_ms"].values()) == set(figures["tpot_ms"].values()) == {None}
    assert figures["good_share"] == 1.0, "the TPOT of a single token counts as 0"


@pytest.mark.parametrize(
    ("bounds", "good"),
    [({}, True), ({"ttft": 100.0}, True), ({"ttft": 99.0}, False), ({"ttft": 100.0, "tpot": 20.0}, True),
     ({"tpot": 19.0}, False), ({"e2e": 140.0}, True), ({"e2e": 139.0, "ttft": 500.0}, False)],
)  # fmt: skip
def test_goodput_needs_every_bound(bounds: dict[str, float], good: bool) -> None:
    exact = Answer(0.0, 0, 0, 10, 0, [7] * 3, 0.0, 0.1, (0.01, 0.03), None)
    assert bench_metrics.is_good(exact, {name: bound + 1e-6 for name, bound in bounds.items()}) == good


def test_percentiles_are_numpys() -> None:
    samples = [random.Random(5).random() for _ in range(137)]
    for percent in (50, 90, 99, 99.9):
        assert bench_metrics.percentile(sorted(samples), percent) == pytest.approx(np.percentile(samples, percent))
    assert bench_metrics.percentile([4.0], 99) == 4.0 and bench_metrics.percentile([], 99) is None


def test_turns_are_told_apart() -> None:
    answers = [make_answer(10), make_answer(30, turn=1, cached=8), make_answer(50, turn=1, cached=6)]
    first, second = bench_metrics.load_figures(answers, 0.0, {})["turns"]
    assert (first["cached_tokens"], second["cached_tokens"], second["prompt_tokens"]) == (0, 14, 20)
    assert (first["ttft_ms"]["p50"], second["ttft_ms"]["p50"]) == (10.0, 40.0)


def test_histograms_count_what_came_in_between() -> None:
    before = {"upper": [0.1, 1.0, 10.0, math.inf], "counts": [5, 5, 5, 5]}
    after = before | {"counts": [103, 6, 6, 5]}
    expected = {"count": 100, "p50": 0.1, "p99": 1.0, "max": 10.0}
    assert bench_metrics.histogram_growth(before, after) == expected
    assert bench_metrics.histogram_growth(before, before) is None and bench_metrics.histogram_growth(None, None) is None
    overflow = bench_metrics.histogram_growth(before, before | {"counts": [5, 5, 5, 6]})
    assert overflow == {"count": 1, "p50": None, "p99": None, "max": None}  # beyond the last bound


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "ttft:0", "itl:5", ":5"])
def test_bad_goodput(text: str) -> None:
    with pytest.raises(ValueError, match="ttft:MS"):
        bench_metrics.parse_bound(text)


# -- replicas


def test_least_loaded() -> None:
    assert bench_replicas.least_loaded([5, 3, 9]) == 1
    assert bench_replicas.least_loaded([0, 0]) == 0 and bench_replicas.least_loaded([7]) == 0


def test_outstanding_tokens_shrink_with_every_sampled_one() -> None:
    outstanding = bench_replicas.Outstanding(sampled_tokens=50, ended_tokens=50)
    first, second = Submission(0.0, 0, 0, [1] * 10, 4), Submission(0.0, 1, 0, [1] * 20, 6)
    outstanding.submitted(first)
    outstanding.submitted(second)
    assert outstanding.tokens == 40
    outstanding.reported(bench_replicas.Report([], 53))
    assert outstanding.tokens == 37
    outstanding.reported(bench_replicas.Report([answer_of(first)], 58))
    assert outstanding.tokens == 20 + 6 - 4
    outstanding.reported(bench_replicas.Report([answer_of(second)], 60))
    assert outstanding.tokens == 0


class NoProcess:
    """A replica that takes and never answers."""

    about: dict[str, Any] = {}

    def __init__(self, *arguments: Any) -> None:
        self.outstanding = bench_replicas.Outstanding()
        self.got: list[Submission] = []

    def wait_until_ready(self) -> None: ...

    def submit(self, submission: Submission) -> None:
        self.outstanding.submitted(submission)
        self.got.append(submission)


def test_requests_go_to_the_least_loaded_and_chats_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_replicas, "Replica", NoProcess)
    replicas = bench_replicas.Replicas("", [{}, {}], None)
    lengths = {0: 50, 1: 10, 2: 10, 3: 40}
    for conversation, length in lengths.items():
        replicas.submit(Submission(0.0, conversation, 0, [1] * length, 1))
    replicas.submit(Submission(0.0, 1, 1, [1] * 90, 1))
    replicas.submit(Submission(0.0, 1, 2, [1] * 90, 1))
    homes: list[Any] = replicas._replicas
    assert [[s.conversation for s in home.got] for home in homes] == [[0], [1, 2, 3, 1, 1]]


# -- the best budget


def point(mode: str, rate: str, tokens: float, itl: float | None, ttft: float) -> dict[str, Any]:
    latencies = {"itl_ms": {"p99": itl}, "ttft_ms": {"p90": ttft}}
    return {"mode": mode, "rate": rate, "requested_per_s": None if rate == "inf" else float(rate),
            "output_tokens_per_s": tokens} | latencies  # fmt: skip


def test_best_budget_has_the_shortest_gaps_among_the_prompt_ones() -> None:
    overloaded, small, large = (point("one", "9", *f) for f in ((90, 5, 900), (99, 20, 119), (100, 60, 100)))
    assert bench_compare.best_of([overloaded, small, large]) is small
    saturated = [point("one", "inf", *figures) for figures in ((90, 5, 9), (99, 20, 9))]
    assert bench_compare.best_of(saturated) is saturated[1]


def test_ratios_are_to_the_replicas_at_the_same_rate() -> None:
    theirs = [point("two-replicas", "9", 100, 20, 119), point("two-replicas", "9", 110, 60, 100)]
    rows = bench_compare.ratios([*theirs, point("pd", "9", 99, 5, 110), point("pd", "8", 1, 1, 1)])
    (row,) = rows
    assert (row["mode"], row["rate"]) == ("pd", "9")
    assert row["to_best"] == {"output_tokens_per_s": 0.99, "itl_p99_ms": 0.25, "ttft_p90_ms": round(110 / 119, 4)}
    assert row["to_best_of_each"] == {"output_tokens_per_s": 0.9, "itl_p99_ms": 0.25, "ttft_p90_ms": 1.1}
    assert bench_compare.over({"a": None, "b": 1.0}, {"a": 1.0, "b": 0.0}) == {"a": None, "b": None}


def test_engines_of_the_modes() -> None:
    lists: Any = (["one"], [512], [Rate.parse("1")], bench_load.Load(Workload()))
    plan = bench_compare.Comparison("m", {"max_num_seqs": 8}, (2, 5), *lists)
    single = {"max_num_seqs": 8, "enable_two_gpu_pd": False, "max_num_batched_tokens": 512}
    single["enable_decode_pipeline"] = False
    assert plan.engines("one", 512) == [single | {"prefill_device_id": 2}]
    assert plan.engines("two-replicas", 512) == [single | {"prefill_device_id": card} for card in (2, 5)]
    pair = {"max_num_seqs": 8, "enable_two_gpu_pd": True, "prefill_device_id": 2, "decode_device_id": 5}
    assert plan.engines("pd", None) == [pair | {"pd_roles": "elastic"}]
    assert plan.engines("pd-strict", None) == [pair | {"pd_roles": "strict"}]
    assert plan.engines("pd-lending", None) == [pair | {"pd_roles": "elastic", "lend_sms": (60, 72)}]
    asked = replace(plan, options=plan.options | {"lend_sms": (68, 64)})
    assert asked.engines("pd-lending", None) == [pair | {"pd_roles": "elastic", "lend_sms": (68, 64)}]
    assert asked.engines("pd", None) == plan.engines("pd", None)
    assert asked.engines("one", 512) == plan.engines("one", 512)


# -- end to end


def test_load_on_two_cards(capsys: pytest.CaptureFixture[str]) -> None:
    strict = ["--two-gpus", "--pd-roles", "strict"]  # so that a card's tokens are known
    goodput = ["--goodput", "ttft:60000", "e2e:60000"]
    table, figures = run_bench([*SMALL, *strict, "--request-rate", "40,inf", *goodput], capsys)
    timed, saturated = figures["points"]
    assert (timed["rate"], saturated["rate"], saturated["requested_per_s"]) == ("40", "inf", None)
    for row in (timed, saturated):
        assert row["num_requests"] == 6 and row["good_share"] == 1.0 and row["cached_tokens"] == 0
        (engine,) = row["engines"]
        prefill, decode = engine["cards"]
        assert prefill["prefill_tokens"] == row["prompt_tokens"], "the warm-up is in the figures"
        assert decode["decode_tokens"] == row["output_tokens"] - 6  # first tokens come from prefill
        assert engine["helped"] == engine["hand_offs"] == engine["taken_over"] == 0  # strict
        assert engine["copies"]["copied_bytes"] > 0 and 0 < prefill["busy_share"] <= 1
        assert row["late_ms"]["max"] >= 0 and row["exposed_copy_ms"]["p99"] >= 0
        assert row["ttft_ms"]["p50"] <= row["e2e_ms"]["p50"]
    assert "helped 0, hand offs 0, taken over 0" in table
    assert "pd @16384 40" in table and "late max ms" in table
    assert figures["about"]["pd @16384"][0]["config"]["max_num_seqs"] == 8
    assert figures["arguments"]["request_rate"] == ["40", "inf"]


def test_a_chat_finds_its_past_in_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    chat = ["--workload", "chat", "--turns", "2", "--think-s", "0.1", "--input-len", "100", "--range-ratio", "0"]
    table, figures = run_bench([*SMALL, "--request-rate", "inf", *chat], capsys)
    first, second = figures["points"][0]["turns"]
    assert first["cached_tokens"] == 0 < second["cached_tokens"] and "turn 1" in table


def test_a_chat_computed_again_beside_a_thread_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    chat = ["--workload", "chat", "--turns", "2", "--think-s", "0.1", "--input-len", "100", "--range-ratio", "0"]
    _, figures = run_bench(
        [*SMALL, "--two-gpus", "--request-rate", "inf", "--beside-python", "--no-prefix-caching", *chat], capsys
    )
    assert [point["mode"] for point in figures["points"]] == ["pd", "pd beside Python"]
    assert [turn["cached_tokens"] for point in figures["points"] for turn in point["turns"]] == [0] * 4


def test_modes_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--budgets", "64", "--workload", "prefix", "--num-prefixes", "2", "--prefix-len", "16"]
    table, figures = run_bench(
        [*SMALL, *options, "--compare", "one,two-replicas,pd,pd-strict", "--request-rate", "inf,0.5x"], capsys
    )
    assert [(p["mode"], p["rate"]) for p in figures["points"]] == [
        ("two-replicas", "inf"),  # measured first, and once: the capacity
        ("one", "inf"), ("one", "0.5x"), ("two-replicas", "0.5x"), ("pd", "inf"), ("pd", "0.5x"),
        ("pd-strict", "inf"), ("pd-strict", "0.5x"),
    ]  # fmt: skip
    capacity = figures["capacity_per_s"]
    assert capacity == figures["points"][0]["requests_per_s"]
    for row in figures["points"]:
        assert row["requested_per_s"] == (None if row["rate"] == "inf" else pytest.approx(capacity / 2, rel=1e-3))
        assert len(row["engines"]) == (2 if row["mode"] == "two-replicas" else 1)
    for rate in ("inf", "0.5x"):  # the same prompts
        assert len({p["prompt_tokens"] for p in figures["points"] if p["rate"] == rate}) == 1
        assert len({p["output_tokens"] for p in figures["points"] if p["rate"] == rate}) == 1
    served = [engine["cards"][0]["prefill_tokens"] for engine in figures["points"][0]["engines"]]
    assert all(served), "one of the replicas had nothing to do while six requests came at once"
    roles = {name.split()[0]: engines[0]["config"]["pd_roles"] for name, engines in figures["about"].items()}
    assert (roles["pd"], roles["pd-strict"]) == ("elastic", "strict")
    configs = {name: [about["config"] for about in engines] for name, engines in figures["about"].items()}
    assert [config["prefill_device_id"] for config in configs["two-replicas @64"]] == [0, 1]
    assert {row["mode"] for row in figures["ratios"]} == {"one", "pd", "pd-strict"} and "ratios" in table


MISTAKES: list[tuple[list[str], str]] = [
    (["--request-rate", "0"], "request rate"),
    (["--request-rate", "2,x"], "request rate"),
    (["--request-rate", "0.5x"], "two-replicas"),
    (["--request-rate", "0.5x", "--compare", "one,pd"], "two-replicas"),
    (["--request-rate", "0.5x", "--compare", "two-replicas", "--workload", "chat"], "chat"),
    (["--compare", "one"], "--request-rate"),
    (["--beside-python"], "--decode-steps"),
    (["--beside-python", "--request-rate", "1", "--compare", "one"], "--compare"),
    (["--goodput", "ttft:5"], "--request-rate"),
    (["--request-rate", "1", "--compare", "one,three"], "three"),
    (["--request-rate", "1", "--compare", "one", "--two-gpus"], "--two-gpus"),
    (["--request-rate", "1", "--prefill"], "--prefill"),
    (["--request-rate", "1", "--no-overlap"], "--no-overlap"),
    (["--request-rate", "1", "--burstiness", "0"], "above 0"),
    (["--request-rate", "1", "--goodput", "itl:5"], "ttft:MS"),
    (["--request-rate", "1", "--turns", "2"], "--turns"),
    (["--request-rate", "1", "--workload", "chat", "--turns", "5"], "multiple"),
    (["--request-rate", "1", "--workload", "chat", "--turns", "2", "--think-s", "0"], "think_s"),
    (["--request-rate", "1", "--range-ratio", "1"], "range_ratio"),
    (["--request-rate", "1", "--input-len", "5000"], "max_model_len"),
    (["--request-rate", "1", "--compare", "one", "--budgets", "0"], "at least 1"),
    (["--request-rate", "1", "--compare", "two-replicas", "--max-num-seqs", "0"], "max_num_seqs"),
    (["--request-rate", "1", "--compare", "one", "--model", "/no/such/folder"], "/no/such/folder"),
]
NEED_A_MODEL = ("max_model_len", "max_num_seqs")  # to be noticed


@pytest.mark.parametrize(("arguments", "word"), MISTAKES)
def test_mistakes_are_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main([*SMALL, *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and word in captured.err


# -- curves


class Axis:
    def __init__(self) -> None:
        self.lines: dict[str, list[tuple[float, ...]]] = {}

    def plot(self, *columns: tuple[float, ...], marker: str, label: str) -> None:
        self.lines[label] = list(columns)

    def set(self, **names: str) -> None: ...
    def legend(self) -> None: ...


@pytest.fixture
def pyplot(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Axis]]:
    """As much of matplotlib as is used; it is an extra that tests do without."""
    axes = [Axis() for _ in bench_curves.CURVES]

    class Figure:
        def tight_layout(self) -> None: ...
        def savefig(self, path: Path) -> None:
            path.write_bytes(b"PNG")

    fake, inner = ModuleType("matplotlib"), ModuleType("matplotlib.pyplot")
    fake.use = lambda name: None  # type: ignore[attr-defined]
    inner.subplots = lambda *shape, figsize: (Figure(), axes)  # type: ignore[attr-defined]
    inner.close = lambda figure: None  # type: ignore[attr-defined]
    fake.pyplot = inner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", fake)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", inner)
    yield axes


def test_a_curve_a_mode_without_infinite_rates(pyplot: list[Axis], tmp_path: Path) -> None:
    rows = [("pd", 8.0, 3.0), ("pd", 4.0, 2.0), ("one", 4.0, 5.0), ("one", None, 9.0)]
    points = [
        {"mode": mode, "requested_per_s": rate} | {key: {name: ms} for key, name, _ in bench_curves.CURVES}
        for mode, rate, ms in rows
    ]
    bench_curves.plot(points, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()
    assert all(axis.lines == {"pd": [(4.0, 8.0), (2.0, 3.0)], "one": [(4.0,), (5.0,)]} for axis in pyplot)


def test_plot_from_the_command_line(pyplot: list[Axis], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_bench([*SMALL, "--request-rate", "50", "--plot", str(tmp_path / "a.png")], capsys)
    assert (tmp_path / "a.png").exists() and list(pyplot[0].lines) == ["one"]


def test_plot_into_no_folder_ends_before_any_work(pyplot: list[Axis], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--model", "/no/such/folder", "--request-rate", "1", "--plot", "/no/such/a.png"])
    assert "no folder /no/such" in capsys.readouterr().err


def test_plot_without_matplotlib_ends_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        bench.main(["--model", "/no/such/folder", "--request-rate", "1", "--plot", "a.png"])
    assert "needs matplotlib" in capsys.readouterr().err


# -- what the library offers for it


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    with make_llm(write_config(tmp_path / "model")) as llm:
        yield llm


def test_take_finished_tells_each_end_once(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (3, 5, 9)]
    ids = [llm.add_request([1, 2, 3], each) for each in params]
    outputs: list[RequestOutput] = []

    def all_told() -> bool:
        outputs.extend(llm.take_finished())
        return len(outputs) >= 3

    wait_until(all_told)
    assert [(o.request_id, len(o.outputs[0].token_ids)) for o in outputs] == list(zip(ids, (3, 5, 9), strict=True))
    assert all(output.finished for output in outputs)
    settle(llm)
    assert llm.take_finished() == [] and llm.step() == [] and not llm.has_unfinished()


def test_take_finished_waits_for_nothing_and_loses_nothing(llm: LLM) -> None:
    with paused(llm, after_steps=2):  # until the block is left: a call that waited would not return
        request_id = llm.add_request([1, 2, 3], SamplingParams(max_tokens=6, ignore_eos=True))
        wait_until(lambda: llm.stats()["sampled_tokens"] >= 2)
        assert llm.take_finished() == []
    while not (outputs := llm.step())[-1].finished:
        pass
    assert outputs[-1].request_id == request_id and len(outputs[-1].outputs[0].token_ids) == 6
    assert llm.take_finished() == []


def test_metrics_count_from_the_arrival_told(llm: LLM) -> None:
    llm.add_request([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True), arrived_s=time.perf_counter() - 100)
    while not (outputs := llm.step())[-1].finished:
        pass
    metrics = outputs[-1].metrics
    assert metrics.queue and metrics.ttft and metrics.end_to_end
    assert 100 < metrics.queue < metrics.ttft < metrics.end_to_end and metrics.inter_token[0] < 100


@pytest.mark.parametrize("arrived_s", [math.nan, math.inf, -math.inf, 1e18, True, "now"])
def test_impossible_arrivals(llm: LLM, arrived_s: Any) -> None:
    with pytest.raises(ValueError, match="arrived_s"):
        llm.add_request([1, 2, 3], None, arrived_s)
    assert not llm.has_unfinished()
