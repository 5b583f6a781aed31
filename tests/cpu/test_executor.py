"""Executors over runners and handles that do what a test says: errors, order, run-ahead, closing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nanovllm.engine.executor import Executor, InlineExecutor, Job, ThreadedExecutor
from nanovllm.engine.shards import CopyShard, DecodeShard, PrefillShard, Shard, StepResult
from nanovllm.engine.watchdog import Progress

TIMEOUT_S = 10.0


class FakeHandle:
    """Ends when its gate opens, with a result or an error."""

    def __init__(self, event: Any = None, error: Exception | None = None, gate: threading.Event | None = None) -> None:
        self.event = event
        self.error = error
        self.gate = gate
        self.waited = threading.Event()  # `wait` is about to return

    def wait(self) -> StepResult:
        if self.gate is not None:
            assert self.gate.wait(TIMEOUT_S)
        self.waited.set()
        if self.error is not None:
            raise self.error
        return StepResult([7])


class LostDevice(FakeHandle):
    """After an illegal access a card answers no question, also not for times."""

    @property
    def seconds(self) -> float:
        raise RuntimeError("no times either")


class FakeRunner:
    """Hands out prepared handles, or raises them, in order; a plain handle where there is none left."""

    def __init__(self, *script: FakeHandle | Exception) -> None:
        self.script = list(script)
        self.launches: list[tuple[Shard, Any]] = []

    def run_prefill(self, shard: PrefillShard) -> FakeHandle:
        return self._next(shard)

    def run_decode_core(self, shard: DecodeShard) -> FakeHandle:
        return self._next(shard)

    def run_copy(self, shard: CopyShard, target: Any, after: Any) -> FakeHandle:
        return self._next(shard, after)

    def _next(self, shard: Shard, after: Any = None) -> FakeHandle:
        answer = self.script.pop(0) if self.script else FakeHandle()
        self.launches.append((shard, after))
        if isinstance(answer, Exception):
            raise answer
        return answer


def step(number: int, card: int = 0) -> PrefillShard | DecodeShard:
    return PrefillShard(0, number, ()) if card == 0 else DecodeShard(card, number, (), 0)


def copy(number: int, after_step: int) -> CopyShard:
    return CopyShard(number, 0, 1, ((0, 0),), after_step)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def bounded(call: Callable[[], None]) -> None:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "the call did not return"


def collect(executor: Executor, count: int) -> list[Job]:
    """The next `count` completed jobs, in the order in which the engine hears of them."""
    jobs: list[Job] = []

    def enough() -> bool:
        jobs.extend(executor.poll())
        return len(jobs) >= count

    wait_until(enough)
    assert len(jobs) == count
    return jobs


@contextmanager
def threaded(*runners: FakeRunner) -> Iterator[ThreadedExecutor]:
    executor = ThreadedExecutor(dict(enumerate(runners)), lambda: None)
    try:
        yield executor
    finally:
        bounded(executor.close)


@contextmanager
def make(kind: type[Executor], *runners: FakeRunner) -> Iterator[Executor]:
    if kind is InlineExecutor:
        yield InlineExecutor(dict(enumerate(runners)))
    else:
        with threaded(*runners) as executor:
            yield executor


both = pytest.mark.parametrize("kind", [InlineExecutor, ThreadedExecutor])

# -- errors


@both
@pytest.mark.parametrize("error", [RuntimeError("illegal access"), None])
def test_a_device_that_answers_nothing_is_still_reported(kind: type[Executor], error: Exception | None) -> None:
    """The thread that collects must survive, or nobody hears of this job and of those behind it."""
    with make(kind, FakeRunner(LostDevice(error=error)), FakeRunner()) as executor:
        executor.launch(step(1))
        executor.launch(step(2))
        lost, fine = collect(executor, 2)
        assert isinstance(lost.error, RuntimeError) and (error is None or lost.error is error)
        assert fine.error is None and fine.result == StepResult([7])
        assert executor.num_in_flight == 0


@both
def test_a_copy_on_a_device_that_answers_nothing_is_still_reported(kind: type[Executor]) -> None:
    error = RuntimeError("illegal access")
    with make(kind, FakeRunner(LostDevice(error=error)), FakeRunner()) as executor:
        executor.launch(copy(1, 0))
        executor.launch(copy(2, 0))
        lost, fine = collect(executor, 2)
        assert lost.error is error and fine.error is None


@both
@pytest.mark.parametrize("shards", [(step(1), step(2)), (copy(1, 0), copy(2, 0))])
def test_a_launch_that_raises_is_reported_and_later_ones_run(kind: type[Executor], shards: tuple[Shard, ...]) -> None:
    error = RuntimeError("out of memory")
    with make(kind, FakeRunner(error), FakeRunner()) as executor:
        for shard in shards:
            executor.launch(shard)
        failed, fine = collect(executor, 2)
        assert (failed.shard, fine.shard) == shards
        assert failed.error is error and failed.result is None
        assert fine.error is None and fine.result == StepResult([7])


@pytest.mark.parametrize("failing", [RuntimeError("no launch"), FakeHandle(error=RuntimeError("no result"))])
def test_a_copy_of_what_a_failed_step_should_have_written_fails(failing: FakeHandle | Exception) -> None:
    begin, runner = threading.Event(), FakeRunner()
    launch, runner.script = runner.run_prefill, [failing]

    def late(shard: PrefillShard) -> FakeHandle:
        assert begin.wait(TIMEOUT_S)  # so that the copy is launched while its source step is in flight
        return launch(shard)

    runner.run_prefill = late  # type: ignore[method-assign]
    with threaded(runner, FakeRunner()) as executor:
        executor.launch(step(1))
        executor.launch(copy(1, 1))
        begin.set()
        source, follower = collect(executor, 2)
        assert source.shard == step(1) and source.error is not None
        assert isinstance(follower.error, RuntimeError) and follower.error.__cause__ is source.error
        assert [shard for shard, _ in runner.launches] == [step(1)]  # nothing was copied


def test_a_copy_that_was_launched_behind_a_step_that_failed_fails() -> None:
    """It waited for the step on the card, where nothing tells it how the step ended."""
    gate = threading.Event()
    runner = FakeRunner(FakeHandle(object(), RuntimeError("illegal access"), gate), moved := FakeHandle())
    with threaded(runner, FakeRunner()) as executor:
        executor.launch(step(1))
        executor.launch(copy(1, 1))
        assert moved.waited.wait(TIMEOUT_S)
        gate.set()
        source, follower = collect(executor, 2)
        assert source.error is not None and follower.error is source.error


# -- order


def test_a_copy_behind_a_decode_step_is_not_launched_before_it_has_ended() -> None:
    """On the card it would begin with the changes that the next step needs, and hold them up."""
    gate, behind = threading.Event(), CopyShard(1, 1, 0, ((0, 0),), 1)
    runner = FakeRunner(FakeHandle(object(), gate=gate))
    with threaded(FakeRunner(), runner) as executor:
        try:
            executor.launch(step(1, card=1))
            executor.launch(behind)
            time.sleep(0.05)
            assert [shard for shard, _ in runner.launches] == [step(1, card=1)]
            assert executor.progress()["copies from card 1"] == Progress(1, 0, waits=True)
        finally:
            gate.set()
        assert [job.shard for job in collect(executor, 2)] == [step(1, card=1), behind]
        assert runner.launches[1] == (behind, None)
        assert executor.progress()["copies from card 1"] == Progress(1, 1)


def test_a_copy_is_reported_after_the_step_that_it_follows() -> None:
    gate, event, moved = threading.Event(), object(), FakeHandle()
    runner = FakeRunner(FakeHandle(event, gate=gate), moved)
    with threaded(runner, FakeRunner()) as executor:
        try:
            executor.launch(step(1))
            executor.launch(copy(1, 1))
            assert moved.waited.wait(TIMEOUT_S)  # launched, and ended, without waiting for the step's end
            time.sleep(0.05)
            assert executor.poll() == []
        finally:
            gate.set()
        assert [job.shard for job in collect(executor, 2)] == [step(1), copy(1, 1)]
        assert runner.launches == [(step(1), None), (copy(1, 1), event)]


def test_a_copy_waits_for_no_later_step_and_for_none_of_the_other_card() -> None:
    gate = threading.Event()
    slow = [FakeHandle(object(), gate=gate) for _ in range(2)]
    with threaded(FakeRunner(FakeHandle(object()), slow[0]), FakeRunner(slow[1])) as executor:
        try:
            executor.launch(step(1))
            executor.launch(step(2))
            executor.launch(step(1, card=1))
            executor.launch(copy(1, 1))
            assert [job.shard for job in collect(executor, 2)] == [step(1), copy(1, 1)]
        finally:
            gate.set()
        collect(executor, 2)


def test_a_copy_is_launched_only_after_a_step_that_has_no_event() -> None:
    gate = threading.Event()
    runner = FakeRunner(FakeHandle(gate=gate))
    with threaded(runner, FakeRunner()) as executor:
        try:
            executor.launch(step(1))
            executor.launch(copy(1, 1))
            wait_until(lambda: len(runner.launches) == 1)
            time.sleep(0.05)
            assert len(runner.launches) == 1
        finally:
            gate.set()
        assert [job.shard for job in collect(executor, 2)] == [step(1), copy(1, 1)]


def test_the_next_step_is_launched_while_one_still_runs() -> None:
    gate = threading.Event()
    runner = FakeRunner(FakeHandle(object(), gate=gate))
    with threaded(FakeRunner(), runner) as executor:
        try:
            for number in (1, 2, 3):
                executor.launch(step(number, card=1))
            wait_until(lambda: len(runner.launches) == 3)
            assert executor.poll() == [] and executor.num_in_flight == 3
        finally:
            gate.set()
        assert [job.shard.step for job in collect(executor, 3)] == [1, 2, 3]


# -- closing


def test_close_ends_the_threads_after_what_they_were_given() -> None:
    before, gate = set(threading.enumerate()), threading.Event()
    executor = ThreadedExecutor({0: FakeRunner(FakeHandle(gate=gate)), 1: FakeRunner()}, lambda: None)
    started = set(threading.enumerate()) - before
    assert len(started) == 8  # a launching and a collecting one for each of two cards and for what leaves them
    executor.launch(step(1))
    executor.launch(copy(1, 1))
    closing = threading.Thread(target=executor.close, daemon=True)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()  # the card still works
    gate.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive() and not any(thread.is_alive() for thread in started)
    assert [job.shard for job in executor.poll()] == [step(1), copy(1, 1)]


@both
def test_close_twice(kind: type[Executor]) -> None:
    with make(kind, FakeRunner(), FakeRunner()) as executor:
        bounded(executor.close)
        bounded(executor.close)
