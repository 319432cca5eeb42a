"""The points of a model through the modules that transformers gave it, and nothing else: the way in where nothing of
this package can be installed, as on a remote server.

- What a module is given or returns is the point, or a view of it.
- Router logits are the result of the first ``linear`` in the router's own code, which nnsight shows by ``.source``.
- Experts return the weighted sum alone. So they are called again where they return, with every (token, slot) as a
  token of its own under weight 1: those are the outputs of single slots. Edited, they are weighted and summed in the
  order and precision of transformers' ``grouped_mm`` and put in the place of what the experts returned. A delta on the
  block's output would round, and in bfloat16 that flips later choices.
- Their neurons are what the second product of that call is given, met by a ``TorchFunctionMode``.

Blocks that compute in their own way (`BlockCall`) have no experts to call again and are not reached.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from nnsight.intervention.interleaver import Mediator
from torch import Tensor
from torch.nn import functional

from moe_interp.adapters.formulas import router_scores
from moe_interp.adapters.spec import (
    BlockCall,
    ExpertsCall,
    GatedOutput,
    Input,
    LayerSpec,
    ModelSpec,
    Output,
    ResidualInput,
    RouterLinear,
    RouterOutput,
    RouterTopK,
)
from moe_interp.adapters.sums import weighted_sum
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.hosts.modes import SecondProducts
from moe_interp.hosts.rows import argument, joined, texts, with_argument
from moe_interp.hosts.sandbox import given_to, product_of, refuse_copy, restore, sandboxed
from moe_interp.hosts.traces import Spot, TracePoints, check_there


@dataclass
class Call:
    """One call of a layer's experts, as far as a block of a trace sees it.

    Attributes:
        visit: which call of the experts in this run it is.
        args: what they are called with: hidden states [T, D], ids and weights [T, K].
        act: neurons [b, S, K, F] that an edit put in place of their own.
        outputs: what the experts returned, and the outputs of single slots [b, S, K, D] that belong to it.
        inside: whether the block has asked for something inside the call, so that the arguments are settled.
        summed: whether their sum was edited, after which single slots no longer say what the block goes on with.
    """

    visit: int
    args: tuple[Any, ...]
    act: Tensor | None = None
    outputs: tuple[Any, Tensor] | None = None
    inside: bool = False
    summed: bool = False


class StockReach:
    """Points of a model by nnsight's envoys of its own modules.

    Attributes:
        lm: the nnsight model.
        spec: what it computes, without what only this package can run.
        together: whether all blocks of the trace have the same rows and are one program: each sees what the others did
            to the experts of a layer.
    """

    def __init__(self, lm: Any, spec: ModelSpec, together: bool = False):
        restore()
        self.lm, self.spec, self.together = lm, spec, together
        self.calls: WeakKeyDictionary[Any, dict[int, Call]] = WeakKeyDictionary()
        self.ungated: WeakKeyDictionary[Any, dict[str, tuple[int, Tensor]]] = WeakKeyDictionary()

    def sent(self) -> tuple[Any, ...]:
        """Not pickled again."""
        raise TypeError("points that were sent to a server are not sent on")

    def path(self, module: str) -> str:
        """Where nnsight has a module of the model."""
        return f"{self.lm.path}.{module}" if module else str(self.lm.path)

    def spot(self, name: str, layer: int | None) -> Spot:
        """Where a point of a layer passes.

        Raises:
            UnknownName: the layer has no such point.
            UnsupportedModel: it has, but no module shows it.
        """
        check_there(self.spec, name, layer)
        if layer is None:
            return self._output(str(self.spec.embed))
        match self.spec.layers[layer].sites[name]:
            case Input(module):
                return self._input(module, 0)
            case ResidualInput(module, argument):
                return self._residual(layer, module, argument)
            case Output(module):
                return self._output(module)
            case GatedOutput(module, gate):
                return self._gated(module, gate)
            case RouterLinear(module, columns):
                return self._logits(name, layer, f"{self.path(module)}.{self._linear(module)}.output", columns)
            case RouterOutput(module):
                return self._logits(name, layer, f"{self.path(module)}.output", None)
            case ExpertsCall():
                return self._of_experts(name, layer)
        raise UnsupportedModel(
            f"{name!r} at layer {layer} cannot be reached by the modules of {self.spec.model_type}",
            expected="a point between modules, or of experts that are called as one module",
            got="one inside a block that computes in its own way",
            do="Use the model in this process, where the block itself is replaced.",
        )

    # ---- what modules are given and return ------------------------------------------------------------------

    def _input(self, module: str, number: int) -> Spot:
        def show(raw: Any) -> Tensor:
            return texts(argument(raw, number))

        def put(raw: Any, new: Tensor) -> Any:
            return with_argument(raw, number, joined(argument(raw, number), new))

        return Spot(f"{self.path(module)}.input", show, put)

    def _residual(self, layer: int, module: str, number: int) -> Spot:
        if sandboxed() and (inside := self._inside(self.spec.layers[layer].path, module, given_to)):
            return self._operation(inside)

        # The layer keeps the very tensor as its residual: it is written to, not replaced.
        def put(raw: Any, new: Tensor) -> Any:
            refuse_copy(f"the residual stream at {module}", "Edit attn_out, or resid_post of the layer before.")
            texts(argument(raw, number)).copy_(new)
            return raw

        return Spot(f"{self.path(module)}.input", lambda raw: texts(argument(raw, number)).clone(), put)

    def _output(self, module: str) -> Spot:
        def show(raw: Any) -> Tensor:
            return texts(raw[0] if isinstance(raw, tuple) else raw)

        def put(raw: Any, new: Tensor) -> Any:
            return (joined(raw[0], new), *raw[1:]) if isinstance(raw, tuple) else joined(raw, new)

        return Spot(f"{self.path(module)}.output", show, put)

    def _inside(self, owner: str, module: str, find: Callable[[Any, str], str | None]) -> str | None:
        """Where nnsight has an operation in a module's own code, found by a submodule that it calls."""
        found = find(self.lm.get(owner).source, module.removeprefix(f"{owner}."))
        return None if found is None else f"{self.path(owner)}.source.{found}.output"

    def _operation(self, location: str) -> Spot:
        return Spot(location, lambda raw: texts(raw), lambda raw, new: joined(raw, new))

    def _gated(self, module: str, gate: str) -> Spot:
        if sandboxed() and (inside := self._inside(gate.rpartition(".")[0], gate, product_of)):
            return self._operation(inside)

        # The block multiplies by the sigmoid of the gate: the product is formed here, written over the module's output,
        # and the gate opened (the sigmoid of infinity is exactly 1).
        ungated = self._ungated(f"{self.path(module)}.output", f"{self.path(gate)}.output")

        def show(raw: Tensor) -> Tensor:
            return functional.sigmoid(texts(raw)) * texts(ungated)

        def put(raw: Tensor, new: Tensor) -> Tensor:
            refuse_copy(f"the gated output of {module}", "Edit moe_out.")
            texts(ungated).copy_(new)
            return joined(raw, torch.full_like(texts(raw), torch.inf))

        return Spot(f"{self.path(gate)}.output", show, put)

    def _ungated(self, output: str, gate: str) -> Tensor:
        """The output that a gate is about to scale, waited for once a visit."""
        mediator = Mediator.current(output)
        known = self.ungated.setdefault(mediator, {})
        if output not in known or known[output][0] != mediator.wanted(gate):
            value = Mediator.value(output)
            known[output] = mediator.occurrence(gate), value
        return known[output][1]

    # ---- routers --------------------------------------------------------------------------------------------

    def _linear(self, router: str) -> str:
        """The first linear map in a router's code, as nnsight names what a forward does."""
        names = self.lm.get(router).source.names
        found = next((name for name in names if re.search(r"(^|_)linear_\d+$", name)), None)
        if found is None:
            raise UnsupportedModel(
                f"no router logits at {router}",
                expected="a router that computes them by F.linear",
                got=f"one that does {', '.join(names)}",
            )
        return f"source.{found}"

    def _logits(self, name: str, layer: int, location: str, columns: int | None) -> Spot:
        def show(raw: Tensor) -> Tensor:
            logits = texts(raw)[..., :columns]
            return router_scores(self.spec.moe(layer).scoring, logits) if name == "router_scores" else logits

        def put(raw: Tensor, new: Tensor) -> Tensor:
            if name == "router_scores":
                return raw
            return joined(raw, torch.cat([new, texts(raw)[..., new.shape[-1] :]], dim=-1))

        return Spot(location, show, put)

    # ---- experts --------------------------------------------------------------------------------------------

    def call(self, layer: int) -> Call:
        """The call of the layer's experts that is under way, waited for if need be."""
        path = self.path(self.spec.moe(layer).experts)
        mediator = Mediator.current(path)
        known = self._calls(mediator)
        if layer not in known or known[layer].visit != mediator.wanted(f"{path}.output"):
            args, _ = Mediator.value(f"{path}.input")
            self._called(layer, mediator, args)
        return known[layer]

    def _calls(self, mediator: Mediator) -> dict[int, Call]:
        """The last call of each layer's experts that a block knows of."""
        return self.calls.setdefault(self if self.together else mediator, {})

    def _called(self, layer: int, mediator: Mediator, args: tuple[Any, ...]) -> None:
        """Note what the experts are about to be called with, once for all blocks that are together."""
        known, visit = self._calls(mediator), mediator.occurrence(f"{self.path(self.spec.moe(layer).experts)}.output")
        if not (self.together and layer in known and known[layer].visit == visit):
            known[layer] = Call(visit, args)
        known[layer].args = args

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Expert ids and weights [B, S, K] of the rows of this block."""
        _, ids, weights = self.call(layer).args
        return texts(ids), texts(weights)

    def late(self, name: str, layer: int) -> Tensor | None:
        """Ids or weights of the experts that this block has looked at in this visit of the layer, if it has."""
        end = f"{self.path(self.spec.layers[layer].path)}.output"
        mediator = Mediator.current(end)
        call = self.calls.get(mediator, {}).get(layer)
        if call is None or not call.inside or call.visit != mediator.occurrence(end):
            return None
        return texts(call.args[1 if name == "expert_ids" else 2])

    def _of_experts(self, name: str, layer: int) -> Spot:
        path = self.path(self.spec.moe(layer).experts)
        if name in ("expert_ids", "gate_weights"):
            number = 1 if name == "expert_ids" else 2
            return self._argument_of_experts(layer, number, f"{path}.input")
        # Before what they return; and known from here on, because edits are put back when the block has moved on.
        call = self.call(layer)
        call.inside = True
        if name == "routed_out":
            return self._sum(layer, call)
        neurons = name == "expert_act"
        show, put = (self._neurons, self._put_neurons) if neurons else (self._outputs, self._put_outputs)
        return Spot(f"{path}.output", lambda raw: show(layer, call, raw), lambda raw, new: put(layer, call, raw, new))

    def _argument_of_experts(self, layer: int, number: int, location: str) -> Spot:
        def show(raw: Any) -> Tensor:
            self._called(layer, Mediator.current(location), raw[0])
            return texts(raw[0][number])

        def put(raw: Any, new: Tensor) -> Any:
            changed = with_argument(raw, number, joined(raw[0][number], new))
            self._calls(Mediator.current(location))[layer].args = changed[0]
            return changed

        return Spot(location, show, put)

    def _alone(self, layer: int, call: Call) -> Callable[[], Tensor]:
        """The experts on every (token, slot) of this block alone, as a function."""
        hidden, ids, weights = (texts(one).flatten(0, 1) for one in call.args[:3])
        slots = ids.shape[-1]
        args = (
            hidden.repeat_interleave(slots, dim=0),
            ids.reshape(-1, 1),
            torch.ones_like(weights).reshape(-1, 1),
        )
        return lambda: self.lm.get(self.spec.moe(layer).experts)(*args)

    def _sum(self, layer: int, call: Call) -> Spot:
        whole = self._output(self.spec.moe(layer).experts)

        def put(raw: Any, new: Tensor) -> Any:
            call.summed = True
            return whole.put(raw, new)

        return Spot(whole.location, whole.show, put)

    def _outputs(self, layer: int, call: Call, raw: Tensor) -> Tensor:
        if call.summed:
            raise BadInput(
                f"the experts of layer {layer} have been summed",
                expected="reads and edits in the order of the points: expert_act, expert_out, routed_out",
                got="one of single slots after an edit of routed_out",
            )
        if call.outputs is None or not _same(call.outputs[0], raw):
            run, ids = self._alone(layer, call), texts(call.args[1])
            found = run() if call.act is None else _with_neurons(run, ids.flatten(), call.act.flatten(0, 2))
            call.outputs = raw, found.view(*ids.shape, -1)
        return call.outputs[1].clone()

    def _put_outputs(self, layer: int, call: Call, raw: Tensor, new: Tensor) -> Tensor:
        weights = texts(call.args[2])
        total = weighted_sum(new.flatten(0, 2), weights.flatten(0, 1), raw.dtype)
        changed = joined(raw, total.view(*weights.shape[:2], -1))
        call.outputs = changed, new
        return changed

    def _neurons(self, layer: int, call: Call, raw: Tensor) -> Tensor:
        if call.act is None:
            ids = texts(call.args[1])
            return _neurons_of(self._alone(layer, call), ids.flatten()).view(*ids.shape, -1)
        return call.act.clone()

    def _put_neurons(self, layer: int, call: Call, raw: Tensor, new: Tensor) -> Tensor:
        call.act, call.outputs = new, None
        return self._put_outputs(layer, call, raw, self._outputs(layer, call, raw))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether the rows of this block are those of before: nnsight and sandboxes may pass on copies."""
    return one is other or torch.equal(texts(one), texts(other))


