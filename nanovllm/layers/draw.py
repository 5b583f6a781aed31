"""Sampling on a GPU, by kernels over slot state: what nanovllm/layers/sampler.py does in plain torch on any device.

Letters in names: B rows, V vocabulary, S slots.
"""

from __future__ import annotations

from torch import Tensor

from nanovllm.kernels.filtered_race import filtered_race
from nanovllm.kernels.penalties import apply_penalties_, count_
from nanovllm.kernels.race import race
from nanovllm.sampling_params import SamplerKind


def draw(
    kind: SamplerKind,
    logits_BV: Tensor,
    rows_B: Tensor,
    floats_S6: Tensor,
    integers_S7: Tensor,
    seen_SV: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """One id per row of logits, int64 [B], in `out` if given; row b's sampling is that of slot rows_B[b].

    floats_S6, integers_S7: as in `SlotState`. "penalised" changes the logits in place, and counts the ids in seen_SV,
    the table of nanovllm/layers/seen_tokens.py, whose last row is of no slot; the others do not read it.
    """
    temperature, top_p, min_p, presence, frequency, repetition = floats_S6.unbind(1)
    position, seed, top_k, min_tokens = integers_S7.unbind(1)[2:6]
    if kind == "plain":
        return race(logits_BV, rows_B, temperature, seed, position, any_random=True, out=out)
    if kind == "penalised":
        assert seen_SV is not None
        penalties = presence, frequency, repetition, min_tokens
        apply_penalties_(logits_BV, rows_B, seen_SV, *penalties, position)
    token_ids = filtered_race(logits_BV, rows_B, temperature, top_k, top_p, min_p, seed, position, out=out)
    if kind == "penalised":
        assert seen_SV is not None
        count_(seen_SV, rows_B, token_ids)
    return token_ids
