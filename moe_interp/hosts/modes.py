"""What happens inside a call, met by torch's function modes: the first linear map, a top-k, the second products.

A mode meets all that its thread runs until it is left, also what users give and what that runs of a model. So those of
a pass of a model ask whether the pass itself runs.
"""

from collections.abc import Callable, Collection
from traceback import clear_frames
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_function_stack_at, _len_torch_function_stack, _pop_torch_function_stack
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from moe_interp.adapters.spec import RouterTopK
from moe_interp.errors import UnsupportedModel


class _Own(TorchFunctionMode):
    """A function mode of this package.

    torch leaves the innermost mode, whichever it is, and takes a mode off while the mode's own code runs. A signal can
    come when torch is about to put it back.
    """

    def __exit__(self, *error: object) -> None:
        """Leave this mode, unless it is off already."""
        depth = _len_torch_function_stack()
        if depth and _get_function_stack_at(depth - 1) is self:
            _pop_torch_function_stack()


class StateKept:
    """A context manager that leaves two things of this thread as they were: gradients on or off, and modes of ours.

    torch restores both by Python code. A signal that comes just before that code would leave them changed for good. The
    code may also run late, when the frames of the signal's exception are freed. So those are freed here.
    """

    def __enter__(self) -> None:
        self.gradients, self.modes = torch.is_grad_enabled(), _len_torch_function_stack()

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not isinstance(error, Exception):
            clear_frames(trace)
        torch._C._set_grad_enabled(self.gradients)
        for depth in range(_len_torch_function_stack(), self.modes, -1):
            if isinstance(_get_function_stack_at(depth - 1), _Own):
                _pop_torch_function_stack()


def _always() -> bool:
    return True


class FirstLinear(_Own):
    """Passes the result of the first ``F.linear`` under it through a function, while ``now`` says so.

    Args:
        through: the function.
        now: whether the pass itself runs.
        outputs: how many outputs the map may have; None: any. A hook of the user's may compute another map first.
    """

    def __init__(
        self,
        through: Callable[[Tensor], Tensor],
        now: Callable[[], bool] = _always,
        outputs: Collection[int] | None = None,
    ):
        super().__init__()
        self.through, self.now, self.outputs, self.met = through, now, outputs, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not functional.linear or self.met or not self.now():
            return result
        if self.outputs is not None and result.shape[-1] not in self.outputs:
            return result
        self.met = True
        return self.through(result)


class TopK(_Own):
    """Passes the first top-k over rows of so many columns through a function of its input and itself, while ``now``."""

    def __init__(
        self,
        site: RouterTopK,
        through: Callable[[Tensor, Callable[[Tensor], Any]], Any],
        now: Callable[[], bool] = _always,
    ):
        super().__init__()
        self.site, self.through, self.now, self.met = site, through, now, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk) or self.met or not self._of_all(args[0]) or not self.now():
            return func(*args, **kwargs)
        self.met = True
        return self.through(args[0], lambda scores: func(scores, *args[1:], **kwargs))

    def _of_all(self, scores: Tensor) -> bool:
        # Routers with groups of experts take a top-k of each group, too: [B * S, groups, columns of a group].
        return scores.dim() == (3 if self.site.batched else 2) and scores.shape[-1] == self.site.columns


class SecondProducts(_Own):
    """Meets what every second matrix product is given: the neurons of experts, in the order in which they are run.

    transformers runs them sorted by expert in one grouped product, slot by slot in one batched product, or one expert
    after another.
    """

    GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
    SINGLE = ("linear", "matmul", "__matmul__")

    def __init__(self, ids: Tensor, new: Tensor | None = None):
        super().__init__()
        self.ids, self.new = ids, new
        self.order: Tensor | None = None
        self.products = 0
        self.met: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "sort":
            result = func(*args, **kwargs)
            self.order = result[1]
            return result
        if name != "bmm" and name not in self.GROUPED + self.SINGLE:
            return func(*args, **kwargs)
        self.products += 1
        return func(*args, **kwargs) if self.products % 2 else func(*self._shown(name, args), **kwargs)

    def _shown(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a product, with other neurons if there are any."""
        number = 1 if name == "bmm" and args[1].shape[-1] == 1 else 0
        act = args[number].flatten(1) if name == "bmm" else args[number]
        if name in self.SINGLE:
            self.order = self.ids.argsort(stable=True)
        start = sum(map(len, self.met))
        self.met.append(act)
        if self.new is None:
            return args
        new = self.new if self.order is None else self.new[self.order]
        piece = new[start : start + len(act)].view(args[number].shape)
        return (*args[:number], piece, *args[number + 1 :])

    def in_slots(self) -> Tensor:
        """The neurons [T*K, F], slot by slot."""
        met = torch.cat(self.met) if self.met else self.ids.new_empty(0, 0)
        if len(met) != len(self.ids):
            raise UnsupportedModel(
                "the neurons of experts were not met",
                expected="experts that run in this process, by two matrix products each",
                got=f"{len(met)} rows of {len(self.ids)}",
                do="Read or edit expert_out.",
            )
        return met if self.order is None else torch.empty_like(met).index_copy(0, self.order, met)
