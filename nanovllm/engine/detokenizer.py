"""Text from token ids, a piece at a time, and the search for stop strings in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

INCOMPLETE = "\ufffd"  # a decoder's sign for bytes that do not (yet) make a character
MAX_HELD_TOKENS = 8  # a character is at most four bytes, hence four tokens: what is held longer is really invalid


class IncrementalDetokenizer:
    """Pieces of text whose concatenation is the text of all ids pushed so far, as far as it is certain.

    A token's text depends on its neighbours (bytes of one character, spaces between words), so each piece is the
    difference of two decodings of a short window, as Hugging Face's text-generation-inference does it.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0  # ids before it no longer influence what follows
        self._emitted = 0  # ids before it are in `text`
        self.text = ""

    def push(self, ids: Sequence[int]) -> str:
        """Add ids and return the piece of text that became certain; "" while a character is incomplete."""
        self._ids += ids
        return self._emit(force=len(self._ids) - self._emitted > MAX_HELD_TOKENS)

    def flush(self) -> str:
        """The rest: no id will follow."""
        return self._emit(force=True)

    def _emit(self, force: bool) -> str:
        known = self._decode(self._ids[self._window : self._emitted])
        whole = self._decode(self._ids[self._window :])
        if not force and (whole.endswith(INCOMPLETE) or len(whole) <= len(known)):
            return ""
        self._window, self._emitted = self._emitted, len(self._ids)
        piece = whole[len(known) :]
        self.text += piece
        return piece


class StopWatcher:
    """Watches one sequence's text for stop strings; `cut` is the length of the text to keep once one was found."""

    def __init__(self, decode: Decode, stop: Sequence[str], include_stop: bool) -> None:
        self._detokenizer = IncrementalDetokenizer(decode)
        self._stop = stop
        self._include_stop = include_stop
        self._longest = max(map(len, stop))
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
        start = max(0, len(text) - len(piece) - self._longest + 1)
        hits = [(at, i) for i, stop in enumerate(self._stop) if (at := text.find(stop, start)) >= 0]
        if not hits:
            return None
        at, i = min(hits)
        self.found = self._stop[i]
        self.cut = at + len(self.found) * self._include_stop
        return self.found
