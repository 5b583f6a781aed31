"""For how long something has been so: started and stopped by one thread, read by any."""

from __future__ import annotations

import time


class Stopwatch:
    """Sums up the seconds between `set(True)` and the next `set(False)`."""

    def __init__(self) -> None:
        self._state: tuple[float, float | None] = 0.0, None  # seconds before, running since; one object: read at once

    def set(self, running: bool) -> None:
        before_s, since_s = self._state
        if running == (since_s is not None):
            return
        now_s = time.perf_counter()
        self._state = (before_s, now_s) if since_s is None else (before_s + now_s - since_s, None)

    @property
    def seconds(self) -> float:
        """So far, what runs now included."""
        before_s, since_s = self._state
        return before_s if since_s is None else before_s + time.perf_counter() - since_s
