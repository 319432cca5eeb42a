"""What prints when somebody looks at a run, a corpus or a profile: sizes, layers and names, a few lines, no tensors."""

import pytest
import torch

import moe_interp as moe
from moe_interp.errors import UnknownName
from moe_interp.run import Routings
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build


@pytest.fixture(scope="module")
def run():
    with moe.wrap(build("deepseek_v3"), StubTokenizer()) as model:
        top = moe.select("resid_post", layers=[1, 3], positions=-1, top=2)
        yield model.run(["hello", "hello there"], read=["moe_in", "router_scores", top])


def test_a_run_says_what_was_read_where(run):
    assert repr(run) == (
        "Run of 2 texts, 11 positions, read: moe_in at layers 1 to 3, router_scores at layers 1 to 3, "
        "resid_post at layers 1, 3"
    )


def test_tokens_say_how_long_texts_are(run):
    assert repr(run.tokens) == "Tokens of 2 texts, 11 positions: 5 to 11 real ones in each"
    assert repr(run.tokens.of(slice(0, 1), torch.tensor([0]))) == "Tokens of 1 text, 11 positions: 5 real ones in each"


def test_routing_says_its_sizes_and_layers_of_one_kind_are_one_line(run):
    sizes = "Routing of 2 texts, 11 positions, 3 slots: ids, weights [2, 11, 3], mask [2, 11]"
    assert repr(run.routing[2]) == f"{sizes}; scores [2, 11, 8]"
    assert repr(run.routing) == f"layers 1 to 3: {sizes}; scores [2, 11, 8]"
    bare = moe.Routing(run.routing[1].ids, run.routing[1].weights, run.routing[1].mask)
    assert repr(Routings({1: bare, 2: run.routing[2], 3: bare})).split("\n") == [
        f"layers 1, 3: {sizes}",
        f"layer 2: {sizes}; scores [2, 11, 8]",
    ]
    assert repr(Routings({})) == "no routing"
    assert run.routing == dict(run.routing) and list(run.routing) == [1, 2, 3]
    with pytest.raises(UnknownName, match=r"no routing of layer 0: expected an MoE layer of \[1, 2, 3\], got 0"):
        run.routing[0]
    assert 0 not in run.routing and run.routing.get(0) is None


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (moe.select("moe_in"), "Read(moe_in at all its layers, all positions)"),
        (moe.select("moe_in", layers=5, positions=-1), "Read(moe_in at layer 5, position -1)"),
        (moe.select("moe_in", layers=[1, 2, 3, 7]), "Read(moe_in at layers 1 to 3, 7, all positions)"),
        (
            moe.select("resid_post", positions=[0, -1], top=5),
            "Read(resid_post at all its layers, positions 0, -1, as the 5 most likely tokens)",
        ),
    ],
)
def test_a_read_says_what_it_keeps(read, told):
    assert repr(read) == told


def test_likely_tokens_say_their_number(run):
    found = run.top_tokens("resid_post", 1)
    assert repr(found) == "TopTokens: ids and logprobs of the 2 most likely at each of [2, 1]"
    ids, logprobs = found
    assert ids.shape == logprobs.shape == (2, 1, 2)


def test_a_corpus_names_some_domains_and_a_document_shows_how_it_begins():
    corpus = moe.Corpus.from_texts({f"d{number}": ["a text", "x" * 70] for number in range(13)})
    told = ", ".join(f"d{number} 2" for number in range(12))
    assert repr(corpus) == f"Corpus of 26 documents from memory: {told} and 1 other domain"
    assert repr(corpus[:1]) == "Corpus of 1 document from memory: d0 1"
    assert repr(corpus[0]) == "Document 'd0/0' of domain 'd0', 6 characters: 'a text'"
    assert repr(corpus[1]) == f"Document 'd0/1' of domain 'd0', 70 characters: '{'x' * 60}…'"
    ids = moe.Corpus.from_token_ids([[1, 2, 3]])
    assert repr(ids[0]) == "Document 'all/0' of domain 'all', 3 token ids"


def test_a_profile_is_one_line_until_it_is_printed():
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        corpus = moe.Corpus.from_texts({"a": ["hello there", "a text"], "b": ["another", "one more"]})
        found = moe.profile(moe.expert_profiles(model, corpus), 2, 3)
    summary = str(found).split("\n")[0].removeprefix("layer 2, expert 3: ")
    assert repr(found) == f"Profile of layer 2, expert 3: {summary}. print() shows all of it."
    assert len(str(found).split("\n")) > 6
