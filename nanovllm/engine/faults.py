"""What a failed shard means: try again, prefill again, go on with one card, or end the engine.

Decides and counts; the plan's part is `recovery.py`, and the engine acts. Imports no torch: what a device raises is
told by its name and its text.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from enum import Enum

from nanovllm.engine.executor import Job
from nanovllm.engine.shards import CopyShard, Shard

COPY_RETRIES = 2  # of one copy; then what waits for it is prefilled again
BROKEN_LINK_COPIES = 3  # given up in a row: then the link is taken for broken
# A device's error is survived only if it says one of these: then the call was refused, and the context is as it was.
REFUSED = ("out of memory", "ALLOC_FAILED", "peer access", "invalid argument", "not supported", "NOT_SUPPORTED")
# What an error of the context says; anything launched on it fails from then on.
STICKY = (
    *("CUDA error", "CUDA_ERROR", "Triton Error [CUDA]"),
    *("illegal memory access", "device-side assert", "launch failure", "misaligned"),
)


class Verdict(Enum):
    RETRY = "launch the copy once more"
    PREFILL_AGAIN = "the copy is given up; what waits for it is prefilled again"
    LOSE_CARD = "the other card goes on alone"
    DIE = "the engine closes"


class Faults:
    """Judges the failures of one engine's shards, in the order in which it hears of them. Engine thread only.

    lost_card, cause: the card that is not used any more, and why; None as long as all are.
    """

    def __init__(self, num_cards: int) -> None:
        self.num_cards = num_cards
        self.lost_card: int | None = None
        self.cause: str | None = None
        self.any = False  # whether there was a failure: only then has anybody to look closer
        self.copy_retries = 0
        self._failures: dict[int, int] = {}  # by copy in flight: how often it has failed
        self._given_up: Counter[tuple[int, int]] = Counter()  # copies of each link, since its last that arrived

    def judge(self, job: Job) -> Verdict:
        """What to do about a job that failed. For LOSE_CARD, `lost_card` and `cause` say which and why."""
        shard, error = job.shard, job.error
        assert error is not None
        self.any = True
        if is_sticky(error):
            return Verdict.DIE
        if isinstance(shard, CopyShard):
            return self._judge_copy(shard, error)
        return self._lose(shard.card, f"card {shard.card}: {describe(error)}")

    def arrived(self, shard: Shard) -> None:
        """It succeeded; if it is a copy, the link works."""
        if isinstance(shard, CopyShard):
            self._failures.pop(shard.copy, None)
            self._given_up[shard.src, shard.dst] = 0

    def _judge_copy(self, shard: CopyShard, error: BaseException) -> Verdict:
        failures = self._failures.pop(shard.copy, 0) + 1
        if failures <= COPY_RETRIES:
            self._failures[shard.copy] = failures
            self.copy_retries += 1
            return Verdict.RETRY
        link = shard.src, shard.dst
        self._given_up[link] += 1
        if self._given_up[link] < BROKEN_LINK_COPIES:
            return Verdict.PREFILL_AGAIN
        # Of two cards, the one that decodes goes on: it has the most sequences.
        lost = shard.src if shard.src == shard.dst else 0
        return self._lose(lost, f"copies from card {shard.src} to card {shard.dst}: {describe(error)}")

    def _lose(self, card: int, cause: str) -> Verdict:
        if self.num_cards == 1 or self.lost_card is not None:
            return Verdict.DIE
        self.lost_card, self.cause = card, cause
        return Verdict.LOSE_CARD


def is_sticky(error: BaseException | None) -> bool:
    """Whether the process cannot go on using the device, or was told to end: no `Exception`, or one that leaves the
    CUDA context unusable. What caused the error is looked at, too."""
    if not isinstance(error, Exception):
        return error is not None
    return any(_breaks_context(link) for link in _chain(error))


def _breaks_context(error: BaseException) -> bool:
    names, text = {kind.__name__ for kind in type(error).__mro__}, str(error)
    if "OutOfMemoryError" in names or any(words in text for words in REFUSED):
        return False
    return "AcceleratorError" in names or any(words in text for words in STICKY)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, and so on; each once, since nothing keeps a chain from coming round."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def let_go_of_frames(error: BaseException | None) -> None:
    """What calls that failed had in their hands, tensors above all. Else it would live as long as their job, and a card
    that is given up gets no job after its last one. Not for errors of the context: there freeing memory fails, too, and
    torch may end the process for it."""
    for link in _chain(error):
        traceback.clear_frames(link.__traceback__)


def describe(error: BaseException) -> str:
    """One line, as a caller gets to see it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
