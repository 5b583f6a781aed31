"""Load on an engine: requests arrive when they arrive, whatever the engine does.

    python bench.py --shape 8b --two-gpus --request-rate 20,30,40 --num-prompts 800

What is measured is defined in bench_metrics.py, what arrives in bench_workloads.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, NamedTuple, Protocol

from bench_metrics import Answer, engine_figures, finite, load_figures
from bench_report import Stats, identity
from bench_workloads import Conversation, Rate, Workload, arrival_times, most_tokens, next_prompt

if TYPE_CHECKING:
    from nanovllm import LLM, RequestOutput

COLLECT_EVERY_S = 0.02  # a look at what ended: seldom enough to cost the engine's threads nothing
LEAD_S = 0.05  # between drawing the load and its begin


class Submission(NamedTuple):
    """One request on its way to an engine. Sorts by its arrival, in seconds of `time.perf_counter()`."""

    arrival_s: float
    conversation: int
    turn: int
    prompt: list[int]
    num_output_tokens: int


class Target(Protocol):
    """One engine or several, as the load generator sees them. No call waits for a request."""

    about: list[Stats]  # of each engine, as `describe` returns it

    def submit(self, submission: Submission) -> None: ...
    def collect(self) -> list[Answer]: ...  # ended since the last call
    def stats(self) -> list[Stats]: ...  # of each engine, while nothing runs


class LocalEngine:
    """An `LLM` of this process as a target."""

    def __init__(self, llm: LLM) -> None:
        if not llm.config.overlap:
            raise ValueError("load needs overlap: without, nothing runs while requests arrive")
        self.about = [describe(llm)]
        self._llm = llm
        self._open: dict[str, tuple[Submission, float]] = {}

    def submit(self, submission: Submission) -> None:
        from nanovllm import SamplingParams

        late_s = time.perf_counter() - submission.arrival_s
        params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=submission.num_output_tokens)
        request_id = self._llm.add_request(submission.prompt, params, submission.arrival_s)
        self._open[request_id] = submission, late_s

    def collect(self) -> list[Answer]:
        outputs = self._llm.take_finished()
        return [make_answer(output, *self._open.pop(output.request_id)) for output in outputs]

    def stats(self) -> list[Stats]:
        return [self._llm.stats()]


def describe(llm: LLM) -> Stats:
    """What an engine is: identity, its whole configuration, and the limits that a load must keep."""
    blocks = [llm.prefill_runner.kv_cache.num_blocks, llm.decode_runner.kv_cache.num_blocks]
    limits = {"vocab_size": llm.model_config.vocab_size, "max_model_len": llm.max_model_len, "kv_blocks": blocks}
    return identity(llm) | limits | {"config": vars(llm.config)}


def make_answer(output: RequestOutput, submission: Submission, late_s: float) -> Answer:
    metrics, token_ids = output.metrics, output.outputs[0].token_ids
    if len(token_ids) != submission.num_output_tokens:
        raise RuntimeError(f"an answer has {len(token_ids)} tokens instead of {submission.num_output_tokens}")
    assert metrics.ttft is not None
    asked = submission.arrival_s, submission.conversation, submission.turn, len(submission.prompt)
    return Answer(*asked, output.num_cached_tokens, token_ids, late_s, metrics.ttft, metrics.inter_token, metrics.copy)


def warm_up_load(llm: LLM, input_len: int) -> None:
    """A few prompts at once and their first steps, of no load's tokens: what is loaded at its first use is loaded."""
    from nanovllm import SamplingParams

    rng, length = random.Random("warm-up"), min(input_len, llm.max_model_len // 2)
    prompts = [rng.choices(range(llm.model_config.vocab_size), k=length) for _ in range(8)]
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=min(16, llm.max_model_len // 2))
    llm.generate(prompts, params, use_tqdm=False)
    time.sleep(0.1)  # a step launched ahead of the end may still run


# -- the run


@dataclass(frozen=True)
class Load:
    """A workload, how its requests arrive, and which of them count as good (bounds in ms by metric)."""

    workload: Workload
    burstiness: float = 1.0
    seed: int = 0
    goodput: Mapping[str, float] = field(default_factory=dict)

    def draw(self, rate: Rate, requests_per_s: float, vocab_size: int) -> tuple[list[Conversation], list[float]]:
        """The conversations, and the seconds from the begin at which each opens.

        The same for every engine. Another rate has other prompts, which no prefix cache knows yet, and the same
        arrivals, stretched. Of a chat the rate is that of all its turns: conversations open `turns` times slower.
        """
        workload = self.workload
        conversations = workload.draw(vocab_size, random.Random(f"{self.seed} prompts {rate.label}"))
        arrivals = random.Random(f"{self.seed} arrivals")
        pace = requests_per_s / workload.turns
        return conversations, arrival_times(len(conversations), pace, self.burstiness, arrivals)


def measure(target: Target, load: Load, rate: Rate, requests_per_s: float) -> Stats:
    """Run one load to its end; its figures. `ValueError` if a request cannot fit."""
    limit = min(about["max_model_len"] for about in target.about)
    conversations, offsets_s = load.draw(rate, requests_per_s, target.about[0]["vocab_size"])
    if (longest := most_tokens(conversations)) > limit:
        raise ValueError(f"the longest request has {longest} tokens, prompt and answer, beyond max_model_len={limit}")
    before = target.stats()
    begin_s, answers = drive(target, conversations, offsets_s, load.workload.think_s)
    after = target.stats()
    figures = load_figures(answers, begin_s, load.goodput)
    pairs = zip(before, after, strict=True)
    engines = [engine_figures(old, new, figures["seconds"]) for old, new in pairs]
    return {"rate": rate.label, "requested_per_s": finite(requests_per_s)} | figures | {"engines": engines}


def drive(
    target: Target, conversations: Sequence[Conversation], offsets_s: Sequence[float], think_s: float
) -> tuple[float, list[Answer]]:
    """Submit every turn at its time, an open loop; when it began, and the answers in the order in which they ended.

    One thread does all of it, asleep in between. Only a later turn of a chat waits, for the answer that it continues.
    """
    begin_s = collect_s = time.perf_counter() + LEAD_S
    due = [
        Submission(begin_s + offset_s, index, 0, turns[0].new_tokens, turns[0].num_output_tokens)
        for index, (turns, offset_s) in enumerate(zip(conversations, offsets_s, strict=True))
    ]
    heapify(due)
    prompts = [turns[0].new_tokens for turns in conversations]
    answers: list[Answer] = []
    num_turns = sum(map(len, conversations))
    while len(answers) < num_turns:
        time.sleep(max(0.0, min([collect_s, *(s.arrival_s for s in due[:1])]) - time.perf_counter()))
        if due and due[0].arrival_s <= time.perf_counter():
            target.submit(heappop(due))
        if time.perf_counter() >= collect_s:
            ended = target.collect()
            for submission in follow_ups(ended, conversations, prompts, think_s):
                heappush(due, submission)
            answers += ended
            collect_s = time.perf_counter() + COLLECT_EVERY_S
    return begin_s, answers


def follow_ups(
    answers: Sequence[Answer], conversations: Sequence[Conversation], prompts: list[list[int]], think_s: float
) -> list[Submission]:
    """The next turns of conversations that got an answer. `prompts`: the last one of each; brought up to date."""
    submissions = []
    for answer in answers:
        index, turn = answer.conversation, answer.turn + 1
        if turn < len(conversations[index]):
            next_turn = conversations[index][turn]
            prompts[index] = next_prompt(prompts[index], answer.token_ids, next_turn)
            arrival_s = answer.arrival_s + answer.e2e_s + think_s
            submissions.append(Submission(arrival_s, index, turn, prompts[index], next_turn.num_output_tokens))
    return submissions
