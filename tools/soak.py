"""Random requests and random faults for as long as one likes; ends with exact accounting.

    python -m tools.soak --requests 10000                      # on CPU cards, tokens compared with a fault-free run
    python -m tools.soak --two-gpus --minutes 2                # the same on two GPUs
    python -m tools.soak --shape 0.6b --two-gpus --minutes 9   # on two GPUs, random weights

Requests share prefixes, have stop strings, siblings and seeds; some are aborted from another thread, some are mistakes
of callers, some have a tokenizer that raises. Of the copies between cards `--faults` fail, come late, or, on CPU cards,
arrive damaged; a few never succeed. Engines follow each other: the second of every four loses a card in the middle of
its work, and the last one its context. After each of them every request is accounted for and every block of every card
is free, or the soak fails. The demo model's answers, in float32, equal those of a run without faults. Of a shape in
bfloat16, where a batch of another size may round otherwise, the share that does is told, and every greedy answer is
checked by regret (tests/regret.py). Roles are strict and elastic in turn.

`--minutes` is the limit of everything from the start of the tool: the run without faults, lives, and regrets, which are
computed after each life. Then the figures so far are printed, one JSON object in a line; so the last line has them all,
and a run that is cut off loses its last life only.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import SHAPES, write_shape
from nanovllm import DEMO_MODEL, LLM, EngineDeadError, SamplingParams
from nanovllm.engine.detokenizer import StopWatcher
from nanovllm.layers import sampler
from nanovllm.outputs import RequestOutput
from tests.faults import ILLEGAL_ACCESS, STEPS, FaultInjector, copies_across
from tests.regret import BFLOAT16, Reference, Regrets
from tools.timetable import Timetable

Answer = list[tuple[list[int], str | None]]

KINDS = 400  # distinct requests, each asked often: the prefix cache has something to find
OUTSTANDING = 48
LIFE_REQUESTS, LIVES_IN_MINUTES = 500, 4
BAD_STOP = "\0no such text"  # looking for it makes the tokenizer raise
LATE_S = 0.005
MISTAKES: list[tuple[Any, Any]] = [([], None), ([-1], None), ([1] * 10**5, None), ([1], {"n": 0}), ("x", {"top_p": 2})]
DEMO_OPTIONS = {"max_model_len": 512, "kvcache_block_size": 16, "num_kvcache_blocks": (24, 28), "max_num_seqs": 8}
DEMO_OPTIONS["max_num_batched_tokens"] = 128
SHAPE_OPTIONS = {"max_model_len": 2048, "num_kvcache_blocks": (160, 200), "max_num_seqs": 64}


class Kind(NamedTuple):
    """A request that may be asked again."""

    prompt: list[int]
    params: SamplingParams


def make_kinds(rng: random.Random, count: int, vocab_size: int, longest: int, with_text: bool) -> list[Kind]:
    """Prompts from a few stems; all have a seed, so that sampled answers can be compared as well."""
    stems = [[rng.randrange(3, vocab_size) for _ in range(longest)] for _ in range(6)]
    prompts = [
        rng.choice(stems)[: rng.randrange(longest)]
        + [rng.randrange(3, vocab_size) for _ in range(rng.randrange(1, 20))]
        for _ in range(KINDS)
    ]
    return [Kind(prompt, make_params(rng, number, with_text)) for number, prompt in enumerate(prompts)]


def make_params(rng: random.Random, number: int, with_text: bool) -> SamplingParams:
    stops: list[Any] = [None, None, None, ["\n\n"], ["e"], ["self", ")"]]
    stop = BAD_STOP if rng.random() < 0.02 else rng.choice(stops)
    temperature = rng.choice([0.0, 0.0, 0.8])
    return SamplingParams(
        temperature=temperature,
        n=rng.choice([1, 1, 2]) if temperature else 1,
        seed=number,
        max_tokens=rng.choice([1, 4, 16, 48]),
        stop=stop if with_text else None,
        top_p=rng.choice([1.0, 1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        ignore_eos=rng.random() < 0.5,
    )


class Faults:
    """What goes wrong in one engine's life. Called in the threads that launch."""

    def __init__(self, llm: LLM, rng: random.Random, share: float, ending: str | None) -> None:
        self._llm, self._rng, self._share, self._ending = llm, rng, share, ending
        self.counts: Counter[str] = Counter()
        self.due = threading.Event()  # the card or the context may go
        injector = FaultInjector(llm)
        injector.before, injector.after = self._before, self._after

    def _before(self, entry: str, shard: Any) -> None:
        if entry in STEPS and self._ending is not None and self.due.is_set():
            self._end()
        if not copies_across(entry, shard):
            return
        # A tenth of those that fail never succeed, however often they are tried.
        for_ever = hashlib.blake2b(str(shard.copy).encode()).digest()[0] < 25.6 * self._share
        if for_ever or self._rng.random() < self._share:
            self.counts["copy failed"] += 1
            raise RuntimeError("soak: no link")
        if self._rng.random() < self._share:
            self.counts["copy late"] += 1
            time.sleep(LATE_S)

    def _end(self) -> None:
        ending, self._ending = self._ending, None
        self.counts[f"{ending} lost"] += 1
        raise RuntimeError(ILLEGAL_ACCESS if ending == "context" else "soak: a bug")

    def _after(self, entry: str, shard: Any, handle: Any) -> None:
        runners = self._llm.prefill_runner, self._llm.decode_runner
        if copies_across(entry, shard) and runners[0].device.type == "cpu" and self._rng.random() < self._share:
            self.counts["copy damaged"] += 1
            _, block = self._rng.choice(shard.block_pairs)
            runners[shard.dst].kv_cache.blocks[block][-1, 1, 0] += 1.0


