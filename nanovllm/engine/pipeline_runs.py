"""The steps that a decode card can run, by way: replayed from graphs, or launched kernel by kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nanovllm.engine.green_manager import Split
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.pipeline_choice import SEQUENTIAL, Place, context_bucket
from nanovllm.engine.pipeline_graphs import PipelineGraphs, StageTimer
from nanovllm.engine.pipeline_roofline import roofline_can_win
from nanovllm.engine.pipeline_step import Boundary, MicroBatch, StageRun, decode_step, split_rows
from nanovllm.engine.pipeline_ways import PipelinedWay
from nanovllm.engine.slot_state import SlotState
from nanovllm.layers.host import to_device
from nanovllm.models.qwen3 import Qwen3ForCausalLM

if TYPE_CHECKING:  # a CPU build of torch comes without Triton
    from nanovllm.engine.decode_graphs import DecodeGraphs

SHORTEST_CONTEXT_TOKENS = 64  # of the contexts for which a capture may be worth it


class PipelineOptions(NamedTuple):
    """As in `Config`: mode "auto" or "static", SMs asked for (None: the rest, or half each), and the switches."""

    mode: str = "auto"
    attention_sm: int | None = None
    ffn_sm: int | None = None
    disable_green: bool = False
    profiling: bool = False
    debug: bool = False
    boundary: Boundary = "core"

    @property
    def names_a_split(self) -> bool:
        return self.attention_sm is not None or self.ffn_sm is not None


class DecodeCard(NamedTuple):
    """What a pipeline needs of a runner. graphs: of its decode steps, None where they are launched eagerly."""

    model: Qwen3ForCausalLM
    kv_cache: KVCache
    slots: SlotState
    graphs: DecodeGraphs | None
    max_model_len: int


def can_win(card: DecodeCard, options: PipelineOptions, way: PipelinedWay, num_rows: int, context: int = 0) -> bool:
    """Whether a way is worth a trial at so many tokens of context, or (0) a capture for any. Static ones always are."""
    contexts = [context] if context else _contexts(card.max_model_len)
    split, config = way.split.granted, card.model.config
    return options.mode == "static" or any(roofline_can_win(config, num_rows, tokens, split) for tokens in contexts)


def _contexts(max_model_len: int) -> list[int]:
    """Powers of two up to one that holds `max_model_len`."""
    longest = context_bucket(max_model_len)
    return [1 << i for i in range(longest.bit_length()) if SHORTEST_CONTEXT_TOKENS <= 1 << i] or [longest]


class EagerWays:
    """Steps launched kernel by kernel; the stages of pipelined ones on their lanes."""

    def __init__(self, card: DecodeCard, ways: list[PipelinedWay], options: PipelineOptions) -> None:
        self.card, self.options, self.num_micro_batches = card, options, 2
        self.ways = {way.name: way for way in ways}

    def bucket_of(self, num_rows: int) -> int:
        """Steps of any number of rows run as they are: places are powers of two."""
        return context_bucket(num_rows)

    def names_at(self, place: Place) -> tuple[str, ...]:
        return tuple(name for name, way in self.ways.items() if can_win(self.card, self.options, way, *place))

    def split_of(self, way: str) -> Split | None:
        return self.ways[way].split if way in self.ways else None

    def run(self, way: str, slots: tuple[int, ...], max_context_tokens: int) -> Tensor:
        if way != SEQUENTIAL:
            return self._run_pipelined(self.ways[way], slots, max_context_tokens)
        batch = self._batch(slots, max_context_tokens)
        return self.card.model.forward_decode(batch.token_ids, batch.positions, self.card.kv_cache, batch.metadata)

    def run_timed(self, way: str, slots: tuple[int, ...], max_context_tokens: int) -> tuple[Tensor, StageTimer] | None:
        if way == SEQUENTIAL:
            return None
        timer = StageTimer(self.ways[way].stages, lambda: torch.cuda.Event(enable_timing=True))
        return self._run_pipelined(self.ways[way], slots, max_context_tokens, timer.run), timer

    def _run_pipelined(
        self, way: PipelinedWay, slots: tuple[int, ...], max_context_tokens: int, run: StageRun | None = None
    ) -> Tensor:
        parts = split_rows(len(slots), self.num_micro_batches)
        batches = [self._batch(slots[rows], max_context_tokens) for rows in parts]
        shape, device = (len(slots), self.card.model.config.vocab_size), self.card.kv_cache.device
        out = torch.empty(shape, dtype=torch.float32, device=device)
        return decode_step(way.stages, way.lanes, batches, out, run)

    def _batch(self, slots: tuple[int, ...], max_context_tokens: int) -> MicroBatch:
        slots_B = to_device(slots, torch.int64, self.card.kv_cache.device)
        return MicroBatch(*self.card.slots.inputs(slots_B, max_context_tokens))

    def close(self) -> None:
        self.ways = {}


class GraphWays:
    """Steps replayed: the sequential ones of `DecodeGraphs`, and what was captured beside them."""

    def __init__(self, card: DecodeCard, graphs: PipelineGraphs, options: PipelineOptions) -> None:
        self.card, self.graphs, self.options = card, graphs, options
        self.num_micro_batches = graphs.num_micro_batches

    def bucket_of(self, num_rows: int) -> int:
        return self.graphs.decode.bucket_of(num_rows)

    def names_at(self, place: Place) -> tuple[str, ...]:
        ways = self.graphs.ways.values()
        captured = [way for way in ways if self.graphs.has(way.name, place[0])]
        return tuple(way.name for way in captured if can_win(self.card, self.options, way, *place))

    def split_of(self, way: str) -> Split | None:
        return self.graphs.ways[way].split if way in self.graphs.ways else None

    def run(self, way: str, slots: tuple[int, ...], max_context_tokens: int) -> Tensor:
        """Graphs are right at every length."""
        return self.graphs.decode.replay_model(slots) if way == SEQUENTIAL else self.graphs.replay(way, slots)

    def run_timed(self, way: str, slots: tuple[int, ...], max_context_tokens: int) -> tuple[Tensor, StageTimer] | None:
        return self.graphs.replay_timed(way, slots)

    def close(self) -> None:
        self.graphs.close()
