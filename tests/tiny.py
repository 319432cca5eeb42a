"""Tiny random models of the seven families under test, from configs alone: E=8, K=3, D=64, 4 layers.

1. `_CONFIGS` shrinks each family and moves its switches off their defaults (scaling, renormalisation, groups,
   windows shorter than the texts of the tests, a clamp that bites): no formula hides behind a neutral value.
2. Every parameter, and every buffer but the rotary frequencies, is drawn anew: a fresh model has zero biases,
   unit norms and a nearly uniform router.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_COMMON: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    num_experts_per_tok=3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_LATENT_ATTENTION: dict[str, Any] = dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
_YARN: dict[str, Any] = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
    original_max_position_embeddings=32,
)  # fmt: skip
_CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=8, intermediate_size=24, sliding_window=6),
    "olmoe": dict(num_experts=8, intermediate_size=24, norm_topk_prob=True),
    "qwen2_moe": dict(
        num_experts=8, moe_intermediate_size=24, intermediate_size=48, norm_topk_prob=True,
        shared_expert_intermediate_size=40, mlp_only_layers=[1],
        use_sliding_window=True, sliding_window=6, max_window_layers=4,
    ),
    "qwen3_moe": dict(
        num_experts=8, moe_intermediate_size=24, intermediate_size=48, head_dim=16, norm_topk_prob=True,
        mlp_only_layers=[1], use_sliding_window=True, sliding_window=6,
    ),
    "deepseek_v2": dict(
        _LATENT_ATTENTION, n_routed_experts=8, moe_intermediate_size=24, intermediate_size=48,
        n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=1.7, norm_topk_prob=True,
        topk_method="greedy", n_group=2, topk_group=1,
    ),
    "deepseek_v3": dict(
        _LATENT_ATTENTION, n_routed_experts=8, moe_intermediate_size=24, intermediate_size=48,
        n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=1.7, norm_topk_prob=True,
        n_group=2, topk_group=1, num_mtp_layers=0,
    ),
    "gpt_oss": dict(
        num_local_experts=8, intermediate_size=24, head_dim=16, sliding_window=6, rope_parameters=_YARN,
        swiglu_limit=1.5, swiglu_alpha=1.3,
    ),
}  # fmt: skip
FAMILIES: tuple[str, ...] = tuple(_CONFIGS)


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of `family` in eval mode on the CPU; the same seed gives the same weights.

    `overrides` are fields of the family's config. Parameters are cast to `dtype`; buffers stay in fp32, as
    `from_pretrained` leaves them. The global random state is left as it was.

    Raises KeyError for an unknown family, TypeError for a field that the family's config does not have.
    """
    config_class = CONFIG_MAPPING[family]
    unknown = [name for name in overrides if not hasattr(config_class(), name)]
    if unknown:
        raise TypeError(f"{config_class.__name__} has no field {', '.join(unknown)}")
    config = config_class(**{**_COMMON, **_CONFIGS[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    _randomise(model, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter, and every buffer but the rotary frequencies, from one generator."""
    generator = torch.Generator().manual_seed(seed)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if not name.endswith("inv_freq")]
    for name, tensor in [*model.named_parameters(), *buffers]:
        mean, std = _distribution(name, tensor, model.config.model_type)
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))


def _distribution(name: str, tensor: Tensor, family: str) -> tuple[float, float]:
    """Mean and standard deviation of one tensor: matrices keep their input's scale, routers double it."""
    if "norm" in name:
        return 1.0, 0.2
    if "embed_tokens" in name:
        return 0.0, 1.0
    if name.endswith("sinks"):
        return 0.0, 1.0
    if tensor.ndim == 1 or name.endswith("_bias"):
        return 0.0, 0.3
    transposed = family == "gpt_oss" and "experts" in name
    fan_in = tensor.shape[-2] if transposed else tensor.shape[-1]
    gain = 2.0 if name.endswith((".gate.weight", ".router.weight")) else 1.0
    return 0.0, gain * fan_in**-0.5
