"""A mixed step against a prefill and a decode step: tokens, log-probabilities, KV; eager, and as captured ones run.

What a graph would replay is run again here: the same code over the same static buffers, on a CPU.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.executor import Executor, InlineExecutor, Job, ThreadedExecutor
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.metrics import EngineMetrics
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.shards import (
    DecodeShard,
    MixedShard,
    PrefillChunk,
    PrefillShard,
    SamplingRow,
    SlotEntry,
)
from nanovllm.layers.attention import DecodeMetadata, PrefillMetadata
from nanovllm.layers.attention.torch import TorchAttention
from nanovllm.layers.sampler import sample
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.sampling_params import SamplingParams
from tests.cpu.mixed_plan import Item, Plan, any_params, largest_error, mixed, separate
from tests.cpu.model_helpers import load_tiny, make_checkpoint
from tests.sim.simulated_device import CorruptKV, SimulatedExecutor, expected_tokens

triton = pytest.importorskip("triton", reason="captured decode steps hold Triton kernels", exc_type=ImportError)

from nanovllm.engine import slot_packets, step_sizes  # noqa: E402
from nanovllm.engine.decode_graphs import DecodeGraphs  # noqa: E402
from nanovllm.engine.mixed_graphs import MixedGraphs  # noqa: E402
from nanovllm.engine.slot_packets import SlotPackets  # noqa: E402
from nanovllm.engine.step_sizes import MAX_SEQUENCES, captured_sizes  # noqa: E402
from nanovllm.kernels.packet import write_runs_reference  # noqa: E402

VOCABULARY, BLOCK_SIZE, NUM_BLOCKS, NUM_SLOTS, MAX_MODEL_LEN = 97, 4, 160, 7, 64
BOUND = 1e-5  # of keys, values and log-probabilities: a batch's shape may turn the last bits of a product


# -- runners on a CPU, one of them with what stands in for graphs


class Replayed:
    """In place of a graph: what was captured, run again."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run, self.num_replays = run, 0

    def replay(self) -> None:
        self.num_replays += 1
        self.run()


class ReplayedDecode(DecodeGraphs):
    """The captured steps of a card, by plain torch."""

    def graph_of(self, run: Callable[[], None]) -> Any:
        run()
        return Replayed(run)

    def inputs(self, bucket: int) -> Any:
        return self.slots.inputs(self.slots_B[:bucket], self.max_context_tokens)

    def _run_sampler(self, bucket: int, kind: Any) -> None:
        slots_B = self.slots_B[:bucket]
        batch = self.slots.sampling_batch(SimpleNamespace(slots=self.slots._rows), slots_B)  # type: ignore[arg-type]
        self.token_ids_B[:bucket] = sample(self.logits_BV[:bucket], batch)
        self.slots.advance(slots_B, self.token_ids_B[:bucket])
        self.slots.count(slots_B, self.token_ids_B[:bucket])


class FromTheCard(TorchAttention):
    """Reads lengths from the tensors alone, as kernels do, and leaves garbage where no sequence has a token. Its plan
    is a copy of the decode rows' lengths: it must be there, and made of those that are attended."""

    def planned(self, meta: DecodeMetadata, k_pages: Tensor) -> DecodeMetadata:
        return replace(meta, plan=meta.context_lens.clone())  # type: ignore[arg-type]

    def decode(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata, out: Tensor | None = None
    ) -> Tensor:
        assert isinstance(meta.plan, Tensor) and torch.equal(meta.plan, meta.context_lens), "no plan, or another step's"
        return super().decode(q_BHD, k_pages, v_pages, meta, out)

    def prefill(
        self, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: PrefillMetadata, out: Tensor | None = None
    ) -> Tensor:
        queries = meta.cu_seqlens_q.diff().tolist()
        used = [s for s, count in enumerate(queries) if count]
        total = sum(queries)
        meta = replace(
            meta,
            block_tables=meta.block_tables[used],
            host_query_lens=tuple(queries[s] for s in used),
            host_context_lens=tuple(meta.context_lens.tolist()[s] for s in used),
        )
        out = torch.empty_like(q_THD) if out is None else out
        out.fill_(float("nan"))
        super().prefill(q_THD[:total], k_pages, v_pages, meta, out[:total])
        return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen3ForCausalLM:
    folder: Path = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, seed=3)
    return load_tiny(folder)[1]


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What graphs ask of CUDA; and sizes that a test reaches."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(slot_packets, "write_runs", write_runs_reference)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(step_sizes, "STEP_TOKENS", (10, 18, 30))
    monkeypatch.setattr(step_sizes, "MIN_CHUNK_TOKENS", 4)
    monkeypatch.setattr(step_sizes, "MIN_BUCKET", 2)


