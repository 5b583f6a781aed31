"""For all tests: one torch thread a process, and GPU tests skip, with a reason, where their GPUs are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports torch. Tests run in parallel processes, and tiny tensors gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GPUS_NEEDED = {"gpu": 1, "two_gpu": 2}  # by folder of tests/


def pytest_itemcollected(item: pytest.Item) -> None:
    needed = gpus_needed(item.path)
    if needed and (available := count_gpus()) < needed:
        item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), this machine has {available}"))


def gpus_needed(path: Path) -> int:
    """CUDA devices that the tests of a file need, by the folder it lies in."""
    root = Path(__file__).parent
    return next((n for name, n in GPUS_NEEDED.items() if path.is_relative_to(root / name)), 0)


def count_gpus() -> int:
    import torch  # here: most tests of the scheduler never need it

    return torch.cuda.device_count()
