"""Architectures that are in no table: opened where their structure is a common one and adds up, else refused."""

import pytest
import torch

import moe_interp as moe
from moe_interp.adapters import FAMILIES
from tests import tiny, tiny_types

OPEN = ("olmoe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")
REFUSED = {
    "granitemoe": "audits that fail: .*resid_mid",
    "granitemoeshared": "layers that run .*shared_mlp",
    "cohere2_moe": "layers that run norm, mixer, norm and 'mlp'",
    "gemma4_text": "them at",
    "jetmoe": "fused experts at one place",
    "step3p7": "fused experts at one place",
    "afmoe": "layers that run",
}


@pytest.mark.parametrize("family", OPEN)
def test_a_common_structure_opens_by_itself_and_reads_the_same(family, monkeypatch):
    hf, ids = tiny.build(family), torch.arange(3, 11)[None]
    with moe.wrap(hf) as model:
        expected = model.run(ids, read=list(model.points))
    monkeypatch.delitem(FAMILIES, family)
    with moe.wrap(hf) as model:
        got = model.run(ids, read=list(model.points))
        assert "opened by its structure" in " ".join(model.spec.notes)
        assert [layer.moe and layer.moe.scoring for layer in model.spec.layers]
    assert set(got.values) == set(expected.values)
    assert all(torch.equal(got.values[key], value) for key, value in expected.values.items())
    with pytest.raises(moe.MoEError, match="closed"):
        model.run(ids)


@pytest.mark.parametrize("model_type", REFUSED)
def test_another_structure_is_refused_with_what_was_seen(model_type, monkeypatch):
    hf = tiny_types.build(model_type)
    text_type = hf.config.get_text_config().model_type
    monkeypatch.delitem(FAMILIES, text_type)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules())
    with pytest.raises(moe.MoEError, match=REFUSED[model_type]) as refusal:
        moe.wrap(hf)
    assert "register_adapter" in str(refusal.value)
    assert hooks == sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hf.modules())
