"""Corpora: what is read from where, which rows are left out, and what is refused as no corpus."""

import csv
import gzip
import inspect
import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp import files, results
from moe_interp.data import Document, batches
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
    with pytest.raises(BadInput, match="invalid texts for .*: expected a mapping from names to lists of strings, got"):
        moe.Corpus.from_texts(given)


@pytest.mark.parametrize("count", [0, -1, 1.5, "2"])
def test_numbers_of_documents_that_cannot_be_taken(count, tmp_path):
    (tmp_path / "some.txt").write_text("one\n\ntwo\n")
    for take in (moe.sample().take, lambda given: moe.read_corpus(tmp_path / "some.txt", limit=given)):
        with pytest.raises(BadInput, match=f"expected a whole number of at least 1.*, got {count!r}"):
            take(count)


@pytest.mark.parametrize("given", [["a text"], None, b"some.txt"])
def test_what_is_no_path_is_not_read(given):
    with pytest.raises(BadInput, match="invalid path for read_corpus: .*from_texts"):
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
            with pytest.raises(
                BadInput,
                match=r"invalid (model|checkpoints) for .*: expected .*, got Corpus of",
            ):
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
        make = 'Make one: moe.Corpus.from_texts({"all": texts}), or moe.Corpus.from_token_ids(rows).'
        do = "Read a file: moe.read_corpus(path)." if number % 2 else make
        expected = {
            "documents": f"not documents: expected {made_by}{got}",
            "inputs": "not model inputs: expected text, texts or token ids, got None",
            "rows": "not model inputs: expected text, texts or token ids, got [[1, 2], [3.5]]",
        }
        assert kind == "BadInput"
        assert message == expected[name] if name in expected else message.startswith("invalid ")
        assert name in expected or (message.endswith(f", got {got}. {do}") and "expected a corpus" in message)


def document(text="a text", domain="a", name="a/0", ids=None):
    return Document(text, domain, name, ids)


def test_lines_of_white_space_split_a_text_file_and_are_in_no_document(tmp_path):
    (tmp_path / "x.txt").write_text("a\n \nb\n\n\nc\n\t\n  d\n e\n")
    assert moe.read_corpus(tmp_path / "x.txt").texts == ["a", "b", "c", "  d\n e"]
    (tmp_path / "x.txt").write_bytes(b"\r\none\r\n \r\n\r\ntwo\r\nthree\r\n")
    assert moe.read_corpus(tmp_path / "x.txt").texts == ["one", "two\nthree"]


def test_what_no_result_can_store_is_found_when_the_corpus_is_made(tmp_path):
    for sign, said in (("\ud800", "is no Unicode text"), ("\0", "holds a NUL")):
        for given in (document(text=f"a{sign}"), document(domain=f"a{sign}"), document(name=f"a{sign}")):
            with pytest.raises(BadInput, match=said):
                moe.Corpus((document(), given))
        for field in ("text", "domain", "name"):
            record = {"text": "fine", "domain": "fine", "name": "fine", field: f"a{sign}"}
            (tmp_path / "x.jsonl").write_text('{"text": "one"}\n' + json.dumps(record))
            with pytest.raises(BadData, match="record 2 of .*x.jsonl has no text: expected Unicode text without NUL"):
                moe.read_corpus(tmp_path / "x.jsonl")


def test_a_file_whose_name_is_no_unicode_is_read_and_its_result_can_be_stored(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"f\xff")
    os.mkdir(folder)
    path = os.fsdecode(os.path.join(folder, b"d\xfe.txt"))
    with open(path, "w") as file:
        file.write("one\n\ntwo")
    corpus = moe.read_corpus(path)
    assert corpus.domains == ("d\\udcfe",) and corpus.source.endswith("f\\udcff/d\\udcfe.txt")
    with moe.wrap(build("olmoe"), StubTokenizer(), name=path) as model:
        result = moe.routing(model, corpus, resamples=10)
    assert results.provenance_of(results.load(results.save(result, tmp_path / "r.nc")))["model"] == path


