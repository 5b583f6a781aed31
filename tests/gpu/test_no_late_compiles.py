"""After start-up nothing is compiled and nothing captured, whatever requests ask for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
from nanovllm import LLM, SamplingParams
from tests.counters import compiles, graph_calls
from tests.random_work import Work, answers, check_nothing_left
from tests.regret import release_gpu_memory

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)
import triton.language as tl  # noqa: E402

NUM_REQUESTS = 150
LONGEST_PROMPT = 2000


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    release_gpu_memory()
    yield
    release_gpu_memory()


def write_model_of_its_own(folder: Path) -> Path:
    """Sizes that no other test has: a kernel that another test of this process has built would not count again."""
    sizes = dict(hidden_size=1152, num_hidden_layers=4, num_attention_heads=24, intermediate_size=3200)
    config = bench.SHARED | bench.SHAPES["0.6b"]._asdict() | sizes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def varied_work(seed: int, vocab_size: int) -> Work:
    """Lengths from 1 to 2000, half of them with shared prefixes; every kind of sampling; log-probabilities."""
    rng = random.Random(seed)
    work = Work.random(seed, vocab_size)
    lengths = [1, 2, 63, 64, 65, LONGEST_PROMPT, *(int(LONGEST_PROMPT ** rng.random()) for _ in range(70))]
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    prompts += work.prompts[: NUM_REQUESTS - len(prompts)]
    rng.shuffle(prompts)
    return Work(prompts, [vary(rng, params) for params in work.params[:NUM_REQUESTS]])


def vary(rng: random.Random, params: SamplingParams) -> SamplingParams:
    """No stop strings: this checkpoint has no tokenizer."""
    min_p = 0.0 if params.is_greedy else rng.choice([0.0, 0.0, 0.05])
    max_tokens = rng.choice([params.max_tokens, params.max_tokens, 300])  # grows by blocks, so that some are preempted
    return replace(params, stop=None, min_p=min_p, max_tokens=max_tokens, logprobs=rng.choice([None, None, 0, 5]))


def test_nothing_is_compiled_or_captured_after_start_up(tmp_path: Path) -> None:
    sizes = dict(max_model_len=2300, max_num_seqs=24, max_num_batched_tokens=1024)
    pool = dict(kvcache_block_size=32, num_kvcache_blocks=80)
    with compiles() as early, graph_calls("capture_begin") as captured_early:
        llm = LLM(write_model_of_its_own(tmp_path), device="cuda", load_format="dummy", **sizes, **pool)
    with llm, compiles() as late, graph_calls("capture_begin") as captured, graph_calls("replay") as replays:
        work = varied_work(21, llm.model_config.vocab_size)
        got = answers(llm, work, abort_seed=None)
        check_nothing_left(llm)
        stats = llm.stats()
    print(f"start-up: {len(early)} kernels, {len(captured_early)} captures; then {len(replays)} replays, {stats}")
    assert early and captured_early and replays and len(got) == NUM_REQUESTS
    assert stats["recomputes"] > 0 and stats["cached_tokens"] > 0, stats
    assert late == [] and captured == []


@triton.jit
def _fill_kernel(out_ptr: tl.tensor, VALUE: tl.constexpr) -> None:
    tl.store(out_ptr, VALUE)


def test_the_counters_count() -> None:
    """A kernel counts once for each new constant, a capture each time: else the test above could not fail."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    with compiles() as names:
        for value in (11, 11, 12):
            _fill_kernel[(1,)](out, VALUE=value)
            assert int(out) == value
    assert len(names) == 2 and all("_fill_kernel" in name for name in names), names
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    out.add_(1)  # a first call loads its kernel, which does not belong into a capture
    with graph_calls("capture_begin") as captures, graph_calls("replay") as replays:
        with torch.cuda.graph(graph, stream=stream):
            out.add_(1)
        graph.replay()
    assert len(captures) == len(replays) == 1
    assert int(out) == 14
