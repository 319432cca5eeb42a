"""Perplexity with k experts, against the slow forward with edited weights, one token at a time."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import moe_interp as moe
from moe_interp import results
from moe_interp.analyses.perplexity import nll_sums, perplexity
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from moe_interp.stats import resampling_weights
from tests.reference.perplexity import (
    Keep,
    chosen,
    document_nll,
    document_perplexity,
    heaviest,
    nothing,
    token_perplexity,
)
from tests.reference.routing import bootstrap_interval
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3")
TEXTS = {"plain": ["The cat", "x", "so it"], "code": ["f(x)=2", "if a:", "no"]}
CORPUS = Corpus.from_texts(TEXTS)
AGGREGATES: dict[str, Callable[[Sequence[Sequence[float]]], float]] = {
    "token": token_perplexity,
    "document": document_perplexity,
}
CLOSE = dict(rtol=2e-5)  # of perplexities: nats in float32


@cache
def model_of(family: str, **overrides: Any) -> moe.MoEModel:
    return moe.wrap(build(family, **overrides), StubTokenizer())


def ids_of(text: str) -> list[int]:
    return StubTokenizer()(text)["input_ids"]


def nats(
    model: moe.MoEModel,
    keep: Keep | None = None,
    layers: Sequence[int] | None = None,
    corpus: Corpus = CORPUS,
) -> list[list[float]]:
    """The reference's nats of every document."""
    where = model.layers if layers is None else layers
    edits = {} if keep is None else dict.fromkeys(where, keep)
    return [document_nll(model.hf, ids_of(text), edits) for text in corpus.texts]


