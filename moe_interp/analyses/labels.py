"""Which expert takes which kind of token: routing by a label of every token.

1. A labeller gives every token of a text a label: its kind (word, number, punctuation, ...), its script, its place in
   the text, or whatever a function says; `spans` makes one of a function that marks stretches of text, such as a
   part-of-speech tagger.
2. `LabelCounts` counts tokens and choices per document and label: specialization as in `routing`, with labels in
   place of domains, and its interval over documents. One that is told the labels of a corpus can be fed by `collect`.
3. The control is the same document: the share of its tokens *without* the label. Neighbouring tokens are alike, so
   labels are not permuted; the sign of each document's difference is flipped, all its experts at once.
"""

import hashlib
import operator
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, NamedTuple, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int, Num

import moe_interp.stats as stats
from moe_interp.analyses.collect import Options, collect, sizes
from moe_interp.analyses.exact import Exact, Provenance, flat_counts, of_each, one_or_each, told_top_k
from moe_interp.analyses.routing_values import taken
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.data import Corpus
from moe_interp.encode import GIVE_TOKENIZER
from moe_interp.errors import BadInput
from moe_interp.measured import function_told
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled
from moe_interp.run import Run

MOST = 256
PART = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are no whole character


class Tokenized(NamedTuple):
    """A text and its tokens.

    Attributes:
        text: the document.
        tokens: the text of every token, special ones included; of one that is a part of a character, the whole
            character where the tokenizer says which, else U+FFFD.
        spans: first and last character (exclusive) of each; None where the tokenizer does not say.
    """

    text: str
    tokens: list[str]
    spans: list[tuple[int, int]] | None


Labeller = Callable[[Tokenized], Sequence[str]]
"""A label for every token of a text."""


def kind(token: str) -> str:
    """word, number, punctuation, symbol, space, other: what most of a token's visible characters are."""
    signs = [unicodedata.category(sign)[0] if sign != PART else "" for sign in token.strip()]
    if not signs:
        return "space"
    commonest = max(sorted(set(signs)), key=signs.count)
    return {"L": "word", "M": "word", "N": "number", "P": "punctuation", "S": "symbol"}.get(commonest, "other")


def script(token: str) -> str:
    """The writing of a token's first letter: latin, cjk, greek, cyrillic, ...; "none" without letters."""
    for sign in token:
        if sign.isalpha():
            return unicodedata.name(sign, "unknown").split()[0].lower()
    return "none"


def place(number: int) -> str:
    """Where in the text a token is, counted from 0."""
    return next((f"{low}-{high - 1}" for low, high in ((0, 4), (4, 16), (16, 64), (64, 256)) if number < high), "256-")


LABELLERS: dict[str, Labeller] = {
    "kind": lambda text: [kind(token) for token in text.tokens],
    "punctuation": lambda text: ["punctuation" if kind(token) == "punctuation" else "other" for token in text.tokens],
    "script": lambda text: [script(token) for token in text.tokens],
    "position": lambda text: [place(number) for number in range(len(text.tokens))],
}


@checked
def spans(mark: Callable[[str], Sequence[tuple[int, int, str]]], *, other: str = "other") -> Labeller:
    """A labeller of a function from a text to (first character, last + 1, label), such as a part-of-speech tagger.

    A token gets the label of the stretch that its middle lies in, without the white space around it. With spaCy:
    ``spans(lambda text: [(t.idx, t.idx + len(t), t.pos_) for t in nlp(text)])``.

    Raises (when it labels):
        BadInput: a stretch that does not lie in the text, or a tokenizer that does not say where its tokens lie.
    """

    def labels(text: Tokenized) -> list[str]:
        if text.spans is None:
            raise BadInput(
                "cannot place tokens in the text",
                expected="a tokenizer that returns offsets (a fast one)",
                got="one that does not",
                do="Label by the tokens themselves: a function of Tokenized.",
            )
        by_sign = [other] * len(text.text)
        for first, last, label in mark(text.text):
            _check_stretch(first, last, text.text)
            by_sign[first:last] = [label] * (last - first)
        return [by_sign[_middle(text.text, *span)] if span[1] > span[0] else other for span in text.spans]

    return labels


