"""Vision experts: mixtures of a vision tower, and those beside the text experts of a layer.

The reference is the plain model: what its modules are given, the formula of one expert written out, and an expert taken
away by zeroing its down-projection.
"""

from functools import cache

import pytest
import torch
from torch.nn import functional

import moe_interp as moe
from tests.tiny_types import build, images, inputs

TYPES = ("dots3_note", "ernie4_5_vl_moe")


@cache
def seen(model_type: str):
    hf = build(model_type)
    with torch.no_grad():
        return hf, images(hf), hf(**images(hf), use_cache=False).logits


def vision_layers(model: moe.MoEModel) -> list[int]:
    return [layer for layer in model.spec.moe_layers if model.spec.layers[layer].stack == "vision"]


@pytest.mark.parametrize("model_type", TYPES)
def test_an_untouched_run_with_images_is_the_plain_one(model_type):
    hf, arguments, plain = seen(model_type)
    with moe.wrap(hf) as model:
        run = model.run(arguments, read=list(model.points))
        assert torch.equal(run.output, plain)
        assert vision_layers(model)
        assert set(run.routing) == set(model.spec.moe_layers)
        assert set(model.run(inputs(hf)).routing) == set(model.layers)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_token_has_experts_of_its_own_kind(model_type):
    hf, arguments, _ = seen(model_type)
    with moe.wrap(hf) as model:
        run = model.run(arguments)
        for layer in vision_layers(model):
            mask = run.routing[layer].mask
            if model_type == "dots3_note":
                assert mask.shape == (1, len(arguments["pixel_values"])) and mask.all()
            else:
                twin = model.spec.layers[layer].path
                text = next(spec.index for spec in model.spec.layers if spec.path == twin and spec.stack == "text")
                assert torch.equal(mask, arguments["moe_mm_token_type_ids"].bool())
                assert torch.equal(run.routing[text].mask, ~mask & arguments["attention_mask"].bool())


@pytest.mark.parametrize("model_type", TYPES)
def test_outputs_are_those_of_the_experts_own_matrices(model_type):
    hf, arguments, _ = seen(model_type)
    given: dict[str, torch.Tensor] = {}
    with moe.wrap(hf) as model:
        layer = vision_layers(model)[-1]
        experts = hf.get_submodule(model.spec.moe(layer).experts)
    handle = experts.register_forward_pre_hook(lambda module, args: given.update(rows=args[0], ids=args[1]))
    with torch.no_grad():
        hf(**arguments, use_cache=False)
    handle.remove()
    with moe.wrap(hf) as model:
        run = model.run(arguments, read=[moe.select("expert_out", layers=layer)])
    mask = run.routing[layer].mask
    assert torch.equal(run.routing[layer].ids[mask], given["ids"])
    for row, (x, ids) in enumerate(zip(given["rows"], given["ids"], strict=True)):
        for slot, expert in enumerate(ids.tolist()):
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            expected = experts.down_proj[expert] @ (functional.silu(gate) * up)
            assert torch.allclose(run["expert_out", layer][mask][row, slot], expected, atol=1e-5)


@pytest.mark.parametrize("model_type", TYPES)
def test_ablating_a_vision_expert_is_zeroing_its_matrix(model_type):
    hf, arguments, plain = seen(model_type)
    with moe.wrap(hf) as model:
        layer = vision_layers(model)[-1]
        routing = model.run(arguments).routing[layer]
        expert = int(routing.ids[routing.mask][0, 0])
        run = model.run(arguments, edit=moe.ablate(layer=layer, expert=expert))
        experts = hf.get_submodule(model.spec.moe(layer).experts)
    kept = experts.down_proj.data[expert].clone()
    try:
        experts.down_proj.data[expert] = 0
        with torch.no_grad():
            expected = hf(**arguments, use_cache=False).logits
    finally:
        experts.down_proj.data[expert] = kept
    assert run.touched == (int((routing.ids[routing.mask] == expert).sum()),)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    assert (run.output - expected).abs().max() < 1e-5 * plain.abs().max()


def test_a_watch_counts_the_tokens_that_each_kind_of_expert_takes():
    hf, arguments, _ = seen("ernie4_5_vl_moe")
    with moe.wrap(hf) as model:
        routing = {layer: one for layer, one in model.run(arguments).routing.items() if layer in model.layers}
    with moe.RoutingWatch(hf, every=1) as watch, watch.step(0):
        hf(**arguments)
    table = watch.table().sel(step=0)
    for layer, one in routing.items():
        assert not one.mask.all()  # images are among the tokens
        load = one.ids[one.mask].flatten().bincount(minlength=hf.config.get_text_config().moe_num_experts).double()
        assert torch.allclose(torch.from_numpy(table.utilisation.sel(layer=layer).values), load / load.sum())
