"""Roles that bend: who prefills and who decodes, on plans whose shards are completed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nanovllm.engine import moves, placement
from nanovllm.engine.pace import Pace
from nanovllm.engine.request_states import State
from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, PrefillShard, Shard
from tests.cpu.test_scheduler import Plan

STEPS = (PrefillShard, MixedShard, DecodeShard, CopyShard)


def elastic(*pools: int, **options: Any) -> Plan:
    return Plan(*pools, **{"pd_roles": "elastic", "max_num_seqs": 4} | options)


def of_card(shards: list[Shard], card: int) -> list[Shard]:
    return [shard for shard in shards if not isinstance(shard, CopyShard) and shard.card == card]


# -- one card


def test_one_card_mixes_chunks_and_rows_under_one_budget() -> None:
    plan = Plan(60, max_num_batched_tokens=10, run_ahead=1)
    plan.add(5)
    plan.fill()
    plan.add(30)
    (mixed,) = of_card(plan.schedule(), 0)
    assert isinstance(mixed, MixedShard) and (mixed.prefill.step, mixed.decode.step) == (mixed.step, mixed.step)
    assert mixed.prefill.num_tokens + len(mixed.decode.slots) == 10
    plan.drain()


def test_one_card_fills_captured_steps() -> None:
    plan = Plan(800, max_num_batched_tokens=512, max_num_seqs=20, run_ahead=1)
    for _ in range(3):
        plan.add(5)
    plan.fill()
    plan.add(1000)
    (mixed,) = of_card(plan.schedule(), 0)
    assert isinstance(mixed, MixedShard) and mixed.prefill.num_tokens == 496  # and the rows as 16
    plan.drain()


def test_a_chunk_travels_with_the_rows_or_waits_for_them() -> None:
    """Alone, it would make them wait for as long as it takes, and they would get nothing for it."""
    plan = Plan(60, max_num_batched_tokens=10, run_ahead=1)
    plan.add(5)
    plan.fill()
    plan.launch_all(DecodeShard)  # as many steps as may be in flight
    plan.add(30)
    assert plan.schedule() == []
    plan.end(plan.endable(DecodeShard)[0])
    (mixed,) = plan.schedule()
    assert isinstance(mixed, MixedShard)
    plan.drain()


def test_strict_roles_never_mix() -> None:
    plan = Plan(60, 60, max_num_batched_tokens=8, max_num_seqs=2)
    for _ in range(8):
        plan.add(9, max_tokens=6)
    shards: list[Shard] = []
    while not plan.scheduler.idle:
        shards += plan.schedule()
        plan.end(plan.endable(*STEPS)[0])
    assert {type(shard) for shard in of_card(shards, 0)} == {PrefillShard}
    assert {type(shard) for shard in of_card(shards, 1)} == {DecodeShard}


# -- card 1 helps


def test_the_decode_card_takes_a_prompt_only_when_prompts_queue() -> None:
    plan = elastic(100, 100, max_num_batched_tokens=8)
    plan.add(8)
    plan.add(8)
    assert not of_card(plan.launch_all(Shard), 1)
    third = plan.add(8)[0]
    (helped,) = of_card(plan.launch_all(Shard), 1)
    assert isinstance(helped, PrefillShard) and third.card == 1 and set(third.lease.tables) == {1}
    plan.end(helped)
    assert third.state is State.READY  # no copy
    plan.drain()


def test_a_helped_prompt_travels_with_the_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = elastic(100, 100, max_num_batched_tokens=8)
    monkeypatch.setattr(plan.scheduler.pace, "chunk_tokens", lambda card, num_rows: 3)
    plan.add(6)
    plan.fill()
    for _ in range(3):
        plan.add(8)
    steps = [shard for shard in plan.launch_all(Shard) if isinstance(shard, MixedShard)]
    assert steps and all(shard.card == 1 and shard.prefill.num_tokens <= 3 for shard in steps)
    plan.drain()


def test_a_helped_prompt_that_ends_at_once_is_found_on_card_0() -> None:
    plan = elastic(100, 100, max_num_batched_tokens=8)
    for _ in range(3):
        plan.add(8, max_tokens=1)
    plan.launch_all(Shard)
    plan.drain()
    assert plan.scheduler.counts["helped"] == plan.scheduler.counts["write_backs"] == 1
    assert plan.scheduler.managers[0].num_cached_blocks == 6


def test_a_prompt_that_card_0_has_cached_stays_there() -> None:
    plan = elastic(100, 100, max_num_batched_tokens=8)
    (first,) = plan.add(8, max_tokens=1)
    plan.drain()
    plan.add(8)
    plan.add(8)
    again = plan.add(9)[0]
    again.tokens[:8] = again.request.prompt_token_ids[:8] = first.tokens[:8]
    assert not of_card(plan.launch_all(Shard), 1) and again.state is State.WAITING
    plan.drain()
    assert plan.scheduler.counts["helped"] == 0 and again.request.num_cached_tokens == 8


def slo_plan(monkeypatch: pytest.MonkeyPatch, plan: Plan, decode_s: float) -> None:
    """Steps of the plan take 7 ms for a smallest chunk, under an SLO of 12 ms, and without one as long as given."""
    pace = plan.scheduler.pace
    monkeypatch.setattr(pace, "record", lambda shard, seconds: None)
    pace.token_s, pace.decode_s = 0.007 / pace.chunk_tokens(1, 1), [decode_s] * 2


def test_beyond_the_slo_the_decode_card_takes_no_prompt_but_goes_on_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may wait for the blocks that it holds."""
    plan = elastic(100, 100, max_num_batched_tokens=8, itl_slo_ms=12.0)
    plan.add(6)
    plan.fill()
    slo_plan(monkeypatch, plan, decode_s=0.004)
    for _ in range(4):
        plan.add(16)
    monkeypatch.setattr(placement, "HELP_AFTER_S", 0.0)
    plan.launch_all(Shard)
    helped = plan.scheduler.prefilling[1][0].leader
    slo_plan(monkeypatch, plan, decode_s=0.008)
    for _ in range(12):
        plan.turn(MixedShard, DecodeShard)
    assert helped.num_output_tokens and plan.scheduler.counts["helped"] == 1
    slo_plan(monkeypatch, plan, decode_s=0.004)
    plan.turn(MixedShard, DecodeShard)
    assert plan.scheduler.counts["helped"] == 2
    plan.drain()


