"""What several interventions say of the same tokens: refused where one undoes another."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moe_interp.adapters.spec import ModelSpec
from moe_interp.errors import BadInput
from moe_interp.interventions.base import Intervention


def check_together(interventions: Sequence[Intervention], spec: ModelSpec) -> None:
    """Refuse interventions of which one undoes what another says.

    Raises:
        BadInput: two that decide all experts of the same tokens, or the number of experts of one router; one that
            forces an expert that another forbids, swaps or overrules; several that force or forbid too many.
    """
    for number, one in enumerate(interventions):
        _check_pairs(one, interventions[:number], spec)
    _check_forced(interventions, spec)
    _check_left(interventions, spec)


def _check_pairs(one: Intervention, others: Sequence[Intervention], spec: ModelSpec) -> None:
    for other in others:
        for layer, k in one.widths(spec).items():
            if other.widths(spec).get(layer, k) != k:
                raise _conflict(layer, other, one, "one number of experts for a router")
        for layer in {*one.decides(spec)} & {*other.decides(spec)}:
            if _may_meet(one, other):
                raise _conflict(layer, other, one, "one intervention that decides a token's experts")
        for first, second in ((one, other), (other, one)):
            for layer, expected in _overruled(first, second, spec):
                if _may_meet(one, other):
                    raise _conflict(layer, other, one, expected)


def _overruled(one: Intervention, other: Intervention, spec: ModelSpec) -> Iterator[tuple[int, str]]:
    """Layers at which another intervention undoes what one says of experts, and what would be right."""
    decided, runs = other.decides(spec), other.demands(spec)
    for layer, experts in one.demands(spec).items():
        if experts & other.forbids(spec).get(layer, frozenset()):
            yield layer, "an expert forced or forbidden, not both"
        if len(experts & other.swaps(spec).get(layer, frozenset())) == 1:
            yield layer, "an expert forced or swapped for another, not both"
        if layer in decided and any(not experts <= row for row in _rows(one, other, runs.get(layer, frozenset()))):
            yield layer, "no experts forced where another decides all of them"
    for layer, experts in one.forbids(spec).items():
        if layer in decided and any(
            experts & row or not row for row in _rows(one, other, runs.get(layer, frozenset()))
        ):
            yield layer, "an expert forced or forbidden, not both"


def _rows(one: Any, other: Any, runs: frozenset[int]) -> list[frozenset[int]]:
    """What the other makes run: at all tokens the same, or at each token at which both may act; none: any expert."""
    ids = other.puts()
    if ids is None:
        return [runs]
    numbers = torch.arange(ids.values.tensor.shape[1])
    both = numbers < torch.tensor(ids.lengths)[:, None]
    for where in (one, other):
        if where.positions is not None and min(where.positions) >= 0:
            both &= torch.isin(numbers, torch.tensor(where.positions))
        if where.tokens is not None and where.tokens.values.tensor.shape == both.shape:
            both &= where.tokens.values.tensor.cpu()
    return [frozenset(row) for row in ids.values.tensor.cpu()[both].tolist()]


def _check_forced(interventions: Sequence[Any], spec: ModelSpec) -> None:
    """Refuse to force more experts of one token than its router chooses."""
    widths = {layer: k for one in interventions for layer, k in one.widths(spec).items()}
    demands = [(one, one.demands(spec)) for one in interventions]
    for layer in {layer for _, experts in demands for layer in experts}:
        here = [(one, experts[layer]) for one, experts in demands if layer in experts and one.tokens is None]
        fixed = [one.positions for one, _ in here if one.positions is not None and min(one.positions) >= 0]
        for position in {None, *(position for positions in fixed for position in positions)}:
            met = [experts for one, experts in here if one.positions is None or position in one.positions]
            forced, k = frozenset().union(*met), widths.get(layer, spec.moe(layer).top_k)
            if len(met) > 1 and len(forced) > k:
                raise BadInput(
                    f"too many experts forced at layer {layer}",
                    expected=f"up to {k}, the slots of a token",
                    got=f"{len(forced)}: {sorted(forced)}",
                )


def _check_left(interventions: Sequence[Intervention], spec: ModelSpec) -> None:
    """Refuse to forbid so many experts, everywhere, that a router has too few to choose from."""
    forbidden: dict[int, frozenset[int]] = {}
    widths = {layer: k for one in interventions for layer, k in one.widths(spec).items()}
    for one in interventions:
        if getattr(one, "positions", None) is None and getattr(one, "tokens", None) is None:
            for layer, experts in one.forbids(spec).items():
                forbidden[layer] = forbidden.get(layer, frozenset()) | experts
    for layer, experts in forbidden.items():
        moe = spec.moe(layer)
        k = widths.get(layer, moe.top_k)
        if moe.num_experts - len(experts) < k:
            raise BadInput(
                f"too few experts left at layer {layer}",
                expected=f"at least {k}, which are chosen",
                got=str(moe.num_experts - len(experts)),
            )


def _may_meet(one: Any, other: Any) -> bool:
    """Whether both may act at one token: at the same positions, or where one of them acts at all."""
    if one.positions is not None and other.positions is not None:
        same_side = all(position >= 0 for position in (*one.positions, *other.positions))
        if same_side and not set(one.positions) & set(other.positions):
            return False
    if one.tokens is not None and other.tokens is not None:
        first, second = (marks.values.tensor for marks in (one.tokens, other.tokens))
        if first.shape == second.shape and not bool((first & second).any()):
            return False
    return True


def _conflict(layer: int, first: Intervention, second: Intervention, expected: str) -> BadInput:
    return BadInput(
        f"two interventions contradict each other at layer {layer}", expected=expected, got=f"{first} and {second}"
    )
