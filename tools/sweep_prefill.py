"""Check and time variants of the paged prefill kernels: TFLOP/s of the causal half, best first.

    python tools/sweep_prefill.py                 # needs one Hopper GPU, and nanovllm installed or on PYTHONPATH
    python tools/sweep_prefill.py tma             # only variants whose name contains one of the words
    PREFILL_VARIANTS=file.py python tools/sweep_prefill.py   # also those that `variants()` of a file gives

Every variant runs in a child process, which compiles all of its list in threads, compares each with float64 on
ragged chunks behind cached prefixes in a pool of NaN, and then times it in CUDA graphs. A child that is silent for
too long is killed; the next one goes on behind the variant that it was at. The last line is one JSON object.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from bench_attention import graph_seconds, scattered_tables
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.jit import JITFunction

from nanovllm.kernels.paged_prefill import (
    PrefillTiles,
    paged_prefill,
    paged_prefill_reference,
    store_kv,
    store_kv_reference,
)
from nanovllm.kernels.paged_prefill_hopper import TmaTiles, paged_prefill_tma

KV_HEADS, HEAD_DIM, PAGE, LAYERS, DTYPE = 8, 128, 64, 4, torch.bfloat16
HEADS = {"8B": 32, "0.6B": 16}
SHAPES = {"8x2048": (8, 2048), "2x8192": (2, 8192), "32x512": (32, 512), "32x2048": (32, 2048)}
ERROR_BOUND, CALLS_PER_GRAPH = 8e-3, 4
START_LIMIT_S, SILENCE_LIMIT_S = 60, 20  # of a child before its first variant, and between two lines after that
Run = Callable[..., Any]  # of q, k_pages, v_pages, block_tables, cu_seqlens_q, context_lens, max_query_tokens


def variants() -> dict[str, Run]:
    pointers = [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3)]
    tma = [(128, 64, 8, 2, 128), (128, 64, 8, 3, 255), (128, 64, 4, 2, 255), (64, 64, 4, 3, 168)]
    return {
        **{f"pointers {each}": partial(paged_prefill, tiles=PrefillTiles(*each)) for each in pointers},
        **{f"tma {each}": partial(paged_prefill_tma, tiles=TmaTiles(*each)) for each in tma},
        **more_variants(),
    }


def more_variants() -> dict[str, Run]:
    """Those of the file that PREFILL_VARIANTS names, if it is set."""
    path = os.environ.get("PREFILL_VARIANTS")
    if path is None:
        return {}
    spec = importlib.util.spec_from_file_location("more_prefill_variants", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # triton looks a kernel's module up by its name
    spec.loader.exec_module(module)
    more: dict[str, Run] = module.variants()
    return more


class Inputs(NamedTuple):
    arguments: tuple[Any, ...]
    kv: tuple[Tensor, Tensor]
    flops: float


def timed_inputs(heads: int, sequences: int, length: int) -> Inputs:
    """Whole prompts, their KV stored in scattered blocks."""
    tokens, columns = sequences * length, length // PAGE
    pages = torch.zeros(2 * sequences * columns, LAYERS, 2, PAGE, KV_HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    k_pages, v_pages = pages[:, 1, 0], pages[:, 1, 1]
    qkv = torch.randn(tokens, heads + 2 * KV_HEADS, HEAD_DIM, device="cuda").to(DTYPE)
    q, k, v = qkv.split([heads, KV_HEADS, KV_HEADS], dim=1)
    tables = scattered_tables(sequences, columns, pages.shape[0])
    token = torch.arange(length, device="cuda")
    store_kv(k, v, k_pages, v_pages, (tables.long()[:, token // PAGE] * PAGE + token % PAGE).flatten())
    starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
    contexts = torch.full((sequences,), length, dtype=torch.int32, device="cuda")
    flops = 4 * heads * HEAD_DIM * sequences * length * (length + 1) / 2
    return Inputs((q, k_pages, v_pages, tables, starts, contexts, length), (k, v), flops)


def checked_inputs(heads: int) -> tuple[Any, ...]:
    """Ragged chunks, also empty ones, behind cached prefixes; NaN wherever no context reaches."""
    query_lens, cached = (300, 1, 0, 64, 129, 37, 513), (0, 500, 0, 77, 64, 1000, 0)
    contexts = [queries + before for queries, before in zip(query_lens, cached, strict=True)]
    columns = -(-max(contexts) // PAGE) + 1
    num_blocks = columns * len(contexts)
    block_shape = (LAYERS, 2, PAGE, KV_HEADS, HEAD_DIM)
    pages = torch.full((num_blocks, *block_shape), float("nan"), dtype=DTYPE, device="cuda")
    k_pages, v_pages = pages[:, 2, 0], pages[:, 2, 1]
    tables = torch.randperm(num_blocks, device="cuda").int().view(len(contexts), columns)
    for row, context in enumerate(contexts):
        token = torch.arange(context, device="cuda")
        k, v = torch.randn(2, context, KV_HEADS, HEAD_DIM, device="cuda").to(DTYPE)
        store_kv_reference(k, v, k_pages, v_pages, tables[row].long()[token // PAGE] * PAGE + token % PAGE)
    q = torch.randn(sum(query_lens), heads + 16, HEAD_DIM, device="cuda").to(DTYPE)[:, :heads]
    starts = torch.tensor([0, *query_lens], device="cuda").cumsum(0).int()
    return q, k_pages, v_pages, tables, starts, torch.tensor(contexts, device="cuda").int(), max(query_lens)


def worst_error(run: Run, arguments: tuple[Any, ...]) -> float:
    """Of any query row, relative to its norm; infinite for NaN."""
    out = run(*arguments, out=torch.full(arguments[0].shape, float("nan"), dtype=DTYPE, device="cuda"))
    exact = paged_prefill_reference(*arguments[:-1])
    error = ((out.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max().item()
    return error if error == error else float("inf")


def compile_ahead(runs: list[Callable[[], Any]]) -> None:
    """Compile in many threads what `runs` launch, without launching it. What fails, fails again when it is run."""
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        return launch(self, *args, **(kwargs | {"warmup": True}))

    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        for run in runs:
            run()


# -- the child


def run_child(names: list[str]) -> None:
    """One line of JSON before a variant is touched, and one with its result."""
    torch.manual_seed(0)
    checks = {size: checked_inputs(heads) for size, heads in HEADS.items()}
    cases = {(s, shape): timed_inputs(HEADS[s], *SHAPES[shape]) for s in HEADS for shape in SHAPES}
    runs = {name: run for name, run in variants().items() if name in names}
    compile_ahead([partial(run, *each) for run in runs.values() for each in checks.values()])
    for name, run in runs.items():
        print(json.dumps({"begin": name}), flush=True)
        print(json.dumps({"name": name, **measure(run, checks, cases)}), flush=True)
    if "sdpa" in names:
        print(json.dumps({"name": "sdpa", **measure_sdpa(cases)}), flush=True)


def measure(run: Run, checks: dict[str, Any], cases: dict[tuple[str, str], Inputs]) -> dict[str, Any]:
    try:
        error = max(worst_error(run, arguments) for arguments in checks.values())
        if not error <= ERROR_BOUND:
            return {"failed": f"error {error:.1e}"}
        return {f"{s} {shape}": rate(each, partial(run, *each.arguments)) for (s, shape), each in cases.items()}
    except Exception as error:  # a variant that does not compile or launch: the others go on
        return {"failed": f"{type(error).__name__}: {error}"[:200]}


def rate(inputs: Inputs, call: Callable[[], Any]) -> float:
    return inputs.flops / graph_seconds([call] * CALLS_PER_GRAPH) / 1e12


def measure_sdpa(cases: dict[tuple[str, str], Inputs]) -> dict[str, float]:
    """Dense, torch's own choice of backend."""
    rates = {}
    for (s, shape), inputs in cases.items():
        split = (x.unflatten(0, (SHAPES[shape][0], -1)) for x in (inputs.arguments[0], *inputs.kv))
        q, k, v = (x.transpose(1, 2).contiguous() for x in split)
        call = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        rates[f"{s} {shape}"] = rate(inputs, call)
    return rates


