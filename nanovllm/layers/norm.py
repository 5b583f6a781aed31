"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467), as Qwen3 rounds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalise the last dimension, of `size` elements, by its root mean square."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] in any float dtype; the result has the same. Statistics are taken in float32."""
        x_fp32 = x.float()
        scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return (x_fp32 * scale).to(x.dtype) * self.weight  # as trained: the cast comes before the weight

    def forward_add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normalised, new residual) of x + residual; without a residual, x itself becomes it."""
        residual = x if residual is None else x + residual
        return self(residual), residual

    def checkpoint_slots(self) -> dict[str, Tensor]:
        return {"weight": self.weight}
