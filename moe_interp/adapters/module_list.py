"""Experts in a ModuleList, one MLP each, as checkpoints before transformers 5 and much remote code have them.

The gate is a linear map to logits, or returns ``(ids, weights, ...)`` itself as DeepSeekMoE's does (arXiv 2401.06066).
Outputs are added up one expert after another, as these blocks do.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_interp.adapters.checks import check_types
from moe_interp.adapters.experts import Separate, Tap, run_experts
from moe_interp.adapters.reading import attribute

# The published eval path sorts with `argsort()`, which leaves the order within an expert open.
KERNEL = Separate(up="up_proj", down="down_proj", gate="gate_proj", stable=False)


class _WithLoss(torch.autograd.Function):
    """The value as it is; going backward, a gradient of one for the loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones_like(ctx.loss)


def forward_deepseek(block: Any, tap: Tap, hidden_states: Tensor) -> Tensor:
    """A block whose gate returns ``(ids, weights, balance loss)``, with shared experts if it has any.

    In eval mode too, gradients reach the routed experts, which the published code runs without. In training mode the
    balance loss gets its gradient, as there.
    """
    ids, weights, loss = block.gate(hidden_states)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    slots = (len(hidden), -1)
    in_turn = not block.training  # training sums over slots
    out = run_experts(tap, KERNEL, block.experts, hidden, ids.view(slots), weights.view(slots), in_turn=in_turn)
    out = out.view(hidden_states.shape)
    if block.training and isinstance(loss, Tensor) and loss.requires_grad:
        out = _WithLoss.apply(out, loss)
    return out + block.shared_experts(hidden_states) if getattr(block, "shared_experts", None) is not None else out


@dataclass(frozen=True)
class LinearGate:
    """What `linear_gate` makes. A `Family` tells it where, in the block, ``router`` and ``experts`` are."""

    kernel: Separate
    order: Literal["softmax, top-k", "top-k, softmax"]
    renormalise: bool | str
    top_k: str
    shared: tuple[str, str | None] | None
    returns: Literal["out, logits", "out"]
    router: str = "gate"
    experts: str = "experts"
    chooses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)

    def __call__(self, block: Any, tap: Tap, hidden_states: Tensor) -> Any:
        """The block's output [..., D], with the logits [T, E] where the block returns them too."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = block.get_submodule(self.router)(hidden)
        ids, weights = self._choice(block, tap, logits)
        experts = block.get_submodule(self.experts)
        out = run_experts(tap, self.kernel, experts, hidden, ids, weights.to(hidden.dtype), in_turn=True)
        if self.shared is not None:
            out = out + _shared(block, hidden, *self.shared)
        out = out.view(hidden_states.shape)
        return (out, logits) if self.returns == "out, logits" else out

    def _choice(self, block: Any, tap: Tap, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights [T, K]."""
        first = self.order == "softmax, top-k"
        scores = logits.softmax(dim=-1, dtype=torch.float32) if first else logits
        weights, ids = tap.choose(scores, attribute(block, self.top_k))
        if not first:
            return ids, weights.softmax(dim=-1, dtype=torch.float32)
        scaled = attribute(block, self.renormalise) if isinstance(self.renormalise, str) else self.renormalise
        return ids, weights / weights.sum(dim=-1, keepdim=True) if scaled else weights


def linear_gate(
    kernel: Separate,
    order: Literal["softmax, top-k", "top-k, softmax"] = "softmax, top-k",
    renormalise: bool | str = True,
    *,
    top_k: str = "top_k",
    shared: tuple[str, str | None] | None = None,
    returns: Literal["out, logits", "out"] = "out, logits",
) -> LinearGate:
    """The forward of a block whose router is a linear map, to be the ``call`` of a `Family`, whose names it uses.

    Args:
        kernel: where an expert keeps its linear maps.
        order: softmax over all experts and the k largest, or the k largest and softmax over them; in float32.
        renormalise: whether the k weights of the first order are scaled to sum to 1, as those of the second do; or
            the attribute of the block that says so.
        top_k: attribute of the block that says k.
        shared: names of the shared expert and of its gate, a linear map whose sigmoid scales it (None: no gate).
        returns: what the block returns: its output with the router's logits, as Mixtral's did before transformers 5,
            or its output alone.

    Raises:
        BadInput: an argument of another kind.
    """
    return LinearGate(kernel, order, renormalise, top_k, shared, returns)


def _shared(block: nn.Module, hidden: Tensor, expert: str, gate: str | None) -> Tensor:
    # The expert first: its point shows the product, which is formed when the gate returns.
    out = block.get_submodule(expert)(hidden)
    return out if gate is None else functional.sigmoid(block.get_submodule(gate)(hidden)) * out
