"""Figures of labelled results, one function a figure: a Dataset in, a plotly Figure out.

Values are drawn in colour and solid; their controls in grey and dashed. Intervals are the 95 % ones of the Dataset.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Float
from plotly.subplots import make_subplots

from moe_interp.views.tokens import escaped

COLOURS = ("#2f6f9f", "#d1662b", "#3a8f5c", "#a8434f", "#7a5ea8", "#8a6d3b", "#c75a9b", "#5f7d1e", "#1d8f97", "#555e6b")
CONTROL = "#9aa0a6"
_MANY = 24  # points of a line
NAMES = {
    "heaviest": "heaviest expert",
    "lightest": "lightest expert",
    "random_unselected": "random expert, not selected",
    "other_token": "another token's heaviest",
    "none": "no expert at all",
}


def rows_of(names: Iterable[Any]) -> list[str]:
    """Names as rows of a heat map, which draws rows of one text as one: numbered where they are cut to the same."""
    told = [escaped(str(name), 40) for name in names]
    return [one if told.count(one) == 1 else f"{number} {one}" for number, one in enumerate(told)]


def style(figure: go.Figure, height: int = 420, **layout: Any) -> go.Figure:
    figure.update_layout(
        template="simple_white",
        height=height,
        margin={"l": 70, "r": 20, "t": 40, "b": 60},
        font={"family": "system-ui, sans-serif", "size": 13},
        hovermode="closest",
        **layout,
    )
    return figure


def line(x: Any, y: Any, name: str, colour: str, interval: Any = None, **line: Any) -> go.Scatter:
    """A line with markers, and error bars from the ends [2, n] of an interval; thinner where there are many points."""
    many, bars = len(x) > _MANY, None
    if interval is not None:
        low, high = np.asarray(interval)
        thickness, width = (0.8, 0) if many else (1.2, 3)
        bars = {"type": "data", "array": high - y, "arrayminus": y - low, "thickness": thickness, "width": width}
    hidden = many and "dash" in line and line["dash"] is not None  # markers side by side would fill the gaps
    return go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines" if hidden else "lines+markers",
        error_y=bars,
        line={"color": colour, **({"width": 1.2} if many and not hidden else {}), **line},
        marker={"size": 4 if many else 6},
    )


def coverage(routing: xr.Dataset) -> go.Figure:
    """Share of all decisions that the busiest experts take, one curve a layer; equal loads are the diagonal."""
    load = -np.sort(-routing["utilisation_overall"].values, axis=-1)
    experts = np.arange(load.shape[-1] + 1)
    figure = go.Figure()
    for index, layer in enumerate(routing["layer"].values):
        taken = np.concatenate([[0.0], np.cumsum(load[index])])
        colour = {"color": layer_colour(index, len(load))}
        figure.add_scatter(x=experts, y=taken, name=f"layer {layer}", line=colour, showlegend=len(load) <= 12)
    if len(load) > 12:
        figure.add_trace(layer_scale(routing["layer"].values))
    diagonal = experts / experts[-1]
    figure.add_scatter(x=experts, y=diagonal, name="equal loads", line={"color": CONTROL, "dash": "dash"})
    return style(figure, xaxis_title="busiest experts", yaxis_title="share of decisions", yaxis_range=[0, 1.02])


def layer_colour(index: int, count: int) -> str:
    """From blue, the first layer, to orange, the last."""
    share = index / max(count - 1, 1)
    return f"hsl({210 - 170 * share:.0f}, 60%, {42 + 8 * share:.0f}%)"


def layer_scale(layers: Any) -> go.Scatter:
    """Nothing but a scale of the layers' colours, where a legend would have too many lines."""
    scale = [[share, layer_colour(round(100 * share), 101)] for share in np.linspace(0, 1, 11)]
    marker = {
        "color": [layers[0]],
        "colorscale": scale,
        "cmin": layers[0],
        "cmax": layers[-1],
        "showscale": True,
        "colorbar": {"title": "layer", "len": 0.8},
    }
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False, hoverinfo="skip")


def by_layer(result: xr.Dataset, name: str) -> Float[np.ndarray, " L"]:
    """What a uniform router gives at each layer; a result has one number where layers choose as many experts."""
    return result[name].broadcast_like(result["layer"]).values


