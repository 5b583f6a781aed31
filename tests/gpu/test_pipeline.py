"""Pipelined decode steps on a real GPU: their logits against float32, their memory, and a whole engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python", exc_type=ImportError)
triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if torch.cuda.get_device_properties(0).multi_processor_count < 64:
    pytest.skip("too few SMs for two partitions worth the name", allow_module_level=True)

from nanovllm import DEMO_MODEL, LLM, SamplingParams  # noqa: E402
from nanovllm.engine import pipeline_runs  # noqa: E402
from nanovllm.engine.green_manager import GreenManager  # noqa: E402
from nanovllm.engine.kv_cache import KVCache  # noqa: E402
from nanovllm.engine.pipeline_choice import SEQUENTIAL  # noqa: E402
from nanovllm.engine.pipeline_graphs import StageTimer  # noqa: E402
from nanovllm.engine.pipeline_runs import PipelineOptions  # noqa: E402
from nanovllm.engine.pipeline_step import (  # noqa: E402
    BOUNDARIES,
    Boundary,
    MicroBatch,
    decode_step,
    run_stages,
    split_rows,
)
from nanovllm.engine.pipeline_ways import PARTITION_TOOLS, PipelinedWay, make_way  # noqa: E402
from nanovllm.layers.attention import DecodeMetadata  # noqa: E402
from nanovllm.layers.attention.torch import TorchAttention  # noqa: E402
from nanovllm.layers.attention.triton import TritonAttention  # noqa: E402
from nanovllm.models.loader import load_model  # noqa: E402
from nanovllm.models.model_config import load_model_config  # noqa: E402
from nanovllm.models.qwen3 import Qwen3ForCausalLM  # noqa: E402
from tests.cpu.tiny import write_config  # noqa: E402
from tests.gpu.test_green_ctx import num_sms  # noqa: E402

DEVICE = torch.device("cuda", 0)
PAGE_TOKENS = 64
MOST_TOKENS = 40_000  # of all rows: their KV in float32 beside it
SIZES = dict(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=4096,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen3ForCausalLM:
    folder: Path = write_config(tmp_path_factory.mktemp("model"), **SIZES)
    config = load_model_config(folder)
    return load_model(folder, config, TritonAttention(128), torch.bfloat16, DEVICE, 4096, load_format="dummy")


@pytest.fixture(scope="module")
def exact(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """The same weights in float32, and torch alone."""
    twin = Qwen3ForCausalLM(model.config, TorchAttention(model.config), torch.float32, DEVICE, 4096)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.copy_(theirs)
    return twin


@pytest.fixture(scope="module")
def manager() -> Iterator[GreenManager]:
    manager = GreenManager(DEVICE, enable_rebalance=True)
    yield manager
    torch.cuda.synchronize()
    manager.close()


class Case(NamedTuple):
    """Rows over random KV. `whole`: static tensors, which a test may change between replays."""

    kv_cache: KVCache
    whole: MicroBatch
    logits_BV: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.whole.token_ids)


def make_case(model: Qwen3ForCausalLM, rng: random.Random, num_rows: int, longest: int) -> Case:
    """Uneven contexts up to `longest` tokens, and one empty row as padding is; pages beyond contexts are NaN."""
    lens = [rng.randrange(1, longest + 1) for _ in range(num_rows - 1)] + [0]
    columns = -(-(longest + 1) // PAGE_TOKENS)
    cache = KVCache(num_rows * columns, PAGE_TOKENS, model.config, torch.bfloat16, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(rng.randrange(1 << 30))
    cache.pages.normal_(generator=generator)
    cache.pages[cache.null_block] = float("nan")
    tables = torch.randperm(num_rows * columns, device=DEVICE, generator=generator).int().view(num_rows, columns)
    contexts = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    ids = torch.randint(SIZES["vocab_size"], (num_rows,), device=DEVICE, generator=generator)
    meta = DecodeMetadata(contexts, tables, torch.zeros_like(ids), columns * PAGE_TOKENS, None)
    case = Case(cache, MicroBatch(ids, torch.zeros_like(ids), meta), torch.zeros(num_rows, 4096, device=DEVICE))
    place_rows(case)
    torch.cuda.synchronize()
    return case


def place_rows(case: Case) -> None:
    """Positions and slots of rows of these contexts; empty ones write to the null block."""
    meta = case.whole.metadata
    last = (meta.context_lens.long() - 1).clamp_(min=0)
    blocks = meta.block_tables.gather(1, (last // PAGE_TOKENS)[:, None])[:, 0].long()
    blocks = torch.where(meta.context_lens > 0, blocks, case.kv_cache.null_block)
    case.whole.positions.copy_(last)
    meta.slot_mapping.copy_(blocks * PAGE_TOKENS + last % PAGE_TOKENS)


def micro_batches(case: Case, count: int) -> list[MicroBatch]:
    ids, positions, meta = case.whole
    return [
        MicroBatch(
            ids[rows],
            positions[rows],
            DecodeMetadata(
                meta.context_lens[rows], meta.block_tables[rows], meta.slot_mapping[rows], meta.max_context_tokens
            ),
        )
        for rows in split_rows(len(ids), count)
    ]


def sequential(model: Qwen3ForCausalLM, case: Case) -> Tensor:
    ids, positions, meta = case.whole
    return model.forward_decode(ids, positions, case.kv_cache, meta, out=case.logits_BV)


def exact_logits(exact: Qwen3ForCausalLM, case: Case) -> Tensor:
    """In float32 throughout, over the same KV."""
    cache = KVCache(1, PAGE_TOKENS, exact.config, torch.float32, DEVICE)
    cache.pages = case.kv_cache.pages.float()
    ids, positions, meta = case.whole
    return exact.forward_decode(ids, positions, cache, meta)


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """On a stream of its own, after one eager run."""
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    torch.cuda.synchronize()
    return graph


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def way_of(
    model: Qwen3ForCausalLM, case: Case, manager: GreenManager, attention_sms: int, boundary: Boundary
) -> PipelinedWay:
    split = manager.prepare(attention_sms, None)
    return make_way(model, case.kv_cache, manager.card.total, split, boundary, PARTITION_TOOLS)


# -- logits


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_logits_are_as_near_to_float32_as_the_sequential_steps(
    model: Qwen3ForCausalLM,
    exact: Qwen3ForCausalLM,
    manager: GreenManager,
    boundary: Boundary,
    seed: int,
    record_property: Callable[[str, object], None],
) -> None:
    """Random batch, context, split and number of micro-batches; launched eagerly, captured, and replayed on others'
    state. NaN, which is wherever nobody's KV is, may not reach any row. Of each comparison `rms_ratio`, the error in
    sequential ones, goes to the JUnit report."""
    rng = random.Random(f"{boundary} {seed}")
    num_rows = rng.choice([1, 2, 3, rng.randrange(4, 128), rng.randrange(128, 513)])
    case = make_case(model, rng, num_rows, rng.randrange(1, min(1500, MOST_TOKENS // num_rows)))
    way = way_of(model, case, manager, rng.randrange(8, num_sms() - 15), boundary)
    batches = micro_batches(case, rng.choice([2, 2, 2, 3]))

    def run() -> None:
        decode_step(way.stages, way.lanes, batches, case.logits_BV)

    record_property("way", f"{way.name}, {num_rows} rows in {len(batches)}")

    def check(found: Tensor) -> None:
        expected, plain = exact_logits(exact, case), sequential(model, case)
        assert torch.isfinite(found).all()
        error, plain_error = rms(found - expected), rms(plain - expected)
        record_property("rms_ratio", f"{error / plain_error:.4f}")
        assert error <= 1.1 * plain_error, f"{way.name}, {num_rows} rows"

    graph = capture(run)
    run()
    torch.cuda.synchronize()
    check(case.logits_BV.clone())
    for _ in range(2):
        move_on(case, rng)
        case.logits_BV.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        check(case.logits_BV.clone())


def move_on(case: Case, rng: random.Random) -> None:
    """Another token in every row that has any, and another context."""
    contexts = case.whole.metadata.context_lens
    contexts.copy_(torch.where(contexts > 0, (contexts - rng.randrange(-1, 3)).clamp(min=1), 0))
    case.whole.token_ids.copy_(torch.randint_like(case.whole.token_ids, SIZES["vocab_size"]))
    place_rows(case)


# -- memory and time


@torch.inference_mode()
def test_a_thousand_rebalances_leave_nothing_behind(model: Qwen3ForCausalLM, manager: GreenManager) -> None:
    case = make_case(model, random.Random(1), 96, 300)
    ways = [way_of(model, case, manager, sms, "core") for sms in (36, 60)]
    batches = micro_batches(case, 2)
    graphs = [capture(partial(decode_step, way.stages, way.lanes, batches, case.logits_BV)) for way in ways]
    expected = []
    for graph in graphs:
        graph.replay()
        expected.append(case.logits_BV.clone())
        torch.testing.assert_close(case.logits_BV, expected[-1], atol=1e-2, rtol=1e-2)  # takes a segment to work in
    torch.cuda.synchronize()
    switches, splits = manager.stats()["switches"], len(manager.splits)
    allocated, free = torch.cuda.memory_allocated(DEVICE), torch.cuda.mem_get_info(DEVICE)[0]
    for step in range(1000):
        split = manager.rebalance(*ways[step % 2].split.granted)
        assert split is ways[step % 2].split
        graphs[step % 2].replay()
        if step % 97 < 2:
            torch.testing.assert_close(case.logits_BV, expected[step % 2], atol=1e-2, rtol=1e-2)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(DEVICE) == allocated
    assert abs(torch.cuda.mem_get_info(DEVICE)[0] - free) < 8 << 20
    stats = manager.stats()
    assert (stats["switches"] - switches, stats["splits"]) in ((1000, splits), (999, splits))


@torch.inference_mode()
def test_stage_times_of_a_replay(model: Qwen3ForCausalLM, manager: GreenManager) -> None:
    """Each replay leaves its own times, which fit into the time from the first stage's begin to the last's end."""
    case = make_case(model, random.Random(2), 128, 300)
    way, batches = way_of(model, case, manager, 44, "core"), micro_batches(case, 2)
    timer = StageTimer(way.stages, lambda: torch.cuda.Event(enable_timing=True, external=True))

    def run() -> None:
        timer.clear()
        run_stages(way.stages, way.lanes, batches, timer.run)

    graph = capture(run)
    seen = set()
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        seconds = timer.seconds()
        assert 0 < seconds.attention <= seconds.wall and 0 < seconds.ffn <= seconds.wall
        seen.add(seconds)
    assert len(seen) > 1, "the same times three times: those of the capture"


# -- a whole engine on one card


def answers(llm: LLM, num_prompts: int, max_tokens: int) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and the log-probability of each."""
    rng = random.Random(num_prompts)
    prompts = [[rng.randrange(4096) for _ in range(rng.randrange(1, 90))] for _ in range(num_prompts)]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    found = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        tokens, entries = output.outputs[0].token_ids, output.outputs[0].logprobs
        assert entries is not None
        found.append((tokens, [entry[token].logprob for token, entry in zip(tokens, entries, strict=True)]))
    return found


