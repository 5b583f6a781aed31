"""One decode step in two lanes: attention on one SM partition, the matrix products on another, several micro-batches.

The boundary is a choice. "projections": StageA has norm, QKV, head norms, RoPE, KV store, attention and the output
projection, StageF the FFN. "core": StageA is attention alone, StageF all matrix products from one attention to the
next, so that a step begins and ends in it. Behind the last stage the lanes join; logits are computed for all rows at
once, on the whole card.

What the memory of tensors relies on: torch gives a block freed in one lane to the next tensor made *in that lane*, in
the order of issue, whatever the other lane may still read. So each micro-batch holds what its last stage of each lane
returned (a double buffer, one of it being read) until its next stage of the same lane has been issued: that stage waits
for the reader, and so does everything issued in the lane behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.pipeline_order import Lane, pipeline_order
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata
from nanovllm.layers.embedding import project_to_logits
from nanovllm.models.qwen3 import Qwen3ForCausalLM

Boundary = Literal["projections", "core"]
BOUNDARIES: tuple[Boundary, ...] = ("core", "projections")
State = tuple[Tensor, ...]  # what a stage hands to the next one


class MicroBatch(NamedTuple):
    """Some rows of a step. token_ids, positions: int64 [B]."""

    token_ids: Tensor
    positions: Tensor
    metadata: DecodeMetadata


StageRun = Callable[[Lane, int, MicroBatch, State], State]


class StageBackends(NamedTuple):
    """Each lane's own kernels, sized for its partition."""

    attention: AttentionBackend
    ffn: AttentionBackend


