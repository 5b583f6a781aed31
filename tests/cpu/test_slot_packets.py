"""Packets against the plain slot state, bit for bit: by their plain reference, by Triton's interpreter; and compiled.

TRITON_INTERPRET must be set before triton is imported: those checks run in a second process, this file as a program.
"""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

from nanovllm.engine import slot_packets  # noqa: E402
from nanovllm.engine.shards import DecodeShard, NewBlock, SamplingRow, SlotEntry  # noqa: E402
from nanovllm.engine.slot_packets import SlotPackets  # noqa: E402
from nanovllm.engine.slot_state import MAX_END_IDS, SlotState  # noqa: E402
from nanovllm.kernels.packet import RUN_WORDS, write_runs, write_runs_reference  # noqa: E402
from nanovllm.sampling_params import SamplingParams  # noqa: E402
from tests.cpu.compile_check import assert_fits, compile_launches  # noqa: E402
from tests.cpu.interpreted import results_of, run_checks  # noqa: E402

NUM_SLOTS, MAX_BLOCKS, NULL_BLOCK = 6, 37, 1 << 30
SMALL_WORDS = 600  # of a packet: what some steps bring does not fit


def make_state(device: str) -> SlotState:
    return SlotState(NUM_SLOTS, MAX_BLOCKS, 4, NULL_BLOCK, 8, torch.device(device))


def random_entry(rng: random.Random, slot: int) -> SlotEntry:
    """Numbers at the ends of their types, tables and end ids of every length."""
    params = SamplingParams(
        temperature=rng.choice([0.0, rng.random() * 2, 1e-3]),
        top_p=rng.choice([1.0, rng.random() + 1e-9]),
        min_p=rng.random(),
        top_k=rng.choice([0, 20]),
        presence_penalty=rng.choice([0.0, 0.0, rng.uniform(-2, 2)]),
        repetition_penalty=rng.choice([1.0, 1.0, rng.uniform(0.1, 2)]),
        min_tokens=rng.choice([0, 5]),
        logprobs=rng.choice([None, None, None, 0, 3]),
        max_tokens=9,
    )
    seed = rng.choice([-(1 << 63), (1 << 63) - 1, -1, rng.getrandbits(62)])
    table = tuple(rng.randrange(1 << 30) for _ in range(rng.choice([1, MAX_BLOCKS, rng.randrange(1, MAX_BLOCKS)])))
    end_ids = tuple(rng.randrange(200_000) for _ in range(rng.choice([0, 1, 3, MAX_END_IDS, MAX_END_IDS + 1])))
    row = SamplingRow(params, seed, rng.randrange(1 << 20))
    return SlotEntry(slot, rng.randrange(200_000), rng.randrange(1 << 20), table, row, end_ids)


def random_shard(rng: random.Random, step: int, before: tuple[int, ...]) -> DecodeShard:
    """Some enter, some grow, perhaps the same; now and then rows stay as they are, or nothing changes."""
    entering = rng.sample(range(NUM_SLOTS), rng.choice([0, 0, 1, 3, NUM_SLOTS]))
    entries = [random_entry(rng, slot) for slot in entering]
    places = [(slot, column) for slot in range(NUM_SLOTS) for column in range(MAX_BLOCKS)]
    new = [NewBlock(*place, rng.randrange(1 << 30)) for place in rng.sample(places, rng.choice([0, 0, 1, 5, 150]))]
    slots = rng.choice([before, tuple(rng.sample(range(NUM_SLOTS), rng.randint(1, NUM_SLOTS)))])
    return DecodeShard(0, step, slots, 1, tuple(entries), tuple(new))


