"""nano-vLLM's benchmark: 256 random prompts, both lengths uniform in 100 … 1024, all submitted at once.

    python bench.py --shape 0.6b                    # published sizes, random weights, no download
    python bench.py --model Qwen/Qwen3-8B --two-gpus
    python bench.py --shape 8b --decode-steps --prefill    # instead: single steps, see bench_steps.py
    python bench.py --shape 8b --two-gpus --request-rate 20,30,40    # instead: load, see bench_load.py
    python bench.py --shape 8b --compare one,two-replicas,pd --request-rate inf,0.5x,0.9x    # see bench_compare.py

The same draws in the same order as https://github.com/GeeeekExplorer/nano-vllm (bench.py): 133,966 output tokens at
the defaults. Prints a table; the last line is one JSON object. Warm-up is excluded from every figure.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from bench_compare import Comparison, add_point, compare
from bench_curves import load_lines, plot
from bench_decode_pipeline import add_pipeline_arguments, pipeline_config, split_counts, start_on_one_card
from bench_load import Load, LocalEngine, measure, warm_up_load
from bench_load_options import add_load_arguments, check_together, each, load_of, positive
from bench_report import identity, make_report, table_rows
from bench_steps import (
    DECODE_CASES,
    PREFILL_CASES,
    Case,
    Ceiling,
    bench_decode_steps,
    bench_prefill,
    python_thread,
    step_lines,
)
from green_ctx import GreenContextError

if TYPE_CHECKING:
    from nanovllm import LLM, SamplingParams

LARGEST_TOKEN_ID = 10_000
SHORTEST_TOKENS = 100


class Shape(NamedTuple):
    """What differs between the published dense Qwen3 models."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool


SHAPES = {
    "0.6b": Shape(1024, 28, 16, 8, 3072, True),
    "1.7b": Shape(2048, 28, 16, 8, 6144, True),
    "4b": Shape(2560, 36, 32, 8, 9728, True),
    "8b": Shape(4096, 36, 32, 8, 12288, False),
    "14b": Shape(5120, 40, 40, 8, 17408, False),
    "32b": Shape(5120, 64, 64, 8, 25600, False),
}
SHARED = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}


def write_shape(folder: Path, name: str) -> Path:
    """A checkpoint folder without weights: the published config.json and the EOS ids of generation_config.json."""
    (folder / "config.json").write_text(json.dumps(SHARED | SHAPES[name]._asdict()))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    return folder


