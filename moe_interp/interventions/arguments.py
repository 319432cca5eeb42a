"""Arguments of interventions, as they may be given: layers, experts, positions and marks of tokens."""

from typing import Any

from torch import Tensor

from moe_interp.arguments import index, is_finite, shown
from moe_interp.errors import BadInput
from moe_interp.interventions.values import ByToken
from moe_interp.run import Indices, Run, positions_of

Marks = Tensor | ByToken | None
"""Tokens as they may be given: booleans [B, S] (or [S]), a mark for each real token of each text, or None for all."""


def whole(number: Any) -> int:
    """A whole number.

    Raises:
        BadInput: something else.
    """
    try:
        return index(number)
    except TypeError as error:
        raise BadInput("not a layer, expert or k", expected="a whole number", got=repr(number)) from error


def finite(given: Any, what: str) -> float:
    """A finite number.

    Raises:
        BadInput: something else.
    """
    if not is_finite(given):
        raise BadInput(f"{what} is no number", expected="a finite number", got=shown(given))
    return float(given)


def seed_of(given: Any) -> int:
    """What random draws may start from.

    Raises:
        BadInput: something else.
    """
    seed = whole(given)
    if not -(2**63) <= seed < 2**63:
        raise BadInput("no seed", expected="a whole number of 64 bits", got=str(seed))
    return seed


def some(numbers: Indices, what: str, do: str | None = None) -> tuple[int, ...]:
    """One or several, where all cannot be meant.

    Raises:
        BadInput: none, or what are no whole numbers.
    """
    found = positions_of(numbers)
    if found is None:
        raise BadInput(f"no {what}", expected=f"one {what} or several", got="None", do=do)
    return found


def layers_of(run: Run, layer: Indices) -> tuple[int, ...]:
    """Layers, or all MoE layers of a run."""
    found = positions_of(layer)
    return tuple(run.routing) if found is None else found


def where(layer: Indices, positions: Indices, tokens: Marks) -> dict[str, Any]:
    """Where an intervention acts, as its fields have it."""
    marks = None if tokens is None else ByToken.of(tokens, what="marks of tokens")
    return {"layers": positions_of(layer), "positions": positions_of(positions), "tokens": marks}
