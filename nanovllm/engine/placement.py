"""Prompts that wait: which card prefills the next one, which one will decode it, and whether it may begin now.

They begin in arrival order. Card 0 prefills them for the decode card while that has room and not too many sequences
wait for its slots. With elastic roles card 0 keeps others for itself, and while prompts queue there the decode card
takes one, which it then decodes. Touches no tensor.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanovllm.engine.decode_batch import DecodeBatch
from nanovllm.engine.request_states import State
from nanovllm.engine.sequence import PrefillGroup

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Scheduler

KEEP_AFTER_S = 0.5  # for which a sequence that has begun to answer would wait for a slot of the decode card
HELP_AFTER_S = 0.03  # of prefill work waiting for card 0, before the decode card takes a prompt


class Placement:
    """Changes one scheduler's queues. Engine thread only."""

    def __init__(self, plan: Scheduler) -> None:
        self._plan = plan

    # -- the queue

    def wait(self, group: PrefillGroup) -> None:
        """In its place by arrival."""
        self._plan.num_waiting_tokens += group.num_tokens
        heapq.heappush(self._plan.waiting, (group.order, group))

    def begin(self, card: int) -> Iterator[PrefillGroup]:
        """Prompts that a card may begin with now, in arrival order. Each is admitted when it is asked for."""
        plan = self._plan
        while (group := self._next_waiting()) is not None:
            if plan.evacuated or any(sequence.num_in_flight for sequence in group.sequences):
                return  # those that were moved away come first; of a preempted one, the last tokens are not known yet
            if not (self._place(group) if card == plan.prefill_card else self._help(group)):
                return
            heapq.heappop(plan.waiting)
            plan.num_waiting_tokens -= group.num_tokens
            self._admitted(group)
            yield group

    def _next_waiting(self) -> PrefillGroup | None:
        waiting = self._plan.waiting
        while waiting and not waiting[0][1].members:
            _, aborted = heapq.heappop(waiting)
            self._plan.num_waiting_tokens -= aborted.num_tokens
        if not waiting:
            return None
        group = waiting[0][1]
        return group if len(group.leader.tokens) == group.num_tokens else self._refreshed(group)

    def _refreshed(self, group: PrefillGroup) -> PrefillGroup:
        """A preempted sequence whose last launched tokens arrived while it waited."""
        fresh = PrefillGroup(group.sequences)
        self._plan.num_waiting_tokens += fresh.num_tokens - group.num_tokens
        heapq.heapreplace(self._plan.waiting, (fresh.order, fresh))
        return fresh

    # -- where a prompt goes

    def _place(self, group: PrefillGroup) -> bool:
        """Card 0 prefills it: for the decode card while that has room, else, with elastic roles, for itself. A slot
        that is free soon is worth waiting for: there its steps are shared by more."""
        plan = self._plan
        main, may_admit = plan.main_batch, self._may_admit()
        own = plan.batches.get(plan.prefill_card, main)
        keeps = own is not main and self._has_slots(own, group)
        waits = keeps and not self._has_slots(main, group)
        if waits and main.steps_until_slots(len(group.sequences)) > plan.pace.steps_in(KEEP_AFTER_S):
            if self._admit(group, plan.prefill_card, own):
                return True
        if may_admit and self._admit(group, plan.prefill_card, main):
            return True
        return keeps and self._admit(group, plan.prefill_card, own)

    def _help(self, group: PrefillGroup) -> bool:
        """The decode card takes a prompt that would wait on card 0, unless that holds much of it already."""
        plan = self._plan
        main = plan.main_batch
        if not plan.elastic or not plan.has_prefills_ahead(plan.prefill_card):
            return False
        if plan.pace.seconds_of(plan.num_waiting_tokens) < HELP_AFTER_S or not self._has_slots(main, group):
            return False
        rows = main.num_rows
        if not (plan.pace.keeps_slo_lending(rows) if plan.lends else plan.pace.keeps_slo(main.card, rows)):
            return False  # for a prompt once begun it is no limit: others may wait for its blocks
        if 2 * plan.handoff.num_cached_tokens(group) > group.num_tokens or not self._admit(group, main.card, main):
            return False
        plan.counts["helped"] += 1
        return True

    def _admit(self, group: PrefillGroup, prefill_card: int, batch: DecodeBatch) -> bool:
        return self._plan.handoff.admit(group, prefill_card, batch.card, batch.reserve_blocks)

    def _has_slots(self, batch: DecodeBatch, group: PrefillGroup) -> bool:
        """Room among those that live there; a group of more than all slots needs an empty card."""
        return batch.num_living == 0 or batch.num_living + len(group.sequences) <= self._plan.config.max_num_seqs

    def _admitted(self, group: PrefillGroup) -> None:
        plan, request = self._plan, group.leader.request
        if request.timeline.admitted is None:
            request.timeline.mark("admitted")
            request.num_cached_tokens = group.num_launched_tokens
            plan.counts["computed_tokens"] += group.num_tokens - group.num_launched_tokens
            plan.counts["cached_tokens"] += group.num_launched_tokens
        for sequence in group.sequences:
            sequence.card = group.decode_card
            sequence.move_to(State.PREFILLING)
        plan.batches[group.decode_card].num_living += len(group.sequences)
        plan.prefilling[group.prefill_card].append(group)

    # -- back-pressure

    def _may_admit(self) -> bool:
        """Prefill pauses at the high mark of the decode backlog and resumes at the low one."""
        plan, backlog = self._plan, self.backlog
        if backlog >= plan.config.backlog_high and not plan.paused:
            plan.paused = True
            plan.counts["pauses"] += 1
        elif backlog <= plan.config.backlog_low:
            plan.paused = False
        return not plan.paused

    @property
    def backlog(self) -> int:
        """Sequences that have left the decode card, and those that will find no free slot there."""
        plan = self._plan
        moving = len(plan.evacuating) + len(plan.evacuated) + len(plan.returning)
        main = plan.main_batch
        entering = main.num_living - len(main.running) - len(plan.returning)
        return moving + max(0, entering - len(main.free_slots))
