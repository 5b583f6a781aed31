"""`llm.trace`: everything that completed inside is in the file, once, where and when it ran; and what overlaps."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.engine import trace as trace_module
from nanovllm.engine.executor import Job
from nanovllm.engine.pipeline_graphs import StageTimer, TimedStage
from nanovllm.engine.shards import DecodeShard
from nanovllm.engine.trace import DeviceClock, TraceRecorder
from tests.random_work import TINY, Work, answers, check_nothing_left
from tools.plot_trace import lanes_of
from tools.trace_overlap import main as print_overlap
from tools.trace_overlap import overlap_ms

PROMPTS = ["def fibonacci(n):\n" * 8, "import os", "class Stack:", "import os\nimport sys\n" * 6]
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LANES = {
    1: {"host": {"scheduler"}, "card 0": {"prefill", "decode", "mixed", "copies to card 0"}},
    2: {
        "host": {"scheduler"},
        "card 0": {"prefill", "decode", "mixed", "copies to card 1"},
        "card 1": {"prefill", "decode", "mixed", "copies to card 0"},
    },
}


def make_llm(two_cards: bool = True, overlap: bool = True) -> LLM:
    pools = (14, 18) if two_cards else 18
    options = dict(TINY, num_kvcache_blocks=pools, enable_two_gpu_pd=two_cards, overlap=overlap)
    return LLM(DEMO_MODEL, device="cpu", **options)


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with make_llm() as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """One engine for all tests; each must leave it with nothing in flight and no trace on."""
    yield shared
    check_nothing_left(shared)
    assert shared._engine.trace is None and not shared._engine.tracing.locked()


def run(llm: LLM) -> None:
    """Answer the prompts, and let what they leave behind drain."""
    llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    check_nothing_left(llm)


def load(path: Path) -> list[dict[str, Any]]:
    """A file's events, once they are found to be what the format asks for."""
    content = json.loads(path.read_text(), parse_constant=not_json)
    assert content["displayTimeUnit"] in ("ms", "ns") and set(content) <= FILE_KEYS
    for event in content["traceEvents"]:
        check_event(event)
    return content["traceEvents"]


FILE_KEYS = {"traceEvents", "displayTimeUnit", "otherData"}
NUMBER = (int, float)
PLACE = {"name": str, "ph": str, "pid": int, "tid": int}
# By phase: what an event of Google's "Trace Event Format" must have, of which type.
PHASES: dict[str, dict[str, Any]] = {
    "M": {"name": str, "pid": int, "args": dict},
    "X": PLACE | {"cat": str, "ts": NUMBER, "dur": NUMBER, "args": dict},
    **dict.fromkeys("stf", PLACE | {"cat": str, "ts": NUMBER, "id": int, "bp": str}),
}


def not_json(constant: str) -> None:
    raise AssertionError(f"{constant} in a file that viewers parse as JSON")


def check_event(event: dict[str, Any]) -> None:
    """One event of the format; times are microseconds from the trace's begin on."""
    for key, kind in PHASES[event["ph"]].items():
        assert isinstance(event.get(key), kind) and not isinstance(event[key], bool), (key, event)
    assert event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0 and event.get("bp", "e") == "e", event
    if event["ph"] == "M":
        assert event["name"] in ("process_name", "thread_name") and isinstance(event["args"]["name"], str), event
        assert ("tid" in event) == (event["name"] == "thread_name"), event


@pytest.mark.parametrize("change", [{"ph": "Z"}, {"ts": None}, {"dur": -1.0}, {"tid": "1"}, {"args": []}, {"cat": 3}])
def test_what_is_no_event_is_found(change: dict[str, Any]) -> None:
    event = {"ph": "X", "name": "decode", "cat": "decode", "pid": 2, "tid": 21, "ts": 0.0, "dur": 1.0, "args": {}}
    check_event(event)
    with pytest.raises((AssertionError, KeyError)):
        check_event(event | change)


def spans(events: list[dict[str, Any]], lane: str | None = None, card: int | None = None) -> list[dict[str, Any]]:
    """In order of their begins."""
    found = [e for e in events if e["ph"] == "X" and lane in (None, e["cat"]) and card in (None, e["pid"] - 2)]
    return sorted(found, key=lambda e: e["ts"])


