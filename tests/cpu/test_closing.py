"""`LLM.close` from several threads, and again after it was interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, EngineDeadError, SamplingParams
from tests.cpu.faulty import check_books
from tests.cpu.tiny import make_llm, wait_until, write_model
from tests.faults import FaultInjector, Times, steps_of

LONG = SamplingParams(max_tokens=200, ignore_eos=True)
TIMEOUT_S = 20.0


class Lane:
    """A pipeline's; notes whether a step ran when it was closed."""

    def __init__(self, busy: Busy) -> None:
        self._busy = busy
        self.closed_beside_a_step: list[bool] = []

    def close(self) -> None:
        self.closed_beside_a_step.append(self._busy.running.is_set() and not self._busy.go_on.is_set())


class Busy:
    """One engine whose decode card runs a step that ends when it is told to."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.running, self.go_on = llm, threading.Event(), threading.Event()
        self.lane = Lane(self)
        FaultInjector(llm).before = Times(1, steps_of(1), self._wait)
        llm.decode_runner.pipeline = self.lane  # type: ignore[assignment]
        self._caller = threading.Thread(target=self._generate, daemon=True)
        self._caller.start()
        assert self.running.wait(TIMEOUT_S)

    def _wait(self, *_: Any) -> None:
        self.running.set()
        assert self.go_on.wait(TIMEOUT_S)

    def _generate(self) -> None:
        with suppress(EngineDeadError):
            self.llm.generate([[1, 2, 3]], LONG, use_tqdm=False)

    def check_closed(self) -> None:
        self._caller.join(TIMEOUT_S)
        assert not self._caller.is_alive()
        check_books(self.llm)
        assert self.lane.closed_beside_a_step == [False]
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith("nanovllm")], names


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Busy]:
    llm = make_llm(write_model(tmp_path / "model"), enable_two_gpu_pd=True, num_kvcache_blocks=60)
    busy = Busy(llm)
    yield busy
    busy.go_on.set()
    llm.close()


def test_whoever_closes_second_returns_when_the_engine_is_closed(busy: Busy) -> None:
    """And leaves the pipeline alone as long as a step may be in it."""
    closers = [threading.Thread(target=busy.llm.close, daemon=True) for _ in range(3)]
    for thread in closers:
        thread.start()
    closers[1].join(0.2)
    assert all(thread.is_alive() for thread in closers) and busy.lane.closed_beside_a_step == []
    busy.go_on.set()
    for thread in closers:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    busy.check_closed()


def test_close_again_after_an_interrupt_closes(busy: Busy) -> None:
    def interrupt() -> None:
        wait_until(lambda: busy.llm._engine._closing)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            busy.llm.close()
    finally:
        signal.signal(signal.SIGINT, before)
    assert busy.lane.closed_beside_a_step == []
    busy.go_on.set()
    busy.llm.close()
    busy.check_closed()
    with pytest.raises(EngineDeadError):
        busy.llm.start_metrics_server()
