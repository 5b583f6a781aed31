"""The SM partitions of a decode card: splits into an attention and an FFN part, made once and kept.

A split is made as one group and what remains of the card, since groups are rounded up to the card's granularity and the
remainder is not: whichever part as the group comes closer to the counts asked for. Only counts that leave SMs over are
two groups, and the remainder idles.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import green_ctx
from green_ctx import GreenContextError, GreenPartition

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("nanovllm.engine.green_manager")


class CardSms(NamedTuple):
    """SMs of a card, the smallest group, and what a group's size is a multiple of."""

    total: int
    minimum: int
    alignment: int

    def rounded_up(self, num_sms: int) -> int:
        """The group that a card grants for so many."""
        return max(self.minimum, -(-num_sms // self.alignment) * self.alignment)


class SmCounts(NamedTuple):
    """SMs of each part of a split."""

    attention_sms: int
    ffn_sms: int

    def distance(self, other: SmCounts) -> int:
        return abs(self.attention_sms - other.attention_sms) + abs(self.ffn_sms - other.ffn_sms)


class SplitPlan(NamedTuple):
    """How to make a split: the groups to ask for in turn, and whose the parts are, the remainder last."""

    granted: SmCounts
    groups: tuple[int, ...]
    attention_part: int
    ffn_part: int
    idle_sms: int = 0


class Split(NamedTuple):
    """A split that exists. Streams: `torch.cuda.ExternalStream`."""

    asked: SmCounts
    granted: SmCounts
    idle_sms: int
    attention_stream: Any
    ffn_stream: Any
    partition: GreenPartition


def read_card(device: torch.device) -> CardSms:
    """`GreenContextError` where there are no green contexts."""
    import torch

    if device.type != "cuda":
        raise GreenContextError(f"no SM partitions on {device}: that needs a CUDA device")
    constraint = green_ctx.get_sm_count_constraint(*torch.cuda.get_device_capability(device))
    return CardSms(torch.cuda.get_device_properties(device).multi_processor_count, *constraint)


def fill_counts(card: CardSms, attention_sm: int | None, ffn_sm: int | None) -> SmCounts:
    """What is asked where a count is None: the rest of the card, or half of it if both are. `ValueError`: no room."""
    for name, count in (("attention_sm", attention_sm), ("ffn_sm", ffn_sm)):
        if count is not None and not 1 <= count < card.total:
            raise ValueError(f"{name}={count} must be from 1 to {card.total - 1}, one SM less than the card has")
    if attention_sm is None:
        half = card.total // 2 // card.alignment * card.alignment
        attention_sm = max(card.minimum, half) if ffn_sm is None else card.total - ffn_sm
    counts = SmCounts(attention_sm, card.total - attention_sm if ffn_sm is None else ffn_sm)
    if sum(counts) > card.total:
        raise ValueError(f"attention_sm={counts[0]} and ffn_sm={counts[1]} are more than the card's {card.total} SMs")
    return counts


def plan_split(card: CardSms, asked: SmCounts) -> SplitPlan:
    """The way that comes closest to `asked`; of equals, the one that leaves the fewest SMs idle."""
    attention, ffn = (card.rounded_up(count) for count in asked)
    plans = []
    if attention < card.total:
        plans.append(SplitPlan(SmCounts(attention, card.total - attention), (attention,), 0, 1))
    if ffn < card.total:
        plans.append(SplitPlan(SmCounts(card.total - ffn, ffn), (ffn,), 1, 0))
    if attention + ffn < card.total:
        idle = card.total - attention - ffn
        plans.append(SplitPlan(SmCounts(attention, ffn), (attention, ffn), 0, 1, idle))
    if not plans:
        raise ValueError(f"{asked} cannot be granted on {card.total} SMs in groups of {card.alignment}")
    return min(plans, key=lambda plan: (plan.granted.distance(asked), plan.idle_sms))


class GreenManager:
    """Splits of one card into two SM partitions. Made by `prepare`, kept until `close`; one of them is current.

    device: of the card. attention_sm, ffn_sm: SMs of the first split; None: the rest of the card, or both None: half of
    it each. enable_rebalance: whether `rebalance` may move to another one.

    Raises `GreenContextError` where the card or its software has no green contexts, `ValueError` for counts that do not
    fit. Not for several threads at once.
    """

    def __init__(
        self,
        device: torch.device,
        attention_sm: int | None = None,
        ffn_sm: int | None = None,
        enable_rebalance: bool = False,
    ) -> None:
        self.device, self.enable_rebalance = device, enable_rebalance
        self.card = read_card(device)
        self._splits: dict[SmCounts, Split] = {}
        self._switches = 0
        self._busy_s = [0.0, 0.0, 0.0]  # attention, FFN, wall
        self._warned_idle = False
        self.current = self.prepare(attention_sm, ffn_sm)

    def allocate(self, attention_sm: int | None, ffn_sm: int | None) -> tuple[Any, Any]:
        """Streams of the split asked for, (attention's, FFN's), the same ones for the same SMs; milliseconds once.

        It does not become the current one. Errors as at construction.
        """
        split = self.prepare(attention_sm, ffn_sm)
        return split.attention_stream, split.ffn_stream

    def prepare(self, attention_sm: int | None, ffn_sm: int | None) -> Split:
        """The split asked for, made if there is none that grants the same yet."""
        asked = fill_counts(self.card, attention_sm, ffn_sm)
        plan = plan_split(self.card, asked)
        if plan.granted not in self._splits:
            self._splits[plan.granted] = self._make(asked, plan)
        return self._splits[plan.granted]

    def _make(self, asked: SmCounts, plan: SplitPlan) -> Split:
        partition = green_ctx.split_device_green_ctx_by_sm_count(self.device, plan.groups)
        counts, streams = partition.sm_counts, partition[0]
        granted = SmCounts(counts[plan.attention_part], counts[plan.ffn_part])
        idle_sms = self.card.total - sum(granted)
        if idle_sms and not self._warned_idle:
            self._warned_idle = True
            logger.warning("%s asked, %s granted: %d of %d SMs stay idle", asked, granted, idle_sms, self.card.total)
        return Split(asked, granted, idle_sms, streams[plan.attention_part], streams[plan.ffn_part], partition)

    @property
    def splits(self) -> list[Split]:
        """All that were made, in that order."""
        return list(self._splits.values())

    def rebalance(self, attention_sm: int, ffn_sm: int) -> Split:
        """Make the prepared split nearest to these counts the current one, between two steps. Makes none."""
        if not self.enable_rebalance:
            raise ValueError(f"rebalance({attention_sm}, {ffn_sm}) of a manager with enable_rebalance=False")
        if not self._splits:
            raise GreenContextError("the SM partitions were closed")
        wanted = SmCounts(attention_sm, ffn_sm)
        nearest = min(self.splits, key=lambda split: split.granted.distance(wanted))
        self._switches += nearest is not self.current
        self.current = nearest
        return nearest

    def add_busy(self, attention_s: float, ffn_s: float, wall_s: float) -> None:
        """Count that, of `wall_s` seconds of steps, each partition ran its stages for so many."""
        for part, seconds in enumerate((attention_s, ffn_s, wall_s)):
            self._busy_s[part] += seconds

    def stats(self) -> dict[str, float | None]:
        """SMs of the current split as asked and granted, how many idle, switches so far, busy shares of 0 to 1 (None:
        no step was timed)."""
        asked, granted, (attention_s, ffn_s, wall_s) = self.current.asked, self.current.granted, self._busy_s
        return {
            "attention_sm_asked": asked.attention_sms,
            "ffn_sm_asked": asked.ffn_sms,
            "attention_sm_granted": granted.attention_sms,
            "ffn_sm_granted": granted.ffn_sms,
            "idle_sms": self.current.idle_sms,
            "splits": len(self._splits),
            "switches": self._switches,
            "attention_busy_share": attention_s / wall_s if wall_s else None,
            "ffn_busy_share": ffn_s / wall_s if wall_s else None,
        }

    def close(self) -> None:
        """Destroy the partitions; graphs captured on their streams must be gone. A second call does nothing."""
        with ExitStack() as closing:  # the others too, if one fails
            for split in self.splits:
                closing.callback(split.partition.close)
            self._splits = {}


def give_back(manager: GreenManager | None) -> None:
    """Close it after a failure, which is the one to report."""
    try:
        if manager is not None:
            manager.close()
    except GreenContextError as error:
        logger.warning("While giving up on SM partitions: %s", error)
