"""Decode by equal shares without a GPU: by Triton's interpreter against float64, and compiled for sm_90."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from nanovllm.kernels.paged_decode import paged_decode_reference  # noqa: E402
from nanovllm.kernels.paged_decode_hopper import (  # noqa: E402
    ShareTiles,
    choose_share_tiles,
    paged_decode_tma,
    pages_fit_decode_boxes,
)
from tests.cpu.compile_check import SHARED_LIMIT_BYTES, CompileReport, assert_fits, compile_launches  # noqa: E402
from tests.cpu.interpreted import results_of, run_checks  # noqa: E402
from tests.cpu.test_attention_kernels import BOUNDS, NAN, Case, Pool, check_close  # noqa: E402

SMALL = ShareTiles(tile_tokens=16, programs_per_sm=1)
# case, tiles, SMs: shares are SMs · programs_per_sm // KV heads
CASES = {
    "rows of one token, none, whole pages, cut by 5 shares": (
        Case((1, 0, 16, 33, 700, 15, 0, 64), kv_heads=1, head_dim=32),
        SMALL,
        5,
    ),
    "more shares than tiles": (Case((40, 0, 3), kv_heads=1, head_dim=32, group=1), SMALL, 64),
    "one share, nothing cut": (Case((40, 17, 0), kv_heads=2, head_dim=32, page=32, group=2), SMALL, 2),
    "a row over all of 9 shares": (Case((1500,), kv_heads=1, head_dim=32, group=5, page=64), SMALL, 9),
    "no context at all": (Case((0, 0), kv_heads=1, head_dim=32, group=8), SMALL, 3),
    "a row whose last tile alone is in the next share": (
        Case((144, 128), kv_heads=1, head_dim=16, group=1),
        SMALL,
        2,
    ),
    "more rows than are summed up at once": (
        Case((3, 0, 40) * 90 + (100,), kv_heads=1, head_dim=16, group=2),
        SMALL,
        7,
    ),
    "group 20": (Case((70, 300), kv_heads=1, head_dim=32, group=20), SMALL, 3),
    "float32, its own tiles": (
        Case((131, 5, 257), group=4, kv_heads=2, head_dim=128, page=64, dtype=torch.float32),
        ShareTiles(),
        1,
    ),
}


def run_case(case: Case, tiles: ShareTiles, num_sms: int) -> None:
    pool = Pool(case)
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts
    out = torch.full(pool.q.shape, NAN, dtype=case.dtype)
    paged_decode_tma(*arguments, max(case.contexts), num_sms=num_sms, tiles=tiles, out=out)
    check_close(out, paged_decode_reference(*arguments), BOUNDS[case.dtype])


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return results_of("tests.cpu.test_decode_hopper")


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_matches_float64(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, f"in the interpreter:\n{results[name]}"


# -- compiled for Hopper, run on none


def launch(group: int, page: int, dtype: torch.dtype, rows: int = 64, layer: int = 5, num_sms: int = 44) -> None:
    meta: dict[str, Any] = {"device": "meta"}
    pages = torch.empty(1000 + rows, 36, 2, page, 8, 128, dtype=dtype, **meta)
    q = torch.empty(rows, (group + 2) * 8, 128, dtype=dtype, **meta)[:, : group * 8]
    tables = torch.empty(1 + rows, 15 + rows, dtype=torch.int32, **meta)[1:]
    contexts = torch.empty(1 + rows, dtype=torch.int32, **meta)[1:]
    paged_decode_tma(
        q, pages[:, layer, 0], pages[:, layer, 1], tables, contexts, 1000 + rows, num_sms=num_sms, pdl=True
    )


def compiled(*shape: Any) -> list[CompileReport]:
    return compile_launches(90, lambda: launch(*shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page", [32, 64, 128])
@pytest.mark.parametrize("group", [2, 4, 5, 8])
def test_all_programs_fit_an_sm(group: int, page: int, dtype: torch.dtype) -> None:
    share, join = compiled(group, page, dtype)
    assert_fits(share, max_spill_bytes=24)  # of narrow values, group 2 alone: faster than fewer programs
    assert_fits(join)
    programs = choose_share_tiles(page).programs_per_sm
    assert programs * (share.shared_bytes + 1024) <= SHARED_LIMIT_BYTES[90] + 1024  # each block costs 1 KiB more
    assert programs * share.num_warps * 32 * share.registers <= 65536
    assert "cp.async.bulk.tensor" in share.ptx and "mma.sync" in share.ptx


def test_tiles_are_loaded_ahead() -> None:
    """As many keys and values as there are buffers are asked for before the loop waits for the first."""
    (share, _), buffers = compiled(4, 64, torch.bfloat16), ShareTiles().num_stages - 1
    before_the_wait = share.ptx[: share.ptx.index("mbarrier.try_wait")]
    halves = 2 // ShareTiles().num_warps  # of a row of 256 bytes; each warp asks for one
    assert before_the_wait.count("cp.async.bulk.tensor") == buffers * 2 * halves
    assert share.shared_bytes >= buffers * 2 * ShareTiles().tile_tokens * 128 * 2


def test_no_run_time_value_compiles_a_variant() -> None:
    def launch_all() -> None:
        for rows, layer, num_sms in ((1, 0, 28), (16, 3, 44), (17, 35, 132), (640, 16, 60)):
            launch(4, 64, torch.bfloat16, rows, layer, num_sms)

    reports = compile_launches(90, launch_all)
    assert len(reports) == 8 and len({each.hash for each in reports}) == 2


# -- where it is taken


def make_pages(page: int = 64, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(10, 2, 2, page, 8, head_dim, dtype=dtype, device="meta")[:, 1, 0]


def test_pages_that_fit_boxes() -> None:
    assert all(pages_fit_decode_boxes(make_pages(page)) for page in (32, 64, 128, 256))
    assert pages_fit_decode_boxes(make_pages(dtype=torch.float16))
    assert not pages_fit_decode_boxes(make_pages(16))
    assert not pages_fit_decode_boxes(make_pages(head_dim=64))
    assert not pages_fit_decode_boxes(make_pages(dtype=torch.float32))
    heads_outermost = torch.empty(10, 8, 64, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    assert not pages_fit_decode_boxes(heads_outermost)


def main() -> None:
    run_checks({name: partial(run_case, *case) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
