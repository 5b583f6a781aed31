"""tools/gpu_check.py and tools/sanitize_kernels.py without a GPU: verdicts, comparisons, exit statuses, no strays.

The steps are tiny programs that behave like a benchmark, a checker or a test run. What the checker runs on a GPU is run
here by Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from nanovllm import DEMO_MODEL
from nanovllm.engine.cards import STARTUP_PARTS
from tools import gpu_baseline

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_check = load("gpu_check")
Program = Callable[[str], str]


@pytest.fixture
def runner(tmp_path: Path) -> Any:
    return gpu_check.Runner(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"})


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Writes a Python program and gives its path, which can be run by itself too."""

    def write(code: str) -> str:
        path = tmp_path / f"program{len(list(tmp_path.glob('program*')))}.py"
        path.write_text(f"#!{sys.executable}\nimport json, os, subprocess, sys, time\n{code}\n")
        path.chmod(0o755)
        return str(path)

    return write


# -- figures and their comparison


def figures(**values: float) -> dict[str, dict[str, Any]]:
    return {name: {"value": value, "unit": "ms", "better": "lower"} for name, value in values.items()}


@pytest.mark.parametrize(
    "before, now, better, expected",
    [
        (100.0, 104.0, "higher", "better"),
        (100.0, 96.0, "higher", "worse"),
        (100.0, 104.0, "lower", "worse"),
        (100.0, 96.0, "lower", "better"),
        (100.0, 103.0, "lower", ""),
        (100.0, 97.0, "higher", ""),
        (0.0, 0.0, "higher", ""),
        (None, 5.0, "higher", "new"),
        (5.0, None, "lower", "gone"),
    ],
)
def test_verdict(before: float | None, now: float | None, better: str, expected: str) -> None:
    assert gpu_baseline.verdict(before, now, better) == expected


def test_comparison_is_readable() -> None:
    before, now = figures(same=10.0, slow=2.0, gone=1.0, zero=0.0), figures(same=10.1, slow=3.0, zero=1.0, new=7.0)
    _, *lines = gpu_baseline.comparison_lines(before, now)
    assert [line.split() for line in lines] == [
        ["same", "ms", "10", "10.1", "1.010"],
        ["slow", "ms", "2", "3", "1.500", "worse"],
        ["zero", "ms", "0", "1", "-", "worse"],
        ["new", "ms", "-", "7", "-", "new"],
        ["gone", "ms", "1", "-", "-", "gone"],
    ]


def test_paths_lead_to_figures() -> None:
    report = {
        "itl_ms": {"p50": 7.5, "p99": None},
        "decode": {"64x1024 page 16": {"share": 0.8}, "256xU[100,2048]": {"share": 0.9}},
        "rows": [{"kernel": "silu", "tokens": 8, "us": 2.0}, {"kernel": "silu", "tokens": 64, "us": 3.0}],
    }
    wanted = {"itl_ms.p50": "ms lower", "itl_ms.p99": "ms lower", "decode.*.share": "share higher"}
    wanted["rows[kernel,tokens].us"] = "us lower"
    got = gpu_baseline.read_figures(wanted, report)
    assert {name: each["value"] for name, each in got.items()} == {
        "itl_ms/p50": 7.5,
        "decode/64x1024 page 16/share": 0.8,
        "decode/256xU[100,2048]/share": 0.9,
        "rows/silu tokens=8/us": 2.0,
        "rows/silu tokens=64/us": 3.0,
    }
    with pytest.raises(KeyError, match="two figures"):
        gpu_baseline.read_figures({"rows[kernel].us": "us lower"}, report)
    assert got["rows/silu tokens=8/us"] == {"value": 2.0, "unit": "us", "better": "lower"}


def test_the_table_is_sound() -> None:
    table = gpu_baseline.BENCHMARKS
    assert len({each.name for each in table} | set(gpu_check.SECTIONS)) == len(table) + len(gpu_check.SECTIONS)
    for each in table:
        assert (ROOT / each.command.split()[0]).is_file(), each.command
        assert each.cards in (1, 2) and each.figures
        assert {kind.split()[1] for kind in each.figures.values()} <= {"higher", "lower"}
    assert {f"{part}_s" for part in gpu_baseline.STARTUP_PARTS} <= {*STARTUP_PARTS, "spawn_to_ready_s"}


