"""Decode attention over paged KV on Hopper, for a few SMs: loads never wait for arithmetic, nor for the next row.

`paged_decode` begins each (row, KV head) in a program of its own, whose first load waits for a launch, a context, a
block id and a query. Where every SM must have 100 KB in flight to keep its share of the memory busy, that shows. Here
as many programs as fit at once share the tiles of all rows equally (`tile_shares`). A program is a warp that only
loads, a ring of tiles ahead and across rows, and a warpgroup that only computes (warp specialisation, as in
FlashAttention-3, Shah et al. 2024). With a tile's tokens as the products' 64 rows and the query heads of one KV head
as their 8 columns, the tensor cores read keys and values where they were loaded: K·qᵀ as it lies, and Vᵀ·p transposed.
The scores of a row's next tile are computed while the softmax (online, Milakov & Gimelshein 2018) of this one is.

A context's last tile is loaded shifted, as in `paged_prefill_hopper`: what lies past the context is not read.
Letters in names: B rows, H query heads, K KV heads, G = H / K, D head dim, S shares.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.launch import has_pdl
from nanovllm.kernels.paged_decode import (
    MIN_SPLIT_TOKENS,
    check_pages,
    check_tables,
    count_sms,
    output_like,
    row_heads,
    score_scale_log2,
)
from nanovllm.kernels.tile_shares import TILE, Share, count_tiles, find_share, join_parts, make_parts, share_of

DIM = gl.constexpr(128)
HALF = gl.constexpr(64)  # elements of 128 bytes, the widest a box may be with its swizzle
Q_STAGES = gl.constexpr(2)
MIN_PRODUCT_HEADS = 8  # columns of a warpgroup's product
LOADER_REGISTERS = gl.constexpr(24)  # of a thread; the warpgroup gets what is left


class RingShape(NamedTuple):
    """num_stages: tiles of keys, and of values, in shared memory. programs_per_sm should fit at once.

    The default read most of what an H200's partitions were tried with: 4.1 TB/s on 44 SMs at 256x1024.
    """

    num_stages: int = 2
    programs_per_sm: int = 3

    @property
    def max_registers(self) -> int:
        """Of a thread: an SM's 65,536 among the programs, of eight warps each, four of which hardly need any."""
        return min(168, 65536 // (self.programs_per_sm * 256) // 8 * 8)


class Ring(NamedTuple):
    """Tiles in shared memory: the i-th lies in buffer i % stages. A buffer has two barriers, whose phase i // stages is
    about that tile.

    Only the loading warp writes. It waits until `empty` has ended the phase before (of which a new barrier says that it
    has), tells `full` how many bytes will come, and asks for them; with the last of them that phase of `full` ends.
    Only the warpgroup reads. It waits for that end, and one thread arrives at `empty` when all warps have waited for
    the product that reads the tile (the compiler puts a barrier of the warpgroup before that). So no tile is read
    before all of it is there, and none is written over while a product may read it.
    Nobody waits for ever: both go through the same rows and tiles, and what a tile's load waits for are products of
    tiles that were asked for before it.
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def _make_ring(desc: tma.tensor_descriptor, STAGES: gl.constexpr, ROWS: gl.constexpr) -> Ring:
    """Of tiles [ROWS, DIM], each in two boxes [1, ROWS, HALF], one behind the other."""
    tiles = gl.allocate_shared_memory(desc.dtype, [STAGES * 2, 1, ROWS, HALF], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    return Ring(tiles, full, empty)


@gluon.jit
def _fetch(
    desc: tma.tensor_descriptor,
    x: gl.tensor,
    y: gl.tensor,
    z: gl.tensor,
    ring: Ring,
    i: gl.tensor,
    STAGES: gl.constexpr,
) -> None:
    """The i-th tile of a ring, from (x, y, z) of a tensor map on."""
    stage, phase = i % STAGES, i // STAGES & 1
    mbarrier.wait(ring.empty.index(stage), phase ^ 1)
    mbarrier.expect(ring.full.index(stage), desc.block_type.nbytes * 2)
    for half in gl.static_range(2):
        box = ring.tiles.index(stage * 2 + half)
        tma.async_copy_global_to_shared(desc, [x, y, z + half * HALF], ring.full.index(stage), box)


@gluon.jit
def _load(
    q_desc: tma.tensor_descriptor, k_desc: tma.tensor_descriptor, v_desc: tma.tensor_descriptor,
    tables_ptr: gl.tensor, context_lens_ptr: gl.tensor,
    table_row_blocks: gl.tensor, last_row: gl.tensor, share: Share, q_ring: Ring, k_ring: Ring, v_ring: Ring,
    GROUP: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """The loading warp: every row's query, and its tiles as fast as the ring takes them."""
    kv_head = gl.program_id(0)
    row, in_row, tile, step, turn = share.row, share.in_row, share.begin, gl.to_tensor(0), gl.to_tensor(0)
    context = gl.load(context_lens_ptr + row)
    table_ptr = tables_ptr + row.to(gl.int64) * table_row_blocks
    block = gl.load(table_ptr + in_row * TILE // PAGE)
    while tile < share.end:
        # What the next row begins with is loaded a row ahead, so that its tiles follow these at once.
        next_row = gl.minimum(row + 1, last_row)
        next_context = gl.load(context_lens_ptr + next_row)
        next_table_ptr = tables_ptr + next_row.to(gl.int64) * table_row_blocks
        first_block = gl.load(next_table_ptr)
        num_tiles = gl.minimum(count_tiles(context) - in_row, share.end - tile)
        if context > 0:
            _fetch(q_desc, row, kv_head * GROUP, 0, q_ring, turn, Q_STAGES)
            turn += 1
            last_column = (context - 1) // PAGE
            for i in range(in_row, in_row + num_tiles):
                start = i * TILE
                token = start % PAGE - gl.maximum(start + TILE - context, 0)
                next_block = gl.load(table_ptr + gl.minimum((start + TILE) // PAGE, last_column))
                _fetch(k_desc, block, token, kv_head * DIM, k_ring, step, STAGES)
                _fetch(v_desc, block, token, kv_head * DIM, v_ring, step, STAGES)
                block = next_block
                step += 1
        tile += num_tiles
        row, context, table_ptr, block = row + 1, next_context, next_table_ptr, first_block
        in_row = gl.to_tensor(0)


@gluon.constexpr_function
def _exchanged_layout(num_heads: Any) -> Any:
    """[4, num_heads]: of the products' columns, each thread has its own ones, of all four warps."""
    registers = [[0, 1], [1, 0], [2, 0]] + [[0, 8 << bit] for bit in range((num_heads // 8).bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [4, num_heads])


@gluon.jit
def _column_max(scores: gl.tensor, exchange: gl.shared_memory_descriptor) -> gl.tensor:
    """f32 [HEADS]: over the 64 tokens [64, HEADS], of which each warp has 16."""
    warps = gl.max(gl.reshape(scores, [4, 16, scores.shape[1]]), 1)
    exchange.store(warps)
    EXCHANGED: gl.constexpr = _exchanged_layout(scores.shape[1])
    return gl.convert_layout(gl.max(exchange.load(EXCHANGED), 0), gl.SliceLayout(0, scores.type.layout))


@gluon.jit
def _softmax(
    scores: gl.tensor, sums: gl.tensor, acc: gl.tensor, top: gl.tensor, scale_log2: gl.tensor,
    exchange: gl.shared_memory_descriptor, p_tile: gl.shared_memory_descriptor,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:  # fmt: skip
    """Online softmax; the weights go to shared memory, for the tensor cores.

    There they replace those of the tile before: every warp has waited for the product that read them before it put
    its maxima into `exchange`, and has seen those of all the others since.
    """
    new_top = gl.maximum(top, _column_max(scores, exchange) * scale_log2)
    p = gl.exp2(scores * scale_log2 - new_top[None, :])
    alpha = gl.exp2(top - new_top)[None, :]
    p_tile.store(gl.permute(p.to(p_tile.dtype), (1, 0)))
    fence_async_shared()
    return sums * alpha + p, acc * alpha, new_top


@gluon.jit
def _compute(
    out_ptr: gl.tensor, parts_ptr: gl.tensor, lse_ptr: gl.tensor, cuts_ptr: gl.tensor, context_lens_ptr: gl.tensor,
    scale_log2: gl.tensor, last_row: gl.tensor, share: Share, q_ring: Ring, k_ring: Ring, v_ring: Ring,
    p_tile: gl.shared_memory_descriptor, exchange: gl.shared_memory_descriptor,
    K: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """The computing warpgroup. Tiles are [tokens, dims]; scores and weights [tokens, heads], acc [dims, heads]."""
    dtype: gl.constexpr = k_ring.tiles.dtype
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_tiles = q_ring.tiles._reinterpret(dtype, [Q_STAGES, HEADS, DIM], SHARED)
    k_tiles = k_ring.tiles._reinterpret(dtype, [STAGES, TILE, DIM], SHARED)
    v_tiles = v_ring.tiles._reinterpret(dtype, [STAGES, TILE, DIM], SHARED)
    p = p_tile.permute((1, 0))
    kv_head, share_id = gl.program_id(0), gl.program_id(1)
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, LAYOUT))
    dims = gl.arange(0, DIM, gl.SliceLayout(1, LAYOUT))
    places = gl.arange(0, TILE, gl.SliceLayout(1, LAYOUT))
    nothing = gl.zeros([TILE, HEADS], gl.float32, LAYOUT)
    row, in_row, tile, step, turn = share.row, share.in_row, share.begin, gl.to_tensor(0), gl.to_tensor(0)
    context = gl.load(context_lens_ptr + row)
    while tile < share.end:
        next_context = gl.load(context_lens_ptr + gl.minimum(row + 1, last_row))
        num_tiles = gl.minimum(count_tiles(context) - in_row, share.end - tile)
        top = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
        sums = gl.zeros([TILE, HEADS], gl.float32, LAYOUT)  # added up at the row's end
        acc = gl.zeros([DIM, HEADS], gl.float32, LAYOUT)
        if context > 0:
            q_stage, stage, phase = turn % Q_STAGES, step % STAGES, step // STAGES & 1
            q = q_tiles.index(q_stage).permute((1, 0))
            mbarrier.wait(q_ring.full.index(q_stage), turn // Q_STAGES & 1)
            mbarrier.wait(k_ring.full.index(stage), phase)
            scores = warpgroup_mma(k_tiles.index(stage), q, nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_ring.empty.index(stage), count=1)
            for _ in range(1, num_tiles):
                ahead, ahead_phase = (step + 1) % STAGES, (step + 1) // STAGES & 1
                mbarrier.wait(k_ring.full.index(ahead), ahead_phase)
                next_scores = warpgroup_mma(k_tiles.index(ahead), q, nothing, use_acc=False, is_async=True)
                sums, acc, top = _softmax(scores, sums, acc, top, scale_log2, exchange, p_tile)
                mbarrier.wait(v_ring.full.index(stage), phase)
                acc = warpgroup_mma(v_tiles.index(stage).permute((1, 0)), p, acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[next_scores])
                mbarrier.arrive(k_ring.empty.index(ahead), count=1)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_ring.empty.index(stage), count=1)
                step += 1
                stage, phase = ahead, ahead_phase
            mbarrier.arrive(q_ring.empty.index(q_stage), count=1)
            # Only the context's last tile was loaded shifted; in a share that ends before, the shift is 0.
            shift = gl.maximum((in_row + num_tiles) * TILE - context, 0)
            scores = gl.where((places >= shift)[:, None], scores, float("-inf"))
            sums, acc, top = _softmax(scores, sums, acc, top, scale_log2, exchange, p_tile)
            mbarrier.wait(v_ring.full.index(stage), phase)
            acc = warpgroup_mma(v_tiles.index(stage).permute((1, 0)), p, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_ring.empty.index(stage), count=1)
            step += 1
            turn += 1

        ends_row = in_row + num_tiles == count_tiles(context)
        weight = gl.sum(sums, 0)
        result = acc / gl.where(weight > 0, weight, 1.0)[None, :]
        offsets = heads[None, :] * DIM + dims[:, None]
        real = heads < GROUP
        begins_here = tile - in_row >= share.begin
        if ends_row & begins_here:
            first_head = row.to(gl.int64) * (K * GROUP) + kv_head * GROUP
            gl.store(out_ptr + first_head * DIM + offsets, result.to(dtype), mask=real[None, :])
        else:
            first_head = (share_id * 2 + begins_here).to(gl.int64) * (K * GROUP) + kv_head * GROUP
            gl.store(parts_ptr + first_head * DIM + offsets, result, mask=real[None, :])
            gl.store(lse_ptr + first_head + heads, top + gl.log2(weight), mask=real)
        tile += num_tiles
        in_row = gl.where(ends_row, 0, in_row + num_tiles)
        row += ends_row.to(gl.int32)
        context = gl.where(ends_row, next_context, context)

    if kv_head == 0:
        row_begin = share.end - in_row
        parts = share_of(row_begin + count_tiles(context) - 1, share.total, share.used) - share_id + 1
        cut = (share.begin < share.end) & (in_row > 0) & (row_begin >= share.begin)
        gl.store(cuts_ptr + share_id * 2, row)
        gl.store(cuts_ptr + share_id * 2 + 1, gl.where(cut, parts, 0))


@gluon.jit(
    do_not_specialize=["num_rows", "table_row_blocks", "min_tiles"],
    do_not_specialize_on_alignment=["tables_ptr", "context_lens_ptr"],
)
def _ring_kernel(
    out_ptr: gl.tensor, parts_ptr: gl.tensor, lse_ptr: gl.tensor, cuts_ptr: gl.tensor,
    q_desc: tma.tensor_descriptor, k_desc: tma.tensor_descriptor, v_desc: tma.tensor_descriptor,
    tables_ptr: gl.tensor, context_lens_ptr: gl.tensor,
    num_rows: gl.tensor, table_row_blocks: gl.tensor, scale_log2: gl.tensor, min_tiles: gl.tensor,
    K: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr, sm_ids_ptr: gl.tensor | None = None,
) -> None:  # fmt: skip
    """Grid (K, S). One KV head's tiles of one share: rows that lie in it to `out`, parts of others to `Parts`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if sm_ids_ptr is not None:
        sm_id = gl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], gl.int32, is_pure=False, pack=1)
        gl.store(sm_ids_ptr + gl.program_id(1) * K + gl.program_id(0), sm_id)
    share = find_share(context_lens_ptr, num_rows, gl.program_id(1), gl.num_programs(1), min_tiles)
    q_ring = _make_ring(q_desc, Q_STAGES, HEADS)
    k_ring = _make_ring(k_desc, STAGES, TILE)
    v_ring = _make_ring(v_desc, STAGES, TILE)
    p_tile = gl.allocate_shared_memory(k_desc.dtype, [HEADS, TILE], gl.NVMMASharedLayout(128, 16, rank=2))
    exchange = gl.allocate_shared_memory(gl.float32, [4, HEADS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    gl.warp_specialize(
        [
            (_compute, (
                out_ptr, parts_ptr, lse_ptr, cuts_ptr, context_lens_ptr, scale_log2, num_rows - 1, share,
                q_ring, k_ring, v_ring, p_tile, exchange, K, GROUP, HEADS, STAGES,
            )),
            (_load, (
                q_desc, k_desc, v_desc, tables_ptr, context_lens_ptr, table_row_blocks, num_rows - 1, share,
                q_ring, k_ring, v_ring, GROUP, PAGE, STAGES,
            )),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip


def pages_fit_ring(k_pages: Tensor) -> bool:
    """Whether `paged_decode_ring` takes such pages [blocks, page_tokens, K, D]: 16-bit, D = 128, 64 tokens or more,
    and a page's tokens and heads side by side."""
    _, page_tokens, num_kv_heads, head_dim = k_pages.shape
    if k_pages.stride()[1:] != (num_kv_heads * head_dim, head_dim, 1):
        return False
    return k_pages.dtype.itemsize == 2 and head_dim == DIM.value and page_tokens >= TILE.value


def _head_descriptor(x: Tensor, box_rows: int) -> TensorDescriptor:
    """Of x [N, R, C], C side by side, in boxes [1, box_rows, 64] that lie as the tensor cores read them."""
    strides = [x.stride(0) if x.shape[0] > 1 else x.shape[1] * x.shape[2], x.stride(1), 1]
    layout = gl.NVMMASharedLayout(128, 16, rank=3)
    return TensorDescriptor(x, list(x.shape), strides, [1, box_rows, HALF.value], layout)


def count_shares(num_sms: int, ring: RingShape, num_kv_heads: int) -> int:
    """Shares of the work, each of as many programs as there are KV heads: what fits at once on so many SMs."""
    return max(1, num_sms * ring.programs_per_sm // num_kv_heads)


def paged_decode_ring(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_context_tokens: int,
    *,
    row_order: Tensor | None = None,
    num_sms: int | None = None,
    ring: RingShape | None = None,
    pdl: bool | None = None,
    out: Tensor | None = None,
    sm_ids: Tensor | None = None,
) -> Tensor:
    """`paged_decode` on Hopper, arguments and result as there, for pages that `pages_fit_ring`. Queues two kernels.

    max_context_tokens and row_order are not needed: the work is shared by the lengths on the card, equally anyhow.
    ring: None for the fixed choice. pdl: programmatic dependent launch (None: on Hopper). The tensor maps go with the
    launch, so that a captured graph keeps them. sm_ids: int32 [S, K] with S from `count_shares`, contiguous: takes the
    number of the SM that each program of the first kernel ran on.
    """
    (num_rows, num_heads, head_dim), (page_tokens, num_kv_heads) = q.shape, k_pages.shape[1:3]
    check_pages(q, k_pages, v_pages)
    check_tables(block_tables, context_lens)
    row_heads(q)  # for what it asserts
    assert pages_fit_ring(k_pages), f"pages {tuple(k_pages.shape)} of {k_pages.dtype}, strides {k_pages.stride()}"
    ring = ring or RingShape()
    num_shares = count_shares(num_sms or count_sms(q.device), ring, num_kv_heads)
    assert sm_ids is None or (sm_ids.shape == (num_shares, num_kv_heads) and sm_ids.is_contiguous())
    out, parts = output_like(q, out), make_parts(num_shares, q)
    early = has_pdl(q.device) if pdl is None else pdl
    group = num_heads // num_kv_heads
    columns = max(MIN_PRODUCT_HEADS, triton.next_power_of_2(group))
    with torch.cuda.device_of(q):
        _ring_kernel[(num_kv_heads, num_shares)](
            out,
            *parts,
            _head_descriptor(q, columns),
            _head_descriptor(k_pages.flatten(2), TILE.value),
            _head_descriptor(v_pages.flatten(2), TILE.value),
            block_tables,
            context_lens,
            num_rows,
            block_tables.stride(0),
            score_scale_log2(head_dim),
            max(1, MIN_SPLIT_TOKENS // TILE.value),
            K=num_kv_heads,
            GROUP=group,
            HEADS=columns,
            PAGE=page_tokens,
            STAGES=ring.num_stages,
            PDL=early,
            sm_ids_ptr=sm_ids,
            num_warps=4,
            maxnreg=ring.max_registers,
            launch_pdl=early,
        )
        join_parts(out, parts, pdl=early)
    return out
