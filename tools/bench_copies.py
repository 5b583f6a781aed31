"""Time copies of scattered KV blocks between two cards, each way, idle and while prefill runs on the source card.

    python tools/bench_copies.py                       # two GPUs
    python tools/bench_copies.py --shapes 8b --blocks 64 --batch
    python tools/bench_copies.py --device cpu          # runs anywhere; the rates mean nothing

A copy is queued behind work that lasts longer than queueing it takes, as an engine queues it behind the step that
writes its source; GB/s is by the copy's own events from there to its end, median. The load is the largest GEMM of an
8B prefill chunk, back to back on a stream of the source card. Columns: GB/s, what launching the copy cost its thread,
and the share of their rate that the GEMMs lost while it lasted (blank where that was too short to tell). --batch adds
one call of cuMemcpyBatchAsync (needs cuda-bindings). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.engine.block_copies import PeerWay
from nanovllm.engine.kv_cache import CopyHandle, KVCache
from nanovllm.models.model_config import ModelConfig

LAYERS = {"8b": 36, "0.6b": 28}  # of 4,096 bytes a token and layer in bf16: blocks of 64 tokens are 9 and 7 MiB
POOL_BLOCKS = 1024
STAGED_BLOCKS = 64  # larger copies through the host would only take longer
GATE_GEMMS, AHEAD_GEMMS = 24, 12  # in front of a copy, and kept queued while it lasts; one takes about 0.6 ms
GATE_CYCLES = 24_000_000  # about 12 ms: in front of a copy on an idle card


@dataclass(frozen=True)
class Way:
    """One row of the table. priority: of the stream that the caller hands over; only kernels heed it."""

    name: str  # "engines", "push", "staged", "batch" or "host"
    streams: int = 1
    programs: int = 0
    priority: int = 0

    def __str__(self) -> str:
        detail = {
            "engines": f"{self.streams} stream(s)",
            "push": f"{self.programs} programs{', high priority' if self.priority else ''}",
        }
        return f"{self.name} {detail.get(self.name, '')}".rstrip()


WAYS = (
    *(Way("engines", streams=count) for count in (1, 2, 4)),
    *(Way("push", programs=count, priority=priority) for priority in (0, -1) for count in (16, 32, 64, 132)),
    Way("staged"),
)


def make_cache(layers: int, tokens: int, num_blocks: int, device: torch.device) -> KVCache:
    """A pool of Qwen3's KV shape with that many layers, random contents."""
    config = ModelConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=64,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        dtype="bfloat16",
        rope_scaling=None,
        eos_token_ids=(),
    )
    cache = KVCache(num_blocks, tokens, config, torch.bfloat16, device)
    cache.pages.normal_()
    synchronize(device)
    return cache


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_pairs(count: int, num_blocks: int) -> list[tuple[int, int]]:
    rng = random.Random(count)
    return list(zip(rng.sample(range(num_blocks), count), rng.sample(range(num_blocks), count), strict=True))


