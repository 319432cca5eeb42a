"""transformers' call of experts, ``experts(hidden, ids, weights)``, with everything passed through hook points.

In a call of the transformers model where nobody reads or edits single experts, the module's own implementation runs,
between the points of what it is given and of what it returns.
"""

import copy
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


class Own:
    """What the class of an experts module computes, by the implementation that the model was given.

    Attributes:
        plain: the implementation of transformers that can run these experts: "grouped_mm" or "eager"; None: neither.
    """

    def __init__(self, taps: Taps, experts: Any):
        self.taps, self.experts, self.config = taps, experts, experts.config
        self.plain = plain_function(experts)
        self.registry = _fp8_functions() if is_fp8(experts) else ALL_EXPERTS_FUNCTIONS
        self.eager = type(experts).forward
        while "experts_interface" in self.eager.__code__.co_freevars:  # transformers' decorator, perhaps repeatedly
            self.eager = self.eager.__wrapped__

    @property
    def chosen(self) -> str | None:
        """The implementation that the model has now; generation on accelerators changes it for single tokens."""
        chosen: str | None = vars(self.config).get("_experts_implementation_internal")
        return chosen

    @property
    def runs(self) -> bool:
        """Whether it can run here."""
        return self.plain == "grouped_mm" or (self.plain is not None and self.chosen != "grouped_mm")

    @property
    def same(self) -> bool:
        """Whether it gives what our own computation gives, bit for bit."""
        return self.plain is not None and (self.chosen or "eager") == self.plain

    def __call__(self, *args: Tensor) -> Tensor:
        """The module's own result; by the plain implementation where the model is plain."""
        call = under_way(self.taps.host)
        name: Any = plain_function(self.experts) if call is not None and call.plain else self.chosen
        result: Tensor = self.registry.get_interface(name, self.eager)(self.experts, *args)
        return result


def lead_through(experts: Any, taps: Taps) -> None:
    """Let a module that asks the registry find the function of this package there."""
    if is_fp8(experts):
        _fp8_functions().register(IMPLEMENTATION, _fp8_experts_forward)
    experts._moe_own = Own(taps, experts)
    experts.config = _choosing(experts.config, IMPLEMENTATION)


def _choosing(config: Any, implementation: str) -> Any:
    """A copy of a config that chooses this experts function."""
    chosen = copy.copy(config)
    chosen._experts_implementation_internal = implementation
    return chosen


def _experts_forward(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts call, with everything passed through hook points."""
    own: Own | None = vars(experts).get("_moe_own")
    if own is None:  # closed in another thread since the registry was asked
        result: Tensor = type(experts).forward(experts, hidden, ids, weights)
        return result
    return experts_forward(own.taps, experts, own, hidden, ids, weights)


def experts_forward(
    taps: Taps, experts: Any, own: Callable[..., Tensor], hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """Compute what the experts of a layer give: by ``own``, the model's implementation, or by ours, slot by slot."""
    flow, moe = taps.now(), taps.layer.moe
    if flow is None or moe is None:
        return own(hidden, ids, weights)
    if not (flow.opens_experts or _must_be_ours(own, in_run=flow.call.session is not None)):
        total = own(hidden, flow("expert_ids", ids), flow("gate_weights", weights))
        return flow("routed_out", total)
    rows = hidden.reshape(-1, hidden.shape[-1])
    in_turn = isinstance(own, Own) and own.plain == "eager"
    out = run_experts(flow, moe.kernel, experts, rows, ids, weights, in_turn=in_turn)
    return out.view(*hidden.shape[:-1], -1)


def _must_be_ours(own: Callable[..., Tensor], in_run: bool) -> bool:
    """Tell whether our implementation runs even where nobody reads or edits single experts.

    What a run gives must not depend on what it reads, not even by rounding, because runs are compared with each other.
    So a run never has an implementation that may round in another way. A call of the transformers model may.
    """
    if not isinstance(own, Own):
        return in_run
    return not own.runs or (in_run and not own.same)


def _fp8_experts_forward(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same with weights as transformers' FP8 implementations take them."""
    return _experts_forward(experts, hidden, ids, weights.to(hidden.dtype))


def _fp8_functions() -> Any:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    return ALL_FP8_EXPERTS_FUNCTIONS


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
