"""What is known of every expert, in one place: its tokens, contexts, domains and partners, its weight and its output.

1. One pass counts routing, token ids, pairs and examples; another adds up the sizes of outputs.
2. Most frequent tokens: ids by how often they chose the expert. Most over-represented: by the log-odds of the id among
   tokens that chose the expert against tokens that did not, with a Dirichlet prior of the corpus's own frequencies
   (Monroe, Colaresi & Quinn 2008, "Fightin' Words", eq. 16, 19, 21), in standard errors: z.
3. The largest of many z is large by chance: `over_z_null` is its mean if as many tokens had been drawn at random. Texts
   repeat themselves, so a z a little above it says little.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

import moe_interp.stats as stats
from moe_interp.analyses.coactivation import PairCounts, uniform
from moe_interp.analyses.collect import Options, Pass, collect, sizes
from moe_interp.analyses.decoding import check_top
from moe_interp.analyses.exact import UNIT, told_top_k
from moe_interp.analyses.examples import Examples
from moe_interp.analyses.norms import OutputSums, collect_outputs, document_means
from moe_interp.analyses.routing import RoutingCounts
from moe_interp.analyses.routing_values import taken
from moe_interp.analyses.token_counts import TokenCounts
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.data import Corpus
from moe_interp.encode import special_token_ids, token_text
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled

BEFORE, AFTER = 12, 6  # tokens of context on either side
_PRIOR = 500.0  # tokens that the prior weighs
_DRAWS = 20


@checked
def expert_profiles(
    model: MoEModel,
    corpus: Corpus,
    *,
    top: Count = 8,
    examples: Draws = 4,
    partners: Draws = 3,
    special_tokens: bool = False,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """The profile of every expert; ``moe.profile(result, layer, expert)`` shows one.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents with domains.
        top: tokens of either kind to keep.
        examples: contexts of either kind to keep.
        partners: experts most often chosen together with it, by lift, to keep.
        special_tokens: whether the tokenizer's special tokens count.
        resamples: of documents, and label permutations, for the domains.
        seed: of these, of the random examples and of the control of z.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims layer, expert, top, example, kind ("heaviest", "random"), partner_rank, domain, bound:
        ``frequent_token`` and ``frequent_count``; ``over_token``, ``over_z`` beside ``over_z_null``, ``over_count``;
        ``context`` (the token between « and »; empty where there are fewer) with its ``context_weight``;
        ``specialization`` by domain with interval and ``_p``, and its baseline; ``partner``, ``partner_lift`` beside
        ``lift_uniform``; ``tokens``, ``load`` beside ``load_uniform``, ``weight``, ``norm``, ``contribution`` and the
        rank of the last three in the layer, 1 the largest.

    Raises:
        BadInput: no tokenizer, or more tokens asked for than the vocabulary has.
        UnsupportedModel: layers with different numbers of experts.
    """
    check_top(top, model.spec.vocab_size)
    options, (layers, experts, top_k) = Options(special_tokens, max_tokens, batch_tokens), sizes(model)
    sums: dict[str, Any] = {
        "routing": RoutingCounts.empty(len(corpus), layers, experts, top_k),
        "tokens": TokenCounts.empty(layers, experts, top_k, model.spec.vocab_size, folds=1),
        "pairs": PairCounts.empty(layers, experts, top_k, blocks=1),
        "examples": Examples.empty(layers, experts, examples, seed=seed),
    }
    where = collect(model, corpus, sums, options)
    outputs, _ = collect_outputs(model, corpus, options)
    routed = sums["routing"].result(corpus.labels, corpus.domains, provenance={}, resamples=resamples, seed=seed)
    values: dict[str, ArrayLike] = {
        **_tokens(sums["tokens"], model.tokenizer, top, seed),
        **_contexts(sums["examples"], Pass(model, corpus, options), model.tokenizer),
        **_partners(sums["pairs"], partners),
        **_sizes(sums["routing"], outputs),
        **_domains(routed),
        "load_uniform": np.array(1 / experts),
    }
    coords: dict[str, ArrayLike] = {
        "bound": ["low", "high"],
        "layer": np.array(layers, dtype=np.int64),
        "expert": np.arange(experts),
        "domain": list(corpus.domains),
        "top": np.arange(1, top + 1),
        "kind": ["heaviest", "random"],
        "example": np.arange(1, examples + 1),
        "partner_rank": np.arange(1, min(partners, experts - 1) + 1),
    }
    how = {"top": top, "examples": examples, "partners": partners, "resamples": resamples, "seed": seed}
    about = {**where, **how, "top_k": told_top_k(top_k)}
    return labelled(described(values, _VARIABLES), coords, analysis="expert_profiles", provenance=about)


def _domains(routed: xr.Dataset) -> dict[str, np.ndarray]:
    order = ("layer", "expert", "domain")
    return {
        "specialization": routed["specialization"].transpose(*order).values,
        "specialization_interval": routed["specialization_interval"].transpose("bound", *order).values,
        "specialization_p": routed["specialization_p"].transpose(*order).values,
        "specialization_baseline": routed["specialization_baseline"].values,
    }


# Tokens


def log_odds(
    chosen: Int[np.ndarray, "X E"], occurs: Int[np.ndarray, " X"], prior: float = _PRIOR
) -> Float[np.ndarray, "X E"]:
    """z of each id's log-odds among tokens that chose the expert against those that did not.

    Args:
        chosen: how often each id chose each expert.
        occurs: how often it occurs.
        prior: how many tokens the prior weighs, spread as ids are in the corpus.
    """
    alpha = (prior * occurs / occurs.sum())[:, None]
    mine, others = chosen + alpha, occurs[:, None] - chosen + alpha
    odds = [part / (part.sum(axis=0) - part) for part in (mine, others)]
    return np.asarray((np.log(odds[0]) - np.log(odds[1])) / np.sqrt(1 / mine + 1 / others))


def _tokens(sums: TokenCounts, tokenizer: Any, top: int, seed: int) -> dict[str, np.ndarray]:
    occurs = sums.occurrences().sum(axis=0)
    ids = np.flatnonzero(occurs)
    texts = np.array([token_text(tokenizer, int(token)) for token in ids], dtype=object)
    found: dict[str, list[np.ndarray]] = {}
    for index in range(len(sums.layers)):
        chosen = sums.table(index, 0)[ids].toarray()
        z = log_odds(chosen, occurs[ids])
        often, over = (_first(values, top) for values in (chosen.astype(float), z))
        part = {
            "frequent_token": texts[often],
            "frequent_count": np.take_along_axis(chosen, often, 0),
            "over_token": texts[over],
            "over_z": np.take_along_axis(z, over, 0),
            "over_count": np.take_along_axis(chosen, over, 0),
            "over_z_null": _largest_z(chosen.sum(axis=0), occurs[ids], np.random.default_rng([seed, index])),
        }
        for name, values in part.items():
            found.setdefault(name, []).append(values.T)
    return {name: _as_stored(np.stack(values)) for name, values in found.items()}


def _first(values: Float[np.ndarray, "X E"], top: int) -> Int[np.ndarray, "top E"]:
    """Rows of the largest values of each column, the last one repeated where there are fewer."""
    order = np.argsort(-values, axis=0, kind="stable")[:top]
    return np.concatenate([order, np.repeat(order[-1:], top - len(order), axis=0)])


def _largest_z(tokens: Int[np.ndarray, " E"], occurs: Int[np.ndarray, " X"], rng: np.random.Generator) -> np.ndarray:
    """Mean over draws of the largest z, if each expert's tokens were drawn from all at random."""
    share = tokens / occurs.sum()
    drawn = [log_odds(rng.binomial(occurs[:, None], share), occurs).max(axis=0) for _ in range(_DRAWS)]
    return np.asarray(np.mean(drawn, axis=0))


