"""Functions of users as metrics: their arguments and their results are checked."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe_interp.errors import BadInput


def number_of(fn: Callable[[Tensor], Any], logits: Float[Tensor, "s V"]) -> Float[Tensor, ""]:
    """Call a user's function with the logits of one text, and return its number in float64.

    Raises:
        BadInput: something else than a number.
    """
    try:
        found = fn(logits)
    except Exception as error:
        error.add_note(f"A metric is called with the logits of one text at a time: {list(logits.shape)}, [pos, vocab].")
        raise
    number = found if isinstance(found, Tensor) else torch.as_tensor(found) if _is_number(found) else None
    if number is None or number.numel() != 1 or number.is_complex():
        raise BadInput(
            "a metric gave no number",
            expected="a number, or a tensor of one, for the logits [pos, vocab] of one text",
            got=kind(found),
            do="Index or reduce inside the function: lambda logits: logits[-1, 5] - logits[-1, 9].",
        )
    return number.reshape(()).double()


def _is_number(given: Any) -> bool:
    return hasattr(given, "__float__") and getattr(given, "size", 1) == 1


def kind(given: Any) -> str:
    """Describe a value for an error."""
    if hasattr(given, "shape"):
        return f"a {type(given).__name__} of shape {list(given.shape)}"
    return repr(given)[:80] if isinstance(given, str | int | float | None) else f"a {type(given).__name__}"


def check_arguments(fn: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with logits alone, as far as its signature is known.

    Raises:
        BadInput: it takes none, or asks for more.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None)
    except TypeError:
        raise BadInput(
            "the metric takes other arguments",
            expected="a function of one: the logits [pos, vocab] of one text",
            got=f"{getattr(fn, '__name__', type(fn).__name__)}{signature}",
            do="Bind the others: functools.partial(function, name=value), or a lambda.",
        ) from None
