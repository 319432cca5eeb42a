"""Layers that choose different numbers of experts: every figure of a layer is of its own K, against loops over tokens.

A second check needs no reference: a layer alone, counted with its K, gives what it gives among the others.
"""

from functools import cache

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp.analyses.coactivation import PairCounts
from moe_interp.analyses.labels import LabelCounts
from moe_interp.analyses.routing import RoutingCounts
from moe_interp.analyses.saturation import router_saturation, saturation_of_ids
from moe_interp.analyses.token_counts import TokenCounts
from moe_interp.analyses.transitions import TransitionCounts
from moe_interp.analyses.vocabulary import vocabulary_result
from moe_interp.data import Corpus
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.results import provenance_of
from tests.random_runs import choices_of
from tests.reference import routing as slow
from tests.reference import together
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build as build_tiny
from tests.tiny_types import build

TOP_K, EXPERTS = (3, 1, 2, 3), 8
CORPUS = Corpus.from_texts({"a": ["ab cd ef gh" * 2, "hello there"], "b": ["one two three" * 2, "xyz uvw"]})
DOMAINS = {"a": {0, 1}, "b": {2, 3}}


@cache
def opened():
    return moe.wrap(build("hunyuan_v1_moe", moe_topk=list(TOP_K)), StubTokenizer())


@cache
def choices():
    found = []
    for document, text in enumerate(CORPUS.texts):
        run = opened().run(text, read=["router_logits", "router_scores"])
        found += choices_of(run, [document])
    return found


@cache
def routed():
    return moe.routing(opened(), CORPUS, resamples=20)


@pytest.mark.parametrize("layer", range(4))
def test_routing_equals_loops_over_tokens(layer):
    result, here = routed().sel(layer=layer), [c for c in choices() if c["layer"] == layer]
    for name, documents in DOMAINS.items():
        at = result.sel(domain=name)
        expected = [slow.specialization(here, documents, layer, e) for e in range(EXPERTS)]
        np.testing.assert_allclose(at.specialization, expected)
        np.testing.assert_allclose(at.utilisation, np.array(expected) / TOP_K[layer])
        for measure in slow.PER_TOKEN:
            expected = slow.mean_per_token(measure, here, documents, layer)
            assert float(at[measure]) == pytest.approx(expected, abs=1e-6), measure
    assert float(result.load_balance) == pytest.approx(slow.load_balance(here, layer, EXPERTS), abs=1e-6)
    assert float(result.specialization_baseline) == TOP_K[layer] / EXPERTS
    assert np.array_equal(result.utilisation_overall.sum(), 1.0)


def test_the_uniform_router_has_the_k_of_the_layer():
    even = routed()["max_vio_uniform"].mean("domain").values
    assert even[1] > even[2] > even[0] == even[3]  # fewer draws are less even
    assert provenance_of(routed())["top_k"] == "3, 1, 2, 3"


def test_a_watched_training_gives_each_layer_its_own_k():
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    hf = opened().hf
    with moe.RoutingWatch(hf, every=1) as watch, watch.step(0):
        hf(input_ids=ids)
    run, report = opened().run(ids, read=["router_logits", "router_scores"]), watch.table().isel(step=0)
    found = choices_of(run, [0, 0])
    for layer in range(4):
        for name in ("heaviest_weight", "entropy", "weight_sum"):
            expected = slow.mean_per_token(name, found, {0}, layer)
            assert float(report[name].sel(layer=layer)) == pytest.approx(expected, abs=1e-6), name


