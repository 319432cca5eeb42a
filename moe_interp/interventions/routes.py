"""Interventions on who is chosen and with which weight.

Where a router's choice can be reached (`moe_interp.points.SELECTION`), ids change there and the weights follow by the
router's own recipe from the scores as they were. Otherwise ``expert_ids`` and ``gate_weights`` are edited as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_interp.adapters.spec import ModelSpec, MoESpec
from moe_interp.errors import BadInput, UnsupportedModel, one_of
from moe_interp.interventions.arguments import finite
from moe_interp.interventions.base import Change, Edit, Placed, in_range, layers_at, moe_layers_at, narrowed
from moe_interp.interventions.chance import uniform
from moe_interp.interventions.outputs import OfExperts
from moe_interp.interventions.values import ByToken
from moe_interp.points import SELECTION
from moe_interp.run import Context, positions_of

SCORES, IDS = SELECTION


# ---- masks and biases --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _OfScores(OfExperts, abstract=True):
    """A change of what experts are chosen by: the selection scores alone, or the logits, from which weights follow."""

    on: str = "selection"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("scores", self.on, ("selection", "logits"))

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of the scores (or ``router_logits``) at each layer."""
        point = SCORES if self.on == "selection" else "router_logits"
        layers = [layer for layer in layers_at(spec, point, self.layers) if layer is not None]
        for layer in layers:
            for expert in self.named:
                spec.check_runs(layer, expert)
        return [Edit(point, layer, self.changed) for layer in layers]

    def columns(self, scores: Tensor, context: Context) -> Bool[Tensor, "B S E"]:
        """[B, S, E], the scores that change."""
        columns = torch.full(scores.shape[-1:], self.experts is None, dtype=torch.bool, device=scores.device)
        columns[list(self.named)] = True
        return columns & self.seen(context)[..., None]


@dataclass(frozen=True, kw_only=True)
class Mask(_OfScores):
    """Forbid experts: the next best run, of the groups that the router chose where it chooses groups first."""

    all_at_once: ClassVar[bool] = False

    def forbids(self, spec: ModelSpec) -> Mapping[int, frozenset[int]]:
        """The experts, at each of its layers."""
        layers = moe_layers_at(spec, self.layers) if self.on == "selection" else ()
        return dict.fromkeys(layers, frozenset(self.named))

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of the scores (or ``router_logits``) at each layer, which refuses to leave a token too few."""
        return [edit._replace(fn=self._checked) for edit in super().edits(spec)]

    def _checked(self, scores: Float[Tensor, "B S E"], context: Context) -> Change:
        """The change, where the router's choice leaves it a next best."""
        there = open_to_choice(scores) if self.on == "selection" else scores != -torch.inf
        left = there & ~self.columns(scores, context)
        check_left(left, self.seen(context), context, "Forbid fewer, or force others with weights of your own.")
        return self.changed(scores, context)

    def changed(self, scores: Float[Tensor, "B S E"], context: Context) -> Change:
        """Scores that lose against all others, also against those of groups that were not chosen."""
        columns = self.columns(scores, context)
        if self.on == "selection":
            scores = scores.clamp(min=torch.finfo(scores.dtype).min)
        return Change(scores.masked_fill(columns, -torch.inf), int(columns.any(dim=-1).sum()))


def check_left(left: Bool[Tensor, "B S E"], where: Bool[Tensor, "B S"], context: Context, do: str) -> None:
    """Refuse to leave a token fewer experts than the router chooses.

    Raises:
        BadInput: there is such a token.
    """
    k, count = context.k or 0, left.sum(dim=-1)
    few = (count < k) & where
    if bool(few.any()):
        text, column = few.nonzero()[0].tolist()
        raise BadInput(
            f"too few experts left at layer {context.layer} for token {int(context.tokens.index[text, column])} of "
            f"text {int(context.tokens.texts[text])}",
            expected=f"at least {k} in the groups that the router chose: no others have a score to be next best by",
            got=str(int(count[text, column])),
            do=do,
        )


