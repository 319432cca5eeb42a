"""MoE-Lens ("An Expert Is All You Need", arXiv 2603.05806) again, its claims held to its own figures.

    python examples/moe_lens.py                    # its four analyses, on the bundled reference model
    python examples/moe_lens.py --model NAME       # on a hub id or a folder
    python examples/moe_lens.py --recorded DIR     # first what the recorded figures say, claim by claim

DIR is a clone of the authors' repository (its branch moe-lens has the most), or a folder with the same
figures as JSON and CSV. Nothing in it is run, no code is unpickled. A verdict says what the figures allow:
"holds", "does not hold" or "cannot be told", by a criterion printed with it where the paper names none.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import moe_interp as moe
from moe_interp.analyses.recorded import (
    perplexity_ratios,
    read_cosines,
    read_counts,
    read_denominators,
    read_perplexity,
)
from moe_interp.errors import BadData
from moe_interp.results import provenance_of
from moe_interp.stats import bootstrap_mean

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"
COLOURS = {HOLDS: "green", FAILS: "red", UNKNOWN: "yellow"}
DEEPSEEK, OLMOE, QWEN = (
    "deepseek-ai/deepseek-moe-16b-base",
    "allenai/OLMoE-1B-7B-0924",
    "Qwen/Qwen1.5-MoE-A2.7B",
)
DOMAINS = {"arxiv", "french-qa", "gsm8k"}  # that claims name
TEXT = "When datasets are sufficiently large, increasing the capacity of neural networks can give much better"


@dataclass(frozen=True)
class Claim:
    """What the paper says, what its figures say by its definition, and where the released code differs."""

    said: str
    verdict: str
    figures: str
    as_coded: str


@dataclass(frozen=True)
class Recorded:
    """Everything that was found in the folder.

    Attributes:
        counts: routing Datasets by model.
        ratios: perplexity with k experts to that with all, of DeepSeekMoE.
        cosines: [prompts, layers] by domain, of DeepSeekMoE; maybe none.
        divided: what notebooks divided counts by, for a domain and a sum of a layer's counts; maybe none.
    """

    counts: dict[str, xr.Dataset]
    ratios: xr.Dataset
    cosines: dict[str, np.ndarray]
    divided: dict[tuple[str, int], int]

    @classmethod
    def read(cls, folder: Path) -> "Recorded":
        counts = read_counts(folder)
        for model in (DEEPSEEK, OLMOE, QWEN):
            domains = set(counts[model].domain.values) if model in counts else set()
            if missing := DOMAINS - domains:
                expected = f"{model} on {', '.join(sorted(missing))}"
                raise BadData(f"{folder} has not all of MoE-Lens", expected=expected, got="no counts of it")
        ratios = perplexity_ratios(read_perplexity(folder))
        return cls(counts, ratios, read_cosines(folder), read_denominators(folder))


# The claims


def claims(recorded: Recorded) -> Iterator[Claim]:
    """Every claim in turn."""
    few = "very few experts handle over 50 %"
    yield few_experts(f"{few} of routing decisions across domains", recorded.counts[DEEPSEEK])
    yield few_experts(f"OLMoE alike: {few}", recorded.counts[OLMOE])
    yield few_experts(f"Qwen1.5-MoE alike: {few}", recorded.counts[QWEN])
    yield cosine(recorded)
    yield five_percent(recorded.ratios)
    near_all = "layer 23 on arXiv has one expert near 100 % (taken as: 90 % or more)"
    yield above(near_all, recorded, "arxiv", 23, 0.9)
    yield far_above(recorded)
    yield above("layer 22 on GSM8K has one expert above 70 %", recorded, "gsm8k", 22, 0.7)
    yield eighty_percent(recorded, OLMOE)
    yield eighty_percent(recorded, QWEN)
    yield baselines(recorded.counts)


def few_experts(said: str, counts: xr.Dataset) -> Claim:
    """Coverage: how many experts take half of a layer's decisions."""
    experts, top_k = counts.sizes["expert"], top_k_of(counts)
    n50 = counts.n50.values
    few = int((n50 <= top_k).sum())
    busy = (counts.specialization.max("expert") > 0.5).values
    return Claim(
        f"{said} (taken as: no more experts than the {top_k} a token uses, in most domains and layers)",
        HOLDS if few > n50.size / 2 else FAILS,
        f"half of a layer's decisions take {n50.min():.0f} to {n50.max():.0f} of {experts} experts, median "
        f"{np.median(n50):.0f} (uniform router: {experts // 2}); {top_k} or fewer in {few} of {n50.size} "
        "domain-layers. Concentrated, but not in very few",
        f"the plots show shares of tokens, which sum to {top_k} x 100 %: a bar at 50 % is {50 / top_k:.1f} % "
        f"of the decisions. {busy.sum()} of {busy.size} domain-layers have a bar above 50 %",
    )


