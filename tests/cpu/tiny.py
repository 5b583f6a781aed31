"""A tiny random Qwen3 folder with a byte-level tokenizer, engines over it, and answers that a test dictates."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from nanovllm import LLM
from nanovllm.engine.sequence import derive_seed
from nanovllm.layers import sampler

BLOCK = 16  # tokens
VOCAB_SIZE = 320  # wider than the tokenizer, as Qwen3's logits are
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (" the", " in", " and", "the", "in", "and", "ab", "ba")
EOS = 273  # <|im_end|>; bytes come first, then words and their halves, then the special tokens
NUM_KNOWN_IDS = EOS + 1

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": EOS,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if not thinking | default(true) %}<no>{% endif %}"
)


def write_config(folder: Path, **changes: Any) -> Path:
    """config.json alone: enough for `load_format="dummy"`. A change to None removes the key."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def write_model(folder: Path, chat_template: bool = True, **changes: Any) -> Path:
    """config.json and a tokenizer."""
    write_config(folder, **changes)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[2]}
    if chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make_tokenizer() -> Tokenizer:
    """Ids 0 … 255 are the bytes in order, then a few words, then the special tokens."""
    tokenizer = Tokenizer(models.BPE(*_vocabulary()))
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = byte_letters()
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    merges = []
    for word in WORDS:
        spelled = [letters[byte] for byte in word.encode()]
        whole = spelled[0]
        for letter in spelled[1:]:
            if whole + letter not in vocabulary:
                merges.append((whole, letter))
                vocabulary[whole + letter] = len(vocabulary)
            whole += letter
    return vocabulary, merges


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's convention)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(shifted)) for byte in range(256)]


def make_llm(folder: Path, **changes: Any) -> LLM:
    """A small engine on CPU cards with random weights."""
    settings: dict[str, Any] = {
        "device": "cpu",
        "load_format": "dummy",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "kvcache_block_size": BLOCK,
        "num_kvcache_blocks": 64,
    }
    return LLM(str(folder), **(settings | changes))


class Scripts:
    """Answers that a test dictates: requests with a seed from `write` sample exactly these ids, then `filler`."""

    def __init__(self, filler: int = ord("~")) -> None:
        self._filler = filler
        self._by_seed: dict[int, list[int]] = {}
        self.delay_s = 0.0

    def write(self, ids: list[int] | bytes, index: int = 0, seed: int | None = None) -> int:
        """The seed to ask with; `index`: which of n answers."""
        seed = len(self._by_seed) + 1000 if seed is None else seed
        self._by_seed[derive_seed(derive_seed(seed), index)] = list(ids)
        return seed

    def sample(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        time.sleep(self.delay_s)
        ids = self._real(logits, batch)
        for row, (seed, position) in enumerate(zip(batch.seed.tolist(), batch.position.tolist(), strict=True)):
            script = self._by_seed.get(seed)
            if script is not None:
                ids[row] = script[position] if position < len(script) else self._filler
        return ids

    _real: Callable[..., torch.Tensor] = staticmethod(sampler.sample)


@contextmanager
def scripted() -> Iterator[Scripts]:
    """Inside, the engines of this process sample what the scripts say."""
    scripts = Scripts()
    with patch.object(sampler, "sample", scripts.sample):
        yield scripts


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


@contextmanager
def paused(llm: LLM, after_steps: int, then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The decode card takes this many steps, calls `then`, and goes on when the block is left.

    So nothing depends on how fast this machine is. Without overlap nothing runs unless somebody waits: no pause.
    """
    run, resume, steps = llm.decode_runner.run_decode_core, threading.Event(), itertools.count(1)

    def run_or_wait(shard: Any) -> Any:
        step = next(steps)
        if step == after_steps:
            then()
        if step >= after_steps and llm.config.overlap:
            resume.wait(60)
        return run(shard)

    llm.decode_runner.run_decode_core = run_or_wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        resume.set()
        llm.decode_runner.run_decode_core = run  # type: ignore[method-assign]


def settle(llm: LLM) -> None:
    """Let everything in flight drain, write-backs too; then exactly nothing may be left."""
    engine, scheduler = llm._engine, llm._engine.scheduler
    if engine._thread is None:
        while engine.step():
            pass
    wait_until(lambda: scheduler.idle and not engine.executor.num_in_flight and not engine._inbox)
    scheduler.check_integrity()
    for manager in scheduler.managers.values():
        assert manager.num_free_blocks == manager.num_blocks and manager.num_retired_blocks == 0
