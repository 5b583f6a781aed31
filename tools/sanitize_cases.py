"""Inputs, edgy ones, for every kernel of nanovllm/kernels, and a twin of each: tools/sanitize_kernels.py runs them.

Shapes are chosen so that one step too far leaves an allocation: block ids, slots and table rows lie at the very end of
their tensors, contexts fill their last page, and table columns that nothing may read hold ids of no block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.decode_plan import plan_decode
from nanovllm.kernels.decode_state import advance, gather_inputs
from nanovllm.kernels.filtered_race import Sizes, filtered_race
from nanovllm.kernels.packet import write_runs, write_runs_reference
from nanovllm.kernels.paged_decode import paged_decode, paged_decode_reference
from nanovllm.kernels.paged_decode_hopper import paged_decode_ring
from nanovllm.kernels.paged_decode_planned import paged_decode_planned
from nanovllm.kernels.paged_prefill import paged_prefill, paged_prefill_reference, store_kv, store_kv_reference
from nanovllm.kernels.paged_prefill_hopper import paged_prefill_tma
from nanovllm.kernels.partial_sums import add_partial_sums
from nanovllm.kernels.penalties import apply_penalties_, count_
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
from nanovllm.kernels.split_gemm import (
    SplitTiles,
    split_gate_up,
    split_gate_up_reference,
    split_linear,
    split_linear_reference,
)
from nanovllm.layers.sampler import SamplingBatch, sample
from nanovllm.layers.seen_tokens import BANNED, IN_PROMPT, unpack
from nanovllm.sampling_params import SamplingParams

EPS = 1e-6
LAYERS = 2  # the last one is used: its values end where the pool ends
NO_BLOCK = 1 << 30  # in table columns past a context: whoever follows it leaves every allocation


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


def decode_case(shape: Pages, contexts: Sequence[int], num_splits: int | None, ordered: bool = False) -> Case:
    """ordered: rows are begun in an order that is given, the last one first."""

    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        tables, num_blocks = shape.tables(inputs, contexts)
        pages, q = shape.make(inputs, num_blocks), shape.queries(inputs, len(contexts))
        order = inputs.numbers(range(len(contexts))[::-1], torch.int32) if ordered else None
        return [run(q, *pages, tables, inputs.numbers(contexts, torch.int32), row_order=order)]

    kernel = partial(paged_decode, max_context_tokens=max(contexts), num_splits=num_splits)
    return Case(build, kernel, lambda *args, row_order: paged_decode_reference(*args))


def planned_case(shape: Pages, contexts: Sequence[int], num_splits: int) -> Case:
    """Twice with one plan, as two layers: the second finds the counts as the first has left them."""

    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        tables, num_blocks = shape.tables(inputs, contexts)
        pages, q = shape.make(inputs, num_blocks), shape.queries(inputs, len(contexts))
        return run(q, *pages, tables, inputs.numbers(contexts, torch.int32))

    def kernel(q: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tensor, lengths: Tensor) -> list[Tensor]:
        heads = {"num_kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "dtype": q.dtype}
        plan = plan_decode(lengths, None, max(contexts), num_sms=4, num_splits=num_splits, **heads)
        return [paged_decode_planned(q, k_pages, v_pages, tables, plan, pdl=False) for _ in range(2)]

    return Case(build, kernel, lambda *args: [paged_decode_reference(*args)] * 2)


def ring_case(shape: Pages, contexts: Sequence[int], num_sms: int) -> Case:
    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        tables, num_blocks = shape.tables(inputs, contexts)
        pages, q = shape.make(inputs, num_blocks), shape.queries(inputs, len(contexts))
        return [run(q, *pages, tables, inputs.numbers(contexts, torch.int32))]

    kernel = partial(paged_decode_ring, max_context_tokens=max(contexts), num_sms=num_sms)
    return Case(build, kernel, paged_decode_reference)


def prefill_case(shape: Pages, query_lens: Sequence[int], cached: Sequence[int], *, tma: bool = False) -> Case:
    kernel = paged_prefill_tma if tma else paged_prefill
    contexts = [query + before for query, before in zip(query_lens, cached, strict=True)]

    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        tables, num_blocks = shape.tables(inputs, contexts)
        pages, q = shape.make(inputs, num_blocks), shape.queries(inputs, sum(query_lens))
        starts = inputs.numbers(torch.tensor([0, *query_lens]).cumsum(0), torch.int32)
        return [run(q, *pages, tables, starts, inputs.numbers(contexts, torch.int32))]

    return Case(build, partial(kernel, max_query_tokens=max(query_lens)), paged_prefill_reference)


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

COLUMNS = 5  # of a slot's table
ALIVE, MIN_TOKENS, STATE = 6, 5, 7  # columns of a slot's integers, and their number


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
        tokens = inputs.numbers([5, 6, 42, 8], torch.int64)
        logits = torch.ones(4, 43, device=inputs.device)
        logits[1, 6] = -torch.inf
        run(slots.rows, tokens, logits, slots.integers, end_ids, 2, ALIVE, MIN_TOKENS)
        return [slots.integers, tokens]

    return Case(build, advance, advance_twin)


def advance_twin(
    rows: Tensor,
    tokens: Tensor,
    logits: Tensor,
    integers: Tensor,
    end_ids: Tensor,
    null_slot: int,
    alive: int,
    min_tokens: int,
) -> None:
    for row, (slot, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
        state = integers[slot]
        if slot != null_slot and state[alive]:
            drawn = bool(logits[row, token] > -torch.inf)
            state[0] = token if drawn else state[0]
            state[1], state[2] = state[1] + 1, state[2] + 1
            ended = bool((end_ids[slot] == token).any()) and state[2] >= state[min_tokens]
            state[alive] = drawn and not ended
            tokens[row] = token if drawn else -1


def packet_case(count: int, length: int) -> Case:
    """Two runs of `length` words, of which the packet holds `count`: one ends where the target does."""

    def build(inputs: Inputs, run: Callable[..., None]) -> Sequence[Tensor]:
        target = inputs.numbers([3] * (2 * length), torch.int32)
        headers = [length, 0, count, length, -1, 0, 0, count, length, 5]
        run(inputs.numbers([*headers, *range(100, 100 + count)], torch.int32), 2, target)
        return [target]

    return Case(build, write_runs, write_runs_reference)


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


def filtered_case(vocab_size: int, params: Sequence[SamplingParams], tied: Sequence[int], sizes: Sizes) -> Case:
    """Row b's tied[b] largest logits are equal: with a small top_k, just these are its list. The last one has the last
    slot, and the last list."""
    seeds, positions = [(1 << 40) - row for row in range(len(params))], [70_000 * row for row in range(len(params))]

    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        logits = shuffled(inputs, len(params), vocab_size)
        for logits_V, count in zip(logits, tied, strict=True):
            logits_V[inputs.permutation(vocab_size)[:count]] = 9.0
        floats = inputs.numbers([[0.0] * 3] + [[p.temperature, p.top_p, p.min_p] for p in params], torch.float32)
        state = [[seed, position, p.top_k] for seed, position, p in zip(seeds, positions, params, strict=True)]
        seed, position, top_k = inputs.numbers([[0] * 3, *state], torch.int64).unbind(1)
        temperature, top_p, min_p = floats.unbind(1)
        rows = inputs.numbers(range(1, len(params) + 1), torch.int64)
        return [run(logits.to(inputs.device), rows, temperature, top_k, top_p, min_p, seed, position)]

    batch = SamplingBatch.from_params(params, seeds, positions, "cpu")
    return Case(build, partial(filtered_race, sizes=sizes), lambda logits, *_: sample(logits, batch))


def shuffled(inputs: Inputs, rows: int, columns: int) -> Tensor:
    """float32 [rows, columns] on the CPU: each of the numbers from -8 up to 8 once."""
    return inputs.permutation(rows * columns).view(rows, columns) * (16 / (rows * columns)) - 8


def penalise_case(vocab_size: int) -> Case:
    """Slots: a neutral one, one before its `min_tokens`, one with all penalties, and the null slot, whose garbage must
    penalise nobody. A small vocabulary: what is read beyond the row ahead of the null slot's leaves the table."""

    def build(inputs: Inputs, run: Callable[..., None]) -> Sequence[Tensor]:
        logits = shuffled(inputs, 5, vocab_size).to(inputs.device)
        numbers = inputs.permutation(4 * vocab_size).view(4, vocab_size)
        table = numbers % 3 + (numbers % 4 == 0) * IN_PROMPT + (numbers % 5 == 0) * BANNED
        floats = [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.5, -0.3, 1.3], [5.0, 5.0, 5.0]]
        presence, frequency, repetition = inputs.numbers(floats, torch.float32).unbind(1)
        position, min_tokens = inputs.numbers([[3, 3], [2, 3], [4, 0], [0, 9]], torch.int64).unbind(1)
        rows, table = inputs.numbers([3, 0, 1, 3, 2], torch.int64), inputs.numbers(table, torch.int32)
        run(logits, rows, table, presence, frequency, repetition, min_tokens, position)
        penalised = logits.cpu()
        return [penalised.clamp(min=-100.0), penalised.isinf()]

    return Case(build, apply_penalties_, penalise_twin)


