"""Doge: experts of one neuron each, found by product keys (Large Memory Layers, arXiv 1907.05242; PEER, 2407.04153).

A router gives two rows of n logits for each token, x and y; expert ``i * n + j`` has logit ``x_i + y_j``. That sum is
``router_logits`` here, over all n * n experts, so that an edit re-routes. The model computes the two rows for all
tokens at once and splits them by a view that takes rows of one token for another's; that is what its checkpoints were
trained with, and it is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_interp.adapters.experts import ExpertWeights, OnAct, Tap, chooses, run_experts
from moe_interp.adapters.family import At
from moe_interp.adapters.formats import in_memory
from moe_interp.adapters.spec import BlockCall, Site


class RankOne:
    """Experts of one neuron: ``act(down_embed[e] @ x) * up_embed[e]``."""

    def outputs(self, experts: Any, hidden: Tensor, ids: Tensor, on_act: OnAct | None = None) -> Tensor:
        """Unweighted outputs [T*K, D], slot by slot; neurons are [T*K, 1]."""
        projected = torch.matmul(experts.down_embed(ids), hidden[..., None])
        act = experts.act_fn(projected).reshape(-1, 1)
        act = act if on_act is None else on_act(act)
        return act * experts.up_embed(ids.reshape(-1))

    def weights(self, experts: Any, expert: int) -> ExpertWeights:
        """The two vectors of one expert, as matrices."""
        with in_memory(experts) as brought:
            up = experts.down_embed.weight[expert].detach()[None]
            found = ExpertWeights(None, up, experts.up_embed.weight[expert].detach()[:, None])
            return found.copied() if brought else found


KERNEL = RankOne()


@chooses
def forward(block: Any, tap: Tap, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """``DogeCDMoE.forward``."""
    hidden = hidden_states.reshape(-1, block.hidden_size)
    keys = block.router_gate(hidden).view(2, len(hidden), -1)
    logits = tap("router_logits", (keys[0][:, :, None] + keys[1][:, None, :]).flatten(1))
    scores, ids = tap.choose(logits, block.top_k)
    weights = functional.softmax(scores, dim=-1)
    if block.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    routed = run_experts(tap, KERNEL, block, hidden, ids, weights).view(hidden_states.shape)
    dense = block.down_proj(block.act_fn(block.gate_proj(hidden_states)) * block.up_proj(hidden_states))
    return tap("shared_out", dense) + routed, keys


def sites(layer: At) -> dict[str, Site]:
    """The points that only the block's own call reaches."""
    inside = BlockCall(layer("mlp"), forward)
    return dict.fromkeys(("router_logits", "router_scores", "shared_out"), inside)
