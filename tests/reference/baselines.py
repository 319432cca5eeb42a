"""Counting models, load balance and batches by plain loops over lists, straight from definitions."""

import math
from itertools import pairwise


def unigram(tokens, vocab_size, word):
    """(c(w) + 1) / (T + V)."""
    return (sum(1 for token in tokens if token == word) + 1) / (len(tokens) + vocab_size)


def bigram(tokens, vocab_size, history, word):
    """Witten-Bell: n(h) kinds of token followed h, so as many of the next c(h) + n(h) are taken as new."""
    followed = [after for before, after in pairwise(tokens) if before == history]
    kinds = len(set(followed))
    if not followed:
        return unigram(tokens, vocab_size, word)
    return (followed.count(word) + kinds * unigram(tokens, vocab_size, word)) / (len(followed) + kinds)


def bigram_nll(tokens, vocab_size, text):
    """Nats of every token of the text but the first."""
    return [-math.log(bigram(tokens, vocab_size, h, w)) for h, w in pairwise(text)]


def unigram_nll(tokens, vocab_size, text):
    """Nats of every token of the text but the first."""
    return [-math.log(unigram(tokens, vocab_size, word)) for word in text[1:]]


def expert_load(choices, num_experts):
    """Share of all token-slots that each expert gets; `choices` is one list of experts for each token."""
    slots = [expert for choice in choices for expert in choice]
    return [slots.count(expert) / len(slots) for expert in range(num_experts)]


def balance_loss(choices, scores, num_experts):
    """E sum_e f_e P_e of each layer, averaged over layers.

    `choices[layer]` has one list of experts for each token, `scores[layer]` one score per expert.
    """
    layers = []
    for chosen, scored in zip(choices, scores, strict=True):
        share = expert_load(chosen, num_experts)
        mean = [sum(row[expert] for row in scored) / len(scored) for expert in range(num_experts)]
        layers.append(num_experts * sum(f * p for f, p in zip(share, mean, strict=True)))
    return sum(layers) / len(layers)


def learning_rate(step, *, steps, warmup, decay, peak):
    """Straight up to the peak at step number `warmup - 1`, level, then straight down to 0 at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if step <= steps - decay:
        return peak
    return peak * (steps - step) / decay


def curve(rows, size, averaged):
    """Means over runs of `size` rows, each at its last row's step."""
    points, run = [], []
    for number, row in enumerate(rows):
        run.append(row)
        if len(run) == size or number == len(rows) - 1:
            point = {"step": row["step"]}
            for name in averaged:
                point[name] = sum(one[name] for one in run) / len(run)
            points.append(point)
            run = []
    return points


def model_nll(logits, ids):
    """Nats of every token but the first, from the logits (one list of V for each position) before it."""
    found = []
    for row, token in zip(logits, ids[1:], strict=False):
        largest = max(row)
        found.append(largest + math.log(sum(math.exp(value - largest) for value in row)) - row[token])
    return found
