"""Named points in nnsight's own idioms: invokes, gradients, steps of a generation, sessions; here and on a server."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import nnsight
import pytest
import torch
from nnsight import NNsight, TransformersModel
from nnsight.intervention.interleaver import OutOfOrderError

import moe_interp as moe
from moe_interp.adapters import describe
from moe_interp.adapters.spec import GatedOutput
from moe_interp.errors import BadInput, UnknownName
from moe_interp.hosts.hooked import trace_points
from moe_interp.hosts.stock import reached, stock_points
from moe_interp.points import POINTS, in_order, ranges
from tests import tiny
from tests.edits import change
from tests.served import saved, tokenizer, unloaded
from tests.tiny_types import TYPES
from tests.tiny_types import build as build_type

IDS = torch.randint(3, 92, (2, 9), generator=torch.Generator().manual_seed(0))
TEXTS = ("hello there", "a text of another length")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A checkpoint of each family."""
    return cache(lambda family: saved(tiny.build(family), tmp_path_factory.mktemp(family)))


@pytest.fixture
def door(request: pytest.FixtureRequest, folders: Any, address: str) -> Callable[[str], tuple[TransformersModel, dict]]:
    """A model of a family and the options of its traces: with weights here, or on the server."""

    def model(family: str) -> tuple[TransformersModel, dict]:
        if request.param == "away":
            return unloaded(folders(family)), {"remote": address}
        return TransformersModel(tiny.build(family), tokenizer=tokenizer()), {}

    return model


both_doors = pytest.mark.parametrize("door", ["here", "away"], indirect=True)
each_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@both_doors
@each_family
def test_invokes_do_not_reach_each_other(door, family):
    lm, options = door(family)
    points = trace_points(lm)
    layer = describe(lm._module).moe_layers[1]
    last = describe(lm._module).moe_layers[-1]

    with lm.trace(use_cache=False, **options) as tracer:
        with tracer.invoke(TEXTS[0]):
            first_ids = points.layers[layer].expert_ids.clone().save()
            first_out = points.layers[layer].routed_out.clone().save()
            last_ids = points.layers[last].expert_ids.clone().save()
            first = lm.output.logits[:, -1].save()
        with tracer.invoke(TEXTS[1]):
            second_ids = points.layers[layer].expert_ids.clone().save()
            second_out = points.layers[layer].routed_out.clone().save()
            last_others = points.layers[last].expert_ids.clone().save()
            second = lm.output.logits[:, -1].save()
    with moe.wrap(tiny.build(family), tokenizer()) as model:
        for text, ids, out in ((TEXTS[0], first_ids, first_out), (TEXTS[1], second_ids, second_out)):
            run = model.run(text, read=moe.select("routed_out", layers=layer))
            expected = run["routed_out", layer]
            assert torch.equal(ids[:, -len(text) :], run.routing[layer].ids)
            assert (out[:, -len(text) :] - expected).abs().max() <= 1e-5 * expected.abs().max()

    # Values of the last layer, after which nothing is chosen any more: others move by exactly 0.
    expert, other = int(last_ids[0, -1, 0]), int(last_others[0, -1, 0])
    with lm.trace(use_cache=False, **options) as tracer:
        with tracer.invoke(TEXTS[0]):
            points.layers[last].gate_weights[:, -1] *= 0.5
            points.layers[last].expert(expert).out[:, -1] *= 3.0
            points.layers[last].routed_out[:, -1] += 0.1
            edited = lm.output.logits[:, -1].save()
        with tracer.invoke(TEXTS[1]):
            beside = lm.output.logits[:, -1].save()
    assert (edited - first).abs().max() > 1e-3 and torch.equal(beside, second)
    with lm.trace(use_cache=False, **options) as tracer:
        with tracer.invoke(TEXTS[0]):
            beside = lm.output.logits[:, -1].save()
        with tracer.invoke(TEXTS[1]):
            points.layers[last].expert(other).act[:, -1] *= 3.0
            points.layers[last].expert(other).out[:, -1] *= 3.0
            edited = lm.output.logits[:, -1].save()
    assert (edited - second).abs().max() > 1e-3 and torch.equal(beside, first)

    with lm.trace(use_cache=False, **options) as tracer:
        with tracer.invoke(TEXTS[0]):
            beside = lm.output.logits[:, -1].save()
        with tracer.invoke(TEXTS[1]):
            points.layers[layer].router_logits = points.layers[layer].router_logits.flip(-1)
            edited = lm.output.logits[:, -1].save()
    assert (edited - second).abs().max() > 1e-3
    # Other experts run on other numbers of rows, so kernels may round otherwise.
    assert (beside - first).abs().max() <= 1e-6 * first.abs().max()


