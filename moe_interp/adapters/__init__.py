"""WHERE: what each architecture computes, as data and formulas. Knows no host."""

from moe_interp.adapters.families import FAMILIES, Adapter, describe, is_known, register_adapter
from moe_interp.adapters.family import At, Family
from moe_interp.adapters.spec import LayerSpec, ModelSpec, MoESpec, Scoring

__all__ = [
    "FAMILIES",
    "Adapter",
    "At",
    "Family",
    "LayerSpec",
    "MoESpec",
    "ModelSpec",
    "Scoring",
    "describe",
    "is_known",
    "register_adapter",
]
