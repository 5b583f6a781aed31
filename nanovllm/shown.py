"""How an error message quotes a value that somebody else chose: whatever it is, the message stays readable."""

from __future__ import annotations

from typing import Any

SHOWN_CHARS = 200


def shown(value: Any) -> str:
    """`repr(value)`, shortened; for what has none (too deep, too many digits, a broken `__repr__`) its type."""
    try:
        return shortened(repr(value))
    except Exception:
        size = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        return f"<{type(value).__name__}{size}>"


def shortened(text: str) -> str:
    """The beginning of a long text, and how long it is."""
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}… ({len(text)} characters)"
