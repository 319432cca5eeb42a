"""Inputs that models are given: padding as the model has it, keys, special tokens, tokenizers; heads of any kind."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn

import moe_interp as moe
from moe_interp.adapters.families import FAMILIES
from moe_interp.analyses.metrics import LogProbability
from moe_interp.encode import encode, pad, padding_of, special_token_ids
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.restart import Restart, Variant
from tests.tiny_types import TYPES, build, inputs

LONG, SHORT = list(range(10, 19)), list(range(30, 35))
TEXTS = ["w5 w6 w7 w8 w9", "w5 w6"]
CORPUS = moe.Corpus.from_texts({"a": ["w5 w6 w7", "w8 w9 w4"], "b": ["w7 w8", "w4 w5"]})


def words(**special):
    """A tokenizer of 96 words, w0 to w95."""
    found = Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w3"))
    found.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, unk_token="w3", **special)


def tiny(name, **fields):
    """A tiny model of a class, every weight random."""
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_local_experts=8,
                 num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    config = getattr(transformers, name.split("For")[0].removesuffix("Model") + "Config")(**{**sizes, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(config).eval()


def off(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


# Padding


@pytest.mark.parametrize("name", ["Qwen3MoeForSequenceClassification", "MixtralForSequenceClassification"])
@pytest.mark.parametrize("padding", [0, 2, 95])
def test_a_padded_text_gets_the_scores_that_it_gets_alone(name, padding):
    hf = tiny(name, pad_token_id=padding)
    # The scores of one text are those of its last token: by hand, without padding, from the body and the head.
    rows = [[5, 6, 7, 8, 9], [5, 6]]
    with torch.no_grad():
        expected = [hf.score(hf.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]) for row in rows]
    with moe.wrap(hf, words(pad_token="w50")) as model:  # the model's own comes first
        for given in (TEXTS, rows):
            got = model.run(given).output
            assert all(off(one, right) < 1e-5 for one, right in zip(got, expected, strict=True))
        left = pad(rows, "left", padding)
        assert off(model.run(left).output[1], expected[1]) < 1e-5


def test_the_padding_id_is_the_models_then_the_tokenizers():
    spec = moe.wrap(tiny("OlmoeForCausalLM", pad_token_id=7)).spec
    assert padding_of(words(pad_token="w50"), spec) == 7
    spec = moe.wrap(tiny("OlmoeForCausalLM", pad_token_id=None)).spec
    assert padding_of(words(pad_token="w50"), spec) == 50
    assert padding_of(words(), spec) == padding_of(None, spec) == 0
    beyond = words()
    beyond.add_special_tokens({"pad_token": "<pad>"})
    assert beyond.pad_token_id == 96 and padding_of(beyond, spec) == 0  # no embedding of the model's


def test_padding_that_a_classifier_takes_for_tokens_is_refused():
    with moe.wrap(tiny("Qwen3MoeForSequenceClassification", pad_token_id=2)) as model:
        ids, mask = torch.tensor([[5, 6, 0, 0]]), torch.tensor([[1, 1, 0, 0]])
        with pytest.raises(BadInput, match="would take padding for tokens: expected the padding id of its config, 2"):
            model.run({"input_ids": ids, "attention_mask": mask})
        # Before the text nothing depends on what stands under the mask.
        alone = model.run([[5, 6]]).output
        assert off(model.run({"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}).output, alone) > 1e-3
        left = {"input_ids": torch.tensor([[0, 9, 5, 6]]), "attention_mask": mask.flip(1)}
        assert off(model.run(left).output, alone) < 1e-5
    with moe.wrap(tiny("Qwen3MoeForSequenceClassification", pad_token_id=None), words(pad_token="w2")) as model:
        with pytest.raises(BadInput, match="cannot tell padding from tokens: .*got 2 texts"):
            model.run(TEXTS)
        assert model.run(TEXTS[1]).output.shape == (1, 2)


def test_positions_that_count_padding_by_its_id_are_those_of_the_text_alone():
    hf = build("nllb-moe")
    assert hf.config.pad_token_id == 0
    hf.config.pad_token_id = hf.get_encoder().embed_positions.padding_idx = 40
    hf.get_decoder().embed_positions.padding_idx = 40
    hf.get_encoder().padding_idx = hf.get_decoder().padding_idx = 40
    with moe.wrap(hf) as model:
        decoder = {"decoder_input_ids": torch.tensor([[5, 6, 7]])}
        alone = model.run({"input_ids": torch.tensor([SHORT]), **decoder}).logits
        left = pad([LONG, SHORT], "left", 40) | {"decoder_input_ids": torch.tensor([[5, 6, 7]] * 2)}
        assert off(model.run(left).logits[1:], alone) < 1e-5
        for side, refused in (("left", True), ("right", False)):  # after a text padding moves no position of it
            wrong = pad([LONG, SHORT], side, 41) | {"decoder_input_ids": torch.tensor([[5, 6, 7]] * 2)}
            if refused:
                with pytest.raises(BadInput, match="would take padding for tokens"):
                    model.run(wrong)
            else:
                assert off(model.run(wrong).logits[1:], alone) < 1e-5


def test_encoders_are_padded_on_the_right_when_they_generate():
    hf = build("switch_transformers")
    hf.config.decoder_start_token_id = 0
    with moe.wrap(hf) as model:
        given = encode([LONG, SHORT], None, model.spec, model.device, padding_side="left")
        assert given["attention_mask"][1].tolist() == [1] * 5 + [0] * 4
    with moe.wrap(build("olmoe")) as model:
        given = encode([LONG, SHORT], None, model.spec, model.device, padding_side="left")
        assert given["attention_mask"][1].tolist() == [0] * 4 + [1] * 5


def _told(caught):
    return any("changes the output" in str(one.message) for one in caught)


@pytest.mark.parametrize("model_type", TYPES)
def test_padding_that_reaches_real_tokens_is_told_and_no_other(model_type):
    """Every type: where padding moves the output at real tokens by more than rounding, a warning says so."""
    with moe.wrap(build(model_type)) as model:
        crossed = model.spec.kind == "encoder-decoder"
        decoder = {"decoder_input_ids": torch.tensor([[5, 6, 7]])} if crossed else {}
        alone = model.run({"input_ids": torch.tensor([SHORT]), **decoder}).output[0]
        for side in ("right", "left"):
            both = pad([LONG, SHORT], side, padding_of(None, model.spec))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                got = model.run(both | {name: one.repeat(2, 1) for name, one in decoder.items()}).output[1]
            if len(got) == len(LONG):
                got = got[: len(SHORT)] if side == "right" else got[-len(SHORT) :]
            assert _told(caught) == (off(got, alone) > 1e-4), (side, off(got, alone))


def test_positions_that_are_given_make_padding_harmless():
    with moe.wrap(build("hunyuan_v1_moe")) as model:
        left = pad([LONG, SHORT], "left", 0)
        positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        alone = model.run([SHORT]).logits[0]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = model.run(left | {"position_ids": positions}).logits[1, -len(SHORT) :]
        assert off(got, alone) < 1e-5 and not _told(caught)


# Keys and values


@pytest.mark.parametrize("model_type", TYPES)
def test_keys_are_those_that_the_model_takes(model_type):
    hf = build(model_type)
    with moe.wrap(hf) as model:
        given = inputs(hf)
        assert given.keys() <= model.encode(given).keys()
        with pytest.raises(BadInput, match="takes no input 'attention_maks'"):
            model.run(given | {"attention_maks": given["attention_mask"]})


def test_a_forward_without_names_takes_any_key():
    spec = moe.wrap(tiny("OlmoeForCausalLM")).spec
    unknown = replace(spec, arguments=None)
    assert "whatever" in encode({"input_ids": [[5]], "whatever": 1}, None, unknown, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_ids_of_any_width_are_ids(dtype):
    ids = torch.tensor([LONG])
    with moe.wrap(tiny("OlmoeForCausalLM")) as model:
        assert torch.equal(model.run(ids.to(dtype)).logits, model.run(ids).logits)
        given = {"input_ids": ids.to(dtype), "attention_mask": torch.ones_like(ids).to(dtype)}
        assert torch.equal(model.run(given).logits, model.run(ids).logits)
        with pytest.raises(BadInput, match="not token ids"):
            model.run(ids.double())


def test_nan_in_inputs_is_no_fault_of_the_checkpoint():
    with moe.wrap(tiny("OlmoeForCausalLM")) as model:
        embeds = model.hf.get_input_embeddings()(torch.tensor([LONG])).detach()
        for wrong in (float("nan"), float("inf")):
            spoiled = embeds.clone()
            spoiled[0, 3, 5] = wrong
            with pytest.raises(BadInput, match="values of 'inputs_embeds' are not finite: .*got 1 that are not"):
                model.run({"inputs_embeds": spoiled})
        # A mask may hold minus infinity, which keeps tokens apart.
        causal = torch.full((1, 1, 9, 9), float("-inf")).triu(1)
        assert torch.equal(model.encode({"inputs_embeds": embeds, "attention_mask": causal})["attention_mask"], causal)
        with pytest.raises(BadInput, match="values of 'attention_mask' are not finite"):
            model.run({"inputs_embeds": embeds, "attention_mask": causal * 0})


def test_ids_of_a_decoder_are_checked():
    with moe.wrap(build("switch_transformers")) as model:
        given = {"input_ids": torch.tensor([LONG]), "decoder_input_ids": torch.tensor([[5, 1000]])}
        with pytest.raises(BadInput, match="token id out of the vocabulary"):
            model.run(given)


# Texts and tokenizers


def test_half_a_surrogate_pair_is_told():
    with pytest.raises(BadInput, match="text 1 is no Unicode text: .*got half of a surrogate pair"):
        moe.load().run(["ab", "a\ud800b"])


def test_a_text_without_a_token_is_told():
    class Silent:
        def __call__(self, text, verbose=True):
            return {"input_ids": [] if text == "silent" else [5]}

        def decode(self, ids):
            return ""

    with moe.wrap(tiny("OlmoeForCausalLM"), Silent()) as model:
        for texts in ("silent", ["a", "silent"]):
            with pytest.raises(BadInput, match="has no tokens"):
                model.run(texts)


class _Processor:
    tokenizer = words()

    def __call__(self, images=None, text=None):
        return {}

    def decode(self, ids):
        return ""


@pytest.mark.parametrize(
    "given, says",
    [
        ("some/name", r"got 'some/name'. transformers.AutoTokenizer.from_pretrained\('some/name'\)"),
        (transformers.AutoTokenizer, "got the class AutoTokenizer. Pass an instance"),
        (_Processor(), "got _Processor. Pass the processor's tokenizer"),
        (words().backend_tokenizer, "got Tokenizer. Pass transformers.PreTrainedTokenizerFast"),
        (42, "got int"),
    ],
)
def test_what_is_no_tokenizer_is_told_at_the_door(given, says):
    with pytest.raises(BadInput, match=f"not a tokenizer: .*{says}"):
        moe.wrap(tiny("OlmoeForCausalLM"), given)


@pytest.mark.parametrize("given", ["some/name", _Processor(), transformers.OlmoeForCausalLM, words(), 42])
def test_what_is_no_model_is_told_at_the_door(given):
    with pytest.raises(BadInput, match="not a model that is in memory"):
        moe.wrap(given)


def test_a_model_on_meta_is_told_at_the_door():
    config = tiny("OlmoeForCausalLM").config
    with torch.device("meta"):
        empty = transformers.OlmoeForCausalLM(config)
    with pytest.raises(BadInput, match="a model without weights: .*parameters on the meta device, such as model.embed"):
        moe.wrap(empty)


def test_special_tokens_are_those_that_the_tokenizer_marks():
    tokenizer = words()
    tokenizer.add_tokens([transformers.AddedToken("<|s|>", special=True)], special_tokens=True)
    tokenizer.add_tokens([transformers.AddedToken("plain", special=False)])
    assert special_token_ids(tokenizer) == [96]
    with moe.wrap(tiny("OlmoeForCausalLM", vocab_size=98), tokenizer) as model:
        corpus = moe.Corpus.from_texts({"a": ["<|s|> w5 plain", "w3 w7 <|s|>"]})
        found, whole = (moe.routing(model, corpus, resamples=10, special_tokens=some) for some in (False, True))
        assert found.tokens.values.tolist() == [4] and whole.tokens.values.tolist() == [6]  # w3 is unknown, not special
        runs = [model.run(text) for text in corpus.texts]
        expected = np.zeros((2, 8))
        for run, kept in zip(runs, ([1, 2], [0, 1]), strict=True):
            for layer in (0, 1):
                for at in kept:
                    for expert in run.routing[layer].ids[0, at].tolist():
                        expected[layer, expert] += 1 / 8  # of 4 tokens with 2 experts each
        np.testing.assert_allclose(found.utilisation[0], expected)


# Heads

HEADS = [
    ("Qwen3MoeForSequenceClassification", {"pad_token_id": 2}),
    ("Qwen3MoeForSequenceClassification", {"pad_token_id": 2, "num_labels": 1}),  # a reward model
    ("Qwen3MoeForTokenClassification", {"num_labels": 5}),
    ("Qwen3MoeForTokenClassification", {"num_labels": 96}),  # as many labels as tokens
    ("MixtralForQuestionAnswering", {}),
    ("Qwen3MoeModel", {}),  # an embedding model
]


def _counted(hf):
    """Loads [L, E] over the documents, a text at a time, from the choices of the plain model's own routers."""
    loads = torch.zeros(2, 8)
    for text in CORPUS.texts:
        ids = torch.tensor([[int(word[1:]) for word in text.split()]])
        for layer, block in enumerate(hf.base_model.layers):
            kept = []
            handle = block.mlp.gate.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out[2]))
            hf(input_ids=ids)
            handle.remove()
            for expert in kept[0].flatten().tolist():
                loads[layer, expert] += 1
    return loads / loads.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("name, fields", HEADS)
