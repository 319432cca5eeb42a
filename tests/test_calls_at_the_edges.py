"""Edges of what belongs to a call: shared and exchanged modules, callbacks, caches cut by hand, closed models."""

import copy
import threading

import pytest
import torch
from nnsight import NNsight
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

import moe_interp as moe
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.hosts.hooked import trace_points
from tests.tiny import build

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(7))
EDIT = moe.scale(layer=2, expert=None, by=0.0)
LAST = moe.steer(torch.ones(64), layer=2, point="resid_mid", positions=[-1])


@pytest.mark.parametrize("part", ["experts", "gate"])
def test_a_mixture_that_two_models_or_two_layers_share_is_refused_and_left_as_it_was(part):
    one, other = build("mixtral"), build("mixtral", seed=1)
    for mine, theirs in zip(one.model.layers, other.model.layers, strict=True):
        setattr(theirs.mlp, part, getattr(mine.mlp, part))
    expected = one(IDS).logits, other(IDS).logits
    with moe.wrap(one), pytest.raises(UnsupportedModel, match=f"shared.*mlp.{part}, which is also in an opened model"):
        moe.wrap(other)
    assert torch.equal(one(IDS).logits, expected[0]) and torch.equal(other(IDS).logits, expected[1])
    moe.wrap(other).close()
    setattr(one.model.layers[2].mlp, part, getattr(one.model.layers[1].mlp, part))
    with pytest.raises(UnsupportedModel, match=f"layers.2.mlp.{part}, which is also in layer 1"):
        moe.wrap(one)


@pytest.mark.parametrize("path", ["experts", "gate"])
def test_an_edit_where_a_module_was_exchanged_since_is_refused(path):
    with moe.wrap(build("mixtral")) as model:
        setattr(model.hf.model.layers[2].mlp, path, copy.deepcopy(getattr(build("mixtral").model.layers[2].mlp, path)))
        for use in (lambda: model.run(IDS, edit=EDIT), lambda: model.edit(EDIT)):
            with pytest.raises(BadInput, match=f"layers.2.mlp.{path} is not as it was when the model was opened"):
                use()
        assert model.run(IDS, edit=moe.scale(layer=1, expert=None, by=0.0)).touched[0] > 0


def test_a_router_that_was_compiled_since_is_refused():
    with moe.wrap(build("mixtral")) as model:
        model.hf.model.layers[2].mlp.gate.compile(backend="eager")
        with pytest.raises(BadInput, match="got a compiled one, which passes points by"):
            model.run(IDS, edit=moe.bias(layer=2, expert=1, by=3.0, on="logits"))


def test_a_model_that_is_closed_while_it_runs_says_so():
    model = moe.wrap(build("mixtral"))

    def close(value):
        thread = threading.Thread(target=model.close)
        thread.start()
        thread.join()
        return value

    with pytest.raises(BadInput, match="the model was closed while it ran"):
        model.run(IDS, edit=moe.apply("resid_mid", close, layers=1))


def test_a_generation_inside_a_generation_has_what_stands_alone():
    hf = build("olmoe")
    options = {"max_new_tokens": 2, "do_sample": False}
    plain = hf.generate(IDS, **options)
    found = []

    def processor(ids, scores):
        found.append(hf.generate(IDS, **options))
        return scores

    with moe.wrap(hf) as model:
        alone = model.generate(IDS, edit=EDIT, **options)
        got = model.generate(IDS, edit=EDIT, logits_processor=LogitsProcessorList([processor]), **options)
    assert torch.equal(got, alone) and not torch.equal(alone, plain)
    assert found and all(torch.equal(one, plain) for one in found)


def test_a_run_in_the_block_of_a_trace_has_the_edits_that_stand():
    hf = build("mixtral")
    lm = NNsight(hf)
    points, others = trace_points(lm), trace_points(lm)
    with moe.wrap(hf) as model:
        edited, plain = model.run(IDS, edit=EDIT).logits, model.run(IDS).logits
        others.close()  # the first ones' trace is kept apart all the same
        with model.edit(EDIT), lm.trace(IDS):
            points.layers[0].resid_post.clone()
            run = model.run(IDS).logits.save()
            traced = lm.output.logits.save()
    assert torch.equal(run, edited) and torch.equal(traced, edited) and not torch.equal(edited, plain)


def test_texts_that_share_a_row_by_their_positions_are_refused():
    packed = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])}
    with moe.wrap(build("olmoe")) as model, pytest.raises(UnsupportedModel, match="position_ids that start again"):
        model.run(packed)


