"""What the host does while prompts that arrive at once are served on two cards: threads, pauses, collections.

    python tools/profile_host.py --shape 0.6b --num-prompts 1000 --input-len 256 --output-len 128 --trace run.json

Prints, for each of `--repeats` loads, its seconds, the CPU seconds of each thread (Linux), how late a thread was at
most that wakes every 10 ms, and garbage collections of more than 5 ms. The last load is traced, if asked. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import SHAPES, write_shape
from bench_load import Load, LocalEngine, measure, warm_up_load
from bench_workloads import Rate, Workload
from nanovllm import DEMO_MODEL, LLM
from nanovllm.config import PD_ROLES

BEAT_S, LONG_COLLECTION_S = 0.01, 0.005


def cpu_seconds() -> dict[str, float]:
    """Of every thread so far, by its name in Python."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    seconds: dict[str, float] = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        name = names.get(int(task.name), "others")
        seconds[name] = seconds.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Fills in, until the block ends: `latest_beat_ms`, and `collections`: (generation, ms) of the long ones."""
    seen: dict[str, Any] = {"latest_beat_ms": 0.0, "collections": []}
    ended, begun_s = threading.Event(), [0.0]

    def beat() -> None:
        while not ended.is_set():
            due_s = time.perf_counter() + BEAT_S
            time.sleep(BEAT_S)
            seen["latest_beat_ms"] = max(seen["latest_beat_ms"], round((time.perf_counter() - due_s) * 1e3, 1))

    def note(phase: str, about: dict[str, int]) -> None:
        if phase == "start":
            begun_s[0] = time.perf_counter()
        elif (taken_s := time.perf_counter() - begun_s[0]) > LONG_COLLECTION_S:
            seen["collections"].append((about["generation"], round(taken_s * 1e3, 1)))

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    gc.callbacks.append(note)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        gc.callbacks.remove(note)


def run(llm: LLM, workload: Workload, seed: int) -> dict[str, Any]:
    """One load, everything at once."""
    before = cpu_seconds()
    with watched() as seen:
        figures = measure(LocalEngine(llm), Load(workload, seed=seed), Rate.parse("inf"), float("inf"))
    spent = {name: round(seconds - before.get(name, 0.0), 2) for name, seconds in cpu_seconds().items()}
    busy = {name: seconds for name, seconds in spent.items() if seconds >= 0.02}
    return {"seconds": figures["seconds"], "tokens_per_s": figures["output_tokens_per_s"], "cpu_s": busy} | seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="left out: the demo model")
    parser.add_argument("--num-prompts", type=int, default=1000)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--switch-interval-ms", type=float, help="of the interpreter; left out: as the engine sets it")
    parser.add_argument("--pd-roles", choices=PD_ROLES, default="elastic")
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()
    workload = Workload(num_prompts=args.num_prompts, input_len=args.input_len, output_len=args.output_len)
    options: dict[str, Any] = {"load_format": "dummy", "max_num_seqs": 512} if args.shape else {"max_num_seqs": 64}
    options["pd_roles"] = args.pd_roles
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_shape(Path(folder), args.shape)) if args.shape else DEMO_MODEL
        length = args.input_len + args.output_len
        with LLM(model, enable_two_gpu_pd=True, max_model_len=length, **options) as llm:
            warm_up_load(llm, args.input_len)
            if args.switch_interval_ms:
                sys.setswitchinterval(args.switch_interval_ms / 1e3)
            for number in range(args.repeats):
                last = args.trace and number == args.repeats - 1
                with llm.trace(str(args.trace)) if last else nullcontext():
                    rows.append(run(llm, workload, number))
                print(rows[-1], flush=True)
    print(json.dumps({"shape": args.shape, "loads": rows}))


if __name__ == "__main__":
    main()
