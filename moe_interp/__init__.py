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
    "model": ("MoEModel",),
    "opening": ("wrap",),
    "hosts.hooked": ("trace_points",),
    "bridge": ("attach",),
    "checkpoint": ("load",),
    "adapters": ("Family", "register_adapter"),
    "run": ("Routing", "Run", "select"),
    "points": ("POINTS",),
    "interventions.values": ("ByToken",),
    "interventions": (
        "Intervention",
        "ablate",
        "apply",
        "bias",
        "force",
        "from_json",
        "mask",
        "noise",
        "patch",
        "patch_route",
        "randomize",
        "replace",
        "scale",
        "share",
        "steer",
        "swap",
        "to_json",
        "top_k",
    ),
    "data": ("Corpus",),
    "files": ("read_corpus", "sample"),
    "analyses.routing": ("routing",),
    "analyses.routing_map": ("routing_map",),
    "analyses.recorded": ("routing_from_counts",),
    "analyses.collect": ("collect",),
    "analyses.labels": ("routing_by_label", "spans"),
    "analyses.coactivation": ("coactivation",),
    "analyses.transitions": ("transitions",),
    "analyses.vocabulary": ("vocabulary_specialization",),
    "analyses.token_identity": ("token_identity",),
    "analyses.profiles": ("expert_profiles",),
    "analyses.means": ("mean_contributions",),
    "analyses.norms": ("norm_and_weight",),
    "analyses.redundancy": ("expert_similarity",),
    "analyses.shared_experts": ("shared_experts",),
    "analyses.super_experts": ("super_experts",),
    "analyses.neurons": ("neuron_lens",),
    "analyses.saturation": ("reference_saturation", "router_saturation"),
    "analyses.training": ("RoutingCallback", "RoutingWatch", "routing_health", "to_tensorboard"),
    "views.profile": ("profile", "profile_page"),
    "analyses.lens": ("expert_lens",),
    "analyses.attribution": ("logit_attribution",),
    "analyses.expert_stacks": (
        "decompose_resid",
        "get_act_patch_expert_out",
        "logit_attrs",
        "logit_directions",
        "stack_expert_results",
    ),
    "analyses.similarity": ("ensemble_similarity",),
    "analyses.perplexity": ("perplexity",),
    "views.report": ("report",),
    "analyses.tuned_lens": ("TunedLens", "tuned_lens", "tuned_lens_quality"),
    "analyses.tuned_training": ("train_tuned_lens",),
    "analyses.patching": ("activation_patching",),
    "analyses.path_patching": ("path_patching",),
    "analyses.tracing": ("causal_trace",),
    "analyses.coalitions": ("coalitions",),
    "analyses.attribution_patching": ("attribution_patching",),
    "analyses.score_audit": ("score_audit",),
    "analyses.effects": ("expert_effects",),
    "analyses.metrics": ("KL", "NLL", "LogProbability", "LogitDifference", "Probability"),
    "errors": ("EditsElsewhere", "MoEError"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from moe_interp.adapters import Family, register_adapter
    from moe_interp.analyses.attribution import logit_attribution
    from moe_interp.analyses.attribution_patching import attribution_patching
    from moe_interp.analyses.coactivation import coactivation
    from moe_interp.analyses.coalitions import coalitions
    from moe_interp.analyses.collect import collect
    from moe_interp.analyses.effects import expert_effects
    from moe_interp.analyses.expert_stacks import (
        decompose_resid,
        get_act_patch_expert_out,
        logit_attrs,
        logit_directions,
        stack_expert_results,
    )
    from moe_interp.analyses.labels import routing_by_label, spans
    from moe_interp.analyses.lens import expert_lens
    from moe_interp.analyses.means import mean_contributions
    from moe_interp.analyses.metrics import KL, NLL, LogitDifference, LogProbability, Probability
    from moe_interp.analyses.neurons import neuron_lens
    from moe_interp.analyses.norms import norm_and_weight
    from moe_interp.analyses.patching import activation_patching
    from moe_interp.analyses.path_patching import path_patching
    from moe_interp.analyses.perplexity import perplexity
    from moe_interp.analyses.profiles import expert_profiles
    from moe_interp.analyses.recorded import routing_from_counts
    from moe_interp.analyses.redundancy import expert_similarity
    from moe_interp.analyses.routing import routing
    from moe_interp.analyses.routing_map import routing_map
    from moe_interp.analyses.saturation import reference_saturation, router_saturation
    from moe_interp.analyses.score_audit import score_audit
    from moe_interp.analyses.shared_experts import shared_experts
    from moe_interp.analyses.similarity import ensemble_similarity
    from moe_interp.analyses.super_experts import super_experts
    from moe_interp.analyses.token_identity import token_identity
    from moe_interp.analyses.tracing import causal_trace
    from moe_interp.analyses.training import RoutingCallback, RoutingWatch, routing_health, to_tensorboard
    from moe_interp.analyses.transitions import transitions
    from moe_interp.analyses.tuned_lens import TunedLens, tuned_lens, tuned_lens_quality
    from moe_interp.analyses.tuned_training import train_tuned_lens
    from moe_interp.analyses.vocabulary import vocabulary_specialization
    from moe_interp.bridge import attach
    from moe_interp.checkpoint import load
    from moe_interp.data import Corpus
    from moe_interp.errors import EditsElsewhere, MoEError
    from moe_interp.files import read_corpus, sample
    from moe_interp.hosts.hooked import trace_points
    from moe_interp.interventions import (
        Intervention,
        ablate,
        apply,
        bias,
        force,
        from_json,
        mask,
        noise,
        patch,
        patch_route,
        randomize,
        replace,
        scale,
        share,
        steer,
        swap,
        to_json,
        top_k,
    )
    from moe_interp.interventions.values import ByToken
    from moe_interp.model import MoEModel
    from moe_interp.opening import wrap
    from moe_interp.points import POINTS
    from moe_interp.run import Routing, Run, select
    from moe_interp.views.profile import profile, profile_page
    from moe_interp.views.report import report

__all__ = [
    "KL",
    "NLL",
    "POINTS",
    "ByToken",
    "Corpus",
    "EditsElsewhere",
    "Family",
    "Intervention",
    "LogProbability",
    "LogitDifference",
    "MoEError",
    "MoEModel",
    "Probability",
    "Routing",
    "RoutingCallback",
    "RoutingWatch",
    "Run",
    "TunedLens",
    "ablate",
    "activation_patching",
    "apply",
    "attach",
    "attribution_patching",
    "bias",
    "causal_trace",
    "coactivation",
    "coalitions",
    "collect",
    "decompose_resid",
    "ensemble_similarity",
    "expert_effects",
    "expert_lens",
    "expert_profiles",
    "expert_similarity",
    "force",
    "from_json",
    "get_act_patch_expert_out",
    "load",
    "logit_attribution",
    "logit_attrs",
    "logit_directions",
    "mask",
    "mean_contributions",
    "neuron_lens",
    "noise",
    "norm_and_weight",
    "patch",
    "patch_route",
    "path_patching",
    "perplexity",
    "profile",
    "profile_page",
    "randomize",
    "read_corpus",
    "reference_saturation",
    "register_adapter",
    "replace",
    "report",
    "router_saturation",
    "routing",
    "routing_by_label",
    "routing_from_counts",
    "routing_health",
    "routing_map",
    "sample",
    "scale",
    "score_audit",
    "select",
    "share",
    "shared_experts",
    "spans",
    "stack_expert_results",
    "steer",
    "super_experts",
    "swap",
    "to_json",
    "to_tensorboard",
    "token_identity",
    "top_k",
    "trace_points",
    "train_tuned_lens",
    "transitions",
    "tuned_lens",
    "tuned_lens_quality",
    "vocabulary_specialization",
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
