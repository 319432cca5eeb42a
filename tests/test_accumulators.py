"""Accumulators of pairs, transitions, token ids and labels: against loops, merged, resumed, in any order."""

import os
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_interp as moe
from moe_interp import stats
from moe_interp.analyses.coactivation import PairCounts
from moe_interp.analyses.collect import Options, collect, counted, sizes
from moe_interp.analyses.exact import Exact, blocks_of
from moe_interp.analyses.labels import LabelCounts, kind, label_tokens
from moe_interp.analyses.routing import RoutingCounts
from moe_interp.analyses.token_counts import TokenCounts
from moe_interp.analyses.transitions import TransitionCounts
from moe_interp.data import Corpus
from moe_interp.errors import BadData, BadInput, BadOutput
from moe_interp.run import Routing
from tests.random_runs import EXPERTS, LAYERS, TOP_K, VOCABULARY, choices_of, random_run
from tests.reference import together as slow
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

DOCUMENTS = 6
RUNS = ((3, [5, 2, 6], [0, 3, 1]), (4, [4, 7, 1], [2, 5, 4]))
EMPTY = {
    "routing": lambda: RoutingCounts.empty(DOCUMENTS, LAYERS, EXPERTS, TOP_K),
    "pairs": lambda: PairCounts.empty(LAYERS, EXPERTS, TOP_K, blocks=3),
    "transitions": lambda: TransitionCounts.empty(LAYERS, EXPERTS, TOP_K, blocks=3, seed=7),
    "tokens": lambda: TokenCounts.empty(LAYERS, EXPERTS, TOP_K, VOCABULARY, folds=3),
}
VALUES = ("ids", "weights", "mask", "logits", "scores")
ALL = pytest.mark.parametrize("name", EMPTY)


@cache
def runs(padding: str = "right"):
    return [(random_run(seed, lengths, padding), documents) for seed, lengths, documents in RUNS]


@cache
def choices():
    return [choice for run, documents in runs() for choice in choices_of(run, documents)]


def in_blocks() -> list[list[dict]]:
    numbers = blocks_of(np.arange(DOCUMENTS), 3)
    return [[c for c in choices() if numbers[c["document"]] == block] for block in range(3)]


def fed(name: str, *parts) -> Exact:
    sums = EMPTY[name]()
    for run, documents in parts:
        sums.update(run, np.array(documents))
    return sums


def assert_equal(left: Exact, right: Exact) -> None:
    assert left.identity() == right.identity()
    assert left.state().keys() == right.state().keys()
    for key, values in left.state().items():
        np.testing.assert_array_equal(values, right.state()[key], err_msg=key)


def rows_of(run, documents):
    """One run for each text."""
    for row in range(len(documents)):
        part = {
            layer: type(route)(
                *(getattr(route, n)[row : row + 1] for n in ("ids", "weights", "mask", "logits", "scores"))
            )
            for layer, route in run.routing.items()
        }
        tokens = type(run.tokens)(run.mask[row : row + 1], run.tokens.index[row : row + 1])
        yield type(run)(run.logits[row : row + 1], run.token_ids[row : row + 1], tokens, part, {}), [documents[row]]


@ALL
def test_batches_order_and_shards_change_nothing(name):
    whole = fed(name, *runs())
    assert_equal(fed(name, *reversed(runs())), whole)
    singles = [one for run, documents in runs() for one in rows_of(run, documents)]
    assert_equal(fed(name, *singles), whole)
    one, two, three = fed(name, *singles[:1]), fed(name, *singles[1:4]), fed(name, *singles[4:])
    assert_equal(one.merge(two).merge(three), whole)
    assert_equal(three.merge(one.merge(two)), whole)


@ALL
def test_a_stored_state_goes_on_where_it_was(name, tmp_path):
    np.savez(tmp_path / "state.npz", **fed(name, runs()[0]).state())
    with np.load(tmp_path / "state.npz") as stored:
        taken_up = type(EMPTY[name]()).from_state(stored)
    taken_up.update(runs()[1][0], np.array(runs()[1][1]))
    assert_equal(taken_up, fed(name, *runs()))


