"""Interventions on what single experts put out, wherever a token has a slot that holds them.

The *contribution* of an expert to a token is what it adds to ``routed_out``: combine weight times output (the output
alone where weights multiply the input), and zero where it was not chosen. Those that set a contribution (`Patch`,
`Mean`, `Resample`) write it as an output at the weight that the slot has. Where the expert has no slot, or one of
weight 0, they add it to ``routed_out`` in its name (`Context.added`), and what comes after them in the list acts on
that too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_interp.adapters.spec import ModelSpec
from moe_interp.errors import BadInput
from moe_interp.interventions.base import Change, Edit, Placed, fit, in_range, moe_layers_at
from moe_interp.interventions.chance import uniform
from moe_interp.interventions.values import ByToken, Values
from moe_interp.run import Context, positions_of


@dataclass(frozen=True, kw_only=True)
class OfExperts(Placed, abstract=True):
    """An intervention on the outputs of some experts of some layers.

    Attributes:
        experts: whose; None: all, where ``all_at_once``.
        all_at_once: whether it may act on all experts without their names.
    """

    all_at_once: ClassVar[bool] = True
    experts: tuple[int, ...] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        experts = positions_of(self.experts)
        if experts is None and not self.all_at_once:
            raise BadInput("no experts", expected="the ids of experts", got="None")
        object.__setattr__(self, "experts", None if experts is None else tuple(dict.fromkeys(experts)))

    @property
    def named(self) -> tuple[int, ...]:
        """The experts that it names."""
        return self.experts or ()

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of ``expert_out`` at each layer."""
        layers = moe_layers_at(spec, self.layers)
        for layer in layers:
            for expert in self.named:
                spec.check_runs(layer, expert)
        return [Edit("expert_out", layer, self.changed) for layer in layers]

    def changed(self, outputs: Float[Tensor, "B S K D"], context: Context) -> Change:
        """The outputs after it."""
        raise NotImplementedError

    def slots(self, context: Context) -> Bool[Tensor, "B S K"]:
        """[B, S, K], where it acts."""
        return context.slots_of(self.experts) & self.here(context)[..., None]


@dataclass(frozen=True, kw_only=True)
class Scale(OfExperts):
    """Multiply experts' outputs."""

    by: float

    def changed(self, outputs: Float[Tensor, "B S K D"], context: Context) -> Change:
        """Outputs times the factor."""
        slots, here = self.slots(context), self.here(context)[..., None]
        for expert in [one for one in context.added if self.experts is None or one in self.experts]:
            context.added[expert] = torch.where(here, context.added[expert] * self.by, context.added[expert])
        new = torch.where(slots[..., None], outputs * self.by, outputs)
        if abs(self.by) > 1:
            in_range(new, outputs, f"a factor of {self.by:.3g}")
        return Change(new, int(slots.sum()))


@dataclass(frozen=True, kw_only=True)
class SetOutput(OfExperts):
    """Put these values in place of experts' outputs, weights as they are."""

    values: Values | ByToken

    def changed(self, outputs: Float[Tensor, "B S K D"], context: Context) -> Change:
        """The values, where there is one for the token."""
        values, there = rows_of(self.values, context)
        slots = self.slots(context) & there[..., None]
        new = fit("expert_out", outputs, values.unsqueeze(-2) if isinstance(self.values, ByToken) else values)
        return Change(torch.where(slots[..., None], new, outputs), int(slots.sum()))


@dataclass(frozen=True, kw_only=True)
class AddToOutput(OfExperts):
    """Add a vector to experts' outputs."""

    vector: Values
    by: float = 1.0

    def changed(self, outputs: Float[Tensor, "B S K D"], context: Context) -> Change:
        """Outputs plus the vector times the factor."""
        slots = self.slots(context)
        added = outputs + fit("expert_out", outputs, self.vector.tensor) * self.by
        new = torch.where(slots[..., None], added, outputs)
        return Change(in_range(new, outputs, "a vector times its factor"), int(slots.sum()))


# ---- setting contributions ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Contribution(OfExperts, abstract=True):
    """An intervention that sets contributions, layer by layer and expert by expert."""

    adds: ClassVar[bool] = True
    all_at_once: ClassVar[bool] = False
    held: ClassVar[str]  # the field that has something for each layer and expert

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of ``expert_out`` at each layer."""
        if self.layers is None:
            raise BadInput("contributions are of layers", expected="the layers", got="None")
        held, count = getattr(self, self.held), len(self.layers) * len(self.named)
        found = len(held.tensor if isinstance(held, Values) else held)
        if found != count:
            raise BadInput("not one for each layer and expert", expected=f"{count} {self.held}", got=str(found))
        return super().edits(spec)

    def changed(self, outputs: Float[Tensor, "B S K D"], context: Context) -> Change:
        """Outputs that give these contributions."""
        touched = 0
        for number, expert in enumerate(self.named):
            vectors, weights, where = self.new(context, expert, self._place(context.layer, number))
            if vectors.shape[-1] != outputs.shape[-1]:
                raise BadInput(
                    f"contributions do not fit the experts of layer {context.layer}",
                    expected=f"{outputs.shape[-1]} numbers a token",
                    got=str(vectors.shape[-1]),
                )
            outputs, count = contribute(outputs, context, expert, vectors, weights, where)
            touched += count
        return Change(outputs, touched)

    def _place(self, layer: int | None, number: int) -> int:
        """Where a layer's and an expert's part lies among those that are held."""
        return (self.layers or ()).index(layer or 0) * len(self.named) + number

    def new(self, context: Context, expert: int, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [B, S, D] and weights [B, S], whose product is the contribution, and where it is set [B, S]."""
        raise NotImplementedError


