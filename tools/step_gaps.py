"""Gaps between a card's decode steps, and times from end to end of them, in a trace of `llm.trace`: by decode rows, by
whether rows changed, and by whether a copy that leaves the card began in the gap or near it.

    python tools/profile_host.py --shape 8b --pd-roles strict --num-prompts 1400 --input-len 512 --output-len 288 \\
        --repeats 1 --trace run.json
    python tools/step_gaps.py run.json --card 1 --rows 1,400,480,500

Counted are steps that follow one with rows; a gap ends where the step's own kernels begin, so that what the step's
changes take on the card is part of it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_metrics import percentile

STEPS = ("prefill", "decode", "mixed")
NEAR_US = 60  # ahead of a gap and behind it, in which a copy that begins may have to do with it


class Step(NamedTuple):
    """A step with decode rows behind another one: milliseconds from that one's end to this one's begin, and to its end.

    `changed`: whether it has other rows, by number, than the step before. `copy_began`: in the gap, or near it.
    """

    rows: int
    gap_ms: float
    period_ms: float
    changed: bool
    copy_began: bool = False


def steps_of(events: Iterable[Mapping[str, Any]], card: int) -> list[Step]:
    """From a trace's `traceEvents`."""
    events = list(events)
    processes = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    of_card = [e for e in events if e["ph"] == "X" and processes[e["pid"]] == f"card {card}"]
    copies_us = [e["ts"] for e in of_card if e["name"] == "copy"]
    spans = sorted((e for e in of_card if e["name"] in STEPS), key=lambda span: span["ts"])
    found = []
    for before, span in zip(spans, spans[1:], strict=False):
        rows, rows_before = decode_rows(span), decode_rows(before)
        end = before["ts"] + before["dur"]
        if rows and rows_before:
            times = (span["ts"] - end) / 1e3, (span["ts"] + span["dur"] - end) / 1e3
            copy_began = any(end - NEAR_US < begin_us < span["ts"] + NEAR_US for begin_us in copies_us)
            found.append(Step(rows, *times, rows != rows_before, copy_began))
    return found


def decode_rows(span: Mapping[str, Any]) -> int:
    return 0 if span["name"] == "prefill" else span["args"]["rows"]


def figures_of(steps: Sequence[Step]) -> dict[str, Any]:
    """How many steps; P50, P99 and maximum of both times, milliseconds."""
    figures: dict[str, Any] = {"steps": len(steps)}
    for name in ("gap_ms", "period_ms"):
        ordered = sorted(getattr(step, name) for step in steps)
        figures[name] = [percentile(ordered, share) for share in (50, 99, 100)]
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what llm.trace has written")
    parser.add_argument("--card", type=int, default=1)
    parser.add_argument("--rows", default="1", help="least decode rows of a step, several with commas")
    args = parser.parse_args(argv)
    steps = steps_of(json.loads(args.file.read_text())["traceEvents"], args.card)
    groups = {f">= {least} rows": [s for s in steps if s.rows >= int(least)] for least in args.rows.split(",")}
    groups["rows changed"] = [step for step in steps if step.changed]
    groups["rows as before"] = [step for step in steps if not step.changed]
    groups["copy began"] = [step for step in steps if step.copy_began]
    groups["no copy began"] = [step for step in steps if not step.copy_began]
    table = {name: figures_of(group) for name, group in groups.items() if group}
    print(f"{'card ' + str(args.card):<16}{'steps':>7}{'gap P50, P99, max ms':>28}{'end to end P50, P99, max ms':>32}")
    for name, figures in table.items():
        gaps, periods = (" ".join(f"{ms:8.3f}" for ms in figures[kind]) for kind in ("gap_ms", "period_ms"))
        print(f"{name:<16}{figures['steps']:>7}{gaps:>28}{periods:>32}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
