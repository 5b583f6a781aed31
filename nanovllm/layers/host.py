"""From Python numbers to tensors on a card, without waiting for the card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SMALL_PINNED_BYTES, LARGE_PINNED_BYTES = 64 << 10, 2 << 20
SMALL_PINNED_BLOCKS, LARGE_PINNED_BLOCKS = 64, 8  # of each size: several steps are in flight, of some ten blocks each


def to_device(values: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor of `values`, numbers or a host tensor, on `device`.

    On CUDA the copy is queued on the current stream, from pinned memory: one from ordinary memory would block until the
    stream is idle, and no step could be launched ahead.
    """
    host = values.to(dtype) if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def reserve_pinned() -> None:
    """Take pinned memory for what steps send and bring back: torch keeps it, in blocks of powers of two.

    From the driver, in mid-service, each new block would wait until the cards are idle.
    """
    size_bytes, blocks = 512, []
    while size_bytes <= LARGE_PINNED_BYTES:
        count = SMALL_PINNED_BLOCKS if size_bytes <= SMALL_PINNED_BYTES else LARGE_PINNED_BLOCKS
        blocks += [torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
        size_bytes *= 2
