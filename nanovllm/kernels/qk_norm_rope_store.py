"""What lies between the QKV projection and attention, in one pass over its output (Triton): RMSNorm of every
query and key head, RoPE, and the keys and values written to their pages.

RMSNorm: Zhang and Sennrich, 2019, arXiv:1910.07467. RoPE: Su et al., 2021, arXiv:2104.09864, rotate-half.
Letters in names: T tokens, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.launch import has_pdl, wait_for_predecessor
from nanovllm.kernels.partial_sums import count_splits, load_product
from nanovllm.kernels.rms_norm import rms_norm_reference


class Tiles(NamedTuple):
    """Heads a program takes, and its warps: fixed by the model alone, so that one variant serves every T."""

    query_heads: int
    kv_heads: int
    num_warps: int


@triton.jit
def _load_halves(
    ptr: tl.tensor,
    head: tl.tensor,
    size: tl.tensor,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of the given heads of a product of `size` elements, each float32 [heads, HEAD_DIM / 2]."""
    half = ptr + head[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM // 2)[None, :]
    first = load_product(half, None, size, dtype, SPLITS)
    return first, load_product(half + HEAD_DIM // 2, None, size, dtype, SPLITS)


@triton.jit
def _norm_and_rotate(
    first: tl.tensor,
    second: tl.tensor,
    weight_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    EPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """RMSNorm over the whole head, then the rotation. cos_sin_ptr: the row of this token's position."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    half = tl.arange(0, HEAD_DIM // 2)[None, :]
    weight_first = tl.load(weight_ptr + half).to(tl.float32)
    weight_second = tl.load(weight_ptr + half + HEAD_DIM // 2).to(tl.float32)
    cos, sin = tl.load(cos_sin_ptr + half), tl.load(cos_sin_ptr + half + HEAD_DIM // 2)
    square_sum = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = tl.rsqrt(square_sum / HEAD_DIM + EPS)[:, None]
    # Rounded where the layers round: before the weight, and after it.
    first = ((first * scale).to(dtype).to(tl.float32) * weight_first).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * weight_second).to(dtype).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_halves(
    ptr: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    HEAD_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> None:
    half = ptr + head[:, None] * HEAD_STRIDE + tl.arange(0, HEAD_DIM // 2)[None, :]
    tl.store(half, first.to(ptr.dtype.element_ty))
    tl.store(half + HEAD_DIM // 2, second.to(ptr.dtype.element_ty))


# A micro-batch's positions and slots may start anywhere in a buffer, and each is one scalar load.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr"])
def _qk_norm_rope_store_kernel(
    qkv_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    k_pages_ptr: tl.tensor,
    v_pages_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    out_ptr: tl.tensor,
    EPS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KV_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: QUERY_TILE query heads of a token, or KV_TILE of its key heads and the same value heads.

    Loads that depend on nothing come first: a warp issues in order, and would wait for the position.
    """
    QUERY_TILES: tl.constexpr = QUERY_HEADS // QUERY_TILE
    TILES: tl.constexpr = QUERY_TILES + KV_HEADS // KV_TILE
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0)
    tile = program % TILES
    token = (program // TILES).to(tl.int64)
    wait_for_predecessor(PDL)
    WIDTH: tl.constexpr = (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM
    size = (tl.num_programs(0) // TILES).to(tl.int64) * WIDTH
    qkv_ptr += token * WIDTH
    position = tl.load(positions_ptr + token)
    # Names differ between the branches: what both assign would have to be of one shape.
    if tile < QUERY_TILES:
        q_head = tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
        q_first, q_second = _load_halves(qkv_ptr, q_head, size, dtype, HEAD_DIM, SPLITS)
        q_first, q_second = _norm_and_rotate(
            q_first, q_second, q_weight_ptr, cos_sin_ptr + position * HEAD_DIM, EPS, HEAD_DIM
        )
        _store_halves(out_ptr + token * (QUERY_HEADS * HEAD_DIM), q_head, q_first, q_second, HEAD_DIM, HEAD_DIM)
    else:
        slot = tl.load(slot_mapping_ptr + token)
        head = (tile - QUERY_TILES) * KV_TILE + tl.arange(0, KV_TILE)
        k_ptr = qkv_ptr + QUERY_HEADS * HEAD_DIM
        k_first, k_second = _load_halves(k_ptr, head, size, dtype, HEAD_DIM, SPLITS)
        v_first, v_second = _load_halves(k_ptr + KV_HEADS * HEAD_DIM, head, size, dtype, HEAD_DIM, SPLITS)
        k_first, k_second = _norm_and_rotate(
            k_first, k_second, k_weight_ptr, cos_sin_ptr + position * HEAD_DIM, EPS, HEAD_DIM
        )
        # int64, as the slot is: a large pool has more than 2**31 elements.
        place = (slot // PAGE_SIZE) * BLOCK_STRIDE + (slot % PAGE_SIZE) * TOKEN_STRIDE
        _store_halves(k_pages_ptr + place, head, k_first, k_second, HEAD_STRIDE, HEAD_DIM)
        _store_halves(v_pages_ptr + place, head, v_first, v_second, HEAD_STRIDE, HEAD_DIM)


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """Normalise and rotate the heads of a QKV projection; q goes to `out` [T, H, D], k and v to their slots.

    Rounds as `qk_norm_rope_store_reference` does.

    qkv: [T, (H + 2·K)·D], contiguous, query heads first, then keys, then values; bfloat16, float16 or float32,
    and so are q_weight and k_weight [D], the pages and out; or the partial sums of such a product, float32
    [S, T, (H + 2·K)·D] (see `rms_norm`). cos_sin: float32 [max_position_tokens, D], as
    `RotaryEmbedding.cos_sin`: row p holds cos, then sin. positions: int64 [T], rows of cos_sin. k_pages,
    v_pages: `KVCache.layer_view`, [blocks, block_size, K, D], strided alike, D a power of two. slot_mapping:
    int64 [T], block · block_size + offset; rows may share a slot only where nobody reads it (padding rows, in
    the null block). out: contiguous. num_sms: no effect; the card spreads the small programs over whatever
    partition the stream has.
    """
    (T, width), splits = qkv.shape[-2:], count_splits(qkv)
    page_size, K, D = k_pages.shape[1:]
    H = width // D - 2 * K
    out = q_weight.new_empty(T, H, D) if out is None else out
    assert width == (H + 2 * K) * D and qkv.is_contiguous() and H > 0
    assert out.shape == (T, H, D) and out.is_contiguous() and q_weight.shape == k_weight.shape == (D,)
    assert cos_sin.shape[1] == D and cos_sin.is_contiguous() and cos_sin.dtype == torch.float32
    assert positions.shape == slot_mapping.shape == (T,) and positions.dtype == slot_mapping.dtype == torch.int64
    assert k_pages.stride() == v_pages.stride() and k_pages.stride(3) == 1 and k_pages.shape == v_pages.shape
    tiles, pdl = _tiles(H, K, D), has_pdl(qkv.device)
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_store_kernel[(T * (H // tiles.query_heads + K // tiles.kv_heads),)](
            qkv,
            q_weight,
            k_weight,
            cos_sin,
            positions,
            k_pages,
            v_pages,
            slot_mapping,
            out,
            EPS=eps,
            QUERY_HEADS=H,
            KV_HEADS=K,
            HEAD_DIM=D,
            PAGE_SIZE=page_size,
            BLOCK_STRIDE=k_pages.stride(0),
            TOKEN_STRIDE=k_pages.stride(1),
            HEAD_STRIDE=k_pages.stride(2),
            QUERY_TILE=tiles.query_heads,
            KV_TILE=tiles.kv_heads,
            SPLITS=splits,
            PDL=pdl,
            num_warps=tiles.num_warps,
            launch_pdl=pdl,
        )
    return out


def _tiles(num_heads: int, num_kv_heads: int, head_dim: int) -> Tiles:
    """At most 2,048 elements of q, or 1,024 each of k and v; a warp for every 256 elements of k.

    With fewer warps, Triton takes cos, sin and the weight through shared memory, behind barriers.
    """
    query_heads = _power_of_two_divisor(num_heads, 2048 // head_dim)
    kv_heads = _power_of_two_divisor(num_kv_heads, 1024 // head_dim)
    return Tiles(query_heads, kv_heads, num_warps=max(1, kv_heads * head_dim // 256))


def _power_of_two_divisor(count: int, limit: int) -> int:
    """The largest power of two that divides `count` and is at most `limit` (a power of two)."""
    return min(count & -count, limit)


def qk_norm_rope_store_reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    eps: float,
) -> Tensor:
    """`qk_norm_rope_store` in plain torch, on any device; float64 inputs are computed in float64."""
    page_size, K, D = k_pages.shape[1:]
    heads = qkv.unflatten(-1, (-1, D))
    q_THD, k_TKD, v_TKD = heads.split([heads.shape[1] - 2 * K, K, K], dim=1)
    cos_sin = cos_sin[positions].unsqueeze(1)
    block, offset = slot_mapping // page_size, slot_mapping % page_size
    k_pages[block, offset] = _rotate_reference(rms_norm_reference(k_TKD, k_weight, eps), cos_sin)
    v_pages[block, offset] = v_TKD
    return _rotate_reference(rms_norm_reference(q_THD, q_weight, eps), cos_sin)


def _rotate_reference(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x [T, heads, D]; cos_sin: [T, 1, D], cos in its first half."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