def make_runner(model: Qwen3ForCausalLM, num_slots: int = NUM_SLOTS, num_blocks: int = NUM_BLOCKS) -> ModelRunner:
    cache = KVCache(num_blocks, BLOCK_SIZE, model.config, model.dtype, model.device)
    cache.pages.fill_(float("nan"))
    return ModelRunner(0, model, cache, num_slots, MAX_MODEL_LEN)


def capture(runner: ModelRunner, graphs_of_mixed_steps: bool) -> None:
    runner.model = model = runner.model.copy_to(runner.device, FromTheCard(runner.model.config))
    with torch.inference_mode():
        runner.graphs = ReplayedDecode(model, runner.kv_cache, runner.slots, NUM_SLOTS, MAX_MODEL_LEN)
        runner.slots.use_packets(SlotPackets(runner.slots))
        if graphs_of_mixed_steps:
            runner.mixed_graphs = MixedGraphs(runner.graphs, 10_000)
    runner.kv_cache.pages.fill_(float("nan"))


def make_plan(seed: int, draw_params: Callable[[random.Random], SamplingParams] = any_params) -> Plan:
    plan = Plan(seed, NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN, VOCABULARY, draw_params)
    for _ in range(4):
        plan.add(plan.rng.randint(2, 9))
    return plan


def start(plan: Plan, runners: list[ModelRunner]) -> None:
    """Prefill the first prompts, so that there is something to decode."""
    chunks = [(item, len(item.prompt)) for item in plan.prefilling]
    shard = PrefillShard(0, 0, tuple(plan._chunk(*chunk) for chunk in chunks))
    plan.take(chunks, [], [runner.run_prefill(shard).wait() for runner in runners])


def next_chunks(plan: Plan) -> list[tuple[Item, int]]:
    """One to three sequences, in chunks that end in, at and behind the ends of blocks; most are not their last. Now and
    then a long prompt as a whole.
    """
    rng = plan.rng
    if plan.num_steps % 6 == 5:
        item = plan.add(40)
        return [(item, len(item.prompt) - item.num_launched)]
    while len(plan.prefilling) < 3:
        plan.add(rng.choice([1, 3, 4, 5, 8, 9, rng.randint(10, 40)]))
    chosen = rng.sample(plan.prefilling, rng.randint(1, 3))
    return [(item, rng.choice(chunk_sizes(len(item.prompt) - item.num_launched))) for item in chosen]


def chunk_sizes(left: int) -> list[int]:
    return [size for size in (1, 3, 4, 5, 11, left) if size <= left]


def next_rows(plan: Plan) -> list[Item]:
    rng = plan.rng
    for item in list(plan.decoding):
        if len(plan.decoding) > 1 and (rng.random() < 0.1 or item.num_kv_tokens + 2 > MAX_MODEL_LEN):
            plan.leave(item)
    plan._fill_slots()
    return rng.sample(plan.decoding, rng.randint(1, len(plan.decoding)))


def check_pages(runners: list[ModelRunner]) -> None:
    """The same KV on all of them, and nothing in blocks that nobody has written."""
    pages = [runner.kv_cache.pages[:-1] for runner in runners]  # the null block holds anything
    for other in pages[1:]:
        torch.testing.assert_close(other, pages[0], atol=BOUND, rtol=BOUND, equal_nan=True)


