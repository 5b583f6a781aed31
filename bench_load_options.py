"""Options of bench.py that describe a load, and what they make of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_compare import BASELINE, MODES
from bench_curves import import_pyplot
from bench_load import Load
from bench_metrics import parse_bound
from bench_workloads import Rate, Workload

OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "random": {},
    "prefix": {"num_prefixes": 10, "prefix_len": 256},
    "chat": {"turns": 4, "think_s": 1.0},
}


def add_load_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--request-rate", type=each(Rate.parse), metavar="R,...", help="a second; inf: all at once; 0.5x: of capacity")
    add("--burstiness", type=above_zero, default=1.0, help="shape of the gamma distributed gaps; 1: Poisson")
    add("--num-prompts", type=positive, default=1000, help="requests at each rate")
    add("--workload", choices=OWN_OPTIONS, default="random")
    add("--input-len", type=positive, default=1024, help="of a prompt's own tokens: after the prefix, or of a turn")
    add("--output-len", type=positive, default=256)
    add("--range-ratio", type=float, default=0.0, help="both lengths are uniform in length * (1 +- this)")
    add("--num-prefixes", type=positive, help="prefix: common beginnings (10)")
    add("--prefix-len", type=positive, help="prefix: tokens of each (256)")
    add("--turns", type=positive, help="chat: requests of a conversation (4)")
    add("--think-s", type=float, help="chat: from the end of an answer to the next turn (1)")
    add("--goodput", type=checked(parse_bound), nargs="+", default=[], metavar="METRIC:MS", help="ttft, tpot, e2e")
    add("--compare", type=each(mode_name), metavar="MODE,...", help=f"one after the other: {', '.join(MODES)}")
    add("--budgets", type=each(positive), default=[512, 2048, 8192], metavar="TOKENS,...", help="of one-card modes")
    add("--plot", type=Path, metavar="FILE.png", help="latency against rate; needs matplotlib")


def each(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Of a list with commas."""
    return lambda text: [checked(parse)(part) for part in text.split(",")]


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """With the words of a `ValueError` for the user."""

    def parse_checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_checked


def mode_name(text: str) -> str:
    if text not in MODES:
        raise ValueError(f"mode {text!r} is none of {', '.join(MODES)}")
    return text


def check_together(args: argparse.Namespace) -> None:
    """Options that need, or exclude, another; found before any work."""
    if not args.request_rate and (args.compare or args.plot or args.goodput):
        raise ValueError("--compare, --plot and --goodput need --request-rate")
    if args.request_rate and (args.decode_steps or args.prefill):
        raise ValueError("--request-rate is a run of its own, without --decode-steps and --prefill")
    if args.compare and (args.two_gpus or args.pd_roles):
        raise ValueError("--compare names its modes: without --two-gpus and --pd-roles")
    if args.beside_python and (args.compare or not (args.decode_steps or args.request_rate)):
        raise ValueError("--beside-python needs --decode-steps, or --request-rate without --compare")
    shares = [rate.label for rate in args.request_rate or () if rate.is_share]
    if shares and not (args.compare and BASELINE in args.compare):
        raise ValueError(f"rate {shares[0]} is a share of what two replicas can do: it needs {BASELINE} in --compare")
    if shares and args.workload == "chat":
        raise ValueError(f"rate {shares[0]}: a chat waits for its user, so no run of it shows what replicas can do")
    if args.request_rate and not args.overlap:
        raise ValueError("--no-overlap runs nothing while requests arrive: not with --request-rate")
    if args.plot:
        import_pyplot()
        if not args.plot.parent.is_dir():
            raise ValueError(f"--plot {args.plot}: there is no folder {args.plot.parent}")


def load_of(args: argparse.Namespace) -> Load:
    """`ValueError` for an option of another workload."""
    own = OWN_OPTIONS[args.workload]
    given = {name: getattr(args, name) for names in OWN_OPTIONS.values() for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - own.keys():
        raise ValueError(f"--{name.replace('_', '-')} is no option of --workload {args.workload}")
    lengths = args.input_len, args.output_len, args.range_ratio
    workload = Workload(args.workload, args.num_prompts, *lengths, **(own | given))
    return Load(workload, args.burstiness, args.seed, dict(args.goodput))


# -- one value


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def above_zero(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{number} must be above 0")
    return number
