"""What goes wrong in a running engine, on CPU cards with threads and without: who is told what, and what goes on."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import LLM, EngineDeadError, SamplingParams
from nanovllm.engine.detokenizer import StopWatcher
from nanovllm.engine.faults import BROKEN_LINK_COPIES, COPY_RETRIES, describe
from nanovllm.engine.sequence import derive_seed
from nanovllm.engine.shards import NO_TOKEN
from nanovllm.layers import sampler
from nanovllm.tokenizer import Tokenizer
from tests.cpu.faulty import ANSWER_LIMIT_S, GREEDY, PROMPTS, BrokenLane, check_books, errors_of, tokens_of
from tests.cpu.tiny import BLOCK, make_llm, scripted, settle, wait_until, write_model
from tests.faults import ILLEGAL_ACCESS, STEPS, FaultInjector, Times, copies_across, fails, steps_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    with make_llm(folder, overlap=False) as llm:
        return tokens_of(llm)


@pytest.fixture(params=["elastic", "strict", "elastic inline", "strict inline"])
def llm(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    roles, *inline = request.param.split()
    with make_llm(folder, enable_two_gpu_pd=True, pd_roles=roles, overlap=not inline, verify_copies=True) as llm:
        yield llm
    check_books(llm)


# -- a copy


def test_a_copy_that_fails_is_tried_again(llm: LLM, expected: list[list[int]]) -> None:
    failures = Times(COPY_RETRIES, copies_across, fails(RuntimeError("no link")))
    FaultInjector(llm).before = failures
    assert tokens_of(llm) == expected and failures.left == 0
    assert llm.stats()["copy_retries"] == COPY_RETRIES and not errors_of(llm)
    settle(llm)


def test_a_copy_that_keeps_failing_is_given_up_and_its_prompt_prefilled_again(
    llm: LLM, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """The first copy and all its retries fail; then the link works."""
    first: list[int] = []

    def of_the_first(entry: str, shard: Any) -> bool:
        if copies_across(entry, shard):
            first.append(shard.copy)
        return copies_across(entry, shard) and shard.copy == first[0]

    failures = Times(1 + COPY_RETRIES, of_the_first, fails(RuntimeError("no link")))
    FaultInjector(llm).before = failures
    assert tokens_of(llm) == expected and failures.left == 0
    stats = llm.stats()
    assert stats["errors"]["copy"] == 1 and stats["prefilled_again"] >= 1 and stats["degraded"] is None
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    settle(llm)


@pytest.mark.parametrize("late_s", [0.0, 0.05])
def test_a_late_copy_is_only_late(llm: LLM, expected: list[list[int]], late_s: float) -> None:
    FaultInjector(llm).before = Times(3, copies_across, lambda *shard: time.sleep(late_s))
    assert tokens_of(llm) == expected and not llm.stats()["copy_retries"]


def test_a_broken_link_leaves_one_card(llm: LLM, expected: list[list[int]]) -> None:
    FaultInjector(llm).before = Times(10**6, copies_across, fails(RuntimeError("no link")))
    assert tokens_of(llm) == expected
    stats = llm.stats()
    assert stats["degraded"] == "copies from card 0 to card 1: RuntimeError: no link"
    assert errors_of(llm) == {"copy": BROKEN_LINK_COPIES - 1, "card": 1}
    settle(llm)
    assert tokens_of(llm) == expected and llm.stats()["card0"]["prefill_tokens"] == stats["card0"]["prefill_tokens"]


@pytest.mark.parametrize("times", [1, 1 + COPY_RETRIES, 50])
def test_a_corrupted_page_never_reaches_decode(llm: LLM, expected: list[list[int]], times: int) -> None:
    def corrupt(entry: str, shard: Any, handle: Any) -> None:
        target = llm.decode_runner if shard.dst else llm.prefill_runner
        _, block = shard.block_pairs[-1]
        target.kv_cache.blocks[block][0, 0, 0, 0, 0] += 1.0

    corruptions = Times(times, copies_across, corrupt)
    FaultInjector(llm).after = corruptions
    assert tokens_of(llm) == expected
    assert llm.stats()["copy_retries"] > 0
    settle(llm)


def test_without_checksums_a_corrupted_page_would_change_answers(folder: Path, expected: list[list[int]]) -> None:
    """So the test above can fail."""
    with make_llm(folder, enable_two_gpu_pd=True, pd_roles="strict") as llm:

        def corrupt(entry: str, shard: Any, handle: Any) -> None:
            for _, block in shard.block_pairs:
                llm.decode_runner.kv_cache.blocks[block].add_(1.0)

        FaultInjector(llm).after = Times(10**6, copies_across, corrupt)
        assert tokens_of(llm) != expected


# -- a card


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), RuntimeError("CUDA error: out of memory")])
@pytest.mark.parametrize("card", [0, 1])
def test_a_failing_card_leaves_the_other(
    llm: LLM, expected: list[list[int]], card: int, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of the work; every answer is what it would have been, those that come later too."""
    steps = [0]

    def fifth(entry: str, shard: Any) -> bool:
        steps[0] += entry in STEPS and shard.card == card
        return steps[0] == (2 if card == 0 else 5) and steps_of(card)(entry, shard)

    failures = Times(1, fifth, fails(error))
    FaultInjector(llm).before = failures
    assert tokens_of(llm) == expected and failures.left == 0
    stats = llm.stats()
    assert stats["degraded"] == f"card {card}: {describe(error)}" and errors_of(llm) == {"card": 1}
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    settle(llm)
    assert tokens_of(llm) == expected
    after = llm.stats()[f"card{card}"]
    assert after["prefill_tokens"] == stats[f"card{card}"]["prefill_tokens"]
    *_, longest = llm.generate(PROMPTS, GREEDY, use_tqdm=False)  # prefixes are found on the card that is left, too
    assert longest["token_ids"] == expected[-1] and longest.num_cached_tokens >= len(PROMPTS[-1]) // BLOCK * BLOCK


