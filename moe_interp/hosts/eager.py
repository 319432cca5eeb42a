"""Eager execution of a part of the process's work, whatever was compiled.

Compiled code does not ask whether hooks came or went: it would run on without them. torch has one switch for the whole
process (its *stance*), which several threads may want at a time: it is turned by the first and turned back by the last.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch


class _Running:
    """A call that must run eagerly."""

    __slots__ = ("__weakref__",)


_LOCK = threading.RLock()
_RUNNING: "weakref.WeakSet[_Running]" = weakref.WeakSet()
_TURNED: list[Any] = []  # what turns the stance back, while it is turned


def eagerly(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with nothing in it compiled."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        running = _Running()
        try:
            _turn(running)
            return forward(*args, **kwargs)
        finally:
            _turn_back(running)

    return torch.compiler.disable(run, reason="opened by moe_interp: points need eager execution")


def _turn(running: _Running) -> None:
    with _LOCK:
        _RUNNING.add(running)
        if not _TURNED:
            _TURNED.append(torch.compiler.set_stance("force_eager"))


def _turn_back(running: _Running) -> None:
    with _LOCK:
        _RUNNING.discard(running)
        # Counted by hand: a weak set keeps the reference of a call that died while a signal came.
        if _TURNED and not any(True for _ in _RUNNING):
            _TURNED.pop().__exit__(None, None, None)
