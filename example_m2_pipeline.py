"""Decode on card 1 with attention and FFN on two partitions of its SMs, and what each of them took.

    python example_m2_pipeline.py                        # the shipped checkpoint, on whatever is here
    python example_m2_pipeline.py --model Qwen/Qwen3-0.6B --decode-pipeline static --attention-sm 44 --ffn-sm 88

Needs two GPUs for the partitions. Without them the pipeline falls back to one stream, says so, and the answers are the
same: on a CPU, over two CPU cards. Exit codes: 0, 2 for wrong arguments (one line says which), 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from typing import Any

from example_two_gpu import PROMPTS, Parser, count_gpus, print_answers
from green_ctx import GreenContextError


def make_parser() -> Parser:
    parser = Parser(description="Generate text with a decode pipeline on card 1.")
    parser.add_argument("--model", help="folder or hub id (default: the shipped checkpoint)")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--prefill-device", type=int, default=0)
    parser.add_argument("--decode-device", type=int, default=1)
    parser.add_argument("--decode-pipeline", choices=("auto", "static", "disabled"), default="auto")
    attention, ffn = ("--decode-attention-sm", "--attention-sm"), ("--decode-ffn-sm", "--ffn-sm")
    parser.add_argument(*attention, type=int, metavar="SMS", help="SMs of attention (default: what measures best)")
    parser.add_argument(*ffn, type=int, metavar="SMS", help="SMs of the FFN")
    parser.add_argument("--disable-green", action="store_true", help="no SM partitions: one stream")
    parser.add_argument("--pipeline-debug", action="store_true", help="log every decode step")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.pipeline_debug else logging.WARNING, format="%(message)s")
    try:
        run(args)
    except (ValueError, FileNotFoundError, GreenContextError) as error:  # the library's words for a caller's mistake
        parser.error(str(error))
    return 0


def run(args: argparse.Namespace) -> None:
    from nanovllm import DEMO_MODEL, LLM, SamplingParams  # here: --help and mistakes need not wait for torch

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    with LLM(args.model or DEMO_MODEL, **options(args)) as llm:
        outputs = llm.generate(args.prompt or list(PROMPTS), params, use_tqdm=sys.stderr.isatty())
        print_answers(outputs)
        llm.decode_runner.print_pipeline_statistics()


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Two cards: GPUs if there are two, else on the CPU."""
    device = "cpu" if args.device == "auto" and count_gpus(args.device) < 2 else args.device
    return {
        "device": device,
        "enable_two_gpu_pd": True,
        "prefill_device_id": args.prefill_device,
        "decode_device_id": args.decode_device,
        "enable_decode_pipeline": True,
        "decode_pipeline": args.decode_pipeline,
        "decode_attention_sm": args.decode_attention_sm,
        "decode_ffn_sm": args.decode_ffn_sm,
        "disable_green": args.disable_green,
        "decode_pipeline_profiling": True,
        "pipeline_debug": args.pipeline_debug,
    }


if __name__ == "__main__":
    # Not KeyboardInterrupt: raised inside an extension module's import, it comes out as that module's own error.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    sys.exit(main())
