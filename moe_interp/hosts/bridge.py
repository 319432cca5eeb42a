"""The points of an opened model as hook points of the TransformerLens bridge around it.

A `TransformerBridge` keeps the transformers model and puts components of its own around the modules in it, so the local
host opens that model like any other. What is added here, and taken away by `BridgeHost.remove`:

1. Every point gets a name among the bridge's hooks (`hook_name`). Where TransformerLens has a hook point on the very
   module whose input or output the point is, that hook point serves, under this name too. Everywhere else the local
   host's own `HookPoint` becomes one of TransformerLens's as well (`BridgePoint`).
2. ``hook_resid_mid`` is ours. TransformerLens's is the input of the norm, and what is put there never reaches the
   residual stream.
3. Hook points of TransformerLens inside a mixture are watched. Those whose result goes nowhere refuse an edit
   (`DeadPoint`), the one that misses an edit in place hands out a copy (`WeightsPoint`), and ``pos_slice`` slices the
   positions of those that have the tokens of all texts on one axis, not what comes after (`FlatPoint`).

An object's class is exchanged to do so, because whoever holds a hook point, or hooked something to it, goes on holding
the same one.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformer_lens.conversion_utils.conversion_steps.attention_auto_conversion import AttentionAutoConversion
from transformer_lens.hook_points import HookPoint as LensPoint
from transformer_lens.hook_points import LensHandle
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from moe_interp.adapters.spec import Input, LayerSpec, MoESpec, Output, RouterLinear, Site
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.hosts.absent import Cached, absent_names
from moe_interp.hosts.calls import under_way
from moe_interp.hosts.local import LocalHost
from moe_interp.hosts.taps import RESIDUAL, HookPoint, Taps
from moe_interp.points import POINTS, Scope

STACKS = ("blocks", "encoder_blocks", "decoder_blocks")
THEIRS = ("embed", "resid_pre", "attn_out", "mlp_out", "moe_in", "moe_out", "resid_post")
"""Points whose values TransformerLens shows in the same shape, where it has a hook point on the module."""
CHANGES_WEIGHTS = ("enable_compatibility_mode", "process_weights")


def hook_name(point: str, block: str) -> str:
    """The name of a point among a bridge's hooks: ``hook_name("expert_out", "blocks.5")``.

    Points inside a mixture are in the block's ``mlp``; all others are named as TransformerLens names such values.
    """
    match POINTS[point].scope:
        case Scope.MODEL:
            return f"hook_{point}"
        case Scope.MOE:
            # Some blocks of TransformerLens have a hook_router_scores of their own: whatever they return besides.
            return f"{block}.mlp.hook_{'normalized_scores' if point == 'router_scores' else point}"
    return f"{block}.hook_{point}"


class BridgePoint(HookPoint, LensPoint):
    """A hook point of the local host that is one of TransformerLens's, too."""

    def forward(self, value: Tensor) -> Tensor:
        """A copy: hooks of TransformerLens's users write into what they are shown, and nothing else must change."""
        return value.clone()


@dataclass
class Flag:
    """Something that is the case for a while."""

    on: bool = False


