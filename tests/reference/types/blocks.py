"""The MoE block of each architecture, written out: input [B, S, D] -> what the block returns [B, S, D].

1. `_ROUTER` says where the linear map of the router is; its result is `router_logits`.
2. The rule of tests/reference/types/routers.py makes ids and weights of it.
3. Each chosen expert runs on each token: neurons, output, weighted sum over slots.
4. `_FINISH` says what becomes of that sum: factors, projections, norms, and the shared experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference.types import routers
from tests.reference.types.experts import mlp, neurons, sinks, written
from tests.reference.types.tape import Point, each_token, linear, silu

Context = dict[str, Any]
"""What a block is given beside its input: token ids, the mask, the state that routers hand on."""


def moe(block: Any, x: Tensor, point: Point, context: Context) -> Tensor:
    """What `block` returns for x [B, S, D], every value through `point`."""
    special = _SPECIAL.get(type(block).__name__)
    if special is not None:
        return special(block, x, point, context)
    x = point("moe_in", x)
    gate = block.gate if hasattr(block, "gate") else block.router
    logits = point("router_logits", each_token(lambda row: _logits(gate, row), x))
    routing = chosen(point, *_routing(block, gate, logits, context))
    experts = getattr(block, "experts", block)
    inner = _into_experts(block, x)
    routed = run_experts(experts, inner, routing, point)
    return _finish(block, x, routed, point)


def chosen(point: Point, scores: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights after their edits: other ids keep each slot's weight."""
    ids = point("expert_ids", ids)
    weights = point("gate_weights", weights)
    point("router_scores", scores)
    return ids, weights


def run_experts(experts: Any, x: Tensor, routing: tuple[Tensor, Tensor], point: Point) -> Tensor:
    """The weighted sum over slots, [B, S, D]."""
    ids, weights = routing

    def act_of_token(row: Tensor, slots: Tensor) -> Tensor:
        return torch.stack([neurons(experts, int(e), row) for e in slots])

    act = point("expert_act", each_token(act_of_token, x, ids))
    out = point("expert_out", _outputs(experts, act, ids, x))
    return point("routed_out", each_token(_weighted_sum, out, weights))


