"""An engine on two real cards that lends SMs of its decode card: one card's tokens, and nothing left afterwards."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python", exc_type=ImportError)

from bench import write_shape  # noqa: E402
from nanovllm import DEMO_MODEL, LLM, SamplingParams  # noqa: E402
from nanovllm.engine import placement  # noqa: E402
from nanovllm.engine.scheduler import Scheduler  # noqa: E402
from tests.counters import compiles, graph_calls  # noqa: E402
from tests.random_work import TINY, Work, answers, check_nothing_left, check_same  # noqa: E402
from tests.regret import BFLOAT16, Reference, release_gpu_memory  # noqa: E402

NUM_PROMPTS, LONGEST_PROMPT = 120, 900


@pytest.fixture(autouse=True)
def help_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo checkpoint's prompts never wait for long."""
    monkeypatch.setattr(placement, "HELP_AFTER_S", 0.0)


@pytest.mark.parametrize("seed", [11, 12])
def test_lending_under_pressure(seed: int) -> None:
    """Tiny pools, aborts while lent steps run, evacuations, siblings, write-backs."""
    work = Work.random(seed, vocab_size=4096)
    with LLM(DEMO_MODEL, device="cuda", dtype="float32", overlap=False, max_model_len=512) as llm:
        reference = answers(llm, work, abort_seed=None)
    options = dict(TINY, num_kvcache_blocks=(14, 30), dtype="float32", device="cuda", lend_sms=(60, 72))
    with LLM(DEMO_MODEL, enable_two_gpu_pd=True, **options) as llm:
        assert llm.stats()["lent_sms"] is not None, "no partitions here"
        with compiles() as late, graph_calls("capture_begin") as captured:
            got = answers(llm, work, abort_seed=1)
        check_nothing_left(llm)
        card = llm.stats()["card1"]
    assert late == [] and captured == []
    assert card["lent_steps"] > 0 and card["beside_lent_steps"] > 0 and card["mixed_steps"] == 0, card
    assert check_same(got, reference) > 5


def test_bfloat16_serves_at_full_size(caplog: pytest.LogCaptureFixture) -> None:
    """Steps of many prompts and rows, beside each other."""
    prompts = [[(7 * i + j) % 4000 + 3 for j in range(50 + i)] for i in range(400)]
    params = SamplingParams(temperature=0.7, max_tokens=64, seed=1, ignore_eos=True)
    with caplog.at_level(logging.INFO, "nanovllm"), LLM(DEMO_MODEL, enable_two_gpu_pd=True, lend_sms=(60, 72)) as llm:
        assert "lent SMs: 60:72" in caplog.text
        outputs = llm.generate(prompts, params, use_tqdm=False)
        check_nothing_left(llm)
        card = llm.stats()["card1"]
    assert card["lent_steps"] > 0, card
    assert all(len(out.outputs[0].token_ids) == 64 for out in outputs)


@pytest.fixture
def lent_requests(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ids of the requests of which a part of the prompt was computed on lent SMs, as time goes on."""
    ids: set[str] = set()
    launch_prefill = Scheduler._launch_prefill

    def noting(self: Any, card: int, step: int, chosen: Any, lent: bool = False) -> Any:
        ids.update(group.leader.request.request_id for group, _ in chosen if lent)
        return launch_prefill(self, card, step, chosen, lent)

    monkeypatch.setattr(Scheduler, "_launch_prefill", noting)
    return ids


def random_requests(rng: random.Random, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Uneven prompts and uneven greedy answers: slots come free while prompts queue."""
    lengths = [rng.randrange(1, LONGEST_PROMPT) for _ in range(NUM_PROMPTS)]
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    counts = [rng.randrange(24, 97) for _ in prompts]
    return prompts, [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in counts]


def test_lent_prompts_by_regret(tmp_path: Path, lent_requests: set[str]) -> None:
    """Random weights of a published shape in bfloat16: the answers to lent prompts by themselves, and all others, of
    which many decode beside lent steps."""
    options: dict[str, Any] = dict(device="cuda", dtype="bfloat16", load_format="dummy", max_model_len=1024)
    options |= dict(max_num_seqs=64, max_num_batched_tokens=512, num_kvcache_blocks=(1200, 1200), lend_sms=(60, 72))
    with LLM(write_shape(tmp_path, "0.6b"), enable_two_gpu_pd=True, **options) as llm:
        assert llm.stats()["lent_sms"] is not None, "no partitions here"
        prompts, params = random_requests(random.Random(13), llm.model_config.vocab_size)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        check_nothing_left(llm)
        card, reference = llm.stats()["card1"], Reference(llm)
    lent = [out for out in outputs if out.request_id in lent_requests]
    others = [out for out in outputs if out.request_id not in lent_requests]
    counts = {name: card[name] for name in ("lent_steps", "lent_tokens", "beside_lent_steps", "decode_steps")}
    regrets = {"lent": reference.measure(lent), "others": reference.measure(others)}
    print(f"{len(lent)} of {len(outputs)} requests were lent SMs; {counts}")
    for name, measured in regrets.items():
        print(f"{name}: {measured}")
    assert len(lent) >= 10 and len(others) >= 10 and min(counts.values()) >= 5
    for measured in regrets.values():
        measured.check(BFLOAT16)
    release_gpu_memory()
