"""Text from token ids, a piece at a time, and the search for stop strings in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

INCOMPLETE = "\ufffd"  # a decoder's sign for bytes that do not (yet) make a character


class IncrementalDetokenizer:
    """Pieces of text whose concatenation is the text of all ids pushed so far, as far as it is certain.

    A token's text depends on its neighbours (bytes of one character, spaces between words), so each piece is the
    difference of two decodings of a short window, as Hugging Face's text-generation-inference does it. Only the
    last character can still change: what stands before it is certain even among invalid bytes.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0  # ids before it no longer influence what follows
        self._boundary = 0  # ids before it are whole characters, all in `text`
        self._num_emitted = 0  # characters of the window's text that are in `text`
        self.text = ""

    def push(self, ids: Sequence[int]) -> str:
        """Add ids and return the piece of text that became certain; "" while a character is incomplete."""
        self._ids += ids
        return self._emit(force=False)

    def flush(self) -> str:
        """The rest: no id will follow."""
        return self._emit(force=True)

    def _emit(self, force: bool) -> str:
        whole = self._decode(self._ids[self._window :])
        incomplete = whole.endswith(INCOMPLETE)
        certain = len(whole) - (incomplete and not force)
        piece = whole[self._num_emitted : certain]
        self._num_emitted = certain
        if not incomplete:
            self._window, self._boundary = self._boundary, len(self._ids)
            self._num_emitted = len(self._decode(self._ids[self._window :]))
        self.text += piece
        return piece


class StopWatcher:
    """Watches one sequence's text for stop strings; `cut` is the length of the text to keep once one was found."""

    def __init__(self, decode: Decode, stop: Sequence[str], include_stop: bool) -> None:
        self._detokenizer = IncrementalDetokenizer(decode)
        self._stop = stop
        self._include_stop = include_stop
        self.found: str | None = None
        self.cut: int | None = None

    @property
    def text(self) -> str:
        return self._detokenizer.text[: self.cut]

    def push(self, token: int, search: bool) -> str | None:
        """Add a token; the stop string that its text completed, if any. Without `search`, only the text grows."""
        piece = self._detokenizer.push([token])
        return self._find(piece) if piece and search else None

    def flush(self) -> None:
        """The sequence ended otherwise: nothing is held back any more."""
        if self.found is None:
            self._detokenizer.flush()

    def _find(self, piece: str) -> str | None:
        """The stop string that begins first in the text's new end; of several there, the one listed first."""
        text = self._detokenizer.text
        old = len(text) - len(piece)  # a stop string within the old text was not searched for: `min_tokens`
        starts = [max(0, old - len(stop) + 1) for stop in self._stop]
        hits = [(at, i) for i, stop in enumerate(self._stop) if (at := text.find(stop, starts[i])) >= 0]
        if not hits:
            return None
        at, i = min(hits)
        self.found = self._stop[i]
        self.cut = at + len(self.found) * self._include_stop
        return self.found
