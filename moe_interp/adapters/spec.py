"""What an adapter says about a model: frozen data.

A `Site` says where a point's value flows: into or out of which submodule, or inside which call. Paths are dotted
names relative to the whole model, as in ``model.get_submodule(path)``. Hosts know how to get at each kind of site
and know no architecture; adapters know architectures and no host.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_interp.adapters.experts import Kernel
from moe_interp.adapters.sums import Join, Step, Through, change_nothing
from moe_interp.errors import UnknownName
from moe_interp.points import POINTS, Scope


@dataclass(frozen=True)
class Input:
    """The hidden states given to a module."""

    module: str


@dataclass(frozen=True)
class ResidualInput:
    """The hidden states given to a module (its ``argument``-th), while the layer keeps the same tensor as its residual.

    Replacing the argument would leave the residual as it was; a host writes into the tensor itself.
    """

    module: str
    argument: int = 0


@dataclass(frozen=True)
class Output:
    """What a module returns (its first item, if that is a tuple)."""

    module: str


@dataclass(frozen=True)
class GatedOutput:
    """A module's output times the sigmoid of another's, a product that no module returns."""

    module: str
    gate: str


@dataclass(frozen=True)
class RouterLinear:
    """The result of the first linear map that a router computes (its first ``columns``; None: all)."""

    module: str
    columns: int | None = None


@dataclass(frozen=True)
class RouterOutput:
    """Router logits that a submodule returns."""

    module: str


@dataclass(frozen=True)
class RouterTopK:
    """The top-k over ``columns`` scores of each token that a module calls, on [B * S, columns].

    Or ``batched``: on [B, S, columns].
    """

    module: str
    columns: int
    batched: bool = False


@dataclass(frozen=True)
class ExpertsCall:
    """The arguments, the inside or the result of ``experts(hidden, ids, weights)``."""

    module: str


@dataclass(frozen=True)
class BlockCall:
    """A block that computes in its own way: ``forward(block, tap, *args, **kwargs)`` takes the place of its forward.

    It passes every value through ``tap(name, value)`` (`moe_interp.adapters.experts.Tap`) and returns what the block
    returns.
    """

    module: str
    forward: Callable[..., Any]


@dataclass(frozen=True)
class Modality:
    """Which tokens a mixture sees: those of which an argument of a module says so (nonzero if ``kept``, else zero).

    Without the argument a mixture that keeps zeros sees all tokens.
    """

    module: str
    argument: str
    position: int
    kept: bool


Site = Input | ResidualInput | Output | GatedOutput | RouterLinear | RouterOutput | RouterTopK | ExpertsCall | BlockCall
Head = Literal["tokens", "labels", "pooled"]
PaddingReaches = Literal["nowhere", "left", "positions", "ids", "any"]
Scores = Literal["softmax", "sigmoid", "sqrtsoftplus"]


@dataclass(frozen=True)
class Scoring:
    """From router logits to the scores that weights come from: scaled, soft-capped, then a function over experts."""

    function: Scores = "softmax"
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Balance:
    """How transformers' load-balance loss looks at a layer: the ``top_k`` largest of a softmax of the router's logits.

    Attributes:
        top_k: as the loss has it, which may differ from how many experts run.
        softcap: of the logits that the loss is given; None: they are not capped.
        per: "token": the loss is K at balance; "decision": it is 1.
    """

    top_k: int
    softcap: float | None = None
    per: Literal["token", "decision"] = "token"


@dataclass(frozen=True)
class MoESpec:
    """The mixture of one layer: where its modules are, how its router scores and weights, what its experts compute.

    Attributes:
        block, router: paths.
        experts: path of the module that holds the experts and that ``kernel`` reads.
        num_experts, top_k: E and K.
        scoring: from logits to ``router_scores``.
        renormalises: whether the router scales the chosen weights to one total.
        alone: whether a weight, but for that, follows from its own expert's score, whoever else is chosen.
        kernel: what experts compute.
        shared: path of the shared experts.
        width: modules and attributes that say how many experts the router chooses; None where that is fixed.
        experts_input: steps from ``moe_in`` to what experts are given.
        routed_steps: steps on ``routed_out`` before the shared experts are added.
        whole_steps: steps on their sum, which give ``moe_out``.
        adds_shared: whether the block itself adds ``shared_out``; else they stand beside it.
        weights_on: "output", or "input" where weights multiply what an expert is given.
        runs: how many experts ever run, the first ones, where the code runs fewer than there are; None: all.
        skips: whether a token may take no expert, which shows as expert 0 with weight 0.
        proportional: whether ``gate_weights`` are proportional to the chosen ``router_scores``.
        balance: how the model's own load-balance loss looks at the layer (that of most models, where it has none); None
            where the loss leaves the layer out, or does not follow from router logits of tokens.
    """

    block: str
    router: str
    experts: str
    num_experts: int
    top_k: int
    scoring: Scoring
    renormalises: bool
    kernel: Kernel
    shared: str | None = None
    width: tuple[tuple[str, str], ...] | None = None
    experts_input: tuple[Step, ...] = ()
    routed_steps: tuple[Step, ...] = ()
    whole_steps: tuple[Step, ...] = ()
    adds_shared: bool = True
    weights_on: Literal["output", "input"] = "output"
    proportional: bool = True
    alone: bool = True
    runs: int | None = None
    skips: bool = False
    balance: Balance | None = None

    @property
    def plain(self) -> bool:
        """Whether ``moe_out`` is the plain sum of weight times output, and of shared experts that the block adds."""
        steps = (self.experts_input, self.routed_steps, self.whole_steps)
        return self.weights_on == "output" and all(map(change_nothing, steps))


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: its path, where each of its points flows, its mixture if it has one, and how it adds up.

    Attributes:
        index: its number in the model.
        path: its module.
        sites: where each of its points flows.
        moe: its mixture; None at a dense layer.
        mid, post: how ``resid_mid`` and ``resid_post`` follow from other points; None where points do not say.
        stack: which stack of layers it belongs to; layers of one stack see the same tokens, one after the other.
        part: 0, or 1, 2, ... where one module of the model is several layers here.
        modality: which tokens its mixture sees; None: all.
        pooled: whether it is called with one value an input, [B, ...] without positions: points are [B, 1, ...].
    """

    index: int
    path: str
    sites: Mapping[str, Site]
    moe: MoESpec | None
    mid: Join | None = None
    post: Join | None = None
    stack: str = "text"
    part: int = 0
    modality: Modality | None = None
    pooled: bool = False

    @property
    def plain(self) -> bool:
        """Whether everything that the layer writes is added to the residual as it is."""
        joins = [join for join in (self.mid, self.post) if join is not None]
        return self.post is not None and all(join.plain for join in joins) and (self.moe is None or self.moe.plain)


