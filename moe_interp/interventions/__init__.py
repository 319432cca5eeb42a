"""WHAT CHANGES: composable edits of points, as plain data."""

from moe_interp.interventions.base import Change, Edit, Intervention
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
from moe_interp.interventions.stored import from_json, to_json
from moe_interp.interventions.together import check_together

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
