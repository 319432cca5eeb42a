"""One expert and the ensemble, against float64 loops over tokens and over every possible draw of a control.

Controls that are drawn are tested twice: exactly where only one draw is possible (four experts of which three
are chosen; documents of two tokens), and by their mean over seeds against the exact mean over draws.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import moe_interp as moe
from moe_interp import results
from moe_interp.analyses import similarity
from moe_interp.analyses.similarity import ensemble_similarity
from moe_interp.data import Corpus
from moe_interp.errors import BadInput, UnknownName
from moe_interp.stats import resampling_weights
from tests.reference.routing import bootstrap_interval
from tests.reference.similarity import Token, as_coded, paper, tokens_of
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3")
ONE_LEFT_OUT: dict[str, dict[str, Any]] = {  # four experts, three chosen
    "olmoe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4, "topk_group": 2},
}
DEFINITIONS = {"paper": paper, "as_coded": as_coded}
TEXTS = {"plain": ["The cat", "x", "so it"], "code": ["f(x)=2", "if a:", "no"]}
CORPUS = Corpus.from_texts(TEXTS)
PAIRS = Corpus.from_texts({"plain": ["ab", "no", "it"], "code": ["f(", "x+"]})
TOLERANCE = dict(rtol=1e-5, atol=2e-6)  # cosines in float32


@cache
def model_of(family: str, **overrides: Any) -> moe.MoEModel:
    return moe.wrap(build(family, **overrides), StubTokenizer())


def one_left_out(family: str) -> moe.MoEModel:
    return model_of(family, **ONE_LEFT_OUT[family])


def reference_tokens(model: moe.MoEModel, text: str, layer: int, everyone: bool) -> list[Token]:
    return tokens_of(model.hf, tuple(StubTokenizer()(text)["input_ids"]), layer, everyone)


def expected(model: moe.MoEModel, corpus: Corpus, layer: int, definition: str, measure: str) -> list[list[np.ndarray]]:
    """For each document the means over draws of each measured token, where the measure is defined."""
    rows = []
    for text in corpus.texts:
        tokens = reference_tokens(model, text, layer, everyone=measure.endswith("unselected"))
        outcomes = [token[measure].mean for token in DEFINITIONS[definition](tokens)]
        rows.append([value for value in outcomes if not np.isnan(value).all()])
    return rows


def mean_over(documents: list[list[np.ndarray]]) -> np.ndarray:
    return np.mean([value for document in documents for value in document], axis=0)


def check(got: xr.Dataset, model: moe.MoEModel, corpus: Corpus, definition: str, measure: str) -> None:
    """Every domain, layer and the whole corpus."""
    name, which = measure.split(":")
    dim = "candidate" if name in ("cosine", "gain") else "kept"
    for layer in got.layer.values:
        rows = expected(model, corpus, int(layer), definition, measure)
        at = {"layer": layer, dim: which}
        np.testing.assert_allclose(got[f"{name}_overall"].sel(at), mean_over(rows), **TOLERANCE)
        for number, domain in enumerate(corpus.domains):
            own = [row for row, label in zip(rows, corpus.labels, strict=True) if label == number]
            np.testing.assert_allclose(got[name].sel(at | {"domain": domain}), mean_over(own), **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_cosines_and_gains_of_what_is_not_drawn(family: str) -> None:
    model = model_of(family)
    got = ensemble_similarity(model, CORPUS, resamples=20, batch_tokens=24)
    assert got.layer.values.tolist() == list(model.layers)
    assert got.shared.values.tolist() == (["without"] if family == "olmoe" else ["with", "without"])
    for candidate in ("heaviest", "lightest", "none"):
        check(got, model, CORPUS, "paper", f"cosine:{candidate}")
        check(got, model, CORPUS, "paper", f"gain:{candidate}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_random_expert_is_the_only_one_left_out(family: str) -> None:
    model = one_left_out(family)
    got = ensemble_similarity(model, CORPUS, resamples=20, layers=[1, 3] if family != "qwen2_moe" else [0, 3])
    check(got, model, CORPUS, "paper", "cosine:random_unselected")
    check(got, model, CORPUS, "paper", "gain:random_unselected")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_token_of_a_pair_is_the_other_one(family: str) -> None:
    got = ensemble_similarity(model_of(family), PAIRS, resamples=20)
    check(got, model_of(family), PAIRS, "paper", "cosine:other_token")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("candidate", ["heaviest", "lightest", "random_unselected", "none"])
def test_as_coded_is_what_the_notebook_does(family: str, candidate: str) -> None:
    model = one_left_out(family)
    got = ensemble_similarity(model, CORPUS, definition="as_coded", resamples=20, layers=[3, 2])
    check(got, model, CORPUS, "as_coded", f"cosine:{candidate}")
    assert got.tokens.values.tolist() == [3, 3]
    assert got.shared.values.tolist() == ["without"]
    assert "error" not in got


def test_as_coded_takes_the_other_token_of_a_pair() -> None:
    got = ensemble_similarity(model_of("qwen2_moe"), PAIRS, definition="as_coded", resamples=20)
    check(got, model_of("qwen2_moe"), PAIRS, "as_coded", "cosine:other_token")


def test_the_definitions_differ() -> None:
    model = model_of("deepseek_v3")
    values = [
        ensemble_similarity(model, CORPUS, definition=one, resamples=20)
        .cosine_overall.sel(candidate="heaviest", shared="without")
        .values
        for one in DEFINITIONS
    ]
    assert (abs(values[0] - values[1]) > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_distance_and_projection_by_k(family: str) -> None:
    model = model_of(family)
    got = ensemble_similarity(model, CORPUS, resamples=20)
    assert got.k.values.tolist() == [1, 2, 3]
    for measure in ("error:heaviest", "projection:heaviest"):
        check(got, model, CORPUS, "paper", measure)
    whole = got.sel(k=3)
    np.testing.assert_allclose(whole.error, 0, atol=1e-6)
    np.testing.assert_allclose(whole.projection, 1, atol=1e-6)


SEEDS = 60


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_drawn_controls_have_the_mean_of_all_draws(definition: Any) -> None:
    """Within five standard errors, known from all draws; and no two seeds agree."""
    model, corpus = model_of("qwen2_moe"), Corpus.from_texts({"plain": ["The cat", "so it"]})
    runs = [
        ensemble_similarity(model, corpus, definition=definition, layers=2, resamples=1, seed=seed)
        for seed in range(SEEDS)
    ]
    measures = ["cosine:random_unselected", "cosine:other_token"]
    measures += ["error:random", "projection:random"] if definition == "paper" else []
    for measure in measures:
        name, which = measure.split(":")
        dim = "candidate" if name in ("cosine", "gain") else "kept"
        got = np.stack([run[f"{name}_overall"].sel({dim: which, "layer": 2}).values for run in runs])
        tokens = [
            token[measure]
            for text in corpus.texts
            for token in DEFINITIONS[definition](reference_tokens(model, text, 2, everyone=True))
        ]
        mean = np.mean([token.mean for token in tokens], axis=0)
        error = np.sqrt(np.sum([token.variance for token in tokens], axis=0) / SEEDS) / len(tokens)
        assert (abs(got.mean(axis=0) - mean) <= 5 * error + 1e-6).all()
        drawn = error > 1e-4
        assert drawn.any()
        if definition == "paper":
            assert (np.diff(np.sort(got[:, drawn], axis=0), axis=0) > 0).all()
            spread = got.std(axis=0)[drawn] / (error * np.sqrt(SEEDS))[drawn]
            assert (abs(spread - 1) < 0.5).all()  # each token has a draw of its own


def test_random_slots_project_as_their_number() -> None:
    """Over all orders, the sum of k random slots projects on k/K of the whole: the control in closed form."""
    tokens = paper(reference_tokens(model_of("olmoe"), "The cat sat", 2, everyone=False))
    for token in tokens:
        np.testing.assert_allclose(token["projection:random"].mean, [1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_one_expert_it_is_the_ensemble(family: str) -> None:
    model = model_of(family, num_experts_per_tok=1)
    got = ensemble_similarity(model, CORPUS, resamples=20)
    for candidate in ("heaviest", "lightest"):
        np.testing.assert_allclose(got.cosine.sel(candidate=candidate), 1, atol=1e-6)
    np.testing.assert_allclose(got.error, 0, atol=1e-6)
    assert (got.cosine.sel(candidate="random_unselected") < 0.99).all()
    coded = ensemble_similarity(model, CORPUS, definition="as_coded", resamples=20)
    np.testing.assert_allclose(coded.cosine.sel(candidate="heaviest"), 1, atol=1e-6)


def test_with_all_experts_none_is_left_out() -> None:
    got = ensemble_similarity(model_of("olmoe", num_experts_per_tok=8), CORPUS, resamples=20)
    assert got.cosine.sel(candidate="random_unselected").isnull().all()
    assert got.cosine.sel(candidate="heaviest").notnull().all()


def test_scaling_the_experts_moves_only_what_has_the_residual() -> None:
    """Nothing comes after the last layer's experts, so all else stays."""
    hf = build("olmoe")
    with moe.wrap(hf, StubTokenizer()) as model:
        plain = ensemble_similarity(model, CORPUS, layers=3, resamples=20)
        with torch.no_grad():
            hf.model.layers[3].mlp.experts.down_proj.mul_(3.0)
        scaled = ensemble_similarity(model, CORPUS, layers=3, resamples=20)
    alone = {"residual": "without"}
    np.testing.assert_allclose(scaled.cosine.sel(alone), plain.cosine.sel(alone), **TOLERANCE)
    np.testing.assert_allclose(scaled.error, plain.error, **TOLERANCE)
    np.testing.assert_allclose(scaled.projection, plain.projection, **TOLERANCE)
    change = scaled.cosine.sel(residual="with") - plain.cosine.sel(residual="with")
    assert (change.sel(candidate="none") < -0.01).all()


