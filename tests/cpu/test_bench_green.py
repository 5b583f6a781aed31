"""tools/bench_green.py without a card: a fake driver grants SMs, and an engine of two lanes that run in order."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from nanovllm import DEMO_MODEL, LLM
from nanovllm.engine.green_manager import GreenManager
from tests.cpu.test_green_ctx import FakeDriver
from tests.cpu.test_pipeline_start import driver  # noqa: F401
from tools import bench_green


@pytest.fixture
def pretend(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:  # noqa: F811
    class Stream:
        def synchronize(self) -> None: ...

    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda: "none",
        "synchronize": lambda *a: None,
        "mem_get_info": lambda *a: (1000 - 8 * driver.alive, 2000),
        "memory_allocated": lambda *a: 0,
        "stream": lambda s: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("green_ctx._wrap_stream", lambda handle, index: Stream())
    zeros = torch.zeros
    monkeypatch.setattr(bench_green.torch, "zeros", lambda *a, **k: zeros(*a, **(k | {"device": "cpu"})))
    monkeypatch.setattr(bench_green, "write_shape", lambda folder, shape: DEMO_MODEL)
    small: dict[str, Any] = dict(device="cpu", kvcache_block_size=16, num_kvcache_blocks=80)
    monkeypatch.setattr(bench_green, "LLM", lambda model, **options: LLM(model, **options, **small))
    return driver


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # but for the tool's own question
    answers = iter([True])
    monkeypatch.setattr(bench_green.torch.cuda, "is_available", lambda: next(answers, False))
    monkeypatch.setattr(sys, "argv", ["bench_green.py", *flags])
    bench_green.main()
    printed = capsys.readouterr()
    print(printed.err)
    report: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    return report


LOAD = "--cycles", "0", "--rows", "4", "--switches", "20", "--prompt-len", "5", "--ramp", "6"


def test_cycles_tell_what_is_left_behind(
    pretend: FakeDriver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cycles = run(monkeypatch, capsys, "--cycles", "25", "--switches", "0")["cycles"]
    assert cycles["count"] == 25 and len(cycles["growth"]) == 3 and not cycles["growth"][-1]["card_bytes"]
    real = bench_green.split_device_green_ctx_by_sm_count

    def leaky(device: Any, counts: Any) -> Any:
        real(device, counts)  # one that nobody closes
        return real(device, counts)

    monkeypatch.setattr(bench_green, "split_device_green_ctx_by_sm_count", leaky)
    cycles = run(monkeypatch, capsys, "--cycles", "25", "--switches", "0")["cycles"]
    assert cycles["growth_a_cycle"]["card_bytes"] > 0 and cycles["growth"][0]["card_bytes"] > 0


def test_each_step_of_all_rows_takes_another_split(
    pretend: FakeDriver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = run(monkeypatch, capsys, *LOAD)["load"]
    assert load["switches"] >= 20 and load["failed_requests"] == 0 and load["fallback_cause"] is None
    assert load["growth"]["card_bytes"] == load["growth"]["tensor_bytes"] == 0
    pipelined = {way: count for way, count in load["steps_by_way"].items() if way != "sequential"}
    assert len(pipelined) == 4 and max(pipelined.values()) - min(pipelined.values()) <= 2
    assert load["step_ms"]["count"] >= 20 and load["token_gap_ms"]["count"] == 20 + 2 * 6 - 1 - 12


def test_a_split_that_cannot_be_taken_does_not_count(
    pretend: FakeDriver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(GreenManager, "rebalance", lambda self, *counts: self.current)
    assert run(monkeypatch, capsys, *LOAD)["load"]["switches"] == 0


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_green.py"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a CUDA device"):
            bench_green.main()
