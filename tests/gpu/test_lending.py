"""SMs lent to prompts, on one card: lent steps beside decode steps, against the same steps one after the other.

As in test_mixed_step.py: every step is the same for both runners, and where two tokens are nearly tied the runner that
drew another is told the first one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python", exc_type=ImportError)
triton = pytest.importorskip("triton", reason="the kernels are Triton's", exc_type=ImportError)
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if torch.cuda.get_device_properties(0).multi_processor_count < 64:
    pytest.skip("too few SMs for two partitions worth the name", allow_module_level=True)

from nanovllm import DEMO_MODEL  # noqa: E402
from nanovllm.engine.lending import Lending  # noqa: E402
from nanovllm.engine.model_runner import ModelRunner  # noqa: E402
from nanovllm.engine.shards import PrefillShard, StepResult  # noqa: E402
from nanovllm.models.qwen3 import Qwen3ForCausalLM  # noqa: E402
from tests.counters import compiles, graph_calls  # noqa: E402
from tests.cpu.mixed_plan import Item, Plan, joined, largest_error  # noqa: E402
from tests.gpu.test_green_ctx import PROGRAMS_PER_SM, num_sms, record_smid  # noqa: E402
from tests.gpu.test_mixed_step import (  # noqa: E402
    LOGPROB_BOUND,
    MAX_TOKENS,
    any_draw,
    check_pages,
    chunks_of,
    exact_model,
    make_model,
    make_plan,
    make_runner,
    poison_null_blocks,
    start,
)
from tests.regret import release_gpu_memory  # noqa: E402

LENT_SMS = 72
# (tokens of prompts, their sequences, decode rows, decode steps beside): prompts are captured as 512 tokens of up to 32
# sequences, rows as 16, 32 and 40.
STEPS = [
    (1, 1, 1, 1),
    (300, 5, 16, 3),
    (512, 32, 17, 4),
    (513, 2, 33, 2),
    (400, 33, 40, 3),
    (64, 1, 40, 6),
    (7, 2, 5, 1),
]


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    release_gpu_memory()
    yield
    release_gpu_memory()


def make_lending_runner(model: Qwen3ForCausalLM) -> ModelRunner:
    runner = make_runner(model)
    with torch.inference_mode():
        runner.start_lending((num_sms() - LENT_SMS, LENT_SMS), MAX_TOKENS)
    assert runner.lends and runner.lent_sms == (num_sms() - LENT_SMS, LENT_SMS)
    runner.reserve(MAX_TOKENS)
    torch.cuda.synchronize()
    runner.kv_cache.pages.fill_(float("nan"))
    torch.cuda.synchronize()
    return runner


def run_steps(plan: Plan, plain: ModelRunner, lending: ModelRunner, bound: float) -> int:
    """Each lent step with several decode steps beside it, all launched before any is waited for, as far as their
    tokens allow. Returns how many tokens were not the plain runner's."""
    num_unlike = 0
    for num_tokens, num_sequences, num_rows, num_steps in STEPS:
        chunks, rows = chunks_of(plan, num_tokens, num_sequences), plan.rng.sample(plan.decoding, num_rows)
        shard = plan.shard(chunks, rows)
        poison_null_blocks([plain, lending])
        lent = lending.run_prefill(replace(shard.prefill, lent=True))
        decode = [replace(shard.decode, beside_lent=True)]
        first_plain = plain.run_prefill(shard.prefill).wait()
        for _ in range(num_steps - 1):  # every slot advances on the card: only blocks must be told
            mine, theirs = lending.run_decode_core(decode[-1]).wait(), plain.run_decode_core(decode[-1]).wait()
            num_unlike += check_rows(plan, rows, theirs, mine, bound)
            decode.append(replace(plan.shard([], rows).decode, beside_lent=True))
        mine, theirs = lending.run_decode_core(decode[-1]), plain.run_decode_core(decode[-1])
        results = [
            joined(first, len(first.token_ids), step, len(step.token_ids))
            for first, step in ((first_plain, theirs.wait()), (lent.wait(), mine.wait()))
        ]
        error = largest_error(results, num_missing=4)
        assert error <= bound, f"{num_tokens} tokens, {num_rows} rows: log-probabilities are off by {error}"
        num_unlike += plan.take(chunks, rows, results)
    check_pages([plain, lending])
    return num_unlike


