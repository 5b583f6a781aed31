"""SMs lent to prompts: the configuration, the plan held at any point, executors, random interleavings."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from nanovllm.config import Config
from nanovllm.engine import pace, placement
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.executor import ThreadedExecutor
from nanovllm.engine.pace import Pace
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.shards import CopyShard, DecodeShard, MixedShard, PrefillShard, Shard
from nanovllm.engine.step_sizes import MAX_SEQUENCES
from tests.cpu.test_executor import FakeHandle, FakeRunner, bounded, collect
from tests.cpu.test_roles import of_card
from tests.cpu.test_scheduler import SIZE, Plan
from tests.sim.simulated_device import CorruptKV
from tests.sim.world import lending_world, run_random


@pytest.fixture(autouse=True)
def help_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "HELP_AFTER_S", 0.0)


# -- the configuration


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lend_sms": 60}, "lend_sms=60 must be None or"),
        ({"lend_sms": (60, 0)}, "lend_sms=0 must be an integer from 1"),
        ({"lend_sms": (60, True)}, "lend_sms=True must be"),
        ({"pd_roles": "strict"}, "needs enable_two_gpu_pd=True with pd_roles='elastic'"),
        ({"enable_two_gpu_pd": False}, "needs enable_two_gpu_pd=True with pd_roles='elastic'"),
        ({"enable_decode_pipeline": True}, "not with a decode pipeline"),
        ({"disable_green": True}, "not with disable_green=True"),
    ],
)
def test_what_lending_needs(options: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"enable_two_gpu_pd": True, "lend_sms": (60, 72)} | options
    with pytest.raises(ValueError, match=words):
        Config("m", **given)


def test_a_list_will_do() -> None:
    assert Config("m", enable_two_gpu_pd=True, lend_sms=[60, 72]).lend_sms == (60, 72)  # type: ignore[arg-type]


# -- the plan


class LendingPlan(Plan):
    """Two cards with elastic roles of which the second lends SMs."""

    def __init__(self, **options: Any) -> None:
        options = {"pd_roles": "elastic", "max_num_seqs": 8, "max_num_batched_tokens": 8} | options
        super().__init__(200, 200, **options)
        self.scheduler = Scheduler(self.scheduler.config, (200, 200), lends=True)

    def lent(self) -> list[PrefillShard]:
        return [shard for shard in self.in_flight if isinstance(shard, PrefillShard) and shard.lent]

    def endable(self, *kinds: type[Shard]) -> list[Shard]:
        """Of each card and lane the step that was launched first, and copies whose source has ended."""
        copies = [shard for shard in self.in_flight if isinstance(shard, CopyShard)]
        steps: list[Shard] = [copy for copy in copies if not self._waits(copy)]
        for card in (0, 1):
            main = [shard for shard in of_card(self.in_flight, card) if shard not in self.lent()]
            steps += [*main[:1], *[shard for shard in self.lent()[:1] if shard.card == card]]
        return [shard for shard in steps if isinstance(shard, kinds)]

    def _waits(self, copy: CopyShard) -> bool:
        return copy.after_step in [shard.step for shard in of_card(self.in_flight, copy.src)]  # type: ignore[union-attr]


def decoding_plan(num_prompts: int = 4, **options: Any) -> LendingPlan:
    """A prompt is about to decode on card 1, and more prompts queue than card 0 can have in flight."""
    plan = LendingPlan(**options)
    plan.add(6)
    plan.fill()
    for _ in range(num_prompts):
        plan.add(12)
    return plan


def test_prompts_beside_rows_are_lent_steps_and_rows_know_of_it() -> None:
    plan = decoding_plan()
    steps = of_card(plan.launch_all(Shard), 1)
    assert not any(isinstance(shard, MixedShard) for shard in steps)
    lent = [shard for shard in steps if isinstance(shard, PrefillShard)]
    assert [shard.lent for shard in lent] == [True, True] and all(shard.num_tokens <= 8 for shard in lent)
    decode = [shard for shard in steps if isinstance(shard, DecodeShard)]
    assert decode and all(shard.beside_lent for shard in decode if shard.step > lent[0].step)
    plan.drain()


def test_a_lent_step_has_no_more_prompts_than_a_captured_one() -> None:
    plan = LendingPlan(max_num_batched_tokens=120, max_num_seqs=256)
    plan.scheduler = Scheduler(plan.scheduler.config, (2000, 2000), lends=True)
    plan.add(6)
    plan.fill()
    for _ in range(200):
        plan.add(3)
    steps = of_card(plan.launch_all(Shard), 1)
    lent = [len(shard.chunks) for shard in steps if isinstance(shard, PrefillShard) and shard.lent]
    assert lent and max(lent) == MAX_SEQUENCES
    plan.drain()


def test_without_rows_prompts_have_the_whole_card() -> None:
    plan = LendingPlan()
    for _ in range(4):
        plan.add(12)
    steps = of_card(plan.launch_all(PrefillShard), 1)
    assert steps and not any(shard.lent for shard in steps)  # type: ignore[union-attr]
    plan.drain()


def test_decode_steps_go_on_and_end_while_a_lent_step_runs() -> None:
    plan = decoding_plan()
    plan.launch_all(Shard)
    lent, before = plan.lent()[0], plan.sequences[0].num_output_tokens
    for _ in range(5):
        plan.end(next(shard for shard in plan.in_flight if isinstance(shard, DecodeShard)))
        plan.schedule()
    assert plan.sequences[0].num_output_tokens == before + 5 and lent in plan.in_flight
    newest = [shard for shard in plan.in_flight if isinstance(shard, DecodeShard)][-1]
    assert newest.beside_lent and len(newest.slots) == 1, "the prompt must not decode yet"
    plan.drain()


def test_decode_has_the_whole_card_again_behind_the_last_lent_step() -> None:
    plan = decoding_plan(num_prompts=3)
    plan.launch_all(Shard)
    assert plan.lent()
    for sequence in plan.sequences[1:]:
        plan.scheduler.finish(sequence, "abort")
    while plan.lent():
        plan.end(plan.lent()[0])
    assert not plan.scheduler.lent_steps
    while not (decode := [shard for shard in plan.schedule() if isinstance(shard, DecodeShard)]):
        plan.end(plan.endable(DecodeShard)[0])
    assert not decode[0].beside_lent
    plan.drain()


def test_an_aborted_prompts_blocks_wait_for_its_lent_step() -> None:
    plan = decoding_plan()
    plan.launch_all(Shard)
    lent, manager = plan.lent()[0], plan.scheduler.managers[1]
    victims = [group for group, _ in plan.scheduler.launched_prefills[1][lent.step]]
    blocks = {block for group in victims for block in group.leader.lease.tables[1]}  # type: ignore[union-attr]
    for group in victims:
        plan.scheduler.finish(group.leader, "abort")
    for _ in range(3):
        plan.end(next(shard for shard in plan.in_flight if isinstance(shard, DecodeShard)))
        plan.schedule()
    assert all(manager._refs[block] for block in blocks), "a block was let go under a step that writes it"
    plan.drain()


def test_a_prompt_is_never_in_both_lanes() -> None:
    """Its chunks are ordered within a lane only: it changes lanes when the last one has ended."""
    plan = LendingPlan()
    for _ in range(3):
        plan.add(60)
    whole = next(shard for shard in of_card(plan.launch_all(PrefillShard), 1))
    (long,) = [group for group, _ in plan.scheduler.launched_prefills[1][whole.step]]
    plan.scheduler.finish(plan.sequences[0], "abort")
    plan.add(4, arrival=-1)  # ahead of the others: it is the first to decode

    def lanes() -> set[bool]:
        chunks = plan.scheduler.launched_prefills[1].items()
        return {step in plan.scheduler.lent_steps for step, groups in chunks if long in [group for group, _ in groups]}

    seen = set()
    for _ in range(200):
        assert len(lanes()) <= 1
        seen |= lanes()
        if not plan.turn(CopyShard, DecodeShard, PrefillShard):
            break
    assert seen == {False, True}, seen


def test_copies_wait_for_decode_steps_and_not_for_lent_ones() -> None:
    """Only those of a lent step's own blocks, the tails of siblings, wait for it."""
    plan = decoding_plan(num_prompts=2)
    siblings = plan.add(6, n=2)
    plan.launch_all(Shard)
    steps = {shard.step for shard in plan.lent()}
    tails = [shard for shard in plan.in_flight if isinstance(shard, CopyShard) and shard.src == shard.dst == 1]
    assert siblings[0].card == 1 and [tail.after_step in steps for tail in tails] == [True]
    for _ in range(5):
        plan.end(plan.endable(DecodeShard)[0])
        plan.schedule()
    plan.scheduler.finish(plan.sequences[0], "stop")
    (back,) = [shard for shard in plan.schedule() if isinstance(shard, CopyShard) and shard.dst == 0]
    decode_steps = [shard.step for shard in plan.in_flight if isinstance(shard, DecodeShard)]
    assert back.after_step == max(decode_steps) and back.after_step not in steps
    plan.drain()


