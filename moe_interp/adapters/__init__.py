"""WHERE: what each architecture computes, as data and formulas. Knows no host."""

from moe_interp.adapters.experts import ExpertWeights, Fused, Kernel, Separate
from moe_interp.adapters.families import FAMILIES, Adapter, describe, is_known, register_adapter
from moe_interp.adapters.family import At, Family
from moe_interp.adapters.module_list import linear_gate
from moe_interp.adapters.spec import LayerSpec, ModelSpec, MoESpec, Scoring

__all__ = [
    "FAMILIES",
    "Adapter",
    "At",
    "ExpertWeights",
    "Family",
    "Fused",
    "Kernel",
    "LayerSpec",
    "MoESpec",
    "ModelSpec",
    "Scoring",
    "Separate",
    "describe",
    "is_known",
    "linear_gate",
    "register_adapter",
]