def test_without_anything_beside_it_no_expert_has_no_direction() -> None:
    got = ensemble_similarity(model_of("qwen2_moe"), CORPUS, resamples=20)
    alone = {"residual": "without", "shared": "without"}
    assert got.cosine.sel(alone | {"candidate": "none"}).isnull().all()
    assert got.gain.sel(alone).isnull().all()
    assert got.gain.sel(candidate="none", residual="with").values.tolist() == np.zeros((2, 3, 2)).tolist()
    assert got.gain.sel(candidate="heaviest", residual="with").notnull().all()


def test_intervals_resample_documents() -> None:
    model, resamples, seed = model_of("olmoe"), 50, 7
    got = ensemble_similarity(model, CORPUS, layers=2, resamples=resamples, seed=seed)
    rows = expected(model, CORPUS, 2, "paper", "cosine:heaviest")
    at = {"layer": 2, "candidate": "heaviest"}

    def ends(members: list[int], weights: np.ndarray) -> np.ndarray:
        totals = np.array([np.sum(rows[member], axis=0) for member in members])
        tokens, strata = [len(rows[member]) for member in members], CORPUS.labels[members]
        found = np.zeros((2, *totals.shape[1:]))
        for place in np.ndindex(*totals.shape[1:]):
            own = totals[(slice(None), *place)].tolist()
            found[(slice(None), *place)] = bootstrap_interval(own, tokens, weights, strata=strata)
        return found

    for number, domain in enumerate(CORPUS.domains):
        members = np.flatnonzero(CORPUS.labels == number).tolist()
        weights = resampling_weights(np.zeros(len(members), int), resamples, seed + number)
        interval = got.cosine_interval.sel(at | {"domain": domain})
        np.testing.assert_allclose(interval, ends(members, weights), **TOLERANCE)
        value = got.cosine.sel(at | {"domain": domain}).values
        assert (interval[0] < value).all()
        assert (interval[1] > value).all()
    weights = resampling_weights(CORPUS.labels, resamples, seed)
    overall = got.cosine_overall_interval.sel(at)
    np.testing.assert_allclose(overall, ends(list(range(len(CORPUS))), weights), **TOLERANCE)


