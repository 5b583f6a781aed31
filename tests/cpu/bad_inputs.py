"""Mistakes of callers, and what must be said of each, in one table. `python -O -m tests.cpu.bad_inputs` tries them all.

Prompts, parameters and calls are here; values of `SamplingParams`, of the configuration and of bench.py's flags are
collected from the tables of their own tests.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import bench
import bench_metrics
import bench_steps
from bench_load import Rate
from nanovllm import LLM, SamplingParams
from nanovllm.sampling_params import UNSUPPORTED_PARAMETERS
from tests.cpu import test_bench_load, test_config, test_sampling_params
from tests.cpu.tiny import make_llm, settle, write_model

P = SamplingParams
Call = Callable[[LLM], Any]
LONGEST_MESSAGE = 1200  # characters: it may list all keywords
# Pools of 10 and 12 blocks of 16 tokens: 160 tokens fit the smaller; max_model_len is 256, or 100 where named.
BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "the prompt is empty: it has 0 tokens, at least 1 is needed"),
    ([], "the prompt is empty"),
    ((), "the prompt is empty"),
    (np.array([], dtype=np.int64), "the prompt is empty"),
    ([1.0], "token id 1.0 is not an integer"),
    ([1, 2.5], "token id 2.5 is not an integer"),
    ([1, None], "token id None is not an integer"),
    ([1, "a"], "token id 'a' is not an integer"),
    ([True], "token id True is not an integer"),
    ([np.float32(3)], "is not an integer"),
    (np.array([1.5]), "1.5) is not an integer"),
    (torch.tensor([0.5]), "is not an integer"),
    ([math.nan], "token id nan is not an integer"),
    ([-1], "token id -1 is outside the vocabulary of 320 ids (0 … 319)"),
    ([5, 320], "token id 320 is outside the vocabulary of 320 ids (0 … 319)"),
    ([10**30], f"token id {10**30} is outside the vocabulary of 320 ids"),
    (None, "a prompt must be a string or a list of token ids, got None"),
    (7, "a prompt must be a string or a list of token ids, got 7"),
    (1.5, "a prompt must be a string or a list of token ids, got 1.5"),
    (b"bytes", "a prompt must be a string or a list of token ids, got b'bytes'"),
    ({"prompt": "x"}, "a prompt must be a string or a list of token ids, got {'prompt': 'x'}"),
    (np.array(5), "a prompt must be a string or a list of token ids, got array(5)"),
    (torch.tensor(5), "a prompt must be a string or a list of token ids, got tensor(5)"),
    ("a\ud800", "the prompt is not valid Unicode"),
    ([1] * 256, "the prompt has 256 tokens; max_model_len=256 leaves none to generate"),
    ([1] * 10_000, "the prompt has 10000 tokens; max_model_len=256"),
    ("a" * 300, "the prompt has 300 tokens; max_model_len=256"),
    ([1] * 160, "the prompt has 160 tokens; the smaller KV pool holds 160"),
]
BAD_PARAMS: list[tuple[Any, Any, str]] = [
    ([1] * 100, P(max_tokens=157), "prompt of 100 tokens + max_tokens=157 = 257 is beyond max_model_len=256"),
    ([1] * 100, P(max_tokens=61), "prompt of 100 tokens + max_tokens=61 = 161 is beyond the smaller KV pool of 160"),
    ([1], P(max_tokens=2**31 - 1), "max_tokens=2147483647 = 2147483648 is beyond max_model_len=256"),
    ([1] * 100, P(max_tokens=None, min_tokens=61), "min_tokens=61 is more than the 60 that fit after this prompt"),
    ([1], P(stop_token_ids=[5, 320]), "stop_token_ids: 320 is outside the vocabulary of 320 ids"),
    ([1] * 96, P(n=7), "n=7 answers to a prompt of 96 tokens need 13 blocks at once; the smaller pool has 10"),
    ([1], {"temperature": 0}, "sampling_params must be a SamplingParams or a list of them, got {'temperature': 0}"),
    ([1], 0.7, "sampling_params must be a SamplingParams or a list of them, got 0.7"),
    ([1], "greedy", "sampling_params must be a SamplingParams or a list of them, got 'greedy'"),
    ([1], [P(), 5], "sampling_params must be a SamplingParams or a list of them"),
    ([1], [], "0 sampling params for 1 prompts"),
    ([1], [P(), P()], "2 sampling params for 1 prompts"),
]


class NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("it has none")


USER = {"role": "user", "content": "hi"}
BAD_CALLS: list[tuple[str, Call, str]] = [
    ("params-too-few", lambda llm: llm.generate(["a", "b"], [P()]), "1 sampling params for 2 prompts"),
    ("params-too-many", lambda llm: llm.generate(["a"], [P()] * 3), "3 sampling params for 1 prompts"),
    ("second-of-two", lambda llm: llm.generate([[1], [320]]), "token id 320"),
    ("params-of-second", lambda llm: llm.generate([[1], [2]], [P(), P(max_tokens=256)]), "max_tokens=256 = 257"),
    ("nested-too-deep", lambda llm: llm.generate([[[1]]]), "token id [1] is not an integer"),
    ("empty-among-others", lambda llm: llm.generate([[1], []]), "the prompt is empty"),
    ("mixed", lambda llm: llm.generate([[1], 5]), "token id [1] is not an integer"),
    ("list-to-stream", lambda llm: llm.stream(["a", "b"]), "token id 'a' is not an integer"),
    ("list-to-add", lambda llm: llm.add_request([[1], [2]]), "token id [1] is not an integer"),
    ("abort-int", lambda llm: llm.abort(7), "request_id must be a string, as add_request returns it, got 7"),
    ("abort-none", lambda llm: llm.abort(None), "request_id must be a string"),
    ("abort-list", lambda llm: llm.abort(["0"]), "request_id must be a string"),
    ("chat-text", lambda llm: llm.chat("hi"), "a conversation must be a list of messages with role and content"),
    ("chat-none", lambda llm: llm.chat(None), "a conversation must be a list of messages"),
    ("chat-int", lambda llm: llm.chat(5), "a conversation must be a list of messages with role and content, got 5"),
    ("chat-one-message", lambda llm: llm.chat(USER), "a conversation must be a list of messages"),
    ("chat-empty", lambda llm: llm.chat([]), "a conversation must be a list of messages"),
    ("chat-empty-inside", lambda llm: llm.chat([[USER], []]), "a conversation must be a list of messages"),
    ("chat-strings", lambda llm: llm.chat(["hi"]), "a conversation must be a list of messages"),
    ("chat-mixed", lambda llm: llm.chat([[USER], USER]), "a conversation must be a list of messages"),
    ("chat-kwargs", lambda llm: llm.chat([USER], chat_template_kwargs=5), "chat_template_kwargs must be a mapping"),
    ("chat-template-fails", lambda llm: llm.chat([USER], chat_template_kwargs={"tools": 5}), "chat template failed on"),
    ("chat-params", lambda llm: llm.chat([USER], [P()] * 2), "2 sampling params for 1 prompts"),
    ("chat-surrogate", lambda llm: llm.chat([{**USER, "content": "\ud800"}]), "the prompt is not valid Unicode"),
    ("chat-long-text", lambda llm: llm.chat("x" * 10**6), "… (1000002 characters)"),
    ("chat-long-kwargs", lambda llm: llm.chat([USER], chat_template_kwargs=["x"] * 10**5), "… (500000 characters)"),
    (
        "chat-keyword",
        lambda llm: llm.chat([USER], chat_template_kwargs={5: 5}),
        "with {5: 5}: keywords must be strings",
    ),
    (
        "chat-template-divides",
        lambda llm: llm.chat([USER], chat_template_kwargs={"chat_template": "{{ 1 / 0 }}"}),
        "division by zero",
    ),
    ("bytes-at-length", lambda llm: llm.generate(b"x" * 10**6), "got b'xxx"),
    ("dict-at-length", lambda llm: llm.generate({"a": "x" * 10**6}), "… (1000009 characters)"),
    ("nested-at-length", lambda llm: llm.generate([[[1] * 100_000]]), "… (300000 characters) is not an integer"),
    (
        "digits",
        lambda llm: llm.generate([10**5000]),
        "token id <int of 16610 bits> is outside the vocabulary of 320 ids",
    ),
    ("digits-n", lambda llm: P(n=10**5000), "n must be in [1, 64], got <int of 16610 bits>"),
    ("digits-length", lambda llm: start(llm.config.model, max_model_len=10**5000), "max_model_len=<int of 16610 bits>"),
    ("no-repr", lambda llm: llm.generate([NoRepr()]), "token id <NoRepr> is not an integer"),
    ("no-repr-params", lambda llm: llm.generate([1], NoRepr()), "a SamplingParams or a list of them, got <NoRepr>"),
    ("no-repr-value", lambda llm: P(stop=NoRepr()), "stop must be a list or a tuple, got <NoRepr>"),
    ("no-repr-switch", lambda llm: start(llm.config.model, overlap=NoRepr()), "overlap=<NoRepr> must be True or False"),
    ("abort-at-length", lambda llm: llm.abort(["x"] * 10**5), "… (500000 characters)"),
    ("arrival-text", lambda llm: llm.add_request([1], None, "now"), "arrived_s='now' must be seconds"),
    ("arrival-bool", lambda llm: llm.add_request([1], None, True), "arrived_s=True must be seconds"),
    ("arrival-nan", lambda llm: llm.add_request([1], None, math.nan), "arrived_s=nan must be seconds"),
    ("arrival-later", lambda llm: llm.add_request([1], None, 1e18), "arrived_s=1e+18 must be seconds"),
    ("arrival-never", lambda llm: llm.add_request([1], None, -math.inf), "nor more than 1000000000 before it"),
    ("arrival-no-float", lambda llm: llm.add_request([1], None, -(10**400)), "nor more than 1000000000 before it"),
    ("port-negative", lambda llm: llm.start_metrics_server(-1), "port=-1 must be an integer from 0"),
    (
        "port-large",
        lambda llm: llm.start_metrics_server(65536),
        "port=65536 must be an integer from 0 (any free one) to",
    ),
    ("port-text", lambda llm: llm.start_metrics_server("80"), "port='80' must be an integer"),
    ("host-none", lambda llm: llm.start_metrics_server(0, None), "host=None must be an address"),
    (
        "host-surrogate",
        lambda llm: llm.start_metrics_server(0, "\ud800"),
        "no metrics server at host='\\ud800', port=0",
    ),
    ("trace-number", lambda llm: llm.trace(1).__enter__(), "path must be a string or a PathLike, got 1"),
    (
        "trace-nowhere",
        lambda llm: llm.trace("/no/such/a.json").__enter__(),
        "cannot write a trace to '/no/such/a.json'",
    ),
    ("trace-null", lambda llm: llm.trace("a\0b").__enter__(), "cannot write a trace to 'a\\x00b'"),
    ("trace-at-length", lambda llm: llm.trace("x" * 10_000).__enter__(), "… (10002 characters)"),
    (
        "pool-without-memory",
        lambda llm: start(llm.config.model, num_kvcache_blocks=1 << 31, kvcache_block_size=256),  # no address space
        "num_kvcache_blocks=2147483648: 2147483648 blocks of 65536 bytes do not fit on card 0 (cpu)",
    ),
    ("slo-no-float", lambda llm: start(llm.config.model, itl_slo_ms=10**400), "at most 1000000000"),
    (
        "slo-nan",
        lambda llm: start(llm.config.model, itl_slo_ms=math.nan),
        "itl_slo_ms=nan must be None or milliseconds",
    ),
    ("slo-text", lambda llm: start(llm.config.model, itl_slo_ms="5"), "itl_slo_ms='5' must be None or milliseconds"),
    ("keyword-at-length", lambda llm: start(llm.config.model, **{"x" * 10**5: 1}), "… (100000 characters); known: "),
    ("one-device-twice", lambda llm: start(llm.config.model, decode_device_id=0), "two different devices"),
    (
        "revision",
        lambda llm: start(llm.config.model, revision="main"),
        "revision='main' has no meaning for the local folder",
    ),
    ("chat-length", lambda llm: llm.chat([{**USER, "content": "a" * 400}]), "max_model_len=256"),
]
ENTRIES: list[tuple[str, Callable[..., Any]]] = [
    ("generate", lambda llm, prompt, params=None: llm.generate(prompt, params)),
    ("stream", lambda llm, prompt, params=None: llm.stream(prompt, params)),
    ("add_request", lambda llm, prompt, params=None: llm.add_request(prompt, params)),
]


class Case(NamedTuple):
    """`call` must raise, and say `said`."""

    name: str
    call: Call
    said: str


def start(folder: str | Path, **changes: Any) -> LLM:
    """An engine with the pools that the tables tell of."""
    return make_llm(Path(folder), **({"enable_two_gpu_pd": True, "num_kvcache_blocks": (10, 12)} | changes))


def cases() -> Iterator[Case]:
    """All tables as one."""
    for entry, ask in ENTRIES:
        for number, (prompt, said) in enumerate(BAD_PROMPTS):
            yield Case(f"{entry}, prompt {number}: {said}", lambda llm, ask=ask, prompt=prompt: ask(llm, prompt), said)
        for number, (prompt, params, said) in enumerate(BAD_PARAMS):
            yield Case(
                f"{entry}, params {number}: {said}", lambda llm, ask=ask, p=prompt, q=params: ask(llm, p, q), said
            )
    for name, call, said in BAD_CALLS:
        yield Case(name, call, said)
    for number, (keywords, said) in enumerate(test_config.BAD):
        yield Case(f"keywords {number}: {said}", lambda llm, k=keywords: LLM("/no/such/folder", **k), said)
    for number, (values, said) in enumerate(test_sampling_params.BAD):
        yield Case(f"values {number}: {said}", lambda llm, values=values: P(**values), said)
    for name in sorted(UNSUPPORTED_PARAMETERS):
        yield Case(name, lambda llm, name=name: P(**{name: 1}), f"{name} is not supported")
    yield from flags()


def flags() -> Iterator[Case]:
    """Of bench.py, as far as they are refused before a model is loaded."""
    for number, (arguments, said) in enumerate(test_bench_load.MISTAKES):
        if said not in test_bench_load.NEED_A_MODEL:
            yield Case(
                f"flags {number}: {said}", lambda llm, a=arguments: bench.main([*test_bench_load.SMALL, *a]), said
            )
    yield Case("rate", lambda llm: Rate.parse("infx"), "request rate")
    yield Case("case", lambda llm: bench_steps.Case.parse("8x"), "BATCHxTOKENS")
    yield Case("bound", lambda llm: bench_metrics.parse_bound("itl:5"), "ttft:MS")


CASES = list(cases())


def complaint(case: Case, llm: LLM) -> str | None:
    """What is wrong with how a mistake is refused; None: nothing."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            case.call(llm)
    except (ValueError, FileNotFoundError) as error:
        told.write(str(error))
    except SystemExit as ended:
        if ended.code != 2:
            return f"{case.name}: ends with {ended.code}"
    except BaseException as error:
        return f"{case.name}: {type(error).__name__}: {error}"
    else:
        return f"{case.name}: accepted"
    if len(told.getvalue()) >= LONGEST_MESSAGE:
        return f"{case.name}: {len(told.getvalue())} characters"
    return None if case.said in told.getvalue() else f"{case.name}: {told.getvalue()!r} does not say {case.said!r}"


def still_serves(llm: LLM) -> bool:
    """Nothing of what was refused was begun, and the next prompts are answered."""
    begun = llm.stats()["prompt_tokens"]
    outputs = llm.generate([[1, 2]] * 3, P(max_tokens=20, ignore_eos=True), use_tqdm=False)
    settle(llm)
    return begun == 0 and [len(output["token_ids"]) for output in outputs] == [20, 20, 20]


def main() -> None:
    """All of them; ends with a failure that names each that was not refused as it must be."""
    if __debug__:
        sys.exit("run this with -O: that is what it is for")
    with tempfile.TemporaryDirectory() as folder, start(write_model(Path(folder))) as llm:
        wrong = [found for case in CASES if (found := complaint(case, llm))]
        if not still_serves(llm):
            wrong.append("afterwards: the engine does not serve as before")
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{len(CASES)} refused")


if __name__ == "__main__":
    main()
