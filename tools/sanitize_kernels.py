"""Launch every kernel of nanovllm/kernels on small, edgy shapes: what a memory checker runs.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --padding 262144 python tools/sanitize_kernels.py
    TRITON_INTERPRET=1 python tools/sanitize_kernels.py --device cpu    # without a GPU
    python tools/sanitize_kernels.py --plant    # one write past the end of a tensor: the checker must see it

Shapes are chosen so that one step too far leaves an allocation: block ids, slots and table rows lie at the very end of
their tensors, contexts fill their last page, and table columns that nothing may read hold ids of no block. For that
each tensor must be an allocation of its own (the variable above) and its neighbour out of reach (the padding).

Inputs and expected results are made on the CPU, so that only our kernels run under the checker. Results are compared,
coarsely: a kernel that wrote nothing was not checked. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import KernelInterface

from nanovllm.kernels.decode_state import advance, gather_inputs
from nanovllm.kernels.paged_decode import paged_decode, paged_decode_reference
from nanovllm.kernels.paged_prefill import paged_prefill, paged_prefill_reference, store_kv, store_kv_reference
from nanovllm.kernels.push_blocks import push_blocks, push_blocks_reference
from nanovllm.kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference
from nanovllm.kernels.race import race
from nanovllm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from nanovllm.kernels.silu_mul import silu_mul, silu_mul_reference
from nanovllm.kernels.skinny_gemm import (
    norm_gate_up,
    norm_gate_up_reference,
    norm_linear,
    norm_linear_reference,
    skinny_linear,
    skinny_linear_reference,
)
from nanovllm.layers.sampler import SamplingBatch, sample
from nanovllm.sampling_params import SamplingParams

EPS = 1e-6
LAYERS = 2  # the last one is used: its values end where the pool ends
NO_BLOCK = 1 << 30  # in table columns past a context: whoever follows it leaves every allocation
ERROR_BOUND = 2e-2  # ‖error‖ / ‖exact‖, of bfloat16 with room


class Inputs:
    """The same random numbers for every device: made on the CPU from one seed, then moved."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype).to(self.device)

    def numbers(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self.device)

    def permutation(self, count: int) -> Tensor:
        """int64 [count], on the CPU."""
        return torch.randperm(count, generator=self._generator)


class Case(NamedTuple):
    """`build(inputs, run)` makes the inputs, calls `run` (the kernel or its twin), returns what that wrote."""

    build: Callable[[Inputs, Callable[..., Any]], Sequence[Tensor]]
    kernel: Callable[..., Any]
    twin: Callable[..., Any]


# -- attention over pages


