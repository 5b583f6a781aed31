"""Attention in plain torch: runs on every device, and is the reference for the kernels.

Letters in names: T query tokens of a prefill batch, B decode rows, H query heads, K KV heads, G query heads
per KV head, Q query tokens and C context tokens of one sequence, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, PrefillMetadata
from nanovllm.layers.elementwise import TorchElementwise
from nanovllm.models.model_config import ModelConfig

GATHERED_BYTES = 256 << 20  # keys (and as much again for values) that decode gathers at once on a GPU
QUERY_TILE_TOKENS = 1024  # bounds the mask (and the scores, where SDPA materialises them) of a long chunk


class TorchAttention(AttentionBackend):
    """Gathers each context from its pages and calls SDPA. Stateless, so cards may share it."""

    name = "torch"

    def __init__(self, model_config: ModelConfig) -> None:
        self.num_kv_heads = model_config.num_key_value_heads
        self.elementwise = TorchElementwise()

    def store_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        block_size = k_pages.shape[1]
        block, offset = slot_mapping // block_size, slot_mapping % block_size
        k_pages[block, offset] = k
        v_pages[block, offset] = v

    def prefill(
        self, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: PrefillMetadata, out: Tensor | None = None
    ) -> Tensor:
        out_THD = torch.empty_like(q_THD) if out is None else out
        start = 0
        for row, (query_len, context_len) in enumerate(zip(meta.host_query_lens, meta.host_context_lens, strict=True)):
            own = slice(start, start + query_len)
            k_CKD = gather_context(k_pages, meta.block_tables[row], context_len)
            v_CKD = gather_context(v_pages, meta.block_tables[row], context_len)
            self._prefill_one(q_THD[own], k_CKD, v_CKD, out_THD[own])
            start += query_len
        assert start == q_THD.shape[0], f"host_query_lens add up to {start}, not to {q_THD.shape[0]} tokens"
        return out_THD

    def _prefill_one(self, q_QHD: Tensor, k_CKD: Tensor, v_CKD: Tensor, out_QHD: Tensor) -> None:
        """Tile by tile over the queries; a tile sees the context up to its own last token."""
        num_queries, num_context = q_QHD.shape[0], k_CKD.shape[0]
        first_position = num_context - num_queries
        for tile in torch.arange(num_queries).split(QUERY_TILE_TOKENS):
            begin, end = int(tile[0]), int(tile[-1]) + 1
            visible = first_position + end
            out_QHD[begin:end] = self._causal(q_QHD[begin:end], k_CKD[:visible], v_CKD[:visible])

    def _causal(self, q_QHD: Tensor, k_CKD: Tensor, v_CKD: Tensor) -> Tensor:
        """Bottom-right aligned: the last query sees every context token."""
        num_queries, num_context = q_QHD.shape[0], k_CKD.shape[0]
        q_KGQD = q_QHD.unflatten(1, (self.num_kv_heads, -1)).permute(1, 2, 0, 3)
        k_KGCD = k_CKD.permute(1, 0, 2).unsqueeze(1).expand(-1, q_KGQD.shape[1], -1, -1)
        v_KGCD = v_CKD.permute(1, 0, 2).unsqueeze(1).expand(-1, q_KGQD.shape[1], -1, -1)
        mask_QC = torch.ones(num_queries, num_context, dtype=torch.bool, device=q_QHD.device)
        mask_QC = mask_QC.tril(num_context - num_queries)
        out_KGQD = scaled_dot_product_attention(q_KGQD, k_KGCD, v_KGCD, attn_mask=mask_QC)
        return out_KGQD.permute(2, 0, 1, 3).flatten(1, 2)

    def decode(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata, out: Tensor | None = None
    ) -> Tensor:
        decoded_BHD = self._decode(q_BHD, k_pages, v_pages, meta)
        return decoded_BHD if out is None else out.copy_(decoded_BHD)

    def _decode(self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata) -> Tensor:
        block_size = k_pages.shape[1]
        if not q_BHD.is_cuda:
            return self._decode_by_width(q_BHD, k_pages, v_pages, meta)
        columns = -(-max(meta.max_context_tokens, 1) // block_size)
        row_bytes = columns * k_pages[0].nbytes
        rows = max(1, GATHERED_BYTES // row_bytes)  # lengths are not looked at: that would wait for the card
        pieces = zip(*(t.split(rows) for t in (q_BHD, meta.block_tables[:, :columns], meta.context_lens)), strict=True)
        return torch.cat([self._decode_rows(q, k_pages, v_pages, tables, lens) for q, tables, lens in pieces])

    def _decode_by_width(self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata) -> Tensor:
        """Rows of similar length together, so that a long context costs its own row, not its neighbours."""
        blocks = [max(1, -(-length // k_pages.shape[1])) for length in meta.context_lens.tolist()]
        by_width: dict[int, list[int]] = {}
        for row, count in enumerate(blocks):
            by_width.setdefault(1 << (count - 1).bit_length(), []).append(row)
        out_BHD = torch.empty_like(q_BHD)
        for rows in by_width.values():
            tables = meta.block_tables[rows, : max(blocks[row] for row in rows)]
            out_BHD[rows] = self._decode_rows(q_BHD[rows], k_pages, v_pages, tables, meta.context_lens[rows])
        return out_BHD

    def _decode_rows(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, tables_BN: Tensor, lens_B: Tensor
    ) -> Tensor:
        k_BKCD = k_pages[tables_BN].flatten(1, 2).transpose(1, 2)
        v_BKCD = v_pages[tables_BN].flatten(1, 2).transpose(1, 2)
        column_C = torch.arange(k_BKCD.shape[2], device=q_BHD.device)
        # Zeroed, not only masked: 0 · NaN is NaN in the sum over V, and so is NaN - inf in the scores.
        stale = ~(column_C < lens_B[:, None])[:, None, :, None]
        k_BKCD, v_BKCD = k_BKCD.masked_fill(stale, 0), v_BKCD.masked_fill(stale, 0)
        # A padding row (context 0) sees one zeroed token: a softmax over nothing would be NaN.
        mask_BKGC = (column_C < lens_B.clamp(min=1)[:, None])[:, None, None, :]
        q_BKGD = q_BHD.unflatten(1, (self.num_kv_heads, -1))
        return scaled_dot_product_attention(q_BKGD, k_BKCD, v_BKCD, attn_mask=mask_BKGC).flatten(1, 2)


def gather_context(pages: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """One sequence's first `context_len` tokens, [context_len, K, D], of pages [blocks, block_size, K, D]."""
    num_blocks = -(-context_len // pages.shape[1])
    return pages[block_table[:num_blocks]].flatten(0, 1)[:context_len]
