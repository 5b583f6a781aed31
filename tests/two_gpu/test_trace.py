"""A trace of two real cards under load: every lane is used, and both cards and the copies work at the same time."""

from __future__ import annotations

import json
import random
from collections import deque
from pathlib import Path

from bench import write_shape
from nanovllm import LLM, SamplingParams
from tests.random_work import check_nothing_left
from tools.trace_overlap import overlap_ms, report_lines

NUM_PROMPTS = 128
NUM_FIRST = 32  # the others arrive while these are answered, a few a step
ARRIVALS_PER_STEP = 2
SLACK_US = 50  # between events of different streams, and of cards whose clocks were read one after the other


def run(llm: LLM) -> None:
    """Prompts of 512 … 2048 tokens that keep arriving while earlier ones are decoded."""
    rng = random.Random(0)
    prompts = deque([rng.randrange(10_000) for _ in range(rng.randint(512, 2048))] for _ in range(NUM_PROMPTS))
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=160)
    for _ in range(NUM_FIRST):
        llm.add_request(prompts.popleft(), params)
    while llm.step():
        for _ in range(min(ARRIVALS_PER_STEP, len(prompts))):
            llm.add_request(prompts.popleft(), params)
    assert not prompts


def test_prefill_copies_and_decode_overlap(tmp_path: Path) -> None:
    folder = write_shape(tmp_path, "0.6b")
    options = dict(max_model_len=4096, max_num_seqs=NUM_PROMPTS, num_kvcache_blocks=4800, enable_two_gpu_pd=True)
    options["pd_roles"] = "strict"  # a lane of one kind of step for each card
    with LLM(folder, device="cuda", load_format="dummy", **options) as llm:
        llm.generate([[1] * 600], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
        check_nothing_left(llm)
        before = llm.stats()
        with llm.trace(tmp_path / "run.json"):
            run(llm)
            check_nothing_left(llm)
        after = llm.stats()
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    figures = overlap_ms(events)
    print("\n".join(report_lines(figures)))
    print(json.dumps(figures))

    lanes = [(span["cat"], span["pid"] - 2) for span in spans]
    assert set(lanes) == {("scheduler", -1), ("prefill", 0), ("copy", 0), ("decode", 1), ("copy", 1)}
    for lane, card in (("prefill", 0), ("decode", 1)):
        steps = f"{lane}_steps"
        assert lanes.count((lane, card)) == after[f"card{card}"][steps] - before[f"card{card}"][steps]
    assert lanes.count(("copy", 0)) + lanes.count(("copy", 1)) == after["copies"] - before["copies"]
    check_order(spans)
    check_flows(events)
    assert figures["prefill_decode_ms"] > 0 and figures["copies_decode_ms"] > 0, figures


def check_order(spans: list[dict]) -> None:
    """A card runs one step at a time, and its copies come behind the steps that they follow."""
    for lane, card in (("prefill", 0), ("decode", 1)):
        steps = sorted((s for s in spans if s["cat"] == lane), key=lambda s: s["args"]["step"])
        ends = {s["args"]["step"]: s["ts"] + s["dur"] for s in steps}
        for one, next_one in zip(steps, steps[1:], strict=False):
            assert one["ts"] + one["dur"] <= next_one["ts"] + SLACK_US, (one, next_one)
        for copy in (s for s in spans if s["cat"] == "copy" and s["pid"] - 2 == card):
            assert copy["ts"] + SLACK_US >= ends.get(copy["args"]["after_step"], 0), copy


def check_flows(events: list[dict]) -> None:
    """Each request's arrow goes forward, from one card to the other."""
    flows: dict[int, list[dict]] = {}
    for event in events:
        if event.get("cat") == "request":
            flows.setdefault(event["id"], []).append(event)
    assert len(flows) == NUM_PROMPTS
    for flow in flows.values():
        assert [(e["ph"], e["pid"] - 2) for e in flow] == [("s", 0), ("t", 0), ("f", 1)]
        chunk, copy, decode = (e["ts"] for e in flow)
        assert chunk < copy + SLACK_US and copy < decode + SLACK_US, flow