def _as_stored(values: np.ndarray) -> np.ndarray:
    return values.astype(str) if values.dtype == object else values


# Contexts


def _contexts(examples: Examples, going: Pass, tokenizer: Any) -> dict[str, np.ndarray]:
    ids = {
        int(document): batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()].tolist()
        for batch in going.batches
        for row, document in enumerate(batch.documents)
    }
    both = np.stack([examples.heaviest, examples.random], axis=2)  # [L, E, kind, n, 3]
    texts, special = np.empty(both.shape[:-1], dtype=object), set(special_token_ids(tokenizer))
    for place in np.ndindex(*texts.shape):
        key, document, position = both[place].tolist()
        texts[place] = "" if key < 0 else _context(tokenizer, ids[document], position, special)
    weights = np.where(examples.heaviest[..., 0] < 0, np.nan, examples.heaviest[..., 0] / UNIT)
    return {"context": texts.astype(str), "context_weight": weights}


def _context(tokenizer: Any, ids: list[int], position: int, special: Collection[int]) -> str:
    """The tokens around one, which stands between « and », but for special ones."""
    before = [token for token in ids[max(0, position - BEFORE) : position] if token not in special]
    after = [token for token in ids[position + 1 : position + 1 + AFTER] if token not in special]
    if tokenizer is None:
        left, right = (" ".join(map(str, part)) for part in (before, after))
    else:
        left, right = (tokenizer.decode(part) if part else "" for part in (before, after))
    return f"{left}«{token_text(tokenizer, ids[position])}»{right}".replace("\0", "\N{SYMBOL FOR NULL}")


