"""The interventions by name: functions that take what a user has at hand and return plain data."""

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor

from moe_interp.arguments import Fraction, checked, is_finite, shown
from moe_interp.errors import BadInput
from moe_interp.interventions.arguments import Marks, layers_of, some, where, whole
from moe_interp.interventions.base import Intervention
from moe_interp.interventions.outputs import AddToOutput, Mean, Patch, Resample, Scale, SetOutput
from moe_interp.interventions.places import AddToPoint, Apply, Noise, SetPoint
from moe_interp.interventions.routes import Bias, Force, Mask, Randomize
from moe_interp.interventions.swaps import Swap, SwapLayers
from moe_interp.interventions.values import ByToken, Values
from moe_interp.interventions.widths import Share, TopK
from moe_interp.points import editable
from moe_interp.run import Indices, Run, positions_of

Ablation = Literal["zero", "mean", "resample", "forbid"]

# ---- what experts put out ----------------------------------------------------------------------------------


@checked
def ablate(
    *,
    layer: Indices,
    expert: Indices,
    how: Ablation = "zero",
    mean: Mapping[tuple[int, int], Tensor] | None = None,
    run: Run | None = None,
    seed: int = 0,
    positions: Indices = None,
    tokens: Marks = None,
) -> Intervention:
    """Take experts out. What takes their place is a choice, and the answers differ.

    Args:
        layer, expert: one or several, every expert at every layer; None: all, where ``how`` is "zero". Experts that are
            forbidden, or get another contribution, must be named, and the layers of means.
        how: "zero": their contribution is zero, the others keep their weights, nothing is re-routed. "mean": it is its
            mean over tokens that route to the expert. "resample": it is the one to a random such token of another run.
            "forbid": they cannot be chosen, and the next best run (`mask`).
        mean: for "mean", the mean contribution [D] by (layer, expert): `moe.mean_contributions`.
        run: for "resample", a run that read ``expert_out`` at these layers.
        seed: for "resample".
        positions: of real tokens, negative ones from the end; None: all.
        tokens: marks of real tokens, [B, S] or [S]; None: all.

    Raises:
        BadInput: what ``how`` needs is missing, what it does not use is given, or ``run`` never used an expert.
    """
    check_used(how, mean=mean, run=run)
    match how:
        case "zero":
            return scale(layer=layer, expert=expert, by=0.0, positions=positions, tokens=tokens)
        case "forbid":
            return mask(layer=layer, expert=expert, positions=positions, tokens=tokens)
        case "mean" if mean is not None:
            layers, experts = some(layer, "layer", _WRITTEN), some(expert, "expert", _WRITTEN)
            vectors = [mean_of(mean, pair) for pair in _pairs(layers, experts)]
            widths = sorted({len(vector) for vector in vectors})
            if len(widths) > 1:
                raise BadInput("means of several widths", expected="one width", got=" and ".join(map(str, widths)))
            return Mean(experts=experts, means=Values.of(torch.stack(vectors)), **where(layers, positions, tokens))
        case "resample" if run is not None:
            layers, experts = layers_of(run, layer), some(expert, "expert", _WRITTEN)
            pools = [_used(run, *pair) for pair in _pairs(layers, experts)]
            return Resample(
                experts=experts,
                means=Values.of(torch.cat(pools)),
                counts=tuple(map(len, pools)),
                seed=seed,
                **where(layers, positions, tokens),
            )
    needed = "mean=moe.mean_contributions(model, corpus)" if how == "mean" else "run=model.run(..., read='expert_out')"
    raise BadInput(f"ablation by {how} needs more", expected=needed, got="None")


def check_used(how: Ablation, **given: object) -> None:
    """Refuse ``mean`` or ``run`` beside an ablation that makes no use of it.

    Raises:
        BadInput: it would be ignored.
    """
    for name, value in given.items():
        if value is not None and name != {"mean": "mean", "resample": "run"}.get(how):
            user = "mean" if name == "mean" else "resample"
            raise BadInput(
                f"{name} is not used by how={how!r}",
                expected=f"no {name}, or how={user!r}",
                got=f"{name}={shown(value)}",
            )


