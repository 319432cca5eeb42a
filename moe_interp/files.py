"""Corpora from files, folders and Hugging Face datasets.

1. A reader for each type of file gives records, mappings of fields, one at a time and in bounded memory.
2. `read_corpus` takes the text, the domain and the name from each record and leaves out blank texts.
"""

import csv
import gzip
import io
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TextIO

from moe_interp.arguments import Count, Otherwise, checked, frames_up
from moe_interp.data import Corpus, Document
from moe_interp.errors import BadData, BadInput
from moe_interp.paths import check_readable, lone_surrogate, looks_like_path, without_credentials
from moe_interp.untrusted import frames

SAMPLE = Path(__file__).parent / "zoo" / "sample.jsonl"
LONGEST = 2**26  # characters of a line, and bytes of a .json file: what is longer is no text
EXPANSION = 100  # characters for each byte of a compressed file, besides LONGEST
_RECORD = 64  # characters that a line or row counts as, besides its own: it takes memory however short it is
_SAVED = ("dataset_info.json", "dataset_dict.json")  # in a folder that datasets wrote

Record = dict[str, Any]


@dataclass(frozen=True)
class _Fields:
    """Names of the fields that hold a record's text and domain, and the domain of all, where they are given."""

    text: str
    domain: str | None
    all_of: str | None

    @property
    def wanted(self) -> list[str]:
        """Fields to look at."""
        return list(dict.fromkeys(one for one in (self.text, self.domain, "domain", "name", self.all_of) if one))


@checked
def sample() -> Corpus:
    """Return the bundled documents: 24 short ones for each domain of the reference model, written for this project."""
    return Corpus(read_corpus(SAMPLE).documents, "the bundled sample")


@checked
def read_corpus(
    path: Annotated[str | Path, Otherwise("moe.Corpus.from_texts({domain: texts}) makes a corpus of texts in memory.")],
    *,
    text: str = "text",
    domain: str | None = None,
    domain_field: str | None = None,
    limit: Count | None = None,
) -> Corpus:
    """Read documents from a file, a folder of files, or a Hugging Face dataset.

    Records of ``.jsonl``, ``.jsonl.gz``, ``.json`` (a list of objects), ``.csv`` (with a header) and ``.parquet`` have
    a ``text`` field, and may have ``domain`` and ``name``. A ``.txt`` is one document for each block of lines between
    blank lines. A folder is read file by file. A name that is no path is the id of a dataset on the hub. Where nothing
    names a domain it is the file's name. Blank texts are left out, and a warning says how many.

    Args:
        path: where to read.
        text: the field that holds the text.
        domain: one domain for all documents, in place of what the data say.
        domain_field: the field that holds the domain, where it is not ``domain``.
        limit: at most so many documents of each file.

    Raises:
        BadData: nothing there, an unknown format, or a record that cannot be read (with its number).
        BadInput: what is no path, ``domain`` and ``domain_field`` together, a ``domain`` that names a field of the
            data, or a limit below 1.
    """
    fields = _fields(text, domain, domain_field)
    source, files = _files(path)
    blank: list[int] = []
    documents = [one for file in files for one in islice(_documents(file, fields, blank), limit)]
    if blank:
        warnings.warn(f"{len(blank)} empty texts of {source} were left out", stacklevel=frames_up(2))
    if not documents:
        raise BadData(f"no documents in {source}", expected="at least one", got="none")
    return Corpus(tuple(documents), source)


def _fields(text: str, domain: str | None, domain_field: str | None) -> _Fields:
    if domain is not None and domain_field is not None:
        raise BadInput(
            "domain and domain_field exclude each other",
            expected="domain, one name for all documents, or domain_field, the field that holds each one's",
            got=f"domain={domain!r} and domain_field={domain_field!r}",
        )
    return _Fields(text, domain_field, domain)


def _files(path: str | Path) -> tuple[str, list[Path]]:
    """The path as provenance tells it, and the files to read, or the id of a dataset."""
    told = without_credentials(_told(path))
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise BadInput("not a path", expected="a file, a folder or the id of a dataset", got=repr(told)[:80])
    source = Path(path)
    saved = any((source / name).exists() for name in _SAVED) if os.path.isdir(path) else True
    if saved:
        if not os.path.exists(path) and looks_like_path(path):
            raise BadData(f"no file {told}", expected="an existing file or folder, or a dataset id", got=told)
        return told, [source]
    found = sorted(file for file in source.iterdir() if _ending(file) is not None)
    if not found:
        raise BadData(f"no data in {told}", expected=f"files of type {', '.join(_READERS)}", got="none")
    return told, found


