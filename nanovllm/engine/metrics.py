"""Counters of the engine: what each card did and for how long, what the copies moved, how long callers waited."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import asdict, dataclass, field
from typing import Any

from nanovllm.engine.executor import Job
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, PrefillShard

FINISH_REASONS = ("stop", "length", "abort", "error")
ENDED_BY_THEMSELVES = ("stop", "length")
# "engine": its loop failed, and every caller that waited was told. "card": one was given up, the other goes on.
# "copy": one was given up, its prompts are prefilled again. "tokenizer", "logits": one request failed because of these.
ERROR_KINDS = ("engine", "card", "copy", "tokenizer", "logits")


class Histogram:
    """How often a duration fell between two bounds, each 2 % above the one before, from 1 µs to 100 s.

    8 kB of counts, which `stats()` copies; counting one takes 0.2 µs.
    """

    UPPER_MS = tuple(1e-3 * 1.02**i for i in range(933)) + (math.inf,)

    def __init__(self) -> None:
        self._counts = [0] * len(self.UPPER_MS)
        self._sum_ms = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self._counts[bisect_left(self.UPPER_MS, seconds * 1e3)] += count
        self._sum_ms += seconds * 1e3 * count

    def as_dict(self) -> dict[str, Any]:
        """`upper`: milliseconds, inclusive; `counts`: of each bound alone, since the start; `sum`: milliseconds."""
        return {"upper": list(self.UPPER_MS), "counts": list(self._counts), "sum": self._sum_ms}


@dataclass(slots=True)
class CardMetrics:
    """One card's steps. Seconds are device seconds, as the executor measured them. Mixed steps count as neither of the
    others, their tokens do, and once more by themselves. So do lent ones, which run beside decode steps; these are
    decode steps like others, and count once more in `beside_lent`.

    decode_gap_ms: from one step's end to the first kernel of the next, where a sequence decodes in both;
    decode_period_ms: from end to end of such steps. Steps of a GPU only.
    """

    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    mixed_steps: int = 0
    mixed_seconds: float = 0.0
    mixed_prefill_tokens: int = 0
    mixed_decode_tokens: int = 0
    lent_steps: int = 0
    lent_seconds: float = 0.0
    lent_tokens: int = 0
    beside_lent_steps: int = 0
    beside_lent_seconds: float = 0.0
    decode_gap_ms: Histogram = field(default_factory=Histogram)
    decode_period_ms: Histogram = field(default_factory=Histogram)

    def add_gap(self, job: Job, shard: DecodeShard) -> None:
        """Of a step with rows, unless all of them have just entered."""
        if job.idle_s is not None and len(shard.slots) > len(shard.entries):
            self.decode_gap_ms.add(job.idle_s)
            self.decode_period_ms.add(job.idle_s + job.seconds)

    def add_prefill(self, job: Job, shard: PrefillShard) -> None:
        self.prefill_tokens += shard.num_tokens
        if shard.lent:
            self.lent_steps += 1
            self.lent_seconds += job.seconds
            self.lent_tokens += shard.num_tokens
        else:
            self.prefill_steps += 1
            self.prefill_seconds += job.seconds

    def add_decode(self, job: Job, shard: DecodeShard, num_sampled: int) -> None:
        self.decode_steps += 1
        self.decode_seconds += job.seconds
        self.decode_tokens += num_sampled
        if shard.beside_lent:
            self.beside_lent_steps += 1
            self.beside_lent_seconds += job.seconds
        self.add_gap(job, shard)

    def add_mixed(self, job: Job, shard: MixedShard, num_sampled: int) -> None:
        # Where a prompt's first token lost its taker while the step ran, that many too few.
        num_decoded = max(0, num_sampled - shard.prefill.num_samples)
        self.mixed_steps += 1
        self.mixed_seconds += job.seconds
        self.prefill_tokens += shard.prefill.num_tokens
        self.mixed_prefill_tokens += shard.prefill.num_tokens
        self.decode_tokens += num_decoded
        self.mixed_decode_tokens += num_decoded
        self.add_gap(job, shard.decode)

    def as_dict(self, uptime: float) -> dict[str, Any]:
        busy = self.prefill_seconds + self.decode_seconds + self.mixed_seconds
        values = {name: getattr(self, name) for name in self.__slots__}
        values |= {name: value.as_dict() for name, value in values.items() if isinstance(value, Histogram)}
        return values | {"busy_share": busy / uptime if uptime else 0.0}


@dataclass(slots=True)
class CopyMetrics:
    """Copies of one direction, or of all. Seconds are those of the copies themselves."""

    copies: int = 0
    copied_blocks: int = 0
    copied_bytes: int = 0
    copy_seconds: float = 0.0

    def record(self, job: Job, num_blocks: int) -> None:
        self.copies += 1
        self.copied_blocks += num_blocks
        self.copied_bytes += job.num_bytes
        self.copy_seconds += job.seconds


@dataclass(slots=True)
class AnswerMetrics:
    """How long answers took. A request of n answers counts n times, as in vLLM.

    queue_ms: from arrival to admission; ttft_ms: from arrival to the first token; prefill_ms: from admission to the
    first token; decode_ms: from there to the last one; e2e_ms: from arrival to the last one; inter_token_ms: between
    two tokens. Of answers that ended by themselves, but for ttft_ms and inter_token_ms, which count as tokens come.
    `finished`: by reason.
    """

    queue_ms: Histogram = field(default_factory=Histogram)
    ttft_ms: Histogram = field(default_factory=Histogram)
    inter_token_ms: Histogram = field(default_factory=Histogram)
    prefill_ms: Histogram = field(default_factory=Histogram)
    decode_ms: Histogram = field(default_factory=Histogram)
    e2e_ms: Histogram = field(default_factory=Histogram)
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))

    def add_tokens(self, rows: Rows[Sequence], now_s: float) -> None:
        """Each row is about to get a token. Those of one step got their last one at one time: counted together."""
        if not rows:
            return
        times_s = [sequence.last_token_s for sequence in rows]
        first_s = times_s[0]  # nearly always everybody's: the same object
        together = times_s.count(first_s)
        others = [last_s for last_s in times_s if last_s is not first_s] if together < len(times_s) else []
        for last_s, count in ((first_s, together), *Counter(others).items()):
            if last_s is None:
                self._add_first_tokens(rows, now_s)
            else:
                self.inter_token_ms.add(now_s - last_s, count)

    def _add_first_tokens(self, rows: Rows[Sequence], now_s: float) -> None:
        for sequence in rows:
            if sequence.last_token_s is None:
                self.ttft_ms.add(now_s - sequence.request.timeline.arrived)

    def add_end(self, sequence: Sequence, reason: str) -> None:
        """It has just ended."""
        self.finished[reason] += 1
        if reason not in ENDED_BY_THEMSELVES:
            return
        timeline, times_s = sequence.request.timeline, sequence.token_times
        assert timeline.admitted is not None, "it sampled, and was never admitted"
        self.queue_ms.add(timeline.admitted - timeline.arrived)
        self.prefill_ms.add(times_s[0] - timeline.admitted)
        self.decode_ms.add(times_s[-1] - times_s[0])
        self.e2e_ms.add(times_s[-1] - timeline.arrived)

    def as_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__}
        histograms = {name: value.as_dict() for name, value in values.items() if isinstance(value, Histogram)}
        return histograms | {"finished": dict(self.finished)}


@dataclass(slots=True)
class EngineMetrics:
    """Written by the engine thread, read by anyone."""

    num_cards: int
    started: float = field(default_factory=time.perf_counter)
    cards: list[CardMetrics] = field(init=False)
    all_copies: CopyMetrics = field(default_factory=CopyMetrics)
    copies_by_route: dict[tuple[int, int], CopyMetrics] = field(default_factory=dict)
    requests: AnswerMetrics = field(default_factory=AnswerMetrics)
    errors: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ERROR_KINDS, 0))
    # Of prompts that changed cards, once each: from the last chunk to the last block, by the engine thread's clock.
    exposed_copy_ms: Histogram = field(default_factory=Histogram)
    sampled_tokens: int = 0
    loop_seconds: float = 0.0  # of the engine loop, over iterations in which something happened
    loop_cpu_seconds: float = 0.0  # of these, on a CPU: the others went to threads that held the interpreter
    launch_seconds: float = 0.0  # of the workers, until a shard was on its way to its card

    def __post_init__(self) -> None:
        self.cards = [CardMetrics() for _ in range(self.num_cards)]

    def record(self, job: Job, num_sampled: int) -> None:
        """Count a completed job; `num_sampled`: tokens of it that still had a taker."""
        self.sampled_tokens += num_sampled
        if getattr(job.handle, "event", None) is not None:  # else it ran inside its launch
            self.launch_seconds += job.end_s - job.begin_s
        shard = job.shard
        if isinstance(shard, CopyShard):
            self._record_copy(job, shard)
            return
        card = self.cards[shard.card]
        if isinstance(shard, PrefillShard):
            card.add_prefill(job, shard)
        elif isinstance(shard, MixedShard):
            card.add_mixed(job, shard, num_sampled)
        else:
            card.add_decode(job, shard, num_sampled)

    def _record_copy(self, job: Job, shard: CopyShard) -> None:
        route = self.copies_by_route.setdefault((shard.src, shard.dst), CopyMetrics())
        for metrics in (self.all_copies, route):
            metrics.record(job, len(shard.block_pairs))

    def as_dict(self) -> dict[str, Any]:
        uptime = time.perf_counter() - self.started
        per_card = {f"card{i}": card.as_dict(uptime) for i, card in enumerate(self.cards)}
        routes = {f"{src}to{dst}": asdict(copies) for (src, dst), copies in list(self.copies_by_route.items())}
        names = ("sampled_tokens", "loop_seconds", "loop_cpu_seconds", "launch_seconds")
        counters = {name: getattr(self, name) for name in names} | asdict(self.all_copies)
        counters |= {"exposed_copy_ms": self.exposed_copy_ms.as_dict(), "requests": self.requests.as_dict()}
        return counters | {"copies_by_route": routes, "errors": dict(self.errors)} | per_card
