"""Blocks on two cards: all or nothing, the watermark, who shares what, evacuation and return, write-back."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from nanovllm.engine import handoff as handing_off
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.handoff import Handoff
from nanovllm.engine.request_states import State
from nanovllm.engine.sequence import PrefillGroup, Request, Sequence, append_sampled
from nanovllm.engine.shards import CopyShard, StepResult
from nanovllm.sampling_params import SamplingParams
from tests.sim.world import World, tiny_config

SIZE = 4  # tokens a block


def tokens_of(num_tokens: int, start: int = 1) -> list[int]:
    return list(range(start, start + num_tokens))


class Cards:
    """`Handoff` over bare block managers: prefill and copies complete when a test says so."""

    def __init__(self, *num_blocks: int, prefix_caching: bool = True) -> None:
        self.managers = {
            card: BlockManager(count, SIZE, prefix_caching and card == 0) for card, count in enumerate(num_blocks)
        }
        self.handoff = Handoff(self.managers, 0, len(num_blocks) - 1, prefix_caching)
        self._arrivals = 0

    def group(self, tokens: list[int], n: int = 1, max_tokens: int = 50) -> PrefillGroup:
        self._arrivals += 1
        params = SamplingParams(n=n, max_tokens=max_tokens)
        request = Request(str(self._arrivals), self._arrivals, None, tokens, params, max_tokens=max_tokens)
        return PrefillGroup(request.sequences)

    def admit(self, group: PrefillGroup, reserve_blocks: int) -> bool:
        return self.handoff.admit(group, 0, self.handoff.decode, reserve_blocks)

    def evacuate(self, sequence: Sequence, done: Callable[[], None] = lambda: None) -> bool:
        steps = self.managers[1].launched_steps
        return self.handoff.move(sequence, 0, sequence.num_kv_tokens, 0, steps, done)

    def bring_back(self, sequence: Sequence, reserve_blocks: int) -> bool:
        return self.handoff.move(sequence, 1, sequence.num_kv_tokens + 1, reserve_blocks, 0, lambda: None)

    def write_back(self, sequence: Sequence) -> int | None:
        return self.handoff.write_back(sequence, self.handoff.decode)

    def free(self) -> list[int]:
        return [manager.num_free_blocks for manager in self.managers.values()]

    def finish_copies(self) -> list[CopyShard]:
        shards = self.handoff.drain_outbox()
        for shard in shards:
            self.handoff.copy_done(shard)
        return shards

    def prefilled(self, tokens: list[int], **options: int) -> PrefillGroup:
        """Admitted, computed, copied, registered on both cards; the prefill card's table is dropped."""
        group = self.group(tokens, **options)
        assert self.admit(group, 0)
        group.num_launched_tokens = group.num_tokens
        for sequence in group.sequences:
            sequence.num_kv_tokens = group.num_tokens
        self.handoff.mirror(group, 0, lambda: None)
        self.finish_copies()
        self.handoff.register_prefilled(group, group.num_tokens)
        self.handoff.register_resident(group)
        if len(self.managers) == 2:
            group.leader.lease.drop(0)
        return group

    def decode(self, sequence: Sequence, tokens: list[int]) -> None:
        """Append generated tokens; the KV of the last one is not written yet."""
        for token in tokens:
            append_sampled([sequence], StepResult([token]), 0.0)
        sequence.num_kv_tokens = len(sequence.tokens) - 1
        while sequence.num_kv_tokens > len(sequence.lease.tables[self.handoff.decode]) * SIZE:
            sequence.lease.grow(self.handoff.decode)


def release(group: PrefillGroup) -> None:
    for sequence in group.sequences:
        sequence.lease.release()


# -- admission


@pytest.mark.parametrize(("pools", "fits"), [((3, 3), True), ((2, 9), False), ((9, 2), False), ((3, 9), True)])
def test_blocks_of_both_cards_are_taken_all_or_nothing(pools: tuple[int, int], fits: bool) -> None:
    cards = Cards(*pools)
    group = cards.group(tokens_of(10))  # 3 blocks on each card
    assert cards.admit(group, 0) is fits
    if fits:
        assert [len(group.leader.lease.tables[card]) for card in (0, 1)] == [3, 3]
        assert cards.free() == [pool - 3 for pool in pools]
    else:
        assert group.leader.lease is None and cards.free() == list(pools)