@pytest.mark.parametrize("layer", range(4))
def test_nulls_of_pairs_are_of_the_layers_own_k(layer):
    result = moe.coactivation(opened(), CORPUS, resamples=5).sel(layer=layer)
    here = [c for c in choices() if c["layer"] == layer]
    loads = [slow.specialization(here, {0, 1, 2, 3}, layer, e) for e in range(EXPERTS)]
    chances = together.pair_chances(loads, TOP_K[layer])
    for one, other in ((0, 1), (2, 5), (3, 7)):
        if loads[one] and loads[other]:
            expected = chances[one, other] / (loads[one] * loads[other])
            assert float(result.lift_load[one, other]) == pytest.approx(expected, abs=1e-4)
    k = TOP_K[layer]
    assert float(result.lift_uniform) == pytest.approx((k - 1) * EXPERTS / (k * (EXPERTS - 1)))
    assert float(result.coactivation_uniform) == pytest.approx((k - 1) / (EXPERTS - 1))


def test_overlap_takes_as_many_experts_as_the_layer_has_slots():
    result = moe.token_identity(opened(), CORPUS, at_least=1, folds=2, resamples=5)
    folds = [{0, 2}, {1, 3}]
    for layer in range(4):
        here = [c for c in choices() if c["layer"] == layer]
        hits = total = 0
        for own, others in (folds, folds[::-1]):
            busy = [sum(e in c["ids"] for c in here if c["document"] in others) for e in range(EXPERTS)]
            best = sorted(range(EXPERTS), key=lambda e: -busy[e])[: TOP_K[layer]]
            known = {c["token"] for c in here if c["document"] in others}
            for c in here:
                if c["document"] in own and c["token"] in known:
                    hits, total = hits + len(set(best) & set(c["ids"])), total + TOP_K[layer]
        assert float(result.overlap_load.sel(layer=layer)) == pytest.approx(hits / total)


def accumulated(layers, top_k):
    """Every accumulator over these layers, fed with the corpus."""
    sums = {
        "routing": RoutingCounts.empty(4, layers, EXPERTS, top_k),
        "pairs": PairCounts.empty(layers, EXPERTS, top_k, blocks=2),
        "tokens": TokenCounts.empty(layers, EXPERTS, top_k, 96, folds=2),
        "labels": LabelCounts.empty(4, 2, layers, EXPERTS, top_k, [np.arange(40) % 2] * 4),
    }
    for document, text in enumerate(CORPUS.texts):
        run = opened().run(text, read=["router_logits", "router_scores"])
        for one in sums.values():
            one.update(run, np.array([document]))
    how = {"provenance": {}, "resamples": 9}
    return {
        "routing": sums["routing"].result(CORPUS.labels, CORPUS.domains, **how),
        "pairs": sums["pairs"].result(**how),
        "tokens": vocabulary_result(sums["tokens"], StubTokenizer(), provenance={}, at_least=2),
        "labels": sums["labels"].result(["even", "odd"], **how),
    }


@pytest.mark.parametrize("layer", [1, 2])
def test_a_layer_alone_gives_what_it_gives_among_the_others(layer):
    whole, alone = accumulated(range(4), TOP_K), accumulated([layer], TOP_K[layer])
    for name, result in whole.items():
        for variable in set(result.data_vars) - {"divergence_p", "load_balance_as_coded"}:  # of all layers together
            some = result[variable].sel(layer=layer) if "layer" in result[variable].dims else result[variable]
            one = alone[name][variable].squeeze("layer") if "layer" in alone[name][variable].dims else None
            one = alone[name][variable] if one is None else one
            np.testing.assert_array_equal(some.values, one.values, err_msg=f"{name} {variable}")


def test_flows_tell_the_tokens_of_layers_with_different_k():
    result = moe.transitions(opened(), CORPUS)
    assert provenance_of(result)["tokens"] == sum(map(len, CORPUS.texts))
    assert TransitionCounts.empty((0, 1), EXPERTS, 2).top_k == (2, 2)
    with pytest.raises(BadInput, match="top_k does not fit: expected a K, or one for each of 2 layers"):
        TransitionCounts.empty((0, 1), EXPERTS, (2, 2, 2))


