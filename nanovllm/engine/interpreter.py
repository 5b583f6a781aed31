"""The Python interpreter as an engine with threads needs it. Python has these settings for the whole process only."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SWITCH_INTERVAL_S = 0.0005


def keep_pauses_short() -> None:
    """Let no thread, and no garbage collection, keep the interpreter from the engine's threads for long.

    A thread in pure Python holds the interpreter for the switch interval before another gets a turn; it is never made
    longer than it was. A full collection looks at every object there is, with torch and transformers loaded for 0.13 s
    and more, in which no card is given anything: what lives by now is taken out of its sight.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
    gc.collect()
    gc.freeze()


def collect_all_again() -> None:
    """An engine has ended: what of it is garbage can be found from now on. Python cannot tell it from what another
    engine keeps out of sight, which is looked at again, too."""
    gc.unfreeze()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C in the middle of a step would leave the plan half made: it takes effect when the step has ended."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *call: held.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(*held[-1])
