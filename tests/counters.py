"""Counts what must not happen in mid-service: kernels compiled, CUDA graphs captured (and replays, which must)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def compiles() -> Iterator[list[str]]:
    """The Triton kernels compiled within the block, or loaded from the cache on disk, by any thread."""
    import triton  # here: a CPU build of torch comes without

    names: list[str] = []

    def note(**kwargs: Any) -> None:
        names.append(kwargs["repr"])

    with patch.object(triton.knobs.runtime, "jit_post_compile_hook", note):
        yield names


@contextmanager
def graph_calls(method: str) -> Iterator[list[str]]:
    """An entry for each call of `torch.cuda.CUDAGraph.<method>` within the block, by any thread."""
    calls: list[str] = []
    real = getattr(torch.cuda.CUDAGraph, method)

    def note(graph: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return real(graph, *args, **kwargs)

    with patch.object(torch.cuda.CUDAGraph, method, note):
        yield calls
