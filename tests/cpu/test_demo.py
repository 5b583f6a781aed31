"""The shipped checkpoint: small enough, loads in transformers, and answers there as here, greedily, token for token."""

from __future__ import annotations

import inspect
import random
import textwrap
from pathlib import Path

import pytest
import torch

from nanovllm import DEMO_MODEL, LLM, SamplingParams

MAX_TOKENS = 40
TIE_NATS = 1e-4  # closer than this, the reference itself has no opinion


def code_prompts() -> list[str]:
    """50 prompts: beginnings of lines and of functions from the standard library, from 1 token to some hundreds."""
    rng = random.Random(0)
    short = ["def fibonacci(n):", "import os", "class Stack:", "x", "for i in range(3):\n", "    return ", "# ", "\n\n"]
    sources = [inspect.getsource(f) for f in (textwrap.dedent, random.Random.shuffle, inspect.getmro, Path.read_text)]
    lines = [line for source in sources for line in source.splitlines() if line.strip()]
    long = [source[: rng.randrange(100, len(source) + 1)] for source in sources]
    return (short + long + rng.sample(lines, 50))[:50]


@pytest.fixture(scope="module")
def reference():
    """The checkpoint as transformers loads it, float32."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def test_greedy_tokens_equal_transformers(reference) -> None:
    prompts = code_prompts()
    with LLM(DEMO_MODEL, device="cpu", enable_two_gpu_pd=True, max_num_batched_tokens=256) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids])
        expected = reference.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
        got = output.outputs[0].token_ids
        assert got == expected or first_difference_is_a_tie(reference, output.prompt_token_ids, got, expected), (
            output.prompt,
            got,
            expected,
        )


def first_difference_is_a_tie(reference, prompt: list[int], got: list[int], expected: list[int]) -> bool:
    same = next(i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b)
    best = reference(torch.tensor([prompt + expected[:same]])).logits[0, -1].topk(2).values
    return bool(best[0] - best[1] < TIE_NATS)


def test_it_is_small_and_of_the_real_architecture(reference) -> None:
    files = list(Path(DEMO_MODEL).iterdir())
    assert sum(file.stat().st_size for file in files) <= 8 << 20
    assert type(reference).__name__ == "Qwen3ForCausalLM"
    assert 3e6 < sum(parameter.numel() for parameter in reference.parameters()) < 4e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {file.name for file in files}


def test_chat_template_and_special_tokens() -> None:
    with LLM(DEMO_MODEL, device="cpu") as llm:
        messages = [{"role": "user", "content": "Return the maximum of a list."}]
        (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        assert output.prompt is not None and output.prompt.endswith("<|im_start|>assistant\n")
        assert "<|im_" not in output.outputs[0].text
