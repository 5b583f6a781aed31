"""Which ids a sequence has seen, as penalties need it: one int32 per id, [rows, vocabulary].

The low bits count how often an id was generated; two more bits say that it occurs in the prompt (IN_PROMPT), and that
it is banned before `min_tokens` (BANNED: stop ids). Rows of requests without penalties and `min_tokens` hold anything.
Letters in names: B rows, V vocabulary, T any number of ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

IN_PROMPT, BANNED = 1 << 30, 1 << 29
COUNT_MASK = BANNED - 1


def reset_(table: Tensor, row: int, prompt_ids: Tensor, output_ids: Tensor, banned_ids: Tensor) -> None:
    """Write a row of the table afresh. All ids int64 [T], on the table's device, repeated ids allowed.

    output_ids: generated so far, each counts. banned_ids: not to be drawn before `min_tokens`. It never waits.
    """
    seen_V = table[row]
    seen_V.zero_()
    seen_V.index_add_(0, output_ids, torch.ones_like(output_ids, dtype=table.dtype))
    for ids, bit in [(prompt_ids, IN_PROMPT), (banned_ids, BANNED)]:
        seen_V[ids] = seen_V[ids] | bit  # of equal ids, each writes the same


def unpack(seen_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(output counts int32, prompt mask, banned), each [B, V], as the plain sampler takes them."""
    return seen_BV & COUNT_MASK, (seen_BV & IN_PROMPT) != 0, (seen_BV & BANNED) != 0
