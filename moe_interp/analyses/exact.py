"""Sums that give one answer whatever the batches, shards and order: integers, and fixed point for what is not whole.

An accumulator is a dataclass of numpy arrays that add up, and of what tells it apart from others (layers, K, ...). It
writes its own `update` and `result`; `Exact` gives it the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from moe_interp.errors import BadCheckpoint, BadInput
from moe_interp.run import Run

UNIT = 2.0**32  # sums are kept in units of 2^-32: exact in any order, up to 2^31 a document
LIMIT = 2**31

Values = dict[str, np.ndarray]
Provenance = Mapping[str, str | int | float]
Some = TypeVar("Some", bound="Exact")  # an accumulator; typing.Self is not understood where annotations are executed


def of_each(top_k: int | Sequence[int], layers: Sequence[int]) -> tuple[int, ...]:
    """K of every layer, given one for all or one for each.

    Raises:
        BadInput: not as many as there are layers.
    """
    found = (top_k,) * len(layers) if isinstance(top_k, int) else tuple(top_k)
    if len(found) != len(layers):
        raise BadInput("top_k does not fit", expected=f"a K, or one for each of {len(layers)} layers", got=str(top_k))
    return found


def one_or_each(values: Num[np.ndarray, "*rest L"]) -> Num[np.ndarray, "*some"]:
    """What all layers have in common, without the last axis; where they differ, each layer's."""
    first = values[..., :1]
    return values[..., 0] if np.array_equal(np.broadcast_to(first, values.shape), values, equal_nan=True) else values


def told_top_k(top_k: Sequence[int]) -> int | str:
    """K for a provenance; where layers differ, that of each."""
    return top_k[0] if len(set(top_k)) == 1 else ", ".join(map(str, top_k))


class SparseCounts:
    """Counts of what few of very many possible things occur: codes, and how often each was seen.

    Holds 16 bytes for each different code, and up to as much again between two tidyings.
    """

    def __init__(self, codes: Int[np.ndarray, " X"] | None = None, counts: Int[np.ndarray, " X"] | None = None):
        nothing = np.zeros(0, np.int64)
        self._parts = [(nothing if codes is None else codes, nothing if counts is None else counts)]

    def add(self, codes: Int[np.ndarray, " X"]) -> None:
        """Counts each code once."""
        self._parts.append(tuple(np.unique(codes, return_counts=True)))  # type: ignore[arg-type]
        if sum(len(part) for part, _ in self._parts[1:]) > len(self._parts[0][0]) + 2**20:
            self.tidy()

    def tidy(self) -> tuple[Int[np.ndarray, " X"], Int[np.ndarray, " X"]]:
        """Every code once, ascending, and its counts."""
        if len(self._parts) > 1:
            codes, counts = (np.concatenate(part) for part in zip(*self._parts, strict=True))
            unique, place = np.unique(codes, return_inverse=True)
            sums = np.zeros(len(unique), np.int64)
            np.add.at(sums, place, counts)
            self._parts = [(unique, sums)]
        return self._parts[0]

    def __add__(self, other: "SparseCounts") -> "SparseCounts":
        found = SparseCounts(*self.tidy())
        found._parts.append(other.tidy())
        found.tidy()
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(array.nbytes for part in self._parts for array in part)


