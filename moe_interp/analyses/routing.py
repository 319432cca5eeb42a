"""Who is routed where: load, specialization, coverage and router confidence, with nulls and intervals.

1. `RoutingCounts` adds up, per document and layer, which experts were chosen, with what weight and score,
   and how sure the router was. It is an exact monoid (integers and fixed point): batches, shards and merges
   in any order give one answer, to the last bit.
2. `routing` runs a corpus through a model and makes a labelled Dataset of the sums; `routing_values` has the
   part of it that recorded counts share.

Specialization (MoE-Lens, arXiv 2603.05806 eq. 2, after OLMoE, arXiv 2409.02060) is the share of a domain's
tokens that have the expert among their K. Load balance is Switch's (arXiv 2101.03961 eq. 4), z-loss ST-MoE's
(arXiv 2202.08906 eq. 5). The controls are a router that draws K distinct experts uniformly, and documents
with permuted domain labels. Padding never counts, special
tokens only when asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

import moe_interp.stats as stats
from moe_interp.adapters.spec import Balance
from moe_interp.analyses.collect import Options, collect, over_experts, sizes
from moe_interp.analyses.exact import (
    UNIT,
    Exact,
    Provenance,
    Values,
    add_fixed,
    fixed,
    fixed_sums,
    flat_counts,
    of_each,
    told_top_k,
)
from moe_interp.analyses.routing_values import LOAD, by_name, dataset, from_counts, switch_loss, taken
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from moe_interp.model import MoEModel
from moe_interp.run import Routing, Run


@dataclass
class RoutingCounts(Exact):
    """Sums of routing per document and MoE layer, from which everything else follows.

    `update` adds a run, `merge` gives the sum of two (associative, commutative), `state` and `from_state`
    store and resume, `result` gives the labelled Dataset. Holds 8 L (N (3 E + 5) + 2 E + 1) bytes: 83 MB for 2,000
    documents, 27 layers and 64 experts.

    Attributes:
        layers: [L], MoE layer indices.
        top_k: [L], K.
        tokens: [N], real tokens.
        counts: [N, L, E], tokens that chose the expert.
        weights: [N, L, E], sum of combine weights, in units of 2^-32.
        scores: [N, L, E], sum of router scores over all tokens, in units of 2^-32.
        per_token: [N, L, 5], sums of entropy, margin, heaviest weight, weight sum, z-loss, in units of 2^-32.
        coded_k, coded_cap, coded_per: [L], how transformers' load-balance loss looks at the layers: its K (0: not at
            all), the cap of the logits (0: none), and what it divides counts by.
        coded_counts: [L, E], tokens at which the expert is among the ``coded_k`` largest of a softmax of the logits.
        coded_scores: [L, E], sum of that softmax over tokens, in units of 2^-32.
        coded_tokens: [L], tokens of both.
    """

    reads: ClassVar[tuple[str, ...]] = ("router_logits", "router_scores")

    layers: tuple[int, ...]
    top_k: tuple[int, ...]
    tokens: Int[np.ndarray, " N"]
    counts: Int[np.ndarray, "N L E"]
    weights: Int[np.ndarray, "N L E"]
    scores: Int[np.ndarray, "N L E"]
    per_token: Int[np.ndarray, "N L 5"]
    coded_k: tuple[int, ...]
    coded_cap: tuple[float, ...]
    coded_per: tuple[int, ...]
    coded_counts: Int[np.ndarray, "L E"]
    coded_scores: Int[np.ndarray, "L E"]
    coded_tokens: Int[np.ndarray, " L"]

    @classmethod
    def empty(
        cls,
        documents: int,
        layers: Sequence[int],
        experts: int,
        top_k: int | Sequence[int],
        balance: Sequence[Balance | None] | None = None,
    ) -> "RoutingCounts":
        """Nothing counted yet, for so many documents; ``top_k`` is one for all layers, or one for each.

        ``balance`` is what `balances` gives of a model; without, the loss takes ``top_k`` of a softmax, as most do.
        """
        shapes = [(documents,), *3 * [(documents, len(layers), experts)], (documents, len(layers), 5)]
        sums, each = [np.zeros(shape, np.int64) for shape in shapes], of_each(top_k, layers)
        coded = [Balance(k) for k in each] if balance is None else [one or Balance(0) for one in balance]
        how = (
            tuple(one.top_k for one in coded),
            tuple(one.softcap or 0.0 for one in coded),
            tuple(one.top_k if one.per == "decision" else 1 for one in coded),
        )
        of_layers = [np.zeros(shape, np.int64) for shape in (*2 * [(len(layers), experts)], (len(layers),))]
        return cls(tuple(layers), each, *sums, *how, *of_layers)  # type: ignore[arg-type, call-arg]

    def update(self, run: Run, documents: Int[np.ndarray, " B"]) -> None:
        """Adds a run that read router_logits and router_scores; row b belongs to document ``documents[b]``.

        Raises:
            BadInput: the run did not read them.
            BadCheckpoint: a router value of a real token that is not finite.
        """
        np.add.at(self.tokens, documents, run.mask.sum(dim=1).cpu().numpy())
        for index, layer in enumerate(self.layers):
            for name, sums in _layer_sums(run.routing[layer], self.counts.shape[-1]).items():
                if name == "counts":
                    np.add.at(self.counts[:, index], documents, sums.numpy())
                else:
                    add_fixed(getattr(self, name)[:, index], documents, sums.numpy())
            if self.coded_k[index]:
                self._update_coded(index, run.routing[layer])

    def _update_coded(self, index: int, routing: Routing) -> None:
        """Adds what transformers' load-balance loss sees of a layer, which is not always who was chosen."""
        logits, cap = routing.logits[routing.mask][:, : self.coded_counts.shape[-1]], self.coded_cap[index]  # type: ignore[index]
        # In the dtype of the logits, as there, whose rounding a narrow one shows.
        logits = logits.double() if logits.dtype == torch.float32 else logits
        scores = (cap * (logits / cap).tanh() if cap else logits).softmax(dim=-1)
        chosen = scores.topk(self.coded_k[index], dim=-1).indices
        self.coded_counts[index] += flat_counts(chosen, scores.shape[-1])
        self.coded_scores[index] += fixed_sums(scores.double().cpu()[None])[0].numpy()
        self.coded_tokens[index] += len(scores)

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
        how = {"tokens": int(self.tokens.sum()), "resamples": resamples, "seed": seed}
        about = {**provenance, **how, "top_k": told_top_k(self.top_k)}
        return dataset(values, domains, self.layers, about)


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
        for values in (routing.weights, routing.logits, over_experts(routing.scores, experts))
    )
    empty = torch.zeros(len(ids), experts, dtype=torch.int64)
    per_token = torch.where(mask, _per_token(ids, weights, logits, scores), 0.0)
    return {
        "counts": empty.scatter_add(1, ids.flatten(1), mask.expand_as(ids).flatten(1).long()),
        "weights": empty.scatter_add(1, ids.flatten(1), fixed(weights).flatten(1)),
        "scores": fixed_sums(scores),
        "per_token": fixed_sums(per_token),
    }