def _told(path: str | os.PathLike[str]) -> str:
    """A path as text that UTF-8 can hold, whatever bytes its name has."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _ending(file: Path) -> str | None:
    return next((ending for ending in _READERS if file.name.endswith(ending)), None)


def _documents(file: Path, fields: _Fields, blank: list[int]) -> Iterator[Document]:
    """The documents of a file; the numbers of records whose text is blank go to ``blank``."""
    ending = _ending(file)
    if os.path.exists(file) and not file.is_dir():
        check_readable(file, "a regular file")
        if ending is None:
            raise BadData(
                f"cannot read {_told(file)}", expected=f"a file of type {', '.join(_READERS)}", got=repr(file.suffix)
            )
    records = _dataset(file) if ending is None else _READERS[ending](file, fields)
    stem = _told(file.name.removesuffix(ending or ""))
    for number, record in enumerate(records):
        document = _document(record, fields, stem, number, f"record {number + 1} of {_told(file)}")
        if document.text.strip():
            yield document
        else:
            blank.append(number)


def _document(record: Record, fields: _Fields, stem: str, number: int, where: str) -> Document:
    if fields.all_of is not None and fields.all_of in record:
        raise BadInput(
            f"domain={fields.all_of!r} names a field of the data",
            expected="one name for all documents",
            got=f"a field of {where}",
            do=f"domain_field={fields.all_of!r} takes the domain from it.",
        )
    text = _field(record, fields.text, "text", where)
    if not isinstance(text, str):
        raise BadData(f"{where} has no text", expected=f"a string under {fields.text!r}", got=repr(text)[:80])
    own = record.get("domain") if fields.domain is None else _field(record, fields.domain, "domain", where)
    domain = stem if own is None else _name(own, "domain", where)
    domain = domain if fields.all_of is None else fields.all_of
    name = record.get("name")
    _check_signs(text, where)
    return Document(text, domain, f"{stem}/{number}" if name is None else _name(name, "name", where))


def _name(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str | int | float):
        raise BadData(f"{where} has no {what}", expected="text or a number", got=repr(value)[:80])
    _check_signs(str(value), where)
    return str(value)


def _check_signs(text: str, where: str) -> None:
    if lone_surrogate(text) or "\0" in text:
        got = "a NUL" if "\0" in text else "half of a surrogate pair"
        raise BadData(f"{where} has no text", expected="Unicode text without NUL", got=got)


def _field(record: Record, field: str, what: str, where: str) -> Any:
    if field not in record or (what == "domain" and record[field] is None):
        raise _no_field(where, field, what, record)
    return record[field]


def _no_field(where: str, field: str, what: str, there: Iterable[str]) -> BadData:
    name, option = ("text", "--text-field") if what == "text" else ("domain_field", "--domain-field")
    return BadData(
        f"{where} has no {what}",
        expected=f"a field {field!r}",
        got=f"the fields {', '.join(map(repr, there)) or 'none'}",
        do=f'Say which of them holds the {what}: moe.read_corpus(path, {name}="..."); {option} in commands.',
    )


# ---- a reader for each type of file -------------------------------------------------------------------------------


def _jsonl(file: Path, fields: _Fields) -> Iterator[Record]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield _json_object(line, f"line {number} of {_told(file)}")


class _Room:
    """How many characters a compressed file has left: few bytes can stand for more than any memory holds."""

    def __init__(self, file: Path):
        self.file = file
        self.most = self.left = LONGEST + EXPANSION * file.stat().st_size

    def take(self, characters: int) -> None:
        """Count a line or record.

        Raises:
            BadData: there is no room left.
        """
        self.left -= characters + _RECORD
        if self.left < 0:
            raise BadData(
                f"{_told(self.file)} expands to more than a file of its size has reason to",
                expected=f"at most {self.most} characters, {_RECORD} for each line or row among them",
                got="more",
                do="If that is what it holds, write its records to a .jsonl file and read that.",
            )


def _lines(file: Path) -> Iterator[str]:
    """The lines of a text file, compressed or not, each of bounded length."""
    try:
        room = _Room(file) if file.suffix == ".gz" else None
        with _opened(file) as lines:
            while line := lines.readline(LONGEST + 1):
                if len(line) > LONGEST:
                    raise BadData(
                        f"cannot read {_told(file)}",
                        expected=f"lines of at most {LONGEST} characters",
                        got="a longer one",
                    )
                if room is not None:
                    room.take(len(line))
                yield line
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise BadData(f"cannot read {_told(file)}", expected="UTF-8 text", got=str(error)) from error


def _opened(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(file), encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _json_object(line: str, where: str) -> Record:
    record = _parsed(line, where, "a JSON object")
    if not isinstance(record, dict):
        raise BadData(f"cannot read {where}", expected="a JSON object with 'text'", got=type(record).__name__)
    return record


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        got = "nesting that is too deep" if isinstance(error, RecursionError) else str(error)
        raise BadData(f"cannot read {where}", expected=expected, got=got) from error


def _json(file: Path, fields: _Fields) -> Iterator[Record]:
    where = _told(file)
    if file.is_file() and file.stat().st_size > LONGEST:
        raise BadData(
            f"cannot read {where}",
            expected=f"a .json file of at most {LONGEST} bytes",
            got=f"{file.stat().st_size}",
            do="A .jsonl file, with an object on each line, may be of any size.",
        )
    records = _parsed("".join(_lines(file)), where, "a JSON list of objects")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        got = "other things in a list" if isinstance(records, list) else type(records).__name__
        raise BadData(f"cannot read {where}", expected="a JSON list of objects with 'text'", got=got)
    yield from records


def _csv(file: Path, fields: _Fields) -> Iterator[Record]:
    before = csv.field_size_limit(LONGEST)
    rows = csv.DictReader(_lines(file), strict=True)
    try:
        names = rows.fieldnames or ()
        if len(set(names)) < len(names):
            raise BadData(f"cannot read {_told(file)}", expected="fields that differ", got=repr(list(names))[:80])
        for row in rows:
            if None in row or None in row.values():
                got = "too many" if None in row else "too few"
                raise BadData(
                    f"cannot read line {rows.line_num} of {_told(file)}", expected=f"{len(names)} values", got=got
                )
            yield row
    except csv.Error as error:
        raise BadData(
            f"cannot read {_told(file)} near line {rows.line_num + 1}",
            expected="a CSV file with a header",
            got=str(error),
        ) from error
    finally:
        csv.field_size_limit(before)


def _text(file: Path, fields: _Fields) -> Iterator[Record]:
    """Blocks of lines between lines of white space."""
    block: list[str] = []
    for line in _lines(file):
        if line.strip():
            block.append(line)
        elif block:
            yield {fields.text: "".join(block).removesuffix("\n")}
            block = []
    if block:
        yield {fields.text: "".join(block).removesuffix("\n")}


def _parquet(file: Path, fields: _Fields) -> Iterator[Record]:
    """Read by a child process: damage can end the library that reads, and few bytes can stand for endless rows."""
    answers = frames("parquet", file, *fields.wanted, expected="a parquet file")
    with closing(answers):
        there = next(answers)
        for name, what in ((fields.text, "text"), (fields.domain, "domain")):
            if name is not None and name not in there:
                raise _no_field(_told(file), name, what, there)
        room = _Room(file)
        for records in answers:
            for record in records:
                room.take(sum(len(value) for value in record.values() if isinstance(value, str)))
                yield record


def _dataset(source: Path) -> Iterator[Record]:
    import datasets

    try:
        found = datasets.load_from_disk(str(source)) if source.is_dir() else datasets.load_dataset(str(source))
    except Exception as error:
        raise BadData(
            f"no data at {_told(source)}",
            expected="an existing file or folder, or the id of a dataset",
            got=(str(error).strip() or type(error).__name__).splitlines()[0],
        ) from error
    parts = found.values() if isinstance(found, dict) else [found]
    yield from (dict(record) for part in parts for record in part)


# In an order in which an ending comes before those that it ends in.
_READERS: dict[str, Callable[[Path, _Fields], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _text,
    ".parquet": _parquet,
}
