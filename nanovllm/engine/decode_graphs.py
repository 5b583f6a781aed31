"""CUDA graphs of one card's decode step: the model by bucket, the sampler by bucket and kind of its rows.

A step runs in the smallest bucket that holds its rows; rows beyond them point to the null slot, whose table is the
null block. Block tables are always read at their full width, and lengths on the device, so that a graph is right for
every length up to `max_model_len`. All graphs of a card share one memory pool: they never run at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nanovllm.engine.compile_ahead import OWN_KERNEL_ROWS, launch_side_by_side
from nanovllm.engine.graph_capture import captured
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.slot_packets import SlotPackets
from nanovllm.engine.slot_state import ALIVE, MIN_TOKENS, SlotState
from nanovllm.engine.step_sizes import MAX_SEQUENCES
from nanovllm.kernels.decode_state import advance, gather_inputs
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata
from nanovllm.layers.draw import draw
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.sampling_params import SAMPLER_KINDS, SamplerKind


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, up to exactly `max_num_seqs`: dense where a step is short, 6 % apart at the top."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, max_num_seqs + 1, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


@dataclass
class DecodeGraphs:
    """Captured on construction, on the current stream of the card, with the card's own workers not yet started.

    Other engines of the process may be at work meanwhile, but may not capture or be constructed.

    `capture_seconds`: what that took. Replays must be launched on the stream of the capture, one step at a time.
    """

    model: Qwen3ForCausalLM
    kv_cache: KVCache
    slots: SlotState
    max_num_seqs: int
    max_context_tokens: int
    capture_seconds: float = 0.0
    _model_graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)
    _samplers: dict[tuple[int, SamplerKind], torch.cuda.CUDAGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device, size = self.slots.device, self.max_num_seqs
        self.buckets = bucket_sizes(size)
        self.slots_B = self.slots.rows_B
        assert self.slots_B.shape == (size,), f"{size} rows, {len(self.slots_B)} slots"
        if device.type == "cuda":
            self.slots.use_packets(SlotPackets(self.slots))
        # A mixed step writes the logits of its prompts, if it is captured, ahead of those of its decode rows.
        shape = MAX_SEQUENCES + size, self.model.config.vocab_size
        self.mixed_logits_RV = torch.zeros(shape, dtype=torch.float32, device=device)
        self.logits_BV = self.mixed_logits_RV[MAX_SEQUENCES:]
        self.token_ids_B = torch.zeros(size, dtype=torch.int64, device=device)
        self.slots.need_seen()
        started = time.perf_counter()
        if device.type == "cuda":
            self._compile(torch.cuda.current_stream())
        self.pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(self.buckets):  # largest first: smaller ones fit into its memory
            self._capture(bucket)
        torch.cuda.synchronize(device)
        self.capture_seconds = time.perf_counter() - started

    def _compile(self, stream: torch.cuda.Stream) -> None:
        """What is not compiled yet, for numbers of rows that have kernels of their own."""
        samplers = [partial(self._run_sampler, self.max_num_seqs, kind) for kind in SAMPLER_KINDS]
        models = [partial(self.run_model, size) for size in self.buckets if size in OWN_KERNEL_ROWS]
        launch_side_by_side([*samplers, *models], stream)

    def _capture(self, bucket: int) -> None:
        self._model_graphs[bucket] = self.graph_of(partial(self.run_model, bucket))
        for kind in SAMPLER_KINDS:
            self._samplers[bucket, kind] = self.graph_of(partial(self._run_sampler, bucket, kind))

    def graph_of(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture what `run` queues on the current stream, after having run it once, with memory of the shared pool."""
        return captured(run, self.pool)[0]

    def rehearse(self) -> None:
        """Launch each graph once, for the null slot: at its first launch the driver takes memory for it."""
        for graph in (*self._model_graphs.values(), *self._samplers.values()):
            graph.replay()

    def inputs(self, bucket: int, begin: int = 0) -> tuple[Tensor, Tensor, DecodeMetadata]:
        """(token ids, positions, metadata) of a step of `bucket` rows, those of `set_slots`; of the rows from `begin`
        on. Queues one kernel."""
        state, block_size = self.slots, self.kv_cache.block_size
        tokens_B, positions_B, context_lens_B, mapping_B, tables_BN, order_B = gather_inputs(
            self.slots_B[begin:bucket], state.integers_S7, state.block_tables_SN, block_size, state.null_block, ALIVE
        )
        metadata = DecodeMetadata(context_lens_B, tables_BN, mapping_B, self.max_context_tokens, order_B)
        return tokens_B, positions_B, metadata

    def planned(self, metadata: DecodeMetadata, backend: AttentionBackend | None = None) -> DecodeMetadata:
        """`inputs`' metadata as the backend would have it for one pass over all layers. backend: as for the model."""
        return (backend or self.model.attention).planned(metadata, self.kv_cache.layer_view(0)[0])

    def run_model(self, bucket: int, backend: AttentionBackend | None = None) -> None:
        """Queue the model for `bucket` rows, those of `set_slots`; logits to `logits_BV`. backend: as for the model."""
        tokens_B, positions_B, metadata = self.inputs(bucket)
        logits_BV = self.logits_BV[:bucket]
        metadata = self.planned(metadata, backend)
        self.model.forward_decode(tokens_B, positions_B, self.kv_cache, metadata, logits_BV, backend)

    def _run_sampler(self, bucket: int, kind: SamplerKind) -> None:
        state, slots_B, token_ids_B = self.slots, self.slots_B[:bucket], self.token_ids_B[:bucket]
        logits_BV, integers_S7, null_slot = self.logits_BV[:bucket], state.integers_S7, state.null_slot
        draw(kind, logits_BV, slots_B, state.floats_S6, integers_S7, state.seen_SV, token_ids_B)
        advance(slots_B, token_ids_B, logits_BV, integers_S7, state.end_ids_SK, null_slot, ALIVE, MIN_TOKENS)

    def bucket_of(self, num_rows: int) -> int:
        """The smallest that holds them."""
        return next(size for size in self.buckets if size >= num_rows)

    def set_slots(self, slots: tuple[int, ...]) -> None:
        """The rows of the next step, if what was applied ahead of it has not made them that yet."""
        self.slots.set_rows(slots)

    def replay_model(self, slots: tuple[int, ...]) -> Tensor:
        """Launch the model for these slots; logits [len(slots), vocab], valid until the next replay."""
        self.set_slots(slots)
        self._model_graphs[self.bucket_of(len(slots))].replay()
        return self.logits_BV[: len(slots)]

    def replay_sampler(self, kind: SamplerKind, num_rows: int) -> Tensor:
        """Launch the draw of that kind for the rows of `set_slots`, from `logits_BV`; their slots advance.

        Returns the ids, NO_TOKEN where none could be drawn, valid until the next replay. Penalties change the logits.
        """
        self._samplers[self.bucket_of(num_rows), kind].replay()
        return self.token_ids_B[:num_rows]
