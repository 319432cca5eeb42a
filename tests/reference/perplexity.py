"""Perplexity with k experts from the slow forward of `tests.reference.model`, one token at a time."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference.model import forward

Keep = Callable[[list[float], int, list[float]], list[float]]
"""A token's weights by slot, its position, what the router chose the slots by -> the weights to go on with."""


def heaviest(k: int, renormalise: bool = False, own: int | None = None) -> Keep:
    """Keep the k heaviest; ``own`` is the model's K: the total of those that it would choose is restored."""

    def keep(weights: list[float], position: int, scores: list[float]) -> list[float]:
        order = sorted(range(len(weights)), key=lambda slot: -weights[slot])
        kept = [weight if slot in order[:k] else 0.0 for slot, weight in enumerate(weights)]
        if not renormalise:
            return kept
        first = sorted(range(len(weights)), key=lambda slot: -scores[slot])
        total = sum(weights[slot] for slot in first[:own])
        return [weight * total / sum(kept) for weight in kept]

    return keep


def chosen(slots: Sequence[int], renormalise: bool = False) -> Keep:
    """Keep one slot of each token, counted from the heaviest: ``slots`` for the first positions, then 0."""

    def keep(weights: list[float], position: int, scores: list[float]) -> list[float]:
        order = sorted(range(len(weights)), key=lambda slot: -weights[slot])
        one = order[slots[position] if position < len(slots) else 0]
        kept = [0.0] * len(weights)
        kept[one] = sum(weights) if renormalise else weights[one]
        return kept

    return keep


def nothing(weights: list[float], position: int, scores: list[float]) -> list[float]:
    """Keep no routed expert."""
    return [0.0] * len(weights)


def document_nll(model: Any, ids: Sequence[int], keep: Mapping[int, Keep]) -> list[float]:
    """Nats of every token but the first, with the slots of some layers kept as ``keep`` says."""

    seen: dict[str, list[list[Any]]] = {}  # of the layer that runs

    def remember(name: str) -> Callable[[Tensor], Tensor]:
        def look(value: Tensor) -> Tensor:
            seen[name] = value[0].tolist()
            return value

        return look

    def edit(of_layer: Keep) -> Callable[[Tensor], Tensor]:
        def kept(weights: Tensor) -> Tensor:
            rows = []
            for position, row in enumerate(weights[0].tolist()):
                scores = [seen["selection"][position][expert] for expert in seen["expert_ids"][position]]
                rows.append(of_layer(row, position, scores))
            return torch.tensor([rows], dtype=weights.dtype)

        return kept

    edits = {("gate_weights", layer): edit(of_layer) for layer, of_layer in keep.items()}
    edits |= {(name, layer): remember(name) for layer in keep for name in ("selection", "expert_ids")}
    with torch.no_grad():
        logits = forward(model, torch.tensor([list(ids)]), edits=edits).logits[0].double()
    found = []
    for position in range(1, len(ids)):
        row = logits[position - 1].tolist()
        largest = max(row)
        normaliser = largest + math.log(sum(math.exp(value - largest) for value in row))
        found.append(normaliser - row[ids[position]])
    return found


def token_perplexity(documents: Sequence[Sequence[float]]) -> float:
    """exp of the mean over all tokens of all documents."""
    tokens = [nats for document in documents for nats in document]
    return math.exp(sum(tokens) / len(tokens))


def document_perplexity(documents: Sequence[Sequence[float]]) -> float:
    """exp of the mean over documents of their mean; documents without a scored token are left out."""
    means = [sum(document) / len(document) for document in documents if document]
    return math.exp(sum(means) / len(means))
