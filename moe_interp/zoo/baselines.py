"""What counting alone would predict: a unigram and a bigram model to hold a trained language model against.

1. Unigram: p(w) = (c(w) + 1) / (T + V).
2. Bigram, interpolated Witten-Bell (Chen and Goodman 1998, section 2.4): with n(h) the number of different
   tokens seen after h, p(w | h) = (c(h, w) + n(h) p(w)) / (c(h) + n(h)); a history never seen falls back to
   p(w).

Both are fitted on the training tokens of the language model, all domains together, as it was.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NgramModel:
    """Counts of single tokens and of adjacent pairs.

    `unigram` [V] probabilities; `pairs` [P] sorted codes h * V + w, `pair_counts` [P]; `history_counts` [V]
    tokens that follow h; `followers` [V] how many of them differ.
    """

    unigram: Tensor
    pairs: Tensor
    pair_counts: Tensor
    history_counts: Tensor
    followers: Tensor


def fit_ngrams(tokens: Tensor, vocab_size: int) -> NgramModel:
    """Counts over `tokens` [T], one run of text."""
    tokens = tokens.long()
    counts = tokens.bincount(minlength=vocab_size).double()
    pairs, pair_counts = (tokens[:-1] * vocab_size + tokens[1:]).unique(return_counts=True)
    return NgramModel(
        unigram=(counts + 1) / (len(tokens) + vocab_size),
        pairs=pairs,
        pair_counts=pair_counts,
        history_counts=tokens[:-1].bincount(minlength=vocab_size),
        followers=(pairs // vocab_size).bincount(minlength=vocab_size),
    )


def unigram_nll(model: NgramModel, ids: Tensor) -> Tensor:
    """Nats [S - 1] of each token of `ids` [S] but the first, its history ignored."""
    return -model.unigram[ids[1:]].log()


def bigram_nll(model: NgramModel, ids: Tensor) -> Tensor:
    """Nats [S - 1] of each token of `ids` [S] but the first, given the token before it."""
    history, token = ids[:-1], ids[1:]
    code = history * len(model.unigram) + token
    place = torch.searchsorted(model.pairs, code).clamp(max=len(model.pairs) - 1)
    seen = torch.where(model.pairs[place] == code, model.pair_counts[place], 0)
    total, novel = model.history_counts[history], model.followers[history]
    unigram = model.unigram[token]
    bigram = (seen + novel * unigram) / (total + novel).clamp(min=1)
    return -torch.where(total > 0, bigram, unigram).log()
