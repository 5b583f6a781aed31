"""The sizes and constants of a Qwen3 checkpoint, read strictly from its config.json. Imports no torch.

Nothing is filled in from a library's defaults: they match no published model. What we cannot run is refused
here by name, so that no later stage has to ask.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from nanovllm.shown import shown

DTYPES = ("bfloat16", "float16", "float32")
LARGEST_VOCABULARY = 1 << 18  # the sampler's integer masses of so many ids fit in 64 bits
MOST_LAYERS = 1 << 10  # libraries underneath make lists that long, whatever config.json says
LARGEST_NUMBER = 1 << 40  # beyond any real size or constant, and safe in 64-bit arithmetic
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
YARN_NUMBERS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
YARN_KEYS = ("factor", "original_max_position_embeddings", "truncate", *YARN_NUMBERS)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (Peng et al., 2023, arXiv:2309.00071), with the fields transformers honours.

    `attention_factor` None: derived from `factor`, or from `mscale` over `mscale_all_dim` where both are set.
    `truncate`: round the ramp's borders to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32
    beta_slow: float = 1
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            _check_positive(name, getattr(self, name))
        if self.factor < 1:
            raise ValueError(f"factor={self.factor!r} must be at least 1")
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast!r} is below beta_slow={self.beta_slow!r}")
        if self.attention_factor is not None:
            _check_positive("attention_factor", self.attention_factor)


@dataclass(frozen=True)
class ModelConfig:
    """What the model code needs to know. `dtype` is the checkpoint's. Sizes are per model, not per card.

    `eos_token_ids` is empty only where the checkpoint says null: then only lengths and stops end a text.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    rope_scaling: YarnScaling | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in (*_SIZES, "rms_norm_eps", "rope_theta"):
            _check_positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates halves")
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(
                f"vocab_size={self.vocab_size} is above {LARGEST_VOCABULARY}, the most the sampler can draw from"
            )
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} is above {MOST_LAYERS}")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta={self.rope_theta} must be above 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={shown(self.dtype)} must be one of {', '.join(DTYPES)}")
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"eos_token_id={token_id} is outside 0 … {self.vocab_size - 1}")

    @property
    def q_size(self) -> int:
        """Width of all query heads together; not the hidden size on several Qwen3 models."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def max_context_tokens(self) -> int:
        """The longest context the position encoding is made for, YaRN's extension included."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        extended = int(self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings)
        return max(self.max_position_embeddings, extended)

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """KV bytes of one token over all layers, at `dtype_bytes` an element."""
        return self.num_hidden_layers * 2 * self.kv_size * dtype_bytes

    def num_parameters(self) -> int:
        """Elements of all weights; tied embeddings count once."""
        attention = self.hidden_size * 2 * (self.q_size + self.kv_size) + 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")  # fmt: skip


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r} must be positive")


