"""Prefill by Hopper's copy engine without a GPU: by Triton's interpreter against float64, and compiled for sm_90."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from nanovllm.kernels import paged_prefill as prefill_module  # noqa: E402
from nanovllm.kernels.paged_prefill import FEW_ROWS, paged_prefill, paged_prefill_reference  # noqa: E402
from nanovllm.kernels.paged_prefill_hopper import TmaTiles, paged_prefill_tma, pages_fit_boxes  # noqa: E402
from tests.cpu.compile_check import SHARED_LIMIT_BYTES, CompileReport, assert_fits, compile_launches  # noqa: E402
from tests.cpu.interpreted import results_of, run_checks  # noqa: E402
from tests.cpu.test_attention_kernels import BOUNDS, NAN, Case, Pool, check_close  # noqa: E402

SMALL = TmaTiles(rows=32, tile_tokens=16)
# Contexts that end in the middle of a tile, at its first and last token, and behind a cached prefix; empty chunks.
RAGGED = Case((70, 1, 32, 49), query_lens=(70, 1, 0, 17), kv_heads=1)
CASES = {
    "one tile a page": (RAGGED, SMALL),
    "tiles within pages": (replace(RAGGED, page=64, contexts=(70, 33, 128, 49)), SMALL),
    "group 5, float32": (replace(RAGGED, group=5, page=32, dtype=torch.float32, contexts=(70, 5, 40, 64)), SMALL),
    "two heads, its own tiles": (
        Case((100, 65), query_lens=(40, 3), kv_heads=2, group=2, page=64, head_dim=128),
        TmaTiles(),
    ),
}


def run_case(case: Case, tiles: TmaTiles) -> None:
    pool = Pool(case)
    meta = pool.prefill_meta()
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, meta.cu_seqlens_q, pool.contexts
    out = torch.full(pool.q.shape, NAN, dtype=case.dtype)
    paged_prefill_tma(*arguments, meta.max_query_tokens, tiles=tiles, out=out)
    check_close(out, paged_prefill_reference(*arguments), BOUNDS[case.dtype])


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return results_of("tests.cpu.test_prefill_hopper")


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_matches_float64(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, f"in the interpreter:\n{results[name]}"


# -- compiled for Hopper, run on none


def launch(
    group: int, kv_heads: int, page: int, dtype: torch.dtype, tokens: int = 64, sequences: int = 4, layer: int = 5
) -> None:
    meta: dict[str, Any] = {"device": "meta"}
    pages = torch.empty(1000 + tokens, 36, 2, page, kv_heads, 128, dtype=dtype, **meta)
    q = torch.empty(tokens, (group + 2) * kv_heads, 128, dtype=dtype, **meta)[:, : group * kv_heads]
    tables = torch.empty(1 + sequences, 15 + tokens, dtype=torch.int32, **meta)[1:]
    starts = torch.empty(2 + sequences, dtype=torch.int32, **meta)[1:]
    paged_prefill_tma(q, pages[:, layer, 0], pages[:, layer, 1], tables, starts, starts[1:], tokens)


def compiled(*shape: Any) -> CompileReport:
    (report,) = compile_launches(90, lambda: launch(*shape))
    return report


@pytest.mark.parametrize(
    "group, kv_heads, page, dtype",
    [
        (4, 8, 64, torch.bfloat16),
        (2, 8, 64, torch.bfloat16),
        (5, 8, 128, torch.bfloat16),
        (8, 1, 256, torch.float16),
        (1, 8, 64, torch.float16),
    ],
)
def test_two_programs_fit_an_sm(group: int, kv_heads: int, page: int, dtype: torch.dtype) -> None:
    report = compiled(group, kv_heads, page, dtype)
    assert_fits(report, max_registers=128, max_spill_bytes=8)  # one register, once
    assert report.num_warps == 8 and 2 * (report.shared_bytes + 1024) <= SHARED_LIMIT_BYTES[90] + 1024
    assert "cp.async.bulk.tensor" in report.ptx and "wgmma.mma_async" in report.ptx


def test_no_run_time_value_compiles_a_variant() -> None:
    def launch_all() -> None:
        for tokens, sequences, layer in ((1, 1, 0), (16, 1, 3), (17, 16, 35), (640, 8, 16)):
            launch(4, 8, 64, torch.bfloat16, tokens, sequences, layer)

    reports = compile_launches(90, launch_all)
    assert len(reports) == 4 and len({each.hash for each in reports}) == 1


# -- where it is taken


def make_pages(page: int = 64, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(10, 2, 2, page, 8, head_dim, dtype=dtype, device="meta")[:, 1, 0]


def test_pages_that_fit_boxes() -> None:
    assert all(pages_fit_boxes(make_pages(page)) for page in (64, 128, 256))
    assert pages_fit_boxes(make_pages(dtype=torch.float16))
    assert not any(pages_fit_boxes(make_pages(page)) for page in (16, 32))
    assert not pages_fit_boxes(make_pages(head_dim=64))
    assert not pages_fit_boxes(make_pages(dtype=torch.float32))
    heads_outermost = torch.empty(10, 8, 64, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    assert not pages_fit_boxes(heads_outermost)


@pytest.mark.parametrize("hopper", [True, False])
def test_long_chunks_on_hopper_take_it(hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_module, "is_hopper", lambda device: hopper)
    meta: dict[str, Any] = {"device": "meta"}
    pages, q = make_pages(), torch.empty(64, 32, 128, dtype=torch.bfloat16, **meta)
    tables, lens = torch.empty(3, 9, dtype=torch.int32, **meta), torch.empty(4, dtype=torch.int32, **meta)
    names = {}
    for tokens in (FEW_ROWS // 4, FEW_ROWS // 4 + 1):
        call = partial(paged_prefill, q, pages, pages, tables, lens, lens[:3], tokens)
        (report,) = compile_launches(90, call)
        names[tokens] = report.name
    long = "_prefill_tma_kernel" if hopper else "_prefill_kernel"
    assert list(names.values()) == ["_prefill_kernel", long]


def main() -> None:
    run_checks({name: partial(run_case, *case) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
