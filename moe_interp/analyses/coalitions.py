"""Experts taken out together: what each is worth, what pairs are worth beyond that, and Shapley values.

v(S) is the effect on a metric of ablating the experts S at once, v of nobody 0.

1. The interaction of a set is what its smaller sets do not explain (Harsanyi 1963): I(S) = sum over T in S of
   (-1)^(|S| - |T|) v(T). Of one expert it is the effect, of two I(a, b) = v(ab) - v(a) - v(b): above 0 they stand in
   for one another (losing both costs more than the sum), below 0 they work at the same thing or against each other,
   where a rise of the metric is a loss.
2. The Shapley value (Shapley 1953) shares v of all among the experts: I(S) in equal parts to the members of each S.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from moe_interp.analyses.metrics import as_metric
from moe_interp.analyses.plain import check_writes_text
from moe_interp.analyses.trials import BOUNDS, Trial, effects, summary
from moe_interp.arguments import CheckedLater, Count, Draws, Seed, checked, index
from moe_interp.encode import Inputs
from moe_interp.errors import BadInput
from moe_interp.interventions import Intervention, ablate
from moe_interp.interventions.named import Ablation
from moe_interp.measured import edits_told, inputs_told, metric_told
from moe_interp.model import MoEModel
from moe_interp.restart import Restart
from moe_interp.results import Variable, labelled
from moe_interp.run import Run
from moe_interp.stats import bootstrap_mean

Expert = tuple[int, int]
MOST = 2**12  # subsets


@checked
@torch.no_grad()
def coalitions(
    model: MoEModel,
    text: Inputs,
    experts: Annotated[Sequence[Expert], CheckedLater()],
    metric: Any,
    *,
    how: Ablation = "zero",
    size: Count = 2,
    mean: Mapping[Expert, Tensor] | None = None,
    run: Run | None = None,
    resamples: Draws = 1000,
    seed: Seed = 0,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Ablate experts one by one and together.

    Args:
        model: a causal language model.
        text: one or several.
        experts: (layer, expert) of each.
        metric: "nll", "kl", a metric such as ``moe.LogitDifference(" he", " she")``, or a function of a text's logits
            [s, V].
        how, mean, run: as in `moe.ablate`.
        size: of the largest sets; 2: every pair. That of all experts gives Shapley values.
        resamples: of the intervals over texts.
        seed: of the intervals, and of "resample".
        batch_tokens: the most tokens in one pass, padding included (those of one text at least).

    Returns:
        Dims text, coalition ("3.17+5.2": expert 17 of layer 3 with expert 2 of layer 5), expert ("3.17"), bound.

        ``base`` (text): the metric of the untouched run. ``effect`` (text, coalition): the metric without these experts
        less that; 0 exactly in a text that uses none of them. ``interaction``: what smaller sets do not explain, for a
        pair effect(ab) - effect(a) - effect(b), for one expert its effect. Each with ``_mean`` over texts and
        ``_interval``: 95 %, over texts, NaN for one. ``tokens``: how many tokens of a text use any.
        ``member`` (coalition, expert): 1 or 0; ``size`` (coalition). With sets of all sizes ``shapley`` (text, expert),
        which sums to the effect of all, ``shapley_mean``, ``shapley_interval``. All in the metric's units.

    Raises:
        BadInput: no experts, one named twice, a size out of range, more than 4,096 sets, an unknown metric or ablation,
            an ablation that lacks what it needs or leaves a router too few experts.
        UnknownName: no such layer or expert.
        UnsupportedModel: a model that does not predict the next token.
    """
    check_writes_text(model)
    listed = _checked(model, experts, size)
    sets = [one for count in range(1, size + 1) for one in combinations(range(len(listed)), count)]
    edits = [ablate(layer=one[0], expert=one[1], how=how, mean=mean, run=run, seed=seed) for one in listed]
    bindable, restart = as_metric(metric, model), Restart(model, text)
    bound = bindable.bind(restart.base)
    base = bound.of(restart.base)
    trials = _trials(restart, listed, sets, edits)
    found = effects(restart, bound, base, [trials], (len(sets),), batch_tokens=batch_tokens, name="coalitions")
    units, over_texts = bindable.units, partial(_over_texts, resamples=resamples, seed=seed)
    dividends = interactions(found.effects, sets)
    variables = {
        "base": Variable(("text",), base.numpy(), units, "the metric of the untouched run"),
        **summary(found, ("coalition",), units, resamples=resamples, seed=seed),
        **over_texts("interaction", "coalition", dividends, units, "what smaller sets do not explain of the effect"),
        "member": Variable(("coalition", "expert"), _members(sets, len(listed)), "1", "1 for experts in it, else 0"),
        "size": Variable(("coalition",), [len(one) for one in sets], "experts", "how many experts are in it"),
    }
    if size == len(listed):
        shares = shapley(dividends, sets, len(listed))
        variables |= over_texts("shapley", "expert", shares, units, "the expert's share in the effect of all")
    names = [f"{layer}.{expert}" for layer, expert in listed]
    return labelled(
        variables,
        {
            "text": list(range(len(base))), "coalition": ["+".join(names[one] for one in some) for some in sets],
            "expert": names, "bound": list(BOUNDS),
        },
        analysis="coalitions",
        provenance={
            **model.provenance(), **inputs_told(inputs=text), "metric": bindable.name,
            "metric_told": metric_told(bindable), "how": how, "size": size,
            **inputs_told(ablations=edits_told(edits)), "resamples": resamples, "seed": seed,
        },
    )  # fmt: skip


