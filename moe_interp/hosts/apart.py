"""A trace of nnsight and runs of the same model beside it, kept apart.

While a trace runs, nnsight hands all that the model's modules do to it, whoever calls them. Here a trace has what is
done in its own thread, and not what a `run` does that begins inside it.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

from moe_interp.hosts.calls import depth


def keep_apart(interleaver: Any) -> Callable[[], None]:
    """Let an interleaver of nnsight see the passes of its own trace alone.

    Returns:
        What makes it as it was.
    """
    kind: Any = type(interleaver)
    if kind.__name__.startswith("Apart"):
        return lambda: None
    on = vars(interleaver).pop("interleaving")
    interleaver.__class__ = _apart(kind)
    interleaver.interleaving = on

    def undo() -> None:
        on = interleaver.interleaving
        interleaver.__class__ = kind
        interleaver.interleaving = on

    return undo


@functools.cache
def _apart(kind: type) -> type:
    """A class of interleavers of which ``interleaving`` says whether code that runs here is a part of the trace."""

    def interleaving(self: Any) -> bool:
        return bool(self._on) and self._whose == (threading.get_ident(), depth())

    def set_interleaving(self: Any, on: bool) -> None:
        self._on, self._whose = on, (threading.get_ident(), depth())

    return type(f"Apart{kind.__name__}", (kind,), {"interleaving": property(interleaving, set_interleaving)})
