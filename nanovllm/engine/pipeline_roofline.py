"""Where a pipelined decode step can be faster at all: floors from bytes and operations, by SMs. Imports no torch.

Attention does nothing but read KV, matrix products nothing but read weights and multiply. What a number of SMs reads
and multiplies at most was measured on an H200 (docs/benchmarks.md); between the points it is interpolated. Norms and
other small kernels are left out: another lane's work may hide them, hence some slack.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from nanovllm.engine.green_manager import SmCounts
from nanovllm.models.model_config import ModelConfig

Curve = tuple[tuple[int, float], ...]  # (SMs, rate)
WHOLE_CARD_SMS = 132
READ_TB_PER_S: Curve = ((0, 0.0), (8, 0.92), (16, 1.80), (24, 2.61), (32, 3.15), (48, 4.15), (64, 4.41), (132, 4.45))
TFLOPS: Curve = (
    *((0, 0.0), (8, 57.0), (16, 112.0), (32, 220.0), (48, 322.0), (64, 417.0), (80, 537.0), (96, 589.0)),
    *((112, 637.0), (128, 694.0), (132, 797.0)),
)
BYTES_PER_VALUE = 2
SLACK = 1.05  # what small kernels add to a layer of large batches at least


class LayerWork(NamedTuple):
    """What one layer of a decode step takes, in bytes and operations."""

    kv_bytes: float
    weight_bytes: float
    flops: float

    @classmethod
    def of(cls, config: ModelConfig, batch: int, context_tokens: float) -> LayerWork:
        """Of `batch` rows that attend to so many tokens each."""
        heads = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
        weights = heads + 3 * config.hidden_size * config.intermediate_size
        kv_bytes = batch * context_tokens * 2 * config.kv_size * BYTES_PER_VALUE
        return cls(kv_bytes, weights * BYTES_PER_VALUE, 2.0 * weights * batch)


def roofline_can_win(
    config: ModelConfig, batch: int, context_tokens: float, split: SmCounts, num_micro_batches: int = 2
) -> bool:
    """Whether a pipelined step over these SMs may be faster than the sequential one, by their floors, give or take
    `SLACK`."""
    work = LayerWork.of(config, batch, context_tokens)
    return pipelined_layer_s(work, split, num_micro_batches) < SLACK * sequential_layer_s(work)


def sequential_layer_s(work: LayerWork) -> float:
    """Seconds of a layer on the whole card, attention and products one after the other."""
    return _read_s(work.kv_bytes, WHOLE_CARD_SMS) + _product_s(work, WHOLE_CARD_SMS, 1)


def pipelined_layer_s(work: LayerWork, split: SmCounts, num_micro_batches: int) -> float:
    """Seconds of a layer of all micro-batches: of the slower lane, or of the memory that both read. Each micro-batch
    reads the weights anew."""
    attention_s = _read_s(work.kv_bytes, split.attention_sms)
    ffn_s = num_micro_batches * _product_s(work, split.ffn_sms, num_micro_batches)
    both_s = _read_s(work.kv_bytes + num_micro_batches * work.weight_bytes, WHOLE_CARD_SMS)
    if num_micro_batches == 1:
        return attention_s + ffn_s
    return max(attention_s, ffn_s, both_s)


def _product_s(work: LayerWork, num_sms: int, num_micro_batches: int) -> float:
    """Of one micro-batch."""
    multiply_s = work.flops / num_micro_batches / (_at(TFLOPS, num_sms) * 1e12)
    return max(_read_s(work.weight_bytes, num_sms), multiply_s)


def _read_s(num_bytes: float, num_sms: int) -> float:
    return num_bytes / (_at(READ_TB_PER_S, num_sms) * 1e12)


def _at(curve: Curve, num_sms: int) -> float:
    """The curve at so many SMs; beyond its end, its last value."""
    right = bisect_right(curve, num_sms, key=lambda point: point[0])
    if right == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[right - 1], curve[right]
    return y0 + (y1 - y0) * (num_sms - x0) / (x1 - x0)