@pytest.mark.parametrize(("prompt", "on_prefill", "on_decode"), [(1, 1, 1), (3, 1, 1), (4, 1, 2), (5, 2, 2), (8, 2, 3)])
def test_prompts_around_whole_blocks(prompt: int, on_prefill: int, on_decode: int) -> None:
    """The decode card has the block of the first generated token too; a prompt of exactly k blocks needs k + 1."""
    cards = Cards(8, 8)
    group = cards.group(tokens_of(prompt))
    assert cards.admit(group, 0)
    tables = group.leader.lease.tables
    assert (len(tables[0]), len(tables[1])) == (on_prefill, on_decode)


@pytest.mark.parametrize("cards", [1, 2])
def test_watermark_stays_free_on_the_decode_card(cards: int) -> None:
    pools = (8,) if cards == 1 else (3, 8)
    for reserve, fits in ((5, True), (6, False)):
        world = Cards(*pools)
        assert world.admit(world.group(tokens_of(10)), reserve) is fits


def test_watermark_counts_cached_blocks_that_admission_takes_from_the_free_list() -> None:
    cards = Cards(4)
    release(cards.prefilled(tokens_of(12)))  # 3 cached, 1 plain; all 4 free
    again = cards.group(tokens_of(12))
    assert not cards.admit(again, 1) and cards.admit(again, 0)
    assert cards.free() == [0]


def test_answer_of_one_token_takes_nothing_on_the_decode_card() -> None:
    cards = Cards(4, 4)
    group = cards.group(tokens_of(9), max_tokens=1)
    assert cards.admit(group, 99) and cards.free() == [1, 4]
    group.num_launched_tokens = 9
    cards.handoff.mirror(group, 1, lambda: None)
    assert cards.handoff.drain_outbox() == []


@pytest.mark.parametrize("pools", [(20,), (20, 20)])
@pytest.mark.parametrize(("prompt", "computed"), [(4, 4), (5, 1), (8, 4), (9, 1), (12, 4)])
def test_full_prefix_hit_still_computes_a_token(prompt: int, computed: int, pools: tuple[int, ...]) -> None:
    cards = Cards(*pools)
    release(cards.prefilled(tokens_of(prompt)))
    group = cards.group(tokens_of(prompt))
    assert cards.admit(group, 0)
    assert group.num_tokens - group.num_launched_tokens == computed >= 1


def test_no_prefix_is_found_without_prefix_caching() -> None:
    cards = Cards(20, 20, prefix_caching=False)
    release(cards.prefilled(tokens_of(12)))
    group = cards.group(tokens_of(12))
    assert cards.admit(group, 0) and group.num_launched_tokens == 0


# -- mirroring


def test_mirror_copies_new_full_blocks_and_at_the_end_the_tail() -> None:
    cards = Cards(8, 8)
    group = cards.group(tokens_of(10))
    assert cards.admit(group, 0)
    source, target = (group.leader.lease.tables[card] for card in (0, 1))
    expected = {3: [], 4: [0], 7: [], 9: [1], 10: [2]}
    for launched, blocks in expected.items():
        group.num_launched_tokens = launched
        cards.handoff.mirror(group, launched, lambda: None)
        shards = cards.handoff.drain_outbox()
        assert [shard.after_step for shard in shards] == [launched] * bool(blocks)
        assert [pair for shard in shards for pair in shard.block_pairs] == [(source[i], target[i]) for i in blocks]


@pytest.mark.parametrize("pools", [(20,), (20, 20)])
@pytest.mark.parametrize(("prompt", "tails"), [(10, 3), (8, 0)])
def test_siblings_share_full_blocks_and_have_a_tail_each(prompt: int, tails: int, pools: tuple[int, ...]) -> None:
    cards = Cards(*pools)
    group = cards.group(tokens_of(prompt), n=3)
    assert cards.admit(group, 0)
    card = cards.handoff.decode
    tables = [sequence.lease.tables[card] for sequence in group.sequences]
    assert len({tuple(table[:2]) for table in tables}) == 1 and len({table[2] for table in tables}) == 3
    group.num_launched_tokens = prompt
    cards.handoff.mirror(group, 1, lambda: None)
    copied = {target for shard in cards.handoff.drain_outbox() for _, target in shard.block_pairs}
    own_tails = {table[2] for table in (tables if len(pools) == 2 else tables[1:])}
    assert copied & {table[2] for table in tables} == (own_tails if tails else set())


