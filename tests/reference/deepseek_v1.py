"""What DeepSeekMoE v1 computes, point by point: the slow reference for blocks with one module for each expert.

Equations 9 to 11 of arXiv 2401.06066: h = x + Σ over shared experts FFN_i(x) + Σ over routed experts g_i FFN_i(x),
where g_i is the softmax score of expert i if it is among the K largest, else 0.

1. The model's own attention, norms and embedding are used, each layer's attention with the mask and positions that an
   ordinary forward gives it. Dense MLPs, router, experts and shared experts are written out here from their parameters,
   one token and one slot at a time.
2. Each value passes through the tape of tests/reference/model.py, which applies its edit and keeps the very tensor that
   the rest is computed from. So the routed experts have gradients here, also where the model runs them without.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.model import (
    Edit,
    Key,
    Reference,
    Routed,
    _attention_arguments,
    _each_token,
    _linear,
    _silu,
    _softmax,
    _Tape,
)

Point = Callable[[str, Tensor], Tensor]
Block = Callable[[Any, Any, Tensor, Point], Tensor]


def forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    edits: dict[Key, Edit] | None = None,
) -> Reference:
    """Run a model of tests/deepseek_v1.py on `input_ids` [B, S], with `edits` applied where each point is computed.

    An edit of `router_logits` re-routes; one of `expert_ids` runs other experts, each slot's weight kept.
    Raises ValueError for an edit of a point that the model does not have, or that changes a shape or dtype.
    """
    return walk(model, input_ids, attention_mask, edits, _moe)


def walk(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, edits: dict[Key, Edit] | None, moe: Block
) -> Reference:
    """The decoder, layer by layer; `moe(block, config, x, point)` gives what a sparse block returns."""
    tape = _Tape(edits or {})
    attention = _attention_arguments(model, input_ids, attention_mask)
    hidden = tape.point("embed", None, model.model.embed_tokens(input_ids))
    for index, layer in enumerate(model.model.layers):
        point = tape.at(index)
        resid_pre = point("resid_pre", hidden)
        attended = layer.self_attn(hidden_states=layer.input_layernorm(resid_pre), **attention[index])[0]
        resid_mid = point("resid_mid", resid_pre + point("attn_out", attended))
        normed, branch = layer.post_attention_layernorm(resid_mid), getattr(layer, layer.branch)
        if hasattr(branch, "experts"):
            added = moe(branch, model.config, normed, point)
        else:
            added = point("mlp_out", _each_token(lambda x, mlp=branch: swiglu(mlp, x), normed))
        hidden = point("resid_post", resid_mid + added)
    tape.require_all_applied()
    return Reference(model.model.norm(hidden) @ model.lm_head.weight.T, tape.points)


def _moe(block: Any, config: Any, x: Tensor, point: Point) -> Tensor:
    x = point("moe_in", x)
    logits = point("router_logits", _each_token(lambda row: _linear(block.gate, row), x))
    routed = run_experts(block.experts, x, _route(config, logits), point)
    shared = point("shared_out", _each_token(lambda row: _shared(block.shared_experts, config, row), x))
    return point("moe_out", routed + shared)


def _route(config: Any, logits: Tensor) -> Routed:
    """Equation 10: the K largest scores are the weights; they sum to less than one unless `norm_topk_prob`."""

    def weigh(scores: Tensor, ids: Tensor) -> Tensor:
        return scores[ids] / scores[ids].sum() if config.norm_topk_prob else scores[ids]

    scores = _each_token(_softmax, logits)
    ids = torch.topk(scores, config.num_experts_per_tok, dim=-1, sorted=False).indices
    return scores, ids, _each_token(weigh, scores, ids)


def _shared(mlp: Any, config: Any, x: Tensor) -> Tensor:
    """Equation 9's sum over shared experts: the matrices of all of them lie side by side."""
    total = torch.zeros_like(x)
    for i in range(config.n_shared_experts):
        rows = slice(i * config.moe_intermediate_size, (i + 1) * config.moe_intermediate_size)
        neurons = _silu(mlp.gate_proj.weight[rows] @ x) * (mlp.up_proj.weight[rows] @ x)
        total = total + mlp.down_proj.weight[:, rows] @ neurons
    return total


def run_experts(experts: Any, x: Tensor, routing: Routed, point: Point) -> Tensor:
    """The weighted sum over slots [B, S, D] of `routing`: scores, ids and weights."""
    scores, ids, weights = routing
    ids = point("expert_ids", ids)
    weights = point("gate_weights", weights)
    point("router_scores", scores)

    def act_of_token(x: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([neurons(experts[int(e)], x) for e in ids])

    def out_of_token(act: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([matrices(experts[int(e)])[2] @ act[slot] for slot, e in enumerate(ids)])

    def sum_of_token(out: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([weights[slot] * out[slot] for slot in range(len(weights))]).sum(dim=0)

    act = point("expert_act", _each_token(act_of_token, x, ids))
    out = point("expert_out", _each_token(out_of_token, act, ids))
    return point("routed_out", _each_token(sum_of_token, out, weights))


def swiglu(mlp: Any, x: Tensor) -> Tensor:
    """One MLP on one token."""
    return matrices(mlp)[2] @ neurons(mlp, x)


def neurons(mlp: Any, x: Tensor) -> Tensor:
    """One token's input of the down-projection, [F]."""
    gate, up, _ = matrices(mlp)
    return _silu(gate @ x) * (up @ x)


def matrices(mlp: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down projection, by either set of names."""
    names = ("w1", "w3", "w2") if hasattr(mlp, "w1") else ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (getattr(mlp, name).weight for name in names)
    return gate, up, down
