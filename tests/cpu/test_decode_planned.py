"""Decode attention by a plan, without a GPU: the plan against plain Python, attention against float64 and its twin.

Both kernels run in Triton's interpreter (tests/cpu/interpreted.py) and are compiled for sm_90.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)

from nanovllm.kernels import decode_plan, paged_decode_planned  # noqa: E402
from nanovllm.kernels.decode_plan import (  # noqa: E402
    MIN_PLANNED_ROWS,
    DecodePlan,
    count_items,
    count_pieces,
    min_part_tokens,
    plan_decode,
    plan_reference,
)
from nanovllm.kernels.paged_decode import choose_num_splits, paged_decode, paged_decode_reference  # noqa: E402
from nanovllm.layers.attention import triton as triton_backend  # noqa: E402
from nanovllm.layers.attention.triton import TritonAttention  # noqa: E402
from tests.cpu.compile_check import CompileReport, assert_fits, compile_launches  # noqa: E402
from tests.cpu.interpreted import results_of, run_checks  # noqa: E402
from tests.cpu.test_attention_kernels import BOUNDS, Case, Pool, check_close  # noqa: E402

NUM_SMS, KV_HEADS, HEAD_DIM = 132, 8, 128  # an H200 and Qwen3
BOUND_TOKENS = 40960  # of max_model_len, what a captured step knows of its lengths
Items = list[tuple[int, int, int, int, int]]

# -- what runs in the interpreter

PLANS: dict[str, tuple[list[int], int, int]] = {  # contexts, splits of a row of an even batch, SMs
    "one-row": ([700], 1, 2),
    "one-long-row": ([3000] + [20] * 7, 1, 4),
    "split-and-one-long-row": ([1400, 64, 65, 1, 0, 63], 3, 4),
    "even": ([1024] * 6, 2, 4),
    "all-empty": ([0] * 6, 1, 4),
    "more-rows-than-a-program-sees": ([5] * 150 + [0] * 10 + [2900] + [7] * 99, 1, 3),
}
DECODE_CASES = {
    "one-long-row": (Case((20, 1601, 33, 20, 0, 64)), 1),
    "split": (Case((1, 700, 0, 64, 65, 128), group=5, page=32), 3),
    "split-float32-dim128": (Case((300, 129, 2), head_dim=128, page=64, dtype=torch.float32, kv_heads=1), 2),
    "whole-rows-of-group1": (Case((70, 90, 80, 100, 1, 0), group=1, page=16), 1),
    "all-empty": (Case((0, 0, 0, 0, 0)), 2),
}


def make_plan(case: Case, pool: Pool, num_splits: int, order: torch.Tensor | None) -> DecodePlan:
    heads = {"num_kv_heads": case.kv_heads, "head_dim": case.head_dim}
    options = {"dtype": case.dtype, "num_sms": case.kv_heads * 2, "num_splits": num_splits}
    return plan_decode(pool.contexts, order, max(case.contexts), **heads, **options)  # type: ignore[arg-type]


def run_plan(contexts: list[int], num_splits: int, num_sms: int) -> None:
    lengths = torch.tensor(contexts, dtype=torch.int32)
    order = lengths.argsort(descending=True, stable=True).int() if len(contexts) % 2 == 0 else None
    options = {"num_kv_heads": 2, "head_dim": 128, "num_sms": num_sms, "num_splits": num_splits}
    plan = plan_decode(lengths, order, max(contexts), dtype=torch.float16, **options)  # type: ignore[arg-type]
    rows = list(range(len(contexts))) if order is None else order.tolist()
    pieces = count_pieces(len(contexts), num_splits, 2, num_sms)
    expected = plan_reference(contexts, rows, pieces, min_part_tokens(num_splits), plan.tiles.tile_tokens)
    got = list(zip(*plan.items.tolist(), strict=True))
    assert got[: len(expected)] == expected, (got, expected)
    assert all(item[0] == -1 and item[3] == item[4] for item in got[len(expected) :]), got
    assert plan.arrived.shape == (len(contexts), 2) and not plan.arrived.any()


def run_decode(case: Case, num_splits: int) -> None:
    """Twice, as two layers of a step: the second finds the counts as the first did."""
    pool = Pool(case)
    plan = make_plan(case, pool, num_splits, torch.randperm(len(case.contexts)).int())
    assert (plan.items[decode_plan.COUNT.value] > 1).any() == (max(case.contexts) > 128), "the case divides nothing"
    for _ in range(2):
        out = torch.full(pool.q.shape, float("nan"), dtype=case.dtype)
        paged_decode_planned.paged_decode_planned(pool.q, pool.k_pages, pool.v_pages, pool.tables, plan, out=out)
        exact = paged_decode_reference(pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts)
        check_close(out, exact, BOUNDS[case.dtype])
    assert not plan.arrived.any(), "the counts are not left as they were found"


def run_even() -> None:
    """Undivided, the twin's results bit for bit."""
    case = Case((130,) * 5)
    pool = Pool(case)
    plan = make_plan(case, pool, 1, None)
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables
    planned = paged_decode_planned.paged_decode_planned(*arguments, plan)
    assert torch.equal(planned, paged_decode(*arguments, pool.contexts, 130, num_splits=1, tiles=plan.tiles))


