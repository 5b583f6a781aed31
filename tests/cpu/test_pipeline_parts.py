"""tools/pipeline_parts.py without a card, as in test_bench_pipeline.py; and the simulation of its lanes by hand."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench_steps import Case
from nanovllm.engine.green_manager import SmCounts, Split
from nanovllm.engine.pipeline_roofline import LayerWork
from tests.cpu.test_bench_pipeline import HostEvent, pretend  # noqa: F401
from tools import bench_pipeline, pipeline_parts

ONE_LAYER: Any = SimpleNamespace(num_hidden_layers=1, hidden_size=8, q_size=8, kv_size=4, intermediate_size=16)


class ExternalEvent(HostEvent):
    def __init__(self, enable_timing: bool = True, external: bool = False) -> None:
        super().__init__(enable_timing)


@pytest.fixture
def parts(pretend: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What the tool has from `bench_pipeline` is of the pretended one, too."""
    for name in vars(pipeline_parts).keys() & vars(bench_pipeline).keys():
        if getattr(getattr(pipeline_parts, name), "__module__", "") == "bench_pipeline" or name == "DEVICE":
            monkeypatch.setattr(pipeline_parts, name, getattr(bench_pipeline, name))
    ways = bench_pipeline.make_ways(None)[1]  # type: ignore[arg-type]
    monkeypatch.setattr(pipeline_parts, "make_ways", lambda args: (None, ways[:1]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", ExternalEvent)
    arguments = ["--shape", "0.6b", "--cases", "5x70,6x64", "--repeats", "2", "--replays", "1", "--settle-s", "0.01"]
    monkeypatch.setattr(sys, "argv", ["pipeline_parts.py", *arguments])


def test_every_part_is_timed_and_the_step_is_their_sum(parts: None, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline_parts.main()
    lines = capsys.readouterr().out.splitlines()
    cases = json.loads(lines[-1])["cases"]
    assert [case["case"] for case in cases] == ["5x70", "6x64"]
    for case in cases:
        ms, step = case["ms"], case["step"]
        names = [f"{lane} {n}" for lane in ("attention", "ffn")
                 for n in ("all card", "all partition", "halves partition", "halves card", "in step")]  # fmt: skip
        assert all(ms[name] > 0 for name in ("sequential", "pipelined", "logits", "wall in step", *names))
        sum_ms = sum(value for name, value in step.items() if name != "edge")
        assert sum_ms == pytest.approx(ms["pipelined"], abs=1e-3)
        assert step["ends"] >= 0 and step["edges"] >= 0  # a noisy host may time a whole lane below its parts
    assert sum("pipelined = slower lane" in line for line in lines) == 2


def test_a_step_that_computes_something_else_is_an_error(
    parts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = pipeline_parts.decode_step
    monkeypatch.setattr(pipeline_parts, "decode_step", lambda *args: step(*args).neg_())
    pipeline_parts.main()
    for case in json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]:
        assert "logits differ by 2.000" in case["error"] and "ms" not in case


def test_floors_of_lanes_are_those_of_the_step() -> None:
    config: Any = SimpleNamespace(
        num_hidden_layers=36, hidden_size=4096, q_size=4096, kv_size=1024, intermediate_size=12288
    )
    split = Split(SmCounts(36, 96), SmCounts(36, 96), 0, None, None, None)  # type: ignore[arg-type]
    way = bench_pipeline.Way("36:96", split, "core")
    floors = pipeline_parts.floors_ms(config, Case(512, 512), way)
    assert floors["attention all card"] + floors["ffn all card"] == pytest.approx(floors["sequential"])
    lanes = [floors[f"{lane} halves partition"] for lane in ("attention", "ffn")]
    assert floors["pipelined"] >= max(lanes) and floors["ffn all card"] < floors["ffn all partition"] <= lanes[1]
    assert floors["attention all card"] == pytest.approx(512 * 512 * 36 * 4096 / 4.45e9, rel=1e-3)


@pytest.mark.parametrize(("edge_ms", "expected"), [(0.0, 3.0), (0.5, 4.0)])
def test_the_simulated_order_by_hand(edge_ms: float, expected: float) -> None:
    """Stages of 1 ms: QKV of row 0, its attention, row 1's attention behind it, what is left of row 1."""
    assert pipeline_parts.critical_path_ms(2.0, 2.0, edge_ms, ONE_LAYER) == pytest.approx(expected)


def test_a_slow_lane_is_the_step() -> None:
    """FFN alone, but that the last micro-batch's attention separates its stages; attention with QKV ahead of it."""
    qkv = 16 * 8 / (LayerWork.of(ONE_LAYER, 1, 0).flops / 2)
    assert pipeline_parts.critical_path_ms(0.0, 2.0, 0.0, ONE_LAYER) == pytest.approx(2.0)
    assert pipeline_parts.critical_path_ms(200.0, 2.0, 0.0, ONE_LAYER) == pytest.approx(200 + qkv + (1 - qkv))


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline_parts.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        pipeline_parts.main()
