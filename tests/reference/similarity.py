"""One expert against the ensemble, one token at a time in float64, with every possible draw of a control.

1. The points of one document come from the slow forward of `tests.reference.model`; what an expert would
   write on a token that did not choose it from the same forward with `expert_ids` edited to that expert.
2. For each token (for the last one, as coded) a candidate is the list of the vectors that its draw may give.
3. Each measure is computed for each of them, so that a control's mean and variance over draws are exact.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import torch

from tests.reference.model import forward

CANDIDATES = ("heaviest", "lightest", "random_unselected", "other_token", "none")


@dataclass(frozen=True)
class Outcomes:
    """For one token what a measure may be, each outcome as likely: [outcomes, ...]."""

    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.values.mean(axis=0)

    @property
    def variance(self) -> np.ndarray:
        return self.values.var(axis=0)


@dataclass(frozen=True)
class Token:
    """What one token holds at one layer: slots from the heaviest, every expert's output if asked for."""

    ids: list[int]
    weights: list[float]
    outputs: list[np.ndarray]
    everyone: list[np.ndarray]
    moe_in: np.ndarray
    resid_mid: np.ndarray
    shared: np.ndarray | None


@cache
def tokens_of(model: Any, ids: tuple[int, ...], layer: int, everyone: bool) -> list[Token]:
    """The tokens of one document at one layer, with what all experts write on them if ``everyone`` (slow)."""
    inputs = torch.tensor([ids])
    with torch.no_grad():
        points = {name: value[0] for (name, at), value in forward(model, inputs).points.items() if at == layer}
        experts = points["router_scores"].shape[-1] if everyone else 0
        written = [
            forward(model, inputs, edits={("expert_ids", layer): lambda value, e=e: torch.full_like(value, e)})
            .points["expert_out", layer][0, :, 0]
            .double()
            .numpy()
            for e in range(experts)
        ]
    found = []
    for t in range(len(ids)):
        weights = points["gate_weights"][t].tolist()
        order = sorted(range(len(weights)), key=lambda slot: -weights[slot])
        found.append(
            Token(
                ids=[int(points["expert_ids"][t, slot]) for slot in order],
                weights=[weights[slot] for slot in order],
                outputs=[points["expert_out"][t, slot].double().numpy() for slot in order],
                everyone=[values[t] for values in written],
                moe_in=points["moe_in"][t].double().numpy(),
                resid_mid=points["resid_mid"][t].double().numpy(),
                shared=points["shared_out"][t].double().numpy() if "shared_out" in points else None,
            )
        )
    return found


def paper(tokens: list[Token]) -> list[dict[str, Outcomes]]:
    """For each token what `cosines` and `sums_by_k` give."""
    heaviest = [token.weights[0] * token.outputs[0] for token in tokens]
    found = []
    for t, token in enumerate(tokens):
        parts = [weight * output for weight, output in zip(token.weights, token.outputs, strict=True)]
        unselected = [e for e in range(len(token.everyone)) if e not in token.ids]
        candidates = {
            "heaviest": [parts[0]],
            "lightest": [parts[-1]],
            "random_unselected": [token.weights[0] * token.everyone[e] for e in unselected],
            "other_token": [heaviest[other] for other in range(len(tokens)) if other != t],
            "none": [np.zeros_like(parts[0])],
        }
        backgrounds = backgrounds_of(token.resid_mid, token.shared)
        found.append(cosines(candidates, sum(parts), backgrounds) | sums_by_k(parts))
    return found


def as_coded(tokens: list[Token]) -> list[dict[str, Outcomes]]:
    """`cosines` of the last token as the released notebook forms them."""
    last = tokens[-1]
    first_rows = []
    for expert in last.ids:
        first = next(token for token in tokens if expert in token.ids)
        first_rows.append((first, first.outputs[first.ids.index(expert)]))
    total = sum(last.weights)
    mean = sum(weight / total * row for weight, (_, row) in zip(last.weights, first_rows, strict=True))
    unselected = [e for e in range(len(last.everyone)) if e not in last.ids]
    candidates = {
        "heaviest": [first_rows[0][1]],
        "lightest": [first_rows[-1][1]],
        "random_unselected": [first_rows[0][0].everyone[e] for e in unselected],
        "other_token": [token.outputs[0] for token in tokens[:-1]],
        "none": [np.zeros_like(mean)],
    }
    return [cosines(candidates, mean, backgrounds_of(last.moe_in, None))]


def backgrounds_of(residual: np.ndarray, shared: np.ndarray | None) -> list[list[np.ndarray]]:
    """By residual (with, without) and shared experts (with, without; only the latter if there are none)."""
    nothing = np.zeros_like(residual)
    beside = [nothing] if shared is None else [shared, nothing]
    return [[base + one for one in beside] for base in (residual, nothing)]


def cosines(
    candidates: dict[str, list[np.ndarray]], ensemble: np.ndarray, backgrounds: list[list[np.ndarray]]
) -> dict[str, Outcomes]:
    """``cosine:<candidate>`` and ``gain:<candidate>``, less none: [outcomes, residual, shared]."""
    found = {}
    for name in CANDIDATES:
        values = [
            [[cosine(base + vector, base + ensemble) for base in row] for row in backgrounds]
            for vector in candidates[name] or [np.full_like(ensemble, np.nan)]
        ]
        found[f"cosine:{name}"] = Outcomes(np.array(values))
    without = found["cosine:none"].values
    gains = {f"gain:{name}": Outcomes(found[f"cosine:{name}"].values - without) for name in CANDIDATES}
    return found | gains


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    length = np.sqrt((left**2).sum()) * np.sqrt((right**2).sum())
    return float((left * right).sum() / length) if length != 0 else np.nan


def sums_by_k(parts: list[np.ndarray]) -> dict[str, Outcomes]:
    """``error:<kept>`` and ``projection:<kept>`` of sums by weight and in every order: [outcomes, k]."""
    whole = sum(parts)
    found = {}
    for kept, orders in {
        "heaviest": [range(len(parts))],
        "random": list(permutations(range(len(parts)))),
    }.items():
        errors, projections = [], []
        for order in orders:
            partial = [sum(parts[slot] for slot in list(order)[: k + 1]) for k in range(len(parts))]
            errors.append([np.linalg.norm(some - whole) / np.linalg.norm(whole) for some in partial])
            projections.append([some @ whole / (whole @ whole) for some in partial])
        found[f"error:{kept}"] = Outcomes(np.array(errors))
        found[f"projection:{kept}"] = Outcomes(np.array(projections))
    return found
