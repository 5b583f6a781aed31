"""Captured decode steps at their edges, against the same engine without graphs, in float32 with the demo checkpoint.

A batch's shape may turn the last bits of a product, so tokens may differ where two are nearly tied, and there alone:
log-probabilities must agree up to the first such place, and a row that has one must pass by regret.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.engine.decode_graphs import bucket_sizes
from nanovllm.engine.shards import DecodeShard
from nanovllm.outputs import RequestOutput
from tests.counters import graph_calls
from tests.random_work import check_nothing_left
from tests.regret import FLOAT32, Reference, Regrets, release_gpu_memory

VOCAB_SIZE = 4096
LOGPROB_BOUND = 1e-3
OPTIONS: dict[str, Any] = dict(
    device="cuda",
    dtype="float32",
    kvcache_block_size=64,
    num_kvcache_blocks=1100,
    enable_prefix_caching=False,  # every batch is computed anew, into whatever blocks others have left
)
# max_num_seqs, max_model_len (four whole blocks; four and a part), overlap. Without overlap, all rows start together.
ENGINES = [(13, 256, True), (37, 300, False), (141, 300, False)]


class Ask(NamedTuple):
    """A prompt, and how many tokens to answer with."""

    prompt: tuple[int, ...]
    max_tokens: int

    @classmethod
    def random(cls, rng: random.Random, prompt_tokens: int, max_tokens: int) -> Ask:
        return cls(tuple(rng.randrange(VOCAB_SIZE) for _ in range(prompt_tokens)), max_tokens)


class Answer(NamedTuple):
    """Greedy tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]

    @classmethod
    def of(cls, output: RequestOutput) -> Answer:
        tokens, entries = output.outputs[0].token_ids, output.outputs[0].logprobs
        assert entries is not None
        return cls(tokens, [entry[token].logprob for token, entry in zip(tokens, entries, strict=True)])


def generate(llm: LLM, asks: list[Ask]) -> list[Answer]:
    params = [SamplingParams(temperature=0, max_tokens=ask.max_tokens, ignore_eos=True, logprobs=1) for ask in asks]
    outputs = llm.generate([list(ask.prompt) for ask in asks], params, use_tqdm=False)
    return [Answer.of(output) for output in outputs]


