"""Makes things fail in a running engine, as hardware and callers do: for tests and tools/soak.py, on CPUs and GPUs.

Everything is put in from outside, between an `LLM` and its runners: the engine has no code for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from nanovllm import LLM
from nanovllm.engine.model_runner import ModelRunner

STEPS = ("run_prefill", "run_decode_core", "run_mixed")
ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"  # torch's words


class FaultInjector:
    """Wraps the runners' entries. `before(entry, shard)` may raise, or wait; `after(entry, shard, handle)` may raise,
    or spoil what was done, which on a CPU has ended. Both are called in the thread that launches."""

    def __init__(self, llm: LLM) -> None:
        self.before: Callable[[str, Any], None] = lambda entry, shard: None
        self.after: Callable[[str, Any, Any], None] = lambda entry, shard, handle: None
        runners = dict.fromkeys((llm.prefill_runner, llm.decode_runner))  # one card plays both roles
        for runner in runners:
            for entry in (*STEPS, "run_copy"):
                self._wrap(runner, entry)

    def _wrap(self, runner: ModelRunner, entry: str) -> None:
        run = getattr(runner, entry)

        def run_and_fail(shard: Any, *arguments: Any) -> Any:
            self.before(entry, shard)
            handle = run(shard, *arguments)
            self.after(entry, shard, handle)
            return handle

        setattr(runner, entry, run_and_fail)


class Times:
    """Calls `act` with what it is called with, the first `times` times that `wanted` says so."""

    def __init__(self, times: int, wanted: Callable[..., bool], act: Callable[..., None]) -> None:
        self.left, self._wanted, self._act, self._lock = times, wanted, act, threading.Lock()

    def __call__(self, *arguments: Any) -> None:
        with self._lock:  # cards launch in threads of their own
            mine = self.left > 0 and self._wanted(*arguments)
            self.left -= mine
        if mine:
            self._act(*arguments)


def fails(error: BaseException) -> Callable[..., None]:
    """Whoever calls it gets the error."""

    def act(*arguments: Any) -> None:
        raise error

    return act


def copies_across(entry: str, shard: Any, *handle: Any) -> bool:
    return entry == "run_copy" and shard.src != shard.dst


def steps_of(card: int, *entries: str) -> Callable[..., bool]:
    """Of a card: any step, or one of these entries."""
    return lambda entry, shard, *handle: entry in (entries or STEPS) and shard.card == card
