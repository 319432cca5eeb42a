"""Does it add up on *this* checkpoint? The checks behind ``model.audit()``.

1. The weights are finite.
2. An untouched instrumented run is bit-equal to the plain one (transformers' ``grouped_mm``).
3. Every point is there at every layer that should have it, in its promised shape, and the relations between points
   hold: the residual is the sum of its parts, the weighted outputs sum to what the experts return, and so on.
4. Every editable point is edited at all layers at once; the logits move, and every relation downstream of the edit
   holds for the edited values, which it would not if the edit had not taken.

A relation is not checked while the point that it gives is the one being edited.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_interp.errors import BadCheckpoint
from moe_interp.interventions import apply
from moe_interp.model import MoEModel, check_weights
from moe_interp.points import POINTS
from moe_interp.run import Run

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Relation:
    """Two ways to the same value at one layer: ``pair`` gives what is there and what follows from other points."""

    name: str
    gives: str
    needs: tuple[str, ...]
    pair: Callable[[MoEModel, Run, int], Pair]


def _resid_mid(model: MoEModel, run: Run, layer: int) -> Pair:
    return run["resid_mid", layer], run["resid_pre", layer] + run["attn_out", layer]


def _expert_out(model: MoEModel, run: Run, layer: int) -> Pair:
    return run["expert_out", layer], model.experts(layer)(run["moe_in", layer], run["expert_ids", layer])


def _projected(model: MoEModel, run: Run, layer: int) -> Pair:
    """Down-projections of the neurons, one expert after another from its own matrix."""
    act, ids = run["expert_act", layer], run["expert_ids", layer]
    expected = torch.zeros_like(run["expert_out", layer])
    for expert in ids.unique().tolist():
        weights = model.weights(layer, expert)
        out = act[ids == expert] @ weights.down.T
        expected[ids == expert] = out if weights.down_bias is None else out + weights.down_bias
    return run["expert_out", layer], expected


def _weights(model: MoEModel, run: Run, layer: int) -> Pair:
    scores = run["router_scores", layer].gather(2, run["expert_ids", layer])
    weights = run["gate_weights", layer].float()
    return weights / weights.sum(-1, keepdim=True), scores / scores.sum(-1, keepdim=True)


def _routed(model: MoEModel, run: Run, layer: int) -> Pair:
    weights, outputs = run["gate_weights", layer], run["expert_out", layer]
    return run["routed_out", layer], (weights[..., None] * outputs).sum(dim=2)


def _moe_out(model: MoEModel, run: Run, layer: int) -> Pair:
    shared = run["shared_out", layer] if "shared_out" in model.points else 0.0
    return run["moe_out", layer], run["routed_out", layer] + shared


def _resid_post(model: MoEModel, run: Run, layer: int) -> Pair:
    branch = "moe_out" if layer in model.layers else "mlp_out"
    return run["resid_post", layer], run["resid_mid", layer] + run[branch, layer]


def _resid_pre(model: MoEModel, run: Run, layer: int) -> Pair:
    return run["resid_pre", layer], run["resid_post", layer - 1] if layer else run["embed"]


def _logits(model: MoEModel, run: Run, layer: int) -> Pair:
    return run.logits, model.decode(run["resid_post", model.spec.num_layers - 1])


RELATIONS = (
    Relation("resid_pre = embed, or resid_post of the layer before", "resid_pre", ("resid_pre",), _resid_pre),
    Relation("resid_mid = resid_pre + attn_out", "resid_mid", ("resid_mid",), _resid_mid),
    Relation("gate_weights ∝ router_scores of expert_ids", "gate_weights", ("router_scores", "gate_weights"), _weights),
    Relation("expert_out = experts(moe_in, expert_ids)", "expert_out", ("expert_out",), _expert_out),
    Relation("expert_out = down-projection of expert_act", "expert_out", ("expert_act",), _projected),
    Relation("routed_out = Σ gate_weights · expert_out", "routed_out", ("routed_out",), _routed),
    Relation("moe_out = routed_out + shared_out", "moe_out", ("moe_out",), _moe_out),
    Relation("resid_post = resid_mid + moe_out (or mlp_out)", "resid_post", ("resid_mid", "resid_post"), _resid_post),
    Relation("logits = decode(resid_post of the last layer)", "logits", ("resid_post",), _logits),
)
# An edit breaks, besides what gives its own point, the relations that see the value from before it.
BROKEN_BY = {"expert_act": {"expert_out = experts(moe_in, expert_ids)"}, "expert_ids": {RELATIONS[2].name}}


@dataclass(frozen=True)
class Check:
    """One line of an audit: what was checked, the worst relative error, and the most that is allowed."""

    name: str
    error: float
    limit: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit (NaN is not)."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Audit:
    """The checks of one checkpoint."""

    model: str
    checks: tuple[Check, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"audit of {self.model}: {'passed' if self.passed else 'FAILED'}"]
        lines += [
            f"  {'ok  ' if check.passed else 'FAIL'} {check.name:<{width}}  {check.error:.1e} (≤ {check.limit:.0e})"
            f"  {check.detail}".rstrip()
            for check in self.checks
        ]
        return "\n".join(lines)


def audit(model: MoEModel, inputs: Any = None) -> Audit:
    """Check a checkpoint: completeness, bit-equality, relations between points, and that every edit takes.

    Args:
        model: the model to check.
        inputs: what to run on; by default 2 x 16 random token ids, seeded.
    """
    if inputs is None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randint(model.spec.vocab_size, (2, min(16, model.spec.context_length)), generator=generator)
    try:
        check_weights(model.hf)
    except BadCheckpoint as error:
        return Audit(model.name, (Check("weights are finite", torch.inf, 0.0, str(error)),), model.provenance())
    clean = model.run(inputs, read=list(model.points))
    checks = [Check("weights are finite", 0.0, 0.0), _bit_equal(model, inputs), _complete(model, clean)]
    checks += [_holds(relation, model, clean) for relation in RELATIONS]
    checks += [_edit_takes(point, model, inputs, clean) for point in model.points if POINTS[point].editable]
    return Audit(model.name, tuple(checks), model.provenance())


def _bit_equal(model: MoEModel, inputs: Any) -> Check:
    untouched = model.run(inputs)
    with model.plain(), torch.no_grad():
        plain = model.hf(**model.encode(inputs), use_cache=False).logits
    same = torch.equal(untouched.logits, plain)
    difference = (untouched.logits.float() - plain.float()).abs().max().item()
    return Check("untouched run bit-equal to plain grouped_mm", 0.0 if same else max(difference, 1e-45), 0.0)


def _complete(model: MoEModel, run: Run) -> Check:
    batch, length = run.mask.shape
    expected = {(point, layer) for point in model.points for layer in model.spec.layers_of(point)}
    wrong = [
        f"{point} at layer {layer}"
        for point, layer in sorted(expected, key=str)
        if (point, layer) not in run.values
        or run.values[point, layer].shape[:2] != (batch, length)
        or run.values[point, layer].dim() != len(POINTS[point].dims.split())
    ]
    return Check("every point at every layer", float(len(wrong)), 0.0, "; ".join(wrong) or f"{len(expected)} values")


def _holds(relation: Relation, model: MoEModel, run: Run) -> Check:
    error = max(_relative(*relation.pair(model, run, layer)) for layer in _layers(relation, model))
    return Check(relation.name, error, _limit(model))


def _layers(relation: Relation, model: MoEModel) -> tuple[int, ...]:
    if relation.gives == "logits":
        return (model.spec.num_layers - 1,)
    at_all = all(name.startswith("resid") for name in relation.needs)
    return tuple(range(model.spec.num_layers)) if at_all else model.layers


def _edit_takes(point: str, model: MoEModel, inputs: Any, clean: Run) -> Check:
    run = model.run(inputs, read=list(model.points), edit=apply(point, _changes(point, model)))
    moved = _relative(run.logits, clean.logits)
    skipped = BROKEN_BY.get(point, set())
    holding = [
        _holds(relation, model, run)
        for relation in RELATIONS
        if relation.gives != point and relation.name not in skipped
    ]
    worst = max(holding, key=lambda check: check.error)
    error = worst.error if moved > 0 else torch.inf
    return Check(f"edit of {point} takes", error, _limit(model), f"moves the logits by {moved:.0e}")


def _changes(point: str, model: MoEModel) -> Callable[[Tensor], Tensor]:
    if point == "expert_ids":
        return lambda ids: (ids + 1) % model.spec.num_experts
    if point == "router_logits":
        return lambda logits: -logits
    return lambda value: value * 1.25


def _limit(model: MoEModel) -> float:
    return LIMITS.get(model.dtype, 4e-2)


def _relative(got: Tensor, expected: Tensor) -> float:
    scale = expected.float().abs().max().item()
    return (got.float() - expected.float()).abs().max().item() / (scale or 1.0)
