"""Sums that give one answer whatever the batches, shards and order: integers, and fixed point for what is not whole.

An accumulator is a dataclass of numpy arrays that add up, and of what tells it apart from others (layers, K, ...). It
writes its own `update` and `result`; `Exact` gives it the rest.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_interp.errors import BadCheckpoint, BadInput
from moe_interp.run import Run

UNIT = 2.0**32  # sums are kept in units of 2^-32: exact in any order, up to 2^31 a document

Values = dict[str, np.ndarray]
Provenance = Mapping[str, str | int | float]
Some = TypeVar("Some", bound="Exact")  # an accumulator; typing.Self is not understood where annotations are executed


class Exact:
    """What every accumulator can do: add itself to another, be stored, be taken up again.

    Fields that hold arrays add up; the others must be equal.

    Attributes:
        reads: points that `update` looks at.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def update(self, run: Run, documents: Int[np.ndarray, " B"]) -> None:
        """Adds a run; row b belongs to document ``documents[b]``, and only tokens in the run's masks count."""
        raise NotImplementedError

    def merge(self: Some, other: Some) -> Some:
        """Both together, the same in any order.

        Raises:
            BadInput: they do not count over the same documents, layers and experts.
        """
        mine, others = self.identity(), other.identity()
        if mine != others:
            raise BadInput(f"cannot merge {type(self).__name__}", expected=str(mine), got=str(others))
        parts = {
            name: value + getattr(other, name) if isinstance(value, np.ndarray) else value
            for name, value in _items(self)
        }
        return type(self)(**parts)

    def identity(self) -> dict[str, Any]:
        """What must be equal for two of a kind to be added: shapes of what adds up, values of what does not."""
        return {name: value.shape if isinstance(value, np.ndarray) else value for name, value in _items(self)}

    def state(self) -> Values:
        """All there is, as arrays by name: for ``np.savez``, a queue, a checkpoint."""
        return {name: np.asarray(value) for name, value in _items(self)}

    @classmethod
    def from_state(cls: type[Some], state: Mapping[str, np.ndarray]) -> Some:
        """What `state` gave."""
        return cls(**{field.name: _field(field.type, np.asarray(state[field.name])) for field in fields(cls)})  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes that are held, which do not grow with the number of tokens."""
        return sum(value.nbytes for _, value in _items(self) if isinstance(value, np.ndarray))


def _items(sums: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(sums, field.name)) for field in fields(sums)]


def _field(kind: Any, stored: np.ndarray) -> Any:
    if kind is int:
        return int(stored)
    return tuple(stored.tolist()) if getattr(kind, "__origin__", None) is tuple else stored


def fixed(values: Float[Tensor, "*shape"], what: str = "the router") -> Int[Tensor, "*shape"]:
    """In units of 2^-32.

    Raises:
        BadCheckpoint: one is not finite.
    """
    if not values.isfinite().all():
        raise BadCheckpoint(
            f"{what} gave values that are not finite",
            expected="finite logits, scores, weights and outputs",
            do="model.audit() says where they begin.",
        )
    return (values.double() * UNIT).round().long()


def flat_counts(index: Int[Tensor, "*any"], size: int) -> Int[np.ndarray, " _"]:
    """How often each of 0 ... size - 1 occurs."""
    return torch.bincount(index.flatten(), minlength=size).cpu().numpy()