def test_steps_of_each_lane_complete_in_launch_order() -> None:
    manager = BlockManager(4, SIZE, keep_cached=False)
    lent, other = manager.launch_step(lent=True), manager.launch_step()
    manager.launch_step(lent=True)
    with pytest.raises(AssertionError, match="launch order"):
        manager.complete_step(3)
    manager.retire(manager.allocate(1))
    manager.complete_step(other)
    assert manager.completed_steps == 0 and manager.last_main_step == other
    manager.complete_step(lent)
    assert manager.completed_steps == 2 and manager.num_retired_blocks == 1
    manager.complete_step(3)
    assert manager.num_retired_blocks == 0


# -- what it may take


def test_lending_under_an_slo() -> None:
    """Before it was measured a step beside a lent one counts as twice as long."""
    pace = Pace(2, 8, itl_slo_ms=12.0)
    decode = DecodeShard(1, 1, (0,), 8)
    beside = DecodeShard(1, 1, (0,), 8, beside_lent=True)
    pace.record(decode, 0.007)
    assert not pace.keeps_slo_lending(4) and pace.keeps_slo_lending(0)
    pace.record(decode, 0.001)
    assert pace.keeps_slo_lending(4)
    decode_s = pace.decode_s[1]
    pace.record(beside, 0.013)
    assert not pace.keeps_slo_lending(4) and pace.decode_s[1] == decode_s
    pace.record(decode, 0.005)
    assert pace.keeps_slo_lending(4), "what was measured beside lent steps of another time says nothing"
    assert Pace(2, 8, None).keeps_slo_lending(4)


