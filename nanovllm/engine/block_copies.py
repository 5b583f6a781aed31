"""Ways for whole blocks to get into another card's pages: by copy engines over several streams, or by pinned memory.

Pages are contiguous tensors [blocks, ...] that differ at most in their number of blocks; a run is (first source, first
target, length). Nothing here waits for a card. The third way is a kernel: `kernels/push_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Run = tuple[int, int, int]

LANE_PIECE_BLOCKS = 16  # queued at once on one lane
STAGING_PIECE_BYTES = 64 << 20  # each of the two pinned buffers: long enough transfers to fill PCIe


@dataclass(frozen=True)
class PeerWay:
    """How blocks go to a card whose memory this one reaches: over `streams` by copy engines, or by a kernel that
    `programs` of this card's SMs run."""

    name: Literal["engines", "push"] = "engines"
    streams: int = 2
    programs: int = 64


class Lane(NamedTuple):
    """Copies are queued on `source`, a stream of the card they leave. torch also orders each of them with the current
    stream of the card it goes to, before and behind: make that `target`, which nothing else uses. With one `target`
    for all lanes, the lanes would wait for each other."""

    source: torch.cuda.Stream
    target: torch.cuda.Stream


def merge_runs(block_pairs: Sequence[tuple[int, int]]) -> list[Run]:
    """The maximal runs where both ids count up together, in order of their sources."""
    runs: list[Run] = []
    for src, dst in sorted(block_pairs):
        if runs and (src, dst) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((src, dst, 1))
    return runs


def deal_pairs(
    block_pairs: Sequence[tuple[int, int]], num_lanes: int
) -> Iterator[tuple[int, Sequence[tuple[int, int]]]]:
    """The pairs in pieces, each with its lane: round after round, so that no lane waits long for its first one."""
    size = min(LANE_PIECE_BLOCKS, -(-len(block_pairs) // num_lanes))
    for number, begin in enumerate(range(0, len(block_pairs), max(1, size))):
        yield number % num_lanes, block_pairs[begin : begin + size]


def copy_run(source: Tensor, target: Tensor, run: Run) -> None:
    """Queue one copy on the current stream of the source's card (of the target's, if the source is host memory)."""
    src, dst, length = run
    target[dst : dst + length].copy_(source[src : src + length], non_blocking=True)


def copy_blocks(
    source_blocks: Sequence[Tensor], target_blocks: Sequence[Tensor], block_pairs: Sequence[tuple[int, int]]
) -> None:
    """Queue one copy a block on the current stream of the source's card.

    One call for all of them, of views made beforehand: each call of torch lets go of Python's lock, and to get it back
    from the engine's other threads can take longer than the copy (46 of 330 GB/s with a call a block).
    """
    targets = [target_blocks[dst] for _, dst in block_pairs]
    torch._foreach_copy_(targets, [source_blocks[src] for src, _ in block_pairs], non_blocking=True)


def copy_by_engines(
    source_blocks: Sequence[Tensor],
    target_blocks: Sequence[Tensor],
    block_pairs: Sequence[tuple[int, int]],
    lanes: Sequence[Lane],
    stream: torch.cuda.Stream,
) -> None:
    """Queue every block as one peer copy. The lanes begin behind what `stream` holds, and `stream` goes on behind them.

    source_blocks, target_blocks: a view of every block of each card. One copy at a time leaves the link idle between
    two; with several streams they overlap.
    """
    lanes = lanes[: len(block_pairs)]
    begin = stream.record_event()
    for lane in lanes:
        lane.source.wait_event(begin)
    with torch.cuda.stream(lanes[0].target), torch.cuda.stream(lanes[0].source):  # restores both cards at its end
        for index, pairs in deal_pairs(block_pairs, len(lanes)):
            torch.cuda.set_stream(lanes[index].target)
            torch.cuda.set_stream(lanes[index].source)  # the last one set is the current device's
            copy_blocks(source_blocks, target_blocks, pairs)
    for lane in lanes:
        stream.wait_stream(lane.source)


class PinnedStaging:
    """Two pinned buffers on the way between cards that cannot reach each other's memory.

    Blocks go piece by piece: while the target's card reads one buffer, the source's card fills the other. All of it is
    work of copy engines: no kernel waits for SMs, and no card gives memory to it. One instance serves one direction,
    and one thread at a time.
    """

    def __init__(self, pages: Tensor, piece_bytes: int = STAGING_PIECE_BYTES) -> None:
        self.piece_blocks = max(1, piece_bytes // pages[0].nbytes)
        shape = self.piece_blocks, *pages.shape[1:]
        pinned = pages.is_cuda
        self._buffers = [torch.empty(shape, dtype=pages.dtype, pin_memory=pinned) for _ in range(2)]
        self._drained: list[torch.cuda.Event | None] = [None, None]  # when a buffer's last piece has left it

    def copy(
        self,
        source: Tensor,
        target: Tensor,
        block_pairs: Sequence[tuple[int, int]],
        stream: torch.cuda.Stream,
        arrivals: torch.cuda.Stream,
    ) -> None:
        """Queue the copy behind what `stream`, of the source's card, holds; `stream` goes on when all has arrived.

        arrivals: a stream of the target's card.
        """
        ordered = sorted(block_pairs)  # so that a run stays in one piece, but for its end
        for number, begin in enumerate(range(0, len(ordered), self.piece_blocks)):
            runs = merge_runs(ordered[begin : begin + self.piece_blocks])
            self._copy_piece(number % 2, source, target, runs, stream, arrivals)
        stream.wait_stream(arrivals)

    def _copy_piece(
        self,
        which: int,
        source: Tensor,
        target: Tensor,
        runs: Sequence[Run],
        stream: torch.cuda.Stream,
        arrivals: torch.cuda.Stream,
    ) -> None:
        buffer, drained = self._buffers[which], self._drained[which]
        if drained is not None:
            stream.wait_event(drained)
        inward, outward = split_runs(runs)
        with torch.cuda.stream(stream):
            for run in inward:
                copy_run(source, buffer, run)
        arrivals.wait_event(stream.record_event())
        with torch.cuda.stream(arrivals):
            for run in outward:
                copy_run(buffer, target, run)
        self._drained[which] = arrivals.record_event()


def split_runs(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The same runs by way of a buffer that they fill in their order: (source to buffer, buffer to target)."""
    inward, outward, slot = [], [], 0
    for src, dst, length in runs:
        inward.append((src, slot, length))
        outward.append((slot, dst, length))
        slot += length
    return inward, outward
