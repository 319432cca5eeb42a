"""Interventions on the value of any point, whole or at some tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from moe_interp.adapters.spec import ModelSpec
from moe_interp.errors import BadInput
from moe_interp.interventions.base import Change, Edit, Placed, fit, in_range, layers_at
from moe_interp.interventions.chance import normal
from moe_interp.interventions.outputs import rows_of
from moe_interp.interventions.values import ByToken, Values
from moe_interp.points import editable
from moe_interp.run import Context


@dataclass(frozen=True, kw_only=True)
class _AtPoint(Placed, abstract=True):
    """An intervention on one point."""

    point: str

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of the point at each layer."""
        editable(self.point)
        return [Edit(self.point, layer, self.changed) for layer in layers_at(spec, self.point, self.layers)]

    def changed(self, value: Tensor, context: Context) -> Change:
        """The value after it."""
        raise NotImplementedError

    def put(self, new: Tensor, old: Tensor, where: Bool[Tensor, "B S"]) -> Change:
        """The new value at some tokens."""
        return Change(torch.where(where.view(*where.shape, *[1] * (old.dim() - 2)), new, old), int(where.sum()))


@dataclass(frozen=True, kw_only=True)
class Apply(_AtPoint):
    """Change a point by any function of its value."""

    fn: Callable[[Tensor], Tensor]

    def changed(self, value: Tensor, context: Context) -> Change:
        """What the function returns."""
        changed = self.fn(value.clone())
        if not isinstance(changed, Tensor) or changed.shape != value.shape or changed.dtype != value.dtype:
            raise BadInput(
                f"edit of {self.point!r} at layer {context.layer} returned the wrong thing",
                expected=f"a {value.dtype} tensor of shape {tuple(value.shape)}",
                got=f"a {changed.dtype} tensor of shape {tuple(changed.shape)}"
                if isinstance(changed, Tensor)
                else type(changed).__name__,
            )
        if self.positions is None and self.tokens is None:
            return Change(changed, int(context.tokens.mask.sum()))
        return self.put(changed, value, self.here(context))


@dataclass(frozen=True, kw_only=True)
class SetPoint(_AtPoint):
    """Put these values in place of a point's."""

    values: Values | ByToken

    def changed(self, value: Tensor, context: Context) -> Change:
        """The values, where there is one for the token."""
        values, there = rows_of(self.values, context)
        return self.put(fit(self.point, value, values), value, self.here(context) & there)


@dataclass(frozen=True, kw_only=True)
class AddToPoint(_AtPoint):
    """Add a vector to a point's value."""

    vector: Values
    by: float = 1.0

    def changed(self, value: Tensor, context: Context) -> Change:
        """The value plus the vector times the factor."""
        change = self.put(value + fit(self.point, value, self.vector.tensor) * self.by, value, self.here(context))
        return change._replace(value=in_range(change.value, value, "a vector times its factor"))


@dataclass(frozen=True, kw_only=True)
class Noise(_AtPoint):
    """Add Gaussian noise to a point's value."""

    std: float
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.std < 0:
            raise BadInput("not a standard deviation", expected="one from 0 on", got=str(self.std))

    def changed(self, value: Tensor, context: Context) -> Change:
        """The value plus noise that depends on the seed, the layer and the text up to the token."""
        entries = torch.arange(value[0, 0].numel(), device=value.device)
        layer = torch.tensor(-1 if context.layer is None else context.layer, device=value.device)
        noise = self.std * normal(self.seed, layer, context.tokens.whose[..., None], entries).view_as(value)
        change = self.put(value + noise.to(value.dtype), value, self.here(context))
        return change._replace(value=in_range(change.value, value, f"noise of standard deviation {self.std:.3g}"))
