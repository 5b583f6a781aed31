"""Aborts and faults in every state of a running engine: threads, CPU cards, pools so small that sequences move."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, EngineDeadError, SamplingParams
from nanovllm.engine.request_states import State
from nanovllm.engine.sequence import Sequence
from tests.cpu.test_fault_worlds import LIVING, ON_THEIR_WAY, Witness, name_of
from tests.cpu.tiny import make_llm, settle, write_model
from tests.faults import ILLEGAL_ACCESS, FaultInjector, Times, copies_across, fails, steps_of

PROMPTS = [[13 * n % 200 + 1 + i for i in range(3 + 17 * (n % 4))] for n in range(8)]
PARAMS = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
MAX_RUNS = 30
HOLD_S, LOOK_S = 0.02, 0.001  # a card is held this long for a state to come, and looks this often
SMALL = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "decode_backlog_high": 4,
    "run_ahead": 3,
    "num_kvcache_blocks": (10, 12),
}
# The simulated device meets every pair (test_fault_worlds.py). Here some hardly ever come: while sequences are away
# from the decode card, card 0 begins no prompt and card 1 waits for them; and CPU copies end long before their prompt.
NEVER = [("card 0", state) for state in ("EVACUATING", "EVACUATED", "RETURNING", "PREEMPTED")]
NEVER += [("card 1", "RETURNING"), ("copy", "PREFILLING")]
PAIRS = [
    *itertools.product(["abort", "card 0", "card 1", "end"], LIVING),
    *itertools.product(["copy"], ON_THEIR_WAY),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with make_llm(folder, overlap=False) as llm:
        return [output["token_ids"] for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def sequences_in(llm: LLM, state: str) -> list[Sequence]:
    """As they are at this moment, seen from another thread."""
    requests = list(llm._engine._live.values())
    return [sequence for request in requests for sequence in request.sequences if name_of(sequence) == state]


def make_happen(llm: LLM, event: str, state: str, hold_s: float) -> None:
    """Once a sequence is seen in this state, from the thread that launches something: abort it, or fail.

    A card that shall fail is held for a while, so that everything else comes to what may happen without it.
    """
    injector = FaultInjector(llm)

    def abort(*shard: Any) -> None:
        for sequence in sequences_in(llm, state)[:1]:
            aborter = threading.Thread(target=llm.abort, args=(sequence.request.request_id,))
            aborter.start()
            aborter.join()

    if event == "abort":
        injector.before = Times(3, lambda *shard: bool(sequences_in(llm, state)), abort)
    elif event == "copy":
        injector.before = CopyThatFails(lambda: bool(sequences_in(llm, state)))
    else:
        held = {"card 0": steps_of(0), "card 1": steps_of(1), "end": lambda entry, shard: True}[event]
        error = RuntimeError(ILLEGAL_ACCESS if event == "end" else "a bug")
        injector.before = Times(1, lambda *shard: held(*shard) and comes(llm, state, hold_s), fails(error))


def comes(llm: LLM, state: str, hold_s: float) -> bool:
    """Whether a sequence comes to be in this state within some time."""
    until_s = time.monotonic() + hold_s
    while not sequences_in(llm, state):
        if time.monotonic() >= until_s:
            return False
        time.sleep(LOOK_S)
    return True


class CopyThatFails:
    """The first one between cards that is launched while `met`, as often as it is tried."""

    def __init__(self, met: Callable[[], bool]) -> None:
        self._met, self._copy, self._lock = met, 0, threading.Lock()

    def __call__(self, entry: str, shard: Any) -> None:
        if not copies_across(entry, shard):
            return
        with self._lock:
            if not self._copy and self._met():
                self._copy = shard.copy
        if shard.copy == self._copy:
            raise RuntimeError("no link")


def run(folder: Path, event: str, state: str, expected: list[list[int]], hold_s: float) -> None:
    """One engine, one fault or a few aborts; every answer checked, and the books after its end."""
    with make_llm(folder, enable_two_gpu_pd=True, pd_roles="strict", **SMALL) as llm:
        make_happen(llm, event, state, hold_s)
        try:
            outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        except EngineDeadError:
            assert event == "end"
        else:
            for output, tokens in zip(outputs, expected, strict=True):
                got, reason = output["token_ids"], output.outputs[0].finish_reason
                assert got == tokens[: len(got)] and (reason == "abort" if len(got) < len(tokens) else True)
                assert reason == "length" or event == "abort"
            settle(llm)
    scheduler = llm._engine.scheduler
    scheduler.check_integrity()
    assert scheduler.idle and not scheduler.handoff.pending and llm._engine.executor.num_in_flight == 0
    for manager in scheduler.managers.values():
        assert manager.num_free_blocks == manager.num_blocks and manager.num_retired_blocks == 0


@pytest.mark.parametrize(("event", "state"), [pair for pair in PAIRS if pair not in NEVER])
def test_a_fault_or_an_abort_meets_every_state(folder: Path, expected: list[list[int]], event: str, state: str) -> None:
    """A state may have passed when the engine hears of what happened: tried until it has not."""
    assert state == "PREEMPTED" or State[state]
    with Witness().installed() as witness:
        for number in range(MAX_RUNS):
            run(folder, event, state, expected, hold_s=number % 2 * HOLD_S)
            if (event, state) in witness.seen:
                return
    raise AssertionError(f"never met; only {sorted(pair for pair in witness.seen if pair[0] == event)}")
