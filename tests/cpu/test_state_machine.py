"""A hypothesis state machine over the real engine loop on the simulated device, and five planted bugs it must catch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from nanovllm.engine import moves, pace, step_sizes
from nanovllm.engine.moves import Moves
from nanovllm.engine.pace import Pace
from nanovllm.engine.placement import HELP_AFTER_S, Placement
from nanovllm.engine.request_states import State
from nanovllm.sampling_params import SamplingParams
from tests.cpu.test_fault_worlds import PLANTS as FAULT_PLANTS
from tests.cpu.test_fault_worlds import STICKY
from tests.sim.chaos import Chaos
from tests.sim.plants import PLANTS
from tests.sim.simulated_device import VOCABULARY
from tests.sim.world import SLOS_MS, World, random_world, run_random, tiny_config

configs = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([2, 4]),
        "enable_two_gpu_pd": st.sampled_from([True, True, True, False]),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.sampled_from([3, 8, 64]),
        "enable_prefix_caching": st.sampled_from([True, True, False]),
        "overlap": st.sampled_from([True, True, True, False]),
        "run_ahead": st.sampled_from([None, 1, 2, 3, 4]),
        "pd_roles": st.sampled_from(["elastic", "elastic", "strict"]),
        "itl_slo_ms": st.sampled_from(SLOS_MS),
        "lends": st.sampled_from([False, False, True]),
    }
)
params = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 2, 3]),
    max_tokens=st.integers(1, 20),
    stop_token_ids=st.lists(st.integers(1, VOCABULARY - 1), max_size=2, unique=True),
    ignore_eos=st.booleans(),
)
# Prompts are a stem of one of two families plus a tail: shared prefixes of every length.
prompts = st.builds(
    lambda family, length, tail: [1 + (family * 7 + i) % (VOCABULARY - 1) for i in range(length)] + tail,
    st.integers(0, 1),
    st.integers(1, 16),
    st.lists(st.integers(1, VOCABULARY - 1), max_size=3),
)


@pytest.fixture(autouse=True)
def small_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and prompts are small here."""
    monkeypatch.setattr(moves, "BALANCE_AFTER_S", 0.004)
    monkeypatch.setattr(moves, "BALANCE_ROWS", 1)
    monkeypatch.setattr(moves, "MOVES_IN_FLIGHT", 2)
    monkeypatch.setattr(pace, "MEASURED_TOKENS", 1)
    monkeypatch.setattr(pace, "MIXED_IN_A_ROW", 2)
    monkeypatch.setattr(step_sizes, "STEP_TOKENS", (4, 8, 16))
    monkeypatch.setattr(step_sizes, "MIN_CHUNK_TOKENS", 1)
    monkeypatch.setattr(step_sizes, "MIN_BUCKET", 2)


