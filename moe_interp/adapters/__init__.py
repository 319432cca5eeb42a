"""WHERE: what each architecture computes, as data. Knows no host."""

from moe_interp.adapters.families import FAMILIES, Family, describe
from moe_interp.adapters.spec import LayerSpec, ModelSpec, MoESpec

__all__ = ["FAMILIES", "Family", "LayerSpec", "MoESpec", "ModelSpec", "describe"]
