"""Copy scattered KV blocks into another card's memory, or within one card's, with one kernel on the source card.

Stores go straight over the link (peer access), so nothing is gathered first and nothing scattered afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.layers.host import to_device

WORDS = 8192  # 32-bit words that a program moves at a time: 32 KiB
PROGRAMS = 64  # enough to fill NVLink with reads in flight, few enough to leave the card to prefill


@triton.jit(do_not_specialize=["num_pieces"])
def _push_kernel(
    target_ptr: tl.tensor,
    source_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    num_pieces: tl.tensor,
    BLOCK_WORDS: tl.constexpr,
    PIECES: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Piece i is part i % PIECES of pair i // PIECES; programs take turns."""
    word = tl.arange(0, WORDS)
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        pair = piece // PIECES
        source = tl.load(pairs_ptr + pair * 2).to(tl.int64) * BLOCK_WORDS
        target = tl.load(pairs_ptr + pair * 2 + 1).to(tl.int64) * BLOCK_WORDS
        at = (piece % PIECES) * WORDS + word
        values = tl.load(source_ptr + source + at, mask=at < BLOCK_WORDS)
        tl.store(target_ptr + target + at, values, mask=at < BLOCK_WORDS)


def push_blocks(
    source: Tensor, target: Tensor, block_pairs: Sequence[tuple[int, int]], programs: int = PROGRAMS
) -> None:
    """Queue the copy of whole blocks on the current stream of `source`'s card.

    source, target: contiguous, equal in dtype and shape but for the first dimension, which counts blocks; a block is
    a multiple of 4 bytes. `target` may lie on a peer card to which access is enabled (a torch copy does that).
    block_pairs: (block of source, block of target), disjoint if both are one tensor. programs: how many share the work.
    """
    assert source.is_contiguous() and target.is_contiguous() and source[0].nbytes % 4 == 0
    block_words = source[0].nbytes // 4
    pieces = triton.cdiv(block_words, WORDS)
    with torch.cuda.device_of(source):
        pairs = to_device(block_pairs, torch.int32, source.device)
        num_pieces = len(block_pairs) * pieces
        _push_kernel[(min(programs, num_pieces),)](
            target.view(torch.int32),
            source.view(torch.int32),
            pairs,
            num_pieces,
            BLOCK_WORDS=block_words,
            PIECES=pieces,
            WORDS=WORDS,
            num_warps=8,
        )


def push_blocks_reference(source: Tensor, target: Tensor, block_pairs: Sequence[tuple[int, int]]) -> None:
    """The same, block by block."""
    for src, dst in block_pairs:
        target[dst].copy_(source[src])
