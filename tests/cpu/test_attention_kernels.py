"""The attention kernels without a GPU: run by Triton's interpreter against float64, and compiled for sm_90 and sm_80.

The interpreter must be chosen before Triton is imported, for the whole process: `interpreted` runs this file as
a program with it, and the tests read what it reports, one line a case. float16 and float32 only: the interpreter
computes bfloat16 wrongly. FlashAttention's modules are stand-ins here that compute what the real ones promise.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import paged_decode as decode_module
from nanovllm.kernels.paged_decode import DecodeTiles, choose_num_splits, paged_decode, paged_decode_reference
from nanovllm.kernels.paged_prefill import (
    PrefillTiles,
    choose_prefill_tiles,
    paged_prefill,
    paged_prefill_reference,
    store_kv,
    store_kv_reference,
)
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, PrefillMetadata
from nanovllm.layers.attention.flash_attn import FlashAttention, find_module
from nanovllm.layers.attention.triton import TritonAttention
from nanovllm.layers.elementwise import TorchElementwise
from tests.cpu.compile_check import assert_fits, compile_launches

BOUNDS = {torch.float16: 2e-3, torch.float32: 2e-6}  # of the interpreter
LAYERS, LAYER = 3, 1  # the pages under test are one layer of a pool of three
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """Shapes of one check. query_lens: of prefill; contexts include them. None: the kernel's own choice."""

    contexts: tuple[int, ...]
    group: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page: int = 16
    dtype: torch.dtype = torch.float16
    num_splits: int | None = None
    query_lens: tuple[int, ...] = ()
    decode_tiles: DecodeTiles | None = None
    prefill_tiles: PrefillTiles | None = None


DECODE_CASES = {
    "group1-page16": Case((1, 0, 70), group=1, kv_heads=1),
    "group2-page256-partial-pages": Case((256, 255, 257), group=2, page=256, kv_heads=1),
    "group4-dim128-page64": Case((64, 65, 128), head_dim=128, page=64, dtype=torch.float32),
    "group5-page128": Case((131, 5), group=5, page=128, decode_tiles=DecodeTiles(64, 4, 2)),
    "group8-page32-tile-of-two-pages": Case((33, 64, 100), group=8, page=32, decode_tiles=DecodeTiles(64, 4, 2)),
    "group20-above-16-rows": Case((40,), group=20, kv_heads=1),
    "split-with-empty-ones": Case((0, 1, 32, 33, 150), num_splits=4, decode_tiles=DecodeTiles(32, 4, 2)),
    "split-group5-dim128": Case(
        (97, 160), group=5, head_dim=128, page=32, dtype=torch.float32, num_splits=3, kv_heads=1
    ),
}
PREFILL_TILES = PrefillTiles(rows=32, tile_tokens=32, num_warps=4, num_stages=2)
PREFILL_CASES = {
    "group1-own-tiles": Case((70, 1), query_lens=(70, 1), group=1),
    "group2-cached-prefix": Case((50, 64, 33), query_lens=(3, 64, 1), group=2, prefill_tiles=PREFILL_TILES),
    "group4-dim128-page64": Case((64, 130), query_lens=(64, 2), page=64, head_dim=128, dtype=torch.float32, kv_heads=1),
    "group5-tiles-across-tokens": Case((40, 21), query_lens=(20, 21), group=5, prefill_tiles=PREFILL_TILES),
    "group8-tile-in-page": Case(
        (128, 129), query_lens=(9, 1), group=8, page=128, kv_heads=1, prefill_tiles=PREFILL_TILES
    ),
}


