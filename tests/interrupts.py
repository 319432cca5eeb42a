"""Ctrl-C at a chosen line: a tracing function that raises `KeyboardInterrupt` at the n-th line of the package.

Left out are lines that end a ``with`` or clean up, and all that is called from there: what an exception does on these,
real signals at random times show.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import moe_interp

ROOT = str(Path(moe_interp.__file__).parent)
Line = tuple[str, int]


@cache
def cleaning(file: str) -> frozenset[int]:
    """Lines of the ``finally`` blocks of a file."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    blocks = [node.finalbody for node in ast.walk(tree) if isinstance(node, ast.Try)]
    return frozenset(n for block in blocks for one in block for n in range(one.lineno, one.end_lineno + 1))


@cache
def withs(file: str) -> frozenset[int]:
    """Lines of ``with`` statements of a file."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return frozenset(node.lineno for node in ast.walk(tree) if isinstance(node, ast.With))


def _ours(code: CodeType) -> bool:
    return code.co_filename.startswith(ROOT)


def _cleans(frame: FrameType | None) -> bool:
    while frame is not None:
        if _ours(frame.f_code) and (
            frame.f_lineno in cleaning(frame.f_code.co_filename) or frame.f_code.co_name in ("__exit__", "__del__")
        ):
            return True
        frame = frame.f_back
    return False


class Lines:
    """Counts the package's lines that a job runs, and interrupts it at one of them.

    Attributes:
        seen: the lines, in order.
    """

    def __init__(self, at: int | None = None):
        self.at, self.seen = at, list[Line]()
        self.entered: dict[tuple[int, int], int] = {}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.local if event == "call" and _ours(frame.f_code) else None

    def local(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event != "line" or _cleans(frame):
            return self.local
        file, line = frame.f_code.co_filename, frame.f_lineno
        if line in withs(file):
            key = id(frame), line
            self.entered[key] = self.entered.get(key, 0) + 1
            if self.entered[key] % 2 == 0:  # the line once more, where the block ends
                return self.local
        self.seen.append((file, line))
        if self.at is not None and len(self.seen) == self.at + 1:
            sys.settrace(None)
            raise KeyboardInterrupt(f"{file}:{line}")
        return self.local


def run_under(lines: Lines, job: Callable[[], Any]) -> bool:
    """Whether the job was interrupted."""
    before = sys.gettrace()
    sys.settrace(lines)
    try:
        job()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def numbers(job: Callable[[], Any], which: str) -> Iterator[int]:
    """The numbers of lines to interrupt a job at.

    Args:
        job: what is interrupted.
        which: "all"; "each", every line of the package at its first and its last run; "some", every twelfth line of
            hosts and models at its last run.
    """
    lines = Lines()
    run_under(lines, job)
    first = {line: number for number, line in reversed(list(enumerate(lines.seen)))}
    last = {line: number for number, line in enumerate(lines.seen)}
    ours = [number for line, number in last.items() if "/hosts/" in line[0] or "model.py" in line[0]]
    chosen = {"all": range(len(lines.seen)), "each": {*first.values(), *last.values()}, "some": sorted(ours)[::12]}
    yield from sorted(chosen[which])
