"""Read, edit and understand mixture-of-experts models: every expert, gate weight and residual by name.

    import moe_interp as moe

    model = moe.load()
    run = model.run("The capital of France is", read=["expert_out", "gate_weights"])
    run["expert_out", 5]
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "MoEModel": "model",
    "load": "model",
    "wrap": "model",
    "Run": "run",
    "Routing": "run",
    "select": "run",
    "POINTS": "points",
    "Intervention": "interventions",
    "ablate": "interventions",
    "scale": "interventions",
    "top_k": "interventions",
    "apply": "interventions",
    "to_json": "interventions",
    "from_json": "interventions",
    "MoEError": "errors",
}
__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from moe_interp.errors import MoEError
    from moe_interp.interventions import Intervention, ablate, apply, from_json, scale, to_json, top_k
    from moe_interp.model import MoEModel, load, wrap
    from moe_interp.points import POINTS
    from moe_interp.run import Routing, Run, select


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``import moe_interp`` is light."""
    if name not in _HOME:
        raise AttributeError(f"module 'moe_interp' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moe_interp.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
