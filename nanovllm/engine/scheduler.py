"""What runs next on which card. Owns every queue; touches no tensor; called by the engine thread only.

`schedule()` returns the shards to launch now, in order; `complete()` takes a shard's result back and returns the
sampled tokens; `finish()` is the one place where a sequence ends, whatever the reason.

Roles. One card prefills and decodes, chunks and decode rows in one step under a token budget. Of two, card 0 prefills
and card 1 decodes; with strict roles that is all. With elastic ones both cards may do both: `Placement` says where a
prompt goes, `Moves` who leaves the card it decodes on. Card 1 then prefills in chunks that its steps have room for, or
(`lends`) on SMs that they leave.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from functools import partial
from typing import Any

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.decode_batch import DecodeBatch, DecodePlan
from nanovllm.engine.handoff import Handoff
from nanovllm.engine.moves import Moves
from nanovllm.engine.pace import Pace
from nanovllm.engine.placement import Placement
from nanovllm.engine.recovery import Recovery
from nanovllm.engine.request_states import State
from nanovllm.engine.sequence import PrefillGroup, Request, Sequence, Timeline
from nanovllm.engine.shards import (
    CopyShard,
    DecodeShard,
    MixedShard,
    PrefillChunk,
    PrefillShard,
    Shard,
    StepResult,
)
from nanovllm.engine.step_sizes import HELP_ALONE_TOKENS, LENT_TOKENS, MAX_SEQUENCES, tokens_within
from nanovllm.engine.stopwatch import Stopwatch

PREFILL_STEPS_IN_FLIGHT = 2  # one computes, one waits in the card's queue: the host never starves the card
LIVES_TO_DECODE = frozenset({State.PREFILLING, State.COPYING, State.READY, State.DECODING, State.RETURNING})


class Scheduler:
    """Queues and policy over `Handoff`'s blocks.

    `num_blocks`: (card 0, card 1), or (card 0,) for one card, which then prefills and decodes. `prefill_token_s`: what
    a prompt takes, in seconds a token, if that was measured. `lends`: whether the decode card of elastic roles takes
    prompts on SMs that its decode steps leave, in place of mixed steps.
    """

    def __init__(
        self, config: Config, num_blocks: tuple[int, ...], prefill_token_s: float = 0.0, lends: bool = False
    ) -> None:
        self.config = config
        self.block_size = config.kvcache_block_size
        self.prefill_card, self.decode_card = 0, len(num_blocks) - 1
        self.elastic = len(num_blocks) == 2 and config.pd_roles == "elastic"
        self.lends = lends and self.elastic
        self.lent_steps: set[int] = set()  # of the decode card, in flight
        # Prefixes are looked up on card 0 alone; the decode card of two shares blocks among live sequences only.
        self.managers = {
            card: BlockManager(count, self.block_size, keep_cached=config.enable_prefix_caching and card == 0)
            for card, count in enumerate(num_blocks)
        }
        self.handoff = Handoff(self.managers, self.prefill_card, self.decode_card, config.enable_prefix_caching)
        decoding = self.managers if self.elastic else (self.decode_card,)
        self.pace = Pace(len(num_blocks), config.max_num_seqs, config.itl_slo_ms, prefill_token_s)
        self.batches = {card: DecodeBatch(card, self.managers[card], config, self.pace) for card in decoding}
        self.waiting: list[tuple[tuple[int, int], PrefillGroup]] = []  # heap by arrival
        self.num_waiting_tokens = 0
        self.prefilling: dict[int, deque[PrefillGroup]] = {card: deque() for card in self.managers}
        self.copying: set[PrefillGroup] = set()
        self.evacuating: set[Sequence] = set()
        self.evacuated: list[Sequence] = []
        self.returning: set[Sequence] = set()
        # By card and step: groups, and how far each got.
        self.launched_prefills: dict[int, dict[int, list[tuple[PrefillGroup, int]]]] = {c: {} for c in self.managers}
        # Since they were last taken: from a prompt's end on card 0 to its last block on the decode card.
        self.exposed_copies_s: list[float] = []
        self.paused = False
        self.back_pressure = Stopwatch()  # runs while prompts wait for it
        self.counts: Counter[str] = Counter()
        self.cards = tuple(self.managers)  # that are used
        self.placement = Placement(self)
        self.moves = Moves(self)
        self.recovery = Recovery(self)

    @property
    def main_batch(self) -> DecodeBatch:
        """Of the decode card."""
        return self.batches[self.decode_card]

    # -- in

    def add(self, request: Request) -> None:
        self.placement.wait(PrefillGroup(request.sequences))

    # -- what to launch

    def schedule(self) -> Iterator[Shard]:
        """Shards to launch now, each before the next is planned: admitting prompts to card 0 takes longer than all the
        rest, and decode steps do not wait for it. A copy comes after the step it waits for."""
        self.moves.return_evacuated()
        if self.elastic:
            self.moves.hand_off_kept()
            self.moves.balance()
        for card in reversed(self.cards):
            for plan_step in (self._plan_lent, self._plan_step):
                if (step := plan_step(card)) is not None:
                    yield step
            yield from self.handoff.drain_outbox()
        self.back_pressure.set(self.paused and bool(self.waiting))

    def _plan_step(self, card: int) -> Shard | None:
        """The next step of a card: chunks of prompts, decode rows, or both."""
        chosen, decode = self.ready_for_prefill(card), self.ready_for_decode(card)
        if not chosen and decode is None:
            return None
        if decode is not None and self.elastic and self.pace.lacks_measurement(card):
            chosen = []  # they go on with the next step
        step = self.managers[card].launch_step()
        prefill = self._launch_prefill(card, step, chosen) if chosen else None
        if decode is None:
            return prefill
        shard = self.batches[card].launch(step, decode, beside_lent=card == self.decode_card and bool(self.lent_steps))
        return shard if prefill is None else MixedShard(card, step, prefill, shard)

    def _plan_lent(self, card: int) -> PrefillShard | None:
        """The next prefill step beside the decode card's other steps. What it writes, they do not touch: sequences join
        them when it has completed."""
        chosen = self.ready_for_prefill(card, lent=True) if self.lends and card == self.decode_card else []
        if not chosen:
            return None
        step = self.managers[card].launch_step(lent=True)
        self.lent_steps.add(step)
        return self._launch_prefill(card, step, chosen, lent=True)

    def ready_for_decode(self, card: int) -> DecodePlan | None:
        """The rows of the next step of a card, if it decodes."""
        batch = self.batches.get(card)
        return None if batch is None else batch.plan(partial(self.moves.make_room, batch))

    def ready_for_prefill(self, card: int, lent: bool = False) -> list[tuple[PrefillGroup, int]]:
        """The next chunks of a card: (group, tokens). Prompts already begun first, then new ones in arrival order.
        lent: for a lent step."""
        if self.has_prefills_ahead(card):
            return []
        budget_tokens, budget_rows = self._budget_tokens(card, lent), self.config.max_num_seqs
        chosen: list[tuple[PrefillGroup, int]] = []
        for group in self._prefill_candidates(card, lent) if budget_tokens else ():
            if chosen and len(group.sequences) > budget_rows:  # each samples: bounds the logits of a step
                break
            if lent and len(chosen) == MAX_SEQUENCES:  # more would be launched eagerly, and not told of its SMs
                break
            count = min(budget_tokens, group.num_tokens - group.num_launched_tokens)
            chosen.append((group, count))
            budget_tokens -= count
            budget_rows -= len(group.sequences)
            if budget_tokens == 0:
                break
        return chosen

    def has_prefills_ahead(self, card: int) -> bool:
        """Whether as many steps with prompts are in flight there as may be."""
        return len(self.launched_prefills[card]) >= PREFILL_STEPS_IN_FLIGHT

    def _budget_tokens(self, card: int, lent: bool) -> int:
        """Prompt tokens that the next step of a card may compute; 0: its rows may not be launched now, or it is the
        other kind of step, lent or not, that takes prompts."""
        most, batch = self.config.max_num_batched_tokens, self.batches.get(card)
        rows = batch.num_rows if batch is not None else 0
        if self.lends and card == self.decode_card and (lent or rows):
            return min(most, LENT_TOKENS[-1]) if lent and rows else 0
        if batch is not None and rows and not batch.may_launch:
            return 0  # a chunk travels with the rows
        if self.elastic:
            alone = self.pace.prefill_tokens if card == self.prefill_card else HELP_ALONE_TOKENS
            return min(most, self.pace.chunk_tokens(card, rows) if rows else alone)
        return most if card != self.decode_card else tokens_within(most, rows, self.config.max_num_seqs)

    def _prefill_candidates(self, card: int, lent: bool) -> Iterator[PrefillGroup]:
        steps = self.launched_prefills[card].items()  # lent ones run beside the others: a prompt never is in both
        elsewhere = {group for step, chunks in steps if (step in self.lent_steps) != lent for group, _ in chunks}
        begun = [group for group in self.prefilling[card] if group.num_launched_tokens < group.num_tokens]
        yield from [group for group in begun if group not in elsewhere]
        yield from self.placement.begin(card)

    def _launch_prefill(
        self, card: int, step: int, chosen: list[tuple[PrefillGroup, int]], lent: bool = False
    ) -> PrefillShard:
        chunks = tuple(self._chunk(group, count) for group, count in chosen)
        self.launched_prefills[card][step] = [(group, group.num_launched_tokens) for group, _ in chosen]
        for group, _ in chosen:
            self.handoff.mirror(group, step, partial(self._settle, group), partial(self.recovery.give_up, group))
        return PrefillShard(card, step, chunks, lent)

    def _chunk(self, group: PrefillGroup, count: int) -> PrefillChunk:
        leader, start = group.leader, group.num_launched_tokens
        assert leader.lease is not None
        group.num_launched_tokens = end = start + count
        table = leader.lease.tables[group.prefill_card][: -(-end // self.block_size)]
        rows = tuple(sequence.sampling_row() for sequence in group.sequences) if end == group.num_tokens else ()
        if rows:
            for sequence in group.sequences:
                sequence.num_in_flight += 1
                sequence.num_kv_tokens = end
        return PrefillChunk(leader.tokens[start:end], start, tuple(table), rows)

    # -- what came back

    def complete(
        self, shard: Shard, result: StepResult | None, seconds: float = 0.0
    ) -> tuple[list[Sequence], StepResult]:
        """A shard has completed on its card, which took it so many seconds. Returns its rows and what each sampled;
        those of sequences that have finished meanwhile are dropped here."""
        if isinstance(shard, CopyShard):
            self.handoff.copy_done(shard)
            return [], StepResult([])
        assert result is not None
        self.pace.record(shard, seconds)
        self.managers[shard.card].complete_step(shard.step)
        rows: list[Sequence] = []
        if not isinstance(shard, DecodeShard):
            launched = self.launched_prefills[shard.card].pop(shard.step)
            if isinstance(shard, PrefillShard) and shard.lent:
                self.lent_steps.remove(shard.step)
            rows = [row for group, end in launched for row in self._prefilled(group, end)]
        if not isinstance(shard, PrefillShard):
            decoded = self.batches[shard.card].launched.pop(shard.step)
            rows = rows + decoded if rows else decoded
        return self._collect(rows, result)

    def _collect(self, rows: list[Sequence], result: StepResult) -> tuple[list[Sequence], StepResult]:
        assert len(rows) == len(result.token_ids), f"{len(rows)} rows, {len(result.token_ids)} ids"
        finished, num_finished = State.FINISHED, 0
        for sequence in rows:  # little for each: it is done for every token
            sequence.num_in_flight -= 1
            if sequence.state is finished:
                num_finished += 1
        if not num_finished:
            return rows, result
        kept = [i for i, sequence in enumerate(rows) if not sequence.finished]
        logprobs = [result.logprobs[i] for i in kept] if result.logprobs else []
        return [rows[i] for i in kept], StepResult([result.token_ids[i] for i in kept], logprobs)

    def _prefilled(self, group: PrefillGroup, end: int) -> list[Sequence]:
        """A chunk that reached position `end` has completed: its full blocks count. Returns the rows it sampled."""
        if group.abandoned:
            return group.sequences if end == group.num_tokens else []
        self.handoff.register_prefilled(group, end)
        if end < group.num_tokens:
            return []
        group.prefilled = True
        if group in self.prefilling[group.prefill_card]:  # an abort has taken it out already
            self.prefilling[group.prefill_card].remove(group)
        group.leader.request.timeline.mark("prefilled")
        if group.changes_cards and group.leader.lease is not None:
            group.leader.lease.drop(group.prefill_card)
        if group.copies_in_flight:
            for sequence in group.members:
                sequence.move_to(State.COPYING)
            self.copying.add(group)
        self._settle(group)
        return group.sequences

    def _settle(self, group: PrefillGroup) -> None:
        """Ready only when the last chunk has ended and every copy has: then the blocks count on the decode card."""
        if group.abandoned or not group.prefilled or group.copies_in_flight:
            return
        self.copying.discard(group)
        self.handoff.register_resident(group)
        if group.changes_cards and group.needs_decode and group.is_first:
            self._resident(group.leader.request.timeline)
        for sequence in group.members:
            self.batches[group.decode_card].add(sequence)

    def _resident(self, timeline: Timeline) -> None:
        if timeline.resident is None:  # else a fault made siblings of it be prefilled one by one
            timeline.mark("resident")
            assert timeline.resident is not None and timeline.prefilled is not None
            self.exposed_copies_s.append(timeline.resident - timeline.prefilled)

    # -- out

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence in any state. Copies and steps in flight keep its blocks until they have drained."""
        if sequence.finished:
            return
        state = sequence.state
        self._leave_queue(sequence)
        if reason in ("stop", "length"):
            self._write_back(sequence)
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.lease = None
        sequence.move_to(State.FINISHED)
        sequence.stop_reason = stop_reason
        if all(sibling.finished for sibling in sequence.request.sequences):
            sequence.request.timeline.mark("finished")
        if state is State.PREFILLING:
            for card, groups in self.prefilling.items():
                self.prefilling[card] = deque(group for group in groups if group.members)
        sequence.finish_reason = reason  # last: readers look at it first

    def _write_back(self, sequence: Sequence) -> None:
        """From where it is whole: a sequence may be found to have ended while it moves, or with its first token."""
        whole_on = {State.READY: sequence.card, State.DECODING: sequence.card}
        whole_on |= {State.EVACUATING: self.decode_card, State.RETURNING: self.prefill_card}
        if sequence.state in whole_on:
            copied = self.handoff.write_back(sequence, whole_on[sequence.state])
            self.counts["write_backs_skipped"] += copied is None
            self.counts["write_backs"] += bool(copied)

    def drop_kv(self, sequence: Sequence) -> None:
        """It holds nothing any more, but for its tokens, and waits to be prefilled again."""
        self._leave_queue(sequence)
        assert sequence.lease is not None
        sequence.lease.release()
        sequence.lease, sequence.num_kv_tokens = None, 0
        sequence.move_to(State.WAITING)

    def _leave_queue(self, sequence: Sequence) -> None:
        if sequence.state in LIVES_TO_DECODE:
            self.batches[sequence.card].num_living -= 1
        if sequence.state in (State.READY, State.DECODING):
            self.batches[sequence.card].remove(sequence)
        elif sequence.state is State.EVACUATED:
            self.evacuated.remove(sequence)
        self.evacuating.discard(sequence)
        self.returning.discard(sequence)

    # -- the books

    @property
    def idle(self) -> bool:
        """No sequence anywhere, no launched step, no copy in flight."""
        queued = any(group.members for _, group in self.waiting)
        launched = any(manager.launched_steps > manager.completed_steps for manager in self.managers.values())
        return not (queued or self.living() or launched or self.handoff.pending)

    def groups(self) -> list[PrefillGroup]:
        """Prompts that are prefilled, or on their way to the card that decodes them."""
        return [*self.copying, *(group for queue in self.prefilling.values() for group in queue)]

    def living(self) -> list[Sequence]:
        """Every unfinished sequence that holds blocks."""
        grouped = [sequence for group in self.groups() for sequence in group.members]
        decoding = [sequence for batch in self.batches.values() for sequence in (*batch.ready, *batch.running)]
        return [*grouped, *decoding, *self.evacuating, *self.evacuated, *self.returning]

    def check_integrity(self) -> None:
        """Owners of every block on every card, recounted. For tests and idle times: it walks all blocks."""
        waiting = [sequence for _, group in self.waiting for sequence in group.members]
        assert all(sequence.lease is None for sequence in waiting), "a sequence holds blocks while it waits for more"
        waiting_tokens = sum(group.num_tokens for _, group in self.waiting)
        assert waiting_tokens == self.num_waiting_tokens, f"{waiting_tokens} waiting, not {self.num_waiting_tokens}"
        counted = Counter(sequence.card for sequence in self.living() if sequence.state in LIVES_TO_DECODE)
        for card, batch in self.batches.items():
            assert counted[card] == batch.num_living, (
                f"{counted[card]} sequences on card {card}, not {batch.num_living}"
            )
        for card, manager in self.managers.items():
            owners: Counter[int] = Counter()
            leases = [sequence.lease for sequence in self.living()]
            leases += [copy.lease for copy in self.handoff.pending.values()]
            for lease in leases:
                owners.update(lease.tables.get(card, ()) if lease is not None else ())
            for copy in self.handoff.pending.values():
                for source, target in copy.shard.block_pairs:
                    owners.update([source] if copy.shard.src == card else [])
                    owners.update([target] if copy.shard.dst == card else [])
            manager.check_integrity(owners)

    def stats(self) -> dict[str, Any]:
        """Queues now, blocks by card, and counts since the start."""
        groups = [group for queue in self.prefilling.values() for group in list(queue)]
        queues = {
            "waiting": sum(len(group.members) for _, group in list(self.waiting)),
            "prefilling": sum(len(group.members) for group in groups),
            "copying": sum(len(group.members) for group in list(self.copying)),
            "ready": sum(len(batch.ready) for batch in self.batches.values()),
            "decoding": sum(len(batch.running) for batch in self.batches.values()),
            "evacuated": len(self.evacuating) + len(self.evacuated) + len(self.returning),
        }
        blocks = {
            f"card{card}_blocks": {
                "total": manager.num_blocks,
                "free": manager.num_free_blocks,
                "cached": manager.num_cached_blocks,
            }
            for card, manager in self.managers.items()
        }
        cached_tokens = self.counts["cached_tokens"]  # read once: what is computed from it must never decrease
        tokens = {"prompt_tokens": cached_tokens + self.counts["computed_tokens"], "cached_tokens": cached_tokens}
        names = ("evacuations", "recomputes", "write_backs", "write_backs_skipped")
        others = ("pauses", "helped", "hand_offs", "taken_over", "prefilled_again")
        counts = tokens | {name: self.counts[name] for name in (*names, *others)}
        now = {"copies_in_flight": len(self.handoff.pending), "prefill_paused": self.paused}
        return queues | blocks | counts | now | {"back_pressure_seconds": self.back_pressure.seconds}

    def describe(self) -> str:
        """One line for an error message."""
        return ", ".join(f"{name}={value}" for name, value in self.stats().items())
