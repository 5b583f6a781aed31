"""Runs of 32-bit words from one packet to their places (Triton), and the packet's form.

A packet, int32 words: for each run RUN_WORDS (its place in the target, where its words begin behind all headers, how
many there are, how long the run is, and the word that fills it up beyond them); then the words of all runs. No two runs
of a packet overlap: they are written in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RUN_WORDS = 5


@triton.jit
def _write_runs_kernel(
    target_ptr: tl.tensor, packet_ptr: tl.tensor, RUN_WORDS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Grid (runs)."""
    run_ptr = packet_ptr + tl.program_id(0) * RUN_WORDS
    run_target_ptr = target_ptr + tl.load(run_ptr)
    words_ptr = packet_ptr + tl.num_programs(0) * RUN_WORDS + tl.load(run_ptr + 1)
    count, length, padding = tl.load(run_ptr + 2), tl.load(run_ptr + 3), tl.load(run_ptr + 4)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        words = tl.load(words_ptr + at, mask=at < count, other=0)
        tl.store(run_target_ptr + at, tl.where(at < count, words, padding), mask=at < length)


def write_runs(packet: Tensor, num_runs: int, target: Tensor) -> None:
    """Write a packet's runs into `target`. Both int32, contiguous, one dimension; num_runs > 0. Queues one kernel."""
    assert packet.dtype == target.dtype == torch.int32 and packet.is_contiguous() and target.is_contiguous()
    with torch.cuda.device_of(target):
        _write_runs_kernel[(num_runs,)](target, packet, RUN_WORDS=RUN_WORDS, BLOCK=256, num_warps=2)


def write_runs_reference(packet: Tensor, num_runs: int, target: Tensor) -> None:
    """The same in plain torch, on any device; slow."""
    words = packet[num_runs * RUN_WORDS :]
    for place, begin, count, length, padding in packet[: num_runs * RUN_WORDS].view(num_runs, RUN_WORDS).tolist():
        target[place : place + length] = padding
        target[place : place + count] = words[begin : begin + count]
