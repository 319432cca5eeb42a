"""Routing of each architecture, one token at a time: logits [B, S, E] -> scores that sum to one, ids, combine weights.

A rule is made of the three questions in which routers differ: what are the scores, what ranks the experts, and what
becomes of the scores of the chosen. torch.topk is called as each model calls it: it decides the order of the slots.

Sources: softmax over all experts, Mixtral (arXiv 2401.04088, section 2.1); group-limited choice, DeepSeek-V2
(2405.04434, section 2.2.2); sigmoid scores and a bias that only ranks, DeepSeek-V3 (2412.19437, section 2.1.2);
SparseMixer, 2409.12136; product keys, 2412.11834; Switch, 2101.03961; NLLB, 2207.04672; others as in transformers.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.reference.types.tape import each_token, softmax

Routed = tuple[Tensor, Tensor, Tensor]
Route = Callable[[Any, Any, Tensor], Routed]
Score = Callable[[Tensor], Tensor]


def route(block: Any, gate: Any, logits: Tensor) -> Routed:
    """Scores [B, S, E], expert ids and combine weights [B, S, K] that `gate` of `block` makes of its logits."""
    return _rule(type(gate).__name__)(block, gate, logits)


def top(selection: Tensor, count: int, ordered: bool = True) -> Tensor:
    """Ids [B, S, K] of the largest of `selection` [B, S, E]."""
    ids = torch.topk(selection.flatten(0, 1), count, dim=-1, sorted=ordered).indices
    return ids.reshape(*selection.shape[:2], count)


def share(scores: Tensor) -> Tensor:
    """Positive scores [B, S, E] of each token over their sum."""
    return each_token(lambda row: row / row.sum(), scores)


def chosen(scores: Tensor, ids: Tensor) -> Tensor:
    return each_token(lambda row, slots: row[slots], scores, ids)


def _correction(block: Any, gate: Any) -> Tensor:
    """The bias [E] that ranks experts and enters no weight: of the router, or of the block around it."""
    owners = [(gate, "e_score_correction_bias"), (block, "e_score_correction_bias"), (block, "expert_bias")]
    for owner, name in owners:
        if hasattr(owner, name):
            return getattr(owner, name).float()
    return gate.moe_statics.e_score_correction_bias[0].float()


def _over_sum(weights: Tensor, epsilon: float) -> Tensor:
    return each_token(lambda row: row / (row.sum() + epsilon), weights)


# Scores that are weights, and their bias


def _scored(
    score: Score = softmax,
    biased: bool = False,
    grouped: Callable[[Any, Tensor], Tensor] | None = None,
    ordered: bool = True,
    renormalise: bool | None = None,
    epsilon: float = 0.0,
    factor: str | None = None,
) -> Route:
    """Rank by score (+ bias, within the best groups), weigh by score (over the sum of the chosen, times a factor).

    `renormalise` None asks the router's own switch.
    """

    def rule(block: Any, gate: Any, logits: Tensor) -> Routed:
        scores = each_token(score, logits.float())
        selection = scores + _correction(block, gate) if biased else scores
        if grouped is not None and gate.num_group is not None:
            selection = each_token(lambda row: grouped(gate, row), selection)
        ids = top(selection, gate.top_k, ordered)
        weights = chosen(scores, ids)
        if gate.norm_topk_prob if renormalise is None else renormalise:
            weights = _over_sum(weights, epsilon)
        if factor is not None:
            weights = weights * getattr(gate, factor)
        return share(scores), ids, weights

    return rule


def _best_groups(strength: Tensor, count: int) -> list[int]:
    return strength.argsort(descending=True)[:count].tolist()


def _within_groups(strength: Callable[[Tensor], Tensor], outside: Callable[[Tensor], Tensor]) -> Callable:
    """Scores of the best groups as they are, those of the others replaced by what `outside` makes of them."""

    def limit(gate: Any, scores: Tensor) -> Tensor:
        groups = scores.reshape(gate.num_group, -1)
        allowed = _best_groups(torch.stack([strength(group) for group in groups]), gate.topk_group)
        return torch.cat([group if g in allowed else outside(group) for g, group in enumerate(groups)])

    return limit


def _best_two(group: Tensor) -> Tensor:
    return group.sort(descending=True).values[:2].sum()


_best_two_groups = _within_groups(_best_two, lambda group: group - torch.inf)
_best_two_groups_or_zero = _within_groups(_best_two, lambda group: 0.0 * group)
_best_groups_or_zero = _within_groups(torch.max, lambda group: 0.0 * group)


def _deepseek_v2(block: Any, gate: Any, logits: Tensor) -> Routed:
    grouped = _best_groups_or_zero if gate.topk_method == "group_limited_greedy" else None
    rule = _scored(grouped=grouped, ordered=False, renormalise=False, factor="routed_scaling_factor")
    return rule(block, gate, logits)


def _root_softplus(logits: Tensor) -> Tensor:
    return torch.sqrt(softplus(logits))


def _laguna(block: Any, gate: Any, logits: Tensor) -> Routed:
    cap = gate.router_logit_softcapping
    capped = torch.tanh(logits / cap) * cap if cap > 0.0 else logits
    return _scored(torch.sigmoid, biased=True, renormalise=True)(block, gate, capped)


def _muse_spark(block: Any, gate: Any, logits: Tensor) -> Routed:
    rule = _scored(
        torch.sigmoid, biased=True, ordered=False, renormalise=True,
        epsilon=gate.norm_topk_prob_eps, factor="routed_scaling_factor",
    )  # fmt: skip
    return rule(block, gate, logits * gate.output_multiplier)


def _lfm2(block: Any, gate: Any, logits: Tensor) -> Routed:
    rule = _scored(torch.sigmoid, biased=gate.use_expert_bias, epsilon=1e-6, factor="routed_scaling_factor")
    return rule(block, gate, logits)


def _kolibri(block: Any, gate: Any, logits: Tensor) -> Routed:
    """The bias is added to the logits, not to their sigmoids."""
    ids = top(logits + _correction(block, gate), gate.top_k)
    scores = each_token(torch.sigmoid, logits)
    weights = chosen(scores, ids)
    return share(scores), ids, _over_sum(weights, 0.0) if gate.norm_topk_prob else weights


def _ernie(block: Any, gate: Any, logits: Tensor) -> Routed:
    scores = each_token(softmax, logits)
    ids = top(scores + _correction(block, gate), gate.top_k)
    weights = each_token(lambda row: row / row.sum().clamp(min=gate.norm_min), chosen(scores, ids))
    return scores, ids, weights


def _dbrx(block: Any, _gate: Any, logits: Tensor) -> Routed:
    """Weights of unit p-norm."""
    scores = each_token(softmax, logits)
    ids = top(scores, block.top_k)
    weights, p = chosen(scores, ids), block.moe_normalize_expert_weights
    if p is not None:
        weights = each_token(lambda row: row / (row**p).sum() ** (1 / p), weights)
    return scores, ids, weights


def _gemma(_block: Any, gate: Any, logits: Tensor) -> Routed:
    scores = each_token(softmax, logits)
    ids = top(scores, gate.config.top_k_experts)
    weights = _over_sum(chosen(scores, ids), 0.0)
    return scores, ids, each_token(lambda row, slots: row * gate.per_expert_scale[slots], weights, ids)


# A choice among the logits, then scores of the chosen alone


def _softmax_of_chosen(_block: Any, gate: Any, logits: Tensor) -> Routed:
    ids = top(logits, gate.top_k)
    return each_token(softmax, logits), ids, each_token(softmax, chosen(logits, ids))


def _privacy_filter(block: Any, gate: Any, logits: Tensor) -> Routed:
    scores, ids, weights = _softmax_of_chosen(block, gate, logits)
    return scores, ids, weights / gate.top_k


def _cohere2(block: Any, gate: Any, logits: Tensor) -> Routed:
    if gate.expert_selection_fn == "softmax":
        return _softmax_of_chosen(block, gate, logits)
    return _scored(torch.sigmoid)(block, gate, logits)


def _llama4(_block: Any, gate: Any, logits: Tensor) -> Routed:
    ids = top(logits, gate.top_k)
    scores = each_token(torch.sigmoid, logits)
    return share(scores), ids, chosen(scores, ids)


def _phimoe(_block: Any, gate: Any, logits: Tensor) -> Routed:
    """SparseMixer at inference: the best expert, then the best of the others; each weighs its softmax among the
    experts not far below it (relative distance up to twice the jitter) that are not yet taken."""

    def pick(row: Tensor, taken: list[int]) -> tuple[int, Tensor]:
        free = [e for e in range(len(row)) if e not in taken]
        best = max(free, key=lambda e: row[e].item())
        near = [e for e in free if not (row[best] - row[e]) / row[e].abs().clamp(min=row[best]) > limit]
        return best, softmax(row[near])[near.index(best)]

    def both(row: Tensor) -> list[tuple[int, Tensor]]:
        first = pick(row, [])
        return [first, pick(row, [first[0]])]

    limit = 2 * gate.router_jitter_noise
    ids = each_token(lambda row: torch.tensor([e for e, _ in both(row)]), logits)
    weights = each_token(lambda row: torch.stack([w for _, w in both(row)]), logits)
    return each_token(softmax, logits), ids, weights


# Routers with a state, with capacities, or with a bug


def _zaya(_block: Any, gate: Any, logits: Tensor) -> Routed:
    """One class beyond the experts skips the block: its tokens run expert 0 with weight 0."""
    scores = each_token(softmax, logits)
    ids = top(scores + gate.balancing_biases, gate.top_k)
    skipped = ids == gate.config.num_experts
    weights = chosen(scores, ids)
    return scores, torch.where(skipped, 0, ids), torch.where(skipped, 0.0, weights)


def _switch(_block: Any, gate: Any, logits: Tensor) -> Routed:
    """The best expert; in each sequence, tokens beyond its capacity keep their id and weigh nothing."""
    scores = each_token(softmax, logits)
    ids = scores.argmax(dim=-1, keepdim=True)
    within = torch.zeros_like(ids, dtype=torch.bool)
    for b, sequence in enumerate(ids[..., 0].tolist()):
        for s, e in enumerate(sequence):
            within[b, s, 0] = sequence[: s + 1].count(e) <= gate.expert_capacity
    return scores, ids, torch.where(within, chosen(scores, ids), 0.0)


_RULES: dict[str, Route] = {
    # softmax over all experts
    **dict.fromkeys(
        ["FlexOlmo", "Mellum", "Olmoe", "Qwen2Moe", "Qwen3Moe", "Qwen3Next", "Qwen3OmniMoe", "Qwen4Exp"], _scored()
    ),
    **dict.fromkeys(["Qwen3_5Moe", "Qwen3VLMoe", "MiniMaxTop", "Mixtral", "HunYuanMoEV1"], _scored(renormalise=True)),
    "Jamba": _scored(renormalise=False),
    **dict.fromkeys(["DeepseekOcr2", "DeepseekV2", "UnlimitedOcr"], _deepseek_v2),
    "Mistral4": _scored(
        grouped=_best_two_groups_or_zero, ordered=False, epsilon=1e-20, factor="routed_scaling_factor"
    ),
    "MistralLarge4": _scored(
        grouped=_best_two_groups_or_zero, ordered=False, renormalise=True, epsilon=1e-20,
        factor="routed_scaling_factor",
    ),
    "LongcatFlash": _scored(biased=True, ordered=False, renormalise=False, factor="routed_scaling_factor"),
    "Ernie4_5": _ernie,
    "Dbrx": _dbrx,
    **dict.fromkeys(["Gemma4", "DiffusionGemma"], _gemma),
    # softmax over the chosen
    **dict.fromkeys(["GraniteMoe", "Aria", "JetMoe", "GptOss"], _softmax_of_chosen),
    "OpenAIPrivacyFilter": _privacy_filter,
    "Cohere2Moe": _cohere2,
    "Llama4": _llama4,
    "Phimoe": _phimoe,
    # sigmoids
    **dict.fromkeys(
        ["AXK1", "AXK2", "BailingHybrid", "DeepseekV3", "Dots1", "Dots3Note", "ExaoneMoe", "Glm4", "Glm5Next",
         "GlmMoeDsa", "HYV4", "KimiLinear", "MiMoV2Flash", "NemotronH", "SolarOpen"],
        _scored(torch.sigmoid, biased=True, grouped=_best_two_groups, ordered=False, epsilon=1e-20,
                factor="routed_scaling_factor"),
    ),
    "Beam": _scored(torch.sigmoid, biased=True, grouped=_best_two_groups, epsilon=1e-20),
    **dict.fromkeys(
        ["MiniMaxM2", "MiniMaxM3VL", "Step3p7"], _scored(torch.sigmoid, biased=True, ordered=False, renormalise=True)
    ),
    **dict.fromkeys(
        ["HYV3", "Dots3NoteVision"],
        _scored(torch.sigmoid, biased=True, ordered=False, renormalise=True, epsilon=1e-20,
                factor="router_scaling_factor"),
    ),
    "Afmoe": _scored(torch.sigmoid, biased=True, renormalise=True, epsilon=1e-20, factor="route_scale"),
    "Flint": _scored(torch.sigmoid),
    "Inkling2": _scored(torch.sigmoid, biased=True, ordered=False, renormalise=True, epsilon=1e-20,
                        factor="routed_scaling_factor"),
    "DeepseekV4": _scored(_root_softplus, biased=True, ordered=False, renormalise=True, epsilon=1e-20,
                          factor="routed_scaling_factor"),
    "Laguna": _laguna,
    "MuseSpark": _muse_spark,
    "Lfm2Moe": _lfm2,
    "Kolibri1": _kolibri,
    "Zaya": _zaya,
    "SwitchTransformers": _switch,
}  # fmt: skip


def _rule(router: str) -> Route:
    """The rule of the longest name that the router's class name begins with."""
    names = [name for name in _RULES if re.match(re.escape(name), router)]
    return _RULES[max(names, key=len)]


