"""What a scheduling policy gives under load: the real plan over cards whose steps only take time, on a virtual clock.

    python tools/simulate_load.py --rates 29.4,37.8,inf --modes elastic,lending,strict,replica

Step times follow a cost model of Qwen3-8B on an H200 (`Cost`), fitted to measured steps; the host costs nothing. So
the figures compare policies and predict what a run may show; they are no measurement. Needs no GPU, and runs about as
fast as real time. Latencies in milliseconds.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import sys
from bisect import bisect_left
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.executor import Executor, Job
from nanovllm.engine.llm_engine import LLMEngine, OutputQueue
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Request
from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, PrefillShard, Shard, StepResult

GEMM_MS = ((0, 3.5), (64, 4.0), (128, 4.6), (256, 5.9), (512, 9.8), (1024, 18.5), (2048, 36.0), (16384, 288.0))
KV_BYTES_PER_TOKEN = 147_456
READ_BYTES_PER_MS, COPY_BYTES_PER_MS = 4.1e9, 3.3e8
LAUNCH_MS = 9.0  # of a step that is no graph
DECODE_SHARE, PROMPTS_SHARE = 0.577, 0.568  # of the whole card's rate, on 60 SMs beside 72 (docs/benchmarks.md)


ROLES: dict[str, dict[str, Any]] = {
    "elastic": {"pd_roles": "elastic"},
    "lending": {"pd_roles": "elastic", "lend_sms": (60, 72)},
    "strict": {"pd_roles": "strict"},
}


class Cost:
    """Milliseconds of a step: all products over all its rows, attention over what they see, the output matrix."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.lengths: dict[tuple[int, int], int] = {}  # by card and slot

    def ms(self, shard: Shard) -> float:
        if isinstance(shard, CopyShard):
            return 0.05 + len(shard.block_pairs) * self.block_size * KV_BYTES_PER_TOKEN / COPY_BYTES_PER_MS
        prefill = shard if isinstance(shard, PrefillShard) else getattr(shard, "prefill", None)
        decode = shard if isinstance(shard, DecodeShard) else getattr(shard, "decode", None)
        chunks = prefill.chunks if prefill else ()
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        rows = len(decode.slots) if decode else 0
        pairs = sum(len(chunk.tokens) * (chunk.start + len(chunk.tokens) / 2) for chunk in chunks)
        taken = interpolate(GEMM_MS, tokens + rows) + 4 * 36 * 4096 * pairs / 4e11 + tokens * 0.0025 + rows * 0.003
        if decode:
            taken += 1.1 + self._context_tokens(decode) * KV_BYTES_PER_TOKEN / READ_BYTES_PER_MS
        if decode and decode.beside_lent:
            return taken / DECODE_SHARE
        if prefill and prefill.lent:
            return taken / PROMPTS_SHARE
        return taken if decode and tokens <= 1024 + 8 else max(taken, LAUNCH_MS)

    def _context_tokens(self, shard: DecodeShard) -> int:
        for entry in shard.entries:
            self.lengths[shard.card, entry.slot] = entry.num_kv_tokens
        for slot in shard.slots:
            self.lengths[shard.card, slot] += 1
        return sum(self.lengths[shard.card, slot] for slot in shard.slots)


