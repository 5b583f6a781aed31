"""SMs lent to prompts, on the card: what is captured where and for how many SMs, steps side by side, falling back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from green_ctx import GreenContextError
from nanovllm.config import Config
from nanovllm.engine import cards, lending
from nanovllm.engine.green_manager import CardSms, SmCounts, Split
from nanovllm.engine.lending import Lending, start_lending
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.pipeline_ways import PartitionTools
from nanovllm.engine.prefill_graphs import PrefillGraphs
from nanovllm.engine.shards import MixedShard, StepResult
from nanovllm.engine.step_sizes import LENT_BUCKETS, lent_sizes
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from tests.cpu import test_mixed_step
from tests.cpu.mixed_plan import joined, largest_error, separate
from tests.cpu.test_mixed_step import (
    BOUND,
    NUM_SLOTS,
    FromTheCard,
    Replayed,
    ReplayedDecode,
    check_pages,
    make_plan,
    make_runner,
    next_chunks,
    next_rows,
    start,
)
from tests.cpu.tiny import make_llm, write_config

model, no_card = test_mixed_step.model, test_mixed_step.no_card  # fixtures
WARNING = "Failed to initialize Green Context: "


class FakeStream:
    """Notes whom it waits for."""

    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append((self.name, "waits for", other.name))


class FakeCard:
    """Two partitions, and what was queued on which stream, told of how many SMs, by whose kernels."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.streams = [FakeStream(name, self.log) for name in ("card", "decode", "prompts")]
        self.current, self.told_sms, self.closed = self.streams[0], 132, 0
        counts = SmCounts(60, 72)
        self.split = Split(counts, counts, 0, *self.streams[1:], None)  # type: ignore[arg-type]
        self.manager: Any = SimpleNamespace(current=self.split, card=CardSms(132, 8, 8), close=self._close)
        self.tools = PartitionTools(self._backend, self._sized_for)

    def _close(self) -> None:
        self.closed += 1
        self.log.append("closed")

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def _sized_for(self, card_sms: int, num_sms: int) -> Iterator[None]:
        assert (card_sms, self.told_sms) == (132, 132)
        self.told_sms = num_sms
        yield
        self.told_sms = 132

    def _backend(self, model: Qwen3ForCausalLM, num_sms: int) -> FromTheCard:
        card = self

        class OnPartition(FromTheCard):
            def decode(self, *args: Any, **kwargs: Any) -> Any:
                card.log.append(("decode", card.current.name, card.told_sms, num_sms))
                return super().decode(*args, **kwargs)

            def prefill(self, *args: Any, **kwargs: Any) -> Any:
                card.log.append(("prefill", card.current.name, card.told_sms, num_sms))
                return super().prefill(*args, **kwargs)

        return OnPartition(model.config)