_WRITTEN = "Name them: each has a contribution of its own."


def _pairs(layers: Iterable[int], experts: Iterable[int]) -> list[tuple[int, int]]:
    """Each layer with each expert, once."""
    return list(dict.fromkeys(product(layers, experts)))


def mean_of(means: Mapping[tuple[int, int], Tensor], pair: tuple[int, int]) -> Tensor:
    """[D], what is put in place of an expert's contribution.

    Raises:
        BadInput: there is none of this (layer, expert), or no vector.
    """
    try:
        found = means[pair]
    except KeyError:
        raise BadInput(
            f"no mean of expert {pair[1]} of layer {pair[0]}", expected="means by (layer, expert)", got="none of this"
        ) from None
    if found.dim() != 1:
        raise BadInput(
            f"no mean contribution of expert {pair[1]} of layer {pair[0]}",
            expected="a vector [D]",
            got=str(tuple(found.shape)),
        )
    return found


def _used(run: Run, layer: int, expert: int) -> Tensor:
    """[n, D], the contributions of an expert to the tokens of a run that used it."""
    outputs, weights, used = run.contribution(layer, expert)
    if not bool(used.any()):
        raise BadInput(
            f"the run never used expert {expert} of layer {layer}",
            expected="a run with a token that chose it",
            got="none",
            do="Take a longer text, or another kind of ablation.",
        )
    return outputs[used] * weights[used].to(outputs)[:, None]


@checked
def scale(*, layer: Indices, expert: Indices, by: float, positions: Indices = None, tokens: Marks = None) -> Scale:
    """Multiply the outputs of experts (None: of all) by a factor, at these tokens."""
    return Scale(experts=positions_of(expert), by=by, **where(layer, positions, tokens))


@checked
def replace(
    values: Any,
    *,
    layer: Indices,
    expert: Indices = None,
    point: str | None = None,
    positions: Indices = None,
    tokens: Marks = None,
) -> Intervention:
    """Put values in place of experts' outputs, or of a point.

    Args:
        values: [D], for every token; or [B, S, ...], a value for each real token of each text.
        layer: one or several (None: the embedding, or all layers of the point).
        expert: whose outputs; weights stay as they are.
        point: or which point.
        positions, tokens: as in `ablate`.
    """
    stored, here = _values(values), where(layer, positions, tokens)
    if point is None:
        return SetOutput(experts=some(expert, "expert", _OR_POINT), values=stored, **here)
    _refuse_both(point, expert)
    return SetPoint(point=editable(point).name, values=stored, **here)


_OR_POINT = "Name experts, or a point."


def _values(given: Any) -> Values | ByToken:
    stored = Values.of(given)
    return ByToken.of(stored.tensor) if stored.tensor.dim() > 2 else stored


def _refuse_both(point: str, expert: Indices) -> None:
    if expert is not None:
        raise BadInput(
            "a point or an expert",
            expected="one of them: an expert's outputs are 'expert_out'",
            got=f"{point!r} and both",
        )


@checked
def steer(
    vector: Any,
    *,
    layer: Indices,
    expert: Indices = None,
    point: str | None = None,
    by: float = 1.0,
    positions: Indices = None,
    tokens: Marks = None,
) -> Intervention:
    """Add a vector to experts' outputs, or to a point (a residual point, say).

    Args:
        vector: [D].
        layer, expert, point, positions, tokens: as in `replace`.
        by: a factor for the vector.
    """
    stored, here = Values.of(vector, "a vector"), where(layer, positions, tokens)
    if point is None:
        return AddToOutput(experts=some(expert, "expert", _OR_POINT), vector=stored, by=by, **here)
    _refuse_both(point, expert)
    return AddToPoint(point=editable(point).name, vector=stored, by=by, **here)


@checked
def noise(
    std: float,
    *,
    point: str = "embed",
    layer: Indices = None,
    seed: int = 0,
    positions: Indices = None,
    tokens: Marks = None,
) -> Noise:
    """Add Gaussian noise to a point: the corruption of causal tracing (Meng et al. 2022, arXiv 2202.05262)."""
    return Noise(point=editable(point).name, std=std, seed=seed, **where(layer, positions, tokens))


