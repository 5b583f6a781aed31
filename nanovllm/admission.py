"""What a caller may ask for. Every mistake is found here, before any work, and nothing later fails because of one."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.sampling_params import SamplingParams
from nanovllm.shown import shown

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Limits:
    """What this engine can serve. `pool_blocks`: blocks of each card."""

    vocab_size: int
    max_model_len: int
    block_size: int
    pool_blocks: tuple[int, ...]

    @property
    def pool_tokens(self) -> int:
        """Tokens that one sequence can have before it fills the smaller pool."""
        return min(self.pool_blocks) * self.block_size

    @property
    def max_tokens(self) -> int:
        """The longest prompt plus answer."""
        return min(self.max_model_len, self.pool_tokens)


def as_prompts(prompts: Any) -> list[Prompt]:
    """str, list of ids, list of str, or list of lists of ids → a list of prompts."""
    if not _has_items(prompts):
        return [prompts]  # bytes, dict and scalars are refused later, as the prompt they are
    items = list(prompts)
    if items and all(isinstance(item, (str, bytes, dict)) or _has_items(item) for item in items):
        return items
    return [items]


def _has_items(value: Any) -> bool:
    """Lists, tuples, arrays. A string is one prompt, bytes and dict are mistakes, an array may have no dimension."""
    iterable = hasattr(value, "__iter__") and not isinstance(value, (str, bytes, dict))
    return iterable and getattr(value, "ndim", 1) > 0


def as_params(params: Any, num_prompts: int) -> list[SamplingParams]:
    """One object for all, one each, or None for the defaults."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, (list, tuple)) or not all(isinstance(item, SamplingParams) for item in params):
        raise ValueError(f"sampling_params must be a SamplingParams or a list of them, got {shown(params)}")
    if len(params) != num_prompts:
        raise ValueError(f"{len(params)} sampling params for {num_prompts} prompts; give one, or one each")
    return list(params)


def check_token_ids(ids: Any, limits: Limits) -> list[int]:
    """A private list of plain ints in [0, vocabulary)."""
    if not _has_items(ids):
        raise ValueError(f"a prompt must be a string or a list of token ids, got {shown(ids)}")
    checked = list(ids) if set(map(type, ids)) == {int} else [_token_id(token) for token in ids]
    if not checked:
        raise ValueError("the prompt is empty: it has 0 tokens, at least 1 is needed")
    for token in (min(checked), max(checked)):
        if not 0 <= token < limits.vocab_size:
            raise ValueError(
                f"token id {shown(token)} is outside the vocabulary of {limits.vocab_size} ids "
                f"(0 … {limits.vocab_size - 1})"
            )
    return checked


def _token_id(token: Any) -> int:
    if isinstance(token, bool):
        raise ValueError(f"token id {shown(token)} is not an integer")
    try:
        return operator.index(token)
    except TypeError:
        raise ValueError(f"token id {shown(token)} is not an integer") from None


def check_request(ids: list[int], params: SamplingParams, limits: Limits) -> int:
    """The most tokens the request may generate. `ValueError` if it can never be served."""
    prompt = len(ids)
    if prompt >= limits.max_model_len:
        raise ValueError(
            f"the prompt has {prompt} tokens; max_model_len={limits.max_model_len} leaves none to generate"
        )
    if prompt >= limits.pool_tokens:
        raise ValueError(f"the prompt has {prompt} tokens; the smaller KV pool holds {limits.pool_tokens}")
    if params.max_tokens is not None:
        _check_length(prompt, params.max_tokens, limits)
    _check_siblings(prompt, params, limits)
    for token in params.stop_token_ids or ():
        if token >= limits.vocab_size:
            raise ValueError(f"stop_token_ids: {token} is outside the vocabulary of {limits.vocab_size} ids")
    most = limits.max_tokens - prompt
    if params.min_tokens > most:
        raise ValueError(f"min_tokens={params.min_tokens} is more than the {most} that fit after this prompt")
    return most if params.max_tokens is None else params.max_tokens


def _check_length(prompt: int, max_tokens: int, limits: Limits) -> None:
    total = prompt + max_tokens
    asked = f"prompt of {prompt} tokens + max_tokens={max_tokens} = {total}"
    if total > limits.max_model_len:
        raise ValueError(f"{asked} is beyond max_model_len={limits.max_model_len}")
    if total > limits.pool_tokens:
        raise ValueError(f"{asked} is beyond the smaller KV pool of {limits.pool_tokens} tokens")


def _check_siblings(prompt: int, params: SamplingParams, limits: Limits) -> None:
    """n answers share the prompt's full blocks and need a block each besides, all at once."""
    needed = prompt // limits.block_size + params.n
    if needed > min(limits.pool_blocks):  # either card may have to go on alone
        raise ValueError(
            f"n={params.n} answers to a prompt of {prompt} tokens need {needed} blocks at once; "
            f"the smaller pool has {min(limits.pool_blocks)}"
        )
