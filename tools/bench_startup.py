"""Time the start of an engine, by part, from a checkpoint folder that lies in the page cache; cold, then warm.

    python tools/bench_startup.py --shape 8b                     # one GPU; --two-gpus: two
    python tools/bench_startup.py --shape demo --device cpu      # runs anywhere; the times mean nothing

Writes random bf16 weights of a published shape, in shards as Hugging Face names them, into a temporary folder: in
/dev/shm if there is room, else where temporary files go. Two fresh processes then build an `LLM` from it and generate
one token: cold with empty compile caches (Triton's and CUDA's), warm with those that the first one left. The file
system's cache is warm in both, for weights and libraries. `LLM.startup` gives the parts; `spawn_to_ready_s` and
`spawn_to_first_token_s` also count the interpreter's start. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for what lies beside the package

import bench
import bench_report
from nanovllm import DEMO_MODEL

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = [*bench.SHAPES, "demo"]  # the shipped checkpoint's sizes, for machines without a GPU
MAX_SHARD_BYTES = 4 * 10**9
ROOM = 1.1  # of the weights' bytes, for the rest of the folder and the compile caches
SHARED_MEMORY = Path("/dev/shm")


def main() -> None:
    args = make_parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: the temporary folder goes
    if args.step:
        print(json.dumps(STEPS[args.step](args)))
    else:
        print_figures(run(args))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--two-gpus", action="store_true", help="prefill on one card, decode on another")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="as in nanovllm.Config")
    parser.add_argument("--num-kvcache-blocks", type=int, metavar="N", help="as in nanovllm.Config")
    parser.add_argument("--tmp-dir", type=Path, help="where the folder is made")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--spawned-at", type=float, help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the folder, start twice from it, remove it."""
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as probe:
        num_bytes = num_weight_bytes(write_config(Path(probe), args.shape))
    with tempfile.TemporaryDirectory(prefix="bench-startup-", dir=args.tmp_dir or roomy_place(num_bytes)) as name:
        folder = Path(name)
        write_config(folder, args.shape)
        written = in_own_process(args, "write", folder)
        cold, warm = (in_own_process(args, "start", folder) for _ in range(2))
    identity = {key: cold.pop(key) for key in ("devices", "dtype", "attention_backend", "versions")}
    for key in identity:
        warm.pop(key)
    sizes = {"shape": args.shape, "weight_bytes": num_bytes, **written}
    return {**sizes, "cold": cold, "warm": warm, "two_gpus": args.two_gpus, **identity, "commit": bench_report.commit()}


def write_config(folder: Path, shape: str) -> Path:
    if shape == "demo":
        shutil.copy(Path(DEMO_MODEL) / "config.json", folder)
        return folder
    return bench.write_shape(folder, shape)


def num_weight_bytes(folder: Path) -> int:
    from nanovllm.models.model_config import load_model_config

    return 2 * load_model_config(folder).num_parameters()


def roomy_place(num_bytes: int) -> Path:
    """Shared memory if it holds the folder, else the place of temporary files; `SystemExit` if neither does."""
    for place in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        if place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free > ROOM * num_bytes:
            return place
    sys.exit(f"error: no room for {ROOM * num_bytes / 1e9:.1f} GB; --tmp-dir names another place")


def in_own_process(args: argparse.Namespace, step: str, folder: Path) -> dict[str, Any]:
    """Run one step in a fresh interpreter; the JSON object it prints last."""
    given = {"max-num-seqs": args.max_num_seqs, "num-kvcache-blocks": args.num_kvcache_blocks}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += ["--two-gpus"] * args.two_gpus + [f"--device={args.device}", f"--folder={folder}"]
    caches = {"TRITON_CACHE_DIR": str(folder / "triton"), "CUDA_CACHE_PATH": str(folder / "cuda")}
    command = [sys.executable, __file__, f"--step={step}", *options, f"--spawned-at={time.monotonic()}"]
    done = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {step} failed with exit status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return result


# -- writing the folder


def write_weights(args: argparse.Namespace) -> dict[str, Any]:
    """Random bf16 weights for the folder's config, in shards of at most `MAX_SHARD_BYTES`, and their index."""
    from safetensors.torch import save_file

    started = time.perf_counter()
    shards = split_into_shards(checkpoint_shapes(args.folder))
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({key: random_weight(shape) for key, shape in shapes.items()}, args.folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
    (args.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return {"shards": len(shards), "write_s": time.perf_counter() - started}


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the folder's model, from a model without storage."""
    import torch

    from nanovllm.layers.attention import make_attention_backend
    from nanovllm.models.model_config import load_model_config
    from nanovllm.models.qwen3 import Qwen3ForCausalLM

    config = load_model_config(folder)
    attention = make_attention_backend("torch", config, torch.device("cpu"), torch.bfloat16)
    model = Qwen3ForCausalLM(config, attention, torch.bfloat16, torch.device("meta"), max_position_tokens=1)
    return {name: tuple(slot.shape) for name, slot in model.checkpoint_slots().items()}


def split_into_shards(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """In order, as many to a shard as fit."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = MAX_SHARD_BYTES
    for name, shape in shapes.items():
        num_bytes = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        if num_bytes > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = shape
        room -= num_bytes
    return shards


def random_weight(shape: tuple[int, ...]) -> Tensor:
    """bf16 in host memory, scaled as `load_format="dummy"` scales it; drawn on a GPU where there is one."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, shape[1] ** -0.5).cpu()


# -- one start


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Build the engine and generate one token; the parts, and what ran."""
    from nanovllm import LLM, SamplingParams

    given = {"max_num_seqs": args.max_num_seqs, "num_kvcache_blocks": args.num_kvcache_blocks}
    options = {name: value for name, value in given.items() if value is not None}
    with LLM(str(args.folder), device=args.device, enable_two_gpu_pd=args.two_gpus, **options) as llm:
        ready_s = time.monotonic() - args.spawned_at
        llm.generate([[0]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        totals = {"spawn_to_ready_s": ready_s, "spawn_to_first_token_s": time.monotonic() - args.spawned_at}
        identity = bench_report.identity(llm)
    kept = {key: identity[key] for key in ("devices", "dtype", "attention_backend", "versions")}
    return {**llm.startup, **totals, **kept}


STEPS = {"write": write_weights, "start": start}


def print_figures(figures: dict[str, Any]) -> None:
    size = f"{figures['weight_bytes'] / 1e9:.2f} GB in {figures['shards']} shard(s)"
    print(f"shape {figures['shape']}, {size}, written in {figures['write_s']:.1f} s; {', '.join(figures['devices'])}")
    print(f"{'seconds':<24}{'cold':>8}{'warm':>8}")
    for part, cold in figures["cold"].items():
        print(f"{part.removesuffix('_s'):<24}{cold:8.2f}{figures['warm'][part]:8.2f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
