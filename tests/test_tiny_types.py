"""The tiny models of all types: seeded, drawn to the last parameter, running in fp32 and bf16."""

import pytest
import torch

from tests.tiny_types import TYPES, build, images, inputs, runner

QUICK = ("deepseek_v4", "ernie4_5_vl_moe", "gemma4", "inkling2_text", "minimax", "nllb-moe", "qwen4_exp", "zaya")
EACH_TYPE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]


def test_there_are_ninety_types():
    assert len(set(TYPES)) == 90


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_it_runs(model_type, dtype):
    model = build(model_type, dtype=dtype)
    cache = {} if model_type == "diffusion_gemma" else {"use_cache": False}
    with torch.no_grad():
        output = runner(model)(**inputs(model), **cache)
    values = output.last_hidden_state if getattr(output, "logits", None) is None else output.logits
    assert values.isfinite().all()
    assert dtype in {parameter.dtype for parameter in model.parameters()}
    assert 0.1 < values.float().std() < 20
    assert not model.training


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_everything_is_drawn_from_the_seed(model_type):
    before = torch.get_rng_state()
    first, again, other = (dict(build(model_type, seed=seed).named_parameters()) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert not torch.isclose(parameter, other[name], rtol=1e-6, atol=0).all(), name
        assert parameter.numel() == 1 or parameter.std() > 0, name


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_no_selection_bias_is_zero(model_type):
    model = build(model_type)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    biases = [
        tensor for name, tensor in tensors.items() if name.endswith(("_correction_bias", "expert_bias", "_biases"))
    ]
    assert all(bias.abs().min() > 0 and bias.float().std() > 0.05 for bias in biases)


def test_overrides_reach_the_config_or_the_text_config_in_it():
    assert build("olmoe", num_experts_per_tok=2).config.num_experts_per_tok == 2
    assert build("aria", num_hidden_layers=2).config.text_config.num_hidden_layers == 2
    with pytest.raises(TypeError, match="no field nonsense"):
        build("olmoe", nonsense=1)
    with pytest.raises(KeyError):
        build("nonsense")


@pytest.mark.parametrize(("model_type", "expected"), [("dots3_note", 1), ("ernie4_5_vl_moe", 3)])
def test_images_reach_the_vision_experts(model_type, expected):
    model, reached = build(model_type), []
    for name, module in model.named_modules():
        if name.endswith("vision_moe") or type(module).__name__ == "Dots3NoteVisionMoE":
            module.register_forward_hook(lambda *_, name=name: reached.append(name))
    with torch.no_grad():
        model(**inputs(model), use_cache=False)
        assert not reached
        assert model(**images(model), use_cache=False).logits.isfinite().all()
    assert len(reached) == expected
