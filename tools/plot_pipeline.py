"""Step time against split, from what tools/bench_pipeline.py printed: a panel a case, a line a boundary.

    python tools/bench_pipeline.py --shape 8b | tee bench.txt
    python tools/plot_pipeline.py bench.txt pipeline.png        # needs matplotlib

Also drawn: the sequential step with its spread, and, dotted, each lane of the "core" boundary by itself on its SMs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_curves import import_pyplot

Point = tuple[int, float]  # (SMs of attention, ms)
ALONE = {"attention_alone_ms": "attention alone on its SMs", "ffn_alone_ms": "products alone on theirs"}


def lines_of(case: dict[str, Any]) -> dict[str, list[Point]]:
    """The measured splits of each boundary, and each lane of "core" alone; by attention's SMs."""
    lines: dict[str, list[Point]] = {}
    for row in case["ways"]:
        split, _, boundary = row["way"].partition(" ")
        if "ms" not in row or ":" not in split:
            continue
        attention_sms = int(split.partition(":")[0])
        lines.setdefault(boundary, []).append((attention_sms, row["ms"]))
        for key in (key for key in ALONE if key in row and boundary == "core"):
            lines.setdefault(ALONE[key], []).append((attention_sms, row[key]))
    return {name: sorted(points) for name, points in lines.items()}


def split_labels(case: dict[str, Any]) -> dict[int, str]:
    """Every split that was asked for, as "attention:FFN", by attention's SMs."""
    splits = [row["way"].partition(" ")[0] for row in case["ways"]]
    return {int(split.partition(":")[0]): split for split in splits if ":" in split}


def plot(figures: dict[str, Any], path: Path) -> None:
    """Write the picture."""
    pyplot = import_pyplot()
    cases = figures["cases"]
    figure, panels = pyplot.subplots(1, len(cases), figsize=(5.5 * len(cases), 4.2), squeeze=False)
    figure.suptitle(f"Decode step in two lanes, Qwen3-{figures['shape'].upper()}, {figures['device']}")
    for panel, case in zip(panels[0], cases, strict=True):
        draw_case(panel, case)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def draw_case(panel: Any, case: dict[str, Any]) -> None:
    """The panel of one case."""
    for name, points in lines_of(case).items():
        alone = name in ALONE.values()
        style = {"linestyle": ":", "marker": "."} if alone else {"marker": "o", "linewidth": 2}
        panel.plot(*zip(*points, strict=True), label=name if alone else f'both lanes, boundary "{name}"', **style)
    panel.axhline(case["sequential"]["ms"], color="black", label="sequential, with its spread")
    panel.axhspan(*case["sequential"]["spread_ms"], color="black", alpha=0.12)
    batch, context = case["case"].split("x")
    panel.set(title=f"{batch} rows of {context} tokens", xlabel="SMs of attention : products", ylabel="ms a step")
    labels = split_labels(case)
    panel.set_xticks(list(labels), labels.values())
    panel.set_ylim(bottom=0)
    panel.legend(fontsize="small", loc="lower left")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("printed", type=Path, help="the bench's output")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args(argv)
    plot(json.loads(args.printed.read_text().splitlines()[-1]), args.picture)


if __name__ == "__main__":
    main()
