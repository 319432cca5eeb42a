"""LongCat-Flash: experts that do nothing, and layers of two halves with the mixture across both.

A layer of the checkpoint is attention, MLP, attention, MLP, with the mixture taking its input before the first MLP and
giving its output after the second. Each half is a layer here, 2i and 2i + 1, as the config's own
``num_hidden_layers`` counts them; the mixture belongs to the second. Experts from ``n_routed_experts`` on return what
they are given (arXiv 2509.01322, section 2.1).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.adapters.experts import ExpertWeights, Fused, OnAct
from moe_interp.adapters.family import At, Described, Family
from moe_interp.adapters.spec import Input, LayerSpec, ModelSpec, Output, ResidualInput, Site
from moe_interp.adapters.sums import Join
from moe_interp.errors import BadInput
from moe_interp.points import in_order


@dataclass(frozen=True)
class WithIdentities:
    """Fused experts, followed by experts that return their input; the neurons of those are 0."""

    fused: Fused

    def outputs(self, experts: Any, hidden: Tensor, ids: Tensor, on_act: OnAct | None = None) -> Tensor:
        """Unweighted outputs [T*K, D], slot by slot."""
        routed = (ids < experts.num_routed_experts).reshape(-1, 1)

        def shown(act: Tensor) -> Tensor:
            act = act.masked_fill(~routed, 0.0)
            return act if on_act is None else on_act(act)

        out = self.fused.outputs(experts, hidden, ids.clamp(max=experts.num_routed_experts - 1), shown)
        return torch.where(routed, out, hidden.repeat_interleave(ids.shape[-1], dim=0))

    def weights(self, experts: Any, expert: int) -> ExpertWeights:
        """The matrices of one expert, detached.

        Raises:
            BadInput: an expert that has none.
        """
        if expert >= experts.num_routed_experts:
            raise BadInput(
                f"expert {expert} has no matrices",
                expected=f"an expert from 0 to {experts.num_routed_experts - 1}",
                got="one that returns its input",
            )
        return self.fused.weights(experts, expert)


FAMILY = Family(
    router="router",
    kernel=WithIdentities(Fused(act="act_fn", count="num_routed_experts")),
    num_experts="experts.total_experts",
    renormalises=False,
    notes=(
        "Each layer of the checkpoint is two here, 2i and 2i + 1; the mixture, between both, belongs to the second.",
        "Expert ids from n_routed_experts on are experts that return their input.",
    ),
)


def describe(hf: nn.Module) -> ModelSpec:
    """What a LongCat-Flash model computes, and where."""
    body = FAMILY.find_body(hf)
    layers = body.sub("layers")
    halves = [
        _half(At(hf, layers(str(number))), 2 * number + half, half)
        for number, _ in enumerate(layers.module.children())
        for half in (0, 1)
    ]
    return FAMILY.model_spec(hf, body, tuple(halves))


def _half(layer: At, index: int, half: int) -> LayerSpec:
    between = ResidualInput(layer("input_layernorm.1"))
    sites: dict[str, Site] = {
        "resid_pre": between if half else Input(layer.path),
        "attn_out": Output(layer(f"self_attn.{half}")),
        "resid_mid": ResidualInput(layer(f"post_attention_layernorm.{half}")),
        "mlp_out": Output(layer(f"mlps.{half}")),
        "resid_post": Output(layer.path) if half else between,
    }
    mid = Join("resid_pre", ("attn_out",))
    if not half:
        return LayerSpec(index, layer.path, sites, None, mid, Join("resid_mid", ("mlp_out",)))
    moe = FAMILY.moe(layer)
    mixture = FAMILY.moe_sites(layer, moe)
    sites = {name: mixture[name] for name in in_order(mixture, {})} | sites  # the mixture runs in the first half
    return LayerSpec(index, layer.path, sites, moe, mid, Join("resid_mid", ("mlp_out", "moe_out")), part=1)


ADAPTER = Described(describe, FAMILY.notes)
