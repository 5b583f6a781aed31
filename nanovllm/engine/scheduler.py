"""What runs next on which card. Owns every queue; touches no tensor; called by the engine thread only.

`schedule()` returns the shards to launch now, in order; `complete()` takes a shard's result back and returns the
sampled tokens; `finish()` is the one place where a sequence ends, whatever the reason.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.handoff import Handoff
from nanovllm.engine.request_states import State
from nanovllm.engine.sequence import PrefillGroup, Request, Sequence
from nanovllm.engine.shards import (
    CopyShard,
    DecodeShard,
    NewBlock,
    PrefillChunk,
    PrefillShard,
    Shard,
    SlotEntry,
    StepResult,
    TokenLogprobs,
)

PREFILL_STEPS_IN_FLIGHT = 2  # one computes, one waits in the card's queue: the host never starves the card


ON_DECODE_CARD = frozenset({State.PREFILLING, State.COPYING, State.READY, State.DECODING, State.RETURNING})


class SampledToken(NamedTuple):
    sequence: Sequence
    token: int
    logprobs: TokenLogprobs | None


class Scheduler:
    """Queues and policy over `Handoff`'s blocks.

    `num_blocks`: (card 0, card 1), or (card 0,) for one card, which then prefills and decodes.
    """

    def __init__(self, config: Config, num_blocks: tuple[int, ...]) -> None:
        self.config = config
        self.block_size = config.kvcache_block_size
        self.prefill_card, self.decode_card = 0, len(num_blocks) - 1
        # Prefixes are looked up on card 0 alone; the decode card of two shares blocks among live sequences only.
        self.managers = {
            card: BlockManager(count, self.block_size, keep_cached=config.enable_prefix_caching and card == 0)
            for card, count in enumerate(num_blocks)
        }
        self.handoff = Handoff(self.managers, self.prefill_card, self.decode_card, config.enable_prefix_caching)
        self.waiting: list[tuple[tuple[int, int], PrefillGroup]] = []  # heap by arrival
        self.prefilling: deque[PrefillGroup] = deque()
        self.copying: set[PrefillGroup] = set()
        self.ready: list[Sequence] = []
        self.running: dict[Sequence, None] = {}
        self.evacuating: set[Sequence] = set()
        self.evacuated: list[Sequence] = []
        self.returning: set[Sequence] = set()
        self.num_on_decode_card = 0  # sequences that hold, or are taking, blocks there to decode
        self.free_slots = list(range(config.max_num_seqs))[::-1]
        self.launched_prefills: dict[int, list[tuple[PrefillGroup, int]]] = {}  # by step: groups, and how far each got
        self.launched_decodes: dict[int, list[Sequence]] = {}  # by step: its rows
        self.paused = False
        self.counts: Counter[str] = Counter()

    # -- in

    def add(self, request: Request) -> None:
        self._wait(PrefillGroup(request.sequences))

    def _wait(self, group: PrefillGroup) -> None:
        heapq.heappush(self.waiting, (group.order, group))

    # -- what to launch

    def schedule(self) -> list[Shard]:
        """Shards to launch now. A copy comes after the step it waits for."""
        shards: list[Shard] = []
        self._return_evacuated()
        prefill = self.ready_for_prefill()
        if prefill is not None:
            shards.append(prefill)
        shards += self.handoff.drain_outbox()
        decode = self.ready_for_decode()
        if decode is not None:
            shards.append(decode)
        return shards + self.handoff.drain_outbox()

    def ready_for_prefill(self) -> PrefillShard | None:
        """The next chunks for the prefill card: prompts already begun first, then new ones in arrival order."""
        if len(self.launched_prefills) >= PREFILL_STEPS_IN_FLIGHT:
            return None
        budget_tokens, budget_rows = self.config.max_num_batched_tokens, self.config.max_num_seqs
        chosen: list[tuple[PrefillGroup, int]] = []
        for group in self._prefill_candidates():
            if chosen and len(group.sequences) > budget_rows:  # each samples: bounds the logits of a step
                break
            count = min(budget_tokens, group.num_tokens - group.num_launched_tokens)
            chosen.append((group, count))
            budget_tokens -= count
            budget_rows -= len(group.sequences)
            if budget_tokens == 0:
                break
        return self._launch_prefill(chosen) if chosen else None

    def _prefill_candidates(self) -> Iterator[PrefillGroup]:
        yield from [group for group in self.prefilling if group.num_launched_tokens < group.num_tokens]
        while self._may_admit() and (group := self._next_waiting()) is not None:
            if any(sequence.num_in_flight for sequence in group.sequences):
                return  # preempted with steps in flight: its last tokens are not known yet
            if not self.handoff.admit(group, self._reserve_blocks()):
                return
            heapq.heappop(self.waiting)
            self._admitted(group)
            yield group

    def _may_admit(self) -> bool:
        self._update_pause()
        return not self.paused and not self.evacuated

    def _next_waiting(self) -> PrefillGroup | None:
        while self.waiting and not self.waiting[0][1].members:
            heapq.heappop(self.waiting)  # aborted while it waited
        if not self.waiting:
            return None
        group = self.waiting[0][1]
        return group if len(group.leader.tokens) == group.num_tokens else self._refreshed(group)

    def _refreshed(self, group: PrefillGroup) -> PrefillGroup:
        """A preempted sequence whose last launched tokens arrived while it waited."""
        fresh = PrefillGroup(group.sequences)
        heapq.heapreplace(self.waiting, (fresh.order, fresh))
        return fresh

    def _admitted(self, group: PrefillGroup) -> None:
        request = group.leader.request
        if request.timeline.admitted is None:
            request.timeline.mark("admitted")
            request.num_cached_tokens = group.num_launched_tokens
            self.counts["cached_tokens"] += group.num_launched_tokens
        for sequence in group.sequences:
            sequence.move_to(State.PREFILLING)
        self.num_on_decode_card += len(group.sequences)
        self.prefilling.append(group)

    def _launch_prefill(self, chosen: list[tuple[PrefillGroup, int]]) -> PrefillShard:
        step = self.managers[self.prefill_card].launch_step()
        chunks = tuple(self._chunk(group, count) for group, count in chosen)
        self.launched_prefills[step] = [(group, group.num_launched_tokens) for group, _ in chosen]
        for group, _ in chosen:
            self.handoff.mirror(group, step, partial(self._settle, group))
        return PrefillShard(self.prefill_card, step, chunks)

    def _chunk(self, group: PrefillGroup, count: int) -> PrefillChunk:
        leader, start = group.leader, group.num_launched_tokens
        assert leader.lease is not None
        group.num_launched_tokens = end = start + count
        table = leader.lease.tables[self.prefill_card][: -(-end // self.block_size)]
        rows = tuple(sequence.sampling_row() for sequence in group.sequences) if end == group.num_tokens else ()
        if rows:
            for sequence in group.sequences:
                sequence.num_in_flight += 1
                sequence.num_kv_tokens = end
        return PrefillChunk(tuple(leader.tokens[start:end]), start, tuple(table), rows)

    def ready_for_decode(self) -> DecodeShard | None:
        """The next decode step: every running sequence that has a block to write and an output left to plan."""
        if len(self.launched_decodes) > self.config.steps_ahead:
            return None
        self._fill_slots()
        due = [sequence for sequence in self.running if sequence.num_kv_tokens >= sequence.kv_limit_tokens]
        stalled = [sequence for sequence in due if not self._grow(sequence)]
        if stalled:
            self._make_room(stalled)
        entries: list[SlotEntry] = []
        new_blocks: list[NewBlock] = []
        for sequence in due:
            if sequence.slot is not None and self._can_step(sequence):
                self._tell_card(sequence, entries, new_blocks)
        rows = [sequence for sequence in self.running if sequence.num_kv_tokens < sequence.kv_limit_tokens]
        return self._launch_decode(rows, entries, new_blocks) if rows else None

    def _fill_slots(self) -> None:
        self.ready.sort(key=lambda sequence: sequence.order)
        while self.ready and self.free_slots:
            sequence = self.ready.pop(0)
            sequence.slot = self.free_slots.pop()
            sequence.num_card_blocks = sequence.kv_limit_tokens = 0
            sequence.move_to(State.DECODING)
            self.running[sequence] = None

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure the block of the next position is there; False if the decode card has none."""
        lease = sequence.lease
        assert lease is not None
        missing = sequence.num_kv_tokens == len(lease.tables[self.decode_card]) * self.block_size
        if not missing or sequence.num_planned_outputs >= sequence.request.max_tokens:
            return True
        if self.managers[self.decode_card].num_free_blocks == 0:
            return False
        lease.grow(self.decode_card)
        return True

    def _can_step(self, sequence: Sequence) -> bool:
        assert sequence.lease is not None
        has_block = sequence.num_kv_tokens < len(sequence.lease.tables[self.decode_card]) * self.block_size
        return has_block and sequence.num_planned_outputs < sequence.request.max_tokens

    def _launch_decode(self, rows: list[Sequence], entries: list[SlotEntry], new_blocks: list[NewBlock]) -> DecodeShard:
        step = self.managers[self.decode_card].launch_step()
        self.launched_decodes[step] = rows
        slots, longest = [], 0
        for sequence in rows:  # little for each: it is done for every token
            slots.append(sequence.slot)
            sequence.num_in_flight += 1
            sequence.num_kv_tokens = length = sequence.num_kv_tokens + 1
            if length > longest:
                longest = length
        taken = cast(tuple[int, ...], tuple(slots))
        return DecodeShard(self.decode_card, step, taken, longest, tuple(entries), tuple(new_blocks))

    def _tell_card(self, sequence: Sequence, entries: list[SlotEntry], new_blocks: list[NewBlock]) -> None:
        """Only what the card does not know yet: a sequence that enters its slot, or a block it grew by.

        Then it may step until its blocks are full or its last token is planned, and needs no look till then.
        """
        assert sequence.lease is not None and sequence.slot is not None
        table, known = sequence.lease.tables[self.decode_card], sequence.num_card_blocks
        if known == 0:
            row, last, end_ids = sequence.sampling_row(), sequence.tokens[-1], tuple(sequence.request.end_ids)
            entries.append(SlotEntry(sequence.slot, last, sequence.num_kv_tokens, tuple(table), row, end_ids))
        else:
            new_blocks += [NewBlock(sequence.slot, i, table[i]) for i in range(known, len(table))]
        sequence.num_card_blocks = len(table)
        last_tokens = sequence.num_prompt_tokens + sequence.request.max_tokens - 1  # the last output has no KV
        sequence.kv_limit_tokens = min(len(table) * self.block_size, last_tokens)

    # -- the decode card is full

    def _make_room(self, stalled: list[Sequence]) -> None:
        """Evict the youngest until as many blocks are on their way as sequences wait for one."""
        missing = len(stalled) - self.handoff.num_coming_blocks
        candidates = sorted([*self.running, *self.ready], key=lambda sequence: sequence.order)
        while missing > 0 and len(candidates) > 1:
            victim = candidates.pop()
            assert victim.lease is not None
            missing -= len(victim.lease.tables[self.decode_card]) + (victim in stalled)
            self._evict(victim)

    def _evict(self, sequence: Sequence) -> None:
        """To the prefill card if that has room; else its KV is dropped and computed again, its tokens are kept."""
        self._leave_queue(sequence)
        self.num_on_decode_card -= 1
        if self.handoff.evacuate(sequence, partial(self._evacuated, sequence)):
            sequence.move_to(State.EVACUATING)
            self.evacuating.add(sequence)
            self.counts["evacuations"] += 1
            return
        if not self.handoff.two_cards:
            self.handoff.write_back(sequence)
        assert sequence.lease is not None
        sequence.lease.release()
        sequence.lease, sequence.num_kv_tokens = None, 0
        sequence.move_to(State.WAITING)
        self._wait(PrefillGroup([sequence]))
        self.counts["recomputes"] += 1

    def _evacuated(self, sequence: Sequence) -> None:
        self.evacuating.discard(sequence)
        sequence.move_to(State.EVACUATED)
        self.evacuated.append(sequence)
        self.evacuated.sort(key=lambda sequence: sequence.order)

    def _return_evacuated(self) -> None:
        """Evacuated sequences come back in arrival order, before any new prompt."""
        while self.evacuated:
            sequence = self.evacuated[0]
            if not self.handoff.bring_back(sequence, self._reserve_blocks(), partial(self._returned, sequence)):
                return
            self.evacuated.pop(0)
            sequence.move_to(State.RETURNING)
            self.num_on_decode_card += 1
            self.returning.add(sequence)

    def _returned(self, sequence: Sequence) -> None:
        self.returning.discard(sequence)
        sequence.move_to(State.READY)
        self.ready.append(sequence)

    def _reserve_blocks(self) -> int:
        """The watermark on the decode card: a block for each sequence that lives there, plus the run-ahead.

        Progress rests on it: without, a sequence that returns takes the block that its eviction has just freed.
        """
        living = self.num_on_decode_card
        return living + self.config.steps_ahead if living else 0

    def _update_pause(self) -> None:
        """Back-pressure: prefill pauses at the high mark of the decode backlog and resumes at the low one."""
        backlog = self.backlog
        if backlog >= self.config.backlog_high and not self.paused:
            self.paused = True
            self.counts["pauses"] += 1
        elif backlog <= self.config.backlog_low:
            self.paused = False

    @property
    def backlog(self) -> int:
        """Sequences that have left the decode card, and those that will find no free slot there."""
        moving = len(self.evacuating) + len(self.evacuated) + len(self.returning)
        entering = self.num_on_decode_card - len(self.running) - len(self.returning)
        return moving + max(0, entering - len(self.free_slots))

    # -- what came back

    def complete(self, shard: Shard, result: StepResult | None) -> list[SampledToken]:
        """A shard has completed on its card. Tokens of sequences that have finished meanwhile are dropped here."""
        if isinstance(shard, CopyShard):
            self.handoff.copy_done(shard)
            return []
        assert result is not None
        self.managers[shard.card].complete_step(shard.step)
        if isinstance(shard, DecodeShard):
            rows = self.launched_decodes.pop(shard.step)
        else:
            launched = self.launched_prefills.pop(shard.step)
            rows = [row for group, end in launched for row in self._prefilled(group, end)]
        return self._collect(rows, result)

    def _collect(self, rows: list[Sequence], result: StepResult) -> list[SampledToken]:
        sampled = []
        for i, (sequence, token) in enumerate(zip(rows, result.token_ids, strict=True)):
            sequence.num_in_flight -= 1
            if sequence.state is not State.FINISHED:
                sampled.append(SampledToken(sequence, token, result.logprobs_of(i) if result.logprobs else None))
        return sampled

    def _prefilled(self, group: PrefillGroup, end: int) -> list[Sequence]:
        """A chunk that reached position `end` has completed: its full blocks count. Returns the rows it sampled."""
        self.handoff.register_prefilled(group, end)
        if end < group.num_tokens:
            return []
        group.prefilled = True
        if group in self.prefilling:  # an abort has taken it out already
            self.prefilling.remove(group)
        group.leader.request.timeline.mark("prefilled")
        if self.handoff.two_cards and group.leader.lease is not None:
            group.leader.lease.drop(self.prefill_card)
        if group.copies_in_flight:
            for sequence in group.members:
                sequence.move_to(State.COPYING)
            self.copying.add(group)
        self._settle(group)
        return group.sequences

    def _settle(self, group: PrefillGroup) -> None:
        """Ready only when the last chunk has ended and every copy has: then the blocks count on the decode card."""
        if not group.prefilled or group.copies_in_flight:
            return
        self.copying.discard(group)
        self.handoff.register_resident(group)
        group.leader.request.timeline.mark("resident")
        for sequence in group.members:
            sequence.move_to(State.READY)
            self.ready.append(sequence)

    # -- out

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence in any state. Copies and steps in flight keep its blocks until they have drained."""
        if sequence.finished:
            return
        state = sequence.state
        resident = state in (State.DECODING, State.EVACUATING)
        self._leave_queue(sequence)
        self.num_on_decode_card -= state in ON_DECODE_CARD
        if resident and reason in ("stop", "length"):
            self._write_back(sequence)
        if sequence.lease is not None:
            sequence.lease.release()
            sequence.lease = None
        sequence.move_to(State.FINISHED)
        sequence.stop_reason = stop_reason
        if all(sibling.finished for sibling in sequence.request.sequences):
            sequence.request.timeline.mark("finished")
        if state is State.PREFILLING:
            self.prefilling = deque(group for group in self.prefilling if group.members)
        sequence.finish_reason = reason  # last: readers look at it first

    def _write_back(self, sequence: Sequence) -> None:
        copied = self.handoff.write_back(sequence)
        self.counts["write_backs_skipped"] += copied is None
        self.counts["write_backs"] += bool(copied)

    def _leave_queue(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.free_slots.append(sequence.slot)
            sequence.slot = None
            del self.running[sequence]
        elif sequence.state is State.READY:
            self.ready.remove(sequence)
        elif sequence.state is State.EVACUATED:
            self.evacuated.remove(sequence)
        self.evacuating.discard(sequence)
        self.returning.discard(sequence)

    # -- the books

    @property
    def idle(self) -> bool:
        """No sequence anywhere, no launched step, no copy in flight."""
        queued = any(group.members for _, group in self.waiting)
        in_flight = self.launched_prefills or self.launched_decodes or self.handoff.pending
        return not (queued or self.living() or in_flight)

    def living(self) -> list[Sequence]:
        """Every unfinished sequence that holds blocks."""
        grouped = [sequence for group in (*self.prefilling, *self.copying) for sequence in group.members]
        return [*grouped, *self.ready, *self.running, *self.evacuating, *self.evacuated, *self.returning]

    def check_integrity(self) -> None:
        """Owners of every block on every card, recounted. For tests and idle times: it walks all blocks."""
        waiting = [sequence for _, group in self.waiting for sequence in group.members]
        assert all(sequence.lease is None for sequence in waiting), "a sequence holds blocks while it waits for more"
        counted = sum(sequence.state in ON_DECODE_CARD for sequence in self.living())
        assert counted == self.num_on_decode_card, (
            f"{counted} sequences on the decode card, not {self.num_on_decode_card}"
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
        queues = {
            "waiting": sum(len(group.members) for _, group in list(self.waiting)),
            "prefilling": sum(len(group.members) for group in list(self.prefilling)),
            "copying": sum(len(group.members) for group in list(self.copying)),
            "ready": len(self.ready),
            "decoding": len(self.running),
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
        names = ("cached_tokens", "evacuations", "recomputes", "write_backs", "write_backs_skipped", "pauses")
        return queues | blocks | {name: self.counts[name] for name in names} | {"prefill_paused": self.paused}

    def describe(self) -> str:
        """One line for an error message."""
        return ", ".join(f"{name}={value}" for name, value in self.stats().items())
