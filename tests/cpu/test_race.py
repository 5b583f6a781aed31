"""The sampling kernels without a GPU: against `sample` in Triton's interpreter, and compiled for sm_80 and sm_90.

As in test_fused_kernels.py, the interpreter's checks run in a second process: this file as a program, which prints one
JSON object: check → its traceback, or null.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

import triton.language as tl  # noqa: E402

from nanovllm.kernels import filtered_race as filtered_race_module  # noqa: E402
from nanovllm.kernels import penalties, row_passes  # noqa: E402
from nanovllm.kernels import race as race_module  # noqa: E402
from nanovllm.kernels.filtered_race import Sizes, filtered_race  # noqa: E402
from nanovllm.kernels.race import race  # noqa: E402
from nanovllm.layers import sampler, seen_tokens  # noqa: E402
from nanovllm.layers.sampler import SamplingBatch, sample  # noqa: E402
from nanovllm.sampling_params import SamplingParams  # noqa: E402
from tests.cpu.compile_check import CompileReport, assert_fits, compile_launches  # noqa: E402
from tests.cpu.interpreted import results_of, run_checks  # noqa: E402

INF = float("inf")
QWEN3_VOCAB = 151_936
SMALL_VOCAB = 299  # no multiple of any tile below
SMALL = Sizes(slice=128, group=16, list=32, list_tile=16, row_tile=64)

Logits = Callable[[int, int], Tensor]


# -- shared with tests/gpu/test_race.py


@dataclass
class Slots:
    """A batch's parameters as the engine keeps them: columns of two tables with a row a slot; the last one is null."""

    batch: SamplingBatch
    rows: Tensor
    floats: Tensor
    integers: Tensor
    table: Tensor

    @classmethod
    def of(cls, batch: SamplingBatch, min_tokens: Tensor, vocab: int) -> Slots:
        """Each row in a slot of its own, at random; what no row owns is garbage."""
        device = batch.position.device
        num_rows = len(batch.position)
        rows = torch.randperm(num_rows + 2)[:num_rows].to(device)
        floats = torch.full((num_rows + 3, 6), float("nan"), device=device)
        integers = torch.full((num_rows + 3, 6), 2**40, device=device)
        columns = [batch.temperature, batch.top_p, batch.min_p, batch.presence, batch.frequency, batch.repetition]
        floats[rows] = torch.stack(columns, 1)
        position = batch.position
        integers[rows] = torch.stack([position, position, position, batch.seed, batch.top_k, min_tokens], 1)
        table = torch.randint(2**31, (num_rows + 3, vocab), dtype=torch.int32, device=device)
        return cls(batch, rows, floats, integers, table)

    @classmethod
    def random(
        cls, params: Sequence[SamplingParams], device: torch.device | str, vocab: int, max_position: int = 5
    ) -> Slots:
        n = len(params)
        seeds, positions = torch.randint(2**62, (n,)).tolist(), torch.randint(max_position, (n,)).tolist()
        batch = SamplingBatch.from_params(params, seeds, positions, device)
        min_tokens = torch.tensor([p.min_tokens for p in params], dtype=torch.int64, device=device)
        return cls.of(batch, min_tokens, vocab)

    def filtered(self, logits: Tensor, only: slice = slice(None), **kwargs: Any) -> Tensor:
        """`filtered_race`, of some of the rows."""
        temperature, top_p, min_p = self.floats.unbind(1)[:3]
        position, seed, top_k = self.integers.unbind(1)[2:5]
        inputs = logits[only], self.rows[only], temperature, top_k, top_p, min_p, seed, position
        return filtered_race(*inputs, **kwargs)

    def raced(self, logits: Tensor, only: slice = slice(None), any_random: bool = True, **kwargs: Any) -> Tensor:
        """`race`, of some of the rows."""
        position, seed = self.integers.unbind(1)[2:4]
        inputs = logits[only], self.rows[only], self.floats[:, 0], seed, position
        return race(*inputs, any_random=any_random, **kwargs)

    def penalise_(self, logits: Tensor) -> None:
        presence, frequency, repetition = self.floats.unbind(1)[3:]
        min_tokens, position = self.integers[:, 5], self.integers[:, 2]
        penalties.apply_penalties_(logits, self.rows, self.table, presence, frequency, repetition, min_tokens, position)


def random_logits(num_rows: int, vocab: int) -> Tensor:
    return torch.randn(num_rows, vocab) * 2


def peaked_logits(num_rows: int, vocab: int) -> Tensor:
    return torch.randn(num_rows, vocab) * 12


def flat_logits(num_rows: int, vocab: int) -> Tensor:
    return torch.full((num_rows, vocab), 0.7)