class Idle:
    """Nothing but one sleeping thread in front of a copy."""

    name = "idle"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def gate(self) -> torch.cuda.Event:
        """The event that the next copy waits for."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            torch.cuda._sleep(GATE_CYCLES)
            return self.stream.record_event()

    def keep_up(self, handle: CopyHandle) -> None:
        """Until the copy is done."""
        handle.wait()

    def lost(self, handle: CopyHandle) -> float | None:
        return None


class Gemms(Idle):
    """GEMMs of a prefill chunk, never fewer than `AHEAD_GEMMS` queued, an event behind each."""

    name = "load"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        kind: Any = {"dtype": torch.bfloat16, "device": device}
        self.rows, self.weight = torch.randn(2048, 4096, **kind), torch.randn(4096, 24576, **kind) / 64
        self.result = torch.empty(2048, 24576, **kind)
        torch.cuda.synchronize(device)
        self.base = torch.cuda.Event(enable_timing=True)
        self.ends: list[torch.cuda.Event] = []
        self.gate()  # not counted: the first calls
        torch.cuda.synchronize(device)
        self.gate()
        torch.cuda.synchronize(device)
        self.alone_ms = self.ends[4].elapsed_time(self.ends[-1]) / (len(self.ends) - 5)

    def gate(self) -> torch.cuda.Event:
        self.ends = []
        self.base.record(self.stream)
        self.queue(GATE_GEMMS + AHEAD_GEMMS)
        return self.ends[GATE_GEMMS - 1]

    def queue(self, count: int) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            for _ in range(count):
                torch.mm(self.rows, self.weight, out=self.result)
                self.ends.append(torch.cuda.Event(enable_timing=True))
                self.ends[-1].record(self.stream)

    def keep_up(self, handle: CopyHandle) -> None:
        while not handle.done():
            if self.ends[-AHEAD_GEMMS].query():
                self.queue(2)
            else:
                time.sleep(1e-4)

    def lost(self, handle: CopyHandle) -> float | None:
        """The share of their rate that the GEMMs lost while the copy lasted; call when the card is idle."""
        assert handle.event is not None and handle.seconds is not None
        end_ms = self.base.elapsed_time(handle.event)
        begin_ms = end_ms - handle.seconds * 1e3
        inside = [at for at in (self.base.elapsed_time(end) for end in self.ends) if begin_ms <= at <= end_ms]
        if len(inside) < 3:
            return None
        return 1 - self.alone_ms * (len(inside) - 1) / (inside[-1] - inside[0])


def set_way(source: KVCache, way: Way) -> None:
    if way.name == "staged":
        source._peer = False
    elif source._peer is False:
        source._peer = None  # to be asked again
    if way.name == "engines":
        source.peer_way = PeerWay("engines", streams=way.streams)
    elif way.name == "push":
        source.peer_way = PeerWay("push", programs=way.programs)


def launch(
    way: Way, source: KVCache, target: KVCache, pairs: list[tuple[int, int]], stream: Any, after: list[Any]
) -> CopyHandle:
    if way.name == "batch":
        return batch_copy(source, target, pairs, stream, after)
    return source.mirror_to(target, pairs, stream, after)


def batch_copy(
    source: KVCache, target: KVCache, pairs: list[tuple[int, int]], stream: Any, after: list[Any]
) -> CopyHandle:
    """Every block by one driver call. No part of the library: to see what it would save."""
    from cuda.bindings import driver

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for event in after:
        stream.wait_event(event)
    attributes = driver.CUmemcpyAttributes()
    attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    attributes.flags = int(driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)
    size = source.block_bytes
    targets = [driver.CUdeviceptr(target.pages.data_ptr() + dst * size) for _, dst in pairs]
    sources = [driver.CUdeviceptr(source.pages.data_ptr() + src * size) for src, _ in pairs]
    with torch.cuda.stream(stream):
        start.record(stream)
        (status, *_) = driver.cuMemcpyBatchAsync(
            targets, sources, [size] * len(pairs), len(pairs), [attributes], [0], 1, driver.CUstream(stream.cuda_stream)
        )
        end.record(stream)
    if int(status) != 0:
        raise RuntimeError(f"cuMemcpyBatchAsync: {status}")
    return CopyHandle(len(pairs) * size, start=start, event=end)


def measure(
    way: Way,
    source: KVCache,
    target: KVCache,
    pairs: list[tuple[int, int]],
    stream: Any,
    load: Idle | None,
    repeats: int,
) -> dict[str, float | None]:
    """Medians over `repeats` copies. `check` comes first."""
    rates, host_ms, lost = [], [], []
    for _ in range(repeats):
        after = [load.gate()] if load else []
        started = time.perf_counter()
        handle = launch(way, source, target, pairs, stream, after)
        host_ms.append((time.perf_counter() - started) * 1e3)
        if load:
            load.keep_up(handle)
        synchronize(source.device)
        assert handle.seconds is not None
        rates.append(handle.num_bytes / max(handle.seconds, 1e-9) / 1e9)
        if load and (share := load.lost(handle)) is not None:
            lost.append(share)
    return {
        "gb_per_s": statistics.median(rates),
        "lowest_gb_per_s": min(rates),
        "host_ms": statistics.median(host_ms),
        "gemms_lost": statistics.median(lost) if lost else None,
    }


def check(way: Way, source: KVCache, target: KVCache, stream: Any) -> None:
    """Make `source` copy that way. One small copy must be right; it is also the first call, which nothing times."""
    set_way(source, way)
    if source.copy_way(target) != way.name and way.name != "batch":
        raise RuntimeError(f"asked for {way.name}, got {source.copy_way(target)}")
    target.pages[:8].zero_()
    synchronize(target.device)
    pairs = [(i, 7 - i) for i in range(8)]
    launch(way, source, target, pairs, stream, []).wait()
    expected = source.pages[[src for src, _ in pairs]].cpu()
    if not torch.equal(target.pages[[dst for _, dst in pairs]].cpu(), expected):
        raise RuntimeError(f"{way} copied something else")


def describe(row: dict[str, Any]) -> str:
    lost = f"{row['gemms_lost']:.0%} of GEMMs lost" if row["gemms_lost"] is not None else ""
    size = f"{row['blocks']:4} x {row['mib']:.2f} MiB"
    return f"{size}  {row['way']:32} {row['load']}  {row['gb_per_s']:7.1f} GB/s  {row['host_ms']:6.2f} ms host  {lost}"


def measure_shape(name: str, args: argparse.Namespace, devices: list[torch.device], ways: list[Way]) -> list[Any]:
    on_gpu = devices[0].type == "cuda"
    layers, tokens, num_blocks = (LAYERS[name], args.block_tokens, POOL_BLOCKS) if on_gpu else (1, 16, 64)
    source, target = (make_cache(layers, tokens, num_blocks, device) for device in devices)
    loads: list[Idle | None] = [Idle(devices[0]), Gemms(devices[0])] if on_gpu else [None]
    # Made once: torch hands out the same 32 again and again, and a copy must not share the load's.
    streams = {at: torch.cuda.Stream(devices[0], priority=at) if on_gpu else None for at in (0, -1)}
    rows: list[Any] = []
    for way in ways:
        check(way, source, target, streams[way.priority])
        for load in loads:
            for blocks in args.blocks if way.name != "staged" else [STAGED_BLOCKS]:
                pairs = make_pairs(min(blocks, num_blocks), num_blocks)
                result = measure(way, source, target, pairs, streams[way.priority], load, args.repeats)
                parts = {"streams": way.streams, "programs": way.programs, "priority": way.priority}
                head = {"shape": name, "mib": source.block_bytes / 2**20, "blocks": len(pairs), "way": str(way)}
                rows.append({**head, **parts, "load": load.name if load else "none", **result})
                print(describe(rows[-1]), flush=True)
    if on_gpu:
        print(f"{name}: one GEMM alone {loads[-1].alone_ms:.3f} ms\n", flush=True)  # type: ignore[union-attr]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=sorted(LAYERS), default=["8b", "0.6b"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[16, 64, 128, 512])
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", action="store_true", help="also one call of cuMemcpyBatchAsync")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu and torch.cuda.device_count() < 2:
        raise SystemExit(f"needs two CUDA devices, this machine has {torch.cuda.device_count()}")
    devices = [torch.device(args.device, i) if on_gpu else torch.device("cpu") for i in range(2)]
    ways = [*([Way("batch")] if args.batch else []), *WAYS] if on_gpu else [Way("host")]
    rows = [row for shape in args.shapes for row in measure_shape(shape, args, devices, ways)]
    card = torch.cuda.get_device_name(0) if on_gpu else "cpu"
    print(json.dumps({"device": card, "torch": torch.__version__, "repeats": args.repeats, "rows": rows}))


if __name__ == "__main__":
    main()
