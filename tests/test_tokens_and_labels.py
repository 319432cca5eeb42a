"""What depends on the token: vocabulary specialization, the null of token identity, routing by a label."""

import re
from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
import xarray as xr

import moe_interp as moe
from moe_interp import results, stats
from moe_interp.analyses import labels as labelling
from moe_interp.analyses.exact import blocks_of
from moe_interp.analyses.labels import LabelCounts, routing_by_label, spans
from moe_interp.analyses.token_counts import TokenCounts
from moe_interp.analyses.token_identity import identity_values, known_ids, token_identity
from moe_interp.analyses.vocabulary import vocabulary_result, vocabulary_specialization
from moe_interp.data import Corpus
from moe_interp.encode import token_text
from moe_interp.errors import BadInput
from tests.random_runs import EXPERTS, LAYERS, TOP_K, VOCABULARY, choices_of, random_run
from tests.reference import together as slow
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

FOLDS, DOCUMENTS = 3, 6
TEXTS = {
    "plain": ["The cat, the dog.", "So it goes, on; and", "a mat. A hat!"],
    "code": ["f(x) = 2", "if (a): b", "y += 10"],
}
CORPUS = Corpus.from_texts(TEXTS, source="texts")


@cache
def model_of(family: str = "deepseek_v3") -> moe.MoEModel:
    return moe.wrap(build(family), StubTokenizer(), name=family)


@cache
def random_counts():
    run, documents = random_run(11, [9, 12, 8, 10, 11, 7]), list(range(DOCUMENTS))
    sums = TokenCounts.empty(LAYERS, EXPERTS, TOP_K, VOCABULARY, folds=FOLDS)
    sums.update(run, np.array(documents))
    return sums, choices_of(run, documents), run


# Vocabulary specialization


def test_vocabulary_specialization_equals_loops():
    sums, choices, _ = random_counts()
    result = vocabulary_result(sums, None, provenance={}, at_least=4)
    kept = [x for x in range(VOCABULARY) if slow.occurs(choices, LAYERS[0], x) >= 4]
    assert result.token_id.values.tolist() == kept
    for layer in LAYERS:
        here = result.sel(layer=layer)
        shares = [slow.vocabulary_specialization(choices, layer, x, EXPERTS) for x in kept]
        np.testing.assert_allclose(here.share, shares)
        assert float(here.specialization) == pytest.approx(np.mean(shares))
        assert float(here.gain) == pytest.approx(float(here.specialization - here.specialization_null))
        for token in kept:
            best = int(here.expert.sel(token_id=token))
            assert slow.routed(choices, layer, token, best) == here.share.sel(token_id=token) * slow.occurs(
                choices, layer, token
            )
    assert result.occurrences.values.tolist() == [slow.occurs(choices, LAYERS[0], x) for x in kept]


def test_a_random_router_gains_nothing_and_one_that_reads_the_token_gains_all():
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.full(16, 2.0)) * 4
    tokens, documents = rng.zipf(1.6, 6000) % 50, np.repeat(np.arange(60), 100)
    gains = []
    for reads_the_token in (False, True):
        draws = stats.distinct_draws(weights, 4, 50 if reads_the_token else 6000, rng)
        chosen = draws[tokens] if reads_the_token else draws
        ids = chosen.nonzero()[1].reshape(-1, 4)
        sums = TokenCounts.empty((0,), 16, 4, 50)
        sums.seen.add(documents * 50 + tokens)
        sums.routed.add(((blocks_of(documents, 10) * 50 + tokens)[:, None] * 16 + ids).ravel())
        gains.append(vocabulary_result(sums, None, provenance={}))
    nothing, everything = gains
    low, high = nothing.gain_interval[:, 0]
    assert low < 0 < high
    assert float(nothing.specialization[0]) > 0.4  # K/E is 0.25: the plain value says nothing by itself
    assert float(everything.specialization[0]) == 1.0
    assert float(everything.gain_interval[0, 0]) > 0.3


def test_an_id_that_is_never_seen_often_enough_is_an_error():
    with pytest.raises(BadInput, match="no token id occurs often enough: expected 1000 or more, got at most"):
        vocabulary_result(random_counts()[0], None, provenance={}, at_least=1000)


