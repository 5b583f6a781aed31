"""`green_ctx` against a fake driver that knows which SMs each resource holds and what is still alive."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import green_ctx
from green_ctx import (
    GreenContextError,
    GreenPartition,
    get_sm_count_constraint,
    split_device_green_ctx,
    split_device_green_ctx_by_sm_count,
)

FLAG = 1  # both flags that green contexts require have this value in the driver


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_SUPPORTED = 801


class Resource:
    """What the driver calls CUdevResource, over an explicit set of SMs."""

    def __init__(self, sms: frozenset[int], splittable: bool) -> None:
        self.sm = SimpleNamespace(smCount=len(sms))
        self.sms = sms
        self.splittable = splittable


class FakeDriver:
    """The calls of `cuda.bindings.driver` that green contexts need, refusing what the real driver refuses."""

    CUresult = Status
    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM="sm")
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
    )
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=FLAG)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=FLAG)

    def __init__(self, num_sms: int = 132, capability: tuple[int, int] = (9, 0), version: int = 13000) -> None:
        self.num_sms = num_sms
        self.capability = capability
        self.version = version
        self.calls: list[str] = []
        self.fail_call: int | None = None
        self.fail_status = Status.CUDA_ERROR_OUT_OF_MEMORY
        self.primary_refs = 0
        self.context_stack: list[str] = []  # the thread's context stack
        self.contexts: dict[int, frozenset[int]] = {}
        self.streams: dict[int, int] = {}  # stream -> its context
        self._handles = iter(range(100, 10_000))

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        return self._counted(name, attribute) if name.startswith("cu") else attribute

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self.fail_call:
                return (self.fail_status, None, None, None)
            return function(*args)

        return call

    @property
    def alive(self) -> int:
        return len(self.contexts) + len(self.streams) + self.primary_refs + len(self.context_stack)

    def sms_of(self, stream: int) -> frozenset[int]:
        return self.contexts[self.streams[stream]]

    def cuDriverGetVersion(self) -> Any:
        return Status.CUDA_SUCCESS, self.version

    def cuInit(self, flags: int) -> Any:
        return (Status.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal: int) -> Any:
        return Status.CUDA_SUCCESS, f"device {ordinal}"

    def cuDevicePrimaryCtxRetain(self, device: str) -> Any:
        self.primary_refs += 1
        return Status.CUDA_SUCCESS, "primary"

    def cuCtxPushCurrent(self, context: str) -> Any:
        self.context_stack.append(context)
        return (Status.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> Any:
        return Status.CUDA_SUCCESS, self.context_stack.pop()

    def cuDevicePrimaryCtxRelease(self, device: str) -> Any:
        self.primary_refs -= 1
        return (Status.CUDA_SUCCESS,)

    def cuDeviceGetAttribute(self, attribute: str, device: str) -> Any:
        return Status.CUDA_SUCCESS, self.capability[attribute == "minor"]

    def cuDeviceGetDevResource(self, device: str, kind: str) -> Any:
        return Status.CUDA_SUCCESS, Resource(frozenset(range(self.num_sms)), splittable=True)

    def cuDevSmResourceSplitByCount(self, num_groups: int, resource: Resource, flags: int, min_count: int) -> Any:
        minimum, alignment = get_sm_count_constraint(*self.capability)
        if not resource.splittable or not 0 < min_count <= len(resource.sms):
            return Status.CUDA_ERROR_INVALID_VALUE, None, None, None
        size = max(minimum, -(-min_count // alignment) * alignment)
        sms = sorted(resource.sms)
        granted = min(num_groups, len(sms) // size)
        groups = [Resource(frozenset(sms[i * size : (i + 1) * size]), False) for i in range(num_groups)]
        return Status.CUDA_SUCCESS, groups, granted, Resource(frozenset(sms[granted * size :]), False)

    def cuDevResourceGenerateDesc(self, resources: list[Resource], num_resources: int) -> Any:
        assert num_resources == len(resources) == 1
        return Status.CUDA_SUCCESS, resources[0].sms

    def cuGreenCtxCreate(self, descriptor: frozenset[int], device: str, flags: int) -> Any:
        if not descriptor or flags != FLAG or self.primary_refs < 1:
            return Status.CUDA_ERROR_INVALID_VALUE, None
        handle = next(self._handles)
        self.contexts[handle] = descriptor
        return Status.CUDA_SUCCESS, handle

    def cuGreenCtxGetDevResource(self, context: int, kind: str) -> Any:
        return Status.CUDA_SUCCESS, Resource(self.contexts[context], splittable=True)

    def cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> Any:
        if flags != FLAG:
            return Status.CUDA_ERROR_INVALID_VALUE, None
        handle = next(self._handles)
        self.streams[handle] = context
        return Status.CUDA_SUCCESS, handle

    def cuStreamSynchronize(self, stream: int) -> Any:
        ready = stream in self.streams and self.context_stack
        return (Status.CUDA_SUCCESS if ready else Status.CUDA_ERROR_INVALID_VALUE,)

    def cuStreamDestroy(self, stream: int) -> Any:
        del self.streams[stream]
        return (Status.CUDA_SUCCESS,)

    def cuGreenCtxDestroy(self, context: int) -> Any:
        assert context not in self.streams.values(), "a context must outlive its streams"
        del self.contexts[context]
        return (Status.CUDA_SUCCESS,)


Install = Callable[..., FakeDriver]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make green_ctx use a fake driver; a stream is then its bare handle."""

    def do(**properties: Any) -> FakeDriver:
        driver = FakeDriver(**properties)
        monkeypatch.setattr(green_ctx, "_load_driver", lambda: driver)
        monkeypatch.setattr(green_ctx, "_wrap_stream", lambda handle, index: handle)
        return driver

    return do


