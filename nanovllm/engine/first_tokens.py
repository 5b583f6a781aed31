"""The first token of an answer, drawn from its prompt's last logits: the sequence may have no slot on this card.

Letters in names: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.engine.shards import SamplingRow
from nanovllm.engine.slot_state import fill_seen, sampling_floats, slot_integers
from nanovllm.layers import sampler
from nanovllm.layers.host import to_device
from nanovllm.layers.seen_tokens import unpack
from nanovllm.sampling_params import SAMPLER_KINDS


def first_tokens(logits_BV: Tensor, rows: list[SamplingRow], has_kernels: bool) -> Tensor:
    """Sampled ids, int64 [B], NO_TOKEN where none could be drawn. Where kernels draw, penalties change the logits,
    float32 [B, V]."""
    if not rows:
        return torch.empty(0, dtype=torch.int64, device=logits_BV.device)
    ids_B = _draw(logits_BV, rows) if has_kernels else sampler.sample(logits_BV, _sampling_batch(logits_BV, rows))
    return sampler.mark_undrawn_(ids_B, logits_BV)


def _sampling_batch(logits_BV: Tensor, rows: list[SamplingRow]) -> sampler.SamplingBatch:
    tables: dict[str, Tensor] = {}
    if any(row.params.has_penalty or row.stop_ids for row in rows):
        tables = dict(zip(("output_counts", "prompt_mask", "banned"), unpack(_seen(logits_BV, rows, 0)), strict=True))
    return sampler.SamplingBatch.from_params(
        [row.params for row in rows],
        [row.seed for row in rows],
        [row.position for row in rows],
        logits_BV.device,
        **tables,
    )


def _draw(logits_BV: Tensor, rows: list[SamplingRow]) -> Tensor:
    """What `sample` gives for `_sampling_batch`, by kernels."""
    from nanovllm.layers.draw import draw  # here: a CPU build of torch comes without Triton

    device, kind = logits_BV.device, SAMPLER_KINDS[max(row.params.sampler_level for row in rows)]
    seen = _seen(logits_BV, rows, 1) if kind == "penalised" else None  # the last row is of no slot
    floats = to_device([sampling_floats(row.params) for row in rows], torch.float32, device)
    integers = to_device([slot_integers(row, 0, 0) for row in rows], torch.int64, device)
    return draw(kind, logits_BV, torch.arange(len(rows), device=device), floats, integers, seen)


def _seen(logits_BV: Tensor, rows: list[SamplingRow], spare_rows: int) -> Tensor:
    """What each row has seen of the vocabulary, int32 [B and spare rows, V]."""
    seen = torch.zeros(len(rows) + spare_rows, logits_BV.shape[-1], dtype=torch.int32, device=logits_BV.device)
    for i, row in enumerate(rows):
        fill_seen(seen, i, row)
    return seen
