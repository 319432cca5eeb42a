"""What each expert is worth: the exact effect of taking it out, one expert after another.

1. The batch runs once, and the metric is bound to that run. An expert that no token uses has no effect, and neither
   has one on a text that does not use it, or on tokens before the first that does: none of these is run.
2. The rest of the forward pass is run again for every other expert, from a cached residual (`moe_interp.restart`), with
   the same expert taken out as `moe_interp.ablate` takes it out. Where a layer's residual is a plain sum, taking out a
   contribution changes that sum by exactly the contribution, so that the run goes on from the *next* layer.
3. The effect is the metric without the expert less the metric of the run, text by text.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from moe_interp.analyses.inputs import moe_layers
from moe_interp.analyses.metrics import AnyMetric, as_metric
from moe_interp.analyses.plain import is_plain
from moe_interp.arguments import Count, Seed, checked
from moe_interp.encode import Inputs
from moe_interp.interventions import Intervention, ablate, apply, patch
from moe_interp.interventions.named import Ablation, check_used, mean_of
from moe_interp.measured import inputs_told, metric_told, values_told
from moe_interp.model import MoEModel
from moe_interp.restart import Outcome, Restart, Variant
from moe_interp.results import Description, described, labelled
from moe_interp.run import Indices, Read, Run

Means = Mapping[tuple[int, int], Tensor]
Delta = Callable[[Tensor], Tensor]
"""From the numbers [n] of texts to what is added to the layer's residual at their tokens, [n, S, D]."""

_HELD = 2**28  # bytes of expert outputs held at once; layers beyond it take another forward pass


@checked
def expert_effects(
    model: MoEModel,
    inputs: Inputs,
    metric: AnyMetric = "nll",
    how: Ablation = "zero",
    *,
    layers: Indices = None,
    mean: Means | None = None,
    seed: Seed = 0,
    batch_tokens: Count = 1024,
) -> xr.Dataset:
    """The exact effect of taking out every expert of every layer, one at a time.

    Args:
        model: any opened model.
        inputs: texts, as `MoEModel.run` takes them, in one batch.
        metric: "nll", "kl", a metric such as ``moe.LogitDifference(" he", " she")``, or a function from the logits
            [s, V] of one text's real tokens to a number.
        how: what takes the expert's place, as in `moe_interp.ablate`. "resample" draws from these same texts.
        layers: MoE layers (None: all).
        mean: for "mean", the mean contribution [D] by (layer, expert); None: over the tokens of these texts that use
            the expert.
        seed: of "resample".
        batch_tokens: the most tokens in one pass of the sweep.

    Returns:
        Dims layer, expert, text. ``effect``: the text's metric without the expert less its metric, in the metric's
        units, exactly 0 for a text that does not use the expert; ``effect_mean``, over texts, each counting alike;
        both NaN where a layer has no such expert. ``tokens`` that used it. ``base`` (text): the metric of the run.

    Raises:
        BadInput: inputs that cannot be right, an unknown metric, ``mean`` beside another ``how``, or texts that
            the metric cannot measure.
        UnknownName: a layer that is no MoE layer.
        UnsupportedModel: a metric that the model has no logits for, or a router that cannot forbid an expert.
    """
    check_used(how, mean=mean)
    chosen = moe_layers(model, layers)
    sweep = Sweep(model, inputs, metric)
    changes = removals(sweep, chosen, how, mean, seed)
    total = sum(len(used_experts(sweep.restart.base, layer)) for layer in chosen)
    found = sweep.effects(changes, total, batch_tokens)
    effects = np.full((len(chosen), model.spec.num_experts, len(sweep.base)), np.nan)
    tokens = np.zeros(effects.shape[:2], np.int64)
    for index, layer in enumerate(chosen):
        effects[index, : model.spec.moe(layer).num_experts] = 0.0
        tokens[index] = tokens_of(sweep.restart.base, layer, model.spec.num_experts).sum(dim=0).cpu().numpy()
    for (layer, expert), effect in found.items():
        effects[chosen.index(layer), expert] = effect.cpu().numpy()
    values = {
        "effect": effects,
        "effect_mean": effects.mean(axis=2),
        "tokens": tokens,
        "base": sweep.base.cpu().numpy(),
    }
    coords = {
        "layer": np.array(chosen),
        "expert": np.arange(effects.shape[1]),
        "text": np.arange(effects.shape[2]),
    }
    about = {
        **model.provenance(), **inputs_told(inputs=inputs), "metric": sweep.metric.name,
        "metric_told": metric_told(sweep.metric), "how": how, "seed": seed,
        **({} if mean is None else {"mean": values_told(*(mean[one] for one in sorted(mean)))}),
    }  # fmt: skip
    return labelled(
        described(values, _variables(sweep.metric.units)), coords, analysis="expert_effects", provenance=about
    )


def _variables(units: str) -> dict[str, Description]:
    told = "the metric without the expert less the metric of the run, 0 if it does nothing"
    return {
        "effect": (("layer", "expert", "text"), units, told),
        "effect_mean": (("layer", "expert"), units, f"mean over texts: {told}"),
        "tokens": (("layer", "expert"), "tokens", "tokens that used the expert"),
        "base": (("text",), units, "the metric of the run as it is"),
    }


