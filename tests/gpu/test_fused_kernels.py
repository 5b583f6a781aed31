"""The fused element-wise kernels on a real GPU: fresh random inputs, large pools, CUDA graphs, no late compiles.

Each result is compared twice. With float64: is it right? With the plain torch twin in the same dtype: does it
round in the same places, so that almost every element has the same bits?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference  # noqa: E402
from nanovllm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference  # noqa: E402
from nanovllm.kernels.silu_mul import silu_mul, silu_mul_reference  # noqa: E402
from tests.counters import compiles  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_inputs")

DEVICE = torch.device("cuda", 0)
EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # ‖error‖ / ‖exact‖
TOKENS = [1, 2, 7, 64, 257, 2048]
HEADS = [(16, 8, 128), (32, 8, 128), (40, 8, 128), (64, 8, 128), (32, 8, 64), (5, 1, 64), (4, 2, 16)]
BLOCK_SIZE, LAYERS, MAX_POSITION = 16, 3, 40_960
GIB = 1 << 30


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_close(got: Tensor, exact: Tensor) -> None:
    """Against a float64 result; NaN fails."""
    error, limit = float((got.double() - exact).norm() / exact.norm()), LIMITS[got.dtype]
    assert error <= limit, f"error {error:.2e} > {limit:.0e} in {got.dtype}"


def assert_rounds_alike(got: Tensor, reference: Tensor) -> None:
    """The same roundings in the same places: equal, but for float32's last bits (and what they tip over)."""
    assert got.dtype == reference.dtype and got.shape == reference.shape
    if got.dtype == torch.float32:
        error = float((got - reference).abs().max() / reference.abs().max())
        assert error <= 2e-6, f"float32 error {error:.2e}"
        return
    different = float((got != reference).float().mean())
    assert different <= 0.01, f"{different:.2%} of the elements differ in {got.dtype}"