# Routers that need more than their logits


def by_token(gate: Any, logits: Tensor, input_ids: Tensor) -> Routed:
    """deepseek_v4's first layers: the token chooses the experts, the logits only weigh them."""
    scores = each_token(_root_softplus, logits)
    ids = each_token(lambda token: gate.tid2eid[token], input_ids)
    return share(scores), ids, _over_sum(chosen(scores, ids), 1e-20) * gate.routed_scaling_factor


def with_sinks(block: Any, gate: Any, logits: Tensor, shared_logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """inkling: the sigmoids of the chosen and of the shared experts together sum to the scale.

    Returns scores, ids, weights, and the shared experts' weights [B, S, n_shared].
    """
    scores = each_token(torch.sigmoid, logits)
    ids = top(scores + _correction(block, gate), gate.top_k, ordered=False)
    both = torch.cat([chosen(scores, ids), each_token(torch.sigmoid, shared_logits)], dim=-1)
    weights = _over_sum(both, 0.0) * gate.route_scale * gate.global_scale
    return share(scores), ids, weights[..., : gate.top_k], weights[..., gate.top_k :]


def nllb(gate: Any, logits: Tensor, mask: Tensor | None) -> Routed:
    """What transformers 5.23 runs: it takes the router's 0/1 mask for expert ids, so that every token runs expert 0
    with the gates of the columns where the mask is 0 and expert 1 with the gate of the column where it is 1."""
    scores = each_token(softmax, logits)
    rows = scores.flatten(0, 1)
    ranked = rows.argsort(dim=-1, descending=True)[:, :2].tolist()
    masked = [False] * len(rows) if mask is None else _as_tokens(mask, len(rows))
    capacity = _nllb_capacity(gate, len(rows))
    routed = [not skip for skip in masked]
    firsts = [pair[0] if ok else None for pair, ok in zip(ranked, routed, strict=True)]
    seconds = [pair[1] if ok else None for pair, ok in zip(ranked, routed, strict=True)]
    weights = []
    for t, (first, second) in enumerate(ranked):
        top_1 = firsts[t] is not None and firsts[: t + 1].count(first) <= capacity
        before = firsts.count(second) + seconds[: t + 1].count(second)
        top_2 = seconds[t] is not None and before <= capacity
        gates = _nllb_gates(gate, rows[t, first], rows[t, second], (top_1, top_2))
        weights.append(torch.stack([gates[1], gates[0]]))
    ids = torch.tensor([0, 1]).expand(*logits.shape[:2], 2).clone()
    return scores, ids, torch.stack(weights).reshape(*logits.shape[:2], 2)


def _nllb_capacity(gate: Any, tokens: int) -> int:
    if gate.moe_eval_capacity_token_fraction > 0:
        return math.ceil(gate.moe_eval_capacity_token_fraction * tokens)
    return gate.expert_capacity or 2 * math.ceil(tokens / gate.num_experts)


def _nllb_gates(gate: Any, first: Tensor, second: Tensor, kept: tuple[bool, bool]) -> list[Tensor]:
    """Gates of the best two experts; those over capacity are zero, and the other's then renormalised to one."""
    counted = (True, True) if gate.normalize_router_prob_before_dropping else kept
    first, second = first * counted[0], second * counted[1]
    total = (first + second).clamp(min=torch.finfo(first.dtype).eps)
    return [first / total * kept[0], second / total * kept[1]]


def _as_tokens(mask: Tensor, tokens: int) -> list[bool]:
    """Whether each token is padding: where the last row of attention's additive mask is not zero."""
    rows = mask[:, :, -1, :].reshape(-1)[-tokens:] if mask.ndim == 4 else mask.reshape(-1)
    return rows.bool().tolist()
