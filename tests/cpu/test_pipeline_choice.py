"""The choice among ways against a simulated card: it converges, keeps still, and never settles for a slower way."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.pipeline_choice import SEQUENTIAL, ChoiceRules, PlaceChoice, Step, WayChoice, context_bucket

WAYS = (SEQUENTIAL, "28:104", "36:96", "44:88", "60:72")
Cost = Callable[[str, int], float]  # seconds of a step, by way and number


def run_steps(choice: PlaceChoice, cost: Cost, count: int, in_flight: int = 3, start: int = 0) -> list[Step]:
    """Steps of the place, each observed when `in_flight` later ones have been launched."""
    taken: list[Step] = []
    flying: deque[tuple[Step, float]] = deque()
    for number in range(start, start + count):
        step = choice.next()
        taken.append(step)
        flying.append((step, cost(step.way, number)))
        if len(flying) > in_flight:
            choice.observe(*flying.popleft())
    for observed in flying:
        choice.observe(*observed)
    return taken


def noisy(times: dict[str, float], seed: int, noise: float = 0.005, spikes: float = 0.05) -> Cost:
    """Relative noise, and now and then a step that takes three times as long."""
    rng = random.Random(seed)

    def cost(way: str, _: int) -> float:
        slow = 3.0 if rng.random() < spikes else 1.0
        return times[way] * slow * rng.uniform(1 - noise, 1 + noise)

    return cost


STEP_TIMES = st.lists(st.floats(0.5, 2.0), min_size=5, max_size=5).map(lambda t: dict(zip(WAYS, t, strict=True)))


@settings(deadline=None, max_examples=80)
@given(STEP_TIMES, st.integers(0, 4), st.integers(0, 1000))
def test_it_converges_to_the_best_way_or_one_as_good(times: dict[str, float], in_flight: int, seed: int) -> None:
    choice = PlaceChoice(WAYS)
    taken = run_steps(choice, noisy(times, seed, spikes=0.0), 400, in_flight)
    assert times[choice.chosen] <= min(times.values()) * 1.05
    assert times[choice.chosen] <= times[SEQUENTIAL] * 1.01, "never a way that measures slower"
    trials = [step for step in taken if step.kind != "steady"]
    first, final = 2 * len(WAYS) * ChoiceRules().trial_steps, 2 * 2 * ChoiceRules().final_steps
    assert len(trials) in (first, first + final), "steady times: no second round of trials"
    assert choice.changes <= 1
    steady = [step.way for step in taken if step.kind == "steady"]
    assert set(steady) <= {SEQUENTIAL, choice.chosen}


@given(st.floats(-0.029, 0.029), st.integers(0, 100))
def test_a_gain_within_the_hysteresis_is_not_worth_a_change(gain: float, seed: int) -> None:
    times = dict.fromkeys(WAYS, 1.2) | {SEQUENTIAL: 1.0, "44:88": 1.0 - gain}
    choice = PlaceChoice(WAYS)
    run_steps(choice, noisy(times, seed, noise=0.0, spikes=0.0), 300)
    assert choice.chosen == SEQUENTIAL and choice.changes == 0


def test_single_spikes_do_not_decide() -> None:
    times = dict.fromkeys(WAYS, 1.1) | {SEQUENTIAL: 1.0, "44:88": 0.9}
    wrong = 0
    for seed in range(50):
        choice = PlaceChoice(WAYS)
        run_steps(choice, noisy(times, seed, spikes=0.1), 400)
        wrong += choice.chosen != "44:88"
    assert wrong <= 2


def test_nothing_is_decided_before_every_trial_is_known() -> None:
    choice = PlaceChoice((SEQUENTIAL, "44:88"), ChoiceRules(trial_steps=2, settle_steps=0))
    steps = [choice.next() for _ in range(8)]
    assert [step.way for step in steps] == [SEQUENTIAL] * 2 + ["44:88"] * 4 + [SEQUENTIAL] * 2
    for step in steps[1:]:
        choice.observe(step, 1.0 if step.way == SEQUENTIAL else 0.5)
        assert choice.next() == Step(SEQUENTIAL, "steady")
    choice.observe(steps[0], 1.0)
    assert choice.next() == Step("44:88", "steady")


def test_the_first_steps_of_a_trial_are_not_counted() -> None:
    choice = PlaceChoice((SEQUENTIAL, "44:88"), ChoiceRules(trial_steps=3, settle_steps=2))
    for seconds in (9.0, 9.0, 1.0, 8.0, 8.0, 0.5, 7.0, 7.0, 0.5, 0.1, 0.1, 1.0):
        choice.observe(choice.next(), seconds)
    assert choice.medians_s == {SEQUENTIAL: 1.0, "44:88": 0.5}


class PowerBoundCard:
    """Its clock, 1 at most, nears what the running way may have, by a share of the way at each step. Ways: seconds at
    full clock, and what it would draw there, in the card's limit."""

    def __init__(self, nearing: float) -> None:
        self.nearing, self.clock = nearing, 1 / 1.3
        self.ways = {SEQUENTIAL: (1.0, 1.3), "28:104": (1.06, 1.15), "44:88": (1.3, 1.05), "60:72": (1.5, 1.0)}

    def cost(self, way: str, _: int) -> float:
        seconds, power = self.ways[way]
        taken = seconds / self.clock
        self.clock += self.nearing * (min(1, 1 / power) - self.clock)
        return taken

    def steady(self, way: str) -> float:
        return self.ways[way][0] * self.ways[way][1]


