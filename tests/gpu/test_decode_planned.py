"""Decode attention by a plan on a real GPU, against float64 on random inputs; past a context pages hold NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from nanovllm.kernels.decode_plan import COUNT, ROW, DecodePlan, plan_decode  # noqa: E402
from nanovllm.kernels.paged_decode import paged_decode, paged_decode_reference  # noqa: E402
from nanovllm.kernels.paged_decode_planned import paged_decode_planned  # noqa: E402
from tests.cpu.test_attention_kernels import Case, Pool, check_close  # noqa: E402
from tools.captured import capture  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_inputs")

BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 1e-5}
SHAPES = [  # each costs seconds of compiling
    (torch.bfloat16, 4, 8, 128, 64),
    (torch.bfloat16, 2, 8, 128, 16),
    (torch.float16, 5, 2, 64, 256),
    (torch.float32, 4, 2, 128, 64),
]
BOUND_TOKENS, REPEATS = 40960, 200


def uneven_contexts(rows: int) -> tuple[int, ...]:
    """A long one, none, around a tile and a page, and short ones."""
    fixed = [3001, 1, 0, 63, 64, 65, 1000]
    return tuple((fixed + [int(n) for n in torch.randint(0, 300, (rows,))])[:rows])


def plan_of(pool: Pool, contexts: Tensor) -> DecodePlan:
    """As in a captured step, which knows but a bound of the lengths; last rows first. Between plan and attention lies a
    kernel that is launched as usual, so that an early launch may read the plan ahead of its wait."""
    order = torch.arange(len(contexts), dtype=torch.int32, device=contexts.device).flip(0)
    heads = {"num_kv_heads": pool.case.kv_heads, "head_dim": pool.case.head_dim}
    plan = plan_decode(contexts, order, BOUND_TOKENS, dtype=pool.case.dtype, **heads)  # type: ignore[arg-type]
    plan.arrived.add_(0)
    return plan


def most_items_of_a_row(plan: DecodePlan) -> int:
    return int(plan.items[COUNT.value][plan.items[ROW.value] >= 0].max())


@pytest.mark.parametrize("dtype, group, kv_heads, head_dim, page", SHAPES)
def test_decode(dtype: torch.dtype, group: int, kv_heads: int, head_dim: int, page: int) -> None:
    """Batches whose even rows would be split, and others; each as two layers of a step."""
    for rows in (5, 16, 70, 150):
        pool = Pool(Case(uneven_contexts(rows), group, kv_heads, head_dim, page, dtype), "cuda")
        plan = plan_of(pool, pool.contexts)
        assert most_items_of_a_row(plan) > 2
        exact = paged_decode_reference(pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts)
        for pdl in (None, False):
            out = torch.full(pool.q.shape, float("nan"), dtype=dtype, device="cuda")
            paged_decode_planned(pool.q, pool.k_pages, pool.v_pages, pool.tables, plan, out=out, pdl=pdl)
            check_close(out, exact, BOUNDS[dtype])
        assert not plan.arrived.any()


def test_even_rows_are_what_they_are_without_a_plan() -> None:
    """Undivided, bit for bit."""
    for rows in (40, 70, 280):
        pool = Pool(Case((300,) * rows, kv_heads=8, head_dim=128, page=64, dtype=torch.bfloat16), "cuda")
        arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables
        plan = plan_of(pool, pool.contexts)
        assert most_items_of_a_row(plan) == 1
        assert torch.equal(paged_decode_planned(*arguments, plan), paged_decode(*arguments, pool.contexts, 300))


@pytest.mark.parametrize("rows", [8, 70])
def test_whoever_comes_last_the_sum_is_the_same(rows: int) -> None:
    """Parts are added in their order. One that was read before it was written would show: parts of several calls lie in
    the same memory, and two queries take turns."""
    pool = Pool(Case(uneven_contexts(rows), kv_heads=8, head_dim=128, page=64, dtype=torch.bfloat16), "cuda")
    queries, pages_and_tables = (pool.q, torch.randn_like(pool.q)), (pool.k_pages, pool.v_pages, pool.tables)
    plan = plan_of(pool, pool.contexts)
    firsts = [paged_decode_planned(q, *pages_and_tables, plan) for q in queries]
    assert not torch.equal(*firsts)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS // 2):
        for q, first in zip(queries, firsts, strict=True):
            differing += (paged_decode_planned(q, *pages_and_tables, plan) != first).any()
    assert int(differing) == 0


@pytest.mark.parametrize("rows", [8, 40])
def test_a_graph_is_right_at_every_length(rows: int) -> None:
    """Plan and three layers, captured at one length; replayed at others, even and uneven, up to the tables' end."""
    longest = 4000
    case = Case((longest,) * rows, kv_heads=8, head_dim=128, page=64, dtype=torch.bfloat16)
    pool = Pool(case, "cuda")
    contexts, q = torch.full_like(pool.contexts, 3), pool.q.contiguous()
    arguments = q, pool.k_pages, pool.v_pages, pool.tables

    def step() -> list[Tensor]:
        plan = plan_of(pool, contexts)
        return [paged_decode_planned(*arguments, plan) for _ in range(3)]

    graph, outs = capture(step)
    short = [int(n) for n in torch.randint(0, 200, (rows,))]
    falling = [500 - row for row in range(rows)]
    for lengths in ([longest] * rows, [0] * rows, [longest, *short[1:]], [*short[1:], longest - 1], falling):
        contexts.copy_(torch.tensor(lengths))
        q.normal_()
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        exact = paged_decode_reference(*arguments, contexts)
        for out in outs:
            check_close(out, exact, 8e-3)