def interpolate(points: tuple[tuple[int, float], ...], x: float) -> float:
    i = min(max(1, bisect_left([p[0] for p in points], x)), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


class VirtualCards(Executor):
    """Queues of steps by card and of copies by direction; `advance` moves the clock to the next end."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost, self.now_ms = cost, 0.0
        self._free_at: dict[Any, float] = {}  # by queue: when what it holds has ended
        self._ends: list[tuple[float, int, Job]] = []
        self._step_ends: dict[tuple[int, int], float] = {}
        self._order = itertools.count()
        self.mixed_steps = self.lent_steps = self.steps = 0

    def launch(self, shard: Shard) -> None:
        self.num_in_flight += 1
        job, after = Job(shard), 0.0
        if isinstance(shard, CopyShard):
            queue: Any = (shard.src, shard.dst)
            after = self._step_ends.get((shard.src, shard.after_step), 0.0)
        else:
            lent = isinstance(shard, PrefillShard) and shard.lent
            queue = (shard.card, "lent") if lent else shard.card
            self.steps += 1
            self.lent_steps += lent
            self.mixed_steps += isinstance(shard, MixedShard)
            job.result = StepResult([7] * num_rows(shard))
        taken = self.cost.ms(shard)
        end = max(self.now_ms, self._free_at.get(queue, 0.0), after) + taken
        job.seconds = taken / 1e3
        self._free_at[queue] = end
        if not isinstance(shard, CopyShard):
            self._step_ends[shard.card, shard.step] = end
        heapq.heappush(self._ends, (end, next(self._order), job))

    @property
    def next_end_ms(self) -> float:
        return self._ends[0][0] if self._ends else float("inf")

    def advance(self, to_ms: float) -> None:
        self.now_ms = to_ms
        while self._ends and self._ends[0][0] <= to_ms:
            self._completed.append(heapq.heappop(self._ends)[2])


def num_rows(shard: Shard) -> int:
    if isinstance(shard, PrefillShard):
        return shard.num_samples
    if isinstance(shard, MixedShard):
        return shard.prefill.num_samples + len(shard.decode.slots)
    assert isinstance(shard, DecodeShard)
    return len(shard.slots)


class Load(NamedTuple):
    rate: float  # requests a second; infinite: all at once
    num_prompts: int
    input_tokens: int
    output_tokens: int


def simulate(config: Config, num_blocks: tuple[int, ...], load: Load, every: int = 1) -> dict[str, Any]:
    """Run one engine over a load; `every`: it takes each so-many-th request, as one of so many replicas would."""
    lends = config.lend_sms is not None
    rng = random.Random(0)
    cards = VirtualCards(Cost(config.kvcache_block_size))
    scheduler, queue = Scheduler(config, num_blocks, lends=lends), OutputQueue()
    engine = LLMEngine(config, scheduler, lambda wake: cards)
    params = SamplingParams(ignore_eos=True, max_tokens=load.output_tokens)
    arrivals, at = [], 0.0
    for number in range(load.num_prompts):
        at += rng.expovariate(load.rate) * 1e3 if load.rate != float("inf") else 0.0
        if number % every == 0:
            arrivals.append(at)
    requests: list[Request] = []
    times: dict[Request, list[float]] = {}
    waiting = list(reversed(arrivals))
    while waiting or engine.has_unfinished() or cards.num_in_flight:
        cards.advance(min(cards.next_end_ms, waiting[-1] if waiting else float("inf")))
        while waiting and waiting[-1] <= cards.now_ms:
            waiting.pop()
            tokens = [len(requests) + 1] * load.input_tokens
            request = Request(str(len(requests)), len(requests), None, tokens, params, max_tokens=load.output_tokens)
            requests.append(request)
            times[request] = []
            engine.submit(request, queue)
        while engine.step():
            for request in queue.take(0):
                seen = times[request]
                seen += [cards.now_ms] * (request.sequences[0].num_output_tokens - len(seen))
    return figures(arrivals, [times[request] for request in requests], scheduler, cards)


def figures(arrivals: list[float], times: list[list[float]], scheduler: Scheduler, cards: VirtualCards) -> dict:
    ttft = [seen[0] - arrived for arrived, seen in zip(arrivals, times, strict=True)]
    gaps = [b - a for seen in times for a, b in itertools.pairwise(seen)]
    tokens, seconds = sum(map(len, times)), (cards.now_ms - arrivals[0]) / 1e3
    counts = {name: scheduler.counts[name] for name in ("helped", "hand_offs", "evacuations", "pauses")}
    return {
        "out_tok_s": tokens / seconds,
        "ttft": cuts(ttft),
        "itl": cuts(gaps),
        "max_gap": max(gaps),
        "mixed": cards.mixed_steps / cards.steps,
        "lent": cards.lent_steps / cards.steps,
    } | counts


def cuts(samples: list[float]) -> tuple[float, float, float]:
    q = statistics.quantiles(samples, n=100)
    return q[49], q[89], q[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="29.4,37.8,inf")
    parser.add_argument("--modes", default="elastic,strict,replica")
    parser.add_argument("--num-prompts", type=int, default=600)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--budget", type=int, default=2048, help="of a step of a replica")
    parser.add_argument("--set", default="", help="more of the configuration: name=value,…")
    args = parser.parse_args()
    more = {name: eval_number(value) for name, value in (item.split("=") for item in args.set.split(",") if item)}
    print("mode      rate   tok/s  TTFT p50/p90/p99        ITL p50/p90/p99     max gap  mixed   lent")
    for rate, mode in itertools.product(args.rates.split(","), args.modes.split(",")):
        load = Load(float(rate), args.num_prompts, args.input_len, args.output_len)
        two = mode in ROLES
        options = {"enable_two_gpu_pd": two, "enable_prefix_caching": False} | more
        options |= ROLES[mode] if two else {"max_num_batched_tokens": args.budget}
        config = Config.from_kwargs("none", options)
        row = simulate(config, (11_000,) * (2 if two else 1), load, every=1 if two else 2)
        scale = 1 if two else 2
        print(
            f"{mode:8} {rate:>5} {scale * row['out_tok_s']:7.0f}  "
            + "  ".join("/".join(f"{x:6.1f}" for x in row[name]) for name in ("ttft", "itl"))
            + f" {row['max_gap']:8.1f} {row['mixed']:6.1%} {row['lent']:6.1%}  "
            + ", ".join(f"{name} {row[name]}" for name in ("helped", "hand_offs", "evacuations", "pauses")),
            flush=True,
        )


def eval_number(text: str) -> float:
    return float(text) if "." in text else int(text)


if __name__ == "__main__":
    main()