def test_one_document_has_no_interval() -> None:
    corpus = Corpus.from_texts({"plain": ["The cat sat", "so it goes"], "code": ["f(x) = 2"]})
    got = ensemble_similarity(model_of("olmoe"), corpus, layers=2, resamples=20)
    assert got.cosine_interval.sel(domain="code").isnull().all()
    assert got.cosine_overall_interval.isnull().all()
    assert got.cosine_interval.sel(domain="plain", candidate="heaviest").notnull().all()
    assert got.tokens.values.tolist() == [21, 8]
    assert got.documents.values.tolist() == [2, 1]


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_batches_and_memory_do_not_matter(definition: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("deepseek_v3")
    whole = ensemble_similarity(model, CORPUS, definition=definition, resamples=20)
    xr.testing.assert_identical(whole, ensemble_similarity(model, CORPUS, definition=definition, resamples=20))
    single = ensemble_similarity(model, CORPUS, definition=definition, resamples=20, batch_tokens=1)
    part = ensemble_similarity(model, CORPUS, definition=definition, resamples=20, layers=[3, 1])
    xr.testing.assert_allclose(whole, single, rtol=1e-4, atol=1e-5)
    assert part.layer.values.tolist() == [3, 1]
    for name in part:
        np.testing.assert_array_equal(part[name], whole.sel(layer=[3, 1])[name])
    monkeypatch.setattr(similarity, "_HELD", 1)
    runs = []
    monkeypatch.setattr(model, "run", lambda *args, run=model.run, **options: runs.append(1) or run(*args, **options))
    xr.testing.assert_identical(whole, ensemble_similarity(model, CORPUS, definition=definition, resamples=20))
    assert len(runs) == len(model.layers)  # one batch, one layer at a time


def test_longer_documents_are_cut() -> None:
    model = model_of("olmoe")
    cut = Corpus.from_texts({domain: [text[:3] for text in texts] for domain, texts in TEXTS.items()})
    got = ensemble_similarity(model, CORPUS, max_tokens=3, resamples=20)
    xr.testing.assert_allclose(got, ensemble_similarity(model, cut, resamples=20), rtol=1e-5, atol=1e-6)
    assert results.provenance_of(got)["truncated"] == 4


def test_half_precision_is_close() -> None:
    with moe.wrap(build("olmoe", dtype=torch.bfloat16), StubTokenizer()) as model:
        half = ensemble_similarity(model, CORPUS, layers=0, resamples=20)
    whole = ensemble_similarity(model_of("olmoe"), CORPUS, layers=0, resamples=20)
    np.testing.assert_allclose(half.cosine, whole.cosine, atol=0.1)
    assert results.provenance_of(half)["dtype"] == "bfloat16"


def test_a_result_survives_a_file(tmp_path: Any) -> None:
    got = ensemble_similarity(model_of("qwen2_moe"), CORPUS, resamples=20, seed=3)
    again = results.load(results.save(got, tmp_path / "similarity.nc"))
    xr.testing.assert_identical(got, again)
    told = results.provenance_of(again)
    assert (told["definition"], told["documents"], told["seed"], told["resamples"]) == ("paper", 6, 3, 20)
    assert again.cosine.attrs["units"] == "1"
    assert "none" in again.cosine.attrs["description"]


def test_what_cannot_be_measured_is_refused() -> None:
    model = model_of("deepseek_v3")
    with pytest.raises(BadInput, match="invalid definition for .*: expected one of 'paper', 'as_coded', got"):
        ensemble_similarity(model, CORPUS, definition="coded")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="layer 0 has no experts: expected one of the MoE layers \\[1, 2, 3\\]"):
        ensemble_similarity(model, CORPUS, layers=0)
    with pytest.raises(UnknownName, match="unknown layer 9"):
        ensemble_similarity(model, CORPUS, layers=[1, 9])
    with pytest.raises(BadInput, match="no layers or positions"):
        ensemble_similarity(model, CORPUS, layers=[])
    with pytest.raises(BadInput, match="invalid resamples"):
        ensemble_similarity(model, CORPUS, resamples=0)
    with moe.wrap(build("olmoe")) as bare, pytest.raises(BadInput, match="a corpus needs a tokenizer"):
        ensemble_similarity(bare, CORPUS)