# ---- what is changed ---------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A change of one expert whose effect is wanted.

    Attributes:
        layer, expert: whose.
        used: [B, S], tokens at which it changes something at that layer; False elsewhere.
        edit: makes the intervention that carries it out.
        delta: what it adds to the layer's residual, where that is a plain sum and is not found by running on.
    """

    layer: int
    expert: int
    used: Bool[Tensor, "B S"]
    edit: Callable[[], Intervention]
    delta: Delta | None = None


def used_experts(run: Run, layer: int) -> Int[Tensor, " X"]:
    """Ids of the experts of a layer that some token chose."""
    routing = run.routing[layer]
    return routing.ids[routing.mask].unique()


def tokens_of(run: Run, layer: int, experts: int) -> Int[Tensor, "B E"]:
    """How many tokens of each text used each expert."""
    routing = run.routing[layer]
    slots = routing.mask[..., None].expand_as(routing.ids)
    counts = torch.zeros(len(routing.ids), experts, dtype=torch.long, device=routing.ids.device)
    counts = counts.scatter_add(1, routing.ids.flatten(1), slots.flatten(1).long())
    for expert in routing.added:
        counts[:, expert] = routing.uses(expert).sum(dim=1)
    return counts


def removals(
    sweep: "Sweep",
    layers: Sequence[int],
    how: Ablation,
    mean: Means | None = None,
    seed: int = 0,
    only: Mapping[int, Sequence[int]] | None = None,
) -> Iterator[Change]:
    """Every expert that some token used, taken out; ``only`` some of them, by layer."""
    runs = ((layer, sweep.restart.base) for layer in layers) if how == "forbid" else sweep.with_outputs(layers)
    for layer, run in runs:
        # Zero also takes away what an expert was given without a slot; the others act at tokens that chose it.
        given = run.routing[layer].added if how == "zero" else {}
        experts = sorted({*used_experts(run, layer).tolist(), *given})
        for expert in experts if only is None else sorted({*experts} & {*only.get(layer, ())}):
            yield _removal(sweep, run, layer, expert, how, mean, seed)


def _removal(sweep: "Sweep", run: Run, layer: int, expert: int, how: Ablation, mean: Means | None, seed: int) -> Change:
    routing = run.routing[layer]
    used = routing.uses(expert) if how == "zero" else routing.slots_of(expert).any(dim=-1)
    where: dict[str, Any] = {"layer": layer, "expert": expert, "how": how, "seed": seed}
    if how in ("forbid", "resample"):
        needed: dict[str, Any] = {"run": run} if how == "resample" else {}
        return Change(layer, expert, used, partial(ablate, **where, **needed))
    if how == "zero":
        delta = partial(_replaced, run, layer, expert, None)
        return Change(layer, expert, used, partial(ablate, **where), delta if sweep.adds_up(run, layer) else None)
    target = contribution(run, layer, expert)[used].mean(dim=0) if mean is None else mean_of(mean, (layer, expert))
    delta = partial(_replaced, run, layer, expert, target)
    edit = partial(ablate, **where, mean={(layer, expert): target})
    return Change(layer, expert, used, edit, delta if sweep.adds_up(run, layer) else None)


def patches(
    sweep: "Sweep", layers: Sequence[int], other: Inputs, only: Mapping[int, Sequence[int]] | None = None
) -> Iterator[Change]:
    """Every expert that some token used, here or in other texts of the same lengths, given its contribution there."""
    pairs = zip(sweep.with_outputs(layers), sweep.with_outputs(layers, other), strict=True)
    for (layer, run), (_, there) in pairs:
        sides = [(used_experts(one, layer).tolist(), one.routing[layer].added) for one in (run, there)]
        experts = sorted({expert for used, given in sides for expert in (*used, *given)})
        for expert in experts if only is None else sorted({*experts} & {*only.get(layer, ())}):
            used = [one.routing[layer].uses(expert) for one in (run, there)]
            edit = partial(patch, there, layer=layer, expert=expert)
            delta = partial(_patched, run, there, layer, expert) if sweep.adds_up(run, layer) else None
            yield Change(layer, expert, used[0] | used[1], edit, delta)


def contribution(run: Run, layer: int, expert: int) -> Float[Tensor, "B S D"]:
    """What an expert added to ``routed_out``; 0 at tokens that did not use it."""
    outputs, weights, _ = run.contribution(layer, expert)
    return outputs * weights.to(outputs)[..., None]


def _replaced(run: Run, layer: int, expert: int, by: Tensor | None, texts: Tensor) -> Float[Tensor, "n S D"]:
    """A contribution, taken off where the expert was used and replaced ``by`` a vector (None: nothing)."""
    outputs, weights, used = (value[texts] for value in run.contribution(layer, expert))
    removed = outputs * weights.to(outputs)[..., None]
    return -removed if by is None else torch.where(used[..., None], by.to(removed) - removed, 0.0)


def _patched(run: Run, other: Run, layer: int, expert: int, texts: Tensor) -> Float[Tensor, "n S D"]:
    """Another run's contribution less this one's."""
    return contribution(other, layer, expert)[texts] - contribution(run, layer, expert)[texts]


# ---- what that does ----------------------------------------------------------------------------------------


class Sweep:
    """A batch, a metric of it, and what changes of its experts do to that.

    Attributes:
        restart: the run of the batch, of which the rest can be run again.
        metric: what is measured.
        bound: the same, bound to that run.
        base: [B], the metric of each text in it.
    """

    def __init__(self, model: MoEModel, inputs: Inputs, metric: AnyMetric):
        self.model, self.metric = model, as_metric(metric, model)
        self.restart = Restart(model, inputs)
        base = self.restart.base
        self.bound = self.metric.bind(base)
        texts, columns = self.bound.at.nonzero().T
        self._values = torch.zeros(self.bound.at.shape, dtype=torch.float64, device=self.bound.at.device)
        self._values[texts, columns] = self.bound.values(base.logits[texts, columns], texts, columns).double()
        self._counts = self.bound.at.sum(dim=1)
        self.base = self._values.sum(dim=1) / self._counts

    def effects(
        self, changes: Iterable[Change], total: int, batch_tokens: int
    ) -> dict[tuple[int, int], Float[Tensor, " B"]]:
        """The effect of each of ``total`` changes on each text, by layer and expert, in the metric's units."""
        found: dict[tuple[int, int], Tensor] = {}
        with tqdm(total=total, desc="effects of experts", unit="expert", leave=False) as progress:
            for _, layer in groupby(changes, attrgetter("layer")):
                some = list(layer)
                found |= {(one.layer, one.expert): torch.zeros_like(self.base) for one in some}
                variants = [self._variant(change) for change in some]
                for outcome in self.restart.run(variants, self.bound.at, batch_tokens=batch_tokens):
                    change = some[outcome.number]
                    found[change.layer, change.expert] += self.difference(outcome)
                    progress.update()
        return found

    def difference(self, outcome: Outcome) -> Float[Tensor, " B"]:
        """The metric of every text in a variant less that of the run; tokens that are not there did not change."""
        texts, columns = outcome.texts, outcome.columns
        if not len(texts):
            return torch.zeros_like(self.base)
        changed = self.bound.values(outcome.logits, texts, columns).double() - self._values[texts, columns]
        return torch.zeros_like(self.base).index_add(0, texts, changed) / self._counts

    def _variant(self, change: Change) -> Variant:
        """The restart that shows a change's effect, on the texts and tokens that it can reach."""
        at = self.bound.at & self._reached(change)
        texts = at.any(dim=1).nonzero().flatten() if self.restart.separable else self.restart.tokens.texts
        if change.delta is None or not self.restart.exact:
            return Variant([change.edit()], texts, at)
        return Variant([_added(change.layer + 1, change.delta, texts)], texts, at)

    def _reached(self, change: Change) -> Bool[Tensor, "B S"]:
        """[B, S], the tokens whose logits may differ."""
        whole = torch.ones_like(self.bound.at)
        if not self.restart.separable:
            return whole
        # An edit that stands may carry a change to earlier tokens.
        if not (self.restart.exact and self.bound.by_token) or self.restart.edits:
            return whole & change.used.any(dim=1, keepdim=True)
        if change.layer == self.restart.layers[-1] and is_plain(self.model, change.layer):
            return change.used  # nothing mixes positions any more
        return change.used.cumsum(dim=1) > 0  # a causal model: tokens before the first are as they were

    def adds_up(self, run: Run, layer: int) -> bool:
        """Whether a contribution taken off a layer's residual is the same change of what the next layer is given."""
        # An edit that stands may do anything to a residual that is changed.
        if self.restart.edits or ("resid_post", layer) not in run.values or layer + 1 not in self.restart.layers:
            return False
        return is_plain(self.model, layer) and torch.equal(
            run["resid_post", layer], self.restart.base["resid_pre", layer + 1]
        )

    def with_outputs(self, layers: Sequence[int], inputs: Inputs | None = None) -> Iterator[tuple[int, Run]]:
        """Each layer with a run that read ``expert_out`` there, and ``resid_post``; a few layers a pass."""
        given = self.restart.inputs if inputs is None else inputs
        spec = self.model.spec
        size = self.restart.tokens.mask.numel() * spec.top_k * spec.d_model * self.model.dtype.itemsize
        together = max(1, _HELD // size)
        for first in range(0, len(layers), together):
            part = tuple(layers[first : first + together])
            read = [Read("expert_out", part), Read("resid_post", part)]
            run = self.model.run(given, read=read, output=False)
            yield from ((layer, run) for layer in part)


def _added(layer: int, delta: Delta, texts: Int[Tensor, " n"]) -> Intervention:
    return apply("resid_pre", lambda value: value + delta(texts).to(value), layers=layer)