@checked
def patch(
    run: Run,
    *,
    layer: Indices,
    expert: Indices = None,
    point: str | None = None,
    positions: Indices = None,
    tokens: Marks = None,
) -> Intervention:
    """Put what another run had in place of this one's, token by token: the n-th real token's at the n-th.

    Args:
        run: of as many texts (or of one). For experts it must have read ``expert_out`` at these layers, for a point
            that point, at all positions.
        layer: one or several (None: all MoE layers, or a point of the whole model).
        expert: whose contributions (weight times output; 0 at tokens that did not use the expert, in either run). Slots
            do not matter, and routes stay: `patch_route` is the other half.
        point: or which point; one layer.
        positions, tokens: as in `ablate`.

    Raises:
        UnknownName: the run did not read what is needed.
    """
    if point is None:
        layers, experts = layers_of(run, layer), some(expert, "expert", _OR_POINT)
        found = [run.contribution(*pair) for pair in _pairs(layers, experts)]
        return Patch(
            experts=experts,
            outputs=tuple(ByToken.of(outputs, run.tokens) for outputs, _, _ in found),
            weights=tuple(ByToken.of(weights, run.tokens) for _, weights, _ in found),
            **where(layers, positions, tokens),
        )
    _refuse_both(point, expert)
    given = positions_of(layer)
    if given is not None and len(given) > 1:
        raise BadInput("a point of several layers", expected="one layer", got=str(given))
    value = run.whole(editable(point).name, None if given is None else given[0])
    return SetPoint(point=point, values=ByToken.of(value, run.tokens), **where(layer, positions, tokens))


# ---- who is chosen -----------------------------------------------------------------------------------------


@checked
def patch_route(run: Run, *, layer: SupportsIndex, positions: Indices = None, tokens: Marks = None) -> Force:
    """Put another run's experts and weights in place of this one's, token by token; outputs are computed anew."""
    at = whole(layer)
    if at not in run.routing:
        raise BadInput(f"the run has no routing at layer {at}", expected=f"one of {list(run.routing)}", got=str(at))
    routing = run.routing[at]
    ids, weights = (ByToken.of(value, run.tokens) for value in (routing.ids, routing.weights))
    return Force(experts=ids, weights=weights, **where(at, positions, tokens))


@checked
def force(
    experts: Any,
    *,
    layer: Indices,
    weights: Any = "own",
    positions: Indices = None,
    tokens: Marks = None,
) -> Force:
    """Make these experts run.

    Args:
        experts: up to K ids for every token, or ids [B, S, K] of each.
        layer: one or several (None: all).
        weights: "own": each gets the weight of the router's own recipe on its scores (renormalised only if the model
            does that), and fewer than K experts are joined by the router's best others. "kept": each slot keeps its
            weight. Numbers, or [B, S, K]: these, and no other expert counts.
        positions, tokens: as in `ablate`.
    """
    each = isinstance(experts, Tensor) and experts.dim() > 1
    ids = ByToken.of(experts if experts.dim() > 2 else experts[None]) if each else some(experts, "expert")
    if isinstance(weights, Tensor) and weights.dim() > 1:
        weights = ByToken.of(weights if weights.dim() > 2 else weights[None])
    elif not isinstance(weights, str | ByToken):
        if not is_finite(weights) and (not isinstance(weights, Iterable) or getattr(weights, "ndim", 1) == 0):
            raise BadInput("weights to force", expected="'own', 'kept' or numbers", got=shown(weights))
        weights = (weights,) if is_finite(weights) else tuple(weights)
    return Force(experts=ids, weights=weights, **where(layer, positions, tokens))


_NOT_ALL = "A router must choose; to have none contribute: moe.ablate(layer=..., expert=None)."


