"""Decode through a ring of tiles without a GPU: emulated against float64, and compiled for sm_90."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from nanovllm.kernels import paged_decode_hopper as hopper_module  # noqa: E402
from nanovllm.kernels.paged_decode import paged_decode_reference  # noqa: E402
from nanovllm.kernels.paged_decode_hopper import RingShape, count_shares, paged_decode_ring, pages_fit_ring  # noqa: E402
from nanovllm.layers.attention import DecodeMetadata  # noqa: E402
from nanovllm.layers.attention import triton as backend_module  # noqa: E402
from nanovllm.layers.attention.triton import TritonAttention  # noqa: E402
from tests.cpu.compile_check import SHARED_LIMIT_BYTES, CompileReport, assert_fits, compile_launches  # noqa: E402
from tests.cpu.gluon_emulator import EmulatedKernel  # noqa: E402
from tests.cpu.interpreted import results_of, run_checks  # noqa: E402
from tests.cpu.test_attention_kernels import BOUNDS, NAN, Case, Pool, check_close  # noqa: E402


def make_case(*contexts: int, group: int = 4, kv_heads: int = 1, page: int = 64) -> Case:
    return Case(contexts, group, kv_heads, head_dim=128, page=page)


# case, SMs, stages: shares are SMs // KV heads
CASES = {
    "rows of one token, none, whole pages, cut by 5 shares": (make_case(1, 0, 64, 65, 700, 127, 0, 256), 5, 2),
    "pages of two tiles, two KV heads": (make_case(1, 0, 64, 65, 700, 129, 0, 256, kv_heads=2, page=128), 6, 2),
    "more shares than tiles": (make_case(40, 0, 3, 70, group=1), 64, 2),
    "one share, nothing cut": (make_case(40, 170, 0, group=2), 1, 2),
    "a row over all of 9 shares, three stages": (make_case(1500, group=5), 9, 3),
    "no context at all": (make_case(0, 0, group=8), 3, 2),
    "a row whose last tile alone is in the next share": (make_case(576, 512, group=1), 2, 2),
    "more rows than are summed up at once": (make_case(*(3, 0, 40) * 90, 100, group=2), 7, 2),
    "long rows in one share, group 8": (make_case(1000, 65, 1, 640, group=8), 1, 3),
    "group 20": (make_case(70, 300, group=20), 3, 2),
}


def run_case(case: Case, num_sms: int, stages: int) -> None:
    pool, kernel = Pool(case), EmulatedKernel(hopper_module._ring_kernel)
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts
    out = torch.full(pool.q.shape, NAN, dtype=case.dtype)
    with mock.patch.object(hopper_module, "_ring_kernel", kernel):
        paged_decode_ring(*arguments, max(case.contexts), num_sms=num_sms, ring=RingShape(stages, 1), out=out)
    check_close(out, paged_decode_reference(*arguments), BOUNDS[case.dtype])


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    return results_of("tests.cpu.test_decode_hopper")


@pytest.mark.parametrize("name", CASES)
def test_emulated_kernel_matches_float64(name: str, results: dict[str, str | None]) -> None:
    assert results[name] is None, f"emulated:\n{results[name]}"


# -- compiled for Hopper, run on none


def make_inputs(group: int, page: int, dtype: torch.dtype, rows: int = 64, layer: int = 5) -> list[torch.Tensor]:
    """q, key and value pages, tables, contexts; views whose data begin anywhere, as the engine's do."""
    meta: dict[str, Any] = {"device": "meta"}
    pages = torch.empty(1000 + rows, 36, 2, page, 8, 128, dtype=dtype, **meta)
    q = torch.empty(rows, (group + 2) * 8, 128, dtype=dtype, **meta)[:, : group * 8]
    tables = torch.empty(1 + rows, 15 + rows, dtype=torch.int32, **meta)[1:]
    contexts = torch.empty(1 + rows, dtype=torch.int32, **meta)[1:]
    return [q, pages[:, layer, 0], pages[:, layer, 1], tables, contexts]


def compiled(group: int, page: int, dtype: torch.dtype, ring: RingShape) -> list[CompileReport]:
    q, *others = make_inputs(group, page, dtype)
    return compile_launches(90, lambda: paged_decode_ring(q, *others, 1000, num_sms=44, ring=ring, pdl=True))


