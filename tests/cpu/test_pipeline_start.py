"""The decode pipeline of a whole engine on CPU cards: a fake driver grants the SMs, stages run in their order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

import green_ctx
from green_ctx import GreenContextError
from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.engine import green_manager, pipeline_runs, pipeline_start
from nanovllm.engine.green_manager import CardSms, GreenManager
from nanovllm.engine.pipeline_choice import SEQUENTIAL
from nanovllm.engine.pipeline_step import InOrder
from nanovllm.engine.pipeline_ways import PartitionTools
from tests.cpu.test_green_ctx import FakeDriver

OPTIONS: dict[str, Any] = dict(
    device="cpu",
    enable_two_gpu_pd=True,
    pd_roles="strict",
    enable_decode_pipeline=True,
    max_model_len=256,
    max_num_seqs=8,
    kvcache_block_size=16,
    num_kvcache_blocks=80,
)
TOOLS = PartitionTools(
    lambda model, num_sms: model.attention, lambda card_sms, num_sms: nullcontext(), lambda a, f, sized_for: InOrder()
)
PROMPTS = [list(range(3, 3 + n)) for n in (5, 17, 40, 1, 33)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
WARNING = "Failed to initialize Green Context"
Answers = list[list[int]]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Green contexts that a CPU seems to have, and lanes that run in order."""
    fake = FakeDriver()
    monkeypatch.setattr(green_ctx, "_load_driver", lambda: fake)
    monkeypatch.setattr(green_ctx, "_wrap_stream", lambda handle, index: handle)
    monkeypatch.setattr(green_manager, "read_card", lambda device: CardSms(132, 8, 8))
    start = pipeline_start.start_pipeline

    def start_on_card_0(card: Any, options: Any) -> Any:
        return start(
            card, options, lambda device, *args, **kw: GreenManager(torch.device("cuda", 0), *args, **kw), TOOLS
        )

    monkeypatch.setattr(pipeline_start, "start_pipeline", start_on_card_0)
    return fake


@contextmanager
def engine(**changes: Any) -> Iterator[LLM]:
    with LLM(DEMO_MODEL, **(OPTIONS | changes)) as llm:
        yield llm


def answers(llm: LLM) -> Answers:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected() -> Answers:
    with engine(enable_decode_pipeline=False) as llm:
        assert llm.decode_runner.get_pipeline_statistics() == {}
        return answers(llm)


def always_winning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_runs, "roofline_can_win", lambda *args: True)


# -- modes


def test_static_runs_every_decode_step_over_its_split(driver: FakeDriver, expected: Answers) -> None:
    with engine(decode_pipeline="static", decode_attention_sm=44, decode_ffn_sm=88) as llm:
        assert answers(llm) == expected
        stats = llm.decode_runner.get_pipeline_statistics()
        assert stats["mode_running"] == "static" and stats["fallback_cause"] is None
        assert set(stats["steps_by_way"]) == {"44:88 core"} and stats["exploration_steps"] == 0
        assert (stats["attention_sm"], stats["ffn_sm"]) == (44, 88)
        assert stats["total_tokens"] == len(PROMPTS) * 11, "the first token of each is prefill's"
        assert stats["avg_total_time_ms"] > 0
        assert driver.alive
        assert llm.prefill_runner.pipeline is None
    assert not driver.alive, "closing the engine gives the partitions back"


