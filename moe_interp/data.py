"""Texts in: documents with a domain, from files or Hugging Face datasets, and batches of them.

A document is the unit of every interval in this package, because tokens of one text are not independent.
"""

import json
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch

from moe_interp.encode import GIVE_TOKENIZER, pad, padding_of, token_ids
from moe_interp.errors import BadData, BadInput
from moe_interp.interventions.values import ByToken

if TYPE_CHECKING:
    from moe_interp.interventions import Intervention
    from moe_interp.model import MoEModel

SAMPLE = Path(__file__).parent / "zoo" / "sample.jsonl"


@dataclass(frozen=True)
class Document:
    """One text and the group it is counted in."""

    text: str
    domain: str
    name: str


_FROM_TEXTS = "moe.Corpus.from_texts({domain: texts}) makes a corpus of texts in memory."
_MADE_BY = "a corpus: moe.read_corpus(path), or moe.Corpus.from_texts({domain: texts})"


def _is_document(given: Any) -> bool:
    return isinstance(given, Document) and isinstance(given.text, str)


@dataclass(frozen=True, repr=False)
class Corpus:
    """Documents in a fixed order, which it iterates over.

    Raises:
        BadInput: no documents, something else among them, one that is empty, or one that no encoding takes.
    """

    documents: tuple[Document, ...]
    source: str = "memory"

    def __post_init__(self) -> None:
        if not isinstance(self.documents, list | tuple) or not all(map(_is_document, self.documents)):
            raise BadInput("not documents", expected=_MADE_BY, got=repr(self.documents)[:80])
        object.__setattr__(self, "documents", tuple(self.documents))
        if not self.documents:
            raise BadInput(f"a corpus without documents from {self.source}", expected="at least one", got="none")
        for document in self.documents:
            if not document.text.strip():
                raise BadInput(f"document {document.name!r} is empty", expected="at least one character of text")
            if _lone_surrogate(document.text):
                raise BadInput(
                    f"document {document.name!r} is no Unicode text",
                    expected="characters that UTF-8 can encode",
                    got="half of a surrogate pair",
                )

    def __repr__(self) -> str:
        counts = Counter(document.domain for document in self.documents)
        told = ", ".join(f"{domain} {count}" for domain, count in counts.items())
        return f"Corpus of {len(self)} documents from {self.source}: {told}"

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    @classmethod
    def from_texts(cls, texts: Mapping[str, list[str]], source: str = "memory") -> "Corpus":
        """From lists of texts by domain.

        Raises:
            BadInput: no mapping of lists, or documents that `Corpus` refuses.
        """
        lists = isinstance(texts, Mapping) and all(
            isinstance(members, Iterable) and not isinstance(members, str | bytes) for members in texts.values()
        )
        if not lists:
            raise BadInput("not texts by domain", expected="{domain: [text, text, ...]}", got=repr(texts)[:80])
        found = (
            Document(text, domain, f"{domain}/{number}")
            for domain, members in texts.items()
            for number, text in enumerate(members)
        )
        return cls(tuple(found), source)

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order in which they first occur."""
        return tuple(dict.fromkeys(document.domain for document in self.documents))

    @property
    def texts(self) -> list[str]:
        """The texts, in order."""
        return [document.text for document in self.documents]

    @property
    def labels(self) -> np.ndarray:
        """[N], the number of each document's domain in `domains`."""
        number = {domain: index for index, domain in enumerate(self.domains)}
        return np.array([number[document.domain] for document in self.documents])

    def take(self, per_domain: int) -> "Corpus":
        """The first documents of every domain.

        Raises:
            BadInput: not a number of documents, or less than one.
        """
        count = _at_least_one(per_domain)
        kept = [
            document
            for domain in self.domains
            for document in islice((one for one in self.documents if one.domain == domain), count)
        ]
        return Corpus(tuple(kept), self.source)


def _at_least_one(documents: Any) -> int:
    """A number of documents to take."""
    if not isinstance(documents, SupportsIndex) or operator.index(documents) < 1:
        raise BadInput("cannot take so many documents", expected="a whole number from 1 on", got=repr(documents))
    return operator.index(documents)


def sample() -> Corpus:
    """The bundled documents: 24 short ones for each domain of the reference model, written for this project."""
    return Corpus(read_corpus(SAMPLE).documents, "the bundled sample")


