"""One card: its weights, KV pages, stream and slots. Turns shards into launched work; knows of no other card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanovllm.engine.compile_ahead import OWN_KERNEL_ROWS, launch_side_by_side
from nanovllm.engine.first_tokens import first_tokens
from nanovllm.engine.kv_cache import CopyHandle, KVCache
from nanovllm.engine.prefill_graphs import ChunkBatch, PrefillGraphs, number_line
from nanovllm.engine.rehearsal import rehearse_products
from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, PrefillChunk, PrefillShard, SamplingRow
from nanovllm.engine.slot_state import SlotState
from nanovllm.engine.step_handle import StepHandle, timed_event
from nanovllm.engine.step_sizes import MAX_SEQUENCES
from nanovllm.engine.verified_copies import VerifiedCopy
from nanovllm.layers import sampler
from nanovllm.layers.attention import DecodeMetadata, MixedMetadata, PrefillMetadata
from nanovllm.layers.host import PinnedIds, reserve_pinned, to_device
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.sampling_params import SAMPLER_KINDS, SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.decode_graphs import DecodeGraphs
    from nanovllm.engine.lending import Lending
    from nanovllm.engine.mixed_graphs import MixedGraphs
    from nanovllm.engine.pipeline_runs import PipelineOptions
    from nanovllm.engine.pipeline_scheduler import DecodePipelineScheduler

RESULT_BUFFERS = 16  # more than a card has steps in flight; each of as many rows as a mixed step may have
WARM_TOKENS = (*OWN_KERNEL_ROWS, 256)  # of a prompt
PACE_TOKENS = 2048  # of the prompt whose pace is measured at start-up
WARM_PARAMS = (  # what loads kernels of its own at its first use
    SamplingParams(),
    SamplingParams(top_k=2, top_p=0.5),
    SamplingParams(repetition_penalty=2.0),
    SamplingParams(logprobs=1),
)


class ModelRunner:
    """Runs prefill and decode steps on one card, in launch order, on one stream of its own.

    Entries: `run_prefill(shard)`, `run_decode_core(shard)`, `run_mixed(shard)`, which is both in one pass, and
    `run_copy(shard, target, after)`; each returns a handle at once (on a CPU, a completed one). `device_id` is the
    card's number, also on a CPU. `verify_copies`: compare every copied block with its source, which takes long.
    """

    def __init__(
        self,
        device_id: int,
        model: Qwen3ForCausalLM,
        kv_cache: KVCache,
        max_num_seqs: int,
        max_model_len: int,
        verify_copies: bool = False,
    ) -> None:
        self.verify_copies = verify_copies
        self.device_id = device_id
        self.device = kv_cache.device
        self.model = model
        self.kv_cache = kv_cache
        self.block_size = kv_cache.block_size
        self.max_model_len = max_model_len
        self.graphs: DecodeGraphs | None = None
        self.prefill_graphs: PrefillGraphs | None = None
        self.mixed_graphs: MixedGraphs | None = None
        self.pipeline: DecodePipelineScheduler | None = None
        self.lending: Lending | None = None
        self.lends = False  # there may be lent steps; on a CPU they are steps like others
        self.prefill_token_s = 0.0  # of a prompt, in a step of many; 0: not measured
        self._line = number_line(max(max_model_len, (kv_cache.num_blocks + 1) * self.block_size))  # the null block, too
        self._has_kernels = model.attention.elementwise.name == "triton"
        max_blocks = -(-max_model_len // self.block_size)
        vocab_size = model.config.vocab_size
        self.slots = SlotState(max_num_seqs, max_blocks, self.block_size, kv_cache.null_block, vocab_size, self.device)
        on_gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None
        self.copy_stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._pinned_ids = PinnedIds(RESULT_BUFFERS, 2 * max_num_seqs) if on_gpu else None
        if on_gpu:
            torch.cuda.synchronize(self.device)  # buffers were cleared on the default stream

    @torch.inference_mode()
    def run_prefill(self, shard: PrefillShard) -> StepHandle:
        """Compute the chunks' KV; sample where a chunk is its prompt's last. Rows as `shard` lists its samples. A lent
        step may be launched while another thread launches the card's other steps."""
        lending = self.lending if shard.lent else None
        with self._on_card(None if lending is None else lending.stream):
            batch = self._chunk_batch(shard)
            if lending is not None and self.stream is not None:
                # Decode steps launched before may run on the whole card, where it would slow them most.
                lending.stream.wait_stream(self.stream)
            start = self._mark()
            logits = self._prefill(shard, batch)
            rows = _samples(shard)
            wanted = [row.params.logprobs for row in rows]
            kept = logits.clone() if _any_wanted(wanted) else logits  # penalties may change them in place
            return self._handle(kept, first_tokens(logits, rows, self._has_kernels), wanted, start, lending)

    @torch.inference_mode()
    def run_decode_core(self, shard: DecodeShard) -> StepHandle:
        """Advance every slot of the shard by one token."""
        with self._on_card():
            self.slots.apply(shard)
            wanted = self.slots.asked(shard.slots).num_logprobs
            start = self._mark()
            logits = self._decode(shard)
            kept = logits.clone() if _any_wanted(wanted) else logits  # penalties may change them in place
            handle = self._handle(kept, self._next_tokens(logits, shard), wanted, start)
            return handle if self.pipeline is None else self.pipeline.watched(handle)

    @torch.inference_mode()
    def run_mixed(self, shard: MixedShard) -> StepHandle:
        """`run_prefill` and `run_decode_core` in one pass. Rows: those of the one, then those of the other."""
        with self._on_card():
            self.slots.apply(shard.decode)
            batch, samples = self._chunk_batch(shard.prefill), _samples(shard.prefill)
            wanted = [row.params.logprobs for row in samples]
            wanted += [self.slots.num_logprobs[slot] for slot in shard.decode.slots]
            start = self._mark()
            first, rows = self._mixed(shard, batch)
            kept = torch.cat([first, rows]) if _any_wanted(wanted) else rows  # penalties may change them in place
            first_ids = first_tokens(first, samples, self._has_kernels)
            token_ids = torch.cat([first_ids, self._next_tokens(rows, shard.decode)])
            return self._handle(kept, token_ids, wanted, start)

    def _decode(self, shard: DecodeShard) -> Tensor:
        """Logits of a step, float32 [slots, vocab_size]."""
        if shard.beside_lent and self.lending is not None:
            return self.lending.replay_model(shard.slots)
        if self.pipeline is not None:
            return self.pipeline.decode_token(shard.slots, shard.max_context_tokens)
        if self.graphs is not None:
            return self.graphs.replay_model(shard.slots)
        ids_B, positions_B, metadata = self._decode_inputs(shard)
        return self.model.forward_decode(ids_B, positions_B, self.kv_cache, metadata)

    def _decode_inputs(self, shard: DecodeShard) -> tuple[Tensor, Tensor, DecodeMetadata]:
        """(token ids, positions, metadata) of a step launched eagerly; where graphs draw, with their padding."""
        if self.graphs is None:
            return self.slots.inputs(self._int64(shard.slots), shard.max_context_tokens)
        self.graphs.set_slots(shard.slots)
        ids_B, positions_B, metadata = self.graphs.inputs(self.graphs.bucket_of(len(shard.slots)))
        return ids_B, positions_B, self.graphs.planned(metadata)

    def _next_tokens(self, logits: Tensor, shard: DecodeShard) -> Tensor:
        """Sampled ids of the slots, which advance. `logits`: where the graphs read them, if there are any."""
        if self.graphs is not None:
            kind = SAMPLER_KINDS[self.slots.asked(shard.slots).sampler_level]
            return self.graphs.replay_sampler(kind, len(shard.slots))
        slots_B = self._int64(shard.slots)
        token_ids = sampler.mark_undrawn_(sampler.sample(logits, self.slots.sampling_batch(shard, slots_B)), logits)
        self.slots.advance(slots_B, token_ids)
        self.slots.count(slots_B, token_ids)
        return token_ids

    # -- a mixed step

    def _mixed(self, shard: MixedShard, batch: ChunkBatch) -> tuple[Tensor, Tensor]:
        """Logits of every sample's row, and of every slot."""
        sampled, num_tokens = _sampled_chunks(shard.prefill), shard.prefill.num_tokens
        slots, graphs = shard.decode.slots, self.mixed_graphs
        size = graphs.size_for(num_tokens, len(batch.query_lens), len(slots)) if graphs is not None else None
        if graphs is None or size is None:
            return self._mixed_eagerly(batch, sampled, shard.decode)
        first_SV, logits_BV = graphs.replay(size, batch, slots)
        return self._rows_of(first_SV, sampled), logits_BV

    def _mixed_eagerly(self, batch: ChunkBatch, sampled: list[int], shard: DecodeShard) -> tuple[Tensor, Tensor]:
        ids_B, positions_B, rows = self._decode_inputs(shard)
        ids_T, positions_T, mapping_T = self._int64(batch.tokens_3T()).unbind(0)
        mapping = torch.cat([mapping_T, rows.slot_mapping])
        metadata = MixedMetadata(self._prefill_metadata(batch, mapping_T), rows, mapping)
        wanted = self._int64([*batch.last_tokens(sampled), *range(len(ids_T), len(mapping))])
        ids, positions = torch.cat([ids_T, ids_B]), torch.cat([positions_T, positions_B])
        logits = self.model.forward_mixed(ids, positions, self.kv_cache, metadata, wanted)
        first, logits_BV = logits.split([len(sampled), len(ids_B)])
        if self.graphs is not None:
            logits_BV = self.graphs.logits_BV[: len(ids_B)].copy_(logits_BV)  # where the captured draws read them
        return first, logits_BV[: len(shard.slots)]

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
        """Compile and capture prefill steps of fixed sizes; nothing else of this engine may run."""
        with self._on_card():
            self.prefill_graphs = PrefillGraphs(self.model, self.kv_cache, self.max_model_len, max_num_batched_tokens)

    @torch.inference_mode()
    def capture_mixed(self, max_num_batched_tokens: int) -> None:
        """Capture steps that mix prompts and decode rows, after `capture`; nothing else of this engine may run."""
        from nanovllm.engine.mixed_graphs import MixedGraphs  # here: a CPU build of torch comes without Triton

        assert self.graphs is not None, "the draws of a mixed step are those of a decode step"
        with self._on_card():
            self.mixed_graphs = MixedGraphs(self.graphs, max_num_batched_tokens)

    @torch.inference_mode()
    def start_lending(self, sms: tuple[int, int], max_num_batched_tokens: int) -> None:
        """Let lent steps run beside decode steps, after `capture`, or warn. Nothing else of this engine may run."""
        from nanovllm.engine.lending import start_lending  # here: most runners need none of it

        with self._on_card():
            self.lending = start_lending(self.graphs, self.device, sms, max_num_batched_tokens)
        self.lends = self.lending is not None

    @torch.inference_mode()
    def start_pipeline(self, options: PipelineOptions) -> None:
        """Let decode steps run in two lanes, after `capture`; nothing else of this engine may run. See there."""
        from nanovllm.engine.pipeline_runs import DecodeCard
        from nanovllm.engine.pipeline_start import start_pipeline  # here: most runners need none of it

        self.close_pipeline()
        card = DecodeCard(self.model, self.kv_cache, self.slots, self.graphs, self.max_model_len)
        with self._on_card():
            self.pipeline = start_pipeline(card, options)

    def get_pipeline_statistics(self) -> dict[str, Any]:
        """See `DecodePipelineScheduler`; {} where no pipeline was asked for."""
        return {} if self.pipeline is None else self.pipeline.get_pipeline_statistics()

    def print_pipeline_statistics(self) -> None:
        """For people, on standard output."""
        print("no decode pipeline was asked for" if self.pipeline is None else self.pipeline.describe())

    def close_pipeline(self) -> None:
        """Give the card's partitions back, those of which one is lent, too. No step may run any more."""
        users, self.pipeline, self.lending = (self.pipeline, self.lending), None, None  # also where closing fails
        for user in users:
            if user is not None:
                user.close()

    @property
    def lent_sms(self) -> tuple[int, int] | None:
        """SMs of decode steps and of lent ones, as granted; None where none are lent, and on a CPU."""
        return None if self.lending is None else self.lending.split.granted

    def warm_up(self) -> None:
        """Compile what prefill launches: few tokens, and many, and every kind of answer, into the null block."""
        counts = list(dict.fromkeys(min(count, self.max_model_len) for count in WARM_TOKENS))
        if self._has_kernels and self.stream is not None:
            draws = [partial(self._compile_draw, params) for params in WARM_PARAMS]
            models = [partial(self._compile_prefill, count) for count in counts if count in OWN_KERNEL_ROWS]
            launch_side_by_side([models[0], *draws], self.stream)  # what they share is compiled once
            launch_side_by_side(models[1:], self.stream)
        for number, count in enumerate(counts):
            self._warm_prefill([count], number)

    def _compile_prefill(self, num_tokens: int) -> None:
        chunk = self._null_chunk(num_tokens)
        self._prefill_eagerly(self._chunk_batch(PrefillShard(0, 0, (chunk,))), [0])

    def _compile_draw(self, params: SamplingParams) -> None:
        logits = torch.zeros(2, self.model.config.vocab_size, dtype=torch.float32, device=self.device)
        first_tokens(logits, [SamplingRow(params, seed=0, position=0)] * 2, self._has_kernels)

    def reserve(self, max_num_batched_tokens: int) -> None:
        """Take the memory that steps need: for the largest of them, for graphs, for the products' many kernels. Then
        measure `prefill_token_s`.

        After captures, which give back what torch keeps. What takes memory from the driver, or loads a kernel, waits in
        mid-service until both cards are idle.
        """
        whole, rest = divmod(max_num_batched_tokens, self.max_model_len)
        self._warm_prefill([self.max_model_len] * whole + [rest] * bool(rest))
        self._warm_prefill([1] * min(len(self.slots.params), max_num_batched_tokens))  # the most rows of logits
        if self.device.type == "cuda":
            reserve_pinned()
            self._rehearse(max_num_batched_tokens)
            for kind in range(3 if self.lending is not None else 0):
                self._warm_prefill([1], kind, lent=True)
        num_tokens = min(PACE_TOKENS, max_num_batched_tokens, self.max_model_len)
        self.prefill_token_s = (self._warm_prefill([num_tokens]) or 0.0) / num_tokens  # last: nothing is loaded in it

    @torch.inference_mode()
    def _rehearse(self, max_num_batched_tokens: int) -> None:
        with self._on_card():
            num_slots = len(self.slots.params)
            rehearse_products(self.model, max_num_batched_tokens + num_slots, num_slots + MAX_SEQUENCES)
            for graphs in (self.graphs, self.mixed_graphs, self.prefill_graphs, self.lending):
                if graphs is not None:
                    graphs.rehearse()
        torch.cuda.synchronize(self.device)

    def _warm_prefill(self, lengths: list[int], kind: int = 0, lent: bool = False) -> float | None:
        """A step of prompts that nobody asked for; its device seconds. From a single one two tokens are drawn, from
        each of many one."""
        row = SamplingRow(WARM_PARAMS[kind % len(WARM_PARAMS)], seed=0, position=0)
        rows = (row, row) if len(lengths) == 1 else (row,)
        chunks = tuple(self._null_chunk(num_tokens, rows) for num_tokens in lengths)
        handle = self.run_prefill(PrefillShard(0, 0, chunks, lent))
        handle.wait()
        return handle.seconds

    def _null_chunk(self, num_tokens: int, rows: tuple[SamplingRow, ...] = ()) -> PrefillChunk:
        """A whole prompt, into the null block."""
        blocks = (self.kv_cache.null_block,) * -(-num_tokens // self.block_size)
        return PrefillChunk((0,) * num_tokens, 0, blocks, rows)

    @torch.inference_mode()
    def run_copy(self, shard: CopyShard, target: ModelRunner, after: torch.cuda.Event | None) -> CopyHandle:
        """Send blocks from this card to `target`, not before `after`."""
        events = [] if after is None else [after]
        copy = self.kv_cache.mirror_to(target.kv_cache, shard.block_pairs, self.copy_stream, events)
        return VerifiedCopy(copy, self.kv_cache, target.kv_cache, shard.block_pairs) if self.verify_copies else copy

    # -- inputs of a prefill step

    def _prefill(self, shard: PrefillShard, batch: ChunkBatch) -> Tensor:
        """Logits of every sample's row, float32 [samples, vocab_size]."""
        lending = self.lending if shard.lent else None
        sampled, graphs = _sampled_chunks(shard), self.prefill_graphs if lending is None else lending.prefill_graphs
        size = graphs.size_for(shard.num_tokens, len(batch.query_lens)) if graphs is not None else None
        if graphs is None or size is None:
            return self._prefill_eagerly(batch, sampled)
        return self._rows_of(graphs.replay(size, batch), sampled)

    def _chunk_batch(self, shard: PrefillShard) -> ChunkBatch:
        return ChunkBatch.of(shard, self.block_size, self._line)

    def _prefill_eagerly(self, batch: ChunkBatch, sampled: list[int]) -> Tensor:
        tokens_T, positions_T, mapping_T = self._int64(batch.tokens_3T()).unbind(0)
        metadata, last = self._prefill_metadata(batch, mapping_T), self._int64(batch.last_tokens(sampled))
        return self.model.forward_prefill(tokens_T, positions_T, self.kv_cache, metadata, last)

    def _prefill_metadata(self, batch: ChunkBatch, mapping_T: Tensor) -> PrefillMetadata:
        return PrefillMetadata(
            cu_seqlens_q=self._int32([0, *accumulate(batch.query_lens)]),
            context_lens=self._int32(batch.context_lens),
            block_tables=self._int32(batch.tables_SN(self.kv_cache.null_block)),
            slot_mapping=mapping_T,
            max_query_tokens=max(batch.query_lens),
            max_context_tokens=max(batch.context_lens),
            host_query_lens=tuple(batch.query_lens),
            host_context_lens=tuple(batch.context_lens),
        )

    def _rows_of(self, logits_SV: Tensor, sampled: list[int]) -> Tensor:
        """A sequence's logits for each of its samples."""
        one_each = sampled == list(range(len(sampled)))
        return logits_SV[: len(sampled)] if one_each else logits_SV[self._int64(sampled)]

    # -- small helpers

    def _handle(
        self, logits: Tensor, token_ids: Tensor, wanted: list[int | None], start: Any, lending: Lending | None = None
    ) -> StepHandle:
        pinned = self._pinned_ids if lending is None else lending.pinned_ids  # of a thread each
        most = max((k for k in wanted if k is not None), default=None)
        logprobs = () if most is None else sampler.gather_logprobs(logits, token_ids, min(most, logits.shape[-1]))
        return StepHandle(token_ids, logprobs, wanted, start, pinned)

    @contextmanager
    def _on_card(self, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
        """Current device and stream are this thread's own state: set for every step. stream: the runner's, or this."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(stream or self.stream):
            yield

    def _mark(self) -> torch.cuda.Event | None:
        """The step's start: what the host prepared is behind it."""
        return None if self.stream is None else timed_event()

    def _int32(self, values: list[int] | Tensor) -> Tensor:
        return to_device(values, torch.int32, self.device)

    def _int64(self, values: Sequence[Any] | Tensor) -> Tensor:
        return to_device(values, torch.int64, self.device)


def _samples(shard: PrefillShard) -> list[SamplingRow]:
    return [row for chunk in shard.chunks for row in chunk.samples]


def _sampled_chunks(shard: PrefillShard) -> list[int]:
    """Of each sample, its chunk's number."""
    return [index for index, chunk in enumerate(shard.chunks) for _ in chunk.samples]


def _any_wanted(num_logprobs: list[int | None]) -> bool:
    return any(k is not None for k in num_logprobs)
