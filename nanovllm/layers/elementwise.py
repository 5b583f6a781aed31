"""What lies between a layer's matrix products, and at few rows those too: torch or Triton, the same mathematics.

With a handful of rows a product is nothing but reading its weights, and may have its neighbours fused into it. With
some more it may be split: `linear` and `norm_linear` then return, in place of a product [tokens, out], partial sums of
it, float32 [splits, tokens, out], which `add_norm`, `norm_linear`, `norm_swiglu` and `split_qkv` take in its place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import RMSNorm

if TYPE_CHECKING:
    from nanovllm.models.qwen3 import Qwen3Attention


MIN_LT_SMS = 32  # on 12 and 16 SMs, CUDA 13.0's cuBLASLt failed at 2 and 16 rows


class Elementwise(ABC):
    """Residual sum and norm; head norms, RoPE and KV store; SiLU product."""

    name: str

    @abstractmethod
    def add_norm(self, norm: RMSNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normalised, new residual) of x + residual, [tokens, hidden]. May write over both inputs."""

    @abstractmethod
    def split_qkv(
        self,
        attention: Qwen3Attention,
        qkv: Tensor,
        positions: Tensor,
        pages: tuple[Tensor, Tensor],
        slot_mapping: Tensor,
    ) -> Tensor:
        """Query [tokens, heads, head_dim] from the fused projection; keys and values go to their pages."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(first half) · second half of [tokens, 2 · intermediate]."""

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """x Wᵀ, [tokens, out], or its partial sums."""
        return linear(x)

    def norm_linear(self, norm: RMSNorm, linear: Linear, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(product of the normalised x + residual, new residual). May write over both inputs."""
        normed, residual = self.add_norm(norm, x, residual)
        return linear(normed), residual

    def norm_swiglu(self, norm: RMSNorm, gate_up: Linear, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(silu(gate) · up of the normalised x + residual, new residual). May write over both inputs."""
        product, residual = self.norm_linear(norm, gate_up, x, residual)
        return self.silu_mul(product), residual


class TorchElementwise(Elementwise):
    """The plain twin; runs everywhere."""

    name = "torch"

    def add_norm(self, norm: RMSNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return norm.forward_add(x, residual)

    def split_qkv(
        self,
        attention: Qwen3Attention,
        qkv: Tensor,
        positions: Tensor,
        pages: tuple[Tensor, Tensor],
        slot_mapping: Tensor,
    ) -> Tensor:
        parts = attention.qkv_proj.split(qkv)
        q_THD, k_TKD, v_TKD = (part.unflatten(-1, (-1, attention.head_dim)) for part in parts)
        q_THD, k_TKD = attention.rotary(positions, attention.q_norm(q_THD), attention.k_norm(k_TKD))
        attention.backend.store_kv(k_TKD, v_TKD, *pages, slot_mapping)
        return q_THD

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


class TritonElementwise(Elementwise):
    """One kernel each. CUDA only.

    num_sms: of the stream's partition, for which skinny products choose their tiles; None: the whole card. On a
    partition cuBLASLt, told the number of SMs, is faster than our split products, but for few rows it may choose a
    kernel that cannot run on a small one. The split products' table, measured on a whole card, holds there, too.
    """

    name = "triton"

    def __init__(self, num_sms: int | None = None) -> None:
        # Here: a CPU build of torch comes without Triton.
        from nanovllm.kernels import skinny_gemm, split_gemm
        from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store
        from nanovllm.kernels.rms_norm import add_rms_norm
        from nanovllm.kernels.silu_mul import silu_mul

        self.num_sms = num_sms
        self._skinny, self._split, self._on_partition = skinny_gemm, split_gemm, num_sms is not None
        self._splits = num_sms is None or num_sms < MIN_LT_SMS
        self._add_rms_norm, self._qk_norm_rope_store, self._silu_mul = add_rms_norm, qk_norm_rope_store, silu_mul

    def add_norm(self, norm: RMSNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._add_rms_norm(x, residual, norm.weight, norm.eps, num_sms=self.num_sms)

    def split_qkv(
        self,
        attention: Qwen3Attention,
        qkv: Tensor,
        positions: Tensor,
        pages: tuple[Tensor, Tensor],
        slot_mapping: Tensor,
    ) -> Tensor:
        q_weight, k_weight = attention.q_norm.weight, attention.k_norm.weight
        table, eps = attention.rotary.cos_sin, attention.q_norm.eps
        inputs = qkv, q_weight, k_weight, table, positions, *pages, slot_mapping, eps
        return self._qk_norm_rope_store(*inputs, num_sms=self.num_sms)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._silu_mul(gate_up, num_sms=self.num_sms)

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        if self._is_skinny(x) and not self._should_split(x, linear):
            return self._skinny.skinny_linear(x, linear.weight, num_sms=self.num_sms)
        return self._split_linear(linear, x)

    def _split_linear(self, linear: Linear, x: Tensor) -> Tensor:
        if self._should_split(x, linear):
            return self._split.split_linear(x, linear.weight, num_sms=self.num_sms)
        return linear(x)

    def _should_split(self, x: Tensor, linear: Linear) -> bool:
        return self._splits and self._split.should_split(x, linear.weight)

    def _product(self, linear: Linear, normed: Tensor) -> Tensor:
        """Behind a norm that is a kernel of its own."""
        return self.linear(linear, normed) if self._on_partition else self._split_linear(linear, normed)

    def _is_skinny(self, x: Tensor) -> bool:
        """Of few rows, and whole: partial sums have a dimension more."""
        return x.ndim == 2 and len(x) <= self._skinny.MAX_ROWS and x.shape[-1] % 16 == 0

    def norm_linear(self, norm: RMSNorm, linear: Linear, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._is_skinny(x) and self._skinny.should_fuse(len(x)):
            inputs = x, residual, norm.weight, norm.eps, linear.weight
            return self._skinny.norm_linear(*inputs, num_sms=self.num_sms)
        normed, residual = self.add_norm(norm, x, residual)
        return self._product(linear, normed), residual

    def norm_swiglu(self, norm: RMSNorm, gate_up: Linear, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_skinny(x) and self._skinny.should_fuse(len(x)):
            inputs = x, residual, norm.weight, norm.eps, gate_up.weight
            return self._skinny.norm_gate_up(*inputs, num_sms=self.num_sms)
        normed, residual = self.add_norm(norm, x, residual)
        if self._should_split(normed, gate_up):
            return self._split.split_gate_up(normed, gate_up.weight, num_sms=self.num_sms), residual
        return self.silu_mul(self._product(gate_up, normed)), residual
