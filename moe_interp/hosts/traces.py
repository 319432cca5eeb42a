"""The named points inside an nnsight trace: ``points.layers[5].expert(12).out[:, -1] = 0``.

1. A `Reach` says where in a trace the value of a point passes: at which *location* (nnsight's word for a place that a
   block of a trace can wait at), how it is shown in the shape that the table of points promises, and how another value
   is put in its place.
2. Reading waits at the location. Where what is shown is not the model's own memory, nnsight is asked to write it back
   when the block moves on (its ``WriteBack``), so that edits in place reach the model from any kind of value.
3. An expert's part of a point is what its slots hold: gathered when read, put back into those slots when written.

Nothing here knows an architecture, and nothing needs more than torch and nnsight: the code of this module also runs
where this package is not installed.
"""

import operator
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from nnsight.intervention.eproperty import WriteBack
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from torch import Tensor

from moe_interp.adapters.spec import ModelSpec
from moe_interp.errors import BadInput, UnknownName
from moe_interp.points import POINTS, Scope, editable, ranges, read_only

T = TypeVar("T")
OF_EXPERTS = ("expert_act", "expert_out", "routed_out")
CALLED_WITH = ("expert_ids", "gate_weights")
"""Points inside a call of experts, and what it is called with: known, and read, as long as the layer runs."""


class Spot(NamedTuple):
    """Where the value of a point passes.

    Attributes:
        location: what a block waits for.
        show: the value of the point, from what passes there.
        put: what is to pass there for a value of the point, from what passes and that value.
        direct: whether what is shown is what the model goes on with, so that edits in place need no writing back.
    """

    location: str
    show: Callable[[Any], Tensor]
    put: Callable[[Any, Tensor], Any]
    direct: bool = False