# -- against separate steps


def run_plan(seed: int, runners: list[ModelRunner], num_steps: int = 14) -> None:
    plan = make_plan(seed)
    start(plan, runners)
    for _ in range(num_steps):
        chunks, rows = next_chunks(plan), next_rows(plan)
        shard = plan.shard(chunks, rows)
        for runner in runners:
            runner.kv_cache.pages[-1].fill_(float("nan"))
        results = [separate(runners[0], shard), *(mixed(runner, shard) for runner in runners[1:])]
        assert len(results[0].token_ids) == shard.prefill.num_samples + len(rows)
        assert largest_error(results) < 10 * BOUND
        assert plan.take(chunks, rows, results) == 0, "a token differs"
        check_pages(runners)


@pytest.mark.parametrize("seed", range(5))
def test_a_mixed_step_is_a_prefill_and_a_decode_step(model: Qwen3ForCausalLM, seed: int) -> None:
    run_plan(seed, [make_runner(model), make_runner(model)])


@pytest.mark.parametrize("seed", [5, 6, 8])
def test_as_captured_steps_run(model: Qwen3ForCausalLM, seed: int, no_card: None) -> None:
    """Padded tokens, sequences and rows change nothing; nor do steps too large to be captured, in between."""
    plain, captured, eager = make_runner(model), make_runner(model), make_runner(model)
    capture(captured, True)
    capture(eager, False)
    run_plan(seed, [plain, captured, eager], num_steps=20)
    graphs = captured.mixed_graphs
    assert graphs is not None
    used = {size for size, graph in graphs._graphs.items() if graph.num_replays}  # type: ignore[attr-defined]
    assert len(used) >= 3 and sum(g.num_replays for g in graphs._graphs.values()) < 20, used  # type: ignore[attr-defined]


def test_rows_of_an_earlier_larger_step_do_not_run_again(model: Qwen3ForCausalLM, no_card: None) -> None:
    """A decode step pads its own bucket, a mixed one a larger: none of the slots behind its rows may advance."""
    runner = make_runner(model)
    capture(runner, True)
    plan = make_plan(11)
    for _ in range(3):
        plan.add(5)
    start(plan, [runner])
    rows = list(plan.decoding)
    assert len(rows) == NUM_SLOTS
    everyone = plan.shard([(plan.add(3), 3)], rows)
    plan.take([(plan.prefilling[0], 3)], rows, [mixed(runner, everyone)])
    few = rows[:3]
    for count, chunks in ((3, []), (3, [(plan.add(2), 1)])):
        before = runner.slots.integers_S7.clone()
        shard = plan.shard(chunks, few[:count])
        result = mixed(runner, shard) if chunks else runner.run_decode_core(shard.decode).wait()
        plan.take(chunks, few[:count], [result])
        moved = (runner.slots.num_kv_tokens_S - before[:, 1]).tolist()
        assert moved == [int(slot in {item.slot for item in few[:count]}) for slot in range(NUM_SLOTS + 1)]


def test_the_smallest_size_that_holds_a_step() -> None:
    graphs = MixedGraphs.__new__(MixedGraphs)
    graphs._graphs = dict.fromkeys(captured_sizes(48, 600))  # type: ignore[arg-type]
    assert graphs.size_for(1, 1, 1) == (240, 16) and graphs.size_for(209, MAX_SEQUENCES, 17) == (224, 32)
    assert graphs.size_for(225, 1, 33) == (464, 48) and graphs.size_for(600, 1, 48) == (600, 48)
    assert graphs.size_for(601, 1, 1) is None and graphs.size_for(5, MAX_SEQUENCES + 1, 1) is None


def test_a_large_step_is_padded_by_half_at_most() -> None:
    graphs = MixedGraphs.__new__(MixedGraphs)
    graphs._graphs = dict.fromkeys(captured_sizes(512, 4096))  # type: ignore[arg-type]
    assert graphs.size_for(1008, 1, 16) == (1008, 16) and graphs.size_for(1000, 1, 512) == (1536, 512)
    assert graphs.size_for(1350, 1, 16) == (2032, 16) and graphs.size_for(1349, 1, 16) is None
    assert graphs.size_for(1008, 1, 17) is None and graphs.size_for(2033, 1, 16) is None


