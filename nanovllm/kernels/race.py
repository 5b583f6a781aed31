"""Drawing a token id from each row of logits, without a softmax, in one pass (Triton).

The draw is the exponential race of nanovllm/layers/sampler.py (Gumbel-max): the winner of p / E, E independent standard
exponentials made by a counter-based hash of (seed, position, id), is distributed as p. Logs are not needed to find
the winner of a slice: exp(x) / E is compared, x relative to the slice's maximum; slices are compared in logs.
Letters in names: B rows, V vocabulary, C slices of a row, S slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SLICE_IDS = 4096  # of one program: several programs per SM even for one row of Qwen3's 151,936 ids
LARGEST = tl.constexpr(3.4028234663852886e38)  # finite float32


@triton.jit
def lowbias32(x: tl.tensor) -> tl.tensor:
    """The integer hash of that name by Chris Wellons (hash-prospector, 2018), uint32 to uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def race_keys(seed: tl.tensor, position: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The two key words of a row, as `row_keys` of the plain sampler gives them. seed: int64, position: int64."""
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    position = (position & 0xFFFFFFFF).to(tl.uint32)
    first = lowbias32(lowbias32(lowbias32(low ^ 0x9E3779B9) ^ high) ^ position)
    second = lowbias32(lowbias32(lowbias32(low ^ 0x243F6A88) ^ high) ^ position)
    return first, second


@triton.jit
def uniform(ids: tl.tensor, first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """Uniforms in (0, 1), float32, of the ids of a row with these keys: the plain sampler's bits."""
    r = (lowbias32(ids.to(tl.uint32)) ^ first) * 0x7FEB352D
    r = (r ^ (r >> 15) ^ second) * 0x846CA68B
    return ((r >> 1).to(tl.float32) + 0.5) * (4.656612873077393e-10 * (1 - 5.9604644775390625e-08))


@triton.jit
def exponential_of(u: tl.tensor) -> tl.tensor:
    """Standard exponentials, float32, of uniforms: the plain sampler's to a few ulp.

    -log(1 - u), with Kahan's correction for the rounding of 1 - u: the race is won by the smallest.
    """
    rest = 1.0 - u
    return tl.where(rest == 1.0, u, -tl.log(rest) * (u / (1.0 - rest + (rest == 1.0))))


@triton.jit
def exponential(ids: tl.tensor, first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """Standard exponentials, float32, of the ids of a row with these keys."""
    return exponential_of(uniform(ids, first, second))


@triton.jit(do_not_specialize=["num_slices"])
def _race_kernel(
    value_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    id_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    position_ptr: tl.tensor,
    num_slices: tl.tensor,
    VOCAB: tl.constexpr,
    FLOAT_STRIDE: tl.constexpr,
    INTEGER_STRIDE: tl.constexpr,
    RANDOM: tl.constexpr,
    SLICE: tl.constexpr,
) -> None:
    """Grid (C, B). The winner of one slice of a row: its id, its value, and what the value is relative to."""
    part, b = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + b)
    ids = part * SLICE + tl.arange(0, SLICE)
    inside = ids < VOCAB
    x = tl.load(logits_ptr + b.to(tl.int64) * VOCAB + ids, mask=inside, other=float("-inf"))
    best, winner, shift = tl.max(x, 0), tl.argmax(x, 0), tl.full([], 0.0, tl.float32)
    if RANDOM:
        temperature = tl.load(temperature_ptr + row * FLOAT_STRIDE)
        if temperature > 0:
            # Clamped: rows of -inf and infinite logits must not make a NaN, as in the plain sampler.
            shift = tl.minimum(tl.maximum(best, -LARGEST), LARGEST)
            seed, position = tl.load(seed_ptr + row * INTEGER_STRIDE), tl.load(position_ptr + row * INTEGER_STRIDE)
            first, second = race_keys(seed, position)
            p = tl.where(inside, tl.exp(tl.minimum(x - shift, 0.0) * (1.0 / temperature)), -1.0)
            u = uniform(ids, first, second)
            # E >= u, and nearly equal where it is small, as a winner's is: p / u bounds p / E, so the logarithm is
            # needed for the one of the largest bound, and for all only if another bound is above its value.
            bound = p / u
            winner = tl.argmax(bound, 0)
            won = ids == part * SLICE + winner
            best = tl.sum(tl.where(won, p, 0.0), 0) / exponential_of(tl.sum(tl.where(won, u, 0.0), 0))
            if tl.max(tl.where(won, -1.0, bound), 0) >= best:
                value = p / exponential_of(u)
                best, winner = tl.max(value, 0), tl.argmax(value, 0)
    out = b * num_slices + part
    tl.store(value_ptr + out, best)
    tl.store(shift_ptr + out, shift)
    tl.store(id_ptr + out, part * SLICE + winner)


@triton.jit(do_not_specialize=["num_slices"])
def _finish_kernel(
    token_ptr: tl.tensor,
    value_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    id_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    num_slices: tl.tensor,
    FLOAT_STRIDE: tl.constexpr,
    SLICES: tl.constexpr,
) -> None:
    """Grid (B). The winner of a row's slices; the lowest id among equals."""
    b = tl.program_id(0)
    parts = tl.arange(0, SLICES)
    inside = parts < num_slices
    value = tl.load(value_ptr + b * num_slices + parts, mask=inside, other=float("-inf"))
    shift = tl.load(shift_ptr + b * num_slices + parts, mask=inside, other=float("-inf"))
    ids = tl.load(id_ptr + b * num_slices + parts, mask=inside, other=0)
    temperature = tl.load(temperature_ptr + tl.load(rows_ptr + b) * FLOAT_STRIDE)
    if temperature > 0:
        # A slice of -inf throughout has value 0, whose log is -inf: it never wins against another.
        value = tl.where(inside, tl.log(value) + (shift - tl.max(shift, 0)) / temperature, float("-inf"))
    best = tl.argmax(value, 0)
    tl.store(token_ptr + b, tl.sum(tl.where(parts == best, ids, 0), 0).to(tl.int64))


def race(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    any_random: bool,
    out: Tensor | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """Draw one id per row of `logits`, int64 [B]: greedy where the temperature is 0, else from softmax(logits / T).

    logits: float32 [B, V], contiguous; infinite ones are allowed, a row of -inf throughout gives id 0. rows: int64 [B]:
    row b's state is entry rows[b] of temperature (float32 [S]), seed and position (int64 [S]), views of any stride.
    any_random: False only where every row is greedy. out: int64 [B], contiguous, or None to allocate. num_sms: no
    effect. Results equal those of `nanovllm.layers.sampler.sample`, but for races that float32 rounding decides.
    """
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous() and rows.dtype == torch.int64
    assert seed.stride() == position.stride() and seed.dtype == position.dtype == torch.int64
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    num_slices = triton.cdiv(vocab_size, SLICE_IDS)
    value, shift = torch.empty(2, num_rows, num_slices, dtype=torch.float32, device=logits.device).unbind(0)
    ids = torch.empty(num_rows, num_slices, dtype=torch.int32, device=logits.device)
    strides = {"FLOAT_STRIDE": temperature.stride(0)}
    with torch.cuda.device_of(logits):
        _race_kernel[(num_slices, num_rows)](
            value,
            shift,
            ids,
            logits,
            rows,
            temperature,
            seed,
            position,
            num_slices,
            VOCAB=vocab_size,
            INTEGER_STRIDE=seed.stride(0),
            RANDOM=any_random,
            SLICE=SLICE_IDS,
            num_warps=8,
            **strides,
        )
        _finish_kernel[(num_rows,)](
            out,
            value,
            shift,
            ids,
            rows,
            temperature,
            num_slices,
            SLICES=triton.next_power_of_2(num_slices),
            num_warps=1,
            **strides,
        )
    return out
