"""KV copies between two real cards: byte for byte, whatever way they go, and nothing else touched."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm import DEMO_MODEL
from nanovllm.engine.block_copies import PeerWay, PinnedStaging
from nanovllm.engine.kv_cache import KVCache, measure_rate
from nanovllm.models.model_config import load_model_config

NUM_BLOCKS = 300
Pairs = list[tuple[int, int]]


def make_cache(device: int) -> KVCache:
    config = load_model_config(Path(DEMO_MODEL))
    cache = KVCache(NUM_BLOCKS, 64, config, torch.bfloat16, torch.device("cuda", device))
    cache.pages.view(torch.int16).random_(-30000, 30000)
    torch.cuda.synchronize(device)
    return cache


def go_by(way: str, source: KVCache) -> None:
    """Make `source` copy to another card that way; staged in pieces of seven blocks, so that buffers are used again."""
    if way == "staged":
        source._peer = False
        source._staging = PinnedStaging(source.pages, 7 * source.block_bytes)
    else:
        source.peer_way = PeerWay("engines" if way == "engines" else "push")


def make_pairs(count: int) -> Pairs:
    """A third of them one run, the others scattered."""
    rng, run = random.Random(count), count // 3
    sources = rng.sample(range(run, NUM_BLOCKS), count - run)
    targets = rng.sample([*range(100), *range(100 + run, NUM_BLOCKS)], count - run)
    return [*((i, 100 + i) for i in range(run)), *zip(sources, targets, strict=True)]


def write_late(cache: KVCache, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """New contents, about 10 ms from now; the event behind them."""
    with torch.cuda.device(cache.device), torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        cache.pages.view(torch.int16).random_(-30000, 30000)
        return stream.record_event()


def bits(pages: Tensor) -> Tensor:
    return pages.cpu().view(torch.int16)


@pytest.mark.parametrize("way", ["engines", "push", "staged"])
@pytest.mark.parametrize("source, target", [(0, 1), (1, 0)])
@pytest.mark.parametrize("count", [1, 2, 64, 300])
def test_scattered_blocks_arrive_behind_a_late_write(way: str, source: int, target: int, count: int) -> None:
    src, dst = make_cache(source), make_cache(target)
    go_by(way, src)
    assert src.copy_way(dst) == way
    pairs = make_pairs(count)
    expected = bits(dst.pages)
    writer, copier = torch.cuda.Stream(source), torch.cuda.Stream(source)
    handle = src.mirror_to(dst, pairs, copier, [write_late(src, writer)])
    handle.wait()
    sources, targets = zip(*pairs, strict=True)
    expected[list(targets)] = bits(src.pages)[list(sources)]
    assert torch.equal(bits(dst.pages), expected)
    assert handle.seconds is not None and handle.seconds > 0


@pytest.mark.parametrize("way", ["engines", "push", "staged"])
def test_copies_queued_one_behind_the_other(way: str) -> None:
    """None is waited for before the last: each block goes over, to a place of its own, and back to another one."""
    here, there = make_cache(0), make_cache(1)
    for cache in (here, there):
        go_by(way, cache)
    out, back = torch.cuda.Stream(0), torch.cuda.Stream(1)
    half = NUM_BLOCKS // 2
    order = random.Random(1).sample(range(half), half)
    sent = bits(here.pages)[:half]
    after = []
    for turn in range(4):
        over = here.mirror_to(there, [(i, order[i]) for i in range(half)], out, after)
        assert over.event is not None
        home = there.mirror_to(here, [(order[i], half + (i + turn) % half) for i in range(half)], back, [over.event])
        assert home.event is not None
        after = [home.event]
    home.wait()
    assert torch.equal(bits(here.pages)[:half], sent)
    assert torch.equal(bits(there.pages)[order], sent)
    assert torch.equal(bits(here.pages)[half : 2 * half], sent.roll(3, 0))


@pytest.mark.parametrize("way", ["engines", "push", "staged"])
def test_measured_rate(way: str) -> None:
    here, there = make_cache(0), make_cache(1)
    go_by(way, here)
    assert measure_rate(here, there, torch.cuda.Stream(0)) > 0
    assert not here.pages[:64].any() and not there.pages[:64].any() and here.pages[64:].any()
