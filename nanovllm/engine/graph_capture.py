"""How a step becomes a CUDA graph, and what memory there is for more of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def captured(run: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """What `run` queues on the current stream, after having run it once, with memory of that pool; and what it returned
    under capture. thread_local: another engine of this process may allocate and wait meanwhile."""
    run()  # compiles what is not compiled yet, and warms the libraries' workspaces
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        return graph, run()


def free_bytes(device: torch.device) -> int:
    """Of the card, once torch has given back what it only keeps."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