def check_same(got: list[Any], expected: list[Any]) -> None:
    """Up to a place where the two best tokens are so close that a product's shape decides, which few rows have."""
    whole = 0
    for (mine, my_logprobs), (theirs, their_logprobs) in zip(got, expected, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(mine, theirs, strict=True)) if x != y), len(mine))
        whole += same == len(mine)
        torch.testing.assert_close(my_logprobs[:same], their_logprobs[:same], atol=1e-3, rtol=0)
    assert whole >= 0.9 * len(got)


@pytest.fixture(scope="module")
def engine() -> Iterator[LLM]:
    sizes: dict[str, Any] = dict(max_num_seqs=37, max_model_len=256, num_kvcache_blocks=400)
    with LLM(DEMO_MODEL, device="cuda", dtype="float32", enable_prefix_caching=False, **sizes) as llm:
        yield llm


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_an_engine_in_static_mode_answers_as_the_sequential_one(engine: LLM, boundary: Boundary) -> None:
    runner = engine.decode_runner
    expected = {count: answers(engine, count, 24) for count in (1, 2, 13, 37)}
    runner.start_pipeline(PipelineOptions("static", 44, num_sms() - 44, profiling=True, boundary=boundary))
    try:
        for count in (37, 1, 13, 2, 37):
            check_same(answers(engine, count, 24), expected[count])
        stats = runner.get_pipeline_statistics()
    finally:
        runner.close_pipeline()
    assert stats["mode_running"] == "static" and stats["attention_sm"] + stats["ffn_sm"] == num_sms()
    assert list(stats["steps_by_way"]) == [f"{stats['attention_sm']}:{stats['ffn_sm']} {boundary}"]
    assert stats["timed_steps"] > 0 and stats["avg_attention_time_ms"] > 0 and stats["avg_ffn_time_ms"] > 0
    assert 0 < stats["green"]["attention_busy_share"] <= 1 and 0 < stats["green"]["ffn_busy_share"] <= 1
    check_same(answers(engine, 13, 24), expected[13])


def test_an_engine_in_auto_mode_explores_chooses_and_answers_the_same(
    engine: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_runs, "roofline_can_win", lambda config, rows, context, split: rows in (32, 37))
    runner = engine.decode_runner
    expected = answers(engine, 37, 60)
    runner.start_pipeline(PipelineOptions())
    try:
        for _ in range(6):  # enough for a final in every place, should trials leave the choice in doubt
            check_same(answers(engine, 37, 60), expected)
        stats = runner.get_pipeline_statistics()
    finally:
        runner.close_pipeline()
    assert stats["mode_running"] == "auto" and len(stats["steps_by_way"]) == 5, stats
    decided = [place for place in stats["places"] if place["medians_ms"]]
    assert decided and all(p["medians_ms"][p["chosen"]] <= p["medians_ms"][SEQUENTIAL] for p in decided)


def test_static_refuses_counts_that_do_not_fit(engine: LLM) -> None:
    with pytest.raises(ValueError, match="more than the card's"):
        engine.decode_runner.start_pipeline(PipelineOptions("static", num_sms() - 8, num_sms() - 8))
    assert engine.decode_runner.pipeline is None
    check_same(answers(engine, 2, 5), answers(engine, 2, 5))