def test_the_null_of_the_largest_share_is_that_of_all_draws():
    """Two tokens that each draw 1 of 3 experts with given chances: shares of 1 or 1/2, by enumeration."""
    load = np.array([0.5, 0.3, 0.2])
    null = stats.largest_share_null(stats.inclusion_weights(load), 1, longest=64, repeats=4000)
    same = float((load**2).sum())
    np.testing.assert_allclose(null(np.array([1, 2])), [1.0, same + (1 - same) / 2], atol=0.01)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_draws_of_distinct_experts_have_the_loads_and_pairs_of_enumeration(top_k, spread):
    rng = np.random.default_rng(top_k)
    chance = dict.fromkeys(combinations(range(5), top_k), 0.0)
    own = rng.gamma(spread, size=5)
    for chosen in chance:
        chance[chosen] = np.prod(own[list(chosen)])
    total = sum(chance.values())
    load = np.array([sum(c for chosen, c in chance.items() if e in chosen) / total for e in range(5)])
    weights = stats.inclusion_weights(load)
    np.testing.assert_allclose(weights / weights.sum(), own / own.sum(), rtol=1e-4)
    pairs = stats.pair_inclusion(weights, top_k)
    for one, other in product(range(5), repeat=2):
        expected = sum(c for chosen, c in chance.items() if one in chosen and other in chosen) / total
        assert pairs[one, other] == pytest.approx(expected, abs=1e-6)
    drawn = stats.distinct_draws(weights, top_k, 40_000, rng)
    assert (drawn.sum(axis=1) == top_k).all()
    np.testing.assert_allclose(drawn.T.astype(float) @ drawn / 40_000, pairs, atol=0.012)


def test_an_expert_that_is_always_or_never_chosen_has_draws_too():
    load = np.array([1.0, 0.0, 0.5, 0.25, 0.25])
    pairs = stats.pair_inclusion(stats.inclusion_weights(load), 2)
    np.testing.assert_allclose(pairs.diagonal(), load, atol=1e-4)
    np.testing.assert_allclose(pairs[0], [1.0, 0.0, 0.5, 0.25, 0.25], atol=1e-4)
    everyone = np.ones(3)
    np.testing.assert_allclose(stats.pair_inclusion(stats.inclusion_weights(everyone), 3), 1.0, atol=1e-5)


# Token identity


def test_what_ids_predict_equals_loops():
    sums, choices, run = random_counts()
    known = known_ids(sums, 3)
    counts = LabelCounts.empty(DOCUMENTS, 2, LAYERS, EXPERTS, TOP_K)
    documents = np.arange(DOCUMENTS)
    folds = blocks_of(documents, FOLDS)
    tokens = [known[folds[d], run.token_ids[d, : int(run.mask[d].sum())].numpy()].astype(np.int64) for d in documents]
    counts.add(run, documents, tokens)
    groups = np.array([0, 1, 0, 1, 1, 0])
    values = identity_values(sums, counts, known, groups, 2, 30, 0)
    for group in range(2):
        own = set(np.flatnonzero(groups == group).tolist())
        for index, layer in enumerate(LAYERS):
            for expert in range(EXPERTS):
                total, real, number = slow.predicted(choices, layer, own, expert, folds, 3)
                assert values["tokens"][group] == number
                assert values["specialization"][group, index, expert] == pytest.approx(real / number)
                assert values["specialization_token"][group, index, expert] == pytest.approx(total / number)
                assert values["gain"][group, index, expert] == pytest.approx((real - total) / number)
    everyone = set(range(DOCUMENTS))
    hits = total = 0
    for choice in slow.at(choices, LAYERS[0]):
        others = {d for d in everyone if folds[d] != folds[choice["document"]]}
        if slow.occurs(choices, LAYERS[0], choice["token"], others) >= 3:
            went = [slow.routed(choices, LAYERS[0], choice["token"], e, others) for e in range(EXPERTS)]
            best = sorted(range(EXPERTS), key=lambda e: (-went[e], e))[:TOP_K]
            hits += sum(e in best for e in choice["ids"])
            total += TOP_K
    assert values["overlap"][0] == pytest.approx(hits / total)