def test_constraint_of_each_compute_capability() -> None:
    pairs = {(6, 0): (1, 1), (7, 5): (2, 2), (8, 0): (4, 2), (8, 9): (4, 2), (9, 0): (8, 8), (12, 0): (8, 8)}
    assert {capability: get_sm_count_constraint(*capability) for capability in pairs} == pairs
    with pytest.raises(GreenContextError, match="5.2"):
        get_sm_count_constraint(5, 2)


@pytest.mark.parametrize(
    ("num_sms", "capability", "asked", "granted"),
    [
        (132, (9, 0), [1], [8, 124]),
        (132, (9, 0), [12], [16, 116]),
        (132, (9, 0), [66], [72, 60]),
        (132, (9, 0), [100], [104, 28]),
        (132, (9, 0), [128], [128, 4]),
        (132, (9, 0), [8, 16, 24], [8, 16, 24, 84]),
        (132, (9, 0), [64, 60], [64, 64, 4]),
        (108, (8, 0), [1, 5], [4, 6, 98]),
        (80, (7, 0), [1, 3], [2, 4, 74]),
        (56, (6, 0), [1, 3], [1, 3, 52]),
    ],
)
def test_counts_are_rounded_up_and_partitions_are_disjoint(
    install: Install, num_sms: int, capability: tuple[int, int], asked: list[int], granted: list[int]
) -> None:
    driver = install(num_sms=num_sms, capability=capability)
    partition = split_device_green_ctx_by_sm_count(0, asked)
    streams, resources = partition
    assert [resource.sm.smCount for resource in resources] == partition.sm_counts == granted
    sets = [driver.sms_of(stream) for stream in streams]
    assert [len(sms) for sms in sets] == granted
    assert frozenset().union(*sets) == frozenset(range(num_sms))  # with the sizes adding up: disjoint
    assert len(driver.contexts) == len(driver.streams) == len(granted)  # no temporary context is left
    assert not driver.context_stack


