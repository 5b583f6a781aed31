"""Launches side by side in threads: all of them, on the stream that was named, and their errors."""

from __future__ import annotations

import threading
from typing import NoReturn

import pytest
import torch

from nanovllm.engine.compile_ahead import THREADS, launch_side_by_side


def test_all_run_on_the_stream_in_several_threads() -> None:
    stream, device = torch.cuda.Stream(), torch.device("cuda", torch.cuda.current_device())
    counts, seen = torch.zeros(THREADS, device=device), set()
    together = threading.Barrier(THREADS)  # passed only if so many run at a time
    stream.wait_stream(torch.cuda.current_stream())

    def call(number: int) -> None:
        together.wait(timeout=30)
        seen.add(torch.cuda.current_stream())
        assert torch.is_inference_mode_enabled()
        counts[number] += number

    launch_side_by_side([lambda number=number: call(number) for number in range(THREADS)], stream)  # type: ignore[misc]
    stream.synchronize()
    assert seen == {stream} and counts.tolist() == list(range(THREADS))


def test_an_error_is_raised() -> None:
    def fail() -> NoReturn:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        launch_side_by_side([lambda: None, fail], torch.cuda.Stream())
