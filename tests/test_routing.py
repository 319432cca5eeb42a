"""Routing: the accumulator and the Dataset against loops over tokens, on random runs and on tiny models."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_interp as moe
from moe_interp import results, stats
from moe_interp.analyses.exact import add_fixed
from moe_interp.analyses.routing import RoutingCounts, routing
from moe_interp.analyses.routing_map import routing_map
from moe_interp.data import Corpus
from moe_interp.errors import BadCheckpoint, BadInput
from moe_interp.run import Routing, Run, Tokens
from tests.random_runs import EXPERTS, LAYERS, TOP_K, choices_of, random_run
from tests.reference import routing as slow
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

SEEDS = st.integers(0, 2**32 - 1)


def counted(documents: int, *runs: tuple[Run, list[int]]) -> RoutingCounts:
    sums = RoutingCounts.empty(documents, LAYERS, EXPERTS, TOP_K)
    for run, rows in runs:
        sums.update(run, np.array(rows))
    return sums


def assert_equal(left: RoutingCounts, right: RoutingCounts) -> None:
    for name, values in left.state().items():
        np.testing.assert_array_equal(values, right.state()[name], err_msg=name)


def some_runs(seed: int) -> list[tuple[Run, list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        (random_run(seed + i, rng.integers(1, 7, size=3).tolist()), rng.integers(0, 4, size=3).tolist())
        for i in range(3)
    ]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_sums_equal_loops_over_tokens(padding):
    runs = [(random_run(1, [5, 1, 4], padding), [2, 0, 2]), (random_run(2, [3, 6], padding), [1, 0])]
    sums = counted(3, *runs)
    choices = [choice for run, rows in runs for choice in choices_of(run, rows)]
    assert sums.tokens.tolist() == [7, 3, 9]
    for document in range(3):
        for index, layer in enumerate(LAYERS):
            own = [c for c in choices if c["document"] == document and c["layer"] == layer]
            for expert in range(EXPERTS):
                assert sums.counts[document, index, expert] == slow.count(own, document, layer, expert)
                weight = sum(w for c in own for e, w in zip(c["ids"], c["weights"], strict=True) if e == expert)
                assert sums.weights[document, index, expert] / 2**32 == pytest.approx(weight, abs=1e-8)
                score = sum(c["scores"][expert] for c in own)
                assert sums.scores[document, index, expert] / 2**32 == pytest.approx(score, abs=1e-8)
            for place, (name, of) in enumerate(slow.PER_TOKEN.items()):
                total = sums.per_token[document, index, place] / 2**32
                assert total == pytest.approx(sum(map(of, own)), abs=1e-7), name


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_merging_is_associative_commutative_and_equals_one_pass(seed):
    runs = some_runs(seed)
    one, two, three = (counted(4, run) for run in runs)
    whole = counted(4, *runs)
    assert_equal(one.merge(two).merge(three), whole)
    assert_equal(one.merge(two.merge(three)), whole)
    assert_equal(three.merge(one).merge(two), whole)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.permutations(range(3)))
def test_the_order_of_batches_is_irrelevant(seed, order):
    runs = some_runs(seed)
    assert_equal(counted(4, *[runs[i] for i in order]), counted(4, *runs))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 5))
def test_padding_and_batching_never_count(seed, more):
    run = random_run(seed, [4, 2])
    alone = counted(2, (run, [0, 1]))
    split = [
        Run(
            run.logits[row : row + 1],
            None,
            Tokens.from_mask(run.mask[row : row + 1], run.mask.shape[1]),
            {
                layer: Routing(
                    *(getattr(route, name)[row : row + 1] for name in ("ids", "weights", "mask", "logits", "scores"))
                )
                for layer, route in run.routing.items()
            },
            {},
        )
        for row in range(2)
    ]
    assert_equal(counted(2, (split[1], [1]), (split[0], [0])), alone)
    wider = {
        layer: Routing(
            torch.nn.functional.pad(route.ids, (0, 0, 0, more)),
            torch.nn.functional.pad(route.weights, (0, 0, 0, more), value=9.0),
            torch.nn.functional.pad(route.mask, (0, more)),
            torch.nn.functional.pad(route.logits, (0, 0, 0, more), value=9.0),
            torch.nn.functional.pad(route.scores, (0, 0, 0, more), value=9.0),
        )
        for layer, route in run.routing.items()
    }
    mask = wider[LAYERS[0]].mask
    padded = Run(torch.zeros(*mask.shape, 1), None, Tokens.from_mask(mask, mask.shape[1]), wider, {})
    assert_equal(counted(2, (padded, [0, 1])), alone)


def test_a_stored_state_goes_on_where_it_was(tmp_path):
    first, second = some_runs(5)[:2]
    np.savez(tmp_path / "state.npz", **counted(4, first).state())
    with np.load(tmp_path / "state.npz") as stored:
        resumed = RoutingCounts.from_state(stored)
    resumed.update(second[0], np.array(second[1]))
    assert_equal(resumed, counted(4, first, second))


def test_counts_over_something_else_are_not_merged():
    with pytest.raises(BadInput, match=r"cannot merge RoutingCounts: expected .*'counts': \(2, 2, 6\)"):
        RoutingCounts.empty(2, LAYERS, 6, 3).merge(RoutingCounts.empty(3, LAYERS, 6, 3))
    with pytest.raises(BadInput, match="cannot merge"):
        RoutingCounts.empty(2, LAYERS, 6, 3).merge(RoutingCounts.empty(2, (0, 3), 6, 3))


def test_a_run_without_the_routers_values_is_an_error():
    run = random_run(0, [3])
    route = run.routing[1]
    bare = Run(run.logits, None, run.tokens, dict.fromkeys(LAYERS, Routing(route.ids, route.weights, route.mask)), {})
    with pytest.raises(BadInput, match="routing counts need the router's values"):
        counted(1, (bare, [0]))


@pytest.mark.parametrize("name", ["weights", "logits", "scores"])
def test_router_values_that_are_not_finite_are_an_error(name):
    run = random_run(0, [3])
    getattr(run.routing[3], name)[0, 1, 0] = torch.nan
    with pytest.raises(BadCheckpoint, match="the router gave values that are not finite"):
        counted(1, (run, [0]))


# The Dataset of random runs

DOMAINS = ("prose", "code")
GROUPS = np.array([0, 1, 0, 1, 1, 0])


@cache
def random_result() -> tuple[xr.Dataset, list[dict], RoutingCounts]:
    runs = [(random_run(10 + i, [7, 4, 6]), rows) for i, rows in enumerate(([0, 1, 2], [3, 4, 5], [5, 1, 0]))]
    sums = counted(6, *runs)
    choices = [choice for run, rows in runs for choice in choices_of(run, rows)]
    return sums.result(GROUPS, DOMAINS, provenance={"model": "random"}, resamples=50, seed=2), choices, sums


def test_where_every_expert_is_chosen_there_is_no_margin():
    with moe.wrap(build("mixtral", num_experts_per_tok=8), StubTokenizer()) as model:
        corpus = Corpus.from_texts({"a": ["ab cd", "ef gh"]})
        found = routing(model, corpus, resamples=5)
        with moe.RoutingWatch(model, every=1) as watch, watch.step(0):
            model.hf(torch.arange(3, 9)[None])
    assert np.isnan(found.margin).all() and np.isnan(found.margin_interval).all()
    assert np.isnan(watch.table().margin).all()
    np.testing.assert_allclose(found.specialization, 1.0)
    assert float(found.max_vio_overall.max()) == 0.0


def documents_of(domain: str) -> list[int]:
    return np.flatnonzero(GROUPS == DOMAINS.index(domain)).tolist()


def test_every_ratio_equals_loops_over_tokens():
    dataset, choices, _ = random_result()
    for domain in DOMAINS:
        own = documents_of(domain)
        for layer in LAYERS:
            here = dataset.sel(domain=domain, layer=layer)
            for expert in range(EXPERTS):
                one = here.sel(expert=expert)
                special = slow.specialization(choices, own, layer, expert)
                assert float(one.specialization) == pytest.approx(special)
                assert float(one.utilisation) == pytest.approx(special / TOP_K)
                share = slow.weight_share(choices, own, layer, expert)
                assert float(one.weight_share) == pytest.approx(share, rel=1e-8)
            for name in slow.PER_TOKEN:
                mean = slow.mean_per_token(name, choices, own, layer)
                assert float(here[name]) == pytest.approx(mean, rel=1e-7), name


def test_every_load_statistic_equals_loops_by_domain_and_over_all():
    dataset, _, _ = random_result()
    for layer in LAYERS:
        loads = [dataset.counts.sel(domain=domain, layer=layer).values.tolist() for domain in DOMAINS]
        for name, of in slow.LOAD.items():
            for domain, load in zip(DOMAINS, loads, strict=True):
                assert float(dataset[name].sel(domain=domain, layer=layer)) == pytest.approx(of(load)), name
            overall = of([sum(column) for column in zip(*loads, strict=True)])
            assert float(dataset[f"{name}_overall"].sel(layer=layer)) == pytest.approx(overall), name
        expected = slow.divergence_from_rest(loads)
        np.testing.assert_allclose(dataset.divergence.sel(layer=layer), expected, rtol=1e-9)


def test_load_balance_losses_equal_loops_on_paper_and_as_coded():
    dataset, choices, _ = random_result()
    for layer in LAYERS:
        expected = slow.load_balance(choices, layer, EXPERTS)
        assert float(dataset.load_balance.sel(layer=layer)) == pytest.approx(expected, rel=1e-8)
    as_coded = slow.load_balance_as_coded(choices, EXPERTS)
    assert float(dataset.load_balance_as_coded) == pytest.approx(as_coded, rel=1e-8)


def test_as_coded_is_what_transformers_computes():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    draw = torch.Generator().manual_seed(3)
    mask = torch.ones(2, 9, dtype=torch.bool)
    routes, logits = {}, []
    for layer in LAYERS:
        logits.append(torch.randn(2, 9, EXPERTS, generator=draw))
        scores = logits[-1].softmax(dim=-1)
        weights, ids = scores.topk(TOP_K)
        routes[layer] = Routing(ids, weights, mask, logits[-1], scores)
    run = Run(torch.zeros(2, 9, 1), None, Tokens.from_mask(mask, 9), routes, {})
    dataset = counted(2, (run, [0, 1])).result(np.array([0, 1]), DOMAINS, provenance={}, resamples=2)
    theirs = load_balancing_loss_func(tuple(one.flatten(0, 1) for one in logits), EXPERTS, TOP_K)
    assert float(dataset.load_balance_as_coded) == pytest.approx(float(theirs), rel=1e-6)


def test_intervals_equal_resampled_ratios():
    dataset, _, sums = random_result()
    for number, domain in enumerate(DOMAINS):
        own = np.flatnonzero(GROUPS == number)
        draws = stats.resampling_weights(np.zeros(len(own), int), 50, 2 + number)
        tokens = sums.tokens[own].tolist()
        here = dataset.sel(domain=domain, layer=3)
        chose = sums.counts[own, 1, 4].tolist()
        expected = slow.bootstrap_interval(chose, tokens, draws, 0.95)
        np.testing.assert_allclose(here.specialization_interval.sel(expert=4), expected, rtol=1e-9)
        np.testing.assert_allclose(here.utilisation_interval.sel(expert=4), np.array(expected) / 3, rtol=1e-9)
        for place, name in enumerate(slow.PER_TOKEN):
            values = (sums.per_token[own, 1, place] / 2**32).tolist()
            expected = slow.bootstrap_interval(values, tokens, draws, 0.95)
            np.testing.assert_allclose(here[f"{name}_interval"], expected, rtol=1e-9, err_msg=name)
        weight = (sums.weights[own, 1] / 2**32).tolist()
        expected = slow.bootstrap_interval([row[4] for row in weight], [sum(row) for row in weight], draws, 0.95)
        np.testing.assert_allclose(here.weight_share_interval.sel(expert=4), expected, rtol=1e-9)
    draws = stats.resampling_weights(GROUPS, 50, 2)
    overall = slow.bootstrap_interval(sums.counts[:, 0, 2].tolist(), sums.tokens.tolist(), draws, 0.95, GROUPS)
    found = dataset.utilisation_overall_interval.sel(layer=1, expert=2)
    np.testing.assert_allclose(found, np.array(overall) / TOP_K, rtol=1e-9)


def test_tests_and_debiased_estimates_are_those_of_stats():
    dataset, _, sums = random_result()
    p, _ = stats.permutation_max(stats.share_difference, sums.counts, GROUPS, 2, permutations=50, seed=2)
    np.testing.assert_array_equal(dataset.specialization_p, p)
    p, null = stats.permutation_max(stats.jensen_shannon, sums.counts, GROUPS, 2, permutations=50, seed=2)
    np.testing.assert_array_equal(dataset.divergence_p, p)
    np.testing.assert_array_equal(dataset.divergence_null, null)
    for layer in range(2):
        expected = slow.jackknife(slow.divergence_from_rest, sums.counts[:, layer].tolist(), GROUPS, 2)
        np.testing.assert_allclose(dataset.divergence_debiased[:, layer], expected, rtol=1e-9)
    assert (dataset.n50_debiased >= dataset.n50 - 3).all()
    assert not dataset.n90_debiased.isnull().any()


def test_a_random_run_survives_a_file(tmp_path):
    dataset, _, _ = random_result()
    xr.testing.assert_identical(results.load(results.save(dataset, tmp_path / "routing.nc")), dataset)
    assert results.provenance_of(dataset) == {
        "model": "random",
        "tokens": 51,
        "top_k": 3,
        "resamples": 50,
        "seed": 2,
    }


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.permutations(range(EXPERTS)))
def test_permuting_experts_permutes_the_result(seed, order):
    run = random_run(seed, [6, 5, 7, 4])
    to = torch.tensor(order)  # expert e becomes order[e]
    moved = {
        layer: Routing(
            to[route.ids],
            route.weights,
            route.mask,
            route.logits[..., to.argsort()],
            route.scores[..., to.argsort()],
        )
        for layer, route in run.routing.items()
    }
    groups = np.array([0, 0, 1, 1])
    before, after = (
        counted(4, (one, [0, 1, 2, 3])).result(groups, DOMAINS, provenance={}, resamples=20)
        for one in (run, Run(run.logits, None, run.tokens, moved, {}))
    )
    expected = before.isel(expert=np.argsort(order)).assign_coords(expert=before.expert)
    xr.testing.assert_allclose(after, expected, rtol=1e-9)


def uniform_run(seed: int, documents: int, length: int, experts: int, top_k: int) -> Run:
    """Every token draws K distinct experts uniformly; all scores, weights and logits are equal."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(documents, length, dtype=torch.bool)
    routes = {}
    for layer in LAYERS:
        ids = torch.rand(documents, length, experts, generator=draw).argsort(dim=-1)[..., :top_k]
        level = torch.full((documents, length, experts), 1 / experts)
        routes[layer] = Routing(ids, torch.full(ids.shape, 1 / top_k), mask, torch.zeros_like(level), level)
    return Run(torch.zeros(documents, length, 1), None, Tokens.from_mask(mask, length), routes, {})


