"""What a mixture-of-experts model computes, point by point: the slow reference for seven families.

1. One ordinary forward of the model yields the keyword arguments of each layer's attention (mask, rotary
   tables, position ids). They depend on the inputs only, so padding and sliding windows are the model's own.
2. The decoder stack is then walked layer by layer. Embedding, attention and norms are the model's modules;
   the dense MLP, the router, the experts and the shared experts are written out here from their parameters,
   one token and one slot at a time, sharing no code with the package or with transformers' MoE blocks.
3. Each value passes through `_Tape`, which applies its edit and keeps the very tensor that the rest is
   computed from: `torch.autograd.grad(loss, points[...])` is the gradient at that point. Two are beside the
   path: `expert_ids` (integers), and `router_scores` of deepseek_v3 and gpt_oss (no weight is made of them).

Give it the plain model: hooks on its attention, norms or embedding fire here too.

Families, as transformers computes them: mixtral (arXiv 2401.04088, section 2.1), olmoe (2409.02060),
qwen2_moe, qwen3_moe, deepseek_v2 (2405.04434, section 2.2), deepseek_v3 (2412.19437, section 2.1.2),
gpt_oss (2508.10925).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Key = tuple[str, int | None]
Edit = Callable[[Tensor], Tensor]
Routed = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Reference:
    """logits [B, S, V], and every point [B, S, ...] by (name, layer); the layer of `embed` is None."""

    logits: Tensor
    points: dict[Key, Tensor]


def forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    edits: dict[Key, Edit] | None = None,
) -> Reference:
    """Run `model` on `input_ids` [B, S], with `edits` applied where each point is computed.

    An edit of `router_logits` re-routes; one of `expert_ids` runs other experts, each slot's weight kept; one of
    `selection`, what the router takes the largest of, changes the choice and no score that weights come from.
    Raises ValueError for an edit of a point that the model does not have, or that changes a shape or dtype.
    """
    tape = _Tape(edits or {})
    attention = _attention_arguments(model, input_ids, attention_mask)
    body: Any = model.model
    hidden = tape.point("embed", None, body.embed_tokens(input_ids))
    for index, layer in enumerate(body.layers):
        hidden = _layer(layer, model.config, attention[index], hidden, tape.at(index))
    tape.require_all_applied()
    head: Any = model.lm_head
    return Reference(body.norm(hidden) @ head.weight.T, tape.points)


class _Tape:
    """The points so far, each after its edit."""

    def __init__(self, edits: dict[Key, Edit]) -> None:
        self.edits = edits
        self.points: dict[Key, Tensor] = {}

    def point(self, name: str, layer: int | None, value: Tensor) -> Tensor:
        if (name, layer) in self.edits:
            value = _edited(name, self.edits[name, layer], value)
        elif name == "selection":
            return value
        if torch.is_grad_enabled() and value.is_floating_point() and not value.requires_grad:
            value = value.detach().requires_grad_()  # a constant put there by an edit still has a gradient
        self.points[name, layer] = value
        return value

    def at(self, layer: int) -> Callable[[str, Tensor], Tensor]:
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


def _attention_arguments(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None
) -> list[dict[str, Any]]:
    """What each layer's attention is called with, but for the hidden states."""
    body: Any = model.model
    captured: list[dict[str, Any]] = []

    def keep(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        captured.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

    handles = [layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True) for layer in body.layers]
    try:
        with torch.no_grad():
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return captured


def _layer(
    layer: Any, config: Any, attention: dict[str, Any], hidden: Tensor, point: Callable[[str, Tensor], Tensor]
) -> Tensor:
    resid_pre = point("resid_pre", hidden)
    attended = layer.self_attn(hidden_states=layer.input_layernorm(resid_pre), **attention)[0]
    attn_out = point("attn_out", attended)
    resid_mid = point("resid_mid", resid_pre + attn_out)
    normed = layer.post_attention_layernorm(resid_mid)
    if hasattr(layer.mlp, "experts"):
        branch = _moe(layer.mlp, config, normed, point)
    else:
        branch = point("mlp_out", _each_token(lambda x: _gated_mlp(layer.mlp, x), normed))
    return point("resid_post", resid_mid + branch)