# -- the parent


def read_lines(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def watch_child(names: list[str]) -> tuple[list[dict[str, Any]], str | None]:
    """Results of one child, and the variant that it was at when it fell silent or died (None: it finished)."""
    command = [sys.executable, __file__, "--child", *names]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=read_lines, args=(child.stdout, lines), daemon=True).start()
    results: list[dict[str, Any]] = []
    at, limit_s = None, START_LIMIT_S
    while True:
        try:
            line = lines.get(timeout=limit_s)
        except queue.Empty:
            child.kill()
            break
        limit_s = SILENCE_LIMIT_S
        if line is None:
            at = at if child.wait() else ""
            break
        if line.startswith("{"):
            message = json.loads(line)
            at = message.get("begin", at)
            if "name" in message:
                results.append(message)
                print(message, flush=True)
    if at is None:
        raise SystemExit("the child failed before its first variant")
    return results, at or None


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--child"]:
        return run_child(words[1:])
    names = [name for name in variants() if not words or any(word in name for word in words)] + ["sdpa"]
    results: list[dict[str, Any]] = []
    while names:
        done, stuck = watch_child(names)
        results += done
        if stuck is None:
            break
        print(f"STUCK or dead at: {stuck}", flush=True)
        names = names[names.index(stuck) + 1 :]
    for key in (f"{size} {shape}" for size in HEADS for shape in SHAPES):
        ranked = sorted(((each[key], each["name"]) for each in results if key in each), reverse=True)
        print(f"{key:14}" + "  ".join(f"{value:.0f} {name}" for value, name in ranked[:6]))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