def lanes(events: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Names of the lanes of each process, as a viewer shows them."""
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    named: dict[str, set[str]] = {name: set() for name in processes.values()}
    for event in events:
        if event["name"] == "thread_name":
            named[processes[event["pid"]]].add(event["args"]["name"])
    return named


def end(span: dict[str, Any]) -> float:
    return span["ts"] + span["dur"]


def total(events: list[dict[str, Any]], lane: str, argument: str, card: int | None = None) -> int:
    return sum(span["args"][argument] for span in spans(events, lane, card))


def check_counts(events: list[dict[str, Any]], before: dict[str, Any], after: dict[str, Any], num_cards: int) -> None:
    """As many spans, tokens, blocks and bytes as `stats` counted meanwhile."""
    for card in range(num_cards):
        old, new = before[f"card{card}"], after[f"card{card}"]
        for lane in ("prefill", "decode", "mixed"):
            assert len(spans(events, lane, card)) == new[f"{lane}_steps"] - old[f"{lane}_steps"], (lane, card)
        prefilled = total(events, "prefill", "tokens", card) + total(events, "mixed", "chunk_tokens", card)
        assert prefilled == new["prefill_tokens"] - old["prefill_tokens"]
        # Rows whose sequence had ended when the step was collected had no taker any more.
        decoded = total(events, "decode", "tokens", card) + total(events, "mixed", "rows", card)
        assert decoded >= new["decode_tokens"] - old["decode_tokens"]
    assert len(spans(events, "copy")) == after["copies"] - before["copies"]
    assert total(events, "copy", "blocks") == after["copied_blocks"] - before["copied_blocks"]
    assert total(events, "copy", "bytes") == after["copied_bytes"] - before["copied_bytes"]


def check_lanes(events: list[dict[str, Any]]) -> None:
    """One thing at a time in each lane, and on each card."""
    for card in {e["pid"] for e in spans(events)}:
        steps = [s for s in spans(events) if s["pid"] == card and s["cat"] != "copy"]
        for one, next_one in zip(steps, steps[1:], strict=False):
            assert end(one) <= next_one["ts"] + 0.01, (one, next_one)
    for lane in ("prefill", "decode", "mixed", "copy"):
        for card in (0, 1):
            numbers = [s["args"]["copy" if lane == "copy" else "step"] for s in spans(events, lane, card)]
            assert numbers == sorted(set(numbers))


def check_flows(events: list[dict[str, Any]]) -> Counter[str]:
    """Arrows go forward, from slice to slice of the lanes they should join. Counts them by the lanes they join."""
    flows: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "request":
            flows.setdefault(event["id"], []).append(event)
    found: Counter[str] = Counter()
    for flow in flows.values():
        assert "".join(e["ph"] for e in flow) in ("stf", "sf")
        hosts = [next(s for s in spans(events) if s["tid"] == e["tid"] and s["ts"] <= e["ts"] <= end(s)) for e in flow]
        found[" ".join(h["cat"] for h in hosts)] += 1
        assert all(end(a) <= b["ts"] + 0.01 for a, b in zip(hosts, hosts[1:], strict=False)), hosts
        assert hosts[0]["args"]["samples"] > 0
    return found


# -- what is in it


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_cards", [1, 2])
def test_everything_that_ran_is_there(num_cards: int, overlap: bool, tmp_path: Path) -> None:
    work = Work.random(3, vocab_size=4096, count=100)
    with make_llm(num_cards == 2, overlap) as llm:
        before = llm.stats()
        with llm.trace(tmp_path / "run.json"):
            answers(llm, work, abort_seed=1)
            check_nothing_left(llm)
        after = llm.stats()
    events = load(tmp_path / "run.json")
    assert lanes(events) == LANES[num_cards]
    check_counts(events, before, after, num_cards)
    check_lanes(events)
    flows = check_flows(events)  # one card copies only the private tails of n > 1
    ends = [lane for flow in flows for lane in (flow.split()[0], flow.split()[-1])]
    assert set(ends) <= {"prefill", "decode", "mixed"} and all(flow.split()[0] != "decode" for flow in flows), flows
    copied = sum(count for flow, count in flows.items() if "copy" in flow)
    assert (copied if num_cards == 2 else flows.total() - copied) >= 10, flows
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans(events))
    used = {(e["cat"], e["pid"] - 2) for e in spans(events)}
    everywhere = {("scheduler", -1), ("prefill", 0), ("decode", num_cards - 1), ("copy", 0)}
    assert used >= everywhere | ({("copy", 1)} if num_cards == 2 else set())


def test_a_copy_lies_behind_the_step_that_it_follows(llm: LLM, tmp_path: Path) -> None:
    with llm.trace(tmp_path / "run.json"):
        run(llm)
    events = load(tmp_path / "run.json")
    ends = {(s["pid"], s["args"]["step"]): end(s) for s in spans(events) if "step" in s["args"]}
    following = [(s, ends[s["pid"], s["args"]["after_step"]]) for s in spans(events, "copy") if s["args"]["after_step"]]
    assert len(following) >= len(PROMPTS)
    assert all(step_end <= span["ts"] for span, step_end in following)


def test_nothing_from_outside(llm: LLM, tmp_path: Path) -> None:
    run(llm)
    before = llm.stats()
    with llm.trace(tmp_path / "run.json"):
        run(llm)
        after = llm.stats()
    text = (tmp_path / "run.json").read_text()
    run(llm)
    assert (tmp_path / "run.json").read_text() == text
    check_counts(load(tmp_path / "run.json"), before, after, 2)


def test_two_traces_one_after_the_other(llm: LLM, tmp_path: Path) -> None:
    for _ in range(2):
        before = llm.stats()
        with llm.trace(str(tmp_path / "run.json")):
            run(llm)
            after = llm.stats()
        check_counts(load(tmp_path / "run.json"), before, after, 2)  # the first one's file was replaced


def test_an_idle_trace_is_a_valid_file(llm: LLM, tmp_path: Path) -> None:
    with llm.trace(tmp_path / "run.json"):
        pass
    assert spans(load(tmp_path / "run.json")) == [] and lanes(load(tmp_path / "run.json")) == LANES[2]
    assert overlap_ms(load(tmp_path / "run.json"))["wall_ms"] == 0


def test_a_trace_begun_and_left_while_cards_are_busy(llm: LLM, tmp_path: Path) -> None:
    """What ran already is shown from the trace's begin on; what comes in while the file is written is left out."""
    done = threading.Event()

    def keep_busy() -> None:
        while not done.is_set():
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        for number in range(5):
            with llm.trace(tmp_path / f"{number}.json"):
                llm.generate(PROMPTS[0], PARAMS, use_tqdm=False)
    finally:
        done.set()
        thread.join()
    for number in range(5):
        events = load(tmp_path / f"{number}.json")
        check_lanes(events)
        assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans(events)) and spans(events, "decode", 1)


