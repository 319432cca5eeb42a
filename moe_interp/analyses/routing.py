"""Who is routed where: load, specialization, coverage and router confidence, with nulls and intervals.

1. `RoutingCounts` adds up, per document and layer, which experts were chosen, with what weight and score,
   and how sure the router was. It is an exact monoid (integers and fixed point): batches, shards and merges
   in any order give one answer, to the last bit.
2. `routing` runs a corpus through a model and makes a labelled Dataset of the sums; `from_counts` and
   `dataset` are the part of it that recorded counts share.
3. `routing_map` shows one text: tokens x layers, the heaviest expert and its share of the weight.

Specialization (MoE-Lens, arXiv 2603.05806 eq. 2, after OLMoE, arXiv 2409.02060) is the share of a domain's
tokens that have the expert among their K. Load balance is Switch's (arXiv 2101.03961 eq. 4), z-loss ST-MoE's
(arXiv 2202.08906 eq. 5). The controls are a router that draws K distinct experts uniformly, and documents
with permuted domain labels. Padding never counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

import moe_interp.stats as stats
from moe_interp.data import Corpus, batches
from moe_interp.errors import BadCheckpoint, BadInput
from moe_interp.model import MoEModel
from moe_interp.results import Variable, labelled
from moe_interp.run import Routing, Run

_FIXED = 2.0**32  # sums are kept in units of 2^-32: exact in any order, up to 2^31 a document
_PER_TOKEN = ("entropy", "margin", "heaviest_weight", "weight_sum", "z_loss")

Values = dict[str, np.ndarray]
Provenance = Mapping[str, str | int | float]


@dataclass
class RoutingCounts:
    """Sums of routing per document and MoE layer, from which everything else follows.

    `update` adds a run, `merge` gives the sum of two (associative, commutative), `state` and `from_state`
    store and resume, `result` gives the labelled Dataset.

    Attributes:
        layers: [L], MoE layer indices.
        top_k: K.
        tokens: [N], real tokens.
        counts: [N, L, E], tokens that chose the expert.
        weights: [N, L, E], sum of combine weights, in units of 2^-32.
        scores: [N, L, E], sum of router scores over all tokens, in units of 2^-32.
        per_token: [N, L, 5], sums of entropy, margin, heaviest weight, weight sum, z-loss, in units of 2^-32.
    """

    layers: tuple[int, ...]
    top_k: int
    tokens: Int[np.ndarray, " N"]
    counts: Int[np.ndarray, "N L E"]
    weights: Int[np.ndarray, "N L E"]
    scores: Int[np.ndarray, "N L E"]
    per_token: Int[np.ndarray, "N L 5"]

    @classmethod
    def empty(cls, documents: int, layers: Sequence[int], experts: int, top_k: int) -> "RoutingCounts":
        """Nothing counted yet, for so many documents."""
        sizes = [(documents,), *3 * [(documents, len(layers), experts)], (documents, len(layers), 5)]
        return cls(tuple(layers), top_k, *(np.zeros(size, np.int64) for size in sizes))

    def update(self, run: Run, documents: Int[np.ndarray, " B"]) -> None:
        """Adds a run that read router_logits and router_scores; row b belongs to document ``documents[b]``.

        Raises:
            BadInput: the run did not read them.
            BadCheckpoint: a router value of a real token that is not finite.
        """
        np.add.at(self.tokens, documents, run.mask.sum(dim=1).cpu().numpy())
        for index, layer in enumerate(self.layers):
            for name, sums in _layer_sums(run.routing[layer], self.counts.shape[-1]).items():
                np.add.at(getattr(self, name)[:, index], documents, sums.numpy())

    def merge(self, other: "RoutingCounts") -> "RoutingCounts":
        """Both together.

        Raises:
            BadInput: they do not count over the same documents, layers and experts.
        """
        mine, others = ((one.layers, one.top_k, one.counts.shape) for one in (self, other))
        if mine != others:
            raise BadInput("cannot merge routing counts", expected=f"layers, K, [N, L, E] = {mine}", got=str(others))
        sums = [getattr(self, field.name) + getattr(other, field.name) for field in fields(self)[2:]]
        return RoutingCounts(self.layers, self.top_k, *sums)

    def state(self) -> Values:
        """All there is, as integer arrays by name: for ``np.savez``, a queue, a checkpoint."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "RoutingCounts":
        """What `state` gave."""
        arrays = [np.asarray(state[field.name]) for field in fields(cls)[2:]]
        return cls(tuple(state["layers"].tolist()), int(state["top_k"]), *arrays)

    def result(
        self,
        groups: Int[np.ndarray, " N"],
        domains: Sequence[str],
        *,
        provenance: Provenance,
        resamples: int = 1000,
        seed: int = 0,
    ) -> xr.Dataset:
        """The Dataset that `routing` gives; ``groups`` numbers each document's domain."""
        counts, tokens = (stats.group_totals(part, groups, len(domains)) for part in (self.counts, self.tokens))
        values = from_counts(counts, tokens, self.top_k)
        values["documents"] = np.bincount(groups, minlength=len(domains))
        values |= _means(self, groups, len(domains), resamples, seed) | _losses(self)
        values |= _tests(self.counts, groups, len(domains), resamples, seed)
        how = {"tokens": int(self.tokens.sum()), "top_k": self.top_k, "resamples": resamples, "seed": seed}
        return dataset(values, domains, self.layers, {**provenance, **how})


