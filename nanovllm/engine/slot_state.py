"""What a card remembers of the sequences it decodes: one row a slot, advanced on the card itself.

The host sends only what changes (a sequence enters a slot, a table grows, a step has other rows); tokens, lengths and
output positions advance on the card, so that a step can be launched before the previous one's result is known to the
host. Where graphs run the steps, changes go up in packets [nanovllm/engine/slot_packets.py]; else by plain torch.

A sequence that samples one of its end ids is over on the card at once: steps launched before the host knows of it
give the row an empty context and let it write to the null block. So is one whose logits are no numbers.

Shape suffixes: S slots, B rows of this step, V vocabulary, N blocks a sequence can have, K end ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nanovllm.engine.shards import DecodeShard, NewBlock, SamplingRow, SlotEntry
from nanovllm.layers.attention import DecodeMetadata
from nanovllm.layers.host import to_device
from nanovllm.layers.sampler import SamplingBatch, sampling_features, sampling_filters
from nanovllm.layers.seen_tokens import reset_, unpack
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:  # it imports Triton
    from nanovllm.engine.slot_packets import SlotPackets

ALIVE, MIN_TOKENS = 6, 5  # columns of `integers_S7`
ALIGNED_BYTES = 256
MAX_END_IDS = 128  # every stop id that a request may have, and the checkpoint's eos ids


class Asked(NamedTuple):
    """What the rows of a step ask of it: the highest sampler level, and log-probabilities by row; [] if none asks."""

    sampler_level: int
    num_logprobs: list[int | None]


class SlotState:
    """Static buffers of one decode card, and beside them what the host knows of each slot's sampling.

    `words`: the memory of all of them, int32. `rows_B`: the slots of the step's rows, and behind them the null slot
    throughout: steps may be padded to any size.
    """

    def __init__(
        self, num_slots: int, max_blocks: int, block_size: int, null_block: int, vocab_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.null_block = null_block
        self.vocab_size = vocab_size
        self.device = device
        self.params: list[SamplingParams | None] = [None] * num_slots
        self.sampler_levels = [0] * num_slots  # what a step asks of each row's parameters
        self.num_logprobs: list[int | None] = [None] * num_slots
        self.null_slot = num_slots  # where a graph's padding rows point: an empty context, writing to the null block
        rows = num_slots + 1
        self.words, parts = one_allocation(
            device,
            ((rows, 7), torch.int64),
            ((rows, MAX_END_IDS), torch.int64),
            ((rows, 6), torch.float32),
            ((rows, max_blocks), torch.int32),
            ((num_slots,), torch.int64),
        )
        self.integers_S7, self.end_ids_SK, self.floats_S6, self.block_tables_SN, self.rows_B = parts
        # integers_S7: see slot_integers; floats_S6: see sampling_floats.
        self.last_token_S, self.num_kv_tokens_S, self.position_S = self.integers_S7.unbind(1)[:3]
        self.seed_S, self.top_k_S, self.min_tokens_S, self.alive_S = self.integers_S7.unbind(1)[3:]
        self.end_ids_SK.fill_(-1)
        self.block_tables_SN.fill_(null_block)
        self.rows_B.fill_(self.null_slot)
        self._rows: tuple[int, ...] = ()  # what rows_B holds, ahead of its padding
        self._asked: tuple[tuple[int, ...], Asked] | None = None  # by the rows of the last step
        self.packets: SlotPackets | None = None
        # Exists only once a request, or a captured graph, needs it: 0.3 GB at 512 slots of Qwen3's vocabulary.
        self.seen_SV: Tensor | None = None

    def use_packets(self, packets: SlotPackets) -> None:
        """From now on changes go up in packets; they have made all rows those of the null slot."""
        self.packets, self._rows = packets, ()

    def apply(self, shard: DecodeShard) -> None:
        """Take in what changed since the last step."""
        if self.packets is not None:
            self._send(shard.entries, shard.new_blocks, shard.slots)
        else:
            self._write(shard.entries, shard.new_blocks)
        for entry in shard.entries:
            self.params[entry.slot] = params = entry.sampling.params
            self.sampler_levels[entry.slot], self.num_logprobs[entry.slot] = params.sampler_level, params.logprobs
            self._enter_seen(entry.slot, entry.sampling)
            self._asked = None

    def set_rows(self, slots: tuple[int, ...]) -> None:
        """Make them the rows of the next step."""
        if self.packets is not None:
            self._send((), (), slots)
        elif slots != self._rows:
            self.rows_B.copy_(self._ids([*slots, *[self.null_slot] * (len(self.rows_B) - len(slots))]))
            self._rows = slots

    def _send(self, entries: tuple[SlotEntry, ...], new_blocks: tuple[NewBlock, ...], slots: tuple[int, ...]) -> None:
        assert self.packets is not None
        moved = slots != self._rows  # most steps have the rows of the step before
        if entries or new_blocks or moved:
            self.packets.send(entries, new_blocks, slots if moved else None)
            self._rows = slots

    def asked(self, slots: tuple[int, ...]) -> Asked:
        """By a step of these rows."""
        if self._asked is None or self._asked[0] != slots:
            wanted = [self.num_logprobs[slot] for slot in slots]
            level = max([self.sampler_levels[slot] for slot in slots])
            self._asked = slots, Asked(level, wanted if any(k is not None for k in wanted) else [])
        return self._asked[1]

    def _write(self, entries: tuple[SlotEntry, ...], new_blocks: tuple[NewBlock, ...]) -> None:
        """The plain twin of packets."""
        if entries:
            self._enter(entries)
        if new_blocks:
            slots, columns, blocks = zip(*((new.slot, new.column, new.block) for new in new_blocks), strict=True)
            self.block_tables_SN[self._ids(slots), self._ids(columns)] = self._ids(blocks).int()

    def _enter(self, entries: tuple[SlotEntry, ...]) -> None:
        """One copy a kind of state for all of them, each queued: nothing here waits for the card."""
        slots_B = self._ids([entry.slot for entry in entries])
        width = self.block_tables_SN.shape[1]
        tables = [[*entry.block_table, *[self.null_block] * (width - len(entry.block_table))] for entry in entries]
        integers = [slot_integers(entry.sampling, entry.last_token, entry.num_kv_tokens) for entry in entries]
        self.integers_S7[slots_B] = to_device(integers, torch.int64, self.device)
        floats = [sampling_floats(entry.sampling.params) for entry in entries]
        self.floats_S6[slots_B] = to_device(floats, torch.float32, self.device)
        self.block_tables_SN[slots_B] = to_device(tables, torch.int32, self.device)
        end_ids = [kept_end_ids(entry) for entry in entries]
        padded = [[*ids, *[-1] * (MAX_END_IDS - len(ids))] for ids in end_ids]
        self.end_ids_SK[slots_B] = to_device(padded, torch.int64, self.device)

    def _enter_seen(self, slot: int, row: SamplingRow) -> None:
        """Rows of other requests keep what the slot's last owner left: nothing reads it."""
        if row.params.has_penalty or row.params.min_tokens:
            fill_seen(self.need_seen(), slot, row)

    def need_seen(self) -> Tensor:
        """The table of what every slot has seen, made now if it was not yet."""
        if self.seen_SV is None:
            shape = len(self.params) + 1, self.vocab_size
            self.seen_SV = torch.zeros(shape, dtype=torch.int32, device=self.device)
        return self.seen_SV

    def inputs(self, slots_B: Tensor, max_context_tokens: int) -> tuple[Tensor, Tensor, DecodeMetadata]:
        """(token ids, positions, metadata) of a step of B rows, none of them longer than `max_context_tokens`."""
        positions_B, alive_B = self.num_kv_tokens_S[slots_B], self.alive_S[slots_B] != 0
        width = -(-max_context_tokens // self.block_size)
        tables_BN = self.block_tables_SN[slots_B, :width]
        last_B = (positions_B // self.block_size).clamp_(max=width - 1)  # of a row that has ended: any
        blocks_B = tables_BN.gather(1, last_B[:, None])[:, 0].long()
        blocks_B = torch.where(alive_B, blocks_B, self.null_block)
        mapping_B = blocks_B * self.block_size + positions_B % self.block_size
        context_lens_B = torch.where(alive_B, positions_B + 1, 0).int()
        metadata = DecodeMetadata(context_lens_B, tables_BN, mapping_B, max_context_tokens)
        return self.last_token_S[slots_B], positions_B, metadata

    def sampling_batch(self, shard: DecodeShard, slots_B: Tensor) -> SamplingBatch:
        """Sampling of a step's rows, read from the slots; features as the host knows them."""
        params = [p for p in (self.params[slot] for slot in shard.slots) if p is not None]
        temperature, top_p, min_p, presence, frequency, repetition = self.floats_S6[slots_B].unbind(1)
        position_B = self.position_S[slots_B]
        counts, prompt, banned = None, None, None
        if self.seen_SV is not None and any(p.has_penalty or p.min_tokens for p in params):
            # Rows that are neutral may read another request's leftovers here.
            counts, prompt, banned = unpack(self.seen_SV[slots_B])
            banned = banned & (position_B < self.min_tokens_S[slots_B])[:, None]
        return SamplingBatch(
            temperature=temperature,
            top_k=self.top_k_S[slots_B],
            top_p=top_p,
            min_p=min_p,
            presence=presence,
            frequency=frequency,
            repetition=repetition,
            seed=self.seed_S[slots_B],
            position=position_B,
            output_counts=counts,
            prompt_mask=prompt,
            banned=banned,
            **sampling_features(params, self.device),
        )

    def advance(self, slots_B: Tensor, token_ids_B: Tensor) -> None:
        """The living rows have one more token: in the KV cache the old last one, as last one the sampled. One that
        sampled NO_TOKEN is over."""
        alive_B, drawn_B = self.alive_S[slots_B], token_ids_B >= 0
        self.last_token_S[slots_B] = torch.where((alive_B != 0) & drawn_B, token_ids_B, self.last_token_S[slots_B])
        self.num_kv_tokens_S[slots_B] += alive_B
        self.position_S[slots_B] += alive_B
        ended_B = (self.end_ids_SK[slots_B] == token_ids_B[:, None]).any(1)
        ended_B &= self.position_S[slots_B] >= self.min_tokens_S[slots_B]
        self.alive_S[slots_B] = torch.where(ended_B | ~drawn_B, 0, alive_B)

    def count(self, slots_B: Tensor, token_ids_B: Tensor) -> None:
        """Count the sampled ids, where any slot's are counted."""
        if self.seen_SV is not None:
            self.seen_SV[slots_B, token_ids_B.clamp(min=0)] += 1  # of a row that is over, whatever

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return to_device(ids, torch.int64, self.device)


def fill_seen(table_SV: Tensor, slot: int, row: SamplingRow) -> None:
    """Write what a sequence has seen into its row of the table."""
    kinds = (row.prompt_ids, row.output_ids, row.stop_ids)
    reset_(table_SV, slot, *(to_device(ids, torch.int64, table_SV.device) for ids in kinds))


def slot_integers(row: SamplingRow, last_token: int, num_kv_tokens: int) -> tuple[int, ...]:
    """last token, tokens in the KV cache, output position, seed, top_k, min_tokens, alive."""
    top_k = sampling_filters(row.params)[0]
    return last_token, num_kv_tokens, row.position, row.seed, top_k, row.params.min_tokens, 1


def kept_end_ids(entry: SlotEntry) -> tuple[int, ...]:
    """None at all if they are too many: then the host alone ends the sequence, a few steps later."""
    return entry.end_ids if len(entry.end_ids) <= MAX_END_IDS else ()


def sampling_floats(p: SamplingParams) -> tuple[float, ...]:
    """temperature, top_p, min_p, presence, frequency, repetition; the filters of a greedy row are off."""
    _, top_p, min_p = sampling_filters(p)
    temperature = 0.0 if p.is_greedy else p.temperature
    return temperature, top_p, min_p, p.presence_penalty, p.frequency_penalty, p.repetition_penalty


def one_allocation(
    device: torch.device, *parts: tuple[tuple[int, ...], torch.dtype]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Zeroed tensors of these shapes and types in one memory, each aligned as if alone; that memory as int32 words."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in parts]
    aligned = [-(-size // ALIGNED_BYTES) * ALIGNED_BYTES for size in sizes]
    assert sum(aligned) < 1 << 33, "32-bit offsets of words"
    memory = torch.zeros(sum(aligned), dtype=torch.uint8, device=device)
    pieces = [piece[:size] for piece, size in zip(memory.split(aligned), sizes, strict=True)]
    views = [piece.view(dtype).view(shape) for piece, (shape, dtype) in zip(pieces, parts, strict=True)]
    return memory.view(torch.int32), tuple(views)
