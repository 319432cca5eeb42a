"""Blocks as they were written before transformers 5: the gate a plain `nn.Linear`, the experts a ModuleList.

Three small models, by `build(style)`; each block returns `(hidden, router_logits)`.

- `softmax_topk`: softmax over all experts, then the k largest, renormalised only if `norm_topk_prob` (as Qwen1.5-MoE;
  its shared expert, scaled by the sigmoid of one more linear map, stands beside).
- `softmax_topk_renormalised`: the same, always renormalised (as Mixtral, arXiv 2401.04088: the block is called
  `block_sparse_moe`, the matrices of an expert w1, w3 and w2).
- `topk_softmax`: the k largest logits, then a softmax over these alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from tests.deepseek_v1 import MLP, CausalLM, DecoderLayer, fields, randomised

STYLES = ("softmax_topk", "softmax_topk_renormalised", "topk_softmax")
_CONFIG: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_hidden_layers=4,
    num_attention_heads=4, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, max_position_embeddings=128,
    rms_norm_eps=1e-6, rope_theta=10000.0,
)  # fmt: skip


class LinearGateConfig(PreTrainedConfig):
    """The model type says the style."""

    model_type = "linear_gate"


class NumberedMLP(nn.Module):
    """SwiGLU with Mixtral's names."""

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class SparseMoeBlock(nn.Module):
    """Gate, experts, and a gated shared expert where the style has one."""

    def __init__(self, config: Any, style: str):
        super().__init__()
        self.style, self.num_experts, self.top_k = style, config.num_experts, config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        mlp = NumberedMLP if style == "softmax_topk_renormalised" else MLP
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(mlp(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        if style == "softmax_topk":
            self.shared_expert = MLP(config, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(rows)
        weights, ids = self._route(logits)
        total = torch.zeros_like(rows)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            total.index_add_(0, tokens, self.experts[e](rows[tokens]) * weights[tokens, slots, None])
        if self.style == "softmax_topk":
            total = total + functional.sigmoid(self.shared_expert_gate(rows)) * self.shared_expert(rows)
        return total.view(hidden_states.shape), logits

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.style == "topk_softmax":
            chosen, ids = torch.topk(logits, self.top_k, dim=-1)
            return chosen.softmax(dim=-1, dtype=torch.float32).to(logits.dtype), ids
        weights, ids = torch.topk(logits.softmax(dim=-1, dtype=torch.float32), self.top_k, dim=-1)
        if self.style == "softmax_topk_renormalised" or self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype), ids


def build(style: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> CausalLM:
    """A tiny random model in eval mode: E=8, K=3, D=64, 4 layers, all sparse; the seed decides its weights.

    Raises TypeError for a field that the config does not have, ValueError for an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: expected one of {', '.join(STYLES)}")
    config = LinearGateConfig(**fields(_CONFIG, overrides))
    config.model_type = f"linear_gate_{style}"
    name = "block_sparse_moe" if style == "softmax_topk_renormalised" else "mlp"
    layers = [DecoderLayer(config, SparseMoeBlock(config, style), name) for _ in range(config.num_hidden_layers)]
    return randomised(CausalLM(config, layers), seed, dtype)