class EngineMachine(RuleBasedStateMachine):
    """Requests, aborts, engine iterations and device progress in any order."""

    check_books = True

    @initialize(config=configs, pools=st.tuples(st.integers(6, 24), st.integers(6, 24)), seed=st.integers(0, 1 << 32))
    def start(self, config: dict, pools: tuple[int, int], seed: int) -> None:
        blocks = pools if config["enable_two_gpu_pd"] else pools[:1]
        lends = config.pop("lends")
        self.world = World(tiny_config(**config, decode_backlog_high=4), blocks, random.Random(seed), lends)
        self.world.check_books = self.check_books

    @rule(prompt=prompts, params=params)
    def add(self, prompt: list[int], params: SamplingParams) -> None:
        self.world.add(prompt, params)

    @precondition(lambda self: self.world.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.world.abort(data.draw(st.sampled_from(self.world.requests)))

    @rule()
    def step(self) -> None:
        self.world.step()

    @rule(times=st.integers(1, 12))
    def advance(self, times: int) -> None:
        for _ in range(times):
            self.world.executor.advance()

    @rule(times=st.integers(1, 8))
    def run(self, times: int) -> None:
        for _ in range(times):
            self.world.executor.advance()
            self.world.step()

    @invariant()
    def run_ahead_is_bounded(self) -> None:
        if hasattr(self, "world"):
            config = self.world.config
            for batch in self.world.scheduler.batches.values():
                assert len(batch.launched) <= 1 + config.steps_ahead
                assert len(batch.running) <= config.max_num_seqs

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run_to_idle()


class FaultyMachine(EngineMachine):
    """The same, and at any moment something may begin to go wrong: copies, rows, a card, the context."""

    @rule(
        copies=st.sampled_from([0.0, 0.1, 0.6]),
        rows=st.sampled_from([0.0, 0.05]),
        card=st.sampled_from([None, None, 0, 1]),
        text=st.sampled_from([Chaos.text, STICKY]),
    )
    def go_wrong(self, copies: float, rows: float, card: int | None, text: str) -> None:
        may_fail = self.world.may_fail
        Chaos(copies, rows, card, text=text).install(self.world)
        self.world.may_fail |= may_fail


QUICK = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
HUNT = settings(QUICK, max_examples=300, phases=[Phase.generate])


def test_engine_under_random_interleavings() -> None:
    run_state_machine_as_test(EngineMachine, settings=QUICK)


def test_engine_with_faults_under_random_interleavings() -> None:
    run_state_machine_as_test(FaultyMachine, settings=QUICK)


@pytest.mark.parametrize("plant", FAULT_PLANTS[:2], ids=lambda plant: plant.__name__)
def test_a_leak_and_an_early_free_after_a_fault_are_caught(plant) -> None:
    with plant(), pytest.raises((AssertionError, KeyError, ValueError)):
        run_state_machine_as_test(FaultyMachine, settings=HUNT)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_planted_bug_is_caught(plant) -> None:
    with plant(), pytest.raises(AssertionError):
        run_state_machine_as_test(EngineMachine, settings=HUNT)


@pytest.mark.parametrize("plant", PLANTS[:4], ids=lambda plant: plant.__name__)
def test_planted_bug_is_caught_by_memory_alone(plant) -> None:
    """Without the recount of owners, what the cards read, or what comes out, must still give the bug away."""

    class NoBooks(EngineMachine):
        check_books = False

    with plant(), pytest.raises((AssertionError, ValueError, KeyError)):
        run_state_machine_as_test(NoBooks, settings=HUNT)


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_worlds(first: int) -> None:
    """Longer runs than hypothesis makes: 25 requests each, pools so tiny that sequences are evacuated."""
    for seed in range(first, first + 50):
        run_random(seed)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often places were passed that only measured seconds lead to."""
    counts: Counter[str] = Counter()

    def note(owner: type, name: str, label: Callable[[Any, State | None, Any], str]) -> None:
        sound = getattr(owner, name)

        def noted(self: Any, *args: Any) -> Any:
            state = getattr(args[0], "state", None)
            result = sound(self, *args)
            counts[label(self, state, result)] += 1
            return result

        monkeypatch.setattr(owner, name, noted)

    note(Moves, "_take_over", lambda _, state, taken: f"take over {state.name if state else None}: {taken}")
    note(Placement, "_help", lambda place, _, helped: f"help, seconds known {place._plan.pace.token_s > 0}: {helped}")
    note(Pace, "seconds_of", lambda _, __, seconds: f"queue long enough: {HELP_AFTER_S <= seconds < math.inf}")
    note(Pace, "keeps_slo", lambda _, __, kept: f"slo kept: {kept}")
    note(Pace, "lacks_measurement", lambda _, __, lacks: f"without prompts now: {lacks}")
    note(Pace, "chunk_tokens", lambda _, __, tokens: f"chunk of {tokens}")
    return counts


def test_random_worlds_reach_every_path(reached: Counter[str]) -> None:
    """The worlds above are worth running only if they evacuate, recompute, pause, write back, hit prefixes and bend."""
    counts = random_world(0).scheduler.counts
    for seed in range(100):
        counts.update(run_random(seed).scheduler.counts)
    plain = ("evacuations", "recomputes", "pauses", "cached_tokens", "write_backs")
    assert all(counts[name] for name in (*plain, "helped", "hand_offs", "taken_over")), counts
    paced = ("take over DECODING: True", "take over READY: True", "help, seconds known True: True")
    limits = [f"{limit}: {kept}" for limit in ("queue long enough", "slo kept") for kept in (True, False)]
    limits.append("without prompts now: True")
    sizes = {size for rows in range(1, 9) for size in step_sizes.chunk_sizes(rows, 8)}
    missing = [name for name in (*paced, *limits, *(f"chunk of {size}" for size in sizes)) if not reached[name]]
    assert not missing, f"{missing} of {reached}"


@pytest.mark.slow
def test_random_worlds_long() -> None:
    for seed in range(1000, 9000):
        run_random(seed)
