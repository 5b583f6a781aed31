"""From Python numbers to tensors on a card, without waiting for the card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PINNED_BLOCKS, LARGEST_PINNED_POWER = 8, 21  # of each size from 512 bytes to 2 MiB


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
    blocks = [
        torch.empty(1 << power, dtype=torch.uint8, pin_memory=True)
        for power in range(9, LARGEST_PINNED_POWER + 1)
        for _ in range(PINNED_BLOCKS)
    ]
    del blocks
