"""The measure of correctness itself: it passes a right engine, and sees a single wrong token."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.outputs import RequestOutput
from tests.cpu.tiny import VOCAB_SIZE, make_llm, write_config
from tests.regret import BFLOAT16, FLOAT32, Bounds, Reference, Regrets

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=request.param)
    folder = write_config(tmp_path_factory.mktemp("tiny"), **sizes)
    with make_llm(folder, dtype="float32", max_num_batched_tokens=32) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(llm: LLM) -> Reference:
    return Reference(llm)


@pytest.fixture(scope="module")
def outputs(llm: LLM) -> list[RequestOutput]:
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(count)] for count in (1, 15, 16, 17, 33, 100)]
    return llm.generate(prompts, PARAMS, use_tqdm=False)


def test_a_right_engine_passes(reference: Reference, outputs: list[RequestOutput]) -> None:
    regrets = reference.measure(outputs).check(FLOAT32)
    assert regrets.prompt_tokens == [1, 15, 16, 17, 33, 100] and [len(row) for row in regrets.rows] == [12] * 6
    assert "6 answers, 72 positions" in str(regrets)


@pytest.mark.parametrize("position", [0, 7, 11])
def test_one_wrong_token_fails(reference: Reference, outputs: list[RequestOutput], position: int) -> None:
    """In float32, and by its size alone in bfloat16, where a percentile would not see it."""
    prompt, answer = outputs[3].prompt_token_ids, outputs[3].outputs[0].token_ids
    answer[position] = int(reference.logits(prompt, answer)[position].argmin())
    row = reference.regret(prompt, answer)
    assert int((row > 1).nonzero()[0]) == position and (row[:position] <= FLOAT32.worst).all()
    long = Regrets([torch.zeros(2000), row[: position + 1]], [9, len(prompt)])
    assert long.mean < BFLOAT16.mean and long.p99 < BFLOAT16.p99
    for bounds in (FLOAT32, BFLOAT16):
        with pytest.raises(AssertionError, match=rf"beyond .*\nanswer 1 \(prompt of 17.* at output {position}\n"):
            long.check(bounds)


def test_a_wrong_context_fails(reference: Reference, outputs: list[RequestOutput]) -> None:
    """Each answer measured behind another's prompt: what an engine with mixed-up blocks would give."""
    prompts = [out.prompt_token_ids for out in outputs]
    rows = [reference.regret(p, o.outputs[0].token_ids) for p, o in zip(prompts[1:], outputs[:-1], strict=True)]
    regrets = Regrets(rows, list(map(len, prompts[1:])))
    assert regrets.mean > BFLOAT16.mean and regrets.p99 > BFLOAT16.p99
    with pytest.raises(AssertionError, match="beyond"):
        regrets.check(BFLOAT16)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16, 111])
def test_chunks_give_the_logits_of_one_pass(
    reference: Reference, outputs: list[RequestOutput], chunk_tokens: int
) -> None:
    prompt, answer = outputs[-1].prompt_token_ids, outputs[-1].outputs[0].token_ids
    with torch.no_grad():
        whole = reference.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(reference.logits(prompt, answer, chunk_tokens), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "rows, bounds",
    [
        ([0.0, math.nan], Bounds(1, 1, 1)),
        ([0.0, 0.0, 0.3], Bounds(0.09, 1, 1)),
        ([0.0] * 98 + [0.5, 0.5], Bounds(1, 0.4, 1)),
        ([0.0, 0.3], Bounds(1, 1, 0.29)),
    ],
    ids=["NaN", "mean", "p99", "worst"],
)
def test_each_bound_is_checked(rows: list[float], bounds: Bounds) -> None:
    regrets = Regrets([torch.tensor(rows)], [1])
    with pytest.raises(AssertionError, match="beyond"):
        regrets.check(bounds)
    if not math.isnan(regrets.mean):
        assert regrets.check(Bounds(1, 1, 1)) is regrets
