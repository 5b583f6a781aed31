"""The benchmarks of tools/gpu_check.py: which there are, the figures in what they print, their baseline, the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BASELINES = Path(__file__).resolve().parents[1] / "docs" / "baselines"
SCHEMA = 1
TOLERANCE = 0.03  # a smaller change is noise

Section = dict[str, Any]  # "status": "passed", "failed" or "not run"; "why": a line, empty if passed; and more
Figures = dict[str, dict[str, Any]]  # by name: {"value": number, "unit": text, "better": "higher" or "lower"}


class Benchmark(NamedTuple):
    """A program of this repository, with options, whose last line is one JSON object.

    figures: where that object holds a number worth comparing -> its unit, and which way is better. Keys are joined
    by dots; "*" is every key, and [a,b] every row of a list, told apart by its fields a and b. cards: the fewest it
    needs. quick: options that --quick adds; None leaves the benchmark out.
    """

    name: str
    command: str
    figures: Mapping[str, str]
    cards: int = 1
    quick: str | None = None


WORKLOAD = {
    "output_tokens_per_s": "tok/s higher",
    **{f"{kind}_ms.{percent}": "ms lower" for kind in ("ttft", "itl") for percent in ("p50", "p99")},
}
STARTUP_PARTS = ("weights", "compile", "capture", "spawn_to_ready")
STEPS = {
    "decode_steps[case].step_ms": "ms lower",
    "decode_steps[case].share_of_floor": "share higher",
    "prefill[case].tokens_per_s": "tok/s higher",
    "prefill[case].mfu": "share higher",
}
STARTUP = {f"{start}.{part}_s": "s lower" for start in ("cold", "warm") for part in STARTUP_PARTS}
FEW, SHORT = "--num-seqs 32 --max-output-len 128", "--cases 8x512 --repeats 2"
BENCHMARKS = (
    Benchmark("workload", "bench.py --shape 0.6b", WORKLOAD, quick=FEW),
    Benchmark(
        "workload-two-cards",
        "bench.py --shape 0.6b --two-gpus",
        {**WORKLOAD, "copies.gb_per_s": "GB/s higher"},
        cards=2,
        quick=FEW,
    ),
    Benchmark("steps", "bench.py --shape 0.6b --decode-steps --prefill", STEPS, quick=SHORT),
    Benchmark("steps-8b", "bench.py --shape 8b --decode-steps --prefill", STEPS, quick=SHORT),
    Benchmark(
        "attention",
        "tools/bench_attention.py",
        {"stream_tb_s": "TB/s higher", "decode.*.share": "share higher", "prefill_tflop_s.*.ours": "TFLOP/s higher"},
    ),
    Benchmark("fused", "tools/bench_fused.py", {"floor_us": "us lower", "rows[kernel,width,tokens].us": "us lower"}),
    Benchmark("sampler", "tools/bench_sampler.py", {"rows[logits,case,batch].us": "us lower"}),
    Benchmark(
        "skinny",
        "tools/bench_skinny.py",
        {"rows[width,rows,product].fused_us": "us lower", "layers[width,rows].pdl_us": "us lower"},
    ),
    Benchmark("startup", "tools/bench_startup.py --shape 8b", STARTUP, quick="--shape 0.6b"),
    Benchmark(
        "copies",
        "tools/bench_copies.py --shapes 8b --blocks 64",
        {"rows[way,load,blocks].gb_per_s": "GB/s higher"},
        cards=2,
    ),
)


# -- the figures of a report


def read_figures(wanted: Mapping[str, str], report: Any) -> Figures:
    """`KeyError`, `TypeError` or `AttributeError` where a path leads nowhere; a null is no figure."""
    figures = {}
    for path, kind in wanted.items():
        unit, better = kind.split()
        for name, value in follow(report, re.sub(r"\[", ".[", path).split(".")):
            if name in figures:
                raise KeyError(f"two figures are called {name}")
            if value is not None:
                figures[name] = {"value": value, "unit": unit, "better": better}
    return figures


def follow(node: Any, path: Sequence[str], names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(name, value) of all that `path` leads to from `node`."""
    if not path:
        yield "/".join(names), node
        return
    step = path[0]
    if step.startswith("["):
        children = [(" ".join(field_text(row, field) for field in step[1:-1].split(",")), row) for row in node]
    else:
        children = list(node.items()) if step == "*" else [(step, node[step])]
    for name, child in children:
        yield from follow(child, path[1:], (*names, name))


def field_text(row: Mapping[str, Any], field: str) -> str:
    return row[field] if isinstance(row[field], str) else f"{field}={row[field]}"


