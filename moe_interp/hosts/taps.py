"""Hook points; the taps of a layer, which are there as long as a model is open; and its flow in one forward pass."""

import functools
from collections.abc import Callable
from math import prod
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moe_interp.adapters.experts import check_ids
from moe_interp.adapters.formulas import router_scores
from moe_interp.adapters.spec import LayerSpec
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.hosts.calls import Call, open_pass, under_way
from moe_interp.points import SELECTION

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
INSIDE = (
    "router_logits",
    "router_scores",
    *SELECTION,
    "expert_ids",
    "gate_weights",
    "expert_act",
    "expert_out",
    "routed_out",
)


@runtime_checkable
class Watcher(Protocol):
    """Somebody who takes values at a hook point by other means than hooks."""

    @property
    def now(self) -> bool:
        """Whether the value that comes next is taken."""

    @property
    def later(self) -> bool:
        """Whether one may be taken before the forward pass ends."""

    def missed(self) -> None:
        """A value has gone by that was not taken."""


def _noting(name: str) -> Any:
    """Make a method of `HookPoint` that sets a hook as any module does, and notes that the point is used."""

    def noted(self: "HookPoint", *args: Any, **kwargs: Any) -> Any:
        self.used.add(self)
        return getattr(super(HookPoint, self), name)(*args, **kwargs)

    return functools.wraps(getattr(nn.Module, name))(noted)


