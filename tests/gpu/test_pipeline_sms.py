"""On which SMs each lane of a pipelined decode step really runs: probes, and the lanes' own kernels, tell theirs."""

from __future__ import annotations

import random
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python", exc_type=ImportError)
triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper card, for its attention kernel", allow_module_level=True)

from nanovllm.engine.green_manager import GreenManager  # noqa: E402
from nanovllm.engine.pipeline_order import Lane  # noqa: E402
from nanovllm.engine.pipeline_step import (  # noqa: E402
    BOUNDARIES,
    Boundary,
    MicroBatch,
    StageBackends,
    StageRun,
    State,
    run_stages,
)
from nanovllm.engine.pipeline_ways import PipelinedWay  # noqa: E402
from nanovllm.kernels.paged_decode_hopper import RingShape, count_shares, paged_decode_ring  # noqa: E402
from nanovllm.kernels.silu_mul import silu_mul  # noqa: E402
from nanovllm.layers.attention import DecodeMetadata  # noqa: E402
from nanovllm.layers.attention.triton import TritonAttention  # noqa: E402
from nanovllm.layers.elementwise import TritonElementwise  # noqa: E402
from nanovllm.models.qwen3 import Qwen3ForCausalLM  # noqa: E402
from tests.gpu import test_pipeline  # noqa: E402
from tests.gpu.test_green_ctx import PROGRAMS_PER_SM, num_sms, record_smid  # noqa: E402
from tests.gpu.test_pipeline import DEVICE, capture, make_case, micro_batches, way_of  # noqa: E402

# Of both micro-batches. Then the SiLU product of one of them is 2,400 programs of 4 warps, of which an SM holds 16.
NUM_ROWS = 1600
ROW_PROGRAMS = 3  # of a SiLU product: 1,024 of 3,072 elements each
model, manager = test_pipeline.model, test_pipeline.manager  # fixtures
LANES: tuple[Lane, Lane] = ("attention", "ffn")
SmIds = dict[Lane, Tensor]  # int32, -1 where no program has written: by launch or by stage, then by program


class TellingAttention(TritonAttention):
    """Its decode kernel is told of the whole card, so that it has more programs than a partition holds at once, and
    writes where they ran to the next one of `sm_ids`, int32 [launches, shares, KV heads]."""

    def __init__(self, head_dim: int, sms: int, sm_ids: Tensor) -> None:
        super().__init__(head_dim, sms)
        self._sm_ids = cycle(sm_ids.unbind())

    def decode(
        self, q_BHD: Tensor, k_pages: Tensor, v_pages: Tensor, meta: DecodeMetadata, out: Tensor | None = None
    ) -> Tensor:
        tables, lens, longest = meta.block_tables, meta.context_lens, meta.max_context_tokens
        options: dict[str, Any] = dict(num_sms=num_sms(), out=out, sm_ids=next(self._sm_ids))
        return paged_decode_ring(q_BHD, k_pages, v_pages, tables, lens, longest, **options)


class TellingElementwise(TritonElementwise):
    """Its SiLU product writes where its programs ran to the next one of `sm_ids`, int32 [launches, rows, blocks]."""

    def __init__(self, sms: int, sm_ids: Tensor) -> None:
        super().__init__(sms)
        self._sm_ids = cycle(sm_ids.unbind())

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up, sm_ids=next(self._sm_ids))


def nobody(*shape: int) -> Tensor:
    return torch.full(shape, -1, dtype=torch.int32, device=DEVICE)


def let_kernels_tell(way: PipelinedWay) -> SmIds:
    """Every launch of a step has a place of its own: a layer's of each micro-batch."""
    attention, ffn = way.stages.backends
    assert isinstance(attention, TritonAttention) and isinstance(ffn, TritonAttention)
    launches, kv_heads = 2 * way.stages.num_layers, way.stages.model.config.num_key_value_heads
    sm_ids: SmIds = {
        "attention": nobody(launches, count_shares(num_sms(), RingShape(), kv_heads), kv_heads),
        "ffn": nobody(launches, NUM_ROWS // 2, ROW_PROGRAMS),
    }
    granted, head_dim = way.split.granted, way.stages.model.config.head_dim
    ffn.elementwise = TellingElementwise(granted.ffn_sms, sm_ids["ffn"])
    way.stages.backends = StageBackends(
        TellingAttention(head_dim, granted.attention_sms, sm_ids["attention"]),
        ffn,
    )
    return sm_ids


def add_probes(way: PipelinedWay, batches: list[MicroBatch]) -> tuple[StageRun, SmIds]:
    """One behind the kernels of every stage of two layers, in its stream: more programs than the card holds at once."""
    sm_ids: SmIds = {lane: nobody(4, PROGRAMS_PER_SM * num_sms()) for lane in LANES}
    numbers = {id(batch): number for number, batch in enumerate(batches)}

    def run(lane: Lane, layer: int, batch: MicroBatch, state: State) -> State:
        result = way.stages.run(lane, layer, batch, state)
        if layer in (0, 1):
            out = sm_ids[lane][2 * layer + numbers[id(batch)]]
            record_smid[(out.numel(),)](out, 3_000, num_warps=1)
        return result

    return run, sm_ids


def take(sm_ids: SmIds) -> dict[Lane, set[int]]:
    """The SMs that each lane ran on; every program must have written, and is to write again."""
    torch.cuda.synchronize()
    used = {lane: set(out.flatten().tolist()) for lane, out in sm_ids.items()}
    assert all(-1 not in sms for sms in used.values()), "not every program has run"
    for out in sm_ids.values():
        out.fill_(-1)
    torch.cuda.synchronize()
    return used


@torch.inference_mode()
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("attention_sms", [28, 60])
def test_each_lane_runs_on_its_own_sms_eagerly_and_in_replays(
    model: Qwen3ForCausalLM, manager: GreenManager, attention_sms: int, boundary: Boundary
) -> None:
    """Attention's kernel and the SiLU product in every layer, and probes behind them: all of a lane's SMs each, as many
    as were granted, and none of the other lane's."""
    case = make_case(model, random.Random(0), NUM_ROWS, 60)
    way, batches = way_of(model, case, manager, attention_sms, boundary), micro_batches(case, 2)
    ours, (probed, probes) = let_kernels_tell(way), add_probes(way, batches)

    def run() -> None:
        run_stages(way.stages, way.lanes, batches, probed)

    def check() -> None:
        by_probes, by_ours = take(probes), take(ours)
        assert by_probes["attention"].isdisjoint(by_probes["ffn"])
        assert tuple(len(by_probes[lane]) for lane in LANES) == way.split.granted
        assert by_ours == by_probes

    graph = capture(run)
    check()  # of the eager run: what a capture queues does not run
    for _ in range(2):
        graph.replay()
        check()
