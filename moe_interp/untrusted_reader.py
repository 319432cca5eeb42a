"""Program of a child process that reads one untrusted file: ``untrusted_reader.py netcdf|parquet FILE [COLUMN ...]``.

A damaged or crafted file can crash the libraries that read it, or keep them busy without end. Here that ends this
process alone. It imports nothing of this package, limits its own processor time and memory, and answers in frames on
standard output: a byte for the kind, eight for the length, and the content.

J  JSON: of netCDF attributes and variables, whose values follow; of parquet some records
B  the bytes of one variable
E  JSON: what is wrong, what was expected, what came
.  all is read
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import numpy as np

COMPRESSION: Final = 1032  # no deflated byte stands for more
ROOM: Final = 2**28  # bytes of values that any file may have, however small
RATIO: Final = 16  # bytes of values for each byte of a larger file
SECONDS: Final = 2  # of processor time, besides what the values take
SPEED: Final = 2 * 10**7  # bytes of values in a second of processor time, on a slow machine
_TOGETHER: Final = 2**22  # bytes of rows that are read and answered together
Table = Any  # an h5py.Dataset


class Refused(Exception):
    """What is wrong with a file, what was expected, what came."""


# ---- limits and answers -------------------------------------------------------------------------------------------


def limit(seconds: float, memory: int | None = None) -> None:
    """End this process after so much more processor time, and give it so much more memory, where there are limits."""
    try:
        import resource
    except ImportError:  # Windows, where the parent's clock is the only limit
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime + seconds) + 1, resource.RLIMIT_CORE: 0}
    if memory is not None:
        limits[resource.RLIMIT_AS] = _address_space() + memory
    for what, most in limits.items():
        with suppress(OSError, ValueError):  # macOS takes no limit of memory
            resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def _address_space() -> int:
    """Bytes of this process's addresses."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 2**32


def answer(kind: bytes, content: Any = b"") -> None:
    """Write a frame."""
    out = sys.stdout.buffer
    out.write(kind + len(content).to_bytes(8, "little"))
    out.write(content)
    out.flush()


def as_json(value: Any) -> bytes:
    """A value as ASCII, whatever its strings hold."""
    return json.dumps(value).encode("ascii")


# ---- netCDF -------------------------------------------------------------------------------------------------------


def netcdf(path: str) -> None:
    """Answer with the attributes and variables of a netCDF-4 file, as they are stored."""
    import h5netcdf
    import h5py

    size = os.path.getsize(path)
    room = max(ROOM, RATIO * size)
    limit(SECONDS, ROOM + 8 * size)
    with h5py.File(path, "r") as file:
        stated = _stated(file, h5py)
    most = min(COMPRESSION * size, room)
    if stated > most:
        raise Refused("states sizes that it cannot hold", f"at most {most} bytes of values", f"{stated} bytes")
    limit(SECONDS + stated / SPEED, ROOM + 8 * size + 10 * stated)
    with h5netcdf.File(path, "r", decode_vlen_strings=True) as file:
        told = [_variable(name, one, h5py) for name, one in file.variables.items()]
        answer(b"J", as_json({"attrs": _attrs(file), "variables": told}))
        text = wide = 0
        for one in file.variables.values():
            values = _values(one)
            if values.dtype == object:
                text, wide = _check_text(values, text, wide, size, room)
                answer(b"J", as_json(values.ravel().tolist()))
            else:
                answer(b"B", values.reshape(-1).view(np.uint8).data)


def _stated(file: Any, h5py: Any) -> int:
    """Bytes of values that a file states, if it takes none from other files.

    A dataset counts once for each of its names, since it is read under each.
    """
    links: dict[str, Any] = {}
    file.visititems_links(links.__setitem__)
    outside = [name for name, link in links.items() if isinstance(link, h5py.ExternalLink)]
    tables: list[Table] = []
    if not outside:  # a soft link can lead through an external one
        tables = [one for one in map(file.get, links) if isinstance(one, h5py.Dataset)]
    outside += [one.name for one in tables if one.external or one.is_virtual]
    if outside:
        raise Refused("refers to other files", "a file that holds its own values", f"links at {outside[:3]}")
    return sum(one.size * one.dtype.itemsize for one in tables if one.shape is not None)


