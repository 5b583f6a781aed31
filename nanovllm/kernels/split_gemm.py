"""Products of 2 to 128 rows with a weight matrix, where reading the weights is most of the time (Triton).

The weight's rows are the first operand of the tensor cores, whose instruction takes 64 of them on compute capability
9.0, and the few rows of x its second. A program owns a tile of weight rows and, where tiles are fewer than SMs, one of
several pieces of K: its sums are then partial, and whoever reads the product adds them up (`partial_sums`). Sums over
K are in float32 and in a fixed order: the same input gives the same bits, whatever the other rows of x hold.

Programmatic dependent launch as in `skinny_gemm`: a program asks for its first weights before it waits for the kernels
queued before, which must not be writing them. All else is behind the wait.
Letters in names: M rows, N weight rows (outputs), K columns, I the MLP's intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.launch import LINE_BITS, fetch_to_l2, has_pdl
from nanovllm.kernels.paged_decode import count_sms
from nanovllm.kernels.silu_mul import silu_mul, silu_mul_reference, silu_times

MIN_ROWS, MAX_ROWS = 2, 128  # one row is `skinny_gemm`'s
AHEAD_STEPS = tl.constexpr(2)  # fetched before the wait; all of a piece took the memory from the kernel before
ROW_LIMITS = (16, 32, 64, 96, 128)  # a choice of tiles holds up to so many rows


class SplitTiles(NamedTuple):
    """How the weight [N, K] is cut: into tiles of `block_n` rows, and each into `splits` pieces of K, in programs that
    walk `block_k` columns a step, `num_stages` steps in shared memory.
    """

    block_n: int
    block_k: int
    splits: int
    num_stages: int

    @property
    def num_warps(self) -> int:
        """A group of four warps for 64 weight rows, at most two groups."""
        return min(8, max(4, self.block_n // 16))


T, NOT_MEASURED = SplitTiles, (None,) * len(ROW_LIMITS)
# (N, K) → for each of ROW_LIMITS the fastest tiles, or None where cuBLAS is as fast, or was not compared: an H200,
# `tools/bench_split.py --sweep`.
# fmt: off
TILES: Mapping[tuple[int, int], tuple[SplitTiles | None, ...]] = {
    # 0.6B
    (4096, 1024): (T(64, 128, 2, 4), T(64, 128, 2, 4), T(64, 128, 2, 4), T(64, 64, 2, 4), T(64, 64, 2, 4)),
    (1024, 2048): (T(64, 128, 4, 4), T(64, 128, 4, 4), T(64, 128, 4, 4), T(64, 64, 4, 6), T(64, 64, 4, 4)),
    (6144, 1024): (T(64, 128, 2, 3), T(64, 128, 1, 4), T(64, 128, 1, 4), T(64, 64, 1, 6), T(64, 64, 1, 6)),
    (1024, 3072): (T(64, 128, 4, 4), T(64, 128, 4, 4), T(64, 128, 4, 4), T(64, 64, 8, 4), T(64, 64, 8, 4)),
    # 1.7B
    (4096, 2048): (T(64, 128, 2, 4), T(64, 128, 2, 4), T(64, 64, 2, 6), None, None),
    (2048, 2048): (T(64, 128, 4, 3), T(64, 128, 4, 4), T(64, 64, 4, 6), None, None),
    (12288, 2048): (T(64, 64, 1, 6), T(64, 64, 1, 6), T(64, 64, 1, 6), None, None),
    (2048, 6144): (T(64, 128, 4, 4), T(64, 128, 4, 4), T(64, 128, 4, 4), None, None),
    # 4B
    (6144, 2560): (T(64, 64, 4, 6), T(64, 128, 1, 4), T(64, 128, 1, 4), None, None),
    (2560, 4096): (T(64, 128, 3, 4), T(64, 128, 3, 4), T(64, 64, 3, 6), None, None),
    (19456, 2560): (T(64, 64, 1, 4), T(64, 64, 1, 4), T(64, 64, 1, 4), None, None),
    (2560, 9728): (T(64, 128, 6, 4), T(64, 128, 3, 4), T(64, 128, 3, 4), None, None),
    # 8B
    (6144, 4096): (T(64, 128, 2, 4), T(64, 128, 2, 4), T(64, 128, 2, 3), None, None),
    (4096, 4096): (T(64, 128, 4, 4), T(64, 128, 4, 4), T(64, 128, 4, 3), T(128, 64, 4, 4), T(128, 64, 4, 4)),
    (24576, 4096): (T(64, 128, 1, 3), T(64, 128, 1, 3), T(64, 64, 1, 4), None, None),
    (4096, 12288): (T(64, 128, 4, 4), T(128, 128, 4, 3), T(64, 128, 2, 4), T(128, 64, 4, 4), None),
    # 14B
    (7168, 5120): (T(64, 128, 2, 4), T(64, 128, 1, 4), T(64, 128, 1, 4), None, None),
    (5120, 5120): (T(64, 128, 3, 4), None, None, None, None),
    (5120, 17408): (T(64, 128, 3, 4), T(128, 128, 3, 3), T(128, 128, 3, 3), None, None),
}
# fmt: on


@triton.jit(do_not_specialize=["num_rows"])
def _split_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    num_rows: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (N / BLOCK_N, K / PIECE); PIECE is a multiple of BLOCK_K.

    GATED: of every 16 rows of a tile, 8 are rows of gate and 8 the same rows of up. The tensor cores leave rows i and
    i + 8 of their result in one thread, which multiplies them.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    LINE: tl.constexpr = LINE_BITS // dtype.primitive_bitwidth
    WHOLE_N: tl.constexpr = N % BLOCK_N == 0
    WHOLE_K: tl.constexpr = K % PIECE == 0
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    WIDTH: tl.constexpr = N // 2 if GATED else N
    begin = tl.program_id(1) * PIECE
    n = tl.program_id(0) * OUTPUTS
    if GATED:
        i = tl.arange(0, BLOCK_N)
        n += i // 16 * 8 + i % 8
        inside_n = n < WIDTH
        n += i // 8 % 2 * WIDTH
    else:
        n += tl.arange(0, BLOCK_N)
        inside_n = n < WIDTH
    if not WHOLE_N:
        n = tl.where(inside_n, n, 0)  # computed, and not stored
    row_ptrs = weight_ptr + (n.to(tl.int64) * K + begin)

    if PDL:
        gdc_launch_dependents()
        line = tl.arange(0, (AHEAD_STEPS * BLOCK_K + LINE - 1) // LINE) * LINE
        fetch_to_l2(row_ptrs[:, None] + tl.where((line < PIECE) & (begin + line < K), line, 0))
        gdc_wait()

    rows = tl.arange(0, ROWS)
    inside_x = (rows < num_rows)[:, None]
    k = tl.arange(0, BLOCK_K)
    w_ptrs = row_ptrs[:, None] + k
    x_ptrs = x_ptr + (rows * K + begin)[:, None] + k
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in tl.range(0, PIECE, BLOCK_K, num_stages=STAGES):
        if WHOLE_K:
            w = tl.load(w_ptrs + start)
            x = tl.load(x_ptrs + start, mask=inside_x, other=0.0)
        else:
            inside_k = (begin + start + k < K)[None, :]
            w = tl.load(w_ptrs + start, mask=inside_k, other=0.0)
            x = tl.load(x_ptrs + start, mask=inside_x & inside_k, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="tf32x3")

    if GATED:
        pairs = tl.permute(tl.reshape(acc, [BLOCK_N // 16, 2, 8, ROWS]), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        acc = tl.reshape(silu_times(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype), [OUTPUTS, ROWS])
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside_out = (rows < num_rows)[None, :]
    if not WHOLE_N:
        inside_out &= (column < WIDTH)[:, None]
    out_ptr += tl.program_id(1).to(tl.int64) * num_rows * WIDTH
    tl.store(out_ptr + rows[None, :] * WIDTH + column[:, None], acc.to(out_ptr.dtype.element_ty), mask=inside_out)


def split_linear(
    x: Tensor,
    weight: Tensor,
    *,
    num_sms: int | None = None,
    tiles: SplitTiles | None = None,
    pdl: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x Wᵀ of x [M, K] with 1 ≤ M ≤ 128 and weight W [N, K], N and K multiples of 16. Queues one kernel.

    Returns [M, N] in x's dtype or, where the tiles have more than one split, partial sums, float32 [splits, M, N].
    x, weight: contiguous, one dtype: bfloat16, float16 or float32. num_sms: SMs this may run on (None: the whole
    card); tiles: None for the fixed choice. pdl: programmatic dependent launch (None: where the card has it); the
    result is the same, but W must not be written by the kernels queued just before. out: what is returned,
    contiguous, or None to allocate it.
    """
    tiles = tiles or choose_split_tiles(len(x), len(weight), x.shape[1], x.dtype, num_sms or count_sms(x.device))
    shape = (len(x), len(weight)) if tiles.splits == 1 else (tiles.splits, len(x), len(weight))
    out = x.new_empty(shape, dtype=x.dtype if tiles.splits == 1 else torch.float32) if out is None else out
    assert out.shape == shape and out.dtype == (x.dtype if tiles.splits == 1 else torch.float32)
    _launch(x, weight, False, tiles, pdl, out)
    return out