def test_the_pace_of_prompts_is_not_a_lent_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "MEASURED_TOKENS", 1)
    measured = Pace(2, 8, None, token_s=1e-5)
    chunks: Any = (SimpleNamespace(tokens=(1, 2)),)
    measured.record(PrefillShard(1, 1, chunks, lent=True), 1.0)
    assert measured.token_s == 1e-5
    measured.record(PrefillShard(0, 1, chunks), 1.0)
    assert measured.token_s > 1e-5


# -- executors


class LendingRunner(FakeRunner):
    lends = True


def test_a_decode_step_waits_neither_for_a_lent_steps_launch_nor_for_its_end() -> None:
    launch, end = threading.Event(), threading.Event()

    class Slow(LendingRunner):
        def run_prefill(self, shard: PrefillShard) -> FakeHandle:
            assert launch.wait(10)
            return FakeHandle(gate=end)

    executor = ThreadedExecutor({0: FakeRunner(), 1: Slow()}, lambda: None)
    try:
        executor.launch(PrefillShard(1, 1, (), lent=True))
        for step in (2, 3):
            executor.launch(DecodeShard(1, step, (), 0, beside_lent=True))
        executor.launch(CopyShard(1, 1, 0, ((0, 0),), after_step=3))
        executor.launch(CopyShard(2, 1, 1, ((1, 2),), after_step=1))
        assert {getattr(job.shard, "step", "copy") for job in collect(executor, 3)} == {2, 3, "copy"}
        launch.set(), end.set()
        assert [type(job.shard) for job in collect(executor, 2)] == [PrefillShard, CopyShard]
    finally:
        launch.set(), end.set()
        bounded(executor.close)


# -- random interleavings


def test_random_worlds() -> None:
    counts: Counter[str] = Counter()
    for seed in range(60):
        world = run_random(seed, make_world=lending_world)
        card = world.engine.metrics.cards[1]
        counts.update(lent=card.lent_steps, beside=card.beside_lent_steps, mixed=card.mixed_steps)
        counts.update(world.scheduler.counts)
    assert counts["mixed"] == 0 and all(counts[name] > 20 for name in ("lent", "beside", "evacuations")), counts


@contextmanager
def freed_before_its_lent_step_ends() -> Iterator[None]:
    """As if the last step that ended were the last of all before it."""
    sound = BlockManager.complete_step

    def complete_step(self: BlockManager, step: int) -> None:
        lent = self._open[step]
        open_lent = [] if lent else [each for each, other in self._open.items() if other]
        for each in open_lent:
            del self._open[each]
        sound(self, step)
        self._open = dict(sorted((self._open | dict.fromkeys(open_lent, True)).items()))

    with patch.object(BlockManager, "complete_step", complete_step):
        yield


@contextmanager
def decoding_before_its_lent_step_ends() -> Iterator[None]:
    """A prompt joins the rows as soon as its last chunk is on its way."""
    sound = Scheduler._plan_lent

    def plan_lent(self: Scheduler, card: int) -> PrefillShard | None:
        shard = sound(self, card)
        for group, end in self.launched_prefills[card].get(shard.step, []) if shard else []:
            if end == group.num_tokens and not group.prefilled and group.needs_decode:
                group.leader.num_in_flight = 0
                self._prefilled(group, end)
        return shard

    with patch.object(Scheduler, "_plan_lent", plan_lent):
        yield


@contextmanager
def in_both_lanes() -> Iterator[None]:
    """A prompt's next chunk is launched in whichever lane has room."""
    with patch.object(Scheduler, "lent_steps", NoSteps(), create=True):
        yield


class NoSteps:
    """A set into which nothing goes; set on the class, it takes the attribute's place on instances too."""

    def __get__(self, owner: Any, kind: type) -> NoSteps:
        return self

    def __set__(self, owner: Any, value: Any) -> None: ...
    def __contains__(self, step: int) -> bool:
        return False

    def __bool__(self) -> bool:
        return False

    def add(self, step: int) -> None: ...
    def remove(self, step: int) -> None: ...


@pytest.mark.parametrize(
    "plant",
    [freed_before_its_lent_step_ends, decoding_before_its_lent_step_ends, in_both_lanes],
    ids=lambda plant: plant.__name__,
)
def test_planted_bugs_are_caught_by_memory(plant: Any) -> None:
    """Not by the books, but because a card reads what is not there."""
    with plant(), pytest.raises(CorruptKV):
        for seed in range(300):
            run_random(seed, make_world=unbooked_world)


def unbooked_world(seed: int) -> Any:
    world = lending_world(seed)
    world.check_books = False
    return world
