"""tools/soak.py: random requests and faults on CPU cards, exact accounting, the tokens of a run without faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm import DEMO_MODEL, SamplingParams
from tests.regret import FLOAT32
from tools import soak as soak_tool

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
    regrets = soak_tool.regrets_of(model, kinds, [(i, answer) for i, answer in enumerate(answers)] * 3)
    assert len(regrets.rows) == 2 and len(regrets.check(FLOAT32).rows[0]) == len(answers[0][0][0])
    for number in (0, 2):
        tokens, reason = answers[number][0]
        wrong = [(number, [([*tokens[:-1], tokens[-1] + 1], reason)])]
        with pytest.raises(AssertionError, match="beyond Bounds"):
            soak_tool.regrets_of(model, kinds, wrong).check(FLOAT32)