def test_a_lost_card_keeps_nothing_of_its_last_step(llm: LLM, expected: list[list[int]]) -> None:
    """What a step had in its hands when it failed is gone, although nothing else runs on that card any more."""
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(*shard: Any) -> None:
        activations = torch.zeros(1 << 10)
        held.append(weakref.ref(activations))
        try:
            raise KeyError("a bug, somewhere inside")
        except KeyError as error:
            raise RuntimeError("a bug") from error

    FaultInjector(llm).before = Times(1, steps_of(1), fail)
    assert tokens_of(llm) == expected and llm.stats()["degraded"] is not None
    assert len(held) == 1 and held[0]() is None


def test_nothing_is_freed_after_a_sticky_error(llm: LLM) -> None:
    """Where freeing fails as well, before anybody was told."""
    held: list[weakref.ref[torch.Tensor]] = []

    def fail(*shard: Any) -> None:
        activations = torch.zeros(1 << 10)
        held.append(weakref.ref(activations))
        raise RuntimeError(ILLEGAL_ACCESS)

    FaultInjector(llm).before = Times(1, steps_of(1), fail)
    with pytest.raises(EngineDeadError):
        tokens_of(llm)
    assert len(held) == 1 and held[0]() is not None


@pytest.mark.parametrize(("card", "kinds"), [(0, "prefill, decode"), (1, "decode, mixed")])
def test_a_card_that_goes_on_without_graphs_says_so(
    folder: Path, expected: list[list[int]], card: int, kinds: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As a card of strict roles does: it captured its own kinds of steps only."""
    never: Any = SimpleNamespace(size_for=lambda *sizes: None)  # graphs of no size: every step is launched eagerly
    with make_llm(folder, enable_two_gpu_pd=True, pd_roles="strict") as llm:
        FaultInjector(llm).before = Times(1, steps_of(card), fails(RuntimeError("a bug")))
        llm.prefill_runner.prefill_graphs = llm.decode_runner.mixed_graphs = never
        assert tokens_of(llm) == expected
        told = f"card {card}: RuntimeError: a bug; card {1 - card} has no CUDA graphs of {kinds} steps"
        assert llm.stats()["degraded"] == told and told in caplog.text


def test_what_a_lost_card_did_is_not_said_to_run(folder: Path, expected: list[list[int]]) -> None:
    """Its pipeline and the SMs that it lent: the card that goes on has neither."""
    running: dict[str, Any] = {"mode_running": "auto", "fallback_cause": None, "fallbacks": 0}
    running |= {"attention_sm": 36, "ffn_sm": 96, "green": {"switches": 3}}
    with make_llm(folder, enable_two_gpu_pd=True, lend_sms=(60, 72)) as llm:
        llm.decode_runner.get_pipeline_statistics = running.copy  # type: ignore[method-assign]
        before = llm.stats()
        assert before["pipeline"] == running and not before["lending_failed"]
        FaultInjector(llm).before = Times(1, steps_of(1), fails(RuntimeError("a bug")))
        assert tokens_of(llm) == expected
        stats = llm.stats()
        told = {"mode_running": "sequential", "fallback_cause": stats["degraded"], "fallbacks": 1}
        told |= {"attention_sm": 0, "ffn_sm": 0, "green": {}}
        assert stats["pipeline"] == told and stats["lending_failed"]


def test_a_second_failure_ends_the_engine(llm: LLM) -> None:
    first, second = (Times(1, steps_of(card), fails(RuntimeError("a bug"))) for card in (0, 1))

    def both(entry: str, shard: Any) -> None:
        first(entry, shard)
        second(entry, shard)

    FaultInjector(llm).before = both
    with pytest.raises(EngineDeadError, match="a bug"):
        tokens_of(llm)
    assert errors_of(llm) == {"card": 1, "engine": 1}


def test_the_only_card_that_fails_ends_the_engine(folder: Path) -> None:
    with make_llm(folder) as llm:
        FaultInjector(llm).before = Times(1, lambda entry, shard: entry in STEPS, fails(RuntimeError("a bug")))
        with pytest.raises(EngineDeadError, match="a bug"):
            tokens_of(llm)
    check_books(llm)


@pytest.mark.parametrize("entry", ["run_prefill", "run_copy", "step of card 1"])
def test_a_sticky_error_under_load_reaches_every_caller(folder: Path, entry: str) -> None:
    """Of several threads, whatever they wait for; and what the other card holds is let go of."""
    with make_llm(folder, enable_two_gpu_pd=True) as llm:
        told, outcomes = threading.Event(), []

        def now(name: str, shard: Any) -> bool:
            return told.is_set() and (steps_of(1)(name, shard) if entry == "step of card 1" else name == entry)

        FaultInjector(llm).before = Times(10**6, now, fails(RuntimeError(ILLEGAL_ACCESS)))
        asks: list[Callable[[], Any]] = [lambda: tokens_of(llm, SamplingParams(max_tokens=200, ignore_eos=True))] * 3
        asks.append(lambda: list(llm.stream([5], SamplingParams(max_tokens=200, ignore_eos=True))))

        def call(ask: Callable[[], Any]) -> None:
            with pytest.raises(EngineDeadError, match="illegal memory access"):
                while True:
                    ask()
            outcomes.append(time.monotonic())

        callers = [threading.Thread(target=call, args=(ask,), daemon=True) for ask in asks]
        for caller in callers:
            caller.start()
        wait_until(lambda: llm.stats()["decoding"] > 2)
        told.set()
        for caller in callers:
            caller.join(ANSWER_LIMIT_S)
        assert len(outcomes) == len(callers), "somebody still waits"
    check_books(llm)


def test_faults_are_on_the_metrics_page(folder: Path) -> None:
    core = pytest.importorskip("prometheus_client.registry")
    from nanovllm.engine.prometheus import MetricsPage

    with make_llm(folder, enable_two_gpu_pd=True, pd_roles="strict") as llm:
        FaultInjector(llm).before = Times(10**6, copies_across, fails(RuntimeError("no link")))
        tokens_of(llm)
        registry, stats = core.CollectorRegistry(), llm.stats()
        registry.register(MetricsPage(llm.stats))
        value = registry.get_sample_value
        assert value("nanovllm:errors_total", {"kind": "card"}) == 1
        assert value("nanovllm:fallbacks_total", {"kind": "one_card"}) == 1
        assert value("nanovllm:errors_total", {"kind": "copy"}) == stats["errors"]["copy"] > 0
        assert value("nanovllm:copy_retries_total") == stats["copy_retries"] > 0
        assert value("nanovllm:num_prefilled_again_total") == stats["prefilled_again"] > 0


# -- one request


class Broken(Exception):
    pass


class Panic(BaseException):
    """As the tokenizer's library, which is written in Rust, raises it."""


@pytest.mark.parametrize("kind", [Broken, Panic])
def test_a_tokenizer_that_raises_ends_one_request(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """In the engine's thread, which looks for stop strings there."""
    push = StopWatcher.push

    def raise_for_bad(self: StopWatcher, token: int, search: bool) -> str | None:
        if self._stop == ("bad",) and len(self._detokenizer._ids) == 3:
            raise kind("no such piece")
        return push(self, token, search)

    monkeypatch.setattr(StopWatcher, "push", raise_for_bad)
    params = [SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop="never") for _ in PROMPTS]
    params[2] = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop="bad", n=1)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for number, (output, tokens) in enumerate(zip(outputs, expected, strict=True)):
        if number == 2:
            assert output.outputs[0].finish_reason == "error"
            assert output.error == f"{kind.__name__}: no such piece"
            assert output["token_ids"] == tokens[:4] and output.finished
        else:
            assert output["token_ids"] == tokens and output.error is None
    assert errors_of(llm) == {"tokenizer": 1} and llm.stats()["requests"]["finished"]["error"] == 1
    settle(llm)