def check_rows(plan: Plan, rows: list[Item], theirs: StepResult, mine: StepResult, bound: float) -> int:
    assert largest_error([theirs, mine], num_missing=4) <= bound
    return plan.take([], rows, [theirs, mine])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lent_steps_beside_decode_steps(dtype: torch.dtype) -> None:
    model = make_model(Path(DEMO_MODEL), dtype)
    plain, lending = make_runner(model), make_lending_runner(model)
    plan = make_plan(1, model.config.vocab_size)
    start(plan, [plain, lending])
    num_unlike = run_steps(plan, plain, lending, LOGPROB_BOUND[dtype])
    print(f"{dtype}: {num_unlike} tokens where two were nearly tied")
    assert num_unlike <= (10 if dtype == torch.float32 else 250)
    lending.close_pipeline()


def test_the_same_draws_from_the_same_logits() -> None:
    """Every kind of sampling, and nothing is compiled or captured once the runner has started."""
    model = exact_model()
    plain, lending = make_runner(model), make_lending_runner(model)
    plan = make_plan(2, model.config.vocab_size, any_draw)
    start(plan, [plain, lending])
    with compiles() as late, graph_calls("capture_begin") as captured:
        assert run_steps(plan, plain, lending, bound=1e-4) == 0
    assert late == [] and captured == []
    lending.close_pipeline()


def test_both_sides_keep_their_own_sms_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe behind the layers of either side, in its graph: more programs than the card holds at once."""
    model = make_model(Path(DEMO_MODEL), torch.bfloat16)
    sm_ids: dict[str, Tensor] = {}
    for name in ("forward_decode", "forward_prefill"):
        sm_ids[name] = torch.full((PROGRAMS_PER_SM * num_sms(),), -1, dtype=torch.int32, device=model.device)
        monkeypatch.setattr(model, name, probed(getattr(model, name), sm_ids[name]))
    runner = make_lending_runner(model)
    plan = make_plan(3, model.config.vocab_size)
    start(plan, [runner])
    for _ in range(2):
        for out in sm_ids.values():
            out.fill_(-1)
        torch.cuda.synchronize()
        rows = plan.rng.sample(plan.decoding, 20)
        chunks = chunks_of(plan, 100, 2)
        shard = plan.shard(chunks, rows)
        lent = runner.run_prefill(replace(shard.prefill, lent=True))
        decode = runner.run_decode_core(replace(shard.decode, beside_lent=True))
        first, step = lent.wait(), decode.wait()
        plan.take(chunks, rows, [joined(first, len(first.token_ids), step, len(step.token_ids))])
        used = {name: set(out.tolist()) for name, out in sm_ids.items()}
        assert -1 not in used["forward_decode"] | used["forward_prefill"]
        assert used["forward_decode"].isdisjoint(used["forward_prefill"])
        assert (len(used["forward_decode"]), len(used["forward_prefill"])) == runner.lent_sms
    runner.close_pipeline()


def probed(forward: Callable[..., Tensor], out: Tensor) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        result = forward(*args, **kwargs)
        record_smid[(out.numel(),)](out, 3_000, num_warps=1)
        return result

    return run


def test_a_lent_step_begins_behind_the_decode_steps_before_it() -> None:
    model = make_model(Path(DEMO_MODEL), torch.bfloat16)
    runner = make_lending_runner(model)
    plan = make_plan(6, model.config.vocab_size)
    start(plan, [runner])
    shard = plan.shard([(plan.add(200), 100)], plan.decoding[:20])
    assert runner.stream is not None
    for _ in range(3):
        with torch.cuda.stream(runner.stream):
            torch.cuda._sleep(100_000_000)  # longer than the host takes for the launches
        on_whole_card = [runner.run_decode_core(shard.decode) for _ in range(2)]
        lent = runner.run_prefill(replace(shard.prefill, lent=True))
        lent.wait()
        on_whole_card[-1].wait()
        after_s = lent.idle_since(on_whole_card[-1])
        assert after_s is not None and after_s >= 0
    runner.close_pipeline()


def test_hundreds_of_lent_steps_leave_nothing_behind() -> None:
    model = make_model(Path(DEMO_MODEL), torch.bfloat16)
    runner = make_lending_runner(model)
    assert isinstance(runner.lending, Lending)
    plan = make_plan(5, model.config.vocab_size)
    start(plan, [runner])
    rows = plan.decoding[:20]
    shard = plan.shard([(plan.add(200), 100)], rows)
    prefill: PrefillShard = replace(shard.prefill, lent=True)
    decode = replace(shard.decode, beside_lent=True)

    def run(count: int) -> None:
        for _ in range(count):
            lent = runner.run_prefill(prefill)
            runner.run_decode_core(decode).wait()
            lent.wait()
        torch.cuda.synchronize()

    run(100)
    allocated, free = torch.cuda.memory_allocated(model.device), torch.cuda.mem_get_info(model.device)[0]
    run(400)
    assert torch.cuda.memory_allocated(model.device) == allocated
    assert abs(torch.cuda.mem_get_info(model.device)[0] - free) < 8 << 20
    runner.close_pipeline()
