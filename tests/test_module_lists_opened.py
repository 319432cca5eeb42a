"""Models with one module for each expert, opened: points, edits and gradients against the slow references."""

import dataclasses
import importlib.util

import pytest
import torch
from torch import Tensor

import moe_interp as moe
from moe_interp.adapters import Separate, linear_gate
from moe_interp.points import POINTS
from tests import deepseek_v1, linear_gates
from tests.reference import deepseek_v1 as deepseek_reference
from tests.reference import linear_gates as linear_reference
from tests.test_contract import change_of

TOLERANCE = 1e-5
LAYER = 2
IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))
MODELS = {
    "deepseek": lambda **more: deepseek_v1.build(**more),
    "deepseek renormalised": lambda **more: deepseek_v1.build(norm_topk_prob=True, **more),
    "deepseek one shared": lambda **more: deepseek_v1.build(n_shared_experts=1, **more),
    "softmax_topk": lambda **more: linear_gates.build("softmax_topk", **more),
    "softmax_topk normed": lambda **more: linear_gates.build("softmax_topk", norm_topk_prob=True, **more),
    "softmax_topk_renormalised": lambda **more: linear_gates.build("softmax_topk_renormalised", **more),
    "topk_softmax": lambda **more: linear_gates.build("topk_softmax", **more),
}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed; it is among the dev extra"
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The linear gates, as a user registers them (docs/adapters.md)."""
    monkeypatch.setattr("moe_interp.adapters.families.FAMILIES", dict(moe.adapters.FAMILIES))
    qwen = Separate(up="up_proj", down="down_proj", gate="gate_proj")
    mixtral = Separate(up="w3", down="w2", gate="w1")
    common = dict(num_experts="num_experts", top_k="top_k", returns_logits=True)
    moe.register_adapter(
        "linear_gate_softmax_topk",
        moe.Family(
            kernel=qwen,
            call=linear_gate(qwen, renormalise="norm_topk_prob", shared=("shared_expert", "shared_expert_gate")),
            renormalises=lambda block: block.norm_topk_prob,
            shared="mlp.shared_expert",
            shared_gate="mlp.shared_expert_gate",
            **common,
        ),
    )
    moe.register_adapter(
        "linear_gate_softmax_topk_renormalised",
        moe.Family(block="block_sparse_moe", kernel=mixtral, call=linear_gate(mixtral), renormalises=True, **common),
    )
    moe.register_adapter(
        "linear_gate_topk_softmax",
        moe.Family(kernel=qwen, call=linear_gate(qwen, "top-k, softmax"), renormalises=True, **common),
    )


def reference(name: str):
    return (deepseek_reference if name.startswith("deepseek") else linear_reference).forward


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def points_of(name: str) -> set[str]:
    absent = {"mlp_out"} if not name.startswith("deepseek") else set()
    absent |= {"shared_out"} if name in ("topk_softmax", "softmax_topk_renormalised") else set()
    return set(POINTS) - absent


@pytest.mark.parametrize("name", MODELS)
def test_every_point_is_read_and_the_audit_passes(name):
    hf = MODELS[name]()
    expected = reference(name)(hf, IDS)
    with moe.wrap(hf) as model:
        run = model.run(IDS, read=list(model.points))
        audit = model.audit()
    assert set(model.points) == points_of(name)
    assert set(run.values) == {key for key in expected.points if key[0] in model.points}
    for key, value in run.values.items():
        same = torch.equal if POINTS[key[0]].integer else lambda got, wanted: error(got, wanted) < TOLERANCE
        assert same(value, expected.points[key]), key
    assert error(run.logits, expected.logits) < TOLERANCE
    assert audit.passed, str(audit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_an_untouched_run_is_bit_equal_to_the_model(name, dtype):
    hf = MODELS[name](dtype=dtype)
    with torch.no_grad():
        plain = hf(IDS).logits
    with moe.wrap(hf) as model:
        assert torch.equal(model.run(IDS).logits, plain)
        assert torch.equal(model.run(IDS, read=list(model.points)).logits, plain)
    with torch.no_grad():
        assert torch.equal(hf(IDS).logits, plain)


@pytest.mark.parametrize("name", MODELS)
def test_edits_move_the_logits_as_the_reference_predicts(name):
    hf = MODELS[name]()
    clean = reference(name)(hf, IDS).logits
    with moe.wrap(hf) as model:
        for point in (point for point in model.points if POINTS[point].editable):
            layers = model.spec.layers_of(point)
            layer = LAYER if LAYER in layers else layers[0]
            where = {} if layer is None else {"layers": layer}
            got = model.run(IDS, edit=moe.apply(point, change_of(point), **where)).logits
            expected = reference(name)(hf, IDS, edits={(point, layer): change_of(point)}).logits
            assert error(clean, expected) > 1e-2, point
            assert error(got, expected) < TOLERANCE, point


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_point_in_eval_mode(name):
    hf = MODELS[name]()
    probe = torch.randn(2, 8, 96, generator=torch.Generator().manual_seed(3))
    with torch.enable_grad():
        there = reference(name)(hf, IDS)
    with moe.wrap(hf) as model:
        for point in (point for point in model.points if POINTS[point].editable and POINTS[point].differentiable):
            layers = model.spec.layers_of(point)
            layer = LAYER if LAYER in layers else layers[0]
            run = model.run(IDS, read=[point if layer is None else moe.select(point, layers=layer)], grad=True)
            (got,) = torch.autograd.grad((run.logits * probe).sum(), run.values[point, layer])
            loss = (there.logits * probe).sum()
            (expected,) = torch.autograd.grad(loss, there.points[point, layer], retain_graph=True)
            assert expected.abs().max() > 0
            assert error(got, expected) < TOLERANCE, point


def test_gradients_reach_the_parameters_of_experts_in_eval_mode():
    hf = deepseek_v1.build()
    weight = hf.model.layers[LAYER].mlp.experts[3].up_proj.weight
    with torch.enable_grad():
        (expected,) = torch.autograd.grad(deepseek_reference.forward(hf, IDS).logits.square().sum(), weight)
    with moe.wrap(hf) as model:
        (got,) = torch.autograd.grad(model.run(IDS, grad=True).logits.square().sum(), weight)
    assert error(got, expected) < TOLERANCE


def test_the_balance_loss_keeps_its_gradient_in_training_mode():
    def gradient(model, alpha: float) -> Tensor:
        gate = model.model.layers[LAYER].mlp.gate.weight
        with torch.enable_grad():
            return torch.autograd.grad(model(IDS).logits.sum(), gate)[0]

    expected, without = (gradient(deepseek_v1.build(aux_loss_alpha=alpha).train(), alpha) for alpha in (0.5, 0.0))
    hf = deepseek_v1.build(aux_loss_alpha=0.5).train()
    with moe.wrap(hf):
        assert error(gradient(hf, 0.5), expected) < TOLERANCE
    assert error(without, expected) > 1e-3


@pytest.mark.parametrize("name", ["deepseek", "topk_softmax"])
def test_experts_and_their_matrices(name):
    hf = MODELS[name]()
    with moe.wrap(hf) as model:
        run = model.run(IDS, read=["moe_in", "expert_out", "expert_act"])
        assert torch.equal(model.experts(LAYER)(run["moe_in", LAYER], run.routing[LAYER].ids), run["expert_out", LAYER])
        weights, rows = model.weights(LAYER, 5), run["moe_in", LAYER]
        act = torch.nn.functional.silu(rows @ weights.gate.T) * (rows @ weights.up.T)
        other = model.experts(LAYER)(rows, torch.full((2, 8, 1), 5))[:, :, 0]
        assert error(act @ weights.down.T, other) < TOLERANCE
        wider = model.run(IDS, edit=moe.top_k(5))
    assert wider.routing[LAYER].ids.shape == (2, 8, 5)
    owner = hf.model.layers[LAYER].mlp
    assert getattr(owner.gate, "top_k", getattr(owner, "top_k", None)) == 3


def test_a_row_that_gets_the_order_wrong_is_found_by_the_audit():
    wrong = Separate(up="up_proj", down="down_proj", gate="gate_proj")
    row = moe.Family(kernel=wrong, call=linear_gate(wrong, renormalise=False), num_experts="num_experts", top_k="top_k")
    moe.register_adapter("linear_gate_topk_softmax", dataclasses.replace(row, renormalises=False))
    with moe.wrap(linear_gates.build("topk_softmax")) as model:
        failed = [check.name for check in model.audit().checks if not check.passed]
    assert "untouched run equal to the plain one" in failed


# Loading a checkpoint of DeepSeekMoE v1


def test_the_checkpoint_in_transformers_own_class_has_the_same_points(tmp_path):
    hf = deepseek_v1.build()
    deepseek_v1.write_checkpoint(hf, tmp_path)
    native, _ = deepseek_v1.load_native(tmp_path)
    edit = moe.ablate(layer=LAYER, expert=3)
    with moe.wrap(hf) as model, moe.wrap(native) as other:
        assert set(model.points) == set(other.points)
        mine, theirs = (one.run(IDS, read=list(one.points)) for one in (model, other))
        for (point, layer), value in mine.values.items():
            if point in ("expert_ids", "gate_weights", "expert_act", "expert_out"):
                continue
            assert error(theirs.values[point, layer], value) < TOLERANCE, point
        for expert in range(8):  # by expert, for both top-k are unsorted
            for layer in model.layers:
                values, used = mine.expert(layer, expert)
                again, also = theirs.expert(layer, expert)
                assert torch.equal(used, also)
                assert not used.any() or error(again, values) < TOLERANCE
        assert error(other.run(IDS, edit=edit).logits, model.run(IDS, edit=edit).logits) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_such_a_checkpoint(dtype, tmp_path):
    hf = deepseek_v1.build(dtype=dtype)
    deepseek_v1.write_checkpoint(hf, tmp_path)
    native, _ = deepseek_v1.load_native(tmp_path)
    with moe.load(tmp_path) as model, moe.wrap(native) as other:
        assert model.dtype is dtype
        ours, its = (one.run(IDS, read="expert_out").logits for one in (model, other))  # by one kind of experts call
        assert torch.equal(ours, its)
        if dtype is torch.float32:
            assert error(model.run(IDS).logits, hf(IDS).logits.detach()) < TOLERANCE
        audit = model.audit()
        assert audit.passed, str(audit)
        generated = model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
        steps = IDS[:1]
        for _ in range(3):
            steps = torch.cat([steps, model.run(steps).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(generated, steps)


@pytest.mark.parametrize("field", [{"norm_topk_prob": True}, {"moe_layer_freq": 2}])
def test_a_checkpoint_that_the_class_would_compute_wrongly_is_refused(field, tmp_path):
    deepseek_v1.write_checkpoint(deepseek_v1.build(**field), tmp_path)
    (name,) = field
    with pytest.raises(moe.MoEError, match=f"with {name}: expected {name} = .*open it with moe.wrap"):
        moe.load(tmp_path)


# Experts whose linear maps are quantised


def quantised(hf, bits: int):
    import bitsandbytes

    for expert in (
        expert for layer in hf.model.layers if hasattr(layer.mlp, "experts") for expert in layer.mlp.experts
    ):
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(expert, name)
            if bits == 4:
                new = bitsandbytes.nn.Linear4bit(
                    old.in_features, old.out_features, bias=False, compute_dtype=old.weight.dtype, quant_type="nf4"
                )
                new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bitsandbytes.nn.Linear8bitLt(
                    old.in_features, old.out_features, bias=False, has_fp16_weights=False
                )
                new.weight = bitsandbytes.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            setattr(expert, name, new.to("cpu"))
    return hf


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_quantised_by_bitsandbytes(bits, dtype):
    hf = quantised(deepseek_v1.build(dtype=dtype, hidden_size=64, moe_intermediate_size=64), bits)
    dense = deepseek_v1.build(dtype=dtype, hidden_size=64, moe_intermediate_size=64)
    with torch.no_grad():
        plain, unquantised = hf(IDS).logits, dense(IDS).logits
    with moe.wrap(hf) as model:
        run = model.run(IDS, read=list(model.points))
        audit = model.audit()
        for layer in model.layers:
            for expert in range(8):
                weights = model.weights(layer, expert)
                one = dense.model.layers[layer].mlp.experts[expert]
                for name in ("gate", "up", "down"):
                    getattr(one, f"{name}_proj").weight.data = getattr(weights, name)
        graded = model.run(IDS, read="resid_pre", grad=True)
        (got,) = torch.autograd.grad(graded.logits.float().square().sum(), graded.values["resid_pre", LAYER])
    assert torch.equal(run.logits, plain)
    assert audit.passed, str(audit)
    assert error(unquantised, plain) > 1e-3
    if dtype is torch.float32:
        with moe.wrap(dense) as model:
            there = model.run(IDS, read="resid_pre", grad=True)
            (expected,) = torch.autograd.grad(there.logits.square().sum(), there.values["resid_pre", LAYER])
        assert error(run.logits, there.logits) < TOLERANCE
        assert error(got, expected) < TOLERANCE


@pytest.mark.parametrize("style", linear_gates.STYLES)
def test_a_linear_gate_forbids_and_forces(style):
    hf = linear_gates.build(style)
    with moe.wrap(hf) as model:
        clean = model.run(IDS)
        layer = model.layers[-1]
        expert = int(clean.routing[layer].ids[0, 0, 0])
        forbidden = model.run(IDS, edit=moe.mask(layer=layer, expert=expert))
        forced = model.run(IDS, edit=moe.force([expert], layer=layer))
    before, after = clean.routing[layer], forbidden.routing[layer]
    assert not (after.ids == expert).any()
    assert (forced.routing[layer].ids == expert).any(-1).all()
    untouched = (before.ids != expert).all(-1)
    assert torch.equal(after.weights[untouched], before.weights[untouched])
    assert not torch.equal(forbidden.logits, clean.logits)
