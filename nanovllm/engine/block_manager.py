"""One card's KV blocks: who owns them, which are free, which hold a known prefix.

A block is owned by sequences and by copies (counted references), and by every launched step that may still
touch it (a fence: blocks that a sequence lets go while steps are in flight are released only when those steps
have completed, and all before them: most complete in launch order). It is free when all three have let go. A free
block may keep its contents and its hash (`keep_cached`) until it is taken for something else.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NewType

import xxhash

HashValue = NewType("HashValue", int)
ROOT_HASH = HashValue(0)
ID_BYTES = 8


class BlockHash(NamedTuple):
    """The identity of a full block: its tokens and, through `parent`, everything before them."""

    value: HashValue
    parent: HashValue
    tokens: bytes  # 64-bit ids


def chain_hash(parent: HashValue, tokens: Sequence[int], seed: int) -> BlockHash:
    """Hash a full block onto its prefix (xxh3-128, seeded per engine so that callers cannot aim for collisions)."""
    ids = array("q", tokens).tobytes()
    return BlockHash(HashValue(xxhash.xxh3_128_intdigest(parent.to_bytes(16, "little") + ids, seed)), parent, ids)


class FreeList:
    """Doubly linked list over block ids in two arrays: pop, append and removal from the middle are all O(1).

    A deque cannot remove from the middle, and a prefix hit takes a free block from wherever it stands.
    """

    def __init__(self, num_blocks: int) -> None:
        self._head = num_blocks  # sentinel
        self._next = list(range(1, num_blocks + 1)) + [0]
        self._prev = [num_blocks, *range(num_blocks)]
        self.size = num_blocks

    def popleft(self) -> int:
        block = self._next[self._head]
        assert block != self._head, "pop from an empty free list"
        self.remove(block)
        return block

    def remove(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self.size -= 1

    def append(self, block: int) -> None:
        self._insert(block, self._prev[self._head])

    def appendleft(self, block: int) -> None:
        self._insert(block, self._head)

    def _insert(self, block: int, before: int) -> None:
        after = self._next[before]
        self._next[before] = self._prev[after] = block
        self._prev[block], self._next[block] = before, after
        self.size += 1


class BlockManager:
    """Blocks 0 … num_blocks - 1 of one card. Touched by the engine thread only."""

    def __init__(self, num_blocks: int, block_size: int, keep_cached: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keep_cached = keep_cached
        self._free = FreeList(num_blocks)
        self._refs = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[HashValue, int] = {}
        self._versions = [0] * num_blocks
        self._retired: deque[tuple[int, list[int]]] = deque()
        self.num_retired_blocks = 0
        self.launched_steps = 0
        self.completed_steps = 0  # all up to this one
        self.last_main_step = 0  # the last launched one that is not lent
        self._open: dict[int, bool] = {}  # launched steps that have not completed: whether they are lent

    # -- taking and letting go

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody owns, cached contents or not."""
        return self._free.size

    @property
    def num_cached_blocks(self) -> int:
        """Blocks nobody owns that still hold a known prefix."""
        return sum(self._refs[block] == 0 for block in list(self._by_hash.values()))

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks for new contents. The caller has checked `num_free_blocks`."""
        assert count <= self._free.size, f"asked for {count} blocks, {self._free.size} are free"
        return [self._take_fresh() for _ in range(count)]

    def _take_fresh(self) -> int:
        block = self._free.popleft()
        self._forget(block)
        self._refs[block] = 1
        self._versions[block] += 1
        return block

    def acquire(self, block: int) -> None:
        """Add an owner; a cached free block is taken back with its contents."""
        if self._refs[block] == 0:
            self._free.remove(block)
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """Take one owner away; the last one makes the block free. Cached blocks are reused last, oldest first."""
        assert self._refs[block] > 0, f"block {block} has no owner"
        self._refs[block] -= 1
        if self._refs[block]:
            return
        if not self.keep_cached:
            self._forget(block)
        if self._hashes[block] is None:
            self._free.appendleft(block)
        else:
            self._free.append(block)

    def retire(self, blocks: Sequence[int]) -> None:
        """A sequence lets go of its table: at once, or when every step launched so far has completed.

        The tail is released first, so that of a cached prefix the last blocks are evicted first.
        """
        tail_first = list(reversed(blocks))
        if self.launched_steps == self.completed_steps:
            for block in tail_first:
                self.release(block)
        elif tail_first:
            self._retired.append((self.launched_steps, tail_first))
            self.num_retired_blocks += len(tail_first)

    def launch_step(self, lent: bool = False) -> int:
        """Count a step launched on this card and return its number. lent: it runs beside the card's other steps."""
        self.launched_steps += 1
        self._open[self.launched_steps] = lent
        if not lent:
            self.last_main_step = self.launched_steps
        return self.launched_steps

    def complete_step(self, step: int) -> None:
        """Step `step` ended. Once all before it have, too, release what was retired no later than its launch."""
        lent = self._open.get(step)
        first = next((each for each, other in self._open.items() if other == lent), None)
        assert step == first, "steps of a card, and lent ones among themselves, complete in launch order"
        del self._open[step]
        self.completed_steps = next(iter(self._open), self.launched_steps + 1) - 1
        while self._retired and self._retired[0][0] <= self.completed_steps:
            _, blocks = self._retired.popleft()
            self.num_retired_blocks -= len(blocks)
            for block in blocks:
                self.release(block)

    # -- contents

    def version(self, block: int) -> int:
        """Grows each time the block is taken for new contents: a copy's target must not change under it."""
        return self._versions[block]

    def register(self, block: int, block_hash: BlockHash) -> None:
        """Make the contents of an owned, completely written block findable. The first block of a hash wins."""
        assert self._refs[block] > 0 and len(block_hash.tokens) == ID_BYTES * self.block_size
        if block_hash.value not in self._by_hash and self._hashes[block] is None:
            self._by_hash[block_hash.value] = block
            self._hashes[block] = block_hash

    def lookup(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The longest run of leading blocks that this card holds; tokens are compared, not only hashes."""
        found: list[int] = []
        for wanted in hashes:
            block = self._by_hash.get(wanted.value)
            if block is None or self._hashes[block] != wanted:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody owns (acquiring them takes them from the free list)."""
        return sum(self._refs[block] == 0 for block in blocks)

    def distrust(self, block_hash: BlockHash) -> None:
        """Whatever holds these contents is not found by them any more: it does not hold them. Its owners keep it."""
        block = self._by_hash.get(block_hash.value)
        if block is not None:
            self._forget(block)

    def _forget(self, block: int) -> None:
        old = self._hashes[block]
        if old is not None:
            del self._by_hash[old.value]
            self._hashes[block] = None

    # -- the books

    def check_integrity(self, owners: Counter[int]) -> None:
        """Every reference is explained by `owners` (sequences and copies) or by a retired table, and no other."""
        expected = Counter(owners)
        for _, blocks in self._retired:
            expected.update(blocks)
        for block, refs in enumerate(self._refs):
            assert refs == expected[block], f"block {block}: {refs} references, {expected[block]} owners"
        assert self._free.size == sum(refs == 0 for refs in self._refs), "free list and references disagree"
        for value, block in self._by_hash.items():
            held = self._hashes[block]
            assert held is not None and held.value == value, f"block {block}: stale hash"
