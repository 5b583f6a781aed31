"""What the scheduler hands to a card: immutable descriptions of one prefill step, one decode step, one copy.

A runner keeps per-slot state on its card (last token, length, block table, sampling), so a decode shard names
only what changed: sequences that enter a slot, blocks that were added, and the slots that take this step.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from nanovllm.sampling_params import SamplingParams

NO_TOKEN = -1  # in a result, where no id can be drawn: its row's logits are no numbers


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the sampler needs to know of one sequence at one output position.

    `seed`: signed 64 bits, this sequence's own. `position`: the output position to sample. `prompt_ids` and
    `output_ids` are filled only where a penalty reads them; `stop_ids` are banned before `min_tokens`.
    """

    params: SamplingParams
    seed: int
    position: int
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens `start … start + len(tokens)` of one sequence; `samples` is empty unless this is its last chunk."""

    tokens: array[int] | tuple[int, ...]  # 64-bit ids
    start: int
    block_table: tuple[int, ...]
    samples: tuple[SamplingRow, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillShard:
    """One prefill step of one card. Its result has one row for each sample, in order.

    `lent`: it runs beside the card's other steps, on SMs that they leave to it, and ends before or after them.
    """

    card: int
    step: int
    chunks: tuple[PrefillChunk, ...]
    lent: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def num_samples(self) -> int:
        return sum(len(chunk.samples) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SlotEntry:
    """A sequence enters a slot: its KV covers `num_kv_tokens`, `last_token` comes next; one of `end_ids` ends it."""

    slot: int
    last_token: int
    num_kv_tokens: int
    block_table: tuple[int, ...]
    sampling: SamplingRow
    end_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NewBlock:
    """`block` is appended to the table of `slot` as its entry number `column`."""

    slot: int
    column: int
    block: int


@dataclass(frozen=True, slots=True)
class DecodeShard:
    """One decode step: every slot in `slots` advances by one token. `max_context_tokens` bounds their lengths.

    `beside_lent`: a lent prefill step is in flight, and has part of the card's SMs.
    """

    card: int
    step: int
    slots: tuple[int, ...]
    max_context_tokens: int
    entries: tuple[SlotEntry, ...] = ()
    new_blocks: tuple[NewBlock, ...] = ()
    beside_lent: bool = False


@dataclass(frozen=True, slots=True)
class MixedShard:
    """Chunks of prompts and decode rows of one card in one step: both halves name that card and step, neither is empty.

    Its result has the samples of `prefill` first, then a row for each slot of `decode`.
    """

    card: int
    step: int
    prefill: PrefillShard
    decode: DecodeShard


@dataclass(frozen=True, slots=True)
class CopyShard:
    """Whole blocks from card `src` to card `dst` (which may be the same), not before `after_step` of `src` ended.

    `also`: the numbers of further copies that travel with it; `block_pairs` holds theirs too.
    """

    copy: int
    src: int
    dst: int
    block_pairs: tuple[tuple[int, int], ...]
    after_step: int
    also: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of the model itself (before penalties and temperature) at one position."""

    chosen: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled ids of a prefill or decode shard, or NO_TOKEN, one a row, and their log-probabilities where asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)


Shard = PrefillShard | DecodeShard | MixedShard | CopyShard
