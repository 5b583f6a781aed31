"""A small sound checkpoint, ways to spoil it, and what must be said then. `python -O -m tests.cpu.bad_checkpoints`.

Each way is a function of the folder; each message names the file and is a `ValueError`, or a `FileNotFoundError`,
whatever a library underneath raised.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM
from nanovllm.layers.attention import make_attention_backend
from nanovllm.models.loader import load_model
from nanovllm.models.model_config import load_model_config
from tests.cpu.tiny import write_model

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
UNREADABLE = f"{WEIGHTS} is not a readable safetensors file"
NO_TOKENIZER = "cannot be loaded"
Damage = Callable[[Path], None]


class Case(NamedTuple):
    """`file` is named, and `said` of it."""

    name: str
    damage: Damage
    file: str
    said: str


def write_checkpoint(folder: Path) -> Path:
    """Config, tokenizer and random weights, float32."""
    config = load_model_config(write_model(folder))
    attention = make_attention_backend("torch", config, torch.device("cpu"), torch.float32)
    model = load_model(folder, config, attention, torch.float32, torch.device("cpu"), 64, "dummy")
    save_file({name: slot.clone() for name, slot in model.checkpoint_slots().items()}, folder / WEIGHTS)
    return folder


def load(folder: Path) -> LLM:
    """On a CPU card with a small pool."""
    return LLM(
        str(folder), device="cpu", max_model_len=128, max_num_seqs=4, num_kvcache_blocks=8, kvcache_block_size=16
    )


# -- ways to spoil it


def text(file: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: _none((folder / file).write_bytes(data))


def edited(file: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(values))

    return damage


def cut(file: str, keep: int) -> Damage:
    return lambda folder: _none((folder / file).write_bytes((folder / file).read_bytes()[:keep]))


def replaced(file: str, old: bytes, new: bytes) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        if old not in data:
            raise RuntimeError(f"{old!r} is not in {file}")
        (folder / file).write_bytes(data.replace(old, new, 1))

    return damage


def header(content: Any) -> Damage:
    """Weights with this header before the sound data."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content)
        save_file(content, folder / WEIGHTS)

    return damage


