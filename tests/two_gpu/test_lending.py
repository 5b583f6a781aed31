"""An engine on two real cards that lends SMs of its decode card: one card's tokens, and nothing left afterwards."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python", exc_type=ImportError)

from nanovllm import DEMO_MODEL, LLM, SamplingParams  # noqa: E402
from nanovllm.engine import scheduler  # noqa: E402
from tests.counters import compiles, graph_calls  # noqa: E402
from tests.random_work import TINY, Work, answers, check_nothing_left, check_same  # noqa: E402


@pytest.fixture(autouse=True)
def help_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo checkpoint's prompts never wait for long."""
    monkeypatch.setattr(scheduler, "HELP_AFTER_S", 0.0)


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
