"""Experts by their outputs and weights: against the slow forward of tests.reference and loops over tokens."""

from functools import cache
from itertools import permutations

import numpy as np
import pytest
import torch
import xarray as xr

import moe_interp as moe
from moe_interp import results
from moe_interp.analyses import redundancy
from moe_interp.analyses import super_experts as super_experts_module
from moe_interp.analyses.collect import Options
from moe_interp.analyses.inputs import every_expert, sample_inputs
from moe_interp.analyses.neurons import neuron_lens
from moe_interp.analyses.norms import OutputSums, collect_outputs, norm_and_weight
from moe_interp.analyses.redundancy import expert_similarity
from moe_interp.analyses.shared_experts import shared_experts
from moe_interp.analyses.super_experts import super_experts, super_flags
from moe_interp.data import Corpus
from moe_interp.errors import BadCheckpoint, BadInput, UnknownName
from tests.reference.model import forward
from tests.reference.similarity import tokens_of
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build
from tests.tiny_types import build as build_type

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss")
TEXTS = {"plain": ["The cat", "mu on", "so it goes"], "code": ["f(x)=2", "if a:", "no, y"]}
CORPUS = Corpus.from_texts(TEXTS)
EXPERTS = 8


@cache
def model_of(family: str) -> moe.MoEModel:
    return moe.wrap(build(family), StubTokenizer(), name=family)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(StubTokenizer()(text)["input_ids"])


def points_of(model: moe.MoEModel, text: str, layer: int) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = forward(model.hf, torch.tensor([ids_of(text)])).points
    return {name: value[0] for (name, at), value in found.items() if at == layer}


