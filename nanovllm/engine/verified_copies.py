"""Checksums of copied blocks, on both cards: a debug mode, which finds a link or a plan that damages KV."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm.engine.kv_cache import CopyHandle, KVCache


class CorruptCopyError(RuntimeError):
    """What has arrived is not what was sent."""


class VerifiedCopy(CopyHandle):
    """A copy that is compared with its source when somebody has waited for it. Until then nobody may write either."""

    def __init__(
        self, copy: CopyHandle, source: KVCache, target: KVCache, block_pairs: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__(copy.num_bytes, copy.seconds or 0.0, copy.start, copy.event)
        self._source, self._target, self._pairs = source, target, block_pairs

    def wait(self) -> None:
        """As of any copy; `CorruptCopyError` for the first block that differs."""
        super().wait()
        for src, dst in self._pairs:
            sent, arrived = checksum(self._source.blocks[src]), checksum(self._target.blocks[dst])
            if sent != arrived:
                raise CorruptCopyError(f"block {src} has checksum {sent:#x}, its copy {dst} has {arrived:#x}")


@torch.inference_mode()
def checksum(block: Tensor) -> int:
    """Of a contiguous block's bits: the sum of its 32-bit words, each times its place, modulo 2**64. Waits for it."""
    words = block.view(-1).view(torch.int32).long()
    places = torch.arange(1, len(words) + 1, device=block.device)
    return int((words * places).sum()) % (1 << 64)