def specialization(routing: xr.Dataset) -> go.Figure:
    """Domain x expert, one layer at a time: specialization by doublings of a uniform router's share, which is white."""
    baseline = 100 * by_layer(routing, "specialization_baseline")
    times = np.log2(np.maximum(routing["specialization"].values, 1e-9) / (baseline[:, None] / 100))
    limit = max(3.0, np.ceil(np.nanmax(times)))
    ticks = np.arange(-limit, limit + 1)
    figure = go.Figure()
    for index, layer in enumerate(routing["layer"].values):
        at = routing.sel(layer=layer)
        share, (low, high) = 100 * at["specialization"].values, 100 * at["specialization_interval"].values
        marks = {tick: baseline[index] * 2.0**tick for tick in ticks if baseline[index] * 2.0**tick <= 100}
        figure.add_heatmap(
            z=times[:, index].clip(-limit, limit).astype(np.float32),
            x=routing["expert"].values,
            y=rows_of(routing["domain"].values),
            customdata=np.stack([share, low, high, at["specialization_p"].values], axis=-1).astype(np.float32),
            hovertemplate="%{y}, expert %{x}: %{customdata[0]:.1f} %"
            "<br>interval %{customdata[1]:.1f} – %{customdata[2]:.1f} %<br>p = %{customdata[3]:.3f}<extra></extra>",
            colorscale="RdBu_r",
            zmin=-limit,
            zmax=limit,
            visible=index == 0,
            colorbar={
                "title": "% of tokens",
                "tickvals": list(marks),
                "ticktext": [f"{mark:.0f}" if mark >= 10 else f"{mark:.2g}" for mark in marks.values()],
            },
        )
    steps = [
        {
            "label": str(layer),
            "method": "update",
            "args": [{"visible": [other == index for other in range(routing.sizes["layer"])]}],
        }
        for index, layer in enumerate(routing["layer"].values)
    ]
    slider = {"active": 0, "steps": steps, "currentvalue": {"prefix": "layer "}, "pad": {"t": 40}}
    height = 220 + 28 * routing.sizes["domain"]
    axis = {"autorange": "reversed", "type": "category"}  # else names such as "2019-01" become dates
    return style(figure, height, sliders=[slider], xaxis_title="expert", yaxis=axis)


def strongest(routing: xr.Dataset) -> go.Figure:
    """The largest specialization of each domain by layer, with its interval; the uniform router's dashed."""
    values = routing["specialization"].values
    best = values.argmax(axis=-1)
    layers = routing["layer"].values
    figure = go.Figure()
    for index, domain in enumerate(routing["domain"].values):
        which = (np.arange(len(layers)), best[index])
        ends = routing["specialization_interval"].values[(slice(None), index, *which)]
        colour = COLOURS[index % len(COLOURS)]
        drawn = line(layers, 100 * values[(index, *which)], escaped(str(domain), 40), colour, 100 * ends)
        drawn.customdata = best[index]
        drawn.hovertemplate = "layer %{x}, expert %{customdata}: %{y:.1f} %"
        figure.add_trace(drawn)
    baseline = 100 * by_layer(routing, "specialization_baseline")
    figure.add_trace(line(layers, baseline, "uniform router", CONTROL, dash="dash"))
    return style(figure, xaxis_title="layer", yaxis_title="% of the domain's tokens", yaxis_rangemode="tozero")


def routing_map(result: xr.Dataset) -> go.Figure:
    """Tokens x layers: the number of the heaviest expert, coloured by its share of the token's weight; or a dash."""
    experts = result["heaviest_expert"].values.T
    tokens = [f"{number} {escaped(str(token))}" for number, token in enumerate(result["token"].values)]
    figure = go.Figure(
        go.Heatmap(
            z=result["heaviest_share"].values.T,
            x=tokens,
            y=[f"layer {layer}" for layer in result["layer"].values],
            text=np.where(experts < 0, "–", experts.astype(str)),
            texttemplate="%{text}",
            hovertemplate="%{x}, %{y}: expert %{text}, %{z:.2f} of the weight<extra></extra>",
            colorscale="Blues",
            zmin=0,
            zmax=1,
            colorbar={"title": "share"},
        )
    )
    layers = result.sizes["layer"]
    return style(figure, 160 + (34 if layers <= 16 else 17) * layers, xaxis_tickangle=-50)


