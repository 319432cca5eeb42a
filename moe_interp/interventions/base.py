"""What an intervention is: plain data that says which points it changes, and how.

`Intervention.edits` turns the data into `Edit`s: a point, a layer, and a function from the value there (and its
`Context`) to the new value and the count of what it touched. Hosts carry edits out in the order given.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, ClassVar, NamedTuple, get_args, get_origin

import torch
from jaxtyping import Bool
from torch import Tensor

from moe_interp.adapters.spec import ModelSpec
from moe_interp.errors import BadInput, UnknownName, UnsupportedModel
from moe_interp.interventions.arguments import finite, seed_of, yes_or_no
from moe_interp.interventions.values import ByToken, Values
from moe_interp.points import POINTS, SELECTION
from moe_interp.run import Context, Tokens, positions_of


class Change(NamedTuple):
    """A new value, and how many entries (token-slots or tokens) the edit touched."""

    value: Tensor
    touched: int


class Edit(NamedTuple):
    """One function at one point of one layer."""

    point: str
    layer: int | None
    fn: Callable[[Tensor, Context], Change]


class Intervention:
    """Base of all interventions: frozen dataclasses, so that they compare, print and compose as plain data.

    Attributes:
        drops: whether slots that it gives weight 0 need not be computed.
        adds: whether it may give an expert a contribution at tokens where it has no slot.
    """

    kinds: ClassVar[dict[str, type["Intervention"]]] = {}
    drops: ClassVar[bool] = False
    adds: ClassVar[bool] = False

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if not abstract:
            Intervention.kinds[cls.__name__.lower()] = cls

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """The edits that carry it out on a model.

        Raises:
            UnknownName: it names a layer, expert or point that the model does not have.
        """
        raise NotImplementedError

    def widths(self, spec: ModelSpec) -> Mapping[int, int]:
        """Layers whose router must choose another number of experts than the model's own, and that number."""
        return {}

    def exchanges(self, spec: ModelSpec) -> Mapping[int, int]:
        """Layers at which another layer's experts run, and which."""
        return {}

    def decides(self, spec: ModelSpec) -> tuple[int, ...]:
        """Layers at which it decides all of a token's experts."""
        return ()

    def demands(self, spec: ModelSpec) -> Mapping[int, frozenset[int]]:
        """Experts that it makes run, by layer."""
        return {}

    def puts(self) -> ByToken | None:
        """Experts that it makes run at each token, [B, N, K], where they differ."""
        return None

    def swaps(self, spec: ModelSpec) -> Mapping[int, frozenset[int]]:
        """Two experts that it puts in each other's place, by layer."""
        return {}

    def forbids(self, spec: ModelSpec) -> Mapping[int, frozenset[int]]:
        """Experts that it forbids, by layer."""
        return {}

    def check(self, texts: Sequence[Tokens]) -> None:
        """Before a pass over whole texts: refuse what could never touch them.

        Raises:
            BadInput: no text has such a token.
        """


