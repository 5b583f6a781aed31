"""From a configuration to runners: which devices, whose weights, how many blocks each."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import torch

from nanovllm.config import Config
from nanovllm.engine.compile_ahead import starting
from nanovllm.engine.kv_cache import KVCache, measure_rate
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.pipeline_runs import PipelineOptions
from nanovllm.engine.shards import CopyShard
from nanovllm.engine.start_line import start_line
from nanovllm.engine.step_sizes import HELP_ALONE_TOKENS
from nanovllm.layers.attention import make_attention_backend
from nanovllm.models.loader import load_model
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.shown import shortened

logger = logging.getLogger("nanovllm")

CPU_POOL_BYTES = 1 << 30  # at most, for each card in host memory
ACTIVATION_ROWS = 8  # tensors of the widest layer alive at once in a prefill step, with a margin
STARTUP_PARTS = (
    "import_s",
    "tokenizer_s",
    "devices_s",
    "weights_s",
    "kv_pool_s",
    "compile_s",
    "capture_s",
    "reserve_s",
)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the block's wall-clock time to `seconds[part]`. The block must wait for what it launches."""
    started = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - started


def resolve_devices(config: Config) -> list[torch.device]:
    """The device of card 0 and, with `enable_two_gpu_pd`, of card 1. Impossible ones raise before any work."""
    ids = [config.prefill_device_id] + ([config.decode_device_id] if config.enable_two_gpu_pd else [])
    named = f"prefill_device_id={config.prefill_device_id}, decode_device_id={config.decode_device_id}"
    if len(set(ids)) < len(ids):
        raise ValueError(f"enable_two_gpu_pd=True needs two different devices, got {named}")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if kind == "cpu":
        return [torch.device("cpu")] * len(ids)
    count = torch.cuda.device_count()
    if max(ids) >= count:
        raise ValueError(
            f"{named}: enable_two_gpu_pd={config.enable_two_gpu_pd} needs CUDA devices that exist, have {count}"
        )
    return [torch.device("cuda", i) for i in ids]


