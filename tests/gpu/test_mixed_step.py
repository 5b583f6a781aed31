"""Mixed steps on a card: captured, launched eagerly, and as a prefill and a decode step; at the edges of sizes.

Every step is the same for all runners: where a runner drew another token than the first one (two nearly tied, bits of a
product turned by the batch's shape), it is told the first one's before it goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bench
from nanovllm import DEMO_MODEL
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.shards import MixedShard, PrefillShard, StepResult
from nanovllm.engine.step_sizes import MAX_SEQUENCES
from nanovllm.layers.attention import make_attention_backend
from nanovllm.models.loader import load_model
from nanovllm.models.model_config import load_model_config
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.sampling_params import SamplingParams
from tests.counters import compiles, graph_calls
from tests.cpu.mixed_plan import Item, Plan, any_params, largest_error, mixed, separate
from tests.regret import release_gpu_memory

NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN, MAX_TOKENS = 40, 1200, 32, 1024, 512
# (tokens of prompts, their sequences, decode rows): below, at and above what is captured, which is sums of 256 and 512,
# and 512 tokens, of up to MAX_SEQUENCES sequences, with 16, 32 and 40 rows.
STEPS = [
    (1, 1, 1),
    (239, 3, 15),
    (240, MAX_SEQUENCES, 16),
    (241, 1, 17),
    (300, MAX_SEQUENCES + 1, 5),
    (2, 2, 40),
    (480, 2, 31),
    (481, 4, 32),
    (513, 1, 33),
    (7, 5, 3),
    (216, 1, 39),
    (512, 8, 40),
    (5, 1, 2),
]
# Of log-probabilities; and of a block's keys and values, the mean error by the mean size.
LOGPROB_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.6}
KV_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    release_gpu_memory()
    yield
    release_gpu_memory()


def make_model(folder: Path, dtype: torch.dtype, load_format: str = "auto") -> Qwen3ForCausalLM:
    device, config = torch.device("cuda", 0), load_model_config(folder)
    backend = make_attention_backend("triton", config, device, dtype)
    return load_model(folder, config, backend, dtype, device, MAX_MODEL_LEN, load_format)


def make_runner(model: Qwen3ForCausalLM, captures_decode: bool = True, captures_mixed: bool = False) -> ModelRunner:
    """With pages that hold NaN wherever nobody has written."""
    cache = KVCache(NUM_BLOCKS, BLOCK_SIZE, model.config, model.dtype, model.device)
    runner = ModelRunner(0, model, cache, NUM_SLOTS, MAX_MODEL_LEN)
    runner.warm_up()
    if captures_decode:
        runner.capture()
    if captures_mixed:
        runner.capture_mixed(MAX_TOKENS)
    torch.cuda.synchronize()
    cache.pages.fill_(float("nan"))
    torch.cuda.synchronize()
    return runner


def greedy(rng: random.Random) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=500, logprobs=8)


def any_draw(rng: random.Random) -> SamplingParams:
    params = any_params(rng)
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        min_tokens=params.min_tokens,
        max_tokens=500,
        logprobs=rng.choice([None, None, 0, 4]),
    )


def make_plan(seed: int, vocabulary: int, draw_params=greedy) -> Plan:
    return Plan(seed, NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN, vocabulary, draw_params)


def start(plan: Plan, runners: list[ModelRunner]) -> None:
    """As many prompts as there are slots, of up to three blocks."""
    chunks = [(item, len(item.prompt)) for item in (plan.add(plan.rng.randint(2, 90)) for _ in range(NUM_SLOTS))]
    chunks = [(item, count - item.num_launched) for item, count in chunks]
    shard = PrefillShard(0, 0, tuple(plan._chunk(*chunk) for chunk in chunks))
    plan.take(chunks, [], [runner.run_prefill(shard).wait() for runner in runners])
    assert len(plan.decoding) == NUM_SLOTS


def chunks_of(plan: Plan, num_tokens: int, num_sequences: int) -> list[tuple[Item, int]]:
    """New prompts and begun ones, some in their last chunk, with `num_tokens` in all."""
    rng = plan.rng
    cuts = sorted(rng.sample(range(1, num_tokens), num_sequences - 1))
    counts = [end - begin for begin, end in zip([0, *cuts], [*cuts, num_tokens], strict=True)]
    chunks: list[tuple[Item, int]] = []
    for count in counts:
        begun = [item for item in plan.prefilling if item not in [other for other, _ in chunks]]
        begun = [item for item in begun if len(item.prompt) - item.num_launched >= count]
        chunks.append((rng.choice(begun) if begun and rng.random() < 0.5 else new_prompt(plan, count), count))
    return chunks


def new_prompt(plan: Plan, count: int) -> Item:
    """At least `count` tokens of it are not cached; half the time exactly these."""
    item = plan.add(count + 5 * BLOCK_SIZE)  # no more than five blocks are shared
    if plan.rng.random() < 0.5:
        del item.prompt[item.num_launched + count :]
        del item.table[-(-len(item.prompt) // BLOCK_SIZE) :]
    return item


def check_pages(runners: list[ModelRunner]) -> None:
    """The same KV on all of them, block by block, and NaN still in all that nobody has written."""
    first = runners[0].kv_cache.pages[:-1]  # the null block holds anything
    bound, size = KV_BOUND[first.dtype], first.float().abs().nan_to_num()
    for runner in runners[1:]:
        other = runner.kv_cache.pages[:-1]
        assert torch.equal(first.isnan(), other.isnan()), "a cell was written, or was not"
        error = (other.float() - first.float()).abs().nan_to_num().flatten(1).mean(1)
        assert (error <= bound * size.flatten(1).mean(1)).all(), float(error.max())


def poison_null_blocks(runners: list[ModelRunner]) -> None:
    for runner in runners:
        runner.kv_cache.pages[-1].fill_(float("nan"))
    torch.cuda.synchronize()


def counted(runner: ModelRunner, shard: MixedShard) -> StepResult:
    """A mixed step, which must have been replayed if it fits a captured size; its draws, if there are any graphs."""
    with graph_calls("replay") as replays:
        result = mixed(runner, shard)
    graphs, expected = runner.mixed_graphs, int(runner.graphs is not None)
    if graphs is not None:
        size = graphs.size_for(shard.prefill.num_tokens, len(shard.prefill.chunks), len(shard.decode.slots))
        assert (size is None) == (shard.prefill.num_tokens > MAX_TOKENS or len(shard.prefill.chunks) > MAX_SEQUENCES)
        expected += size is not None
    assert len(replays) == expected
    return result


def run_steps(plan: Plan, runners: list[ModelRunner], bound: float) -> int:
    """Returns how many tokens were not the first runner's, which takes prefill and decode steps."""
    num_unlike = 0
    for num_tokens, num_sequences, num_rows in STEPS:
        chunks = chunks_of(plan, num_tokens, num_sequences)
        rows = plan.rng.sample(plan.decoding, num_rows)
        shard = plan.shard(chunks, rows)
        assert shard.prefill.num_tokens == num_tokens
        poison_null_blocks(runners)
        results = [separate(runners[0], shard), *(counted(runner, shard) for runner in runners[1:])]
        error = largest_error(results, num_missing=4)
        assert error <= bound, f"{num_tokens} tokens, {num_rows} rows: log-probabilities are off by {error}"
        num_unlike += plan.take(chunks, rows, results)
    check_pages(runners)
    return num_unlike


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_captured_eager_and_separate_steps(dtype: torch.dtype) -> None:
    model = make_model(Path(DEMO_MODEL), dtype)
    eager = make_runner(model, captures_decode=False)
    runners = [make_runner(model), make_runner(model, captures_mixed=True), make_runner(model), eager]
    plan = make_plan(1, model.config.vocab_size)
    start(plan, runners)
    num_unlike = run_steps(plan, runners, LOGPROB_BOUND[dtype])
    print(f"{dtype}: {num_unlike} tokens where two were nearly tied")
    assert num_unlike <= (3 if dtype == torch.float32 else 100)


