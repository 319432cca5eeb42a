"""What goes into and comes out of one instrumented forward pass.

`Tokens` says which positions are real, `Read` which values to keep, `Context` what an edit may look at, `Routing` and
`Run` what came out. Positions count real tokens: 0 is the first, -1 the last, wherever the padding is.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_interp.arguments import Count, Number, Otherwise, checked, described, index
from moe_interp.errors import BadInput, UnknownName
from moe_interp.points import ranges

Indices = Annotated[
    SupportsIndex | Iterable[SupportsIndex] | None,
    Otherwise("Marks of tokens, which are True or False, are given as tokens=."),
]
"""Layers or positions as they may be given: one, several, or None for all."""


def counted(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def positions_of(positions: Indices) -> tuple[int, ...] | None:
    """Positions as a tuple; None stays None and means all."""
    if positions is None:
        return None
    try:
        return (index(positions),)
    except TypeError:
        pass
    try:
        found = tuple(index(position) for position in positions)  # type: ignore[union-attr]
    except TypeError as error:
        do = "Marks of tokens, which are True or False, are given as tokens=."
        raise BadInput("not layers or positions", expected="whole numbers", got=repr(positions), do=do) from error
    if not found:
        raise BadInput("no layers or positions", expected="at least one, or None for all", got=repr(positions))
    return found


@dataclass(frozen=True, repr=False)
class Tokens:
    """Which entries of a padded batch are real tokens, and how they are numbered.

    Attributes:
        mask: [B, S], True at real tokens.
        index: [B, S], the number of each real token in its text; with a KV cache this goes on from the cached ones.
        numbers: [B], which texts of a larger batch these are; None: all of it.
        prefixes: [B, S], a number that stands for the text up to each token; None for inputs without ids.
        beginning_known: False where the tokens follow cached ones of which the ids were not seen.
    """

    mask: Bool[Tensor, "B S"]
    index: Int[Tensor, "B S"]
    numbers: Int[Tensor, " B"] | None = None
    prefixes: Int[Tensor, "B S"] | None = None
    beginning_known: bool = True

    def __repr__(self) -> str:
        texts, longest = self.mask.shape
        lengths = self.mask.sum(dim=1).tolist()
        real = f"{min(lengths)} to {max(lengths)}" if len(set(lengths)) > 1 else str(lengths[0])
        return f"Tokens of {counted(texts, 'text')}, {counted(longest, 'position')}: {real} real ones in each"

    @classmethod
    def from_mask(cls, attention_mask: Tensor, length: int) -> "Tokens":
        """From an attention mask over cached and current tokens, of which the last ``length`` are current."""
        mask = attention_mask.bool()
        return cls(mask[:, -length:], (mask.long().cumsum(1) - 1)[:, -length:])

    @property
    def texts(self) -> Int[Tensor, " B"]:
        """[B], the number of each text in the whole batch."""
        return torch.arange(len(self.mask), device=self.mask.device) if self.numbers is None else self.numbers

    @property
    def whose(self) -> Int[Tensor, "B S"]:
        """[B, S], the key of each token's random draws: its text up to it, or (text, position) if there are no ids.

        Raises:
            BadInput: the tokens follow cached ones of which the ids were not seen.
        """
        if not self.beginning_known:
            raise BadInput(
                "random draws for a text whose beginning is unknown",
                expected="a cache that was filled under edits of this model, so that its token ids were seen",
                got="one that was filled otherwise, or of which the rows were changed by hand",
                do="Run the whole text, or fill the cache inside `with model.edit(...)`.",
            )
        return (self.texts[:, None] << 32) + self.index if self.prefixes is None else self.prefixes

    def of(self, rows: slice, numbers: Int[Tensor, " b"]) -> "Tokens":
        """Those of some rows, which are texts ``numbers`` of the whole batch."""
        prefixes = None if self.prefixes is None else self.prefixes[rows]
        return Tokens(self.mask[rows], self.index[rows], numbers, prefixes, self.beginning_known)

    def at(self, positions: tuple[int, ...] | None) -> Bool[Tensor, "B S"]:
        """[B, S], True at the given positions of every text (at all real tokens for None)."""
        if positions is None:
            return self.mask
        seen = (self.index.max(dim=1, keepdim=True).values + 1).expand_as(self.index)
        hit = torch.zeros_like(self.mask)
        for position in positions:
            hit |= self.index == (position if position >= 0 else seen + position)
        return hit & self.mask

    def columns(self, positions: tuple[int, ...]) -> Int[Tensor, "B P"]:
        """[B, P], the column of each position in each text.

        Raises:
            BadInput: a text is too short to have one of the positions.
        """
        found = torch.stack([self._column(position) for position in positions], dim=1)
        return found

    def _column(self, position: int) -> Int[Tensor, " B"]:
        hit = self.at((position,))
        short = (~hit.any(dim=1)).nonzero().flatten().tolist()
        if short:
            length = int(self.mask[short[0]].sum())
            raise BadInput(
                f"no position {position} in text {short[0]}",
                expected=f"a position from {-length} to {length - 1}",
                got=str(position),
            )
        return hit.int().argmax(dim=1)


@dataclass(frozen=True, repr=False)
class Read:
    """Which values of a point to keep: at these layers and positions (None: all).

    With ``top``, not the values but the tokens that they say are most likely.
    """

    point: str
    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    top: int | None = None

    def __repr__(self) -> str:
        layers, places = self.layers, self.positions
        where = "all its layers" if layers is None else f"layer{'s' * (len(layers) > 1)} {ranges(layers)}"
        some = () if places is None else places
        when = f"position{'s' * (len(some) > 1)} {', '.join(map(str, some))}" if some else "all positions"
        told = f"Read({self.point} at {where}, {when}"
        return told + (f", as the {self.top} most likely tokens)" if self.top else ")")


class TopTokens(NamedTuple):
    """The most likely tokens of values decoded by the model's own final norm and unembedding, likeliest first.

    Attributes:
        ids: [..., top].
        logprobs: [..., top], in nats.
    """

    ids: Tensor
    logprobs: Tensor

    def __repr__(self) -> str:
        rows, top = self.ids.shape[:-1], self.ids.shape[-1]
        return f"TopTokens: ids and logprobs of the {top} most likely at each of {list(rows)}"


@checked
def select(point: str, *, layers: Indices = None, positions: Indices = None, top: Count | None = None) -> Read:
    """Keep only part of a point's values: ``read=[moe.select("expert_out", layers=[5], positions=-1)]``.

    With ``top=5`` what is kept are `TopTokens`, the five most likely tokens of the logit lens (nostalgebraist 2020) at
    each value of a point in the residual stream's space, [..., D]. They take little memory, and little of a network.

    Raises:
        BadInput: arguments of another kind, or ``top`` below 1.
    """
    kept = None if top is None else operator.index(top)
    return Read(point, positions_of(layers), positions_of(positions), kept)


@dataclass
class Context:
    """What an edit may look at besides the value it changes.

    Attributes:
        layer: the layer of the point (None for a point of the whole model).
        tokens: which entries are real.
        ids, weights: [B, S, K], the layer's experts and combine weights, once they are known (after edits of them).
        rows: [B, S], True at the tokens that the layer's mixture sees; None: all.
        weighs_output: whether weights multiply outputs, not inputs of experts.
        choice, chosen: [B, S, E] and [B, S, K], what the router chose by and whom (after edits of them), where edits
            are in its choice.
        k: how many experts the layer's router chooses.
        added: [B, S, D] by expert, what interventions add to ``routed_out`` in an expert's name where it has no slot.
    """

    layer: int | None
    tokens: Tokens
    ids: Int[Tensor, "B S K"] | None = None
    weights: Float[Tensor, "B S K"] | None = None
    rows: Bool[Tensor, "B S"] | None = None
    weighs_output: bool = True
    choice: Float[Tensor, "B S E"] | None = None
    chosen: Int[Tensor, "B S K"] | None = None
    k: int | None = None
    added: dict[int, Tensor] = field(default_factory=dict)

    @property
    def seen(self) -> Bool[Tensor, "B S"]:
        """[B, S], the real tokens that the layer's mixture sees."""
        return self.tokens.mask if self.rows is None else self.tokens.mask & self.rows

    def slots_of(self, experts: Sequence[int] | None) -> Bool[Tensor, "B S K"]:
        """[B, S, K], True where a slot of a token that the mixture sees holds one of these experts (None: any)."""
        if self.ids is None:
            raise BadInput(
                "no experts chosen yet at this point", expected="a point after expert_ids", got="an earlier one"
            )
        if experts is None:
            return self.seen[..., None].expand_as(self.ids)
        return torch.isin(self.ids, torch.tensor(experts, device=self.ids.device)) & self.seen[..., None]


