"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), rotate-half form, with YaRN scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nanovllm.models.model_config import ModelConfig, YarnScaling


class RotaryEmbedding(nn.Module):
    """A float32 table of this model's angles: row p holds cos, then sin, of its head_dim / 2 frequencies.

    Computed on the CPU, so that all cards hold the same bits. YaRN's attention factor is part of the table.
    """

    cos_sin: Tensor  # [max_position_tokens, head_dim]

    def __init__(self, config: ModelConfig, max_position_tokens: int, device: torch.device) -> None:
        super().__init__()
        frequencies, factor = rope_frequencies(config)
        angles = torch.arange(max_position_tokens, dtype=torch.float32)[:, None] * frequencies
        cos_sin = torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1)
        self.register_buffer("cos_sin", cos_sin.to(device), persistent=False)

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k [tokens, heads, head_dim] to positions [tokens], in float32; their dtype is kept."""
        cos, sin = self.cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim / 2]) by the angles of cos and sin [tokens, 1, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Radians per position, float32 [head_dim / 2], and the factor that multiplies cos and sin."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    wavelengths, yarn = config.rope_theta**exponents, config.rope_scaling
    if yarn is None:
        return 1.0 / wavelengths, 1.0
    return _yarn_frequencies(config, yarn, wavelengths), _yarn_attention_factor(yarn)


def _yarn_frequencies(config: ModelConfig, yarn: YarnScaling, wavelengths: Tensor) -> Tensor:
    """Slow dimensions are interpolated by `factor`, fast ones kept, with a linear ramp between (section 3.2).

    The order of operations is the one transformers has: at position 100,000 a last bit is 0.006 radians.
    """
    low, high = _ramp_borders(config, yarn)
    high = high + 0.001 if high == low else high  # a ramp of no width would divide by zero
    ramp = ((torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (yarn.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _ramp_borders(config: ModelConfig, yarn: YarnScaling) -> tuple[float, float]:
    """The dimensions that turn `beta_fast` and `beta_slow` times over the original context."""

    def dimension(turns: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, config.head_dim - 1)


def _yarn_attention_factor(yarn: YarnScaling) -> float:
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
