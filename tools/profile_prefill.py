"""Where a prefill's time goes: its kernels in groups, and the time in which the card ran none. One card.

    python tools/profile_prefill.py --shape 8b --case 32x2048,1x2048
    python tools/profile_prefill.py --shape 0.6b --workload    # nano-vLLM's benchmark too: its steps, and between them

A case is one `LLM.generate` of new prompts with max_tokens 1, behind the same with other prompts; the workload is
bench.py's, not profiled. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from profile_decode import device_events, sums_us

from bench import SHAPES, make_workload, warm_up, write_shape
from bench_report import steps_of
from bench_steps import Case, make_prompts, seconds
from nanovllm import LLM

WORKLOAD = 256, 1024, 1024  # sequences, longest prompt, longest answer: bench.py's defaults
STEP_KINDS = "prefill", "mixed", "decode"


def profile_prefill(llm: LLM, case: Case) -> dict[str, Any]:
    """`generate_ms` is the caller's time under the profiler, `unprofiled_ms` another's without."""
    seconds(llm, make_prompts(llm, case, seed=0), 1)
    unprofiled_s = seconds(llm, make_prompts(llm, case, seed=1), 1)
    prompts = make_prompts(llm, case, seed=2)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        taken_s = seconds(llm, prompts, 1)
        torch.cuda.synchronize()
    return summarise(device_events(profiler), taken_s) | {"unprofiled_ms": round(unprofiled_s * 1e3, 3)}


def summarise(events: list[Any], taken_s: float) -> dict[str, Any]:
    """Milliseconds. `card_ms`: from the first kernel's start to the last one's end; `idle_ms`: of that, without any;
    `sum_ms`: of all groups, more than the rest where kernels overlap."""
    begin, end, busy_us = events[0].time_range.start, events[0].time_range.start, 0.0
    for event in events:
        busy_us += max(0.0, event.time_range.end - max(end, event.time_range.start))
        end = max(end, event.time_range.end)
    groups = sums_us(events)
    parts = {"card": end - begin, "idle": end - begin - busy_us, "sum": sum(groups.values())}
    return {
        "generate_ms": round(taken_s * 1e3, 3),
        **{f"{name}_ms": round(us / 1e3, 3) for name, us in parts.items()},
        "idle_share": round(parts["idle"] / parts["card"], 4),
        "launches": len(events),
        "groups_ms": {group: round(us / 1e3, 3) for group, us in groups.items()},
    }


def print_case(name: str, figures: dict[str, Any]) -> None:
    print(
        f"{name}: generate {figures['generate_ms']:.2f} ms, {figures['unprofiled_ms']:.2f} without the profiler; on "
        f"the card {figures['card_ms']:.2f}, idle {figures['idle_ms']:.2f} ({figures['idle_share']:.1%})"
    )
    for group, ms in [*figures["groups_ms"].items(), ("sum", figures["sum_ms"])]:
        print(f"  {ms:10.3f} ms {ms / figures['card_ms']:6.1%}  {group}", flush=True)


def run_workload(llm: LLM, sizes: tuple[int, int, int] = WORKLOAD) -> dict[str, Any]:
    """nano-vLLM's workload by the engine's own statistics. Shares are of the caller's seconds; `gap_share` is the time
    between steps of which one's rows decode in the next, and part of `idle_share`."""
    prompts, params = make_workload(*sizes, llm.model_config.vocab_size)
    warm_up(llm)
    before, started = llm.stats(), time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    taken_s = time.perf_counter() - started
    cards = before["card0"], llm.stats()["card0"]
    steps = steps_of(*cards, taken_s)
    gap_ms = cards[1]["decode_gap_ms"]["sum"] - cards[0]["decode_gap_ms"]["sum"]
    shares = {f"{kind}_share": steps[f"{kind}_seconds"] / taken_s for kind in STEP_KINDS}
    shares |= {"idle_share": 1 - sum(shares.values()), "gap_share": gap_ms / 1e3 / taken_s}
    rounded = {name: round(share, 4) for name, share in shares.items()}
    tokens_per_s = sum(each.max_tokens or 0 for each in params) / taken_s
    return {"seconds": round(taken_s, 3), "output_tokens_per_s": round(tokens_per_s, 1)} | rounded | {"steps": steps}


def print_workload(figures: dict[str, Any]) -> None:
    print(f"workload: {figures['seconds']:.2f} s, {figures['output_tokens_per_s']:,.0f} tok/s")
    for kind in STEP_KINDS:
        count = figures["steps"][f"{kind}_steps"]
        print(f"  {figures[f'{kind}_share']:6.1%}  {count} {kind} steps")
    print(f"  {figures['idle_share']:6.1%}  no step; {figures['gap_share']:.1%} from one to the next", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--case", default="32x2048,1x2048", help="one or more BATCHxTOKENS, with commas")
    parser.add_argument("--workload", action="store_true", help="also run bench.py's workload")
    args = parser.parse_args()
    cases = [Case.parse(name) for name in args.case.split(",")]
    found: dict[str, Any] = {"shape": args.shape, "cases": {}}
    with ExitStack() as stack:
        folder = write_shape(Path(stack.enter_context(tempfile.TemporaryDirectory())), args.shape)
        llm = stack.enter_context(LLM(str(folder), load_format="dummy"))
        if args.workload:  # ahead of the profiler, which stays in the process
            found["workload"] = run_workload(llm)
            print_workload(found["workload"])
        with profile(activities=[ProfilerActivity.CUDA]):
            seconds(llm, [[1] * 16], 1)  # the first profile of a process takes seconds to start
        for case in cases:
            name = f"{case.batch}x{case.tokens}"
            found["cases"][name] = profile_prefill(llm, case)
            print_case(f"{args.shape} {name}", found["cases"][name])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
