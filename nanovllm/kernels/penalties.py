"""Repetition, frequency and presence penalties, and ids banned at first, from one table of what each slot has seen
(Triton).

The table, int32 [S + 1, V], is that of nanovllm/layers/seen_tokens.py. Its last row is the null slot's, where a graph's
padding rows point; it is never counted or read. Nor is a row read whose sampling is neutral: only a slot whose request
has penalties or `min_tokens` must be `reset_`.

Letters in names: B rows, V vocabulary, S slots, T any number of ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.layers import seen_tokens
from nanovllm.layers.seen_tokens import BANNED, IN_PROMPT

COUNT_MASK = tl.constexpr(seen_tokens.COUNT_MASK)
IN_PROMPT_BIT, BANNED_BIT = tl.constexpr(IN_PROMPT), tl.constexpr(BANNED)
SLICE_IDS = 4096  # of one program


@triton.jit(do_not_specialize=["null_slot"])
def _penalise_kernel(
    logits_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    table_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    min_tokens_ptr: tl.tensor,
    position_ptr: tl.tensor,
    null_slot: tl.tensor,
    VOCAB: tl.constexpr,
    FLOAT_STRIDE: tl.constexpr,
    INTEGER_STRIDE: tl.constexpr,
    SLICE: tl.constexpr,
) -> None:
    """Grid (slices, B). Launched without contraction to FMA: the same roundings as the plain sampler."""
    part, b = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + b)
    presence = tl.load(presence_ptr + row * FLOAT_STRIDE)
    frequency = tl.load(frequency_ptr + row * FLOAT_STRIDE)
    repetition = tl.load(repetition_ptr + row * FLOAT_STRIDE)
    early = tl.load(position_ptr + row * INTEGER_STRIDE) < tl.load(min_tokens_ptr + row * INTEGER_STRIDE)
    if (row != null_slot) & (early | (presence != 0) | (frequency != 0) | (repetition != 1)):
        ids = part * SLICE + tl.arange(0, SLICE)
        inside = ids < VOCAB
        pointers = logits_ptr + b.to(tl.int64) * VOCAB + ids
        logits = tl.load(pointers, mask=inside, other=0.0)
        seen = tl.load(table_ptr + row * VOCAB + ids, mask=inside, other=0)
        logits = tl.where(early & ((seen & BANNED_BIT) != 0), float("-inf"), logits)
        count = seen & COUNT_MASK
        # CTRL's penalty (Keskar et al. 2019), with vLLM's rule for negative logits: multiply.
        factor = tl.where((seen & (COUNT_MASK | IN_PROMPT_BIT)) != 0, repetition, 1.0)
        logits = tl.where(logits > 0, tl.div_rn(logits, factor), logits * factor)
        logits -= frequency * count.to(tl.float32)
        logits -= tl.where(count > 0, presence, 0.0)
        tl.store(pointers, logits, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "null_slot"])
def _count_kernel(
    table_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    token_ptr: tl.tensor,
    num_rows: tl.tensor,
    null_slot: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (blocks of B). Only the null slot may occur twice: no other row needs an atomic."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + b, mask=b < num_rows, other=0)
    counts = (b < num_rows) & (row != null_slot)
    pointers = table_ptr + row * VOCAB + tl.load(token_ptr + b, mask=counts, other=0)
    tl.store(pointers, tl.load(pointers, mask=counts, other=0) + 1, mask=counts)


def apply_penalties_(
    logits: Tensor,
    rows: Tensor,
    table: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
    min_tokens: Tensor,
    position: Tensor,
    *,
    num_sms: int | None = None,
) -> None:
    """Penalise `logits`, float32 [B, V], in place: banned ids, then repetition, frequency, presence, with the roundings
    of `nanovllm.layers.sampler.sample`.

    rows: int64 [B]: row b's state is entry rows[b] of table, of presence, frequency, repetition (float32 [S + 1], views
    of one stride; 0, 0 and 1 are off) and of min_tokens, position (int64 [S + 1], views of one stride). A row with all
    off and position >= min_tokens is neutral: neither its logits nor its table are read. num_sms: no effect.
    """
    num_rows, vocab_size = logits.shape
    floats, integers = [presence, frequency, repetition], [min_tokens, position]
    assert logits.dtype == torch.float32 and logits.is_contiguous() and rows.dtype == torch.int64
    assert table.dtype == torch.int32 and table.is_contiguous() and table.shape[1] == vocab_size
    for tensors, dtype in [(floats, torch.float32), (integers, torch.int64)]:
        assert all(t.dtype == dtype and t.stride() == tensors[0].stride() for t in tensors)
    with torch.cuda.device_of(logits):
        _penalise_kernel[(triton.cdiv(vocab_size, SLICE_IDS), num_rows)](
            logits,
            rows,
            table,
            *floats,
            *integers,
            table.shape[0] - 1,
            VOCAB=vocab_size,
            FLOAT_STRIDE=presence.stride(0),
            INTEGER_STRIDE=position.stride(0),
            SLICE=SLICE_IDS,
            num_warps=8,
            enable_fp_fusion=False,
        )


def count_(table: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Count one generated id per row: token_ids int64 [B], each below V, in rows int64 [B] of the table. Rows are
    distinct, but for the null slot's, which are left alone. Stale tables of neutral rows count on: `reset_` clears
    them."""
    (num_rows,) = rows.shape
    assert rows.dtype == token_ids.dtype == torch.int64 and table.dtype == torch.int32 and table.is_contiguous()
    assert token_ids.shape == rows.shape and rows.is_contiguous() and token_ids.is_contiguous()
    with torch.cuda.device_of(table):
        _count_kernel[(triton.cdiv(num_rows, 128),)](
            table, rows, token_ids, num_rows, table.shape[0] - 1, VOCAB=table.shape[1], BLOCK=128, num_warps=4
        )
