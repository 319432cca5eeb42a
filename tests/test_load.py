"""Checkpoints of every kind of model load by ``moe.load``: text, multimodal, encoder-decoder, classifier, no head."""

import json
import os
import traceback

import pytest
import torch
import transformers

import moe_interp as moe
from moe_interp import results
from moe_interp.adapters import describe
from moe_interp.errors import BadCheckpoint, BadInput, UnsupportedModel
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


SECRETS = {
    "proxies": {"https": "http://someone:pass%20word@proxy.corp:8080"},
    "headers": {"Authorization": "Bearer abc123def"},
    "use_auth_token": "hf_another",
    "token": "hf_first",
    "http_user_agent": ["deep", {"in": (b"byteskey",)}],
}


def test_no_error_tells_what_may_be_secret_of_any_option(tmp_path, monkeypatch):
    with moe.load() as model:
        model.hf.save_pretrained(tmp_path)
    said = "someone pass%20word pass word proxy.corp abc123def hf_another hf_first byteskey c29tZW9uZTpwYXNzIHdvcmQ="

    def fail(*args, **options):
        raise ValueError(f"{said} http://me:mine@host {options!r}")

    monkeypatch.setattr(transformers.OlmoeForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(transformers.DeepseekV3ForCausalLM, "from_pretrained", fail)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(moe.MoEError, match="cannot load") as error:
        moe.load(tmp_path, dtype="float32", **SECRETS)
    told = "".join(traceback.format_exception(error.value)[-1:]) + str(error.value.__cause__)
    for secret in ("someone", "pass", "proxy.corp", "abc123def", "hf_", "byteskey", "c29tZW9", "me:mine"):
        assert secret not in told, secret
    assert "'dtype': 'float32'" in told and "'headers': '(not shown)'" in told and "(proxies)" in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {name: value},
            f"{name} (is neither True nor False|for load): expected True or False, got {value!r}",
        )
        for name, value in (
            ("trust_remote_code", "no"),
            ("trust_remote_code", 0),
            ("trust_remote_code", None),
            ("local_files_only", "false"),
            ("force_download", "no"),
            ("use_safetensors", None),
            ("weights_only", 0),
            ("low_cpu_mem_usage", "no"),
            ("offload_buffers", 1),
        )
    ]
    + [
        ({"use_safetensors": False}, "use_safetensors=False is not possible: expected .*safetensors alone are read"),
        ({"weights_only": False}, "weights_only=False is not possible"),
        ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes=True is not possible: .* every weight has the"),
    ],
)
def test_options_that_are_no_flags_or_unsafe_are_refused_before_anything_is_read(options, said, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda *_, **__: pytest.fail("read"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=said):
        moe.load(tmp_path, **options)


def test_flags_that_are_the_only_ones_possible_may_be_given(tmp_path):
    build("olmoe").save_pretrained(tmp_path)
    moe.load(tmp_path, use_safetensors=True, weights_only=True, output_loading_info=False).close()


@pytest.mark.parametrize(
    "shard", ["pytorch_model.bin", "../outside.safetensors", "/etc/x.safetensors", 3, "a\\b.safetensors"]
)
def test_an_index_that_names_other_files_than_safetensors_is_refused(shard, tmp_path, monkeypatch):
    build("olmoe").save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moe.load(tmp_path).close()
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    path.write_text(json.dumps(index))
    torch.save({}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(
        BadCheckpoint, match="expected only \\*.safetensors beside model.safetensors.index.json in it, got"
    ):
        moe.load(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(BadCheckpoint, match="cannot load"):
        moe.load(tmp_path)


def test_a_config_or_an_adapter_that_leads_to_a_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    hf = build("olmoe")
    hf.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "odd.safetensors.index.json").write_text('{"weight_map": {"a": "adapter_model.bin"}}')
    for named, said in (
        ("adapter_model.bin", "expected safetensors as 'transformers_weights' of config.json, got 'adapter_model.bin'"),
        (
            "odd.safetensors.index.json",
            "expected only .* beside odd.safetensors.index.json in it, got 'adapter_",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
        with pytest.raises(BadCheckpoint, match=said):
            moe.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "model.safetensors"}))
    moe.load(tmp_path).close()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "none/none"}')
    with pytest.raises(BadCheckpoint, match="expected adapter_model.safetensors beside adapter_config.json, got"):
        moe.load(tmp_path)


def test_missing_and_unexpected_weights_are_told(tmp_path):
    from safetensors.torch import load_file, save_file

    hf = build("olmoe")
    hf.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    more = weights | {"model.layers.0.extra.weight": torch.ones(2), "other": torch.ones(1)}
    save_file(more, tmp_path / "model.safetensors", {"format": "pt"})
    says = r"2 weights of .* have no place in the model and were left out, such as \['model.layers.0.extra.weight', 'o"
    with pytest.warns(UserWarning, match=says):
        moe.load(tmp_path).close()
    fewer = {name: value for name, value in weights.items() if name not in ("model.norm.weight", "lm_head.weight")}
    save_file(fewer, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match="expected all weights, got none for 2, such as .*model.norm.weight"):
        moe.load(tmp_path)
    odd = weights | {"model.norm.weight": torch.ones(3)}
    save_file(odd, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match="cannot load"):
        moe.load(tmp_path)


def test_what_is_no_folder_is_told_what_reads_it(tmp_path):
    result = results.labelled({}, {}, analysis="a", provenance={})
    saved = results.save(result, tmp_path / "routes.nc")
    (tmp_path / "renamed").write_bytes(saved.read_bytes())
    for path in (saved, tmp_path / "renamed", str(saved)):
        with pytest.raises(BadCheckpoint, match=r"got a saved result of an analysis. moe_interp.results.load\(path\)"):
            moe.load(path)
    (tmp_path / "lens.safetensors").write_bytes(b"x")
    with pytest.raises(BadCheckpoint, match="got a file. moe.TunedLens.load"):
        moe.load(tmp_path / "lens.safetensors")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadCheckpoint, match="got a pipe, a device or the like"):
        moe.load(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "config.json")
    with pytest.raises(BadCheckpoint, match="cannot read .*config.json: expected regular files, got a pipe"):
        moe.load(tmp_path / "folder")
    with pytest.raises(BadInput, match="invalid name for load: expected a string, a path or None, got 3"):
        moe.load(3)


@pytest.mark.parametrize(
    "path",
    [
        "none/",
        "a/b/c",
        "../none",
        "model.safetensors",
        "a\\b",
        "https://u:pw@hub/x/y",
        "C:/x",
        "routes.nc",
        "",
        "text " * 99,
    ],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(path, monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(BadCheckpoint, match="cannot load") as error:
        moe.load(path)
    assert "pw" not in str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_dense_model_is_called_dense(model_type, tmp_path):
    config = transformers.AutoConfig.for_model(model_type, vocab_size=96)
    for name in ("hidden_size", "n_embd", "intermediate_size"):
        if hasattr(config, name):
            setattr(config, name, 32)
    config.num_hidden_layers = config.num_attention_heads = 2
    hf = transformers.AutoModelForCausalLM.from_config(config)
    hf.save_pretrained(tmp_path)
    for opening in (lambda: moe.wrap(hf), lambda: moe.load(tmp_path)):
        with pytest.raises(
            UnsupportedModel, match=f"model type '{model_type}' is dense: expected a mixture-of-experts"
        ):
            opening()


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
