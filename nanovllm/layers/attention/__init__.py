"""The attention interface: what a step tells a backend, and what a backend must do.

Letters in names: T query tokens of a prefill batch, S its sequences, B decode rows, H query heads, K KV
heads, D head dim. Pages are one layer's `KVCache.layer_view`: each [blocks, block_size, K, D], strided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

# Not `import torch`: once the submodule torch.py is loaded, the name `torch` in this package means that file.
from torch import Tensor
from torch import device as Device
from torch import dtype as DType

from nanovllm.layers.elementwise import Elementwise
from nanovllm.models.model_config import ModelConfig

if TYPE_CHECKING:  # a CPU build of torch comes without Triton
    from nanovllm.kernels.decode_plan import DecodePlan


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
    the tables have a column for every block of it. row_order: int32 [B], a permutation of the rows, or None: the order
    to begin them in, by falling context, so that no long one is left for the end. plan: how a backend divides these
    contexts, as its `planned` has made it of the others, or None: it decides by the number of rows alone.
    """

    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_context_tokens: int
    row_order: Tensor | None = None
    plan: DecodePlan | None = None


@dataclass(frozen=True)
class MixedMetadata:
    """Chunks of prompts and decode rows in one batch: all tokens of `prefill` first, then a token for each row of
    `decode`. slot_mapping: int64 [T + B], that of the one and then that of the other.
    """

    prefill: PrefillMetadata
    decode: DecodeMetadata
    slot_mapping: Tensor


class AttentionBackend(ABC):
    """Causal grouped-query attention over paged KV. Scores are scaled by D ** -0.5, softmax runs in float32.

    Query head h reads KV head h // (H / K). Whatever a page holds past the context length (another sequence's
    KV, NaN) must not reach any output. One instance may be shared by cards only if it keeps no state.
    """

    name: str
    elementwise: Elementwise  # what goes with it between the matrix products

    @abstractmethod
    def store_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        """Write k and v [tokens, K, D] to their slots. Padding rows may share one slot, in any order."""

    @abstractmethod
    def prefill(
        self, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: PrefillMetadata, out: Tensor | None = None
    ) -> Tensor:
        """Attend each chunk to its whole context, its own KV stored before. Returns [T, H, D], q's dtype, which is
        `out` (contiguous) if that is given. Tokens that belong to no sequence are left as they are in `out`.
        """

    def planned(self, meta: DecodeMetadata, k_pages: Tensor) -> DecodeMetadata:
        """What `decode` had better be given for all layers of a step, of which k_pages is one: `meta`, perhaps with a
        plan. May queue kernels. The plan holds for the lengths and the order of rows that `meta` has by then."""
        return meta

    @abstractmethod
    def decode(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata, out: Tensor | None = None
    ) -> Tensor:
        """Attend each row to its context, its new KV stored before. Returns [B, H, D], finite everywhere, which is
        `out` (contiguous) if that is given.
        """

    def mixed(self, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: MixedMetadata) -> Tensor:
        """Both, each over its own part of q, all KV stored before. Returns [T + B, H, D]."""
        num_rows = meta.decode.context_lens.shape[0]
        num_tokens = q_THD.shape[0] - num_rows
        out_THD = q_THD.new_empty(q_THD.shape)
        self.prefill(q_THD[:num_tokens], k_pages, v_pages, meta.prefill, out_THD[:num_tokens])
        self.decode(q_THD[num_tokens:], k_pages, v_pages, meta.decode, out_THD[num_tokens:])
        return out_THD


class MixedAttention(AttentionBackend):
    """One backend's prefill and another's decode, over the same pages."""

    def __init__(self, prefill: AttentionBackend, decode: AttentionBackend) -> None:
        self.name = f"{prefill.name} prefill, {decode.name} decode"
        self.elementwise = decode.elementwise
        self._prefill, self._decode = prefill, decode

    def store_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        self._decode.store_kv(k, v, k_pages, v_pages, slot_mapping)

    def prefill(
        self, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: PrefillMetadata, out: Tensor | None = None
    ) -> Tensor:
        return self._prefill.prefill(q_THD, k_pages, v_pages, meta, out)

    def planned(self, meta: DecodeMetadata, k_pages: Tensor) -> DecodeMetadata:
        return self._decode.planned(meta, k_pages)

    def decode(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata, out: Tensor | None = None
    ) -> Tensor:
        return self._decode.decode(q_BHD, k_pages, v_pages, meta, out)


def make_attention_backend(name: str, model_config: ModelConfig, device: Device, dtype: DType) -> AttentionBackend:
    """The backend called `name`; "auto" takes the fastest that this device, dtype and head dim allow.

    auto: on a GPU our own kernels, with FlashAttention-3's prefill where it is importable; torch elsewhere.
    `ValueError` for an unknown name and for one that cannot run here.
    """
    head_dim = model_config.head_dim
    if name == "torch" or (name == "auto" and (device.type != "cuda" or not _is_power_of_two(head_dim))):
        from nanovllm.layers.attention.torch import TorchAttention  # here: that file imports this one

        return TorchAttention(model_config)
    if name not in ("auto", "triton", "flash_attn"):
        raise ValueError(f"unknown attention backend {name!r}; known: auto, torch, triton, flash_attn")
    if device.type != "cuda":
        raise ValueError(f"attention_backend={name!r} needs a CUDA device, not {device}")
    return _make_gpu_backend(name, head_dim, dtype)


def _make_gpu_backend(name: str, head_dim: int, dtype: DType) -> AttentionBackend:
    from nanovllm.layers.attention.flash_attn import FlashAttention, find_module
    from nanovllm.layers.attention.triton import TritonAttention

    triton = TritonAttention(head_dim)
    if name == "triton":
        return triton
    half = str(dtype) in ("torch.bfloat16", "torch.float16")
    if name == "flash_attn":
        if not half:
            raise ValueError(f"attention_backend='flash_attn' needs bfloat16 or float16, not {dtype}")
        return FlashAttention(triton, find_module("flash_attn_interface"), find_module("flash_attn"))
    fa3 = find_module("flash_attn_interface") if half else None
    return triton if fa3 is None else MixedAttention(FlashAttention(triton, fa3), triton)


def _is_power_of_two(head_dim: int) -> bool:
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0
