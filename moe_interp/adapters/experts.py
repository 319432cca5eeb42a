"""What experts compute, for every way in which they are stored; and the experts call with everything shown on the way.

A `Kernel` computes the neurons and the unweighted output of every (token, slot), at the cost of the original.

- `Fused`: transformers 5 keeps a layer's experts as three-dimensional parameters. It does what its ``grouped_mm``
  implementation does (sort the token-slots by expert, two grouped matrix products, undo the sort) but leaves the
  weights to `run_experts`, after the sort is undone, so that the unweighted outputs exist on the way. Multiplication
  and sum see the same operands in the same order, and the result is bit-equal.
- `Separate`: one module an expert.

Files of single architectures add kernels of their own.
"""

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe_interp.adapters.formats import check_format, in_memory, linear_weight, matrices
from moe_interp.adapters.sums import weighted_sum
from moe_interp.errors import BadInput, UnsupportedModel

OnAct = Callable[[Tensor], Tensor]
"""Is shown the neurons [T*K, F] of all token-slots and returns those to go on with."""


@runtime_checkable
class Tap(Protocol):
    """Carries values through the points of one layer."""

    def __call__(self, name: str, value: Tensor, slots: int | None = None) -> Tensor:
        """The value to go on with; ``slots`` is K where the value's rows are token-slots."""

    def live(self, name: str) -> bool:
        """Whether anybody reads or edits the point."""

    def missed(self, name: str) -> None:
        """The point's value has gone by, and nobody took it."""

    def choose(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest of the scores [T, E] and whose they are [T, k], under edits of the selection."""

    def experts(self, own: nn.Module) -> nn.Module:
        """The experts that run: the layer's own, or those that an intervention put in their place."""

    def kept(self, weights: Tensor) -> Tensor | None:
        """[T, K], the slots that must be computed; None: all."""


def chooses(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a block's forward that makes the router's choice itself, by ``tap.choose``."""
    forward.chooses = True  # type: ignore[attr-defined]
    return forward


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

    def copied(self) -> "ExpertWeights":
        """The same in tensors of their own."""
        return ExpertWeights(*(None if one is None else one.clone() for one in vars(self).values()))  # type: ignore[arg-type]


@runtime_checkable
class Kernel(Protocol):
    """What the experts of one architecture compute, given the module that holds them."""

    def outputs(self, experts: Any, hidden: Tensor, ids: Tensor, on_act: OnAct | None = None) -> Tensor:
        """Unweighted outputs [T*K, D] of the experts ``ids`` [T, K] on ``hidden`` [T, D], slot by slot."""

    def weights(self, experts: Any, expert: int) -> ExpertWeights:
        """The matrices of one expert, detached."""


def run_experts(
    tap: Tap,
    kernel: Kernel,
    experts: nn.Module,
    hidden: Float[Tensor, "T D"],
    ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    *,
    weights_on: Literal["output", "input"] = "output",
    in_turn: bool = False,
) -> Float[Tensor, "T D2"]:
    """``experts(hidden, ids, weights)`` with arguments, neurons, outputs and result passed through their points.

    ``in_turn``: the sum is taken as `added_in_turn` does, not as `weighted_sum` does.
    """
    slots = ids.shape[-1]
    ids = tap("expert_ids", ids)
    weights = tap("gate_weights", weights)
    experts = tap.experts(experts)
    on_act = (lambda act: tap("expert_act", act, slots)) if tap.live("expert_act") else None
    if on_act is None:
        tap.missed("expert_act")
    if weights_on == "input":
        rows = (hidden[:, None] * weights[..., None]).flatten(0, 1).to(hidden.dtype)
        outputs = tap("expert_out", kernel.outputs(experts, rows, ids.reshape(-1, 1), on_act), slots)
        return tap("routed_out", outputs.view(*ids.shape, -1).sum(dim=1))
    kept = tap.kept(weights)
    if kept is None:
        outputs = tap("expert_out", kernel.outputs(experts, hidden, ids, on_act), slots)
    else:
        outputs = _outputs_of(kernel, experts, hidden, ids, kept)
        tap.missed("expert_out")
    total = added_in_turn(outputs, ids, weights) if in_turn else weighted_sum(outputs, weights, hidden.dtype)
    return tap("routed_out", total)


def _outputs_of(
    kernel: Kernel, experts: nn.Module, hidden: Float[Tensor, "T D"], ids: Int[Tensor, "T K"], kept: Bool[Tensor, "T K"]
) -> Float[Tensor, "TK D2"]:
    """Unweighted outputs, slot by slot, of some slots alone; zero at the others."""
    slots = kept.reshape(-1).nonzero().flatten()
    slots = slots if len(slots) else slots.new_zeros(1)
    some = kernel.outputs(experts, hidden[slots // ids.shape[-1]], ids.reshape(-1, 1)[slots])
    return some.new_zeros(ids.numel(), some.shape[-1]).index_copy(0, slots, some)


def added_in_turn(
    outputs: Float[Tensor, "TK D"], ids: Int[Tensor, "T K"], weights: Float[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """The sum over slots of weight times output, added up one expert after another: as loops over experts round."""
    weighted = (outputs * weights.reshape(-1, 1)).to(outputs.dtype)
    total = outputs.new_zeros(len(ids), outputs.shape[-1])
    for _, slots in by_expert(ids):
        total = total.index_add(0, slots // ids.shape[-1], weighted[slots])
    return total


class Grouping:
    """Token-slots sorted by expert, and back."""

    def __init__(self, ids: Int[Tensor, "T K"], num_experts: int):
        self.slots = ids.shape[-1]
        self.ids, self.order = torch.sort(ids.reshape(-1))
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(self.order.numel(), device=ids.device)
        self.ends = _group_ends(self.ids, num_experts)

    def sort(self, hidden: Tensor) -> Tensor:
        """[T, ...] by token to [T*K, ...] by expert."""
        return hidden[self.order // self.slots]

    def shown(self, act: Tensor, on_act: OnAct | None) -> Tensor:
        """Neurons by expert after they were shown slot by slot."""
        return act if on_act is None else on_act(act[self.inverse])[self.order]


def _group_ends(ids_sorted: Int[Tensor, " N"], num_experts: int) -> Int[Tensor, " E"]:
    # Counting as grouped_mm counts: bincount would break CUDA graphs, and histc takes no integers on CPU.
    on_host = ids_sorted.device.type in ("cpu", "mps")
    histogram = torch.histc(ids_sorted.float() if on_host else ids_sorted.int(), num_experts, 0, num_experts - 1)
    return histogram.cumsum(dim=0, dtype=torch.int32)


LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_apply_gate")


@dataclass(frozen=True)
class Fused:
    """Experts as three-dimensional parameters.

    Attributes:
        has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm: as transformers names them.
        first, down: names of the two parameters; biases are called the same with ``_bias``.
        act: name of the activation module; None where the module's own ``_apply_gate`` (or ``act_fn``, without gate)
            is used.
        count: attribute that says how many experts there are.
    """

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    has_post_expert_norm: bool = False
    first: str = "gate_up_proj"
    down: str = "down_proj"
    act: str | None = None
    count: str = "num_experts"

    @classmethod
    def of(cls, experts: Any, path: str) -> "Fused":
        """What a module decorated by transformers' ``use_experts_implementation`` says of itself.

        Raises:
            UnsupportedModel: not such a module, of packed weights, or split over processes.
        """
        check_format(experts, path)
        missing = [name for name in LAYOUT if not hasattr(experts, name)]
        if missing:
            raise UnsupportedModel(
                f"cannot open the experts at {path}",
                expected="fused experts as transformers 5 builds them",
                got=f"{type(experts).__name__} without {', '.join(missing)}",
            )
        return cls(
            has_gate=experts.has_gate,
            has_bias=experts.has_bias,
            is_transposed=experts.is_transposed,
            is_concatenated=experts.is_concatenated,
            has_post_expert_norm=experts.has_post_expert_norm,
            first="gate_up_proj" if experts.has_gate else "up_proj",
        )

    def outputs(self, experts: Any, hidden: Tensor, ids: Tensor, on_act: OnAct | None = None) -> Tensor:
        """Unweighted outputs [T*K, D], slot by slot."""
        groups = Grouping(ids, _attribute(experts, self.count))
        with in_memory(experts):
            act = self._activate(experts, self._linear(experts, self.first, groups.sort(hidden), groups))
            out = self._linear(experts, self.down, groups.shown(act, on_act), groups)
            if self.has_post_expert_norm:
                out = experts.post_expert_norm(out)
        return out[groups.inverse]

    def _linear(self, experts: Any, name: str, rows: Tensor, groups: Grouping) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[groups.ids] if self.has_bias else None
        stored = matrices(experts, name, transposed=self.is_transposed, count=len(groups.ends))
        return stored.times(rows, groups.ends, bias)

    def _activate(self, experts: Any, projected: Tensor) -> Tensor:
        if self.act is not None:
            gate, up = projected.chunk(2, dim=-1)
            return getattr(experts, self.act)(gate) * up
        return experts._apply_gate(projected) if self.has_gate else experts.act_fn(projected)

    def weights(self, experts: Any, expert: int) -> ExpertWeights:
        """The matrices of one expert, detached and in one layout."""
        with in_memory(experts) as brought:
            first, down = (
                matrices(experts, name, transposed=self.is_transposed).full(expert).detach()
                for name in (self.first, self.down)
            )
            found = ExpertWeights(*self._split(first), down, *self._biases(experts, expert))
            # A view would keep the matrices of all experts in memory.
            return found.copied() if brought else found

    def _biases(self, experts: Any, expert: int) -> tuple[Any, ...]:
        if not self.has_bias:
            return ()
        first, down = (getattr(experts, f"{name}_bias")[expert].detach() for name in (self.first, self.down))
        return (*self._split(first), down)

    def _split(self, rows: Tensor) -> tuple[Any, Tensor]:
        if not self.has_gate:
            return None, rows
        if self.is_concatenated:
            half = rows.shape[0] // 2
            return rows[:half], rows[half:]
        return rows[::2], rows[1::2]


def _attribute(experts: Any, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(experts.get_submodule(owner), last)


@dataclass(frozen=True)
class Separate:
    """Experts that are modules of their own, in a ModuleList or a ModuleDict.

    Each expert's own forward is called on its tokens, so whatever it is made of (quantised or adapted linear maps, any
    activation) is what runs. Neurons are what its ``down`` is given, taken there by a hook, which `open` sets; once
    somebody looks at them, the expert is called a second time, with the neurons that came back.

    Attributes:
        up, down, gate: names of an expert's linear maps; ``gate`` is None where there is none.
        key: an expert's name in the container.
        stable: whether an expert gets its tokens in the order of the text, to the last bit of the result.
    """

    up: str
    down: str
    gate: str | None = None
    key: str = "{}"
    stable: bool = True

    def outputs(self, experts: Any, hidden: Tensor, ids: Tensor, on_act: OnAct | None = None) -> Tensor:
        """Unweighted outputs [T*K, D], slot by slot."""
        groups = by_expert(ids, self.stable)
        calls = [(self._expert(experts, expert), hidden[slots // ids.shape[-1]]) for expert, slots in groups]
        back = torch.cat([slots for _, slots in groups]).argsort()
        if on_act is None:
            return torch.cat([expert(rows) for expert, rows in calls])[back]
        acts = on_act(torch.cat([self._neurons(expert, rows) for expert, rows in calls])[back])
        given = [acts[slots] for _, slots in groups]
        return torch.cat([self._onwards(*call, act) for call, act in zip(calls, given, strict=True)])[back]

    def _expert(self, experts: Any, expert: int) -> Any:
        return experts.get_submodule(self.key.format(expert))

    def _neurons(self, expert: nn.Module, rows: Tensor) -> Tensor:
        seen: list[Tensor] = []
        self._call(expert, rows, lambda module, args: seen.append(args[0]))
        return seen[0]

    def _onwards(self, expert: nn.Module, rows: Tensor, act: Tensor) -> Tensor:
        return self._call(expert, rows, lambda module, args: (act,))

    def _call(self, expert: nn.Module, rows: Tensor, at_down: Callable[..., Any]) -> Tensor:
        return copy_context().run(self._called, expert, rows, at_down)

    def _called(self, expert: nn.Module, rows: Tensor, at_down: Callable[..., Any]) -> Tensor:
        _AT_DOWN.set((expert.get_submodule(self.down), at_down))
        return expert(rows)

    def open(self, experts: nn.Module) -> list[Callable[[], None]]:
        """Let the neurons of experts be met: what takes the hooks away again."""
        paths = [f"{name}.{self.down}" for name, _ in experts.named_children()]
        downs = [module for path, module in experts.named_modules() if path in paths]
        return [down.register_forward_pre_hook(_met_at_down).remove for down in downs]

    def weights(self, experts: Any, expert: int) -> ExpertWeights:
        """The matrices of one expert, detached."""
        one = self._expert(experts, expert)
        with in_memory(one) as brought:
            linears = [None if name is None else getattr(one, name) for name in (self.gate, self.up, self.down)]
            matrices = [None if linear is None else linear_weight(linear) for linear in linears]
            biases = [None if linear is None else _bias(linear) for linear in linears]
            found = ExpertWeights(*matrices, *biases)  # type: ignore[arg-type]
            return found.copied() if brought else found


# Set in the context of one call of an expert: its down-projection, and what is done there.
_AT_DOWN: ContextVar[tuple[nn.Module, Callable[..., Any]] | None] = ContextVar("moe_interp_at_down", default=None)


def _met_at_down(module: nn.Module, args: tuple[Any, ...]) -> Any:
    there = _AT_DOWN.get()
    return there[1](module, args) if there is not None and there[0] is module else None


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def by_expert(ids: Int[Tensor, "T K"], stable: bool = True) -> list[tuple[int, Tensor]]:
    """The experts that were chosen, each with the numbers of its token-slots."""
    flat = ids.reshape(-1)
    counts = flat.bincount().tolist()
    split = flat.argsort(stable=stable).split(counts)
    return [(expert, slots) for expert, slots in enumerate(split) if len(slots)]


@dataclass(frozen=True)
class Experts:
    """The experts of one layer as a function: any experts, on any input."""

    module: nn.Module
    num_experts: int
    kernel: Kernel
    before: Callable[[Tensor], Tensor]

    def __call__(self, hidden: Float[Tensor, "*rows D"], ids: Int[Tensor, "*rows K"]) -> Float[Tensor, "*rows K D2"]:
        """Unweighted outputs of the experts ``ids`` on ``hidden`` (as ``moe_in`` is), in the given slot order.

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
        rows = self.before(hidden.reshape(-1, hidden.shape[-1]))
        outputs = self.kernel.outputs(self.module, rows, ids.reshape(-1, ids.shape[-1]))
        return outputs.view(*ids.shape, outputs.shape[-1])


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
