"""CUDA graphs of mixed steps: a few hundred tokens of prompts, and decode rows, in one pass over the weights.

A step runs in the smallest captured sum of tokens and rows that holds both, for models of every size: a decode step
must not wait for some hundreds of launches. Tokens beyond the step's own belong to no sequence and write
their KV to the null block, and so do rows beyond its own. The draws are not part of the graph: those of decode rows are
`DecodeGraphs`' captured ones, as after a step without prompts.

Letters in names: T tokens of prompts, B decode rows, S sequences of the prompts, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nanovllm.engine.decode_graphs import DecodeGraphs
from nanovllm.engine.prefill_graphs import ChunkBatch, PrefillBuffers
from nanovllm.engine.step_sizes import MAX_SEQUENCES, captured_sizes
from nanovllm.layers.attention import MixedMetadata

LARGE_TOKENS = 1024  # of prompts: a step of more is launched eagerly rather than with much padding
MOST_PADDING = 1.5  # rows computed for each that is asked for


class MixedGraphs:
    """Captured on construction, behind the graphs of the same card's decode steps, on the stream and under the terms of
    those, with which they share their memory: no two of them ever run at the same time.

    max_tokens: of the prompts in a step.
    """

    def __init__(self, decode: DecodeGraphs, max_tokens: int) -> None:
        self.decode = decode
        sizes = captured_sizes(decode.max_num_seqs, max_tokens)
        largest = max(tokens for tokens, _ in sizes)
        self.buffers = PrefillBuffers(decode.kv_cache, decode.max_context_tokens, largest)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        for size in reversed(sizes):  # largest first: smaller ones fit into its memory
            self._graphs[size] = decode.graph_of(partial(self._run, *size))
        torch.cuda.synchronize(decode.kv_cache.device)

    def rehearse(self) -> None:
        """As of decode graphs; the prompts are empty."""
        self.buffers.clear()
        for graph in self._graphs.values():
            graph.replay()

    def _run(self, num_tokens: int, bucket: int) -> None:
        """Logits of each sequence's last token, then of the rows."""
        decode, buffers = self.decode, self.buffers
        ids_B, positions_B, rows = decode.inputs(bucket)
        ids_T, positions_T, mapping_T = buffers.tokens_3T[:, :num_tokens].unbind(0)
        mapping = torch.cat([mapping_T, rows.slot_mapping])
        metadata = MixedMetadata(buffers.metadata(num_tokens), decode.planned(rows), mapping)
        row_index = torch.arange(num_tokens, num_tokens + bucket, device=ids_T.device)
        decode.model.forward_mixed(
            torch.cat([ids_T, ids_B]),
            torch.cat([positions_T, positions_B]),
            decode.kv_cache,
            metadata,
            torch.cat([buffers.last_tokens, row_index]),
            out=decode.mixed_logits_RV[: MAX_SEQUENCES + bucket],
        )

    def size_for(self, num_tokens: int, num_sequences: int, num_rows: int) -> tuple[int, int] | None:
        """The captured size that serves such a step; None: launch it eagerly."""
        if num_sequences > MAX_SEQUENCES:
            return None
        fitting = (size for size in self._graphs if size[0] >= num_tokens and size[1] >= num_rows)
        size = min(fitting, key=lambda size: (sum(size), size[1]), default=None)
        if size is None or (size[0] > LARGE_TOKENS and MOST_PADDING * (num_tokens + num_rows) < sum(size)):
            return None
        return size

    def replay(self, size: tuple[int, int], batch: ChunkBatch, slots: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Launch a step; logits [MAX_SEQUENCES, V] of each sequence's last token and [len(slots), V] of the rows, valid
        until the next replay.
        """
        self.decode.set_slots(slots)
        self.buffers.fill(size[0], batch)
        self._graphs[size].replay()
        return self.decode.mixed_logits_RV[:MAX_SEQUENCES], self.decode.logits_BV[: len(slots)]
