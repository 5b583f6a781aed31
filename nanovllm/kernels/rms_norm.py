"""Residual addition and RMSNorm in one pass (Triton). RMSNorm: Zhang and Sennrich, 2019, arXiv:1910.07467.

Letters in names: T rows (tokens), N elements a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.launch import has_pdl, wait_for_predecessor
from nanovllm.kernels.partial_sums import count_splits, load_product


@triton.jit
def _add_rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    residual_out_ptr: tl.tensor,
    EPS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program a row; it has read its whole row before it writes any of it."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < N
    offset = tl.program_id(0).to(tl.int64) * N + column
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    x = load_product(x_ptr + offset, inside, tl.num_programs(0).to(tl.int64) * N, dtype, SPLITS)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(dtype)  # the stream lives in the model's dtype: the norm sees the rounded sum
        tl.store(residual_out_ptr + offset, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / N + EPS)
    normed = (x * scale).to(dtype).to(tl.float32) * weight  # as trained: the cast comes before the weight
    tl.store(out_ptr + offset, normed.to(dtype), mask=inside)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    num_sms: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual), both [T, N], rounded as `add_rms_norm_reference` rounds.

    x: [T, N], contiguous; bfloat16, float16 or float32, and so is every other tensor; or the partial sums of such
    a product, float32 [S, T, N] (see above). residual: [T, N], contiguous, or None ahead of the first layer:
    then x itself, which is whole there, is returned as the new residual. weight: [N]. out: [T, N], may be x.
    residual_out: [T, N]; None writes the sum **over `residual`**, which saves a buffer.
    num_sms: no effect; the card spreads one small program a row over whatever partition the stream has.
    """
    (T, N), splits = x.shape[-2:], count_splits(x)
    assert x.is_contiguous() and weight.shape == (N,) and weight.is_contiguous()
    assert residual is None or (residual.shape == (T, N) and residual.is_contiguous())
    out = weight.new_empty(T, N) if out is None else out
    assert out.shape == (T, N) and out.is_contiguous()
    if residual is None:
        assert splits == 1, "partial sums are no stream"
        residual_out = x
    elif residual_out is None:
        residual_out = residual
    assert residual_out.shape == (T, N) and residual_out.is_contiguous()
    block, pdl = triton.next_power_of_2(N), has_pdl(x.device)
    with torch.cuda.device_of(x):
        _add_rms_norm_kernel[(T,)](
            x,
            residual,
            weight,
            out,
            None if residual is None else residual_out,
            EPS=eps,
            N=N,
            BLOCK=block,
            SPLITS=splits,
            PDL=pdl,
            num_warps=_num_warps(block * x.element_size()),
            launch_pdl=pdl,
        )
    return out, residual_out


def _num_warps(row_bytes: int) -> int:
    """Two 16-byte loads of each input, or each of its partial sums, in flight a thread."""
    return min(16, max(1, row_bytes // 1024))


def add_rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch, on any device, out of place; float64 inputs are computed in float64."""
    residual = x if residual is None else x + residual
    return rms_norm_reference(residual, weight, eps), residual


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., N] by weight [N]: statistics in float32, cast to x's dtype before the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight
