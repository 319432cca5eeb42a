"""Which annotations of the package run in tests: those of functions that name a shape.

mypy checks all the others. To run these, too, takes longer than all else that the tests do: a function inside a
function is decorated anew at every call of the outer one. ``ANNOTATIONS=all``, which `make test-all` sets, runs them.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import beartype  # noqa: F401  # before nnsight, which gives every object a method that beartype cannot take
import jaxtyping
from jaxtyping import AbstractArray

_jaxtyped = jaxtyping.jaxtyped


def shapes_alone(target: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """`jaxtyping.jaxtyped` of what has a shape in its signature, or in a dataclass's fields; else the thing itself."""
    if target is None:
        return partial(shapes_alone, typechecker=typechecker)
    function = target.fget if isinstance(target, property) else getattr(target, "__func__", target)
    annotated = function.__init__ if isinstance(function, type) else function
    has_shape = any(map(_names_a_shape, getattr(annotated, "__annotations__", {}).values()))
    return _jaxtyped(target, typechecker=typechecker) if has_shape else target


def _names_a_shape(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_names_a_shape, get_args(annotation)))


if os.environ.get("ANNOTATIONS") != "all":
    jaxtyping.jaxtyped = shapes_alone  # which is how modules that the import hook has rewritten call it