def test_memory_is_bounded_and_the_file_says_so(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trace_module, "MAX_SPANS", 10)
    with llm.trace(tmp_path / "run.json"):
        run(llm)
    content = json.loads((tmp_path / "run.json").read_text())
    assert 0 < len(spans(content["traceEvents"])) <= 10
    assert content["otherData"]["dropped_spans"] > 10 and content["otherData"]["max_spans"] == 10
    print_overlap([str(tmp_path / "run.json")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["dropped_spans"] > 10


# -- misuse


def test_written_also_by_an_exception(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="enough"), llm.trace(tmp_path / "run.json"):
        run(llm)
        raise KeyboardInterrupt("enough")
    assert len(spans(load(tmp_path / "run.json"), "prefill", 0)) > 0


@pytest.mark.parametrize("path", ["nowhere/run.json", "", "folder", 1, None, b"run.json", "a\0b"])
def test_a_path_that_cannot_be_written(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError), llm.trace(path):
        pytest.fail("the block must not run")
    with llm.trace("fine.json"):  # nothing stays behind
        pass
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["fine.json", "folder"]


def test_one_trace_at_a_time(llm: LLM, tmp_path: Path) -> None:
    with llm.trace(tmp_path / "run.json"):
        for path in ("run.json", "other.json"):
            with pytest.raises(ValueError, match="already"), llm.trace(tmp_path / path):
                pytest.fail("the block must not run")
        run(llm)
    assert len(spans(load(tmp_path / "run.json"), "prefill", 0)) > 0
    assert not (tmp_path / "other.json").exists()


# -- device clocks, on a card that only pretends


class FakeEvent:
    """An event of a card whose clock began at `epoch_s` of the host's; differences come in float32, as from CUDA."""

    epoch_s = 0.0

    def __init__(self, enable_timing: bool = True, time_s: float = 0.0) -> None:
        assert enable_timing
        self.time_s = time_s

    def record(self, stream: Any) -> None:
        self.time_s = trace_module.time.perf_counter() - self.epoch_s

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return float(np.float32((other.time_s - self.time_s) * 1e3))


class FakeStepHandle:
    def __init__(self, begin_s: float, end_s: float) -> None:
        self.start, self.event = FakeEvent(time_s=begin_s), FakeEvent(time_s=end_s)

    def wait(self) -> None:
        return None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> DeviceClock:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(FakeEvent, "epoch_s", trace_module.time.perf_counter() - 1000.0)
    return DeviceClock(torch.device("cuda", 1))


def test_device_times_are_placed_on_the_hosts_clock(clock: DeviceClock) -> None:
    """An hour of steps: what float32 loses must not pile up. Work from before the clocks were set has a place, too."""
    offsets_s = []
    for number in range(-3, 36_000):
        begin_s = 1000.0 + number * 0.1037
        found = clock.span_s(FakeEvent(time_s=begin_s), FakeEvent(time_s=begin_s + 0.025))  # type: ignore[arg-type]
        offsets_s.append(found[0] - begin_s)
        assert found[1] - found[0] == pytest.approx(0.025, abs=1e-6)
    assert offsets_s[0] == pytest.approx(FakeEvent.epoch_s, abs=0.05)  # how fast this machine read the two clocks
    assert max(offsets_s) - min(offsets_s) < 2e-5


def test_a_job_of_a_card_is_shown_when_the_card_ran_it(clock: DeviceClock) -> None:
    recorder = TraceRecorder([None, clock])
    origin_s = recorder._origin_s
    begin_s = origin_s - FakeEvent.epoch_s + 0.5
    job = Job(DecodeShard(1, 4, (0, 1, 2), 77), handle=FakeStepHandle(begin_s, begin_s + 0.002), begin_s=1.0, end_s=9.0)
    recorder.add_job(job, [])
    on_host = Job(DecodeShard(0, 5, (0,), 3), handle=None, begin_s=origin_s + 1, end_s=origin_s + 2)
    recorder.add_job(on_host, [])
    (span, host_span) = spans(recorder.as_dict()["traceEvents"], "decode")
    assert span["ts"] == pytest.approx(500_000, abs=200) and span["dur"] == pytest.approx(2000, abs=1)
    assert span["args"] == {"step": 4, "rows": 3, "tokens": 3, "max_context_tokens": 77} and span["pid"] == 3
    assert (host_span["ts"], host_span["dur"]) == (pytest.approx(1e6, abs=1), pytest.approx(1e6, abs=1))


def test_the_stages_of_a_timed_step_have_lanes_of_their_own(clock: DeviceClock) -> None:
    recorder = TraceRecorder([None, clock])
    begin_s = recorder._origin_s - FakeEvent.epoch_s + 0.5
    handle = FakeStepHandle(begin_s, begin_s + 0.009)
    stages = {"ffn": (1, 3), "attention": (2, 6)}
    timer = StageTimer(SimpleNamespace(run=None), FakeEvent)  # type: ignore[arg-type]
    for lane, times_ms in stages.items():
        begin, end = (FakeEvent(time_s=begin_s + ms / 1e3) for ms in times_ms)
        timer.stages.append(TimedStage(lane, 7, begin, end))  # type: ignore[arg-type]
    handle.stages = timer  # type: ignore[attr-defined]
    recorder.add_job(Job(DecodeShard(1, 4, (0,), 77), handle=handle), [])
    events_out = recorder.as_dict()["traceEvents"]
    found = {lane: spans(events_out, lane) for lane in ("ffn", "attention")}
    (ffn,), (attention,) = found["ffn"], found["attention"]
    assert (ffn["dur"], attention["dur"]) == (pytest.approx(2000, abs=2), pytest.approx(4000, abs=2))
    assert attention["ts"] - ffn["ts"] == pytest.approx(1000, abs=2) and ffn["args"] == {"layer": 7}
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events_out if e["name"] == "thread_name"}
    assert (named[3, ffn["tid"]], named[3, attention["tid"]]) == ("StageF", "StageA")
    assert sorted(named.values()).count("StageA") == 1, "a card whose steps had no stages has no lanes for them"


# -- what overlaps


def span(cat: str, begin_ms: float, end_ms: float, pid: int = 2) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "ts": begin_ms * 1e3, "dur": (end_ms - begin_ms) * 1e3, "pid": pid}


