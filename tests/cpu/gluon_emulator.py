"""Run a warp-specialised Gluon kernel on the CPU: each partition a thread, what is asynchronous late and at random.

Triton's interpreter knows nothing of Gluon. This knows what `paged_decode_hopper` uses of it, as the language defines
it: mbarriers with phases and byte counts, bulk copies that land some time after they were asked for, products that are
computed when they are waited for, from what shared memory then holds. Layouts, fences and registers it ignores. A
barrier that nobody completes fails after a while, where the card would hang.
"""

from __future__ import annotations

import math
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

STUCK_S = 20.0
_THREAD = threading.local()  # of an emulated partition: its place in the grid, and its products in flight


class Value(Tensor):
    """What a kernel computes with: never changed in place, as others may have it too."""

    type = types.SimpleNamespace(layout=None)

    def __iadd__(self, other: Any) -> Any:
        return self + other


def as_value(x: Any) -> Tensor:
    return torch.as_tensor(x).as_subclass(Value)


class Pointer:
    def __init__(self, data: Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)

    def load(self, mask: Any, other: Any) -> Tensor:
        offset = torch.as_tensor(self.offset)
        mask = torch.as_tensor(True if mask is None else mask).expand(offset.shape)
        values = self.flat()[torch.where(mask, offset, 0)]
        return as_value(torch.where(mask, values, torch.as_tensor(other or 0, dtype=values.dtype)))

    def store(self, values: Any, mask: Any) -> None:
        offset = torch.as_tensor(self.offset)
        values = torch.as_tensor(values).to(self.data.dtype).expand(offset.shape)
        mask = torch.as_tensor(True if mask is None else mask).expand(offset.shape)
        self.flat()[offset[mask]] = values[mask]

    def flat(self) -> Tensor:
        return self.data.as_strided([self.data.untyped_storage().nbytes() // self.data.itemsize], [1], 0)[
            self.data.storage_offset() :
        ]


class Barrier:
    """One mbarrier: a phase ends with its last arrival and its last byte."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.num_bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def update(self, arrivals: int, num_bytes: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.num_bytes += num_bytes
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.num_bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase % 2 != int(parity), STUCK_S)
        assert done, "stuck at a barrier"


class Shared:
    """A tile of shared memory; a tensor's rows may lie in two halves, one behind the other."""

    def __init__(self, data: Tensor, halves: bool = False, transposed: bool = False) -> None:
        self.data, self.halves, self.transposed = data, halves, transposed
        self.dtype, self.shape = data.dtype, data.shape

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)], self.halves)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        count, rows, columns = shape
        assert self.data.shape == (count * 2, 1, rows, columns // 2) and dtype == self.dtype
        return Shared(self.data.view(count, 2, rows, columns // 2), halves=True)

    def permute(self, order: Sequence[int]) -> Shared:
        assert tuple(order) == (1, 0)
        return Shared(self.data, self.halves, not self.transposed)

    def load(self, layout: Any = None) -> Tensor:
        tile = torch.cat([*self.data], 1) if self.halves else self.data.clone()
        return tile.T if self.transposed else tile

    def store(self, tile: Tensor) -> None:
        assert tile.dtype == self.dtype and tile.shape == self.shape
        self.data.copy_(tile)


class Barriers:
    def __init__(self, count: int) -> None:
        self.each = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.each[int(i)]


class Product:
    """A product in flight: computed by whoever waits for it."""

    def __init__(self, a: Shared, b: Shared, acc: Tensor | None) -> None:
        self.a, self.b, self.acc, self.done = a, b, acc, False
        self.result = torch.empty(0)

    def finish(self) -> None:
        self.result = self.a.load().float() @ self.b.load().float()
        if self.acc is not None:
            self.result = self.result + self.acc
        self.result, self.done = as_value(self.result), True


def _copy_box(desc: Any, coordinates: Sequence[Any], barrier: Barrier, box: Shared, delays: random.Random) -> None:
    """The box of the tensor map, zeros where it reaches beyond; rubbish until it is there."""
    box.data.fill_(float("nan"))
    tensor = desc.base.as_strided(desc.shape, desc.strides)
    starts = [int(coordinate) for coordinate in coordinates]

    def land() -> None:
        time.sleep(delays.random() * 1e-3)
        inside = torch.zeros(desc.block_shape, dtype=box.dtype)
        edges = zip(starts, desc.block_shape, desc.shape, strict=True)
        spans = [range(max(start, 0), min(start + n, size)) for start, n, size in edges]
        if all(spans):
            target = tuple(
                slice(span.start - start, span.stop - start) for span, start in zip(spans, starts, strict=True)
            )
            inside[target] = tensor[tuple(slice(span.start, span.stop) for span in spans)]
        box.data.copy_(inside)
        barrier.update(0, -inside.numel() * inside.itemsize)

    threading.Thread(target=land, daemon=True).start()


def _product(a: Shared, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    product = Product(a, b, acc if use_acc else None)
    _THREAD.products.append(product)
    return product


def _finish_products(num_outstanding: int = 0, deps: Sequence[Product] = ()) -> Tensor:
    while len(_THREAD.products) > num_outstanding:
        _THREAD.products.pop(0).finish()
    (dep,) = deps
    assert dep.done, "the product waited for is still in flight"
    return dep.result


def _specialize(functions: Sequence[tuple[Callable[..., None], Sequence[Any]]], *_: Any) -> None:
    """Every partition to its end; the first failure of any is raised."""
    failures: list[Exception] = []

    def run(function: Callable[..., None], arguments: Sequence[Any], place: tuple[int, ...]) -> None:
        _THREAD.place, _THREAD.products = place, []
        try:
            function(*arguments)
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(*each, _THREAD.place), daemon=True) for each in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if dtype is torch.int64:
        return Barriers(shape[0])
    return Shared(torch.full(list(shape), float("nan"), dtype=dtype))


def _language(grid: Sequence[int]) -> types.SimpleNamespace:
    """What the kernels call `gl`. Scalars are tensors without dimensions."""
    return types.SimpleNamespace(
        float32=torch.float32,
        int32=torch.int32,
        int64=torch.int64,
        allocate_shared_memory=_allocate,
        arange=lambda begin, end, layout: torch.arange(begin, end),
        associative_scan=lambda x, axis, add: x.cumsum(axis),
        BlockedLayout=lambda *_: None,
        cdiv=lambda a, b: -(-a // b),
        convert_layout=lambda x, layout: x,
        exp2=torch.exp2,
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        load=lambda pointer, mask=None, other=None: pointer.load(mask, other),
        log2=torch.log2,
        max=lambda x, axis: x.amax(axis),
        maximum=lambda a, b: torch.maximum(as_value(a), as_value(b)),
        minimum=lambda a, b: torch.minimum(as_value(a), as_value(b)),
        NVMMADistributedLayout=lambda *_: None,
        NVMMASharedLayout=lambda *_, **__: None,
        num_programs=lambda axis: as_value(grid[axis]),
        permute=lambda x, order: x.permute(order),
        program_id=lambda axis: as_value(_THREAD.place[axis]),
        reshape=lambda x, shape: x.reshape(shape),
        SliceLayout=lambda *_: None,
        static_range=range,
        store=lambda pointer, values, mask=None: pointer.store(values, mask),
        sum=lambda x, axis: x.sum(axis),
        SwizzledSharedLayout=lambda *_: None,
        to_tensor=as_value,
        warp_specialize=_specialize,
        where=lambda condition, a, b: torch.where(condition, as_value(a), as_value(b)),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    )


class _Modules:
    """Modules of Gluon code with all that is of Gluon replaced: their names, each made when it is first needed."""

    def __init__(self, grid: Sequence[int], delays: random.Random) -> None:
        self.names: dict[str, dict[str, Any]] = {}
        self.replaced = {
            "gl": _language(grid),
            "mbarrier": types.SimpleNamespace(
                arrive=lambda barrier, count: barrier.update(count, 0),
                expect=lambda barrier, num_bytes: barrier.update(1, num_bytes),
                init=lambda barrier, count: barrier.init(count),
                wait=lambda barrier, parity: barrier.wait(parity),
                MBarrierLayout=lambda: None,
            ),
            "tma": types.SimpleNamespace(async_copy_global_to_shared=lambda *each: _copy_box(*each, delays)),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": _product,
            "warpgroup_mma_wait": _finish_products,
            "_exchanged_layout": lambda num_heads: None,
        }

    def function(self, jitted: Any) -> Callable[..., Any]:
        """The function behind a jitted one, as it is in its own module."""
        return types.FunctionType(jitted.fn.__code__, self._names_of(jitted.fn.__module__))

    def _names_of(self, module: str) -> dict[str, Any]:
        if module not in self.names:
            names = self.names[module] = dict(vars(sys.modules[module]))  # there before its functions ask for it
            for name, value in [*names.items()]:
                if type(value).__name__ == "constexpr":
                    names[name] = value.value
                elif type(value).__name__ == "GluonJITFunction":
                    names[name] = self.function(value)
            names |= {name: value for name, value in self.replaced.items() if name in names}
        return self.names[module]


class EmulatedKernel:
    """In place of a jitted kernel with a grid of two axes: launched alike, program after program."""

    def __init__(self, kernel: Any, seed: int = 0) -> None:
        self.kernel, self.delays = kernel, random.Random(seed)

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, launch_pdl: bool, **constants: Any) -> None:
            kernel = _Modules(grid, self.delays).function(self.kernel)
            arguments = tuple(_as_argument(each) for each in arguments)
            for place in ((x, y) for y in range(grid[1]) for x in range(grid[0])):
                _THREAD.place = place
                kernel(*arguments, **constants)

        return launch


def _as_argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value)
    if isinstance(value, int):
        return as_value(value)
    if hasattr(value, "block_shape"):  # a tensor map
        box = types.SimpleNamespace(nbytes=math.prod(value.block_shape) * value.base.itemsize)
        return types.SimpleNamespace(**vars(value), dtype=value.base.dtype, block_type=box)
    return value
