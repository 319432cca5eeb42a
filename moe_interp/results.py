"""The one maker of labelled results: xarray Datasets that say what they hold and survive a file.

1. An analysis states its numbers as `Variable`s: dimension names, values, units, meaning.
2. `labelled` checks that each dtype lives through netCDF-4 and puts units, meaning and provenance into attrs.
3. `save` and `load` name the engine (h5netcdf) and write whole files or none.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from moe_interp import __version__
from moe_interp.errors import BadData, BadInput, BadOutput

ENGINE: Final = "h5netcdf"
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
        "provenance": json.dumps(dict(provenance), ensure_ascii=False, sort_keys=True),
        "moe_interp": __version__,
    }
    try:
        return xr.Dataset(data, coords=axes, attrs=attrs)
    except ValueError as error:
        raise BadInput(
            "a result's dims do not fit", expected="the same size along a dim everywhere", got=str(error)
        ) from error


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
    return variable.dims, values, {"units": variable.units, "description": variable.meaning}


def _storable(name: str, values: ArrayLike) -> np.ndarray:
    """As an array whose dtype and values come back from netCDF-4 as they went in."""
    array = np.asarray(values)
    if array.dtype.kind == "U":
        # numpy drops trailing NULs silently and HDF5 cannot hold any: look at the strings as they were given.
        if any("\0" in text for text in np.asarray(values, dtype=object).flat):
            raise BadInput(f"result {name!r} cannot be stored", expected="strings without NUL", got="a NUL")
        return array
    if array.dtype.name not in _DTYPES:
        raise BadInput(
            f"result {name!r} cannot be stored",
            expected=f"strings or one of {', '.join(_DTYPES)}",
            got=array.dtype.name,
            do="Booleans become int8.",
        )
    return array


def real_file(path: str | os.PathLike[str]) -> Path:
    """The file that a path leads to, through links.

    Raises:
        BadOutput: there is something that is no regular file: a folder, a pipe, a device.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise BadOutput(
            f"cannot write {path}",
            expected="a regular file, or none yet",
            got="a folder" if os.path.isdir(target) else "a pipe, a device or the like",
        )
    return Path(target)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to in place of ``path``, which it becomes at the end of the ``with``, whole or not at all.

    Raises:
        BadOutput: the folder does not exist or cannot be written, the path is no regular file, or the disk is full;
            nothing is left behind.
    """
    target = real_file(path)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, target)
    except OSError as error:
        raise BadOutput(
            f"cannot write {target}", expected="a file in a writable folder", got=error.strerror or str(error)
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def save(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Path:
    """Writes a result to one netCDF-4 file, whole or not at all.

    Raises:
        BadOutput: the folder does not exist or cannot be written.
    """
    with whole_file(path) as part:
        dataset.to_netcdf(part, engine=ENGINE)
    return Path(path)


def load(path: str | os.PathLike[str]) -> xr.Dataset:
    """Reads a result written by `save`, wholly into memory.

    Raises:
        BadData: no such file, or not a netCDF-4 file.
    """
    try:
        return xr.load_dataset(Path(path), engine=ENGINE)
    except (OSError, ValueError, KeyError) as error:
        raise BadData(f"cannot read {path}", expected="a result saved as netCDF-4", got=str(error)) from error


def provenance_of(dataset: xr.Dataset) -> dict[str, str | int | float]:
    """What was measured on what, with which versions: the provenance that `labelled` was given."""
    return dict(json.loads(dataset.attrs["provenance"]))
