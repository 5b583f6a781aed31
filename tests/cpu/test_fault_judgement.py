"""What the engine makes of a failure: another try, a copy given up, a card lost, the end."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.engine.executor import Job
from nanovllm.engine.faults import (
    BROKEN_LINK_COPIES,
    COPY_RETRIES,
    Faults,
    Verdict,
    describe,
    is_sticky,
    let_go_of_frames,
)
from nanovllm.engine.shards import CopyShard, PrefillShard
from tests.faults import ILLEGAL_ACCESS


def failed(shard: Any, text: str = "no") -> Job:
    return Job(shard, error=RuntimeError(text))


def copy(number: int, src: int = 0, dst: int = 1) -> CopyShard:
    return CopyShard(number, src, dst, ((0, 0),), 0)


def test_copies_are_retried_given_up_and_blamed_on_the_link() -> None:
    faults = Faults(2)
    for number in range(BROKEN_LINK_COPIES - 1):
        verdicts = [faults.judge(failed(copy(number))) for _ in range(1 + COPY_RETRIES)]
        assert verdicts == [Verdict.RETRY] * COPY_RETRIES + [Verdict.PREFILL_AGAIN]
    faults.arrived(copy(7))  # it works after all
    for number in range(10, 9 + BROKEN_LINK_COPIES):
        verdicts = [faults.judge(failed(copy(number))) for _ in range(1 + COPY_RETRIES)]
        assert verdicts[-1] is Verdict.PREFILL_AGAIN
    assert [faults.judge(failed(copy(30))) for _ in range(1 + COPY_RETRIES)][-1] is Verdict.LOSE_CARD
    assert faults.lost_card == 0 and faults.cause == "copies from card 0 to card 1: RuntimeError: no"
    assert faults.judge(failed(PrefillShard(1, 1, ()))) is Verdict.DIE


def test_a_link_that_works_excuses_no_other() -> None:
    faults = Faults(2)
    for number in range(BROKEN_LINK_COPIES):
        faults.arrived(copy(100 + number, 1, 0))
        verdicts = [faults.judge(failed(copy(number))) for _ in range(1 + COPY_RETRIES)]
    assert verdicts[-1] is Verdict.LOSE_CARD


def test_of_a_copy_within_a_card_that_card_is_blamed() -> None:
    faults = Faults(2)
    verdicts = [faults.judge(failed(copy(n // (1 + COPY_RETRIES), 1, 1))) for n in range(9)]
    assert verdicts[-1] is Verdict.LOSE_CARD and faults.lost_card == 1
    assert Faults(1).judge(failed(PrefillShard(0, 1, ()))) is Verdict.DIE


class AcceleratorError(RuntimeError):
    """As torch names it."""


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "sticky"),
    [
        (RuntimeError(ILLEGAL_ACCESS), True),
        (AcceleratorError("an illegal memory access was encountered"), True),
        (AcceleratorError("CUDA error: device-side assert triggered"), True),
        (AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (AcceleratorError("CUDA error: out of memory"), False),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (AcceleratorError("CUDA error: peer access is not supported between these two devices"), False),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (RuntimeError("Triton Error [CUDA]: an illegal instruction was encountered"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"), False),
        (ValueError("shapes differ"), False),
        (KeyboardInterrupt(), True),
        (SystemExit(3), True),
    ],
)
def test_sticky_errors(error: BaseException, sticky: bool) -> None:
    assert is_sticky(error) == sticky
    follower = RuntimeError("the step that writes the source failed")
    follower.__cause__ = error
    assert is_sticky(follower) == (sticky and isinstance(error, Exception))


def test_an_error_is_one_line_of_bounded_length() -> None:
    assert describe(ValueError("a\n  b\n")) == "ValueError: a b"
    assert len(describe(ValueError("x" * 9999))) == 500


def test_errors_that_cause_each_other_are_looked_at_once_each() -> None:
    first, second = RuntimeError("first"), RuntimeError("CUDA error: an illegal memory access was encountered")
    first.__cause__, second.__context__ = second, first
    assert is_sticky(first) and is_sticky(second)
    second.args = ("second",)
    assert not is_sticky(first)
    let_go_of_frames(first)
