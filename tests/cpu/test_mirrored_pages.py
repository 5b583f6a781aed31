"""The byte check of two real cards, on two that are host memory; and it notices one flipped bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanovllm.engine.kv_cache import CopyHandle, KVCache
from tests.two_gpu.test_mirrored_pages import (
    FEWEST_PAIRS,
    check_everything_happened,
    differing,
    make_work,
    run_checked,
)

NUM_REQUESTS = 100
FLIPPED_COPY = 10


@pytest.mark.parametrize("roles", ["strict", "elastic"])
@pytest.mark.parametrize("dtype, overlap", [("float32", True), ("float32", False), ("bfloat16", True)])
def test_mirrored_pages_are_their_sources(dtype: str, overlap: bool, roles: str) -> None:
    outcome = run_checked(make_work(NUM_REQUESTS), device="cpu", dtype=dtype, overlap=overlap, pd_roles=roles)
    check_everything_happened(outcome)
    assert outcome.wrong == [] and outcome.num_pairs > FEWEST_PAIRS[roles] * NUM_REQUESTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_flipped_bit_is_found(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, flipped = KVCache.mirror_to, []

    def mirror_to(self: KVCache, other: KVCache, block_pairs: Any, *rest: Any) -> CopyHandle:
        handle = real(self, other, block_pairs, *rest)
        flipped.append(block_pairs[-1])
        if len(flipped) == FLIPPED_COPY:
            other.pages[block_pairs[-1][1]].view(torch.uint8).view(-1)[-1] ^= 1
        return handle

    monkeypatch.setattr(KVCache, "mirror_to", mirror_to)
    outcome = run_checked(make_work(50), device="cpu", dtype=dtype)
    ((_, *pair),) = outcome.wrong
    assert tuple(pair) == flipped[FLIPPED_COPY - 1]


def test_a_write_before_the_copy_let_go_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is taken for something else while its copy is in flight: the neighbour's bytes are in it."""
    real = KVCache.mirror_to

    def mirror_to(self: KVCache, other: KVCache, block_pairs: Any, *rest: Any) -> CopyHandle:
        handle = real(self, other, block_pairs, *rest)
        other.pages[block_pairs[0][1]] = other.pages[(block_pairs[0][1] + 1) % other.num_blocks]
        return handle

    monkeypatch.setattr(KVCache, "mirror_to", mirror_to)
    outcome = run_checked(make_work(50), device="cpu", overlap=False)
    assert len(outcome.wrong) > 10


def test_differing_answers_are_counted() -> None:
    expected = [[([1, 2, 3], "stop")], [([4], "length"), ([5, 6], "stop")], [([7], "stop")]]
    assert differing([[([1, 2], "abort")], [([4], "length"), ([5, 6], "stop")], [([], "abort")]], expected) == []
    assert differing([[([1, 9], "abort")], [([4], "stop"), ([5, 6], "stop")], [([7], "stop")]], expected) == [0, 1]
