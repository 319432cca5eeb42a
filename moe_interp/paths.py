"""Paths: which names are paths, which files may be read, and the one writer of whole files.

A file is written in three steps: its bytes go to a new ``.part`` file beside the target, which is locked while it is
written, and which then takes the target's name. What a killed process left behind has no lock and is removed by the
next write to the same target.
"""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moe_interp.errors import BadData, BadInput, BadOutput

try:
    import fcntl
except ImportError:  # no locks on Windows: what is left behind stays
    fcntl = None  # type: ignore[assignment]

# The ids that the Hugging Face hub accepts: a name, or an owner and a name.
_HUB_ID = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_FILES = "bin ckpt csv gz json jsonl nc npz parquet pkl pt pth safetensors txt zip"
_ENDINGS = tuple(f".{ending}" for ending in _FILES.split(" "))
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


def looks_like_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name can only be a path or an address: what no hub id looks like, or what ends like a file."""
    text = os.fspath(name)
    hub_id = _HUB_ID.fullmatch(text) is not None and ".." not in text and not text.lower().endswith(_ENDINGS)
    return isinstance(name, os.PathLike) or not hub_id


def lone_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which no encoding and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def without_credentials(text: str) -> str:
    """A text whose addresses have lost their user names and passwords."""
    return _CREDENTIALS.sub("(not shown)@", text)


def check_readable(path: str | os.PathLike[str], expected: str) -> None:
    """Refuse to open what is not there, and what a reader could wait for without end.

    Raises:
        BadData: no such file; or a folder, a pipe, a device.
        BadInput: no path.
    """
    name = _name(path)
    if "\0" in name or not os.path.exists(path):
        raise BadData(f"cannot read {name}", expected=expected, got="no such file")
    if not os.path.isfile(path):
        raise BadData(f"cannot read {path}", expected=expected, got=_kind(path))


def _kind(path: str | os.PathLike[str]) -> str:
    return "a folder" if os.path.isdir(path) else "a pipe, a device or the like"


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written, before the work is done.

    Raises:
        BadOutput: the folder is missing or not writable, or the path is no regular file.
        BadInput: no path.
    """
    folder = real_file(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BadOutput(
            f"cannot write {path}",
            expected="a file in a folder that exists and is writable",
            got=f"folder {folder}" + ("" if folder.is_dir() else ", which is not there"),
        )


def _name(path: object) -> str:
    """A path as text.

    Raises:
        BadInput: it is none.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise BadInput("not a path", expected="the name of a file", got=repr(path)[:80])
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        got = "half of a surrogate pair"
        raise BadInput("not a path", expected="characters that a file name can have", got=got) from error
    return os.fspath(path)


def real_file(path: str | os.PathLike[str]) -> Path:
    """The file that a path leads to, through links.

    Raises:
        BadOutput: there is something that is no regular file: a folder, a pipe, a device.
        BadInput: no path.
    """
    if "\0" in _name(path):
        raise BadOutput(f"cannot write {_name(path)!r}", expected="a path", got="a NUL in its name")
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise BadOutput(f"cannot write {path}", expected="a regular file, or none yet", got=_kind(target))
    return Path(target)


def write_whole(path: str | os.PathLike[str], data: bytes | memoryview) -> Path:
    """Write a file, whole or not at all: until the last byte is on the disk, what was there stays.

    Raises:
        BadOutput: the folder does not exist or cannot be written, the path is no regular file, or the disk is full;
            nothing is left behind.
    """
    target = real_file(path)
    try:
        _remove_leftovers(target)
        with _part(target) as (part, file):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, target)
    except OSError as error:
        raise BadOutput(
            f"cannot write {target}", expected="a file in a writable folder", got=error.strerror or str(error)
        ) from error
    return Path(path)


@contextmanager
def _part(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside the target, locked while it is open; it is removed unless it was given another name."""
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with _locked(part) as file:
            yield part, file
    finally:
        with suppress(OSError):
            part.unlink()


def _locked(part: Path) -> BinaryIO:
    """The open file of a part. Another writer may have removed it before it was locked: then it is made again."""
    while True:
        file = part.open("xb")
        if fcntl is None:
            return file
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if part.exists():
            return file
        file.close()


def _remove_leftovers(target: Path) -> None:
    """Remove the parts of this target that no process is writing."""
    if fcntl is None or not target.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}\.part")
    for part in [one for one in target.parent.iterdir() if ours.fullmatch(one.name) and one.is_file()]:
        with suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
