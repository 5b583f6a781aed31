"""The engine as a whole: threads, failures, interrupts, closing, and the table of request states."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nanovllm.llm as llm_module
from nanovllm import LLM, EngineDeadError, SamplingParams
from nanovllm.engine.llm_engine import OutputQueue
from nanovllm.engine.request_states import TRANSITIONS, State
from nanovllm.engine.sequence import Request, Sequence
from tests.cpu.tiny import make_llm, paused, scripted, settle, wait_until, write_config, write_model
from tests.sim.chaos import Chaos
from tests.sim.world import random_params, random_prompt, random_world, run_random

ROOT = Path(__file__).parents[2]
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=[False, True], ids=["inline", "overlap"])
def llm(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Two cards, and an engine of its own for each test: these tests break things."""
    with make_llm(folder, enable_two_gpu_pd=True, overlap=request.param) as llm:
        yield llm


@pytest.fixture(autouse=True)
def default_interrupts() -> Iterator[None]:
    """A process started in the background ignores Ctrl-C."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def ids_of(llm: LLM, prompts: Any, params: Any = SHORT) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


class Caller(threading.Thread):
    """Runs `call` in a thread and keeps what it returned or raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self.error = error

    def outcome(self, timeout_s: float = 30.0) -> Any:
        self.join(timeout_s)
        assert not self.is_alive(), "the caller still waits"
        return self.error if self.error is not None else self.result


def slow_down(llm: LLM, seconds: float) -> None:
    """Every decode step takes this long."""
    run = llm.decode_runner.run_decode_core

    def slow(shard: Any) -> Any:
        time.sleep(seconds)
        return run(shard)

    llm.decode_runner.run_decode_core = slow  # type: ignore[method-assign]


# -- threads


def test_threads_generate_at_once(llm: LLM) -> None:
    def mine(number: int) -> list[list[int]]:
        prompts = [[number * 7 + i] * (5 + i) for i in range(4)]
        return [answer for prompt in prompts for answer in ids_of(llm, [prompt, prompt])]

    callers = [Caller(lambda n=n: mine(n)) for n in range(6)]
    together = [caller.outcome() for caller in callers]
    assert together == [mine(number) for number in range(6)]
    settle(llm)


def test_aborts_from_other_threads(llm: LLM) -> None:
    """Aborts hit what they name and nothing else, whenever they come."""
    expected, stop = ids_of(llm, [[n] for n in range(1, 9)], LONG), threading.Event()

    def abort_everything_odd() -> None:
        while not stop.wait(0.001):
            for request_id, _ in list(llm._engine._live.items()):
                if int(request_id) % 2:
                    llm.abort(request_id)

    aborter = Caller(abort_everything_odd)
    for _ in range(3):
        for output, full in zip(llm.generate([[n] for n in range(1, 9)], LONG, False), expected, strict=True):
            odd = int(output.request_id) % 2 == 1
            assert output["token_ids"] == (full[: len(output["token_ids"])] if odd else full)
            assert output.outputs[0].finish_reason == ("abort" if odd else "length") or len(output["token_ids"]) == 200
    stop.set()
    aborter.outcome()
    settle(llm)


