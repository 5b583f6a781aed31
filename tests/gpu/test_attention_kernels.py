"""The attention kernels on a real GPU, against float64 on fresh random inputs; pages past a context hold NaN."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", exc_type=ImportError)
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from nanovllm.kernels.paged_decode import count_sms, paged_decode, paged_decode_reference  # noqa: E402
from nanovllm.kernels.paged_prefill import paged_prefill, paged_prefill_reference, store_kv, store_kv_reference  # noqa: E402
from nanovllm.layers.attention.flash_attn import FlashAttention, find_module  # noqa: E402
from nanovllm.layers.attention.triton import TritonAttention  # noqa: E402
from tests.cpu.test_attention_kernels import Case, Pool, check_close  # noqa: E402
from tools.captured import capture  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_inputs")

# TF32, were it used for float32, would err by 3e-4.
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 1e-5}
# dtype, query heads a KV head, KV heads, head dim, page tokens. Each costs seconds of compiling.
SHAPES = [
    (torch.bfloat16, 4, 8, 128, 64),
    (torch.bfloat16, 4, 8, 128, 16),
    (torch.bfloat16, 2, 8, 128, 128),
    (torch.bfloat16, 5, 8, 128, 256),
    (torch.bfloat16, 8, 1, 128, 32),
    (torch.bfloat16, 1, 4, 64, 64),
    (torch.bfloat16, 4, 8, 64, 128),
    (torch.float16, 5, 2, 64, 16),
    (torch.float16, 2, 8, 128, 64),
    (torch.float32, 4, 2, 128, 16),
    (torch.float32, 1, 2, 64, 64),
]
ALL_SHAPES = [
    pytest.param(*each, marks=() if each in SHAPES else pytest.mark.slow)
    for each in itertools.product(BOUNDS, (1, 2, 4, 5, 8), (2, 8), (64, 128), (16, 32, 64, 128, 256))
] + [pytest.param(*each) for each in SHAPES if each[2] not in (2, 8)]
SHAPE = "dtype, group, kv_heads, head_dim, page"
GIB = 1 << 30


def uneven_contexts(page: int, rows: int) -> tuple[int, ...]:
    """A long one, one token, whole pages, one more and one less, a padding row, and random ones."""
    fixed = [2001, 1, page, 4 * page, page - 1, page + 1, 0]
    return tuple((fixed + [int(n) for n in torch.randint(1, 2000, (rows,))])[:rows])


MODEL_CASE = Case(uneven_contexts(64, 9), kv_heads=8, head_dim=128, page=64, dtype=torch.bfloat16)


def check_decode(case: Case, bound: float) -> None:
    pool = Pool(case, "cuda")
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts
    out = torch.full(pool.q.shape, float("nan"), dtype=case.dtype, device="cuda")
    order = torch.randperm(len(case.contexts), device=out.device, dtype=torch.int32) if len(case.contexts) % 2 else None
    longest = max(case.contexts)
    paged_decode(*arguments, max_context_tokens=longest, row_order=order, num_splits=case.num_splits, out=out)
    check_close(out, paged_decode_reference(*arguments), bound)


@pytest.mark.parametrize(SHAPE, ALL_SHAPES)
def test_decode(dtype: torch.dtype, group: int, kv_heads: int, head_dim: int, page: int) -> None:
    """Split by the kernel's own choice (a batch of 1 and of 8), whole, and into more splits than some rows have."""
    for rows, num_splits in ((1, None), (8, None), (8, 1), (33, 5)):
        case = Case(uneven_contexts(page, rows), group, kv_heads, head_dim, page, dtype, num_splits)
        check_decode(case, BOUNDS[dtype])


def test_decode_of_a_large_batch_and_a_long_context() -> None:
    check_decode(Case(uneven_contexts(64, 300), kv_heads=8, head_dim=128, page=64, dtype=torch.bfloat16), 8e-3)
    check_decode(Case((32768, 31, 20001), kv_heads=8, head_dim=128, page=64, dtype=torch.bfloat16), 8e-3)


