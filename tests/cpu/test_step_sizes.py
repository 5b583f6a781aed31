"""Sizes of mixed steps."""

from __future__ import annotations

import pytest

from nanovllm.engine.step_sizes import MIN_CHUNK_TOKENS, captured_sizes, chunk_sizes, row_buckets, tokens_within


def test_which_steps_are_captured() -> None:
    sizes = captured_sizes(512, 16384)
    assert sizes[0] == (64, 192) and sizes[-1] == (2032, 16) and (512, 512) in sizes and (256, 256) in sizes
    assert row_buckets(512) == [16, 32, 64, 128, 192, 256, 384, 512] and row_buckets(200)[-2:] == [192, 200]
    assert captured_sizes(4, 100) == [(100, 4)]
    assert captured_sizes(48, 300) == [(208, 48), (224, 32), (240, 16), (300, 16), (300, 32), (300, 48)]
    for max_num_seqs in (1, 15, 16, 17, 100, 512, 513, 1024, 65536):
        for max_tokens in (1, 255, 256, 257, 1024, 1025, 16384):
            sizes = captured_sizes(max_num_seqs, max_tokens)
            assert len(sizes) <= 32 and {rows for _, rows in sizes} == set(row_buckets(max_num_seqs))
            assert all(0 < tokens <= max_tokens for tokens, _ in sizes)


@pytest.mark.parametrize("max_num_seqs", [1, 16, 17, 48, 512, 600, 1024, 5000])
def test_a_chunk_fills_a_captured_step(max_num_seqs: int) -> None:
    captured = captured_sizes(max_num_seqs, 16384)
    for num_rows in range(1, max_num_seqs + 1):
        sizes = chunk_sizes(num_rows, max_num_seqs)
        bucket = min(rows for _, rows in captured if rows >= num_rows)
        assert sizes == sorted(set(sizes)) and sizes[0] >= MIN_CHUNK_TOKENS
        assert all((size, bucket) in captured for size in sizes)


@pytest.mark.parametrize(
    ("budget", "rows", "tokens"),
    [
        (512, 0, 512), (512, 20, 480), (512, 130, 320), (512, 193, 256), (512, 256, 256), (300, 20, 224),
        (1024, 20, 992), (1024, 300, 640), (512, 300, 128), (512, 400, 112),
        (1025, 20, 1005), (2048, 300, 1748), (8192, 20, 8172),  # beyond: what the rows leave
        (512, 600, 1), (10, 3, 7),  # whatever the rows are padded to is more than the budget
    ],
)  # fmt: skip
def test_rows_and_chunk_keep_to_a_budget(budget: int, rows: int, tokens: int) -> None:
    assert tokens_within(budget, rows, 1024) == tokens


def test_a_chunk_within_a_budget_fills_a_captured_step() -> None:
    captured = captured_sizes(512, 512)
    for rows in range(1, 257):
        size = min((size for size in captured if size[0] >= tokens_within(512, rows, 512) and size[1] >= rows), key=sum)
        assert sum(size) == 512
