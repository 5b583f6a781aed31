"""What a load consists of: when requests arrive, and which tokens they ask for. All of it drawn from one seed.

Arrivals and lengths follow the definitions of `vllm bench serve` (https://docs.vllm.ai/en/latest/benchmarking/cli):
its arrival process, and its `random` and `prefix_repetition` data sets. A chat is a conversation of token ids.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import NamedTuple

MIN_THINK_S = 0.05  # answers are looked for every 20 ms, see bench_load.COLLECT_EVERY_S


class Rate(NamedTuple):
    """An arrival rate as it was asked for: requests a second, or a share of a capacity that is measured first."""

    number: float
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> Rate:
        """\"29.4\", \"inf\" (all at once), or \"0.5x\" (half of the capacity)."""
        is_share = text.endswith("x")
        try:
            number = float(text.removesuffix("x"))
        except ValueError:
            number = math.nan
        if not number > 0 or (is_share and math.isinf(number)):
            raise ValueError(f"request rate {text!r} is not a positive number, inf, or a share such as 0.5x")
        return cls(number, is_share)

    @property
    def label(self) -> str:
        return f"{self.number:g}{'x' if self.is_share else ''}"

    def requests_per_s(self, capacity: float | None) -> float:
        if not self.is_share:
            return self.number
        assert capacity is not None
        return self.number * capacity


def arrival_times(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds from the begin of the load to each of `count` arrivals; zeros at an infinite rate.

    Gaps are gamma distributed with shape `burstiness` and scale 1 / (rate · burstiness): 1 is a Poisson process, below
    it comes in bursts, above it is even. As `vllm bench serve` does, the times are then stretched so that the last one
    is count / rate: the rate asked for is the rate of this very load.
    """
    if math.isinf(rate):
        return [0.0] * count
    gaps = [rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)]
    times = list(itertools.accumulate(gaps))
    return [time / times[-1] * count / rate for time in times]


class Turn(NamedTuple):
    """One request of a conversation: what it adds to all that was said before, and how long its answer is."""

    new_tokens: list[int]
    num_output_tokens: int


Conversation = list[Turn]  # one turn, unless it is a chat


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens; each is uniform in length · (1 ± range_ratio), as in the `random` set of `vllm bench serve`.

    random: prompts that share nothing. prefix: every prompt is one of `num_prefixes` common beginnings of `prefix_len`
    tokens, then `input_len` tokens of its own. chat: `num_prompts` / `turns` conversations; a turn's prompt is all of
    the conversation so far, answers included, and `input_len` new tokens; it arrives `think_s` after the answer ended.
    """

    kind: str = "random"
    num_prompts: int = 1000
    input_len: int = 1024
    output_len: int = 256
    range_ratio: float = 0.0
    num_prefixes: int = 1
    prefix_len: int = 0
    turns: int = 1
    think_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"range_ratio={self.range_ratio} must be at least 0 and below 1")
        if self.num_prompts % self.turns:
            raise ValueError(f"num_prompts={self.num_prompts} is not a multiple of turns={self.turns}")
        if not self.think_s >= MIN_THINK_S:
            raise ValueError(f"think_s={self.think_s} must be at least {MIN_THINK_S}")

    @property
    def num_conversations(self) -> int:
        return self.num_prompts // self.turns

    def draw(self, vocab_size: int, rng: random.Random) -> list[Conversation]:
        """`num_conversations` of them, `num_prompts` turns together."""
        ids = range(vocab_size)
        prefixes = [rng.choices(ids, k=self.prefix_len) for _ in range(self.num_prefixes)]
        takers = [index % self.num_prefixes for index in range(self.num_conversations)]
        rng.shuffle(takers)
        return [self._conversation(prefixes[taker], ids, rng) for taker in takers]

    def _conversation(self, prefix: list[int], ids: range, rng: random.Random) -> Conversation:
        turns = []
        for turn in range(self.turns):
            own = rng.choices(ids, k=self._length(self.input_len, rng))
            turns.append(Turn(own if turn else prefix + own, self._length(self.output_len, rng)))
        return turns

    def _length(self, mean: int, rng: random.Random) -> int:
        shortest, longest = math.floor(mean * (1 - self.range_ratio)), math.ceil(mean * (1 + self.range_ratio))
        return rng.randint(max(1, shortest), longest)


def next_prompt(prompt: list[int], answer: list[int], turn: Turn) -> list[int]:
    """The prompt of the next turn of a chat."""
    return prompt + answer + turn.new_tokens


def most_tokens(conversations: list[Conversation]) -> int:
    """Prompt and answer of the longest request: the last turn of a conversation contains all that came before."""
    return max(sum(len(turn.new_tokens) + turn.num_output_tokens for turn in turns) for turns in conversations)
