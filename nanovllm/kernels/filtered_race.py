"""Drawing a token id from each row of logits under top_k, top_p and min_p, without sorting them (Triton).

Allowed ids come first in a row's order: falling logits, rising ids among equals. So the winner of the race without
filters, if it is allowed, also wins the race among the allowed; if it is not, nothing after it is either, and the race
is run again on what comes before. FlashInfer samples by the same idea ("Sorting-Free GPU Kernels for LLM Sampling",
2025); here the noise is fixed by (seed, position, id), so that the result is that of `nanovllm.layers.sampler.sample`.

Four kernels. Slices of rows race in parallel, unfiltered. Each row's best slice gives its winner, and the maxima of
small groups of ids give a lower bound of its k-th largest logit. Slice by slice again: a row with top_k lists the few
ids that reach the bound; another sums the probability mass before its winner. The last kernel settles what is left, one
program a row: over the list, or over the whole row if the list is too long or the winner is not allowed.

Ids are compared by their places, see nanovllm/kernels/row_passes.py: a set of ids is "all places before a bound".

Letters in names: B rows, V vocabulary, C slices of a row, G groups of a row, L ids of a list, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.race import LARGEST, exponential, race_keys
from nanovllm.kernels.row_passes import (
    ID_BITS,
    ID_MASK,
    NOWHERE,
    Source,
    edge,
    goal_of,
    key_of,
    mass_of,
    place_of,
    race_before,
    tempered,
    weights_before,
)

MINUS_INFINITY = tl.constexpr(-(2**31) + 0x7FFFFF)  # -inf among float32's bits, ordered as signed integers
RACES = tl.constexpr(3)  # over a row until its edge is searched for, which ends it


@dataclass(frozen=True)
class Sizes:
    """Ids per slice (one program), per group, of a list, and per step of a pass over a list or over a row."""

    slice: int = 4096
    group: int = 128  # 1,216 groups in Qwen3's vocabulary: the bound is tight for a top_k of several hundred
    list: int = 4096
    list_tile: int = 512
    row_tile: int = 2048


class Parameters(NamedTuple):
    """Of the sequences: `rows` int64 [B] says which entry of the others, [S], is whose."""

    rows: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor


class Scratch(NamedTuple):
    """What one kernel tells the next. A slice's winner: `value`, the maximum it is relative to (`shift`), `slice_id`;
    [B, C]. Group maxima, [B, G]. Mass of a slice before its row's limit (`total`) and winner (`before`), [B, C]. Of a
    row, [B]: maximum, place of the winner, place that bounds all allowed ones, length of its list; and the list."""

    value: Tensor
    shift: Tensor
    slice_id: Tensor
    group_max: Tensor
    total: Tensor
    before: Tensor
    row_max: Tensor
    winner: Tensor
    limit: Tensor
    num_listed: Tensor
    listed: Tensor


# --- slices and rows ---------------------------------------------------------------------------------


@triton.jit
def _slice_kernel(
    scratch: Scratch,
    state: Parameters,
    logits_ptr: tl.tensor,
    VOCAB: tl.constexpr,
    FLOAT_STRIDE: tl.constexpr,
    INTEGER_STRIDE: tl.constexpr,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Grid (C, B). The unfiltered winner of a slice; for top_k, which does without, the maxima of its groups."""
    part, b = tl.program_id(0), tl.program_id(1)
    row = tl.load(state.rows + b)
    temperature = tl.load(state.temperature + row * FLOAT_STRIDE)
    ids = part * SLICE + tl.arange(0, SLICE)
    x = tl.load(logits_ptr + b.to(tl.int64) * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
    maxima = tl.max(tl.reshape(x, [SLICE // GROUP, GROUP]), 1)
    # Clamped: rows of -inf and infinite logits must not make a NaN, as in the plain sampler.
    shift = tl.minimum(tl.maximum(tl.max(maxima, 0), -LARGEST), LARGEST)
    value = x
    out = b * tl.num_programs(0) + part
    if temperature > 0:
        if tl.load(state.top_k + row * INTEGER_STRIDE) > 0:
            tl.store(scratch.group_max + out * (SLICE // GROUP) + tl.arange(0, SLICE // GROUP), maxima)
        else:
            seed = tl.load(state.seed + row * INTEGER_STRIDE)
            first, second = race_keys(seed, tl.load(state.position + row * INTEGER_STRIDE))
            p = tl.exp(tl.minimum(x - shift, 0.0) / temperature)
            value = tl.where(ids < VOCAB, p / exponential(ids, first, second), -1.0)
    tl.store(scratch.value + out, tl.max(value, 0))
    tl.store(scratch.shift + out, shift)
    tl.store(scratch.slice_id + out, part * SLICE + tl.argmax(value, 0))


@triton.jit
def _kth_bound(maxima: tl.tensor, inside: tl.tensor, k: tl.tensor, NUM_GROUPS: tl.constexpr) -> tl.tensor:
    """A logit that at least k ids reach: the k-th largest of the groups' maxima, or a little less; -inf if there are
    fewer groups. By bisection of float32's bits, ordered as signed integers: at most 32 steps."""
    bits = maxima.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    low = tl.min(tl.where(inside, order, 2**31), 0)
    high = tl.max(tl.where(inside, order, -(2**31)), 0) + 1
    low = tl.where(k > NUM_GROUPS, MINUS_INFINITY, low)
    reached = tl.full([], NUM_GROUPS, tl.int32)
    while (high - low > 1) & (reached > k + k // 4):
        middle = (low + high) >> 1
        count = tl.sum((inside & (order >= middle)).to(tl.int32), 0)
        enough = count >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        reached = tl.where(enough, count, reached)
    bits = low.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _row_kernel(
    token_ptr: tl.tensor,
    scratch: Scratch,
    state: Parameters,
    logits_ptr: tl.tensor,
    VOCAB: tl.constexpr,
    FLOAT_STRIDE: tl.constexpr,
    INTEGER_STRIDE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    SLICES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Grid (B). The unfiltered winner, with which greedy and unfiltered rows are done. The row's limit, by min_p and by
    the bound of the k-th largest logit: all allowed places are before it."""
    b = tl.program_id(0)
    row = tl.load(state.rows + b)
    temperature = tl.load(state.temperature + row * FLOAT_STRIDE)
    top_k = tl.load(state.top_k + row * INTEGER_STRIDE)
    parts = tl.arange(0, SLICES)
    inside = parts < NUM_SLICES
    value = tl.load(scratch.value + b * NUM_SLICES + parts, mask=inside, other=float("-inf"))
    shift = tl.load(scratch.shift + b * NUM_SLICES + parts, mask=inside, other=float("-inf"))
    ids = tl.load(scratch.slice_id + b * NUM_SLICES + parts, mask=inside, other=0)
    row_max = tl.max(shift, 0)
    if (temperature > 0) & (top_k == 0):
        # A slice of -inf throughout has value 0, whose log is -inf: it never wins against another.
        value = tl.where(inside, tl.log(value) + (shift - row_max) / temperature, float("-inf"))
    token = tl.sum(tl.where(parts == tl.argmax(value, 0), ids, 0), 0)
    token = tl.minimum(token, VOCAB - 1)  # of NaN, the first maximum may be any id of the slice
    tl.store(token_ptr + b, token.to(tl.int64))
    if temperature > 0:
        min_p = tl.load(state.min_p + row * FLOAT_STRIDE)
        limit = key_of(tl.log(min_p))
        if top_k > 0:
            groups = tl.arange(0, GROUPS)
            exists = groups < NUM_GROUPS
            maxima = tl.load(scratch.group_max + b * NUM_GROUPS + groups, mask=exists, other=float("-inf"))
            # Places, not logits, are bounded: logits that are equal once tempered are tied.
            bound = _kth_bound(maxima, exists, top_k, NUM_GROUPS)
            limit = tl.minimum(limit, key_of(tempered(bound, row_max, temperature)))
        x = tempered(tl.load(logits_ptr + b.to(tl.int64) * VOCAB + token), row_max, temperature)
        tl.store(scratch.winner + b, place_of(x, token))
        tl.store(scratch.limit + b, (limit.to(tl.int64) + 1) << ID_BITS)
        tl.store(scratch.row_max + b, row_max)
        tl.store(scratch.num_listed + b, 0)


@triton.jit
def _check_kernel(
    scratch: Scratch,
    state: Parameters,
    logits_ptr: tl.tensor,
    VOCAB: tl.constexpr,
    FLOAT_STRIDE: tl.constexpr,
    INTEGER_STRIDE: tl.constexpr,
    SLICE: tl.constexpr,
    LIST: tl.constexpr,
) -> None:
    """Grid (C, B). With top_k: append the slice's ids before the row's limit to its list; slices come in any order, and
    no result depends on it. Else with top_p: sum the slice's mass before the limit, and before the row's winner."""
    part, b = tl.program_id(0), tl.program_id(1)
    row = tl.load(state.rows + b)
    temperature = tl.load(state.temperature + row * FLOAT_STRIDE)
    top_k = tl.load(state.top_k + row * INTEGER_STRIDE)
    if (temperature > 0) & ((top_k > 0) | (tl.load(state.top_p + row * FLOAT_STRIDE) < 1)):
        ids = part * SLICE + tl.arange(0, SLICE)
        logits = tl.load(logits_ptr + b.to(tl.int64) * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
        x = tempered(logits, tl.load(scratch.row_max + b), temperature)
        place = place_of(x, ids)
        kept = (ids < VOCAB) & (place < tl.load(scratch.limit + b))
        if top_k > 0:
            num_kept = tl.sum(kept.to(tl.int32), 0)
            if num_kept > 0:
                start = tl.atomic_add(scratch.num_listed + b, num_kept, sem="relaxed")
                at = start + tl.cumsum(kept.to(tl.int32), 0) - 1
                tl.store(scratch.listed + b.to(tl.int64) * LIST + at, ids, mask=kept & (at < LIST))
        else:
            mass = tl.where(kept, mass_of(x), 0)
            out = b * tl.num_programs(0) + part
            tl.store(scratch.total + out, tl.sum(mass, 0))
            tl.store(scratch.before + out, tl.sum(tl.where(place < tl.load(scratch.winner + b), mass, 0), 0))


# --- what is left -----------------------------------------------------------------------------------


@triton.jit
def _settle_kernel(
    token_ptr: tl.tensor,
    scratch: Scratch,
    state: Parameters,
    logits_ptr: tl.tensor,
    VOCAB: tl.constexpr,
    FLOAT_STRIDE: tl.constexpr,
    INTEGER_STRIDE: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    SLICES: tl.constexpr,
    LIST: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
) -> None:
    """Grid (B). The filtered winner of each row whose list holds all that it may draw (LISTED), or of each other."""
    b = tl.program_id(0)
    row = tl.load(state.rows + b)
    temperature = tl.load(state.temperature + row * FLOAT_STRIDE)
    top_k = tl.load(state.top_k + row * INTEGER_STRIDE)
    top_p = tl.load(state.top_p + row * FLOAT_STRIDE)
    filtered = (top_k > 0) | (top_p < 1) | (tl.load(state.min_p + row * FLOAT_STRIDE) > 0)
    num_listed = tl.load(scratch.num_listed + b)
    is_listed = (top_k > 0) & (num_listed <= LIST)
    mine = is_listed if LISTED else filtered & (is_listed == 0)
    if (temperature > 0) & mine:
        size = num_listed if LISTED else VOCAB
        list_ptr = scratch.listed + b.to(tl.int64) * LIST
        row_max = tl.load(scratch.row_max + b)
        source = Source(logits_ptr + b.to(tl.int64) * VOCAB, list_ptr, size, row_max, temperature)
        seed = tl.load(state.seed + row * INTEGER_STRIDE)
        key_1, key_2 = race_keys(seed, tl.load(state.position + row * INTEGER_STRIDE))
        limit = tl.load(scratch.limit + b)
        winner = tl.full([], NOWHERE, tl.int64)
        total, before = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        if top_k > 0:
            # Of keys, not places: ids tied with the k-th stay.
            limit = edge(source, top_k, limit, True, ID_BITS, TILE, LISTED)
        else:
            winner = tl.load(scratch.winner + b)
            if top_p < 1:
                parts = tl.arange(0, SLICES)
                total = tl.sum(tl.load(scratch.total + b * NUM_SLICES + parts, mask=parts < NUM_SLICES, other=0), 0)
                before = tl.sum(tl.load(scratch.before + b * NUM_SLICES + parts, mask=parts < NUM_SLICES, other=0), 0)
        goal = goal_of(total, top_p)
        bound = limit
        races = tl.full([], 0, tl.int32)
        # A race below the edge is the last. One more only if NaN logits left nothing to win it.
        while ((winner >= bound) | (before >= goal)) & (races <= RACES + 1):
            bound = tl.minimum(bound, winner)
            if races == RACES:
                bound = edge(source, goal, bound, False, 0, TILE, LISTED)
            winner = race_before(source, bound, key_1, key_2, TILE, LISTED)
            if top_p < 1:
                total, before, _ = weights_before(source, limit, winner, winner, False, TILE, LISTED)
                goal = goal_of(total, top_p)
            races += 1
        token = tl.minimum(winner & ID_MASK, VOCAB - 1)
        tl.store(token_ptr + b, token)


# --- the launches ------------------------------------------------------------------------------------


def filtered_race(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    out: Tensor | None = None,
    num_sms: int | None = None,
    sizes: Sizes = Sizes(),  # noqa: B008 (frozen)
) -> Tensor:
    """Draw one id per row of `logits`, int64 [B]: greedy where the temperature is 0, else from what the filters leave.

    logits: float32 [B, V], contiguous; infinite ones are allowed, a row of -inf throughout gives id 0. rows: int64 [B]:
    row b's state is entry rows[b] of temperature, top_p, min_p (float32 [S], views of one stride) and of top_k, seed,
    position (int64 [S], views of one stride). Off are top_k 0, top_p 1, min_p 0; rows may mix. out: int64 [B],
    contiguous, or None to allocate. num_sms: no effect.

    Same filters, order and edges as `nanovllm.layers.sampler.sample`: x and masses are its floats and integers, bit for
    bit, as long as CUDA's exp and log are those of Triton's libdevice. Elsewhere (or should they ever differ) an edge
    can move by an id, about once in a million draws; as often, float32 rounding decides a race otherwise.

    Nothing waits for the device, and no row's result depends on another row. Passes over a row by one program: none if
    its unfiltered winner is allowed, or for top_k if its list holds; else two for each race, and for any logits at most
    2 (RACES + 1) + 26; 16 more (and one race) for a top_k whose list is too long: a k beyond a thousand, or many ties.
    """
    num_rows, vocab_size = logits.shape
    state = Parameters(rows, temperature, top_k, top_p, min_p, seed, position)
    _check(logits, state)
    assert vocab_size <= 2**ID_BITS.value
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    scratch = _new_scratch(num_rows, vocab_size, sizes, logits.device)
    num_slices, num_groups = scratch.value.shape[1], scratch.group_max.shape[1]
    slices = triton.next_power_of_2(num_slices)
    common = {"VOCAB": vocab_size, "FLOAT_STRIDE": temperature.stride(0), "INTEGER_STRIDE": seed.stride(0)}
    by_slice = common | {"SLICE": sizes.slice, "num_warps": 8}
    by_row = common | {"NUM_SLICES": num_slices, "SLICES": slices}
    with torch.cuda.device_of(logits):
        _slice_kernel[(num_slices, num_rows)](scratch, state, logits, GROUP=sizes.group, **by_slice)
        groups = {"NUM_GROUPS": num_groups, "GROUPS": slices * (sizes.slice // sizes.group)}
        _row_kernel[(num_rows,)](out, scratch, state, logits, num_warps=4, **groups, **by_row)
        _check_kernel[(num_slices, num_rows)](scratch, state, logits, LIST=sizes.list, **by_slice)
        for listed, tile, num_warps in [(True, sizes.list_tile, 4), (False, sizes.row_tile, 16)]:
            constants = by_row | {"LIST": sizes.list, "TILE": tile, "LISTED": listed}
            _settle_kernel[(num_rows,)](out, scratch, state, logits, num_warps=num_warps, **constants)
    return out


def _check(logits: Tensor, state: Parameters) -> None:
    floats = [state.temperature, state.top_p, state.min_p]
    integers = [state.top_k, state.seed, state.position]
    assert logits.dtype == torch.float32 and logits.is_contiguous() and state.rows.dtype == torch.int64
    for tensors, dtype in [(floats, torch.float32), (integers, torch.int64)]:
        assert all(t.dtype == dtype and t.stride() == tensors[0].stride() for t in tensors)


def _new_scratch(num_rows: int, vocab_size: int, sizes: Sizes, device: torch.device) -> Scratch:
    num_slices = triton.cdiv(vocab_size, sizes.slice)

    def new(dtype: torch.dtype, *width: int) -> Tensor:
        return torch.empty(num_rows, *width, dtype=dtype, device=device)

    return Scratch(
        value=new(torch.float32, num_slices),
        shift=new(torch.float32, num_slices),
        slice_id=new(torch.int32, num_slices),
        group_max=new(torch.float32, num_slices * (sizes.slice // sizes.group)),
        total=new(torch.int64, num_slices),
        before=new(torch.int64, num_slices),
        row_max=new(torch.float32),
        winner=new(torch.int64),
        limit=new(torch.int64),
        num_listed=new(torch.int32),
        listed=new(torch.int32, sizes.list),
    )
