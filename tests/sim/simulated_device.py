"""Cards that do their work late, in seeded disorder, and notice when memory is not what it should be.

`SimulatedExecutor` is an executor for the real engine loop. Each card has an ordered queue of steps and one of lent
steps, each copy direction an ordered queue of copies; nothing happens until `advance` picks one queue and moves its
head by one phase. A step reads at its start and reads again and writes at its end; a copy moves one half, then the
other.
A page cell holds (parent value, value) where value = mix(parent value, token): a chain over the sequence's tokens,
so that a context is right exactly if its cells link up. Free blocks are poisoned, copy targets are torn until the
copy ends, and the sampled token is a function of the context's last value: corruption shows in the tokens, too.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.executor import Executor, Job
from nanovllm.engine.shards import NO_TOKEN, CopyShard, DecodeShard, MixedShard, PrefillShard, Shard, StepResult

ROOT = 0x1234567
VOCABULARY = 50
EOS = 0
POISON = ("poison", -1)
TORN = ("torn", -2)
JUNK_ID = -7  # no token: whoever takes it for one is found out


class DeviceFault(RuntimeError):
    """Made to happen by a test."""


class CorruptKV(AssertionError):
    """Memory does not hold what the plan says it holds."""


def mix(value: int, token: int) -> int:
    value = (value ^ (token + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    return value ^ (value >> 29)


def next_token(value: int, seed: int, position: int) -> int:
    return mix(mix(value, seed), position) % VOCABULARY


def seconds_of(shard: Shard) -> float:
    """What a step takes, as its card reports it: 1 ms a token or row, and 2 ms where rows decode."""
    if isinstance(shard, PrefillShard):
        return 0.001 * shard.num_tokens
    if isinstance(shard, DecodeShard):
        return 0.002 + 0.001 * len(shard.slots)
    return seconds_of(shard.prefill) + seconds_of(shard.decode) if isinstance(shard, MixedShard) else 0.0


def num_rows(shard: Shard) -> int:
    """Ids in the result of a step."""
    if isinstance(shard, MixedShard):
        return shard.prefill.num_samples + len(shard.decode.slots)
    assert not isinstance(shard, CopyShard)
    return len(shard.slots) if isinstance(shard, DecodeShard) else shard.num_samples


def expected_tokens(prompt: list[int], seed: int, max_tokens: int, stop_ids: set[int]) -> list[int]:
    """What a sequence must generate, from the definition alone."""
    value = ROOT
    for token in prompt:
        value = mix(value, token)
    out: list[int] = []
    while len(out) < max_tokens:
        out.append(next_token(value, seed, len(out)))
        value = mix(value, out[-1])
        if out[-1] in stop_ids:
            break
    return out


@dataclass
class Slot:
    token: int
    length: int
    table: list[int]
    seed: int
    position: int
    end_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    alive: bool = True  # until it has drawn an end id: from then on it writes nothing, and what it returns is nobody's


class Card:
    """Pages and slots of one card."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pages: list[list[tuple]] = [[POISON] * block_size for _ in range(num_blocks)]
        self.slots: dict[int, Slot] = {}

    def read_context(self, table: list[int], length: int) -> int:
        """The chain value after `length` tokens; `CorruptKV` unless every cell links to its predecessor."""
        value = ROOT
        for position in range(length):
            cell = self.pages[table[position // self.block_size]][position % self.block_size]
            if cell[0] != value:
                block = table[position // self.block_size]
                raise CorruptKV(f"position {position}, block {block}: found {cell}, expected a child of {value}")
            value = cell[1]
        return value

    def write(self, table: list[int], position: int, parent: int, token: int) -> int:
        value = mix(parent, token)
        self.pages[table[position // self.block_size]][position % self.block_size] = (parent, value)
        return value


@dataclass
class Task:
    job: Job
    phases: list = field(default_factory=list)  # callables left to run
    executed: bool = False


def lane_of(step: PrefillShard | DecodeShard | MixedShard) -> tuple[int, bool]:
    """(card, whether it is lent): steps of a lane run in order."""
    return step.card, isinstance(step, PrefillShard) and step.lent


class SimulatedExecutor(Executor):
    """See the module. `advance()` moves one randomly chosen queue by one phase; False if nothing can move."""

    def __init__(self, managers: Mapping[int, BlockManager], rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.managers = managers
        self.cards = {card: Card(m.num_blocks, m.block_size) for card, m in managers.items()}
        self.steps: dict[tuple[int, bool], deque[Task]] = {}  # by card, and whether they are lent
        self.copies: dict[tuple[int, int], deque[Task]] = {}
        self.reported_steps: set[tuple[int, int]] = set()  # (card, step)
        self.executed_steps: set[tuple[int, int]] = set()
        self.broken: set[tuple[int, bool]] = set()  # lanes in which a step has failed: those behind it bring rubbish
        self.rubbish: set[tuple[int, int]] = set()  # (card, step) of these
        # What goes wrong with the next phase of a task; and with the row of a step that has ended.
        self.fails: Callable[[Task], Exception | None] = lambda task: None
        self.spoils: Callable[[Shard, int], bool] = lambda shard, row: False

    # -- engine's side

    def launch(self, shard: Shard) -> None:
        self.num_in_flight += 1
        task = Task(Job(shard, seconds=seconds_of(shard)))
        if isinstance(shard, CopyShard):
            task.phases = [lambda: self._copy_begin(task), lambda: self._copy_end(task)]
            self.copies.setdefault((shard.src, shard.dst), deque()).append(task)
            return
        task.phases = [lambda: self._step_begin(shard), lambda: self._step_end(task)]
        self.steps.setdefault(lane_of(shard), deque()).append(task)

    # -- the world's side

    def poison_free_blocks(self) -> None:
        """Blocks without an owner and without a hash hold nothing: make that true."""
        for card, manager in self.managers.items():
            for block in range(manager.num_blocks):
                if manager._refs[block] == 0 and manager._hashes[block] is None:
                    self.cards[card].pages[block] = [POISON] * manager.block_size

    def advance(self) -> bool:
        movable = [
            queue for queue in (*self.steps.values(), *self.copies.values()) if queue and self._may_move(queue[0])
        ]
        if not movable:
            return False
        queue = self.rng.choice(movable)
        task = queue[0]
        if task.phases:
            self._run_phase(task)
            return True
        queue.popleft()
        shard = task.job.shard
        if not isinstance(shard, CopyShard):
            self.reported_steps.add((shard.card, shard.step))
        self._completed.append(task.job)
        return True

    def _run_phase(self, task: Task) -> None:
        shard, phase = task.job.shard, task.phases.pop(0)
        error = self.fails(task)
        if error is None and not self._is_rubbish(shard):
            phase()
            return
        task.phases.clear()
        task.job.error = error
        if isinstance(shard, CopyShard):
            self._spoil_copy(shard, error)
            return
        self.broken.add(lane_of(shard))
        self.rubbish.add((shard.card, shard.step))
        self.executed_steps.add((shard.card, shard.step))
        if error is None:
            task.job.result = StepResult([self.rng.randrange(VOCABULARY) for _ in range(num_rows(shard))])

    def _is_rubbish(self, shard: Shard) -> bool:
        if isinstance(shard, CopyShard):
            return (shard.src, shard.after_step) in self.rubbish
        return lane_of(shard) in self.broken

    def _spoil_copy(self, shard: CopyShard, error: Exception | None) -> None:
        """One that fails may have written nothing, or part of it; one behind a step that failed brings rubbish."""
        for _, target in shard.block_pairs:
            if error is None or self.rng.random() < 0.5:
                pages = self.cards[shard.dst].pages
                kept = self.rng.randrange(len(pages[target]))
                pages[target] = [*pages[target][:kept], *[TORN] * (len(pages[target]) - kept)]

    def _may_move(self, task: Task) -> bool:
        shard = task.job.shard
        if not isinstance(shard, CopyShard) or shard.after_step == 0:
            return True
        ended = self.executed_steps if task.phases else self.reported_steps
        return (shard.src, shard.after_step) in ended

    # -- steps: the halves of a mixed one in turn

    def _step_begin(self, shard: PrefillShard | DecodeShard | MixedShard) -> None:
        if isinstance(shard, PrefillShard):
            self._prefill_begin(shard)
        elif isinstance(shard, DecodeShard):
            self._decode_begin(shard)
        else:
            self._prefill_begin(shard.prefill)
            self._decode_begin(shard.decode)

    def _step_end(self, task: Task) -> None:
        shard = task.job.shard
        if isinstance(shard, PrefillShard):
            ids = self._prefill_end(shard)
        elif isinstance(shard, DecodeShard):
            ids = self._decode_end(shard)
        else:
            ids = self._prefill_end(shard.prefill) + self._decode_end(shard.decode)
        ids = [NO_TOKEN if self.spoils(shard, row) else token for row, token in enumerate(ids)]
        task.job.result = StepResult(ids)
        self.executed_steps.add((shard.card, shard.step))

    # -- prefill

    def _prefill_begin(self, shard: PrefillShard) -> None:
        for chunk in shard.chunks:
            self.cards[shard.card].read_context(list(chunk.block_table), chunk.start)

    def _prefill_end(self, shard: PrefillShard) -> list[int]:
        card, ids = self.cards[shard.card], []
        for chunk in shard.chunks:
            table = list(chunk.block_table)
            value = card.read_context(table, chunk.start)
            for i, token in enumerate(chunk.tokens):
                value = card.write(table, chunk.start + i, value, token)
            ids += [next_token(value, row.seed, row.position) for row in chunk.samples]
        return ids

    # -- decode

    def _decode_begin(self, shard: DecodeShard) -> None:
        card = self.cards[shard.card]
        for entry in shard.entries:
            row = entry.sampling
            card.slots[entry.slot] = Slot(
                entry.last_token,
                entry.num_kv_tokens,
                list(entry.block_table),
                row.seed,
                row.position,
                entry.end_ids,
                row.params.min_tokens,
            )
        for new in shard.new_blocks:
            assert len(card.slots[new.slot].table) == new.column, "a block was told out of order"
            card.slots[new.slot].table.append(new.block)
        for slot in (card.slots[index] for index in shard.slots):
            if slot.alive:
                card.read_context(slot.table, slot.length)

    def _decode_end(self, shard: DecodeShard) -> list[int]:
        card, ids = self.cards[shard.card], []
        for index in shard.slots:
            slot = card.slots[index]
            if not slot.alive:
                ids.append(JUNK_ID)
                continue
            value = card.read_context(slot.table, slot.length)
            value = card.write(slot.table, slot.length, value, slot.token)
            slot.token = next_token(value, slot.seed, slot.position)
            slot.length += 1
            slot.position += 1
            slot.alive = slot.token not in slot.end_ids or slot.position < slot.min_tokens
            ids.append(slot.token)
        return ids

    # -- copies

    def _copy_begin(self, task: Task) -> None:
        shard: CopyShard = task.job.shard
        source, target = self.cards[shard.src].pages, self.cards[shard.dst].pages
        task.snapshot = [list(source[src]) for src, _ in shard.block_pairs]
        for src, dst in shard.block_pairs:
            half = len(source[src]) // 2
            target[dst] = [*source[src][:half], *[TORN] * (len(source[src]) - half)]

    def _copy_end(self, task: Task) -> None:
        shard: CopyShard = task.job.shard
        source, target = self.cards[shard.src].pages, self.cards[shard.dst].pages
        for (src, dst), before in zip(shard.block_pairs, task.snapshot, strict=True):
            if source[src] != before:
                raise CorruptKV(f"copy {shard.copy}: source block {src} of card {shard.src} changed in flight")
            half = len(before) // 2
            if target[dst] != [*before[:half], *[TORN] * (len(before) - half)]:
                raise CorruptKV(f"copy {shard.copy}: target block {dst} of card {shard.dst} was written in flight")
            target[dst] = list(source[src])
