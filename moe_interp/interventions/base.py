"""What an intervention is: plain data that says which points it changes, and how.

`Intervention.edits` turns the data into `Edit`s: a point, a layer, and a function from the value there (and its
`Context`) to the new value and the mask of what it touched. Hosts carry edits out in the order given.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from moe_interp.adapters import ModelSpec
from moe_interp.errors import BadInput, UnknownName
from moe_interp.run import Context


class Change(NamedTuple):
    """A new value, and how many entries (token-slots or tokens) the edit touched."""

    value: Tensor
    touched: int


class Edit(NamedTuple):
    """One function at one point of one layer."""

    point: str
    layer: int | None
    fn: Callable[[Tensor, Context], Change]


class Intervention:
    """Base of all interventions: frozen dataclasses, so that they compare, print and compose as plain data."""

    kinds: ClassVar[dict[str, type["Intervention"]]] = {}

    def __init_subclass__(cls) -> None:
        Intervention.kinds[cls.__name__.lower()] = cls

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """The edits that carry it out on a model.

        Raises:
            UnknownName: it names a layer, expert or point that the model does not have.
        """
        raise NotImplementedError

    def widths(self, spec: ModelSpec) -> Mapping[int, int]:
        """Layers whose router must choose another number of experts than the model's own, and that number."""
        return {}


def layers_at(spec: ModelSpec, point: str, layers: Iterable[int] | None) -> tuple[int | None, ...]:
    """The layers at which an intervention acts: those asked for, or all that have the point.

    Raises:
        UnknownName: the model has no such point, or not at that layer.
    """
    there = spec.layers_of(point)
    if layers is None:
        return there
    chosen = tuple(layers)
    for layer in chosen:
        spec.layer(layer)
        if layer not in there:
            raise UnknownName(
                f"no point {point!r} at layer {layer}", expected=f"a layer of {list(there)}", got=str(layer)
            )
    return chosen


def to_json(interventions: Sequence[Intervention]) -> str:
    """Interventions as JSON; `from_json` reads them back.

    Raises:
        BadInput: one of them holds a function (`moe.apply`), which JSON cannot.
    """
    return json.dumps([_as_record(one) for one in interventions])


def _as_record(one: Intervention) -> dict[str, Any]:
    record = {item.name: getattr(one, item.name) for item in dataclasses.fields(one)}  # type: ignore[arg-type]
    if any(callable(value) for value in record.values()):
        raise BadInput(
            f"{type(one).__name__} cannot be written to JSON",
            expected="an intervention made of numbers and names",
            got="one that holds a function",
        )
    return {"kind": type(one).__name__.lower()} | record


def from_json(text: str) -> list[Intervention]:
    """Interventions from the JSON that `to_json` wrote.

    Raises:
        BadInput: not a JSON list of interventions, or fields that the intervention does not have.
        UnknownName: no intervention of that kind.
    """
    try:
        records = json.loads(text)
        return [_from_record(dict(record)) for record in records]
    except (TypeError, ValueError) as error:
        raise BadInput("cannot read interventions", expected="JSON from moe.to_json", got=str(error)) from error


def _from_record(record: dict[str, Any]) -> Intervention:
    kind = record.pop("kind", None)
    if kind not in Intervention.kinds:
        raise UnknownName(
            f"unknown intervention {kind!r}", expected=f"one of {', '.join(Intervention.kinds)}", got=repr(kind)
        )
    listed = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
    return Intervention.kinds[kind](**listed)
