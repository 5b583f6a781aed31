"""The kernels at both ends of a decode step against the plain slot state, on a card."""

from __future__ import annotations

import pytest

from tests.cpu.test_decode_state import compare


@pytest.mark.parametrize("seed", range(5))
def test_kernels_equal_the_plain_state(seed: int) -> None:
    compare(seed, "cuda")
