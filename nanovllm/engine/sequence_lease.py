"""What one sequence holds: a table of blocks on each card, let go in one place.

The lease is the first of a block's three kinds of owner. `hold_copy` and `drop_copy` are the second: every copy
in flight owns its sources and its targets. The third, launched steps, is the fence in `BlockManager.retire`,
through which every table goes: whatever ends a sequence, no step still in flight can touch a block of another.
"""

from __future__ import annotations

from collections.abc import Mapping

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.shards import CopyShard


class SequenceLease:
    """Block tables of one sequence by card. `release` may be called at any time, once or more."""

    def __init__(self, managers: Mapping[int, BlockManager]) -> None:
        self._managers = managers
        self.tables: dict[int, list[int]] = {}

    def take(self, card: int, shared: list[int], num_fresh_blocks: int) -> list[int]:
        """Open the table on `card`: blocks that others hold or that are cached, then fresh ones."""
        assert card not in self.tables, f"card {card} is leased already"
        manager = self._managers[card]
        for block in shared:
            manager.acquire(block)
        self.tables[card] = [*shared, *manager.allocate(num_fresh_blocks)]
        return self.tables[card]

    def grow(self, card: int) -> int:
        """Append one fresh block to the table on `card` and return it."""
        (block,) = self._managers[card].allocate(1)
        self.tables[card].append(block)
        return block

    def drop(self, card: int) -> None:
        """Let go of the table on `card`, if there is one."""
        self._managers[card].retire(self.tables.pop(card, []))

    def release(self) -> None:
        """Let go of everything, on every card."""
        for card in list(self.tables):
            self.drop(card)


def hold_copy(managers: Mapping[int, BlockManager], shard: CopyShard) -> None:
    """A copy in flight becomes an owner of every block it reads or writes."""
    for source, target in shard.block_pairs:
        managers[shard.src].acquire(source)
        managers[shard.dst].acquire(target)


def drop_copy(managers: Mapping[int, BlockManager], shard: CopyShard) -> None:
    """The copy has drained: it owns nothing any more."""
    for source, target in shard.block_pairs:
        managers[shard.src].release(source)
        managers[shard.dst].release(target)
