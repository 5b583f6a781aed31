"""The tiles of all rows of a decode batch in equal shares: which are whose, and rows that were cut put together again.

In the manner of stream-K (Osama et al. 2023) and Lean Attention (Sanovar et al. 2024): each share is a run of
consecutive tiles, so that at most its first row and its last are shared with others. What it computes of a row that
lies within it is the row's result; of one that does not, a part, normalised, with its log-sum-exp (Flash-Decoding, Dao
et al. 2023). Nothing here depends on the host's knowledge of lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nanovllm.kernels.launch import wait_for_predecessor

TILE = gl.constexpr(64)  # tokens
PLANNED_ROWS = gl.constexpr(256)  # contexts that a program sums up at once
COMBINED_PARTS = 16


class Share(NamedTuple):
    """Scalars on the card: tiles [begin, end), counted over all rows; of all rows the tiles, and the shares in use; the
    row of tile `begin`, and which of that row's tiles it is."""

    begin: gl.tensor
    end: gl.tensor
    total: gl.tensor
    used: gl.tensor
    row: gl.tensor
    in_row: gl.tensor


@gluon.jit
def count_tiles(context: gl.tensor) -> gl.tensor:
    """A row without context counts as a tile: its zeros have to be written."""
    return gl.maximum(gl.cdiv(context, TILE), 1)


@gluon.jit
def share_of(tile: gl.tensor, total: gl.tensor, num_shares: gl.tensor) -> gl.tensor:
    """The share that holds a tile, if share s begins at s · total // num_shares."""
    return ((tile + 1) * num_shares - 1) // total


@gluon.jit
def _add(a: gl.tensor, b: gl.tensor) -> gl.tensor:
    return a + b


@gluon.jit
def _load_tiles(context_lens_ptr: gl.tensor, rows: gl.tensor, num_rows: gl.tensor) -> gl.tensor:
    context = gl.load(context_lens_ptr + rows, mask=rows < num_rows, other=0)
    return gl.where(rows < num_rows, count_tiles(context), 0)


@gluon.jit
def find_share(
    context_lens_ptr: gl.tensor, num_rows: gl.tensor, share: gl.tensor, num_shares: gl.tensor, min_tiles: gl.tensor
) -> Share:
    """Equal shares, to within a tile, of `min_tiles` or more. Those past the used ones are empty."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    total = gl.to_tensor(0)
    for first in range(0, num_rows, PLANNED_ROWS):
        rows = first + gl.arange(0, PLANNED_ROWS, LAYOUT)
        total += gl.sum(_load_tiles(context_lens_ptr, rows, num_rows), 0)
    used = gl.minimum(num_shares, gl.cdiv(total, min_tiles))
    begin = (gl.minimum(share, used).to(gl.int64) * total // used).to(gl.int32)
    end = (gl.minimum(share + 1, used).to(gl.int64) * total // used).to(gl.int32)
    row, row_begin, before = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for first in range(0, num_rows, PLANNED_ROWS):
        rows = first + gl.arange(0, PLANNED_ROWS, LAYOUT)
        ends = before + gl.associative_scan(_load_tiles(context_lens_ptr, rows, num_rows), 0, _add)
        passed = (ends <= begin) & (rows < num_rows)
        row += gl.sum(passed.to(gl.int32), 0)
        row_begin = gl.maximum(row_begin, gl.max(gl.where(passed, ends, 0), 0))
        before = gl.max(ends, 0)
    return Share(begin, end, total, used, gl.minimum(row, num_rows - 1), begin - row_begin)


class Parts(NamedTuple):
    """Of S shares, on the card. values, lse: float32 [2 S, H, D] and [2 S, H], at 2 s the part of a row that began
    before share s, at 2 s + 1 that of one that begins in it and goes on. cuts: int32 [S, 2], of the latter the row and
    the number of its parts, or (_, 0)."""

    values: Tensor
    lse: Tensor
    cuts: Tensor


def make_parts(num_shares: int, q: Tensor) -> Parts:
    """For queries q [B, H, D]; uninitialised."""
    values = torch.empty(num_shares * 2, *q.shape[1:], dtype=torch.float32, device=q.device)
    lse = torch.empty(values.shape[:2], dtype=torch.float32, device=q.device)
    return Parts(values, lse, torch.empty(num_shares, 2, dtype=torch.int32, device=q.device))


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


def join_parts(out: Tensor, parts: Parts, *, pdl: bool) -> None:
    """Write the rows that were cut to `out` [B, H, D], contiguous; the others stay. pdl: programmatic dependent launch.
    One kernel, on the current stream of the current device."""
    num_shares, num_heads = len(parts.cuts), out.shape[1]
    _join_kernel[(num_heads, num_shares)](
        out, *parts, HEAD_DIM=out.shape[2], PARTS=COMBINED_PARTS, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
