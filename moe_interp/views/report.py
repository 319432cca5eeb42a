"""The report: the main job's four questions answered for one model, as one self-contained HTML file.

Tokens, names and domains are untrusted: the template escapes everything that it is given, and figures get escaped text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from moe_interp.analyses.coactivation import PairCounts
from moe_interp.analyses.collect import Options, collect, sizes
from moe_interp.analyses.lens import expert_lens
from moe_interp.analyses.norms import norm_and_weight
from moe_interp.analyses.perplexity import perplexity
from moe_interp.analyses.routing import RoutingCounts, balances
from moe_interp.analyses.routing_map import routing_map
from moe_interp.analyses.saturation import reference_saturation
from moe_interp.analyses.similarity import ensemble_similarity
from moe_interp.analyses.token_counts import TokenCounts
from moe_interp.analyses.transitions import TransitionCounts
from moe_interp.analyses.vocabulary import vocabulary_result
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.checkpoint import REFERENCE
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from moe_interp.model import MoEModel
from moe_interp.paths import check_writable
from moe_interp.results import provenance_of
from moe_interp.views import figures, page, routing_figures
from moe_interp.views.tables import between


@dataclass(frozen=True)
class Results:
    """The labelled results that a report shows; None for what the model or the corpus does not have."""

    routing: xr.Dataset
    routing_map: xr.Dataset
    lens: xr.Dataset
    similarity: xr.Dataset
    perplexity: xr.Dataset
    coactivation: xr.Dataset
    transitions: xr.Dataset | None
    vocabulary: xr.Dataset | None
    norms: xr.Dataset
    saturation: xr.Dataset | None


@checked
def report(
    model: MoEModel,
    corpus: Corpus,
    path: str | Path = "report.html",
    *,
    text: str | None = None,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = 256,
    scored: Count | None = 8,
) -> Path:
    """Run the four analyses and write the report.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents with domains.
        path: the HTML file to write, whole or not at all.
        text: a text for the routing map and the lens (None: the start of the corpus' first document).
        resamples: for intervals and permutation tests.
        seed: of these, and of random controls.
        max_tokens: longer documents are cut to so many tokens (None: to the model's context length).
        scored: perplexity, which takes a forward pass for every k and control, is measured on at most so many
            documents of each domain (None: all).

    Raises:
        BadOutput: the file cannot be written, found out before anything is measured.
        BadInput: an empty text, or no corpus.
    """
    target = Path(path)
    check_writable(target)
    if text is not None and not text.strip():
        raise BadInput("the text is empty", expected="at least one character", got=repr(text))
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "max_tokens": max_tokens}
    shown_text = opening(model, corpus) if text is None else text
    model.encode(shown_text)
    results = Results(
        **_routed(model, corpus, max_tokens, resamples, seed),
        norms=norm_and_weight(model, corpus, **options),
        saturation=reference_saturation(resamples=resamples, seed=seed) if _is_reference(model) else None,
        routing_map=routing_map(model, shown_text),
        lens=expert_lens(model, shown_text),
        similarity=ensemble_similarity(model, corpus, **options),
        perplexity=perplexity(model, corpus if scored is None else corpus.take(scored), renormalise="both", **options),
    )
    return page.write(render(model, corpus, results, max_tokens), target)


def _routed(model: MoEModel, corpus: Corpus, max_tokens: int | None, resamples: int, seed: int) -> dict[str, Any]:
    """All that one pass over the corpus says of routing."""
    made_for = sizes(model)
    counts = RoutingCounts.empty(len(corpus), *made_for, balances(model))
    pairs = PairCounts.empty(*made_for)
    tokens = TokenCounts.empty(*made_for, model.spec.vocab_size)
    flows = TransitionCounts.empty(*made_for, seed=seed) if len(model.layers) > 1 else None
    sums = {"routing": counts, "pairs": pairs, "tokens": tokens} | ({"flows": flows} if flows else {})
    where = collect(model, corpus, sums, Options(max_tokens=max_tokens))
    tests: dict[str, Any] = {"provenance": where, "resamples": resamples, "seed": seed}
    try:
        vocabulary = vocabulary_result(tokens, model.tokenizer, provenance=where, seed=seed)
    except BadInput:  # a corpus so small that no token id occurs often enough
        vocabulary = None
    return {
        "routing": counts.result(corpus.labels, corpus.domains, **tests),
        "coactivation": pairs.result(**tests),
        "transitions": flows.result(provenance=where) if flows else None,
        "vocabulary": vocabulary,
    }


def _is_reference(model: MoEModel) -> bool:
    return str(getattr(model.hf, "name_or_path", "")) == str(REFERENCE)


def opening(model: MoEModel, corpus: Corpus, tokens: int = 24) -> str:
    """The beginning of a corpus' first document: at most so many tokens, cut between words where there are any."""
    text = corpus.texts[0]
    short = text[: 20 * tokens]  # few tokens are longer than that
    while len(short) > 1 and len(model.tokenizer(short)["input_ids"]) > tokens:
        short = short[: max(1, len(short) * 3 // 4)]
    words = short.rsplit(" ", 1)[0]
    return words if len(short) < len(text) and words.strip() else short


def render(model: MoEModel, corpus: Corpus, results: Results, max_tokens: int | None) -> str:
    """The page of these results."""
    provenance = provenance_of(results.routing)
    return page.render(
        "report.html.j2",
        _figures(results),
        provenance,
        title=f"{model.name}: a mixture of experts, opened",
        headlines=headlines(results),
        model=model,
        corpus=corpus,
        experts=_experts(results.routing),
        load=_load(results.routing),
        lens_layers=results.lens["layer"].values.tolist(),
        lens_columns=_columns(results.lens),
        positions=_positions(results.lens),
        scored=int(results.perplexity["documents"].sum()),
        truncated=provenance["truncated"],
        max_tokens=max_tokens,
        aggregates=_aggregates(results.perplexity),
    )


def _figures(results: Results) -> dict[str, go.Figure]:
    drawn = {
        "coverage": figures.coverage(results.routing),
        "specialization": figures.specialization(results.routing),
        "strongest": figures.strongest(results.routing),
        "specialization_bars": routing_figures.specialization_bars(results.routing),
        "coactivation": routing_figures.coactivation(results.coactivation),
        "norm_and_weight": routing_figures.norm_and_weight(results.norms),
        "routing_map": figures.routing_map(results.routing_map),
        "lens": figures.lens(results.lens),
        "similarity": figures.similarity(results.similarity),
        "distance": figures.distance(results.similarity),
        "perplexity": figures.perplexity(results.perplexity),
    }
    if results.transitions is not None:
        drawn["flow"] = routing_figures.flow(results.transitions)
        drawn["information"] = routing_figures.information(results.transitions)
    if results.vocabulary is not None:
        drawn["vocabulary"] = routing_figures.vocabulary(results.vocabulary)
    if results.saturation is not None:
        drawn["saturation"] = routing_figures.saturation(results.saturation)
    return drawn


def headlines(results: Results) -> list[page.Headline]:
    """The four questions in four lines."""
    routed, similar, quality = results.routing, results.similarity, results.perplexity
    peak = routed["specialization"].argmax(...)
    domain, layer, expert = (int(peak[name]) for name in ("domain", "layer", "expert"))
    at = {"domain": domain, "layer": layer, "expert": expert}
    share, (low, high) = routed["specialization"][at], routed["specialization_interval"][at].values
    alone = similar["cosine_overall"].sel(residual="without", shared="without").mean("layer")
    joined = similar["cosine_overall"].sel(residual="with", shared="without").mean("layer")
    ratios = quality.sel(aggregate="token", renormalise="no")
    one = ratios.sel(k=1)
    no_expert = results.lens["kl"].sel(part="resid_mid").mean()
    heaviest = results.lens["kl"].sel(part="resid_mid+c1").mean()
    return [
        page.Headline(
            "Who is routed where: the most specialised expert",
            f"expert {int(routed['expert'][expert])} of layer {int(routed['layer'][layer])} takes "
            f"{100 * float(share):.0f} % {between(100 * low, 100 * high, 0)} of the tokens of "
            f"{routed['domain'].values[domain]}",
            f"{100 * figures.by_layer(routed, 'specialization_baseline')[layer]:.1f} % under a uniform router",
        ),
        page.Headline(
            "What each expert writes: how much the heaviest expert moves the lens towards the output",
            f"KL to the output {float(heaviest):.2f} nats with it, mean over layers and tokens of the text",
            f"{float(no_expert):.2f} nats with no expert",
        ),
        page.Headline(
            "How well one expert stands for all: cosine to the ensemble",
            f"{float(alone.sel(candidate='heaviest')):.2f} alone, "
            f"{float(joined.sel(candidate='heaviest')):.3f} with the residual",
            f"{float(alone.sel(candidate='random_unselected')):.2f} for a random expert alone, "
            f"{float(joined.sel(candidate='none')):.3f} for the residual with no expert at all",
        ),
        page.Headline(
            "What fewer experts cost: perplexity with one expert",
            f"× {float(one['ratio_overall']):.2f} {between(*one['ratio_overall_interval'].values)}",
            f"× {float(one['ratio_random_overall']):.2f} with a random one of the chosen, "
            f"× {float(ratios['ratio_none_overall']):.2f} with none",
        ),
    ]


def _experts(routed: xr.Dataset, per_domain: int = 3) -> list[dict[str, Any]]:
    """The most specialised experts of every domain, over all layers."""
    rows = []
    for domain in routed["domain"].values:
        at = routed.sel(domain=domain).stack(where=("layer", "expert"))
        for place in np.argsort(-at["specialization"].values)[:per_domain]:
            one = at.isel(where=int(place))
            low, high = one["specialization_interval"].values
            rows.append(
                {
                    "domain": str(domain),
                    "layer": int(one["layer"]),
                    "expert": int(one["expert"]),
                    "share": 100 * float(one["specialization"]),
                    "low": 100 * low,
                    "high": 100 * high,
                    "p": float(one["specialization_p"]),
                }
            )
    return rows


def _load(routed: xr.Dataset) -> list[dict[str, int | float]]:
    """Load and confidence of every layer, over all domains (per-token means weighted by tokens)."""
    weights = routed["tokens"] / routed["tokens"].sum()
    rows = []
    for layer in routed["layer"].values:
        at = routed.sel(layer=layer)
        rows.append(
            {"layer": int(layer)}
            | {name: float(at[f"{name}_overall"]) for name in ("n50", "n90", "load_entropy", "max_vio", "dead_experts")}
            | {
                name: float((at[name] * weights).sum())
                for name in ("entropy", "heaviest_weight", "weight_sum", "z_loss")
            }
            | {"load_balance": float(at["load_balance"])}
        )
    return rows


@dataclass(frozen=True)
class Cell:
    """What one part says at one layer and position: its first tokens with their probabilities in per cent."""

    tokens: list[tuple[str, float]]
    kl: float
    agrees: bool


@dataclass(frozen=True)
class Position:
    """The lens after one token: what the model says, the heaviest expert by layer, and cells by part and layer."""

    pos: int
    token: str
    final: list[tuple[str, float]]
    heaviest: list[tuple[int, float]]
    parts: dict[str, list[Cell]]


def _positions(result: xr.Dataset, top: int = 3) -> list[Position]:
    return [_position(result.isel(pos=index), top) for index in range(result.sizes["pos"])]


def _position(at: xr.Dataset, top: int) -> Position:
    tokens, chances = at["top_token"].values, 100 * at["top_probability"].values
    kl, agrees = at["kl"].values.tolist(), at["agreement"].values.tolist()
    layers = range(at.sizes["layer"])
    parts = {
        str(part): [
            Cell(
                _pairs(tokens[layer, number], chances[layer, number], top),
                kl[layer][number],
                agrees[layer][number] == 1,
            )
            for layer in layers
        ]
        for number, part in enumerate(at["part"].values)
    }
    first = at.sel(rank=1)
    return Position(
        pos=int(at["pos"]),
        token=str(at["token"].item()),
        final=_pairs(at["final_token"].values, 100 * at["final_probability"].values, top),
        heaviest=[(int(e), float(w)) for e, w in zip(first["expert"].values, first["gate_weight"].values, strict=True)],
        parts=parts,
    )


def _pairs(tokens: np.ndarray, chances: np.ndarray, top: int) -> list[tuple[str, float]]:
    return [(str(token), float(chance)) for token, chance in zip(tokens[:top], chances[:top], strict=True)]


def _columns(result: xr.Dataset) -> list[str]:
    """The parts worth a column at every position; the whole list is shown for the last one."""
    wanted = ("resid_pre", "resid_mid", "resid_mid+c1", "resid_post", "c1", "shared")
    return [part for part in wanted if part in result["part"].values]


def _aggregates(result: xr.Dataset) -> list[dict[str, Any]]:
    """Perplexity of every domain and of all, for every k, by both aggregates and with weights renormalised or not."""
    rows = []
    for aggregate in result["aggregate"].values:
        for renormalise in result["renormalise"].values:
            at = result.sel(aggregate=aggregate, renormalise=renormalise)
            rows += [
                {
                    "aggregate": str(aggregate),
                    "renormalise": str(renormalise),
                    "domain": str(domain),
                    "full": float(at["perplexity_full"].sel(domain=domain)),
                    "ratios": at["ratio"].sel(domain=domain).values.tolist(),
                }
                for domain in result["domain"].values
            ]
            rows.append(
                {
                    "aggregate": str(aggregate),
                    "renormalise": str(renormalise),
                    "domain": "all",
                    "full": float(at["perplexity_full_overall"]),
                    "ratios": at["ratio_overall"].values.tolist(),
                }
            )
    return rows
