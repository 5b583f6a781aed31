"""The skinny products without a GPU: run by Triton's interpreter, and compiled for sm_80 and sm_90.

TRITON_INTERPRET must be set before triton is imported, so the interpreter's checks run in a second process:
this file as a program, which prints one JSON object: check → its traceback, or null.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

from nanovllm.kernels import skinny_gemm, split_gemm  # noqa: E402
from nanovllm.kernels.rms_norm import add_rms_norm_reference  # noqa: E402
from nanovllm.kernels.silu_mul import silu_mul_reference  # noqa: E402
from nanovllm.kernels.skinny_gemm import (  # noqa: E402
    SkinnyTiles,
    choose_tiles,
    norm_gate_up,
    norm_gate_up_reference,
    norm_linear,
    norm_linear_reference,
    skinny_linear,
    skinny_linear_reference,
)
from nanovllm.layers.elementwise import TritonElementwise  # noqa: E402
from nanovllm.layers.linear import Linear  # noqa: E402
from nanovllm.layers.norm import RMSNorm  # noqa: E402
from tests.cpu.compile_check import CompileReport, assert_fits, compile_launches  # noqa: E402
from tests.cpu.interpreted import results_of, run_checks  # noqa: E402

EPS = 1e-6
DTYPES = [torch.float32, torch.float16]  # the interpreter truncates to bfloat16, where a GPU rounds
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3}  # ‖error‖ / ‖exact‖
PLAIN = SkinnyTiles(block_n=4, block_k=32, num_warps=4)
PLAIN_STAGED = SkinnyTiles(block_n=8, block_k=16, num_warps=4, num_stages=3)
DOT = SkinnyTiles(block_n=16, block_k=16, num_warps=4, split_k=2, dot=True)
DOT_STAGED = SkinnyTiles(block_n=8, block_k=16, num_warps=4, num_stages=2, split_k=4, dot=True)
ONE_STEP = SkinnyTiles(block_n=16, block_k=64, num_warps=4, split_k=2, dot=True)
N, K = 38, 80  # multiples of no tile
QWEN3 = {  # hidden, query width, qkv width, intermediate
    "0.6B": (1024, 2048, 4096, 3072),
    "1.7B": (2048, 2048, 4096, 6144),
    "4B": (2560, 4096, 6144, 9728),
    "8B": (4096, 4096, 6144, 12288),
    "14B": (5120, 5120, 7168, 17408),
}
VOCABULARY = 151_936
H200_SMS = 132


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Each row against a float64 result; NaN fails."""
    error = ((got.double() - exact).norm(dim=1) / exact.norm(dim=1)).max()
    assert float(error) <= LIMITS[dtype], f"error {float(error):.2e} > {LIMITS[dtype]:.0e} in {dtype}"


def assert_rounds_alike(got: Tensor, reference: Tensor) -> None:
    """The same roundings in the same places: equal, but for what float32's last bits tip over."""
    assert got.dtype == reference.dtype and got.shape == reference.shape
    if got.dtype != torch.float32:
        different = float((got != reference).float().mean())
        assert different <= 0.03, f"{different:.1%} of the elements differ in {got.dtype}"


# -- Triton's interpreter: 12 … 20 ms a program, so everything is tiny


def interpreted_linear(tiles: SkinnyTiles, rows: list[int]) -> None:
    for M in rows:
        for dtype in DTYPES:
            x, weight = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype)
            out = poisoned(M, N, dtype=dtype)
            assert skinny_linear(x, weight, tiles=tiles, out=out, num_sms=8) is out
            assert_close(out, x.double() @ weight.double().T, dtype)
            assert_close(skinny_linear_reference(x, weight), x.double() @ weight.double().T, dtype)


def interpreted_float32_output() -> None:
    """Products that float16 could not tell apart."""
    x, weight = randn(2, K, dtype=torch.float16), randn(N, K, dtype=torch.float16)
    out = skinny_linear(x, weight, tiles=DOT, out=poisoned(2, N, dtype=torch.float32))
    assert_close(out, x.double() @ weight.double().T, torch.float32)


