"""Launches in several threads before they are needed, so that the kernels among them are compiled side by side.

Much of compiling is done outside Python, a kernel at a time. All else is done by one thread at a time, since Triton 3.6
has no lock there. Every launcher is loaded as one and the same module, whose `launch` changes when one is loaded again,
as for a second card: between another thread's load and its read that gives a kernel the launcher of another, for ever.
And a kernel that has its launcher, but not its code yet, may be launched by the next thread.

Not covered: kernels that two threads launch for the first time in mid-service, as two cards do with `enforce_eager`.
While the hooks are set that say when Triton compiles, it can compile no kernel that takes a function as an argument.

Nobody may read what these launches compute: they may use buffers that belong to one step at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

THREADS = 8
# Products of more rows are cuBLAS's, which keeps memory on the card for every thread that it has run in.
OWN_KERNEL_ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128)
starting = threading.RLock()  # launchers and hooks are the process's: engines that start at once take turns


def launch_side_by_side(calls: Iterable[Callable[[], object]], stream: torch.cuda.Stream) -> None:
    """Run each call in some thread, what it launches on `stream`; returns when all have been launched. Raises what the
    first call raises that fails."""

    @torch.inference_mode()
    def run(call: Callable[[], object]) -> None:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            call()

    run_side_by_side([partial(run, call) for call in calls])


def run_side_by_side(calls: Iterable[Callable[[], object]]) -> None:
    """Run each call in some thread, one at a time, but for what Triton compiles for them."""
    turns = Turns()

    def run(call: Callable[[], object]) -> None:
        with turns.turn():
            call()

    with starting, turns.passed_on(), ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(run, calls))


class Turns:
    """One thread at a time, except while Triton compiles for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mine = threading.local()  # `has_lock`: False while Triton compiles, absent outside a turn

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for this thread's turn, and keep it within the block."""
        self._take()
        try:
            yield
        finally:
            if self._mine.has_lock:  # not if compiling failed
                self._lock.release()
            del self._mine.has_lock

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        """Within the block a thread's compiling passes its turn on. Hooks that others have set are called as before."""
        from triton import knobs  # here: a CPU build of torch comes without

        hooks = knobs.runtime
        before, after = hooks.jit_cache_hook, hooks.jit_post_compile_hook

        def begin(**compiled: Any) -> bool | None:
            skip = None if before is None else before(**compiled)
            if not skip and getattr(self._mine, "has_lock", False):
                self._mine.has_lock = False
                self._lock.release()
            return skip

        def end(**compiled: Any) -> bool | None:
            if getattr(self._mine, "has_lock", None) is False:
                self._take()
            return None if after is None else after(**compiled)

        hooks.jit_cache_hook, hooks.jit_post_compile_hook = begin, end
        try:
            yield
        finally:
            hooks.jit_cache_hook, hooks.jit_post_compile_hook = before, after

    def _take(self) -> None:
        self._lock.acquire()
        self._mine.has_lock = True
