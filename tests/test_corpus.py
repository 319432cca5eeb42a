"""Corpora: what is read from where, which rows are left out, and what is refused as no corpus."""

import inspect
import json
import subprocess
import sys
from functools import partial

import pytest

import moe_interp as moe
from moe_interp.data import Document
from moe_interp.errors import BadData, BadInput
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build


def written(folder, records, name="some"):
    """Records as a jsonl and a parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    parquet.write_table(pa.Table.from_pylist(records), folder / f"{name}.parquet")
    return folder / f"{name}.jsonl", folder / f"{name}.parquet"


def test_blank_rows_are_left_out_with_one_warning_and_the_others_keep_their_names(tmp_path):
    records = [{"text": text, "domain": "wiki"} for text in ("", " = Title = \n", "  \n", "a text", "\t", "another")]
    for path in written(tmp_path, records):
        with pytest.warns(UserWarning, match=f"3 empty texts of {path} were left out") as told:
            corpus = moe.read_corpus(path)
        assert len(told) == 1
        assert [(d.text, d.name) for d in corpus] == [
            (" = Title = \n", "some/1"),
            ("a text", "some/3"),
            ("another", "some/5"),
        ]
        with pytest.warns(UserWarning, match="2 empty texts"):
            assert moe.read_corpus(path, limit=2).texts == [" = Title = \n", "a text"]
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.warns(UserWarning, match="1 empty texts"), pytest.raises(BadData, match="no documents in"):
        moe.read_corpus(tmp_path / "blank.jsonl")


@pytest.mark.parametrize("text", [None, 3, ["a"]])
def test_a_text_that_is_no_string_is_an_error_all_the_same(text, tmp_path):
    (tmp_path / "some.jsonl").write_text('{"text": "fine"}\n' + json.dumps({"text": text}))
    with pytest.raises(BadData, match="record 2 of .* has no text: expected a string under 'text', got"):
        moe.read_corpus(tmp_path / "some.jsonl")


def test_the_field_of_the_text_may_have_another_name(tmp_path):
    for path in written(tmp_path, [{"content": "one", "domain": "a", "size": 3}, {"content": "two", "domain": "b"}]):
        message = (
            "has no text: expected a field 'text', got the fields 'content', 'domain', 'size'.*read_corpus.*--text-f"
        )
        with pytest.raises(BadData, match=message):
            moe.read_corpus(path)
        corpus = moe.read_corpus(path, text="content")
        assert [(d.text, d.domain) for d in corpus] == [("one", "a"), ("two", "b")]
    (tmp_path / "letters.txt").write_text("first\n\nsecond\n")
    assert len(moe.read_corpus(tmp_path, text="content")) == 6


def test_a_corpus_is_short_to_print_and_goes_through_its_documents():
    corpus = moe.Corpus.from_texts({"b": ["one", "two"], "a": ["three"]}, "a test")
    assert repr(corpus) == "Corpus of 3 documents from a test: b 2, a 1"
    assert [document.text for document in corpus] == ["one", "two", "three"]
    assert list(corpus) == list(corpus.documents)


def test_what_is_no_document_is_refused_when_the_corpus_is_made():
    with pytest.raises(BadInput, match="a corpus without documents from memory: expected at least one, got none"):
        moe.Corpus(())
    with pytest.raises(BadInput, match="document 'a/0' is empty"):
        moe.Corpus((Document("one", "a", "a/1"), Document(" ", "a", "a/0")))


@pytest.mark.parametrize("given", [{"a": "hello"}, {"a": ["one"], "b": 3}, ["x", "y"], "text", None])
def test_texts_that_are_not_lists_by_domain_are_refused(given):
    with pytest.raises(BadInput, match=r"not texts by domain: expected \{domain: \[text, text, ...\]\}, got"):
        moe.Corpus.from_texts(given)


@pytest.mark.parametrize("count", [0, -1, 1.5, "2"])
def test_numbers_of_documents_that_cannot_be_taken(count, tmp_path):
    (tmp_path / "some.txt").write_text("one\n\ntwo\n")
    for take in (moe.sample().take, lambda given: moe.read_corpus(tmp_path / "some.txt", limit=given)):
        with pytest.raises(BadInput, match=f"expected a whole number from 1 on, got {count!r}"):
            take(count)


@pytest.mark.parametrize("given", [["a text"], None, b"some.txt"])
def test_what_is_no_path_is_not_read(given):
    with pytest.raises(BadInput, match="not a path: .*from_texts"):
        moe.read_corpus(given)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "some.txt").write_text("one\n\ntwo", encoding="utf-8-sig")
    (tmp_path / "some.jsonl").write_text('{"text": "one"}\n{"text": "two"}', encoding="utf-8-sig")
    for name in ("some.txt", "some.jsonl"):
        assert moe.read_corpus(tmp_path / name).texts == ["one", "two"]


def test_half_of_a_surrogate_pair_is_refused_with_the_name_of_its_document():
    with pytest.raises(BadInput, match="document 'a/1' is no Unicode text"):
        moe.Corpus.from_texts({"a": ["one", "two \ud800"]})


def test_a_corpus_and_a_model_that_changed_places():
    """In every analysis that takes a model and a corpus."""
    names = {
        name
        for name in moe.__all__
        if inspect.isfunction(getattr(moe, name))
        and list(inspect.signature(getattr(moe, name)).parameters)[:2] == ["model", "corpus"]
    }
    assert {"routing", "perplexity", "score_audit"} < names
    corpus = moe.Corpus.from_texts({"a": ["a text"]})
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        calls = {name: getattr(moe, name) for name in names}
        calls |= {"collect": partial(moe.collect, sums={}), "saturation": moe.router_saturation}
        for name, call in calls.items():
            with pytest.raises(BadInput, match=r"not a corpus: .*, got \[?MoEModel"):
                call(corpus, [model] if name == "saturation" else model)


REFUSED = """
import moe_interp as moe

