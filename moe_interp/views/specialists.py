"""Do experts specialize? Figures of what `moe_interp.analyses.class_routing` and `.specialists` find; one page."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Int, UInt8
from plotly.subplots import make_subplots

from moe_interp.analyses.specialists import Findings
from moe_interp.paths import check_writable
from moe_interp.results import provenance_of
from moe_interp.views.figures import COLOURS, CONTROL, style
from moe_interp.views.page import Headline, render, write

DIVERGING = [[0.0, "#2166ac"], [0.5, "#ffffff"], [1.0, "#b2182b"]]
FILLS = {
    "learned": COLOURS[0],
    "random": CONTROL,
    "permuted": "#80868c",
    "fresh": "#d7dade",
    "trained at random": "#7fa8c9",
    "dense, one expert": COLOURS[1],
    "dense, total": "#e3a47f",
}


def _bars(x: Any, y: np.ndarray, ends: np.ndarray, name: str, colour: str, **more: Any) -> go.Bar:
    """Bars with the ends [n, 2] of their intervals."""
    low, high = ends[..., 0], ends[..., 1]
    error = {"type": "data", "array": high - y, "arrayminus": y - low, "thickness": 1.2, "width": 3}
    return go.Bar(x=x, y=y, error_y=error, name=name, marker={"color": colour}, **more)


def accuracies(result: xr.Dataset) -> go.Figure:
    """Accuracy in per cent by number of experts and condition, with intervals over trials; chance is dashed."""
    figure = go.Figure()
    names = [f"{count} experts" for count in result["experts"].values]
    for condition in map(str, result["condition"].values):
        at = result.sel(condition=condition)
        colour = FILLS.get(condition, CONTROL)
        values, ends = 100 * at["accuracy"].values, 100 * at["accuracy_interval"].values.T
        figure.add_trace(_bars(names, values, ends, condition, colour))
    chance = np.full(len(names), 100 * float(result["chance"]))
    figure.add_scatter(x=names, y=chance, name="chance", mode="lines", line={"color": "#40464c", "dash": "dash"})
    return style(figure, barmode="group", yaxis_title="% of test images right", yaxis_range=[0, 105])


def class_table(result: xr.Dataset) -> go.Figure:
    """Class x expert: share of the class's images in per cent, white at an even share."""
    experts, even = result.sizes["expert"], 100 / result.sizes["expert"]
    low, high = 100 * result["share_interval"].values
    shares = 100 * result["share"].values
    loads = 100 * result["expert_load"].values
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            x=[f"expert {expert + 1}<br>{load:.0f} % of all" for expert, load in enumerate(loads)],
            y=[escape(str(name)) for name in result["class"].values],
            customdata=np.stack([low, high], axis=-1),
            texttemplate="%{z:.0f}" if experts > 3 else "%{z:.1f}",
            hovertemplate="%{y}, %{x}: %{z:.1f} %<br>%{customdata[0]:.1f} – %{customdata[1]:.1f} %<extra></extra>",
            colorscale=[[0.0, "#2166ac"], [even / 100, "#ffffff"], [1.0, "#b2182b"]],
            zmin=0,
            zmax=100,
            colorbar={"title": "% of class"},
        )
    )
    return style(figure, 160 + 28 * result.sizes["class"], yaxis_autorange="reversed", xaxis_side="top")


def correlations(result: xr.Dataset) -> go.Figure:
    """Class x class: correlation of shares over experts and trials, and the same with experts' loads taken off."""
    titles = {"correlation": "as published", "correlation_excess": "loads taken off"}
    return _pair([result[name] for name in titles], list(titles.values()), 1.0, "correlation")


def covariances(base: xr.Dataset, short: xr.Dataset) -> go.Figure:
    """Class x class: covariance of shares over experts, base and short trunk on one scale."""
    experts = base.sizes["expert"]
    both = [base["covariance"], short["covariance"]]
    largest = max(float(np.abs(one).max()) for one in both)
    return _pair(both, [f"base, {experts} experts", f"short, {experts} experts"], largest, "covariance")


