"""What an intervention is: plain data that says which points it changes, and how.

`Intervention.edits` turns the data into `Edit`s: a point, a layer, and a function from the value there (and its
`Context`) to the new value and the count of what it touched. Hosts carry edits out in the order given.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Bool
from torch import Tensor

from moe_interp.adapters.spec import ModelSpec
from moe_interp.arguments import check_flag
from moe_interp.errors import BadInput, UnknownName, UnsupportedModel
from moe_interp.interventions.arguments import finite, seed_of
from moe_interp.interventions.values import ByToken
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
                check_flag(item.name, given)
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


def fit(point: str, value: Tensor, given: Tensor) -> Tensor:
    """A value for a point, in its shape and dtype.

    It has the point's shape, or its last dims and then serves all tokens. A single number is not spread over a vector,
    but one vector may serve all slots of a token.

    Raises:
        BadInput: it does not fit, is of another kind of number, or is too large for the dtype.
    """
    whole, tail = given.dim() == value.dim(), value.shape[2:]
    own = given.shape[2:] if whole else given.shape
    last = tail[len(tail) - len(own) :]
    fits = 0 < len(own) <= len(tail) and own[-1] == last[-1]
    fits = fits and all(size in (1, wanted) for size, wanted in zip(own[:-1], last[:-1], strict=True))
    if not fits or (whole and given.shape[:2] != value.shape[:2]):
        raise BadInput(
            f"values do not fit {point!r}",
            expected=f"the shape {tuple(value.shape)} ({POINTS[point].dims}), or its last dims, for all tokens",
            got=str(tuple(given.shape)),
        )
    kinds = given.dtype.is_floating_point, value.dtype.is_floating_point
    if kinds[0] != kinds[1] or str(given.dtype) == "torch.bool":
        raise BadInput(f"values do not fit {point!r}", expected=str(value.dtype), got=str(given.dtype))
    return narrowed(given.to(value.device), value, f"values of {point!r}").expand(value.shape)


def narrowed(given: Tensor, like: Tensor, what: str) -> Tensor:
    """Finite numbers in the dtype of a value.

    Raises:
        BadInput: one is too large for it.
    """
    found = given.to(like.dtype)
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise BadInput(
            f"{what} are too large",
            expected=f"numbers within the range of {like.dtype}",
            got=f"{float(given.abs().max()):.3g}",
        )
    return found


def in_range(new: Tensor, old: Tensor, what: str) -> Tensor:
    """The new value of an edit, which may not leave the range of its dtype where the old one did not.

    Raises:
        BadInput: it does.
    """
    left = ~new.detach().isfinite() & old.detach().isfinite()
    if bool(left.any()):
        raise BadInput(
            f"{what} is too large",
            expected=f"a change that stays within the range of {new.dtype}",
            got=f"{int(left.sum())} values that become infinite",
        )
    return new


# ---- JSON --------------------------------------------------------------------------------------------------
