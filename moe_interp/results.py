"""The one maker of labelled results: xarray Datasets that say what they hold and survive a file.

1. An analysis states its numbers as `Variable`s: dimension names, values, units, meaning.
2. `labelled` checks that each dtype lives through netCDF-4, puts units, meaning and provenance into attrs, and makes
   ``bound`` the first dim of every interval.
3. `save` and `load` name the engine (h5netcdf), write whole files or none, and trust no file: a child process reads.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from moe_interp import __version__
from moe_interp.arguments import check_flag
from moe_interp.errors import BadData, BadInput, BadOutput
from moe_interp.paths import check_readable, lone_surrogate, real_file, write_whole
from moe_interp.untrusted import frames

ENGINE: Final = "h5netcdf"
SUFFIX: Final = ".nc"
_SEAL: Final = b"moe_interp sha256 "
_A_RESULT: Final = "a result saved as netCDF-4"
_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")


class Variable(NamedTuple):
    """One quantity of a result.

    Attributes:
        dims: names of the axes of ``values``, outermost first.
        values: integers, 32- or 64-bit floats, or strings.
        units: such as "nats", "tokens", or "1" for a pure number.
        meaning: one sentence: what it is, its range, its value under the null.
    """

    dims: tuple[str, ...]
    values: ArrayLike
    units: str
    meaning: str


Description = tuple[tuple[str, ...], str, str]
"""Dims, units and meaning of one quantity. A dim with a "?" is there only where the values have it."""


def described(values: Mapping[str, ArrayLike], table: Mapping[str, Description]) -> dict[str, Variable]:
    """The values as `Variable`s, by what a table says of each name."""
    return {name: Variable(_present(table[name][0], value), value, *table[name][1:]) for name, value in values.items()}


def _present(dims: tuple[str, ...], value: ArrayLike) -> tuple[str, ...]:
    whole = np.ndim(value) == len(dims)
    return tuple(dim.removesuffix("?") for dim in dims if whole or not dim.endswith("?"))


def labelled(
    variables: Mapping[str, Variable],
    coords: Mapping[str, ArrayLike],
    *,
    analysis: str,
    provenance: Mapping[str, str | int | float],
) -> xr.Dataset:
    """A Dataset of the given variables, described in its attrs, ready for netCDF.

    Args:
        variables: by name.
        coords: values along each labelled dimension (one axis each).
        analysis: which analysis made it.
        provenance: what was measured on what, with which versions; kept as one JSON string.

    Raises:
        BadInput: a dtype that netCDF-4 does not keep (boolean, complex, object), a NUL in a string, no units
            or meaning, or sizes that do not fit the dims or coords.
    """
    data = {name: _data_array(name, variable) for name, variable in variables.items()}
    axes = {name: ((name,), _storable(name, values)) for name, values in coords.items()}
    attrs = {
        "analysis": analysis,
        "provenance": _as_json(provenance),
        "moe_interp": __version__,
    }
    try:
        return xr.Dataset(data, coords=axes, attrs=attrs)
    except ValueError as error:
        raise BadInput(
            "a result's dims do not fit", expected="the same size along a dim everywhere", got=str(error)
        ) from error


def _as_json(provenance: Mapping[str, str | int | float]) -> str:
    """One JSON string that UTF-8 can hold: half of a surrogate pair, as in names of files, is written as its code."""
    told = json.dumps(dict(provenance), ensure_ascii=False, sort_keys=True)
    return told.encode("utf-8", "backslashreplace").decode("utf-8")


def _data_array(name: str, variable: Variable) -> tuple[tuple[str, ...], np.ndarray, dict[str, str]]:
    if not variable.units or not variable.meaning:
        raise BadInput(f"result {name!r} is not described", expected="units and meaning", got="an empty string")
    values = _storable(name, variable.values)
    if values.ndim != len(variable.dims):
        raise BadInput(
            f"result {name!r} has the wrong shape",
            expected=f"{len(variable.dims)} axes ({', '.join(variable.dims) or 'a scalar'})",
            got=f"shape {values.shape}",
        )
    dims, values = _bound_first(variable.dims, values)
    return dims, values, {"units": variable.units, "description": variable.meaning}


def _bound_first(dims: tuple[str, ...], values: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Both ends of an interval along the first axis, in every result."""
    if "bound" not in dims:
        return dims, values
    others = tuple(dim for dim in dims if dim != "bound")
    return ("bound", *others), np.moveaxis(values, dims.index("bound"), 0)


def _storable(name: str, values: ArrayLike) -> np.ndarray:
    """As an array whose dtype and values come back from netCDF-4 as they went in."""
    array = np.asarray(values)
    if array.dtype.kind == "U":
        # numpy drops trailing NULs silently and HDF5 cannot hold any: look at the strings as they were given.
        if any("\0" in text for text in np.asarray(values, dtype=object).flat):
            raise BadInput(f"result {name!r} cannot be stored", expected="strings without NUL", got="a NUL")
        if any(lone_surrogate(text) for text in array.flat):
            raise BadInput(f"result {name!r} cannot be stored", expected="Unicode text", got="half of a surrogate pair")
        return array
    if array.dtype.name not in _DTYPES:
        raise BadInput(
            f"result {name!r} cannot be stored",
            expected=f"strings or one of {', '.join(_DTYPES)}",
            got=array.dtype.name,
            do="Booleans become int8.",
        )
    return array


