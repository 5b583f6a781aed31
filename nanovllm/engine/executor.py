"""Where shards run. The engine launches shards and polls for completed jobs; it does not know what a card is.

`InlineExecutor` runs each shard at once in the caller's thread: no threads, no run-ahead, the plain twin.
`ThreadedExecutor` has one worker a card, and one for the copies that leave it. Tests bring a third one, which does
everything late and in seeded disorder.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, PrefillShard, Shard, StepResult
from nanovllm.engine.watchdog import Progress

CLOSE_LIMIT_S = 60.0  # for all workers together


class Handle(Protocol):
    """Work launched on a device. `wait` blocks until it has ended and returns its result, or raises."""

    event: Any  # what a copy stream waits for; None where the work has ended already

    def wait(self) -> StepResult | None: ...


class Runner(Protocol):
    """One card, as executors see it. Its graphs, by kind of step: None where there are none."""

    prefill_graphs: Any
    graphs: Any
    mixed_graphs: Any

    def run_prefill(self, shard: PrefillShard) -> Handle: ...
    def run_decode_core(self, shard: DecodeShard) -> Handle: ...
    def run_mixed(self, shard: MixedShard) -> Handle: ...
    def run_copy(self, shard: CopyShard, target: Any, after: Any) -> Handle: ...


@dataclass(slots=True)
class Job:
    """A launched shard and, once completed, its result or its error, and the seconds its device was busy with it.

    `begin_s`, `end_s`: when its launch was called and returned (`time.perf_counter()`). A job without a device event
    has run in between; of others the handle's events tell.
    """

    shard: Shard
    after: Job | None = None  # a copy: the launched step that writes its source
    result: StepResult | None = None
    error: BaseException | None = None
    begin_s: float = 0.0
    end_s: float = 0.0
    seconds: float = 0.0
    idle_s: float | None = None  # a step: how long its card had done nothing before it; None: not known
    num_bytes: int = 0  # a copy: what it moved
    handle: Handle | None = None
    launched: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


class Executor(ABC):
    """Runs shards of one card in launch order, but lent ones beside the others, in launch order among themselves; a
    copy not before its `after_step`; everything else in any order. `runners`: by card, where it has any."""

    def __init__(self, runners: Mapping[int, Runner] | None = None) -> None:
        self._runners = runners or {}
        self._completed: deque[Job] = deque()
        self.num_in_flight = 0

    @abstractmethod
    def launch(self, shard: Shard) -> None:
        """Take a shard; returns without waiting for earlier ones."""

    def poll(self) -> list[Job]:
        """Jobs completed since the last call, in completion order."""
        jobs = []
        while self._completed:
            jobs.append(self._completed.popleft())
        self.num_in_flight -= len(jobs)
        return jobs

    def progress(self) -> dict[str, Progress]:
        """Of every worker. Where there is none, whoever launches runs the shard."""
        return {}

    def eager_steps(self, card: int) -> list[str]:
        """Kinds of steps that this card launches kernel by kernel; none if no card has CUDA graphs."""
        graphs = {number: (one.prefill_graphs, one.graphs, one.mixed_graphs) for number, one in self._runners.items()}
        if all(each is None for of_card in graphs.values() for each in of_card):
            return []
        return [kind for kind, each in zip(("prefill", "decode", "mixed"), graphs[card], strict=True) if each is None]

    def close(self, limit_s: float = CLOSE_LIMIT_S) -> bool:
        """Stop the workers once they have run what they were given; waits that long, at most. Safe to call twice.
        Whether all have ended."""
        return True  # nothing to stop where there are no workers


def launch_on(runners: Mapping[int, Runner], job: Job, after: Any = None) -> Handle:
    """Start a job on its card; `after` is the event a copy waits for."""
    job.begin_s = time.perf_counter()
    handle = _run_on(runners, job.shard, after)
    job.end_s = time.perf_counter()
    return handle


def _run_on(runners: Mapping[int, Runner], shard: Shard, after: Any) -> Handle:
    if isinstance(shard, PrefillShard):
        return runners[shard.card].run_prefill(shard)
    if isinstance(shard, DecodeShard):
        return runners[shard.card].run_decode_core(shard)
    if isinstance(shard, MixedShard):
        return runners[shard.card].run_mixed(shard)
    return runners[shard.src].run_copy(shard, runners[shard.dst], after)


def link_name(card: int) -> str:
    """Of the worker that runs the copies which leave a card."""
    return f"copies from card {card}"


def _measure(job: Job, before: Job | None = None) -> None:
    """Device seconds of a completed job, as its handle measured them; else it ran inside its launch."""
    if before is not None and (idle_since := getattr(job.handle, "idle_since", None)) is not None:
        job.idle_s = idle_since(before.handle)
    measured = getattr(job.handle, "seconds", None)
    job.seconds = job.end_s - job.begin_s if measured is None else measured
    job.num_bytes = getattr(job.handle, "num_bytes", 0)


class InlineExecutor(Executor):
    """Launch and wait, in the caller's thread."""

    def launch(self, shard: Shard) -> None:
        self.num_in_flight += 1
        job = Job(shard)
        try:
            job.handle = launch_on(self._runners, job)
            job.result = job.handle.wait()
            _measure(job)
        except Exception as error:
            job.error = error
        self._completed.append(job)