def test_domains_that_are_whole_numbers_become_their_digits():
    corpus = moe.Corpus.from_texts({0: ["one"], np.int64(1): ["two", "three"]})
    assert corpus.domains == ("0", "1") and corpus.labels.tolist() == [0, 1, 1]
    assert [d.name for d in corpus] == ["0/0", "1/0", "1/1"]
    with pytest.raises(BadInput, match="two domains of one name"):
        moe.Corpus.from_texts({0: ["one"], "0": ["two"]})
    for domain in (None, 0.5, ("a",), b"a"):
        with pytest.raises(BadInput, match="a document's domain is no name: expected text or a whole number, got"):
            moe.Corpus((document(domain=domain),))
    with pytest.raises(BadInput, match="not a source"):
        moe.Corpus((document(),), source=3)


RECORDS = [{"content": 'one, "a"\ntext', "source": "news"}, {"content": "two", "source": "code"}]


def in_every_format(folder, records):
    written(folder, records)
    (folder / "some.json").write_text(json.dumps(records))
    with gzip.open(folder / "some.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, records)))
    with open(folder / "some.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, records[0].keys())
        rows.writeheader()
        rows.writerows(records)
    return [folder / f"some.{kind}" for kind in ("jsonl", "parquet", "json", "jsonl.gz", "csv")]


def test_every_format_gives_the_same_documents_and_takes_the_domain_from_any_field(tmp_path):
    for path in in_every_format(tmp_path, RECORDS):
        corpus = moe.read_corpus(path, text="content", domain_field="source")
        assert corpus.texts == ['one, "a"\ntext', "two"] and corpus.domains == ("news", "code"), path
        assert [d.name for d in corpus] == ["some/0", "some/1"]
        assert moe.read_corpus(path, text="content").domains == ("some",)
        assert moe.read_corpus(path, text="content", domain="all").domains == ("all",)
        for field in ("source", "content"):
            with pytest.raises(BadInput, match=f"domain='{field}' names a field of the data.*domain_field='{field}'"):
                moe.read_corpus(path, text="content", domain=field)
        with pytest.raises(BadData, match="has no domain: expected a field 'place', got the fields .*--domain-field"):
            moe.read_corpus(path, text="content", domain_field="place")
        with pytest.raises(BadInput, match="domain and domain_field exclude each other"):
            moe.read_corpus(path, text="content", domain="all", domain_field="source")
    assert len(moe.read_corpus(tmp_path, text="content", limit=1)) == 5


def test_a_record_without_the_domain_that_was_named_is_refused(tmp_path):
    for value in ('"d": null', '"e": "b"'):
        (tmp_path / "x.jsonl").write_text('{"text": "one", "d": "a"}\n{"text": "two", ' + value + "}\n")
        with pytest.raises(BadData, match="record 2 of .* has no domain: expected a field 'd'"):
            moe.read_corpus(tmp_path / "x.jsonl", domain_field="d")
    (tmp_path / "x.jsonl").write_text('{"text": "one", "d": ["a"]}\n')
    with pytest.raises(BadData, match="record 1 of .* has no domain: expected text or a number, got"):
        moe.read_corpus(tmp_path / "x.jsonl", domain_field="d")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.csv", b"text,text\na,b\n", "expected fields that differ"),
        ("x.csv", b"text,domain\na\n", "cannot read line 2 of .*: expected 2 values, got too few"),
        ("x.csv", b"text,domain\na,b,c\n", "cannot read line 2 of .*: expected 2 values, got too many"),
        ("x.csv", b'text\n"a"b\n', "cannot read .*x.csv near line 2: expected a CSV file with a header"),
        ("x.csv", b"text\n\xff\n", "expected UTF-8 text"),
        ("x.json", b'{"text": "a"}', "expected a JSON list of objects with 'text', got dict"),
        ("x.json", b'["a"]', "expected a JSON list of objects with 'text', got other things in a list"),
        ("x.json", b"[" * 100_000, "expected a JSON list of objects, got nesting that is too deep"),
        ("x.jsonl", b'{"text": ' + b"[" * 100_000, "cannot read line 1 of .*, got nesting that is too deep"),
        ("x.jsonl", b'{"text": ' + b"1" * 10_000 + b"}", "cannot read line 1 of .*: expected a JSON object"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "expected UTF-8 text"),
        ("x.jsonl.gz", b'{"text": "a"}', "expected UTF-8 text"),
    ],
)
def test_damaged_files_are_refused(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=said):
        moe.read_corpus(tmp_path / name)