@ALL
def test_left_padding_counts_what_right_padding_does(name):
    right = [(run, documents) for run, documents in runs()]
    left = []
    for run, documents in right:
        for one, document in rows_of(run, documents):
            length = int(one.mask.sum())
            order = torch.cat([torch.arange(length, one.mask.shape[1]), torch.arange(length)])
            route = {
                layer: Routing(*(getattr(values, name)[:, order] for name in VALUES))
                for layer, values in one.routing.items()
            }
            tokens = type(one.tokens).from_mask(one.mask[:, order], one.mask.shape[1])
            left.append((type(one)(one.logits, one.token_ids[:, order], tokens, route, {}), document))
    assert_equal(fed(name, *left), fed(name, *right))


@ALL
def test_only_like_is_merged(name):
    other = {
        "routing": RoutingCounts.empty(DOCUMENTS, LAYERS, EXPERTS, 2),
        "pairs": PairCounts.empty(LAYERS, EXPERTS, TOP_K, blocks=4),
        "transitions": TransitionCounts.empty(LAYERS, EXPERTS, TOP_K, blocks=3, seed=8),
        "tokens": TokenCounts.empty(LAYERS, EXPERTS, TOP_K, VOCABULARY + 1, folds=3),
    }[name]
    with pytest.raises(BadInput, match=f"cannot merge {type(other).__name__}: expected"):
        EMPTY[name]().merge(other)


@ALL
def test_special_tokens_do_not_count(name):
    special = 4
    without = fed(name, *((counted(run, [special]), documents) for run, documents in runs()))
    kept = [choice for choice in choices() if choice["token"] != special]
    assert len(kept) < len(choices())
    if name == "routing":
        assert without.tokens.sum() == len(kept) / len(LAYERS)
        assert without.counts.sum() == TOP_K * len(kept)
    elif name == "pairs":
        assert without.pairs[:, 1].sum(axis=0)[2, 5] == slow.pairs(kept, LAYERS[1], 2, 5)
    elif name == "transitions":
        assert without.flows.sum(axis=0)[0, 2, 5] == slow.flow(kept, *LAYERS, 2, 5)
    else:
        assert without.occurrences()[:, special].sum() == 0
        assert without.occurrences().sum() == len(kept) / len(LAYERS)


# Pairs


def test_pairs_equal_loops():
    result = fed("pairs", *runs()).result(provenance={}, resamples=20)
    for layer in LAYERS:
        load = [slow.pairs(choices(), layer, e, e) for e in range(EXPERTS)]
        tokens = len(slow.at(choices(), layer))
        null = slow.pair_chances([one / tokens for one in load], TOP_K)
        for one, other in combinations(range(EXPERTS), 2):
            for a, b in ((one, other), (other, one)):
                here = result.sel(layer=layer, expert=a, other=b)
                both = slow.pairs(choices(), layer, a, b)
                assert int(here.pairs) == both
                assert float(here.coactivation) == pytest.approx(both / load[a])
                assert float(here.coactivation_as_coded) == pytest.approx(
                    slow.adjacent(choices(), layer, a, b) / load[a]
                )
                assert float(here.lift) == pytest.approx(slow.lift(choices(), layer, a, b))
                assert float(here.npmi) == pytest.approx(slow.npmi(choices(), layer, a, b))
                expected = null[a, b] * tokens**2 / (load[a] * load[b])
                assert float(here.lift_load) == pytest.approx(expected, rel=1e-5)
        assert np.isnan(result.lift.sel(layer=layer).values.diagonal()).all()
    assert float(result.lift_uniform) == pytest.approx((TOP_K - 1) * EXPERTS / (TOP_K * (EXPERTS - 1)))
    assert float(result.coactivation_uniform) == pytest.approx((TOP_K - 1) / (EXPERTS - 1))


