"""Causal tracing, against edited forwards of the slow reference and against what must hold."""

import json

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp.analyses.tracing import noises
from moe_interp.errors import BadInput, UnknownName, UnsupportedModel
from moe_interp.stats import student_interval
from tests.reference import patching as slow
from tests.reference.patching import forward
from tests.stub_tokenizer import StubTokenizer
from tests.test_patching import close
from tests.tiny import build
from tests.tiny_types import build as build_type

IDS = torch.randint(3, 90, (5,), generator=torch.Generator().manual_seed(6))
NOISED, ANSWER, SAMPLES = (1, 2), 11, 3


def probability(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].softmax(-1)[:, ANSWER]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("at", ["all", "each"])
def test_restored_experts_and_controls(family, at):
    hf = build(family)
    ids = IDS.expand(SAMPLES, -1)
    with moe.wrap(hf) as model:
        result = moe.causal_trace(model, IDS, NOISED, ANSWER, noise=0.8, samples=SAMPLES, seed=3, at=at, layers=(2, 3))
        noised = noises(0.8, NOISED, SAMPLES, 3, ids.shape[1])
        embedded = model.run(ids, edit=noised, read="embed")["embed"]
    assert (embedded[0] - embedded[1]).abs().max() > 0.1
    noise = {("embed", None): slow.put(embedded)}
    clean, base = forward(hf, ids), forward(hf, ids, edits=noise)
    start = probability(base.logits)
    assert close(result.clean, probability(clean.logits)[0], 0.1)
    assert close(result.corrupted, start, 0.1)
    assert close(result.total, probability(clean.logits) - start, 0.1)
    places = [slice(None)] if at == "all" else range(5)
    for layer in (2, 3):
        for expert in (0, 3, 6):
            change = slow.contribution(clean, layer, expert) - slow.contribution(base, layer, expert)
            for place in places:
                here = torch.zeros_like(change)
                here[:, place] = change[:, place]
                expected = probability(forward(hf, ids, edits=noise | {("routed_out", layer): slow.add(here)}).logits)
                found = result.effect.sel(layer=layer, expert=expert)
                assert close(found if at == "all" else found.sel(position=place), expected - start, 0.01)
        for point in ("routed_out", "moe_out", "resid_post"):
            for place in places:

                def restore(value, point=point, layer=layer, place=place):
                    value[:, place] = clean.points[point, layer][:, place]
                    return value

                expected = probability(forward(hf, ids, edits=noise | {(point, layer): restore}).logits)
                found = result.control.sel(layer=layer, point=point)
                assert close(found if at == "all" else found.sel(position=place), expected - start, 0.01)
    assert np.abs(result.effect.values).max() > 1e-4


def test_all_of_the_residual_brings_all_of_it_back():
    with moe.wrap(build("gpt_oss")) as model:
        result = moe.causal_trace(model, IDS, NOISED, ANSWER, noise=1.0, samples=SAMPLES)
    for layer in range(4):
        assert close(result.control.sel(layer=layer, point="resid_post"), result.total, 0.01)
    assert len(np.unique(result.corrupted)) == SAMPLES
    assert np.allclose(result.effect_interval.values, student_interval(result.effect.values))
    assert np.allclose(result.control_mean, result.control.mean("sample"))


def test_the_noise_follows_the_seed_and_the_spread_of_embeddings():
    hf = build("mixtral")
    with moe.wrap(hf) as model:
        one, again, other = (
            moe.causal_trace(model, IDS, 1, ANSWER, samples=1, seed=seed, layers=0) for seed in (0, 0, 1)
        )
        width = 3 * float(hf.model.embed_tokens.weight.detach().std())
        given = moe.causal_trace(model, IDS, 1, ANSWER, noise=width, samples=1, layers=0)
    assert one.identical(again) and not one.equals(other)
    assert json.loads(one.attrs["provenance"])["noise"] == pytest.approx(width, rel=1e-5)
    assert close(given.corrupted, one.corrupted, 0.01)
    assert np.isnan(one.effect_interval).all()


class Fast(StubTokenizer):
    """Two characters a token, with offsets, as a fast tokenizer gives them."""

    is_fast = True

    def __call__(self, text: str, verbose: bool = True, return_offsets_mapping: bool = False) -> dict[str, list]:
        ids = super().__call__(text[::2])["input_ids"]
        spans = [(start, min(start + 2, len(text))) for start in range(0, len(text), 2)]
        return {"input_ids": ids} | ({"offset_mapping": spans} if return_offsets_mapping else {})


@pytest.mark.parametrize(("tokenizer", "noised"), [(StubTokenizer(), [0, 0, 0, 1, 1, 1, 0, 0]), (Fast(), [0, 1, 1, 0])])
def test_a_subject_is_found_in_the_text(tokenizer, noised):
    with moe.wrap(build("olmoe"), tokenizer) as model:
        result = moe.causal_trace(model, "ab cde f", "cde", ANSWER, samples=2, layers=1)
    assert result.noised.values.tolist() == noised
    assert result.token.values.tolist()[:2] == (["a", "b"] if len(noised) == 8 else ["a", " "])


def test_what_cannot_be_right_is_refused():
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:

        def refused(says, prompt="ab cab", subject="ca", answer=ANSWER, **options):
            with pytest.raises(Exception, match=says) as error:
                moe.causal_trace(model, prompt, subject, answer, **options)
            assert isinstance(error.value, BadInput) or "Literal" in str(error.value)

        refused(
            "subject 'ab' is not to be found: expected a part.*occurs once, got 2 in 'ab cab'.*positions", subject="ab"
        )
        refused("subject 'x' is not to be found.*got 0", subject="x")
        refused("subject '' is not to be found.*got no letter", subject="")
        refused("a subject in no text: expected a prompt that is text, or positions", prompt=IDS)
        refused("no subject: expected a part of the prompt", subject=None)
        refused("an edit can never touch anything.*got positions \\[9\\]", subject=9)
        refused("not one prompt: expected one text, or its token ids, got 2 texts", prompt=["ab cab", "abcdef"])
        refused("'ab' is not one token", answer="ab")
        refused("no such tokens", answer=5000)
        refused("invalid samples for causal_trace: expected a whole number from 1 .*got 0", samples=0)
        refused("invalid noise for causal_trace: expected a finite number above 0 or None, got -1", noise=-1.0)
        refused("invalid noise", noise=float("nan"))
        refused("invalid at for causal_trace: .*got 'last'", at="last")
        with pytest.raises(UnknownName, match="unknown layer 7"):
            moe.causal_trace(model, IDS, 1, ANSWER, layers=7)
    with moe.wrap(build_type("switch_transformers")) as model, pytest.raises(UnsupportedModel, match="no next token"):
        moe.causal_trace(model, IDS, 1, ANSWER)
    mute = StubTokenizer()
    mute.decode = lambda ids, skip_special_tokens=False: "?"
    with moe.wrap(build("olmoe"), mute) as model, pytest.raises(BadInput, match="cannot tell which tokens hold"):
        moe.causal_trace(model, "ab cab", "ca", ANSWER)
