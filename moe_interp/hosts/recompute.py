"""Layers that are computed anew in a backward pass, with the edits that they were computed with.

Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) runs a layer a second time when gradients need it: after
the call that it belongs to, and on accelerators in a thread of autograd's own. It gets the context of the first time.
"""

import functools
from collections.abc import Callable
from contextvars import copy_context
from typing import Any


def remembering(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointing function, ``checkpoint(function, *args)``, that runs ``function`` in the context of its call."""

    @functools.wraps(checkpoint)
    def remembered(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        here = copy_context()

        def anew(*given: Any, **more: Any) -> Any:
            return here.copy().run(function, *given, **more)

        return checkpoint(anew, *args, **kwargs)

    remembered.remembers = True  # type: ignore[attr-defined]
    return remembered
