"""Path patching, against edited forwards of the slow reference and against what must hold."""

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp.analyses.metrics import LogitDifference
from moe_interp.errors import BadInput, UnknownName, UnsupportedModel
from tests.reference import patching as slow
from tests.reference.patching import forward
from tests.test_patching import CLEAN, CORRUPTED, METRIC, SCORE, both, close
from tests.tiny import build
from tests.tiny_types import build as build_type


def a_sender(base, other, layer: int) -> tuple[int, int]:
    """An expert that says something else in both runs at the last token, which the metric looks at."""
    change = [(slow.contribution(other, layer, one) - slow.contribution(base, layer, one))[:, -1] for one in range(8)]
    return layer, int(torch.stack(change).abs().amin(dim=1).sum(-1).argmax())


@pytest.mark.parametrize(
    ("family", "direction"), [("mixtral", "restore"), ("deepseek_v3", "corrupt"), ("gpt_oss", "restore")]
)
def test_paths_to_later_experts_and_routers(family, direction):
    hf = build(family)
    (ids, _), (base, other) = both(hf, direction)
    sender, start = a_sender(base, other, 1), SCORE(base.logits)
    with moe.wrap(hf) as model:
        experts, routers = (
            moe.path_patching(model, CLEAN, CORRUPTED, sender, kind, METRIC, direction=direction, resamples=5)
            for kind in ("experts", "routers")
        )
    assert experts.layer.values.tolist() == routers.layer.values.tolist() == [2, 3]
    moved = (slow.contribution(other, *sender) - slow.contribution(base, *sender)).abs().amax(-1) > 1e-5
    for layer in (2, 3):
        effect = SCORE(slow.path(hf, ids, base, other, sender, layer, None)) - start
        assert close(routers.effect.sel(layer=layer), effect)
        for expert in range(8):
            effect = SCORE(slow.path(hf, ids, base, other, sender, layer, expert)) - start
            assert close(experts.effect.sel(layer=layer, expert=expert), effect)
            uses = (base.points["expert_ids", layer] == expert).any(-1)
            tokens = experts.tokens.sel(layer=layer, expert=expert).values
            # a token that rounding alone moves may be counted
            assert ((uses & moved).sum(1).numpy() <= tokens).all() and (tokens <= uses.sum(1).numpy()).all()
    assert np.abs(experts.effect.values).max() > 1e-2 and np.abs(routers.effect.values).max() > 1e-2
    assert (experts.effect.values[experts.tokens.values == 0] == 0.0).all()


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_the_path_to_the_logits_is_the_last_residual_plus_what_was_said(family):
    hf = build(family)
    (ids, _), (base, other) = both(hf, "restore")
    sender = a_sender(base, other, 1)
    delta = slow.contribution(other, *sender) - slow.contribution(base, *sender)
    logits = forward(hf, ids, edits={("resid_post", 3): slow.add(delta)}).logits
    with moe.wrap(hf) as model:
        result = moe.path_patching(model, CLEAN, CORRUPTED, sender, "logits", METRIC, resamples=5)
        decoded = model.decode(base.points["resid_post", 3] + delta).detach()
    assert result.effect.dims == ("text",)
    assert close(result.effect, SCORE(logits) - SCORE(base.logits))
    assert close(result.effect, SCORE(decoded) - SCORE(base.logits))
    assert np.abs(result.effect.values).min() > 1e-3


def test_from_the_last_layer_there_is_no_other_path():
    hf = build("qwen3_moe")
    _, (base, other) = both(hf, "restore")
    sender = a_sender(base, other, 3)
    with moe.wrap(hf) as model:
        path = moe.path_patching(model, CLEAN, CORRUPTED, sender, "logits", METRIC, resamples=5)
        whole = moe.activation_patching(model, CLEAN, CORRUPTED, METRIC, layers=3, resamples=5)
    assert close(path.effect, whole.effect.sel(layer=3, expert=sender[1]))
    assert close(path.normalised, whole.normalised.sel(layer=3, expert=sender[1]))


def test_direct_effects_are_those_of_the_attribution():
    """Through a final norm that is none the logits are linear: the path is the difference of two attributions."""
    hf = build("mixtral")
    hf.model.norm.forward = lambda hidden: hidden
    sender = a_sender(*both(hf, "restore")[1], 2)
    metric = LogitDifference((5,), (9,))
    with moe.wrap(hf) as model:
        path = moe.path_patching(model, CLEAN[:1], CORRUPTED[:1], sender, "logits", metric)
        shares = []
        for ids in (CLEAN, CORRUPTED):
            run = model.run(ids[:1], read="expert_out")
            outputs, weights, _ = run.contribution(*sender)
            logits = hf.lm_head((outputs * weights[..., None])[0, -1]).detach()
            shares.append(float(logits[5] - logits[9]))
    assert close(path.effect, [shares[0] - shares[1]])


def test_a_run_with_itself_says_nothing():
    with moe.wrap(build("olmoe")) as model:
        for receivers in ("experts", "routers", "logits"):
            result = moe.path_patching(model, CLEAN, CLEAN, (1, 2), receivers, METRIC, resamples=5)
            assert (result.effect == 0).all() and (result.tokens == 0).all()


def test_padding_changes_nothing():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    clean, corrupted = (
        {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask} for ids in (CLEAN, CORRUPTED)
    )
    corrupted["input_ids"][0, 2] = 77
    with moe.wrap(build("deepseek_v3")) as model:
        for receivers in ("experts", "routers", "logits"):
            sender = (1, int(model.run(clean).routing[1].ids[0, 2, 0]))
            together = moe.path_patching(model, clean, corrupted, sender, receivers, METRIC, resamples=5)
            pair = (one["input_ids"][0, 2:] for one in (clean, corrupted))
            alone = moe.path_patching(model, *pair, sender, receivers, METRIC)
            assert close(together.effect[0], alone.effect[0], 0.1)


def test_what_cannot_be_right_is_refused():
    with moe.wrap(build("qwen2_moe")) as model:
        with pytest.raises(
            BadInput, match="no routers to receive.*before MoE layer 3, got one of layer 3.*direct effect"
        ):
            moe.path_patching(model, CLEAN, CORRUPTED, (3, 1), "routers", METRIC)
        with pytest.raises(UnknownName, match="layer 1 has no experts"):
            moe.path_patching(model, CLEAN, CORRUPTED, (1, 1), "logits", METRIC)
        with pytest.raises(UnknownName, match="unknown expert 8 at layer 2"):
            moe.path_patching(model, CLEAN, CORRUPTED, (2, 8), "logits", METRIC)
        with pytest.raises(BadInput, match="not of one length"):
            moe.path_patching(model, CLEAN, CORRUPTED[:, :4], (2, 1), "logits", METRIC)
        with pytest.raises(BadInput, match="invalid receivers for path_patching: .*got 'heads'"):
            moe.path_patching(model, CLEAN, CORRUPTED, (2, 1), "heads", METRIC)
    with moe.wrap(build_type("granitemoe")) as model, pytest.raises(UnsupportedModel, match="is not the plain sum"):
        moe.path_patching(model, CLEAN, CORRUPTED, (1, 1), "logits", METRIC)