def exact_model() -> Qwen3ForCausalLM:
    """Whose logits are the same bits in every batch: the layers add nothing, and each logit is one product."""
    model = make_model(Path(DEMO_MODEL), torch.bfloat16)
    vocabulary, hidden = model.embed_tokens.weight.shape
    ids = torch.arange(vocabulary, device=model.device)
    for layer in model.layers:
        layer.self_attn.o_proj.weight.zero_()  # type: ignore[union-attr]
        layer.mlp.down_proj.weight.zero_()  # type: ignore[union-attr]
    model.norm.weight.fill_(1.0)
    for weight in {model.embed_tokens.weight, model.lm_head.weight}:
        weight.zero_()
        weight[ids, ids % hidden] = (0.1 + ids // hidden / 128).to(weight.dtype)
    torch.cuda.synchronize()
    return model


def test_the_same_draws_from_the_same_logits() -> None:
    """Every kind of sampling: the draws of a mixed step are, token for token, those of its halves."""
    model = exact_model()
    runners = [make_runner(model), make_runner(model, captures_mixed=True), make_runner(model)]
    plan = make_plan(2, model.config.vocab_size, any_draw)
    start(plan, runners)
    assert run_steps(plan, runners, bound=1e-4) == 0
    outputs = {tuple(item.outputs[:4]) for item in plan.decoding}
    assert len(outputs) > NUM_SLOTS // 2, "these draws are no draws"


def test_nothing_is_compiled_or_captured_late(tmp_path: Path) -> None:
    """With sizes that no other test has: a kernel that another test has built would not count again."""
    sizes = dict(hidden_size=1408, num_hidden_layers=2, num_attention_heads=40, intermediate_size=3520)
    config = bench.SHARED | bench.SHAPES["0.6b"]._asdict() | sizes | {"vocab_size": 50_000, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = make_model(tmp_path, torch.bfloat16, "dummy")
    with compiles() as early, graph_calls("capture_begin") as captured_early:
        runner = make_runner(model, captures_mixed=True)
    plan = make_plan(3, model.config.vocab_size, any_draw)
    with compiles() as late, graph_calls("capture_begin") as captured:
        start(plan, [runner])
        for num_tokens, num_sequences, num_rows in STEPS:
            chunks, rows = chunks_of(plan, num_tokens, num_sequences), plan.rng.sample(plan.decoding, num_rows)
            plan.take(chunks, rows, [counted(runner, plan.shard(chunks, rows))])
    assert early and len(captured_early) == 4 * 8 + 3 * 3, (len(early), len(captured_early))
    assert late == [] and captured == []
