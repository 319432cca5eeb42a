"""What a tuned lens says and costs: the slow reference, one part and position at a time.

It starts from the points of `tests.reference.model` and decodes as `tests.reference.lens` does, in float64.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from tests.reference import lens
from tests.reference.model import Reference

Affine = tuple[Tensor, Tensor]  # A [D, D] and b [D]


def translate(affine: Affine, vector: Tensor, constant: bool = True) -> Tensor:
    """h + A h + b, or h + A h."""
    weight, bias = (one.double() for one in affine)
    hidden = vector.detach().double()
    return hidden + weight.mv(hidden) + (bias if constant else 0.0)


def kl(model: PreTrainedModel, run: Reference, layer: int, position: int, affine: Affine) -> float:
    """KL(final || lens) in nats of the stream into a layer."""
    final = lens._log_softmax(run.logits[0, position])
    hidden = translate(affine, run.points["resid_pre", layer][0, position])
    return lens._kl(final, lens._log_softmax(lens._decode(model, hidden)))


def agrees(model: PreTrainedModel, run: Reference, layer: int, position: int, affine: Affine) -> bool:
    """Whether the lens's most probable token is the model's own."""
    logits = lens._decode(model, translate(affine, run.points["resid_pre", layer][0, position])).tolist()
    own = run.logits[0, position].tolist()
    return logits.index(max(logits)) == own.index(max(own))


def expert_lens(
    model: PreTrainedModel, ids: Tensor, run: Reference, affines: Sequence[Affine]
) -> dict[tuple[int, str, int], float]:
    """KL by (MoE layer, part, position); ``affines[l]`` is of the stream into layer l, the last of that out of all."""
    found = {}
    for layer in sorted(layer for name, layer in run.points if name == "expert_out"):
        for position in range(ids.shape[1]):
            final = lens._log_softmax(run.logits[0, position])
            for name, vector in lens._parts(run, layer, position).items():
                affine = affines[layer if name == "resid_pre" else layer + 1]
                moved = translate(affine, vector, constant=name.startswith("resid"))
                found[layer, name, position] = lens._kl(final, lens._log_softmax(lens._decode(model, moved)))
    return found