def test_a_uniform_router_gives_every_baseline():
    experts, top_k, documents = 16, 4, 40
    sums = RoutingCounts.empty(documents, LAYERS, experts, top_k)
    sums.update(uniform_run(0, documents, 250, experts, top_k), np.arange(documents))
    dataset = sums.result(np.arange(documents) % 2, DOMAINS, provenance={}, resamples=200)
    for name in ("specialization", "utilisation"):
        baseline = float(dataset[f"{name}_baseline"])
        assert baseline == (top_k if name == "specialization" else 1) / experts
        np.testing.assert_allclose(dataset[name], baseline, rtol=0.12)
        low, high = dataset[f"{name}_interval"]
        assert 0.85 < ((low <= baseline) & (high >= baseline)).mean() <= 1
    np.testing.assert_allclose(dataset.weight_share, 1 / experts, rtol=0.12)
    np.testing.assert_allclose(dataset.entropy, np.log(experts))
    np.testing.assert_allclose(dataset.entropy_baseline, np.log(experts))
    np.testing.assert_allclose(dataset.load_balance, 1.0, rtol=1e-8)
    np.testing.assert_allclose(dataset.load_balance_as_coded, top_k, rtol=1e-8)
    np.testing.assert_allclose(dataset.z_loss, np.log(experts) ** 2, rtol=1e-8)
    np.testing.assert_allclose(dataset.margin, 0, atol=1e-9)
    np.testing.assert_allclose(dataset.weight_sum, 1, rtol=1e-8)
    for name in ("gini", "load_entropy", "max_vio", "cv2", "n50", "n90", "dead_experts"):
        control = dataset[f"{name}_uniform"].values
        np.testing.assert_allclose(dataset[name].mean("layer"), control, rtol=0.35, atol=0.01, err_msg=name)
    assert (dataset.specialization_p > 0.01).all()
    assert abs(float(dataset.divergence_debiased.mean())) < 0.2 * float(dataset.divergence.mean())
    np.testing.assert_allclose(dataset.divergence_null, dataset.divergence, rtol=0.8)


