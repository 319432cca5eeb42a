"""transformers' call of experts, ``experts(hidden, ids, weights)``, with everything passed through hook points.

Where nobody looks at single experts, the module's own implementation runs, between the points of what it is given and
of what it returns.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_interp.adapters.experts import run_experts
from moe_interp.adapters.formats import is_fp8, plain_function
from moe_interp.hosts.calls import under_way
from moe_interp.hosts.taps import Taps

IMPLEMENTATION = "moe_interp"


def asks_registry(experts: nn.Module) -> bool:
    """Whether a module looks its forward up in transformers' registry, by its config."""
    return hasattr(experts, "_is_expert_parallel") and hasattr(experts, "config")


def lead_through(experts: Any, taps: Taps) -> None:
    """Let a module that asks the registry find the function of this package there."""
    if is_fp8(experts):
        _fp8_functions().register(IMPLEMENTATION, _fp8_experts_forward)
    taps.plain = plain_function(experts)
    experts.config = _choosing(experts.config, IMPLEMENTATION)
    experts._moe_taps = taps


def _choosing(config: Any, implementation: str) -> Any:
    """A copy of a config that chooses this experts function."""
    chosen = copy.copy(config)
    chosen._experts_implementation_internal = implementation
    return chosen


def _experts_forward(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts call, with everything passed through hook points."""
    taps: Taps = experts._moe_taps
    return experts_forward(taps, experts, functools.partial(_own_experts, taps, experts), hidden, ids, weights)


def _own_experts(taps: Taps, experts: Any, *args: Tensor) -> Tensor:
    """What the module's own class computes: by the implementation that the model was given, or the plain one."""
    call = under_way(taps.host)
    plain = call is not None and call.plain
    name: Any = plain_function(experts) if plain else taps.host.configs[experts]._experts_implementation
    registry = _fp8_functions() if is_fp8(experts) else ALL_EXPERTS_FUNCTIONS
    eager = type(experts).forward
    while "experts_interface" in eager.__code__.co_freevars:  # transformers' decorator, which may be there repeatedly
        eager = eager.__wrapped__
    return registry.get_interface(name, eager)(experts, *args)


def experts_forward(
    taps: Taps, experts: Any, own: Callable[..., Tensor], hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """What the experts of a layer give: by our own computation, if single slots are wanted, else by ``own``."""
    flow, moe = taps.now(), taps.layer.moe
    if flow is None or moe is None:
        return own(hidden, ids, weights)
    if not flow.opens_experts and taps.runs_own:
        total = own(hidden, flow("expert_ids", ids), flow("gate_weights", weights))
        return flow("routed_out", total)
    rows = hidden.reshape(-1, hidden.shape[-1])
    out = run_experts(flow, moe.kernel, experts, rows, ids, weights, in_turn=taps.plain == "eager")
    return out.view(*hidden.shape[:-1], -1)


def _fp8_experts_forward(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same with weights as transformers' FP8 implementations take them."""
    return _experts_forward(experts, hidden, ids, weights.to(hidden.dtype))


def _fp8_functions() -> Any:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    return ALL_FP8_EXPERTS_FUNCTIONS


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