@dataclass
class HeadInputs:
    """One step of one layer. The last `padding` rows share a slot of the null block, the pool's last."""

    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    cos_sin: Tensor
    positions: Tensor
    slot_mapping: Tensor
    padding: int

    @classmethod
    def random(
        cls, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, slots: Tensor, padding: int = 0
    ) -> HeadInputs:
        """`slots`: where to write; as many as `tokens`, all different in the rows that are not padding."""
        num_heads, kv_heads, head_dim = heads
        angles = torch.rand(MAX_POSITION, head_dim // 2, device=DEVICE, dtype=torch.float64) * 6.3
        return cls(
            qkv=randn(tokens, (num_heads + 2 * kv_heads) * head_dim, dtype=dtype, scale=3.0),
            q_weight=torch.rand(head_dim, device=DEVICE).to(dtype) + 0.5,
            k_weight=torch.rand(head_dim, device=DEVICE).to(dtype) + 0.5,
            cos_sin=torch.cat([angles.cos(), angles.sin()], dim=-1).float() * 1.2,  # as YaRN would scale it
            positions=torch.randint(MAX_POSITION, (tokens,), device=DEVICE),
            slot_mapping=slots,
            padding=padding,
        )

    def run(self, function: Callable[..., Tensor], pages: Tensor, layer: int = 1, **kwargs: Any) -> Tensor:
        """`function` on one layer of `pages`, in float64 if they are."""
        floats = [t.to(pages.dtype) for t in (self.qkv, self.q_weight, self.k_weight)]
        views = pages[:, layer, 0], pages[:, layer, 1]
        return function(*floats, self.cos_sin, self.positions, *views, self.slot_mapping, EPS, **kwargs)

    def real_slots(self) -> tuple[Tensor, Tensor]:
        slots = self.slot_mapping[: len(self.slot_mapping) - self.padding]
        return slots // BLOCK_SIZE, slots % BLOCK_SIZE


def small_pool(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    blocks = -(-tokens // BLOCK_SIZE) + 2
    return randn(blocks, LAYERS, 2, BLOCK_SIZE, heads[1], heads[2], dtype=dtype)


def random_slots(tokens: int, pages: Tensor, padding: int) -> Tensor:
    """Distinct slots anywhere but in the last block; padding rows share one slot there."""
    slots = torch.randperm((len(pages) - 1) * BLOCK_SIZE, device=DEVICE)[:tokens]
    slots[tokens - padding :] = (len(pages) - 1) * BLOCK_SIZE
    return slots


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_store(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    for tokens in TOKENS:
        pages = small_pool(tokens, heads, dtype)
        padding = tokens // 3
        inputs = HeadInputs.random(tokens, heads, dtype, random_slots(tokens, pages, padding), padding)
        exact_pages, twin_pages, before = pages.double(), pages.clone(), pages.clone()
        out = poisoned(tokens, *heads[::2], dtype=dtype)
        assert inputs.run(qk_norm_rope_store, pages, out=out) is out
        assert_close(out, inputs.run(qk_norm_rope_store_reference, exact_pages))
        assert_rounds_alike(out, inputs.run(qk_norm_rope_store_reference, twin_pages))
        block, offset = inputs.real_slots()
        stored, exact, twin = (p[block, 1, :, offset] for p in (pages, exact_pages, twin_pages))
        assert_close(stored[:, 0], exact[:, 0])
        assert_rounds_alike(stored[:, 0], twin[:, 0])
        assert torch.equal(stored[:, 1], twin[:, 1]), "values are copied bit for bit"
        pages[block, 1, :, offset] = before[block, 1, :, offset]
        assert torch.equal(pages[:-1], before[:-1]), "something else was written"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_store_at_the_top_of_a_large_pool(dtype: torch.dtype) -> None:
    """Qwen3-8B's blocks in 100 GB, or in what is free: 32-bit element offsets would wrap several times."""
    heads, layers = (32, 8, 128), 36
    block_bytes = layers * 2 * BLOCK_SIZE * heads[1] * heads[2] * dtype.itemsize
    torch.cuda.empty_cache()
    pool_bytes = min(100 * 10**9, torch.cuda.mem_get_info(DEVICE)[0] - 4 * GIB)
    if pool_bytes < (1 << 32) * dtype.itemsize:
        pytest.skip(f"{pool_bytes / GIB:.0f} GiB are free: too few for offsets beyond 32 bits")
    blocks, layer, tokens, top = pool_bytes // block_bytes, layers - 1, 64, 8
    pages = torch.empty(blocks, layers, 2, BLOCK_SIZE, *heads[1:], dtype=dtype, device=DEVICE)
    pages[-top:] = randn(top, *pages.shape[1:], dtype=dtype)
    twin_pages = pages[-top:].clone()
    slots = torch.randperm(top * BLOCK_SIZE, device=DEVICE)[:tokens]
    inputs = HeadInputs.random(tokens, heads, dtype, slots)
    q = inputs.run(qk_norm_rope_store_reference, twin_pages, layer)
    inputs.slot_mapping = slots + (blocks - top) * BLOCK_SIZE
    assert_rounds_alike(inputs.run(qk_norm_rope_store, pages, layer), q)
    assert_rounds_alike(pages[-top:, layer], twin_pages[:, layer])
    assert torch.equal(pages[-top:, :layer], twin_pages[:, :layer]), "another layer was written"


@pytest.mark.parametrize("size", [48, 1024, 2560, 4096, 5120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype, size: int) -> None:
    for tokens in TOKENS:
        x, weight = randn(tokens, size, dtype=dtype), torch.rand(size, device=DEVICE).to(dtype) + 0.5
        for residual in (None, randn(tokens, size, dtype=dtype, scale=20.0)):
            normed, summed = add_rms_norm_reference(x, residual, weight, EPS)
            out = poisoned(tokens, size, dtype=dtype)
            got = add_rms_norm(x, None if residual is None else residual.clone(), weight, EPS, out=out)
            assert torch.equal(got[1], summed), "one addition, rounded once"
            assert_rounds_alike(out, normed)
            assert_close(out, add_rms_norm_reference(summed.double(), None, weight.double(), EPS)[0])


def test_add_rms_norm_in_place_and_out_of_place() -> None:
    x, residual = randn(300, 4096, dtype=torch.bfloat16), randn(300, 4096, dtype=torch.bfloat16)
    weight, kept = randn(4096, dtype=torch.bfloat16), residual.clone()
    normed, summed = add_rms_norm_reference(x, residual, weight, EPS)
    buffer = poisoned(300, 4096, dtype=torch.bfloat16)
    got = add_rms_norm(x, residual, weight, EPS, residual_out=buffer)
    assert torch.equal(residual, kept) and torch.equal(buffer, summed)
    assert_rounds_alike(got[0], normed)
    got = add_rms_norm(x, residual, weight, EPS, out=x)
    assert got[0] is x and got[1] is residual and torch.equal(residual, summed)
    assert_rounds_alike(x, normed)


@pytest.mark.parametrize("intermediate", [80, 3072, 9728, 12288, 25600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype: torch.dtype, intermediate: int) -> None:
    for tokens in TOKENS:
        gate_up = randn(tokens, 2 * intermediate, dtype=dtype, scale=4.0)
        out = poisoned(tokens, intermediate, dtype=dtype)
        assert silu_mul(gate_up, out=out) is out
        assert_close(out, silu_mul_reference(gate_up.double()))
        assert_rounds_alike(out, silu_mul_reference(gate_up))


@dataclass
class Layer:
    """Static buffers of the three kernels at one batch size, as a captured graph has them."""

    heads: HeadInputs
    pages: Tensor
    x: Tensor
    residual: Tensor
    weight: Tensor
    gate_up: Tensor

    @classmethod
    def random(cls, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Layer:
        shape = (16, 8, 128)
        pages = small_pool(tokens, shape, dtype)
        heads = HeadInputs.random(tokens, shape, dtype, random_slots(tokens, pages, 0))
        x, residual = randn(tokens, 1024, dtype=dtype), randn(tokens, 1024, dtype=dtype)
        weight, gate_up = randn(1024, dtype=dtype), randn(tokens, 2 * 3072, dtype=dtype)
        return cls(heads, pages, x, residual, weight, gate_up)

    def tensors(self) -> list[Tensor]:
        heads = [self.heads.qkv, self.heads.positions, self.heads.slot_mapping]
        return [*heads, self.pages, self.x, self.residual, self.gate_up]

    def fill_from(self, other: Layer) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def drop_first_row(self) -> None:
        heads = self.heads
        heads.qkv, heads.positions, heads.slot_mapping = heads.qkv[1:], heads.positions[1:], heads.slot_mapping[1:]
        self.x, self.residual, self.gate_up = self.x[1:], self.residual[1:], self.gate_up[1:]

    def run(self) -> tuple[Tensor, ...]:
        q = self.heads.run(qk_norm_rope_store, self.pages)
        normed, summed = add_rms_norm(self.x, self.residual, self.weight, EPS)
        return q, normed, summed, silu_mul(self.gate_up)

    def run_twin(self) -> tuple[Tensor, ...]:
        q = self.heads.run(qk_norm_rope_store_reference, self.pages)
        normed, summed = add_rms_norm_reference(self.x, self.residual, self.weight, EPS)
        return q, normed, summed, silu_mul_reference(self.gate_up)

    def stored(self) -> Tensor:
        block, offset = self.heads.real_slots()
        return self.pages[block, 1, :, offset]


@pytest.mark.parametrize("tokens", [1, 8, 130])
def test_graph_replays_on_new_inputs(tokens: int) -> None:
    static = Layer.random(tokens)
    static.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = static.run()
    for _ in range(3):
        fresh = Layer.random(tokens)
        fresh.heads.cos_sin, fresh.weight = static.heads.cos_sin, static.weight
        fresh.heads.q_weight, fresh.heads.k_weight = static.heads.q_weight, static.heads.k_weight
        static.fill_from(fresh)
        graph.replay()
        for got, want in zip(results, fresh.run_twin(), strict=True):
            assert_rounds_alike(got, want)
        assert_rounds_alike(static.stored(), fresh.stored())


def test_nothing_is_compiled_after_the_first_batch() -> None:
    """Whatever the batch size, and wherever a micro-batch's rows begin in a buffer."""
    Layer.random(5).run()
    with compiles() as late:
        for tokens in (1, 2, 16, 17, 100, 512, 4099):
            layer = Layer.random(tokens + 1)
            layer.run()
            layer.drop_first_row()
            layer.run()
    assert late == []
    with compiles() as noticed:
        add_rms_norm(randn(2, 96, dtype=torch.float16), None, randn(96, dtype=torch.float16), EPS)
    assert noticed, "the hook above must see a compile when there is one"


def test_no_launch_waits_for_the_card() -> None:
    layer = Layer.random(64)
    layer.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_tensors_card_whatever_card_is_current() -> None:
    layer = Layer.random(9)
    twin = layer.run_twin()
    with torch.cuda.device(1):
        got = layer.run()
    torch.cuda.synchronize(DEVICE)
    assert all(t.device == DEVICE for t in got)
    for tensor, want in zip(got, twin, strict=True):
        assert_rounds_alike(tensor, want)
