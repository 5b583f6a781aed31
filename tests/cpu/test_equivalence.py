"""One card, two cards, overlapped or not: the same tokens for the same 200 requests, and nothing left afterwards.

Greedy and sampled requests with shared prefixes, chunked prefill, stops by id and by string, penalties, siblings,
aborts at random steps, and pools so tiny that sequences are evacuated, recomputed and held back.
"""

from __future__ import annotations

import pytest

from nanovllm import DEMO_MODEL, LLM
from tests.random_work import TINY, Answer, Work, answers, check_nothing_left, check_same


@pytest.fixture(scope="module")
def work() -> Work:
    return Work.random(7, vocab_size=4096)


@pytest.fixture(scope="module")
def reference(work: Work) -> list[list[Answer]]:
    """The plainest way: one card, nothing in flight, room for all, no chunking, no cache, no aborts."""
    with LLM(DEMO_MODEL, device="cpu", overlap=False, max_model_len=512, enable_prefix_caching=False) as llm:
        return answers(llm, work, abort_seed=None)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("two_cards", [False, True])
def test_same_tokens_in_every_mode(work: Work, reference: list, two_cards: bool, overlap: bool) -> None:
    pools = (14, 18) if two_cards else 18
    with LLM(
        DEMO_MODEL, device="cpu", enable_two_gpu_pd=two_cards, overlap=overlap, num_kvcache_blocks=pools, **TINY
    ) as llm:
        got = answers(llm, work, abort_seed=1)
        check_nothing_left(llm)
        stats = llm.stats()
    assert stats["cached_tokens"] > 0 and stats["pauses"] > 0, stats
    if two_cards:
        assert stats["evacuations"] > 0 and stats["write_backs"] > 0 and stats["copied_blocks"] > 0, stats
    else:
        assert stats["recomputes"] > 0, stats
    assert check_same(got, reference) > 5