# -- card 0 keeps, decodes and hands off


def kept_plan(**options: Any) -> Plan:
    """Card 1 has room for two sequences; card 0 decodes the third."""
    plan = elastic(100, 11, **options)
    for _ in range(3):
        plan.add(9, max_tokens=20)
    plan.run(PrefillShard, CopyShard, until=lambda: plan.count(State.DECODING) == 3)
    assert [sequence.card for sequence in plan.sequences] == [1, 1, 0]
    return plan


def test_card_0_decodes_what_card_1_has_no_room_for() -> None:
    plan = kept_plan()
    assert plan.count(State.DECODING) == 3
    assert {shard.card for shard in plan.endable(DecodeShard)} == {0, 1}
    assert set(plan.sequences[2].lease.tables) == {0}
    plan.drain()


@pytest.mark.parametrize(("step_s", "card"), [(0.0, 1), (0.02, 1), (0.03, 0)])
def test_card_0_keeps_what_would_wait_long_for_a_slot(step_s: float, card: int) -> None:
    """Of 20 tokens each, the two that have the slots lack 19, or one or two fewer."""
    plan = elastic(100, 100, max_num_seqs=2)
    for _ in range(2):
        plan.add(9, max_tokens=20)
    plan.run(PrefillShard, CopyShard, until=lambda: plan.count(State.DECODING) == 2)
    plan.scheduler.pace.decode_s[1] = step_s
    (third,) = plan.add(9, max_tokens=5)
    plan.schedule()
    assert third.card == card, plan.scheduler.main_batch.steps_until_slots(1)
    plan.drain()


def test_steps_until_slots() -> None:
    plan = elastic(100, 100, max_num_seqs=2)
    main = plan.scheduler.main_batch
    assert (main.steps_until_slots(2), main.steps_until_slots(3)) == (0, math.inf)
    plan.add(9, max_tokens=20)
    plan.add(9, max_tokens=9)
    plan.run(PrefillShard, CopyShard, until=lambda: plan.count(State.DECODING) == 2)
    short, long = (s.request.max_tokens - s.num_planned_outputs for s in reversed(plan.sequences))
    assert 0 < short < long
    assert [main.steps_until_slots(count) for count in (0, 1, 2, 3)] == [0, short, long, math.inf]
    plan.drain()


def test_who_has_left_does_not_count_as_a_slot_that_comes_free() -> None:
    """Also between two steps: there may be none for a long while."""
    plan = elastic(100, 100, max_num_seqs=2)
    main = plan.scheduler.main_batch
    for _ in range(2):
        plan.add(9, max_tokens=20)
    plan.run(PrefillShard, CopyShard, until=lambda: plan.count(State.DECODING) == 2)
    assert 0 < main.steps_until_slots(1) < math.inf
    for sequence in plan.sequences:
        plan.scheduler.finish(sequence, "abort")
    assert main.steps_until_slots(3) == math.inf
    plan.drain()


def test_more_answers_than_slots_go_to_an_empty_decode_card() -> None:
    plan = elastic(100, 100, max_num_seqs=2)
    plan.scheduler.pace.decode_s[1] = 0.01
    answers = plan.add(9, max_tokens=5, n=3)
    plan.schedule()
    assert [answer.card for answer in answers] == [1, 1, 1]
    plan.drain()