def check(
    got: xr.Dataset, name: str, at: dict[str, Any], expected: list[list[float]], plain: list[list[float]]
) -> None:
    """A perplexity and its ratio by both aggregates, for every domain and over all."""
    ratio = name.replace("perplexity", "ratio")
    for aggregate, reference in AGGREGATES.items():
        here = at | {"aggregate": aggregate}
        np.testing.assert_allclose(got[f"{name}_overall"].sel(here), reference(expected), **CLOSE)
        if ratio in got:
            want = reference(expected) / reference(plain)
            np.testing.assert_allclose(got[f"{ratio}_overall"].sel(here), want, **CLOSE)
        for number, domain in enumerate(CORPUS.domains):
            own, full = (
                [row for row, label in zip(rows, CORPUS.labels, strict=True) if label == number]
                for rows in (expected, plain)
            )
            np.testing.assert_allclose(got[name].sel(here | {"domain": domain}), reference(own), **CLOSE)
            if ratio in got:
                want = reference(own) / reference(full)
                np.testing.assert_allclose(got[ratio].sel(here | {"domain": domain}), want, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heaviest_k_and_none(family: str) -> None:
    model = model_of(family)
    got = perplexity(model, CORPUS, renormalise="both", resamples=20, batch_tokens=12)
    plain = nats(model)
    assert got.k.values.tolist() == [1, 2, 3]
    for k, (setting, renormalise) in itertools.product((1, 2, 3), (("no", False), ("yes", True))):
        check(got, "perplexity", {"k": k, "renormalise": setting}, nats(model, heaviest(k, renormalise)), plain)
    check(got, "perplexity_none", {}, nats(model, nothing), plain)
    check(got, "perplexity_full", {}, plain, plain)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_one_layer_at_a_time(family: str) -> None:
    model = model_of(family)
    got = perplexity(model, CORPUS, ks=[1], per_layer=True, resamples=20)
    plain = nats(model)
    assert got.layer.values.tolist() == list(model.layers)
    assert got.perplexity.dims == ("aggregate", "domain", "layer", "k")
    for layer in model.layers:
        check(got, "perplexity", {"layer": layer, "k": 1}, nats(model, heaviest(1), [layer]), plain)
        check(got, "perplexity_none", {"layer": layer}, nats(model, nothing, [layer]), plain)


@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_more_experts_than_the_model_takes(family: str, renormalises: bool) -> None:
    """The router's own recipe for five is that of the same weights under a config that says five."""
    groups = {"topk_group": 2} if family == "deepseek_v3" else {}  # of four experts each
    model = model_of(family, norm_topk_prob=renormalises, **groups)
    five = model_of(family, norm_topk_prob=renormalises, num_experts_per_tok=5, **groups)
    got = perplexity(model, CORPUS, ks=[5, 3], renormalise="both", resamples=20)
    assert got.k.values.tolist() == [3, 5]
    plain = nats(model)
    check(got, "perplexity", {"k": 5, "renormalise": "no"}, nats(five), plain)
    rescaled = nats(five) if renormalises else nats(five, heaviest(5, renormalise=True, own=3))
    check(got, "perplexity", {"k": 5, "renormalise": "yes"}, rescaled, plain)
    assert got.perplexity_random.sel(k=5).isnull().all()
    assert got.perplexity_random_interval.sel(k=5).isnull().all()
    assert got.perplexity_random.sel(k=3).notnull().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("renormalise", [False, True])
def test_all_k_is_the_plain_model_exactly(family: str, renormalise: bool) -> None:
    model = model_of(family)
    got = perplexity(model, CORPUS, renormalise=renormalise, resamples=20)
    own = {"k": 3}
    for kind in ("", "_random"):
        np.testing.assert_array_equal(got[f"perplexity{kind}"].sel(own), got.perplexity_full)
        np.testing.assert_array_equal(got[f"ratio{kind}"].sel(own), 1)
        np.testing.assert_array_equal(got[f"ratio{kind}_interval"].sel(own), 1)
        np.testing.assert_array_equal(got[f"ratio{kind}_overall_interval"].sel(own), 1)
    assert (abs(got.ratio_overall.sel(k=1) - 1) > 1e-3).all()
    ids = torch.tensor([ids_of("f(x)=2")])
    kept = model.run(ids, edit=moe.top_k(3, renormalise=renormalise)).logits
    assert torch.equal(kept, model.run(ids).logits)


@pytest.mark.parametrize("renormalise", [False, True])
def test_random_slots_are_drawn_for_each_token_and_layer(renormalise: bool) -> None:
    """One of two slots kept, in three layers, for the two tokens of three that matter: 64 outcomes."""
    model, text = model_of("qwen2_moe", num_experts_per_tok=2, norm_topk_prob=False), "sun"
    outcomes = list(itertools.product(itertools.product(range(2), repeat=2), repeat=len(model.layers)))
    nll = np.array(
        [
            np.mean(
                document_nll(
                    model.hf,
                    ids_of(text),
                    {at: chosen(slots, renormalise) for at, slots in zip(model.layers, outcome, strict=True)},
                )
            )
            for outcome in outcomes
        ]
    )
    assert np.diff(np.sort(nll)).min() > 1e-4
    corpus = Corpus.from_texts({str(number): [text] for number in range(50)})
    drawn = []
    for seed in (0, 1):
        got = perplexity(model, corpus, ks=[1], renormalise=renormalise, resamples=1, seed=seed)
        drawn.append(np.log(got.perplexity_random.sel(aggregate="token", k=1).values))
    distance = abs(np.concatenate(drawn)[:, None] - nll)
    assert distance.min(axis=1).max() < 2e-5
    bits = np.array(outcomes)[distance.argmin(axis=1)].reshape(100, -1)
    assert (abs(bits.mean(axis=0) - 0.5) < 0.2).all()  # fair draws, to four standard errors
    assert (abs(np.corrcoef(bits.T) - np.eye(bits.shape[1])) < 0.4).all()  # and independent
    assert not np.array_equal(*drawn)


def test_more_random_slots_of_several() -> None:
    """Two of three kept at random is dropping one of three: in one layer, nine outcomes."""
    model, layer, text = model_of("olmoe"), 1, "abc"

    def without(dropped: tuple[int, ...]) -> Keep:
        def keep(weights: list[float], position: int, scores: list[float]) -> list[float]:
            light = dropped[position] if position < 2 else -1
            return [0.0 if slot == light else weight for slot, weight in enumerate(weights)]

        return keep

    nll = [
        np.mean(document_nll(model.hf, ids_of(text), {layer: without(dropped)}))
        for dropped in itertools.product(range(3), repeat=2)
    ]
    corpus = Corpus.from_texts({str(number): [text] for number in range(40)})
    got = perplexity(model, corpus, ks=[2], per_layer=True, resamples=1)
    drawn = np.log(got.perplexity_random.sel(aggregate="token", layer=layer, k=2).values)
    distance = abs(drawn[:, None] - np.array(nll))
    assert distance.min(axis=1).max() < 2e-5
    assert len(set(distance.argmin(axis=1))) >= 7  # nine are expected to the last, 0.08 missing on average


def test_batches_do_not_matter_and_seeds_do() -> None:
    model = model_of("deepseek_v3")
    whole = perplexity(model, CORPUS, resamples=20)
    xr.testing.assert_identical(whole, perplexity(model, CORPUS, resamples=20))
    xr.testing.assert_allclose(whole, perplexity(model, CORPUS, resamples=20, batch_tokens=1), rtol=1e-4)
    other = perplexity(model, CORPUS, resamples=20, seed=1)
    assert (other.perplexity_random.sel(k=1) != whole.perplexity_random.sel(k=1)).all()
    np.testing.assert_array_equal(other.perplexity, whole.perplexity)
    assert (other.perplexity_overall_interval != whole.perplexity_overall_interval).any()


def test_intervals_resample_documents_in_pairs() -> None:
    model, resamples, seed = model_of("olmoe"), 41, 7
    got = perplexity(model, CORPUS, ks=[1], resamples=resamples, seed=seed)
    scored = [index for index, text in enumerate(CORPUS.texts) if len(text) > 1]
    labels = CORPUS.labels[scored]
    rows, plain = ([values[index] for index in scored] for values in (nats(model, heaviest(1)), nats(model)))

    def ends(members: np.ndarray, weights: np.ndarray, parts: list[tuple[float, float]]) -> np.ndarray:
        top, bottom = zip(*(parts[index] for index in members), strict=True)
        return np.exp(bootstrap_interval(top, bottom, weights, strata=labels[members]))

    for aggregate in AGGREGATES:
        figures: dict[str, list[tuple[float, float]]] = {
            name: [(sum(one), len(one)) if aggregate == "token" else (float(np.mean(one)), 1) for one in nll]
            for name, nll in {
                "perplexity": rows,
                "ratio": [np.subtract(one, other) for one, other in zip(rows, plain, strict=True)],
            }.items()
        }
        for name, parts in figures.items():
            at = {"aggregate": aggregate, "k": 1}
            for number, domain in enumerate(CORPUS.domains):
                members = np.flatnonzero(labels == number)
                weights = resampling_weights(np.zeros(len(members), int), resamples, seed + number)
                interval = got[f"{name}_interval"].sel(at | {"domain": domain})
                np.testing.assert_allclose(interval, ends(members, weights, parts), **CLOSE)
            weights = resampling_weights(labels, resamples, seed)
            interval = got[f"{name}_overall_interval"].sel(at)
            np.testing.assert_allclose(interval, ends(np.arange(len(labels)), weights, parts), **CLOSE)


def test_normalised_is_log_perplexity_between_its_ends() -> None:
    got = perplexity(model_of("olmoe"), CORPUS, renormalise="both", resamples=20)
    for name in ("", "_overall"):
        values = got[f"perplexity{name}"]
        for row in values.stack(row=[dim for dim in values.dims if dim != "k"]).transpose("row", "k"):
            logs = [math.log(value) for value in row.values]
            at = {dim: row[dim].item() for dim in values.dims if dim != "k"}
            want = [(value - min(logs)) / (max(logs) - min(logs)) for value in logs]
            np.testing.assert_allclose(got[f"normalised{name}"].sel(at), want, atol=1e-9)
    alone = perplexity(model_of("olmoe"), CORPUS, ks=[2], resamples=20)
    assert alone.normalised.isnull().all()


def test_what_was_scored_is_counted() -> None:
    model = model_of("olmoe")
    got = perplexity(model, CORPUS, resamples=20)
    assert got.tokens.values.tolist() == [6 + 4, 5 + 4 + 1]  # "x" has no token with a context
    assert got.documents.values.tolist() == [2, 3]
    assert got.bytes.values.tolist() == [10, 10]  # one character, one byte, one token
    per_token = np.log2(got.perplexity.sel(aggregate="token"))
    np.testing.assert_allclose(got.bits_per_byte, per_token, rtol=1e-12)
    overall = np.log2(got.perplexity_overall.sel(aggregate="token"))
    np.testing.assert_allclose(got.bits_per_byte_overall, overall, rtol=1e-12)

    class Wide(StubTokenizer):
        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            return "\N{LATIN SMALL LETTER E WITH ACUTE}" * len(ids)

    with moe.wrap(build("olmoe"), Wide()) as wide:
        two = perplexity(wide, CORPUS, resamples=20)
    assert two.bytes.values.tolist() == [20, 20]
    np.testing.assert_allclose(two.bits_per_byte, got.bits_per_byte / 2, rtol=1e-6)


def test_longer_documents_are_cut() -> None:
    model = model_of("olmoe")
    cut = Corpus.from_texts({domain: [text[:4] for text in texts] for domain, texts in TEXTS.items()})
    got = perplexity(model, CORPUS, max_tokens=4, resamples=20)
    xr.testing.assert_allclose(got, perplexity(model, cut, resamples=20), rtol=1e-5)
    assert results.provenance_of(got)["truncated"] == 4


def test_nll_counts_real_tokens_only() -> None:
    """Padding on either side, however large its logits; and chunks of rows change nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 7, generator=generator)
    ids = torch.randint(7, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    want = []
    for row, positions in enumerate([(1, 2), (3, 4)]):
        nats = [logits[row, at - 1].logsumexp(0) - logits[row, at - 1, ids[row, at]] for at in positions]
        want.append(float(sum(nats)))
    np.testing.assert_allclose(nll_sums(logits, ids, mask), want, rtol=1e-6)
    noisy = torch.where(mask[..., None].bool(), logits, torch.nan)
    np.testing.assert_allclose(nll_sums(noisy, ids, mask), want, rtol=1e-6)


def test_one_k_may_be_given_alone() -> None:
    model = model_of("olmoe")
    alone, listed = (perplexity(model, CORPUS, ks=ks, resamples=20) for ks in (2, [2]))
    xr.testing.assert_identical(alone, listed)
    assert alone.k.values.tolist() == [2]


def test_nll_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen2_moe")
    whole = perplexity(model, CORPUS, ks=[1], resamples=20)
    monkeypatch.setattr("moe_interp.analyses.perplexity._CHUNK", 200)
    xr.testing.assert_allclose(whole, perplexity(model, CORPUS, ks=[1], resamples=20), rtol=1e-6)


def test_half_precision_is_close() -> None:
    with moe.wrap(build("olmoe", dtype=torch.bfloat16), StubTokenizer()) as model:
        half = perplexity(model, CORPUS, resamples=20)
    whole = perplexity(model_of("olmoe"), CORPUS, resamples=20)
    np.testing.assert_allclose(half.perplexity_full, whole.perplexity_full, rtol=0.2)


def test_a_result_survives_a_file(tmp_path: Any) -> None:
    got = perplexity(model_of("deepseek_v3"), CORPUS, renormalise="both", per_layer=True, resamples=20, seed=3)
    again = results.load(results.save(got, tmp_path / "perplexity.nc"))
    xr.testing.assert_identical(got, again)
    told = results.provenance_of(again)
    assert (told["renormalise"], told["top_k"], told["documents"], told["seed"]) == ("both", 3, 6, 3)
    assert "over all domains" in again.ratio_random_overall.attrs["description"]


def test_slots_of_a_model_that_is_widened_are_drawn_among_those_that_it_chooses() -> None:
    model = model_of("olmoe")
    with model.edit(moe.top_k(5)):
        got = perplexity(model, CORPUS, resamples=20)
        with pytest.raises(BadInput, match="two interventions contradict each other .*k=5.*k=4"):
            perplexity(model, CORPUS, ks=[1, 4])
    assert got.k.values.tolist() == [1, 2, 3, 5]
    assert got.perplexity_random.notnull().all()
    assert np.allclose(got.perplexity.sel(k=5), got.perplexity_full)


def test_one_document_has_no_interval() -> None:
    corpus = Corpus.from_texts({"plain": ["The cat", "so it"], "code": ["f(x)=2", "y"], "empty": ["z"]})
    got = perplexity(model_of("olmoe"), corpus, ks=[1], resamples=20)
    assert got.perplexity_interval.sel(domain="plain").notnull().all()
    assert got.perplexity_interval.sel(domain="code").isnull().all()
    assert got.perplexity.sel(domain="code").notnull().all()
    assert got.perplexity.sel(domain="empty").isnull().all()
    assert got.documents.values.tolist() == [2, 1, 0]


@pytest.mark.parametrize("ks", [[], [0], [9], [1, -1], [1.5], [True], ["2"]])
def test_ks_out_of_range_are_refused(ks: list[Any]) -> None:
    with pytest.raises(BadInput, match="ks cannot be right: expected whole numbers from 1 to 8, got"):
        perplexity(model_of("olmoe"), CORPUS, ks=iter(ks))


def test_what_cannot_be_measured_is_refused() -> None:
    model = model_of("olmoe")
    with pytest.raises(BadInput, match="invalid renormalise for .*: expected True or False or 'both', got 'yes'"):
        perplexity(model, CORPUS, renormalise="yes")
    with pytest.raises(BadInput, match="nothing to score: expected a document of two or more tokens"):
        perplexity(model, Corpus.from_texts({"plain": ["x", "y"]}))
    with pytest.raises(BadInput, match="invalid resamples"):
        perplexity(model, CORPUS, resamples=0)
    with moe.wrap(build("olmoe")) as bare, pytest.raises(BadInput, match="a corpus needs a tokenizer"):
        perplexity(bare, CORPUS)