@both_doors
@each_family
def test_an_edit_at_every_step_of_a_generation(door, family, folders):
    lm, options = door(family)
    points = trace_points(lm)
    with moe.wrap(tiny.build(family), tokenizer()) as model:
        layer = model.layers[1]
        expert = int(model.run(TEXTS[0]).routing[layer].ids[0, -1, 0])
        edits = [moe.scale(layer=layer, expert=expert, by=-4.0), moe.scale(layer=layer + 1, expert=1, by=2.0)]
        ids = torch.tensor([tokenizer()(TEXTS[0])["input_ids"]])
        plain = model.generate(ids, max_new_tokens=6, do_sample=False)
        expected = model.generate(ids, edit=edits, max_new_tokens=6, do_sample=False)
    with lm.generate(max_new_tokens=6, do_sample=False, **options) as tracer:
        with tracer.invoke(TEXTS[0]):
            for _ in tracer.iter[:]:
                points.layers[layer].expert(expert).out *= -4.0
                points.layers[layer + 1].expert(1).out[:] *= 2.0
        with tracer.invoke():
            written = tracer.result.save()
    assert not torch.equal(plain, expected)
    assert torch.equal(written, expected)


@both_doors
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_several_edits_of_one_call_where_each_text_has_one_position(door, family, folders):
    lm, options = door(family)
    points = trace_points(lm)
    ids = torch.tensor([[5], [11]])
    with moe.wrap(tiny.build(family), tokenizer()) as model:
        layer = model.layers[1]
        first, second = model.run(ids).routing[layer].ids[0, 0, :2].tolist()
        edits = [
            moe.apply("expert_act", lambda act: act * 1.5, layers=layer),
            moe.scale(layer=layer, expert=first, by=-0.3),
            moe.scale(layer=layer, expert=second, by=3.0),
        ]
        plain, run = model.run(ids), model.run(ids, edit=edits, read="expert_out")
    with lm.trace(use_cache=False, **options) as tracer:
        with tracer.invoke(input_ids=ids[:1]):
            points.layers[layer].expert_act *= 1.5
            points.layers[layer].expert(first).out *= -0.3
            points.layers[layer].expert(second).out *= 3.0
            out = points.layers[layer].expert_out.clone().save()
            edited = lm.output.logits.save()
        with tracer.invoke(input_ids=ids[1:]):
            beside = lm.output.logits.save()
    assert (run.logits - plain.logits)[0].abs().max() > 1e-3
    assert (out - run["expert_out", layer][:1]).abs().max() <= 1e-5 * out.abs().max()
    assert (edited - run.logits[:1]).abs().max() <= 1e-5 * edited.abs().max()
    assert (beside - plain.logits[1:]).abs().max() <= 1e-5 * beside.abs().max()