def _layer_sums(routing: Routing, experts: int) -> dict[str, Int[Tensor, "B _"]]:
    """Sums over the real tokens of each row, by the name of the field they belong to."""
    if routing.logits is None or routing.scores is None:
        raise BadInput(
            "routing counts need the router's values",
            expected='a run with read=["router_logits", "router_scores"]',
            got="one without",
        )
    mask, ids = routing.mask.cpu()[..., None], routing.ids.cpu()
    weights, logits, scores = (
        torch.where(mask, values.cpu().double(), 0.0)  # padding may hold anything, NaN too
        for values in (routing.weights, routing.logits, routing.scores)
    )
    empty = torch.zeros(len(ids), experts, dtype=torch.int64)
    per_token = torch.where(mask, _per_token(ids, weights, logits, scores), 0.0)
    return {
        "counts": empty.scatter_add(1, ids.flatten(1), mask.expand_as(ids).flatten(1).long()),
        "weights": empty.scatter_add(1, ids.flatten(1), _fixed(weights).flatten(1)),
        "scores": _fixed(scores).sum(dim=1),
        "per_token": _fixed(per_token).sum(dim=1),
    }


def _per_token(
    ids: Int[Tensor, "B S K"],
    weights: Float[Tensor, "B S K"],
    logits: Float[Tensor, "B S E"],
    scores: Float[Tensor, "B S E"],
) -> Float[Tensor, "B S 5"]:
    """What `_PER_TOKEN` names, for every token."""
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(2, ids, True)
    lightest = torch.where(chosen, scores, torch.inf).amin(dim=2)
    left_out = torch.where(chosen, 0.0, scores).amax(dim=2)
    entropy = torch.special.entr(scores).sum(dim=2)
    z_loss = logits.logsumexp(dim=2) ** 2
    return torch.stack([entropy, lightest - left_out, weights.amax(dim=2), weights.sum(dim=2), z_loss], dim=2)


def _fixed(values: Float[Tensor, "B S _"]) -> Int[Tensor, "B S _"]:
    if not values.isfinite().all():
        raise BadCheckpoint(
            "the router gave values that are not finite",
            expected="finite logits, scores and weights",
            do="model.audit() says where they begin.",
        )
    return (values * _FIXED).round().long()


# What the counts alone say, and what takes documents or router values


