"""Linear layers, without bias. One that fuses several checkpoint matrices says which of its rows are whose.

`checkpoint_slots` of a layer maps names in a checkpoint (relative to the layer) to views of its parameters.
The loader writes through these views, so that no fused weight is ever assembled from pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Module):
    """y = x Wᵀ with W [out_features, in_features], uninitialised."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def checkpoint_slots(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


class FusedLinear(Linear):
    """Several matrices over one input, stacked by output. `parts`: checkpoint name → output features."""

    def __init__(self, in_features: int, parts: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(in_features, sum(parts.values()), dtype, device)
        self.parts = parts

    def split(self, product: Tensor) -> tuple[Tensor, ...]:
        """What `forward` returned, as one view per part."""
        return product.split(list(self.parts.values()), dim=-1)

    def checkpoint_slots(self) -> dict[str, Tensor]:
        slices = self.weight.split(list(self.parts.values()))
        return {f"{name}.weight": rows for name, rows in zip(self.parts, slices, strict=True)}
