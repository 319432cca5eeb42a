"""Does it add up on *this* checkpoint? The checks behind ``model.audit()``.

1. The weights are finite.
2. An untouched instrumented run is bit-equal to the plain one (transformers' ``grouped_mm``, or its loop over experts
   where that cannot run).
3. Every point is there at every layer that should have it, in its promised shape, and the relations between points
   hold: the residual is the sum of its parts, the weighted outputs sum to what the experts return, and so on.
4. Every editable point is edited at all layers at once; the logits move, and every relation downstream of the edit
   holds for the edited values, which it would not if the edit had not taken.

A relation is not checked while the point that it gives is the one being edited. A check that cannot be carried out, as
under a description that does not fit the model, fails by name; its detail says why.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe_interp.adapters.formats import check_weights, rounds_activations
from moe_interp.adapters.formulas import block_output, joined
from moe_interp.adapters.sums import Join, follow
from moe_interp.errors import BadCheckpoint, BadInput, RemoteFailure
from moe_interp.interventions import Intervention, apply
from moe_interp.model import MoEModel
from moe_interp.points import POINTS
from moe_interp.run import Run

MANY, FEW = (2, 16), (1, 4)  # texts, tokens: an edit is one of a dozen runs, and most of a run is fetching experts
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

Pair = tuple[Tensor, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Relation:
    """Two ways to the same value at one layer: ``pair`` gives what is there and what follows from other points.

    ``pair`` gives None where an architecture has no such relation. ``after`` names the edits after which it is looked
    at again, where that is costly and no other edit can break it; None: all.
    """

    name: str
    gives: str
    needs: tuple[str, ...]
    pair: Callable[[MoEModel, Run, int], Pair | None]
    after: tuple[str, ...] | None = None


def _resid_pre(model: MoEModel, run: Run, layer: int) -> Pair | None:
    before = model.spec.previous(layer)
    if before is not None:
        return run["resid_pre", layer], run["resid_post", before]
    if (
        model.spec.embedding is None
        or model.spec.embed is None
        or model.spec.layer(layer).stack != model.spec.main_stack
    ):
        return None
    return run["resid_pre", layer], follow(model.hf, model.spec.embedding, run["embed"])


def _resid_mid(model: MoEModel, run: Run, layer: int) -> Pair | None:
    join = model.spec.layer(layer).mid
    return None if join is None else (run["resid_mid", layer], _joined(model, run, layer, join))


def _resid_post(model: MoEModel, run: Run, layer: int) -> Pair | None:
    join = model.spec.layer(layer).post
    return None if join is None else (run["resid_post", layer], _joined(model, run, layer, join))


def _joined(model: MoEModel, run: Run, layer: int, join: Join) -> Tensor:
    return joined(model.hf, join, lambda point: run[point, layer])


def _weights(model: MoEModel, run: Run, layer: int) -> Pair | None:
    if not model.spec.moe(layer).proportional:
        return None
    scores = run["router_scores", layer].gather(2, run["expert_ids", layer])
    weights = run["gate_weights", layer].float()
    # Cross-multiplied, for the weights of a token that no expert takes are all 0.
    return weights * scores.sum(-1, keepdim=True), scores * weights.sum(-1, keepdim=True)


def _expert_out(model: MoEModel, run: Run, layer: int) -> Pair:
    ids, hidden, moe = run["expert_ids", layer], run["moe_in", layer], model.spec.moe(layer)
    experts = model.experts(layer)
    if moe.weights_on == "output":
        return run["expert_out", layer], experts(hidden, ids)
    scaled = hidden[:, :, None] * run["gate_weights", layer][..., None].to(hidden.dtype)
    return run["expert_out", layer], experts(scaled, ids[..., None]).squeeze(3)


def _projected(model: MoEModel, run: Run, layer: int) -> Pair | None:
    """Down-projections of the neurons, one expert after another from its own matrix."""
    moe = model.spec.moe(layer)
    if getattr(moe.kernel, "has_post_expert_norm", False) or rounds_activations(model.hf.get_submodule(moe.experts)):
        return None
    act, ids = run["expert_act", layer], run["expert_ids", layer]
    there, expected = run["expert_out", layer].clone(), torch.zeros_like(run["expert_out", layer])
    for expert in ids.unique().tolist():
        try:
            weights = model.weights(layer, expert)
        except BadInput:  # an expert that has no matrices
            there[ids == expert] = 0.0
            continue
        out = act[ids == expert] @ weights.down.T.to(act.dtype)
        expected[ids == expert] = out if weights.down_bias is None else out + weights.down_bias
    return there, expected


def _routed(model: MoEModel, run: Run, layer: int) -> Pair:
    weights, outputs = run["gate_weights", layer][..., None], run["expert_out", layer]
    summed = weights * outputs if model.spec.moe(layer).weights_on == "output" else outputs
    return run["routed_out", layer], summed.sum(dim=2)


def _moe_out(model: MoEModel, run: Run, layer: int) -> Pair:
    moe = model.spec.moe(layer)
    shared = run["shared_out", layer] if "shared_out" in model.spec.layer(layer).sites else None
    return run["moe_out", layer], block_output(model.hf, moe, run["routed_out", layer], shared)


def _logits(model: MoEModel, run: Run, layer: int) -> Pair | None:
    return None if model.spec.final is None else (run.output, model.decode(run["resid_post", layer]))


INTO_EXPERTS = ("moe_in", "router_logits", "expert_ids", "gate_weights", "expert_act")
RELATIONS = (
    Relation("resid_pre = embed, or resid_post of the layer before", "resid_pre", ("resid_pre",), _resid_pre),
    Relation("resid_mid = resid_pre + attn_out", "resid_mid", ("resid_mid",), _resid_mid),
    Relation("gate_weights ∝ router_scores of expert_ids", "gate_weights", ("router_scores", "gate_weights"), _weights),
    Relation(
        "expert_out = experts(moe_in, expert_ids)", "expert_out", ("moe_in", "expert_out"), _expert_out, INTO_EXPERTS
    ),
    Relation("expert_out = down-projection of expert_act", "expert_out", ("expert_act",), _projected, INTO_EXPERTS),
    Relation("routed_out = Σ gate_weights · expert_out", "routed_out", ("routed_out",), _routed),
    Relation("moe_out = routed_out + shared_out", "moe_out", ("moe_out",), _moe_out),
    Relation("resid_post = resid_mid + moe_out (or mlp_out)", "resid_post", ("resid_post",), _resid_post),
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
        inputs: what to run on; by default 2 x 16 random token ids, seeded, and 1 x 4 for the edits.

    Raises:
        BadInput: no inputs, for a model that does not take tokens; inputs that cannot be right; or standing edits.
    """
    if model._standing:
        raise BadInput(
            "a model under edits cannot be checked",
            expected="an audit outside `with model.edit(...)`",
            got=f"{len(model._standing)} standing, which the plain model does not have",
        )
    chosen = inputs is None
    inputs = _random_tokens(model, MANY) if chosen else inputs
    try:
        check_weights(model.hf)
    except BadCheckpoint as error:
        return Audit(model.name, (Check("weights are finite", torch.inf, 0.0, str(error)),), model.provenance())
    checks = [Check("weights are finite", 0.0, 0.0), *_checks(model, inputs, chosen)]
    return Audit(model.name, tuple(checks), model.provenance())


