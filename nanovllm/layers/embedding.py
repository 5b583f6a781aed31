"""The token embedding and the projection to logits, which may share one matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Embedding(nn.Module):
    """Rows of W [vocab_size, hidden_size], uninitialised; ids must be in range."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)

    def checkpoint_slots(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


def project_to_logits(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """float32 logits [rows, vocab_size] of hidden [rows, hidden_size] and weight [vocab_size, hidden_size].

    On CUDA the product itself is written in float32: bf16 steps at logits above 16 are 0.125 apart, enough to
    turn the order of the best tokens. Other devices lack that output type. `out`: where to, None to allocate.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        if out is None:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    logits = F.linear(hidden, weight).float()
    return logits if out is None else out.copy_(logits)
