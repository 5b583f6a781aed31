"""The skinny products on a real GPU: every real shape and batch, early launches, captured chains, no late compiles.

Weights are made, and the card is idle, before any product is queued: they are read ahead of the wait for the
kernels queued before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

from nanovllm.kernels.launch import has_pdl  # noqa: E402
from nanovllm.kernels.rms_norm import add_rms_norm_reference  # noqa: E402
from nanovllm.kernels.silu_mul import silu_mul_reference  # noqa: E402
from nanovllm.kernels.skinny_gemm import (  # noqa: E402
    SkinnyTiles,
    norm_gate_up,
    norm_linear,
    skinny_linear,
)
from tests.counters import compiles  # noqa: E402

DEVICE = torch.device("cuda", 0)
EPS = 1e-6
ALL_ROWS = range(1, 9)
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # ‖error‖ / ‖exact‖ of a row
MOST = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # the largest error, of the largest element
MODELS = [("0.6B", torch.bfloat16), ("8B", torch.bfloat16), ("8B", torch.float16), ("0.6B", torch.float32)]


class Width(NamedTuple):
    hidden: int
    query: int
    qkv: int
    intermediate: int


WIDTHS = {"0.6B": Width(1024, 2048, 4096, 3072), "8B": Width(4096, 4096, 6144, 12288)}
VOCABULARY = 151_936


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    torch.manual_seed(torch.seed() % (1 << 31))
    print("seed", torch.initial_seed())  # pytest shows it with a failure
    yield
    torch.cuda.empty_cache()


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, device=DEVICE, dtype=dtype).normal_(std=scale)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_close(got: Tensor, exact: Tensor) -> None:
    """Against a float64 result, row by row, and no element far out; NaN fails."""
    error = got.double() - exact
    worst = float((error.norm(dim=1) / exact.norm(dim=1)).max())
    assert worst <= LIMITS[got.dtype], f"error {worst:.2e} > {LIMITS[got.dtype]:.0e} in {got.dtype}"
    largest = float((error.abs().amax(1) / exact.abs().amax(1)).max())
    assert largest <= MOST[got.dtype], f"an error of {largest:.2e} of the largest element, in {got.dtype}"


def assert_rounds_alike(got: Tensor, reference: Tensor, sums: int = 1) -> None:
    """The same roundings in the same places: equal, but for what the sums' last bits tip over.

    Tensor cores cut what float32 rounds: of sums of 12,288 terms, 6.5 % came out one step of bfloat16 apart, and 19 %
    one step of float16. An element that is made of several sums tips over with any of them.
    """
    assert got.dtype == reference.dtype and got.shape == reference.shape
    if got.dtype != torch.float32:
        different = float((got != reference).float().mean())
        limit = sums * (0.1 if got.dtype == torch.bfloat16 else 0.3)
        assert different <= limit, f"{different:.1%} of the elements differ in {got.dtype}"


class Layer:
    """Weights of one layer, and its four products in a row, each into a buffer of its own."""

    def __init__(self, width: Width, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        hidden, query, qkv, intermediate = width
        self.qkv = randn(qkv, hidden, dtype=dtype, scale=hidden**-0.5)
        self.o = randn(hidden, query, dtype=dtype, scale=query**-0.5)
        self.gate_up = randn(2 * intermediate, hidden, dtype=dtype, scale=2 * hidden**-0.5)
        self.down = randn(hidden, intermediate, dtype=dtype, scale=intermediate**-0.5)
        self.norms = randn(2, hidden, dtype=dtype).abs_().add_(0.5)
        torch.cuda.synchronize(DEVICE)

    def run(self, x: Tensor, residual: Tensor | None, pdl: bool | None = None) -> tuple[Tensor, ...]:
        """qkv, o's output, act, down's output, the stream before it. Attention passes the first query columns on."""
        qkv, residual = norm_linear(x, residual, self.norms[0], EPS, self.qkv, pdl=pdl)
        attended = qkv[:, : self.width.query].contiguous()  # torch's own kernel, between ours
        y = skinny_linear(attended, self.o, pdl=pdl)
        act, residual = norm_gate_up(y, residual, self.norms[1], EPS, self.gate_up, pdl=pdl)
        return qkv, y, act, skinny_linear(act, self.down, pdl=pdl), residual


@pytest.mark.parametrize(("model", "dtype"), MODELS)
def test_products_of_every_shape_and_batch(model: str, dtype: torch.dtype) -> None:
    """Each against float64, from the input that it really had, so that errors do not add up."""
    width, layer = WIDTHS[model], Layer(WIDTHS[model], dtype)
    wide = [weight.double().T for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    for M in ALL_ROWS if dtype == torch.bfloat16 else (1, 5):
        x, stream = randn(M, width.hidden, dtype=dtype), randn(M, width.hidden, dtype=dtype, scale=8.0)
        for residual in (stream, None):
            kept = x.clone(), stream.clone()
            qkv, y, act, down, summed = layer.run(x, residual)
            assert torch.equal(x, kept[0]) and torch.equal(stream, kept[1]), "inputs are left alone"
            normed, first = add_rms_norm_reference(x, residual, layer.norms[0], EPS)
            assert_close(qkv, normed.double() @ wide[0])
            assert_rounds_alike(qkv, (normed.double() @ wide[0]).to(dtype))
            assert_close(y, qkv[:, : width.query].double() @ wide[1])
            normed, second = add_rms_norm_reference(y, first, layer.norms[1], EPS)
            assert torch.equal(summed, second), "one addition, rounded once"
            products = normed.double() @ wide[2]
            assert_close(act, silu_mul_reference(products))
            assert_rounds_alike(act, silu_mul_reference(products.to(dtype)), sums=2)
            assert_close(down, act.double() @ wide[3])


@pytest.mark.parametrize("M", [1, 8])
def test_logits(M: int) -> None:
    """The widest product, with the final norm and written in float32."""
    dtype = torch.bfloat16
    weight, norm_weight = randn(VOCABULARY, 1024, dtype=dtype), torch.ones(1024, dtype=dtype, device=DEVICE)
    x, residual = randn(M, 1024, dtype=dtype), randn(M, 1024, dtype=dtype)
    torch.cuda.synchronize(DEVICE)
    logits = poisoned(M, VOCABULARY, dtype=torch.float32)
    norm_linear(x, residual, norm_weight, EPS, weight, out=logits)
    normed, _ = add_rms_norm_reference(x, residual, norm_weight, EPS)
    exact = normed.double() @ weight.double().T
    error = float((logits.double() - exact).norm() / exact.norm())
    assert error <= 1e-3, f"error {error:.1e}"  # float32 sums; the norm may round a few elements the other way


TILES = [
    (1, SkinnyTiles(4, 512, 4)),
    (1, SkinnyTiles(8, 512, 4, num_stages=3)),
    (1, SkinnyTiles(16, 256, 4, split_k=4, dot=True)),
    (1, SkinnyTiles(16, 64, 4, num_stages=4, split_k=4, dot=True)),
    (3, SkinnyTiles(8, 128, 8, split_k=8, dot=True)),
    (7, SkinnyTiles(64, 64, 8, num_stages=3, split_k=2, dot=True)),
    (8, SkinnyTiles(32, 128, 4, num_stages=2, split_k=1, dot=True)),
]


@pytest.mark.parametrize(("M", "tiles"), TILES)
def test_other_tiles(M: int, tiles: SkinnyTiles) -> None:
    """Of sizes that divide neither N nor K."""
    N, K, dtype = 1000, 1072, torch.bfloat16
    weight, norm_weight = randn(N, K, dtype=dtype, scale=K**-0.5), randn(K, dtype=dtype)
    x, residual = randn(M, K, dtype=dtype), randn(M, K, dtype=dtype)
    torch.cuda.synchronize(DEVICE)
    exact = add_rms_norm_reference(x, residual, norm_weight, EPS)[0].double() @ weight.double().T
    assert_close(skinny_linear(x, weight, tiles=tiles), x.double() @ weight.double().T)
    assert_close(norm_linear(x, residual, norm_weight, EPS, weight, tiles=tiles)[0], exact)
    act = norm_gate_up(x, residual, norm_weight, EPS, weight, tiles=tiles)[0]
    assert_close(act, silu_mul_reference(exact))


@pytest.mark.parametrize("model", WIDTHS)
@pytest.mark.parametrize("M", [1, 4, 8])
def test_same_bits_with_and_without_early_launch(model: str, M: int) -> None:
    """And each time; back to back, so that early launches do overlap."""
    width, layer = WIDTHS[model], Layer(WIDTHS[model], torch.bfloat16)
    x, residual = randn(M, width.hidden, dtype=torch.bfloat16), randn(M, width.hidden, dtype=torch.bfloat16)
    expected = layer.run(x, residual, pdl=False)
    for results in [layer.run(x, residual, pdl=has_pdl(DEVICE)) for _ in range(20)]:
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


class Chain:
    """Some layers over three buffers that every layer writes again: each write must wait for its last reader."""

    def __init__(self, width: Width, M: int, num_layers: int = 6) -> None:
        self.layers = [Layer(width, torch.bfloat16) for _ in range(num_layers)]
        self.x, self.streams = (
            self.buffer(M, width.hidden),
            (self.buffer(M, width.hidden), self.buffer(M, width.hidden)),
        )
        self.qkv, self.y = self.buffer(M, width.qkv), self.buffer(M, width.hidden)
        self.act, self.attended = self.buffer(M, width.intermediate), self.buffer(M, width.query)

    def buffer(self, *shape: int) -> Tensor:
        return poisoned(*shape, dtype=torch.bfloat16)

    def run(self, pdl: bool) -> None:
        """Ours alone, end to end: every kernel may start while the one before it runs."""
        first, second = self.streams
        for layer in self.layers:
            norm_linear(self.x, first, layer.norms[0], EPS, layer.qkv, out=self.qkv, residual_out=second, pdl=pdl)
            skinny_linear(self.attended, layer.o, out=self.y, pdl=pdl)
            norm_gate_up(self.y, second, layer.norms[1], EPS, layer.gate_up, out=self.act, residual_out=first, pdl=pdl)
            skinny_linear(self.act, layer.down, out=self.x, pdl=pdl)

    def results(self) -> list[Tensor]:
        return [t.clone() for t in (self.x, *self.streams, self.qkv, self.y, self.act)]

    def set_inputs(self, seed: int) -> None:
        torch.manual_seed(seed)
        for tensor in (self.x, *self.streams, self.attended):
            tensor.normal_()


@pytest.mark.parametrize("model", WIDTHS)
@pytest.mark.parametrize("M", [1, 8])
def test_captured_chains_replay_on_new_inputs(model: str, M: int) -> None:
    chain = Chain(WIDTHS[model], M)
    expected = []
    for seed in range(8):
        chain.set_inputs(seed)
        chain.run(pdl=False)
        expected.append(chain.results())
    chain.run(pdl=has_pdl(DEVICE))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain.run(pdl=has_pdl(DEVICE))
    for seed in list(range(8)) * 3:
        chain.set_inputs(seed)
        graph.replay()
        for got, want in zip(chain.results(), expected[seed], strict=True):
            assert not got.isnan().any() and torch.equal(got, want), f"inputs {seed}"


def test_nothing_is_compiled_after_one_batch_of_each_power_of_two() -> None:
    layer = Layer(WIDTHS["0.6B"], torch.bfloat16)

    def run(M: int) -> None:
        layer.run(randn(M, 1024, dtype=torch.bfloat16), randn(M, 1024, dtype=torch.bfloat16))

    for M in (1, 2, 4, 8):
        run(M)
    with compiles() as late:
        for M in ALL_ROWS:
            run(M)
    assert late == []
    with compiles() as noticed:
        skinny_linear(randn(1, 96, dtype=torch.float16), randn(32, 96, dtype=torch.float16))
    assert noticed, "the hook above must see a compile when there is one"


def test_no_launch_waits_for_the_card() -> None:
    layer = Layer(WIDTHS["0.6B"], torch.bfloat16)
    x, residual = randn(2, 1024, dtype=torch.bfloat16), randn(2, 1024, dtype=torch.bfloat16)
    layer.run(x, residual)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run(x, residual)
    finally:
        torch.cuda.set_sync_debug_mode("default")
