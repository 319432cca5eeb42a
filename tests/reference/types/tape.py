"""The points of one forward pass, each after its edit, and the arithmetic of one token."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Key = tuple[str, int | None]
Edit = Callable[[Tensor], Tensor]
Point = Callable[[str, Tensor], Tensor]


@dataclass
class Tape:
    """The points so far. `state` is what layers leave for later ones beside the residual stream."""

    edits: dict[Key, Edit]
    points: dict[Key, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def point(self, name: str, layer: int | None, value: Tensor) -> Tensor:
        """`value` after its edit: the very tensor that the rest is computed from."""
        if (name, layer) in self.points:
            raise ValueError(f"{name} of layer {layer} is computed twice")
        if (name, layer) in self.edits:
            value = _edited(name, self.edits[name, layer], value)
        if torch.is_grad_enabled() and value.is_floating_point():
            # A tensor of its own: what else is computed from the value, an edit of the point would not reach. A
            # constant put there by an edit still has a gradient.
            value = value.clone() if value.requires_grad else value.detach().requires_grad_()
        self.points[name, layer] = value
        return value

    def at(self, layer: int) -> Point:
        return lambda name, value: self.point(name, layer, value)

    def require_all_applied(self) -> None:
        missing = set(self.edits) - set(self.points)
        if missing:
            raise ValueError(f"edits of points that this model does not have: {sorted(missing, key=str)}")


def _edited(name: str, edit: Edit, value: Tensor) -> Tensor:
    if name == "router_scores":
        raise ValueError("router_scores is read only: edit router_logits or gate_weights")
    result = edit(value.clone())
    if result.shape != value.shape or result.dtype != value.dtype:
        expected, got = ((t.dtype, tuple(t.shape)) for t in (value, result))
        raise ValueError(f"edit of {name}: expected {expected}, got {got}")
    return result


def each_token(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of one token's rows, for every token of tensors [B, S, ...]."""
    batch, positions = tensors[0].shape[:2]
    return torch.stack(
        [torch.stack([function(*(t[b, s] for t in tensors)) for s in range(positions)]) for b in range(batch)]
    )


def linear(module: Any, x: Tensor) -> Tensor:
    """A linear map of one token: x [D] -> [F]."""
    product = module.weight.to(x.dtype) @ x
    bias = getattr(module, "bias", None)
    return product if bias is None else product + bias


def softmax(logits: Tensor) -> Tensor:
    powers = torch.exp(logits - logits.max().detach())
    return powers / powers.sum()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