@runtime_checkable
class Reach(Protocol):
    """A way to the points of one model inside a trace."""

    spec: ModelSpec

    def spot(self, name: str, layer: int | None) -> Spot:
        """Where a point of a layer passes."""

    def slots(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Expert ids and, once they are known, weights [B, S, K] of the rows of this block."""

    def late(self, name: str, layer: int) -> Tensor | None:
        """Ids or weights of the experts that this block has looked at in this visit of the layer, if it has."""

    def sent(self) -> tuple[Any, ...]:
        """How the points are pickled: a function and its arguments."""


def take(spot: Spot, key: Any) -> Tensor:
    """Wait for the value of a point; what is done to it in place reaches the model."""
    if spot.direct:
        return spot.show(Mediator.value(spot.location))
    mediator = Mediator.current(spot.location)
    occurrence = mediator.wanted(spot.location)
    waiting = mediator.transform
    if waiting is not None and waiting.key == (key, spot.location, occurrence):
        return waiting.view
    raw = Mediator.value(spot.location)
    shown = spot.show(raw)
    back = partial(_written, spot, raw, shown, _version(shown), occurrence)
    mediator.transform = WriteBack(back, shown, key, spot.location, occurrence)
    return shown


def give(spot: Spot, value: Tensor) -> None:
    """Put a value in a point's place."""
    raw = Mediator.value(spot.location)
    Mediator.swap(spot.location, spot.put(raw, value))


def _written(spot: Spot, raw: Any, shown: Tensor, version: int | None, occurrence: int) -> Any:
    # With gradients the model must go on with what was shown, or none would reach it.
    edited = version is None or shown._version != version or (torch.is_grad_enabled() and shown.requires_grad)
    if not edited:
        return raw
    # The block may be on its way to a later step, but this belongs to the visit that it was read at.
    mediator = Mediator.current(spot.location)
    step, mediator.iteration = mediator.iteration, occurrence
    try:
        return spot.put(raw, shown)
    finally:
        mediator.iteration = step


def _version(value: Tensor) -> int | None:
    """Changes with every edit in place; None where torch does not count them."""
    return None if value.is_inference() else value._version


class ReadOnly(Tensor):
    """A value that can be read and not edited: edits of it in place, or of a view of it, are refused."""

    @classmethod
    def refused(cls, edit: str) -> BadInput:
        """Why."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        written = name == "__setitem__" or re.fullmatch(r"__i(?!nt|nvert|ndex)\w+__|\w*[a-z0-9]_", name)
        if written and isinstance(args[0], ReadOnly):
            raise args[0].refused(name)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            own = isinstance(found, Tensor) and args and isinstance(args[0], ReadOnly) and _is_view(found, args[0])
            return found.as_subclass(type(args[0])) if own else found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _is_view(value: Tensor, of: Tensor) -> bool:
    return value._base is not None and value._base is (of if of._base is None else of._base)


class Passed(ReadOnly):
    """A value that the model has gone on with."""

    @classmethod
    def refused(cls, edit: str) -> BadInput:
        """The experts have been called with it."""
        return BadInput(
            "a value has passed",
            expected="edits of expert_ids and gate_weights before expert_act, expert_out and routed_out",
            got=f"{edit} on one that the experts have been called with",
        )


class Derived(ReadOnly):
    """A value that the model does not go on with."""

    @classmethod
    def refused(cls, edit: str) -> BadInput:
        """It is derived from router logits; a ``.clone()`` of it is the user's own."""
        return read_only("router_scores")


def _point_property(name: str) -> property:
    """A point as an attribute of a layer."""
    found = POINTS[name]

    def read(self: "LayerPoints") -> Tensor:
        late = self.points.reach.late(name, self.index) if name in CALLED_WITH and self.moe else None
        if late is not None:
            return late.as_subclass(Passed)
        value = _in_order(self, lambda: take(self.points.reach.spot(name, self.index), name))
        return value if found.editable else value.as_subclass(Derived)

    def write(self: "LayerPoints", value: Tensor) -> None:
        editable(name)
        _in_order(self, lambda: give(self.points.reach.spot(name, self.index), value))

    return property(read, write, doc=f"[{', '.join(found.dims.split())}], {found.meaning}.")


def _in_order(layer: "LayerPoints", wait: Callable[[], T]) -> T:
    """What waiting for a point of a layer gives; an error of one that has passed says in which order they come."""
    try:
        return wait()
    except OutOfOrderError as error:  # the same error goes on: nnsight ends loops over steps by it
        if "this order" not in str(error):
            error.args = (f"{error}. Points come in this order, {layer!r}",)
        raise


class LayerPoints:
    """The points of one layer inside a trace, as attributes: ``points.layers[5].gate_weights``.

    Values are those of this invoke's texts, [B, S, ...] with whatever padding nnsight gave them. They come in the order
    of the forward pass; asking for one that has passed is nnsight's ``OutOfOrderError``.
    """

    def __init__(self, points: "TracePoints", index: int):
        self.points, self.index = points, index

    @property
    def moe(self) -> bool:
        """Whether it has experts."""
        return self.points.reach.spec.layers[self.index].moe is not None

    def expert(self, expert: int) -> "ExpertPoints":
        """One expert, wherever a token has a slot that holds it.

        Raises:
            UnknownName: no such expert.
        """
        spec = self.points.reach.spec
        spec.check_runs(self.index, operator.index(expert))
        return ExpertPoints(self, "expert", operator.index(expert))

    def heaviest(self, rank: int = 0) -> "ExpertPoints":
        """The expert with the ``rank``-th largest weight (0: the largest) at each token.

        Raises:
            BadInput: no such rank.
        """
        k = self.points.reach.spec.moe(self.index).top_k
        if not 0 <= rank < k:
            raise BadInput("no such rank", expected=f"one from 0 to {k - 1}", got=str(rank))
        return ExpertPoints(self, "heaviest", rank)

    @property
    def names(self) -> tuple[str, ...]:
        """The points that the layer has, in the order in which its forward pass comes to them."""
        return tuple(name for name in self.points.reach.spec.layers[self.index].sites if name in POINTS)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("points", "index") and not hasattr(type(self), name):
            raise self._no_point(name)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("_") else self._no_point(name)

    def _no_point(self, name: str) -> UnknownName:
        expected = f"one of those of layer {self.index}, which come in this order: {', '.join(self.names)}"
        return UnknownName(f"no point {name!r} of a layer", expected=expected, got=repr(name))

    def __repr__(self) -> str:
        moe = self.points.reach.spec.layers[self.index].moe
        kind = "dense" if moe is None else f"{moe.num_experts} experts, top {moe.top_k}"
        return f"layer {self.index} ({kind}): {', '.join(self.names)}"

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, (self.points.layers, self.index)


for _name, _point in POINTS.items():
    if _point.scope is not Scope.MODEL:
        setattr(LayerPoints, _name, _point_property(_name))


def _no_part(name: str) -> UnknownName:
    return UnknownName(f"no {name!r} of an expert", expected="out, act, weight or used", got=repr(name))


class ExpertPoints:
    """One expert's part of a layer's points: 0 at tokens that it has no slot at, and edits there do nothing."""

    def __init__(self, layer: LayerPoints, kind: str, which: int):
        self._layer, self._kind, self._which = layer, kind, which

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise _no_part(name)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("_") else _no_part(name)

    @property
    def out(self) -> Tensor:
        """[B, S, D], its unweighted output."""
        return _in_order(self._layer, lambda: take(self._spot("expert_out"), self._key("expert_out")))

    @out.setter
    def out(self, value: Tensor) -> None:
        _in_order(self._layer, lambda: give(self._spot("expert_out"), value))

    @property
    def act(self) -> Tensor:
        """[B, S, F], its neurons."""
        return _in_order(self._layer, lambda: take(self._spot("expert_act"), self._key("expert_act")))

    @act.setter
    def act(self, value: Tensor) -> None:
        _in_order(self._layer, lambda: give(self._spot("expert_act"), value))

    @property
    def weight(self) -> Tensor:
        """[B, S], its combine weight."""
        late = self._layer.points.reach.late("gate_weights", self._layer.index)
        if late is not None:
            return late.masked_fill(~self._mask(late), 0).sum(dim=-1).as_subclass(Passed)
        return _in_order(self._layer, lambda: take(self._spot("gate_weights"), self._key("gate_weights")))

    @weight.setter
    def weight(self, value: Tensor) -> None:
        _in_order(self._layer, lambda: give(self._spot("gate_weights"), value))

    @property
    def used(self) -> Tensor:
        """[B, S], True at tokens that it has a slot at; known where ``out`` is."""
        layer = self._layer
        if layer.points.reach.late("expert_ids", layer.index) is None:
            Mediator.value(layer.points.reach.spot("expert_out", layer.index).location)
        return self._mask(None).any(dim=-1)

    def _key(self, name: str) -> tuple[str, str, int]:
        return name, self._kind, self._which

    def _mask(self, weights: Tensor | None) -> Tensor:
        """[B, S, K], the slots that it has: at most one a token."""
        ids, own = self._layer.points.reach.slots(self._layer.index)
        if self._kind == "heaviest":
            known: Any = own if weights is None else weights
            order = known.argsort(dim=-1, descending=True, stable=True)
            return torch.zeros_like(ids, dtype=torch.bool).scatter(-1, order[..., self._which, None], True)
        mask = ids == self._which
        return mask & (mask.cumsum(dim=-1) == 1)  # an edit may have put an expert into several slots of one token

    def _spot(self, name: str) -> Spot:
        layer = self._layer
        whole = layer.points.reach.spot(name, layer.index)

        held: list[Tensor] = []

        def mask(values: Tensor) -> Tensor:
            if not held:  # once: edits are put back when the block has moved on
                held.append(self._mask(values if name == "gate_weights" else None))
            return held[0].view(*held[0].shape, *[1] * (values.dim() - 3))

        def show(raw: Any) -> Tensor:
            values = whole.show(raw)
            return values.masked_fill(~mask(values), 0).sum(dim=2)

        def put(raw: Any, new: Tensor) -> Any:
            values = whole.show(raw)
            spread = torch.as_tensor(new, dtype=values.dtype, device=values.device)
            target = values[:, :, 0].shape
            return whole.put(raw, torch.where(mask(values), spread.expand(target).unsqueeze(2), values))

        return Spot(whole.location, show, put)

    def __repr__(self) -> str:
        return f"{self._kind}({self._which}) of layer {self._layer.index}: out, act, weight, used"

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.methodcaller(self._kind, self._which), (self._layer,)


class Layers:
    """All layers, numbered as the checkpoint numbers them."""

    def __init__(self, points: "TracePoints"):
        self._points = points

    def __getitem__(self, index: int) -> LayerPoints:
        """The points of one layer.

        Raises:
            UnknownName: no such layer.
        """
        found = operator.index(index)
        self._points.reach.spec.layer(found)
        return LayerPoints(self._points, found)

    def __repr__(self) -> str:
        return f"{len(self)} layers, of them with experts: {ranges(self._points.moe_layers)}"

    def __len__(self) -> int:
        return self._points.reach.spec.num_layers

    def __iter__(self) -> Iterator[LayerPoints]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._points, "layers")