@pytest.mark.parametrize(
    "name, command",
    [
        (
            "workload-two-cards",
            f"bench.py --model {DEMO_MODEL} --device cpu --two-gpus --num-kvcache-blocks 40,30 "
            "--num-seqs 3 --max-input-len 70 --max-output-len 5",
        ),
        (
            "steps",
            f"bench.py --model {DEMO_MODEL} --device cpu --num-kvcache-blocks 20 --decode-steps --prefill --cases 2x40 "
            "--repeats 1 --read-tb-per-s 0.001 --tflops 0.01",
        ),
        ("copies", "tools/bench_copies.py --device cpu --shapes 8b --blocks 8"),
    ],
)
def test_real_benchmarks_hold_the_figures_of_the_table(runner: Any, name: str, command: str) -> None:
    (benchmark,) = [each for each in gpu_baseline.BENCHMARKS if each.name == name]
    result = gpu_check.check_benchmark(runner, benchmark._replace(command=command))
    assert (result["status"], result["why"]) == ("passed", "")
    assert len(result["figures"]) == {"workload-two-cards": 6, "steps": 4, "copies": 1}[name]
    assert all(each["value"] > 0 for each in result["figures"].values())


def names_of_figures(name: str, report: dict[str, Any]) -> list[str]:
    (benchmark,) = [each for each in gpu_baseline.BENCHMARKS if each.name == name]
    return list(gpu_baseline.read_figures(benchmark.figures, report))


def test_rows_of_the_sampler_benchmark_are_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measures is made up: it needs a GPU."""
    pytest.importorskip("triton")
    bench = load("bench_sampler")
    for name, value in {"new_steps": [MagicMock()], "num_different": 0, "time_graph": 2.0, "time_eager": 3.0}.items():
        monkeypatch.setattr(bench, name, lambda *_, value=value: value)
    rows = [bench.measure(None, "flat", case, batch) for case in ("greedy", "top_k=20") for batch in (1, 8)]
    got = names_of_figures("sampler", {"rows": rows})
    assert got == [f"rows/flat {case} batch={batch}/us" for case in ("greedy", "top_k=20") for batch in (1, 8)]


def test_rows_of_the_skinny_benchmark_are_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    bench = load("bench_skinny")
    for name, value in {
        "check": None,
        "time_us": 2.0,
        "choose_tiles": (),
        "own_layer": None,
        "cublas_layer": None,
    }.items():
        monkeypatch.setattr(bench, name, lambda *_, value=value: value)
    monkeypatch.setattr(bench.torch.cuda, "get_device_properties", MagicMock())
    cases = [bench.Case(product, 8, 16, MagicMock(), MagicMock(), MagicMock()) for product in ("qkv", "o")]
    rows = [bench.measure("8B", 4, case) for case in cases]
    stacks = dict.fromkeys(("qkv", "o", "gate_up", "down"), bench.torch.zeros(1, 8, 16))
    weights = SimpleNamespace(width=bench.WIDTHS["8B"], **stacks)
    layers = [bench.measure_layer("8B", weights, M) for M in (1, 8)]
    got = names_of_figures("skinny", {"rows": rows, "layers": layers})
    assert got[:2] == ["rows/8B rows=4 qkv/fused_us", "rows/8B rows=4 o/fused_us"]
    assert got[2:] == ["layers/8B rows=1/pdl_us", "layers/8B rows=8/pdl_us"]


# -- one step


def test_a_benchmark_fails_only_if_it_crashes_or_has_no_figures(runner: Any, program: Program) -> None:
    def status(code: str) -> tuple[str, str]:
        result = gpu_check.check_benchmark(runner, gpu_baseline.Benchmark("b", program(code), {"rate": "GB/s higher"}))
        return result["status"], result["why"]

    assert (
        status("print('table'); print(json.dumps({'rate': 3.0})); print('a warning', file=sys.stderr)")[0] == "passed"
    )
    state, why = status("print(json.dumps({'rate': 3.0})); raise MemoryError('of card 0')")
    assert state == "failed" and "exit status 1" in why and "MemoryError: of card 0" in why and "b.log" in why
    assert status("print('no object')") == ("failed", "its last line is no JSON object (b.log)")
    assert status("print('{broken')")[0] == "failed"
    assert "KeyError('rate')" in status("print(json.dumps({'speed': 3.0}))")[1]
    assert status("pass")[0] == "failed"


def test_quick_runs_other_options_or_nothing(runner: Any, program: Program) -> None:
    path = program("print(json.dumps({'options': len(sys.argv) - 1}))")
    benchmark = gpu_baseline.Benchmark("b", f"{path} --a", {"options": "1 lower"}, quick="--b 3")
    assert gpu_check.check_benchmark(runner, benchmark)["figures"]["options"]["value"] == 1
    assert gpu_check.check_benchmark(runner, benchmark, quick=True)["figures"]["options"]["value"] == 3
    assert gpu_check.check_benchmark(runner, benchmark._replace(quick=None), quick=True)["status"] == "not run"


STARTS_A_CHILD = """
child = subprocess.Popen(["sleep", "1000"])
print(json.dumps([os.getpid(), child.pid]), flush=True)
time.sleep({seconds})
"""


def wait_until(condition: Callable[[], Any]) -> Any:
    """What `condition` gives once that is true; the test's own time limit ends a wait in vain."""
    while not (value := condition()):
        time.sleep(0.02)
    return value


