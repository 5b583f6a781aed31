"""Decode attention over paged KV on Hopper, for a few SMs: pages loaded by its bulk copy engine, never idle in between.

`paged_decode` begins each (row, KV head) in a program of its own, whose first load waits for a launch, a context, a
block id and a query. Where every SM must have 100 KB in flight to keep its share of the memory busy, that shows. Here
as many programs as fit at once share the tiles of all rows equally, each a run of consecutive tiles, in the manner of
stream-K (Osama et al. 2023) and Lean Attention (Sanovar et al. 2024). One loop goes over a program's tiles, whatever
rows they are of, so that its loads run ahead across rows too.
Rows that were cut are put together by a second kernel, by their log-sum-exp (Flash-Decoding, Dao et al. 2023).

The last tile of a context is loaded shifted, as in `paged_prefill_hopper`: what lies past the context is not read.
Letters in names: B rows, H query heads, K KV heads, G = H / K, D head dim, S shares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.launch import has_pdl, wait_for_predecessor
from nanovllm.kernels.paged_decode import (
    MIN_SPLIT_TOKENS,
    check_pages,
    check_tables,
    count_sms,
    output_like,
    row_heads,
    score_scale_log2,
)
from nanovllm.kernels.paged_prefill_hopper import HEAD_DIM, page_descriptor

PLANNED_ROWS = tl.constexpr(256)  # contexts that a program sums up at once
MIN_DOT_HEADS = 8  # columns of the tensor cores' product
COMBINED_PARTS = 16


class ShareTiles(NamedTuple):
    """tile_tokens: KV tokens of a step. num_stages: tiles in shared memory. programs_per_sm must fit at once."""

    tile_tokens: int = 64
    num_warps: int = 2
    num_stages: int = 3
    programs_per_sm: int = 3


SMALL_PAGE_TILES = ShareTiles(32, num_warps=1, num_stages=3, programs_per_sm=6)


def choose_share_tiles(page_tokens: int) -> ShareTiles:
    """Best of a sweep on an H200: 3.2 TB/s on 44 SMs with 256x1024; 3.1 with those for smaller pages."""
    return ShareTiles() if page_tokens >= ShareTiles().tile_tokens else SMALL_PAGE_TILES


@triton.jit
def _count_tiles(context: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """A row without context counts as a tile: its zeros have to be written."""
    return tl.maximum(tl.cdiv(context, TILE), 1)


@triton.jit
def _share_of(tile: tl.tensor, total: tl.tensor, num_shares: tl.tensor) -> tl.tensor:
    """The share that holds a tile, if share s begins at s · total // num_shares."""
    return ((tile + 1) * num_shares - 1) // total


