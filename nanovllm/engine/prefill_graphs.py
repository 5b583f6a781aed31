"""CUDA graphs of prefill steps of fixed sizes: small ones run faster than a host launches them, and beside busy threads
it launches three times as slowly.

A step runs in the smallest captured number of tokens that holds it. Tokens beyond its own belong to no sequence and
write their KV to the null block; sequences beyond its own are empty. Sampling is not part of the graph.

Letters in names: T tokens, S sequences, N blocks a sequence can have, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.engine.graph_capture import captured
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.shards import PrefillShard
from nanovllm.engine.step_sizes import MAX_SEQUENCES
from nanovllm.layers.attention import AttentionBackend, PrefillMetadata
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3 import Qwen3ForCausalLM

TOKEN_SIZES = (64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 6144, 8192)
# A step of more arithmetic keeps a card busy for longer than some 10 ms, which its launches take from Python.
LAUNCH_BOUND_FLOPS = 1e13
ALWAYS_TOKENS = 2048  # captured for models of every size: beside busy threads launches take 30 ms and more
LONG_SEQUENCES = 8  # of a captured step that is not launch-bound
MOST_PADDING = 1.125  # tokens computed for each that is asked for, where they and not the launches take the time


def launch_bound_tokens(config: ModelConfig) -> float:
    """Tokens of a step that is computed in the time in which it is launched."""
    return LAUNCH_BOUND_FLOPS / (2 * config.num_parameters())


def token_sizes(config: ModelConfig, max_tokens: int) -> list[int]:
    """The sizes to capture for steps of at most `max_tokens`."""
    most = min(max_tokens, max(ALWAYS_TOKENS, launch_bound_tokens(config)))
    return [size for size in TOKEN_SIZES if size <= most]


class ChunkBatch(NamedTuple):
    """A prefill batch on the host: the tokens of its sequences, one sequence after the other.

    ids, positions, places (in the cache): 64-bit, one for each token. query_lens, context_lens: tokens of each sequence
    in this step and up to its end. tables: blocks of each.

    Arrays, not tensors: every call into torch lets go of the interpreter, and gets it back from busy threads only after
    a while each time. They are filled from whole slices: a loop over 16,384 tokens would take longer than a small
    model's step.
    """

    ids: array[int]
    positions: array[int]
    places: array[int]
    query_lens: list[int]
    context_lens: list[int]
    tables: list[tuple[int, ...]]

    @classmethod
    def of(cls, shard: PrefillShard, block_size: int, line: array[int]) -> ChunkBatch:
        """line: `number_line` as long as the longest context, and as the cache."""
        batch = cls(array("q"), array("q"), array("q"), [], [], [])
        for chunk in shard.chunks:
            end = chunk.start + len(chunk.tokens)
            batch.ids.extend(chunk.tokens)
            batch.positions.extend(line[chunk.start : end])
            for number in range(chunk.start // block_size, -(-end // block_size)):
                first = number * block_size  # position
                shift = chunk.block_table[number] * block_size - first
                batch.places.extend(line[max(chunk.start, first) + shift : min(end, first + block_size) + shift])
            batch.query_lens.append(len(chunk.tokens))
            batch.context_lens.append(end)
            batch.tables.append(chunk.block_table)
        return batch

    def tokens_3T(self, padding_tokens: int = 0, null_place: int = 0) -> Tensor:
        """int64 [3, tokens and padding] on the host: ids, positions, places; the padding's place is `null_place`."""
        zeros, nowhere = (array("q", [value]) * padding_tokens for value in (0, null_place))
        words = self.ids + zeros + self.positions + zeros + self.places + nowhere
        return torch.frombuffer(words, dtype=torch.int64).view(3, -1)

    def tables_SN(self, null_block: int) -> Tensor:
        """int32 [sequences, blocks of the longest] on the host. The null block fills up shorter tables."""
        width, words = max(map(len, self.tables)), array("i")
        for table in self.tables:
            words.extend(table)
            words.extend([null_block] * (width - len(table)))
        return torch.frombuffer(words, dtype=torch.int32).view(len(self.tables), width)

    def last_tokens(self, sequences: list[int]) -> list[int]:
        """Where the last tokens of the given sequences are in the batch."""
        ends = list(accumulate(self.query_lens))
        return [ends[sequence] - 1 for sequence in sequences]


