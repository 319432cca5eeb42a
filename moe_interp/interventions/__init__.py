"""WHAT CHANGES: composable edits of points, as plain data."""

from moe_interp.interventions.base import Change, Edit, Intervention, check_together, from_json, to_json
from moe_interp.interventions.named import (
    ablate,
    apply,
    bias,
    force,
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
    top_k,
)

__all__ = [
    "Change",
    "Edit",
    "Intervention",
    "ablate",
    "apply",
    "bias",
    "check_together",
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
]