def interpreted_norm_linear(tiles: SkinnyTiles, rows: list[int]) -> None:
    """The product of the very rows that the unfused norm gives: were one rounding elsewhere, it would show."""
    for M in rows:
        for dtype in DTYPES:
            x, residual = randn(M, K, dtype=dtype), randn(M, K, dtype=dtype) * 8
            norm_weight, weight = torch.rand(K).to(dtype) + 0.5, randn(N, K, dtype=dtype)
            for stream in (residual, None):
                kept = x.clone(), residual.clone()
                y, summed = norm_linear(x, stream, norm_weight, EPS, weight, tiles=tiles)
                normed, expected = add_rms_norm_reference(x, stream, norm_weight, EPS)
                assert torch.equal(summed, expected) and torch.equal(x, kept[0]) and torch.equal(residual, kept[1])
                assert (summed is x) == (stream is None)
                assert_close(y, normed.double() @ weight.double().T, dtype)
                assert_rounds_alike(y, (normed.double() @ weight.double().T).to(dtype))
                reference = norm_linear_reference(x, stream, norm_weight, EPS, weight)
                assert_close(reference[0], normed.double() @ weight.double().T, dtype)


def interpreted_norm_gate_up(tiles: SkinnyTiles, rows: list[int]) -> None:
    for M in rows:
        for dtype in DTYPES:
            x, residual = randn(M, K, dtype=dtype), randn(M, K, dtype=dtype) * 8
            norm_weight, weight = torch.rand(K).to(dtype) + 0.5, randn(2 * N, K, dtype=dtype) / 4
            buffers = poisoned(M, N, dtype=dtype), poisoned(M, K, dtype=dtype)
            got = norm_gate_up(
                x, residual, norm_weight, EPS, weight, tiles=tiles, out=buffers[0], residual_out=buffers[1]
            )
            assert got[0] is buffers[0] and got[1] is buffers[1]
            normed, summed = add_rms_norm_reference(x, residual, norm_weight, EPS)
            assert torch.equal(got[1], summed)
            products = normed.double() @ weight.double().T
            assert_close(got[0], silu_mul_reference(products), dtype)
            assert_rounds_alike(got[0], silu_mul_reference(products.to(dtype)))
            assert_rounds_alike(got[0], norm_gate_up_reference(x, residual, norm_weight, EPS, weight)[0])


def interpreted_fewer_programs_than_rows() -> None:
    """The sum of every row is written all the same."""
    x, residual, weight = randn(8, 32, dtype=torch.float32), randn(8, 32, dtype=torch.float32), torch.rand(32)
    small = randn(16, 32, dtype=torch.float32)
    out = poisoned(8, 32, dtype=torch.float32)
    norm_linear(x, residual, weight, EPS, small, tiles=DOT, residual_out=out)
    assert torch.equal(out, x + residual)


def interpreted_chosen_tiles() -> None:
    for M in (1, 3):
        x, weight = randn(M, 48, dtype=torch.float32), randn(24, 48, dtype=torch.float32)
        assert_close(skinny_linear(x, weight), x.double() @ weight.double().T, torch.float32)


def interpreted_refuses_what_it_cannot_do() -> None:
    x, weight, norm_weight = torch.zeros(2, 32), torch.zeros(16, 32), torch.zeros(32)
    refused: list[Callable[[], object]] = [
        lambda: skinny_linear(torch.zeros(9, 32), weight),
        lambda: skinny_linear(x, weight.half()),
        lambda: skinny_linear(x[:, :24], weight[:, :24].contiguous()),
        lambda: skinny_linear(x, weight, tiles=PLAIN),
        lambda: norm_linear(x, x.clone(), norm_weight, EPS, weight, residual_out=x),
        lambda: norm_gate_up(x, None, norm_weight, EPS, weight[:15]),
    ]
    for call in refused:
        with pytest.raises(AssertionError):
            call()


