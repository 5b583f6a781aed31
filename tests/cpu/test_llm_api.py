"""What callers see, in four modes: one card and two, overlap on and off, all with the same random weights."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.engine import llm_engine
from tests.cpu.tiny import (
    BLOCK,
    EOS,
    NUM_KNOWN_IDS,
    VOCAB_SIZE,
    Scripts,
    make_llm,
    make_tokenizer,
    paused,
    scripted,
    settle,
    wait_until,
    write_model,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MODES = [
    pytest.param((two, overlap), id=f"{'two' if two else 'one'}-{'overlap' if overlap else 'inline'}")
    for two in (False, True)
    for overlap in (False, True)
]
THE = make_tokenizer().token_to_id("Ġthe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[LLM]:
    """The reference: one card, nothing in flight, no cache."""
    with make_llm(folder, overlap=False, enable_prefix_caching=False) as llm:
        yield llm


@pytest.fixture(scope="module", params=MODES)
def shared(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    two_cards, overlap = request.param
    with make_llm(folder, enable_two_gpu_pd=two_cards, overlap=overlap) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """One engine for all tests; each must leave it with nothing in flight."""
    yield shared
    settle(shared)


@pytest.fixture
def scripts() -> Iterator[Scripts]:
    with scripted() as scripts:
        yield scripts


def ids_of(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def answer(llm: LLM, ids: list[int] | bytes, scripts: Scripts, **params: Any) -> Any:
    """The CompletionOutput of a dictated answer."""
    params = {"max_tokens": len(ids), "seed": scripts.write(ids)} | params
    return llm.generate([1, 2, 3], SamplingParams(**params), use_tqdm=False)[0].outputs[0]


# -- prompts and outputs


def test_every_form_of_prompt(llm: LLM, plain: LLM) -> None:
    texts = ["the cat in", "ab and"]
    ids = [plain.tokenizer.encode(text) for text in texts]
    expected = [ids_of(plain, [prompt])[0] for prompt in ids]
    forms = [
        texts, tuple(texts), ids, [tuple(prompt) for prompt in ids], [np.array(prompt) for prompt in ids],
        [torch.tensor(prompt) for prompt in ids], [texts[0], ids[1]], (text for text in texts),
    ]  # fmt: skip
    for form in forms:
        assert ids_of(llm, form) == expected
    array = np.array(ids[0], np.uint16)
    for single in (texts[0], ids[0], tuple(ids[0]), array, torch.tensor(ids[0])):
        outputs = llm.generate(single, GREEDY, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == expected[:1]
        assert outputs[0].prompt_token_ids == ids[0] and type(outputs[0].prompt_token_ids[0]) is int
    assert ids_of(llm, np.array([ids[0][:3], ids[0][:3]]), GREEDY)[0] == ids_of(plain, ids[0][:3])[0]


def test_prompt_text_is_kept_and_ids_are_the_callers_own(llm: LLM) -> None:
    mine = [5, 6, 7]
    (by_text,), (by_ids,) = llm.generate("ab", GREEDY, False), llm.generate(mine, GREEDY, False)
    assert by_text.prompt == "ab" and by_ids.prompt is None
    mine.append(8)
    assert by_ids.prompt_token_ids == [5, 6, 7]


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    """More prompts than slots, and the first are the last to end."""
    prompts = [[number + 1] * 3 for number in range(20)]
    params = [SamplingParams(temperature=0, max_tokens=40 - 2 * i, ignore_eos=True) for i in range(20)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output["token_ids"]) for output in outputs] == [40 - 2 * i for i in range(20)]
    assert len({output.request_id for output in outputs}) == 20 and all(output.finished for output in outputs)


def test_same_answers_as_the_plain_engine(llm: LLM, plain: LLM) -> None:
    rng = random.Random(5)
    stem = [rng.randrange(256) for _ in range(40)]
    prompts = [stem[: rng.choice([1, 15, 16, 17, 32, 40])] + [rng.randrange(256)] for _ in range(16)]
    params = [
        SamplingParams(
            temperature=rng.choice([0, 0.8]), seed=i, max_tokens=rng.choice([1, 2, 17, 30]), top_k=rng.choice([0, 8]),
            presence_penalty=rng.choice([0, 0.5]), repetition_penalty=rng.choice([1, 1.4]), min_tokens=1,
        ) for i in range(16)
    ]  # fmt: skip
    assert ids_of(llm, prompts, params) == ids_of(plain, prompts, params)


def test_result_as_nano_vllms_dictionary(llm: LLM) -> None:
    (output,) = llm.generate("ab", GREEDY, use_tqdm=False)
    assert output["text"] == output.outputs[0].text and output["token_ids"] == output.outputs[0].token_ids
    assert dict(output) == {"text": output["text"], "token_ids": output["token_ids"]}
    for key in ("tokens", "finished", 0):
        with pytest.raises(KeyError):
            output[key]


def test_default_parameters(llm: LLM) -> None:
    (output,) = llm.generate([1, 2], use_tqdm=False)
    assert len(output["token_ids"]) <= 64 and output.outputs[0].finish_reason in ("stop", "length")


def test_progress_bar_shows_both_rates(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate([[1], [2]], GREEDY, use_tqdm=True)
    shown = capfd.readouterr().err
    assert "2/2" in shown and "card 0: prefill " in shown and " tok/s" in shown
    assert ("card 1: prefill 0 decode " in shown) == llm.config.enable_two_gpu_pd
    llm.generate([[1]], GREEDY, use_tqdm=False)
    assert capfd.readouterr().err == ""


def test_max_tokens_none_goes_up_to_the_models_length(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    assert len(ids_of(llm, [1] * 240, params)[0]) == 16
    assert len(ids_of(llm, [1] * 255, params)[0]) == 1
    exact = SamplingParams(temperature=0, max_tokens=56, ignore_eos=True)
    assert len(ids_of(llm, [1] * 200, exact)[0]) == 56


def test_stats_count_what_the_cards_did(folder: Path) -> None:
    for two_cards in (False, True):
        with make_llm(folder, enable_two_gpu_pd=two_cards) as llm:
            ids_of(llm, [[1] * 10, [2] * 20])
            settle(llm)
            stats = llm.stats()
        decoder = stats["card1" if two_cards else "card0"]
        assert stats["card0"]["prefill_tokens"] == 30 and decoder["decode_tokens"] >= 22
        assert stats["sampled_tokens"] == 24 and stats["waiting"] == stats["decoding"] == 0
        assert stats["copied_blocks"] == (4 if two_cards else 0), stats  # 1 + 2 mirrored, 1 full block written back
        assert not two_cards or stats["card0"]["decode_steps"] == stats["card1"]["prefill_steps"] == 0


# -- n answers


def test_n_answers_do_not_depend_on_each_other(llm: LLM) -> None:
    def answers(n: int, **options: Any) -> list[list[int]]:
        params = SamplingParams(n=n, seed=11, max_tokens=20, ignore_eos=True, **options)
        (output,) = llm.generate(list(range(1, 21)), params, use_tqdm=False)
        assert [completion.index for completion in output.outputs] == list(range(n))
        return [completion.token_ids for completion in output.outputs]

    five = answers(5)
    assert answers(2) == five[:2] and answers(1) == five[:1]
    assert len({tuple(ids) for ids in five}) == 5


def test_n_answers_end_each_in_their_own_way(llm: LLM, scripts: Scripts) -> None:
    seed = scripts.write([65, EOS], index=0)
    scripts.write(b"xyz", index=1, seed=seed)
    scripts.write(b"abcdefgh", index=2, seed=seed)
    (output,) = llm.generate([1], SamplingParams(n=3, seed=seed, max_tokens=6, stop=["z"]), use_tqdm=False)
    assert [(c.text, c.finish_reason, c.stop_reason) for c in output.outputs] == [
        ("A", "stop", None), ("xy", "stop", "z"), ("abcdef", "length", None),
    ]  # fmt: skip
    assert output["text"] == "A"


# -- chat


def test_chat(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>assistant\n"
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt == prompt and output["token_ids"] == ids_of(llm, prompt)[0]
    assert output.prompt_token_ids.count(EOS) == 2
    both = llm.chat([conversation, conversation[:1]], GREEDY, use_tqdm=False)
    assert [o.prompt for o in both] == [prompt, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"]
    (thinking,) = llm.chat(conversation[:1], GREEDY, use_tqdm=False, chat_template_kwargs={"thinking": False})
    assert thinking.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<no>"
    options = {"add_generation_prompt": False, "tokenize": True}
    (bare,) = llm.chat(conversation[:1], GREEDY, use_tqdm=False, chat_template_kwargs=options)
    assert bare.prompt == "<|im_start|>user\nhi<|im_end|>\n"


# -- stream


def streamed(llm: LLM, scripts: Scripts, ids: list[int] | bytes, **params: Any) -> tuple[str, list[Any]]:
    """(the final text by `generate`, the increments of the same answer)."""
    params = {"max_tokens": len(ids), "seed": scripts.write(ids)} | params
    (output,) = llm.generate([7], SamplingParams(**params), use_tqdm=False)
    pieces = list(llm.stream([7], SamplingParams(**params)))
    assert [token for piece in pieces for token in piece.token_ids] == output["token_ids"]
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [output.outputs[0].finish_reason]
    return output["text"], pieces


def test_stream_is_the_text(llm: LLM, scripts: Scripts) -> None:
    text, pieces = streamed(llm, scripts, "héllo 中 🙂 the end".encode())
    assert text == "héllo 中 🙂 the end" == "".join(map(str, pieces))
    assert not any("\ufffd" in piece.text for piece in pieces) and len(pieces) > 3


def test_stream_of_arbitrary_bytes_is_the_text(llm: LLM, scripts: Scripts) -> None:
    rng = random.Random(3)
    parts = ["中".encode(), "🙂".encode(), b"\xff", b"\xe4\xb8", b"a", b"\x80", b"ab", b"\xf0\x9f\x99", b"e"]
    for case in range(12):
        ids = list(b"\xff" * rng.choice([0, 0, 9]) + b"".join(rng.choices(parts, k=10)))
        ids[5:5] = rng.choice([[], [THE], [EOS], [VOCAB_SIZE - 1]])
        stop = rng.choice([None, ["ab", "zzzz"], ["中e", "a"], ["\ufffd\ufffd"]])
        include = rng.random() < 0.5
        text, pieces = streamed(
            llm, scripts, ids, stop=stop, include_stop_str_in_output=include, ignore_eos=True,
            skip_special_tokens=rng.random() < 0.5,
        )  # fmt: skip
        assert "".join(map(str, pieces)) == text, (case, ids, stop)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["STOP", "d STOP e", "<|im_end|>", "é", "the"])
def test_nothing_is_streamed_that_a_stop_string_cuts(llm: LLM, scripts: Scripts, stop: str, include: bool) -> None:
    written = f"abc d {stop[:-1]} {stop} e f"
    ids = make_tokenizer().encode(written, add_special_tokens=False).ids + [THE] * 3
    text, pieces = streamed(
        llm, scripts, ids, stop=["never", stop], include_stop_str_in_output=include, ignore_eos=True,
        skip_special_tokens=False,
    )  # fmt: skip
    assert text == written[: written.index(stop) + include * len(stop)]
    assert "".join(map(str, pieces)) == text and pieces[-1].finish_reason == "stop"


def test_stream_of_n_answers(llm: LLM, scripts: Scripts) -> None:
    seed = scripts.write(b"first one", index=0)
    scripts.write("zweiter é".encode(), index=1, seed=seed)
    texts, reasons = ["", ""], Counter()
    for piece in llm.stream([7], SamplingParams(n=2, seed=seed, max_tokens=10)):
        texts[piece.index] += piece.text
        reasons[piece.index, piece.finish_reason] += piece.finish_reason is not None
    assert texts == ["first one~", "zweiter é"] and reasons[0, "length"] == reasons[1, "length"] == 1


@pytest.mark.parametrize("after", [0, 1, 5])  # tokens
def test_closing_a_stream_aborts_its_request(llm: LLM, after: int) -> None:
    before, seen = llm.stats()["sampled_tokens"], 0
    with paused(llm, after_steps=20):
        stream = llm.stream([9, 9], SamplingParams(max_tokens=250, ignore_eos=True))
        while seen < after:
            seen += len(next(stream).token_ids)
        stream.close()
        assert list(stream) == []
    settle(llm)
    assert not llm._engine.has_unfinished() and llm.stats()["sampled_tokens"] - before < 250


def test_a_dropped_stream_aborts_its_request(llm: LLM) -> None:
    before = llm.stats()["sampled_tokens"]
    with paused(llm, after_steps=20):
        for _ in llm.stream([9, 9], SamplingParams(max_tokens=250, ignore_eos=True)):
            break
        llm.stream([9, 9], SamplingParams(max_tokens=250, ignore_eos=True))
    settle(llm)
    assert not llm._engine.has_unfinished() and llm.stats()["sampled_tokens"] - before < 500


@pytest.mark.parametrize(("options", "text"), [({"stop_token_ids": [THE]}, "A"), ({"stop": "he"}, "A t")])
def test_reader_never_sees_a_token_before_it_was_judged(
    folder: Path, scripts: Scripts, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], text: str
) -> None:
    """The engine may be slow to notice that a token ends the answer: its text must not be out by then."""
    judge, judging, looked = llm_engine.stop_of, threading.Event(), threading.Event()

    def slow(sequence: Any) -> Any:
        if sequence.num_output_tokens == 2:
            judging.set()
            looked.wait(10)
        return judge(sequence)

    monkeypatch.setattr(llm_engine, "stop_of", slow)
    with make_llm(folder) as llm:
        pieces = []
        stream = llm.stream([7], SamplingParams(seed=scripts.write([65, THE, THE]), max_tokens=3, **options))
        reader = threading.Thread(target=lambda: pieces.extend(map(str, stream)))
        assert judging.wait(10)  # " the" is sampled
        reader.start()
        (request,) = llm._engine._live.values()
        assert RequestOutput(request, llm.tokenizer)["text"] == "A"
        wait_until(lambda: "stop" in options or pieces == ["A"])
        assert "".join(pieces) in ("", "A")
        looked.set()
        reader.join(30)
    assert "".join(pieces) == text


# -- one step at a time


def drain(llm: LLM) -> dict[str, list[RequestOutput]]:
    """Everything that `step` returns, by request."""
    news: dict[str, list[RequestOutput]] = {}
    while outputs := llm.step():
        for output in outputs:
            news.setdefault(output.request_id, []).append(output)
    return news


def test_step_returns_what_advanced_until_all_have_ended(llm: LLM, plain: LLM) -> None:
    prompts = [[1, 2], [3], [4, 5, 6]]
    ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
    assert llm.has_unfinished() and all(isinstance(request_id, str) for request_id in ids)
    news = drain(llm)
    assert not llm.has_unfinished() and llm.step() == []
    for request_id, expected in zip(ids, ids_of(plain, prompts), strict=True):
        steps = [output["token_ids"] for output in news[request_id]]
        assert steps[-1] == expected and all(a == b[: len(a)] for a, b in zip(steps, steps[1:], strict=False))
        assert [output.finished for output in news[request_id]] == [False] * (len(steps) - 1) + [True]
        assert len({len(step) for step in steps}) == len(steps)  # each told something new


def test_a_view_does_not_change_when_the_request_goes_on(llm: LLM, scripts: Scripts) -> None:
    with paused(llm, after_steps=3):
        llm.add_request([1], SamplingParams(seed=scripts.write(b"abcdefgh"), max_tokens=8, stop="xyz", logprobs=0))
        (early,) = llm.step()
    count = len(early["token_ids"])
    drain(llm)
    assert early["token_ids"] == list(b"abcdefgh")[:count] and early["text"] == "abcdefgh"[:count]
    assert len(early.outputs[0].logprobs) == count and not early.finished
    assert early.outputs[0].finish_reason is None and early.outputs[0].stop_reason is None


def test_has_unfinished_until_the_last_output_was_taken(llm: LLM) -> None:
    """The usual loop must see every output, also of requests that end before it asks."""
    ids = {llm.add_request([number], SamplingParams(max_tokens=2)) for number in (1, 2, 3)}
    if llm.config.overlap:
        wait_until(lambda: not llm._engine.has_unfinished())
    ended = []
    while llm.has_unfinished():
        ended += [output.request_id for output in llm.step() if output.finished]
    assert sorted(ended) == sorted(ids)


def test_an_end_is_told_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view made late sees an end that the engine announces only afterwards."""
    taken = llm._news

    def late(advanced: list[Any]) -> list[RequestOutput]:
        if llm.config.overlap:
            wait_until(lambda: all(request.finished for request in advanced))
        return taken(advanced)

    monkeypatch.setattr(llm, "_news", late)
    ids = [llm.add_request([number], SamplingParams(max_tokens=9, ignore_eos=True)) for number in (1, 2, 3)]
    told = Counter(output.request_id for outputs in drain(llm).values() for output in outputs if output.finished)
    assert told == Counter(ids)