def split_rows(num_rows: int, num_micro_batches: int) -> list[slice]:
    """Row ranges of the micro-batches, sizes at most one apart; fewer of them than asked if there are fewer rows."""
    count = max(1, min(num_micro_batches, num_rows))
    ends = [num_rows * (i + 1) // count for i in range(count)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


class Lanes(Protocol):
    """Where stages run. A mark is what a stage of the other lane may wait for."""

    def fork(self) -> None:
        """Both lanes wait for what has been queued so far."""

    def on(self, lane: Lane, after: Any) -> AbstractContextManager[None]:
        """Within the block, work is queued in `lane`, behind the mark `after` if there is one."""

    def mark(self, lane: Lane) -> Any:
        """The end of what `lane` holds now."""

    def join(self) -> None:
        """What is queued next waits for both lanes."""


class InOrder:
    """No lanes: every stage runs when it is issued, as on a CPU."""

    def fork(self) -> None: ...

    def on(self, lane: Lane, after: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def mark(self, lane: Lane) -> None: ...

    def join(self) -> None: ...


class StreamLanes:
    """Two streams, under capture too: they fork from the current stream and join it again.

    sized_for: a context manager for the time in which a lane's work is queued, for what must be told how many SMs there
    are and has no other way to learn it (cuBLASLt's settings are the process's).
    """

    def __init__(
        self,
        attention: torch.cuda.Stream,
        ffn: torch.cuda.Stream,
        sized_for: Callable[[Lane], AbstractContextManager[object]] = lambda lane: nullcontext(),
    ) -> None:
        self.streams: dict[Lane, torch.cuda.Stream] = {"attention": attention, "ffn": ffn}
        self.sized_for = sized_for

    def fork(self) -> None:
        begin = torch.cuda.current_stream().record_event()
        for stream in self.streams.values():
            stream.wait_event(begin)

    @contextmanager
    def on(self, lane: Lane, after: torch.cuda.Event | None) -> Iterator[None]:
        stream = self.streams[lane]
        with torch.cuda.stream(stream), self.sized_for(lane):
            if after is not None:
                stream.wait_event(after)
            yield

    def mark(self, lane: Lane) -> torch.cuda.Event:
        return self.streams[lane].record_event()

    def join(self) -> None:
        current = torch.cuda.current_stream()
        for stream in self.streams.values():
            current.wait_event(stream.record_event())


class Stages:
    """What each lane computes for one micro-batch and layer, by boundary."""

    def __init__(self, model: Qwen3ForCausalLM, kv_cache: KVCache, backends: StageBackends, boundary: Boundary) -> None:
        if boundary not in BOUNDARIES:
            raise ValueError(f"boundary={boundary!r} must be one of {', '.join(BOUNDARIES)}")
        self.model, self.kv_cache, self.backends, self.boundary = model, kv_cache, backends, boundary
        self.num_layers = model.config.num_hidden_layers
        self.lead = boundary == "core"

    def run(self, lane: Lane, layer: int, batch: MicroBatch, state: State) -> State:
        """A stage; `state` is what the one before it returned, empty ahead of the first. Behind the last: (the final
        norm's output [B, hidden],)."""
        if self.boundary == "projections":
            return self._attention_stage(layer, batch, state) if lane == "attention" else self._ffn(layer, *state)
        return self._core(layer, batch, *state) if lane == "attention" else self._between(layer, batch, state)

    def _attention_stage(self, layer: int, batch: MicroBatch, state: State) -> State:
        hidden, residual = state or (self.model.embed_tokens(batch.token_ids), None)
        inputs = batch.positions, self.kv_cache, batch.metadata
        return self.model.forward_attention_stage(layer, hidden, residual, *inputs, self.backends.attention)

    def _ffn(self, layer: int, hidden: Tensor, residual: Tensor) -> State:
        backend = self.backends.ffn
        hidden, residual = self.model.forward_ffn_stage(layer, hidden, residual, backend)
        last = layer == self.num_layers - 1
        return (self.model.final_norm(hidden, residual, backend),) if last else (hidden, residual)

    def _core(self, layer: int, batch: MicroBatch, q_BHD: Tensor, residual: Tensor) -> State:
        attended = self.model.attend(layer, q_BHD, self.kv_cache, batch.metadata, self.backends.attention)
        return attended, residual

    def _between(self, layer: int, batch: MicroBatch, state: State) -> State:
        """From the attention of `layer` to that of the next one; layer -1: from the token ids."""
        if not state:
            return self._queries(0, batch, self.model.embed_tokens(batch.token_ids), None)
        attended, residual = state
        done = self._ffn(layer, self.model.project_out(layer, attended, self.backends.ffn), residual)
        return done if layer == self.num_layers - 1 else self._queries(layer + 1, batch, *done)

    def _queries(self, layer: int, batch: MicroBatch, hidden: Tensor, residual: Tensor | None) -> State:
        inputs = batch.positions, self.kv_cache, batch.metadata
        return self.model.project_qkv(layer, hidden, residual, *inputs, self.backends.ffn)


def run_stages(
    stages: Stages,
    lanes: Lanes,
    batches: Sequence[MicroBatch],
    run: StageRun | None = None,
) -> list[State]:
    """Queue every stage of a step, from fork to join; what each micro-batch's last stage returned.

    `run`: in place of `stages.run`, to watch it. The micro-batches' tensors belong to the caller's stream and must be
    kept until this returns.
    """
    run = run or stages.run
    states: list[State] = [()] * len(batches)
    marks: list[Any] = [None] * len(batches)
    held: dict[tuple[int, Lane], State] = {}
    lanes.fork()
    for lane, index, layer, after in pipeline_order(len(batches), stages.num_layers, stages.lead):
        with lanes.on(lane, marks[index] if after else None):
            states[index] = run(lane, layer, batches[index], states[index])
        marks[index] = lanes.mark(lane)
        held[index, lane] = states[index]  # lets go of what this lane returned a layer ago: see above
    lanes.join()
    return states


def decode_step(
    stages: Stages, lanes: Lanes, batches: Sequence[MicroBatch], out: Tensor, run: StageRun | None = None
) -> Tensor:
    """Queue a whole step; float32 logits [rows, vocab_size] in `out`, the micro-batches' rows one after the other.

    `run`: as for `run_stages`.
    """
    normed = torch.cat([state[0] for state in run_stages(stages, lanes, batches, run)])
    return project_to_logits(normed, stages.model.lm_head.weight, out)
