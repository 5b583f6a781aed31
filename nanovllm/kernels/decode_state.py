"""The two ends of a decode step on the card (Triton): a row's inputs from its slot, and its slot one token further.

The state itself, and what these kernels do in plain torch: nanovllm/engine/slot_state.py.
Letters in names: B rows, S slots, N table columns, K end ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    tokens_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    mapping_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    order_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    integers_ptr: tl.tensor,
    slot_tables_ptr: tl.tensor,
    num_rows: tl.tensor,
    NULL_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    ALIVE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Grid (B). Columns 0 and 1 of the state are the last token and the tokens in the KV cache."""
    b = tl.program_id(0)
    slot = tl.load(slots_ptr + b)
    token = tl.load(integers_ptr + slot * STRIDE)
    position = tl.load(integers_ptr + slot * STRIDE + 1)
    alive = tl.load(integers_ptr + slot * STRIDE + ALIVE) != 0
    block = tl.load(slot_tables_ptr + slot * COLUMNS + position // BLOCK_SIZE)
    block = tl.where(alive, block, NULL_BLOCK)
    tl.store(tokens_ptr + b, token)
    tl.store(positions_ptr + b, position)
    tl.store(context_lens_ptr + b, tl.where(alive, position + 1, 0).to(tl.int32))
    tl.store(mapping_ptr + b, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE)
    # This row's place when the longest contexts come first: how many rows come before it.
    other = tl.arange(0, ROWS)
    other_ptr = integers_ptr + tl.load(slots_ptr + other, mask=other < num_rows, other=0) * STRIDE
    longer = tl.load(other_ptr + 1, mask=other < num_rows, other=-1)
    longer = tl.where(tl.load(other_ptr + ALIVE, mask=other < num_rows, other=0) != 0, longer, -1)
    mine = tl.where(alive, position, -1)
    before = (other < num_rows) & ((longer > mine) | ((longer == mine) & (other < b)))
    tl.store(order_ptr + tl.sum(before.to(tl.int32), 0), b)
    for start in range(0, COLUMNS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        entries = tl.load(slot_tables_ptr + slot * COLUMNS + columns, mask=columns < COLUMNS)
        tl.store(tables_ptr + b.to(tl.int64) * COLUMNS + columns, entries, mask=columns < COLUMNS)


@triton.jit
def _advance_kernel(
    integers_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    token_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    end_ids_ptr: tl.tensor,
    VOCAB: tl.constexpr,
    NULL_SLOT: tl.constexpr,
    STRIDE: tl.constexpr,
    ALIVE: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    END_IDS: tl.constexpr,
) -> None:
    """Grid (B). Rows of the null slot change nothing, however many there are."""
    b = tl.program_id(0)
    slot = tl.load(slots_ptr + b)
    if slot != NULL_SLOT:
        row_ptr = integers_ptr + slot * STRIDE
        if tl.load(row_ptr + ALIVE) != 0:
            token = tl.load(token_ptr + b)
            drawn = tl.load(logits_ptr + b.to(tl.int64) * VOCAB + token) > float("-inf")  # false for NaN
            if drawn == 0:
                tl.store(token_ptr + b, -1)
            num_outputs = tl.load(row_ptr + 2) + 1
            end_ids = tl.load(end_ids_ptr + slot * END_IDS + tl.arange(0, END_IDS))
            ended = (tl.max((end_ids == token).to(tl.int32), 0) > 0) & (num_outputs >= tl.load(row_ptr + MIN_TOKENS))
            tl.store(row_ptr, token, mask=drawn)
            tl.store(row_ptr + 1, tl.load(row_ptr + 1) + 1)
            tl.store(row_ptr + 2, num_outputs)
            tl.store(row_ptr + ALIVE, tl.where(ended | (drawn == 0), 0, 1).to(tl.int64))


def gather_inputs(
    slots: Tensor, integers: Tensor, slot_tables: Tensor, block_size: int, null_block: int, alive: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(tokens, positions, context_lens, slot_mapping, block_tables, row_order) of a step's rows; queues one kernel.

    slots: int64 [B]. integers: int64 [S, columns]: last token, tokens in the KV cache, output position, …; `alive` is
    the column that is 0 once a sequence has ended: such a row gets context 0 and writes to the null block.
    slot_tables: int32 [S, N], contiguous. Returns int64 [B], int64 [B], int32 [B], int64 [B], int32 [B, N] and
    int32 [B]: the rows by falling context, for whoever wants to begin with the longest.
    """
    (num_rows,), columns = slots.shape, slot_tables.shape[1]
    assert slots.dtype == integers.dtype == torch.int64 and slot_tables.dtype == torch.int32
    assert slots.is_contiguous() and integers.is_contiguous() and slot_tables.is_contiguous()
    tokens, positions, mapping = torch.empty(3, num_rows, dtype=torch.int64, device=slots.device).unbind(0)
    context_lens = torch.empty(num_rows, dtype=torch.int32, device=slots.device)
    tables = torch.empty(num_rows, columns, dtype=torch.int32, device=slots.device)
    order = torch.empty_like(context_lens)
    with torch.cuda.device_of(slots):
        _gather_kernel[(num_rows,)](
            tokens,
            positions,
            context_lens,
            mapping,
            tables,
            order,
            slots,
            integers,
            slot_tables,
            num_rows,
            NULL_BLOCK=null_block,
            BLOCK_SIZE=block_size,
            STRIDE=integers.shape[1],
            ALIVE=alive,
            COLUMNS=columns,
            BLOCK=min(256, triton.next_power_of_2(columns)),
            ROWS=triton.next_power_of_2(num_rows),
            num_warps=min(16, max(1, triton.next_power_of_2(num_rows) // 512)),
        )
    return tokens, positions, context_lens, mapping, tables, order


def advance(
    slots: Tensor,
    token_ids: Tensor,
    logits: Tensor,
    integers: Tensor,
    end_ids: Tensor,
    null_slot: int,
    alive: int,
    min_tokens: int,
) -> None:
    """Give every living row its sampled token; a row whose token is one of its end ids is alive no more.

    slots, token_ids: int64 [B]; ids below V. logits: float32 [B, V], contiguous, what the ids were drawn from: a living
    row whose id's logit is NaN or -inf has drawn none; it gets NO_TOKEN in `token_ids` and is alive no more. integers:
    as in `gather_inputs`; `min_tokens`: the column before whose value no end id counts. end_ids: int64 [S, K], K a
    power of two, -1 where unused. Queues one kernel.
    """
    assert end_ids.dtype == torch.int64 and end_ids.is_contiguous() and token_ids.dtype == torch.int64
    assert logits.dtype == torch.float32 and logits.is_contiguous() and len(logits) == len(token_ids)
    with torch.cuda.device_of(slots):
        _advance_kernel[slots.shape](
            integers,
            slots,
            token_ids,
            logits,
            end_ids,
            VOCAB=logits.shape[1],
            NULL_SLOT=null_slot,
            STRIDE=integers.shape[1],
            ALIVE=alive,
            MIN_TOKENS=min_tokens,
            END_IDS=end_ids.shape[1],
            num_warps=1,
        )
