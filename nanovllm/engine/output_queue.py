"""How callers hear of their requests, and of the engine's end."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from nanovllm.engine.sequence import Request


class EngineDeadError(RuntimeError):
    """The engine has failed or was closed; it answers no more requests. The cause is chained."""


class OutputQueue:
    """Requests that advanced, each at most once, in order. Written by the engine, read by one caller.

    only_ends: their last step alone. Whoever wants whole answers need not be woken in each step, and keep the
    interpreter from the engine for it.
    """

    def __init__(self, only_ends: bool = False) -> None:
        self.only_ends = only_ends
        self._condition = threading.Condition()
        self._advanced: dict[Request, None] = {}
        self._error: BaseException | None = None

    def put(self, requests: Iterable[Request]) -> None:
        with self._condition:
            self._advanced.update(dict.fromkeys(requests))
            self._condition.notify()

    def fail(self, error: BaseException) -> None:
        with self._condition:
            self._error = error
            self._condition.notify_all()

    def __bool__(self) -> bool:
        return bool(self._advanced)

    def wait(self, timeout_s: float) -> bool:
        """Until there is something to take, an error too, for so long at most; whether there is."""
        with self._condition:
            return bool(self._condition.wait_for(lambda: self._advanced or self._error, timeout_s))

    def take(self, timeout_s: float | None) -> list[Request]:
        """Everything that advanced since the last call; waits up to `timeout_s` for the first. Raises if failed."""
        with self._condition:
            self._condition.wait_for(lambda: self._advanced or self._error, timeout_s)
            taken, self._advanced = list(self._advanced), {}
            if self._error is not None and not taken:
                raise EngineDeadError(f"the engine has stopped: {self._error}") from self._error
            return taken
