"""A plain PyTorch model, opened: every point becomes a small identity module that hooks can read and replace.

What is installed, and taken away again by `LocalHost.remove`:

- ``moe_points`` on every decoder layer (and on the model, for ``embed``): one `HookPoint` for each point. They hold no
  parameters, so the state dict keeps its keys; plain hooks and other libraries see them like any module.
- hooks on the model's own modules that carry values through those hook points. A hook point that nobody hooks costs
  a dictionary look-up.
- an experts function in transformers' registry. It is chosen for each experts module through a copy of that module's
  config: configs are shared between layers and models, so writing to one would reach models that are not ours, and
  would be undone by whoever restores it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_interp.adapters.spec import (
    ExpertsCall,
    GatedOutput,
    Input,
    LayerSpec,
    ModelSpec,
    Output,
    ResidualInput,
    RouterLinear,
)
from moe_interp.errors import UnsupportedModel
from moe_interp.hosts.experts import check_ids, check_layout, expert_outputs, weighted_sum

IMPLEMENTATION = "moe_interp"
ATTRIBUTE = "moe_points"


class HookPoint(nn.Module):
    """Identity. What a forward hook on it returns goes on through the model in place of the value.

    Attributes:
        exposed: values pass through even while nothing is hooked, for libraries that watch modules by other means.
    """

    exposed = False

    @property
    def live(self) -> bool:
        """Whether values must pass through here."""
        return bool(self.exposed or self._forward_hooks or self._forward_pre_hooks or self._backward_hooks)

    def forward(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value


class Taps:
    """Carries the values of one layer through its hook points, in the shape that the table of points promises."""

    def __init__(self, hf: nn.Module, layer: LayerSpec):
        self.layer = layer
        self.points = nn.ModuleDict({name: HookPoint() for name in layer.sites})
        self.grid = (0, 0)  # B, S of the forward pass under way
        self.logits: Tensor | None = None
        self.gated: Tensor | None = None
        self.router_mode: _FirstLinear | None = None
        self.owner = hf.get_submodule(layer.path)

    def live(self, name: str) -> bool:
        """Whether anything is hooked at the point (False where the layer does not have it)."""
        return name in self.points and self.points[name].live  # type: ignore[return-value]

    def __call__(self, name: str, value: Tensor, slots: int | None = None) -> Tensor:
        """The value after its hook point: shown as [B, S, (K,) ...], returned in the shape it came in."""
        if not self.live(name):
            return value
        middle = (slots,) if slots else ()
        shown = value.reshape(*self.grid, *middle, value.shape[-1])
        changed = self.points[name](shown)
        return value if changed is shown else changed.reshape(value.shape)


class LocalHost:
    """Hook points on a transformers model in this process."""

    def __init__(self, hf: nn.Module, spec: ModelSpec):
        self.hf, self.spec = hf, spec
        self.handles: list[RemovableHandle] = []
        self.configs: dict[nn.Module, Any] = {}
        self.taps = {layer.index: Taps(hf, layer) for layer in spec.layers}
        self.embed = nn.ModuleDict({"embed": HookPoint()})
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def point(self, name: str, layer: int | None) -> HookPoint:
        """The hook point of a point at a layer."""
        points = self.embed if layer is None else self.taps[layer].points
        return points[name]  # type: ignore[return-value]

    def _install(self) -> None:
        for layer in self.spec.layers:
            if layer.moe:
                check_layout(self.hf.get_submodule(layer.moe.experts), layer.moe.experts)
        self.hf.add_module(ATTRIBUTE, self.embed)
        self.handles.append(self.hf.get_submodule(self.spec.embed).register_forward_hook(self._embedded))
        for taps in self.taps.values():
            taps.owner.add_module(ATTRIBUTE, taps.points)
            for name, site in taps.layer.sites.items():
                self.handles += _attach(self.hf, taps, name, site)
            if taps.layer.moe:
                self._replace_experts(self.hf.get_submodule(taps.layer.moe.experts), taps)

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], value: Tensor) -> Tensor | None:
        point = self.point("embed", None)
        return point(value) if point.live else None

    def _replace_experts(self, experts: Any, taps: Taps) -> None:
        self.configs[experts] = experts.config
        experts.config = _choosing(experts.config, IMPLEMENTATION)
        experts._moe_taps = taps

    def remove(self) -> None:
        """Leave the model as it was found."""
        for handle in self.handles:
            handle.remove()
        for experts, config in self.configs.items():
            experts.config = config
            del experts._moe_taps
        for owner in [self.hf, *(taps.owner for taps in self.taps.values())]:
            owner._modules.pop(ATTRIBUTE, None)
        self.handles, self.configs = [], {}

    @contextmanager
    def removed(self) -> Iterator[None]:
        """The model without any of this, and on transformers' ``grouped_mm``, inside the ``with``."""
        experts: list[Any] = list(self.configs)
        self.remove()
        configs = [module.config for module in experts]
        try:
            for module in experts:
                module.config = _choosing(module.config, "grouped_mm")
            yield
        finally:
            for module, config in zip(experts, configs, strict=True):
                module.config = config
            self._install()

    @contextmanager
    def widened(self, widths: Mapping[int, int]) -> Iterator[None]:
        """Let routers choose another number of experts (by layer) inside the ``with``."""
        with ExitStack() as stack:
            for layer, k in widths.items():
                router: Any = self.hf.get_submodule(self.spec.moe(layer).router)
                stack.callback(setattr, router, "top_k", router.top_k)
                router.top_k = k
            yield


