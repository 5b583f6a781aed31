"""tools/profile_decode.py and tools/profile_prefill.py without a card: made-up kernels in groups, and their sums."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NAMES = [
    "Memcpy HtoD (Pinned -> Device)",
    "_add_rms_norm_kernel",
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
    "_qk_norm_rope_store_kernel",
    "void cutlass::device_kernel<flash::enable_sm90>",
    "sm90_xmma_gemm_bf16bf16_bf16f32",
    "_add_rms_norm_kernel",
    "nvjet_tss_64x8",
    "cublasLt::splitKreduce_kernel",
    "Memcpy HtoD (Pinned -> Device)",
    "_race_kernel",
    "_finish_kernel",
]


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def events(times: list[tuple[float, float]]) -> list[Any]:
    """The kernels above, with start and end in microseconds."""

    def event(name: str, start: float, end: float) -> Any:
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        )

    return [event(name, *time) for name, time in zip(NAMES, times, strict=True)]


def test_a_prefill_in_groups() -> None:
    """Ten microseconds each, a hole of 30 ahead of the draw, and one kernel that begins 5 before the last has ended."""
    from profile_prefill import summarise

    times = [(10.0 * i, 10.0 * i + 10) for i in range(10)] + [(130.0, 140.0), (135.0, 145.0)]
    figures = summarise(events(times), taken_s=0.001)
    assert figures["card_ms"] == 0.145 and figures["idle_ms"] == 0.03 and figures["sum_ms"] == 0.12
    assert figures["generate_ms"] == 1.0 and figures["launches"] == 12
    assert figures["groups_ms"] == {
        "attention": 0.01,
        "copies and others": 0.02,
        "draw": 0.02,
        "head norms and store": 0.01,
        "logits": 0.02,
        "norms": 0.02,
        "products": 0.02,
    }


def test_every_kernel_of_ours_has_a_group() -> None:
    from profile_decode import OTHERS, group_of

    sources = [path.read_text() for path in (ROOT / "nanovllm/kernels").glob("*.py")]
    names = {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE)}
    others = {name for name in names if group_of(name) == OTHERS}
    assert len(names) > 20
    assert others == {"_gather_kernel", "_advance_kernel", "_write_runs_kernel", "_push_kernel"}
