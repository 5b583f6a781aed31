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


def main() -> None:
    run_checks({name: partial(run_case, *case) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
