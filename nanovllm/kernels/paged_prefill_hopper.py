"""Prefill attention over paged KV on Hopper, keys and values loaded by its bulk copy engine (TMA).

The arithmetic of `paged_prefill`. A tile of one KV head's tokens is one box of a tensor map over the whole pool, so
no thread computes an address, and two programs of eight warps share an SM: one's softmax runs beside the other's
products. The last tile of a context is loaded shifted, its tokens at the end of the box, because what lies past the
context must not be read: as NaN it would survive a product with 0. In front of them come earlier tokens of the page,
which are masked, or zeros, which the engine writes for what lies before a page.
Letters in names: T query tokens, S sequences, H query heads, K KV heads, G = H / K, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.paged_decode import check_pages, check_tables, output_like, row_heads, score_scale_log2

HEAD_DIM = 128  # the only one measured


class TmaTiles(NamedTuple):
    """rows: query rows (token, head) of a program. tile_tokens: KV tokens of a step. max_registers: of a thread."""

    rows: int = 128
    tile_tokens: int = 64
    num_warps: int = 8
    num_stages: int = 2
    max_registers: int = 128  # so that two programs fit


@triton.jit
def _attend(
    acc: tl.tensor,
    total: tl.tensor,
    top: tl.tensor,
    q: tl.tensor,
    positions: tl.tensor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    table_ptr: tl.tensor,
    column: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    context: tl.tensor,
    scale_log2: tl.tensor,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over the tokens [begin, end), begin a multiple of TILE; end too unless MASKED."""
    last = (context - 1) // PAGE
    block = tl.load(table_ptr + tl.minimum(begin // PAGE, last))
    columns = tl.arange(0, TILE)[None, :]
    for start in range(begin, end, TILE):
        shift = tl.maximum(start + TILE - context, 0) if MASKED else 0
        token = start % PAGE - shift
        k = k_desc.load([block, token, column]).reshape(TILE, HEAD_DIM)
        v = v_desc.load([block, token, column]).reshape(TILE, HEAD_DIM)
        block = tl.load(table_ptr + tl.minimum((start + TILE) // PAGE, last))  # a step ahead: a load waits for its id
        scores = tl.dot(q, k.T)
        if MASKED:
            seen = (columns >= shift) & (columns <= (positions - start + shift)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_top[:, None])
        alpha = tl.exp2(top - new_top)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        top = new_top
    return acc, total, top


@triton.jit(
    do_not_specialize=["q_row_heads", "table_row_blocks"],
    do_not_specialize_on_alignment=["tables_ptr", "cu_seqlens_q_ptr", "context_lens_ptr"],
)
def _prefill_tma_kernel(
    out_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    tables_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    q_row_heads: tl.tensor,
    table_row_blocks: tl.tensor,
    scale_log2: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Grid (row tiles of the longest chunk, K, S); tiles past a sequence's own end return at once."""
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    first_query = tl.load(cu_seqlens_q_ptr + sequence)
    num_rows = (tl.load(cu_seqlens_q_ptr + sequence + 1) - first_query) * GROUP
    # The last tile sees the most context: started first, it is not what everyone waits for at the end.
    tile = tl.cdiv(num_rows, ROWS) - 1 - tl.program_id(0)
    if tile < 0:
        return
    context = tl.load(context_lens_ptr + sequence)
    cached = context - num_rows // GROUP  # tokens before this chunk
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_row_blocks
    rows = tile * ROWS + tl.arange(0, ROWS)
    positions = cached + rows // GROUP
    dims = tl.arange(0, HEAD_DIM)
    q_rows = (first_query + rows // GROUP).to(tl.int64) * q_row_heads + kv_head * GROUP + rows % GROUP
    q = tl.load(q_ptr + q_rows[:, None] * HEAD_DIM + dims, mask=(rows < num_rows)[:, None], other=0.0)

    seen_by_all = (cached + tile * ROWS // GROUP + 1) // TILE * TILE
    last_row = tl.minimum((tile + 1) * ROWS, num_rows) - 1
    end = cached + last_row // GROUP + 1
    column = kv_head * HEAD_DIM
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    acc, total, top = _attend(
        acc, total, top, q, positions, k_desc, v_desc, table_ptr, column, 0, seen_by_all, context, scale_log2,
        False, HEAD_DIM, PAGE, TILE,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, positions, k_desc, v_desc, table_ptr, column, seen_by_all, end, context, scale_log2,
        True, HEAD_DIM, PAGE, TILE,
    )  # fmt: skip

    # Loaded again, so that no row's address waits in registers during the loops.
    first_query = tl.load(cu_seqlens_q_ptr + sequence, volatile=True)
    num_rows = (tl.load(cu_seqlens_q_ptr + sequence + 1, volatile=True) - first_query) * GROUP
    rows = (tl.cdiv(num_rows, ROWS) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    out_rows = (first_query + rows // GROUP).to(tl.int64) * (tl.num_programs(1) * GROUP)
    out_rows += kv_head * GROUP + rows % GROUP
    acc = acc / total[:, None]
    out_ptrs = out_ptr + out_rows[:, None] * HEAD_DIM + dims
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None])


def pages_fit_boxes(k_pages: Tensor) -> bool:
    """Whether `paged_prefill_tma` takes such pages [blocks, page_tokens, K, D]: 16-bit, D = 128, 64 tokens or more,
    and a page's tokens and heads side by side."""
    _, page_tokens, num_kv_heads, head_dim = k_pages.shape
    if k_pages.stride()[1:] != (num_kv_heads * head_dim, head_dim, 1):
        return False
    return k_pages.dtype.itemsize == 2 and head_dim == HEAD_DIM and page_tokens >= TmaTiles().tile_tokens


def page_descriptor(pages: Tensor, tile_tokens: int) -> TensorDescriptor:
    """Of pages [blocks, page_tokens, K, D], tokens and heads side by side, in boxes of `tile_tokens` of one head."""
    blocks, page_tokens, num_kv_heads, head_dim = pages.shape
    shape, strides = [blocks, page_tokens, num_kv_heads * head_dim], [*pages.stride()[:2], 1]
    return TensorDescriptor(pages, shape, strides, [1, tile_tokens, head_dim])


def paged_prefill_tma(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_query_tokens: int,
    *,
    num_sms: int | None = None,
    tiles: TmaTiles | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_prefill` on Hopper, arguments as there, for pages that `pages_fit_boxes`. Queues one kernel.

    For given shapes of the model and its pages one variant exists. tiles: None for the fixed choice. The tensor maps
    go with the launch, so that a captured graph keeps them.
    """
    head_dim, page_tokens, num_kv_heads = q.shape[2], *k_pages.shape[1:3]
    check_pages(q, k_pages, v_pages)
    check_tables(block_tables, context_lens)
    assert k_pages.stride()[1:3] == (num_kv_heads * head_dim, head_dim), f"strides {k_pages.stride()}"
    tiles = tiles or TmaTiles()
    assert page_tokens >= tiles.tile_tokens, f"{page_tokens} tokens a page, {tiles.tile_tokens} a tile"
    group = q.shape[1] // num_kv_heads
    out = output_like(q, out)
    num_tiles = triton.cdiv(max_query_tokens * group, tiles.rows)
    with torch.cuda.device_of(q):
        _prefill_tma_kernel[(num_tiles, num_kv_heads, context_lens.shape[0])](
            out,
            q,
            page_descriptor(k_pages, tiles.tile_tokens),
            page_descriptor(v_pages, tiles.tile_tokens),
            block_tables,
            cu_seqlens_q,
            context_lens,
            row_heads(q),
            block_tables.stride(0),
            score_scale_log2(head_dim),
            GROUP=group,
            ROWS=tiles.rows,
            HEAD_DIM=head_dim,
            PAGE=page_tokens,
            TILE=tiles.tile_tokens,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            maxnreg=tiles.max_registers,
        )
    return out