def _outputs(experts: Any, act: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    zero_experts = getattr(experts, "num_routed_experts", None)

    def out_of_token(act: Tensor, slots: Tensor, row: Tensor) -> Tensor:
        def out(slot: int, e: int) -> Tensor:
            return row if zero_experts is not None and e >= zero_experts else written(experts, e, act[slot])

        return torch.stack([out(slot, int(e)) for slot, e in enumerate(slots)])

    return each_token(out_of_token, act, ids, x)


def _weighted_sum(out: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([weights[slot] * out[slot] for slot in range(len(weights))]).sum(dim=0)


# The router's linear map and rule


def _logits(gate: Any, row: Tensor) -> Tensor:
    """Logits [E] of one token: of the router itself, or of the one linear layer in it."""
    if type(gate).__name__ == "LongcatFlashTopkRouter":  # which leaves out its bias
        return gate.classifier.weight @ row
    names = [name for name in ("gate", "layer", "wg", "classifier") if hasattr(gate, name)]
    return linear(getattr(gate, names[0]) if names else gate, row)


def _routing(block: Any, gate: Any, logits: Tensor, context: Context) -> routers.Routed:
    if getattr(block, "is_hash", False):
        return routers.by_token(gate, logits, context["input_ids"])
    if type(block).__name__ == "NllbMoeSparseMLP":
        scores, ids, weights = routers.nllb(gate, logits, context["attention_mask"])
        return scores, ids, (1 - block.experts.moe_token_dropout) * weights
    return routers.route(block, gate, logits)


# Around the experts


def _into_experts(block: Any, x: Tensor) -> Tensor:
    """The experts' input: the block's, or its projection into a latent space."""
    if hasattr(block, "pre_expert_proj"):
        return block.pre_expert_norm(each_token(lambda row: linear(block.pre_expert_proj, row), x))
    module = getattr(block, "fc1_latent_proj", None)
    return each_token(lambda row: linear(module, row), x) if hasattr(module, "weight") else x


def _out_of_experts(block: Any, routed: Tensor) -> Tensor:
    module = getattr(block, "post_expert_proj", getattr(block, "fc2_latent_proj", None))
    return each_token(lambda row: linear(module, row), routed) if hasattr(module, "weight") else routed


def _shared(block: Any, x: Tensor) -> Tensor | None:
    """Shared experts as they are added, or None."""
    if getattr(block, "shared_expert_gate", None) is not None:
        gate, shared = block.shared_expert_gate, block.shared_expert
        return each_token(lambda row: torch.sigmoid(linear(gate, row)) * mlp(shared, row), x)
    modules = [getattr(block, name, None) for name in ("shared_experts", "shared_expert", "shared_mlp")]
    module = next((module for module in modules if module is not None), None)
    return None if module is None else each_token(lambda row: mlp(module, row), x)


def _finish(block: Any, x: Tensor, routed: Tensor, point: Point) -> Tensor:
    name = type(block).__name__
    out = _out_of_experts(block, routed) * _FACTORS.get(name, lambda block: 1.0)(block)
    shared = _shared(block, x)
    if shared is not None:
        out = out + point("shared_out", shared)
    return point("moe_out", _LAST.get(name, lambda block, out: out)(block, out))


_FACTORS: dict[str, Callable[[Any], float]] = {
    **dict.fromkeys(
        ["LagunaSparseMoeBlock", "MiniMaxM3VLSparseMoeBlock", "Step3p7SparseMoeBlock", "BeamMoE"],
        lambda block: block.routed_scaling_factor,
    ),
    "OpenAIPrivacyFilterMLP": lambda block: block.num_experts,
}


def _averaged(block: Any, out: Tensor) -> Tensor:
    average = block.num_shared_experts > 0 and block.shared_expert_combination_strategy == "average"
    return out / 2 if average else out


_LAST: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "AXK1MoE": lambda block, out: block.post_mlp_layernorm(out),
    "Cohere2MoeSparseMoeBlock": _averaged,
    "JetMoeMoE": lambda block, out: out + block.bias,
}


# Blocks of another build


def _inkling(block: Any, x: Tensor, point: Point, _context: Context) -> Tensor:
    x, gate = point("moe_in", x), block.gate
    split = len(gate.weight) - gate.n_shared_experts
    logits = point("router_logits", each_token(lambda row: gate.weight[:split] @ row, x))
    shared_logits = each_token(lambda row: gate.weight[split:] @ row, x)
    scores, ids, weights, sink_weights = routers.with_sinks(block, gate, logits, shared_logits)
    routed = run_experts(block.experts, x, chosen(point, scores, ids, weights), point)
    shared = each_token(lambda row, weights: sinks(block.shared_experts, row, weights), x, sink_weights)
    return point("moe_out", routed + point("shared_out", shared))


def _llama4(block: Any, x: Tensor, point: Point, _context: Context) -> Tensor:
    """The weight multiplies what the expert reads; the outputs are summed as they are."""
    x = point("moe_in", x)
    logits = point("router_logits", each_token(lambda row: linear(block.router, row), x))
    ids, weights = chosen(point, *routers.route(block, block.router, logits))

    def act_of_token(row: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([neurons(block.experts, int(e), weights[i] * row) for i, e in enumerate(slots)])

    act = point("expert_act", each_token(act_of_token, x, ids, weights))
    out = point("expert_out", _outputs(block.experts, act, ids, x))
    routed = point("routed_out", each_token(lambda out: out.sum(dim=0), out))
    return _finish(block, x, routed, point)


def _doge(block: Any, x: Tensor, point: Point, _context: Context) -> Tensor:
    """Product keys: expert i * n + j of token t has the logit x[t, i] + y[t, j]. The router's output is cut in two as
    the model cuts it: along tokens, so that a token's halves come from others."""
    x = point("moe_in", x)
    batch, positions = x.shape[:2]
    halves = each_token(lambda row: linear(block.router_gate, row), x).reshape(2, batch, positions, -1)

    def keys(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a[i] + b for i in range(block.num_keys)])

    logits = point("router_logits", each_token(keys, halves[0], halves[1]))
    ids = routers.top(logits, block.top_k)
    weights = each_token(routers.softmax, routers.chosen(logits, ids))
    routing = chosen(point, each_token(routers.softmax, logits), ids, weights)
    routed = run_experts(block, x, routing, point)
    shared = each_token(_doge_shared(block), x)
    return point("moe_out", point("shared_out", shared) + routed)


def _doge_shared(block: Any) -> Callable[[Tensor], Tensor]:
    def shared(row: Tensor) -> Tensor:
        return linear(block.down_proj, silu(linear(block.gate_proj, row)) * linear(block.up_proj, row))

    return shared


def _zaya(block: Any, x: Tensor, point: Point, context: Context) -> Tensor:
    """The router reads its own state of the layer before, and leaves one for the next: context["router_state"]."""
    x, gate = point("moe_in", x), block.gate
    state = each_token(lambda row: linear(gate.down_proj, row), x)
    if gate.use_eda and context["router_state"] is not None:
        state = state + context["router_state"] * gate.router_states_scale
    context["router_state"] = state
    logits = point("router_logits", gate.router_mlp(state))
    routed = run_experts(block.experts, x, chosen(point, *routers.route(block, gate, logits)), point)
    return point("moe_out", routed)


def _ernie_vl(block: Any, x: Tensor, point: Point, context: Context) -> Tensor:
    """Text tokens only: the text experts, and the shared ones that both kinds of token have."""
    kinds = context.get("moe_mm_token_type_ids")
    if kinds is not None and kinds.any():
        raise ValueError("tokens of an image run vision experts, which this reference does not have")
    x, text = point("moe_in", x), block.text_moe
    logits = point("router_logits", each_token(lambda row: linear(text.gate, row), x))
    routed = run_experts(text.experts, x, chosen(point, *routers.route(text, text.gate, logits)), point)
    return _finish(block, x, routed, point)


_SPECIAL: dict[str, Callable[[Any, Tensor, Point, Context], Tensor]] = {
    "InklingMoE": _inkling,
    "Llama4TextMoe": _llama4,
    "DogeCDMoE": _doge,
    "ZayaSparseMoeBlock": _zaya,
    "Ernie4_5_VLMoeMoeBlock": _ernie_vl,
}


def is_moe(module: Any) -> bool:
    """Whether an MLP module is a block that `moe` can run, and not a dense one."""
    return hasattr(module, "experts") or type(module).__name__ in {*_SPECIAL, "JetMoeMoE"}
