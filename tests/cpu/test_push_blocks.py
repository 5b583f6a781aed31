"""The block copy kernel through Triton's interpreter (in a process of its own), and compiled for the real cards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = """
import random
import torch
from nanovllm.kernels.push_blocks import push_blocks, push_blocks_reference

rng = random.Random(0)
for words, count in ((48, 5), (8192, 3), (8192 + 4, 4)):
    source = torch.randint(-(2**31), 2**31, (9, words), dtype=torch.int64).int()
    pairs = list(zip(rng.sample(range(9), count), rng.sample(range(9), count)))
    targets = [torch.full((9, words), 7, dtype=torch.int32) for _ in range(2)]
    push_blocks(source, targets[0], pairs)
    push_blocks_reference(source, targets[1], pairs)
    assert torch.equal(*targets), (words, count)
print("equal")
"""


def test_push_copies_exactly_the_pairs() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_push_compiles(capability: int) -> None:
    from nanovllm.kernels.push_blocks import push_blocks
    from tests.cpu.compile_check import assert_fits, compile_launches

    pages = torch.empty(4, 36, 2, 64, 8, 128, dtype=torch.bfloat16, device="meta")
    for report in compile_launches(capability, lambda: push_blocks(pages, pages, [(0, 1)])):
        assert_fits(report)
