"""Models with one module for each expert, and the slow references of them, against each other.

The models are driven by plain hooks. In training mode without dropout or balance loss a DeepSeek v1 block computes the
same as in eval mode, but with gradients: that is where the reference's gradients are checked.
"""

import pytest
import torch
from torch import Tensor

from tests import deepseek_v1, linear_gates
from tests.reference import deepseek_v1 as deepseek_reference
from tests.reference import linear_gates as linear_reference

TOLERANCE = 1e-5
LAYER = 2
MODELS = {
    "deepseek": lambda: deepseek_v1.build(aux_loss_alpha=0.0),
    "deepseek renormalised": lambda: deepseek_v1.build(aux_loss_alpha=0.0, norm_topk_prob=True),
    "deepseek one shared": lambda: deepseek_v1.build(aux_loss_alpha=0.0, n_shared_experts=1),
    "softmax_topk": lambda: linear_gates.build("softmax_topk"),
    "softmax_topk normed": lambda: linear_gates.build("softmax_topk", norm_topk_prob=True),
    "softmax_topk_renormalised": lambda: linear_gates.build("softmax_topk_renormalised"),
    "topk_softmax": lambda: linear_gates.build("topk_softmax"),
}
IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])


def reference(name: str):
    return (deepseek_reference if name.startswith("deepseek") else linear_reference).forward


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def block(model, layer: int = LAYER):
    return getattr(model.model.layers[layer], model.model.layers[layer].branch)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_computes_what_the_model_computes(name):
    model = MODELS[name]()
    with torch.no_grad():
        for mask in (None, MASK):
            found = reference(name)(model, IDS, mask)
            real = slice(None) if mask is None else mask.bool()
            assert error(found.logits[real], model(IDS, mask).logits[real]) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_points_are_what_passes_through_the_modules(name):
    model, seen = MODELS[name](), {}
    layer = model.model.layers[LAYER]
    gate = block(model).gate
    hooks = [
        layer.register_forward_hook(lambda m, a, out: seen.update(resid_post=out[0])),
        layer.self_attn.register_forward_hook(lambda m, a, out: seen.update(attn_out=out[0])),
        layer.post_attention_layernorm.register_forward_hook(lambda m, a, out: seen.update(resid_mid=a[0], moe_in=out)),
        gate.register_forward_hook(lambda m, a, out: seen.update(gate=out)),
        block(model).register_forward_hook(
            lambda m, a, out: seen.update(moe_out=out[0] if isinstance(out, tuple) else out)
        ),
    ]
    with torch.no_grad():
        model(IDS)
        for hook in hooks:
            hook.remove()
        points = reference(name)(model, IDS).points
    for point in ("resid_post", "attn_out", "resid_mid", "moe_in", "moe_out"):
        assert error(seen[point], points[point, LAYER]) < TOLERANCE
    if name.startswith("deepseek"):
        ids, weights, loss = seen["gate"]
        assert loss is None
        assert torch.equal(ids.view(2, 8, -1), points["expert_ids", LAYER])
        assert error(weights.view(2, 8, -1), points["gate_weights", LAYER]) < TOLERANCE
    else:
        assert error(seen["gate"].view(2, 8, -1), points["router_logits", LAYER]) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_each_expert_and_the_shared_one_give_their_points(name):
    model = MODELS[name]()
    moe = block(model)
    with torch.no_grad():
        points = {key: value for (key, layer), value in reference(name)(model, IDS).points.items() if layer == LAYER}
        inputs, ids = points["moe_in"].flatten(0, 1), points["expert_ids"].flatten(0, 1)
        outputs = torch.stack([torch.stack([moe.experts[e](inputs[t]) for e in ids[t]]) for t in range(len(inputs))])
        assert error(outputs, points["expert_out"].flatten(0, 1)) < TOLERANCE
        if name.startswith("deepseek"):
            assert error(moe.shared_experts(points["moe_in"]), points["shared_out"]) < TOLERANCE
        scores = points["router_logits"].softmax(-1)
        assert error(points["router_scores"], scores) < TOLERANCE
        total = (points["gate_weights"][..., None] * points["expert_out"]).sum(2)
        assert error(total, points["routed_out"]) < TOLERANCE
        assert error(total + points.get("shared_out", 0.0), points["moe_out"]) < TOLERANCE


def changed_weights(point: str, moe) -> None:
    """The edit of `change_of`, made in the block's parameters instead."""
    if point == "router_logits":
        moe.gate.weight.neg_()
    elif point == "shared_out":
        shared = moe.shared_experts if hasattr(moe, "shared_experts") else moe.shared_expert
        shared.down_proj.weight.mul_(2.0)
    else:
        for expert in moe.experts:
            (expert.w2 if hasattr(expert, "w2") else expert.down_proj).weight.mul_(2.0)


def change_of(point: str):
    return torch.neg if point == "router_logits" else lambda value: value * 2.0


EDITS = [
    (name, point)
    for name in MODELS
    for point in ("router_logits", "expert_act", "expert_out", "gate_weights", "routed_out", "shared_out")
    if point != "shared_out" or "deepseek" in name or (name.startswith("softmax_topk") and "renorm" not in name)
]


