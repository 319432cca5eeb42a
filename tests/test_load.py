"""Checkpoints of every kind of model load by ``moe.load``: text, multimodal, encoder-decoder, classifier, no head."""

import pytest
import torch

import moe_interp as moe
from tests.tiny_types import build, inputs, runner

KINDS = {
    "olmoe": "OlmoeForCausalLM",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "glm4v_moe_text": "Glm4vMoeTextModel",
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("model_type", KINDS)
def test_a_saved_model_loads_into_its_own_class_and_gives_the_same(model_type, named, tmp_path):
    hf = build(model_type)
    if not named:
        hf.config.architectures = None
    hf.save_pretrained(tmp_path)
    arguments = inputs(hf)
    with moe.wrap(hf) as model:
        expected = model.run(arguments, read=["expert_out"])
    with moe.load(tmp_path, dtype="float32") as model:
        got = model.run(arguments, read=["expert_out"])
        assert type(model.hf).__name__ == KINDS[model_type]
    # Not bit-equal: where weights lie in memory changes how some kernels round.
    assert (got.output - expected.output).abs().max() < 1e-5 * expected.output.abs().max()
    for key, value in expected.values.items():
        assert (got.values[key] - value).abs().max() < 1e-5 * value.abs().max(), key


def test_a_model_without_a_head_says_so():
    hf = build("glm4v_moe_text")
    with moe.wrap(hf) as model:
        run = model.run(inputs(hf))
        assert torch.equal(run.output, runner(hf)(**inputs(hf), use_cache=False).last_hidden_state)
        with pytest.raises(moe.MoEError, match="no logits: expected a model with a head"):
            _ = run.logits


def test_an_encoder_decoder_is_asked_for_its_decoders_input():
    hf = build("switch_transformers")
    with moe.wrap(hf) as model:
        with pytest.raises(moe.MoEError, match="decoder_input_ids"):
            model.run(torch.arange(3, 9))
        text = model.generate(torch.arange(3, 9), max_new_tokens=4, do_sample=False, decoder_start_token_id=0)
        assert text.shape[1] <= 5
