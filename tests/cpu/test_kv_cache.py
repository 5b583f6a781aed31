"""Pages, views and block copies on CPU cards; the order that copies between GPUs are queued in, on streams that only
keep count of what each waits for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.engine import block_copies
from nanovllm.engine.block_copies import (
    Lane,
    PeerWay,
    PinnedStaging,
    Run,
    copy_by_engines,
    deal_pairs,
    merge_runs,
    split_runs,
)
from nanovllm.engine.kv_cache import CopyHandle, KVCache, measure_rate
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
def test_mirror_copies_these_blocks_and_no_other(name: str, same: bool) -> None:
    source = make_cache(seed=0)
    target = source if same else make_cache(seed=1)
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


def test_copy_way() -> None:
    cache = make_cache()
    assert cache.copy_way(cache) == cache.copy_way(make_cache()) == "host"
    assert cache.peer_way.name == "push", "blocks as small as these are too many copies for engines"


@pytest.mark.parametrize("num_blocks", [1, 5, 100])
def test_measure_rate_leaves_the_pools_cleared(num_blocks: int) -> None:
    source, target = make_cache(num_blocks), make_cache(70)
    assert measure_rate(source, target) > 0
    assert source.pages.count_nonzero() == target.pages.count_nonzero() == 0


# -- the work of copy engines, in order


def test_deal_pairs() -> None:
    pairs = [(i, 99 - i) for i in range(50)]
    dealt = list(deal_pairs(pairs, 2))
    assert [lane for lane, _ in dealt] == [0, 1, 0, 1] and [len(piece) for _, piece in dealt] == [16, 16, 16, 2]
    assert [pair for _, piece in dealt for pair in piece] == pairs
    assert [len(piece) for _, piece in deal_pairs(pairs[:6], 4)] == [2, 2, 2]
    assert list(deal_pairs(pairs[:1], 1)) == [(0, pairs[:1])]


def test_split_runs_fill_a_buffer_in_order() -> None:
    inward, outward = split_runs([(3, 40, 2), (7, 20, 1), (9, 22, 3)])
    assert inward == [(3, 0, 2), (7, 2, 1), (9, 3, 3)] and outward == [(0, 40, 2), (2, 20, 1), (3, 22, 3)]


class FakeStream:
    """A stream that runs everything at once and keeps a vector clock: how far of each stream its work is behind."""

    def __init__(self, card: str) -> None:
        self.card = card
        self.clock: Counter[FakeStream] = Counter()

    def record_event(self) -> Counter[FakeStream]:
        return Counter(self.clock)

    def wait_event(self, event: Counter[FakeStream]) -> None:
        self.clock |= event

    def wait_stream(self, stream: FakeStream) -> None:
        self.wait_event(stream.record_event())


class Operation:
    def __init__(self, stream: FakeStream, reads: set[Any], writes: set[Any]) -> None:
        stream.clock[stream] += 1
        self.stream, self.clock, self.reads, self.writes = stream, stream.record_event(), reads, writes

    def precedes(self, other: Operation) -> bool:
        return other.clock[self.stream] >= self.clock[self.stream]

    def conflicts(self, other: Operation) -> bool:
        return bool(self.writes & (other.reads | other.writes) or other.writes & self.reads)


class FakeCards:
    """Stands in for torch's streams: what is current on each card, and how a copy is ordered with that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = {card: FakeStream(card) for card in ("card0", "card1")}
        self.places: dict[int, str] = {}
        self.log: list[Operation] = []
        self._copy = block_copies.copy_run
        self._copy_blocks = block_copies.copy_blocks
        monkeypatch.setattr(torch.cuda, "stream", self.using)
        monkeypatch.setattr(torch.cuda, "set_stream", self.set_stream)
        monkeypatch.setattr(block_copies, "copy_run", self.copy_run)
        monkeypatch.setattr(block_copies, "copy_blocks", self.copy_blocks)

    def pages(self, card: str, num_blocks: int) -> Tensor:
        pages = torch.randn(num_blocks, 3, generator=torch.Generator().manual_seed(num_blocks))
        self.places[id(pages)] = card
        return pages

    def set_stream(self, stream: FakeStream) -> None:
        self.current[stream.card] = stream

    @contextmanager
    def using(self, stream: FakeStream) -> Iterator[None]:
        before = self.current[stream.card]
        self.set_stream(stream)
        yield
        self.set_stream(before)

    def copy_run(self, source: Tensor, target: Tensor, run: Run) -> None:
        """As torch does: on the card it leaves, ordered before and behind with the current stream over there."""
        here, there = (self.places.get(id(pages), "host") for pages in (source, target))
        stream = self.current[there if here == "host" else here]
        if "host" not in (here, there):
            stream.wait_stream(self.current[there])
        self.note(
            stream, {(id(source), run[0] + i) for i in range(run[2])}, {(id(target), run[1] + i) for i in range(run[2])}
        )
        if "host" not in (here, there):
            self.current[there].wait_stream(stream)
        self._copy(source, target, run)

    def copy_blocks(self, sources: Any, targets: Any, pairs: list[tuple[int, int]]) -> None:
        """Of views: what they are views of is their base."""
        for src, dst in pairs:
            expected = targets[dst]._base.clone()
            expected[dst] = sources[src]
            self.copy_run(sources[src]._base, targets[dst]._base, (src, dst, 1))
        self._copy_blocks(sources, targets, pairs)  # the same once more
        assert not pairs or torch.equal(targets[dst]._base, expected)

    def note(self, stream: FakeStream, reads: set[Any], writes: set[Any]) -> None:
        self.log.append(Operation(stream, reads, writes))

    def check_order(self) -> None:
        """Of two operations that touch the same block, one writing it, the earlier one must precede the later one."""
        for first, second in combinations(self.log, 2):
            assert not first.conflicts(second) or first.precedes(second), "a race"


