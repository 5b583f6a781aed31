"""Notices workers that have work and finish none of it, and copies that workers have done and nobody heard of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

LOOKS = 4  # within the limit: a process that was stopped for a while, and goes on, counts as one look
PASSES = 2 * LOOKS  # more than a copy and its retries make, each perhaps looked at between its end and the news of it


class Progress(NamedTuple):
    """Jobs of a worker since the start. `waits`: the next one to end follows another worker's, which has not ended."""

    given: int
    done: int
    waits: bool = False


class Watchdog:
    """Looks at workers every `interval_s`; one that stands still for `limit_s` hangs. One thread."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.interval_s = limit_s, limit_s / LOOKS
        self.next_look_s = time.perf_counter() + self.interval_s
        self._seen: dict[str, tuple[int, int]] = {}  # by worker: jobs done, and looks at which it was so
        self._passes: dict[int, tuple[int, int]] = {}  # by copy: jobs given when last passed, and how often it was

    def look(self, now_s: float, workers: Mapping[str, Progress]) -> list[str]:
        """The workers that hang. now_s: of `time.perf_counter()`."""
        self.next_look_s = now_s + self.interval_s
        for name, worker in workers.items():
            done, looks = self._seen.get(name, (-1, 0))
            still = worker.given > worker.done == done and not worker.waits  # whom it waits for is looked at, too
            self._seen[name] = worker.done, looks + 1 if still else 0
        return [name for name, (_, looks) in self._seen.items() if looks >= LOOKS]

    def overlooked(self, copies: Mapping[int, Progress]) -> list[int]:
        """Of the copies in flight, each with its worker's progress, those that it has passed too often: it runs them in
        order, so what it had been given when a copy was first seen is done with the copy, however slow it is."""
        seen, self._passes = self._passes, {}
        for copy, worker in copies.items():
            given, passes = seen.get(copy, (worker.given, 0))
            passed = worker.done >= given
            self._passes[copy] = worker.given if passed else given, passes + passed
        return [copy for copy, (_, passes) in self._passes.items() if passes >= PASSES]
