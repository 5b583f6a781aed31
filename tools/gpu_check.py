"""What a GPU box can check, in one command: tests, the memory checker on the kernels, benchmarks against a baseline.

    python tools/gpu_check.py --cards 1                         # what `make gpu` runs
    python tools/gpu_check.py --cards 2 --only tests,copies     # a part of it
    python tools/gpu_check.py --compare build/gpu/results.json --update-baseline    # runs nothing

Every step is a process with a time limit and a log of its own in --out, next to results.json. Exit status: 1 if a test
failed or was skipped, the checker found something, or a benchmark crashed; 2 for wrong usage; 130 if interrupted. Speed
is compared with docs/baselines, and never fails. What could not run says so: it has neither passed nor failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what lies beside the package

from tools import gpu_baseline
from tools.gpu_baseline import BENCHMARKS, Benchmark, Section

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = ROOT / "tools" / "sanitize_kernels.py"
SECTIONS = ("tests", "sanitizer", "bench")
PROBE_LIMIT_S, TESTS_LIMIT_S, SANITIZER_LIMIT_S, BENCH_LIMIT_S, STOP_LIMIT_S = 120.0, 1800.0, 300.0, 600.0, 10.0


# -- steps: processes with a limit and a log


class Outcome(NamedTuple):
    returncode: int | None  # None: stopped at its time limit
    seconds: float
    log: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def trouble(self) -> str:
        """Why it counts as failed, in a line; empty if it ended well."""
        if self.returncode == 0:
            return ""
        end = "stopped at its time limit" if self.returncode is None else f"exit status {self.returncode}"
        lines = self.text().strip().splitlines() or ["no output"]
        return f"{end} after {self.seconds:.0f} s: {lines[-1][:200]} ({self.log.name})"

    def report(self) -> dict[str, Any] | None:
        """The JSON object that is the last line, warnings behind it aside; None without one."""
        lines = [line for line in self.text().splitlines() if line.startswith("{")]
        with suppress(json.JSONDecodeError, IndexError):
            return json.loads(lines[-1])
        return None


class Runner(NamedTuple):
    """Runs Python programs one after the other from the checkout's root; their logs go to `folder`."""

    folder: Path
    environment: Mapping[str, str]

    def run(self, name: str, command: Sequence[str], limit_s: float, checker: Sequence[str] = ()) -> Outcome:
        """Run to the end or to `limit_s`. Neither then nor on an interruption is a process of the step left."""
        print(f"... {name}", flush=True)
        log, started = self.folder / f"{name}.log", time.monotonic()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*checker, sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own: all of it can be stopped, and Ctrl-C comes to us alone
            )
            try:
                returncode: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                returncode = None
            finally:
                stop_group(process)
        return Outcome(returncode, round(time.monotonic() - started, 1), log)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a step and all that it started: politely while it still runs; a second Ctrl-C ends it at once."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(STOP_LIMIT_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def section(why: str, **more: Any) -> Section:
    return {"status": "failed" if why else "passed", "why": why, **more}


# -- tests


def check_tests(runner: Runner, cards: int, folders: Sequence[str]) -> Section:
    """The quick tests of these folders in one process: GPU tests may fill a card."""
    junit = runner.folder / "tests.xml"
    junit.unlink(missing_ok=True)
    options = ["-p", "no:cacheprovider", "-m", "not slow", "-q", f"--junitxml={junit}"]
    outcome = runner.run("tests", ["-m", "pytest", *folders, *options], TESTS_LIMIT_S)
    if not junit.is_file():
        return section(outcome.trouble() or "pytest left no report", seconds=outcome.seconds)
    counts = read_junit(junit.read_text(), cards)
    skips = [skip["reason"] for skip in counts["skipped"] if not skip["expected"]]
    why = f"{len(counts['failed'])} failed: {', '.join(counts['failed'][:5])}" if counts["failed"] else ""
    why = why or outcome.trouble() or (f"{len(skips)} skipped: {skips[0]}" if skips else "")
    return section(why or ("" if counts["passed"] else "no test ran"), seconds=outcome.seconds, **counts)