@dataclass(frozen=True, repr=False)
class Routing:
    """Who was routed where at one layer.

    Attributes:
        ids, weights: [B, S, K], experts and combine weights, in the order of the model (not always by weight).
        mask: [B, S], True at real tokens that the layer's mixture sees: not those of another modality, nor those that
            a router lets skip all experts.
        logits, scores: [B, S, E], if ``router_logits`` or ``router_scores`` were read at all positions.
        weighs_output: whether weights multiply outputs, not inputs of experts.
        added: [B, S, D] by expert, what interventions added to ``routed_out`` in its name where it has no slot.
    """

    ids: Int[Tensor, "B S K"]
    weights: Float[Tensor, "B S K"]
    mask: Bool[Tensor, "B S"]
    logits: Float[Tensor, "B S E"] | None = None
    scores: Float[Tensor, "B S E"] | None = None
    weighs_output: bool = True
    added: Mapping[int, Float[Tensor, "B S D"]] = field(default_factory=dict)

    def __repr__(self) -> str:
        texts, longest, slots = self.ids.shape
        sizes = f"{counted(texts, 'text')}, {counted(longest, 'position')}, {counted(slots, 'slot')}"
        scores = self.logits if self.scores is None else self.scores
        too = [name for name in ("logits", "scores") if getattr(self, name) is not None]
        more = "" if scores is None else f"; {', '.join(too)} [{texts}, {longest}, {scores.shape[-1]}]"
        return f"Routing of {sizes}: ids, weights {[texts, longest, slots]}, mask {[texts, longest]}{more}"

    @checked
    def slots_of(self, expert: Number) -> Bool[Tensor, "B S K"]:
        """[B, S, K], the slots that hold an expert."""
        return (self.ids == expert) & self.mask[..., None]

    @checked
    def uses(self, expert: Number) -> Bool[Tensor, "B S"]:
        """[B, S], tokens at which an expert has a slot, or was given a contribution without one."""
        used = self.slots_of(expert).any(dim=-1)
        return used | (self.added[expert] != 0).any(dim=-1) if expert in self.added else used

    @checked
    def check_expert(self, layer: int, expert: int) -> None:
        """Refuse what cannot be an expert of the layer, whose number of experts scores tell, if they were read.

        Raises:
            UnknownName: no such expert.
        """
        scores = self.logits if self.scores is None else self.scores
        count = None if scores is None else scores.shape[-1]
        if expert < 0 or (count is not None and expert >= count):
            there = "on" if count is None else f"to {count - 1}"
            raise UnknownName(
                f"unknown expert {expert} at layer {layer}", expected=f"an expert from 0 {there}", got=str(expert)
            )

    def by_rank(self) -> Int[Tensor, "B S K"]:
        """[B, S, K], the slots from the heaviest to the lightest."""
        return self.weights.argsort(dim=-1, descending=True, stable=True)