def _variable(name: str, one: Any, h5py: Any) -> dict[str, Any]:
    text = h5py.check_dtype(vlen=one.dtype) is str
    if (one.dtype.kind not in "iufbcS" and not text) or one.dtype.names:
        raise Refused("holds values of a type that no result has", "numbers and strings", f"{name}: {one.dtype}")
    dtype = "text" if text else one.dtype.str
    return {"name": name, "dims": one.dimensions, "shape": one.shape, "dtype": dtype, "attrs": _attrs(one)}


def _values(one: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(one[...])).reshape(one.shape)


def _check_text(values: np.ndarray, text: int, wide: int, size: int, room: int) -> tuple[int, int]:
    """Refuse strings that take more memory than a file of this size has reason to: of all variables so far."""
    lengths = [len(one) for one in values.flat]
    text += sum(lengths)
    wide += 4 * len(lengths) * max(lengths, default=0)
    if text > size:
        raise Refused("has strings that share their bytes", f"at most {size} characters, its size", f"{text}")
    if wide > room:
        raise Refused(
            "has strings that are too long side by side",
            f"at most {room} bytes of strings of the longest one's length",
            f"{wide} bytes",
        )
    return text, wide


def _attrs(one: Any) -> dict[str, Any]:
    return {name: _attribute(name, value) for name, value in one.attrs.items()}


def _attribute(name: str, value: Any) -> Any:
    """Text as itself, other values by dtype, shape and list."""
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value)):
        return value
    array = np.asarray(value)
    if array.dtype.kind == "S":
        return {"bytes": [part.decode("latin-1") for part in array.flat], "shape": array.shape}
    if array.dtype.kind not in "iufb":
        raise Refused("holds an attribute of a type that no result has", "numbers and text", f"{name}: {array.dtype}")
    return {"dtype": array.dtype.str, "shape": array.shape, "values": array.ravel().tolist()}


# ---- parquet ------------------------------------------------------------------------------------------------------


def parquet(path: str, *columns: str) -> None:
    """Answer with the names of all columns, then with records of some, a few at a time."""
    from pyarrow import parquet as reader

    limit(SECONDS, 4 * ROOM)
    table = reader.ParquetFile(path, buffer_size=2**20)  # a column is read page by page
    names = table.schema_arrow.names
    answer(b"J", as_json(names))
    wanted = [name for name in columns if name in names]
    for batch in table.iter_batches(batch_size=_rows(table.metadata), columns=wanted, use_threads=False):
        for records in _records(batch):
            answer(b"J", as_json(records))
            limit(SECONDS)


def _rows(about: Any) -> int:
    """How many rows to read at a time: about _TOGETHER bytes of them."""
    stated = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
    return int(min(max(_TOGETHER * about.num_rows // max(stated, 1), 16), 1024))


def _records(batch: Any) -> Iterator[list[dict[str, Any]]]:
    """The records of a batch, about _TOGETHER bytes of them at a time: a text that rows share is many here."""
    rows = max(1, _TOGETHER * batch.num_rows // max(batch.nbytes, 1))
    for begin in range(0, batch.num_rows, rows):
        part = batch.slice(begin, rows)
        columns = [map(_plain, column.to_pylist()) for column in part.columns]
        values = zip(*columns, strict=True) if columns else [()] * part.num_rows
        yield [dict(zip(part.schema.names, row, strict=True)) for row in values]


def _plain(value: Any) -> Any:
    """A value that JSON has; any other in a list, which is neither a text nor a name, so that an error shows it."""
    return value if value is None or isinstance(value, str | bool | int | float) else [repr(value)[:80]]


# -------------------------------------------------------------------------------------------------------------------


def main(kind: str, path: str, *columns: str) -> None:
    """Read a file and answer."""
    try:
        parquet(path, *columns) if kind == "parquet" else netcdf(path)
    except Refused as refused:
        answer(b"E", as_json(refused.args))
    except MemoryError:
        answer(b"E", as_json(["", "", "values that take more memory than a file of this size has reason to"]))
    except Exception as error:  # damaged files set off errors of every kind in the libraries
        got = (str(error).strip() or "no reason").splitlines()[0]
        answer(b"E", as_json(["", "", f"{type(error).__name__}: {got[:200]}"]))
    else:
        answer(b".")


if __name__ == "__main__":
    main(*sys.argv[1:])