@pytest.mark.parametrize(("name", "point"), EDITS)
def test_edits_are_what_changed_weights_do(name, point):
    model, changed = MODELS[name](), MODELS[name]()
    with torch.no_grad():
        changed_weights(point, block(changed))
        clean, expected = model(IDS).logits, changed(IDS).logits
        got = reference(name)(model, IDS, edits={(point, LAYER): change_of(point)}).logits
    assert error(clean, expected) > 1e-2
    assert error(got, expected) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_other_experts_run_with_the_weights_of_the_slots(name):
    model = MODELS[name]()
    with torch.no_grad():
        clean = reference(name)(model, IDS).points
        points = reference(name)(model, IDS, edits={("expert_ids", LAYER): lambda ids: (ids + 1) % 8}).points
        experts, ids = block(model).experts, (clean["expert_ids", LAYER] + 1) % 8
        assert torch.equal(points["expert_ids", LAYER], ids)
        assert torch.equal(points["gate_weights", LAYER], clean["gate_weights", LAYER])
        expected = experts[int(ids[1, 4, 2])](clean["moe_in", LAYER][1, 4])
        assert error(points["expert_out", LAYER][1, 4, 2], expected) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_reference_are_autograds_through_the_model(name):
    model = MODELS[name]().train()
    probe = torch.randn(2, 8, 96, generator=torch.Generator().manual_seed(3))
    moe = block(model)
    parameters = [moe.gate.weight, *moe.experts[3].parameters(), model.model.embed_tokens.weight]
    with torch.enable_grad():
        expected = torch.autograd.grad((model(IDS).logits * probe).sum(), parameters)
        got = torch.autograd.grad((reference(name)(model, IDS).logits * probe).sum(), parameters)
    for mine, theirs in zip(got, expected, strict=True):
        assert theirs.abs().max() > 0
        assert error(mine, theirs) < TOLERANCE


def test_in_eval_mode_the_published_block_has_no_gradient_in_its_routed_experts():
    model = MODELS["deepseek"]()
    moe = block(model)
    with torch.enable_grad():
        loss = model(IDS).logits.sum()
    routed, shared = torch.autograd.grad(
        loss, [moe.experts[3].up_proj.weight, moe.shared_experts.up_proj.weight], allow_unused=True
    )
    assert routed is None
    assert shared.abs().max() > 0


def test_the_balance_loss_reaches_the_gate_in_training_and_changes_no_value():
    with torch.enable_grad():
        gradients = []
        for alpha in (0.0, 0.5):
            model = deepseek_v1.build(aux_loss_alpha=alpha).train()
            logits = model(IDS).logits
            gradients.append(torch.autograd.grad(logits.sum(), block(model).gate.weight)[0])
            assert error(logits.detach(), deepseek_v1.build()(IDS).logits.detach()) < TOLERANCE
    assert error(*gradients) > 1e-3


def test_a_checkpoint_has_the_published_keys(tmp_path):
    from safetensors.torch import load_file

    deepseek_v1.write_checkpoint(deepseek_v1.build(), tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    mlp = ("down_proj", "gate_proj", "up_proj")
    norms = ("input_layernorm", "post_attention_layernorm")
    expected = {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(4):
        parts = [*norms, *(f"self_attn.{name}_proj" for name in "qkvo")]
        if layer == 0:
            parts += [f"mlp.{name}" for name in mlp]
        else:
            parts += [f"mlp.experts.{e}.{name}" for e in range(8) for name in mlp]
            parts += ["mlp.gate", *(f"mlp.shared_experts.{name}" for name in mlp)]
        expected |= {f"model.layers.{layer}.{part}.weight" for part in parts}
    assert keys == expected


def test_the_native_class_loads_it_whole_and_computes_the_same(tmp_path):
    model = deepseek_v1.build()
    deepseek_v1.write_checkpoint(model, tmp_path)
    native, report = deepseek_v1.load_native(tmp_path)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert set(report["unexpected_keys"]) == {"lm_head.weight"}
    with torch.no_grad():
        hidden = native.model(input_ids=IDS).last_hidden_state
        assert error(hidden, model.model(IDS)) < TOLERANCE
        assert error(native(IDS).logits, model(IDS).logits) < TOLERANCE
        renormalised = deepseek_v1.build(norm_topk_prob=True)
        assert error(hidden, renormalised.model(IDS)) > 1e-2


def test_the_native_class_is_refused_where_it_would_compute_another_function(tmp_path):
    deepseek_v1.write_checkpoint(deepseek_v1.build(norm_topk_prob=True), tmp_path)
    with pytest.raises(ValueError, match="norm_topk_prob"):
        deepseek_v1.load_native(tmp_path)


def test_styles_of_linear_gates_differ_where_they_should():
    with torch.no_grad():
        plain, normed = (linear_gates.build("softmax_topk", norm_topk_prob=flag)(IDS).logits for flag in (False, True))
        assert error(plain, normed) > 1e-2
    with pytest.raises(ValueError, match="unknown style"):
        linear_gates.build("sigmoid")
    with pytest.raises(TypeError, match="no field width"):
        deepseek_v1.build(width=3)