@triton.jit
def _find_share(
    context_lens_ptr: tl.tensor,
    num_rows: tl.tensor,
    share: tl.tensor,
    num_shares: tl.tensor,
    min_tiles: tl.tensor,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(begin, end, total, used, row, in_row): a share's tiles, counted over all rows; of all rows the tiles, and the
    shares in use; the row of tile `begin`, and which of that row's tiles it is. Shares past the used ones are empty."""
    total = 0
    for first in range(0, num_rows, PLANNED_ROWS):
        rows = first + tl.arange(0, PLANNED_ROWS)
        context = tl.load(context_lens_ptr + rows, mask=rows < num_rows, other=0)
        total += tl.sum(tl.where(rows < num_rows, _count_tiles(context, TILE), 0), 0)
    used = tl.minimum(num_shares, tl.cdiv(total, min_tiles))
    begin = (tl.minimum(share, used).to(tl.int64) * total // used).to(tl.int32)
    end = (tl.minimum(share + 1, used).to(tl.int64) * total // used).to(tl.int32)
    row, row_begin, before = 0, 0, 0
    for first in range(0, num_rows, PLANNED_ROWS):
        rows = first + tl.arange(0, PLANNED_ROWS)
        context = tl.load(context_lens_ptr + rows, mask=rows < num_rows, other=0)
        ends = before + tl.cumsum(tl.where(rows < num_rows, _count_tiles(context, TILE), 0), 0)
        passed = (ends <= begin) & (rows < num_rows)
        row += tl.sum(passed.to(tl.int32), 0)
        row_begin = tl.maximum(row_begin, tl.max(tl.where(passed, ends, 0), 0))
        before = tl.max(ends, 0)
    return begin, end, total, used, tl.minimum(row, num_rows - 1), begin - row_begin


@triton.jit(
    do_not_specialize=["num_rows", "q_row_heads", "table_row_blocks", "min_tiles"],
    do_not_specialize_on_alignment=["tables_ptr", "context_lens_ptr"],
)
def _share_kernel(
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    cuts_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    num_rows: tl.tensor,
    q_row_heads: tl.tensor,
    table_row_blocks: tl.tensor,
    scale_log2: tl.tensor,
    min_tiles: tl.tensor,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (K, S). One KV head's tiles of one share. A row that lies in it goes to `out`. Of one that does not, the
    part goes to parts[2s], or to parts[2s + 1] if the row begins here; then cuts[s] gets (row, its parts), else (_, 0).
    """
    kv_head, share, num_shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    wait_for_predecessor(PDL)
    begin, end, total, used, row, in_row = _find_share(context_lens_ptr, num_rows, share, num_shares, min_tiles, TILE)
    heads, dims, places = tl.arange(0, HEADS), tl.arange(0, HEAD_DIM), tl.arange(0, TILE)
    real = heads < GROUP
    offsets = heads[:, None] * HEAD_DIM + dims
    column = kv_head * HEAD_DIM
    last_row = num_rows - 1
    context = tl.load(context_lens_ptr + row)
    next_context = tl.load(context_lens_ptr + tl.minimum(row + 1, last_row))
    token = in_row * TILE
    block_ptr = tables_ptr + row.to(tl.int64) * table_row_blocks + token // PAGE
    block = tl.load(block_ptr, mask=token < context, other=0)
    first_head = row.to(tl.int64) * q_row_heads + kv_head * GROUP
    q = tl.load(q_ptr + first_head * HEAD_DIM + offsets, mask=real[:, None], other=0.0)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    sums = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEAD_DIM, HEADS], tl.float32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        shift = tl.maximum(in_row * TILE + TILE - context, 0)
        token = in_row * TILE % PAGE - shift
        k = k_desc.load([block, token, column]).reshape(TILE, HEAD_DIM)
        v = v_desc.load([block, token, column]).reshape(TILE, HEAD_DIM)
        # Tokens and dims are the products' rows: as columns, 8 heads suffice, and half the arithmetic.
        scores = tl.dot(k, q.T, input_precision="tf32x3") * scale_log2
        scores = tl.where((places >= shift)[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row without context has seen nothing
        p = tl.exp2(scores - base)
        alpha = tl.exp2(top - base)
        sums = sums * alpha + tl.sum(p, 0)
        acc = tl.dot(v.T, p.to(v.dtype), acc * alpha, input_precision="tf32x3")
        top = new_top

        ends_row = in_row + 1 == _count_tiles(context, TILE)
        if ends_row | (tile + 1 == end):
            result = (acc / tl.where(sums > 0, sums, 1.0)).T
            begins_here = tile - in_row >= begin
            if ends_row & begins_here:
                first_head = row.to(tl.int64) * (K * GROUP) + kv_head * GROUP
                out_ptrs = out_ptr + first_head * HEAD_DIM + offsets
                tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=real[:, None])
            else:
                first_head = (share * 2 + begins_here).to(tl.int64) * (K * GROUP) + kv_head * GROUP
                tl.store(parts_ptr + first_head * HEAD_DIM + offsets, result, mask=real[:, None])
                tl.store(lse_ptr + first_head + heads, top + tl.log2(sums), mask=real)
            first_head = tl.minimum(row + 1, last_row).to(tl.int64) * q_row_heads + kv_head * GROUP
            q = tl.load(q_ptr + first_head * HEAD_DIM + offsets, mask=real[:, None], other=0.0)
            # Set, not scaled by 0: a row of NaN must not spoil the next.
            top = tl.full([HEADS], float("-inf"), tl.float32)
            sums = tl.zeros([HEADS], tl.float32)
            acc = tl.zeros([HEAD_DIM, HEADS], tl.float32)
        row += ends_row.to(tl.int32)
        in_row = tl.where(ends_row, 0, in_row + 1)
        context = tl.where(ends_row, next_context, context)
        # Loaded ahead of their use: a page's load must wait for neither.
        next_context = tl.load(context_lens_ptr + tl.minimum(row + 1, last_row))
        token = in_row * TILE
        block_ptr = tables_ptr + tl.minimum(row, last_row).to(tl.int64) * table_row_blocks + token // PAGE
        block = tl.load(block_ptr, mask=token < context, other=0)

    if kv_head == 0:
        row_begin = end - in_row
        parts = _share_of(row_begin + _count_tiles(context, TILE) - 1, total, used) - share + 1
        cut = (begin < end) & (in_row > 0) & (row_begin >= begin)
        tl.store(cuts_ptr + share * 2, row)
        tl.store(cuts_ptr + share * 2 + 1, tl.where(cut, parts, 0))


@triton.jit
def _join_kernel(
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    cuts_ptr: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (H, S). One head of the row that begins in share s and goes on: its parts weighted by their log-sum-exp."""
    head, share, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    wait_for_predecessor(PDL)
    row, num_parts = tl.load(cuts_ptr + share * 2), tl.load(cuts_ptr + share * 2 + 1)
    dims = tl.arange(0, HEAD_DIM)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        part_rows = ((share + part) * 2 + (part == 0).to(tl.int32)) * num_heads + head
        lse = tl.load(lse_ptr + part_rows, mask=part < num_parts, other=float("-inf"))
        values = tl.load(parts_ptr + part_rows[:, None] * HEAD_DIM + dims, mask=(part < num_parts)[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        alpha = tl.exp2(top - new_top)
        weights = tl.exp2(lse - new_top)
        total = total * alpha + tl.sum(weights, 0)
        acc = acc * alpha + tl.sum(values * weights[:, None], 0)
        top = new_top
    if num_parts > 0:
        out_ptrs = out_ptr + (row.to(tl.int64) * num_heads + head) * HEAD_DIM + dims
        tl.store(out_ptrs, (acc / total).to(out_ptr.dtype.element_ty))


def pages_fit_decode_boxes(k_pages: Tensor, tiles: ShareTiles | None = None) -> bool:
    """Whether `paged_decode_tma` takes such pages [blocks, page_tokens, K, D]: 16-bit, D = 128, a tile of tokens or
    more, and a page's tokens and heads side by side."""
    _, page_tokens, num_kv_heads, head_dim = k_pages.shape
    if k_pages.stride()[1:] != (num_kv_heads * head_dim, head_dim, 1):
        return False
    tile_tokens = (tiles or choose_share_tiles(page_tokens)).tile_tokens
    return k_pages.dtype.itemsize == 2 and head_dim == HEAD_DIM and page_tokens >= tile_tokens


def paged_decode_tma(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_context_tokens: int,
    *,
    row_order: Tensor | None = None,
    num_sms: int | None = None,
    tiles: ShareTiles | None = None,
    pdl: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_decode` on Hopper, arguments and result as there, for pages that `pages_fit_decode_boxes`. Two kernels.

    max_context_tokens and row_order are not needed: the work is shared by the lengths on the card, equally anyhow.
    tiles: None for the fixed choice. pdl: programmatic dependent launch (None: on Hopper). The tensor maps go with the
    launch, so that a captured graph keeps them.
    """
    (num_rows, num_heads, head_dim), (page_tokens, num_kv_heads) = q.shape, k_pages.shape[1:3]
    check_pages(q, k_pages, v_pages)
    check_tables(block_tables, context_lens)
    tiles = tiles or choose_share_tiles(page_tokens)
    assert k_pages.stride()[1:3] == (num_kv_heads * head_dim, head_dim), f"strides {k_pages.stride()}"
    assert page_tokens >= tiles.tile_tokens, f"{page_tokens} tokens a page, {tiles.tile_tokens} a tile"
    num_programs = (num_sms or count_sms(q.device)) * tiles.programs_per_sm
    num_shares = max(1, num_programs // num_kv_heads)
    out = output_like(q, out)
    group = num_heads // num_kv_heads
    parts = torch.empty(num_shares * 2, num_heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(parts.shape[:-1], dtype=torch.float32, device=q.device)
    cuts = torch.empty(num_shares, 2, dtype=torch.int32, device=q.device)
    early = has_pdl(q.device) if pdl is None else pdl
    with torch.cuda.device_of(q):
        _share_kernel[(num_kv_heads, num_shares)](
            out,
            parts,
            lse,
            cuts,
            q,
            page_descriptor(k_pages, tiles.tile_tokens),
            page_descriptor(v_pages, tiles.tile_tokens),
            block_tables,
            context_lens,
            num_rows,
            row_heads(q),
            block_tables.stride(0),
            score_scale_log2(head_dim),
            max(1, MIN_SPLIT_TOKENS // tiles.tile_tokens),
            K=num_kv_heads,
            GROUP=group,
            HEADS=max(MIN_DOT_HEADS, triton.next_power_of_2(group)),
            HEAD_DIM=head_dim,
            PAGE=page_tokens,
            TILE=tiles.tile_tokens,
            STAGES=tiles.num_stages,
            PDL=early,
            num_warps=tiles.num_warps,
            launch_pdl=early,
        )
        _join_kernel[(num_heads, num_shares)](
            out, parts, lse, cuts, HEAD_DIM=head_dim, PARTS=COMBINED_PARTS, PDL=early, num_warps=4, launch_pdl=early
        )
    return out