def test_it_is_handed_off_when_prompts_queue_and_there_is_room() -> None:
    plan = kept_plan()
    kept = plan.sequences[2]
    plan.turn(DecodeShard)
    plan.add(5)
    plan.schedule()
    assert kept.state is State.DECODING, "card 1 is full"
    plan.scheduler.finish(plan.sequences[0], "abort")
    for shard in plan.endable(DecodeShard):
        plan.end(shard)  # its blocks are free now
    plan.schedule()
    assert kept.state is State.RETURNING and kept.card == 1
    (copy,) = [shard for shard in plan.in_flight if isinstance(shard, CopyShard) and shard.dst == 1]
    assert copy.after_step >= 1, "not before the last step that wrote its blocks"
    plan.drain()
    assert plan.scheduler.counts["hand_offs"] >= 1 and kept.num_output_tokens == 20


def test_a_prompt_outranks_the_rows_that_card_0_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = kept_plan(itl_slo_ms=12.0)
    slo_plan(monkeypatch, plan, decode_s=0.007)
    (late,) = plan.add(9, max_tokens=5)
    for _ in range(8):
        plan.turn(PrefillShard, MixedShard, DecodeShard, CopyShard)
    assert late.num_output_tokens and plan.sequences[2].num_output_tokens < 20
    plan.drain()


def test_without_prompts_it_stays() -> None:
    plan = kept_plan()
    plan.scheduler.finish(plan.sequences[0], "abort")
    for _ in range(10):
        plan.turn(DecodeShard)
    assert plan.sequences[2].card == 0 and plan.scheduler.counts["hand_offs"] == 0
    plan.drain()


def test_few_move_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on decoding: each would have to wait for the copies of those before it."""
    monkeypatch.setattr(moves, "MOVES_IN_FLIGHT", 2)
    plan = elastic(200, 200, max_num_seqs=6, decode_backlog_high=1, decode_backlog_low=0)
    for _ in range(10):
        plan.add(9, max_tokens=60)
    plan.run(PrefillShard, CopyShard)
    assert sum(sequence.card == 0 for sequence in plan.sequences) >= 3
    for sequence in plan.sequences[:6]:
        plan.scheduler.finish(sequence, "abort")
    plan.add(9)
    plan.schedule()
    moving = [s.state for s in plan.sequences if s.state in (State.RETURNING, State.EVACUATING)]
    assert len(moving) == 2 and State.RETURNING in moving
    plan.drain()


# -- run-ahead


@pytest.mark.parametrize(("options", "step_s", "steps"), [({}, 0.0049, 3), ({}, 0.005, 2), ({"run_ahead": 3}, 0.01, 4)])
def test_long_steps_are_launched_less_far_ahead(options: dict[str, Any], step_s: float, steps: int) -> None:
    """What becomes ready joins behind the steps in flight."""
    plan = Plan(40, 40, **({"run_ahead": None} | options))
    plan.scheduler.pace.decode_s[1] = step_s
    plan.add(5)
    plan.fill()
    plan.launch_all(DecodeShard)
    assert len(plan.endable(DecodeShard)) == steps
    plan.drain()


# -- memory


@pytest.mark.parametrize("roles", ["elastic", "strict"])
def test_a_small_pool_on_card_0_does_not_keep_card_1_from_being_filled(roles: str) -> None:
    """Blocks are held on both cards only while a prompt is on its way."""
    plan = Plan(12, 48, pd_roles=roles, max_num_seqs=12)
    for _ in range(12):
        plan.add(13, max_tokens=30)
    free: list[int] = []

    def full() -> bool:
        free.append(plan.scheduler.managers[1].num_free_blocks)
        return free[-1] == 0

    plan.run(PrefillShard, CopyShard, MixedShard, DecodeShard, until=full)
    assert min(free) == 0
    plan.drain()
    assert all(sequence.num_output_tokens == 30 for sequence in plan.sequences)


def test_a_decode_step_does_not_wait_for_prompts_to_be_admitted() -> None:
    plan = Plan(60, 60, pd_roles="strict", run_ahead=1)
    plan.add(5, max_tokens=20)
    plan.fill()
    for _ in range(3):
        plan.add(9)
    shards = plan.scheduler.schedule()
    plan.in_flight.append(next(shards))
    assert isinstance(plan.in_flight[-1], DecodeShard) and len(plan.scheduler.waiting) == 3
    plan.in_flight += shards
    assert isinstance(plan.in_flight[-1], CopyShard) and not plan.scheduler.waiting
    plan.drain()


@pytest.mark.parametrize(
    ("tokens_per_s", "tokens"), [(0, 2048), (10_000, 2048), (34_000, 2048), (42_000, 4096), (69_000, 8192)]
)
def test_card_0_launches_no_more_at_once_than_it_does_soon(tokens_per_s: float, tokens: int) -> None:
    assert Pace(2, 8, None, 1 / tokens_per_s if tokens_per_s else 0.0).prefill_tokens == tokens
