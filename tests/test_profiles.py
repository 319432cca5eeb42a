"""Profiles of experts: values against loops, contexts that are in the texts, and pages that are safe to open."""

import math
import re
from functools import cache

import numpy as np
import pytest
import xarray as xr

import moe_interp as moe
from moe_interp import results
from moe_interp.analyses.examples import Examples
from moe_interp.analyses.profiles import expert_profiles, log_odds
from moe_interp.data import Corpus
from moe_interp.errors import BadInput, UnknownName
from moe_interp.views.profile import profile, profile_page, profile_rows
from tests.random_runs import EXPERTS, LAYERS, choices_of, random_run
from tests.reference import together as slow
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

TEXTS = {"plain": ["The cat sat on a mat", "so it goes, on and on"], "code": ["f(x) = 2 * x", "if (a): b = c"]}
CORPUS = Corpus.from_texts(TEXTS, source="texts")


@cache
def made() -> tuple[moe.MoEModel, xr.Dataset]:
    model = moe.wrap(build("deepseek_v3"), StubTokenizer(), name="tiny")
    return model, expert_profiles(model, CORPUS, top=4, examples=3, partners=2, resamples=30)


@cache
def choices() -> list[dict]:
    model, _ = made()
    found = []
    for document, text in enumerate(CORPUS.texts):
        run = model.run(text, read=["router_logits", "router_scores"])
        found += choices_of(run, [document])
    return found


def test_tokens_and_their_log_odds_equal_loops():
    _, result = made()
    signs = "".join(CORPUS.texts)
    prior = {sign: 500 * signs.count(sign) / len(signs) for sign in set(signs)}
    for layer in result.layer.values:
        for expert in range(8):
            own = [CORPUS.texts[c["document"]][c["position"]] for c in slow.at(choices(), layer) if expert in c["ids"]]
            z = {}
            for sign in set(signs):
                mine, others = own.count(sign) + prior[sign], signs.count(sign) - own.count(sign) + prior[sign]
                rest, rest_others = len(own) + 500 - mine, len(signs) - len(own) + 500 - others
                z[sign] = (math.log(mine / rest) - math.log(others / rest_others)) / math.sqrt(1 / mine + 1 / others)
            here = result.sel(layer=layer, expert=expert)
            np.testing.assert_allclose(here.over_z, sorted(z.values(), reverse=True)[:4], rtol=1e-9)
            for token, value, count in zip(
                here.over_token.values, here.over_z.values, here.over_count.values, strict=True
            ):
                assert z[token] == pytest.approx(value)
                assert own.count(token) == count
            counts = sorted((own.count(sign) for sign in set(signs)), reverse=True)[:4]
            assert here.frequent_count.values.tolist() == counts
            assert [own.count(token) for token in here.frequent_token.values] == counts
            assert int(here.tokens) == len(own)


def test_log_odds_of_random_tokens_are_standard_normal():
    rng = np.random.default_rng(0)
    occurs = rng.integers(200, 900, size=400)
    chosen = rng.binomial(occurs[:, None], 0.2, (400, 5))
    z = log_odds(chosen, occurs, prior=1.0)
    assert abs(z.mean()) < 0.1
    assert z.std() == pytest.approx(1.0, abs=0.06)


def test_partners_sizes_and_domains_are_those_of_the_other_analyses():
    from moe_interp.analyses.coactivation import coactivation

    model, result = made()
    pairs = coactivation(model, CORPUS, blocks=2, resamples=5)
    for layer in model.layers:
        for expert in range(8):
            lifts = np.nan_to_num(pairs.lift.sel(layer=layer, expert=expert).values, nan=-1)
            expected = np.sort(lifts)[::-1][:2]
            found = result.partner_lift.sel(layer=layer, expert=expert)
            np.testing.assert_allclose(found, np.where(expected < 0, np.nan, expected))  # NaN: one is never chosen
    routed = moe.routing(model, CORPUS, resamples=30)
    for name in ("specialization", "specialization_p"):
        xr.testing.assert_allclose(result[name].transpose("domain", "layer", "expert"), routed[name])
    weight = [c["weights"][c["ids"].index(3)] for c in slow.at(choices(), 2) if 3 in c["ids"]]
    assert float(result.weight.sel(layer=2, expert=3)) == pytest.approx(np.mean(weight), rel=1e-5)
    order = np.argsort(-result.norm.sel(layer=2).values)
    assert result.norm_rank.sel(layer=2).values[order].tolist() == list(range(1, 9))


def test_contexts_are_where_the_weight_is_largest():
    model, result = made()
    for layer in model.layers:
        for expert in range(8):
            own = [c for c in slow.at(choices(), layer) if expert in c["ids"]]
            heaviest = sorted((c["weights"][c["ids"].index(expert)] for c in own), reverse=True)[:3]
            here = result.sel(layer=layer, expert=expert)
            np.testing.assert_allclose(here.context_weight.values[: len(heaviest)], heaviest, rtol=1e-5)
            for kind in ("heaviest", "random"):
                contexts = [text for text in here.context.sel(kind=kind).values.tolist() if text]
                assert len(contexts) == len(set(contexts)) == min(3, len(own))
                for text in contexts:
                    before, rest = text.split("«")
                    token, after = rest.split("»")
                    places = [(d, n) for d, whole in enumerate(CORPUS.texts) for n in range(len(whole))
                              if whole[max(0, n - 12) : n] == before and whole[n] == token
                              and whole[n + 1 : n + 7] == after]  # fmt: skip
                    assert any((c["document"], c["position"]) in places for c in own)