def test_equal_groups_come_from_one_split(install: Install) -> None:
    driver = install()
    streams, resources = split_device_green_ctx("cuda:0", 2, 10)
    assert [resource.sm.smCount for resource in resources] == [16, 16, 100]
    assert frozenset().union(*map(driver.sms_of, streams)) == frozenset(range(132))
    assert driver.calls.count("cuDevSmResourceSplitByCount") == 1


def test_close_releases_everything_once(install: Install) -> None:
    driver = install()
    partition = split_device_green_ctx_by_sm_count(0, [8, 16])
    assert isinstance(partition, GreenPartition) and isinstance(partition, tuple) and len(partition) == 2
    partition.close()
    assert driver.alive == 0
    assert driver.calls.index("cuStreamSynchronize") < driver.calls.index("cuStreamDestroy")
    partition.close()
    assert driver.calls.count("cuStreamDestroy") == 3
    with split_device_green_ctx(0, 1, 8) as (streams, _):
        assert len(streams) == 2 and driver.alive == 5
    assert driver.alive == 0


def test_a_failure_while_closing_is_raised_after_the_rest_is_released(install: Install) -> None:
    driver = install()
    partition = split_device_green_ctx_by_sm_count(0, [8])
    driver.fail_call = len(driver.calls) + 1
    with pytest.raises(GreenContextError, match="cuStreamSynchronize failed: CUDA_ERROR_OUT_OF_MEMORY"):
        partition.close()
    assert driver.alive == 0


@pytest.mark.parametrize("counts", [[], [0], [8, -8]])
def test_counts_below_one_are_refused(install: Install, counts: list[int]) -> None:
    driver = install()
    with pytest.raises(ValueError, match="at least 1"):
        split_device_green_ctx_by_sm_count(0, counts)
    with pytest.raises(ValueError, match="at least 1"):
        split_device_green_ctx(0, len(counts), min(counts, default=8))
    assert not driver.calls


def test_counts_that_do_not_fit_are_refused(install: Install) -> None:
    driver = install()
    with pytest.raises(ValueError, match=r"\[64, 68\] asked, \[64, 72\] when rounded up: 136 SMs, but 132"):
        split_device_green_ctx_by_sm_count(0, [64, 68])
    with pytest.raises(ValueError, match=r"\[16, 16, .*: 144 SMs, but 132"):
        split_device_green_ctx(0, 9, 12)
    assert driver.alive == 0
    driver.num_sms = 128
    with pytest.raises(ValueError, match="at least 1 must remain"):
        split_device_green_ctx_by_sm_count(0, [128])
    assert driver.alive == 0
    driver = install(num_sms=8, capability=(8, 0))
    with pytest.raises(ValueError, match=r"\[1, 3\] asked, \[4, 4\] when rounded up"):
        split_device_green_ctx_by_sm_count(0, [1, 3])


