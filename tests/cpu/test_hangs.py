"""Workers, loops and copies that never end: everybody who waits is told."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from nanovllm import EngineDeadError, SamplingParams
from nanovllm.engine import llm_engine, watchdog
from nanovllm.engine.detokenizer import StopWatcher
from nanovllm.engine.watchdog import LOOKS, PASSES, Progress, Watchdog
from tests.cpu.faulty import ANSWER_LIMIT_S, GREEDY, BrokenLane, check_books, tokens_of
from tests.cpu.tiny import make_llm, write_model
from tests.faults import ILLEGAL_ACCESS, FaultInjector, Times, fails, steps_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("entry", ["run_prefill", "run_copy", "step of card 1"])
def test_a_worker_that_hangs_is_noticed(folder: Path, entry: str) -> None:
    hang = threading.Event()
    with make_llm(folder, enable_two_gpu_pd=True, hang_limit_s=0.5) as llm:
        wanted = steps_of(1) if entry == "step of card 1" else lambda name, shard: name == entry
        FaultInjector(llm).before = Times(1, wanted, lambda *shard: hang.wait(60))
        with pytest.raises(EngineDeadError, match="nothing was finished for hang_limit_s=0.5"):
            tokens_of(llm)
        with pytest.raises(EngineDeadError):
            llm.add_request([1])
        closing = time.monotonic()
        llm.close()
        assert time.monotonic() - closing < ANSWER_LIMIT_S
    hang.set()


def test_closing_does_not_wait_for_a_worker_that_does_not_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it ask the card for anything then, which might hang as well."""
    hang, reached, lane = threading.Event(), threading.Event(), BrokenLane()
    with make_llm(folder, enable_two_gpu_pd=True) as llm:
        llm.decode_runner.pipeline = lane  # type: ignore[assignment]
        stuck = Times(1, steps_of(0), lambda *shard: reached.set() or hang.wait(60))
        FaultInjector(llm).before = stuck
        llm.add_request([1, 2, 3], GREEDY)
        assert reached.wait(20)
        monkeypatch.setattr(llm_engine, "CLOSE_LIMIT_S", 0.2)
        llm.close()
        assert llm._engine.hung and not lane.closed and "a worker has not ended within 0.2 s" in caplog.text
    hang.set()


def test_a_loop_that_hangs_is_noticed_by_whoever_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    with make_llm(folder, hang_limit_s=0.3) as llm:
        monkeypatch.setattr(StopWatcher, "push", lambda self, token, search: hang.wait(60) and None)
        with pytest.raises(EngineDeadError, match="the engine loop has not gone round"):
            llm.generate("abc", SamplingParams(stop="x", max_tokens=200, ignore_eos=True), use_tqdm=False)
        llm._engine._closing = True
        hang.set()  # the loop goes on, and ends with a request that nobody waits for any more
    check_books(llm)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_handler_that_raises_delays_nobody(folder: Path) -> None:
    """Who waits hears of the engine's end, and why, before anybody reads of it in a log."""

    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("disk full")

    logger, handler = logging.getLogger("nanovllm"), Raising(logging.ERROR)
    logger.addHandler(handler)
    try:
        with make_llm(folder, enable_two_gpu_pd=True) as llm:
            FaultInjector(llm).before = Times(1, steps_of(1), fails(RuntimeError(ILLEGAL_ACCESS)))
            begun = time.monotonic()
            with pytest.raises(EngineDeadError, match="illegal memory access"):
                tokens_of(llm)
            assert time.monotonic() - begun < ANSWER_LIMIT_S
        check_books(llm)
    finally:
        logger.removeHandler(handler)


def test_slow_is_not_hung(folder: Path) -> None:
    with make_llm(folder, overlap=False) as llm:
        expected = tokens_of(llm)
    with make_llm(folder, enable_two_gpu_pd=True, hang_limit_s=1.0) as llm:
        FaultInjector(llm).before = Times(3, lambda *shard: True, lambda *shard: time.sleep(0.4))
        assert tokens_of(llm) == expected


def test_a_copy_whose_end_nobody_heard_of_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompt would wait for ever, while others go on."""
    monkeypatch.setattr(watchdog, "LOOKS", 1000)  # often; what hangs for a minute is not this test's
    with make_llm(folder, enable_two_gpu_pd=True, pd_roles="strict", hang_limit_s=60.0) as llm:
        link = llm._engine.executor._links[0]  # type: ignore[attr-defined]
        complete, dropped, ends = link._complete, [], []
        link._complete = lambda job: complete(job) if dropped else dropped.append(job)

        def go_on() -> None:
            with pytest.raises(EngineDeadError, match="were done, and never arrived"):
                while True:
                    tokens_of(llm)
            ends.append(True)

        callers = [threading.Thread(target=go_on, daemon=True) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert len(ends) == 2 and len(dropped) == 1, "somebody still waits"


def test_watchdog_waits_for_slow_copies() -> None:
    """However often it looks: only a worker that has been past a copy shows that it was overlooked."""
    dog = Watchdog(60.0)
    for look in range(10 * PASSES):  # 7 is the worker's next job, then the one after that, and so on
        assert dog.overlooked({7: Progress(20 + look, 6)}) == []
    for look in range(PASSES):
        assert dog.overlooked({7: Progress(300 + 9 * look, 300 + 9 * look)}) == ([7] if look == PASSES - 1 else [])
    assert dog.overlooked({8: Progress(300, 300)}) == [] and dog.overlooked({}) == []


def test_watchdog_counts_looks_not_seconds() -> None:
    """So that a process that was stopped for a minute does not take its cards for hung."""
    dog, stuck = Watchdog(60.0), {"card 0": Progress(3, 1), "card 1": Progress(5, 5)}
    for look in range(LOOKS):
        assert dog.look(1e6 * look, stuck) == []
    assert dog.look(1e9, stuck) == ["card 0"] and dog.next_look_s == 1e9 + 15.0
    assert dog.look(1e9, stuck | {"card 0": Progress(4, 2)}) == []


def test_whoever_waits_for_a_step_does_not_hang_himself() -> None:
    """Steps may take nearly as long as the limit, and copies follow them."""
    dog, waiting = Watchdog(60.0), {"card 1": Progress(3, 2), "copies from card 1": Progress(5, 2, waits=True)}
    for look in range(3 * LOOKS):
        slow = {"card 1": Progress(10 + look, 2 + look // (LOOKS - 1))}
        assert dog.look(1e6 * look, waiting | slow) == []
    own = {"copies from card 1": Progress(5, 2)}
    assert [dog.look(0.0, own) for _ in range(LOOKS)] == [[]] * (LOOKS - 1) + [["copies from card 1"]]
