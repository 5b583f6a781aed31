"""The figures of one benchmark run: differences of two `LLM.stats()`, latencies, versions; as a dict and a table."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from nanovllm import LLM, RequestOutput

ROOT = Path(__file__).resolve().parent
Stats = dict[str, Any]


def make_report(llm: LLM, outputs: Sequence[RequestOutput], seconds: float, before: Stats, after: Stats) -> Stats:
    """Figures of the part between the two statistics. `RuntimeError` if an answer has not its full length."""
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    if any(output.outputs[0].finish_reason != "length" for output in outputs):
        raise RuntimeError("a sequence ended before its max_tokens: the figures would not be comparable")
    metrics = [output.metrics for output in outputs]
    return identity(llm) | {
        "seconds": round(seconds, 4),
        "num_seqs": len(outputs),
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "output_tokens_per_s": round(num_output / seconds, 2),
        "total_tokens_per_s": round((num_prompt + num_output) / seconds, 2),
        "ttft_ms": percentiles_ms([m.ttft for m in metrics if m.ttft is not None]),
        "itl_ms": percentiles_ms([gap for m in metrics for gap in m.inter_token]),
        "cards": [card_figures(before, after, card, seconds, runner) for card, runner in enumerate(cards_of(llm))],
        "host": host_figures(before, after),
        "copies": copy_figures(before, after),
        "evacuations": after["evacuations"] - before["evacuations"],
    }


def identity(llm: LLM) -> Stats:
    """What ran: model size, mode, backend, devices, versions, commit."""
    return {
        "parameters": llm.model_config.num_parameters(),
        "mode": "two cards" if len(cards_of(llm)) == 2 else "one card",
        "overlap": llm.config.overlap,
        "attention_backend": llm.decode_runner.model.attention.name,
        "decode_graphs": llm.decode_runner.graphs is not None,
        "prefill_graphs": llm.prefill_runner.prefill_graphs is not None,
        "copy_way": llm.prefill_runner.kv_cache.copy_way(llm.decode_runner.kv_cache),
        "dtype": str(llm.decode_runner.model.dtype).removeprefix("torch."),
        "devices": [device_name(runner.device) for runner in cards_of(llm)],
        "versions": versions(),
        "commit": commit(),
    }


def cards_of(llm: LLM) -> list[Any]:
    return list(dict.fromkeys((llm.prefill_runner, llm.decode_runner)))


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    """P50 and P99 in milliseconds, interpolated between samples; None without any."""
    if not seconds:
        return {"p50": None, "p99": None}
    samples = seconds if len(seconds) > 1 else [*seconds, *seconds]  # quantiles() wants two
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return {"p50": round(cuts[49] * 1e3, 3), "p99": round(cuts[98] * 1e3, 3)}


def card_figures(before: Stats, after: Stats, card: int, seconds: float, runner: Any) -> Stats:
    """What one card did in the timed part."""
    steps = steps_of(before[f"card{card}"], after[f"card{card}"], seconds)
    blocks = after[f"card{card}_blocks"]["total"]
    return {"card": card, "device": device_name(runner.device)} | steps | {"kv_blocks": blocks}


def steps_of(before: Stats, after: Stats, seconds: float) -> Stats:
    """A card's steps between its two statistics, by kind. `busy_share`: of `seconds`, in which it ran one, lent ones
    aside, which run beside the others."""
    kinds = [name for name in after if name.endswith(("_steps", "_tokens", "_seconds"))]
    done = {name: after[name] - before[name] for name in kinds}
    done["busy_share"] = sum(done[f"{kind}_seconds"] for kind in ("prefill", "decode", "mixed")) / seconds
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in done.items()}


def host_figures(before: Stats, after: Stats) -> dict[str, float]:
    """Milliseconds of the host for each step of any card: of the engine loop, of that on a CPU, and of launching. Other
    threads may run in between, and the cards run all the while."""
    cards = [name for name in after if name.startswith("card") and "decode_steps" in after[name]]
    kinds = ("prefill_steps", "decode_steps", "mixed_steps")
    steps = sum(after[card][kind] - before[card][kind] for card in cards for kind in kinds)
    parts = {"loop_ms": "loop_seconds", "loop_cpu_ms": "loop_cpu_seconds", "launch_ms": "launch_seconds"}
    return {name: round((after[key] - before[key]) / max(1, steps) * 1e3, 4) for name, key in parts.items()}


def copy_figures(before: Stats, after: Stats) -> Stats:
    """Blocks moved, in all and by direction: "0to1" is mirroring and return, "1to0" write-back and evacuation."""
    routes = after["copies_by_route"]
    by_route = {name: copied_between(before["copies_by_route"].get(name), routes[name]) for name in routes}
    return copied_between(before, after) | {"by_route": by_route}


def copied_between(before: Stats | None, after: Stats) -> Stats:
    """The rate is that of the copies alone."""
    names = ("copies", "copied_blocks", "copied_bytes", "copy_seconds")
    moved = {name: after[name] - (before[name] if before else 0) for name in names}
    rate = moved["copied_bytes"] / moved["copy_seconds"] / 1e9 if moved["copy_seconds"] else None
    return moved | {"copy_seconds": round(moved["copy_seconds"], 4), "gb_per_s": rate and round(rate, 3)}


def device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    import torch

    import nanovllm

    return {"nanovllm": nanovllm.__version__, "torch": torch.__version__, "python": platform.python_version()}


def commit(root: Path = ROOT) -> str:
    """Hash of the checkout that runs; "+dirty" if it differs from that; "unknown" outside a checkout."""
    if not (root / ".git").exists():
        return "unknown"
    try:
        head, changes = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if changes else "")


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", root, *words], check=True, capture_output=True, text=True).stdout.strip()


# -- the table


def table_rows(figures: Stats) -> list[tuple[str, str]]:
    """(name, text) of every line of the table."""
    return [
        ("size", f"{figures['parameters'] / 1e6:,.1f} M parameters, {figures['dtype']}"),
        ("mode", f"{figures['mode']}, overlap {'on' if figures['overlap'] else 'off'}"),
        ("attention", figures["attention_backend"]),
        ("tokens", f"{figures['prompt_tokens']:,} prompt + {figures['output_tokens']:,} output"),
        ("time", f"{figures['seconds']:.2f} s"),
        ("output", f"{figures['output_tokens_per_s']:,.1f} tok/s"),
        ("total", f"{figures['total_tokens_per_s']:,.1f} tok/s"),
        *[(name, latency_text(figures[key])) for name, key in (("TTFT", "ttft_ms"), ("ITL", "itl_ms"))],
        *[(f"card {card['card']}", card_text(card)) for card in figures["cards"]],
        ("host", f"{figures['host']['loop_ms']:.3f} ms loop, {figures['host']['launch_ms']:.3f} ms launch, a step"),
        ("copies", copy_text(figures["copies"])),
    ]


def latency_text(percentiles: dict[str, float | None]) -> str:
    return ", ".join(f"{name.upper()} {'-' if ms is None else f'{ms:,.2f} ms'}" for name, ms in percentiles.items())


def card_text(card: Stats) -> str:
    work = [f"{kind} {alone_tokens(card, kind):,} tokens in {card[f'{kind}_steps']:,} steps, {rate_text(card, kind)}"
            for kind in ("prefill", "decode")]  # fmt: skip
    if card["mixed_steps"]:
        work.append(mixed_text(card))
    if card["lent_steps"]:
        work.append(lent_text(card))
    return f"{card['busy_share']:.1%} busy; {'; '.join(work)}; {card['kv_blocks']:,} blocks; {card['device']}"


def alone_tokens(card: Stats, kind: str) -> int:
    """Tokens of the steps of one kind only."""
    lent_tokens = card["lent_tokens"] if kind == "prefill" else 0
    return int(card[f"{kind}_tokens"] - card[f"mixed_{kind}_tokens"] - lent_tokens)


def rate_text(card: Stats, kind: str) -> str:
    """Of the steps of one kind only: a mixed step's time is neither's."""
    seconds = card[f"{kind}_seconds"]
    return f"{alone_tokens(card, kind) / seconds:,.0f} tok/s" if seconds else "-"


def mixed_text(card: Stats) -> str:
    steps, prefill, decode = (card[f"mixed_{name}"] for name in ("steps", "prefill_tokens", "decode_tokens"))
    return f"both {prefill:,} + {decode:,} tokens in {steps:,} steps of {card['mixed_seconds'] / steps * 1e3:.2f} ms"


def lent_text(card: Stats) -> str:
    mean_ms = {name: card[f"{name}_seconds"] / max(1, card[f"{name}_steps"]) * 1e3 for name in ("lent", "beside_lent")}
    lent = f"lent {card['lent_tokens']:,} tokens in {card['lent_steps']:,} steps of {mean_ms['lent']:.2f} ms"
    return f"{lent} beside {card['beside_lent_steps']:,} decode steps of {mean_ms['beside_lent']:.2f} ms"


def copy_text(copies: Stats) -> str:
    text = copied_text(copies)
    return text + "".join(
        f"; {name.replace('to', ' to ')}: {copied_text(part)}" for name, part in copies["by_route"].items()
    )


def copied_text(copies: Stats) -> str:
    rate = "" if copies["gb_per_s"] is None else f", {copies['gb_per_s']:.2f} GB/s"
    return f"{copies['copied_blocks']:,} blocks, {copies['copied_bytes'] / 1e6:,.1f} MB{rate}"