def test_a_router_that_reads_only_the_token_has_no_gain_and_one_that_reads_the_domain_has():
    rng = np.random.default_rng(2)
    documents, length, vocabulary, experts, top_k = 60, 80, 30, 12, 3
    groups = np.arange(documents) % 2
    use = rng.dirichlet(np.full(vocabulary, 0.5), size=2)
    by_token = stats.distinct_draws(np.full(experts, top_k / experts), top_k, vocabulary, rng)
    for reads_the_domain in (False, True):
        sums = TokenCounts.empty((0,), experts, top_k, vocabulary)
        counts = LabelCounts.empty(documents, 2, (0,), experts, top_k)
        routes = []
        for document in range(documents):
            tokens = rng.choice(vocabulary, length, p=use[groups[document]])
            chosen = by_token[tokens].copy()
            if reads_the_domain and groups[document] == 1:  # every fourth token goes to expert 0 in place of its last
                moved = (rng.random(length) < 0.25) & ~chosen[:, 0]
                last = experts - 1 - chosen[:, ::-1].argmax(axis=1)
                chosen[moved, last[moved]] = False
                chosen[moved, 0] = True
            ids = chosen.nonzero()[1].reshape(-1, top_k)
            sums.seen.add(document * vocabulary + tokens)
            fold = blocks_of(np.array(document), 10)
            sums.routed.add(((fold * vocabulary + tokens)[:, None] * experts + ids).ravel())
            routes.append((tokens, ids))
        known = known_ids(sums, 5)
        for document, (tokens, ids) in enumerate(routes):
            kept = known[blocks_of(np.array(document), 10), tokens]
            counts.tokens[document] = [length - kept.sum(), kept.sum()]
            np.add.at(counts.counts[document, 1, 0], ids[kept].ravel(), 1)
        values = identity_values(sums, counts, known, groups, 2, 300, 0)
        if not reads_the_domain:
            np.testing.assert_allclose(values["gain"], 0, atol=1e-12)
            assert values["overlap"][0] == 1.0
            assert values["specialization"].max() > 2 * top_k / experts  # the domains differ, by their words alone
        else:
            assert values["gain_p"][1, 0, 0] == 1 / 301
            assert values["gain_interval"][0, 1, 0, 0] > 0.02


def test_identity_on_a_model_survives_a_file_and_says_what_is_known(tmp_path):
    result = token_identity(model_of(), CORPUS, at_least=2, folds=2, resamples=20)
    xr.testing.assert_identical(results.load(results.save(result, tmp_path / "identity.nc")), result)
    assert ((result.known > 0) & (result.known < 1)).all()
    assert ((result.specialization - result.specialization_token - result.gain) < 1e-12).all()
    with pytest.raises(BadInput, match="no token id is known from other documents"):
        token_identity(model_of(), CORPUS, at_least=999)
    with pytest.raises(BadInput, match="invalid folds for token_identity: expected a whole number from 2"):
        token_identity(model_of(), CORPUS, folds=1)


def test_vocabulary_on_a_model_survives_a_file(tmp_path):
    result = vocabulary_specialization(model_of(), CORPUS, at_least=2)
    xr.testing.assert_identical(results.load(results.save(result, tmp_path / "vocabulary.nc")), result)
    assert " " in result.token.values


# Labels


def test_kinds_scripts_and_places():
    assert [labelling.kind(one) for one in (" the", "42", ",", " +", "\n", "。", "<", "Ünï", "\x00")] == [
        "word", "number", "punctuation", "symbol", "space", "punctuation", "symbol", "word", "other",
    ]  # fmt: skip
    assert [labelling.script(one) for one in ("the", "日", "λ", "12")] == ["latin", "cjk", "greek", "none"]
    assert [labelling.place(n) for n in (0, 3, 4, 63, 64, 256)] == ["0-3", "0-3", "4-15", "16-63", "64-255", "256-"]


