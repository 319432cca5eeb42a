"""The experts call of transformers 5, opened: neurons and outputs of every (token, slot), at the cost of the original.

transformers keeps a layer's experts as three-dimensional parameters and calls
``experts(hidden [T, D], ids [T, K], weights [T, K])``. `expert_outputs` does what its ``grouped_mm`` implementation
does (sort the token-slots by expert, two grouped matrix products, undo the sort) but weights after the sort is undone,
so that the unweighted outputs exist on the way. Multiplication and sum see the same operands in the same order, and
the result is bit-equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from moe_interp.errors import BadInput, UnsupportedModel

_LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_apply_gate")


def check_layout(experts: nn.Module, path: str) -> None:
    """Refuse an experts module that `expert_outputs` would not compute correctly.

    Raises:
        UnsupportedModel: not decorated by transformers' ``use_experts_implementation``, or split over devices.
    """
    missing = [name for name in _LAYOUT if not hasattr(experts, name)]
    if missing:
        raise UnsupportedModel(
            f"cannot open the experts at {path}",
            expected="fused experts as transformers 5 builds them",
            got=f"{type(experts).__name__} without {', '.join(missing)}",
        )
    if next(experts.parameters()).dtype is torch.float64:
        raise UnsupportedModel(
            f"cannot open the experts at {path}",
            expected="float32, bfloat16 or float16, which grouped_mm takes",
            got="float64",
            do="Load with another dtype.",
        )
    if getattr(experts, "_is_expert_parallel", False):
        raise UnsupportedModel(
            f"cannot open the experts at {path}",
            expected="all experts of a layer on this process",
            got="expert-parallel experts",
            do="Load without expert parallelism.",
        )


def expert_outputs(
    experts: Any,
    hidden: Float[Tensor, "T D"],
    ids: Int[Tensor, "T K"],
    on_act: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "TK D"]:
    """Unweighted outputs of the chosen experts, token by token and slot by slot.

    ``on_act`` is shown the neurons [T*K, F] (the input of the down-projection) in the same order and returns those to
    go on with.
    """
    slots = ids.shape[-1]
    ids_sorted, order = torch.sort(ids.reshape(-1))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    ends = _group_ends(ids_sorted, experts.num_experts)

    act = _activate(experts, _linear(experts, experts_in(experts), hidden[order // slots], ids_sorted, ends))
    if on_act is not None:
        act = on_act(act[inverse])[order]
    out = _linear(experts, "down_proj", act, ids_sorted, ends)
    if experts.has_post_expert_norm:
        out = experts.post_expert_norm(out)
    return out[inverse]


def weighted_sum(
    outputs: Float[Tensor, "TK D"], weights: Float[Tensor, "T K"], dtype: torch.dtype
) -> Float[Tensor, "T D"]:
    """The sum over slots of weight times output, in the order and precision of ``grouped_mm``."""
    weighted = outputs * weights.reshape(-1, 1)
    return weighted.view(*weights.shape, -1).sum(dim=1).to(dtype)


def experts_in(experts: Any) -> str:
    """Name of the experts' first projection."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _group_ends(ids_sorted: Int[Tensor, " N"], num_experts: int) -> Int[Tensor, " E"]:
    # Counting as grouped_mm counts: bincount would break CUDA graphs, and histc takes no integers on CPU.
    on_host = ids_sorted.device.type in ("cpu", "mps")
    histogram = torch.histc(ids_sorted.float() if on_host else ids_sorted.int(), num_experts, 0, num_experts - 1)
    return histogram.cumsum(dim=0, dtype=torch.int32)


def _linear(experts: Any, name: str, rows: Tensor, ids_sorted: Tensor, ends: Tensor) -> Tensor:
    bias = getattr(experts, f"{name}_bias")[ids_sorted] if experts.has_bias else None
    return _grouped_linear(rows, getattr(experts, name), ends, bias=bias, is_transposed=experts.is_transposed)


def _activate(experts: Any, projected: Tensor) -> Tensor:
    return experts._apply_gate(projected) if experts.has_gate else experts.act_fn(projected)


@dataclass(frozen=True)
class Experts:
    """The experts of one layer as a function: any experts, on any input."""

    module: nn.Module
    num_experts: int

    def __call__(self, hidden: Float[Tensor, "*rows D"], ids: Int[Tensor, "*rows K"]) -> Float[Tensor, "*rows K D"]:
        """Unweighted outputs of the experts ``ids`` on ``hidden``, in the given slot order.

        Raises:
            BadInput: the leading dimensions differ, or an id is no expert.
        """
        if hidden.shape[:-1] != ids.shape[:-1]:
            raise BadInput(
                "experts need as many rows of ids as of input",
                expected=f"ids of shape {(*hidden.shape[:-1], 'K')}",
                got=str(tuple(ids.shape)),
            )
        check_ids(ids, self.num_experts)
        outputs = expert_outputs(self.module, hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1, ids.shape[-1]))
        return outputs.view(*ids.shape, hidden.shape[-1])


def check_ids(ids: Tensor, num_experts: int) -> None:
    """Refuse expert ids that are not integers from 0 to E - 1.

    Raises:
        BadInput: another dtype or an id out of range.
    """
    whole = not ids.dtype.is_floating_point and ids.dtype is not torch.bool
    if whole and (ids.numel() == 0 or (0 <= int(ids.min()) and int(ids.max()) < num_experts)):
        return
    raise BadInput(
        "not expert ids",
        expected=f"integers from 0 to {num_experts - 1}",
        got=f"{ids.dtype} from {ids.min().item()} to {ids.max().item()}" if ids.numel() else str(ids.dtype),
    )


@dataclass(frozen=True)
class ExpertWeights:
    """One expert's matrices in one layout, whatever the checkpoint's: ``down @ act(gate @ x, up @ x)``.

    Attributes:
        gate: [F, D], or None where experts have no gate.
        up: [F, D].
        down: [D, F].
        gate_bias, up_bias: [F]; down_bias: [D]; None where experts have no biases.
    """

    gate: Float[Tensor, "F D"] | None
    up: Float[Tensor, "F D"]
    down: Float[Tensor, "D F"]
    gate_bias: Float[Tensor, " F"] | None = None
    up_bias: Float[Tensor, " F"] | None = None
    down_bias: Float[Tensor, " D"] | None = None


def expert_weights(experts: Any, expert: int) -> ExpertWeights:
    """The matrices of one expert, detached and in one layout."""
    first = getattr(experts, experts_in(experts))[expert].detach()
    down = experts.down_proj[expert].detach()
    if experts.is_transposed:
        first, down = first.T, down.T
    gate, up = _split(experts, first)
    if not experts.has_bias:
        return ExpertWeights(gate, up, down)
    gate_bias, up_bias = _split(experts, getattr(experts, f"{experts_in(experts)}_bias")[expert].detach())
    return ExpertWeights(gate, up, down, gate_bias, up_bias, experts.down_proj_bias[expert].detach())


def _split(experts: Any, rows: Tensor) -> tuple[Any, Tensor]:
    if not experts.has_gate:
        return None, rows
    if experts.is_concatenated:
        half = rows.shape[0] // 2
        return rows[:half], rows[half:]
    return rows[::2], rows[1::2]
