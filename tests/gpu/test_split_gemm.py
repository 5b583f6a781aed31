"""The products of 2 to 128 rows on a real GPU: every real shape, their readers, captured chains, no late compiles.

Weights are made, and the card is idle, before any product is queued: they are read ahead of the wait for the
kernels queued before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

from nanovllm.kernels.launch import has_pdl  # noqa: E402
from nanovllm.kernels.partial_sums import add_partial_sums  # noqa: E402
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference  # noqa: E402
from nanovllm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference  # noqa: E402
from nanovllm.kernels.silu_mul import silu_mul, silu_mul_reference  # noqa: E402
from nanovllm.kernels.split_gemm import (  # noqa: E402
    SplitTiles,
    split_gate_up,
    split_gate_up_reference,
    split_linear,
    split_linear_reference,
)
from tests.counters import compiles  # noqa: E402

DEVICE, DTYPE = torch.device("cuda", 0), torch.bfloat16
EPS, HEAD_DIM, KV_HEADS, PAGE = 1e-6, 128, 8, 64
ROWS = (2, 5, 8, 9, 16, 17, 33, 64, 65, 100, 128)
ROUNDED, SUMMED = 6e-3, 1e-4  # ‖error‖ / ‖exact‖ of a row: in bfloat16, and of float32 sums


class Width(NamedTuple):
    hidden: int
    query: int
    intermediate: int

    @property
    def qkv(self) -> int:
        return self.query + 2 * KV_HEADS * HEAD_DIM


WIDTHS = {
    "0.6B": Width(1024, 2048, 3072),
    "1.7B": Width(2048, 2048, 6144),
    "4B": Width(2560, 4096, 9728),
    "8B": Width(4096, 4096, 12288),
    "14B": Width(5120, 5120, 17408),
}


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    torch.manual_seed(torch.seed() % (1 << 31))
    print("seed", torch.initial_seed())  # pytest shows it with a failure
    yield
    torch.cuda.empty_cache()


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, device=DEVICE, dtype=dtype).normal_(std=scale)


def poisoned(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_close(got: Tensor, exact: Tensor, limit: float) -> None:
    """Row by row against a float64 result, and no element far out; NaN fails."""
    error = got.double() - exact
    worst = float((error.norm(dim=1) / exact.norm(dim=1)).max())
    assert worst <= limit, f"error {worst:.2e} > {limit:.0e}"
    largest = float((error.abs().amax(1) / exact.abs().amax(1)).max())
    assert largest <= 5 * limit, f"an error of {largest:.2e} of the largest element"


def assert_product(got: Tensor, exact: Tensor) -> None:
    """Whole, or partial sums: these are not rounded, nor is their total."""
    assert_close(got if got.dim() == 2 else got.double().sum(0), exact, ROUNDED if got.dim() == 2 else SUMMED)


def assert_rounds_alike(got: Tensor, reference: Tensor) -> None:
    """The same roundings in the same places: equal, but for what sums' last bits tip over."""
    assert got.dtype == reference.dtype and got.shape == reference.shape
    different = float((got != reference).float().mean())
    assert different <= 0.02, f"{different:.1%} of the elements differ"
    error = float((got.double() - reference.double()).norm() / reference.double().norm())
    assert error <= 2e-3, f"error {error:.2e}"


# -- every product


@pytest.mark.parametrize("model", WIDTHS)
def test_products_of_every_shape(model: str) -> None:
    hidden, query, intermediate = WIDTHS[model]
    for N, K, gated in [
        (WIDTHS[model].qkv, hidden, False),
        (hidden, query, False),
        (2 * intermediate, hidden, True),
        (hidden, intermediate, False),
    ]:
        weight = randn(N, K, scale=(2 if gated else 1) * K**-0.5)
        torch.cuda.synchronize(DEVICE)
        wide = weight.double().T
        for M in ROWS:
            x = randn(M, K)
            exact, product = x.double() @ wide, split_linear(x, weight)
            assert_product(product, exact)
            assert torch.equal(split_linear(x, weight), product), "the same bits each time"
            if gated:
                act = split_gate_up(x, weight)
                assert_close(act, silu_mul_reference(exact), 2 * ROUNDED)
                assert_rounds_alike(act, split_gate_up_reference(x, weight))
        del weight, wide