@both_doors
def test_steps_are_told_apart_whatever_was_read_in_earlier_ones(door):
    lm, options = door("qwen3_moe")
    points = trace_points(lm)
    layer = describe(lm._module).moe_layers[1]
    with lm.generate(max_new_tokens=5, do_sample=False, **options) as tracer:
        with tracer.invoke(TEXTS[0]):
            found = []
            for step in tracer.iter[1:4]:
                at = points.layers[layer]
                if step == 2:
                    found.append(at.expert_out.clone())
                elif step == 3:
                    found.append(at.expert_act.clone())
                else:
                    found.append(at.routed_out.clone())
            found.save()
        with tracer.invoke():
            ids = tracer.result.save()
    start = len(TEXTS[0])
    with moe.wrap(tiny.build("qwen3_moe"), tokenizer()) as model:
        run = model.run(ids, read=["routed_out", "expert_out", "expert_act"])
    for step, name, value in zip((1, 2, 3), ("routed_out", "expert_out", "expert_act"), found, strict=True):
        at = start + step - 1
        assert torch.allclose(value, run[name, layer][:, at : at + 1], rtol=1e-4, atol=1e-5), name


@both_doors
def test_what_the_experts_were_called_with_is_read_late_and_not_edited(door):
    lm, options = door("qwen2_moe")
    points = trace_points(lm)
    layer = describe(lm._module).moe_layers[1]
    with moe.wrap(tiny.build("qwen2_moe"), tokenizer()) as model:
        run = model.run(TEXTS[0])
        expert = int(run.routing[layer].ids[0, -1, 0])
        expected = model.run(TEXTS[0], edit=moe.ablate(layer=layer, expert=expert, positions=-1)).logits
    with lm.trace(TEXTS[0], use_cache=False, **options):
        points.layers[layer].expert(expert).out[:, -1] = 0
        ids = points.layers[layer].expert_ids.save()
        weights = points.layers[layer].gate_weights.save()
        weight = points.layers[layer].expert(expert).weight.save()
        used = points.layers[layer].expert(expert).used.save()
        logits = lm.output.logits.save()
    route = run.routing[layer]
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(ids, route.ids) and torch.equal(weights, route.weights)
    assert torch.equal(weight, route.weights.masked_fill(route.ids != expert, 0).sum(-1))
    assert torch.equal(used, (route.ids == expert).any(-1))
    passed = pytest.raises(Exception, match="a value has passed: expected edits of expert_ids and gate_weights before")
    with passed, lm.trace(TEXTS[0], use_cache=False, **options):
        points.layers[layer].expert_out.save()
        points.layers[layer].gate_weights[:, -1] = 0
    with passed, lm.trace(TEXTS[0], use_cache=False, **options):
        points.layers[layer].expert_out.save()
        points.layers[layer].gate_weights += 1.0
    with passed, lm.trace(TEXTS[0], use_cache=False, **options):
        points.layers[layer].routed_out.save()
        points.layers[layer].expert_ids.mul_(2)
    over = pytest.raises(Exception, match="ran past it")
    with over, lm.trace(TEXTS[0], use_cache=False, **options):
        points.layers[layer].expert_out.save()
        points.layers[layer + 1].resid_mid.save()
        points.layers[layer].expert_ids.save()


@both_doors
@pytest.mark.parametrize(
    "edit",
    [
        lambda scores: scores.__setitem__(slice(None), 0),
        lambda scores: scores[0, -1].zero_(),
        lambda scores: scores.transpose(1, 2).mul_(2.0),
        lambda scores: scores.__iadd__(1.0),
    ],
)
def test_scores_are_read_and_an_edit_in_place_is_refused(door, edit):
    lm, options = door("qwen3_moe")
    points = trace_points(lm)
    refused = pytest.raises(Exception, match="point 'router_scores' cannot be edited.*Edit 'router_logits' instead")
    with refused, lm.trace(TEXTS[0], use_cache=False, **options):
        edit(points.layers[2].router_scores)
    with lm.trace(TEXTS[0], use_cache=False, **options):
        scores = points.layers[2].router_scores.save()
        copy = points.layers[2].router_scores.clone().zero_().save()
        logits = points.layers[3].router_logits.save()
    with moe.wrap(tiny.build("qwen3_moe"), tokenizer()) as model:
        run = model.run(TEXTS[0], read=["router_scores", "router_logits"])
    assert (scores - run["router_scores", 2]).abs().max() < 1e-6 and not copy.any()
    assert (logits - run["router_logits", 3]).abs().max() < 1e-5


