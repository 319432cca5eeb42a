"""Figures of who is routed where: bars, flows, pairs, saturation, norm against weight; readable at 256 experts.

What has a value for every pair of experts is drawn as a heat map whose cells are small integers, one layer at a time.
White is always the control: what the loads of the experts alone would give.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float, Int
from plotly.subplots import make_subplots

from moe_interp.views.figures import COLOURS, CONTROL, by_layer, layer_colour, layer_scale, line, style
from moe_interp.views.tokens import escaped

_BARS = 24  # experts a row of bars has room for
_CELLS = 2_000_000  # of all layers together: about 3 MB in the file
_STEP = 1 / 24  # of log2 lift, so that a byte reaches a factor of 32 either way


def specialization_bars(routing: xr.Dataset) -> go.Figure:
    """The most preferred experts of each domain, one layer at a time, with intervals and the uniform router's share."""
    domains = [str(name) for name in routing["domain"].values]
    layers = routing["layer"].values
    rows = -(-len(domains) // 3)
    titles = [escaped(name, 40) for name in domains]
    figure = make_subplots(rows, 3, subplot_titles=titles, shared_yaxes="all", vertical_spacing=min(0.3, 0.36 / rows))
    baselines = np.unique(100 * by_layer(routing, "specialization_baseline"))
    for place, layer in enumerate(layers):
        for number, domain in enumerate(domains):
            bars = _bars(routing.sel(layer=layer, domain=domain), COLOURS[number % len(COLOURS)])
            bars.visible = place == 0
            figure.add_trace(bars, row=1 + number // 3, col=1 + number % 3)
    # The template draws shapes without a line and faintly: both have to be asked for.
    for baseline in baselines:  # one, unless layers choose different numbers of experts
        figure.add_hline(y=baseline, line={"color": CONTROL, "dash": "dash", "width": 2}, opacity=1)
    figure.update_xaxes(type="category", tickangle=-90, tickfont={"size": 8}, dtick=1)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title="% of tokens", col=1)
    return style(figure, 130 + 190 * rows, sliders=[_slider(layers, len(domains))], showlegend=False, bargap=0.25)


def _bars(at: xr.Dataset, colour: str) -> go.Bar:
    share = 100 * at["specialization"].values
    order = np.argsort(-share, kind="stable")[:_BARS]
    low, high = 100 * at["specialization_interval"].values[:, order]
    height = share[order]
    return go.Bar(
        x=[str(expert) for expert in order],
        y=height,
        customdata=np.stack([low, high, at["specialization_p"].values[order]], axis=-1),
        hovertemplate="expert %{x}: %{y:.1f} %<br>interval %{customdata[0]:.1f} – %{customdata[1]:.1f} %"
        "<br>p = %{customdata[2]:.3f}<extra></extra>",
        error_y={"type": "data", "array": high - height, "arrayminus": height - low, "thickness": 1, "width": 2},
        marker={"color": colour},
    )


def _slider(layers: Any, traces: int = 1, text: str = "layer ") -> dict[str, Any]:
    """Shows the traces of one layer; they come layer by layer."""
    count = len(layers) * traces
    steps = [
        {
            "label": str(layer),
            "method": "update",
            "args": [{"visible": [place // traces == index for place in range(count)]}],
        }
        for index, layer in enumerate(layers)
    ]
    return {"active": 0, "steps": steps, "currentvalue": {"prefix": text}, "pad": {"t": 50}}


# Pairs of experts


def coactivation(result: xr.Dataset) -> go.Figure:
    """How much more often two experts are chosen together than their loads make them, experts ordered by clustering."""
    layers = _some(result["layer"].values, result.sizes["expert"])
    figure = go.Figure()
    for place, layer in enumerate(layers):
        at = result.sel(layer=layer)
        order = clustered(np.nan_to_num(at["npmi"].values, nan=-1.0))
        excess = (at["lift"] / at["lift_load"]).values[np.ix_(order, order)]
        figure.add_trace(_pairs(excess, order, order, "expert %{y} with %{x}", place == 0))
    figure.update_xaxes(constrain="domain", title="expert")
    figure.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain", title="expert")
    return style(figure, 720, sliders=[_slider(layers)])


def flow(result: xr.Dataset) -> go.Figure:
    """How much more of an expert's tokens go to each expert of the next MoE layer than if layers were independent."""
    layers = _some(result["layer"].values, result.sizes["expert"])
    figure = go.Figure()
    for place, layer in enumerate(layers):
        at = result.sel(layer=layer)
        rows, columns = _crossing(np.nan_to_num(at["lift"].values))
        lift = at["lift"].values[np.ix_(rows, columns)]
        figure.add_trace(_pairs(lift, rows, columns, "expert %{y} to %{x}", place == 0))
    figure.update_yaxes(autorange="reversed", title="expert of the layer")
    return style(figure, 720, sliders=[_slider(layers, text="from layer ")], xaxis_title="expert of the next MoE layer")


def _some(layers: Int[np.ndarray, " L"], experts: int) -> Int[np.ndarray, " l"]:
    """All layers, or as many as the file has room for, evenly spread."""
    most = max(1, _CELLS // experts**2)
    return layers[np.unique(np.linspace(0, len(layers) - 1, min(most, len(layers))).astype(int))]


def _pairs(
    lift: Float[np.ndarray, "A B"], rows: np.ndarray, columns: np.ndarray, name: str, visible: bool
) -> go.Heatmap:
    """log2 of a lift, 0 (white) where there is nothing beyond the control, kept as bytes."""
    with np.errstate(divide="ignore", invalid="ignore"):
        cells = np.round(np.log2(lift) / _STEP)
    kept = np.where(np.isnan(lift), 0, np.clip(np.nan_to_num(cells, neginf=-127), -127, 127)).astype(np.int8)
    ends = 3 / _STEP
    return go.Heatmap(
        z=kept,
        x=[str(one) for one in columns],
        y=[str(one) for one in rows],
        hovertemplate=name + ": %{z}/24 doublings<extra></extra>",
        colorscale="RdBu_r",
        zmin=-ends,
        zmid=0,
        zmax=ends,
        visible=visible,
        colorbar={
            "title": "times",
            "tickvals": [-ends, -ends / 3, 0, ends / 3, ends],
            "ticktext": ["⅛", "½", "1", "2", "8"],
        },
    )


def clustered(likeness: Float[np.ndarray, "E E"]) -> Int[np.ndarray, " E"]:
    """An order of experts in which those alike are near each other: the leaves of average linkage."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    distance = np.maximum(1 - (likeness + likeness.T) / 2, 0.0)  # rounding may exceed a likeness of 1
    np.fill_diagonal(distance, 0.0)
    condensed = squareform(distance, checks=False)
    if len(distance) < 3:
        return np.arange(len(distance))
    tree = linkage(condensed, "average")
    return leaves_list(optimal_leaf_ordering(tree, condensed) if len(distance) <= 128 else tree)


def _crossing(lift: Float[np.ndarray, "A B"]) -> tuple[Int[np.ndarray, " A"], Int[np.ndarray, " B"]]:
    """Rows by the clustering of what they flow to, columns by the mean place of the rows that flow to them.

    Strong flow lies near the diagonal. (A singular direction, for rows and columns at once, tells two groups apart, not
    eight.)
    """
    logs = np.log2(np.maximum(lift, 1 / 8)).clip(-3, 3)
    centred = logs - logs.mean(axis=1, keepdims=True)
    size = np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    rows = clustered((centred / size) @ (centred / size).T)
    strong = np.maximum(logs[rows], 0.0) ** 2
    place = np.arange(len(rows)) @ strong / np.maximum(strong.sum(axis=0), 1e-12)
    return rows, np.argsort(np.where(strong.any(axis=0), place, len(rows)), kind="stable")


def information(result: xr.Dataset) -> go.Figure:
    """What the experts of one layer say of those of the next, beside the shuffle within documents."""
    layers = result["layer"].values
    figure = go.Figure()
    figure.add_trace(line(layers, result["mutual_information"].values, "tokens as they are", COLOURS[0]))
    shuffled = result["mutual_information_shuffled"].values
    figure.add_trace(line(layers, shuffled, "shuffled within documents", CONTROL, dash="dash"))
    ends = result["gain_interval"].values
    figure.add_trace(line(layers, result["gain"].values, "difference, with its interval", COLOURS[2], ends))
    title = "mutual information, nats"
    return style(figure, 340, xaxis_title="layer", yaxis_title=title, yaxis_rangemode="tozero")


def vocabulary(result: xr.Dataset) -> go.Figure:
    """Vocabulary specialization by layer beside its null of draws by load, and the gain with its interval."""
    layers = result["layer"].values
    figure = go.Figure()
    figure.add_trace(line(layers, result["specialization"].values, "share of an id's first expert", COLOURS[0]))
    null = result["specialization_null"].values
    figure.add_trace(line(layers, null, "the same for draws by load", CONTROL, dash="dash"))
    ends = result["gain_interval"].values
    figure.add_trace(line(layers, result["gain"].values, "difference, with its interval", COLOURS[2], ends))
    return style(figure, 340, xaxis_title="layer", yaxis_title="share of tokens", yaxis_range=[0, 1.02])


# Training, sizes


def saturation(result: xr.Dataset) -> go.Figure:
    """Share of a token's final experts that it has at each checkpoint, a line a layer; controls in grey."""
    steps = [str(step) for step in result["step"].values]
    layers = result["layer"].values
    figure = go.Figure()
    for index, layer in enumerate(layers):
        at = result.sel(layer=layer)
        ends = at["saturation_interval"].values
        drawn = line(steps, at["saturation"].values, f"layer {layer}", layer_colour(index, len(layers)), ends)
        figure.add_trace(drawn.update(showlegend=len(layers) <= 12))
    independent = result["independent"].mean("layer").values
    figure.add_trace(line(steps, independent, "routers that share only their loads", CONTROL, dash="dash"))
    baseline = np.full(len(steps), by_layer(result, "saturation_baseline").mean())
    figure.add_trace(line(steps, baseline, "uniform router", CONTROL, dash="dot"))
    figure.update_xaxes(type="category", title="training step")
    below = {}
    if len(layers) > 12:  # the scale of layers stands where the legend would
        figure.add_trace(layer_scale(layers))
        below = {"legend": {"orientation": "h", "y": -0.2, "yanchor": "top"}}
    return style(figure, 420, yaxis_title="router saturation", yaxis_range=[0, 1.02], **below)


def norm_and_weight(result: xr.Dataset) -> go.Figure:
    """Each expert where it was chosen, norm of its output and weight; and the rank correlation within tokens."""
    titles = ["experts, where they were chosen", "rank correlation within tokens, over all experts"]
    figure = make_subplots(1, 2, subplot_titles=titles)
    layers = result["layer"].values
    for index, layer in enumerate(layers):
        at = result.sel(layer=layer)
        figure.add_trace(
            go.Scatter(  # not Scattergl: pages are opened where there is no WebGL too
                x=at["norm_chosen"].values.astype(np.float32),
                y=at["weight_chosen"].values.astype(np.float32),
                customdata=at["expert"].values,
                mode="markers",
                marker={"size": 5, "opacity": 0.7, "color": layer_colour(index, len(layers))},
                hovertemplate=f"layer {layer}, "
                + "expert %{customdata}: norm %{x:.3g}, weight %{y:.3f}<extra></extra>",
                showlegend=False,
            ),
            row=1,
            col=1,
        )
    figure.add_trace(layer_scale(layers), row=1, col=1)
    mean, ends = result["rank_correlation"].values, result["rank_correlation_interval"].values
    figure.add_trace(line(layers, mean, "scores as they are", COLOURS[0], ends), row=1, col=2)
    shuffled = result["rank_correlation_shuffled"].values
    figure.add_trace(line(layers, shuffled, "scores in random order", CONTROL, dash="dash"), row=1, col=2)
    figure.update_xaxes(type="log", title="mean norm of the output", row=1, col=1)
    figure.update_yaxes(title="mean weight", row=1, col=1)
    figure.update_xaxes(title="layer", row=1, col=2)
    return style(figure, 460, legend={"orientation": "h", "x": 0.55, "y": -0.17, "xanchor": "left", "yanchor": "top"})