def read_junit(text: str, cards: int) -> Section:
    """{"passed": count, "failed": names, "skipped": [{"test", "reason", "expected"}]}; errors count as failed."""
    passed, failed, skipped = 0, [], []
    for case in ElementTree.fromstring(text).iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif skip is None:
            passed += 1
        else:
            reason = skip.get("message", "")
            if reason == "collection skipped":  # a whole file: the reason is in the text
                reason = (skip.text or reason).rpartition("Skipped: ")[2].rstrip("')\"")
            skipped.append({"test": name, "reason": reason, "expected": is_expected_skip(reason, cards)})
    return {"passed": passed, "failed": failed, "skipped": skipped}


def is_expected_skip(reason: str, cards: int) -> bool:
    """With its GPUs there, a GPU test has no excuse but a second card that was not asked for, or what nobody needs."""
    needs_two = re.search(r"needs (two|2) (CUDA device|GPU)", reason) is not None
    return "flash_attn_interface" in reason or (needs_two and cards < 2)


# -- the memory checker


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer, on PATH or in the CUDA toolkit."""
    toolkits = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"))
    folders = [os.environ.get("PATH", ""), *(f"{toolkit}/bin" for toolkit in toolkits)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def sanitizer_commands(program: str) -> dict[str, list[str]]:
    """By tool. Padding: more than any block, so that one block too far meets no other allocation. API errors are left
    out: torch makes some on purpose, and a failed launch raises anyway."""
    common = [program, "--error-exitcode", "1", "--target-processes", "all", "--tool"]
    memcheck = [*common, "memcheck", "--padding", str(256 << 10), "--report-api-errors", "no"]
    return {"memcheck": memcheck, "racecheck": [*common, "racecheck"]}


def check_sanitizer(runner: Runner, program: str | None, tools: Sequence[str], script: Path = SANITIZED) -> Section:
    """`script` by itself, to compile; then with a planted error, which must be seen; then under each of `tools`."""
    if program is None:
        return {"status": "not run", "why": "compute-sanitizer was not found"}
    # Within a segment of torch's allocator every access is allowed: each tensor gets an allocation of its own.
    runner = runner._replace(environment={**runner.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    commands = sanitizer_commands(program)
    if why := runner.run("kernels", [str(script)], SANITIZER_LIMIT_S).trouble():
        return section(f"without a checker: {why}")
    planted = runner.run("planted", [str(script), "--plant"], SANITIZER_LIMIT_S, commands["memcheck"]).text()
    if "Device not supported" in planted:
        return {"status": "not run", "why": "compute-sanitizer does not support this device (planted.log)"}
    if "Invalid __global__ write" not in planted:
        return section("a planted write past the end of a tensor was not seen (planted.log)")
    outcomes = {tool: runner.run(tool, [str(script)], SANITIZER_LIMIT_S, commands[tool]) for tool in tools}
    whys = [f"{tool}: {why}" for tool, outcome in outcomes.items() if (why := sanitizer_trouble(outcome))]
    return section("; ".join(whys), seconds={tool: outcome.seconds for tool, outcome in outcomes.items()})


def sanitizer_trouble(outcome: Outcome) -> str:
    """Empty if the program came to its end under the checker, and the checker to a summary without errors."""
    if why := outcome.trouble():
        return why
    if outcome.report() is None:
        return f"the program did not come to its end ({outcome.log.name})"
    clean = re.search(r"SUMMARY: 0 (errors|hazards)", outcome.text())
    return "" if clean else f"no summary without errors ({outcome.log.name})"


# -- benchmarks


def check_benchmark(runner: Runner, benchmark: Benchmark, quick: bool = False) -> Section:
    """Run it; its figures. `failed` if it crashed or its JSON object lacks one of the table's."""
    if quick and benchmark.quick is None:
        return {"status": "not run", "why": "left out by --quick"}
    command = f"{benchmark.command} {benchmark.quick}" if quick else benchmark.command
    outcome = runner.run(benchmark.name, command.split(), BENCH_LIMIT_S)
    report = outcome.report()
    result = {"command": command, "seconds": outcome.seconds, "report": report}
    if why := outcome.trouble() or ("" if report else f"its last line is no JSON object ({outcome.log.name})"):
        return section(why, **result)
    try:
        return section("", figures=gpu_baseline.read_figures(benchmark.figures, report), **result)
    except (KeyError, TypeError, AttributeError) as error:
        return section(f"a figure is missing from its JSON object: {error!r}", **result)