def test_intervals_of_lift_leave_out_blocks_of_documents():
    from scipy.stats import t

    result = fed("pairs", *runs()).result(provenance={}, resamples=5)
    blocks = in_blocks()
    whole, mean, error = slow.block_jackknife(lambda some: slow.lift(some, LAYERS[0], 1, 4), blocks)
    centre, half = whole - 2 * (mean - whole), t.ppf(0.975, 2) * error
    found = result.lift_interval.sel(layer=LAYERS[0], expert=1, other=4)
    np.testing.assert_allclose(found, [centre - half, centre + half], rtol=1e-9)


# Transitions


def test_flows_equal_loops_and_a_shuffle_keeps_every_documents_margins():
    sums = fed("transitions", *runs())
    result = sums.result(provenance={})
    table = [[slow.flow(choices(), *LAYERS, a, b) for b in range(EXPERTS)] for a in range(EXPERTS)]
    np.testing.assert_array_equal(result.flows[0], table)
    np.testing.assert_allclose(result.flow[0], np.array(table) / np.sum(table, axis=1, keepdims=True))
    assert float(result.mutual_information[0]) == pytest.approx(slow.mutual_information(table))
    shuffled = sums.shuffled.sum(axis=0)[0].tolist()
    gain = slow.mutual_information(table) - slow.mutual_information(shuffled)
    assert float(result.gain[0]) == pytest.approx(gain)
    for document in range(DOCUMENTS):
        own = next(one for run, numbers in runs() for one in rows_of(run, numbers) if one[1] == [document])
        alone = fed("transitions", own)
        assert (alone.flows.sum(axis=2) == alone.shuffled.sum(axis=2)).all()
        assert (alone.flows.sum(axis=3) == alone.shuffled.sum(axis=3)).all()
    assert (sums.flows != sums.shuffled).any()


def test_a_single_layer_has_no_transitions():
    with pytest.raises(BadInput, match="no transitions: expected two MoE layers or more"):
        TransitionCounts.empty([3], EXPERTS, TOP_K)


def test_the_gain_is_nothing_for_independent_layers_and_large_for_copied_ones():
    rng = np.random.default_rng(0)
    real, shuffled = np.zeros((2, 20, 1, 8, 8), np.int64)
    for block in range(20):
        load = rng.dirichlet(np.full(8, 0.7))  # a topic: documents differ, layers within them do not depend
        first, second = (rng.choice(8, 400, p=load) for _ in range(2))
        np.add.at(real[block, 0], (first, second), 1)
        np.add.at(shuffled[block, 0], (first, rng.permutation(second)), 1)
    independent = TransitionCounts((0, 1), (1, 1), 0, real, shuffled).result(provenance={})
    low, high = independent.gain_interval[:, 0]
    assert low < 0 < high
    assert float(independent.mutual_information[0]) > 0.02  # topic and bias alone
    copied = real * 0
    copied[:, 0] = np.array([np.diag(table.sum(axis=1)) for table in real[:, 0]])
    same = TransitionCounts((0, 1), (1, 1), 0, copied, shuffled).result(provenance={})
    assert float(same.gain_interval[0, 0]) > 1.0


# Token ids


def test_token_counts_equal_loops():
    sums = fed("tokens", *runs())
    for fold in range(3):
        own = set(np.flatnonzero(blocks_of(np.arange(DOCUMENTS), 3) == fold).tolist())
        for index, layer in enumerate(LAYERS):
            table = sums.table(index, fold).toarray()
            for token in range(VOCABULARY):
                expected = [slow.routed(choices(), layer, token, e, own) for e in range(EXPERTS)]
                assert table[token].tolist() == expected
                assert sums.occurrences()[fold, token] == slow.occurs(choices(), layer, token, own)
    histogram = sums.histogram(DOCUMENTS).toarray()
    for document in range(DOCUMENTS):
        for token in range(VOCABULARY):
            assert histogram[document, token] == slow.occurs(choices(), LAYERS[0], token, {document})


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=8), max_size=6))
def test_sparse_counts_are_counts(parts):
    from moe_interp.analyses.exact import SparseCounts

    sums = SparseCounts()
    for part in parts:
        sums.add(np.array(part, dtype=np.int64))
    everything = [code for part in parts for code in part]
    codes, counts = (sums + SparseCounts()).tidy()
    assert dict(zip(codes.tolist(), counts.tolist(), strict=True)) == {c: everything.count(c) for c in set(everything)}
    assert codes.tolist() == sorted(set(everything))


