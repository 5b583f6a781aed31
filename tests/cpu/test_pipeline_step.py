"""The decode step in two lanes: the sequential step's logits, and memory that nobody else gets while it is read."""

from __future__ import annotations

import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.engine import pipeline_step
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.pipeline_order import Lane
from nanovllm.engine.pipeline_step import (
    BOUNDARIES,
    Boundary,
    InOrder,
    MicroBatch,
    StageBackends,
    Stages,
    decode_step,
    run_stages,
    split_rows,
)
from nanovllm.layers.attention import DecodeMetadata
from nanovllm.layers.attention.torch import TorchAttention
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from tests.cpu.model_helpers import load_tiny, make_checkpoint

BLOCK = 4


# -- against the sequential step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen3ForCausalLM:
    folder: Path = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder, num_hidden_layers=3)
    return load_tiny(folder)[1]


def make_batch(model: Qwen3ForCausalLM, lens: list[int], seed: int = 0) -> tuple[KVCache, MicroBatch]:
    """Rows of these contexts over scattered blocks of random KV; what no row owns is NaN. 0: a padding row."""
    generator = torch.Generator().manual_seed(seed)
    columns = [max(1, -(-length // BLOCK)) for length in lens]
    cache = KVCache(sum(columns), BLOCK, model.config, model.dtype, model.device)
    cache.pages.normal_(generator=generator)
    blocks = torch.randperm(sum(columns), generator=generator).int().split(columns)
    tables = torch.full((len(lens), max(columns)), cache.null_block, dtype=torch.int32)
    mapping = torch.full((len(lens),), cache.null_block * BLOCK)
    cache.pages[cache.null_block] = float("nan")
    for row, (length, own) in enumerate(zip(lens, blocks, strict=True)):
        tables[row, : len(own)] = own
        if length:
            mapping[row] = own[(length - 1) // BLOCK].long() * BLOCK + (length - 1) % BLOCK
    ids = torch.randint(97, (len(lens),), generator=generator)
    contexts = torch.tensor(lens, dtype=torch.int32)
    metadata = DecodeMetadata(contexts, tables, mapping, max(columns) * BLOCK)
    return cache, MicroBatch(ids, (contexts.long() - 1).clamp(min=0), metadata)


def rows_of(batch: MicroBatch, rows: slice) -> MicroBatch:
    meta = batch.metadata
    part = DecodeMetadata(
        meta.context_lens[rows], meta.block_tables[rows], meta.slot_mapping[rows], meta.max_context_tokens
    )
    return MicroBatch(batch.token_ids[rows], batch.positions[rows], part)


class NamedBackend(TorchAttention):
    """A lane's own: counts what it was asked to do."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        super().__init__(model.config)
        self.decoded_rows = 0

    def decode(self, q_BHD: Tensor, *args: Any) -> Tensor:
        self.decoded_rows += len(q_BHD)
        return super().decode(q_BHD, *args)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("rows", "micro_batches"), [(6, 2), (7, 2), (7, 3), (2, 4), (1, 2)])
def test_logits_and_pages_are_the_sequential_ones(
    model: Qwen3ForCausalLM, boundary: Boundary, rows: int, micro_batches: int
) -> None:
    rng = random.Random(f"{rows} {micro_batches}")
    lens = [rng.choice([1, 3, BLOCK, BLOCK + 1, 17, 30]) for _ in range(rows - 1)] + [0]
    cache, whole = make_batch(model, lens)
    expected = model.forward_decode(whole.token_ids, whole.positions, cache, whole.metadata)
    written = cache.pages.clone()
    cache, whole = make_batch(model, lens)
    assert not torch.equal(cache.pages, written)
    backends = StageBackends(NamedBackend(model), NamedBackend(model))
    batches = [rows_of(whole, part) for part in split_rows(rows, micro_batches)]
    assert len(batches) == min(rows, micro_batches)
    out = torch.full((rows, 97), float("nan"))
    logits = decode_step(Stages(model, cache, backends, boundary), InOrder(), batches, out)
    assert logits.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    valid = slice(0, cache.num_blocks)  # the null block is anybody's
    torch.testing.assert_close(cache.pages[valid], written[valid], atol=1e-5, rtol=1e-5)
    assert [backend.decoded_rows for backend in backends] == [3 * rows, 0], "attention runs in its own lane, alone"


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_each_lane_runs_with_its_own_backend(model: Qwen3ForCausalLM, boundary: Boundary) -> None:
    """The weights of a product tell which side of the boundary it is on."""
    used: dict[str, set[str]] = {"attention": set(), "ffn": set()}
    names = {
        id(module.weight): name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "weight")
    }

    def recording(side: str) -> TorchAttention:
        backend = TorchAttention(model.config)
        norm_linear, linear = backend.elementwise.norm_linear, backend.elementwise.linear

        def note_norm_linear(norm: Any, product: Any, *args: Any) -> Any:
            used[side].add(names[id(product.weight)])
            return norm_linear(norm, product, *args)

        def note_linear(product: Any, x: Tensor) -> Tensor:
            used[side].add(names[id(product.weight)])
            return linear(product, x)

        backend.elementwise.norm_linear, backend.elementwise.linear = note_norm_linear, note_linear  # type: ignore[method-assign]
        return backend

    cache, batch = make_batch(model, [5, 9])
    stages = Stages(model, cache, StageBackends(recording("attention"), recording("ffn")), boundary)
    run_stages(stages, InOrder(), [rows_of(batch, slice(0, 1)), rows_of(batch, slice(1, 2))])
    projections = {"qkv_proj", "o_proj"}
    assert used["attention"] == (projections if boundary == "projections" else set())
    assert used["ffn"] == {"gate_up_proj", "down_proj"} | (set() if boundary == "projections" else projections)


def test_a_boundary_that_does_not_exist_is_refused(model: Qwen3ForCausalLM) -> None:
    backends = StageBackends(model.attention, model.attention)
    with pytest.raises(ValueError, match="boundary='ffn' must be one of core, projections"):
        Stages(model, make_batch(model, [1])[0], backends, "ffn")  # type: ignore[arg-type]


@given(st.integers(1, 600), st.integers(1, 5))
def test_rows_are_split_evenly_and_all_of_them(num_rows: int, micro_batches: int) -> None:
    parts = split_rows(num_rows, micro_batches)
    assert [row for part in parts for row in range(num_rows)[part]] == list(range(num_rows))
    sizes = [part.stop - part.start for part in parts]
    assert len(sizes) == min(micro_batches, num_rows) and max(sizes) - min(sizes) <= 1


# -- memory, in two lanes that run late


class Card:
    """Two in-order lanes beside the caller's own, which run what was queued later, in any order that marks allow; and
    an allocator that gives a freed block to the next tensor of the lane it was made in, at once, as torch's does."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.current = rng, "caller"
        self.queues: dict[str, deque[Callable[[], bool]]] = {name: deque() for name in ("caller", "attention", "ffn")}
        self.free: dict[str, list[int]] = {name: [] for name in self.queues}
        self.cells: list[object] = []

    def fork(self) -> None:
        self._wait(("attention", "ffn"), self.mark("caller"))

    def join(self) -> None:
        for lane in ("attention", "ffn"):
            self._wait(("caller",), self.mark(lane))

    @contextmanager
    def on(self, lane: Lane, after: Any) -> Iterator[None]:
        if after is not None:
            self._wait((lane,), after)
        self.current = lane
        yield
        self.current = "caller"

    def mark(self, lane: str) -> SimpleNamespace:
        mark = SimpleNamespace(reached=False)

        def reach() -> bool:
            mark.reached = True
            return True

        self.queues[lane].append(reach)
        return mark

    def _wait(self, lanes: tuple[str, ...], mark: SimpleNamespace) -> None:
        for lane in lanes:
            self.queues[lane].append(lambda: mark.reached)

    def queue(self, work: Callable[[], None]) -> None:
        self.queues[self.current].append(lambda: (work(), True)[1])

    def finish(self) -> None:
        while pending := [queue for queue in self.queues.values() if queue]:
            ready = self.rng.choice(pending)
            if ready[0]():
                ready.popleft()


class Block:
    """A tensor: when the last reference goes, its memory is free for the lane that made it."""

    def __init__(self, card: Card) -> None:
        self.card, self.lane = card, card.current
        reusable = card.free[self.lane]
        self.address = reusable.pop() if reusable else len(card.cells)
        if self.address == len(card.cells):
            card.cells.append(None)
        self.value: object = None  # what a reader that is queued now must find

    def __del__(self) -> None:
        self.card.free[self.lane].append(self.address)

    def write(self, value: object) -> None:
        self.value, address, card = value, self.address, self.card
        card.queue(lambda: card.cells.__setitem__(address, value))

    def read(self) -> None:
        address, expected, card = self.address, self.value, self.card

        def check() -> None:
            assert card.cells[address] == expected, f"{card.cells[address]} in place of {expected}"

        card.queue(check)


def simulate(run: Callable[..., Any], batches: int, layers: int, lead: bool, in_place: bool, seed: int) -> None:
    """A step over the simulated card: each stage reads what it was given, makes scratch, and writes what it returns."""
    card = Card(random.Random(seed))

    def stage(lane: Lane, layer: int, batch: int, state: tuple[Block, ...]) -> tuple[Block, ...]:
        for block in state:
            block.read()
        scratch = Block(card)
        scratch.write((lane, layer, batch, "scratch"))
        hidden = Block(card)
        scratch.read()
        hidden.write((lane, layer, batch))
        residual = state[1] if state and (in_place or (lead and lane == "attention")) else Block(card)
        if not (lead and lane == "attention"):
            residual.write((lane, layer, batch, "residual"))
        return hidden, residual

    stages = SimpleNamespace(num_layers=layers, lead=lead)
    states = run(stages, card, list(range(batches)), stage)
    for state in states:
        for block in state:
            block.read()
    del state, states, block
    card.finish()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_no_block_is_reused_while_the_other_lane_reads_it(
    batches: int, layers: int, lead: bool, in_place: bool, seed: int
) -> None:
    simulate(run_stages, batches, layers, lead, in_place, seed)


def planted(old: str, new: str) -> Callable[..., Any]:
    """`run_stages` with one line changed."""
    source = inspect.getsource(run_stages)
    assert source.count(old) == 1
    names = dict(vars(pipeline_step))
    exec(source.replace(old, new), names)
    return names["run_stages"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("held[index, lane] = states[index]", "pass"),
        ("held[index, lane] = states[index]", "held[0, lane] = states[index]"),
        ("marks[index] if after else None", "None"),
        ("lanes.join()", "pass"),
    ],
)
def test_the_simulation_catches_what_it_is_there_for(old: str, new: str) -> None:
    wrong = planted(old, new)
    caught = 0
    for seed in range(40):
        try:
            simulate(wrong, 3, 4, bool(seed % 2), bool(seed // 2 % 2), seed)
        except AssertionError:
            caught += 1
    assert caught, f"{new} in place of {old} passed"
