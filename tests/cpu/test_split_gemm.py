"""The products of 2 to 128 rows without a GPU: run by Triton's interpreter, and compiled for sm_80 and sm_90.

TRITON_INTERPRET must be set before triton is imported, so the interpreter's checks run in a second process:
this file as a program, which prints one JSON object: check → its traceback, or null.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

from nanovllm.kernels import skinny_gemm, split_gemm  # noqa: E402
from nanovllm.kernels.partial_sums import add_partial_sums  # noqa: E402
from nanovllm.kernels.silu_mul import silu_mul_reference  # noqa: E402
from nanovllm.kernels.split_gemm import (  # noqa: E402
    ROW_LIMITS,
    TILES,
    SplitTiles,
    choose_split_tiles,
    should_split,
    split_gate_up,
    split_gate_up_reference,
    split_linear,
    split_linear_reference,
)
from nanovllm.layers.attention.triton import TritonAttention  # noqa: E402
from nanovllm.models.loader import load_model  # noqa: E402
from tests.cpu.compile_check import CompileReport, assert_fits, compile_launches  # noqa: E402
from tests.cpu.interpreted import results_of, run_checks  # noqa: E402
from tests.cpu.model_helpers import PagedDriver, load_tiny, make_checkpoint, reference_logits  # noqa: E402

DTYPES = [torch.float32, torch.float16]  # the interpreter truncates to bfloat16, where a GPU rounds
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3}  # ‖error‖ / ‖exact‖
WHOLE = SplitTiles(block_n=32, block_k=32, splits=1, num_stages=3)
SPLIT = SplitTiles(block_n=16, block_k=16, splits=3, num_stages=4)
UNEVEN = SplitTiles(block_n=64, block_k=32, splits=2, num_stages=3)  # its last piece ends within a step
N, K = 112, 80  # of half a tile, and half a step, too much
QWEN3 = {  # hidden, query width, qkv width, intermediate
    "0.6B": (1024, 2048, 4096, 3072),
    "1.7B": (2048, 2048, 4096, 6144),
    "4B": (2560, 4096, 6144, 9728),
    "8B": (4096, 4096, 6144, 12288),
    "14B": (5120, 5120, 7168, 17408),
    "32B": (5120, 8192, 10240, 25600),
}
H200_SMS = 132


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Each row against a float64 result; NaN fails."""
    error = ((got.double() - exact).norm(dim=1) / exact.norm(dim=1)).max()
    assert float(error) <= LIMITS[dtype], f"error {float(error):.2e} > {LIMITS[dtype]:.0e} in {dtype}"


# -- Triton's interpreter: 12 … 20 ms a program, so everything is tiny


def product(x: Tensor, weight: Tensor, tiles: SplitTiles) -> Tensor:
    """Written to the start of a buffer whose rest must stay as it is."""
    M, dtype = len(x), x.dtype if tiles.splits == 1 else torch.float32
    shape = (M, len(weight)) if tiles.splits == 1 else (tiles.splits, M, len(weight))
    buffer = poisoned(tiles.splits * M * len(weight) + 64, dtype=dtype)
    out = buffer[:-64].view(shape)
    assert split_linear(x, weight, tiles=tiles, out=out, num_sms=8) is out
    assert buffer[-64:].isnan().all()
    return out


def interpreted_linear(tiles: SplitTiles, rows: list[int]) -> None:
    for M in rows:
        for dtype in DTYPES:
            x, weight = randn(M, K, dtype=dtype), randn(N, K, dtype=dtype)
            out = product(x, weight, tiles)
            exact = x.double() @ weight.double().T
            assert_close(add_partial_sums(out, dtype), exact, dtype)
            assert_close(split_linear_reference(x, weight), exact, dtype)