class Pool:
    """Random KV in the pages of a case; NaN wherever no context reaches, table columns past it included."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(torch.initial_seed())
        columns = max(1, -(-max(case.contexts) // case.page)) + 1
        num_blocks = columns * len(case.contexts) + 1
        block_shape = LAYERS, 2, case.page, case.kv_heads, case.head_dim
        pages = torch.full((num_blocks, *block_shape), NAN, dtype=case.dtype, device=device)
        self.k_pages, self.v_pages = pages[:, LAYER, 0], pages[:, LAYER, 1]
        ids = torch.randperm(num_blocks, generator=generator, device=device)[: num_blocks - 1]
        self.tables = ids.view(len(case.contexts), columns).int()
        self.contexts = torch.tensor(case.contexts, dtype=torch.int32, device=device)
        for row, context in enumerate(case.contexts):
            shape = 2, context, case.kv_heads, case.head_dim
            k, v = torch.randn(shape, generator=generator, device=device).to(case.dtype)
            store_kv_reference(k, v, self.k_pages, self.v_pages, self.slots(row, 0, context))
        # A view into a wider projection, as the model's query is.
        wide = sum(case.query_lens) or len(case.contexts), case.kv_heads * (case.group + 2), case.head_dim
        qkv = torch.randn(wide, generator=generator, device=device).to(case.dtype)
        self.q = qkv[:, : case.kv_heads * case.group]

    def slots(self, row: int, begin: int, end: int) -> Tensor:
        token = torch.arange(begin, end, device=self.device)
        return self.tables[row].long()[token // self.case.page] * self.case.page + token % self.case.page

    def prefill_meta(self) -> PrefillMetadata:
        lens, contexts = self.case.query_lens, self.case.contexts
        own = [self.slots(row, contexts[row] - lens[row], contexts[row]) for row in range(len(lens))]
        return PrefillMetadata(
            cu_seqlens_q=torch.tensor([0, *lens], device=self.device).cumsum(0).int(),
            context_lens=self.contexts,
            block_tables=self.tables,
            slot_mapping=torch.cat(own),
            max_query_tokens=max(lens),
            max_context_tokens=max(contexts),
            host_query_lens=lens,
            host_context_lens=contexts,
        )

    def decode_meta(self) -> DecodeMetadata:
        """As ahead of a step, bound above every context; the slots are not used here."""
        rows = len(self.case.contexts)
        slots = torch.zeros(rows, dtype=torch.int64, device=self.device)
        return DecodeMetadata(self.contexts, self.tables, slots, self.tables.shape[1] * self.case.page)


def check_close(out: Tensor, reference: Tensor, bound: float) -> None:
    """‖out − ref‖ ≤ bound · ‖ref‖ in every row of the first dim; NaN fails, and a row of zeros must be zeros."""
    error = (out.double() - reference).flatten(1).norm(dim=1)
    allowed = bound * reference.flatten(1).norm(dim=1)
    worst = (error / allowed.clamp(min=1e-30)).max().item() * bound
    assert bool((error <= allowed).all()), f"error {worst:.2e} > {bound:.0e}"


# -- what runs in the interpreter


def run_decode(case: Case) -> None:
    pool = Pool(case)
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts
    out = torch.full(pool.q.shape, NAN, dtype=case.dtype)
    paged_decode(
        *arguments,
        max_context_tokens=max(case.contexts),
        row_order=torch.randperm(len(case.contexts)).int() if len(case.contexts) % 2 else None,
        num_splits=case.num_splits,
        min_split_tokens=32,
        tiles=case.decode_tiles,
        out=out,
    )
    check_close(out, paged_decode_reference(*arguments), BOUNDS[case.dtype])


def run_prefill(case: Case) -> None:
    pool = Pool(case)
    meta = pool.prefill_meta()
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, meta.cu_seqlens_q, pool.contexts
    out = torch.full(pool.q.shape, NAN, dtype=case.dtype)
    paged_prefill(*arguments, meta.max_query_tokens, tiles=case.prefill_tiles, out=out)
    check_close(out, paged_prefill_reference(*arguments), BOUNDS[case.dtype])


def run_store() -> None:
    """Five heads of 64: no power of two. Keys and values are views into one projection."""
    wide = torch.randn(3, 7 + 5 + 5, 64)
    k, v = wide[:, 7:12], wide[:, 12:]
    slots = torch.tensor([0, 37, 16 * 4 - 1])
    pools = [torch.zeros(4, LAYERS, 2, 16, 5, 64) for _ in range(2)]
    for store, pool in zip((store_kv, store_kv_reference), pools, strict=True):
        store(k, v, pool[:, LAYER, 0], pool[:, LAYER, 1], slots)
    assert torch.equal(*pools) and pools[0].count_nonzero() == 3 * 2 * 5 * 64


def run_high_blocks() -> None:
    """Blocks past 2**31 elements of a pool of Qwen3-8B's layout. Only the pages touched take memory."""
    page, layers, kv_heads, head_dim = 64, 36, 8, 128
    block_elements = layers * 2 * page * kv_heads * head_dim
    high = 2**31 // block_elements + 2
    pages = torch.empty(high + 1, layers, 2, page, kv_heads, head_dim, dtype=torch.float16)
    k_pages, v_pages = pages[:, -1, 0], pages[:, -1, 1]
    k, v = torch.randn(2, 2, kv_heads, head_dim).half()
    tables, contexts = torch.tensor([[high]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    store_kv(k, v, k_pages, v_pages, high * page + torch.arange(2))
    assert torch.equal(k_pages[high, :2], k) and torch.equal(v_pages[high, :2], v)
    q = torch.randn(1, kv_heads, head_dim).half()
    arguments = q, k_pages, v_pages, tables
    check_close(paged_decode(*arguments, contexts, 2), paged_decode_reference(*arguments, contexts), 2e-3)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    check_close(
        paged_prefill(*arguments, starts, contexts, 1), paged_prefill_reference(*arguments, starts, contexts), 2e-3
    )


INTERPRETED: dict[str, Callable[[], None]] = {
    **{f"decode-{name}": partial(run_decode, case) for name, case in DECODE_CASES.items()},
    **{f"prefill-{name}": partial(run_prefill, case) for name, case in PREFILL_CASES.items()},
    "store": run_store,
    "high-blocks": run_high_blocks,
}


def report(check: Callable[[], None]) -> str | None:
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return None


def main() -> None:
    for name, check in INTERPRETED.items():
        torch.manual_seed(0)
        print(json.dumps([name, report(check)]), flush=True)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """Case → error, or None where it passed. A case that is missing crashed the process."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.cpu.test_attention_kernels"]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    results = dict(json.loads(line) for line in run.stdout.splitlines())
    assert results, run.stderr
    return results


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_matches_float64(interpreted: dict[str, str | None], name: str) -> None:
    assert name in interpreted, "the interpreter crashed in this case, or before it"
    assert interpreted[name] is None, interpreted[name]


# -- compiled for real cards, run on none

MODELS = {"8b": (32, 8, 128), "14b": (40, 8, 128), "0.6b": (16, 8, 128), "group1-dim64": (8, 8, 64)}


def launch_all(heads: int, kv_heads: int, head_dim: int, page: int, dtype: torch.dtype, hopper: bool) -> None:
    """Every kernel that a model can launch: store, decode split and whole, prefill of long and short chunks."""
    meta: dict[str, Any] = {"device": "meta"}
    pages = torch.empty(1000, 36, 2, page, kv_heads, head_dim, dtype=dtype, **meta)
    k_pages, v_pages = pages[:, 5, 0], pages[:, 5, 1]
    qkv = torch.empty(64, heads + 2 * kv_heads, head_dim, dtype=dtype, **meta)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    tables, contexts = torch.empty(64, 512 // 16, dtype=torch.int32, **meta), torch.empty(64, dtype=torch.int32, **meta)
    store_kv(k, v, k_pages, v_pages, torch.empty(64, dtype=torch.int64, **meta))
    for rows, num_splits in ((64, 1), (256, 1), (16, 2), (1, 4)):  # every line of the table of tiles, on an H200's SMs
        tables_of, lengths = (
            torch.empty(rows, 32, dtype=torch.int32, **meta),
            torch.empty(rows, dtype=torch.int32, **meta),
        )
        shape = torch.empty(rows, heads, head_dim, dtype=dtype, **meta), k_pages, v_pages, tables_of, lengths
        paged_decode(*shape, 512, num_splits=num_splits, num_sms=132)
    starts = torch.empty(65, dtype=torch.int32, **meta)
    for num_tokens in (512, 4):
        tiles = choose_prefill_tiles(dtype, num_tokens * heads // kv_heads, hopper)
        paged_prefill(q, k_pages, v_pages, tables, starts, contexts, num_tokens, tiles=tiles)


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize(
    "model, page, dtype",
    [
        ("8b", 64, torch.bfloat16),
        ("8b", 16, torch.bfloat16),
        ("14b", 256, torch.bfloat16),
        ("0.6b", 128, torch.float16),
        ("group1-dim64", 32, torch.bfloat16),
        ("0.6b", 64, torch.float32),
    ],
)
def test_kernels_compile_fit_and_do_not_spill(capability: int, model: str, page: int, dtype: torch.dtype) -> None:
    reports = compile_launches(capability, lambda: launch_all(*MODELS[model], page, dtype, hopper=capability == 90))
    assert len(reports) == 1 + 2 + 2 * 2 + 2
    for each in reports:
        assert_fits(each)
    if dtype != torch.float32:
        decode = next(each for each in reports if each.name == "_decode_kernel")
        assert ", 0x10," in decode.ptx and "cp.async.ca" not in decode.ptx, "KV is not loaded 16 bytes at a time"


def test_no_run_time_value_compiles_a_variant() -> None:
    """Batch, context, table width, offsets into buffers and the stride of a lone row must not matter."""
    pages = torch.empty(100, 4, 2, 64, 8, 128, dtype=torch.bfloat16, device="meta")
    k_pages, v_pages = pages[:, 1, 0], pages[:, 1, 1]

    decode = DecodeTiles(64, num_warps=4, num_stages=3)

    def launch() -> None:
        for rows, columns, first in ((1, 1, 0), (3, 16, 1), (16, 17, 16), (129, 640, 5)):
            qkv = torch.empty(rows, 48, 128, dtype=torch.bfloat16, device="meta")
            tables = torch.empty(first + rows, columns, dtype=torch.int32, device="meta")[first:]
            if columns == 1:  # one element may carry any stride
                tables = tables.as_strided((1, 1), (9, 9))
            contexts = torch.empty(first + rows + 1, dtype=torch.int32, device="meta")[first:]
            slots = torch.empty(rows, dtype=torch.int64, device="meta")
            q, k, v = qkv.split([32, 8, 8], dim=1)
            store_kv(k, v, k_pages, v_pages, slots)
            for splits in (1, 3):
                paged_decode(q, k_pages, v_pages, tables, contexts[:-1], columns * 64, num_splits=splits, tiles=decode)
            tiles = choose_prefill_tiles(q.dtype, 512, hopper=True)
            paged_prefill(q, k_pages, v_pages, tables, contexts, contexts[:-1], rows, tiles=tiles)

    reports = compile_launches(90, launch)
    assert len(reports) == 4 * 5
    assert len({each.hash for each in reports}) == 5


# -- decisions on the host


@pytest.mark.parametrize("num_programs, expected", [(512, 1), (264, 1), (64, 4), (132, 2)])
def test_splits_fill_the_card_and_no_more(num_programs: int, expected: int) -> None:
    assert choose_num_splits(num_programs, 32768, num_sms=132) == expected


def test_short_contexts_are_not_split() -> None:
    assert choose_num_splits(8, 4 * decode_module.MIN_SPLIT_TOKENS - 1, num_sms=132) == 1
    assert choose_num_splits(8, 4 * decode_module.MIN_SPLIT_TOKENS, num_sms=132) == 2
    assert choose_num_splits(8, 0, num_sms=132) == 1


@pytest.mark.parametrize("num_programs", range(1, 184, 7))
def test_the_last_wave_is_nearly_full(num_programs: int) -> None:
    """Or the splits are as many as may be."""
    slots = 132 * decode_module.PROGRAMS_PER_SM
    num_splits = choose_num_splits(num_programs, 32768, num_sms=132)
    waves = num_programs * num_splits / slots
    assert waves / math.ceil(waves) >= 0.85 or num_splits >= 0.9 * decode_module.MAX_SPLITS


# -- FlashAttention's adapter against stand-ins


class Recorder(AttentionBackend):
    """A fallback that only notes that it was asked."""

    name = "recorder"
    elementwise = TorchElementwise()

    def __init__(self) -> None:
        self.calls: list[str] = []

    def store_kv(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slot_mapping: Tensor) -> None:
        self.calls.append("store_kv")

    def prefill(
        self, q_THD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: PrefillMetadata, out: Tensor | None = None
    ) -> Tensor:
        self.calls.append("prefill")
        return q_THD

    def planned(self, meta: DecodeMetadata, k_pages: Tensor) -> DecodeMetadata:
        self.calls.append("planned")
        return meta

    def decode(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata, out: Tensor | None = None
    ) -> Tensor:
        self.calls.append("decode")
        return q_BHD


def fa3_stand_in() -> Any:
    """`flash_attn_with_kvcache` as FA3 documents it, for the keywords that the adapter may use."""

    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        causal: bool = False,
        sm_margin: int = 0,
    ) -> Tensor:
        assert causal and sm_margin == 0 and page_table.stride(-1) == 1
        if cu_seqlens_q is None:
            assert q.shape[1] == 1  # [batch, 1, heads, head_dim]
            return paged_decode_reference(q[:, 0], k_cache, v_cache, page_table, cache_seqlens).to(q.dtype).unsqueeze(1)
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        return paged_prefill_reference(q, k_cache, v_cache, page_table, cu_seqlens_q, cache_seqlens).to(q.dtype)

    return SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)


def fa2_stand_in() -> Any:
    """`flash_attn_varlen_func` as FA2 documents it: dense keys, one run of tokens a sequence."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool = False,
    ) -> Tensor:
        assert causal and max_seqlen_q == max_seqlen_k and torch.equal(cu_seqlens_q, cu_seqlens_k)
        parts = []
        for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
            pages = k[begin:end].unsqueeze(0), v[begin:end].unsqueeze(0)  # one page that holds the sequence
            table, length = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([end - begin], dtype=torch.int32)
            starts = torch.tensor([0, end - begin], dtype=torch.int32)
            parts.append(paged_prefill_reference(q[begin:end], *pages, table, starts, length))
        return torch.cat(parts).to(q.dtype)

    return SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


WHOLE = Case((40, 17), query_lens=(40, 17), dtype=torch.float32)
CHUNK = replace(WHOLE, query_lens=(9, 17))


@pytest.mark.parametrize("case, module", [(WHOLE, "fa3"), (CHUNK, "fa3"), (WHOLE, "fa2")])
def test_flash_prefill_passes_what_the_library_expects(case: Case, module: str) -> None:
    pool = Pool(case)
    meta = pool.prefill_meta()
    fallback = Recorder()
    modules = {"fa3": fa3_stand_in()} if module == "fa3" else {"fa2": fa2_stand_in()}
    out = FlashAttention(fallback, **modules).prefill(pool.q, pool.k_pages, pool.v_pages, meta)
    arguments = pool.q, pool.k_pages, pool.v_pages, pool.tables, meta.cu_seqlens_q, pool.contexts
    check_close(out, paged_prefill_reference(*arguments), 1e-6)
    assert fallback.calls == []


def test_fa3_decode_passes_what_the_library_expects() -> None:
    pool = Pool(Case((40, 0, 17), dtype=torch.float32))
    fallback = Recorder()
    backend = FlashAttention(fallback, fa3=fa3_stand_in())
    meta = backend.planned(pool.decode_meta(), pool.k_pages)
    out = backend.decode(pool.q, pool.k_pages, pool.v_pages, meta)
    assert fallback.calls == [], "it divides contexts itself"
    check_close(out, paged_decode_reference(pool.q, pool.k_pages, pool.v_pages, pool.tables, pool.contexts), 1e-6)


def test_fa2_leaves_pages_to_the_fallback() -> None:
    pool = Pool(CHUNK)
    fallback = Recorder()
    backend = FlashAttention(fallback, fa2=fa2_stand_in())
    backend.store_kv(pool.q, pool.q, pool.k_pages, pool.v_pages, torch.zeros(1))
    backend.prefill(pool.q, pool.k_pages, pool.v_pages, pool.prefill_meta())
    backend.decode(pool.q, pool.k_pages, pool.v_pages, backend.planned(pool.decode_meta(), pool.k_pages))
    assert fallback.calls == ["store_kv", "prefill", "planned", "decode"]


@pytest.mark.parametrize("head_dim", [8, 80, 96])
def test_triton_refuses_head_dims_it_cannot_tile(head_dim: int) -> None:
    with pytest.raises(ValueError, match=str(head_dim)):
        TritonAttention(head_dim)


def test_flash_attn_without_a_library_is_refused() -> None:
    with pytest.raises(ValueError, match="flash_attn_interface"):
        FlashAttention(Recorder(), fa3=find_module("no_such_module"))


if __name__ == "__main__":
    main()
