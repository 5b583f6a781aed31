"""Blocks of one card: the free list against a list, ownership against a recount, what is evicted, what is found."""

from __future__ import annotations

from array import array
from collections import Counter
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.block_manager import ROOT_HASH, BlockHash, BlockManager, FreeList, HashValue, chain_hash

SIZE = 4  # tokens a block


def chain(tokens: list[int], seed: int = 0) -> list[BlockHash]:
    """Hashes of the full blocks of a prompt."""
    hashes: list[BlockHash] = []
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        parent = hashes[-1].value if hashes else ROOT_HASH
        hashes.append(chain_hash(parent, tuple(tokens[start : start + SIZE]), seed))
    return hashes


def fill(manager: BlockManager, hashes: list[BlockHash]) -> list[int]:
    """Blocks that hold these contents, owned by the caller."""
    blocks = manager.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        manager.register(block, block_hash)
    return blocks


# -- the free list


@given(st.integers(1, 12), st.data())
@settings(max_examples=150, deadline=None)
def test_free_list_is_a_list(num_blocks: int, data: st.DataObject) -> None:
    free, model = FreeList(num_blocks), list(range(num_blocks))
    out: list[int] = []
    for _ in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["pop", "remove", "append", "appendleft"]))
        if action == "pop" and model:
            out.append(free.popleft())
            assert out[-1] == model.pop(0)
        elif action == "remove" and model:
            out.append(model.pop(data.draw(st.integers(0, len(model) - 1))))
            free.remove(out[-1])
        elif action.startswith("append") and out:
            block = out.pop(data.draw(st.integers(0, len(out) - 1)))
            getattr(free, action)(block)
            model.insert(len(model) if action == "append" else 0, block)
        assert free.size == len(model)
    assert [free.popleft() for _ in range(free.size)] == model


def test_pop_from_an_empty_free_list_is_noticed() -> None:
    free = FreeList(1)
    free.popleft()
    with pytest.raises(AssertionError, match="empty free list"):
        free.popleft()


# -- owners


