"""A decode card that lends SMs: its decode steps on D of them, while a lent prefill step runs on P others.

Both are graphs, captured on streams of the two partitions, whose SMs their kernels keep wherever they are replayed.
Decode steps are replayed on the card's own stream, in turn with those of the whole card, so that drawing, state and
copies stay as they are. Prefill steps have a stream, buffers and a memory pool of their own, and so has what is drawn
behind them: between two streams torch orders nothing.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from green_ctx import GreenContextError
from nanovllm.engine.graph_capture import free_bytes
from nanovllm.engine.green_manager import GreenManager, Split, give_back
from nanovllm.engine.pipeline_ways import PARTITION_TOOLS, PartitionTools
from nanovllm.engine.prefill_graphs import PrefillGraphs
from nanovllm.engine.step_sizes import LENT_BUCKETS, lent_sizes
from nanovllm.layers.host import PinnedIds

if TYPE_CHECKING:  # a CPU build of torch comes without Triton
    from nanovllm.engine.decode_graphs import DecodeGraphs

logger = logging.getLogger("nanovllm.engine.lending")

FAILED = "Failed to initialize Green Context: %s; the decode card takes prompts into its decode steps"
RESULT_BUFFERS = 4  # more than there are lent steps in flight


class Lending:
    """Captured on construction, behind the graphs of the card's decode steps, on the stream and under the terms of
    those.

    manager: of a split into (decode steps', prompts') SMs; this owns it from now on. max_tokens: of a lent step.
    """

    def __init__(
        self, decode: DecodeGraphs, manager: GreenManager, max_tokens: int, tools: PartitionTools = PARTITION_TOOLS
    ) -> None:
        self._decode, self._manager, self._tools = decode, manager, tools
        self.split: Split = manager.current
        self._decode_stream, self.stream = self.split.attention_stream, self.split.ffn_stream
        started, before = time.perf_counter(), free_bytes(decode.slots.device)
        self._capture_decode()
        self._capture_prefill(max_tokens)
        num_graphs, taken_bytes = len(self._graphs), before - free_bytes(decode.slots.device)
        self.pinned_ids = PinnedIds(RESULT_BUFFERS, decode.max_num_seqs)
        taken = f"{time.perf_counter() - started:.1f} s, {taken_bytes / 1e6:.0f} MB"
        logger.info("lending %d:%d SMs: %d graphs of decode steps, %s", *self.split.granted, num_graphs, taken)

    def _capture_decode(self) -> None:
        decode = self._decode
        decode.set_slots(())  # of the runs ahead of the captures: no row belongs to anybody
        self._backend = self._tools.backend(decode.model, self.split.granted.attention_sms)
        self._buckets = [size for size in decode.buckets if size in (*LENT_BUCKETS, decode.max_num_seqs)]
        self._graphs = {
            bucket: decode.graph_of(partial(self._run_decode, bucket)) for bucket in reversed(self._buckets)
        }

    def _run_decode(self, bucket: int) -> None:
        """From the current stream to the partition's and back; what is made between stays with that stream."""
        current, stream = torch.cuda.current_stream(), self._decode_stream
        stream.wait_stream(current)
        with torch.cuda.stream(stream), self._tools.sized_for(self._manager.card.total, self.split.granted[0]):
            self._decode.run_model(bucket, self._backend)
        current.wait_stream(stream)

    def _capture_prefill(self, max_tokens: int) -> None:
        decode, sms = self._decode, self.split.granted.ffn_sms
        torch.cuda.synchronize(decode.slots.device)  # the stream has seen nothing of what others have queued
        with torch.cuda.stream(self.stream), self._tools.sized_for(self._manager.card.total, sms):
            self.prefill_graphs = PrefillGraphs(
                decode.model,
                decode.kv_cache,
                decode.max_context_tokens,
                max_tokens,
                lent_sizes(max_tokens),
                self._tools.backend(decode.model, sms),
            )

    def replay_model(self, slots: tuple[int, ...]) -> Tensor:
        """`DecodeGraphs.replay_model` on D SMs. Its bucket holds at least the rows that a draw reads."""
        self._decode.set_slots(slots)
        self._graphs[next(size for size in self._buckets if size >= len(slots))].replay()
        return self._decode.logits_BV[: len(slots)]

    def rehearse(self) -> None:
        """As of decode graphs."""
        self._decode.set_slots(())
        for graph in self._graphs.values():
            graph.replay()
        with torch.cuda.stream(self.stream):
            self.prefill_graphs.rehearse()

    def close(self) -> None:
        """Drop the graphs, then the partitions. No step may run any more; each handle of one has been waited for."""
        torch.cuda.synchronize(self._decode.slots.device)
        self._graphs = {}
        self.prefill_graphs.close()
        self.pinned_ids.clear()
        self._manager.close()


def start_lending(
    decode: DecodeGraphs | None,
    device: torch.device,
    sms: tuple[int, int],
    max_tokens: int,
    make_manager: Callable[..., GreenManager] = GreenManager,
    tools: PartitionTools = PARTITION_TOOLS,
) -> Lending | None:
    """Divide a decode card. None, and a warning with the cause, where that cannot be had.

    decode: what the card's decode steps are replayed from; None: they are not. sms: of decode steps, of prompts.
    """
    manager: GreenManager | None = None
    try:
        if decode is None:
            raise GreenContextError("only captured steps can run on partitions, and the card's are not captured")
        manager = make_manager(device, *sms)
        return Lending(decode, manager, max_tokens, tools)
    except (RuntimeError, ValueError) as error:  # GreenContextError and what CUDA raises are RuntimeErrors
        traceback.clear_frames(error.__traceback__)  # graphs that were captured must be gone before their streams are
        logger.warning(FAILED, error)
        give_back(manager)
        return None