def test_copies_own_their_blocks_until_they_have_drained() -> None:
    cards = Cards(8, 8)
    group = cards.group(tokens_of(10))
    cards.admit(group, 0)
    group.num_launched_tokens = 10
    cards.handoff.mirror(group, 1, lambda: None)
    (shard,) = cards.handoff.drain_outbox()
    release(group)  # aborted while the copy is in flight
    assert cards.free() == [5, 5]
    cards.handoff.copy_done(shard)
    assert cards.free() == [8, 8]


def mirrored(cards: Cards, num_tokens: int, after_step: int, done: list[int]) -> PrefillGroup:
    group = cards.group(tokens_of(num_tokens, start=1 + 1000 * len(cards.handoff.pending)))
    assert cards.admit(group, 0)
    group.num_launched_tokens = num_tokens
    cards.handoff.mirror(group, after_step, lambda: done.append(num_tokens))
    return group


def test_copies_behind_the_same_step_travel_together() -> None:
    """Each still ends on its own: its callback runs, and its blocks are free again."""
    cards, done = Cards(80, 80), list[int]()
    groups = [mirrored(cards, 4 * blocks, after_step, done) for blocks, after_step in ((2, 1), (3, 1), (1, 2), (4, 1))]
    shards = cards.handoff.drain_outbox()
    assert [(shard.copy, shard.also, shard.after_step) for shard in shards] == [(1, (2, 4), 1), (3, (), 2)]
    tables = [[group.leader.lease.tables[card] for card in (0, 1)] for group in groups]
    expected = [pair for index in (0, 1, 3) for pair in zip(*tables[index], strict=False)]
    assert list(shards[0].block_pairs) == expected
    cards.handoff.copy_done(shards[0])
    assert done == [8, 12, 16] and set(cards.handoff.pending) == {3}
    cards.handoff.copy_done(shards[1])
    for group in groups:
        release(group)
    assert cards.free() == [80, 80] and done == [8, 12, 16, 4]


def test_not_too_much_travels_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would make the first wait too long begins another; of that, the next may be a part."""
    monkeypatch.setattr(handing_off, "MERGED_BLOCKS", 5)
    cards = Cards(80, 80)
    for blocks in (3, 2, 1, 9, 1, 4):
        mirrored(cards, 4 * blocks, 1, [])
    assert [(shard.copy, *shard.also) for shard in cards.handoff.drain_outbox()] == [(1, 2), (3,), (4,), (5, 6)]


def test_a_target_that_changed_hands_in_flight_is_noticed() -> None:
    cards = Cards(8, 8)
    group = cards.group(tokens_of(10))
    cards.admit(group, 0)
    group.num_launched_tokens = 10
    cards.handoff.mirror(group, 1, lambda: None)
    (shard,) = cards.handoff.drain_outbox()
    cards.managers[1]._versions[shard.block_pairs[0][1]] += 1
    with pytest.raises(AssertionError, match="changed hands"):
        cards.handoff.copy_done(shard)


def test_blocks_count_on_the_decode_card_only_once_registered() -> None:
    """A prompt admitted while another's copies are in flight may not share their targets."""
    cards = Cards(20, 20)
    first = cards.group(tokens_of(9))
    cards.admit(first, 0)
    first.num_launched_tokens = 9
    cards.handoff.mirror(first, 1, lambda: None)
    second = cards.group(tokens_of(9))
    cards.admit(second, 0)
    assert not set(first.leader.lease.tables[1]) & set(second.leader.lease.tables[1])
    cards.finish_copies()
    cards.handoff.register_resident(first)
    third = cards.group(tokens_of(9))
    cards.admit(third, 0)
    assert third.leader.lease.tables[1][:2] == first.leader.lease.tables[1][:2]


# -- who shares


def test_decode_card_shares_among_living_sequences_only() -> None:
    cards = Cards(20, 20)
    first = cards.prefilled(tokens_of(9))
    second = cards.prefilled(tokens_of(9))
    shared = first.leader.lease.tables[1][:2]
    assert second.leader.lease.tables[1][:2] == shared and second.num_mirrored_blocks == 2
    release(first)
    third = cards.prefilled(tokens_of(9))
    assert third.leader.lease.tables[1][:2] == shared
    release(second)
    release(third)
    assert cards.free() == [20, 20] and cards.managers[1].num_cached_blocks == 0
    fourth = cards.group(tokens_of(9))
    cards.admit(fourth, 0)
    assert fourth.num_launched_tokens == 8 and fourth.num_mirrored_blocks == 0  # found on card 0, copied again


