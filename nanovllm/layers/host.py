"""From Python numbers to tensors on a card, and sampled ids back, without waiting for the card."""

from __future__ import annotations

from array import array
from collections import deque
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


class PinnedRing:
    """Pinned buffers that small copies to a card start from, in turn; each is written again only when the copy that
    read it has ended. One thread, one stream. On a CPU the copies end at once.

    device: of the copies, which all arrive in the same memory: whatever reads it is queued before the next `send`.
    """

    def __init__(self, count: int, num_words: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._on_device = torch.empty(num_words, dtype=torch.int32, device=device)
        buffers = [torch.empty(num_words, dtype=torch.int32, pin_memory=pinned) for _ in range(count)]
        self._buffers = deque((buffer, torch.cuda.Event() if pinned else None) for buffer in buffers)

    def send(self, words: array[int]) -> Tensor:
        """Queue the copy of 32-bit words, at least one; where they arrive, int32 [len(words)], until the next call."""
        buffer, copied = self._buffers[0]
        self._buffers.rotate(-1)
        if copied is not None:
            copied.synchronize()  # it has, unless as many copies are queued as there are buffers
        host, arrived = buffer[: len(words)], self._on_device[: len(words)]
        host.copy_(torch.frombuffer(words, dtype=torch.int32))
        arrived.copy_(host, non_blocking=True)
        if copied is not None:
            copied.record()
        return arrived


class PinnedIds:
    """Pinned buffers that sampled ids come back through. Each is one step's from its launch, in one thread, until it is
    read, perhaps in another; then it is free for the next. More are made only while more steps are in flight than ever.

    count: buffers made now. max_rows: of a buffer.
    """

    def __init__(self, count: int, max_rows: int) -> None:
        self.max_rows = max_rows
        self._free = deque(self._make(max_rows) for _ in range(count))

    def _make(self, num_rows: int) -> Tensor:
        return torch.empty(num_rows, dtype=torch.int64, pin_memory=True)

    def fetch(self, token_ids: Tensor) -> Tensor:
        """Queue the copy of int64 [rows] from a card, on its current stream; the buffer that it will be in."""
        (num_rows,) = token_ids.shape
        too_many = num_rows > self.max_rows  # of one request with more answers than there are slots
        buffer = self._free.popleft() if self._free and not too_many else self._make(max(num_rows, self.max_rows))
        buffer[:num_rows].copy_(token_ids, non_blocking=True)
        return buffer

    def read(self, buffer: Tensor, num_rows: int) -> list[int]:
        """The ids of a copy that has ended. The buffer is the next step's from now on."""
        ids: list[int] = buffer[:num_rows].tolist()
        if len(buffer) == self.max_rows:
            self._free.append(buffer)
        return ids

    def clear(self) -> None:
        """Free the buffers, before the stream of their copies goes: torch asks it, when they go, whether it is done."""
        self._free.clear()