class Routings(dict[int, Routing]):
    """The routing of every MoE layer, by its number."""

    def __missing__(self, layer: Any) -> Routing:
        raise UnknownName(f"no routing of layer {layer}", expected=f"an MoE layer of {list(self)}", got=repr(layer))

    def __repr__(self) -> str:
        if not self:
            return "no routing"
        kinds: dict[str, list[int]] = {}
        for layer, routing in self.items():
            kinds.setdefault(repr(routing), []).append(layer)
        return "\n".join(f"layer{'s' * (len(layers) > 1)} {ranges(layers)}: {kind}" for kind, layers in kinds.items())


def _run_instead(given: Any) -> str | None:
    return "Make one: model.run(text, read=[...])." if hasattr(given, "run") or isinstance(given, str) else None


@described("a run", _run_instead)
@dataclass(repr=False)
class Run:
    """One forward pass: logits, the points read, the routing of every MoE layer.

    ``run["expert_out", 5]`` is the value of a point at a layer, ``run["embed"]`` that of a point of the whole model.

    Attributes:
        kept: what the model gave, if it was to be kept; ``output`` and ``logits`` give it.
        token_ids: [B, S] (None when the model was given embeddings).
        tokens: which positions are real.
        routing: by MoE layer.
        touched: for each intervention, in the order given, how many values (token-slots, tokens) it changed.
        provenance: what was run on what, with which versions.
        tops: what was read as most likely tokens; ``top_tokens`` gives them.
        places: positions of what was read at some only.
    """

    kept: Float[Tensor, "*rows V"] | None
    token_ids: Int[Tensor, "B S"] | None
    tokens: Tokens
    routing: Mapping[int, Routing]
    values: Mapping[tuple[str, int | None], Tensor]
    touched: tuple[int, ...] = ()
    provenance: Mapping[str, str | int | float] = field(default_factory=dict)
    has_head: bool = True
    tops: Mapping[tuple[str, int | None], TopTokens] = field(default_factory=dict)
    places: Mapping[tuple[str, int | None], tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.routing = Routings(self.routing)

    def __repr__(self) -> str:
        texts, longest = self.mask.shape
        layers: dict[str, list[int]] = {}
        for name, layer in (*self.values, *self.tops):
            layers.setdefault(name, []).extend([] if layer is None else [layer])
        read = [f"{name} at layers {ranges(sorted(at))}" if at else name for name, at in layers.items()]
        told = f"Run of {counted(texts, 'text')}, {counted(longest, 'position')}, read: {', '.join(read) or 'nothing'}"
        return told + (f", touched: {self.touched}" if self.touched else "")

    @property
    def output(self) -> Float[Tensor, "*rows V"]:
        """What the model gave: logits [B, S, V]; of a model without a head its last hidden states [B, S, D].

        Of a classifier, its scores: [B, S, labels] of one of tokens (answers in a text: their starts and ends), and
        [B, labels] of one of texts.

        Raises:
            BadInput: it was not kept.
        """
        if self.kept is None:
            raise BadInput("no output", expected="one that was kept", got="a run with output=False")
        return self.kept

    @property
    def logits(self) -> Float[Tensor, "*rows V"]:
        """[B, S, V]; of a classifier as `output` has them.

        Raises:
            BadInput: the model has no head.
        """
        if not self.has_head:
            raise BadInput(
                "no logits", expected="a model with a head", got="one that returns hidden states", do="Use run.output."
            )
        return self.output

    @property
    def mask(self) -> Bool[Tensor, "B S"]:
        """[B, S], True at real tokens."""
        return self.tokens.mask

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        point, layer = (key, None) if isinstance(key, str) else key
        return _found(self.values, point, layer)

    @checked
    def whole(self, point: str, layer: int | None = None) -> Tensor:
        """The value of a point at all positions.

        Raises:
            UnknownName: it was not read.
            BadInput: it was read at some positions only.
        """
        value = _found(self.values, point, layer)
        if (point, layer) in self.places:
            where = "" if layer is None else f" of layer {layer}"
            got = f"positions {self.places[point, layer]}"
            raise BadInput(f"{point}{where} was read in part", expected="a read without positions", got=got)
        return value

    @checked
    def top_tokens(self, point: str, layer: int | None = None) -> TopTokens:
        """The most likely tokens at a point that was read with ``moe.select(..., top=...)``.

        Raises:
            UnknownName: it was not.
        """
        return _found(self.tops, point, layer)

    @checked
    def expert(self, layer: int, expert: int) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
        """Unweighted output of one expert, zero where it did not run, and the mask of tokens that used it.

        Raises:
            UnknownName: ``expert_out`` was not read at this layer; or no such expert, if the router's logits or scores
                were read there too (else none has such tokens), or a negative one.
            BadInput: it was read at some positions only.
        """
        outputs, routing = self.whole("expert_out", layer), self.routing[layer]
        routing.check_expert(layer, expert)
        slots = routing.slots_of(expert)
        used = slots.any(dim=2)
        # An edit may have put an expert into several slots of one token; its output is the same in each.
        first = slots.int().argmax(dim=2)[..., None, None].expand(*used.shape, 1, outputs.shape[-1])
        return torch.where(used[..., None], outputs.gather(2, first).squeeze(2), 0.0), used

    @checked
    def contribution(
        self, layer: int, expert: int
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B S"], Bool[Tensor, "B S"]]:
        """What one expert added to ``routed_out``, as output and weight; and the mask of tokens that chose it.

        The weight is 0 where it was not chosen, and 1 where weights multiply the input, and where an intervention gave
        it a contribution without a slot.

        Raises:
            UnknownName: as `expert`.
            BadInput: it was read at some positions only.
        """
        outputs, used = self.expert(layer, expert)
        routing = self.routing[layer]
        slots = routing.slots_of(expert)
        weights = routing.weights.masked_fill(~slots, 0.0).sum(dim=-1)
        if not routing.weighs_output:
            outputs = self["expert_out", layer].masked_fill(~slots[..., None], 0.0).sum(dim=2)
            weights = used.to(outputs.dtype)
        if expert in routing.added:  # a slot that it has there is of weight 0
            given = (routing.added[expert] != 0).any(dim=-1)
            outputs = torch.where(given[..., None], routing.added[expert], outputs)
            weights = weights.masked_fill(given, 1.0)
        return outputs, weights, used

    @checked
    def heaviest(self, layer: int, rank: int = 0) -> Float[Tensor, "B S D"]:
        """Unweighted output of the expert whose weight is the ``rank``-th largest (0: the heaviest) at each token.

        Raises:
            UnknownName: ``expert_out`` was not read at this layer.
            BadInput: it was read at some positions only, or the layer has no such rank.
        """
        outputs = self.whole("expert_out", layer)
        slots = outputs.shape[2]
        if not 0 <= rank < slots:
            raise BadInput(f"no rank {rank} at layer {layer}", expected=f"a rank from 0 to {slots - 1}", got=str(rank))
        slot = self.routing[layer].by_rank()[..., rank, None, None]
        return outputs.gather(2, slot.expand(*slot.shape[:3], outputs.shape[-1])).squeeze(2)


def _found(kept: Mapping[tuple[str, int | None], Any], point: str, layer: int | None) -> Any:
    if (point, layer) in kept:
        return kept[point, layer]
    layers = [at for name, at in kept if name == point]
    if layers == [None]:
        raise UnknownName(f"{point!r} is a point of the whole model", expected="no layer", got=f"layer {layer}")
    if layers:
        got = "none" if layer is None else str(layer)
        raise UnknownName(f"which layer of {point!r}", expected=f"a layer at which it was read: {layers}", got=got)
    names = ", ".join(sorted({name for name, _ in kept})) or "none"
    raise UnknownName(
        f"run holds no {point!r}" + (f" at layer {layer}" if layer is not None else ""),
        expected=f"a point that was read ({names})",
        got=repr(point if layer is None else (point, layer)),
        do="Name it in model.run(..., read=[...]) and index with run[point, layer].",
    )
