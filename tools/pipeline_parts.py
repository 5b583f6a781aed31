"""Where each millisecond of a pipelined decode step goes: its lanes alone, by SMs and micro-batches, and what is left.

    python tools/pipeline_parts.py --shape 8b --cases 512x512,1024x256 --splits 36:96        # one GPU

Each part is one CUDA graph; all run in turn on a card that has been busy for `--settle-s`: medians of `--repeats`
rounds of `--replays` replays. Of each lane, all layers: its floor by bytes and operations (`pipeline_roofline`); all
rows at once on the whole card, as sequentially; all rows on its partition; two micro-batches there, which read the
weights twice and are smaller products; two on the whole card; and the stages in the step, beside the other lane's.

A step is the slower lane alone, plus `ends`: what the order adds (a lane has nothing to do during the first stages or
the last ones), by a simulation with the lanes' mean stage times; plus the logits, on the whole card; plus `edges`: what
the simulation adds for the time from a stage's end to the begin of one in the other lane, which a step of empty stages
tells; plus `contention`, the rest: memory and power are shared. The last line is one JSON object. 8B: about 15 s for
the model and its kernels, then 12 s a case and split.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_pipeline import (
    DEVICE,
    Captured,
    Run,
    Setup,
    Way,
    capture,
    interleaved_ms,
    make_model,
    make_setup,
    make_ways,
    micro_batches,
    record_states,
    relative_rms,
    replay_for,
    run_alone,
    sequential_step,
    stages_and_lanes,
)

from bench import SHAPES
from bench_steps import Case
from nanovllm.engine.pipeline_graphs import StageTimer
from nanovllm.engine.pipeline_order import Lane, pipeline_order
from nanovllm.engine.pipeline_roofline import LayerWork, pipelined_layer_s, sequential_layer_s
from nanovllm.engine.pipeline_step import Lanes, MicroBatch, Stages, State, decode_step, run_stages
from nanovllm.layers.embedding import project_to_logits
from nanovllm.models.model_config import ModelConfig

LANES: tuple[Lane, Lane] = ("attention", "ffn")
MICRO_BATCHES = 2
MOST_DIFFERENCE = 0.3  # of the logits' RMS: what is above it computed something else


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        sys.exit("pipeline_parts.py divides a GPU's SMs: it needs a CUDA device, and torch sees none")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.shape}, bf16", flush=True)
    model, rows = make_model(args.shape), []
    _manager, ways = make_ways(args)  # the manager keeps the partitions
    for case in map(Case.parse, args.cases.split(",")):
        for way in ways:
            row: dict[str, Any] = {"case": f"{case.batch}x{case.tokens}", "split": way.name}
            try:
                row |= measure(make_setup(model, case), way, case, args)
                print_row(row)
            except (RuntimeError, ArithmeticError) as error:  # no memory, or wrong logits: the others still can
                row["error"] = f"{type(error).__name__}: {error}"[:300]
                print(row, flush=True)
            rows.append(row)
            gc.collect()
            torch.cuda.empty_cache()
    print(json.dumps({"shape": args.shape, "device": torch.cuda.get_device_name(), "cases": rows}), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--cases", default="512x512,1024x256", metavar="BATCHxCONTEXT,...")
    parser.add_argument("--splits", default="36:96", metavar="A:F,...", help="SMs of attention and FFN")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--replays", type=int, default=4)
    parser.add_argument("--settle-s", type=float, default=1.0)
    parser.set_defaults(boundaries="core", no_plain=True, no_limit=False)  # what `bench_pipeline` asks for
    return parser.parse_args()


# -- what is measured


def measure(setup: Setup, way: Way, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)), torch.inference_mode():
        stages, lanes = stages_and_lanes(setup, way, args)
        whole_card = stages_and_lanes(setup, Way("plain", None, way.boundary), args)
        halves = micro_batches(setup.batch, MICRO_BATCHES)
        timer = StageTimer(stages, lambda: torch.cuda.Event(enable_timing=True, external=True))
        pool = torch.cuda.graph_pool_handle()
        runs = make_runs(setup, halves, stages, lanes, whole_card)
        graphs = {name: capture(run, pool) for name, run in runs.items()}
        timed = capture(partial(timed_step, stages, lanes, halves, setup.logits_BV, timer), pool)
        check_logits(setup, graphs)
        replay_for(graphs["sequential"], args.settle_s)
        rounds = interleaved_ms(graphs, args.repeats, args.replays)
        ms = {name: statistics.median(values) for name, values in rounds.items()}
        ms |= stage_times_ms(graphs["pipelined"], timed, timer, args)
    floors = floors_ms(setup.model.config, case, way)
    return {"ms": rounded(ms), "floor_ms": rounded(floors), "step": rounded(parts_ms(ms, setup.model.config))}


def make_runs(
    setup: Setup, halves: list[MicroBatch], stages: Stages, lanes: Lanes, whole_card: tuple[Stages, Lanes]
) -> dict[str, Run]:
    """Each part's name, and how to queue it."""
    batch, model, num_layers = setup.batch, setup.model, stages.num_layers
    counters = {lane: torch.zeros(1, device=DEVICE) for lane in LANES}
    normed = torch.randn(len(batch.token_ids), model.config.hidden_size, device=DEVICE).to(model.dtype)

    def count(lane: Lane, layer: int, batch: MicroBatch, state: State) -> State:
        counters[lane].add_(1)
        return ()

    def chain() -> None:
        for _ in range(2 * num_layers + 2):  # as many as the longest path of empty stages has
            counters["ffn"].add_(1)

    runs: dict[str, Run] = {
        "sequential": partial(sequential_step, setup),
        "pipelined": partial(decode_step, stages, lanes, halves, setup.logits_BV),
        "logits": partial(project_to_logits, normed, model.lm_head.weight, setup.logits_BV),
        "empty stages": partial(run_stages, stages, lanes, halves, count),
        "empty chain": chain,
    }
    for place, where in (("partition", (stages, lanes)), ("card", whole_card)):
        for rows, batches in (("all", [batch]), ("halves", halves)):
            known = record_states(*where, batches)
            for lane in LANES:
                runs[f"{lane} {rows} {place}"] = partial(run_alone, lane, *where, batches, known)
    return runs