def _neurons_of(run: Callable[[], Tensor], ids: Tensor) -> Tensor:
    """The neurons [T*K, F] of a call of experts."""
    mode = SecondProducts(ids)
    with mode:
        run()
    return mode.in_slots()


def _with_neurons(run: Callable[[], Tensor], ids: Tensor, act: Tensor) -> Tensor:
    """What a call of experts returns under other neurons."""
    mode = SecondProducts(ids, act)
    with mode:
        out = run()
    mode.in_slots()
    return out


# ---- what a server is told -----------------------------------------------------------------------------------


class Elsewhere:
    """Experts whose matrices are on a server."""

    def outputs(self, experts: Any, hidden: Tensor, ids: Tensor, on_act: Any = None) -> Tensor:
        """Refused."""
        raise UnsupportedModel("no experts here", expected="a model with its weights", got="one on a server")

    def weights(self, experts: Any, expert: int) -> Any:
        """Refused."""
        raise UnsupportedModel("no matrices here", expected="a model with its weights", got="one on a server")


def reached(spec: ModelSpec) -> ModelSpec:
    """A model without points that its modules do not show, and without what only this package can run."""
    return replace(spec, layers=tuple(_reached(layer) for layer in spec.layers))


def _reached(layer: LayerSpec) -> LayerSpec:
    router = "" if layer.moe is None else layer.moe.router
    sites = {
        name: site
        for name, site in layer.sites.items()
        if not isinstance(site, BlockCall) and not (isinstance(site, RouterTopK) and site.module != router)
    }
    return replace(layer, sites=sites, moe=None if layer.moe is None else replace(layer.moe, kernel=Elsewhere()))


def stock_points(lm: Any, spec: ModelSpec) -> TracePoints:
    """The points of a model by the modules that it has."""
    return TracePoints(StockReach(lm, spec))
