"""Decode through a ring of tiles on a Hopper card, against float64 on random inputs; past a context pages hold NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper card", allow_module_level=True)

from nanovllm.kernels.paged_decode import paged_decode, paged_decode_reference  # noqa: E402
from nanovllm.kernels.paged_decode_hopper import paged_decode_ring  # noqa: E402
from nanovllm.kernels.paged_prefill import store_kv  # noqa: E402
from tests.cpu.test_attention_kernels import Case, Pool, check_close  # noqa: E402
from tools.captured import capture  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_inputs")

BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
SMS = (132, 60, 44, 28, 1)  # what the work is cut for; the kernel is right wherever it runs
GIB = 1 << 30
SHAPES = [  # each costs seconds of compiling
    (torch.bfloat16, 4, 8, 64),
    (torch.bfloat16, 5, 8, 128),
    (torch.bfloat16, 2, 8, 64),
    (torch.bfloat16, 8, 1, 256),
    (torch.float16, 4, 8, 64),
    (torch.float16, 16, 2, 64),
]


def uneven_contexts(rows: int) -> tuple[int, ...]:
    """A long one, one token, none, around a tile and a page, and random ones."""
    fixed = [2001, 1, 0, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256, 0]
    return tuple((fixed + [int(n) for n in torch.randint(0, 2000, (rows,))])[:rows])


def check_decode(pool: Pool, num_sms: int, **options: bool) -> None:
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts
    out = torch.full(pool.q.shape, float("nan"), dtype=pool.case.dtype, device="cuda")
    paged_decode_ring(*arguments, max(pool.case.contexts), num_sms=num_sms, out=out, **options)
    check_close(out, paged_decode_reference(*arguments), BOUNDS[pool.case.dtype])


@pytest.mark.parametrize("dtype, group, kv_heads, page", SHAPES)
def test_decode(dtype: torch.dtype, group: int, kv_heads: int, page: int) -> None:
    """Fewer rows than shares and more, from one that is cut into many to many that one share holds."""
    for rows in (1, 14, 60):
        pool = Pool(Case(uneven_contexts(rows), group, kv_heads, 128, page, dtype), "cuda")
        for num_sms in SMS:
            check_decode(pool, num_sms)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("contexts", [(32768, 31, 20001), (0,) * 5, (1,) * 300, (0, 300) + (17,) * 700], ids=len)
def test_extreme_batches(contexts: tuple[int, ...], pdl: bool) -> None:
    pool = Pool(Case(contexts, 4, 8, 128, 64, torch.bfloat16), "cuda")
    for num_sms in SMS:
        check_decode(pool, num_sms, pdl=pdl)


def test_a_row_of_nan_spoils_no_other() -> None:
    pool = Pool(Case((500, 300, 700), 4, 8, 128, 64, torch.bfloat16), "cuda")
    pool.q[1] = float("nan")
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts
    exact = paged_decode_reference(*arguments)
    for num_sms in SMS:
        out = paged_decode_ring(*arguments, 700, num_sms=num_sms)
        check_close(out[::2], exact[::2], 8e-3)
        assert bool(out[1].isnan().all())


@pytest.mark.parametrize("rows, num_sms", [(2, 132), (6, 28), (6, 1)])
def test_a_graph_is_right_at_every_length(rows: int, num_sms: int) -> None:
    """Captured at one length, replayed at others up to the last token that the tables hold."""
    pool = Pool(Case((1600,) * rows, 4, 8, 128, 64, torch.bfloat16), "cuda")
    q, contexts, tables = pool.q.contiguous(), torch.full_like(pool.contexts, 3), pool.tables.clone()
    arguments = q, pool.k_pages, pool.v_pages, tables, contexts

    def step() -> Tensor:
        return paged_decode_ring(*arguments, 1600, num_sms=num_sms)

    graph, out = capture(step)
    for lengths in ([1600] * rows, [0] * rows, [1, 1599, 64, 65, 0, 777][:rows], [500 - row for row in range(rows)]):
        contexts.copy_(torch.tensor(lengths))
        tables.copy_(pool.tables.roll(1, 0))
        q.normal_()
        out.fill_(float("nan"))
        graph.replay()
        check_close(out, paged_decode_reference(*arguments), 8e-3)


def test_many_launches_in_a_row_give_the_same() -> None:
    """Each starts while the one before still runs, and all use the same memory for what they cut."""
    pool = Pool(Case(uneven_contexts(40), 4, 8, 128, 64, torch.bfloat16), "cuda")
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts
    outs = [paged_decode_ring(*arguments, 2001, num_sms=60) for _ in range(200)]
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
    check_close(paged_decode(*arguments, 2001), outs[0].double(), 1e-2)


def test_block_ids_at_the_top_of_a_100_gb_pool() -> None:
    """Qwen3-8B's layout. Memory is as found: whatever lies past a context is rubbish."""
    block_shape = (36, 2, 64, 8, 128)
    block_bytes = 2 * torch.Size(block_shape).numel()
    num_blocks = 100 * 10**9 // block_bytes
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < num_blocks * block_bytes + 2 * GIB:
        pytest.skip("needs 102 GB of free GPU memory")
    pages = torch.empty(num_blocks, *block_shape, dtype=torch.bfloat16, device="cuda")
    contexts, columns = (1000, 64, 129), 16
    tables = (num_blocks - 1 - torch.randperm(3 * columns, device="cuda")).view(3, columns).int()
    context_lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    for layer in (0, 35):
        k_pages, v_pages = pages[:, layer, 0], pages[:, layer, 1]
        k, v = torch.randn(2, sum(contexts), 8, 128, device="cuda").bfloat16()
        token = torch.cat([torch.arange(context, device="cuda") for context in contexts])
        row = torch.arange(3, device="cuda").repeat_interleave(context_lens)
        store_kv(k, v, k_pages, v_pages, tables[row, token // 64].long() * 64 + token % 64)
        q = torch.randn(3, 32, 128, device="cuda").bfloat16()
        out = paged_decode_ring(q, k_pages, v_pages, tables, context_lens, 1024)
        check_close(out, paged_decode_reference(q, k_pages, v_pages, tables, context_lens), 8e-3)
