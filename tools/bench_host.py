"""The host's share of a decode step: one iteration of the engine loop over a card that answers at once.

    python tools/bench_host.py --rows 512

Needs no GPU. Milliseconds, median and 90th percentile of 100 iterations; each collects a step and launches the next.
With `--idle-ms` the loop sleeps before each iteration, as it does while a card computes: its core is then slower.
`metrics_us`: of an iteration, what counting the step and its tokens for `stats()` takes. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.executor import Executor, Job
from nanovllm.engine.llm_engine import LLMEngine, OutputQueue
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Request
from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, Shard, StepResult

ITERATIONS, SETTLED, PROMPT_TOKENS, MAX_TOKENS = 100, 20, 512, 400


class InstantCard(Executor):
    """Every step has ended when it is launched."""

    def launch(self, shard: Shard) -> None:
        self.num_in_flight += 1
        self.last = job = Job(shard)
        if isinstance(shard, MixedShard):
            job.result = StepResult([7] * (shard.prefill.num_samples + len(shard.decode.slots)))
        elif not isinstance(shard, CopyShard):
            job.result = StepResult([7] * (len(shard.slots) if isinstance(shard, DecodeShard) else shard.num_samples))
        self._completed.append(job)


def measure(rows: int, idle_s: float = 0.0) -> tuple[list[float], float]:
    """With `rows` sequences decoding: seconds of each iteration, and the mean seconds of its counting."""
    config = Config.from_kwargs("none", {"max_num_seqs": rows})
    blocks = rows * ((PROMPT_TOKENS + MAX_TOKENS) // config.kvcache_block_size + 2)
    scheduler, queue = Scheduler(config, (blocks,)), OutputQueue()
    card = InstantCard()
    engine = LLMEngine(config, scheduler, lambda wake: card)
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=MAX_TOKENS)
    for number in range(rows):
        request = Request(str(number), number, None, [1] * PROMPT_TOKENS, params, max_tokens=MAX_TOKENS)
        engine.submit(request, queue)
    while len(scheduler.main_batch.running) < rows:
        engine.step()
    taken = []
    for _ in range(SETTLED + ITERATIONS):
        time.sleep(idle_s)
        started = time.perf_counter()
        engine.step()
        taken.append(time.perf_counter() - started)
        queue.take(0)
    return taken[SETTLED:], counting_seconds(engine, card.last)


def counting_seconds(engine: LLMEngine, step: Job) -> float:
    """Of one decode step, counted again and again as the loop does."""
    metrics, rows = engine.metrics, list(engine.scheduler.main_batch.running)
    now_s = started = time.perf_counter()
    for _ in range(ITERATIONS):
        metrics.record(step, len(rows))
        metrics.requests.add_tokens(rows, now_s)
    return (time.perf_counter() - started) / ITERATIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--idle-ms", type=float, default=0.0, help="slept before each iteration")
    args = parser.parse_args()
    taken, counting_s = measure(args.rows, args.idle_ms / 1e3)
    figures = {
        "rows": args.rows,
        "idle_ms": args.idle_ms,
        "median_ms": statistics.median(taken) * 1e3,
        "p90_ms": statistics.quantiles(taken, n=10)[8] * 1e3,
        "metrics_us": counting_s * 1e6,
    }
    case = f"{args.rows} rows, idle {args.idle_ms:g} ms"
    print(f"{case}: {figures['median_ms']:.3f} ms, 90th percentile {figures['p90_ms']:.3f} ms", end="; ")
    print(f"counting {figures['metrics_us']:.1f} us")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
