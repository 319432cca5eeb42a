"""Activation patching: values of one run put into another, one place at a time, and what that does to a metric.

Take a clean prompt and a corrupted one of as many tokens. From one of the runs, the base, the value at one place is
replaced by what the other run had there, and the rest runs freely (Vig et al. 2020, arXiv 2004.12265; Meng et al. 2022,
arXiv 2202.05262; Zhang and Nanda 2024, arXiv 2309.16042). In a mixture of experts places have two halves, which are
patched apart: what an expert contributes (values) and who is chosen with which weight (the route).
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from moe_interp.analyses.effects import contribution
from moe_interp.analyses.inputs import moe_layers
from moe_interp.analyses.trials import (
    BOUNDS,
    Direction,
    Pair,
    Trial,
    contributions,
    differs,
    effects,
    paired,
    put,
    summary,
)
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.encode import Inputs
from moe_interp.errors import BadInput
from moe_interp.interventions import Intervention, patch, patch_route
from moe_interp.interventions.base import layers_at
from moe_interp.model import MoEModel
from moe_interp.points import editable
from moe_interp.results import labelled
from moe_interp.run import Indices, Run, positions_of

Over = Literal["experts", "positions", "ranks", "routes"]
_READS = {"experts": ("expert_out",), "ranks": ("expert_out", "routed_out"), "routes": (), "positions": ()}


@checked
@torch.no_grad()
def activation_patching(
    model: MoEModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Any,
    *,
    over: Over = "experts",
    point: str | None = None,
    direction: Direction = "restore",
    layers: Indices = None,
    resamples: Draws = 1000,
    seed: Seed = 0,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Put single values of one run into another of a matching prompt, and measure what that does.

    A value that is the same in both runs, to the last bit, is not patched and its effect is 0 exactly: of experts that
    neither run uses, and of what comes before the first token that differs, as far as it does not differ by rounding.

    Args:
        model: a causal language model.
        clean, corrupted: a text each, or as many; the two of a pair have as many tokens.
        metric: "nll", "kl", a metric such as ``moe.LogitDifference(" he", " she")``, or a function of a text's logits
            [s, V]. It is bound to the clean run, whichever is the base: "nll" is that of the clean text's tokens, "kl"
            the divergence from the clean run.
        over: "experts": an expert's contribution to each token (weight times output, 0 where it was not chosen) in
            place of the same expert's, routes as they are. "ranks": the contribution of the other run's j-th heaviest
            slot of each token in place of that of the base's. "routes": all ids and weights of a layer, whose outputs
            the experts compute from the base's own input. "positions": all of a point's value at one token.
        point: for "positions", any point that layers have and that can be edited (None: "resid_post").
        direction: "restore": the base is the corrupted run, and clean values are put in. "corrupt": the other way.
        layers: None: all that have it.
        resamples, seed: of the intervals over texts.
        batch_tokens: the most tokens in one pass, padding included (those of one text at least).

    Returns:
        Dims text, layer, then expert, position or rank (1: the heaviest); routes have none; and bound (low, high).

        ``clean``, ``corrupted`` (text): the metric of both runs, in its units. ``effect``: the metric of the patched
        run less that of the base; ``effect_mean``, ``effect_interval``: its mean over texts. ``normalised``: effect /
        (other - base), 0 for nothing, 1 for all of the difference; it may leave that range, and is NaN where the runs
        do not differ; ``normalised_overall``, ``normalised_interval``: of the sums over texts. ``tokens``: at how many
        tokens of a text both runs differ there. NaN where a layer has no such expert or a text no such token. Intervals
        are 95 %, by bootstrap over texts, and NaN for one text.

    Raises:
        BadInput: texts that do not pair up, an unknown option or metric, a point that layers do not have.
        UnknownName: no such point or layer.
        UnsupportedModel: a model that does not predict the next token.
    """
    if over != "positions" and point is not None:
        raise BadInput("a point is patched over positions", expected="over='positions', or no point", got=over)
    point = (point or "resid_post") if over == "positions" else None
    chosen = moe_layers(model, layers) if point is None else layers_with(model, point, layers)
    pair = paired(model, clean, corrupted, metric, direction, _READS[over] if point is None else [point])
    groups = (_trials(pair, over, point, number, layer) for number, layer in enumerate(chosen))
    dims, coords = _axes(model, pair, over, chosen)
    shape = (len(chosen), *map(len, coords.values()))
    found = effects(
        pair.restart, pair.bound, pair.base_values, groups, shape, batch_tokens=batch_tokens, name="patching"
    )
    if over == "positions":
        short = np.arange(shape[1]) >= pair.base.mask.sum(dim=1).cpu().numpy()[:, None]
        found.effects[np.broadcast_to(short[:, None], found.effects.shape)] = np.nan
    return labelled(
        pair.variables() | summary(found, dims, pair.metric.units, gap=pair.gap, resamples=resamples, seed=seed),
        {"text": list(range(len(pair.base_values))), "layer": list(chosen), **coords, "bound": list(BOUNDS)},
        analysis="activation_patching",
        provenance={
            **pair.provenance(), "over": over, "point": point or "", "resamples": resamples, "seed": seed,
        },
    )  # fmt: skip


