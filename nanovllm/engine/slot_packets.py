"""What changed since a card's last decode step, in one copy and one kernel: sequences that entered, blocks, the rows.

The plain twin is `SlotState` without packets. Both write the same, bit for bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nanovllm.engine.shards import NewBlock, SlotEntry
from nanovllm.engine.slot_state import SlotState, kept_end_ids, sampling_floats, slot_integers
from nanovllm.kernels.packet import RUN_WORDS, write_runs
from nanovllm.layers.host import PinnedRing

PACKET_WORDS = 1 << 16  # of one packet: all that 512 sequences of 1,000 tokens bring with them
RING_BUFFERS = 8  # more than there are steps in flight, of one packet each in nearly all cases


class Table(NamedTuple):
    """Where one of the state's buffers begins in `SlotState.words`, and how long its rows are there."""

    place: int
    row_words: int

    @classmethod
    def of(cls, buffer: Tensor) -> Table:
        """A buffer of one dimension has one row."""
        per_element, row = buffer.element_size() // 4, buffer[0] if buffer.dim() > 1 else buffer
        return cls(int(buffer.storage_offset()) * per_element, row.numel() * per_element)


class SlotPackets:
    """Writes into the state's buffers by packets [nanovllm/kernels/packet.py], queued on the current stream.

    Made with the stream of the steps current, once: the kernel compiles here. What does not fit into one packet goes
    into several. max_words: of a packet; at least the longest run has room.
    """

    def __init__(self, state: SlotState, max_words: int = PACKET_WORDS) -> None:
        self._target, self._null_block, self._null_slot = state.words, state.null_block, state.null_slot
        self._integers, self._floats = Table.of(state.integers_S7), Table.of(state.floats_S6)
        self._end_ids, self._tables = Table.of(state.end_ids_SK), Table.of(state.block_tables_SN)
        self._rows, self._num_rows = Table.of(state.rows_B), len(state.rows_B)
        longest = max(self._end_ids.row_words, self._tables.row_words, self._rows.row_words)
        self.max_words = max(max_words, longest + RUN_WORDS)
        self._ring = PinnedRing(RING_BUFFERS, self.max_words, state.device)
        self._headers, self._words = array("i"), array("i")
        self.num_sent = 0
        self.send((), (), ())

    def send(self, entries: Sequence[SlotEntry], new_blocks: Sequence[NewBlock], slots: tuple[int, ...] | None) -> None:
        """Queue a step's changes. slots: the step's rows; None: as they are."""
        for entry in entries:
            self._add_entry(entry)
        if new_blocks:
            entered = {entry.slot for entry in entries}
            if entered and any(new.slot in entered for new in new_blocks):
                self._flush()  # a table must be there before what is appended to it
            self._add_blocks(new_blocks)
        if slots is not None:
            padded = array("q", [*slots, *[self._null_slot] * (self._num_rows - len(slots))])
            self._add(self._rows, 0, padded)
        self._flush()

    def _add_entry(self, entry: SlotEntry) -> None:
        slot = entry.slot
        self._add(
            self._integers, slot, array("q", slot_integers(entry.sampling, entry.last_token, entry.num_kv_tokens))
        )
        self._add(self._floats, slot, array("f", sampling_floats(entry.sampling.params)))
        self._add(self._end_ids, slot, array("q", kept_end_ids(entry)), padding=-1)
        self._add(self._tables, slot, array("i", entry.block_table), padding=self._null_block)

    def _add(self, table: Table, row: int, values: array[int] | array[float], padding: int = 0) -> None:
        """A row of a table: the bits of its values, and `padding` in every word beyond them."""
        count, length = len(values) * values.itemsize // 4, table.row_words
        assert count <= length, f"{count} words for a row of {length}"
        if self._room < RUN_WORDS + count:
            self._flush()
        self._headers.extend((table.place + row * length, len(self._words), count, length, padding))
        self._words.frombytes(values.tobytes())

    def _add_blocks(self, new_blocks: Sequence[NewBlock]) -> None:
        """In one loop: sequences of equal lengths all fill their blocks in the same step."""
        place, width = self._tables
        while new_blocks:
            if self._room < RUN_WORDS + 1:
                self._flush()
            fitting = new_blocks[: self._room // (RUN_WORDS + 1)]
            for at, new in enumerate(fitting, start=len(self._words)):
                self._headers.extend((place + new.slot * width + new.column, at, 1, 1, 0))
            self._words.extend([new.block for new in fitting])
            new_blocks = new_blocks[len(fitting) :]

    @property
    def _room(self) -> int:
        return self.max_words - len(self._headers) - len(self._words)

    def _flush(self) -> None:
        num_runs = len(self._headers) // RUN_WORDS
        if num_runs:
            write_runs(self._ring.send(self._headers + self._words), num_runs, self._target)
            self._headers, self._words = array("i"), array("i")
            self.num_sent += 1
