"""Products of 1 to 8 rows with a weight matrix, where reading the weights is all the time (Triton).

Each program owns a few rows of the weight and reads them once, whole. Sums over K are in float32 and in a fixed
order: the same input gives the same bits. The residual sum and norm ahead of a product and the SiLU product behind
it can be part of it; every program then normalises the few rows of x again, out of L1 or L2.

Programmatic dependent launch (CUDA Programming Guide, section of that name; compute capability 9.0): a program
starts while the kernel before it still runs, asks for its first weights, and only then waits for that kernel's
end. Every other load and every store is behind the wait, which returns when all that was queued before has been
done and can be seen. The weights are read ahead of it: the kernels queued just before must not be writing them.
Letters in names: M rows, N weight rows (outputs), K columns, I the MLP's intermediate size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.launch import LINE_BITS, fetch_to_l2, has_pdl
from nanovllm.kernels.paged_decode import count_sms
from nanovllm.kernels.rms_norm import add_rms_norm_reference
from nanovllm.kernels.silu_mul import silu_mul_reference

MAX_ROWS = 8  # the tensor cores' smallest second operand
VECTOR_BITS = tl.constexpr(8 * 16)  # the widest load of one thread
MOST_PDL_BYTES = 32 << 20  # of a weight: reading ahead for a larger one took the memory from the kernel before it
NORM_ELEMENTS_PER_THREAD = 32  # of x and of the residual, at once in registers while the norm's sums are formed


class SkinnyTiles(NamedTuple):
    """How one program walks over its weight rows: in steps of `split_k` neighbouring tiles [block_n, block_k].

    block_n: weight rows, of gate and up together. num_stages: 1 keeps the next step's weights in registers, the
    first step's from before the wait on; from 2 on, num_stages - 1 steps are on their way to shared memory, and
    only their fetch into L2 precedes the wait. dot: tensor cores, the tiles of a step spread over the warps and
    summed last; otherwise plain multiply-adds, for M = 1 only.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    split_k: int = 1
    dot: bool = False


@triton.jit
def _widen(weights: tl.tensor) -> tl.tensor:
    """float32, exactly. One instruction a bfloat16, where the compiler's own conversion takes two."""
    if weights.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=&r,=&r,r", [weights], tl.float32, True, pack=2
        )
    else:
        return weights.to(tl.float32)


