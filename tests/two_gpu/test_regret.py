"""Two real cards by regret, in bfloat16, with so few blocks for decode that sequences are evacuated and come back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import write_shape
from nanovllm import LLM, SamplingParams
from tests.random_work import check_nothing_left
from tests.regret import BFLOAT16, Reference, release_gpu_memory

NUM_PROMPTS, LONGEST_PROMPT = 40, 1100
GREEDY = SamplingParams(temperature=0, max_tokens=256, ignore_eos=True)
OPTIONS: dict[str, Any] = dict(
    device="cuda",
    dtype="bfloat16",
    load_format="dummy",
    max_model_len=2048,
    max_num_seqs=24,
    max_num_batched_tokens=512,
)


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    release_gpu_memory()
    yield
    release_gpu_memory()


def make_prompts(vocab_size: int) -> list[list[int]]:
    """Lengths from 1 to 1100, also at the edges of blocks and chunks; every third begins like another.

    Mostly short: many are admitted at once, and then grow beyond what there is.
    """
    rng = random.Random(12)
    lengths = [1, 63, 64, 65, 511, 512, 513, LONGEST_PROMPT]
    lengths += [int(LONGEST_PROMPT ** rng.random()) for _ in range(NUM_PROMPTS - len(lengths))]
    stem = [rng.randrange(vocab_size) for _ in range(LONGEST_PROMPT)]
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    return [stem[: len(ids) // 2] + ids[len(ids) // 2 :] if i % 3 == 0 else ids for i, ids in enumerate(prompts)]


def test_two_cards_with_evacuations_and_one_card_beside(tmp_path: Path) -> None:
    folder = write_shape(tmp_path, "0.6b")
    two = dict(enable_two_gpu_pd=True, num_kvcache_blocks=(500, 60)) | OPTIONS
    with LLM(folder, pd_roles="elastic", **two) as llm:
        prompts = make_prompts(llm.model_config.vocab_size)
        bent = llm.generate(prompts, GREEDY, use_tqdm=False)
        check_nothing_left(llm)
        bent_stats = llm.stats()
    with LLM(folder, pd_roles="strict", **two) as llm:
        both = llm.generate(prompts, GREEDY, use_tqdm=False)
        check_nothing_left(llm)
        stats = llm.stats()
        reference = Reference(llm)
    with LLM(folder, num_kvcache_blocks=1200, **OPTIONS) as llm:
        one = llm.generate(prompts, GREEDY, use_tqdm=False)
        check_nothing_left(llm)
    regrets = {"two cards": reference.measure(both), "elastic": reference.measure(bent)}
    regrets["one card"] = reference.measure(one)
    same = sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(both, one, strict=True))
    for name, measured in regrets.items():
        print(f"{name}: {measured}")
    print(f"{same} of {len(prompts)} answers are the same; {stats}")
    assert stats["evacuations"] > 0 and stats["copied_blocks"] > 0 and stats["card1"]["decode_tokens"] > 0, stats
    assert bent_stats["card0"]["decode_tokens"] + bent_stats["card0"]["mixed_steps"] > 0, bent_stats
    assert all(len(out.outputs[0].token_ids) == GREEDY.max_tokens for out in (*both, *bent, *one))
    for measured in regrets.values():
        measured.check(BFLOAT16)