@each_family
def test_gradients_are_those_of_autograd(family):
    hf = tiny.build(family)
    with moe.wrap(hf) as model:
        layer = model.layers[1]
        expert = int(model.run(IDS).routing[layer].ids[0, -1, 0])
        names = ("resid_mid", "router_logits", "gate_weights", "expert_act", "expert_out", "routed_out", "resid_post")
        run = model.run(IDS, read=[moe.select(name, layers=layer) for name in names], grad=True)
        expected = torch.autograd.grad(run.logits[:, -1].square().sum(), [run[name, layer] for name in names])
        slots = run.routing[layer].ids == expert
    lm = NNsight(hf)
    with trace_points(lm) as points, lm.trace(input_ids=IDS, use_cache=False):
        at = points.layers[layer]
        read = [at.resid_mid, at.router_logits, at.gate_weights, at.expert_act, at.expert_out, at.routed_out]
        read.append(at.resid_post)
        loss = lm.output.logits[:, -1].square().sum()
        with loss.backward():
            found = [value.grad.clone() for value in reversed(read)]
            found.save()
    for name, one, other in zip(names, reversed(found), expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name
    with trace_points(lm) as points, lm.trace(input_ids=IDS, use_cache=False):
        out = points.layers[layer].expert(expert).out
        loss = lm.output.logits[:, -1].square().sum()
        with loss.backward():
            own = out.grad.save()
    of_expert = expected[names.index("expert_out")].masked_fill(~slots[..., None], 0).sum(2)
    assert of_expert.abs().max() > 0
    assert (own - of_expert).abs().max() <= 1e-5 * of_expert.abs().max()


@pytest.mark.parametrize("door", ["away"], indirect=True)
def test_generations_of_several_for_a_text_are_refused_where_rows_cannot_be_told(door):
    lm, options = door("olmoe")
    points = trace_points(lm)
    for more in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        refused = pytest.raises(Exception, match=f"texts cannot be told apart.*got {next(iter(more))}=2")
        with refused, lm.generate(TEXTS[0], max_new_tokens=2, **more, **options):
            points.layers[1].gate_weights.save()


@both_doors
def test_values_flow_from_trace_to_trace_of_a_session(door):
    lm, options = door("qwen3_moe")
    points = trace_points(lm)
    layer = describe(lm._module).moe_layers[0]
    text = TEXTS[0]
    with lm.session(**options):
        with lm.trace(text, use_cache=False):
            there = points.layers[layer].routed_out.clone()
        with lm.trace(text[::-1], use_cache=False):
            points.layers[layer].routed_out = there
            moved = points.layers[layer].moe_out.clone().save()
    with moe.wrap(tiny.build("qwen3_moe"), tokenizer()) as model:
        first = model.run(text, read=moe.select("moe_out", layers=layer))
        second = model.run(text[::-1], read=moe.select("moe_out", layers=layer))
    assert torch.equal(moved, first["moe_out", layer]) and not torch.equal(moved, second["moe_out", layer])


@each_family
def test_stock_modules_are_exact_in_bfloat16(family):
    hf = tiny.build(family, dtype=torch.bfloat16)
    spec = describe(hf)
    layer = spec.moe_layers[1]
    with moe.wrap(hf) as model:
        run = model.run(IDS, read=["expert_out", "expert_act"])
        expert = int(run.routing[layer].ids[0, -1, 0])
        edited = model.run(IDS, edit=moe.scale(layer=layer, expert=expert, by=2.0)).logits
    lm = NNsight(hf)
    points = stock_points(lm, reached(spec))
    with torch.no_grad(), lm.trace(input_ids=IDS, use_cache=False):
        for number in spec.moe_layers:
            points.layers[number].expert_act = points.layers[number].expert_act.clone()
            points.layers[number].expert_out = points.layers[number].expert_out.clone()
        same = lm.output.logits.save()
    with torch.no_grad(), lm.trace(input_ids=IDS, use_cache=False):
        act = points.layers[layer].expert_act.clone().save()
        out = points.layers[layer].expert_out.clone().save()
        points.layers[layer].expert(expert).out *= 2.0
        logits = lm.output.logits.save()
    assert torch.equal(same, run.logits)
    assert torch.equal(out, run["expert_out", layer]) and torch.equal(act, run["expert_act", layer])
    assert not torch.equal(edited, run.logits) and torch.equal(logits, edited)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["gpt_oss", "olmoe"])