def test_overlap_of_hand_made_spans() -> None:
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "host"}},
        span("scheduler", 0, 1),
        span("decode", 5, 15, 3),
        span("decode", 15, 20, 3),
        span("decode", 30, 40, 3),
        span("prefill", 10, 12),
        span("prefill", 14, 32),
        span("prefill", 2, 4),
        span("copy", 11, 13),
        span("copy", 12, 16, 3),  # two at once count once
        span("copy", 39, 50),
        {"ph": "s", "cat": "request", "ts": 900_000.0, "pid": 2, "tid": 21, "id": 0, "name": "request 0"},
    ]
    expected = dict(wall_ms=50, prefill_ms=22, decode_ms=25, copies_ms=16, prefill_decode_ms=10)
    expected |= dict(copies_prefill_ms=3, copies_decode_ms=6, all_three_ms=3)
    for order in (events, events[::-1]):
        assert overlap_ms(order) == pytest.approx(expected)


def test_overlap_where_there_is_none() -> None:
    nothing = overlap_ms([])
    assert set(nothing.values()) == {0}
    touching = overlap_ms([span("prefill", 1, 2), span("decode", 2, 3), span("copy", 3, 4)])
    assert touching["prefill_decode_ms"] == touching["copies_decode_ms"] == touching["all_three_ms"] == 0
    assert touching["wall_ms"] == pytest.approx(3)