def open_to_choice(scores: Float[Tensor, "B S E"]) -> Bool[Tensor, "B S E"]:
    """Experts that are not forbidden and whose group was chosen; scores of others are the lowest, or 0."""
    closed, none = scores <= torch.finfo(scores.dtype).min, scores == 0
    return ~closed & ~(none & (~none & ~closed).any(dim=-1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class Bias(_OfScores):
    """Push experts: a number is added to their scores."""

    by: float

    def changed(self, scores: Float[Tensor, "B S E"], context: Context) -> Change:
        """Scores plus the number."""
        columns = self.columns(scores, context)
        new = torch.where(columns, scores + self.by, scores)
        return Change(in_range(new, scores, f"a push of {self.by:.3g}"), int(columns.any(dim=-1).sum()))


# ---- whole routes ------------------------------------------------------------------------------------------

Weights = str | tuple[float, ...] | ByToken


@dataclass(frozen=True, kw_only=True)
class Force(Placed):
    """Make these experts run.

    Attributes:
        experts: up to K ids, or ids [B, N, K] of each token.
        weights: "own": by the router's recipe on its scores; fewer than K experts are joined by the router's best
            others. "kept": each slot keeps its weight. Numbers, or [B, N, K]: these; slots without an expert get 0.
    """

    experts: tuple[int, ...] | ByToken
    weights: Weights = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.experts, ByToken):
            experts = positions_of(self.experts) or ()
            if not experts or len(set(experts)) < len(experts):
                raise BadInput("not experts to force", expected="different expert ids", got=str(self.experts))
            object.__setattr__(self, "experts", experts)
        if isinstance(self.weights, str):
            one_of("weights", self.weights, ("own", "kept"))
        elif isinstance(self.weights, ByToken) != isinstance(self.experts, ByToken):
            raise BadInput("weights do not fit experts", expected="both for each token, or neither", got="one")
        elif isinstance(self.weights, tuple) and isinstance(self.experts, tuple):
            if len(self.weights) != len(self.experts):
                raise BadInput(
                    "weights do not fit experts", expected=f"{len(self.experts)} weights", got=str(self.weights)
                )
            object.__setattr__(self, "weights", tuple(finite(weight, "a weight") for weight in self.weights))
        if isinstance(self.experts, ByToken):
            self._check_by_token(self.experts)

    def _check_by_token(self, experts: ByToken) -> None:
        """Refuse ids that are no whole numbers, weights of other tokens, and an expert twice at a token.

        An expert may stand in a second slot whose weight is 0, as in runs under edits.
        """
        ids, weights = experts.values.tensor, self.weights
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() != 3:
            raise BadInput(
                "not expert ids",
                expected="whole numbers of shape [batch, pos, slots]",
                got=f"{ids.dtype} of shape {tuple(ids.shape)}",
            )
        held = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        if isinstance(weights, ByToken):
            given = weights.values.tensor
            if given.shape != ids.shape or weights.lengths != experts.lengths or not given.is_floating_point():
                raise BadInput(
                    "weights do not fit experts",
                    expected=f"a number for each of {tuple(ids.shape)}, of texts of {experts.lengths} tokens",
                    got=f"{given.dtype} of shape {tuple(given.shape)}, of {weights.lengths} tokens",
                )
            held = given.to(ids.device) != 0
        real = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(experts.lengths, device=ids.device)[:, None]
        # Slots that do not count get numbers of their own, which no expert has.
        own = -1 - torch.arange(ids.shape[2], device=ids.device).expand_as(ids)
        ordered = torch.where(held & real[..., None], ids.long(), own).sort(dim=-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]).any(dim=-1)
        if bool(twice.any()):
            text, token = twice.nonzero()[0].tolist()
            raise BadInput(
                "an expert forced twice at a token",
                expected="different experts in the slots of a token",
                got=f"{ids[text, token].tolist()} at token {token} of text {text}",
            )

    def decides(self, spec: ModelSpec) -> tuple[int, ...]:
        """Its layers, unless the router chooses some of the experts."""
        layers = moe_layers_at(spec, self.layers)
        whole = isinstance(self.experts, ByToken) or self.weights != "own"
        return tuple(layer for layer in layers if whole or len(self.experts) >= spec.moe(layer).top_k)  # type: ignore[arg-type]

    def demands(self, spec: ModelSpec) -> Mapping[int, frozenset[int]]:
        """The experts, at each of its layers."""
        if isinstance(self.experts, ByToken):
            return {}
        return dict.fromkeys(moe_layers_at(spec, self.layers), frozenset(self.experts))

    def puts(self) -> ByToken | None:
        """The experts, where they are given for each token."""
        return self.experts if isinstance(self.experts, ByToken) else None

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """Edits of the router's choice, or of ``expert_ids`` and ``gate_weights``."""
        layers = moe_layers_at(spec, self.layers)
        for layer in layers:
            self._check_layer(spec, layer)
        if self.weights == "own":
            layers_at(spec, SCORES, layers)
            if isinstance(self.experts, tuple):
                return [Edit(SCORES, layer, self._first(spec.moe(layer))) for layer in layers]
            return [Edit(IDS, layer, self._ids) for layer in layers]
        given = [] if self.weights == "kept" else [Edit("gate_weights", layer, self._weights) for layer in layers]
        return [Edit("expert_ids", layer, self._ids) for layer in layers] + given

    def _check_layer(self, spec: ModelSpec, layer: int) -> None:
        if isinstance(self.experts, ByToken):
            ids = self.experts.values.tensor
            for expert in (int(ids.min()), int(ids.max())):
                spec.check_runs(layer, expert)
            return
        for expert in self.experts:
            spec.check_runs(layer, expert)
        k = spec.moe(layer).top_k
        if len(self.experts) > k or (self.weights == "kept" and len(self.experts) < k):
            raise BadInput(
                f"{len(self.experts)} experts cannot be forced at layer {layer}",
                expected=f"{k} of them, a slot each" if self.weights == "kept" else f"up to {k}, the slots of a token",
                got=str(self.experts),
            )

    def _first(self, moe: MoESpec) -> Callable[[Tensor, Context], Change]:
        def first(scores: Float[Tensor, "B S E"], context: Context) -> Change:
            where = self.seen(context)
            forced = scores[..., list(self.experts)][where]  # type: ignore[arg-type]
            if moe.scoring.function == "softmax" and bool((forced == 0).any()):
                raise UnsupportedModel(
                    f"an expert outside the groups that the router chose has no weight at layer {context.layer}",
                    expected="a score above 0",
                    got="0",
                    do="Give the weights: moe.force(..., weights=...).",
                )
            raised = scores.clone()
            raised[..., list(self.experts)] = torch.inf  # type: ignore[arg-type]
            return Change(torch.where(where[..., None], raised, scores), int(where.sum()))

        return first

    def _ids(self, ids: Int[Tensor, "B S K"], context: Context) -> Change:
        where = self.seen(context)
        if isinstance(self.experts, ByToken):
            new, there = self.experts.at(context.tokens)
            where = where & there
        else:
            # slots without an expert keep theirs, with weight 0
            new = torch.cat(
                [ids.new_tensor(self.experts).expand(*ids.shape[:2], -1), ids[..., len(self.experts) :]], -1
            )
        _check_slots(new, ids, "experts")
        return Change(torch.where(where[..., None], new.to(ids.dtype), ids), int(where.sum()))

    def _weights(self, weights: Float[Tensor, "B S K"], context: Context) -> Change:
        where = self.seen(context)
        if isinstance(self.weights, ByToken):
            new, there = self.weights.at(context.tokens)
            where = where & there
        else:
            given = torch.tensor(self.weights, dtype=torch.float64, device=weights.device)
            new = torch.cat([given, given.new_zeros(weights.shape[-1] - len(given))]).expand_as(weights)
        _check_slots(new, weights, "weights")
        return Change(torch.where(where[..., None], narrowed(new, weights, "weights to force"), weights), 0)