def _checks(model: MoEModel, inputs: Any, chosen: bool) -> Iterator[Check]:
    """All but that of the weights; ``chosen``: whether the inputs are our own, so that edits may have fewer."""
    model.encode(inputs)  # what is wrong with the inputs is the caller's to know, and no check that fails
    clean = _tried("every point is read", lambda: model.run(inputs, read=list(model.points)))
    if isinstance(clean, Check):
        yield clean
        return
    yield _tried("untouched run equal to the plain one", lambda: _equal(model, inputs))
    yield _complete(model, clean)
    yield from (check for relation in RELATIONS if (check := _holds(relation, model, clean)))
    few = _random_tokens(model, FEW) if chosen else inputs
    clean = model.run(few, read=list(model.points)) if chosen else clean
    for point in (point for point in model.points if POINTS[point].editable):
        yield _tried(f"edit of {point} takes", lambda point=point: _edit_takes(point, model, few, clean))  # type: ignore[misc]


def _tried(name: str, what: Callable[[], T]) -> T | Check:
    """What is asked for, or a failed check of this name: a wrong description can go wrong in any way."""
    try:
        return what()
    except (RemoteFailure, torch.OutOfMemoryError):  # which say nothing about the model
        raise
    except Exception as error:
        return Check(name, torch.inf, 0.0, f"{type(error).__name__}: {error}".splitlines()[0])


