"""Corpora under standing edits: values and marks of several texts go by a number that documents do not have."""

import pytest
import torch

import moe_interp as moe
from moe_interp.errors import BadInput
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

TEXTS = ["the first text", "the next", "a text that is longer than these"]
CORPUS = moe.Corpus.from_texts({"a": TEXTS[:2], "b": TEXTS[2:]})


@pytest.fixture(scope="module")
def model():
    with moe.wrap(build("olmoe"), StubTokenizer()) as opened:
        yield opened


def edits_of(run: moe.Run) -> dict[str, moe.Intervention]:
    layer, (texts, longest) = 1, run.mask.shape
    ids, weights = run.routing[layer].ids, run.routing[layer].weights
    return {
        "point": moe.patch(run, layer=layer, point="resid_mid"),
        "expert": moe.patch(run, layer=layer, expert=0),
        "route": moe.patch_route(run, layer=layer),
        "outputs": moe.replace(torch.ones(texts, longest, 64), layer=layer, expert=0),
        "experts": moe.force(ids, layer=layer),
        "weights": moe.force(ids, layer=layer, weights=weights),
        "marks": moe.ablate(layer=layer, expert=range(8), tokens=run.mask),
    }


@pytest.mark.parametrize("name", ["point", "expert", "route", "outputs", "experts", "weights", "marks"])
def test_values_and_marks_of_several_texts_are_refused(model, name):
    edit = edits_of(model.run(TEXTS, read=["resid_mid", "expert_out"]))[name]
    message = "a standing edit with .* of several texts.* got .* of 3 texts. Take them from a run of one text"
    with model.edit(moe.top_k(2), edit):
        for analysis in (moe.perplexity, moe.routing):
            with pytest.raises(BadInput, match=message):
                analysis(model, CORPUS)


@pytest.mark.parametrize("name", ["point", "expert", "route", "outputs", "experts", "weights", "marks"])
def test_those_of_one_text_serve_every_document(model, name):
    own = model.run(TEXTS[0], read=["resid_mid", "expert_out"])
    with model.edit(edits_of(own)[name]):
        assert moe.perplexity(model, CORPUS).sizes["domain"] == 2
