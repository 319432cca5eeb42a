"""What blocks with a linear gate and a list of experts compute, point by point: the slow reference.

As tests/reference/deepseek_v1.py, with the routing of each style of tests/linear_gates.py written out.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.deepseek_v1 import Point, run_experts, swiglu, walk
from tests.reference.model import Edit, Key, Reference, Routed, _each_token, _linear, _softmax


def forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    edits: dict[Key, Edit] | None = None,
) -> Reference:
    """Run a model of tests/linear_gates.py on `input_ids` [B, S], with `edits` applied where each point is computed.

    Raises ValueError for an edit of a point that the model does not have, or that changes a shape or dtype.
    """
    return walk(model, input_ids, attention_mask, edits, _moe)


def _moe(block: Any, config: Any, x: Tensor, point: Point) -> Tensor:
    x = point("moe_in", x)
    logits = point("router_logits", _each_token(lambda row: _linear(block.gate, row), x))
    route = _topk_softmax if config.model_type == "linear_gate_topk_softmax" else _softmax_topk
    total = run_experts(block.experts, x, route(config, logits), point)
    if config.model_type == "linear_gate_softmax_topk":
        total = total + point("shared_out", _each_token(lambda row: _gated_shared(block, row), x))
    return point("moe_out", total)


def _softmax_topk(config: Any, logits: Tensor) -> Routed:
    renormalise = config.norm_topk_prob or config.model_type == "linear_gate_softmax_topk_renormalised"

    def weigh(scores: Tensor, ids: Tensor) -> Tensor:
        return scores[ids] / scores[ids].sum() if renormalise else scores[ids]

    scores = _each_token(_softmax, logits)
    ids = torch.topk(scores, config.num_experts_per_tok, dim=-1).indices
    return scores, ids, _each_token(weigh, scores, ids)


def _topk_softmax(config: Any, logits: Tensor) -> Routed:
    ids = torch.topk(logits, config.num_experts_per_tok, dim=-1).indices
    weights = _each_token(lambda row, chosen: _softmax(row[chosen]), logits, ids)
    return _each_token(_softmax, logits), ids, weights


def _gated_shared(block: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(_linear(block.shared_expert_gate, x)) * swiglu(block.shared_expert, x)
