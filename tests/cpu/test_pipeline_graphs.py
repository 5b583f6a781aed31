"""Pipelined graphs without a card: what is captured where, what a replay reads and writes, what the timer adds up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.engine import pipeline_runs
from nanovllm.engine.decode_graphs import bucket_sizes
from nanovllm.engine.green_manager import SmCounts, Split
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.pipeline_choice import SEQUENTIAL
from nanovllm.engine.pipeline_graphs import PipelineGraphs, StageTimer
from nanovllm.engine.pipeline_order import Lane
from nanovllm.engine.pipeline_roofline import LayerWork, pipelined_layer_s, roofline_can_win, sequential_layer_s
from nanovllm.engine.pipeline_runs import DecodeCard, GraphWays, PipelineOptions, can_win
from nanovllm.engine.pipeline_start import _prepare
from nanovllm.engine.pipeline_step import InOrder, MicroBatch, State
from nanovllm.engine.pipeline_ways import PartitionTools, PipelinedWay, auto_counts, make_way
from nanovllm.engine.shards import DecodeShard, SamplingRow, SlotEntry
from nanovllm.engine.slot_state import SlotState
from nanovllm.models.model_config import ModelConfig, load_model_config
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.sampling_params import SamplingParams
from tests.cpu.model_helpers import load_tiny, make_checkpoint
from tests.cpu.tiny import write_config

BLOCK, MAX_LEN, MAX_SEQS = 4, 32, 6


class FakeGraph:
    """Runs again what it was captured from."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


class FakeDecode:
    """What pipelined graphs take from `DecodeGraphs`, on a CPU."""

    def __init__(self, model: Qwen3ForCausalLM, kv_cache: KVCache, slots: SlotState) -> None:
        self.model, self.kv_cache, self.slots = model, kv_cache, slots
        self.buckets = bucket_sizes(MAX_SEQS)
        self.slots_B = torch.full((MAX_SEQS,), slots.null_slot)
        self.logits_BV = torch.zeros(MAX_SEQS, model.config.vocab_size)
        self.captured_with: list[list[int]] = []

    def inputs(self, bucket: int, begin: int = 0) -> tuple[Tensor, Tensor, Any]:
        return self.slots.inputs(self.slots_B[begin:bucket], MAX_LEN)

    def bucket_of(self, num_rows: int) -> int:
        return next(size for size in self.buckets if size >= num_rows)

    def set_slots(self, slots: tuple[int, ...]) -> None:
        self.slots_B.copy_(torch.tensor([*slots, *[self.slots.null_slot] * (MAX_SEQS - len(slots))]))

    def graph_of(self, run: Callable[[], None]) -> FakeGraph:
        self.captured_with.append(self.slots_B.tolist())
        run()
        return FakeGraph(run)

    def replay_model(self, slots: tuple[int, ...]) -> Tensor:
        self.set_slots(slots)
        ids, positions, metadata = self.inputs(len(slots))
        logits = self.model.forward_decode(ids, positions, self.kv_cache, metadata, out=self.logits_BV[: len(slots)])
        return logits.clone()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen3ForCausalLM:
    folder: Path = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder)
    return load_tiny(folder)[1]


