"""What callers get: cheap views of a request, frozen at the moment they were made. Text is decoded when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanovllm.engine.sequence import Request, Sequence, Timeline
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one id under the model itself, and its rank (1: the most likely)."""

    logprob: float
    rank: int


class CompletionOutput:
    """One answer. `token_ids` includes the id that stopped it; `text` does not (unless the caller asked for it).

    `finish_reason`: "stop", "length", "abort", or "error": then `error` says why, and what came before it is here.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self.index = sequence.index
        num_settled = sequence.num_settled_outputs  # read before the reason: it may not count a token that ends it
        self.finish_reason = sequence.finish_reason  # read before the rest: that is complete if it is set
        self.stop_reason = sequence.stop_reason if self.finish_reason else None
        self.error = sequence.error if self.finish_reason == "error" else None
        self._sequence = sequence
        self._tokenizer = tokenizer
        self.num_tokens = sequence.num_output_tokens if self.finish_reason else num_settled
        self._watched_text = sequence.watcher.text if sequence.watcher and self.finish_reason else None

    @property
    def params(self) -> SamplingParams:
        return self._sequence.request.params

    @property
    def token_ids(self) -> list[int]:
        return self.tokens_from(0)

    def tokens_from(self, first: int) -> list[int]:
        """`token_ids[first:]`, without making a list of those before."""
        start = self._sequence.num_prompt_tokens
        return self._sequence.tokens[start + first : start + self.num_tokens].tolist()

    @property
    def text(self) -> str:
        """`ValueError` if the checkpoint has no tokenizer."""
        if self._watched_text is not None:
            return self._watched_text
        params = self.params
        ids = self.token_ids
        if self.finish_reason == "stop" and not params.include_stop_str_in_output:
            ids = ids[:-1]
        return self._tokenizer.decode(ids, params.skip_special_tokens)

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the sampled ids' log-probabilities; None unless `logprobs` was asked for."""
        if self.params.logprobs is None:
            return None
        return sum(entry.chosen for entry in self._sequence.logprobs[: self.num_tokens])

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        """For each output token: the most likely ids and the sampled one. None unless asked for."""
        if self.params.logprobs is None:
            return None
        entries = zip(self.token_ids, self._sequence.logprobs[: self.num_tokens], strict=True)
        return [
            {token: Logprob(entry.chosen, entry.rank)}
            | {other: Logprob(value, rank) for rank, (other, value) in enumerate(entry.top, 1) if other != token}
            for token, entry in entries
        ]

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, token_ids={self.token_ids}, finish_reason={self.finish_reason!r}, "
            f"stop_reason={self.stop_reason!r})"
        )


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds. None: has not happened (yet).

    queue: from arrival to admission. ttft: to the first token. inter_token: gaps between the first answer's
    tokens. copy: from the end of prefill until the decode card held every block, as the engine thread heard of them;
    None where they did not change cards. end_to_end: to the last token of the last answer.
    """

    queue: float | None
    ttft: float | None
    inter_token: tuple[float, ...]
    copy: float | None
    end_to_end: float | None

    @classmethod
    def of(cls, request: Request, num_tokens: int) -> RequestMetrics:
        times: Timeline = request.timeline
        tokens = request.sequences[0].token_times[:num_tokens]
        return cls(
            queue=_elapsed(times.arrived, times.admitted),
            ttft=_elapsed(times.arrived, tokens[0] if tokens else None),
            inter_token=tuple(later - earlier for earlier, later in zip(tokens, tokens[1:], strict=False)),
            copy=_elapsed(times.prefilled, times.resident),
            end_to_end=_elapsed(times.arrived, times.finished),
        )


def _elapsed(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


class RequestOutput:
    """A request as it stands: `outputs` has one entry per answer. `out["text"]` and `out["token_ids"]` work too."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request_id = request.request_id
        self.prompt = request.prompt
        self.outputs = [CompletionOutput(sequence, tokenizer) for sequence in request.sequences]
        self.finished = all(output.finish_reason is not None for output in self.outputs)
        self.num_cached_tokens = request.num_cached_tokens
        # Why, where a `finish_reason` is "error"; else None.
        self.error = next((o.error for o in self.outputs if o.error is not None), None)
        self._request = request
        self._num_tokens = self.outputs[0].num_tokens

    @cached_property
    def prompt_token_ids(self) -> list[int]:
        """The caller's to keep, and to extend."""
        return self._request.prompt_token_ids.tolist()

    @property
    def metrics(self) -> RequestMetrics:
        return RequestMetrics.of(self._request, self._num_tokens)

    def __getitem__(self, key: str) -> Any:
        if key not in ("text", "token_ids"):
            raise KeyError(key)
        return getattr(self.outputs[0], key)

    def keys(self) -> Iterator[str]:
        """For callers of nano-vLLM's dictionaries."""
        return iter(("text", "token_ids"))

    def __repr__(self) -> str:
        return f"RequestOutput(request_id={self.request_id!r}, finished={self.finished}, outputs={self.outputs})"


@dataclass(frozen=True, slots=True)
class StreamOutput:
    """An increment of one answer: what is new since the last one. `str()` of it is its text. `error`: why, where
    `finish_reason` is "error"."""

    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: str | None = None
    error: str | None = None

    def __str__(self) -> str:
        return self.text
