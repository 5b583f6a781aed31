"""Qwen3 dense, over a paged KV cache. Prefill, decode and both together are one loop over two stages a layer.

Between stages a pair travels: `hidden`, the last stage's output, and `residual`, the stream before it was
added (None ahead of the first layer). The stream's value is their sum; each stage's norm does the adding.
Letters in names: T tokens of a prefill batch, B decode rows, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from nanovllm.engine.kv_cache import KVCache
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, MixedMetadata, PrefillMetadata
from nanovllm.layers.elementwise import Elementwise
from nanovllm.layers.embedding import Embedding, project_to_logits
from nanovllm.layers.linear import FusedLinear, Linear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.models.model_config import ModelConfig

AttentionMetadata = PrefillMetadata | DecodeMetadata | MixedMetadata


class Qwen3Attention(nn.Module):
    """Grouped-query attention with an RMSNorm on every query and key head, before RoPE."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        rotary: RotaryEmbedding,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.rotary, self.backend = rotary, backend
        parts = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
        self.qkv_proj = FusedLinear(config.hidden_size, parts, dtype, device)
        self.o_proj = Linear(config.q_size, config.hidden_size, dtype, device)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, device)

    def attend(
        self, q_THD: Tensor, kv_cache: KVCache, metadata: AttentionMetadata, backend: AttentionBackend
    ) -> Tensor:
        """Attention alone, [tokens, H, D]; the tokens' own KV must have been stored."""
        k_pages, v_pages = kv_cache.layer_view(self.layer)
        if isinstance(metadata, PrefillMetadata):
            return backend.prefill(q_THD, k_pages, v_pages, metadata)
        if isinstance(metadata, DecodeMetadata):
            return backend.decode(q_THD, k_pages, v_pages, metadata)
        return backend.mixed(q_THD, k_pages, v_pages, metadata)

    def checkpoint_slots(self) -> dict[str, Tensor]:
        return self.qkv_proj.checkpoint_slots() | _slots(self, "o_proj", "q_norm", "k_norm")


class Qwen3MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = FusedLinear(config.hidden_size, parts, dtype, device)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, dtype, device)

    def forward(self, norm: RMSNorm, x: Tensor, residual: Tensor, elementwise: Elementwise) -> tuple[Tensor, Tensor]:
        """(output for the normalised x + residual, new residual), [tokens, hidden]."""
        activated, residual = elementwise.norm_swiglu(norm, self.gate_up_proj, x, residual)
        return elementwise.linear(self.down_proj, activated), residual

    def checkpoint_slots(self) -> dict[str, Tensor]:
        return self.gate_up_proj.checkpoint_slots() | _slots(self, "down_proj")