class TracePoints:
    """The named points of one model, for use inside traces of nnsight.

    Attributes:
        reach: how they are reached.
    """

    def __init__(self, reach: Reach):
        self.reach = reach

    @property
    def layers(self) -> Layers:
        """All layers, by index."""
        return Layers(self)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return self.reach.spec.moe_layers

    @property
    def embed(self) -> Tensor:
        """[B, S, D], token embedding, as it enters the first layer."""
        return take(self.reach.spot("embed", None), "embed")

    @embed.setter
    def embed(self, value: Tensor) -> None:
        give(self.reach.spot("embed", None), value)

    def __repr__(self) -> str:
        spec = self.reach.spec
        return (
            f"points of {spec.model_type}: .embed and .layers[0] to .layers[{spec.num_layers - 1}], "
            f"with experts at {ranges(spec.moe_layers)}\n"
            f"print(points.layers[{spec.moe_layers[0]}]) lists the points of a layer in the order to read them in"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reach.sent()


def check_there(spec: ModelSpec, name: str, layer: int | None) -> None:
    """Refuse a point that a layer does not have.

    Raises:
        UnknownName: it does not.
    """
    there = spec.layers_of(name)
    if layer not in there:
        raise UnknownName(f"no point {name!r} at layer {layer}", expected=f"a layer of {list(there)}", got=str(layer))