def contribute(
    outputs: Float[Tensor, "B S K D"],
    context: Context,
    expert: int,
    vectors: Float[Tensor, "B S D"],
    weights: Float[Tensor, "B S"],
    where: Bool[Tensor, "B S"],
) -> tuple[Float[Tensor, "B S K D"], int]:
    """Outputs under which the expert's contribution is ``weights * vectors``, and at how many tokens that matters.

    A vector that comes with the very weight of its slot is put there as it is, to the last bit.
    """
    slots = context.slots_of([expert]) & where[..., None]
    own = context.weights if context.weighs_output else torch.ones_like(context.weights)  # type: ignore[arg-type]
    first = slots & (slots.cumsum(dim=-1) == 1) & (own != 0)
    ratio = (weights.to(own)[..., None] / own).masked_fill(~first, 0.0)  # type: ignore[operator]
    new = (vectors.to(outputs.dtype)[:, :, None] * ratio[..., None].to(outputs.dtype)).to(outputs.dtype)
    outputs = torch.where(slots[..., None], new, outputs)
    rest = where & ~first.any(dim=-1)
    whole = (vectors * weights.to(vectors)[..., None]).to(outputs.dtype)
    before = context.added.get(expert, torch.zeros_like(whole))
    context.added[expert] = torch.where(where[..., None], whole.masked_fill(~rest[..., None], 0.0), before)
    return outputs, int((where & (slots.any(dim=-1) | (weights != 0))).sum())


@dataclass(frozen=True, kw_only=True)
class Patch(_Contribution):
    """Put experts' contributions from another run in place of their own; those of a token that did not use one are 0.

    Attributes:
        outputs: [B, N, D] for each layer and expert, layer by layer.
        weights: [B, N] likewise.
    """

    held: ClassVar[str] = "outputs"
    outputs: tuple[ByToken, ...]
    weights: tuple[ByToken, ...]

    def new(self, context: Context, expert: int, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Contributions of the other run at the tokens that it has."""
        vectors, there = self.outputs[place].at(context.tokens)
        return vectors, self.weights[place].at(context.tokens)[0], there & self.seen(context)


@dataclass(frozen=True, kw_only=True)
class Mean(_Contribution):
    """Put experts' mean contributions in place of their own, at the tokens that chose them.

    Attributes:
        means: [X, D], one for each layer and expert, layer by layer.
    """

    held: ClassVar[str] = "means"
    means: Values

    def new(self, context: Context, expert: int, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, where a slot holds the expert."""
        where = self.slots_at(context, expert)
        mean = self.means.tensor[place].to(where.device)
        return mean.expand(*where.shape, -1), torch.ones_like(where, dtype=mean.dtype), where

    def slots_at(self, context: Context, expert: int) -> Bool[Tensor, "B S"]:
        """[B, S], where a slot holds the expert."""
        return context.slots_of([expert]).any(dim=-1) & self.here(context)


@dataclass(frozen=True, kw_only=True)
class Resample(Mean):
    """Put experts' contributions to random tokens of another run in place of their own, at the tokens that chose them.

    Attributes:
        means: [X, D], of all layers and experts one after the other.
        counts: how many of them each layer and expert has.
        seed: which is drawn depends on it, the layer, the expert, and the text up to the token.
    """

    held: ClassVar[str] = "counts"
    counts: tuple[int, ...]
    seed: int = 0

    def new(self, context: Context, expert: int, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """One of the other run's contributions for each token."""
        where = self.slots_at(context, expert)
        layer, number = (torch.tensor(value, device=where.device) for value in (context.layer or 0, expert))
        drawn = uniform(self.seed, layer, number, context.tokens.whose)
        first = sum(self.counts[:place])
        rows = first + (drawn * self.counts[place]).long()
        return self.means.tensor.to(where.device)[rows], torch.ones_like(drawn), where


def rows_of(values: Values | ByToken, context: Context) -> tuple[Tensor, Bool[Tensor, "B S"]]:
    """Values for the tokens of a pass, and where there are any."""
    if isinstance(values, ByToken):
        return values.at(context.tokens)
    return values.tensor, context.tokens.mask
