"""One card's KV pages, and the copy of whole blocks between cards (or within one)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nanovllm.engine.block_copies import Lane, PeerWay, PinnedStaging, copy_by_engines, copy_run, merge_runs
from nanovllm.models.model_config import ModelConfig

# How blocks go to a card whose memory this one reaches: by measurement while prefill runs on the card they leave
# (tools/bench_copies.py; the table is in docs/benchmarks.md): 64 blocks of 9 MiB at 331 GB/s, while GEMMs lose 17 % of
# their rate, four streams no faster; one kernel, which waits for SMs, at 238 GB/s and 29 %.
COPY_WAY = PeerWay("engines", streams=2)
MAX_COPY_STREAMS = 4  # of each card, whatever a cache's `peer_way` takes of them
# A copy costs some 15 µs of host time, so engines cannot fill the link with blocks smaller than this; one kernel can.
MIN_ENGINE_BLOCK_BYTES = 1 << 20
SMALL_BLOCK_WAY = PeerWay("push")
RATE_BLOCKS = 64  # copied to measure a link's rate


class CopyHandle:
    """A copy in flight, or done. `num_bytes`: what it moves. `start` and `event`: timing events of the card it leaves,
    behind what the copy waited for and at its end; None on a CPU."""

    def __init__(
        self,
        num_bytes: int,
        cpu_seconds: float = 0.0,
        start: torch.cuda.Event | None = None,
        event: torch.cuda.Event | None = None,
    ) -> None:
        self.num_bytes = num_bytes
        self._cpu_seconds = cpu_seconds
        self.start = start
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
        if self.event is None or self.start is None:
            return self._cpu_seconds
        return self.start.elapsed_time(self.event) / 1e3 if self.done() else None


class KVCache:
    """`num_blocks` blocks of `block_size` tokens, and behind them the null block, which padding rows may write to.

    pages: one tensor [num_blocks + 1, layers, 2, block_size, kv_heads, head_dim]: a block is one contiguous run of
    `block_bytes`. `null_block` (= `num_blocks`) is that block's id.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        model_config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert num_blocks > 0 and block_size > 0, (num_blocks, block_size)
        self.num_blocks, self.block_size, self.null_block = num_blocks, block_size, num_blocks
        heads, head_dim = model_config.num_key_value_heads, model_config.head_dim
        block_shape = (model_config.num_hidden_layers, 2, block_size, heads, head_dim)
        self.pages = torch.zeros(num_blocks + 1, *block_shape, dtype=dtype, device=device)
        self.device = self.pages.device  # with its index, also where the caller said only "cuda"
        self.blocks = self.pages.unbind(0)  # a view each
        self.block_bytes = self.pages[0].nbytes
        self.peer_way = COPY_WAY if self.block_bytes >= MIN_ENGINE_BLOCK_BYTES else SMALL_BLOCK_WAY
        self._peer: bool | None = None  # not asked yet
        self._staging: PinnedStaging | None = None  # made when first needed
        self._departures: list[torch.cuda.Stream] = []
        self._arrivals: list[torch.cuda.Stream] = []
        if self.device.type == "cuda":
            self._departures, self._arrivals = self._copy_streams(), self._copy_streams()
            torch.cuda.synchronize(self.device)  # the pages are cleared before any other stream writes them

    def layer_view(self, layer: int) -> tuple[Tensor, Tensor]:
        """(k_pages, v_pages) of one layer: strided views [blocks, block_size, kv_heads, head_dim]."""
        return self.pages[:, layer, 0], self.pages[:, layer, 1]

    def _copy_streams(self) -> list[torch.cuda.Stream]:
        """Our own, so that no compute stream waits for a copy. Not of the default priority: torch hands streams out
        again after 32 of a priority, and the compute streams are of that one."""
        streams = [torch.cuda.Stream(self.device, priority=-1) for _ in range(MAX_COPY_STREAMS)]
        for stream in streams:
            self.pages.record_stream(stream)
        return streams

    def copy_way(self, other: KVCache) -> Literal["host", "engines", "push", "staged"]:
        """How blocks go from here to `other`: on the host; by copy engines; by a kernel that writes straight into the
        other's memory; staged in pinned memory, where the cards cannot reach each other's."""
        if self.device.type != "cuda":
            return "host"
        if self.device == other.device:
            return "push"
        return self.peer_way.name if self._reaches(other) else "staged"

    @torch.inference_mode()
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
        for run in merge_runs(block_pairs):
            copy_run(self.pages, other.pages, run)
        return CopyHandle(len(block_pairs) * self.block_bytes, time.perf_counter() - started)

    def _mirror_on_stream(
        self,
        other: KVCache,
        block_pairs: Sequence[tuple[int, int]],
        stream: torch.cuda.Stream,
        after: Sequence[torch.cuda.Event],
    ) -> CopyHandle:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            start.record(stream)
            try:
                self._send(other, block_pairs, stream)
            except Exception:
                self._drain(other, stream)
                raise
            end.record(stream)
        self.pages.record_stream(stream)
        return CopyHandle(len(block_pairs) * self.block_bytes, start=start, event=end)

    def _send(self, other: KVCache, block_pairs: Sequence[tuple[int, int]], stream: torch.cuda.Stream) -> None:
        """Queue the copy between what `stream`, the current one, holds and what comes next on it."""
        way = self.copy_way(other)
        if way == "engines":
            lanes = [Lane(*pair) for pair in zip(self._departures, other._arrivals, strict=True)]
            count = self.peer_way.streams
            assert 0 < count <= len(lanes), f"{count} streams of {len(lanes)}"
            copy_by_engines(self.blocks, other.blocks, block_pairs, lanes[:count], stream)
        elif way == "push":
            from nanovllm.kernels.push_blocks import push_blocks  # here: a CPU build of torch has no Triton

            push_blocks(self.pages, other.pages, block_pairs, self.peer_way.programs)
            other._arrivals[0].wait_stream(stream)  # so that the other's memory outlives the kernel
        else:
            if self._staging is None:
                self._staging = PinnedStaging(self.pages)
            self._staging.copy(self.pages, other.pages, block_pairs, stream, other._arrivals[0])

    def _drain(self, other: KVCache, stream: torch.cuda.Stream) -> None:
        """Wait for the part of a failed copy that was queued: its target blocks will be somebody else's."""
        for queued in (stream, *self._departures, *other._arrivals):
            queued.synchronize()

    def _reaches(self, other: KVCache) -> bool:
        """Whether this card may write the memory of `other`, on another card."""
        if self._peer is None:
            self._peer = torch.cuda.can_device_access_peer(self.device, other.device)
            torch.zeros(1, device=self.device).to(other.device)  # torch enables the access with its first copy
        return self._peer

    def _check_pairs(self, other: KVCache, block_pairs: Sequence[tuple[int, int]]) -> None:
        assert other.pages.shape[1:] == self.pages.shape[1:] and other.pages.dtype == self.pages.dtype
        assert other.device.type == self.device.type, f"no copy from {self.device} to {other.device}"
        sources, targets = {src for src, _ in block_pairs}, {dst for _, dst in block_pairs}
        assert len(targets) == len(block_pairs), "a block is the target of two copies"
        assert all(0 <= src < self.num_blocks for src in sources), f"source outside 0 … {self.num_blocks - 1}"
        last = other.num_blocks - 1
        assert all(0 <= dst <= last for dst in targets), f"target outside 0 … {last}"
        assert other is not self or sources.isdisjoint(targets), "source and target blocks overlap"


def measure_rate(source: KVCache, target: KVCache, stream: torch.cuda.Stream | None = None) -> float:
    """GB/s of a copy of up to 64 blocks from `source` to `target`, no two of them neighbours: the median of three.

    Overwrites the first blocks of both and leaves them cleared: only before any block holds anything. `stream`: of
    the source's card, None on a CPU. Waits for the cards.
    """
    assert source is not target
    count = min(RATE_BLOCKS, source.num_blocks, target.num_blocks)
    pairs = [(i, count - 1 - i) for i in range(count)]
    source.pages[:count].normal_()
    _synchronize(source)
    handles = []
    for _ in range(1 + 3):  # the first is not counted: it may make buffers
        handles.append(source.mirror_to(target, pairs, stream))
        handles[-1].wait()
    for cache in (source, target):
        cache.pages[:count].zero_()
        _synchronize(cache)
    return statistics.median(handle.num_bytes / max(handle.seconds or 0.0, 1e-9) for handle in handles[1:]) / 1e9


def _synchronize(cache: KVCache) -> None:
    if cache.device.type == "cuda":  # only what was queued here: another engine may be busy on this card
        torch.cuda.current_stream(cache.device).synchronize()