model, lens = moe.load(), moe.tuned_lens("reference")
first = {
    "label": lambda given: moe.routing_by_label(model, given, "kind"),
    "report": lambda given: moe.report(model, given, "report.html"),
    "lens": lambda given: moe.tuned_lens_quality(model, lens, given),
    "train": lambda given: moe.train_tuned_lens(model, given),
    "held out": lambda given: moe.train_tuned_lens(model, moe.sample(), held_out=given),
    "saturation": lambda given: moe.router_saturation([model, model], given),
}
for name in ("routing", "perplexity", "coactivation", "score_audit", "ensemble_similarity", "mean_contributions"):
    first[name] = lambda given, name=name: getattr(moe, name)(model, given)
first |= {"documents": moe.Corpus, "inputs": lambda given: model.run(None)}
first["rows"] = lambda given: model.run([[1, 2], [3.5]])
for name, call in first.items():
    for given in (["a text"], "text"):
        try:
            call(given)
        except moe.MoEError as error:
            print(name, type(error).__name__, error, sep="|")
"""


def test_texts_and_names_of_files_are_told_from_corpora(tmp_path):
    """In a process of its own: the tests check annotations, which would speak first."""
    command = [sys.executable, "-c", REFUSED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert len(rows) == 2 * 15
    made_by = "a corpus: moe.read_corpus(path), or moe.Corpus.from_texts({domain: texts}), got "
    for number, (name, kind, message) in enumerate(rows):
        got = "'text'" if number % 2 else "['a text']"
        expected = {
            "documents": f"not documents: expected {made_by}{got}",
            "inputs": "not model inputs: expected text, texts or token ids, got None",
            "rows": "not model inputs: expected text, texts or token ids, got [[1, 2], [3.5]]",
        }
        assert (kind, message) == ("BadInput", expected.get(name, f"not a corpus: expected {made_by}{got}"))