def _per_token(
    ids: Int[Tensor, "B S K"],
    weights: Float[Tensor, "B S K"],
    logits: Float[Tensor, "B S C"],
    scores: Float[Tensor, "B S E"],
) -> Float[Tensor, "B S 5"]:
    """What `PER_TOKEN` names, for every token."""
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(2, ids, True)
    lightest = torch.where(chosen, scores, torch.inf).amin(dim=2)
    left_out = torch.where(chosen, 0.0, scores).amax(dim=2)
    entropy = torch.special.entr(scores).sum(dim=2)
    z_loss = logits.logsumexp(dim=2) ** 2
    return torch.stack([entropy, lightest - left_out, weights.amax(dim=2), weights.sum(dim=2), z_loss], dim=2)


# Means with intervals, losses, tests


def _means(sums: RoutingCounts, groups: np.ndarray, domains: int, resamples: int, seed: int) -> Values:
    """Ratios of sums over documents with their intervals, per domain."""
    weights, seen, chosen = sums.weights / UNIT, taken(sums.counts, sums.top_k), np.array(sums.top_k)[:, None]
    ratios = {
        "specialization": (sums.counts, seen),
        "weight_share": (weights, weights.sum(axis=-1)),
        "per_token": (sums.per_token / UNIT, seen),
    }
    values: Values = {}
    for name, (top, bottom) in ratios.items():
        own = [(top[groups == group], bottom[groups == group]) for group in range(domains)]
        values[name] = np.stack([stats.ratio(part.sum(axis=0), total.sum(axis=0)) for part, total in own])
        values[f"{name}_interval"] = stats.bootstrap_by_group(top, bottom, groups, domains, resamples, seed)
    overall = stats.bootstrap_ratio(sums.counts, seen, strata=groups, resamples=resamples, seed=seed)
    values["utilisation_overall_interval"] = overall / chosen
    values["utilisation_interval"] = values["specialization_interval"] / chosen
    for suffix in ("", "_interval"):
        named = by_name(values.pop(f"per_token{suffix}"), sums.top_k, sums.counts.shape[-1])
        values |= {f"{name}{suffix}": part for name, part in named.items()}
    return values


