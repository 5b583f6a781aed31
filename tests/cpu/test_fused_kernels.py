"""The fused element-wise kernels without a GPU: run by Triton's interpreter, and compiled for sm_80 and sm_90.

TRITON_INTERPRET must be set before triton is imported, so the interpreter's checks run in a second process:
this file as a program, which prints one JSON object: check → its traceback, or null.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

import triton.language as tl  # noqa: E402

from nanovllm.engine.kv_cache import KVCache  # noqa: E402
from nanovllm.kernels.partial_sums import add_partial_sums  # noqa: E402
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference  # noqa: E402
from nanovllm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference  # noqa: E402
from nanovllm.kernels.silu_mul import silu_mul, silu_mul_reference  # noqa: E402
from nanovllm.layers.norm import RMSNorm  # noqa: E402
from nanovllm.layers.rotary import RotaryEmbedding  # noqa: E402
from nanovllm.models.model_config import ModelConfig, YarnScaling  # noqa: E402
from tests.cpu.compile_check import CompileReport, assert_fits, compile_kernel, compile_launches  # noqa: E402
from tests.cpu.interpreted import results_of, run_checks  # noqa: E402

CPU = torch.device("cpu")
EPS = 1e-6
DTYPES = [torch.float32, torch.float16]  # the interpreter truncates to bfloat16, where a GPU rounds
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3}  # ‖error‖ / ‖exact‖
QWEN3 = {  # hidden, query heads, KV heads, head dim, intermediate
    "0.6B": (1024, 16, 8, 128, 3072),
    "8B": (4096, 32, 8, 128, 12288),
    "14B": (5120, 40, 8, 128, 17408),
    "head_dim_64": (2560, 32, 8, 64, 9728),
}
BLOCK_SIZE, LAYER = 4, 1


def tiny_config(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=EPS,
        rope_theta=10_000.0,
        rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=32),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        dtype="float32",
        eos_token_ids=(0,),
    )


@dataclasses.dataclass
class Step:
    """Random inputs of one attention layer: T tokens, two of them padding rows that share a null slot."""

    config: ModelConfig
    cache: KVCache
    rotary: RotaryEmbedding
    norms: tuple[RMSNorm, RMSNorm]
    qkv: Tensor
    positions: Tensor
    slot_mapping: Tensor

    @classmethod
    def random(cls, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, tokens: int = 4) -> Step:
        config = tiny_config(heads, kv_heads, head_dim)
        cache = KVCache(3, BLOCK_SIZE, config, dtype, CPU)
        cache.pages.normal_()
        norms = (RMSNorm(head_dim, EPS, dtype, CPU), RMSNorm(head_dim, EPS, dtype, CPU))
        for norm in norms:
            norm.weight.uniform_(0.3, 1.7)
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype) * 3
        slots = torch.randperm(3 * BLOCK_SIZE)[:tokens]
        slots[-2:] = 3 * BLOCK_SIZE + 1
        rotary = RotaryEmbedding(config, 128, CPU)
        return cls(config, cache, rotary, norms, qkv, torch.randint(128, (tokens,)), slots)

    def run(self, function: Callable[..., Tensor], pages: Tensor, **kwargs: Any) -> Tensor:
        """`function` on one layer of `pages`, float64 throughout if they are."""
        weights = [norm.weight.to(pages.dtype) for norm in self.norms]
        views = pages[:, LAYER, 0], pages[:, LAYER, 1]
        inputs = self.qkv.to(pages.dtype), *weights, self.rotary.cos_sin, self.positions
        return function(*inputs, *views, self.slot_mapping, EPS, **kwargs)

    def layers(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as the model's own layers compute them."""
        q, k, v = self.heads(self.qkv)
        return (*self.rotary(self.positions, self.norms[0](q), self.norms[1](k)), v)

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v in float64, the rotation as a product of complex numbers."""
        q, k, v = self.heads(self.qkv.double())
        cos, sin = self.rotary.cos_sin.double()[self.positions].unsqueeze(1).chunk(2, dim=-1)

        def turned(x: Tensor, norm: RMSNorm) -> Tensor:
            x = exact_rms_norm(x, norm.weight.double())
            x = torch.complex(*(half.contiguous() for half in x.chunk(2, dim=-1))) * torch.complex(cos, sin)
            return torch.cat([x.real, x.imag], dim=-1)

        return turned(q, self.norms[0]), turned(k, self.norms[1]), v

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        config = self.config
        sizes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        return qkv.unflatten(-1, (-1, config.head_dim)).split(sizes, dim=1)

    def stored(self, pages: Tensor) -> Tensor:
        """[tokens without padding, 2, K, D]: what the real tokens' slots hold."""
        slots = self.slot_mapping[:-2]
        return pages[slots // BLOCK_SIZE, LAYER, :, slots % BLOCK_SIZE]


def exact_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS) * weight


def assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Against a float64 result; NaN fails."""
    error = float((got.double() - exact).norm() / exact.norm())
    assert error <= LIMITS[dtype], f"error {error:.2e} > {LIMITS[dtype]:.0e} in {dtype}"


def assert_rounds_alike(got: Tensor, reference: Tensor) -> None:
    """The same roundings in the same places: equal, but for float32's last bits (and what they tip over)."""
    assert got.dtype == reference.dtype and got.shape == reference.shape
    if got.dtype == torch.float32:
        error = float((got - reference).abs().max() / reference.abs().max())
        assert error <= 1e-6, f"float32 error {error:.2e}"
        return
    different = float((got != reference).float().mean())
    assert different <= 0.01, f"{different:.1%} of the elements differ in {got.dtype}"


# -- Triton's interpreter: 12 … 20 ms a program, so everything is tiny


def interpreted_qk_matches_layers_and_float64() -> None:
    for heads, kv_heads, head_dim in [(4, 2, 16), (5, 1, 8), (6, 2, 64)]:
        for dtype in DTYPES:
            step = Step.random(heads, kv_heads, head_dim, dtype)
            before = step.cache.pages.clone()
            q = step.run(qk_norm_rope_store, step.cache.pages)
            kv = step.stored(step.cache.pages)
            for got, exact, layers in zip((q, *kv.unbind(1)), step.exact(), step.layers(), strict=True):
                rows = len(got)  # of k and v, the real tokens only: padding rows race
                assert_close(got, exact[:rows], dtype)
                assert_rounds_alike(got, layers[:rows])
            assert torch.equal(kv[:, 1], step.heads(step.qkv)[2][:-2]), "values are copied bit for bit"
            check_nothing_else_written(step, before)


def check_nothing_else_written(step: Step, before: Tensor) -> None:
    """Also no other layer, and of the null block one slot only."""
    slots = step.slot_mapping
    after = step.cache.pages.clone()
    after[slots // BLOCK_SIZE, LAYER, :, slots % BLOCK_SIZE] = before[slots // BLOCK_SIZE, LAYER, :, slots % BLOCK_SIZE]
    assert torch.equal(after, before)


def interpreted_qk_writes_to_out_and_takes_no_tokens() -> None:
    step = Step.random(4, 2, 8, torch.float32)
    out = torch.full((4, 4, 8), float("nan"))
    assert step.run(qk_norm_rope_store, step.cache.pages, out=out, num_sms=8) is out
    assert_rounds_alike(out, step.layers()[0])
    step.qkv, step.positions, step.slot_mapping = step.qkv[:0], step.positions[:0], step.slot_mapping[:0]
    assert step.run(qk_norm_rope_store, step.cache.pages).shape == (0, 4, 8)


def interpreted_add_rms_norm_matches_layers_and_float64() -> None:
    for size in (48, 64):  # masked, and a power of two
        for dtype in DTYPES:
            x, residual = torch.randn(3, size).to(dtype), torch.randn(3, size).to(dtype) * 5
            layer = RMSNorm(size, EPS, dtype, CPU)
            layer.weight.uniform_(0.3, 1.7)
            for stream in (residual, None):
                expected = layer.forward_add(x, stream)
                kept = None if stream is None else stream.clone()
                normed, summed = add_rms_norm(x, kept, layer.weight, EPS)
                assert summed is (x if stream is None else kept), "in place over the residual"
                assert torch.equal(summed, expected[1]), "the sum is rounded once: exact"
                assert_rounds_alike(normed, expected[0])
                assert_close(normed, exact_rms_norm(summed.double(), layer.weight.double()), dtype)


def interpreted_add_rms_norm_takes_buffers() -> None:
    x, residual, weight = torch.randn(2, 32), torch.randn(2, 32), torch.rand(32)
    normed, summed = add_rms_norm_reference(x, residual, weight, EPS)
    buffers, kept = torch.full((2, 2, 32), float("nan")), residual.clone()
    got = add_rms_norm(x, residual, weight, EPS, out=buffers[0], residual_out=buffers[1], num_sms=8)
    assert got[0].data_ptr() == buffers[0].data_ptr() and torch.equal(got[1], buffers[1])
    assert_rounds_alike(buffers[0], normed)
    assert torch.equal(buffers[1], summed) and torch.equal(residual, kept), "the residual is left alone"
    add_rms_norm(x, residual, weight, EPS, out=x)
    assert_rounds_alike(x, normed)


def interpreted_silu_mul_matches_torch_and_float64() -> None:
    for intermediate in (80, 1100):  # masked; and two programs a row
        for dtype in DTYPES:
            gate_up = (torch.randn(2, 2 * intermediate) * 4).to(dtype)
            gate, up = gate_up.double().chunk(2, dim=-1)
            got = silu_mul(gate_up)
            assert_close(got, gate / (1 + torch.exp(-gate)) * up, dtype)
            assert_rounds_alike(got, silu_mul_reference(gate_up))


def interpreted_silu_mul_keeps_extremes() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, float("inf"), float("nan")])
    gate_up = torch.stack([gate, torch.full_like(gate, 2.0)]).reshape(1, -1)
    out = torch.empty(1, 8)
    assert silu_mul(gate_up, out=out, num_sms=8) is out
    torch.testing.assert_close(out, silu_mul_reference(gate_up), equal_nan=True)