# Labels


def labels_of(documents, lengths):
    return [
        np.array([(document + place) % 3 for place in range(length)])
        for document, length in zip(documents, lengths, strict=True)
    ]


def test_label_counts_equal_loops_and_merge():
    sums = LabelCounts.empty(DOCUMENTS, 3, LAYERS, EXPERTS, TOP_K)
    parts = []
    for (run, documents), (_, lengths, _) in zip(runs(), RUNS, strict=True):
        parts.append(LabelCounts.empty(DOCUMENTS, 3, LAYERS, EXPERTS, TOP_K))
        for one in (sums, parts[-1]):
            one.add(run, np.array(documents), labels_of(documents, lengths))
    assert_equal(parts[1].merge(parts[0]), sums)
    for choice_document in range(DOCUMENTS):
        for label in range(3):
            for index, layer in enumerate(LAYERS):
                own = [
                    c
                    for c in slow.at(choices(), layer, {choice_document})
                    if (c["document"] + c["position"]) % 3 == label
                ]
                assert sums.tokens[choice_document, label] == len(own)
                expected = [sum(e in c["ids"] for c in own) for e in range(EXPERTS)]
                assert sums.counts[choice_document, label, index].tolist() == expected


def test_labels_of_a_corpus_are_told_once_or_run_by_run():
    numbers: list = [None] * DOCUMENTS
    for _, lengths, documents in RUNS:
        for document, labels in zip(documents, labels_of(documents, lengths), strict=True):
            numbers[document] = labels
    sizes = DOCUMENTS, 3, LAYERS, EXPERTS, TOP_K
    told, run_by_run = LabelCounts.empty(*sizes, numbers), LabelCounts.empty(*sizes)
    for (run, documents), (_, lengths, _) in zip(runs(), RUNS, strict=True):
        told.update(run, np.array(documents))
        run_by_run.add(run, np.array(documents), labels_of(documents, lengths))
    np.testing.assert_array_equal(told.counts, run_by_run.counts)
    np.testing.assert_array_equal(told.tokens, run_by_run.tokens)
    assert_equal(LabelCounts.from_state(told.state()), told)
    assert_equal(told.merge(LabelCounts.empty(*sizes, numbers)), told)
    others = [(one + 1) % 3 for one in numbers]
    with pytest.raises(BadInput, match="cannot merge LabelCounts"):
        told.merge(LabelCounts.empty(*sizes, others))
    moved = [np.concatenate([numbers[0], numbers[1][:1]]), numbers[1][1:], *numbers[2:]]  # the same, cut elsewhere
    with pytest.raises(BadInput, match="cannot merge LabelCounts"):
        told.merge(LabelCounts.empty(*sizes, moved))
    with pytest.raises(BadInput, match=r"labels of tokens are not known: expected LabelCounts.empty\(..., numbers"):
        run_by_run.update(runs()[0][0], np.array(runs()[0][1]))


# One pass over a corpus


class Special(StubTokenizer):
    all_special_ids = (3 + ord("#") - 32,)


CORPUS = Corpus.from_texts(
    {"plain": ["#The cat sat", "#mu", "#so it goes on"], "code": ["#f(x) = 2", "#if a:"]}, "texts"
)


def interrupt_after(calls: int, model, monkeypatch) -> None:
    """The run after so many is broken off."""
    run, left = model.run, [None] * calls

    def interrupted(*given, **named):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return run(*given, **named)

    monkeypatch.setattr(model, "run", interrupted)


