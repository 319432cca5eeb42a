"""Values that do not fit are refused, never bent to fit; and edits say what they touched."""

import pytest
import torch

import moe_interp as moe
import moe_interp.stats as stats
from moe_interp.analyses.collect import Options
from moe_interp.analyses.labels import Tokenized
from moe_interp.analyses.labels import spans as moe_spans
from moe_interp.errors import BadInput
from moe_interp.interventions.values import ByToken
from tests.tiny_types import build

IDS = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]])
E, K, D = 8, 3, 64


@pytest.fixture(scope="module")
def model():
    with moe.wrap(build("olmoe")) as opened:
        yield opened


# Ids


def distinct(rows=2, columns=6):
    return torch.stack([torch.randperm(E)[:K] for _ in range(rows * columns)]).view(rows, columns, K)


@pytest.mark.parametrize(
    "ids, says",
    [
        (torch.full((2, 6, K), 1.7), "not expert ids: expected whole numbers"),
        (distinct().float(), "not expert ids: expected whole numbers"),
        (torch.ones(2, 6, K, dtype=torch.bool), "not expert ids"),
        (torch.full((2, 6, K), 2), r"an expert forced twice at a token: .*got \[2, 2, 2\] at token 0 of text 0"),
    ],
)
def test_ids_to_force_are_whole_and_different(model, ids, says):
    with pytest.raises(BadInput, match=says):
        model.run(IDS, edit=moe.force(ids, layer=1))


def test_ids_that_are_right_run(model):
    ids = distinct()
    run = model.run(IDS, edit=moe.force(ids, layer=1, weights="kept"))
    assert torch.equal(run.routing[1].ids, ids) and run.touched == (12,)


def test_an_expert_may_stand_twice_where_the_second_has_no_weight(model):
    ids, weights = distinct(), torch.rand(2, 6, K)
    ids[0, 2, 2], weights[0, 2, 2] = ids[0, 2, 0], 0.0
    run = model.run(IDS, edit=moe.force(ids, layer=1, weights=weights))
    assert torch.equal(run.routing[1].ids, ids)
    weights[0, 2, 2] = 0.1
    with pytest.raises(BadInput, match="forced twice at a token: .*at token 2 of text 0"):
        moe.force(ids, layer=1, weights=weights)
    # What a run under forced weights left, with a repeated expert of weight 0, is taken up again.
    once = model.run(IDS, edit=moe.force((5,), layer=1, weights=(0.7,)))
    again = model.run(IDS, edit=moe.patch_route(once, layer=1))
    assert torch.equal(again.logits, once.logits)


@pytest.mark.parametrize(
    "weights",
    [torch.rand(2, 5, K), torch.rand(1, 6, K), torch.rand(2, 6, K - 1), torch.ones(2, 6, K, dtype=torch.long)],
)
def test_weights_of_a_shorter_list_are_refused(weights):
    with pytest.raises(BadInput, match="weights do not fit experts"):
        moe.force(distinct(), layer=1, weights=weights)


def test_weights_of_another_number_are_refused():
    with pytest.raises(BadInput, match="weights do not fit experts"):
        moe.force((1, 2), layer=1, weights=(0.5,))


# Shapes


@pytest.mark.parametrize(
    "given", [torch.tensor(1.0), torch.ones(1), torch.ones(D - 1), torch.ones(2, D), torch.ones(6, D)]
)
def test_vectors_are_not_spread(model, given):
    edits = [
        lambda: moe.steer(given, layer=1, point="resid_mid"),
        lambda: moe.replace(given, layer=1, point="resid_mid"),
        lambda: moe.steer(given, layer=1, expert=2),
    ]
    for edit in edits[: 2 if given.dim() > 1 else 3]:
        with pytest.raises(BadInput, match="values do not fit"):
            model.run(IDS, edit=edit())


def test_vectors_that_fit_are_added_at_every_token(model):
    vector = torch.randn(D)
    base, run = (
        model.run(IDS, read="resid_mid", edit=edit) for edit in ((), moe.steer(vector, layer=1, point="resid_mid"))
    )
    assert torch.allclose(run["resid_mid", 1], base["resid_mid", 1] + vector, atol=1e-6)


def test_truth_values_are_no_ids(model):
    with pytest.raises(BadInput, match="values do not fit 'expert_ids'"):
        model.run(IDS, edit=moe.replace(torch.ones(2, 6, K, dtype=torch.bool), layer=1, point="expert_ids"))


