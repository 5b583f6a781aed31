"""From Python numbers to tensors on a card, without waiting for the card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any] | Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor of `values`, numbers or a host tensor, on `device`.

    On CUDA the copy is queued on the current stream, from pinned memory: one from ordinary memory would block until the
    stream is idle, and no step could be launched ahead.
    """
    host = values.to(dtype) if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