# Partners, sizes


def _partners(sums: PairCounts, partners: int) -> dict[str, np.ndarray]:
    pairs = sums.pairs.sum(axis=0)
    chosen = np.diagonal(pairs, axis1=1, axis2=2)
    lift = stats.lift(pairs, chosen, chosen, taken(chosen, sums.top_k))
    lift[:, np.arange(lift.shape[1]), np.arange(lift.shape[1])] = np.nan
    order = np.argsort(-np.nan_to_num(lift, nan=-1.0), axis=2, kind="stable")[..., : min(partners, lift.shape[1] - 1)]
    return {
        "partner": order,
        "partner_lift": np.take_along_axis(lift, order, axis=2),
        "lift_uniform": uniform(sums.top_k, lift.shape[1])["lift_uniform"],
    }


def _sizes(routing: RoutingCounts, outputs: OutputSums) -> dict[str, np.ndarray]:
    counts = routing.counts.sum(axis=0)
    values = {
        "weight": stats.ratio(routing.weights.sum(axis=0) / UNIT, counts),
        "norm": document_means(outputs.norms, outputs.counts),
        "contribution": document_means(outputs.contributions, outputs.counts),
    }
    places = {f"{name}_rank": _places(value) for name, value in values.items()}
    return {"tokens": counts, "load": stats.shares(counts), **values, **places}


def _places(values: Float[np.ndarray, "L E"]) -> Int[np.ndarray, "L E"]:
    """1 for the largest of the layer; experts that were never chosen come last."""
    return np.argsort(np.argsort(-np.nan_to_num(values, nan=-1.0), axis=1, kind="stable"), axis=1) + 1


_LE = ("layer", "expert")
_LET, _LEP, _LED = (*_LE, "top"), (*_LE, "partner_rank"), (*_LE, "domain")
_VARIABLES: dict[str, Description] = {
    "frequent_token": (_LET, "text", "tokens that chose the expert most often"),
    "frequent_count": (_LET, "tokens", "how often they did"),
    "over_token": (_LET, "text", "tokens most over-represented among those that chose the expert"),
    "over_z": (_LET, "standard errors", "log-odds against tokens that did not choose it, Dirichlet prior"),
    "over_z_null": (_LE, "standard errors", "mean of the largest z if as many tokens had been drawn at random"),
    "over_count": (_LET, "tokens", "how often they chose the expert"),
    "context": ((*_LE, "kind", "example"), "text", "the text around a token that chose the expert, it between « and »"),
    "context_weight": ((*_LE, "example"), "1", "the expert's combine weight in the heaviest contexts"),
    "partner": (_LEP, "expert", "experts chosen together with it most, by lift"),
    "partner_lift": (_LEP, "1", "how many times as often as if the two were independent"),
    "lift_uniform": (("layer?",), "1", "lift under a uniform router, (K - 1) E / (K (E - 1))"),
    "tokens": (_LE, "tokens", "tokens that chose the expert"),
    "load": (_LE, "1", "share of the layer's decisions that go to it, 0 ... 1/K"),
    "load_uniform": ((), "1", "load under a uniform router, 1/E"),
    "weight": (_LE, "1", "mean combine weight where it was chosen; NaN if never"),
    "norm": (_LE, "1", "mean norm of its output where it was chosen; NaN if never"),
    "contribution": (_LE, "1", "mean of weight times norm where it was chosen (REAP's saliency); NaN if never"),
    "weight_rank": (_LE, "rank", "place of the weight in the layer, 1 the largest"),
    "norm_rank": (_LE, "rank", "place of the norm in the layer, 1 the largest"),
    "contribution_rank": (_LE, "rank", "place of the contribution in the layer, 1 the largest"),
    "specialization": (_LED, "1", "share of the domain's tokens that chose the expert, 0 ... 1"),
    "specialization_interval": (("bound", *_LED), "1", "95 % interval over documents: specialization"),
    "specialization_p": (_LED, "1", "p against other domains, as in routing, adjusted for the experts of the layer"),
    "specialization_baseline": (("layer?",), "1", "specialization under a uniform router, K/E"),
}
