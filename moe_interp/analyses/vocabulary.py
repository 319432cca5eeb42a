"""Vocabulary specialization: how much of a token id's routing goes to one expert, beside what chance makes of it.

1. For token id x seen N_x times, max_e N_{x,e} / N_x (Muennighoff et al. 2024, arXiv 2409.02060, section 5.4), averaged
   over the ids seen at least m times, which weigh the same. Tokens that skip all experts of a layer are not in its N_x.
2. The null: every occurrence draws K distinct experts by the layer's load, whatever the token. It is large: an id
   seen once scores 1 whatever happens. `gain` is the difference at the same counts. The load is that of the whole
   corpus: where documents differ in load and in the ids that they hold, their topics count as gain.
3. Intervals of the gain leave out folds of documents in turn and count anew; the load stays that of all.
"""

from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

import moe_interp.stats as stats
from moe_interp.analyses.collect import Options, collect, sizes
from moe_interp.analyses.exact import Provenance, told_top_k
from moe_interp.analyses.token_counts import FOLDS, TokenCounts
from moe_interp.arguments import Count, Parts, Seed, checked
from moe_interp.data import Corpus
from moe_interp.encode import token_text
from moe_interp.errors import BadInput
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled


@checked
def vocabulary_specialization(
    model: MoEModel,
    corpus: Corpus,
    *,
    at_least: Count = 10,
    folds: Parts = FOLDS,
    special_tokens: bool = False,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """How much of a token id's routing goes to one expert.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents; their domains are not used.
        at_least: m; ids that occur less often are left out.
        folds: of documents, for the intervals.
        special_tokens: whether the tokenizer's special tokens count.
        seed: of the draws of the null.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims layer, token_id (those kept), bound: ``specialization``, the mean over ids, K/E ... 1, beside
        ``specialization_null``; ``gain`` with its interval; for each id ``expert``, ``share``, ``share_null``,
        ``occurrences`` and ``token``.

    Raises:
        BadInput: no tokenizer, or no id that occurs so often.
        UnsupportedModel: layers with different numbers of experts.
    """
    sums = TokenCounts.empty(*sizes(model), model.spec.vocab_size, folds=folds)
    where = collect(model, corpus, {"tokens": sums}, Options(special_tokens, max_tokens, batch_tokens))
    return vocabulary_result(sums, model.tokenizer, provenance=where, at_least=at_least, seed=seed)


def vocabulary_result(
    sums: TokenCounts, tokenizer: Any, *, provenance: Provenance, at_least: int = 10, seed: int = 0
) -> xr.Dataset:
    """The Dataset of `vocabulary_specialization` from counts.

    Raises:
        BadInput: no id occurs so often.
    """
    occurrences = sums.occurrences()
    ids = np.flatnonzero(occurrences.sum(axis=0) >= max(at_least, 1))
    if not len(ids):
        got = f"at most {occurrences.sum(axis=0).max()} occurrences of one"
        raise BadInput("no token id occurs often enough", expected=f"{at_least} or more", got=got)
    found = [_layer(sums, index, ids, seed) for index in range(len(sums.layers))]
    values = {name: np.stack([one[name] for one in found], axis=-1 if "interval" in name else 0) for name in found[0]}
    values["occurrences"] = occurrences[:, ids].sum(axis=0)
    values["token"] = np.array([token_text(tokenizer, int(token)) for token in ids])
    coords: dict[str, ArrayLike] = {
        "bound": ["low", "high"],
        "layer": np.array(sums.layers, dtype=np.int64),
        "token_id": ids,
    }
    how = {"at_least": at_least, "top_k": told_top_k(sums.top_k), "folds": sums.folds, "seed": seed}
    return labelled(
        described(values, _VARIABLES), coords, analysis="vocabulary_specialization", provenance={**provenance, **how}
    )


def _layer(sums: TokenCounts, index: int, ids: np.ndarray, seed: int) -> dict[str, Any]:
    """One layer, from the folds' tables."""
    tables, top_k = [sums.table(index, fold) for fold in range(sums.folds)], sums.top_k[index]
    load = top_k * stats.shares(np.asarray(sum(table.sum(axis=0) for table in tables)))
    null = stats.largest_share_null(stats.inclusion_weights(load), top_k, seed=seed)
    blocks = np.stack([table[ids].toarray() for table in tables])
    total = blocks.sum(axis=0)
    gain, interval = stats.block_jackknife(partial(_gain, null=null, top_k=top_k), blocks, debias=False)
    share, by_chance = _largest(total, null, top_k)
    there = ~np.isnan(share)
    return {
        "specialization": share[there].mean(),
        "specialization_null": by_chance[there].mean(),
        "gain": gain,
        "gain_interval": interval,
        "expert": total.argmax(axis=1),
        "share": share,
        "share_null": by_chance,
    }


def _largest(
    counts: Int[np.ndarray, "X E"], null: Any, top_k: int
) -> tuple[Float[np.ndarray, " X"], Float[np.ndarray, " X"]]:
    """Largest share of each id's tokens that take experts, and by chance; NaN for an id whose tokens take none."""
    taken = counts.sum(axis=1) / top_k
    by_chance = np.where(taken > 0, null(np.maximum(taken, 1)), np.nan)
    return stats.ratio(counts.max(axis=1), taken), by_chance


def _gain(counts: Int[np.ndarray, "X E"], null: Any, top_k: int) -> Float[np.ndarray, ""]:
    share, by_chance = _largest(counts, null, top_k)
    there = ~np.isnan(share)
    return np.asarray((share[there] - by_chance[there]).mean())


_LX = ("layer", "token_id")
_VARIABLES: dict[str, Description] = {
    "specialization": (("layer",), "1", "mean over ids of the share of an id's tokens that chose its first expert"),
    "specialization_null": (
        ("layer",),
        "1",
        "the same if every token drew K distinct experts by the layer's load, whatever its id",
    ),
    "gain": (
        ("layer",),
        "1",
        "specialization above its null at the same counts; 0 if neither ids nor the topics they stand for say anything",
    ),
    "gain_interval": (("bound", "layer"), "1", "95 % interval over folds of documents: gain"),
    "expert": (_LX, "expert", "the expert that most of the id's tokens chose"),
    "share": (_LX, "1", "share of the id's tokens that chose it, of those that take any, K/E ... 1"),
    "share_null": (_LX, "1", "mean of the largest share of so many tokens that draw K experts by the layer's load"),
    "occurrences": (("token_id",), "tokens", "how often the id occurs"),
    "token": (("token_id",), "text", "the token"),
}
