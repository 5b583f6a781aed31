"""Pages, views and block copies on CPU cards."""

from __future__ import annotations

import random

import pytest
import torch

from nanovllm.engine import kv_cache
from nanovllm.engine.kv_cache import CopyHandle, KVCache, merge_runs
from nanovllm.models.model_config import ModelConfig

CONFIG = ModelConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, vocab_size=50, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
    tie_word_embeddings=True, dtype="float32", rope_scaling=None, eos_token_ids=(),
)  # fmt: skip
CPU = torch.device("cpu")


def make_cache(num_blocks: int = 32, seed: int | None = None, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(num_blocks, 4, CONFIG, dtype, CPU)
    if seed is not None:
        cache.pages.normal_(generator=torch.Generator().manual_seed(seed))
    return cache


def test_layout() -> None:
    cache = KVCache(5, 4, CONFIG, torch.bfloat16, CPU)
    assert cache.pages.shape == (6, 3, 2, 4, 2, 8) and cache.pages.is_contiguous()
    assert (cache.null_block, cache.num_blocks, cache.block_size, cache.device) == (5, 5, 4, CPU)
    assert cache.block_bytes == 4 * CONFIG.kv_bytes_per_token(2) == cache.pages.nbytes // 6
    assert KVCache(5, 4, CONFIG, torch.float32, CPU, null_blocks=3).pages.shape[0] == 8


def test_layer_view_aliases_the_pages() -> None:
    cache = make_cache()
    k_pages, v_pages = cache.layer_view(1)
    assert k_pages.shape == v_pages.shape == (33, 4, 2, 8)
    k_pages[7, 3], v_pages[7, 2] = 1.0, 2.0
    assert cache.pages[7, 1, 0, 3].eq(1).all() and cache.pages[7, 1, 1, 2].eq(2).all()
    assert cache.pages.count_nonzero() == 2 * 2 * 8


def test_merge_runs() -> None:
    assert merge_runs([]) == []
    assert merge_runs([(1, 5), (2, 6), (3, 7)]) == [(1, 5, 3)]
    assert merge_runs([(3, 7), (1, 5), (2, 6)]) == [(1, 5, 3)]
    assert merge_runs([(1, 5), (2, 7), (3, 8), (9, 9)]) == [(1, 5, 1), (2, 7, 2), (9, 9, 1)]
    assert merge_runs([(1, 6), (2, 5)]) == [(1, 6, 1), (2, 5, 1)]


PAIRS = {
    "none": [],
    "one": [(3, 17)],
    "run": [(i, i + 16) for i in range(8)],
    "runs": [(0, 20), (1, 21), (2, 22), (9, 30), (10, 31), (12, 16)],
    "reversed": [(i, 31 - i) for i in range(9)],
    "scattered": [(3, 29), (14, 16), (0, 31), (7, 18), (8, 17), (15, 30), (5, 22), (1, 25), (11, 20), (4, 28), (2, 19)],
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("same", [False, True], ids=["other", "self"])
@pytest.mark.parametrize("path", ["runs", "gathered", "gathered in pieces"])
def test_mirror_copies_these_blocks_and_no_other(
    name: str, same: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "MIN_RUN_BYTES", 1 if path == "runs" else 1 << 60)
    source = make_cache(seed=0)
    target = source if same else make_cache(seed=1)
    if path == "gathered in pieces":
        monkeypatch.setattr(kv_cache, "MAX_STAGING_BYTES", 2 * source.block_bytes + 1)
    before, expected = source.pages.clone(), target.pages.clone()
    for src, dst in PAIRS[name]:
        expected[dst] = before[src]
    handle = source.mirror_to(target, PAIRS[name])
    assert handle.done() and torch.equal(target.pages, expected)
    assert same or torch.equal(source.pages, before)
    handle.wait()
    assert handle.num_bytes == len(PAIRS[name]) * source.block_bytes
    assert handle.seconds is not None and handle.seconds >= 0 and handle.event is None


def test_random_round_trips_are_exact_bytes() -> None:
    """NaN payloads and all: there and back again by other blocks."""
    rng = random.Random(5)
    here, there = make_cache(24, dtype=torch.bfloat16), make_cache(40, dtype=torch.bfloat16)
    bits = here.pages.view(torch.int16)
    bits.random_(-(1 << 15), 1 << 15, generator=torch.Generator().manual_seed(2))
    for _ in range(10):
        count = rng.randrange(1, 13)
        blocks, away = rng.sample(range(24), 24), rng.sample(range(40), count)
        home, back = blocks[:count], blocks[12 : 12 + count]
        here.mirror_to(there, list(zip(home, away, strict=True)))
        there.mirror_to(here, list(zip(away, back, strict=True)))
        assert torch.equal(bits[home], bits[back])


def test_few_operations_for_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scattered blocks go in one piece; long runs go one by one."""
    calls: list[int] = []
    original = KVCache._copy_gathered
    monkeypatch.setattr(KVCache, "_copy_gathered", lambda *args: (calls.append(len(args[2])), original(*args)))
    source, target = make_cache(seed=0), make_cache()
    source.mirror_to(target, PAIRS["scattered"])
    assert calls == [11]
    source.mirror_to(target, PAIRS["run"])
    assert calls == [11]


@pytest.mark.parametrize(
    "pairs",
    [[(0, 1), (1, 2)], [(0, 5), (1, 5)], [(32, 0)], [(0, 32)], [(-1, 0)], [(0, -1)]],
    ids=["overlap", "target twice", "null source", "null target", "negative source", "negative target"],
)
def test_impossible_pairs_are_our_own_bug(pairs: list[tuple[int, int]]) -> None:
    cache = make_cache()
    with pytest.raises(AssertionError):
        cache.mirror_to(cache, pairs)


def test_other_layouts_are_refused() -> None:
    cache = make_cache()
    with pytest.raises(AssertionError):
        cache.mirror_to(make_cache(dtype=torch.bfloat16), [(0, 0)])
    with pytest.raises(AssertionError):
        cache.mirror_to(KVCache(32, 8, CONFIG, torch.float32, CPU), [(0, 0)])


def test_handle_of_nothing() -> None:
    handle = CopyHandle(0)
    handle.wait()
    assert handle.done() and handle.seconds == 0 and handle.num_bytes == 0