@dataclass(frozen=True, kw_only=True)
class Placed(Intervention, abstract=True):
    """An intervention at some layers and some tokens.

    Attributes:
        layers: where, each once; None: every layer that has the point.
        positions: of real tokens, negative ones from the end; None: all.
        tokens: a mark for each real token of each text; None: all.
    """

    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    tokens: ByToken | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "positions"):
            given = positions_of(getattr(self, name))
            object.__setattr__(self, name, None if given is None else tuple(dict.fromkeys(given)))
        for item in dataclasses.fields(self):
            given = getattr(self, item.name)
            if item.type is float:
                object.__setattr__(self, item.name, finite(given, item.name))
            elif item.type is bool:
                yes_or_no(given, item.name)
            elif item.name == "seed":
                object.__setattr__(self, item.name, seed_of(given))
        if self.tokens is not None:
            marks = ByToken.of(self.tokens, what="marks of tokens")
            if str(marks.values.tensor.dtype) != "torch.bool" or marks.values.tensor.dim() != 2:
                raise BadInput("not marks of tokens", expected="booleans of shape [batch, pos]", got=repr(marks.values))
            if not bool(marks.values.tensor.any()):
                raise BadInput("an edit can never touch anything", expected="a token that is marked", got="none")
            object.__setattr__(self, "tokens", marks)

    def here(self, context: Context) -> Bool[Tensor, "B S"]:
        """[B, S], the real tokens at which it acts."""
        here = context.tokens.at(self.positions)
        if self.tokens is None:
            return here
        marked, there = self.tokens.at(context.tokens)
        return here & marked & there

    def seen(self, context: Context) -> Bool[Tensor, "B S"]:
        """[B, S], of these the tokens that the layer's mixture sees."""
        return self.here(context) & context.seen

    def check(self, texts: Sequence[Tokens]) -> None:
        """Refuse positions, marks and values that no token of any text has together."""
        longest = max(int(tokens.mask.sum(1).max()) for tokens in texts)
        missed = [
            position
            for position in self.positions or ()
            if not any(bool(tokens.at((position,)).any()) for tokens in texts)
        ]
        got = f"positions {missed}" if missed else None
        if self.tokens is not None and not any(self.tokens.covers(tokens) for tokens in texts):
            got = f"marks for {len(self.tokens.lengths)} texts"
        elif self.tokens is not None and not missed:
            marked = self.tokens.values.tensor.any(0).nonzero().flatten()
            got = f"marks from token {int(marked[0])} on" if int(marked[0]) >= longest else None
        if got:
            raise BadInput(
                "an edit can never touch anything",
                expected=f"positions within the {longest} tokens of the longest text",
                got=got,
            )
        if not any(self._reaches(tokens) for tokens in texts):
            raise BadInput(
                "an edit can never touch anything",
                expected="a token at its positions that is marked, and for which there are values",
                got="none in any text",
            )

    def _reaches(self, tokens: Tokens) -> bool:
        """Whether a token is at its positions, marked, and has the values that it puts in."""
        held = [getattr(self, item.name) for item in dataclasses.fields(self)]
        # Of several, which are of one run, the first says it for all.
        firsts = [some[0] if isinstance(some, tuple) and some else some for some in held]
        by_token = [one for one in firsts if isinstance(one, ByToken)]
        if not all(one.covers(tokens) for one in by_token):
            return True  # of other texts, which is refused where they are put in
        where = tokens.at(self.positions)
        for one in by_token:
            where = where & one.there(tokens)
        if self.tokens is not None:
            where = where & self.tokens.at(tokens)[0]
        return bool(where.any()) or not (by_token or self.positions)


def layers_at(spec: ModelSpec, point: str, layers: Iterable[int] | None) -> tuple[int | None, ...]:
    """The layers at which an intervention acts: those asked for, or all that have the point.

    Raises:
        UnknownName: the model has no such point, or not at that layer.
        UnsupportedModel: a router whose choice cannot be reached.
    """
    if point in SELECTION:
        return _choosing_layers(spec, layers)
    there = spec.layers_of(point)
    if layers is None:
        return there
    chosen = tuple(layers)
    for layer in chosen:
        spec.layer(layer)
        if layer not in there:
            raise UnknownName(
                f"no point {point!r} at layer {layer}", expected=f"a layer of {list(there)}", got=str(layer)
            )
    return chosen


def _choosing_layers(spec: ModelSpec, layers: Iterable[int] | None) -> tuple[int, ...]:
    chosen = spec.moe_layers if layers is None else tuple(layers)
    for layer in chosen:
        spec.moe(layer)
        if SELECTION[0] not in spec.layer(layer).sites:
            raise UnsupportedModel(
                f"the choice of the router at layer {layer} of {spec.model_type} cannot be edited",
                expected="a router that takes the k largest of the scores of all experts",
                got="one that chooses in another way",
                do="Edit router_logits, or force experts with weights='kept' or weights of your own.",
            )
    return chosen


def moe_layers_at(spec: ModelSpec, layers: Iterable[int] | None) -> tuple[int, ...]:
    """The MoE layers asked for, or all.

    Raises:
        UnknownName: one is no MoE layer.
    """
    chosen = spec.moe_layers if layers is None else tuple(layers)
    for layer in chosen:
        spec.moe(layer)
    return chosen


def check_together(interventions: Sequence[Intervention], spec: ModelSpec) -> None:
    """Refuse interventions of which one undoes what another says.

    Raises:
        BadInput: two that decide all experts of the same tokens, or the number of experts of one router; one that
            forces an expert that another forbids, swaps or overrules; several that force or forbid too many.
    """
    for number, one in enumerate(interventions):
        _check_pairs(one, interventions[:number], spec)
    _check_forced(interventions, spec)
    _check_left(interventions, spec)


