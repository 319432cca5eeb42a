"""One expert, and as many experts as slots: figures that follow by hand, and clear errors where there is no figure."""

import numpy as np
import pytest

import moe_interp as moe
from moe_interp.errors import BadInput, MoEError
from tests.test_inputs import tiny, words

CORPUS = moe.Corpus.from_texts({"a": ["w5 w6 w7 w8 w9", "w8 w9 w4 w10 w11"], "b": ["w7 w8 w12 w13", "w4 w5 w14 w15"]})
TEXT = "w5 w6 w7 w8"


@pytest.fixture(scope="module", params=[1, 2], ids=["one expert", "K = E"])
def model(request):
    count = request.param
    hf = tiny("OlmoeForCausalLM", num_experts=count, num_local_experts=count, num_experts_per_tok=count)
    with moe.wrap(hf, words()) as opened:
        assert opened.spec.num_experts == opened.spec.top_k == count
        yield opened


def test_every_token_goes_to_every_expert(model):
    count = model.spec.num_experts
    found = moe.routing(model, CORPUS, resamples=20)
    np.testing.assert_array_equal(found.tokens, [10, 8])
    np.testing.assert_allclose(found.utilisation, 1 / count)
    np.testing.assert_allclose(found.specialization, 1.0)
    np.testing.assert_allclose(found.load_balance, 1.0)
    np.testing.assert_allclose(found.load_balance_as_coded, count)
    np.testing.assert_array_equal(found.divergence, 0.0)
    assert found.margin.isnull().all()  # nobody is left out
    np.testing.assert_array_equal(found.dead_experts, 0)


def test_pairs_are_of_two_experts(model):
    found = moe.coactivation(model, CORPUS, resamples=20)
    count = model.spec.num_experts
    np.testing.assert_array_equal(found.pairs, np.full((2, count, count), 18))
    own = np.eye(count, dtype=bool)
    for name in ("coactivation", "lift", "lift_p"):
        assert np.isnan(found[name].values[:, own]).all()
    np.testing.assert_allclose(found.coactivation.values[:, ~own], 1.0)
    np.testing.assert_allclose(found.lift.values[:, ~own], 1.0)
    expected = np.nan if count == 1 else 1.0
    np.testing.assert_allclose([found.coactivation_uniform, found.lift_uniform], expected)


def test_taking_all_away_is_what_taking_each_away_is(model):
    count = model.spec.num_experts
    found = moe.expert_effects(model, TEXT, "nll")
    ids = model.encode(TEXT)["input_ids"]

    def nll(**edit):
        log_p = model.run(TEXT, **edit).logits[0].double().log_softmax(-1)
        return -float(np.mean([log_p[at, ids[0, at + 1]] for at in range(3)]))

    for layer in (0, 1):
        for expert in range(count):
            expected = nll(edit=moe.ablate(layer=layer, expert=expert)) - nll()
            assert float(found.effect_mean.sel(layer=layer, expert=expert)) == pytest.approx(expected, abs=1e-6)


def test_the_whole_report_is_made(model, tmp_path):
    moe.report(model, CORPUS, tmp_path / "report.html")
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")


CALLS = {
    "routing_by_label": lambda m: moe.routing_by_label(m, CORPUS, "position", resamples=10),
    "transitions": lambda m: moe.transitions(m, CORPUS),
    "vocabulary": lambda m: moe.vocabulary_specialization(m, CORPUS, at_least=1),
    "token_identity": lambda m: moe.token_identity(m, CORPUS, at_least=1, resamples=10),
    "profiles": lambda m: moe.profile(moe.expert_profiles(m, CORPUS, resamples=10), 0, 0),
    "similarity": lambda m: moe.expert_similarity(m, CORPUS),
    "norms": lambda m: moe.norm_and_weight(m, CORPUS, resamples=10),
    "super": lambda m: moe.super_experts(m, CORPUS, resamples=10),
    "neurons": lambda m: moe.neuron_lens(m, 0, 0),
    "lens": lambda m: moe.expert_lens(m, TEXT),
    "ensemble": lambda m: moe.ensemble_similarity(m, CORPUS, resamples=10),
    "perplexity": lambda m: moe.perplexity(m, CORPUS, resamples=10),
    "attribution_patching": lambda m: moe.attribution_patching(m, TEXT),
    "patching": lambda m: moe.activation_patching(m, "w5 w6 w7", "w5 w8 w7", "nll", over="ranks", resamples=10),
    "path": lambda m: moe.path_patching(
        m, "w5 w6 w7", "w5 w8 w7", sender=(0, 0), receivers="experts", metric="nll", resamples=10
    ),
    "trace": lambda m: moe.causal_trace(m, "w5 w6 w7", subject="w6", answer=8, samples=2),
    "coalitions": lambda m: moe.coalitions(m, TEXT, [(0, 0), (1, 0)], metric="nll", resamples=10),
    "score_audit": lambda m: moe.score_audit(m, CORPUS, resamples=10),
    "saturation": lambda m: moe.router_saturation([m, m], CORPUS, resamples=10),
    "audit": lambda m: m.audit(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_result_or_a_clear_error(model, name):
    try:
        CALLS[name](model)
    except MoEError as error:
        assert error.expected and error.got is not None


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: m.run(TEXT, edit=moe.top_k(3)), "cannot keep 3 experts at layer 0: expected k up to"),
        (lambda m: moe.perplexity(m, CORPUS, ks=[3]), "ks cannot be right: expected whole numbers from 1 to"),
        (lambda m: moe.expert_lens(m, TEXT, top=97), "top out of range: expected 1 to 96 tokens, got 97"),
        (lambda m: moe.neuron_lens(m, 0, 0, top=97), "top out of range: expected 1 to 96 tokens, got 97"),
        (lambda m: m.run(TEXT, edit=moe.mask(layer=0, expert=0)), "too few experts left"),
        (lambda m: m.run(TEXT, edit=moe.force((0, 1, 2), layer=0)), "unknown expert|cannot be forced"),
    ],
)
def test_more_than_there_is_is_refused(model, call, says):
    with pytest.raises((BadInput, moe.MoEError), match=says):
        call(model)
