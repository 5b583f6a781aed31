"""Launches in several threads before they are needed, so that the kernels among them are compiled side by side.

Much of compiling is done outside Python, a kernel at a time. Nobody may read what these launches compute: they may use
buffers at the same time that belong to one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

THREADS = 8
# Products of more rows are cuBLAS's, which keeps memory on the card for every thread that it has run in.
OWN_KERNEL_ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128)


def launch_side_by_side(calls: Iterable[Callable[[], object]], stream: torch.cuda.Stream) -> None:
    """Run each call in some thread, what it launches on `stream`; returns when all have been launched. Raises what the
    first call raises that fails."""

    @torch.inference_mode()
    def run(call: Callable[[], object]) -> None:
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            call()

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(run, calls))
