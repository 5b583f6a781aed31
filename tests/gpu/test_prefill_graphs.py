"""Captured prefill steps against eager ones: first tokens and their log-probabilities, float32, the demo checkpoint."""

from __future__ import annotations

import random

import pytest

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.engine import prefill_graphs
from tests.counters import graph_calls

PARAMS = SamplingParams(temperature=0, max_tokens=1, logprobs=3)
NUM_LITTLE_PADDED = 11  # steps of `batches` that are alone in them and close to a size
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 500, 767, 768, 769, 1500, 2047, 2048, 2049, 3000)
Answer = list[tuple[int, float]]


def prompts_of(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4000) for _ in range(length)] for length in lengths]


def batches() -> list[list[list[int]]]:
    """Alone at every edge of a size; two to nine together, and eight of which a size is nearly full; and a second turn,
    whose beginning is cached."""
    alone = [[prompt] for prompt in prompts_of(LENGTHS, 0)]
    together = [prompts_of(LENGTHS[first : first + count], count) for first, count in ((0, 2), (3, 5), (0, 8), (2, 9))]
    together.append(prompts_of((200, 250, 150, 199, 201, 185, 215, 200), 7))
    return alone + together + [[prompt + [7, 8, 9, 10]] for batch in alone[-6:] for prompt in batch]


def answers(options: dict[str, object]) -> tuple[list[Answer], int]:
    found = []
    with LLM(DEMO_MODEL, device="cuda", dtype="float32", max_model_len=4096, num_kvcache_blocks=600, **options) as llm:
        with graph_calls("replay") as replays:
            for batch in batches():
                for output in llm.generate(batch, PARAMS, use_tqdm=False):
                    (logprobs,) = output.outputs[0].logprobs
                    found.append([(token, entry.logprob) for token, entry in logprobs.items()])
    return found, len(replays)


def test_captured_steps_equal_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As this small model's steps are captured, and as those of a model which keeps the card busy: of few sequences,
    and with little padding."""
    eager, num_replays = answers({"enforce_eager": True})
    assert num_replays == 0
    for flops, fewest in ((prefill_graphs.LAUNCH_BOUND_FLOPS, len(batches()) - 2), (0.0, NUM_LITTLE_PADDED)):
        monkeypatch.setattr(prefill_graphs, "LAUNCH_BOUND_FLOPS", flops)
        captured, num_replays = answers({})
        assert num_replays >= fewest, "most of these steps fit a captured size"
        for mine, theirs in zip(captured, eager, strict=True):
            assert mine[0][0] == theirs[0][0] or abs(theirs[0][1] - theirs[1][1]) < 1e-3
            assert dict(mine)[mine[0][0]] == pytest.approx(dict(theirs).get(mine[0][0], float("nan")), abs=1e-3)