@pytest.mark.parametrize("after", [0, 3])  # tokens
def test_abort(llm: LLM, plain: LLM, after: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    last: dict[str, RequestOutput] = {}
    with paused(llm, after_steps=20):
        request_id, other = llm.add_request([5, 6], params), llm.add_request([7, 8], GREEDY)
        while after and (request_id not in last or len(last[request_id]["token_ids"]) < after):
            last |= {output.request_id: output for output in llm.step()}
        llm.abort(request_id)
        llm.abort(request_id)
    last |= {number: outputs[-1] for number, outputs in drain(llm).items()}
    ended = last[request_id]
    assert ended.finished and ended.outputs[0].finish_reason == "abort" and ended.outputs[0].stop_reason is None
    assert len(ended["token_ids"]) < 200
    assert ended["token_ids"] == ids_of(plain, [5, 6], params)[0][: len(ended["token_ids"])]
    assert last[other].outputs[0].finish_reason == "length"


def test_abort_of_unknown_and_finished_requests_does_nothing(llm: LLM) -> None:
    request_id = llm.add_request([5], GREEDY)
    (before,) = [outputs[-1] for outputs in drain(llm).values()]
    for unknown in (request_id, "", "nobody", "-1", str(10**9)):
        llm.abort(unknown)
    assert not llm.has_unfinished() and llm.step() == []
    assert before.outputs[0].finish_reason == "length"
    assert len(ids_of(llm, [5])[0]) == 12


def test_step_and_generate_do_not_take_each_others_outputs(llm: LLM) -> None:
    results: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: results.append(ids_of(llm, [[n] for n in range(1, 9)])))
    ids = {llm.add_request([number], GREEDY) for number in range(20, 26)}
    thread.start()
    news = drain(llm)
    thread.join(60)
    assert set(news) == ids and all(outputs[-1].finished for outputs in news.values())
    assert results == [ids_of(llm, [[n] for n in range(1, 9)])]


