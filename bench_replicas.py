"""Engines in processes of their own, one or several, as one target of the load: each request to the least loaded.

`multiprocessing` with fresh interpreters (spawn) and a pipe each. A child's one thread sleeps on its pipe, submits what
arrives, and every 20 ms reports what ended. Times need no translation: `time.perf_counter()` is one clock for all
processes of a Linux machine, and the handshake checks that.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from bench_load import COLLECT_EVERY_S, LocalEngine, Submission, warm_up_load
from bench_metrics import Answer
from bench_report import Stats

PROGRESS_EVERY_S = 0.1  # between looks at the engine's statistics, which cost more than looks at what ended


class Report(NamedTuple):
    """From a child: what ended since the last one, and output tokens sampled since its start, as last looked at."""

    answers: list[Answer]
    sampled_tokens: int


# -- the child


def serve(connection: Connection, folder: str, options: dict[str, Any], warm_up_tokens: int | None) -> None:
    """Main function of a child. A caller's mistake goes to the parent; anything else is printed and ends the pipe."""
    from nanovllm import LLM

    try:
        with LLM(folder, **options) as llm:
            engine = LocalEngine(llm)
            if warm_up_tokens is not None:
                warm_up_load(llm, warm_up_tokens)
            connection.send((time.perf_counter(), engine.about[0], engine.stats()[0]["sampled_tokens"]))
            serve_engine(connection, engine)
    except (ValueError, FileNotFoundError) as error:
        connection.send(error)


def serve_engine(connection: Connection, engine: LocalEngine) -> None:
    """Submit what comes through the pipe and report what ends, until None comes or the parent is gone."""
    collect_s = progress_s = time.perf_counter()
    sampled_tokens = 0
    try:
        while True:
            if connection.poll(max(0.0, collect_s - time.perf_counter())):
                if (message := connection.recv()) is None:
                    return
                if isinstance(message, Submission):
                    engine.submit(message)
                else:
                    connection.send(engine.stats()[0])
            if (now_s := time.perf_counter()) >= collect_s:
                answers = engine.collect()
                if looks := now_s >= progress_s:
                    sampled_tokens = engine.stats()[0]["sampled_tokens"]
                    progress_s = now_s + PROGRESS_EVERY_S
                if answers or looks:
                    connection.send(Report(answers, sampled_tokens))
                collect_s = time.perf_counter() + COLLECT_EVERY_S
    except (EOFError, ConnectionError):
        return


# -- the parent


@dataclass
class Outstanding:
    """What one replica has yet to do: prompt tokens and missing answer tokens of the requests that have not ended.

    A prompt counts in full until its answer has ended: a replica does not tell how much of it is computed.
    """

    open_tokens: int = 0  # prompt and whole answer of requests that have not ended
    sampled_tokens: int = 0  # by the replica, as far as it has told
    ended_tokens: int = 0  # of those, in answers that have ended

    @property
    def tokens(self) -> int:
        return self.open_tokens - (self.sampled_tokens - self.ended_tokens)

    def submitted(self, submission: Submission) -> None:
        self.open_tokens += len(submission.prompt) + submission.num_output_tokens

    def reported(self, report: Report) -> None:
        self.sampled_tokens = report.sampled_tokens
        for answer in report.answers:
            self.open_tokens -= answer.num_prompt_tokens + len(answer.token_ids)
            self.ended_tokens += len(answer.token_ids)


def least_loaded(outstanding_tokens: Sequence[int]) -> int:
    """Index of the replica with the fewest; of equals the first."""
    return min(range(len(outstanding_tokens)), key=lambda index: outstanding_tokens[index])


class Replica:
    """The parent's end of one child, and the books on what it was given."""

    def __init__(self, folder: str, options: dict[str, Any], warm_up_tokens: int | None) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        arguments = (theirs, folder, options, warm_up_tokens)
        self._process = spawn.Process(target=serve, args=arguments, daemon=True)
        self._begin_s = time.perf_counter()
        self._process.start()
        theirs.close()  # else its end would not be seen
        self._answers: list[Answer] = []
        self.outstanding = Outstanding()
        self.about: Stats = {}

    def wait_until_ready(self) -> None:
        child_s, self.about, warm_up_tokens = self._receive()
        if not self._begin_s <= child_s <= time.perf_counter():
            raise RuntimeError("time.perf_counter() differs between processes: no latency could be told")
        self.outstanding = Outstanding(sampled_tokens=warm_up_tokens, ended_tokens=warm_up_tokens)

    def submit(self, submission: Submission) -> None:
        self.outstanding.submitted(submission)
        self._send(submission)

    def collect(self) -> list[Answer]:
        while self._connection.poll(0):
            self._take(self._receive())
        answers, self._answers = self._answers, []
        return answers

    def stats(self) -> Stats:
        self._send("stats")
        while isinstance(message := self._receive(), Report):
            self._take(message)
        return message

    def close(self) -> None:
        try:
            self._connection.send(None)
        except OSError:
            pass  # it has ended already
        self._process.join(timeout=60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _take(self, report: Report) -> None:
        self.outstanding.reported(report)
        self._answers += report.answers

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except ConnectionError:
            while True:  # what it has said before it ended; the last of it raises
                self._take(self._receive())

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError("an engine's process has ended; its message is above") from None
        if isinstance(message, Exception):
            raise message
        return message


class Replicas:
    """Independent engines behind one router. A chat stays where it began: there its prefix is cached."""

    def __init__(self, folder: str, options: Sequence[dict[str, Any]], warm_up_tokens: int | None) -> None:
        """`options`: keywords of `LLM` for each engine; they start at once. Raises what one of them raises."""
        self._replicas = [Replica(folder, keywords, warm_up_tokens) for keywords in options]
        self._homes: dict[int, Replica] = {}
        try:
            for replica in self._replicas:
                replica.wait_until_ready()
        except BaseException:
            self.close()
            raise
        self.about = [replica.about for replica in self._replicas]

    def submit(self, submission: Submission) -> None:
        if submission.turn == 0:
            outstanding = [replica.outstanding.tokens for replica in self._replicas]
            self._homes[submission.conversation] = self._replicas[least_loaded(outstanding)]
        self._homes[submission.conversation].submit(submission)

    def collect(self) -> list[Answer]:
        return [answer for replica in self._replicas for answer in replica.collect()]

    def stats(self) -> list[Stats]:
        return [replica.stats() for replica in self._replicas]

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