def cosine(recorded: Recorded) -> Claim:
    """Top-1 against the ensemble: only a clone's branch moe-lens has cosines, and those are as coded."""
    coded = (
        "row 0 of the expert's own batch in place of the last token, the normed MoE input in place of the "
        "residual, experts unweighted, shared experts left out, no control without any expert"
    )
    figures = "no hidden state, and no cosine by the paper's definition or of a control, is recorded"
    if recorded.cosines:
        by_layer = {
            (domain, layer): cosines
            for domain, prompts in recorded.cosines.items()
            for layer, cosines in enumerate(prompts.T, start=1)
        }
        means = np.array([cosines.mean() for cosines in by_layer.values()])
        (domain, layer), worst = list(by_layer.items())[means.argmin()]
        low, high = bootstrap_mean(worst)
        coded = (
            f"{(means >= 0.95).sum()} of {means.size} domain-layer means reach 0.95, up to "
            f"{means.max():.4f}; the lowest is {means.min():.3f} [{low:.3f}, {high:.3f}] ({domain}, layer "
            f"{layer}). But: {coded}"
        )
    return Claim("top-1 against the ensemble reaches cosine 0.95", UNKNOWN, figures, coded)


def five_percent(ratios: xr.Dataset) -> Claim:
    """Perplexity with one expert against all six, on the same samples."""
    full = ratios.sel(domain=ratios.reference == 6)
    parts = [f"{domain} {interval_of(full, domain, 1)}" for domain in full.domain.values]
    low, high = full.ratio_interval.sel(k=1)
    enough = [int(full.k[(full.ratio.sel(domain=domain) <= 1.05).values][0]) for domain in full.domain.values]
    short = ratios.sel(domain=ratios.reference < 6)
    for domain, most in zip(short.domain.values, short.reference.values, strict=True):
        parts.append(
            f"{domain} was recorded only up to k = {most}: top-1 / top-{most} "
            f"{interval_of(short, domain, 1)}; top-1 / top-6 cannot be told, but is no less if 6 are no "
            f"worse than {most}, as elsewhere"
        )
    plain = ", ".join(f"{d} {float(full.ratio_as_coded.sel(domain=d, k=1)):.2f}" for d in full.domain.values)
    return Claim(
        "perplexity increases by only 5 % with a single expert",
        FAILS if bool((low > 1.05).all()) else HOLDS if bool((high <= 1.05).all()) else UNKNOWN,
        f"top-1 / top-6: {'; '.join(parts)}. To lose 5 % at most takes k = {min(enough)} to {max(enough)}",
        "figure 3 rescales every domain to 0 ... 1, so no 5 % can be read from it; the plotting notebook "
        f"averages perplexities (not logs, as its axis says): {plain}",
    )


def above(said: str, recorded: Recorded, domain: str, layer: int, bound: float) -> Claim:
    """The busiest expert of one domain and layer."""
    special = recorded.counts[DEEPSEEK].specialization.sel(domain=domain)
    expert, share, _ = peak(special.sel(layer=layer))
    most = special.max("expert")
    return Claim(
        said,
        HOLDS if share >= bound else FAILS,
        f"expert {expert} gets {share:.1%} of the tokens; the most at any layer of {domain} is "
        f"{float(most.max()):.1%} (layer {int(most.idxmax('layer'))})",
        as_coded(recorded, DEEPSEEK, domain, share, bound),
    )