def _check_stretch(first: Any, last: Any, text: str) -> None:
    """Refuse a stretch that is not one of the text: labels of what comes after it would be shifted."""
    whole = all(isinstance(one, SupportsIndex) and not isinstance(one, bool) for one in (first, last))
    if not whole or not 0 <= operator.index(first) <= operator.index(last) <= len(text):
        raise BadInput(
            "a label of characters that the text does not have",
            expected=f"first and last + 1, 0 <= first <= last + 1 <= {len(text)}",
            got=f"{first!r} and {last!r}",
        )


def _middle(text: str, first: int, last: int) -> int:
    """The character in the middle of a stretch without the white space around it: tokens hold the space before them."""
    part = text[first:last]
    first, last = first + len(part) - len(part.lstrip()), last - len(part) + len(part.rstrip())
    return max(first + last - 1, 0) // 2


def check_label(label: str | Labeller) -> None:
    """Refuse a name that no labeller has.

    Raises:
        BadInput: it has none.
    """
    if isinstance(label, str) and label not in LABELLERS:
        raise BadInput("unknown label", expected=f"one of {', '.join(LABELLERS)}, or a function", got=repr(label))


def label_tokens(model: MoEModel, corpus: Corpus, label: str | Labeller) -> tuple[list[str], list[np.ndarray]]:
    """The labels that occur, in alphabetical order, and for each document the number of every token's label.

    Raises:
        BadInput: no tokenizer, an unknown name, a wrong number of labels, more than 256 different ones.
    """
    if model.tokenizer is None:
        raise BadInput("labels need a tokenizer", expected="a model with one", got="none", do=GIVE_TOKENIZER)
    check_label(label)
    labeller = LABELLERS[label] if isinstance(label, str) else label
    named = zip(corpus.texts, corpus.documents, strict=True)
    found = [_labels(labeller, _tokenized(model.tokenizer, text), one.name) for text, one in named]
    names = sorted({name for labels in found for name in labels})
    if len(names) > MOST:
        raise BadInput("too many labels", expected=f"at most {MOST} different ones", got=str(len(names)))
    number = {name: index for index, name in enumerate(names)}
    return names, [np.array([number[name] for name in labels], dtype=np.int64) for labels in found]


def _labels(labeller: Labeller, text: Tokenized, document: str) -> list[str]:
    labels = [str(label) for label in labeller(text)]
    if len(labels) != len(text.tokens):
        raise BadInput(
            f"labels of {document!r} do not fit", expected=f"{len(text.tokens)}, one a token", got=str(len(labels))
        )
    return labels


def _tokenized(tokenizer: Any, text: str) -> Tokenized:
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(text, verbose=False, **({"return_offsets_mapping": True} if fast else {}))
    tokens = [str(tokenizer.decode([token])) for token in encoded["input_ids"]]
    if not fast:
        return Tokenized(text, tokens, None)
    spans = [tuple(pair) for pair in encoded["offset_mapping"]]
    whole = [text[slice(*span)] or token if PART in token else token for token, span in zip(tokens, spans, strict=True)]
    return Tokenized(text, whole, spans)


