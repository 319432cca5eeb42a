"""The same answer through every door: the local host, nnsight here and on a server, TransformerLens.

The server has the weights and not this package, the client none. What the local host reads and edits is held to slow
references elsewhere; here every point of seven families is read and edited through the other doors and held to it.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from nnsight import NNsight, TransformersModel
from torch import Tensor

import moe_interp as moe
from moe_interp.adapters import describe
from moe_interp.hosts.hooked import trace_points
from moe_interp.hosts.stock import reached, stock_points
from moe_interp.hosts.traces import TracePoints
from moe_interp.points import POINTS
from tests import tiny
from tests.bridges import bridge
from tests.edits import change, one_of_each_point
from tests.served import saved, unloaded

IDS = torch.randint(3, 92, (2, 9), generator=torch.Generator().manual_seed(0))
EXACT = 1e-6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TransformersModel]:
    """An nnsight model without weights of each family."""

    @cache
    def model(family: str) -> TransformersModel:
        return unloaded(saved(tiny.build(family), tmp_path_factory.mktemp(family)))

    return model


def here(family: str) -> tuple[Any, TracePoints]:
    """nnsight with the weights here, through hook points."""
    lm = NNsight(tiny.build(family))
    return partial(lm.trace, input_ids=IDS, use_cache=False), trace_points(lm)


def stock(family: str) -> tuple[Any, TracePoints]:
    """The same through the model's own modules, as on a server."""
    lm = NNsight(tiny.build(family))
    return partial(lm.trace, input_ids=IDS, use_cache=False), stock_points(lm, reached(describe(lm._module)))


def away(family: str, models: Any, address: str) -> tuple[Any, TracePoints]:
    """On the server."""
    lm = models(family)
    return partial(lm.trace, {"input_ids": IDS}, use_cache=False, remote=address), trace_points(lm)


TRACES = ["here", pytest.param("stock", marks=pytest.mark.slow), "away"]


@pytest.fixture
def trace(request: pytest.FixtureRequest, models: Any, address: str) -> Callable[[str], tuple[Any, TracePoints]]:
    """nnsight's ways in: from a family to what opens a trace, and the points to use in it."""
    name = request.param
    return {"here": here, "stock": stock, "away": partial(away, models=models, address=address)}[name]


@cache
def local(family: str) -> moe.MoEModel:
    """The model through the local host."""
    return moe.wrap(tiny.build(family))


@cache
def whole(family: str) -> moe.Run:
    """Everything that the local host reads."""
    model = local(family)
    return model.run(IDS, read=list(model.points))


# What is called in a trace is sent by its source, annotations included: a server does not know our classes.
def read(points: Any, point: str, layer: int | None) -> Tensor:
    """A point's value in a trace."""
    return points.embed if layer is None else getattr(points.layers[layer], point)


def write(points: Any, point: str, layer: int | None, value: Tensor) -> None:
    """A point's value in a trace, replaced."""
    if layer is None:
        points.embed = value
    else:
        setattr(points.layers[layer], point, value)


class Traced:
    """nnsight, here or on a server."""

    def __init__(self, family: str, trace: Callable[[str], tuple[Any, TracePoints]]):
        self.trace, self.points = trace(family)
        self.model = local(family)

    def value(self, point: str, layer: int | None) -> Tensor:
        """A point's value."""
        points = self.points
        with self.trace() as tracer:
            value = read(points, point, layer).clone().save()
            tracer.stop()
        return value

    def edited(self, point: str, layer: int | None, in_place: bool) -> Tensor:
        """Logits when a point is changed."""
        points = self.points
        if in_place:
            with self.trace() as tracer:
                value = read(points, point, layer)
                value[...] = change(point, value)
                logits = tracer.result.logits.save()
        else:
            with self.trace() as tracer:
                write(points, point, layer, change(point, read(points, point, layer)))
                logits = tracer.result.logits.save()
        return logits


class Bridged:
    """TransformerLens. It computes deepseek_v2's attention in its own order, so its own model is what it is held to."""

    def __init__(self, family: str):
        self.bridge = bridge(family)
        self.door = moe.attach(self.bridge)
        self.model = self.door.model

    def value(self, point: str, layer: int | None) -> Tensor:
        """A point's value."""
        name = self.door.hook_names[point, layer]
        return self.bridge.run_with_cache(IDS, names_filter=name)[1][name]

    def edited(self, point: str, layer: int | None, in_place: bool) -> Tensor:
        """Logits when a point is changed."""

        def hook(value: Tensor, hook: Any) -> Tensor | None:
            changed = change(point, value)
            if not in_place:
                return changed
            value[...] = changed
            return None

        return self.bridge.run_with_hooks(IDS, fwd_hooks=[(self.door.hook_names[point, layer], hook)])


@pytest.fixture
def door(request: pytest.FixtureRequest, models: Any, address: str) -> Callable[[str], Traced | Bridged]:
    """Every way in but the local host, from a family on."""
    if request.param == "bridge":
        return Bridged
    ways = {"here": here, "stock": stock, "away": partial(away, models=models, address=address)}
    return partial(Traced, trace=ways[request.param])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("door", [*TRACES, "bridge"], indirect=True)