def test_several_threads_may_step(llm: LLM) -> None:
    """Every output reaches exactly one of them, and none of them waits for ever."""
    ids = [llm.add_request([number], GREEDY) for number in range(1, 7)]
    ended: list[str] = []

    def loop() -> None:
        while outputs := llm.step():
            ended.extend(output.request_id for output in outputs if output.finished)

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads) and sorted(ended) == sorted(ids)


# -- why an answer ends


def test_ends_at_eos(llm: LLM, scripts: Scripts) -> None:
    end = answer(llm, [65, 66, EOS, 67], scripts)
    assert (end.text, end.token_ids, end.finish_reason, end.stop_reason) == ("AB", [65, 66, EOS], "stop", None)


def test_ends_at_any_of_several_eos_ids(llm: LLM, scripts: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    several = dataclasses.replace(llm.model_config, eos_token_ids=(EOS, 70))
    monkeypatch.setattr(llm, "model_config", several)
    assert answer(llm, [65, 70, 67], scripts).token_ids == [65, 70]
    assert answer(llm, [65, EOS, 67], scripts).token_ids == [65, EOS]


def test_goes_on_past_eos_when_asked_to(llm: LLM, scripts: Scripts) -> None:
    end = answer(llm, [65, EOS, 66], scripts, ignore_eos=True)
    assert (end.text, end.token_ids, end.finish_reason) == ("AB", [65, EOS, 66], "length")
    end = answer(llm, [65, EOS, 66], scripts, ignore_eos=True, skip_special_tokens=False)
    assert end.text == "A<|im_end|>B"
    end = answer(llm, [65, EOS, 66], scripts, ignore_eos=True, stop_token_ids=[EOS])
    assert (end.token_ids, end.stop_reason) == ([65, EOS], EOS)


def test_ends_at_a_stop_id(llm: LLM, scripts: Scripts) -> None:
    end = answer(llm, [65, 66, THE, 67], scripts, stop_token_ids=[200, THE])
    assert (end.text, end.token_ids, end.finish_reason, end.stop_reason) == ("AB", [65, 66, THE], "stop", THE)
    end = answer(llm, [65, 66, THE, 67], scripts, stop_token_ids=[THE], include_stop_str_in_output=True)
    assert end.text == "AB the"
    end = answer(llm, [65, 66, THE, 67], scripts, stop_token_ids=[THE], stop="q", include_stop_str_in_output=True)
    assert end.text == "AB the"
    end = answer(llm, [65, 66, THE, 67], scripts, stop_token_ids=[THE], stop="q")
    assert end.text == "AB"


def test_ends_at_a_stop_string(llm: LLM, scripts: Scripts) -> None:
    end = answer(llm, [65, 66, THE, 67], scripts, stop=["xx", "B t"])
    assert (end.text, end.token_ids, end.finish_reason, end.stop_reason) == ("A", [65, 66, THE], "stop", "B t")
    end = answer(llm, [65, 66, THE, 67], scripts, stop="B t", include_stop_str_in_output=True)
    assert (end.text, end.stop_reason) == ("AB t", "B t")
    end = answer(llm, b"only at the end!", scripts, stop="end!")
    assert (end.text, end.finish_reason, end.stop_reason) == ("only at the ", "stop", "end!")


def test_ends_at_its_length(llm: LLM, scripts: Scripts) -> None:
    end = answer(llm, "ab中".encode()[:-1], scripts)
    assert (end.text, end.finish_reason, end.stop_reason) == ("ab\ufffd", "length", None)
    end = answer(llm, "ab中".encode()[:-1], scripts, stop="q")
    assert (end.text, end.finish_reason) == ("ab\ufffd", "length")
    assert len(answer(llm, b"abc", scripts, max_tokens=1).token_ids) == 1


def test_min_tokens_before_any_id_or_string_ends_it(llm: LLM, scripts: Scripts) -> None:
    def end(ids: list[int], **params: Any) -> tuple[str, list[int]]:
        completion = answer(llm, ids, scripts, min_tokens=3, **params)
        return completion.finish_reason, completion.token_ids

    assert end([65, EOS, 66, 67]) == ("length", [65, EOS, 66, 67])
    assert end([65, 66, EOS, 67]) == ("stop", [65, 66, EOS])
    assert end([65, THE, 66, THE, 67], stop_token_ids=[THE]) == ("stop", [65, THE, 66, THE])
    assert end(list(b"aXbXc"), stop="X") == ("stop", list(b"aXbX"))
    assert end(list(b"aXbcd"), stop=["X", "longer"]) == ("length", list(b"aXbcd"))


def test_min_tokens_keeps_ending_ids_from_being_sampled(llm: LLM) -> None:
    free = ids_of(llm, [3, 4])[0]
    for minimum in (1, 5):
        params = dataclasses.replace(GREEDY, min_tokens=minimum, stop_token_ids=free)
        (output,) = llm.generate([3, 4], params, use_tqdm=False)
        assert not set(output["token_ids"][:minimum]) & set(free) and output["token_ids"][:minimum] != free[:minimum]


def test_ids_that_one_request_banned_are_free_for_the_next_in_its_slot(folder: Path) -> None:
    with make_llm(folder, max_num_seqs=1) as llm:
        params = dataclasses.replace(GREEDY, min_tokens=12)
        free = ids_of(llm, [3, 4], params)
        ids_of(llm, [9], dataclasses.replace(params, stop_token_ids=free[0]))
        assert ids_of(llm, [3, 4], params) == free


# -- logprobs, seeds, penalties


def test_logprobs(llm: LLM) -> None:
    (output,) = llm.generate([1, 2, 3], dataclasses.replace(GREEDY, logprobs=4), use_tqdm=False)
    completion = output.outputs[0]
    assert len(completion.logprobs) == 12
    total = 0.0
    for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
        assert list(position)[0] == token and len(position) == 4 and position[token].rank == 1
        ranked = sorted(position.values(), key=lambda entry: entry.rank)
        assert [entry.rank for entry in ranked] == [1, 2, 3, 4]
        assert 0 > ranked[0].logprob >= ranked[1].logprob >= ranked[2].logprob >= ranked[3].logprob
        total += position[token].logprob
    assert completion.cumulative_logprob == pytest.approx(total)


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    """Those of a decode step equal those of a prefill that ends there; temperature and penalties do not change them."""
    params = SamplingParams(temperature=3.0, seed=4, max_tokens=6, ignore_eos=True, logprobs=2, presence_penalty=1.0)
    (output,) = llm.generate([1, 2, 3], params, use_tqdm=False)
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)
    for count, (token, position) in enumerate(zip(output["token_ids"], output.outputs[0].logprobs, strict=True)):
        (again,) = llm.generate([1, 2, 3, *output["token_ids"][:count]], one, use_tqdm=False)
        for other, entry in again.outputs[0].logprobs[0].items():
            if other in position:
                assert entry.logprob == pytest.approx(position[other].logprob, abs=1e-4)
        assert len(position) == 2 + (position[token].rank > 2)


