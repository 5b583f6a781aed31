"""Matrix products of every size at start-up, so that no step is the first to use a kernel of cuBLAS.

cuBLAS chooses a kernel by a product's number of rows, and CUDA loads a kernel when it is first used. In mid-service
that waits until this card, and the other one that can reach its memory, have drained: steps took up to 0.35 s longer.
"""

from __future__ import annotations

import torch

from nanovllm.layers.embedding import project_to_logits
from nanovllm.layers.linear import Linear
from nanovllm.models.qwen3 import Qwen3ForCausalLM


def product_rows(most: int) -> list[int]:
    """Numbers of rows from 1 to `most`, ascending: every 8th, further on every 64th, then every 512th."""
    rows = [1, *range(8, 512, 8), *range(512, 4096, 64), *range(4096, most, 512)]
    return [*(number for number in rows if number < most), most]


@torch.inference_mode()
def rehearse_products(model: Qwen3ForCausalLM, most_tokens: int, most_logits: int) -> None:
    """Queue one layer's products for up to `most_tokens` rows, and logits for up to `most_logits`, on this stream."""
    linears = [module for module in model.layers[0].modules() if isinstance(module, Linear)]
    for linear in linears:
        x = torch.zeros(most_tokens, linear.weight.shape[1], dtype=model.dtype, device=model.device)
        for rows in product_rows(most_tokens):
            linear(x[:rows])
    hidden = torch.zeros(most_logits, model.config.hidden_size, dtype=model.dtype, device=model.device)
    for rows in product_rows(most_logits):
        project_to_logits(hidden[:rows], model.lm_head.weight)
