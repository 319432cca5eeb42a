"""One forward pass, or a generation, under a program of edits and reads, in a trace over the modules of a model.

Every point has a block of the trace to itself, which follows it from layer to layer. So nothing is said here about the
order in which a layer meets its points, which differs between architectures; blocks that wait at the same place are
served in the order of the table of points. One more block, before them, tells the program which tokens are real.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from moe_interp.adapters.formulas import logits_of, out_of_range, output_of
from moe_interp.adapters.spec import ModelSpec
from moe_interp.adapters.sums import follow
from moe_interp.hosts.choices import choice, rechosen, rechosen_at, topk
from moe_interp.hosts.program import Edited, Program, nonzero
from moe_interp.hosts.stock import StockReach
from moe_interp.hosts.tokens import tokens_of
from moe_interp.points import POINTS, SELECTION
from moe_interp.run import Read


class Pass:
    """A program, and the points that it needs, in the trace of one model."""

    def __init__(self, lm: Any, spec: ModelSpec, edits: Edited, reads: Sequence[Read]):
        self.reach, self.spec = StockReach(lm, spec, together=True), spec
        self.program = Program(spec, edits, reads, decode=self.decode)
        self.wanted = set(self.program.wanted)

    @property
    def blocks(self) -> list[str]:
        """What must have a block of the trace, in this order."""
        there = {name for name, _ in self.wanted}
        order = ["router_logits", "router_scores", "selection", *POINTS]
        return [name for name in dict.fromkeys(order) if name in there or (name == "selection" and self._chooses())]

    def begin(self) -> None:
        """Tell the program which tokens are real, in the pass that is about to begin."""
        args, kwargs = Mediator.value(f"{self.reach.path(self.spec.entry)}.input")
        self.program.begin(tokens_of(self.spec, args, kwargs), kwargs.get("past_key_values") is None)

    def follow(self, name: str) -> None:
        """Carry one point through the program, layer by layer."""
        if name == "selection":
            for layer in self._chooses():
                self._choose(layer)
            return
        for there in self.spec.layers_of(name):
            if (name, there) in self.wanted:
                self._carry(name, there)

    def _carry(self, name: str, layer: int | None) -> None:
        spot = self.reach.spot(name, layer)
        raw = Mediator.value(spot.location)
        shown = spot.show(raw)
        version = shown._version
        changed = self.program(name, layer, shown)
        if changed is not shown or shown._version != version:
            Mediator.swap(spot.location, spot.put(raw, changed))

    def _chooses(self) -> list[int]:
        return [layer for layer in self.spec.moe_layers if any((name, layer) in self.wanted for name in SELECTION)]

    def _choose(self, layer: int) -> None:
        through = lambda name, value: self.program(name, layer, value)  # noqa: E731
        place = topk(self.reach, layer)
        if place is not None:
            return rechosen_at(self.reach, place, layer, through)
        called, returns = choice(self.reach, layer)
        raw = Mediator.value(called)
        logits = Mediator.value(self.reach.spot("router_logits", layer).location)
        Mediator.value(returns)
        Mediator.swap(returns, rechosen(self.reach, layer, raw, logits, through))

    def decode(self, hidden: Tensor) -> Tensor:
        """Logits of a residual stream, by the model's own final norm and unembedding."""
        modules = _Called(self.reach.lm)
        normed = follow(modules, self.spec.final, hidden)  # type: ignore[arg-type]
        return logits_of(self.spec, modules.get_submodule(str(self.spec.unembed))(normed))

    def result(self, output: Any, keep: bool | Tensor) -> dict[str, Any]:
        """What goes back: tensors and built-in types alone, ids as small integers.

        ``keep`` is whether the output goes, too, or at which tokens [B, S].
        """
        contexts = {layer: self.program.contexts[layer] for layer in self.spec.moe_layers}
        values = {key: _small(value) for key, value in self.program.values.items()}
        tops = {key: tuple(map(_small, value)) for key, value in self.program.tops.items()}
        gave = output_of(self.spec, output)
        return {
            "values": values,
            "tops": tops,
            "ids": {layer: _small(context.ids) for layer, context in contexts.items()},  # type: ignore[arg-type]
            "weights": {layer: context.weights for layer, context in contexts.items()},
            "added": {layer: nonzero(context.added) for layer, context in contexts.items()},
            "touched": list(self.program.touched),
            "output": _kept(gave, keep),
            "wrong": out_of_range(gave, self.program.tokens.mask.to(gave.device)),
            "dtype": str(gave.dtype),
            "device": gave.device.type,
        }


class _Called:
    """A model whose submodules are called ad hoc in a trace."""

    def __init__(self, lm: Any):
        self.lm = lm

    def get_submodule(self, path: str) -> Any:
        """nnsight's envoy of a submodule, which runs it when called."""
        return self.lm.get(path)


def _kept(output: Tensor, keep: bool | Tensor) -> Tensor | None:
    if isinstance(keep, Tensor):
        return output[keep.to(output.device)]
    return output if keep else None


def _small(value: Tensor) -> Tensor:
    """Whole numbers in the fewest bytes that hold them."""
    if value.is_floating_point() or value.dtype is torch.bool or not value.numel():
        return value
    most = int(value.max())
    return value.to(torch.uint8 if most < 2**8 else torch.int16 if most < 2**15 else torch.int32)


def stock_pass(lm: Any, spec: ModelSpec, edits: Edited, reads: Iterable[Read]) -> Pass:
    """The pass of a program over a model's own modules."""
    return Pass(lm, spec, edits, tuple(reads))
