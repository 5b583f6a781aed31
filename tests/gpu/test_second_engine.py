"""A second `LLM` made while the first one of the process is busy on the same card: captures, weights, tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanovllm import DEMO_MODEL, LLM, RequestOutput, SamplingParams
from nanovllm.models import loader
from tests.random_work import check_nothing_left

DEVICE = "cuda"
PROMPTS = ["def fibonacci(n):", "import os", "class Stack:\n    def __init__(self", "for i in range("]
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
# Every kind of sampler, and log-probabilities: work outside the graphs that allocates and frees, on the card too.
BUSY = [
    SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.2, max_tokens=60, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.9, logprobs=3, max_tokens=60, ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
]


def make_llm() -> LLM:
    return LLM(DEMO_MODEL, device=DEVICE, dtype="float32", max_num_seqs=8, max_model_len=512, num_kvcache_blocks=64)


def answers(llm: LLM) -> list[list[int]]:
    """Greedy, one prompt at a time: every step has one row, so that float32 gives the same tokens at any load."""
    outputs = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in PROMPTS]
    return [output.outputs[0].token_ids for output in outputs]


@contextmanager
def busy(llm: LLM) -> Iterator[list[RequestOutput]]:
    """Inside, a thread keeps `llm` generating; afterwards the list holds all its outputs. Its error is raised here."""
    outputs: list[RequestOutput] = []
    errors: list[BaseException] = []
    stop, begun = threading.Event(), threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                outputs.extend(llm.generate(PROMPTS, BUSY, use_tqdm=False))
                begun.set()
        except BaseException as error:
            errors.append(error)
            begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(120)
    try:
        yield outputs
    finally:
        stop.set()
        thread.join(120)
        if errors:  # the cause, whatever else failed
            raise errors[0]
    assert not thread.is_alive()


def decode_steps(llm: LLM) -> int:
    steps: int = llm.stats()["card0"]["decode_steps"]
    return steps


def test_second_engines_beside_a_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "STAGING_BYTES", 10_000)  # many pieces a tensor, uneven ones
    files = load_file(Path(DEMO_MODEL) / "model.safetensors")
    with make_llm() as first:
        quiet = answers(first)
        with busy(first) as outputs:
            before = decode_steps(first)
            for _ in range(3):
                with make_llm() as second:
                    assert DEVICE == "cpu" or second.decode_runner.graphs is not None, "nothing was captured"
                    during = decode_steps(first)
                    assert answers(second) == quiet
                    check_weights(second, files)
                    check_nothing_left(second)
                assert during > before, "the first engine was not busy meanwhile"
                before = decode_steps(first)
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
        assert {len(output.outputs[0].token_ids) for output in outputs} == {60}
        assert answers(first) == quiet
        check_nothing_left(first)


def check_weights(llm: LLM, files: dict[str, torch.Tensor]) -> None:
    for name, slot in llm.decode_runner.model.checkpoint_slots().items():
        assert torch.equal(slot.cpu(), files[name].float()), name
