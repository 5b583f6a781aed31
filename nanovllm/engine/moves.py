"""Sequences that leave the card they decode on: a card that is full, hand-offs, take-overs. Touches no tensor.

Eviction makes room for those that wait for a block: to the other card, which decodes them with elastic roles, and from
which they come back, or back to the queue. With elastic roles, card 0 hands off what it kept when prompts queue; while
none do, the cards share what there is to decode.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from nanovllm.engine.decode_batch import DecodeBatch
from nanovllm.engine.request_states import State
from nanovllm.engine.sequence import PrefillGroup, Sequence

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Scheduler

MOVES_IN_FLIGHT = 16  # of sequences between the cards at a time: each waits for the copies before its own
BALANCE_AFTER_S = 0.25  # for which card 0 had no prompt, before it takes over part of a batch
BALANCE_ROWS = 32  # of the larger batch, beyond twice the smaller


class Moves:
    """Changes one scheduler's queues. Engine thread only."""

    def __init__(self, plan: Scheduler) -> None:
        self._plan = plan
        self._last_busy_step = 0  # of the decode card, launched when card 0 last had a prompt

    # -- a card that decodes is full

    def make_room(self, batch: DecodeBatch, stalled: list[Sequence]) -> None:
        """Evict the youngest until as many blocks are on their way as sequences wait for one."""
        missing = len(stalled) - self._plan.handoff.num_coming_blocks(batch.card)
        candidates = sorted([*batch.running, *batch.ready], key=lambda sequence: sequence.order)
        while missing > 0 and len(candidates) > 1:
            victim = candidates.pop()
            assert victim.lease is not None
            missing -= len(victim.lease.tables[batch.card]) + (victim in stalled)
            self._evict(victim)

    def _evict(self, sequence: Sequence) -> None:
        """To the other card if that has room; else its KV is dropped and computed again, its tokens are kept."""
        plan = self._plan
        if self._hand_off(sequence) if sequence.card != plan.decode_card else self._evacuate(sequence):
            return
        if sequence.card == plan.prefill_card:
            plan.handoff.write_back(sequence, plan.prefill_card)
        plan.drop_kv(sequence)
        plan.placement.wait(PrefillGroup([sequence]))
        plan.counts["recomputes"] += 1

    def _evacuate(self, sequence: Sequence) -> bool:
        """From the decode card of two to card 0, which goes on decoding it if it decodes and has a slot and a block for
        that; False if it is full."""
        plan = self._plan
        if plan.prefill_card == plan.decode_card:
            return False
        taken = plan.elastic and self._num_taken < plan.config.max_num_seqs and self._take_over(sequence)
        waits = partial(self._evacuated, sequence)
        if not (taken or self._leave_decode_card(sequence, sequence.num_kv_tokens, 0, waits)):
            return False
        plan.counts["evacuations"] += 1
        return True

    def _leave_decode_card(
        self, sequence: Sequence, num_tokens: int, reserve_blocks: int, done: Callable[[], None]
    ) -> bool:
        """Start moving a sequence to card 0, where it gets blocks for `num_tokens`; False if that has no room."""
        plan = self._plan
        main = plan.main_batch
        steps, failed = plan.managers[main.card].last_main_step, partial(plan.recovery.prefill_again, sequence)
        if not plan.handoff.move(sequence, plan.prefill_card, num_tokens, reserve_blocks, steps, done, failed):
            return False
        main.remove(sequence)
        main.num_living -= 1
        sequence.move_to(State.EVACUATING)
        plan.evacuating.add(sequence)
        return True

    def _evacuated(self, sequence: Sequence) -> None:
        plan = self._plan
        plan.evacuating.discard(sequence)
        sequence.move_to(State.EVACUATED)
        plan.evacuated.append(sequence)
        plan.evacuated.sort(key=lambda sequence: sequence.order)

    def return_evacuated(self) -> None:
        """Evacuated sequences come back in arrival order, before any new prompt."""
        plan = self._plan
        while plan.evacuated and self._send(plan.evacuated[0], after_step=0):
            self._returns(plan.evacuated.pop(0))

    def hand_off_kept(self) -> None:
        """What card 0 decodes goes to the decode card, oldest first, when prompts queue and there is room."""
        plan = self._plan
        own = plan.batches[plan.prefill_card]
        if not (own.running or own.ready) or plan.evacuated or not self._has_prompts():
            return
        if plan.main_batch.num_living >= plan.config.max_num_seqs or self._num_moving >= MOVES_IN_FLIGHT:
            return
        for sequence in sorted([*own.running, *own.ready], key=lambda sequence: sequence.order):
            if self._num_moving >= MOVES_IN_FLIGHT or not self._hand_off(sequence):
                return

    def _has_prompts(self) -> bool:
        """Whether card 0 has any to prefill."""
        plan = self._plan
        return bool(plan.waiting or plan.prefilling[plan.prefill_card])

    @property
    def _num_moving(self) -> int:
        return len(self._plan.evacuating) + len(self._plan.returning)

    @property
    def _num_taken(self) -> int:
        """Sequences that card 0 decodes, or will."""
        plan = self._plan
        return plan.batches[plan.prefill_card].num_living + len(plan.evacuating)

    def balance(self) -> None:
        """While card 0 has no prompt, what finds no slot on the decode card goes to card 0. And if one card's batch is
        more than twice the other's, half the difference moves to the smaller one; to card 0 only after a while."""
        plan = self._plan
        main, own = plan.main_batch, plan.batches[plan.prefill_card]
        steps = plan.managers[main.card].last_main_step
        if self._has_prompts() or plan.evacuated:
            self._last_busy_step = steps
            return
        seconds = (steps - self._last_busy_step) * plan.pace.decode_s[main.card]
        taken = self._num_taken
        if len(own.running) >= 2 * main.num_living + BALANCE_ROWS:
            self._give_back(own, (len(own.running) - main.num_living) // 2)
        elif main.ready and not main.free_slots:
            self._move_youngest(main.ready, plan.config.max_num_seqs - taken, self._take_over)
        elif seconds >= BALANCE_AFTER_S and len(main.running) >= 2 * taken + BALANCE_ROWS:
            self._move_youngest(main.running, (len(main.running) - taken) // 2, self._take_over)

    def _give_back(self, own: DecodeBatch, count: int) -> None:
        """To the decode card, as long as its blocks last for whole answers of those who come and who are there: who has
        to leave it again waits on card 0 for blocks, and answers nobody."""
        plan, card = self._plan, self._plan.decode_card
        if self._num_moving >= MOVES_IN_FLIGHT:
            return
        room = plan.managers[card].num_free_blocks
        room -= sum(self._missing_blocks(each, card) for each in plan.living() if each.card == card)

        def begin(sequence: Sequence) -> bool:
            nonlocal room
            room -= self._missing_blocks(sequence, card)
            return room >= 0 and self._hand_off(sequence)

        self._move_youngest(own.running, count, begin)

    def _missing_blocks(self, sequence: Sequence, card: int) -> int:
        """Those that its longest answer would still take there."""
        assert sequence.lease is not None
        return -(-sequence.max_length // self._plan.block_size) - len(sequence.lease.tables.get(card, ()))

    def _move_youngest(self, batch: Iterable[Sequence], count: int, begin: Callable[[Sequence], bool]) -> None:
        """So many of a batch, as far as few move at a time: most of their answers is still to come."""
        count = min(count, MOVES_IN_FLIGHT - self._num_moving)
        for sequence in heapq.nlargest(count, batch, key=lambda sequence: sequence.order):
            if not begin(sequence):
                return

    def _take_over(self, sequence: Sequence) -> bool:
        """From the decode card to card 0, which decodes it from then on; False if that has no room."""
        plan = self._plan
        own, done = plan.batches[plan.prefill_card], partial(self._taken_over, sequence)
        if not self._leave_decode_card(sequence, sequence.num_kv_tokens + 1, own.reserve_blocks, done):
            return False
        plan.counts["taken_over"] += 1
        return True

    def _taken_over(self, sequence: Sequence) -> None:
        plan = self._plan
        plan.evacuating.discard(sequence)
        sequence.card = plan.prefill_card
        plan.batches[sequence.card].num_living += 1
        plan.batches[sequence.card].add(sequence)

    def _hand_off(self, sequence: Sequence) -> bool:
        """From card 0, which decodes it, to the decode card; False if that has no slot or no room."""
        plan = self._plan
        own, main = plan.batches[sequence.card], plan.main_batch
        if own is main or main.num_living >= plan.config.max_num_seqs:
            return False
        if not self._send(sequence, after_step=max(own.launched, default=0)):
            return False
        own.remove(sequence)
        own.num_living -= 1
        self._returns(sequence)
        plan.counts["hand_offs"] += 1
        return True

    def _send(self, sequence: Sequence, after_step: int) -> bool:
        """Start moving a sequence to the decode card, with room for the token that its next step writes."""
        plan = self._plan
        num_tokens, reserve = sequence.num_kv_tokens + 1, plan.main_batch.reserve_blocks
        done, failed = partial(self._returned, sequence), partial(plan.recovery.prefill_again, sequence)
        return plan.handoff.move(sequence, plan.decode_card, num_tokens, reserve, after_step, done, failed)

    def _returns(self, sequence: Sequence) -> None:
        plan = self._plan
        sequence.move_to(State.RETURNING)
        sequence.card = plan.decode_card
        plan.main_batch.num_living += 1
        plan.returning.add(sequence)

    def _returned(self, sequence: Sequence) -> None:
        self._plan.returning.discard(sequence)
        self._plan.main_batch.add(sequence)
