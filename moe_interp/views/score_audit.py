"""What experts are worth, and which scores say so: the figures of `moe_interp.score_audit`, and one page of them."""

from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from moe_interp.paths import check_writable
from moe_interp.results import provenance_of
from moe_interp.views.figures import COLOURS, CONTROL, layer_colour, layer_scale, line, rows_of, style
from moe_interp.views.page import Headline, render, write
from moe_interp.views.tables import between

NAMES = {
    "frequency": "frequency",
    "weight_sum": "sum of weights",
    "output_norm": "output norm",
    "saliency": "saliency (REAP), mean",
    "saliency_sum": "saliency, sum",
    "specialization": "specialization",
    "attribution": "attribution patching",
    "attribution_path": "attribution, two gradients",
    "random": "random order",
}
OBSERVED = ("frequency", "weight_sum", "output_norm", "saliency", "saliency_sum", "specialization")


def correlations(result: xr.Dataset) -> go.Figure:
    """Rank correlation of every score with the exact effect over all layers, and held out; controls in grey."""
    scores = list(map(str, result["score"].values))
    names = [NAMES[score] for score in scores]
    figure = go.Figure()
    low, high = result["rank_correlation_overall_interval"].values
    values = result["rank_correlation_overall"].values
    bars = {"type": "data", "array": high - values, "arrayminus": values - low, "thickness": 1.2, "width": 4}
    colours = [CONTROL if score == "random" else COLOURS[0 if score in OBSERVED else 1] for score in scores]
    figure.add_bar(
        x=names, y=values, error_y=bars, marker={"color": colours}, name="on the same documents", showlegend=False
    )
    held = result["held_out_overall"].values
    marker = {"color": "#1f2328", "symbol": "diamond", "size": 9}
    figure.add_scatter(x=names, y=held, mode="markers", marker=marker, name="score of one half, effect in the other")
    ceiling = np.full(len(names), float(result["reliability_overall"]))
    dash = {"color": CONTROL, "dash": "dash"}
    figure.add_scatter(x=names, y=ceiling, mode="lines", line=dash, name="exact effect in one half and the other")
    legend = {"orientation": "h", "y": 1.12}
    return style(figure, 460, yaxis_title="rank correlation with the exact effect", legend=legend, xaxis_tickangle=-25)


def by_layer(result: xr.Dataset) -> go.Figure:
    """The same within each layer."""
    layers = result["layer"].values
    figure = go.Figure()
    for number, score in enumerate(map(str, result["score"].values)):
        at = result.sel(score=score)
        control = score == "random"
        colour = CONTROL if control else COLOURS[number]
        ends = at["rank_correlation_interval"].values
        dash = {"dash": "dash"} if control else {}
        figure.add_trace(line(layers, at["rank_correlation"].values, NAMES[score], colour, ends, **dash))
    return style(figure, 440, xaxis_title="layer", yaxis_title="rank correlation within the layer")


def by_domain(result: xr.Dataset) -> go.Figure:
    """Domain x score: rank correlation over all layers, on the domain's documents."""
    figure = go.Figure(
        go.Heatmap(
            z=result["rank_correlation_domain"].values.T,
            x=[NAMES[str(score)] for score in result["score"].values],
            y=rows_of(result["domain"].values),
            customdata=np.moveaxis(result["rank_correlation_domain_interval"].values, 0, -1).swapaxes(0, 1),
            texttemplate="%{z:.2f}",
            hovertemplate="%{y}, %{x}: %{z:.2f}<br>%{customdata[0]:.2f} – %{customdata[1]:.2f}<extra></extra>",
            colorscale="RdBu_r",
            zmin=-1,
            zmax=1,
            colorbar={"title": "rank corr."},
        )
    )
    axis = {"autorange": "reversed", "type": "category"}
    return style(figure, 200 + 30 * result.sizes["domain"], yaxis=axis, xaxis_tickangle=-25)


def scatter(result: xr.Dataset, shown: tuple[str, ...] = ("frequency", "saliency", "attribution_path")) -> go.Figure:
    """Each expert: a score, and the exact effect of taking it out; a colour a layer."""
    figure = make_subplots(1, len(shown), subplot_titles=[NAMES[score] for score in shown], shared_yaxes=True)
    layers = result["layer"].values
    for column, score in enumerate(shown, start=1):
        for index, layer in enumerate(layers):
            at = result.sel(layer=layer)
            points = go.Scatter(
                x=at["value"].sel(score=score).values.astype(np.float32),
                y=at["effect"].values.astype(np.float32),
                customdata=at["expert"].values,
                mode="markers",
                marker={"size": 5, "opacity": 0.7, "color": layer_colour(index, len(layers))},
                hovertemplate=f"layer {layer}, " + "expert %{customdata}: %{x:.3g}, %{y:.4f} nats/token<extra></extra>",
                showlegend=False,
            )
            figure.add_trace(points, row=1, col=column)
    figure.add_trace(layer_scale(layers), row=1, col=1)
    figure.update_yaxes(title="exact effect, nats/token", row=1, col=1)
    return style(figure, 420).update_layout(margin_t=70)