@dataclass
class LabelCounts(Exact):
    """Tokens and choices per document and label.

    Holds 8 N G (1 + L E) bytes: 166 MB for 2,000 documents, 6 labels, 27 layers and 64 experts.

    Attributes:
        layers: [L], MoE layer indices.
        top_k: [L], K.
        tokens: [N, G].
        counts: [N, G, L, E], tokens with the label that chose the expert.
        labelling: tells the labels of one pass from those of another, so that only like is merged and taken up; 0
            where they are told run by run, by `add`.
        numbers: the label of every token of every document, for `update`; not stored.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    layers: tuple[int, ...]
    top_k: tuple[int, ...]
    tokens: Int[np.ndarray, "N G"]
    counts: Int[np.ndarray, "N G L E"]
    labelling: int = 0
    numbers: InitVar[Sequence[np.ndarray] | None] = None

    def __post_init__(self, numbers: Sequence[np.ndarray] | None) -> None:
        self._numbers = numbers
        if numbers is not None:
            told = hashlib.sha256(b"".join(one.astype("<i8").tobytes() + b"|" for one in numbers))
            self.labelling = int.from_bytes(told.digest()[:7], "big")

    @classmethod
    def empty(
        cls,
        documents: int,
        labels: int,
        layers: Sequence[int],
        experts: int,
        top_k: int | Sequence[int],
        numbers: Sequence[np.ndarray] | None = None,
    ) -> "LabelCounts":
        """Nothing counted yet; ``numbers`` is what `label_tokens` gives, without it there is `add` alone."""
        size = (documents, labels)
        tokens, counts = np.zeros(size, np.int64), np.zeros((*size, len(layers), experts), np.int64)
        return cls(tuple(layers), of_each(top_k, layers), tokens, counts, numbers=numbers)

    def update(self, run: Run, documents: Int[np.ndarray, " B"]) -> None:
        """Adds a run whose documents' labels are known.

        Raises:
            BadInput: they are not.
        """
        if self._numbers is None:
            raise BadInput(
                "labels of tokens are not known",
                expected="LabelCounts.empty(..., numbers=...), as label_tokens gives them",
                got="none",
                do="Or add(run, documents, labels).",
            )
        self.add(run, documents, [self._numbers[document] for document in documents])

    def add(self, run: Run, documents: Int[np.ndarray, " B"], labels: Sequence[np.ndarray]) -> None:
        """Adds a run; row b belongs to document ``documents[b]``, whose tokens have ``labels[b]``."""
        groups, experts = self.tokens.shape[1], self.counts.shape[-1]
        for row, document in enumerate(documents.tolist()):
            mask, places = run.mask[row].cpu(), run.tokens.index[row].cpu()
            own = torch.from_numpy(labels[row])
            self.tokens[document] += flat_counts(own[places[mask]], groups)
            for index, layer in enumerate(self.layers):
                seen = mask & run.routing[layer].mask[row].cpu()
                codes = own[places[seen]][:, None] * experts + run.routing[layer].ids[row].cpu()[seen]
                self.counts[document, :, index] += flat_counts(codes, groups * experts).reshape(groups, experts)

    def result(
        self, labels: Sequence[str], *, provenance: Provenance, resamples: int = 1000, seed: int = 0
    ) -> xr.Dataset:
        """The Dataset that `routing_by_label` gives."""
        chose, seen = self.counts.sum(axis=0), taken(self.counts, self.top_k)
        ends = [
            stats.bootstrap_ratio(self.counts[:, group], seen[:, group], resamples=resamples, seed=seed)
            for group in range(len(labels))
        ]
        values = {
            "tokens": self.tokens.sum(axis=0),
            "documents": (self.tokens > 0).sum(axis=0),
            "counts": chose,
            "specialization": stats.ratio(chose, seen.sum(axis=0)),
            "specialization_interval": np.stack(ends, axis=1),
            "specialization_rest": _rest(self.counts, seen),
            "specialization_baseline": one_or_each(np.array(self.top_k) / self.counts.shape[-1]),
            "specialization_p": stats.sign_flip_max(differences(self.counts, seen), flips=resamples, seed=seed),
        }
        coords: dict[str, Any] = {
            "bound": ["low", "high"],
            "label": list(labels),
            "layer": np.array(self.layers, dtype=np.int64),
            "expert": np.arange(self.counts.shape[-1]),
        }
        how = {"top_k": told_top_k(self.top_k), "resamples": resamples, "seed": seed}
        return labelled(
            described(values, _VARIABLES), coords, analysis="routing_by_label", provenance={**provenance, **how}
        )


def differences(counts: Int[np.ndarray, "N G L E"], tokens: Num[np.ndarray, "N G L"]) -> Float[np.ndarray, "N G L E"]:
    """Choices of a document's tokens with a label, above what the document's own share of the expert predicts.

    n_g (s_g - s) for n_g tokens that take experts of the layer: 0 in documents that have only such tokens, or none.
    """
    every, chose = tokens.sum(axis=1, keepdims=True), counts.sum(axis=1, keepdims=True)
    # Divided last: whole numbers cancel exactly, and signs of rounding would be told from chance.
    return np.nan_to_num(stats.ratio(counts * every[..., None] - tokens[..., None] * chose, every[..., None]))


def _rest(counts: Int[np.ndarray, "N G L E"], tokens: Num[np.ndarray, "N G L"]) -> Float[np.ndarray, "G L E"]:
    """Share among tokens without the label of the same documents, documents weighing by their tokens with it."""
    others = stats.ratio(counts.sum(axis=1, keepdims=True) - counts, tokens.sum(axis=1, keepdims=True) - tokens)
    both = (tokens > 0) & (tokens < tokens.sum(axis=1, keepdims=True))
    weight = np.where(both, tokens, 0)
    return stats.ratio((weight[..., None] * np.nan_to_num(others)).sum(axis=0), weight.sum(axis=0))


_GLE = ("label", "layer", "expert")
_VARIABLES: dict[str, Description] = {
    "tokens": (("label",), "tokens", "tokens with the label"),
    "documents": (("label",), "documents", "documents that have some"),
    "counts": (_GLE, "tokens", "tokens with the label that chose the expert"),
    "specialization": (
        _GLE,
        "1",
        "share of the tokens with the label that chose the expert, of those that take any, 0 ... 1",
    ),
    "specialization_interval": (("bound", *_GLE), "1", "95 % interval over documents: specialization"),
    "specialization_rest": (_GLE, "1", "the same share among the other tokens of the same documents"),
    "specialization_baseline": (("layer?",), "1", "specialization under a uniform router, K/E"),
    "specialization_p": (
        _GLE,
        "1",
        "p that tokens with the label choose the expert no more often than other tokens of their document: signs of "
        "documents flipped, one-sided, adjusted for the experts of the layer by the maximum statistic",
    ),
}


@checked
def routing_by_label(
    model: MoEModel,
    corpus: Corpus,
    label: str | Labeller = "kind",
    *,
    special_tokens: bool = False,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Which expert takes which kind of token: ``routing_by_label(model, corpus, "punctuation")``.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents; their domains are not used.
        label: "kind", "punctuation", "script", "position", or a function of `Tokenized` that gives every token's
            label; `spans` makes one of a tagger.
        special_tokens: whether the tokenizer's special tokens count.
        resamples: bootstrap resamples and sign flips.
        seed: of both.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims label, layer, expert, bound: ``specialization`` with its interval, ``specialization_rest`` and
        ``specialization_baseline`` beside it, ``specialization_p``; ``tokens``, ``documents``, ``counts``.

    Raises:
        BadInput: no tokenizer, an unknown label, labels that do not fit the tokens or are too many.
        UnsupportedModel: layers with different numbers of experts.
    """
    names, numbers = label_tokens(model, corpus, label)
    sums = LabelCounts.empty(len(corpus), len(names), *sizes(model), numbers)
    where = collect(model, corpus, {"labels": sums}, Options(special_tokens, max_tokens, batch_tokens))
    where["label"] = label if isinstance(label, str) else function_told(label)
    where["labelling"] = f"{sums.labelling:x}"  # a hash of every token's label
    return sums.result(names, provenance=where, resamples=resamples, seed=seed)
