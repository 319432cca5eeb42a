"""The named intervention points: the only place where their names are defined.

Every supported model has the same points under the same names with the same shapes. A point that an architecture
does not have (no shared expert, say) is absent from ``model.points``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from moe_interp.errors import BadInput, UnknownName


class Scope(Enum):
    """Where a point exists: once in a model, at every decoder layer, at dense layers, or at MoE layers."""

    MODEL = "model"
    LAYER = "every layer"
    DENSE = "dense layers"
    MOE = "MoE layers"


@dataclass(frozen=True)
class Point:
    """A place in the forward pass that has a name, a shape and a meaning."""

    name: str
    dims: str
    meaning: str
    scope: Scope
    editable: bool = True
    integer: bool = False

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach this point: it is made of real numbers and the forward pass goes on with it."""
        return self.editable and not self.integer


POINTS: dict[str, Point] = {
    point.name: point
    for point in (
        Point("embed", "B S D", "token embedding, as it enters the first layer", Scope.MODEL),
        Point("resid_pre", "B S D", "residual stream into the decoder layer", Scope.LAYER),
        Point("attn_out", "B S D", "output of attention (or of what mixes positions in its place)", Scope.LAYER),
        Point("resid_mid", "B S D", "residual stream after attention, before the MoE or MLP branch", Scope.LAYER),
        Point("mlp_out", "B S D", "output of the dense MLP of a layer that is not MoE", Scope.DENSE),
        Point("moe_in", "B S D", "normed input of the MoE block", Scope.MOE),
        Point("router_logits", "B S E", "router logits, before selection; an edit re-routes", Scope.MOE),
        Point(
            "router_scores",
            "B S E",
            "scores the weights come from, normalised to sum to 1 over experts",
            Scope.MOE,
            editable=False,
        ),
        Point("expert_ids", "B S K", "experts chosen; an edit makes other experts run", Scope.MOE, integer=True),
        Point("gate_weights", "B S K", "combine weights really used", Scope.MOE),
        Point("expert_act", "B S K F", "expert neurons: input of the down-projection", Scope.MOE),
        Point("expert_out", "B S K D", "unweighted output of each chosen expert", Scope.MOE),
        Point("routed_out", "B S D", "weighted sum over slots", Scope.MOE),
        Point("shared_out", "B S D", "shared experts as they are added (after their gate)", Scope.MOE),
        Point("moe_out", "B S D", "what the MoE block returns", Scope.MOE),
        Point("resid_post", "B S D", "residual stream out of the decoder layer", Scope.LAYER),
    )
}


def in_order(names: Iterable[str], moved: Mapping[str, str]) -> tuple[str, ...]:
    """Names of points in the order in which a forward pass comes to them; names of other places last.

    Args:
        names: the points that a layer has, and other places in it.
        moved: where that is not the order of the table: the point that each of these comes right before.
    """
    given = list(names)
    found = [name for name in POINTS if name in given]
    for name, before in moved.items():
        if name in found and before in found:
            found.remove(name)
            found.insert(found.index(before), name)
    return (*found, *(name for name in given if name not in POINTS))


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers, such as layers, in short: "0, 2 to 5, 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


SELECTION = ("selection_scores", "selected_ids")
"""Places inside a router, [B, S, E] and [B, S, K], at which interventions change its choice: what its top-k looks at
(after any selection bias and choice of groups), and the ids that it takes. Weights follow by the router's own recipe
from the scores as they were. Nothing is read there."""


def point(name: str) -> Point:
    """The point called ``name``.

    Raises:
        UnknownName: no point has that name.
    """
    if name not in POINTS:
        raise UnknownName(f"unknown point {name!r}", expected=f"one of {', '.join(POINTS)}", got=repr(name))
    return POINTS[name]


def editable(name: str) -> Point:
    """The point called ``name``, refused if it can only be read.

    Raises:
        UnknownName: no point has that name.
        BadInput: the point can be read and not edited.
    """
    found = point(name)
    if not found.editable:
        raise read_only(name)
    return found


def read_only(name: str) -> BadInput:
    """Why a point that is not editable is refused."""
    return BadInput(
        f"point {name!r} cannot be edited",
        expected="a point that the forward pass uses",
        got="one derived from router_logits",
        do="Edit 'router_logits' instead.",
    )