# -- the command

PROBE = """
import json, shutil, subprocess, torch, triton, bench_report
query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if shutil.which(query[0]) else []
versions = {"triton": triton.__version__, "cuda": torch.version.cuda, "driver": driver[0] if driver else "unknown"}
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
commit, versions = bench_report.commit(), {**bench_report.versions(), **versions}
print(json.dumps({"devices": devices, "versions": versions, "commit": commit}))
"""


def check(args: argparse.Namespace) -> Section:
    """Run what was asked for; results.json is written even if a part was interrupted."""
    if lacking := [each.name for each in BENCHMARKS if each.name in args.only and each.cards > args.cards]:
        raise ValueError(f"--only {','.join(lacking)} needs --cards 2")
    folder = (args.out or ROOT / "build" / ("gpu" if args.cards == 1 else "gpu2")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(folder, child_environment(args.cards))
    probe = runner.run("machine", ["-c", PROBE], PROBE_LIMIT_S)
    if (machine := probe.report()) is None:
        raise ValueError(f"torch, triton and nanovllm must be importable: {probe.trouble()}")
    if len(machine["devices"]) < args.cards:
        raise ValueError(f"--cards {args.cards}, but {len(machine['devices'])} CUDA device(s) are visible")
    machine["commit"] = args.commit or machine["commit"]
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    results = {"schema": gpu_baseline.SCHEMA, "date": date, "cards": args.cards, "quick": args.quick}
    results["machine"] = machine
    try:
        run_sections(runner, args, results)
    except KeyboardInterrupt:
        results["interrupted"] = True
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def run_sections(runner: Runner, args: argparse.Namespace, results: Section) -> None:
    """Fills `results` part by part, so that an interruption keeps what was done."""
    wanted = set(args.only)
    if "tests" in wanted:
        results["tests"] = check_tests(runner, args.cards, ["tests/gpu", "tests/two_gpu"][: args.cards])
    if "sanitizer" in wanted:
        tools = ["memcheck", "racecheck"][: 1 + args.racecheck]
        results["sanitizer"] = check_sanitizer(runner, find_sanitizer(), tools)
    results["bench"] = {}
    for benchmark in BENCHMARKS:
        if benchmark.cards <= args.cards and {"bench", benchmark.name} & wanted:
            results["bench"][benchmark.name] = check_benchmark(runner, benchmark, args.quick)


def child_environment(cards: int) -> dict[str, str]:
    """Ours, with the first `cards` visible GPUs, this checkout importable, and logs written at once."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:cards]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ours = {"CUDA_VISIBLE_DEVICES": ",".join(visible), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **ours}


def part_names(text: str) -> list[str]:
    known = [*SECTIONS, *(benchmark.name for benchmark in BENCHMARKS)]
    if unknown := [name for name in text.split(",") if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
    return text.split(",")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, choices=(1, 2), default=1)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: build/gpu, or build/gpu2 with --cards 2")
    parts = f"{', '.join(SECTIONS)} (default: these), or single benchmarks by name"
    parser.add_argument("--only", type=part_names, default=list(SECTIONS), metavar="PART,...", help=parts)
    parser.add_argument("--quick", action="store_true", help="benchmarks: a smaller workload or none; not compared")
    parser.add_argument("--racecheck", action="store_true", help="also look for races in shared memory")
    parser.add_argument("--commit", help="recorded instead of what git says")
    parser.add_argument("--compare", type=Path, metavar="RESULTS", help="run nothing: compare an earlier results.json")
    parser.add_argument("--update-baseline", action="store_true", help="make this run the baseline of its benchmarks")
    return parser


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, interrupt)  # whoever ends us ends our steps too
    try:
        results = json.loads(args.compare.read_text()) if args.compare else check(args)
        path = gpu_baseline.baseline_path(results)
        baseline = gpu_baseline.read_baseline(path)
        print("\n".join(gpu_baseline.report_lines(results, baseline, path)))
        if args.update_baseline:
            path.write_text(json.dumps(gpu_baseline.updated_baseline(baseline, results), indent=1) + "\n")
            print(f"wrote {path}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    return gpu_baseline.exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
