"""The slow reference against transformers' own eager models, driven by plain hooks and rescaled parameters.

Unedited: logits, expert ids in slot order, gate weights and parameter gradients. Edited: each point's edit in
the reference against the same edit made on a copy of the model. A judge has to be judged first.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.model import Reference, forward
from tests.tiny import FAMILIES, build

LAYER = 2  # a MoE layer of every family, with one before and one after it
DENSE = {"qwen2_moe": 1, "qwen3_moe": 1, "deepseek_v2": 0, "deepseek_v3": 0}
RENORMALISING = ("olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")
GROUPED = ("deepseek_v2", (("topk_method", "group_limited_greedy"),))
VARIANTS = [
    *((family, ()) for family in FAMILIES),
    *((family, (("norm_topk_prob", False),)) for family in RENORMALISING),
    GROUPED,
]
EVERYWHERE = ("resid_pre", "attn_out", "resid_mid", "resid_post")
ROUTING = ("moe_in", "router_logits", "expert_ids", "gate_weights")
EXPERTS = ("expert_act", "expert_out", "routed_out", "moe_out")
SHARED = ("qwen2_moe", "deepseek_v2", "deepseek_v3")
POINTS = [
    (family, point)
    for family in FAMILIES
    for point in ("embed", *EVERYWHERE, *ROUTING, *EXPERTS, "shared_out", "mlp_out")
    if (point != "shared_out" or family in SHARED) and (point != "mlp_out" or family in DENSE)
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Vectors this small gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@cache
def eager(family: str, overrides: tuple[tuple[str, Any], ...] = ()) -> Any:
    model = build(family, **dict(overrides))
    model.set_experts_implementation("eager")
    return model


def inputs(padding: str = "none") -> tuple[Tensor, Tensor]:
    """Ids [2, 10] and a mask that leaves the first text seven real tokens."""
    ids = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[0, slice(0, 3) if padding == "left" else slice(7, 10)] = 0
    return ids * mask, mask


@cache
def clean(family: str) -> Reference:
    with torch.no_grad():
        return forward(eager(family), *inputs())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_logits_and_routing_are_the_models_own(
    family: str, overrides: tuple[tuple[str, Any], ...], padding: str
) -> None:
    model, (ids, mask) = eager(family, overrides), inputs(padding)
    real = mask.bool()
    calls: list[tuple[Tensor, ...]] = []
    layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    experts = [model.model.layers[i].mlp.experts for i in layers]
    with torch.no_grad():
        reference = forward(model, ids, mask)
        handles = [e.register_forward_pre_hook(lambda _, args: calls.append(args)) for e in experts]
        logits = model(ids, attention_mask=mask).logits
    for handle in handles:
        handle.remove()

    assert relative_error(reference.logits[real], logits[real]) < 1e-5
    for layer, (_, *routing) in zip(layers, calls, strict=True):
        expert_ids, weights = (value.view(*ids.shape, -1)[real] for value in routing)
        assert torch.equal(reference.points["expert_ids", layer][real], expert_ids)
        assert relative_error(reference.points["gate_weights", layer][real], weights) < 1e-5


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_gradients_are_the_models_own(family: str, overrides: tuple[tuple[str, Any], ...]) -> None:
    model, (ids, mask) = eager(family, overrides), inputs()
    probe = torch.randn(2, 10, 96, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*model.named_parameters(), strict=True)
    reference = forward(model, ids, mask)
    loss = (reference.logits * probe).sum()
    plain = (model(ids, attention_mask=mask).logits * probe).sum()
    got = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    expected = torch.autograd.grad(plain, parameters, materialize_grads=True)
    for name, g, e in zip(names, got, expected, strict=True):
        assert (g - e).abs().max() <= 1e-5 * e.abs().max(), name

    beside = {"expert_ids", *(["router_scores"] if family in ("deepseek_v3", "gpt_oss") else [])}
    points = {key: value for key, value in reference.points.items() if key[0] not in beside}
    for key, gradient in zip(points, torch.autograd.grad(loss, list(points.values())), strict=True):
        assert gradient.abs().max() > 0, key


@pytest.mark.parametrize(("family", "point"), POINTS)
def test_an_edit_does_what_the_model_does(family: str, point: str) -> None:
    model, (ids, mask) = eager(family), inputs()
    layer = None if point == "embed" else DENSE[family] if point == "mlp_out" else LAYER
    edit = edit_of(point, clean(family).points[point, layer].shape[-1])
    with torch.no_grad():
        edited = forward(model, ids, mask, {(point, layer): edit})
        expected = with_edit(model, point, layer, edit)(ids, attention_mask=mask).logits

    assert torch.equal(edited.points[point, layer], edit(clean(family).points[point, layer]))
    effect = relative_error(edited.logits, clean(family).logits)
    assert effect > 1e-2
    assert relative_error(edited.logits, expected) < 1e-5 * max(effect, 1.0)


def edit_of(point: str, size: int) -> Callable[[Tensor], Tensor]:
    """A different factor for each entry of the last dimension, so that a wrong axis or order shows."""
    if point == "expert_ids":
        return lambda ids: (ids + 1) % 8
    factors = 0.5 + torch.rand(size, generator=torch.Generator().manual_seed(3))
    return lambda value: value * factors


def with_edit(model: Any, point: str, layer: int | None, edit: Callable[[Tensor], Tensor]) -> Any:
    """A copy of `model` in which `point` is edited by hooks, or by rescaling the parameters that write it."""
    model = deepcopy(model)
    block = model.model.layers[layer or 0]
    mlp = block.mlp

    def output(_module: Any, _args: Any, result: Any) -> Any:
        return (edit(result[0]), *result[1:]) if isinstance(result, tuple) else edit(result)

    def argument(position: int) -> Callable[[Any, Any], Any]:
        return lambda _, args: (*args[:position], edit(args[position]), *args[position + 1 :])

    def in_place(_module: Any, args: Any) -> None:
        args[0].copy_(edit(args[0]))  # the layer keeps its residual as an alias of the norm's input

    hooks = {
        "embed": lambda: model.model.embed_tokens.register_forward_hook(output),
        "resid_pre": lambda: block.register_forward_pre_hook(argument(0)),
        "attn_out": lambda: block.self_attn.register_forward_hook(output),
        "resid_mid": lambda: block.post_attention_layernorm.register_forward_pre_hook(in_place),
        "moe_in": lambda: block.post_attention_layernorm.register_forward_hook(output),
        "router_logits": lambda: rescale_router(mlp, edit),
        "expert_ids": lambda: mlp.experts.register_forward_pre_hook(argument(1)),
        "gate_weights": lambda: mlp.experts.register_forward_pre_hook(argument(2)),
        "expert_act": lambda: rescale_experts(mlp.experts, edit, "F"),
        "expert_out": lambda: rescale_experts(mlp.experts, edit, "D"),
        "routed_out": lambda: mlp.experts.register_forward_hook(output),
        "shared_out": lambda: rescale_rows(shared_expert(mlp).down_proj.weight, edit),
        "moe_out": lambda: mlp.register_forward_hook(output),
        "mlp_out": lambda: mlp.register_forward_hook(output),
        "resid_post": lambda: block.register_forward_hook(output),
    }
    hooks[point]()
    return model


def shared_expert(mlp: Any) -> Any:
    return mlp.shared_expert if hasattr(mlp, "shared_expert") else mlp.shared_experts


def rescale_rows(weight: Any, edit: Callable[[Tensor], Tensor]) -> None:
    weight.data = edit(weight.data.transpose(-1, -2)).transpose(-1, -2).contiguous()


def rescale_router(mlp: Any, edit: Callable[[Tensor], Tensor]) -> None:
    router = mlp.router if hasattr(mlp, "router") else mlp.gate
    rescale_rows(router.weight, edit)
    if hasattr(router, "bias"):
        router.bias.data = edit(router.bias.data)


def rescale_experts(experts: Any, edit: Callable[[Tensor], Tensor], dimension: str) -> None:
    """Rescale the down-projection along its neurons (F) or its outputs (D); gpt_oss holds it as [E, F, D]."""
    biased = hasattr(experts, "down_proj_bias")
    if biased == (dimension == "D"):
        experts.down_proj.data = edit(experts.down_proj.data)
    else:
        rescale_rows(experts.down_proj, edit)
    if biased and dimension == "D":
        experts.down_proj_bias.data = edit(experts.down_proj_bias.data)


def test_an_edit_that_cannot_be_applied_is_an_error() -> None:
    model, (ids, mask) = eager("mixtral"), inputs()
    with pytest.raises(ValueError, match="does not have.*shared_out"):
        forward(model, ids, mask, {("shared_out", LAYER): torch.zeros_like})
    with pytest.raises(ValueError, match="read only"):
        forward(model, ids, mask, {("router_scores", LAYER): torch.zeros_like})
    with pytest.raises(ValueError, match="edit of moe_out: expected"):
        forward(model, ids, mask, {("moe_out", LAYER): lambda value: value[:, :1]})


def test_a_constant_put_in_by_an_edit_has_a_gradient() -> None:
    model, (ids, mask) = eager("mixtral"), inputs()
    reference = forward(model, ids, mask, {("gate_weights", LAYER): torch.ones_like})
    (gradient,) = torch.autograd.grad(reference.logits.sum(), reference.points["gate_weights", LAYER])
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("family", "neutral"),
    [
        *((family, {"norm_topk_prob": False}) for family in RENORMALISING if family != "deepseek_v2"),
        *((family, {"sliding_window": 128}) for family in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")),
        *((family, {"routed_scaling_factor": 1.0}) for family in ("deepseek_v2", "deepseek_v3")),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}),
        ("deepseek_v3", {"topk_group": 2}),
        ("gpt_oss", {"swiglu_limit": 7.0}),
        ("gpt_oss", {"swiglu_alpha": 1.702}),
    ],
)
def test_every_switch_of_the_tiny_models_matters(family: str, neutral: dict[str, Any]) -> None:
    """The same weights under another setting give other logits, so no test passes by ignoring the setting."""
    ids, mask = inputs()
    with torch.no_grad():
        logits = build(family, **neutral)(ids, attention_mask=mask).logits
    assert relative_error(logits, clean(family).logits) > 1e-2


def test_the_selection_bias_of_deepseek_v3_matters() -> None:
    model, (ids, mask) = deepcopy(eager("deepseek_v3")), inputs()
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.zero_()
    with torch.no_grad():
        other = forward(model, ids, mask)
    with_bias, without = (r.points["expert_ids", 1].sort().values for r in (clean("deepseek_v3"), other))
    moved = (with_bias != without).any(dim=-1).float().mean()
    assert 0.1 < moved < 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_of_the_tiny_models_is_far_from_uniform(family: str) -> None:
    scores = [value for (point, _), value in clean(family).points.items() if point == "router_scores"]
    torch.testing.assert_close(torch.stack(scores).sum(-1), torch.ones(len(scores), 2, 10))
    used = torch.stack([v for (point, _), v in clean(family).points.items() if point == "expert_ids"])
    assert used.unique().tolist() == list(range(8))
    floor = 0.2 if family == "deepseek_v3" else 0.35  # 1/8 were it uniform; sigmoids differ less
    assert torch.stack(scores).amax(-1).mean() > floor


def test_building_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = build("deepseek_v3"), build("deepseek_v3"), build("deepseek_v3", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name]), name
    with pytest.raises(TypeError, match="no field norm_topk_prob"):
        build("mixtral", norm_topk_prob=True)