@triton.jit
def _line_starts(start: tl.constexpr, LENGTH: tl.constexpr, K: tl.constexpr, LINE: tl.constexpr) -> tl.tensor:
    """Columns from `start` on, one for each line of L2; 0 for those beyond a row's end."""
    column = start + tl.arange(0, (LENGTH + LINE - 1) // LINE) * LINE
    return tl.where(column < K, column, 0)


@triton.jit
def _load_stream(x_ptr: tl.tensor, residual_ptr: tl.tensor, offset: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """x + residual at `offset`, rounded to x's dtype: the norm sees the rounded sum."""
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _norm_scales(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    residual_out_ptr: tl.tensor,
    num_rows: tl.tensor,
    EPS: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """float32 [ROWS]: 1 / RMS of each row of the stream. One program each also writes the row."""
    rows = tl.arange(0, ROWS)
    mine = rows % tl.num_programs(0) == tl.program_id(0)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, K, BLOCK, num_stages=1):
        k = start + tl.arange(0, BLOCK)
        inside = (rows < num_rows)[:, None] & (k < K)
        offset = rows[:, None] * K + k
        stream = _load_stream(x_ptr, residual_ptr, offset, inside)
        if residual_ptr is not None:
            tl.store(residual_out_ptr + offset, stream, mask=inside & mine[:, None])
        stream = stream.to(tl.float32)
        squares += stream * stream
    return tl.rsqrt(tl.sum(squares, axis=1) / K + EPS)


@triton.jit
def _silu_mul(products: tl.tensor, dtype: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """[PAIRS, ROWS] of products [2 · PAIRS, ROWS], gate and up in turn; rounded where the unfused chain rounds."""
    gate, up = tl.split(tl.permute(tl.reshape(products, [PAIRS, 2, ROWS]), (0, 2, 1)))
    gate = gate.to(dtype).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return activated * up.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_kernel(
    out_ptr: tl.tensor,
    residual_out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    num_rows: tl.tensor,
    EPS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (N / BLOCK_N). Tensors of a step are [SPLIT, BLOCK_N or ROWS, BLOCK_K]; a split is a piece of K."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    VECTOR: tl.constexpr = VECTOR_BITS // dtype.primitive_bitwidth
    LINE: tl.constexpr = LINE_BITS // dtype.primitive_bitwidth
    STEP: tl.constexpr = SPLIT * BLOCK_K
    LANES: tl.constexpr = ROWS if DOT else BLOCK_K // VECTOR
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < N
    if GATED:  # a gate row, its up row, the next gate row, …
        n = n // 2 + n % 2 * (N // 2)
    row_ptrs = weight_ptr + n.to(tl.int64) * K
    k = tl.arange(0, SPLIT)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)
    w_ptrs = row_ptrs[None, :, None] + k
    inside_w = inside_n[None, :, None]
    rows = tl.arange(0, ROWS)
    inside_x = (rows < num_rows)[None, :, None]
    row_offset = rows[None, :, None] * K

    if PDL:
        gdc_launch_dependents()
    if STAGES == 1:
        w = tl.load(w_ptrs, mask=inside_w & (k < K), other=0.0, eviction_policy="evict_first")
    if PDL:
        if STAGES > 1:
            first_ptrs = tl.where(inside_n, row_ptrs, weight_ptr)[:, None]
            for start in tl.static_range(0, (STAGES - 1) * STEP, STEP):
                fetch_to_l2(first_ptrs + _line_starts(start, STEP, K, LINE))
        if norm_weight_ptr is not None:
            fetch_to_l2(norm_weight_ptr + _line_starts(0, NORM_BLOCK, K, LINE))
        gdc_wait()
    if norm_weight_ptr is not None:
        scales = _norm_scales(x_ptr, residual_ptr, residual_out_ptr, num_rows, EPS, K, ROWS, NORM_BLOCK)

    acc = tl.zeros([SPLIT, BLOCK_N, LANES], tl.float32)
    for start in tl.range(0, K, STEP, num_stages=STAGES):
        if STAGES == 1:
            inside = inside_w & (start + STEP + k < K)
            ahead = tl.load(w_ptrs + (start + STEP), mask=inside, other=0.0, eviction_policy="evict_first")
        else:
            inside = inside_w & (start + k < K)
            w = tl.load(w_ptrs + start, mask=inside, other=0.0, eviction_policy="evict_first")
        inside = inside_x & (start + k < K)
        if norm_weight_ptr is None:
            x = tl.load(x_ptr + row_offset + (start + k), mask=inside, other=0.0)
        else:
            stream = _load_stream(x_ptr, residual_ptr, row_offset + (start + k), inside).to(tl.float32)
            norm_weight = tl.load(norm_weight_ptr + (start + k), mask=start + k < K, other=0.0).to(tl.float32)
            normed = (stream * scales[None, :, None]).to(dtype).to(tl.float32)  # as trained: cast, then weight
            x = (normed * norm_weight).to(dtype)
        if DOT:
            acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="tf32x3")
        else:
            products = tl.reshape(_widen(w) * x.to(tl.float32), [SPLIT, BLOCK_N, LANES, VECTOR])
            acc += tl.sum(products, axis=3)  # each thread over its own columns: threads are summed once, below
        if STAGES == 1:
            w = ahead

    y = tl.sum(acc, axis=0)
    if not DOT:
        y = tl.sum(y, axis=1)[:, None]
    if GATED:
        y = _silu_mul(y, dtype, BLOCK_N // 2, ROWS)
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    WIDTH: tl.constexpr = N // 2 if GATED else N
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside_out = (column < WIDTH)[:, None] & (rows < num_rows)[None, :]
    tl.store(out_ptr + rows[None, :] * WIDTH + column[:, None], y.to(out_ptr.dtype.element_ty), mask=inside_out)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    *,
    num_sms: int | None = None,
    tiles: SkinnyTiles | None = None,
    pdl: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x Wᵀ, [M, N], of x [M, K] with 1 ≤ M ≤ 8 and weight W [N, K], K a multiple of 16. Queues one kernel.

    x, weight: contiguous, one dtype: bfloat16, float16 or float32. num_sms: SMs this may run on (None: the whole
    card); tiles: None for the fixed choice. pdl: programmatic dependent launch (None: where the card has it and W is
    small); the result is the same, but W must not be written by the kernels queued just before. out: [M, N],
    contiguous, x's dtype or float32 (then not rounded), or None to allocate one of x's dtype.
    """
    return _launch(x, None, None, 0.0, weight, False, num_sms, tiles, pdl, out, None)[0]


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    *,
    num_sms: int | None = None,
    tiles: SkinnyTiles | None = None,
    pdl: bool | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, times Wᵀ, [M, N]; x + residual [M, K]) in one kernel, rounded as the chain rounds.

    residual: [M, K], or None ahead of the first layer: then x itself is returned as the new one. norm_weight: [K].
    residual_out: [M, K], neither x nor `residual`, which other programs still read; None allocates.
    The rest as in `skinny_linear`.
    """
    return _launch(x, residual, norm_weight, eps, weight, False, num_sms, tiles, pdl, out, residual_out)


def norm_gate_up(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    gate_up_weight: Tensor,
    *,
    num_sms: int | None = None,
    tiles: SkinnyTiles | None = None,
    pdl: bool | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm_linear` with silu(gate) · up behind it: (act [M, I], new residual). gate_up_weight: [2 · I, K]."""
    return _launch(x, residual, norm_weight, eps, gate_up_weight, True, num_sms, tiles, pdl, out, residual_out)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    gated: bool,
    num_sms: int | None,
    tiles: SkinnyTiles | None,
    pdl: bool | None,
    out: Tensor | None,
    residual_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (M, K), N = x.shape, weight.shape[0]
    width = N // 2 if gated else N
    _check_inputs(x, residual, norm_weight, weight)
    tiles = tiles or choose_tiles(M, N, K, x.dtype, num_sms or count_sms(x.device))
    assert tiles.dot or M == 1, f"{M} rows need tiles with dot"
    assert not gated or (N % 2 == 0 and tiles.block_n % 2 == 0), f"gate and up in {N} rows by {tiles.block_n}"
    out = x.new_empty(M, width) if out is None else out
    assert out.shape == (M, width) and out.is_contiguous() and out.dtype in (x.dtype, torch.float32)
    new_residual = _new_residual(x, residual, residual_out)
    pdl = weight.nbytes <= MOST_PDL_BYTES and has_pdl(x.device) if pdl is None else pdl
    rows = triton.next_power_of_2(M)
    with torch.cuda.device_of(x):
        _skinny_kernel[(triton.cdiv(N, tiles.block_n),)](
            out,
            None if residual is None else new_residual,
            x,
            residual,
            norm_weight,
            weight,
            M,
            EPS=eps,
            N=N,
            K=K,
            GATED=gated,
            ROWS=rows,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            SPLIT=tiles.split_k,
            NORM_BLOCK=min(triton.next_power_of_2(K), NORM_ELEMENTS_PER_THREAD * 32 * tiles.num_warps // rows),
            STAGES=tiles.num_stages,
            DOT=tiles.dot,
            PDL=pdl,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            launch_pdl=pdl,
        )
    return out, new_residual


def _check_inputs(x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, weight: Tensor) -> None:
    M, K = x.shape
    assert 1 <= M <= MAX_ROWS, f"{M} rows, at most {MAX_ROWS}"
    assert K % 16 == 0 and weight.shape[1] == K, f"x {x.shape}, weight {weight.shape}: K in steps of 16"
    assert residual is None or residual.shape == x.shape, f"{residual.shape} is not {x.shape}"
    assert norm_weight is None or norm_weight.shape == (K,), f"norm weight {norm_weight.shape} for {K}"
    for tensor in (x, residual, norm_weight, weight):
        assert tensor is None or (tensor.is_contiguous() and tensor.dtype == x.dtype), f"{tensor.dtype}, {x.dtype}"


def _new_residual(x: Tensor, residual: Tensor | None, residual_out: Tensor | None) -> Tensor:
    """Where the sum goes, which is nowhere that any program reads."""
    if residual is None:
        assert residual_out is None, "without a residual, x is the new one"
        return x
    new = torch.empty_like(x) if residual_out is None else residual_out
    assert new.shape == x.shape and new.is_contiguous() and new.dtype == x.dtype
    if new.device.type != "meta":
        assert new.data_ptr() not in (x.data_ptr(), residual.data_ptr()), "the sum may not overwrite its inputs"
    return new


def should_fuse(M: int) -> bool:
    """Whether a product of M rows is faster with the norm in it: its programs each compute the norm anew.

    The widest product of one layer of Qwen3-8B: with 1 row 52 µs fused and 54 apart, with 8 rows 75 and 59.
    """
    return M == 1


def choose_tiles(M: int, N: int, K: int, dtype: torch.dtype, num_sms: int) -> SkinnyTiles:
    """The fixed configuration table: M rows of K columns by N weight rows on `num_sms` SMs.

    The aim is 32 to 100 KiB on their way to each SM, and two programs an SM or more; the sizes are those that
    `tools/bench_skinny.py --sweep` found fastest on an H200.
    """
    whole_row, shrink = triton.next_power_of_2(K), dtype.itemsize // 2  # of a tile, so that it holds the same bytes
    if N >= 16 * num_sms and whole_row <= 1024:  # all of a short row in one step, ahead of the wait
        return SkinnyTiles(16, max(16, whole_row // 4 // shrink**2), num_warps=4, split_k=4, dot=True)
    if M == 1:
        return _choose_plain_tiles(N, K, num_sms, shrink)
    return _choose_dot_tiles(N, K, num_sms, shrink**2)  # a float32 product takes three, and their registers


def _choose_plain_tiles(N: int, K: int, num_sms: int, shrink: int) -> SkinnyTiles:
    """16 KiB of weights a load."""
    if N >= 40 * num_sms:
        block_k = min(1024, triton.next_power_of_2(K))
        return SkinnyTiles(block_n=8 // shrink, block_k=block_k, num_warps=4)
    block_k = min(4096, triton.next_power_of_2(K))  # few weight rows: programs of few, long ones
    return SkinnyTiles(block_n=4, block_k=block_k // shrink, num_warps=8 if block_k > 2048 else 4)


def _choose_dot_tiles(N: int, K: int, num_sms: int, shrink: int) -> SkinnyTiles:
    """A short row in one step, all of it ahead of the wait; long ones in a pipeline to shared memory."""
    whole_row = triton.next_power_of_2(K)
    if N < 16 * num_sms and whole_row <= 2048:
        return SkinnyTiles(8, max(16, whole_row // 8 // shrink), num_warps=8, split_k=8, dot=True)
    if N < 16 * num_sms:
        return SkinnyTiles(16, 128 // shrink, num_warps=8, num_stages=4, split_k=8, dot=True)
    return SkinnyTiles(32, 128 // shrink, num_warps=4, num_stages=4, split_k=4, dot=True)


def skinny_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """`skinny_linear` in plain torch, on any device: float64 inputs in float64, others with float32 sums."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return linear(x.to(wide), weight.to(wide)).to(x.dtype)


def norm_linear_reference(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """`norm_linear` as the chain of references that it replaces."""
    normed, residual = add_rms_norm_reference(x, residual, norm_weight, eps)
    return skinny_linear_reference(normed, weight), residual


def norm_gate_up_reference(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, gate_up_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """`norm_gate_up` as the chain of references that it replaces."""
    gate_up, residual = norm_linear_reference(x, residual, norm_weight, eps, gate_up_weight)
    return silu_mul_reference(gate_up), residual