def pieces_of(x: Tensor, splits: int) -> Tensor:
    """float32 [splits, *x.shape] whose sum is about x, and which float16 cannot hold: rounding one early shows."""
    pieces = torch.randn(splits, *x.shape) * 1e5
    pieces[-1] = x.float() - pieces[:-1].sum(0)
    return pieces


def interpreted_partial_sums_are_added_in_order_and_rounded_once() -> None:
    """What a kernel makes of partial sums is bit for bit what it makes of their total."""
    for dtype in DTYPES:
        for splits in (2, 3, 8):
            step = Step.random(4, 2, 16, dtype)
            pieces, pages = pieces_of(step.qkv, splits), step.cache.pages
            step.qkv = add_partial_sums(pieces, dtype)
            expected = step.run(qk_norm_rope_store, pages), step.stored(pages)
            pages.fill_(float("nan"))
            inputs = *(norm.weight for norm in step.norms), step.rotary.cos_sin, step.positions
            q = qk_norm_rope_store(pieces, *inputs, pages[:, LAYER, 0], pages[:, LAYER, 1], step.slot_mapping, EPS)
            assert q.dtype == dtype and torch.equal(q, expected[0]) and torch.equal(step.stored(pages), expected[1])

            pieces, residual, weight = (
                pieces_of(torch.randn(3, 48), splits),
                torch.randn(3, 48).to(dtype),
                torch.rand(48),
            )
            normed, summed = add_rms_norm(add_partial_sums(pieces, dtype), residual.clone(), weight.to(dtype), EPS)
            got = add_rms_norm(pieces, residual, weight.to(dtype), EPS)
            assert got[0].dtype == dtype and torch.equal(got[0], normed)
            assert got[1] is residual and torch.equal(residual, summed)

            pieces, out = (
                pieces_of(torch.randn(2, 2 * 1100) * 4, splits),
                torch.full((2, 1100), float("nan"), dtype=dtype),
            )
            assert torch.equal(silu_mul(pieces, out=out), silu_mul(add_partial_sums(pieces, dtype)))


def interpreted_partial_sums_are_refused_where_they_make_no_sense() -> None:
    weight, whole, pieces = torch.ones(16), torch.zeros(2, 16), torch.zeros(2, 2, 16)
    refused: list[Callable[[], object]] = [
        lambda: add_rms_norm(pieces, None, weight, EPS),
        lambda: add_rms_norm(pieces.half(), whole, weight, EPS),
        lambda: add_rms_norm(pieces[:1], whole, weight, EPS),
        lambda: silu_mul(pieces),
    ]
    for call in refused:
        with pytest.raises(AssertionError):
            call()


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("interpreted_")}


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return results_of("tests.cpu.test_fused_kernels")


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, f"in the interpreter:\n{results[name]}"