def _check_pairs(one: Intervention, others: Sequence[Intervention], spec: ModelSpec) -> None:
    for other in others:
        for layer, k in one.widths(spec).items():
            if other.widths(spec).get(layer, k) != k:
                raise _conflict(layer, other, one, "one number of experts for a router")
        for layer in {*one.decides(spec)} & {*other.decides(spec)}:
            if _may_meet(one, other):
                raise _conflict(layer, other, one, "one intervention that decides a token's experts")
        for first, second in ((one, other), (other, one)):
            for layer, expected in _overruled(first, second, spec):
                if _may_meet(one, other):
                    raise _conflict(layer, other, one, expected)


def _overruled(one: Intervention, other: Intervention, spec: ModelSpec) -> Iterator[tuple[int, str]]:
    """Layers at which another intervention undoes what one says of experts, and what would be right."""
    decided, runs = other.decides(spec), other.demands(spec)
    for layer, experts in one.demands(spec).items():
        if experts & other.forbids(spec).get(layer, frozenset()):
            yield layer, "an expert forced or forbidden, not both"
        if len(experts & other.swaps(spec).get(layer, frozenset())) == 1:
            yield layer, "an expert forced or swapped for another, not both"
        if layer in decided and any(not experts <= row for row in _rows(one, other, runs.get(layer, frozenset()))):
            yield layer, "no experts forced where another decides all of them"
    for layer, experts in one.forbids(spec).items():
        if layer in decided and any(
            experts & row or not row for row in _rows(one, other, runs.get(layer, frozenset()))
        ):
            yield layer, "an expert forced or forbidden, not both"


def _rows(one: Any, other: Any, runs: frozenset[int]) -> list[frozenset[int]]:
    """What the other makes run: at all tokens the same, or at each token at which both may act; none: any expert."""
    ids = other.puts()
    if ids is None:
        return [runs]
    numbers = torch.arange(ids.values.tensor.shape[1])
    both = numbers < torch.tensor(ids.lengths)[:, None]
    for where in (one, other):
        if where.positions is not None and min(where.positions) >= 0:
            both &= torch.isin(numbers, torch.tensor(where.positions))
        if where.tokens is not None and where.tokens.values.tensor.shape == both.shape:
            both &= where.tokens.values.tensor.cpu()
    return [frozenset(row) for row in ids.values.tensor.cpu()[both].tolist()]


def _check_forced(interventions: Sequence[Any], spec: ModelSpec) -> None:
    """Refuse to force more experts of one token than its router chooses."""
    widths = {layer: k for one in interventions for layer, k in one.widths(spec).items()}
    demands = [(one, one.demands(spec)) for one in interventions]
    for layer in {layer for _, experts in demands for layer in experts}:
        here = [(one, experts[layer]) for one, experts in demands if layer in experts and one.tokens is None]
        fixed = [one.positions for one, _ in here if one.positions is not None and min(one.positions) >= 0]
        for position in {None, *(position for positions in fixed for position in positions)}:
            met = [experts for one, experts in here if one.positions is None or position in one.positions]
            forced, k = frozenset().union(*met), widths.get(layer, spec.moe(layer).top_k)
            if len(met) > 1 and len(forced) > k:
                raise BadInput(
                    f"too many experts forced at layer {layer}",
                    expected=f"up to {k}, the slots of a token",
                    got=f"{len(forced)}: {sorted(forced)}",
                )


def _check_left(interventions: Sequence[Intervention], spec: ModelSpec) -> None:
    """Refuse to forbid so many experts, everywhere, that a router has too few to choose from."""
    forbidden: dict[int, frozenset[int]] = {}
    widths = {layer: k for one in interventions for layer, k in one.widths(spec).items()}
    for one in interventions:
        if getattr(one, "positions", None) is None and getattr(one, "tokens", None) is None:
            for layer, experts in one.forbids(spec).items():
                forbidden[layer] = forbidden.get(layer, frozenset()) | experts
    for layer, experts in forbidden.items():
        moe = spec.moe(layer)
        k = widths.get(layer, moe.top_k)
        if moe.num_experts - len(experts) < k:
            raise BadInput(
                f"too few experts left at layer {layer}",
                expected=f"at least {k}, which are chosen",
                got=str(moe.num_experts - len(experts)),
            )


