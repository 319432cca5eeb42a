"""The labelled result of routing: every variable there is, and those that counts alone can fill.

`routing` (measured) and `routing_from_counts` (recorded by others) make the same Dataset from the same definitions;
what takes documents, weights or scores is NaN for the latter.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

import moe_interp.stats as stats
from moe_interp.analyses.exact import Provenance, Values, one_or_each
from moe_interp.results import Description, described, labelled

PER_TOKEN = ("entropy", "margin", "heaviest_weight", "weight_sum", "z_loss")


def switch_loss(
    chosen: Float[np.ndarray, "*rest E"], score: Float[np.ndarray, "*rest E"]
) -> Float[np.ndarray, "*rest"]:
    """Load-balance loss E sum_e f_e P_e: f the share of decisions, P the mean score; 0 ... E, 1 where either is even.

    With shares of tokens in place of decisions, of the K largest of a softmax of the logits, and all layers pooled
    first, it is what transformers has: K at balance, and opposite imbalances of two layers cancel.
    """
    return np.asarray(chosen.shape[-1] * (chosen * score).sum(axis=-1))


LOAD: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, str]] = {
    "n50": (
        partial(stats.coverage, share=0.5),
        "experts",
        "fewest experts that take half of the load, 1 ... E",
    ),
    "n90": (
        partial(stats.coverage, share=0.9),
        "experts",
        "fewest experts that take 90 % of the load, 1 ... E",
    ),
    "gini": (stats.gini, "1", "Gini coefficient of the load, 0 (equal) ... 1 - 1/E"),
    "load_entropy": (stats.load_entropy, "1", "entropy of the load over ln E, 0 ... 1 (equal)"),
    "max_vio": (stats.max_vio, "1", "largest over mean load minus 1 (MaxVio), 0 (equal) ... E - 1"),
    "cv2": (stats.cv2, "1", "squared coefficient of variation of the load, 0 (equal) ... E - 1"),
    "dead_experts": (
        stats.dead_experts,
        "experts",
        "experts with under a tenth of the mean load, 0 ... E - 1",
    ),
}


def taken(counts: Int[np.ndarray, "*rest L E"], top_k: Sequence[int]) -> Float[np.ndarray, "*rest L"]:
    """Tokens that took experts, K each: all real tokens, but for those that a router lets skip all experts."""
    return counts.sum(axis=-1) / np.array(top_k)


def from_counts(counts: Int[np.ndarray, "D L E"], tokens: Int[np.ndarray, " D"], top_k: Sequence[int]) -> Values:
    """Every value that follows from counts alone, by the names of `dataset`; ``top_k`` has the K of each layer."""
    experts, chosen = counts.shape[-1], np.array(top_k)
    per_token = stats.ratio(counts, taken(counts, top_k))
    values = {
        "counts": counts,
        "tokens": tokens,
        "specialization": per_token,
        "specialization_baseline": one_or_each(chosen / experts),
        "utilisation": per_token / chosen[:, None],
        "utilisation_overall": stats.shares(counts.sum(axis=0)),
        "utilisation_baseline": np.array(1 / experts),
        "entropy_baseline": np.array(np.log(experts)),
        "divergence": stats.divergence_from_rest(counts.swapaxes(0, 1)).T,
    }
    for name, (statistic, _, _) in LOAD.items():
        values[name] = statistic(counts)
        values[f"{name}_overall"] = statistic(counts.sum(axis=0))
    return values | _uniform(taken(counts, top_k), top_k, experts)


def _uniform(tokens: Float[np.ndarray, "D L"], top_k: Sequence[int], experts: int) -> Values:
    """Statistics of the load under a uniform router, means over draws."""
    layers = [
        _uniform_loads(tuple(seen), experts, k)
        for seen, k in zip(tokens.T.round().astype(int).tolist(), top_k, strict=True)
    ]
    return {f"{name}_uniform": one_or_each(np.stack([one[name] for one in layers], axis=1)) for name in LOAD}


@lru_cache(1024)  # steps of a training have as many tokens every time
def _uniform_loads(tokens: tuple[int, ...], experts: int, top_k: int) -> Values:
    drawn = stats.uniform_counts(np.array(tokens), experts, top_k, 200, np.random.default_rng(0))
    return {name: statistic(drawn).mean(axis=0) for name, (statistic, _, _) in LOAD.items()}


def by_name(per_token: Float[np.ndarray, "*rest L P"], top_k: Sequence[int], experts: int) -> Values:
    """What `PER_TOKEN` names, each [..., L]; no margin at a layer that leaves no expert out."""
    found = dict(zip(PER_TOKEN, np.moveaxis(per_token, -1, 0), strict=True))
    return found | {"margin": np.where(np.array(top_k) < experts, found["margin"], np.nan)}


# The labelled result

_DLE, _DL, _LE = ("domain", "layer", "expert"), ("domain", "layer"), ("layer", "expert")
_PLAIN: dict[str, Description] = {
    "documents": (("domain",), "documents", "documents; 0 for recorded counts, which have none"),
    "tokens": (("domain",), "tokens", "real tokens, without padding"),
    "counts": (_DLE, "tokens", "tokens of the domain that chose the expert; K for every token that takes experts"),
    "utilisation": (_DLE, "1", "share of the domain's decisions that go to the expert, 0 ... 1/K"),
    "utilisation_overall": (_LE, "1", "share of all decisions that go to the expert, 0 ... 1/K"),
    "utilisation_baseline": ((), "1", "utilisation under a uniform router, 1/E"),
    "weight_share": (_DLE, "1", "share of the domain's combine weight that goes to the expert; uniform: 1/E"),
    "specialization": (
        _DLE,
        "1",
        "share of the domain's tokens that chose the expert, of those that take any, 0 ... 1",
    ),
    "specialization_baseline": (("layer?",), "1", "specialization under a uniform router, K/E"),
    "specialization_p": (
        _DLE,
        "1",
        "p that the expert's share is no larger in the domain than in all other documents: permuted labels "
        "of documents, one-sided, adjusted for the experts of the layer by the maximum statistic",
    ),
    "entropy": (_DL, "nats", "mean entropy of a token's router scores, 0 (sure) ... ln E"),
    "entropy_baseline": ((), "nats", "entropy of equal scores, ln E"),
    "margin": (
        _DL,
        "1",
        "mean over tokens of the lowest score chosen minus the highest left out, -1 ... 1; below 0 where a "
        "bias or groups of experts overrule the scores; NaN where K = E, which leaves none out",
    ),
    "heaviest_weight": (_DL, "1", "mean combine weight of a token's heaviest slot"),
    "weight_sum": (_DL, "1", "mean sum of a token's combine weights; 1 if renormalised and not scaled"),
    "z_loss": (_DL, "1", "router z-loss: mean squared logsumexp of the router logits"),
    "load_balance": (
        ("layer",),
        "1",
        "Switch load-balance loss over all tokens, 0 ... E; 1 where loads or scores are even",
    ),
    "load_balance_as_coded": (
        (),
        "1",
        "load-balance loss as transformers codes it: layers pooled first, so that opposite imbalances "
        "cancel; K at balance (its mean over layers; of doge 1); NaN where transformers has no such loss of the model",
    ),
    "divergence": (
        _DL,
        "nats",
        "Jensen-Shannon divergence of the domain's load from the others', 0 ... ln 2",
    ),
    "divergence_null": (_DL, "nats", "mean divergence under permuted domain labels of documents"),
    "divergence_p": (
        _DL,
        "1",
        "p of the divergence: permuted labels of documents, one-sided, adjusted for the layers by the "
        "maximum statistic",
    ),
}
_INTERVALS = ("utilisation", "utilisation_overall", "weight_share", "specialization", *PER_TOKEN)
_DEBIASED = {"n50": "bootstrap", "n90": "bootstrap", "divergence": "jackknife"}


def _variables() -> dict[str, Description]:
    """Every variable of the result: dims, units, meaning."""
    found = dict(_PLAIN)
    for name, (_, units, meaning) in LOAD.items():
        found[name] = _DL, units, meaning
        found[f"{name}_overall"] = ("layer",), units, f"over all domains: {meaning}"
        found[f"{name}_uniform"] = ("domain", "layer?"), units, f"under a uniform router, same tokens: {meaning}"
    for name, method in _DEBIASED.items():
        found[f"{name}_debiased"] = (
            found[name][0],
            found[name][1],
            f"bias removed by {method}: {found[name][2]}",
        )
    for name in _INTERVALS:
        dims, units, meaning = found[name]
        found[f"{name}_interval"] = ("bound", *dims), units, f"95 % interval over documents: {meaning}"
    return found


def dataset(values: Values, domains: Sequence[str], layers: Sequence[int], provenance: Provenance) -> xr.Dataset:
    """The labelled routing result: every variable there is, NaN where ``values`` has none."""
    coords: dict[str, Any] = {
        "bound": ["low", "high"],
        "domain": list(domains),
        "layer": np.array(layers, dtype=np.int64),
        "expert": np.arange(values["counts"].shape[-1]),
    }
    table = _variables()
    missing = {name: table[name][0] for name in table.keys() - values.keys()}
    nothing = {name: np.full([len(coords[dim]) for dim in dims], np.nan) for name, dims in missing.items()}
    variables = described({name: (nothing | values)[name] for name in table}, table)
    return labelled(variables, coords, analysis="routing", provenance=provenance)