def layers_with(model: MoEModel, point: str, layers: Indices) -> tuple[int, ...]:
    """The layers of the text model that have a point: those asked for, each once; all for None.

    Raises:
        UnknownName: no such point or layer.
        BadInput: a point that cannot be edited, or that no such layer has.
    """
    main = {layer.index for layer in model.spec.main_layers}
    found = layers_at(model.spec, editable(point).name, positions_of(layers))
    there = tuple(dict.fromkeys(layer for layer in found if layer is not None and layer in main))
    if not there:
        raise BadInput(f"point {point!r} is not of layers", expected="a point that layers have", got=repr(point))
    return there


def experts_that_run(model: MoEModel, layer: int) -> int:
    """How many experts of a layer can run, the first ones."""
    moe = model.spec.moe(layer)
    return moe.num_experts if moe.runs is None else moe.runs


# ---- what there is to patch at a layer ---------------------------------------------------------------------


def _trials(pair: Pair, over: Over, point: str | None, number: int, layer: int) -> Iterator[Trial]:
    match over:
        case "experts":
            return _experts(pair, number, layer)
        case "ranks":
            return _ranks(pair, number, layer)
        case "routes":
            return _routes(pair, number, layer)
        case "positions":
            return _positions(pair, number, layer, point or "")


def _experts(pair: Pair, number: int, layer: int) -> Iterator[Trial]:
    for expert in range(experts_that_run(pair.restart.model, layer)):
        base, other = (contribution(run, layer, expert) for run in (pair.base, pair.other))
        where = differs(base, other, pair.base.tokens)
        yield Trial((number, expert), where, partial(_patched, pair.other, layer, expert))


def _patched(run: Run, layer: int, expert: int) -> list[Intervention]:
    return [patch(run, layer=layer, expert=expert)]


def _ranks(pair: Pair, number: int, layer: int) -> Iterator[Trial]:
    base, other = (_by_rank(run, layer) for run in (pair.base, pair.other))
    for rank in range(base.shape[2]):
        change = other[:, :, rank] - base[:, :, rank]
        where = differs(base[:, :, rank], other[:, :, rank], pair.base.tokens)
        yield Trial((number, rank), where, partial(_added, pair.base, layer, change))


def _by_rank(run: Run, layer: int) -> Float[Tensor, "B S K D"]:
    values, order = contributions(run, layer), run.routing[layer].by_rank()
    return values.gather(2, order[..., None].expand_as(values))


def _added(base: Run, layer: int, change: Float[Tensor, "B S D"]) -> list[Intervention]:
    # Nothing before this point changes, so that what the base run had there is there.
    return [put("routed_out", layer, base["routed_out", layer] + change, base.tokens)]


def _routes(pair: Pair, number: int, layer: int) -> Iterator[Trial]:
    base, other = (run.routing[layer] for run in (pair.base, pair.other))
    where = differs(base.ids, other.ids, pair.base.tokens) | differs(base.weights, other.weights, pair.base.tokens)
    yield Trial((number,), where, lambda: [patch_route(pair.other, layer=layer)])


def _positions(pair: Pair, number: int, layer: int, point: str) -> Iterator[Trial]:
    where = differs(pair.base[point, layer], pair.other[point, layer], pair.base.tokens)
    whole: Any = patch(pair.other, layer=layer, point=point)
    for position in range(_longest(pair)):
        here = where & pair.base.tokens.at((position,))
        yield Trial((number, position), here, partial(_at_position, whole, position))


def _at_position(whole: Any, position: int) -> list[Intervention]:
    return [dataclasses.replace(whole, positions=(position,))]


def _longest(pair: Pair) -> int:
    return int(pair.base.mask.sum(dim=1).max())


def _axes(
    model: MoEModel, pair: Pair, over: Over, layers: tuple[int, ...]
) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Dims after that of texts, and the coordinates of the last."""
    match over:
        case "experts":
            most = max(experts_that_run(model, layer) for layer in layers)
            return ("layer", "expert"), {"expert": list(range(most))}
        case "ranks":
            most = max(pair.base.routing[layer].ids.shape[-1] for layer in layers)
            return ("layer", "rank"), {"rank": list(range(1, most + 1))}
        case "positions":
            return ("layer", "position"), {"position": list(range(_longest(pair)))}
        case "routes":
            return ("layer",), {}