def test_neurons_are_met_in_every_implementation_of_experts(family, implementation):
    hf = tiny.build(family)
    with moe.wrap(hf) as model:
        layer = model.layers[0]
        run = model.run(IDS, read="expert_act")
        edited = model.run(IDS, edit=moe.apply("expert_act", lambda act: act * 1.5, layers=layer)).logits
    hf.set_experts_implementation(implementation)
    lm = NNsight(hf)
    points = stock_points(lm, reached(describe(hf)))
    with torch.no_grad(), lm.trace(input_ids=IDS, use_cache=False):
        act = points.layers[layer].expert_act.clone().save()
        points.layers[layer].expert_act *= 1.5
        logits = lm.output.logits.save()
    assert (act - run["expert_act", layer]).abs().max() <= 1e-5
    assert (logits - edited).abs().max() <= 1e-5 * edited.abs().max()


@both_doors
@each_family
def test_points_can_be_read_in_the_order_in_which_a_layer_prints_them(door, family):
    lm, options = door(family)
    points = trace_points(lm)
    spec = describe(lm._module)
    layer = spec.moe_layers[-1]
    names = points.layers[layer].names
    assert set(names) == {name for name in spec.layers[layer].sites if name in POINTS}
    if options and isinstance(spec.layers[layer].sites.get("shared_out"), GatedOutput):
        names = tuple(name for name in names if name != "shared_out")  # on a server it is asked for before the experts
    with lm.trace(TEXTS[0], use_cache=False, **options):
        found = nnsight.save([getattr(points.layers[layer], name).clone() for name in names])
    with moe.wrap(tiny.build(family), tokenizer()) as model:
        run = model.run(TEXTS[0], read=[moe.select(name, layers=layer) for name in names])
    for name, value in zip(names, found, strict=True):
        expected = run[name, layer]
        assert (value - expected).abs().max() <= 1e-5 * expected.abs().max(), name


# Where the order is not that of the table of points, and some where it is.
ORDERS = ["afmoe", "diffusion_gemma", "ernie4_5_moe", "gemma4_text", "granitemoeshared", "hunyuan_v1_moe", "laguna"]
ORDERS += ["longcat_flash", "minimax_m3_vl_text", "cohere2_moe", "llama4_text", "nemotron_h", "zaya"]


@pytest.mark.parametrize(
    "model_type", [*ORDERS, *(pytest.param(one, marks=pytest.mark.slow) for one in TYPES if one not in ORDERS)]
)
def test_the_order_of_a_layer_is_that_of_its_forward_pass(model_type):
    hf = build_type(model_type)
    with moe.wrap(hf) as model:
        met: list[tuple[int, str]] = []
        for layer in model.spec.layers:
            for name in layer.sites:
                if name in POINTS:
                    point = model._host.point(name, layer.index)
                    point.register_forward_hook(lambda *_, at=(layer.index, name): met.append(at))
        crossed = {"decoder_input_ids": IDS} if model.spec.kind == "encoder-decoder" else {}
        model.run({"input_ids": IDS, **crossed})
        passed = {layer for layer, _ in met}
        assert passed >= set(model.layers)
        lm = NNsight(hf)
        for layer in passed:
            own = [name for index, name in met if index == layer]
            assert tuple(own) == trace_points(lm).layers[layer].names