@pytest.fixture
def card(model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[DecodeCard]:
    free = itertools.count(10_000, -100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 10_000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cache = KVCache(48, BLOCK, model.config, model.dtype, model.device)
    cache.pages.normal_(generator=torch.Generator().manual_seed(0))
    slots = SlotState(MAX_SEQS, MAX_LEN // BLOCK, BLOCK, cache.null_block, model.config.vocab_size, model.device)
    row = SamplingRow(SamplingParams(temperature=0), seed=0, position=0)
    tables = torch.randperm(48, generator=torch.Generator().manual_seed(1)).view(MAX_SEQS, -1).tolist()
    lens = (1, 31, 4, 9, 16, 5)
    entries = tuple(SlotEntry(slot, slot + 7, lens[slot], tuple(tables[slot]), row) for slot in range(MAX_SEQS))
    slots.apply(DecodeShard(0, 0, tuple(range(MAX_SEQS)), MAX_LEN, entries))
    yield DecodeCard(model, cache, slots, FakeDecode(model, cache, slots), MAX_LEN)  # type: ignore[arg-type]


def way_of(card: DecodeCard, attention_sms: int = 44, boundary: Any = "core") -> PipelinedWay:
    counts = SmCounts(attention_sms, 132 - attention_sms)
    split = Split(counts, counts, 0, None, None, None)  # type: ignore[arg-type]
    tools = PartitionTools(
        lambda model, num_sms: model.attention, lambda *sms: nullcontext(), lambda a, f, sized: InOrder()
    )
    return make_way(card.model, card.kv_cache, 132, split, boundary, tools)


# -- replays


@pytest.mark.parametrize("boundary", ["core", "projections"])
@pytest.mark.parametrize("slots", [(0,), (3, 1), (5, 0, 2), (0, 1, 2, 3, 4, 5), (4, 2, 0, 1, 5)])
def test_a_replay_gives_the_sequential_logits_where_the_samplers_read_them(
    card: DecodeCard, boundary: str, slots: tuple[int, ...]
) -> None:
    decode: Any = card.graphs
    graphs = PipelineGraphs(decode, [way_of(card, boundary=boundary)])
    for bucket in reversed(decode.buckets):
        graphs.capture(f"44:88 {boundary}", bucket)
    expected = decode.replay_model(slots)
    decode.logits_BV.fill_(float("nan"))
    logits = graphs.replay(f"44:88 {boundary}", slots)
    assert logits.data_ptr() == decode.logits_BV.data_ptr() and logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(decode.logits_BV[: decode.bucket_of(len(slots))]).all(), "padding rows included"


def test_captures_and_rehearsals_run_for_nobody(card: DecodeCard) -> None:
    """Rows of the step before must not be computed again: their blocks may be others' by now."""
    decode: Any = card.graphs
    decode.set_slots((0, 1, 2))
    pages = card.kv_cache.pages.clone()
    graphs = PipelineGraphs(decode, [way_of(card)])
    graphs.capture("44:88 core", 4)
    decode.set_slots((0, 1, 2))
    graphs.rehearse()
    assert decode.captured_with == [[card.slots.null_slot] * MAX_SEQS]
    assert torch.equal(card.kv_cache.pages[:-1], pages[:-1]), "only the null block was written"
    assert graphs.graph_bytes == 100


def test_what_is_prepared_for_auto_and_for_static(card: DecodeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    decode: Any = card.graphs
    monkeypatch.setattr(
        pipeline_runs, "roofline_can_win", lambda config, rows, context, split: rows >= 4 and context > 8
    )
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    ways = [way_of(card, 28), way_of(card, 60)]
    auto: Any = _prepare(card, ways, PipelineOptions())
    assert auto.graphs.captured == [(way.name, bucket) for bucket in (6, 4) for way in ways]
    assert auto.names_at((6, 16)) == ("28:104 core", "60:72 core")
    assert auto.names_at((2, 16)) == auto.names_at((6, 8)) == ()
    static: Any = _prepare(card, ways[:1], PipelineOptions("static", profiling=True))
    assert static.graphs.captured == [("28:104 core", bucket) for bucket in reversed(decode.buckets)]
    assert static.names_at((1, 8)) == ("28:104 core",)
    timed = static.run_timed("28:104 core", (1, 2), 16)
    assert timed is not None and timed[0].shape[0] == 2
    assert static.run_timed(SEQUENTIAL, (1, 2), 16) is None and auto.run_timed("28:104 core", (1, 2), 16) is None
    static.close()
    assert not static.graphs.captured and static.split_of("28:104 core") is None


def test_graph_ways_run_the_sequential_graph_too(card: DecodeCard) -> None:
    decode: Any = card.graphs
    ways = GraphWays(card, PipelineGraphs(decode, []), PipelineOptions())
    torch.testing.assert_close(ways.run(SEQUENTIAL, (2, 3), 16), decode.replay_model((2, 3)))
    assert ways.split_of(SEQUENTIAL) is None and ways.bucket_of(3) == 4


# -- the timer


class FakeEvent:
    """Recorded on a clock that ticks at every event."""

    clock = itertools.count()

    def __init__(self, enable_timing: bool = False, external: bool = False) -> None:
        assert enable_timing and external, "a replay must leave its time in it"

    def record(self) -> None:
        self.at = next(FakeEvent.clock)

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


class CountingStages:
    def run(self, lane: Lane, layer: int, batch: MicroBatch, state: State) -> State:
        for _ in range(2 if lane == "attention" else 4):
            next(FakeEvent.clock)
        return state


def test_the_timer_sums_each_lanes_stages() -> None:
    timer = StageTimer(CountingStages(), lambda: FakeEvent(True, True))  # type: ignore[arg-type,return-value]
    for _ in range(2):
        timer.clear()
        for lane in ("ffn", "attention", "ffn"):
            timer.run(lane, 0, None, ())  # type: ignore[arg-type]
    seconds = timer.seconds()
    assert (seconds.attention, seconds.ffn) == pytest.approx((0.003, 0.010))
    assert seconds.wall == pytest.approx(0.015)  # 13 in stages, one tick from each to the next


# -- where two lanes can win


@pytest.fixture(scope="module")
def qwen3_8b(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    sizes = dict(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    return load_model_config(write_config(tmp_path_factory.mktemp("8b"), **sizes, intermediate_size=12288))


def test_floors_are_those_of_bytes_and_operations(qwen3_8b: ModelConfig) -> None:
    work = LayerWork.of(qwen3_8b, 512, 512)
    weights = 4096 * (4096 * 2 + 2048) + 3 * 4096 * 12288
    assert (work.kv_bytes, work.weight_bytes, work.flops) == (512 * 512 * 4096, 2 * weights, 2 * weights * 512)
    attention_s, products_s = work.kv_bytes / 4.45e12, work.flops / 797e12
    assert sequential_layer_s(work) == pytest.approx(attention_s + products_s)
    both_s = (work.kv_bytes + 2 * work.weight_bytes) / 4.45e12
    assert pipelined_layer_s(work, SmCounts(44, 88), 2) == pytest.approx(both_s), "memory limits it"
    assert pipelined_layer_s(work, SmCounts(8, 124), 2) == pytest.approx(work.kv_bytes / 0.92e12)
    assert pipelined_layer_s(work, SmCounts(124, 8), 2) == pytest.approx(work.flops / 57e12)
    one = pipelined_layer_s(work, SmCounts(64, 68), 1)
    assert one > sequential_layer_s(work), "one micro-batch is in one lane at a time"


def test_only_large_batches_can_win(qwen3_8b: ModelConfig) -> None:
    split = SmCounts(44, 88)
    assert [rows for rows in (1, 16, 64, 256, 512, 1024) if roofline_can_win(qwen3_8b, rows, 512, split)] == [512, 1024]
    assert not roofline_can_win(qwen3_8b, 512, 512, SmCounts(8, 124))
    assert not roofline_can_win(qwen3_8b, 1024, 256, SmCounts(100, 32))


def test_a_way_is_captured_if_it_can_win_at_some_context(card: DecodeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def win(config: ModelConfig, rows: int, context: int, split: SmCounts) -> bool:
        asked.append(context)
        return context == 4096

    monkeypatch.setattr(pipeline_runs, "roofline_can_win", win)
    way, options = way_of(card), PipelineOptions()
    assert can_win(card._replace(max_model_len=3000), options, way, 8) and asked == [
        64,
        128,
        256,
        512,
        1024,
        2048,
        4096,
    ]
    assert not can_win(card, options, way, 8) and not can_win(card, options, way, 8, 2048)
    assert can_win(card, PipelineOptions("static"), way, 8)


@pytest.mark.parametrize(
    ("sms", "counts"),
    [((132, 8, 8), [112, 104, 96, 80]), ((108, 4, 2), [92, 84, 78, 66]), ((16, 8, 8), [8])],
)
def test_the_splits_that_auto_tries(sms: tuple[int, int, int], counts: list[int]) -> None:
    from nanovllm.engine.green_manager import CardSms

    assert auto_counts(CardSms(*sms)) == [(None, ffn_sms) for ffn_sms in counts]
