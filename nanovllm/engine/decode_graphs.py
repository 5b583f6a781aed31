"""CUDA graphs of one card's decode step: the model by bucket, the sampler by (bucket, features).

A step runs in the smallest bucket that holds its rows; rows beyond them point to the null slot, whose table is the
null block. Block tables are always read at their full width, and lengths on the device, so that a graph is right for
every length up to `max_model_len`. All graphs of a card share one memory pool: they never run at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.slot_state import SlotState
from nanovllm.layers.sampler import sample
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.sampling_params import SamplingParams

FEATURES = ("greedy", "random")  # what is captured; steps with filters or penalties sample eagerly


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, up to exactly `max_num_seqs`: dense where a step is short, 6 % apart at the top."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, max_num_seqs + 1, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def captured_features(params: Sequence[SamplingParams]) -> str | None:
    """The captured sampler that serves these rows; None: sample eagerly."""
    if any(p.has_penalty or p.top_k or p.top_p < 1 or p.min_p or p.min_tokens for p in params):
        return None
    return "greedy" if all(p.is_greedy for p in params) else "random"


@dataclass
class DecodeGraphs:
    """Captured on construction, on the current stream of the card; nothing else may run in the process then.

    `capture_seconds`: what that took. Replays must be launched on the stream of the capture, one step at a time.
    """

    model: Qwen3ForCausalLM
    kv_cache: KVCache
    slots: SlotState
    max_num_seqs: int
    max_context_tokens: int
    capture_seconds: float = 0.0
    _model_graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)
    _samplers: dict[tuple[int, str], torch.cuda.CUDAGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device, size = self.slots.device, self.max_num_seqs
        self.buckets = bucket_sizes(size)
        self.slots_B = torch.full((size,), self.slots.null_slot, dtype=torch.int64, device=device)
        self.logits_BV = torch.zeros(size, self.model.config.vocab_size, dtype=torch.float32, device=device)
        self.token_ids_B = torch.zeros(size, dtype=torch.int64, device=device)
        started = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(self.buckets):  # largest first: smaller ones fit into its memory
            self._capture(bucket, pool)
        torch.cuda.synchronize(device)
        self.capture_seconds = time.perf_counter() - started

    def _capture(self, bucket: int, pool: Any) -> None:
        self._run_model(bucket)  # compiles what is not compiled yet, and warms the libraries' workspaces
        self._model_graphs[bucket] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            self._run_model(bucket)
        for features in FEATURES:
            self._run_sampler(bucket, features)
            self._samplers[bucket, features] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                self._run_sampler(bucket, features)

    def _run_model(self, bucket: int) -> None:
        tokens_B, positions_B, metadata = self.slots.inputs(self.slots_B[:bucket], self.max_context_tokens)
        self.logits_BV[:bucket] = self.model.forward_decode(tokens_B, positions_B, self.kv_cache, metadata)

    def _run_sampler(self, bucket: int, features: str) -> None:
        slots_B = self.slots_B[:bucket]
        batch = self.slots.plain_batch(slots_B, any_random=features == "random")
        self.token_ids_B[:bucket] = sample(self.logits_BV[:bucket], batch)
        self.slots.advance(slots_B, self.token_ids_B[:bucket])

    def replay_model(self, slots: Sequence[int]) -> tuple[Tensor, int]:
        """Launch the model for these slots; logits [len(slots), vocab], valid until the next replay, and the bucket."""
        bucket = next(size for size in self.buckets if size >= len(slots))
        padded = [*slots, *[self.slots.null_slot] * (bucket - len(slots))]
        self.slots_B[:bucket].copy_(torch.tensor(padded).pin_memory(), non_blocking=True)
        self._model_graphs[bucket].replay()
        return self.logits_BV[: len(slots)], bucket

    def replay_sampler(self, num_rows: int, bucket: int, features: str) -> Tensor:
        """Launch the sampler of that bucket, which advances its slots; ids [num_rows], valid until the next replay."""
        self._samplers[bucket, features].replay()
        return self.token_ids_B[:num_rows]
