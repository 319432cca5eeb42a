"""Checkpoints of DeepSeekMoE-16B v1 (arXiv 2401.06066), for which transformers 5 has no model type.

Their remote code does not import there either. But one of its own classes, the text part of Unlimited-OCR, is the same
architecture: DeepSeek-V2's block under plain multi-head attention. What it lacks is the unembedding, added here, and
renormalised weights, which the published checkpoints do not have.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, UnlimitedOcrTextConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import (
    UnlimitedOcrTextModel,
    UnlimitedOcrTextPreTrainedModel,
)

from moe_interp.errors import UnsupportedModel

MODEL_TYPE = "deepseek"
# What the class computes, whatever the checkpoint's config says: other values are refused.
_FIXED: dict[str, Any] = {
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_routed_experts", "num_experts_per_tok",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "bos_token_id", "eos_token_id",
)  # fmt: skip


class DeepseekV1ForCausalLM(UnlimitedOcrTextPreTrainedModel, GenerationMixin):
    """The architecture of DeepSeekMoE-16B v1, of parts of transformers."""

    def __init__(self, config: UnlimitedOcrTextConfig):
        super().__init__(config)
        self.model = UnlimitedOcrTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, logits_to_keep: int = 0, **inputs: Any
    ) -> CausalLMOutputWithPast:
        """Logits of all positions, or of the last ``logits_to_keep``."""
        outputs = self.model(input_ids=input_ids, **inputs)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


def native_config(published: Mapping[str, Any]) -> UnlimitedOcrTextConfig:
    """The config of that class for a published config.json.

    Raises:
        UnsupportedModel: a checkpoint that the class would compute wrongly.
    """
    for name, value in _FIXED.items():
        if published.get(name, value) != value:
            raise UnsupportedModel(
                f"cannot load a checkpoint of model type {MODEL_TYPE!r} with {name}",
                expected=f"{name} = {value}, as transformers' class of this architecture computes",
                got=f"{name} = {published[name]}",
                do="Build the model with its own code and open it with moe.wrap(model).",
            )
    layers, dense = published["num_hidden_layers"], published.get("first_k_dense_replace", 0)
    return UnlimitedOcrTextConfig(
        **{name: published[name] for name in _SAME if name in published},
        dtype=published.get("torch_dtype", published.get("dtype")),
        mlp_layer_types=["dense"] * dense + ["sparse"] * (layers - dense),
        layer_types=["full_attention"] * layers,
        rope_parameters={"rope_type": "default", "rope_theta": published.get("rope_theta", 10000.0)},
    )
