"""Corpora: documents with a domain, of text or of token ids, and batches of them.

A document is the unit of every interval in this package, because tokens of one text are not independent.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from os import PathLike
from typing import Annotated, Any, SupportsIndex, overload

import numpy as np
import torch

from moe_interp.arguments import Count, Otherwise, checked, described, is_whole, shown
from moe_interp.encode import GIVE_TOKENIZER, pad, padding_of, token_ids
from moe_interp.errors import BadInput
from moe_interp.interventions import Intervention
from moe_interp.interventions.values import ByToken
from moe_interp.measured import inputs_told
from moe_interp.model import MoEModel
from moe_interp.paths import lone_surrogate
from moe_interp.run import counted


@dataclass(frozen=True, repr=False)
class Document:
    """One text, or the token ids of one, and the group it is counted in.

    Attributes:
        text: the text; empty where ``ids`` are given.
        domain: the group. A whole number becomes its digits.
        name: tells it from others in messages.
        ids: token ids, for models without a tokenizer.
    """

    text: str
    domain: str
    name: str
    ids: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        size = f"{len(self.text)} characters" if self.ids is None else f"{len(self.ids)} token ids"
        begin = repr(self.text[:_BEGIN] + "…" * (len(self.text) > _BEGIN)) if self.ids is None else ""
        return f"Document {self.name!r} of domain {self.domain!r}, {size}" + (f": {begin}" if begin else "")


_BEGIN = 60  # how many characters of a text a document shows
_DOMAINS = 12  # and how many domains a corpus
_MADE_BY = "a corpus: moe.read_corpus(path), or moe.Corpus.from_texts({domain: texts})"


def _corpus_instead(given: Any) -> str | None:
    if isinstance(given, str | PathLike):
        return "Read a file: moe.read_corpus(path)."
    if isinstance(given, Mapping):
        return "Make one: moe.Corpus.from_texts({domain: [text, ...]})."
    if isinstance(given, Iterable):
        return 'Make one: moe.Corpus.from_texts({"all": texts}), or moe.Corpus.from_token_ids(rows).'
    return None


@described("a corpus", _corpus_instead)
@dataclass(frozen=True, repr=False)
class Corpus:
    """Documents in a fixed order, which it iterates over.

    ``len(corpus)``, ``corpus[3]`` (a document), ``corpus[:10]`` (a corpus) and ``corpus + other`` do what they do of a
    list; `filter` and `take` leave documents out.

    Raises:
        BadInput: no documents, something else among them, one that is empty, or texts, names and domains that are no
            Unicode text or hold a NUL.
    """

    documents: tuple[Document, ...]
    source: str = "memory"

    def __post_init__(self) -> None:
        if not isinstance(self.documents, list | tuple) or not all(isinstance(one, Document) for one in self.documents):
            raise BadInput("not documents", expected=_MADE_BY, got=repr(self.documents)[:80])
        if not isinstance(self.source, str):
            raise BadInput("not a source", expected="the name of where documents are from", got=repr(self.source)[:80])
        _check_signs(self.source, "the source")
        if not self.documents:
            raise BadInput(f"a corpus without documents from {self.source}", expected="at least one", got="none")
        object.__setattr__(self, "documents", tuple(map(_checked, self.documents)))

    def __repr__(self) -> str:
        counts = Counter(document.domain for document in self.documents)
        some = [f"{domain} {count}" for domain, count in islice(counts.items(), _DOMAINS)]
        more = len(counts) - len(some)
        told = ", ".join(some) + (f" and {counted(more, 'other domain')}" if more else "")
        return f"Corpus of {counted(len(self), 'document')} from {self.source}: {told}"

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    @overload
    def __getitem__(self, which: SupportsIndex) -> Document: ...

    @overload
    def __getitem__(self, which: slice) -> "Corpus": ...

    def __getitem__(self, which: SupportsIndex | slice) -> "Document | Corpus":
        """A document by its number, or a corpus of those that a slice takes.

        Raises:
            BadInput: something else than a number or a slice, or a slice that takes none.
            IndexError: a number from ``len(corpus)`` on, as in a list.
        """
        if isinstance(which, slice):
            return Corpus(self.documents[which], self.source)
        if not isinstance(which, SupportsIndex) or isinstance(which, bool):
            do = (
                f"corpus.filter(lambda d: d.domain == {which!r}) takes a domain."
                if isinstance(which, str) and which in self.domains
                else None
            )
            raise BadInput("not a document's number", expected="a whole number or a slice", got=repr(which)[:80], do=do)
        return self.documents[which]

    @checked
    def __add__(self, other: "Corpus") -> "Corpus":
        """The documents of both, one after the other.

        Raises:
            BadInput: the other is no corpus.
        """
        sources = dict.fromkeys((self.source, other.source))
        return Corpus((*self.documents, *other.documents), " + ".join(sources))

    @classmethod
    @checked
    def from_texts(cls, texts: Mapping[Any, Iterable[str]], source: str = "memory") -> "Corpus":
        """Make a corpus of lists of texts by domain.

        Raises:
            BadInput: no mapping of lists, two domains of one name, or documents that `Corpus` refuses.
        """
        return cls(tuple(_by_domain(texts, "{domain: [text, text, ...]}", Document)), source)

    @classmethod
    @checked
    def from_token_ids(
        cls,
        rows: Iterable[Any],
        domains: Annotated[
            Sequence[Any] | None, Otherwise("domains=[name] * len(rows) gives all documents the same.")
        ] = None,
        source: str = "memory",
    ) -> "Corpus":
        """Make a corpus of token ids, for a model without a tokenizer or for ids that are made already.

        Args:
            rows: the ids of each document, of any lengths: lists, arrays or tensors.
            domains: the domain of each document (None: "all" for all of them).
            source: where the ids are from, for provenance.

        Raises:
            BadInput: rows that hold something else than ids, no row, an empty one, or as many domains as there are
                no documents.
        """
        found = [_ids_of(row, number) for number, row in enumerate(rows)]
        named = ["all"] * len(found) if domains is None else list(domains)
        if len(named) != len(found):
            raise BadInput(
                "domains do not fit the rows", expected=f"one for each of {len(found)} documents", got=str(len(named))
            )
        counts: Counter[Any] = Counter()
        documents = []
        for domain, ids in zip(named, found, strict=True):
            documents.append(Document("", domain, f"{domain}/{counts[domain]}", ids))
            counts[domain] += 1
        return cls(tuple(documents), source)

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order in which they first occur."""
        return tuple(dict.fromkeys(document.domain for document in self.documents))

    @property
    def texts(self) -> list[str]:
        """The texts, in order.

        Raises:
            BadInput: documents of token ids, which have none.
        """
        for document in self.documents:
            if document.ids is not None:
                raise BadInput(
                    f"document {document.name!r} has no text",
                    expected="documents of text",
                    got="token ids",
                    do="moe.Corpus.from_texts({domain: texts}) makes a corpus of texts.",
                )
        return [document.text for document in self.documents]

    @property
    def contents(self) -> list[str | tuple[int, ...]]:
        """What tells documents apart: each one's text, or its token ids."""
        return [document.ids or document.text for document in self.documents]

    @property
    def told(self) -> dict[str, str | int]:
        """Source, number and texts of the documents, with their domains, as a result's provenance has them."""
        documents = [[one.domain, one.ids or one.text] for one in self.documents]
        return {"data": self.source, "documents": len(self), **inputs_told(texts=documents)}

    @property
    def labels(self) -> np.ndarray:
        """[N], the number of each document's domain in `domains`."""
        number = {domain: index for index, domain in enumerate(self.domains)}
        return np.array([number[document.domain] for document in self.documents])

    @checked
    def filter(
        self, keep: Annotated[Callable[[Document], bool], Otherwise('Such as lambda d: d.domain == "math".')]
    ) -> "Corpus":
        """The documents of which a function says that they are to be kept, in order.

        Raises:
            BadInput: not a function, or none is kept.
        """
        kept = tuple(document for document in self.documents if keep(document))
        if not kept:
            raise BadInput("the filter keeps no document", expected=f"at least one of {len(self)}", got="none")
        return Corpus(kept, self.source)

    @checked
    def take(self, per_domain: Count) -> "Corpus":
        """The first documents of every domain.

        Raises:
            BadInput: not a number of documents, or less than one.
        """
        kept = [
            document
            for domain in self.domains
            for document in islice((one for one in self.documents if one.domain == domain), per_domain)
        ]
        return Corpus(tuple(kept), self.source)


