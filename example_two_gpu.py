"""Prefill on one card, decode on another, and what each of them did.

    python example_two_gpu.py                                  # the shipped checkpoint, on whatever is here
    python example_two_gpu.py --model Qwen/Qwen3-8B --prompt "Once upon a time"

Two GPUs if there are two, one card on a single GPU, two CPU cards without any. Exit codes: 0, 2 for wrong
arguments (one line says which), 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from nanovllm import LLM, RequestOutput

PROMPTS = ("def fibonacci(n):\n", "import os\n", "class Stack:\n", "for line in lines:\n")
CARD_COLUMNS = ("card", "device", "work", "tokens", "steps", "tok/s", "busy", "blocks", "free", "cached")
Row = tuple[object, ...]


class Parser(argparse.ArgumentParser):
    """One line for a mistake, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def make_parser() -> Parser:
    parser = Parser(description="Generate text: prefill on one card, decode on another.")
    parser.add_argument("--model", help="folder or hub id (default: the shipped checkpoint)")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--prefill-device", type=int, help="default 0")
    parser.add_argument("--decode-device", type=int, help="default 1")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--single", action="store_true", help="prefill and decode on one card")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.single and args.decode_device is not None:
        parser.error(f"--single has no use for --decode-device {args.decode_device}")
    try:
        run(args)
    except (ValueError, FileNotFoundError) as error:  # the library's words for a caller's mistake
        parser.error(str(error))
    return 0


def run(args: argparse.Namespace) -> None:
    from nanovllm import DEMO_MODEL, LLM, SamplingParams  # here: --help and mistakes need not wait for torch

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    with LLM(args.model or DEMO_MODEL, **card_options(args)) as llm:
        outputs = llm.generate(args.prompt or list(PROMPTS), params, use_tqdm=sys.stderr.isatty())
        print_answers(outputs)
        print_cards(llm)


def card_options(args: argparse.Namespace) -> dict[str, Any]:
    """Two cards, unless one was asked for, or there is but one GPU and nobody named a second."""
    options: dict[str, Any] = {"device": args.device, "prefill_device_id": args.prefill_device or 0}
    if args.single or (args.decode_device is None and count_gpus(args.device) == 1):
        return options
    decode_id = 1 if args.decode_device is None else args.decode_device
    return options | {"decode_device_id": decode_id, "enable_two_gpu_pd": True}


def count_gpus(device: str) -> int:
    import torch

    return 0 if device == "cpu" else torch.cuda.device_count()


def print_answers(outputs: list[RequestOutput]) -> None:
    for output in outputs:
        answer = output.outputs[0]
        print(f"=== {output.prompt!r} → {len(answer.token_ids)} tokens, {answer.finish_reason}")
        print(f"{output.prompt}{answer.text}\n")


def print_cards(llm: LLM) -> None:
    """A row a card and kind of work, then what the copies between the cards moved."""
    stats = llm.stats()
    runners = list(dict.fromkeys((llm.prefill_runner, llm.decode_runner)))
    print("two cards: prefill on card 0, decode on card 1" if len(runners) == 2 else "one card does both")
    rows = [row for card, runner in enumerate(runners) for row in card_rows(stats, card, runner)]
    print_table([CARD_COLUMNS, *rows])
    gb, seconds = stats["copied_bytes"] / 1e9, stats["copy_seconds"]
    rate = f", {gb / seconds:.2f} GB/s" if seconds else ""
    print(f"copies between cards: {stats['copied_blocks']} blocks, {gb * 1e3:.2f} MB{rate}")


def card_rows(stats: dict[str, Any], card: int, runner: Any) -> list[Row]:
    done, blocks = stats[f"card{card}"], stats[f"card{card}_blocks"]
    device = f"{runner.device.type}:{runner.device_id}"
    state = f"{done['busy_share']:.0%}", blocks["total"], blocks["free"], blocks["cached"]
    return [(card, device, *work_cells(done, kind), *state) for kind in ("prefill", "decode")]


def work_cells(done: dict[str, Any], kind: str) -> Row:
    """Tokens per second are those of the time in which the card did this kind of work."""
    tokens, seconds = done[f"{kind}_tokens"], done[f"{kind}_seconds"]
    return kind, tokens, done[f"{kind}_steps"], f"{tokens / seconds:.0f}" if seconds else "-"


def print_table(rows: list[Row]) -> None:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    # Not KeyboardInterrupt: raised inside an extension module's import, it comes out as that module's own error.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    sys.exit(main())