def far_above(recorded: Recorded) -> Claim:
    """Layer 17, French-QA."""
    expert, share, second = peak(recorded.counts[DEEPSEEK].specialization.sel(domain="french-qa", layer=17))
    return Claim(
        "layer 17 on French-QA has one expert far above the rest (taken as: twice the second)",
        HOLDS if share >= 2 * second else FAILS,
        f"expert {expert} gets {share:.1%} of the tokens, the second {second:.1%}",
        as_coded(recorded, DEEPSEEK, "french-qa", share),
    )


def eighty_percent(recorded: Recorded, model: str) -> Claim:
    """French-QA in the two other models."""
    most = recorded.counts[model].specialization.sel(domain="french-qa").max("expert").values
    within = ((most >= 0.8) & (most <= 0.9)).sum()
    return Claim(
        f"{model.split('/')[1]}: French-QA layers with one expert at 80-90 % (taken as: 80 % or more)",
        HOLDS if (most >= 0.8).any() else FAILS,
        f"{(most >= 0.8).sum()} of {most.size} layers at 80 % or more, {within} of them at 80-90 %; the "
        f"busiest expert gets {most.max():.1%} of the tokens",
        as_coded(recorded, model, "french-qa", float(most.max()), 0.8),
    )


def baselines(counts: dict[str, xr.Dataset]) -> Claim:
    """K/E."""
    published = {DEEPSEEK: 0.094, OLMOE: 0.125, QWEN: 0.0667}
    found = {name: float(counts[name].specialization_baseline) for name in published}
    near = all(abs(found[name] - value) < 0.0005 for name, value in published.items())
    shown = ", ".join(f"{value:.3%} ({name.split('/')[1]})" for name, value in found.items())
    return Claim(
        "uniform baselines are 9.4 %, 12.5 % and 6.67 %",
        HOLDS if near else FAILS,
        f"K/E of the recorded counts: {shown}",
        "the OLMoE notebook marks bars from 12 % on, not 12.5 %",
    )


def as_coded(recorded: Recorded, model: str, domain: str, share: float, bound: float | None = None) -> str:
    """What the notebooks show for a share of the tokens."""
    tokens, top_k = int(recorded.counts[model].tokens.sel(domain=domain)), top_k_of(recorded.counts[model])
    divided = recorded.divided.get((domain, tokens * top_k))
    if divided:
        impossible = ", which no share can be" if share * tokens > divided else ""
        return (
            f"{share * tokens / divided:.1%}{impossible}: divided by {divided:,} tokens, while {tokens:,} "
            f"were routed, so that a layer sums to {top_k * tokens / divided:.0%} in place of {top_k:.0%}"
        )
    needed = ""
    if bound is not None and share < bound:
        needed = f"; {bound:.0%} takes division by {share * tokens / bound:,.0f}, while {tokens:,} were routed"
    return f"cannot be told: what was divided by is not recorded here{needed}"


def top_k_of(counts: xr.Dataset) -> int:
    return int(provenance_of(counts)["top_k"])


def peak(shares: xr.DataArray) -> tuple[int, float, float]:
    """The busiest expert, its share, and that of the second."""
    order = shares.values.argsort()[::-1]
    return int(shares.expert[order[0]]), float(shares[order[0]]), float(shares[order[1]])


def interval_of(ratios: xr.Dataset, domain: str, k: int) -> str:
    here = ratios.sel(domain=domain, k=k)
    if np.isnan(here.ratio):
        return "not recorded"
    low, high = here.ratio_interval.values
    return f"{float(here.ratio):.3f}" if low == high else f"{float(here.ratio):.3f} [{low:.3f}, {high:.3f}]"


# Tables


