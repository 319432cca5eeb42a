"""Figures of routing: they show the datasets' own numbers, and stay small and readable at 256 experts and 60 layers."""

import base64
from functools import cache

import numpy as np
import pytest
import xarray as xr

import moe_interp as moe
from moe_interp.analyses.recorded import routing_from_counts
from moe_interp.analyses.saturation import reference_saturation
from moe_interp.data import Corpus
from moe_interp.views import figures, routing_figures
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

TEXTS = {"<b>plain</b>": ["The cat sat on", "so it goes, on"], "code": ["f(x) = 2 * x", "if (a): b = c"]}


@cache
def made() -> dict[str, xr.Dataset]:
    model, corpus = moe.wrap(build("deepseek_v3"), StubTokenizer()), Corpus.from_texts(TEXTS)
    return {
        "routing": moe.routing(model, corpus, resamples=20),
        "pairs": moe.coactivation(model, corpus, blocks=4, resamples=5),
        "flow": moe.transitions(model, corpus, blocks=4),
        "vocabulary": moe.vocabulary_specialization(model, corpus, at_least=2),
        "norms": moe.norm_and_weight(model, corpus, resamples=20),
    }


def values(drawn) -> np.ndarray:
    """What a trace holds, whether as a list or packed."""
    if isinstance(drawn, dict):
        return np.frombuffer(base64.b64decode(drawn["bdata"]), dtype=drawn["dtype"])
    return np.asarray(drawn)


def test_bars_are_the_most_preferred_experts_with_their_intervals():
    routing = made()["routing"]
    figure = routing_figures.specialization_bars(routing)
    assert len(figure.data) == 2 * routing.sizes["layer"]
    at = routing.isel(layer=1, domain=1)
    bars = figure.data[3]
    order = np.argsort(-at.specialization.values, kind="stable")
    assert list(bars.x) == [str(expert) for expert in order]
    np.testing.assert_allclose(bars.y, 100 * at.specialization.values[order])
    low, high = 100 * at.specialization_interval.values[:, order]
    np.testing.assert_allclose(bars.y - bars.error_y.arrayminus, low)
    np.testing.assert_allclose(bars.y + bars.error_y.array, high)
    line = figure.layout.shapes[0]
    assert line.y0 == pytest.approx(100 * 3 / 8)
    assert line.line.width > 0  # the template's shapes have no line and are faint
    assert line.opacity == 1
    assert figure.layout.annotations[0].text == "&lt;b&gt;plain&lt;/b&gt;"
    shown = figure.layout.sliders[0].steps[2].args[0]["visible"]
    assert [place for place, visible in enumerate(shown) if visible] == [4, 5]


def test_the_heat_map_is_white_at_the_uniform_share_and_a_colour_further_for_every_doubling():
    routing = made()["routing"].copy(deep=True)
    routing["specialization"][1, 2, :4] = [0.0, 3 / 8, 2 * 3 / 8, 0.9]
    figure = figures.specialization(routing)
    heat, at = figure.data[2], routing.isel(layer=2, domain=1)
    cells = values(heat.z).reshape(2, 8)[1]
    np.testing.assert_allclose(cells[:4], [-3, 0, 1, np.log2(0.9 * 8 / 3)], rtol=1e-6)
    told = values(heat.customdata).reshape(2, 8, 4)[1]
    np.testing.assert_allclose(told[:, 0], 100 * at.specialization, rtol=1e-6)
    np.testing.assert_allclose(told[:, 1:3].T, 100 * at.specialization_interval, rtol=1e-6)
    np.testing.assert_allclose(told[:, 3], at.specialization_p, rtol=1e-6)
    assert (heat.zmin, heat.zmax) == (-3, 3)
    marks = dict(zip(heat.colorbar.tickvals, heat.colorbar.ticktext, strict=True))
    assert marks == {-3: "4.7", -2: "9.4", -1: "19", 0: "38", 1: "75"}  # 37.5 % of tokens, and none above 100 %
    assert heat.y[0] == "&lt;b&gt;plain&lt;/b&gt;"


def test_pairs_show_lift_over_that_of_loads_in_the_order_of_the_clustering():
    pairs = made()["pairs"]
    heat = routing_figures.coactivation(pairs).data[1]
    rows, columns = ([int(one) for one in axis] for axis in (heat.y, heat.x))
    assert rows == columns
    assert sorted(rows) == list(range(8))
    at = pairs.isel(layer=1)
    for place, one in enumerate(rows):
        for where, other in enumerate(columns):
            lift = float(at.lift.sel(expert=one, other=other) / at.lift_load.sel(expert=one, other=other))
            cell = int(heat.z[place][where])
            expected = 0 if np.isnan(lift) else -127 if lift == 0 else round(np.log2(lift) * 24)
            assert cell == np.clip(expected, -127, 127)


def test_clustering_puts_groups_side_by_side():
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1, 2], 4))
    likeness = np.where(group[:, None] == group, 0.9, -0.2) + 0.01 * rng.normal(size=(12, 12))
    order = routing_figures.clustered((likeness + likeness.T) / 2)
    assert sum(a != b for a, b in zip(group[order], group[order][1:], strict=False)) == 2