def run_backend() -> None:
    """From `planned` to `decode`, rows in their order; with few rows, or on a partition, without a plan."""
    pool = Pool(Case((900, 3, 65, 2, 0, 128)))
    order = [0, 5, 2, 1, 3, 4]
    backend, meta = TritonAttention(64), replace(pool.decode_meta(), row_order=torch.tensor(order, dtype=torch.int32))
    planned = backend.planned(meta, pool.k_pages)
    assert planned.plan is not None and replace(planned, plan=None) == meta
    assert [row for row in dict.fromkeys(planned.plan.items[decode_plan.ROW.value].tolist()) if row >= 0] == order
    assert TritonAttention(64, num_sms=1).planned(meta, pool.k_pages) is meta
    exact = paged_decode_reference(pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts)
    for taker, given, takes_plan in (
        (backend, planned, True),
        (backend, meta, False),
        (TritonAttention(64, num_sms=1), planned, False),
    ):
        with mock.patch.object(triton_backend, "paged_decode_planned", wraps=triton_backend.paged_decode_planned) as by:
            check_close(taker.decode(pool.q, pool.k_pages, pool.v_pages, given), exact, 2e-3)
        assert by.called == takes_plan
    few = Pool(Case((5,) * (MIN_PLANNED_ROWS - 1)))
    assert TritonAttention(64).planned(few.decode_meta(), few.k_pages).plan is None