def test_one_domain_or_one_document_has_no_comparison_but_everything_else():
    sums = counted(1, (random_run(0, [5]), [0]))
    dataset = sums.result(np.array([0]), ["all"], provenance={}, resamples=5)
    for name in ("specialization_p", "divergence", "divergence_p", "specialization_interval", "n50_debiased"):
        assert dataset[name].isnull().all(), name
    assert not dataset.specialization.isnull().any()
    assert not dataset.entropy.isnull().any()


# Tiny models

TEXTS = {
    "plain": ["The cat sat", "mu", "x y z", "so it goes on"],
    "code": ["f(x) = 2", "if a:", "y += 1", "no"],
}
CORPUS = Corpus.from_texts(TEXTS, source="texts")


class Characters(StubTokenizer):
    """Takes a list of one text too, as `MoEModel.run` passes it."""

    def __call__(self, text, verbose=True, return_tensors=None, padding=False):
        if isinstance(text, str):
            return super().__call__(text)
        ids = torch.tensor([super(Characters, self).__call__(one)["input_ids"] for one in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@cache
def model_of(family: str) -> moe.MoEModel:
    return moe.wrap(build(family), Characters(), name=family)


@cache
def choices_in(family: str) -> list[dict]:
    """One unpadded run per document."""
    model, found = model_of(family), []
    for document, text in enumerate(CORPUS.texts):
        run = model.run(text, read=["router_logits", "router_scores"])
        found += choices_of(run, [document])
    return found


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_routing_of_a_corpus_equals_loops_over_single_texts(family):
    model, choices = model_of(family), choices_in(family)
    dataset = routing(model, CORPUS, resamples=20, batch_tokens=24)
    assert dataset.layer.values.tolist() == list(model.layers)
    assert dataset.domain.values.tolist() == ["plain", "code"]
    assert dataset.tokens.values.tolist() == [sum(map(len, texts)) for texts in TEXTS.values()]
    assert dataset.documents.values.tolist() == [4, 4]
    for number, domain in enumerate(TEXTS):
        own = np.flatnonzero(CORPUS.labels == number).tolist()
        for layer in model.layers:
            here = dataset.sel(domain=domain, layer=layer)
            expected = [slow.specialization(choices, own, layer, e) for e in range(8)]
            np.testing.assert_allclose(here.specialization, expected, rtol=1e-12)
            expected = [slow.weight_share(choices, own, layer, e) for e in range(8)]
            np.testing.assert_allclose(here.weight_share, expected, rtol=1e-5, atol=1e-8)
            for name in slow.PER_TOKEN:
                mean = slow.mean_per_token(name, choices, own, layer)
                assert float(here[name]) == pytest.approx(mean, rel=1e-5, abs=1e-6), name
    assert results.provenance_of(dataset)["model"] == family
    assert results.provenance_of(dataset) | {
        "data": "texts",
        "documents": 8,
        "truncated": 0,
        "resamples": 20,
    } == (results.provenance_of(dataset))


def test_routing_says_how_many_documents_were_cut():
    dataset = routing(model_of("olmoe"), CORPUS, resamples=2, max_tokens=5)
    assert results.provenance_of(dataset)["truncated"] == 4
    assert dataset.tokens.values.tolist() == [17, 17]


def test_the_size_of_batches_changes_no_count():
    one, many = (routing(model_of("deepseek_v3"), CORPUS, resamples=2, batch_tokens=size) for size in (1, 4096))
    xr.testing.assert_equal(one.counts, many.counts)
    xr.testing.assert_allclose(one.z_loss, many.z_loss, rtol=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_routing_map_shows_the_heaviest_expert_of_every_token(family):
    model, text = model_of(family), "The cat sat"
    found = routing_map(model, text)
    assert found.token.values.tolist() == list(text)
    run = model.run(text)
    for layer in model.layers:
        for place in range(len(text)):
            weights, ids = (getattr(run.routing[layer], name)[0, place].tolist() for name in ("weights", "ids"))
            one = found.sel(pos=place, layer=layer)
            assert int(one.heaviest_expert) == ids[weights.index(max(weights))]
            assert float(one.heaviest_share) == pytest.approx(max(weights) / sum(weights))


def test_routing_map_survives_a_file_whatever_the_tokens(tmp_path):
    class Strange(Characters):
        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            return "a\0<b>"

    model = moe.wrap(build("olmoe"), Strange())
    found = routing_map(model, "ab")
    assert found.token.values.tolist() == ["a␀<b>"] * 2
    xr.testing.assert_identical(results.load(results.save(found, tmp_path / "map.nc")), found)


def test_sums_that_64_bits_do_not_hold_are_refused_and_not_wrapped():
    run = random_run(0, [5])
    routing = run.routing[LAYERS[0]]
    for size, what in ((1e5, "too large to be summed"), (3e4, "sums over a document are too large")):
        broken = replace(routing, logits=torch.full_like(routing.logits, size))
        sums = RoutingCounts.empty(1, LAYERS, EXPERTS, TOP_K)
        with pytest.raises(BadCheckpoint, match=what):
            sums.update(replace(run, routing={**run.routing, LAYERS[0]: broken}), np.array([0]))
    big = replace(routing, logits=torch.full_like(routing.logits, 2e4))  # 5 * 4e8: 2^31 is passed by the second
    sums = RoutingCounts.empty(1, LAYERS, EXPERTS, TOP_K)
    sums.update(replace(run, routing={**run.routing, LAYERS[0]: big}), np.array([0]))
    before = sums.per_token.copy()
    with pytest.raises(BadCheckpoint, match="sums over a document are too large"):
        sums.update(replace(run, routing={**run.routing, LAYERS[0]: big}), np.array([0]))
    assert np.array_equal(sums.per_token[:, 0], before[:, 0])
    total = np.zeros((2, 1), np.int64)
    add_fixed(total, np.array([0, 1, 1]), np.array([[1], [2], [4]]))
    assert total.tolist() == [[1], [6]]
