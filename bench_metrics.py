"""What each request went through, as figures: the definitions of `vllm bench serve`
(https://docs.vllm.ai/en/latest/benchmarking/cli), in milliseconds.

- TTFT: from a request's arrival to its first token. The arrival is the time it was scheduled for, so that a late
  submission counts against the engine.
- ITL: every gap between two consecutive tokens of an answer, of all answers together.
- TPOT: (end to end - TTFT) / (tokens - 1), for answers of at least two tokens.
- E2E: from the arrival to the last token.
- Goodput: requests a second that meet every bound given; the TPOT of a single token counts as 0.
- Throughput: over the time from the begin of the schedule to the last token.

A token's time is when the engine took it from the card, not when somebody read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench_report import Stats, copy_figures, steps_of

PERCENTILES = (50, 90, 99)


class Answer(NamedTuple):
    """What came back. Seconds; `ttft_s` counts from the scheduled arrival, `late_s` is the submitter's part of it."""

    arrival_s: float
    conversation: int
    turn: int
    num_prompt_tokens: int
    num_cached_tokens: int
    token_ids: list[int]
    late_s: float
    ttft_s: float
    gaps_s: tuple[float, ...]
    copy_s: float | None

    @property
    def e2e_s(self) -> float:
        return self.ttft_s + sum(self.gaps_s)

    @property
    def tpot_s(self) -> float | None:
        return sum(self.gaps_s) / len(self.gaps_s) if self.gaps_s else None


def load_figures(answers: Sequence[Answer], begin_s: float, goodput: Mapping[str, float]) -> Stats:
    """Every figure of one load that the answers alone give."""
    seconds = max(answer.arrival_s + answer.e2e_s for answer in answers) - begin_s
    num_output = sum(len(answer.token_ids) for answer in answers)
    num_good = sum(is_good(answer, goodput) for answer in answers)
    return {
        "seconds": round(seconds, 4),
        "num_requests": len(answers),
        "requests_per_s": round(len(answers) / seconds, 4),
        "output_tokens_per_s": round(num_output / seconds, 2),
        "good_per_s": round(num_good / seconds, 4) if goodput else None,
        "good_share": round(num_good / len(answers), 4) if goodput else None,
        **latencies(answers),
        "late_ms": summary_ms([answer.late_s for answer in answers]),
        "prompt_tokens": sum(answer.num_prompt_tokens for answer in answers),
        "cached_tokens": sum(answer.num_cached_tokens for answer in answers),
        "output_tokens": num_output,
        "turns": [turn_figures(turn, answers) for turn in sorted({answer.turn for answer in answers})],
    }


def latencies(answers: Sequence[Answer]) -> Stats:
    """Milliseconds. `second_token_ms`: from the first token to the second. `exposed_copy_ms`: from the end of prefill
    until the decode card held every block, by the engine thread's clock; of prompts that changed cards."""
    return {
        "ttft_ms": summary_ms([answer.ttft_s for answer in answers]),
        "tpot_ms": summary_ms([answer.tpot_s for answer in answers if answer.tpot_s is not None]),
        "itl_ms": summary_ms([gap for answer in answers for gap in answer.gaps_s], (*PERCENTILES, 99.9)),
        "e2e_ms": summary_ms([answer.e2e_s for answer in answers]),
        "second_token_ms": summary_ms([answer.gaps_s[0] for answer in answers if answer.gaps_s]),
        "exposed_copy_ms": summary_ms([answer.copy_s for answer in answers if answer.copy_s is not None]),
    }


def turn_figures(turn: int, answers: Sequence[Answer]) -> Stats:
    """How much of a turn's prompts was found in the prefix cache, and what that did to its TTFT."""
    of_turn = [answer for answer in answers if answer.turn == turn]
    return {
        "turn": turn,
        "prompt_tokens": sum(answer.num_prompt_tokens for answer in of_turn),
        "cached_tokens": sum(answer.num_cached_tokens for answer in of_turn),
        "ttft_ms": summary_ms([answer.ttft_s for answer in of_turn]),
    }


def is_good(answer: Answer, bounds_ms: Mapping[str, float]) -> bool:
    """Whether an answer kept every bound: "ttft", "tpot" and "e2e", in milliseconds."""
    took_s = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2e": answer.e2e_s}
    return all(took_s[name] * 1e3 <= bound for name, bound in bounds_ms.items())


def parse_bound(text: str) -> tuple[str, float]:
    """\"ttft:200\" → ("ttft", 200.0), in milliseconds."""
    name, _, number = text.partition(":")
    try:
        bound = float(number)
    except ValueError:
        bound = -1.0
    if name not in ("ttft", "tpot", "e2e") or not bound > 0:
        raise ValueError(f"{text!r} is not ttft:MS, tpot:MS or e2e:MS")
    return name, bound


def summary_ms(seconds: Sequence[float], percentiles: Sequence[float] = PERCENTILES) -> dict[str, float | None]:
    """Mean, percentiles and maximum in milliseconds; None without any."""
    ordered = sorted(seconds)
    figures = {"mean": sum(ordered) / len(ordered) if ordered else None}
    figures |= {f"p{p:g}": percentile(ordered, p) for p in percentiles} | {"max": ordered[-1] if ordered else None}
    return {name: None if value is None else round(value * 1e3, 3) for name, value in figures.items()}


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Of sorted samples, interpolated linearly between two neighbours, as numpy does; None without any."""
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    below = ordered[int(place)]
    above = ordered[min(int(place) + 1, len(ordered) - 1)]
    return below + (above - below) * (place - int(place))


# -- the engine's part, from two of its statistics


def engine_figures(before: Stats, after: Stats, seconds: float) -> Stats:
    """Each card's steps and busy share, copies, what did not fit, how roles bent; histograms where it has any."""
    keys = sorted(name for name in after if name.startswith("card") and "decode_steps" in after[name])
    cards = [steps_of(before[name], after[name], seconds) for name in keys]
    for name, card in zip(keys, cards, strict=True):
        for histogram in ("decode_gap_ms", "decode_period_ms"):
            card[histogram] = histogram_growth(before[name].get(histogram), after[name].get(histogram))
    names = ("evacuations", "recomputes", "pauses", "write_backs", "helped", "hand_offs", "taken_over")
    counts = {name: after[name] - before[name] for name in names}
    return {"cards": cards, "copies": copy_figures(before, after)} | counts


def histogram_growth(before: Stats | None, after: Stats | None) -> Stats | None:
    """P50, P99 and maximum of what a histogram counted in between, each as the upper bound of its bucket.

    A histogram is {"upper": [u0, u1, …], "counts": [c0, c1, …]}: c_i since the start in (u_(i-1), u_i]. None if the
    engine keeps none, or counted nothing.
    """
    if before is None or after is None:
        return None
    counts = [new - old for old, new in zip(before["counts"], after["counts"], strict=True)]
    values = [upper for upper, count in zip(after["upper"], counts, strict=True) if count]
    if not values:
        return None
    percentiles = {f"p{p}": finite(bucket_of(p, after["upper"], counts)) for p in (50, 99)}
    return {"count": sum(counts)} | percentiles | {"max": finite(values[-1])}


def bucket_of(percent: float, upper: Sequence[float], counts: Sequence[int]) -> float:
    """Upper bound of the bucket that holds the percentile."""
    left = percent / 100 * sum(counts)
    for bound, count in zip(upper, counts, strict=True):
        left -= count
        if left <= 0:
            return bound
    return upper[-1]


def finite(number: float) -> float | None:
    """None for infinity, which JSON does not have."""
    return None if number == float("inf") else round(number, 4)