def split_gate_up(
    x: Tensor,
    gate_up_weight: Tensor,
    *,
    num_sms: int | None = None,
    tiles: SplitTiles | None = None,
    pdl: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """silu(gate) · up, [M, I], of the product x Wᵀ = [gate, up]; W [2 · I, K], I a multiple of 8. One kernel without
    splits, two with. The rest as in `split_linear`; out: [M, I] in x's dtype.
    """
    tiles = tiles or choose_split_tiles(
        len(x), len(gate_up_weight), x.shape[1], x.dtype, num_sms or count_sms(x.device)
    )
    shape = len(x), len(gate_up_weight) // 2
    out = x.new_empty(shape) if out is None else out
    assert out.shape == shape and out.dtype == x.dtype
    if tiles.splits > 1:
        return silu_mul(split_linear(x, gate_up_weight, tiles=tiles, pdl=pdl), out=out)
    _launch(x, gate_up_weight, True, tiles, pdl, out)
    return out


def _launch(x: Tensor, weight: Tensor, gated: bool, tiles: SplitTiles, pdl: bool | None, out: Tensor) -> None:
    (M, K), N = x.shape, weight.shape[0]
    assert 1 <= M <= MAX_ROWS, f"{M} rows, at most {MAX_ROWS}"
    assert N % 16 == 0 and K % 16 == 0 and weight.shape[1] == K, f"x {x.shape}, weight {weight.shape}: in steps of 16"
    assert x.is_contiguous() and weight.is_contiguous() and out.is_contiguous() and x.dtype == weight.dtype
    pdl = has_pdl(x.device) if pdl is None else pdl
    piece = triton.cdiv(triton.cdiv(K, tiles.block_k), tiles.splits) * tiles.block_k
    assert (tiles.splits - 1) * piece < K, f"{tiles.splits} splits of {K} columns by {tiles.block_k}"
    with torch.cuda.device_of(x):
        _split_kernel[(triton.cdiv(N, tiles.block_n), tiles.splits)](
            out,
            x,
            weight,
            M,
            N=N,
            K=K,
            GATED=gated,
            ROWS=max(16, triton.next_power_of_2(M)),
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            PIECE=piece,
            STAGES=tiles.num_stages,
            PDL=pdl,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            launch_pdl=pdl,
        )


# -- which tiles, and whether


def choose_split_tiles(M: int, N: int, K: int, dtype: torch.dtype, num_sms: int) -> SplitTiles:
    """The fixed choice for M rows of K columns by N weight rows on `num_sms` SMs: from `TILES`, else by rule.

    The rule is the shape of that table: 16 KiB of weights a step, and less than two programs an SM; no piece is empty.
    """
    return _measured(M, N, K, dtype) or _by_rule(M, N, K, dtype.itemsize, num_sms)


def should_split(x: Tensor, weight: Tensor) -> bool:
    """Whether x Wᵀ is to be computed here rather than by cuBLAS: where it was measured to be faster."""
    return _measured(len(x), len(weight), x.shape[1], x.dtype) is not None


def _measured(M: int, N: int, K: int, dtype: torch.dtype) -> SplitTiles | None:
    if dtype.itemsize != 2 or not MIN_ROWS <= M <= MAX_ROWS:
        return None
    return next(tiles for limit, tiles in zip(ROW_LIMITS, TILES.get((N, K), NOT_MEASURED), strict=True) if M <= limit)


def _by_rule(M: int, N: int, K: int, itemsize: int, num_sms: int) -> SplitTiles:
    block_n, block_k = 64, (256 if M <= 64 else 128) // itemsize
    steps = triton.cdiv(K, block_k)
    splits = max(1, min(4, steps // 2, num_sms * 7 // 4 // triton.cdiv(N, block_n)))
    return SplitTiles(block_n, block_k, triton.cdiv(steps, triton.cdiv(steps, splits)), num_stages=4)


def split_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """`split_linear` in plain torch, whole: float64 inputs in float64, others with float32 sums."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return linear(x.to(wide), weight.to(wide)).to(x.dtype)


def split_gate_up_reference(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """`split_gate_up` as the chain of references that it replaces."""
    return silu_mul_reference(split_linear_reference(x, gate_up_weight))