def test_a_pass_under_standing_edits_is_not_taken_up(tmp_path):
    path = tmp_path / "states.npz"
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        sums = {"pairs": PairCounts.empty(model.layers, 8, 3)}
        says = "a pass under edits cannot be taken up: expected a model without standing edits, or resume=None, got 1"
        with model.edit(moe.ablate(layer=0, expert=1)):
            with pytest.raises(BadInput, match=says):
                collect(model, CORPUS, sums, resume=path)
            collect(model, CORPUS, sums)
        assert not path.exists()


def test_one_document_gives_estimates_without_intervals():
    one = Corpus.from_texts({"a": ["hello there all of you"]})
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        flows = moe.transitions(model, one)
        vocabulary = moe.vocabulary_specialization(model, one, at_least=2)
        pairs = moe.expert_similarity(model, one, tokens=20, weights=False)
    np.testing.assert_allclose(flows.gain, flows.mutual_information - flows.mutual_information_shuffled)
    np.testing.assert_allclose(vocabulary.gain, vocabulary.specialization - vocabulary.specialization_null)
    others = ~np.eye(8, dtype=bool)
    assert np.isfinite(pairs.output_cosine.values[:, others]).all()
    for interval in (flows.gain_interval, vocabulary.gain_interval, pairs.output_cosine_interval):
        assert np.isnan(interval).all()


def test_one_pass_feeds_all_and_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    with moe.wrap(build("deepseek_v3"), Special(), name="tiny") as model:
        sizes = model.layers, 8, 3

        def empty():
            return {
                "routing": RoutingCounts.empty(5, *sizes),
                "pairs": PairCounts.empty(*sizes),
                "tokens": TokenCounts.empty(*sizes, 96),
            }

        options = Options(batch_tokens=16)
        whole = empty()
        where = collect(model, CORPUS, whole, options)
        assert where["special_tokens"] == "left out"
        assert whole["routing"].tokens.tolist() == [11, 2, 13, 8, 5]

        path = tmp_path / "states.npz"
        interrupt_after(2, model, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            collect(model, CORPUS, empty(), options, resume=path, every=1)
        monkeypatch.undo()
        with np.load(path) as stored:
            assert stored["done"] == 2
        resumed = empty()
        collect(model, CORPUS, resumed, options, resume=path, every=1)
        for name in whole:
            assert_equal(resumed[name], whole[name])
        again = empty()
        collect(model, CORPUS, again, options, resume=path)
        assert_equal(again["pairs"], whole["pairs"])
        with pytest.raises(BadData, match="is of another pass"):
            collect(model, CORPUS, empty(), Options(batch_tokens=17), resume=path)
        (tmp_path / "bad.npz").write_bytes(b"no")
        (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-100])
        for name in ("bad.npz", "cut.npz"):
            with pytest.raises(BadData, match="cannot read"):
                collect(model, CORPUS, empty(), options, resume=tmp_path / name)
        counted_too = empty()
        collect(model, CORPUS, counted_too, Options(special_tokens=True))
        assert counted_too["routing"].tokens.tolist() == [12, 3, 14, 9, 6]
        assert stats.shares(counted_too["routing"].counts.sum(axis=(0, 1))).sum() == pytest.approx(1)


@ALL
def test_what_is_held_is_what_is_stated(name):
    sums = fed(name, *runs())
    sums.state()  # tidied
    stated = {
        "routing": 8 * (DOCUMENTS * (1 + 2 * (3 * EXPERTS + 5)) + 2 * (2 * EXPERTS + 1)),
        "pairs": 8 * (3 + 4 * 2 * EXPERTS**2),
        "transitions": 16 * 3 * EXPERTS**2,
        "tokens": 16 * (sums.routed.tidy()[0].size + sums.seen.tidy()[0].size) if name == "tokens" else 0,
    }[name]
    assert sums.nbytes == stated


def test_domains_that_alternate_do_not_share_blocks():
    documents = np.arange(1000)
    blocks = blocks_of(documents, 10)
    for turn in range(100):
        assert sorted(blocks[10 * turn : 10 * turn + 10]) == list(range(10))
    for domains in (2, 5, 9, 10, 11):
        table = np.zeros((10, domains), int)
        np.add.at(table, (blocks, documents % domains), 1)
        assert np.abs(table - 100 / domains).max() < 4 * np.sqrt(100 / domains)
    parts = np.concatenate([blocks_of(documents[rows], 10) for rows in (slice(7), slice(7, 501), slice(501, None))])
    np.testing.assert_array_equal(parts, blocks)  # whatever comes together