def test_saturation_compares_as_many_experts_as_the_layer_has_slots():
    rng = np.random.default_rng(0)
    ids = rng.random((2, 12, 2, 8)).argsort(axis=-1)[..., :3]
    ids[:, :, 1, 1:] = -1  # a layer of one slot
    ids[0, 3, 0] = -1  # a token that skips all experts at first
    ids[1, 5, 0] = -1  # one that does so in the end
    documents = np.repeat([0, 1, 2], 4)
    result = saturation_of_ids(ids, documents, steps=[1, 2], layers=[0, 1], experts=8, provenance={}, resamples=9)
    for layer, k in enumerate((3, 1)):
        sets = [[{e for e in row if e >= 0} for row in ids[step, :, layer].tolist()] for step in range(2)]
        kept = [t for t in range(12) if sets[1][t]]
        expected = sum(len(sets[0][t] & sets[1][t]) / k for t in kept) / len(kept)
        assert float(result.saturation[0, layer]) == pytest.approx(expected)
        assert float(result.saturation[1, layer]) == 1.0
        first = [sum(e in row for row in sets[0]) / 12 for e in range(8)]
        last = [sum(e in sets[1][t] for t in kept) / len(kept) for e in range(8)]
        independent = sum(a * b for a, b in zip(first, last, strict=True)) / k
        assert float(result.independent[0, layer]) == pytest.approx(independent)
    np.testing.assert_allclose(result.saturation_baseline, [3 / 8, 1 / 8])
    same = router_saturation([opened(), opened()], CORPUS, resamples=5)
    assert np.array_equal(same.saturation, np.ones((2, 4)))


def test_one_layer_at_a_time_has_the_perplexity_of_its_own_k():
    result = moe.perplexity(opened(), CORPUS, per_layer=True, resamples=5).sel(aggregate="token")
    for layer, k in enumerate(TOP_K):
        assert float(result.ratio_overall.sel(layer=layer, k=k)) == 1.0
        random = result.ratio_random_overall.sel(layer=layer).values
        assert np.array_equal(np.isnan(random), np.arange(1, 4) > k)


def test_layers_that_cannot_stand_beside_each_other_are_refused():
    with pytest.raises(BadInput, match="not the same share in every layer: .* got K = 3, 1, 2, 3. .*per_layer=True"):
        moe.perplexity(opened(), CORPUS)
    with pytest.raises(BadInput, match=r"layers with different parts: .* Ask for them apart: layers=\[...\]"):
        moe.ensemble_similarity(opened(), CORPUS)
    served = moe.ensemble_similarity(opened(), CORPUS, layers=[0, 3], resamples=5)
    np.testing.assert_allclose(served.error_overall.sel(kept="heaviest", k=3), 0.0, atol=1e-6)


def test_the_k_of_vision_experts_is_not_the_texts():
    vision = build("dots3_note").config.vision_config
    vision.num_experts_per_tok = 4
    model = moe.wrap(build("dots3_note", vision_config=vision), StubTokenizer())
    assert {model.spec.moe(layer).top_k for layer in model.spec.moe_layers} == {3, 4}
    total = moe.routing(model, CORPUS, resamples=5).specialization.sum("expert")
    np.testing.assert_allclose(total, 3.0)


def test_a_widened_router_has_the_k_that_it_chooses():
    with moe.wrap(build_tiny("olmoe"), StubTokenizer()) as model, model.edit(moe.top_k(5, layers=1)):
        result = moe.routing(model, CORPUS, resamples=5)
    np.testing.assert_allclose(result.specialization.sum("expert")[0], [3, 5, 3, 3])


def test_layers_with_different_numbers_of_experts_are_refused():
    model = moe.wrap(build_tiny("olmoe"), StubTokenizer())
    object.__setattr__(model.spec.layers[1].moe, "num_experts", 7)
    says = (
        "layers with different numbers of experts: expected as many in every MoE layer, got 8 in layer 0, 7 in layer 1"
    )
    for analysis in (moe.routing, moe.norm_and_weight, moe.expert_similarity):
        with pytest.raises(UnsupportedModel, match=says):
            analysis(model, CORPUS)
    assert moe.norm_and_weight(model, CORPUS, layers=[0, 2]).sizes["expert"] == 8