def _pair(matrices: list[xr.DataArray], titles: list[str], largest: float, what: str) -> go.Figure:
    names = [escape(str(name)) for name in matrices[0]["class"].values]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.16)
    for column, matrix in enumerate(matrices, start=1):
        trace = go.Heatmap(
            z=matrix.values,
            x=names,
            y=names,
            hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
            colorscale=DIVERGING,
            zmin=-largest,
            zmax=largest,
            colorbar={"title": what},
            showscale=column == 2,
        )
        figure.add_trace(trace, row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    return style(figure, 460)


def depth(results: Mapping[int, xr.Dataset]) -> go.Figure:
    """Class covariance and mutual information by trunk and number of experts; the most that it can be is dashed."""
    figure = make_subplots(1, 2, subplot_titles=["covariance of classes", "information about the class, nats"])
    names = [f"{count} experts" for count in results]
    for column, name in enumerate(("covariance", "information"), start=1):
        for number, trunk in enumerate(map(str, next(iter(results.values()))["trunk"].values)):
            values = np.array([float(one[name].sel(trunk=trunk)) for one in results.values()])
            ends = np.stack([one[f"{name}_interval"].sel(trunk=trunk).values for one in results.values()])
            bars = _bars(names, values, ends, f"{trunk} trunk", COLOURS[number])
            figure.add_trace(bars.update(legendgroup=trunk, showlegend=column == 1), row=1, col=column)
    caps = [float(one["information_cap"]) for one in results.values()]
    cap = go.Scatter(x=names, y=caps, name="ln E/K", line={"color": CONTROL, "dash": "dash"})
    figure.add_trace(cap, row=1, col=2)
    return style(figure, barmode="group", yaxis_rangemode="tozero")


def probed(results: Mapping[int, xr.Dataset]) -> go.Figure:
    """Information about the class in nats: in the mixture's input, in the choice of the expert, and controls."""
    first = next(iter(results.values()))
    figure = make_subplots(1, first.sizes["trunk"], subplot_titles=[f"{name} trunk" for name in first["trunk"].values])
    names = [f"{count} experts" for count in results]
    fills = (COLOURS[2], CONTROL, "#d7dade")
    for column, trunk in enumerate(first["trunk"].values, start=1):
        here = [one.sel(trunk=trunk) for one in results.values()]
        for probe, colour in zip(first["probed"].values, fills, strict=True):
            values = np.array([float(one["information"].sel(probed=probe)) for one in here])
            ends = np.stack([one["information_interval"].sel(probed=probe).values for one in here])
            label = "probe: " + escape(str(probe))
            figure.add_trace(_bars(names, values, ends, label, colour, showlegend=column == 1), row=1, col=column)
        values = np.array([float(one["routed"]) for one in here])
        ends = np.stack([one["routed_interval"].values for one in here])
        bars = _bars(names, values, ends, "choice of the expert", COLOURS[0], showlegend=column == 1)
        figure.add_trace(bars, row=1, col=column)
        line = {"color": CONTROL, "dash": "dash"}
        caps = [float(one["cap"]) for one in here]
        cap = go.Scatter(x=names, y=caps, name="the most that it can be", line=line, showlegend=column == 1)
        figure.add_trace(cap, row=1, col=column)
    figure.update_yaxes(title="nats", row=1, col=1)
    return style(figure, barmode="group")


def samples(
    pictures: UInt8[np.ndarray, "M C H W"], experts: Int[np.ndarray, " M"], count: int, each: int = 16, seed: int = 0
) -> go.Figure:
    """Random pictures of each expert, a row an expert; an expert without so many shows what it has."""
    rng = np.random.default_rng(seed)
    height, width = pictures.shape[2:]
    canvas = np.full((count * (height + 2), each * (width + 2), 3), 255, np.uint8)
    for expert in range(count):
        own = np.flatnonzero(experts == expert)
        for column, at in enumerate(rng.permutation(own)[:each]):
            top, left = expert * (height + 2), column * (width + 2)
            canvas[top : top + height, left : left + width] = pictures[at].transpose(1, 2, 0)
    figure = go.Figure(go.Image(z=canvas, hoverinfo="skip"))
    figure.update_xaxes(visible=False)
    ticks = [(expert + 0.5) * (height + 2) for expert in range(count)]
    figure.update_yaxes(tickvals=ticks, ticktext=[f"expert {expert + 1}" for expert in range(count)])
    return style(figure, 90 + 64 * count)


def headlines(findings: Findings) -> list[Headline]:
    """The four questions in four lines, at the smallest number of experts."""
    count = min(findings.routing)
    at, routed = findings.accuracies.sel(experts=count), findings.routing[count]
    deep, probe = findings.depth[count].isel(trunk=-1), findings.probed[count].isel(trunk=0)
    low, high = 100 * at["gap_interval"].sel(condition="random").values
    ends = deep["information_difference_interval"].values
    return [
        Headline(
            f"What learned routing is worth, {count} experts",
            f"{100 * float(at['gap'].sel(condition='random')):.1f} points [{low:.1f}, {high:.1f}] over random routing",
            f"{100 * float(at['gap'].sel(condition='fresh')):.1f} points over fresh experts; learned is "
            f"{100 * float(at['accuracy'].sel(condition='learned')):.1f} %",
        ),
        Headline(
            "Do the classes split as we would split them",
            f"silhouette {float(routed['silhouette']):.2f}, p = {float(routed['silhouette_p']):.3f}",
            f"{float(routed['silhouette_null']):.2f} over all splits of these sizes",
        ),
        Headline(
            f"What a {deep['trunk'].item()} trunk changes: information of the expert about the class",
            f"{float(deep['information_difference']):+.2f} nats [{ends[0]:.2f}, {ends[1]:.2f}]",
            f"{float(findings.depth[count]['information'][0]):.2f} nats of the base trunk, ln {count} at most",
        ),
        Headline(
            "How much of what it could tell the router told",
            f"{100 * float(probe['used_least']):.0f} to {100 * float(probe['used_most']):.0f} %",
            f"{float(probe['routed']):.2f} nats, where a choice among {count} experts could tell "
            f"{float(probe['attainable']):.2f} to {float(findings.probed[count]['cap']):.2f}; a probe finds at least "
            f"{float(probe['information'][0]):.2f} there",
        ),
    ]


def page(findings: Findings, path: str | Path) -> Path:
    """Write all figures of a study as one self-contained HTML file, whole or not at all.

    Raises:
        BadOutput: the file cannot be written.
    """
    target = Path(path)
    check_writable(target)
    provenance = provenance_of(findings.accuracies)
    text = render(
        "specialists.html.j2",
        _figures(findings),
        provenance,
        title=f"Do experts specialize? The {findings.name} on {provenance['images']}",
        about=_about(findings, provenance),
        headlines=headlines(findings),
        counts=list(findings.routing),
        said={count: _said(result) for count, result in findings.routing.items()},
    )
    return write(text, target)


def _about(findings: Findings, provenance: Mapping[str, Any]) -> str:
    trials = next(iter(findings.routing.values())).sizes["trial"]
    counts = ", ".join(map(str, findings.routing))
    top_k = provenance_of(next(iter(findings.routing.values())))["top_k"]  # dense models among all have another
    return (
        f"Convolutions, a mixture of {counts} experts (K = {top_k}), linear head: {trials} trials each, "
        f"{provenance['train_images']:,} training and {provenance['test_images']:,} test images, "
        f"{provenance['epochs']} epochs, {provenance['width']} filters in the first convolution (the paper: 10 trials, "
        f"50,000 images, 10 epochs, 128 filters), {provenance['precision']} products in the trunk."
    )


def _said(result: xr.Dataset) -> str:
    number = {name: float(result[name]) for name in result if result[name].ndim == 0}
    return (
        f"Trials agree on the table with correlation {number['consistency']:.2f} (permuted classes: "
        f"{number['consistency_null']:.2f}) and send {100 * number['agreement']:.0f} % of images to the same expert "
        f"({100 * number['agreement_class']:.0f} % if the class alone decided). The two groups' silhouette is "
        f"{number['silhouette']:.2f}, p = {number['silhouette_p']:.3f} over all splits; without being told, clustering "
        f"parts {_clusters(result)}. The expert tells "
        f"{number['information']:.2f} nats about the class, of {number['information_cap']:.2f} at most."
    )


def _clusters(result: xr.Dataset) -> str:
    cluster, names = result["cluster"].values, result["class"].values
    return " from ".join(", ".join(map(str, names[cluster == one])) for one in np.unique(cluster))


def _figures(findings: Findings) -> dict[str, go.Figure]:
    figures = {
        "accuracies": accuracies(findings.accuracies),
        "depth": depth(findings.depth),
        "probed": probed(findings.probed),
    }
    for count, result in findings.routing.items():
        figures[f"table {count}"] = class_table(result)
        figures[f"correlation {count}"] = correlations(result)
        figures[f"covariance {count}"] = covariances(result, findings.short_routing[count])
    for count, (pictures, experts) in findings.samples.items():
        figures[f"samples {count}"] = samples(pictures, experts, count)
    return figures
