"""Requests that come together while the cards are busy: the loop is not woken for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine import llm_engine
from nanovllm.engine.executor import Executor, Job
from nanovllm.engine.llm_engine import LLMEngine, OutputQueue
from nanovllm.engine.scheduler import PREFILL_STEPS_IN_FLIGHT, Scheduler
from nanovllm.engine.sequence import Request
from nanovllm.engine.shards import PrefillShard, Shard, StepResult
from tests.cpu.tiny import wait_until

PARAMS = SamplingParams(max_tokens=1, ignore_eos=True)
LONG_S = 60.0  # longer than any test waits: what happens before was not waited for


class HeldCard(Executor):
    """Steps end when they are told to."""

    def __init__(self, notify: Callable[[], None]) -> None:
        super().__init__()
        self.held: list[Job] = []
        self._notify = notify

    def launch(self, shard: Shard) -> None:
        self.num_in_flight += 1
        self.held.append(Job(shard))

    def release(self) -> None:
        held, self.held = self.held, []
        for job in held:
            assert isinstance(job.shard, PrefillShard)
            job.result = StepResult([7] * job.shard.num_samples)
            self._completed.append(job)
        self._notify()


class World:
    def __init__(self) -> None:
        config = Config.from_kwargs("none", {"max_num_seqs": 8, "max_num_batched_tokens": 16})
        self.cards: list[HeldCard] = []
        self.queue = OutputQueue()
        self.engine = LLMEngine(config, Scheduler(config, (40,)), self._make_card)
        self.iterations = 0
        self._step, self.engine.step = self.engine.step, self._counted  # type: ignore[method-assign]
        self._requests: list[Request] = []
        self.engine.start()

    def _make_card(self, notify: Callable[[], None]) -> Executor:
        self.cards.append(HeldCard(notify))
        return self.cards[0]

    def _counted(self) -> bool:
        self.iterations += 1
        return self._step()

    @property
    def num_known(self) -> int:
        """Requests that the loop has taken from its inbox."""
        return len(self._requests) - len(self.engine._inbox)

    def submit(self) -> None:
        number = len(self._requests)
        self._requests.append(Request(str(number), number, None, [1] * 16, PARAMS, max_tokens=1))
        self.engine.submit(self._requests[-1], self.queue)

    def fill(self) -> None:
        """Until the card takes no more, and the loop has heard of one that must wait."""
        for number in range(PREFILL_STEPS_IN_FLIGHT):
            self.submit()
            wait_until(lambda expected=number + 1: len(self.cards[0].held) == expected)  # type: ignore[misc]
        self.submit()
        wait_until(lambda: self.engine._gathers)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(llm_engine, "GATHER_S", LONG_S)
    world = World()
    yield world
    world.engine.close()


def test_the_loop_sleeps_while_requests_come_that_cannot_begin(world: World) -> None:
    world.fill()
    known, iterations = world.num_known, world.iterations
    for _ in range(5):
        world.submit()
    time.sleep(0.05)  # for a loop that was woken all the same
    assert (world.num_known, world.iterations) == (known, iterations)


def test_a_step_that_ends_wakes_it_and_all_are_taken(world: World) -> None:
    world.fill()
    for _ in range(5):
        world.submit()
    world.cards[0].release()
    wait_until(lambda: not world.engine._inbox and len(world.cards[0].held) == PREFILL_STEPS_IN_FLIGHT)
    while world.engine.has_unfinished():
        world.cards[0].release()
        world.queue.take(0.01)


def test_an_abort_wakes_it(world: World) -> None:
    world.fill()
    world.submit()
    world.engine.abort("2")  # the one that waits
    wait_until(lambda: not world.engine._inbox)


def test_it_wakes_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_engine, "GATHER_S", 0.001)
    for _ in range(PREFILL_STEPS_IN_FLIGHT + 6):
        world.submit()
    wait_until(lambda: not world.engine._inbox)


def test_an_idle_engine_takes_a_request_at_once(world: World) -> None:
    world.engine.abort("nobody's")
    wait_until(lambda: not world.engine._inbox)
    time.sleep(0.05)  # for a loop that would gather now
    world.submit()
    wait_until(lambda: len(world.cards[0].held) == 1)
