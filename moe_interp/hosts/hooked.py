"""The points of an nnsight model whose weights are in this process: by the local host's own hook points.

`trace_points` gives what a user writes in a trace. Sent to a server, it becomes the same names reached by the modules
that the server's model has (`moe_interp.hosts.stock`).
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Interleaver, Mediator
from torch import Tensor, nn

from moe_interp.adapters import ModelSpec, describe
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.hosts.apart import keep_apart
from moe_interp.hosts.local import ATTRIBUTE, LocalHost, Opening, attribute_of, open_host
from moe_interp.hosts.sending import sent
from moe_interp.hosts.stock import reached, stock_points
from moe_interp.hosts.taps import HookPoint
from moe_interp.hosts.traces import OF_EXPERTS, Spot, TracePoints, check_there


class Parked:
    """Blocks of traces that wait at one location."""

    def __init__(self, interleaver: Interleaver, location: str):
        self.interleaver, self.location = interleaver, location

    @property
    def now(self) -> bool:
        """Whether one waits there."""
        return self.later and self.location in self.interleaver.parked

    @property
    def later(self) -> bool:
        """Whether one still may."""
        return bool(self.interleaver.interleaving and self.interleaver.busy)

    def missed(self) -> None:
        """A value has gone by: nnsight counts visits, to tell the steps of a generation apart."""
        if self.later:
            self.interleaver.counts[self.location] = self.interleaver.counts.get(self.location, 0) + 1


class HookReach:
    """Points by hook points.

    Attributes:
        lm: the nnsight model.
        spec: what it computes.
    """

    def __init__(self, lm: Any, spec: ModelSpec):
        self.lm, self.spec = lm, spec
        self.host: LocalHost | None = None
        self.opening: Opening | None = None
        self.envoys: dict[tuple[str, int | None], Envoy] = {}
        self.parked: list[tuple[HookPoint, Parked]] = []
        self.together: Callable[[], None] = lambda: None  # ends what keeps traces and runs apart
        self.seen: WeakKeyDictionary[Any, dict[int, int]] = WeakKeyDictionary()  # visits, by block and layer

    def sent(self) -> tuple[Any, ...]:
        """What is sent to a server in place of the points."""
        return sent(stock_points, self.lm, reached(self.spec), apart=[self.lm])

    def spot(self, name: str, layer: int | None) -> Spot:
        """Where a point of a layer passes.

        Raises:
            UnknownName: the layer has no such point.
        """
        check_there(self.spec, name, layer)
        location = f"{self._envoy(name, layer).path}.input"
        if layer is not None and name in OF_EXPERTS:
            mediator = Mediator.current(location)
            self.seen.setdefault(mediator, {})[layer] = mediator.occurrence(self._end(layer))
        return Spot(location, lambda raw: raw[0][0], lambda raw, new: ((new,), {}), direct=True)

    def late(self, name: str, layer: int) -> Tensor | None:
        """Ids or weights of the experts that this block has looked at in this visit of the layer, if it has."""
        location = f"{self._path(name, layer)}.input"
        mediator = Mediator.current(location)
        visit = mediator.occurrence(self._end(layer))
        if self.seen.get(mediator, {}).get(layer) != visit or mediator.occurrence(location) <= visit:
            return None
        ids, weights = self.slots(layer)
        return ids if name == "expert_ids" else weights

    def _end(self, layer: int) -> str:
        """Where a visit of a layer ends."""
        return f"{self.lm.path}.{self.spec.layers[layer].path}.output"

    def slots(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Expert ids and, once they are known, weights [B, S, K] of the rows of this block."""
        flow: Any = self.opened().taps[layer].traced
        return self._cut(flow.ids), None if flow.weights is None else self._cut(flow.weights)

    def _cut(self, value: Any) -> Tensor:
        """The rows of the block that asks."""
        mediator = Mediator.current("the slots of a layer")
        batcher = mediator.interleaver.batcher
        return value if batcher is None else batcher.narrow(value, mediator.batch_group)

    def close(self) -> None:
        """Take the hook points away."""
        if self.host is None:
            return
        for point, parked in self.parked:
            point.watchers.remove(parked)
        self.together()
        if self.opening is not None:
            self.opening.close()
        self.host, self.envoys, self.parked = None, {}, []

    @property
    def here(self) -> bool:
        """Whether the weights are in this process."""
        return not any(parameter.is_meta for parameter in self.lm._module.parameters())

    def opened(self) -> LocalHost:
        """The hook points, on the model that nnsight has now."""
        hf = self.lm._module
        if self.host is not None and self.host.hf is not hf:
            self.close()  # the weights have come since
        if self.host is None:
            self.opening = open_host(hf, self.spec)
            self.host = self.opening.host
            self.together = keep_apart(self.lm.interleaver)
            self.parked = [self._watch(name, layer) for name, layer in _all_points(self.spec)]
        return self.host

    def _watch(self, name: str, layer: int | None) -> tuple[HookPoint, Parked]:
        """Let values through a hook point when a block of a trace waits for them."""
        point, parked = self.host.point(name, layer), Parked(self.lm.interleaver, f"{self._path(name, layer)}.input")  # type: ignore[union-attr]
        point.watch(parked)
        return point, parked

    def _path(self, name: str, layer: int | None) -> str:
        """What nnsight calls a hook point."""
        if layer is None:
            return f"{self.lm.path}.{ATTRIBUTE}.{name}"
        at = self.spec.layers[layer]
        return f"{self.lm.path}.{at.path}.{attribute_of(at)}.{name}"

    def _envoy(self, name: str, layer: int | None) -> Envoy:
        """nnsight's view of a hook point. It is no child of the model's tree, which a server must find as it is."""
        host = self.opened()
        if (name, layer) not in self.envoys:
            point, path = host.point(name, layer), self._path(name, layer)
            self.envoys[name, layer] = Envoy(point, path=path, interleaver=self.lm.interleaver)
        return self.envoys[name, layer]


def _all_points(spec: ModelSpec) -> list[tuple[str, int | None]]:
    return [(name, layer) for name in spec.points for layer in spec.layers_of(name)]


class HookedPoints(TracePoints):
    """The named points of an nnsight model, until `close` or the end of the ``with`` that they are used in."""

    reach: HookReach

    def close(self) -> None:
        """Leave the model as it was found."""
        self.reach.close()

    def __enter__(self) -> "HookedPoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def trace_points(lm: Any) -> HookedPoints:
    """The named points of an nnsight model, for use inside its traces, here or with ``remote=True``.

    ``points.layers[5].expert(12).out[:, -1] = 0`` and ``points.layers[5].gate_weights.save()`` read and edit as
    nnsight's own ``.output`` does: in place or by assignment, per invoke, under gradients, at steps of ``tracer.iter``.

    Args:
        lm: an nnsight model (``TransformersModel``, ``NNsight``) of a mixture-of-experts model of transformers. Without
            weights it serves remote traces; weights that nnsight loads later are found.

    Raises:
        BadInput: not an nnsight model.
        UnsupportedModel: its architecture cannot be opened.
    """
    if not isinstance(lm, Envoy) or not isinstance(lm._module, nn.Module):
        raise BadInput(
            "not an nnsight model",
            expected="nnsight.TransformersModel(...) or nnsight.NNsight(model)",
            got=type(lm).__name__,
            do="A transformers model goes to moe.wrap.",
        )
    if lm.parent is not None:
        raise UnsupportedModel("points of a part of a model", expected="the whole nnsight model", got=lm.path)
    reach = HookReach(lm, describe(lm._module))
    if reach.here:
        reach.opened()
    return HookedPoints(reach)