# -- the references beside the kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_references_are_the_layers(dtype: torch.dtype) -> None:
    """Bit for bit, with the model's own layers as they are."""
    step = Step.random(6, 2, 16, dtype)
    q = step.run(qk_norm_rope_store_reference, step.cache.pages)
    for got, want in zip((q, *step.stored(step.cache.pages).unbind(1)), step.layers(), strict=True):
        assert torch.equal(got, want[: len(got)])
    norm, gate_up = step.norms[0], torch.randn(3, 32).to(dtype)
    x, residual = torch.randn(3, 16).to(dtype), torch.randn(3, 16).to(dtype)
    for stream in (residual, None):
        for got, want in zip(
            add_rms_norm_reference(x, stream, norm.weight, EPS), norm.forward_add(x, stream), strict=True
        ):
            assert torch.equal(got, want)
    gate, up = gate_up.split([16, 16], dim=-1)
    assert torch.equal(silu_mul_reference(gate_up), torch.nn.functional.silu(gate) * up)


def test_references_compute_float64_in_float64() -> None:
    """They are the oracles of the GPU tests."""
    step = Step.random(6, 2, 16, torch.float32)
    pages = step.cache.pages.double()
    q = step.run(qk_norm_rope_store_reference, pages)
    for got, exact in zip((q, *step.stored(pages).unbind(1)), step.exact(), strict=True):
        assert (got - exact[: len(got)]).abs().max() < 1e-12


# -- compiled for GPUs that need not be here


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_qk(
    model: str, dtype: torch.dtype, tokens: int = 8, device: str = "meta", offset: int = 0, splits: int = 1
) -> None:
    """Positions and slots start `offset` elements into their buffers."""
    _, heads, kv_heads, head_dim, _ = QWEN3[model]
    pages = torch.empty(4, 2, 2, 16, kv_heads, head_dim, dtype=dtype, device=device)
    weight = torch.empty(head_dim, dtype=dtype, device=device)
    cos_sin = torch.empty(64, head_dim, device=device)
    qkv = product(splits, tokens, (heads + 2 * kv_heads) * head_dim, dtype, device)
    indices = torch.empty(tokens + offset, dtype=torch.int64, device=device)[offset:]
    qk_norm_rope_store(qkv, weight, weight, cos_sin, indices, pages[:, 1, 0], pages[:, 1, 1], indices, EPS)


def product(splits: int, tokens: int, width: int, dtype: torch.dtype, device: str = "meta") -> Tensor:
    """Whole, or its partial sums."""
    if splits == 1:
        return torch.empty(tokens, width, dtype=dtype, device=device)
    return torch.empty(splits, tokens, width, device=device)


def launch_norms(model: str, dtype: torch.dtype, tokens: int = 8) -> None:
    x, weight = meta(tokens, QWEN3[model][0], dtype=dtype), meta(QWEN3[model][0], dtype=dtype)
    add_rms_norm(x, None, weight, EPS)
    add_rms_norm(x, x, weight, EPS)


def launch_silu(model: str, dtype: torch.dtype, tokens: int = 8) -> None:
    silu_mul(meta(tokens, 2 * QWEN3[model][4], dtype=dtype))


def launch_readers(model: str, dtype: torch.dtype, tokens: int, splits: int) -> None:
    """What reads products, with partial sums."""
    hidden, _, _, _, intermediate = QWEN3[model]
    launch_qk(model, dtype, tokens, splits=splits)
    residual = meta(tokens, hidden, dtype=dtype)
    add_rms_norm(product(splits, tokens, hidden, dtype), residual, meta(hidden, dtype=dtype), EPS)
    silu_mul(product(splits, tokens, 2 * intermediate, dtype), out=meta(tokens, intermediate, dtype=dtype))


LAUNCHES = [launch_qk, launch_norms, launch_silu]
MODELS = [(name, torch.bfloat16) for name in QWEN3] + [("8B", torch.float16), ("8B", torch.float32)]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("model", "dtype"), MODELS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_compiles(launch: Callable[..., None], model: str, dtype: torch.dtype, capability: int) -> None:
    """64 registers a thread leave room for 1,024 threads on an SM, enough to keep its memory pipe full."""
    reports = compile_launches(capability, lambda: launch(model, dtype))
    assert len(reports) == (2 if launch is launch_norms else 1)
    for report in reports:
        assert_fits(report, max_registers=64)
        assert report.shared_bytes <= 1024, "these kernels need shared memory for sums over warps at most"
        narrow = re.search(r"(ld|st)\.global\.b(16|32)\b", report.ptx)
        assert narrow is None, f"{narrow}: the compiler does not see the alignment"


