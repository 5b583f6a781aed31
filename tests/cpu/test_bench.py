"""bench.py: nano-vLLM's workload to the token, the published shapes, and figures without the warm-up."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import bench
import bench_report
import bench_steps
from nanovllm import DEMO_MODEL
from nanovllm.models.model_config import load_model_config

PARAMETERS = {  # of the published checkpoints, tied embeddings counted once
    "0.6b": 596_049_920,
    "1.7b": 1_720_574_976,
    "4b": 4_022_468_096,
    "8b": 8_190_735_360,
    "14b": 14_768_307_200,
    "32b": 32_762_123_264,
}
KEYS = {
    "model", "shape", "folded_token_ids", "parameters", "mode", "overlap", "seconds", "num_seqs", "prompt_tokens",
    "output_tokens", "output_tokens_per_s", "total_tokens_per_s", "ttft_ms", "itl_ms", "cards", "host", "copies",
    "evacuations", "attention_backend", "decode_graphs", "prefill_graphs", "copy_way",
    "dtype", "devices", "versions", "commit", "arguments",
}  # fmt: skip
SMALL = ["--model", DEMO_MODEL, "--device", "cpu", "--num-seqs", "5", "--max-input-len", "90", "--max-output-len", "9"]


def test_workload_is_nano_vllms() -> None:
    random.seed(0)
    expected = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    expected_lengths = [random.randint(100, 1024) for _ in range(256)]
    prompts, params = bench.make_workload(256, 1024, 1024, vocab_size=151936)
    assert prompts == expected
    assert [p.max_tokens for p in params] == expected_lengths
    assert sum(expected_lengths) == 133_966  # the total that nano-vLLM reports
    assert all(p.temperature == 0.6 and p.ignore_eos for p in params)


def test_smaller_vocabulary_changes_no_length() -> None:
    full, full_params = bench.make_workload(32, 200, 200, vocab_size=151936, seed=7)
    folded, folded_params = bench.make_workload(32, 200, 200, vocab_size=97, seed=7)
    assert [len(prompt) for prompt in folded] == [len(prompt) for prompt in full]
    assert folded_params == full_params
    assert {token for prompt in folded for token in prompt} == set(range(97))


@pytest.mark.parametrize("name", bench.SHAPES)
def test_shapes_are_the_published_models(name: str, tmp_path: Path) -> None:
    config = load_model_config(bench.write_shape(tmp_path, name))
    assert config.num_parameters() == PARAMETERS[name]
    assert (config.head_dim, config.vocab_size, config.rope_theta, config.rms_norm_eps) == (128, 151936, 1e6, 1e-6)
    assert (config.max_position_embeddings, config.dtype) == (40960, "bfloat16")
    assert config.eos_token_ids == (151645, 151643)


def test_two_cards_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*SMALL, "--two-gpus", "--num-kvcache-blocks", "40,30"]) == 0
    table, _, last = capsys.readouterr().out.strip().rpartition("\n")
    figures = json.loads(last)
    assert set(figures) == KEYS
    assert (figures["mode"], figures["overlap"], figures["num_seqs"]) == ("two cards", True, 5)
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (5 * 90, 5 * 9)
    prefill, decode = figures["cards"]
    assert (prefill["kv_blocks"], decode["kv_blocks"]) == (40, 30)
    assert prefill["prefill_tokens"] == 5 * 90, "the warm-up request is in the figures"
    assert (prefill["decode_tokens"], decode["prefill_tokens"]) == (0, 0)
    assert decode["decode_tokens"] >= 5 * 8  # the first tokens come from prefill
    assert 0 < decode["busy_share"] <= 1
    assert figures["copies"]["copied_blocks"] >= 5 * 2 and figures["copies"]["gb_per_s"] > 0
    assert 0 < figures["itl_ms"]["p50"] <= figures["itl_ms"]["p99"]
    assert figures["folded_token_ids"] and "folded" in table


def test_one_card_without_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*SMALL, "--no-overlap", "--no-warmup"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    assert (figures["mode"], figures["overlap"]) == ("one card", False)
    assert figures["cards"][0]["prefill_tokens"] == 5 * 90
    assert figures["copies"]["gb_per_s"] is None


def test_random_weights_from_a_shape(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "0.6b", bench.Shape(64, 2, 2, 1, 96, True))
    monkeypatch.setitem(bench.SHARED, "vocab_size", 151936 // 16)
    monkeypatch.setattr(bench, "write_shape", write_small_shape)
    assert bench.main(["--shape", "0.6b", *SMALL[2:]]) == 0
    figures = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    assert (figures["model"], figures["shape"], figures["output_tokens"]) == (None, "0.6b", 45)


def write_small_shape(folder: Path, name: str) -> Path:
    config = bench.SHARED | bench.SHAPES[name]._asdict() | {"eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--shape", "9b"],
        ["--shape", "8b", "--model", "x"],
        ["--model", "/no/such/folder"],
        [*SMALL, "--num-seqs", "0"],
        [*SMALL, "--num-kvcache-blocks", "3,x"],
        [*SMALL, "--num-kvcache-blocks", "30,30"],
        [*SMALL, "--max-model-len", "80"],
        [*SMALL, "--two-gpus", "--decode-device", "0"],
    ],
)
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(arguments)
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_runs_as_a_script_from_anywhere(tmp_path: Path) -> None:
    script = Path(bench.__file__).resolve()
    command = [sys.executable, str(script), *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.strip().rpartition("\n")[2])) == KEYS
    assert not list(tmp_path.iterdir())


def test_single_steps(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", DEMO_MODEL, "--device", "cpu", "--repeats", "1", "--cases", "2x20"]
    assert bench.main([*options, "--decode-steps", "--prefill"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    (decode,), (prefill,) = figures["decode_steps"], figures["prefill"]
    assert decode["case"] == prefill["case"] == "2x20" and prefill["tokens_per_s"] > 0
    assert decode["host"].keys() == {"loop_ms", "loop_cpu_ms", "launch_ms"}


def test_floors_of_a_decode_step() -> None:
    """8B at 64x1024: the table of the peers gives 5.6 ms at 4.45 TB/s."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_model_config(bench.write_shape(Path(folder), "8b"))
    row = bench_steps.decode_row(config, bench_steps.Case(64, 1024), [0.01], bench_steps.Ceiling(4.45, 797))
    assert 5.5 < row["floor_ms"] < 5.75 and row["share_of_floor"] == pytest.approx(row["floor_ms"] / 10, abs=1e-3)