def test_strong_flow_lies_near_the_diagonal():
    rng = np.random.default_rng(0)
    before, after = (rng.permutation(np.repeat(np.arange(6), 4)) for _ in range(2))
    lift = np.where(before[:, None] == after, 4.0, 0.4) * rng.gamma(20, 1 / 20, size=(24, 24))
    rows, columns = routing_figures._crossing(lift)
    assert sorted(rows) == sorted(columns) == list(range(24))
    np.testing.assert_array_equal(before[rows], after[columns])  # six blocks on the diagonal
    assert sum(a != b for a, b in zip(before[rows], before[rows][1:], strict=False)) == 5
    nothing = np.where(np.arange(24) == 3, 0.0, lift)  # an expert that nothing flows to comes last
    assert routing_figures._crossing(nothing)[1][-1] == 3


def test_flow_and_information_show_the_datasets_numbers():
    result = made()["flow"]
    heat = routing_figures.flow(result).data[0]
    rows, columns = ([int(one) for one in axis] for axis in (heat.y, heat.x))
    lift = float(result.lift.isel(layer=0).sel(expert=rows[2], next_expert=columns[5]))
    expected = -127 if lift == 0 else np.clip(round(np.log2(lift) * 24), -127, 127)
    assert heat.z[2][5] == expected
    drawn = routing_figures.information(result)
    np.testing.assert_allclose(drawn.data[0].y, result.mutual_information)
    np.testing.assert_allclose(drawn.data[1].y, result.mutual_information_shuffled)
    assert drawn.data[1].line.dash == "dash"


def test_vocabulary_norms_and_saturation_show_values_and_controls():
    vocabulary = routing_figures.vocabulary(made()["vocabulary"])
    np.testing.assert_allclose(vocabulary.data[1].y, made()["vocabulary"].specialization_null)
    norms = routing_figures.norm_and_weight(made()["norms"])
    np.testing.assert_allclose(values(norms.data[0].x), made()["norms"].norm_chosen.isel(layer=0), rtol=1e-6)
    kept = reference_saturation(resamples=20)
    drawn = routing_figures.saturation(kept)
    np.testing.assert_allclose(drawn.data[3].y, kept.saturation.isel(layer=3))
    assert [trace.name for trace in drawn.data[-2:]] == ["routers that share only their loads", "uniform router"]


@cache
def large() -> xr.Dataset:
    rng = np.random.default_rng(1)
    share = rng.dirichlet(np.full(256, 0.5), size=(8, 60))
    counts = np.stack(
        [[rng.multinomial(8000, np.minimum(s, 0.1) / np.minimum(s, 0.1).sum()) for s in d] for d in share]
    )
    counts = np.minimum(counts, 1000)
    tokens = 1000
    missing = 8 * tokens - counts.sum(axis=2)
    for domain, layer in np.ndindex(8, 60):  # every layer sums to tokens * K
        free = np.argsort(counts[domain, layer])[: missing[domain, layer]]
        while missing[domain, layer] > 0:
            step = min(missing[domain, layer], len(free))
            counts[domain, layer, free[:step]] += 1
            missing[domain, layer] -= step
    return routing_from_counts(counts, tokens=tokens, domains=[f"domain {n}" for n in range(8)], top_k=8)


def test_at_256_experts_and_60_layers_figures_stay_small_and_readable():
    routing = large()
    bars = routing_figures.specialization_bars(routing)
    assert max(len(trace.x) for trace in bars.data) == 24
    assert len(bars.to_json()) < 6e6
    curves = figures.coverage(routing)
    assert not any(trace.showlegend for trace in curves.data[:60])  # a scale in place of sixty names
    assert curves.data[60].marker.colorbar.title.text == "layer"
    rng = np.random.default_rng(2)
    lift = xr.DataArray(rng.gamma(2.0, size=(60, 256, 256)), dims=("layer", "expert", "other"))
    square = {"layer": np.arange(60), "expert": np.arange(256), "other": np.arange(256)}
    pairs = xr.Dataset({"lift": lift, "lift_load": lift * 0 + 2.0, "npmi": lift * 0.0}, coords=square)
    drawn = routing_figures.coactivation(pairs)
    assert len(drawn.data) == 30  # of sixty, evenly spread: the file has room for so many
    assert len(drawn.to_json()) < 6e6
    heat = figures.specialization(routing)
    assert len(heat.to_json()) < 5e6
    layers = np.arange(60)
    control = figures.line(layers, layers / 60, "control", figures.CONTROL, dash="dash")
    assert control.mode == "lines"  # dashes show: markers side by side would fill the gaps
    assert figures.line(layers, layers / 60, "value", figures.COLOURS[0]).mode == "lines+markers"
    assert figures.line(layers[:8], layers[:8] / 60, "control", figures.CONTROL, dash="dash").mode == "lines+markers"
    named = {"expert": "expert", "other": "next_expert"}
    flow = routing_figures.flow(pairs[["lift"]].rename({"other": named["other"]}))
    assert [step.label for step in flow.layout.sliders[0].steps][-1] == "59"
