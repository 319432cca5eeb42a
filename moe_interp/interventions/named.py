"""The interventions that have a name: ablate, scale, top_k; and apply, for any function of one's own."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from moe_interp.adapters import ModelSpec, MoESpec
from moe_interp.errors import BadInput
from moe_interp.interventions.base import Change, Edit, Intervention, layers_at
from moe_interp.points import editable
from moe_interp.run import Context, Indices, positions_of


@dataclass(frozen=True)
class Scale(Intervention):
    """Multiply one expert's output."""

    layer: int
    expert: int
    by: float
    positions: tuple[int, ...] | None = None

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of ``expert_out``, wherever a slot holds the expert."""
        spec.check_runs(self.layer, self.expert)
        return [Edit("expert_out", self.layer, self._scaled)]

    def _scaled(self, outputs: Tensor, context: Context) -> Change:
        slots = context.slots_of(self.expert, self.positions)
        return Change(torch.where(slots[..., None], outputs * self.by, outputs), int(slots.sum()))


@dataclass(frozen=True)
class TopK(Intervention):
    """Keep only the k heaviest experts of each token."""

    k: int
    renormalise: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise BadInput("cannot keep fewer than one expert", expected="k >= 1", got=f"k = {self.k}")

    def widths(self, spec: ModelSpec) -> Mapping[int, int]:
        """Routers that must choose more experts than they do on their own."""
        chosen = layers_at(spec, "gate_weights", self.layers)
        for layer in chosen:
            spec.check_expert(layer, self.k - 1)  # type: ignore[arg-type]
        wider = {layer: self.k for layer in chosen if layer is not None and self.k > spec.moe(layer).top_k}
        for layer in wider:
            if spec.moe(layer).width is None:
                raise BadInput(
                    f"the router of layer {layer} cannot choose {self.k} experts",
                    expected=f"k up to {spec.moe(layer).top_k}, which {spec.model_type} has built in",
                    got=str(self.k),
                )
        return wider

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of ``gate_weights`` at each layer."""
        layers = layers_at(spec, "gate_weights", self.layers)
        return [Edit("gate_weights", layer, self._kept(spec.moe(layer))) for layer in layers if layer is not None]

    def _kept(self, moe: MoESpec) -> Callable[[Tensor, Context], Change]:
        def kept(weights: Tensor, context: Context) -> Change:
            rank = weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            light = (rank >= self.k) & context.tokens.mask[..., None]
            left = weights.masked_fill(light, 0.0)
            if self.renormalise:
                # A widened router that renormalises has given its k weights the same total already.
                own = weights if moe.renormalises else weights.masked_fill(rank >= moe.top_k, 0.0)
                left = left * (own.sum(dim=-1, keepdim=True) / left.sum(dim=-1, keepdim=True))
            return Change(left, int(light.sum()))

        return kept


@dataclass(frozen=True)
class Apply(Intervention):
    """Change a point by any function of its value."""

    point: str
    fn: Callable[[Tensor], Tensor]
    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of the point at each layer."""
        editable(self.point)
        return [Edit(self.point, layer, self._applied) for layer in layers_at(spec, self.point, self.layers)]

    def _applied(self, value: Tensor, context: Context) -> Change:
        changed = self.fn(value.clone())
        if not isinstance(changed, Tensor) or changed.shape != value.shape or changed.dtype != value.dtype:
            raise BadInput(
                f"edit of {self.point!r} at layer {context.layer} returned the wrong thing",
                expected=f"a {value.dtype} tensor of shape {tuple(value.shape)}",
                got=f"a {changed.dtype} tensor of shape {tuple(changed.shape)}"
                if isinstance(changed, Tensor)
                else type(changed).__name__,
            )
        if self.positions is None:
            return Change(changed, int(context.tokens.mask.sum()))
        here = context.tokens.at(self.positions)
        where = here.view(*here.shape, *[1] * (value.dim() - 2))
        return Change(torch.where(where, changed, value), int(here.sum()))


def _whole(number: Any) -> int:
    try:
        return operator.index(number)
    except TypeError as error:
        raise BadInput("not a layer, expert or k", expected="a whole number", got=repr(number)) from error


def ablate(*, layer: SupportsIndex, expert: SupportsIndex, positions: Indices = None) -> Scale:
    """Zero one expert's contribution (at these positions): the others keep their weights, nothing is re-routed."""
    return Scale(_whole(layer), _whole(expert), 0.0, positions_of(positions))


def scale(*, layer: SupportsIndex, expert: SupportsIndex, by: float, positions: Indices = None) -> Scale:
    """Multiply one expert's output by a factor (at these positions)."""
    return Scale(_whole(layer), _whole(expert), float(by), positions_of(positions))


def top_k(k: SupportsIndex, *, renormalise: bool = False, layers: Indices = None) -> TopK:
    """Keep only the k heaviest experts of each token, shared experts untouched.

    With ``k`` above the model's own K the router chooses k by its own recipe. ``renormalise`` rescales the kept
    weights to the total that K experts would have; off, as in MoE-Lens, the dropped weight is lost.

    Raises:
        BadInput: k below 1.
    """
    return TopK(_whole(k), renormalise, positions_of(layers))


def apply(
    point: str,
    fn: Callable[[Tensor], Tensor],
    *,
    layers: Indices = None,
    positions: Indices = None,
) -> Apply:
    """Change a point by any pure function from its value to a tensor of the same shape and dtype.

    Without ``positions`` the function's result replaces the whole value, padding included; with them only the rows of
    these real tokens are replaced.

    Raises (when run):
        UnknownName: no such point or layer in the model.
        BadInput: the point is read-only, or ``fn`` returned another shape or dtype.
    """
    return Apply(point, fn, positions_of(layers), positions_of(positions))
