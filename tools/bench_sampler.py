"""Time a decode step's sampling at Qwen3's vocabulary: own kernels in a CUDA graph, and plain torch (`sample`), eager.

    python tools/bench_sampler.py            # needs one GPU, and nanovllm installed or on PYTHONPATH; about 25 s
    python tools/bench_sampler.py --sweep    # also slices and tiles other than the kernels' own

Microseconds are of one step: penalties where asked, the draw, and counting the drawn ids. A graph holds several steps
at different positions, since how many passes a row takes depends on its draw. First, each case's draws are compared
with `sample`'s. Logits are normal, of scale 1 (flat: the likeliest 20 of 151,936 ids have less than a percent) and 8
(peaked: as a model's). GB/s counts the logits once, so that 4,000 or so is the floor of one pass. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nanovllm.kernels.filtered_race import Sizes, filtered_race
from nanovllm.kernels.penalties import apply_penalties_, count_
from nanovllm.kernels.race import race
from nanovllm.layers.sampler import SamplingBatch, sample
from nanovllm.sampling_params import SamplingParams

VOCAB = 151_936
BATCHES = [1, 8, 64, 256, 512]
SCALES = {"flat": 1.0, "peaked": 8.0}
STEPS_PER_GRAPH, REPLAYS, EAGER_STEPS = 8, 3, 2
PENALTIES: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
CASES = {
    "greedy": SamplingParams(temperature=0),
    "random": SamplingParams(temperature=0.6),
    "top_k=20": SamplingParams(temperature=0.6, top_k=20),
    "top_p=0.9": SamplingParams(temperature=0.6, top_p=0.9),
    "all three": SamplingParams(temperature=0.6, top_k=20, top_p=0.9, min_p=0.02),
    "penalties": SamplingParams(temperature=0.6, **PENALTIES),
}
SWEEP = [Sizes(), Sizes(slice=2048), Sizes(slice=8192), Sizes(row_tile=1024), Sizes(row_tile=4096)]


class Step(NamedTuple):
    """A batch whose rows share their parameters, at one position. floats and integers: as the engine's slots."""

    batch: SamplingBatch
    params: SamplingParams
    logits: Tensor
    rows: Tensor
    floats: Tensor
    integers: Tensor
    table: Tensor

    @classmethod
    def new(cls, params: SamplingParams, logits: Tensor, table: Tensor, position: int) -> Step:
        n, device = len(logits), logits.device
        batch = SamplingBatch.from_params([params] * n, range(n), [position] * n, device, **masks(params, table, n))
        columns = [batch.temperature, batch.top_p, batch.min_p, batch.presence, batch.frequency, batch.repetition]
        integers = [batch.position, batch.position, batch.position, batch.seed, batch.top_k, batch.top_k * 0]
        rows = torch.arange(n, device=device)
        return cls(batch, params, logits, rows, torch.stack(columns, 1), torch.stack(integers, 1), table)

    def run(self, sizes: Sizes = Sizes()) -> Tensor:  # noqa: B008 (frozen)
        """By own kernels. Penalties change the logits: a benchmark may let them pile up."""
        temperature, top_p, min_p, presence, frequency, repetition = self.floats.unbind(1)
        _, _, position, seed, top_k, min_tokens = self.integers.unbind(1)
        if self.params.has_penalty:
            apply_penalties_(self.logits, self.rows, self.table, presence, frequency, repetition, min_tokens, position)
        if self.params.top_k or self.params.top_p < 1 or self.params.min_p:
            inputs = self.logits, self.rows, temperature, top_k, top_p, min_p, seed, position
            tokens = filtered_race(*inputs, sizes=sizes)
        else:
            greedy = self.params.is_greedy
            tokens = race(self.logits, self.rows, temperature, seed, position, any_random=not greedy)
        if self.params.has_penalty:
            count_(self.table, self.rows, tokens)
        return tokens


def masks(params: SamplingParams, table: Tensor, num_rows: int) -> dict[str, Tensor]:
    return {"output_counts": table[:num_rows]} if params.has_penalty else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="also time other slices and tiles")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    normal = torch.randn(max(BATCHES), VOCAB, device=device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, V {VOCAB}")
    print(f"{'logits':>7} {'case':>10} {'batch':>5} {'us':>9} {'GB/s':>6} {'torch us':>10} {'ratio':>6}  differ")
    rows = [measure(normal, scale, case, batch_size) for scale in SCALES for case in CASES for batch_size in BATCHES]
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "vocab": VOCAB, "rows": rows}
    if args.sweep:
        report["sweep"] = sweep(normal)
    print(json.dumps(report | {"torch": torch.__version__, "triton": triton.__version__}))


def measure(normal: Tensor, scale: str, case: str, batch_size: int) -> dict[str, Any]:
    steps = new_steps(normal, scale, case, batch_size)
    differ = num_different(steps)
    own_us = time_graph([step.run for step in steps])
    torch_us = time_eager([partial(sample, step.logits, step.batch) for step in steps[:EAGER_STEPS]])
    gb_per_s = batch_size * VOCAB * 4 / own_us / 1e3
    print(
        f"{scale:>7} {case:>10} {batch_size:5} {own_us:9.1f} {gb_per_s:6.0f} {torch_us:10.1f} {torch_us / own_us:6.1f}"
        f"  {differ}",
        flush=True,
    )
    times = {"us": round(own_us, 2), "torch_us": round(torch_us, 1), "differ": differ}
    return {"logits": scale, "case": case, "batch": batch_size} | times


def new_steps(normal: Tensor, scale: str, case: str, batch_size: int) -> list[Step]:
    logits = normal[:batch_size] * SCALES[scale]
    table = torch.zeros(batch_size + 1, VOCAB, dtype=torch.int32, device=normal.device)
    table[:, ::500] = 2
    return [Step.new(CASES[case], logits, table, position) for position in range(STEPS_PER_GRAPH)]


def num_different(steps: Sequence[Step]) -> int:
    """Rows drawn otherwise than by `sample`, which float32 may cause once in a million; stop if there are many."""
    want = sample(steps[0].logits, steps[0].batch)
    got = steps[0]._replace(logits=steps[0].logits.clone(), table=steps[0].table.clone()).run()
    differ = int((got != want).sum())
    assert differ <= 1, f"{differ} of {len(want)} rows differ: {steps[0].params}"
    return differ


def sweep(normal: Tensor) -> list[dict[str, Any]]:
    results = []
    for case in ("top_k=20", "top_p=0.9"):
        for scale in SCALES:
            for batch_size in (1, 64, 512):
                steps = new_steps(normal, scale, case, batch_size)
                for sizes in SWEEP:
                    us = time_graph([partial(step.run, sizes) for step in steps])
                    print(f"{scale:>7} {case:>10} {batch_size:5} {us:9.1f}  {sizes}", flush=True)
                    results.append({"logits": scale, "case": case, "batch": batch_size, "us": us, "sizes": str(sizes)})
    return results


def time_graph(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds a call, all of them in one graph; the best of some replays."""
    calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return min(elapsed_us(graph.replay) for _ in range(REPLAYS)) / len(calls)


def time_eager(calls: Sequence[Callable[[], object]]) -> float:
    calls[0]()
    return min(elapsed_us(call) for call in calls)


def elapsed_us(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


if __name__ == "__main__":
    main()