def show_recorded(console: Console, folder: Path) -> None:
    """Coverage, specialization and perplexity ratios of the recorded figures, then the verdicts."""
    recorded = Recorded.read(folder)
    for model, counts in recorded.counts.items():
        console.print(coverage_table(model, counts), specialization_table(model, counts))
    console.print(perplexity_table(recorded.ratios))
    note = (
        "As coded, shares are counts divided by the tokens of the domain's text file, tokenized once more, "
        "whatever text was routed; only the notebooks' own output says how many those were."
    )
    table = Table(title="What the recorded figures say", caption=note, show_lines=True)
    table.add_column("claim", ratio=3)
    table.add_column("verdict", ratio=1)
    table.add_column("figures (by the published definition)", ratio=5)
    table.add_column("as coded", ratio=5)
    for claim in claims(recorded):
        verdict = f"[{COLOURS[claim.verdict]}]{claim.verdict}[/]"
        table.add_row(escape(claim.said), verdict, escape(claim.figures), escape(claim.as_coded))
    console.print(table)


def coverage_table(model: str, counts: xr.Dataset) -> Table:
    """n50 / n90 by layer and domain; counts have no documents, so no intervals."""
    n50, n90 = (float(counts[f"{name}_uniform"].mean()) for name in ("n50", "n90"))
    table = Table(
        title=f"{model}: fewest of {counts.sizes['expert']} experts that take 50 % / 90 % of decisions",
        caption=f"uniform router: {n50:.0f} / {n90:.0f}. Recorded counts have no documents, so no intervals.",
    )
    for name in ("layer", *counts.domain.values):
        table.add_column(str(name), justify="right")
    for layer in counts.layer.values:
        here = counts.sel(layer=layer)
        cells = [f"{a:.0f} / {b:.0f}" for a, b in zip(here.n50.values, here.n90.values, strict=True)]
        table.add_row(str(layer), *cells)
    return table


def specialization_table(model: str, counts: xr.Dataset) -> Table:
    """The three largest shares of each domain."""
    baseline = float(counts.specialization_baseline)
    table = Table(
        title=f"{model}: specialization (share of the domain's tokens), the three most specialized experts",
        caption=f"uniform router: {baseline:.2%}; in brackets: times that",
    )
    for name in ("domain", "tokens", "1st", "2nd", "3rd"):
        table.add_column(name)
    for domain in counts.domain.values:
        flat = counts.specialization.sel(domain=domain).stack(place=("layer", "expert"))
        top = flat[(-flat.values).argsort()[:3]]
        cells = [
            f"layer {int(one.layer)}, expert {int(one.expert)}: {float(one):.1%} ({one / baseline:.1f}x)" for one in top
        ]
        table.add_row(str(domain), f"{int(counts.tokens.sel(domain=domain)):,}", *cells)
    return table


def perplexity_table(ratios: xr.Dataset) -> Table:
    """Every k against the largest recorded, with paired intervals."""
    table = Table(
        title="DeepSeekMoE-16B: perplexity with k experts / with all (exp of the mean difference of logs)",
        caption="95 % paired bootstrap interval over samples, which weigh the same: no tokens were recorded.",
    )
    for name in ("domain", "samples", "against", *(f"k = {k}" for k in ratios.k.values)):
        table.add_column(name)
    for domain in ratios.domain.values:
        here = ratios.sel(domain=domain)
        cells = [interval_of(ratios, domain, int(k)).replace(" [", "\n[") for k in ratios.k.values]
        table.add_row(str(domain), str(int(here.samples)), f"k = {int(here.reference)}", *map(escape, cells))
    return table


# The four analyses, on a model


def show_model(console: Console, model: moe.MoEModel, corpus: moe.Corpus) -> None:
    """Routing, lens, similarity and perplexity of a model, each beside its control."""
    console.print(routing_table(moe.routing(model, corpus)))
    console.print(lens_table(moe.expert_lens(model, TEXT, positions=-1)))
    as_published = moe.ensemble_similarity(model, corpus)
    as_released = moe.ensemble_similarity(model, corpus, definition="as_coded")
    console.print(similarity_table(as_published, as_released))
    ratios = moe.perplexity(model, corpus, ks=range(1, model.spec.top_k + 1))
    console.print(cost_table(ratios.sel(aggregate="document")))


