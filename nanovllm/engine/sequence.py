"""A request and its sequences (n of them), as the plan sees them. Only the engine thread writes here.

Readers in other threads see token arrays that only grow, and `finish_reason` set after the last token was
appended: a reader that looks at `finish_reason` first never sees a finished sequence that is short of tokens.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import xxhash

from nanovllm.engine.block_manager import ROOT_HASH, BlockHash, chain_hash
from nanovllm.engine.detokenizer import StopWatcher
from nanovllm.engine.request_states import TRANSITIONS, State
from nanovllm.engine.sequence_lease import SequenceLease
from nanovllm.engine.shards import NO_TOKEN, SamplingRow, StepResult, TokenLogprobs
from nanovllm.sampling_params import SamplingParams


def derive_seed(*parts: int) -> int:
    """A signed 64-bit seed from a tuple of integers."""
    digest = xxhash.xxh3_64_intdigest(repr(parts).encode())
    return digest - (1 << 64) if digest >= 1 << 63 else digest


@dataclass(slots=True)
class Timeline:
    """When things happened to a request, in seconds of `time.perf_counter()` in the engine thread; None: not yet.

    resident: only where prefill was on another card than decoding is.
    """

    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    prefilled: float | None = None
    resident: float | None = None
    finished: float | None = None

    def mark(self, event: str) -> None:
        """Note the first time of `event`; later ones (a sequence computed again) do not count."""
        if getattr(self, event) is None:
            setattr(self, event, time.perf_counter())


class Sequence:
    """One answer of a request: its tokens, its state, its place in the plan.

    Tokens and times are arrays: there are many and long ones, and garbage collections, which stop every thread, do not
    look into them.
    """

    def __init__(self, request: Request, index: int, seed: int) -> None:
        self.request = request
        self.index = index
        self.seed = seed
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.tokens = request.prompt_token_ids[:]
        self.max_length = self.num_prompt_tokens + request.max_tokens
        self.end_ids = request.end_ids | {NO_TOKEN}  # what the engine looks at; a card is told the request's
        self.state = State.WAITING
        self.card = 0  # where it decodes or will, once it was admitted
        self.lease: SequenceLease | None = None
        self.slot: int | None = None
        self.num_kv_tokens = 0  # positions whose KV is written by steps launched so far
        self.num_card_blocks = 0  # leading entries of its table that its slot on the card knows; 0: not entered
        self.kv_limit_tokens = 0  # `num_kv_tokens` up to which it steps with the blocks its slot knows
        self.num_in_flight = 0  # sampled tokens launched and not yet collected
        self.block_hashes: list[BlockHash] = []  # of the leading full blocks, as far as they were asked for
        self.num_settled_outputs = 0  # output tokens that no stop rule takes back: what readers may see
        self.token_times = array("d")
        self.last_token_s: float | None = None  # the last of them, where it is quickest to read
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None  # why, where `finish_reason` is "error"
        self.watcher: StopWatcher | None = None  # set where stop strings must be watched for

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_planned_outputs(self) -> int:
        """Output tokens collected or launched."""
        return self.num_output_tokens + self.num_in_flight

    @property
    def order(self) -> tuple[int, int]:
        """Arrival order; siblings by index."""
        return self.request.arrival, self.index

    @property
    def finished(self) -> bool:
        return self.state is State.FINISHED

    def move_to(self, state: State) -> None:
        assert (self.state, state) in TRANSITIONS, f"{self.state} → {state} is not a legal move"
        self.state = state

    def hashes(self, num_blocks: int, block_size: int) -> list[BlockHash]:
        """Chained hashes of the first `num_blocks` blocks; every token of theirs is known."""
        assert num_blocks * block_size <= len(self.tokens)
        while len(self.block_hashes) < num_blocks:
            start = len(self.block_hashes) * block_size
            parent = self.block_hashes[-1].value if self.block_hashes else ROOT_HASH
            tokens = self.tokens[start : start + block_size]
            self.block_hashes.append(chain_hash(parent, tokens, self.request.hash_seed))
        return self.block_hashes[:num_blocks]

    def take_back(self) -> None:
        """Its last token was none."""
        self.tokens.pop()
        self.token_times.pop()
        if self.request.params.logprobs is not None:
            self.logprobs.pop()

    def sampling_row(self) -> SamplingRow:
        """The row for the next output position that is not launched yet; no sample may be in flight."""
        assert self.num_in_flight == 0
        params = self.request.params
        penalised = params.has_penalty
        prompt, outputs = self.tokens[: self.num_prompt_tokens], self.tokens[self.num_prompt_tokens :]
        return SamplingRow(
            params,
            self.seed,
            self.num_output_tokens,
            tuple(prompt) if penalised else (),
            tuple(outputs) if penalised else (),
            tuple(sorted(self.request.end_ids)) if params.min_tokens > self.num_output_tokens else (),
        )


def append_sampled(rows: Iterable[Sequence], result: StepResult, now_s: float) -> list[Sequence]:
    """Give each sequence the token it sampled; returns those that may have ended with it. The others are settled.

    One loop without a call for each: it runs for every token that the engine makes.
    """
    for sequence, logprobs in zip(rows, result.logprobs, strict=False):  # none at all where nobody asked
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
    may_have_ended = []
    for sequence, token in zip(rows, result.token_ids, strict=True):
        tokens = sequence.tokens
        tokens.append(token)
        sequence.token_times.append(now_s)
        sequence.last_token_s = now_s
        num_tokens = len(tokens)
        if num_tokens >= sequence.max_length or token in sequence.end_ids or sequence.watcher is not None:
            may_have_ended.append(sequence)
        else:
            sequence.num_settled_outputs = num_tokens - sequence.num_prompt_tokens
    return may_have_ended


class Request:
    """What a caller asked for: one prompt, n answers."""

    def __init__(
        self,
        request_id: str,
        arrival: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        eos_token_ids: tuple[int, ...] = (),
        engine_seed: int = 0,
        hash_seed: int = 0,
    ) -> None:
        self.request_id = request_id
        self.arrival = arrival
        self.prompt = prompt
        self.prompt_token_ids = array("q", prompt_token_ids)
        self.params = params
        self.max_tokens = max_tokens
        self.eos_token_ids = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self.stop_token_ids = frozenset(params.stop_token_ids or ())
        self.stop_strings = tuple(params.stop or ())
        self.end_ids = frozenset(self.eos_token_ids | self.stop_token_ids)  # banned before min_tokens
        self.hash_seed = hash_seed
        self.timeline = Timeline()
        self.num_cached_tokens = 0
        self.end_was_told = False  # by `step()`, which tells it once
        root = derive_seed(engine_seed, arrival) if params.seed is None else derive_seed(params.seed)
        self.sequences = [Sequence(self, index, derive_seed(root, index)) for index in range(params.n)]

    @property
    def finished(self) -> bool:
        for sequence in self.sequences:  # not `all(...)`: it is asked for every token
            if sequence.finish_reason is None:
                return False
        return True


class PrefillGroup:
    """Sequences whose first token comes from one prefill: n siblings, or one that is computed again."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.num_tokens = len(self.leader.tokens)
        # False where the prefill's own sample is the last token there can be.
        self.needs_decode = self.leader.num_output_tokens + 1 < self.leader.request.max_tokens
        self.cards = (0, 0)  # which prefills it and which decodes it, once it was admitted
        self.num_launched_tokens = 0  # prefilled or cached, as far as launched
        self.num_mirrored_blocks = 0  # leading blocks resident on, or on their way to, the decode card
        self.copies_in_flight = 0
        self.prefilled = False
        self.abandoned = False  # after a fault: its sequences are in other groups, what is in flight of it is dropped

    @property
    def leader(self) -> Sequence:
        return self.sequences[0]

    @property
    def prefill_card(self) -> int:
        return self.cards[0]

    @property
    def decode_card(self) -> int:
        return self.cards[1]

    @property
    def changes_cards(self) -> bool:
        return self.cards[0] != self.cards[1]

    @property
    def members(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if not sequence.finished]

    @property
    def is_first(self) -> bool:
        """Not one that is computed again."""
        return self.num_tokens == self.leader.num_prompt_tokens

    @property
    def order(self) -> tuple[int, int]:
        return self.leader.order