def test_logprobs_only_when_asked_for(llm: LLM) -> None:
    params = [GREEDY, dataclasses.replace(GREEDY, logprobs=0), dataclasses.replace(GREEDY, logprobs=20)]
    none, zero, many = (o.outputs[0] for o in llm.generate([[1, 2]] * 3, params, use_tqdm=False))
    assert none.logprobs is None and none.cumulative_logprob is None
    assert [len(position) for position in zero.logprobs] == [1] * 12
    assert [len(position) for position in many.logprobs] == [20] * 12
    assert zero.cumulative_logprob == pytest.approx(many.cumulative_logprob, abs=1e-4)


def test_more_logprobs_than_ids_in_the_vocabulary(tmp_path: Path) -> None:
    with make_llm(write_model(tmp_path, vocab_size=8, eos_token_id=2)) as llm:
        (output,) = llm.generate([1], SamplingParams(max_tokens=2, logprobs=20, ignore_eos=True), use_tqdm=False)
        assert [len(position) for position in output.outputs[0].logprobs] == [8, 8]


def test_same_seed_same_answer_alone_or_in_a_crowd(llm: LLM) -> None:
    seeded = SamplingParams(seed=42, max_tokens=20, ignore_eos=True)
    alone = ids_of(llm, [8, 9], seeded)[0]
    crowd = [SamplingParams(seed=n, max_tokens=5 + n, top_k=5 * (n % 2), ignore_eos=True) for n in range(10)]
    prompts = [[8, 9]] * 5 + [[8, 9]] + [[n] for n in range(1, 6)]
    assert ids_of(llm, prompts, [*crowd[:5], seeded, *crowd[5:]])[5] == alone
    unseeded = ids_of(llm, [[8, 9]] * 3, SamplingParams(max_tokens=20, ignore_eos=True))
    assert len({tuple(ids) for ids in [alone, *unseeded]}) == 4


