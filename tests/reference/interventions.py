"""What interventions do, one token at a time: the slow reference, as edits of the points of `tests.reference.model`.

A change of who is chosen is a function of one token's row of scores, logits, ids or weights. A change of what experts
put out is a function of the token's `Table`: its slots (expert, weight, output) and what is added in an expert's name
without a slot; ``routed_out`` is the sum over it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.reference.model import Edit, Key, Reference, forward

Where = tuple[int, int]
"""Text and position of a token."""


@dataclass
class Table:
    """One token's slots, and contributions without a slot by expert."""

    slots: list[list[Any]]
    added: dict[int, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        parts = [weight * output for _, weight, output in self.slots] + [*self.added.values()]
        return torch.stack(parts).sum(0)

    def scale(self, expert: int, by: float) -> None:
        for slot in self.slots:
            if slot[0] == expert:
                slot[2] = slot[2] * by
        if expert in self.added:
            self.added[expert] = self.added[expert] * by

    def change(self, expert: int, fn: Callable[[Tensor], Tensor]) -> None:
        for slot in self.slots:
            if slot[0] == expert:
                slot[2] = fn(slot[2])

    def contribute(self, expert: int, value: Tensor) -> None:
        """Its contribution is this value, whoever was chosen."""
        self.change(expert, torch.zeros_like)
        self.added[expert] = value

    def uses(self, expert: int) -> bool:
        return any(slot[0] == expert for slot in self.slots)


Op = tuple[str, Callable[..., Any]]
"""A point ("selection", "router_logits", "expert_ids", "gate_weights"), and a function from a token's row and its place
to a new row; or "table", and a function that changes a token's `Table`, given it and its place."""


def run(
    hf: Any, ids: Tensor, layer: int, ops: Sequence[Op], where: Callable[[Where], bool] = lambda at: True
) -> Reference:
    """The reference under interventions at one layer and some tokens, in order."""
    seen: dict[str, Tensor] = {}
    edits: dict[Key, Edit] = {}

    def at(point: str, fns: list[Callable[..., Any]]) -> Edit:
        def edit(value: Tensor) -> Tensor:
            for fn in fns:
                value = torch.stack(
                    [
                        torch.stack([fn(row, (b, s)) if where((b, s)) else row for s, row in enumerate(text)])
                        for b, text in enumerate(value)
                    ]
                )
            seen[point] = value
            return value

        return edit

    for point in ("selection", "router_logits", "expert_ids", "gate_weights"):
        fns = [fn for name, fn in ops if name == point]
        if fns or point in ("expert_ids", "gate_weights"):
            edits[point, layer] = at(point, fns)

    def outputs(value: Tensor) -> Tensor:
        seen["expert_out"] = value
        return value

    def total(value: Tensor) -> Tensor:
        result = value.clone()
        for b, s in [(b, s) for b in range(value.shape[0]) for s in range(value.shape[1]) if where((b, s))]:
            rows = zip(*(seen[name][b, s] for name in ("expert_ids", "gate_weights", "expert_out")), strict=True)
            table = Table([[int(expert), weight, output] for expert, weight, output in rows])
            for name, fn in ops:
                if name == "table":
                    fn(table, (b, s))
            result[b, s] = table.total()
        return result

    if any(name == "table" for name, _ in ops):
        edits["expert_out", layer], edits["routed_out", layer] = outputs, total
    return forward(hf, ids, edits=edits)