def _losses(sums: RoutingCounts) -> Values:
    """Load-balance losses over all tokens that take experts."""
    counts, score = sums.counts.sum(axis=0), sums.scores.sum(axis=0) / UNIT
    seen = taken(counts, sums.top_k)
    score = stats.ratio(score, seen)
    return {"load_balance": switch_loss(stats.shares(counts), score), "load_balance_as_coded": loss_as_coded(sums)}


def loss_as_coded(sums: RoutingCounts) -> Float[np.ndarray, ""]:
    """transformers' load-balance loss: layers pooled, then E sum_e f_e P_e.

    f_e is the share of tokens at which the expert is among the K largest of a softmax of the logits, and P_e the mean
    of this softmax, whatever the router scores by and whoever it chooses. NaN where the model has no such loss.
    """
    counts = (sums.coded_counts / np.array(sums.coded_per)[:, None]).sum(axis=0)
    tokens = sums.coded_tokens.sum()
    return switch_loss(stats.ratio(counts, tokens), stats.ratio(sums.coded_scores.sum(axis=0) / UNIT, tokens))


def balances(model: MoEModel) -> list[Balance | None]:
    """How the model's own load-balance loss looks at each MoE layer that text reaches."""
    return [model.spec.moe(layer).balance for layer in model.layers]


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


@checked
def routing(
    model: MoEModel,
    corpus: Corpus,
    *,
    special_tokens: bool = False,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Routing of a corpus: load, specialization by domain, coverage, router confidence, balance losses.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents with domains.
        special_tokens: whether the tokenizer's special tokens count, such as the one that begins every text.
        resamples: how many bootstrap resamples and label permutations.
        seed: of both.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims domain, layer (the model's own indices), expert, bound (low, high). ``*_interval`` are 95 %
        studentised intervals over documents; ``*_debiased`` stand beside plug-in estimates that need it;
        ``*_p``, ``*_null``, ``*_uniform``, ``*_baseline`` are controls, the last
        two by layer where layers choose different numbers of experts. NaN: it takes a second domain, or a
        second document in each.

    Raises:
        BadInput: the model has no tokenizer.
        UnsupportedModel: layers with different numbers of experts.
        BadCheckpoint: the router gives values that are not finite.
    """
    sums = RoutingCounts.empty(len(corpus), *sizes(model), balances(model))
    where = collect(model, corpus, {"routing": sums}, Options(special_tokens, max_tokens, batch_tokens))
    return sums.result(corpus.labels, corpus.domains, provenance=where, resamples=resamples, seed=seed)
