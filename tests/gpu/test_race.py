"""The sampling kernels on a real GPU, at Qwen3's vocabulary, against `sample` on the same GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

from nanovllm.kernels import penalties  # noqa: E402
from nanovllm.kernels.race import SLICE_IDS  # noqa: E402
from nanovllm.layers import sampler, seen_tokens  # noqa: E402
from nanovllm.layers.sampler import SamplingBatch, sample  # noqa: E402
from nanovllm.sampling_params import SamplingParams  # noqa: E402
from tests.cpu.test_race import (  # noqa: E402
    COMBINATIONS,
    KINDS,
    PENALTIES,
    QWEN3_VOCAB,
    History,
    Logits,
    Slots,
    check_exponentials,
    check_places,
    oracle_batch,
    quantised_logits,
    random_logits,
    some,
)

pytestmark = pytest.mark.usefixtures("fresh_inputs")

DEVICE = torch.device("cuda", 0)
P_LIMIT = 1e-6  # of a test of a distribution: 7 have seeds that differ from run to run
RACE_TOLERANCE = 1e-5  # of x - log E, in float32


def is_near_miss(logits_V: Tensor, params: SamplingParams, slots: Slots, row: int, got: int, want: int) -> bool:
    """Whether float32 decides between the two ids: their race is a tie, or one of them is at the filters' edge."""
    seed, position = int(slots.batch.seed[row]), int(slots.batch.position[row])
    batch = SamplingBatch.from_params([params], [seed], [position], DEVICE)
    x_V = sampler._tempered(logits_V[None], batch.temperature)
    kept_V = x_V.clone()
    sampler._apply_filters_(kept_V, batch)
    ids_V = torch.arange(x_V.shape[-1], device=DEVICE)
    noise_V = sampler.exponential(sampler.row_keys(batch.seed, batch.position), sampler.lowbias32(ids_V.int()))
    race_V, x_V, allowed_V = (x_V - noise_V.log())[0], x_V[0], kept_V[0] > -torch.inf

    def rank(token: int) -> int:
        return int(((x_V > x_V[token]) | ((x_V == x_V[token]) & (ids_V < token))).sum())

    num_allowed = int(allowed_V.sum())
    tied = bool(allowed_V[got]) and float((race_V[got] - race_V[want]).abs()) <= RACE_TOLERANCE
    return tied or rank(got) == num_allowed or rank(want) == num_allowed - 1


def differences(
    got: Tensor, want: Tensor, logits: Tensor, params: Sequence[SamplingParams], slots: Slots
) -> list[tuple[bool, str]]:
    """Of each row that differs: whether it may, and what it is."""
    rows = (got != want).nonzero()[:, 0].tolist()
    pairs = [(row, int(got[row]), int(want[row])) for row in rows]
    return [(is_near_miss(logits[row], params[row], slots, row, *ids), f"{params[row]} {ids}") for row, *ids in pairs]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_filtered_race_draws_what_the_sampler_draws(kind: Logits) -> None:
    found, num_rows = [], 0
    for batch_size in (1, 7, 64, 64, 64):
        params = some(COMBINATIONS, batch_size, start=int(torch.randint(len(COMBINATIONS), ())))
        slots = Slots.random(params, DEVICE, 1)
        logits = kind(batch_size, QWEN3_VOCAB).to(DEVICE)
        kept = logits.clone()
        got = slots.filtered(logits)
        assert torch.equal(logits, kept)
        want = sample(logits, oracle_batch(params, slots))
        found += differences(got, want, logits, params, slots)
        num_rows += batch_size
    assert all(may for may, _ in found), found
    assert len(found) <= 1, f"{len(found)} of {num_rows}: {found}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_race_draws_what_the_sampler_draws(kind: Logits) -> None:
    params = [SamplingParams(temperature=(0, 0.3, 0.6, 1.0, 1.7)[i % 5]) for i in range(64)]
    slots, logits = Slots.random(params, DEVICE, 1), kind(64, QWEN3_VOCAB).to(DEVICE)
    want = sample(logits, slots.batch)
    for size in (64, 7, 1):
        got, largest = slots.raced(logits, slice(size)), logits[:size].amax(1)
        beyond_noise = (logits[:size].gather(1, got[:, None])[:, 0] == largest) & (largest >= 2**24)  # see `race`
        found = differences(torch.where(beyond_noise, want[:size], got), want[:size], logits, params, slots)
        assert all(may for may, _ in found) and len(found) <= 1, found
    greedy = [SamplingParams(temperature=0)] * 64
    slots = Slots.random(greedy, DEVICE, 1)
    assert torch.equal(slots.raced(logits, any_random=False), logits.argmax(-1))
    assert torch.equal(slots.filtered(logits), logits.argmax(-1))


