"""Edits and reads, hooked to a host's points for as long as a forward pass (or a generation) takes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_interp.hosts.local import LocalHost
from moe_interp.hosts.program import Block, Program, arguments_of, tokens_of
from moe_interp.interventions import Intervention
from moe_interp.run import Read


class Session:
    """One or more forward passes under the same edits.

    Args:
        host: the opened model.
        edits, reads, decode: as `Program` has them, which says what is refused.
        grad: whether to keep the graph; None: as it is outside.
        whole: whether a pass without a cache has all tokens that there will be.
        first: whether its edits come before what others hook to the points, who are then shown what it made of values.
    """

    def __init__(
        self,
        host: LocalHost,
        edits: Sequence[Intervention] | Sequence[Block],
        reads: Sequence[Read] = (),
        grad: bool | None = False,
        decode: Callable[[Tensor], Tensor] | None = None,
        whole: bool = True,
        first: bool = False,
    ):
        self.host, self.grad, self.whole, self.first, self.paused = host, grad, whole, first, False
        self.program = Program(host.spec, edits, reads, bool(grad), lambda layer: host.taps[layer].rows, decode)

    @property
    def interventions(self) -> list[Intervention]:
        """All of its edits, in order."""
        return self.program.interventions

    @property
    def touched(self) -> list[int]:
        """How many values each of them has changed."""
        return self.program.touched

    @contextmanager
    def __call__(self) -> Iterator["Session"]:
        """Hook everything inside the ``with``."""
        grad = torch.is_grad_enabled() if self.grad is None else self.grad
        program, spec = self.program, self.host.spec
        with ExitStack() as stack, torch.set_grad_enabled(grad), torch.compiler.set_stance("force_eager"):
            stack.enter_context(self.host.widened(program.widths))
            stack.enter_context(self.host.exchanged(program.exchanges))
            stack.enter_context(self.host.dropping(program.dropping))
            entry = self.host.hf.get_submodule(spec.entry)
            handle = entry.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(handle.remove)
            for point, layer in program.wanted:
                stack.callback(self._hook(point, layer).remove)
            yield self

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave values as they are inside the ``with``."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.paused:
            given = arguments_of(module, args, kwargs)
            whole = self.whole and given.get("past_key_values") is None
            self.program.begin(tokens_of(self.host.spec, args, given), whole)

    def _hook(self, point: str, layer: int | None) -> RemovableHandle:
        def before(module: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
            return None if self.paused else self.program(point, layer, args[0])

        def after(module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor | None:
            return None if self.paused else self.program(point, layer, value)

        if self.first:
            return self.host.front(point, layer).register_forward_pre_hook(before)
        return self.host.point(point, layer).register_forward_hook(after)
