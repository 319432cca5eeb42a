"""JetMoE: experts called on rows sorted by expert, and a bias added to the sum.

The router returns the sorted order; here it is undone, so that slots are in the order of the router's top-k. The
mixture of attention heads in JetMoE's attention is left alone.
"""

from typing import Any

import torch
from torch import Tensor

from moe_interp.adapters.experts import Fused, Tap, run_experts

KERNEL = Fused(
    first="input_linear.weight", down="output_linear.weight", act="activation", count="input_linear.num_experts"
)


def forward(block: Any, tap: Tap, layer_input: Tensor) -> Tensor:
    """``JetMoeMoE.forward``."""
    hidden = layer_input.reshape(-1, block.input_size)
    order, _, sorted_weights, sizes, _ = block.router(hidden)
    sorted_ids = torch.repeat_interleave(torch.tensor(sizes, device=order.device))
    ids, weights = torch.empty_like(order), torch.empty_like(sorted_weights)
    ids[order] = sorted_ids
    weights = weights.index_copy(0, order, sorted_weights)
    slots = (len(hidden), -1)
    routed = run_experts(tap, KERNEL, block, hidden, ids.view(slots), weights.view(slots))
    return routed.view(layer_input.shape) + block.bias
