"""The ways in which a card can run a pipelined decode step: a split, a boundary, and what each lane computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from nanovllm.engine.green_manager import CardSms, Split
from nanovllm.engine.kv_cache import KVCache
from nanovllm.engine.pipeline_order import Lane
from nanovllm.engine.pipeline_step import Boundary, Lanes, StageBackends, Stages, StreamLanes
from nanovllm.layers.attention import AttentionBackend
from nanovllm.models.qwen3 import Qwen3ForCausalLM

# Of the card's SMs, attention's share in the splits that `auto` tries: 20, 28, 36 and 52 of 132. Since attention reads
# through a ring there, none with more than 36 was the fastest where any was faster than the sequential step
# (docs/benchmarks.md); the last one is for contexts longer than those.
AUTO_ATTENTION_SHARES = (0.15, 0.21, 0.27, 0.39)


class PipelinedWay(NamedTuple):
    """One way to run a pipelined step. `name`: SMs of attention and FFN, and the boundary."""

    name: str
    split: Split
    stages: Stages
    lanes: Lanes


SizedFor = Callable[[Lane], AbstractContextManager[object]]


class PartitionTools(NamedTuple):
    """What makes a lane's kernels fit its partition: a backend for a number of SMs, and what must be set while products
    are queued (card's SMs, partition's SMs). lanes: of the attention's and the FFN's stream."""

    backend: Callable[[Qwen3ForCausalLM, int], AttentionBackend]
    sized_for: Callable[[int, int], AbstractContextManager[object]]
    lanes: Callable[[Any, Any, SizedFor], Lanes] = StreamLanes


def auto_counts(card: CardSms) -> list[tuple[None, int]]:
    """(attention's, FFN's) SMs of the splits to try. FFN's are whole groups: attention has the remainder."""
    groups = [round(card.total * (1 - share)) // card.alignment * card.alignment for share in AUTO_ATTENTION_SHARES]
    return [(None, ffn_sms) for ffn_sms in dict.fromkeys(groups) if card.minimum <= ffn_sms < card.total]


def make_way(
    model: Qwen3ForCausalLM, kv_cache: KVCache, card_sms: int, split: Split, boundary: Boundary, tools: PartitionTools
) -> PipelinedWay:
    """The way over a split; its lanes are the split's streams."""
    sms: dict[Lane, int] = {"attention": split.granted.attention_sms, "ffn": split.granted.ffn_sms}
    backends = StageBackends(tools.backend(model, sms["attention"]), tools.backend(model, sms["ffn"]))
    streams = split.attention_stream, split.ffn_stream
    lanes = tools.lanes(*streams, lambda lane: tools.sized_for(card_sms, sms[lane]))
    name = f"{sms['attention']}:{sms['ffn']} {boundary}"
    return PipelinedWay(name, split, Stages(model, kv_cache, backends, boundary), lanes)


def triton_backend(model: Qwen3ForCausalLM, num_sms: int) -> AttentionBackend:
    """Kernels of ours that are told how many SMs there are; the model's own backend where it has none of them."""
    if model.attention.elementwise.name != "triton":
        return model.attention
    from nanovllm.layers.attention.triton import TritonAttention  # here: a CPU build of torch comes without Triton

    return TritonAttention(model.config.head_dim, num_sms=num_sms)


@contextmanager
def sm_limited_blas(card_sms: int, num_sms: int) -> Iterator[None]:
    """Products queued inside are cuBLASLt's, told how many SMs there are: plain cuBLAS picks its tiles for the card.

    Both settings are the whole process's: for captures, with no other thread at products.
    """
    library, carveout = torch.backends.cuda.preferred_blas_library(), torch._C._get_sm_carveout_experimental()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch._C._set_sm_carveout_experimental(card_sms - num_sms)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(carveout)
        torch.backends.cuda.preferred_blas_library(library)


PARTITION_TOOLS = PartitionTools(triton_backend, sm_limited_blas)  # for captures
# Steps are launched eagerly while other threads are at products: nothing of the whole process may be set.
EAGER_TOOLS = PartitionTools(triton_backend, lambda card_sms, num_sms: nullcontext())