def two_valued_logits(num_rows: int, vocab: int) -> Tensor:
    return torch.randint(2, (num_rows, vocab)) * 0.3 - 5


def quantised_logits(num_rows: int, vocab: int) -> Tensor:
    """What a model in bfloat16 gives: many ties."""
    return (torch.randn(num_rows, vocab) * 3).bfloat16().float()


def near_logits(num_rows: int, vocab: int) -> Tensor:
    """Neighbours in float32, which temperatures tie or keep apart."""
    return 20 + torch.randint(9, (num_rows, vocab)) * 2.0**-19


def infinite_logits(num_rows: int, vocab: int) -> Tensor:
    logits = torch.randn(num_rows, vocab)
    logits[torch.rand(num_rows, vocab) < 0.7] = -INF
    logits[::3, ::50] = INF
    logits[1::3] = -INF
    logits[4::6, vocab // 2] = -3.0
    return logits


def huge_logits(num_rows: int, vocab: int) -> Tensor:
    return torch.randn(num_rows, vocab) * 10 ** torch.linspace(-44, 37, num_rows)[:, None]


def ascending_logits(num_rows: int, vocab: int) -> Tensor:
    """The largest all in one slice."""
    return torch.linspace(-8, 3, vocab).repeat(num_rows, 1)


KINDS: list[Logits] = [
    random_logits,
    peaked_logits,
    flat_logits,
    two_valued_logits,
    quantised_logits,
    near_logits,
    infinite_logits,
    huge_logits,
    ascending_logits,
]

COMBINATIONS = [
    SamplingParams(temperature=0),
    *(
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature, top_k, top_p, min_p in itertools.product(
            (0.3, 1.0, 1.7), (0, 1, 7, 40, 100_000), (1.0, 0.95, 0.3, 0.002), (0.0, 0.02, 0.4)
        )
    ),
]
PENALTIES = [
    {},
    {"presence_penalty": 0.4},
    {"frequency_penalty": -0.3},
    {"repetition_penalty": 1.3},
    {"min_tokens": 3},
    {"presence_penalty": -0.7, "frequency_penalty": 0.2, "repetition_penalty": 0.8, "min_tokens": 2},
]


def oracle_batch(params: Sequence[SamplingParams], slots: Slots, **masks: Tensor) -> SamplingBatch:
    """The rows' batch as `sample` wants it: features, and a sort where top_p comes without top_k."""
    device = slots.rows.device
    batch = slots.batch
    return SamplingBatch.from_params(params, batch.seed.tolist(), batch.position.tolist(), device, **masks)


def some(items: Sequence[Any], count: int, start: int) -> list[Any]:
    """`count` of the items, spread over all of them, another choice for each start."""
    return [items[(start + i * 29) % len(items)] for i in range(count)]


@dataclass
class History:
    """What each row has seen, as the oracle's masks, and as ids with repetitions."""

    counts: Tensor
    prompt: Tensor
    banned: Tensor

    @classmethod
    def random(cls, num_rows: int, vocab: int, device: torch.device | str) -> History:
        counts = (torch.rand(num_rows, vocab) * 1.4).int() * torch.randint(1, 9, (num_rows, vocab), dtype=torch.int32)
        prompt, banned = torch.rand(num_rows, vocab) < 0.3, torch.rand(num_rows, vocab) < 0.2
        return cls(counts.to(device), prompt.to(device), banned.to(device))

    def write(self, slots: Slots) -> None:
        """Into the slots of the rows that need it: a neutral row's table is somebody's leftovers."""
        for row, slot in enumerate(slots.rows.tolist()):
            if slots.floats[slot, 3:].tolist() == [0, 0, 1] and not slots.integers[slot, 5]:
                continue
            outputs = torch.repeat_interleave(self.counts[row].long())
            prompt, banned = self.prompt[row].nonzero()[:, 0], self.banned[row].nonzero()[:, 0]
            seen_tokens.reset_(slots.table, slot, prompt.repeat(2), outputs, banned.repeat(2))

    def masks(self, slots: Slots) -> dict[str, Tensor]:
        early = slots.batch.position < slots.integers[slots.rows, 5]
        return {"output_counts": self.counts, "prompt_mask": self.prompt, "banned": self.banned & early[:, None]}


# -- Triton's interpreter: some 10 ms a program


def poisoned_scratch(*args: Any) -> filtered_race_module.Scratch:
    """What a GPU's allocator hands out: NaNs and absurd integers."""
    scratch = NEW_SCRATCH(*args)
    for t in scratch:
        t.fill_(float("nan") if t.is_floating_point() else 2**31 - 1)
    return scratch


NEW_SCRATCH = filtered_race_module._new_scratch


def check_combinations(kind: Logits, count: int = 20) -> None:
    params = some(COMBINATIONS, count, start=KINDS.index(kind) * 5)
    slots = Slots.random(params, "cpu", SMALL_VOCAB)
    logits = kind(count, SMALL_VOCAB)
    kept = logits.clone()
    with mock.patch.object(filtered_race_module, "_new_scratch", poisoned_scratch):
        got = slots.filtered(logits, sizes=SMALL)
    want = sample(logits, oracle_batch(params, slots))
    wrong = (got != want).nonzero()[:, 0].tolist()
    assert not wrong, [(params[i], int(got[i]), int(want[i])) for i in wrong]
    assert torch.equal(logits, kept)


for _kind in KINDS:
    globals()[f"interpreted_{_kind.__name__}"] = lambda kind=_kind: check_combinations(kind)


def interpreted_every_feature_penalised() -> None:
    """Penalties, then a race under filters: the whole of `sample`, with counts that go on."""
    count = 2 * len(PENALTIES)
    filters = some(COMBINATIONS, count, start=11)
    params = [
        SamplingParams(temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, **PENALTIES[i % 6])
        for i, p in enumerate(filters)
    ]
    slots, history = Slots.random(params, "cpu", SMALL_VOCAB), History.random(count, SMALL_VOCAB, "cpu")
    history.write(slots)
    for _ in range(2):
        logits = quantised_logits(count, SMALL_VOCAB)
        batch = oracle_batch(params, slots, **history.masks(slots))
        want = sample(logits, batch)
        slots.penalise_(logits)
        got = slots.filtered(logits, sizes=SMALL)
        assert torch.equal(got, want)
        penalties.count_(slots.table, slots.rows, got)
        history.counts[torch.arange(count), got] += 1
        slots.integers[slots.rows, 2] += 1
        slots.batch.position.add_(1)


def interpreted_penalties_have_the_same_bits() -> None:
    params = [SamplingParams(temperature=0, **penalty) for penalty in PENALTIES]
    slots, history = Slots.random(params, "cpu", SMALL_VOCAB), History.random(6, SMALL_VOCAB, "cpu")
    history.write(slots)
    for logits in (random_logits(6, SMALL_VOCAB), infinite_logits(6, SMALL_VOCAB)):
        want = sampler._penalised(logits, oracle_batch(params, slots, **history.masks(slots)))
        slots.penalise_(logits)
        assert torch.equal(logits, want)


def interpreted_null_slot_is_neither_counted_nor_penalised() -> None:
    slots = Slots.random([SamplingParams(temperature=0, presence_penalty=1.0)] * 2, "cpu", SMALL_VOCAB)
    null = len(slots.table) - 1
    before = slots.table.clone()
    rows = torch.tensor([null, int(slots.rows[0]), null, null])
    penalties.count_(slots.table, rows, torch.tensor([3, 3, 3, 298]))
    before[rows[1], 3] += 1
    assert torch.equal(slots.table, before)
    slots.rows = torch.tensor([null, null])
    logits = random_logits(2, SMALL_VOCAB)
    kept = logits.clone()
    slots.penalise_(logits)
    assert torch.equal(logits, kept)


def interpreted_rows_do_not_know_each_other() -> None:
    params = some(COMBINATIONS, 7, start=3)
    slots, logits = Slots.random(params, "cpu", SMALL_VOCAB), quantised_logits(7, SMALL_VOCAB)
    together = slots.filtered(logits, sizes=SMALL)
    alone = [slots.filtered(logits, slice(i, i + 1), sizes=SMALL) for i in range(7)]
    assert torch.equal(together, torch.cat(alone))


def interpreted_sizes_do_not_matter() -> None:
    """Nor which ids a list takes, nor their order in it."""
    params = [p for p in some(COMBINATIONS, 12, start=8) if p.top_k]
    slots, logits = Slots.random(params, "cpu", SMALL_VOCAB), quantised_logits(len(params), SMALL_VOCAB)
    results = [
        slots.filtered(logits, sizes=sizes)
        for sizes in (SMALL, Sizes(slice=512, group=128), Sizes(slice=64, group=2, list=4, list_tile=4, row_tile=512))
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def interpreted_race_is_that_of_the_sampler() -> None:
    for kind in KINDS:
        params = [SamplingParams(temperature=t) for t in (0, 0.3, 1.0, 1.7)]
        slots, logits = Slots.random(params, "cpu", SMALL_VOCAB), kind(4, SMALL_VOCAB)
        out = torch.full((4,), -1)
        with mock.patch.object(race_module, "SLICE_IDS", 128):
            assert slots.raced(logits, out=out) is out
            greedy = slots.raced(logits, slice(1), any_random=False)
        want = sample(logits, slots.batch)
        largest = logits.amax(1)
        beyond_noise = (logits.gather(1, out[:, None])[:, 0] == largest) & (largest >= 2**24)  # see `race`
        assert bool(((out == want) | beyond_noise).all()) and torch.equal(greedy, want[:1]), kind


def interpreted_nucleus_forgives_rounding() -> None:
    """0.3 of ten equal ids is three of them, though 0.3 is a little more in float32."""
    logits = torch.full((27, SMALL_VOCAB), -INF)
    logits[:, 5:295:29] = 1.0
    params = [SamplingParams(top_p=i % 9 / 10 + 0.1, top_k=(0, 10, 50)[i % 3]) for i in range(27)]
    slots = Slots.random(params, "cpu", SMALL_VOCAB)
    got = slots.filtered(logits, sizes=SMALL)
    assert torch.equal(got, sample(logits, oracle_batch(params, slots)))
    assert ((got - 5) // 29 <= torch.arange(27) % 9).all()


@triton.jit
def _places_kernel(
    place_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    row_max: tl.tensor,
    temperature: tl.tensor,
    V: tl.constexpr,
) -> None:
    ids = tl.arange(0, V)
    x = row_passes.tempered(tl.load(logits_ptr + ids), row_max, temperature)
    tl.store(place_ptr + ids, row_passes.place_of(x, ids))
    tl.store(mass_ptr + ids, row_passes.mass_of(x))


def check_places(device: torch.device | str, mass_ulps: int) -> None:
    """Floats and integers of the plain sampler, bit for bit; but the exp of another library is another."""
    for kind, temperature in itertools.product(KINDS, (1e-5, 0.3, 0.6, 1.7)):
        logits = kind(2, 512).to(device)[1]
        place, mass = torch.empty(2, 512, dtype=torch.int64, device=device)
        row_max = float(logits.max().clamp(-3.4028234663852886e38, 3.4028234663852886e38))
        _places_kernel[(1,)](place, mass, logits, row_max, temperature, V=512)
        x = sampler._tempered(logits[None], torch.tensor([temperature], device=device))[0]
        assert torch.equal((place >> 20).int(), (-x).abs().view(torch.int32)), (kind, temperature)
        assert torch.equal(place & (2**20 - 1), torch.arange(512, device=device))
        want = sampler._mass(x)
        ulps = (mass - want).abs() * 2.0**23 / want.clamp(min=2**23)
        assert ulps.max() <= mass_ulps, (kind, temperature, ulps.max())


def interpreted_places_and_masses_are_the_samplers() -> None:
    check_places("cpu", mass_ulps=3)


@triton.jit
def _exponential_kernel(out_ptr: tl.tensor, seed: tl.tensor, position: tl.tensor, N: tl.constexpr) -> None:
    ids = tl.arange(0, N)
    first, second = race_module.race_keys(seed.to(tl.int64), position.to(tl.int64))
    tl.store(out_ptr + ids, race_module.exponential(ids, first, second))


def check_exponentials(device: torch.device | str) -> None:
    """To a few ulp, small ones too: of 151,936 ids the winner's is about 1e-5."""
    for seed, position in [(0, 0), (2**62 + 12_345, 7), (-(2**63), 2**31 - 1)]:
        got = torch.empty(2048, device=device)
        _exponential_kernel[(1,)](got, seed, position, N=2048)
        keys = sampler.row_keys(torch.tensor([seed], device=device), torch.tensor([position], device=device))
        ids = torch.arange(2048, dtype=torch.int32, device=device)
        want = sampler.exponential(keys, sampler.lowbias32(ids))[0]
        assert want.min() < 1e-3
        assert ((got - want).abs() <= 3e-6 * want).all()


def interpreted_exponentials_are_the_samplers() -> None:
    check_exponentials("cpu")


def interpreted_passes_over_a_row_are_bounded() -> None:
    """The hardest rows: a nucleus that no race is likely to hit, and a top_k too large for its list."""
    bound = 2 * (filtered_race_module.RACES.value + 1) + 26 + 17
    params = [SamplingParams(top_p=1e-4), SamplingParams(top_k=40, top_p=1e-4), SamplingParams(top_k=40)]
    for kind in KINDS:
        slots, logits = Slots.random(params, "cpu", SMALL_VOCAB), kind(3, SMALL_VOCAB)
        want = sample(logits, oracle_batch(params, slots))
        for row in range(3):
            passes, load_tile = [0], row_passes.load_tile.fn

            def counted(*args: Any, passes: list[int] = passes, load_tile: Any = load_tile) -> Any:
                passes[0] += 1
                return load_tile(*args)

            sizes = Sizes(slice=512, group=128, list=4, list_tile=4, row_tile=512)
            with mock.patch.object(row_passes, "load_tile", counted):
                got = slots.filtered(logits, slice(row, row + 1), sizes=sizes)
            assert got == want[row] and passes[0] <= bound, (kind, row, passes[0])


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("interpreted_")}


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return results_of("tests.cpu.test_race")


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, f"in the interpreter:\n{results[name]}"


# -- compiled for GPUs that need not be here


def meta_columns(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.empty(9, 6, dtype=dtype, device="meta").unbind(1)


def launch(num_rows: int, vocab: int = QWEN3_VOCAB) -> None:
    logits = torch.empty(num_rows, vocab, device="meta")
    rows = torch.empty(num_rows, dtype=torch.int64, device="meta")
    temperature, top_p, min_p, presence, frequency, repetition = meta_columns(torch.float32)
    _, _, position, seed, top_k, min_tokens = meta_columns(torch.int64)
    table = torch.empty(9, vocab, dtype=torch.int32, device="meta")
    penalties.apply_penalties_(logits, rows, table, presence, frequency, repetition, min_tokens, position)
    race(logits, rows, temperature, seed, position, any_random=True)
    race(logits, rows, temperature, seed, position, any_random=False)
    filtered_race(logits, rows, temperature, top_k, top_p, min_p, seed, position)
    penalties.count_(table, rows, rows)


def reports_by_name(reports: list[CompileReport]) -> dict[str, list[CompileReport]]:
    names = [report.name for report in reports]
    return {name: [report for report in reports if report.name == name] for name in names}


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    """Without spills; with wide loads where a row is read in slices, and early ones where one program reads it all."""
    reports = reports_by_name(compile_launches(capability, lambda: launch(8)))
    for report in itertools.chain(*reports.values()):
        assert_fits(report, max_registers=128)
    for name in ("_slice_kernel", "_check_kernel", "_race_kernel", "_penalise_kernel"):
        for report in reports[name]:
            assert re.search(r"ld\.global\.v4\.b32", report.ptx), f"{name}: the compiler does not see the alignment"
    listed, whole = reports["_settle_kernel"]
    assert "cp.async.cg" in whole.ptx and "cp.async.cg" not in listed.ptx


@pytest.mark.parametrize("name", ["_penalise_kernel", "_check_kernel"])
def test_arithmetic_is_the_samplers(name: str) -> None:
    """Divisions are IEEE's, and of a penalised logit no product is fused with a difference."""
    reports = reports_by_name(compile_launches(90, lambda: launch(8)))[name]
    ptx = reports[0].ptx
    assert "div.rn.f32" in ptx and "div.full.f32" not in ptx
    if name == "_penalise_kernel":
        assert "fma" not in ptx


def test_one_variant_serves_every_batch() -> None:
    hashes = [{r.hash for r in compile_launches(90, partial(launch, n))} for n in (1, 2, 16, 333)]
    assert hashes[0] == hashes[1] == hashes[2] == hashes[3]


def test_other_vocabularies_compile() -> None:
    for vocab in (7, 4096, 32_001, 1 << 18):
        for report in compile_launches(90, partial(launch, 3, vocab)):
            assert_fits(report, max_spill_bytes=512)  # rows of odd lengths are no aim


# -- in plain torch


def test_reset_writes_a_slot_afresh() -> None:
    table = torch.full((3, 10), -1, dtype=torch.int32)
    prompt, outputs, banned = torch.tensor([1, 1, 2]), torch.tensor([2, 2, 5]), torch.tensor([5, 9])
    seen_tokens.reset_(table, 1, prompt, outputs, banned)
    p, b = seen_tokens.IN_PROMPT, seen_tokens.BANNED
    assert table[1].tolist() == [0, p, p + 2, 0, 0, 1 + b, 0, 0, 0, b]
    assert (table[[0, 2]] == -1).all()
    seen_tokens.reset_(table, 1, *torch.empty(3, 0, dtype=torch.int64))
    assert (table[1] == 0).all()


@pytest.fixture(autouse=True)
def reset_driver() -> Iterator[None]:
    """The pretended driver is gone after each test."""
    from triton.runtime.driver import driver

    before = driver._active
    yield
    assert driver._active is before


if __name__ == "__main__":
    run_checks(CHECKS)
