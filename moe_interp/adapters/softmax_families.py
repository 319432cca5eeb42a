"""Architectures whose router scores are a softmax, a row each."""

from dataclasses import replace
from typing import Any

from moe_interp.adapters import dbrx, module_list
from moe_interp.adapters.family import At, Family, How, branch_through, first_of, never, softcap
from moe_interp.adapters.spec import Output, RouterOutput, RouterTopK, Site
from moe_interp.adapters.sums import Flatten, Gate, Plus, Repeat, Streams, Sum, Times
from moe_interp.points import SELECTION

_QWEN = Family()
_QWEN_SHARED = Family(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
_LINEAR_OR_SOFTMAX = first_of("linear_attn", "self_attn")
_DEEPSEEK2 = Family(shared="mlp.shared_experts", renormalises=False)
_GRANITE_MULTIPLIER: How = lambda layer: Sum(branch=(Times(layer.module.residual_multiplier),))  # noqa: E731
_GRANITE = Family(
    block="block_sparse_moe",
    router="router",
    shared="shared_mlp",
    shared_beside=True,
    dense=lambda layer: "shared_mlp",
    attention=first_of("mamba", "self_attn"),
    renormalises=True,
    mid_join=_GRANITE_MULTIPLIER,
    post_join=_GRANITE_MULTIPLIER,
    embedding=lambda body: (Times(body.module.embedding_multiplier),),
    logits=lambda config: {"logit_scale": 1 / config.logits_scaling},
    moved={"shared_out": "resid_post"},
)
SHARED_FIRST = {"shared_out": "router_logits"}
ERNIE = Family(shared="mlp.shared_experts", renormalises=True, moved=SHARED_FIRST)


def _minimax(layer: At) -> dict[str, Any]:
    """The residual stream is the normed one: a branch is added to what it was given."""
    module = layer.module
    return {
        "mid": Sum(
            residual=(layer.through("input_layernorm"), Times(module.attn_alpha_factor)),
            branch=(Times(module.attn_beta_factor),),
            whole=(layer.through("post_attention_layernorm"),),
        ),
        "post": Sum(residual=(Times(module.mlp_alpha_factor),), branch=(Times(module.mlp_beta_factor),)),
    }


FAMILIES: dict[str, Family] = {
    "mixtral": Family(renormalises=True),
    "olmoe": _QWEN,
    "mellum": _QWEN,
    "qwen3_moe": _QWEN,
    "qwen3_omni_moe_text": replace(_QWEN, entry=lambda hf: "thinker" if At(hf, "").has("thinker") else ""),
    "qwen3_vl_moe_text": Family(renormalises=True),
    "qwen2_moe": _QWEN_SHARED,
    "qwen3_next": replace(_QWEN_SHARED, attention=_LINEAR_OR_SOFTMAX),
    "qwen3_5_moe_text": replace(_QWEN_SHARED, attention=_LINEAR_OR_SOFTMAX, renormalises=True),
    "deepseek_v2": _DEEPSEEK2,
    "deepseek_ocr2_text": _DEEPSEEK2,
    "unlimited_ocr_text": _DEEPSEEK2,
    "deepseek": Family(
        shared="mlp.shared_experts",
        kernel=module_list.KERNEL,
        call=module_list.forward_deepseek,
        num_experts="gate.n_routed_experts",
        top_k="gate.top_k",
        notes=("Experts are modules of their own; the remote code's eval path without gradients is replaced.",),
    ),
    "mistral4": Family(shared="mlp.shared_experts"),
    "mistral_large4_text": Family(
        shared="mlp.shared_experts", renormalises=True, logits=softcap, padding_reaches="positions"
    ),
    "gpt_oss": Family(router="router", renormalises=True),
    "openai_privacy_filter": Family(
        router="router",
        renormalises=True,
        counts_too="num_experts",
        routed_steps=lambda block: (Times(float(block.module.num_experts)),),
        kind="encoder",
        options={},
    ),
    "aria_text": Family(router="router", shared="mlp.shared_experts", renormalises=True),
    "hunyuan_v1_moe": Family(
        shared="mlp.shared_mlp", renormalises=True, padding_reaches="positions", moved=SHARED_FIRST
    ),
    "ernie4_5_moe": ERNIE,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "jamba": Family(
        block="feed_forward",
        router="router",
        dense=lambda layer: "feed_forward",
        attention=first_of("mamba", "self_attn"),
        mid="pre_ff_layernorm",
        norm="final_layernorm",
        renormalises=False,
    ),
    "flex_olmo": Family(
        mid="mlp",
        mid_join=branch_through("post_attention_layernorm"),
        post_join=branch_through("post_feedforward_layernorm"),
    ),
    "minimax": Family(
        renormalises=True,
        mid_join=lambda layer: _minimax(layer)["mid"],
        post_join=lambda layer: _minimax(layer)["post"],
        sites=lambda layer, mixture: {"resid_mid": Output(layer("post_attention_layernorm"))},
        notes=("The residual stream is normed before each branch, and the branch is added to the normed stream.",),
    ),
    "phimoe": Family(
        router="router",
        selects=lambda router: None,
        renormalises=False,
        proportional=False,
        top_k=2,  # whatever its config says
        wide=never,
        notes=(
            "Two experts run, whatever the config says.",
            "A weight is the score of one pick among the experts near it (SparseMixer), not of a softmax over all.",
        ),
    ),
    "dbrx": Family(
        layers="blocks",
        embed="wte",
        norm="norm_f",
        block="ffn",
        router="router",
        kernel=dbrx.KERNEL,
        selects=lambda router: "block",
        top_k="top_k",
        attention=lambda layer: "norm_attn_norm.attn",
        mid="norm_attn_norm.norm_2",
        renormalises=lambda block: block.moe_normalize_expert_weights == 1,
        alone=lambda block: block.moe_normalize_expert_weights is None,
    ),
    "qwen4_exp_text": replace(
        _QWEN_SHARED,
        attention=_LINEAR_OR_SOFTMAX,
        mid="mlp_hyper_connection",
        mid_join=lambda layer: None if layer.has("ple") else Streams(layer("attn_hyper_connection"), "flat"),
        post_join=lambda layer: Streams(layer("mlp_hyper_connection"), "flat"),
        streams="hc_count",
        embedding=lambda body: (Repeat(body.module.config.hc_count),),
        final=lambda body: (Flatten(), body.through("hyper_connection_mixer")),
        notes=("Residual points have several streams.",),
    ),
    "zaya": Family(
        renormalises=False,
        mid_join=lambda layer: Gate(layer("post_attention_residual_scale"), branch_first=True),
        post_join=lambda layer: Gate(layer("post_mlp_residual_scale"), branch_first=True),
        sites=lambda layer, mixture: _zaya_router(layer),
        embedding=lambda body: (
            Plus(body("input_hidden_states_bias")),
            Times(body("input_hidden_states_scale")),
        ),
        skips=True,
        notes=("The router's last class is no expert: a token that it chooses has id 0 and weight 0.",),
    ),
}


def _zaya_router(layer: At) -> dict[str, Site]:
    logits = RouterOutput(layer("mlp.gate.router_mlp"))
    classes = layer.sub("mlp.experts").module.num_experts + 1  # the last is to skip
    choice = dict.fromkeys(SELECTION, RouterTopK(layer("mlp.gate"), classes, batched=True))
    return {"router_logits": logits, "router_scores": logits, **choice}