def is_gone(pid: int) -> bool:
    """No such process, or one that has ended and is not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("seconds, limit_s, returncode", [(1000, 1.0, None), (0, 60.0, 0)])
def test_no_process_is_left_of_a_step(
    runner: Any, program: Program, seconds: int, limit_s: float, returncode: int | None
) -> None:
    outcome = runner.run("step", [program(STARTS_A_CHILD.format(seconds=seconds))], limit_s)
    assert outcome.returncode == returncode
    assert ("time limit" in outcome.trouble()) == (returncode is None)
    for pid in json.loads(outcome.text().splitlines()[0]):
        wait_until(lambda pid=pid: is_gone(pid))


INTERRUPTED = """
import importlib.util, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("gpu_check", "tools/gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)
signal.signal(signal.SIGTERM, gpu_check.interrupt)
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    gpu_check.Runner(pathlib.Path(sys.argv[1]), {}).run("step", [sys.argv[2]], 1000)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_process(tmp_path: Path, program: Program, number: signal.Signals) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), program(STARTS_A_CHILD.format(seconds=1000))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "step.log"
    pids = json.loads(wait_until(lambda: log.is_file() and log.read_text().endswith("\n") and log.read_text()))
    process.send_signal(number)
    assert process.wait() == 130
    for pid in pids:
        wait_until(lambda pid=pid: is_gone(pid))


# -- tests


JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="tests.gpu.test_a" name="test_good"/>
<testcase classname="tests.gpu.test_a" name="test_bad[1]"><failure message="assert 1 == 2">…</failure></testcase>
<testcase classname="tests.gpu.test_a" name="test_setup"><error message="failed on setup">…</error></testcase>
<testcase classname="" name="tests.gpu.test_b"><skipped type="pytest.skip" message="needs a CUDA device"/></testcase>
<testcase classname="" name="tests.gpu.test_c"><skipped message="collection skipped">('/x.py', 12, 'Skipped: \
needs cuda-python')</skipped></testcase>
<testcase classname="tests.gpu.test_a" name="test_2"><skipped message="needs two CUDA devices"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("cards", [1, 2])
def test_junit_is_counted(cards: int) -> None:
    counts = gpu_check.read_junit(JUNIT, cards)
    assert counts["passed"] == 1
    assert counts["failed"] == ["tests.gpu.test_a::test_bad[1]", "tests.gpu.test_a::test_setup"]
    assert [(skip["reason"], skip["expected"]) for skip in counts["skipped"]] == [
        ("needs a CUDA device", False),
        ("needs cuda-python", False),
        ("needs two CUDA devices", cards == 1),
    ]
    lines = list(gpu_baseline.skip_lines(counts["skipped"] + counts["skipped"][:1]))
    assert lines[0] == "    2 skipped, without an excuse: needs a CUDA device (tests.gpu.test_b, …)"
    assert ("without" in lines[2]) == (cards == 2) and "needs two" in lines[2]


WHOLE_FILE = "import pytest; pytest.skip('no GPU', allow_module_level=True)"


@pytest.mark.parametrize(
    "code, status, why",
    [
        ("def test_a(): pass", "passed", ""),
        ("def test_a(): assert 0", "failed", "1 failed: test_it::test_a"),
        ("import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no reason')", "failed", "1 skipped: no reason"),
        ("import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('needs two GPUs')", "passed", ""),
        (WHOLE_FILE, "failed", "exit status 5"),
        ("import nothing_of_this_name", "failed", "1 failed"),
        ("", "failed", "exit status 5"),
    ],
)
def test_pytest_is_judged(runner: Any, tmp_path: Path, code: str, status: str, why: str) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (tmp_path / "test_it.py").write_text(code)
    result = gpu_check.check_tests(runner, 1, [str(tmp_path)])
    assert result["status"] == status and result["why"].startswith(why) and bool(result["why"]) == bool(why)


