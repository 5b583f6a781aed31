"""SwiGLU's element-wise half, silu(gate) · up, in one pass (Triton). Shazeer, 2020, arXiv:2002.05202.

Letters in names: T rows (tokens), I the MLP's intermediate size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from nanovllm.kernels.launch import has_pdl, wait_for_predecessor
from nanovllm.kernels.partial_sums import count_splits, load_product


@triton.jit
def silu_times(gate: tl.tensor, up: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """silu(gate) · up, all float32, with silu rounded to `dtype`: the product is rounded by whoever stores it."""
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return activated * up


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    INTERMEDIATE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_ROW: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
    sm_ids_ptr: tl.tensor | None = None,
) -> None:
    """One program a block of one row."""
    wait_for_predecessor(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0)
    row = (program // BLOCKS_PER_ROW).to(tl.int64)
    column = (program % BLOCKS_PER_ROW) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INTERMEDIATE
    gate_ptr = gate_up_ptr + row * (2 * INTERMEDIATE) + column
    size = (tl.num_programs(0) // BLOCKS_PER_ROW).to(tl.int64) * (2 * INTERMEDIATE)
    gate = load_product(gate_ptr, inside, size, dtype, SPLITS)
    up = load_product(gate_ptr + INTERMEDIATE, inside, size, dtype, SPLITS)
    tl.store(out_ptr + row * INTERMEDIATE + column, silu_times(gate, up, dtype).to(dtype), mask=inside)
    if sm_ids_ptr is not None:
        sm_id = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], tl.int32, is_pure=False, pack=1)
        tl.store(sm_ids_ptr + program, sm_id)


def silu_mul(
    gate_up: Tensor, *, out: Tensor | None = None, num_sms: int | None = None, sm_ids: Tensor | None = None
) -> Tensor:
    """silu(gate) · up, [T, I], of gate_up [T, 2·I] whose rows hold gate, then up.

    silu is computed in float32 and rounded to the tensors' dtype, then the product is rounded again: the two
    roundings of `silu_mul_reference`. gate_up: contiguous; bfloat16, float16 or float32; or its partial sums,
    float32 [S, T, 2·I] (see `rms_norm`), whose total is rounded to out's dtype first: `out` must be given then.
    out: [T, I]. num_sms: no effect; the card spreads the small programs over whatever partition the stream has.
    sm_ids: int32 [T, blocks of a row], contiguous: takes the number of the SM that each program ran on.
    """
    T, width = gate_up.shape[-2:]
    intermediate, splits = width // 2, count_splits(gate_up)
    assert gate_up.is_contiguous() and width == 2 * intermediate
    assert splits == 1 or out is not None, "partial sums do not say what dtype they are of"
    out = gate_up.new_empty(T, intermediate) if out is None else out
    assert out.shape == (T, intermediate) and out.is_contiguous()
    block, num_warps = _block_and_warps(intermediate)
    blocks_per_row, pdl = triton.cdiv(intermediate, block), has_pdl(gate_up.device)
    assert sm_ids is None or (sm_ids.shape == (T, blocks_per_row) and sm_ids.is_contiguous())
    with torch.cuda.device_of(gate_up):
        _silu_mul_kernel[(T * blocks_per_row,)](
            gate_up,
            out,
            INTERMEDIATE=intermediate,
            BLOCK=block,
            BLOCKS_PER_ROW=blocks_per_row,
            SPLITS=splits,
            PDL=pdl,
            sm_ids_ptr=sm_ids,
            num_warps=num_warps,
            launch_pdl=pdl,
        )
    return out


def _block_and_warps(intermediate: int) -> tuple[int, int]:
    """1024 elements, 8 a thread: every Qwen3 width is a multiple of 512, and one row fills several SMs."""
    return min(1024, triton.next_power_of_2(intermediate)), 4


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_mul` in plain torch, on any device: torch rounds silu(gate) to its dtype before the product."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up