def save(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Write a result to one netCDF-4 file, whole or not at all.

    Raises:
        BadOutput: a name that does not end in ``.nc``; the folder does not exist or cannot be written, or is full.
        BadInput: a Dataset that netCDF-4 cannot hold.
    """
    real_file(path)
    if Path(path).suffix != SUFFIX:
        raise BadOutput(
            f"cannot write {path}",
            expected=f"a name that ends in {SUFFIX}: results are netCDF",
            got=repr(Path(path).name),
            do="result.to_dataframe().to_csv(path) writes a table.",
        )
    try:
        # Into memory first: the HDF5 library ends the process where a disk is full.
        written = dataset.to_netcdf(engine=ENGINE)
    except (TypeError, ValueError, UnicodeError) as error:
        raise BadInput("this Dataset cannot be stored", expected="a result of moe_interp", got=str(error)) from error
    return write_whole(path, b"".join([written, _SEAL, hashlib.sha256(written).hexdigest().encode("ascii")]))


def _check_seal(path: str | os.PathLike[str]) -> None:
    """Refuse a file that ends in a hash of other bytes than it holds. Files that others wrote end in none.

    HDF5 reads no further than the length that its first block states, so that other readers do not see the hash.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - len(_SEAL) - 64
        file.seek(max(size, 0))
        seal, told = file.read(len(_SEAL)), file.read()
        if seal != _SEAL:
            return
        file.seek(0)
        found, left = hashlib.sha256(), size
        while left and (part := file.read(min(left, 2**20))):
            found.update(part)
            left -= len(part)
    if found.hexdigest().encode("ascii") != told:
        raise BadData(f"{path} is damaged", expected="the bytes that save wrote", got="others")


def load(path: str | os.PathLike[str], *, trusted: bool = False) -> xr.Dataset:
    """Read a result written by `save`, wholly into memory.

    A child process reads the file: damage can crash the HDF5 library or keep it in a loop without end. Damage ends the
    child, after a few seconds at most, and never this process. What `save` wrote ends in a hash, by which any damage to
    its values is seen.

    Args:
        path: the file.
        trusted: read it in this process, without limits of time and memory. Saves the start of a child.

    Raises:
        BadData: no such file, not a netCDF-4 file, a damaged one, one that refers to other files, or one whose values
            take more memory or time than a file of its size should.
        BadInput: no path, or ``trusted`` is neither True nor False.
    """
    check_flag("trusted", trusted)
    check_readable(path, _A_RESULT)
    try:
        _check_seal(path)
        if trusted:
            return xr.load_dataset(Path(path), engine=ENGINE)
        return xr.decode_cf(_stored(frames("netcdf", path, expected=_A_RESULT))).load()
    except BadData:
        raise
    except Exception as error:  # damaged files set off errors of every kind in xarray and below it
        got = f"{type(error).__name__}: {error}"
        raise BadData(f"cannot read {path}", expected=_A_RESULT, got=got) from error


def _stored(answers: Iterator[Any]) -> xr.Dataset:
    """The variables of a file as they are stored, not yet decoded."""
    told = next(answers)
    variables = {one["name"]: _variable(one, next(answers)) for one in told["variables"]}
    if next(answers, None) is not None:
        raise ValueError("more values than variables")
    return xr.Dataset(variables, attrs=_attrs(told["attrs"]))


def _variable(told: Mapping[str, Any], content: Any) -> xr.Variable:
    if told["dtype"] == "text":
        values, encoding = np.array(content, object), {"dtype": str}
    else:
        values, encoding = np.frombuffer(content, told["dtype"]), {}
    return xr.Variable(told["dims"], values.reshape(told["shape"]), _attrs(told["attrs"]), encoding)


def _attrs(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _attribute(value) for name, value in told.items()}


def _attribute(told: Any) -> Any:
    """Undo what the child did to send a value as JSON."""
    if not isinstance(told, dict):
        return told
    if "bytes" in told:
        values = np.array([one.encode("latin-1") for one in told["bytes"]]).reshape(told["shape"])
    else:
        values = np.array(told["values"], told["dtype"]).reshape(told["shape"])
    return values if told["shape"] else values[()]


def provenance_of(dataset: xr.Dataset) -> dict[str, str | int | float]:
    """What was measured on what, with which versions: the provenance that `labelled` was given.

    Raises:
        BadData: a Dataset without provenance, or one that is damaged.
    """
    try:
        return dict(json.loads(dataset.attrs["provenance"]))
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise BadData("no provenance", expected="a result of an analysis of moe_interp", got=got) from error
