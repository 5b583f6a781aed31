"""What a card remembers of the sequences it decodes: one row a slot, advanced on the card itself.

The host sends only what changes (a sequence enters a slot, a table grows); tokens, lengths and output positions
advance on the card, so that a step can be launched before the previous one's result is known to the host.

Shape suffixes: S slots, B rows of this step, V vocabulary, N blocks a sequence can have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nanovllm.engine.shards import DecodeShard, SamplingRow, SlotEntry
from nanovllm.layers.attention import DecodeMetadata
from nanovllm.layers.host import to_device
from nanovllm.layers.sampler import SamplingBatch, sampling_features, sampling_filters
from nanovllm.sampling_params import SamplingParams


class SlotState:
    """Static buffers of one decode card, and beside them what the host knows of each slot's sampling."""

    def __init__(
        self, num_slots: int, max_blocks: int, block_size: int, null_block: int, vocab_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.null_block = null_block
        self.vocab_size = vocab_size
        self.device = device
        self.params: list[SamplingParams | None] = [None] * num_slots
        self.null_slot = num_slots  # where a graph's padding rows point: an empty context, writing to the null block
        self.integers_S6 = torch.zeros(num_slots + 1, 6, dtype=torch.int64, device=device)  # see _integers
        self.last_token_S, self.num_kv_tokens_S, self.position_S = self.integers_S6.unbind(1)[:3]
        self.seed_S, self.top_k_S, self.min_tokens_S = self.integers_S6.unbind(1)[3:]
        self.floats_S6 = torch.zeros(num_slots + 1, 6, dtype=torch.float32, device=device)  # see sampling_floats
        self.block_tables_SN = torch.full((num_slots + 1, max_blocks), null_block, dtype=torch.int32, device=device)
        # [S, V] tables exist only once a request needs them: 0.3 GB each at 512 slots of Qwen3's vocabulary.
        self.counts_SV: Tensor | None = None
        self.prompt_SV: Tensor | None = None
        self.banned_SV: Tensor | None = None

    def apply(self, shard: DecodeShard) -> None:
        """Take in what changed since the last step."""
        if shard.entries:
            self._enter(shard.entries)
        if shard.new_blocks:
            slots, columns, blocks = zip(*((new.slot, new.column, new.block) for new in shard.new_blocks), strict=True)
            self.block_tables_SN[self._ids(slots), self._ids(columns)] = self._ids(blocks).int()

    def _enter(self, entries: tuple[SlotEntry, ...]) -> None:
        """One copy a kind of state for all of them, each queued: nothing here waits for the card."""
        slots_B = self._ids([entry.slot for entry in entries])
        width = self.block_tables_SN.shape[1]
        tables = [[*entry.block_table, *[self.null_block] * (width - len(entry.block_table))] for entry in entries]
        self.integers_S6[slots_B] = to_device([_integers(entry) for entry in entries], torch.int64, self.device)
        floats = [sampling_floats(entry.sampling.params) for entry in entries]
        self.floats_S6[slots_B] = to_device(floats, torch.float32, self.device)
        self.block_tables_SN[slots_B] = to_device(tables, torch.int32, self.device)
        for entry in entries:
            self.params[entry.slot] = entry.sampling.params
            self._enter_tables(entry.slot, entry.sampling)

    def _enter_tables(self, slot: int, row: SamplingRow) -> None:
        if row.params.has_penalty:
            if self.counts_SV is None or self.prompt_SV is None:
                self.counts_SV = self._table(torch.int32)
                self.prompt_SV = self._table(torch.bool)
            fill_counts(self.counts_SV[slot], self.prompt_SV[slot], row)
        if row.stop_ids and self.banned_SV is None:
            self.banned_SV = self._table(torch.bool)
        if self.banned_SV is not None:  # cleared also for a row that bans nothing: another request's ids may be there
            self.banned_SV[slot] = False
            self.banned_SV[slot, self._ids(row.stop_ids)] = True

    def inputs(self, slots_B: Tensor, max_context_tokens: int) -> tuple[Tensor, Tensor, DecodeMetadata]:
        """(token ids, positions, metadata) of a step of B rows, none of them longer than `max_context_tokens`."""
        positions_B = self.num_kv_tokens_S[slots_B]
        width = -(-max_context_tokens // self.block_size)
        tables_BN = self.block_tables_SN[slots_B, :width]
        blocks_B = tables_BN.gather(1, (positions_B // self.block_size)[:, None])[:, 0].long()
        mapping_B = blocks_B * self.block_size + positions_B % self.block_size
        metadata = DecodeMetadata((positions_B + 1).int(), tables_BN, mapping_B, max_context_tokens)
        return self.last_token_S[slots_B], positions_B, metadata

    def sampling_batch(self, shard: DecodeShard, slots_B: Tensor) -> SamplingBatch:
        """Sampling of a step's rows, read from the slots; features as the host knows them."""
        params = [p for p in (self.params[slot] for slot in shard.slots) if p is not None]
        plain = self.plain_batch(slots_B, any_random=False)
        position_B = plain.position
        penalty = any(p.has_penalty for p in params)
        banned = None
        if self.banned_SV is not None and any(p.min_tokens for p in params):
            banned = self.banned_SV[slots_B] & (position_B < self.min_tokens_S[slots_B])[:, None]
        return replace(
            plain,
            # Rows without a penalty may read another request's leftovers here: their factors are neutral.
            output_counts=self.counts_SV[slots_B] if penalty and self.counts_SV is not None else None,
            prompt_mask=self.prompt_SV[slots_B] if penalty and self.prompt_SV is not None else None,
            banned=banned,
            **sampling_features(params, self.device),
        )

    def plain_batch(self, slots_B: Tensor, any_random: bool) -> SamplingBatch:
        """The rows' sampling without filters and penalties; `any_random=False`: greedy."""
        temperature, top_p, min_p, presence, frequency, repetition = self.floats_S6[slots_B].unbind(1)
        return SamplingBatch(
            temperature=temperature,
            top_k=self.top_k_S[slots_B],
            top_p=top_p,
            min_p=min_p,
            presence=presence,
            frequency=frequency,
            repetition=repetition,
            seed=self.seed_S[slots_B],
            position=self.position_S[slots_B],
            any_random=any_random,
            any_top_k=False,
            any_top_p=False,
            any_min_p=False,
            any_penalty=False,
            max_top_k=0,
        )

    def advance(self, slots_B: Tensor, token_ids_B: Tensor) -> None:
        """The step's rows have one more token: in the KV cache the old last one, as last one the sampled."""
        self.last_token_S[slots_B] = token_ids_B
        self.num_kv_tokens_S[slots_B] += 1
        self.position_S[slots_B] += 1
        self.num_kv_tokens_S[self.null_slot :].zero_()  # stays empty, however often it steps

    def count(self, slots_B: Tensor, token_ids_B: Tensor) -> None:
        """Count the sampled ids where penalties ask for it. Not in a graph: the table appears in mid-service."""
        if self.counts_SV is not None:
            self.counts_SV[slots_B, token_ids_B] += 1

    def _table(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(len(self.params), self.vocab_size, dtype=dtype, device=self.device)

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return to_device(ids, torch.int64, self.device)


def fill_counts(counts_V: Tensor, prompt_V: Tensor, row: SamplingRow) -> None:
    """Write a row's counts of generated ids and its mask of prompt ids."""
    counts_V.zero_()
    prompt_V.zero_()
    outputs = to_device(row.output_ids, torch.int64, counts_V.device)
    counts_V.index_add_(0, outputs, torch.ones_like(outputs, dtype=counts_V.dtype))
    prompt_V[to_device(row.prompt_ids, torch.int64, prompt_V.device)] = True


def _integers(entry: SlotEntry) -> tuple[int, ...]:
    """last token, tokens in the KV cache, output position, seed, top_k, min_tokens."""
    row = entry.sampling
    top_k = sampling_filters(row.params)[0]
    return entry.last_token, entry.num_kv_tokens, row.position, row.seed, top_k, row.params.min_tokens


def sampling_floats(p: SamplingParams) -> tuple[float, ...]:
    """temperature, top_p, min_p, presence, frequency, repetition; the filters of a greedy row are off."""
    _, top_p, min_p = sampling_filters(p)
    temperature = 0.0 if p.is_greedy else p.temperature
    return temperature, top_p, min_p, p.presence_penalty, p.frequency_penalty, p.repetition_penalty
