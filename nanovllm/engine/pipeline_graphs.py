"""CUDA graphs of pipelined decode steps: by way and bucket, beside the sequential ones of `DecodeGraphs`.

They are captured on that class's stream, into its pool (no two graphs of a card run at once), and write the logits that
its samplers read. A second capture of a step can tell how long each stage takes: with timing events between the stages,
which make it a little slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nanovllm.engine.graph_capture import free_bytes
from nanovllm.engine.pipeline_order import Lane
from nanovllm.engine.pipeline_step import MicroBatch, StageRun, Stages, State, decode_step, split_rows
from nanovllm.engine.pipeline_ways import PipelinedWay

if TYPE_CHECKING:  # a CPU build of torch comes without Triton
    from nanovllm.engine.decode_graphs import DecodeGraphs


class StageSeconds(NamedTuple):
    """Of one step: all stages of each lane together, and the time from the first's begin to the last's end."""

    attention: float
    ffn: float
    wall: float


class TimedStage(NamedTuple):
    """A stage between two events of its lane."""

    lane: Lane
    layer: int
    begin: torch.cuda.Event
    end: torch.cuda.Event


class StageTimer:
    """Runs the stages of a step, each between two timing events of its lane.

    make_event: of events that stay usable when the step is replayed from a graph, and mark their lane when recorded.
    `stages`: those of the last run, in the order of issue.
    """

    def __init__(self, stages: Stages, make_event: Callable[[], torch.cuda.Event]) -> None:
        self._run, self._make_event = stages.run, make_event
        self.stages: list[TimedStage] = []

    def run(self, lane: Lane, layer: int, batch: MicroBatch, state: State) -> State:
        """`Stages.run`, timed; the current stream is the lane's."""
        begin, end = self._make_event(), self._make_event()
        begin.record()
        result = self._run(lane, layer, batch, state)
        end.record()
        self.stages.append(TimedStage(lane, layer, begin, end))
        return result

    def clear(self) -> None:
        """Forget the stages of the run before."""
        self.stages = []

    def seconds(self) -> StageSeconds:
        """Of the last step, which must have ended."""
        assert self.stages, "nothing was timed"
        wall_s = self.stages[0].begin.elapsed_time(self.stages[-1].end) / 1e3
        return StageSeconds(self._seconds_of("attention"), self._seconds_of("ffn"), wall_s)

    def _seconds_of(self, lane: Lane) -> float:
        return sum(stage.begin.elapsed_time(stage.end) for stage in self.stages if stage.lane == lane) / 1e3

    def spans_s(self, since: torch.cuda.Event) -> list[tuple[Lane, int, float, float]]:
        """(lane, layer, begin, end) of each stage, in seconds since an event ahead of the step, which has ended."""
        return [
            (lane, layer, since.elapsed_time(begin) / 1e3, since.elapsed_time(end) / 1e3)
            for lane, layer, begin, end in self.stages
        ]


class PipelineGraphs:
    """Captured by `capture` and `capture_timed`, at start-up, under the terms of `DecodeGraphs`.

    ways: by name. `graph_bytes`: memory that the captures took, torch's and the driver's.
    """

    def __init__(self, decode: DecodeGraphs, ways: Sequence[PipelinedWay], num_micro_batches: int = 2) -> None:
        self.decode, self.num_micro_batches = decode, num_micro_batches
        self.ways = {way.name: way for way in ways}
        self.graph_bytes = 0
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        self._timed: dict[tuple[str, int], tuple[torch.cuda.CUDAGraph, StageTimer]] = {}

    @property
    def captured(self) -> list[tuple[str, int]]:
        """(way, bucket) of every graph, largest buckets first."""
        return list(self._graphs)

    def capture(self, way: str, bucket: int) -> None:
        """The step of `bucket` rows. Larger buckets first: smaller ones fit into their memory."""
        self._graphs[way, bucket] = self._measured(partial(self._run, self.ways[way], bucket))

    def capture_timed(self, way: str, bucket: int) -> None:
        """The same once more, with timing events."""
        timer = StageTimer(self.ways[way].stages, _external_event)

        def run() -> None:
            timer.clear()  # of the run ahead of the capture
            self._run(self.ways[way], bucket, timer.run)

        self._timed[way, bucket] = self._measured(run), timer

    def _measured(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        self.decode.set_slots(())  # of the run ahead of the capture: no row belongs to anybody
        device = self.decode.slots.device
        before = free_bytes(device)
        graph = self.decode.graph_of(run)
        self.graph_bytes += max(0, before - free_bytes(device))
        return graph

    def _run(self, way: PipelinedWay, bucket: int, run: StageRun | None = None) -> None:
        """Rows of `DecodeGraphs.set_slots`, in micro-batches."""
        parts = split_rows(bucket, self.num_micro_batches)
        batches = [MicroBatch(*self.decode.inputs(rows.stop, rows.start)) for rows in parts]
        decode_step(way.stages, way.lanes, batches, self.decode.logits_BV[:bucket], run)

    def has(self, way: str, bucket: int) -> bool:
        return (way, bucket) in self._graphs

    def replay(self, way: str, slots: tuple[int, ...]) -> Tensor:
        """`DecodeGraphs.replay_model` in another way."""
        self.decode.set_slots(slots)
        self._graphs[way, self.decode.bucket_of(len(slots))].replay()
        return self.decode.logits_BV[: len(slots)]

    def replay_timed(self, way: str, slots: tuple[int, ...]) -> tuple[Tensor, StageTimer] | None:
        """The same from the second capture, and what will know its times when it has ended; None: not captured."""
        graph, timer = self._timed.get((way, self.decode.bucket_of(len(slots))), (None, None))
        if graph is None or timer is None:
            return None
        self.decode.set_slots(slots)
        graph.replay()
        return self.decode.logits_BV[: len(slots)], timer

    def rehearse(self) -> None:
        """As of decode graphs."""
        self.decode.set_slots(())
        for graph in (*self._graphs.values(), *(graph for graph, _ in self._timed.values())):
            graph.replay()

    def close(self) -> None:
        """Drop the graphs: nothing uses the splits' streams any more."""
        self.ways, self._graphs, self._timed = {}, {}, {}


def _external_event() -> torch.cuda.Event:
    """One that a graph records as a node of its own, so that a replay leaves its time in it."""
    return torch.cuda.Event(enable_timing=True, external=True)