# -- through the executors, the books, and on the simulated device


@pytest.fixture(params=[InlineExecutor, ThreadedExecutor])
def executor_of(request: pytest.FixtureRequest) -> Iterator[Callable[[ModelRunner], Executor]]:
    made: list[Executor] = []

    def make(runner: ModelRunner) -> Executor:
        runners = {0: runner}
        threads = request.param is ThreadedExecutor
        made.append(ThreadedExecutor(runners, lambda: None) if threads else InlineExecutor(runners))
        return made[-1]

    yield make
    for executor in made:
        executor.close()


def collect(executor: Executor) -> Job:
    pause = threading.Event()
    for _ in range(2000):
        if jobs := executor.poll():
            return jobs[0]
        pause.wait(0.005)
    raise AssertionError("the step did not complete")


def test_dispatch(model: Qwen3ForCausalLM, executor_of: Callable[[ModelRunner], Executor]) -> None:
    runners = [make_runner(model), make_runner(model)]
    plan = make_plan(21)
    start(plan, runners)
    chunks, rows = next_chunks(plan), next_rows(plan)
    shard = plan.shard(chunks, rows)
    executor = executor_of(runners[0])
    executor.launch(shard)
    job = collect(executor)
    assert job.error is None and job.result is not None and job.seconds > 0
    assert job.result.token_ids == separate(runners[1], shard).token_ids
    metrics = EngineMetrics(1)
    metrics.record(job, len(job.result.token_ids))
    card = metrics.as_dict()["card0"]
    assert (card["mixed_steps"], card["prefill_steps"], card["decode_steps"]) == (1, 0, 0)
    assert card["prefill_tokens"] == sum(count for _, count in chunks) and card["decode_tokens"] == len(rows)
    assert card["mixed_seconds"] == job.seconds and card["busy_share"] > 0


def simulated_step(prefix: list[int], chunk: list[int], kv: list[int], last_token: int) -> MixedShard:
    """A second chunk in blocks 0 and 1, and a row in block 2; blocks of 4."""
    row = SamplingRow(SamplingParams(), seed=9, position=0)
    prefill = PrefillChunk(tuple(chunk), len(prefix), (0, 1), (row,))
    entry = SlotEntry(0, last_token, len(kv), (2,), SamplingRow(SamplingParams(), seed=8, position=1))
    return MixedShard(0, 2, PrefillShard(0, 2, (prefill,)), DecodeShard(0, 2, (0,), len(kv) + 1, (entry,)))


@pytest.mark.parametrize("missing", [None, "prefix", "row"])
def test_the_simulated_device_checks_both_halves(missing: str | None) -> None:
    device = SimulatedExecutor({0: BlockManager(4, 4, keep_cached=True)}, random.Random(0))
    prefix, chunk, kv = [5, 6, 7, 8], [9, 10], [11, 12]
    first = expected_tokens(kv, 8, 1, set())[0]
    value = [PrefillChunk(tuple(prefix), 0, (0,)), PrefillChunk(tuple(kv), 0, (2,))]
    written = [part for part, name in zip(value, ("prefix", "row"), strict=True) if name != missing]
    device.launch(PrefillShard(0, 1, tuple(written)))
    device.launch(simulated_step(prefix, chunk, kv, first))
    if missing:
        with pytest.raises(CorruptKV):
            while device.advance():
                pass
        return
    assert device.poll() == [], "nothing happens before its time"
    while device.advance():
        pass
    _, job = device.poll()
    assert job.result is not None
    assert job.result.token_ids == [
        expected_tokens(prefix + chunk, 9, 1, set())[0],
        expected_tokens(kv, 8, 2, set())[1],
    ]
    assert device.executed_steps == device.reported_steps == {(0, 1), (0, 2)}
