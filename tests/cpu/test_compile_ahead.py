"""Calls in several threads: one at a time, but for what Triton says that it compiles."""

from __future__ import annotations

import threading
from typing import NoReturn

import pytest

knobs = pytest.importorskip("triton.knobs")

from nanovllm.engine.compile_ahead import THREADS, run_side_by_side  # noqa: E402


class Alone:
    """Fails who comes in while another thread is there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.entered = 0

    def pass_through(self) -> None:
        assert self._lock.acquire(blocking=False), "two threads at a time"
        self.entered += 1
        threading.Event().wait(0.001)  # lets another thread in, if one may run
        self._lock.release()


def compile_something(during: threading.Barrier | None = None) -> None:
    """As Triton does, to its hooks."""
    assert not knobs.runtime.jit_cache_hook(repr="kernel")
    if during is not None:
        during.wait(timeout=30)
    knobs.runtime.jit_post_compile_hook(repr="kernel")


def test_only_compiling_is_done_side_by_side() -> None:
    alone, together = Alone(), threading.Barrier(THREADS)  # passed only if so many compile at a time

    def call() -> None:
        for _ in range(3):
            alone.pass_through()
            compile_something(together)
            alone.pass_through()

    run_side_by_side([call] * THREADS)
    assert alone.entered == 6 * THREADS


def test_a_failed_compile_is_raised_and_stops_nobody() -> None:
    done = []

    def fail() -> NoReturn:
        knobs.runtime.jit_cache_hook(repr="kernel")
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        run_side_by_side([fail, *[lambda: done.append(compile_something())] * 20])
    assert len(done) == 20
    run_side_by_side([compile_something])  # and the next ones find nothing taken


def test_other_threads_compile_as_before() -> None:
    """One that is not among the calls passes no turn on, and takes none."""
    may_go_on = threading.Event()

    def outsider() -> None:
        compile_something()
        may_go_on.set()

    def call() -> None:
        threading.Thread(target=outsider).start()
        assert may_go_on.wait(30), "a thread that is none of ours waited for its turn"

    run_side_by_side([call])


def test_hooks_of_others_are_called_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    skips = iter([True, False])

    def cache_hook(**about: str) -> bool:
        heard.append(f"begin {about['repr']}")
        return next(skips)

    def post_hook(**about: str) -> None:
        heard.append(f"end {about['repr']}")

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", cache_hook)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", post_hook)

    def call() -> None:
        assert knobs.runtime.jit_cache_hook(repr="skipped")
        compile_something()

    run_side_by_side([call])
    assert heard == ["begin skipped", "begin kernel", "end kernel"]
    assert knobs.runtime.jit_cache_hook is cache_hook and knobs.runtime.jit_post_compile_hook is post_hook


def test_a_kernel_that_another_hook_skips_passes_no_turn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **about: True)
    alone = Alone()

    def call() -> None:
        assert knobs.runtime.jit_cache_hook(repr="skipped")
        alone.pass_through()

    run_side_by_side([call] * THREADS)
    assert alone.entered == THREADS


def test_two_engines_that_start_at_once_leave_no_hook_behind() -> None:
    before = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook
    first_is_in = threading.Event()

    def call() -> None:
        first_is_in.set()
        threading.Event().wait(0.02)
        compile_something()

    engines = [threading.Thread(target=run_side_by_side, args=([call],)) for _ in range(2)]
    engines[0].start()
    first_is_in.wait(30)
    engines[1].start()
    for engine in engines:
        engine.join(30)
    assert (knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook) == before