def test_experts_that_are_always_chosen_are_together_by_load_alone():
    rng = np.random.default_rng(0)
    third = rng.integers(2, 6, size=(20, 200))
    blocks = np.zeros((20, 1, 6, 6), np.int64)
    for block, chosen in enumerate(third):
        for one in chosen:
            blocks[block, 0][np.ix_([0, 1, one], [0, 1, one])] += 1
    sums = PairCounts((0,), (3,), np.full(20, 200), blocks, np.zeros((1, 6, 6), np.int64))
    result = sums.result(provenance={}, resamples=200)
    pair = result.sel(layer=0, expert=0, other=1)
    assert float(pair.lift) == float(pair.lift_load) == 1.0
    assert float(pair.lift_p) == 1.0
    np.testing.assert_allclose(result.lift_load[0, 0, 1:], 1.0)


def test_a_pass_is_not_taken_up_by_another_model_of_its_name(tmp_path):
    path, options = tmp_path / "states.npz", Options(batch_tokens=16)
    for seed in (0, 1):
        hf = build("olmoe")
        with torch.no_grad():
            for name, weights in hf.named_parameters():
                if "gate.weight" in name:
                    weights += seed
        with moe.wrap(hf, Special(), name="tiny") as model:
            sums = {"pairs": PairCounts.empty(*sizes(model))}
            if seed == 0:
                collect(model, CORPUS, sums, options, resume=path)
            else:
                with pytest.raises(BadData, match="is of another pass: expected the same model, dtype, tokenizer"):
                    collect(model, CORPUS, sums, options, resume=path)