@pytest.mark.parametrize("nearing", [1.0, 0.7, 0.5, 0.35])
@pytest.mark.parametrize("in_flight", [0, 3])
def test_a_way_that_takes_less_energy_is_found_on_a_card_bound_by_power(nearing: float, in_flight: int) -> None:
    """At one clock for all, 28:104 would be 6 % slower; at the one that each has by itself it is 6 % faster."""
    card = PowerBoundCard(nearing)
    choice = PlaceChoice(tuple(card.ways))
    run_steps(choice, card.cost, 400, in_flight)
    assert choice.chosen == "28:104"
    for way in (SEQUENTIAL, "28:104"):
        assert choice.medians_s[way] == pytest.approx(card.steady(way), rel=0.04)


@pytest.mark.parametrize("in_flight", [0, 3])
def test_what_trials_leave_in_doubt_a_final_decides(in_flight: int) -> None:
    """The clock follows so slowly that in the trials 28:104 is 2 % slower than it is by itself."""
    card = PowerBoundCard(nearing=0.15)
    trials, choice = PlaceChoice(tuple(card.ways), ChoiceRules(doubt=0.0)), PlaceChoice(tuple(card.ways))
    run_steps(trials, card.cost, 400, in_flight)
    assert trials.chosen == SEQUENTIAL
    run_steps(choice, PowerBoundCard(nearing=0.15).cost, 400, in_flight)
    assert choice.chosen == "28:104"


def test_a_clear_gain_and_a_clear_loss_need_no_final() -> None:
    for seconds in (0.9, 1.05):
        choice = PlaceChoice((SEQUENTIAL, "44:88"))
        taken = run_steps(choice, noisy({SEQUENTIAL: 1.0, "44:88": seconds}, 0, noise=0.0, spikes=0.0), 200)
        assert sum(step.kind != "steady" for step in taken) == 2 * 2 * ChoiceRules().trial_steps
        assert choice.chosen == ("44:88" if seconds < 1 else SEQUENTIAL)


@pytest.mark.parametrize("in_flight", [0, 3])
def test_a_drift_where_all_other_ways_are_far_slower_changes_nothing(in_flight: int) -> None:
    """Then the present way is measured by itself."""
    choice = PlaceChoice((SEQUENTIAL, "44:88"))

    def cost(way: str, number: int) -> float:
        return {SEQUENTIAL: 1.0, "44:88": 1.3}[way] * (1.2 if number > 100 else 1.0)

    run_steps(choice, cost, 600, in_flight)
    assert choice.chosen == SEQUENTIAL and choice.medians_s == {SEQUENTIAL: 1.2, "44:88": 1.3}


def test_a_final_is_between_its_ways_alone() -> None:
    """A third way's trials, taken at another clock, do not count against what the final has measured."""
    choice = PlaceChoice((SEQUENTIAL, "28:104", "44:88"), ChoiceRules(trial_steps=1, settle_steps=0))
    for seconds in (1.0, 0.98, 0.99, 0.99, 0.98, 1.0):
        choice.observe(choice.next(), seconds)
    final = [choice.next() for _ in range(80)]
    assert {step.way for step in final} == {SEQUENTIAL, "28:104"} and choice.next().kind == "steady"
    for step in final:
        choice.observe(step, 1.1)
    assert choice.chosen == SEQUENTIAL and choice.medians_s == {SEQUENTIAL: 1.1, "28:104": 1.1, "44:88": 0.99}


def test_contexts_that_grow_through_the_trials_favour_no_way() -> None:
    """By 0.2 % a step, 12 % from the first to the last; the ways are equal. The final comes later and is longer."""
    choice = PlaceChoice(WAYS)
    run_steps(choice, lambda way, step: 1.0 + 0.002 * step, 250)
    assert choice.chosen == SEQUENTIAL and choice.changes == 0
    final = [choice.medians_s.pop(way) for way in (SEQUENTIAL, "28:104")]
    for times in (final, list(choice.medians_s.values())):
        assert max(times) / min(times) < 1.001