def _checked(document: Document) -> Document:
    """The document, its domain and name as text.

    Raises:
        BadInput: it is empty, or holds what no file, tokenizer or result can hold.
    """
    domain, name = (_as_name(value, what) for what, value in (("domain", document.domain), ("name", document.name)))
    if not isinstance(document.text, str):
        raise BadInput("not documents", expected=f"a text in document {name!r}", got=repr(document.text)[:80])
    if document.ids is None and not document.text.strip():
        raise BadInput(f"document {name!r} is empty", expected="at least one character of text")
    if document.ids is not None and (document.text or not document.ids):
        raise BadInput(f"document {name!r} is unclear", expected="a text, or one token id or more", got="both or none")
    _check_signs(document.text, f"document {name!r}")
    ids = None if document.ids is None else _ids_of(document.ids, name)
    return Document(document.text, domain, name, ids)


def _as_name(value: Any, what: str) -> str:
    if not isinstance(value, str | bool) and not is_whole(value):
        raise BadInput(f"a document's {what} is no name", expected="text or a whole number", got=shown(value))
    text = str(value) if isinstance(value, str | bool) else str(operator.index(value))
    _check_signs(text, f"the {what} {text!r}")
    return text


def _check_signs(text: str, what: str) -> None:
    if lone_surrogate(text):
        raise BadInput(
            f"{what} is no Unicode text", expected="characters that UTF-8 can encode", got="half of a surrogate pair"
        )
    if "\0" in text:
        raise BadInput(f"{what} holds a NUL", expected="text without NUL, which no result can store", got=repr("\0"))


