"""What a captured prefill step finds in its static buffers: every token in its place, nothing of the step before."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import SHAPES, write_shape
from nanovllm.engine.prefill_graphs import ChunkBatch, PrefillGraphs, token_places, token_sizes
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
        tables = torch.tensor([rng.sample(range(NUM_BLOCKS), -(-max(contexts) // BLOCK_SIZE)) for _ in range(count)])
        positions, mapping = token_places(starts, query_lens, tables, BLOCK_SIZE)
        expected = [(s, starts[s] + i) for s in range(count) for i in range(query_lens[s])]
        assert positions.tolist() == [position for _, position in expected]
        places = [int(tables[s, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for s, p in expected]
        assert mapping.tolist() == places

        ids = torch.tensor([rng.randrange(VOCABULARY) for _ in expected])
        size = graphs.size_for(len(ids), count)
        assert size is not None
        graphs.replay(size, ChunkBatch(torch.stack([ids, positions, mapping]), query_lens, contexts, tables))
        check(graphs._graphs[size], ids, positions, mapping, query_lens, contexts, tables)  # type: ignore[arg-type]


def check(
    seen: Seen,
    ids: torch.Tensor,
    positions: torch.Tensor,
    mapping: torch.Tensor,
    query_lens: list[int],
    contexts: list[int],
    tables: torch.Tensor,
) -> None:
    count, total = len(query_lens), len(ids)
    assert torch.equal(seen.tokens[:, :total], torch.stack([ids, positions, mapping]))
    assert (seen.tokens[2, total:] == NUM_BLOCKS * BLOCK_SIZE).all(), "a token of no sequence writes where it may not"
    starts, context_lens, lasts = seen.sequences.tolist()
    ends = [sum(query_lens[: s + 1]) for s in range(count)]
    assert starts == [0, *ends, *[total] * (MAX_SEQUENCES - count)]
    assert context_lens == [*contexts, *[0] * (MAX_SEQUENCES + 1 - count)]
    assert lasts[:count] == [end - 1 for end in ends] and max(lasts) < seen.size
    assert torch.equal(seen.tables[:count, : tables.shape[1]], tables.int())


def test_steps_that_do_not_fit_are_launched_eagerly(graphs: PrefillGraphs) -> None:
    assert graphs.size_for(64, 1) == 64 and graphs.size_for(65, MAX_SEQUENCES) == 128
    assert graphs.size_for(129, 1) is None and graphs.size_for(1, MAX_SEQUENCES + 1) is None


@pytest.mark.parametrize("name", SHAPES)
def test_larger_models_are_launch_bound_at_fewer_tokens(name: str, tmp_path: Path) -> None:
    sizes = token_sizes(load_model_config(write_shape(tmp_path, name)), 16384)
    assert sizes[-1] == {"0.6b": 8192, "1.7b": 2048, "4b": 1024, "8b": 512, "14b": 256, "32b": 128}[name]
    assert token_sizes(load_model_config(tmp_path), 100) == [64]
