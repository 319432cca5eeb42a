"""Edits and reads, hooked to a host's points for as long as a forward pass (or a generation) takes.

The hooks of a point run in the order: edits as given, then what the routing and the reads keep. So what is read is
what the model went on with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.adapters import ModelSpec
from moe_interp.errors import BadInput
from moe_interp.hosts.local import LocalHost
from moe_interp.interventions import Edit, Intervention
from moe_interp.interventions.base import layers_at
from moe_interp.points import POINTS
from moe_interp.run import Context, Read, Routing, Tokens


class Session:
    """One or more forward passes under the same edits.

    Raises:
        UnknownName: an intervention or a read names something that the model does not have.
        BadInput: a point is read twice at one layer, or edited though it is read-only.
    """

    def __init__(self, host: LocalHost, edits: Sequence[Intervention], reads: Sequence[Read], grad: bool = False):
        self.host, self.spec, self.grad = host, host.spec, grad
        self.edits = [(number, edit) for number, one in enumerate(edits) for edit in one.edits(self.spec)]
        self.widths = {layer: k for one in edits for layer, k in one.widths(self.spec).items()}
        self.reads = resolve_reads(self.spec, reads)
        self.positions = [getattr(one, "positions", None) for one in edits]
        self.touched = [0] * len(edits)
        self.values: dict[tuple[str, int | None], Tensor] = {}
        self.contexts: dict[int | None, Context] = {}
        self.known: dict[str, Tokens] = {}  # by stack, as far as the inputs of the model say

    @contextmanager
    def __call__(self) -> Iterator["Session"]:
        """Hook everything inside the ``with``."""
        with ExitStack() as stack, torch.set_grad_enabled(self.grad), torch.compiler.set_stance("force_eager"):
            stack.enter_context(self.host.widened(self.widths))
            entry = self.host.hf.get_submodule(self.spec.entry)
            handle = entry.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(handle.remove)
            for point, layer, hook in self._hooks():
                stack.callback(self.host.point(point, layer).register_forward_hook(hook).remove)
            yield self

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
        return Routing(context.ids, context.weights, seen, full["router_logits"], full["router_scores"])

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every forward pass: which tokens are real, and a fresh context for every layer."""
        self.known, self.contexts = _tokens(self.spec, args, kwargs), {}
        if self.known and kwargs.get("past_key_values") is None:
            self._check_positions(list(self.known.values()))

    def _check_positions(self, texts: Sequence[Tokens]) -> None:
        """Refuse edits at positions that no text has."""
        for positions in self.positions:
            if positions is None:
                continue
            missed = [at for at in positions if not any(tokens.at((at,)).any() for tokens in texts)]
            if missed:
                longest = max(int(tokens.mask.sum(1).max()) for tokens in texts)
                raise BadInput(
                    "an edit can never touch anything",
                    expected=f"positions within the {longest} tokens of the longest text",
                    got=f"positions {missed}",
                )

    def _context(self, layer: int | None, value: Tensor) -> Context:
        """What edits at a layer may look at; made when the layer is first met in a forward pass."""
        if layer not in self.contexts:
            stack = self.spec.main_stack if layer is None else self.spec.layers[layer].stack
            tokens = self.known.get(stack)
            if tokens is None or tokens.mask.shape != value.shape[:2]:
                tokens = Tokens.from_mask(value.new_ones(value.shape[:2]), value.shape[1])
            self.contexts[layer] = Context(layer, tokens)
        return self.contexts[layer]

    def _hooks(self) -> Iterator[tuple[str, int | None, Callable[..., Any]]]:
        for number, edit in self.edits:
            yield edit.point, edit.layer, self._edit_hook(number, edit)
        for layer in self.spec.moe_layers:
            yield "expert_ids", layer, self._context_hook(layer, "ids")
            yield "gate_weights", layer, self._context_hook(layer, "weights")
        for (point, at), read in self.reads.items():
            yield point, at, self._read_hook(point, at, read)

    def _edit_hook(self, number: int, edit: Edit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor:
            change = edit.fn(value, self._context(edit.layer, value))
            self.touched[number] += change.touched
            return change.value

        return hook

    def _context_hook(self, layer: int, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], value: Tensor) -> None:
            context = self._context(layer, value)
            context.rows = self.host.taps[layer].rows
            setattr(context, name, value)

        return hook

    def _read_hook(self, point: str, layer: int | None, read: Read) -> Callable[..., Any]:
        on_path = self.grad and POINTS[point].differentiable

        def hook(module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor | None:
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