def test_floats_of_the_sampler() -> None:
    """Places and races."""
    check_places(DEVICE, mass_ulps=2)
    check_exponentials(DEVICE)


def test_masses_are_the_samplers_bit_for_bit() -> None:
    """libdevice's exp is that of torch's kernels. Were it not, a nucleus could differ by an id, rarely."""
    check_places(DEVICE, mass_ulps=0)


def test_penalties_have_the_same_bits() -> None:
    params = [SamplingParams(temperature=0, **penalty) for penalty in PENALTIES]
    slots, history = Slots.random(params, DEVICE, QWEN3_VOCAB), History.random(6, QWEN3_VOCAB, DEVICE)
    history.write(slots)
    for _ in range(3):
        logits = quantised_logits(6, QWEN3_VOCAB).to(DEVICE)
        batch = oracle_batch(params, slots, **history.masks(slots))
        want = sampler._penalised(logits, batch)
        slots.penalise_(logits)
        assert torch.equal(logits, want)
        tokens = logits.argmax(-1)
        penalties.count_(slots.table, slots.rows, tokens)
        history.counts[torch.arange(6, device=DEVICE), tokens] += 1
        slots.integers[slots.rows, 2] += 1
        slots.batch.position.add_(1)


def test_null_slot_may_be_counted_by_many() -> None:
    table = torch.zeros(4, QWEN3_VOCAB, dtype=torch.int32, device=DEVICE)
    rows = torch.full((513,), 3, device=DEVICE)
    rows[400] = 1
    penalties.count_(table, rows, torch.full((513,), QWEN3_VOCAB - 1, device=DEVICE))
    assert int(table.sum()) == int(table[1, -1]) == 1


FILTERS = [
    SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=1.7, top_p=0.3),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=0.8, top_k=30, top_p=0.8, min_p=0.02),
    SamplingParams(),
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_draws_have_the_exact_distribution(params: SamplingParams) -> None:
    """Chi-square over 48,000 draws, each with a seed and position of its own, from 50 ids."""
    num_rows, vocab = 4000, 50
    logits_V = quantised_logits(1, vocab).clamp(-4, 4).to(DEVICE) / 2  # no single id fills a nucleus
    logits = logits_V.expand(num_rows, -1).contiguous()
    observed = torch.zeros(vocab, dtype=torch.float64, device=DEVICE)
    for _ in range(12):
        slots = Slots.random([params] * num_rows, DEVICE, 1, max_position=2**31)
        observed += slots.filtered(logits).bincount(minlength=vocab)
    p_V = exact_probabilities(logits_V, params)
    assert not observed[p_V == 0].any()
    assert chi_square_p(observed, p_V) > P_LIMIT, (observed, p_V * observed.sum())


def chi_square_p(observed: Tensor, p: Tensor) -> float:
    """How likely counts [bins] as far from float64 probabilities [bins] are; bins expected fewer than five times do not
    count."""
    expected = p * observed.sum()
    kept = expected >= 5
    statistic = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    half_freedom = torch.tensor((int(kept.sum()) - 1) / 2, dtype=torch.float64, device=p.device)
    return float(torch.special.gammaincc(half_freedom, statistic / 2))


