"""Drawing a token id from each row of logits, without a softmax, in one pass (Triton).

The draw is the exponential race of nanovllm/layers/sampler.py (Gumbel-max): the winner of p / E, E independent standard
exponentials made by a counter-based hash of (seed, position, id), is distributed as p. In base 2, so that a logarithm
is little more than one instruction.
Letters in names: B rows, V vocabulary, C slices of a row, S slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SLICE_IDS = 4096  # of one program: enough programs for few rows of Qwen3's 151,936 ids
TILE_IDS = 2048  # a program's ids at one time: 16 a thread; it reduces over its threads once, at its end
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
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


@triton.jit
def _log2(x: tl.tensor) -> tl.tensor:
    """Of normal numbers, to 2**-22: one instruction, where the exact one takes a polynomial."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, pack=1)


@triton.jit
def log2_exponential(ids: tl.tensor, first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """log2 of `exponential`, within 1e-5: small ones, which win, by their series, as 1 - u would be rounded."""
    u = uniform(ids, first, second)
    small = u * (1.0 + u * (0.5 + u * (1 / 3 + u * 0.25)))
    return _log2(tl.where(u < 0.03125, small, -0.6931471805599453 * _log2(1.0 - u)))


@triton.jit(do_not_specialize=["num_slices"])
def _race_kernel(
    value_ptr: tl.tensor,
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
    TILE: tl.constexpr,
) -> None:
    """Grid (C, B). The winner of one slice of a row: its value, and the lowest id among equals."""
    part, b = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + b)
    logits_ptr += b.to(tl.int64) * VOCAB
    temperature = tl.load(temperature_ptr + row * FLOAT_STRIDE)
    seed, position = tl.load(seed_ptr + row * INTEGER_STRIDE), tl.load(position_ptr + row * INTEGER_STRIDE)
    first, second = race_keys(seed, position)
    scale = 1.4426950408889634 / tl.where(temperature > 0, temperature, 1.0)
    value = tl.full([TILE], float("-inf"), tl.float32)
    winner = part * SLICE + tl.arange(0, TILE)
    for start in tl.static_range(0, SLICE, TILE):
        ids = part * SLICE + start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
        if RANDOM:
            if temperature > 0:
                # Bounded: an infinite logit must not make a NaN of a row's other values.
                x = tl.minimum(x, LARGEST) * scale - log2_exponential(ids, first, second)
        better = x > value
        value, winner = tl.where(better, x, value), tl.where(better, ids, winner)
    best = tl.max(value, 0)
    tl.store(value_ptr + b * num_slices + part, best)
    tl.store(id_ptr + b * num_slices + part, tl.min(tl.where(value == best, winner, 0x7FFFFFFF), 0))


@triton.jit(do_not_specialize=["num_slices"])
def _finish_kernel(
    token_ptr: tl.tensor,
    value_ptr: tl.tensor,
    id_ptr: tl.tensor,
    num_slices: tl.tensor,
    SLICES: tl.constexpr,
) -> None:
    """Grid (B). The winner of a row's slices; the lowest id among equals."""
    b = tl.program_id(0)
    parts = tl.arange(0, SLICES)
    inside = parts < num_slices
    value = tl.load(value_ptr + b * num_slices + parts, mask=inside, other=float("-inf"))
    ids = tl.load(id_ptr + b * num_slices + parts, mask=inside, other=0x7FFFFFFF)
    tl.store(token_ptr + b, tl.min(tl.where(value == tl.max(value, 0), ids, 0x7FFFFFFF), 0).to(tl.int64))


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
    effect. Results equal those of `nanovllm.layers.sampler.sample`, but for races that float32 rounding decides: of
    logits / T too large to feel the noise (2**24 and more) the largest wins, the lowest id among equals.
    """
    num_rows, vocab_size = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous() and rows.dtype == torch.int64
    assert seed.stride() == position.stride() and seed.dtype == position.dtype == torch.int64
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    num_slices = triton.cdiv(vocab_size, SLICE_IDS)
    value = torch.empty(num_rows, num_slices, dtype=torch.float32, device=logits.device)
    ids = torch.empty_like(value, dtype=torch.int32)
    with torch.cuda.device_of(logits):
        _race_kernel[(num_slices, num_rows)](
            value,
            ids,
            logits,
            rows,
            temperature,
            seed,
            position,
            num_slices,
            VOCAB=vocab_size,
            FLOAT_STRIDE=temperature.stride(0),
            INTEGER_STRIDE=seed.stride(0),
            RANDOM=any_random,
            SLICE=SLICE_IDS,
            TILE=min(TILE_IDS, SLICE_IDS),
            num_warps=4,
        )
        _finish_kernel[(num_rows,)](out, value, ids, num_slices, SLICES=triton.next_power_of_2(num_slices), num_warps=1)
    return out
