"""One card, two independent replicas and two cards of one engine, one after the other under the same load.

    python bench.py --shape 8b --compare one,two-replicas,pd --request-rate inf,0.5x,0.7x,0.9x

Every mode runs in fresh processes (bench_replicas.py), is sent the same prompts at the same times, and ends before the
next begins. One card can be run with small steps or large ones: its modes are measured under each token budget, and
the best counts. So that two replicas are as good as a user could have made them, which is best is asked anew at each
rate:

- all at once: the one with the most output tokens a second;
- at a finite rate: the one with the lowest P99 ITL among those whose P90 TTFT is within `TTFT_SLACK` of the lowest.

Small budgets win the one latency and lose the other. For the strictest reading ratios are also given to the best of
each figure, whichever budget it comes from: no single budget has them all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench_curves import cells, header, point_name
from bench_load import Load, Target, measure
from bench_replicas import Replicas
from bench_report import Stats
from bench_workloads import Rate

BASELINE = "two-replicas"
LEND_SMS = (60, 72)  # of decode steps and of prompts, where no others are asked for
TWO_CARDS: dict[str, dict[str, Any]] = {
    "pd": {"pd_roles": "elastic"},
    "pd-strict": {"pd_roles": "strict"},
    "pd-lending": {"pd_roles": "elastic", "lend_sms": LEND_SMS},
}
MODES = ("one", BASELINE, *TWO_CARDS)
TTFT_SLACK = 1.2  # what another mode's TTFT may be of the baseline's, too
ALL_AT_ONCE = Rate.parse("inf")


@dataclass(frozen=True)
class Comparison:
    """What to compare. `options`: keywords of `LLM` for every mode, but `lend_sms` is "pd-lending"'s alone; one-card
    modes take `max_num_batched_tokens` from `budgets`. `device_ids`: the two cards. `warm_up_tokens`: of a prompt;
    None: no warm-up.
    """

    folder: str
    options: dict[str, Any]
    device_ids: tuple[int, int]
    modes: Sequence[str]
    budgets: Sequence[int]
    rates: Sequence[Rate]
    load: Load
    warm_up_tokens: int | None = None

    def engines(self, mode: str, budget: int | None) -> list[dict[str, Any]]:
        """Keywords of each engine of a mode."""
        first, second = self.device_ids
        options = {name: value for name, value in self.options.items() if name != "lend_sms"}
        if mode in TWO_CARDS:
            cards = {"enable_two_gpu_pd": True, "prefill_device_id": first, "decode_device_id": second}
            asked = {name: self.options.get(name, value) for name, value in TWO_CARDS[mode].items()}
            return [options | cards | asked]
        single = options | {"enable_two_gpu_pd": False, "max_num_batched_tokens": budget}
        single["enable_decode_pipeline"] = False  # it divides a card that only decodes
        ids = (first, second) if mode == BASELINE else (first,)
        return [single | {"prefill_device_id": card} for card in ids]

    def budgets_of(self, mode: str) -> Sequence[int | None]:
        return (None,) if mode in TWO_CARDS else self.budgets


def compare(plan: Comparison) -> Stats:
    """All points, the best of each mode and rate, and what they are to the replicas'."""
    figures: Stats = {"capacity_per_s": None, "points": [], "about": {}}
    if any(rate.is_share for rate in plan.rates):
        run_mode(plan, BASELINE, [ALL_AT_ONCE], figures)
        figures["capacity_per_s"] = best_of(figures["points"])["requests_per_s"]
    for mode in plan.modes:
        run_mode(plan, mode, plan.rates, figures)
    points = figures["points"]
    best = [{"mode": p["mode"], "rate": p["rate"], "budget": p["budget"]} | judged(p) for p in best_points(points)]
    return figures | {"best": best, "ratios": ratios(points)}


