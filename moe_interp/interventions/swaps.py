"""Interventions under which experts change places: two of a layer, or all of two layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from moe_interp.adapters.spec import ModelSpec
from moe_interp.errors import BadInput
from moe_interp.interventions.base import Change, Edit, Placed, moe_layers_at
from moe_interp.interventions.outputs import OfExperts
from moe_interp.run import Context, positions_of


@dataclass(frozen=True, kw_only=True)
class Swap(OfExperts):
    """Two experts of a layer change places: wherever one was chosen the other runs, with the same weight."""

    all_at_once: ClassVar[bool] = False

    def __post_init__(self) -> None:
        given = positions_of(self.experts)
        super().__post_init__()
        if given is None or len(given) != 2 or len(self.named) != 2:
            raise BadInput("not two experts to swap", expected="two different ids", got=str(given))

    def swaps(self, spec: ModelSpec) -> Mapping[int, frozenset[int]]:
        """The two, at each of its layers."""
        return dict.fromkeys(moe_layers_at(spec, self.layers), frozenset(self.named))

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of ``expert_ids`` at each layer."""
        return [Edit("expert_ids", edit.layer, self.changed) for edit in super().edits(spec)]

    def changed(self, ids: Int[Tensor, "B S K"], context: Context) -> Change:
        """The other's id at both."""
        first, second = self.named
        here = self.seen(context)[..., None]
        one, other = (ids == first) & here, (ids == second) & here
        return Change(ids.masked_fill(one, second).masked_fill(other, first), int((one | other).sum()))


@dataclass(frozen=True, kw_only=True)
class SwapLayers(Placed):
    """Two layers change experts: each one's router and weights, with the experts of the other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None or len(set(self.layers)) != 2 or self.positions or self.tokens:
            raise BadInput(
                "not two layers to swap", expected="two different layers, at all tokens", got=str(self.layers)
            )

    def exchanges(self, spec: ModelSpec) -> Mapping[int, int]:
        """Each of the two layers with the other."""
        first, second = self.layers  # type: ignore[misc]
        one, other = spec.moe(first), spec.moe(second)
        same = (one.num_experts, one.kernel, one.experts_input, one.weights_on)
        if same != (other.num_experts, other.kernel, other.experts_input, other.weights_on):
            raise BadInput(
                f"layers {first} and {second} cannot swap experts",
                expected="experts of the same number and kind, without projections around them",
                got=f"{one.num_experts} and {other.num_experts} experts",
            )
        return {first: second, second: first}

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """At each of the two a look, which counts the slots; the experts themselves are exchanged."""
        return [Edit("gate_weights", layer, _counted) for layer in self.exchanges(spec)]


def _counted(weights: Float[Tensor, "B S K"], context: Context) -> Change:
    return Change(weights, int(context.seen.sum()) * weights.shape[-1])