def read_corpus(path: str | Path, *, text: str = "text", domain: str | None = None, limit: int | None = None) -> Corpus:
    """Documents from a file, a folder of files, or a Hugging Face dataset.

    ``.jsonl`` and ``.parquet`` have a ``text`` field, and may have ``domain`` and ``name``; ``.txt`` is one document
    for each block of lines between blank lines. A folder is read file by file. Anything that is no path is taken for
    the id of a dataset on the hub. Where nothing names a domain it is the file's name. Texts that are empty, or white
    space alone, are left out, and a warning says how many.

    Args:
        path: where to read.
        text: the field that holds the text.
        domain: the domain of all documents, in place of what the data say.
        limit: at most so many documents of each file.

    Raises:
        BadData: nothing there, an unknown format, or a line that cannot be read (with its number).
        BadInput: what is no path, or a limit below 1.
    """
    if not isinstance(path, str | Path):
        raise BadInput(
            "not a path", expected="a file, a folder or the id of a dataset", got=repr(path)[:80], do=_FROM_TEXTS
        )
    limit = None if limit is None else _at_least_one(limit)
    source = Path(path)
    if source.is_dir() and not (source / "dataset_info.json").exists() and not (source / "dataset_dict.json").exists():
        files = sorted(file for file in source.iterdir() if file.suffix in _READERS)
        if not files:
            raise BadData(f"no data in {source}", expected=f"files of type {', '.join(_READERS)}", got="none")
    else:
        files = [source]
    blank: list[int] = []
    documents = [one for file in files for one in islice(_documents(file, text, domain, blank), limit)]
    if blank:
        warnings.warn(f"{len(blank)} empty texts of {source} were left out", stacklevel=2)
    if not documents:
        raise BadData(f"no documents in {source}", expected="at least one", got="none")
    return Corpus(tuple(documents), str(path))


def _documents(file: Path, field: str, domain: str | None, blank: list[int]) -> Iterator[Document]:
    """The documents of a file; the numbers of records whose text is blank go to ``blank``."""
    if file.is_file() and file.suffix not in _READERS:
        raise BadData(f"cannot read {file}", expected=f"a file of type {', '.join(_READERS)}", got=repr(file.suffix))
    if file.suffix in _READERS and not file.exists():
        raise BadData(f"no file {file}", expected="an existing file or folder, or a dataset id", got=str(file))
    records = _READERS[file.suffix](file, field) if file.suffix in _READERS else _dataset(file)
    for number, record in enumerate(records):
        text = _text_of(record, field, f"record {number + 1} of {file}")
        if not text.strip():
            blank.append(number)
            continue
        own, name = record.get("domain"), record.get("name")
        yield Document(
            text,
            domain or (file.stem if own is None else str(own)),
            f"{file.stem}/{number}" if name is None else str(name),
        )