def fed(*parts) -> Examples:
    kept = Examples.empty(LAYERS, EXPERTS, 4, seed=3)
    for run, documents in parts:
        kept.update(run, np.array(documents))
    return kept


def test_examples_are_the_first_by_weight_and_the_same_in_any_order(tmp_path):
    runs = [(random_run(seed, [5, 3]), rows) for seed, rows in ((1, [0, 1]), (2, [2, 3]), (3, [4, 5]))]
    whole = fed(*runs)
    choices = [c for run, rows in runs for c in choices_of(run, rows)]
    for index, layer in enumerate(LAYERS):
        for expert in range(EXPERTS):
            own = [(c["weights"][c["ids"].index(expert)], c["document"], c["position"])
                   for c in slow.at(choices, layer) if expert in c["ids"]]  # fmt: skip
            expected = sorted(own, key=lambda one: (-one[0], one[1], one[2]))[:4]
            kept = whole.heaviest[index, expert]
            for row, (weight, document, position) in zip(kept, expected, strict=False):
                assert row[0] / 2**32 == pytest.approx(weight, rel=1e-7)
                assert row[1:].tolist() == [document, position]
            assert (kept[len(expected) :] == -1).all()
    np.savez(tmp_path / "state.npz", **fed(runs[1]).state())
    with np.load(tmp_path / "state.npz") as stored:
        resumed = Examples.from_state(stored)
    for run, rows in (runs[2], runs[0]):
        resumed.update(run, np.array(rows))
    for other in (resumed, fed(*reversed(runs)), fed(runs[2]).merge(fed(*runs[:2]))):
        np.testing.assert_array_equal(other.heaviest, whole.heaviest)
        np.testing.assert_array_equal(other.random, whole.random)


def test_random_examples_are_as_likely_from_anywhere():
    kept = np.concatenate([_drawn(seed) for seed in range(60)])
    share = np.bincount(kept, minlength=20) / len(kept)
    assert share.max() < 0.12  # 20 tokens, each as likely: 0.05
    assert share.min() > 0.01


def _drawn(seed: int) -> np.ndarray:
    run = random_run(9, [20])
    examples = Examples.empty(LAYERS, EXPERTS, 2, seed=seed)
    examples.update(run, np.array([0]))
    rows = examples.random.reshape(-1, 3)
    return rows[rows[:, 0] >= 0, 2]


def test_a_profile_is_readable_and_says_what_the_dataset_says():
    _, result = made()
    one = profile(result, 2, 3)
    text = str(one)
    assert text.startswith(f"layer 2, expert 3: {int(result.tokens.sel(layer=2, expert=3))} tokens")
    assert [token for token, _, _ in one.over] == result.over_token.sel(layer=2, expert=3).values.tolist()
    for name, share, *_ in one.domains:
        assert f"{name}: {share:.1f} %" in text
    with pytest.raises(UnknownName, match=r"no profile of expert 99 at layer 2: expected a layer of \[1, 2, 3\]"):
        profile(result, 2, 99)


def test_a_single_document_has_a_dash_for_its_intervals_and_no_token_that_is_not_there():
    model, _ = made()
    corpus = Corpus.from_texts({"a": ["some text"]})
    result = expert_profiles(model, corpus, top=8, examples=1, resamples=5)
    for one in profile_rows(result):
        for told in (str(one), one._repr_html_()):
            assert re.search(r"a:? \d+\.\d( %)? \[–\]", told)
            assert "nan" not in told
        assert all(count for *_, count in [*one.over, *one.frequent])
        chosen = int(result.tokens.sel(layer=one.layer, expert=one.expert))
        assert sum(count for _, count in one.frequent) <= chosen
        if not chosen:
            assert (one.over, one.frequent) == ([], [])
            assert "most frequent tokens: –" in str(one)
    assert not result.tokens.values.all()


HOSTILE = "<script>alert(1)</script>"


class Hostile(StubTokenizer):
    def decode(self, ids, skip_special_tokens=False):
        return HOSTILE * len(ids)


def test_pages_of_profiles_run_nothing_and_survive_files(tmp_path):
    with moe.wrap(build("olmoe"), Hostile(), name=HOSTILE) as model:
        corpus = Corpus.from_texts({HOSTILE: ["some text", "more of it"], "b": ["other words", "and more"]})
        result = expert_profiles(model, corpus, top=2, examples=1, resamples=5)
    page = profile_page(result, tmp_path / "profiles.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert page.count("<details>") == 4 * 8
    assert "<script" not in profile(result, 0, 0)._repr_html_()
    xr.testing.assert_identical(results.load(results.save(result, tmp_path / "profiles.nc")), result)


def test_another_result_is_no_profiles(tmp_path):
    model, _ = made()
    result = moe.routing(model, CORPUS, resamples=2)
    for given, got in ((result, "one of routing"),):
        for call in (lambda given: profile(given, 1, 0), lambda given: profile_page(given, tmp_path / "page.html")):
            message = f"not profiles of experts: expected a result of moe.expert_profiles, got {got}"
            with pytest.raises(BadInput, match=message):
                call(given)
            with pytest.raises(BadInput, match="invalid profiles for profile.*: expected a Dataset, got None"):
                call(None)