def switch_loss(
    chosen: Float[np.ndarray, "*rest E"], score: Float[np.ndarray, "*rest E"]
) -> Float[np.ndarray, "*rest"]:
    """Load-balance loss E sum_e f_e P_e: f the share of decisions, P the mean score; 1 at balance, at most E.

    With shares of tokens in place of decisions, and all layers pooled first, it is what transformers has:
    K at balance, and opposite imbalances of two layers cancel.
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


def from_counts(counts: Int[np.ndarray, "D L E"], tokens: Int[np.ndarray, " D"], top_k: int) -> Values:
    """Every value that follows from counts alone, by the names of `dataset`."""
    experts = counts.shape[-1]
    per_token = stats.ratio(counts, np.repeat(tokens[:, None], counts.shape[1], axis=1))
    # Each expert's load under a uniform router, but for the faint correlation of draws without replacement.
    uniform = np.random.default_rng(0).binomial(tokens[:, None], top_k / experts, (200, len(tokens), experts))
    values = {
        "counts": counts,
        "tokens": tokens,
        "specialization": per_token,
        "specialization_baseline": np.array(top_k / experts),
        "utilisation": per_token / top_k,
        "utilisation_overall": stats.shares(counts.sum(axis=0)),
        "utilisation_baseline": np.array(1 / experts),
        "entropy_baseline": np.array(np.log(experts)),
        "divergence": stats.divergence_from_rest(counts.swapaxes(0, 1)).T,
    }
    for name, (statistic, _, _) in LOAD.items():
        values[name] = statistic(counts)
        values[f"{name}_overall"] = statistic(counts.sum(axis=0))
        values[f"{name}_uniform"] = statistic(uniform).mean(axis=0)
    return values


def _means(sums: RoutingCounts, groups: np.ndarray, domains: int, resamples: int, seed: int) -> Values:
    """Ratios of sums over documents with their intervals, per domain."""
    weights = sums.weights / _FIXED
    ratios = {
        "specialization": (sums.counts, sums.tokens),
        "weight_share": (weights, weights.sum(axis=-1)),
        "per_token": (sums.per_token / _FIXED, sums.tokens),
    }
    values: Values = {}
    for name, (top, bottom) in ratios.items():
        own = [(top[groups == group], bottom[groups == group]) for group in range(domains)]
        values[name] = np.stack([stats.ratio(part.sum(axis=0), total.sum(axis=0)) for part, total in own])
        ends = [
            stats.bootstrap_ratio(part, total, resamples=resamples, seed=seed + group)
            for group, (part, total) in enumerate(own)
        ]
        values[f"{name}_interval"] = np.stack(ends, axis=1)
    overall = stats.bootstrap_ratio(sums.counts, sums.tokens, strata=groups, resamples=resamples, seed=seed)
    values["utilisation_overall_interval"] = overall / sums.top_k
    values["utilisation_interval"] = values["specialization_interval"] / sums.top_k
    for suffix in ("", "_interval"):
        stacked = np.moveaxis(values.pop(f"per_token{suffix}"), -1, 0)
        values |= {f"{name}{suffix}": part for name, part in zip(_PER_TOKEN, stacked, strict=True)}
    return values


def _losses(sums: RoutingCounts) -> Values:
    """Load-balance losses over all tokens."""
    tokens = sums.tokens.sum()
    chosen, score = sums.counts.sum(axis=0) / tokens, sums.scores.sum(axis=0) / _FIXED / tokens
    return {
        "load_balance": switch_loss(chosen / sums.top_k, score),
        "load_balance_as_coded": switch_loss(chosen.mean(axis=0), score.mean(axis=0)),
    }


def _tests(counts: np.ndarray, groups: np.ndarray, domains: int, resamples: int, seed: int) -> Values:
    """Debiased estimates and permutation tests."""
    debias = partial(stats.bootstrap_debias, resamples=resamples, seed=seed)
    permute = partial(stats.permutation_max, permutations=resamples, seed=seed)
    p_divergence, null = permute(stats.jensen_shannon, counts, groups, domains)
    return {
        "n50_debiased": debias(LOAD["n50"][0], counts, groups, domains),
        "n90_debiased": debias(LOAD["n90"][0], counts, groups, domains),
        "divergence_debiased": stats.jackknife(stats.divergence_from_rest, counts, groups, domains),
        "divergence_p": p_divergence,
        "divergence_null": null,
        "specialization_p": permute(stats.share_difference, counts, groups, domains)[0],
    }


# The labelled result

_DLE, _DL, _LE = ("domain", "layer", "expert"), ("domain", "layer"), ("layer", "expert")
_PLAIN: dict[str, tuple[tuple[str, ...], str, str]] = {
    "documents": (("domain",), "documents", "documents; 0 for recorded counts, which have none"),
    "tokens": (("domain",), "tokens", "real tokens, without padding"),
    "counts": (_DLE, "tokens", "tokens of the domain that chose the expert; tokens * K in all"),
    "utilisation": (_DLE, "1", "share of the domain's decisions that go to the expert, 0 ... 1/K"),
    "utilisation_overall": (_LE, "1", "share of all decisions that go to the expert, 0 ... 1/K"),
    "utilisation_baseline": ((), "1", "utilisation under a uniform router, 1/E"),
    "weight_share": (_DLE, "1", "share of the domain's combine weight that goes to the expert; uniform: 1/E"),
    "specialization": (_DLE, "1", "share of the domain's tokens that chose the expert, 0 ... 1"),
    "specialization_baseline": ((), "1", "specialization under a uniform router, K/E"),
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
        "bias or groups of experts overrule the scores",
    ),
    "heaviest_weight": (_DL, "1", "mean combine weight of a token's heaviest slot"),
    "weight_sum": (_DL, "1", "mean sum of a token's combine weights; 1 if renormalised and not scaled"),
    "z_loss": (_DL, "1", "router z-loss: mean squared logsumexp of the router logits"),
    "load_balance": (("layer",), "1", "Switch load-balance loss over all tokens; 1 at balance ... E"),
    "load_balance_as_coded": (
        (),
        "1",
        "load-balance loss as transformers codes it: layers pooled first, so that opposite imbalances "
        "cancel; K at balance",
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
_INTERVALS = ("utilisation", "utilisation_overall", "weight_share", "specialization", *_PER_TOKEN)
_DEBIASED = {"n50": "bootstrap", "n90": "bootstrap", "divergence": "jackknife"}


def _variables() -> dict[str, tuple[tuple[str, ...], str, str]]:
    """Every variable of the result: dims, units, meaning."""
    found = dict(_PLAIN)
    for name, (_, units, meaning) in LOAD.items():
        found[name] = _DL, units, meaning
        found[f"{name}_overall"] = ("layer",), units, f"over all domains: {meaning}"
        found[f"{name}_uniform"] = ("domain",), units, f"under a uniform router, same tokens: {meaning}"
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
    variables = {
        name: Variable(dims, values.get(name, np.full([len(coords[dim]) for dim in dims], np.nan)), units, meaning)
        for name, (dims, units, meaning) in _variables().items()
    }
    return labelled(variables, coords, analysis="routing", provenance=provenance)


def routing(
    model: MoEModel,
    corpus: Corpus,
    *,
    resamples: int = 1000,
    seed: int = 0,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
) -> xr.Dataset:
    """Routing of a corpus: load, specialization by domain, coverage, router confidence, balance losses.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents with domains.
        resamples: how many bootstrap resamples and label permutations.
        seed: of both.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims domain, layer (the model's own indices), expert, bound (low, high). ``*_interval`` are 95 %
        percentile intervals over documents; ``*_debiased`` stand beside plug-in estimates that need it;
        ``*_p``, ``*_null``, ``*_uniform``, ``*_baseline`` are controls. NaN: it takes a second domain, or a
        second document in each.

    Raises:
        BadInput: the model has no tokenizer.
        BadCheckpoint: the router gives values that are not finite.
    """
    sums = RoutingCounts.empty(len(corpus), model.layers, model.spec.num_experts, model.spec.top_k)
    truncated = 0
    with tqdm(total=len(corpus), desc="routing", unit="document") as progress:
        for batch in batches(model, corpus, max_tokens=max_tokens, batch_tokens=batch_tokens):
            sums.update(model.run(batch.inputs, read=["router_logits", "router_scores"]), batch.documents)
            truncated += batch.truncated
            progress.update(len(batch.documents))
    where = {**model.provenance(), "data": corpus.source, "documents": len(corpus), "truncated": truncated}
    return sums.result(corpus.labels, corpus.domains, provenance=where, resamples=resamples, seed=seed)


def routing_map(model: MoEModel, text: str) -> xr.Dataset:
    """Which expert weighs most, for every token and MoE layer of one text.

    Returns:
        Dims pos, layer: ``heaviest_expert``; ``heaviest_share`` of the token's combine weight, 1/K ... 1;
        ``token``, the text of each token.

    Raises:
        BadInput: an empty text, one over the context length, or a model without a tokenizer.
    """
    run = model.run(text)
    kept = run.mask[0].cpu()
    experts, shares = zip(*(_heaviest(run.routing[layer], kept) for layer in model.layers), strict=True)
    ids = [] if run.token_ids is None else run.token_ids[0].cpu()[kept].tolist()
    tokens = [model.tokenizer.decode([token]).replace("\0", "\N{SYMBOL FOR NULL}") for token in ids]
    dims = ("pos", "layer")
    variables = {
        "token": Variable(("pos",), tokens, "text", "text of the token"),
        "heaviest_expert": Variable(dims, np.stack(experts, 1), "expert", "expert with the largest combine weight"),
        "heaviest_share": Variable(dims, np.stack(shares, 1), "1", "its share of the combine weight, 1/K ... 1"),
    }
    coords = {"pos": np.arange(len(tokens)), "layer": np.array(model.layers, dtype=np.int64)}
    return labelled(variables, coords, analysis="routing_map", provenance=model.provenance())


def _heaviest(routing: Routing, kept: Bool[Tensor, " S"]) -> tuple[np.ndarray, np.ndarray]:
    weights, ids = routing.weights[0].cpu()[kept].double(), routing.ids[0].cpu()[kept]
    largest, slot = weights.max(dim=1)
    return ids.gather(1, slot[:, None])[:, 0].numpy(), (largest / weights.sum(dim=1)).numpy()
