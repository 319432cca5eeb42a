"""A trace of nnsight and runs of the same model beside it, kept apart.

While a trace runs, nnsight hands all that the model's modules do to it, whoever calls them. Here a trace has what is
done in its own thread, and not what a `run` does that begins inside it.
"""

import functools
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from moe_interp.hosts.calls import depth


def keep_apart(interleaver: Any) -> Callable[[], None]:
    """Let an interleaver of nnsight see the passes of its own trace alone.

    Returns:
        What makes it as it was.
    """
    users = vars(interleaver).setdefault("_kept_apart", [])
    if not users:
        kind: Any = type(interleaver)
        _exchange(interleaver, _apart(kind))
    users.append(user := object())

    def undo() -> None:
        if user in users:
            users.remove(user)
            if not users:
                _exchange(interleaver, type(interleaver).__base__)
                del interleaver._kept_apart

    return undo


def _exchange(interleaver: Any, kind: Any) -> None:
    on = interleaver.interleaving
    vars(interleaver).pop("interleaving", None)
    interleaver.__class__ = kind
    interleaver.interleaving = on


@functools.cache
def _apart(kind: type) -> type:
    """A class of interleavers of which ``interleaving`` says whether code that runs here is a part of the trace.

    Blocks of a trace run in greenlets, which begin in an empty context. Here they begin in that of the trace, so that
    edits that stand there act in runs inside a block, too.
    """

    def interleaving(self: Any) -> bool:
        return bool(self._on) and self._whose == (threading.get_ident(), depth())

    def set_interleaving(self: Any, on: bool) -> None:
        self._on, self._whose = on, (threading.get_ident(), depth())

    def enter(self: Any) -> Any:
        waiting = [one for one in self.mediators if one.worker is None]
        for mediator in waiting:
            mediator._run = functools.partial(copy_context().run, mediator._run)
        try:
            return kind.__enter__(self)  # type: ignore[attr-defined]
        finally:
            for mediator in waiting:
                vars(mediator).pop("_run", None)

    methods = {"interleaving": property(interleaving, set_interleaving), "__enter__": enter}
    return type(f"Apart{kind.__name__}", (kind,), methods)
