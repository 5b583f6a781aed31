"""How long prefill, decode and copies were busy in a trace of `llm.trace`, and how much of that at the same time.

    python tools/trace_overlap.py run.json

Over all cards together: a moment counts as prefill if any card prefills then. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Intervals = list[tuple[float, float]]  # disjoint, ascending


def overlap_ms(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds from a trace's `traceEvents`: each kind's busy time (the union of its spans), that of each pair and
    of all three at once, and `wall`: from the first span's begin to the last one's end, the host's included.
    """
    spans = [event for event in events if event["ph"] == "X"]
    prefill, decode, copies = (busy(spans, kind) for kind in ("prefill", "decode", "copy"))
    everything = busy(spans, None)
    copies_and_decode = common(copies, decode)
    return {
        "wall_ms": everything[-1][1] - everything[0][0] if everything else 0.0,
        "prefill_ms": length(prefill),
        "decode_ms": length(decode),
        "copies_ms": length(copies),
        "prefill_decode_ms": length(common(prefill, decode)),
        "copies_prefill_ms": length(common(copies, prefill)),
        "copies_decode_ms": length(copies_and_decode),
        "all_three_ms": length(common(copies_and_decode, prefill)),
    }


def busy(spans: Iterable[Mapping[str, Any]], kind: str | None) -> Intervals:
    """When at least one span of `kind` (None: of any) ran, in ms."""
    pieces = sorted((s["ts"] / 1e3, (s["ts"] + s["dur"]) / 1e3) for s in spans if kind is None or s["cat"] == kind)
    union: Intervals = []
    for begin, end in pieces:
        if union and begin <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((begin, end))
    return union


def common(left: Intervals, right: Intervals) -> Intervals:
    """When both ran."""
    both: Intervals = []
    i = j = 0
    while i < len(left) and j < len(right):
        begin, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if begin < end:
            both.append((begin, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return both


def length(intervals: Intervals) -> float:
    return sum(end - begin for begin, end in intervals)


def report_lines(figures: Mapping[str, float]) -> list[str]:
    """A line each, with its share of the wall time."""
    wall_ms = figures["wall_ms"]
    titles = {
        "wall_ms": "wall",
        "prefill_ms": "prefill",
        "decode_ms": "decode",
        "copies_ms": "copies",
        "prefill_decode_ms": "prefill and decode",
        "copies_prefill_ms": "copies and prefill",
        "copies_decode_ms": "copies and decode",
        "all_three_ms": "all three",
    }
    return [f"{titles[key]:<20}{ms:12.3f} ms {ms / wall_ms if wall_ms else 0:7.1%}" for key, ms in figures.items()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what llm.trace has written")
    trace = json.loads(parser.parse_args(argv).file.read_text())
    figures = overlap_ms(trace["traceEvents"]) | {"dropped_spans": trace["otherData"]["dropped_spans"]}
    print("\n".join(report_lines({key: ms for key, ms in figures.items() if key.endswith("_ms")})))
    print(json.dumps({key: round(value, 6) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
