"""Check the arguments of public functions by their annotations, where a call begins.

1. `checked` wraps a function. Its first call turns each annotation into a `Kind`: what it accepts, and how a message
   describes that.
2. Every call holds the arguments it was given to their kinds. The first one that does not fit raises `BadInput` with
   the names of the argument and the function, before the function does anything.

A check does not copy an argument, nor does it consume an iterator. It looks at the elements of lists, tuples, sets,
arrays and dicts. It changes one thing: a single number of numpy or torch is handed on as Python's own, because a dict
does not find such a number and JSON does not hold it.

Marks such as `Range` narrow an annotation: ``resamples: Annotated[int, Range(1)]``. What depends on the model (does the
layer exist, is ``top`` within the vocabulary) is checked where the model is known.
"""

import functools
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, SupportsIndex, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from jaxtyping import AbstractArray
from numpy.typing import ArrayLike

from moe_interp.errors import BadInput

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


# ---- marks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; ``above`` excludes ``low`` itself."""

    low: int | float = -math.inf
    high: int | float = math.inf
    above: bool = False

    def holds(self, number: Any) -> bool:
        """Whether a number is within the range."""
        return bool((number > self.low if self.above else number >= self.low) and number <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low}" if self.above else f"of at least {self.low}"
        return f"above {self.low} and up to {self.high}" if self.above else f"from {self.low} to {self.high}"


@dataclass(frozen=True)
class CheckedLater:
    """The function itself checks the argument, with more to go by than its kind."""


@dataclass(frozen=True)
class Otherwise:
    """What a message says to do about a value that does not fit."""

    do: str


Count = Annotated[int, Range(1)]
Draws = Annotated[int, Range(1, 1_000_000)]
"""How many of what takes memory or time for each: random draws, rows, examples."""
Parts = Annotated[int, Range(2, 10_000)]
"""How many parts documents are split into."""
Number = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
_LEAST, _MOST = -(2**63), 2**63 - 1
Positive = Annotated[float, Range(0, above=True)]
Fraction = Annotated[float, Range(0, 1, above=True)]


# ---- single values -----------------------------------------------------------------------------------------


def index(number: Any) -> int:
    """A whole number.

    Raises:
        TypeError: something else, or a truth value.
    """
    if isinstance(number, bool) or (isinstance(number, torch.Tensor) and number.dtype == torch.bool):
        raise TypeError("a truth value")
    return operator.index(number)


def is_whole(given: Any) -> bool:
    """Whether a value is a whole number of 64 bits: an int, a numpy integer, an integer tensor without dims."""
    try:
        if not _LEAST <= index(given) <= _MOST:
            return False
    except (TypeError, RuntimeError, ValueError):
        return False
    return not (isinstance(given, torch.Tensor | np.ndarray) and given.ndim)


def is_finite(given: Any) -> bool:
    """Whether a value is a finite real number."""
    if isinstance(given, bool | np.bool_ | str | bytes | complex):
        return False
    if isinstance(given, torch.Tensor | np.ndarray) and given.ndim:
        return False
    if isinstance(given, torch.Tensor) and (given.dtype == torch.bool or given.is_complex()):
        return False
    try:
        return math.isfinite(float(given))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def takes(given: Any, count: int) -> bool:
    """Whether a value can be called with so many arguments, as far as its signature says."""
    if not callable(given):
        return False
    try:
        inspect.signature(given).bind(*[None] * count)
    except ValueError:  # some builtins have no signature
        return True
    except TypeError:
        return False
    return True


def check_flag(name: str, given: Any) -> bool:
    """Refuse what is neither True nor False, such as "no", which Python takes for true.

    Raises:
        BadInput: another value.
    """
    if not isinstance(given, bool):
        raise BadInput(f"{name} is neither True nor False", expected="True or False", got=shown(given))
    return given


def shown(given: Any) -> str:
    """A value as a message shows it: one short line."""
    if isinstance(given, torch.Tensor | np.ndarray):
        return f"{given.dtype} values of shape {tuple(given.shape)}"
    if isinstance(given, torch.nn.Module):
        return f"the module {type(given).__name__}"
    try:
        lines = repr(given).splitlines() or [""]
    except Exception:  # a repr may fail for the reason that the value is refused
        return f"an instance of {type(given).__name__}"
    return lines[0][:80] + ("..." if len(lines) > 1 or len(lines[0]) > 80 else "")


# ---- kinds -------------------------------------------------------------------------------------------------


def _nothing(given: Any) -> str | None:
    return None


def _too_long(given: Any) -> str | None:
    long = isinstance(given, int) and not _LEAST <= given <= _MOST
    return "Whole numbers have 64 bits here." if long else None


def _same(given: Any) -> Any:
    return given


def _own_int(given: Any) -> Any:
    return given if isinstance(given, int) else index(given)


def _own_float(given: Any) -> Any:
    return given if isinstance(given, int | float) else float(given)