def scattered(count: int, num_blocks: int) -> list[tuple[int, int]]:
    rng = random.Random(count)
    return list(zip(rng.sample(range(num_blocks), count), rng.sample(range(num_blocks), count), strict=True))


def all_blocks(pages: Tensor) -> set[Any]:
    return {(id(pages), block) for block in range(len(pages))}


@pytest.mark.parametrize("num_lanes", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_engine_copies_come_after_the_writer_before_the_reader_and_side_by_side(
    count: int, num_lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = FakeCards(monkeypatch)
    source, target = cards.pages("card0", 50), cards.pages("card1", 60)
    lanes: Any = [Lane(*(FakeStream(card) for card in cards.current)) for _ in range(num_lanes)]  # type: ignore[arg-type]
    stream: Any = FakeStream("card0")
    usual = dict(cards.current)
    expected = target.clone()
    for turn in range(2):  # a second call behind the first
        pairs = scattered(count + turn, 50)
        expected[[dst for _, dst in pairs]] = source[[src for src, _ in pairs]]
        cards.note(stream, set(), all_blocks(source))  # a step that writes what is copied
        copy_by_engines(source.unbind(0), target.unbind(0), pairs, lanes, stream)
        cards.note(stream, all_blocks(target), set())  # whoever waits for the stream
    assert torch.equal(target, expected) and cards.current == usual
    cards.check_order()
    copies = [operation for operation in cards.log if operation.reads and operation.writes]
    for one, other in combinations(copies[:count], 2):
        assert one.precedes(other) == (one.stream is other.stream), "lanes wait for each other"


@pytest.mark.parametrize("count", [1, 6, 41])
@pytest.mark.parametrize("piece_blocks", [1, 4, 50])
def test_staged_copies_never_overwrite_a_piece_on_its_way(
    count: int, piece_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = FakeCards(monkeypatch)
    source, target = cards.pages("card0", 50), cards.pages("card1", 60)
    stream: Any = FakeStream("card0")
    arrivals: Any = FakeStream("card1")
    staging = PinnedStaging(source, piece_blocks * source[0].nbytes + 1)
    assert staging.piece_blocks == piece_blocks
    expected = target.clone()
    for turn in range(2):
        pairs = [*scattered(count + turn, 45), (48, 50), (49, 51)]
        expected[[dst for _, dst in pairs]] = source[[src for src, _ in pairs]]
        cards.note(stream, set(), all_blocks(source))
        staging.copy(source, target, pairs, stream, arrivals)
        cards.note(stream, all_blocks(target), set())
    assert torch.equal(target, expected)
    cards.check_order()
    copies = [operation for operation in cards.log if operation.reads and operation.writes]
    if piece_blocks == 1 and count > 1:  # while one piece arrives, the next one leaves
        assert not copies[1].precedes(copies[2]) and copies[1].precedes(copies[4])


def test_pieces_hold_at_least_one_block() -> None:
    assert PinnedStaging(torch.zeros(4, 3), piece_bytes=1).piece_blocks == 1
    assert PeerWay() == PeerWay("engines", streams=2)
