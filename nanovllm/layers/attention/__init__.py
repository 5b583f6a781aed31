"""The attention interface: what a step tells a backend, and what a backend must do.

Letters in names: T query tokens of a prefill batch, S its sequences, B decode rows, H query heads, K KV
heads, D head dim. Pages are one layer's `KVCache.layer_view`: each [blocks, block_size, K, D], strided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

# Not `import torch`: once the submodule torch.py is loaded, the name `torch` in this package means that file.
from torch import Tensor

from nanovllm.models.model_config import ModelConfig


@dataclass(frozen=True)
class PrefillMetadata:
    """Where the tokens of one prefill batch belong. Sequence s owns query tokens cu_seqlens_q[s] … [s+1].

    cu_seqlens_q: int32 [S + 1], starts at 0. context_lens: int32 [S], tokens in the KV cache including this
    chunk. block_tables: int32 [S, max_blocks], valid block ids in every column, also past the context.
    slot_mapping: int64 [T], block · block_size + offset. The host copies say the same as the tensors, so that
    no backend needs to wait for the card.
    """

    cu_seqlens_q: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query_tokens: int
    max_context_tokens: int
    host_query_lens: tuple[int, ...]
    host_context_lens: tuple[int, ...]


@dataclass(frozen=True)
class DecodeMetadata:
    """One new token per row. All tensors may be the static buffers of a captured graph.

    context_lens: int32 [B], tokens in the KV cache including the new one; 0 marks a padding row.
    block_tables: int32 [B, max_blocks], valid block ids in every column. slot_mapping: int64 [B]; padding
    rows point into the null block. max_context_tokens: a host bound, at least the largest of context_lens;
    the tables have a column for every block of it.
    """

    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_context_tokens: int


class AttentionBackend(ABC):
    """Causal grouped-query attention over paged KV. Scores are scaled by D ** -0.5, softmax runs in float32.

    Query head h reads KV head h // (H / K). Whatever a page holds past the context length (another sequence's
    KV, NaN) must not reach any output. One instance may be shared by cards only if it keeps no state.
    """

    name: str

    @abstractmethod
    def store_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        """Write k and v [tokens, K, D] to their slots. Padding rows may share one slot, in any order."""

    @abstractmethod
    def prefill(self, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: PrefillMetadata) -> Tensor:
        """Attend each chunk to its whole context, its own KV stored before. Returns [T, H, D], q's dtype."""

    @abstractmethod
    def decode(self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata) -> Tensor:
        """Attend each row to its context, its new KV stored before. Returns [B, H, D], finite everywhere."""


def make_attention_backend(name: str, model_config: ModelConfig) -> AttentionBackend:
    """The backend called `name`; "auto" picks one that runs everywhere. Unknown names are a `ValueError`."""
    from nanovllm.layers.attention.torch import TorchAttention  # here: that file imports this one

    if name in ("auto", "torch"):
        return TorchAttention(model_config)
    if name in ("triton", "flash_attn"):
        raise ValueError(f"attention backend {name!r} is not implemented yet; use 'auto' or 'torch'")
    raise ValueError(f"unknown attention backend {name!r}; known: auto, torch, triton, flash_attn")