@pytest.mark.parametrize("where", ["argument", "config", "model", "direct"])
def test_steps_of_several_tokens_are_found_wherever_they_are_asked_for(where):
    hf = build("olmoe")
    options = {"max_new_tokens": 2, "do_sample": False}
    if where == "model":
        hf.generation_config.prefill_chunk_size = 4
    if where == "config":
        options["generation_config"] = GenerationConfig(prefill_chunk_size=4, pad_token_id=0)
    if where in ("argument", "direct"):
        options["prefill_chunk_size"] = 4
    with (
        moe.wrap(hf) as model,
        pytest.raises(BadInput, match="newest token of a step is not.*prefill_chunk_size"),
    ):
        if where == "direct":
            with model.edit(LAST):
                hf.generate(IDS, **options)
        else:
            model.generate(IDS, edit=LAST, **options)


def test_edits_of_a_guided_generation_are_refused_and_standing_ones_are_not():
    options = {"max_new_tokens": 2, "do_sample": False, "guidance_scale": 2.0}
    with moe.wrap(build("olmoe")) as model:
        with pytest.raises(BadInput, match="passes without the prompt that guidance makes.*got guidance_scale=2.0"):
            model.generate(IDS, edit=EDIT, **options)
        with model.edit(EDIT):
            assert model.generate(IDS, **options).shape == (2, 11)


def test_a_cache_that_was_cut_and_filled_without_edits_is_still_known():
    hf = build("olmoe")
    edit = moe.randomize(layer=2, seed=3)
    cache = DynamicCache()
    a, x, t = IDS[:1, :6], IDS[1:, :2], IDS[1:, 2:4]
    with moe.wrap(hf) as model, torch.no_grad():
        whole = model.run(torch.cat([a[:, :4], x, t], dim=1), edit=edit).routing[2].ids[:, -2:]
        with model.edit(edit):
            hf(input_ids=a, past_key_values=cache, use_cache=True)
        cache.crop(-2)
        hf(input_ids=x, past_key_values=cache, use_cache=True)
        for one in (copy.deepcopy(cache), cache):
            run = model.run({"input_ids": t, "past_key_values": one, "use_cache": True}, edit=edit)
            assert torch.equal(run.routing[2].ids, whole)


def test_copies_of_a_cache_move_their_own_rows():
    hf = build("olmoe")
    with moe.wrap(hf) as model, model.edit(moe.randomize(layer=2, seed=3)), torch.no_grad():
        hf(input_ids=IDS, past_key_values=(cache := DynamicCache()), use_cache=True)
    other = copy.copy(cache)
    other.layers = copy.deepcopy(cache.layers)
    other.batch_select_indices(torch.tensor([1]))
    assert type(cache).__name__ == "DynamicCache" and cache.get_seq_length() == 9
    assert len(vars(other)["_moe_interp_read"]) == 1 and len(vars(cache)["_moe_interp_read"]) == 2


def test_an_edit_may_stand_again_but_not_twice_at_once():
    with moe.wrap(build("olmoe")) as model:
        expected, plain = model.run(IDS, edit=EDIT).logits, model.run(IDS).logits
        edit = model.edit(EDIT)
        for _ in range(2):
            with edit as standing:
                assert torch.equal(model.run(IDS).logits, expected)
                assert repr(standing).startswith("Standing edits: Scale(")
            assert torch.equal(model.run(IDS).logits, plain)
        with edit, pytest.raises(BadInput, match="an edit that stands already"):
            edit.__enter__()
        assert torch.equal(model.run(IDS).logits, plain)


def test_replicas_of_an_opened_model_are_refused():
    with (
        moe.wrap(build("olmoe")) as model,
        pytest.raises(UnsupportedModel, match="an opened model in .*DataParallel"),
    ):
        [module._replicate_for_data_parallel() for module in model.hf.modules()]


def test_a_linear_map_in_a_hook_on_a_router_is_not_the_routers():
    hf = build("mixtral")
    edit = moe.bias(layer=2, expert=2, by=3.0, on="logits")
    with moe.wrap(hf) as model:
        expected = model.run(IDS, edit=edit, read="router_logits")
        probe = torch.ones(3, 64)
        hf.model.layers[2].mlp.gate.register_forward_pre_hook(
            lambda module, args: (torch.nn.functional.linear(args[0], probe), None)[1]
        )
        got = model.run(IDS, edit=edit, read="router_logits")
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got["router_logits", 2], expected["router_logits", 2])
