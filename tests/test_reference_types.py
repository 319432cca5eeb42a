"""The slow reference of all model types against transformers' own eager models, driven by plain hooks.

Unedited: the output, and every value that a module of the model is given or returns. Edited: each of those values
changed in the reference and by a hook on a copy of the model. A judge has to be judged first.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

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


def run(model: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return output_of(runner(model)(**arguments, **cacheless(model)))


def cacheless(model: Any) -> dict[str, bool]:
    """diffusion_gemma's decoder reads the encoder's cache."""
    return {} if model.config.model_type == "diffusion_gemma" else {"use_cache": False}


def output_of(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


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


# Where points are in the model's own modules


class Site(NamedTuple):
    """A value that a module is given (argument `index`) or returns (`index` None). `in_place`: others hold the very
    tensor that the module is given, and read it later."""

    module: Any
    index: int | None = None
    in_place: bool = False


ATTENTION = ("self_attn", "linear_attn", "mamba", "conv", "self_attention", "norm_attn_norm.attn",
             "layer.0.SelfAttention")  # fmt: skip
BRANCH = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "layer.1.mlp", "layer.2.mlp")
MIDDLE = ("pre_mlp_layernorm", "pre_feedforward_layernorm", "ffn_hc", "mlp_hyper_connection", "mlp_input", "ffn_norm",
          "pre_ff_layernorm", "ff_layer_norm", "norm_attn_norm.norm_2", "layer.2.layer_norm", "layer.1.layer_norm",
          "post_attention_layernorm")  # fmt: skip


def sites(model: Any) -> dict[tuple[str, int | None], Site]:
    layers = [layer for stack in stacks(model) for layer in stack]
    found: dict[tuple[str, int | None], Site] = {}
    for index, layer in enumerate(layers):
        if model.config.model_type == "longcat_flash":
            found.update(_longcat_sites(layer, index))
        else:
            found.update({(point, index): site for point, site in _layer_sites(layer).items()})
        if type(layer).__name__.startswith("Inkling2") and index > 0:  # the model keeps what it gave: too late there
            found["resid_pre", index] = Site(layers[index - 1])
    return found


def _layer_sites(layer: Any) -> dict[str, Site]:
    found = {"resid_pre": Site(layer, 0), "resid_post": Site(layer)}
    attention, block = _inner(layer, ATTENTION), _inner(layer, BRANCH)
    if hasattr(layer, "mixer"):
        mixes = layer.block_type.endswith("_attention")
        attention, block = (layer.mixer, None) if mixes else (None, layer.mixer)
    if attention is not None:
        found["attn_out"] = Site(attention)
    if not hasattr(layer, "mixer") and not type(layer).__name__.startswith("Cohere2"):
        found["resid_mid"] = _middle(layer)
    if hasattr(layer, "experts"):
        return found | {"router_logits": Site(layer.router.proj), **_experts_sites(layer.experts)}
    return found | ({} if block is None else _block_sites(block))


def _middle(layer: Any) -> Site:
    """Where the layer reads its residual stream between the branches, while it holds the tensor for later."""
    name = type(layer).__name__
    if name.startswith("FlexOlmo"):
        return Site(layer.mlp, 0, in_place=True)
    if name == "MiniMaxDecoderLayer":
        return Site(layer.post_attention_layernorm)
    return Site(_inner(layer, MIDDLE), 1 if name.startswith("Inkling2") else 0, in_place=True)


def _block_sites(block: Any) -> dict[str, Site]:
    dense = not any(hasattr(block, name) for name in ("experts", "text_moe", "input_linear", "router_gate"))
    if dense:
        return {"mlp_out": Site(block)}
    found = {"moe_in": Site(block, 0), "moe_out": Site(block)}
    experts = getattr(getattr(block, "text_moe", block), "experts", None)
    return found if experts is None else found | _experts_sites(experts)


def _experts_sites(experts: Any) -> dict[str, Site]:
    if type(experts).__name__.startswith(("Llama4", "NllbMoe", "SwitchTransformers")):
        return {}
    return {"expert_ids": Site(experts, 1), "gate_weights": Site(experts, 2), "routed_out": Site(experts)}


def _longcat_sites(layer: Any, index: int) -> dict[tuple[str, int | None], Site]:
    first, second = 2 * index, 2 * index + 1
    found = {("attn_out", number): Site(layer.self_attn[i]) for i, number in enumerate((first, second))}
    found |= {("mlp_out", number): Site(layer.mlps[i]) for i, number in enumerate((first, second))}
    found |= {("resid_pre", first): Site(layer, 0), ("resid_post", second): Site(layer)}
    found |= {
        ("resid_mid", number): Site(layer.post_attention_layernorm[i], 0, in_place=True)
        for i, number in enumerate((first, second))
    }
    return found | {(point, second): site for point, site in _block_sites(layer.mlp).items()}


def _inner(module: Any, paths: tuple[str, ...]) -> Any:
    def walk(path: str) -> Any:
        found = module
        for name in path.split("."):
            found = dict(found.named_children()).get(name) if found is not None else None
        return found

    return next((found for found in map(walk, paths) if found is not None), None)


def hooked(model: Any, at: dict[Any, Site], change: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """The model's output, with `change(key, value)` in place of the value at each site."""

    def handle(key: Any, site: Site) -> Any:
        def returned(_module: Any, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(key, output[0]), *output[1:])
            return change(key, output)

        def given(_module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            if site.in_place:
                args[site.index].copy_(change(key, args[site.index]))
                return args, kwargs
            if not args:
                return args, {**kwargs, "hidden_states": change(key, kwargs["hidden_states"])}
            return (*args[: site.index], change(key, args[site.index]), *args[site.index + 1 :]), kwargs

        if site.index is None:
            return site.module.register_forward_hook(returned)
        return site.module.register_forward_pre_hook(given, with_kwargs=True)

    handles = [handle(key, site) for key, site in at.items()]
    try:
        return run(model, inputs(model))
    finally:
        for handle_ in handles:
            handle_.remove()


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


def change(point: str, value: Tensor) -> Tensor:
    """A change of a point that matters: another expert in slot 0, or values of some tokens grown and shifted."""
    out = value.clone()
    if point == "expert_ids":
        out[..., 0] = (out[..., 0] + 1) % 8
    elif point == "gate_weights":
        out[..., 0] = out[..., 0] * 0.5 + 0.2
    else:
        out[..., ::2] = out[..., ::2] * 1.5 + 0.3
    return out


def one_of_each_point(keys: Any) -> list[tuple[str, int | None]]:
    """For each point, the middle one of the layers that have it."""
    layers: dict[str, list] = {}
    for point, layer in keys:
        layers.setdefault(point, []).append(layer)
    return [(point, having[len(having) // 2]) for point, having in layers.items()]


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


ROUTERS = ("gate.wg", "gate.router_mlp.out_proj", "router.gate", "router.layer", "router.classifier", "router.proj",
           "text_moe.gate", "gate", "router", "router_gate")  # fmt: skip


def router_of(layer: Any) -> Any:
    """The module whose parameters make the layer's router logits, or None."""
    block = layer.mixer if hasattr(layer, "mixer") else _inner(layer, BRANCH)
    return _inner(layer if hasattr(layer, "experts") else block, ROUTERS)


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