class Exact:
    """What every accumulator can do: add itself to another, be stored, be taken up again.

    Fields that hold arrays add up; the others must be equal.

    Attributes:
        reads: points that `update` looks at.
        maxima: names of fields of which two together have the larger value in place of the sum.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    maxima: ClassVar[tuple[str, ...]] = ()

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
            name: value + getattr(other, name) if isinstance(value, _ADDED) else value for name, value in _items(self)
        }
        parts |= {name: np.maximum(getattr(self, name), getattr(other, name)) for name in self.maxima}
        return type(self)(**parts)

    def identity(self) -> dict[str, Any]:
        """What must be equal for two of a kind to be added: shapes of what adds up, values of what does not."""
        return {
            name: value.shape if isinstance(value, np.ndarray) else value
            for name, value in _items(self)
            if not isinstance(value, SparseCounts)
        }

    def state(self) -> Values:
        """All there is, as arrays by name: for ``np.savez``, a queue, a checkpoint."""
        dense = {name: np.asarray(value) for name, value in _items(self) if not isinstance(value, SparseCounts)}
        sparse = {name: np.stack(value.tidy()) for name, value in _items(self) if isinstance(value, SparseCounts)}
        return dense | sparse

    @classmethod
    def from_state(cls: type[Some], state: Mapping[str, np.ndarray]) -> Some:
        """What `state` gave."""
        return cls(**{field.name: _field(field.type, np.asarray(state[field.name])) for field in fields(cls)})  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(value.nbytes for _, value in _items(self) if isinstance(value, _ADDED))


_ADDED = (np.ndarray, SparseCounts)


def _items(sums: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(sums, field.name)) for field in fields(sums)]


def _field(kind: Any, stored: np.ndarray) -> Any:
    if kind is SparseCounts:
        return SparseCounts(*stored)
    if kind is int:
        return int(stored)
    return tuple(stored.tolist()) if getattr(kind, "__origin__", None) is tuple else stored


def blocks_of(documents: Int[np.ndarray, "*shape"], blocks: int) -> Int[np.ndarray, "*shape"]:
    """The block of documents, 0 ... Z - 1, that each document number is in.

    Any Z successive documents from a multiple of Z on go to Z different blocks, in an order drawn anew for each such
    turn: in one order, a corpus whose domains alternate would have blocks of one domain each.
    """
    turns, which = np.unique(documents // blocks, return_inverse=True)
    orders = [np.random.default_rng([blocks, turn]).permutation(blocks) for turn in turns.tolist()]
    return np.asarray(np.stack(orders)[which.reshape(documents.shape), documents % blocks])


def fixed(values: Float[Tensor, "*shape"], what: str = "the router") -> Int[Tensor, "*shape"]:
    """In units of 2^-32.

    Raises:
        BadCheckpoint: one is not finite, or so large that its sum would not be kept.
    """
    if not values.isfinite().all():
        raise BadCheckpoint(
            f"{what} gave values that are not finite",
            expected="finite logits, scores, weights and outputs",
            do="model.audit() says where they begin.",
        )
    if values.numel() and values.abs().max() >= LIMIT:
        raise BadCheckpoint(
            f"{what} gave values that are too large to be summed exactly",
            expected=f"values below 2^{LIMIT.bit_length() - 1}",
            got=f"{float(values.abs().max()):.3g}",
            do="model.audit() says where they begin; a router that diverges in training shows so.",
        )
    return (values.double() * UNIT).round().long()


def fixed_sums(values: Float[Tensor, "B S X"], what: str = "the router") -> Int[Tensor, "B X"]:
    """Sums over the tokens of each row, in units of 2^-32.

    Raises:
        BadCheckpoint: a value is not finite, or a sum is too large to be kept.
    """
    units = fixed(values, what)
    _check_held(values.double().sum(dim=1).abs().max().item() if values.numel() else 0.0)
    return units.sum(dim=1)


def fixed_by(
    ids: Int[Tensor, "B S K"], values: Float[Tensor, "B S K"], size: int, what: str = "the router"
) -> Int[Tensor, "B size"]:
    """Sums of the values of each id over the tokens of each row, in units of 2^-32.

    Raises:
        BadCheckpoint: a value is not finite, or a sum is too large to be kept.
    """
    units = fixed(values, what)
    sums = values.double().new_zeros(len(ids), size).scatter_add_(1, ids.flatten(1), values.double().flatten(1).abs())
    _check_held(sums.max().item() if sums.numel() else 0.0)
    return units.new_zeros(len(ids), size).scatter_add_(1, ids.flatten(1), units.flatten(1))


def add_fixed(
    total: Int[np.ndarray, "N *rest"], documents: Int[np.ndarray, " B"], parts: Int[np.ndarray, "B *rest"]
) -> None:
    """Add parts in units of 2^-32 to the documents that they belong to.

    Raises:
        BadCheckpoint: a document's sum would be too large to be kept; nothing is added.
    """
    touched, place = np.unique(documents, return_inverse=True)
    expected = total[touched].astype(float)
    np.add.at(expected, place, parts.astype(float))
    _check_held(np.abs(expected).max(initial=0.0) / UNIT)
    np.add.at(total, documents, parts)


def _check_held(largest: float) -> None:
    if largest >= LIMIT:
        raise BadCheckpoint(
            "sums over a document are too large to be kept exactly",
            expected=f"below 2^{LIMIT.bit_length() - 1}",
            got=f"{largest:.3g}",
            do="Values explode: look at router_logits (the z-loss grows with their square) and at norms of expert_out.",
        )


def flat_counts(index: Int[Tensor, "*any"], size: int) -> Int[np.ndarray, " _"]:
    """How often each of 0 ... size - 1 occurs."""
    return torch.bincount(index.flatten(), minlength=size).cpu().numpy()