def test_auto_tries_the_ways_that_may_win_and_answers_the_same(
    driver: FakeDriver, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_winning(monkeypatch)
    with engine() as llm:
        for _ in range(12):
            assert answers(llm) == expected
        stats = llm.decode_runner.get_pipeline_statistics()
    assert stats["mode_running"] == "auto"
    assert set(stats["steps_by_way"]) == {SEQUENTIAL, "20:112 core", "28:104 core", "36:96 core", "52:80 core"}
    assert stats["exploration_steps"] > 0 and any(len(place["medians_ms"]) == 5 for place in stats["places"])
    for place in stats["places"]:
        medians = place["medians_ms"]
        assert not medians or medians[place["chosen"]] <= medians[SEQUENTIAL]


def test_auto_tries_nothing_that_cannot_win(driver: FakeDriver, expected: Answers) -> None:
    """Five rows of a tiny model."""
    with engine() as llm:
        assert answers(llm) == expected
        stats = llm.decode_runner.get_pipeline_statistics()
    assert stats["mode_running"] == "auto" and set(stats["steps_by_way"]) == {SEQUENTIAL}


def test_auto_with_counts_tries_that_split_only(
    driver: FakeDriver, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_winning(monkeypatch)
    with engine(decode_attention_sm=16, decode_ffn_sm=16) as llm:
        assert answers(llm) == expected
        stats = llm.decode_runner.get_pipeline_statistics()
    assert set(stats["steps_by_way"]) == {SEQUENTIAL, "16:16 core"}
    assert stats["green"]["idle_sms"] == 100


@pytest.mark.parametrize("options", [{"decode_pipeline": "disabled"}, {"enable_decode_pipeline": False}])
def test_disabled_never_touches_green_contexts(driver: FakeDriver, expected: Answers, options: dict[str, Any]) -> None:
    with engine(**options) as llm:
        assert answers(llm) == expected and llm.decode_runner.pipeline is None
    assert not driver.calls


def test_disable_green_decodes_over_one_stream_and_says_so(driver: FakeDriver, expected: Answers) -> None:
    with engine(disable_green=True) as llm:
        assert answers(llm) == expected
        stats = llm.decode_runner.get_pipeline_statistics()
    assert not driver.calls
    assert (stats["mode_running"], stats["fallback_cause"]) == ("sequential", "disable_green=True")


# -- failures


def num_driver_calls(driver: FakeDriver) -> int:
    manager = GreenManager(torch.device("cuda", 0), 44, 88)
    manager.close()
    num_calls = driver.calls.index("cuStreamSynchronize") - 1  # from here on it was closing
    driver.calls.clear()
    return num_calls


def test_auto_goes_on_whichever_driver_call_fails(
    driver: FakeDriver, expected: Answers, caplog: pytest.LogCaptureFixture
) -> None:
    for fail_call in range(num_driver_calls(driver)):
        driver.calls.clear()
        driver.fail_call = fail_call
        with caplog.at_level(logging.WARNING, "nanovllm"), engine(decode_attention_sm=44, overlap=False) as llm:
            outputs = llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
            stats = llm.decode_runner.get_pipeline_statistics()
        assert outputs[0].outputs[0].token_ids == expected[0][:3]
        assert stats["mode_running"] == "sequential" and "CUDA_ERROR_OUT_OF_MEMORY" in stats["fallback_cause"]
        assert [r.getMessage() for r in caplog.records if WARNING in r.getMessage()] == [
            f"{WARNING}: {stats['fallback_cause']}; decode goes on over one stream"
        ]
        assert not driver.alive
        caplog.clear()


def test_static_raises_whichever_driver_call_fails(driver: FakeDriver) -> None:
    for fail_call in range(num_driver_calls(driver)):
        driver.calls.clear()
        driver.fail_call = fail_call
        with pytest.raises(GreenContextError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            LLM(DEMO_MODEL, **OPTIONS, decode_pipeline="static", decode_attention_sm=44)
        assert not driver.alive


def test_without_cuda_python(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, driver: FakeDriver
) -> None:
    def missing() -> None:
        raise GreenContextError("green contexts need cuda-python")

    monkeypatch.setattr(green_ctx, "_load_driver", missing)
    with caplog.at_level(logging.WARNING, "nanovllm"), engine() as llm:
        assert llm.decode_runner.get_pipeline_statistics()["mode_running"] == "sequential"
    assert f"{WARNING}: green contexts need cuda-python" in caplog.text
    with pytest.raises(GreenContextError, match="need cuda-python"):
        LLM(DEMO_MODEL, **OPTIONS, decode_pipeline="static")


def test_a_partition_that_cannot_be_granted(driver: FakeDriver, caplog: pytest.LogCaptureFixture) -> None:
    counts = dict(decode_attention_sm=100, decode_ffn_sm=100)
    with caplog.at_level(logging.WARNING, "nanovllm"), engine(**counts) as llm:
        assert llm.decode_runner.get_pipeline_statistics()["mode_running"] == "sequential"
    assert f"{WARNING}: attention_sm=100 and ffn_sm=100 are more than the card's 132 SMs" in caplog.text
    with pytest.raises(ValueError, match="more than the card's 132 SMs"):
        LLM(DEMO_MODEL, **OPTIONS, decode_pipeline="static", **counts)


def test_what_fails_behind_the_partitions_gives_them_back(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture, say."""

    def fail(*args: Any) -> None:
        assert driver.alive
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(pipeline_start, "make_way", fail)
    with engine() as llm:
        assert llm.decode_runner.get_pipeline_statistics()["fallback_cause"] == "CUDA out of memory"
        assert not driver.alive
    with pytest.raises(RuntimeError, match="out of memory"):
        LLM(DEMO_MODEL, **OPTIONS, decode_pipeline="static")
    assert not driver.alive


def test_a_failing_rebalance_drops_no_request(
    driver: FakeDriver, expected: Answers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    always_winning(monkeypatch)
    moves, rebalance = [0], GreenManager.rebalance

    def fail_third(self: GreenManager, *counts: int) -> Any:
        moves[0] += 1
        if moves[0] == 3:
            raise GreenContextError("cuGreenCtxStreamCreate failed: injected")
        return rebalance(self, *counts)

    monkeypatch.setattr(GreenManager, "rebalance", fail_third)
    with caplog.at_level(logging.WARNING, "nanovllm"), engine() as llm:
        for _ in range(4):
            assert answers(llm) == expected
        stats = llm.decode_runner.get_pipeline_statistics()
    assert stats["mode_running"] == "sequential" and "injected" in stats["fallback_cause"]
    assert caplog.text.count(WARNING) == 1 and moves[0] == 3


# -- what is told


def test_the_printed_statistics(driver: FakeDriver, capsys: pytest.CaptureFixture[str]) -> None:
    with engine(decode_pipeline="static", decode_attention_sm=16, decode_ffn_sm=16) as llm:
        answers(llm)
        llm.decode_runner.print_pipeline_statistics()
        llm.prefill_runner.print_pipeline_statistics()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "[M2 Pipeline Statistics - GPU1 Decode Card]",
        "  Mode running: static",
        "  Total tokens: 55",
    ]
    assert printed[-3:] == ["  Attention SMs: 16", "  FFN SMs: 16", "no decode pipeline was asked for"]


def test_the_debug_log_has_every_step(driver: FakeDriver, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nanovllm"):
        with engine(decode_pipeline="static", decode_attention_sm=44, pipeline_debug=True, overlap=False) as llm:
            outputs = llm.generate(
                PROMPTS[:2], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), use_tqdm=False
            )
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step ")]
    layers = llm.model_config.num_hidden_layers
    assert len(lines) == 2, "the first token is prefill's"
    assert all(f"queues attention {2 * layers}, ffn {2 * layers + 2};" in line and "tok/s" in line for line in lines)
    second = [output.outputs[0].token_ids[1] for output in outputs]
    assert lines[0].startswith("step 44:88 core steady (2 rows x ") and lines[0].endswith(f"ids {second}")
