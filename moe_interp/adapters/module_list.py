"""Experts in a ModuleList, one MLP each, as checkpoints before transformers 5 and much remote code have them.

The gate is a linear map to logits, or returns ``(ids, weights, ...)`` itself as DeepSeekMoE's does (arXiv 2401.06066).
"""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from moe_interp.adapters.experts import Separate, Tap, run_experts

KERNEL = Separate(up="up_proj", down="down_proj", gate="gate_proj")


def forward_deepseek(block: Any, tap: Tap, hidden_states: Tensor) -> Tensor:
    """A block whose gate returns ``(ids, weights, auxiliary loss)``, with shared experts if it has any."""
    ids, weights, _ = block.gate(hidden_states)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    slots = (len(hidden), -1)
    routed = run_experts(tap, KERNEL, block.experts, hidden, ids.view(slots), weights.view(slots))
    out = routed.view(hidden_states.shape)
    return out + block.shared_experts(hidden_states) if getattr(block, "shared_experts", None) is not None else out


def linear_gate(
    kernel: Separate,
    order: Literal["softmax, top-k", "top-k, softmax"] = "softmax, top-k",
    renormalise: bool = True,
    top_k: str = "top_k",
    returns_logits: bool = True,
) -> Callable[..., Any]:
    """The forward of a block whose gate is a linear map.

    Args:
        kernel: what its experts compute.
        order: softmax over all experts and the k largest, or the k largest and softmax over them.
        renormalise: whether the k weights are scaled to sum to 1 (they do anyway in the second order).
        top_k: attribute of the block that says k.
        returns_logits: whether the block returns ``(out, logits)``, as Mixtral's did before transformers 5.
    """

    def forward(block: Any, tap: Tap, hidden_states: Tensor) -> Any:
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = block.gate(hidden)
        scores = logits.float().softmax(dim=-1) if order == "softmax, top-k" else logits.float()
        values, ids = scores.topk(getattr(block, top_k), dim=-1)
        weights = values if order == "softmax, top-k" else functional.softmax(values, dim=-1)
        if renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = run_experts(tap, kernel, block.experts, hidden, ids, weights.to(hidden.dtype)).view(hidden_states.shape)
        return (out, logits) if returns_logits else out

    return forward
