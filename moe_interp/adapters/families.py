"""The table of architectures: one row a family, and what `describe` makes of it.

A row names submodules relative to the decoder layer. Whether a layer is a mixture is not guessed: it is one where the
block holds a submodule under the row's ``experts`` name.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_interp.adapters.spec import (
    ExpertsCall,
    GatedOutput,
    Input,
    LayerSpec,
    ModelSpec,
    MoESpec,
    Output,
    ResidualInput,
    RouterLinear,
    Scores,
    Site,
)
from moe_interp.errors import UnsupportedModel


@dataclass(frozen=True)
class Family:
    """Where one family keeps its modules (paths relative to the decoder layer, ``block`` parts to the block)."""

    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    shared: str | None = None
    shared_gate: str | None = None
    attention: str = "self_attn"
    mid_norm: str = "post_attention_layernorm"
    scores: Scores = "softmax"
    renormalises: bool | None = None  # None: the router's own norm_topk_prob says


FAMILIES: dict[str, Family] = {
    "mixtral": Family(renormalises=True),
    "olmoe": Family(),
    "qwen2_moe": Family(shared="shared_expert", shared_gate="shared_expert_gate"),
    "qwen3_moe": Family(),
    "deepseek_v2": Family(shared="shared_experts", renormalises=False),
    "deepseek_v3": Family(shared="shared_experts", scores="sigmoid"),
    "gpt_oss": Family(router="router", renormalises=True),
}


def describe(hf: nn.Module) -> ModelSpec:
    """What the model ``hf`` (a transformers causal language model) computes, and where.

    Raises:
        UnsupportedModel: the model type is not in the table, or none of its layers is a mixture.
    """
    model_type = getattr(getattr(hf, "config", None), "model_type", type(hf).__name__)
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"cannot open model type {model_type!r}",
            expected=f"one of {', '.join(sorted(FAMILIES))}",
            got=f"{type(hf).__name__} with modules {_outline(hf)}",
            do="See the points an adapter needs in moe_interp/adapters/families.py.",
        )
    config: Any = hf.config
    stack = hf.get_submodule("model.layers")
    layers = tuple(_layer(hf, index, FAMILIES[model_type]) for index, _ in enumerate(stack.children()))
    if not any(layer.moe for layer in layers):
        raise UnsupportedModel(
            f"{model_type} model without experts",
            expected="at least one mixture-of-experts layer",
            got=f"{len(layers)} dense layers",
            do="Open a checkpoint whose config has sparse layers.",
        )
    return ModelSpec(
        model_type=model_type,
        layers=layers,
        embed="model.embed_tokens",
        final_norm="model.norm",
        unembed="lm_head",
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
    )


def _layer(hf: nn.Module, index: int, family: Family) -> LayerSpec:
    path = f"model.layers.{index}"
    block = f"{path}.{family.block}"
    sites: dict[str, Site] = {
        "resid_pre": Input(path),
        "attn_out": Output(f"{path}.{family.attention}"),
        "resid_mid": ResidualInput(f"{path}.{family.mid_norm}"),
        "resid_post": Output(path),
    }
    if not hasattr(hf.get_submodule(block), family.experts):
        return LayerSpec(index, path, sites | {"mlp_out": Output(block)}, moe=None)
    moe = _moe(hf, block, family)
    return LayerSpec(index, path, sites | _moe_sites(moe, family), moe)


def _moe(hf: nn.Module, block: str, family: Family) -> MoESpec:
    router: Any = hf.get_submodule(f"{block}.{family.router}")
    return MoESpec(
        block=block,
        router=f"{block}.{family.router}",
        experts=f"{block}.{family.experts}",
        num_experts=router.num_experts,
        top_k=router.top_k,
        scores=family.scores,
        renormalises=router.norm_topk_prob if family.renormalises is None else family.renormalises,
        shared=f"{block}.{family.shared}" if family.shared else None,
    )


def _moe_sites(moe: MoESpec, family: Family) -> dict[str, Site]:
    sites: dict[str, Site] = {
        "moe_in": Input(moe.block),
        "router_logits": RouterLinear(moe.router),
        "router_scores": RouterLinear(moe.router),
        "moe_out": Output(moe.block),
    }
    inside = ("expert_ids", "gate_weights", "expert_act", "expert_out", "routed_out")
    sites |= {point: ExpertsCall(moe.experts) for point in inside}
    if moe.shared and family.shared_gate:
        sites["shared_out"] = GatedOutput(moe.shared, f"{moe.block}.{family.shared_gate}")
    elif moe.shared:
        sites["shared_out"] = Output(moe.shared)
    return sites


def _outline(hf: nn.Module) -> str:
    names = [name for name, _ in hf.named_children()] or ["no submodules"]
    return ", ".join(names[:8])
