"""tools/bench_pipeline.py without a card (graphs run eagerly, lanes in order), and the picture of what it printed."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bench
from nanovllm.engine.green_manager import SmCounts, Split
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.pipeline_step import BOUNDARIES, InOrder, StageBackends, Stages
from nanovllm.models.loader import load_model
from tools import bench_auto, bench_pipeline, plot_pipeline


class HostEvent:
    def __init__(self, enable_timing: bool = True) -> None:
        self.at_s = 0.0

    def record(self) -> None:
        self.at_s = time.perf_counter()

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at_s - self.at_s) * 1e3


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card: its clock is the host's, and a split of it that computes as the whole does."""

    def capture(run: Any, pool: Any) -> Any:
        run()
        return bench_pipeline.Captured(SimpleNamespace(replay=run), run)  # type: ignore[arg-type]

    def ways(args: Any) -> Any:
        split = Split(SmCounts(44, 88), SmCounts(44, 88), 0, None, None, None)  # type: ignore[arg-type]
        splits = [("44:88", split), ("plain", None)]
        return None, [bench_pipeline.Way(name, split, boundary) for name, split in splits for boundary in BOUNDARIES]

    def stages(setup: Any, way: Any, args: Any) -> Any:
        backends = StageBackends(setup.model.attention, setup.model.attention)
        return Stages(setup.model, setup.kv_cache, backends, way.boundary), InOrder()

    shape = bench.Shape(64, 2, 4, 2, 96, True)
    for module, changes in (
        (bench_pipeline, {"DEVICE": torch.device("cpu"), "capture": capture, "make_ways": ways}),
        (bench_pipeline, {"stages_and_lanes": stages, "KVCache": lambda *a: KVCache(*a[:3], torch.float32, a[4])}),
        (bench_pipeline, {"load_model": lambda p, c, b, d, *a, **k: load_model(p, c, b, torch.float32, *a, **k)}),
        (torch.cuda, {"Event": HostEvent, "synchronize": lambda *a: None, "mem_get_info": lambda: (0, 0)}),
        (torch.cuda, {"graph_pool_handle": lambda: None, "Stream": lambda *a: None, "stream": lambda s: nullcontext()}),
        (torch.cuda, {"get_device_name": lambda: "none"}),
    ):
        for name, value in changes.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(bench.SHAPES, "0.6b", shape)
    monkeypatch.setitem(bench.SHARED, "head_dim", 16)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    arguments = ["--shape", "0.6b", "--cases", "5x70", "--repeats", "2", "--replays", "1", *flags]
    monkeypatch.setattr(sys, "argv", ["bench_pipeline.py", *arguments])
    bench_pipeline.main()
    return capsys.readouterr().out.splitlines()


