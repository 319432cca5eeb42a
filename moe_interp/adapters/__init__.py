"""WHERE: what each architecture computes, as data and formulas. Knows no host."""

from moe_interp.adapters.experts import ExpertWeights, Fused, Kernel, Separate, chooses, run_experts
from moe_interp.adapters.families import FAMILIES, Adapter, describe, is_known, register_adapter
from moe_interp.adapters.family import EXPERTS_POINTS, At, Family
from moe_interp.adapters.module_list import linear_gate
from moe_interp.adapters.spec import (
    ExpertsCall,
    Input,
    LayerSpec,
    ModelSpec,
    MoESpec,
    Output,
    RouterOutput,
    Scoring,
    Site,
)

__all__ = [
    "EXPERTS_POINTS",
    "FAMILIES",
    "Adapter",
    "At",
    "ExpertWeights",
    "ExpertsCall",
    "Family",
    "Fused",
    "Input",
    "Kernel",
    "LayerSpec",
    "MoESpec",
    "ModelSpec",
    "Output",
    "RouterOutput",
    "Scoring",
    "Separate",
    "Site",
    "chooses",
    "describe",
    "is_known",
    "linear_gate",
    "register_adapter",
    "run_experts",
]