def test_whole_answers_are_told_once_increments_step_by_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    told, put = [], OutputQueue.put

    def note(queue: OutputQueue, requests: Any) -> None:
        requests = list(requests)
        told.append([(request.request_id, request.finished) for request in requests])
        put(queue, requests)

    monkeypatch.setattr(OutputQueue, "put", note)
    outputs = llm.generate([[1, 2], [3], [4, 5]], SamplingParams(n=2, max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert sorted(told) == [[(output.request_id, True)] for output in outputs]
    told.clear()
    assert len(list(llm.stream([7], SHORT))) >= 1
    assert len(told) == 5 and [finished for news in told for _, finished in news] == [False] * 4 + [True]


def test_a_slow_reader_stops_nobody(llm: LLM) -> None:
    stream = llm.stream([1], LONG)
    next(stream)
    assert len(ids_of(llm, [[n] for n in range(2, 6)], SHORT)) == 4
    if llm.config.overlap:
        wait_until(lambda: not llm._engine.has_unfinished())  # it has ended, and nobody has read it
    assert sum(len(piece.token_ids) for piece in stream) < 200
    settle(llm)


def test_two_engines_in_one_process(folder: Path) -> None:
    def ask(llm: LLM) -> list[list[int]]:
        return ids_of(llm, [[n] * 20 for n in range(1, 6)], LONG)

    with make_llm(folder, seed=1) as one, make_llm(folder, seed=2, enable_two_gpu_pd=True) as two:
        callers = [Caller(lambda llm=llm: ask(llm)) for llm in (one, two, one)]
        first, second, third = (caller.outcome(60) for caller in callers)
        assert first == third == ask(one) and second == ask(two) and first != second  # the seed draws the weights
        one.close()
        assert ask(two) == second


# -- failures


def fail_when_told(llm: LLM, entry: str) -> threading.Event:
    """Once the event is set, `entry` raises what no process survives."""
    runner = llm.decode_runner if entry == "run_decode_core" else llm.prefill_runner
    run, told = getattr(runner, entry), threading.Event()

    def run_or_fail(*arguments: Any) -> Any:
        if told.is_set():
            raise RuntimeError("CUDA error: the card caught fire")
        return run(*arguments)

    setattr(runner, entry, run_or_fail)
    return told


def check_dead(llm: LLM, error: Any) -> None:
    assert isinstance(error, EngineDeadError) and "the card caught fire" in str(error)
    causes = [error.__cause__, getattr(error.__cause__, "__cause__", None)]
    assert any(isinstance(cause, RuntimeError) and "fire" in str(cause) for cause in causes)
    for call in (lambda: llm.generate([1]), lambda: llm.add_request([1]), lambda: llm.stream([1])):
        with pytest.raises(EngineDeadError, match="caught fire"):
            call()
    assert llm.step() == [] and not llm.has_unfinished()
    llm.abort("0")
    assert llm.stats()["uptime"] > 0


@pytest.mark.parametrize("entry", ["run_prefill", "run_decode_core", "run_copy"])
def test_a_failing_runner_reaches_every_caller(folder: Path, entry: str) -> None:
    with make_llm(folder, enable_two_gpu_pd=True) as llm:
        told = fail_when_told(llm, entry)
        with paused(llm, after_steps=10):
            stream = llm.stream([4, 5], LONG)
            next(stream)
            callers = [Caller(lambda: ids_of(llm, [[1], [2]], LONG)), Caller(lambda: list(stream))]
            wait_until(lambda: len(llm._engine._live) == 3)
            told.set()
            callers.append(Caller(lambda: ids_of(llm, [[3] * 40], LONG)))  # something to prefill and to copy
            if entry != "run_prefill":
                wait_until(lambda: len(llm._engine._live) in (0, 4))
        for caller in callers:
            check_dead(llm, caller.outcome())


@pytest.mark.parametrize("entry", ["run_prefill", "run_decode_core", "run_copy"])
def test_a_failing_runner_without_threads(folder: Path, entry: str) -> None:
    with make_llm(folder, enable_two_gpu_pd=True, overlap=False) as llm:
        told = fail_when_told(llm, entry)
        stream = llm.stream([4, 5], LONG)
        next(stream)
        told.set()
        for call in (lambda: ids_of(llm, [[3] * 40], LONG), lambda: list(stream)):
            with pytest.raises(EngineDeadError) as caught:
                call()
            check_dead(llm, caught.value)


def test_a_waiting_handle_that_fails_reaches_the_caller(llm: LLM) -> None:
    """On a GPU errors come out when a step is waited for, not when it is launched."""

    class Failing:
        event = None

        def wait(self) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    llm.prefill_runner.run_prefill = lambda shard: Failing()  # type: ignore[method-assign,assignment]
    error = Caller(lambda: ids_of(llm, [[1]])).outcome()
    assert isinstance(error, EngineDeadError) and "illegal memory access" in str(error)


def test_step_raises_when_the_engine_dies(llm: LLM) -> None:
    request_id = llm.add_request([1], LONG)
    assert request_id and llm.step()

    def fail(shard: Any) -> Any:
        raise RuntimeError("CUDA error: broken")

    llm.decode_runner.run_decode_core = fail  # type: ignore[method-assign]

    def step_for_ever() -> None:
        while llm.step():
            pass

    assert isinstance(Caller(step_for_ever).outcome(), EngineDeadError)


def test_a_plan_that_cannot_move_is_an_error_not_a_hang(llm: LLM) -> None:
    llm._engine.scheduler.ready_for_prefill = lambda card: []  # type: ignore[method-assign]
    error = Caller(lambda: ids_of(llm, [[1]])).outcome()
    assert isinstance(error, EngineDeadError) and "the plan is stuck: waiting=1" in str(error)


# -- closing


def test_close_wakes_whoever_waits(llm: LLM) -> None:
    slow_down(llm, 0.01)
    waiting = Caller(lambda: ids_of(llm, [[1], [2]], LONG))
    wait_until(lambda: llm.stats()["decoding"] == 2)
    closing, error = Caller(llm.close), waiting.outcome()
    assert isinstance(error, EngineDeadError) and "closed" in str(error)
    closing.outcome()


def test_close_wakes_whoever_waits_while_a_card_is_still_busy(folder: Path) -> None:
    """Only `close` itself waits for the step that the card runs."""
    with make_llm(folder) as llm:
        busy, done, run = threading.Event(), threading.Event(), llm.decode_runner.run_decode_core

        def endless(shard: Any) -> Any:
            busy.set()
            done.wait(60)
            return run(shard)

        llm.decode_runner.run_decode_core = endless  # type: ignore[method-assign]
        waiting = Caller(lambda: ids_of(llm, [[1], [2]], LONG))
        assert busy.wait(20)
        closing = Caller(llm.close)
        assert isinstance(waiting.outcome(), EngineDeadError) and closing.is_alive()
        done.set()
        closing.outcome()


def test_after_close(llm: LLM) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("nanovllm")]

    ids_of(llm, [[1]])
    assert bool(threads()) == llm.config.overlap
    llm.close()
    llm.close()
    assert threads() == []
    for call in (lambda: llm.generate([1]), lambda: llm.add_request([1]), lambda: llm.stream([1])):
        with pytest.raises(EngineDeadError, match="closed"):
            call()
    assert llm.step() == [] and not llm.has_unfinished() and llm.stats()["decoding"] == 0
    llm.abort("0")
    with pytest.raises(ValueError):
        llm.generate([])


def test_context_manager_closes_also_after_an_error(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), make_llm(folder) as llm:
        raise ZeroDivisionError
    with pytest.raises(EngineDeadError):
        llm.generate([1])


def test_close_between_the_loops_check_and_its_sleep(folder: Path) -> None:
    """The wake-up that `close` sends must not be cleared by a loop that has looked already."""
    llm = make_llm(folder)
    wake, at_clear, proceed = llm._engine._wake, threading.Event(), threading.Event()
    clear = wake.clear

    def pausing_clear() -> None:
        at_clear.set()
        proceed.wait(10)
        clear()

    wake.clear = pausing_clear  # type: ignore[method-assign]
    wake.set()
    assert at_clear.wait(10)
    closing = Caller(llm.close)
    wait_until(lambda: llm._engine._closing)
    time.sleep(0.02)
    proceed.set()
    closing.outcome(10)


def test_a_dropped_engine_ends_its_threads(folder: Path) -> None:
    before = threading.active_count()
    llm = make_llm(folder)
    llm.add_request([1], SamplingParams(max_tokens=240, ignore_eos=True, stop="never"))
    assert threading.active_count() > before
    del llm
    wait_until(lambda: threading.active_count() == before)


# -- interrupts


@pytest.mark.parametrize("where", ["__init__", "update", "set_postfix_str"])
def test_interrupt_in_the_progress_bar(llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def interrupt(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    interrupted = type("Bar", (llm_module.tqdm,), {where: interrupt, "__del__": lambda self: None})
    before = llm.stats()["sampled_tokens"]
    with monkeypatch.context() as patch, paused(llm, after_steps=20):
        patch.setattr(llm_module, "tqdm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[1], [2], [3]], [SHORT, LONG, LONG], use_tqdm=False)
    settle(llm)
    assert not llm._engine.has_unfinished() and llm.stats()["sampled_tokens"] - before < 400
    assert len(ids_of(llm, [[4]])[0]) == 5


def interrupt_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_ctrl_c_while_waiting(llm: LLM) -> None:
    """Whatever the engine does at that moment: the requests are aborted and the next one is served."""
    for step in (1, 2, 17, 100):
        with paused(llm, step, interrupt_main_thread), pytest.raises(KeyboardInterrupt):
            ids_of(llm, [[1], [2]], LONG)
        settle(llm)
        assert not llm._engine.has_unfinished()
        assert len(ids_of(llm, [[4]])[0]) == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("entry", ["run_prefill", "run_decode_core", "run_copy"])
def test_ctrl_c_in_the_middle_of_an_inline_step(folder: Path, entry: str) -> None:
    """The plan would be half made: the interrupt takes effect after the step."""
    with make_llm(folder, enable_two_gpu_pd=True, overlap=False) as llm:
        runner = llm.decode_runner if entry == "run_decode_core" else llm.prefill_runner
        run = getattr(runner, entry)

        def interrupted(*arguments: Any) -> Any:
            setattr(runner, entry, run)
            signal.raise_signal(signal.SIGINT)
            return run(*arguments)

        setattr(runner, entry, interrupted)
        with pytest.raises(KeyboardInterrupt):
            ids_of(llm, [[1], [2]], LONG)
        settle(llm)
        assert len(ids_of(llm, [[4]])[0]) == 5 and not llm._engine.has_unfinished()


def test_the_callers_own_signal_handler_is_kept(folder: Path) -> None:
    calls: list[int] = []
    old = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        with make_llm(folder, overlap=False) as llm:
            run = llm.decode_runner.run_decode_core

            def interrupted(shard: Any) -> Any:
                signal.raise_signal(signal.SIGINT)
                return run(shard)

            llm.decode_runner.run_decode_core = interrupted  # type: ignore[method-assign]
            assert len(ids_of(llm, [[1]])[0]) == 5
    finally:
        signal.signal(signal.SIGINT, old)
    assert calls == [signal.SIGINT] * 4


def test_an_exit_in_the_middle_of_an_inline_step_ends_the_engine(folder: Path) -> None:
    """What is no signal cannot be held back: nobody may be left with half a plan."""
    with make_llm(folder, overlap=False) as llm:

        def leave(shard: Any) -> Any:
            raise SystemExit(3)

        llm.prefill_runner.run_prefill = leave  # type: ignore[method-assign]
        with pytest.raises(SystemExit):
            ids_of(llm, [[1]])
        assert isinstance(Caller(lambda: ids_of(llm, [[1]])).outcome(), EngineDeadError)


# -- whole processes

PROLOGUE = """
import signal, sys, threading, time
from nanovllm import LLM, SamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)
options = dict(device="cpu", load_format="dummy", max_model_len=4000, num_kvcache_blocks=100, enable_two_gpu_pd=True)
llm = LLM(sys.argv[1], **options)
params = SamplingParams(max_tokens=3000, ignore_eos=True)
"""
LEAVE = [
    'llm.generate([1], SamplingParams(max_tokens=3), use_tqdm=False); print("bye")',
    'llm.add_request([1], params); llm.step(); print("bye")',
    'stream = llm.stream([1], params); next(stream); print("bye")',
    'threading.Thread(target=llm.generate, args=([1], params), daemon=True).start(); time.sleep(.1); print("bye")',
]
INTERRUPTED = """
print("ready", flush=True)
try:
    llm.generate([[1], [2]], params, use_tqdm=False)
except KeyboardInterrupt:
    print("interrupted", len(llm.generate([1], SamplingParams(max_tokens=3, ignore_eos=True), False)[0]["token_ids"]))
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROLOGUE + code, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_clean_exit_without_close(tmp_path: Path) -> None:
    processes = [start(code, write_config(tmp_path, max_position_embeddings=4000)) for code in LEAVE]
    for process in processes:
        out, err = process.communicate(timeout=90)
        assert (process.returncode, out) == (0, "bye\n")
        assert err == "" or "EngineDeadError" in err and process is processes[-1]  # its waiting thread is told


def test_sigint_in_another_process(tmp_path: Path) -> None:
    process = start(INTERRUPTED, write_config(tmp_path, max_position_embeddings=4000))
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "interrupted 3\n", "")


# -- the table of states


def test_every_state_is_reachable_and_finished_is_final() -> None:
    reached = {State.WAITING}
    while more := {to for came, to in TRANSITIONS if came in reached} - reached:
        reached |= more
    assert reached == set(State)
    assert all((state, State.FINISHED) in TRANSITIONS for state in State if state is not State.FINISHED)
    assert not any(came is State.FINISHED for came, _ in TRANSITIONS)
    assert not any(came is to for came, to in TRANSITIONS)


def test_every_move_says_who_when_and_how_long() -> None:
    for move in TRANSITIONS.values():
        assert move.by and move.when


def run_world_with_aborts_of_those_away(seed: int) -> None:
    """A random world in which sequences are often aborted just while they are evacuated or on their way back."""
    world = random_world(seed)
    for _ in range(12):
        world.add(random_prompt(world.rng, 20), random_params(world.rng))
    for _ in range(400):
        world.executor.advance()
        world.step()
        for request in world.requests:
            away = any(sequence.state in (State.EVACUATED, State.RETURNING) for sequence in request.sequences)
            if away and world.rng.random() < 0.3:
                world.abort(request)
    world.run_to_idle()


def test_every_move_of_the_table_happens_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, move_to = set(), Sequence.move_to

    def watched(self: Sequence, state: State) -> None:
        seen.add((self.state, state))
        move_to(self, state)

    monkeypatch.setattr(Sequence, "move_to", watched)
    for seed in range(100):
        run_random(seed, num_requests=10)
        run_world_with_aborts_of_those_away(seed)
        run_random(seed, 10, Chaos(copies=0.3, card=seed % 2, at_step=5 + seed % 20).install)
        if seen >= set(TRANSITIONS):
            break
    assert seen == set(TRANSITIONS)


def test_illegal_moves_are_noticed() -> None:
    request = Request("0", 0, None, [1], SHORT, max_tokens=5)
    for state in set(State) - {State.PREFILLING, State.FINISHED}:
        with pytest.raises(AssertionError, match="not a legal move"):
            request.sequences[0].move_to(state)


def test_scripts_of_these_tests_are_undone(folder: Path) -> None:
    with make_llm(folder) as llm, scripted() as scripts:
        params = SamplingParams(seed=scripts.write(b"abc"), max_tokens=3)
        assert llm.generate("x", params, use_tqdm=False)[0]["text"] == "abc"
        dictated = params
    with make_llm(folder) as llm:
        assert llm.generate("x", dictated, use_tqdm=False)[0]["text"] != "abc"