class HookPoint(nn.Module):
    """Identity. What a forward hook on it returns goes on through the model in place of the value.

    Attributes:
        watchers: those who take values here without a hook; they may write into the value that they are given.
    """

    def __init__(self, used: set["HookPoint"] | None = None) -> None:
        super().__init__()
        self.watchers: list[Watcher] = []
        # Those of a model that anybody has hooked or watched, so that a pass need not ask all of them.
        self.used = set[HookPoint]() if used is None else used

    def watch(self, watcher: Watcher) -> None:
        """Let somebody take values here without a hook."""
        self.used.add(self)
        self.watchers.append(watcher)

    register_forward_hook = _noting("register_forward_hook")
    register_forward_pre_hook = _noting("register_forward_pre_hook")
    register_full_backward_hook = _noting("register_full_backward_hook")
    register_full_backward_pre_hook = _noting("register_full_backward_pre_hook")
    register_backward_hook = _noting("register_backward_hook")

    @property
    def hooked(self) -> bool:
        """Whether anything is hooked here."""
        backward = self._backward_hooks or self._backward_pre_hooks
        return bool(self._forward_hooks or self._forward_pre_hooks or backward)

    @property
    def watched(self) -> bool:
        """Whether somebody takes the value that comes next without a hook."""
        return any(watcher.now for watcher in self.watchers)

    @property
    def live(self) -> bool:
        """Whether values must pass through here."""
        return self.hooked or self.watched

    @property
    def awaited(self) -> bool:
        """Whether values may have to pass through here before the forward pass ends."""
        return self.hooked or any(watcher.later for watcher in self.watchers)

    def forward(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused, as of the whole model."""
        refuse_copies(protocol)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Refused: hooks of a replica would run the original's weights.

        Raises:
            UnsupportedModel: always.
        """
        raise UnsupportedModel(
            "an opened model in torch.nn.DataParallel",
            expected="one process for each device, as torchrun begins them, or a model that is closed",
            got="a replica, whose hooks would reach the original",
            do="Use DistributedDataParallel, or close the model first.",
        )


def refuse_copies(protocol: Any) -> NoReturn:
    """In place of what ``copy`` and ``pickle`` ask an opened model for: hooks of a copy would reach the original.

    Raises:
        BadInput: always.
    """
    raise BadInput(
        "an opened model cannot be copied or pickled",
        expected="one that is closed, or its state_dict",
        got="hook points, whose hooks would reach the original",
        do="Close it first: model.close().",
    )


class Taps:
    """A layer's hook points.

    Attributes:
        layer: what the layer computes.
        streams: how many residual streams there are.
        at: the hook points by name.
        traced: the last flow that a block of a trace took part in.
    """

    def __init__(self, host: Any, layer: LayerSpec, streams: int = 1):
        self.host, self.layer, self.streams = host, layer, streams
        self.at = {name: HookPoint(host.used) for name in layer.sites}
        self.points = nn.ModuleDict(self.at)
        self.traced: Flow | None = None

    def now(self) -> "Flow | None":
        """The layer's flow in the pass that is under way; None where there is none, or nothing to be done in it."""
        call = open_pass(self.host)
        if call is None:
            return None
        flow = call.flows.get(self.layer.index)
        if flow is None:
            flow = call.flows[self.layer.index] = Flow(self, call)
        return flow


class Flow:
    """Carries the values of one layer in one pass through its hook points, in the shape that the table promises.

    Attributes:
        grid: B, S.
        rows: [B, S], True at the tokens that the mixture sees; None: all.
        ids: [B, S, K], the experts that run, where a trace may ask for them.
        weights: [B, S, K], and their weights, without gradients.
        chose: whether the router's choice was met.
        ungated: outputs that wait for their gate, by point.
    """

    def __init__(self, taps: Taps, call: Call):
        self.taps, self.call, self.layer = taps, call, taps.layer
        self.grid = (0, 0)
        self.rows: Tensor | None = None
        self.ids: Tensor | None = None
        self.weights: Tensor | None = None
        self.chose = False
        self.ungated: dict[str, Tensor] = {}

    def enter(self, hidden: Tensor) -> None:
        """The layer is called with these hidden states: [B, S, ...], or [S, D] where there is no batch.

        A pooled layer is called with [B, ...], which is one position an input.
        """
        self.grid = (hidden.shape[0], hidden.shape[1]) if hidden.dim() > 2 else (1, hidden.shape[0])
        if self.layer.pooled:
            self.grid = (hidden.shape[0], 1)
        self.rows, self.chose = None, False

    @property
    def now(self) -> bool:
        """Whether code that runs here is a part of this pass, and not of one inside it or of what a user gave."""
        return under_way(self.taps.host) is self.call

    def live(self, name: str) -> bool:
        """Whether anything is to be done at the point (False where the layer does not have it)."""
        point = self.taps.at.get(name)
        return point is not None and (point.live or (name, self.layer.index) in self.call.wanted)

    def awaited(self, name: str) -> bool:
        """Whether anything may want the point's value before the forward pass ends."""
        point = self.taps.at.get(name)
        return point is not None and (point.awaited or (name, self.layer.index) in self.call.wanted)

    @property
    def idle(self) -> bool:
        """Whether nothing can come of carrying the layer's values through its points."""
        return not any(map(self.awaited, self.taps.at))

    def missed(self, name: str) -> None:
        """The point's value has gone by, and nobody took it."""
        point = self.taps.at.get(name)
        for watcher in point.watchers if point else ():
            watcher.missed()

    def __call__(self, name: str, value: Tensor, slots: int | None = None) -> Tensor:
        """The value after its hook point: shown as [B, S, (K,) ...], returned in the shape it came in."""
        if name == "router_logits":
            value = self._through(name, value, slots)
            self._show_scores(value)
            return value
        if name == "expert_ids":
            self._check_chose()
        value = self._through(name, value, slots)
        if name in ("expert_ids", "gate_weights") and any(watcher.later for watcher in self.taps.at[name].watchers):
            shown = self._shown(value.detach(), (), self.rows)
            self.ids, self.weights = (shown, None) if name == "expert_ids" else (self.ids, shown)
            self.taps.traced = self
        return value

    def _through(self, name: str, value: Tensor, slots: int | None) -> Tensor:
        if not self.live(name):
            self.missed(name)
            return value
        streams = self.taps.streams
        middle = (slots,) if slots else (streams,) if name in RESIDUAL and streams > 1 else ()
        rows = self.rows if name in INSIDE else None
        shown = self._shown(value, middle, rows)
        point = self.taps.at[name]
        if not point.live:
            self.missed(name)
        # Who watches may write into what is shown, and takes gradients by it: the model goes on with just that.
        watched = point.watched
        changed = self.call.passed(name, self.layer.index, point, shown)
        if changed is shown and not watched:
            return value
        back = changed if rows is None else changed[rows]
        if name == "expert_ids" and self.layer.moe:
            check_ids(back, self.layer.moe.num_experts)
        return back.reshape(value.shape)

    def _shown(self, value: Tensor, middle: tuple[int, ...], rows: Tensor | None) -> Tensor:
        """As [B, S, ...], zero at tokens that the mixture does not see."""
        if self.grid == (0, 0):
            raise BadInput(
                f"hook points were put on layer {self.layer.index} while it ran",
                expected="a model that is open before its forward pass",
                got="weights that a trace itself has loaded",
                do="Load them first: lm.dispatch(), or dispatch=True.",
            )
        tokens = prod(self.grid) if rows is None else int(rows.sum())
        seen = value.reshape(tokens, *middle, value.numel() // (tokens * prod(middle)) if tokens else value.shape[-1])
        if rows is None:
            return seen.view(*self.grid, *seen.shape[1:])
        return seen.new_zeros(*self.grid, *seen.shape[1:]).index_put((rows,), seen)

    def routed(self, logits: Tensor, columns: int | None = None) -> Tensor:
        """Router logits after their hook point, of which the first ``columns`` are experts (None: all)."""
        shown = logits if columns is None else logits[..., :columns]
        changed = self("router_logits", shown)
        if changed is shown:
            return logits
        return changed if columns is None else torch.cat([changed, logits[..., columns:]], dim=-1)

    @property
    def selects(self) -> bool:
        """Whether anything is hooked inside the router's choice."""
        return any(map(self.live, SELECTION))

    def choose(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of the scores [T, E] and whose they are [T, k], under edits of the selection."""
        return self.chosen(scores, lambda shown: torch.topk(shown, k, dim=-1))

    def chosen(self, scores: Tensor, top: Callable[[Tensor], Any]) -> Any:
        """What ``top`` returns, values and ids, after edits of the scores and then of the ids.

        Values are those of the scores as they were: weights follow from them.
        """
        if not self.selects:
            return top(scores)
        self.chose = True
        shown = self("selection_scores", scores)
        own = top(shown)
        ids = self("selected_ids", own[1])
        if shown is scores and ids is own[1]:
            return own
        return torch.return_types.topk((scores.gather(-1, ids), ids))

    def _check_chose(self) -> None:
        if self.selects and not self.chose:
            raise UnsupportedModel(
                f"the choice of the router at layer {self.layer.index} was not met",
                expected="torch.topk over the scores of all experts in the router (or the block)",
                got="a router that chooses in another way",
                do="Say so in the adapter by Family(selects=...), or edit router_logits or expert_ids.",
            )

    def experts(self, own: nn.Module) -> nn.Module:
        """The experts that run: the layer's own, or those that an intervention put in their place."""
        other = self.call.exchanges.get(self.layer.index)
        return own if other is None else self.taps.host.experts_at(other)

    @property
    def opens_experts(self) -> bool:
        """Whether what single slots put out is wanted, or is not what the layer's own experts compute."""
        inside = self.awaited("expert_act") or self.awaited("expert_out")
        return inside or self.layer.index in self.call.exchanges or self.layer.index in self.call.dropping

    def kept(self, weights: Tensor) -> Tensor | None:
        """[T, K], the slots that must be computed; None: all."""
        needed = self.live("expert_act") or self.live("expert_out") or torch.is_grad_enabled()
        return None if needed or self.layer.index not in self.call.dropping else weights != 0

    def _show_scores(self, logits: Tensor) -> None:
        """Show the scores that weights come from; they are read, never replaced."""
        if self.layer.moe and self.live("router_scores"):
            self._through("router_scores", router_scores(self.layer.moe.scoring, logits), None)
        else:
            self.missed("router_scores")