class Qwen3DecoderLayer(nn.Module):
    """One layer in parts, which may run on different partitions of a card, each with a backend of its own.

    The weights are shared; a backend brings what is sized for its partition.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        rotary: RotaryEmbedding,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config, layer, rotary, backend, dtype, device)
        self.mlp = Qwen3MLP(config, dtype, device)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)

    def project_qkv(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        backend: AttentionBackend,
    ) -> tuple[Tensor, Tensor]:
        """Norm, QKV, head norms, RoPE, KV store: (queries [tokens, H, D], new residual)."""
        attention, elementwise = self.self_attn, backend.elementwise
        qkv, residual = elementwise.norm_linear(self.input_layernorm, attention.qkv_proj, hidden, residual)
        pages = kv_cache.layer_view(attention.layer)
        return elementwise.split_qkv(attention, qkv, positions, pages, metadata.slot_mapping), residual

    def project_out(self, attended_THD: Tensor, backend: AttentionBackend) -> Tensor:
        """Output projection of what `attend` gave: the stage's hidden."""
        return backend.elementwise.linear(self.self_attn.o_proj, attended_THD.flatten(-2))

    def forward_ffn_stage(self, hidden: Tensor, residual: Tensor, backend: AttentionBackend) -> tuple[Tensor, Tensor]:
        """Norm, gate and up, SiLU product, down."""
        output: tuple[Tensor, Tensor] = self.mlp(self.post_attention_layernorm, hidden, residual, backend.elementwise)
        return output

    def checkpoint_slots(self) -> dict[str, Tensor]:
        return _slots(self, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


class Qwen3ForCausalLM(nn.Module):
    """The whole model on one card, its weights uninitialised (see `nanovllm.models.loader`).

    `max_position_tokens` bounds the positions it may be given. No weight requires a gradient, so it needs no
    autograd mode around it.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
        max_position_tokens: int,
    ) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.dtype, self.max_position_tokens = dtype, max_position_tokens
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, device)
        self.device = self.embed_tokens.weight.device  # with its index, where the caller said "cuda"
        rotary = RotaryEmbedding(config, max_position_tokens, device)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, layer, rotary, attention, dtype, device)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.lm_head = (
            self.embed_tokens
            if config.tie_word_embeddings
            else Embedding(config.vocab_size, config.hidden_size, dtype, device)
        )

    def forward_prefill(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        kv_cache: KVCache,
        metadata: PrefillMetadata,
        logits_index: Tensor,
        backend: AttentionBackend | None = None,
    ) -> Tensor:
        """Compute a batch of chunks and store their KV; float32 logits [len(logits_index), vocab_size].

        input_ids_T, positions_T: int64 [T], the sequences' tokens one after the other. logits_index: int64,
        the rows of T whose logits are wanted (last tokens of finished prompts); if none, no lm_head work. backend: of
        the layers, where it is not the model's own.
        """
        hidden, residual = self._forward_layers(input_ids_T, positions_T, kv_cache, metadata, backend)
        if logits_index.shape[0] == 0:
            return hidden.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        return self._logits_of(hidden, residual, logits_index)

    def forward_decode(
        self,
        input_ids_B: Tensor,
        positions_B: Tensor,
        kv_cache: KVCache,
        metadata: DecodeMetadata,
        out: Tensor | None = None,
        backend: AttentionBackend | None = None,
    ) -> Tensor:
        """One token for each row, int64 [B]; float32 logits [B, vocab_size], in `out` if given. Never waits.

        backend: of the layers, where it is not the model's own.
        """
        hidden, residual = self._forward_layers(input_ids_B, positions_B, kv_cache, metadata, backend)
        return self.compute_logits(hidden, residual, out)

    def forward_mixed(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: MixedMetadata,
        logits_index: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """`forward_prefill` and `forward_decode` at once, so that the weights are read once.

        input_ids, positions: int64 [T + B], the chunks' tokens, then one for each row. logits_index: int64, which of
        these tokens' logits are wanted, at least one; float32 [len(logits_index), vocab_size], in `out` if given.
        """
        hidden, residual = self._forward_layers(input_ids, positions, kv_cache, metadata)
        return self._logits_of(hidden, residual, logits_index, out)

    def _logits_of(self, hidden: Tensor, residual: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
        return self.compute_logits(hidden.index_select(-2, index), residual[index], out)

    def _forward_layers(
        self,
        input_ids: Tensor,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        backend: AttentionBackend | None = None,
    ) -> tuple[Tensor, Tensor]:
        hidden: Tensor = self.embed_tokens(input_ids)
        residual: Tensor | None = None
        places = positions, kv_cache, metadata
        for layer in range(self.config.num_hidden_layers):
            hidden, residual = self.forward_attention_stage(layer, hidden, residual, *places, backend)
            hidden, residual = self.forward_ffn_stage(layer, hidden, residual, backend)
        assert residual is not None, "a model has at least one layer"
        return hidden, residual

    def forward_attention_stage(
        self,
        layer: int,
        hidden: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        backend: AttentionBackend | None = None,
    ) -> tuple[Tensor, Tensor]:
        """StageA of `layer`: norm, QKV, head norms, RoPE, KV store, attention, output projection."""
        q_THD, residual = self.project_qkv(layer, hidden, residual, positions, kv_cache, metadata, backend)
        attended_THD = self.attend(layer, q_THD, kv_cache, metadata, backend)
        return self.project_out(layer, attended_THD, backend), residual

    def forward_ffn_stage(
        self, layer: int, hidden: Tensor, residual: Tensor, backend: AttentionBackend | None = None
    ) -> tuple[Tensor, Tensor]:
        """StageF of `layer`: norm, gate and up, SiLU product, down."""
        return self._layer(layer).forward_ffn_stage(hidden, residual, backend or self.attention)

    def project_qkv(
        self,
        layer: int,
        hidden: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        backend: AttentionBackend | None = None,
    ) -> tuple[Tensor, Tensor]:
        """StageA of `layer` up to attention: (queries [tokens, H, D], new residual); the tokens' KV is stored."""
        backend = backend or self.attention
        return self._layer(layer).project_qkv(hidden, residual, positions, kv_cache, metadata, backend)

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        backend: AttentionBackend | None = None,
    ) -> Tensor:
        """Attention of `layer` alone, [tokens, H, D]."""
        return self._layer(layer).self_attn.attend(q_THD, kv_cache, metadata, backend or self.attention)

    def project_out(self, layer: int, attended_THD: Tensor, backend: AttentionBackend | None = None) -> Tensor:
        """StageA of `layer` behind attention: the stage's hidden."""
        return self._layer(layer).project_out(attended_THD, backend or self.attention)

    def _layer(self, layer: int) -> Qwen3DecoderLayer:
        return cast(Qwen3DecoderLayer, self.layers[layer])

    def final_norm(self, hidden: Tensor, residual: Tensor, backend: AttentionBackend | None = None) -> Tensor:
        """Of what the last layer returned, [rows, hidden]."""
        return (backend or self.attention).elementwise.add_norm(self.norm, hidden, residual)[0]

    def compute_logits(self, hidden: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
        """Final norm and projection of what the last layer returned; float32 [rows, vocab_size]."""
        return project_to_logits(self.final_norm(hidden, residual), self.lm_head.weight, out)

    def copy_to(self, device: torch.device, attention: AttentionBackend | None = None) -> Qwen3ForCausalLM:
        """The same weights in storage of their own on `device`; complete when it returns.

        `attention`: a backend for the copy, where the backend keeps state per card; by default the same one.
        """
        copy = Qwen3ForCausalLM(self.config, attention or self.attention, self.dtype, device, self.max_position_tokens)
        for source, target in zip(self.parameters(), copy.parameters(), strict=True):
            target.copy_(source)
        if copy.device.type == "cuda":
            torch.cuda.synchronize(copy.device)  # streams other than today's will read them
        return copy

    def checkpoint_slots(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint must hold: its name there → the view of a parameter that takes it."""
        slots = {f"model.{name}": slot for name, slot in _slots(self, "embed_tokens", "norm").items()}
        for index in range(self.config.num_hidden_layers):
            of_layer = self._layer(index).checkpoint_slots()
            slots |= {f"model.layers.{index}.{name}": slot for name, slot in of_layer.items()}
        return slots if self.config.tie_word_embeddings else slots | _slots(self, "lm_head")


def _slots(module: nn.Module, *children: str) -> dict[str, Tensor]:
    """The checkpoint slots of the named children, their names prefixed with the child's."""
    return {
        f"{child}.{name}": slot
        for child in children
        for name, slot in getattr(module, child).checkpoint_slots().items()
    }
