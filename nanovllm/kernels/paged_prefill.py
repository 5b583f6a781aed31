"""Prefill over paged KV: a chunk's KV written to its slots, and its queries attended to their whole context.

One program attends a tile of query rows to the context before and inside its chunk, a tile of KV tokens a step:
FlashAttention-2 (Dao 2023), with the G query heads of a KV head packed into the rows, so that they share its
loads and a tile of rows spans few tokens of the causal diagonal.
Letters in names: T query tokens, S sequences, H query heads, K KV heads, G = H / K, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.paged_decode import (
    check_pages,
    check_tables,
    gather_pages,
    load_blocks,
    output_like,
    page_offsets,
    row_heads,
    score_scale_log2,
)
from nanovllm.kernels.paged_prefill_hopper import paged_prefill_tma, pages_fit_boxes

FEW_ROWS = 64  # up to here (query tokens · G) a chunk gets the small tile


class PrefillTiles(NamedTuple):
    """rows: query rows (token, head) of a program. tile_tokens: KV tokens of one loop step."""

    rows: int
    tile_tokens: int
    num_warps: int
    num_stages: int


@triton.jit
def _attend(
    acc: tl.tensor,
    total: tl.tensor,
    top: tl.tensor,
    q: tl.tensor,
    positions: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scale_log2: tl.tensor,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over the tokens [begin, end), begin a multiple of TILE; end too unless MASKED."""
    dims = tl.arange(0, HEAD_DIM)
    blocks = load_blocks(table_ptr, begin, end, PAGE, TILE)  # one step ahead, as in decode
    for start in range(begin, end, TILE):
        offsets = page_offsets(blocks, start, PAGE, BLOCK_STRIDE, TOKEN_STRIDE, TILE)[:, None] + dims
        blocks = load_blocks(table_ptr, start + TILE, end, PAGE, TILE)
        tokens = start + tl.arange(0, TILE)
        if MASKED:
            inside = (tokens < end)[:, None]
            k = tl.load(k_ptr + offsets, mask=inside, other=0.0)
            v = tl.load(v_ptr + offsets, mask=inside, other=0.0)  # zeroed: 0 · NaN would be NaN
        else:
            k = tl.load(k_ptr + offsets)
            v = tl.load(v_ptr + offsets)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        if MASKED:
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_top[:, None])
        alpha = tl.exp2(top - new_top)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="tf32x3")
        top = new_top
    return acc, total, top


