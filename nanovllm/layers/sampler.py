"""From logits to token ids: penalties, temperature, min_p, top_k, top_p, and a draw.

A row's draw depends on its (seed, position) alone: not on the batch, its place in it, or the device.
So a request gives the same tokens whatever runs beside it, and may be recomputed at any time.

The draw is an exponential race (Gumbel-max): the winner of `argmax(p / E)`, with E independent standard
exponentials, is distributed as p; in logs, `argmax(x - log E)`. It needs no sum over p, hence no second
pass, and p need not be normalised. E comes from a counter-based hash of (seed, position, id).

A filter is a threshold per row (for top_p with a count of the ids tied at it), applied to all ids at
once. No row's result depends on which path another row takes, nothing here waits for the device, and all
shapes are known to the host.

Shape suffixes: B rows (one per sequence), V vocabulary, C top-k candidates, N rows sorted in full,
R rows of any kind, X ids of any kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine.shards import NO_TOKEN
from nanovllm.layers.host import to_device
from nanovllm.sampling_params import SamplingParams

# Rows treated at once where scratch is a multiple of the logits: bounds it (128 rows of Qwen3's 151,936
# logits would need 0.3 GB for the hash alone), and on a GPU keeps it within the L2 cache.
ROWS_PER_CHUNK = 32

# Probability mass is summed as integers in this unit, relative to the most likely id. Integer sums are
# exact in any order, so a top_p cut cannot depend on how a device splits a sum. 2**18 ids fit in int64.
MASS_UNIT_BITS = 40

# A set whose mass falls short of top_p by this much, relatively, has reached it: logits and top_p are only
# known to float32, and 0.3 of ten equal ids must be three of them, not four.
TOP_P_SLACK = 2.0**-20


@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """What `sample` must know of each row; all tensors on the device of the logits.

    temperature: float32 [B], 0 is greedy.
    top_k: int64 [B], 0 is off.  top_p: float32 [B], 1 is off.  min_p: float32 [B], 0 is off.
    presence, frequency, repetition: float32 [B]; 0, 0 and 1 are off.
    seed: int64 [B], any 64 bits.
    position: int64 [B], in [0, 2**31): which output token is drawn, 0 is the first.
    any_random, any_top_k, any_top_p, any_min_p, any_penalty: what the host knows of the rows. Work for an
        absent feature is not even launched; True where no row needs it costs time, never correctness.
    max_top_k: at least every row's top_k. It sets a shape.
    full_sort_rows: int64 [N], the random rows with top_p but without top_k; may name more rows than that,
        at the price of sorting them. None: no such row.
    output_counts: int32 [B, V], how often each id was generated so far. None: nothing was generated yet.
    prompt_mask: bool [B, V], the ids that occur in the prompt. None: none counts.
    banned: bool [B, V], ids that must not be drawn now. A row must keep at least one. None: none banned.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor
    seed: Tensor
    position: Tensor
    any_random: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_penalty: bool
    max_top_k: int
    full_sort_rows: Tensor | None = None
    output_counts: Tensor | None = None
    prompt_mask: Tensor | None = None
    banned: Tensor | None = None

    @classmethod
    def from_params(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        positions: Sequence[int],
        device: torch.device | str,
        *,
        output_counts: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        banned: Tensor | None = None,
    ) -> SamplingBatch:
        """One row per entry; seeds are taken modulo 2**64. Filters of greedy rows are switched off."""
        assert len(params) == len(seeds) == len(positions)
        filters = [sampling_filters(p) for p in params]

        def floats(values: Sequence[float]) -> Tensor:
            return to_device(values, torch.float32, device)

        def integers(values: Sequence[int]) -> Tensor:
            return to_device(values, torch.int64, device)

        return cls(
            temperature=floats([p.temperature for p in params]),
            top_k=integers([top_k for top_k, _, _ in filters]),
            top_p=floats([top_p for _, top_p, _ in filters]),
            min_p=floats([min_p for _, _, min_p in filters]),
            presence=floats([p.presence_penalty for p in params]),
            frequency=floats([p.frequency_penalty for p in params]),
            repetition=floats([p.repetition_penalty for p in params]),
            seed=integers([(seed + 2**63) % 2**64 - 2**63 for seed in seeds]),
            position=integers(positions),
            **sampling_features(params, device),
            output_counts=output_counts,
            prompt_mask=prompt_mask,
            banned=banned,
        )


def sampling_filters(params: SamplingParams) -> tuple[int, float, float]:
    """top_k, top_p, min_p of a row; those of a greedy row are off."""
    return (0, 1.0, 0.0) if params.is_greedy else (params.top_k, params.top_p, params.min_p)


