"""The decode step in two lanes against the sequential one, each in one CUDA graph: splits of the card × boundaries.

    python tools/bench_pipeline.py --shape 8b --cases 512x512,1024x256        # one GPU, nanovllm on PYTHONPATH

A case is BATCHxCONTEXT, random weights and pages. `plain` has two streams without partitions. Milliseconds are medians
of `--repeats` rounds over all ways in turn, each the mean of `--replays` replays; ratios are sequential / way, from one
round each. `alone`: all stages of one lane with nothing beside them. `differs`: RMS of the logits' difference from the
sequential ones', by these. A way that fails is printed and left out. With `--hold-s` each way then runs for so long;
milliseconds, watts, MHz and joules a step are of the second half of that. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import SHAPES, write_shape
from bench_steps import Case
from nanovllm.engine.green_manager import GreenManager, Split
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.pipeline_order import Lane, pipeline_order
from nanovllm.engine.pipeline_step import (
    BOUNDARIES,
    Boundary,
    Lanes,
    MicroBatch,
    StageBackends,
    Stages,
    State,
    StreamLanes,
    decode_step,
    run_stages,
    split_rows,
)
from nanovllm.engine.pipeline_ways import EAGER_TOOLS, PARTITION_TOOLS, make_way
from nanovllm.layers.attention import DecodeMetadata, make_attention_backend
from nanovllm.models.loader import load_model
from nanovllm.models.model_config import load_model_config
from nanovllm.models.qwen3 import Qwen3ForCausalLM

PAGE_TOKENS = 64
DEVICE = torch.device("cuda", 0)
SPLITS = "28:104,36:96,44:88,52:80,60:72"
Run = Callable[[], object]


class Way(NamedTuple):
    """How to run a step. split: None for two streams without partitions."""

    name: str
    split: Split | None
    boundary: Boundary


class Captured(NamedTuple):
    """A graph, and what it was captured from: that holds the tensors it reads."""

    graph: torch.cuda.CUDAGraph
    run: Run

    def replay(self) -> None:
        self.graph.replay()


class Setup(NamedTuple):
    """A model and one case's inputs, for all rows."""

    model: Qwen3ForCausalLM
    kv_cache: KVCache
    batch: MicroBatch
    logits_BV: Tensor


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.no_pdl:
        switch_pdl_off()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.shape}, bf16", flush=True)
    started = time.perf_counter()
    model = make_model(args.shape)
    manager, ways = make_ways(args)
    print(f"model and splits: {time.perf_counter() - started:.1f} s", flush=True)
    rows = []
    for case in map(Case.parse, args.cases.split(",")):
        try:
            rows.append(measure_case(model, ways, case, args))
        except Exception:  # say so, and go on to the next case
            traceback.print_exc()
    print(json.dumps({"shape": args.shape, "device": torch.cuda.get_device_name(), "cases": rows}), flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--cases", default="512x512,1024x256", metavar="BATCHxCONTEXT,...")
    parser.add_argument("--splits", default=SPLITS, metavar="A:F,...", help="SMs of attention and FFN")
    parser.add_argument("--boundaries", default=",".join(BOUNDARIES))
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--hold-s", type=float, default=0, help="seconds of each way under nvidia-smi's eye")
    parser.add_argument("--no-plain", action="store_true", help="without the two plain streams")
    parser.add_argument("--no-alone", action="store_true", help="do not time the lanes by themselves")
    parser.add_argument("--no-limit", action="store_true", help="products as they come, also on a partition")
    parser.add_argument("--no-pdl", action="store_true", help="launch no kernel ahead of its predecessor's end")
    return parser


def switch_pdl_off() -> None:
    """In its own module, and in those that have taken its name already."""
    from nanovllm.kernels import launch

    launch.has_pdl = lambda device: False
    for module in [module for name, module in sys.modules.items() if name.startswith("nanovllm")]:
        if hasattr(module, "has_pdl"):
            module.has_pdl = launch.has_pdl  # type: ignore[attr-defined]


# -- what is measured


def make_model(shape: str) -> Qwen3ForCausalLM:
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(Path(folder), shape)
        config = load_model_config(path)
        backend = make_attention_backend("auto", config, DEVICE, torch.bfloat16)
        return load_model(path, config, backend, torch.bfloat16, DEVICE, 40960, load_format="dummy")


def make_ways(args: argparse.Namespace) -> tuple[GreenManager | None, list[Way]]:
    boundaries: list[Any] = args.boundaries.split(",")
    counts = [tuple(map(int, pair.split(":"))) for pair in args.splits.split(",") if pair]
    manager = GreenManager(DEVICE, *counts[0]) if counts else None
    splits = [manager.prepare(*pair) for pair in counts] if manager else []
    names = [f"{split.granted.attention_sms}:{split.granted.ffn_sms}" for split in splits]
    ways = [Way(name, split, boundary) for name, split in zip(names, splits, strict=True) for boundary in boundaries]
    plain = [] if args.no_plain else [Way("plain", None, boundary) for boundary in boundaries]
    return manager, ways + plain


def make_setup(model: Qwen3ForCausalLM, case: Case) -> Setup:
    """Rows of exactly the case's context, their blocks scattered over the pool."""
    rows, context = case
    columns = -(-context // PAGE_TOKENS)
    generator = torch.Generator(DEVICE).manual_seed(0)
    cache = KVCache(rows * columns, PAGE_TOKENS, model.config, torch.bfloat16, DEVICE)
    for part in cache.pages.split(64):  # in parts: the whole has more elements than an int32 counts
        part.normal_(generator=generator)
    tables = torch.randperm(rows * columns, device=DEVICE, generator=generator).int().view(rows, columns)
    last = context - 1
    mapping = tables[:, last // PAGE_TOKENS].long() * PAGE_TOKENS + last % PAGE_TOKENS
    lens = torch.full((rows,), context, dtype=torch.int32, device=DEVICE)
    metadata = DecodeMetadata(lens, tables, mapping, context, torch.arange(rows, dtype=torch.int32, device=DEVICE))
    ids = torch.randint(model.config.vocab_size, (rows,), device=DEVICE, generator=generator)
    batch = MicroBatch(ids, torch.full((rows,), last, dtype=torch.int64, device=DEVICE), metadata)
    logits_BV = torch.zeros(rows, model.config.vocab_size, dtype=torch.float32, device=DEVICE)
    torch.cuda.synchronize()
    return Setup(model, cache, batch, logits_BV)


def micro_batches(batch: MicroBatch, count: int) -> list[MicroBatch]:
    return [take_rows(batch, rows) for rows in split_rows(len(batch.token_ids), count)]


def take_rows(batch: MicroBatch, rows: slice) -> MicroBatch:
    """Contexts are equal, so that any order of rows is one by falling context."""
    meta = batch.metadata
    order = torch.arange(rows.stop - rows.start, dtype=torch.int32, device=DEVICE)
    tables = meta.block_tables[rows]
    part = DecodeMetadata(meta.context_lens[rows], tables, meta.slot_mapping[rows], meta.max_context_tokens, order)
    return MicroBatch(batch.token_ids[rows], batch.positions[rows], part)


def stages_and_lanes(setup: Setup, way: Way, args: argparse.Namespace) -> tuple[Stages, Lanes]:
    """As the engine makes them; of two plain streams, with the sequential step's kernels."""
    if way.split is None:
        backends = StageBackends(setup.model.attention, setup.model.attention)
        lanes = StreamLanes(torch.cuda.Stream(DEVICE), torch.cuda.Stream(DEVICE))
        return Stages(setup.model, setup.kv_cache, backends, way.boundary), lanes
    tools = PARTITION_TOOLS if not args.no_limit else EAGER_TOOLS
    card_sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    made = make_way(setup.model, setup.kv_cache, card_sms, way.split, way.boundary, tools)
    return made.stages, made.lanes


def sequential_step(setup: Setup) -> None:
    """As the engine's decode graphs queue it."""
    model, cache, (ids, positions, metadata) = setup.model, setup.kv_cache, setup.batch
    metadata = model.attention.planned(metadata, cache.layer_view(0)[0])
    model.forward_decode(ids, positions, cache, metadata, setup.logits_BV)


def pipelined(setup: Setup, way: Way, args: argparse.Namespace) -> dict[str, Run]:
    """The step of a way, and both lanes by themselves."""
    (stages, lanes), batches = stages_and_lanes(setup, way, args), micro_batches(setup.batch, args.micro_batches)
    runs: dict[str, Run] = {"step": lambda: decode_step(stages, lanes, batches, setup.logits_BV)}
    if not args.no_alone and way.split is not None:
        known = record_states(stages, lanes, batches)
        runs["attention"] = lambda: run_alone("attention", stages, lanes, batches, known)
        runs["ffn"] = lambda: run_alone("ffn", stages, lanes, batches, known)
    return runs


def record_states(stages: Stages, lanes: Lanes, batches: list[MicroBatch]) -> dict[tuple[str, int], State]:
    """What a stage of each lane and micro-batch is given, from the model's middle."""
    known: dict[tuple[str, int], State] = {}
    numbers = {id(batch): number for number, batch in enumerate(batches)}

    def run(lane: Lane, layer: int, batch: MicroBatch, state: State) -> State:
        if layer == stages.num_layers // 2:
            known[lane, numbers[id(batch)]] = tuple(tensor.clone() for tensor in state)
        return stages.run(lane, layer, batch, state)

    run_stages(stages, lanes, batches, run)
    torch.cuda.synchronize()
    return known


def run_alone(
    only: Lane, stages: Stages, lanes: Lanes, batches: list[MicroBatch], known: dict[tuple[str, int], State]
) -> None:
    """All stages of one lane, each with an input recorded before. Their results are nobody's."""
    lanes.fork()
    for lane, index, layer, after in pipeline_order(len(batches), stages.num_layers, stages.lead):
        if lane == only:
            with lanes.on(lane, None):
                stages.run(lane, layer, batches[index], known[lane, index] if after else ())
    lanes.join()


# -- measuring


def measure_case(model: Qwen3ForCausalLM, ways: list[Way], case: Case, args: argparse.Namespace) -> dict[str, Any]:
    setup, started = make_setup(model, case), time.perf_counter()
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream), torch.inference_mode():
        graphs = {"sequential": capture(partial(sequential_step, setup), pool)}
        graphs["sequential"].replay()
        expected = setup.logits_BV.clone()
        rows = {f"{way.name} {way.boundary}": try_way(setup, way, args, pool, graphs, expected) for way in ways}
        torch.cuda.synchronize()
        print(f"{case.batch}x{case.tokens}: captured in {time.perf_counter() - started:.1f} s", flush=True)
        times = interleaved_ms(graphs, args.repeats, args.replays)
        held = {
            name: hold(graphs[name], args.hold_s) for name in ["sequential", *rows] if name in graphs and args.hold_s
        }
    report = case_report(case, rows, times) | {"held": held}
    print_report(report)
    for name, figures in held.items():
        print(f"  held {name:20} " + "  ".join(f"{value:8.2f} {unit}" for unit, value in figures.items()), flush=True)
    return report


def try_way(
    setup: Setup, way: Way, args: argparse.Namespace, pool: Any, graphs: dict[str, Captured], expected: Tensor
) -> dict[str, Any]:
    """Capture a way's graphs into `graphs`; what there is to say of it beside its times."""
    name = f"{way.name} {way.boundary}"
    try:
        runs = pipelined(setup, way, args)
        before = torch.cuda.mem_get_info()[0]
        step = capture(runs.pop("step"), pool)
        setup.logits_BV.fill_(float("nan"))
        step.replay()
        differs = relative_rms(setup.logits_BV, expected)
        used = before - torch.cuda.mem_get_info()[0]
        if not differs < 0.3:
            raise ArithmeticError(f"logits differ by {differs:.3f} of their RMS")
        graphs[name] = step
        graphs.update({f"{name} {lane}": capture(run, pool) for lane, run in runs.items()})
        return {"differs": round(differs, 5), "graph_mb": round(used / 1e6, 1)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """In parts: float32 copies of all logits would take gigabytes. NaN counts as infinite."""
    pairs = zip(found.split(64), expected.split(64), strict=True)
    error = sum(float((x - y).square().sum()) for x, y in pairs)
    relative = (error / sum(float(y.square().sum()) for y in expected.split(64))) ** 0.5
    return relative if relative == relative else float("inf")


def capture(run: Run, pool: Any) -> Captured:
    """On the current stream, after one eager run, which compiles and warms each stream's workspaces."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        run()
    return Captured(graph, run)


def hold(captured: Captured, seconds: float) -> dict[str, float]:
    """Replay for so long; of the second half, the step, and what the card draws and how fast it is then."""
    query = ["nvidia-smi", "-i", "0", "--query-gpu=power.draw.instant,clocks.sm", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as file:
        sampler = subprocess.Popen([*query, "-lms", "20"], stdout=file)
        replay_for(captured, seconds / 2)
        offset = os.fstat(file.fileno()).st_size
        ms = replay_for(captured, seconds / 2)
        sampler.kill()
        sampler.wait()
        file.seek(offset)
        lines = [line.split(",") for line in file.read().splitlines()[1:-1]]  # the first and the last may be cut
    watts, mhz = (statistics.fmean(float(line[column]) for line in lines) for column in (0, 1))
    return {"ms": ms, "W": watts, "MHz": mhz, "J": watts * ms / 1e3}


def replay_for(captured: Captured, seconds: float) -> float:
    """Milliseconds of a replay."""
    started, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < seconds:
        captured.replay()
        torch.cuda.synchronize()
        count += 1
    return taken / count * 1e3


def interleaved_ms(graphs: dict[str, Captured], repeats: int, replays: int) -> dict[str, list[float]]:
    """Milliseconds of each graph, one value a round; a round has every graph in turn."""
    for graph in graphs.values():
        graph.replay()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            times[name].append(time_ms(graph, replays))
    return times


def time_ms(graph: Captured, replays: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays


# -- the table


def case_report(case: Case, rows: dict[str, dict[str, Any]], times: dict[str, list[float]]) -> dict[str, Any]:
    base = times["sequential"]
    report = [row | {"way": name} | way_times(name, times, base) for name, row in rows.items()]
    sequential = {"ms": round(statistics.median(base), 4), "spread_ms": [round(min(base), 4), round(max(base), 4)]}
    return {"case": f"{case.batch}x{case.tokens}", "sequential": sequential, "ways": report}


def way_times(name: str, times: dict[str, list[float]], base: list[float]) -> dict[str, Any]:
    if name not in times:
        return {}
    ratios = [one / other for one, other in zip(base, times[name], strict=True)]
    alone = {
        f"{lane}_alone_ms": round(statistics.median(times[f"{name} {lane}"]), 4)
        for lane in ("attention", "ffn")
        if f"{name} {lane}" in times
    }
    values = times[name]
    spread = [round(min(values), 4), round(max(values), 4)]
    ratio = {"ratio": round(statistics.median(ratios), 4), "ratios": [round(min(ratios), 4), round(max(ratios), 4)]}
    return {"ms": round(statistics.median(values), 4), "spread_ms": spread} | ratio | alone


def print_report(report: dict[str, Any]) -> None:
    base = report["sequential"]
    print(f"{report['case']}: sequential {base['ms']:.3f} ms, {base['spread_ms'][0]:.3f} to {base['spread_ms'][1]:.3f}")
    for row in report["ways"]:
        if "ms" not in row:
            print(f"  {row['way']:<22} {row['error'][:120]}", flush=True)
            continue
        alone = " ".join(f"{row[key]:8.3f}" for key in ("attention_alone_ms", "ffn_alone_ms") if key in row)
        print(
            f"  {row['way']:<22} {row['ms']:8.3f} ms  {row['ratio']:6.3f}x  ({row['ratios'][0]:.3f} to "
            f"{row['ratios'][1]:.3f})  alone A, F: {alone or '-':>17}  differs {row['differs']:.4f}  "
            f"{row['graph_mb']:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