@triton.jit(
    do_not_specialize=["q_row_heads", "table_row_blocks"],
    do_not_specialize_on_alignment=["tables_ptr", "cu_seqlens_q_ptr", "context_lens_ptr"],
)
def _prefill_kernel(
    out_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
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
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
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
    cached = tl.load(context_lens_ptr + sequence) - num_rows // GROUP  # tokens before this chunk
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_row_blocks
    rows = tile * ROWS + tl.arange(0, ROWS)
    real = (rows < num_rows)[:, None]
    positions = cached + rows // GROUP
    dims = tl.arange(0, HEAD_DIM)
    heads = kv_head * GROUP + rows % GROUP
    queries = (first_query + rows // GROUP).to(tl.int64)
    q = tl.load(q_ptr + (queries * q_row_heads + heads)[:, None] * HEAD_DIM + dims, mask=real, other=0.0)
    k_ptr += kv_head * HEAD_STRIDE
    v_ptr += kv_head * HEAD_STRIDE

    first_position = cached + tile * ROWS // GROUP
    last_row = tl.minimum((tile + 1) * ROWS, num_rows) - 1
    end = cached + last_row // GROUP + 1
    seen_by_all = (first_position + 1) // TILE * TILE
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    acc, total, top = _attend(
        acc, total, top, q, positions, k_ptr, v_ptr, table_ptr, 0, seen_by_all, scale_log2,
        False, HEAD_DIM, PAGE, BLOCK_STRIDE, TOKEN_STRIDE, TILE,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, positions, k_ptr, v_ptr, table_ptr, seen_by_all, end, scale_log2,
        True, HEAD_DIM, PAGE, BLOCK_STRIDE, TOKEN_STRIDE, TILE,
    )  # fmt: skip

    out_rows = queries * (tl.num_programs(1) * GROUP) + heads
    acc = acc / total[:, None]
    tl.store(out_ptr + out_rows[:, None] * HEAD_DIM + dims, acc.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit(
    do_not_specialize=["k_row_heads", "v_row_heads"],
    do_not_specialize_on_alignment=["slot_mapping_ptr"],
)
def _store_kv_kernel(
    k_pages_ptr: tl.tensor,
    v_pages_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    k_row_heads: tl.tensor,
    v_row_heads: tl.tensor,
    ELEMENTS: tl.constexpr,
    PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
) -> None:
    """Grid (T): one program copies the ELEMENTS = K · D of one token's keys and values."""
    token = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, PADDED)
    inside = element < ELEMENTS
    k = tl.load(k_ptr + token * k_row_heads * HEAD_DIM + element, mask=inside)
    v = tl.load(v_ptr + token * v_row_heads * HEAD_DIM + element, mask=inside)
    slot = tl.load(slot_mapping_ptr + token)
    place = slot // PAGE * BLOCK_STRIDE + slot % PAGE * TOKEN_STRIDE  # int64, as the slot is
    place += element // HEAD_DIM * HEAD_STRIDE + element % HEAD_DIM
    tl.store(k_pages_ptr + place, k, mask=inside)
    tl.store(v_pages_ptr + place, v, mask=inside)


def paged_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_query_tokens: int,
    *,
    num_sms: int | None = None,
    tiles: PrefillTiles | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend every query to its sequence's context up to its own token. Queues one kernel.

    For given shapes of the model and its pages two variants exist, of chunks above and up to FEW_ROWS rows. On Hopper
    the former is `paged_prefill_tma`, where `pages_fit_boxes` (8B heads, 8x2048: 446 TFLOP/s, 403 without).

    q: [T, H, D], float16, bfloat16 or float32, heads contiguous, tokens any multiple of D elements apart.
    k_pages, v_pages: [blocks, page_tokens, K, D], q's dtype, same strides, last dim contiguous, page_tokens and
    D powers of two from 16 up. block_tables: int32 [S, columns], valid ids wherever the context reaches.
    cu_seqlens_q: int32 [S + 1], where each sequence's queries begin in q. context_lens: int32 [S], tokens in the
    cache including this chunk, at least its query tokens. max_query_tokens: a host bound of a sequence's queries.
    num_sms: no effect: the programs are small enough to spread over any partition. tiles: None for the fixed
    choice; given, they are of the kernel in this file. out: contiguous, q's shape and dtype, or None to allocate.
    Returns [T, H, D].
    """
    head_dim, page_tokens, num_kv_heads = q.shape[2], *k_pages.shape[1:3]
    check_pages(q, k_pages, v_pages)
    check_tables(block_tables, context_lens)
    group = q.shape[1] // num_kv_heads
    if tiles is None and takes_tma(q, k_pages, max_query_tokens * group):
        metadata = block_tables, cu_seqlens_q, context_lens, max_query_tokens
        return paged_prefill_tma(q, k_pages, v_pages, *metadata, num_sms=num_sms, out=out)
    tiles = tiles or choose_prefill_tiles(q.dtype, max_query_tokens * group, is_hopper(q.device))
    out = output_like(q, out)
    num_tiles = triton.cdiv(max_query_tokens * group, tiles.rows)
    with torch.cuda.device_of(q):
        _prefill_kernel[(num_tiles, num_kv_heads, context_lens.shape[0])](
            out,
            q,
            k_pages,
            v_pages,
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
            BLOCK_STRIDE=k_pages.stride(0),
            TOKEN_STRIDE=k_pages.stride(1),
            HEAD_STRIDE=k_pages.stride(2),
            TILE=tiles.tile_tokens,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out


def choose_prefill_tiles(dtype: torch.dtype, num_rows: int, hopper: bool) -> PrefillTiles:
    """The fixed configuration table, by the rows (query tokens · G) of the longest chunk.

    Hopper's tensor cores read their operands from shared memory; elsewhere both operands pass through registers,
    which spill with larger tiles. What is not for Hopper fits 99 KiB of shared memory.
    """
    if dtype == torch.float32:  # for tests: three products for each, so that no bits are lost
        return PrefillTiles(rows=16, tile_tokens=32, num_warps=4, num_stages=2)
    tile_tokens = 64 if hopper else 32
    if num_rows <= FEW_ROWS:
        return PrefillTiles(FEW_ROWS, tile_tokens, num_warps=4, num_stages=3)
    return PrefillTiles(128, tile_tokens, num_warps=8, num_stages=3)


def takes_tma(q: Tensor, k_pages: Tensor, num_rows: int) -> bool:
    """Whether the rows (query tokens · G) of the longest chunk go to `paged_prefill_tma`."""
    return num_rows > FEW_ROWS and is_hopper(q.device) and pages_fit_boxes(k_pages)


def is_hopper(device: torch.device) -> bool:
    """Compute capability 9.x."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def store_kv(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    *,
    num_sms: int | None = None,
) -> None:
    """Write each token's keys and values to its slot. Queues one kernel.

    k, v: [T, K, D], heads contiguous, tokens any multiple of D elements apart; the pages' dtype. k_pages,
    v_pages: [blocks, page_tokens, K, D], same strides, last dim contiguous. slot_mapping: int64 [T],
    block · page_tokens + offset; tokens may share a slot only where nobody reads it. num_sms: no effect.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    check_pages(k, k_pages, v_pages)
    assert v.shape == k.shape and v.dtype == k.dtype and slot_mapping.dtype == torch.int64
    elements = num_kv_heads * head_dim
    with torch.cuda.device_of(k):
        _store_kv_kernel[(num_tokens,)](
            k_pages,
            v_pages,
            k,
            v,
            slot_mapping,
            row_heads(k),
            row_heads(v),
            ELEMENTS=elements,
            PADDED=triton.next_power_of_2(elements),
            HEAD_DIM=head_dim,
            PAGE=k_pages.shape[1],
            BLOCK_STRIDE=k_pages.stride(0),
            TOKEN_STRIDE=k_pages.stride(1),
            HEAD_STRIDE=k_pages.stride(2),
            num_warps=2,
        )


def paged_prefill_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
) -> Tensor:
    """What `paged_prefill` computes, in float64 and plain torch, one sequence at a time. Syncs."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // k_pages.shape[2]
    starts = cu_seqlens_q.tolist()
    for sequence, context in enumerate(context_lens.tolist()):
        own = slice(starts[sequence], starts[sequence + 1])
        num_queries = own.stop - own.start
        k = gather_pages(k_pages, block_tables[sequence], context).repeat_interleave(group, 1)
        v = gather_pages(v_pages, block_tables[sequence], context).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,chd->hqc", q[own].double(), k) * q.shape[-1] ** -0.5
        seen = torch.ones(num_queries, context, dtype=torch.bool, device=q.device).tril(context - num_queries)
        out[own] = torch.einsum("hqc,chd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
    return out


def store_kv_reference(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
    """What `store_kv` does, in plain torch."""
    block, offset = slot_mapping // k_pages.shape[1], slot_mapping % k_pages.shape[1]
    k_pages[block, offset] = k
    v_pages[block, offset] = v
