"""Published claims about routing and perplexity, held to the figures of three models and to the bundled one.

    python examples/published_claims.py                        # on the reference model alone
    python examples/published_claims.py --recorded DIR         # and on recorded figures (or MOE_INTERP_RECORDED)
    python examples/published_claims.py --markdown FILE        # the same as the page docs/claims.md

DIR holds the figures that MoE-Lens (arXiv 2603.05806) recorded with DeepSeekMoE-16B, OLMoE and Qwen1.5-MoE, as
`moe_lens.py` reads them. They have no documents, so what is said of them has no interval, except perplexity, which has
samples. On the reference model every figure has one: 95 %, over documents.

A verdict is "holds", "does not hold" or "cannot be told"; by a criterion named with the claim where the paper names
none. On the reference model it asks for the interval too: "holds" only if all of it does. A test that rejects nothing
does not show that there is nothing: "cannot be told".
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from moe_lens import COLOURS, FAILS, HOLDS, UNKNOWN, Recorded
from moe_lens import claims as recorded_claims
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import moe_interp as moe

REFERENCE = "reference model"
PREFACE = """# Published claims, tested

Written by `python examples/published_claims.py --recorded DIR --markdown docs/claims.md`; the criteria are in the
claims, the definitions in the docstrings. DIR holds the figures that MoE-Lens ("An Expert Is All You Need") recorded:
counts of DeepSeekMoE-16B, OLMoE and Qwen1.5-MoE without documents, so that they have no interval (perplexity has
samples). The reference model ran on the bundled sample texts; intervals are 95 % over documents. Claims of a paper on
vision mixtures, which need models trained, are in docs/vision_moe.md.
"""


@dataclass(frozen=True)
class Verdict:
    """One claim, where it was tested, what was found, and its control."""

    claim: str
    on: str
    verdict: str
    figures: str
    control: str


@dataclass(frozen=True)
class Measured:
    """What the reference model gives on its sample texts."""

    routing: xr.Dataset
    similarity: xr.Dataset
    perplexity: xr.Dataset
    vocabulary: xr.Dataset
    identity: xr.Dataset
    pairs: xr.Dataset
    saturation: xr.Dataset
    norms: xr.Dataset
    shared: xr.Dataset
    supers: xr.Dataset

    @classmethod
    def of(cls, model: moe.MoEModel, corpus: moe.Corpus) -> "Measured":
        return cls(
            moe.routing(model, corpus),
            moe.ensemble_similarity(model, corpus),
            moe.perplexity(model, corpus, ks=[1, 3, 6]),
            moe.vocabulary_specialization(model, corpus),
            moe.token_identity(model, corpus),
            moe.coactivation(model, corpus),
            moe.reference_saturation(),
            moe.norm_and_weight(model, corpus),
            moe.shared_experts(model, corpus.take(8)),
            moe.super_experts(model, corpus),
        )


def span(values: object, digits: str) -> str:
    """The smallest and the largest of some values."""
    found = np.asarray(values, dtype=float)
    return f"{found.min():{digits}} to {found.max():{digits}}"


def judged(low: float, high: float, bound: float, *, below: bool = False) -> str:
    """Whether all of an interval is on the claimed side of a bound, none of it, or some."""
    if below:
        return HOLDS if high <= bound else FAILS if low > bound else UNKNOWN
    return HOLDS if low >= bound else FAILS if high < bound else UNKNOWN


def measured_claims(found: Measured) -> Iterator[Verdict]:
    """Every claim, on the reference model."""
    yield few_experts(found.routing)
    yield one_expert_stands_out(found.routing)
    yield cosine(found.similarity)
    yield five_percent(found.perplexity)
    yield baseline(found.routing)
    yield vocabulary(found.vocabulary)
    yield token(found.identity)
    yield pairs(found.pairs)
    yield saturation(found.saturation)
    yield norms(found.norms)
    yield supers(found.supers)
    yield shared(found.shared)


def few_experts(routing: xr.Dataset) -> Verdict:
    top_k = round(float(routing.specialization_baseline) * routing.sizes["expert"])
    n50 = routing.n50_debiased.values
    few = int((n50 <= top_k).sum())
    return Verdict(
        f"very few experts handle over 50 % of routing decisions (taken as: no more than the {top_k} a token uses)",
        REFERENCE,
        HOLDS if few > n50.size / 2 else FAILS,
        f"half of a layer's decisions take {span(n50, '.1f')} experts (bias removed), median "
        f"{np.median(n50):.1f}; {top_k} or fewer in {few} of {n50.size} domain-layers",
        f"uniform router: {float(routing.n50_uniform.mean()):.1f} of {routing.sizes['expert']}",
    )


def one_expert_stands_out(routing: xr.Dataset) -> Verdict:
    best = routing.isel(routing.specialization.argmax(("domain", "layer", "expert")))
    low, high = best.specialization_interval.values
    significant = float((routing.specialization_p.min("expert") <= 0.05).mean())
    return Verdict(
        "in some layer one expert takes 70 % or more of a domain's tokens",
        REFERENCE,
        judged(low, high, 0.7),
        f"{best.domain.values!s}, layer {int(best.layer)}, expert {int(best.expert)}: "
        f"{float(best.specialization):.1%} [{low:.1%}, {high:.1%}], p = {float(best.specialization_p):.3f}; in "
        f"{significant:.0%} of domain-layers some expert is preferred (p <= 0.05 over the layer). The largest of "
        f"{routing.specialization.size:,} values: its interval does not know that it was picked",
        f"uniform router: {float(routing.specialization_baseline):.1%}",
    )


def cosine(similarity: xr.Dataset) -> Verdict:
    at = {"residual": "with", "shared": "without"}
    means = similarity.cosine_overall.sel(at)
    low, high = similarity.cosine_overall_interval.sel(at | {"candidate": "heaviest"}).min("layer").values
    alone = similarity.cosine_overall.sel(residual="without", shared="without", candidate="heaviest")
    return Verdict(
        "top-1 against the ensemble reaches cosine 0.95 (taken as: in every layer)",
        REFERENCE,
        judged(low, high, 0.95),
        f"{span(means.sel(candidate='heaviest'), '.3f')} by "
        f"layer, with the residual; the experts' contributions alone {span(alone, '.2f')}",
        f"no expert at all: {span(means.sel(candidate='none'), '.3f')}",
    )


def five_percent(perplexity: xr.Dataset) -> Verdict:
    at = perplexity.sel(aggregate="document", k=1)
    low, high = at.ratio_overall_interval.values
    worst = at.ratio.idxmax("domain")
    return Verdict(
        "perplexity increases by only 5 % with a single expert",
        REFERENCE,
        judged(low, high, 1.05, below=True),
        f"top-1 / top-6: {float(at.ratio_overall):.3f} [{low:.3f}, {high:.3f}]; most in {worst.values!s}: "
        f"{float(at.ratio.max()):.3f}",
        f"one of the six at random: {float(at.ratio_random_overall):.3f}; none: {float(at.ratio_none_overall):.3f}",
    )


def baseline(routing: xr.Dataset) -> Verdict:
    return Verdict(
        "a uniform router gives each expert K/E of the tokens",
        REFERENCE,
        HOLDS if abs(float(routing.specialization_baseline) - 6 / 64) < 1e-12 else FAILS,
        f"{float(routing.specialization_baseline):.3%}, and {float(routing.specialization.mean()):.3%} is the mean "
        "over "
        "experts of any router: it says nothing of one",
        "6 / 64 = 9.375 %",
    )


def vocabulary(result: xr.Dataset) -> Verdict:
    gain, (low, high) = result.gain.values, result.gain_interval.values
    return Verdict(
        "token ids have experts of their own (OLMoE: vocabulary specialization)",
        REFERENCE,
        HOLDS if (low > 0).all() else FAILS if (high < 0).any() else UNKNOWN,
        f"{span(result.specialization.values, '.2f')} by layer, above the null "
        f"by {span(gain, '.2f')} (lowest interval [{low.min():.2f}, {high[low.argmin()]:.2f}])",
        f"draws by load: {span(result.specialization_null.values, '.2f')}",
    )


def token(result: xr.Dataset) -> Verdict:
    overlap = result.overlap.values
    (low, _), load = result.overlap_interval.values, result.overlap_load.values
    share = float((result.gain_p.min("expert") <= 0.05).mean())
    return Verdict(
        "specialization by domain is more than the domain's vocabulary",
        REFERENCE,
        HOLDS if share > 0.5 else UNKNOWN,
        f"in {share:.0%} of domain-layers some expert takes more tokens than their ids predict (p <= 0.05 over the "
        "layer; "
        f"taken as: more than half). Ids alone predict {span(overlap, '.0%')} of the experts (lowest "
        f"end of an interval {low.min():.0%})",
        f"the layer's busiest experts predict {span(load, '.0%')}",
    )


def pairs(result: xr.Dataset) -> Verdict:
    share = float((result.lift_p <= 0.05).sum() / result.lift_p.notnull().sum())
    layers = int((result.lift_p.min(("expert", "other")) <= 0.05).sum())
    return Verdict(
        "experts are co-activated beyond chance (OLMoE: co-activation; taken as: some pair in every layer)",
        REFERENCE,
        HOLDS if layers == result.sizes["layer"] else UNKNOWN,
        f"{share:.0%} of pairs go together more than their loads make them (p <= 0.05 over a layer's pairs), some in "
        f"{layers} of {result.sizes['layer']} layers; the largest co-activation is "
        f"{float(result.coactivation.max()):.0%}, "
        f"{float(result.coactivation_as_coded.max()):.0%} as OLMoE's script counts it",
        f"uniform router: {float(result.coactivation_uniform):.1%}",
    )


def saturation(result: xr.Dataset) -> Verdict:
    early = result.isel(step=1)
    low, high = early.saturation_interval.min("layer").values
    return Verdict(
        "routing is settled early in training (OLMoE: 60 % of the final experts after 1 % of training; taken as: at "
        "step "
        "180 of 3,200, 6 %)",
        REFERENCE,
        judged(low, high, 0.6),
        f"{span(early.saturation, '.0%')} by layer at step 180, "
        f"{span(result.saturation.isel(step=-2), '.0%')} at "
        f"step {int(result.step[-2]):,}",
        f"routers that share only their loads: {span(early.independent, '.0%')}",
    )


def norms(result: xr.Dataset) -> Verdict:
    low, high = result.rank_correlation_interval.values
    return Verdict(
        "the router prefers experts with large outputs",
        REFERENCE,
        HOLDS if (low > 0).all() else FAILS if (high < 0).all() else UNKNOWN,
        f"rank correlation within tokens {span(result.rank_correlation.values, '.2f')} by layer (lowest end of an "
        f"interval {low.min():.2f})",
        f"scores in random order: {span(result.rank_correlation_shuffled.values, '.2f')}",
    )


def supers(result: xr.Dataset) -> Verdict:
    count = int(result["super"].sum())
    ratio = f"; without the first perplexity is × {float(result.ratio[0]):.3f}" if count else ""
    return Verdict(
        "a few super experts hold the largest values",
        REFERENCE,
        HOLDS if count else FAILS,
        f"{count} by the published rule, which looks at the first three quarters of the layers alone; the largest "
        "value by "
        f"layer: {', '.join(f'{v:.0f}' for v in result.largest.max('expert').values)}{ratio}",
        f"the rule's threshold: {float(result.threshold):.0f}",
    )


def shared(result: xr.Dataset) -> Verdict:
    low = result.ratio_without_shared_interval.sel(bound="low")
    return Verdict(
        "shared experts do what every token needs (taken as: more constant than the routed sum in every layer)",
        REFERENCE,
        HOLDS if bool((result.constancy_shared > result.constancy_routed).all()) else FAILS,
        f"{span(result.constancy_shared, '.0%')} of their squares are the "
        f"same for every token; a layer without them costs × {span(result.ratio_without_shared, '.3f')} (lowest end "
        f"of an interval {float(low.min()):.3f})",
        f"routed sum: {span(result.constancy_routed, '.0%')}; a layer "
        f"without it × {span(result.ratio_without_routed, '.3f')}",
    )


def on_recorded(folder: Path) -> list[Verdict]:
    """The claims that recorded figures can be held to, by model."""
    baselines = "uniform baselines K/E: 9.4 %, 12.5 %, 6.67 %"
    return [
        Verdict(one.said, "recorded figures", one.verdict, one.figures, f"{baselines}. As coded: {one.as_coded}")
        for one in recorded_claims(Recorded.read(folder))
    ]


def show(console: Console, verdicts: list[Verdict]) -> None:
    """A table for the terminal."""
    table = Table(title="Published claims", show_lines=True)
    for name, ratio in (("claim", 3), ("on", 1), ("verdict", 1), ("figures", 5), ("control", 4)):
        table.add_column(name, ratio=ratio)
    for one in verdicts:
        colour = COLOURS[one.verdict]
        table.add_row(
            escape(one.claim), one.on, f"[{colour}]{one.verdict}[/]", escape(one.figures), escape(one.control)
        )
    console.print(table)


def page(verdicts: list[Verdict]) -> str:
    """The same as markdown."""
    lines = [PREFACE, "| claim | on | verdict | figures | control |", "|---|---|---|---|---|"]
    cells = [[one.claim, one.on, f"**{one.verdict}**", one.figures, one.control] for one in verdicts]
    return "\n".join([*lines, *("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells), ""])


def main() -> None:
    """Recorded figures first, for they take seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, default=os.environ.get("MOE_INTERP_RECORDED"), metavar="DIR")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--documents", type=int, metavar="N", help="at most so many of each domain of the sample")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180)
    try:
        verdicts = on_recorded(Path(options.recorded)) if options.recorded else []
        corpus = moe.sample() if options.documents is None else moe.sample().take(options.documents)
        verdicts += measured_claims(Measured.of(moe.load(), corpus))
        show(console, verdicts)
        if options.markdown:
            options.markdown.write_text(page(verdicts), encoding="utf-8")
    except moe.MoEError as error:
        sys.exit(f"published_claims.py: {error}")


if __name__ == "__main__":
    main()
