"""Sequences that change cards while no prompt waits, or for want of blocks; plans completed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nanovllm.engine import moves
from nanovllm.engine.request_states import State
from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, PrefillShard
from tests.cpu.test_roles import elastic
from tests.cpu.test_scheduler import Plan

# -- card 0 takes over


def busy_plan(monkeypatch: pytest.MonkeyPatch, num_sequences: int = 4, after_s: float = 0.0) -> Plan:
    plan = elastic(100, 100, max_num_seqs=8)
    for _ in range(num_sequences):
        plan.add(9, max_tokens=40)
    plan.run(PrefillShard, CopyShard, until=lambda: plan.count(State.DECODING) == num_sequences)
    monkeypatch.setattr(moves, "BALANCE_AFTER_S", after_s)
    monkeypatch.setattr(moves, "BALANCE_ROWS", 4)
    return plan


def test_an_idle_card_0_takes_over_part_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = busy_plan(monkeypatch)
    for _ in range(30):
        plan.turn(CopyShard, DecodeShard)
    assert [sequence.card for sequence in plan.sequences] == [1, 1, 0, 0]  # the youngest half
    assert {shard.card for shard in plan.endable(DecodeShard)} == {0, 1}
    plan.drain()
    assert all(sequence.num_output_tokens == 40 for sequence in plan.sequences)


def test_few_of_those_without_a_slot_move_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "MOVES_IN_FLIGHT", 2)
    plan = elastic(200, 200)
    for _ in range(12):
        plan.add(9, max_tokens=20)
    most = 0
    while not plan.scheduler.idle:
        plan.schedule()
        most = max(most, plan.count(State.EVACUATING))
        assert plan.scheduler.batches[0].num_living + plan.count(State.EVACUATING) <= 4, "more than its slots"
        plan.turn(CopyShard, PrefillShard, MixedShard, DecodeShard)
    assert most == 2 and plan.scheduler.counts["taken_over"] > 2


def test_not_before_it_has_been_idle_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = busy_plan(monkeypatch, after_s=0.25)
    plan.scheduler.pace.decode_s[1] = 0.01
    for _ in range(20):  # steps of 10 ms
        plan.turn(DecodeShard)
        plan.scheduler.pace.decode_s[1] = 0.01
    assert plan.scheduler.counts["taken_over"] == 0
    for _ in range(20):
        plan.turn(CopyShard, DecodeShard)
        plan.scheduler.pace.decode_s[1] = 0.01
    assert plan.scheduler.counts["taken_over"] == 2
    plan.drain()


# -- card 1 is out of blocks


def full_plan(card_0_rows: int, **options: Any) -> Plan:
    """Two sequences on a card 1 whose blocks do not last for both, beside `card_0_rows` that card 0 keeps."""
    plan = elastic(100, 14, max_num_seqs=2, **options)
    for _ in range(2 + card_0_rows):
        plan.add(9, max_tokens=40)  # 13 blocks in the end
    way = PrefillShard, CopyShard, MixedShard, DecodeShard
    plan.run(*way, until=lambda: all(sequence.slot is not None for sequence in plan.sequences))
    return plan


def test_card_0_goes_on_decoding_what_card_1_has_no_blocks_for() -> None:
    plan = full_plan(card_0_rows=0)
    first, youngest = plan.sequences
    plan.run(DecodeShard, CopyShard, until=lambda: youngest.card == 0)
    before = youngest.num_output_tokens
    plan.run(DecodeShard, until=lambda: youngest.num_output_tokens > before + 3)
    assert first.card == 1 and not first.finished, "it waits for nobody"
    plan.drain()
    counts = plan.scheduler.counts
    assert (counts["evacuations"], counts["taken_over"], counts["recomputes"]) == (1, 1, 0)
    assert [sequence.num_output_tokens for sequence in plan.sequences] == [40, 40]


def test_without_a_slot_there_it_waits_to_come_back() -> None:
    plan = full_plan(card_0_rows=2)
    assert [sequence.card for sequence in plan.sequences] == [1, 1, 0, 0]
    youngest = plan.sequences[1]
    plan.run(DecodeShard, CopyShard, until=lambda: youngest.state is State.EVACUATED)
    assert youngest.state is State.EVACUATED and plan.scheduler.counts["evacuations"] == 1
    plan.drain()
    assert all(sequence.num_output_tokens == 40 for sequence in plan.sequences)


# -- card 0 gives back


def burst_plan(monkeypatch: pytest.MonkeyPatch, max_tokens: int = 60) -> Plan:
    """No prompt is left: card 1 decodes the first eight, one of them with `max_tokens`, card 0 the last eight."""
    monkeypatch.setattr(moves, "BALANCE_AFTER_S", math.inf)
    monkeypatch.setattr(moves, "BALANCE_ROWS", 2)
    plan = elastic(200, 200, max_num_seqs=8)
    for number in range(16):
        plan.add(9, max_tokens=60 if number else max_tokens)
    kept = plan.sequences[8:]
    way = PrefillShard, CopyShard, MixedShard, DecodeShard
    plan.run(*way, until=lambda: all(s.card == 0 and s.slot is not None for s in kept))
    return plan


def leave_on_card_1(plan: Plan, count: int) -> None:
    for sequence in plan.sequences[count:8]:
        plan.scheduler.finish(sequence, "abort")
    plan.turn(DecodeShard)


@pytest.mark.parametrize(("rows", "moved"), [(0, 4), (2, 3), (3, 2), (4, 0), (8, 0)])
def test_half_of_the_difference_goes_to_a_card_1_with_few_rows(
    monkeypatch: pytest.MonkeyPatch, rows: int, moved: int
) -> None:
    """The end of a burst. Two more than twice as many are enough, and who is under way counts where it goes."""
    plan = burst_plan(monkeypatch)
    kept = plan.sequences[8:]
    leave_on_card_1(plan, rows)
    states = [State.DECODING] * (8 - moved) + [State.RETURNING] * moved  # the youngest
    assert [sequence.state for sequence in kept] == states
    plan.turn(DecodeShard)
    assert [sequence.state for sequence in kept] == states
    plan.run(CopyShard, DecodeShard, until=lambda: all(sequence.slot is not None for sequence in kept))
    assert [sequence.card for sequence in kept] == [0] * (8 - moved) + [1] * moved
    assert plan.scheduler.counts["hand_offs"] == moved
    plan.drain()
    assert all(sequence.num_output_tokens == 60 for sequence in kept)


def test_card_1_gets_back_what_it_has_blocks_for_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would leave it again, and wait on card 0 without being decoded."""
    plan = burst_plan(monkeypatch, max_tokens=627)  # 159 of 200 blocks in the end, where each of the others has 18
    leave_on_card_1(plan, 1)
    for _ in range(5):
        plan.turn(DecodeShard)
    assert plan.count(State.RETURNING) == 2
    plan.scheduler.finish(plan.sequences[0], "abort")
    for _ in range(5):
        plan.turn(DecodeShard)
    assert plan.count(State.RETURNING) == 4
    plan.drain()


@pytest.mark.parametrize("reason", ["abort", "stop"])
@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("way", [State.EVACUATING, State.RETURNING])
def test_finish_while_sequences_move_either_way(
    monkeypatch: pytest.MonkeyPatch, way: State, moment: int, reason: str
) -> None:
    plan = busy_plan(monkeypatch)
    moving = plan.sequences[2:]
    if way is State.RETURNING:
        plan.run(CopyShard, DecodeShard, until=lambda: all(s.card == 0 and s.slot is not None for s in moving))
        plan.add(9)
    plan.turn(DecodeShard)
    for _ in range(moment):
        plan.turn(DecodeShard)  # the copies do not end
    assert [sequence.state for sequence in moving] == [way, way]
    for sequence in moving:
        plan.scheduler.finish(sequence, reason)
        plan.scheduler.check_integrity()
    plan.drain()
