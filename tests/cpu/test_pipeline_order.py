"""The order of a pipelined step: complete, possible, and with both lanes at work."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.pipeline_order import StageCall, attention_queue, ffn_queue, pipeline_order

SIZES = st.integers(1, 6), st.integers(1, 9), st.booleans()


def previous(call: StageCall, lead: bool) -> tuple[str, int, int] | None:
    """The stage of the same micro-batch that must have ended before, by the model's dataflow."""
    lane, batch, layer, _ = call
    if lane == "ffn":
        return None if layer < 0 else ("attention", batch, layer)
    return None if layer == 0 and not lead else ("ffn", batch, layer - 1)


@given(*SIZES)
def test_every_stage_once_each_after_the_one_it_waits_for(batches: int, layers: int, lead: bool) -> None:
    seen: list[tuple[str, int, int]] = []
    for call in pipeline_order(batches, layers, lead):
        before = previous(call, lead)
        assert call.after == (before and before[0])
        if before is not None:
            mine = [stage for stage in seen if stage[1] == call.micro_batch]
            assert mine[-1] == before, "the mark it waits for is its micro-batch's last stage"
        seen.append(call[:3])
    by_lane = {lane: [stage[1:] for stage in seen if stage[0] == lane] for lane in ("attention", "ffn")}
    assert by_lane == {"attention": attention_queue(batches, layers), "ffn": ffn_queue(batches, layers, lead)}
    assert len(set(seen)) == len(seen) == batches * (2 * layers + lead)


def lane_ends(batches: int, layers: int, lead: bool, seconds: dict[str, float]) -> dict[tuple[str, int, int], float]:
    """When each stage ends, if its lane runs stages in order and each waits for the one before of its micro-batch."""
    ends: dict[tuple[str, int, int], float] = {}
    free = {"attention": 0.0, "ffn": 0.0}
    for call in pipeline_order(batches, layers, lead):
        before = previous(call, lead)
        begin = max(free[call.lane], ends[before] if before else 0.0)
        free[call.lane] = ends[call[:3]] = begin + seconds[call.lane]
    return ends


@given(st.integers(2, 5), st.integers(1, 9), st.booleans())
def test_equal_stages_keep_both_lanes_at_work_but_for_the_ends(batches: int, layers: int, lead: bool) -> None:
    ends = lane_ends(batches, layers, lead, {"attention": 1.0, "ffn": 1.0})
    assert max(ends.values()) == batches * (layers + lead) + (not lead), "the longer queue, and one stage to fill"
    for (lane, batch, _), end in ends.items():
        others = [stage for stage, e in ends.items() if e == end and stage[0] != lane]
        assert all(other[1] != batch for other in others), "a micro-batch is in one lane at a time"
    attention = sorted(end for (lane, _, _), end in ends.items() if lane == "attention")
    assert attention == [attention[0] + i for i in range(len(attention))], "attention never waits once it has begun"


@given(st.integers(2, 4), st.integers(2, 9), st.booleans(), st.floats(0.1, 1.0))
def test_the_slower_lane_never_waits_between_its_first_and_last_stage(
    batches: int, layers: int, lead: bool, share: float
) -> None:
    for slow in ("attention", "ffn"):
        seconds = {"attention": share, "ffn": share} | {slow: 1.0}
        ends = sorted(end for stage, end in lane_ends(batches, layers, lead, seconds).items() if stage[0] == slow)
        assert ends[-1] - ends[0] == pytest.approx(len(ends) - 1)


def test_one_micro_batch_takes_its_stages_in_turn() -> None:
    lanes = [call.lane for call in pipeline_order(1, 3)]
    assert lanes == ["attention", "ffn"] * 3
    assert [call.lane for call in pipeline_order(1, 2, lead=True)] == ["ffn", "attention"] * 2 + ["ffn"]


@pytest.mark.parametrize(("batches", "layers"), [(0, 3), (2, 0)])
def test_no_micro_batch_and_no_layer_are_refused(batches: int, layers: int) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        list(pipeline_order(batches, layers))


def test_it_imports_no_torch() -> None:
    code = "import sys, nanovllm.engine.pipeline_order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
