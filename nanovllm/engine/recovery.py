"""What a fault does to the plan: copies that are given up, a card that is lost, and an engine that ends.

What a sequence holds is let go of through its lease, at once; copies and launched steps keep owning blocks until they
have drained, as after an abort. Tokens are kept: a draw depends on (seed, output position) alone, so that prefilling
again changes none of those that follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.engine.decode_batch import DecodeBatch
from nanovllm.engine.sequence import PrefillGroup, Sequence
from nanovllm.engine.shards import CopyShard, Shard

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Scheduler


class Recovery:
    """Changes one scheduler's queues. Engine thread only."""

    def __init__(self, plan: Scheduler) -> None:
        self._plan = plan
        self._lost: int | None = None

    # -- a copy

    def prefill_again(self, sequence: Sequence) -> None:
        """It holds nothing any more, and waits in its place by arrival."""
        self._let_go(sequence)
        self._plan.placement.wait(PrefillGroup([sequence]))

    def give_up(self, group: PrefillGroup) -> None:
        """A prompt whose blocks do not arrive is prefilled again, by what has not ended of it."""
        if group.abandoned:
            return
        group.abandoned = True
        queue = self._plan.prefilling[group.prefill_card]
        if group in queue:
            queue.remove(group)
        self._plan.copying.discard(group)
        members = group.members
        for sequence in members:
            self._let_go(sequence)
        # Siblings that have sampled, or are about to, share no first token any more.
        together = not any(sequence.num_planned_outputs for sequence in members)
        for sequences in [members] if together and members else [[sequence] for sequence in members]:
            self._plan.placement.wait(PrefillGroup(sequences))

    def _let_go(self, sequence: Sequence) -> None:
        self._plan.drop_kv(sequence)
        self._plan.counts["prefilled_again"] += 1

    # -- a card

    def lose_card(self, card: int) -> None:
        """The other one goes on alone. What depends on this one is prefilled there, and what comes from this one counts
        no more: `is_orphan`."""
        plan, self._lost = self._plan, card
        self._drop_steps(card)
        plan.handoff.orphan(card)
        for group in plan.groups():
            if card in group.cards:
                self.give_up(group)
        batch = plan.batches.get(card)
        here = [*batch.ready, *batch.running] if batch is not None else []
        for sequence in (*here, *plan.evacuating, *plan.evacuated, *plan.returning):
            self.prefill_again(sequence)
        self._serve_alone(1 - card)

    def _drop_steps(self, card: int) -> None:
        """No token will come of what this card has launched."""
        plan = self._plan
        rows: list[Sequence] = []
        for groups in plan.launched_prefills[card].values():
            rows += [row for group, end in groups if end == group.num_tokens for row in group.sequences]
        plan.launched_prefills[card].clear()
        if card == plan.decode_card:
            plan.lent_steps.clear()
        if card in plan.batches:
            rows += [row for step in plan.batches[card].launched.values() for row in step]
            plan.batches[card].launched.clear()
        for sequence in rows:
            sequence.num_in_flight -= 1

    def _serve_alone(self, card: int) -> None:
        """From now on one card does what two did, as if there had been one only."""
        plan = self._plan
        plan.cards, plan.elastic, plan.lends = (card,), False, False
        plan.prefill_card = plan.decode_card = plan.handoff.prefill = plan.handoff.decode = card
        plan.managers[card].keep_cached = plan.config.enable_prefix_caching
        if card not in plan.batches:
            batch = DecodeBatch(card, plan.managers[card], plan.config, plan.pace)
            plan.batches = {**plan.batches, card: batch}  # not in place: other threads may be reading

    def is_orphan(self, shard: Shard) -> bool:
        """Whether a shard was in flight when its card was lost."""
        if isinstance(shard, CopyShard):
            return shard.copy in self._plan.handoff.orphans
        return shard.card == self._lost

    def forget(self, shard: Shard) -> None:
        """A shard has drained, and nothing that it did counts: it only lets go of its blocks."""
        if isinstance(shard, CopyShard):
            self._plan.handoff.copy_failed(shard)
        else:
            self._plan.managers[shard.card].complete_step(shard.step)

    # -- the end

    def clear(self) -> None:
        """The engine ends: nothing waits, no sequence holds anything, and of what is in flight nothing counts."""
        plan = self._plan
        for card in plan.managers:
            self._drop_steps(card)
            plan.handoff.orphan(card)
        for group in plan.groups():
            self.give_up(group)
        for sequence in plan.living():
            self.prefill_again(sequence)
        plan.waiting.clear()
        plan.num_waiting_tokens = 0
        never_launched, plan.handoff.outbox = plan.handoff.outbox, []
        for shard in never_launched:
            plan.handoff.copy_failed(shard)
