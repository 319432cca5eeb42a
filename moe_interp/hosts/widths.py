"""Routers whose number of experts is that of the pass under way.

How many experts a router chooses is an attribute of its module, which all threads share. A pass that wants another
number must not write it there: while the model is open, the attribute is computed.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from moe_interp.hosts.taps import Taps

_WHOSE = "_moe_interp_width"


def varying(module: nn.Module, name: str, taps: Taps) -> Callable[[], None]:
    """Let an attribute of a module be the width of its layer in the pass under way; outside of one what it was.

    Returns:
        What makes it an attribute again.
    """
    kind: Any = type(module)
    before = vars(module).get(_WHOSE)
    vars(module)[_WHOSE] = taps
    module.__class__ = ours = _varying(kind, name)

    def undo() -> None:
        if type(module) is not ours:
            return  # somebody made it a class of another kind since, such as a parametrized one; outside of a pass
            # the attribute is what it was
        module.__class__ = kind
        if before is None:
            vars(module).pop(_WHOSE, None)
        else:
            vars(module)[_WHOSE] = before

    return undo


@functools.cache
def _varying(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """A class of the same name of which one attribute is computed."""

    def width(self: Any) -> int:
        flow = vars(self)[_WHOSE].now()
        own: int = vars(self)[name] if name in vars(self) else getattr(kind, name)
        return own if flow is None else flow.call.widths.get(flow.layer.index, own)

    def set_width(self: Any, value: int) -> None:
        vars(self)[name] = value

    shown = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {name: property(width, set_width), **shown})
