"""WHAT CHANGES: composable edits of points, as plain data."""

from moe_interp.interventions.base import Change, Edit, Intervention, from_json, to_json
from moe_interp.interventions.named import Apply, Scale, TopK, ablate, apply, scale, top_k

__all__ = [
    "Apply",
    "Change",
    "Edit",
    "Intervention",
    "Scale",
    "TopK",
    "ablate",
    "apply",
    "from_json",
    "scale",
    "to_json",
    "top_k",
]
