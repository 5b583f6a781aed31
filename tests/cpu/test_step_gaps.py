"""Gaps between decode steps, as tools/step_gaps.py finds them in a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.step_gaps import Step, figures_of, main, steps_of

NAMES = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"card {pid - 2}"}} for pid in (2, 3)]


def span(name: str, begin_us: float, end_us: float, rows: int, pid: int = 3) -> dict[str, Any]:
    about = {"ph": "X", "name": name, "pid": pid, "ts": begin_us, "dur": end_us - begin_us}
    return about | {"args": {"rows": rows}}


TRACE = [
    *NAMES,
    span("decode", 1000, 2000, 7),
    span("prefill", 0, 9000, 3, pid=2),  # another card's
    span("copy", 0, 9000, 3),  # no step
    span("copy", 5020, 5900, 3),
    span("copy", 2001, 5900, 3, pid=2),  # another card's
    span("mixed", 2250, 5000, 7),
    span("decode", 5000, 6000, 8),
    span("prefill", 6500, 7000, 2),  # it has no decode rows
    span("decode", 7001, 8000, 8),  # so nobody waited for this one
]


def test_steps_of_one_card_that_follow_one_with_rows() -> None:
    assert steps_of(TRACE, 1) == [Step(7, 0.25, 3.0, False), Step(8, 0.0, 1.0, True, copy_began=True)]
    assert steps_of(reversed(TRACE), 1) == steps_of(TRACE, 1)
    assert steps_of(TRACE, 0) == []


def test_percentiles_and_maximum() -> None:
    steps = [Step(1, gap_ms, 2 * gap_ms, False) for gap_ms in range(101)]
    assert figures_of(steps) == {"steps": 101, "gap_ms": [50, 99, 100], "period_ms": [100, 198, 200]}


def test_groups_by_rows_and_by_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"traceEvents": TRACE}))
    main([str(path), "--rows", "1,8,9"])
    lines = capsys.readouterr().out.splitlines()
    counts = {name: group["steps"] for name, group in json.loads(lines[-1]).items()}
    changes = {"rows changed": 1, "rows as before": 1, "copy began": 1, "no copy began": 1}
    assert counts == {">= 1 rows": 2, ">= 8 rows": 1} | changes
    assert len(lines) == len(counts) + 2
