"""Divides a limited time among rounds of work of which each has a beginning and an ending that cannot be cut short."""

from __future__ import annotations

import math
import time

FIRST_ENDING = 0.25  # the share of its time that the first round's ending may take
MARGIN = 1.5  # later ones are expected to take the longest so far, and half of it


class Timetable:
    """For `num_rounds` rounds until `end_s`, of `time.monotonic()`: for fewer if half of each would be no work, for
    more if some end early. Infinity: no limit."""

    def __init__(self, end_s: float, num_rounds: int) -> None:
        self._end_s, self._num_left = end_s, num_rounds
        self._start_s = self._ending_s = self._begun_s = 0.0  # the longest so far; when this round began
        self._first = True

    def begin(self) -> bool:
        """A round begins, if there is time for one."""
        self._begun_s = time.monotonic()
        return self._end_s - self._begun_s > MARGIN * (self._start_s + self._ending_s)

    def until_s(self) -> float:
        """It begins to work. How long it may do so, that its ending fits in as well."""
        if math.isinf(self._end_s):
            return self._end_s
        self._start_s = max(self._start_s, time.monotonic() - self._begun_s)
        left_s, least_s = self._end_s - self._begun_s, 2 * (self._start_s + self._ending_s)
        slot_s = left_s / max(1, min(self._num_left, left_s // least_s))
        ending_s = FIRST_ENDING * slot_s if self._first else MARGIN * self._ending_s
        return self._begun_s + slot_s - ending_s

    def end(self, worked_s: float) -> None:
        """It has ended; until when it worked."""
        self._num_left, self._first = self._num_left - 1, False
        self._ending_s = max(self._ending_s, time.monotonic() - worked_s)
