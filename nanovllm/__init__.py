"""nanovllm: Qwen3 on two GPUs of one box, prefill on one and decode on the other, in one process.

Names are imported when first used: the scheduler side (`nanovllm.engine.scheduler`, `nanovllm.config`) must stay
importable without torch.
"""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import EngineDeadError
    from nanovllm.llm import LLM
    from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput, StreamOutput
    from nanovllm.sampling_params import SamplingParams

IMPORT_STARTED_S = time.perf_counter()  # `LLM.startup` counts from here
__version__ = "0.1.0"
DEMO_MODEL = str(Path(__file__).parent / "demo")  # a small trained Qwen3 checkpoint inside the package

_HOMES = {
    "LLM": "nanovllm.llm",
    "SamplingParams": "nanovllm.sampling_params",
    "RequestOutput": "nanovllm.outputs",
    "CompletionOutput": "nanovllm.outputs",
    "StreamOutput": "nanovllm.outputs",
    "Logprob": "nanovllm.outputs",
    "EngineDeadError": "nanovllm.engine.llm_engine",
}
__all__ = [
    "DEMO_MODEL",
    "LLM",
    "CompletionOutput",
    "EngineDeadError",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StreamOutput",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