def _moe(block: Any, config: Any, x: Tensor, point: Callable[[str, Tensor], Tensor]) -> Tensor:
    family, experts = config.model_type, block.experts
    router = block.router if family == "gpt_oss" else block.gate
    neurons, written = (_neurons_gpt_oss, _written_gpt_oss) if family == "gpt_oss" else (_neurons, _written)

    x = point("moe_in", x)
    logits = point("router_logits", _each_token(lambda x: _linear(router, x), x))
    scores, ids, weights = _ROUTES[family](config, router, logits, lambda selection: point("selection", selection))
    ids = point("expert_ids", ids)
    weights = point("gate_weights", weights)
    point("router_scores", scores)

    def act_of_token(x: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([neurons(experts, config, int(e), x) for e in ids])

    def out_of_token(act: Tensor, ids: Tensor) -> Tensor:
        return torch.stack([written(experts, int(e), act[slot]) for slot, e in enumerate(ids)])

    def sum_of_token(out: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([weights[slot] * out[slot] for slot in range(len(weights))]).sum(dim=0)

    act = point("expert_act", _each_token(act_of_token, x, ids))
    out = point("expert_out", _each_token(out_of_token, act, ids))
    moe_out = point("routed_out", _each_token(sum_of_token, out, weights))
    if family in _SHARED:
        shared_out = point("shared_out", _each_token(lambda x: _SHARED[family](block, x), x))
        moe_out = moe_out + shared_out
    return point("moe_out", moe_out)


def _each_token(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of one token's rows, for every token of tensors [B, S, ...]."""
    batch, positions = tensors[0].shape[:2]
    return torch.stack(
        [torch.stack([function(*(t[b, s] for t in tensors)) for s in range(positions)]) for b in range(batch)]
    )


# Routing: logits [B, S, E] -> scores that sum to one [B, S, E], expert ids and combine weights [B, S, K].
# torch.topk is called as each model calls it: it decides the order of the slots.


def _route_softmax(config: Any, _router: Any, logits: Tensor, prefer: Edit) -> Routed:
    """mixtral, olmoe, qwen2_moe, qwen3_moe: weights are the scores of the chosen."""
    renormalise = config.model_type == "mixtral" or config.norm_topk_prob

    def weigh(scores: Tensor, ids: Tensor) -> Tensor:
        chosen = scores[ids]
        return chosen / chosen.sum() if renormalise else chosen

    scores = _each_token(_softmax, logits)
    ids = torch.topk(prefer(scores), config.num_experts_per_tok, dim=-1).indices
    return scores, ids, _each_token(weigh, scores, ids)


def _route_deepseek_v2(config: Any, _router: Any, logits: Tensor, prefer: Edit) -> Routed:
    """Scores outside the best groups count as zero. transformers ignores norm_topk_prob here."""

    def limit(scores: Tensor) -> Tensor:
        if config.topk_method == "greedy":
            return scores
        groups = scores.reshape(config.n_group, -1)
        allowed = _best_groups(groups.max(dim=-1).values, config.topk_group)
        return torch.cat([group if g in allowed else 0.0 * group for g, group in enumerate(groups)])

    scores = _each_token(_softmax, logits)
    selection = _each_token(limit, scores)
    ids = torch.topk(prefer(selection), config.num_experts_per_tok, dim=-1, sorted=False).indices
    weights = _each_token(lambda s, i: config.routed_scaling_factor * s[i], selection, ids)
    return scores, ids, weights


def _route_deepseek_v3(config: Any, router: Any, logits: Tensor, prefer: Edit) -> Routed:
    """A bias and groups decide the choice; the weights come from the unbiased sigmoids."""

    def rank(sigmoids: Tensor) -> Tensor:
        groups = (sigmoids + router.e_score_correction_bias).reshape(config.n_group, -1)
        best_two = torch.stack([group.sort(descending=True).values[:2].sum() for group in groups])
        allowed = _best_groups(best_two, config.topk_group)
        return torch.cat([group if g in allowed else group - torch.inf for g, group in enumerate(groups)])

    def weigh(sigmoids: Tensor, ids: Tensor) -> Tensor:
        chosen = sigmoids[ids]
        total = chosen.sum() + 1e-20 if config.norm_topk_prob else 1.0
        return config.routed_scaling_factor * chosen / total

    sigmoids = _each_token(torch.sigmoid, logits)
    selection = _each_token(rank, sigmoids)
    ids = torch.topk(prefer(selection), config.num_experts_per_tok, dim=-1, sorted=False).indices
    scores = _each_token(lambda s: s / s.sum(), sigmoids)
    return scores, ids, _each_token(weigh, sigmoids, ids)


def _route_gpt_oss(config: Any, _router: Any, logits: Tensor, prefer: Edit) -> Routed:
    """Selection on the logits, then a softmax over the chosen ones alone."""
    ids = torch.topk(prefer(logits), config.num_experts_per_tok, dim=-1).indices
    weights = _each_token(lambda row, i: _softmax(row[i]), logits, ids)
    return _each_token(_softmax, logits), ids, weights


_ROUTES: dict[str, Callable[[Any, Any, Tensor, Edit], Routed]] = {
    "mixtral": _route_softmax,
    "olmoe": _route_softmax,
    "qwen2_moe": _route_softmax,
    "qwen3_moe": _route_softmax,
    "deepseek_v2": _route_deepseek_v2,
    "deepseek_v3": _route_deepseek_v3,
    "gpt_oss": _route_gpt_oss,
}


def _best_groups(strength: Tensor, count: int) -> list[int]:
    return strength.argsort(descending=True)[:count].tolist()


def _softmax(logits: Tensor) -> Tensor:
    powers = torch.exp(logits - logits.max().detach())
    return powers / powers.sum()


# One expert, one token: x [D] -> neurons [F] -> output [D].


def _neurons(experts: Any, _config: Any, e: int, x: Tensor) -> Tensor:
    gate_up = experts.gate_up_proj[e] @ x
    width = len(gate_up) // 2
    return _silu(gate_up[:width]) * gate_up[width:]


def _written(experts: Any, e: int, act: Tensor) -> Tensor:
    return experts.down_proj[e] @ act


def _neurons_gpt_oss(experts: Any, config: Any, e: int, x: Tensor) -> Tensor:
    """Transposed matrices, gate and up interleaved, both clamped (the gate from above only), and up + 1."""
    gate_up = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
    gate = gate_up[0::2].clamp(max=config.swiglu_limit)
    up = gate_up[1::2].clamp(min=-config.swiglu_limit, max=config.swiglu_limit)
    return (up + 1) * gate * torch.sigmoid(config.swiglu_alpha * gate)


def _written_gpt_oss(experts: Any, e: int, act: Tensor) -> Tensor:
    return act @ experts.down_proj[e] + experts.down_proj_bias[e]


# Dense and shared MLPs, one token.


def _gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    return _linear(mlp.down_proj, _silu(_linear(mlp.gate_proj, x)) * _linear(mlp.up_proj, x))


def _shared_qwen2_moe(block: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(_linear(block.shared_expert_gate, x)) * _gated_mlp(block.shared_expert, x)


def _shared_deepseek(block: Any, x: Tensor) -> Tensor:
    return _gated_mlp(block.shared_experts, x)


_SHARED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "qwen2_moe": _shared_qwen2_moe,
    "deepseek_v2": _shared_deepseek,
    "deepseek_v3": _shared_deepseek,
}


def _linear(module: Any, x: Tensor) -> Tensor:
    bias = getattr(module, "bias", None)
    product = module.weight @ x
    return product if bias is None else product + bias


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