def test_a_file_that_skips_as_a_whole_is_seen(runner: Any, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_a(): pass")
    (tmp_path / "test_other.py").write_text(WHOLE_FILE)
    result = gpu_check.check_tests(runner, 1, [str(tmp_path)])
    assert (result["status"], result["why"], result["passed"]) == ("failed", "1 skipped: no GPU", 1)


# -- the memory checker

SCRIPT = "print('planted' if '--plant' in sys.argv else json.dumps({'kernels': []}))"
CHECKER = """
planted, tool = "--plant" in sys.argv, sys.argv[sys.argv.index("--tool") + 1]
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
{sees}
subprocess.run([word for word in sys.argv if word.endswith((".py", "--plant"))][1:], check=True)
print("========= ERROR SUMMARY: 0 errors" if tool == "memcheck" else "========= RACECHECK SUMMARY: 0 hazards displayed")
"""
SEES = "if planted: print('========= Invalid __global__ write of size 16 bytes'); sys.exit(1)"


@pytest.mark.parametrize(
    "sees, status, why",
    [
        (SEES, "passed", ""),
        ("", "failed", "a planted write"),
        ("print('Device not supported'); sys.exit(1)", "not run", "compute-sanitizer does not support"),
        (
            f"{SEES}\nif not planted: print('= ERROR SUMMARY: 2 errors'); sys.exit(1)",
            "failed",
            "memcheck: exit status 1",
        ),
        (f"{SEES}\nif not planted: print('= ERROR SUMMARY: 0 errors'); sys.exit(0)", "failed", "memcheck: the program"),
        (f"{SEES}\nif not planted: print('{{}}'); sys.exit(0)", "failed", "memcheck: no summary"),
        (f"{SEES}\nif tool == 'racecheck': sys.exit(3)", "failed", "racecheck: exit status 3"),
    ],
)
def test_the_checker_is_judged(runner: Any, program: Program, sees: str, status: str, why: str) -> None:
    checker, script = program(CHECKER.format(sees=sees)), Path(program(SCRIPT))
    result = gpu_check.check_sanitizer(runner, checker, ["memcheck", "racecheck"], script)
    assert result["status"] == status and result["why"].startswith(why) and bool(result["why"]) == bool(why)


def test_without_a_checker_nothing_has_passed(runner: Any, program: Program) -> None:
    assert gpu_check.check_sanitizer(runner, None, ["memcheck"])["status"] == "not run"
    crash = Path(program("sys.exit('wrong result')"))
    result = gpu_check.check_sanitizer(runner, program(CHECKER.format(sees=SEES)), ["memcheck"], crash)
    assert result["status"] == "failed" and "wrong result" in result["why"]


INTERPRETED = """
import json, sys
from triton.runtime.interpreter import InterpretedFunction
from tools import sanitize_kernels

called, call = set(), InterpretedFunction.__call__  # by a kernel; a launch is not a call

def note(self, *args, **kwargs):
    called.add(self.fn.__module__.rpartition(".")[2])
    return call(self, *args, **kwargs)

InterpretedFunction.__call__ = note
assert sanitize_kernels.GLUON <= set(sanitize_kernels.CASES), "they have cases too, for a card"
modules = [module for module in sys.argv[1:] if module not in sanitize_kernels.GLUON]
kernels = {module: sorted(sanitize_kernels.kernels_of(module)) for module in modules}
sys.argv[1:] = ["--device", "cpu"]
sanitize_kernels.main()
print(json.dumps({"kernels": kernels, "called": sorted(called), "gluon": sorted(sanitize_kernels.GLUON)}))
"""


def test_every_kernel_is_run_under_the_checker() -> None:
    """Every module with kernels is in the script's registry; all their kernels are launched, and are right. Modules of
    device functions have no case of their own: some launched kernel calls them."""
    pytest.importorskip("triton")
    modules = sorted(path.stem for path in (ROOT / "nanovllm" / "kernels").glob("*.py") if path.stem != "__init__")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, *modules],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    report, seen = map(json.loads, done.stdout.splitlines()[-2:])
    kernels = {module: names for module, names in seen["kernels"].items() if names}
    assert sorted(report["cases"]) == sorted(kernels), (
        "a module of kernels is not in CASES of tools/sanitize_kernels.py"
    )
    uncovered = set(modules) - set(kernels) - set(seen["called"]) - set(seen["gluon"])
    assert not uncovered, (
        f"device functions that no kernel called, or kernels that are not called …_kernel: {uncovered}"
    )
    assert report["kernels"] == sorted(name for names in kernels.values() for name in names)


