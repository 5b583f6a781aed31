"""A hypothesis state machine over the real engine loop on the simulated device, and five planted bugs it must catch."""

from __future__ import annotations

import random

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

from nanovllm.engine import scheduler
from nanovllm.sampling_params import SamplingParams
from tests.sim.plants import PLANTS
from tests.sim.simulated_device import VOCABULARY
from tests.sim.world import World, random_world, run_random, tiny_config

configs = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([2, 4]),
        "enable_two_gpu_pd": st.sampled_from([True, True, True, False]),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.sampled_from([3, 8, 64]),
        "enable_prefix_caching": st.sampled_from([True, True, False]),
        "overlap": st.sampled_from([True, True, True, False]),
        "run_ahead": st.integers(1, 4),
        "pd_roles": st.sampled_from(["elastic", "elastic", "strict"]),
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
def card_0_takes_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are small here, and steps take no time."""
    monkeypatch.setattr(scheduler, "BALANCE_AFTER_S", 0.0)
    monkeypatch.setattr(scheduler, "BALANCE_ROWS", 1)


class EngineMachine(RuleBasedStateMachine):
    """Requests, aborts, engine iterations and device progress in any order."""

    check_books = True

    @initialize(config=configs, pools=st.tuples(st.integers(6, 24), st.integers(6, 24)), seed=st.integers(0, 1 << 32))
    def start(self, config: dict, pools: tuple[int, int], seed: int) -> None:
        blocks = pools if config["enable_two_gpu_pd"] else pools[:1]
        self.world = World(tiny_config(**config, decode_backlog_high=4), blocks, random.Random(seed))
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


def test_random_worlds_reach_every_path() -> None:
    """The worlds above are worth running only if they evacuate, recompute, pause, write back, hit prefixes and bend."""
    counts = random_world(0).scheduler.counts
    for seed in range(40):
        counts.update(run_random(seed).scheduler.counts)
    plain = ("evacuations", "recomputes", "pauses", "cached_tokens", "write_backs")
    assert all(counts[name] for name in (*plain, "helped", "hand_offs", "taken_over")), counts


@pytest.mark.slow
def test_random_worlds_long() -> None:
    for seed in range(1000, 9000):
        run_random(seed)
