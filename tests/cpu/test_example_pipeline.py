"""example_m2_pipeline.py, and the pipeline's flags of bench.py, where there are no SM partitions."""

from __future__ import annotations

import json

import pytest

import bench
import bench_decode_pipeline
import example_m2_pipeline as example
from nanovllm import DEMO_MODEL

CPU = ["--device", "cpu", "--max-tokens", "4", "--prompt", "import os\n"]
SMALL = ["--model", DEMO_MODEL, "--device", "cpu", "--num-seqs", "3", "--max-input-len", "30", "--max-output-len", "6"]
NO_PARTITIONS = "no SM partitions on cpu: that needs a CUDA device"


def test_without_gpus_it_falls_back_says_so_and_answers(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert example.main(CPU) == 0
    out = capsys.readouterr().out
    assert "=== 'import os\\n' → 4 tokens, length" in out
    assert "Mode running: sequential" in out and f"because: {NO_PARTITIONS}" in out and "Total tokens: 3" in out
    assert caplog.text.count("Failed to initialize Green Context") == 1


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--decode-pipeline", "static"], NO_PARTITIONS),
        (["--decode-pipeline", "static", "--disable-green"], "disable_green=True leaves nothing to"),
        (["--attention-sm", "0"], "decode_attention_sm=0 must be an integer from 1"),
        (["--decode-ffn-sm", "0"], "decode_ffn_sm=0 must be an integer from 1"),
    ],
)
def test_mistakes_end_in_one_line(flags: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        example.main([*CPU, *flags])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {error}")


def test_disabled_starts_no_pipeline(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert example.main([*CPU, "--decode-pipeline", "disabled"]) == 0
    assert "no decode pipeline was asked for" in capsys.readouterr().out and not caplog.records


# -- bench.py


def figures_of(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert bench.main([*SMALL, *flags]) == 0
    figures: dict = json.loads(capsys.readouterr().out.splitlines()[-1])
    return figures


def test_the_report_says_what_the_pipeline_did(capsys: pytest.CaptureFixture[str]) -> None:
    done = figures_of(capsys, "--two-gpus", "--decode-pipeline", "auto")["decode_pipeline"]
    assert (done["mode_running"], done["fallback_cause"]) == ("sequential", NO_PARTITIONS)
    assert {"avg_attention_time_ms", "avg_ffn_time_ms"} <= set(done) and done["total_tokens"] > 0
    assert "decode_pipeline" not in figures_of(capsys, "--two-gpus", "--decode-pipeline", "disabled")
    assert "decode_pipeline" not in figures_of(capsys)


def test_one_card_is_enough_for_steps(capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--decode-steps", "--cases", "2x9", "--repeats", "2", "--max-num-seqs", "2", "--decode-pipeline", "auto"]
    figures = figures_of(capsys, *steps)
    (row,) = figures["decode_steps"]
    assert figures["decode_pipeline"]["mode_running"] == row["mode_running"] == "sequential"
    assert row["ratio"] > 0 and row["sequential_ms"] > 0 and row["timed_exploration_steps"] == 0
    assert row["ways"]["sequential"] >= 2 * 64, "two repeats; those in turn without the pipeline are not counted"


def test_a_split_is_static(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main([*SMALL, "--two-gpus", "--pipeline-split", "44:88"])
    assert caught.value.code == 2 and NO_PARTITIONS in capsys.readouterr().err
    args = bench.make_parser().parse_args([*SMALL, "--pipeline-split", "44:88", "--decode-pipeline", "auto"])
    config = bench_decode_pipeline.pipeline_config(args)
    assert (config["decode_pipeline"], config["decode_attention_sm"], config["decode_ffn_sm"]) == ("auto", 44, 88)
    with pytest.raises(SystemExit):
        bench.make_parser().parse_args([*SMALL, "--pipeline-split", "44"])


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--decode-attention-sm", "44", "--pipeline-debug"], "--decode-attention-sm, --pipeline-debug would do"),
        (["--disable-green"], "--disable-green would do nothing without --enable-decode-pipeline"),
        (["--pipeline-split", "44:88", "--decode-ffn-sm", "80"], "--decode-ffn-sm would do nothing beside --pipeline-"),
    ],
)
def test_flags_without_effect_are_refused(flags: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main([*SMALL, *flags])
    assert caught.value.code == 2 and error in capsys.readouterr().err


def test_modes_of_one_card_have_no_pipeline_in_a_comparison() -> None:
    from bench_compare import Comparison

    options = {"enable_decode_pipeline": True, "decode_pipeline": "auto"}
    plan = Comparison("m", options, (0, 1), (), (512,), (), None)  # type: ignore[arg-type]
    assert [e["enable_decode_pipeline"] for e in plan.engines("two-replicas", 512)] == [False, False]
    assert plan.engines("pd", None)[0]["enable_decode_pipeline"]