def interpreted_partial_sums_are_of_their_own_columns() -> None:
    x, weight = randn(9, K, dtype=torch.float16), randn(N, K, dtype=torch.float16)
    for piece, columns in zip(product(x, weight, SPLIT), (slice(0, 32), slice(32, 64), slice(64, 80)), strict=True):
        assert_close(piece, x[:, columns].double() @ weight[:, columns].double().T, torch.float32)


def interpreted_gate_up(tiles: SplitTiles, rows: list[int]) -> None:
    for M in rows:
        for dtype in DTYPES:
            x, weight = randn(M, K, dtype=dtype), randn(2 * 56, K, dtype=dtype) / 4
            out = poisoned(M, 56, dtype=dtype)
            assert split_gate_up(x, weight, tiles=tiles, out=out, num_sms=8) is out
            assert_close(out, silu_mul_reference(x.double() @ weight.double().T), dtype)
            different = (out != split_gate_up_reference(x, weight)).float().mean()
            assert dtype == torch.float32 or different <= 0.03, f"{different:.1%} are rounded otherwise"


def interpreted_rows_do_not_see_each_other() -> None:
    x, weight = randn(17, K, dtype=torch.float16), randn(N, K, dtype=torch.float16)
    other = poisoned(17, K, dtype=torch.float16)
    other[5] = x[5]
    for tiles in (WHOLE, SPLIT):
        assert torch.equal(product(x, weight, tiles)[..., 5, :], product(other, weight, tiles)[..., 5, :])


def interpreted_chosen_tiles() -> None:
    x, weight = randn(12, 512, dtype=torch.float16), randn(80, 512, dtype=torch.float16)
    out = split_linear(x, weight, num_sms=4)
    assert out.shape == (2, 12, 80) and out.dtype == torch.float32
    assert_close(add_partial_sums(out, x.dtype), x.double() @ weight.double().T, x.dtype)
    assert split_gate_up(x, weight, num_sms=4).shape == (12, 40)


def interpreted_refuses_what_it_cannot_do() -> None:
    x, weight = torch.zeros(16, 32), torch.zeros(64, 32)
    refused: list[Callable[[], object]] = [
        lambda: split_linear(torch.zeros(129, 32), weight),
        lambda: split_linear(x, weight.half()),
        lambda: split_linear(x[:, :24], weight[:, :24].contiguous()),
        lambda: split_linear(x, weight[:60]),
        lambda: split_linear(x, weight, tiles=SPLIT._replace(block_k=32)),  # three pieces of one step
        lambda: split_linear(x, weight, tiles=SPLIT, out=torch.zeros(16, 64)),
    ]
    for call in refused:
        with pytest.raises(AssertionError):
            call()


def interpreted_model_reads_partial_sums() -> None:
    """A whole model, its products split or not, against transformers: prefill with some rows wanted, then decode."""
    shapes = [(128, 48), (48, 64), (160, 48), (48, 80)]  # qkv, o, gate and up, down
    for choice in (SPLIT._replace(splits=2), WHOLE):
        with (
            TemporaryDirectory() as folder,
            mock.patch.object(split_gemm, "_measured", measured_as(choice, shapes)),
            mock.patch.object(skinny_gemm, "should_fuse", lambda rows: True),  # so many rows are none of its business
        ):
            reference = make_checkpoint(Path(folder))
            config, _ = load_tiny(Path(folder))
            options = {"dtype": torch.float32, "device": torch.device("cpu"), "max_position_tokens": 256}
            driver = PagedDriver(
                load_model(Path(folder), config, TritonAttention(config.head_dim), **options), config, 16
            )
            sequences = [driver.add([(7 * i + j) % 97 for j in range(3 + i % 2)]) for i in range(9)]
            driver.prefill([(sequence, len(sequence.tokens) - 1) for sequence in sequences[:5]])
            driver.prefill([(sequence, len(sequence.tokens) - 1) for sequence in sequences[5:]])
            driver.decode(sequences, padding=1)
            for sequence in (sequences[0], sequences[5]):
                expected = reference_logits(reference, sequence.tokens)
                torch.testing.assert_close(torch.stack(sequence.logits), expected, atol=2e-4, rtol=0)


