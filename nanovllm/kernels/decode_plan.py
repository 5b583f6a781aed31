"""Which tokens of which row each program of decode attention reads, worked out on the card once a step, for all layers.

`paged_decode` divides every row into as many splits, a number that the host takes from the batch alone: one long
context among short ones is then read by few programs while the rest of the card idles. Here the lengths decide. An
item is a part of a row, to be read by a program for each KV head. Rows of up to a limit are one item, longer ones
equal parts below it. Where a batch as large with even contexts is split, the limit is such a split; else an even share
of the card, but at least twice the mean [`count_pieces`]. So even batches are divided as `paged_decode` divides them,
in whole rows or in its splits. The number of parts is bounded
whatever the lengths, so that a captured launch has room for them: parts beyond the rows are fewer than `num_pieces`,
since a row of c tokens has fewer than c / limit beyond its first, and the limit is at least tokens / num_pieces.

Letters in names: B rows, K KV heads, M items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.paged_decode import (
    MIN_SPLIT_TOKENS,
    PROGRAMS_PER_SM,
    DecodeTiles,
    choose_decode_tiles,
    choose_num_splits,
    count_sms,
)

MIN_PLANNED_ROWS = 5  # fewer rows have so many splits each that the longest alone occupies much of the card
MIN_PART_TOKENS = 512  # of rows that a batch with even contexts would not split: shorter ones are soon read
NUM_COLUMNS = 5
ROW, FIRST, COUNT, BEGIN, END = (tl.constexpr(column) for column in range(NUM_COLUMNS))
PLANNED_ROWS = tl.constexpr(256)  # contexts that a program looks at at once
NO_ROW = tl.constexpr(-1)


class DecodePlan(NamedTuple):
    """Of one step, on the card.

    items: int32 [5, M], by rows as they are begun: the row, the first item of that row, the number of its items, and
    tokens [begin, end) of the row's context, begin a multiple of `tiles.tile_tokens`. A row without context has one
    item, which is empty; items past the last one have row -1. arrived: int32 [B, K], zeros: what programs that share a
    row count themselves by, left as it was found. even_splits: items of each row where all are equally long.
    """

    items: Tensor
    arrived: Tensor
    tiles: DecodeTiles
    even_splits: int


@triton.jit(
    do_not_specialize=["num_rows", "num_pieces", "min_tokens", "tile_tokens"],
    do_not_specialize_on_alignment=["context_lens_ptr", "row_order_ptr"],
)
def _plan_kernel(
    items_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    row_order_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_pieces: tl.tensor,
    min_tokens: tl.tensor,
    tile_tokens: tl.tensor,
    K: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """Grid (M). One item, and the counts of one row."""
    item, num_items = tl.program_id(0), tl.num_programs(0)
    total = 0
    for start in range(0, num_rows, PLANNED_ROWS):
        rows = start + tl.arange(0, PLANNED_ROWS)
        total += tl.sum(tl.load(context_lens_ptr + rows, mask=rows < num_rows, other=0), 0)
    limit = tl.maximum(tl.cdiv(total, num_pieces), min_tokens)
    limit = tl.cdiv(limit, tile_tokens) * tile_tokens

    row, first, count, begin, end, before = NO_ROW, 0, 0, 0, 0, 0
    for start in range(0, num_rows, PLANNED_ROWS):
        places = start + tl.arange(0, PLANNED_ROWS)
        there = places < num_rows
        rows = places if row_order_ptr is None else tl.load(row_order_ptr + places, mask=there, other=0)
        context = tl.load(context_lens_ptr + rows, mask=there, other=0)
        # Equal parts, in whole tiles; with those there may be one fewer, so that none is empty.
        tokens = tl.cdiv(context, tl.maximum(tl.cdiv(context, limit), 1))
        tokens = tl.maximum(tl.cdiv(tokens, tile_tokens), 1) * tile_tokens
        parts = tl.where(there, tl.maximum(tl.cdiv(context, tokens), 1), 0)
        firsts = before + tl.cumsum(parts, 0) - parts
        mine = (firsts <= item) & (item < firsts + parts)  # of one place in all, or of none
        row = tl.maximum(row, tl.max(tl.where(mine, rows, NO_ROW), 0))
        first = tl.maximum(first, tl.max(tl.where(mine, firsts, 0), 0))
        count = tl.maximum(count, tl.max(tl.where(mine, parts, 0), 0))
        begins = (item - firsts) * tokens
        begin = tl.maximum(begin, tl.max(tl.where(mine, begins, 0), 0))
        end = tl.maximum(end, tl.max(tl.where(mine, tl.minimum(begins + tokens, context), 0), 0))
        before += tl.sum(parts, 0)

    tl.store(items_ptr + ROW * num_items + item, row)
    tl.store(items_ptr + FIRST * num_items + item, first)
    tl.store(items_ptr + COUNT * num_items + item, count)
    tl.store(items_ptr + BEGIN * num_items + item, begin)
    tl.store(items_ptr + END * num_items + item, end)
    heads = tl.arange(0, HEADS)
    tl.store(arrived_ptr + item * K + heads, tl.zeros([HEADS], tl.int32), mask=(heads < K) & (item < num_rows))


def plan_decode(
    context_lens: Tensor,
    row_order: Tensor | None,
    max_context_tokens: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    num_sms: int | None = None,
    num_splits: int | None = None,
) -> DecodePlan:
    """Queues one kernel. What it plans is right until the lengths change, one attention after the other.

    context_lens, row_order: int32 [B], contiguous; max_context_tokens, num_sms and num_splits (of a row of an even
    batch), dtype and head_dim: as for `paged_decode`.
    """
    (num_rows,) = context_lens.shape
    assert context_lens.dtype == torch.int32 and context_lens.is_contiguous(), f"{context_lens.dtype}"
    num_sms = num_sms or count_sms(context_lens.device)
    num_programs = num_rows * num_kv_heads
    num_splits = num_splits or choose_num_splits(num_programs, max_context_tokens, num_sms)
    tiles = choose_decode_tiles(dtype, head_dim, num_programs / num_sms, num_splits)
    num_pieces = count_pieces(num_rows, num_splits, num_kv_heads, num_sms)
    num_items = count_items(num_rows, num_pieces)
    items = torch.empty(NUM_COLUMNS, num_items, dtype=torch.int32, device=context_lens.device)
    arrived = torch.empty(num_rows, num_kv_heads, dtype=torch.int32, device=context_lens.device)
    with torch.cuda.device_of(context_lens):
        _plan_kernel[(num_items,)](
            items,
            arrived,
            context_lens,
            row_order,
            num_rows,
            num_pieces,
            min_part_tokens(num_splits),
            tiles.tile_tokens,
            K=num_kv_heads,
            HEADS=triton.next_power_of_2(num_kv_heads),
            num_warps=4,
        )
    return DecodePlan(items, arrived, tiles, num_splits)


def count_pieces(num_rows: int, num_splits: int, num_kv_heads: int, num_sms: int) -> int:
    """Equal pieces of all tokens of which one may be a row's limit.

    Where even batches are split, their splits. Else as many as fill the card: a row of fewer tokens, begun first, is
    read before the others are, if each program gets its even share of the memory. But twice the mean stays whole in
    any case: 24x1024 took 29 µs whole and 32 in halves, and where programs are few, each gets more than on a full card.
    """
    if num_splits > 1:
        return num_rows * num_splits
    return max(1, min(num_rows // 2, num_sms * PROGRAMS_PER_SM // num_kv_heads))


def count_items(num_rows: int, num_pieces: int) -> int:
    """M, enough for any lengths: parts beyond the rows are fewer than `num_pieces`."""
    return num_rows + num_pieces - 1


def min_part_tokens(num_splits: int) -> int:
    """Of a row in parts, where an even batch has so many splits."""
    return MIN_SPLIT_TOKENS if num_splits > 1 else MIN_PART_TOKENS


def plan_reference(
    contexts: list[int], order: list[int], num_pieces: int, min_tokens: int, tile_tokens: int
) -> list[tuple[int, int, int, int, int]]:
    """The items of `plan_decode` in plain Python, without those of no row: (row, first, count, begin, end)."""
    limit = _whole_tiles(max(-(-sum(contexts) // num_pieces), min_tokens), tile_tokens)
    items: list[tuple[int, int, int, int, int]] = []
    for row in order:
        context, first = contexts[row], len(items)
        num_parts = max(1, -(-context // limit))
        tokens = _whole_tiles(max(1, -(-context // num_parts)), tile_tokens)
        begins = range(0, max(context, 1), tokens)
        items += [(row, first, len(begins), begin, min(begin + tokens, context)) for begin in begins]
    return items


def _whole_tiles(tokens: int, tile_tokens: int) -> int:
    return -(-tokens // tile_tokens) * tile_tokens