@pytest.mark.parametrize(SHAPE, ALL_SHAPES)
def test_prefill(dtype: torch.dtype, group: int, kv_heads: int, head_dim: int, page: int) -> None:
    """Whole contexts, chunks behind a cached prefix, single tokens; tiles of many rows and of few."""
    for query_lens, cached in (
        ((300, 1, page, 129), (0, 500, page, 77)),
        ((700,), (0,)),
        ((3, 1, 2), (0, 999, 4 * page - 2)),
    ):
        contexts = tuple(q + c for q, c in zip(query_lens, cached, strict=True))
        case = Case(contexts, group, kv_heads, head_dim, page, dtype, query_lens=query_lens)
        pool = Pool(case, "cuda")
        meta = pool.prefill_meta()
        arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, meta.cu_seqlens_q, pool.contexts
        out = torch.full(pool.q.shape, float("nan"), dtype=dtype, device="cuda")
        paged_prefill(*arguments, meta.max_query_tokens, out=out)
        check_close(out, paged_prefill_reference(*arguments), BOUNDS[dtype])


@pytest.mark.parametrize("kv_heads, head_dim, page", [(8, 128, 64), (5, 64, 16), (1, 128, 256)])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_store(dtype: torch.dtype, kv_heads: int, head_dim: int, page: int) -> None:
    qkv = torch.randn(500, 3 * kv_heads, head_dim, device="cuda").to(dtype)
    k, v = qkv[:, kv_heads : 2 * kv_heads], qkv[:, 2 * kv_heads :]
    slots = torch.randperm(40 * page, device="cuda")[:500]
    pools = [torch.zeros(40, 3, 2, page, kv_heads, head_dim, dtype=dtype, device="cuda") for _ in range(2)]
    for store, pool in zip((store_kv, store_kv_reference), pools, strict=True):
        store(k, v, pool[:, 1, 0], pool[:, 1, 1], slots)
    assert torch.equal(*pools) and int(pools[0].count_nonzero()) > 900 * kv_heads * head_dim


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
    starts = torch.tensor([0, *contexts], device="cuda").cumsum(0).int()
    for layer in (0, 35):
        k_pages, v_pages = pages[:, layer, 0], pages[:, layer, 1]
        stored_k, stored_v = torch.randn(2, sum(contexts), 8, 128, device="cuda").bfloat16()
        token = torch.cat([torch.arange(context, device="cuda") for context in contexts])
        row = torch.arange(3, device="cuda").repeat_interleave(context_lens)
        slots = tables[row, token // 64].long() * 64 + token % 64
        store_kv(stored_k, stored_v, k_pages, v_pages, slots)
        assert torch.equal(k_pages[slots // 64, slots % 64], stored_k), "keys were stored elsewhere"
        assert torch.equal(v_pages[slots // 64, slots % 64], stored_v), "values were stored elsewhere"
        q = torch.randn(sum(contexts), 32, 128, device="cuda").bfloat16()
        for num_splits in (1, 4):
            out = paged_decode(q[:3], k_pages, v_pages, tables, context_lens, 1024, num_splits=num_splits)
            check_close(out, paged_decode_reference(q[:3], k_pages, v_pages, tables, context_lens), 8e-3)
        prefill_arguments = q, k_pages, v_pages, tables, starts, context_lens
        check_close(paged_prefill(*prefill_arguments, 1000), paged_prefill_reference(*prefill_arguments), 8e-3)


@pytest.mark.parametrize("rows, num_splits", [(2, None), (6, 1), (6, 7)])
def test_a_graph_is_right_at_every_length(rows: int, num_splits: int | None) -> None:
    """Captured at one length, replayed at others up to the last token that the tables hold."""
    case = Case((1600,) * rows, kv_heads=8, head_dim=128, page=64, dtype=torch.bfloat16, num_splits=num_splits)
    pool = Pool(case, "cuda")
    q, contexts, tables = pool.q.contiguous(), torch.full_like(pool.contexts, 3), pool.tables.clone()
    arguments = q, pool.k_pages, pool.v_pages, tables, contexts

    def step() -> Tensor:
        return paged_decode(*arguments, max_context_tokens=1600, num_splits=num_splits)

    graph, out = capture(step)
    for lengths in ([1600] * rows, [0] * rows, [1, 1599, 64, 65, 0, 777][:rows], [500 - row for row in range(rows)]):
        contexts.copy_(torch.tensor(lengths))
        tables.copy_(pool.tables.roll(1, 0))
        q.normal_()
        out.fill_(float("nan"))
        graph.replay()
        check_close(out, paged_decode_reference(*arguments), 8e-3)


@pytest.mark.parametrize("page", [16, 64, 128])
def test_a_prefill_graph_is_right_for_every_batch(page: int) -> None:
    """Captured on empty sequences; replayed on whole prompts, chunks behind cached prefixes, and padding tokens."""
    size, sequences = 256, 4
    case = Case((900,) * sequences, kv_heads=8, head_dim=128, page=page, dtype=torch.bfloat16, query_lens=(64,) * 4)
    pool = Pool(case, "cuda")
    q, tables = torch.randn(size, 32, 128, device="cuda").bfloat16(), pool.tables.clone()
    starts, contexts = torch.zeros(sequences + 1, dtype=torch.int32, device="cuda"), torch.zeros_like(pool.contexts)
    arguments = q, pool.k_pages, pool.v_pages, tables, starts, contexts
    graph, out = capture(lambda: paged_prefill(*arguments, size))
    for lens, cached in (((256, 0, 0, 0), (0, 0, 0, 0)), ((64, 1, 100, 0), (836, 500, 0, 0)), ((3, 65, 64, 33),) * 2):
        used = sum(lens)
        starts.copy_(torch.tensor([0, *lens]).cumsum(0))
        contexts.copy_(torch.tensor(lens) + torch.tensor(cached))
        tables.copy_(pool.tables.roll(1, 0))
        q.normal_()
        out.fill_(float("nan"))
        graph.replay()
        exact = paged_prefill_reference(q[:used], *arguments[1:])
        check_close(out[:used], exact, 8e-3)
        assert bool(out[used:].isnan().all()), "rows of no sequence were written"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were built, or loaded from Triton's cache on disk, since the test began."""
    names: list[str] = []

    def note(*, fn: object, **_: object) -> None:
        names.append(str(getattr(fn, "name", fn)))

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    yield names


@pytest.mark.parametrize("head_dim, page", [(64, 32), (128, 64)])
def test_nothing_compiles_after_warm_up(compiled: list[str], head_dim: int, page: int) -> None:
    """One call of each variant; then odd batches, lengths, table widths and offsets into buffers."""
    # A group of its own, so that no other test has built these kernels already.
    lens = {"contexts": (900, 80, 1, 130), "query_lens": (64, 80, 1, 5)}
    pool = Pool(Case(group=3, kv_heads=2, head_dim=head_dim, page=page, **lens), "cuda")
    meta = pool.prefill_meta()

    def launch(first: int, end: int) -> None:
        starts = meta.cu_seqlens_q[first : end + 1]
        tables, contexts = pool.tables[first:end], pool.contexts[first:end]
        # The slice's own chunk offsets stay valid: they index into the whole of q.
        paged_prefill(pool.q, pool.k_pages, pool.v_pages, tables, starts, contexts, 80)
        paged_prefill(pool.q, pool.k_pages, pool.v_pages, tables, starts, contexts, 5)
        for num_splits in (1, 3):
            rows = pool.q[first:end]
            paged_decode(rows, pool.k_pages, pool.v_pages, tables, contexts, 900, num_splits=num_splits)
        kv = pool.q[: end - first, :2]
        store_kv(kv, kv, pool.k_pages.clone(), pool.v_pages.clone(), meta.slot_mapping[first:end])

    launch(0, 4)
    # Decode unsplit and split; prefill of long and of few queries, through TMA or not by the head; the store.
    counts = collections.Counter(compiled)
    assert counts["_decode_kernel"] == 2 and counts["_store_kv_kernel"] == 1, compiled
    assert counts["_prefill_kernel"] + counts["_prefill_tma_kernel"] == 2, compiled
    compiled.clear()
    for first, end in itertools.combinations(range(5), 2):
        launch(first, end)
    assert compiled == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_go_to_the_tensors_card() -> None:
    assert torch.cuda.current_device() == 0
    pool = Pool(Case((300, 70), group=4, kv_heads=2, page=64, query_lens=(4, 70)), "cuda:1")
    meta = pool.prefill_meta()
    q = pool.q[:2]
    decode_arguments = q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts
    for num_splits in (1, 2):
        out = paged_decode(*decode_arguments, max_context_tokens=300, num_splits=num_splits)
        check_close(out, paged_decode_reference(*decode_arguments), BOUNDS[torch.float16])
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, meta.cu_seqlens_q, pool.contexts
    check_close(paged_prefill(*arguments, 70), paged_prefill_reference(*arguments), BOUNDS[torch.float16])


def test_backend_passes_its_metadata_on() -> None:
    backend = TritonAttention(128)
    pool = Pool(replace(MODEL_CASE, contexts=(300, 501, 1), query_lens=(300, 1, 1)), "cuda")
    meta, pages = pool.prefill_meta(), (pool.k_pages, pool.v_pages)
    tables = pool.tables, meta.cu_seqlens_q, pool.contexts
    check_close(backend.prefill(pool.q, *pages, meta), paged_prefill_reference(pool.q, *pages, *tables), 8e-3)
    out = backend.decode(pool.q[:3], *pages, pool.decode_meta())
    check_close(out, paged_decode_reference(pool.q[:3], *pages, pool.tables, pool.contexts), 8e-3)
    backend.store_kv(pool.q[:, :8], pool.q[:, 8:16], *pages, meta.slot_mapping)
    block, offset = meta.slot_mapping // 64, meta.slot_mapping % 64
    assert torch.equal(pages[0][block, offset], pool.q[:, :8]) and torch.equal(pages[1][block, offset], pool.q[:, 8:16])


# -- FlashAttention-3, where it is installed


@pytest.fixture(scope="module")
def fa3() -> FlashAttention:
    module = find_module("flash_attn_interface")
    if module is None:
        pytest.skip("flash_attn_interface (FA3) is not installed")
    return FlashAttention(TritonAttention(128), fa3=module)


@pytest.mark.parametrize("garbage", [1e4, float("nan")], ids=["finite garbage", "NaN"])
def test_fa3_decode(fa3: FlashAttention, garbage: float) -> None:
    pool = Pool(MODEL_CASE, "cuda")
    pool.k_pages.nan_to_num_(garbage), pool.v_pages.nan_to_num_(garbage)
    out = fa3.decode(pool.q, pool.k_pages, pool.v_pages, pool.decode_meta())
    check_close(out, paged_decode_reference(pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts), 8e-3)


@pytest.mark.parametrize("garbage", [1e4, float("nan")], ids=["finite garbage", "NaN"])
def test_fa3_prefill(fa3: FlashAttention, garbage: float) -> None:
    pool = Pool(replace(MODEL_CASE, contexts=(300, 501, 128, 1), query_lens=(300, 1, 64, 1)), "cuda")
    pool.k_pages.nan_to_num_(garbage), pool.v_pages.nan_to_num_(garbage)
    meta = pool.prefill_meta()
    out = fa3.prefill(pool.q, pool.k_pages, pool.v_pages, meta)
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, meta.cu_seqlens_q, pool.contexts
    check_close(out, paged_prefill_reference(*arguments), 8e-3)


def test_sm_count_is_the_whole_cards() -> None:
    assert count_sms(torch.device("cuda", 0)) == torch.cuda.get_device_properties(0).multi_processor_count
