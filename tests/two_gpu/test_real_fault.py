"""A real illegal access on card 1 under load, in a process of its own: every caller is told within five seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="a kernel makes the fault", exc_type=ImportError)
import triton.language as tl  # noqa: E402

from nanovllm import DEMO_MODEL, LLM, EngineDeadError, SamplingParams  # noqa: E402
from tests.faults import FaultInjector, Times, steps_of  # noqa: E402

ANSWER_LIMIT_S = 5.0
NUM_CALLERS = 6
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@triton.jit
def write_far_away(pointer: tl.tensor, distance: tl.tensor) -> None:
    tl.store(pointer + distance, 1)


@pytest.mark.parametrize("case", ["strict", "lending", "llm-close"])
def test_an_illegal_access_reaches_every_caller(case: str) -> None:
    command, root = [sys.executable, "-m", "tests.two_gpu.test_real_fault", case], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(lines[-1])
    assert told["errors"] == ["EngineDeadError"] * NUM_CALLERS and "illegal memory access" in told["cause"], told
    assert told["slowest_s"] < ANSWER_LIMIT_S, told
    assert told["free"] == told["total"], told


def program(case: str) -> None:
    """Prints what the callers were told, and what is left once the workers are done."""
    roles: dict[str, Any] = {"lend_sms": (60, 72)} if case == "lending" else {"pd_roles": "strict"}
    llm = LLM(DEMO_MODEL, enable_two_gpu_pd=True, max_num_seqs=16, max_model_len=1024, **roles)
    runner, begun_s = llm.decode_runner, [0.0]

    def break_card(entry: str, shard: Any) -> None:
        assert runner.stream is not None
        with torch.cuda.device(runner.device), torch.cuda.stream(runner.stream):
            word = torch.zeros(1, dtype=torch.int32, device=runner.device)
            begun_s[0] = time.monotonic()
            write_far_away[(1,)](word, 1 << 44)

    errors: list[BaseException] = []
    ended_s: list[float] = []

    def call(number: int) -> None:
        try:
            while True:
                llm.generate([[number + 5] * 40] * 2, LONG, use_tqdm=False)
        except BaseException as error:
            errors.append(error)
            ended_s.append(time.monotonic())

    callers = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(NUM_CALLERS)]
    for caller in callers:
        caller.start()
    deadline_s = time.monotonic() + 60
    while llm.stats()["decoding"] < NUM_CALLERS and time.monotonic() < deadline_s:
        time.sleep(0.01)
    FaultInjector(llm).before = Times(1, steps_of(1), break_card)
    for caller in callers:
        caller.join(60)
    managers = llm._engine.scheduler.managers.values()
    # A user closes the `LLM`; the engine alone frees nothing on card 1, where nothing can be freed any more.
    (llm if case == "llm-close" else llm._engine).close()
    told = {
        "errors": sorted(type(error).__name__ for error in errors),
        "cause": str(next((error for error in errors if isinstance(error, EngineDeadError)), "")),
        "slowest_s": max(ended_s, default=1e9) - begun_s[0],
        "free": sum(manager.num_free_blocks for manager in managers),
        "total": sum(manager.num_blocks for manager in managers),
    }
    print(json.dumps(told), flush=True)
    os._exit(0)  # with a lost context, torch's own clean-up may raise


if __name__ == "__main__":
    program(sys.argv[1])
