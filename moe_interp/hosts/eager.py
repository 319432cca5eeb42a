"""Eager execution of a part of the process's work, whatever was compiled.

Compiled code does not ask whether hooks came or went: it would run on without them. torch has one switch for the whole
process (its *stance*), which several threads may want at a time. The first call turns it. It is turned back when no
call is left, also if an interrupt comes while a call ends: then the end is made up for when the call's frame is gone.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import eval_frame

_LOCK = threading.RLock()
_RUNNING: "weakref.WeakSet[_Running]" = weakref.WeakSet()
_BEFORE: list[Any] = []  # the stance to turn back to, while it is turned


class _Running:
    """A call that must run eagerly."""

    def __init__(self) -> None:
        self.over = False

    def end(self) -> None:
        """Turn the stance back, if no other call is left."""
        self.over = True
        _turn_back()

    def __del__(self) -> None:
        self.end()


def eagerly(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that runs ``forward`` with nothing in it compiled."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        running = _Running()
        try:
            _turn(running)
            return forward(*args, **kwargs)
        finally:
            running.end()

    return torch.compiler.disable(run, reason="opened by moe_interp: points need eager execution")


def _turn(running: _Running) -> None:
    with _LOCK:
        _RUNNING.add(running)
        if not _BEFORE:
            # Read first: an interrupt inside torch's own setter would lose what it returns.
            _BEFORE.append(eval_frame._stance)
            torch.compiler.set_stance("force_eager")


def _turn_back() -> None:
    """Turn the stance back where no call is left; again, if it was interrupted."""
    with _LOCK:
        # The set itself may hold references to calls that are gone, if their removal was interrupted.
        if _BEFORE and all(running.over for running in _RUNNING):
            (before,) = _BEFORE
            torch.compiler.set_stance(
                before.stance, skip_guard_eval_unsafe=before.skip_guard_eval_unsafe, force_backend=before.backend
            )
            _BEFORE.clear()
