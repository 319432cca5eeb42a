"""Read, edit and understand mixture-of-experts models: every expert, gate weight and residual by name.

For example::

    import moe_interp as moe

    model = moe.load()
    run = model.run("The capital of France is", read=["expert_out", "gate_weights"])
    run["expert_out", 5]
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "model": ("MoEModel", "load", "wrap"),
    "run": ("Routing", "Run", "select"),
    "points": ("POINTS",),
    "interventions": ("Intervention", "ablate", "apply", "from_json", "scale", "to_json", "top_k"),
    "data": ("Corpus", "read_corpus", "sample"),
    "analyses.routing": ("routing",),
    "analyses.routing_map": ("routing_map",),
    "analyses.recorded": ("routing_from_counts",),
    "analyses.lens": ("expert_lens",),
    "analyses.attribution": ("logit_attribution",),
    "analyses.similarity": ("ensemble_similarity",),
    "analyses.perplexity": ("perplexity",),
    "views.report": ("report",),
    "errors": ("MoEError",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from moe_interp.analyses.attribution import logit_attribution
    from moe_interp.analyses.lens import expert_lens
    from moe_interp.analyses.perplexity import perplexity
    from moe_interp.analyses.recorded import routing_from_counts
    from moe_interp.analyses.routing import routing
    from moe_interp.analyses.routing_map import routing_map
    from moe_interp.analyses.similarity import ensemble_similarity
    from moe_interp.data import Corpus, read_corpus, sample
    from moe_interp.errors import MoEError
    from moe_interp.interventions import Intervention, ablate, apply, from_json, scale, to_json, top_k
    from moe_interp.model import MoEModel, load, wrap
    from moe_interp.points import POINTS
    from moe_interp.run import Routing, Run, select
    from moe_interp.views.report import report

__all__ = [
    "POINTS",
    "Corpus",
    "Intervention",
    "MoEError",
    "MoEModel",
    "Routing",
    "Run",
    "ablate",
    "apply",
    "ensemble_similarity",
    "expert_lens",
    "from_json",
    "load",
    "logit_attribution",
    "perplexity",
    "read_corpus",
    "report",
    "routing",
    "routing_from_counts",
    "routing_map",
    "sample",
    "scale",
    "select",
    "to_json",
    "top_k",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``import moe_interp`` is light."""
    if name not in _HOME:
        raise AttributeError(f"module 'moe_interp' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moe_interp.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
