"""The sequences that decode on one card: who is ready, who has a slot, what each step launches. Engine thread only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.pace import Pace
from nanovllm.engine.request_states import State
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.shards import DecodeShard, NewBlock, SlotEntry

COVERED_S = 0.005  # of the card's time that must be launched ahead: Python may keep the host from it that long


class DecodePlan(NamedTuple):
    """A step's rows, and what their card does not know of them yet."""

    rows: list[Sequence]
    entries: list[SlotEntry]
    new_blocks: list[NewBlock]


class DecodeBatch:
    """Queues of one card. `num_living`: sequences that hold, or are taking, blocks there to decode."""

    def __init__(self, card: int, manager: BlockManager, config: Config, pace: Pace) -> None:
        self.card, self.manager = card, manager
        self._pace = pace if config.run_ahead is None else None
        self.block_size, self.steps_ahead = config.kvcache_block_size, config.steps_ahead
        self.ready: list[Sequence] = []
        self.running: dict[Sequence, None] = {}
        self._num_slots = config.max_num_seqs
        self.free_slots = list(range(self._num_slots))[::-1]
        self.launched: dict[int, list[Sequence]] = {}  # by step: its rows
        self.num_living = 0
        self._rows: list[Sequence] | None = None  # of the last step, as long as nobody came, left or waits for a block
        self._slots: tuple[int, ...] = ()
        self._steps_left = 0  # for which every row of `_rows` has its block and an output left to plan
        self._longest = 0
        self._last_step = 0
        self._left: tuple[int, list[int]] = (-1, [])  # at which step: tokens that running sequences may still plan

    @property
    def may_launch(self) -> bool:
        """Whether another step may be in flight. What is ready now joins behind those that are: no more than needed."""
        covered = self._pace is not None and self._pace.decode_s[self.card] >= COVERED_S
        return len(self.launched) <= (min(1, self.steps_ahead) if covered else self.steps_ahead)

    @property
    def num_rows(self) -> int:
        """Rows that the next step may have."""
        return len(self.running) + min(len(self.ready), len(self.free_slots))

    @property
    def reserve_blocks(self) -> int:
        """The watermark: a block for each sequence that lives here, plus the run-ahead.

        Progress rests on it: without, a sequence that returns takes the block that its eviction has just freed.
        """
        return self.num_living + self.steps_ahead if self.num_living else 0

    def steps_until_slots(self, count: int) -> float:
        """Steps after which so many more sequences that live here would have slots, at the latest; 0: they have."""
        missing = self.num_living + count - self._num_slots
        if missing <= 0:
            return 0
        step, left = self._left
        if step != self._last_step:  # looked up once a step, or when somebody leaves: prompts come many at a time
            left = sorted([one.max_length - len(one.tokens) - one.num_in_flight for one in self.running])
            self._left = self._last_step, left
        return left[missing - 1] if missing <= len(left) else math.inf

    # -- coming and going

    def add(self, sequence: Sequence) -> None:
        """Resident here; waits for a slot."""
        sequence.move_to(State.READY)
        self.ready.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It leaves its queue and its slot. Its blocks are the lease's matter."""
        if sequence.slot is None:
            self.ready.remove(sequence)
            return
        self.free_slots.append(sequence.slot)
        sequence.slot = None
        del self.running[sequence]
        self._rows = None
        self._left = -1, []

    def _fill_slots(self) -> None:
        if not (self.ready and self.free_slots):
            return
        self._rows = None
        self.ready.sort(key=lambda sequence: sequence.order)
        while self.ready and self.free_slots:
            sequence = self.ready.pop(0)
            sequence.slot = self.free_slots.pop()
            sequence.num_card_blocks = sequence.kv_limit_tokens = 0
            sequence.move_to(State.DECODING)
            self.running[sequence] = None

    # -- a step

    def plan(self, make_room: Callable[[list[Sequence]], None]) -> DecodePlan | None:
        """Every running sequence that has a block to write and an output left to plan; None: nothing to launch now.

        `make_room` is told of sequences that got no block. Whatever is planned must be launched.
        """
        if not self.may_launch:
            return None
        self._fill_slots()
        if self._rows is not None and self._steps_left > 0:
            return DecodePlan(self._rows, [], [])
        due = [sequence for sequence in self.running if sequence.num_kv_tokens >= sequence.kv_limit_tokens]
        stalled = [sequence for sequence in due if not self._grow(sequence)]
        if stalled:
            make_room(stalled)
            # Room that was made at once must be used at once: if nothing is in flight, nobody looks here again.
            stalled = [sequence for sequence in stalled if sequence.slot is not None and not self._grow(sequence)]
        entries: list[SlotEntry] = []
        new_blocks: list[NewBlock] = []
        for sequence in due:
            if sequence.slot is not None and self._can_step(sequence):
                self._tell_card(sequence, entries, new_blocks)
        self._keep_rows(stalled)
        return DecodePlan(self._rows, entries, new_blocks) if self._rows else None

    def _keep_rows(self, stalled: list[Sequence]) -> None:
        """The rows of this step, and of those after it until one of them needs a block or has no output to plan."""
        self._rows = [sequence for sequence in self.running if sequence.num_kv_tokens < sequence.kv_limit_tokens]
        self._slots = tuple([sequence.slot for sequence in self._rows if sequence.slot is not None])
        left = [sequence.kv_limit_tokens - sequence.num_kv_tokens for sequence in self._rows]
        self._steps_left = 0 if stalled else min(left, default=0)
        self._longest = max([sequence.num_kv_tokens for sequence in self._rows], default=0)

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure the block of the next position is there; False if the card has none."""
        lease = sequence.lease
        assert lease is not None
        missing = sequence.num_kv_tokens == len(lease.tables[self.card]) * self.block_size
        if not missing or sequence.num_planned_outputs >= sequence.request.max_tokens:
            return True
        if self.manager.num_free_blocks == 0:
            return False
        lease.grow(self.card)
        return True

    def _can_step(self, sequence: Sequence) -> bool:
        assert sequence.lease is not None
        has_block = sequence.num_kv_tokens < len(sequence.lease.tables[self.card]) * self.block_size
        return has_block and sequence.num_planned_outputs < sequence.request.max_tokens

    def _tell_card(self, sequence: Sequence, entries: list[SlotEntry], new_blocks: list[NewBlock]) -> None:
        """Only what the card does not know yet: a sequence that enters its slot, or a block it grew by.

        Then it may step until its blocks are full or its last token is planned, and needs no look till then.
        """
        assert sequence.lease is not None and sequence.slot is not None
        table, known = sequence.lease.tables[self.card], sequence.num_card_blocks
        if known == 0:
            row, last, end_ids = sequence.sampling_row(), sequence.tokens[-1], tuple(sequence.request.end_ids)
            entries.append(SlotEntry(sequence.slot, last, sequence.num_kv_tokens, tuple(table), row, end_ids))
        else:
            new_blocks += [NewBlock(sequence.slot, i, table[i]) for i in range(known, len(table))]
        sequence.num_card_blocks = len(table)
        last_tokens = sequence.num_prompt_tokens + sequence.request.max_tokens - 1  # the last output has no KV
        sequence.kv_limit_tokens = min(len(table) * self.block_size, last_tokens)

    def launch(self, step: int, plan: DecodePlan, beside_lent: bool = False) -> DecodeShard:
        """Count the planned step as launched."""
        assert plan.rows is self._rows, "somebody came or left between plan and launch"
        self.launched[step], self._last_step = plan.rows, step
        for sequence in plan.rows:  # little for each: it is done for every token
            sequence.num_in_flight += 1
            sequence.num_kv_tokens += 1
        self._steps_left -= 1
        self._longest += 1
        news = tuple(plan.entries), tuple(plan.new_blocks)
        return DecodeShard(self.card, step, self._slots, self._longest, *news, beside_lent)
