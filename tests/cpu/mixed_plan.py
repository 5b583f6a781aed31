"""A plan for runners without a scheduler: prompts in chunks beside sequences that decode, some prefixes shared."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.shards import (
    DecodeShard,
    MixedShard,
    NewBlock,
    PrefillChunk,
    PrefillShard,
    SamplingRow,
    SlotEntry,
    StepResult,
)
from nanovllm.sampling_params import SamplingParams


@dataclass(eq=False)
class Item:
    """One sequence of a plan; `num_samples` first tokens are drawn, the first of which is decoded."""

    prompt: list[int]
    table: list[int]
    params: SamplingParams
    seed: int
    num_samples: int
    num_launched: int
    outputs: list[int] = field(default_factory=list)
    slot: int | None = None
    num_known_blocks: int = 0  # of the table, on the card; 0: its slot must be told everything

    def sampling_row(self, sibling: int = 0) -> SamplingRow:
        prompt, outputs = tuple(self.prompt), tuple(self.outputs)
        return SamplingRow(self.params, self.seed + sibling, len(self.outputs), prompt, outputs, stop_ids=(3, 5))

    @property
    def num_kv_tokens(self) -> int:
        return len(self.prompt) + len(self.outputs) - 1


class Plan:
    """Mixed steps of random sequences, for several runners; the first one's tokens are what is decoded on."""

    def __init__(
        self,
        seed: int,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        vocabulary: int,
        draw_params: Callable[[random.Random], SamplingParams],
    ) -> None:
        self.rng = random.Random(seed)
        self.block_size, self.max_model_len, self.vocabulary = block_size, max_model_len, vocabulary
        self.draw_params = draw_params
        self.free_blocks = self.rng.sample(range(num_blocks), num_blocks)
        self.free_slots = self.rng.sample(range(num_slots), num_slots)
        self.prefilling: list[Item] = []
        self.decoding: list[Item] = []
        self.prefilled: list[Item] = []  # whose prefixes may be shared: no block is ever given back
        self.num_steps = 0

    def add(self, num_tokens: int) -> Item:
        """A prompt of `num_tokens`, perhaps with the first blocks of an earlier one."""
        rng = self.rng
        prompt, shared = [rng.randrange(self.vocabulary) for _ in range(num_tokens)], []
        if self.prefilled and rng.random() < 0.4:
            other = rng.choice(self.prefilled)
            count = min(len(other.prompt), num_tokens - 1) // self.block_size
            shared = other.table[: rng.randint(0, min(count, 5))]
            prompt[: len(shared) * self.block_size] = other.prompt[: len(shared) * self.block_size]
        fresh = [self.free_blocks.pop() for _ in range(-(-num_tokens // self.block_size) - len(shared))]
        params, samples = self.draw_params(rng), rng.choice([1, 1, 2, 3])
        item = Item(prompt, shared + fresh, params, rng.getrandbits(60), samples, len(shared) * self.block_size)
        self.prefilling.append(item)
        return item

    def shard(self, chunks: list[tuple[Item, int]], rows: list[Item]) -> MixedShard:
        """The next step: (sequence, tokens) of every chunk, and who decodes."""
        self.num_steps += 1
        prefill = PrefillShard(0, self.num_steps, tuple(self._chunk(*chunk) for chunk in chunks))
        entries: list[SlotEntry] = []
        new_blocks: list[NewBlock] = []
        for item in rows:
            self._tell(item, entries, new_blocks)
        longest, slots = max(item.num_kv_tokens + 1 for item in rows), tuple(item.slot for item in rows)
        decode = DecodeShard(0, self.num_steps, slots, longest, tuple(entries), tuple(new_blocks))  # type: ignore[arg-type]
        return MixedShard(0, self.num_steps, prefill, decode)

    def _chunk(self, item: Item, count: int) -> PrefillChunk:
        start = item.num_launched
        item.num_launched = end = start + count
        samples = tuple(map(item.sampling_row, range(item.num_samples))) if end == len(item.prompt) else ()
        table = item.table[: -(-end // self.block_size)]
        return PrefillChunk(tuple(item.prompt[start:end]), start, tuple(table), samples)

    def _tell(self, item: Item, entries: list[SlotEntry], new_blocks: list[NewBlock]) -> None:
        assert item.slot is not None
        if item.num_kv_tokens == len(item.table) * self.block_size:
            item.table.append(self.free_blocks.pop())
        if not item.num_known_blocks:
            row, last = item.sampling_row(), item.outputs[-1]
            entries.append(SlotEntry(item.slot, last, item.num_kv_tokens, tuple(item.table), row))
        else:
            known = item.num_known_blocks
            new_blocks += [NewBlock(item.slot, i, item.table[i]) for i in range(known, len(item.table))]
        item.num_known_blocks = len(item.table)

    def take(self, chunks: list[tuple[Item, int]], rows: list[Item], results: list[StepResult]) -> int:
        """The results of all runners. Returns how many tokens the others drew otherwise; they are told."""
        sampled = [item for item, _ in chunks if item.num_launched == len(item.prompt)]
        firsts = [item if sibling == 0 else None for item in sampled for sibling in range(item.num_samples)]
        num_unlike = 0
        for row, item in enumerate([*firsts, *rows]):
            tokens = [result.token_ids[row] for result in results]
            unlike = any(token != tokens[0] for token in tokens)
            num_unlike += unlike
            if item is not None:
                item.outputs.append(tokens[0])
                item.num_known_blocks = 0 if unlike else item.num_known_blocks
        for item in sampled:
            self.prefilling.remove(item)
            self.prefilled.append(item)
        self._fill_slots()
        return num_unlike

    def _fill_slots(self) -> None:
        for item in self.prefilled:
            if self.free_slots and item.slot is None and item not in self.decoding and len(item.outputs) == 1:
                item.slot = self.free_slots.pop()
                self.decoding.append(item)

    def leave(self, item: Item) -> None:
        """It decodes no more."""
        assert item.slot is not None
        self.decoding.remove(item)
        self.free_slots.append(item.slot)
        item.slot = None
        item.outputs.append(0)  # it does not come back


def separate(runner: ModelRunner, shard: MixedShard) -> StepResult:
    """The two halves one after the other."""
    first, rows = runner.run_prefill(shard.prefill).wait(), runner.run_decode_core(shard.decode).wait()
    return joined(first, len(first.token_ids), rows, len(rows.token_ids))


def joined(first: StepResult, num_first: int, rows: StepResult, num_rows: int) -> StepResult:
    logprobs = [*(first.logprobs or [None] * num_first), *(rows.logprobs or [None] * num_rows)]
    return StepResult(first.token_ids + rows.token_ids, logprobs)


def mixed(runner: ModelRunner, shard: MixedShard) -> StepResult:
    result = runner.run_mixed(shard).wait()
    return joined(result, len(result.token_ids), StepResult([]), 0)


def largest_error(results: list[StepResult], num_missing: int = 1) -> float:
    """Of the most likely ids' log-probabilities, against the first result's; `num_missing` a row may be others."""
    error = 0.0
    for result in results[1:]:
        assert len(result.token_ids) == len(results[0].token_ids)
        for mine, theirs in zip(results[0].logprobs, result.logprobs, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is None or theirs is None:
                continue
            assert len(mine.top) == len(theirs.top)
            known = dict(theirs.top)
            differences = [abs(value - known[token]) for token, value in mine.top if token in known]
            assert len(differences) >= len(mine.top) - num_missing, "other ids are the most likely ones"
            assert not any(map(math.isnan, differences))
            error = max([error, *differences])
    return error


def any_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.8, 1.2]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        min_tokens=rng.choice([0, 0, 3]),
        max_tokens=100,
        logprobs=rng.choice([None, 0, 4]),
    )
