"""Decode attention over paged KV: one query token a row, grouped-query heads, split-KV for small batches.

One program attends the G query heads that share a KV head to one range of a row's context, so that every KV
byte is read once. Online softmax in float32 (Milakov & Gimelshein 2018); splits are combined by their
log-sum-exp (Flash-Decoding, Dao et al. 2023).
Letters in names: B rows, H query heads, K KV heads, G = H / K, D head dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.launch import LINE_BITS, fetch_to_l2, has_pdl, wait_for_predecessor

MIN_DOT_ROWS = 16  # tl.dot's smallest tile; smaller groups are padded, their KV loads hide the arithmetic
PROGRAMS_PER_SM = 2  # resident at once: enough KV bytes in flight to fill the memory bus
MIN_SPLIT_TOKENS = 128  # below this a split costs more in partial results than it gains
MAX_SPLITS = 32
AHEAD_TOKENS = tl.constexpr(32)  # of a split, fetched before the wait: with 64, the kernel before lacks the memory


class DecodeTiles(NamedTuple):
    """tile_tokens: KV tokens of one loop step. num_stages - 1 steps' loads are in flight ahead of the arithmetic."""

    tile_tokens: int
    num_warps: int
    num_stages: int


@triton.jit
def load_blocks(
    table_ptr: tl.tensor, start: tl.tensor, end: tl.tensor, PAGE: tl.constexpr, TILE: tl.constexpr
) -> tl.tensor:
    """Block ids of the tile of tokens at `start`: a scalar if it lies in one page, else one id a token."""
    if TILE <= PAGE:
        return tl.load(table_ptr + start // PAGE, mask=start < end, other=0)
    else:
        tokens = start + tl.arange(0, TILE)
        return tl.load(table_ptr + tokens // PAGE, mask=tokens < end, other=0)


@triton.jit
def page_offsets(
    blocks: tl.tensor,
    start: tl.tensor,
    PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """int64 [TILE] element offsets of the tile's tokens: 32 bits wrap in a pool of 4 GiB.

    The strides are constants, so that the compiler sees that every token starts on a 16-byte boundary.
    """
    tokens = start % PAGE + tl.arange(0, TILE)
    if TILE > PAGE:
        tokens = tokens % PAGE
    return blocks.to(tl.int64) * BLOCK_STRIDE + tokens * TOKEN_STRIDE


@triton.jit
def _split_range(
    context: tl.tensor, split: tl.tensor, num_splits: tl.tensor, min_tokens: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """[begin, end) of one split, begin a multiple of TILE. Later splits of a short context are empty."""
    tokens = tl.cdiv(tl.cdiv(context, num_splits), TILE) * TILE
    tokens = tl.maximum(tokens, min_tokens)
    return tl.minimum(split * tokens, context), tl.minimum((split + 1) * tokens, context)


@triton.jit
def fetch_ahead(
    k_ptr: tl.tensor, v_ptr: tl.tensor, table_ptr: tl.tensor, begin: tl.tensor, end: tl.tensor,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr,
) -> None:  # fmt: skip
    """Ask L2 for one head's keys and values of the first tokens of [begin, end). Those not yet written do no harm."""
    LINE: tl.constexpr = LINE_BITS // k_ptr.dtype.element_ty.primitive_bitwidth
    tokens = begin + tl.arange(0, AHEAD_TOKENS)
    blocks = tl.load(table_ptr + tokens // PAGE, mask=tokens < end, other=0)
    offsets = blocks.to(tl.int64) * BLOCK_STRIDE + tokens % PAGE * TOKEN_STRIDE
    offsets = tl.where(tokens < end, offsets, 0)[:, None] + tl.arange(0, (HEAD_DIM + LINE - 1) // LINE) * LINE
    fetch_to_l2(k_ptr + offsets)
    fetch_to_l2(v_ptr + offsets)


@triton.jit
def attend_range(
    q: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, table_ptr: tl.tensor, begin: tl.tensor, end: tl.tensor,
    scale_log2: tl.tensor, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr, TOKEN_STRIDE: tl.constexpr, TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Queries [ROWS, D] attend tokens [begin, end) of one KV head: result [ROWS, D], base-2 log-sum-exp [ROWS]."""
    dims = tl.arange(0, HEAD_DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    # Loaded one step ahead: a KV load waits for its block id, so the id must not be a load of the same step.
    blocks = load_blocks(table_ptr, begin, end, PAGE, TILE)
    for start in range(begin, end, TILE):
        offsets = page_offsets(blocks, start, PAGE, BLOCK_STRIDE, TOKEN_STRIDE, TILE)[:, None] + dims
        blocks = load_blocks(table_ptr, start + TILE, end, PAGE, TILE)
        valid = start + tl.arange(0, TILE) < end
        k = tl.load(k_ptr + offsets, mask=valid[:, None], other=0.0)
        v = tl.load(v_ptr + offsets, mask=valid[:, None], other=0.0)  # zeroed: 0 · NaN would be NaN
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        scores = tl.where(valid, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_top[:, None])
        alpha = tl.exp2(top - new_top)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="tf32x3")
        top = new_top

    # An empty range has total 0 and acc 0: it gives 0, and a log-sum-exp of -inf.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    return acc, top + tl.log2(total)


@triton.jit(
    do_not_specialize=["q_row_heads", "table_row_blocks", "min_tokens"],
    do_not_specialize_on_alignment=["tables_ptr", "context_lens_ptr", "row_order_ptr"],
)
def _decode_kernel(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    row_order_ptr: tl.tensor,
    q_row_heads: tl.tensor,
    table_row_blocks: tl.tensor,
    scale_log2: tl.tensor,
    min_tokens: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (K, B, splits). Writes split s of row b to out[s, b] and, if SPLIT, its base-2 log-sum-exp to lse[s, b]."""
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k_ptr += kv_head * HEAD_STRIDE
    v_ptr += kv_head * HEAD_STRIDE
    if PDL:
        gdc_launch_dependents()
    if row_order_ptr is not None:
        row = tl.load(row_order_ptr + row)
    context = tl.load(context_lens_ptr + row)
    begin, end = _split_range(context, split, tl.num_programs(2), min_tokens, TILE)
    table_ptr = tables_ptr + row.to(tl.int64) * table_row_blocks
    if PDL:
        fetch_ahead(k_ptr, v_ptr, table_ptr, begin, end, HEAD_DIM, PAGE, BLOCK_STRIDE, TOKEN_STRIDE)
        gdc_wait()
    heads = tl.arange(0, ROWS)
    real = heads < GROUP
    heads += kv_head * GROUP
    dims = tl.arange(0, HEAD_DIM)
    q_ptrs = q_ptr + (row.to(tl.int64) * q_row_heads + heads[:, None]) * HEAD_DIM + dims
    q = tl.load(q_ptrs, mask=real[:, None], other=0.0)

    acc, lse = attend_range(
        q, k_ptr, v_ptr, table_ptr, begin, end, scale_log2, ROWS, HEAD_DIM, PAGE, BLOCK_STRIDE, TOKEN_STRIDE, TILE
    )  # fmt: skip
    num_heads = tl.num_programs(0) * GROUP
    out_rows = (split.to(tl.int64) * tl.num_programs(1) + row) * num_heads + heads
    out_ptrs = out_ptr + out_rows[:, None] * HEAD_DIM + dims
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=real[:, None])
    if SPLIT:
        tl.store(lse_ptr + out_rows, lse, mask=real)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    num_splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (B · H). out[r] = sum over s of parts[s, r] · softmax over s of lse[s, r]; all splits empty gives 0."""
    row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    splits = tl.arange(0, SPLITS)
    wait_for_predecessor(PDL)
    dims = tl.arange(0, HEAD_DIM)
    lse = tl.load(lse_ptr + splits * num_rows + row, mask=splits < num_splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    part_rows = splits.to(tl.int64) * num_rows + row
    # Splits of no weight, the empty ones among them, are not read.
    parts = tl.load(parts_ptr + part_rows[:, None] * HEAD_DIM + dims, mask=weights[:, None] > 0, other=0.0)
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty))


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_context_tokens: int,
    *,
    row_order: Tensor | None = None,
    num_sms: int | None = None,
    num_splits: int | None = None,
    min_split_tokens: int = MIN_SPLIT_TOKENS,
    tiles: DecodeTiles | None = None,
    pdl: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend each row's query to its whole context. Queues one kernel, or two where the context is split.

    q: [B, H, D], float16, bfloat16 or float32, heads contiguous, rows any multiple of D elements apart.
    k_pages, v_pages: [blocks, page_tokens, K, D], q's dtype, same strides, last dim contiguous, D a power of two.
    block_tables: int32 [B, columns], valid ids wherever the context reaches. context_lens: int32 [B], tokens in
    the cache; a row of 0 gives zeros. max_context_tokens: a host bound of context_lens; only the number of
    splits depends on it, so a captured graph is right at every length that its tables can hold.
    row_order: int32 [B], the order in which rows are begun, or None: as they are. It changes no result.
    num_sms: SMs this may run on (None: the whole card). num_splits, min_split_tokens, tiles: None or default for the
    fixed choice. pdl: programmatic dependent launch (None: where the context is split): tables, lengths and order are
    then read ahead of the wait, so the kernels queued just before must not be writing them. out: contiguous, q's shape
    and dtype, or None to allocate. Returns [B, H, D].
    """
    num_rows, num_heads, head_dim = q.shape
    page_tokens, num_kv_heads = k_pages.shape[1:3]
    check_pages(q, k_pages, v_pages)
    check_tables(block_tables, context_lens)
    num_sms = num_sms or count_sms(q.device)
    num_programs = num_rows * num_kv_heads
    num_splits = num_splits or choose_num_splits(num_programs, max_context_tokens, num_sms)
    tiles = tiles or choose_decode_tiles(q.dtype, head_dim, num_programs / num_sms, num_splits)
    out = output_like(q, out)
    parts, lse = out, out  # unread and unwritten as lse where there is one split
    if num_splits > 1:
        parts = torch.empty(num_splits, *q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(parts.shape[:-1], dtype=torch.float32, device=q.device)
    group = num_heads // num_kv_heads
    # Started early, programs go wherever the kernel before leaves room, perhaps unevenly: that costs large batches more
    # than a launch (32x1024 behind its like: 46 µs, and 36 launched as usual), and small ones less.
    early = has_pdl(q.device) and num_splits > 1 if pdl is None else pdl
    with torch.cuda.device_of(q):
        _decode_kernel[(num_kv_heads, num_rows, num_splits)](
            parts,
            lse,
            q,
            k_pages,
            v_pages,
            block_tables,
            context_lens,
            row_order,
            row_heads(q),
            block_tables.stride(0),
            score_scale_log2(head_dim),
            triton.cdiv(min_split_tokens, tiles.tile_tokens) * tiles.tile_tokens,
            GROUP=group,
            ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(group)),
            HEAD_DIM=head_dim,
            PAGE=page_tokens,
            BLOCK_STRIDE=k_pages.stride(0),
            TOKEN_STRIDE=k_pages.stride(1),
            HEAD_STRIDE=k_pages.stride(2),
            TILE=tiles.tile_tokens,
            SPLIT=num_splits > 1,
            PDL=early,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            launch_pdl=early,
        )
        if num_splits > 1:
            _combine_kernel[(num_rows * num_heads,)](
                out,
                parts,
                lse,
                num_splits,
                HEAD_DIM=head_dim,
                SPLITS=triton.next_power_of_2(num_splits),
                PDL=early,
                num_warps=4,
                launch_pdl=early,
            )
    return out


def choose_decode_tiles(dtype: torch.dtype, head_dim: int, programs_per_sm: float, num_splits: int) -> DecodeTiles:
    """The fixed configuration table, by the unsplit programs. Each loop step reads the same bytes, or half of them.

    Three stages read fastest where an SM has one or two programs, or so many that the last wave does not matter. In
    between, small programs that all fit at once win: measured at 3.9 a SM, they lose at 1.9 and, uneven, at 15.5. So
    do they, by 1 to 3 %, where the context is split and the card half full without: 8x1024 takes 14.6 µs, not 14.9.
    """
    if dtype == torch.float32:
        return DecodeTiles(tile_tokens=32, num_warps=4, num_stages=2)
    tile_tokens = 64 if head_dim > 64 else 128
    if num_splits > 1 and programs_per_sm >= 0.4:
        return DecodeTiles(tile_tokens // 2, num_warps=2, num_stages=4)
    if num_splits == 1 and 3 <= programs_per_sm < 8:
        return DecodeTiles(tile_tokens, num_warps=2, num_stages=2)
    return DecodeTiles(tile_tokens, num_warps=4, num_stages=3)


def choose_num_splits(num_programs: int, max_context_tokens: int, num_sms: int) -> int:
    """Splits of each row's context, so that `num_programs` unsplit programs would fill the card's last wave.

    The smallest number within a tenth of the best use of whole waves of PROGRAMS_PER_SM · num_sms programs.
    """
    slots = num_sms * PROGRAMS_PER_SM
    if num_programs >= 0.7 * slots:  # 24x1024: 29 µs whole, 32 in halves
        return 1
    most = max(1, min(MAX_SPLITS, max_context_tokens // (2 * MIN_SPLIT_TOKENS)))  # a combination reads them all
    waves = [splits * num_programs / slots for splits in range(1, most + 1)]
    use = [wave / math.ceil(wave) for wave in waves]
    return next(splits for splits, share in enumerate(use, 1) if share >= 0.9 * max(use))


def paged_decode_reference(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, context_lens: Tensor
) -> Tensor:
    """What `paged_decode` computes, in float64 and plain torch, row by row (arguments as there). Syncs."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // k_pages.shape[2]
    for row, context in enumerate(context_lens.tolist()):
        if context == 0:
            continue
        k = gather_pages(k_pages, block_tables[row], context).repeat_interleave(group, 1)
        v = gather_pages(v_pages, block_tables[row], context).repeat_interleave(group, 1)
        scores = torch.einsum("hd,chd->hc", q[row].double(), k) * q.shape[-1] ** -0.5
        out[row] = torch.einsum("hc,chd->hd", scores.softmax(-1), v)
    return out


def gather_pages(pages: Tensor, block_table: Tensor, context: int) -> Tensor:
    """float64 [context, K, D]: one sequence's first `context` tokens."""
    num_blocks = triton.cdiv(context, pages.shape[1])
    return pages[block_table[:num_blocks].long()].flatten(0, 1)[:context].double()


def check_pages(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    """What the kernels take for granted of q [tokens, heads, D] and pages [blocks, page_tokens, K, D]."""
    assert k_pages.shape == v_pages.shape and k_pages.stride() == v_pages.stride(), "K and V pages differ"
    assert q.dtype == k_pages.dtype == v_pages.dtype, f"q is {q.dtype}, the pages are {k_pages.dtype}"
    assert k_pages.stride(3) == 1 and q.shape[2] == k_pages.shape[3], f"{q.shape}, {k_pages.shape}"
    assert q.shape[1] % k_pages.shape[2] == 0, f"{q.shape[1]} query heads on {k_pages.shape[2]} KV heads"
    for size in k_pages.shape[1::2]:
        assert size >= MIN_DOT_ROWS and size == triton.next_power_of_2(size), f"{size} is no power of two from 16 up"


def check_tables(block_tables: Tensor, context_lens: Tensor) -> None:
    """One table row and one context a sequence, int32, table rows any number of columns apart."""
    assert block_tables.dtype == context_lens.dtype == torch.int32, f"{block_tables.dtype}, {context_lens.dtype}"
    assert block_tables.shape[:1] == context_lens.shape, f"{block_tables.shape}, {context_lens.shape}"
    for x in (block_tables, context_lens):
        assert x.shape[-1] == 1 or x.stride(-1) == 1, f"strides {x.stride()} of shape {tuple(x.shape)}"


def output_like(q: Tensor, out: Tensor | None) -> Tensor:
    """`out`, checked, or a new tensor: contiguous, of q's shape and dtype."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    assert out.is_contiguous() and out.shape == q.shape and out.dtype == q.dtype, f"{out.shape}, {out.stride()}"
    return out


def row_heads(x: Tensor) -> int:
    """Distance of two tokens of x [tokens, heads, D], in units of D: so the kernel sees rows aligned to D."""
    num_rows, num_heads, head_dim = x.shape
    assert x.stride(2) == 1 and (num_heads == 1 or x.stride(1) == head_dim), f"heads apart: strides {x.stride()}"
    if num_rows <= 1:  # a dim of one element may carry any stride
        return 0
    assert x.stride(0) % head_dim == 0, f"row stride {x.stride(0)} is no multiple of {head_dim}"
    return x.stride(0) // head_dim


def score_scale_log2(head_dim: int) -> float:
    """D ** -0.5 · log2(e): scores in base 2, for exp2."""
    return head_dim**-0.5 * math.log2(math.e)


def count_sms(device: torch.device) -> int:
    """Multiprocessors of the whole card; 1 on a CPU, where only the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
