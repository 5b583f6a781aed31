"""One card: its weights, KV pages, stream and slots. Turns shards into launched work; knows of no other card."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanovllm.engine.kv_cache import CopyHandle, KVCache
from nanovllm.engine.shards import (
    CopyShard,
    DecodeShard,
    PrefillChunk,
    PrefillShard,
    SamplingRow,
    StepResult,
    TokenLogprobs,
)
from nanovllm.engine.slot_state import SlotState, fill_seen, sampling_floats, slot_integers
from nanovllm.layers.attention import PrefillMetadata
from nanovllm.layers.host import to_device
from nanovllm.layers.sampler import SamplingBatch, gather_logprobs, sample
from nanovllm.layers.seen_tokens import unpack
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.sampling_params import SAMPLER_KINDS, SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.decode_graphs import DecodeGraphs
    from nanovllm.engine.prefill_graphs import PrefillGraphs


class StepHandle:
    """A launched step. `start` and `event`, timing events, mark its begin and end on the card; None on a CPU, where it
    has ended already. What the host still prepares while the card has nothing else to do lies between the two."""

    def __init__(
        self,
        token_ids: Tensor,
        logprobs: tuple[Tensor, ...],
        wanted: list[int | None],
        start: torch.cuda.Event | None,
    ) -> None:
        self._wanted = wanted
        self._host = [_to_host(tensor) for tensor in (token_ids, *logprobs)]
        self.start = start
        self.event = None if start is None else _timed_event()

    @property
    def seconds(self) -> float | None:
        """Device time from the step's first kernel to its last; None on a CPU, where the caller's clock tells."""
        return None if self.start is None or self.event is None else self.start.elapsed_time(self.event) / 1e3

    def wait(self) -> StepResult:
        """Block until the step has ended; its sampled ids and the logprobs that rows asked for."""
        if self.event is not None:
            self.event.synchronize()
        ids = self._host[0].tolist()
        if len(self._host) == 1:
            return StepResult(ids)
        return StepResult(ids, _logprobs(self._wanted, *(tensor.tolist() for tensor in self._host[1:])))


class ModelRunner:
    """Runs prefill and decode steps on one card, in launch order, on one stream of its own.

    Entries: `run_prefill(shard)`, `run_decode_core(shard)` and `run_copy(shard, target, after)`; each returns a
    handle at once (on a CPU, a completed one). `device_id` is the card's number, also on a CPU.
    """

    def __init__(
        self, device_id: int, model: Qwen3ForCausalLM, kv_cache: KVCache, max_num_seqs: int, max_model_len: int
    ) -> None:
        self.device_id = device_id
        self.device = kv_cache.device
        self.model = model
        self.kv_cache = kv_cache
        self.block_size = kv_cache.block_size
        self.max_model_len = max_model_len
        self.graphs: DecodeGraphs | None = None
        self.prefill_graphs: PrefillGraphs | None = None
        self._has_kernels = model.attention.elementwise.name == "triton"
        max_blocks = -(-max_model_len // self.block_size)
        vocab_size = model.config.vocab_size
        self.slots = SlotState(max_num_seqs, max_blocks, self.block_size, kv_cache.null_block, vocab_size, self.device)
        on_gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None
        self.copy_stream = torch.cuda.Stream(self.device) if on_gpu else None
        if on_gpu:
            torch.cuda.synchronize(self.device)  # buffers were cleared on the default stream

    @torch.inference_mode()
    def run_prefill(self, shard: PrefillShard) -> StepHandle:
        """Compute the chunks' KV; sample where a chunk is its prompt's last. Rows as `shard` lists its samples."""
        with self._on_card() as start:
            logits = self._prefill(shard)
            rows = [row for chunk in shard.chunks for row in chunk.samples]
            wanted = [row.params.logprobs for row in rows]
            if not rows or not self._has_kernels:
                return self._handle(logits, sample(logits, self._first_token_batch(rows)), wanted, start)
            kept = logits if all(k is None for k in wanted) else logits.clone()  # penalties change them in place
            return self._handle(kept, self._draw_first_tokens(logits, rows), wanted, start)

    @torch.inference_mode()
    def run_decode_core(self, shard: DecodeShard) -> StepHandle:
        """Advance every slot of the shard by one token."""
        with self._on_card() as start:
            self.slots.apply(shard)
            wanted = [self.slots.num_logprobs[slot] for slot in shard.slots]
            logits, token_ids = self._decode(shard, keep_logits=any(wanted) or 0 in wanted)
            return self._handle(logits, token_ids, wanted, start)

    def _decode(self, shard: DecodeShard, keep_logits: bool) -> tuple[Tensor, Tensor]:
        """Logits and sampled ids of a step, its slots advanced."""
        if self.graphs is None:
            return self._decode_eagerly(shard)
        kind = SAMPLER_KINDS[max([self.slots.sampler_levels[slot] for slot in shard.slots])]
        logits, bucket = self.graphs.replay_model(shard.slots)
        if keep_logits:
            logits = logits.clone()  # penalties change them in place, and logprobs are the model's own
        return logits, self.graphs.replay_sampler(kind, len(shard.slots), bucket)

    def _decode_eagerly(self, shard: DecodeShard) -> tuple[Tensor, Tensor]:
        """The graphs' plain twin."""
        slots_B = self._int64(shard.slots)
        tokens_B, positions_B, metadata = self.slots.inputs(slots_B, shard.max_context_tokens)
        logits = self.model.forward_decode(tokens_B, positions_B, self.kv_cache, metadata)
        token_ids = sample(logits, self.slots.sampling_batch(shard, slots_B))
        self.slots.advance(slots_B, token_ids)
        self.slots.count(slots_B, token_ids)
        return logits, token_ids

    @torch.inference_mode()
    def capture(self) -> float:
        """Compile and capture every decode step; nothing else of this engine may run. Returns the seconds it took."""
        from nanovllm.engine.decode_graphs import DecodeGraphs  # here: a CPU build of torch comes without Triton

        with self._on_card():
            slots = self.slots
            self.graphs = DecodeGraphs(self.model, self.kv_cache, slots, len(slots.params), self.max_model_len)
        return self.graphs.capture_seconds

    @torch.inference_mode()
    def capture_prefill(self, max_num_batched_tokens: int) -> None:
        """Compile and capture small prefill steps; nothing else of this engine may run."""
        from nanovllm.engine.prefill_graphs import PrefillGraphs  # here: only where it is used, like the other

        with self._on_card():
            self.prefill_graphs = PrefillGraphs(self.model, self.kv_cache, self.max_model_len, max_num_batched_tokens)

    def warm_up(self) -> None:
        """Compile what prefill launches: few tokens, and many, and every kind of sampler, into the null block."""
        kinds = SamplingParams(), SamplingParams(top_k=2, top_p=0.5), SamplingParams(repetition_penalty=2.0)
        for number, count in enumerate((1, 2, 4, 8, 256)):  # few rows have kernels of their own, by powers of two
            count = min(count, self.max_model_len)
            table = (self.kv_cache.null_block,) * -(-count // self.block_size)
            rows = (SamplingRow(kinds[number % 3], seed=0, position=0),)
            self.run_prefill(PrefillShard(0, 0, (PrefillChunk((0,) * count, 0, table, rows * 2),))).wait()

    @torch.inference_mode()
    def run_copy(self, shard: CopyShard, target: ModelRunner, after: torch.cuda.Event | None) -> CopyHandle:
        """Send blocks from this card to `target`, not before `after`."""
        events = [] if after is None else [after]
        return self.kv_cache.mirror_to(target.kv_cache, shard.block_pairs, self.copy_stream, events)

    # -- inputs of a prefill step

    def _prefill(self, shard: PrefillShard) -> Tensor:
        """Logits of every sample's row, float32 [samples, vocab_size]."""
        starts = [chunk.start for chunk in shard.chunks]
        query_lens = [len(chunk.tokens) for chunk in shard.chunks]
        context_lens = [start + count for start, count in zip(starts, query_lens, strict=True)]
        tables_SN = torch.tensor(self._padded_tables(shard))
        places = token_places(starts, query_lens, tables_SN, self.block_size)
        tokens = array("q", chain.from_iterable(chunk.tokens for chunk in shard.chunks))
        tokens_3T = torch.stack([torch.frombuffer(tokens, dtype=torch.int64), *places])
        sampled = [index for index, chunk in enumerate(shard.chunks) for _ in chunk.samples]
        graphs = self.prefill_graphs
        size = graphs.size_for(len(tokens), len(query_lens)) if graphs is not None else None
        if graphs is None or size is None:
            return self._prefill_eagerly(tokens_3T, query_lens, context_lens, tables_SN, sampled)
        logits_SV = graphs.replay(size, tokens_3T, query_lens, context_lens, tables_SN)
        one_each = sampled == list(range(len(sampled)))
        return logits_SV[: len(sampled)] if one_each else logits_SV[self._int64(sampled)]

    def _prefill_eagerly(
        self,
        tokens_3T: Tensor,
        query_lens: list[int],
        context_lens: list[int],
        tables_SN: Tensor,
        sampled: list[int],
    ) -> Tensor:
        ends = list(accumulate(query_lens))
        tokens_T, positions_T, mapping_T = self._int64(tokens_3T).unbind(0)
        metadata = PrefillMetadata(
            cu_seqlens_q=self._int32([0, *ends]),
            context_lens=self._int32(context_lens),
            block_tables=self._int32(tables_SN),
            slot_mapping=mapping_T,
            max_query_tokens=max(query_lens),
            max_context_tokens=max(context_lens),
            host_query_lens=tuple(query_lens),
            host_context_lens=tuple(context_lens),
        )
        last = self._int64([ends[index] - 1 for index in sampled])
        return self.model.forward_prefill(tokens_T, positions_T, self.kv_cache, metadata, last)

    def _padded_tables(self, shard: PrefillShard) -> list[list[int]]:
        width = max(len(chunk.block_table) for chunk in shard.chunks)
        null = self.kv_cache.null_block
        return [[*chunk.block_table, *[null] * (width - len(chunk.block_table))] for chunk in shard.chunks]

    def _first_token_batch(self, rows: list[SamplingRow]) -> SamplingBatch:
        return SamplingBatch.from_params(
            [row.params for row in rows],
            [row.seed for row in rows],
            [row.position for row in rows],
            self.device,
            **self._vocabulary_tables(rows),
        )

    def _draw_first_tokens(self, logits: Tensor, rows: list[SamplingRow]) -> Tensor:
        """What `sample` gives for `_first_token_batch`, by kernels."""
        from nanovllm.layers.draw import draw  # here: a CPU build of torch comes without Triton

        kind, seen = SAMPLER_KINDS[max(row.params.sampler_level for row in rows)], None
        if kind == "penalised":
            shape = len(rows) + 1, self.model.config.vocab_size
            seen = torch.zeros(shape, dtype=torch.int32, device=self.device)
            for i, row in enumerate(rows):
                fill_seen(seen, i, row)
        floats = to_device([sampling_floats(row.params) for row in rows], torch.float32, self.device)
        integers = self._int64([slot_integers(row, 0, 0) for row in rows])
        return draw(kind, logits, torch.arange(len(rows), device=self.device), floats, integers, seen)

    def _vocabulary_tables(self, rows: list[SamplingRow]) -> dict[str, Tensor]:
        """[rows, vocabulary] tables, if some row reads them."""
        if not any(row.params.has_penalty or row.stop_ids for row in rows):
            return {}
        shape = len(rows), self.model.config.vocab_size
        seen = torch.zeros(shape, dtype=torch.int32, device=self.device)
        for i, row in enumerate(rows):
            fill_seen(seen, i, row)
        return dict(zip(("output_counts", "prompt_mask", "banned"), unpack(seen), strict=True))

    # -- small helpers

    def _handle(
        self, logits: Tensor, token_ids: Tensor, wanted: list[int | None], start: torch.cuda.Event | None
    ) -> StepHandle:
        most = max((k for k in wanted if k is not None), default=None)
        logprobs = () if most is None else gather_logprobs(logits, token_ids, min(most, logits.shape[-1]))
        return StepHandle(token_ids, logprobs, wanted, start)

    @contextmanager
    def _on_card(self) -> Iterator[torch.cuda.Event | None]:
        """Current device and stream are this thread's own state: set for every step. Yields the step's start."""
        if self.stream is None:
            yield None
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield _timed_event()

    def _int32(self, values: list[int] | Tensor) -> Tensor:
        return to_device(values, torch.int32, self.device)

    def _int64(self, values: Sequence[Any] | Tensor) -> Tensor:
        return to_device(values, torch.int64, self.device)


def token_places(starts: list[int], query_lens: list[int], tables_SN: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(positions, slot mapping) of a prefill batch's tokens, int64 [T] on the host: chunk s begins at starts[s].

    By whole tensors: a loop over 16,384 tokens would take longer than a small model's step.
    """
    counts_S = torch.tensor(query_lens)
    rows_T = torch.repeat_interleave(counts_S)
    offsets_S = torch.tensor(starts) - (counts_S.cumsum(0) - counts_S)  # from an index in the batch to a position
    positions_T = torch.arange(len(rows_T)) + offsets_S[rows_T]
    return positions_T, tables_SN[rows_T, positions_T // block_size] * block_size + positions_T % block_size


def _timed_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _to_host(tensor: Tensor) -> Tensor:
    """A copy into pinned memory that a later event orders; the tensor itself on a CPU."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _logprobs(
    wanted: list[int | None],
    chosen: list[float],
    ranks: list[int],
    top_ids: list[list[int]],
    top: list[list[float]],
) -> list[TokenLogprobs | None]:
    return [
        None if k is None else TokenLogprobs(chosen[i], ranks[i], tuple(zip(top_ids[i][:k], top[i][:k], strict=True)))
        for i, k in enumerate(wanted)
    ]
