"""Decode in two lanes by regret: random weights of a published shape in bfloat16, each boundary, three splits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python", exc_type=ImportError)
pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if torch.cuda.get_device_properties(0).multi_processor_count < 64:
    pytest.skip("too few SMs for two partitions worth the name", allow_module_level=True)

from bench import write_shape  # noqa: E402
from nanovllm import LLM, SamplingParams  # noqa: E402
from nanovllm.engine.pipeline_runs import PipelineOptions  # noqa: E402
from nanovllm.engine.pipeline_step import Boundary  # noqa: E402
from nanovllm.outputs import RequestOutput  # noqa: E402
from tests.random_work import check_nothing_left  # noqa: E402
from tests.regret import BFLOAT16, Reference, release_gpu_memory  # noqa: E402

ROWS, BLOCK, LONGEST = 48, 64, 900  # rows of a step; tokens
EDGES = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, LONGEST)
OPTIONS: dict[str, Any] = dict(
    device="cuda",
    dtype="bfloat16",
    load_format="dummy",
    kvcache_block_size=BLOCK,
    max_num_batched_tokens=2048,
    max_model_len=1024,
    max_num_seqs=ROWS,
    num_kvcache_blocks=800,
    enable_prefix_caching=False,  # every way decodes KV of its own
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    release_gpu_memory()
    with LLM(write_shape(tmp_path_factory.mktemp("shape"), "0.6b"), **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(llm: LLM) -> Iterator[Reference]:
    yield Reference(llm)
    release_gpu_memory()


def generate(llm: LLM, rng: random.Random) -> list[RequestOutput]:
    """Greedy answers of 48 to 112 tokens to prompts of 1 to 900: a batch that is full, then one that shrinks."""
    lengths = [*EDGES, *(int(LONGEST ** rng.random()) for _ in range(ROWS - len(EDGES)))]
    prompts = [[rng.randrange(llm.model_config.vocab_size) for _ in range(length)] for length in lengths]
    counts = [rng.randrange(48, 113) for _ in prompts]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in counts]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outputs] == counts
    return outputs


@pytest.mark.parametrize(
    "attention_sms, boundary", [(28, "core"), (60, "core"), (44, "projections")], ids=["28 core", "60 core", "44 proj"]
)
def test_static_ways(llm: LLM, reference: Reference, attention_sms: int, boundary: Boundary) -> None:
    runner = llm.decode_runner
    runner.start_pipeline(PipelineOptions("static", attention_sms, None, boundary=boundary))
    try:
        outputs = generate(llm, random.Random(f"{attention_sms} {boundary}"))
        check_nothing_left(llm)
        stats = runner.get_pipeline_statistics()
    finally:
        runner.close_pipeline()
    way, num_tokens = f"{stats['attention_sm']}:{stats['ffn_sm']} {boundary}", sum(map(num_answered, outputs))
    regrets = reference.measure(outputs)
    print(f"{way}: {stats['total_tokens']} of {num_tokens} tokens, {stats['steps_by_way']}; {regrets}")
    assert stats["mode_running"] == "static" and list(stats["steps_by_way"]) == [way]
    # The others are first tokens, and those of steps that computed prompts beside their rows.
    assert stats["total_tokens"] >= 0.8 * num_tokens and stats["steps_by_way"][way] >= 60
    regrets.check(BFLOAT16)


def num_answered(output: RequestOutput) -> int:
    return len(output.outputs[0].token_ids)