def load_model_config(folder: Path) -> ModelConfig:
    """Read `folder`/config.json (and the EOS ids of generation_config.json, where there is one).

    Both the published form (flat `rope_theta`, `torch_dtype`) and that of transformers 5 (`rope_parameters`,
    `dtype`) are read. Raises `FileNotFoundError` for a missing folder or file; `ValueError`, naming file, key
    and value, for broken JSON, missing keys, wrong types, impossible sizes, and whatever we do not run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    config = _JsonObject.read(folder / "config.json")
    _refuse_unsupported(config)
    rope = _rope_object(config)
    try:
        model_config = ModelConfig(
            **{name: config.integer(name) for name in _SIZES},
            rms_norm_eps=config.number("rms_norm_eps"),
            rope_theta=_read_rope_theta(config, rope),
            tie_word_embeddings=config.boolean("tie_word_embeddings"),
            dtype=config.string("dtype" if config.has("dtype") else "torch_dtype").removeprefix("torch."),
            rope_scaling=_read_rope_scaling(config, rope),
            eos_token_ids=(),  # below: another file may say them
        )
    except ValueError as error:
        raise config.named(error) from error
    return _with_eos_token_ids(model_config, folder, config)


def _refuse_unsupported(config: _JsonObject) -> None:
    if (model_type := config.string("model_type")) != "qwen3":
        config.fail(f"model_type={shown(model_type)} is not supported; this library runs 'qwen3' (dense)")
    architectures = config.values.get("architectures")
    if architectures is not None and architectures != ["Qwen3ForCausalLM"]:
        config.fail(f"architectures={shown(architectures)} is not supported; only Qwen3ForCausalLM is")
    if config.has("quantization_config"):
        config.fail("quantization_config is set: quantised checkpoints are not supported")
    if (act := config.string("hidden_act")) != "silu":
        config.fail(f"hidden_act={shown(act)} is not supported; only 'silu' is")
    for key in ("use_sliding_window", "attention_bias"):
        if config.has(key) and config.boolean(key):
            config.fail(f"{key}=true is not supported")
    layer_types = config.values.get("layer_types")
    if layer_types is not None and not _all_full(layer_types, config.integer("num_hidden_layers")):
        config.fail(f"layer_types={shown(layer_types)} is not supported; only full_attention in every layer is")


def _all_full(layer_types: Any, num_layers: int) -> bool:
    """Without a list as long as config.json says there are layers."""
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        return False
    return all(layer_type == "full_attention" for layer_type in layer_types)


def _rope_object(config: _JsonObject) -> _JsonObject:
    """The RoPE settings: `rope_parameters` (transformers 5), else `rope_scaling`, else none at all."""
    if config.has("rope_parameters") and config.has("rope_scaling"):
        config.fail("rope_parameters and rope_scaling are both set: keep one")
    key = "rope_parameters" if config.has("rope_parameters") else "rope_scaling"
    values = config.values.get(key) or {}
    if not isinstance(values, dict):
        config.fail(f"{key}={shown(values)} must be an object or null")
    return _JsonObject(config.source, values, f"{key}.")


def _read_rope_theta(config: _JsonObject, rope: _JsonObject) -> float:
    holders = [holder for holder in (rope, config) if holder.has("rope_theta")] or [config]
    thetas = [holder.number("rope_theta") for holder in holders]
    if thetas[0] != thetas[-1]:
        config.fail(f"rope_theta is given twice, as {thetas[0]} and {thetas[-1]}")
    return thetas[0]


def _read_rope_scaling(config: _JsonObject, rope: _JsonObject) -> YarnScaling | None:
    for holder in (config, rope):
        if holder.has("partial_rotary_factor") and holder.number("partial_rotary_factor") != 1:
            holder.fail("partial_rotary_factor other than 1 is not supported")
    old_name = rope.has("type") and not rope.has("rope_type")
    type_key = "type" if old_name else "rope_type"
    rope_type = rope.string(type_key) if rope.values else "default"
    if rope_type not in ("default", "yarn"):
        rope.fail(f"{type_key}={shown(rope_type)} is not supported; 'default' and 'yarn' are")
    known = ROPE_KEYS + (YARN_KEYS if rope_type == "yarn" else ())
    if unknown := sorted(set(rope.values) - set(known)):
        rope.fail(f"unknown key(s) {shown(unknown)} for rope type {rope_type!r}")
    return _read_yarn(rope) if rope_type == "yarn" else None


def _read_yarn(rope: _JsonObject) -> YarnScaling:
    numbers = {key: rope.number(key) for key in YARN_NUMBERS if rope.has(key)}
    length = rope.integer("original_max_position_embeddings")
    truncate = rope.boolean("truncate") if rope.has("truncate") else True
    try:
        return YarnScaling(rope.number("factor"), length, truncate=truncate, **numbers)
    except ValueError as error:
        raise rope.named(error) from error


def _with_eos_token_ids(model_config: ModelConfig, folder: Path, config: _JsonObject) -> ModelConfig:
    """generation_config.json decides where it names any; null in config.json means none."""
    path = folder / "generation_config.json"
    sources = [_JsonObject.read(path)] if path.is_file() else []
    for source in (*sources, config):
        if source.has("eos_token_id"):
            value = source.values["eos_token_id"]
            ids = tuple(value) if isinstance(value, list) else (value,)
            if not all(type(token_id) is int for token_id in ids):
                source.fail(f"eos_token_id={shown(value)} must be an integer or a list of integers")
            try:
                return dataclasses.replace(model_config, eos_token_ids=ids)
            except ValueError as error:
                raise source.named(error) from error
    if "eos_token_id" not in config.values:
        config.fail("key eos_token_id is missing (here and in generation_config.json)")
    return model_config


def read_json(path: Path) -> Any:
    """The value in a JSON file. `ValueError`, naming it, for what is not valid JSON or not UTF-8."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read") from error


@dataclass(frozen=True)
class _JsonObject:
    """One JSON object, read strictly: a wrong value is a `ValueError` that names file, key and value."""

    source: Path
    values: dict[str, Any]
    prefix: str = ""

    @classmethod
    def read(cls, path: Path) -> _JsonObject:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}")
        return cls(path, values)

    def named(self, error: ValueError) -> ValueError:
        """The same error, naming this file once."""
        text = str(error)
        return error if str(self.source) in text else ValueError(f"{self.source}: {self.prefix}{text}")

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"{self.source}: {self.prefix}{message}")

    def has(self, key: str) -> bool:
        """Present and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str) -> int:
        return self._typed(key, (int,), "an integer")

    def number(self, key: str) -> float:
        return float(self._typed(key, (int, float), "a number"))

    def boolean(self, key: str) -> bool:
        return self._typed(key, (bool,), "true or false")

    def string(self, key: str) -> str:
        return self._typed(key, (str,), "a string")

    def _typed(self, key: str, kinds: tuple[type, ...], wanted: str) -> Any:
        if not self.has(key):
            self.fail(f"key {key} is missing")
        value = self.values[key]
        if type(value) not in kinds:  # exact: a bool is an int to isinstance
            self.fail(f"{key}={shown(value)} must be {wanted}")
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST_NUMBER:  # nan, too
            self.fail(f"{key}={shown(value)} is out of range")
        return value
