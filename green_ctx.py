"""SM partitions of one CUDA device, made with green contexts through cuda-python (`cuda.bindings.driver`).

Kernels on a stream made from a green context run on that context's SMs only::

    partition = split_device_green_ctx_by_sm_count("cuda:1", [44])
    (attention, ffn), resources = partition            # partition.sm_counts: [48, 84] on a card of 132 SMs
    with torch.cuda.stream(attention): ...
    partition.close()                                  # or: with split_...(...) as (streams, resources):

Lifetime: the caller destroys, with `close()`. Garbage collection destroys nothing, since a captured graph may
use the streams after the last Python reference is gone: a pair dropped without `close()` keeps its contexts
until the process ends. Making contexts takes milliseconds: make them once, keep them.

The module stands alone: it imports torch only to wrap the finished streams. Function names and return shapes
are those of FlashInfer's `green_ctx`. Source: CUDA driver API, section "Green Contexts".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("nanovllm.green_ctx")

MIN_DRIVER_VERSION = 12040  # the first with green contexts, in cuDriverGetVersion's 1000 * major + 10 * minor


class GreenContextError(RuntimeError):
    """No green contexts here: no cuda-python, an old driver, an unfit device, a driver call that failed."""


class GreenPartition(tuple[list[Any], list[Any]]):
    """The pair `(streams, resources)`, one entry a group and the remainder last, and the owner of both.

    `streams`: `torch.cuda.ExternalStream`. `resources`: `CUdevResource`, SMs granted in `sm.smCount`.
    """

    _made: ExitStack  # all that close() destroys

    def __new__(cls, streams: list[Any], resources: list[Any], made: ExitStack) -> GreenPartition:
        self = super().__new__(cls, (streams, resources))
        self._made = made
        return self

    @property
    def sm_counts(self) -> list[int]:
        """SMs granted to each stream, the remainder last."""
        return [int(resource.sm.smCount) for resource in self[1]]

    def close(self) -> None:
        """Wait for the streams' work, then destroy streams and contexts; a second call does nothing.

        Graphs captured on the streams and tensors with `record_stream` on them must be gone before, and no
        capture may be under way. `GreenContextError` if a driver call fails, after making the others.
        """
        self._made.close()

    def __enter__(self) -> GreenPartition:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def get_sm_count_constraint(major: int, minor: int) -> tuple[int, int]:
    """(smallest group, alignment) in SMs, documented for cuDevSmResourceSplitByCount; an error below 6.0."""
    if major < 6:
        raise GreenContextError(f"compute capability {major}.{minor} has no green contexts; 6.0 or newer has")
    return {6: (1, 1), 7: (2, 2), 8: (4, 2)}.get(major, (8, 8))


def split_device_green_ctx_by_sm_count(device: int | str | torch.device, sm_counts: Sequence[int]) -> GreenPartition:
    """Split a device into one partition for each SM count, and one of the SMs that remain.

    Args:
        device: index, or "cuda:1", or a `torch.device` with an index.
        sm_counts: SMs asked for each partition; each is rounded up to what the device can grant.

    Returns:
        `(streams, resources)`, `len(sm_counts) + 1` entries each, to be closed by the caller.

    Raises:
        ValueError: no counts, a count below 1, or rounded counts that leave no SM to the remainder.
        GreenContextError: see there; nothing stays allocated.
    """
    asked = list(sm_counts)
    if not asked or min(asked) < 1:
        raise ValueError(f"sm_counts must be one or more counts of at least 1 SM, got {asked}")
    return _partition(device, asked, _split_in_turn)


def split_device_green_ctx(device: int | str | torch.device, num_groups: int, min_count: int) -> GreenPartition:
    """Split a device into `num_groups` equal partitions of at least `min_count` SMs, and the remainder.

    Arguments, result (`num_groups + 1` entries) and errors as for `split_device_green_ctx_by_sm_count`.
    """
    if num_groups < 1 or min_count < 1:
        raise ValueError(f"num_groups and min_count must be at least 1, got {num_groups} and {min_count}")
    return _partition(device, [min_count] * num_groups, _split_equally)


def _partition(device: Any, asked: list[int], split: Callable[..., list[Any]]) -> GreenPartition:
    index = _device_index(device)
    made = ExitStack()
    try:
        card = _Card(_load_driver(), index, made)
        whole = card.sm_resource()
        counts = _rounded_counts(asked, int(whole.sm.smCount), card.constraint())
        detours = made.enter_context(ExitStack())
        resources = split(card, whole, counts, detours)
        handles = [card.make_stream(card.make_context(resource, made), made) for resource in resources]
        detours.close()
        card.leave(made)
        return GreenPartition([_wrap_stream(handle, index) for handle in handles], resources, made)
    except BaseException:
        _release_after_failure(made)
        raise


def _rounded_counts(asked: list[int], available: int, constraint: tuple[int, int]) -> list[int]:
    minimum, alignment = constraint
    rounded = [max(minimum, -(-count // alignment) * alignment) for count in asked]
    if sum(rounded) >= available:  # the remainder is a partition too and cannot be empty
        total = f"{sum(rounded)} SMs, but {available} are available and at least 1 must remain"
        raise ValueError(f"SM counts {asked} asked, {rounded} when rounded up: {total}")
    return rounded


def _split_equally(card: _Card, whole: Any, counts: list[int], detours: ExitStack) -> list[Any]:
    groups, rest = card.split(whole, len(counts), counts[0])
    return [*groups, rest]


def _split_in_turn(card: _Card, whole: Any, counts: list[int], detours: ExitStack) -> list[Any]:
    """One driver split gives equal groups, and two splits of the same input overlap: so split off one group,
    then the next from what remains. The driver takes only what a device or a context reports, not the output
    of a split: a context made on the remainder (kept in `detours`) reports it in a form to split again."""
    groups, rest = card.split(whole, 1, counts[0])
    for count in counts[1:]:
        context = card.make_context(rest, detours)
        more, rest = card.split(card.sm_resource(context), 1, count)
        groups += more
    return [*groups, rest]


class _Card:
    """The driver calls on one device. What they make is released by the stack they are given, newest first.

    The primary context is retained (otherwise each green context initialises and drops it), and current from
    construction to `leave` and again while `made` releases, on whatever thread that happens.
    """

    def __init__(self, driver: Any, index: int, made: ExitStack) -> None:
        self._driver = driver
        version = self._call("cuDriverGetVersion")
        if version < MIN_DRIVER_VERSION:
            raise GreenContextError(f"driver too old: it has CUDA {version}, needed is {MIN_DRIVER_VERSION}")
        self._sm_kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", index)
        self._primary = self._call("cuDevicePrimaryCtxRetain", self._device)
        made.callback(self._call, "cuDevicePrimaryCtxRelease", self._device)
        self._call("cuCtxPushCurrent", self._primary)
        made.callback(self._call, "cuCtxPopCurrent")

    def leave(self, made: ExitStack) -> None:
        self._call("cuCtxPopCurrent")
        made.callback(self._call, "cuCtxPushCurrent", self._primary)

    def _call(self, name: str, *args: Any) -> Any:
        function = getattr(self._driver, name, None)
        if function is None:
            raise GreenContextError(f"this cuda-python has no {name}; version 13 or newer is needed")
        try:
            status, *values = function(*args)
        except RuntimeError as error:  # the binding found no driver library, or no such function in it
            raise GreenContextError(f"{name} is not available: {error}") from error
        if status != self._driver.CUresult.CUDA_SUCCESS:
            hint = "; no green contexts on this device" if status.name == "CUDA_ERROR_NOT_SUPPORTED" else ""
            raise GreenContextError(f"{name} failed: {status.name}{hint}")
        return values[0] if len(values) == 1 else values

    def constraint(self) -> tuple[int, int]:
        kinds = self._driver.CUdevice_attribute
        names = [f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR")]
        read = [self._call("cuDeviceGetAttribute", getattr(kinds, name), self._device) for name in names]
        return get_sm_count_constraint(*read)

    def sm_resource(self, context: Any = None) -> Any:
        if context is None:
            return self._call("cuDeviceGetDevResource", self._device, self._sm_kind)
        return self._call("cuGreenCtxGetDevResource", context, self._sm_kind)

    def split(self, resource: Any, num_groups: int, sm_count: int) -> tuple[list[Any], Any]:
        groups, granted, rest = self._call("cuDevSmResourceSplitByCount", num_groups, resource, 0, sm_count)
        if granted < num_groups:  # clusters and dead SMs can make it fewer than the arithmetic allows
            raise GreenContextError(f"{num_groups} groups of {sm_count} SMs asked, only {granted} granted")
        return list(groups[:num_groups]), rest

    def make_context(self, resource: Any, made: ExitStack) -> Any:
        descriptor = self._call("cuDevResourceGenerateDesc", [resource], 1)
        flags = int(self._driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM)
        context = self._call("cuGreenCtxCreate", descriptor, self._device, flags)
        made.callback(self._call, "cuGreenCtxDestroy", context)
        return context

    def make_stream(self, context: Any, made: ExitStack) -> int:
        """Created from the context itself: one made under a set context loses its SMs in a graph."""
        flags = int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        stream = self._call("cuGreenCtxStreamCreate", context, flags, 0)
        made.callback(self._call, "cuStreamDestroy", stream)
        made.callback(self._call, "cuStreamSynchronize", stream)  # runs first
        return int(stream)


def _load_driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise GreenContextError('green contexts need cuda-python: pip install "cuda-python>=13"') from error
    return driver


def _wrap_stream(handle: int, index: int) -> torch.cuda.ExternalStream:
    import torch

    return torch.cuda.ExternalStream(handle, device=torch.device("cuda", index))


def _device_index(device: Any) -> int:
    kind, _, index = (f"cuda:{device}" if isinstance(device, int) else str(device)).partition(":")
    if kind != "cuda" or not index.isdecimal():
        raise ValueError(f"device must be an index or name one, as in 'cuda:0', got {device!r}")
    return int(index)


def _release_after_failure(made: ExitStack) -> None:
    try:
        made.close()
    except GreenContextError as error:  # the failure that led here is the one to report
        logger.warning("While giving up on green contexts: %s", error)
