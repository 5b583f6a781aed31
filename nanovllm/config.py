"""One flat configuration for the whole engine. Imports no torch: the scheduler reads it too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.shown import shortened, shown

BLOCK_SIZES = (16, 32, 64, 128, 256)
DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
PD_ROLES = ("elastic", "strict")
ATTENTION_BACKENDS = ("auto", "flash_attn", "triton", "torch")
DECODE_PIPELINES = ("auto", "static", "disabled")
MOST_SMS = 1 << 10  # more than any card has; the card itself checks what fits
MOST_MS = 10**9
MAX_RUN_AHEAD = 4
MOST_HANG_S = 86_400
DEFAULT_RUN_AHEAD = 2


@dataclass(frozen=True)
class Config:
    """Everything a caller can set. Unknown keywords and impossible values raise `ValueError` by name.

    `device="cpu"`: the device ids name in-process cards, each with its own weights and KV pool.
    `num_kvcache_blocks`: one number for every card, or (card 0, card 1); None sizes each card's pool from
    its own memory. `decode_backlog_high/low`: sequences prefilled but not yet decoding at which prefill pauses
    and resumes (None: half of `max_num_seqs`, with strict roles a 32nd, and half of that). `run_ahead`: decode steps
    launched beyond the one whose result the host is waiting for (None: one where a step takes 5 ms or more, else two).
    `max_num_batched_tokens`: of a step; on one card, of prompts and decode rows together.
    `pd_roles`: "strict" cards prefill or decode; "elastic" ones help each other out. `itl_slo_ms`: what a decode step
    of card 1 may take for it to take a prompt too (None: twice what it takes without); card 0's chunks beside rows of
    its own fill as much, or as much again as the rows take; elastic roles only.
    `lend_sms`: (D, P): card 1 takes prompts on P of its SMs beside decode steps on D others, in place of chunks inside
    them; elastic roles only. Where partitions cannot be had it says so and mixes; on CPU cards nothing is divided.
    `enable_decode_pipeline`: decode steps of card 1 may run attention and FFN on two partitions of its SMs, if
    `decode_pipeline` lets them: "auto" takes what measures fastest, one stream included, and where partitions cannot be
    had says so and decodes over one stream; "static" always takes one split, or raises; "disabled" never does.
    `decode_attention_sm`, `decode_ffn_sm`: SMs of the split, the only one then (None: the rest of the card, or half of
    it each; with "auto" a few splits are tried). `disable_green`: touch no SM partition. `decode_pipeline_profiling`:
    time the stages now and then. `pipeline_debug`: log every decode step.
    `hang_limit_s`: with `overlap`, seconds for which a card or a link may have work and finish none of it; then the
    engine closes. `verify_copies`: compare checksums of all KV blocks that are copied, for debugging; it takes long.
    """

    model: str
    enable_two_gpu_pd: bool = False
    pd_roles: str = "elastic"
    itl_slo_ms: float | None = None
    lend_sms: tuple[int, int] | None = None
    prefill_device_id: int = 0
    decode_device_id: int = 1
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    load_format: str = "auto"
    attention_backend: str = "auto"
    max_model_len: int = 4096
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384
    kvcache_block_size: int = 64
    num_kvcache_blocks: int | tuple[int, int] | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    enable_decode_pipeline: bool = False
    decode_pipeline: str = "auto"
    decode_attention_sm: int | None = None
    decode_ffn_sm: int | None = None
    disable_green: bool = False
    decode_pipeline_profiling: bool = False
    pipeline_debug: bool = False
    enable_prefix_caching: bool = True
    overlap: bool = True
    hang_limit_s: float = 60.0
    verify_copies: bool = False
    run_ahead: int | None = None
    decode_backlog_high: int | None = None
    decode_backlog_low: int | None = None
    seed: int = 0
    tensor_parallel_size: int = 1

    @classmethod
    def from_kwargs(cls, model: str, kwargs: Mapping[str, Any]) -> Config:
        """Build from a caller's keywords; an unknown one is a `ValueError` that lists the known ones."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise ValueError(
                f"unknown configuration keyword(s) {shortened(', '.join(unknown))}; known: {', '.join(sorted(known))}"
            )
        return cls(model, **kwargs)

    def __post_init__(self) -> None:
        if isinstance(self.num_kvcache_blocks, list):
            object.__setattr__(self, "num_kvcache_blocks", tuple(self.num_kvcache_blocks))
        if isinstance(self.lend_sms, list):
            object.__setattr__(self, "lend_sms", tuple(self.lend_sms))
        self._check_types()
        self._check_choices()
        self._check_ranges()
        self._check_cards()
        self._check_pipeline()
        self._check_lending()

    def _check_types(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model={shown(self.model)} must be a folder or a hub id")
        switches = ("enable_decode_pipeline", "disable_green", "decode_pipeline_profiling", "pipeline_debug")
        others = ("enforce_eager", "enable_prefix_caching", "overlap", "verify_copies")
        for name in ("enable_two_gpu_pd", *switches, *others):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be True or False")
        if self.revision is not None and not isinstance(self.revision, str):
            raise ValueError(f"revision={shown(self.revision)} must be a string or None")

    def _check_choices(self) -> None:
        _one_of("device", self.device, DEVICES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _one_of("pd_roles", self.pd_roles, PD_ROLES)
        _one_of("decode_pipeline", self.decode_pipeline, DECODE_PIPELINES)
        _one_of("kvcache_block_size", self.kvcache_block_size, BLOCK_SIZES)

    def _check_ranges(self) -> None:
        _integer("max_model_len", self.max_model_len, 2, 1 << 24)
        _integer("max_num_seqs", self.max_num_seqs, 1, 1 << 16)
        _integer("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 24)
        _optional_integer("run_ahead", self.run_ahead, 1, MAX_RUN_AHEAD)
        _integer("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        utilization = self.gpu_memory_utilization
        if not _is_positive(utilization) or utilization > 1:
            raise ValueError(f"gpu_memory_utilization={shown(utilization)} must be in (0, 1]")
        slo_ms = self.itl_slo_ms
        if slo_ms is not None and (not _is_positive(slo_ms) or slo_ms > MOST_MS):
            raise ValueError(f"itl_slo_ms={shown(slo_ms)} must be None or milliseconds above 0, at most {MOST_MS}")
        if not _is_positive(self.hang_limit_s) or self.hang_limit_s > MOST_HANG_S:
            raise ValueError(
                f"hang_limit_s={shown(self.hang_limit_s)} must be a number of seconds above 0, at most {MOST_HANG_S}"
            )
        for count in self._block_counts():
            _integer("num_kvcache_blocks", count, 2, 1 << 31)
        _optional_integer("decode_backlog_high", self.decode_backlog_high, 1, 1 << 31)
        _optional_integer("decode_backlog_low", self.decode_backlog_low, 0, 1 << 31)
        if self.backlog_low >= self.backlog_high:
            raise ValueError(
                f"decode_backlog_low={self.backlog_low} must be below decode_backlog_high={self.backlog_high}"
            )

    def _check_cards(self) -> None:
        _integer("tensor_parallel_size", self.tensor_parallel_size, 1, 1 << 10)
        if self.tensor_parallel_size > 1:
            both = "enable_two_gpu_pd=True with " if self.enable_two_gpu_pd else ""
            raise ValueError(f"{both}tensor_parallel_size={self.tensor_parallel_size} is not supported; the limit is 1")
        _integer("prefill_device_id", self.prefill_device_id, 0, 1 << 10)
        _integer("decode_device_id", self.decode_device_id, 0, 1 << 10)
        if isinstance(self.num_kvcache_blocks, tuple) and not self.enable_two_gpu_pd:
            raise ValueError(
                f"num_kvcache_blocks={shown(self.num_kvcache_blocks)} names two cards, but enable_two_gpu_pd=False"
            )

    def _check_pipeline(self) -> None:
        _optional_integer("decode_attention_sm", self.decode_attention_sm, 1, MOST_SMS)
        _optional_integer("decode_ffn_sm", self.decode_ffn_sm, 1, MOST_SMS)
        if not self.enable_decode_pipeline:
            return
        if not self.enable_two_gpu_pd:
            raise ValueError("enable_decode_pipeline=True needs enable_two_gpu_pd=True: it divides the decode card")
        if self.disable_green and self.decode_pipeline == "static":
            raise ValueError("disable_green=True leaves nothing to decode_pipeline='static', which needs SM partitions")

    def _check_lending(self) -> None:
        if self.lend_sms is None:
            return
        if not isinstance(self.lend_sms, tuple) or len(self.lend_sms) != 2:
            raise ValueError(f"lend_sms={self.lend_sms!r} must be None or (SMs of decode steps, SMs of prompts)")
        for count in self.lend_sms:
            _integer("lend_sms", count, 1, MOST_SMS)
        if not self.enable_two_gpu_pd or self.pd_roles != "elastic":
            needed = "enable_two_gpu_pd=True with pd_roles='elastic'"
            raise ValueError(f"lend_sms={self.lend_sms} needs {needed}: it is how the decode card takes prompts")
        if self.pipelines_decode or self.disable_green:
            other = "disable_green=True" if self.disable_green else "a decode pipeline"
            raise ValueError(f"lend_sms={self.lend_sms} divides the decode card's SMs: not with {other}")

    @property
    def pipelines_decode(self) -> bool:
        """Whether a decode pipeline is to be started."""
        return self.enable_decode_pipeline and self.decode_pipeline != "disabled"

    def _block_counts(self) -> tuple[int, ...]:
        blocks = self.num_kvcache_blocks
        if blocks is None:
            return ()
        if isinstance(blocks, tuple):
            if len(blocks) != 2:
                raise ValueError(f"num_kvcache_blocks={shown(blocks)} must be one number or (card 0, card 1)")
            return blocks
        return (blocks,)

    @property
    def backlog_high(self) -> int:
        """Sequences prefilled but not yet decoding at which prefill pauses. With strict roles they have nowhere to go:
        few are let in, so that under overload prompts wait, not sequences that have begun to answer."""
        if self.decode_backlog_high is not None:
            return self.decode_backlog_high
        strict = self.enable_two_gpu_pd and self.pd_roles == "strict"
        return max(2, self.max_num_seqs // (32 if strict else 2))

    @property
    def backlog_low(self) -> int:
        """Sequences prefilled but not yet decoding at which prefill resumes."""
        return self.backlog_high // 2 if self.decode_backlog_low is None else self.decode_backlog_low

    @property
    def steps_ahead(self) -> int:
        """Decode steps that may be in flight beyond the oldest uncollected one, at most."""
        return (self.run_ahead or DEFAULT_RUN_AHEAD) if self.overlap else 0


def _one_of(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or not isinstance(value, type(allowed[0])) or value not in allowed:
        raise ValueError(f"{name}={shown(value)} must be one of {', '.join(map(str, allowed))}")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}={shown(value)} must be an integer from {low} to {high}")


def _optional_integer(name: str, value: object, low: int, high: int) -> None:
    if value is not None:
        _integer(name, value, low, high)
