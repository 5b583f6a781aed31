"""Calls in several threads: one at a time, but for what Triton says that it compiles."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NoReturn
from unittest.mock import MagicMock

import pytest
import torch

knobs = pytest.importorskip("triton.knobs")

from nanovllm.config import Config  # noqa: E402
from nanovllm.engine import cards  # noqa: E402
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


@pytest.mark.parametrize("while_compiling", [True, False])
def test_an_error_is_raised_and_leaves_nothing_taken(while_compiling: bool) -> None:
    hooks = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook

    def fail() -> NoReturn:
        if while_compiling:
            knobs.runtime.jit_cache_hook(repr="kernel")
        threading.Event().wait(0.05)  # the others have begun, and wait for their turns or have had them
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        run_side_by_side([fail, *[compile_something] * (THREADS - 1)])
    assert (knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook) == hooks
    run_side_by_side([compile_something])


def test_other_threads_compile_as_before() -> None:
    """One that is not among the calls passes no turn on, and takes none."""
    may_go_on, alone = threading.Event(), Alone()

    def outsider() -> None:
        assert not knobs.runtime.jit_cache_hook(repr="kernel")
        threading.Event().wait(0.02)  # long enough for another thread to get in, if its turn has come
        knobs.runtime.jit_post_compile_hook(repr="kernel")
        may_go_on.set()

    def first() -> None:
        before = alone.entered
        threading.Thread(target=outsider).start()
        assert may_go_on.wait(30), "a thread that is none of ours waited for its turn"
        assert alone.entered == before, "it passed on what was not its own"
        alone.pass_through()

    run_side_by_side([first, *[alone.pass_through] * (THREADS - 1)])
    assert alone.entered == THREADS


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


def test_engines_that_start_at_once_prepare_their_cards_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they launch for the first time outside of the above would be launched beside each other."""
    alone, config, device = Alone(), Config.from_kwargs("none", {}), torch.device("cuda", 0)
    for name in ("resolve_dtype", "make_attention_backend", "load_model", "make_runner", "start_line"):
        monkeypatch.setattr(cards, name, MagicMock())
    monkeypatch.setattr(cards.torch, "zeros", MagicMock())
    monkeypatch.setattr(cards, "prepare", lambda *args: alone.pass_through())
    build = partial(cards.build_runners, config, Path(), MagicMock(), 16, [device], Counter())
    with ThreadPoolExecutor(THREADS) as threads:
        assert [len(runners.result()) for runners in [threads.submit(build) for _ in range(THREADS)]] == [1] * THREADS
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
