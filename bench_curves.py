"""Points of load as a table and as curves: latency against rate, a line a mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_report import Stats

LATENCIES = {
    "TTFT": ("ttft_ms", ("p50", "p90", "p99")),
    "TPOT": ("tpot_ms", ("p50", "p99")),
    "ITL": ("itl_ms", ("p50", "p90", "p99", "p99.9", "max")),
    "E2E": ("e2e_ms", ("p50", "p99")),
}
CURVES = (("ttft_ms", "p90", "P90 TTFT, ms"), ("itl_ms", "p99", "P99 ITL, ms"), ("e2e_ms", "p99", "P99 end to end, ms"))


# -- the table


def load_lines(figures: Stats) -> list[tuple[str, str]]:
    """(name, text) of every line: a row a point, its engines below, then the comparison."""
    columns = [header(), *(cells(point) for point in figures["points"])]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    rows = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in columns]
    lines = list(zip(["", *map(point_name, figures["points"])], rows, strict=True))
    lines += map(engine_line, figures["points"])
    lines += [turn_line(point) for point in figures["points"] if len(point["turns"]) > 1]
    if figures.get("capacity_per_s"):
        lines.append(("capacity", f"{figures['capacity_per_s']:.2f} requests/s of two replicas"))
    best = [(f"best {row['mode']} {row['rate']}", f"budget {row['budget']}") for row in figures.get("best", ())]
    title = [("ratios", "to two-replicas at their best budget (to the best of each figure under any budget)")]
    ratios = [ratio_line(row) for row in figures.get("ratios", ())]
    return lines + best + (title + ratios if ratios else [])


def point_name(point: Stats) -> str:
    return f"{point['mode']} @{point['budget']} {point['rate']}"


def header() -> list[str]:
    names = [f"{name} {'/'.join(keys).upper()} ms" for name, (_, keys) in LATENCIES.items()]
    return ["req/s", "out tok/s", *names, "good/s", "late max ms"]


def cells(point: Stats) -> list[str]:
    latencies = ["/".join(number(point[key][name]) for name in names) for key, names in LATENCIES.values()]
    throughput = [f"{point['requests_per_s']:.2f}", f"{point['output_tokens_per_s']:,.0f}"]
    return [*throughput, *latencies, number(point["good_per_s"]), number(point["late_ms"]["max"])]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def engine_line(point: Stats) -> tuple[str, str]:
    """What the cards and the copies of each engine did, and what they did to second tokens."""
    engines = " | ".join(map(engine_text, point["engines"]))
    names = {"exposed copy": "exposed_copy_ms", "second token": "second_token_ms"}
    parts = [
        f"{name} P50/P99 {number(point[key]['p50'])}/{number(point[key]['p99'])} ms" for name, key in names.items()
    ]
    return point_name(point), "; ".join([engines, *parts])


def engine_text(engine: Stats) -> str:
    busy = ", ".join(f"{steps['busy_share']:.0%}" for steps in engine["cards"])
    gaps = [steps["decode_gap_ms"]["max"] for steps in engine["cards"] if steps["decode_gap_ms"]]
    largest = max((gap for gap in gaps if gap is not None), default=None)
    copies = engine["copies"]
    rate = f" at {copies['gb_per_s']:.1f} GB/s" if copies["gb_per_s"] else ""
    bent = ", ".join(f"{name.replace('_', ' ')} {engine[name]}" for name in ("helped", "hand_offs", "taken_over"))
    moved = f"copied {copies['copied_bytes'] / 1e9:.2f} GB{rate}"
    return f"busy {busy}, {moved}, {bent}, decode gap max {number(largest)} ms"


def turn_line(point: Stats) -> tuple[str, str]:
    texts = [
        f"turn {turn['turn']}: {turn['cached_tokens'] / turn['prompt_tokens']:.0%} cached, TTFT P50/P99 "
        f"{number(turn['ttft_ms']['p50'])}/{number(turn['ttft_ms']['p99'])} ms"
        for turn in point["turns"]
    ]
    return f"{point_name(point)} turns", "; ".join(texts)


def ratio_line(row: Stats) -> tuple[str, str]:
    best, each = row["to_best"], row["to_best_of_each"]
    parts = [f"{name} {quotient(best[name])} ({quotient(each[name])})" for name in best]
    return f"{row['mode']} {row['rate']}", ", ".join(parts)


def quotient(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}x"


# -- the curves


def import_pyplot() -> Any:
    """`ValueError` if matplotlib is not installed: it is an extra."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install nanovllm[plot]") from None
    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as pyplot

    return pyplot


def plot(points: Sequence[Stats], path: Path) -> None:
    """Write a PNG: each latency of `CURVES` against the arrival rate, a line a mode. Infinite rates have no place."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(5 * len(CURVES), 4))
    for axis, (key, name, title) in zip(axes, CURVES, strict=True):
        for mode, line in curves(points, key, name).items():
            axis.plot(*zip(*line, strict=True), marker="o", label=mode)
        axis.set(xlabel="requests a second", ylabel=title, ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def curves(points: Sequence[Stats], key: str, name: str) -> dict[str, list[tuple[float, float]]]:
    """(rate, milliseconds) by mode, by rate; points at finite rates only."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        rate, latency = point["requested_per_s"], point[key][name]
        if rate is not None and latency is not None:
            lines.setdefault(point["mode"], []).append((rate, latency))
    return {mode: sorted(line) for mode, line in lines.items()}