CHECKS: dict[str, Callable[[], None]] = {
    "linear-plain": partial(interpreted_linear, PLAIN, [1]),
    "linear-plain-staged": partial(interpreted_linear, PLAIN_STAGED, [1]),
    "linear-dot": partial(interpreted_linear, DOT, [1, 2, 3, 4, 5, 6, 7, 8]),
    "linear-dot-staged": partial(interpreted_linear, DOT_STAGED, [1, 5]),
    "linear-one-step": partial(interpreted_linear, ONE_STEP, [1, 8]),
    "norm-plain": partial(interpreted_norm_linear, PLAIN, [1]),
    "norm-plain-staged": partial(interpreted_norm_linear, PLAIN_STAGED, [1]),
    "norm-dot": partial(interpreted_norm_linear, DOT, [1, 3, 8]),
    "norm-dot-staged": partial(interpreted_norm_linear, DOT_STAGED, [2, 7]),
    "gate-plain": partial(interpreted_norm_gate_up, PLAIN, [1]),
    "gate-dot": partial(interpreted_norm_gate_up, DOT, [2, 5]),
    "gate-dot-staged": partial(interpreted_norm_gate_up, DOT_STAGED, [1, 8]),
    "float32-output": interpreted_float32_output,
    "fewer-programs-than-rows": interpreted_fewer_programs_than_rows,
    "chosen-tiles": interpreted_chosen_tiles,
    "refusals": interpreted_refuses_what_it_cannot_do,
}


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return results_of("tests.cpu.test_skinny_gemm")


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, f"in the interpreter:\n{results[name]}"