def make_workload(
    num_seqs: int, max_input_len: int, max_output_len: int, vocab_size: int, seed: int = 0
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts first, then output lengths. A smaller vocabulary folds the ids, so that no length changes."""
    from nanovllm import SamplingParams

    rng = random.Random(seed)
    prompts = [
        [rng.randint(0, LARGEST_TOKEN_ID) % vocab_size for _ in range(random_length(rng, max_input_len))]
        for _ in range(num_seqs)
    ]
    lengths = [random_length(rng, max_output_len) for _ in range(num_seqs)]
    return prompts, [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length) for length in lengths]


def random_length(rng: random.Random, longest: int) -> int:
    return rng.randint(min(SHORTEST_TOKENS, longest), longest)


# -- the run


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build the engine, warm it up, time the workload; everything the JSON line holds."""
    with ExitStack() as stack:
        llm = make_llm(args, stack)
        sizes = args.num_seqs, args.max_input_len, args.max_output_len
        prompts, params = make_workload(*sizes, llm.model_config.vocab_size, args.seed)
        if args.warmup:
            warm_up(llm)
        before, started = llm.stats(), time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        figures = make_report(llm, outputs, seconds, before, llm.stats())
        folded = llm.model_config.vocab_size <= LARGEST_TOKEN_ID
        figures |= pipeline_figures(llm)
    model = {"model": args.model, "shape": args.shape, "folded_token_ids": folded}
    return model | figures | {"arguments": vars(args)}


def run_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Build the engine, warm it up, time single steps; everything the JSON line holds."""
    ceiling, figures = Ceiling(args.read_tb_per_s, args.tflops), {}
    with ExitStack() as stack:
        llm = make_llm(args, stack)
        warm_up(llm)
        if args.decode_steps:
            cases = args.cases or DECODE_CASES
            figures["decode_steps"] = bench_decode_steps(llm, cases, args.repeats, ceiling, args.beside_python)
        if args.prefill:
            cases = args.cases or PREFILL_CASES
            figures["prefill"] = bench_prefill(llm, cases, args.repeats, ceiling)
        model = {"model": args.model, "shape": args.shape, "ceiling": ceiling._asdict()}
        return model | identity(llm) | figures | pipeline_figures(llm) | {"arguments": vars(args)}


def pipeline_figures(llm: LLM) -> dict[str, Any]:
    """What the decode pipeline did, both stages' mean times among it; nothing where none was asked for."""
    statistics = llm.decode_runner.get_pipeline_statistics()
    return {"decode_pipeline": statistics} if statistics else {}


def run_load(args: argparse.Namespace) -> dict[str, Any]:
    """Load at each rate on one engine, or on each of the modes compared; everything the JSON line holds."""
    load = load_of(args)
    with ExitStack() as stack:
        figures = run_comparison(args, load, stack) if args.compare else run_rates(args, load, stack)
    if args.plot:
        best = {(row["mode"], row["rate"], row["budget"]) for row in figures.get("best", ())}
        points = [p for p in figures["points"] if not best or (p["mode"], p["rate"], p["budget"]) in best]
        plot(points, args.plot)
    return {"model": args.model, "shape": args.shape} | figures | {"arguments": printable(vars(args))}


def run_rates(args: argparse.Namespace, load: Load, stack: ExitStack) -> dict[str, Any]:
    target = LocalEngine(llm := make_llm(args, stack))
    if args.warmup:
        warm_up_load(llm, args.input_len)
    figures: dict[str, Any] = {"points": [], "about": {}}
    mode = "pd" if args.two_gpus else "one"
    for rate in args.request_rate:
        add_point(figures, mode, target, measure(target, load, rate, rate.number))
        if args.beside_python:  # with prompts of its own, which no prefix cache knows yet
            with python_thread():
                measured = measure(target, replace(load, seed=load.seed + 1), rate, rate.number)
            add_point(figures, f"{mode} beside Python", target, measured)
    return figures


def run_comparison(args: argparse.Namespace, load: Load, stack: ExitStack) -> dict[str, Any]:
    options = engine_options(args) | pipeline_config(args)
    ids = options.pop("prefill_device_id", 0), options.pop("decode_device_id", 1)
    warm_up_tokens = args.input_len if args.warmup else None
    lists = args.compare, args.budgets, args.request_rate
    return compare(Comparison(make_folder(args, stack), options, ids, *lists, load, warm_up_tokens))


def printable(arguments: dict[str, Any]) -> dict[str, Any]:
    rates = [rate.label for rate in arguments["request_rate"]]
    return arguments | {"request_rate": rates, "plot": arguments["plot"] and str(arguments["plot"])}


def make_llm(args: argparse.Namespace, stack: ExitStack) -> LLM:
    """The engine to measure, closed with the stack."""
    from nanovllm import LLM

    options, pipeline = engine_options(args), pipeline_config(args)
    llm = stack.enter_context(LLM(make_folder(args, stack), **options | (pipeline if args.two_gpus else {})))
    if pipeline and not args.two_gpus:
        start_on_one_card(llm, pipeline)
    return llm


def make_folder(args: argparse.Namespace, stack: ExitStack) -> str:
    """The checkpoint; one made for a shape goes with the stack."""
    return args.model or str(write_shape(Path(stack.enter_context(tempfile.TemporaryDirectory())), args.shape))


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `LLM`; what was not given keeps the library's default."""
    options = {
        "device": args.device,
        "enable_two_gpu_pd": args.two_gpus,
        "load_format": "dummy" if args.shape else "auto",
        "enable_prefix_caching": args.enable_prefix_caching,
        "enforce_eager": args.enforce_eager,
        "attention_backend": args.attention_backend,
        "overlap": args.overlap,
        "seed": args.seed,
        "prefill_device_id": args.prefill_device,
        "decode_device_id": args.decode_device,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "num_kvcache_blocks": args.num_kvcache_blocks,
        "pd_roles": args.pd_roles,
        "itl_slo_ms": args.itl_slo_ms,
        "lend_sms": args.lend_sms,
    }
    return {name: value for name, value in options.items() if value is not None}


def warm_up(llm: LLM) -> None:
    from nanovllm import SamplingParams

    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=min(16, llm.max_model_len // 2))
    llm.generate([[0] * min(32, llm.max_model_len // 2)], params, use_tqdm=False)
    time.sleep(0.1)  # a step launched ahead of the end may still run


# -- the command line


class Parser(argparse.ArgumentParser):
    """One line for a mistake, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def make_parser() -> Parser:
    parser = Parser(description="nano-vLLM's benchmark. The last line printed is one JSON object.")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder or hub id")
    model.add_argument("--shape", choices=SHAPES, help="published sizes with random weights")
    parser.add_argument("--two-gpus", action="store_true", help="prefill on one card, decode on another")
    parser.add_argument("--num-seqs", type=positive, default=256)
    parser.add_argument("--max-input-len", type=positive, default=1024)
    parser.add_argument("--max-output-len", type=positive, default=1024)
    parser.add_argument("--seed", type=int, default=0, help="of the workload and of the engine's sampling")
    parser.add_argument("--warmup", action=argparse.BooleanOptionalAction, default=True, help="a request beforehand")
    text = "decode steps, or a load on one engine, also beside a thread of pure Python"
    parser.add_argument("--beside-python", action="store_true", help=text)
    add_step_arguments(parser.add_argument_group("single steps, instead of the workload"))
    add_load_arguments(parser.add_argument_group("load, instead of the workload", "definitions: bench_metrics.py"))
    add_engine_arguments(parser.add_argument_group("engine", "as in nanovllm.Config; left out: its defaults"))
    add_pipeline_arguments(parser.add_argument_group("decode pipeline", "attention and FFN on two SM partitions"))
    return parser


def add_step_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--decode-steps", action="store_true", help="time decode steps of full batches")
    group.add_argument("--prefill", action="store_true", help="time whole prompts")
    group.add_argument(
        "--cases", type=each(case_name), metavar="BATCHxTOKENS,...", help="left out: the table of the docs"
    )
    group.add_argument("--repeats", type=positive, default=5)
    group.add_argument("--read-tb-per-s", type=float, default=4.45, help="of the card's memory; default: an H200's")
    group.add_argument("--tflops", type=float, default=797.0, help="of the card's bf16 products; default: an H200's")


def case_name(text: str) -> str:
    Case.parse(text)
    return text


def add_engine_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    group.add_argument("--prefill-device", type=int, metavar="ID")
    group.add_argument("--decode-device", type=int, metavar="ID")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS")
    group.add_argument("--max-num-seqs", type=int, metavar="N")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="TOKENS", help="of a step; see --budgets")
    group.add_argument("--pd-roles", choices=("elastic", "strict"))
    group.add_argument("--itl-slo-ms", type=float, metavar="MS")
    group.add_argument("--lend-sms", type=split_counts, metavar="D:P", help="of the decode card: decode, prompts")
    group.add_argument("--num-kvcache-blocks", type=block_counts, metavar="N[,N]", help="a card, or card 0,card 1")
    group.add_argument("--no-prefix-caching", dest="enable_prefix_caching", action="store_false")
    group.add_argument("--enforce-eager", action="store_true")
    group.add_argument("--attention-backend", choices=("auto", "flash_attn", "triton", "torch"), default="auto")
    group.add_argument("--no-overlap", dest="overlap", action="store_false", help="one loop, nothing in flight")


def block_counts(text: str) -> int | tuple[int, ...]:
    """\"500\", or \"500,400\" for card 0 and card 1."""
    try:
        counts = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or N,N") from None
    return counts[0] if len(counts) == 1 else counts


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check_together(args)
        figures = chosen_run(args)(args)
    except (ValueError, FileNotFoundError, GreenContextError) as error:  # the library's words for a caller's mistake
        parser.error(str(error))
    print_figures(figures)
    return 0


def chosen_run(args: argparse.Namespace) -> Callable[[argparse.Namespace], dict[str, Any]]:
    if args.request_rate:
        return run_load
    return run_steps if args.decode_steps or args.prefill else run


def print_figures(figures: dict[str, Any]) -> None:
    lines = {"seconds": table_rows, "points": load_lines}
    rows = [("model", figures["model"] or f"shape {figures['shape']}, random weights")]
    rows += next((lines[key] for key in lines if key in figures), step_lines)(figures)
    if figures.get("folded_token_ids"):
        rows.append(("note", f"token ids up to {LARGEST_TOKEN_ID} were folded into the smaller vocabulary"))
    width = 1 + max(10, *(len(name) for name, _ in rows))
    for name, text in rows:
        print(f"{name:<{width}}{text}")
    print(json.dumps(figures))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
