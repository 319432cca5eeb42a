"""An audit passes on sound models, and fails, naming the check, on models and hosts that are broken on purpose."""

import pytest
import torch

import moe_interp as moe
from moe_interp.adapters import experts
from moe_interp.hosts import hooks
from tests.tiny import FAMILIES, build


def failures(hf) -> list[str]:
    with moe.wrap(hf) as model:
        return [check.name for check in model.audit().checks if not check.passed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_pass(family, dtype):
    hf = build(family, dtype=dtype)
    with moe.wrap(hf) as model:
        audit = model.audit()
    assert audit.passed, str(audit)
    edited = [check.name for check in audit.checks if check.name.startswith("edit of")]
    assert len(edited) == len(model.points) - 1  # all but router_scores


@pytest.mark.parametrize("edit", [moe.ablate(layer=0, expert=1), moe.top_k(2), moe.top_k(5)])
def test_an_audit_under_standing_edits_is_refused(edit):
    with moe.wrap(build("olmoe")) as model:
        with model.edit(edit), pytest.raises(moe.MoEError, match="under edits cannot be checked.*got 1 standing"):
            model.audit()
        assert model.audit().passed


def test_a_weighted_sum_that_forgets_a_slot_is_found(monkeypatch):
    def forgetful(outputs, weights, dtype):
        weights = weights.clone()
        weights[..., -1] = 0
        return (outputs * weights.reshape(-1, 1)).view(*weights.shape, -1).sum(1).to(dtype)

    monkeypatch.setattr(experts, "weighted_sum", forgetful)
    found = failures(build("olmoe"))
    assert "untouched run bit-equal to plain grouped_mm" in found
    assert "routed_out = Σ gate_weights · expert_out" in found


def test_an_edit_of_resid_mid_that_does_not_reach_the_residual_is_found(monkeypatch):
    monkeypatch.setattr(hooks, "_residual_hook", lambda taps, name, argument: hooks._input_hook(taps, name))
    assert failures(build("mixtral")) == ["edit of resid_mid takes"]


def test_a_sound_model_that_edits_hardly_move_passes_in_bf16():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = type(build("olmoe"))(build("olmoe").config).bfloat16().eval()
    assert failures(hf) == []


def test_an_edit_that_moves_nothing_is_found(monkeypatch):
    def deaf(taps, name, argument):
        def hook(module, args, kwargs):
            taps.now()(name, args[0].clone())  # shown to the point, and what comes back forgotten

        return hook

    monkeypatch.setattr(hooks, "_residual_hook", deaf)
    assert "edit of resid_mid takes" in failures(build("mixtral"))


def test_a_shared_expert_left_out_of_its_gate_is_found(monkeypatch):
    def ungated(module, gate, taps, name):
        return [module.register_forward_hook(hooks._output_hook(taps, name)).remove]

    monkeypatch.setattr(hooks, "_attach_gated", ungated)
    assert "moe_out = routed_out + shared_out" in failures(build("qwen2_moe"))


def test_scores_of_the_wrong_kind_are_found(monkeypatch):
    from moe_interp.adapters import FAMILIES as TABLE
    from moe_interp.adapters import Family

    monkeypatch.setitem(TABLE, "deepseek_v3", Family(shared="mlp.shared_experts"))
    assert "gate_weights ∝ router_scores of expert_ids" in failures(build("deepseek_v3"))


def test_weights_that_are_not_finite_are_found():
    hf = build("olmoe")
    hf.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = torch.nan
    with moe.wrap(hf) as model:
        audit = model.audit()
        assert not audit.passed
        assert "model.layers.1.mlp.experts.down_proj" in str(audit)
