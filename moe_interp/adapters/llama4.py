"""Llama 4: combine weights multiply what an expert is given, not what it returns.

Every expert sees every token, scaled by the sigmoid of its logit, and by zero where it was not chosen. Here only the
chosen experts run, on ``gate_weights`` times the input: an expert without biases gives zero on zero, so the sum is
the same. ``expert_act`` and ``expert_out`` are those of the scaled input, and ``routed_out`` is their plain sum.
"""

from typing import Any

import torch
from torch import Tensor

from moe_interp.adapters.experts import Fused, Tap, chooses, run_experts

KERNEL = Fused(is_transposed=True, act="act_fn")


@chooses
def forward(block: Any, tap: Tap, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """``Llama4TextMoe.forward`` over the chosen experts."""
    hidden = hidden_states.reshape(-1, block.hidden_dim)
    _, logits = block.router(hidden)
    # The model's own order: by logit. A chosen score may round to zero, so the scores do not say who was chosen.
    chosen, ids = tap.choose(logits, block.router.top_k)
    weights = torch.sigmoid(chosen.float()).to(hidden.dtype)
    routed = run_experts(tap, KERNEL, block.experts, hidden, ids, weights, weights_on="input")
    return block.shared_expert(hidden) + routed, logits
