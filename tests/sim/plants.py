"""Five bugs that real engines shipped, each as a context manager that plants it into the scheduling core."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import PropertyMock, patch

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.handoff import Handoff
from nanovllm.engine.sequence import PrefillGroup
from nanovllm.engine.sequence_lease import SequenceLease


@contextmanager
def freed_before_its_step_ends() -> Iterator[None]:
    def retire(self, blocks):
        for block in reversed(blocks):
            self.release(block)

    with patch.object(BlockManager, "retire", retire):
        yield


@contextmanager
def freed_before_its_copy_ends() -> Iterator[None]:
    nothing = lambda managers, shard: None  # noqa: E731
    with patch("nanovllm.engine.handoff.hold_copy", nothing), patch("nanovllm.engine.handoff.drop_copy", nothing):
        yield


@contextmanager
def stale_hash() -> Iterator[None]:
    """A block taken for new contents is still found under its old ones."""
    with patch.object(BlockManager, "_forget", lambda self, block: None):
        yield


@contextmanager
def ready_before_the_copy_completed() -> Iterator[None]:
    with patch.object(PrefillGroup, "copies_in_flight", PropertyMock(return_value=0), create=True):
        yield


@contextmanager
def blocks_taken_one_card_after_the_other() -> Iterator[None]:
    """Card 0's blocks are kept while card 1 has no room."""
    sound = Handoff._admit_two

    def admit_two(self, group, full, tail, hashes, cached, reserve_blocks):
        lease = group.leader.lease
        if lease is None:
            fresh = full - len(cached) + (1 if tail else 0)
            if not self._has_room(group.prefill_card, cached, fresh, 0):
                return False
            lease = group.leader.lease = SequenceLease(self.managers)
            lease.take(group.prefill_card, cached, fresh)
            group.kept = len(cached)
        resident = self.managers[group.decode_card].lookup(hashes)
        fresh = full - len(resident) + len(group.sequences) if group.needs_decode else 0
        if not self._has_room(group.decode_card, resident, fresh, reserve_blocks):
            return False
        lease.release()
        return sound(self, group, full, tail, hashes, cached, reserve_blocks)

    with patch.object(Handoff, "_admit_two", admit_two):
        yield


PLANTS = [
    freed_before_its_step_ends,
    freed_before_its_copy_ends,
    stale_hash,
    ready_before_the_copy_completed,
    blocks_taken_one_card_after_the_other,
]
