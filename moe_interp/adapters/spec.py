"""What an adapter says about a model: frozen data, no code that runs a forward pass.

A `Site` says where a point's value flows: into or out of which submodule, or inside which call. Paths are dotted
names relative to the whole model, as in ``model.get_submodule(path)``. Hosts know how to get at each kind of site
and know no architecture; adapters know architectures and no host.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe_interp.errors import UnknownName
from moe_interp.points import POINTS, Scope


@dataclass(frozen=True)
class Input:
    """The hidden states given to a module."""

    module: str


@dataclass(frozen=True)
class ResidualInput:
    """The hidden states given to a norm, while the layer keeps the same tensor as its residual.

    Replacing the argument would leave the residual as it was; a host writes into the tensor itself.
    """

    module: str


@dataclass(frozen=True)
class Output:
    """What a module returns (its first item, if that is a tuple)."""

    module: str


@dataclass(frozen=True)
class GatedOutput:
    """A module's output times the sigmoid of another's, a product that no module returns."""

    module: str
    gate: str


@dataclass(frozen=True)
class RouterLinear:
    """The result of the first linear map that a router computes."""

    module: str


@dataclass(frozen=True)
class ExpertsCall:
    """The arguments, the inside or the result of ``experts(hidden, ids, weights)``."""

    module: str


Site = Input | ResidualInput | Output | GatedOutput | RouterLinear | ExpertsCall
Scores = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class MoESpec:
    """The mixture of one layer: where its modules are, and how its router scores and weights."""

    block: str
    router: str
    experts: str
    num_experts: int
    top_k: int
    scores: Scores
    renormalises: bool
    shared: str | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: its path, where each of its points flows, and its mixture if it has one."""

    index: int
    path: str
    sites: Mapping[str, Site]
    moe: MoESpec | None


@dataclass(frozen=True)
class ModelSpec:
    """What an architecture computes, as far as reading and editing it needs to know."""

    model_type: str
    layers: tuple[LayerSpec, ...]
    embed: str
    final_norm: str
    unembed: str
    d_model: int
    vocab_size: int
    context_length: int
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        """All decoder layers, dense ones included."""
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, as the checkpoint numbers its layers."""
        return tuple(layer.index for layer in self.layers if layer.moe)

    @property
    def num_experts(self) -> int:
        """E: routed experts of a layer (the most, if layers differ)."""
        return max(layer.moe.num_experts for layer in self.layers if layer.moe)

    @property
    def top_k(self) -> int:
        """K: experts chosen for each token (the most, if layers differ)."""
        return max(layer.moe.top_k for layer in self.layers if layer.moe)

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the points this model has, in the order of the table."""
        there = {name for layer in self.layers for name in layer.sites} | {"embed"}
        return tuple(name for name in POINTS if name in there)

    def layers_of(self, point: str) -> tuple[int | None, ...]:
        """The layers at which ``point`` exists; ``(None,)`` for a point of the whole model.

        Raises:
            UnknownName: the name is no point, or this architecture does not have it.
        """
        if point in POINTS and POINTS[point].scope is Scope.MODEL:
            return (None,)
        found = tuple(layer.index for layer in self.layers if point in layer.sites)
        if not found:
            kind = f"{self.model_type} has no point" if point in POINTS else "unknown point"
            raise UnknownName(f"{kind} {point!r}", expected=f"one of {', '.join(self.points)}", got=repr(point))
        return found

    def layer(self, index: int) -> LayerSpec:
        """The layer with this index.

        Raises:
            UnknownName: there is no such layer.
        """
        if not 0 <= index < self.num_layers:
            raise UnknownName(
                f"unknown layer {index}", expected=f"a layer from 0 to {self.num_layers - 1}", got=str(index)
            )
        return self.layers[index]

    def moe(self, index: int) -> MoESpec:
        """The mixture of the layer with this index.

        Raises:
            UnknownName: there is no such layer, or it is dense.
        """
        found = self.layer(index).moe
        if found is None:
            raise UnknownName(
                f"layer {index} has no experts",
                expected=f"one of the MoE layers {list(self.moe_layers)}",
                got=f"dense layer {index}",
            )
        return found

    def check_expert(self, layer: int, expert: int) -> None:
        """Refuse an expert that the layer does not have.

        Raises:
            UnknownName: no such layer, a dense layer, or no such expert.
        """
        count = self.moe(layer).num_experts
        if not 0 <= expert < count:
            raise UnknownName(
                f"unknown expert {expert} at layer {layer}",
                expected=f"an expert from 0 to {count - 1}",
                got=str(expert),
            )
