"""The line that the log begins with: what an engine found, and what it chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import torch

from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner

PEER_ACCESS = {
    "engines": "peer access, copy engines",
    "push": "peer access, a kernel",
    "staged": "no peer access, staged",
}


def start_line(config: Config, runners: Sequence[ModelRunner], rates: Mapping[tuple[int, int], float]) -> str:
    """Devices, links, blocks by card, backends and the decode pipeline's mode.

    runners: by card. rates: measured GB/s, by (source's card, target's card); none on a CPU.
    """
    cards = [_card(card, runner) for card, runner in enumerate(runners)]
    links = [_link(runners, src, dst, rates.get((src, dst))) for src, dst in permutations(range(len(runners)), 2)]
    decode = runners[-1]
    roles = [f"roles: {config.pd_roles}"] if len(runners) > 1 else []
    roles += [f"lent SMs: {_lent_sms(decode)}"] if config.lend_sms is not None else []
    chosen = [f"attention: {decode.model.attention.name}", f"graphs: {'none' if decode.graphs is None else 'captured'}"]
    return "; ".join([*cards, *links, *roles, *chosen, f"decode pipeline: {_pipeline(decode)}"])


def _card(card: int, runner: ModelRunner) -> str:
    device, cache = runner.device, runner.kv_cache
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    dtype = str(runner.model.dtype).removeprefix("torch.")
    return f"card {card}: {device}{name}, {dtype}, {cache.num_blocks} blocks of {cache.block_size} tokens"


def _link(runners: Sequence[ModelRunner], src: int, dst: int, rate: float | None) -> str:
    way = runners[src].kv_cache.copy_way(runners[dst].kv_cache)
    measured = "" if rate is None else f", {rate:.0f} GB/s"
    return f"link {src} → {dst}: {PEER_ACCESS.get(way, 'host memory')}{measured}"


def _lent_sms(runner: ModelRunner) -> str:
    """Those of decode steps and of prompts."""
    if not runner.lends:
        return "none"
    return "undivided" if runner.lent_sms is None else "{}:{}".format(*runner.lent_sms)


def _pipeline(runner: ModelRunner) -> str:
    statistics = runner.get_pipeline_statistics()
    if not statistics:
        return "disabled"
    mode, cause = statistics["mode_running"], statistics["fallback_cause"]
    return mode if cause is None else f"{mode} ({cause})"