@dataclass(frozen=True)
class Kind:
    """What an annotation accepts.

    Attributes:
        accepts: whether a value fits.
        told: what fits, for a message; empty: anything.
        instead: what to do about a value that does not fit.
        several: ``told`` in the plural.
        own: a value that fits, as Python's own number if it is a number.
    """

    accepts: Callable[[Any], bool]
    told: str
    instead: Callable[[Any], str | None] = _nothing
    several: str = ""
    own: Callable[[Any], Any] = _same

    @property
    def plural(self) -> str:
        """What fits, in the plural."""
        return self.several or (f"values that are each {self.told}" if self.told else "values")


_ANYTHING = Kind(lambda given: True, "")
_WHOLE = Kind(is_whole, "a whole number", _too_long, several="whole numbers", own=_own_int)
_PLAIN: dict[Any, Kind] = {
    Any: _ANYTHING,
    object: _ANYTHING,
    inspect.Parameter.empty: _ANYTHING,
    ArrayLike: _ANYTHING,
    NoneType: Kind(lambda given: given is None, "None"),
    bool: Kind(lambda given: isinstance(given, bool), "True or False"),
    int: _WHOLE,
    SupportsIndex: _WHOLE,
    float: Kind(is_finite, "a finite number", several="finite numbers", own=_own_float),
    str: Kind(lambda given: isinstance(given, str), "a string", several="strings"),
    Path: Kind(lambda given: isinstance(given, PathLike), "a path", several="paths"),
    torch.Tensor: Kind(lambda given: isinstance(given, torch.Tensor), "a tensor", several="tensors"),
    np.ndarray: Kind(lambda given: isinstance(given, np.ndarray), "an array", several="arrays"),
}


def described(told: str, instead: Callable[[Any], str | None] = _nothing) -> Callable[[C], C]:
    """Say in messages what a class is, and what to do about a value that is something else."""

    def note(cls: C) -> C:
        _PLAIN[cls] = Kind(lambda given: isinstance(given, cls), told, instead)
        return cls

    return note


def kind_of(annotation: Any) -> Kind:
    """What an annotation accepts.

    Raises:
        TypeError: an annotation that is not understood; an error of whoever wrote the function.
    """
    try:
        if annotation in _PLAIN:
            return _PLAIN[annotation]
    except TypeError:  # not hashable
        pass
    origin, inner = get_origin(annotation), get_args(annotation)
    for origins, make in _GENERIC:
        if origin in origins:
            return make(*inner)
    if isinstance(annotation, TypeVar):
        return _ANYTHING
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return _array(annotation)
    if isinstance(annotation, type):
        article = "an" if annotation.__name__[0] in "AEIOU" else "a"
        return Kind(lambda given: isinstance(given, annotation), f"{article} {annotation.__name__}")
    raise TypeError(f"cannot check arguments annotated {annotation!r}")


def _annotated(annotation: Any, *marks: Any) -> Kind:
    if any(isinstance(mark, CheckedLater) for mark in marks):
        return _ANYTHING
    kind = kind_of(annotation)
    for mark in marks:
        if isinstance(mark, Range):
            kind = _within(kind, mark)
        elif isinstance(mark, Otherwise):
            kind = replace(kind, instead=lambda given, do=mark.do: do)  # type: ignore[misc]
    return kind


def _within(kind: Kind, mark: Range) -> Kind:
    def accepts(given: Any) -> bool:
        return kind.accepts(given) and mark.holds(given)

    return replace(kind, accepts=accepts, told=f"{kind.told} {mark}", several=f"{kind.plural} {mark}")


def _either(*annotations: Any) -> Kind:
    kinds = list(map(kind_of, annotations))
    if not all(kind.told for kind in kinds):
        return _ANYTHING
    told = list(dict.fromkeys(kind.told for kind in kinds))

    def instead(given: Any) -> str | None:
        return next(filter(None, (kind.instead(given) for kind in kinds)), None)

    def own(given: Any) -> Any:
        return next(kind.own(given) for kind in kinds if kind.accepts(given))

    listed = f"{', '.join(told[:-1])} or {told[-1]}" if len(told) > 1 else told[0]
    return Kind(lambda given: any(kind.accepts(given) for kind in kinds), listed, instead, own=own)


def _choice(*options: Any) -> Kind:
    def accepts(given: Any) -> bool:
        return isinstance(given, str | int) and any(type(given) is type(one) and given == one for one in options)

    return Kind(accepts, "one of " * (len(options) > 1) + ", ".join(map(repr, options)))


def _function(parameters: Any = ..., result: Any = Any) -> Kind:
    if not isinstance(parameters, list):
        return Kind(callable, "a function")
    count = len(parameters)
    return Kind(lambda given: takes(given, count), f"a function of {count} argument{'s' * (count != 1)}")


def _members(given: Any) -> Iterable[Any]:
    """The elements that can be looked at without consuming them."""
    return () if isinstance(given, Iterator) else given


def _is_group(given: Any, sized: bool) -> bool:
    """Whether a value is one or several elements in a row, not a text, a mapping or a single number."""
    if isinstance(given, str | bytes | bytearray | Mapping) or getattr(given, "ndim", 1) == 0:
        return False
    if isinstance(given, torch.nn.Module) or not isinstance(given, Iterable):
        return False
    return not sized or (hasattr(given, "__len__") and hasattr(given, "__getitem__"))


