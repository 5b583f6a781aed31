"""A sequence whose KV is spoilt in the middle of its answer: its row's logits are NaN, and it alone ends."""

from __future__ import annotations

from typing import Any

import torch

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from tests.faults import FaultInjector
from tests.random_work import check_nothing_left

PROMPTS = ["def fibonacci(n):", "import os", "class Stack:\n    def __init__(self", "for i in range("]
MAX_TOKENS = 60


def spoil_entry(llm: LLM, number: int) -> FaultInjector:
    """Ahead of the decode step that the sequence number so and so enters with: NaN in its first block."""
    runner, seen = llm.decode_runner, [0]

    def before(entry: str, shard: Any) -> None:
        decode = getattr(shard, "decode", shard)
        for new in getattr(decode, "entries", ()):
            if seen[0] == number:
                assert runner.stream is not None
                with torch.cuda.stream(runner.stream):
                    runner.kv_cache.blocks[new.block_table[0]].fill_(float("nan"))
            seen[0] += 1

    injector = FaultInjector(llm)
    injector.before = before
    return injector


def check(params: list[SamplingParams]) -> None:
    with LLM(DEMO_MODEL, device="cuda", max_num_seqs=8, max_model_len=512, num_kvcache_blocks=64) as llm:
        spoil_entry(llm, 2)
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        ends = [output.outputs[0].finish_reason for output in outputs]
        assert sorted(ends) == ["error", "length", "length", "length"], ends
        failed = outputs[ends.index("error")]
        assert failed.error == "the model's logits are no numbers" and len(failed.outputs[0].token_ids) < MAX_TOKENS
        assert all(token >= 0 for output in outputs for token in output.outputs[0].token_ids)
        check_nothing_left(llm)
        again = llm.generate(PROMPTS, params, use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in again] == ["length"] * 4


def test_plain_draws() -> None:
    check([SamplingParams(temperature=0.7, max_tokens=MAX_TOKENS, ignore_eos=True)] * 4)


def test_filtered_draws_and_logprobs() -> None:
    check([SamplingParams(temperature=0.7, top_k=20, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)] * 4)


def test_penalised_draws() -> None:
    penalised = SamplingParams(temperature=0.7, repetition_penalty=1.2, max_tokens=MAX_TOKENS, ignore_eos=True)
    check([penalised, penalised, penalised, SamplingParams(top_p=0.9, max_tokens=MAX_TOKENS, ignore_eos=True)])