@pytest.mark.parametrize("kind", [Broken, Panic])
def test_a_tokenizer_that_raises_at_the_end_ends_all_answers_of_one_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    monkeypatch.setattr(StopWatcher, "flush", fails(kind("half a character")))
    params = SamplingParams(max_tokens=3, stop="never", ignore_eos=True, n=3)
    outputs = llm.generate(PROMPTS[:1], params, use_tqdm=False)
    assert {answer.finish_reason for answer in outputs[0].outputs} == {"error"}
    assert outputs[0].error == f"{kind.__name__}: half a character"
    monkeypatch.undo()
    settle(llm)


def test_an_interrupt_while_text_is_made_is_no_fault_of_a_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `overlap`, where the caller's thread does the engine's work."""
    with make_llm(folder, overlap=False) as llm:
        interrupt = fails(KeyboardInterrupt())
        monkeypatch.setattr(StopWatcher, "push", lambda self, token, search: interrupt())
        with pytest.raises(KeyboardInterrupt):
            llm.generate("abc", SamplingParams(max_tokens=9, stop="never", ignore_eos=True), use_tqdm=False)
        assert errors_of(llm).get("tokenizer") is None


def test_a_tokenizer_that_raises_for_a_caller_is_that_callers_matter(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is made in the caller's thread, of what was asked for."""
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", fails(Broken("no text")))
        with pytest.raises(Broken):
            llm.generate("text", GREEDY, use_tqdm=False)
        patch.setattr(Tokenizer, "decode", fails(Broken("no text")))
        with pytest.raises(Broken):
            list(llm.stream([1, 2], SamplingParams(max_tokens=200, ignore_eos=True)))
    assert tokens_of(llm) == expected
    settle(llm)