def run_mode(plan: Comparison, mode: str, rates: Sequence[Rate], figures: Stats) -> None:
    """Add this mode's points at every budget, but for those that are there already."""
    for budget in plan.budgets_of(mode):
        points = [point for point in figures["points"] if point["mode"] == mode and budget in (None, point["budget"])]
        missing = [rate for rate in rates if rate.label not in {point["rate"] for point in points}]
        if not missing:
            continue
        with Replicas(plan.folder, plan.engines(mode, budget), plan.warm_up_tokens) as target:
            for rate in missing:
                requests_per_s = rate.requests_per_s(figures["capacity_per_s"])
                add_point(figures, mode, target, measure(target, plan.load, rate, requests_per_s))


def add_point(figures: Stats, mode: str, target: Target, measured: Stats) -> None:
    """`budget` is what the engines have, asked for or not; what else they are goes to "about", once."""
    budget = target.about[0]["config"]["max_num_batched_tokens"]
    figures["points"].append({"mode": mode, "budget": budget} | measured)
    figures["about"][f"{mode} @{budget}"] = target.about
    show_progress(figures["points"][-1])


def show_progress(point: Stats) -> None:
    """On stderr: a comparison takes minutes."""
    named = zip(header(), cells(point), strict=True)
    print(f"{point_name(point)}:", ", ".join(f"{name} {text}" for name, text in named), file=sys.stderr, flush=True)


# -- the best


def best_of(points: Sequence[Stats]) -> Stats:
    """Of one mode's points at one rate, under different budgets; see the top of this file."""
    if points[0]["requested_per_s"] is None:
        return max(points, key=lambda point: point["output_tokens_per_s"])
    quickest_ms = min(point["ttft_ms"]["p90"] for point in points)
    prompt = [point for point in points if point["ttft_ms"]["p90"] <= TTFT_SLACK * quickest_ms]
    return min(prompt, key=lambda point: point["itl_ms"]["p99"] or 0.0)


def best_points(points: Sequence[Stats]) -> list[Stats]:
    """The best point of each mode and rate, in the order in which they were measured."""
    groups: dict[tuple[str, str], list[Stats]] = {}
    for point in points:
        groups.setdefault((point["mode"], point["rate"]), []).append(point)
    return [best_of(group) for group in groups.values()]


def judged(point: Stats) -> dict[str, float | None]:
    """The figures by which modes are compared."""
    return {
        "output_tokens_per_s": point["output_tokens_per_s"],
        "itl_p99_ms": point["itl_ms"]["p99"],
        "ttft_p90_ms": point["ttft_ms"]["p90"],
    }


def ratios(points: Sequence[Stats]) -> list[Stats]:
    """Each mode's best point over the baseline's at that rate: over its best one, and over the best of each figure."""
    rows = []
    for point in best_points(points):
        theirs = [other for other in points if (other["mode"], other["rate"]) == (BASELINE, point["rate"])]
        if theirs and point["mode"] != BASELINE:
            to_best, to_each = over(judged(point), judged(best_of(theirs))), over(judged(point), best_of_each(theirs))
            rows.append({"mode": point["mode"], "rate": point["rate"], "to_best": to_best, "to_best_of_each": to_each})
    return rows


def best_of_each(points: Sequence[Stats]) -> dict[str, float | None]:
    """The most tokens a second and the lowest latencies, each from whichever budget has it."""
    columns: dict[str, list[float]] = {name: [] for name in judged(points[0])}
    for point in points:
        for name, value in judged(point).items():
            columns[name] += [] if value is None else [value]
    best = {name: max if name == "output_tokens_per_s" else min for name in columns}
    return {name: best[name](values) if values else None for name, values in columns.items()}


def over(ours: dict[str, float | None], theirs: dict[str, float | None]) -> dict[str, float | None]:
    """Quotients by figure; None where one is missing or theirs is 0."""
    pairs = {name: (ours[name], theirs[name]) for name in ours}
    return {name: round(a / b, 4) if a is not None and b else None for name, (a, b) in pairs.items()}
