"""Checkpoints of every kind of model load by ``moe.load``: text, multimodal, encoder-decoder, classifier, no head."""

import traceback

import pytest
import torch
import transformers

import moe_interp as moe
from moe_interp.adapters import describe
from moe_interp.errors import UnsupportedModel
from tests.stub_tokenizer import StubTokenizer
from tests.tiny_types import build, inputs, runner

KINDS = {
    "olmoe": "OlmoeForCausalLM",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification",
    "glm4v_moe_text": "Glm4vMoeTextModel",
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
}

# Models whose config's defaults are the published ones: billions of parameters, layers, those that are mixtures, E, K.
PUBLISHED = {
    "deepseek_v3": (671.0, 61, 58, 256, 8),
    "gpt_oss": (116.8, 36, 36, 128, 4),
    "jamba": (51.6, 32, 16, 16, 2),
    "llama4_text": (107.8, 48, 48, 16, 1),
    "mixtral": (46.7, 32, 32, 8, 2),
    "phimoe": (41.9, 32, 32, 16, 2),
    "qwen2_moe": (14.3, 24, 24, 60, 4),
    "qwen3_next": (79.7, 48, 48, 512, 10),
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


def test_the_tokenizer_comes_from_where_the_weights_come_from(tmp_path, monkeypatch):
    with moe.load() as model:
        model.hf.save_pretrained(tmp_path / "some" / "folder")
        model.tokenizer.save_pretrained(tmp_path / "some" / "folder")
        expected = model.run("a text").logits
    with moe.load(tmp_path / "some", subfolder="folder") as model:
        assert torch.allclose(model.run("a text").logits, expected, atol=1e-4)
    where = {"subfolder": "folder", "revision": "main", "cache_dir": str(tmp_path / "cache"), "token": "hf_NONE"}
    asked = []
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda source, **options: asked.append((source, options))
    )
    moe.load(tmp_path / "some", dtype="float32", **where).close()
    assert asked == [(str(tmp_path / "some"), {"trust_remote_code": False, **where})]


def test_no_error_tells_the_token(tmp_path, monkeypatch):
    token = "_".join(["hf", "SECRET"])  # tracebacks show these lines

    def fail(*args, **options):
        raise ValueError(f"no such header: Bearer {options['token']}")

    def refused():
        with pytest.raises(moe.MoEError, match="cannot load") as error:
            moe.load(tmp_path, token=token, revision="other")
        told = "".join(traceback.format_exception(error.value))
        assert token not in told
        return told

    assert "'token': '(not shown)', 'revision': 'other'" in refused()
    with moe.load() as model:
        model.hf.save_pretrained(tmp_path)
        model.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    assert "cannot load the tokenizer" in refused()
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    assert "ValueError: no such header: Bearer (token)" in refused()


def full_size(model_type, **changes):
    """A model of the config's defaults, without memory for its weights."""
    tiny = build(model_type)
    with torch.device("meta"):
        return type(tiny)(type(tiny.config)(**changes))


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_models_are_described_at_their_published_size(model_type):
    hf = full_size(model_type)
    spec = describe(hf)
    billions = sum(parameter.numel() for parameter in hf.parameters()) / 1e9
    found = (round(billions, 1), spec.num_layers, len(spec.moe_layers), spec.num_experts, spec.top_k)
    assert found == PUBLISHED[model_type]
    assert spec.d_model == hf.get_input_embeddings().embedding_dim


def test_a_config_that_leaves_out_k_is_refused():
    with pytest.raises(moe.MoEError, match="'gate.top_k' of DeepseekV2Moe is no count: .*, got None"):
        describe(full_size("deepseek_v2", num_experts_per_tok=None))


def test_a_model_without_a_head_says_so():
    hf = build("glm4v_moe_text")
    with moe.wrap(hf) as model:
        run = model.run(inputs(hf))
        assert torch.equal(run.output, runner(hf)(**inputs(hf), use_cache=False).last_hidden_state)
        with pytest.raises(moe.MoEError, match="no logits: expected a model with a head"):
            _ = run.logits


@pytest.mark.parametrize("model_type", ["glm4v_moe_text", "openai_privacy_filter"])
def test_what_writes_no_text_generates_nothing(model_type):
    hf = build(model_type)
    with moe.wrap(hf) as model, pytest.raises(moe.MoEError, match="generates nothing: .* Use run."):
        model.generate(inputs(hf))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_texts_that_are_written_together_have_no_padding(options):
    texts = ["abc", "a longer text", "de"]
    options = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, **options)
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        alone = [model.generate([text], **options) for text in texts]
        together = model.generate(texts, **options)
    assert together == [written for some in alone for written in some]
    assert [len(written) for written in alone[0]] == [6] * len(alone[0])


def test_an_encoder_decoder_writes_whole_texts_of_a_padded_batch():
    hf = build("switch_transformers")
    hf.config.decoder_start_token_id = hf.generation_config.decoder_start_token_id = 0
    with moe.wrap(hf, StubTokenizer()) as model:
        written = model.generate(["abc", "a longer text"], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [len(text) for text in written] == [5, 5]


def test_a_model_without_generate_says_so(monkeypatch):
    hf = build("olmoe")
    monkeypatch.delattr(transformers.GenerationMixin, "generate")
    with moe.wrap(hf) as model, pytest.raises(UnsupportedModel, match="olmoe has no generate.*Use run"):
        model.generate(torch.arange(3, 9))


def test_an_encoder_decoder_is_asked_for_its_decoders_input():
    hf = build("switch_transformers")
    with moe.wrap(hf) as model:
        with pytest.raises(moe.MoEError, match="decoder_input_ids"):
            model.run(torch.arange(3, 9))
        text = model.generate(torch.arange(3, 9), max_new_tokens=4, do_sample=False, decoder_start_token_id=0)
        assert text.shape[1] <= 5
