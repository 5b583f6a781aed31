"""From a name to a model with weights: find the folder, check its files, stream every tensor into its place.

Safetensors only: nothing from a checkpoint is ever executed or unpickled.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanovllm.config import LOAD_FORMATS
from nanovllm.layers.attention import AttentionBackend
from nanovllm.models.model_config import ModelConfig, read_json
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.shown import shortened, shown

logger = logging.getLogger("nanovllm.models.loader")

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_PATTERNS = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MISSING_FACTOR = 2  # tensors of up to half of a checkpoint may be missing, and are named one by one
STAGING_BYTES = 64 << 20  # of each pinned buffer: long enough to hide what a copy costs, short to pin


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The folder of a model: `model` itself if it is one, else the hub repository of that id, downloaded.

    All files come from one commit, that of `revision` (default: the main branch) when this is called; without
    a network, from the hub's cache. Raises `FileNotFoundError` where neither reading works, `ValueError` for
    a revision of a local folder.
    """
    if not model:
        raise ValueError("model='' must be a folder or a hub id")
    if os.path.isdir(model):  # False, too, for names that no file can have: Path.is_dir raises there
        if revision is not None:
            raise ValueError(f"revision={shown(revision)} has no meaning for the local folder {model}")
        return Path(model)
    if not HUB_ID.fullmatch(model):
        raise FileNotFoundError(f"model {shown(model)} is not a folder here, and cannot be a hub id")
    return _download(model, revision)


def _download(model: str, revision: str | None) -> Path:
    import huggingface_hub  # here: local folders need neither the package nor its start-up time

    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:  # the hub's own errors are all one of these
        readings = f"model {model!r} (revision {revision or 'main'}) is not a folder here, and as a hub id"
        raise FileNotFoundError(f"{readings} it failed: {error}") from error


def load_model(
    folder: Path,
    config: ModelConfig,
    attention: AttentionBackend,
    dtype: torch.dtype,
    device: torch.device,
    max_position_tokens: int,
    load_format: str = "auto",
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """A model on `device`, weights cast to `dtype`, complete when this returns.

    load_format "auto" reads the folder's safetensors; "dummy" draws random weights from `seed`, by the config
    alone. Raises `FileNotFoundError` for missing files, `ValueError` for broken ones and for tensors that are
    missing, unexpected or of another shape; each names the file or the tensor.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={shown(load_format)} must be one of {', '.join(LOAD_FORMATS)}")
    files = find_weight_files(Path(folder)) if load_format == "auto" else []
    if files:
        _check_sizes(config, files)
    model = Qwen3ForCausalLM(config, attention, dtype, device, max_position_tokens)
    if load_format == "dummy":
        _fill_randomly(model, seed)
    else:
        _fill_from_files(model, files)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # streams other than today's will read the weights
    return model


def find_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or those its index names. All of them exist."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"; {', '.join(others)} cannot be read: safetensors only" if others else ""
        raise FileNotFoundError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{found}")
    files = [folder / name for name in _shard_names(index)]
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path}, a shard named by {INDEX_FILE}, does not exist")
    return files


def _shard_names(index: Path) -> list[str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for name in weight_map.values():
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)):
            raise ValueError(f"{index} names {shown(name)}: a shard must be a .safetensors file beside its index")
    return sorted(set(weight_map.values()))


def _check_sizes(config: ModelConfig, files: list[Path]) -> None:
    """Before anything is built as large as config.json says: no file may ask for much more memory than it fills."""
    for path in files:
        with _opened(path):
            pass
    held_bytes = sum(path.stat().st_size for path in files)
    needed_bytes = config.num_parameters() * min(dtype.itemsize for dtype in WEIGHT_DTYPES)
    if needed_bytes > MISSING_FACTOR * held_bytes:
        listed = _listed([str(path) for path in files])
        sizes = f"config.json asks for {config.num_parameters()} weights, at least {needed_bytes} bytes"
        raise ValueError(f"{listed}: {held_bytes} bytes in all; {sizes}")


def _fill_from_files(model: Qwen3ForCausalLM, files: list[Path]) -> None:
    slots = model.checkpoint_slots()
    write = StagedCopies(model.device).write if model.device.type == "cuda" else Tensor.copy_
    loaded: set[str] = set()
    for path in files:
        for name, tensor in _read_tensors(path, slots):
            if name in loaded:
                raise ValueError(f"{path}: tensor {name} is in two files")
            _check_tensor(path, name, slots[name], tensor)
            write(slots[name], tensor)
            loaded.add(name)
    if missing := sorted(set(slots) - loaded):
        raise ValueError(f"{files[0].parent}: tensor(s) missing from the checkpoint: {_listed(missing)}")
    logger.info("read %d tensors from %d file(s) in %s", len(loaded), len(files), files[0].parent)


def _read_tensors(path: Path, slots: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file that the model wants, one at a time: views of the mapped file, read when copied."""
    with _opened(path) as file:
        names = [name for name in file.keys() if not _is_ignorable(name, slots)]  # noqa: SIM118 (not a dict)
        if unexpected := sorted(set(names) - set(slots)):
            raise ValueError(f"{path}: unexpected tensor(s): {_listed(unexpected)}")
        for name in names:
            yield name, file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file whose header is sound, or a `ValueError` that names it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated?): {error}") from error


def _is_ignorable(name: str, slots: dict[str, Tensor]) -> bool:
    """What real files carry in excess: RoPE tables, and the output matrix although it is tied."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in slots)


def _check_tensor(path: Path, name: str, slot: Tensor, tensor: Tensor) -> None:
    if tensor.shape != slot.shape:
        raise ValueError(f"{path}: tensor {name} has shape {list(tensor.shape)}, expected {list(slot.shape)}")
    if tensor.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{path}: tensor {name} is of dtype {tensor.dtype}, expected one of {WEIGHT_DTYPES}")


class StagedCopies:
    """Host tensors into a card's memory through two pinned buffers, of `STAGING_BYTES` each, in turn.

    While one buffer is on its way, torch's CPU threads read the file's pages into the other one, and cast them: a
    copy straight from the mapped file would do all of it on one thread, one step after the other. Copies are
    queued on the device's current stream: complete once the device is synchronised.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._left = [torch.cuda.Event() for _ in self._buffers]  # when a buffer's last contents have left it
        self._turn = 0

    def write(self, target: Tensor, source: Tensor) -> None:
        """target.copy_(source), in pieces: `target` contiguous on the card, `source` of its shape on the host."""
        elements = self._buffers[0].nbytes // target.itemsize
        with torch.cuda.device(self._device):
            for piece, values in zip(target.view(-1).split(elements), source.view(-1).split(elements), strict=True):
                self._send(piece, values)

    def _send(self, target: Tensor, source: Tensor) -> None:
        buffer, left = self._buffers[self._turn], self._left[self._turn]
        left.synchronize()  # returns at once for an event that was never recorded
        staged = buffer.view(target.dtype)[: target.numel()].copy_(source)
        target.copy_(staged, non_blocking=True)
        left.record()
        self._turn = 1 - self._turn


def _listed(names: list[str]) -> str:
    return ", ".join(shortened(name) for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _fill_randomly(model: Qwen3ForCausalLM, seed: int) -> None:
    """Norm weights 1, matrices normal with std in_features ** -0.5 (0.016 to 0.031 at real sizes).

    So the stream keeps its scale through the layers at any width, outweighs the input's own embedding, and
    gives logits a spread near 1: neither flat nor an echo of the input. Numbers differ between device types.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