@pytest.mark.parametrize("text", ["8", "x8", "8x", "0x8", "8x0", "axb", "8x8x8"])
def test_bad_cases(text: str) -> None:
    with pytest.raises(ValueError, match="BATCHxTOKENS"):
        bench_steps.Case.parse(text)


def test_percentiles_are_in_milliseconds() -> None:
    assert bench_report.percentiles_ms([i / 1e3 for i in range(101)]) == {"p50": 50.0, "p99": 99.0}
    assert bench_report.percentiles_ms([0.25]) == {"p50": 250.0, "p99": 250.0}
    assert bench_report.percentiles_ms([]) == {"p50": None, "p99": None}


def test_commit_names_the_checkout_and_its_changes(tmp_path: Path) -> None:
    assert bench_report.commit(tmp_path) == "unknown"
    author = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    bench_report.git(tmp_path, "init")
    assert bench_report.commit(tmp_path) == "unknown"  # no commit yet
    bench_report.git(tmp_path, *author, "commit", "--allow-empty", "-m", "first")
    head = bench_report.git(tmp_path, "rev-parse", "HEAD")
    assert len(head) == 40 and bench_report.commit(tmp_path) == head
    (tmp_path / "new").touch()
    assert bench_report.commit(tmp_path) == head + "+dirty"
