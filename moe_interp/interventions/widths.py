"""Interventions on how many experts a token has.

What is dropped gets weight 0, and is not computed where nobody asks for it. More than its own number a router chooses
by its own recipe.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_interp.adapters.spec import ModelSpec, MoESpec
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.interventions.base import Change, Edit, Placed, layers_at, moe_layers_at
from moe_interp.interventions.routes import check_left, open_to_choice
from moe_interp.points import SELECTION
from moe_interp.run import Context


@dataclass(frozen=True, kw_only=True)
class TopK(Placed):
    """Keep only the k heaviest experts of each token."""

    drops: ClassVar[bool] = True
    k: int
    renormalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or self.k < 1:
            raise BadInput("cannot keep fewer than one expert", expected="k >= 1", got=f"k = {self.k}")

    def widths(self, spec: ModelSpec) -> Mapping[int, int]:
        """Routers that must choose more experts than they do on their own."""
        chosen = moe_layers_at(spec, self.layers)
        for layer in chosen:
            count = spec.moe(layer).num_experts
            if self.k > count:
                got = f"k = {self.k}"
                raise BadInput(f"cannot keep {self.k} experts at layer {layer}", expected=f"k up to {count}", got=got)
        wider = {layer: self.k for layer in chosen if self.k > spec.moe(layer).top_k}
        for layer in wider:
            if spec.moe(layer).width is None:
                raise BadInput(
                    f"the router of layer {layer} cannot choose {self.k} experts",
                    expected=f"k up to {spec.moe(layer).top_k}, which {spec.model_type} has built in",
                    got=str(self.k),
                )
            if self.positions is not None or self.tokens is not None:
                raise BadInput(
                    "more experts at some tokens only",
                    expected=f"k up to {spec.moe(layer).top_k} there",
                    got=str(self.k),
                )
        return wider

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of ``gate_weights`` at each layer, and looks at the choice of wider routers.

        These must leave enough to choose, and say whose the router's own K were.

        Raises:
            UnsupportedModel: K experts would have had other weights, which those of k do not tell.
        """
        wider = [layer for layer in self.widths(spec) if self.renormalise and not spec.moe(layer).renormalises]
        for layer in wider:
            if not spec.moe(layer).alone:
                raise UnsupportedModel(
                    f"weights of layer {layer} of {spec.model_type} cannot be rescaled to the total of its own K",
                    expected=f"k up to {spec.moe(layer).top_k}, or weights that do not depend on who else is chosen",
                    got=f"k = {self.k}",
                    do="Leave renormalise off.",
                )
        looks = [Edit(point, layer, _unchanged) for point in SELECTION for layer in layers_at(spec, point, wider)]
        choosing = [layer for layer in self.widths(spec) if SELECTION[0] in spec.layer(layer).sites]
        looks += [Edit(SELECTION[0], layer, _checked) for layer in choosing]
        layers = moe_layers_at(spec, self.layers)
        return looks + [Edit("gate_weights", layer, self._kept(spec.moe(layer), layer in wider)) for layer in layers]

    def _kept(self, moe: MoESpec, wider: bool) -> Callable[[Tensor, Context], Change]:
        def kept(weights: Float[Tensor, "B S K"], context: Context) -> Change:
            light = (_rank(weights) >= self.k) & self.here(context)[..., None]
            # A widened router that renormalises has given its k weights the same total already.
            own = weights.masked_fill(_rank_of_choice(context) >= moe.top_k, 0.0) if wider else weights
            change = _without(weights, light, own if self.renormalise else None)
            # Slots that a wider router has beyond its own are of this edit, too.
            more = max(0, min(self.k, weights.shape[-1]) - moe.top_k)
            return change._replace(touched=change.touched + more * int(context.seen.sum()))

        return kept


@dataclass(frozen=True, kw_only=True)
class Share(Placed):
    """Keep the fewest experts of each token whose weights reach a share of their sum, heaviest first."""

    drops: ClassVar[bool] = True
    share: float
    renormalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise BadInput("not a share of weight", expected="a number above 0, up to 1", got=str(self.share))

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of ``gate_weights`` at each layer."""
        return [Edit("gate_weights", layer, self._kept) for layer in moe_layers_at(spec, self.layers)]

    def _kept(self, weights: Float[Tensor, "B S K"], context: Context) -> Change:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        # A slot is kept if those before it have not reached the share; rounding must not add one.
        before = ordered.double().cumsum(dim=-1) - ordered.double()
        enough = before >= (self.share - 1e-9) * ordered.double().sum(dim=-1, keepdim=True)
        light = torch.zeros_like(enough).scatter(-1, order, enough) & self.here(context)[..., None]
        return _without(weights, light, weights if self.renormalise else None)


def _rank(weights: Float[Tensor, "B S K"]) -> Int[Tensor, "B S K"]:
    """0 for the heaviest slot of a token."""
    return weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _rank_of_choice(context: Context) -> Int[Tensor, "B S K"]:
    """0 for the slot that the router would choose first: by its scores with any bias, not by weight."""
    return _rank(context.choice.gather(-1, context.chosen))  # type: ignore[union-attr, arg-type]


def _unchanged(value: Tensor, context: Context) -> Change:
    return Change(value, 0)


def _checked(scores: Float[Tensor, "B S E"], context: Context) -> Change:
    """The scores, where the groups that the router chose have enough experts."""
    check_left(open_to_choice(scores), context.seen, context, "Keep fewer.")
    return Change(scores, 0)


def _without(
    weights: Float[Tensor, "B S K"], light: Bool[Tensor, "B S K"], total_of: Float[Tensor, "B S K"] | None
) -> Change:
    """Weights without the light ones, rescaled to the total of others if asked."""
    left = weights.masked_fill(light, 0.0)
    if total_of is not None:
        total = left.sum(dim=-1, keepdim=True)
        changed = light.any(dim=-1, keepdim=True) | (total_of != weights).any(dim=-1, keepdim=True)
        left = torch.where(changed & (total != 0), left * (total_of.sum(dim=-1, keepdim=True) / total), left)
    return Change(left, int(light.sum()))


def keep_slots(
    weights: Float[Tensor, "B S K"], k: int, renormalise: bool, order: Int[Tensor, "B S K"]
) -> Float[Tensor, "B S K"]:
    """Weights of the first k slots in the given order, the others zero."""
    kept = weights.masked_fill(order.to(weights.device) >= k, 0.0)
    if not renormalise:
        return kept
    total = kept.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, kept * (weights.sum(dim=-1, keepdim=True) / total), kept)
