"""Roles that bend: who prefills and who decodes, on plans whose shards are completed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nanovllm.engine import moves, placement
from nanovllm.engine import pace as pacing
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


# -- the pace


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
