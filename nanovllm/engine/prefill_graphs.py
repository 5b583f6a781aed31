"""CUDA graphs of small prefill steps, for models whose kernels run faster than a host launches them.

A step runs in the smallest captured number of tokens that holds it. Tokens beyond its own belong to no sequence and
write their KV to the null block; sequences beyond its own are empty. Sampling is not part of the graph.

Letters in names: T tokens, S sequences, N blocks a sequence can have, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine.kv_cache import KVCache
from nanovllm.layers.attention import PrefillMetadata
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3 import Qwen3ForCausalLM

MAX_SEQUENCES = 8
TOKEN_SIZES = (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
# A step of more arithmetic keeps a card busy for longer than some 10 ms, which its launches take from Python.
LAUNCH_BOUND_FLOPS = 1e13


def token_sizes(config: ModelConfig, max_tokens: int) -> list[int]:
    """The sizes to capture for steps of at most `max_tokens`: those that are launch-bound."""
    most = min(max_tokens, LAUNCH_BOUND_FLOPS / (2 * config.num_parameters()))
    return [size for size in TOKEN_SIZES if size <= most]


@dataclass
class PrefillGraphs:
    """Captured on construction, on the current stream of the card, with the card's own workers not yet started.

    Replays must be launched on the stream of the capture, one step at a time.
    """

    model: Qwen3ForCausalLM
    kv_cache: KVCache
    max_context_tokens: int
    max_tokens: int
    _graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)
    _logits: dict[int, Tensor] = field(default_factory=dict)  # [S, V] each

    def __post_init__(self) -> None:
        device, sizes = self.kv_cache.device, token_sizes(self.model.config, self.max_tokens)
        largest, max_blocks = max(sizes, default=0), -(-self.max_context_tokens // self.kv_cache.block_size)
        # Rows: token ids, positions, slots in the cache.
        self.tokens_3T = torch.zeros(3, largest, dtype=torch.int64, device=device)
        self.tokens_3T[2] = self.null_place
        self.tables_SN = torch.zeros(MAX_SEQUENCES, max_blocks, dtype=torch.int32, device=device)
        # Rows: first token of each sequence and the end, its context, its last token.
        self.sequences_3S = torch.zeros(3, MAX_SEQUENCES + 1, dtype=torch.int32, device=device)
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(sizes):
            self._capture(size, pool)
        torch.cuda.synchronize(device)

    @property
    def null_place(self) -> int:
        return self.kv_cache.null_block * self.kv_cache.block_size

    def _capture(self, size: int, pool: Any) -> None:
        self._run(size)  # compiles what is not compiled yet, and warms the libraries' workspaces
        self._graphs[size] = graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._logits[size] = self._run(size)

    def _run(self, size: int) -> Tensor:
        tokens_T, positions_T, mapping_T = self.tokens_3T[:, :size].unbind(0)
        starts, context_lens, last = self.sequences_3S.unbind(0)
        metadata = PrefillMetadata(
            cu_seqlens_q=starts,
            context_lens=context_lens[:MAX_SEQUENCES],
            block_tables=self.tables_SN,
            slot_mapping=mapping_T,
            max_query_tokens=size,
            max_context_tokens=self.max_context_tokens,
            host_query_lens=(),
            host_context_lens=(),
        )
        return self.model.forward_prefill(tokens_T, positions_T, self.kv_cache, metadata, last[:MAX_SEQUENCES].long())

    def size_for(self, num_tokens: int, num_sequences: int) -> int | None:
        """The captured size that serves such a step; None: launch it eagerly."""
        if num_sequences > MAX_SEQUENCES:
            return None
        return min((size for size in self._graphs if size >= num_tokens), default=None)

    def replay(
        self, size: int, tokens_3T: Tensor, query_lens: list[int], context_lens: list[int], tables_SN: Tensor
    ) -> Tensor:
        """Launch a step; logits [MAX_SEQUENCES, V] of each sequence's last token, valid until the next replay.

        tokens_3T: int64 on the host: ids, positions, slots. query_lens, context_lens: tokens of each sequence in this
        step and up to its end. tables_SN: integers on the host, any width.
        """
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
        self._graphs[size].replay()
        return self._logits[size]


def _send(host: Tensor, target: Tensor) -> None:
    target.copy_(host.pin_memory(), non_blocking=True)