def bytes_tokenizer():
    """A byte a token, as byte-level vocabularies split what they do not know; a word keeps the space before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, [], fuse_unk=False))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_parts_of_characters_have_the_label_of_the_character():
    corpus = Corpus.from_texts({"a": ["a日5, λ"]})
    for label, expected in (
        ("kind", ["word"] * 4 + ["number", "punctuation", "space", "word", "word"]),
        ("script", ["latin", "cjk", "cjk", "cjk", "none", "none", "none", "greek", "greek"]),
    ):
        model = moe.wrap(build("olmoe"), bytes_tokenizer())
        names, (numbers,) = labelling.label_tokens(model, corpus, label)
        assert [names[number] for number in numbers] == expected
        model.close()
    assert [labelling.kind(one) for one in ("\ufffd", " \ufffd", "a\ufffdb")] == ["other", "other", "word"]
    assert labelling.script("\ufffd") == "none"


def test_the_space_before_a_token_is_not_its_middle():
    text = "I saw  a - mile "
    tokens = [(0, 1), (1, 5), (5, 8), (8, 10), (10, 15), (15, 16)]
    tag = spans(lambda text: [(one.start(), one.end(), "W") for one in re.finditer(r"\S+", text)])
    said = tag(labelling.Tokenized(text, [text[slice(*one)] for one in tokens], tokens))
    assert said == ["W", "W", "W", "W", "W", "other"]


def test_documents_of_one_label_do_not_test_rounding():
    rng = np.random.default_rng(0)
    counts = np.zeros((30, 2, 1, 4), np.int64)
    counts[:, 0, 0] = rng.multinomial(49, [0.1, 0.2, 0.3, 0.4], size=30)
    counts[:15], counts[15:, 1] = counts[:15], 0
    counts[:15, [0, 1]] = counts[:15, [1, 0]]  # half of them have the one label, half the other
    found = labelling.differences(counts, counts.sum(axis=-1))
    assert (found == 0).all()
    tokens = counts.sum(axis=(2, 3))
    result = LabelCounts((0,), (1,), tokens, counts).result(["a", "b"], provenance={}, resamples=100)
    assert (result.specialization_p == 1).all()


def test_routing_by_punctuation_equals_loops_and_is_one_call():
    model = model_of()
    result = routing_by_label(model, CORPUS, "punctuation", resamples=50)
    assert result.label.values.tolist() == ["other", "punctuation"]
    choices, signs = [], []
    for document, text in enumerate(CORPUS.texts):
        run = model.run(text, read=["router_logits", "router_scores"])
        choices += choices_of(run, [document])
        signs.append(text)
    for label, wanted in (("punctuation", True), ("other", False)):
        for layer in model.layers:
            own = [c for c in slow.at(choices, layer) if (signs[c["document"]][c["position"]] in ",;.!():") == wanted]
            assert int(result.tokens.sel(label=label)) == len(own)
            for expert in range(8):
                share = sum(expert in c["ids"] for c in own) / len(own)
                here = result.sel(label=label, layer=layer, expert=expert)
                assert float(here.specialization) == pytest.approx(share)
                low, high = here.specialization_interval
                assert low - 1e-9 <= share <= high + 1e-9


def test_the_control_is_the_rest_of_the_same_documents():
    counts = np.zeros((3, 2, 1, 2), np.int64)
    tokens = np.array([[10, 5], [20, 10], [7, 0]])
    counts[:, 0, 0] = [[10, 0], [5, 15], [7, 0]]  # K = 1; the last document has no token with label 1
    counts[:, 1, 0] = [[2, 3], [10, 0], [0, 0]]
    result = LabelCounts((0,), (1,), tokens, counts).result(["other", "mark"], provenance={}, resamples=10)
    rest = (5 * 10 / 10 + 10 * 5 / 20) / 15
    assert float(result.specialization_rest.sel(label="mark", layer=0, expert=0)) == pytest.approx(rest)
    assert float(result.specialization.sel(label="mark", layer=0, expert=0)) == pytest.approx(12 / 15)
    found = labelling.differences(counts, tokens[..., None])
    np.testing.assert_allclose(found[0, 1, 0], [2 - 5 * 12 / 15, 3 - 5 * 3 / 15])
    np.testing.assert_allclose(found[2], 0)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-12)


def test_a_planted_expert_for_a_label_is_found_and_nothing_else():
    rng = np.random.default_rng(3)
    found, wrong = [], []
    for _ in range(20):
        own = rng.dirichlet(np.full(16, 3.0), size=30)  # every document has its own preferences
        counts = np.stack([rng.multinomial(180, own), rng.multinomial(20, own * 0.9 + 0.1 * (np.arange(16) == 4))], 1)
        p = stats.sign_flip_max(labelling.differences(counts[:, :, None], counts.sum(axis=2)[..., None]), flips=199)[
            1, 0
        ]
        found.append(p[4] <= 0.05)
        wrong.append(np.delete(p, 4).min() <= 0.05)
    assert np.mean(found) >= 0.9
    assert np.mean(wrong) <= 0.2


class Words(StubTokenizer):
    """Every three characters are a token, with offsets, like a fast tokenizer."""

    is_fast = True

    def __call__(self, text, verbose=True, return_offsets_mapping=False):
        ids = super().__call__(text[::3])["input_ids"]
        offsets = [(3 * n, min(3 * n + 3, len(text))) for n in range(len(ids))]
        return {"input_ids": ids} | ({"offset_mapping": offsets} if return_offsets_mapping else {})


def test_labels_may_come_from_a_tagger_of_the_text():
    def tag(text):
        end = len(text)
        return [(0, min(5, end), "FIRST"), (min(7, end), min(9, end), "LATE")]

    model = moe.wrap(build("olmoe"), Words())
    names, numbers = labelling.label_tokens(model, Corpus.from_texts({"a": ["abcdefghijklm", "ab"]}), spans(tag))
    assert names == ["FIRST", "LATE", "other"]
    assert [[names[n] for n in one] for one in numbers] == [["FIRST", "FIRST", "LATE", "other", "other"], ["FIRST"]]
    result = routing_by_label(model, Corpus.from_texts({"a": ["abcdefghijklm", "abnmkl"]}), spans(tag), resamples=5)
    assert result.tokens.values.tolist() == [4, 1, 2]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("colour", "unknown label: expected one of kind, punctuation, script, position, or a function, got 'colour'"),
        (lambda text: ["x"], r"labels of 'plain/0' do not fit: expected 17, one a token, got 1"),
        (None, None),
        (spans(lambda text: []), "cannot place tokens in the text.*expected a tokenizer that returns offsets"),
    ],
)
def test_labels_that_cannot_be(label, message):
    if message is None:
        many = Corpus.from_texts({"a": ["x" * length for length in range(95, 101)]})
        with pytest.raises(BadInput, match="too many labels: expected at most 256 different ones"):
            routing_by_label(model_of(), many, lambda text: [f"{len(text.text)} {n}" for n in range(len(text.text))])
        return
    with pytest.raises(BadInput, match=message):
        routing_by_label(model_of(), CORPUS, label)


def test_labels_need_a_tokenizer():
    with moe.wrap(build("olmoe")) as model, pytest.raises(BadInput, match="labels need a tokenizer.*moe.wrap"):
        routing_by_label(model, CORPUS)


# Byte-level tokens


def test_parts_of_characters_are_shown_as_bytes():
    with moe.load() as model:
        tokenizer = model.tokenizer
        shown = [
            token_text(tokenizer, token) for token in tokenizer("the 鱻 cat", add_special_tokens=False)["input_ids"]
        ]
    assert "�" not in "".join(shown)
    assert "".join(shown).replace("> <", " ").replace("><", " ").startswith("the <") or "鱻" in "".join(shown)


def test_sentencepiece_bytes_and_unknown_tokens():
    class Bytes:
        def decode(self, ids):
            return "�"

        def convert_ids_to_tokens(self, token):
            return {1: "<0xE9>", 2: "▁x�", 3: None}[token]

    assert [token_text(Bytes(), n) for n in (1, 2, 3)] == ["<e9>", "�", "�"]
    assert token_text(None, 7) == "7"
