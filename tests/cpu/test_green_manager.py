"""`GreenManager` over the fake driver of the green-context tests: what is asked, granted, kept and let go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import green_ctx
from green_ctx import GreenContextError
from nanovllm.engine import green_manager
from nanovllm.engine.green_manager import CardSms, GreenManager, SmCounts, fill_counts, plan_split
from tests.cpu.test_green_ctx import FakeDriver

H200 = CardSms(132, 8, 8)
CUDA0 = torch.device("cuda", 0)
Install = Callable[..., FakeDriver]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    def do(**properties: Any) -> FakeDriver:
        driver = FakeDriver(**properties)
        card = CardSms(driver.num_sms, *green_ctx.get_sm_count_constraint(*driver.capability))
        monkeypatch.setattr(green_ctx, "_load_driver", lambda: driver)
        monkeypatch.setattr(green_ctx, "_wrap_stream", lambda handle, index: handle)
        monkeypatch.setattr(green_manager, "read_card", lambda device: card)
        return driver

    return do


@pytest.mark.parametrize(
    ("asked", "granted", "idle"),
    [
        ((None, None), (64, 68), 0),
        ((44, None), (44, 88), 0),
        ((None, 88), (44, 88), 0),
        ((48, 84), (48, 84), 0),
        ((66, 66), (72, 60), 0),
        ((40, 88), (40, 88), 4),
        ((16, 16), (16, 16), 100),
        ((12, 12), (16, 16), 100),
        ((1, 131), (8, 124), 0),
        ((8, 8), (8, 8), 116),
        ((130, 2), (124, 8), 0),
    ],
)
def test_what_is_granted(
    install: Install, asked: tuple[Any, Any], granted: tuple[int, int], idle: int, caplog: pytest.LogCaptureFixture
) -> None:
    driver = install()
    with caplog.at_level(logging.WARNING, "nanovllm"):
        manager = GreenManager(CUDA0, *asked)
        streams = manager.allocate(*asked)
    assert manager.current.granted == granted and manager.current.idle_sms == idle
    assert tuple(len(driver.sms_of(stream)) for stream in streams) == granted
    assert driver.sms_of(streams[0]).isdisjoint(driver.sms_of(streams[1]))
    assert len([r for r in caplog.records if "stay idle" in r.message]) == (idle > 0)
    stats = manager.stats()
    assert (stats["attention_sm_granted"], stats["ffn_sm_granted"], stats["idle_sms"]) == (*granted, idle)
    manager.close()
    assert driver.alive == 0


def test_idle_sms_are_warned_about_once(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install()
    with caplog.at_level(logging.WARNING, "nanovllm"):
        manager = GreenManager(CUDA0, 16, 16)
        manager.allocate(24, 24)
    assert len(caplog.records) == 1 and "100 of 132 SMs stay idle" in caplog.text


@given(st.integers(1, 131), st.integers(1, 131))
def test_a_plan_never_grants_less_than_it_can_or_more_than_there_is(attention: int, ffn: int) -> None:
    if attention + ffn > 132:
        with pytest.raises(ValueError, match=f"attention_sm={attention} and ffn_sm={ffn} are more than .* 132"):
            fill_counts(H200, attention, ffn)
        return
    plan = plan_split(H200, fill_counts(H200, attention, ffn))
    assert sum(plan.granted) + plan.idle_sms == 132 and min(plan.granted) >= 4
    assert all(group % 8 == 0 for group in plan.groups)
    assert plan.granted.distance(SmCounts(attention, ffn)) <= 14, "each part is off by less than a group"


@pytest.mark.parametrize("counts", [(0, 8), (-8, None), (132, None), (None, 132), (None, 0), (140, 8)])
def test_counts_that_no_card_has_are_refused(install: Install, counts: tuple[Any, Any]) -> None:
    driver = install()
    with pytest.raises(ValueError, match="must be from 1 to 131"):
        GreenManager(CUDA0, *counts)
    assert driver.alive == 0


def test_a_card_too_small_for_two_parts_is_refused(install: Install) -> None:
    install(num_sms=8)
    with pytest.raises(ValueError, match="cannot be granted on 8 SMs in groups of 8"):
        GreenManager(CUDA0, 4, 4)


def test_a_split_is_made_once_and_kept(install: Install) -> None:
    driver = install()
    manager = GreenManager(CUDA0, 44, 88)
    first, calls = manager.allocate(44, 88), len(driver.calls)
    assert manager.allocate(44, None) == manager.allocate(None, 88) == manager.allocate(45, 87) == first
    assert len(driver.calls) == calls
    other = manager.allocate(60, 72)
    assert set(other).isdisjoint(first) and manager.current.granted == (44, 88), "allocating does not move"
    assert [split.granted for split in manager.splits] == [(44, 88), (60, 72)]


def test_rebalancing_moves_to_the_nearest_prepared_split_and_makes_none(install: Install) -> None:
    driver = install()
    manager = GreenManager(CUDA0, 44, 88, enable_rebalance=True)
    manager.allocate(60, 72)
    calls, alive = len(driver.calls), driver.alive
    assert manager.rebalance(56, 76).granted == (60, 72)
    assert manager.rebalance(131, 1).granted == (60, 72)
    assert manager.rebalance(8, 124).granted == (44, 88)
    assert manager.stats()["switches"] == 2
    for step in range(1000):
        manager.rebalance(*((44, 88), (60, 72))[step % 2])
    assert manager.stats()["switches"] == 1001
    assert (len(driver.calls), driver.alive) == (calls, alive)


def test_rebalancing_needs_permission_and_an_open_manager(install: Install) -> None:
    install()
    manager = GreenManager(CUDA0)
    with pytest.raises(ValueError, match="enable_rebalance=False"):
        manager.rebalance(8, 124)
    manager = GreenManager(CUDA0, enable_rebalance=True)
    manager.close()
    manager.close()
    with pytest.raises(GreenContextError, match="closed"):
        manager.rebalance(8, 124)


def test_busy_shares_are_of_the_wall_clock_time(install: Install) -> None:
    install()
    manager = GreenManager(CUDA0)
    assert manager.stats()["attention_busy_share"] is None
    manager.add_busy(0.006, 0.009, 0.01)
    manager.add_busy(0.002, 0.001, 0.01)
    stats = manager.stats()
    assert (stats["attention_busy_share"], stats["ffn_busy_share"]) == pytest.approx((0.4, 0.5))


@pytest.mark.parametrize("counts", [(44, 88), (16, 16)], ids=["one group", "two groups"])
def test_any_failing_driver_call_is_named_and_leaves_nothing_behind(install: Install, counts: tuple[int, int]) -> None:
    driver = install()
    GreenManager(CUDA0, *counts)
    for fail_call in range(len(driver.calls)):
        driver = install()
        driver.fail_call = fail_call
        with pytest.raises(GreenContextError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            GreenManager(CUDA0, *counts)
        # What could not be destroyed stays; everything else is gone.
        assert driver.alive == (driver.calls[fail_call] == "cuGreenCtxDestroy")


def test_a_second_split_that_fails_leaves_the_first(install: Install) -> None:
    driver = install()
    manager = GreenManager(CUDA0, 44, 88, enable_rebalance=True)
    alive, driver.fail_call = driver.alive, len(driver.calls) + 3
    with pytest.raises(GreenContextError):
        manager.allocate(60, 72)
    assert driver.alive == alive and [split.granted for split in manager.splits] == [(44, 88)]
    assert manager.rebalance(60, 72).granted == (44, 88)


def test_closing_destroys_the_others_too_if_one_fails(install: Install) -> None:
    driver = install()
    manager = GreenManager(CUDA0, 44, 88)
    manager.allocate(60, 72)
    driver.fail_call = len(driver.calls) + 1
    with pytest.raises(GreenContextError):
        manager.close()
    assert driver.alive == 0


def test_a_cpu_has_no_partitions() -> None:
    with pytest.raises(GreenContextError, match="no SM partitions on cpu"):
        GreenManager(torch.device("cpu"))
