"""One card's KV pages, and the copy of whole blocks between cards (or within one)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm.layers.host import to_device
from nanovllm.models.model_config import ModelConfig

# A copy engine needs large pieces to fill the link (NVLink: 282 of 396 GB/s at 16 MiB, 77 at 1 MiB): where
# the mean run is shorter, gathering first is faster.
MIN_RUN_BYTES = 16 << 20
# Bounds the memory that gathering takes on each card, next to a pool that fills it.
MAX_STAGING_BYTES = 256 << 20


class CopyHandle:
    """A copy in flight, or done. `num_bytes`: what it moves. `event`: its end on CUDA, None on a CPU."""

    def __init__(
        self,
        num_bytes: int,
        cpu_seconds: float = 0.0,
        start: torch.cuda.Event | None = None,
        event: torch.cuda.Event | None = None,
    ) -> None:
        self.num_bytes = num_bytes
        self._cpu_seconds = cpu_seconds
        self._start = start
        self.event = event

    def done(self) -> bool:
        """Whether every byte has arrived. Never blocks."""
        return self.event is None or self.event.query()

    def wait(self) -> None:
        """Block the calling thread until `done`."""
        if self.event is not None:
            self.event.synchronize()

    @property
    def seconds(self) -> float | None:
        """Time the copy itself took, without what it waited for; None until it is done."""
        if self.event is None or self._start is None:
            return self._cpu_seconds
        return self._start.elapsed_time(self.event) / 1e3 if self.done() else None


class KVCache:
    """`num_blocks` blocks of `block_size` tokens, plus `null_blocks` that padding rows may write to.

    pages: one tensor [num_blocks + null_blocks, layers, 2, block_size, kv_heads, head_dim]: a block is one
    contiguous run of `block_bytes`. `null_block` (= `num_blocks`) is the first null block's id.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        model_config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        null_blocks: int = 1,
    ) -> None:
        assert num_blocks > 0 and block_size > 0 and null_blocks > 0, (num_blocks, block_size, null_blocks)
        self.num_blocks, self.block_size, self.null_block = num_blocks, block_size, num_blocks
        heads, head_dim = model_config.num_key_value_heads, model_config.head_dim
        block_shape = (model_config.num_hidden_layers, 2, block_size, heads, head_dim)
        self.pages = torch.zeros(num_blocks + null_blocks, *block_shape, dtype=dtype, device=device)
        self.device = self.pages.device  # with its index, also where the caller said only "cuda"
        self.block_bytes = self.pages[0].nbytes
        self._arrivals: torch.cuda.Stream | None = None
        self._peer: bool | None = None  # not asked yet
        if self.device.type == "cuda":
            self._arrivals = torch.cuda.Stream(self.device)  # our own: no compute stream waits for a copy
            torch.cuda.synchronize(self.device)  # the pages are cleared before any other stream writes them

    def layer_view(self, layer: int) -> tuple[Tensor, Tensor]:
        """(k_pages, v_pages) of one layer: strided views [blocks, block_size, kv_heads, head_dim]."""
        return self.pages[:, layer, 0], self.pages[:, layer, 1]

    def mirror_to(
        self,
        other: KVCache,
        block_pairs: Sequence[tuple[int, int]],
        stream: torch.cuda.Stream | None = None,
        after: Sequence[torch.cuda.Event] = (),
    ) -> CopyHandle:
        """Copy whole blocks, pairs (block here, block in `other`); `other` may be self (disjoint blocks).

        On CUDA: queued on `stream` (a side stream of this card) behind the events `after`; whoever reads the
        copies waits for the handle's event. On a CPU: complete on return.
        """
        self._check_pairs(other, block_pairs)
        if not block_pairs:
            return CopyHandle(0)
        if self.device.type == "cuda":
            assert stream is not None and stream.device == self.device, f"{stream} is not of {self.device}"
            return self._mirror_on_stream(other, block_pairs, stream, after)
        started = time.perf_counter()
        self._copy(other, block_pairs)
        return CopyHandle(len(block_pairs) * self.block_bytes, time.perf_counter() - started)

    def _mirror_on_stream(
        self,
        other: KVCache,
        block_pairs: Sequence[tuple[int, int]],
        stream: torch.cuda.Stream,
        after: Sequence[torch.cuda.Event],
    ) -> CopyHandle:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # A peer copy is ordered with the current streams of both cards: over there, make that our own one.
        arrivals = stream if other.device == self.device else other._arrivals
        assert arrivals is not None
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(arrivals), torch.cuda.stream(stream):
            start.record(stream)
            self._copy(other, block_pairs, arrivals)
            stream.wait_stream(arrivals)
            end.record(stream)
        self.pages.record_stream(stream)
        other.pages.record_stream(arrivals)
        return CopyHandle(len(block_pairs) * self.block_bytes, start=start, event=end)

    def _copy(
        self,
        other: KVCache,
        block_pairs: Sequence[tuple[int, int]],
        arrivals: torch.cuda.Stream | None = None,
    ) -> None:
        """Contiguous runs one by one where they are long; else one kernel that pushes over the link, or, where the
        cards cannot reach each other's memory, gather, transfer, and scatter on `arrivals`."""
        runs = merge_runs(block_pairs)
        if len(runs) == 1 or len(block_pairs) * self.block_bytes >= len(runs) * MIN_RUN_BYTES:
            for src, dst, length in runs:
                other.pages[dst : dst + length].copy_(self.pages[src : src + length], non_blocking=True)
            return
        if self._reaches(other):
            from nanovllm.kernels.push_blocks import push_blocks  # here: a CPU build of torch has no Triton

            push_blocks(self.pages, other.pages, block_pairs)
            return
        piece = max(1, MAX_STAGING_BYTES // self.block_bytes)
        for begin in range(0, len(block_pairs), piece):
            self._copy_gathered(other, block_pairs[begin : begin + piece], arrivals)

    def _reaches(self, other: KVCache) -> bool:
        """Whether a kernel of this card may write the other's memory."""
        if self.device.type != "cuda" or self.device == other.device:
            return self.device.type == "cuda"
        if self._peer is None:
            self._peer = torch.cuda.can_device_access_peer(self.device, other.device)
            torch.zeros(1, device=self.device).to(other.device)  # torch enables the access with its first copy
        return self._peer

    def _copy_gathered(
        self, other: KVCache, block_pairs: Sequence[tuple[int, int]], arrivals: torch.cuda.Stream | None
    ) -> None:
        """Each staging tensor is made, used and freed on its card's current stream, as allocators need."""
        sources, targets = zip(*block_pairs, strict=True)
        gathered = self.pages.index_select(0, to_device(sources, torch.int64, self.device))
        arrived = gathered.to(other.device, non_blocking=True)
        with torch.cuda.stream(arrivals):
            other.pages.index_copy_(0, to_device(targets, torch.int64, other.device), arrived)

    def _check_pairs(self, other: KVCache, block_pairs: Sequence[tuple[int, int]]) -> None:
        assert other.pages.shape[1:] == self.pages.shape[1:] and other.pages.dtype == self.pages.dtype
        assert other.device.type == self.device.type, f"no copy from {self.device} to {other.device}"
        sources, targets = {src for src, _ in block_pairs}, {dst for _, dst in block_pairs}
        assert len(targets) == len(block_pairs), "a block is the target of two copies"
        assert all(0 <= src < self.num_blocks for src in sources), f"source outside 0 … {self.num_blocks - 1}"
        last = other.num_blocks - 1
        assert all(0 <= dst <= last for dst in targets), f"target outside 0 … {last}"
        assert other is not self or sources.isdisjoint(targets), "source and target blocks overlap"


def merge_runs(block_pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(first source, first target, length) of the maximal runs where both ids count up together."""
    runs: list[tuple[int, int, int]] = []
    for src, dst in sorted(block_pairs):
        if runs and (src, dst) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((src, dst, 1))
    return runs
