"""What every card did and when, on the host's clock: JSON that ui.perfetto.dev and chrome://tracing open.

Format: Google's "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
A process per card with a lane each for prefill, decode, steps that are both, and the copies that leave it, and for both
stages of a pipelined decode step that was timed; one for the host with the engine loop; and an arrow from each prompt's
last chunk through its last copy to its first decode step.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nanovllm.engine.request_states import State
from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, PrefillShard, Shard
from nanovllm.shown import shortened, shown

if TYPE_CHECKING:
    from nanovllm.engine.executor import Job
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.sequence import Sequence as PlannedSequence

MAX_SPANS = 1_000_000  # what follows is dropped and counted: a forgotten trace must not eat the host's memory
HOST = -1  # where a card's number stands
STAGE_LANES = ("attention", "ffn")
LANES = ("scheduler", "prefill", "decode", "mixed", "copy", *STAGE_LANES)
JUST_PREFILLED = frozenset({State.COPYING, State.READY})  # of a sequence whose last chunk has just completed
CALIBRATIONS = 5
REBASE_S = 1.0


class DeviceClock:
    """Timing events of one card on the clock of `time.perf_counter()`, set side by side when this is made.

    Right to some 20 µs then; the two clocks may drift apart by some parts in a million.
    """

    def __init__(self, device: torch.device) -> None:
        stream = torch.cuda.Stream(device)
        readings = [_read_clocks(stream) for _ in range(CALIBRATIONS)]
        _, self._base_s, self._base = min(readings, key=lambda reading: reading[0])

    def span_s(self, start: torch.cuda.Event, end: torch.cuda.Event) -> tuple[float, float]:
        """Begin and end, in seconds, between two events that have completed."""
        begin_s = self._base_s + self._base.elapsed_time(start) / 1e3
        if begin_s - self._base_s > REBASE_S:  # CUDA tells the difference in float32: keep it small
            self._base_s, self._base = begin_s, start
        return begin_s, begin_s + start.elapsed_time(end) / 1e3


def _read_clocks(stream: torch.cuda.Stream) -> tuple[float, float, torch.cuda.Event]:
    """(seconds it took, host time, event) of one look at both clocks."""
    event = torch.cuda.Event(enable_timing=True)
    before = time.perf_counter()
    event.record(stream)
    event.synchronize()
    after = time.perf_counter()
    return after - before, after, event


class Span(NamedTuple):
    """Something that took its time: `lane` of LANES, on `card` or the HOST."""

    lane: str
    card: int
    begin_s: float
    end_s: float
    args: dict[str, int]


class TraceRecorder:
    """Collects spans. Only the thread that runs the engine loop adds; `as_dict` may be called by another one.

    clocks: one a card; None for a card in host memory, whose work runs on the host's clock.
    """

    def __init__(self, clocks: Sequence[DeviceClock | None]) -> None:
        self._clocks = clocks
        self._origin_s = time.perf_counter()
        self._spans: list[Span] = []
        self._flows: list[tuple[str, list[Span]]] = []
        self._prefilled: dict[tuple[int, int], Span] = {}  # by sequence that has not begun to decode: its last chunk
        self._copied: dict[tuple[int, int], Span] = {}  # by (card, block): the last copy that wrote it
        self._num_dropped = 0

    def add_job(self, job: Job, rows: list[PlannedSequence]) -> None:
        """A job has completed; `rows`: those of its sequences that still take their token."""
        lane, card, args = _describe(job)
        begin_s, end_s = job.begin_s, job.end_s
        start, clock = getattr(job.handle, "start", None), self._clocks[card]
        if clock is not None and start is not None and job.handle is not None:
            begin_s, end_s = clock.span_s(start, job.handle.event)
        span = Span(lane, card, begin_s, end_s, args)
        if self._add(span):
            self._follow(span, job.shard, rows)
            self._add_stages(job, span)

    def _add_stages(self, job: Job, step: Span) -> None:
        stages, start = getattr(job.handle, "stages", None), getattr(job.handle, "start", None)
        if stages is None or start is None:
            return
        for lane, layer, begin_s, end_s in stages.spans_s(start):
            self._add(Span(lane, step.card, step.begin_s + begin_s, step.begin_s + end_s, {"layer": layer}))

    def add_iteration(self, begin_s: float, messages: int, completed: int, launched: int) -> None:
        """One iteration of the engine loop, ending now."""
        args = {"messages": messages, "completed": completed, "launched": launched}
        self._add(Span("scheduler", HOST, begin_s, time.perf_counter(), args))

    def _add(self, span: Span) -> bool:
        if len(self._spans) + len(self._prefilled) + len(self._flows) >= MAX_SPANS:
            self._num_dropped += 1
            return False
        self._spans.append(span)
        return True

    def _follow(self, span: Span, shard: Shard, rows: list[PlannedSequence]) -> None:
        if isinstance(shard, CopyShard):
            self._copied.update({(shard.dst, target): span for _, target in shard.block_pairs})
            return
        decode = shard.decode if isinstance(shard, MixedShard) else shard
        if isinstance(decode, DecodeShard) and decode.entries:  # first: what is prefilled here is decoded later
            self._first_decodes(span, decode, rows)
        if not isinstance(shard, DecodeShard):
            new = [sequence for sequence in rows if sequence.state in JUST_PREFILLED]
            self._prefilled.update({sequence.order: span for sequence in new})

    def _first_decodes(self, span: Span, shard: DecodeShard, rows: list[PlannedSequence]) -> None:
        by_slot = {sequence.slot: sequence for sequence in rows}
        for entry in shard.entries:
            sequence = by_slot.get(entry.slot)
            chunk = self._prefilled.pop(sequence.order, None) if sequence is not None else None
            if sequence is None or chunk is None:
                continue
            found = [self._copied.get((shard.card, block)) for block in entry.block_table]
            copies = [copy for copy in found if copy is not None and copy.begin_s > chunk.begin_s]  # not a past owner's
            last = [max(copies, key=lambda copy: copy.end_s)] if copies else []
            self._flows.append((sequence.request.request_id, [chunk, *last, span]))

    # -- out

    def as_dict(self) -> dict[str, Any]:
        """The whole file: times in microseconds since the trace began."""
        spans, flows = list(self._spans), list(self._flows)  # one collected just now may still be added
        arrows = [arrow for number, flow in enumerate(flows) for arrow in self._arrows(number, *flow)]
        return {
            "traceEvents": [*self._names(spans), *map(self._slice, spans), *arrows],
            "displayTimeUnit": "ms",
            "otherData": {"dropped_spans": self._num_dropped, "max_spans": MAX_SPANS},
        }

    def _names(self, spans: list[Span]) -> Iterator[dict[str, Any]]:
        used = {(span.lane, span.card) for span in spans}
        for card in (HOST, *range(len(self._clocks))):
            name = "host" if card == HOST else f"card {card}"
            yield {"ph": "M", "name": "process_name", "pid": _pid(card), "args": {"name": name}}
            for lane in LANES[:1] if card == HOST else LANES[1:]:
                if lane in STAGE_LANES and (lane, card) not in used:
                    continue
                title = {"name": self._title(lane, card)}
                yield {"ph": "M", "name": "thread_name", **_place(lane, card), "args": title}

    def _title(self, lane: str, card: int) -> str:
        other = len(self._clocks) - 1 - card  # of two cards; one copies within itself
        return {"copy": f"copies to card {other}", "attention": "StageA", "ffn": "StageF"}.get(lane, lane)

    def _slice(self, span: Span) -> dict[str, Any]:
        begin_us = self._us(span.begin_s)
        times = {"ts": begin_us, "dur": round(max(0.0, self._us(span.end_s) - begin_us), 3)}
        names = {"ph": "X", "name": span.lane, "cat": span.lane}
        return names | _place(span.lane, span.card) | times | {"args": span.args}

    def _arrows(self, number: int, request_id: str, flow: list[Span]) -> Iterator[dict[str, Any]]:
        for phase, span in zip("stf" if len(flow) == 3 else "sf", flow, strict=True):
            time_us = self._us((span.begin_s + span.end_s) / 2)  # binds to the slice that encloses it
            names = {"ph": phase, "bp": "e", "id": number, "name": f"request {request_id}", "cat": "request"}
            yield names | _place(span.lane, span.card) | {"ts": time_us}

    def _us(self, time_s: float) -> float:
        return round(max(0.0, time_s - self._origin_s) * 1e6, 3)  # what ran already is shown from the begin on


def _pid(card: int) -> int:
    return card + 2  # viewers take 0 for the idle process


def _place(lane: str, card: int) -> dict[str, int]:
    return {"pid": _pid(card), "tid": _pid(card) * 10 + LANES.index(lane)}


def _describe(job: Job) -> tuple[str, int, dict[str, int]]:
    """(lane, card, what a click on the span tells)."""
    shard = job.shard
    if isinstance(shard, CopyShard):
        blocks, after = len(shard.block_pairs), shard.after_step
        return "copy", shard.src, {"copy": shard.copy, "blocks": blocks, "bytes": job.num_bytes, "after_step": after}
    if isinstance(shard, PrefillShard):
        rows, tokens = len(shard.chunks), shard.num_tokens
        return "prefill", shard.card, {"step": shard.step, "rows": rows, "tokens": tokens, "samples": shard.num_samples}
    if isinstance(shard, MixedShard):
        tokens, rows = shard.prefill.num_tokens, len(shard.decode.slots)
        args = {"step": shard.step, "chunk_tokens": tokens, "rows": rows, "tokens": tokens + rows}
        return "mixed", shard.card, args | {"samples": shard.prefill.num_samples}
    tokens = len(shard.slots)
    args = {"step": shard.step, "rows": tokens, "tokens": tokens, "max_context_tokens": shard.max_context_tokens}
    return "decode", shard.card, args


@contextmanager
def record_trace(engine: LLMEngine, path: str | os.PathLike[str], devices: Sequence[torch.device]) -> Iterator[None]:
    """Record what completes inside the block, and write it to `path` when the block is left, however that happens.

    devices: one a card. An existing file is replaced. `ValueError` if the path cannot be written, or another trace of
    this engine is on.
    """
    if not isinstance(path, (str, os.PathLike)):  # open() would take an integer for an open file's number
        raise ValueError(f"path must be a string or a PathLike, got {shown(path)}")
    if not engine.tracing.acquire(blocking=False):
        raise ValueError(f"a trace is being recorded already, one at a time: cannot begin {shown(os.fspath(path))}")
    try:
        try:
            file = open(path, "w")
        except (OSError, ValueError) as error:  # ValueError: a null character in it
            raise ValueError(f"cannot write a trace to {shown(os.fspath(path))}: {shortened(str(error))}") from None
        with file:
            clocks = [DeviceClock(device) if device.type == "cuda" else None for device in devices]
            engine.trace = recorder = TraceRecorder(clocks)
            try:
                yield
            finally:
                engine.trace = None
                file.write(json.dumps(recorder.as_dict()))
    finally:
        engine.tracing.release()
