"""The engine on one real card, float32 and the demo checkpoint: the CPU's greedy tokens, overlap against its twin."""

from __future__ import annotations

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from tests.random_work import TINY, Work, answers, check_nothing_left, check_same

PROMPTS = ["def fibonacci(n):", "import os", "class Stack:\n    def __init__(self", "for i in range("]


def test_greedy_text_is_the_cpus() -> None:
    params = SamplingParams(temperature=0, max_tokens=100)
    texts = []
    for options in ({"device": "cpu"}, {"device": "cuda", "dtype": "float32"}):
        with LLM(DEMO_MODEL, **options) as llm:
            texts.append([out.outputs[0].token_ids for out in llm.generate(PROMPTS, params, use_tqdm=False)])
            check_nothing_left(llm)
    assert texts[0] == texts[1]


def test_overlap_gives_the_twins_tokens() -> None:
    work = Work.random(11, vocab_size=4096)
    with LLM(DEMO_MODEL, device="cuda", dtype="float32", overlap=False, max_model_len=512) as llm:
        reference = answers(llm, work, abort_seed=None)
    with LLM(DEMO_MODEL, device="cuda", dtype="float32", num_kvcache_blocks=18, **TINY) as llm:
        got = answers(llm, work, abort_seed=1)
        check_nothing_left(llm)
        assert llm.stats()["recomputes"] > 0
    assert check_same(got, reference) > 5
