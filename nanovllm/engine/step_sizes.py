"""Sizes of mixed steps: how many prompt tokens travel with how many decode rows. Imports no torch.

What a product costs follows its rows in tiles of 128 and more. So it is the sum of tokens and rows that is a round
number, and the rows are those of the captured bucket, padding included.
"""

from __future__ import annotations

STEP_TOKENS = (256, 512, 1024, 2048)  # prompts' tokens and decode rows of captured steps
MIN_CHUNK_TOKENS = 64
MAX_SEQUENCES = 32  # prompts of a captured step
MIN_BUCKET = 16
FINE_BUCKETS = 128  # from here on rows that are not there cost as much as the tokens in their place would
MAX_BUCKETS = 10  # of rows; each is captured with up to four numbers of tokens, and that takes time at start-up
# Of a step in which the decode card has nothing to decode: what arrives waits no longer.
HELP_ALONE_TOKENS = 2048
LENT_TOKENS = (512, 1024, 2048)  # prompts' tokens of a step on SMs that a decode card lends; the last one: at most
LENT_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384)  # of decode rows beside it; `max_num_seqs` is one more


def row_buckets(max_num_seqs: int) -> list[int]:
    """Numbers of decode rows up to exactly `max_num_seqs`: twofold apart, and where fine ones pay one in between."""
    powers = [MIN_BUCKET << i for i in range(max_num_seqs.bit_length())]
    sizes = sorted([*powers, *(size * 3 // 2 for size in powers if size >= FINE_BUCKETS)])
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs][-MAX_BUCKETS:]


def chunk_sizes(num_rows: int, max_num_seqs: int) -> list[int]:
    """Numbers of prompt tokens that fill a step of so many decode rows, ascending."""
    bucket = _bucket_of(num_rows, max_num_seqs)
    return [total - bucket for total in _totals(bucket)]


def tokens_within(budget_tokens: int, num_rows: int, max_num_seqs: int) -> int:
    """Prompt tokens beside so many decode rows in a step of at most `budget_tokens`, at least 1: of a small budget the
    most that fill a captured step, padding included; of a larger one what the rows leave."""
    rest = max(1, budget_tokens - num_rows)
    if num_rows == 0 or budget_tokens > STEP_TOKENS[-2]:
        return rest
    bucket = _bucket_of(num_rows, max_num_seqs)
    return max((total - bucket for total in _totals(bucket) if total <= budget_tokens), default=rest)


def captured_sizes(max_num_seqs: int, max_tokens: int) -> list[tuple[int, int]]:
    """(prompt tokens, decode rows) to capture, for steps of at most `max_tokens` and `max_num_seqs`, ascending."""
    sizes = {(min(t - b, max_tokens), b) for b in row_buckets(max_num_seqs) for t in _totals(b)}
    return sorted(sizes, key=lambda size: (sum(size), size))


def lent_sizes(max_tokens: int) -> list[int]:
    """Numbers of prompt tokens to capture for lent steps of at most `max_tokens`, ascending."""
    return sorted({min(size, max_tokens) for size in LENT_TOKENS})


def _bucket_of(num_rows: int, max_num_seqs: int) -> int:
    return next(size for size in row_buckets(max_num_seqs) if size >= num_rows)


def _totals(bucket: int) -> list[int]:
    """STEP_TOKENS that leave room for a chunk; behind a bucket that fills them all, its multiples."""
    if bucket + MIN_CHUNK_TOKENS > STEP_TOKENS[-2]:
        return [bucket + STEP_TOKENS[0], bucket + STEP_TOKENS[-1]]
    return [total for total in STEP_TOKENS if total >= bucket + MIN_CHUNK_TOKENS]
