"""The TransformerLens door: the same values, edits and gradients as through the local host, and its traps."""

import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pandas
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformer_lens import patching

import moe_interp as moe
from moe_interp.errors import UnknownName
from moe_interp.points import POINTS
from tests import tiny_types
from tests.bridges import bridge, bridged, plain
from tests.edits import change, one_of_each_point
from tests.tiny import FAMILIES, build

IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(5))
SHARED = ("qwen2_moe", "deepseek_v2", "deepseek_v3")
LAYER = 2  # a MoE layer in every tiny model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@cache
def tiny(family: str) -> Any:
    lens = bridge(family)
    lens.run_with_cache(IDS)  # both libraries leave hooks of their own at the first pass
    return lens


@cache
def reference(family: str) -> moe.Run:
    with moe.wrap(plain(family)) as model:
        return model.run(IDS, read=list(model.points))


def error(got: Tensor, expected: Tensor) -> float:
    return ((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def bound(family: str) -> float:
    """TransformerLens computes the latent attention of deepseek_v2 in an order of its own; all else is bit-equal."""
    return 3e-6 if family == "deepseek_v2" else 0.0


def edit_of(point: str, layer: int | None) -> moe.Intervention:
    return moe.apply(point, lambda value: change(point, value), layers=layer)


@torch.no_grad()
def run_with(lens: Any, name: str, fn: Callable[[Tensor], Tensor], *, in_place: bool = False) -> Tensor:
    def hook(value: Tensor, hook: Any) -> Tensor | None:
        if not in_place:
            return fn(value)
        value.copy_(fn(value))
        return None

    return lens.run_with_hooks(IDS, fwd_hooks=[(name, hook)])


# The same answer


def test_the_bound_of_deepseek_v2_is_what_its_bridge_does_alone():
    with torch.no_grad():
        alone = error(tiny("deepseek_v2")(IDS), reference("deepseek_v2").logits)
    assert 0 < alone < bound("deepseek_v2")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_of_every_layer_has_a_hook_that_reads_the_same(family):
    lens, run = tiny(family), reference(family)
    with moe.attach(lens) as door, moe.wrap(lens) as model:
        assert set(door.hook_names) == set(run.values)
        assert {point for point, _ in run.values} >= set(POINTS) - {"mlp_out", "shared_out"}
        _, values = lens.run_with_cache(IDS)
        inside = model.run(IDS, read=list(model.points))
        for key, name in door.hook_names.items():
            assert values[name].shape == run.values[key].shape
            assert error(values[name], run.values[key]) <= bound(family), key
            assert torch.equal(values[name], inside.values[key]), key


EACH_LAYER = pytest.param(True, marks=pytest.mark.slow, id="each layer")


@pytest.mark.parametrize("everywhere", [pytest.param(False, id="one layer"), EACH_LAYER])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_every_point_does_the_same(family, everywhere):
    lens, clean = tiny(family), reference(family).logits
    with moe.attach(lens) as door, moe.wrap(plain(family)) as model:
        for point, layer in door.hook_names if everywhere else one_of_each_point(door.hook_names):
            if not POINTS[point].editable:
                continue
            expected, name = model.run(IDS, edit=edit_of(point, layer)).logits, door.hook_names[point, layer]
            assert error(expected, clean) > 1e-3
            for in_place in (False, True):
                got = run_with(lens, name, lambda value, point=point: change(point, value), in_place=in_place)
                assert error(got, expected) <= bound(family), (point, layer, in_place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attached_logits_are_those_of_the_bridge_to_the_last_bit(family, dtype):
    lens = bridge(family, dtype=dtype)
    before = lens(IDS)
    with moe.attach(lens) as door:
        assert torch.equal(lens(IDS), before)
        logits, values = lens.run_with_cache(IDS)
        assert torch.equal(logits, before)
        assert values[door.hook_names["expert_out", LAYER]].dtype == dtype
    assert torch.equal(lens(IDS), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd(family):
    lens = tiny(family)
    points = [point for point in POINTS.values() if point.differentiable and point.name in reference_points(family)]
    with moe.attach(lens) as door, moe.wrap(plain(family)) as model:
        names = door.names(*(point.name for point in points))
        _, values = lens.run_with_cache(IDS, names_filter=names, incl_bwd=True, return_type="loss")
        run = model.run(IDS, read=[point.name for point in points], grad=True)
        loss = functional.cross_entropy(run.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(run.values.values()))
        for key, gradient in zip(run.values, gradients, strict=True):
            assert gradient.abs().max() > 0
            assert error(values[door.hook_names[key] + "_grad"], gradient) < 2e-5, key
    lens.zero_grad()


def reference_points(family: str) -> set[str]:
    return {point for point, _ in reference(family).values}


def test_padding_is_shown_as_it_is():
    lens = tiny("olmoe")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with moe.attach(lens) as door, moe.wrap(plain("olmoe")) as model:
        _, values = lens.run_with_cache(IDS, attention_mask=mask, names_filter=door.names("expert_out"))
        run = model.run({"input_ids": IDS, "attention_mask": mask}, read="expert_out")
        for layer in model.layers:
            got = values["expert_out", layer]
            assert got.shape == run["expert_out", layer].shape
            assert error(got[0, 3:], run["expert_out", layer][0, 3:]) < 2e-5  # other numbers for the same positions
            assert torch.equal(got[1], run["expert_out", layer][1])


# What TransformerLens does with hooks


def test_names_that_filters_and_shorthand_find():
    lens, run = tiny("qwen3_moe"), reference("qwen3_moe")
    name = f"blocks.{LAYER}.mlp.hook_expert_out"
    with moe.attach(lens) as door:
        assert door.hook_names["expert_out", LAYER] == name
        assert lens.blocks[LAYER].mlp.hook_expert_out is lens.hook_dict[name]
        for names in (name, [name], lambda other: other.endswith("mlp.hook_expert_out")):
            _, values = lens.run_with_cache(IDS, names_filter=names)
            assert torch.equal(values[name], run["expert_out", LAYER])
        for names in (name, f"blocks.{LAYER}.hook_expert_out", door.names("expert_out")):
            _, values = lens.run_with_cache(IDS, names_filter=names)
            assert torch.equal(values["expert_out", LAYER], run["expert_out", LAYER])
        assert all("expert_out" in key for key in values)
        _, values = lens.run_with_cache(IDS)
        for point, layer in run.values:
            key = point if layer is None else (point, layer)
            assert torch.equal(values[key], run.values[point, layer]), key
        _, values = lens.run_with_cache(IDS, names_filter=door.names())
        assert set(values.keys()) >= set(door.hook_names.values())


def test_positions_and_the_batch_dim_are_sliced_on_the_right_axis():
    lens, run = tiny("olmoe"), reference("olmoe")
    with moe.attach(lens) as door:
        _, values = lens.run_with_cache(IDS, pos_slice=(2, 5))
        _, one = lens.run_with_cache(IDS[:1], remove_batch_dim=True)
        for key, name in door.hook_names.items():
            assert torch.equal(values[name], run.values[key][:, 2:5])
            assert one[name].shape == run.values[key].shape[1:]


@torch.no_grad()
def test_stop_and_start_at_layer():
    lens, run = tiny("deepseek_v3"), reference("deepseek_v3")
    with moe.attach(lens) as door:
        stopped, values = lens.run_with_cache(IDS, stop_at_layer=LAYER)
        assert torch.equal(stopped, run["resid_pre", LAYER])
        assert torch.equal(values["expert_out", 1], run["expert_out", 1])
        assert door.hook_names["expert_out", LAYER] not in values
        logits, values = lens.run_with_cache(run["resid_pre", LAYER], start_at_layer=LAYER)
        assert error(logits, run.logits) < 1e-6
        assert error(values["expert_out", LAYER], run["expert_out", LAYER]) < 1e-6
        assert door.hook_names["expert_out", 1] not in values


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("point", ["expert_out", "router_logits", "resid_mid"])
def test_generation_under_an_edit_at_every_step(point, cached):
    lens = tiny("qwen2_moe")
    options = dict(max_new_tokens=6, do_sample=False)
    with moe.wrap(plain("qwen2_moe")) as model:
        clean = model.generate(IDS, **options)
        expected = model.generate(IDS, edit=edit_of(point, LAYER), **options)
    assert not torch.equal(expected, clean)
    with moe.attach(lens) as door:
        hook = door.hook_names[point, LAYER], lambda value, hook: change(point, value)
        options = dict(options, verbose=False, use_past_kv_cache=cached, stop_at_eos=False)
        assert torch.equal(lens.generate(IDS, **options)[:, : clean.shape[1]], clean)
        with lens.hooks(fwd_hooks=[hook]):
            assert torch.equal(lens.generate(IDS, **options)[:, : expected.shape[1]], expected)


def test_hooks_stay_until_reset():
    lens = tiny("mixtral")
    with moe.attach(lens), torch.no_grad():
        clean = lens(IDS)
        lens.add_hook(f"blocks.{LAYER}.mlp.hook_routed_out", lambda value, hook: value * 0)
        edited = lens(IDS)
        assert error(edited, clean) > 1e-3
        lens.reset_hooks()
        assert torch.equal(lens(IDS), clean)
        lens.add_perma_hook(f"blocks.{LAYER}.hook_routed_out", lambda value, hook: value * 0)
        lens.reset_hooks()
        assert torch.equal(lens(IDS), edited)
    with torch.no_grad():
        assert torch.equal(lens(IDS), clean)


def test_generic_activation_patch_finds_points_and_puts_in_clean_values():
    lens, corrupted = tiny("mixtral"), IDS.flip(1)
    metric = lambda logits: logits[:, -1, 7].sum()  # noqa: E731
    with moe.attach(lens), moe.wrap(plain("mixtral")) as model:
        _, clean = lens.run_with_cache(IDS)
        found = patching.generic_activation_patch(
            lens, corrupted, clean, metric, patching.layer_pos_patch_setter, "expert_out", ("layer", "pos")
        )
        values = reference("mixtral")["expert_out", LAYER]
        assert found.shape == (4, 8)
        for position in (0, 5):

            def put(value: Tensor, position: int = position) -> Tensor:
                value = value.clone()
                value[:, position] = values[:, position]
                return value

            expected = metric(model.run(corrupted, edit=moe.apply("expert_out", put, layers=LAYER)).logits)
            assert found[LAYER, position].item() == pytest.approx(expected.item(), rel=1e-6)


def test_generic_activation_patch_over_a_model_with_a_dense_layer():
    """Points of every layer work as they are; those of mixtures say which layers have them."""
    lens, corrupted, metric = tiny("deepseek_v3"), IDS.flip(1), lambda logits: logits[:, -1, 7].sum()
    setter = lambda value, index, clean: patching.layer_pos_patch_setter(value, [int(one) for one in index], clean)  # noqa: E731

    def patched(name, **options):
        return patching.generic_activation_patch(lens, corrupted, clean, metric, setter, name, **options)

    with moe.attach(lens) as door, moe.wrap(plain("deepseek_v3")) as model:
        _, clean = lens.run_with_cache(IDS)
        last = IDS.shape[1] - 1
        for point in ("resid_pre", "resid_mid", "mlp_out"):
            got = patched(point, index_axis_names=("layer", "pos"))
            assert got.shape == (4, IDS.shape[1])
            if point != "mlp_out":
                value = clean[point, 0][:, last]
                put = moe.replace(value[:, None].expand(-1, IDS.shape[1], -1), point=point, layer=0, positions=last)
                expected = metric(model.run(corrupted, edit=put).logits)
                assert got[0, last].item() == pytest.approx(float(expected), rel=1e-4)
        for point in ("routed_out", "moe_in", "expert_out"):
            with pytest.raises(UnknownName) as caught:
                patched(point, index_axis_names=("layer", "pos"))
            told = str(caught.value)
            assert told.startswith(f"layer 0 has no experts and no {point!r}: expected one of layers [1, 2, 3], got")
            assert "index_df=pandas.DataFrame([(layer, pos) for layer in those layers" in told
        places = [(layer, position) for layer in door.model.layers for position in (0, last)]
        got = patched("moe_out", index_df=pandas.DataFrame(places, columns=["layer", "pos"]))
        assert len(got) == 6 and got.isfinite().all() and len(set(got.tolist())) > 3


def test_a_cache_explains_what_a_layer_lacks_and_nothing_else():
    lens = tiny("deepseek_v3")
    with moe.attach(lens):
        _, cached = lens.run_with_cache(IDS)
        _, values = lens.run_with_cache(IDS, return_cache_object=False)
        for one in (cached.cache_dict, values):
            for name in ("blocks.0.mlp.hook_expert_out", "blocks.0.hook_expert_out"):
                with pytest.raises(UnknownName, match="layer 0 has no experts and no 'expert_out'"):
                    one[name]
                assert name not in one and one.get(name) is None
            with pytest.raises(KeyError, match="hook_nothing"):
                one["blocks.0.hook_nothing"]
            copied = pickle.loads(pickle.dumps(one))
            assert type(copied) is dict and copied.keys() == one.keys()
        _, some = lens.run_with_cache(IDS, names_filter="blocks.1.hook_routed_out")
        with pytest.raises(KeyError, match="blocks.1.hook_expert_out"):
            some["expert_out", 1]
    assert type(lens.run_with_cache(IDS)[1].cache_dict) is dict


def test_interventions_act_in_calls_of_the_bridge():
    lens = tiny("olmoe")
    edits = [moe.ablate(layer=1, expert=3), moe.scale(layer=LAYER, expert=2, by=2.0)]
    with moe.wrap(plain("olmoe")) as model:
        expected = model.run(IDS, edit=edits, read="routed_out")
    with moe.attach(lens) as door, door.model.edit(edits):
        logits, values = lens.run_with_cache(IDS)
        assert torch.equal(logits, expected.logits)
        assert torch.equal(values["routed_out", LAYER], expected["routed_out", LAYER])


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_show_what_standing_edits_made_of_every_point(family):
    lens = tiny(family)
    with moe.attach(lens) as door:
        model = door.model
        for (point, layer), name in door.hook_names.items():
            if layer not in (None, 0, LAYER) or not POINTS[point].editable:
                continue
            edit = edit_of(point, layer)
            expected = model.run(IDS, edit=edit, read=moe.select(point, layers=layer))
            with model.edit(edit):
                logits, values = lens.run_with_cache(IDS, names_filter=name)
            assert torch.equal(values[name], expected[point, layer]), name
            assert torch.equal(logits, expected.logits), name


def test_a_bridge_can_be_wrapped_and_analysed():
    lens = tiny("olmoe")
    with moe.wrap(lens) as model, moe.wrap(plain("olmoe")) as other:
        assert model.hf is lens.original_model
        got, expected = (moe.logit_attribution(one, IDS[0], [7, 8]) for one in (model, other))
        assert (got["attribution"] - expected["attribution"]).max() == 0
        got, expected = (one.run(IDS, edit=moe.top_k(5)).logits for one in (model, other))
        assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapped_bridge_passes_the_audit(family):
    with moe.wrap(tiny(family)) as model:
        assert model.audit().passed


# Leaving it as it was


def traces(lens: Any) -> dict[str, object]:
    """Everything that attaching could leave behind."""
    modules = dict(lens.named_modules())
    return {
        "modules": list(modules),
        "state": list(lens.state_dict()),
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "classes": {name: type(m) for name, m in modules.items()},
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "registry": {name: id(hook) for name, hook in lens._hook_registry.items()},
        "names": {name: id(hook) for name, hook in lens.hook_dict.items()},
        "aliases": {name: dict(m.hook_aliases) for name, m in modules.items() if hasattr(m, "hook_aliases")},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_closing_restores_everything(family):
    lens = tiny(family)
    before = traces(lens)
    with moe.attach(lens):
        lens.run_with_cache(IDS)
        attached = traces(lens)
        assert attached["state"] == before["state"]
        assert all(attached[kind] != before[kind] for kind in ("registry", "names", "classes", "aliases"))
    assert traces(lens) == before


def test_an_exception_restores_everything_and_hooks_that_were_there_stay():
    lens = tiny("gpt_oss")
    seen = []
    lens.add_hook("blocks.1.mlp.router.hook_expert_weights", lambda value, hook: seen.append(value.shape))
    before = traces(lens)

    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("inside a hook")

    with pytest.raises(RuntimeError, match="inside a hook"), moe.attach(lens):
        for point in ("router_logits", "resid_mid", "expert_act"):
            with pytest.raises(RuntimeError, match="inside a hook"):
                lens.run_with_hooks(IDS, fwd_hooks=[(f"blocks.1.hook_{point}", fail)])
            assert torch.equal(lens.run_with_cache(IDS)[0], reference("gpt_oss").logits)
        lens.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_expert_out", fail)])
    assert traces(lens) == before
    seen.clear()
    lens(IDS)
    assert seen == [(16, 8)]
    lens.reset_hooks()


def test_wrapped_before_or_after_and_closed_in_any_order():
    lens = bridge("olmoe")
    lens.run_with_cache(IDS)
    before = traces(lens)
    outer = moe.wrap(lens)
    standing = outer.edit(moe.ablate(layer=1, expert=3))
    with standing:
        edited = lens(IDS)
        door = moe.attach(lens)
        assert torch.equal(lens(IDS), edited)
        assert torch.equal(lens.run_with_cache(IDS)[0], edited)
    outer.close()
    door.model.close()
    assert torch.equal(lens.run_with_cache(IDS)[1]["expert_out", 1], reference("olmoe")["expert_out", 1])
    inner = moe.wrap(lens)
    lens.add_perma_hook("blocks.1.mlp.hook_routed_out", lambda value, hook: value * 0)
    assert not torch.equal(lens(IDS), reference("olmoe").logits)
    door.close()  # and with it what was hooked to its points
    door.close()
    assert torch.equal(lens(IDS), reference("olmoe").logits)
    assert torch.equal(inner.run(IDS, read="expert_out")["expert_out", 1], reference("olmoe")["expert_out", 1])
    inner.close()
    assert traces(lens) == before


def test_what_nobody_hooks_is_passed_by():
    lens = tiny("qwen2_moe")
    with moe.attach(lens) as door:
        points = [door.model._host.point(*key) for key in door.hook_names]
        assert not any(point.live for point in points)
        lens.run_with_cache(IDS, names_filter=door.names())
        assert not any(point.live for point in points)


# What is refused


def test_what_is_no_bridge_or_attached_already_is_refused():
    with pytest.raises(moe.MoEError, match="not a bridge: expected a TransformerBridge.*got OlmoeForCausalLM"):
        moe.attach(build("olmoe"))
    lens = tiny("olmoe")
    with moe.attach(lens), pytest.raises(moe.MoEError, match="attached already"):
        moe.attach(lens)
    with pytest.raises(moe.MoEError, match="the bridge is not attached"):
        moe.stack_expert_results(lens.run_with_cache(IDS)[1])


def test_folded_weights_and_renamed_hooks_are_refused():
    lens = bridge("mixtral")
    with moe.attach(lens):
        for name in ("enable_compatibility_mode", "process_weights"):
            with pytest.raises(moe.MoEError, match="cannot fold or rename what is attached"):
                getattr(lens, name)()
    lens.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    before = traces(lens)
    for door in (moe.attach, moe.wrap):
        with pytest.raises(moe.MoEError, match="in compatibility mode would mean something else"):
            door(lens)
    assert traces(lens) == before


def test_a_model_without_a_block_for_each_layer_is_refused_and_left_alone():
    lens = bridge("olmoe")
    blocks, before = lens._modules.pop("blocks"), list(dict(lens.original_model.named_modules()))
    with pytest.raises(moe.MoEError, match=r"cannot attach.*no block of their own for layers \[0, 1, 2, 3\]"):
        moe.attach(lens)
    assert list(dict(lens.original_model.named_modules())) == before
    lens.add_module("blocks", blocks)


# Traps of TransformerLens


def router_of(family: str) -> str:
    return f"blocks.{LAYER}.mlp.{'router' if family == 'gpt_oss' else 'gate'}"


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_the_dead_router_hook_is_refused(family, in_place):
    lens, name = tiny(family), f"{router_of(family)}.hook_out"
    with torch.no_grad():
        clean = lens(IDS)
    changed = lambda value: change("router_logits", value)  # noqa: E731
    assert torch.equal(run_with(lens, name, changed, in_place=in_place), clean)  # the trap itself
    with moe.attach(lens):
        with pytest.raises(moe.MoEError, match=f"an edit of {name} changes nothing.*Edit .*hook_router_logits"):
            run_with(lens, name, changed, in_place=in_place)
        assert torch.equal(run_with(lens, name, lambda value: value), clean)
        _, values = lens.run_with_cache(IDS, names_filter=[name, f"blocks.{LAYER}.mlp.hook_router_logits"])
        assert error(values[name].flatten(), values["router_logits", LAYER].flatten()) < 1e-6
    assert torch.equal(run_with(lens, name, changed, in_place=in_place), clean)


def test_an_edit_of_what_a_block_hands_on_is_refused():
    lens, name = tiny("gpt_oss"), f"blocks.{LAYER}.mlp.hook_router_scores"
    with moe.attach(lens), pytest.raises(moe.MoEError, match=f"an edit of {name} changes nothing"):
        run_with(lens, name, lambda value: value + 1)


def test_hook_resid_mid_reaches_the_residual():
    lens, name = tiny("mixtral"), f"blocks.{LAYER}.hook_resid_mid"
    zero = lambda value: value * 0  # noqa: E731
    with moe.wrap(plain("mixtral")) as model:
        expected = model.run(IDS, edit=moe.apply("resid_mid", zero, layers=LAYER)).logits
    assert error(run_with(lens, name, zero), expected) > 0.1  # the trap itself
    with moe.attach(lens):
        assert torch.equal(run_with(lens, name, zero), expected)
        branch = run_with(lens, f"blocks.{LAYER}.ln2.hook_in", zero)
        assert error(branch, expected) > 0.1  # the norm's input is still there, by its own name
    assert error(run_with(lens, name, zero), expected) > 0.1


@pytest.mark.parametrize("name", ["hook_in", "hook_out", "hook_expert_weights", "hook_expert_indices"])
def test_pos_slice_slices_positions_of_flat_hooks(name):
    lens, name = tiny("mixtral"), f"{router_of('mixtral')}.{name}"
    _, whole = lens.run_with_cache(IDS, names_filter=name)
    flat = whole[name]
    assert flat.shape[0] == IDS.numel()
    _, sliced = lens.run_with_cache(IDS, names_filter=name, pos_slice=-1)
    assert sliced[name].shape == (IDS.numel(), 1)  # the trap itself
    with moe.attach(lens):
        expected = flat.view(*IDS.shape, -1)[:, -1:]
        _, sliced = lens.run_with_cache(IDS, names_filter=name, pos_slice=-1)
        assert torch.equal(sliced[name], expected)
        kept, forward, _ = lens.get_caching_hooks(name, pos_slice=-1)
        lens.run_with_hooks(IDS, fwd_hooks=forward)
        assert torch.equal(kept[name], expected)
        assert torch.equal(lens.run_with_cache(IDS, names_filter=name)[1][name], flat)


def test_an_edit_in_place_of_the_weight_of_an_expert_that_was_not_chosen_routes_to_it():
    lens, name = tiny("olmoe"), f"{router_of('olmoe')}.hook_expert_weights"

    def boost(value: Tensor) -> Tensor:
        value = value.clone()
        value[..., 5] = 0.9
        return value

    expected = run_with(lens, name, boost)
    assert error(run_with(lens, name, boost, in_place=True), expected) > 1e-3  # the trap itself
    with moe.attach(lens):
        assert torch.equal(run_with(lens, name, boost), expected)
        assert torch.equal(run_with(lens, name, boost, in_place=True), expected)


# Model types besides the seven families that TransformerLens builds


TYPES = (
    "afmoe", "deepseek_v4", "ernie4_5_moe", "flex_olmo", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite",
    "glm_moe_dsa", "granitemoe", "jamba", "jetmoe", "laguna", "lfm2_moe", "llama4", "llama4_text", "minimax_m2",
    "nemotron_h", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "switch_transformers",
)  # fmt: skip


def call(lens: Any, given: dict[str, Tensor], *hooks: Any) -> Tensor:
    more = {"decoder_input": given["decoder_input_ids"]} if "decoder_input_ids" in given else {}
    return lens.run_with_hooks(given["input_ids"], fwd_hooks=list(hooks), **more)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_other_types_read_and_edit_the_same(model_type):
    hf, other = tiny_types.build(model_type), tiny_types.build(model_type)
    for one in (hf, other):
        one.set_attn_implementation("eager")
    given, lens = tiny_types.inputs(hf), bridged(hf)
    values: dict[str, Tensor] = {}
    with moe.attach(lens) as door, moe.wrap(other) as model:
        run = model.run(given, read=list(model.points))
        assert set(door.hook_names) == set(run.values)
        keep = [(name, lambda value, hook, name=name: values.update({name: value})) for name in door.names()]
        call(lens, given, *keep)
        for key, name in door.hook_names.items():
            assert values[name].shape == run.values[key].shape
            assert error(values[name], run.values[key]) < 5e-6, key
        for point, layer in one_of_each_point(door.hook_names):
            if POINTS[point].editable:
                expected = model.run(given, edit=edit_of(point, layer)).logits
                hook = door.hook_names[point, layer], lambda value, hook, point=point: change(point, value)
                assert error(call(lens, given, hook), expected) < 5e-6, (point, layer)


def larger(value: Any, hook: Any) -> Any:
    return value * 1.5 + 0.3 if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*FAMILIES, *TYPES])
@torch.no_grad()
def test_every_hook_in_a_mixture_does_attached_what_it_did_or_is_refused(model_type):
    hf = tiny_types.build(model_type)
    given, lens = tiny_types.inputs(hf), bridged(hf)
    names = [name for name, hook in lens.hook_dict.items() if ".mlp." in name and hook.name == name]
    clean, before = call(lens, given), {name: call(lens, given, (name, larger)) for name in names}
    with moe.attach(lens):
        for name, expected in before.items():
            try:
                got = call(lens, given, (name, larger))
            except moe.MoEError:  # llama4's block takes no weights from its router while it is attached
                assert torch.equal(expected, clean) or model_type.startswith("llama4"), name
            else:
                assert error(got, expected) < 5e-6, name