def _check_slots(given: Tensor, own: Tensor, what: str) -> None:
    if given.shape[-1] != own.shape[-1]:
        raise BadInput(f"not {what} of this model", expected=f"{own.shape[-1]} slots a token", got=str(given.shape[-1]))


@dataclass(frozen=True, kw_only=True)
class Randomize(Placed):
    """Uniformly random routes: K different experts a token.

    Attributes:
        weights: "kept": each slot keeps the weight that the router gave it; "fresh": the router's recipe on its scores
            of the drawn experts.
        seed: what is drawn depends on it, the layer, and the text and number of the token.
    """

    weights: str = "kept"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("weights", self.weights, ("kept", "fresh"))

    def decides(self, spec: ModelSpec) -> tuple[int, ...]:
        """Its layers."""
        return moe_layers_at(spec, self.layers)

    def edits(self, spec: ModelSpec) -> list[Edit]:
        """One edit of the ids at each layer."""
        layers = moe_layers_at(spec, self.layers)
        for layer in layers:
            spec.check_runs(layer, spec.moe(layer).num_experts - 1)
        if self.weights == "fresh":
            layers_at(spec, IDS, layers)
        point = IDS if self.weights == "fresh" else "expert_ids"
        return [Edit(point, layer, self._drawn(spec.moe(layer).num_experts)) for layer in layers]

    def _drawn(self, experts: int) -> Callable[[Tensor, Context], Change]:
        def drawn(ids: Int[Tensor, "B S K"], context: Context) -> Change:
            where = self.seen(context)
            layer = torch.tensor(context.layer, device=ids.device)
            keys = uniform(self.seed, layer, context.tokens.whose[..., None], torch.arange(experts, device=ids.device))
            new = keys.topk(ids.shape[-1], dim=-1).indices.to(ids.dtype)
            return Change(torch.where(where[..., None], new, ids), int(where.sum()))

        return drawn