def test_what_counts_choices_runs_on_any_head(name, fields):
    hf = tiny(name, **fields)
    with torch.no_grad():
        expected = _counted(hf)
    with moe.wrap(hf, words(pad_token="w2")) as model:
        found = moe.routing(model, CORPUS, resamples=10)
        assert int(found.tokens.sum()) == 10
        share = (found.tokens / 10 * found.utilisation).sum("domain")
        np.testing.assert_allclose(share, expected, atol=1e-6)
        moe.coactivation(model, CORPUS, resamples=10)
        moe.transitions(model, CORPUS)
        moe.vocabulary_specialization(model, CORPUS, at_least=1)


@pytest.mark.parametrize("name, fields", HEADS)
def test_what_needs_next_tokens_asks_for_a_language_model_head(name, fields):
    calls = {
        "neuron_lens": lambda model: moe.neuron_lens(model, 0, 0),
        "expert_lens": lambda model: moe.expert_lens(model, TEXTS[0]),
        "logit_attribution": lambda model: moe.logit_attribution(model, TEXTS[0], tokens=[5]),
        "perplexity": lambda model: moe.perplexity(model, CORPUS),
        "expert_effects": lambda model: moe.expert_effects(model, TEXTS[0], "nll"),
        "log_probability": lambda model: moe.expert_effects(model, TEXTS[0], LogProbability((5,))),
        "train_tuned_lens": lambda model: moe.train_tuned_lens(model, CORPUS, held_out=CORPUS),
        "generate": lambda model: model.generate(TEXTS[0]),
    }
    with moe.wrap(tiny(name, **fields), words(pad_token="w2")) as model:
        for what, call in calls.items():
            with pytest.raises(UnsupportedModel, match=r"no next token|generates nothing|has no logits"):
                call(model)
                pytest.fail(what)