def test_a_drifting_load_is_measured_again_and_the_choice_follows() -> None:
    """Contexts grow: what was best at their beginning is the slowest at the end."""

    def cost(way: str, step: int) -> float:
        attention = 1 + step / 1000
        return {SEQUENTIAL: 1.0 + attention, "28:104": 2.2 * attention, "60:72": 1.85 + 0.05 * attention}.get(way, 9.0)

    ways = (SEQUENTIAL, "28:104", "60:72")
    choice = PlaceChoice(ways)
    taken = run_steps(choice, cost, 3000)
    assert choice.chosen == "60:72"
    exploring = sum(step.kind != "steady" for step in taken)
    assert exploring <= 0.05 * len(taken), f"{exploring} of {len(taken)} steps explored"
    lost = sum(cost(step.way, i) - min(cost(way, i) for way in ways) for i, step in enumerate(taken))
    assert lost <= 0.03 * sum(cost(SEQUENTIAL, i) for i in range(len(taken)))


def test_a_way_that_becomes_slower_than_sequential_is_left() -> None:
    times = {SEQUENTIAL: 1.0, "44:88": 0.9}
    choice = PlaceChoice(tuple(times))
    run_steps(choice, lambda way, _: times[way], 100)
    assert choice.chosen == "44:88"
    times["44:88"] = 1.02
    run_steps(choice, lambda way, _: times[way], 400)
    assert choice.chosen == SEQUENTIAL, "within the hysteresis, and yet not faster"


def test_everything_is_measured_again_after_many_steps() -> None:
    times = dict.fromkeys(WAYS, 1.5) | {SEQUENTIAL: 1.0}
    choice = PlaceChoice(WAYS, ChoiceRules(remeasure_steps=500))
    run_steps(choice, lambda way, _: times[way], 400)
    times["36:96"] = 0.5  # nobody can know
    run_steps(choice, lambda way, _: times[way], 400)
    assert choice.chosen == "36:96"


def test_fruitless_measurements_become_rarer() -> None:
    """A load that swings by a fifth, and always has the same best way."""
    choice = PlaceChoice((SEQUENTIAL, "44:88"))
    taken = run_steps(choice, lambda way, i: (1.0 if i // 80 % 2 else 1.3) * (0.9 if way == "44:88" else 1.0), 8000)
    exploring = sum(step.kind != "steady" for step in taken)
    assert choice.changes == 1 and exploring <= 8 * 24


@settings(deadline=None, max_examples=40)
@given(STEP_TIMES, st.integers(0, 1000))
def test_it_never_oscillates(times: dict[str, float], seed: int) -> None:
    choice = PlaceChoice(WAYS, ChoiceRules(remeasure_steps=100))
    run_steps(choice, noisy(times, seed, noise=0.01, spikes=0.02), 4000)
    assert choice.changes <= 4


def test_one_way_is_not_explored() -> None:
    choice = PlaceChoice((SEQUENTIAL,))
    assert {step.kind for step in run_steps(choice, lambda way, i: 1.0 + i, 9000)} == {"steady"}


@pytest.mark.parametrize("ways", [(), ("44:88",), ("44:88", SEQUENTIAL), (SEQUENTIAL, SEQUENTIAL)])
def test_sequential_is_always_one_of_the_ways(ways: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="must be different, 'sequential' the first"):
        PlaceChoice(ways)


def test_places_are_apart_and_steps_are_counted() -> None:
    choice = WayChoice(lambda place: WAYS[:2] if place[0] > 100 else WAYS[:1], ChoiceRules(trial_steps=3))
    cost = {SEQUENTIAL: 1.0, "28:104": 0.5}
    for number in range(60):
        place = ((64, 512), (256, 512), (256, 1024))[number % 3]
        step = choice.next(place)
        choice.observe(place, step, cost[step.way])
    assert {place: c.chosen for place, c in choice.places.items()} == {
        (64, 512): SEQUENTIAL,
        (256, 512): "28:104",
        (256, 1024): "28:104",
    }
    assert choice.exploration_steps == 2 * 2 * 2 * 3 and choice.changes == 2
    assert sum(choice.steps_by_way.values()) == 60 and set(choice.steps_by_way) == set(cost)


def test_context_buckets_are_powers_of_two() -> None:
    assert [context_bucket(n) for n in (0, 1, 2, 3, 512, 513, 4096)] == [1, 1, 2, 4, 512, 1024, 4096]


def test_it_imports_no_torch() -> None:
    code = "import sys, nanovllm.engine.pipeline_choice; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
