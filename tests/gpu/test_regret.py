"""The engine on one real card by regret: random weights of published shapes in bfloat16, greedy, chunked, cached."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import write_shape
from nanovllm import LLM, SamplingParams
from nanovllm.outputs import RequestOutput
from tests.random_work import check_nothing_left
from tests.regret import BFLOAT16, Reference, Regrets, release_gpu_memory

BLOCK, CHUNK, ANSWER, LONGEST = 64, 512, 64, 32_768  # tokens
LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 1, 2000)
GREEDY = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
OPTIONS: dict[str, Any] = dict(
    device="cuda",
    dtype="bfloat16",
    load_format="dummy",
    kvcache_block_size=BLOCK,
    max_num_batched_tokens=CHUNK,
    max_model_len=4096,
    max_num_seqs=19,
    num_kvcache_blocks=600,
)


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    release_gpu_memory()
    yield
    release_gpu_memory()


def random_ids(rng: random.Random, vocab_size: int, count: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(count)]


def generate(llm: LLM, prompts: list[list[int]]) -> list[RequestOutput]:
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outputs] == [ANSWER] * len(prompts)
    return outputs


def second_prompts(rng: random.Random, vocab_size: int, first: list[RequestOutput]) -> list[list[int]]:
    """A known prefix each: a prompt's, a whole prompt of full blocks, and a turn that goes on after an answer."""
    by_length = {len(out.prompt_token_ids): out for out in first}
    stem = by_length[3 * CHUNK + 1].prompt_token_ids
    suffixes = [stem[:cut] + random_ids(rng, vocab_size, count) for cut, count in ((1472, 1), (1000, 70), (640, 600))]
    turns = [by_length[n].prompt_token_ids + by_length[n].outputs[0].token_ids for n in (BLOCK + 1, CHUNK + 1)]
    return [
        by_length[2 * CHUNK].prompt_token_ids,
        *suffixes,
        *(turn + random_ids(rng, vocab_size, 9) for turn in turns),
    ]


@pytest.mark.parametrize(
    "shape, eager, overlap",
    [("0.6b", False, True), ("0.6b", False, False), ("0.6b", True, True), ("1.7b", False, True), ("8b", False, True)],
    ids=["0.6b", "0.6b without overlap", "0.6b eager", "1.7b", "8b"],
)
def test_chunks_and_cached_prefixes(shape: str, eager: bool, overlap: bool, tmp_path: Path) -> None:
    rng, name = random.Random(3), f"{shape}{' eager' * eager}{' without overlap' * (not overlap)}"
    with LLM(write_shape(tmp_path, shape), enforce_eager=eager, overlap=overlap, **OPTIONS) as llm:
        vocab_size = llm.model_config.vocab_size
        lengths = [*LENGTHS, *(rng.randrange(3, 900) for _ in LENGTHS)]
        first = generate(llm, [random_ids(rng, vocab_size, count) for count in lengths])
        second = generate(llm, second_prompts(rng, vocab_size, first))
        check_nothing_left(llm)
        reference = Reference(llm)
    assert all(out.num_cached_tokens == 0 for out in first)
    cached = [out.num_cached_tokens for out in second]
    # At least one token is always computed; and both turns found a block that decode filled.
    assert cached == [2 * CHUNK - BLOCK, 1472, 960, 640, 2 * BLOCK, CHUNK + BLOCK]
    report(f"{name}, fresh", reference.measure(first))
    report(f"{name}, cached prefixes", reference.measure(second))


def test_contexts_to_32k(tmp_path: Path) -> None:
    """Chunk behind chunk, splits of a long decode, and the last token that `max_model_len` allows. Short ones come
    last, with which there are rows enough for a plan that divides them by their lengths."""
    rng = random.Random(4)
    options = OPTIONS | dict(max_model_len=LONGEST, max_num_batched_tokens=4096, max_num_seqs=8)
    options["num_kvcache_blocks"] = 2 * LONGEST // BLOCK + 32
    with LLM(write_shape(tmp_path, "0.6b"), **options) as llm:
        assert llm.max_model_len == LONGEST
        sharpen_attention(llm, 1.5)
        vocab_size = llm.model_config.vocab_size
        lengths = LONGEST // 4, LONGEST * 5 // 8 + 1, LONGEST - ANSWER, 1, BLOCK + 1, 100, 300
        outputs = generate(llm, [random_ids(rng, vocab_size, count) for count in lengths])
        check_nothing_left(llm)
        reference = Reference(llm)
    regrets = reference.measure(outputs)
    for length, row in zip(lengths, regrets.rows, strict=True):
        print(f"0.6b, prompt of {length}: {Regrets([row], [length])}")
    report("0.6b, to 32k", regrets)
    prompt, answer = outputs[0].prompt_token_ids, outputs[0].outputs[0].token_ids
    for count in (BLOCK, LONGEST // 8):  # what an engine would get that had other KV there
        other = [*prompt[:1024], *random_ids(rng, vocab_size, count), *prompt[1024 + count :]]
        wrong = Regrets([reference.regret(other, answer)], [len(prompt)])
        print(f"0.6b, {count} of {len(prompt)} tokens wrong: {wrong}")
    assert wrong.mean > BFLOAT16.mean, "half of the context does not matter: the bounds above prove nothing"


def sharpen_attention(llm: LLM, factor: float) -> None:
    """Larger scores: with random weights a long context is averaged, and one block of it hardly matters."""
    for name, weight in llm.prefill_runner.model.checkpoint_slots().items():
        if name.endswith("q_norm.weight"):
            weight.mul_(factor)
    if llm.prefill_runner.device.type == "cuda":
        torch.cuda.synchronize(llm.prefill_runner.device)  # the engine's streams will read them


def report(what: str, regrets: Regrets) -> None:
    print(f"{what}: {regrets}")
    regrets.check(BFLOAT16)
