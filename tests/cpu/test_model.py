"""The model, teacher-forced, against transformers' float32 logits at every position."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanovllm.engine.kv_cache import KVCache
from nanovllm.layers.attention import DecodeMetadata, make_attention_backend
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RotaryEmbedding, rope_frequencies
from nanovllm.models.model_config import load_model_config
from tests.cpu.model_helpers import (
    PagedDriver,
    PagedSequence,
    edited_tensors,
    load_tiny,
    make_checkpoint,
    publish_style,
    reference_logits,
)

BOUND = 2e-4
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "tied-group1-dim64": dict(tie_word_embeddings=True, num_attention_heads=2, head_dim=64),
    "untied-group2-dim128": dict(hidden_size=96, head_dim=128),
    "tied-group4-theta5e6": dict(
        tie_word_embeddings=True, num_attention_heads=8, rope_parameters={"rope_type": "default", "rope_theta": 5e6}
    ),
    "untied-group5": dict(num_attention_heads=10, head_dim=32, num_hidden_layers=3, rms_norm_eps=1e-3),
    "yarn-group2-dim64": dict(head_dim=64, rope_parameters=YARN),
    "yarn-explicit-factor": dict(
        head_dim=32, rope_parameters=YARN | {"attention_factor": 1.6, "beta_fast": 8.0, "beta_slow": 2.0}
    ),
    "yarn-mscale-no-truncate": dict(
        num_key_value_heads=4, rope_parameters=YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False}
    ),
}


def run_paged(
    driver: PagedDriver, token_lists: list[list[int]], prompt_lens: list[int], chunk: int
) -> list[PagedSequence]:
    """Prefill all prompts together, at most `chunk` tokens each a call; then decode the other tokens together."""
    sequences = [driver.add(tokens) for tokens in token_lists]
    lengths = dict(zip(map(id, sequences), prompt_lens, strict=True))
    while waiting := [s for s in sequences if s.num_computed < lengths[id(s)]]:
        driver.prefill([(s, min(chunk, lengths[id(s)] - s.num_computed)) for s in waiting])
    while decoding := [s for s in sequences if s.num_computed < len(s.tokens)]:
        driver.decode(decoding, padding=1 + len(decoding) % 2)
    return sequences


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_transformers_at_every_position(name: str, tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, seed=len(name), **CONFIGS[name])
    if name.startswith("yarn"):
        publish_style(tmp_path)
    config, model = load_tiny(tmp_path)
    block = 4
    prompt_lens = [1, block - 1, block, block + 1, 3 * block + 2, 9 * block]
    rng = random.Random(name)
    token_lists = [[rng.randrange(97) for _ in range(n + 1 + index)] for index, n in enumerate(prompt_lens)]
    sequences = run_paged(PagedDriver(model, config, block), token_lists, prompt_lens, chunk=7)
    for sequence in sequences:
        expected = reference_logits(reference, sequence.tokens)
        assert expected.std() > 0.3  # flat logits would hide everything
        torch.testing.assert_close(torch.stack(sequence.logits), expected, atol=BOUND, rtol=0)


def test_chunk_boundaries_around_a_block(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, num_attention_heads=10, head_dim=16)
    config, model = load_tiny(tmp_path)
    tokens = torch.randint(97, (33,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = reference_logits(reference, tokens)
    for chunk in (1, 15, 16, 17, 33):
        (sequence,) = run_paged(PagedDriver(model, config, 16, seed=chunk), [tokens], [33], chunk)
        torch.testing.assert_close(torch.stack(sequence.logits), expected, atol=BOUND, rtol=0)


def test_tied_model_ignores_the_output_matrix_a_file_still_carries(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, tie_word_embeddings=True)
    with edited_tensors(tmp_path / "model.safetensors") as tensors:
        tensors["lm_head.weight"] = torch.randn(97, 48)
    config, model = load_tiny(tmp_path)
    assert model.lm_head is model.embed_tokens
    (sequence,) = run_paged(PagedDriver(model, config, 4), [[5, 6, 7, 8, 9]], [3], chunk=8)
    expected = reference_logits(reference, sequence.tokens)
    torch.testing.assert_close(torch.stack(sequence.logits), expected, atol=BOUND, rtol=0)


def test_long_prompt_crosses_query_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.layers.attention.torch.QUERY_TILE_TOKENS", 5)
    reference = make_checkpoint(tmp_path)
    config, model = load_tiny(tmp_path)
    tokens = list(range(40))
    (sequence,) = run_paged(PagedDriver(model, config, 8), [tokens], [40], chunk=23)
    expected = reference_logits(reference, tokens)
    torch.testing.assert_close(torch.stack(sequence.logits), expected, atol=BOUND, rtol=0)


def test_yarn_frequencies_and_factor_are_those_of_transformers(tmp_path: Path) -> None:
    for index, (name, overrides) in enumerate(CONFIGS.items()):
        reference = make_checkpoint(tmp_path / str(index), **overrides)
        config = load_model_config(tmp_path / str(index))
        frequencies, factor = rope_frequencies(config)
        if "yarn" in name:
            expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](reference.config, torch.device("cpu"))
            assert torch.equal(frequencies, expected) and factor == expected_factor and factor != 1
        assert torch.equal(frequencies, reference.model.rotary_emb.inv_freq)


def test_rope_table_matches_transformers_far_out(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, **CONFIGS["yarn-group2-dim64"])
    config = load_model_config(tmp_path)
    table = RotaryEmbedding(config, 131072, torch.device("cpu")).cos_sin
    positions = torch.tensor([[0, 1, 63, 64, 4095, 131071]])
    cos, sin = reference.model.rotary_emb(torch.zeros(1), positions)
    expected = torch.cat([cos[0, :, :32], sin[0, :, :32]], dim=-1)
    torch.testing.assert_close(table[positions[0]], expected, atol=1e-6, rtol=0)


def test_norm_casts_before_the_weight() -> None:
    norm = RMSNorm(64, 1e-6, torch.bfloat16, torch.device("cpu"))
    norm.weight.copy_(torch.linspace(0.3, 1.7, 64))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), wide.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (wide * norm.weight.float()).bfloat16())


def test_empty_logits_index_stores_kv_and_skips_the_head(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config, model = load_tiny(tmp_path)
    model.lm_head.weight.fill_(float("nan"))
    driver = PagedDriver(model, config, 4)
    sequence = driver.add([1, 2, 3])
    metadata = driver._prefill_metadata([sequence], [range(3)])
    ids, none = torch.tensor([1, 2, 3]), torch.empty(0, dtype=torch.int64)
    logits = model.forward_prefill(ids, torch.arange(3), driver.cache, metadata, none)
    assert logits.shape == (0, 97) and logits.dtype == torch.float32
    assert torch.isfinite(driver.cache.pages[sequence.block_table[0], :, :, :3]).all()


def test_stages_by_hand_are_the_forward(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config, model = load_tiny(tmp_path)
    cache = KVCache(2, 4, config, torch.float32, torch.device("cpu"))
    metadata = DecodeMetadata(
        torch.tensor([1, 1], dtype=torch.int32), torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([0, 4]), 1
    )
    ids, positions = torch.tensor([3, 4]), torch.tensor([0, 0])
    hidden, residual = model.embed_tokens(ids), None
    for layer in range(2):
        hidden, residual = model.forward_attention_stage(layer, hidden, residual, positions, cache, metadata)
        hidden, residual = model.forward_ffn_stage(layer, hidden, residual)
    by_hand = model.compute_logits(hidden, residual)
    assert torch.equal(by_hand, model.forward_decode(ids, positions, cache, metadata))


@pytest.mark.parametrize("tied", [True, False])
def test_copy_has_its_own_storage_and_the_same_answers(tied: bool, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=tied)
    config, model = load_tiny(tmp_path)
    copy = model.copy_to(torch.device("cpu"))
    before = run_paged(PagedDriver(copy, config, 4), [[1, 2, 3, 4]], [3], 8)[0].logits
    assert (copy.lm_head is copy.embed_tokens) == tied
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    after = run_paged(PagedDriver(copy, config, 4), [[1, 2, 3, 4]], [3], 8)[0].logits
    assert torch.equal(torch.stack(before), torch.stack(after))
    rotary, copied = model.layers[0].self_attn.rotary, copy.layers[0].self_attn.rotary
    assert torch.equal(rotary.cos_sin, copied.cos_sin) and rotary.cos_sin.data_ptr() != copied.cos_sin.data_ptr()


def test_bfloat16_runs_close_to_float32(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path)
    config, model = load_tiny(tmp_path, dtype=torch.bfloat16)
    (sequence,) = run_paged(PagedDriver(model, config, 4), [list(range(20))], [12], 5)
    logits = torch.stack(sequence.logits)
    assert logits.dtype == torch.float32
    error = (logits - reference_logits(reference, sequence.tokens)).abs()
    assert error.mean() < 0.05 and error.max() < 0.5


def test_backend_names(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config = load_model_config(tmp_path)
    cpu, dtype = torch.device("cpu"), torch.float32
    assert make_attention_backend("auto", config, cpu, dtype).name == "torch"
    for name in ("triton", "flash_attn"):
        with pytest.raises(ValueError, match=f"'{name}' needs a CUDA device"):
            make_attention_backend(name, config, cpu, dtype)
    with pytest.raises(ValueError, match="'paper'"):
        make_attention_backend("paper", config, cpu, dtype)