def test_layers_and_errors_tell_points_and_their_order():
    lm = TransformersModel(tiny.build("deepseek_v3"), tokenizer=tokenizer())
    points = trace_points(lm)
    order = "resid_pre, attn_out, resid_mid, moe_in, router_logits, router_scores, expert_ids, gate_weights, expert_act"
    order += ", expert_out, routed_out, shared_out, moe_out, resid_post"
    assert repr(points.layers[0]) == "layer 0 (dense): resid_pre, attn_out, resid_mid, mlp_out, resid_post"
    assert repr(points.layers[2]) == f"layer 2 (8 experts, top 3): {order}"
    assert repr(points.layers) == "4 layers, of them with experts: 1 to 3"
    assert repr(points).split("\n") == [
        "points of deepseek_v3: .embed and .layers[0] to .layers[3], with experts at 1 to 3",
        "print(points.layers[1]) lists the points of a layer in the order to read them in",
    ]
    assert repr(points.layers[2].expert(3)) == "expert(3) of layer 2: out, act, weight, used"
    for late in (
        lambda: points.layers[2].moe_in,
        lambda: points.layers[2].expert(0).out,
        lambda: setattr(points.layers[2], "moe_in", 0),
        lambda: setattr(points.layers[2].expert(0), "act", 0),
    ):
        told = f"already ran past it. Points come in this order, layer 2 .*: {order}"
        with pytest.raises(OutOfOrderError, match=told), lm.trace(TEXTS[0]):
            points.layers[2].resid_post.save()
            late()


@each_family
def test_traces_show_what_standing_edits_made_of_every_point(family):
    lm = TransformersModel(tiny.build(family), tokenizer=tokenizer())
    with moe.wrap(lm) as model, trace_points(lm) as points, torch.no_grad():
        layer = model.layers[1]
        for name in (name for name in model.points if POINTS[name].editable):
            where = None if name == "embed" else min(model.spec.layers_of(name), key=lambda one: abs(one - layer))
            edit = moe.apply(name, partial(change, name), layers=where)
            expected = model.run(IDS, edit=edit, read=moe.select(name, layers=where))
            with model.edit(edit), lm.trace(input_ids=IDS, use_cache=False):
                at = points if where is None else points.layers[where]
                value = getattr(at, name).clone().save()
                logits = lm.output.logits.save()
            assert torch.equal(value, expected[name, where]), name
            assert torch.equal(logits, expected.logits), name


def test_points_and_nnsight_own_places_in_one_trace():
    hf = tiny.build("mixtral")
    lm = NNsight(hf)
    points = trace_points(lm)
    with lm.trace(input_ids=IDS, use_cache=False):
        given = lm.model.layers[1].mlp.gate.input.clone().save()
        logits = points.layers[1].router_logits.clone().save()
        returned = lm.model.layers[1].mlp.gate.output[0].clone().save()
        out = points.layers[1].expert_out.clone().save()
        block = lm.model.layers[1].mlp.output.clone().save()
    with moe.wrap(hf) as model:
        run = model.run(IDS, read=["moe_in", "router_logits", "expert_out", "moe_out"])
    assert torch.equal(given.view(2, 9, -1), run["moe_in", 1])
    assert torch.equal(logits, run["router_logits", 1]) and torch.equal(returned.view(2, 9, -1), logits)
    assert torch.equal(out, run["expert_out", 1]) and torch.equal(block, run["moe_out", 1])


def test_a_closed_model_is_plain_again():
    hf = tiny.build("deepseek_v3")
    keys, before = [*hf.state_dict()], hf(IDS).logits
    lm = NNsight(hf)
    config = hf.model.layers[2].mlp.experts.config
    with trace_points(lm) as points:
        with lm.trace(input_ids=IDS, use_cache=False):
            points.layers[2].expert(0).out[:] = 1.0
        assert hf.model.layers[2].mlp.experts.config is not config
    assert [*hf.state_dict()] == keys and hf.model.layers[2].mlp.experts.config is config
    assert not any("moe_points" in name for name, _ in hf.named_modules())
    assert torch.equal(hf(IDS).logits, before)
    with lm.trace(input_ids=IDS, use_cache=False):
        logits = lm.output.logits.save()
    assert torch.equal(logits, before)