def test_fewer_groups_than_asked_is_an_error(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install()
    split = FakeDriver.cuDevSmResourceSplitByCount

    def one_less(self: FakeDriver, num_groups: int, *rest: Any) -> Any:
        status, groups, granted, remainder = split(self, num_groups, *rest)
        return status, groups, granted - 1, remainder

    monkeypatch.setattr(FakeDriver, "cuDevSmResourceSplitByCount", one_less)
    with pytest.raises(GreenContextError, match="3 groups of 8 SMs asked, only 2 granted"):
        split_device_green_ctx(0, 3, 8)
    assert driver.alive == 0


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:x", -1, None, True])
def test_a_device_without_an_index_is_refused(install: Install, device: Any) -> None:
    install()
    with pytest.raises(ValueError, match="device must be an index"):
        split_device_green_ctx_by_sm_count(device, [8])


def test_a_torch_device_is_accepted(install: Install) -> None:
    torch = pytest.importorskip("torch")
    install()
    assert split_device_green_ctx_by_sm_count(torch.device("cuda", 1), [8]).sm_counts == [8, 124]


def num_driver_calls(install: Install) -> int:
    driver = install()
    split_device_green_ctx_by_sm_count(0, [8, 16])
    return len(driver.calls)


def test_any_failing_driver_call_is_named_and_leaves_nothing_behind(install: Install) -> None:
    """Each call of a split that works is made to fail once, the release of the temporary context included."""
    seen = set()
    for fail_call in range(num_driver_calls(install)):
        driver = install()
        driver.fail_call = fail_call
        with pytest.raises(GreenContextError, match="CUDA_ERROR_OUT_OF_MEMORY") as caught:
            split_device_green_ctx_by_sm_count(0, [8, 16])
        name = driver.calls[fail_call]
        assert str(caught.value).startswith(f"{name} failed")
        assert driver.alive == (1 if name == "cuGreenCtxDestroy" else 0), name
        seen.add(name)
    assert len(seen) == 14


def test_a_failure_while_rolling_back_does_not_hide_the_cause(
    install: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = install()
    broken = (Status.CUDA_ERROR_INVALID_VALUE,)
    monkeypatch.setattr(FakeDriver, "cuGreenCtxDestroy", lambda self, context: broken)
    monkeypatch.setattr(FakeDriver, "cuGreenCtxStreamCreate", lambda self, *args: (Status(2), None))
    with caplog.at_level(logging.WARNING, "nanovllm"), pytest.raises(GreenContextError, match="StreamCreate"):
        split_device_green_ctx_by_sm_count(0, [8])
    assert "cuGreenCtxDestroy failed" in caplog.text
    assert driver.primary_refs == 0


def test_a_stream_that_cannot_be_wrapped_releases_everything(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install()

    def no_torch(handle: int, index: int) -> None:
        raise ImportError("no torch")

    monkeypatch.setattr(green_ctx, "_wrap_stream", no_torch)
    with pytest.raises(ImportError, match="no torch"):
        split_device_green_ctx_by_sm_count(0, [8])
    assert driver.alive == 0 and "cuGreenCtxStreamCreate" in driver.calls


def test_old_drivers_and_old_devices_are_refused(install: Install) -> None:
    driver = install(version=12030)
    with pytest.raises(GreenContextError, match="driver too old: it has CUDA 12030, needed is 12040"):
        split_device_green_ctx_by_sm_count(0, [8])
    assert driver.calls == ["cuDriverGetVersion"]
    driver = install(capability=(5, 2))
    with pytest.raises(GreenContextError, match="compute capability 5.2"):
        split_device_green_ctx_by_sm_count(0, [8])
    driver = install()
    driver.fail_call, driver.fail_status = 5, Status.CUDA_ERROR_NOT_SUPPORTED
    with pytest.raises(GreenContextError, match="CUDA_ERROR_NOT_SUPPORTED; no green contexts on this device"):
        split_device_green_ctx_by_sm_count(0, [8])
    assert driver.calls[5] == "cuDeviceGetDevResource" and driver.alive == 0


def test_a_machine_without_driver_library_and_an_old_cuda_python_are_named(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()

    def no_library(self: FakeDriver) -> None:
        raise RuntimeError("libcuda is missing")

    monkeypatch.setattr(FakeDriver, "cuDriverGetVersion", no_library)
    with pytest.raises(GreenContextError, match="cuDriverGetVersion is not available: libcuda is missing"):
        split_device_green_ctx_by_sm_count(0, [8])
    monkeypatch.delattr(FakeDriver, "cuDriverGetVersion")
    with pytest.raises(GreenContextError, match="this cuda-python has no cuDriverGetVersion"):
        split_device_green_ctx_by_sm_count(0, [8])


def test_no_cuda_python_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(GreenContextError, match=r'pip install "cuda-python>=13"'):
        split_device_green_ctx_by_sm_count(0, [8])


def test_the_module_imports_neither_torch_nor_the_package() -> None:
    code = "import sys, green_ctx; assert not {'torch', 'nanovllm', 'cuda'} & set(sys.modules), sorted(sys.modules)"
    root = Path(green_ctx.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
