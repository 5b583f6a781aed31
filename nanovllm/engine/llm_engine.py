"""The loop: take what callers left in the inbox, collect what cards completed, schedule, launch.

With `overlap` one engine thread runs it and owns all plan state; callers only put messages and read their queue.
Without, whoever waits for an output runs it, in the same order, with nothing in flight: the plain twin.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from nanovllm.config import Config
from nanovllm.engine.executor import CLOSE_LIMIT_S, Executor, Job, link_name
from nanovllm.engine.faults import Faults, Verdict, describe, is_sticky, let_go_of_frames
from nanovllm.engine.interpreter import interrupts_held
from nanovllm.engine.metrics import EngineMetrics
from nanovllm.engine.output_queue import EngineDeadError, OutputQueue
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Request, Sequence, append_sampled
from nanovllm.engine.shards import NO_TOKEN
from nanovllm.engine.stopping import stop_of
from nanovllm.engine.watchdog import Watchdog

if TYPE_CHECKING:  # it imports torch
    from nanovllm.engine.trace import TraceRecorder

logger = logging.getLogger("nanovllm")

GATHER_S = 0.001  # for which requests are gathered that cannot be begun now
HUNG_CLOSE_S = 1.0  # how long closing waits for workers of which one hangs


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
        self._gathers = False  # requests, which need not wake it
        self._only_heard = False  # in its last iteration, which launched and collected nothing while cards were busy
        self._lock = threading.RLock()
        self._closing = False
        self._error: BaseException | None = None
        self._uncollected: list[Job] = []  # completed, when an error ended the loop
        self.hung = False  # a worker, or the loop itself: whoever waited for it would wait for ever
        self.faults = Faults(len(scheduler.managers))
        self._watchdog = Watchdog(config.hang_limit_s)
        self._beat_s = time.perf_counter()  # when the loop last began an iteration
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
        if not self._gathers:  # looked at behind the append: a loop that gathers has yet to look
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
        while not (advanced := queue.take(0 if self._thread is None else self.config.hang_limit_s)):
            if self._thread is None:
                self._drive()
            else:
                self._listen(queue)
        return advanced

    def _listen(self, queue: OutputQueue) -> None:
        """Nothing came for a while: the loop may have much to do, but it must go round. Looked at for long enough that
        it would also do so where the whole process was stopped meanwhile."""
        beat_s = self._beat_s
        if not queue.wait(self.config.hang_limit_s) and self._beat_s == beat_s and self._error is None:
            self.hung = True
            self._die(TimeoutError(f"the engine loop has not gone round for {self.config.hang_limit_s:g} s"))

    def _drive(self) -> None:
        with self._lock, interrupts_held():
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
        limit_s = HUNG_CLOSE_S if self.hung else CLOSE_LIMIT_S
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(limit_s)
        if self._error is None:
            self._die(EngineDeadError("closed"))
        if not self.executor.close(limit_s):  # last: it waits for what the cards run now, callers need not
            self.hung = True
            logger.warning("closing: a worker has not ended within %g s, and is left behind", limit_s)
        if self._owns_plan:
            self._clear_plan()  # by now at the latest: a loop that was given up as hung has had it till here
            self._forget_rest()

    # -- the loop, one thread

    def step(self) -> bool:
        """One iteration. True if anything happened."""
        trace, begin_s, begin_cpu_s = self.trace, time.perf_counter(), time.thread_time()
        self._beat_s = begin_s
        messages = self._take_inbox()
        jobs = self.executor.poll()
        self._collect_all(jobs)
        num_launched = 0
        for shard in self.scheduler.schedule():
            self.executor.launch(shard)
            num_launched += 1
        happened = bool(messages or jobs or num_launched)
        self._only_heard = bool(messages) and not (jobs or num_launched) and self.executor.num_in_flight > 0
        if happened:
            self.metrics.loop_seconds += time.perf_counter() - begin_s
            self.metrics.loop_cpu_seconds += time.thread_time() - begin_cpu_s
            if trace is not None:
                trace.add_iteration(begin_s, messages, len(jobs), num_launched)
        return happened

    def _run(self) -> None:
        try:
            while True:
                self._wake.clear()
                if self._closing:  # looked at after `clear`: `close` sets it before it wakes the loop
                    return
                if not self.step():
                    self._check_progress()
                    self._wake.wait(self._watchdog.interval_s)
                elif self._only_heard:
                    self._gather()
                if self._beat_s >= self._watchdog.next_look_s:
                    self._look_for_hangs()
        except BaseException as error:
            self._die(error)  # first: a handler of the caller's may raise
            logger.error("the engine loop failed", exc_info=error)

    def _gather(self) -> None:
        """Requests came that cannot be begun now, and more may follow at once. Woken for each of a thousand, the loop
        would keep the interpreter from the caller and from the workers: only what else happens wakes it for a moment.
        """
        self._gathers = True
        self._wake.wait(GATHER_S)
        self._gathers = False  # before the inbox is looked at

    def _look_for_hangs(self) -> None:
        workers = self.executor.progress()
        hanging = self._watchdog.look(self._beat_s, workers)
        if hanging:
            self.hung = True
            names = " and ".join(hanging)
            raise TimeoutError(f"{names}: nothing was finished for hang_limit_s={self.config.hang_limit_s:g}")
        pending = {number: link_name(copy.shard.src) for number, copy in self.scheduler.handoff.pending.items()}
        copies = {number: workers[link] for number, link in pending.items() if link in workers}
        if overlooked := self._watchdog.overlooked(copies):
            raise RuntimeError(f"copies {overlooked} were done, and never arrived: {self.scheduler.describe()}")

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

    def _collect_all(self, jobs: list[Job]) -> None:
        left = iter(jobs)
        try:
            for job in left:
                self._collect(job)
        except BaseException:
            self._uncollected = [job, *left]
            raise

    def _collect(self, job: Job) -> None:
        if (job.error is not None or self.faults.any) and self._absorb(job):
            return
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

    def _absorb(self, job: Job) -> bool:
        """Act on a job that failed, or whose card is lost; False if it is neither. Raises what nobody survives."""
        recovery, shard = self.scheduler.recovery, job.shard
        orphan = recovery.is_orphan(shard)
        if job.error is None and not orphan:
            self.faults.arrived(shard)
            return False
        if job.error is not None and is_sticky(job.error):
            raise job.error
        if orphan:
            recovery.forget(shard)
        else:
            self._act(self.faults.judge(job), job)
        let_go_of_frames(job.error)
        return True

    def _act(self, verdict: Verdict, job: Job) -> None:
        recovery, shard = self.scheduler.recovery, job.shard
        assert job.error is not None
        if verdict is Verdict.DIE:
            raise job.error
        if verdict is Verdict.RETRY:
            self.executor.launch(shard)
            return
        if verdict is Verdict.LOSE_CARD:
            self._lose_card()
        else:
            self.metrics.errors["copy"] += 1
            logger.warning("a copy was given up, its prompts are prefilled again: %s", describe(job.error))
        recovery.forget(shard)

    def _lose_card(self) -> None:
        lost = self.faults.lost_card
        assert lost is not None
        self.metrics.errors["card"] += 1
        if eager := self.executor.eager_steps(1 - lost):
            self.faults.cause = f"{self.faults.cause}; card {1 - lost} has no CUDA graphs of {', '.join(eager)} steps"
        logger.warning("card %d is not used any more, card %d goes on alone: %s", lost, 1 - lost, self.faults.cause)
        self.scheduler.recovery.lose_card(lost)

    def _settle(self, sequence: Sequence) -> None:
        """Its last token ends it, or stays."""
        if sequence.finished:  # a sibling's failure ended it
            return
        if sequence.tokens[-1] == NO_TOKEN:
            self._fail(sequence.request, "logits", "the model's logits are no numbers")
            self.scheduler.handoff.distrust(sequence)  # the cause may be in a block that others would share
            return
        try:
            reason, stop_reason = stop_of(sequence)
        except BaseException as error:  # the tokenizer's, on this text; a panic in it is no Exception
            self._fail_text(sequence.request, error)
            return
        if reason is not None:
            self._finish(sequence, reason, stop_reason)
        else:
            sequence.num_settled_outputs = sequence.num_output_tokens

    def _fail_text(self, request: Request, error: BaseException) -> None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):  # the caller's, without `overlap`
            raise error
        self._fail(request, "tokenizer", describe(error))

    def _fail(self, request: Request, kind: str, text: str) -> None:
        """End all answers of a request that cannot be answered; the others go on."""
        self.metrics.errors[kind] += 1
        logger.warning("request %s failed: %s", request.request_id, text)
        for sequence in request.sequences:
            if sequence.finished:
                continue
            if sequence.tokens[-1] == NO_TOKEN:  # not settled yet: no reader has seen it
                sequence.take_back()
            sequence.error = text
            self._finish(sequence, "error")

    def _finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        if sequence.finished:
            return
        if sequence.watcher is not None and reason != "error":
            try:
                sequence.watcher.flush()
            except BaseException as error:  # as above
                self._fail_text(sequence.request, error)
                return
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

    @property
    def _owns_plan(self) -> bool:
        """Whether nobody but the caller can be in the loop."""
        return self._thread is None or self._thread is threading.current_thread() or not self._thread.is_alive()

    def _die(self, error: BaseException) -> None:
        """Tell everybody who waits. What sequences hold is let go of, what is in flight counts no more."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            queues = set(self._queues.values())
            self._live.clear()
            self._queues.clear()
        self.metrics.errors["engine"] += not isinstance(error, EngineDeadError)  # that is what closing raises
        if self._owns_plan:
            self._clear_plan()
        for queue in queues:
            queue.fail(error)

    def _clear_plan(self) -> None:
        try:
            self.scheduler.recovery.clear()
        except Exception:  # the plan itself was what failed: callers must hear of it all the same
            logger.exception("what the engine held could not be let go of")

    @property
    def may_use_cards(self) -> bool:
        """Whether the cards can be told anything more: no worker hangs, and no error has left them unusable."""
        return not self.hung and not (isinstance(self._error, Exception) and is_sticky(self._error))

    def _forget_rest(self) -> None:
        """What the workers completed since the loop ended, and what it ended with, lets go of its blocks."""
        jobs, self._uncollected = [*self._uncollected, *self.executor.poll()], []
        try:
            for job in jobs:
                self.scheduler.recovery.forget(job.shard)
        except Exception:  # as above
            logger.exception("what was in flight could not be let go of")

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and the queues as they are now. `degraded`: why one card goes on alone, or None."""
        return {
            "uptime": time.perf_counter() - self.metrics.started,
            **self.scheduler.stats(),
            **self.metrics.as_dict(),
            "copy_retries": self.faults.copy_retries,
            "degraded": self.faults.cause,
        }
