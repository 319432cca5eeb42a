"""Metrics as users write them: answers by text or id, functions, and what is said of wrong forms."""

import json

import pytest
import torch

import moe_interp as moe
from moe_interp.analyses.metrics import as_metric
from moe_interp.analyses.side_by_side import real_ids, side_by_side
from moe_interp.errors import BadInput
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

TEXTS = ["he said", "he knew"]  # a token for each character: "a" is id 68, "b" 69
A, B = 68, 69


@pytest.fixture(scope="module")
def model():
    with moe.wrap(build("mixtral"), StubTokenizer()) as found:
        yield found


def logits(model, text):
    return model.run(text).logits[0]


def effects(model, metric):
    return moe.expert_effects(model, TEXTS, metric, layers=0)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (moe.LogitDifference("a", "b"), lambda last, text: last[A] - last[B]),
        (moe.LogitDifference(("a",), (B,)), lambda last, text: last[A] - last[B]),
        (moe.LogitDifference(A, "b"), lambda last, text: last[A] - last[B]),
        (moe.LogitDifference(["a", B], ("c", "d")), lambda last, text: last[A + text] - last[A + 2 + text]),
        (moe.LogProbability("a"), lambda last, text: last.log_softmax(-1)[A]),
        (moe.Probability(("a", "b")), lambda last, text: last.softmax(-1)[A + text]),
    ],
)
def test_answers_by_text_are_those_of_their_tokens(model, metric, expected):
    base = effects(model, metric).base.values
    for number, text in enumerate(TEXTS):
        assert base[number] == pytest.approx(float(expected(logits(model, text)[-1], number)), abs=1e-5)


def test_a_result_tells_answers_as_they_were_given_and_their_ids(model):
    told = json.loads(effects(model, moe.LogitDifference("a", (B,))).attrs["provenance"])["metric_told"]
    assert f"answers=({A},), wrong=({B},)" in told and f"given=(('a',), ({B},))" in told
    told = json.loads(effects(model, moe.LogitDifference(A, B)).attrs["provenance"])["metric_told"]
    assert f"answers=({A},), wrong=({B},)" in told and "given=()" in told


def test_every_analysis_of_causes_takes_text(model):
    metric, ids = moe.LogitDifference("a", "b"), moe.LogitDifference(A, B)
    other = ["xe said", "xe knew"]
    for analysis in (
        lambda one: moe.activation_patching(model, TEXTS, other, one, over="routes", layers=0, resamples=5).effect,
        lambda one: moe.path_patching(model, TEXTS, other, (0, 3), "logits", one, resamples=5).effect,
        lambda one: moe.coalitions(model, TEXTS, [(0, 3), (0, 5)], one, resamples=5).effect,
        lambda one: moe.attribution_patching(model, TEXTS, metric=one, layers=0).attribution,
    ):
        found, expected = analysis(metric), analysis(ids)
        assert found.equals(expected) and (found != 0).any()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: moe.LogitDifference(" he"), r'wrong answer.*got none.*moe.LogitDifference\(" he", " she"\)'),
        (lambda: moe.LogitDifference(), "the answer of a logit difference takes tokens.*got none"),
        (lambda: moe.LogProbability(()), r'log-probability takes tokens.*got none. Write moe.LogProbability\(" he"\)'),
        (lambda: moe.Probability(torch.tensor([3, 4])), r"a probability takes tokens.*got a Tensor of shape \[2\]"),
        (lambda: moe.Probability({"a": 1}), "a probability takes tokens.*a text of one token, an id.*got a dict"),
        (lambda: moe.Probability(2.0), "a probability takes tokens.*got 2.0"),
        (lambda: moe.Probability(True), "a probability takes tokens.*got True"),
        (lambda: moe.Probability(("a", None)), "a probability takes tokens.*got a tuple"),
    ],
)
def test_what_is_no_answer_is_refused(make, says):
    with pytest.raises(BadInput, match=says):
        make()


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (5, "not a metric: expected 'nll', 'kl', a metric such as moe.LogitDifference.*got 5"),
        (torch.zeros(3), r"not a metric.*got a Tensor of shape \[3\]"),
        ({"answers": 3}, "not a metric.*got a dict"),
        (("a", "b"), "not a metric.*got a tuple"),
        (None, "not a metric.*got None"),
        ("logits", "unknown metric: expected 'nll', 'kl', .*got 'logits'"),
        (moe.KL, r"expected a metric, not its class, got the class KL. Make one: moe.KL\(...\)"),
        (moe.LogitDifference, r"got the class LogitDifference. Make one: moe.LogitDifference\(...\)"),
        (
            lambda logits, tokens: 0.0,
            r"metric takes other arguments: expected a function of one.*got <lambda>\(logits, tokens\)",
        ),
        (lambda: 0.0, r"metric takes other arguments.*got <lambda>\(\)"),
        (lambda logits: logits[-1], r"a metric gave no number.*got a Tensor of shape \[96\]"),
        (lambda logits: None, "a metric gave no number.*got None"),
        (lambda logits: "5", "a metric gave no number.*got '5'"),
        (moe.Probability(("a", "b", "c")), r"answers do not fit the texts: expected 1 or 2 ids.*got \[68, 69, 70\]"),
        (moe.Probability(("a", 96)), r"no such tokens.*got \[68, 96\]"),
        (
            moe.LogitDifference("a", "yes"),
            r"'yes' is not one token.*got 3: 'y' \(id 92\), 'e' \(id 72\), ",
        ),
        (moe.LogitDifference("", "a"), "'' is not one token.*got none"),
        (moe.LogitDifference(" a", "b"), "' a' is not one token.*got 2: .*'a' is one token"),
    ],
)
def test_what_is_no_metric_is_refused(model, metric, says):
    with pytest.raises(BadInput, match=says):
        effects(model, metric)