@pytest.mark.parametrize("name, fields", HEADS)
def test_a_restart_gives_what_any_head_gives(name, fields):
    """At each token, or once for a text: what a whole run under the same edit gives, of texts of different lengths."""
    hf = tiny(name, **fields)
    padding = hf.config.pad_token_id
    ids = torch.tensor([LONG, [*LONG[:-2], padding, padding]])
    batch = {"input_ids": ids, "attention_mask": (ids != padding).long()}
    with moe.wrap(hf) as model:
        edits = [moe.scale(layer=1, expert=expert, by=3.0) for expert in range(3)]
        expected = [model.run(batch, edit=edit).output for edit in edits]
        restart = Restart(model, batch)
        at = restart.tokens.mask.clone()
        at[0, :2] = False
        found = list(restart.run([Variant([edit]) for edit in edits], at))
        assert restart.exact and restart.separable and sorted(one.number for one in found) == [0, 1, 2]
        pooled = model.spec.head == "pooled"
        for one in found:
            whole = expected[one.number]
            right = whole[one.texts] if pooled else whole[one.texts, one.columns]
            torch.testing.assert_close(one.logits, right, atol=1e-5, rtol=1e-5)
            places = [(0, len(LONG) - 1), (1, len(LONG) - 3)] if pooled else at.nonzero().tolist()
            assert list(zip(one.texts.tolist(), one.columns.tolist(), strict=True)) == [tuple(p) for p in places]
        assert not torch.equal(expected[0], expected[1])


