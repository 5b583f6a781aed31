"""Buffers that sampled ids come back through: one step's at a time. On a CPU, with memory that is not pinned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanovllm.engine.shards import StepResult
from nanovllm.engine.step_handle import StepHandle
from nanovllm.layers.host import PinnedIds


class Unpinned(PinnedIds):
    def _make(self, num_rows: int) -> Tensor:
        self.made = [*getattr(self, "made", []), num_rows]
        return torch.empty(num_rows, dtype=torch.int64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_steps_in_flight_have_buffers_of_their_own() -> None:
    pool = Unpinned(2, 4)
    first, second = pool.fetch(ids(1, 2, 3)), pool.fetch(ids(4))
    third = pool.fetch(ids(5, 6))  # more than ever before: one more is made, and kept
    assert pool.made == [4, 4, 4]
    assert [pool.read(first, 3), pool.read(third, 2), pool.read(second, 1)] == [[1, 2, 3], [5, 6], [4]]
    again = [pool.fetch(ids(number)) for number in range(3)]
    assert {id(buffer) for buffer in again} == {id(first), id(second), id(third)} and pool.made == [4, 4, 4]
    assert [pool.read(buffer, 1) for buffer in again] == [[0], [1], [2]]


def test_a_step_of_more_rows_has_one_that_is_not_kept() -> None:
    pool = Unpinned(1, 2)
    large, small = pool.fetch(ids(1, 2, 3)), pool.fetch(ids(4))
    assert [pool.read(large, 3), pool.read(small, 1)] == [[1, 2, 3], [4]] and pool.made == [2, 3]
    assert pool.fetch(ids(5)) is small


@pytest.mark.parametrize("wanted", [[None, None], [None, 1]])
def test_a_handle_reads_once(wanted: list[int | None]) -> None:
    """Whoever waits again gets the same, though the buffer is another step's."""
    pool, told = Unpinned(1, 4), []
    logprobs = (torch.zeros(2), ids(1, 1), ids(3, 4)[:, None], torch.zeros(2, 1)) if any(wanted) else ()
    handle = StepHandle(ids(7, 8), logprobs, wanted, None, pool).tell(told.append)
    result = handle.wait()
    assert StepHandle(ids(9), (), [], None, pool).wait() == StepResult([9]) and pool.made == [4]
    assert handle.wait() is result and result.token_ids == [7, 8] and told == [[7, 8]]
    assert len(result.logprobs) == (2 if any(wanted) else 0)