def test_engine_seed_decides_unseeded_draws(folder: Path) -> None:
    def draws(seed: int) -> list[list[int]]:
        with make_llm(folder, seed=seed) as llm:
            model_free = SamplingParams(temperature=1000.0, max_tokens=10, ignore_eos=True)
            return ids_of(llm, [[1], [1]], model_free)

    first = draws(1)
    assert first == draws(1) and first[0] != first[1] and first != draws(2)


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.5}], ids=str
)
def test_penalties_change_the_answer_alike_in_every_mode(llm: LLM, plain: LLM, penalty: dict[str, float]) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    longer = dataclasses.replace(GREEDY, max_tokens=40)
    penalised = dataclasses.replace(longer, **penalty)
    free, got = ids_of(llm, [prompt, prompt], [longer, penalised])
    assert got == ids_of(plain, prompt, penalised)[0] != free
    assert len(set(got)) > len(set(free))


# -- ids beyond the tokenizer


def test_ids_that_the_tokenizer_does_not_know_have_no_text(llm: LLM, scripts: Scripts) -> None:
    padding = list(range(NUM_KNOWN_IDS, VOCAB_SIZE, 9))
    for options in ({}, {"stop": "zz"}, {"skip_special_tokens": False}):
        text, pieces = streamed(llm, scripts, [65, *padding, 66], **options)
        assert text == "AB" == "".join(map(str, pieces))
    (output,) = llm.generate([VOCAB_SIZE - 1, NUM_KNOWN_IDS], GREEDY, use_tqdm=False)
    assert isinstance(output["text"], str)


