"""A picture of a trace of `llm.trace`: a row a lane, cards one below the other, time to the right.

    python tools/plot_trace.py run.json trace.png --from-ms 200 --to-ms 400        # needs matplotlib

ui.perfetto.dev shows the same file with numbers, and requests as arrows between the lanes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_curves import import_pyplot

Event = Mapping[str, Any]
Lanes = dict[str, list[tuple[float, float]]]  # (begin, length) in ms, by name, from the top
COLOURS = {
    "prefill": "tab:orange",
    "decode": "tab:blue",
    "mixed": "tab:purple",
    "copies": "tab:green",
    "StageA": "tab:red",
    "StageF": "tab:cyan",
}


def lanes_of(events: Iterable[Event], from_ms: float, to_ms: float) -> Lanes:
    """Spans that reach into the window, by lane, in the trace's order; lanes without any are left out. Times count from
    the trace's first span."""
    events = list(events)
    names = {(e["pid"], e.get("tid"), e["name"]): e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = sorted((e for e in events if e["ph"] == "X"), key=lambda e: (e["pid"], e["tid"], e["ts"]))
    zero = min((e["ts"] for e in spans), default=0.0)
    lanes: Lanes = {}
    for e in spans:
        begin_ms = (e["ts"] - zero) / 1e3
        if begin_ms < to_ms and begin_ms + e["dur"] / 1e3 > from_ms:
            process, lane = names[e["pid"], None, "process_name"], names[e["pid"], e["tid"], "thread_name"]
            lanes.setdefault(f"{process}: {lane}", []).append((begin_ms, e["dur"] / 1e3))
    return lanes


def plot(lanes: Lanes, path: Path, from_ms: float, to_ms: float) -> None:
    """Write the picture of the window."""
    pyplot = import_pyplot()
    figure, panel = pyplot.subplots(figsize=(11, 0.6 + 0.45 * len(lanes)))
    for row, (name, spans) in enumerate(lanes.items()):
        kind = name.partition(": ")[2].partition(" ")[0]
        panel.broken_barh(
            spans, (row - 0.4, 0.8), facecolors=COLOURS.get(kind, "tab:gray"), edgecolor="white", linewidth=0.3
        )
    panel.set_yticks(range(len(lanes)), lanes)
    panel.invert_yaxis()
    panel.set_xlim(from_ms, min(to_ms, panel.get_xlim()[1]))
    panel.set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--from-ms", type=float, default=0.0)
    parser.add_argument("--to-ms", type=float, default=float("inf"))
    args = parser.parse_args(argv)
    lanes = lanes_of(json.loads(args.trace.read_text())["traceEvents"], args.from_ms, args.to_ms)
    if not lanes:
        parser.error(f"nothing in {args.trace} ran between {args.from_ms} and {args.to_ms} ms")
    plot(lanes, args.picture, args.from_ms, args.to_ms)


if __name__ == "__main__":
    main()
