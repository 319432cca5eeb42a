"""What a result says of what was measured: inputs, weights, metric, code; coordinates of texts, labels."""

import json

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp.analyses.metrics import LogitDifference, OfLogits
from moe_interp.measured import LONGEST, code_version, fingerprint, function_told, inputs_told, metric_told
from moe_interp.results import provenance_of
from tests.tiny_types import TYPES, build

TEXT, OTHER = "The capital of France is", "The capital of France was"


@pytest.fixture(scope="module")
def model():
    return moe.load()


def largest(logits):
    return logits[-1].max()


def test_results_say_inputs_answers_and_metrics(model):
    answer = model.tokenizer("Paris")["input_ids"][-1]
    wrong = model.tokenizer("Oslo")["input_ids"][-1]
    metric = LogitDifference((answer,), (wrong,))
    one = [(5, 12), (6, 3)]
    results = {
        "inputs": [
            moe.expert_lens(model, TEXT, positions=-1),
            moe.logit_attribution(model, TEXT, tokens=[answer]),
            moe.routing_map(model, TEXT),
            moe.coalitions(model, TEXT, one, metric=metric, resamples=10),
        ],
        "clean": [moe.activation_patching(model, [TEXT], [OTHER], metric, layers=5, resamples=10)],
        "prompt": [moe.causal_trace(model, TEXT, subject="France", answer=answer, layers=[5], samples=1)],
    }
    for key, found in results.items():
        for result in found:
            about = provenance_of(result)
            assert TEXT in about[key], result.attrs["analysis"]
            assert about["weights"] == fingerprint(model.hf, model.spec) and about["code"] == code_version()
    patched = provenance_of(results["clean"][0])
    assert json.loads(patched["corrupted"]) == [OTHER]
    assert f"answers=({answer},), wrong=({wrong},), position=-1" in patched["metric_told"]
    assert results["clean"][0].text.values.tolist() == results["inputs"][3].text.values.tolist() == [0]
    assert provenance_of(results["prompt"][0])["answer"] == answer


def test_two_functions_are_two_metrics(model):
    told = [metric_told(OfLogits(fn)) for fn in (largest, lambda logits: logits[-1].min())]
    assert told[0] != told[1] and "test_measured.largest" in told[0] and "0x" not in "".join(told)
    assert told[0] == metric_told(OfLogits(largest))
    assert function_told(max).startswith("builtins.max, sha256 ")


def test_long_inputs_are_told_by_their_hash():
    long = ["word " * LONGEST]
    told = inputs_told(inputs=long)["inputs"]
    assert len(told) < 120 and "sha256" in told and told != inputs_told(inputs=[long[0] + "x"])["inputs"]
    assert inputs_told(inputs={"input_ids": torch.tensor([[5, 6]])}) == {"inputs": '{"input_ids": [[5, 6]]}'}


@pytest.mark.parametrize("given", [np.array([[5, 6]]), [[np.int64(5), np.int64(6)]], [range(5, 7)], ((5, 6),)])
def test_ids_of_any_form_are_told_by_their_values(given):
    assert inputs_told(inputs=given) == {"inputs": "[[5, 6]]"}


@pytest.mark.parametrize("model_type", TYPES)
def test_every_router_is_in_the_fingerprint(model_type):
    """Of every type: one changed value of a router changes it, at any layer, and opening changes nothing."""
    hf = build(model_type)
    with moe.wrap(hf) as model:
        spec, before = model.spec, fingerprint(hf, model.spec)
        for layer in model.spec.moe_layers:
            weight = next(iter(hf.get_submodule(spec.moe(layer).router).parameters()))
            place = (7,) * weight.dim() if min(weight.shape) > 7 else (0,) * weight.dim()
            kept = weight.data[place].clone()
            weight.data[place] += 1.0
            assert fingerprint(hf, spec) != before, layer
            weight.data[place] = kept
        assert fingerprint(hf, spec) == before
    assert fingerprint(hf, spec) == before == fingerprint(build(model_type), spec)


def test_other_weights_are_in_the_fingerprint_in_part():
    hf = build("olmoe")
    with moe.wrap(hf) as model:
        before = model.provenance()["weights"]
        hf.model.layers[2].self_attn.q_proj.weight.data.mul_(1.01)
        assert model.provenance()["weights"] != before


def test_checkpoints_of_one_name_keep_their_own_labels():
    corpus = moe.Corpus.from_texts({"a": ["hello there", "good day to you"], "b": ["one two three", "four"]})
    small = moe.load()
    with (
        moe.wrap(small.hf, small.tokenizer, name="same") as one,
        moe.wrap(small.hf, small.tokenizer, name="same") as two,
    ):
        found = moe.router_saturation([one, two], corpus, resamples=10)
    assert found.step.values.tolist() == ["same (1)", "same (2)"]
    weights = fingerprint(small.hf, small.spec)
    assert provenance_of(found)["checkpoint_weights"] == f"{weights}, {weights}"
    assert np.isfinite(found.saturation).all()