# -- compiled for GPUs that need not be here


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_layer(model: str, M: int, pdl: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    """What a layer launches, the first layer too, and the projection to logits."""
    hidden, query, qkv, intermediate = QWEN3[model]
    x, norm_weight = meta(M, hidden, dtype=dtype), meta(hidden, dtype=dtype)
    qkv_weight, gate_up_weight = meta(qkv, hidden, dtype=dtype), meta(2 * intermediate, hidden, dtype=dtype)
    o_weight, down_weight = meta(hidden, query, dtype=dtype), meta(hidden, intermediate, dtype=dtype)
    head_weight, logits = meta(VOCABULARY, hidden, dtype=dtype), meta(M, VOCABULARY, dtype=torch.float32)
    for residual in (None, x):
        norm_linear(x, residual, norm_weight, EPS, qkv_weight, num_sms=H200_SMS, pdl=pdl)
    skinny_linear(meta(M, query, dtype=dtype), o_weight, num_sms=H200_SMS, pdl=pdl)
    norm_gate_up(x, x, norm_weight, EPS, gate_up_weight, num_sms=H200_SMS, pdl=pdl)
    skinny_linear(meta(M, intermediate, dtype=dtype), down_weight, num_sms=H200_SMS, pdl=pdl)
    norm_linear(x, x, norm_weight, EPS, head_weight, num_sms=H200_SMS, pdl=pdl, out=logits)


COMPILED = [(90, name, torch.bfloat16) for name in QWEN3]
COMPILED += [(80, name, torch.bfloat16) for name in ("0.6B", "8B")]
COMPILED += [(90, "8B", torch.float16), (90, "0.6B", torch.float32), (80, "0.6B", torch.float32)]


@pytest.mark.parametrize(("capability", "model", "dtype"), COMPILED)
def test_compiles(capability: int, model: str, dtype: torch.dtype) -> None:
    """No spills, shared memory in bounds, and weights 16 bytes a load."""
    for M in (1, 8):
        reports = compile_launches(capability, lambda: launch_layer(model, M, capability == 90, dtype))  # noqa: B023
        assert len(reports) == 6
        for report in reports:
            assert_fits(report)
            narrow = re.search(r"ld\.global\.\S*evict_first\S*\.b(16|32)\b|ld\.global\.b(16|32)\b", report.ptx)
            assert narrow is None or ".v" in narrow[0], f"{narrow}: the compiler does not see the alignment"


@pytest.mark.parametrize("M", [1, 8])
@pytest.mark.parametrize("model", ["0.6B", "8B"])
def test_only_weights_are_read_ahead_of_the_wait(model: str, M: int) -> None:
    """x, the residual and every buffer written belong to the kernels before, until the wait."""
    for report in compile_launches(90, lambda: launch_layer(model, M, pdl=True)):
        assert "griddepcontrol.launch_dependents" in report.ptx
        ahead, behind = split_at_wait(report)
        loads = re.findall(r"ld\.global\S*", ahead)
        assert all("evict_first" in load for load in loads), "of all loads, only those of weights are marked so"
        assert loads or "prefetch.global.L2" in ahead, "nothing hides the launch"
        assert "st.global" not in ahead and "cp.async" not in ahead
        assert "st.global" in behind


def split_at_wait(report: CompileReport) -> tuple[str, str]:
    ahead, *behind = report.ptx.split("griddepcontrol.wait")
    assert len(behind) == 1, f"{len(behind)} waits"
    return ahead, behind[0]


def test_without_dependent_launch_there_is_no_wait() -> None:
    for capability in (80, 90):
        for report in compile_launches(capability, lambda: launch_layer("0.6B", 1, pdl=False)):
            assert "griddepcontrol" not in report.ptx


def test_few_variants_serve_every_batch() -> None:
    """One for each power of two of rows; nothing else that changes in service compiles another."""
    variants = {
        M: {report.hash for report in compile_launches(90, lambda: launch_layer("0.6B", M, pdl=True))}  # noqa: B023
        for M in (1, 2, 3, 4, 5, 8)
    }
    assert all(len(hashes) == 6 for hashes in variants.values())
    assert variants[3] == variants[4] and variants[5] == variants[8]
    assert len(set.union(*variants.values())) == 4 * 6


# -- decisions on the host


@pytest.mark.parametrize("model", QWEN3)
@pytest.mark.parametrize("M", [1, 2, 8])
def test_chosen_tiles_fill_the_card(model: str, M: int) -> None:
    """Programs for half of the SMs at least, and as many bytes asked for at once as keep the memory busy."""
    hidden, query, qkv, intermediate = QWEN3[model]
    for N, K in [(qkv, hidden), (hidden, query), (2 * intermediate, hidden), (hidden, intermediate)]:
        tiles = choose_tiles(M, N, K, torch.bfloat16, H200_SMS)
        programs = triton.cdiv(N, tiles.block_n)
        ahead_bytes = tiles.block_n * min(K, tiles.block_k * tiles.split_k) * 2 * max(1, tiles.num_stages - 1)
        assert programs >= 0.45 * H200_SMS, f"{N}x{K}: {programs} programs of {tiles}"
        assert programs * ahead_bytes >= 0.9 * min(32 << 10, 2 * N * K // H200_SMS) * H200_SMS, f"{N}x{K}: {tiles}"


@pytest.mark.parametrize(("M", "num_sms"), [(1, 36), (4, 36), (1, 16), (4, 16)])
def test_products_on_a_partition_are_sized_for_it(M: int, num_sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products of a layer that are kernels of ours; split ones are taken on fewer SMs than cuBLASLt bears."""
    seen: list[tuple[Any, int]] = []

    def note(choose: Callable[..., Any], *args: Any) -> Any:
        seen.append((choose(*args), args[-1]))
        return seen[-1][0]

    monkeypatch.setattr(skinny_gemm, "choose_tiles", partial(note, choose_tiles))
    monkeypatch.setattr(split_gemm, "choose_split_tiles", partial(note, split_gemm.choose_split_tiles))
    hidden, query, qkv, intermediate = QWEN3["8B"]
    qkv_proj, o_proj, gate_up, down = (
        Linear(K, N, torch.bfloat16, torch.device("meta"))
        for K, N in [(hidden, qkv), (query, hidden), (hidden, 2 * intermediate), (intermediate, hidden)]
    )
    norm, x = RMSNorm(hidden, EPS, torch.bfloat16, torch.device("meta")), meta(M, hidden)
    ours = TritonElementwise(num_sms)

    def layer() -> None:
        ours.norm_linear(norm, qkv_proj, x, meta(M, hidden))
        ours.linear(o_proj, meta(M, query))
        ours.norm_swiglu(norm, gate_up, x, meta(M, hidden))
        ours.linear(down, meta(M, intermediate))

    for report in compile_launches(90, layer):
        assert_fits(report)
    assert [sms for _, sms in seen] == [num_sms] * 4
    if M == 1:
        assert seen[1][0] == choose_tiles(1, hidden, query, torch.bfloat16, num_sms)
        assert seen[1][0] != choose_tiles(1, hidden, query, torch.bfloat16, H200_SMS), "else this test shows nothing"


if __name__ == "__main__":
    run_checks(CHECKS)