class Pages(NamedTuple):
    """Shape of a pool and of the heads that read it."""

    group: int
    kv_heads: int
    head_dim: int
    page: int

    def make(self, inputs: Inputs, num_blocks: int) -> tuple[Tensor, Tensor]:
        pool = inputs.randn(num_blocks, LAYERS, 2, self.page, self.kv_heads, self.head_dim)
        return pool[:, -1, 0], pool[:, -1, 1]

    def queries(self, inputs: Inputs, tokens: int) -> Tensor:
        """[tokens, heads, D], a view into a projection, as the model's is."""
        heads = self.group * self.kv_heads
        return inputs.randn(tokens, heads + 2 * self.kv_heads, self.head_dim)[:, :heads]

    def tables(self, inputs: Inputs, contexts: Sequence[int]) -> tuple[Tensor, int]:
        """(int32 [S, columns] with no column to spare, blocks of the pool). The last block ends the longest context."""
        counts = [-(-context // self.page) for context in contexts]
        num_blocks, ids = sum(counts), inputs.permutation(sum(counts))
        longest = contexts.index(max(contexts))
        ends = torch.tensor(counts).cumsum(0)
        at, last = int((ids == num_blocks - 1).nonzero()), int(ends[longest]) - 1
        ids[at], ids[last] = ids[last].clone(), num_blocks - 1
        tables = torch.full((len(contexts), max(counts)), NO_BLOCK)
        for row, (count, end) in enumerate(zip(counts, ends.tolist(), strict=True)):
            tables[row, :count] = ids[end - count : end]
        return inputs.numbers(tables, torch.int32), num_blocks


def decode_case(shape: Pages, contexts: Sequence[int], num_splits: int | None) -> Case:
    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        tables, num_blocks = shape.tables(inputs, contexts)
        pages, q = shape.make(inputs, num_blocks), shape.queries(inputs, len(contexts))
        return [run(q, *pages, tables, inputs.numbers(contexts, torch.int32))]

    kernel = partial(paged_decode, max_context_tokens=max(contexts), num_splits=num_splits)
    return Case(build, kernel, paged_decode_reference)


def prefill_case(shape: Pages, query_lens: Sequence[int], cached: Sequence[int]) -> Case:
    contexts = [query + before for query, before in zip(query_lens, cached, strict=True)]

    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        tables, num_blocks = shape.tables(inputs, contexts)
        pages, q = shape.make(inputs, num_blocks), shape.queries(inputs, sum(query_lens))
        starts = inputs.numbers(torch.tensor([0, *query_lens]).cumsum(0), torch.int32)
        return [run(q, *pages, tables, starts, inputs.numbers(contexts, torch.int32))]

    return Case(build, partial(paged_prefill, max_query_tokens=max(query_lens)), paged_prefill_reference)


def store_case(shape: Pages, tokens: int) -> Case:
    def build(inputs: Inputs, run: Callable[..., None]) -> Sequence[Tensor]:
        pages = shape.make(inputs, -(-tokens // shape.page) + 1)
        qkv = inputs.randn(tokens, 3 * shape.kv_heads, shape.head_dim)
        k, v = qkv[:, shape.kv_heads : -shape.kv_heads], qkv[:, -shape.kv_heads :]
        run(k, v, *pages, last_slots(inputs, pages[0], tokens))
        return pages

    return Case(build, store_kv, store_kv_reference)


def last_slots(inputs: Inputs, k_pages: Tensor, tokens: int) -> Tensor:
    """int64 [tokens]: the last slots of a pool, the very last first."""
    slots = k_pages.shape[0] * k_pages.shape[1]
    return inputs.numbers(torch.arange(slots - 1, slots - 1 - tokens, -1), torch.int64)


# -- the other kernels


def qk_case(shape: Pages, tokens: int) -> Case:
    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        pages = shape.make(inputs, -(-tokens // shape.page) + 1)
        heads, positions = (shape.group + 2) * shape.kv_heads, 64
        qkv, weights = inputs.randn(tokens, heads * shape.head_dim), inputs.randn(2, shape.head_dim)
        cos_sin = inputs.randn(positions, shape.head_dim).float()
        where = inputs.numbers(positions - 1 - torch.arange(tokens) % positions, torch.int64)
        slots = last_slots(inputs, pages[0], tokens)
        return [run(qkv, weights[0], weights[1], cos_sin, where, *pages, slots, EPS), *pages]

    return Case(build, qk_norm_rope_store, qk_norm_rope_store_reference)


def norm_case(tokens: int, size: int, residual: bool) -> Case:
    def build(inputs: Inputs, run: Callable[..., tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
        x, weight = inputs.randn(tokens, size), inputs.randn(size)
        return run(x, inputs.randn(tokens, size) if residual else None, weight, EPS)

    return Case(build, add_rms_norm, add_rms_norm_reference)


def silu_case(tokens: int, intermediate: int) -> Case:
    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        return [run(inputs.randn(tokens, 2 * intermediate))]

    return Case(build, silu_mul, silu_mul_reference)


def push_case(elements: int, pairs: Sequence[tuple[int, int]], within_one_pool: bool = False) -> Case:
    """`elements` of 2 bytes a block; 5 blocks are copied from, and 5 or 7 to."""

    def build(inputs: Inputs, run: Callable[..., None]) -> Sequence[Tensor]:
        source = inputs.randn(5, elements)
        target = source if within_one_pool else inputs.randn(7, elements)
        run(source, target, pairs)
        return [target]

    return Case(build, push_blocks, push_blocks_reference)


# -- the state of decoding, and the draw

COLUMNS, ALIVE, MIN_TOKENS, STATE = (
    5,
    6,
    5,
    7,
)  # table columns of a slot; columns of a slot's integers, and their number


class Slots(NamedTuple):
    """Two slots and the null slot. The rows: the null slot twice, a sequence that ended, one at its last token."""

    rows: Tensor
    integers: Tensor

    @classmethod
    def make(cls, inputs: Inputs, block_size: int) -> Slots:
        last, first = [7, COLUMNS * block_size - 1, 3, 1, 0, 0, 1], [9, block_size, 3, 1, 0, 0, 0]
        rows, integers = [2, 0, 1, 2], [first, last, [0] * STATE]
        return cls(inputs.numbers(rows, torch.int64), inputs.numbers(integers, torch.int64))


def gather_case(block_size: int) -> Case:
    def build(inputs: Inputs, run: Callable[..., Sequence[Tensor]]) -> Sequence[Tensor]:
        slots = Slots.make(inputs, block_size)
        tables = inputs.numbers(inputs.permutation(3 * COLUMNS).view(3, COLUMNS), torch.int32)
        return run(*slots, tables, block_size, 3 * COLUMNS, ALIVE)

    return Case(build, gather_inputs, gather_twin)


def gather_twin(
    rows: Tensor, integers: Tensor, slot_tables: Tensor, block_size: int, null_block: int, alive: int
) -> Sequence[Tensor]:
    positions, living, tables = integers[rows, 1], integers[rows, alive] != 0, slot_tables[rows]
    blocks = torch.where(living, tables.gather(1, positions[:, None] // block_size)[:, 0].long(), null_block)
    context_lens = torch.where(living, positions + 1, 0).int()
    order = context_lens.argsort(descending=True, stable=True).int()
    mapping = blocks * block_size + positions % block_size
    return integers[rows, 0], positions, context_lens, mapping, tables, order


def advance_case(end_id: int) -> Case:
    def build(inputs: Inputs, run: Callable[..., None]) -> Sequence[Tensor]:
        slots = Slots.make(inputs, block_size=16)
        end_ids = inputs.numbers([[-1] * 8, [-1] * 7 + [end_id], [-1] * 8], torch.int64)
        run(slots.rows, inputs.numbers([5, 6, 42, 8], torch.int64), slots.integers, end_ids, 2, ALIVE, MIN_TOKENS)
        return [slots.integers]

    return Case(build, advance, advance_twin)


def advance_twin(
    rows: Tensor, tokens: Tensor, integers: Tensor, end_ids: Tensor, null_slot: int, alive: int, min_tokens: int
) -> None:
    for slot, token in zip(rows.tolist(), tokens.tolist(), strict=True):
        state = integers[slot]
        if slot != null_slot and state[alive]:
            state[0], state[1], state[2] = token, state[1] + 1, state[2] + 1
            state[alive] = not (bool((end_ids[slot] == token).any()) and state[2] >= state[min_tokens])


def race_case(vocab_size: int, any_random: bool) -> Case:
    """Rows of a greedy sequence and of two that draw; temperatures, seeds and positions are columns of wider state."""

    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        logits = inputs.randn(3, vocab_size).float() * 4
        floats = inputs.numbers([[0.6 * any_random, 1.0], [0.0, 1.0], [1.3 * any_random, 1.0]], torch.float32)
        integers = inputs.numbers([[0, 1 << 40, 5], [0, 2, 0], [0, -3, 70_000]], torch.int64)
        rows = inputs.numbers([2, 1, 0], torch.int64)
        return [run(logits, rows, floats[:, 0], integers[:, 1], integers[:, 2], any_random=any_random)]

    return Case(build, race, race_twin)


def race_twin(logits: Tensor, rows: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, **_: Any) -> Tensor:
    params = [SamplingParams(temperature=each) for each in temperature[rows].tolist()]
    return sample(logits, SamplingBatch.from_params(params, seed[rows].tolist(), position[rows].tolist(), "cpu"))


def skinny_case(rows: int, outputs: int, columns: int) -> Case:
    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        return [run(inputs.randn(rows, columns), inputs.randn(outputs, columns) * columns**-0.5)]

    return Case(build, skinny_linear, skinny_linear_reference)


def skinny_norm_case(rows: int, outputs: int, columns: int, gated: bool, residual: bool = True) -> Case:
    def build(inputs: Inputs, run: Callable[..., tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
        x, added = inputs.randn(rows, columns), inputs.randn(rows, columns) if residual else None
        return run(x, added, inputs.randn(columns), 1e-6, inputs.randn(outputs, columns) * columns**-0.5)

    if gated:
        return Case(build, norm_gate_up, norm_gate_up_reference)
    return Case(build, norm_linear, norm_linear_reference)


# -- all of them

WIDE = Pages(group=4, kv_heads=2, head_dim=128, page=64)  # a tile of tokens is one page
NARROW = Pages(group=5, kv_heads=1, head_dim=64, page=16)  # a tile spans pages; a group that is no power of two
LARGE_PAGE = Pages(group=2, kv_heads=2, head_dim=64, page=256)  # a page holds several tiles

CASES: dict[str, tuple[Case, ...]] = {  # by module of nanovllm/kernels
    "paged_decode": (
        decode_case(WIDE, (64, 1, 0, 65, 192), num_splits=1),
        decode_case(WIDE, (64, 1, 0, 63, 384), num_splits=3),
        decode_case(NARROW, (1, 15, 17, 160, 0), num_splits=1),
        decode_case(NARROW, (320,), num_splits=None),
        decode_case(LARGE_PAGE, (3, 512), num_splits=4),
    ),
    "paged_prefill": (
        prefill_case(WIDE, (64, 1, 37), (0, 63, 91)),
        prefill_case(WIDE, (1, 3), (0, 125)),
        prefill_case(NARROW, (33, 1, 20), (0, 47, 28)),
        prefill_case(LARGE_PAGE, (5,), (251,)),
        *(store_case(shape, tokens) for shape in (WIDE, NARROW) for tokens in (1, 17)),
    ),
    "decode_state": (gather_case(16), gather_case(64), advance_case(end_id=42), advance_case(end_id=43)),
    "race": (race_case(5000, True), race_case(5000, False), race_case(4096, True)),
    "qk_norm_rope_store": tuple(qk_case(shape, tokens) for shape in (WIDE, NARROW) for tokens in (1, 17)),
    "rms_norm": tuple(norm_case(3, size, residual) for size in (48, 1024) for residual in (True, False)),
    "skinny_gemm": (
        skinny_case(1, 35, 272),
        skinny_case(3, 35, 2064),
        skinny_case(8, 2200, 2064),
        skinny_norm_case(1, 2200, 272, gated=False, residual=False),
        skinny_norm_case(5, 37, 272, gated=False),
        skinny_norm_case(1, 70, 2064, gated=True),
        skinny_norm_case(8, 70, 272, gated=True),
    ),
    "silu_mul": tuple(silu_case(3, intermediate) for intermediate in (80, 1536)),
    "push_blocks": (
        push_case(96, ((4, 6), (0, 1), (2, 0))),
        push_case(2 * 8192 + 8, ((4, 6), (0, 1))),  # four 32-bit words more than one piece
        push_case(96, ((0, 4), (3, 1)), within_one_pool=True),
    ),
}


def kernels_of(module: str) -> set[str]:
    """Names of what a module of nanovllm/kernels launches: its jitted functions called …_kernel."""
    names = vars(import_module(f"nanovllm.kernels.{module}")).items()
    return {name for name, value in names if isinstance(value, KernelInterface) and name.endswith("_kernel")}


@contextmanager
def launches() -> Iterator[set[str]]:
    """The names of the kernels launched within the block."""
    names: set[str] = set()
    kind: Any = type(vars(import_module("nanovllm.kernels.silu_mul"))["_silu_mul_kernel"])  # compiled or interpreted
    launch = kind.run

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    with mock.patch.object(kind, "run", note):
        yield names


def check(case: Case, device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of what the kernel wrote against its twin's. `SystemExit` above ERROR_BOUND."""
    got = [each.cpu().double() for each in case.build(Inputs(device, dtype), case.kernel)]
    exact = [each.double() for each in case.build(Inputs(torch.device("cpu"), dtype), case.twin)]
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
    if not all(error <= ERROR_BOUND for error in errors):
        raise SystemExit(f"errors {errors} against the twin are above {ERROR_BOUND}")
    return max(errors)


def plant(device: torch.device) -> None:
    """Copy a block to the place behind the last one. Outside a memory checker this may do anything."""
    source, target = torch.zeros(3, 1024).to(device), torch.zeros(3, 1024).to(device)
    push_blocks(source, target, [(0, len(target))])
    torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--plant", action="store_true", help="one write past the end of a tensor, nothing else")
    args = parser.parse_args()
    device = torch.device(args.device, 0)
    if args.plant:
        if device.type == "cpu":
            parser.error("--plant writes where it must not: only on a GPU, under a memory checker")
        plant(device)
        return
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter computes bfloat16 wrongly
    with launches() as launched:
        for module, cases in CASES.items():
            errors = [check(case, device, dtype) for case in cases]
            print(f"{module:20} {len(cases)} cases, largest error {max(errors):.1e}", flush=True)
    if missing := set().union(*map(kernels_of, CASES)) - launched:
        raise SystemExit(f"never launched: {sorted(missing)}")
    report = {"kernels": sorted(launched), "cases": {module: len(cases) for module, cases in CASES.items()}}
    print(json.dumps(report | {"device": str(device), "torch": torch.__version__, "triton": triton.__version__}))


if __name__ == "__main__":
    main()
