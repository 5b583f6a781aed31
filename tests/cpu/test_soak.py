"""tools/soak.py: random requests and faults on CPU cards, exact accounting, the tokens of a run without faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
