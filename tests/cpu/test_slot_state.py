"""Slots are reused: nothing of the sequence before may reach the next one."""

from __future__ import annotations

import torch

from nanovllm.engine.shards import DecodeShard, NewBlock, SamplingRow, SlotEntry
from nanovllm.engine.slot_state import SlotState
from nanovllm.sampling_params import SamplingParams

VOCABULARY = 10


def make_state() -> SlotState:
    return SlotState(
        num_slots=2, max_blocks=4, block_size=4, null_block=99, vocab_size=VOCABULARY, device=torch.device("cpu")
    )


def entry(slot: int, params: SamplingParams, table: tuple[int, ...] = (7,), **row) -> SlotEntry:
    return SlotEntry(slot, 5, 3, table, SamplingRow(params, seed=1, position=1, **row))


def step(number: int, *entries: SlotEntry, new_blocks: tuple[NewBlock, ...] = ()) -> DecodeShard:
    return DecodeShard(0, number, (0,), 16, tuple(entries), new_blocks)


def batch_of(state: SlotState, shard: DecodeShard):
    state.apply(shard)
    return state.sampling_batch(shard, torch.tensor(shard.slots))


def test_banned_ids_of_the_last_owner_are_gone() -> None:
    state = make_state()
    first = batch_of(state, step(1, entry(0, SamplingParams(min_tokens=5), stop_ids=(3,))))
    assert first.banned is not None and first.banned[0].tolist() == [i == 3 for i in range(VOCABULARY)]
    second = batch_of(state, step(2, entry(0, SamplingParams(min_tokens=5, ignore_eos=True))))
    assert second.banned is None or not second.banned.any()


def test_counts_of_the_last_owner_are_gone() -> None:
    state = make_state()
    penalised = SamplingParams(frequency_penalty=1.0)
    batch_of(state, step(1, entry(0, penalised, prompt_ids=(1, 2), output_ids=(4, 4))))
    state.advance(torch.tensor([0]), torch.tensor([4]))
    batch = batch_of(state, step(2, entry(0, penalised, prompt_ids=(2,), output_ids=(6,))))
    assert batch.output_counts is not None and batch.prompt_mask is not None
    assert batch.output_counts[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert batch.prompt_mask[0].nonzero().flatten().tolist() == [2]


def test_stale_columns_of_a_longer_table_are_gone() -> None:
    state = make_state()
    state.apply(step(1, entry(0, SamplingParams(), table=(1, 2, 3, 4))))
    state.apply(step(2, entry(0, SamplingParams(), table=(8,)), new_blocks=(NewBlock(0, 1, 9),)))
    assert state.block_tables_SN[0].tolist() == [8, 9, 99, 99]


def test_inputs_advance_on_the_card() -> None:
    state = make_state()
    shard = step(1, entry(0, SamplingParams(), table=(7, 6)))
    state.apply(shard)
    tokens, positions, metadata = state.inputs(torch.tensor([0]), 16)
    assert (tokens.tolist(), positions.tolist(), metadata.context_lens.tolist()) == ([5], [3], [4])
    assert metadata.slot_mapping.tolist() == [7 * 4 + 3]
    state.advance(torch.tensor([0]), torch.tensor([2]))
    tokens, positions, metadata = state.inputs(torch.tensor([0]), 16)
    assert (tokens.tolist(), positions.tolist()) == ([2], [4])
    assert metadata.slot_mapping.tolist() == [6 * 4]  # the next block's first slot
