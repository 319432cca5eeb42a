"""The slow reference of all model types against transformers' own eager models, driven by plain hooks.

Unedited: the output, and every value that a module of the model is given or returns. Edited: each of those values
changed in the reference and by a hook on a copy of the model. A judge has to be judged first.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.edits import change, one_of_each_point
from tests.module_sites import cacheless, hooked, output_of, router_of, run, sites
from tests.reference.types import Reference, forward, stacks
from tests.tiny_types import TYPES, build, images, inputs, runner

QUICK = (
    "cohere2_moe", "deepseek_v3", "deepseek_v4", "doge", "gemma4", "inkling2_text", "llama4_text", "longcat_flash",
    "nemotron_h", "nllb-moe", "qwen3_next", "switch_transformers", "zaya",
)  # fmt: skip
EACH_TYPE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]
TOLERANCE = 1e-5


@cache
def eager(model_type: str) -> Any:
    model = build(model_type)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


@cache
def plain(model_type: str) -> Reference:
    model = eager(model_type)
    with torch.no_grad():
        return forward(model, inputs(model))


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_the_output_is_the_models(model_type):
    model = eager(model_type)
    assert error(plain(model_type).output, run(model, inputs(model))) < TOLERANCE


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_the_output_is_the_models_under_padding(model_type):
    model = eager(model_type)
    padded = inputs(model)
    padded["attention_mask"][1, :3] = 0
    with torch.no_grad():
        reference = forward(model, padded).output
    assert error(reference[0], run(model, padded)[0]) < TOLERANCE
    assert error(reference[1, 3:], run(model, padded)[1, 3:]) < TOLERANCE


def test_an_image_goes_through_the_models_own_tower():
    model = eager("dots3_note")
    with torch.no_grad():
        got = forward(model, images(model)).output
    assert error(got, run(model, images(model))) < TOLERANCE


def test_vision_experts_in_the_text_model_are_refused():
    with pytest.raises(ValueError, match="vision experts"):
        forward(eager("ernie4_5_vl_moe"), images(eager("ernie4_5_vl_moe")))


# Switches that the tiny models leave one way
VARIANTS = (
    *((name, {"norm_topk_prob": False}) for name in (
        "flint", "kolibri1", "lfm2_moe", "mistral4", "olmoe", "qwen2_moe", "glm4_moe")),
    ("axk2", {"n_group": None, "topk_group": None}),
    ("cohere2_moe", {"expert_selection_fn": "softmax", "shared_expert_combination_strategy": "sum"}),
    ("cohere2_moe", {"norm_topk_prob": False, "num_shared_experts": 0}),
    ("dbrx", {"ffn_config": dict(ffn_hidden_size=48, moe_num_experts=8, moe_top_k=3)}),
    ("deepseek_ocr2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    ("deepseek_v2", {"topk_method": "greedy"}),
    ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
    ("granitemoehybrid", {"num_local_experts": 0}),
    ("granitemoeshared", {"shared_intermediate_size": 0}),
    ("inkling_text", {"n_shared_experts": 1}),
    ("inkling2_text", {"n_layers_per_attn_res_block": 1}),
    ("inkling2_text", {"n_layers_per_attn_res_block": 3}),
    ("laguna", {"moe_router_logit_softcapping": 0.0}),
    ("lfm2_moe", {"use_expert_bias": False}),
    ("nemotron_h", {"moe_latent_size": None}),
    ("nllb-moe", {"normalize_router_prob_before_dropping": True, "moe_eval_capacity_token_fraction": 0.1}),
    ("nllb-moe", {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "moe_eval_capacity_token_fraction": 0.1}),
    ("switch_transformers", {"expert_capacity": 64}),
    ("switch_transformers", {"expert_capacity": 1}),
)  # fmt: skip


@pytest.mark.parametrize(("model_type", "switch"), VARIANTS)
def test_the_output_is_the_models_with_switches_the_other_way(model_type, switch):
    model = build(model_type, **switch)
    with torch.no_grad():
        got = forward(model, inputs(model)).output
    assert error(got, run(model, inputs(model))) < TOLERANCE
    assert error(got, plain(model_type).output) > 1e-3


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_without_its_lightest_slot_the_output_is_another(model_type):
    """A formula that is wrong by as little as that is seen."""
    model, reference = eager(model_type), plain(model_type)

    def drop_the_lightest(weights: Tensor) -> Tensor:
        lightest = weights.abs().argmin(dim=-1, keepdim=True)
        return weights.scatter(-1, lightest, 0.0)

    edits = {key: drop_the_lightest for key in reference.points if key[0] == "gate_weights"}
    with torch.no_grad():
        dropped = forward(model, inputs(model), edits).output
    assert error(dropped, reference.output) > 1e-3


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_points_are_what_the_models_modules_are_given_and_return(model_type):
    model, reference = eager(model_type), plain(model_type)
    seen: dict[Any, Tensor] = {}

    def keep(key: Any, value: Tensor) -> Tensor:
        seen[key] = value.clone()
        return value

    hooked(model, sites(model), keep)
    assert len(seen) >= 3 * len({layer for _, layer in seen})
    for key, value in seen.items():
        expected = reference.points[key]
        got = value.reshape(expected.shape)
        if expected.is_floating_point():
            assert error(got, expected) < TOLERANCE, key
        else:
            assert torch.equal(got, expected), key


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_points_of_one_layer_fit_together(model_type):
    points = plain(model_type).points
    for layer in (layer for point, layer in points if point == "moe_out"):
        shapes = {point: tuple(value.shape) for (point, number), value in points.items() if number == layer}
        slots = shapes["expert_ids"]
        assert slots[:2] == (2, 8) and slots == shapes["gate_weights"]
        assert shapes["expert_act"][:3] == shapes["expert_out"][:3] == slots
        assert shapes["expert_out"][3:] == shapes["routed_out"][2:]
        assert shapes["moe_in"] == shapes["moe_out"] == (2, 8, 64)
        assert shapes["router_logits"] == shapes["router_scores"]
        assert shapes["router_logits"][2] > points["expert_ids", layer].max()
        for edge in ("resid_pre", "resid_mid", "resid_post"):
            assert edge not in shapes or shapes[edge] in ((2, 8, 64), (2, 8, 4, 64))


UNLIKE_SCORES = ("phimoe", "nllb-moe", "gemma4", "gemma4_text", "diffusion_gemma", "switch_transformers", "zaya")


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_weights_are_the_scores_of_the_chosen_up_to_a_factor(model_type):
    points = plain(model_type).points
    for layer in (layer for point, layer in points if point == "router_scores"):
        scores, ids = points["router_scores", layer], points["expert_ids", layer]
        assert torch.allclose(scores.sum(dim=-1), torch.ones(2, 8)) and (scores >= 0).all()
        if model_type not in UNLIKE_SCORES:  # those scale each expert, or have slots of zero weight
            chosen, weights = scores.gather(-1, ids), points["gate_weights", layer]
            first = weights[..., :1] / chosen[..., :1]
            assert torch.allclose(weights, first * chosen, rtol=1e-4, atol=1e-6)


def test_zero_experts_return_their_input_and_have_no_neurons():
    points = plain("longcat_flash").points
    for layer in (1, 3):
        zero = points["expert_ids", layer] >= 8
        assert zero.any() and not zero.all()
        assert (points["expert_act", layer][zero] == 0).all()
        assert (points["expert_act", layer][~zero] != 0).any(dim=-1).all()
        given = points["moe_in", layer][:, :, None].expand_as(points["expert_out", layer])
        assert torch.equal(points["expert_out", layer][zero], given[zero])


# Edits


def edited(model: Any, edits: dict[Any, Any]) -> Tensor:
    with torch.no_grad():
        return forward(model, inputs(model), edits).output


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_edits_do_what_they_do_in_the_models_modules(model_type):
    model, reference = eager(model_type), plain(model_type)
    at = sites(model)
    for key in one_of_each_point(at):
        point = key[0]
        got = edited(model, {key: lambda value, point=point: change(point, value)})
        expected = hooked(model, {key: at[key]}, lambda key, value: change(key[0], value))
        effect = (expected - reference.output).abs().max().item()
        assert effect > 1e-3 * reference.output.abs().max().item(), key
        assert (got - expected).abs().max().item() < 1e-4 * max(effect, reference.output.abs().max().item()), key


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_router_logits_re_route_as_a_scaled_router_does(model_type):
    model, reference = eager(model_type), plain(model_type)
    layers = [layer for stack in stacks(model) for layer in stack]
    numbers = [layer for point, layer in reference.points if point == "router_logits"]
    number = numbers[len(numbers) // 2]
    router = router_of(layers[number // 2 if model_type == "longcat_flash" else number])
    experts = reference.points["router_logits", number].shape[-1] if "inkling_" in model_type else None
    scaled = [tensor[:experts] for tensor in (router.weight.data, getattr(router, "bias", None)) if tensor is not None]
    with torch.no_grad():
        for tensor in scaled:
            tensor.mul_(1.5)
        try:
            expected = run(model, inputs(model))
        finally:
            for tensor in scaled:
                tensor.div_(1.5)
    twins = [number, number - len(numbers) // 2] if model_type == "diffusion_gemma" else [number]  # tied weights
    got = edited(model, {("router_logits", layer): lambda logits: logits * 1.5 for layer in twins})
    scale = reference.output.abs().max().item()
    assert (expected - reference.output).abs().max().item() > 1e-3 * scale
    assert (got - expected).abs().max().item() < 1e-4 * scale


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_a_slot_grown_by_its_neurons_its_output_or_its_weight_is_one(model_type):
    """expert_act, expert_out and gate_weights act on the same slot of the same sum."""
    if model_type in ("llama4", "llama4_text"):
        pytest.skip("the weight acts before the neurons")
    model, reference = eager(model_type), plain(model_type)
    layer = [layer for point, layer in reference.points if point == "expert_out"][-1]

    def grow(value: Tensor) -> Tensor:
        out = value.clone()
        out[:, :, 0] = out[:, :, 0] * 3.0
        return out

    linear = model_type not in ("gpt_oss", "longcat_flash", "muse_spark", "muse_spark_text", "nllb-moe",
                                "openai_privacy_filter")  # fmt: skip
    names = ("gate_weights", "expert_out", *(["expert_act"] if linear else []))
    outputs = [edited(model, {(name, layer): grow}) for name in names]
    assert error(outputs[0], reference.output) > 1e-3
    assert all(error(output, outputs[0]) < TOLERANCE for output in outputs[1:])


# Gradients


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_gradients_are_the_models(model_type):
    # doge's own renormalisation is in place and cannot be differentiated; over a softmax it changes nothing
    model = build("doge", norm_topk_prob=False) if model_type == "doge" else eager(model_type)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outputs = forward(model, inputs(model)).output, output_of(runner(model)(**inputs(model), **cacheless(model)))
    probe = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3))
    got, expected = (gradients((output * probe).sum(), parameters) for output in outputs)
    largest = max(g.abs().max().item() for g in expected.values())
    assert len(expected) > 30
    for name in {*got, *expected}:
        g, e = got.get(name, torch.zeros(1)), expected.get(name, torch.zeros(1))
        assert (g - e).abs().max() < 1e-3 * max(e.abs().max().item(), 1e-2 * largest), name


def gradients(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_gradients_reach_every_point(model_type):
    model = eager(model_type)
    reference = forward(model, inputs(model))
    probe = torch.randn(reference.output.shape, generator=torch.Generator().manual_seed(3))
    points = {key: value for key, value in reference.points.items() if on_the_path(model, *key)}
    for key, g in zip(points, torch.autograd.grad((reference.output * probe).sum(), points.values()), strict=True):
        assert g.abs().max() > 0, key


def on_the_path(model: Any, point: str, layer: int | None) -> bool:
    """All but what is made beside it; of diffusion_gemma's last encoder layer, the decoder reads only what attention
    keeps of its input."""
    last = len(stacks(model)[0]) - 1 if model.config.model_type == "diffusion_gemma" else None
    return point not in ("router_scores", "expert_ids") and (layer != last or point == "resid_pre" or last is None)
