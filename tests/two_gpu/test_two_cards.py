"""The engine on two real cards, float32 and the demo checkpoint: the CPU's tokens, and nothing left afterwards."""

from __future__ import annotations

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from tests.random_work import TINY, Work, answers, check_nothing_left, check_same

PROMPTS = ["def fibonacci(n):", "import os", "class Stack:\n    def __init__(self", "for i in range("]


def test_greedy_text_of_two_cards_is_the_cpus() -> None:
    params = SamplingParams(temperature=0, max_tokens=100)
    with LLM(DEMO_MODEL, device="cpu") as llm:
        expected = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params, use_tqdm=False)]
    with LLM(DEMO_MODEL, device="cuda", dtype="float32", enable_two_gpu_pd=True) as llm:
        assert llm.prefill_runner.device.index == 0 and llm.decode_runner.device.index == 1
        got = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params, use_tqdm=False)]
        check_nothing_left(llm)
    assert got == expected


def test_two_cards_against_one_under_pressure() -> None:
    """Tiny pools, aborts, evacuations, write-backs, with and without overlap."""
    work = Work.random(11, vocab_size=4096)
    with LLM(DEMO_MODEL, device="cuda", dtype="float32", overlap=False, max_model_len=512) as llm:
        reference = answers(llm, work, abort_seed=None)
    evacuations = 0
    for overlap in (False, True):
        options = dict(TINY, num_kvcache_blocks=(14, 18), overlap=overlap, dtype="float32", device="cuda")
        with LLM(DEMO_MODEL, enable_two_gpu_pd=True, **options) as llm:
            got = answers(llm, work, abort_seed=1)
            check_nothing_left(llm)
            stats = llm.stats()
        evacuations += stats["evacuations"]  # with overlap, how many depends on when each request arrived
        assert stats["write_backs"] > 0 and stats["copied_blocks"] > 0, stats
        assert check_same(got, reference) > 5
    assert evacuations > 0


def test_bfloat16_serves() -> None:
    with LLM(DEMO_MODEL, enable_two_gpu_pd=True) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.7, max_tokens=64, seed=1), use_tqdm=False)
        check_nothing_left(llm)
    assert all(out.outputs[0].finish_reason in ("stop", "length") for out in outputs)
