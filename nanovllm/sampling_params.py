"""What a caller asks of one request: how tokens are drawn and when to stop.

Names and meanings are vLLM's. Everything is checked here, on construction, so that no later stage of
the engine can fail because of a sampling parameter. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from nanovllm.shown import shown

SamplerKind = Literal["plain", "filtered", "penalised"]
SAMPLER_KINDS: tuple[SamplerKind, ...] = ("plain", "filtered", "penalised")  # each also serves the rows of those before

MAX_N = 64
MAX_TOKENS = 2**31 - 1  # output positions are 32-bit
MAX_TEMPERATURE = 1000.0  # practically uniform; keeps the division by it inside float32
GREEDY_BELOW_TEMPERATURE = 1e-5  # vLLM's bound
MAX_PENALTY = 2.0  # presence and frequency, either sign
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 10.0
MAX_TOKEN_ID = 2**31 - 1
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20

UNSUPPORTED_PARAMETERS = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "beam_width",
        "best_of",
        "detokenize",
        "early_stopping",
        "extra_args",
        "flat_logprobs",
        "guided_decoding",
        "length_penalty",
        "logit_bias",
        "logits_processors",
        "logprob_token_ids",
        "output_kind",
        "prompt_logprobs",
        "repetition_detection",
        "skip_reading_prefix_cache",
        "spaces_between_special_tokens",
        "stream_interval",
        "structured_outputs",
        "thinking_token_budget",
        "truncate_prompt_tokens",
        "use_beam_search",
    }
)


@dataclass(frozen=True)
class SamplingParams:
    """Immutable; fields in vLLM's order. A bad value is a `ValueError` naming field, value and limit.

    n: sequences to generate from one prompt, 1 to 64; must be 1 when greedy.
    presence_penalty, frequency_penalty: subtracted from the logit of each id generated so far, once or
        times its count; -2 to 2.
    repetition_penalty: divides the positive and multiplies the negative logits of the ids in prompt and
        output; 0.01 to 10, 1 is off.
    temperature: divides the logits; 0 is greedy, and so is anything below 1e-5 (stored as 0). At most 1000.
    top_p: keep the smallest set of most likely ids whose probability reaches this; (0, 1], 1 is off.
    top_k: keep the k most likely ids, and those tied with the last; 0 or -1 is off (stored as 0).
    min_p: keep ids at least this probable relative to the most likely one; [0, 1], 0 is off.
    seed: signed 64-bit; None lets the engine choose one.
    stop: one string or up to 16 of 1 to 256 characters; the output ends before the first that appears,
        or after it with `include_stop_str_in_output`. Stored as a tuple.
    stop_token_ids: up to 64 ids that end the output besides eos. Stored as a tuple. Whether an id is in
        the vocabulary is checked at admission, where the vocabulary is known.
    ignore_eos: go on past eos.
    max_tokens: tokens to generate at most; None is up to the model's length. (vLLM's default is 16.)
    min_tokens: tokens to generate before eos and `stop_token_ids` may be sampled.
    logprobs: also return the logprobs of the sampled and of this many most likely ids, 0 to 20.
    skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 64
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        """Sees the keywords before the generated `__init__`, which would only call them unexpected."""
        for name in sorted(UNSUPPORTED_PARAMETERS & kwargs.keys()):
            raise ValueError(f"{name} is not supported")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._store(
            n=_integer("n", self.n, 1, MAX_N),
            max_tokens=_optional_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS),
            min_tokens=_integer("min_tokens", self.min_tokens, 0, MAX_TOKENS),
            seed=_optional_integer("seed", self.seed, -(2**63), 2**63 - 1),
            logprobs=_optional_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            stop=_stop_strings(self.stop),
            stop_token_ids=_stop_token_ids(self.stop_token_ids),
        )
        self._check_distribution()
        self._check_penalties()
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _check_bool(name, getattr(self, name))
        self._check_combinations()

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely id is always taken."""
        return self.temperature == 0

    @property
    def has_penalty(self) -> bool:
        """Whether any of the three penalties changes a logit."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def sampler_level(self) -> int:
        """Index in SAMPLER_KINDS of the least that serves this row."""
        if self.has_penalty or self.min_tokens:
            return 2
        return int(bool(self.top_k or self.top_p < 1 or self.min_p))

    def _check_distribution(self) -> None:
        temperature = _number("temperature", self.temperature, 0, MAX_TEMPERATURE)
        self._store(
            temperature=temperature if temperature >= GREEDY_BELOW_TEMPERATURE else 0.0,
            top_p=_number("top_p", self.top_p, 0, 1, low_is_allowed=False),
            top_k=max(_integer("top_k", self.top_k, -1, MAX_TOKEN_ID), 0),
            min_p=_number("min_p", self.min_p, 0, 1),
        )

    def _check_penalties(self) -> None:
        repetition = _number(
            "repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        )
        self._store(
            presence_penalty=_number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
            frequency_penalty=_number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
            repetition_penalty=repetition,
        )

    def _check_combinations(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        if self.is_greedy and self.n > 1:
            raise ValueError(f"n must be 1 when greedy (temperature 0), got {self.n}")

    def _store(self, **values: Any) -> None:
        """Normalise during construction, the one time when a frozen instance is written."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _is_a(kind: type, value: Any) -> bool:
    """True and False are integers to Python; here they are a mistake."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not _is_a(Integral, value):
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {shown(value)}")
    return int(value)


def _optional_integer(name: str, value: Any, low: int, high: int) -> int | None:
    return None if value is None else _integer(name, value, low, high)


def _number(name: str, value: Any, low: float, high: float, *, low_is_allowed: bool = True) -> float:
    if not _is_a(Real, value):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    # A NaN fails every comparison, and both limits are finite: neither NaN nor an infinity gets through.
    if not low <= value <= high or (value == low and not low_is_allowed):
        bracket = "[" if low_is_allowed else "("
        raise ValueError(f"{name} must be in {bracket}{low}, {high}], got {shown(value)}")
    return float(value)


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")


def _items(name: str, value: Any, max_items: int) -> tuple[Any, ...]:
    """A private copy: what the caller later does to its own list changes nothing here."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(f"{name} must be a list or a tuple, got {shown(value)}")
    if len(value) > max_items:
        raise ValueError(f"{name} must have at most {max_items} entries, got {len(value)}")
    return tuple(value)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else _items("stop", stop, MAX_STOP_STRINGS)
    for string in strings:
        if not isinstance(string, str):
            raise ValueError(f"stop must hold strings, got {shown(string)}")
        if not 1 <= len(string) <= MAX_STOP_STRING_CHARS:
            raise ValueError(
                f"stop strings must have 1 to {MAX_STOP_STRING_CHARS} characters, got {len(string)}: {shown(string)}"
            )
    return strings


def _stop_token_ids(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    entries = _items("stop_token_ids", ids, MAX_STOP_TOKEN_IDS)
    return tuple(_integer("stop_token_ids", entry, 0, MAX_TOKEN_ID) for entry in entries)
