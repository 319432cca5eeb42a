"""Interventions as JSON, and back."""

import dataclasses
import json
from collections.abc import Sequence
from types import UnionType
from typing import Any, get_args, get_origin

from moe_interp.arguments import checked
from moe_interp.errors import BadInput, UnknownName
from moe_interp.interventions.base import Intervention
from moe_interp.interventions.values import ByToken, Values


@checked
def to_json(interventions: Sequence[Intervention]) -> str:
    """Interventions as JSON; `from_json` reads them back. Tensors are stored to the last bit.

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
    return {"kind": type(one).__name__.lower()} | {name: _stored(value) for name, value in record.items()}


_TENSORS: dict[str, type[Values] | type[ByToken]] = {"tensor": Values, "by_token": ByToken}


def _stored(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_stored(item) for item in value]
    return next(({name: value.record()} for name, kind in _TENSORS.items() if isinstance(value, kind)), value)


@checked
def from_json(text: str) -> list[Intervention]:
    """Interventions from the JSON that `to_json` wrote.

    Raises:
        BadInput: not a JSON list of interventions, or fields that the intervention does not have, or of other types.
        UnknownName: no intervention of that kind.
    """
    try:
        records = json.loads(text)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise TypeError("no list of interventions")
        return [_from_record(record) for record in records]
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput("cannot read interventions", expected="JSON from moe.to_json", got=str(error)) from error


def _from_record(record: dict[str, Any]) -> Intervention:
    kind = record.pop("kind", None)
    if kind not in Intervention.kinds:
        raise UnknownName(
            f"unknown intervention {kind!r}", expected=f"one of {', '.join(Intervention.kinds)}", got=repr(kind)
        )
    found = {name: _restored(value) for name, value in record.items()}
    for item in dataclasses.fields(Intervention.kinds[kind]):  # type: ignore[arg-type]
        if item.name in found and not _is_of(item.type, found[item.name]):
            raise BadInput(
                f"{item.name} of a stored {kind}",
                expected=str(getattr(item.type, "__name__", item.type)),
                got=repr(found[item.name])[:80],
            )
    return Intervention.kinds[kind](**found)


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value that was stored is of the type of its field."""
    if isinstance(kind, UnionType):
        return any(_is_of(one, value) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(get_args(kind)[0], item) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(item) for item in value)
    if isinstance(value, dict) and len(value) == 1:
        name, record = next(iter(value.items()))
        if name in _TENSORS:
            return _TENSORS[name].from_record(record)
    return value