# -- the prefix cache, and how long things took


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5])
def test_cached_tokens_of_a_repeated_prompt(llm: LLM, length: int) -> None:
    prompt = [200 + length] * length
    expected = (length - 1) // BLOCK * BLOCK
    first, second = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, expected)
    assert first["token_ids"] == second["token_ids"]


@pytest.mark.parametrize("answer_tokens", [2, 22, 23, 38])
def test_next_turn_finds_the_answer_of_the_last(llm: LLM, plain: LLM, answer_tokens: int) -> None:
    """Blocks that decode filled are written back; the KV of an answer's last token was never computed."""
    params = dataclasses.replace(GREEDY, max_tokens=answer_tokens)
    prompt = [answer_tokens] * 10
    (first,) = llm.generate(prompt, params, use_tqdm=False)
    settle(llm)
    turn = prompt + first["token_ids"] + [1, 2, 3]
    (second,) = llm.generate(turn, params, use_tqdm=False)
    assert second.num_cached_tokens == (10 + answer_tokens - 1) // BLOCK * BLOCK
    assert second["token_ids"] == ids_of(plain, turn, params)[0]


def test_no_cached_tokens_without_the_cache(plain: LLM) -> None:
    outputs = [plain.generate([1] * 40, GREEDY, use_tqdm=False)[0] for _ in range(2)]
    assert [output.num_cached_tokens for output in outputs] == [0, 0]


def test_metrics_are_filled_and_sensible(llm: LLM) -> None:
    for output in llm.generate([[n] * 20 for n in range(1, 12)], GREEDY, use_tqdm=False):
        metrics = output.metrics
        assert 0 <= metrics.queue < metrics.ttft < metrics.end_to_end < 60
        assert len(metrics.inter_token) == 11 and all(gap >= 0 for gap in metrics.inter_token)
        assert 0 <= metrics.end_to_end - metrics.ttft - sum(metrics.inter_token) < 1
        assert metrics.copy is None or 0 <= metrics.copy < metrics.end_to_end


def test_metrics_of_a_request_that_never_began(llm: LLM) -> None:
    request_id = llm.add_request([1], SamplingParams(max_tokens=250, ignore_eos=True))
    llm.abort(request_id)
    (output,) = [outputs[-1] for outputs in drain(llm).values()]
    metrics = output.metrics
    assert metrics.end_to_end is not None and len(metrics.inter_token) == max(0, len(output["token_ids"]) - 1)
    assert output["token_ids"] or (metrics.ttft is None and metrics.inter_token == ())
