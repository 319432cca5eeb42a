"""Tokens that a router lets skip all experts (zaya's): in no count, no share, no null and no map."""

from functools import cache

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp import stats
from moe_interp.analyses.labels import label_tokens
from moe_interp.data import Corpus
from moe_interp.views import figures
from tests.reference import routing as slow
from tests.stub_tokenizer import StubTokenizer
from tests.tiny_types import build

CORPUS = Corpus.from_texts(
    {"a": ["ab cd ef gh" * 2, "hello, there all" * 2], "b": ["one two three." * 2, "xyz uvw!" * 2]}
)
EXPERTS = 8


@cache
def opened():
    return moe.wrap(build("zaya"), StubTokenizer())


@cache
def tokens():
    """Every token at every layer: what it is, and the expert that it takes, None if it skips."""
    found = []
    for document, text in enumerate(CORPUS.texts):
        run = opened().run(text, read=["router_logits"])
        for layer, routing in run.routing.items():
            gate = opened().hf.model.layers[layer].mlp.gate
            scores = routing.logits.softmax(-1)[0]
            for at, score in enumerate(scores):
                best = int((score + gate.balancing_biases).argmax())
                own = (score[:EXPERTS] / score[:EXPERTS].sum()).tolist()
                about = {"document": document, "layer": layer, "token": int(run.token_ids[0, at]), "at": at}
                found.append(about | {"expert": None if best == EXPERTS else best, "scores": own})
    assert any(one["expert"] is None for one in found)
    return found


def at(layer, **about):
    return [one for one in tokens() if one["layer"] == layer and all(one[key] == about[key] for key in about)]


def test_entropies_and_balance_are_of_scores_over_experts():
    result = moe.routing(opened(), CORPUS, resamples=5)
    for layer in opened().layers:
        here = [one for one in at(layer) if one["expert"] is not None]
        for domain, documents in (("a", (0, 1)), ("b", (2, 3))):
            own = [slow.entropy(one) for one in here if one["document"] in documents]
            assert float(result.entropy.sel(layer=layer, domain=domain)) == pytest.approx(np.mean(own), abs=1e-5)
        choices = [{**one, "ids": [one["expert"]]} for one in here]
        expected = slow.load_balance(choices, layer, EXPERTS)
        assert float(result.load_balance.sel(layer=layer)) == pytest.approx(expected, abs=1e-5)


def test_equal_scores_have_the_entropy_and_the_balance_of_a_uniform_router():
    hf = build("zaya")
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if ".router_mlp.out_proj" in name:
                parameter.zero_()
    with moe.wrap(hf, StubTokenizer()) as model:
        result = moe.routing(model, CORPUS, resamples=5)
    layers = ~np.isnan(result.entropy.values[0])
    assert layers.any()
    np.testing.assert_allclose(result.entropy.values[:, layers], float(result.entropy_baseline), atol=1e-5)
    np.testing.assert_allclose(result.load_balance.values[layers], 1.0, atol=1e-5)


def test_the_map_shows_no_expert_where_there_is_none():
    text = CORPUS.texts[1]
    result = moe.routing_map(opened(), text)
    for layer in opened().layers:
        expected = [-1 if one["expert"] is None else one["expert"] for one in at(layer, document=1)]
        assert result.heaviest_expert.sel(layer=layer).values.tolist() == expected
        skips = np.array(expected) < 0
        np.testing.assert_array_equal(np.isnan(result.heaviest_share.sel(layer=layer)), skips)
    shown = figures.routing_map(result).data[0].text
    np.testing.assert_array_equal(shown == "–", result.heaviest_expert.values.T < 0)


def test_vocabulary_and_its_null_are_of_tokens_that_take_experts():
    result = moe.vocabulary_specialization(opened(), CORPUS, at_least=3)
    for layer in opened().layers:
        here = [one for one in at(layer) if one["expert"] is not None]
        load = np.bincount([one["expert"] for one in here], minlength=EXPERTS) / len(here)
        null, values, chances = stats.largest_share_null(stats.inclusion_weights(load), 1), [], []
        for token in result.token_id.values.tolist():
            ids = [one["expert"] for one in here if one["token"] == token]
            share = float(result.share.sel(layer=layer, token_id=token))
            if not ids:
                assert np.isnan(share)
                continue
            values.append(max(map(ids.count, ids)) / len(ids))
            chances.append(float(null(np.array([len(ids)]))[0]))
            assert share == pytest.approx(values[-1])
            assert float(result.share_null.sel(layer=layer, token_id=token)) == pytest.approx(chances[-1])
        assert float(result.specialization.sel(layer=layer)) == pytest.approx(np.mean(values))
        assert float(result.gain.sel(layer=layer)) == pytest.approx(np.mean(values) - np.mean(chances))


def test_shares_by_label_are_of_tokens_that_take_experts():
    result = moe.routing_by_label(opened(), CORPUS, "kind", resamples=5)
    names, numbers = label_tokens(opened(), CORPUS, "kind")
    for layer in opened().layers:
        for place, label in enumerate(names):
            own = [o for o in at(layer) if numbers[o["document"]][o["at"]] == place and o["expert"] is not None]
            for expert in range(EXPERTS):
                share = float(result.specialization.sel(label=label, layer=layer, expert=expert))
                expected = sum(o["expert"] == expert for o in own) / len(own) if own else np.nan
                assert share == pytest.approx(expected, nan_ok=True)
    total = result.specialization.sum("expert", skipna=False).values
    np.testing.assert_allclose(total[~np.isnan(total)], 1.0)


def test_saturation_is_of_tokens_that_take_experts_in_the_end():
    with moe.wrap(build("zaya", seed=3), StubTokenizer()) as other:
        result = moe.router_saturation([other, opened()], CORPUS, tokens_per_document=99, resamples=5)
        for layer in opened().layers:
            kept, both = 0, 0
            for document, text in enumerate(CORPUS.texts):
                before = other.run(text).routing[layer]
                for one in at(layer, document=document):
                    kept += one["expert"] is not None
                    same = one["expert"] == int(before.ids[0, one["at"], 0])
                    both += one["expert"] is not None and bool(before.mask[0, one["at"]]) and same
            assert float(result.saturation.sel(layer=layer)[0]) == pytest.approx(both / kept)
            assert float(result.saturation.sel(layer=layer)[1]) == 1.0