# -- the whole


def make_results(**benchmarks: Any) -> dict[str, Any]:
    machine = {"devices": ["NVIDIA H200"], "versions": {"torch": "2"}, "commit": "abc"}
    tests = {"status": "passed", "why": "", "passed": 9, "failed": [], "skipped": []}
    whole = {"schema": 1, "date": "2026-01-01", "cards": 1, "quick": False, "machine": machine, "tests": tests}
    return whole | {"sanitizer": {"status": "not run", "why": "compute-sanitizer was not found"}, "bench": benchmarks}


def passed(**values: float) -> dict[str, Any]:
    return {"status": "passed", "why": "", "command": "bench.py", "figures": figures(**values)}


FAILED = {"status": "failed", "why": "exit status 1", "command": "bench.py"}


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`main` on these results, as another run left them: (exit status, what it printed)."""
    monkeypatch.setattr(gpu_baseline, "BASELINES", tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(results: dict[str, Any], *options: str) -> tuple[int, str]:
        path = tmp_path / "results.json"
        path.write_text(json.dumps(results))
        return gpu_check.main(["--compare", str(path), *options]), capsys.readouterr().out

    return run


def test_speed_never_fails_and_crashes_always_do(compare: Callable[..., Any], tmp_path: Path) -> None:
    code, text = compare(make_results(fused=passed(us=2.0)))
    assert code == 0 and "no baseline" in text and "nvidia-h200-1.json does not exist" in text and "not run" in text
    assert compare(make_results(fused=passed(us=2.0), copies=passed(us=1.0)), "--update-baseline")[0] == 0
    code, text = compare(make_results(fused=passed(us=200.0)))
    assert code == 0 and "100.000 worse" in text and "baseline of 2026-01-01, commit abc" in text
    code, text = compare(make_results(fused=FAILED), "--update-baseline")
    assert code == 1 and "exit status 1" in text
    kept = gpu_baseline.read_baseline(tmp_path / "nvidia-h200-1.json")["benchmarks"]
    assert {name: each["figures"]["us"]["value"] for name, each in kept.items()} == {"fused": 2.0, "copies": 1.0}
    assert compare(make_results() | {"interrupted": True})[0] == 130
    assert compare(make_results() | {"tests": {"status": "failed", "why": "1 failed: a"}})[0] == 1


def test_quick_makes_no_baseline_and_is_not_compared(compare: Callable[..., Any], tmp_path: Path) -> None:
    compare(make_results(fused=passed(us=2.0)), "--update-baseline")
    quick = make_results(fused=passed(us=9.0)) | {"quick": True}
    code, text = compare(quick)
    assert code == 0 and "not compared" in text and "worse" not in text
    with pytest.raises(SystemExit) as error:
        compare(quick, "--update-baseline")
    assert error.value.code == 2


def test_committed_baselines_are_sound(tmp_path: Path) -> None:
    names = {each.name for each in gpu_baseline.BENCHMARKS}
    for path in gpu_baseline.BASELINES.glob("*.json"):
        baseline = gpu_baseline.read_baseline(path)
        assert path.name.endswith(f"-{baseline['cards']}.json") and set(baseline["benchmarks"]) <= names
        for each in baseline["benchmarks"].values():
            assert set(each) == {"date", "commit", "versions", "command", "figures"}
            assert all(set(figure) == {"value", "unit", "better"} for figure in each["figures"].values())
    wrong = tmp_path / "x.json"
    wrong.write_text('{"schema": 2, "benchmarks": {}}')
    with pytest.raises(ValueError, match="no baseline of schema 1"):
        gpu_baseline.read_baseline(wrong)


@pytest.mark.parametrize("options", [["--only", "speed"], ["--cards", "3"], ["--only", "copies"]])
def test_wrong_usage(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_check.main([*options, "--out", str(tmp_path)])
    assert error.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_machine_without_the_cards_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", "--out", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and "--cards 1, but 0 CUDA device(s) are visible" in done.stderr
