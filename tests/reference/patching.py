"""Patching, path patching, tracing and coalitions by the slow reference: an edited forward for each number.

Everything is of `tests.reference.model.forward`; what is put in is read off its points and added up slot by slot.
"""

import math
from collections.abc import Callable, Sequence
from itertools import permutations

import torch
from torch import Tensor

from tests.reference import model as plain
from tests.reference.model import Edit, Key, Reference

Score = Callable[[Tensor], Tensor]
"""Logits [B, S, V] to a number for each text [B]."""


@torch.no_grad()
def forward(hf, ids: Tensor, edits: dict[Key, Edit] | None = None) -> Reference:
    """The reference forward, without gradients."""
    return plain.forward(hf, ids, edits=edits)


def logit_difference(answer: int, wrong: int) -> Score:
    """At the last token; for texts without padding."""
    return lambda logits: logits[:, -1, answer] - logits[:, -1, wrong]


def contribution(run: Reference, layer: int, expert: int) -> Tensor:
    """[B, S, D], weight times output of one expert, 0 where no slot holds it."""
    ids, weights, outputs = (run.points[name, layer] for name in ("expert_ids", "gate_weights", "expert_out"))
    found = torch.zeros_like(outputs[:, :, 0])
    for batch, pos, slot in (ids == expert).nonzero().tolist():
        found[batch, pos] += weights[batch, pos, slot] * outputs[batch, pos, slot]
    return found


def ranked(run: Reference, layer: int, rank: int) -> Tensor:
    """[B, S, D], weight times output of the slot that is the rank-th heaviest, 0 for the heaviest."""
    weights, outputs = (run.points[name, layer] for name in ("gate_weights", "expert_out"))
    found = torch.zeros_like(outputs[:, :, 0])
    for batch in range(len(weights)):
        for pos in range(weights.shape[1]):
            listed = weights[batch, pos].tolist()
            slot = sorted(range(len(listed)), key=lambda slot: -listed[slot])[rank]
            found[batch, pos] = listed[slot] * outputs[batch, pos, slot]
    return found


def add(change: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit that adds."""
    return lambda value: value + change


def put(new: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit that puts this in place."""
    return lambda _value: new


def patched_expert(hf, ids: Tensor, base: Reference, other: Reference, layer: int, expert: int) -> Tensor:
    """Logits of the base's texts with one expert's contribution of the other run."""
    change = contribution(other, layer, expert) - contribution(base, layer, expert)
    return forward(hf, ids, edits={("routed_out", layer): add(change)}).logits


def patched_position(hf, ids: Tensor, other: Reference, layer: int, point: str, position: int) -> Tensor:
    """Logits of the base's texts with a point's value at one token of the other run."""

    def there(value: Tensor) -> Tensor:
        value[:, position] = other.points[point, layer][:, position]
        return value

    return forward(hf, ids, edits={(point, layer): there}).logits


def path(
    hf, ids: Tensor, base: Reference, other: Reference, sender: tuple[int, int], layer: int, expert: int | None
) -> Tensor:
    """Logits of the base's texts when a later expert (None: the router) hears the other run's sender directly."""
    delta = contribution(other, *sender) - contribution(base, *sender)
    frozen = {("resid_mid", layer): put(base.points["resid_mid", layer] + delta)}
    if expert is None:
        return forward(
            hf,
            ids,
            edits={("router_logits", layer): put(forward(hf, ids, edits=frozen).points["router_logits", layer])},
        ).logits
    chosen = base.points["expert_ids", layer]
    heard = forward(hf, ids, edits=frozen | {("expert_ids", layer): put(chosen)}).points["expert_out", layer]
    mine = (chosen == expert)[..., None]
    return forward(hf, ids, edits={("expert_out", layer): lambda value: torch.where(mine, heard, value)}).logits


def without(hf, ids: Tensor, experts: Sequence[tuple[int, int]]) -> Tensor:
    """Logits with these experts' outputs zero, wherever they are chosen then."""
    layers = {layer for layer, _ in experts}
    clean = forward(hf, ids)
    edits = {}
    for layer in sorted(layers):
        # Who is chosen at a layer depends on the edits before it, which are there already.
        chosen = forward(hf, ids, edits=dict(edits)).points["expert_ids", layer]
        gone = torch.zeros_like(chosen, dtype=torch.bool)
        for one, expert in experts:
            gone |= (chosen == expert) & (one == layer)
        edits["expert_out", layer] = lambda value, gone=gone: value.masked_fill(gone[..., None], 0.0)
    return forward(hf, ids, edits=edits).logits if edits else clean.logits


def interaction(values: dict[frozenset, Tensor], some: frozenset) -> Tensor:
    """Inclusion and exclusion over all subsets."""
    total = torch.zeros_like(values[frozenset()])
    for inner, value in values.items():
        if inner <= some:
            total = total + (-1) ** (len(some) - len(inner)) * value
    return total


def shapley(values: dict[frozenset, Tensor], member: int, count: int) -> Tensor:
    """The mean over all orders of what a member adds to those before it."""
    total = torch.zeros_like(values[frozenset()])
    for order in permutations(range(count)):
        before = frozenset(order[: order.index(member)])
        total = total + values[before | {member}] - values[before]
    return total / math.factorial(count)
