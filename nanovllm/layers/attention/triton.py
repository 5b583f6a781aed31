"""Attention through our own Triton kernels (nanovllm/kernels): paged prefill and paged decode on any CUDA card.

Letters in names: T query tokens of a prefill batch, B decode rows, H query heads, D head dim.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from nanovllm.kernels.decode_plan import MIN_PLANNED_ROWS, plan_decode
from nanovllm.kernels.paged_decode import paged_decode
from nanovllm.kernels.paged_decode_hopper import paged_decode_ring, pages_fit_ring
from nanovllm.kernels.paged_decode_planned import paged_decode_planned
from nanovllm.kernels.paged_prefill import is_hopper, paged_prefill, store_kv
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, PrefillMetadata
from nanovllm.layers.elementwise import TritonElementwise


class TritonAttention(AttentionBackend):
    """Stateless, so cards may share it: partial results live in tensors made per call, which a graph keeps.

    head_dim: the model's D. num_sms: SMs that decode may run on, where its stream has only a partition of the
    card; None: all of them. Raises `ValueError` for a head dim that is no power of two from 16 up.
    """

    name = "triton"

    def __init__(self, head_dim: int, num_sms: int | None = None) -> None:
        if head_dim < 16 or head_dim & (head_dim - 1):
            raise ValueError(f"attention backend 'triton' needs a head_dim of 16, 32, 64, …, not {head_dim}")
        self.num_sms = num_sms
        self.elementwise = TritonElementwise(num_sms)

    def store_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        store_kv(k, v, k_pages, v_pages, slot_mapping, num_sms=self.num_sms)

    def prefill(
        self, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: PrefillMetadata, out: Tensor | None = None
    ) -> Tensor:
        return paged_prefill(
            q_THD,
            k_pages,
            v_pages,
            meta.block_tables,
            meta.cu_seqlens_q,
            meta.context_lens,
            meta.max_query_tokens,
            num_sms=self.num_sms,
            out=out,
        )

    def planned(self, meta: DecodeMetadata, k_pages: Tensor) -> DecodeMetadata:
        """On the whole card. On a partition the ring shares the work by lengths anyhow."""
        if self.num_sms is not None or len(meta.context_lens) < MIN_PLANNED_ROWS:
            return meta
        plan = plan_decode(
            meta.context_lens,
            meta.row_order,
            meta.max_context_tokens,
            num_kv_heads=k_pages.shape[2],
            head_dim=k_pages.shape[3],
            dtype=k_pages.dtype,
        )
        return replace(meta, plan=plan)

    def decode(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata, out: Tensor | None = None
    ) -> Tensor:
        if meta.plan is not None and self.num_sms is None:
            return paged_decode_planned(q_BHD, k_pages, v_pages, meta.block_tables, meta.plan, out=out)
        decode = paged_decode_ring if self._takes_ring(q_BHD, k_pages) else paged_decode
        return decode(
            q_BHD,
            k_pages,
            v_pages,
            meta.block_tables,
            meta.context_lens,
            meta.max_context_tokens,
            row_order=meta.row_order,
            num_sms=self.num_sms,
            out=out,
        )

    def _takes_ring(self, q_BHD: Tensor, k_pages: Tensor) -> bool:
        """On a partition of a Hopper card it reads faster; on a whole one, a program a row does."""
        return self.num_sms is not None and is_hopper(q_BHD.device) and pages_fit_ring(k_pages)
