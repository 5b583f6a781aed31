"""Launches side by side in threads: all of them, on the stream that was named, and their errors."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch
import triton
import triton.language as tl

from nanovllm.engine.compile_ahead import THREADS, launch_side_by_side


@triton.jit
def _store_kernel(out, number, NUM: tl.constexpr):
    tl.store(out + NUM, number)


def test_all_run_on_the_stream_and_each_kernel_by_its_launcher() -> None:
    stream, device = torch.cuda.Stream(), torch.device("cuda", torch.cuda.current_device())
    counts, seen = torch.zeros(8 * THREADS, device=device), set()
    stream.wait_stream(torch.cuda.current_stream())

    def call(number: int) -> None:
        seen.add(torch.cuda.current_stream())
        assert torch.is_inference_mode_enabled()
        # Numbers of 64 bits, of 32 bits, and fractions: three launchers, of the same number of arguments.
        value = (number, number + 2**40, number + 0.5)[number % 3]
        _store_kernel[(1,)](counts, value, number)

    calls = [lambda number=number: call(number) for number in range(8 * THREADS)]
    launch_side_by_side(calls, stream)  # type: ignore[arg-type]
    stream.synchronize()
    wanted = [(number, number + 2**40, number + 0.5)[number % 3] for number in range(8 * THREADS)]
    assert seen == {stream} and counts.tolist() == torch.tensor(wanted, dtype=torch.float32).tolist()


def test_an_error_is_raised() -> None:
    def fail() -> NoReturn:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        launch_side_by_side([lambda: None, fail], torch.cuda.Stream())
