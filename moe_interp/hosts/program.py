"""What edits and reads do to the values of a forward pass, wherever the values come from.

A host hands every value that `Program.wanted` names to the program, in the order of the forward pass, and goes on with
what it gets back. At each point: edits as given, then what the routing and the reads keep. So what is read is what the
model went on with.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moe_interp.adapters.spec import ModelSpec, MoESpec
from moe_interp.errors import BadInput
from moe_interp.hosts.tokens import tokens_at
from moe_interp.interventions.base import Edit, Intervention, layers_at
from moe_interp.interventions.together import check_together
from moe_interp.points import POINTS
from moe_interp.run import Context, Read, Routing, Tokens, TopTokens

_DECODED = 128  # values whose logits are held at a time
_CONTEXT = {
    "selection_scores": "choice", "selected_ids": "chosen", "expert_ids": "ids", "gate_weights": "weights"
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """Some rows of a batch under edits of their own.

    Attributes:
        edits: what is changed there.
        rows: which rows of the batch.
        texts: [rows], which texts of the whole batch they are.
        base: how many of the edits, the first ones, were checked in a run of the whole batch; these rows may be such
            as they never touch.
    """

    edits: Sequence[Intervention]
    rows: slice
    texts: Tensor
    base: int = 0


Edited = Sequence[Intervention] | Sequence[Block]
"""Edits for all rows of a batch, or for blocks of rows."""


class Program:
    """Edits and reads of a forward pass; `of_pass` makes those of several passes from one.

    Args:
        spec: what the model computes.
        edits: for all rows; or blocks, each with its own.
        reads: what to keep.
        on_path: whether what is read must lie on the way to the output, so that gradients reach it.
        rows: the tokens that a layer's mixture sees, [B, S] (None: all), by layer.
        decode: logits of a residual stream, for reads of most likely tokens.
        routing: whether the routing of all layers is kept, and not only what edits look at.

    Raises:
        UnknownName: an intervention or a read names something that the model does not have.
        BadInput: a point is read twice at one layer, or edited though it is read-only; edits contradict each other.
    """

    def __init__(
        self,
        spec: ModelSpec,
        edits: Edited,
        reads: Sequence[Read] = (),
        on_path: bool = False,
        rows: Callable[[int], Tensor | None] = lambda layer: None,
        decode: Callable[[Tensor], Tensor] | None = None,
        routing: bool = True,
    ):
        self.spec, self.on_path, self.rows, self.decode, self.keeps_routing = spec, on_path, rows, decode, routing
        blocks = [one for one in edits if isinstance(one, Block)]
        self.blocks: list[Block | None] = list(blocks) if blocks else [None]
        lists: list[Sequence[Any]] = [block.edits for block in blocks] if blocks else [edits]
        for some in lists:
            check_together(some, spec)
        self.interventions: list[Intervention] = [one for some in lists for one in some]
        self.edits: dict[tuple[str, int | None], list[tuple[int, Block | None, Edit]]] = {}
        numbers = iter(range(len(self.interventions)))
        self.checked: set[int] = set()
        for block, some in zip(self.blocks, lists, strict=True):
            for place, one in enumerate(some):
                number = next(numbers)
                if block is not None and place < block.base:
                    self.checked.add(number)
                for edit in one.edits(spec):
                    self.edits.setdefault((edit.point, edit.layer), []).append((number, block, edit))
        self.whose = {number: block for edits_there in self.edits.values() for number, block, _ in edits_there}
        self.adding = {layer for (_, layer), there in self.edits.items() if self._any_adds(there)}
        self.widths = {layer: k for one in self.interventions for layer, k in one.widths(spec).items()}
        self.exchanges = _composed(self.interventions, spec)
        if blocks and (self.widths or self.exchanges):
            raise BadInput("edits of some rows alone", expected="edits of values and routes", got="edits of modules")
        self.reads = resolve_reads(spec, reads)
        self.touched = [0] * len(self.interventions)
        self.values: dict[tuple[str, int | None], Tensor] = {}
        self.tops: dict[tuple[str, int | None], TopTokens] = {}
        self.contexts: dict[int | None, Context] = {}
        self.parts: dict[tuple[int | None, int], Context] = {}  # of a block at a layer
        self.known: Mapping[str, Tokens] = {}  # by stack, as far as the inputs of the model say

    def _any_adds(self, there: Sequence[tuple[int, Any, Edit]]) -> bool:
        return any(self.interventions[number].adds for number, _, _ in there)

    @cached_property
    def wanted(self) -> frozenset[tuple[str, int | None]]:
        """The points (and layers) whose values the program must be given."""
        edited = {layer for _, layer in (*self.edits, *self.reads)}
        layers = [layer for layer in self.spec.moe_layers if self.keeps_routing or layer in edited]
        routing = [(point, layer) for layer in layers for point in ("expert_ids", "gate_weights")]
        added = [("routed_out", layer) for layer in self.adding]
        return frozenset([*self.edits, *added, *routing, *self.reads])

    @property
    def dropping(self) -> set[int]:
        """Layers at which slots of weight 0 need no computing."""
        return {
            layer
            for (_, layer), there in self.edits.items()
            if layer is not None and any(self.interventions[number].drops for number, _, _ in there)
        }

    def of_pass(self, rows: Callable[[int], Tensor | None]) -> "Program":
        """The same edits and reads for one forward pass: what it leaves is not mixed with what another one does."""
        one = copy.copy(self)
        one.rows, one.touched, one.values, one.tops = rows, [0] * len(self.touched), {}, {}
        return one

    def begin(self, known: Mapping[str, Tokens], whole: bool = True) -> None:
        """Before every forward pass: which tokens are real, by stack; ``whole`` if these are all that there will be.

        Raises:
            BadInput: edits at positions that no text has.
        """
        self.known, self.contexts, self.parts = known, {}, {}
        if known and whole:
            self._check_positions(list(known.values()))

    def _check_positions(self, texts: Sequence[Tokens]) -> None:
        for number, one in enumerate(self.interventions):
            if number in self.checked:
                continue
            block = self.whose.get(number)
            one.check(texts if block is None else [tokens.of(block.rows, block.texts) for tokens in texts])

    def __call__(self, point: str, layer: int | None, value: Tensor) -> Tensor:
        """The value to go on with at a point."""
        if point == "routed_out" and layer in self.adding:
            value = self._added(layer, value)  # type: ignore[arg-type]
        value = self._edited(layer, value, self.edits.get((point, layer), ()))
        if layer is not None and point in _CONTEXT:
            setattr(self.context(layer, value), _CONTEXT[point], value)
        read = self.reads.get((point, layer))
        return value if read is None else self._keep(read, layer, value)

    def _edited(self, layer: int | None, whole: Tensor, edits: Sequence[tuple[int, Block | None, Edit]]) -> Tensor:
        value = whole
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

    def _added(self, layer: int, value: Tensor) -> Tensor:
        """With what experts without a slot were given to add."""
        for block in self.blocks:
            added = self._part(layer, value, block).added
            if not any(bool((one != 0).any()) for one in added.values()):
                continue
            value = value.clone()
            value[slice(None) if block is None else block.rows] += torch.stack([*added.values()]).sum(dim=0)
        return value

    def _keep(self, read: Read, layer: int | None, value: Tensor) -> Tensor:
        index = self._index(read, layer, value)
        kept = value.clone() if index is None else value.gather(1, index)
        if read.top is not None:
            self.tops[read.point, layer] = self._top_tokens(kept, read.top)
            return value
        self.values[read.point, layer] = kept
        if not self.on_path or not POINTS[read.point].differentiable:
            return value
        if not kept.requires_grad:
            kept.requires_grad_()  # all parameters before it are frozen
        # What is kept must lie on the way to the logits, or no gradient would ever reach it. The model goes on
        # with a copy, so that nothing it does in place can change what was read.
        return kept.clone() if index is None else value.scatter(1, index, kept)

    def _top_tokens(self, kept: Tensor, top: int) -> TopTokens:
        """Of a few values at a time, for their logits are large."""
        flat = kept.detach().flatten(0, -1 - (2 if self.spec.streams > 1 else 1))
        logprobs = [self.decode(some).float().log_softmax(dim=-1).topk(top) for some in flat.split(_DECODED)]  # type: ignore[misc]
        shape = (*kept.shape[: kept.dim() - flat.dim() + 1], top)
        ids, values = (torch.cat([one[number] for one in logprobs]).view(shape) for number in (1, 0))
        return TopTokens(ids, values)

    def _index(self, read: Read, layer: int | None, value: Tensor) -> Tensor | None:
        if read.positions is None:
            return None
        columns = self.context(layer, value).tokens.columns(read.positions)
        tail = value.shape[2:]
        return columns.view(*columns.shape, *[1] * len(tail)).expand(*columns.shape, *tail)

    def context(self, layer: int | None, value: Tensor) -> Context:
        """What edits at a layer may look at; made when the layer is first met in a forward pass."""
        if layer not in self.contexts:
            stack = self.spec.main_stack if layer is None else self.spec.layers[layer].stack
            tokens = tokens_at(self.known, stack, value)
            moe = None if layer is None else self.spec.layers[layer].moe
            weighs_output = moe is None or moe.weights_on == "output"
            k = None if moe is None else self.widths.get(layer, moe.top_k)  # type: ignore[arg-type]
            self.contexts[layer] = Context(layer, tokens, weighs_output=weighs_output, k=k)
        context = self.contexts[layer]
        if layer is not None:
            context.rows = self.rows(layer)
        return context

    def _part(self, layer: int | None, value: Tensor, block: Block | None) -> Context:
        """The context of a block of rows."""
        whole = self.context(layer, value)
        if block is None:
            return whole
        key = layer, block.rows.start
        if key not in self.parts:
            tokens = whole.tokens.of(block.rows, block.texts)
            self.parts[key] = Context(layer, tokens, weighs_output=whole.weighs_output, k=whole.k)
        part = self.parts[key]
        part.ids, part.weights, part.rows = (
            None if one is None else one[block.rows] for one in (whole.ids, whole.weights, whole.rows)
        )
        return part

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
        seen = seen_by(self.spec.moe(layer), context.tokens.mask, context.rows, context.weights)
        logits, scores = (self._whole(name, layer) for name in ("router_logits", "router_scores"))
        added = nonzero(context.added)
        return Routing(context.ids, context.weights, seen, logits, scores, context.weighs_output, added)

    def _whole(self, point: str, layer: int) -> Tensor | None:
        """What was read at all positions."""
        read = self.reads.get((point, layer))
        return self.values.get((point, layer)) if read is not None and read.positions is None else None


def seen_by(moe: MoESpec, mask: Tensor, rows: Tensor | None, weights: Tensor) -> Tensor:
    """[B, S], the real tokens that a mixture sees (``rows``; None: all) and that take an expert there."""
    seen = mask if rows is None else mask & rows
    return seen & (weights != 0).any(dim=-1) if moe.skips else seen


def nonzero(added: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Those that add anything."""
    return {expert: value for expert, value in added.items() if bool((value != 0).any())}


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
            if read.top is not None:
                _check_decodes(spec, read.point, layer)
                _check_top(spec, read.top)
            if (read.point, layer) in wanted:
                raise BadInput(
                    f"{read.point!r} is read twice at layer {layer}", expected="one read of a point at a layer"
                )
            wanted[read.point, layer] = read
    return wanted


def _check_decodes(spec: ModelSpec, point: str, layer: int | None) -> None:
    narrow = layer is not None and (moe := spec.layers[layer].moe) and moe.routed_steps and point.startswith("expert")
    decodes = spec.final is not None and spec.unembed is not None and spec.predicts_tokens
    if not POINTS[point].dims.endswith("D") or narrow or not decodes:
        raise BadInput(
            f"{point!r} cannot be read as tokens",
            expected="values of the residual stream's space, of a model with an unembedding",
            got=f"{POINTS[point].dims} of {spec.gives}",
        )


def _check_top(spec: ModelSpec, top: int) -> None:
    if top > spec.vocab_size:
        raise BadInput(
            f"no {top} most likely tokens", expected=f"at most {spec.vocab_size}, the vocabulary", got=f"top={top}"
        )