def timed_step(stages: Stages, lanes: Lanes, halves: list[MicroBatch], out: Tensor, timer: StageTimer) -> None:
    timer.clear()  # of the run ahead of the capture
    decode_step(stages, lanes, halves, out, timer.run)


def check_logits(setup: Setup, graphs: dict[str, Captured]) -> None:
    graphs["sequential"].replay()
    expected = setup.logits_BV.clone()
    setup.logits_BV.fill_(float("nan"))
    graphs["pipelined"].replay()
    if not (differs := relative_rms(setup.logits_BV, expected)) < MOST_DIFFERENCE:
        raise ArithmeticError(f"logits differ by {differs:.3f} of their RMS")


def stage_times_ms(step: Captured, timed: Captured, timer: StageTimer, args: argparse.Namespace) -> dict[str, float]:
    """Of all stages of each lane within a step; medians. Timing makes the step a little slower."""
    seconds = []
    for _ in range(args.repeats):
        for captured in (*[step] * args.replays, timed):
            captured.replay()
        torch.cuda.synchronize()
        seconds.append(timer.seconds())
    medians = {lane: statistics.median(getattr(s, lane) for s in seconds) for lane in (*LANES, "wall")}
    return {f"{name} in step": value * 1e3 for name, value in medians.items()}


# -- what it adds up to