def test_a_model_that_is_open_already_is_left_open():
    hf = tiny.build("olmoe")
    with moe.wrap(hf) as model:
        lm = NNsight(hf)
        with trace_points(lm) as points, lm.trace(input_ids=IDS, use_cache=False):
            out = points.layers[1].expert_out.clone().save()
        assert torch.equal(model.run(IDS, read="expert_out")["expert_out", 1], out)
        assert not any(point.watchers for layer in hf.model.layers for point in layer.moe_points.values())


def test_a_block_that_is_replaced_is_seen_by_nnsight():
    from tests.tiny_types import build

    hf = build("llama4_text")
    with moe.wrap(hf) as model:
        layer = model.layers[0]
        run = model.run(IDS % 60, read=["expert_out", "moe_out"])
    lm = NNsight(hf)
    with trace_points(lm) as points, lm.trace(input_ids=IDS % 60, use_cache=False):
        out = points.layers[layer].expert_out.clone().save()
        block = lm.get(describe(hf).layers[layer].moe.block).output[0].clone().save()
    assert torch.equal(out, run["expert_out", layer])
    assert torch.equal(block.view_as(run["moe_out", layer]), run["moe_out", layer])


@pytest.mark.parametrize(
    "use, error, text",
    [
        (lambda points: points.layers[9], UnknownName, "unknown layer 9: expected a layer from 0 to 3"),
        (lambda points: points.layers[1].expert(1), UnknownName, "layer 1 has no experts"),
        (lambda points: points.layers[2].expert(8), UnknownName, "unknown expert 8 at layer 2: expected an expert"),
        (lambda points: points.layers[2].heaviest(3), BadInput, "no such rank: expected one from 0 to 2"),
        (lambda points: points.layers[2].expert_outs, UnknownName, "no point 'expert_outs' of a layer.*of layer 2"),
        (lambda points: points.layers[1].moe_ins, UnknownName, "no point 'moe_ins' of a layer.*of layer 1, .*mlp_out"),
        (lambda points: points.layers[2].expert(1).output, UnknownName, "no 'output' of an expert: expected out, act"),
        (lambda points: setattr(points.layers[2].expert(1), "outs", 0), UnknownName, "no 'outs' of an expert"),
        (lambda points: points.layers[2].embed, UnknownName, "no point 'embed' of a layer"),
        (lambda points: setattr(points.layers[2], "gate_weight", 0), UnknownName, "no point 'gate_weight'"),
        (lambda points: setattr(points.layers[2], "router_scores", IDS), BadInput, "cannot be edited"),
        (lambda points: points.layers[1].gate_weights, UnknownName, "no point 'gate_weights' at layer 1"),
        (lambda points: points.layers[2].gate_weights, ValueError, "outside of interleaving"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(use, error, text):
    with trace_points(NNsight(tiny.build("qwen2_moe"))) as points, pytest.raises(error, match=text):
        use(points)


def test_only_whole_nnsight_models_have_points():
    hf = tiny.build("olmoe")
    with pytest.raises(BadInput, match="not an nnsight model.*moe.wrap"):
        trace_points(hf)
    lm = NNsight(hf)
    with pytest.raises(moe.MoEError, match="points of a part of a model"):
        trace_points(lm.model)


def test_names_in_order_and_numbers_in_short():
    names = ("selected_ids", "moe_out", "shared_out", "router_logits", "moe_in")
    assert in_order(names, {}) == ("moe_in", "router_logits", "shared_out", "moe_out", "selected_ids")
    assert in_order(names, {"shared_out": "router_logits"})[:3] == ("moe_in", "shared_out", "router_logits")
    assert in_order(("moe_in", "moe_out"), {"shared_out": "moe_in", "moe_in": "expert_ids"}) == ("moe_in", "moe_out")
    assert ranges([]) == "" and ranges([3]) == "3" and ranges([0, 1]) == "0, 1"
    assert ranges([0, 2, 3, 4, 7, 8]) == "0, 2 to 4, 7, 8"
