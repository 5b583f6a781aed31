"""Where a decode step's time goes: the kernels of one step, by name and in groups, and the time without any.

    python tools/profile_decode.py --shape 8b --case 64x1024

Profiles `LLM.generate` on a steady batch. The profiler makes gaps a little longer than they are without it. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import SHAPES, write_shape
from bench_steps import Case, make_prompts
from nanovllm import LLM, SamplingParams

STEPS = 24
SETTLED_STEPS = 8  # before the profile starts, with every row decoding
OTHERS = "copies and others"
GROUPS = {  # of kernels, by the first pattern in a name
    "attention": "_prefill_(kernel|tma)|_(decode|combine|plan|planned|ring|join)_kernel|flash|fmha",
    "head norms and store": "_qk_norm_rope_store|_store_kv",
    "norms": "_add_rms_norm",
    "SiLU": "_silu_mul",
    "draw": "_(race|finish|slice|row|check|settle|penalise|count)_kernel",
    "products": "(?i)nvjet|gemm|gemv|xmma|cutlass|cublas|splitk|_split_kernel|_skinny_kernel",
}


def profile_steps(llm: LLM, case: Case) -> list[Any]:
    """Kernel events of about STEPS decode steps of the whole batch."""
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=llm.max_model_len - case.tokens)
    ids = [llm.add_request(prompt, params) for prompt in make_prompts(llm, case, seed=1)]
    run_steps(llm, 0)
    while llm.stats()["decoding"] < case.batch:
        run_steps(llm, 1)
    with profile(activities=[ProfilerActivity.CUDA]):
        run_steps(llm, SETTLED_STEPS)  # the first profile of a process takes seconds to start
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_steps(llm, STEPS)
        torch.cuda.synchronize()
    for request_id in ids:
        llm.abort(request_id)
    while llm.has_unfinished():
        llm.step()
    return device_events(profiler)


def device_events(profiler: profile) -> list[Any]:
    """Kernels and copies, in the order in which they started."""
    events = [event for event in profiler.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(events, key=lambda event: event.time_range.start)


def run_steps(llm: LLM, count: int) -> None:
    """Wait until `count` more decode steps have ended."""
    card = "card1" if "card1" in llm.stats() else "card0"
    goal = llm.stats()[card]["decode_steps"] + count
    while llm.stats()[card]["decode_steps"] < goal:
        if not llm.step():
            raise RuntimeError("the batch ended before the profile did")


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), OTHERS)


def groups_of(events: list[Any]) -> list[str]:
    """The group of each kernel, in the order in which they started. What was multiplied just ahead of a draw are its
    "logits"."""
    groups = [group_of(event.name) for event in events]
    for draw in (i for i, group in enumerate(groups) if group == "draw"):
        before = draw - 1
        while before >= 0 and groups[before] in ("products", "logits", OTHERS):
            groups[before] = "logits" if groups[before] != OTHERS else OTHERS
            before -= 1
    return groups


def sums_us(events: list[Any]) -> dict[str, float]:
    """Microseconds of each group, the largest first; of kernels in the order in which they started."""
    sums: dict[str, float] = defaultdict(float)
    for group, event in zip(groups_of(events), events, strict=True):
        sums[group] += event.time_range.elapsed_us()
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def summarise(events: list[Any]) -> dict[str, Any]:
    """Means a step, in microseconds. A step is what lies between two launches of a kernel that runs once a step."""
    counts = Counter(event.name for event in events)
    once = min(counts, key=lambda name: abs(counts[name] - STEPS))
    starts = [i for i, event in enumerate(events) if event.name == once]
    kept = events[starts[0] : starts[-1]]
    steps = len(starts) - 1
    busy: dict[str, list[float]] = defaultdict(list)
    for event in kept:
        busy[event.name].append(event.time_range.elapsed_us())
    total = events[starts[-1]].time_range.start - kept[0].time_range.start
    rows = sorted(((sum(v) / steps, len(v) / steps, name) for name, v in busy.items()), reverse=True)
    return {
        "steps": steps,
        "step_us": total / steps,
        "idle_us": (total - sum(map(sum, busy.values()))) / steps,
        "groups_us": {group: round(us / steps, 2) for group, us in sums_us(kept).items()},
        "kernels": [{"name": name[:90], "us": round(us, 2), "launches": round(n, 2)} for us, n, name in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--case", default="256x1024", help="one or more BATCHxTOKENS, with commas")
    args = parser.parse_args()
    found = {}
    with ExitStack() as stack:
        folder = write_shape(Path(stack.enter_context(tempfile.TemporaryDirectory())), args.shape)
        llm = stack.enter_context(LLM(str(folder), load_format="dummy"))
        for case in args.case.split(","):
            found[case] = summarise(profile_steps(llm, Case.parse(case)))
            print(f"{args.shape} {case}: {found[case]['step_us']:.1f} us a step, idle {found[case]['idle_us']:.1f}")
            print("  " + ", ".join(f"{group} {us:.1f}" for group, us in found[case]["groups_us"].items()))
            for row in found[case]["kernels"][:25]:
                print(f"  {row['us']:9.2f} us {row['launches']:7.2f} x {row['name']}")
    print(json.dumps({"shape": args.shape, "cases": found}))


if __name__ == "__main__":
    main()