def resolve_dtype(config: Config, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    """The configured one; auto: the checkpoint's on a GPU, float32 on a CPU."""
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else model_config.dtype
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def build_runners(
    config: Config,
    folder: Path,
    model_config: ModelConfig,
    max_model_len: int,
    devices: list[torch.device],
    seconds: dict[str, float],
) -> list[ModelRunner]:
    """Load the weights once, hand them from card to card, and give each card its own pool.

    Adds what each part took to `seconds` (keys: `STARTUP_PARTS`).
    """
    dtype = resolve_dtype(config, model_config, devices[0])
    attention = make_attention_backend(config.attention_backend, model_config, devices[0], dtype)
    with timed(seconds, "devices_s"):
        for device in devices:
            torch.zeros(1, device=device)  # makes its CUDA context: no time of the weights
    with timed(seconds, "weights_s"):
        first = load_model(
            folder, model_config, attention, dtype, devices[0], max_model_len, config.load_format, seed=config.seed
        )
        models = [first, *(first.copy_to(device) for device in devices[1:])]
    with timed(seconds, "kv_pool_s"):
        runners = [make_runner(config, model, max_model_len, card) for card, model in enumerate(models)]
    rates: dict[tuple[int, int], float] = {}
    if devices[0].type == "cuda":
        with starting:
            rates = prepare(runners, config, seconds)
    elif config.pipelines_decode:
        runners[-1].start_pipeline(pipeline_options(config))  # fails, or says that it cannot
    else:
        runners[-1].lends = config.lend_sms is not None  # nothing is divided
    logger.info(start_line(config, runners, rates))
    return runners


def make_runner(config: Config, model: Qwen3ForCausalLM, max_model_len: int, card: int) -> ModelRunner:
    """Card `card` with its KV pool and slots, where its model is."""
    num_blocks = count_blocks(config, model, max_model_len, card)
    cache = make_pool(config, model, num_blocks, card)
    device_id = (config.prefill_device_id, config.decode_device_id)[card]
    return ModelRunner(device_id, model, cache, config.max_num_seqs, max_model_len, config.verify_copies)


def make_pool(config: Config, model: Qwen3ForCausalLM, num_blocks: int, card: int) -> KVCache:
    """The KV pages of card `card`. `ValueError` if its memory cannot hold as many blocks as the caller wants."""
    try:
        return KVCache(num_blocks, config.kvcache_block_size, model.config, model.dtype, model.device)
    except RuntimeError as error:
        no_memory = isinstance(error, torch.OutOfMemoryError) or model.device.type == "cpu"  # there it has no name
        if config.num_kvcache_blocks is None or not no_memory:
            raise
        block_bytes = model.config.kv_bytes_per_token(model.dtype.itemsize) * config.kvcache_block_size
        asked = f"num_kvcache_blocks={config.num_kvcache_blocks}: {num_blocks} blocks of {block_bytes} bytes"
        raise ValueError(f"{asked} do not fit on card {card} ({model.device}): {shortened(str(error))}") from error


def prepare(runners: list[ModelRunner], config: Config, seconds: dict[str, float]) -> dict[tuple[int, int], float]:
    """Compile and capture on every card before a worker thread of this engine exists; another engine may be busy.

    Returns what `measure_links` does.
    """
    with timed(seconds, "compile_s"):
        for runner in runners:
            runner.warm_up()
            warm_copies(runner, runners)
        rates = measure_links(runners)
    attention = runners[-1].model.attention.name
    if not config.enforce_eager and attention != "torch":  # the torch backend's shapes follow the lengths
        with timed(seconds, "capture_s"):
            for card, runner in enumerate(runners):
                capture(runner, card, config)
    elif config.lend_sms is not None:
        runners[-1].start_lending(config.lend_sms, config.max_num_batched_tokens)  # says that it cannot
    if config.pipelines_decode:
        with timed(seconds, "capture_s"):
            runners[-1].start_pipeline(pipeline_options(config))
    with timed(seconds, "reserve_s"):
        for runner in runners:
            runner.reserve(config.max_num_batched_tokens)
    return rates


def pipeline_options(config: Config) -> PipelineOptions:
    """What the configuration says of the decode pipeline."""
    return PipelineOptions(
        mode=config.decode_pipeline,
        attention_sm=config.decode_attention_sm,
        ffn_sm=config.decode_ffn_sm,
        disable_green=config.disable_green,
        profiling=config.decode_pipeline_profiling,
        debug=config.pipeline_debug,
    )


def capture(runner: ModelRunner, card: int, config: Config) -> None:
    """The steps that a card of the configured roles takes."""
    most = config.max_num_batched_tokens
    if decodes(config, card):
        runner.capture()
        if config.lend_sms is not None and card == 1:
            runner.start_lending(config.lend_sms, most)
        if mixes(config) and not runner.lends:
            runner.capture_mixed(most)
    if card == 0 or mixes(config):
        runner.capture_prefill(most if card == 0 else min(most, HELP_ALONE_TOKENS))


def decodes(config: Config, card: int) -> bool:
    """Whether a card ever decodes: the last one does, and with elastic roles each."""
    return mixes(config) or card == 1


def mixes(config: Config) -> bool:
    """Whether steps may hold prompts and decode rows at once: those of one card always, those of two by their roles."""
    return not config.enable_two_gpu_pd or config.pd_roles == "elastic"


def warm_copies(runner: ModelRunner, runners: list[ModelRunner]) -> None:
    """Compile the copy of scattered blocks and open the way to the other card. No block holds anything yet."""
    other = next((r for r in runners if r is not runner), runner)
    pairs = ((0, 3), (1, 2))  # not a run, and disjoint
    if min(runner.kv_cache.num_blocks, other.kv_cache.num_blocks) > 3:
        runner.run_copy(CopyShard(0, 0, 0, pairs, 0), other, None).wait()


def measure_links(runners: list[ModelRunner]) -> dict[tuple[int, int], float]:
    """GB/s of KV blocks by (from, to): measured once, on idle cards, while no block holds anything."""
    return {
        (i, j): measure_rate(source.kv_cache, target.kv_cache, source.copy_stream)
        for (i, source), (j, target) in permutations(enumerate(runners), 2)
    }


def count_blocks(config: Config, model: Qwen3ForCausalLM, max_model_len: int, card: int) -> int:
    """KV blocks of one card: as configured, else what its own memory holds. `ValueError` if that is too little."""
    if config.num_kvcache_blocks is not None:
        given = config.num_kvcache_blocks
        return given[card] if isinstance(given, tuple) else given
    block_bytes = model.config.kv_bytes_per_token(model.dtype.itemsize) * config.kvcache_block_size
    # Every sequence at its longest, and the reserve behind which the last of them is admitted.
    useful = config.max_num_seqs * (-(-max_model_len // config.kvcache_block_size) + 1) + config.steps_ahead
    if model.device.type == "cpu":
        return max(2, min(CPU_POOL_BYTES // block_bytes, useful))
    budget_bytes = gpu_budget_bytes(config, model)
    if budget_bytes < 2 * block_bytes:
        raise ValueError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} leaves {budget_bytes} bytes on {model.device} "
            f"for KV, two blocks need {2 * block_bytes}"
        )
    return int(min(budget_bytes // block_bytes, max(2, useful)))


def gpu_budget_bytes(config: Config, model: Qwen3ForCausalLM) -> int:
    """Bytes for KV pages: the allowed share of the card, less what is in use and what one full step may take."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(model.device)
    in_use_bytes, sizes = total_bytes - free_bytes, model.config
    width = max(sizes.intermediate_size * 2, sizes.q_size + 2 * sizes.kv_size)
    step_bytes = config.max_num_batched_tokens * width * model.dtype.itemsize * ACTIVATION_ROWS
    logits_bytes = config.max_num_seqs * sizes.vocab_size * 4 * ACTIVATION_ROWS
    return int(total_bytes * config.gpu_memory_utilization) - in_use_bytes - step_bytes - logits_bytes