def test_the_tool_prints_a_table_and_one_json_object(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with llm.trace(tmp_path / "run.json"):
        run(llm)
    print_overlap([str(tmp_path / "run.json")])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert figures.pop("dropped_spans") == 0
    assert figures == pytest.approx(overlap_ms(load(tmp_path / "run.json")), abs=1e-5)
    assert len(lines) == len(figures) + 1 and Counter("%" in line for line in lines[:-1]) == {True: len(figures)}
    assert 0 < figures["decode_ms"] <= figures["wall_ms"]


def test_nothing_overlaps_without_overlap(tmp_path: Path) -> None:
    with make_llm(overlap=False) as llm, llm.trace(tmp_path / "run.json"):
        run(llm)
    figures = overlap_ms(load(tmp_path / "run.json"))
    assert figures["prefill_ms"] > 0 and figures["decode_ms"] > 0 and figures["copies_ms"] > 0
    assert figures["prefill_decode_ms"] == figures["copies_decode_ms"] == figures["copies_prefill_ms"] == 0


def test_lanes_of_a_picture() -> None:
    names = [("process_name", 2, None, "card 0"), ("process_name", 1, None, "host"), ("thread_name", 2, 21, "prefill")]
    names += [("thread_name", 1, 10, "scheduler"), ("thread_name", 2, 24, "copies to card 1")]
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": kind, "pid": pid, "args": {"name": name}} | ({} if tid is None else {"tid": tid})
        for kind, pid, tid, name in names
    ]
    for pid, tid, begin_us, us in ((2, 21, 9000, 500), (1, 10, 5000, 250), (2, 21, 6000, 2000), (2, 24, 7999, 1)):
        events.append({"ph": "X", "pid": pid, "tid": tid, "ts": begin_us, "dur": us})
    assert lanes_of(events, 0.0, 100.0) == {
        "host: scheduler": [(0.0, 0.25)],
        "card 0: prefill": [(1.0, 2.0), (4.0, 0.5)],
        "card 0: copies to card 1": [(2.999, 0.001)],
    }
    assert lanes_of(events, 1.0, 3.0) == {"card 0: prefill": [(1.0, 2.0)], "card 0: copies to card 1": [(2.999, 0.001)]}
    assert lanes_of(events, 2.0, 2.9) == {"card 0: prefill": [(1.0, 2.0)]}, "it runs then, though it began before"
    assert lanes_of(events, 5.0, 9.0) == {}
