"""For tests of kernels."""

from __future__ import annotations

import random

import pytest


@pytest.fixture
def fresh_inputs() -> None:
    """New inputs in every run; a failure prints its seed with the captured output."""
    import torch  # here: it is collected where there is no torch, too

    seed = random.SystemRandom().randrange(1 << 31)
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