def number_line(length: int) -> array[int]:
    """0, 1, 2, … as 64-bit numbers."""
    line = array("q")
    line.frombytes(torch.arange(length).numpy().tobytes())
    return line


class PrefillBuffers:
    """What captured steps read of a prefill batch: up to `max_tokens` tokens of up to MAX_SEQUENCES sequences."""

    def __init__(self, kv_cache: KVCache, max_context_tokens: int, max_tokens: int) -> None:
        self.max_context_tokens = max_context_tokens
        self.null_block, self.null_place = kv_cache.null_block, kv_cache.null_block * kv_cache.block_size
        device, max_blocks = kv_cache.device, -(-max_context_tokens // kv_cache.block_size)
        # Rows: token ids, positions, places in the cache.
        self.tokens_3T = torch.zeros(3, max_tokens, dtype=torch.int64, device=device)
        self.tokens_3T[2] = self.null_place
        self.tables_SN = torch.zeros(MAX_SEQUENCES, max_blocks, dtype=torch.int32, device=device)
        # Rows: first token of each sequence and the end, its context, its last token.
        self.sequences_3S = torch.zeros(3, MAX_SEQUENCES + 1, dtype=torch.int32, device=device)

    def metadata(self, size: int, num_sequences: int = MAX_SEQUENCES) -> PrefillMetadata:
        """Of a step of `size` tokens, padding included, of at most so many sequences."""
        starts, context_lens, _ = self.sequences_3S.unbind(0)
        return PrefillMetadata(
            cu_seqlens_q=starts[: num_sequences + 1],
            context_lens=context_lens[:num_sequences],
            block_tables=self.tables_SN[:num_sequences],
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
        starts = [0, *accumulate(batch.query_lens)]
        starts += starts[-1:] * (MAX_SEQUENCES + 1 - len(starts))
        lasts = [max(0, end - 1) for end in starts[1:]]
        contexts = batch.context_lens + [0] * (MAX_SEQUENCES + 1 - len(batch.context_lens))
        sequences = torch.frombuffer(array("i", [*starts, *contexts, *lasts, 0]), dtype=torch.int32)
        tables_SN = batch.tables_SN(self.null_block)
        _send(batch.tokens_3T(size - len(batch.ids), self.null_place), self.tokens_3T[:, :size])
        _send(sequences.view_as(self.sequences_3S), self.sequences_3S)
        _send(tables_SN, self.tables_SN[: tables_SN.shape[0], : tables_SN.shape[1]])


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
        self._graphs[size], self._logits[size] = captured(partial(self._run, size), pool)

    def rehearse(self) -> None:
        """As of decode graphs; the prompts are empty."""
        self.buffers.clear()
        for graph in self._graphs.values():
            graph.replay()

    def _run(self, size: int) -> Tensor:
        buffers = self.buffers
        tokens_T, positions_T, _ = buffers.tokens_3T[:, :size].unbind(0)
        num_sequences = self._most_sequences(size)
        metadata, last = buffers.metadata(size, num_sequences), buffers.last_tokens[:num_sequences]
        return self.model.forward_prefill(tokens_T, positions_T, self.kv_cache, metadata, last, self.backend)

    def close(self) -> None:
        """Drop the graphs, and with them their memory."""
        self._graphs, self._logits = {}, {}

    def size_for(self, num_tokens: int, num_sequences: int) -> int | None:
        """The captured size that serves such a step; None: launch it eagerly."""
        size = min((size for size in self._graphs if size >= num_tokens), default=None)
        if size is None or num_sequences > self._most_sequences(size):
            return None
        return size if self._is_launch_bound(size) or size <= MOST_PADDING * num_tokens else None

    def _is_launch_bound(self, size: int) -> bool:
        """Sizes that were asked for are taken wherever they fit."""
        return self.sizes is not None or size <= launch_bound_tokens(self.model.config)

    def _most_sequences(self, size: int) -> int:
        """Of a captured step: attention's programs of each that is empty take time, too."""
        return MAX_SEQUENCES if self._is_launch_bound(size) else LONG_SEQUENCES

    def replay(self, size: int, batch: ChunkBatch) -> Tensor:
        """Launch a step; logits [most sequences, V] of each sequence's last token, valid until the next replay."""
        self.buffers.fill(size, batch)
        self._graphs[size].replay()
        return self._logits[size]


def _send(host: Tensor, target: Tensor) -> None:
    target.copy_(host.pin_memory(), non_blocking=True)
