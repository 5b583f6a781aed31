"""Which way a decode step runs, by measured time: sequential, or pipelined over one of a few splits. Imports no torch.

Each place (rows of the step, context, both by bucket) tries its ways, decides by their medians, and keeps to that until
the step time has drifted or many steps have passed. A way other than the present one must be clearly faster; the
sequential way takes over from one that is not faster than it. Steps may be in flight: a decision waits for the last of
its trials.

A way is tried for several steps in a row: a card that is bound by power gives each way a clock of its own, within some
hundreds of milliseconds. Step by step in turn all ways would run at one clock, and those that take less energy, or
come behind others, would be mistaken for slower ones. Where these trials leave it open whether the fastest other way is
worth a change, it, the present one and the sequential one are tried once more, for longer.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Place = tuple[int, int]  # (rows, tokens of context)
SEQUENTIAL = "sequential"


@dataclass(frozen=True)
class ChoiceRules:
    """trial_steps: of each way in a row, the first `settle_steps` of which are not counted; twice, there and back.
    hysteresis: by what share another way must be faster to be taken. doubt: within what share around that the trials
    leave it open; final_steps, final_settle_steps: of the ways in question then, as for trials.

    drift: by what share the chosen way's time may change before it is measured against those within `contention` of the
    best; `pause_steps` later at the earliest, twice as many each time that nothing comes of it. All ways are measured
    again after `remeasure_steps`. window_steps: of the moving median.
    """

    trial_steps: int = 6
    settle_steps: int = 2
    hysteresis: float = 0.03
    doubt: float = 0.04
    final_steps: int = 20
    final_settle_steps: int = 8
    drift: float = 0.10
    contention: float = 0.15
    pause_steps: int = 64
    remeasure_steps: int = 4096
    window_steps: int = 9


class Step(NamedTuple):
    """How a step runs, and why: as decided ("steady"), or to measure ("trial"; "settling": not counted)."""

    way: str
    kind: Literal["steady", "trial", "settling"]


@dataclass
class PlaceChoice:
    """The way of one place. `ways`: the sequential one first; each is measured before any other is taken."""

    ways: tuple[str, ...]
    rules: ChoiceRules = field(default_factory=ChoiceRules)
    chosen: str = SEQUENTIAL
    medians_s: dict[str, float] = field(default_factory=dict)  # at the last decision that measured the way
    changes: int = 0

    def __post_init__(self) -> None:
        if not self.ways or self.ways[0] != SEQUENTIAL or len(set(self.ways)) < len(self.ways):
            raise ValueError(f"ways={self.ways} must be different, {SEQUENTIAL!r} the first of them")
        self._plan: deque[Step] = deque()
        self._awaited = 0
        self._in_final = False
        self._times_s: dict[str, list[float]] = {}
        self._measured_s: dict[str, float] = {}  # since the last decision
        self._recent_s: deque[float] = deque(maxlen=self.rules.window_steps)
        self._steady_steps = 0
        self._pause_steps = self.rules.pause_steps
        if len(self.ways) > 1:
            self._begin_trials(self.ways, self.rules.trial_steps, self.rules.settle_steps)

    def next(self) -> Step:
        """How the next step of this place runs. Each step is to be observed, in any order."""
        if self._plan:
            self._awaited += 1
            return self._plan.popleft()
        if not self._awaited:
            self._steady_steps += 1
            if tried := self._due():
                self._begin_trials(tried, self.rules.trial_steps, self.rules.settle_steps)
                return self.next()
        return Step(self.chosen, "steady")

    def observe(self, step: Step, seconds: float) -> None:
        """What a step of `next` took."""
        if step.kind == "steady":
            if step.way == self.chosen:
                self._recent_s.append(seconds)
            return
        self._awaited -= 1
        if step.kind == "trial":
            self._times_s[step.way].append(seconds)
        if not self._plan and not self._awaited:
            self._trials_ended()

    def _begin_trials(self, ways: tuple[str, ...], steps: int, settling: int) -> None:
        """There and back again, so that contexts that grow meanwhile grow for all alike."""
        self._times_s = {way: [] for way in ways}
        for way in (*ways, *reversed(ways)):
            self._plan.extend([Step(way, "settling")] * settling)
            self._plan.extend([Step(way, "trial")] * (steps - settling))

    def _trials_ended(self) -> None:
        measured_s = {way: statistics.median(times) for way, times in self._times_s.items()}
        self._measured_s |= measured_s
        if not self._in_final and (rival := self._doubtful_rival(measured_s)):
            self._in_final = True
            finalists = tuple(dict.fromkeys((SEQUENTIAL, self.chosen, rival)))
            self._begin_trials(finalists, self.rules.final_steps, self.rules.final_settle_steps)
            return
        self.medians_s |= self._measured_s
        self._measured_s, self._in_final = {}, False
        self._decide(measured_s)

    def _doubtful_rival(self, measured_s: dict[str, float]) -> str | None:
        """The fastest way but the present one, if a little more or less would decide whether it is taken."""
        others = [way for way in measured_s if way != self.chosen]
        if not others:  # after a drift: all of them were far slower
            return None
        rival = min(others, key=lambda way: measured_s[way])
        gain = 1 - measured_s[rival] / measured_s[self.chosen]
        return rival if abs(gain - self.rules.hysteresis) < self.rules.doubt else None

    def _decide(self, measured_s: dict[str, float]) -> None:
        before, best = self.chosen, min(measured_s, key=lambda way: measured_s[way])
        if measured_s[best] < measured_s[before] * (1 - self.rules.hysteresis):
            self.chosen = best
        elif measured_s[before] >= measured_s[SEQUENTIAL]:
            self.chosen = SEQUENTIAL
        changed = self.chosen != before
        self.changes += changed
        self._pause_steps = self.rules.pause_steps if changed else 2 * self._pause_steps
        self._steady_steps = 0
        self._recent_s.clear()

    def _due(self) -> tuple[str, ...]:
        """The ways to measure now; none as long as there is no reason to."""
        if len(self.ways) == 1:
            return ()
        if self._steady_steps > self.rules.remeasure_steps:
            return self.ways
        if self._steady_steps <= self._pause_steps or not self._has_drifted():
            return ()
        most_s = min(self.medians_s.values()) * (1 + self.rules.contention)
        kept = {SEQUENTIAL, self.chosen}
        return tuple(way for way in self.ways if way in kept or self.medians_s[way] <= most_s)

    def _has_drifted(self) -> bool:
        if len(self._recent_s) < self.rules.window_steps:
            return False
        ratio = statistics.median(self._recent_s) / self.medians_s[self.chosen]
        return not 1 / (1 + self.rules.drift) <= ratio <= 1 + self.rules.drift


class WayChoice:
    """The way of every place, and how many steps ran which. ways_at: the ways that a place has, `SEQUENTIAL` first."""

    def __init__(self, ways_at: Callable[[Place], tuple[str, ...]], rules: ChoiceRules | None = None) -> None:
        self._ways_at, self._rules = ways_at, rules or ChoiceRules()
        self.places: dict[Place, PlaceChoice] = {}
        self.steps_by_way: Counter[str] = Counter()
        self.exploration_steps = 0

    def next(self, place: Place) -> Step:
        if place not in self.places:
            self.places[place] = PlaceChoice(self._ways_at(place), self._rules)
        step = self.places[place].next()
        self.steps_by_way[step.way] += 1
        self.exploration_steps += step.kind != "steady"
        return step

    def observe(self, place: Place, step: Step, seconds: float) -> None:
        """What a step took; of a place where nothing was chosen, nothing is to be learned."""
        if place in self.places:
            self.places[place].observe(step, seconds)

    @property
    def changes(self) -> int:
        """Decisions that took another way than the one before, the first ones among them."""
        return sum(choice.changes for choice in self.places.values())


def context_bucket(context_tokens: int) -> int:
    """The power of two that holds so many."""
    return 1 << max(0, context_tokens - 1).bit_length()
