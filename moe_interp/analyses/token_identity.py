"""How much of the routing is the token: what its id alone predicts, and what is gained over that.

1. A first pass counts which experts each id goes to, by folds of documents. For a document of one fold, the chance that
   id x chooses expert e is N_{x,e} / N_x in the other folds. Ids that occur there fewer than m times are left out.
2. A second pass counts choices per document over the other tokens, those that skip all experts with them: ids predict
   that, too. Specialization by domain then stands beside what the
   ids predict, summed over the same tokens, and `gain` is the difference: context, whatever it is made of. (Ids that
   only one domain has explain its specialization by themselves: French is a language and a vocabulary.)
3. `overlap`: share of a token's K experts that are among the K that its id went to most in the other folds, beside the
   K busiest experts of the layer in place of the id's.

Intervals of the gain are over documents; p flips the sign of each document's difference, as in `labels`.
"""

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

import moe_interp.stats as stats
from moe_interp.analyses.collect import Options, Pass, sizes
from moe_interp.analyses.exact import blocks_of, told_top_k
from moe_interp.analyses.labels import LabelCounts
from moe_interp.analyses.token_counts import FOLDS, TokenCounts
from moe_interp.arguments import Count, Draws, Parts, Seed, checked
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled


@checked
def token_identity(
    model: MoEModel,
    corpus: Corpus,
    *,
    at_least: Count = 5,
    folds: Parts = FOLDS,
    special_tokens: bool = False,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Specialization by domain beside what token ids alone predict.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents with domains.
        at_least: m; tokens whose id occurs less often in the other folds are left out, of both sides.
        folds: of documents, two or more.
        special_tokens: whether the tokenizer's special tokens count.
        resamples: bootstrap resamples and sign flips.
        seed: of both.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims domain, layer, expert, bound: ``specialization`` and ``specialization_token`` over the tokens kept,
        ``gain`` with its interval and ``gain_p``; ``overlap`` with its interval beside ``overlap_load``, per layer;
        ``known``, the share of a domain's tokens that are kept.

    Raises:
        BadInput: no tokenizer, fewer than two folds, or no id that occurs in two of them often enough.
        UnsupportedModel: layers with different numbers of experts.
    """
    layers, experts, top_k = sizes(model)
    going = Pass(model, corpus, Options(special_tokens, max_tokens, batch_tokens))
    sums = TokenCounts.empty(layers, experts, top_k, model.spec.vocab_size, folds=folds)
    for run, batch in going.runs((), "experts by token id"):
        sums.update(run, batch.documents)
    known = known_ids(sums, at_least)
    counts = LabelCounts.empty(len(corpus), 2, layers, experts, top_k)
    for run, batch in going.runs((), "experts of known ids"):
        counts.add(run, batch.documents, _known_tokens(run, batch.documents, known))
    values = identity_values(sums, counts, known, corpus.labels, len(corpus.domains), resamples, seed)
    coords: dict[str, Any] = {
        "bound": ["low", "high"],
        "domain": list(corpus.domains),
        "layer": np.array(layers, dtype=np.int64),
        "expert": np.arange(experts),
    }
    how = {"at_least": at_least, "folds": folds, "resamples": resamples, "seed": seed, "top_k": told_top_k(top_k)}
    return labelled(
        described(values, _VARIABLES), coords, analysis="token_identity", provenance={**going.provenance, **how}
    )


def known_ids(sums: TokenCounts, at_least: int) -> Bool[np.ndarray, "Z V"]:
    """For each fold, the ids that occur often enough in the other folds.

    Raises:
        BadInput: none does.
    """
    occurrences = sums.occurrences()
    known = occurrences.sum(axis=0) - occurrences >= max(at_least, 1)
    if not (known & (occurrences > 0)).any():
        raise BadInput("no token id is known from other documents", expected=f"{at_least} occurrences", got="fewer")
    return known


def _known_tokens(run: Any, documents: Int[np.ndarray, " B"], known: Bool[np.ndarray, "Z V"]) -> list[np.ndarray]:
    """1 for a token whose id is known, else 0, by the number of the token in its text."""
    ids, index, real = (part.cpu().numpy() for part in (run.token_ids, run.tokens.index, run.mask))
    found = []
    for row, document in enumerate(documents):
        label = np.zeros(int(index[row].max()) + 1, np.int64)
        label[index[row][real[row]]] = known[document % len(known), ids[row][real[row]]]
        found.append(label)
    return found


def identity_values(
    sums: TokenCounts,
    counts: LabelCounts,
    known: Bool[np.ndarray, "Z V"],
    groups: Int[np.ndarray, " N"],
    domains: int,
    resamples: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Every value of the result; ``counts`` has label 1 for tokens of known ids."""
    actual, tokens = counts.counts[:, 1], counts.tokens[:, 1]
    predicted, overlap = _predicted(sums, known, len(tokens))
    own = [groups == group for group in range(domains)]
    difference = actual - predicted
    p = [stats.sign_flip_max(difference[one], flips=resamples, seed=seed + group) for group, one in enumerate(own)]
    total = stats.group_totals(tokens, groups, domains)
    shares = {
        name: stats.ratio(stats.group_totals(part.astype(float), groups, domains), total)
        for name, part in (("specialization", actual), ("specialization_token", predicted), ("gain", difference))
    }
    whole = stats.group_totals(counts.tokens.sum(axis=1), groups, domains)
    return {
        **shares,
        "gain_interval": stats.bootstrap_by_group(difference, tokens, groups, domains, resamples, seed),
        "gain_p": np.stack(p),
        **overlap,
        "tokens": total,
        "known": stats.ratio(total, whole),
    }


def _predicted(
    sums: TokenCounts, known: Bool[np.ndarray, "Z V"], documents: int
) -> tuple[Float[np.ndarray, "N L E"], dict[str, np.ndarray]]:
    """Choices that ids predict for every document, and how often the predicted K experts are chosen."""
    occurrences, histogram = sums.occurrences(), sums.histogram(documents)
    folds = blocks_of(np.arange(documents), sums.folds)
    predicted = np.zeros((documents, len(sums.layers), sums.experts))
    overlap: dict[str, list[Any]] = {"overlap": [], "overlap_interval": [], "overlap_load": []}
    for index in range(len(sums.layers)):
        tables = [sums.table(index, fold) for fold in range(sums.folds)]
        total = sum(tables[1:], tables[0])
        hits = np.zeros((sums.folds, 3))
        for fold, table in enumerate(tables):
            ids = np.flatnonzero(known[fold] & (occurrences[fold] > 0))
            others = total[ids].toarray() - table[ids].toarray()
            chance = others / (occurrences[:, ids].sum(axis=0) - occurrences[fold, ids])[:, None]
            members = np.flatnonzero(folds == fold)
            predicted[members, index] = histogram[members][:, ids] @ chance
            busy = total.sum(axis=0) - table.sum(axis=0)
            hits[fold] = _hits(table[ids].toarray(), chance, np.asarray(busy), sums.top_k[index])
        estimate, interval = stats.block_jackknife(lambda one: one[0] / one[2], hits, debias=False)
        overlap["overlap"].append(estimate)
        overlap["overlap_interval"].append(interval)
        overlap["overlap_load"].append(hits[:, 1].sum() / hits[:, 2].sum())
    interval = np.stack(overlap.pop("overlap_interval"), axis=1)
    return predicted, {name: np.array(values) for name, values in overlap.items()} | {"overlap_interval": interval}


def _hits(
    chosen: Int[np.ndarray, "X E"], chance: Float[np.ndarray, "X E"], busy: Int[np.ndarray, " E"], top_k: int
) -> Float[np.ndarray, " 3"]:
    """Choices among the K that each id went to most elsewhere, among the K busiest of the layer, and all."""
    best = np.argsort(-chance, axis=1, kind="stable")[:, :top_k]
    busiest = np.argsort(-busy, kind="stable")[:top_k]
    return np.array([np.take_along_axis(chosen, best, 1).sum(), chosen[:, busiest].sum(), chosen.sum()], dtype=float)


_DLE = ("domain", "layer", "expert")
_VARIABLES: dict[str, Description] = {
    "specialization": (_DLE, "1", "share of the domain's tokens of known ids that chose the expert, 0 ... 1"),
    "specialization_token": (_DLE, "1", "the same predicted from the ids, by where they went in other documents"),
    "gain": (_DLE, "1", "specialization above what ids predict, -1 ... 1; 0 where the id decides the expert"),
    "gain_interval": (("bound", *_DLE), "1", "95 % interval over documents: gain"),
    "gain_p": (
        _DLE,
        "1",
        "p that the domain's tokens choose the expert no more often than their ids predict: signs of documents "
        "flipped, one-sided, adjusted for the experts of the layer by the maximum statistic",
    ),
    "overlap": (
        ("layer",),
        "1",
        "share of a token's experts that are among the K its id went to most in other documents",
    ),
    "overlap_interval": (("bound", "layer"), "1", "95 % interval over folds of documents: overlap"),
    "overlap_load": (("layer",), "1", "the same with the layer's K busiest experts, whatever the id; uniform: K/E"),
    "tokens": (("domain",), "tokens", "tokens whose id is known from other documents"),
    "known": (("domain",), "1", "their share of all tokens of the domain"),
}
