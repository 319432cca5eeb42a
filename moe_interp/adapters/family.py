"""One architecture as a row of a table, and what `Family.describe` makes of it.

A row names submodules and says how the parts add up. Whether a layer is a mixture is not guessed: it is one where the
block holds a submodule under the row's ``experts`` name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from moe_interp.adapters.checks import check_counts, check_modules, check_types
from moe_interp.adapters.experts import Fused, Kernel
from moe_interp.adapters.module_list import LinearGate
from moe_interp.adapters.reading import (
    arguments_of,
    attribute,
    count,
    head_of,
    loss_top_k,
    model_sizes,
    model_type,
    outline,
    padding_id,
    takes,
    text_config,
)
from moe_interp.adapters.spec import (
    Balance,
    BlockCall,
    ExpertsCall,
    GatedOutput,
    Input,
    LayerSpec,
    ModelSpec,
    MoESpec,
    Output,
    PaddingReaches,
    ResidualInput,
    RouterLinear,
    RouterOutput,
    RouterTopK,
    Scoring,
    Site,
)
from moe_interp.adapters.sums import Gate, Join, Step, Streams, Sum, Through
from moe_interp.errors import UnsupportedModel
from moe_interp.points import SELECTION, in_order

EXPERTS_POINTS = ("expert_ids", "gate_weights", "expert_act", "expert_out", "routed_out")
BODIES = ("model.language_model", "model", "", "language_model.model", "thinker.model.language_model", "transformer")
HEADS = ("lm_head", "language_model.lm_head", "thinker.lm_head", "score", "qa_outputs")


NO_SIZES = {"d_model": 0, "vocab_size": 0, "context_length": 0}


@dataclass(frozen=True)
class At:
    """A module of one model, by which rows turn relative names into paths and read its attributes."""

    hf: nn.Module
    path: str

    def __call__(self, name: str) -> str:
        """The path of a submodule or parameter."""
        return ".".join(part for part in (self.path, name) if part)

    @property
    def module(self) -> Any:
        """The module itself."""
        return self.hf.get_submodule(self.path)

    def has(self, name: str) -> bool:
        """Whether it has such a submodule (not None)."""
        found: Any = self.module
        for part in name.split("."):
            found = getattr(found, part, None)
        return found is not None

    def sub(self, name: str) -> "At":
        """A submodule."""
        return At(self.hf, self(name))

    def through(self, name: str) -> Through:
        """The step through a submodule."""
        return Through(self(name))


How = Callable[[At], Sum | Gate | Streams | None]
Steps = Callable[[At], tuple[Step, ...]]


def plain(layer: At) -> Sum:
    """The plain sum."""
    return Sum()


def none(module: At) -> tuple[Step, ...]:
    """No steps."""
    return ()


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its modules, and how its parts add up.

    Attributes:
        body: path of the module that holds embedding, layers and final norm; None: the first of `BODIES` that does.
        layers, embed, norm: names in the body; ``embed`` or ``norm`` None where it has none.
        unembed: path of the unembedding, classifier or other head; None: the first of `HEADS` that is there, if any is.
        attention: name of what mixes positions in a layer; None where nothing does.
        block: the MoE block (the dense MLP of other layers) in a layer; "" where router and experts are on the layer.
        mixture: path of the module with router and experts in the layer, where that is not the block.
        router, experts: names in the block (or the mixture).
        shared, shared_gate: shared experts and their gate, in the layer.
        shared_beside: whether shared experts stand beside the block, which then does not add them.
        dense: name of the dense MLP of a layer that is no mixture; None where it has none.
        mid: the module whose input is ``resid_mid``, in the layer; None where there is no such point.
        mid_join, post_join: how the branches of a layer join the residual.
        experts_input, routed_steps, whole_steps: steps in the block, as in `MoESpec`.
        scoring: from logits to scores, given the router.
        renormalises: None: the router's own ``norm_topk_prob`` says; a function is given the block.
        kernel: what experts compute; None: fused experts, as the module says itself.
        num_experts, top_k: attributes in the block; ``top_k`` None: the router's, a number where it is fixed.
        counts_too: an attribute of the block that says K once more.
        wide: whether the router, given here, takes another number of experts in ``top_k``.
        columns: how many of the router's logits are experts, given the router; None: all.
        returns_logits: whether the router is called for the logits and returns just these, as a plain linear map does.
        call: a function that takes the place of the block's forward; that of `linear_gate` is told the names of router
            and experts.
        selects: who calls ``torch.topk`` on the scores of all experts, given the router: "router" or "block"; None
            where nobody does, and the choice can be replaced and not masked. A ``call`` that `chooses` does it itself.
        weights_on, proportional, runs, skips: as in `MoESpec`; so is alone, given the block.
        balance: what the model's own load-balance loss counts by, given the router, as in `Balance`; None where that
            loss leaves the layer out.
        sites: sites that differ, given a layer.
        moved: points that a layer comes to at another time than the table of points says, each with the point that it
            comes right before, such as ``{"shared_out": "router_logits"}`` where shared experts run first.
        embedding, final: as in `ModelSpec`, given the body; a ``final`` that returns None says that the output does not
            follow from the last residual alone.
        sizes: ``d_model``, ``vocab_size`` and ``context_length`` where neither config nor weights say, given the model.
        logits: fields of `ModelSpec` about logits, given the text config (None for a model without one).
        entry, kind, streams, padding_reaches, notes: as in `ModelSpec`; ``streams`` is the name of a config field.
        options: as in `ModelSpec`; None: no cache, where the model takes tokens and its forward takes ``use_cache``.
    """

    body: str | None = None
    layers: str = "layers"
    embed: str | None = "embed_tokens"
    norm: str | None = "norm"
    unembed: str | None = None
    attention: Callable[[At], str | None] = lambda layer: "self_attn"
    block: str = "mlp"
    mixture: str | None = None
    router: str = "gate"
    experts: str = "experts"
    shared: str | None = None
    shared_gate: str | None = None
    shared_beside: bool = False
    dense: Callable[[At], str | None] = lambda layer: "mlp"
    mid: str | None = "post_attention_layernorm"
    mid_join: How | None = plain
    post_join: How = plain
    experts_input: Steps = none
    routed_steps: Steps = none
    whole_steps: Steps = none
    scoring: Callable[[Any], Scoring] = lambda router: Scoring()
    renormalises: bool | Callable[[Any], bool] | None = None
    kernel: Kernel | None = None
    num_experts: str = "experts.num_experts"
    top_k: str | int | None = None
    counts_too: str | None = None
    wide: Callable[[Any], bool] = lambda router: True
    columns: Callable[[Any], int | None] = lambda router: None
    returns_logits: bool = False
    call: Callable[..., Any] | None = None
    selects: Callable[[Any], Literal["router", "block"] | None] = lambda router: "router"
    weights_on: Literal["output", "input"] = "output"
    proportional: bool = True
    alone: Callable[[Any], bool] = lambda block: True
    runs: int | None = None
    skips: bool = False
    balance: Callable[[Any], Literal["token", "decision"] | None] = lambda router: "token"
    sites: Callable[[At, bool], Mapping[str, Site]] = lambda layer, mixture: {}
    moved: Mapping[str, str] = field(default_factory=dict)
    embedding: Callable[[At], tuple[Step, ...] | None] = none
    final: Callable[[At], tuple[Step, ...] | None] | None = None
    sizes: Callable[[nn.Module], Mapping[str, int]] = lambda hf: {}
    logits: Callable[[Any], dict[str, Any]] = lambda config: {}
    entry: Callable[[nn.Module], str] = lambda hf: ""
    kind: Literal["causal", "encoder", "encoder-decoder", "other"] = "causal"
    streams: str | None = None
    options: Mapping[str, Any] | None = None
    padding_reaches: PaddingReaches = "nowhere"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)

    def describe(self, hf: nn.Module) -> ModelSpec:
        """What a model of this architecture computes, and where.

        Raises:
            UnsupportedModel: modules are not where the row says, or no layer is a mixture.
        """
        body = self.find_body(hf)
        layers = self.stack(body.sub(self.layers), "text", 0)
        return self.model_spec(hf, body, layers)

    def find_body(self, hf: nn.Module) -> At:
        """The module that holds embedding, layers and final norm."""
        candidates = [At(hf, path) for path in ((self.body,) if self.body is not None else BODIES)]
        for body in candidates:
            if At(hf, "").has(body(self.layers)) and (not body.path or At(hf, "").has(body.path)):
                return body
        raise UnsupportedModel(
            f"cannot find the layers of {type(hf).__name__}",
            expected=f"{self.layers!r} in one of {[body.path for body in candidates]}",
            got=outline(hf),
        )

    def stack(self, layers: At, name: str, first: int) -> tuple[LayerSpec, ...]:
        """The specs of one stack of layers, numbered from ``first``."""
        return tuple(
            self.layer(At(layers.hf, layers(str(number))), first + number, name)
            for number, _ in enumerate(layers.module.children())
        )

    def model_spec(self, hf: nn.Module, body: At, layers: tuple[LayerSpec, ...], **more: Any) -> ModelSpec:
        """The whole model around its layers."""
        if not any(layer.moe for layer in layers):
            raise UnsupportedModel(
                f"{model_type(hf)} model without experts",
                expected=f"at least one mixture-of-experts layer, with {self._needed()} in it",
                got=f"{len(layers)} dense layers of {outline(hf)}",
                do="Open a checkpoint whose config has sparse layers, or name the modules in the model's Family.",
            )
        entry = self.entry(hf)
        fields: dict[str, Any] = dict(
            model_type=model_type(hf),
            layers=layers,
            embed=None if self.embed is None else body(self.embed),
            final=self._final(body) if self.final is None else self.final(body),
            unembed=self.unembed or next((path for path in HEADS if At(hf, "").has(path)), None),
            embedding=self.embedding(body),
            streams=attribute(text_config(hf), self.streams) if self.streams else 1,
            entry=entry,
            kind=self.kind,
            options=self._options(hf.get_submodule(entry)) if self.options is None else self.options,
            padding_id=padding_id(hf),
            padding_reaches=self.padding_reaches,
            notes=self.notes,
        )
        spec = ModelSpec(**NO_SIZES | fields | self.logits(text_config(hf)) | more)
        check_modules(hf, spec)
        check_counts(spec)
        given = {name: getattr(spec, name) for name in NO_SIZES} | dict(self.sizes(hf))
        spec = replace(spec, **model_sizes(hf, spec, given))
        return replace(spec, head=head_of(hf, spec), arguments=arguments_of(hf, spec))

    def _needed(self) -> str:
        """The module by which a layer is known to be a mixture."""
        return repr(f"{self._mixture}.{self.experts if self.call is None else self.router}".strip("."))

    def _final(self, body: At) -> tuple[Step, ...]:
        return () if self.norm is None else (body.through(self.norm),)

    def _options(self, entry: nn.Module) -> dict[str, Any]:
        return {"use_cache": False} if self.kind != "other" and takes(entry, "use_cache") else {}

    def layer(self, layer: At, index: int, stack: str) -> LayerSpec:
        """The spec of one layer."""
        mixture = layer.has(f"{self._mixture}.{self.experts}".strip("."))
        if self.call is not None:
            mixture = layer.has(self._mixture) and layer.sub(self._mixture).has(self.router)
        moe = self.moe(layer) if mixture else None
        sites = self._sites(layer, moe)
        how = self.post_join(layer)
        base, own = ("resid_mid", ()) if self.mid else ("resid_pre", ("attn_out",))
        branches = (*own, "mlp_out", "moe_out", *(("shared_out",) if self.shared_beside else ()))
        return LayerSpec(
            index=index,
            path=layer.path,
            sites={name: sites[name] for name in in_order(sites, self.moved)},
            moe=moe,
            mid=self._mid(layer),
            post=None if how is None else Join(base, tuple(branch for branch in branches if branch in sites), how),
            stack=stack,
        )

    def _mid(self, layer: At) -> Join | None:
        how = self.mid_join(layer) if self.mid and self.mid_join else None
        return None if how is None else Join("resid_pre", ("attn_out",), how)

    @property
    def _mixture(self) -> str:
        return self.block if self.mixture is None else self.mixture

    def _sites(self, layer: At, moe: MoESpec | None) -> dict[str, Site]:
        sites: dict[str, Site] = {"resid_pre": Input(layer.path), "resid_post": Output(layer.path)}
        if attention := self.attention(layer):
            sites["attn_out"] = Output(layer(attention))
        if self.mid:
            sites["resid_mid"] = ResidualInput(layer(self.mid))
        if moe is not None:
            sites |= self.moe_sites(layer, moe)
        elif dense := self.dense(layer):
            sites["mlp_out"] = Output(layer(dense))
        return sites | dict(self.sites(layer, moe is not None))

    def moe_sites(self, layer: At, moe: MoESpec) -> dict[str, Site]:
        block = layer.sub(self.block)
        router = layer.sub(self._mixture).sub(self.router)
        linear = RouterLinear(router.path, self.columns(router.module))
        logits = RouterOutput(router.path) if self.returns_logits else linear
        sites: dict[str, Site] = {
            "moe_in": Input(block.path),
            "router_logits": logits,
            "router_scores": logits,
            "moe_out": Output(block.path),
        }
        inside = BlockCall(moe.block, self._call) if self._call else ExpertsCall(moe.experts)
        sites |= dict.fromkeys(EXPERTS_POINTS, inside)
        sites |= self._selection_sites(layer, moe)
        if moe.shared and self.shared_gate:
            sites["shared_out"] = GatedOutput(moe.shared, layer(self.shared_gate))
        elif moe.shared:
            sites["shared_out"] = Output(moe.shared)
        return sites

    def _selection_sites(self, layer: At, moe: MoESpec) -> dict[str, Site]:
        if self._call is not None and getattr(self._call, "chooses", False):
            return dict.fromkeys(SELECTION, BlockCall(moe.block, self._call))
        who = self.selects(layer.hf.get_submodule(moe.router))
        if who is None:
            return {}
        return dict.fromkeys(SELECTION, RouterTopK(moe.block if who == "block" else moe.router, moe.num_experts))

    @property
    def _call(self) -> Callable[..., Any] | None:
        if not isinstance(self.call, LinearGate):
            return self.call
        inside = At(nn.Module(), self._mixture.removeprefix(self.block).strip("."))
        return replace(self.call, router=inside(self.router), experts=inside(self.experts))

    def moe(self, layer: At) -> MoESpec:
        """The spec of a layer's mixture."""
        block = layer.sub(self._mixture)
        router, experts = block.sub(self.router), block.sub(self.experts)
        renormalises = self.renormalises(block.module) if callable(self.renormalises) else self.renormalises
        scoring, counted_by = self.scoring(router.module), self.balance(router.module)
        top_k = self.top_k if isinstance(self.top_k, int) else count(block.module, self._top_k)
        return MoESpec(
            block=layer.sub(self.block).path,
            router=router.path,
            experts=experts.path,
            num_experts=count(block.module, self.num_experts),
            top_k=top_k,
            scoring=scoring,
            renormalises=attribute(router.module, "norm_topk_prob") if renormalises is None else renormalises,
            kernel=self.kernel or Fused.of(experts.module, experts.path),
            shared=layer(self.shared) if self.shared and layer.has(self.shared) else None,
            width=self._width(block) if self.wide(router.module) else None,
            experts_input=self.experts_input(block),
            routed_steps=self.routed_steps(block),
            whole_steps=self.whole_steps(block),
            adds_shared=not self.shared_beside,
            weights_on=self.weights_on,
            proportional=self.proportional,
            alone=self.alone(block.module),
            runs=self.runs,
            skips=self.skips,
            balance=counted_by and Balance(loss_top_k(layer.hf) or top_k, scoring.softcap, counted_by),
        )

    @property
    def _top_k(self) -> str:
        return f"{self.router}.top_k" if self.top_k is None else str(self.top_k)

    def _width(self, block: At) -> tuple[tuple[str, str], ...]:
        owner, _, name = self._top_k.rpartition(".")
        too = () if self.counts_too is None else ((block.path, self.counts_too),)
        return (block(owner), name), *too


@dataclass(frozen=True)
class Described:
    """An architecture that a function describes."""

    describe: Callable[[nn.Module], ModelSpec]
    notes: tuple[str, ...] = ()


# What several rows say


def sigmoid(router: Any) -> Scoring:
    """Router scores that are sigmoids."""
    return Scoring("sigmoid")


def never(router: Any) -> bool:
    """A router that takes no other number of experts."""
    return False


def first_of(*names: str) -> Callable[[At], str | None]:
    """The first of these that a layer has."""
    return lambda layer: next((name for name in names if layer.has(name)), None)


def branch_through(*names: str) -> How:
    """The branch passes through these modules before it is added."""
    return lambda layer: Sum(branch=tuple(layer.through(name) for name in names))


def softcap(config: Any) -> dict[str, Any]:
    """Logits capped as Gemma's are."""
    return {"logit_softcap": config.final_logit_softcapping}