def lens(result: xr.Dataset) -> go.Figure:
    """Mean KL from the output of the model to what a part alone would say; the control is the part without expert."""
    shared = "+shared" if "resid_mid+shared" in result["part"].values else ""
    parts: dict[str, tuple[str, Any, str | None]] = {
        "resid_mid": ("no expert: resid_mid", CONTROL, "dash"),
        **({f"resid_mid{shared}": ("no routed expert, shared ones only", CONTROL, "dot")} if shared else {}),
        f"resid_mid+c1{shared}": (
            "the heaviest expert and the shared ones" if shared else "the heaviest expert",
            0,
            None,
        ),
        "resid_post": ("all of it: resid_post", 1, None),
        "c1": ("the heaviest expert's contribution alone", 2, None),
    }
    figure = go.Figure()
    for part, (name, colour, dash) in parts.items():
        mean = result["kl"].sel(part=part).mean("pos").values
        shade = colour if isinstance(colour, str) else COLOURS[colour]
        figure.add_trace(line(result["layer"].values, mean, name, shade, dash=dash))
    return style(figure, xaxis_title="layer", yaxis_title="KL(final ‖ part), nats", yaxis_rangemode="tozero")


def similarity(result: xr.Dataset) -> go.Figure:
    """Cosine between one candidate and the ensemble by layer, without and with the residual, controls in grey."""
    titles = {"without": "contributions alone", "with": "with the residual"}
    figure = make_subplots(1, 2, subplot_titles=list(titles.values()))
    dashes: dict[str, str] = {
        "random_unselected": "dash",
        "other_token": "dot",
        "none": "dashdot",
        "lightest": "longdash",
    }
    for column, residual in enumerate(titles, start=1):
        at = result.sel(residual=residual, shared="without")
        for candidate in map(str, result["candidate"].values):
            mean = at["cosine_overall"].sel(candidate=candidate).values
            if np.isnan(mean).all():
                continue
            ends = at["cosine_overall_interval"].sel(candidate=candidate).transpose("bound", "layer").values
            colour = COLOURS[0] if candidate == "heaviest" else CONTROL
            drawn = line(result["layer"].values, mean, NAMES[candidate], colour, ends, dash=dashes.get(candidate))
            drawn.update(legendgroup=candidate, showlegend=column == 2)
            figure.add_trace(drawn, row=1, col=column)
        figure.update_xaxes(title="layer", row=1, col=column)
    figure.update_yaxes(title="cosine", row=1, col=1)
    return style(figure, 440)


def distance(result: xr.Dataset) -> go.Figure:
    """How far the sum of k experts is from the sum of all, by k: heaviest first, and random slots as control."""
    figure = go.Figure()
    for kept, colour, dash, name in (
        ("heaviest", COLOURS[0], None, "the k heaviest"),
        ("random", CONTROL, "dash", "k of the K at random"),
    ):
        mean = result["error_overall"].sel(kept=kept).mean("layer").values
        figure.add_trace(line(result["k"].values, mean, name, colour, dash=dash))
    title = "‖y_k − y_K‖ / ‖y_K‖, mean over layers"
    return style(figure, 360, xaxis_title="experts kept, k", yaxis_title=title, yaxis_rangemode="tozero")


def perplexity(result: xr.Dataset, aggregate: str = "token") -> go.Figure:
    """Perplexity with k experts over that of the whole model, by domain; random slots and no expert as controls."""
    at = result.sel(aggregate=aggregate)
    at = at.sel(renormalise="no") if "renormalise" in at.dims else at
    ks = result["k"].values
    figure = go.Figure()
    for index, domain in enumerate(result["domain"].values):
        one = at.sel(domain=domain)
        colour = COLOURS[index % len(COLOURS)]
        ends = one["ratio_interval"].transpose("bound", "k").values
        figure.add_trace(line(ks, one["ratio"].values, escaped(str(domain), 40), colour, ends))
    random = at["ratio_random_overall"].values
    figure.add_trace(line(ks, random, "k of the K at random, all domains", CONTROL, dash="dash"))
    none = np.full(len(ks), float(at["ratio_none_overall"]))
    figure.add_trace(line(ks, none, "no routed expert, all domains", CONTROL, dash="dot"))
    return style(
        figure, 460, xaxis_title="experts kept, k", yaxis_title="perplexity / perplexity of the model", yaxis_type="log"
    )
