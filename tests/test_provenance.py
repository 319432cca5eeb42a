"""What every public analysis says of what went in: the same inputs give the same provenance, others another."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp.analyses.collect import sizes
from moe_interp.analyses.metrics import LogitDifference
from moe_interp.analyses.routing import RoutingCounts
from moe_interp.measured import LONGEST, code_version, fingerprint, function_told, values_told
from moe_interp.results import provenance_of
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build


def corpus(word="some"):
    return moe.Corpus.from_texts({name: [f"{word} text {name}{number}" for number in range(4)] for name in "ab"})


def longest(tokenized):
    return ["long" if len(one) > 1 else "short" for one in tokenized.tokens]


def by_place(tokenized):
    return ["first" if number < 3 else "later" for number in range(len(tokenized.tokens))]


def largest(logits):
    return logits[-1].max()


def smallest(logits):
    return logits[-1].min()


DATA = {"corpus": corpus(), "resamples": 10}
CORPUS = [{"corpus": corpus("more")}, {"max_tokens": 6}, {"seed": 1}]
RESAMPLED = [*CORPUS, {"resamples": 20}]
METRICS = [LogitDifference((5,), (7,)), LogitDifference((6,), (7,)), smallest]
PAIR = {"clean": ["a text"], "corrupted": ["b text"], "metric": largest, "resamples": 10}
PAIRS = [{"clean": ["c text"]}, {"corrupted": ["c text"]}, {"direction": "corrupt"}]
PAIRS += [{"metric": one} for one in METRICS]
MEANS = {(1, expert): torch.full((64,), 0.1 * expert) for expert in range(8)}
OTHERS = MEANS | {(1, 3): torch.zeros(64)}

# The arguments of each, and changes of them that its provenance must tell.
CALLS = {
    "routing": (DATA, [*RESAMPLED, {"special_tokens": True}]),
    "routing_by_label": (DATA | {"label": longest}, [*RESAMPLED, {"label": by_place}, {"label": "script"}]),
    "coactivation": (DATA, [*RESAMPLED, {"blocks": 4}]),
    "transitions": ({"corpus": corpus()}, [*CORPUS, {"blocks": 4}]),
    "vocabulary_specialization": ({"corpus": corpus(), "at_least": 2}, [*CORPUS, {"at_least": 3}, {"folds": 5}]),
    "token_identity": (DATA | {"at_least": 2, "folds": 4}, [*RESAMPLED, {"at_least": 3}, {"folds": 2}]),
    "expert_profiles": (DATA, [*RESAMPLED, {"top": 4}, {"examples": 2}, {"partners": 2}]),
    "mean_contributions": ({"corpus": corpus()}, CORPUS[:1]),
    "norm_and_weight": (DATA, [*RESAMPLED, {"tokens_per_document": 2}]),
    "expert_similarity": ({"corpus": corpus()}, [*CORPUS, {"tokens": 8}, {"null_pairs": 32}, {"weights": False}]),
    "super_experts": (DATA, [*RESAMPLED, {"most": 4}, {"percentile": 90.0}, {"share_of_largest": 0.2}]),
    "ensemble_similarity": (DATA, [*RESAMPLED, {"definition": "as_coded"}]),
    "perplexity": (DATA, [*RESAMPLED, {"renormalise": True}]),
    "score_audit": (DATA, [*RESAMPLED, {"blocks": 4}, {"random_routers": 1}]),
    "router_saturation": (DATA, [*RESAMPLED, {"tokens_per_document": 3}, {"names": ["x", "y"]}]),
    "neuron_lens": ({"layer": 1, "expert": 2, "null_directions": 20}, [{"expert": 3}, {"top": 2}, {"seed": 1}]),
    "routing_map": ({"text": "a text"}, [{"text": "b text"}]),
    "expert_lens": ({"text": "a text"}, [{"text": "b text"}, {"top": 2}, {"definition": "as_coded"}]),
    "logit_attribution": ({"text": "a text", "tokens": [5]}, [{"text": "b"}, {"tokens": [6]}, {"position": 1}]),
    "activation_patching": (PAIR, [*PAIRS, {"over": "ranks"}, {"seed": 1}, {"resamples": 20}]),
    "path_patching": (PAIR | {"sender": (0, 2), "receivers": "logits"}, [*PAIRS, {"sender": (0, 3)}]),
    "causal_trace": (
        {"prompt": "a text of mine", "subject": "text", "answer": 5, "samples": 2},
        [{"prompt": "b text of mine"}, {"subject": "mine"}, {"answer": 6}, {"samples": 3}, {"seed": 1}, {"noise": 0.5}],
    ),
    "coalitions": (
        {"text": ["a text"], "experts": [(1, 2), (1, 3)], "metric": largest, "how": "mean", "mean": MEANS},
        [{"text": ["b text"]}, {"metric": smallest}, {"experts": [(1, 2), (1, 4)]}, {"mean": OTHERS}, {"size": 1}],
    ),
    "expert_effects": (
        {"inputs": ["a text"], "layers": 1, "metric": largest, "how": "mean", "mean": MEANS},
        [{"inputs": ["b text"]}, {"metric": METRICS[0]}, {"mean": OTHERS}, {"how": "zero", "mean": None}],
    ),
    "attribution_patching": (
        {"inputs": ["a text"], "corrupted": ["b text"], "sample": 4},
        [{"inputs": ["c text"]}, {"corrupted": ["c text"]}, {"steps": 2}, {"sample": 8}, {"metric": largest}],
    ),
}  # fmt: skip
NO_MODEL = {"reference_saturation", "routing_from_counts", "routing_health"}
NO_RESULT = {  # tensors of TransformerLens, a labeller, a writer; what gives provenance itself; and the lens, below
    "collect", "decompose_resid", "get_act_patch_expert_out", "logit_attrs", "logit_directions", "shared_experts",
    "spans", "stack_expert_results", "to_tensorboard", "train_tuned_lens", "tuned_lens", "tuned_lens_quality",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    with moe.wrap(build("olmoe"), StubTokenizer()) as opened:
        yield opened


def told(name, model, **given):
    """The provenance of an analysis."""
    models = [model, model] if name == "router_saturation" else model
    found = getattr(moe, name)(models, **given)
    return provenance_of(found.dataset if name == "mean_contributions" else found)


def test_every_analysis_is_looked_at():
    public = [name for name in moe.__all__ if inspect.isfunction(getattr(moe, name))]
    analyses = {name for name in public if getattr(moe, name).__module__.startswith("moe_interp.analyses.")}
    assert analyses == set(CALLS) | NO_MODEL | NO_RESULT


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_a_result_tells_its_inputs_options_weights_and_code(name, model):
    given, changes = CALLS[name]
    before = told(name, model, **given)
    assert before["weights"] == fingerprint(model.hf, model.spec) and before["code"] == code_version()
    assert told(name, model, **given) == before
    for change in changes:
        assert told(name, model, **given | change) != before, change


def test_shared_experts_tell_their_inputs_too():
    with moe.wrap(build("qwen2_moe"), StubTokenizer()) as opened:
        before = told("shared_experts", opened, **DATA)
        assert told("shared_experts", opened, **DATA) == before
        assert all(told("shared_experts", opened, **DATA | change) != before for change in RESAMPLED)


def test_a_tuned_lens_and_its_quality_tell_theirs(model):
    def train(text, seed=0):
        held = moe.Corpus.from_texts({"a": ["held out text"]})
        return moe.train_tuned_lens(model, corpus(text), held_out=held, steps=2, every=1, seed=seed)

    lens, same, other = train("some"), train("some"), train("more")
    assert lens.provenance == same.provenance != other.provenance
    assert train("some", seed=1).provenance != lens.provenance
    quality = [provenance_of(moe.tuned_lens_quality(model, one, corpus(), resamples=10)) for one in (lens, same, other)]
    assert quality[0] == quality[1] and quality[0]["lens_weights"] != quality[2]["lens_weights"]
    seen = [provenance_of(moe.expert_lens(model, "a text", lens=one)) for one in (lens, same, other)]
    assert seen[0] == seen[1] != seen[2]


def test_what_needs_no_model_tells_its_counts_and_code(model):
    def counted(word):
        sums = RoutingCounts.empty(8, *sizes(model))
        moe.collect(model, corpus(word), {"routing": sums})
        return provenance_of(moe.routing_health(sums))

    def recorded(counts):
        return provenance_of(moe.routing_from_counts([[counts]], tokens=3, domains=["a"], top_k=2))

    assert counted("some") == counted("some") != counted("more")
    assert recorded([1, 2, 3]) == recorded([1, 2, 3]) != recorded([2, 1, 3])
    for about in (counted("some"), recorded([1, 2, 3]), provenance_of(moe.reference_saturation(resamples=10))):
        assert about["code"] == code_version()


def test_texts_are_told_as_they_are_or_by_their_hash(model):
    about = told("routing", model, **DATA)
    assert about["texts"].startswith('[["a", "some text a0"], ["a", "some text a1"]')
    long = [moe.Corpus.from_texts({"a": ["x" * LONGEST + end]}) for end in "pq"]
    hashes = [told("routing", model, corpus=one, resamples=10, max_tokens=5)["texts"] for one in long]
    assert "sha256" in hashes[0] and len(hashes[0]) < 120 and hashes[0] != hashes[1]
    ids = [moe.Corpus.from_token_ids([[5, 6, last]]) for last in (7, 8)]
    assert [told("routing", model, corpus=one, resamples=10)["texts"] for one in ids] == [
        '[["all", [5, 6, 7]]]',
        '[["all", [5, 6, 8]]]',
    ]


def test_vectors_and_functions_of_edits_are_told_by_their_values(model):
    def edited(edit):
        return model.run("a text", edit=edit).provenance["edits"]

    vectors = [torch.arange(64.0), torch.arange(64.0).index_fill(0, torch.tensor([30]), 1.0)]
    pushed = [edited(moe.steer(vector, layer=1, expert=2)) for vector in vectors]
    assert pushed[0] != pushed[1] and pushed[0] == edited(moe.steer(vectors[0].clone(), layer=1, expert=2))
    doubled, halved = (edited(moe.apply("resid_mid", partial(torch.mul, other=by), layers=1)) for by in (2.0, 0.5))
    assert doubled != halved and "0x" not in doubled


class Tagger:
    """Can be called."""

    def __init__(self, size):
        self.size = size

    def __call__(self, text):
        return [(0, self.size, "start")]


def test_functions_of_one_source_are_told_apart_by_what_they_were_made_with():
    def made(value):
        return lambda logits, scale=2.0: (logits * scale + value).sum()

    assert function_told(made(1.0)) == function_told(made(1.0)) != function_told(made(2.0))
    assert function_told(made(torch.ones(3))) != function_told(made(torch.zeros(3)))
    assert function_told(made(np.int64(1))) == function_told(made(np.int64(1))) != function_told(made(np.int64(2)))
    assert function_told(made({"a", "b"})) == function_told(made({"b", "a"})) != function_told(made({"a", "c"}))
    assert function_told(Tagger(3)) == function_told(Tagger(3)) != function_told(Tagger(4))
    assert function_told(moe.spans(Tagger(3))) != function_told(moe.spans(Tagger(4)))
    assert function_told(partial(max, 1)) != function_told(partial(max, 2))
    itself: list = []
    itself.append(made(itself))
    assert function_told(itself[0]) == function_told(itself[0])
    assert values_told(np.arange(3)) != values_told(np.arange(3.0)) != values_told(torch.arange(3))