def _by_domain(given: Any, expected: str, make: Callable[[str, Any, str], Document]) -> Iterator[Document]:
    """Documents of a mapping from domains to lists."""
    lists = isinstance(given, Mapping) and all(
        isinstance(members, Iterable) and not isinstance(members, str | bytes) for members in given.values()
    )
    if not lists:
        raise BadInput("not texts by domain", expected=expected, got=repr(given)[:80])
    if len({str(domain) for domain in given}) < len(given):
        raise BadInput("two domains of one name", expected="names that differ as text", got=repr(list(given))[:80])
    for domain, members in given.items():
        for number, member in enumerate(members):
            yield make(member, domain, f"{domain}/{number}")


def _ids_of(row: Any, where: int | str) -> tuple[int, ...]:
    """Token ids as whole numbers from 0 on."""
    here = isinstance(row, np.ndarray) or (isinstance(row, torch.Tensor) and not row.is_meta)
    values = row.tolist() if here else row
    whole = isinstance(values, list | tuple) and all(
        isinstance(one, SupportsIndex) and not isinstance(one, bool) and operator.index(one) >= 0 for one in values
    )
    if not whole or not values:
        raise BadInput(
            f"row {where} holds no token ids",
            expected="a list of one whole number or more, from 0 on",
            got=repr(row)[:80],
            do="One document alone is [[1, 2, 3]]." if isinstance(row, SupportsIndex) else None,
        )
    return tuple(operator.index(one) for one in values)


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


@checked
def batches(
    model: MoEModel, corpus: Corpus, *, max_tokens: Count | None = None, batch_tokens: Count = 4096
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
    for one in model._standing:
        _check_for_corpora(one)
    limit = min(max_tokens or model.spec.context_length, model.spec.context_length)
    ids, padding = [_tokens(model, document) for document in corpus], padding_of(model.tokenizer, model.spec)
    order = sorted(range(len(ids)), key=lambda number: (-len(ids[number]), number))
    groups: list[list[int]] = []
    for number in order:
        longest = min(len(ids[groups[-1][0]]), limit) if groups else 0
        if not groups or longest * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(number)
    return [_batch([ids[number] for number in group], group, limit, padding) for group in groups]


def _tokens(model: MoEModel, document: Document) -> list[int]:
    """Token ids of a document, as the model takes them."""
    if document.ids is None and model.tokenizer is None:
        raise BadInput(
            "a corpus needs a tokenizer",
            expected="a model with one, or moe.Corpus.from_token_ids(rows)",
            got="none",
            do=GIVE_TOKENIZER,
        )
    found = list(document.ids or token_ids([document.text], model.tokenizer)[0])
    if not found:
        raise BadInput(f"document {document.name!r} has no tokens", expected="at least one", got=document.text[:80])
    if max(found) >= model.spec.vocab_size:
        raise BadInput(
            f"document {document.name!r} has token ids out of the vocabulary",
            expected=f"ids from 0 to {model.spec.vocab_size - 1}",
            got=str(max(found)),
        )
    return found


def _check_for_corpora(edit: Intervention) -> None:
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