def measured_as(tiles: SplitTiles, shapes: list[tuple[int, int]]) -> Callable[..., SplitTiles | None]:
    """In place of the table: these tiles for all products of a tiny model, and of 9 rows or more."""
    return lambda M, N, K, dtype: tiles if (N, K) in shapes and M > 8 else None


CHECKS: dict[str, Callable[[], None]] = {
    "whole": partial(interpreted_linear, WHOLE, [9, 16, 33]),
    "split": partial(interpreted_linear, SPLIT, [9, 20, 128]),
    "uneven": partial(interpreted_linear, UNEVEN, [1, 17, 100]),
    "columns": interpreted_partial_sums_are_of_their_own_columns,
    "gate-whole": partial(interpreted_gate_up, WHOLE, [9, 33]),
    "gate-split": partial(interpreted_gate_up, SPLIT, [10]),
    "gate-uneven": partial(interpreted_gate_up, UNEVEN._replace(splits=1), [16]),
    "neighbours": interpreted_rows_do_not_see_each_other,
    "chosen-tiles": interpreted_chosen_tiles,
    "refusals": interpreted_refuses_what_it_cannot_do,
    "model": interpreted_model_reads_partial_sums,
}


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return results_of("tests.cpu.test_split_gemm")


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, f"in the interpreter:\n{results[name]}"


# -- compiled for GPUs that need not be here


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def shapes_of(model: str) -> Iterator[tuple[int, int, bool]]:
    """(N, K, whether it is gate and up) of a layer's products."""
    hidden, query, qkv, intermediate = QWEN3[model]
    yield from [(qkv, hidden, False), (hidden, query, False), (2 * intermediate, hidden, True)]
    yield hidden, intermediate, False


def launch(M: int, N: int, K: int, gated: bool, pdl: bool) -> None:
    (split_gate_up if gated else split_linear)(meta(M, K), meta(N, K), num_sms=H200_SMS, pdl=pdl)


def compiled(capability: int, M: int, N: int, K: int, gated: bool, pdl: bool) -> CompileReport:
    """The product's kernel; a split product of gate and up has its reader behind it."""
    return compile_launches(capability, lambda: launch(M, N, K, gated, pdl))[0]


COMPILED = [(model, capability) for model in QWEN3 if model != "32B" for capability in (80, 90)]


@pytest.mark.parametrize(
    ("model", "capability", "pdl"), [("0.6B", 90, False), *((*each, each[1] == 90) for each in COMPILED)]
)
def test_compiles(model: str, capability: int, pdl: bool) -> None:
    """Every row of the table: no spills, shared memory in bounds, wide copies and stores, and on Hopper its own
    instruction, for 64 weight rows."""
    for N, K, gated in shapes_of(model):
        for M in ROW_LIMITS:
            if should_split(meta(M, K), meta(N, K)):
                report = compiled(capability, M, N, K, gated, pdl)
                assert_fits(report)
                assert "cp.async.cg" in report.ptx and "cp.async.ca" not in report.ptx
                narrow = re.search(r"(ld|st)\.global(?!\S*\.v\d)\S*", report.ptx)
                assert narrow is None, f"{narrow}: the compiler does not see the alignment"
                assert ("wgmma.mma_async.sync.aligned.m64" in report.ptx) == (capability == 90)


@pytest.mark.parametrize(("dtype", "capability"), [(torch.float16, 80), (torch.float16, 90), (torch.float32, 90)])
def test_compiles_other_dtypes(dtype: torch.dtype, capability: int) -> None:
    """Of the table, and by rule; no model here is float32 on a GPU."""
    for M in (16, 64, 128):
        x, weight = meta(M, 1024).to(dtype), meta(512 if dtype == torch.float32 else 4096, 1024).to(dtype)
        for run in (split_linear, split_gate_up):
            reports = compile_launches(capability, lambda: run(x, weight, num_sms=H200_SMS, pdl=False))  # noqa: B023
            assert_fits(reports[0])