class Oracle:
    """The eager engine's answers, each checked by regret when it is first asked for."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.reference = llm, Reference(llm)
        self._known: dict[Ask, Answer] = {}

    def answers(self, asks: list[Ask]) -> list[Answer]:
        if fresh := [ask for ask in dict.fromkeys(asks) if ask not in self._known]:
            with graph_calls("replay") as replays:
                answers = generate(self.llm, fresh)
            assert not replays
            self.check_by_regret(fresh, answers)
            self._known.update(zip(fresh, answers, strict=True))
        return [self._known[ask] for ask in asks]

    def check_by_regret(self, asks: list[Ask], answers: list[Answer]) -> None:
        rows = [self.reference.regret(ask.prompt, answer.tokens) for ask, answer in zip(asks, answers, strict=True)]
        Regrets(rows, [len(ask.prompt) for ask in asks]).check(FLOAT32)

    def check(self, asks: list[Ask], answers: list[Answer]) -> None:
        expected = self.answers(asks)
        for ask, got, want in zip(asks, answers, expected, strict=True):
            same = common_tokens(got, want)
            error = (torch.tensor(got.logprobs[:same]) - torch.tensor(want.logprobs[:same])).abs()
            assert (error <= LOGPROB_BOUND).all(), (
                f"prompt of {len(ask.prompt)}, a batch of {len(asks)}: log-probabilities are off by {error.tolist()}"
            )
        unlike = [i for i, want in enumerate(expected) if answers[i].tokens != want.tokens]
        if unlike:
            self.check_by_regret([asks[i] for i in unlike], [answers[i] for i in unlike])


def common_tokens(a: Answer, b: Answer) -> int:
    """How many leading tokens are the same."""
    assert len(a.tokens) == len(b.tokens)
    return next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    # No overlap, so that no thread of it is there while others capture.
    with LLM(DEMO_MODEL, enforce_eager=True, overlap=False, max_num_seqs=141, max_model_len=300, **OPTIONS) as llm:
        yield Oracle(llm)
    release_gpu_memory()


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: "-".join(map(str, engine)))
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    max_num_seqs, max_model_len, overlap = request.param
    sizes = dict(max_num_seqs=max_num_seqs, max_model_len=max_model_len, overlap=overlap)
    with LLM(DEMO_MODEL, **sizes, **OPTIONS) as engine:
        assert engine.max_model_len == max_model_len
        yield engine
        check_nothing_left(engine)
    release_gpu_memory()


@contextmanager
def decode_batches(llm: LLM) -> Iterator[set[int]]:
    """The batch sizes that decode steps have within the block."""
    runner, sizes = llm.decode_runner, set[int]()
    run = runner.run_decode_core

    def note(shard: DecodeShard) -> Any:
        sizes.add(len(shard.slots))
        return run(shard)

    runner.run_decode_core = note  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        runner.run_decode_core = run  # type: ignore[method-assign]


def replayed(llm: LLM, asks: list[Ask]) -> list[Answer]:
    """Answers of an engine that must have used its graphs, and whose largest batch was that of all rows together."""
    with graph_calls("replay") as replays, decode_batches(llm) as sizes:
        answers = generate(llm, asks)
    # With overlap, how many run at once depends on when each arrived.
    assert llm.config.overlap or max(sizes, default=0) == min(len(asks), llm.config.max_num_seqs), sizes
    assert len(replays) >= 2 * (max(ask.max_tokens for ask in asks) - 1), "a step replays the model and the sampler"
    return answers


def edge_sizes(max_num_seqs: int) -> list[int]:
    """Buckets, small, in the middle and the largest, and one row more and one less."""
    buckets = bucket_sizes(max_num_seqs)
    assert buckets[-1] == max_num_seqs
    chosen = {*buckets[:4], buckets[len(buckets) // 2], *buckets[-3:]}
    sizes = {size + more for size in chosen for more in (-1, 0, 1)}
    return sorted(size for size in sizes if 1 <= size <= max_num_seqs)


def test_every_batch_size_at_the_edges_of_buckets(llm: LLM, oracle: Oracle) -> None:
    """In random order, so that larger batches come before smaller ones; and one with more rows than slots."""
    rng = random.Random(7)
    pool = [Ask.random(rng, rng.choice([1, 2, 63, 64, 65, rng.randrange(3, 130)]), 10) for _ in range(144)]
    sizes = edge_sizes(llm.config.max_num_seqs)
    rng.shuffle(sizes)
    for size in [*sizes, llm.config.max_num_seqs + 3, 1]:
        asks = rng.sample(pool, size)
        oracle.check(asks, replayed(llm, asks))


def test_an_answer_may_end_exactly_at_max_model_len(llm: LLM, oracle: Oracle) -> None:
    rng, longest = random.Random(8), llm.max_model_len
    asks = [Ask.random(rng, longest - count, count) for count in (2, 3, 17, 43, 44, 45, 64, 65)]
    oracle.check(asks, replayed(llm, asks))
    for ask in (asks[0], asks[-1]):
        oracle.check([ask], replayed(llm, [ask]))


def test_nothing_is_left_of_the_batch_before(llm: LLM, oracle: Oracle) -> None:
    """All slots hold long contexts, then short ones, then long ones again: no column or length may stay behind."""
    rng, rows, longest = random.Random(9), llm.config.max_num_seqs, llm.max_model_len
    long = [Ask.random(rng, longest - 14 - i % 50, 14) for i in range(rows)]
    short = [Ask.random(rng, 1 + i % 5, 14) for i in range(rows)]
    for asks in (long, short, long[::-1], short[: rows // 2] + long[rows // 2 :], short[::-1], long):
        oracle.check(asks, replayed(llm, asks))


# -- what a step asks of the driver


WORK = re.compile("Launch|Memcpy|Memset|Alloc|Free|StreamSynchronize|EventSynchronize")  # profiles end with a wait, too
KINDS = {
    "plain": SamplingParams(temperature=0.6, max_tokens=6, ignore_eos=True),
    "filtered": SamplingParams(temperature=0.6, top_k=5, top_p=0.9, max_tokens=6, ignore_eos=True),
    "penalised": SamplingParams(temperature=0.6, repetition_penalty=1.2, max_tokens=6, ignore_eos=True),
}


def driver_calls(profiler: profile) -> Counter[str]:
    """Calls of CUDA's runtime and driver by name, without the versions that some names end with."""
    names = [event.name for event in profiler.events() or () if re.match("cu(da)?[A-Z]", event.name)]
    return Counter(re.sub(r"(_v\d+|_ptsz)+$", "", name) for name in names)


@contextmanager
def profiled_steps(llm: LLM) -> Iterator[dict[str, Counter[str]]]:
    """What `run_decode_core` asks of CUDA until it returns: in the first step that sequences enter ("entering"), and in
    the first one behind it that has the rows of the step before and gets no block ("steady")."""
    runner, found, before = llm.decode_runner, dict[str, Counter[str]](), tuple[int, ...]()
    run = runner.run_decode_core

    def note(shard: DecodeShard) -> Any:
        nonlocal before
        steady, before = shard.slots == before and not shard.new_blocks, shard.slots
        name = "entering" if shard.entries else "steady" if steady else "other"
        if name == "other" or name in found:
            return run(shard)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            handle = run(shard)
        found[name] = driver_calls(profiler)
        return handle

    runner.run_decode_core = note  # type: ignore[method-assign]
    try:
        yield found
    finally:
        runner.run_decode_core = run  # type: ignore[method-assign]


def test_a_steady_step_is_two_graphs_and_the_copy_of_its_ids() -> None:
    """The model, the sampler, one copy of the sampled ids to pinned memory, an event on either side; no kernel that is
    launched by itself, no memory, no wait."""
    with LLM(DEMO_MODEL, max_num_seqs=4, max_model_len=256, overlap=False, **OPTIONS) as llm:
        for kind, params in KINDS.items():
            with profiled_steps(llm) as found:
                llm.generate([[1, 2, 3, 4 + i] for i in range(3)], params, use_tqdm=False)
            print(kind, {name: dict(calls) for name, calls in found.items()})
            assert any("LaunchKernel" in name for name in found["entering"]), (
                "a profiler that shows no launch proves nothing"
            )
            work = {name: count for name, count in found["steady"].items() if WORK.search(name)}
            assert work == {"cudaGraphLaunch": 2, "cudaMemcpyAsync": 1}, f"{kind}: {found['steady']}"
            events = sum(count for name, count in found["steady"].items() if name.startswith("cudaEventRecord"))
            assert events in (0, 2), f"{kind}: {found['steady']}"  # 0: a profiler that leaves them out
        check_nothing_left(llm)
    release_gpu_memory()
