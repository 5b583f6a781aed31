"""How long steps take, by card, and so how many prompt tokens a decode step has room for."""

from __future__ import annotations

import math

from nanovllm.engine.shards import DecodeShard, MixedShard, PrefillShard, Shard
from nanovllm.engine.step_sizes import chunk_sizes

PREFILL_TOKENS = (2048, 4096, 8192)  # of a step of card 0 with elastic roles
PREFILL_STEP_S = 0.12  # of it, but for the smallest: what card 0 has launched, card 1 cannot take any more
MEASURED_TOKENS = 512  # a prefill step of fewer says little about many
WEIGHT = 0.2  # of a new measurement in a moving average
LENT_STRETCH = 2.0  # of a decode step that lends about half of its SMs, before it was measured
MIXED_IN_A_ROW = 32  # steps of a card; then one or two go without prompts, and twice of what these take is the limit


class Pace:
    """Moving averages of device seconds. Before the first measurement a chunk is the smallest.

    `max_num_seqs`: the most decode rows of a card. `itl_slo_ms`: what a step may take with a chunk; None: twice what
    one of the last card takes without. Other cards may always take twice their own. `token_s`: seconds a token of a
    prompt, as measured at start-up; 0: unknown until a step of many was seen.
    """

    def __init__(self, num_cards: int, max_num_seqs: int, itl_slo_ms: float | None, token_s: float = 0.0) -> None:
        self._max_num_seqs = max_num_seqs
        self._slo_s = None if itl_slo_ms is None else itl_slo_ms / 1e3
        self.decode_s = [0.0] * num_cards  # a step without prompts, as the batch is now
        self._measured_s = [0.0] * num_cards  # the last ones that had none; 0: there was none yet
        self._mixed_in_a_row = [0] * num_cards
        self._beside_lent_s = 0.0  # a step of the last card beside a lent one; 0: its last step was none of these
        self.token_s = token_s  # of a prompt, in a step of many

    def record(self, shard: Shard, seconds: float) -> None:
        """A step has completed in so many seconds of its card."""
        if isinstance(shard, PrefillShard):
            if shard.num_tokens >= MEASURED_TOKENS and not shard.lent:
                self.token_s = _average(self.token_s, seconds / shard.num_tokens)
        elif isinstance(shard, DecodeShard):
            self._record_decode(shard, seconds)
        elif isinstance(shard, MixedShard):
            # Mostly a chunk takes a little less here than `token_s` says, since weights are read anyway: what is left
            # for decoding comes out short. Where it takes more (a long prompt's end), that comes out long: together
            # they are right for the next step, but no limit may follow from it, or long steps would allow longer ones.
            alone_s = max(0.0, seconds - shard.prefill.num_tokens * self.token_s)
            self.decode_s[shard.card] = _average(self.decode_s[shard.card], alone_s)
            self._mixed_in_a_row[shard.card] += 1

    def _record_decode(self, shard: DecodeShard, seconds: float) -> None:
        if shard.beside_lent:
            self._beside_lent_s = _average(self._beside_lent_s, seconds)
        else:
            card = shard.card
            self.decode_s[card] = _average(self.decode_s[card], seconds)
            self._measured_s[card] = _average(0.0 if self._mixed_in_a_row[card] else self._measured_s[card], seconds)
            self._mixed_in_a_row[card] = 0
            self._beside_lent_s = 0.0 if card == len(self.decode_s) - 1 else self._beside_lent_s

    def chunk_tokens(self, card: int, num_rows: int) -> int:
        """Prompt tokens that the next step of `card` has room for beside so many rows: one of `chunk_sizes`, if need be
        the smallest."""
        sizes = chunk_sizes(num_rows, self._max_num_seqs)
        if not (self.decode_s[card] and self.token_s):
            return sizes[0]
        return max((size for size in sizes if size * self.token_s <= self._room_s(card)), default=sizes[0])

    def lacks_measurement(self, card: int) -> bool:
        """Whether a step of `card` should go without prompts, to tell anew how long these may make it."""
        is_told = self._slo_s is not None and card == len(self.decode_s) - 1
        return not is_told and self._mixed_in_a_row[card] >= MIXED_IN_A_ROW

    def keeps_slo(self, card: int, num_rows: int) -> bool:
        """Whether the smallest chunk still fits under the SLO of `card` beside so many rows. Without an SLO it does."""
        if self._slo_s is None or num_rows == 0:
            return True
        return chunk_sizes(num_rows, self._max_num_seqs)[0] * self.token_s <= self._room_s(card)

    def keeps_slo_lending(self, num_rows: int) -> bool:
        """Whether steps of the last card, of so many rows, keep its SLO beside a lent one. Without an SLO they do: what
        the default asks for, at most twice the time alone, is a matter of the split."""
        if self._slo_s is None or num_rows == 0:
            return True
        return (self._beside_lent_s or LENT_STRETCH * self.decode_s[-1]) <= self._slo_s

    def _room_s(self, card: int) -> float:
        """Of a step for a chunk. Card 0 with few rows is no quicker to its readers than the decode card to its own: its
        prompts need chunks that are worth their step."""
        limit_s = self._twice_s(len(self.decode_s) - 1) if self._slo_s is None else self._slo_s
        if card != len(self.decode_s) - 1:
            limit_s = max(limit_s, self._twice_s(card))
        return limit_s - self.decode_s[card]

    def _twice_s(self, card: int) -> float:
        """Two steps without prompts, as measured; estimated before the first one."""
        return 2 * (self._measured_s[card] or self.decode_s[card])

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens of a step of card 0 that has no rows."""
        return max(
            (size for size in PREFILL_TOKENS if self.seconds_of(size) <= PREFILL_STEP_S), default=PREFILL_TOKENS[0]
        )

    def steps_in(self, seconds: float) -> float:
        """Decode steps of the last card; infinite as long as none was measured."""
        return seconds / self.decode_s[-1] if self.decode_s[-1] else math.inf

    def seconds_of(self, num_tokens: int) -> float:
        """What a card takes for so many prompt tokens; infinite as long as none was measured."""
        return num_tokens * self.token_s if self.token_s else math.inf


def _average(old: float, new: float) -> float:
    return new if old == 0.0 else old + WEIGHT * (new - old)
