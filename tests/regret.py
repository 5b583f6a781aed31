"""Correct "by regret": how much worse than the best, for a float32 reference, is each token the engine chose?

The reference is transformers' Qwen3 with the engine's own weights in float32. At every greedy output position it is
shown the very tokens that the engine saw (teacher forcing); the regret is the gap between its best logit and its logit
of the token that the engine chose: 0 where both choose alike, and small where rounding turned the order of near ties.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanovllm import LLM
from nanovllm.models.model_config import ModelConfig
from nanovllm.outputs import RequestOutput

CHUNK_TOKENS = 1024  # bounds the scores [heads, chunk, context] where SDPA materialises them: 4 GiB at 32k of 8B


@dataclass(frozen=True)
class Bounds:
    """Nats. `mean` and `p99` over all positions together, `worst` at every one."""

    mean: float
    p99: float
    worst: float


FLOAT32 = Bounds(mean=2e-3, p99=2e-3, worst=2e-3)
# `worst` catches a lone wrong token, which no mean and no percentile sees. With random weights such a token lies about
# 4 below the best, and rounding alone would need an error of half the logits' spread to reach 1.
BFLOAT16 = Bounds(mean=0.06, p99=0.2, worst=1.0)


@dataclass(frozen=True)
class Regrets:
    """Regrets in nats, float32 [output tokens], one tensor for each answer, and its prompt's length beside."""

    rows: list[Tensor]
    prompt_tokens: list[int]

    @property
    def mean(self) -> float:
        return float(torch.cat(self.rows).mean())

    @property
    def p99(self) -> float:
        return float(torch.cat(self.rows).quantile(0.99))

    @property
    def worst(self) -> float:
        """NaN if any is."""
        return float(torch.cat(self.rows).max())

    def check(self, bounds: Bounds) -> Regrets:
        """Itself, if every figure is within its bound; NaN is not."""
        within = self.mean <= bounds.mean and self.p99 <= bounds.p99 and self.worst <= bounds.worst
        assert within, f"{self}\nbeyond {bounds}\n{self._where()}"
        return self

    def _where(self, count: int = 5) -> str:
        """The answers that did worst, by their mean."""
        rows = sorted(enumerate(self.rows), key=lambda item: -float(item[1].nan_to_num(torch.inf).mean()))
        return "\n".join(
            f"answer {i} (prompt of {self.prompt_tokens[i]}, {len(row)} tokens): mean {float(row.mean()):.4f}, "
            f"worst {float(row.max()):.4f} at output {int(row.nan_to_num(torch.inf).argmax())}"
            for i, row in rows[:count]
        )

    def __str__(self) -> str:
        positions = torch.cat(self.rows)
        chosen = float((positions == 0).float().mean())
        return (
            f"regret over {len(self.rows)} answers, {len(positions)} positions: mean {self.mean:.5f}, "
            f"p99 {self.p99:.5f}, worst {self.worst:.5f} nat; {chosen:.1%} the reference's own choice"
        )


class Reference:
    """transformers' Qwen3 in float32 with the weights of `llm`, on its prefill card; outlives the LLM.

    Takes four bytes a parameter there, so give the LLM a pool (`num_kvcache_blocks`) that leaves room.
    """

    def __init__(self, llm: LLM) -> None:
        assert torch.get_float32_matmul_precision() == "highest", "TF32 is no float32 reference"
        runner = llm.prefill_runner
        self.device = runner.device
        self.model = empty_model(llm.model_config, self.device)
        weights = runner.model.checkpoint_slots()
        parameters = dict(self.model.named_parameters())  # a tied matrix once, under its first name
        assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int], answer: Sequence[int], chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
        """float32 [len(answer), vocab_size]: those that choose each token of `answer`, on the reference's device."""
        ids = torch.tensor([[*prompt, *answer[:-1]]], device=self.device)
        cache = DynamicCache(config=self.model.config)
        pieces = [self._hidden(piece, cache) for piece in ids.split(chunk_tokens, dim=1)]
        return self.model.lm_head(torch.cat(pieces)[-len(answer) :])

    def _hidden(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """Final hidden states [tokens, hidden] of the next tokens; the cache grows by them."""
        return self.model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[0]

    def regret(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Nats, float32 [len(answer)] on the CPU."""
        logits = self.logits(prompt, answer)
        chosen = torch.tensor(answer, device=self.device)[:, None]
        return (logits.amax(-1) - logits.gather(-1, chosen)[:, 0]).cpu()

    def measure(self, outputs: Iterable[RequestOutput]) -> Regrets:
        """Of every answer of these greedy requests, which had neither penalties nor `min_tokens`."""
        pairs = [(out.prompt_token_ids, answer.token_ids) for out in outputs for answer in out.outputs]
        return Regrets([self.regret(*pair) for pair in pairs], [len(prompt) for prompt, _ in pairs])


def empty_model(config: ModelConfig, device: torch.device) -> Qwen3ForCausalLM:
    """transformers' model in float32, its weights not set yet."""
    hf_config = reference_config(config)
    with torch.device(device):
        model = Qwen3ForCausalLM(hf_config).eval()
    # Its angles as on a CPU: a GPU's powers differ in the last bit, 0.003 radians at position 32,000.
    model.model.rotary_emb = Qwen3RotaryEmbedding(hf_config).to(device)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return model


def reference_config(config: ModelConfig) -> Qwen3Config:
    assert config.rope_scaling is None, "regret is measured with plain RoPE"
    return Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="sdpa",
        dtype="float32",
    )


def release_gpu_memory() -> None:
    """Give back what closed engines and references held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