def test_the_same_reads_through_every_door(door, family):
    found = door(family)
    expected = found.model.run(IDS, read=list(found.model.points))
    for point, layer in one_of_each_point(expected.values):
        with torch.no_grad():
            value = found.value(point, layer)
        assert value.shape == expected.values[point, layer].shape
        assert torch.equal(value, expected.values[point, layer]), (point, layer)


@pytest.mark.parametrize("in_place", [False, True], ids=["replaced", "in place"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("door", [*TRACES, "bridge"], indirect=True)
def test_the_same_edits_through_every_door(door, family, in_place):
    found = door(family)
    plain = found.model.run(IDS, read=list(found.model.points))
    for point, layer in one_of_each_point(key for key in plain.values if POINTS[key[0]].editable):
        expected = found.model.run(IDS, edit=moe.apply(point, partial(change, point), layers=layer)).logits
        with torch.no_grad():
            logits = found.edited(point, layer, in_place)
        assert (expected - plain.logits).abs().max() > 1e-3, point
        assert (logits - expected).abs().max() <= EXACT * expected.abs().max(), point


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("trace", TRACES, indirect=True)
def test_all_layers_in_one_trace(trace, family):
    trace, points = trace(family)
    layers = local(family).layers
    with trace():
        found = []
        for layer in layers:
            at = points.layers[layer]
            found.append([one.clone() for one in (at.resid_mid, at.router_logits, at.expert_ids, at.gate_weights)])
            found[-1] += [at.expert_act.clone(), at.expert_out.clone(), at.routed_out.clone(), at.resid_post.clone()]
        found.save()
    names = ("resid_mid", "router_logits", "expert_ids", "gate_weights")
    names += ("expert_act", "expert_out", "routed_out", "resid_post")
    for layer, values in zip(layers, found, strict=True):
        for name, value in zip(names, values, strict=True):
            assert torch.equal(value, whole(family)[name, layer]), (name, layer)


def used(family: str) -> tuple[int, int]:
    """A layer and an expert that the last token of the first text chose."""
    layer = local(family).layers[1]
    return layer, int(whole(family).routing[layer].ids[0, -1, 0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("trace", TRACES, indirect=True)
def test_one_expert(trace, family):
    trace, points = trace(family)
    layer, expert = used(family)
    run = whole(family)
    with trace():
        at = points.layers[layer].expert(expert)
        weight = at.weight.clone().save()
        act, out, mask = at.act.clone().save(), at.out.clone().save(), at.used.save()
        first = points.layers[layer].heaviest(1).out.clone().save()
    expected, used_by = run.expert(layer, expert)
    slots = run.routing[layer].ids == expert
    assert torch.equal(out, expected) and torch.equal(mask, used_by)
    assert torch.equal(weight, run.routing[layer].weights.masked_fill(~slots, 0).sum(-1))
    assert torch.equal(act, run["expert_act", layer].masked_fill(~slots[..., None], 0).sum(2))
    assert torch.equal(first, run.heaviest(layer, 1))
    with trace():  # in several slots of a token
        points.layers[layer].expert_ids[:] = expert
        doubled = points.layers[layer].expert(expert).out.clone().save()
    edit = moe.apply("expert_ids", lambda ids: torch.full_like(ids, expert), layers=layer)
    again = local(family).run(IDS, read="expert_out", edit=edit)
    assert torch.equal(doubled, again.expert(layer, expert)[0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("trace", TRACES, indirect=True)
def test_an_expert_ablated_at_the_last_token(trace, family):
    trace, points = trace(family)
    layer, expert = used(family)
    edits = [moe.ablate(layer=layer, expert=expert, positions=-1), moe.scale(layer=layer + 1, expert=0, by=3.0)]
    with trace() as tracer:
        points.layers[layer].expert(expert).out[:, -1] = 0
        points.layers[layer + 1].expert(0).out *= 3.0
        logits = tracer.result.logits.save()
    expected = local(family).run(IDS, edit=edits).logits
    assert (logits - expected).abs().max() <= EXACT * expected.abs().max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("trace", TRACES, indirect=True)
def test_edits_of_one_layer_in_a_row(trace, family):
    trace, points = trace(family)
    layer, expert = used(family)
    edits = [
        moe.apply("router_logits", lambda logits: logits.flip(-1), layers=layer),
        moe.apply("gate_weights", lambda weights: weights * 0.5, layers=layer),
        moe.apply("expert_act", lambda act: act * 1.5, layers=layer),
        moe.scale(layer=layer, expert=expert, by=2.0),
        moe.apply("routed_out", lambda out: out + 0.1, layers=layer),
    ]
    with trace() as tracer:
        at = points.layers[layer]
        at.router_logits = at.router_logits.flip(-1)
        at.gate_weights *= 0.5
        at.expert_act = at.expert_act * 1.5
        at.expert(expert).out *= 2.0
        at.routed_out += 0.1
        logits = tracer.result.logits.save()
    expected = local(family).run(IDS, edit=edits).logits
    assert (logits - expected).abs().max() <= EXACT * expected.abs().max()
