"""200 random requests that exercise everything at once, and the checks that hold in every mode: on CPUs and GPUs."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from nanovllm import LLM, SamplingParams

NUM_REQUESTS = 200
Answer = tuple[list[int], str]

# Pools in which sequences are evacuated, recomputed and held back, chunks that split prompts and blocks.
TINY = dict(
    run_ahead=3,
    max_model_len=512,
    kvcache_block_size=16,
    max_num_seqs=4,
    max_num_batched_tokens=48,
    decode_backlog_high=1,
)


@dataclass(frozen=True)
class Work:
    """Prompts and how to answer them; `aborted` picks which requests are aborted, at random steps."""

    prompts: list[list[int]]
    params: list[SamplingParams]

    @classmethod
    def random(cls, seed: int, vocab_size: int, count: int = NUM_REQUESTS) -> Work:
        rng = random.Random(seed)
        stems = [[rng.randrange(3, vocab_size) for _ in range(96)] for _ in range(4)]
        prompts = [
            rng.choice(stems)[: rng.choice([0, 15, 16, 17, 48, 80, 96])]
            + [rng.randrange(3, vocab_size) for _ in range(rng.randrange(1, 20))]
            for _ in range(count)
        ]
        return cls(prompts, [_params(rng, vocab_size, number) for number in range(count)])


def _params(rng: random.Random, vocab_size: int, number: int) -> SamplingParams:
    greedy = rng.random() < 0.5
    return SamplingParams(
        temperature=0.0 if greedy else rng.choice([0.7, 1.0]),
        n=1 if greedy else rng.choice([1, 1, 2]),
        top_k=rng.choice([0, 0, 20]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        seed=number,
        max_tokens=rng.choice([1, 4, 16, 64]),
        min_tokens=rng.choice([0, 0, 1]),
        stop_token_ids=rng.sample(range(vocab_size), 40) if rng.random() < 0.3 else None,
        stop=rng.choice([None, None, ["\n\n", "):"], ["e"]]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        ignore_eos=rng.random() < 0.2,
    )


def answers(llm: LLM, work: Work, abort_seed: int | None) -> list[list[Answer]]:
    """Run everything through add_request and step; with an abort seed, 40 requests are aborted at random steps."""
    rng = random.Random(abort_seed)
    ids = [llm.add_request(prompt, params) for prompt, params in zip(work.prompts, work.params, strict=True)]
    doomed = set(rng.sample(ids, 40)) if abort_seed is not None else set()
    done = {}
    while outputs := llm.step():
        for output in outputs:
            if output.finished:
                done[output.request_id] = [(o.token_ids, o.finish_reason) for o in output.outputs]
        for victim in [v for v in sorted(doomed) if rng.random() < 0.05]:
            llm.abort(victim)
            doomed.discard(victim)
    return [done[request_id] for request_id in ids]


def check_same(got: list[list[Answer]], expected: list[list[Answer]]) -> int:
    """Equal answers; aborted ones by prefix. Returns how many were aborted."""
    aborted = 0
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        for (tokens, reason), (all_tokens, full_reason) in zip(mine, theirs, strict=True):
            aborted += reason == "abort"
            if reason == "abort":
                assert tokens == all_tokens[: len(tokens)], f"request {number}"
            else:
                assert (tokens, reason) == (all_tokens, full_reason), f"request {number}"
    return aborted


def check_nothing_left(llm: LLM) -> None:
    """Exactly zero of everything, as soon as the last write-back has drained."""
    engine, scheduler = llm._engine, llm._engine.scheduler
    deadline = time.monotonic() + 60
    while not scheduler.idle and time.monotonic() < deadline:
        engine.step() if engine._thread is None else time.sleep(0.01)
    assert scheduler.idle, scheduler.describe()
    scheduler.check_integrity()
    for manager in scheduler.managers.values():
        assert manager.num_free_blocks == manager.num_blocks and manager.num_retired_blocks == 0
    assert not llm.has_unfinished() and engine.executor.num_in_flight == 0