# -- the baseline


def baseline_path(results: Section) -> Path:
    """For example docs/baselines/nvidia-h200-1.json: the device, and how many of them."""
    slug = re.sub(r"[^a-z0-9]+", "-", results["machine"]["devices"][0].lower()).strip("-")
    return BASELINES / f"{slug}-{results['cards']}.json"


def read_baseline(path: Path) -> Section | None:
    """None without such a file. `ValueError` if it is no baseline of this schema (docs/baselines/README.md)."""
    if not path.is_file():
        return None
    baseline = json.loads(path.read_text())
    if baseline.get("schema") != SCHEMA or not isinstance(baseline.get("benchmarks"), dict):
        raise ValueError(f"{path} is no baseline of schema {SCHEMA}")
    return baseline


def updated_baseline(baseline: Section | None, results: Section) -> Section:
    """`baseline` with the benchmarks that passed in this run in place of its own. `ValueError` after --quick."""
    if results["quick"]:
        raise ValueError("--quick runs smaller workloads: they make no baseline")
    machine = results["machine"]
    source = {"date": results["date"], "commit": machine["commit"], "versions": machine["versions"]}
    passed = {name: each for name, each in results.get("bench", {}).items() if each["status"] == "passed"}
    new = {name: {**source, "command": each["command"], "figures": each["figures"]} for name, each in passed.items()}
    benchmarks = {**(baseline or {}).get("benchmarks", {}), **new}
    return {"schema": SCHEMA, "device": machine["devices"][0], "cards": results["cards"], "benchmarks": benchmarks}


def verdict(before: float | None, now: float | None, better: str) -> str:
    """\"better" or "worse" beyond the tolerance, "" within it, "new" or "gone" if only one of them is there."""
    if before is None or now is None:
        return "new" if before is None else "gone"
    if abs(now - before) <= TOLERANCE * abs(before):
        return ""
    return "better" if (now > before) == (better == "higher") else "worse"


def comparison_lines(before: Figures, now: Figures) -> Iterator[str]:
    """A line a figure, in today's order, then those that are gone."""
    yield f"  {'figure':56} {'unit':>8} {'baseline':>10} {'now':>10} {'ratio':>6}"
    for name, figure in {**now, **before}.items():
        old, new = (figures[name]["value"] if name in figures else None for figures in (before, now))
        texts = ["-" if number is None else f"{number:,.5g}" for number in (old, new)]
        ratio = f"{new / old:.3f}" if old and new is not None else "-"
        line = f"  {name:56} {figure['unit']:>8} {texts[0]:>10} {texts[1]:>10} {ratio:>6}"
        yield f"{line} {verdict(old, new, figure['better'])}".rstrip()


# -- the report


def report_lines(results: Section, baseline: Section | None, path: Path) -> Iterator[str]:
    machine, benches = results["machine"], results.get("bench", {})
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield f"\n{', '.join(machine['devices'])}; {versions}; commit {machine['commit']}; {results['date']}"
    for name, each in sections(results).items():
        count = f" ({each['passed']} tests passed)" if "passed" in each else ""
        yield f"{name:20} {each['status']}{count}" + (f": {each['why']}" if each["why"] else "")
        yield from skip_lines(each.get("skipped", ()))
    if benches and baseline is None:
        yield f"no baseline: {path} does not exist; --update-baseline writes it"
    if results["quick"]:
        yield "--quick runs smaller workloads: not compared with a baseline"
        return
    for name, each in benches.items():
        if each["status"] == "passed":
            old = (baseline or {}).get("benchmarks", {}).get(name)
            yield f"\n{name}, " + (f"baseline of {old['date']}, commit {old['commit']}" if old else "no baseline")
            yield from comparison_lines(old["figures"] if old else {}, each["figures"])


def skip_lines(skips: Sequence[Section]) -> Iterator[str]:
    """A line a reason, and an example."""
    for reason in dict.fromkeys(skip["reason"] for skip in skips):
        same = [skip for skip in skips if skip["reason"] == reason]
        excuse = "" if same[0]["expected"] else ", without an excuse"
        yield f"    {len(same)} skipped{excuse}: {reason} ({same[0]['test']}{', …' if len(same) > 1 else ''})"


def sections(results: Section) -> dict[str, Section]:
    """By name: tests and sanitizer, as far as they were run, and each benchmark."""
    return {name: results[name] for name in ("tests", "sanitizer") if name in results} | results.get("bench", {})


def exit_code(results: Section) -> int:
    if results.get("interrupted"):
        return 130
    return int(any(each["status"] == "failed" for each in sections(results).values()))