def penalise_twin(
    logits: Tensor,
    rows: Tensor,
    table: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
    min_tokens: Tensor,
    position: Tensor,
) -> None:
    for logits_V, slot in zip(logits, rows.tolist(), strict=True):
        if slot != len(table) - 1:
            counts, in_prompt, banned = unpack(table[slot])
            logits_V[banned & (position[slot] < min_tokens[slot])] = -torch.inf
            factor = torch.where((counts > 0) | in_prompt, repetition[slot], 1.0)
            logits_V.copy_(torch.where(logits_V > 0, logits_V / factor, logits_V * factor))
            logits_V.sub_(frequency[slot] * counts + presence[slot] * (counts > 0))


def count_case(num_rows: int, vocab_size: int) -> Case:
    """Three slots and the null slot, which all rows have but the last two."""

    def build(inputs: Inputs, run: Callable[..., None]) -> Sequence[Tensor]:
        table = inputs.numbers(inputs.permutation(4 * vocab_size).view(4, vocab_size), torch.int32)
        rows = inputs.numbers([3] * (num_rows - 2) + [0, 2], torch.int64)
        run(table, rows, inputs.numbers([vocab_size - 1] * num_rows, torch.int64))
        return [table]

    return Case(build, count_, count_twin)


def count_twin(table: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    for slot, token in zip(rows.tolist(), token_ids.tolist(), strict=True):
        table[slot, token] += slot != len(table) - 1


# -- products of few rows


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


def split_case(rows: int, outputs: int, columns: int, tiles: SplitTiles, gated: bool = False) -> Case:
    """Of partial sums, their total; of gate and up, what the SiLU product makes of them."""

    def build(inputs: Inputs, run: Callable[..., Tensor]) -> Sequence[Tensor]:
        product = run(inputs.randn(rows, columns), inputs.randn(outputs, columns) * columns**-0.5)
        return [product if product.dim() == 2 else product.sum(0)]

    if gated:
        return Case(build, partial(split_gate_up, tiles=tiles), split_gate_up_reference)
    return Case(build, partial(split_linear, tiles=tiles), split_linear_reference)


def split_norm_case(rows: int, hidden: int, splits: int) -> Case:
    """Residual sum and norm of partial sums."""

    def build(inputs: Inputs, run: Callable[..., tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
        pieces = inputs.randn(splits, rows, hidden).float()
        return run(pieces, inputs.randn(rows, hidden), inputs.randn(hidden), EPS)

    def twin(pieces: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm_reference(add_partial_sums(pieces, weight.dtype), residual, weight, eps)

    return Case(build, add_rms_norm, twin)