INTERPRETED: dict[str, Callable[[], None]] = {
    **{f"plan-{name}": partial(run_plan, *each) for name, each in PLANS.items()},
    **{f"decode-{name}": partial(run_decode, *each) for name, each in DECODE_CASES.items()},
    "even": run_even,
    "backend": run_backend,
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return results_of("tests.cpu.test_decode_planned")


@pytest.mark.parametrize("name", INTERPRETED)
def test_in_the_interpreter(interpreted: dict[str, str | None], name: str) -> None:
    assert interpreted[name] is None, interpreted[name]


# -- how work is divided


def plan_of(contexts: list[int], num_splits: int | None = None) -> tuple[Items, int]:
    """(items, M) of an H200, longest rows first."""
    rows = len(contexts)
    splits = num_splits or choose_num_splits(rows * KV_HEADS, BOUND_TOKENS, NUM_SMS)
    pieces = count_pieces(rows, splits, KV_HEADS, NUM_SMS)
    order = sorted(range(rows), key=lambda row: -contexts[row])
    tile_tokens = 32 if splits > 1 else 64
    items = plan_reference(contexts, order, pieces, min_part_tokens(splits), tile_tokens)
    return items, count_items(rows, pieces)


def lengths(items: Items) -> list[int]:
    return [end - begin for *_, begin, end in items]


@pytest.mark.parametrize("rows, tokens", [(24, 1024), (32, 1024), (64, 1024), (64, 4096), (256, 1024), (512, 512)])
def test_even_batches_stay_whole(rows: int, tokens: int) -> None:
    items, num_items = plan_of([tokens] * rows)
    assert len(items) == rows and set(lengths(items)) == {tokens}
    assert (num_items - rows) * KV_HEADS <= NUM_SMS * 2, "programs that end at once are no more than fit at once"


def test_somewhat_uneven_batches_stay_whole() -> None:
    rng = random.Random(0)
    for rows in (64, 256):
        assert len(plan_of([rng.randint(100, 2000) for _ in range(rows)])[0]) == rows


@pytest.mark.parametrize("rows, splits, tokens", [(8, 4, 256), (16, 2, 512)])
def test_small_even_batches_are_split_as_without_a_plan(rows: int, splits: int, tokens: int) -> None:
    items, _ = plan_of([1024] * rows)
    assert choose_num_splits(rows * KV_HEADS, BOUND_TOKENS, NUM_SMS) == splits
    assert len(items) == rows * splits and set(lengths(items)) == {tokens}


@pytest.mark.parametrize(
    "long_rows, rows, most_tokens", [(1, 8, 1152), (1, 24, 3776), (1, 64, 2048), (1, 256, 4992), (4, 256, 7936)]
)
def test_long_rows_are_read_by_many_programs(long_rows: int, rows: int, most_tokens: int) -> None:
    """No program reads more than its even share of the card's 264, or two even rows."""
    contexts = [32768] * long_rows + [512] * (rows - long_rows)
    items, _ = plan_of(contexts)
    share = sum(contexts) * KV_HEADS / (NUM_SMS * 2)
    assert max(lengths(items)) <= most_tokens <= max(share, 2 * sum(contexts) / rows) + 64
    assert sum(lengths(items)) == sum(contexts)


@pytest.mark.parametrize("rows", [5, 8, 16, 24, 33, 64, 256, 512])
def test_the_grid_has_room_for_any_lengths(rows: int) -> None:
    """Each item is part of one row, whole tiles but for the row's end, and none but a row without context is empty."""
    rng = random.Random(rows)
    longest = [1, 100, 4096, BOUND_TOKENS]
    for seed in range(60):
        skew = rng.choice([1.0, 4.0, 20.0])
        contexts = [int(longest[seed % 4] * rng.random() ** skew) for _ in range(rows)]
        items, num_items = plan_of(contexts)
        assert len(items) <= num_items
        assert sum(lengths(items)) == sum(contexts) and {item[0] for item in items} == set(range(rows))
        assert all(end > begin or contexts[row] == 0 for row, _, _, begin, end in items)
        for i, (row, first, count, begin, end) in enumerate(items):
            assert items[first][0] == row == items[first + count - 1][0] and first <= i < first + count
            assert (begin, end) == (0, contexts[row]) or begin % 32 == 0 and end > begin


# -- compiled for Hopper, run on none

MODELS = {"8b": (32, 8, 128), "14b": (40, 8, 128), "0.6b": (16, 8, 128), "group1-dim64": (8, 8, 64)}


def launch(model: str, page: int, dtype: torch.dtype, rows: int, num_splits: int | None = None, first: int = 0) -> None:
    heads, kv_heads, head_dim = MODELS[model]
    pages = torch.empty(1000, 4, 2, page, kv_heads, head_dim, dtype=dtype, device="meta")
    k_pages, v_pages = pages[:, 1, 0], pages[:, 1, 1]
    numbers = torch.empty(first + rows, dtype=torch.int32, device="meta")[first:]
    tables = torch.empty(first + rows, 33, dtype=torch.int32, device="meta")[first:]
    q = torch.empty(rows, heads + 2 * kv_heads, head_dim, dtype=dtype, device="meta")[:, :heads]
    options = {"num_kv_heads": kv_heads, "head_dim": head_dim, "num_sms": NUM_SMS, "num_splits": num_splits}
    plan = plan_decode(numbers, numbers, BOUND_TOKENS, dtype=dtype, **options)  # type: ignore[arg-type]
    paged_decode_planned.paged_decode_planned(q, k_pages, v_pages, tables, plan)
    twin = {"num_sms": NUM_SMS, "num_splits": plan.even_splits, "tiles": plan.tiles, "row_order": numbers}
    paged_decode(q, k_pages, v_pages, tables, numbers, BOUND_TOKENS, **twin)  # type: ignore[arg-type]


def fit_at_once(report: CompileReport) -> int:
    """Programs on an SM: 65,536 registers, given by 256 to a warp, and 227 KiB with one of them for each program."""
    warp_registers = -(-report.registers * 32 // 256) * 256
    return min(65536 // (warp_registers * report.num_warps), (228 << 10) // (report.shared_bytes + 1024))


@pytest.mark.parametrize(
    "model, page, dtype",
    [
        ("8b", 64, torch.bfloat16),
        ("8b", 16, torch.bfloat16),
        ("14b", 256, torch.bfloat16),
        ("0.6b", 64, torch.float32),
        ("0.6b", 64, torch.bfloat16),
        ("group1-dim64", 32, torch.float16),
    ],
)
def test_kernels_fit_as_often_as_the_twin(model: str, page: int, dtype: torch.dtype) -> None:
    for rows in (8, 24, 64, 256):
        plan, planned, twin, *_ = compile_launches(90, partial(launch, model, page, dtype, rows))
        assert [each.name for each in (plan, planned, twin)] == ["_plan_kernel", "_planned_kernel", "_decode_kernel"]
        for each in (plan, planned):
            assert_fits(each)
        assert fit_at_once(planned) >= fit_at_once(twin), (planned.registers, twin.registers)
        assert planned.shared_bytes <= twin.shared_bytes


def test_parts_are_written_before_they_are_counted_and_read_past_l1() -> None:
    for rows in (8, 64):
        planned = compile_launches(90, partial(launch, "8b", 64, torch.bfloat16, rows))[1]
        before, after = planned.ptx.split("atom.global.gpu.acq_rel.add")
        assert before.rindex("bar.sync") > before.rindex("st.global"), "a part may be counted ahead of its last stores"
        loads = [line for line in after.splitlines() if "ld.global" in line]
        assert loads and all("ld.global.cg" in line for line in loads), loads
        assert after.index("bar.sync") < after.index("ld.global"), "threads do not wait for the count"


def test_no_run_time_value_compiles_a_variant() -> None:
    for shapes in (((8, 2, 0), (16, 2, 16), (23, 3, 3), (17, 2, 1)), ((50, 1, 0), (80, 1, 16), (127, 1, 5))):
        reports = [compile_launches(90, partial(launch, "8b", 64, torch.bfloat16, *shape))[:2] for shape in shapes]
        for kernels in zip(*reports, strict=True):
            assert len({each.hash for each in kernels}) == 1, kernels[0].name


def test_nothing_is_touched_before_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for tables and plan, which are read."""
    monkeypatch.setattr(paged_decode_planned, "has_pdl", lambda device: True)
    for rows, waits in ((8, True), (64, False)):
        planned = compile_launches(90, partial(launch, "8b", 64, torch.bfloat16, rows))[1]
        ahead, *behind = planned.ptx.split("griddepcontrol.wait")
        assert len(behind) == waits
        assert not waits or ("st.global" not in ahead and "atom" not in ahead and "bra" not in ahead)


if __name__ == "__main__":
    run_checks(INTERPRETED)
