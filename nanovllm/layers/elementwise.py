"""What lies between a layer's matrix products: plain torch modules, or one Triton kernel each. The same mathematics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from nanovllm.layers.norm import RMSNorm

if TYPE_CHECKING:
    from nanovllm.models.qwen3 import Qwen3Attention


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
    """One kernel each. CUDA only."""

    name = "triton"

    def __init__(self) -> None:
        # Here: a CPU build of torch comes without Triton.
        from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store
        from nanovllm.kernels.rms_norm import add_rms_norm
        from nanovllm.kernels.silu_mul import silu_mul

        self._add_rms_norm, self._qk_norm_rope_store, self._silu_mul = add_rms_norm, qk_norm_rope_store, silu_mul

    def add_norm(self, norm: RMSNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._add_rms_norm(x, residual, norm.weight, norm.eps)

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
        return self._qk_norm_rope_store(qkv, q_weight, k_weight, table, positions, *pages, slot_mapping, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._silu_mul(gate_up)
