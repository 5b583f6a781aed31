"""Tiny random Qwen3 checkpoints, their float32 reference, and a driver that feeds a model through pages."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config
from transformers import Qwen3ForCausalLM as ReferenceModel

from nanovllm.engine.kv_cache import KVCache
from nanovllm.layers.attention import DecodeMetadata, PrefillMetadata, make_attention_backend
from nanovllm.models.loader import load_model
from nanovllm.models.model_config import ModelConfig, load_model_config
from nanovllm.models.qwen3 import Qwen3ForCausalLM

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "eos_token_id": 2,
}


def make_checkpoint(folder: Path, seed: int = 0, max_shard_size: str = "1GB", **overrides: Any) -> ReferenceModel:
    """Save a random float32 checkpoint with the settings of TINY and `overrides`; returns the reference model.

    The weights are large, and the norms' far from 1, so that an error in any of them shows in the logits.
    """
    settings = TINY | overrides
    rope = dict(settings.pop("rope_parameters"))
    config = Qwen3Config(**settings, rope_parameters=rope, attn_implementation="eager", dtype="float32")
    model = ReferenceModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.3, 1.7, generator=generator)
        else:
            parameter.data.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def edit_json(path: Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    """Set and remove keys of a JSON object on disk."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def publish_style(folder: Path) -> None:
    """Rewrite config.json the way the published checkpoints have it: flat RoPE keys, `torch_dtype`."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    rope = content["rope_parameters"]
    theta = rope.pop("rope_theta")
    scaling = rope if rope["rope_type"] != "default" else None
    remove = ("rope_parameters", "dtype", "layer_types")
    edit_json(path, remove, rope_theta=theta, rope_scaling=scaling, torch_dtype=content["dtype"])


@contextmanager
def edited_tensors(path: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of a safetensors file, written back on exit."""
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata={"format": "pt"})


def load_tiny(folder: Path, **options: Any) -> tuple[ModelConfig, Qwen3ForCausalLM]:
    """Config and model of a checkpoint, float32 on the CPU."""
    config = load_model_config(folder)
    backend = make_attention_backend("torch", config, torch.device("cpu"), torch.float32)
    arguments = {"dtype": torch.float32, "device": torch.device("cpu"), "max_position_tokens": 256} | options
    return config, load_model(folder, config, backend, **arguments)


@dataclass
class PagedSequence:
    """One sequence under test: all its tokens, how many have KV, its blocks."""

    tokens: list[int]
    block_table: list[int]
    num_computed: int = 0
    logits: list[Tensor] = field(default_factory=list)


class PagedDriver:
    """Feeds sequences through one model in chunks and steps, every page poisoned with NaN beforehand.

    Block ids are shuffled; columns of a table past a sequence's own blocks name other sequences' blocks.
    """

    def __init__(self, model: Qwen3ForCausalLM, config: ModelConfig, block_size: int, seed: int = 0) -> None:
        self.model, self.block_size = model, block_size
        self.cache = KVCache(256, block_size, config, model.dtype, model.device)
        self.cache.pages.fill_(float("nan"))
        self.random = random.Random(seed)
        self.free = self.random.sample(range(256), 256)

    def add(self, tokens: list[int]) -> PagedSequence:
        num_blocks = -(-len(tokens) // self.block_size)
        return PagedSequence(tokens, [self.free.pop() for _ in range(num_blocks)])

    def prefill(self, chunks: list[tuple[PagedSequence, int]]) -> None:
        """One call over (sequence, tokens of this chunk); keeps the logits of every position."""
        ends = [sequence.num_computed + length for sequence, length in chunks]
        spans = [range(sequence.num_computed, end) for (sequence, _), end in zip(chunks, ends, strict=True)]
        sequences = [sequence for sequence, _ in chunks]
        metadata = self._prefill_metadata(sequences, spans)
        ids = [sequence.tokens[position] for sequence, span in zip(sequences, spans, strict=True) for position in span]
        positions = [position for span in spans for position in span]
        device = self.model.device
        ids_T, positions_T = torch.tensor(ids, device=device), torch.tensor(positions, device=device)
        every_row = torch.arange(len(ids), device=device)
        logits = self.model.forward_prefill(ids_T, positions_T, self.cache, metadata, every_row)
        for sequence, span, rows in zip(sequences, spans, logits.split([len(s) for s in spans]), strict=True):
            sequence.logits.extend(rows.cpu())
            sequence.num_computed = span.stop

    def decode(self, sequences: list[PagedSequence], padding: int = 1) -> None:
        """One token for each sequence, and `padding` rows that write to the null block."""
        device, null = self.model.device, self.cache.null_block
        positions = [sequence.num_computed for sequence in sequences]
        slots = [self._slot(sequence, position) for sequence, position in zip(sequences, positions, strict=True)]
        lens = torch.tensor([position + 1 for position in positions] + [0] * padding, dtype=torch.int32, device=device)
        metadata = DecodeMetadata(
            context_lens=lens,
            block_tables=self._tables([sequence.block_table for sequence in sequences] + [[null]] * padding),
            slot_mapping=torch.tensor(slots + [null * self.block_size] * padding, device=device),
            max_context_tokens=max(positions) + 1 + self.block_size,
        )
        ids = [sequence.tokens[sequence.num_computed] for sequence in sequences] + [0] * padding
        ids_B = torch.tensor(ids, device=device)
        positions_B = torch.tensor(positions + [0] * padding, device=device)
        logits = self.model.forward_decode(ids_B, positions_B, self.cache, metadata)
        assert torch.isfinite(logits).all()
        for sequence, row in zip(sequences, logits.cpu(), strict=False):
            sequence.logits.append(row)
            sequence.num_computed += 1

    def _prefill_metadata(self, sequences: list[PagedSequence], spans: list[range]) -> PrefillMetadata:
        query_lens, context_lens = [len(span) for span in spans], [span.stop for span in spans]
        slots = [self._slot(s, position) for s, span in zip(sequences, spans, strict=True) for position in span]
        starts = [sum(query_lens[:index]) for index in range(len(spans) + 1)]
        device = self.model.device
        return PrefillMetadata(
            cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
            block_tables=self._tables([sequence.block_table for sequence in sequences]),
            slot_mapping=torch.tensor(slots, device=device),
            max_query_tokens=max(query_lens),
            max_context_tokens=max(context_lens),
            host_query_lens=tuple(query_lens),
            host_context_lens=tuple(context_lens),
        )

    def _slot(self, sequence: PagedSequence, position: int) -> int:
        return sequence.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def _tables(self, tables: list[list[int]]) -> Tensor:
        width = max(map(len, tables)) + 1
        padded = [table + [self.random.randrange(256) for _ in range(width - len(table))] for table in tables]
        return torch.tensor(padded, dtype=torch.int32, device=self.model.device)


@torch.no_grad()
def reference_logits(reference: ReferenceModel, tokens: list[int]) -> Tensor:
    """float32 logits [tokens, vocab_size] of one teacher-forced sequence."""
    return reference(torch.tensor([tokens])).logits[0].float()
