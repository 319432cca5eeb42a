"""Results as tables for a terminal: figures with their intervals, and a dash where there is none."""

from collections.abc import Iterable
from math import isnan
from typing import Any

import numpy as np
import xarray as xr
from rich.markup import escape
from rich.table import Table

from moe_interp.views.tokens import printable, shown


def figure(value: Any, interval: Iterable[Any] | None = None, digits: int = 2) -> str:
    """A number with its interval: ``0.62 [0.55, 0.70]``; ``0.62 [–]`` where a single document gives no interval."""
    if isnan(float(value)):
        return "–"
    if interval is None:
        return f"{float(value):.{digits}f}"
    low, high = interval
    return escape(f"{figure(value, digits=digits)} {between(low, high, digits)}")


def _name(given: Any) -> str:
    """A domain, a label or a step, which come from untrusted files."""
    return escape(printable(str(given)))


def between(low: Any, high: Any, digits: int = 2) -> str:
    """An interval: ``[0.55, 0.70]``; ``[–]`` where there is none."""
    low, high = float(low), float(high)
    return "[–]" if isnan(low) or isnan(high) else f"[{low:.{digits}f}, {high:.{digits}f}]"


def several(baseline: xr.DataArray, digits: int) -> str:
    """A number; all that there are where layers choose different numbers of experts."""
    return " or ".join(f"{one:.{digits}f}" for one in np.unique(baseline.values))


def routing(result: xr.Dataset) -> Table:
    """`moe.routing`: loads over all domains, and the most specialised expert, by layer."""
    columns = {"n50": 0, "n90": 0, "max_vio": 2, "dead_experts": 0, "load_balance": 2}
    table = Table("layer", *columns, "most specialised expert", title="Routing, all domains")
    for layer in result["layer"].values:
        at = result.sel(layer=layer)
        values = {name: at[name if name == "load_balance" else f"{name}_overall"] for name in columns}
        cells = (figure(value, digits=columns[name]) for name, value in values.items())
        table.add_row(str(layer), *cells, _peak(at))
    return table


def _peak(at: xr.Dataset) -> str:
    peak = at["specialization"].argmax(...)
    here = {name: int(place) for name, place in peak.items()}
    share = figure(100 * at["specialization"][here], 100 * at["specialization_interval"][here].values, 0)
    return f"{here['expert']}: {share} % of {_name(at['domain'].values[here['domain']])}"


def labels(result: xr.Dataset) -> Table:
    """`moe.routing_by_label`: for each label and layer, the expert that it has most of its own."""
    table = Table("label", "tokens", "layer", "expert", "% of the label's tokens", "of others", "p", title="By label")
    for name in result["label"].values:
        here = result.sel(label=name)
        lead = (here["specialization"] - here["specialization_rest"]).fillna(-1.0)
        for layer in result["layer"].values:
            at = here.sel(layer=layer, expert=int(lead.sel(layer=layer).values.argmax()))
            table.add_row(
                _name(name),
                str(int(at["tokens"])),
                str(layer),
                str(int(at["expert"])),
                figure(100 * at["specialization"], 100 * at["specialization_interval"].values, 1),
                figure(100 * at["specialization_rest"], digits=1),
                figure(at["specialization_p"], digits=3),
            )
    return table


def saturation(result: xr.Dataset) -> Table:
    """`moe.router_saturation`: by step and layer."""
    table = Table("step", *(f"layer {layer}" for layer in result["layer"].values), title="Router saturation")
    for step in result["step"].values:
        at = result.sel(step=step)
        low, high = at["saturation_interval"].values
        cells = zip(at["saturation"].values, low, high, strict=True)
        table.add_row(_name(step), *(figure(mean, ends) for mean, *ends in cells))
    return table


def lens(result: xr.Dataset) -> Table:
    """`moe.expert_lens`: the likeliest tokens of each part, at one position, by layer."""
    parts = [p for p in ("resid_mid", "c1", "resid_mid+c1", "shared", "resid_post") if p in result["part"].values]
    table = Table("layer", "expert", "weight", *parts, title=f"Lens after {escape(shown(result['token'].item()))}")
    for layer in result["layer"].values:
        at = result.sel(layer=layer).isel(pos=0)
        told = [
            " ".join(shown(str(token), 12) for token in at["top_token"].sel(part=part).values[:3]) for part in parts
        ]
        expert, weight = int(at["expert"].sel(rank=1)), figure(at["gate_weight"].sel(rank=1))
        table.add_row(str(layer), str(expert), weight, *map(escape, told))
    return table


def tuned_lens(result: xr.Dataset) -> Table:
    """`moe.tuned_lens_quality`: divergences of the plain and the tuned lens, by layer."""
    table = Table("stream into layer", "KL, plain", "tuned", "gain in nats", title="KL to the model's own output")
    for layer in result["layer"].values:
        at = result.sel(layer=layer)
        each = (figure(at["kl"].sel(lens=name), digits=3) for name in ("plain", "tuned"))
        table.add_row(str(layer), *each, figure(at["kl_gain"], at["kl_gain_interval"].values, 3))
    return table


def similarity(result: xr.Dataset, residual: str) -> Table:
    """`moe.ensemble_similarity`: cosines "with" or "without" the residual, by layer and candidate."""
    candidates = [str(name) for name in result["candidate"].values]
    table = Table("layer", *candidates, title=f"Cosine to the ensemble, {residual} the residual")
    here = result.sel(residual=residual, shared="without")
    for layer in result["layer"].values:
        at = here.sel(layer=layer)
        cosines, ends = at["cosine_overall"], at["cosine_overall_interval"]
        told = (figure(cosines.sel(candidate=name), ends.sel(candidate=name).values, 3) for name in candidates)
        table.add_row(str(layer), *told)
    return table


def perplexity(result: xr.Dataset) -> Table:
    """`moe.perplexity`: ratios by domain and k."""
    at = result.sel(aggregate="token")
    ks = [int(k) for k in at["k"].values]
    table = Table("domain", "perplexity", *(f"k = {k}" for k in ks), title="Perplexity with k experts / of the model")
    for domain in at["domain"].values:
        one = at.sel(domain=domain)
        whole = figure(one["perplexity_full"], one["perplexity_full_interval"].values, 1)
        table.add_row(_name(domain), whole, *_ratios(one, "ratio"))
    whole = figure(at["perplexity_full_overall"], at["perplexity_full_overall_interval"].values, 1)
    table.add_row("all", whole, *_ratios(at, "ratio_overall"))
    table.add_row("random slots", "", *_ratios(at, "ratio_random_overall"), style="dim")
    return table


def _ratios(at: xr.Dataset, name: str) -> list[str]:
    values, ends = at[name], at[f"{name}_interval"]
    return [figure(values.sel(k=k), ends.sel(k=k).values, 3) for k in at["k"].values]
