"""The kernels at both ends of a decode step, and what brings changes and results, against plain torch, on a card."""

from __future__ import annotations

from array import array

import pytest
import torch

from nanovllm.layers.host import PinnedIds, PinnedRing
from tests.cpu import test_slot_packets
from tests.cpu.test_decode_state import compare

DELAY_CYCLES = 20_000_000  # some 10 ms: the copies behind it are queued long before they run


@pytest.mark.parametrize("seed", range(5))
def test_kernels_equal_the_plain_state(seed: int) -> None:
    compare(seed, "cuda")


@pytest.mark.parametrize("seed", range(5))
def test_packets_write_what_plain_torch_writes(seed: int) -> None:
    test_slot_packets.compare(seed, "cuda")
    assert test_slot_packets.compare(seed, "cuda", max_words=1 << 16) <= 8


def test_a_buffer_is_written_again_only_when_its_copy_has_ended() -> None:
    ring, size = PinnedRing(2, 1 << 16, torch.device("cuda")), 1 << 16
    torch.cuda._sleep(DELAY_CYCLES)
    arrived = [ring.send(array("i", [number]) * size).clone() for number in range(7)]
    assert [(int(words.min()), int(words.max())) for words in arrived] == [(number, number) for number in range(7)]


def test_ids_of_steps_in_flight_come_back_apart() -> None:
    pool, token_ids = PinnedIds(2, 512), torch.arange(512, device="cuda")
    for _ in range(3):
        torch.cuda._sleep(DELAY_CYCLES)
        buffers = [pool.fetch(token_ids[:count] + number) for number, count in enumerate((512, 1, 300))]
        torch.cuda.synchronize()
        read = [pool.read(buffer, count) for buffer, count in zip(buffers, (512, 1, 300), strict=True)]
        assert read == [list(range(512)), [1], list(range(2, 302))]
