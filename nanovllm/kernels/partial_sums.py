"""Products in partial sums: float32 [S, T, N], one for each of S pieces of the inner dimension (`split_gemm`).

Their reader adds them up in their order and rounds once to the model's dtype, as a whole product [T, N] is rounded; so
no kernel of its own adds them.
Letters in names: T rows (tokens), N elements a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_product(
    ptrs: tl.tensor, inside: tl.tensor, size: tl.tensor, dtype: tl.constexpr, SPLITS: tl.constexpr
) -> tl.tensor:
    """Elements of a product at `ptrs`, as float32, rounded to `dtype`; 0 where not `inside` (None: all are).

    size: elements of one partial sum, T · N. SPLITS: S, or 1 for a whole product.
    """
    OTHER: tl.constexpr = None if inside is None else 0.0
    x = tl.load(ptrs, mask=inside, other=OTHER).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(ptrs + split * size, mask=inside, other=OTHER)
    if SPLITS > 1:
        x = x.to(dtype).to(tl.float32)
    return x


def count_splits(product: Tensor) -> int:
    """1 for a whole product [T, N], S for its partial sums [S, T, N]."""
    if product.dim() == 2:
        return 1
    assert product.dim() == 3 and product.dtype == torch.float32 and len(product) > 1, f"{product.shape}"
    return len(product)


def add_partial_sums(product: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, N] in `dtype` of a whole product or its partial sums, in plain torch."""
    return sum(product[1:], start=product[0]).to(dtype) if product.dim() == 3 else product.to(dtype)
