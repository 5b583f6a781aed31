"""One decode step and one prefill, end to end through `LLM.generate`, against what memory and arithmetic allow.

    python bench.py --shape 0.6b --decode-steps          # every case of the table
    python bench.py --shape 8b --prefill --cases 1x2048

A decode step is (time to generate 66 tokens - time to generate 2) / 64 for the whole batch, a prefill is `generate`
with max_tokens 1: so host work, logits and sampling are in both. Medians of `--repeats`; random prompts, temperature
0.6.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from bench_decode_pipeline import in_turn_with_sequential, pipeline_line

if TYPE_CHECKING:
    from nanovllm import LLM, SamplingParams
    from nanovllm.models.model_config import ModelConfig

DECODE_CASES = ("1x512", "8x1024", "64x1024", "256x1024", "512x512")
PREFILL_CASES = ("32x2048", "1x2048")
FEW_TOKENS, MANY_TOKENS = 2, 66
HOST_PARTS = ("loop", "loop_cpu", "launch")  # the engine's loop, of that on a CPU, and launching


class Ceiling(NamedTuple):
    """What the card can do at best. The defaults of bench.py are an H200's, measured."""

    read_tb_per_s: float
    tflops: float


class Case(NamedTuple):
    batch: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """\"8x1024\": 8 prompts of 1,024 tokens."""
        batch, separator, tokens = text.partition("x")
        if not (separator and batch.isdigit() and tokens.isdigit() and int(batch) and int(tokens)):
            raise ValueError(f"case {text!r} is not BATCHxTOKENS, for example 8x1024")
        return cls(int(batch), int(tokens))


def bench_decode_steps(
    llm: LLM, cases: Sequence[str], repeats: int, ceiling: Ceiling, beside_python: bool = False
) -> list[dict[str, Any]]:
    """A row a case. The same prompts each time: their cached prefix keeps prefill, which cancels out, short.

    `beside_python`: also the mean gap between steady tokens, alone and, in turn, while a thread of pure Python runs in
    the process. (The difference of two runs would not do: the thread makes the start of both longer.)
    """
    return [bench_decode_case(llm, Case.parse(case), repeats, ceiling, beside_python) for case in cases]


def bench_decode_case(llm: LLM, case: Case, repeats: int, ceiling: Ceiling, beside_python: bool) -> dict[str, Any]:
    prompts = make_prompts(llm, case, seed=0)
    seconds(llm, prompts, MANY_TOKENS)
    steps = [step_seconds(llm, prompts) for _ in range(repeats)]
    row = decode_row(llm.model_config, case, [step["seconds"] for step in steps], ceiling)
    row |= {"host": {f"{part}_ms": median_ms(step[f"{part}_seconds"] for step in steps) for part in HOST_PARTS}}
    if llm.decode_runner.pipeline is not None:
        row |= in_turn_with_sequential(llm, lambda: step_seconds(llm, prompts)["seconds"], repeats)
    return row | (python_row(llm, prompts, repeats) if beside_python else {})


def python_row(llm: LLM, prompts: list[list[int]], repeats: int) -> dict[str, float]:
    """Milliseconds between tokens, without and with a thread of pure Python beside the engine; medians."""
    alone, beside = [], []
    for _ in range(repeats):
        alone.append(steady_gap(llm, prompts))
        with python_thread():
            beside.append(steady_gap(llm, prompts))
    gaps = {"alone_ms": statistics.median(alone) * 1e3, "beside_python_ms": statistics.median(beside) * 1e3}
    return {name: round(gap, 4) for name, gap in gaps.items()}