# -- evacuation and return


def evacuated(cards: Cards, group: PrefillGroup) -> bool:
    done: list[int] = []
    if not cards.evacuate(group.leader, lambda: done.append(1)):
        return False
    assert not done
    cards.finish_copies()
    assert done == [1]
    return True


def test_evacuation_and_return_copy_what_the_other_card_lacks() -> None:
    cards = Cards(20, 20)
    group = cards.prefilled(tokens_of(9))
    cards.decode(group.leader, tokens_of(6, 100))  # 15 tokens, KV of 14: 3 full blocks, a tail of 2 tokens
    before = cards.free()
    assert cards.evacuate(group.leader)
    (shard,) = cards.handoff.drain_outbox()
    assert (shard.src, shard.dst, len(shard.block_pairs)) == (1, 0, 2)  # the prompt's 2 full blocks are cached there
    cards.handoff.copy_done(shard)
    assert list(group.leader.lease.tables) == [0] and cards.free() == [before[0] - 4, 20]
    assert cards.bring_back(group.leader, 0)
    (shard,) = cards.handoff.drain_outbox()
    assert (shard.src, shard.dst, len(shard.block_pairs)) == (0, 1, 4)
    cards.handoff.copy_done(shard)
    assert list(group.leader.lease.tables) == [1] and len(group.leader.lease.tables[1]) == 4
    release(group)
    assert cards.free() == [20, 20]


def test_evacuated_blocks_at_an_exact_boundary_come_back_with_room_for_the_next_token() -> None:
    cards = Cards(20, 20)
    group = cards.prefilled(tokens_of(9))
    cards.decode(group.leader, tokens_of(4, 100))  # KV of 12 tokens
    assert evacuated(cards, group)
    assert cards.bring_back(group.leader, 0)
    (shard,) = cards.finish_copies()
    assert len(shard.block_pairs) == 3 and len(group.leader.lease.tables[1]) == 4


def test_evacuation_needs_room_on_the_prefill_card() -> None:
    cards = Cards(3, 20)
    group = cards.prefilled(tokens_of(9))
    cards.decode(group.leader, tokens_of(8, 100))  # KV of 16 tokens: 4 blocks
    free = cards.free()
    assert not evacuated(cards, group)
    assert cards.free() == free and list(group.leader.lease.tables) == [1]


def test_return_waits_for_the_watermark() -> None:
    cards = Cards(20, 6)
    group = cards.prefilled(tokens_of(9))
    cards.decode(group.leader, [7])
    assert evacuated(cards, group)
    assert not cards.bring_back(group.leader, 4)
    assert list(group.leader.lease.tables) == [0] and cards.free()[1] == 6
    assert cards.bring_back(group.leader, 3)


def test_evacuation_and_return_leave_a_shared_prefix_to_its_other_owner() -> None:
    cards = Cards(20, 20)
    stays, leaves = cards.prefilled(tokens_of(9)), cards.prefilled(tokens_of(9))
    cards.decode(leaves.leader, tokens_of(3, 100))
    shared = stays.leader.lease.tables[1][:2]
    assert evacuated(cards, leaves)
    assert stays.leader.lease.tables[1][:2] == shared
    assert cards.bring_back(leaves.leader, 0)
    assert leaves.leader.lease.tables[1][:2] == shared  # shared again, not copied
    (shard,) = cards.handoff.drain_outbox()
    assert not set(shared) & {target for _, target in shard.block_pairs}
    cards.handoff.copy_done(shard)
    release(stays)
    release(leaves)
    assert cards.free() == [20, 20]


@pytest.mark.parametrize("when", ["leaving", "away", "returning"])
def test_abort_while_evacuated_lets_go_of_everything(when: str) -> None:
    cards = Cards(20, 20)
    group = cards.prefilled(tokens_of(9))
    assert cards.evacuate(group.leader)
    if when != "leaving":
        cards.finish_copies()
    if when == "returning":
        assert cards.bring_back(group.leader, 0)
    group.leader.lease.release()
    group.leader.lease = None
    group.leader.move_to(State.FINISHED)
    cards.finish_copies()
    assert cards.free() == [20, 20] and not cards.handoff.pending


