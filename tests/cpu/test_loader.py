"""Configs and weight files: what is read, and the table of what is refused by name."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from nanovllm.models import loader
from nanovllm.models.loader import StagedCopies, load_model, resolve_model
from nanovllm.models.model_config import ModelConfig, YarnScaling, load_model_config
from tests.cpu.model_helpers import edit_json, edited_tensors, load_tiny, make_checkpoint, publish_style

# What the 0.6B model publishes, key for key.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
    "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def write_config(folder: Path, remove: tuple[str, ...] = (), **changes: Any) -> Path:
    content = {key: value for key, value in (PUBLISHED | changes).items() if key not in remove}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_published_config(tmp_path: Path) -> None:
    config = load_model_config(write_config(tmp_path))
    assert (config.hidden_size, config.q_size, config.kv_size) == (1024, 2048, 1024)
    assert (config.rope_theta, config.dtype, config.rope_scaling) == (1e6, "bfloat16", None)
    assert config.eos_token_ids == (151645,) and config.tie_word_embeddings
    assert config.kv_bytes_per_token(2) == 4096 * 28
    assert config.num_parameters() == 596_049_920
    assert config.max_context_tokens == 40960


def test_generation_config_decides_the_eos_ids(tmp_path: Path) -> None:
    write_config(tmp_path)
    generation = tmp_path / "generation_config.json"
    for value, expected in (([151645, 151643], (151645, 151643)), (7, (7,)), (None, (151645,))):
        generation.write_text(json.dumps({"eos_token_id": value}))
        assert load_model_config(tmp_path).eos_token_ids == expected
    generation.unlink()
    assert load_model_config(write_config(tmp_path, eos_token_id=None)).eos_token_ids == ()


def test_yarn_config(tmp_path: Path) -> None:
    for scaling in (YARN, {**YARN, "type": YARN["rope_type"]}):
        config = load_model_config(write_config(tmp_path, rope_scaling=scaling))
        assert config.rope_scaling == YarnScaling(4.0, 32768) and config.max_context_tokens == 131072
    old_name = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768, "attention_factor": 1.2}
    config = load_model_config(write_config(tmp_path, rope_scaling=old_name))
    assert config.rope_scaling == YarnScaling(4.0, 32768, attention_factor=1.2)


def test_both_config_styles_say_the_same(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 5e6, "factor": 2.0, "original_max_position_embeddings": 128}
    make_checkpoint(tmp_path, rope_parameters=rope)
    recent = load_model_config(tmp_path)
    assert "rope_parameters" in (tmp_path / "config.json").read_text()
    publish_style(tmp_path)
    assert load_model_config(tmp_path) == recent and recent.rope_theta == 5e6


def test_missing_folder_and_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model_config(tmp_path)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe'"),
    ({"model_type": 3}, "model_type=3 must be a string"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"layer_types": 3}, "layer_types=3"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"torch_dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
    ({"num_key_value_heads": 3}, "num_attention_heads=16 .* num_key_value_heads=3"),
    ({"hidden_size": 0}, "hidden_size=0 must be positive"),
    ({"vocab_size": -5}, "vocab_size=-5 must be positive"),
    ({"head_dim": 127}, "head_dim=127"),
    ({"head_dim": None}, "head_dim is missing"),
    ({"hidden_size": "1024"}, "hidden_size='1024' must be an integer"),
    ({"num_hidden_layers": 28.0}, "num_hidden_layers=28.0 must be an integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True must be an integer"),
    ({"num_hidden_layers": 10**400}, "num_hidden_layers=.* out of range"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0.0 must be positive"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"rope_theta": 0.5}, "rope_theta=0.5"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
    ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
    ({"eos_token_id": [1, True]}, "eos_token_id="),
    ({"eos_token_id": 151936}, "eos_token_id=151936"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type='dynamic'"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_type is missing"),
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn'"),
    ({"rope_scaling": {**YARN, "mrope_section": [1]}}, "mrope_section"),
    ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor=0.5"),
    ({"rope_scaling": {**YARN, "factor": None}}, "rope_scaling.key factor is missing"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": None}}, "original_max_position_embeddings"),
    ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_fast=0.5 is below beta_slow"),
    ({"rope_scaling": YARN, "rope_parameters": YARN}, "both set"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, "given twice"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS, ids=lambda value: str(value)[:60])
def test_bad_configs_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


REQUIRED = ("model_type", "hidden_act", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_theta",
            "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "torch_dtype",
            "max_position_embeddings", "tie_word_embeddings", "eos_token_id")  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_no_default_stands_in_for_a_missing_key(key: str, tmp_path: Path) -> None:
    write_config(tmp_path, remove=(key,))
    with pytest.raises(ValueError, match=f"key {key} is missing"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe{}", b""])
def test_broken_json_names_the_file(name: str, content: bytes, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_model_config(tmp_path)


def test_model_config_imports_no_torch() -> None:
    """Loaded from its file alone, so that the package's own imports do not count."""
    path = Path(__file__).parents[2] / "nanovllm/models/model_config.py"
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('m', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); sys.modules['m'] = module; spec.loader.exec_module(module);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0


