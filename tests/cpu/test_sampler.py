"""The sampler against exact probabilities, its independence of the batch, and its noise.

The statistical tests are deterministic (every seed is fixed), so a threshold of 1e-4 never flakes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanovllm.layers import sampler
from nanovllm.layers.sampler import SamplingBatch, gather_logprobs, sample
from nanovllm.sampling_params import SamplingParams

P_LIMIT = 1e-4
QWEN3_VOCAB = 151_936
INF = float("inf")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_logits(num_rows: int, vocab: int, seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draws(
    logits_V: Sequence[float] | Tensor, params: SamplingParams, num_draws: int, seed: int = 0, **masks: Tensor
) -> np.ndarray:
    """Tokens of one row at positions 0, 1, 2, ...; masks are given for the one row."""
    row = torch.as_tensor(logits_V, dtype=torch.float32)
    rows = {name: mask.expand(num_draws, -1) for name, mask in masks.items()}
    batch = SamplingBatch.from_params([params] * num_draws, [seed] * num_draws, range(num_draws), "cpu", **rows)
    return sample(row.repeat(num_draws, 1), batch).numpy()


def one_row(logits_V: Sequence[float], params: SamplingParams, seed: int = 0) -> int:
    return int(draws(logits_V, params, 1, seed)[0])


# --- an independent reference ------------------------------------------------------------------------


def reference_probabilities(
    logits: Sequence[float],
    params: SamplingParams,
    counts: Sequence[int],
    in_prompt: Sequence[bool],
    banned: Sequence[bool],
) -> np.ndarray:
    """Exact probabilities, float64 [V], one id and one rule at a time."""
    z = np.array(logits, dtype=np.float64)
    for i in range(len(z)):
        if banned[i]:
            z[i] = -INF
            continue
        if counts[i] > 0 or in_prompt[i]:
            z[i] = z[i] / params.repetition_penalty if z[i] > 0 else z[i] * params.repetition_penalty
        z[i] -= params.frequency_penalty * counts[i] + params.presence_penalty * (counts[i] > 0)
    if params.temperature == 0:
        return np.eye(len(z))[int(np.argmax(z))]
    p = np.exp((z - z.max()) / params.temperature)
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    if 0 < params.top_k < len(p):
        p[p < np.sort(p)[-params.top_k]] = 0
    p /= p.sum()
    mass = 0.0
    for i in np.argsort(-p, kind="stable"):
        if mass >= params.top_p * (1 - 1e-9):
            p[i] = 0
        mass += p[i]
    return p / p.sum()


def assert_drawn_from(tokens: np.ndarray, p: np.ndarray) -> None:
    observed = np.bincount(tokens, minlength=len(p))
    assert not observed[p == 0].any(), f"excluded ids were drawn: {np.flatnonzero(observed * (p == 0))}"
    kept = p > 0
    if kept.sum() > 1:
        assert stats.chisquare(observed[kept], p[kept] * len(tokens)).pvalue > P_LIMIT, (observed, p)


VOCAB = 12
LOGITS = random_logits(1, VOCAB, seed=3, scale=1.5)[0]
COUNTS = torch.tensor([0, 3, 0, 1, 0, 0, 2, 0, 1, 0, 0, 0], dtype=torch.int32)
IN_PROMPT = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0], dtype=torch.bool)
BANNED = torch.zeros(VOCAB, dtype=torch.bool)
BANNED[LOGITS.topk(2).indices[1]] = True
MASKS = {"output_counts": COUNTS, "prompt_mask": IN_PROMPT, "banned": BANNED}
PENALTIES = {"presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.3}
COMBINATIONS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **penalties)
    for temperature, top_k, top_p, min_p, penalties in itertools.product(
        (0.6, 1.0, 1.7), (0, 5), (1.0, 0.8), (0.0, 0.15), ({}, PENALTIES)
    )
]


def describe(params: SamplingParams) -> str:
    penalised = "-pen" if params.has_penalty else ""
    return f"T{params.temperature}-k{params.top_k}-p{params.top_p}-min{params.min_p}{penalised}"


@pytest.mark.parametrize("with_ban", [False, True], ids=["", "banned"])
@pytest.mark.parametrize("params", COMBINATIONS, ids=describe)
def test_every_combination_has_the_exact_distribution(params: SamplingParams, with_ban: bool) -> None:
    masks = {**MASKS, "banned": BANNED if with_ban else torch.zeros_like(BANNED)}
    p = reference_probabilities(LOGITS.tolist(), params, *(mask.tolist() for mask in masks.values()))
    assert_drawn_from(draws(LOGITS, params, 5000, seed=11, **masks), p)


def test_all_combinations_mixed_in_one_batch_have_their_distributions() -> None:
    params = [*COMBINATIONS, SamplingParams(temperature=0, **PENALTIES)]
    num_draws = 1500
    rows = params * num_draws
    seeds = list(range(len(params))) * num_draws
    positions = [i // len(params) for i in range(len(rows))]
    masks = {name: mask.expand(len(rows), -1) for name, mask in MASKS.items()}
    tokens = sample(LOGITS.repeat(len(rows), 1), SamplingBatch.from_params(rows, seeds, positions, "cpu", **masks))
    for i, p in enumerate(params):
        expected = reference_probabilities(LOGITS.tolist(), p, *(mask.tolist() for mask in MASKS.values()))
        assert_drawn_from(tokens.numpy()[i :: len(params)], expected)


@pytest.mark.parametrize("field", ["position", "seed", "seed high word"])
def test_draws_over_each_counter_have_the_distribution(field: str) -> None:
    n = 20_000
    positions = range(n) if field == "position" else [5] * n
    seeds = {"position": [9] * n, "seed": range(n), "seed high word": [i << 32 for i in range(n)]}[field]
    batch = SamplingBatch.from_params([SamplingParams()] * n, seeds, positions, "cpu")
    p = LOGITS.double().softmax(-1).numpy()
    tokens = sample(LOGITS.repeat(n, 1), batch).numpy()
    assert_drawn_from(tokens, p)
    pairs = np.histogram2d(tokens[:-1], tokens[1:], bins=VOCAB, range=((0, VOCAB),) * 2)[0]
    common = p > 0.05
    observed = pairs[np.ix_(common, common)].ravel()
    expected = np.outer(p[common], p[common]).ravel() * observed.sum() / p[common].sum() ** 2
    assert stats.chisquare(observed, expected).pvalue > P_LIMIT, "successive draws depend on each other"


# --- greedy ------------------------------------------------------------------------------------------


def test_greedy_is_argmax_of_penalised_logits() -> None:
    logits = random_logits(40, 50, seed=1)
    counts = torch.randint(0, 3, logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    prompt = counts.roll(7, -1) > 1
    params = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.3, **PENALTIES)
    batch = SamplingBatch.from_params(
        [params] * 40, range(40), range(40), "cpu", output_counts=counts, prompt_mask=prompt
    )
    no_ban = [False] * 50
    expected = [
        reference_probabilities(*row, no_ban).argmax()
        for row in zip(logits.tolist(), [params] * 40, counts.tolist(), prompt.tolist(), strict=True)
    ]
    assert sample(logits, batch).tolist() == expected
    assert sample(logits, batch).tolist() != logits.argmax(-1).tolist()


def test_greedy_takes_the_lowest_of_tied_ids_alone_and_among_random_rows() -> None:
    logits = torch.zeros(3, 100)
    logits[:, [17, 40, 93]] = 4.0
    greedy, other = SamplingParams(temperature=0), SamplingParams(temperature=1.5, top_p=0.9)
    assert one_row(logits[0].tolist(), greedy) == 17
    batch = SamplingBatch.from_params([other, greedy, other], [1, 2, 3], [0, 0, 0], "cpu")
    assert sample(logits, batch)[1] == 17


def test_small_temperature_is_almost_greedy_and_huge_is_almost_uniform() -> None:
    assert set(draws(LOGITS, SamplingParams(temperature=1e-5), 300)) == {int(LOGITS.argmax())}
    assert_drawn_from(draws(LOGITS, SamplingParams(temperature=1000), 20_000), np.full(VOCAB, 1 / VOCAB))


# --- filters at their edges --------------------------------------------------------------------------


def log(*p: float) -> list[float]:
    return [float(np.log(x)) if x > 0 else -INF for x in p]


@pytest.mark.parametrize(
    ("p", "params", "kept"),
    [
        ((0.4, 0.2, 0.2, 0.2), {"top_k": 2}, {0, 1, 2, 3}),  # all tied with the second
        ((0.1, 0.3, 0.3, 0.3), {"top_k": 1}, {1, 2, 3}),
        ((0.4, 0.3, 0.2, 0.1), {"top_k": 3}, {0, 1, 2}),
        ((0.4, 0.3, 0.2, 0.1), {"top_k": 100}, {0, 1, 2, 3}),
        ((0.5, 0.5, 0.0, 0.0), {"top_k": 3}, {0, 1}),
        ((0.5, 0.3, 0.2), {"top_p": 0.45}, {0}),
        ((0.5, 0.3, 0.2), {"top_p": 0.5}, {0}),  # exactly reached: no further id
        ((0.5, 0.3, 0.2), {"top_p": 0.51}, {0, 1}),
        ((0.5, 0.3, 0.2), {"top_p": 0.8}, {0, 1}),
        ((0.5, 0.3, 0.2), {"top_p": 0.81}, {0, 1, 2}),
        ((0.5, 0.3, 0.2), {"top_p": 1e-30}, {0}),
        ((0.5, 0.3, 0.2), {"top_p": 1e-300}, {0}),
        ((0.25, 0.5, 0.25), {"top_p": 0.75}, {0, 1}),  # of the tied two the lower
        ((0.25,) * 4, {"top_p": 0.5}, {0, 1}),
        ((0.1,) * 10, {"top_p": 0.3}, {0, 1, 2}),
        ((0.1,) * 10, {"top_p": 0.31}, {0, 1, 2, 3}),
        ((0.1,) * 10, {"top_p": 1e-30}, {0}),
        # top_p acts on what top_k leaves, renormalised: 0.5/0.8 = 0.625
        ((0.5, 0.3, 0.2), {"top_k": 2, "top_p": 0.62}, {0}),
        ((0.5, 0.3, 0.2), {"top_k": 2, "top_p": 0.63}, {0, 1}),
        # ... and the ids tied with the k-th carry mass too: 0.4/1.0, not 0.4/0.6
        ((0.2, 0.2, 0.4, 0.2), {"top_k": 2, "top_p": 0.59}, {0, 2}),
        ((0.2, 0.2, 0.4, 0.2), {"top_k": 2, "top_p": 0.79}, {0, 1, 2}),
        ((0.2, 0.2, 0.4, 0.2), {"top_k": 2, "top_p": 0.81}, {0, 1, 2, 3}),
        ((0.1,) * 10, {"top_k": 1, "top_p": 0.3}, {0, 1, 2}),
        ((0.5, 0.25, 0.25), {"min_p": 0.5}, {0, 1, 2}),
        ((0.5, 0.25, 0.25), {"min_p": 0.51}, {0}),
        ((0.3, 0.4, 0.3), {"min_p": 1.0}, {1}),
        ((0.4, 0.4, 0.2), {"min_p": 1.0}, {0, 1}),
        # min_p acts after temperature: 0.25/0.5 becomes 0.707 at temperature 2
        ((0.5, 0.25, 0.25), {"min_p": 0.7, "temperature": 2.0}, {0, 1, 2}),
        ((0.5, 0.25, 0.25), {"min_p": 0.72, "temperature": 2.0}, {0}),
        # min_p first, then top_p on the renormalised rest: 0.5/0.9 = 0.556
        ((0.5, 0.4, 0.1), {"min_p": 0.5, "top_p": 0.55}, {0}),
        ((0.5, 0.4, 0.1), {"min_p": 0.5, "top_p": 0.56}, {0, 1}),
        ((0.5, 0.4, 0.1), {"min_p": 0.5, "top_k": 3, "top_p": 0.55}, {0}),
    ],
    ids=str,
)
def test_which_ids_are_kept(p: tuple[float, ...], params: dict[str, Any], kept: set[int]) -> None:
    assert set(draws(log(*p), SamplingParams(**params), 400)) == kept


def test_repetition_penalty_before_frequency_and_presence() -> None:
    counts = torch.tensor([2, 0, 0], dtype=torch.int32)
    params = SamplingParams(temperature=0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    # 4 / 2 - 2 * 0.5 - 0.25 = 0.75; in the other order it would be (4 - 1.25) / 2 = 1.375
    assert draws([4.0, 0.7, 0.0], params, 1, output_counts=counts)[0] == 0
    assert draws([4.0, 0.8, 0.0], params, 1, output_counts=counts)[0] == 1


def test_repetition_penalty_of_the_prompt_alone_before_any_output() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    prompt = torch.tensor([True, False, True])
    assert draws([4.0, 2.1, 0.0], params, 1, prompt_mask=prompt)[0] == 1
    assert draws([-1.0, -1.9, -3.0], params, 1, prompt_mask=prompt)[0] == 1
    assert draws([-1.0, -2.1, -3.0], params, 1, prompt_mask=prompt)[0] == 0
    assert draws([4.0, 2.1, 0.0], params, 1)[0] == 0


# --- infinities --------------------------------------------------------------------------------------

EVERYTHING = SamplingParams(temperature=0.7, top_k=4, top_p=0.9, min_p=0.01)
ALL_FILTERS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=1e-5),
    SamplingParams(temperature=1000),
    SamplingParams(top_k=4),
    SamplingParams(top_p=0.9),
    SamplingParams(min_p=0.01),
    EVERYTHING,
    SamplingParams(top_k=4, top_p=0.9, repetition_penalty=0.01),
]


@pytest.mark.parametrize("params", ALL_FILTERS, ids=describe)
@pytest.mark.parametrize(
    ("logits", "allowed"),
    [
        ([-INF, -INF, 1.0, -INF, -INF, -INF], {2}),
        ([-INF, 3e38, -3e38, 0.0, -INF, 3e38], {1, 5}),
        ([-3e38, -3e38, -3.4e38, -INF, -INF, -INF], {0, 1, 2}),
        ([0.0, INF, 3.0, -INF, INF, 3e38], {1, 4, 5}),
        ([1e9, 1e9 - 1e6, 0.0, -1e9, -1e9, -1e9], {0}),
    ],
    ids=["one finite", "huge", "all hugely negative", "plus infinity", "large"],
)
def test_infinite_and_huge_logits(params: SamplingParams, logits: list[float], allowed: set[int]) -> None:
    prompt = torch.ones(len(logits), dtype=torch.bool)
    if params.temperature == 1000 and logits[0] == 1e9:
        allowed = allowed | {1}
    assert set(draws(logits, params, 200, prompt_mask=prompt)) <= allowed


def test_plus_infinity_shares_the_draws_among_its_ids() -> None:
    """Were a NaN let in, argmax would always take the first of them."""
    tokens = draws([0.0, INF, 3.0, -INF, INF, 3e38], SamplingParams(), 400)
    assert_drawn_from(tokens, np.array([0, 0.5, 0, 0, 0.5, 0]))


@pytest.mark.parametrize("params", ALL_FILTERS, ids=describe)
def test_row_without_any_finite_logit_gives_id_0_and_disturbs_no_neighbour(params: SamplingParams) -> None:
    logits = torch.full((3, 30), -INF)
    logits[1] = random_logits(1, 30, seed=5)[0]
    batch = SamplingBatch.from_params([params] * 3, [7] * 3, [3] * 3, "cpu")
    alone = SamplingBatch.from_params([params], [7], [3], "cpu")
    assert sample(logits, batch).tolist() == [0, sample(logits[1:2], alone).item(), 0]


@pytest.mark.parametrize("params", ALL_FILTERS, ids=describe)
def test_banned_ids_are_never_drawn(params: SamplingParams) -> None:
    banned = torch.zeros(VOCAB, dtype=torch.bool)
    banned[LOGITS.topk(4).indices] = True
    assert not banned[torch.as_tensor(draws(LOGITS, params, 500, banned=banned))].any()


# --- independence of the batch -----------------------------------------------------------------------


def mixed_rows(num_rows: int) -> list[SamplingParams]:
    choose = np.random.default_rng(0).choice
    return [
        SamplingParams(
            temperature=float(choose([0.0, 0.6, 1.0, 2.0], p=[0.1, 0.3, 0.3, 0.3])),
            top_k=int(choose([0, 1, 5, 20, 90])),
            top_p=float(choose([1.0, 0.95, 0.5])),
            min_p=float(choose([0.0, 0.05])),
            presence_penalty=float(choose([0.0, 0.5])),
            repetition_penalty=float(choose([1.0, 1.2])),
        )
        for _ in range(num_rows)
    ]


class MixedBatch:
    """Rows of every kind, more than one chunk of them, on a vocabulary that is no multiple of a vector."""

    def __init__(self, num_rows: int = 3 * sampler.ROWS_PER_CHUNK + 7, vocab: int = 1003) -> None:
        generator = torch.Generator().manual_seed(4)
        self.params = mixed_rows(num_rows)
        # rounded, as logits computed in bf16 are: many ties
        self.logits = (random_logits(num_rows, vocab, seed=6) * 16).round() / 16
        self.seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator).tolist()
        self.positions = torch.randint(0, 5000, (num_rows,), generator=generator).tolist()
        self.counts = torch.randint(-6, 3, self.logits.shape, generator=generator, dtype=torch.int32).clamp(0)
        self.prompt = torch.rand(self.logits.shape, generator=generator) < 0.1
        self.banned = torch.rand(self.logits.shape, generator=generator) < 0.01

    def tokens(self, rows: Sequence[int]) -> list[int]:
        picked = torch.as_tensor(rows)
        batch = SamplingBatch.from_params(
            [self.params[r] for r in rows],
            [self.seeds[r] for r in rows],
            [self.positions[r] for r in rows],
            "cpu",
            output_counts=self.counts[picked],
            prompt_mask=self.prompt[picked],
            banned=self.banned[picked],
        )
        return sample(self.logits[picked], batch).tolist()


def test_row_draws_the_same_alone_permuted_and_in_any_batch() -> None:
    mixed = MixedBatch()
    rows = list(range(len(mixed.params)))
    together = mixed.tokens(rows)
    assert [mixed.tokens([row])[0] for row in rows] == together
    order = np.random.default_rng(1).permutation(rows).tolist()
    assert mixed.tokens(order) == [together[row] for row in order]
    for size in (2, 31, 33, 50):
        assert mixed.tokens(rows[-size:]) == together[-size:]
    assert mixed.tokens(rows[:1] * 70) == together[:1] * 70


def test_same_seed_and_position_repeat_and_others_differ() -> None:
    vocab = 50_000

    def token(seed: int, position: int) -> int:
        batch = SamplingBatch.from_params([SamplingParams()], [seed], [position], "cpu")
        return int(sample(torch.zeros(1, vocab), batch))

    points = [(0, 0), (0, 1), (1, 0), (1, 1), (1 << 32, 0), (1 << 63, 0), (-1, 0), (0, 2**31 - 1)]
    tokens = [token(*point) for point in points]
    assert [token(*point) for point in points] == tokens
    assert len(set(tokens)) == len(points)
    assert token(-1, 0) == token(2**64 - 1, 0)


def test_sorting_more_rows_than_needed_changes_nothing() -> None:
    """What a captured graph does: it cannot know which rows need it."""
    mixed = MixedBatch()
    masks = {"output_counts": mixed.counts, "prompt_mask": mixed.prompt, "banned": mixed.banned}
    batch = SamplingBatch.from_params(mixed.params, mixed.seeds, mixed.positions, "cpu", **masks)
    everything = {
        **vars(batch),
        "full_sort_rows": torch.arange(len(mixed.params)),
        "max_top_k": 200,
    }
    assert torch.equal(sample(mixed.logits, SamplingBatch(**everything)), sample(mixed.logits, batch))


def test_flags_of_absent_features_change_nothing() -> None:
    params = [SamplingParams(temperature=t) for t in (0.0, 0.5, 1.0, 2.0)] * 10
    logits = random_logits(40, 333, seed=8)
    batch = SamplingBatch.from_params(params, range(40), range(40), "cpu")
    flags = {name: True for name in vars(batch) if name.startswith("any_")}
    all_on = {**vars(batch), **flags, "max_top_k": 50, "full_sort_rows": torch.arange(40)}
    assert torch.equal(sample(logits, SamplingBatch(**all_on)), sample(logits, batch))


def test_logits_are_left_alone() -> None:
    mixed = MixedBatch()
    before = mixed.logits.clone()
    mixed.tokens(range(len(mixed.params)))
    batch = SamplingBatch.from_params([SamplingParams(top_p=0.5)], [0], [0], "cpu")
    sample(mixed.logits[:1], batch)
    assert torch.equal(mixed.logits, before)


# --- what is launched --------------------------------------------------------------------------------


class RecordedOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def ops_of(*params: SamplingParams) -> set[str]:
    batch = SamplingBatch.from_params(params, range(len(params)), range(len(params)), "cpu")
    logits = random_logits(len(params), 64, seed=9)
    with RecordedOps() as recorded:
        sample(logits, batch)
    return set(recorded.names)


def test_absent_features_are_not_launched() -> None:
    greedy = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert ops_of(greedy, greedy) == {"argmax"}
    expensive = {"sort", "topk", "cumsum", "gather"}
    assert not ops_of(SamplingParams(), SamplingParams(min_p=0.1), greedy) & expensive
    assert ops_of(SamplingParams(top_k=5)) & expensive == {"topk", "gather"}
    assert "sort" not in ops_of(SamplingParams(top_k=5, top_p=0.9), SamplingParams(), greedy)
    assert "sort" in ops_of(SamplingParams(top_p=0.9))


def test_only_the_rows_that_need_it_are_sorted_in_full() -> None:
    rows = [SamplingParams(top_p=0.9), EVERYTHING, SamplingParams(temperature=0, top_p=0.9), SamplingParams()]
    batch = SamplingBatch.from_params(rows * 2, range(8), range(8), "cpu")
    assert batch.full_sort_rows is not None and batch.full_sort_rows.tolist() == [0, 4]


def test_nothing_asks_the_device_for_a_value() -> None:
    """Tensors on the meta device have no values: reading one, or a shape that depends on one, raises."""
    mixed = MixedBatch()
    masks = {"output_counts": mixed.counts, "prompt_mask": mixed.prompt, "banned": mixed.banned}
    batch = SamplingBatch.from_params(mixed.params, mixed.seeds, mixed.positions, "cpu", **masks)
    on_meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in vars(batch).items()}
    assert sample(mixed.logits.to("meta"), SamplingBatch(**on_meta)).shape == (len(mixed.params),)
    logprobs = gather_logprobs(mixed.logits.to("meta"), batch.seed.to("meta"), 5)
    assert logprobs[2].shape == (len(mixed.params), 5)


# --- the noise ---------------------------------------------------------------------------------------

MASK = 2**32 - 1


def lowbias32_in_python(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


def uniform_in_python(seed: int, position: int, token: int) -> float:
    """The hash in unbounded integers, as a kernel in uint32 would compute it."""
    keys = []
    for start in (0x9E3779B9, 0x243F6A88):
        key = lowbias32_in_python(start ^ seed & MASK)
        key = lowbias32_in_python(key ^ seed >> 32 & MASK)
        keys.append(lowbias32_in_python(key ^ position))
    x = (lowbias32_in_python(token) ^ keys[0]) * 0x7FEB352D & MASK
    x = (x ^ x >> 15 ^ keys[1]) * 0x846CA68B & MASK
    return float((np.float32(x >> 1) + np.float32(0.5)) * np.float32(2.0**-31 * (1 - 2.0**-24)))


def uniforms(seeds: Sequence[int], positions: Sequence[int], tokens: Sequence[int]) -> Tensor:
    keys = sampler.row_keys(torch.tensor(list(seeds)), torch.tensor(list(positions)))
    return sampler.uniform(keys, sampler.lowbias32(torch.tensor(list(tokens), dtype=torch.int32)))


def test_uniforms_are_bit_for_bit_those_of_the_documented_hash() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789 << 32, 42]
    positions = [0, 1, 2, 3, 2**31 - 1, 4095, 77]
    tokens = [*range(45), QWEN3_VOCAB - 1, 2**31 - 1]
    expected = [[uniform_in_python(s, p, t) for t in tokens] for s, p in zip(seeds, positions, strict=True)]
    assert uniforms(seeds, positions, tokens).tolist() == expected


def test_uniform_stays_inside_the_open_interval_for_every_hash() -> None:
    """The conversion is monotone, so its two ends are enough; they are reached through chosen keys."""
    inverse = pow(0x846CA68B, -1, 2**32)

    def from_last_product(product: int) -> float:
        before = product * inverse & MASK  # with a first key equal to the id's hash, only key 2 counts
        key = torch.tensor([[0, before - 2**32 if before >= 2**31 else before]], dtype=torch.int32)
        return sampler.uniform(key, torch.zeros(1, dtype=torch.int32)).item()

    assert from_last_product(0) == pytest.approx(2.0**-32)
    assert from_last_product(MASK) == 1 - 2.0**-24
    keys = sampler.row_keys(torch.arange(64), torch.arange(64))
    noise = sampler.exponential(keys, sampler.lowbias32(torch.arange(20_000, dtype=torch.int32)))
    assert noise.min() > 0 and noise.isfinite().all()


COUNTERS = {
    "positions": (lambda n: [0] * n, lambda n: range(n)),
    "positions of a large seed": (lambda n: [2**62 + 12345] * n, lambda n: range(n)),
    "seeds": (lambda n: range(n), lambda n: [0] * n),
    "high words of seeds": (lambda n: [i << 32 for i in range(n)], lambda n: [0] * n),
    "seeds and positions": (lambda n: range(n), lambda n: range(n)),
}


@pytest.mark.parametrize("family", COUNTERS)
def test_uniforms_are_uniform_and_independent(family: str) -> None:
    """Neighbours differ in position, in seed, in its high word, and (along the rows) in id."""
    n = 1500
    seeds, positions = (make(n) for make in COUNTERS[family])
    u = uniforms(seeds, positions, range(n)).double().numpy()
    assert stats.kstest(u[::7].ravel(), "uniform").pvalue > P_LIMIT
    assert stats.chisquare(np.histogram(u, 1024, (0, 1))[0]).pvalue > P_LIMIT
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:]), (u[:-1, :-1], u[1:, 1:])):
        z = ((a - 0.5) * (b - 0.5)).mean() * 12 * np.sqrt(a.size)
        assert 2 * stats.norm.sf(abs(z)) > P_LIMIT
        joint = np.histogram2d(a.ravel(), b.ravel(), 20, ((0, 1), (0, 1)))[0]
        assert stats.chisquare(joint.ravel()).pvalue > P_LIMIT
    for axis in (0, 1):  # no row and no id is luckier than another
        means = (u.mean(axis) - 0.5) * np.sqrt(12 * n)
        assert stats.kstest(means, "norm").pvalue > P_LIMIT


@pytest.mark.parametrize("family", COUNTERS)
def test_smallest_uniforms_are_random_too(family: str) -> None:
    """They decide who wins: fair over ids, and uniform below the 2**-10 where they are looked at."""
    n = 2000
    seeds, positions = (make(n) for make in COUNTERS[family])
    u = uniforms(seeds, positions, range(n)).double().numpy()
    winners = u.argmin(-1)
    assert stats.chisquare(np.bincount(winners // 40, minlength=50)).pvalue > P_LIMIT
    assert stats.chisquare(np.bincount(winners % 16, minlength=16)).pvalue > P_LIMIT
    assert stats.kstest(u[u < 2**-10] * 2**10, "uniform").pvalue > P_LIMIT
    small = u < 2**-6
    together = int((small[:-1] & small[1:]).sum())
    assert stats.binomtest(together, small[1:].size, 2.0**-12).pvalue > P_LIMIT


def test_flipping_any_input_bit_flips_half_of_the_output_bits() -> None:
    rng = np.random.default_rng(0)
    seeds = torch.as_tensor(rng.integers(-(2**63), 2**63 - 1, 300))
    positions = torch.as_tensor(rng.integers(0, 2**15, 300))
    ids = torch.as_tensor(rng.integers(0, 2**17, 100), dtype=torch.int32)

    def top_bits(seed: Tensor, position: Tensor, token: Tensor) -> Tensor:
        u = sampler.uniform(sampler.row_keys(seed, position), sampler.lowbias32(token))
        return (u.double() * 2**20).long()

    base = top_bits(seeds, positions, ids)
    changed = [top_bits(seeds ^ torch.tensor(1 << b if b < 63 else -(2**63)), positions, ids) for b in range(64)]
    changed += [top_bits(seeds, positions ^ (1 << b), ids) for b in range(15)]
    changed += [top_bits(seeds, positions, ids ^ (1 << b)) for b in range(17)]
    for other in changed:
        flipped = [((base ^ other) >> bit & 1).double().mean() for bit in range(20)]
        assert np.abs(np.array(flipped) - 0.5).max() < 0.02  # 0.5 / sqrt(30,000) = 0.003


# --- logprobs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 5])
def test_logprobs_are_those_of_the_raw_logits(k: int) -> None:
    logits = random_logits(9, 200, seed=10)
    tokens = torch.arange(9) * 20
    chosen, rank, ids, top = gather_logprobs(logits, tokens, k)
    expected = logits.double().log_softmax(-1)
    assert torch.allclose(chosen.double(), expected[torch.arange(9), tokens], atol=1e-5)
    order = expected.argsort(-1, descending=True)
    assert rank.tolist() == [1 + int((order[i] == tokens[i]).nonzero()) for i in range(9)]
    assert torch.equal(ids, order[:, :k])
    assert torch.allclose(top.double(), expected.gather(-1, ids), atol=1e-5)
    assert (chosen.dtype, rank.dtype, ids.dtype, top.dtype) == (
        torch.float32,
        torch.int64,
        torch.int64,
        torch.float32,
    )


def test_rank_of_a_tied_id_counts_only_better_ones() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -INF]] * 3)
    _, rank, _, _ = gather_logprobs(logits, torch.tensor([2, 0, 3]), 2)
    assert rank.tolist() == [1, 3, 4]


# --- a real vocabulary -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95])
def test_size_of_the_nucleus_in_a_real_vocabulary(scale: float, top_p: float) -> None:
    """A flat distribution is where 150,000 small masses must add up."""
    logits = random_logits(1, QWEN3_VOCAB, seed=13, scale=scale)
    x = logits - logits.max()
    cut = sampler._cut_by_sorting(x.clone(), torch.tensor([-INF]), torch.tensor([top_p]))
    mass = np.cumsum(np.sort(x.double().softmax(-1)[0].numpy())[::-1])
    expected = int((mass < top_p).sum()) + 1
    assert abs(int((cut > -INF).sum()) - expected) <= 1
    assert torch.equal(cut[cut > -INF], x[x >= cut[cut > -INF].min()])


def test_vocabulary_of_qwen3() -> None:
    params = [*ALL_FILTERS, SamplingParams(temperature=0.6, top_p=0.95, top_k=20)]
    logits = random_logits(len(params), QWEN3_VOCAB, seed=12, scale=3.0)
    logits[:, 4321] = 60.0
    batch = SamplingBatch.from_params(params, range(len(params)), range(len(params)), "cpu")
    hot = params.index(SamplingParams(temperature=1000))
    tokens = sample(logits, batch).tolist()
    assert all(token == 4321 for row, token in enumerate(tokens) if row != hot)
    assert 0 <= tokens[hot] < QWEN3_VOCAB


def test_uniform_draws_cover_the_vocabulary_of_qwen3() -> None:
    n = 400
    batch = SamplingBatch.from_params([SamplingParams()] * n, [3] * n, range(n), "cpu")
    tokens = sample(torch.zeros(1, QWEN3_VOCAB).expand(n, -1), batch).double() / QWEN3_VOCAB
    assert stats.kstest(tokens.numpy(), "uniform").pvalue > P_LIMIT
