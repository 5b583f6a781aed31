"""The kernels at both ends of a decode step against the plain slot state, run by Triton's interpreter; and compiled.

TRITON_INTERPRET must be set before triton is imported: the comparison runs in a second process, this file as a program.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

from nanovllm.engine.shards import DecodeShard, SamplingRow, SlotEntry  # noqa: E402
from nanovllm.engine.slot_state import ALIVE, MIN_TOKENS, SlotState  # noqa: E402
from nanovllm.kernels.decode_state import advance, gather_inputs  # noqa: E402
from nanovllm.layers.sampler import mark_undrawn_  # noqa: E402
from nanovllm.sampling_params import SamplingParams  # noqa: E402
from tests.cpu.compile_check import assert_fits, compile_launches  # noqa: E402

NUM_SLOTS, BLOCK_SIZE, MAX_BLOCKS, VOCABULARY = 5, 4, 7, 8


def make_state(seed: int, device: str) -> SlotState:
    """Random sequences in every slot but one, some with end ids that a small vocabulary often draws."""
    rng = random.Random(seed)
    state = SlotState(NUM_SLOTS, MAX_BLOCKS, BLOCK_SIZE, 99, VOCABULARY, torch.device(device))
    entries = []
    for slot in rng.sample(range(NUM_SLOTS), NUM_SLOTS - 1):
        params = SamplingParams(min_tokens=rng.choice([0, 0, 3]), max_tokens=9)
        table = tuple(rng.sample(range(90), MAX_BLOCKS))
        end_ids = tuple(rng.sample(range(VOCABULARY), rng.randrange(3)))
        row = SamplingRow(params, seed=1, position=rng.randrange(3))
        entries.append(SlotEntry(slot, rng.randrange(VOCABULARY), rng.randrange(1, 9), table, row, end_ids))
    state.apply(DecodeShard(0, 1, (), 1, tuple(entries)))
    return state


def compare(seed: int, device: str) -> int:
    """Several steps of kernels and of plain torch from equal states; returns how many rows ended on the way."""
    plain, fused = make_state(seed, device), make_state(seed, device)
    rng = random.Random(-seed)
    for _ in range(6):
        rows = [*rng.sample(range(NUM_SLOTS), rng.randrange(1, NUM_SLOTS)), plain.null_slot, plain.null_slot]
        slots_B = torch.tensor(rows, device=device)
        tokens_B, positions_B, metadata = plain.inputs(slots_B, MAX_BLOCKS * BLOCK_SIZE)
        got = gather_inputs(slots_B, fused.integers_S7, fused.block_tables_SN, BLOCK_SIZE, fused.null_block, ALIVE)
        expected = (tokens_B, positions_B, metadata.context_lens, metadata.slot_mapping, metadata.block_tables)
        assert got[5].tolist() == sorted(range(len(rows)), key=lambda b: -int(metadata.context_lens[b])), (seed, rows)
        for ours, theirs in zip(got[:5], expected, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (seed, rows, ours, theirs)
        sampled_B = torch.tensor([rng.randrange(VOCABULARY) for _ in rows], device=device)
        logits_BV = torch.randn(len(rows), VOCABULARY, device=device)
        if rng.random() < 0.3:
            logits_BV[rng.randrange(len(rows))] = rng.choice([float("nan"), -float("inf")])
        expected_B = mark_undrawn_(sampled_B.clone(), logits_BV)
        living_B = plain.alive_S[slots_B] != 0
        plain.advance(slots_B, expected_B)
        end_ids_SK, null_slot = fused.end_ids_SK, fused.null_slot
        advance(slots_B, sampled_B, logits_BV, fused.integers_S7, end_ids_SK, null_slot, ALIVE, MIN_TOKENS)
        assert torch.equal(sampled_B[living_B], expected_B[living_B]), (seed, rows)
        assert torch.equal(plain.integers_S7, fused.integers_S7), (seed, rows)
    return NUM_SLOTS - 1 - int(plain.alive_S.sum())


def test_kernels_equal_the_plain_state() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command, root = [sys.executable, "-m", "tests.cpu.test_decode_state"], Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5, "some rows must have ended, or their case was not tried"


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int) -> None:
    def launch() -> None:
        slots = torch.empty(16, dtype=torch.int64, device="meta")
        integers = torch.empty(513, 7, dtype=torch.int64, device="meta")
        tables = torch.empty(513, 640, dtype=torch.int32, device="meta")
        gather_inputs(slots, integers, tables, 64, 1000, ALIVE)
        end_ids = torch.empty(513, 128, dtype=torch.int64, device="meta")
        logits = torch.empty(16, 151_936, dtype=torch.float32, device="meta")
        advance(slots, slots, logits, integers, end_ids, 512, ALIVE, MIN_TOKENS)

    reports = compile_launches(capability, launch)
    assert [report.name for report in reports] == ["_gather_kernel", "_advance_kernel"]
    for report in reports:
        assert_fits(report)


if __name__ == "__main__":
    print(sum(compare(seed, "cpu") for seed in range(16)))