@pytest.fixture
def card(no_card: None, monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    card = FakeCard()

    def capture(graphs: PrefillGraphs, size: int, pool: Any) -> None:
        def run() -> None:
            graphs._logits[size] = graphs._run(size)

        run()
        graphs._graphs[size] = Replayed(run)  # type: ignore[assignment]

    monkeypatch.setattr(PrefillGraphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "stream", card.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: card.current)
    monkeypatch.setattr(lending, "free_bytes", lambda device: 0)
    buffers = SimpleNamespace(
        fetch=lambda ids: ids, read=lambda ids, rows: ids.tolist(), clear=lambda: card.log.append("buffers freed")
    )
    monkeypatch.setattr(lending, "PinnedIds", lambda *sizes: buffers)
    monkeypatch.setattr(lending, "LENT_BUCKETS", (2, 4))
    monkeypatch.setattr("nanovllm.engine.step_sizes.LENT_TOKENS", (8, 20))
    return card


def lending_runner(model: Qwen3ForCausalLM, card: FakeCard) -> ModelRunner:
    runner = make_runner(model)
    test_mixed_step.capture(runner, False)
    with torch.inference_mode():
        runner.lending = Lending(runner.graphs, card.manager, 10_000, card.tools)  # type: ignore[arg-type]
    runner.kv_cache.pages.fill_(float("nan"))
    return runner


def beside(runner: ModelRunner, shard: MixedShard) -> StepResult:
    """The prompts of a step lent, its rows beside them: both are launched before either is waited for."""
    lent = runner.run_prefill(replace(shard.prefill, lent=True))
    rows = runner.run_decode_core(replace(shard.decode, beside_lent=True))
    first, second = lent.wait(), rows.wait()
    return joined(first, len(first.token_ids), second, len(second.token_ids))


# -- captured for a partition each


def test_each_side_is_captured_on_its_stream_for_its_sms(model: Qwen3ForCausalLM, card: FakeCard) -> None:
    runner = lending_runner(model, card)
    assert runner.lending is not None and runner.lent_sms == (60, 72)
    ran = {entry for entry in card.log if entry[1] != "waits for"}
    assert ran == {("decode", "decode", 60, 60), ("prefill", "prompts", 72, 72)}
    waits = [entry for entry in card.log if entry[1] == "waits for"]
    assert waits == [("decode", "waits for", "card"), ("card", "waits for", "decode")] * (len(waits) // 2) and waits
    assert (card.current.name, card.told_sms) == ("card", 132)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_steps_side_by_side_are_those_one_after_the_other(model: Qwen3ForCausalLM, card: FakeCard, seed: int) -> None:
    """Also of prompts too long for what is captured, and in turn with steps of the whole card."""
    plain, runner = make_runner(model), lending_runner(model, card)
    plan = make_plan(seed)
    start(plan, [plain, runner])
    for step in range(16):
        chunks, rows = next_chunks(plan), next_rows(plan)
        shard = plan.shard(chunks, rows)
        results = [separate(plain, shard), (separate if step % 4 == 3 else beside)(runner, shard)]
        assert largest_error(results) < 10 * BOUND
        assert plan.take(chunks, rows, results) == 0, "a token differs"
        check_pages([plain, runner])
    assert runner.lending is not None
    graphs = runner.lending._graphs.values(), runner.lending.prefill_graphs._graphs.values()
    replays = [sum(graph.num_replays for graph in side) for side in graphs]  # type: ignore[attr-defined]
    assert replays[0] == 12 and 0 < replays[1] < 12, replays


def test_rehearsals_run_for_nobody(model: Qwen3ForCausalLM, card: FakeCard) -> None:
    runner = lending_runner(model, card)
    assert runner.lending is not None
    with torch.inference_mode():
        runner.lending.rehearse()
    assert runner.kv_cache.pages[:-1].isnan().all() and not runner.kv_cache.pages[-1].isnan().all()
    assert not runner.slots.integers_S7[:NUM_SLOTS].any()


def test_a_bucket_for_every_number_of_rows_and_no_more_than_are_captured_anyway() -> None:
    for most in (1, 7, 16, 100, 512, 1000):
        from nanovllm.engine.decode_graphs import bucket_sizes

        lent = [size for size in bucket_sizes(most) if size in (*LENT_BUCKETS, most)]
        assert lent[-1] == most and len(lent) <= 9
    assert lent_sizes(16384) == [512, 1024, 2048] and lent_sizes(600) == [512, 600] and lent_sizes(48) == [48]


def test_closing_gives_the_partitions_back(model: Qwen3ForCausalLM, card: FakeCard) -> None:
    runner = lending_runner(model, card)
    for _ in range(2):
        runner.close_pipeline()
    assert card.closed == 1 and runner.lending is None
    assert card.log[-2:] == ["buffers freed", "closed"], "pinned memory asks its stream, which must still be there"


# -- falling back


def start_with(caplog: pytest.LogCaptureFixture, decode: Any, **options: Any) -> Lending | None:
    with caplog.at_level(logging.WARNING, "nanovllm"):
        return start_lending(decode, torch.device("cuda", 1), (60, 72), 2048, **options)


def test_steps_that_are_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    assert start_with(caplog, None) is None
    assert WARNING + "only captured steps can run on partitions" in caplog.text


@pytest.mark.parametrize("error", [GreenContextError("no cuda-python"), ValueError("more than the card's 132 SMs")])
def test_partitions_that_cannot_be_had(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    def make_manager(*args: Any) -> Any:
        raise error

    assert start_with(caplog, object(), make_manager=make_manager) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"{WARNING}{error}; the decode card takes prompts into its decode steps"
    ]


def test_a_capture_that_fails(model: Qwen3ForCausalLM, card: FakeCard, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(ReplayedDecode):
        def graph_of(self, run: Any) -> Any:
            raise RuntimeError("out of memory")

    runner = make_runner(model)
    test_mixed_step.capture(runner, False)
    runner.graphs.__class__ = Failing
    made = start_with(caplog, runner.graphs, make_manager=lambda *args: card.manager, tools=card.tools)
    assert made is None and card.closed == 1 and WARNING + "out of memory" in caplog.text


class FakeRunner:
    """Whether its partitions can be had is the test's to say."""

    model = SimpleNamespace(attention=SimpleNamespace(name="triton"))

    def __init__(self, has_partitions: bool) -> None:
        self.has_partitions, self.lends, self.calls = has_partitions, False, []  # type: ignore[var-annotated]

    def capture(self) -> None:
        self.calls.append("capture")

    def capture_mixed(self, most: int) -> None:
        self.calls.append("mixed")

    def capture_prefill(self, most: int) -> None:
        self.calls.append(f"prefill {most}")

    def start_lending(self, sms: tuple[int, int], most: int) -> None:
        self.calls.append("lend")
        self.lends = self.has_partitions


@pytest.mark.parametrize("has_partitions", [True, False])
def test_mixed_steps_are_captured_where_nothing_is_lent(has_partitions: bool) -> None:
    config = Config("m", enable_two_gpu_pd=True, lend_sms=(60, 72))
    runners: Any = [FakeRunner(has_partitions), FakeRunner(has_partitions)]
    for number, runner in enumerate(runners):
        cards.capture(runner, number, config)
    assert runners[0].calls == ["capture", "mixed", "prefill 16384"]
    assert runners[1].calls == ["capture", "lend"] + ["mixed"] * (not has_partitions) + ["prefill 2048"]


@pytest.mark.parametrize(
    "options, captured",
    [
        ({}, [["capture", "mixed", "prefill 16384"]]),
        ({"max_num_batched_tokens": 512}, [["capture", "mixed", "prefill 512"]]),
        ({"enable_two_gpu_pd": True, "pd_roles": "strict"}, [["prefill 16384"], ["capture"]]),
        (
            {"enable_two_gpu_pd": True, "max_num_batched_tokens": 512},
            [["capture", "mixed", "prefill 512"], ["capture", "mixed", "prefill 512"]],
        ),
    ],
)
def test_a_card_captures_the_steps_of_its_roles(options: dict[str, Any], captured: list[list[str]]) -> None:
    runners: Any = [FakeRunner(False) for _ in captured]
    for number, runner in enumerate(runners):
        cards.capture(runner, number, Config("m", **options))
    assert [runner.calls for runner in runners] == captured


# -- a whole engine on CPU cards


def test_cpu_cards_lend_without_dividing_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nanovllm"):
        llm = make_llm(write_config(tmp_path), enable_two_gpu_pd=True, lend_sms=(60, 72))
    with llm:
        assert "roles: elastic; lent SMs: undivided; attention: torch" in caplog.text
        assert llm.stats()["lent_sms"] is None and llm._engine.scheduler.lends
        assert llm.stats()["card1"]["lent_steps"] == 0