def routing_table(routing: xr.Dataset) -> Table:
    """Coverage and the most specialized expert of each domain."""
    baseline = float(routing.specialization_baseline)
    table = Table(
        title="Routing: how many experts take half of a layer's decisions, and the most specialized one",
        caption=f"uniform router: {float(routing.n50_uniform.mean()):.0f} experts, share {baseline:.2%}. "
        "p: permuted domain labels of documents, adjusted for the experts of the layer",
    )
    for name in ("domain", "documents", "n50 by layer", "bias removed", "most specialized", "share", "p"):
        table.add_column(name)
    for domain in routing.domain.values:
        here = routing.sel(domain=domain)
        best = here.isel(here.specialization.argmax(("layer", "expert")))
        low, high = best.specialization_interval.values
        table.add_row(
            str(domain),
            str(int(here.documents)),
            f"{int(here.n50.min())} to {int(here.n50.max())}",
            f"{float(here.n50_debiased.min()):.1f} to {float(here.n50_debiased.max()):.1f}",
            f"layer {int(best.layer)}, expert {int(best.expert)}",
            f"{float(best.specialization):.1%} {escape(f'[{low:.1%}, {high:.1%}]')}",
            f"{float(best.specialization_p):.3f}",
        )
    return table


def lens_table(lens: xr.Dataset) -> Table:
    """The most probable next token of a text, decoded from parts of every layer."""
    slots = lens.sizes["rank"]
    parts = {
        "no expert (control)": "resid_mid",
        "+ heaviest": "resid_mid+c1",
        f"+ all {slots}": f"resid_mid+c1..{slots}",
        "layer's output": "resid_post",
    }
    table = Table(title=f"Expert lens: the token after {TEXT[-28:]!r}, by what it is decoded from")
    for name in ("layer", *parts):
        table.add_column(name)
    for layer in lens.layer.values:
        here = lens.sel(layer=layer, top=1).isel(pos=-1)
        cells = [
            f"{str(one.top_token.values)!r} {float(one.top_probability):.1%}"
            for one in (here.sel(part=part) for part in parts.values())
        ]
        table.add_row(str(layer), *map(escape, cells))
    return table


def similarity_table(published: xr.Dataset, released: xr.Dataset) -> Table:
    """Cosine of the heaviest expert with the ensemble by layer, over all domains, with its controls."""
    columns = {
        "heaviest, with residual": (published, "with", "heaviest"),
        "no expert (control)": (published, "with", "none"),
        "heaviest, without residual": (published, "without", "heaviest"),
        "lightest (control)": (published, "without", "lightest"),
        "as coded by MoE-Lens": (released, "with", "heaviest"),
        "no expert (control) ": (released, "with", "none"),
    }
    table = Table(title="One expert against the ensemble: mean cosine [95 % interval over documents]")
    for name in ("layer", *columns):
        table.add_column(name)
    for layer in published.layer.values:
        cells = []
        for source, residual, candidate in columns.values():
            where = {"layer": layer, "residual": residual, "candidate": candidate, "shared": "without"}
            mean, (low, high) = (source[f"cosine_overall{part}"].sel(where).values for part in ("", "_interval"))
            cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]")
        table.add_row(str(layer), *map(escape, cells))
    return table


def cost_table(perplexity: xr.Dataset) -> Table:
    """Perplexity with k experts against the whole model, over documents as published."""
    table = Table(
        title="Perplexity with k experts / with all, exp of mean log over documents [95 % interval]",
        caption="in brackets below: with k of the same experts at random",
    )
    for name in ("domain", *(f"k = {k}" for k in perplexity.k.values)):
        table.add_column(name)
    for domain in perplexity.domain.values:
        cells = []
        for k in perplexity.k.values:
            here = perplexity.sel(domain=domain, k=k)
            low, high = here.ratio_interval.values
            cells.append(f"{float(here.ratio):.2f} [{low:.2f}, {high:.2f}]\n({float(here.ratio_random):.2f})")
        table.add_row(str(domain), *map(escape, cells))
    return table


def main() -> None:
    """The recorded figures first, for they take seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, metavar="DIR", help="folder with the recorded figures")
    parser.add_argument("--model", metavar="NAME", help="hub id or folder in place of the bundled model")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if options.recorded:
            show_recorded(console, options.recorded)
        show_model(console, moe.load(options.model), moe.sample())
    except moe.MoEError as error:
        sys.exit(f"moe_lens.py: {error}")


if __name__ == "__main__":
    main()