# -- write-back


@pytest.mark.parametrize("pools", [(30,), (30, 30)])
@pytest.mark.parametrize(("answer", "found"), [(2, 8), (3, 8), (4, 12), (7, 12), (8, 16)])
def test_written_back_answers_are_found_by_the_next_turn(pools: tuple[int, ...], answer: int, found: int) -> None:
    """Full blocks only, and not the last token's: its KV was never computed."""
    cards = Cards(*pools)
    group = cards.prefilled(tokens_of(9))
    cards.decode(group.leader, tokens_of(answer, 100))
    copied = cards.write_back(group.leader)
    assert copied == (found - 8) // SIZE * (len(pools) - 1)
    release(group)
    cards.finish_copies()
    turn = cards.group([*group.leader.tokens, 5, 6, 7, 8, 9])
    assert cards.admit(turn, 0) and turn.num_launched_tokens == found


def test_written_back_blocks_are_not_found_before_their_copy_ended() -> None:
    cards = Cards(30, 30)
    group = cards.prefilled(tokens_of(9))
    cards.decode(group.leader, tokens_of(8, 100))
    cards.write_back(group.leader)
    release(group)
    early = cards.group([*group.leader.tokens, 5])
    assert cards.admit(early, 0) and early.num_launched_tokens == 8


def test_write_back_without_room_is_skipped_and_evicts_nobody() -> None:
    cards = Cards(3, 30)
    group = cards.prefilled(tokens_of(9))
    cards.decode(group.leader, tokens_of(20, 100))
    free = cards.free()
    assert cards.write_back(group.leader) is None
    assert cards.free() == free and not cards.handoff.pending


def test_write_back_twice_copies_once() -> None:
    cards = Cards(30, 30)
    first, second = cards.prefilled(tokens_of(9)), cards.prefilled(tokens_of(9))
    for group in (first, second):
        cards.decode(group.leader, tokens_of(8, 100))
    assert cards.write_back(first.leader) == 2
    cards.finish_copies()
    assert cards.write_back(second.leader) == 0


def test_write_backs_in_flight_together_do_not_disturb_each_other() -> None:
    cards = Cards(30, 30)
    groups = [cards.prefilled(tokens_of(9)) for _ in range(2)]
    for group in groups:
        cards.decode(group.leader, tokens_of(8, 100))
        assert cards.write_back(group.leader) == 2
        release(group)
    cards.finish_copies()
    assert cards.free() == [30, 30]
    turn = cards.group([*groups[0].leader.tokens, 5])
    assert cards.admit(turn, 0) and turn.num_launched_tokens == 16


# -- the same, under the engine loop on the simulated device


def small_world(pools: tuple[int, ...], **options: int) -> World:
    return World(
        tiny_config(SIZE, enable_two_gpu_pd=len(pools) == 2, pd_roles="strict", **options), pools, random.Random(0)
    )


def test_nobody_holds_card_0_while_waiting_for_card_1() -> None:
    world = small_world((30, 5), max_num_seqs=4)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    first = world.add(tokens_of(13), params)
    second = world.add(tokens_of(13, 20), params)
    world.step()
    scheduler = world.scheduler
    assert first.sequences[0].lease is not None and second.sequences[0].lease is None
    assert [m.num_free_blocks for m in scheduler.managers.values()] == [26, 1]
    world.run_to_idle()
    assert second.finished


def test_a_waiting_long_prompt_is_not_overtaken_for_ever() -> None:
    world = small_world((30, 8), max_num_seqs=4)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    world.add(tokens_of(17), params)
    long = world.add(tokens_of(25, 20), params)
    for start in range(5):
        world.add(tokens_of(5, 10 + start), params)
    world.run_to_idle()
    order = sorted(world.requests, key=lambda request: request.timeline.admitted)
    assert order[1] is long


def test_prompt_that_fills_the_pool_exactly_is_served() -> None:
    for pools in ((5,), (5, 5)):
        world = small_world(pools, max_num_seqs=2)
        request = world.add(tokens_of(19), SamplingParams(max_tokens=1, ignore_eos=True))
        other = world.add(tokens_of(12), SamplingParams(max_tokens=8, ignore_eos=True))
        assert request is not None and other is not None
        world.run_to_idle()
        assert request.finished and other.finished