class Worker:
    """A launching thread and a collecting thread over one FIFO: the next shard is launched while one still runs."""

    def __init__(self, name: str, launch: Callable[[Job], Handle], completed: Callable[[Job], None]) -> None:
        self._launch = launch
        self._complete = completed
        self._num_given = self._num_done = 0
        self._open: deque[Job] = deque()  # given and not done
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._in_flight: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._launch_loop, name=f"nanovllm-{name}", daemon=True),
            threading.Thread(target=self._collect_loop, name=f"nanovllm-{name}-collect", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job) -> None:
        self._num_given += 1
        self._open.append(job)
        self._inbox.put(job)

    @property
    def progress(self) -> Progress:
        sources = [job.after for job in list(self._open)[:1]]  # a copy of all: another thread takes the first one away
        waits = any(source is not None and not source.done.is_set() for source in sources)
        return Progress(self._num_given, self._num_done, waits)

    def end(self) -> None:
        """Its threads end when everything given so far has run."""
        self._inbox.put(None)

    def join(self, limit_s: float) -> bool:
        """Wait for its threads to end, for so long at most. Whether they have."""
        until_s = time.perf_counter() + limit_s
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, until_s - time.perf_counter()))
        return not any(thread.is_alive() for thread in others)

    def _launch_loop(self) -> None:
        while (job := self._inbox.get()) is not None:
            try:
                job.handle = self._launch(job)
            except BaseException as error:  # whatever it is: without this thread the engine would wait for ever
                job.error = error
            job.launched.set()
            self._in_flight.put(job)
        self._in_flight.put(None)

    def _collect_loop(self) -> None:
        before = None  # the last job that succeeded
        while (job := self._in_flight.get()) is not None:
            try:  # whatever the device raises, also when asked for times, the engine must hear of this job
                if job.handle is not None and job.error is None:
                    job.result = job.handle.wait()
                    _measure(job, before)
                    before = job
            except BaseException as error:
                job.error = error
            if job.after is not None:
                job.after.done.wait()  # the plan sees a step before the copies that follow it
                job.error = job.error or job.after.error  # what a failed step wrote is nothing to copy
            self._num_done += 1
            self._open.popleft()
            self._complete(job)
            job.done.set()


def _event_to_wait_for(step: Job) -> Any:
    """The end of a launched step on its card, for a copy that follows it; None: the copy is to be launched later.

    What follows a decode step is never a prompt's, and has time. Begun on the card in the very moment in which that
    step ends, it held up the next one's changes by 0.19 ms (docs/benchmarks.md, "Under load").
    """
    if step.handle is None or isinstance(step.shard, DecodeShard):
        return None
    return step.handle.event


class ThreadedExecutor(Executor):
    """A worker a card, and a worker for the copies that leave it; one for lent steps, where there may be any (`lends`).

    `notify` is called whenever a job has completed.
    """

    def __init__(self, runners: Mapping[int, Runner], notify: Callable[[], None]) -> None:
        super().__init__(runners)
        self._notify = notify
        self._steps: dict[int, deque[tuple[int, Job]]] = {card: deque() for card in runners}
        launch_step = partial(launch_on, runners)
        self._cards = {card: Worker(f"card{card}", launch_step, self._complete) for card in runners}
        # What leaves a card, for the other or (private tails of n > 1) for itself, goes over one stream, in order.
        self._links = {card: Worker(f"copies{card}", self._launch_copy, self._complete) for card in runners}
        # Of its own, so that a decode step waits neither for a lent step's launch nor for its end.
        lending = [card for card, runner in runners.items() if getattr(runner, "lends", False)]
        self._lent = {card: Worker(f"lent{card}", launch_step, self._complete) for card in lending}

    def launch(self, shard: Shard) -> None:
        self.num_in_flight += 1
        if isinstance(shard, CopyShard):
            self._links[shard.src].put(Job(shard, self._source_step(shard)))
            return
        job = Job(shard)
        steps = self._steps[shard.card]
        while steps and steps[0][1].done.is_set():
            steps.popleft()
        steps.append((shard.step, job))
        lent = isinstance(shard, PrefillShard) and shard.lent
        (self._lent if lent else self._cards)[shard.card].put(job)

    def _source_step(self, shard: CopyShard) -> Job | None:
        """The launched step the copy must follow; None if it has completed, and so all that it follows itself. Engine
        thread only, like `launch`."""
        job = next((job for step, job in self._steps[shard.src] if step == shard.after_step), None)
        return None if job is None or job.done.is_set() else job

    def _launch_copy(self, job: Job) -> Handle:
        event = None
        if job.after is not None:
            job.after.launched.wait()
            event = _event_to_wait_for(job.after)
            if event is None:  # nothing for the copy stream to wait for: wait here
                job.after.done.wait()
            if job.after.error is not None:
                raise RuntimeError(f"the step that writes the source of {job.shard} failed") from job.after.error
        return launch_on(self._runners, job, event)

    def _complete(self, job: Job) -> None:
        self._completed.append(job)
        self._notify()

    def progress(self) -> dict[str, Progress]:
        cards = {f"card {card}": worker.progress for card, worker in self._cards.items()}
        lent = {f"lent steps of card {card}": worker.progress for card, worker in self._lent.items()}
        links = {link_name(card): worker.progress for card, worker in self._links.items()}
        return cards | lent | links

    def close(self, limit_s: float = CLOSE_LIMIT_S) -> bool:
        workers = *self._cards.values(), *self._lent.values(), *self._links.values()
        until_s = time.perf_counter() + limit_s
        for worker in workers:
            worker.end()
        return all([worker.join(max(0.0, until_s - time.perf_counter())) for worker in workers])
