"""A plain PyTorch model, opened: every point becomes a small identity module that hooks can read and replace.

What is installed, and taken away again by `LocalHost.remove`:

- ``moe_points`` on every decoder layer (and on the model, for ``embed``): one `HookPoint` for each point. They hold no
  parameters, so the state dict keeps its keys; plain hooks and other libraries see them like any module.
- hooks on the model's own modules that carry values through those hook points, if the pass that is under way or
  anybody at the hook point wants them.
- an experts function in transformers' registry. It is chosen for each experts module through a copy of that module's
  config: configs are shared between layers and models, so writing to one would reach models that are not ours, and
  would be undone by whoever restores it. Experts that do not ask the registry, and blocks that compute in their own
  way, get another ``forward`` on the instance. In calls of the transformers model where nobody reads or edits single
  experts, all of them run as they did.
- a ``forward`` on the whole model that begins a pass (`moe_interp.hosts.calls`) and keeps the compiler out: code that
  was compiled before does not see hooks that came later. Modules inside begin one when they are called by themselves.
- routers whose number of experts is that of the pass (`moe_interp.hosts.widths`).
- a ``__reduce_ex__`` that refuses copies and pickles, whose hooks would reach the original.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.adapters.experts import Separate
from moe_interp.adapters.formats import check_format, plain_function
from moe_interp.adapters.reading import bare
from moe_interp.adapters.spec import BlockCall, LayerSpec, ModelSpec
from moe_interp.errors import UnsupportedModel
from moe_interp.hosts.calls import enter, open_pass, part_of, session_of, under_way, without_session
from moe_interp.hosts.eager import eagerly
from moe_interp.hosts.experts_call import asks_registry, experts_forward, lead_through
from moe_interp.hosts.hooks import around, attach, attach_grid, attach_modality
from moe_interp.hosts.parts import check_in_place, claim, parts_of
from moe_interp.hosts.recompute import remembering
from moe_interp.hosts.standing import Standing, Standings
from moe_interp.hosts.steps import check_steps
from moe_interp.hosts.taps import HookPoint, Taps, refuse_copies
from moe_interp.hosts.widths import varying

ATTRIBUTE = "moe_points"
HOST = "_moe_interp_host"


class LocalHost:
    """Hook points on a transformers model in this process.

    Attributes:
        entries: modules that a pass may enter by with tokens; each with the one stack that it has, or None.
        standings: what stands on the model.
        used: hook points that somebody has hooked or watched.
        fronts: hook points of others that a value passes before our own, by (point, layer).
    """

    def __init__(self, hf: nn.Module, spec: ModelSpec):
        self.hf, self.spec = hf, spec
        self.openings: weakref.WeakSet[Opening] = weakref.WeakSet()
        self.undo: list[Callable[[], Any]] = []
        self.used: set[HookPoint] = set()
        self.closed = False
        self.configs: dict[nn.Module, Any] = {}
        self.standings = Standings()
        self.entries = _entries(hf, spec)
        self.recomputed = [module for module in hf.modules() if hasattr(module, "gradient_checkpointing")]
        self.taps = {layer.index: Taps(self, layer, spec.streams) for layer in spec.layers}
        self.embed = nn.ModuleDict({"embed": HookPoint(self.used)})
        self.fronts: dict[tuple[str, int | None], nn.Module] = {}
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def point(self, name: str, layer: int | None) -> HookPoint:
        """The hook point of a point at a layer."""
        points = self.embed if layer is None else self.taps[layer].points
        return points[name]  # type: ignore[return-value]

    def experts_at(self, layer: int) -> nn.Module:
        """The experts of a layer."""
        return bare(self.hf.get_submodule(self.spec.moe(layer).experts))

    # ---- installing -----------------------------------------------------------------------------------------

    def _install(self) -> None:
        for layer in self.spec.layers:
            self._check(layer)
        self.undo += claim(self, self.hf, self.spec.layers)
        self._begin_passes()
        self._set(self.hf, "__reduce_ex__", refuse_copies)
        self._add(self.hf, ATTRIBUTE, self.embed)
        if self.spec.embed is not None:
            self.undo.append(self.hf.get_submodule(self.spec.embed).register_forward_hook(self._embedded).remove)
        if self.spec.unembed is not None and _is_transformers(self.hf.get_submodule(self.spec.entry)):
            self.undo.append(self.hf.get_submodule(self.spec.unembed).register_forward_pre_hook(self._unembed).remove)
        for taps in self.taps.values():
            self._add(self.hf.get_submodule(taps.layer.path), attribute_of(taps.layer), taps.points)
            self.undo += [attach_grid(self.hf, taps), *attach_modality(self.hf, taps)]
            for name, site in taps.layer.sites.items():
                self.undo += attach(self.hf, taps, name, site)
            self._replace(taps)
        self.parts = {layer.index: parts_of(self.hf, layer) for layer in self.spec.layers}

    def _check(self, layer: LayerSpec) -> None:
        if layer.moe:
            check_format(self.hf.get_submodule(layer.moe.experts), layer.moe.experts)
        if hasattr(self.hf.get_submodule(layer.path), attribute_of(layer)):
            raise UnsupportedModel(
                "a part of an opened model cannot be opened",
                expected="the whole model, which is open already, or a part of one that is closed",
                got=f"a layer at {layer.path or 'the top'} that has hook points",
                do="Use the model that is open; it can be called by its parts, too.",
            )

    def check_in_place(self, layers: Iterable[int | None]) -> None:
        """Refuse edits and reads at layers of which a module was exchanged or compiled since.

        Raises:
            BadInput: naming the first such module.
        """
        for layer in layers:
            if layer is not None:
                check_in_place(self.hf, self.parts[layer])

    def _begin_passes(self) -> None:
        """Let a pass begin where the model, or a part of it, is called."""
        for path in {"", self.spec.entry}:
            module: Any = self.hf.get_submodule(path)
            self._set(module, "forward", eagerly(self._entering(path, module.forward)))
            if module._compiled_call_impl is not None:
                self._set(module, "_compiled_call_impl", None)
        blocks = {layer.moe.block: layer for layer in self.spec.layers if layer.moe}
        layers = {layer.path for layer in self.spec.layers}
        for path in self.entries.keys() - {"", self.spec.entry} - layers - blocks.keys():
            self.undo.append(around(self.hf.get_submodule(path), functools.partial(enter_at, self, path)))
        for path in layers - {"", self.spec.entry}:
            self.undo.append(around(self.hf.get_submodule(path), functools.partial(self._layer, path)))
        for path, layer in blocks.items():
            if path not in layers:
                self.undo.append(around(self.hf.get_submodule(path), functools.partial(self._block, layer)))
        entry: Any = self.hf.get_submodule(self.spec.entry)
        if hasattr(entry, "prepare_inputs_for_generation"):
            self._set(entry, "prepare_inputs_for_generation", self._preparing(entry.prepare_inputs_for_generation))
        if hasattr(entry, "generate"):
            self._set(entry, "generate", self._generating(entry, entry.generate))

    def _entering(self, path: str, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return enter(self, path, own, args, kwargs)

        return forward

    def _layer(self, path: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer, as a part of a pass or alone; left out, or its form noted, where a session says so."""
        call = under_way(self)
        session = None if call is None else call.session
        if session is not None and path in session.skipped:
            hidden, form = args[0] if args else kwargs["hidden_states"], session.skipped[path]
            return hidden if form is None else (hidden, *form)
        output = enter(self, path, own, args, kwargs)
        if session is not None and session.forms is not None:
            session.forms[path] = output[1:] if isinstance(output, tuple) else None
        return output

    def _block(self, layer: LayerSpec, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A mixture, as a part of a pass or alone."""

        path: str = layer.moe.block  # type: ignore[union-attr]
        if part_of(self, path):
            return own(*args, **kwargs)

        def block(*args: Any, **kwargs: Any) -> Any:
            flow = self.taps[layer.index].now()
            if flow is not None:  # the layer was not called
                flow.enter(args[0] if args else kwargs["hidden_states"])
            return own(*args, **kwargs)

        return enter(self, path, block, args, kwargs)

    def _preparing(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """A generation's own preparation of the inputs of a pass, which tells its session that the pass comes."""

        @functools.wraps(own)
        def prepare(*args: Any, **kwargs: Any) -> Any:
            session = session_of(self)
            if session is not None:
                session.prepared = True
            return own(*args, **kwargs)

        return prepare

    def _generating(self, entry: Any, own: Callable[..., Any]) -> Callable[..., Any]:
        """transformers' ``generate``: of the session that is in force, or, inside it, with what stands alone."""

        @functools.wraps(own)
        def generate(*args: Any, **kwargs: Any) -> Any:
            session = session_of(self)
            if session is None or session.generating:
                check_steps(self.standings.edits(), kwargs, entry.generation_config)
                return own(*args, **kwargs) if session is None else without_session(own, *args, **kwargs)
            session.generating = True
            check_steps(session.program.interventions, kwargs, entry.generation_config)
            return own(*args, **kwargs)

        return generate

    def _add(self, owner: nn.Module, name: str, points: nn.ModuleDict) -> None:
        owner.add_module(name, points.train(self.hf.training))
        # Of this very module: by the time of closing somebody may have cut it out of the model.
        self.undo.append(functools.partial(owner._modules.pop, name, None))

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor | None:
        call, point = open_pass(self), self.point("embed", None)
        if call is None:
            return None
        if not point.live:
            for watcher in point.watchers:
                watcher.missed()
        if point.live or ("embed", None) in call.wanted:
            return call.passed("embed", None, point, value)
        return None

    def _unembed(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Change what the unembedding is given of a batch, [B, S, D], where a session says so.

        Rows [n, D], of a residual that is decoded on the way, are left as they are. So is a module that is not one of
        transformers' models: its forward may count on logits of every token.
        """
        call = under_way(self)
        change = None if call is None or call.session is None else call.session.unembed
        return (change(args[0]), *args[1:]) if change and args and args[0].dim() == 3 else None

    def _replace(self, taps: Taps) -> None:
        """Put our own computation of experts or block in place of the model's."""
        moe = taps.layer.moe
        if moe is None:
            return
        for owner, name in moe.width or ():
            self.undo.append(varying(bare(self.hf.get_submodule(owner)), name, taps))
        if isinstance(moe.kernel, Separate):
            self.undo += moe.kernel.open(self.hf.get_submodule(moe.experts))
        site = taps.layer.sites["expert_out"]
        module = bare(self.hf.get_submodule(site.module))
        if isinstance(site, BlockCall):
            self._replace_forward(module, functools.partial(_block_forward, taps, site, module))
        elif asks_registry(module):
            self.configs[module] = module.config
            lead_through(module, taps)
        else:
            self._replace_forward(module, functools.partial(experts_forward, taps, module))

    def _replace_forward(self, module: Any, forward: Callable[..., Any]) -> None:
        """``forward(own, *args, **kwargs)`` in place of a module's own."""
        wrapped = vars(module).get("__nnsight__")
        if wrapped is not None:  # nnsight's own forward stays, and calls what it finds here
            body = wrapped.body
            self._set(
                wrapped,
                "body",
                lambda module, *args, **kwargs: forward(functools.partial(body, module), *args, **kwargs),
            )
            return
        # accelerate wraps an offloaded module's forward and calls the original from there.
        name = "_old_forward" if "_old_forward" in vars(module) else "forward"
        self._set(module, name, functools.partial(forward, getattr(module, name)))

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
        """Leave the model as it was found; again, if it was interrupted."""
        self.closed = True
        self.standings.end()
        while self.undo:
            self.undo[-1]()
            self.undo.pop()
        for experts, config in self.configs.items():
            experts.config = config
            vars(experts).pop("_moe_own", None)
        self.configs = {}

    # ---- while it is open -----------------------------------------------------------------------------------

    def plainly(self) -> AbstractContextManager[Standing]:
        """The model as it was found, uncompiled and on transformers' own experts, in this context inside the ``with``.

        Raises:
            UnsupportedModel: transformers has none for these experts here.
        """
        if None in self.plain.values():
            raise UnsupportedModel(
                "there is no plain model to run",
                expected="experts that an implementation of transformers runs on this device",
                got="FP8 experts without an accelerator",
            )
        return self.standings.stand(Standing(plain=True))

    @property
    def plain(self) -> dict[Any, str | None]:
        """For each module of experts that asks the registry: transformers' own implementation that can run it."""
        return {module: plain_function(module) for module in self.configs}

    @property
    def exact(self) -> bool:
        """Whether every mixture of the model runs on transformers' ``grouped_mm``, so that a run can be bit-equal."""
        return len(self.configs) == len(self.spec.moe_layers) and set(self.plain.values()) == {"grouped_mm"}

    def remember_recomputed(self) -> None:
        """Let layers that are computed anew in a backward pass find the pass that they were computed in."""
        for module in self.recomputed if torch.is_grad_enabled() else ():
            own = vars(module).get("_gradient_checkpointing_func") if module.training else None
            if own is not None and not hasattr(own, "remembers"):
                self._set(module, "_gradient_checkpointing_func", remembering(own))


def enter_at(host: LocalHost, path: str, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a part of the model that is given tokens."""
    return enter(host, path, own, args, kwargs)


class Opening:
    """Somebody's use of an opened model; the model is closed when the last of them is."""

    def __init__(self, host: LocalHost):
        self.host = host

    def close(self) -> None:
        """Leave the model as it was found, if nobody else uses it."""
        with _OPENING:
            self.host.openings.discard(self)
            if not any(True for _ in self.host.openings):
                self.host.remove()
                if vars(self.host.hf).get(HOST) is self.host:
                    del vars(self.host.hf)[HOST]


_OPENING = threading.RLock()


def open_host(hf: nn.Module, spec: ModelSpec) -> Opening:
    """Open a model, unless it is open.

    Raises:
        UnsupportedModel: a copy of an opened model, or a part of one.
    """
    with _OPENING:
        host = vars(hf).get(HOST)
        if host is not None and host.hf is not hf:
            raise UnsupportedModel(
                "a copy of an opened model cannot be opened",
                expected="a model that was copied before it was opened, or after it was closed",
                got="a copy whose hooks still reach the original",
                do="Close the original, then copy.",
            )
        if host is None:  # on the model itself: a table of models would keep them
            host = vars(hf)[HOST] = LocalHost(hf, spec)
        opening = Opening(host)
        host.openings.add(opening)
        return opening


def attribute_of(layer: LayerSpec) -> str:
    """The name of a layer's hook points on its module."""
    return ATTRIBUTE if layer.part == 0 else f"{ATTRIBUTE}_{layer.part}"


def _is_transformers(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _entries(hf: nn.Module, spec: ModelSpec) -> dict[str, str | None]:
    """All modules that hold layers; each with the stack of these, if it is one and no more than a part of the model."""
    found: dict[str, str | None] = {"": None, spec.entry: None}
    stacks: dict[str, set[str]] = {}
    for layer in spec.layers:
        names = layer.path.split(".")
        for depth in range(1, len(names)):
            stacks.setdefault(".".join(names[:depth]), set()).add(layer.stack)
    for path, held in stacks.items():
        if path not in found and type(hf.get_submodule(path)).forward is not nn.Module.forward:
            found[path] = next(iter(held)) if len(held) == 1 else None
    return found


def _block_forward(
    taps: Taps, site: BlockCall, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Compute a block that has its own way of computing: by ours in a run, or where somebody looks, as for experts."""
    flow = taps.now()
    plain = flow is None or (flow.call.session is None and flow.idle)
    return own(*args, **kwargs) if plain else site.forward(module, flow, *args, **kwargs)
