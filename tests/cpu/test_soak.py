"""tools/soak.py: random requests and faults on CPU cards, exact accounting, the tokens of a run without faults."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import DEMO_MODEL, SamplingParams
from tests.regret import FLOAT32
from tools import soak as soak_tool
from tools import timetable
from tools.timetable import Timetable

ROOT = Path(__file__).parents[2]


def soak(*words: str, timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.soak", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def check(figures: dict[str, Any], num_requests: int) -> None:
    totals = figures["totals"]
    assert totals["requests"] == num_requests and figures["answers_different"] == 0 < figures["answers_equal"]
    assert sum(totals.get(end, 0) for end in ("by itself", "abort", "error", "engine dead")) == num_requests


def test_a_short_soak() -> None:
    check(soak("--requests", "100", timeout_s=240), 100)


@pytest.mark.slow
def test_ten_thousand_requests() -> None:
    figures = soak("--requests", "10000", timeout_s=1700)
    check(figures, 10_000)
    met = ("copy failed", "copy late", "copy damaged", "card lost", "context lost", "consumer gone", "mistake refused")
    met += ("errors: tokenizer", "errors: logits", "errors: copy", "prefilled_again", "copy_retries", "evacuations")
    missing = [name for name in met if not figures["totals"].get(name)]
    assert not missing, figures["totals"]


def test_answers_by_regret() -> None:
    """Of a soak in bfloat16: the right ones pass, and each of two that have one wrong token is found."""
    kinds = [soak_tool.Kind([5, 6, 7 + i], SamplingParams(temperature=i % 2, max_tokens=6, seed=1)) for i in range(4)]
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "enable_prefix_caching": False}
    answers, model = soak_tool.reference_of(DEMO_MODEL, options, kinds, by_regret=True)
    assert model is not None
    checker = soak_tool.Checker(model, kinds)
    for _ in range(2):  # a life that gives no new answer adds nothing
        regrets = checker.add([(i, answer) for i, answer in enumerate(answers)] * 3)
        assert len(regrets.rows) == 2 and len(regrets.check(FLOAT32).rows[0]) == len(answers[0][0][0])
    cut_off = [(number, [(answers[number][0][0][:3], "abort")]) for number in (0, 2)]
    assert len(checker.add(cut_off).rows) == 2
    for number in (0, 2):
        tokens, reason = answers[number][0]
        wrong = [(number, [([*tokens[:-1], tokens[-1] + 1], reason)])]
        with pytest.raises(AssertionError, match="beyond Bounds"):
            soak_tool.Checker(model, kinds).add(wrong).check(FLOAT32)
        with pytest.raises(AssertionError, match="beyond Bounds"):
            checker.add(wrong).check(FLOAT32)


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class FakeReference:
    """Every regret is 0 and takes a tenth of a second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def regret(self, prompt: list[int], answer: tuple[int, ...]) -> Tensor:
        self._clock.now_s += 0.1
        return torch.zeros(len(answer))


@pytest.mark.parametrize("dies_early", [False, True])
@pytest.mark.parametrize("minutes", [1.0, 3.0, 9.5])
def test_minutes_are_for_everything(
    minutes: float, dies_early: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a clock of our own: lives end so early that their regrets fit in, and after each the figures are printed."""
    clock, begun = Clock(), []

    def live(args: Any, folder: str, kinds: Any, number: int, left: int, table: Timetable) -> Any:
        begun.append(clock.now_s)
        clock.now_s += 12.0  # an engine's start
        asks_s = (table.until_s() - clock.now_s) / (2 if dies_early and number == 3 else 1)
        assert asks_s > 0
        clock.now_s += asks_s + 0.3
        asked_s = clock.now_s
        clock.now_s += 1.0 + number % 2  # what is left, and closing
        answer = [([number, token], "stop") for token in range(int(asks_s))]
        life = SimpleNamespace(asked_s=asked_s, answers=[(0, [one]) for one in answer])
        return life, Counter({"requests": 7})

    monkeypatch.setattr(soak_tool, "time", clock)
    monkeypatch.setattr(timetable, "time", clock)
    monkeypatch.setattr(soak_tool, "live", live)
    monkeypatch.setattr(soak_tool, "reference_of", lambda *_: (reference, FakeReference(clock)))
    monkeypatch.setattr(soak_tool, "break_tokenizers", lambda: None)
    greedy = soak_tool.Kind([1], SamplingParams(temperature=0))
    monkeypatch.setattr(soak_tool, "make_kinds", lambda *_: [greedy])
    reference: list[soak_tool.Answer] = [[([0, 0], "stop")]]
    args = Namespace(minutes=minutes, requests=10**9, shape="0.6b", seed=0, faults=0.02, two_gpus=False)
    started_s = clock.now_s
    clock.now_s += 20.0  # the run without faults
    figures = soak_tool.soak(args, "", started_s)
    assert clock.now_s - started_s <= 60 * minutes
    assert clock.now_s - started_s > 0.8 * 60 * minutes
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line.get("lives", 0) for line in printed] == list(range(len(begun) + 1)) and printed[-1] == figures
    assert len(begun) >= (4 if minutes > 1 else 1) and figures["totals"]["requests"] == 7 * len(begun)
