"""Architectures whose router scores are sigmoids (or another function of each logit alone), a row each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moe_interp.adapters.experts import Fused
from moe_interp.adapters.family import At, Family, How, branch_through, first_of, sigmoid, softcap
from moe_interp.adapters.spec import ResidualInput, Scoring
from moe_interp.adapters.sums import Gate, Repeat, Streams, Sum, Times
from moe_interp.errors import UnsupportedModel

DEEPSEEK3 = Family(shared="mlp.shared_experts", scoring=sigmoid)
_SIGMOID = Family(scoring=sigmoid, renormalises=True)
_MINIMAX3 = replace(
    _SIGMOID,
    shared="mlp.shared_experts",
    routed_steps=lambda block: (Times(block.module.routed_scaling_factor),),
    moved={"shared_out": "router_logits"},
)
_CONNECTED = replace(
    DEEPSEEK3,
    streams="hc_mult",
    mid="ffn_hc",
    embedding=lambda body: (Repeat(body.module.config.hc_mult),),
    final=lambda body: (body.through("hc_head"), body.through("norm")),
)


def _streams(module: str, form: Any) -> How:
    """Hyper-connections around a branch."""
    return lambda layer: Streams(layer(module), form)


def _beam(index: str, norm: str) -> How:
    """Both summands scaled so that the variance of the stream stays what it is."""

    def how(layer: At) -> Sum:
        count = getattr(layer.module, index)
        return Sum(branch=(layer.through(norm), Times(count**-0.5)), residual=(Times(((count - 1) / count) ** 0.5),))

    return how


def _score_function(router: Any) -> Scoring:
    """Routers that take their score function from the config."""
    name = type(router.score_fn).__name__.lower()
    known = {"sigmoid": "sigmoid", "sqrtsoftplusactivation": "sqrtsoftplus", "softmax": "softmax"}
    if name not in known:
        raise UnsupportedModel("unknown router scores", expected=f"one of {sorted(known)}", got=name)
    return Scoring(known[name])  # type: ignore[arg-type]


def _inkling2_mid(layer: At) -> Sum:
    fresh = layer.module.is_block_boundary
    return Sum(branch=(layer.through("post_attention_convolution"),), residual=(Times(0.0),) if fresh else ())


def _nemotron(kind: str) -> Callable[[At], str | None]:
    """A layer is one mixer: attention, state space, MLP or mixture."""
    kinds = {"mlp": "dense", "moe": "mixture"}
    return lambda layer: "mixer" if kinds.get(layer.module.block_type, "attention") == kind else None


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        [
            "axk2",
            "bailing_hybrid",
            "deepseek_v3",
            "deepseek_v32",
            "dots1",
            "exaone_moe",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe_text",
            "glm_moe_dsa",
            "kimi_linear",
            "solar_open",
        ],
        DEEPSEEK3,
    ),
    "axk1": replace(DEEPSEEK3, whole_steps=lambda block: (block.through("post_mlp_layernorm"),)),
    "hy_v3": replace(DEEPSEEK3, renormalises=True),
    "flint": replace(DEEPSEEK3, shared="mlp.shared_expert"),
    "mimo_v2_flash": Family(scoring=sigmoid),
    "minimax_m2": _SIGMOID,
    "minimax_m3_vl_text": _MINIMAX3,
    "step3p5": replace(_MINIMAX3, kernel=Fused()),
    "laguna": replace(
        _MINIMAX3, scoring=lambda router: Scoring("sigmoid", softcap=router.router_logit_softcapping or None)
    ),
    "lfm2_moe": Family(
        block="feed_forward",
        dense=lambda layer: "feed_forward",
        attention=first_of("conv", "self_attn"),
        mid="ffn_norm",
        norm="embedding_norm",
        scoring=sigmoid,
    ),
    "afmoe": replace(
        _SIGMOID,
        router="router",
        shared="mlp.shared_experts",
        moved={"shared_out": "expert_ids"},
        mid="pre_mlp_layernorm",
        mid_join=branch_through("post_attention_layernorm"),
        post_join=branch_through("post_mlp_layernorm"),
        embedding=lambda body: (Times(body.module.config.hidden_size**0.5),) if body.module.config.mup_enabled else (),
    ),
    "kolibri1": replace(
        DEEPSEEK3,
        mid_join=branch_through("post_self_attn_layernorm"),
        post_join=branch_through("post_mlp_layernorm"),
    ),
    "beam": Family(
        scoring=sigmoid,
        mid="pre_feedforward_layernorm",
        mid_join=_beam("attn_residual_add_idx", "post_attention_layernorm"),
        post_join=_beam("mlp_residual_add_idx", "post_feedforward_layernorm"),
        routed_steps=lambda block: (Times(block.module.routed_scaling_factor),),
        logits=softcap,
    ),
    "cohere2_moe": Family(
        shared="mlp.shared_experts",
        scoring=lambda router: Scoring(router.expert_selection_fn),
        renormalises=lambda block: block.gate.expert_selection_fn == "softmax" or block.gate.norm_topk_prob,
        mid=None,
        whole_steps=lambda block: (Times(0.5),) if block.module.shared_expert_combination_strategy == "average" else (),
        logits=lambda config: {"logit_scale": config.logit_scale},
        notes=("Attention and mixture stand side by side: there is no resid_mid.",),
    ),
    "nemotron_h": replace(
        DEEPSEEK3,
        embed="embeddings",
        norm="norm_f",
        block="mixer",
        shared="mixer.shared_experts",
        attention=_nemotron("attention"),
        dense=_nemotron("dense"),
        mid=None,
        experts_input=lambda block: (block.through("fc1_latent_proj"),),
        routed_steps=lambda block: (block.through("fc2_latent_proj"),),
        notes=("A layer is one branch, attention or MLP or mixture: there is no resid_mid.",),
    ),
    "muse_spark_text": replace(
        _SIGMOID,
        scoring=lambda router: Scoring("sigmoid", scale=router.output_multiplier),
        mid="pre_feedforward_layernorm",
        mid_join=lambda layer: Gate(
            layer("post_attention_residual_gate"), False, (layer.through("post_attention_layernorm"),)
        ),
        post_join=lambda layer: Gate(
            layer("post_feedforward_residual_gate"), False, (layer.through("post_feedforward_layernorm"),)
        ),
        experts_input=lambda block: (block.through("pre_expert_proj"), block.through("pre_expert_norm")),
        routed_steps=lambda block: (block.through("post_expert_proj"),),
        logits=lambda config: softcap(config) | {"logit_scale": config.output_multiplier},
    ),
    "inkling_text": Family(
        shared="mlp.shared_experts",
        scoring=sigmoid,
        renormalises=False,
        alone=lambda block: False,
        columns=lambda router: router.num_experts,
        mid_join=branch_through("attn_sconv"),
        post_join=branch_through("mlp_sconv"),
        logits=lambda config: {
            "logit_scale": 1 / config.logits_mup_width_multiplier,
            "logit_columns": config.unpadded_vocab_size,
        },
        notes=("Weights are normalised together with those of the shared experts.",),
    ),
    "inkling2_text": Family(
        scoring=_score_function,
        renormalises=True,
        mid_join=_inkling2_mid,
        post_join=branch_through("post_mlp_convolution"),
        # The model keeps the very tensor that it gives a layer, to attend to it later.
        sites=lambda layer, mixture: {
            "resid_pre": ResidualInput(layer.path),
            "resid_mid": ResidualInput(layer("mlp_input"), argument=1),
        },
        final=lambda body: None,
        logits=lambda config: softcap(config) | {"logit_columns": config.unpadded_vocab_size},
        notes=("Attention over earlier blocks gives each branch its input, and the unembedding too.",),
    ),
    "deepseek_v4": replace(
        _CONNECTED,
        mid_join=_streams("attn_hc", "mixed"),
        post_join=_streams("ffn_hc", "mixed"),
        scoring=_score_function,
        renormalises=True,
        wide=lambda router: not hasattr(router, "tid2eid"),
        selects=lambda router: None if hasattr(router, "tid2eid") else "router",
        balance=lambda router: None if hasattr(router, "tid2eid") else "token",
        padding_reaches="left",
        notes=("Residual points have several streams. Hash-routed layers choose experts by the token id.",),
    ),
    "glm5_next_text": replace(
        _CONNECTED,
        mid_join=_streams("attn_hc", "mixed"),
        post_join=_streams("ffn_hc", "mixed"),
        notes=("Residual points have several streams.",),
    ),
    "hy_v4": replace(
        _CONNECTED,
        mid_join=_streams("attn_hc", "spread"),
        post_join=_streams("ffn_hc", "spread"),
        notes=("Residual points have several streams.",),
    ),
}
