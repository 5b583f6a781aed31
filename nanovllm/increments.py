"""What `LLM.stream` yields of an answer that grows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanovllm.engine.detokenizer import IncrementalDetokenizer
from nanovllm.outputs import StreamOutput


class Increment:
    """What of one answer has been yielded already. Text that a stop string may still cut is held back."""

    def __init__(self, index: int, decode: Any) -> None:
        self._index = index
        self._num_tokens = 0
        self._text = ""
        self._detokenizer = IncrementalDetokenizer(decode)
        self._ended = False

    def of(self, completion: Any, with_text: bool) -> Iterator[StreamOutput]:
        ids = completion.tokens_from(self._num_tokens)
        ended = completion.finish_reason is not None
        if self._ended or not (ids or ended):
            return
        self._num_tokens += len(ids)
        self._ended = ended
        text = self._piece(completion, ids) if with_text else ""
        yield StreamOutput(text, ids, self._index, completion.finish_reason, completion.error)

    def _piece(self, completion: Any, ids: list[int]) -> str:
        if completion.finish_reason is not None:
            return completion.text[len(self._text) :]
        params = completion.params
        piece = self._detokenizer.push(ids)
        if params.stop:  # stored as a tuple
            held = max(map(len, params.stop)) - 1
            certain = self._detokenizer.text[: max(0, len(self._detokenizer.text) - held)]
            piece = certain[len(self._text) :]
        self._text += piece
        return piece