@checked
def mask(
    *,
    layer: Indices,
    expert: Indices,
    on: Literal["selection", "logits"] = "selection",
    positions: Indices = None,
    tokens: Marks = None,
) -> Mask:
    """Forbid experts, which must be named (``layer`` None: at all MoE layers).

    ``on`` the selection, after any selection bias and choice of groups: the next best run, with the weights that the
    router's recipe gives them on its scores as they were. On the logits: they are minus infinity, which changes the
    weights of the others where these come from a softmax over all, and does not forbid where a bias is added later.
    """
    return Mask(experts=some(expert, "expert", _NOT_ALL), on=on, **where(layer, positions, tokens))


@checked
def bias(
    *,
    layer: Indices,
    expert: Indices,
    by: float,
    on: Literal["selection", "logits"] = "selection",
    positions: Indices = None,
    tokens: Marks = None,
) -> Bias:
    """Push experts (or hold them back; None: all) by a number added to their selection scores, or to their logits.

    Selection scores are what the router's top-k looks at: probabilities in most models, logits in some; a push on them
    changes no weight of an expert that was chosen anyhow.
    """
    return Bias(experts=positions_of(expert), by=by, on=on, **where(layer, positions, tokens))


@checked
def randomize(
    *,
    layer: Indices = None,
    weights: Literal["kept", "fresh"] = "kept",
    seed: int = 0,
    positions: Indices = None,
    tokens: Marks = None,
) -> Randomize:
    """Route at random: K different experts a token, uniformly (Poetzscher's control).

    The weights are those that the router gave its own choice, slot by slot, or fresh ones by its recipe. A token's draw
    depends on the seed, the layer, and the text up to the token alone.
    """
    return Randomize(weights=weights, seed=seed, **where(layer, positions, tokens))


@checked
def swap(
    *, layer: Indices = None, experts: Iterable[SupportsIndex] | None = None, layers: Indices = None,
    positions: Indices = None, tokens: Marks = None,
) -> Intervention:  # fmt: skip
    """Swap two experts of a layer (``layer=5, experts=(3, 7)``), or all experts of two layers (``layers=(3, 5)``)."""
    if (layers is None) == (experts is None) or (layers is not None and layer is not None):
        given = {"layer": layer, "experts": experts, "layers": layers}
        named = ", ".join(name for name, value in given.items() if value is not None)
        raise BadInput("what to swap", expected="layer and two experts, or two layers", got=named or "neither")
    if experts is None:
        return SwapLayers(**where(layers, positions, tokens))
    return Swap(experts=some(tuple(experts), "expert"), **where(layer, positions, tokens))


@checked
def top_k(
    k: SupportsIndex,
    *,
    renormalise: bool = False,
    layers: Indices = None,
    positions: Indices = None,
    tokens: Marks = None,
) -> TopK:
    """Keep only the k heaviest experts of each token, shared experts untouched. Those dropped are not computed.

    With ``k`` above the model's own K the router chooses k by its own recipe. ``renormalise`` rescales the kept
    weights to the total that K experts would have; off, as in MoE-Lens, the dropped weight is lost.

    Raises:
        BadInput: k below 1, or (when run) above the number of experts.
    """
    return TopK(k=whole(k), renormalise=renormalise, **where(layers, positions, tokens))


@checked
def share(
    of_weight: Fraction,
    *,
    renormalise: bool = False,
    layers: Indices = None,
    positions: Indices = None,
    tokens: Marks = None,
) -> Share:
    """Keep the fewest experts of each token whose weights reach a share of their sum; those dropped are not computed.

    Raises:
        BadInput: a share that is not above 0 and up to 1.
    """
    return Share(share=of_weight, renormalise=renormalise, **where(layers, positions, tokens))


# ---- anything ----------------------------------------------------------------------------------------------


@checked
def apply(
    point: str,
    fn: Callable[[Tensor], Tensor],
    *,
    layers: Indices = None,
    positions: Indices = None,
    tokens: Marks = None,
) -> Apply:
    """Change a point by any pure function from its value to a tensor of the same shape and dtype.

    Without ``positions`` and ``tokens`` the function's result replaces the whole value, padding included; with them
    only the rows of these real tokens are replaced.

    Raises (when run):
        UnknownName: no such point or layer in the model.
        BadInput: the point is read-only, or ``fn`` returned another shape or dtype.
    """
    return Apply(point=point, fn=fn, **where(layers, positions, tokens))
