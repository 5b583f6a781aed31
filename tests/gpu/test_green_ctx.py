"""`green_ctx` on a real GPU: what the driver grants, and on which SMs kernels of each stream really run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python", exc_type=ImportError)
triton = pytest.importorskip("triton", reason="the SM probe is a Triton kernel", exc_type=ImportError)
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import triton.language as tl  # noqa: E402

from green_ctx import (  # noqa: E402
    GreenContextError,
    get_sm_count_constraint,
    split_device_green_ctx,
    split_device_green_ctx_by_sm_count,
)

DEVICE = torch.device("cuda", 0)
PROGRAMS_PER_SM = 256  # more than fit at once, so every SM that may be used gets some


@triton.jit
def record_smid(sm_ids_ptr, duration_ns):
    """Each program stays for `duration_ns`, then writes the number of the SM it ran on."""
    start = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    now = start
    while now - start < duration_ns:
        now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    sm_id = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(sm_ids_ptr + tl.program_id(0), sm_id)


def num_sms() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


def rounded_up(count: int) -> int:
    minimum, alignment = get_sm_count_constraint(*torch.cuda.get_device_capability(DEVICE))
    return max(minimum, -(-count // alignment) * alignment)


def sms_used(*streams: Any) -> list[set[int]]:
    """SMs that the probe ran on, one set a stream; all streams run at the same time."""
    ids = [torch.full((PROGRAMS_PER_SM * num_sms(),), -1, dtype=torch.int32, device=DEVICE) for _ in streams]
    torch.cuda.synchronize(DEVICE)  # the streams do not wait for the default stream that filled the tensors
    for stream, out in zip(streams, ids, strict=True):
        with torch.cuda.stream(stream):
            record_smid[(out.numel(),)](out, 10_000, num_warps=1)
    torch.cuda.synchronize(DEVICE)
    used = [set(out.tolist()) for out in ids]
    assert all(-1 not in sms for sms in used)
    return used


def assert_partitioned(streams: list[Any], granted: list[int]) -> None:
    for used in (sms_used(*streams), [sms_used(stream)[0] for stream in streams]):  # together, and each alone
        assert all(len(sms) <= count for sms, count in zip(used, granted, strict=True)), (used, granted)
        assert sum(map(len, used)) == len(set().union(*used)), f"shared SMs: {used}"


@pytest.mark.parametrize("asked", [1, 12, 66, 100])
def test_one_group_is_rounded_up_and_the_rest_remains(asked: int) -> None:
    """On 132 SMs of compute capability 9.0: 8 + 124, 16 + 116, 72 + 60, 104 + 28."""
    if rounded_up(asked) >= num_sms():
        pytest.skip(f"{asked} SMs do not fit into {num_sms()}")
    with split_device_green_ctx_by_sm_count(DEVICE, [asked]) as (streams, resources):
        granted = [resource.sm.smCount for resource in resources]
        assert granted == [rounded_up(asked), num_sms() - rounded_up(asked)]
        assert_partitioned(streams, granted)


def test_the_probe_sees_more_sms_without_a_partition() -> None:
    """Otherwise the tests above would pass on streams that are not partitioned at all."""
    (used,) = sms_used(torch.cuda.Stream(DEVICE))
    assert len(used) > num_sms() // 2
    with split_device_green_ctx_by_sm_count(DEVICE, [1]) as (streams, resources):
        (used_in_group,) = sms_used(streams[0])
    assert 0 < len(used_in_group) <= resources[0].sm.smCount < len(used)


@pytest.mark.parametrize(
    ("split", "num_streams"),
    [
        (lambda: split_device_green_ctx_by_sm_count(DEVICE, [8, 16]), 3),
        (lambda: split_device_green_ctx(DEVICE, 2, 16), 3),
    ],
    ids=["two_sizes", "two_equal_groups"],
)
def test_several_groups_share_no_sm(split: Callable[[], Any], num_streams: int) -> None:
    if num_sms() < 48:
        pytest.skip("too few SMs for two groups and a remainder")
    with split() as (streams, resources):
        granted = [resource.sm.smCount for resource in resources]
        assert len(streams) == len(granted) == num_streams
        assert sum(granted) == num_sms()
        assert_partitioned(streams, granted)


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="when rounded up"):
        split_device_green_ctx_by_sm_count(DEVICE, [num_sms() + 1])
    with pytest.raises(GreenContextError, match="cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
        split_device_green_ctx_by_sm_count(10_000, [8])


def test_twenty_cycles_of_create_use_close() -> None:
    total = torch.zeros(1024, device=DEVICE)
    for _ in range(20):
        with split_device_green_ctx_by_sm_count(DEVICE, [num_sms() // 2]) as (streams, _):
            torch.cuda.synchronize(DEVICE)
            for stream in streams:
                with torch.cuda.stream(stream):
                    total.add_(1)
                stream.synchronize()
    assert total.eq(40).all()


def test_close_waits_for_the_work_and_needs_no_current_context() -> None:
    """A worker thread that has made no other CUDA call may close, while the stream is still busy."""
    partition = split_device_green_ctx_by_sm_count(DEVICE, [1])
    out = torch.full((1,), -1, dtype=torch.int32, device=DEVICE)
    torch.cuda.synchronize(DEVICE)
    with torch.cuda.stream(partition[0][0]):
        record_smid[(1,)](out, 50_000_000, num_warps=1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(partition.close).result(timeout=60)
    assert out.item() >= 0