def test_an_error_inside_a_function_says_what_it_was_called_with(model):
    with pytest.raises(IndexError) as caught:
        effects(model, lambda logits: logits[0, -1, 5])
    assert "logits of one text at a time: [7, 96]" in caught.value.__notes__[0]


def test_a_function_may_give_any_kind_of_number(model):
    last = [logits(model, text)[-1] for text in TEXTS]
    for function in (
        lambda found: found[-1, A],
        lambda found: float(found[-1, A]),
        lambda found: found[-1, A][None],
        lambda found: found[-1, A].numpy(),
    ):
        assert effects(model, function).base.values == pytest.approx([float(one[A]) for one in last], abs=1e-5)
    assert effects(model, lambda found: bool(found[-1].argmax() == last[0].argmax())).base.values[0] == 1.0


def test_text_needs_a_tokenizer_and_the_model():
    with moe.wrap(build("mixtral")) as bare, pytest.raises(BadInput, match="text needs a tokenizer.*got 'a'"):
        moe.expert_effects(bare, [[5, 6, 7]], moe.Probability("a"))
    with moe.wrap(build("mixtral")) as bare:
        run = bare.run([[5, 6, 7]])
        with pytest.raises(BadInput, match=r"answers are text: expected ids.*as_metric\(metric, model\)"):
            moe.Probability("a").bind(run)
        assert as_metric(moe.Probability(A), bare) == moe.Probability((A,))


# ---- texts that do not pair up --------------------------------------------------------------------------------


def test_texts_of_other_lengths_are_shown_from_where_they_differ(model):
    for analysis in (
        lambda: moe.activation_patching(model, TEXTS, ["xe said", "he know it"], "nll", over="routes"),
        lambda: moe.attribution_patching(model, TEXTS, corrupted=["xe said", "he know it"]),
    ):
        with pytest.raises(BadInput) as caught:
            analysis()
        told, *lines = str(caught.value).split("\n")
        assert told.endswith("Change words into others of as many tokens. Of text 1 they differ from token 5 on:")
        assert [line.partition(":")[2].strip() for line in lines] == [
            "… 'e' ' ' 'k' 'n' | 'e' 'w'",
            "… 'e' ' ' 'k' 'n' | 'o' 'w' ' ' 'i' 't'",
        ]
        assert len({line.index("|") for line in lines}) == 1


def test_long_texts_are_cut_and_texts_that_go_on_end():
    first, second = [3] * 9, [3] * 9 + list(range(20, 40))
    told = side_by_side([[1], first], [[1], second], None, ("a", "other"))
    assert told.split("\n") == [
        "Of text 1 they differ from token 9 on:",
        "  a:     … 3 3 3 3 | (end)",
        "  other: … 3 3 3 3 | 20 21 22 23 24 25 26 27 … 12 more",
    ]
    assert side_by_side([[5]], [[6, 7]], None, ("a", "b")).split("\n")[1:] == ["  a: | 5", "  b: | 6 7"]


def test_padding_is_no_token_of_a_text():
    ids, mask = torch.tensor([[0, 0, 5], [7, 8, 9]]), torch.tensor([[0, 0, 1], [1, 1, 1]]).bool()
    assert real_ids(ids, mask) == [[5], [7, 8, 9]]


def test_embeddings_of_other_lengths_are_refused_without_tokens(model):
    embeddings = model.hf.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach()
    sides = [{"inputs_embeds": embeddings[:, :length]} for length in (3, 2)]
    with pytest.raises(BadInput, match="got 3 clean and 2 corrupted. Change words into others of as many tokens.$"):
        moe.activation_patching(model, *sides, "kl", over="routes")