def exact_probabilities(logits_1V: Tensor, params: SamplingParams) -> Tensor:
    """float64 [V], by the plain sampler's filters."""
    batch = SamplingBatch.from_params([params], [0], [0], DEVICE)
    x_1V = sampler._tempered(logits_1V, batch.temperature)
    sampler._apply_filters_(x_1V, batch)
    return x_1V[0].double().softmax(-1)


# -- over several slices, with seeds that never change


WIDE_VOCAB, WIDE_ROWS, WIDE_STEPS = 9_013, 4096, 512  # three slices of a race, the last one cut; two million draws
NUM_HEAVY, OCTILES = 24, 8
PENALISED = SamplingParams(presence_penalty=0.4, frequency_penalty=-0.2, repetition_penalty=1.3)


def wide_probabilities() -> Tensor:
    """float64 [WIDE_VOCAB]. Ids in every slice, of 0.2 to 9 %, hold 60 %: they win with small exponentials, which come
    from a series, and with larger ones, which come from the hardware's logarithm."""
    p_V = torch.randn(WIDE_VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).exp()
    heavy = 0.85 ** torch.arange(NUM_HEAVY, dtype=torch.float64)
    p_V[heavy_ids()] = 0
    p_V *= 0.4 / p_V.sum()
    p_V[heavy_ids()] = heavy * 0.6 / heavy.sum()
    return p_V.to(DEVICE)


def heavy_ids() -> Tensor:
    return torch.arange(NUM_HEAVY) * 375 + 7


def wide_slots(params: SamplingParams, vocab: int) -> Slots:
    """Seeds 0 to WIDE_ROWS - 1, at position 0."""
    slots = Slots.random([params] * WIDE_ROWS, DEVICE, vocab)
    slots.integers[slots.rows, 2] = 0
    slots.integers[slots.rows, 3] = torch.arange(WIDE_ROWS, device=DEVICE)
    return slots


def draw_wide(draw: Callable[[], Tensor], slots: Slots) -> Tensor:
    """Counts, float64 [WIDE_VOCAB], of a draw by every row at every position."""
    observed = torch.zeros(WIDE_VOCAB, dtype=torch.float64, device=DEVICE)
    for _ in range(WIDE_STEPS):
        observed += draw().bincount(minlength=WIDE_VOCAB)
        slots.integers[slots.rows, 2] += 1
    return observed


def race_wide(p_V: Tensor, temperature: float) -> Tensor:
    logits = (p_V.log() * temperature).float().expand(WIDE_ROWS, -1).contiguous()
    slots = wide_slots(SamplingParams(temperature=temperature), 1)
    return draw_wide(lambda: slots.raced(logits), slots)


def wide_p(observed: Tensor, p_V: Tensor) -> float:
    """The smaller of two: of ids one by one, and of heavy ids and eighths of the slices' others by likelihood, where a
    small error of many ids shows."""
    ids_V = torch.arange(WIDE_VOCAB, device=p_V.device)
    bins_V = NUM_HEAVY + ids_V // SLICE_IDS * OCTILES + p_V.argsort().argsort() * OCTILES // WIDE_VOCAB
    bins_V[heavy_ids()] = torch.arange(NUM_HEAVY, device=p_V.device)
    zeros = torch.zeros(int(bins_V.max()) + 1, dtype=torch.float64, device=p_V.device)
    pooled, pooled_p = (zeros.index_add(0, bins_V, each_V) for each_V in (observed, p_V))
    return min(chi_square_p(observed, p_V), chi_square_p(pooled, pooled_p))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_plain_draws_have_the_exact_distribution(temperature: float) -> None:
    p_V = wide_probabilities()
    assert wide_p(race_wide(p_V, temperature), p_V) > P_LIMIT


