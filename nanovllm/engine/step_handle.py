"""A launched step of a card: when it ran, and what it sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanovllm.engine.shards import StepResult, TokenLogprobs
from nanovllm.layers.host import PinnedIds

if TYPE_CHECKING:
    from nanovllm.engine.pipeline_graphs import StageTimer


class StepHandle:
    """A launched step. `start` and `event`, timing events, mark its begin and end on the card; None on a CPU, where it
    has ended already. `stages`: when each of its stages ran, where they were timed. pinned: what a card's ids come back
    through."""

    def __init__(
        self,
        token_ids: Tensor,
        logprobs: tuple[Tensor, ...],
        wanted: list[int | None],
        start: torch.cuda.Event | None,
        pinned: PinnedIds | None = None,
    ) -> None:
        self._wanted, self._num_rows, self._pinned = wanted, len(token_ids), pinned
        self._ids: Tensor | None = token_ids if pinned is None else pinned.fetch(token_ids)
        self._logprobs = [_to_host(tensor) for tensor in logprobs]
        self._result: StepResult | None = None
        self.start = start
        self.event = None if start is None else timed_event()
        self.stages: StageTimer | None = None
        self._watcher: Callable[[list[int]], None] | None = None

    @property
    def seconds(self) -> float | None:
        """Device time from the step's first kernel to its last; None on a CPU, where the caller's clock tells."""
        return None if self.start is None or self.event is None else self.start.elapsed_time(self.event) / 1e3

    def idle_since(self, before: StepHandle) -> float | None:
        """Seconds from the end of an earlier step to this one's first kernel; None on a CPU."""
        if self.start is None or before.event is None:
            return None
        return before.event.elapsed_time(self.start) / 1e3

    def tell(self, watcher: Callable[[list[int]], None]) -> StepHandle:
        """Call it with the sampled ids, once `wait` knows them, in the thread that waits."""
        self._watcher = watcher
        return self

    def wait(self) -> StepResult:
        """Block until the step has ended; its sampled ids and the logprobs that rows asked for."""
        if self.event is not None:
            self.event.synchronize()
        if self._result is None:  # once: then the ids' buffer is another step's
            self._result = self._read()
            self._ids, self._logprobs = None, []  # pinned memory must go before the stream that wrote it does
        return self._result

    def _read(self) -> StepResult:
        assert self._ids is not None, "read twice"
        ids = self._ids.tolist() if self._pinned is None else self._pinned.read(self._ids, self._num_rows)
        if self._watcher is not None:
            self._watcher(ids)
        if not self._logprobs:
            return StepResult(ids)
        return StepResult(ids, _logprobs(self._wanted, *(tensor.tolist() for tensor in self._logprobs)))


def timed_event() -> torch.cuda.Event:
    """On the current stream, now."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _to_host(tensor: Tensor) -> Tensor:
    """A copy into pinned memory that a later event orders; the tensor itself on a CPU. Few requests ask for more than
    ids: this memory is torch's, which keeps it."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _logprobs(
    wanted: list[int | None],
    chosen: list[float],
    ranks: list[int],
    top_ids: list[list[int]],
    top: list[list[float]],
) -> list[TokenLogprobs | None]:
    return [
        None if k is None else TokenLogprobs(chosen[i], ranks[i], tuple(zip(top_ids[i][:k], top[i][:k], strict=True)))
        for i, k in enumerate(wanted)
    ]
