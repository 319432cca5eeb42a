"""Untrusted files, read by a child process: what crashes or never ends in a library ends there.

1. The child runs `untrusted_reader.py`, which limits its own processor time and memory, and answers in frames.
2. `frames` hands them on. A child that dies, or that stays silent for too long, is a `BadData`.
"""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any, cast

from moe_interp.errors import BadData

SILENCE = 60.0  # seconds without a frame, besides what a slow disk takes: a busy machine may give a child little of it
_SLOWEST = 10**6  # bytes of a file in a second
_READER = Path(__file__).with_name("untrusted_reader.py")
_TIME = getattr(signal, "SIGXCPU", None)


def frames(kind: str, path: str | os.PathLike[str], *columns: str, expected: str) -> Generator[Any, None, None]:
    """What a child process reads in a file: values of JSON, and bytes as they are, in order.

    Args:
        kind: "netcdf" or "parquet".
        path: the file.
        columns: those to read of a parquet file.
        expected: what the file is to be, for errors.

    Raises:
        BadData: the file is not as expected, refers to others, states sizes that it cannot hold, or takes more time
            or memory to read than a file of its size has reason to.
    """
    silence = SILENCE + os.path.getsize(path) / _SLOWEST
    with _child(kind, os.path.abspath(path), *columns) as child:
        while (frame := _frame(child, silence)) is not None:
            mark, content = frame
            if mark == b".":
                return
            if mark == b"E":
                raise _refused(path, expected, *json.loads(content))
            yield content if mark == b"B" else json.loads(content)
        raise _refused(path, expected, "", "", _end(child.wait()))


@contextmanager
def _child(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A reader, which is ended when nobody reads its answers any more."""
    paths = [one for one in sys.path if one]  # it imports libraries from where this process does
    one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    # Arrow's own pools reserve addresses that they never use, which count against the limit of memory.
    env = {**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(paths), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-P", str(_READER), *words]
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _frame(child: subprocess.Popen[bytes], silence: float) -> tuple[bytes, bytearray] | None:
    """The next frame; None where the child has ended before its end."""
    answers = cast(io.BufferedReader, child.stdout)
    clock = Timer(silence, child.kill)
    clock.start()
    try:
        head = answers.read(9)
        if len(head) < 9:
            return None
        content = bytearray(int.from_bytes(head[1:], "little"))
        whole = answers.readinto(content) == len(content)
        return (head[:1], content) if whole else None
    finally:
        clock.cancel()


def _end(code: int) -> str:
    """What became of a child, by its exit status."""
    if _TIME is not None and code == -_TIME:
        return "damage that keeps the reading library busy without end"
    if code == -getattr(signal, "SIGKILL", 9):
        return "a file that takes too long to read, or too much memory"
    return f"damage that ends the reading library (exit status {code})"


def _refused(path: str | os.PathLike[str], expected: str, what: str, wanted: str, got: str) -> BadData:
    said = f"{os.fspath(path)} {what}" if what else f"cannot read {os.fspath(path)}"
    return BadData(said, expected=wanted or expected, got=got)
