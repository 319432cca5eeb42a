"""Edits and reads, hooked to a host's points for as long as a forward pass (or a generation) takes.

The hooks of a point run in the order: edits as given, then what the routing and the reads keep. So what is read is
what the model went on with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.adapters import ModelSpec
from moe_interp.errors import BadInput
from moe_interp.hosts.local import LocalHost
from moe_interp.interventions import Edit, Intervention, check_together
from moe_interp.interventions.base import layers_at
from moe_interp.points import POINTS
from moe_interp.run import Context, Read, Routing, Tokens


@dataclass(frozen=True)
class Block:
    """Some rows of a batch under edits of their own.

    Attributes:
        edits: what is changed there.
        rows: which rows of the batch.
        texts: [rows], which texts of the whole batch they are.
    """

    edits: Sequence[Intervention]
    rows: slice
    texts: Tensor


class Session:
    """One or more forward passes under the same edits.

    Args:
        host: the opened model.
        edits: for all rows; or blocks, each with its own.
        reads: what to keep.
        grad: whether to keep the graph; None: as it is outside.

    Raises:
        UnknownName: an intervention or a read names something that the model does not have.
        BadInput: a point is read twice at one layer, or edited though it is read-only; edits contradict each other.
    """

    def __init__(
        self,
        host: LocalHost,
        edits: Sequence[Intervention] | Sequence[Block],
        reads: Sequence[Read] = (),
        grad: bool | None = False,
    ):
        self.host, self.spec, self.grad = host, host.spec, grad
        blocks = [one for one in edits if isinstance(one, Block)]
        self.blocks: list[Block | None] = list(blocks) if blocks else [None]
        lists: list[Sequence[Any]] = [block.edits for block in blocks] if blocks else [edits]
        for some in lists:
            check_together(some, self.spec)
        self.interventions: list[Intervention] = [one for some in lists for one in some]
        numbers = iter(range(len(self.interventions)))
        self.edits = [
            (next(numbers), block, one.edits(self.spec))
            for block, some in zip(self.blocks, lists, strict=True)
            for one in some
        ]
        self.widths = {layer: k for one in self.interventions for layer, k in one.widths(self.spec).items()}
        self.exchanges = _composed(self.interventions, self.spec)
        if blocks and (self.widths or self.exchanges):
            raise BadInput("edits of some rows alone", expected="edits of values and routes", got="edits of modules")
        self.reads = resolve_reads(self.spec, reads)
        self.touched = [0] * len(self.interventions)
        self.paused = False
        self.values: dict[tuple[str, int | None], Tensor] = {}
        self.contexts: dict[int | None, Context] = {}
        self.parts: dict[tuple[int | None, int], Context] = {}  # of a block at a layer
        self.known: dict[str, Tokens] = {}  # by stack, as far as the inputs of the model say

    @contextmanager
    def __call__(self) -> Iterator["Session"]:
        """Hook everything inside the ``with``."""
        grad = torch.is_grad_enabled() if self.grad is None else self.grad
        with ExitStack() as stack, torch.set_grad_enabled(grad), torch.compiler.set_stance("force_eager"):
            stack.enter_context(self.host.widened(self.widths))
            stack.enter_context(self.host.exchanged(self.exchanges))
            stack.enter_context(self.host.dropping(self._dropping()))
            entry = self.host.hf.get_submodule(self.spec.entry)
            handle = entry.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(handle.remove)
            for point, layer, hook in self._hooks():
                stack.callback(self.host.point(point, layer).register_forward_hook(hook).remove)
            yield self

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave values as they are inside the ``with``."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def _dropping(self) -> set[int]:
        """Layers at which slots of weight 0 need no computing."""
        return {
            edit.layer
            for number, _, edits in self.edits
            for edit in edits
            if self.interventions[number].drops and edit.layer is not None
        }

    @property
    def tokens(self) -> Tokens:
        """The tokens of the stack that gives the output, in the last forward pass.

        Raises:
            BadInput: the model's layers did not run.
        """
        main = self.spec.main_stack
        there = [self.contexts[layer.index] for layer in self.spec.layers if layer.index in self.contexts]
        if main in self.known:
            return self.known[main]
        if there:  # inputs without tokens: only the layers say how many positions there are
            self._check_positions([context.tokens for context in there])
        for context in there:
            if context.layer is not None and self.spec.layers[context.layer].stack == main:
                return context.tokens
        raise BadInput("no layer ran", expected="a whole forward pass")

    def routing(self) -> dict[int, Routing]:
        """The routing of every MoE layer whose experts ran in the last forward pass."""
        ran = [layer for layer in self.spec.moe_layers if layer in self.contexts]
        return {layer: self._routing(layer) for layer in ran}

    def _routing(self, layer: int) -> Routing:
        context = self.contexts[layer]
        if context.ids is None or context.weights is None:
            raise BadInput(f"the experts of layer {layer} did not run", expected="a whole forward pass")
        whole = {name: self.values.get((name, layer)) for name in ("router_logits", "router_scores")}
        full = {
            name: value if value is not None and value.shape[1] == context.ids.shape[1] else None
            for name, value in whole.items()
        }
        seen = context.tokens.mask if context.rows is None else context.tokens.mask & context.rows
        if self.spec.moe(layer).skips:
            seen = seen & (context.weights != 0).any(dim=-1)
        logits, scores = full["router_logits"], full["router_scores"]
        return Routing(context.ids, context.weights, seen, logits, scores, context.weighs_output)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every forward pass: which tokens are real, and a fresh context for every layer."""
        if self.paused:
            return
        self.known, self.contexts, self.parts = _tokens(self.spec, args, kwargs), {}, {}
        if self.known and kwargs.get("past_key_values") is None:
            self._check_positions(list(self.known.values()))

    def _check_positions(self, texts: Sequence[Tokens]) -> None:
        """Refuse edits at positions that no text has."""
        for number, block, _ in self.edits:
            seen = texts if block is None else [tokens.of(block.rows, block.texts) for tokens in texts]
            self.interventions[number].check(seen)

    def _context(self, layer: int | None, value: Tensor) -> Context:
        """What edits at a layer may look at; made when the layer is first met in a forward pass."""
        if layer not in self.contexts:
            stack = self.spec.main_stack if layer is None else self.spec.layers[layer].stack
            tokens = self.known.get(stack)
            if tokens is None or tokens.mask.shape != value.shape[:2]:
                tokens = Tokens.from_mask(value.new_ones(value.shape[:2]), value.shape[1])
            moe = None if layer is None else self.spec.layers[layer].moe
            self.contexts[layer] = Context(layer, tokens, weighs_output=moe is None or moe.weights_on == "output")
        context = self.contexts[layer]
        if layer is not None:
            context.rows = self.host.taps[layer].rows
        return context

    def _part(self, layer: int | None, value: Tensor, block: Block | None) -> Context:
        """The context of a block of rows."""
        whole = self._context(layer, value)
        if block is None:
            return whole
        key = layer, block.rows.start
        if key not in self.parts:
            tokens = whole.tokens.of(block.rows, block.texts)
            self.parts[key] = Context(layer, tokens, weighs_output=whole.weighs_output)
        part = self.parts[key]
        part.ids, part.weights, part.rows = (
            None if one is None else one[block.rows] for one in (whole.ids, whole.weights, whole.rows)
        )
        return part

    def _hooks(self) -> Iterator[tuple[str, int | None, Callable[..., Any]]]:
        adding = {edit.layer for number, _, edits in self.edits for edit in edits if self.interventions[number].adds}
        for layer in adding:
            yield "routed_out", layer, self._adding_hook(layer)
        at: dict[tuple[str, int | None], list[tuple[int, Block | None, Edit]]] = {}
        for number, block, edits in self.edits:
            for edit in edits:
                at.setdefault((edit.point, edit.layer), []).append((number, block, edit))
        for (point, one), edits_there in at.items():
            yield point, one, self._edit_hook(one, edits_there)
        for layer in self.spec.moe_layers:
            yield "expert_ids", layer, self._context_hook(layer, "ids")
            yield "gate_weights", layer, self._context_hook(layer, "weights")
        for (point, one), read in self.reads.items():
            yield point, one, self._read_hook(point, one, read)

    def _edit_hook(self, layer: int | None, edits: Sequence[tuple[int, Block | None, Edit]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor | None:
            if self.paused:
                return None
            whole = value
            for number, block, edit in edits:
                context = self._part(layer, value, block)
                change = edit.fn(whole if block is None else whole[block.rows], context)
                self.touched[number] += change.touched
                if block is None:
                    whole = change.value
                    continue
                whole = whole.clone() if whole is value else whole
                whole[block.rows] = change.value
            return whole

        return hook

    def _adding_hook(self, layer: int | None) -> Callable[..., Any]:
        """Add what experts without a slot were given to add."""

        def hook(module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor | None:
            if self.paused:
                return None
            for block in self.blocks:
                added = self._part(layer, value, block).added
                if not any(bool((one != 0).any()) for one in added.values()):
                    continue
                value = value.clone()
                value[slice(None) if block is None else block.rows] += torch.stack([*added.values()]).sum(dim=0)
            return value

        return hook

    def _context_hook(self, layer: int, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], value: Tensor) -> None:
            if not self.paused:
                setattr(self._context(layer, value), name, value)

        return hook

    def _read_hook(self, point: str, layer: int | None, read: Read) -> Callable[..., Any]:
        on_path = bool(self.grad) and POINTS[point].differentiable

        def hook(module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor | None:
            if self.paused:
                return None
            index = self._index(read, layer, value)
            kept = value.clone() if index is None else value.gather(1, index)
            self.values[point, layer] = kept
            if not on_path:
                return None
            if not kept.requires_grad:
                kept.requires_grad_()  # all parameters before it are frozen
            # What is kept must lie on the way to the logits, or no gradient would ever reach it. The model goes on
            # with a copy, so that nothing it does in place can change what was read.
            return kept.clone() if index is None else value.scatter(1, index, kept)

        return hook

    def _index(self, read: Read, layer: int | None, value: Tensor) -> Tensor | None:
        if read.positions is None:
            return None
        columns = self._context(layer, value).tokens.columns(read.positions)
        tail = value.shape[2:]
        return columns.view(*columns.shape, *[1] * len(tail)).expand(*columns.shape, *tail)


def _composed(interventions: Sequence[Intervention], spec: ModelSpec) -> dict[int, int]:
    """Whose experts run at each layer, after all exchanges in order."""
    whose: dict[int, int] = {}
    for one in interventions:
        change = one.exchanges(spec)
        whose |= {layer: whose.get(other, other) for layer, other in change.items()}
    return {layer: other for layer, other in whose.items() if layer != other}


def resolve_reads(spec: ModelSpec, reads: Sequence[Read]) -> dict[tuple[str, int | None], Read]:
    """Every (point, layer) to keep, with the read that asked for it.

    Raises:
        UnknownName: no such point or layer.
        BadInput: the same point is asked for twice at one layer.
    """
    wanted: dict[tuple[str, int | None], Read] = {}
    for read in reads:
        for layer in layers_at(spec, read.point, read.layers):
            if (read.point, layer) in wanted:
                raise BadInput(
                    f"{read.point!r} is read twice at layer {layer}", expected="one read of a point at a layer"
                )
            wanted[read.point, layer] = read
    return wanted


def _tokens(spec: ModelSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tokens]:
    """The tokens of each stack, as far as the model's inputs say."""
    if spec.kind == "other":
        return {}
    found: dict[str, Tokens] = {}
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    crossed = spec.kind == "encoder-decoder"
    if given is not None:
        stack = "encoder" if crossed else spec.main_stack
        found[stack] = _masked(given, kwargs.get("attention_mask"), {} if crossed else kwargs)
    target = kwargs.get("decoder_input_ids")
    if target is not None:
        found["decoder"] = _masked(target, None, kwargs)
    return found


def _masked(given: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tokens:
    batch, length = given.shape[:2]
    if mask is None:
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        mask = torch.ones(batch, past + length, dtype=torch.bool, device=given.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise BadInput(
            "cannot tell real tokens from padding",
            expected="an attention mask of shape [batch, pos]",
            got=f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__,
        )
    return Tokens.from_mask(mask, length)
