"""Every keyword of the engine: what is kept, what is refused by name, and which devices it comes down to."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.config import BLOCK_SIZES, Config
from nanovllm.engine.cards import count_blocks, resolve_devices
from nanovllm.models.model_config import load_model_config
from tests.cpu.tiny import make_llm, write_config

TWO = {"enable_two_gpu_pd": True}
# (keywords, what the message must say: the name, the value, the limit)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_model_length": 10}, "unknown configuration keyword(s) max_model_length; known: "),
    ({"tp": 1, "gpus": 2}, "unknown configuration keyword(s) gpus, tp;"),
    ({"device": "tpu"}, "device='tpu' must be one of auto, cuda, cpu"),
    ({"device": None}, "device=None must be one of"),
    ({"device": ["cpu"]}, "device=['cpu'] must be one of"),
    ({"dtype": "float64"}, "dtype='float64' must be one of auto, float32, bfloat16, float16"),
    ({"dtype": torch.float32}, "dtype=torch.float32 must be one of"),
    ({"load_format": "pt"}, "load_format='pt' must be one of auto, dummy"),
    ({"attention_backend": "xformers"}, "attention_backend='xformers' must be one of auto, flash_attn, triton, torch"),
    ({"kvcache_block_size": 8}, "kvcache_block_size=8 must be one of 16, 32, 64, 128, 256"),
    ({"kvcache_block_size": 512}, "kvcache_block_size=512 must be one of"),
    ({"kvcache_block_size": 64.0}, "kvcache_block_size=64.0 must be one of"),
    ({"kvcache_block_size": "64"}, "kvcache_block_size='64' must be one of"),
    ({"max_model_len": 0}, "max_model_len=0 must be an integer from 2 to"),
    ({"max_model_len": 1}, "max_model_len=1 must be"),
    ({"max_model_len": None}, "max_model_len=None must be"),
    ({"max_model_len": 100.0}, "max_model_len=100.0 must be an integer"),
    ({"max_model_len": True}, "max_model_len=True must be an integer"),
    ({"max_num_seqs": 0}, "max_num_seqs=0 must be an integer from 1 to"),
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0 must be an integer from 1 to"),
    ({"max_num_batched_tokens": -5}, "max_num_batched_tokens=-5"),
    ({"run_ahead": 0}, "run_ahead=0 must be an integer from 1 to 4"),
    ({"run_ahead": 5}, "run_ahead=5 must be an integer from 1 to 4"),
    ({"seed": 2**63}, "seed=9223372036854775808 must be"),
    ({"seed": 0.5}, "seed=0.5 must be an integer"),
    ({"gpu_memory_utilization": 0}, "gpu_memory_utilization=0 must be in (0, 1]"),
    ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization=1.01 must be in (0, 1]"),
    ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization=nan must be in (0, 1]"),
    ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization='0.9'"),
    ({"num_kvcache_blocks": 1}, "num_kvcache_blocks=1 must be an integer from 2 to"),
    ({"num_kvcache_blocks": 0}, "num_kvcache_blocks=0 must be"),
    ({"num_kvcache_blocks": "many"}, "num_kvcache_blocks='many' must be"),
    ({"num_kvcache_blocks": (16, 16)}, "num_kvcache_blocks=(16, 16) names two cards, but enable_two_gpu_pd=False"),
    ({"num_kvcache_blocks": (16,), **TWO}, "num_kvcache_blocks=(16,) must be one number or (card 0, card 1)"),
    ({"num_kvcache_blocks": (1, 2, 3), **TWO}, "num_kvcache_blocks=(1, 2, 3) must be"),
    ({"num_kvcache_blocks": (16, 1), **TWO}, "num_kvcache_blocks=1 must be an integer from 2"),
    ({"num_kvcache_blocks": (16, None), **TWO}, "num_kvcache_blocks=None must be an integer"),
    ({"enable_two_gpu_pd": 1}, "enable_two_gpu_pd=1 must be True or False"),
    ({"enforce_eager": "no"}, "enforce_eager='no' must be True or False"),
    ({"enable_prefix_caching": None}, "enable_prefix_caching=None must be True or False"),
    ({"overlap": 0}, "overlap=0 must be True or False"),
    ({"revision": 5}, "revision=5 must be a string or None"),
    ({"decode_backlog_high": 0}, "decode_backlog_high=0 must be an integer from 1"),
    ({"decode_backlog_low": -1}, "decode_backlog_low=-1 must be an integer from 0"),
    ({"decode_backlog_high": 4, "decode_backlog_low": 4}, "decode_backlog_low=4 must be below decode_backlog_high=4"),
    ({"decode_backlog_low": 300}, "decode_backlog_low=300 must be below decode_backlog_high=256"),
    ({"prefill_device_id": -1}, "prefill_device_id=-1 must be an integer from 0"),
    ({"decode_device_id": "1"}, "decode_device_id='1' must be an integer"),
    ({"decode_device_id": True}, "decode_device_id=True must be an integer"),
    ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be an integer from 1"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported; the limit is 1"),
    ({"tensor_parallel_size": 2, **TWO}, "enable_two_gpu_pd=True with tensor_parallel_size=2 is not supported"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD, ids=[str(keywords)[:60] for keywords, _ in BAD])
def test_bad_keywords_are_refused_before_any_work(keywords: dict[str, Any], message: str) -> None:
    """By `LLM` itself, before it looks at the model: this folder does not even exist."""
    with pytest.raises(ValueError) as caught:
        LLM("/no/such/folder", **keywords)
    assert message in str(caught.value)


@pytest.mark.parametrize("model", [None, 5, "", b"folder", ["folder"]])
def test_model_must_be_a_path_or_an_id(model: Any) -> None:
    with pytest.raises(ValueError, match="must be a folder or a hub id"):
        LLM(model)


def test_path_objects_are_models(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path)) as by_string, LLM(tmp_path, load_format="dummy", device="cpu") as by_path:
        assert by_string.config.model == by_path.config.model == str(tmp_path)


def test_values_at_the_limits_are_kept() -> None:
    for size in BLOCK_SIZES:
        assert Config("m", kvcache_block_size=size).kvcache_block_size == size
    edge = Config("m", max_model_len=2, max_num_seqs=1, max_num_batched_tokens=1, num_kvcache_blocks=2, run_ahead=4,
                  gpu_memory_utilization=1, seed=-(2**63), decode_backlog_high=1)  # fmt: skip
    assert (edge.backlog_high, edge.backlog_low) == (1, 0)
    assert Config("m", num_kvcache_blocks=[16, 17], enable_two_gpu_pd=True).num_kvcache_blocks == (16, 17)


def test_defaults_are_those_of_the_documentation() -> None:
    config = Config("m")
    expected = dict(
        enable_two_gpu_pd=False, prefill_device_id=0, decode_device_id=1, device="auto", dtype="auto",
        max_model_len=4096, max_num_seqs=512, max_num_batched_tokens=16384, kvcache_block_size=64,
        num_kvcache_blocks=None, gpu_memory_utilization=0.9, enforce_eager=False, enable_prefix_caching=True,
        load_format="auto", attention_backend="auto", overlap=True, tensor_parallel_size=1,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_backlog_marks_follow_the_number_of_sequences() -> None:
    for num_seqs, high, low in ((512, 256, 128), (9, 4, 2), (1, 2, 1)):
        config = Config("m", max_num_seqs=num_seqs)
        assert (config.backlog_high, config.backlog_low) == (high, low)
    assert Config("m", decode_backlog_high=10).backlog_low == 5


def test_nothing_runs_ahead_without_overlap() -> None:
    assert Config("m", run_ahead=3).steps_ahead == 3 and Config("m", run_ahead=3, overlap=False).steps_ahead == 0


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config("m").seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"enable_decode_pipeline": True}, "enable_decode_pipeline=True needs enable_two_gpu_pd=True"),
        ({"decode_pipeline": "dynamic"}, "decode_pipeline='dynamic' must be one of auto, static, disabled"),
        ({"decode_attention_sm": 0}, "decode_attention_sm=0 must be an integer from 1 to"),
        ({"decode_ffn_sm": True}, "decode_ffn_sm=True must be an integer from 1 to"),
        ({"disable_green": 1}, "disable_green=1 must be True or False"),
        ({"decode_pipeline_profiling": None}, "decode_pipeline_profiling=None must be True or False"),
        (
            dict(enable_two_gpu_pd=True, enable_decode_pipeline=True, decode_pipeline="static", disable_green=True),
            "disable_green=True leaves nothing to decode_pipeline='static'",
        ),
    ],
)
def test_mistakes_about_the_decode_pipeline(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Config("m", **options)


def test_when_a_decode_pipeline_is_started() -> None:
    on = dict(enable_two_gpu_pd=True, enable_decode_pipeline=True)
    assert not Config("m").pipelines_decode and not Config("m", enable_two_gpu_pd=True).pipelines_decode
    assert Config("m", **on).pipelines_decode and Config("m", **on).decode_pipeline == "auto"
    assert Config("m", **on, decode_pipeline="static", decode_attention_sm=16, decode_ffn_sm=16).pipelines_decode
    assert not Config("m", **on, decode_pipeline="disabled").pipelines_decode
    assert Config("m", **on, disable_green=True).pipelines_decode, "it runs over one stream, and tells"


def test_config_and_scheduler_import_no_torch() -> None:
    modules = "nanovllm.config, nanovllm.engine.scheduler, nanovllm.engine.llm_engine"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -- devices


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend to have this many CUDA devices."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize(
    ("count", "keywords", "expected"),
    [
        (0, {}, ["cpu"]),
        (0, TWO, ["cpu", "cpu"]),
        (0, {**TWO, "prefill_device_id": 7, "decode_device_id": 3}, ["cpu", "cpu"]),
        (1, {}, ["cuda:0"]),
        (1, {"device": "cpu", **TWO}, ["cpu", "cpu"]),
        (2, TWO, ["cuda:0", "cuda:1"]),
        (2, {**TWO, "prefill_device_id": 1, "decode_device_id": 0, "device": "cuda"}, ["cuda:1", "cuda:0"]),
        (2, {"prefill_device_id": 1}, ["cuda:1"]),
        (8, {**TWO, "prefill_device_id": 2, "decode_device_id": 5}, ["cuda:2", "cuda:5"]),
    ],
)
def test_devices(gpus: Any, count: int, keywords: dict[str, Any], expected: list[str]) -> None:
    gpus(count)
    assert [str(device) for device in resolve_devices(Config("m", **keywords))] == expected


@pytest.mark.parametrize(
    ("count", "keywords", "parts"),
    [
        (1, TWO, ["prefill_device_id=0, decode_device_id=1", "enable_two_gpu_pd=True", "have 1"]),
        (0, {**TWO, "device": "cuda"}, ["prefill_device_id=0, decode_device_id=1", "have 0"]),
        (0, {"device": "cuda"}, ["prefill_device_id=0", "have 0"]),
        (2, {**TWO, "decode_device_id": 2}, ["prefill_device_id=0, decode_device_id=2", "have 2"]),
        (2, {"prefill_device_id": 2}, ["prefill_device_id=2", "have 2"]),
        (2, {**TWO, "decode_device_id": 0}, ["two different devices", "prefill_device_id=0, decode_device_id=0"]),
        (8, {**TWO, "prefill_device_id": 1}, ["two different devices", "prefill_device_id=1, decode_device_id=1"]),
        (0, {**TWO, "prefill_device_id": 1}, ["two different devices", "prefill_device_id=1, decode_device_id=1"]),
    ],
)
def test_impossible_devices_raise_with_both_names(
    gpus: Any, count: int, keywords: dict[str, Any], parts: list[str]
) -> None:
    gpus(count)
    with pytest.raises(ValueError) as caught:
        LLM("/no/such/folder", **keywords)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("backend", ["flash_attn", "triton"])
def test_backends_that_cannot_run_here_are_refused_by_name(tmp_path: Path, backend: str) -> None:
    with pytest.raises(ValueError, match=backend):
        make_llm(write_config(tmp_path), attention_backend=backend)


# -- what the engine makes of it


def test_pools_of_two_cards_keep_their_own_counts(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path), enable_two_gpu_pd=True, num_kvcache_blocks=(20, 9)) as llm:
        assert (llm.prefill_runner.kv_cache.num_blocks, llm.decode_runner.kv_cache.num_blocks) == (20, 9)
        assert (llm.prefill_runner.device_id, llm.decode_runner.device_id) == (0, 1)
        stats = llm.stats()
        assert (stats["card0_blocks"]["total"], stats["card1_blocks"]["total"]) == (20, 9)
        assert llm.prefill_runner.model is not llm.decode_runner.model
        first, second = (runner.model.parameters() for runner in (llm.prefill_runner, llm.decode_runner))
        for mine, theirs in zip(first, second, strict=True):
            assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def test_one_card_prefills_and_decodes(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path), prefill_device_id=3) as llm:
        assert llm.prefill_runner is llm.decode_runner and llm.prefill_runner.device_id == 3


def test_pools_on_the_cpu_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_kvcache_blocks": None, "max_num_seqs": 4, "max_num_batched_tokens": 1024}
    with make_llm(write_config(tmp_path), **sizes) as llm:
        engine, take = llm._engine, llm._engine._take_inbox
        monkeypatch.setattr(engine, "_take_inbox", lambda: take() if len(engine._inbox) == 4 else 0)  # all at once
        ahead = llm.config.steps_ahead
        assert llm.prefill_runner.kv_cache.num_blocks == 4 * (256 // 16 + 1) + ahead  # no more than they can use
        prompts = [[i + 1] * 250 for i in range(4)]
        answers = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
        assert llm.stats()["card0"]["decode_steps"] == 5, "side by side, though each is as long as it may be"
        assert all(len(answer.outputs[0].token_ids) == 6 for answer in answers)
    large = load_model_config(write_config(tmp_path, num_hidden_layers=28, num_key_value_heads=2, head_dim=128))
    model: Any = SimpleNamespace(config=large, dtype=torch.float32, device=torch.device("cpu"))
    num_blocks = count_blocks(Config("m"), model, 4096, 0)
    assert 0.9 < num_blocks * large.kv_bytes_per_token(4) * 64 / 2**30 <= 1


def test_length_is_bounded_by_the_model(tmp_path: Path) -> None:
    with make_llm(write_config(tmp_path, max_position_embeddings=128), max_model_len=4096) as llm:
        assert llm.max_model_len == 128
        with pytest.raises(ValueError, match="max_model_len=128"):
            llm.add_request([1] * 128)
