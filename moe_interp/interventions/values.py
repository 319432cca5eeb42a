"""Tensors as plain data, which interventions hold: compared by value, written to JSON and read back."""

import base64
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from moe_interp.errors import BadInput
from moe_interp.run import Tokens

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True, eq=False)
class Values:
    """A tensor that compares, hashes and is stored by its values. It is detached and must not be written to."""

    tensor: Tensor

    @classmethod
    def of(cls, given: Any, what: str = "values") -> "Values":
        """A copy of a tensor, of an array, or of numbers in lists.

        Raises:
            BadInput: not numbers, or some that are not finite.
        """
        if isinstance(given, Values):
            return given
        try:
            tensor = given.detach().clone() if isinstance(given, Tensor) else torch.as_tensor(given).clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadInput(f"not {what}", expected="a tensor or numbers", got=repr(given)[:80]) from error
        if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
            raise BadInput(f"not {what}", expected=f"a dtype of {', '.join(_DTYPES)}", got=str(tensor.dtype))
        if tensor.is_meta:
            raise BadInput(f"{what} without numbers", expected="a tensor in memory", got="one on the meta device")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadInput(f"{what} are not finite", expected="finite numbers", got="NaN or infinity")
        return cls(tensor)

    @cached_property
    def _bytes(self) -> bytes:
        raw = self.tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        return raw.numpy().tobytes()

    @property
    def _kind(self) -> tuple[str, tuple[int, ...]]:
        return str(self.tensor.dtype).removeprefix("torch."), tuple(self.tensor.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self._kind == other._kind and self._bytes == other._bytes

    def __hash__(self) -> int:
        return hash((self._kind, self._bytes))

    def __repr__(self) -> str:
        return f"Values({self._kind[0]} {list(self._kind[1])}, sha256 {hashlib.sha256(self._bytes).hexdigest()[:16]})"

    def record(self) -> dict[str, Any]:
        """As JSON has it: dtype, shape, and the bytes in base64."""
        dtype, shape = self._kind
        return {"dtype": dtype, "shape": list(shape), "bytes": base64.b64encode(self._bytes).decode("ascii")}

    @classmethod
    def from_record(cls, record: Any) -> "Values":
        """What `record` gave.

        Raises:
            BadInput: another thing.
        """
        try:
            dtype, shape = record["dtype"], [int(size) for size in record["shape"]]
            raw = np.frombuffer(base64.b64decode(record["bytes"], validate=True), np.uint8).copy()
            if dtype not in _DTYPES:
                raise ValueError(f"dtype {dtype!r}")
            return cls.of(torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(shape))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadInput("not a stored tensor", expected="dtype, shape and bytes that fit", got=str(error)) from error


@dataclass(frozen=True)
class ByToken:
    """A value for each real token of some texts.

    Attributes:
        values: [B, N, ...], row n of a text is that of its n-th real token, wherever the padding was.
        lengths: real tokens of each text; rows from there on mean nothing.
    """

    values: Values
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, given: Any, tokens: Tokens | None = None, what: str = "values") -> "ByToken":
        """From a tensor [B, S, ...] (or [S] for one text), whose entries ``tokens`` numbers; without, all are real.

        Raises:
            BadInput: not such a tensor, one of other tokens, or tokens that go on from a cache.
        """
        if isinstance(given, ByToken):
            return given
        values = Values.of(given, what).tensor
        if tokens is None:
            values = values[None] if values.dim() == 1 else values
            if values.dim() < 2 or not values.numel():
                raise BadInput(f"not {what}", expected="one for each token of each text", got=str(tuple(values.shape)))
            return cls(Values(values), (values.shape[1],) * len(values))
        if values.shape[:2] != tokens.mask.shape:
            got, expected = (str(tuple(shape)) for shape in (values.shape[:2], tokens.mask.shape))
            raise BadInput(f"{what} of other tokens", expected=f"one for each of [batch, pos] = {expected}", got=got)
        if not torch.equal(tokens.at((0,)).any(dim=1), tokens.mask.any(dim=1)):
            raise BadInput(
                f"{what} of the end of a text", expected="a run of whole texts", got="one that goes on from a cache"
            )
        lengths = tokens.mask.sum(dim=1)
        # The columns of real tokens, in their order: there may be others between them.
        columns = (~tokens.mask).int().argsort(dim=1, stable=True)[:, : int(lengths.max())]
        tail = values.shape[2:]
        columns = columns.to(values.device).view(*columns.shape, *[1] * len(tail)).expand(*columns.shape, *tail)
        return cls(Values(values.gather(1, columns)), tuple(lengths.tolist()))

    def at(self, tokens: Tokens) -> tuple[Tensor, Bool[Tensor, "B S"]]:
        """The values at the tokens of a forward pass, [B, S, ...], and where there are any.

        Raises:
            BadInput: they are of another number of texts.
        """
        there = self.there(tokens)
        values = self.values.tensor.to(tokens.mask.device)[self._texts(tokens)]
        columns = tokens.index.clamp(0, values.shape[1] - 1)
        tail = values.shape[2:]
        columns = columns.view(*columns.shape, *[1] * len(tail)).expand(*columns.shape, *tail)
        return values.gather(1, columns), there

    def there(self, tokens: Tokens) -> Bool[Tensor, "B S"]:
        """[B, S], the tokens of a forward pass for which there are values.

        Raises:
            BadInput: they are of another number of texts.
        """
        lengths = torch.tensor(self.lengths, device=tokens.mask.device)[self._texts(tokens)]
        return tokens.mask & (tokens.index < lengths[:, None])

    def covers(self, tokens: Tokens) -> bool:
        """Whether there are values for these texts: one for all, or as many as the whole batch has."""
        count = len(self.lengths)
        return count == 1 or (
            int(tokens.texts.max()) < count and (tokens.numbers is not None or len(tokens.texts) == count)
        )

    def _texts(self, tokens: Tokens) -> Tensor:
        count = len(self.lengths)
        if count == 1:
            return tokens.texts * 0
        if not self.covers(tokens):
            here = len(tokens.texts)
            raise BadInput(
                "values of other texts",
                expected="values of one text" + f", or of {here}, as many as are run here" * (here > 1),
                got=f"values of {count}",
                do="Take them from a run of one text, or run the same texts.",
            )
        return tokens.texts

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"values": self.values.record(), "lengths": list(self.lengths)}

    @classmethod
    def from_record(cls, record: Any) -> "ByToken":
        """What `record` gave.

        Raises:
            BadInput: another thing.
        """
        try:
            values, lengths = Values.from_record(record["values"]), tuple(int(one) for one in record["lengths"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput("not stored values of tokens", expected="values and lengths", got=str(error)) from error
        if values.tensor.dim() < 2 or len(lengths) != len(values.tensor) or max(lengths) > values.tensor.shape[1]:
            raise BadInput("not stored values of tokens", expected="lengths that fit the values", got=str(lengths))
        return cls(values, lengths)
