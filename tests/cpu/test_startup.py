"""Start-up in parts: `LLM.startup`, its log line, and tools/bench_startup.py from the first byte to the last."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nanovllm import llm as llm_module
from nanovllm.engine import model_runner
from nanovllm.engine.cards import STARTUP_PARTS, build_runners, timed
from nanovllm.engine.rehearsal import product_rows, rehearse_products
from tests.cpu.tiny import make_llm, write_config

SCRIPT = Path(__file__).parents[2] / "tools/bench_startup.py"
SMALL = ["--shape", "demo", "--device", "cpu", "--num-kvcache-blocks", "4", "--max-num-seqs", "2"]


def check_parts(startup: dict[str, float]) -> None:
    parts = [startup[part] for part in STARTUP_PARTS]
    assert min(parts) >= 0 and sum(parts) <= startup["total_s"]
    assert startup["import_s"] > 0 and startup["weights_s"] > 0 and startup["kv_pool_s"] > 0


@pytest.mark.parametrize("two_cards", [False, True])
def test_parts_of_startup(two_cards: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "nanovllm"),
        make_llm(write_config(tmp_path), enable_two_gpu_pd=two_cards) as llm,
    ):
        assert set(llm.startup) == {*STARTUP_PARTS, "total_s"}
        check_parts(llm.startup)
        assert llm.startup["compile_s"] == llm.startup["capture_s"] == 0  # nothing to compile for a CPU
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("ready in")]
    assert re.findall(r"(\w+) \d+\.\d\d", line) == ["in", *(part.removesuffix("_s") for part in STARTUP_PARTS)]


def test_parts_add_up_over_cards() -> None:
    seconds = {"weights_s": 1.0, "capture_s": 0.0}
    with timed(seconds, "weights_s"):
        time.sleep(0.001)
    assert seconds["weights_s"] > 1.0 and seconds["capture_s"] == 0


def test_bench_startup_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *SMALL, "--two-gpus", "--tmp-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().rpartition("\n")[2])
    assert (figures["shape"], figures["shards"], figures["two_gpus"]) == ("demo", 1, True)
    assert len(figures["devices"]) == 2 and {"dtype", "versions", "commit", "write_s"} <= set(figures)
    for run in (figures["cold"], figures["warm"]):
        assert set(run) == {*STARTUP_PARTS, "total_s", "spawn_to_ready_s", "spawn_to_first_token_s"}
        check_parts(run)
        assert run["total_s"] < run["spawn_to_ready_s"] < run["spawn_to_first_token_s"]
    assert not list(tmp_path.iterdir())


def test_bench_startup_reports_a_failed_step_and_cleans_up(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *SMALL, "--max-num-seqs", "-1", "--tmp-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "max_num_seqs=-1" in done.stderr and "error: start failed" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_bench_startup_interrupted_cleans_up(number: signal.Signals, status: int, tmp_path: Path) -> None:
    # A shell that runs the tests in its background has them, and their children, ignore SIGINT.
    heed = partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, str(SCRIPT), *SMALL, "--tmp-dir", str(tmp_path)], preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/model-*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == status
    assert not list(tmp_path.iterdir())


def test_written_shards_are_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import bench_startup

    monkeypatch.setattr(bench_startup, "MAX_SHARD_BYTES", 20_000)
    shards = bench_startup.write_weights(argparse.Namespace(folder=write_config(tmp_path)))["shards"]
    index: dict[str, Any] = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert shards == len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            num_bytes = sum(file.get_tensor(name).nbytes for name in names)
        assert names == {name for name, home in index["weight_map"].items() if home == path.name}
        assert num_bytes <= 20_000 or len(names) == 1
    with make_llm(tmp_path, load_format="auto") as llm:
        assert llm.generate([[1, 2]], use_tqdm=False)[0].finished


def test_reserved_steps_are_within_every_limit(tmp_path: Path) -> None:
    """No step of more tokens or rows than the engine may launch, no chunk longer than a sequence may be."""
    with make_llm(write_config(tmp_path), max_num_seqs=5) as llm:
        runner, shards = llm.decode_runner, []
        run = runner.run_prefill
        runner.run_prefill = lambda shard: shards.append(shard) or run(shard)  # type: ignore[method-assign]
        runner.reserve(max_num_batched_tokens=130)
    assert max(shard.num_tokens for shard in shards) == 130 and max(shard.num_samples for shard in shards) == 5
    assert all(len(chunk.tokens) <= llm.max_model_len for shard in shards for chunk in shard.chunks)


def test_the_pace_of_prefill_is_known_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner.StepHandle, "seconds", 0.26)
    monkeypatch.setattr(llm_module, "build_runners", lambda *args: reserved(build_runners(*args)))

    def reserved(runners: list[model_runner.ModelRunner]) -> list[model_runner.ModelRunner]:
        for runner in runners:
            runner.reserve(max_num_batched_tokens=130)
        return runners

    with make_llm(write_config(tmp_path)) as llm:
        assert llm._engine.scheduler.pace.token_s == pytest.approx(0.26 / 130)


@pytest.mark.parametrize("most", [1, 7, 8, 130, 512, 4097, 16_896])
def test_products_are_rehearsed_up_to_the_largest(most: int) -> None:
    rows = product_rows(most)
    assert rows == sorted(set(rows)) and rows[0] == 1 and rows[-1] == most
    assert all(b - a <= max(8, a // 7) for a, b in zip(rows, rows[1:], strict=False)), "a wide gap between two sizes"


def test_every_product_of_a_layer_is_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_llm(write_config(tmp_path)) as llm:
        model, seen = llm.decode_runner.model, set[tuple[int, int]]()
        linear = torch.nn.functional.linear
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: seen.add((len(x), id(w))) or linear(x, w))
        rehearse_products(model, most_tokens=40, most_logits=3)
    weights = [p for p in model.layers[0].parameters() if p.dim() == 2]
    assert seen == {(rows, id(w)) for w in weights for rows in product_rows(40)} | {
        (rows, id(model.lm_head.weight)) for rows in product_rows(3)
    }
