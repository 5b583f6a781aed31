"""What a captured prefill step finds in its static buffers: every token in its place, nothing of the step before."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import SHAPES, write_shape
from nanovllm.engine import prefill_graphs
from nanovllm.engine.prefill_graphs import (
    LONG_SEQUENCES,
    ChunkBatch,
    PrefillGraphs,
    launch_bound_tokens,
    number_line,
    token_sizes,
)
from nanovllm.engine.shards import PrefillChunk, PrefillShard
from nanovllm.engine.step_sizes import MAX_SEQUENCES
from nanovllm.models.model_config import load_model_config

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN, VOCABULARY = 4, 50, 64, 11


class Seen:
    """In place of a graph: notes what the buffers hold when it is replayed."""

    def __init__(self, graphs: PrefillGraphs, size: int) -> None:
        self.graphs, self.size = graphs, size

    def replay(self) -> None:
        self.tokens = self.graphs.buffers.tokens_3T[:, : self.size].clone()
        self.sequences, self.tables = self.graphs.buffers.sequences_3S.clone(), self.graphs.buffers.tables_SN.clone()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> PrefillGraphs:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(PrefillGraphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    config = SimpleNamespace(num_parameters=lambda: 1_000_000)
    cache = SimpleNamespace(
        device=torch.device("cpu"), null_block=NUM_BLOCKS, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS
    )
    return PrefillGraphs(SimpleNamespace(config=config), cache, MAX_MODEL_LEN, max_tokens=200)  # type: ignore[arg-type]


def capture(graphs: PrefillGraphs, size: int, pool: Any) -> None:
    graphs._graphs[size] = Seen(graphs, size)  # type: ignore[assignment]
    graphs._logits[size] = torch.zeros(MAX_SEQUENCES, VOCABULARY)


def test_steps_one_after_the_other(graphs: PrefillGraphs) -> None:
    """Long and short ones in turn, of one to eight sequences, with and without a cached prefix."""
    rng = random.Random(0)
    for _ in range(30):
        count = rng.randint(1, MAX_SEQUENCES)
        query_lens = [rng.randint(1, 128 // count) for _ in range(count)]
        starts = [rng.randint(0, MAX_MODEL_LEN - min(n, MAX_MODEL_LEN)) for n in query_lens]
        query_lens = [min(n, MAX_MODEL_LEN - start) for n, start in zip(query_lens, starts, strict=True)]
        contexts = [n + start for n, start in zip(query_lens, starts, strict=True)]
        chunks = [
            PrefillChunk(ids, start, tuple(rng.sample(range(NUM_BLOCKS), -(-context // BLOCK_SIZE))))
            for ids, start, context in zip(any_ids(rng, query_lens), starts, contexts, strict=True)
        ]
        batch = ChunkBatch.of(PrefillShard(0, 0, tuple(chunks)), BLOCK_SIZE, number_line(NUM_BLOCKS * BLOCK_SIZE))
        expected = [
            (token, position, chunk.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            for chunk in chunks
            for position, token in enumerate(chunk.tokens, chunk.start)
        ]
        tokens_3T = torch.tensor(expected).T
        assert torch.equal(batch.tokens_3T(), tokens_3T) and batch.tokens_3T().dtype == torch.int64
        assert (batch.query_lens, batch.context_lens) == (query_lens, contexts)

        size = graphs.size_for(len(expected), count)
        assert size is not None
        graphs.replay(size, batch)
        check(graphs._graphs[size], tokens_3T, chunks)  # type: ignore[arg-type]


def any_ids(rng: random.Random, lengths: list[int]) -> list[array[int]]:
    return [array("q", (rng.randrange(VOCABULARY) for _ in range(length))) for length in lengths]


def check(seen: Seen, tokens_3T: torch.Tensor, chunks: list[PrefillChunk]) -> None:
    count, total = len(chunks), tokens_3T.shape[1]
    query_lens, contexts = [len(c.tokens) for c in chunks], [c.start + len(c.tokens) for c in chunks]
    assert torch.equal(seen.tokens[:, :total], tokens_3T)
    assert (seen.tokens[2, total:] == NUM_BLOCKS * BLOCK_SIZE).all(), "a token of no sequence writes where it may not"
    assert (seen.tokens[:2, total:] == 0).all()
    starts, context_lens, lasts = seen.sequences.tolist()
    ends = [sum(query_lens[: s + 1]) for s in range(count)]
    assert starts == [0, *ends, *[total] * (MAX_SEQUENCES - count)]
    assert context_lens == [*contexts, *[0] * (MAX_SEQUENCES + 1 - count)]
    assert lasts[:count] == [end - 1 for end in ends] and max(lasts) < seen.size
    width = max(len(chunk.block_table) for chunk in chunks)
    for chunk, row in zip(chunks, seen.tables[:count, :width].tolist(), strict=True):
        assert row == [*chunk.block_table, *[NUM_BLOCKS] * (width - len(chunk.block_table))]


def test_steps_that_do_not_fit_are_launched_eagerly(graphs: PrefillGraphs) -> None:
    assert graphs.size_for(64, 1) == 64 and graphs.size_for(65, MAX_SEQUENCES) == 128
    assert graphs.size_for(129, 1) is None and graphs.size_for(1, MAX_SEQUENCES + 1) is None


@pytest.mark.parametrize("name", SHAPES)
def test_larger_models_are_launch_bound_at_fewer_tokens(name: str, tmp_path: Path) -> None:
    config = load_model_config(write_shape(tmp_path, name))
    bound = {"0.6b": 8389, "1.7b": 2906, "4b": 1243, "8b": 610, "14b": 338, "32b": 152}[name]
    assert launch_bound_tokens(config) == pytest.approx(bound, rel=0.01)
    assert token_sizes(config, 16384)[-1] == (8192 if name == "0.6b" else 2048) and token_sizes(config, 100) == [64]


def test_steps_that_keep_a_card_busy_are_padded_little(monkeypatch: pytest.MonkeyPatch, graphs: PrefillGraphs) -> None:
    monkeypatch.setattr(prefill_graphs, "LAUNCH_BOUND_FLOPS", 2 * 100 * graphs.model.config.num_parameters())
    assert graphs.size_for(65, 1) is None and graphs.size_for(113, 1) is None and graphs.size_for(114, 1) == 128
    assert graphs.size_for(120, LONG_SEQUENCES) == 128 and graphs.size_for(120, LONG_SEQUENCES + 1) is None
    assert graphs.size_for(1, MAX_SEQUENCES) == 64, "launch-bound"


def test_sizes_that_were_asked_for_are_taken_wherever_they_fit(
    monkeypatch: pytest.MonkeyPatch, graphs: PrefillGraphs
) -> None:
    monkeypatch.setattr(prefill_graphs, "LAUNCH_BOUND_FLOPS", 0.0)
    asked = PrefillGraphs(graphs.model, graphs.kv_cache, MAX_MODEL_LEN, max_tokens=200, sizes=(64, 128))
    assert asked.size_for(65, MAX_SEQUENCES) == 128


def test_a_graph_of_few_sequences_reads_theirs(monkeypatch: pytest.MonkeyPatch, graphs: PrefillGraphs) -> None:
    monkeypatch.setattr(prefill_graphs, "LAUNCH_BOUND_FLOPS", 0.0)
    seen: list[Any] = []
    graphs.model.forward_prefill = lambda *args: seen.append(args)  # type: ignore[method-assign, assignment]
    graphs._run(64)
    ((_, _, _, metadata, last, _),) = seen
    assert len(metadata.cu_seqlens_q) == LONG_SEQUENCES + 1
    assert len(metadata.context_lens) == len(metadata.block_tables) == len(last) == LONG_SEQUENCES