def _group(element: Any, sized: bool) -> Kind:
    kind = kind_of(element)
    numbers = kind.accepts(0) or not kind.told

    def accepts(given: Any) -> bool:
        if isinstance(given, torch.Tensor) and (given.is_meta or not numbers):
            return False
        return _is_group(given, sized) and all(map(kind.accepts, _members(given)))

    return Kind(accepts, f"a list of {kind.plural}", kind.instead, several=f"lists of {kind.plural}")


def _row(element: Any = Any, *others: Any) -> Kind:
    """A tuple: of any length, or of one element for each kind."""
    if others in ((), (...,)):
        return _group(element, sized=True)
    kinds = list(map(kind_of, (element, *others)))

    def accepts(given: Any) -> bool:
        fits = _is_group(given, sized=True) and len(given) == len(kinds)
        return fits and all(kind.accepts(one) for kind, one in zip(kinds, given, strict=True))

    return Kind(accepts, f"({', '.join(kind.told or 'a value' for kind in kinds)})")


def _table(key: Any = Any, value: Any = Any) -> Kind:
    keys, values = kind_of(key), kind_of(value)

    def accepts(given: Any) -> bool:
        if not isinstance(given, dict):  # other mappings may make their values when they are asked for
            return isinstance(given, Mapping)
        return all(map(keys.accepts, given)) and all(map(values.accepts, given.values()))

    return Kind(accepts, f"a mapping from {keys.plural if keys.told else 'names'} to {values.plural}")


def _array(annotation: Any) -> Kind:
    """The kind of array and number, and how many dims; which sizes fit is checked by what uses them."""
    fixed = [dim for dim in annotation.dim_str.split() if not dim.startswith("*") and dim != "..."]
    open_ended = len(fixed) < len(annotation.dim_str.split())

    def accepts(given: Any) -> bool:
        if not isinstance(given, annotation.array_type):
            return False
        number = str(given.dtype).removeprefix("torch.")
        fits = given.ndim >= len(fixed) if open_ended else given.ndim == len(fixed)
        return fits and (not isinstance(annotation.dtypes, tuple) or number in annotation.dtypes)

    name = {torch.Tensor: "a tensor", np.ndarray: "an array"}.get(annotation.array_type, "an array")
    number = _NUMBERS.get(annotation.__name__.partition("[")[0], "values")
    return Kind(accepts, f"{name} of {number}, [{', '.join(annotation.dim_str.split())}]")


_NUMBERS = {"Float": "floats", "Int": "whole numbers", "Bool": "booleans", "Num": "numbers"}


_GENERIC: tuple[tuple[tuple[Any, ...], Callable[..., Kind]], ...] = (
    ((Annotated,), _annotated),
    ((Union, UnionType), _either),
    ((Literal,), _choice),
    ((Callable,), _function),
    ((tuple,), _row),
    ((Mapping, dict), _table),
    ((Sequence, list), lambda element=Any: _group(element, sized=True)),
    ((Iterable, Set, set, frozenset), lambda element=Any: _group(element, sized=False)),
)


# ---- functions ---------------------------------------------------------------------------------------------


def checked(function: F) -> F:
    """The function, which holds its arguments to their annotations before it begins.

    Unannotated parameters and ``Any`` take everything. Calls that Python refuses by themselves, such as those with an
    unknown name, are left to it.
    """
    signature = inspect.signature(function)

    @functools.cache
    def kinds() -> dict[str, Kind]:
        own = inspect.unwrap(function)
        given = {name: one.annotation for name, one in signature.parameters.items() if one.annotation is not one.empty}
        holder = SimpleNamespace(__annotations__=given)
        hints = get_type_hints(holder, globalns=own.__globals__, include_extras=True)
        found = {name: kind_of(hint) for name, hint in hints.items()}
        return {name: kind for name, kind in found.items() if kind.told}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)
        for name in filter(kinds().__contains__, [*bound.arguments]):
            kind, given = kinds()[name], bound.arguments[name]
            several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            for one in given if several else (given,):
                if not kind.accepts(one):
                    _refuse(function, name, one, kind)
            bound.arguments[name] = given if several else kind.own(given)
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def _refuse(function: Callable[..., Any], name: str, given: Any, kind: Kind) -> None:
    where = function.__qualname__.removesuffix(".__init__")
    raise BadInput(f"invalid {name} for {where}", expected=kind.told, got=shown(given), do=kind.instead(given))


def frames_up(count: int) -> int:
    """A ``stacklevel`` for `warnings.warn` that leaves out the frames of `checked`: 1 is who asks."""
    frame, level = sys._getframe(1), 1
    while count > 1 and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
        count -= frame.f_code.co_filename != __file__
    return level


def checked_fields(cls: C) -> C:
    """A dataclass, which holds its fields to their annotations when it is made."""
    cls.__init__ = checked(cls.__init__)  # type: ignore[misc]
    return cls