@pytest.mark.parametrize("ring", [RingShape(), RingShape(3, 2)])
@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("group", [2, 4, 5, 8])
def test_all_programs_fit_an_sm(group: int, page: int, ring: RingShape) -> None:
    kernel, join = compiled(group, page, torch.float16 if group == 5 else torch.bfloat16, ring)
    assert_fits(kernel)
    assert_fits(join)
    programs = ring.programs_per_sm
    assert programs * (kernel.shared_bytes + 1024) <= SHARED_LIMIT_BYTES[90] + 1024  # each block costs 1 KiB more
    assert kernel.num_warps == 8 and programs * kernel.num_warps * 32 * kernel.registers <= 65536
    assert kernel.shared_bytes >= ring.num_stages * 2 * 64 * 128 * 2
    assert "cp.async.bulk.tensor" in kernel.ptx and "wgmma.mma_async" in kernel.ptx


def test_a_kernel_that_tells_its_sms_fits_as_well() -> None:
    """As a test launches it on a partition, to see where it runs."""
    q, *others = make_inputs(2, 64, torch.bfloat16)
    sm_ids = torch.empty(count_shares(132, RingShape(), 8), 8, dtype=torch.int32, device="meta")
    plain, told = (
        compile_launches(90, lambda: paged_decode_ring(q, *others, 1000, num_sms=132, pdl=True, sm_ids=ids))[0]  # noqa: B023
        for ids in (None, sm_ids)
    )
    assert_fits(told)
    assert 3 * told.num_warps * 32 * told.registers <= 65536 and told.shared_bytes == plain.shared_bytes
    ahead, behind = told.ptx.split("griddepcontrol.wait")
    assert "%smid" in behind and "%smid" not in ahead and "%smid" not in plain.ptx


def test_every_arrival_is_behind_a_barrier_of_all_warps() -> None:
    """One thread says that a tile is read, for all four warps."""
    kernel, _ = compiled(4, 64, torch.bfloat16, RingShape())
    lines = [line.strip() for line in kernel.ptx.splitlines() if line.strip()]
    arrivals = [i for i, line in enumerate(lines) if "mbarrier.arrive.shared" in line]
    assert len(arrivals) == 5  # the first scores, the next ones, a product, the query, the last product
    for i in arrivals:
        since = [line for line in lines[:i] if line.startswith(("bar.sync", "wgmma", "@!complete"))]
        assert since[-1].startswith("bar.sync"), lines[i - 20 : i + 1]


def test_no_run_time_value_compiles_a_variant() -> None:
    def launch_all() -> None:
        for rows, layer, num_sms in ((1, 0, 28), (16, 3, 44), (17, 35, 132), (640, 16, 60)):
            q, *others = make_inputs(4, 64, torch.bfloat16, rows, layer)
            paged_decode_ring(q, *others, 1000 + rows, num_sms=num_sms, pdl=True)

    reports = compile_launches(90, launch_all)
    assert len(reports) == 8 and len({each.hash for each in reports}) == 2


# -- where it is taken


def make_pages(page: int = 64, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(10, 2, 2, page, 8, head_dim, dtype=dtype, device="meta")[:, 1, 0]


def test_pages_that_fit() -> None:
    assert all(pages_fit_ring(make_pages(page)) for page in (64, 128, 256))
    assert pages_fit_ring(make_pages(dtype=torch.float16))
    assert not any(pages_fit_ring(make_pages(page)) for page in (16, 32))
    assert not pages_fit_ring(make_pages(head_dim=64))
    assert not pages_fit_ring(make_pages(dtype=torch.float32))
    heads_outermost = torch.empty(10, 8, 64, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    assert not pages_fit_ring(heads_outermost)


@pytest.mark.parametrize(
    "hopper, num_sms, page, kernels",
    [
        (True, 44, 64, ["_ring_kernel", "_join_kernel"]),
        (True, 44, 32, ["_decode_kernel"]),
        (True, None, 64, ["_decode_kernel"]),
        (False, 44, 64, ["_decode_kernel"]),
    ],
)
def test_partitions_of_hopper_take_it(
    hopper: bool, num_sms: int | None, page: int, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "is_hopper", lambda device: hopper)
    q, k_pages, v_pages, tables, contexts = make_inputs(4, page, torch.bfloat16)
    meta = DecodeMetadata(
        context_lens=contexts, slot_mapping=contexts.long(), block_tables=tables, max_context_tokens=1000
    )
    attention = TritonAttention(128, num_sms)
    reports = compile_launches(90, lambda: attention.decode(q, k_pages, v_pages, meta))
    assert [each.name for each in reports] == kernels


def main() -> None:
    run_checks({name: partial(run_case, *case) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