# --- weights ---------------------------------------------------------------------------------------------------


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    _, model = load_tiny(folder)
    return {name: slot.clone() for name, slot in model.checkpoint_slots().items()}


def test_single_and_sharded_checkpoints_fill_the_same_weights(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path / "one")
    make_checkpoint(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "many")
    expected = reference.state_dict()
    assert set(one) == set(many) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(one[name], tensor) and torch.equal(many[name], tensor), name


def test_weights_are_cast(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path)
    _, model = load_tiny(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    slots = model.checkpoint_slots()
    assert all(torch.equal(slots[name], tensor.bfloat16()) for name, tensor in reference.state_dict().items())


def test_extra_tensors_that_real_files_carry(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    with edited_tensors(tmp_path / "model.safetensors") as tensors:
        tensors["lm_head.weight"] = torch.zeros(97, 48)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    assert "lm_head.weight" not in weights_of(tmp_path)


NORM = "model.layers.1.self_attn.q_norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BAD_TENSORS: list[tuple[dict[str, torch.Tensor | None], str]] = [
    ({NORM: None}, f"missing from the checkpoint: {NORM}"),
    ({"model.embed_tokens.weight": None}, r"missing.*model\.embed_tokens\.weight"),
    ({"lm_head.weight": None}, r"missing.*lm_head\.weight"),
    ({Q_PROJ: torch.zeros(48, 48)}, rf"{Q_PROJ} has shape \[48, 48\], expected \[64, 48\]"),
    ({NORM: torch.zeros(48)}, rf"{NORM} has shape \[48\], expected \[16\]"),
    ({Q_PROJ: torch.zeros(64, 48, dtype=torch.int8)}, rf"{Q_PROJ} is of dtype torch\.int8"),
    ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, r"unexpected tensor.*q_proj\.bias"),
    ({"model.layers.2.input_layernorm.weight": torch.zeros(48)}, r"unexpected tensor.*layers\.2"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_TENSORS, ids=lambda value: str(value)[:50])
def test_bad_tensors_are_named(changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with edited_tensors(tmp_path / "model.safetensors") as tensors:
        tensors |= changes
        for name in [name for name, tensor in changes.items() if tensor is None]:
            del tensors[name]
    with pytest.raises(ValueError, match=message):
        load_tiny(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 60, 5000, -8])
@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_file_is_named(keep: int, sharded: bool, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{path.name} is not a readable safetensors file"):
        load_tiny(tmp_path)


def test_corrupt_header_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtyqe"', 1))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable"):
        load_tiny(tmp_path)


def test_no_safetensors_at_all(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin cannot be read: safetensors only"):
        load_tiny(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load_tiny(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="20KB")
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        load_tiny(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    with edited_tensors(first) as source, edited_tensors(second) as target:
        name = next(iter(source))
        target[name] = source[name].clone()
    with pytest.raises(ValueError, match=f"{name} is in two files"):
        load_tiny(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a.safetensors"]}'])
def test_broken_index_is_named(content: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        load_tiny(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/x.safetensors", "a/b.safetensors", "..", "a\\b.safetensors", "x.bin", 3, None]
)
def test_index_may_not_name_files_elsewhere(shard: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_checkpoint(folder)
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    edit_json_index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(edit_json_index))
    with pytest.raises(ValueError, match="a shard must be"):
        load_tiny(folder)


# --- the way into a GPU's memory, on a card that copies as late as it may -------------------------------------------


class LateCard:
    """Stands for CUDA: `non_blocking` copies are queued, and happen when an event behind them is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queue: list[Callable[[], object]] = []
        self.num_queued = 0
        empty, self.copy_now = torch.empty, torch.Tensor.copy_
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "Event", lambda: LateEvent(self))
        monkeypatch.setattr(torch.Tensor, "copy_", lambda *args, **options: self.copy(*args, **options))

    def copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return self.copy_now(target, source)
        self.queue.append(lambda: self.copy_now(target, source))
        self.num_queued += 1
        return target

    def run(self, count: int) -> None:
        for copy in self.queue[:count]:
            copy()
        del self.queue[:count]


class LateEvent:
    def __init__(self, card: LateCard) -> None:
        self.card, self.position = card, 0

    def record(self) -> None:
        self.position = self.card.num_queued

    def synchronize(self) -> None:
        done = self.card.num_queued - len(self.card.queue)
        self.card.run(self.position - done)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_staged_copies_overwrite_no_buffer_that_is_on_its_way(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_checkpoint(tmp_path).state_dict()
    _, model = load_tiny(tmp_path, dtype=dtype)
    slots = model.checkpoint_slots()
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    with monkeypatch.context() as patch:
        patch.setattr(loader, "STAGING_BYTES", 1000)  # no tensor is a multiple of it, most need several pieces
        card = LateCard(patch)
        copies = StagedCopies(torch.device("cpu"))
        for name, slot in slots.items():
            copies.write(slot, expected[name])
        assert card.num_queued > 2 * len(slots) and 0 < len(card.queue) <= 2
        card.run(len(card.queue))
    assert all(torch.equal(slots[name], expected[name].to(dtype)) for name in slots)


# --- dummy weights and names -------------------------------------------------------------------------------------


def tiny_config(**changes: Any) -> ModelConfig:
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, vocab_size=500, rms_norm_eps=1e-6, rope_theta=1e4,
                 max_position_embeddings=64, tie_word_embeddings=True, dtype="float32", rope_scaling=None,
                 eos_token_ids=())  # fmt: skip
    return ModelConfig(**(sizes | changes))


def dummy_model(config: ModelConfig, seed: int = 0) -> Any:
    from nanovllm.layers.attention import make_attention_backend

    backend = make_attention_backend("torch", config, torch.device("cpu"), torch.float32)
    folder = Path("no/such/folder")
    return load_model(folder, config, backend, torch.float32, torch.device("cpu"), 64, "dummy", seed)


def test_dummy_weights_need_no_files_and_follow_the_seed() -> None:
    one, same, other = (dummy_model(tiny_config(), seed) for seed in (0, 0, -1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embed_tokens.weight, other.embed_tokens.weight)
    assert (one.norm.weight == 1).all() and all(torch.isfinite(p).all() for p in one.parameters())
    assert sum(p.numel() for p in one.parameters()) == tiny_config().num_parameters()


@pytest.mark.parametrize("tied", [True, False])
def test_dummy_logits_are_neither_flat_nor_an_echo(tied: bool) -> None:
    from tests.cpu.model_helpers import PagedDriver

    config = tiny_config(tie_word_embeddings=tied)
    assert dummy_model(config).config.num_parameters() == sum(p.numel() for p in dummy_model(config).parameters())
    driver = PagedDriver(dummy_model(config), config, 16)
    sequence = driver.add(list(range(60)))
    driver.prefill([(sequence, 60)])
    logits = torch.stack(sequence.logits)
    best = logits.argmax(-1)
    assert 0.5 < logits.std() < 2 and len(best.unique()) > 20
    assert (best == torch.arange(60)).float().mean() < 0.3


def test_unknown_load_format() -> None:
    with pytest.raises(ValueError, match="'pickle'"):
        load_model(Path("x"), tiny_config(), None, torch.float32, torch.device("cpu"), 8, "pickle")  # type: ignore


def test_resolve_local_folder(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), None) == tmp_path
    with pytest.raises(ValueError, match="revision='v1'"):
        resolve_model(str(tmp_path), "v1")
    for name in (str(tmp_path / "nowhere"), "./nowhere", "~/nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="nowhere|a/b/c"):
            resolve_model(name, None)
    with pytest.raises(ValueError, match="model=''"):
        resolve_model("", None)


def test_resolve_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None, list[str]]] = []

    def download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("Qwen/Qwen3-0.6B", "abc") == tmp_path
    ((repo_id, revision, patterns),) = calls
    assert (repo_id, revision) == ("Qwen/Qwen3-0.6B", "abc")
    assert "*.safetensors" in patterns and not any(pattern.endswith((".bin", ".py", "*")) for pattern in patterns)


def test_failed_download_names_both_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"'Qwen/Qwen9'.*not a folder.*hub id.*offline"):
        resolve_model("Qwen/Qwen9", None)


def test_edited_file_still_loads(tmp_path: Path) -> None:
    """The helpers themselves: an edit that changes nothing breaks nothing."""
    make_checkpoint(tmp_path)
    with edited_tensors(tmp_path / "model.safetensors") as tensors:
        save_file(dict(tensors), tmp_path / "copy.safetensors")
    edit_json(tmp_path / "config.json", rope_theta=10000.0)
    assert weights_of(tmp_path)