@given(st.integers(2, 8), st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_owners_and_fences_against_a_recount(num_blocks: int, keep_cached: bool, data: st.DataObject) -> None:
    """Tables of sequences, copies' references and launched steps in any order: free is exactly what nobody owns."""
    manager = BlockManager(num_blocks, SIZE, keep_cached)
    tables: list[list[int]] = []
    held: list[int] = []  # by copies
    fenced: list[tuple[int, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["take", "share", "retire", "hold", "drop", "launch", "complete"]))
        if action == "take" and (count := data.draw(st.integers(0, manager.num_free_blocks))):
            tables.append(manager.allocate(count))
        elif action == "share" and tables:
            shared = list(data.draw(st.sampled_from(tables)))
            for block in shared:
                manager.acquire(block)
            tables.append(shared)
        elif action == "retire" and tables:
            table = tables.pop(data.draw(st.integers(0, len(tables) - 1)))
            manager.retire(table)
            if manager.launched_steps > manager.completed_steps:
                fenced.append((manager.launched_steps, table))
        elif action == "hold" and tables and tables[-1]:
            held.append(tables[-1][-1])
            manager.acquire(held[-1])
        elif action == "drop" and held:
            manager.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif action == "launch":
            manager.launch_step()
        elif action == "complete" and manager.completed_steps < manager.launched_steps:
            manager.complete_step(manager.completed_steps + 1)
            fenced = [(step, table) for step, table in fenced if step > manager.completed_steps]
        owners = Counter(held + [block for table in tables for block in table])
        manager.check_integrity(owners)
        everyone = set(owners) | {block for _, table in fenced for block in table}
        assert manager.num_free_blocks == num_blocks - len(everyone)
        assert manager.num_retired_blocks == sum(len(table) for _, table in fenced)


def test_recount_notices_a_missing_and_an_excess_owner() -> None:
    manager = BlockManager(4, SIZE, True)
    (block,) = manager.allocate(1)
    manager.check_integrity(Counter([block]))
    for wrong in (Counter(), Counter([block, block])):
        with pytest.raises(AssertionError, match=f"block {block}"):
            manager.check_integrity(wrong)


def test_release_of_a_free_block_is_noticed() -> None:
    manager = BlockManager(2, SIZE, True)
    (block,) = manager.allocate(1)
    manager.release(block)
    with pytest.raises(AssertionError, match="no owner"):
        manager.release(block)


def test_more_than_free_is_noticed() -> None:
    with pytest.raises(AssertionError, match="asked for 3 blocks, 2 are free"):
        BlockManager(2, SIZE, True).allocate(3)


def test_retired_blocks_wait_for_the_steps_launched_before() -> None:
    manager = BlockManager(4, SIZE, True)
    blocks = manager.allocate(2)
    first, second = manager.launch_step(), manager.launch_step()
    manager.retire(blocks)
    third = manager.launch_step()  # launched afterwards: cannot touch them
    for step, free in ((first, 2), (second, 4), (third, 4)):
        manager.complete_step(step)
        assert manager.num_free_blocks == free


def test_retired_at_once_when_nothing_is_launched() -> None:
    manager = BlockManager(4, SIZE, True)
    manager.complete_step(manager.launch_step())
    manager.retire(manager.allocate(3))
    assert manager.num_free_blocks == 4 and manager.num_retired_blocks == 0


@pytest.mark.parametrize("step", [2, 3, 0])
def test_steps_complete_in_launch_order(step: int) -> None:
    manager = BlockManager(2, SIZE, True)
    manager.launch_step()
    manager.launch_step()
    with pytest.raises(AssertionError, match="launch order"):
        manager.complete_step(step)


def test_version_grows_with_every_new_contents_only() -> None:
    manager = BlockManager(1, SIZE, True)
    fill(manager, chain([1, 2, 3, 4]))
    assert manager.version(0) == 1
    manager.release(0)
    manager.acquire(0)  # taken back with its contents
    assert manager.version(0) == 1
    manager.release(0)
    manager.allocate(1)
    assert manager.version(0) == 2


# -- what is evicted first


def test_blocks_without_contents_are_taken_before_cached_ones() -> None:
    manager = BlockManager(4, SIZE, True)
    cached = fill(manager, chain(list(range(8))))
    plain = manager.allocate(2)
    manager.retire(cached)
    manager.retire(plain)
    assert sorted(manager.allocate(2)) == sorted(plain)
    assert manager.num_cached_blocks == 2


def test_cached_blocks_are_evicted_least_recently_used_first_and_a_prefix_from_its_end() -> None:
    manager = BlockManager(6, SIZE, True)
    old, new = chain(list(range(12))), chain(list(range(100, 112)))
    old_blocks, new_blocks = fill(manager, old), fill(manager, new)
    manager.retire(old_blocks)
    manager.retire(new_blocks)
    manager.acquire(old_blocks[0])  # used again, hence younger than all others
    manager.release(old_blocks[0])
    expected = [old_blocks[2], old_blocks[1], *new_blocks[::-1], old_blocks[0]]
    assert [manager.allocate(1)[0] for _ in range(6)] == expected
    assert manager.lookup(old) == manager.lookup(new) == [] and manager.num_cached_blocks == 0


def test_an_evicted_prefix_keeps_its_beginning() -> None:
    manager = BlockManager(3, SIZE, True)
    hashes = chain(list(range(12)))
    blocks = fill(manager, hashes)
    manager.retire(blocks)
    manager.allocate(1)
    assert manager.lookup(hashes) == blocks[:2]


def test_without_cache_contents_end_with_their_last_owner() -> None:
    manager = BlockManager(4, SIZE, keep_cached=False)
    hashes = chain(list(range(8)))
    blocks = fill(manager, hashes)
    manager.acquire(blocks[0])
    manager.retire(blocks)
    assert manager.lookup(hashes) == blocks[:1]
    manager.release(blocks[0])
    assert manager.lookup(hashes) == [] and manager.num_cached_blocks == 0 and manager.num_free_blocks == 4


# -- what is found


def test_lookup_finds_the_leading_run_only() -> None:
    manager = BlockManager(8, SIZE, True)
    hashes = chain(list(range(16)))
    blocks = fill(manager, hashes[:1] + hashes[2:])
    assert manager.lookup(hashes) == blocks[:1]
    assert manager.lookup(hashes[2:]) == blocks[1:]
    assert manager.lookup([]) == []


def test_same_tokens_after_another_prefix_are_another_block() -> None:
    one, other = chain([1, 2, 3, 4, 9, 9, 9, 9]), chain([5, 6, 7, 8, 9, 9, 9, 9])
    manager = BlockManager(4, SIZE, True)
    fill(manager, one)
    assert manager.lookup(other) == [] and one[1].value != other[1].value


def test_first_block_of_a_hash_wins() -> None:
    manager = BlockManager(4, SIZE, True)
    hashes = chain(list(range(4)))
    (first,), (second,) = fill(manager, hashes), fill(manager, hashes)
    assert manager.lookup(hashes) == [first]
    manager.release(second)
    assert manager.lookup(hashes) == [first] and manager.num_cached_blocks == 0
    manager.release(first)
    assert manager.lookup(hashes) == [first] and manager.num_cached_blocks == 1


def test_registered_contents_are_not_renamed() -> None:
    manager = BlockManager(2, SIZE, True)
    one, other = chain([1, 2, 3, 4]), chain([5, 6, 7, 8])
    (block,) = fill(manager, one)
    manager.register(block, other[0])
    assert manager.lookup(one) == [block] and manager.lookup(other) == []


def test_register_wants_an_owned_full_block() -> None:
    manager = BlockManager(2, SIZE, True)
    with pytest.raises(AssertionError):
        manager.register(0, chain([1, 2, 3, 4])[0])
    (block,) = manager.allocate(1)
    with pytest.raises(AssertionError):
        manager.register(block, chain_hash(ROOT_HASH, (1, 2, 3), 0))


def test_tokens_are_compared_when_hashes_collide() -> None:
    with patch("nanovllm.engine.block_manager.xxhash.xxh3_128_intdigest", lambda data, seed: 7):
        one, other = chain([1, 2, 3, 4]), chain([5, 6, 7, 8])
    assert one[0].value == other[0].value
    manager = BlockManager(4, SIZE, True)
    (block,) = fill(manager, one)
    (unlucky,) = fill(manager, other)
    assert manager.lookup(one) == [block] and manager.lookup(other) == []
    manager.release(unlucky)  # must not take the winner's name away
    manager.allocate(3)
    assert manager.lookup(one) == [block]
    manager.check_integrity(Counter(range(4)))


def test_parents_are_compared_when_hashes_collide() -> None:
    manager = BlockManager(2, SIZE, True)
    ids = array("q", (1, 2, 3, 4)).tobytes()
    fill(manager, [BlockHash(HashValue(7), HashValue(1), ids)])
    assert manager.lookup([BlockHash(HashValue(7), HashValue(2), ids)]) == []


def test_hash_depends_on_seed_parent_and_every_token() -> None:
    base = chain_hash(ROOT_HASH, (1, 2, 3, 4), 5)
    assert base == chain_hash(ROOT_HASH, (1, 2, 3, 4), 5)
    others = [
        chain_hash(ROOT_HASH, (1, 2, 3, 4), 6),
        chain_hash(HashValue(1), (1, 2, 3, 4), 5),
        *(chain_hash(ROOT_HASH, tuple(t + (i == at) for i, t in enumerate((1, 2, 3, 4))), 5) for at in range(4)),
    ]
    assert len({base.value, *(other.value for other in others)}) == 7


def test_no_stale_name_after_the_block_is_taken_for_something_else() -> None:
    manager = BlockManager(1, SIZE, True)
    one, other = chain([1, 2, 3, 4]), chain([5, 6, 7, 8])
    manager.retire(fill(manager, one))
    fill(manager, other)
    assert manager.lookup(one) == [] and manager.lookup(other) == [0]
    manager.check_integrity(Counter([0]))