def test_penalised_draws_have_the_exact_distribution() -> None:
    """Every third id is in the prompt, every fifth was generated, a tenth of all twice."""
    slots, x_V = wide_slots(PENALISED, WIDE_VOCAB), wide_probabilities().log() + 9  # some logits above 0, some below
    ids_V = torch.arange(WIDE_VOCAB, device=DEVICE)
    seen_tokens.reset_(slots.table, 0, ids_V[::3], torch.cat([ids_V[::5], ids_V[::10]]), ids_V[:0])
    slots.table[1:] = slots.table[0]
    logits = x_V.float().expand(WIDE_ROWS, -1).contiguous()

    def draw() -> Tensor:
        penalised = logits.clone()
        slots.penalise_(penalised)
        return slots.filtered(penalised)

    counts_V = (ids_V % 5 == 0).double() + (ids_V % 10 == 0)
    factor_V = torch.where((ids_V % 3 == 0) | (counts_V > 0), PENALISED.repetition_penalty, 1.0)
    x_V = torch.where(x_V > 0, x_V / factor_V, x_V * factor_V)
    x_V = x_V - PENALISED.frequency_penalty * counts_V - PENALISED.presence_penalty * (counts_V > 0)
    p_V = x_V.softmax(-1)
    assert wide_p(draw_wide(draw, slots), p_V) > P_LIMIT


@pytest.mark.parametrize("plant", ["temperature", "slice", "heavy"])
def test_an_error_of_three_percent_would_show(plant: str) -> None:
    """Draws at another temperature; with all ids of the middle slice likelier; with one id likelier."""
    p_V = wide_probabilities()
    wrong_V = p_V ** (1.03 if plant == "temperature" else 1.0)
    if plant == "slice":
        wrong_V[SLICE_IDS : 2 * SLICE_IDS] *= 1.03
    if plant == "heavy":
        wrong_V[heavy_ids()[0]] *= 1.03
    assert wide_p(race_wide(wrong_V, 1.0), p_V) < P_LIMIT


def test_rows_do_not_know_each_other() -> None:
    params = some(COMBINATIONS, 40, start=5)
    slots, logits = Slots.random(params, DEVICE, 1), quantised_logits(40, QWEN3_VOCAB).to(DEVICE)
    together = slots.filtered(logits)
    for i in range(0, 40, 3):
        assert slots.filtered(logits, slice(i, i + 1)) == together[i], params[i]
    for _ in range(5):
        assert torch.equal(slots.filtered(logits), together), "the order of a list must not matter"


def test_a_graph_draws_the_same() -> None:
    """Penalties, filters and counting in one capture; then other logits, positions, parameters and slots."""
    size = 24
    filters = some(COMBINATIONS, size, start=17)
    params = [
        SamplingParams(temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, **PENALTIES[i % 6])
        for i, p in enumerate(filters)
    ]
    slots, history = Slots.random(params, DEVICE, QWEN3_VOCAB), History.random(size, QWEN3_VOCAB, DEVICE)
    history.write(slots)
    logits, out = torch.empty(size, QWEN3_VOCAB, device=DEVICE), torch.zeros(size, dtype=torch.int64, device=DEVICE)
    graph = capture(slots, logits.normal_(), out)
    for step in range(3):
        slots.rows.copy_(slots.rows.roll(step))
        slots.integers[slots.rows, 2] += 1
        logits.copy_(random_logits(size, QWEN3_VOCAB))
        expected_logits, expected_table = logits.clone(), slots.table.clone()
        graph.replay()
        graph_table = slots.table.clone()
        slots.table.copy_(expected_table)
        expected = step_of(slots, expected_logits, torch.empty_like(out))
        assert torch.equal(out, expected) and torch.equal(graph_table, slots.table)
        assert torch.equal(logits, expected_logits)


def step_of(slots: Slots, logits: Tensor, out: Tensor) -> Tensor:
    slots.penalise_(logits)
    slots.filtered(logits, out=out)
    penalties.count_(slots.table, slots.rows, out)
    return out


def capture(slots: Slots, logits: Tensor, out: Tensor) -> torch.cuda.CUDAGraph:
    table = slots.table.clone()
    step_of(slots, logits, out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_of(slots, logits, out)
    slots.table.copy_(table)
    return graph
