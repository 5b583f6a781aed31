"""CUDA graphs of small prefill steps, for models whose kernels run faster than a host launches them.

A step runs in the smallest captured number of tokens that holds it. Tokens beyond its own belong to no sequence and
write their KV to the null block; sequences beyond its own are empty. Sampling is not part of the graph.

Letters in names: T tokens, S sequences, N blocks a sequence can have, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.shards import PrefillShard
from nanovllm.engine.step_sizes import MAX_SEQUENCES
from nanovllm.layers.attention import AttentionBackend, PrefillMetadata
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3 import Qwen3ForCausalLM

TOKEN_SIZES = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# A step of more arithmetic keeps a card busy for longer than some 10 ms, which its launches take from Python.
LAUNCH_BOUND_FLOPS = 1e13


def token_sizes(config: ModelConfig, max_tokens: int) -> list[int]:
    """The sizes to capture for steps of at most `max_tokens`: those that are launch-bound."""
    most = min(max_tokens, LAUNCH_BOUND_FLOPS / (2 * config.num_parameters()))
    return [size for size in TOKEN_SIZES if size <= most]


class ChunkBatch(NamedTuple):
    """A prefill batch on the host: the tokens of its sequences, one sequence after the other.

    tokens_3T: int64: ids, positions, places in the cache. query_lens, context_lens: tokens of each sequence in this
    step and up to its end. tables_SN: integers, any width.
    """

    tokens_3T: Tensor
    query_lens: list[int]
    context_lens: list[int]
    tables_SN: Tensor

    @classmethod
    def of(cls, shard: PrefillShard, block_size: int, null_block: int) -> ChunkBatch:
        """The null block fills up shorter tables."""
        starts = [chunk.start for chunk in shard.chunks]
        query_lens = [len(chunk.tokens) for chunk in shard.chunks]
        context_lens = [start + count for start, count in zip(starts, query_lens, strict=True)]
        tables, width = [chunk.block_table for chunk in shard.chunks], max(len(c.block_table) for c in shard.chunks)
        tables_SN = torch.tensor([[*table, *[null_block] * (width - len(table))] for table in tables])
        places = token_places(starts, query_lens, tables_SN, block_size)
        tokens = array("q")
        for chunk in shard.chunks:
            tokens.extend(chunk.tokens)
        tokens_3T = torch.stack([torch.frombuffer(tokens, dtype=torch.int64), *places])
        return cls(tokens_3T, query_lens, context_lens, tables_SN)

    def last_tokens(self, sequences: list[int]) -> list[int]:
        """Where the last tokens of the given sequences are in the batch."""
        ends = list(accumulate(self.query_lens))
        return [ends[sequence] - 1 for sequence in sequences]


def token_places(starts: list[int], query_lens: list[int], tables_SN: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(positions, slot mapping) of a prefill batch's tokens, int64 [T] on the host: chunk s begins at starts[s].

    By whole tensors: a loop over 16,384 tokens would take longer than a small model's step.
    """
    counts_S = torch.tensor(query_lens)
    rows_T = torch.repeat_interleave(counts_S)
    offsets_S = torch.tensor(starts) - (counts_S.cumsum(0) - counts_S)  # from an index in the batch to a position
    positions_T = torch.arange(len(rows_T)) + offsets_S[rows_T]
    return positions_T, tables_SN[rows_T, positions_T // block_size] * block_size + positions_T % block_size


class PrefillBuffers:
    """What captured steps read of a prefill batch: up to `max_tokens` tokens of up to MAX_SEQUENCES sequences."""

    def __init__(self, kv_cache: KVCache, max_context_tokens: int, max_tokens: int) -> None:
        self.max_context_tokens = max_context_tokens
        self.null_place = kv_cache.null_block * kv_cache.block_size
        device, max_blocks = kv_cache.device, -(-max_context_tokens // kv_cache.block_size)
        # Rows: token ids, positions, places in the cache.
        self.tokens_3T = torch.zeros(3, max_tokens, dtype=torch.int64, device=device)
        self.tokens_3T[2] = self.null_place
        self.tables_SN = torch.zeros(MAX_SEQUENCES, max_blocks, dtype=torch.int32, device=device)
        # Rows: first token of each sequence and the end, its context, its last token.
        self.sequences_3S = torch.zeros(3, MAX_SEQUENCES + 1, dtype=torch.int32, device=device)

    def metadata(self, size: int) -> PrefillMetadata:
        """Of a step of `size` tokens, padding included."""
        starts, context_lens, _ = self.sequences_3S.unbind(0)
        return PrefillMetadata(
            cu_seqlens_q=starts,
            context_lens=context_lens[:MAX_SEQUENCES],
            block_tables=self.tables_SN,
            slot_mapping=self.tokens_3T[2, :size],
            max_query_tokens=size,
            max_context_tokens=self.max_context_tokens,
            host_query_lens=(),
            host_context_lens=(),
        )

    @property
    def last_tokens(self) -> Tensor:
        """int64 [MAX_SEQUENCES]: each sequence's last token in the batch; for those that are empty, any token."""
        return self.sequences_3S[2, :MAX_SEQUENCES].long()

    def clear(self) -> None:
        """Queue: no sequences, so that a step of any size may run; those of the last batch need not fit in it."""
        self.sequences_3S.zero_()

    def fill(self, size: int, batch: ChunkBatch) -> None:
        """Queue the copies of a batch, padded to `size` tokens."""
        tokens_3T, query_lens, context_lens, tables_SN = batch
        padded_3T = torch.zeros(3, size, dtype=torch.int64)
        padded_3T[2] = self.null_place
        padded_3T[:, : tokens_3T.shape[1]] = tokens_3T
        starts = torch.tensor([0, *query_lens, *[0] * (MAX_SEQUENCES - len(query_lens))]).cumsum(0)
        lasts = (starts[1:] - 1).clamp(min=0)
        contexts = torch.tensor(context_lens)
        sequences_3S = torch.zeros(3, MAX_SEQUENCES + 1, dtype=torch.int32)
        sequences_3S[0], sequences_3S[1, : len(contexts)], sequences_3S[2, :-1] = starts, contexts, lasts
        _send(padded_3T, self.tokens_3T[:, :size])
        _send(sequences_3S, self.sequences_3S)
        _send(tables_SN.int(), self.tables_SN[: tables_SN.shape[0], : tables_SN.shape[1]])


@dataclass
class PrefillGraphs:
    """Captured on construction, on the current stream of the card, with the card's own workers not yet started.

    Replays must be launched on the stream of the capture, one step at a time. sizes: numbers of tokens; None: those of
    `token_sizes`. backend: of the layers, where it is not the model's own.
    """

    model: Qwen3ForCausalLM
    kv_cache: KVCache
    max_context_tokens: int
    max_tokens: int
    sizes: Sequence[int] | None = None
    backend: AttentionBackend | None = None
    _graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)
    _logits: dict[int, Tensor] = field(default_factory=dict)  # [S, V] each

    def __post_init__(self) -> None:
        sizes = token_sizes(self.model.config, self.max_tokens) if self.sizes is None else self.sizes
        self.buffers = PrefillBuffers(self.kv_cache, self.max_context_tokens, max(sizes, default=0))
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(sizes):
            self._capture(size, pool)
        torch.cuda.synchronize(self.kv_cache.device)

    def _capture(self, size: int, pool: Any) -> None:
        self._run(size)  # compiles what is not compiled yet, and warms the libraries' workspaces
        self._graphs[size] = graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._logits[size] = self._run(size)

    def rehearse(self) -> None:
        """As of decode graphs; the prompts are empty."""
        self.buffers.clear()
        for graph in self._graphs.values():
            graph.replay()

    def _run(self, size: int) -> Tensor:
        buffers = self.buffers
        tokens_T, positions_T, _ = buffers.tokens_3T[:, :size].unbind(0)
        metadata, last = buffers.metadata(size), buffers.last_tokens
        return self.model.forward_prefill(tokens_T, positions_T, self.kv_cache, metadata, last, self.backend)

    def close(self) -> None:
        """Drop the graphs, and with them their memory."""
        self._graphs, self._logits = {}, {}

    def size_for(self, num_tokens: int, num_sequences: int) -> int | None:
        """The captured size that serves such a step; None: launch it eagerly."""
        if num_sequences > MAX_SEQUENCES:
            return None
        return min((size for size in self._graphs if size >= num_tokens), default=None)

    def replay(self, size: int, batch: ChunkBatch) -> Tensor:
        """Launch a step; logits [MAX_SEQUENCES, V] of each sequence's last token, valid until the next replay."""
        self.buffers.fill(size, batch)
        self._graphs[size].replay()
        return self._logits[size]


def _send(host: Tensor, target: Tensor) -> None:
    target.copy_(host.pin_memory(), non_blocking=True)