# Sums of sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_outputs_equal_loops(family):
    model = model_of(family)
    sums, _ = collect_outputs(model, CORPUS, Options(batch_tokens=24))
    for index, layer in enumerate(model.layers):
        largest = np.zeros(EXPERTS)
        for document, text in enumerate(CORPUS.texts):
            count, norm, weight, both = np.zeros((4, EXPERTS))
            for token in tokens_of(model.hf, ids_of(text), layer, False):
                for expert, gate, output in zip(token.ids, token.weights, token.outputs, strict=True):
                    size = float(np.sqrt((output**2).sum()))
                    count[expert], norm[expert] = count[expert] + 1, norm[expert] + size
                    weight[expert], both[expert] = weight[expert] + gate, both[expert] + gate * size
                    largest[expert] = max(largest[expert], np.abs(output).max())
            assert sums.counts[document, index].tolist() == count.tolist()
            np.testing.assert_allclose(sums.norms[document, index] / 2**32, norm, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(sums.weights[document, index] / 2**32, weight, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(sums.contributions[document, index] / 2**32, both, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(sums.largest[index], largest, rtol=1e-5)


def test_sums_of_sizes_merge_and_resume(tmp_path):
    model = model_of("olmoe")
    runs = [(model.run(text, read="expert_out"), np.array([n])) for n, text in enumerate(CORPUS.texts)]

    def fed(*parts):
        sums = OutputSums.empty(len(CORPUS), model.layers, EXPERTS)
        for run, documents in parts:
            sums.update(run, documents)
        return sums

    whole = fed(*runs)
    merged = fed(*runs[4:]).merge(fed(*runs[:4]))
    np.savez(tmp_path / "state.npz", **fed(*runs[:3]).state())
    with np.load(tmp_path / "state.npz") as stored:
        resumed = OutputSums.from_state(stored)
    for run, documents in runs[3:]:
        resumed.update(run, documents)
    for other in (merged, resumed, fed(*reversed(runs))):
        for name, values in whole.state().items():
            np.testing.assert_array_equal(values, other.state()[name], err_msg=name)


def test_sums_that_are_too_large_to_be_exact_are_an_error():
    model = model_of("olmoe")
    run = model.run("ab cd ef", read="expert_out")
    norms = run["expert_out", 0].norm(dim=-1)
    run.values["expert_out", 0] *= float(2**30 / norms.max())  # each can be kept, some of their sums cannot
    with pytest.raises(BadCheckpoint, match="sums over a document are too large"):
        OutputSums.empty(1, model.layers, EXPERTS).update(run, np.array([0]))


def test_outputs_that_are_not_finite_are_an_error():
    model = model_of("olmoe")
    run = model.run("ab", read="expert_out")
    run.values["expert_out", 0][0, 1, 0, 3] = torch.inf
    with pytest.raises(BadCheckpoint, match="an expert gave values that are not finite"):
        OutputSums.empty(1, model.layers, EXPERTS).update(run, np.array([0]))


# All experts on sampled tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_writes_what_it_writes_when_it_is_chosen(family):
    model = model_of(family)
    layer = model.layers[-1]
    sample, _ = sample_inputs(model, CORPUS, (layer,), per_document=99)
    outputs = torch.cat(list(every_expert(model, layer, sample[layer].moe_in))).numpy()
    place = 0
    for document, text in enumerate(CORPUS.texts):
        points = points_of(model, text, layer)
        for t, token in enumerate(tokens_of(model.hf, ids_of(text), layer, True)):
            np.testing.assert_allclose(outputs[place], np.stack(token.everyone), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(sample[layer].scores[place], points["router_scores"][t], rtol=1e-4, atol=1e-6)
            assert set(sample[layer].chosen[place].nonzero().flatten().tolist()) == set(token.ids)
            assert sample[layer].documents[place] == document
            place += 1
    assert place == len(outputs)


def test_a_sample_depends_on_the_document_alone():
    model = model_of("olmoe")
    for per_document in (1, 2, 50):
        one, other = (
            sample_inputs(model, CORPUS, (0, 2), per_document=per_document, options=Options(batch_tokens=size))[0]
            for size in (8, 4096)
        )
        for layer in (0, 2):
            torch.testing.assert_close(one[layer].moe_in, other[layer].moe_in)
            lengths = [min(per_document, len(text)) for text in CORPUS.texts]
            assert np.bincount(one[layer].documents).tolist() == lengths


def rank(values: list[float]) -> list[float]:
    return [sum(other < one for other in values) + 1 for one in values]


def correlation(left: list[float], right: list[float]) -> float:
    a, b = np.array(left) - np.mean(left), np.array(right) - np.mean(right)
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_norm_and_weight_equal_loops_over_tokens(family):
    model, layer = model_of(family), 2
    result = norm_and_weight(model, CORPUS, layers=layer, tokens_per_document=99, resamples=50)
    rhos, sizes, scores = [], [], []
    for text in CORPUS.texts:
        points = points_of(model, text, layer)
        for t, token in enumerate(tokens_of(model.hf, ids_of(text), layer, True)):
            sizes.append([float(np.linalg.norm(output)) for output in token.everyone])
            scores.append(points["router_scores"][t].tolist())
            rhos.append(correlation(rank(sizes[-1]), rank(scores[-1])))
    here = result.sel(layer=layer)
    assert float(here.rank_correlation) == pytest.approx(np.mean(rhos), rel=1e-6)
    pooled = correlation(rank(np.ravel(sizes).tolist()), rank(np.ravel(scores).tolist()))
    assert float(here.rank_correlation_pooled) == pytest.approx(pooled, rel=1e-6)
    np.testing.assert_allclose(here.norm, np.mean(sizes, axis=0), rtol=1e-4)
    np.testing.assert_allclose(here.score, np.mean(scores, axis=0), rtol=1e-4)
    low, high = here.rank_correlation_interval
    assert low <= here.rank_correlation <= high


def test_pooling_can_flip_the_sign_and_ranks_within_tokens_do_not():
    from moe_interp.analyses.norms import _correlations

    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(50), 4)
    level = rng.normal(size=(200, 1))  # tokens with large outputs have flat scores
    size = np.exp(5 * level) * (1 + 0.1 * np.arange(6))
    score = np.exp(-3 * level) * (1 + 0.1 * np.arange(6))
    found = _correlations(size, score, documents, 100, 0)
    assert float(found["rank_correlation"]) == pytest.approx(1.0)
    assert float(found["rank_correlation_pooled"]) < -0.8


# Likeness


def naive_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased HSIC by sums over distinct tokens (Song et al. 2012, eq. 4), normalised."""

    def hsic(k, m):
        n = len(k)
        places = list(permutations(range(n), 2))
        first = sum(k[i, j] * m[i, j] for i, j in places) / len(places)
        triples = list(permutations(range(n), 3))
        second = sum(k[i, j] * m[i, q] for i, j, q in triples) / len(triples)
        fours = list(permutations(range(n), 4))
        third = sum(k[i, j] * m[q, r] for i, j, q, r in fours) / len(fours)
        return first + third - 2 * second

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_debiased_cka_is_that_of_sums_over_distinct_tokens():
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(3, 7, 4)) + rng.normal(size=(1, 7, 4))
    grams = redundancy._grams(torch.from_numpy(outputs))
    found = redundancy.cka(grams)
    for one in range(3):
        for other in range(3):
            assert found[one, other] == pytest.approx(naive_cka(outputs[one], outputs[other]), rel=1e-9)


def test_independent_outputs_have_a_cka_of_0_where_the_plain_estimate_has_not():
    rng = np.random.default_rng(2)
    outputs = rng.normal(size=(6, 128, 512))
    outputs[1] = outputs[0] @ np.linalg.qr(rng.normal(size=(512, 512)))[0] * 3  # rotated and scaled: alike
    found = redundancy.cka(redundancy._grams(torch.from_numpy(outputs)))
    assert found[0, 1] == pytest.approx(1.0)
    assert np.abs(found[2:, 2:][~np.eye(4, dtype=bool)]).max() < 0.05
    k = [x @ x.T - (x @ x.T).mean(axis=0) for x in outputs[2:4]]
    plain = (k[0] * k[1]).sum() / np.sqrt((k[0] ** 2).sum() * (k[1] ** 2).sum())
    assert plain > 0.5


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_cosines_of_outputs_and_router_rows_equal_loops(family):
    model, layer = model_of(family), 2
    result = expert_similarity(model, CORPUS, layers=layer, tokens=99, null_pairs=2).sel(layer=layer)
    total, count = np.zeros((EXPERTS, EXPERTS)), 0
    for text in CORPUS.texts:
        for token in tokens_of(model.hf, ids_of(text), layer, True):
            units = [output / np.linalg.norm(output) for output in token.everyone]
            total += np.array([[float(a @ b) for b in units] for a in units])
            count += 1
    router = model.hf.get_submodule(model.spec.moe(layer).router).weight.detach().double().numpy()
    for one in range(EXPERTS):
        for other in range(EXPERTS):
            if one == other:
                assert np.isnan(float(result.output_cosine.sel(expert=one, other=other)))
                continue
            here = result.sel(expert=one, other=other)
            assert float(here.output_cosine) == pytest.approx(total[one, other] / count, abs=1e-5)
            expected = router[one] @ router[other] / np.linalg.norm(router[one]) / np.linalg.norm(router[other])
            assert float(here.router_cosine) == pytest.approx(expected, abs=1e-6)
            low, high = here.output_cosine_interval
            assert low <= here.output_cosine <= high
    assert float(result.router_cosine_null) == 64**-0.5


def test_weights_are_compared_without_a_null_too():
    options = {"layers": 1, "tokens": 40}
    one, other = (expert_similarity(model_of("olmoe"), CORPUS, null_pairs=pairs, **options) for pairs in (0, 2))
    assert one.weights.equals(other.weights) and one.weights.notnull().any()
    assert one.weights_null.isnull().all() and other.weights_null.notnull().all()


def test_matching_finds_an_expert_whose_neurons_were_permuted():
    hf = build("olmoe")
    experts = hf.model.layers[1].mlp.experts
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate, up = experts.gate_up_proj[3].chunk(2)
        experts.gate_up_proj[6] = torch.cat([gate[order], up[order]])
        experts.down_proj[6] = experts.down_proj[3][:, order]
    with moe.wrap(hf, StubTokenizer()) as model:
        result = expert_similarity(model, CORPUS, layers=1, tokens=40, null_pairs=10)
    twin, other = result.sel(layer=1, expert=3, other=6), result.sel(layer=1, expert=3, other=5)
    assert float(twin.weights) == pytest.approx(1.0, abs=1e-5)
    assert float(twin.weights_unmatched) < 0.5
    assert float(twin.output_cosine) == pytest.approx(1.0, abs=1e-5)
    assert float(twin.output_cka) == pytest.approx(1.0, abs=1e-5)
    assert float(other.weights) == pytest.approx(float(result.weights_null[0]), abs=0.1)
    assert abs(float(other.output_cka)) < 0.4


def test_the_best_match_is_the_best_of_all_orders():
    rng = np.random.default_rng(4)
    left, right = (torch.from_numpy(rng.normal(size=(5, 6))).float() for _ in range(2))
    norms = left.norm() * right.norm()
    best = max(float((left * right[list(order)]).sum() / norms) for order in permutations(range(5)))
    assert redundancy.matched_cosine(left, right) == pytest.approx(best, rel=1e-5)


def test_similarity_without_weights_and_with_too_few_tokens():
    result = expert_similarity(model_of("olmoe"), CORPUS, layers=0, weights=False, tokens=20)
    assert result.weights.isnull().all()
    assert not result.output_cka.sel(expert=0, other=1).isnull().any()
    with pytest.raises(BadInput, match="too few tokens to compare outputs: expected five or more"):
        expert_similarity(model_of("olmoe"), Corpus.from_texts({"a": ["x"]}), tokens=1)
    with pytest.raises(BadInput, match="expected five or more, got 3"):
        expert_similarity(model_of("olmoe"), CORPUS, tokens=3)
    with pytest.raises(UnknownName, match="layer 1 has no experts"):
        expert_similarity(model_of("qwen2_moe"), CORPUS, layers=1)


# Super experts, shared experts


def test_flags_follow_the_published_rule():
    largest = np.full((4, 100), 1.0)
    largest[0, 3], largest[1, 7], largest[3, 2] = 50.0, 60.0, 400.0
    flags, threshold = super_flags(largest, (0, 1, 2, 3), 4, 99.0, 0.1)
    assert threshold == max(np.percentile(largest, 99.0), 40.0) == 40.0
    assert np.argwhere(flags).tolist() == [[0, 3], [1, 7]]  # the third is in the last quarter of the layers
    assert super_flags(largest, (0, 1, 2, 3), 4, 99.0, 0.2)[0].sum() == 0
    assert super_flags(largest, (0, 1, 2, 3), 4, 99.5, 0.1)[0].sum() == 1  # above the second largest of 400


def test_a_planted_super_expert_is_found_and_removing_it_costs_what_ablation_says():
    hf = build("olmoe")
    with torch.no_grad():
        hf.model.layers[1].mlp.experts.down_proj[5] *= 60
    with moe.wrap(hf, StubTokenizer()) as model:
        result = super_experts(model, CORPUS, percentile=90.0, resamples=20)
        assert result.super_layer.values.tolist() == [1]
        assert result.super_expert.values.tolist() == [5]
        change = tokens = 0.0
        for text in CORPUS.texts:
            ids = torch.tensor(ids_of(text))
            for sign, edit in ((1, [moe.ablate(layer=1, expert=5)]), (-1, [])):
                log_p = model.run(text, edit=edit).logits[0].double().log_softmax(-1)
                change += sign * -float(log_p[:-1].gather(1, ids[1:, None]).sum())
            tokens += len(ids) - 1
        assert float(result.ratio[0]) == pytest.approx(np.exp(change / tokens), rel=1e-5)
        counts = result.tokens.sel(layer=1).values
        nearest = min((e for e in range(8) if e != 5), key=lambda e: (abs(counts[e] - counts[5]), e))
        assert int(result.control_expert[0]) == nearest
        assert int(result["super"].sum()) == 1


def test_without_super_experts_nothing_is_removed(tmp_path):
    result = super_experts(model_of("olmoe"), CORPUS, share_of_largest=1.0, resamples=5)
    assert result.sizes["rank"] == 0
    assert int(result["super"].sum()) == 0
    xr.testing.assert_identical(results.load(results.save(result, tmp_path / "super.nc")), result)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts_equal_loops(family):
    model, layer = model_of(family), 2
    result = shared_experts(model, CORPUS, layers=layer, resamples=20).sel(layer=layer)
    shared, routed = [], []
    for text in CORPUS.texts:
        for token in tokens_of(model.hf, ids_of(text), layer, False):
            shared.append(token.shared)
            routed.append(sum(w * f for w, f in zip(token.weights, token.outputs, strict=True)))
    norm = [sum(float(np.linalg.norm(v)) for v in side) for side in (shared, routed)]
    assert float(result.norm_ratio) == pytest.approx(norm[0] / norm[1], rel=1e-4)
    cosines = [float(s @ y / np.linalg.norm(s) / np.linalg.norm(y)) for s, y in zip(shared, routed, strict=True)]
    assert float(result.cosine) == pytest.approx(np.mean(cosines), abs=1e-5)
    for name, side in (("shared", shared), ("routed", routed)):
        mean = np.mean(side, axis=0)
        expected = float(mean @ mean) / np.mean([float(v @ v) for v in side])
        assert float(result[f"constancy_{name}"]) == pytest.approx(expected, rel=1e-4)
    for name, point in (("shared", "shared_out"), ("routed", "routed_out")):
        change = tokens = 0.0
        for text in CORPUS.texts:
            ids = torch.tensor([ids_of(text)])
            for sign, edits in ((1, {(point, layer): torch.zeros_like}), (-1, {})):
                with torch.no_grad():
                    log_p = forward(model.hf, ids, edits=edits).logits[0].double().log_softmax(-1)
                change += sign * -float(log_p[:-1].gather(1, ids[0, 1:, None]).sum())
            tokens += ids.shape[1] - 1
        assert float(result[f"ratio_without_{name}"]) == pytest.approx(np.exp(change / tokens), rel=1e-4)


def test_a_model_without_shared_experts_is_refused():
    with pytest.raises(BadInput, match="no shared experts: expected a model with the point 'shared_out', got olmoe"):
        shared_experts(model_of("olmoe"), CORPUS)


# Neurons


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_neurons_decode_their_columns(family):
    model, layer, expert = model_of(family), 2, 4
    result = neuron_lens(model, layer, expert, top=3, null_directions=200)
    down = model.weights(layer, expert).down
    norm, unembed = model.hf.get_submodule(model.spec.final_norm), model.hf.get_submodule(model.spec.unembed)
    for neuron in (0, 7, 23):
        for sign, name in ((1, "raises"), (-1, "lowers")):
            with torch.no_grad():
                logits = unembed(norm(sign * down[:, neuron][None]))[0].double().numpy()
            order = np.argsort(-logits)[:3]
            here = result.sel(neuron=neuron, sign=name)
            assert here.token_id.values.tolist() == order.tolist()
            np.testing.assert_allclose(here.logit, logits[order], rtol=1e-4)
            z = (logits[order[0]] - logits.mean()) / logits.std(ddof=1)
            assert float(here.z) == pytest.approx(z, rel=1e-4)
            assert here.token.values[0] == model.tokenizer.decode([int(order[0])])
    assert result.sizes["neuron"] == 24


def test_random_neurons_stand_out_as_random_directions_do_and_a_planted_one_more():
    hf = build("olmoe")
    with torch.no_grad():
        hf.model.layers[0].mlp.experts.down_proj[2][:, 9] = hf.lm_head.weight[17] / hf.model.norm.weight
    with moe.wrap(hf, StubTokenizer()) as model:
        result = neuron_lens(model, 0, 2, null_directions=1000)
        assert int(result.token_id.sel(neuron=9, sign="raises", top=1)) == 17
        assert float(result.z_p.sel(neuron=9, sign="raises")) < 0.01
        others = result.z_p.drop_sel(neuron=9)
        assert 0.0 < float((others <= 0.05).mean()) < 0.2
        with pytest.raises(BadInput, match="invalid top for neuron_lens"):
            neuron_lens(model, 0, 2, top=0)
        with torch.no_grad():
            hf.model.layers[0].mlp.experts.down_proj[2][:, 9] = 0
        nothing = neuron_lens(model, 0, 2, null_directions=50).sel(neuron=9)
        assert nothing.z.isnull().all() and nothing.z_p.isnull().all()


def test_control_tokens_are_of_another_document_where_there_is_one():
    rng = np.random.default_rng(0)
    for documents in ([0] * 4 + [1] * 4, [0] * 20 + [1] * 5, [2, 0, 1, 0, 2, 2, 5], [0, 1]):
        array = np.array(documents)
        draws = np.stack([redundancy._other_tokens(array, rng) for _ in range(200)])
        assert (array[draws] != array).all()
        for token in range(len(array)):  # every token of the other documents is drawn
            assert set(draws[:, token]) == set(np.flatnonzero(array != array[token]))
    assert redundancy._other_tokens(np.zeros(5, int), rng).shape == (5,)


def test_the_control_of_a_super_expert_is_another_one():
    chosen, flags = np.array([5, 9, 7, 1]), np.array([True, True, False, False])
    assert super_experts_module._alike(chosen, flags, 0) == 2
    assert super_experts_module._alike(chosen, np.ones(4, bool), 1) == 2


def test_weights_that_act_on_inputs_count_once():
    with moe.wrap(build_type("llama4_text"), StubTokenizer()) as model:
        sums, _ = collect_outputs(model, CORPUS)
        sizes = norm_and_weight(model, CORPUS, tokens_per_document=99, resamples=5)
        profiles = super_experts(model, CORPUS, resamples=5)
        for index, layer in enumerate(model.layers):
            total, weight, count = np.zeros((3, EXPERTS))
            for text in CORPUS.texts:
                run = model.run(text, read=["moe_in", "expert_out"])
                for at, ids in enumerate(run.routing[layer].ids[0]):
                    for expert, gate in zip(ids.tolist(), run.routing[layer].weights[0, at], strict=True):
                        one = model.weights(layer, expert)
                        hidden = gate * run["moe_in", layer][0, at]  # the weight acts here
                        neurons = torch.nn.functional.silu(hidden @ one.gate.T) * (hidden @ one.up.T)
                        total[expert] += float((neurons @ one.down.T).norm())
                        weight[expert], count[expert] = weight[expert] + float(gate), count[expert] + 1
            np.testing.assert_allclose(sums.contributions[:, index].sum(axis=0) / 2**32, total, rtol=1e-4, atol=1e-6)
            there = count > 0
            for found in (profiles.contribution, profiles.norm, sizes.norm_chosen):
                np.testing.assert_allclose(found[index][there], (total / np.maximum(count, 1))[there], rtol=1e-4)
            np.testing.assert_allclose(sums.weights[:, index].sum(axis=0) / 2**32, weight, rtol=1e-5, atol=1e-6)