@dataclass(frozen=True)
class ModelSpec:
    """What an architecture computes, as far as reading and editing it needs to know.

    Attributes:
        model_type: as transformers names it.
        layers: all layers, of all stacks.
        embed: path of the token embedding; None where there is none.
        embedding: steps from ``embed`` to the first ``resid_pre``; None where points do not say.
        final: steps from the last ``resid_post`` to what the unembedding is given; None where points do not say.
        unembed: path of the unembedding or classifier; None for a model without a head.
        d_model, vocab_size, context_length: D, V and the most positions.
        logit_scale, logit_softcap, logit_columns: what is done to logits after the unembedding.
        streams: R, parallel residual streams: residual points are [B, S, R, D] where R > 1.
        entry: path of the module that is called for a forward pass; "" for the model itself.
        kind: "causal", "encoder" (no generation), "encoder-decoder" or "other" (no tokens).
        options: arguments that every forward pass gets unless the caller says otherwise.
        head: what the output of ``unembed`` is: "tokens", logits over the vocabulary at each token; "labels", scores of
            a classifier at each token; "pooled", such scores for each text, at its last token that is not padding.
        padding_id: the token id that the model itself takes for padding; None where its config names none.
        padding_reaches: which padding under the attention mask changes the output at real tokens: "nowhere"; "left",
            padding before them; "positions", padding before them unless ``position_ids`` are given; "ids", other ids
            than ``padding_id`` before them, for positions count these; "any".
        arguments: names that the forward pass takes; None where it takes names that cannot be known.
        notes: what is special about points of this architecture, for people.
    """

    model_type: str
    layers: tuple[LayerSpec, ...]
    embed: str | None
    final: tuple[Step, ...] | None
    unembed: str | None
    d_model: int
    vocab_size: int
    context_length: int
    embedding: tuple[Step, ...] | None = ()
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    logit_columns: int | None = None
    streams: int = 1
    entry: str = ""
    kind: Literal["causal", "encoder", "encoder-decoder", "other"] = "causal"
    options: Mapping[str, Any] = field(default_factory=lambda: {"use_cache": False})
    head: Head = "tokens"
    padding_id: int | None = None
    padding_reaches: PaddingReaches = "nowhere"
    arguments: frozenset[str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model has a language-model head: logits over its vocabulary at each token."""
        return self.unembed is not None and self.head == "tokens" and self.kind != "other"

    @property
    def gives(self) -> str:
        """What comes out of the model, for errors."""
        if self.unembed is None:
            return "one without a head"
        if self.head != "tokens":
            return {"labels": "a classifier of tokens", "pooled": "a classifier of texts"}[self.head]
        return f"a model of kind {self.kind!r}"

    @property
    def final_norm(self) -> str | None:
        """Path of the final norm, where nothing else comes between the last residual and the unembedding."""
        match self.final:
            case (Through(module),):
                return module
        return None

    @property
    def num_layers(self) -> int:
        """All layers, dense ones included."""
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, as the checkpoint numbers its layers; after them those of vision experts."""
        return tuple(layer.index for layer in self.layers if layer.moe)

    @property
    def main_layers(self) -> tuple[LayerSpec, ...]:
        """The layers of the stack whose last residual gives the output."""
        return tuple(layer for layer in self.layers if layer.stack == self.main_stack)

    @property
    def num_experts(self) -> int:
        """E: routed experts of a layer (the most, if layers differ)."""
        return max(layer.moe.num_experts for layer in self.layers if layer.moe)

    @property
    def top_k(self) -> int:
        """K: experts chosen for each token (the most, if layers differ)."""
        return max(layer.moe.top_k for layer in self.layers if layer.moe)

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the points this model has, in the order of the table."""
        there = {name for layer in self.layers for name in layer.sites} | ({"embed"} if self.embed else set())
        return tuple(name for name in POINTS if name in there)

    @property
    def main_stack(self) -> str:
        """The stack whose last residual gives the output."""
        stacks = [layer.stack for layer in self.layers]
        return next((stack for stack in ("text", "decoder") if stack in stacks), stacks[-1])

    def previous(self, index: int) -> int | None:
        """The layer before this one in its stack."""
        if index and self.layers[index - 1].stack == self.layers[index].stack:
            return index - 1
        return None

    def last(self, stack: str) -> int:
        """The last layer of a stack."""
        return max(layer.index for layer in self.layers if layer.stack == stack)

    def layers_of(self, point: str) -> tuple[int | None, ...]:
        """The layers at which ``point`` exists; ``(None,)`` for a point of the whole model.

        Raises:
            UnknownName: the name is no point, or this architecture does not have it.
        """
        if point in POINTS and POINTS[point].scope is Scope.MODEL and self.embed:
            return (None,)
        found = tuple(layer.index for layer in self.layers if point in layer.sites)
        if not found:
            kind = f"{self.model_type} has no point" if point in POINTS else "unknown point"
            raise UnknownName(f"{kind} {point!r}", expected=f"one of {', '.join(self.points)}", got=repr(point))
        return found

    def layer(self, index: int) -> LayerSpec:
        """The layer with this index.

        Raises:
            UnknownName: there is no such layer.
        """
        if not 0 <= index < self.num_layers:
            raise UnknownName(
                f"unknown layer {index}", expected=f"a layer from 0 to {self.num_layers - 1}", got=str(index)
            )
        return self.layers[index]

    def moe(self, index: int) -> MoESpec:
        """The mixture of the layer with this index.

        Raises:
            UnknownName: there is no such layer, or it is dense.
        """
        found = self.layer(index).moe
        if found is None:
            raise UnknownName(
                f"layer {index} has no experts",
                expected=f"one of the MoE layers {list(self.moe_layers)}",
                got=f"dense layer {index}",
            )
        return found

    def check_expert(self, layer: int, expert: int) -> None:
        """Refuse an expert that the layer does not have.

        Raises:
            UnknownName: no such layer, a dense layer, or no such expert.
        """
        count = self.moe(layer).num_experts
        if not 0 <= expert < count:
            raise UnknownName(
                f"unknown expert {expert} at layer {layer}",
                expected=f"an expert from 0 to {count - 1}",
                got=str(expert),
            )

    def check_runs(self, layer: int, expert: int) -> None:
        """Refuse an expert that the layer does not have, or that the model's code never runs.

        Raises:
            UnknownName: no such layer, a dense layer, no such expert, or one that never runs.
        """
        self.check_expert(layer, expert)
        runs = self.moe(layer).runs
        if runs is not None and expert >= runs:
            raise UnknownName(
                f"expert {expert} of layer {layer} never runs",
                expected=f"an expert from 0 to {runs - 1}: {' '.join(self.notes)}",
                got=str(expert),
            )
