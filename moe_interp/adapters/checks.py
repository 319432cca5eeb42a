"""What is looked at before a description is used: the types of a row's fields, and whether its modules are there."""

from collections.abc import Iterator
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torch import nn

from moe_interp.adapters.reading import outline
from moe_interp.adapters.spec import ModelSpec
from moe_interp.adapters.sums import Through
from moe_interp.errors import BadInput, UnsupportedModel


def check_types(row: Any) -> None:
    """Refuse a dataclass of which a field is of another type than declared.

    Raises:
        BadInput: one is; the message names it.
    """
    for field in fields(row):
        value = getattr(row, field.name)
        if not _fits(value, field.type):
            raise BadInput(
                f"{type(row).__name__} cannot have this {field.name}",
                expected=_shown(field.type),
                got=repr(value),
                do=f"Write {field.name}=lambda _: {value!r}." if "function" in _shown(field.type) else None,
            )


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return any(_fits(value, one) for one in _options(kind)) if _options(kind) else isinstance(value, _class(kind))


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else ()


def _class(kind: Any) -> Any:
    return NoneType if kind is None else get_origin(kind) or kind


def _shown(kind: Any) -> str:
    if options := _options(kind):
        return " or ".join(map(_shown, options))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    found = _class(kind)
    return {"Callable": "a function", "NoneType": "None"}.get(found.__name__, found.__name__)


def check_modules(hf: nn.Module, spec: ModelSpec) -> None:
    """Refuse a description that names modules which are not there.

    Raises:
        UnsupportedModel: one is missing; the message says what for, and lists the modules that are there.
    """
    for role, path in _places(spec):
        if not _is_there(hf, path):
            raise UnsupportedModel(
                f"no module {path!r} for {role}",
                expected="the path of a module",
                got=outline(hf),
                do="Name it in the model's Family, or say None where the model has no such module.",
            )


def check_counts(spec: ModelSpec) -> None:
    """Refuse routers that are to choose more experts than there are, whose forward pass torch would end.

    Raises:
        UnsupportedModel: one is.
    """
    for layer in spec.layers:
        if layer.moe and layer.moe.top_k > layer.moe.num_experts and not layer.moe.skips:
            raise UnsupportedModel(
                f"the router of layer {layer.index} chooses more experts than there are",
                expected=f"top-k of 1 to {layer.moe.num_experts} experts",
                got=f"top-{layer.moe.top_k}",
                do="Set the number of experts per token in the model's config.",
            )


def _is_there(hf: nn.Module, path: str) -> bool:
    try:
        hf.get_submodule(path)
    except AttributeError:
        return False
    return True


def _places(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """What a description needs modules for, and their paths."""
    if spec.embed is not None:
        yield "embed", spec.embed
    if spec.unembed is not None:
        yield "unembed", spec.unembed
    for step in spec.final or ():
        if isinstance(step, Through):
            yield "the way from the last residual to the output", step.module
    for layer in spec.layers:
        yield from ((f"{name} of layer {layer.index}", site.module) for name, site in layer.sites.items())
        if layer.moe:
            yield f"the experts of layer {layer.index}", layer.moe.experts