class FlatPoint(LensPoint):
    """A hook point in a mixture, where values are [batch * pos, ...] as often as [batch, pos, ...]."""

    taps: Taps
    slicing: Flag

    def add_hook(self, hook: Any, *args: Any, **kwargs: Any) -> LensHandle:
        """The same; what a run with ``pos_slice`` adds is shown [batch, pos, ...], as it slices the second axis."""
        return super().add_hook(self.by_text(hook) if self.slicing.on else hook, *args, **kwargs)

    def by_text(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, shown [batch, pos, ...]."""

        used: set[Any] = self.taps.host.used
        if not used:  # or the pass would count as one in which nobody looks, and would not tell its texts
            used.add(self)

        def shown(value: Any, *, hook: LensPoint, see: Callable[..., Any] = hook) -> Any:
            flow = self.taps.now()
            if flow is None or not isinstance(value, Tensor):
                return see(value, hook=hook)
            batch, length = flow.grid
            if value.shape[:2] == (batch, length) or value.shape[:1] != (batch * length,):
                return see(value, hook=hook)
            result = see(value.reshape(batch, length, *value.shape[1:]), hook=hook)
            return None if result is None else result.reshape(value.shape)

        return shown


class WeightsPoint(FlatPoint):
    """Combine weights of all experts, of which TransformerLens compares an edit with what it handed out."""

    def forward(self, value: Any) -> Any:
        """A copy once somebody looks, so that an edit in place differs from the original and is seen."""
        return value.clone() if self.fwd_hooks else value


class DeadPoint(FlatPoint):
    """A hook point whose result TransformerLens does not use."""

    use: str

    def __call__(self, value: Any) -> Any:
        """The value, unless a hook changed it.

        Raises:
            BadInput: a hook changed it.
        """
        if not self.fwd_hooks or not isinstance(value, Tensor):
            return super().__call__(value)
        before = value.clone()
        after = super().__call__(value)
        if not torch.equal(after.nan_to_num(), before.nan_to_num()):
            raise BadInput(
                f"an edit of {self.name} changes nothing in the model",
                expected="hooks that read",
                got="one that returned or wrote another value",
                do=f"Edit {self.use}.",
            )
        return after


def check_raw(bridge: TransformerBridge) -> None:
    """Refuse a bridge whose weights or names are those of HookedTransformer.

    Raises:
        UnsupportedModel: compatibility mode is on, or weights were folded or centred.
    """
    if bridge.compatibility_mode or bridge._weights_processed:
        raise UnsupportedModel(
            "points of a bridge in compatibility mode would mean something else",
            expected="the weights of the checkpoint, and every hook called once",
            got="folded or centred weights, or hooks that are called once for each of their names",
            do="Build the bridge again and leave out enable_compatibility_mode().",
        )


class BridgeHost:
    """The points of an opened model among the hooks of its bridge.

    Attributes:
        hook_names: the name of every point at every layer (None: of the whole model).
        spellings: all its names, those of TransformerLens's own hook points left out.
    """

    def __init__(self, bridge: TransformerBridge, host: LocalHost):
        check_raw(bridge)
        self.bridge, self.host = bridge, host
        self.hook_names: dict[tuple[str, int | None], str] = {}
        self.spellings: dict[tuple[str, int | None], list[str]] = {}
        self.undo: list[Callable[[], None]] = []
        self.slicing = Flag()
        self.blocks = self._blocks()
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Leave the bridge as it was found; hooks on points that were added are gone."""
        for restore in reversed(self.undo):
            restore()
        self.undo = []

    def _blocks(self) -> dict[int, str]:
        """The bridge's name for the block of every layer."""
        stacks = {stack: self.bridge._modules.get(stack) for stack in STACKS}
        there = {
            id(block): f"{stack}.{number}"
            for stack, blocks in stacks.items()
            if isinstance(blocks, nn.ModuleList)
            for number, block in enumerate(blocks)
        }
        modules = {layer.index: self.host.hf.get_submodule(layer.path) for layer in self.host.spec.layers}
        missing = [index for index, module in modules.items() if id(module) not in there]
        if missing or len(set(map(id, modules.values()))) < len(modules):
            raise UnsupportedModel(
                f"cannot attach to a bridge of {self.host.spec.model_type}",
                expected="one block of the bridge for each layer",
                got=f"no block of their own for layers {missing or list(modules)}",
                do="Use moe.wrap(model), which opens it without TransformerLens.",
            )
        return {index: there[id(module)] for index, module in modules.items()}

    def _install(self) -> None:
        hooks = self.bridge.hook_dict
        if self.host.spec.embed is not None:
            self._add("embed", None, Output(self.host.spec.embed), hooks)
        for layer in self.host.spec.layers:
            for point, site in layer.sites.items():
                if point in POINTS:
                    self._add(point, layer.index, site, hooks)
            if "resid_mid" in layer.sites:
                self._alias_to_itself(self.blocks[layer.index], "hook_resid_mid")
            if layer.moe:
                self._watch(layer, layer.moe)
        own = vars(self.bridge)
        self.absent = absent_names(self.host.spec, self.blocks, self.bridge.hook_dict)
        self._put(own, "run_with_cache", self._caching(self.bridge.run_with_cache))
        self._put(own, "get_caching_hooks", self._by_text(self.bridge.get_caching_hooks))
        for name in CHANGES_WEIGHTS:
            self._put(own, name, _refuse_folding)

    def _add(self, point: str, layer: int | None, site: Site, hooks: dict[str, LensPoint]) -> None:
        """Give a point its names; in a block also ``hook_{point}``, so that ``cache[point, layer]`` finds it."""
        block = "" if layer is None else self.blocks[layer]
        theirs = self._theirs(point, layer, site)
        if theirs is not None and isinstance(site, Output):  # the module's own code has passed it when ours is met
            self._put(self.host.fronts, (point, layer), theirs)
            self.undo.append(theirs.register_forward_pre_hook(self._standing_first(point, layer)).remove)
        hook = theirs or self._ours(point, layer)
        name = hook_name(point, block)
        if self._taken(name, hook, hooks):  # by what comes of it after a norm or a factor
            name = hook.name or f"{block}.hook_raw_{point}".lstrip(".")
        short = f"{block}.hook_{point}"
        names = [short, name] if block and not self._taken(short, hook, hooks) else [name]
        for one in names:  # the first is the hook's own: a filter that names another finds that as well
            self._register(one, hook)
        self.hook_names[point, layer] = name
        self.spellings[point, layer] = names

    def _standing_first(self, point: str, layer: int | None) -> Callable[..., Tensor | None]:
        """A hook that carries out the edits that stand, before all others at TransformerLens's own hook point."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
            call = under_way(self.host)
            return None if call is None else call.edited_first((point, layer), args[0])

        return hook

    def _taken(self, name: str, hook: LensPoint, hooks: dict[str, LensPoint]) -> bool:
        return not name.endswith(".hook_resid_mid") and hooks.get(name, hook) is not hook

    def _theirs(self, point: str, layer: int | None, site: Site) -> LensPoint | None:
        """TransformerLens's own hook point for the value, where it has one that reads and edits just that."""
        if point not in THEIRS or not isinstance(site, Input | Output):
            return None
        spec = self.host.spec
        moe = None if layer is None else spec.layers[layer].moe
        inside = moe is not None and point in ("moe_in", "moe_out") and site.module != moe.block
        if inside or (spec.streams > 1 and point in RESIDUAL):  # of another shape, or it may be
            return None
        component = self.host.hf.get_submodule(site.module)
        if not isinstance(component, GeneralizedComponent) or getattr(component, "_output_contribution_scale", 1) != 1:
            return None
        found = component.hook_in if isinstance(site, Input) else component.hook_out
        same = found.hook_conversion is None or isinstance(found.hook_conversion, AttentionAutoConversion)
        return found if same else None  # what that does to [batch, pos, d_model] is nothing

    def _ours(self, point: str, layer: int | None) -> LensPoint:
        """The local host's hook point, as one of TransformerLens's for as long as this is attached."""
        found: Any = self.host.point(point, layer)
        self._exchange(found, BridgePoint, **{k: v for k, v in vars(LensPoint()).items() if k not in vars(found)})
        self.undo.append(lambda: found.remove_hooks("both", including_permanent=True))
        return found

    def _exchange(self, hook: Any, kind: type[nn.Module], **attributes: Any) -> None:
        """Make a hook point one of another class, with more attributes, until `remove`."""
        before = type(hook)
        hook.__class__ = kind
        vars(hook).update(attributes)

        def restore() -> None:
            hook.__class__ = before
            for name in attributes:
                del vars(hook)[name]

        self.undo.append(restore)

    def _register(self, name: str, hook: LensPoint) -> None:
        """Put a hook point into the bridge's registry, and on the component that its name says."""
        registry = self.bridge._hook_registry
        if registry.get(name) is hook:
            return
        if hook.name is None:
            hook.name = name
        self._put(registry, name, hook)
        owner, _, attribute = name.rpartition(".")
        component = self._component(owner)
        if component is not None and attribute not in component._modules:
            self._put(vars(component), attribute, hook)

    def _component(self, path: str) -> Any:
        """The bridge's component with this path; None where it has none."""
        found: nn.Module | None = self.bridge
        for name in filter(None, path.split(".")):
            found = None if found is None else found._modules.get(name)
        return found

    def _put(self, where: dict[Any, Any], name: Any, value: Any) -> None:
        there, before = name in where, where.get(name)
        where[name] = value
        self.undo.append(lambda: where.__setitem__(name, before) if there else where.__delitem__(name))

    def _alias_to_itself(self, block: str, name: str) -> None:
        """Aliases of a block come before the registry: point this one at what is registered."""
        component: Any = self.bridge.get_submodule(block)
        there, before = "hook_aliases" in vars(component), component.hook_aliases
        component.hook_aliases = {**before, name: name}  # by attribute, so that the bridge's memory of aliases expires

        def restore() -> None:
            component.hook_aliases = before
            if not there:
                del vars(component)["hook_aliases"]

        self.undo.append(restore)

    def _watch(self, layer: LayerSpec, moe: MoESpec) -> None:
        """Mark what TransformerLens's own hook points in a mixture do with an edit, and which shape they have."""
        taps = self.host.taps[layer.index]
        paths = {moe.block, moe.router, moe.experts, moe.shared} - {None}
        inside = {hook for path in paths for hook in self.host.hf.get_submodule(str(path)).modules()}
        dead = self._dead(layer, moe)
        for hook in inside:
            if type(hook) is not LensPoint:
                continue
            kind = DeadPoint if hook in dead else FlatPoint
            if str(hook.name).endswith("hook_expert_weights"):
                kind = WeightsPoint
            more = {"use": self.hook_names["router_logits", layer.index]} if kind is DeadPoint else {}
            self._exchange(hook, kind, taps=taps, slicing=self.slicing, **more)

    def _dead(self, layer: LayerSpec, moe: MoESpec) -> set[Any]:
        """Hook points on logits that a router hands out when its choice is made, and on what a block hands on."""
        router, block = (self.host.hf.get_submodule(path) for path in (moe.router, moe.block))
        chosen = isinstance(layer.sites["router_logits"], RouterLinear)
        found = {getattr(router, "hook_out", None)} if chosen else set()
        return found | {getattr(block, "hook_router_scores", None)}

    def _caching(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run_with_cache``, under which hooks in mixtures know that positions are sliced.

        What is cached says at which layers a point is, where it is asked for at another.
        """
        signature = inspect.signature(run)

        @functools.wraps(run)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, self.slicing.on = self.slicing.on, _slices(signature, args, kwargs)
            try:
                output, cache = run(*args, **kwargs)
            finally:
                self.slicing.on = before
            if isinstance(cache, dict):
                return output, Cached(cache, self.absent, self.host.spec)
            cache.cache_dict = Cached(cache.cache_dict, self.absent, self.host.spec)
            return output, cache

        return wrapped

    def _by_text(self, build: Callable[..., Any]) -> Callable[..., Any]:
        """``get_caching_hooks``, whose hooks slice positions."""
        signature = inspect.signature(build)

        @functools.wraps(build)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            cache, *lists = build(*args, **kwargs)
            if not _slices(signature, args, kwargs):
                return cache, *lists
            hooks = self.bridge.hook_dict
            return cache, *([(name, _shown_by_text(hooks[name], hook)) for name, hook in some] for some in lists)

        return wrapped


def _shown_by_text(point: LensPoint, hook: Callable[..., Any]) -> Callable[..., Any]:
    return point.by_text(hook) if isinstance(point, FlatPoint) else hook


def _slices(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return signature.bind(*args, **kwargs).arguments.get("pos_slice") is not None


def _refuse_folding(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedModel(
        "cannot fold or rename what is attached",
        expected="the weights of the checkpoint while moe_interp is attached",
        got="a call that changes what points mean",
        do="Close what moe.attach returned first.",
    )