def test_a_consumer_that_raises_aborts_its_request_only(llm: LLM, expected: list[list[int]]) -> None:
    stream = llm.stream([1, 2], SamplingParams(max_tokens=200, ignore_eos=True))
    with pytest.raises(Broken):
        for number, _ in enumerate(stream):
            if number == 2:
                raise Broken
    stream.close()  # as when the last reference to it goes
    assert tokens_of(llm) == expected
    settle(llm)
    assert llm.stats()["requests"]["finished"]["abort"] == 1


@pytest.mark.parametrize("position", [0, 1, 7])
def test_logits_that_are_no_numbers_end_one_request(
    llm: LLM, expected: list[list[int]], position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the model to the caller: the row's own logits, and nothing else, are NaN."""
    sample = sampler.sample
    bad_seed = 4242

    def spoil(logits: Any, batch: Any) -> Any:
        rows = (batch.seed == seed_on_card) & (batch.position == position)
        logits[rows] = float("nan")
        return sample(logits, batch)

    seed_on_card = derive_seed(derive_seed(bad_seed), 0)
    monkeypatch.setattr(sampler, "sample", spoil)
    params: list[SamplingParams] = [GREEDY] * len(PROMPTS)
    params[3] = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, seed=bad_seed, logprobs=2)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for number, (output, tokens) in enumerate(zip(outputs, expected, strict=True)):
        assert output["token_ids"] == (tokens[:position] if number == 3 else tokens)
    bad = outputs[3]
    assert bad.error == "the model's logits are no numbers" and bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].logprobs is not None and len(bad.outputs[0].logprobs) == position
    assert errors_of(llm) == {"logits": 1}
    settle(llm)


