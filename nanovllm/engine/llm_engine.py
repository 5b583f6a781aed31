"""The loop: take what callers left in the inbox, collect what cards completed, schedule, launch.

With `overlap` one engine thread runs it and owns all plan state; callers only put messages and read their queue.
Without, whoever waits for an output runs it, in the same order, with nothing in flight: the plain twin.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanovllm.config import Config
from nanovllm.engine.executor import Executor, Job
from nanovllm.engine.metrics import EngineMetrics
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Request, Sequence, append_sampled

if TYPE_CHECKING:  # it imports torch
    from nanovllm.engine.trace import TraceRecorder

logger = logging.getLogger("nanovllm")


class EngineDeadError(RuntimeError):
    """The engine has failed or was closed; it answers no more requests. The cause is chained."""


class OutputQueue:
    """Requests that advanced, each at most once, in order. Written by the engine, read by one caller.

    only_ends: their last step alone. Whoever wants whole answers need not be woken in each step, and keep the
    interpreter from the engine for it.
    """

    def __init__(self, only_ends: bool = False) -> None:
        self.only_ends = only_ends
        self._condition = threading.Condition()
        self._advanced: dict[Request, None] = {}
        self._error: BaseException | None = None

    def put(self, requests: Iterable[Request]) -> None:
        with self._condition:
            self._advanced.update(dict.fromkeys(requests))
            self._condition.notify()

    def fail(self, error: BaseException) -> None:
        with self._condition:
            self._error = error
            self._condition.notify_all()

    def __bool__(self) -> bool:
        return bool(self._advanced)

    def take(self, timeout_s: float | None) -> list[Request]:
        """Everything that advanced since the last call; waits up to `timeout_s` for the first. Raises if failed."""
        with self._condition:
            self._condition.wait_for(lambda: self._advanced or self._error, timeout_s)
            taken, self._advanced = list(self._advanced), {}
            if self._error is not None and not taken:
                raise EngineDeadError(f"the engine has stopped: {self._error}") from self._error
            return taken


class LLMEngine:
    """Drives one `Scheduler` over one `Executor`. Touches no tensor."""

    def __init__(
        self, config: Config, scheduler: Scheduler, make_executor: Callable[[Callable[[], None]], Executor]
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.metrics = EngineMetrics(len(scheduler.managers))
        self._inbox: deque[tuple[Request, OutputQueue] | str] = deque()
        self._live: dict[str, Request] = {}
        self._queues: dict[Request, OutputQueue] = {}  # of those that live
        self._wake = threading.Event()
        self._lock = threading.RLock()
        self._closing = False
        self._error: BaseException | None = None
        self.executor = make_executor(self._wake.set)
        self.trace: TraceRecorder | None = None
        self.tracing = threading.Lock()  # held while a trace is on
        self._thread: threading.Thread | None = None

    # -- callers' side, any thread

    def start(self) -> None:
        """Give the loop a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="nanovllm-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, queue: OutputQueue) -> None:
        with self._lock:
            if self._error is not None:
                raise EngineDeadError(f"the engine has stopped: {self._error}") from self._error
            self._live[request.request_id] = request
            self._queues[request] = queue
        self._inbox.append((request, queue))
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """End a request soon; unknown or finished ones are left alone."""
        self._inbox.append(request_id)
        self._wake.set()

    def has_unfinished(self, queue: OutputQueue | None = None) -> bool:
        """Whether any request is unfinished; of `queue`: unfinished, or told there since it was last taken from."""
        with self._lock:
            if queue is None:
                return bool(self._live)
            return bool(queue) or any(owner is queue for owner in self._queues.values())

    def wait(self, queue: OutputQueue) -> list[Request]:
        """Requests that `queue` was told of; waits for at least one. Without an engine thread, runs the loop."""
        if self._thread is not None:
            return queue.take(None)
        while not (advanced := queue.take(0)):
            self._drive()
        return advanced

    def _drive(self) -> None:
        with self._lock, _interrupts_held():
            if self._error is None:
                try:
                    if self._closing:
                        raise EngineDeadError("closed")
                    if not self.step():
                        self._check_progress()
                except BaseException as error:  # whatever it was, the plan is half made
                    self._die(error)
                    if not isinstance(error, Exception):
                        raise

    def close(self) -> None:
        """Stop the loop and the workers; callers that still wait get `EngineDeadError`. Safe to call twice."""
        self._closing = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=60)
        if self._error is None:
            self._die(EngineDeadError("closed"))
        self.executor.close()  # last: it waits for what the cards run now, callers need not

    # -- the loop, one thread

    def step(self) -> bool:
        """One iteration. True if anything happened."""
        trace, begin_s, begin_cpu_s = self.trace, time.perf_counter(), time.thread_time()
        messages = self._take_inbox()
        jobs = self.executor.poll()
        for job in jobs:
            self._collect(job)
        shards = self.scheduler.schedule()
        for shard in shards:
            self.executor.launch(shard)
        happened = bool(messages or jobs or shards)
        if happened:
            self.metrics.loop_seconds += time.perf_counter() - begin_s
            self.metrics.loop_cpu_seconds += time.thread_time() - begin_cpu_s
            if trace is not None:
                trace.add_iteration(begin_s, messages, len(jobs), len(shards))
        return happened

    def _run(self) -> None:
        try:
            while True:
                self._wake.clear()
                if self._closing:  # looked at after `clear`: `close` sets it before it wakes the loop
                    return
                if not self.step():
                    self._check_progress()
                    self._wake.wait()
        except BaseException as error:
            logger.exception("the engine loop failed")
            self._die(error)

    def _take_inbox(self) -> int:
        count = 0
        while self._inbox:
            message = self._inbox.popleft()
            count += 1
            if isinstance(message, tuple):
                self.scheduler.add(message[0])
            else:
                self._abort(message)
        return count

    def _abort(self, request_id: str) -> None:
        request = self._live.get(request_id)
        if request is not None:
            for sequence in request.sequences:
                self._finish(sequence, "abort")
            self._advanced([request], [request])

    def _collect(self, job: Job) -> None:
        if job.error is not None:
            raise job.error
        rows, result = self.scheduler.complete(job.shard, job.result, job.seconds)
        self.metrics.record(job, len(rows))
        while self.scheduler.exposed_copies_s:
            self.metrics.exposed_copy_ms.add(self.scheduler.exposed_copies_s.pop())
        if (trace := self.trace) is not None:
            trace.add_job(job, rows)
        now_s = time.perf_counter()
        self.metrics.requests.add_tokens(rows, now_s)
        may_have_ended = append_sampled(rows, result, now_s)
        for sequence in may_have_ended:
            self._settle(sequence)
        ended = [sequence.request for sequence in may_have_ended if sequence.request.finished]
        self._advanced([sequence.request for sequence in rows], ended)

    def _settle(self, sequence: Sequence) -> None:
        """Its last token ends it, or stays."""
        reason, stop_reason = stop_of(sequence)
        if reason is not None:
            self._finish(sequence, reason, stop_reason)
        else:
            sequence.num_settled_outputs = sequence.num_output_tokens

    def _finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        if sequence.finished:
            return
        if sequence.watcher is not None:
            sequence.watcher.flush()
        self.scheduler.finish(sequence, reason, stop_reason)
        self.metrics.requests.add_end(sequence, reason)

    def _advanced(self, requests: Iterable[Request], ended: Iterable[Request]) -> None:
        """Tell their queues. A request's end is in its queue at the moment it stops being unfinished."""
        with self._lock:
            for queue, advanced in groupby(requests, self._queues.__getitem__):
                if not queue.only_ends:
                    queue.put(advanced)
            for request in dict.fromkeys(ended):
                del self._live[request.request_id]
                queue = self._queues.pop(request)
                if queue.only_ends:
                    queue.put([request])

    def _check_progress(self) -> None:
        """Nothing happened: then either something is in flight or nothing is left to do."""
        if self.executor.num_in_flight == 0 and not self.scheduler.idle and not self._inbox:
            raise RuntimeError(f"the plan is stuck: {self.scheduler.describe()}")

    def _die(self, error: BaseException) -> None:
        if not isinstance(error, EngineDeadError):  # that is what closing raises
            self.metrics.errors["engine"] += 1
        with self._lock:
            self._error = error
            queues = set(self._queues.values())
            self._live.clear()
            self._queues.clear()
        for queue in queues:
            queue.fail(error)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and the queues as they are now."""
        return {
            "uptime": time.perf_counter() - self.metrics.started,
            **self.scheduler.stats(),
            **self.metrics.as_dict(),
        }


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C in the middle of a step would leave the plan half made: it takes effect when the step has ended."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *call: held.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(*held[-1])


def stop_of(sequence: Sequence) -> tuple[str | None, int | str | None]:
    """(finish reason, stop reason) of a sequence that just grew, (None, None) if it goes on; vLLM's order of checks."""
    request, params, token = sequence.request, sequence.request.params, sequence.tokens[-1]
    past_minimum = sequence.num_output_tokens >= params.min_tokens
    if past_minimum and token in request.eos_token_ids:
        return _by_id(sequence, token, None)
    if past_minimum and token in request.stop_token_ids:
        return _by_id(sequence, token, token)
    if sequence.watcher is not None:
        # The text of the first min_tokens tokens may contain a stop string, what comes after may not.
        found = sequence.watcher.push(token, search=sequence.num_output_tokens > params.min_tokens)
        if found is not None:
            return "stop", found
    return ("length", None) if sequence.num_output_tokens >= request.max_tokens else (None, None)


def _by_id(sequence: Sequence, token: int, stop_reason: int | None) -> tuple[str, int | None]:
    if sequence.watcher is not None and sequence.request.params.include_stop_str_in_output:
        sequence.watcher.push(token, search=False)
    return "stop", stop_reason
