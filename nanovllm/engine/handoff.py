"""Where KV blocks live on two cards, and the one verb that moves them.

`handoff` is mirroring after prefill, evacuation, return, write-back and the private tails of n > 1: whole blocks
from one card's table to another's, not before the last step that may have written them. Blocks on both cards
are taken all or nothing: nobody holds one card's blocks while waiting for the other's. Where a prompt is prefilled on
the card that decodes it, what would be a copy to another card is nothing, or a registration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from nanovllm.engine.block_manager import BlockHash, BlockManager
from nanovllm.engine.sequence import PrefillGroup, Sequence
from nanovllm.engine.sequence_lease import SequenceLease, drop_copy, hold_copy
from nanovllm.engine.shards import CopyShard

MERGED_BLOCKS = 32  # of copies that travel together: below 1 ms of the link, and each costs the host as much as a step


@dataclass(slots=True)
class PendingCopy:
    shard: CopyShard
    target_versions: tuple[int, ...]
    done: Callable[[], None]
    failed: Callable[[], None]
    lease: SequenceLease | None  # held for the copy's own sake (write-back); None: a sequence holds its own
    num_freed_blocks: int  # of the card it leaves, once it has ended


class Handoff:
    """Block tables of all sequences over the cards of one engine, and the copies in flight between them.

    `prefill`: the card whose cache is looked up for prefixes. `decode`: the other one, or the same.
    """

    def __init__(self, managers: Mapping[int, BlockManager], prefill: int, decode: int, prefix_caching: bool) -> None:
        self.managers = managers
        self.prefill = prefill
        self.decode = decode
        self.prefix_caching = prefix_caching
        self.block_size = managers[prefill].block_size
        self.pending: dict[int, PendingCopy] = {}
        self.outbox: list[CopyShard] = []
        self.orphans: set[int] = set()  # of `pending`: from or to a lost card, what they bring counts no more
        self._num_copies = 0

    def num_coming_blocks(self, card: int) -> int:
        """Blocks of a card that will be free without anything further being decided."""
        leaving = sum(copy.num_freed_blocks for copy in self.pending.values() if copy.shard.src == card)
        return leaving + self.managers[card].num_retired_blocks

    def drain_outbox(self) -> list[CopyShard]:
        """The copies asked for since the last call; those between two cards, behind the same step, travel together."""
        shards: list[CopyShard] = []
        last: dict[tuple[int, int, int], int] = {}  # where in `shards` one of each kind may still grow
        for shard in self.outbox:
            kind = shard.src, shard.dst, shard.after_step
            at = last.get(kind)
            if at is not None and len(shards[at].block_pairs) + len(shard.block_pairs) <= MERGED_BLOCKS:
                shards[at] = _joined(shards[at], shard)
            else:
                last |= {kind: len(shards)} if shard.src != shard.dst else {}
                shards.append(shard)
        self.outbox = []
        return shards

    # -- the verb

    def handoff(
        self,
        src: int,
        dst: int,
        pairs: list[tuple[int, int]],
        after_step: int,
        done: Callable[[], None],
        failed: Callable[[], None] = lambda: None,
        lease: SequenceLease | None = None,
        num_freed_blocks: int = 0,
    ) -> None:
        """Launch a copy of whole blocks; `done` runs when it has completed, `failed` if it was given up, before it lets
        go of its blocks."""
        self._num_copies += 1
        shard = CopyShard(self._num_copies, src, dst, tuple(pairs), after_step)
        hold_copy(self.managers, shard)
        versions = tuple(self.managers[dst].version(target) for _, target in pairs)
        self.pending[shard.copy] = PendingCopy(shard, versions, done, failed, lease, num_freed_blocks)
        self.outbox.append(shard)

    def copy_done(self, shard: CopyShard) -> None:
        """Copies have drained: their targets count as resident, and they own nothing any more."""
        for number in (shard.copy, *shard.also):
            copy = self.pending.pop(number)
            versions = tuple(self.managers[shard.dst].version(target) for _, target in copy.shard.block_pairs)
            assert versions == copy.target_versions, f"copy {number}: a target block changed hands in flight"
            copy.done()
            drop_copy(self.managers, copy.shard)

    def copy_failed(self, shard: CopyShard) -> None:
        """Copies have drained, and their targets hold nothing: they own nothing any more either."""
        for number in (shard.copy, *shard.also):
            self.orphans.discard(number)
            copy = self.pending.pop(number)
            copy.failed()
            drop_copy(self.managers, copy.shard)

    def orphan(self, card: int) -> None:
        """The card is lost: whatever is on its way from or to it has failed, once it has drained."""
        self.orphans.update(number for number, copy in self.pending.items() if card in (copy.shard.src, copy.shard.dst))

    # -- prefill: both cards' blocks, then mirroring chunk by chunk

    def admit(self, group: PrefillGroup, prefill: int, decode: int, reserve_blocks: int) -> bool:
        """Take every block that prefill on one card and the first decode step on another, or the same, need, or none.

        `reserve_blocks` stay free on the decode card for sequences that already run there.
        """
        full, tail = divmod(group.num_tokens, self.block_size)
        hashes = self._hashes(group.leader, full)
        cached = self.managers[prefill].lookup(hashes[: (group.num_tokens - 1) // self.block_size])
        old, group.cards = group.cards, (prefill, decode)
        if prefill != decode:
            taken = self._admit_two(group, full, tail, hashes, cached, reserve_blocks)
        else:
            taken = self._admit_one(group, full, tail, cached, reserve_blocks)
        if taken:
            group.num_launched_tokens = len(cached) * self.block_size
        else:
            group.cards = old
        return taken

    def num_cached_tokens(self, group: PrefillGroup) -> int:
        """Leading tokens of a waiting prompt that the prefix cache holds."""
        hashes = self._hashes(group.leader, (group.num_tokens - 1) // self.block_size)
        return len(self.managers[self.prefill].lookup(hashes)) * self.block_size

    def _admit_one(self, group: PrefillGroup, full: int, tail: int, cached: list[int], reserve_blocks: int) -> bool:
        private = 1 if tail or group.needs_decode else 0
        fresh = full - len(cached) + private * len(group.sequences)
        if not self._has_room(group.decode_card, cached, fresh, reserve_blocks):
            return False
        for sequence in group.sequences:
            sequence.lease = SequenceLease(self.managers)
        self._open_decode_tables(group, full, cached, private)
        return True

    def _admit_two(
        self, group: PrefillGroup, full: int, tail: int, hashes: list[BlockHash], cached: list[int], reserve_blocks: int
    ) -> bool:
        fresh = full - len(cached) + (1 if tail else 0)
        resident = self.managers[group.decode_card].lookup(hashes)
        decode_fresh = full - len(resident) + len(group.sequences) if group.needs_decode else 0
        if not self._has_room(group.prefill_card, cached, fresh, 0):
            return False
        if group.needs_decode and not self._has_room(group.decode_card, resident, decode_fresh, reserve_blocks):
            return False
        for sequence in group.sequences:
            sequence.lease = SequenceLease(self.managers)
        lease = group.leader.lease
        assert lease is not None
        lease.take(group.prefill_card, cached, fresh)
        if group.needs_decode:
            group.num_mirrored_blocks = len(resident)
            self._open_decode_tables(group, full, resident, private=1)
        return True

    def _open_decode_tables(self, group: PrefillGroup, full: int, held: list[int], private: int) -> None:
        """Siblings share the prompt's full blocks, of which the card holds some; each has so many private ones."""
        shared, num_fresh = held, full - len(held) + private
        for sequence in group.sequences:
            assert sequence.lease is not None
            table = sequence.lease.take(group.decode_card, shared, num_fresh)
            shared, num_fresh = table[:full], private

    def _has_room(self, card: int, shared: list[int], num_fresh: int, reserve_blocks: int) -> bool:
        manager = self.managers[card]
        return manager.num_free_blocks - manager.num_free_among(shared) >= num_fresh + reserve_blocks

    def ensure_kv_resident(self, group: PrefillGroup) -> list[tuple[int, int]]:
        """Blocks that launched prefill has completed and the decode card lacks, as (source, target) pairs."""
        if not group.needs_decode:
            return []
        full, tail = divmod(group.num_launched_tokens, self.block_size)
        assert group.leader.lease is not None
        source = group.leader.lease.tables[group.prefill_card]
        target = group.leader.lease.tables[group.decode_card]
        pairs = []
        if group.changes_cards:
            pairs = [(source[i], target[i]) for i in range(group.num_mirrored_blocks, full)]
            group.num_mirrored_blocks = max(full, group.num_mirrored_blocks)
        if tail and group.num_launched_tokens == group.num_tokens:
            tables = [sequence.lease.tables[group.decode_card] for sequence in group.sequences if sequence.lease]
            pairs += [(source[full], table[full]) for table in tables if table is not source]
        return pairs

    def mirror(
        self,
        group: PrefillGroup,
        after_step: int,
        done: Callable[[], None],
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Hand the blocks of the chunk just launched to the decode card."""
        pairs = self.ensure_kv_resident(group)
        if not pairs:
            return
        group.copies_in_flight += 1

        def end(told: Callable[[], None]) -> None:
            group.copies_in_flight -= 1
            told()

        self.handoff(*group.cards, pairs, after_step, partial(end, done), partial(end, failed))

    def register_prefilled(self, group: PrefillGroup, num_tokens: int) -> None:
        """The prefill card has written the leader's first `num_tokens`: their full blocks can be found from now on."""
        lease = group.leader.lease
        if lease is not None and group.prefill_card in lease.tables:
            self._register(group.prefill_card, group.leader, num_tokens // self.block_size)

    def register_resident(self, group: PrefillGroup) -> None:
        """The decode card holds the prompt: its full blocks may be shared there while a sequence lives."""
        if group.changes_cards and group.needs_decode and group.members:
            self._register(group.decode_card, group.members[0], group.num_tokens // self.block_size)

    # -- evacuation, return, write-back

    def move(
        self,
        sequence: Sequence,
        dst: int,
        num_tokens: int,
        reserve_blocks: int,
        after_step: int,
        done: Callable[[], None],
        failed: Callable[[], None] = lambda: None,
    ) -> bool:
        """Start moving a sequence to card `dst`, where it takes blocks for `num_tokens`; False if there is no room.

        `after_step`: the last step of its card that may still write its blocks. `done` runs when it has arrived,
        `failed` if that was given up; neither if it has let go of these blocks meanwhile.
        """
        lease = sequence.lease
        assert lease is not None
        ((src, source),) = lease.tables.items()
        num_kv_tokens = sequence.num_kv_tokens
        known_tokens = min(num_kv_tokens, len(sequence.tokens))  # the rest is still in flight
        held = self.managers[dst].lookup(self._hashes(sequence, known_tokens // self.block_size))
        num_fresh = self._blocks_for(num_tokens) - len(held)
        if not self._has_room(dst, held, num_fresh, reserve_blocks):
            return False
        target = lease.take(dst, held, num_fresh)
        last = self._blocks_for(num_kv_tokens)
        pairs = list(zip(source[len(held) : last], target[len(held) : last], strict=True))

        def arrived() -> None:
            if sequence.lease is lease:
                lease.drop(src)
                self._register(dst, sequence, num_kv_tokens // self.block_size)
                done()

        def lost() -> None:
            if sequence.lease is lease:
                failed()

        self.handoff(src, dst, pairs, after_step, arrived, lost, num_freed_blocks=len(source))
        return True

    def write_back(self, sequence: Sequence, card: int) -> int | None:
        """Make full blocks of a sequence that is whole on `card` findable on the prefill card, copying what it lacks.

        Best effort: it takes blocks that are free now and never waits. The KV of the last token does not exist.
        Returns the number of blocks copied, None if there was no room for them.
        """
        lease = sequence.lease
        num_full = (len(sequence.tokens) - 1) // self.block_size
        if not (self.prefix_caching and num_full) or lease is None or len(lease.tables.get(card, ())) < num_full:
            return 0
        if card == self.prefill:
            self._register(self.prefill, sequence, num_full)
            return 0
        return self._copy_back(sequence, lease.tables[card], self._hashes(sequence, num_full))

    def _copy_back(self, sequence: Sequence, table: list[int], hashes: list[BlockHash]) -> int | None:
        manager = self.managers[self.prefill]
        held = manager.lookup(hashes)
        num_fresh = len(hashes) - len(held)
        if not num_fresh:
            return 0
        if not self._has_room(self.prefill, held, num_fresh, 0):
            return None
        lease = SequenceLease(self.managers)  # holds the prefix while its continuation is taken: no self-eviction
        targets = lease.take(self.prefill, held, num_fresh)[len(held) :]
        pairs = list(zip(table[len(held) : len(hashes)], targets, strict=True))

        def finish() -> None:
            for target, block_hash in zip(targets, hashes[len(held) :], strict=True):
                manager.register(target, block_hash)
            lease.release()

        after_step = self.managers[self.decode].last_main_step
        self.handoff(self.decode, self.prefill, pairs, after_step, finish, lease.release, lease, len(pairs))
        return num_fresh

    # -- small helpers

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def distrust(self, sequence: Sequence) -> None:
        """Its blocks, and those shared with it, hold something else than their hashes say: nobody is to find them."""
        for block_hash in self._hashes(sequence, len(sequence.tokens) // self.block_size):
            for manager in self.managers.values():
                manager.distrust(block_hash)

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[BlockHash]:
        return sequence.hashes(num_blocks, self.block_size) if self.prefix_caching else []

    def _register(self, card: int, sequence: Sequence, num_blocks: int) -> None:
        lease = sequence.lease
        assert lease is not None
        for block, block_hash in zip(lease.tables[card], self._hashes(sequence, num_blocks), strict=False):
            self.managers[card].register(block, block_hash)


def _joined(first: CopyShard, other: CopyShard) -> CopyShard:
    pairs, also = first.block_pairs + other.block_pairs, (*first.also, other.copy, *other.also)
    return replace(first, block_pairs=pairs, also=also)
