"""The order in which a pipelined decode step issues its stages: two lanes, several micro-batches. Imports no torch.

Each lane runs its stages in the order in which they were issued. Stages of one micro-batch alternate between the lanes,
so that a stage waits for exactly one other: the one before it of its own micro-batch. While one micro-batch is in A,
another is in F.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Literal, NamedTuple

Lane = Literal["attention", "ffn"]
Item = tuple[int, int]  # (micro-batch, layer)


class StageCall(NamedTuple):
    """One stage of one micro-batch. `after`: the lane of the stage that it waits for, its micro-batch's last one."""

    lane: Lane
    micro_batch: int
    layer: int
    after: Lane | None


def attention_queue(num_micro_batches: int, num_layers: int) -> list[Item]:
    """What the attention lane runs, in order."""
    return [(batch, layer) for layer in range(num_layers) for batch in range(num_micro_batches)]


def ffn_queue(num_micro_batches: int, num_layers: int, lead: bool) -> list[Item]:
    """What the FFN lane runs, in order. `lead`: each micro-batch begins there, with a stage of layer -1."""
    return [(batch, layer) for layer in range(-lead, num_layers) for batch in range(num_micro_batches)]


def pipeline_order(num_micro_batches: int, num_layers: int, lead: bool = False) -> Iterator[StageCall]:
    """Every stage of a step, none before the one that it waits for.

    Both queues in turn: where a step is launched eagerly, neither lane runs dry for the other's launches.
    """
    if num_micro_batches < 1 or num_layers < 1:
        raise ValueError(f"{num_micro_batches} micro-batches of {num_layers} layers: at least one of each")
    attention = (
        StageCall("attention", *item, after="ffn" if lead or item[1] else None)
        for item in attention_queue(num_micro_batches, num_layers)
    )
    ffn = (
        StageCall("ffn", *item, after="attention" if item[1] >= 0 else None)
        for item in ffn_queue(num_micro_batches, num_layers, lead)
    )
    first, second = (ffn, attention) if lead else (attention, ffn)
    for pair in zip_longest(first, second):
        yield from (call for call in pair if call is not None)