def index(weight_map: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


def words_alone(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    (folder / "vocab.json").write_text("[]")


def folder_instead(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def renamed(file: str, other: str) -> Damage:
    return lambda folder: _none((folder / file).rename(folder / other))


def twice(folder: Path) -> None:
    """Two files with one tensor in both."""
    content = load_file(folder / WEIGHTS)
    index({name: "a.safetensors" for name in content} | {"x": "b.safetensors"})(folder)
    save_file(content, folder / "a.safetensors")
    save_file({NORM: content[NORM]}, folder / "b.safetensors")


def _none(_: object) -> None:
    return None


NORM = "model.norm.weight"
DEEP = "[" * 200_000
CASES = [
    Case("empty config", text(CONFIG, ""), CONFIG, "is not valid JSON"),
    Case("half a config", cut(CONFIG, 200), CONFIG, "is not valid JSON"),
    Case("a list for a config", text(CONFIG, "[]"), CONFIG, "must hold a JSON object, not list"),
    Case("config in UTF-16", text(CONFIG, '{"model_type": "qwen3"}'.encode("utf-16")), CONFIG, "is not valid JSON"),
    Case("a deep config", text(CONFIG, DEEP), CONFIG, "is nested too deeply"),
    Case("a deep value", edited(CONFIG, model_type=[[["qwen3"]]]), CONFIG, "model_type=[[['qwen3']]] must be a string"),
    Case("a long integer", text(CONFIG, '{"a": ' + "9" * 5000 + "}"), CONFIG, "is not valid JSON"),
    Case("an infinite constant", edited(CONFIG, rms_norm_eps=float("inf")), CONFIG, "rms_norm_eps=inf is out of range"),
    Case(
        "a constant that is no number",
        edited(CONFIG, rope_theta=float("nan")),
        CONFIG,
        "rope_theta=nan is out of range",
    ),
    Case("no layers", edited(CONFIG, num_hidden_layers=0), CONFIG, "num_hidden_layers=0 must be positive"),
    Case("a size in words", edited(CONFIG, hidden_size="32"), CONFIG, "hidden_size='32' must be an integer"),
    Case(
        "layers without end",
        edited(CONFIG, num_hidden_layers=1 << 39),
        CONFIG,
        "num_hidden_layers=549755813888 is above",
    ),
    Case("more layers than weights", edited(CONFIG, num_hidden_layers=1000), WEIGHTS, "at least"),
    Case("wider than memory", edited(CONFIG, intermediate_size=1 << 39), WEIGHTS, "at least"),
    Case(
        "types for layers without end",
        edited(CONFIG, num_hidden_layers=1 << 40, layer_types=["full_attention"]),
        CONFIG,
        "layer_types=['full_attention'] is not supported",
    ),
    Case(
        "a long value",
        edited(CONFIG, model_type="x" * 100_000),
        CONFIG,
        "x… (100002 characters) is not supported; this library runs 'qwen3'",
    ),
    Case(
        "shared heads that do not divide",
        edited(CONFIG, num_attention_heads=3, num_key_value_heads=2),
        CONFIG,
        "num_attention_heads=3 is not a multiple of num_key_value_heads=2",
    ),
    Case("an odd head", edited(CONFIG, head_dim=15), CONFIG, "head_dim=15 must be even"),
    Case("positions without end", edited(CONFIG, max_position_embeddings=1 << 41), CONFIG, "=2199023255552 is out of"),
    Case("a dtype of integers", edited(CONFIG, torch_dtype="int8"), CONFIG, "dtype='int8' must be one of bfloat16"),
    Case("no config", lambda folder: (folder / CONFIG).unlink(), CONFIG, "does not exist"),
    Case("huge vocabulary", edited(CONFIG, vocab_size=1 << 30), CONFIG, "vocab_size=1073741824 is above"),
    Case("an end beyond the vocabulary", edited(CONFIG, eos_token_id=320), CONFIG, "eos_token_id=320 is outside"),
    Case("code in a config", edited(CONFIG, model_type="custom", auto_map={"AutoModel": "x.M"}), CONFIG, "'custom'"),
    Case(
        "generation config of the wrong kind",
        text(GENERATION, '{"eos_token_id": {"a": 1}}'),
        GENERATION,
        "eos_token_id={'a': 1} must be an integer",
    ),
    Case("a list for a generation config", text(GENERATION, "[]"), GENERATION, "must hold a JSON object, not list"),
    Case(
        "an end of generation beyond the vocabulary",
        text(GENERATION, '{"eos_token_id": [5, 99999]}'),
        GENERATION,
        "eos_token_id=99999 is outside 0 … 319",
    ),
    Case("deep generation config", text(GENERATION, DEEP), GENERATION, "nested too deeply"),
    Case("empty tokenizer", text(TOKENIZER, ""), TOKENIZER, NO_TOKENIZER),
    Case("half a tokenizer", cut(TOKENIZER, 3000), TOKENIZER, NO_TOKENIZER),
    Case("a tokenizer of nulls", text(TOKENIZER, b"\0" * 64), TOKENIZER, NO_TOKENIZER),
    Case("a tokenizer that is not UTF-8", text(TOKENIZER, b'{"a": "\xff"}'), TOKENIZER, NO_TOKENIZER),
    Case("a number for a model", edited(TOKENIZER, model=5), TOKENIZER, NO_TOKENIZER),
    Case("a model of no kind", edited(TOKENIZER, model={"type": "Magic"}), TOKENIZER, NO_TOKENIZER),
    Case(
        "merges of nothing",
        edited(TOKENIZER, model={"type": "BPE", "vocab": {}, "merges": ["a b"]}),
        TOKENIZER,
        NO_TOKENIZER,
    ),
    Case("a deep tokenizer", text(TOKENIZER, DEEP), TOKENIZER, NO_TOKENIZER),
    Case("broken tokenizer config", text(TOKENIZER_CONFIG, "{"), TOKENIZER_CONFIG, NO_TOKENIZER),
    Case("a list for a tokenizer config", text(TOKENIZER_CONFIG, "[]"), TOKENIZER_CONFIG, "JSON object, not list"),
    Case(
        "a tokenizer class by number",
        edited(TOKENIZER_CONFIG, tokenizer_class=5),
        TOKENIZER_CONFIG,
        "tokenizer_class=5 must be a string",
    ),
    Case(
        "an end without content", edited(TOKENIZER_CONFIG, eos_token={"a": 1}), TOKENIZER_CONFIG, "eos_token={'a': 1}"
    ),
    Case("special tokens in a list", text("special_tokens_map.json", "[1]"), "special_tokens_map.json", "not list"),
    Case("added tokens in half", text("added_tokens.json", "{"), "added_tokens.json", "is not valid JSON"),
    Case("words without merges", words_alone, "vocab.json", "must hold a JSON object, not list"),
    Case("a folder for a tokenizer", folder_instead(TOKENIZER), TOKENIZER, "Is a directory"),
    Case("no weights", lambda folder: (folder / WEIGHTS).unlink(), "", "holds neither model.safetensors nor"),
    Case("a folder for weights", folder_instead(WEIGHTS), "", "holds neither model.safetensors nor"),
    Case("a pickle beside no weights", renamed(WEIGHTS, "pytorch_model.bin"), "", "cannot be read: safetensors only"),
    Case("empty weights", cut(WEIGHTS, 0), WEIGHTS, UNREADABLE),
    Case("a part of the header's length", cut(WEIGHTS, 5), WEIGHTS, UNREADABLE),
    Case("a part of the header", cut(WEIGHTS, 300), WEIGHTS, UNREADABLE),
    Case("a byte short", cut(WEIGHTS, -1), WEIGHTS, UNREADABLE),
    Case("an endless header", lambda folder: cut_in(folder, struct.pack("<Q", (1 << 64) - 1)), WEIGHTS, UNREADABLE),
    Case("a header of nulls", header(b"\0" * 64), WEIGHTS, UNREADABLE),
    Case("a deep header", header(DEEP.encode()), WEIGHTS, UNREADABLE),
    Case("a list for a header", header([1, 2]), WEIGHTS, UNREADABLE),
    Case(
        "offsets beyond the end",
        header({NORM: {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}),
        WEIGHTS,
        UNREADABLE,
    ),
    Case(
        "offsets backwards",
        header({NORM: {"dtype": "F32", "shape": [32], "data_offsets": [128, 0]}}),
        WEIGHTS,
        UNREADABLE,
    ),
    Case(
        "a shape that overflows",
        header({NORM: {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 128]}}),
        WEIGHTS,
        UNREADABLE,
    ),
    Case("an unknown dtype", replaced(WEIGHTS, b'"F32"', b'"X32"'), WEIGHTS, UNREADABLE),
    Case(
        "a pickle for weights", text(WEIGHTS, b"\x80\x04\x95\x00\x00" + b"cposix\nsystem\n" * 20), WEIGHTS, UNREADABLE
    ),
    Case("a tensor too few", tensors(lambda t: t.pop(NORM)), "", f"missing from the checkpoint: {NORM}"),
    Case("a tensor too many", tensors(lambda t: t.update(x=torch.zeros(1))), WEIGHTS, "unexpected tensor(s): x"),
    Case(
        "a tensor too long", tensors(lambda t: t.update({NORM: torch.ones(33)})), WEIGHTS, "shape [33], expected [32]"
    ),
    Case(
        "integers for weights", tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int64)})), WEIGHTS, "int64"
    ),
    Case(
        "eight bits for weights",
        tensors(lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)})),
        WEIGHTS,
        f"{NORM} is of dtype torch.float8_e4m3fn",
    ),
    Case(
        "a transposed tensor",
        tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()})),
        WEIGHTS,
        "lm_head.weight has shape [32, 320], expected [320, 32]",
    ),
    Case("a tensor twice", twice, "b.safetensors", f"tensor {NORM} is in two files"),
    Case("an index to a list", index([NORM]), INDEX, "has no weight_map"),
    Case("an index of numbers", index({NORM: 5}), INDEX, "names 5: a shard must be a .safetensors file beside"),
    Case("an index from the root", index({NORM: "/etc/x.safetensors"}), INDEX, "names '/etc/x.safetensors': a shard"),
    Case("an index to a folder below", index({NORM: "a/b.safetensors"}), INDEX, "beside its index"),
    Case("an index by backslash", index({NORM: "..\\x.safetensors"}), INDEX, "beside its index"),
    Case("an index to a pickle", index({NORM: "x.bin"}), INDEX, "names 'x.bin': a shard must be a .safetensors"),
    Case("an index to nowhere", index({NORM: "x.safetensors"}), "x.safetensors", f"named by {INDEX}, does not exist"),
    Case("an index of nothing", index({}), INDEX, "has no weight_map"),
    Case("an index that leads out", index({NORM: "../../etc/x.safetensors"}), INDEX, "beside its index"),
    Case("a deep index", lambda folder: (index({})(folder), text(INDEX, DEEP)(folder))[1], INDEX, "nested too deeply"),
]


def cut_in(folder: Path, start: bytes) -> None:
    """Other first bytes."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(start + data[len(start) :])


def complaint(case: Case, sound: Path, folder: Path) -> str | None:
    """What is wrong with how a spoilt copy of `sound`, in `folder`, is refused; None: nothing."""
    shutil.copytree(sound, folder)
    case.damage(folder)
    try:
        load(folder).close()
    except (ValueError, FileNotFoundError) as error:
        named = str(folder / case.file) if case.file else str(folder)
        if named in str(error) and case.said in str(error):
            return None
        return f"{case.name}: {error} does not say {case.said!r} of {named}"
    except BaseException as error:
        return f"{case.name}: {type(error).__name__}: {error}"
    return f"{case.name}: accepted"


def main() -> None:
    """All of them; ends with a failure that names each that was not refused as it must be."""
    if __debug__:
        sys.exit("run this with -O: that is what it is for")
    with tempfile.TemporaryDirectory() as folder:
        sound = write_checkpoint(Path(folder) / "sound")
        load(sound).close()
        wrong = [found for i, case in enumerate(CASES) if (found := complaint(case, sound, Path(folder) / str(i)))]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{len(CASES)} refused")


if __name__ == "__main__":
    main()