def steady_gap(llm: LLM, prompts: list[list[int]]) -> float:
    """Mean seconds from token to token of the youngest sequence, when all of the batch decode."""
    output = llm.generate(prompts, workload_params(2 * MANY_TOKENS), use_tqdm=False)[-1]
    return statistics.mean(output.metrics.inter_token[MANY_TOKENS // 2 : MANY_TOKENS])


def step_seconds(llm: LLM, prompts: list[list[int]]) -> dict[str, float]:
    """One decode step of the whole batch: `seconds`, and what of the host's work falls to it, by `HOST_PARTS`. Other
    threads may run in between, and the cards run all the while; what a request costs once cancels out."""
    many, few = (timed(llm, prompts, max_tokens) for max_tokens in (MANY_TOKENS, FEW_TOKENS))
    return {name: (many[name] - few[name]) / (MANY_TOKENS - FEW_TOKENS) for name in many}


def timed(llm: LLM, prompts: list[list[int]], max_tokens: int) -> dict[str, float]:
    before = llm.stats()
    taken = {"seconds": seconds(llm, prompts, max_tokens)}
    after = llm.stats()
    return taken | {f"{part}_seconds": after[f"{part}_seconds"] - before[f"{part}_seconds"] for part in HOST_PARTS}


def median_ms(samples: Iterable[float]) -> float:
    return round(statistics.median(samples) * 1e3, 4)


@contextmanager
def python_thread() -> Iterator[None]:
    """A thread that never lets go of the interpreter of its own accord."""
    ended = threading.Event()

    def count() -> None:
        number = 0
        while not ended.is_set():
            for _ in range(10_000):
                number += 1

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def bench_prefill(llm: LLM, cases: Sequence[str], repeats: int, ceiling: Ceiling) -> list[dict[str, Any]]:
    """A row a case. New prompts each time: nothing is cached."""
    rows = []
    for case in map(Case.parse, cases):
        times = [seconds(llm, make_prompts(llm, case, seed), 1) for seed in range(repeats + 1)][1:]
        rows.append(prefill_row(llm.model_config, case, times, ceiling))
    return rows


def make_prompts(llm: LLM, case: Case, seed: int) -> list[list[int]]:
    # Another sequence for every case: prompts of one must not find those of another in the prefix cache.
    rng, vocab_size = random.Random(f"{case} {seed}"), llm.model_config.vocab_size
    return [[rng.randrange(vocab_size) for _ in range(case.tokens)] for _ in range(case.batch)]


def seconds(llm: LLM, prompts: list[list[int]], max_tokens: int) -> float:
    started = time.perf_counter()
    llm.generate(prompts, workload_params(max_tokens), use_tqdm=False)
    return time.perf_counter() - started


def workload_params(max_tokens: int) -> SamplingParams:
    from nanovllm import SamplingParams

    return SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=max_tokens)


# -- what a case costs at least


def decode_row(config: ModelConfig, case: Case, steps: Sequence[float], ceiling: Ceiling) -> dict[str, Any]:
    """The figures of a decode case; its context is that of the middle step."""
    context_tokens = case.tokens + (FEW_TOKENS + MANY_TOKENS) // 2
    kv_bytes = case.batch * context_tokens * config.kv_bytes_per_token(2)
    num_bytes = 2 * matrix_parameters(config) + kv_bytes
    flops = 2 * matrix_parameters(config) * case.batch + attention_flops(config, case.batch * context_tokens)
    floor_ms = max(num_bytes / ceiling.read_tb_per_s, flops / ceiling.tflops) / 1e9
    step_ms = statistics.median(steps) * 1e3
    return {
        "case": f"{case.batch}x{case.tokens}",
        "step_ms": round(step_ms, 4),
        "spread_ms": [round(min(steps) * 1e3, 4), round(max(steps) * 1e3, 4)],
        "gigabytes": round(num_bytes / 1e9, 3),
        "gigaflops": round(flops / 1e9, 1),
        "floor_ms": round(floor_ms, 4),
        "share_of_floor": round(floor_ms / step_ms, 4),
        "mbu": round(num_bytes / 1e9 / ceiling.read_tb_per_s / step_ms, 4),
        "mfu": round(flops / 1e9 / ceiling.tflops / step_ms, 4),
    }


def prefill_row(config: ModelConfig, case: Case, times: Sequence[float], ceiling: Ceiling) -> dict[str, Any]:
    """The figures of a prefill case; logits are computed for last tokens only."""
    tokens = case.batch * case.tokens
    layers = matrix_parameters(config) - config.vocab_size * config.hidden_size
    flops = 2 * layers * tokens + attention_flops(config, tokens * (case.tokens + 1) // 2)
    taken = statistics.median(times)
    floor_ms = flops / 1e9 / ceiling.tflops
    return {
        "case": f"{case.batch}x{case.tokens}",
        "tokens_per_s": round(tokens / taken, 1),
        "milliseconds": round(taken * 1e3, 3),
        "spread_ms": [round(min(times) * 1e3, 3), round(max(times) * 1e3, 3)],
        "gigaflops": round(flops / 1e9, 1),
        "floor_ms": round(floor_ms, 3),
        "mfu": round(floor_ms / taken / 1e3, 4),
    }


def matrix_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: every matrix of the layers, and the output matrix once."""
    attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
    ffn = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + ffn) + config.vocab_size * config.hidden_size


def attention_flops(config: ModelConfig, query_key_pairs: int) -> int:
    return 4 * config.num_hidden_layers * config.q_size * query_key_pairs


# -- the table


def step_lines(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of every line of the table."""
    lines = [
        (
            f"decode {row['case']}",
            f"{row['step_ms']:.3f} ms a step, {row['spread_ms'][0]:.3f} to {row['spread_ms'][1]:.3f}; floor "
            f"{row['floor_ms']:.3f} ms ({row['share_of_floor']:.0%}), MBU {row['mbu']:.0%}, MFU {row['mfu']:.0%}; host "
            f"{row['host']['loop_ms']:.3f} ({row['host']['loop_cpu_ms']:.3f} of CPU) + "
            f"{row['host']['launch_ms']:.3f} ms"
            + (pipeline_line(row) if "pipeline_ms" in row else "")
            + (
                f"; from token to token {row['alone_ms']:.3f} ms, {row['beside_python_ms']:.3f} beside a Python thread"
                if "beside_python_ms" in row
                else ""
            ),
        )
        for row in figures.get("decode_steps", ())
    ]
    return lines + [
        (
            f"prefill {row['case']}",
            f"{row['tokens_per_s']:,.0f} tok/s, {row['milliseconds']:.2f} ms, {row['spread_ms'][0]:.2f} to "
            f"{row['spread_ms'][1]:.2f}; floor {row['floor_ms']:.2f} ms, MFU {row['mfu']:.0%}",
        )
        for row in figures.get("prefill", ())
    ]