TILES = [SplitTiles(64, 64, 1, 3), SplitTiles(64, 128, 3, 4), SplitTiles(128, 64, 2, 4), SplitTiles(256, 64, 5, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiles", TILES)
def test_tiles_that_divide_nothing(tiles: SplitTiles, dtype: torch.dtype) -> None:
    """Neither N nor K; what lies around the result stays as it is."""
    N, K = 1008, 1072
    weight = randn(N, K, scale=K**-0.5, dtype=dtype)
    torch.cuda.synchronize(DEVICE)
    for M in (9, 40, 128):
        x = randn(M, K, dtype=dtype)
        shape = (M, N) if tiles.splits == 1 else (tiles.splits, M, N)
        buffer = poisoned(tiles.splits * M * N + 4096, dtype=dtype if tiles.splits == 1 else torch.float32)
        out = buffer[:-4096].view(shape)
        split_linear(x, weight, tiles=tiles, out=out)
        assert_product(out, x.double() @ weight.double().T)
        assert buffer[-4096:].isnan().all()
        act = split_gate_up(x, weight, tiles=tiles)
        assert_close(act, silu_mul_reference(x.double() @ weight.double().T), 2 * ROUNDED)


def test_float32_products() -> None:
    """No model here is float32 on a GPU; the kernel takes it all the same."""
    x, weight = randn(20, 1024, dtype=torch.float32), randn(512, 1024, scale=1 / 32, dtype=torch.float32)
    torch.cuda.synchronize(DEVICE)
    product = split_linear(x, weight)
    assert_close(add_partial_sums(product, torch.float32), x.double() @ weight.double().T, SUMMED)


@pytest.mark.parametrize("M", ROWS)
def test_rows_do_not_see_each_other(M: int) -> None:
    weights = [randn(4096, 1024, scale=1 / 32), randn(1024, 3072, scale=1 / 55), randn(6144, 1024, scale=1 / 32)]
    torch.cuda.synchronize(DEVICE)
    for weight in weights:
        x = randn(M, weight.shape[1])
        others = poisoned(*x.shape)
        others[M // 2] = x[M // 2]
        for run in (split_linear, split_gate_up):
            got, want = run(others, weight), run(x, weight)
            assert torch.equal(got[..., M // 2, :], want[..., M // 2, :])


# -- partial sums and who reads them


@pytest.mark.parametrize("splits", [2, 4, 8])
def test_readers_of_partial_sums(splits: int) -> None:
    """Against the same kernels' plain twins, of the total rounded once."""
    M, width = 33, WIDTHS["0.6B"]
    pieces, residual, weight = randn(splits, M, 1024, dtype=torch.float32), randn(M, 1024), randn(1024)
    want = add_rms_norm_reference(add_partial_sums(pieces, DTYPE), residual, weight, EPS)
    got = add_rms_norm(pieces, residual, weight, EPS)
    assert got[1] is residual and torch.equal(got[1], want[1]), "sums in order, rounded twice"
    assert_rounds_alike(got[0], want[0])

    pieces, out = randn(splits, M, 6144, dtype=torch.float32), poisoned(M, 3072)
    assert_rounds_alike(silu_mul(pieces, out=out), silu_mul_reference(add_partial_sums(pieces, DTYPE)))

    pieces, heads = randn(splits, M, width.qkv, dtype=torch.float32), Heads(M)
    q = heads.run(qk_norm_rope_store, pieces)
    k_and_v = heads.pages.clone()
    assert_rounds_alike(q, heads.run(qk_norm_rope_store_reference, add_partial_sums(pieces, DTYPE)))
    assert_rounds_alike(k_and_v, heads.pages)
    assert torch.equal(k_and_v[:, 1], heads.pages[:, 1]), "values are added and rounded, no more"


class Heads:
    """What lies between a QKV projection of M tokens and attention."""

    def __init__(self, M: int) -> None:
        self.norms = randn(2, HEAD_DIM).abs_().add_(0.5)
        self.cos_sin = randn(M, HEAD_DIM, dtype=torch.float32).clamp_(-1, 1)
        self.positions = torch.arange(M, device=DEVICE)
        self.pages = torch.zeros(-(-M // PAGE), 2, PAGE, KV_HEADS, HEAD_DIM, dtype=DTYPE, device=DEVICE)

    def run(self, function: Callable[..., Tensor], qkv: Tensor) -> Tensor:
        views = self.pages[:, 0], self.pages[:, 1]
        return function(qkv, *self.norms, self.cos_sin, self.positions, *views, self.positions, EPS)


# -- a layer, but for its attention


class Layer:
    def __init__(self, width: Width) -> None:
        hidden, query, intermediate = width
        self.norms = randn(2, hidden).abs_().add_(0.5)
        self.qkv, self.o = randn(width.qkv, hidden, scale=hidden**-0.5), randn(hidden, query, scale=query**-0.5)
        self.gate_up = randn(2 * intermediate, hidden, scale=2 * hidden**-0.5)
        self.down = randn(hidden, intermediate, scale=intermediate**-0.5)


class Chain:
    """Some layers in a row, in tensors made on the way, as a step makes them."""

    def __init__(self, width: Width, M: int, num_layers: int = 4) -> None:
        self.layers = [Layer(width) for _ in range(num_layers)]
        self.heads, self.norm = Heads(M), randn(width.hidden)
        self.x, self.stream = randn(M, width.hidden), randn(M, width.hidden)
        torch.cuda.synchronize(DEVICE)

    def run(self, pdl: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(the final norm's output, the stream, the pages)."""
        hidden, stream = self.x, self.stream.clone()
        for layer in self.layers:
            normed, stream = add_rms_norm(hidden, stream, layer.norms[0], EPS)
            q = self.heads.run(qk_norm_rope_store, split_linear(normed, layer.qkv, pdl=pdl))
            hidden = split_linear(q.flatten(1), layer.o, pdl=pdl)
            normed, stream = add_rms_norm(hidden, stream, layer.norms[1], EPS)
            hidden = split_linear(split_gate_up(normed, layer.gate_up, pdl=pdl), layer.down, pdl=pdl)
        return *add_rms_norm(hidden, stream, self.norm, EPS), self.heads.pages.clone()

    def run_twin(self) -> tuple[Tensor, Tensor, Tensor]:
        hidden, stream = self.x, self.stream
        for layer in self.layers:
            normed, stream = add_rms_norm_reference(hidden, stream, layer.norms[0], EPS)
            q = self.heads.run(qk_norm_rope_store_reference, split_linear_reference(normed, layer.qkv))
            hidden = split_linear_reference(q.flatten(1), layer.o)
            normed, stream = add_rms_norm_reference(hidden, stream, layer.norms[1], EPS)
            hidden = split_linear_reference(split_gate_up_reference(normed, layer.gate_up), layer.down)
        return *add_rms_norm_reference(hidden, stream, self.norm, EPS), self.heads.pages.clone()

    def set_inputs(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.x.normal_()
        self.stream.normal_()


@pytest.mark.parametrize("model", ["0.6B", "8B"])
@pytest.mark.parametrize("M", [9, 64, 100])
def test_chains_are_as_their_twins(model: str, M: int) -> None:
    chain = Chain(WIDTHS[model], M)
    for got, want in zip(chain.run(pdl=has_pdl(DEVICE)), chain.run_twin(), strict=True):
        error = float((got.double() - want.double()).norm() / want.double().norm())
        assert error <= 2e-2, f"error {error:.1e}"  # what rounds otherwise in one layer changes those behind it


@pytest.mark.parametrize("model", ["0.6B", "8B"])
@pytest.mark.parametrize("M", [16, 64, 128])
def test_captured_chains_replay_on_new_inputs(model: str, M: int) -> None:
    """Bit for bit what products launched as usual give, one by one; back to back, so that early launches do overlap."""
    chain = Chain(WIDTHS[model], M)
    expected = []
    for seed in range(4):
        chain.set_inputs(seed)
        expected.append(chain.run(pdl=False))
    chain.run(pdl=has_pdl(DEVICE))  # compiles
    torch.cuda.synchronize(DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain.run(pdl=has_pdl(DEVICE))
    for seed in list(range(4)) * 5:
        chain.set_inputs(seed)
        graph.replay()
        for got, want in zip(results, expected[seed], strict=True):
            assert not got.isnan().any() and torch.equal(got, want), f"inputs {seed}"


def test_nothing_is_compiled_after_one_batch_of_each_row_limit() -> None:
    layer = Layer(WIDTHS["0.6B"])
    torch.cuda.synchronize(DEVICE)

    def run(M: int) -> None:
        normed, stream = add_rms_norm(split_linear(randn(M, 2048), layer.o), randn(M, 1024), layer.norms[0], EPS)
        Heads(M).run(qk_norm_rope_store, split_linear(normed, layer.qkv))
        add_rms_norm(split_linear(split_gate_up(normed, layer.gate_up), layer.down), stream, layer.norms[1], EPS)

    for M in (16, 32, 64, 96, 128):
        run(M)
    with compiles() as late:
        for M in (2, 3, 8, 9, 10, 15, 17, 24, 31, 33, 48, 63, 65, 80, 95, 97, 112, 127):
            run(M)
    assert late == []
    with compiles() as noticed:
        split_linear(randn(9, 96, dtype=torch.float16), randn(32, 96, dtype=torch.float16))
    assert noticed, "the hook above must see a compile when there is one"


def test_no_launch_waits_for_the_card() -> None:
    chain = Chain(WIDTHS["0.6B"], 24, num_layers=1)
    chain.run(pdl=has_pdl(DEVICE))
    torch.cuda.set_sync_debug_mode("error")
    try:
        chain.run(pdl=has_pdl(DEVICE))
    finally:
        torch.cuda.set_sync_debug_mode("default")