def _choosing(config: Any, implementation: str) -> Any:
    """A copy of a config that chooses this experts function."""
    chosen = copy.copy(config)
    chosen._experts_implementation_internal = implementation
    return chosen


def _attach(hf: nn.Module, taps: Taps, name: str, site: Any) -> list[RemovableHandle]:
    """Hook the model's own modules so that the value at ``site`` passes through the hook point ``name``."""
    module = hf.get_submodule(site.module)
    match site:
        case Input():
            return [module.register_forward_pre_hook(_input_hook(taps, name), with_kwargs=True)]
        case ResidualInput():
            return [module.register_forward_pre_hook(_residual_hook(taps, name), with_kwargs=True)]
        case Output():
            return [module.register_forward_hook(_output_hook(taps, name))]
        case GatedOutput():
            return _attach_gated(module, hf.get_submodule(site.gate), taps, name)
        case RouterLinear() if name == "router_logits":
            return _attach_router(module, taps)
        case RouterLinear() | ExpertsCall():
            return []  # router_scores follow from the logits; the experts call is replaced as a whole
    raise UnsupportedModel(f"no way to reach {name!r}", expected="a site this host knows", got=repr(site))


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _input_hook(taps: Taps, name: str) -> Callable[..., Any]:
    starts_layer = name == "resid_pre"

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = _hidden(args, kwargs)
        if starts_layer:
            taps.grid = (value.shape[0], value.shape[1])
        changed = taps(name, value)
        if changed is value:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    return hook


def _residual_hook(taps: Taps, name: str) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = _hidden(args, kwargs)
        # Shown as a copy, because autograd must not find the original overwritten where it was needed.
        shown = value.clone() if taps.live(name) else value
        changed = taps(name, shown)
        if changed is not shown:
            value.copy_(changed)

    return hook


def _output_hook(taps: Taps, name: str) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        changed = taps(name, value)
        if changed is value:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _attach_gated(module: nn.Module, gate: nn.Module, taps: Taps, name: str) -> list[RemovableHandle]:
    """Take the product of a module's output and its sigmoid gate through a hook point.

    The block multiplies them itself. When the gate returns, the product is formed as the block would, passed through
    the point and written over the module's output, and the gate is opened (the sigmoid of infinity is exactly 1).
    """

    def remember(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        taps.gated = output if taps.live(name) else None

    def open_gate(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        ungated, taps.gated = taps.gated, None
        if ungated is None:
            return None
        ungated.copy_(taps(name, functional.sigmoid(logits) * ungated.clone()))
        return torch.full_like(logits, torch.inf)

    return [module.register_forward_hook(remember), gate.register_forward_hook(open_gate)]


class _FirstLinear(TorchFunctionMode):
    """Passes the result of the first ``F.linear`` under it through a function."""

    def __init__(self, through: Callable[[Tensor], Tensor]):
        super().__init__()
        self.through, self.met = through, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not functional.linear or self.met:
            return result
        self.met = True
        return self.through(result)


def _attach_router(router: nn.Module, taps: Taps) -> list[RemovableHandle]:
    """Take the router's logits through their hook point before it selects."""

    def through(logits: Tensor) -> Tensor:
        taps.logits = taps("router_logits", logits)
        return taps.logits

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if taps.live("router_logits") or taps.live("router_scores"):
            taps.router_mode = _FirstLinear(through)
            taps.router_mode.__enter__()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        mode, taps.router_mode = taps.router_mode, None
        if mode is None:
            return
        mode.__exit__(None, None, None)
        if not mode.met and output is not None:
            raise UnsupportedModel(
                f"no router logits at layer {taps.layer.index}",
                expected="a router that computes them by F.linear",
                got=type(module).__name__,
            )

    return [router.register_forward_pre_hook(enter), router.register_forward_hook(leave, always_call=True)]


def _experts_forward(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts call, with its arguments, neurons, outputs and result passed through hook points."""
    taps: Taps = experts._moe_taps
    slots = ids.shape[-1]
    chosen = taps("expert_ids", ids)
    if chosen is not ids:
        check_ids(chosen, experts.num_experts)
        ids = chosen
    weights = taps("gate_weights", weights)
    _tap_scores(taps)
    on_act = (lambda act: taps("expert_act", act, slots)) if taps.live("expert_act") else None
    outputs = taps("expert_out", expert_outputs(experts, hidden, ids, on_act), slots)
    return taps("routed_out", weighted_sum(outputs, weights, hidden.dtype))


def _tap_scores(taps: Taps) -> None:
    """Show the scores that weights come from, normalised to sum to 1 over experts; they are read, never replaced."""
    logits, taps.logits = taps.logits, None
    if logits is None or not taps.live("router_scores"):
        return
    moe = taps.layer.moe
    if moe is not None and moe.scores == "sigmoid":
        raw = logits.float().sigmoid()
        taps("router_scores", raw / raw.sum(dim=-1, keepdim=True))
    else:
        taps("router_scores", logits.float().softmax(dim=-1))


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
