"""Edits of points that matter, and at which layers to make them."""

from collections.abc import Iterable

from torch import Tensor


def change(point: str, value: Tensor) -> Tensor:
    """A change of a point that matters: another expert in slot 0, or values of some tokens grown and shifted."""
    out = value.clone()
    if point == "expert_ids":
        out[..., 0] = (out[..., 0] + 1) % 8
    elif point == "gate_weights":
        out[..., 0] = out[..., 0] * 0.5 + 0.2
    else:
        out[..., ::2] = out[..., ::2] * 1.5 + 0.3
    return out


def one_of_each_point(keys: Iterable[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
    """For each point, the middle one of the layers that have it."""
    layers: dict[str, list] = {}
    for point, layer in keys:
        layers.setdefault(point, []).append(layer)
    return [(point, having[len(having) // 2]) for point, having in layers.items()]