def _text_of(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise _no_field(where, field, record)
    text = record[field]
    if not isinstance(text, str) or _lone_surrogate(text):
        raise BadData(f"{where} has no text", expected=f"a string under {field!r}", got=repr(text)[:80])
    return text


def _no_field(where: str, field: str, there: Iterable[str]) -> BadData:
    return BadData(
        f"{where} has no text",
        expected=f"a field {field!r}",
        got=f"the fields {', '.join(map(repr, there)) or 'none'}",
        do='Say which of them holds the text: moe.read_corpus(path, text="..."); --text-field in commands.',
    )


def _lone_surrogate(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which no encoding and no tokenizer takes."""
    return any("\ud800" <= sign <= "\udfff" for sign in text)


def _jsonl(file: Path, field: str) -> Iterator[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_object(line, f"line {number} of {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"cannot read {file}", expected="UTF-8 text", got=str(error)) from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadData(f"cannot read {where}", expected="a JSON object", got=str(error)) from error
    if not isinstance(record, dict):
        raise BadData(f"cannot read {where}", expected="a JSON object with 'text'", got=type(record).__name__)
    return record


def _text(file: Path, field: str) -> Iterator[dict[str, Any]]:
    try:
        blocks = file.read_text(encoding="utf-8-sig").split("\n\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"cannot read {file}", expected="UTF-8 text", got=str(error)) from error
    yield from ({field: block} for block in blocks if block.strip())


def _parquet(file: Path, field: str) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        there = table.schema_arrow.names
        if field not in there:
            raise _no_field(str(file), field, there)
        wanted = [name for name in dict.fromkeys((field, "domain", "name")) if name in there]
        for batch in table.iter_batches(columns=wanted):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise BadData(f"cannot read {file}", expected="a parquet file", got=str(error).splitlines()[0]) from error


def _dataset(source: Path) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        found = datasets.load_from_disk(str(source)) if source.is_dir() else datasets.load_dataset(str(source))
    except Exception as error:
        raise BadData(
            f"no data at {source}",
            expected="an existing file or folder, or the id of a dataset",
            got=str(error).strip().splitlines()[0],
        ) from error
    parts = found.values() if isinstance(found, dict) else [found]
    yield from (dict(record) for part in parts for record in part)


_READERS: dict[str, Callable[[Path, str], Iterator[dict[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".txt": _text,
    ".parquet": _parquet,
}


def check_corpus(corpus: Any) -> None:
    """Refuse what is no corpus, such as a text or the name of a file.

    Raises:
        BadInput: it is none.
    """
    if not isinstance(corpus, Corpus):
        raise BadInput("not a corpus", expected=_MADE_BY, got=repr(corpus)[:80])


@dataclass(frozen=True)
class Batch:
    """Documents padded to one length.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask``, [B, S].
        documents: [B], their numbers in the corpus.
        truncated: how many of them were cut to the longest length allowed.
    """

    inputs: dict[str, torch.Tensor]
    documents: np.ndarray
    truncated: int


def batches(
    model: "MoEModel", corpus: Corpus, *, max_tokens: int | None = None, batch_tokens: int = 4096
) -> list[Batch]:
    """The documents of a corpus in right-padded batches of similar length.

    The batches depend on the corpus alone, not on chance, so that results repeat bit for bit.

    Args:
        model: its tokenizer and context length are used.
        corpus: what to run on.
        max_tokens: longer documents are cut to so many tokens (None: to the model's context length).
        batch_tokens: at most so many tokens, padding included, in a batch (a single document may have more).

    Raises:
        BadInput: no corpus, a model without a tokenizer, or standing edits with values or marks of several texts.
    """
    check_corpus(corpus)
    for one in model._standing:
        _check_for_corpora(one)
    if model.tokenizer is None:
        raise BadInput("a corpus needs a tokenizer", expected="a model with one", got="none", do=GIVE_TOKENIZER)
    if max_tokens is not None and max_tokens < 1:
        raise BadInput("cannot cut documents to nothing", expected="max_tokens of 1 or more", got=str(max_tokens))
    limit = min(max_tokens or model.spec.context_length, model.spec.context_length)
    ids, padding = token_ids(corpus.texts, model.tokenizer), padding_of(model.tokenizer, model.spec)
    order = sorted(range(len(ids)), key=lambda number: (-len(ids[number]), number))
    groups: list[list[int]] = []
    for number in order:
        longest = min(len(ids[groups[-1][0]]), limit) if groups else 0
        if not groups or longest * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(number)
    return [_batch([ids[number] for number in group], group, limit, padding) for group in groups]


def _check_for_corpora(edit: "Intervention") -> None:
    """Refuse values and marks that go by the number of a text in a batch, where documents come in another order.

    Raises:
        BadInput: it has some of several texts.
    """
    for field in fields(edit):  # type: ignore[arg-type]
        given = getattr(edit, field.name)
        for one in given if isinstance(given, tuple) else (given,):
            if isinstance(one, ByToken) and len(one.lengths) > 1:
                raise BadInput(
                    f"a standing edit with {field.name} of several texts, which no documents of a corpus are",
                    expected="values and marks of one text, which serve every document",
                    got=f"{type(edit).__name__} of {len(one.lengths)} texts",
                    do="Take them from a run of one text, or give model.run the texts themselves.",
                )


def _batch(rows: list[list[int]], numbers: list[int], limit: int, padding: int) -> Batch:
    inputs = pad([row[:limit] for row in rows], padding=padding)
    return Batch(inputs, np.array(numbers), sum(len(row) > limit for row in rows))
