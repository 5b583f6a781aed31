"""example_two_gpu.py: which cards it takes, what it prints, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import example_two_gpu as example

CPU = ["--device", "cpu", "--max-tokens", "4"]
INTERRUPTED = """
import os, runpy, signal, sys, threading
timer = threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGINT))
timer.daemon = True
timer.start()
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_cards_print_texts_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([*CPU, "--prompt", "import os\n", "--prompt", "def f("]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("===")] == [
        "=== 'import os\\n' → 4 tokens, length",
        "=== 'def f(' → 4 tokens, length",
    ]
    rows = {(row[0], row[2]): row for line in lines if (row := line.split())[1:2] in (["cpu:0"], ["cpu:1"])}
    assert set(rows) == {(card, work) for card in "01" for work in ("prefill", "decode")}
    tokens = {key: int(row[3]) for key, row in rows.items()}
    assert tokens["0", "prefill"] > 0 and tokens["1", "decode"] >= 2 * 3
    assert tokens["1", "prefill"] == tokens["0", "decode"] == 0
    assert lines[-1].startswith("copies between cards: 2 blocks, ")


def test_one_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main([*CPU, "--single", "--prompt", "x = "]) == 0
    out = capsys.readouterr().out
    assert "one card does both" in out and "cpu:1" not in out
    assert out.rstrip().endswith("copies between cards: 0 blocks, 0.00 MB")


@pytest.mark.parametrize(
    ("gpus", "arguments", "two_cards"),
    [
        (0, [], True),
        (1, [], False),
        (1, ["--decode-device", "1"], True),  # asked for by name: refused by the library, not ignored here
        (1, ["--device", "cpu"], True),
        (2, [], True),
        (2, ["--single"], False),
    ],
)
def test_cards(gpus: int, arguments: list[str], two_cards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    options = example.card_options(example.make_parser().parse_args(arguments))
    assert options.get("enable_two_gpu_pd", False) is two_cards


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bogus"],
        ["--max-tokens", "many"],
        ["--max-tokens", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--prompt", ""],
        ["--model", "/no/such/folder"],
        ["--decode-device", "0"],
        ["--single", "--decode-device", "1"],
        ["--device", "tpu"],
    ],
)
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        example.main([*CPU, *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_mistake_as_a_script(tmp_path: Path) -> None:
    done = run_script([example.__file__, "--max-tokens", "0"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: max_tokens must be in [1, 2147483647], got 0\n"


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
@pytest.mark.parametrize("seconds", [0.7, 5.0])  # while it imports, and while it generates
def test_interrupt_is_quiet(seconds: float, tmp_path: Path) -> None:
    endless = [example.__file__, "--device", "cpu", "--max-tokens", "4000"]
    done = run_script(["-c", INTERRUPTED, str(seconds), *endless], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


def run_script(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