def compare(seed: int, device: str, max_words: int = SMALL_WORDS, steps: int = 8) -> int:
    """Random steps by packets and by plain torch; returns how many packets there were beyond one a step."""
    rng, plain, packed = random.Random(seed), make_state(device), make_state(device)
    packets = SlotPackets(packed, max_words)
    packed.use_packets(packets)
    assert packets.num_sent == 1 and torch.equal(plain.words, packed.words)
    slots: tuple[int, ...] = ()
    for step in range(steps):
        shard = random_shard(rng, step, slots)
        changed, sent, slots = (
            bool(shard.entries or shard.new_blocks or shard.slots != slots),
            packets.num_sent,
            shard.slots,
        )
        for state in (plain, packed):
            state.apply(shard)
        plain.set_rows(shard.slots)
        assert (packets.num_sent > sent) == changed, (seed, step)
        packed.set_rows(shard.slots)  # they are that already
        assert torch.equal(plain.words, packed.words), (seed, step, (plain.words != packed.words).nonzero()[:5])
        if slots:
            wanted = [packed.num_logprobs[slot] for slot in slots]
            level = max(packed.sampler_levels[slot] for slot in slots)
            assert packed.asked(slots) == (level, wanted if any(k is not None for k in wanted) else [])
    return packets.num_sent - 1 - steps


def write_apart(packet: Tensor, num_runs: int, target: Tensor) -> None:
    """The reference, for runs that could be written in any order."""
    writes = torch.zeros_like(target)
    for place, _, _, length, _ in packet[: num_runs * RUN_WORDS].view(num_runs, RUN_WORDS).tolist():
        writes[place : place + length] += 1
    assert int(writes.max()) == 1, "runs of one packet overlap"
    write_runs_reference(packet, num_runs, target)


@pytest.mark.parametrize("seed", range(40))
def test_packets_write_what_plain_torch_writes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_packets, "write_runs", write_apart)
    compare(seed, "cpu")
    assert compare(seed, "cpu", max_words=1 << 16) <= 8, "at most one more a step: a table, then what it grows by"


def test_what_does_not_fit_goes_in_several_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_packets, "write_runs", write_runs_reference)
    assert sum(compare(seed, "cpu", max_words=1) for seed in range(3)) > 20  # the least that holds any run


def test_static_buffers_are_aligned_and_apart() -> None:
    state = make_state("cpu")
    parts = [state.integers_S7, state.end_ids_SK, state.floats_S6, state.block_tables_SN, state.rows_B]
    for number, part in enumerate(parts):
        assert part.is_contiguous() and part.storage_offset() * part.element_size() % 256 == 0
        part.fill_(number + 1)
    for number, part in enumerate(parts):
        assert bool((part == number + 1).all())


def check_interpreted(seed: int) -> None:
    compare(seed, "cpu", steps=4)


def check_reference() -> None:
    """The kernel and its reference: an empty run, one that is all padding, one of several tiles, one word."""
    runs = [(3, 0, 0, 0, 9), (5, 0, 0, 300, -1), (400, 0, 600, 700, 7), (1200, 600, 1, 1, 0)]
    words = torch.arange(1000, 1601, dtype=torch.int32)
    packet = torch.cat([torch.tensor(runs, dtype=torch.int32).flatten(), words])
    assert len(packet) == len(runs) * RUN_WORDS + 601
    ours, theirs = torch.zeros(2, 1300, dtype=torch.int32)
    write_runs(packet, len(runs), ours)
    write_runs_reference(packet, len(runs), theirs)
    assert torch.equal(ours, theirs) and int((ours == 0).sum()) == 1300 - 300 - 700 - 1


CHECKS = {f"seed {seed}": partial(check_interpreted, seed) for seed in range(4)} | {"reference": check_reference}


def test_the_kernel_writes_what_plain_torch_writes() -> None:
    results = results_of("tests.cpu.test_slot_packets")
    assert len(results) == len(CHECKS) and not any(results.values()), results


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles(capability: int) -> None:
    def launch() -> None:
        packet = torch.empty(1 << 16, dtype=torch.int32, device="meta")
        for num_runs, num_words in ((1, 7), (512, 4096)):
            write_runs(packet[:num_words], num_runs, torch.empty(513 * 700, dtype=torch.int32, device="meta"))

    reports = compile_launches(capability, launch)
    assert [report.name for report in reports] == ["_write_runs_kernel"] * 2
    assert reports[0].hash == reports[1].hash, "one binary, whatever is sent: nothing is compiled in mid-service"
    assert_fits(reports[0], max_registers=64)


if __name__ == "__main__":
    run_checks(CHECKS)
