"""Leaving a model as it was found, whatever happens in between."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import moe_interp as moe
from moe_interp.errors import BadInput
from tests.tiny import FAMILIES, build
from tests.tiny_types import build as build_type

IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(5))


def logits(hf) -> torch.Tensor:
    with torch.no_grad():
        return hf(input_ids=IDS, use_cache=False).logits


def traces(hf: nn.Module) -> dict[str, object]:
    """Everything that instrumenting could leave behind."""
    modules = dict(hf.named_modules())
    return {
        "modules": list(modules),
        "state": list(hf.state_dict()),
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "configs": {name: id(m.config) for name, m in modules.items() if hasattr(m, "config")},
        "implementation": hf.get_experts_implementation(),
        "top_k": {name: m.top_k for name, m in modules.items() if hasattr(m, "top_k")},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_normally_restores_everything(family):
    hf = build(family)
    before, plain = traces(hf), logits(hf)
    with moe.wrap(hf) as model:
        assert traces(hf) != before
        model.run(IDS, read=list(model.points), edit=[moe.ablate(layer=2, expert=1), moe.top_k(4)])
        assert list(hf.state_dict()) == before["state"]
    assert traces(hf) == before
    assert torch.equal(logits(hf), plain)


def test_an_exception_inside_the_block_or_an_edit_restores_everything():
    hf = build("qwen2_moe")
    before, plain = traces(hf), logits(hf)

    def fail(value):
        raise RuntimeError("inside an edit")

    with pytest.raises(RuntimeError, match="inside an edit"), moe.wrap(hf) as model:
        instrumented = traces(hf)
        for point in ("router_logits", "expert_out", "shared_out", "resid_mid"):
            with pytest.raises(RuntimeError, match="inside an edit"):
                model.run(IDS, edit=[moe.top_k(6), moe.apply(point, fail, layers=2)])
            assert traces(hf) == instrumented
            assert torch.equal(model.run(IDS).logits, plain)
        model.run(IDS, edit=moe.apply("embed", fail))
    assert traces(hf) == before
    assert torch.equal(logits(hf), plain)


def test_wrapping_twice_is_undone_by_the_last_to_close():
    hf = build("olmoe")
    before = traces(hf)
    outer = moe.wrap(hf)
    with moe.wrap(hf) as inner:
        assert torch.equal(inner.run(IDS).logits, outer.run(IDS).logits)
        assert inner.spec is outer.spec  # which the hooks that are there were made by
    assert outer.run(IDS, read="expert_out")["expert_out", 0].abs().sum() > 0
    outer.close()
    outer.close()
    assert traces(hf) == before
    with pytest.raises(moe.MoEError, match="the model is closed"):
        outer.run(IDS)


def test_two_models_that_share_a_config_do_not_reach_each_other():
    first = build("mixtral", seed=0)
    second = copy.deepcopy(build("mixtral", seed=1))
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config
    plain = logits(second)
    untouched = traces(second)
    with moe.wrap(first) as one:
        assert traces(second) == untouched
        with moe.wrap(second) as two:
            one.run(IDS, edit=moe.ablate(layer=0, expert=0))
            assert torch.equal(two.run(IDS).logits, plain)
            edited = two.run(IDS, edit=moe.ablate(layer=0, expert=0)).logits
        assert traces(second) == untouched
        assert torch.equal(logits(second), plain)
        assert not torch.equal(edited, plain)
        assert one.run(IDS, read="expert_out")["expert_out", 0].abs().sum() > 0


@pytest.mark.parametrize("made", [copy.deepcopy, pickle.dumps, lambda hf: torch.save(hf, io.BytesIO())])
@pytest.mark.parametrize("family", ["olmoe", "dbrx"])
def test_an_opened_model_is_neither_copied_nor_pickled(family, made, tmp_path):
    hf = build(family) if family in FAMILIES else build_type(family)
    before = traces(hf)
    with moe.wrap(hf) as model:
        opened = traces(hf)
        for whole in (hf, nn.ModuleDict({"inner": hf})):
            with pytest.raises(BadInput, match="an opened model cannot be copied or pickled.*Close it first"):
                made(whole)
        for part in (model, hf.get_submodule(model.spec.layers[2].path)):
            with pytest.raises(BadInput, match="an opened model cannot be copied or pickled.*Close it first"):
                copy.deepcopy(part)
        assert traces(hf) == opened
        state = copy.deepcopy(hf.state_dict())
        hf.save_pretrained(tmp_path)
    assert traces(hf) == before
    made(hf)
    with moe.load(tmp_path) as again:
        assert all(torch.equal(value, again.hf.state_dict()[name]) for name, value in state.items())


def test_a_copy_of_an_opened_model_is_refused():
    hf = build("olmoe")
    with moe.wrap(hf), pytest.raises(moe.MoEError, match="a copy of an opened model cannot be opened"):
        moe.wrap(hf._replicate_for_data_parallel())
    with moe.wrap(copy.deepcopy(hf)) as model:
        assert torch.equal(model.run(IDS).logits, logits(hf))


def test_edits_are_refused_while_the_model_is_plain():
    with moe.wrap(build("olmoe")) as model:
        with model.plain(), pytest.raises(moe.MoEError, match="the model is plain"):
            model.generate(IDS, edit=moe.ablate(layer=0, expert=0))
        assert model.run(IDS, edit=moe.ablate(layer=0, expert=0)).touched[0] > 0


def test_nothing_acts_on_a_plain_model_however_often_it_is_made_plain():
    hf = build("olmoe")
    before, expected, double = traces(hf), logits(hf), moe.apply("resid_mid", lambda value: value * 2, layers=0)
    with moe.wrap(hf) as model, moe.wrap(hf) as other, model.edit(double) as standing:
        seen, opened = [], traces(hf)
        handle = hf.model.layers[0].moe_points.resid_mid.register_forward_hook(lambda *args: seen.append(args))
        edited = logits(hf)
        assert len(seen) == 1 and standing.touched == [16] and not torch.equal(edited, expected)
        with model.plain():
            with model.plain(), other.plain():
                assert torch.equal(logits(hf), expected)
            assert torch.equal(logits(hf), expected)
            with pytest.raises(moe.MoEError, match="the model is plain"):
                model.audit()
        assert len(seen) == 1 and standing.touched == [16]
        assert torch.equal(logits(hf), edited) and len(seen) == 2
        handle.remove()
        assert traces(hf) == opened
    assert traces(hf) == before


def test_a_model_that_is_closed_while_it_is_plain_stays_closed():
    hf = build("olmoe")
    before, model = traces(hf), moe.wrap(hf)
    with model.plain():
        model.close()
        assert traces(hf) == before
    assert traces(hf) == before
    model = moe.wrap(hf)
    with model.plain():
        model.close()
        again = moe.wrap(hf)
    with again:
        assert again.run(IDS, edit=moe.scale(layer=0, expert=None, by=0.5)).touched[0] > 0
    assert traces(hf) == before


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_a_model_whose_layers_were_cut_while_it_was_open_closes_and_opens_again(family):
    hf, other = build(family), build(family)
    layers = hf.model.layers
    model = moe.wrap(hf)
    hf.model.layers = layers[:2]
    model.close()
    other.model.layers = other.model.layers[:2]
    assert traces(hf)["hooks"] == traces(other)["hooks"] and traces(hf)["attributes"] == traces(other)["attributes"]
    assert all(not hasattr(module, "moe_points") for layer in layers for module in layer.modules())
    hf.model.layers = layers
    with moe.wrap(hf) as model:
        assert model.run(IDS, edit=moe.scale(layer=3, expert=None, by=0.5)).touched == (48,)


def test_nothing_works_on_a_closed_model():
    hf = build("olmoe")
    before, model = traces(hf), moe.wrap(hf)
    model.close()
    calls = [
        lambda: model.plain().__enter__(),
        lambda: model.audit(),
        lambda: model.decode(torch.ones(64)),
        lambda: model.experts(0),
    ]
    for call in calls:
        with pytest.raises(moe.MoEError, match="the model is closed"):
            call()
    assert traces(hf) == before


def test_gradients_reach_points_of_frozen_models():
    hf = build("olmoe").requires_grad_(False)
    with moe.wrap(hf) as model:
        run = model.run(IDS, read=["resid_mid", "expert_out"], grad=True)
        for point in ("resid_mid", "expert_out"):
            (gradient,) = torch.autograd.grad(run.logits.sum(), run[point, 2], retain_graph=True)
            assert gradient.abs().max() > 0


def test_a_run_without_output_unembeds_the_last_tokens_alone():
    hf, seen = build("olmoe"), []
    hf.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    with moe.wrap(hf) as model:
        read = [*(set(model.points) - {"resid_post"}), moe.select("resid_post", top=3)]
        whole, some = (model.run(IDS, read=read, output=output) for output in (True, False))
        model.run({"input_ids": IDS, "labels": IDS}, output=False)
    vocabulary = hf.config.vocab_size
    assert [shape for shape in seen if len(shape) == 3] == [(2, 8, vocabulary), (2, 1, vocabulary), (2, 8, vocabulary)]
    assert whole.values.keys() == some.values.keys()
    for key, value in whole.values.items():
        assert torch.equal(value, some.values[key]), key
    assert whole.tops.keys() == some.tops.keys()
    for key, top in whole.tops.items():
        assert all(torch.equal(mine, its) for mine, its in zip(top, some.tops[key], strict=True)), key


def test_an_edit_may_decode_a_whole_batch_in_a_run_without_output():
    shapes = []
    with moe.wrap(build("olmoe")) as model:
        look = moe.apply("resid_post", lambda value: shapes.append(model.decode(value).shape) or value, layers=1)
        model.run(IDS, edit=look, output=False)
        sizes = [model.decode(torch.ones(*places, 64)).shape for places in ((), (0,), (3, 0, 2))]
    assert shapes == [(2, 8, 96)] and sizes == [(96,), (0, 96), (3, 0, 2, 96)]


def test_plain_hooks_see_the_points():
    hf = build("olmoe")
    with moe.wrap(hf) as model:
        seen = []
        handle = hf.model.layers[1].moe_points.expert_out.register_forward_hook(lambda m, a, out: seen.append(out))
        run = model.run(IDS, read="expert_out")
        handle.remove()
    assert torch.equal(seen[0], run["expert_out", 1])


def test_experts_run_any_input_and_weights_are_those_that_ran():
    hf = build("gpt_oss")
    with moe.wrap(hf) as model:
        run = model.run(IDS, read=["moe_in", "expert_out", "expert_act"])
        again = model.experts(2)(run["moe_in", 2], run.routing[2].ids)
        assert torch.equal(again, run["expert_out", 2])
        other = model.experts(2)(run["moe_in", 2][0], torch.full((8, 1), 5))[:, 0]
        weights = model.weights(2, 5)
        x = run["moe_in", 2][0]
        gate = (x @ weights.gate.T + weights.gate_bias).clamp(max=1.5)
        up = (x @ weights.up.T + weights.up_bias).clamp(-1.5, 1.5)
        act = (up + 1) * gate * torch.sigmoid(gate * 1.3)
        assert torch.allclose(act @ weights.down.T + weights.down_bias, other, atol=1e-5)


def test_an_expert_in_several_slots_has_one_output():
    with moe.wrap(build("olmoe")) as model:
        run = model.run(IDS, read="expert_out", edit=moe.apply("expert_ids", lambda ids: ids * 0 + 3, layers=2))
    values, used = run.expert(2, 3)
    assert used.all()
    assert torch.equal(values, run["expert_out", 2][:, :, 0])


def test_expert_values_by_id_and_by_rank():
    hf = build("deepseek_v3")
    with moe.wrap(hf) as model:
        run = model.run(IDS, read="expert_out")
    ids, weights, outputs = run.routing[2].ids, run.routing[2].weights, run["expert_out", 2]
    values, used = run.expert(2, 3)
    heaviest = run.heaviest(2)
    lightest = run.heaviest(2, rank=2)
    assert used.any() and not used.all()
    for b in range(2):
        for s in range(8):
            slots = [k for k in range(3) if ids[b, s, k] == 3]
            assert used[b, s] == bool(slots)
            assert torch.equal(values[b, s], outputs[b, s, slots[0]] if slots else torch.zeros(64))
            assert torch.equal(heaviest[b, s], outputs[b, s, weights[b, s].argmax()])
            assert torch.equal(lightest[b, s], outputs[b, s, weights[b, s].argmin()])


def test_gradients_of_layers_that_are_computed_anew():
    edits = [moe.scale(layer=1, expert=2, by=0.3), moe.steer(torch.ones(64), layer=2, point="resid_mid")]

    def slopes(hf: nn.Module) -> torch.Tensor:
        hf.zero_grad()
        with moe.wrap(hf) as model, model.edit(edits):
            hf(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        return hf.get_input_embeddings().weight.grad.clone()

    hf = build("olmoe").train()
    expected = slopes(hf)
    for reentrant in (False, True):
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.testing.assert_close(slopes(hf), expected)
        with (
            moe.wrap(hf) as model,
            pytest.raises(BadInput, match="gradients would be wrong.*gradient checkpointing"),
        ):
            model.run(IDS, edit=edits, grad=True)
        hf.eval()
        with moe.wrap(hf) as model:
            assert model.run(IDS, edit=edits, grad=True).logits.requires_grad
        hf.train()
