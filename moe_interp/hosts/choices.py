"""A router's choice, edited on a model's own modules: its top-k, which is no module's input or output.

The router is called again with the logits that it had, its top-k met by a function mode, and what it returns takes the
place of what it returned. In NDIF's sandbox no mode meets it; there nnsight's ``.source`` shows the top-k, where the
code always comes to one.
"""

from collections.abc import Callable
from typing import Any

import torch
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from moe_interp.adapters.spec import RouterTopK
from moe_interp.errors import UnsupportedModel
from moe_interp.hosts.modes import FirstLinear, TopK
from moe_interp.hosts.rows import texts
from moe_interp.hosts.sandbox import last_topk, refuse_copy, sandboxed
from moe_interp.hosts.stock import StockReach
from moe_interp.points import SELECTION


def choice(reach: StockReach, layer: int) -> tuple[str, str]:
    """Where a router is called and where it returns, to be edited by `rechosen`.

    Raises:
        UnsupportedModel: its choice is not made inside it.
    """
    site = reach.spec.layers[layer].sites.get(SELECTION[0])
    if not isinstance(site, RouterTopK):
        raise UnsupportedModel(
            f"the choice of the router at layer {layer} of {reach.spec.model_type} cannot be edited by its modules",
            expected="a router that takes the k largest of the scores of all experts",
            got="one that chooses elsewhere, or in another way",
            do="Edit router_logits, expert_ids or gate_weights.",
        )
    return f"{reach.path(site.module)}.input", f"{reach.path(site.module)}.output"


def topk(reach: StockReach, layer: int) -> str | None:
    """In a sandbox, where the top-k of a router's choice runs: no function mode meets it there.

    Raises:
        UnsupportedModel: its choice is not made inside it, or not always in one place.
    """
    called, _ = choice(reach, layer)
    if not sandboxed():
        return None
    site: Any = reach.spec.layers[layer].sites[SELECTION[0]]
    found = last_topk(reach.lm.get(site.module).source)
    if found is None:
        _refuse_choice(layer)
    return f"{called.removesuffix('input')}source.{found}"


def _refuse_choice(layer: int) -> None:
    refuse_copy(f"the choice of the router at layer {layer}", "Edit router_logits, expert_ids or gate_weights.")


def rechosen_at(reach: StockReach, place: str, layer: int, through: Callable[[str, Tensor], Tensor]) -> None:
    """Pass a router's choice through edits where it is made, as `rechosen` does when it is called again."""
    site: Any = reach.spec.layers[layer].sites[SELECTION[0]]
    args, kwargs = Mediator.value(f"{place}.input")
    scores = args[0]
    if scores.shape[-1] != site.columns:
        _refuse_choice(layer)
    changed = through(SELECTION[0], texts(scores)).reshape(scores.shape)
    Mediator.swap(f"{place}.input", ((changed, *args[1:]), kwargs))
    own = Mediator.value(f"{place}.output")
    ids = through(SELECTION[1], texts(own[1])).reshape(own[1].shape)
    Mediator.swap(f"{place}.output", torch.return_types.topk((scores.gather(-1, ids), ids)))


def rechosen(reach: StockReach, layer: int, raw: Any, logits: Tensor, through: Callable[[str, Tensor], Tensor]) -> Any:
    """What a router returns when it is called again with the logits that it had, its choice passed through edits.

    Args:
        raw: what it was called with.
        logits: [T, E], the result of its linear map.
        through: from the name of a place inside its choice and the value there, [b, S, ...], to the new value.
    """
    site: Any = reach.spec.layers[layer].sites[SELECTION[0]]
    met: list[Tensor] = []

    def chosen(scores: Tensor, top: Callable[[Tensor], Any]) -> Any:
        met.append(scores)
        own = top(through(SELECTION[0], texts(scores)).view_as(scores))
        ids = through(SELECTION[1], texts(own[1])).reshape(own[1].shape)
        return torch.return_types.topk((scores.gather(-1, ids), ids))

    with TopK(site, chosen), FirstLinear(lambda own: logits):
        returned = reach.lm.get(site.module)(*raw[0], **raw[1])
    if not met:
        raise UnsupportedModel(
            f"the choice of the router at layer {layer} was not met",
            expected="a router that runs in the process of the trace",
            got="another",
            do="Edit router_logits, expert_ids or gate_weights.",
        )
    return returned