@pytest.mark.parametrize("gated", [False, True])
def test_only_weights_are_fetched_ahead_of_the_wait(gated: bool) -> None:
    """x and every buffer written belong to the kernels before, until the wait."""
    for M, N, K in [(64, 6144, 1024), (64, 24576, 4096)]:
        ptx = compiled(90, M, N, K, gated, pdl=True).ptx
        ahead, *behind = ptx.split("griddepcontrol.wait")
        assert len(behind) == 1 and "griddepcontrol.launch_dependents" in ahead
        assert "prefetch.global.L2" in ahead and "prefetch" not in behind[0]
        assert not re.search(r"ld\.global|st\.global|cp\.async", ahead)
        assert "griddepcontrol" not in compiled(90, M, N, K, gated, pdl=False).ptx


def test_gate_and_up_meet_in_one_thread() -> None:
    """No exchange between threads but the one that every result takes on its way to memory."""
    counts = [compiled(90, 64, 6144, 1024, gated, pdl=True).ptx.count("bar.sync") for gated in (False, True)]
    assert counts[1] <= counts[0], counts


def test_few_variants_serve_every_batch() -> None:
    variants = {
        M: compiled(90, M, 1024, 2048, False, pdl=True).hash
        for M in (9, 13, 16, 17, 32, 33, 64, 65, 80, 96, 97, 112, 128)
    }
    assert variants[9] == variants[13] == variants[16] and variants[17] == variants[32]
    assert variants[33] == variants[64] and variants[65] == variants[80] == variants[96]
    assert variants[97] == variants[112] == variants[128] and len(set(variants.values())) == 5


# -- decisions on the host


@pytest.mark.parametrize("model", QWEN3)
def test_tiles_of_every_shape(model: str) -> None:
    """By table or rule: no piece of K is empty, tiles are the tensor cores', and half of the SMs have work."""
    for N, K, _ in shapes_of(model):
        for M in (2, 9, 16, 17, 64, 65, 96, 97, 128):
            for dtype in (torch.bfloat16, torch.float32):
                tiles = choose_split_tiles(M, N, K, dtype, H200_SMS)
                piece = triton.cdiv(triton.cdiv(K, tiles.block_k), tiles.splits) * tiles.block_k
                assert (tiles.splits - 1) * piece < K, f"{N}x{K}: {tiles}"
                assert tiles.block_n >= 64 and tiles.num_warps in (4, 8)
                assert triton.cdiv(N, tiles.block_n) * tiles.splits >= 0.45 * H200_SMS, f"{N}x{K}: {tiles}"


def test_only_what_was_measured_is_split() -> None:
    for M, dtype, expected in [
        (1, torch.bfloat16, False),
        (2, torch.bfloat16, True),
        (128, torch.float16, True),
        (129, torch.bfloat16, False),
        (64, torch.float32, False),
    ]:
        x, weight = (
            torch.empty(M, 1024, dtype=dtype, device="meta"),
            torch.empty(4096, 1024, dtype=dtype, device="meta"),
        )
        assert should_split(x, weight) == expected, f"{M} rows of {dtype}"
    assert not should_split(meta(64, 1024), meta(151_936, 1024))
    assert not any(should_split(meta(128, K), meta(N, K)) for N, K in [(6144, 4096), (24576, 4096)])


def test_the_table_is_of_real_shapes() -> None:
    real = {(N, K) for model in QWEN3 for N, K, _ in shapes_of(model)}
    assert set(TILES) <= real and all(len(tiles) == len(ROW_LIMITS) for tiles in TILES.values())


if __name__ == "__main__":
    run_checks(CHECKS)