def _may_meet(one: Any, other: Any) -> bool:
    """Whether both may act at one token: at the same positions, or where one of them acts at all."""
    if one.positions is not None and other.positions is not None:
        same_side = all(position >= 0 for position in (*one.positions, *other.positions))
        if same_side and not set(one.positions) & set(other.positions):
            return False
    if one.tokens is not None and other.tokens is not None:
        first, second = (marks.values.tensor for marks in (one.tokens, other.tokens))
        if first.shape == second.shape and not bool((first & second).any()):
            return False
    return True


def _conflict(layer: int, first: Intervention, second: Intervention, expected: str) -> BadInput:
    return BadInput(
        f"two interventions contradict each other at layer {layer}", expected=expected, got=f"{first} and {second}"
    )


def fit(point: str, value: Tensor, given: Tensor) -> Tensor:
    """A value for a point, in its shape and dtype.

    Raises:
        BadInput: it does not fit.
    """
    kinds = given.dtype.is_floating_point, value.dtype.is_floating_point
    try:
        spread = given.to(value.device).expand(value.shape)
    except RuntimeError as error:
        raise BadInput(
            f"values do not fit {point!r}",
            expected=f"a shape that broadcasts to {tuple(value.shape)} ({POINTS[point].dims})",
            got=str(tuple(given.shape)),
        ) from error
    if kinds[0] != kinds[1]:
        raise BadInput(f"values do not fit {point!r}", expected=str(value.dtype), got=str(given.dtype))
    return spread.to(value.dtype)


# ---- JSON --------------------------------------------------------------------------------------------------


def to_json(interventions: Sequence[Intervention]) -> str:
    """Interventions as JSON; `from_json` reads them back. Tensors are stored to the last bit.

    Raises:
        BadInput: one of them holds a function (`moe.apply`), which JSON cannot.
    """
    return json.dumps([_as_record(one) for one in interventions])


def _as_record(one: Intervention) -> dict[str, Any]:
    record = {item.name: getattr(one, item.name) for item in dataclasses.fields(one)}  # type: ignore[arg-type]
    if any(callable(value) for value in record.values()):
        raise BadInput(
            f"{type(one).__name__} cannot be written to JSON",
            expected="an intervention made of numbers and names",
            got="one that holds a function",
        )
    return {"kind": type(one).__name__.lower()} | {name: _stored(value) for name, value in record.items()}


_TENSORS: dict[str, type[Values] | type[ByToken]] = {"tensor": Values, "by_token": ByToken}


def _stored(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_stored(item) for item in value]
    return next(({name: value.record()} for name, kind in _TENSORS.items() if isinstance(value, kind)), value)


def from_json(text: str) -> list[Intervention]:
    """Interventions from the JSON that `to_json` wrote.

    Raises:
        BadInput: not a JSON list of interventions, or fields that the intervention does not have, or of other types.
        UnknownName: no intervention of that kind.
    """
    try:
        records = json.loads(text)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise TypeError("no list of interventions")
        return [_from_record(record) for record in records]
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput("cannot read interventions", expected="JSON from moe.to_json", got=str(error)) from error


def _from_record(record: dict[str, Any]) -> Intervention:
    kind = record.pop("kind", None)
    if kind not in Intervention.kinds:
        raise UnknownName(
            f"unknown intervention {kind!r}", expected=f"one of {', '.join(Intervention.kinds)}", got=repr(kind)
        )
    found = {name: _restored(value) for name, value in record.items()}
    for item in dataclasses.fields(Intervention.kinds[kind]):  # type: ignore[arg-type]
        if item.name in found and not _is_of(item.type, found[item.name]):
            raise BadInput(
                f"{item.name} of a stored {kind}",
                expected=str(getattr(item.type, "__name__", item.type)),
                got=repr(found[item.name])[:80],
            )
    return Intervention.kinds[kind](**found)


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value that was stored is of the type of its field."""
    if isinstance(kind, UnionType):
        return any(_is_of(one, value) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(get_args(kind)[0], item) for item in value)
    return type(value) is kind or (kind is float and type(value) is int)


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(item) for item in value)
    if isinstance(value, dict) and len(value) == 1:
        name, record = next(iter(value.items()))
        if name in _TENSORS:
            return _TENSORS[name].from_record(record)
    return value
