"""How long steps take, and how many prompt tokens travel with a decode step because of it."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.engine import pace as pacing
from nanovllm.engine.pace import Pace
from nanovllm.engine.shards import DecodeShard, MixedShard, PrefillShard, Shard
from tests.cpu.test_roles import elastic, of_card


def test_a_chunk_takes_as_long_as_the_step_it_travels_with() -> None:
    pace = Pace(2, 512, itl_slo_ms=None)
    assert pace.chunk_tokens(1, 64) == 192  # nothing measured yet
    pace.record(PrefillShard(0, 1, (_chunk(1000),)), 0.02)  # 20 µs a token
    for decode_s, tokens in ((0.003, 192), (0.0089, 192), (0.009, 448), (0.0195, 960), (1.0, 1984)):
        pace.decode_s[1] = decode_s
        assert pace.chunk_tokens(1, 64) == tokens, decode_s
        assert pace.chunk_tokens(1, 33) == tokens, "padded to the same rows"


def test_a_chunk_keeps_to_the_slo() -> None:
    pace = Pace(2, 512, itl_slo_ms=20.0)
    pace.record(PrefillShard(0, 1, (_chunk(1000),)), 0.02)
    for decode_s, tokens, kept in ((0.005, 448, True), (0.0148, 192, True), (0.0163, 192, False), (0.03, 192, False)):
        pace.decode_s = [decode_s, decode_s]
        assert (pace.chunk_tokens(1, 64), pace.keeps_slo(1, 64)) == (tokens, kept), decode_s
    assert pace.chunk_tokens(0, 64) == 960, "on card 0 prompts come first"
    assert pace.keeps_slo(1, 0), "nobody waits"


@pytest.mark.parametrize(
    ("slo_ms", "decode_s", "tokens"),
    [
        (None, [0.003, 0.02], 960),  # as long as card 1's steps may take: 40 ms
        (None, [0.02, 0.003], 960),  # and twice its own, if they are quicker
        (24.0, [0.003, 0.02], 960),
        (24.0, [0.011, 0.02], 448),
        (24.0, [0.021, 0.003], 960),  # prompts come first
    ],
)
def test_on_card_0_a_chunk_is_what_readers_of_card_1_would_bear(
    slo_ms: float | None, decode_s: list[float], tokens: int
) -> None:
    pace = Pace(2, 512, itl_slo_ms=slo_ms, token_s=2e-5)
    pace.decode_s = decode_s
    assert pace.chunk_tokens(0, 64) == tokens


def test_rows_of_card_0_do_not_lengthen_the_steps_of_card_1() -> None:
    pace = Pace(2, 512, itl_slo_ms=None, token_s=2.4e-5)
    for decode_s in ([0.0, 0.0069], [0.03, 0.0069]):
        pace.decode_s = decode_s
        assert pace.chunk_tokens(1, 64) == 192


def test_a_mixed_step_tells_what_decoding_alone_would_take() -> None:
    pace = Pace(2, 512, itl_slo_ms=None)
    pace.record(PrefillShard(0, 1, (_chunk(1000),)), 0.02)
    decode = DecodeShard(1, 1, (0,), 8)
    pace.record(decode, 0.01)
    pace.record(MixedShard(1, 2, PrefillShard(1, 2, (_chunk(500),)), decode), 0.02)  # of that, 10 ms the chunk
    assert pace.decode_s[1] == pytest.approx(0.01)


@pytest.mark.parametrize("chunk_cost", [0.5, 1.0, 1.5, 3.0])
def test_mixed_steps_take_twice_the_measured_one_whatever_chunks_cost(chunk_cost: float) -> None:
    """Where a chunk's token takes more than one of a prompt alone, the excess counts as decoding: it must not lengthen
    the steps to come, which would lengthen it again."""
    pace = Pace(2, 512, itl_slo_ms=None, token_s=2e-5)
    decode = DecodeShard(1, 1, tuple(range(64)), 8)
    pace.record(decode, 0.02)
    steps_s = []
    for _ in range(200):
        chunk = _chunk(pace.chunk_tokens(1, 64))
        steps_s.append(0.02 + len(chunk.tokens) * chunk_cost * 2e-5)
        pace.record(MixedShard(1, 2, PrefillShard(1, 2, (chunk,)), decode), steps_s[-1])
    settled_s = steps_s[50:]  # sizes are few: about the limit they may take turns
    assert sum(settled_s) / len(settled_s) <= 0.04 and max(settled_s) < 0.05


def test_a_card_goes_without_prompts_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decoding alone takes is measured again, also where prompts never end."""
    monkeypatch.setattr(pacing, "MIXED_IN_A_ROW", 3)
    plan = elastic(100, 100, max_num_batched_tokens=8, run_ahead=1)
    monkeypatch.setattr(plan.scheduler.pace, "chunk_tokens", lambda card, num_rows: 2)
    plan.add(6)
    plan.fill()
    for _ in range(4):
        plan.add(40)
    kinds = []
    for _ in range(12):
        plan.launch_all(Shard)
        (step, *_) = of_card(plan.in_flight, 1)
        kinds.append(type(step))
        plan.end(step)
    first = kinds.index(MixedShard)
    assert kinds[first : first + 7] == [*[MixedShard] * 4, *[DecodeShard] * 2, MixedShard], "two are in flight"
    plan.drain()


def test_prompts_go_on_where_no_row_can_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may wait for the blocks that they hold: no step without prompts is to be had then."""
    monkeypatch.setattr(pacing, "MIXED_IN_A_ROW", 0)
    plan = elastic(100, 100, max_num_batched_tokens=8)
    plan.add(6)
    plan.fill()
    for _ in range(4):
        plan.add(16)
    plan.scheduler.ready_for_decode = lambda card: None  # type: ignore[method-assign]
    assert any(isinstance(step, PrefillShard) for step in of_card(plan.launch_all(Shard), 1))
    del plan.scheduler.ready_for_decode
    plan.drain()


def _chunk(num_tokens: int) -> Any:
    from nanovllm.engine.shards import PrefillChunk

    return PrefillChunk((0,) * num_tokens, 0, (0,))