class Life:
    """One engine, its requests, and what became of each."""

    def __init__(self, llm: LLM, kinds: list[Kind], rng: random.Random, faults: Faults, failing: float) -> None:
        self._llm, self._kinds, self._rng, self._faults = llm, kinds, rng, faults
        self._failing = failing
        self._asked: dict[str, int] = {}  # outstanding: which kind
        self.ended: Counter[str] = Counter()
        self.num_asked = 0
        self.asked_s = 0.0  # when it last asked
        self.answers: list[tuple[int, Answer]] = []

    def run(self, num_requests: int, until_s: float) -> None:
        """Ask and collect until so many were asked, or the time is over; then wait for the rest."""
        stop = threading.Event()
        aborter = threading.Thread(target=self._abort_some, args=(stop,), daemon=True)
        aborter.start()
        begun_s = self.asked_s = time.monotonic()
        try:
            while self.num_asked < num_requests and time.monotonic() < until_s:
                self._ask()
                half = self.num_asked > num_requests // 2 or time.monotonic() > (begun_s + until_s) / 2
                if half:
                    self._faults.due.set()
                while len(self._asked) >= OUTSTANDING:
                    self._collect()
                self.asked_s = time.monotonic()
            while self._asked:
                self._collect()
        except EngineDeadError:
            self.ended["engine dead"] += len(self._asked)
            self._asked.clear()
        finally:
            stop.set()
            aborter.join()

    def _ask(self) -> None:
        if self._rng.random() < self._failing:
            self._ask_wrongly()
        if self._rng.random() < self._failing:
            self._walk_away()
        number = self._rng.randrange(len(self._kinds))
        self.num_asked += 1
        kind = self._kinds[number]
        try:
            self._asked[self._llm.add_request(kind.prompt, kind.params)] = number
        except EngineDeadError:
            self.ended["engine dead"] += 1
            raise

    def _ask_wrongly(self) -> None:
        prompt, changes = self._rng.choice(MISTAKES)
        try:
            self._llm.add_request(prompt, SamplingParams(**changes) if changes else None)
        except ValueError:
            self._faults.counts["mistake refused"] += 1
        else:
            raise AssertionError(f"{prompt!r:.50} with {changes} was let in")

    def _walk_away(self) -> None:
        """A consumer that raises in the middle of a stream."""
        stream = self._llm.stream(self._rng.choice(self._kinds).prompt, SamplingParams(max_tokens=40, ignore_eos=True))
        next(stream)
        stream.close()
        self._faults.counts["consumer gone"] += 1

    def _abort_some(self, stop: threading.Event) -> None:
        rng = random.Random(self._rng.random())
        while not stop.wait(0.02):
            outstanding = list(self._asked)
            if outstanding and rng.random() < 5 * self._failing:
                self._llm.abort(rng.choice(outstanding))

    def _collect(self) -> None:
        for output in self._llm.step():
            if output.finished:
                self._take(self._asked.pop(output.request_id), output)

    def _take(self, number: int, output: RequestOutput) -> None:
        for answer in output.outputs:
            assert (answer.finish_reason == "error") == (answer.error is not None), output
        reasons = {answer.finish_reason for answer in output.outputs}
        self.ended[next((r for r in ("error", "abort") if r in reasons), "by itself")] += 1
        self.answers.append((number, answer_of(output)))


