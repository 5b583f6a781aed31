"""Passes over the ids of one row of logits, in the order in which filters allow them: falling logits, rising ids among
equals (Triton device functions; the tests are those of `filtered_race`).

That order is the order of places: int64, the bits of |x| above those of the id, x being the tempered logit. No two ids
share a place, so every set of ids here is "all places before a bound".
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from nanovllm.kernels.race import exponential
from nanovllm.layers.sampler import MASS_UNIT_BITS, TOP_P_SLACK

ID_BITS = tl.constexpr(20)  # of a place: bounds the vocabulary
ID_MASK = tl.constexpr(2**20 - 1)
NOWHERE = tl.constexpr(2**62)  # a place after all others
UNBOUNDED = tl.constexpr(2**63 - 1)
MASS_UNITS = tl.constexpr(2.0**MASS_UNIT_BITS)
TOP_P_FACTOR = tl.constexpr(1 - TOP_P_SLACK)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # Triton's interpreter has no libdevice


class Source(NamedTuple):
    """Whose ids a pass goes over: those of a list, or all `size` of a row. In a kernel: pointers and scalars."""

    logits: tl.tensor
    listed: tl.tensor
    size: tl.tensor
    row_max: tl.tensor
    temperature: tl.tensor


@triton.jit
def tempered(logits: tl.tensor, row_max: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """log p up to a constant, in [-inf, 0], rounded as by the plain sampler."""
    return tl.div_rn(tl.minimum(logits - row_max, 0.0), temperature)


@triton.jit
def key_of(x: tl.tensor) -> tl.tensor:
    """The order of an x in [-inf, 0], int32: the most likely has 0."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def place_of(x: tl.tensor, ids: tl.tensor) -> tl.tensor:
    return (key_of(x).to(tl.int64) << ID_BITS) | ids


@triton.jit
def mass_of(x: tl.tensor) -> tl.tensor:
    """The integers of the plain sampler: libdevice's exp is CUDA's own, tl.exp a coarser one."""
    p = tl.exp(x) if INTERPRETED else libdevice.exp(x)
    return (p * MASS_UNITS).to(tl.int64)


@triton.jit
def goal_of(total: tl.tensor, top_p: tl.tensor) -> tl.tensor:
    """An id is in the nucleus if the mass before it is less than this. At least 1: the first id always is."""
    goal = tl.ceil(total.to(tl.float64) * top_p.to(tl.float64) * TOP_P_FACTOR).to(tl.int64)
    return tl.where(top_p < 1, tl.maximum(goal, 1), UNBOUNDED)


@triton.jit
def load_tile(
    source: Source, start: tl.tensor, TILE: tl.constexpr, LISTED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """x, ids and places of the next ids of a pass; what is outside is nowhere."""
    at = start + tl.arange(0, TILE)
    inside = at < source.size
    ids = at
    if LISTED:
        ids = tl.load(source.listed + at, mask=inside, other=0)
    logits = tl.load(source.logits + ids, mask=inside, other=float("-inf"))
    x = tempered(logits, source.row_max, source.temperature)
    return x, ids, tl.where(inside, place_of(x, ids), NOWHERE)


@triton.jit
def weights_before(
    source: Source,
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One pass: how many ids are before each of three places (COUNT), or their mass; int64."""
    a, b, c = tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64)
    for start in tl.range(0, source.size, TILE, num_stages=1 if LISTED else 6):
        x, _, place = load_tile(source, start, TILE, LISTED)
        weight = tl.full([TILE], 1, tl.int64) if COUNT else mass_of(x)
        a += tl.where(place < first, weight, 0)
        b += tl.where(place < second, weight, 0)
        c += tl.where(place < third, weight, 0)
    return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0)


@triton.jit
def race_before(
    source: Source,
    bound: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
) -> tl.tensor:
    """One pass: the place of the winner among the ids before `bound`; NOWHERE if there is none."""
    best = tl.full([TILE], -1.0, tl.float32)
    best_place = tl.full([TILE], NOWHERE, tl.int64)
    for start in tl.range(0, source.size, TILE, num_stages=1 if LISTED else 6):
        x, ids, place = load_tile(source, start, TILE, LISTED)
        value = tl.where(place < bound, tl.exp(x) / exponential(ids, first, second), -1.0)
        better = (place < bound) & ((value > best) | ((value == best) & (place < best_place)))
        best, best_place = tl.where(better, value, best), tl.where(better, place, best_place)
    return tl.min(tl.where(best == tl.max(best, 0), best_place, NOWHERE), 0)


@triton.jit
def narrowed(
    low: tl.tensor, high: tl.tensor, middle: tl.tensor, weight: tl.tensor, goal: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """`low` is allowed, `high` bounds the allowed. Exactly the goal before `middle`: that is the bound, they meet."""
    low = tl.where(weight <= goal, tl.maximum(low, middle), low)
    return low, tl.where(weight < goal, high, tl.minimum(high, middle))


@triton.jit
def edge(
    source: Source,
    goal: tl.tensor,
    bound: tl.tensor,
    COUNT: tl.constexpr,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
) -> tl.tensor:
    """The bound, up to `bound`, of the places with less than `goal` before them, where places with the same bits above
    the SHIFT lowest are one. Each pass quarters what is left: at most 16 passes over keys, 26 over places."""
    low, high = tl.full([], 0, tl.int64), bound >> SHIFT
    while high - low > 1:
        step = (high - low + 3) // 4
        first = low + step
        second, third = tl.minimum(first + step, high - 1), tl.minimum(first + 2 * step, high - 1)
        a, b, c = weights_before(source, first << SHIFT, second << SHIFT, third << SHIFT, COUNT, TILE, LISTED)
        low, high = narrowed(low, high, first, a, goal)
        low, high = narrowed(low, high, second, b, goal)
        low, high = narrowed(low, high, third, c, goal)
    return high << SHIFT
