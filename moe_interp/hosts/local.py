"""A plain PyTorch model, opened: every point becomes a small identity module that hooks can read and replace.

What is installed, and taken away again by `LocalHost.remove`:

- ``moe_points`` on every decoder layer (and on the model, for ``embed``): one `HookPoint` for each point. They hold no
  parameters, so the state dict keeps its keys; plain hooks and other libraries see them like any module.
- hooks on the model's own modules that carry values through those hook points. A hook point that nobody hooks costs
  a dictionary look-up.
- an experts function in transformers' registry. It is chosen for each experts module through a copy of that module's
  config: configs are shared between layers and models, so writing to one would reach models that are not ours, and
  would be undone by whoever restores it. Experts that do not ask the registry, and blocks that compute in their own
  way, get another ``forward`` on the instance.
- a ``__reduce_ex__`` that refuses copies and pickles, whose hooks would reach the original.
- a ``forward`` on the whole model that keeps the compiler out. Code compiled before does not see hooks that came
  later, so an opened model runs eagerly; what was compiled is back when it is closed.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_interp.adapters.experts import run_experts
from moe_interp.adapters.family import bare
from moe_interp.adapters.formats import check_format, is_fp8, plain_function
from moe_interp.adapters.spec import BlockCall, LayerSpec, ModelSpec
from moe_interp.errors import UnsupportedModel
from moe_interp.hosts.hooks import attach, attach_grid, attach_modality
from moe_interp.hosts.taps import HookPoint, Taps, refuse_copies

IMPLEMENTATION = "moe_interp"
ATTRIBUTE = "moe_points"


class LocalHost:
    """Hook points on a transformers model in this process."""

    def __init__(self, hf: nn.Module, spec: ModelSpec):
        self.hf, self.spec = hf, spec
        self.handles: list[RemovableHandle] = []
        self.undo: list[Callable[[], Any]] = []
        self.configs: dict[nn.Module, Any] = {}
        self.removals = 0  # how many `removed` are under way
        self.taps = {layer.index: Taps(layer, spec.streams) for layer in spec.layers}
        self.embed = nn.ModuleDict({"embed": HookPoint()})
        self.fronts: dict[tuple[str, int | None], nn.Module] = {}  # of others, passed before our own
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def point(self, name: str, layer: int | None) -> HookPoint:
        """The hook point of a point at a layer."""
        points = self.embed if layer is None else self.taps[layer].points
        return points[name]  # type: ignore[return-value]

    def front(self, name: str, layer: int | None) -> nn.Module:
        """Where the value of a point passes first: an identity, as its hook point is."""
        return self.fronts.get((name, layer), self.point(name, layer))

    def _install(self) -> None:
        for layer in self.spec.layers:
            if layer.moe:
                check_format(self.hf.get_submodule(layer.moe.experts), layer.moe.experts)
        self._run_eagerly()
        self._set(self.hf, "__reduce_ex__", refuse_copies)
        self._add(self.hf, ATTRIBUTE, self.embed)
        if self.spec.embed is not None:
            self.handles.append(self.hf.get_submodule(self.spec.embed).register_forward_hook(self._embedded))
        for taps in self.taps.values():
            self._add(self.hf.get_submodule(taps.layer.path), attribute_of(taps.layer), taps.points)
            self.handles += [attach_grid(self.hf, taps), *attach_modality(self.hf, taps)]
            for name, site in taps.layer.sites.items():
                self.handles += attach(self.hf, taps, name, site)
            self._replace(taps)

    def _add(self, owner: nn.Module, name: str, points: nn.ModuleDict) -> None:
        owner.add_module(name, points.train(self.hf.training))
        # Of this very module: by the time of closing somebody may have cut it out of the model.
        self.undo.append(functools.partial(owner._modules.pop, name, None))

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor | None:
        point = self.point("embed", None)
        if point.live:
            return point(value)
        for watcher in point.watchers:
            watcher.missed()
        return None

    def _replace(self, taps: Taps) -> None:
        """Put our own computation of experts or block in place of the model's."""
        moe = taps.layer.moe
        if moe is None:
            return
        site = taps.layer.sites["expert_out"]
        module = bare(self.hf.get_submodule(site.module))
        if isinstance(site, BlockCall):
            self._replace_forward(module, lambda *args, **kwargs: site.forward(module, taps, *args, **kwargs))
        elif asks_registry(module):
            if is_fp8(module):
                _register_fp8()
            self.configs[module] = module.config
            taps.in_turn = plain_function(module) == "eager"
            module.config = _choosing(module.config, IMPLEMENTATION)
            module._moe_taps = taps
        else:
            self._replace_forward(module, lambda *args: _experts_forward_of(taps, module, *args))

    def _run_eagerly(self) -> None:
        # Compiled code does not ask whether hooks came or went: it would run on without them.
        for path in {"", self.spec.entry}:
            module: Any = self.hf.get_submodule(path)
            self._set(module, "forward", _eagerly(module.forward))
            if module._compiled_call_impl is not None:
                self._set(module, "_compiled_call_impl", None)

    def _replace_forward(self, module: Any, forward: Callable[..., Any]) -> None:
        wrapped = vars(module).get("__nnsight__")
        if wrapped is not None:  # nnsight's own forward stays, and calls what it finds here
            self._set(wrapped, "body", lambda module, *args, **kwargs: forward(*args, **kwargs))
            return
        # accelerate wraps an offloaded module's forward and calls the original from there.
        self._set(module, "_old_forward" if "_old_forward" in vars(module) else "forward", forward)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """An attribute of the instance, for as long as the model is open."""
        own = not isinstance(owner, nn.Module) or name in vars(owner)
        before = getattr(owner, name) if own else None
        setattr(owner, name, value)

        def undo() -> None:
            if getattr(owner, name) is not value:
                return  # somebody wrapped it since, and calls it; it calls the original in turn
            if own:
                setattr(owner, name, before)
            else:
                delattr(owner, name)

        self.undo.append(undo)

    def remove(self) -> None:
        """Leave the model as it was found."""
        for handle in self.handles:
            handle.remove()
        for restore in reversed(self.undo):
            restore()
        for experts, config in self.configs.items():
            experts.config = config
            del experts._moe_taps
        self.handles, self.undo, self.configs = [], [], {}

    @contextmanager
    def removed(self) -> Iterator[None]:
        """The model without any of this, uncompiled and on transformers' own experts, inside the ``with``.

        Raises:
            UnsupportedModel: transformers has none for these experts here.
        """
        chosen = dict(self.plain)
        if None in chosen.values():
            raise UnsupportedModel(
                "there is no plain model to run",
                expected="experts that an implementation of transformers runs on this device",
                got="FP8 experts without an accelerator",
            )
        self.removals += 1
        try:
            if self.removals == 1:
                self.remove()
                for module, name in chosen.items():
                    self.undo.append(functools.partial(setattr, module, "config", module.config))
                    module.config = _choosing(module.config, str(name))
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.removals -= 1
            if self.removals == 0 and is_open(self):  # it may have been closed inside
                self.remove()
                self._install()

    @property
    def plain(self) -> dict[Any, str | None]:
        """For each module of experts that asks the registry: transformers' own implementation that can run it."""
        return {module: plain_function(module) for module in self.configs}

    @property
    def exact(self) -> bool:
        """Whether every mixture of the model runs on transformers' ``grouped_mm``, so that a run can be bit-equal."""
        return len(self.configs) == len(self.spec.moe_layers) and set(self.plain.values()) == {"grouped_mm"}

    @contextmanager
    def widened(self, widths: Mapping[int, int]) -> Iterator[None]:
        """Let routers choose another number of experts (by layer) inside the ``with``."""
        with ExitStack() as stack:
            everywhere = [(*place, k) for layer, k in widths.items() for place in self.spec.moe(layer).width or ()]
            for owner, name, k in everywhere:
                router = bare(self.hf.get_submodule(owner))
                stack.callback(setattr, router, name, getattr(router, name))
                setattr(router, name, k)
            yield

    @contextmanager
    def replaced(self, path: str, forward: Callable[..., Any]) -> Iterator[None]:
        """Another forward of a module inside the ``with``."""
        module = bare(self.hf.get_submodule(path))
        name = "_old_forward" if "_old_forward" in vars(module) else "forward"
        there, before = name in vars(module), vars(module).get(name)
        setattr(module, name, forward)
        try:
            yield
        finally:
            if there:
                setattr(module, name, before)
            else:
                delattr(module, name)

    @contextmanager
    def unembedding(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Change what the unembedding is given of a batch, [B, S, D], inside the ``with``; some tokens alone, say.

        Rows [n, D], of a residual that is decoded on the way, are left as they are. So is a module that is not one of
        transformers' models: its forward may count on logits of every token.
        """

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (change(args[0]), *args[1:]) if args and args[0].dim() == 3 else None

        with ExitStack() as stack:
            if self.spec.unembed is not None and _is_transformers(self.hf.get_submodule(self.spec.entry)):
                unembedding = self.hf.get_submodule(self.spec.unembed)
                stack.callback(unembedding.register_forward_pre_hook(hook).remove)
            yield

    @contextmanager
    def exchanged(self, whose: Mapping[int, int]) -> Iterator[None]:
        """Let the experts of other layers run in place of a layer's own inside the ``with``."""
        before = {layer: self.taps[layer].stand_in for layer in whose}
        try:
            for layer, other in whose.items():
                self.taps[layer].stand_in = bare(self.hf.get_submodule(self.spec.moe(other).experts))
            yield
        finally:
            for layer, module in before.items():
                self.taps[layer].stand_in = module

    @contextmanager
    def dropping(self, layers: Iterable[int]) -> Iterator[None]:
        """Leave slots of weight 0 uncomputed at these layers inside the ``with``."""
        before = {layer: self.taps[layer].drops for layer in layers}
        try:
            for layer in before:
                self.taps[layer].drops = True
            yield
        finally:
            for layer, drops in before.items():
                self.taps[layer].drops = drops


_HOSTS: WeakKeyDictionary[nn.Module, tuple[LocalHost, int]] = WeakKeyDictionary()  # and how many opened them


def open_host(hf: nn.Module, spec: ModelSpec) -> LocalHost:
    """The host of a model, opened unless it is; close it as often as it was opened.

    Raises:
        UnsupportedModel: a copy of an opened model.
    """
    if hf not in _HOSTS and hasattr(hf, ATTRIBUTE):
        raise UnsupportedModel(
            "a copy of an opened model cannot be opened",
            expected="a model that was copied before it was opened, or after it was closed",
            got="a copy whose hooks still reach the original",
            do="Close the original, then copy.",
        )
    host, users = _HOSTS.get(hf) or (LocalHost(hf, spec), 0)
    _HOSTS[hf] = (host, users + 1)
    return host


def close_host(hf: nn.Module) -> None:
    """Leave the model as it was found, when everybody who opened it has closed it."""
    host, users = _HOSTS[hf]
    if users > 1:
        _HOSTS[hf] = (host, users - 1)
        return
    del _HOSTS[hf]
    host.remove()


def is_open(host: LocalHost) -> bool:
    """Whether somebody has opened a model by this host and not closed it."""
    return _HOSTS.get(host.hf, (None, 0))[0] is host


def attribute_of(layer: LayerSpec) -> str:
    """The name of a layer's hook points on its module."""
    return ATTRIBUTE if layer.part == 0 else f"{ATTRIBUTE}_{layer.part}"


def asks_registry(experts: nn.Module) -> bool:
    """Whether a module looks its forward up in transformers' registry, by its config."""
    return hasattr(experts, "_is_expert_parallel") and hasattr(experts, "config")


def _is_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _eagerly(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with nothing in it compiled."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return forward(*args, **kwargs)

    return torch.compiler.disable(run, reason="opened by moe_interp: points need eager execution")


def _choosing(config: Any, implementation: str) -> Any:
    """A copy of a config that chooses this experts function."""
    chosen = copy.copy(config)
    chosen._experts_implementation_internal = implementation
    return chosen


def _experts_forward(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts call, with everything passed through hook points."""
    return _experts_forward_of(experts._moe_taps, experts, hidden, ids, weights)


def _experts_forward_of(taps: Taps, experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    moe = taps.layer.moe
    rows = hidden.reshape(-1, hidden.shape[-1])
    out = run_experts(taps, moe.kernel, experts, rows, ids, weights, in_turn=taps.in_turn)  # type: ignore[union-attr]
    return out.view(*hidden.shape[:-1], -1)


def _fp8_experts_forward(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same with weights as transformers' FP8 implementations take them."""
    return _experts_forward(experts, hidden, ids, weights.to(hidden.dtype))


def _register_fp8() -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    ALL_FP8_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _fp8_experts_forward)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
