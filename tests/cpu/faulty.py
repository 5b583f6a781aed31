"""What tests of faults ask of an engine, and what must be left of it."""

from __future__ import annotations

from typing import Any

from nanovllm import LLM, SamplingParams
from tests.faults import ILLEGAL_ACCESS

PROMPTS = [[7 * n % 200 + 1 + i for i in range(5 + 9 * n)] for n in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
ANSWER_LIMIT_S = 5.0  # in which everybody who waits must hear of the end


def tokens_of(llm: LLM, params: Any = GREEDY) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def check_books(llm: LLM) -> None:
    """After closing, nothing is owned by anybody, however the engine ended."""
    scheduler = llm._engine.scheduler
    scheduler.check_integrity()
    assert scheduler.idle and not scheduler.handoff.pending and llm._engine.executor.num_in_flight == 0
    for manager in scheduler.managers.values():
        assert manager.num_free_blocks == manager.num_blocks and manager.num_retired_blocks == 0


def errors_of(llm: LLM) -> dict[str, int]:
    return {kind: count for kind, count in llm.stats()["errors"].items() if count}


class BrokenLane:
    """What `close` of a lane does once the context is unusable."""

    closed = 0

    def close(self) -> None:
        self.closed += 1
        raise RuntimeError(ILLEGAL_ACCESS)
