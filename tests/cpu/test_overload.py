"""Under overload queues grow, the latencies of requests that were let in do not: the real plan, on a virtual clock."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from nanovllm.config import Config
from tools import simulate_load

SLOTS = 64


def second_token_ms(monkeypatch: pytest.MonkeyPatch, seconds: float, **options: Any) -> float:
    """The longest wait for a second token, of requests that come for so long, faster than two cards serve them."""
    waits: list[float] = []
    figures = simulate_load.figures

    def noted(arrivals: Any, times: Any, *rest: Any) -> Any:
        waits.extend(b - a for a, b in (itertools.islice(seen, 2) for seen in times))
        return figures(arrivals, times, *rest)

    monkeypatch.setattr(simulate_load, "figures", noted)
    sizes = {"enable_two_gpu_pd": True, "max_num_seqs": SLOTS, "enable_prefix_caching": False}
    config = Config.from_kwargs("none", sizes | options)
    simulate_load.simulate(config, (3000, 3000), simulate_load.Load(240.0, round(240 * seconds), 128, 96))
    return max(waits)


@pytest.mark.parametrize("roles", ["strict", "elastic"])
def test_waits_of_those_let_in_do_not_grow(monkeypatch: pytest.MonkeyPatch, roles: str) -> None:
    short, long = (second_token_ms(monkeypatch, seconds, pd_roles=roles) for seconds in (2, 6))
    assert long < 1.2 * short


def test_without_back_pressure_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"pd_roles": "strict", "decode_backlog_high": 10_000}
    short, long = (second_token_ms(monkeypatch, seconds, **options) for seconds in (2, 4))
    assert long > 1.8 * short
