"""KV copies between two real cards: byte for byte, whatever way they go, and nothing else touched."""

from __future__ import annotations

import random

import pytest
import torch

from nanovllm import DEMO_MODEL
from nanovllm.engine.kv_cache import KVCache
from nanovllm.models.model_config import load_model_config

NUM_BLOCKS = 300


def make_cache(device: int) -> KVCache:
    from pathlib import Path

    config = load_model_config(Path(DEMO_MODEL))
    cache = KVCache(NUM_BLOCKS, 64, config, torch.bfloat16, torch.device("cuda", device))
    cache.pages.view(torch.int16).random_(-30000, 30000)
    torch.cuda.synchronize(device)
    return cache


@pytest.mark.parametrize("way", ["pushed", "gathered"])
@pytest.mark.parametrize("source, target", [(0, 1), (1, 0)])
@pytest.mark.parametrize("count", [2, 64, 300])
def test_scattered_blocks_arrive_behind_a_late_write(way: str, source: int, target: int, count: int) -> None:
    src, dst = make_cache(source), make_cache(target)
    src._peer = None if way == "pushed" else False
    rng = random.Random(count)
    pairs = list(zip(rng.sample(range(NUM_BLOCKS), count), rng.sample(range(NUM_BLOCKS), count), strict=True))
    before = dst.pages.cpu()
    writer, copier = torch.cuda.Stream(source), torch.cuda.Stream(source)
    with torch.cuda.device(source), torch.cuda.stream(writer):
        torch.cuda._sleep(20_000_000)
        src.pages.view(torch.int16).random_(-30000, 30000)
        written = writer.record_event()
    src.mirror_to(dst, pairs, copier, [written]).wait()
    assert src._reaches(dst) == (way == "pushed")
    expected = before.clone()
    for a, b in pairs:
        expected[b] = src.pages[a].cpu()
    assert torch.equal(dst.pages.cpu().view(torch.int16), expected.view(torch.int16))