def sampling_features(params: Sequence[SamplingParams], device: torch.device | str) -> dict[str, Any]:
    """What the host knows of a batch's rows, as keywords of `SamplingBatch`."""
    filters = [sampling_filters(p) for p in params]
    full_sort = [row for row, (top_k, top_p, _) in enumerate(filters) if top_p < 1 and top_k == 0]
    return {
        "any_random": not all(p.is_greedy for p in params),
        "any_top_k": any(top_k for top_k, _, _ in filters),
        "any_top_p": any(top_p < 1 for _, top_p, _ in filters),
        "any_min_p": any(min_p for _, _, min_p in filters),
        "any_penalty": any(p.has_penalty for p in params),
        "max_top_k": max((top_k for top_k, _, _ in filters), default=0),
        "full_sort_rows": to_device(full_sort, torch.int64, device) if full_sort else None,
    }


def sample(logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
    """Draw one id per row: int64 [B]. Logits are float32 [B, V] and are left as they are.

    The order is vLLM's: banned ids, penalties, temperature, min_p, top_k, top_p on what is left. Ids tied
    with the k-th stay. top_p keeps the smallest set whose mass reaches it, never an empty one; of ids tied
    at its edge the lowest stay. Greedy rows take the best penalised logit, the lowest id among equals.
    Infinite and huge logits are allowed. A row that is -inf throughout gives id 0.
    """
    assert logits_BV.dtype == torch.float32
    logits_BV = _penalised(logits_BV, batch)
    best_B = logits_BV.argmax(-1)
    if not batch.any_random:
        return best_B
    x_BV = _tempered(logits_BV, batch.temperature)
    _apply_filters_(x_BV, batch)
    return torch.where(batch.temperature > 0, _race(x_BV, batch.seed, batch.position), best_B)


def mark_undrawn_(tokens_B: Tensor, logits_BV: Tensor) -> Tensor:
    """NO_TOKEN, in place, for ids that were not drawn: of rows of nothing but NaN and -inf, and of those of `sample`
    with any NaN. Looks at one logit a row. tokens_B: int64 [B], from logits_BV: float32 [B, V]."""
    logits_B = logits_BV.gather(-1, tokens_B[:, None].clamp(min=0)).squeeze(-1)
    return tokens_B.masked_fill_(~(logits_B > -torch.inf), NO_TOKEN)  # false for NaN


def gather_logprobs(logits_BV: Tensor, tokens_B: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs of the model itself, before penalties, temperature and filters.

    logits_BV: float32 [B, V]; tokens_B: int64 [B], the chosen ids; k: how many of the most likely ids.
    Returns the chosen ids' logprobs, float32 [B]; their ranks, int64 [B] (1 + how many ids are strictly
    more likely); the k most likely ids, int64 [B, k]; and their logprobs, float32 [B, k], falling.
    """
    total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    chosen_B1 = logits_BV.gather(-1, tokens_B[:, None].clamp(min=0))
    rank_B = 1 + (logits_BV > chosen_B1).sum(-1)
    top_Bk, ids_Bk = logits_BV.topk(k)
    return (chosen_B1 - total_B1).squeeze(-1), rank_B, ids_Bk, top_Bk - total_B1


# --- penalties and temperature -----------------------------------------------------------------------


def _penalised(logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
    """A row with neutral penalties comes out bit for bit as it went in."""
    if batch.banned is not None:
        logits_BV = logits_BV.masked_fill(batch.banned, -torch.inf)
    if not batch.any_penalty:
        return logits_BV
    logits_BV = _repetition_penalised(logits_BV, batch)
    if batch.output_counts is None:
        return logits_BV
    logits_BV = logits_BV - batch.frequency[:, None] * batch.output_counts
    return logits_BV.sub_(batch.presence[:, None] * (batch.output_counts > 0))


def _repetition_penalised(logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
    """The penalty of CTRL (Keskar et al. 2019), with vLLM's rule for negative logits: multiply."""
    seen_BV = batch.prompt_mask
    if batch.output_counts is not None:
        generated_BV = batch.output_counts > 0
        seen_BV = generated_BV if seen_BV is None else generated_BV | seen_BV
    if seen_BV is None:
        return logits_BV
    penalty_BV = torch.where(seen_BV, batch.repetition[:, None], 1.0)
    return torch.where(logits_BV > 0, logits_BV / penalty_BV, logits_BV * penalty_BV)


def _tempered(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """log p up to a constant, the most likely id at 0: a new tensor, in [-inf, 0], never NaN.

    Subtracting the maximum first keeps small temperatures from overflowing. The two clamps are for rows
    that are -inf throughout and for +inf, where the difference would be NaN or +inf.
    """
    largest = torch.finfo(torch.float32).max
    max_B1 = logits_BV.amax(-1, keepdim=True).clamp_(-largest, largest)
    divisor_B1 = torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    return (logits_BV - max_B1).clamp_(max=0).div_(divisor_B1)


# --- filters -----------------------------------------------------------------------------------------


def _apply_filters_(x_BV: Tensor, batch: SamplingBatch) -> None:
    """Set the ids that may not be drawn to -inf, in place. min_p and top_k commute: both are thresholds."""
    threshold_B = torch.full_like(batch.temperature, -torch.inf)
    candidates_BC = None
    if batch.any_min_p:
        threshold_B = batch.min_p.log()  # relative to the maximum, which is 0
    if batch.any_top_k:
        candidates_BC = x_BV.topk(min(batch.max_top_k, x_BV.shape[-1])).values
        threshold_B = threshold_B.maximum(_kth_value(candidates_BC, batch.top_k))
    if batch.any_min_p or batch.any_top_k:
        x_BV.masked_fill_(x_BV < threshold_B[:, None], -torch.inf)
    if batch.any_top_p:
        _apply_top_p_(x_BV, candidates_BC, threshold_B, batch)


def _kth_value(candidates_BC: Tensor, top_k_B: Tensor) -> Tensor:
    index_B = top_k_B.clamp(1, candidates_BC.shape[-1]) - 1
    kth_B = candidates_BC.gather(-1, index_B[:, None]).squeeze(-1)
    return torch.where(top_k_B > 0, kth_B, -torch.inf)


def _apply_top_p_(x_BV: Tensor, candidates_BC: Tensor | None, threshold_B: Tensor, batch: SamplingBatch) -> None:
    """A row takes one of two paths by its own top_k alone, so its neighbours never change its result."""
    if candidates_BC is not None:
        top_p_B = torch.where(batch.top_k > 0, batch.top_p, 1.0)
        _cut_by_candidates_(x_BV, candidates_BC, threshold_B, top_p_B)
    if batch.full_sort_rows is not None:
        top_p_B = torch.where(batch.top_k > 0, 1.0, batch.top_p)
        for rows_R in batch.full_sort_rows.split(ROWS_PER_CHUNK):
            cut_RV = _cut_by_sorting(x_BV[rows_R], threshold_B[rows_R], top_p_B[rows_R])
            x_BV.index_copy_(0, rows_R, cut_RV)


def _cut_by_candidates_(x_BV: Tensor, candidates_BC: Tensor, threshold_B: Tensor, top_p_B: Tensor) -> None:
    num_left_B = (x_BV >= threshold_B[:, None]).sum(-1)
    edge = _nucleus_edge(candidates_BC, threshold_B, num_left_B, top_p_B)
    for x_RV, *edge_R in zip(*(t.split(ROWS_PER_CHUNK) for t in (x_BV, *edge)), strict=True):
        _cut_(x_RV, *edge_R)


def _cut_by_sorting(x_RV: Tensor, threshold_R: Tensor, top_p_R: Tensor) -> Tensor:
    num_left_R = (x_RV >= threshold_R[:, None]).sum(-1)
    sorted_RV = x_RV.sort(-1, descending=True).values
    _cut_(x_RV, *_nucleus_edge(sorted_RV, threshold_R, num_left_R, top_p_R))
    return x_RV


def _nucleus_edge(sorted_RX: Tensor, threshold_R: Tensor, num_left_R: Tensor, top_p_R: Tensor) -> tuple[Tensor, Tensor]:
    """The value of the last id inside the nucleus, float32 [R], and how many ids of that value are inside.

    The nucleus is that of Holtzman et al. 2020.

    sorted_RX: the largest values of each row, falling; values under the row's threshold do not count.
    num_left_R: int64, the ids of the whole row at or above its threshold. Those missing in sorted_RX are
        tied with its last valid entry, so their value is the threshold.
    top_p_R: float32; 1 gives the value -inf.
    """
    valid_RX = sorted_RX >= threshold_R[:, None]
    mass_RX = _mass(sorted_RX).masked_fill_(~valid_RX, 0)
    missing_R = (num_left_R - valid_RX.sum(-1)) * _mass(threshold_R)
    total_R = (mass_RX.sum(-1) + missing_R).double()
    goal_R1 = (total_R * top_p_R * (1 - TOP_P_SLACK)).ceil().long()[:, None]
    inside_RX = valid_RX & (_row_cumsum(mass_RX) - mass_RX < goal_R1)
    last_R1 = (inside_RX.sum(-1, keepdim=True) - 1).clamp_(min=0)
    value_R1 = sorted_RX.gather(-1, last_R1)
    above_R1 = mass_RX.masked_fill(sorted_RX <= value_R1, 0).sum(-1, keepdim=True)
    unit_R1 = mass_RX.gather(-1, last_R1).clamp_(min=1)
    num_tied_R1 = ((goal_R1 - above_R1 + unit_R1 - 1) // unit_R1).clamp_(min=1)
    value_R = torch.where(top_p_R < 1, value_R1.squeeze(-1), -torch.inf)
    return value_R, num_tied_R1.squeeze(-1)


def _mass(x: Tensor) -> Tensor:
    return (x.exp() * 2.0**MASS_UNIT_BITS).long()


def _cut_(x_RV: Tensor, value_R: Tensor, num_tied_R: Tensor) -> None:
    """Drop what is below the value, and of the ids at it all but the num_tied lowest. -inf drops nothing."""
    tied_RV = x_RV == value_R[:, None]
    surplus_RV = tied_RV & (_row_cumsum(tied_RV.int()) > num_tied_R[:, None])
    x_RV.masked_fill_(surplus_RV | (x_RV < value_R[:, None]), -torch.inf)


def _row_cumsum(n_RX: Tensor) -> Tensor:
    """Running sums of integers along each row, by one scan over all rows: a GPU scans a long row with a
    single block. A sum over all rows that overflows wraps around, and the difference is right again."""
    total_RX = n_RX.flatten().cumsum(0, dtype=n_RX.dtype).view_as(n_RX)
    return total_RX - (total_RX[:, :1] - n_RX[:, :1])


# --- noise -------------------------------------------------------------------------------------------


def _race(x_BV: Tensor, seed_B: Tensor, position_B: Tensor) -> Tensor:
    """The winners, int64 [B]: P(id) is proportional to exp(x). Ids at -inf never win against another."""
    id_hash_V = lowbias32(torch.arange(x_BV.shape[-1], dtype=torch.int32, device=x_BV.device))
    keys_B2 = row_keys(seed_B, position_B)
    chunks = zip(x_BV.split(ROWS_PER_CHUNK), keys_B2.split(ROWS_PER_CHUNK), strict=True)
    return torch.cat([(x_RV - exponential(keys_R2, id_hash_V).log_()).argmax(-1) for x_RV, keys_R2 in chunks])


def exponential(keys_R2: Tensor, id_hash_X: Tensor) -> Tensor:
    """Standard exponentials, float32 [R, X], of keys from `row_keys` and `lowbias32` of the ids.

    -log1p(-u), not -log(u): the race is won by the smallest, and u is finest near 0.
    """
    return uniform(keys_R2, id_hash_X).neg_().log1p_().neg_()


def uniform(keys_R2: Tensor, id_hash_X: Tensor) -> Tensor:
    """Uniforms in (0, 1), float32 [R, X]: the same bits on every device.

    Each number is lowbias32 once more, of the id's hash, with the row's two key words xored in before the
    two multiplications instead of its outer xorshifts. The upper 31 bits r become (r + 1/2) * 2**-31, times
    1 - 2**-24 so that the largest stays below 1. All integers are 32-bit and wrap around.
    """
    r_RX = (id_hash_X ^ keys_R2[:, :1]).mul_(_MULTIPLIER_1)
    r_RX.bitwise_xor_(_shifted_right(r_RX, 15)).bitwise_xor_(keys_R2[:, 1:]).mul_(_MULTIPLIER_2)
    return _shifted_right(r_RX, 1).float().add_(0.5).mul_(2.0**-31 * (1 - 2.0**-24))


def row_keys(seed_R: Tensor, position_R: Tensor) -> Tensor:
    """Two words per row, int32 [R, 2]: a chain of lowbias32 over seed (low word, high word) and position.

    seed_R, position_R: int64 [R]; of the position only the low word counts. The words start from the
    digits of the golden ratio and of pi: a single word would repeat within some 2**16 draws, two do not.
    """
    seed_R2 = seed_R.contiguous().view(torch.int32).view(-1, 2)  # (low, high): little endian
    low_R, high_R1 = seed_R2[:, 0], seed_R2[:, 1:]
    position_R1 = position_R.contiguous().view(torch.int32).view(-1, 2)[:, :1]
    key_R2 = lowbias32(torch.stack([low_R ^ _KEY_1, low_R ^ _KEY_2], -1))
    return lowbias32(lowbias32(key_R2 ^ high_R1) ^ position_R1)


def lowbias32(x: Tensor) -> Tensor:
    """The integer hash of that name by Chris Wellons (hash-prospector, 2018), int32 to int32, a bijection."""
    x = x ^ _shifted_right(x, 16)
    x = x * _MULTIPLIER_1
    x = x ^ _shifted_right(x, 15)
    x = x * _MULTIPLIER_2
    return x ^ _shifted_right(x, 16)


def _shifted_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int32: torch's own repeats the sign bit."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


# uint32 constants as the int32 of the same bits
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - 2**32
_KEY_1 = 0x9E3779B9 - 2**32
_KEY_2 = 0x243F6A88