def test_answers_in_a_text_are_starts_and_ends():
    hf = tiny("MixtralForQuestionAnswering")
    ids = torch.tensor([LONG])
    with torch.no_grad():
        plain = hf(input_ids=ids)
    with moe.wrap(hf) as model:
        got = model.run(ids).output
        assert torch.equal(got[..., 0], plain.start_logits) and torch.equal(got[..., 1], plain.end_logits)


def test_heads_are_told_apart():
    expected = {
        "OlmoeForCausalLM": ("tokens", True),
        "Qwen3MoeForSequenceClassification": ("pooled", False),
        "Qwen3MoeForTokenClassification": ("labels", False),
        "MixtralForQuestionAnswering": ("labels", False),
        "Qwen3MoeModel": ("tokens", False),
    }
    for name, right in expected.items():
        spec = moe.wrap(tiny(name)).spec
        assert (spec.head, spec.predicts_tokens) == right


def test_a_head_of_ones_own_is_told_by_its_rows():
    class Own(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.body = tiny("OlmoeModel")
            self.head = nn.Linear(64, rows)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.body(input_ids, attention_mask=attention_mask).last_hidden_state)

    moe.register_adapter("Own", moe.Family(body="body", unembed="head", renormalises=False))
    try:
        assert moe.wrap(Own(96)).spec.predicts_tokens and not moe.wrap(Own(5)).spec.predicts_tokens
    finally:
        del FAMILIES["Own"]