@pytest.mark.parametrize("two", [False, True])
def test_blocks_of_a_failed_answer_are_found_by_nobody(
    folder: Path, two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's pages are spoilt once, on card 0: its own answer fails, and all that follow are computed anew."""
    prompt, options = [7] * 70, {"enable_two_gpu_pd": two, "max_num_batched_tokens": 128}
    with make_llm(folder, **options) as llm:
        whole = llm.generate([prompt], GREEDY, use_tqdm=False)[0]["token_ids"]
    with make_llm(folder, **options) as llm:
        model, pages = llm.prefill_runner.model, llm.prefill_runner.kv_cache.pages
        forward, spoilt = model.forward_prefill, []

        def spoil(*arguments: Any, **keywords: Any) -> Any:
            result = forward(*arguments, **keywords)
            if not spoilt:
                spoilt.append(True)
                pages[pages.flatten(1).abs().sum(1) > 0] = float("nan")
            return result

        monkeypatch.setattr(model, "forward_prefill", spoil)
        first, *others = (llm.generate([p], GREEDY, use_tqdm=False)[0] for p in (prompt, prompt, [*prompt[:48], 9]))
        assert spoilt and first.outputs[0].finish_reason == "error" and errors_of(llm) == {"logits": 1}
        assert others[0]["token_ids"] == whole and others[1].outputs[0].finish_reason == "length"
        settle(llm)
    check_books(llm)


def test_closing_after_a_sticky_error_leaves_the_card_alone(folder: Path) -> None:
    """The caller gets the engine's error, not another one from giving back what nobody can any more."""
    lane: Any = BrokenLane()
    with pytest.raises(EngineDeadError, match="illegal memory access"), make_llm(folder, enable_two_gpu_pd=True) as llm:
        llm.decode_runner.pipeline = lane
        FaultInjector(llm).before = Times(1, steps_of(1), fails(RuntimeError(ILLEGAL_ACCESS)))
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    llm.close()
    assert lane.closed == 0
    llm.decode_runner.lending = lane
    with pytest.raises(RuntimeError):
        llm.decode_runner.close_pipeline()  # as an engine that was alive would
    assert lane.closed == 1 and llm.decode_runner.pipeline is None and llm.decode_runner.lending is None


def test_siblings_of_a_failed_answer_end_with_it(llm: LLM) -> None:
    with scripted() as scripts:
        seed = scripts.write([5, NO_TOKEN], index=1)
        scripts.write([6, 6, NO_TOKEN], index=0, seed=seed)
        params = SamplingParams(n=3, seed=seed, max_tokens=9, ignore_eos=True)
        (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    assert [answer.finish_reason for answer in output.outputs] == ["error"] * 3
    assert [answer.token_ids for answer in output.outputs][:2] == [[6, 6], [5]]
    settle(llm)


def test_a_stream_and_the_log_say_why_a_request_failed(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nanovllm")
    with scripted() as scripts:
        last = list(llm.stream([1], SamplingParams(seed=scripts.write([7, 7, NO_TOKEN]), max_tokens=9)))[-1]
        assert (last.finish_reason, last.error) == ("error", "the model's logits are no numbers")
        llm.generate([1], SamplingParams(seed=scripts.write([NO_TOKEN]), max_tokens=2), use_tqdm=False)
    assert "the model's logits are no numbers" in caplog.text