def _checked(model: MoEModel, experts: Sequence[Expert], size: int) -> list[Expert]:
    try:
        listed = [(index(layer), index(expert)) for layer, expert in experts]
    except (TypeError, ValueError):
        do = "Write [(5, 3), (5, 7)] for experts 3 and 7 of layer 5."
        raise BadInput("not a set of experts", expected="(layer, expert) of each", got=repr(experts), do=do) from None
    if not listed or len(set(listed)) < len(listed):
        raise BadInput("not a set of experts", expected="(layer, expert) of each, once", got=str(listed))
    for one in listed:
        model.spec.check_runs(*one)
    if size > len(listed):
        raise BadInput("no sets of that size", expected=f"1 to {len(listed)}, the experts given", got=str(size))
    count = sum(math.comb(len(listed), one) for one in range(1, size + 1))
    if count > MOST:
        raise BadInput(
            "too many sets", expected=f"at most {MOST:,}", got=f"{count:,}", do="Take fewer or smaller ones."
        )
    return listed


def _trials(
    restart: Restart, experts: Sequence[Expert], sets: Sequence[tuple[int, ...]], edits: Sequence[Intervention]
) -> list[Trial]:
    used = [restart.base.routing[layer].uses(expert) for layer, expert in experts]
    # As long as nobody in it is used, taking a set out changes no token, nor who is chosen later.
    return [
        Trial((number,), torch.stack([used[one] for one in some]).any(dim=0), partial(_chosen, edits, some))
        for number, some in enumerate(sets)
    ]


def _chosen(edits: Sequence[Intervention], some: Iterable[int]) -> list[Intervention]:
    return [edits[one] for one in some]


def interactions(
    effect: Float[np.ndarray, "B C"], sets: Sequence[tuple[int, ...]]
) -> Float[np.ndarray, "B C"]:  # C sets, each after all that it contains
    """Of each set, its effect less the interactions of all smaller sets in it: the same as the sum in the docstring."""
    found = np.array(effect)
    place = {frozenset(one): number for number, one in enumerate(sets)}
    for number, some in enumerate(sets):
        for count in range(1, len(some)):
            for smaller in combinations(some, count):
                found[:, number] -= found[:, place[frozenset(smaller)]]
    return found


def shapley(
    dividends: Float[np.ndarray, "B C"], sets: Sequence[tuple[int, ...]], experts: int
) -> Float[np.ndarray, "B E"]:
    """Each expert's Shapley value: the interactions of all sets with it, in equal parts to their members."""
    sizes = np.array([len(one) for one in sets])
    return (dividends / sizes) @ _members(sets, experts)


def _members(sets: Sequence[tuple[int, ...]], experts: int) -> np.ndarray:
    found = np.zeros((len(sets), experts), np.int8)
    for number, some in enumerate(sets):
        found[number, list(some)] = 1
    return found


def _over_texts(
    name: str, dim: str, values: np.ndarray, units: str, meaning: str, *, resamples: int, seed: int
) -> dict[str, Variable]:
    ends = np.moveaxis(bootstrap_mean(values, resamples=resamples, seed=seed), 0, -1)
    return {
        name: Variable(("text", dim), values, units, meaning),
        f"{name}_mean": Variable((dim,), values.mean(axis=0), units, f"{meaning}; mean over texts"),
        f"{name}_interval": Variable(
            (dim, "bound"), ends, units, f"of {name}_mean: 95 %, over texts; NaN for one text"
        ),
    }