def test_files_without_end_are_refused_in_bounded_time_and_memory(tmp_path, monkeypatch):
    for name in ("x.jsonl", "x.txt", "x.csv", "x.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(BadData, match="expected a regular file, got a pipe, a device or the like"):
            moe.read_corpus(tmp_path / name)
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(BadData, match="got a pipe, a device or the like"):
        moe.read_corpus(tmp_path / "zero.txt")
    monkeypatch.setattr(files, "LONGEST", 1000)
    (tmp_path / "long.jsonl").write_text('{"text": "%s"}' % ("a" * 1000))
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 10**7))
    (tmp_path / "long.json").write_text("[%s]" % (" " * 1000))
    for name in ("long.jsonl", "bomb.jsonl.gz", "long.json"):
        with pytest.raises(BadData, match="expected .* of at most 1000"):
            moe.read_corpus(tmp_path / name)


def test_parquet_whose_text_is_no_utf_8_is_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    bad = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32).tobytes()), pa.py_buffer(b"\xff\xfe"))
    parquet.write_table(pa.table({"text": bad}), tmp_path / "x.parquet")
    with pytest.raises(BadData, match="cannot read .*x.parquet: expected a parquet file, got .*utf-8"):
        moe.read_corpus(tmp_path / "x.parquet")


def test_the_field_limit_of_csv_is_what_it_was(tmp_path):
    before = csv.field_size_limit()
    long = "word " * 60_000
    (tmp_path / "x.csv").write_text(f"text\n{long}\n")
    assert moe.read_corpus(tmp_path / "x.csv").texts == [long]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    "path",
    [
        "./none",
        "../none",
        "~/none",
        "a/b/c",
        "none/",
        "none.jsonl",
        "a\\b",
        "http://u:pw@h/x",
        "a text " * 99,
    ],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(BadData, match="no file|cannot read|no data") as error:
        moe.read_corpus(path)
    assert "pw" not in str(error.value)


def test_corpora_are_added_indexed_sliced_and_filtered():
    first, second = (moe.Corpus.from_texts({name: [f"{name} 0", f"{name} 1"]}, name) for name in "ab")
    both = first + second
    assert both.texts == ["a 0", "a 1", "b 0", "b 1"] and both.source == "a + b" and both.domains == ("a", "b")
    assert (first + first).source == "a" and both[-1].text == "b 1" and both[np.int64(1)].text == "a 1"
    assert both[1:3].texts == ["a 1", "b 0"] and both[::-1].domains == ("b", "a")
    assert both.filter(lambda d: d.text.endswith("1")).texts == ["a 1", "b 1"]
    with pytest.raises(BadInput, match="invalid other for Corpus.__add__: expected a corpus, got 'a'"):
        _ = first + "a"
    with pytest.raises(BadInput, match="the filter keeps no document: expected at least one of 4, got none"):
        both.filter(lambda d: False)
    with pytest.raises(BadInput, match="invalid keep .*: expected a function of 1 argument, got 'a'. Such as lambda d"):
        both.filter("a")
    with pytest.raises(
        BadInput, match=r"or a slice, got 'a'. corpus.filter\(lambda d: d.domain == 'a'\) takes a domain"
    ):
        both["a"]
    with pytest.raises(BadInput, match="not a document's number: expected a whole number or a slice, got 'c'$"):
        both["c"]
    with pytest.raises(BadInput, match="a corpus without documents"):
        both[4:]
    with pytest.raises(IndexError):
        both[4]