def test_every_way_is_checked_timed_and_printed(
    pretend: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(monkeypatch, capsys)
    (case,) = json.loads(lines[-1])["cases"]
    assert case["case"] == "5x70" and case["sequential"]["ms"] > 0
    assert [row["way"] for row in case["ways"]] == [f"{n} {b}" for n in ("44:88", "plain") for b in BOUNDARIES]
    for row in case["ways"]:
        assert row["differs"] < 1e-4 and row["ratio"] > 0
        assert ("ffn_alone_ms" in row) == row["way"].startswith("44:88")
    assert sum(" ms  " in line and "differs" in line for line in lines) == 4


def test_a_way_that_computes_something_else_is_named_and_left_out(
    pretend: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = bench_pipeline.decode_step

    def wrong(stages: Stages, lanes: Any, batches: Any, out: Any) -> Any:
        logits = step(stages, lanes, batches, out)
        return logits.neg_() if stages.boundary == "projections" else logits

    monkeypatch.setattr(bench_pipeline, "decode_step", wrong)
    (case,) = json.loads(run(monkeypatch, capsys, "--no-alone")[-1])["cases"]
    for row in case["ways"]:
        assert ("error" in row) == row["way"].endswith("projections") and ("ms" in row) != ("error" in row)
    assert "logits differ by 2.000" in case["ways"][1]["error"]


@pytest.mark.parametrize(("able", "checked"), [(True, False), (True, True), (False, True)])
def test_auto_is_measured_beside_sequential(
    pretend: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], able: bool, checked: bool
) -> None:
    way = bench_pipeline.make_ways(None)[1][0]  # type: ignore[arg-type]
    names = ("DEVICE", "capture", "make_setup", "pipelined", "time_ms", "make_model", "replay_for")
    for name in names:
        monkeypatch.setattr(bench_auto, name, getattr(bench_pipeline, name))
    monkeypatch.setattr(bench_auto, "make_auto_ways", lambda: (None, [way]))
    monkeypatch.setattr(bench_auto, "roofline_can_win", lambda *a: able)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    arguments = ["--shapes", "0.6b", "--batches", "5", "--contexts", "70,1099511627776", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_auto.py", *arguments, "--replays", "1"])
    sys.argv += ["--settle-s", "0.01", *(["--check"] if checked else [])]
    bench_auto.main()
    fits, too_long = json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]
    assert "its pages take" in too_long["error"]
    assert fits["tried"] == (["44:88"] if able else []) and set(fits["medians_ms"]) == (
        {"sequential", "44:88"} if able else set()
    )
    assert fits["chosen"] in ("sequential", *fits["tried"]) and fits["ratio"][1] <= fits["ratio"][0] <= fits["ratio"][2]
    measured = {"sequential", *fits["tried"]} if checked else {"sequential", fits["chosen"]}
    assert set(fits["steady_ms"]) == measured and fits["best"][0] == min(measured, key=fits["steady_ms"].get)
    assert fits["explored_steps"] == (24 if able else 0)


def test_the_picture_has_a_line_a_boundary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    way = {"ms": 9.0, "attention_alone_ms": 5.0, "ffn_alone_ms": 6.0}
    case: dict[str, Any] = {
        "case": "512x512",
        "sequential": {"ms": 10.0, "spread_ms": [9.9, 10.1]},
        "ways": [
            way | {"way": "60:72 core", "ms": 8.0},
            way | {"way": "44:88 core"},
            way | {"way": "44:88 projections"},
            way | {"way": "plain core"},
            {"way": "28:104 core", "error": "no"},
        ],
    }
    assert plot_pipeline.lines_of(case) == {
        "core": [(44, 9.0), (60, 8.0)],
        "projections": [(44, 9.0)],
        "attention alone on its SMs": [(44, 5.0), (60, 5.0)],
        "products alone on theirs": [(44, 6.0), (60, 6.0)],
    }
    assert plot_pipeline.split_labels(case) == {60: "60:72", 44: "44:88", 28: "28:104"}
    drawn: list[str] = []
    titles: list[str] = []
    panel = SimpleNamespace(
        plot=lambda xs, ys, label, **style: drawn.append(label),
        axhline=lambda *a, label, **k: drawn.append(label),
        **{name: lambda *a, **k: None for name in ("axhspan", "set", "set_xticks", "set_ylim", "legend")},
    )
    figure = SimpleNamespace(
        suptitle=titles.append, tight_layout=lambda: None, savefig=lambda path, dpi: Path(path).write_text("png")
    )
    pyplot = SimpleNamespace(subplots=lambda *a, **k: (figure, [[panel]]))
    monkeypatch.setattr(plot_pipeline, "import_pyplot", lambda: pyplot)
    printed = tmp_path / "bench.txt"
    printed.write_text("some lines\n" + json.dumps({"shape": "8b", "device": "H200", "cases": [case]}))
    plot_pipeline.main([str(printed), str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").exists() and titles == ["Decode step in two lanes, Qwen3-8B, H200"]
    assert drawn == [
        *('both lanes, boundary "core"', "attention alone on its SMs", "products alone on theirs"),
        *('both lanes, boundary "projections"', "sequential, with its spread"),
    ]