def test_a_pass_over_labels_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    with moe.wrap(build("deepseek_v3"), Special(), name="tiny") as model:
        names, numbers = label_tokens(model, CORPUS, "kind")
        options, path = Options(batch_tokens=16), tmp_path / "labels.npz"

        def empty(labels=numbers):
            return {"labels": LabelCounts.empty(5, len(names), model.layers, 8, 3, labels)}

        whole = empty()
        collect(model, CORPUS, whole, options)
        for document, text in enumerate(CORPUS.texts):
            kinds = [kind(sign) for sign in text[1:]]  # the first is special
            assert whole["labels"].tokens[document].tolist() == [kinds.count(name) for name in names]
        interrupt_after(2, model, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            collect(model, CORPUS, empty(), options, resume=path, every=1)
        monkeypatch.undo()
        with np.load(path) as stored:
            assert stored["done"] == 2
            assert 0 < stored["labels/tokens"].sum() < whole["labels"].tokens.sum()
        resumed = empty()
        collect(model, CORPUS, resumed, options, resume=path, every=1)
        assert_equal(resumed["labels"], whole["labels"])
        with pytest.raises(BadData, match="is of another pass"):  # as many labels, of other tokens
            collect(model, CORPUS, empty([one[::-1].copy() for one in numbers]), options, resume=path)


def all_sums(model):
    made_for = sizes(model)
    return {
        "routing": RoutingCounts.empty(len(CORPUS), *made_for),
        "pairs": PairCounts.empty(*made_for),
        "flows": TransitionCounts.empty(*made_for),
        "tokens": TokenCounts.empty(*made_for, model.spec.vocab_size),
    }


@pytest.mark.parametrize("breaks", ["a run", "an update"])
def test_the_same_call_after_an_interruption_counts_nothing_twice(breaks, monkeypatch):
    options = Options(batch_tokens=16)
    with moe.wrap(build("deepseek_v3"), Special()) as model:
        whole, again, twice = (all_sums(model) for _ in range(3))
        collect(model, CORPUS, whole, options)
        if breaks == "a run":
            interrupt_after(2, model, monkeypatch)
        else:
            real, left = TokenCounts.update, [None] * 2

            def update(self, run, documents):
                if not left:
                    raise KeyboardInterrupt
                left.pop()
                real(self, run, documents)

            monkeypatch.setattr(TokenCounts, "update", update)
        with pytest.raises(KeyboardInterrupt):
            collect(model, CORPUS, again, options)
        monkeypatch.undo()
        for name, one in all_sums(model).items():
            assert_equal(again[name], one)
        collect(model, CORPUS, again, options)
        for name, one in whole.items():
            assert_equal(again[name], one)
        for _ in range(2):
            collect(model, CORPUS, twice, options)
        assert (twice["routing"].counts == 2 * whole["routing"].counts).all()


def test_accumulators_of_other_sizes_are_refused_before_the_pass():
    with moe.wrap(build("deepseek_v3"), Special()) as model:
        layers, experts, top_k = sizes(model)
        says = "the accumulator 'x' is made for another model or corpus: expected"
        for one, expected in (
            (PairCounts.empty(layers, experts, 2), "K 3, got K 2"),
            (PairCounts.empty(layers, experts + 1, top_k), "experts 8, got 9"),
            (PairCounts.empty((0, 9), experts, 3), r"MoE layers of .*, got layers \[0, 9\]"),
            (RoutingCounts.empty(4, layers, experts, top_k), "documents 5, got 4"),
            (TransitionCounts.empty(layers, experts - 1, top_k), "experts 8, got 7"),
            (TokenCounts.empty(layers, 7, top_k, model.spec.vocab_size), "experts 8, got 7"),
            (TokenCounts.empty(layers, experts, top_k, 5), "vocabulary 96, got 5"),
        ):
            fine = PairCounts.empty(layers, experts, top_k)
            with pytest.raises(BadInput, match=f"{says} {expected}"):
                collect(model, CORPUS, {"fine": fine, "x": one})
            assert not fine.tokens.any()


def test_a_pass_that_began_with_other_counts_is_not_taken_up(tmp_path):
    path, options = tmp_path / "states.npz", Options(batch_tokens=16)
    with moe.wrap(build("deepseek_v3"), Special()) as model:
        sums = {"pairs": PairCounts.empty(*sizes(model))}
        collect(model, CORPUS, sums, options, resume=path)
        before = sums["pairs"].pairs.copy()
        with pytest.raises(BadData, match="is of another pass: .* accumulators, with the same counts at first"):
            collect(model, CORPUS, sums, options, resume=path)
        assert (sums["pairs"].pairs == before).all()
        os.mkfifo(tmp_path / "pipe.npz")
        with pytest.raises(BadOutput, match="cannot write .*pipe.npz: .*, got a pipe, a device or the like"):
            collect(model, CORPUS, {"pairs": PairCounts.empty(*sizes(model))}, resume=tmp_path / "pipe.npz")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sums": [1]}, BadInput, "not accumulators: expected a mapping such as"),
        ({"sums": {"a": 1}}, BadInput, "not accumulators: expected a mapping such as"),
        ({"every": 0}, BadInput, "invalid every for collect: expected a whole number of at least 1, got 0"),
        ({"resume": 3}, BadInput, "invalid resume for collect: expected a string, a path or None, got 3"),
        ({"resume": "FOLDER"}, BadOutput, "cannot write .*: expected a regular file, or none yet, got a folder"),
        ({"resume": "FOLDER/no/x.npz"}, BadOutput, "cannot write .*, got folder .*no, which is not there"),
    ],
)
def test_what_collect_cannot_do_is_refused_before_the_pass(options, error, said, tmp_path, monkeypatch):
    options = {name: v.replace("FOLDER", str(tmp_path)) if isinstance(v, str) else v for name, v in options.items()}
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        monkeypatch.setattr(model, "run", lambda *_, **__: pytest.fail("a pass was begun"))
        with pytest.raises(error, match=said):
            collect(model, CORPUS, **{"sums": {"pairs": PairCounts.empty(*sizes(model))}} | options)
