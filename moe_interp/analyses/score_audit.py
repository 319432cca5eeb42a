"""Do scores that only look at experts say what experts are worth? Held to the exact effect of ablating each one.

1. Every document, cut to so many tokens, is scored with every expert of every layer taken out in turn
   (`moe_interp.analyses.effects`): nats per token that its absence adds.
2. On the same tokens every score: how often an expert is chosen, with which sum of weights, how large its outputs are,
   REAP's saliency (Lasby et al. 2025, arXiv 2510.13999: weight times norm, mean over the tokens that chose it) and its
   sum, the specialization for its most preferred domain; and attribution patching, which takes a gradient.
3. Spearman's rank correlation of each score and the effect, within a layer and over all layers.
4. Scores and effects of the same documents share what is peculiar to these. So scores of one half of the documents are
   also held to the effect in the other half. Beside them stands the effect in the first half: measured exactly, but a
   difference of few documents' losses, which may say less of other documents than a steady score does.
5. Controls: a random order of experts (0); and all routing of a layer put at random (Poetzscher's control), beside
   which the effect of one expert is to be seen.

Intervals of correlations are those of a jackknife over blocks of documents. A bootstrap would not do: each resample
adds the noise of the documents anew, so that all of its correlations are too low.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

import moe_interp.stats as stats
from moe_interp.analyses.attribution_patching import estimates
from moe_interp.analyses.collect import Options
from moe_interp.analyses.effects import Sweep, removals
from moe_interp.analyses.exact import UNIT
from moe_interp.analyses.norms import OutputSums, collect_outputs
from moe_interp.analyses.plain import check_writes_text
from moe_interp.arguments import Count, Draws, Parts, Seed, checked
from moe_interp.data import Batch, Corpus, batches
from moe_interp.errors import BadInput
from moe_interp.interventions import randomize
from moe_interp.model import MoEModel
from moe_interp.restart import Variant
from moe_interp.results import Description, described, labelled

SCORES = {
    "frequency": "tokens that chose the expert over tokens scored (a text's last token chooses and is not scored)",
    "weight_sum": "sum of its combine weights",
    "output_norm": "mean norm of its output, where it was chosen",
    "saliency": "mean of weight times norm, where it was chosen (REAP)",
    "saliency_sum": "sum of weight times norm",
    "specialization": "largest share of a domain's tokens over that of a uniform router",
    "attribution": "attribution patching: minus contribution times gradient",
    "attribution_path": "the same, with the mean of two gradients along the path",
    "random": "control: a random order",
}
_SPLITS = 20


@checked
def score_audit(
    model: MoEModel,
    corpus: Corpus,
    *,
    random_routers: Draws = 3,
    blocks: Parts = 20,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 1024,
) -> xr.Dataset:
    """The rank correlation of every observational score of experts with the exact effect of ablating them.

    Args:
        model: any opened model with a tokenizer that predicts the next token.
        corpus: documents with domains, of two tokens or more.
        random_routers: how many times each layer is routed at random.
        blocks: of documents, for the jackknife; each holds documents of all domains.
        resamples: of documents, for intervals of effects.
        seed: of the random routers, the resamples, the control and the halves.
        max_tokens: documents are cut to so many.
        batch_tokens: the most tokens in one pass.

    Returns:
        ``effect`` (layer, expert), nats per scored token that taking the expert out adds, with ``_interval`` (bound)
        over documents and ``_domain`` (domain); ``value`` (score, layer, expert) of each score. ``rank_correlation``
        (score, layer), ``_overall`` (score) and ``_domain`` (score, domain; over all layers), each with ``_interval``.
        ``held_out`` (score, layer) and ``_overall`` (score): of scores in one half of the documents and effects in the
        other; ``reliability`` (layer) and ``_overall``: of effects in both. ``random_router`` (layer), nats per token
        that random routing of the layer adds, with ``_interval``, and ``_draw`` (draw, layer).
        ``nll`` (domain), ``tokens`` and ``documents`` scored. Specialization in a domain is that over all domains.

    Raises:
        BadInput: no tokenizer, fewer than two blocks of documents, or a document of one token.
        UnsupportedModel: a model that does not predict the next token.
    """
    check_writes_text(model)
    work = batches(model, corpus, max_tokens=max_tokens, batch_tokens=batch_tokens)
    if len(corpus) < 2:
        raise BadInput("too few documents", expected="two documents or more", got=f"{len(corpus)} documents")
    sums, where = collect_outputs(model, corpus, Options(True, max_tokens, batch_tokens))
    measured = _Measured.empty(len(corpus), len(model.layers), model.spec.num_experts, random_routers)
    for batch in tqdm(work, desc="audit of scores", unit="batch"):
        _measure(model, batch, measured, seed, batch_tokens)
    there = np.arange(model.spec.num_experts) < np.array(
        [[model.spec.moe(layer).num_experts] for layer in model.layers]
    )
    table = _table(measured, sums, corpus)
    correlate = partial(_correlations, order=np.random.default_rng(seed).random(there.shape), there=there)
    values = (
        _effects(measured, corpus, resamples, seed)
        | _agreement(table, corpus, correlate, min(blocks, len(corpus)), seed)
        | {"value": scores(table.sum(axis=0), correlate.keywords["order"])}
    )
    coords: dict[str, Any] = {
        "score": [*SCORES],
        "layer": np.array(model.layers),
        "expert": np.arange(there.shape[1]),
        "domain": list(corpus.domains),
        "bound": ["low", "high"],
    }
    how = {
        "seed": seed,
        "resamples": resamples,
        "blocks": blocks,
        "random_routers": random_routers,
        "max_tokens": max_tokens or model.spec.context_length,
    }
    return labelled(described(values, _VARIABLES), coords, analysis="score_audit", provenance={**where, **how})


# ---- effects -----------------------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """Of each document, in nats: without an expert, as estimated, under random routing, as it is; and its tokens."""

    effect: Float[np.ndarray, "N L E"]
    estimate: Float[np.ndarray, "N L E"]
    path: Float[np.ndarray, "N L E"]
    router: Float[np.ndarray, "N R L"]
    nll: Float[np.ndarray, " N"]
    tokens: Int[np.ndarray, " N"]

    @classmethod
    def empty(cls, documents: int, layers: int, experts: int, draws: int) -> "_Measured":
        """Nothing measured yet."""
        effect, estimate, path = np.zeros((3, documents, layers, experts))
        router = np.zeros((documents, draws, layers))
        return cls(effect, estimate, path, router, np.zeros(documents), np.zeros(documents, np.int64))


def _measure(model: MoEModel, batch: Batch, into: _Measured, seed: int, batch_tokens: int) -> None:
    """Fill in the documents of a batch."""
    sweep = Sweep(model, batch.inputs, "nll")
    rows, layers = batch.documents, model.layers
    tokens = sweep.bound.at.sum(dim=1).cpu().numpy()
    into.tokens[rows], into.nll[rows] = tokens, sweep.base.cpu().numpy() * tokens
    found = sweep.effects(removals(sweep, layers, "zero"), len(layers) * model.spec.num_experts, batch_tokens)
    for (layer, expert), effect in found.items():
        into.effect[rows, layers.index(layer), expert] = effect.cpu().numpy() * tokens
    for steps, sums in ((1, into.estimate), (2, into.path)):
        estimate = estimates(model, batch.inputs, None, "nll", layers, steps).experts.nan_to_num().numpy()
        sums[rows] = estimate.transpose(2, 0, 1) * tokens[:, None, None]
    draws = [(draw, layer) for layer in layers for draw in range(into.router.shape[1])]
    seeds: Any = np.random.default_rng(seed).integers(2**63, size=into.router.shape[1])
    variants = [Variant([randomize(layer=layer, weights="kept", seed=int(seeds[draw]))]) for draw, layer in draws]
    for outcome in sweep.restart.run(variants, sweep.bound.at, batch_tokens=batch_tokens):
        draw, layer = draws[outcome.number]
        into.router[rows, draw, layers.index(layer)] += sweep.difference(outcome).cpu().numpy() * tokens


def _effects(measured: _Measured, corpus: Corpus, resamples: int, seed: int) -> dict[str, Any]:
    """Nats per token, with intervals over documents and by domain."""
    labels, tokens = corpus.labels, measured.tokens
    of_domain = partial(stats.group_totals, groups=labels, num_groups=len(corpus.domains))
    interval = partial(stats.bootstrap_ratio, denominator=tokens, strata=labels, resamples=resamples, seed=seed)
    router = measured.router.mean(axis=1)
    return {
        "effect": measured.effect.sum(axis=0) / tokens.sum(),
        "effect_interval": interval(measured.effect),
        "effect_domain": stats.ratio(of_domain(measured.effect), of_domain(tokens)),
        "random_router": router.sum(axis=0) / tokens.sum(),
        "random_router_interval": interval(router),
        "random_router_draw": measured.router.sum(axis=0) / tokens.sum(),
        "nll": stats.ratio(of_domain(measured.nll), of_domain(tokens)),
        "tokens": of_domain(tokens),
        "documents": of_domain(np.ones_like(tokens)),
    }


# ---- scores and their correlation --------------------------------------------------------------------------

_PLANES = ("tokens", "effect", "estimate", "path", "counts", "weights", "norms", "contributions")
_EFFECT = _PLANES.index("effect")


def _table(measured: _Measured, sums: OutputSums, corpus: Corpus) -> Float[np.ndarray, "N P L E"]:
    """Everything that scores are made of, for each document, so that it adds up: `_PLANES`, and counts by domain."""
    planes = [
        np.broadcast_to(measured.tokens[:, None, None], measured.effect.shape),
        measured.effect,
        measured.estimate,
        measured.path,
        sums.counts,
        *(part / UNIT for part in (sums.weights, sums.norms, sums.contributions)),
    ]
    domains = [sums.counts * (corpus.labels == label)[:, None, None] for label in range(len(corpus.domains))]
    return np.stack([*planes, *domains], axis=1).astype(float)


def scores(total: Float[np.ndarray, "P L E"], order: Float[np.ndarray, "L E"]) -> Float[np.ndarray, "C L E"]:
    """Every score of `SCORES`, from sums over documents; 0 for an expert that no token chose."""
    tokens, _, estimate, path, counts, weights, norms, contributions = total[: len(_PLANES)]
    of_domain = total[len(_PLANES) :]
    chosen = np.maximum(counts, 1)
    shares = np.nan_to_num(stats.shares(of_domain)) * of_domain.shape[-1]
    found = {
        "frequency": counts / tokens,
        "weight_sum": weights / tokens,
        "output_norm": norms / chosen,
        "saliency": contributions / chosen,
        "saliency_sum": contributions / tokens,
        "specialization": shares.max(axis=0),
        "attribution": estimate / tokens,
        "attribution_path": path / tokens,
        "random": order,
    }
    return np.stack([found[name] for name in SCORES])


def _correlations(
    total: Float[np.ndarray, "P L E"], order: Float[np.ndarray, "L E"], there: Bool[np.ndarray, "L E"]
) -> Float[np.ndarray, "C L1"]:
    """Rank correlation of every score with the effect, layer by layer, and last over all layers."""
    return _by_layer(scores(total, order), total[_EFFECT], there)


def _by_layer(
    found: Float[np.ndarray, "C L E"], effect: Float[np.ndarray, "L E"], there: Bool[np.ndarray, "L E"]
) -> Float[np.ndarray, "C L1"]:
    layers = [_ranked(found[:, layer, there[layer]], effect[layer, there[layer]]) for layer in range(len(there))]
    return np.stack([*layers, _ranked(found[:, there], effect[there])], axis=1)


def _ranked(values: Float[np.ndarray, "C X"], effect: Float[np.ndarray, " X"]) -> Float[np.ndarray, " C"]:
    return stats.spearman(values, np.broadcast_to(effect, values.shape))


def _agreement(
    table: Float[np.ndarray, "N P L E"], corpus: Corpus, correlate: Any, blocks: int, seed: int
) -> dict[str, Any]:
    """Correlations with intervals over blocks of documents, by domain too; and of the effect with itself."""
    numbers = np.empty(len(corpus), int)
    numbers[np.argsort(corpus.labels, kind="stable")] = np.arange(len(corpus)) % blocks
    pooled = stats.group_totals(table, numbers, blocks)
    whole, ends = stats.block_jackknife(correlate, pooled, debias=False)
    within = [_of_domain(table, corpus.labels == label, correlate, blocks) for label in range(len(corpus.domains))]
    held_out = _held_out(pooled, correlate, seed)
    return {
        "rank_correlation": whole[:, :-1],
        "rank_correlation_interval": ends[:, :, :-1].clip(-1, 1),
        "rank_correlation_overall": whole[:, -1],
        "rank_correlation_overall_interval": ends[:, :, -1].clip(-1, 1),
        "rank_correlation_domain": np.stack([value for value, _ in within], axis=1),
        "rank_correlation_domain_interval": np.stack([interval for _, interval in within], axis=2).clip(-1, 1),
        "held_out": held_out[:-1, :-1],
        "held_out_overall": held_out[:-1, -1],
        "reliability": held_out[-1, :-1],
        "reliability_overall": held_out[-1, -1],
    }


def _of_domain(
    table: Float[np.ndarray, "N P L E"], own: Bool[np.ndarray, " N"], correlate: Any, blocks: int
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, "2 C"]]:
    """Correlations over all layers within a domain; specialization stays what it is over all."""
    mine = table[own].copy()
    # Shares do not depend on a factor, so that leaving a block out leaves them as they are.
    mine[:, len(_PLANES) :] = table[:, len(_PLANES) :].sum(axis=0)
    pooled = stats.group_totals(mine, np.arange(len(mine)) % blocks, min(blocks, len(mine)))
    if len(pooled) < 2:
        return correlate(pooled.sum(axis=0))[:, -1], np.full((2, len(SCORES)), np.nan)
    whole, ends = stats.block_jackknife(correlate, pooled, debias=False)
    return whole[:, -1], ends[:, :, -1]


def _held_out(pooled: Float[np.ndarray, "Z P L E"], correlate: Any, seed: int) -> Float[np.ndarray, "C1 L1"]:
    """Scores, and last the effect, in one half of the blocks with the effect in the other; mean over random halves."""
    rng, order, found = np.random.default_rng(seed), correlate.keywords["order"], []
    for _ in range(_SPLITS):
        halves = np.array_split(rng.permutation(len(pooled)), 2)
        one, other = (pooled[half].sum(axis=0) for half in halves)
        known = np.concatenate([scores(one, order), one[None, _EFFECT]])
        found.append(_by_layer(known, other[_EFFECT], correlate.keywords["there"]))
    return np.mean(found, axis=0)


_LE, _CL, _CD = ("layer", "expert"), ("score", "layer"), ("score", "domain")
_COSTS = "nats per scored token that taking the expert out adds; 0 if it does nothing"
_RANDOM = "nats per scored token that random routing of the layer adds, weights kept"
_RHO = "Spearman's rank correlation of score and effect over experts, -1 ... 1; 0 if the score says nothing"
_VARIABLES: dict[str, Description] = {
    "effect": (_LE, "nats/token", _COSTS),
    "effect_interval": (("bound", *_LE), "nats/token", f"95 % interval over documents: {_COSTS}"),
    "effect_domain": (("domain", *_LE), "nats/token", f"by domain: {_COSTS}"),
    "value": (("score", *_LE), "1", "each score, in units of its own; 0 for an expert that no token chose"),
    "rank_correlation": (_CL, "1", f"within a layer: {_RHO}"),
    "rank_correlation_interval": (("bound", *_CL), "1", f"95 % jackknife interval over documents: {_RHO}"),
    "rank_correlation_overall": (("score",), "1", f"over all layers: {_RHO}"),
    "rank_correlation_overall_interval": (("bound", "score"), "1", f"95 % jackknife interval, all layers: {_RHO}"),
    "rank_correlation_domain": (_CD, "1", f"over all layers, both on the domain's documents: {_RHO}"),
    "rank_correlation_domain_interval": (("bound", *_CD), "1", f"95 % jackknife interval over documents: {_RHO}"),
    "held_out": (_CL, "1", f"score in one half of the documents, effect in the other, mean over halves: {_RHO}"),
    "held_out_overall": (("score",), "1", f"the same over all layers: {_RHO}"),
    "reliability": (("layer",), "1", "rank correlation of effects in two halves of the documents, mean over halves"),
    "reliability_overall": ((), "1", "the same over all layers"),
    "random_router": (("layer",), "nats/token", f"mean over draws: {_RANDOM}"),
    "random_router_interval": (("bound", "layer"), "nats/token", f"95 % interval over documents: {_RANDOM}"),
    "random_router_draw": (("draw", "layer"), "nats/token", f"by draw: {_RANDOM}"),
    "nll": (("domain",), "nats/token", "negative log-likelihood of the model as it is"),
    "tokens": (("domain",), "tokens", "tokens scored: all but the first of each document"),
    "documents": (("domain",), "documents", "documents scored"),
}