def test_token_ids_give_what_their_text_gives():
    texts = ["one text", "another", "x"]
    stub = StubTokenizer()
    rows = [stub(text)["input_ids"] for text in texts]
    hf = build("olmoe")
    of_texts = moe.Corpus.from_texts({"a": texts[:2], "b": texts[2:]})
    given = [rows[0], np.array(rows[1]), torch.tensor(rows[2])]
    of_ids = moe.Corpus.from_token_ids(given, ["a", "a", "b"])
    assert [(d.domain, d.name, d.ids) for d in of_ids] == [
        ("a", "a/0", tuple(rows[0])),
        ("a", "a/1", tuple(rows[1])),
        ("b", "b/0", tuple(rows[2])),
    ]
    with moe.wrap(hf, stub) as model:
        expected = moe.routing(model, of_texts, resamples=10)
        scored = moe.perplexity(model, of_texts, resamples=10)
    with moe.wrap(hf) as model:
        got = moe.routing(model, of_ids, resamples=10)
        with pytest.raises(BadInput, match="a corpus needs a tokenizer.*from_token_ids"):
            moe.routing(model, of_texts)
        profiles = moe.expert_profiles(model, of_ids, resamples=10)
        around = {str(one) for one in profiles.context.values.flat if one}
        first = [" ".join(map(str, part)) for part in (rows[0][:2], rows[0][3:])]
        assert any(one.startswith(f"{first[0]}«{rows[0][2]}»") for one in around)
        perplexity = moe.perplexity(model, of_ids, resamples=10)
        assert np.isnan(perplexity.bits_per_byte).all() and perplexity.bytes.values.tolist() == [0, 0]
        np.testing.assert_array_equal(perplexity.perplexity_full.values, scored.perplexity_full.values)
        with pytest.raises(BadInput, match="document 'all/1' has token ids out of the vocabulary: expected ids from 0"):
            moe.routing(model, moe.Corpus.from_token_ids([[1], [10**6]]))
    for name in expected:
        np.testing.assert_array_equal(got[name].values, expected[name].values)
    with pytest.raises(BadInput, match="document 'a/0' has no text: expected documents of text, got token ids"):
        _ = of_ids.texts


@pytest.mark.parametrize(
    ("rows", "domains", "said"),
    [
        ([[1, -2]], None, "row 0 holds no token ids"),
        ([[1], []], None, "row 1 holds no token ids"),
        ([[1.5]], None, "row 0 holds no token ids"),
        ([[True]], None, "row 0 holds no token ids"),
        ([1, 2], None, r"row 0 holds no token ids.*got 1. One document alone is \[\[1, 2, 3\]\]"),
        ([[1], [2]], "ab", r"invalid domains for .*got 'ab'. domains=\[name\] \* len"),
        ("12", None, "invalid rows for Corpus.from_token_ids: expected a list"),
        ([[1], [2]], ["a"], "domains do not fit the rows: expected one for each of 2 documents, got 1"),
        ([], None, "a corpus without documents"),
        ([[1]], [None], "a document's domain is no name"),
    ],
)
def test_what_are_no_token_ids_are_refused(rows, domains, said):
    with pytest.raises(BadInput, match=said):
        moe.Corpus.from_token_ids(rows, domains)


@pytest.mark.parametrize("name", ["max_tokens", "batch_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_numbers_of_tokens_that_are_none(name, value):
    corpus = moe.Corpus.from_texts({"a": ["a text"]})
    says = f"invalid {name} for batches: expected a whole number of at least 1"
    with moe.wrap(build("olmoe"), StubTokenizer()) as model, pytest.raises(BadInput, match=says):
        batches(model, corpus, **{name: value})


def test_a_domain_without_a_name_is_a_domain(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "one", "domain": "a"}')
    assert moe.read_corpus(tmp_path / "x.jsonl", domain="").domains == ("",)
