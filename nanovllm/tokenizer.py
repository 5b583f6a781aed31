"""The checkpoint's tokenizer and chat template, through transformers; no code of a checkpoint is ever run."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm.models.model_config import read_json
from nanovllm.shown import shown

JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
Message = Mapping[str, Any]


class Tokenizer:
    """Thread-safe encoding, decoding and chat templates. `available` is False for a folder without a tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Fast tokenizers refuse to be shared by threads while they encode. Decoding has an instance of its own: the
        # engine decodes for stop strings, and must not wait for somebody's long prompt.
        self._lock, self._decode_lock = threading.Lock(), threading.Lock()
        self._tokenizer = _load(folder)
        self._decoder = copy.deepcopy(self._tokenizer)

    @property
    def available(self) -> bool:
        return self._tokenizer is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the checkpoint adds (Qwen3 adds none)."""
        with self._lock:
            tokenizer = self._require("text prompts")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the prompt is not valid Unicode: {error}") from error
            return list(tokenizer.encode(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids that the tokenizer does not know (padding of the logits) have no text."""
        self._require("text")
        with self._decode_lock:
            tokenizer = self._decoder
            known = [token for token in ids if token < len(tokenizer)]
            return tokenizer.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def apply_chat_template(self, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str:
        """The prompt of a conversation, ready for the assistant's answer."""
        with self._lock:
            tokenizer = self._require("chat")
            if not tokenizer.chat_template:
                raise ValueError(f"the tokenizer in {self._folder} has no chat template")
            options = {"add_generation_prompt": True, **kwargs, "tokenize": False}
            try:
                return tokenizer.apply_chat_template(list(messages), **options)
            except Exception as error:  # a template can fail in any way: it is the checkpoint's program
                raise ValueError(
                    f"the chat template failed on {shown(messages)} with {shown(dict(kwargs))}: {error}"
                ) from error

    def _require(self, what: str) -> Any:
        if self._tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and {self._folder} has none: pass and read token ids instead")
        return self._tokenizer


def _load(folder: Path) -> Any:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # here: seconds of import that token-id users need not wait for

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a broken file makes the library raise: a panic in it is no Exception
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {_fault(folder) or error}") from error


def _fault(folder: Path) -> str | None:
    """The file that is to blame, and why, where that can be told; the library does not say."""
    from tokenizers import Tokenizer as FastTokenizer

    for path in (folder / name for name in JSON_FILES if (folder / name).exists()):
        try:
            _check_object(path)
            if path.name == "tokenizer.json":
                FastTokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            return str(error) if str(path) in str(error) else f"{path}: {error}"
    return None


def _check_object(path: Path) -> None:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    if not isinstance(name := content.get("tokenizer_class"), (str, type(None))):
        raise ValueError(f"{path}: tokenizer_class={shown(name)} must be a string")
    for key in SPECIAL_TOKENS:
        if not _is_token(content.get(key)):
            raise ValueError(f"{path}: {key}={shown(content[key])} must be a string, or an object with content")


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content"), str) if isinstance(value, dict) else isinstance(value, (str, type(None)))