def answer_of(output: RequestOutput) -> Answer:
    return [(answer.token_ids, answer.finish_reason) for answer in output.outputs]


def count_equal(answers: list[tuple[int, Answer]], reference: list[Answer]) -> tuple[int, int]:
    """(equal, different) answers; those that were cut off count as far as they go."""
    equal = different = 0
    for number, got in answers:
        for (tokens, reason), (full, full_reason) in zip(got, reference[number], strict=True):
            cut_off = reason in ("abort", "error")
            same = tokens == full[: len(tokens)] if cut_off else (tokens, reason) == (full, full_reason)
            equal, different = equal + same, different + (not same)
    return equal, different


def check_nothing_left(llm: LLM) -> None:
    """After closing: exactly zero of everything."""
    engine, scheduler = llm._engine, llm._engine.scheduler
    scheduler.check_integrity()
    assert scheduler.idle and not scheduler.handoff.pending, scheduler.describe()
    assert engine.executor.num_in_flight == 0 and not engine.has_unfinished()
    for card, manager in scheduler.managers.items():
        assert manager.num_free_blocks == manager.num_blocks, f"card {card}: {scheduler.describe()}"
        assert manager.num_retired_blocks == 0


def break_tokenizers() -> None:
    """From now on, looking for BAD_STOP fails at the fourth token, in this process."""
    push = StopWatcher.push

    def push_or_raise(self: StopWatcher, token: int, search: bool) -> str | None:
        if BAD_STOP in self._stop and len(self._detokenizer._ids) == 3:
            raise UnicodeError("soak: no text")
        return push(self, token, search)

    StopWatcher.push = push_or_raise  # type: ignore[method-assign]