def _random_tokens(model: MoEModel, shape: tuple[int, int]) -> Any:
    spec, generator = model.spec, torch.Generator().manual_seed(0)
    if spec.kind == "other":
        raise BadInput("what to run on?", expected="model inputs: model.audit(inputs)", got="a model without tokens")
    ids = torch.randint(spec.vocab_size, (shape[0], min(shape[1], spec.context_length)), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if spec.kind == "encoder-decoder" else ids


def _equal(model: MoEModel, inputs: Any) -> Check:
    """Bit-equal to ``grouped_mm``; up to rounding where that cannot run or a block computes in its own way."""
    if None in model.plain_experts:
        return Check("untouched run not compared", 0.0, 0.0, "transformers cannot run these experts on this device")
    untouched = model.run(inputs, read="expert_out")  # else transformers' own experts would run there, too
    with model.plain(), torch.no_grad():
        plain = model.forward(model.encode(inputs))
    if not model.exact:
        name = "plain eager" if "eager" in model.plain_experts else "the plain one"
        return Check(f"untouched run equal to {name}", _relative(untouched.output, plain), _limit(model))
    same = torch.equal(untouched.output, plain)
    difference = (untouched.output.float() - plain.float()).abs().max().item()
    return Check("untouched run bit-equal to plain grouped_mm", 0.0 if same else max(difference, 1e-45), 0.0)


def _there(model: MoEModel, run: Run) -> set[tuple[str, int | None]]:
    """Every point that the layers which ran should have."""
    ran = {layer.index for layer in model.spec.layers if ("resid_post", layer.index) in run.values} | {None}
    ran |= set(run.routing)
    return {(point, layer) for point in model.points for layer in model.spec.layers_of(point) if layer in ran}


def _complete(model: MoEModel, run: Run) -> Check:
    expected = _there(model, run)
    wrong = [
        f"{point} at layer {layer}"
        for point, layer in sorted(expected, key=str)
        if (point, layer) not in run.values
        or run.values[point, layer].shape[:2] != _grid(run, point, layer)
        or run.values[point, layer].dim() != _dims(model, point)
    ]
    return Check("every point at every layer", float(len(wrong)), 0.0, "; ".join(wrong) or f"{len(expected)} values")


def _grid(run: Run, point: str, layer: int | None) -> torch.Size:
    if layer is None or layer not in run.routing:
        return run.values[point, layer].shape[:2]
    return run.routing[layer].mask.shape


def _dims(model: MoEModel, point: str) -> int:
    return len(POINTS[point].dims.split()) + (model.spec.streams > 1 and point.startswith("resid"))


def _holds(relation: Relation, model: MoEModel, run: Run) -> Check | None:
    """The worst error of a relation over layers; None where it holds at none of them."""
    return _tried(relation.name, lambda: _worst(relation, model, run))


def _worst(relation: Relation, model: MoEModel, run: Run) -> Check | None:
    pairs = [relation.pair(model, run, layer) for layer in _layers(relation, model, run)]
    there = [pair for pair in pairs if pair is not None]
    if not there:
        return None
    differ = [f"{tuple(a.shape)} is there, {tuple(b.shape)} follows" for a, b in there if a.shape != b.shape]
    return Check(relation.name, max(_relative(*pair) for pair in there), _limit(model), "; ".join(differ[:1]))


def _layers(relation: Relation, model: MoEModel, run: Run) -> list[int]:
    there = _there(model, run)
    if relation.gives == "logits":
        last = model.spec.last(model.spec.main_stack)
        return [last] if ("resid_post", last) in there else []
    return [layer.index for layer in model.spec.layers if all((name, layer.index) in there for name in relation.needs)]


def _edit_takes(point: str, model: MoEModel, inputs: Any, clean: Run) -> Check:
    run = model.run(inputs, read=list(model.points), edit=_changes(point, model))
    moved = _relative(run.output, clean.output)
    skipped = BROKEN_BY.get(point, set())
    holding = [
        check
        for relation in RELATIONS
        if relation.gives != point
        and relation.name not in skipped
        and (relation.after is None or point in relation.after)
        and (check := _holds(relation, model, run))
    ]
    worst = max(holding, key=lambda check: check.error, default=Check("no relation to check", 0.0, 0.0))
    error = worst.error if moved > 0 else torch.inf
    return Check(f"edit of {point} takes", error, _limit(model), f"moves the output by {moved:.0e} ({worst.name})")


def _changes(point: str, model: MoEModel) -> list[Intervention]:
    if point == "expert_ids":
        spec = model.spec
        return [apply(point, partial(_next, count=spec.moe(at).num_experts), layers=at) for at in spec.moe_layers]
    return [apply(point, torch.neg if point == "router_logits" else _every_other)]


def _next(ids: Tensor, count: int) -> Tensor:
    return (ids + 1) % count


def _every_other(value: Tensor) -> Tensor:
    """Every other number by 1.25: a norm would undo one factor for all."""
    changed = value.clone()
    changed[..., ::2] *= 1.25
    return changed


def _limit(model: MoEModel) -> float:
    # Eight bits of activations are no finer than bfloat16's: a last bit decides between neighbours.
    coarse = rounds_activations(model.hf)
    return LIMITS[torch.bfloat16] if coarse else LIMITS.get(model.dtype, LIMITS[torch.bfloat16])


def _relative(got: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the largest value expected; infinite between different shapes."""
    if got.shape != expected.shape:
        return torch.inf
    scale = expected.float().abs().max().item()
    return (got.float() - expected.float()).abs().max().item() / (scale or 1.0)
