"""The plan by itself: shards are completed by hand, so every queue can be held at any point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nanovllm.engine.request_states import State
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Request, Sequence, append_sampled
from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, PrefillShard, Shard, StepResult
from nanovllm.sampling_params import SamplingParams
from tests.sim.world import tiny_config

SIZE = 4  # tokens a block
STEPS = 2_000  # more than any plan here needs


def rows_of(shard: PrefillShard | DecodeShard | MixedShard) -> int:
    """Tokens that the step samples."""
    if isinstance(shard, MixedShard):
        return shard.prefill.num_samples + len(shard.decode.slots)
    return len(shard.slots) if isinstance(shard, DecodeShard) else shard.num_samples


class Plan:
    """A scheduler whose shards stay in flight until a test ends them; the books are checked at every move."""

    def __init__(self, *num_blocks: int, **options: Any) -> None:
        options = {"run_ahead": 2, "decode_backlog_high": 100, "decode_backlog_low": 50, "pd_roles": "strict"} | options
        config = tiny_config(SIZE, enable_two_gpu_pd=len(num_blocks) == 2, **options)
        self.scheduler = Scheduler(config, num_blocks)
        self.in_flight: list[Shard] = []
        self.sequences: list[Sequence] = []

    def add(self, num_tokens: int, max_tokens: int = 100, n: int = 1, arrival: int | None = None) -> list[Sequence]:
        number = len(self.sequences) if arrival is None else arrival
        start = 1000 * (len(self.sequences) + 1)  # no two prompts share a prefix
        params = SamplingParams(n=n, max_tokens=max_tokens)
        tokens = list(range(start, start + num_tokens))
        request = Request(str(number), number, None, tokens, params, max_tokens=max_tokens)
        self.sequences += request.sequences
        self.scheduler.add(request)
        return request.sequences

    def schedule(self) -> list[Shard]:
        shards = list(self.scheduler.schedule())
        self.in_flight += shards
        self.scheduler.check_integrity()
        return shards

    def launch_all(self, kind: type[Shard]) -> list[Any]:
        """What is launched of `kind` as long as nothing completes."""
        shards = [shard for _ in range(20) for shard in self.schedule()]
        return [shard for shard in shards if isinstance(shard, kind)]

    def end(self, shard: Shard) -> None:
        """The shard completes; its tokens are collected the way the engine does."""
        self.in_flight.remove(shard)
        if isinstance(shard, CopyShard):
            num_rows = 0
        else:
            num_rows = rows_of(shard)
        for sequence in append_sampled(*self.scheduler.complete(shard, StepResult([7] * num_rows)), 0.0):
            if sequence.num_output_tokens == sequence.request.max_tokens:
                self.scheduler.finish(sequence, "length")
        self.scheduler.check_integrity()

    def endable(self, *kinds: type[Shard]) -> list[Shard]:
        """Shards of `kinds` in launch order, but not a copy ahead of its source, nor a step ahead of others."""
        return [shard for shard in self.in_flight if isinstance(shard, kinds) and self._may_end(shard, kinds)]

    def _may_end(self, shard: Shard, kinds: tuple[type[Shard], ...]) -> bool:
        if isinstance(shard, CopyShard):
            return self.scheduler.managers[shard.src].completed_steps >= shard.after_step
        others = [each for each in self.in_flight if not isinstance(each, (CopyShard, *kinds))]
        return all(each.card != shard.card or each.step > shard.step for each in others)

    def turn(self, *kinds: type[Shard]) -> bool:
        """Launch what there is to launch, then end the first shard of the first of `kinds` that has one."""
        self.schedule()
        first = next((shards[0] for kind in kinds if (shards := self.endable(kind))), None)
        if first is not None:
            self.end(first)
        return first is not None

    def run(self, *kinds: type[Shard], until: Callable[[], object] = lambda: False) -> None:
        """Turns until a condition holds or nothing of `kinds` is in flight any more."""
        for _ in range(STEPS):
            if until() or not self.turn(*kinds):
                return
        raise AssertionError(f"no end: {self.scheduler.describe()}")

    def fill(self) -> None:
        """Prefill everything that is admitted; decode has not begun."""
        self.scheduler.ready_for_decode = lambda card: None  # type: ignore[method-assign]
        self.run(PrefillShard, CopyShard)
        del self.scheduler.ready_for_decode

    def drain(self) -> None:
        self.run(PrefillShard, MixedShard, DecodeShard, CopyShard)
        assert self.scheduler.idle, self.scheduler.describe()
        for manager in self.scheduler.managers.values():
            assert manager.num_free_blocks == manager.num_blocks and manager.num_retired_blocks == 0
        for batch in self.scheduler.batches.values():
            assert len(batch.free_slots) == self.scheduler.config.max_num_seqs and batch.num_living == 0

    def states(self) -> list[State]:
        return [sequence.state for sequence in self.sequences]

    def count(self, state: State) -> int:
        return self.states().count(state)


# -- prefill


def chunks_of(shard: PrefillShard) -> list[tuple[int, int, int]]:
    """(prompt's number, first position, tokens) of each chunk."""
    return [((chunk.tokens[0] - chunk.start) // 1000 - 1, chunk.start, len(chunk.tokens)) for chunk in shard.chunks]


def test_two_prefill_steps_in_flight_within_the_token_budget() -> None:
    plan = Plan(50, 50, max_num_batched_tokens=8)
    for num_tokens in (20, 6, 3):
        plan.add(num_tokens)
    first, second = plan.launch_all(PrefillShard)
    assert [chunks_of(first), chunks_of(second)] == [[(0, 0, 8)], [(0, 8, 8)]]
    plan.end(first)
    (third,) = plan.launch_all(PrefillShard)
    assert chunks_of(third) == [(0, 16, 4), (1, 0, 4)]
    assert [len(chunk.samples) for chunk in third.chunks] == [1, 0]  # a first token only from a last chunk
    plan.end(second)
    (fourth,) = plan.launch_all(PrefillShard)
    assert chunks_of(fourth) == [(1, 4, 2), (2, 0, 3)]


def test_begun_prompts_go_before_older_ones_that_wait() -> None:
    """Also before one that was preempted and is computed again: its blocks are taken, and late."""
    plan = Plan(50, 50, max_num_batched_tokens=8)
    plan.add(20, arrival=5)
    first, _ = plan.launch_all(PrefillShard)
    plan.add(8, arrival=1)
    plan.end(first)
    (third,) = plan.launch_all(PrefillShard)
    assert chunks_of(third) == [(0, 16, 4), (1, 0, 4)]


@pytest.mark.parametrize("sizes", [(1,) * 9, (3, 3, 3), (2, 6, 1, 1), (4, 4), (3, 1, 1)])
def test_rows_sampled_by_one_prefill_step_are_bounded(sizes: tuple[int, ...]) -> None:
    plan = Plan(100, 100, max_num_seqs=4, max_num_batched_tokens=1000)
    for n in sizes:
        plan.add(5, n=n, max_tokens=3)
    seen: list[PrefillShard] = []
    while shards := plan.launch_all(PrefillShard):
        seen += shards
        for shard in shards:
            plan.end(shard)
    assert sum(shard.num_samples for shard in seen) == sum(sizes)
    for shard in seen:
        assert shard.num_samples <= 4 or len(shard.chunks) == 1  # a group is not taken apart
    plan.drain()


# -- decode


@pytest.mark.parametrize("pools", [(30,), (30, 30)])
@pytest.mark.parametrize(
    ("options", "steps"), [({"overlap": False}, 1), *(({"run_ahead": k}, k + 1) for k in (1, 2, 4))]
)
def test_decode_steps_in_flight(pools: tuple[int, ...], options: dict[str, Any], steps: int) -> None:
    plan = Plan(*pools, **options)
    plan.add(5)
    plan.fill()
    plan.launch_all(DecodeShard)
    for _ in range(3):
        running = plan.endable(DecodeShard)
        assert len(running) == steps
        plan.end(running[0])
        assert len(plan.launch_all(DecodeShard)) == 1


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4])
def test_nothing_is_planned_beyond_max_tokens(max_tokens: int) -> None:
    """A prompt of whole blocks less one: each token too many would also take a block that nobody counted."""
    plan = Plan(30, 30, run_ahead=4)
    (short,), (long,) = plan.add(7, max_tokens), plan.add(7)
    plan.fill()
    plan.launch_all(DecodeShard)
    rows = [sequence for sequences in plan.scheduler.main_batch.launched.values() for sequence in sequences]
    assert (rows.count(short), rows.count(long)) == (max_tokens - 1, 5)
    if max_tokens > 1:  # the last token's KV is not written
        assert len(short.lease.tables[1]) == -(-(7 + max_tokens - 1) // SIZE)
    plan.run(PrefillShard, CopyShard, DecodeShard, until=lambda: short.finished)
    assert short.num_output_tokens == max_tokens
    plan.drain()


def test_slots_are_taken_in_arrival_order() -> None:
    plan = Plan(30, 30, max_num_seqs=1)
    (first,) = plan.add(6)
    plan.run(PrefillShard, CopyShard)
    second, third = plan.add(6)[0], plan.add(6)[0]
    plan.run(PrefillShard)
    assert [second.state, third.state] == [State.COPYING] * 2
    for shard in reversed(plan.endable(CopyShard)):
        plan.end(shard)
    assert plan.scheduler.main_batch.ready == [third, second]  # the younger one's copies ended first
    plan.scheduler.finish(first, "abort")
    plan.end(plan.endable(DecodeShard)[0])
    plan.schedule()
    assert [second.state, third.state] == [State.DECODING, State.READY]


class ToldTables:
    """What the card knows of its slots from decode shards alone."""

    def __init__(self) -> None:
        self.tables: dict[int, list[int]] = {}
        self.num_entries = self.num_new_blocks = 0

    def hear(self, shard: DecodeShard) -> None:
        for entry in shard.entries:
            self.tables[entry.slot] = list(entry.block_table)
        for new in shard.new_blocks:
            assert len(self.tables[new.slot]) == new.column
            self.tables[new.slot].append(new.block)
        self.num_entries += len(shard.entries)
        self.num_new_blocks += len(shard.new_blocks)
        assert {entry.slot for entry in shard.entries} <= set(shard.slots)


def tell_all(plan: Plan) -> ToldTables:
    """Run to the end; before each decode step the card must know exactly the tables of its rows."""
    told = ToldTables()
    for _ in range(STEPS):
        for shard in [shard for shard in plan.schedule() if isinstance(shard, DecodeShard)]:
            told.hear(shard)
            rows = plan.scheduler.main_batch.launched[shard.step]
            assert shard.slots == tuple(sequence.slot for sequence in rows)
            assert [told.tables[sequence.slot] for sequence in rows] == [sequence.lease.tables[1] for sequence in rows]
        ends = [plan.endable(kind) for kind in (PrefillShard, DecodeShard, CopyShard)]
        if not any(ends):
            break
        plan.end(next(shards[0] for shards in ends if shards))
    plan.drain()
    return told


@pytest.mark.parametrize("run_ahead", [1, 4])
def test_the_card_is_told_each_entry_and_each_block_once(run_ahead: int) -> None:
    plan = Plan(40, 40, run_ahead=run_ahead, max_num_seqs=2)
    plan.add(3, max_tokens=6)
    plan.add(8, max_tokens=15)
    plan.add(5, max_tokens=9)  # takes the slot that the first one leaves
    told = tell_all(plan)
    assert told.num_entries == 3
    # KV of 8, 22 and 13 tokens is written; the tables begin with 1, 3 and 2 blocks.
    assert told.num_new_blocks == (2 - 1) + (6 - 3) + (4 - 2)


def test_the_card_is_told_again_after_an_eviction() -> None:
    plan = full_plan(max_num_seqs=3)
    plan.fill()
    told = tell_all(plan)
    assert plan.scheduler.counts["evacuations"] > 1 and told.num_entries > 4


# -- the decode card is full


@pytest.mark.parametrize("max_num_seqs", [2, 3])
def test_the_youngest_is_evicted(max_num_seqs: int) -> None:
    """Whoever it is that lacks a block, here an older one; also one that still waits for a slot."""
    plan = Plan(30, 8, max_num_seqs=max_num_seqs, overlap=False)
    oldest, middle, youngest = (plan.add(num_tokens)[0] for num_tokens in (5, 6, 6))
    plan.fill()
    plan.schedule()
    assert youngest.state is (State.READY if max_num_seqs == 2 else State.DECODING)
    plan.run(DecodeShard, until=lambda: plan.scheduler.evacuating)
    assert [oldest.state, middle.state, youngest.state] == [State.DECODING, State.DECODING, State.EVACUATING]


def full_plan(**options: Any) -> Plan:
    """Three sequences, of which the two younger ones have to leave for the oldest."""
    plan = Plan(30, 8, overlap=False, **options)
    for num_tokens in (6, 6, 6):
        plan.add(num_tokens, max_tokens=26)
    return plan


def test_evacuated_sequences_return_in_arrival_order_before_any_new_prompt() -> None:
    plan = full_plan(max_num_seqs=4)
    _, middle, youngest = plan.sequences[:3]
    scheduler, num_held, waited_together = plan.scheduler, 0, False
    plan.fill()
    for _ in range(STEPS):
        if scheduler.evacuated and plan.count(State.WAITING) == 0:
            plan.add(3, max_tokens=1)  # needs a block of card 0, which has plenty
        away = sorted(scheduler.evacuated, key=lambda sequence: sequence.order)
        waited_together |= away == [middle, youngest]
        num_waiting = plan.count(State.WAITING)
        plan.schedule()
        back = [sequence for sequence in away if sequence.state is State.RETURNING]
        assert back == away[: len(back)]
        if scheduler.evacuated:
            assert plan.count(State.WAITING) == num_waiting
            num_held += num_waiting
        if not plan.turn(PrefillShard, DecodeShard, CopyShard):
            break
    assert waited_together and num_held > 3
    plan.drain()


def test_one_eviction_frees_a_whole_table() -> None:
    """Its prompt is cached on card 0, so few of its blocks are copied; all of them become free."""
    plan = Plan(30, 9, overlap=False)
    oldest, middle, youngest = (plan.add(num_tokens)[0] for num_tokens in (7, 7, 8))
    plan.fill()
    plan.run(DecodeShard, until=lambda: plan.scheduler.evacuating)
    plan.run(DecodeShard)  # until the other two lack a block as well
    (copy,) = plan.endable(CopyShard)
    assert len(copy.block_pairs) == 1 and len(youngest.lease.tables[1]) == 3
    assert oldest.num_kv_tokens == middle.num_kv_tokens == 12
    assert plan.launch_all(Shard) == [] and plan.scheduler.evacuating == {youngest}
    plan.end(copy)
    (shard,) = plan.launch_all(DecodeShard)
    assert len(shard.slots) == 2 and middle.state is State.DECODING


# -- back-pressure


def test_prefill_pauses_at_the_high_mark_and_resumes_at_the_low_one() -> None:
    plan = Plan(100, 100, max_num_seqs=2, decode_backlog_high=4, decode_backlog_low=2)
    for _ in range(12):
        plan.add(6)
    plan.run(PrefillShard, CopyShard)
    states = [State.DECODING] * 2 + [State.READY] * 4 + [State.WAITING] * 6
    assert plan.states() == states and plan.scheduler.paused
    for gone, waiting, paused in ((0, 6, True), (1, 4, True), (2, 4, True), (3, 2, True)):
        plan.scheduler.finish(plan.sequences[gone], "abort")
        plan.run(PrefillShard, CopyShard)
        assert (plan.count(State.WAITING), plan.scheduler.paused) == (waiting, paused), gone
    assert plan.scheduler.counts["pauses"] == 3
    plan.drain()


def test_the_backlog_counts_prompts_still_being_prefilled_beyond_the_free_slots() -> None:
    plan = Plan(100, 100, max_num_seqs=4, decode_backlog_high=2, decode_backlog_low=1)
    for _ in range(12):
        plan.add(6)
    for _ in range(5):
        plan.schedule()  # nothing completes
    assert plan.count(State.PREFILLING) == 6 and plan.scheduler.paused
    plan.fill()
    plan.schedule()
    assert [plan.count(state) for state in (State.DECODING, State.READY, State.WAITING)] == [4, 2, 6]
    plan.drain()


def test_the_backlog_counts_sequences_that_had_to_leave() -> None:
    plan = full_plan(max_num_seqs=4)
    for state in (State.EVACUATING, State.EVACUATED, State.RETURNING):
        plan.run(PrefillShard, DecodeShard, CopyShard, until=lambda state=state: state in plan.states())
        away = [plan.count(each) for each in (State.EVACUATING, State.EVACUATED, State.RETURNING)]
        assert plan.scheduler.placement.backlog == sum(away) > 0
    plan.drain()


# -- finish


@pytest.mark.parametrize("reason", ["abort", "stop"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("state", [state for state in State if state is not State.FINISHED])
def test_finish_in_every_state_lets_go_of_everything(state: State, overlap: bool, reason: str) -> None:
    plan = Plan(30, 10 if overlap else 8, max_num_seqs=2, overlap=overlap, run_ahead=1)
    for num_tokens in (6, 6, 6):
        plan.add(num_tokens, max_tokens=26)
    plan.run(PrefillShard, DecodeShard, CopyShard, until=lambda: state in plan.states())
    (sequence, *_) = [sequence for sequence in reversed(plan.sequences) if sequence.state is state]
    plan.scheduler.finish(sequence, reason)
    assert sequence.finished and sequence.finish_reason == reason and sequence.lease is None
    plan.scheduler.check_integrity()
    plan.scheduler.finish(sequence, "length")  # the second end is none
    assert sequence.finish_reason == reason
    plan.drain()


@pytest.mark.parametrize("budget_tokens", [4, 100])
def test_finish_of_everybody_at_every_moment(budget_tokens: int) -> None:
    """Whatever is in flight then keeps its blocks until it has ended, and only until then."""
    for moment in range(0, 120, 4):
        plan = full_plan(max_num_seqs=2, max_num_batched_tokens=budget_tokens)
        for _ in range(moment):
            plan.turn(PrefillShard, DecodeShard, CopyShard)
        plan.schedule()
        for sequence in plan.sequences:
            plan.scheduler.finish(sequence, "abort")
            plan.scheduler.check_integrity()
        plan.drain()