@pytest.mark.parametrize("capability", [80, 90])
def test_a_silu_product_that_tells_its_sms_compiles(capability: int) -> None:
    """As a test launches it on a partition, to see where it runs."""
    gate_up, sm_ids = meta(8, 2 * QWEN3["0.6B"][4], dtype=torch.bfloat16), meta(8, 3, dtype=torch.int32)
    (plain,) = compile_launches(capability, lambda: silu_mul(gate_up))
    (told,) = compile_launches(capability, lambda: silu_mul(gate_up, sm_ids=sm_ids))
    assert_fits(told, max_registers=64)
    assert "%smid" in told.ptx and "%smid" not in plain.ptx


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("model", ["0.6B", "8B", "14B"])
def test_readers_of_partial_sums_compile(model: str, capability: int) -> None:
    for splits in (2, 4, 8):
        reports = compile_launches(capability, lambda: launch_readers(model, torch.bfloat16, 16, splits))  # noqa: B023
        assert len(reports) == 3
        for report in reports:
            assert_fits(report, max_registers=128)
            narrow = re.search(r"(ld|st)\.global\.b(16|32)\b", report.ptx)
            assert narrow is None, f"{narrow}: the compiler does not see the alignment"


def test_one_variant_serves_every_batch_of_partial_sums() -> None:
    variants = set()
    for tokens in (1, 9, 16, 33):
        reports = compile_launches(90, lambda: launch_readers("0.6B", torch.bfloat16, tokens, 4))  # noqa: B023
        variants |= {report.hash for report in reports}
    assert len(variants) == 3


def test_one_variant_serves_every_batch() -> None:
    """Nothing is compiled in mid-service when the batch's size, or the place of its indices, changes."""
    variants: set[str] = set()
    for tokens, offset in [(1, 0), (2, 1), (16, 0), (333, 3)]:

        def launch_all(tokens: int = tokens, offset: int = offset) -> None:
            launch_qk("0.6B", torch.bfloat16, tokens, "cpu", offset)
            launch_norms("0.6B", torch.bfloat16, tokens)
            launch_silu("0.6B", torch.bfloat16, tokens)

        variants |= {report.hash for report in compile_launches(90, launch_all)}
    assert len(variants) == 4


# -- the compile check itself


@triton.jit
def _matrix_sum(x_ptr: tl.tensor, out_ptr: tl.tensor, SIZE: tl.constexpr) -> None:
    """All loads of a matrix before its first use: spills once it is larger than the registers."""
    row = tl.arange(0, SIZE)
    x = tl.load(x_ptr + row[:, None] * SIZE + row[None, :])
    tl.store(out_ptr + row, tl.sum(x * tl.sum(x, axis=0)[None, :], axis=1))


def sum_report(size: int, num_warps: int) -> CompileReport:
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    return compile_kernel(_matrix_sum, signature, {"SIZE": size}, 90, num_warps=num_warps)


def test_compile_check_sees_spills_and_limits() -> None:
    small, large = sum_report(32, num_warps=4), sum_report(128, num_warps=1)
    assert_fits(small)
    assert small.spill_bytes == 0 < small.registers and large.spill_bytes > 0
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(large)
    with pytest.raises(AssertionError, match="registers"):
        assert_fits(small, max_registers=small.registers - 1)
    with pytest.raises(AssertionError, match="bytes shared"):
        assert_fits(dataclasses.replace(small, shared_bytes=(227 << 10) + 1))


def test_compile_check_compiles_what_is_launched() -> None:
    (report,) = compile_launches(90, lambda: launch_qk("8B", torch.bfloat16))
    assert report.num_warps == 4 and report.name == "_qk_norm_rope_store_kernel" and ".target sm_90" in report.ptx


@pytest.fixture(autouse=True)
def reset_driver() -> Iterator[None]:
    """The pretended driver is gone after each test."""
    from triton.runtime.driver import driver

    before = driver._active
    yield
    assert driver._active is before


if __name__ == "__main__":
    run_checks(CHECKS)