def floors_ms(config: ModelConfig, case: Case, way: Way) -> dict[str, float]:
    """Of all layers, by bytes and operations, without the logits."""
    assert way.split is not None, "two plain streams have no SMs of their own"
    work, split = LayerWork.of(config, *case), way.split.granted
    only = {"attention": work._replace(weight_bytes=0.0, flops=0.0), "ffn": work._replace(kv_bytes=0.0)}
    floors = {f"{lane} all card": sequential_layer_s(only[lane]) for lane in LANES}
    floors |= {f"{lane} all partition": pipelined_layer_s(only[lane], split, 1) for lane in LANES}
    floors |= {f"{lane} halves partition": pipelined_layer_s(only[lane], split, MICRO_BATCHES) for lane in LANES}
    floors |= {"sequential": sequential_layer_s(work), "pipelined": pipelined_layer_s(work, split, MICRO_BATCHES)}
    return {name: seconds * config.num_hidden_layers * 1e3 for name, seconds in floors.items()}


def parts_ms(ms: dict[str, float], config: ModelConfig) -> dict[str, float]:
    """What a pipelined step is the sum of; and one `edge`, which is no part of it."""
    attention, ffn = (ms[f"{lane} halves partition"] for lane in LANES)
    edge = max(0.0, (ms["empty stages"] - ms["empty chain"]) / (2 * config.num_hidden_layers))
    ideal, delayed = (critical_path_ms(attention, ffn, delay, config) for delay in (0.0, edge))
    slower = max(attention, ffn)
    parts = {"slower lane": slower, "ends": ideal - slower, "logits": ms["logits"], "edges": delayed - ideal}
    return parts | {"contention": ms["pipelined"] - delayed - ms["logits"], "edge": edge}


def critical_path_ms(attention_ms: float, ffn_ms: float, edge_ms: float, config: ModelConfig) -> float:
    """From the first stage's begin to the last one's end, for lanes that take so long alone; `edge_ms`: from a stage's
    end to the begin of the one that waits for it. FFN's first stage of a micro-batch is QKV, its last one all else."""
    num_layers, heads = config.num_hidden_layers, config.q_size + 2 * config.kv_size
    first = heads * config.hidden_size / (LayerWork.of(config, 1, 0).flops / 2)
    shares: dict[tuple[Lane, int], float] = {("ffn", -1): first, ("ffn", num_layers - 1): 1 - first}
    stage_ms = {"attention": attention_ms / MICRO_BATCHES / num_layers, "ffn": ffn_ms / MICRO_BATCHES / num_layers}
    lane_end, batch_end = dict.fromkeys(LANES, 0.0), [0.0] * MICRO_BATCHES
    for lane, index, layer, after in pipeline_order(MICRO_BATCHES, num_layers, lead=True):
        begin = max(lane_end[lane], batch_end[index] + edge_ms if after else 0.0)
        lane_end[lane] = batch_end[index] = begin + stage_ms[lane] * shares.get((lane, layer), 1.0)
    return max(lane_end.values())


# -- the table


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


def print_row(row: dict[str, Any]) -> None:
    ms, floors, step = row["ms"], row["floor_ms"], row["step"]
    print(f"{row['case']} {row['split']}: sequential {ms['sequential']:.3f} ms, pipelined {ms['pipelined']:.3f}")
    print(f"  floors without logits: {floors['sequential']:.3f}, {floors['pipelined']:.3f}")
    print(f"  {'ms, all layers':<28} attention (floor)        FFN (floor)")
    for name in ("all card", "all partition", "halves partition", "halves card", "in step"):
        cells = [(ms[f"{lane} {name}"], floors.get(f"{lane} {name}")) for lane in LANES]
        texts = [f"{value:8.3f} ({'-' if floor is None else f'{floor:.3f}'})" for value, floor in cells]
        print(f"  {name:<28} {texts[0]:<24} {texts[1]}")
    print("  pipelined = " + " + ".join(f"{name} {value:.3f}" for name, value in step.items() if name != "edge"))
    print(f"  an edge: {step['edge'] * 1e3:.2f} us; timed step {ms['wall in step']:.3f} ms without logits", flush=True)


if __name__ == "__main__":
    main()
