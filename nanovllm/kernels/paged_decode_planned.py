"""Decode attention over pages for uneven contexts: `paged_decode`, but programs take their parts of rows from a plan.

A row that is one item is written as it is. Of a row of several, each program leaves its part and counts itself, and the
last to arrive adds them up by their log-sum-exp (Flash-Decoding, Dao et al. 2023). So a batch that is not divided pays
for no second kernel, and programs without an item, behind all others in the grid, end at once. The plan and its bounds:
`decode_plan`.
Letters in names: B rows, H query heads, K KV heads, G = H / K, D head dim, M items.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.decode_plan import BEGIN, COUNT, END, FIRST, ROW, DecodePlan
from nanovllm.kernels.launch import has_pdl
from nanovllm.kernels.paged_decode import (
    MIN_DOT_ROWS,
    attend_range,
    check_pages,
    fetch_ahead,
    output_like,
    row_heads,
    score_scale_log2,
)

JOINED_HEADS = 32  # results [D] that the last program adds up at once, of all its heads


@triton.jit
def _join_parts(
    out_ptr: tl.tensor, parts_ptr: tl.tensor, lse_ptr: tl.tensor, first: tl.tensor, count: tl.tensor,
    kv_head: tl.tensor, num_heads: tl.tensor,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """out[H, D] of a KV head's queries: items [first, first + count) weighted by their log-sum-exp. None is empty."""
    heads = tl.arange(0, HEADS)
    real = heads < GROUP
    heads += kv_head * GROUP
    dims = tl.arange(0, HEAD_DIM)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, HEAD_DIM], tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        part_rows = (first + part)[:, None] * num_heads + heads[None, :]
        there = (part < count)[:, None] & real[None, :]
        # Past L1, which may hold what lay there before other SMs wrote.
        lse = tl.load(lse_ptr + part_rows, mask=there, other=float("-inf"), cache_modifier=".cg")
        lse = tl.where(real[None, :], lse, 0.0)  # heads that are none would be NaN
        offsets = part_rows[:, :, None] * HEAD_DIM + dims[None, None, :]
        values = tl.load(parts_ptr + offsets, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(lse, 0))
        weights = tl.exp2(lse - new_top[None, :])
        alpha = tl.exp2(top - new_top)
        total = total * alpha + tl.sum(weights, 0)
        acc = acc * alpha[:, None] + tl.sum(values * weights[:, :, None], 0)
        top = new_top
    acc = acc / total[:, None]
    tl.store(out_ptr + heads[:, None] * HEAD_DIM + dims, acc.to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit(
    do_not_specialize=["q_row_heads", "table_row_blocks"],
    do_not_specialize_on_alignment=["tables_ptr"],
)
def _planned_kernel(
    out_ptr: tl.tensor, parts_ptr: tl.tensor, lse_ptr: tl.tensor, arrived_ptr: tl.tensor,
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, tables_ptr: tl.tensor, items_ptr: tl.tensor,
    q_row_heads: tl.tensor, table_row_blocks: tl.tensor, scale_log2: tl.tensor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (K, M). One KV head's share of an item: to out[row], or to parts[item] until all of the row are there."""
    kv_head, item, num_items = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    num_heads = tl.num_programs(0) * GROUP
    k_ptr += kv_head * HEAD_STRIDE
    v_ptr += kv_head * HEAD_STRIDE
    if PDL:
        gdc_launch_dependents()
    row = tl.load(items_ptr + ROW * num_items + item)
    first = tl.load(items_ptr + FIRST * num_items + item)
    count = tl.load(items_ptr + COUNT * num_items + item)
    begin = tl.load(items_ptr + BEGIN * num_items + item)
    end = tl.load(items_ptr + END * num_items + item)
    table_ptr = tables_ptr + row.to(tl.int64) * table_row_blocks
    if PDL:
        fetch_ahead(k_ptr, v_ptr, table_ptr, begin, end, HEAD_DIM, PAGE, BLOCK_STRIDE, TOKEN_STRIDE)
        gdc_wait()
    if row < 0:
        return
    heads = tl.arange(0, ROWS)
    real = heads < GROUP
    heads += kv_head * GROUP
    dims = tl.arange(0, HEAD_DIM)
    q_ptrs = q_ptr + (row.to(tl.int64) * q_row_heads + heads[:, None]) * HEAD_DIM + dims
    q = tl.load(q_ptrs, mask=real[:, None], other=0.0)
    acc, lse = attend_range(
        q, k_ptr, v_ptr, table_ptr, begin, end, scale_log2, ROWS, HEAD_DIM, PAGE, BLOCK_STRIDE, TOKEN_STRIDE, TILE
    )  # fmt: skip
    out_row_ptr = out_ptr + row.to(tl.int64) * num_heads * HEAD_DIM
    if count == 1:
        tl.store(out_row_ptr + heads[:, None] * HEAD_DIM + dims, acc.to(out_ptr.dtype.element_ty), mask=real[:, None])
    else:
        part_rows = item * num_heads + heads
        tl.store(parts_ptr + part_rows[:, None] * HEAD_DIM + dims, acc, mask=real[:, None])
        tl.store(lse_ptr + part_rows, lse, mask=real)
        # All of this program's stores, then its count; and the last one's count, then its loads.
        tl.debug_barrier()
        num_before = tl.atomic_add(arrived_ptr + row * tl.num_programs(0) + kv_head, 1, sem="acq_rel", scope="gpu")
        if num_before == count - 1:
            _join_parts(
                out_row_ptr, parts_ptr, lse_ptr, first, count, kv_head, num_heads, GROUP, HEADS, HEAD_DIM, PARTS
            )  # fmt: skip
            tl.store(arrived_ptr + row * tl.num_programs(0) + kv_head, 0)  # for the next layer


def paged_decode_planned(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    plan: DecodePlan,
    *,
    pdl: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_decode` of the lengths that `plan` was made for. Queues one kernel.

    q, k_pages, v_pages, block_tables, out: as there. pdl: programmatic dependent launch (None: where even batches are
    split); tables and plan are then read ahead of the wait, so the kernels queued just before must not be writing them.
    Two calls with one plan must not run at the same time. Returns [B, H, D].
    """
    num_rows, num_heads, head_dim = q.shape
    page_tokens, num_kv_heads = k_pages.shape[1:3]
    check_pages(q, k_pages, v_pages)
    assert block_tables.dtype == torch.int32 and len(block_tables) == num_rows, f"{block_tables.shape}"
    assert block_tables.shape[1] == 1 or block_tables.stride(1) == 1, f"strides {block_tables.stride()}"
    assert plan.arrived.shape == (num_rows, num_kv_heads), f"a plan of {tuple(plan.arrived.shape)} for q {q.shape}"
    num_items = plan.items.shape[1]
    out = output_like(q, out)
    parts = torch.empty(num_items, num_heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_items, num_heads, dtype=torch.float32, device=q.device)
    group = num_heads // num_kv_heads
    heads = triton.next_power_of_2(group)
    early = has_pdl(q.device) and plan.even_splits > 1 if pdl is None else pdl
    with torch.cuda.device_of(q):
        _planned_kernel[(num_kv_heads, num_items)](
            out,
            parts,
            lse,
            plan.arrived,
            q,
            k_pages,
            v_pages,
            block_tables,
            plan.items,
            row_heads(q),
            block_tables.stride(0),
            score_scale_log2(head_dim),
            GROUP=group,
            ROWS=max(MIN_DOT_ROWS, heads),
            HEADS=heads,
            HEAD_DIM=head_dim,
            PAGE=page_tokens,
            BLOCK_STRIDE=k_pages.stride(0),
            TOKEN_STRIDE=k_pages.stride(1),
            HEAD_STRIDE=k_pages.stride(2),
            TILE=plan.tiles.tile_tokens,
            PARTS=max(1, JOINED_HEADS // heads),
            PDL=early,
            num_warps=plan.tiles.num_warps,
            num_stages=plan.tiles.num_stages,
            launch_pdl=early,
        )
    return out