# Too large


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda: moe.scale(layer=1, expert=None, by=1e300), "a factor of 1e.300 is too large"),
        (lambda: moe.steer(torch.ones(D), layer=1, point="resid_mid", by=1e300), "is too large"),
        (lambda: moe.steer(torch.ones(D), layer=1, expert=list(range(E)), by=1e39), "is too large"),
        (
            lambda: moe.replace(torch.full((D,), 1e300, dtype=torch.float64), layer=1, point="resid_mid"),
            "are too large",
        ),
        (lambda: moe.bias(layer=1, expert=2, by=1e300), "a push of 1e.300 is too large"),
        (lambda: moe.bias(layer=1, expert=2, by=1e300, on="logits"), "a push of 1e.300 is too large"),
        (lambda: moe.noise(1e300), "noise of standard deviation 1e.300 is too large"),
        (lambda: moe.force((1, 2, 3), layer=1, weights=(1e300, 1.0, 1.0)), "weights to force are too large"),
    ],
)
def test_what_leaves_the_range_of_the_dtype_is_refused(model, edit, says):
    with pytest.raises(BadInput, match=says):
        model.run(IDS, edit=edit())


def test_factors_within_the_range_multiply(model):
    base, run = (
        model.run(IDS, read="expert_out", edit=edit) for edit in ((), moe.scale(layer=1, expert=None, by=1e20))
    )
    assert torch.equal(run["expert_out", 1], base["expert_out", 1] * 1e20)


# Arguments that nothing uses


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: moe.swap(layer=5, layers=(3, 4)), "what to swap: .*got layer, layers"),
        (lambda: moe.swap(layer=5, experts=(1, 2), layers=(3, 4)), "what to swap: .*got layer, experts, layers"),
        (lambda: moe.swap(), "what to swap: .*got neither"),
        (lambda: moe.swap(layer=5, experts=(1, 1)), "not two experts"),
        (lambda: moe.swap(layer=5, experts=(1, 1, 2)), r"not two experts to swap: .*got \(1, 1, 2\)"),
    ],
)
def test_arguments_without_a_use_are_refused(call, says):
    with pytest.raises(BadInput, match=says):
        call()


# What was touched


def test_layers_that_swap_touch_all_their_slots(model):
    base, run = model.run(IDS), model.run(IDS, edit=moe.swap(layers=(1, 2)))
    assert not torch.equal(run.logits, base.logits)
    assert run.touched == (2 * IDS.numel() * K,)
    padded = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])}
    assert model.run(padded, edit=moe.swap(layers=(1, 2))).touched == (2 * 9 * K,)


def test_a_wider_choice_touches_the_slots_that_it_adds(model):
    base, run = model.run(IDS), model.run(IDS, edit=moe.top_k(5, layers=[0, 2]))
    assert run.routing[0].ids.shape[-1] == 5 and not torch.equal(run.logits, base.logits)
    assert run.touched == (2 * IDS.numel() * (5 - K),)
    assert model.run(IDS, edit=moe.top_k(2)).touched == (4 * IDS.numel(),)


def test_json_does_not_get_around_the_checks():
    stored = moe.to_json([moe.force(distinct(), layer=1)])
    assert moe.from_json(stored) == moe.from_json(moe.to_json(moe.from_json(stored)))
    spoiled = moe.force(distinct(), layer=1)
    object.__setattr__(spoiled, "experts", ByToken.of(torch.full((2, 6, K), 2)))
    with pytest.raises(BadInput, match="forced twice"):
        moe.from_json(moe.to_json([spoiled]))


# Truth values, draws, spans


@pytest.mark.parametrize("given", ["no", "False", 0, 1, None])
def test_truth_values_are_true_or_false(given):
    corpus = moe.Corpus.from_texts({"a": ["hello there"]})
    small = moe.load()
    for call in (
        lambda: Options(special_tokens=given),
        lambda: moe.routing(small, corpus, special_tokens=given),
        lambda: moe.perplexity(small, corpus, per_layer=given),
        lambda: moe.expert_similarity(small, corpus, weights=given),
        lambda: moe.attribution_patching(small, "hello there", neurons=given),
    ):
        with pytest.raises(BadInput, match="invalid .*: expected True or False"):
            call()


@pytest.mark.parametrize("given", [0, -1, True])
def test_no_draws_give_no_p(given):
    counts, groups = torch.randint(0, 9, (6, 2, 4)).numpy(), torch.tensor([0, 0, 0, 1, 1, 1]).numpy()
    for call in (
        lambda: stats.permutation_max(stats.share_difference, counts, groups, 2, permutations=given),
        lambda: stats.sign_flip_max(counts.astype(float), flips=given),
        lambda: stats.bootstrap_ratio(counts, counts.sum(-1), resamples=given),
    ):
        with pytest.raises(BadInput, match="invalid .*: expected a whole number from 1"):
            call()


@pytest.mark.parametrize("stretch", [(-3, 2), (4, 2), (0, 12), (0.0, 2.0), (False, True)])
def test_spans_outside_the_text_shift_no_label(stretch):
    text = Tokenized("hello there", ["hello", " there"], [(0, 5), (5, 11)])
    with pytest.raises(BadInput, match="a label of characters that the text does not have"):
        moe_spans(lambda _: [(*stretch, "x")])(text)


def test_spans_inside_the_text_label_their_tokens():
    text = Tokenized("hello there", ["hello", " there"], [(0, 5), (5, 11)])
    assert moe_spans(lambda _: [(6, 11, "x"), (3, 3, "y")])(text) == ["other", "x"]