def effects(result: xr.Dataset) -> go.Figure:
    """Layer x expert: what taking the expert out adds, nats per token, white at 0."""
    values = result["effect"].values
    largest = float(np.nanquantile(np.abs(values), 0.98))
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=result["expert"].values,
            y=[f"layer {layer}" for layer in result["layer"].values],
            customdata=np.moveaxis(result["effect_interval"].values, 0, -1),
            hovertemplate="%{y}, expert %{x}: %{z:.4f}<br>%{customdata[0]:.4f} – %{customdata[1]:.4f}<extra></extra>",
            colorscale="RdBu_r",
            zmin=-largest,
            zmax=largest,
            colorbar={"title": "nats/token"},
        )
    )
    height = 140 + 32 * result.sizes["layer"]
    return style(figure, height, xaxis_title="expert", yaxis_autorange="reversed")


def routers(result: xr.Dataset) -> go.Figure:
    """What a layer's whole routing is worth, beside its most important expert."""
    layers = result["layer"].values
    best = result["effect"].argmax("expert")
    figure = go.Figure()
    ends = result["effect_interval"].isel(expert=best).values
    name = "its most important expert taken out"
    figure.add_trace(line(layers, result["effect"].isel(expert=best).values, name, COLOURS[0], ends))
    ends = result["random_router_interval"].values
    name = "control: all its routing at random, weights kept"
    figure.add_trace(line(layers, result["random_router"].values, name, CONTROL, ends, dash="dash"))
    legend = {"orientation": "h", "y": 1.12}
    return style(figure, 380, xaxis_title="layer", yaxis_title="nats/token added", legend=legend)


def headlines(result: xr.Dataset) -> list[Headline]:
    """What is asked, in three lines."""
    rho = result["rank_correlation_overall"]
    observed = rho.sel(score=[*OBSERVED]).values  # NaN where a score is the same for all experts
    best, worst = (OBSERVED[np.where(np.isnan(sign * observed), -np.inf, sign * observed).argmax()] for sign in (1, -1))
    at, path = result.sel(score=best), result.sel(score="attribution_path")
    place, expert = np.unravel_index(np.nanargmax(result["effect"].values), result["effect"].shape)
    layer = int(result["layer"].values[place])
    return [
        Headline(
            "The score that only looks and says most",
            f"{NAMES[best]}: {_between(float(rho.sel(score=best)), at['rank_correlation_overall_interval'].values)}",
            f"random order {float(rho.sel(score='random')):.2f}; the one that says least, {NAMES[worst]}, "
            f"{float(rho.sel(score=worst)):.2f}",
        ),
        Headline(
            "Attribution patching with two gradients",
            _between(float(path["rank_correlation_overall"]), path["rank_correlation_overall_interval"].values),
            f"one gradient {float(rho.sel(score='attribution')):.2f}; the exact effect in one half of the documents "
            f"and the other {float(result['reliability_overall']):.2f}",
        ),
        Headline(
            "The expert that costs most",
            f"{float(result['effect'].max()):.3f} nats/token (layer {layer}, expert {expert})",
            f"all routing of that layer at random {float(result['random_router'].sel(layer=layer)):.3f}; the median "
            f"expert {float(result['effect'].median()):.4f}",
        ),
    ]


def _between(value: float, interval: np.ndarray) -> str:
    return f"{value:.2f} {between(*interval)}"


def page(result: xr.Dataset, path: str | Path) -> Path:
    """Write all figures of an audit as one self-contained HTML file, whole or not at all.

    Raises:
        BadOutput: the file cannot be written.
    """
    target = Path(path)
    check_writable(target)
    provenance = provenance_of(result)
    figures = {
        "correlations": correlations(result),
        "layers": by_layer(result),
        "scatter": scatter(result),
        "domains": by_domain(result),
        "effects": effects(result),
        "routers": routers(result),
    }
    text = render(
        "score_audit.html.j2",
        figures,
        provenance,
        title=f"Which scores say what an expert is worth? {provenance['model']}",
        about=f"{int(result['documents'].sum())} documents of {result.sizes['domain']} domains, "
        f"{int(result['tokens'].sum()):,} tokens scored, {result['effect'].size} experts taken out one by one.",
        headlines=headlines(result),
    )
    return write(text, target)
