"""What the expert lens and logit attribution report: the slow reference, one part and position at a time.

It starts from the points of `tests.reference.model` and shares no code with the package: parts are added up
vector by vector, the final norm and the unembedding are written out from the model's parameters, tokens are
sorted and counted in float64.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tests.reference.model import Reference


@dataclass(frozen=True)
class Row:
    """One decoded vector: its log-probabilities [V] in float64, and KL(final || row)."""

    log_p: Tensor
    kl: float

    def top(self, count: int) -> list[float]:
        """Probabilities of the most probable tokens, most probable first."""
        return sorted(self.log_p.exp().tolist(), reverse=True)[:count]


def expert_lens(model: PreTrainedModel, ids: Tensor, reference: Reference) -> dict[tuple[int, str, int], Row]:
    """Rows by (MoE layer, part, position) for one text, ids [1, S]."""
    return _rows(model, ids, reference, _parts, _decode)


def expert_lens_as_coded(model: PreTrainedModel, ids: Tensor, reference: Reference) -> dict[tuple[int, str, int], Row]:
    """The same without the final norm's weight, with unweighted experts beside the block's normed input."""
    return _rows(model, ids, reference, _parts_as_coded, _decode_as_coded)


def _rows(model: PreTrainedModel, ids: Tensor, reference: Reference, parts_of: Any, decode: Any) -> dict:
    found = {}
    for layer in sorted(layer for name, layer in reference.points if name == "expert_out"):
        for position in range(ids.shape[1]):
            final = _log_softmax(reference.logits[0, position])
            for name, vector in parts_of(reference, layer, position).items():
                log_p = _log_softmax(decode(model, vector))
                found[layer, name, position] = Row(log_p, _kl(final, log_p))
    return found


def _parts(reference: Reference, layer: int, position: int) -> dict[str, Tensor]:
    at = {name: value[0, position] for (name, where), value in reference.points.items() if where == layer}
    order = _heaviest_first(at["gate_weights"])
    outputs = [at["expert_out"][slot] for slot in order]
    contributions = [at["gate_weights"][slot] * at["expert_out"][slot] for slot in order]

    parts = {"resid_mid": at["resid_mid"]}
    sums = at["resid_mid"]
    for j, (output, contribution) in enumerate(zip(outputs, contributions, strict=True), start=1):
        parts[f"resid_mid+c{j}"] = at["resid_mid"] + contribution
        parts[f"c{j}"] = contribution
        parts[f"f{j}"] = output
        sums = sums + contribution
        if j > 1:
            parts[f"resid_mid+c1..{j}"] = sums
    if "shared_out" in at:
        for name in list(parts):
            parts[name + "+shared"] = parts[name] + at["shared_out"]
        parts["shared"] = at["shared_out"]
    return parts | {"resid_pre": at["resid_pre"], "resid_post": at["resid_post"]}


def _parts_as_coded(reference: Reference, layer: int, position: int) -> dict[str, Tensor]:
    at = {name: value[0, position] for (name, where), value in reference.points.items() if where == layer}
    parts = {"resid_pre": at["resid_pre"], "moe_in": at["moe_in"], "resid_post": at["resid_post"]}
    sums = at["moe_in"]
    for j, slot in enumerate(_heaviest_first(at["gate_weights"]), start=1):
        parts[f"moe_in+f{j}"] = at["moe_in"] + at["expert_out"][slot]
        parts[f"f{j}"] = at["expert_out"][slot]
        sums = sums + at["gate_weights"][slot] * at["expert_out"][slot]
        parts["moe_in+c1" if j == 1 else f"moe_in+c1..{j}"] = sums
    return parts


def _heaviest_first(weights: Tensor) -> list[int]:
    return sorted(range(len(weights)), key=lambda slot: -weights[slot].item())


def _decode(model: Any, vector: Tensor) -> Tensor:
    norm = model.model.norm
    mean_square = vector.double().pow(2).mean()
    return model.lm_head.weight.double() @ (
        norm.weight.double() * vector.double() / (mean_square + norm.variance_epsilon).sqrt()
    )


def _decode_as_coded(model: Any, vector: Tensor) -> Tensor:
    mean_square = vector.double().pow(2).mean()
    return model.lm_head.weight.double() @ (vector.double() / (mean_square + 1e-6).sqrt())


def _log_softmax(logits: Tensor) -> Tensor:
    logits = logits.detach().double()
    return logits - logits.max() - math.log(sum(math.exp(x - logits.max().item()) for x in logits.tolist()))


def _kl(final: Tensor, log_p: Tensor) -> float:
    return sum(math.exp(q) * (q - p) for q, p in zip(final.tolist(), log_p.tolist(), strict=True))


def attribution(model: Any, reference: Reference, position: int, token: int) -> dict[str, float]:
    """The share of every part of the residual in one logit, by the part's name."""
    points = {key: value[0, position].double() for key, value in reference.points.items()}
    layers = sorted({layer for _, layer in points if layer is not None})
    residual = points["resid_post", layers[-1]]
    norm = model.model.norm
    scale = 1 / (residual.pow(2).mean() + norm.variance_epsilon).sqrt()

    def share(vector: Tensor) -> float:
        return (model.lm_head.weight[token].double() * norm.weight.double() * vector * scale).sum().item()

    shares = {"embed": share(points["embed", None])}
    for layer in layers:
        for name in ("attn_out", "mlp_out", "shared_out"):
            if (name, layer) in points:
                shares[f"{layer}.{name}"] = share(points[name, layer])
        if ("expert_out", layer) in points:
            weights, outputs = points["gate_weights", layer], points["expert_out", layer]
            for j, slot in enumerate(_heaviest_first(weights), start=1):
                shares[f"{layer}.c{j}"] = share(weights[slot] * outputs[slot])
    return shares
