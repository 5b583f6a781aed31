"""Attention through FlashAttention, where it is installed: Shah et al. 2024 (FA3), Dao 2023 (FA2).

FA3 (module `flash_attn_interface`, Hopper only) reads our pages as they are. FA2 (module `flash_attn`) serves
only prefill of whole contexts, unpaged: its paged kernels want pages of 256 tokens and are wrong when split. All
else goes to the fallback backend. The FA2 path was tested against a stand-in only: **untried** on a GPU.
Both compute in float16 and bfloat16 only, and refuse other dtypes themselves.
Letters in names: T query tokens of a prefill batch, B decode rows, H query heads, D head dim.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

from torch import Tensor

from nanovllm.kernels.paged_decode import count_sms
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, PrefillMetadata

logger = logging.getLogger(__name__)


class FlashAttention(AttentionBackend):
    """Stateless, so cards may share it. `fa3` or else `fa2` does what it can, `fallback` the rest.

    fa3, fa2: the modules, as `find_module` gives them; at least one. num_sms: SMs that FA3 may fill, where its
    stream has only a partition of the card; None: all of them.
    """

    name = "flash_attn"

    def __init__(
        self,
        fallback: AttentionBackend,
        fa3: ModuleType | None = None,
        fa2: ModuleType | None = None,
        num_sms: int | None = None,
    ) -> None:
        if fa3 is None and fa2 is None:
            raise ValueError("attention backend 'flash_attn' needs flash_attn_interface (FA3) or flash_attn (FA2)")
        self.fallback, self.fa3, self.fa2, self.num_sms = fallback, fa3, fa2, num_sms
        self.elementwise = fallback.elementwise

    def store_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        self.fallback.store_kv(k, v, k_pages, v_pages, slot_mapping)

    def prefill(
        self, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: PrefillMetadata, out: Tensor | None = None
    ) -> Tensor:
        if not meta.host_query_lens:  # a captured step: its lengths are on the card alone, FA3's launches follow them
            return self.fallback.prefill(q_THD, k_pages, v_pages, meta, out)
        if self.fa3 is not None:
            lengths = {"cu_seqlens_q": meta.cu_seqlens_q, "max_seqlen_q": meta.max_query_tokens}
            return _put(self._attend_pages(self.fa3, q_THD, k_pages, v_pages, meta, **lengths), out)
        if self.fa2 is not None and meta.host_query_lens == meta.host_context_lens:
            return _put(self._fa2_prefill(self.fa2, q_THD, k_pages, v_pages, meta), out)
        return self.fallback.prefill(q_THD, k_pages, v_pages, meta, out)

    def planned(self, meta: DecodeMetadata, k_pages: Tensor) -> DecodeMetadata:
        return meta if self.fa3 is not None else self.fallback.planned(meta, k_pages)

    def decode(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata, out: Tensor | None = None
    ) -> Tensor:
        if self.fa3 is None:
            return self.fallback.decode(q_BHD, k_pages, v_pages, meta, out)
        return _put(self._attend_pages(self.fa3, q_BHD.unsqueeze(1), k_pages, v_pages, meta).squeeze(1), out)

    def _attend_pages(
        self,
        fa3: ModuleType,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        meta: PrefillMetadata | DecodeMetadata,
        **query_lengths: Any,
    ) -> Tensor:
        """The causal mask is aligned to the bottom right: the last query sees the whole context."""
        return fa3.flash_attn_with_kvcache(
            q,
            k_pages,
            v_pages,
            cache_seqlens=meta.context_lens,
            page_table=_used_columns(meta.block_tables, meta.max_context_tokens, k_pages),
            causal=True,
            sm_margin=0 if self.num_sms is None else count_sms(q.device) - self.num_sms,  # it knows the whole card only
            **query_lengths,
        )

    def _fa2_prefill(
        self, fa2: ModuleType, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: PrefillMetadata
    ) -> Tensor:
        """Every context is its chunk alone: its KV, just stored, is what the slots hold."""
        block, offset = meta.slot_mapping // k_pages.shape[1], meta.slot_mapping % k_pages.shape[1]
        return fa2.flash_attn_varlen_func(
            q_THD,
            k_pages[block, offset],
            v_pages[block, offset],
            meta.cu_seqlens_q,
            meta.cu_seqlens_q,
            meta.max_query_tokens,
            meta.max_query_tokens,
            causal=True,
        )


def find_module(name: str) -> ModuleType | None:
    """The module, or None where it is not installed or does not load; the reason is logged."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        logger.info("%s is not available: %s", name, error)
        return None


def _put(result: Tensor, out: Tensor | None) -> Tensor:
    """A copy in `out`: not every release of these modules can be told where to write."""
    return result if out is None else out.copy_(result)


def _used_columns(block_tables: Tensor, max_context_tokens: int, k_pages: Tensor) -> Tensor:
    """FA3 takes the tables' width for the longest context, and chooses its splits by it."""
    return block_tables[:, : -(-max_context_tokens // k_pages.shape[1])]