def break_logits(rng: random.Random, share: float) -> None:
    """From now on, a row's logits are sometimes no numbers, where plain torch draws (on CPU cards)."""
    sample = sampler.sample

    def spoil(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        if rng.random() < share:
            logits[rng.randrange(len(logits))] = torch.nan
        return sample(logits, batch)

    sampler.sample = spoil  # type: ignore[assignment]


def options_of(args: argparse.Namespace, number: int = 0) -> dict[str, Any]:
    """Of the engine with this number."""
    options: dict[str, Any] = {"enable_two_gpu_pd": True, "pd_roles": ("strict", "elastic")[number // 2 % 2]}
    options["device"] = "cuda" if args.two_gpus else "cpu"
    if args.shape:
        return options | SHAPE_OPTIONS | {"load_format": "dummy"}
    return options | DEMO_OPTIONS | {"dtype": "float32", "verify_copies": True}


def reference_of(
    folder: str, options: dict[str, Any], kinds: list[Kind], by_regret: bool
) -> tuple[list[Answer], Reference | None]:
    """The same requests, nothing going wrong, and all of them at once; and the model to check answers by regret."""
    with LLM(folder, **options) as llm:
        outputs = llm.generate([k.prompt for k in kinds], [k.params for k in kinds], use_tqdm=False)
        return [answer_of(output) for output in outputs], Reference(llm) if by_regret else None


class Checker:
    """Regrets of all greedy answers so far without a penalty, also of those that were cut off; equal ones once."""

    def __init__(self, reference: Reference, kinds: list[Kind]) -> None:
        self._reference, self._kinds = reference, kinds
        self._known: set[tuple[int, tuple[int, ...]]] = set()  # answers, and all that they begin with
        self.regrets = Regrets([], [])

    def add(self, answers: list[tuple[int, Answer]]) -> Regrets:
        """Those of one life more."""
        distinct = {(number, tuple(tokens)) for number, got in answers for tokens, _ in got if tokens}
        for number, tokens in sorted(distinct, key=lambda pair: -len(pair[1])):
            kind = self._kinds[number]
            if is_greedy(kind.params) and (number, tokens) not in self._known:
                self._known.update((number, tokens[:end]) for end in range(1, len(tokens) + 1))
                self.regrets.rows.append(self._reference.regret(kind.prompt, tokens))
                self.regrets.prompt_tokens.append(len(kind.prompt))
        return self.regrets


def is_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0 and not params.has_penalty and not params.min_tokens


def live(args: argparse.Namespace, folder: str, kinds: list[Kind], number: int, left: int, table: Timetable) -> Any:
    """One engine's life, and its counts."""
    rng = random.Random(f"{args.seed} {number}")
    ending = {1: "card", 3: "context"}.get(number % 4)
    options = options_of(args, number)
    with LLM(folder, **options) as llm:
        faults = Faults(llm, rng, args.faults, ending)
        life = Life(llm, kinds, rng, faults, args.faults)
        life.run(left, table.until_s())
        stats = llm.stats()
    check_nothing_left(llm)
    assert sum(life.ended.values()) == life.num_asked, f"{life.ended} of {life.num_asked}"
    names = ("copy_retries", "prefilled_again", "evacuations", "recomputes")
    counts = Counter({name: stats[name] for name in names}) + Counter(life.ended) + faults.counts
    counts.update({f"errors: {kind}": count for kind, count in stats["errors"].items() if count})
    counts["requests"] = life.num_asked
    print(f"life {number}, {options['pd_roles']}, {ending or 'nothing'} lost: {dict(counts)}", flush=True)
    return life, counts


def soak(args: argparse.Namespace, folder: str, started_s: float) -> dict[str, Any]:
    """The figures, which are printed after each life, too. started_s: of `time.monotonic()`, when the limit began."""
    with_text = not args.shape
    kinds = make_kinds(random.Random(args.seed), min(KINDS, args.requests), 4000, 200 if with_text else 700, with_text)
    reference, model = reference_of(folder, options_of(args), kinds, bool(args.shape))  # before anything is broken
    checker = Checker(model, kinds) if model is not None else None
    break_tokenizers()
    if with_text:
        break_logits(random.Random(args.seed), args.faults / 40)
    figures: dict[str, Any] = {"reference_seconds": time.monotonic() - started_s, "arguments": vars(args)}
    print(json.dumps(figures), flush=True)
    totals: Counter[str] = Counter()
    equal = different = number = 0
    table = Timetable(started_s + 60 * args.minutes if args.minutes else float("inf"), LIVES_IN_MINUTES)
    while totals["requests"] < args.requests and table.begin():
        left = min(args.requests - totals["requests"], LIFE_REQUESTS if not args.minutes else 10**9)
        life, counts = live(args, folder, kinds, number, left, table)
        release_memory()
        if checker is not None and checker.add(life.answers).rows:
            print(f"all lives so far: {checker.regrets.check(BFLOAT16)}", flush=True)
        same, other = count_equal(life.answers, reference)
        totals.update(counts)
        equal, different, number = equal + same, different + other, number + 1
        figures |= {"lives": number, "answers_equal": equal, "answers_different": different, "totals": dict(totals)}
        figures |= {"seconds": time.monotonic() - started_s, "ok": bool(args.shape) or not different}
        print(json.dumps(figures), flush=True)
        table.end(life.asked_s)
    return figures


def release_memory() -> None:
    """Of the engine before, for the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    started_s = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10**9, help="in all")
    parser.add_argument("--minutes", type=float, default=0.0, help="of everything; 0: no limit")
    parser.add_argument("--faults", type=float, default=0.02, help="share of copies, and of requests, that go wrong")
    parser.add_argument("--shape", choices=SHAPES, help="published sizes, random weights; left out: the demo model")
    parser.add_argument("--two-gpus", action="store_true", help="left out: two CPU cards")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.minutes and args.requests == 10**9:
        parser.error("give --requests or --minutes")
    logging.getLogger("nanovllm").setLevel(logging.ERROR)  # hundreds of warnings are what is asked for
    with ExitStack() as stack:
        folder = DEMO_MODEL
        if args.shape:
            folder = str(write_shape(Path(stack.enter_context(tempfile.TemporaryDirectory())), args.shape))
        figures = soak(args, folder, started_s)
    return int(not figures.get("ok"))  # without a life nothing was shown


if __name__ == "__main__":
    sys.exit(main())
