"""Hooks on a model's own modules that carry values through a layer's hook points, a kind of site at a time.

They are set once, when a model is opened, and ask for the layer's flow in the pass that is under way. Function modes
are entered by a ``with`` inside the call that they serve, which `around` wraps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_interp.adapters.spec import (
    BlockCall,
    ExpertsCall,
    GatedOutput,
    Input,
    Output,
    ResidualInput,
    RouterLinear,
    RouterOutput,
    RouterTopK,
    Site,
)
from moe_interp.errors import UnsupportedModel
from moe_interp.hosts.modes import FirstLinear, TopK
from moe_interp.hosts.taps import Taps
from moe_interp.points import SELECTION

Undo = Callable[[], Any]


def attach(hf: nn.Module, taps: Taps, name: str, site: Site) -> list[Undo]:
    """Hook the model's own modules so that the value at ``site`` passes through the hook point ``name``.

    Returns:
        What takes the hooks away.

    Raises:
        UnsupportedModel: a site that this host does not know.
    """
    module = hf.get_submodule(site.module)
    match site:
        case Input():
            return [module.register_forward_pre_hook(_input_hook(taps, name), with_kwargs=True).remove]
        case ResidualInput():
            hook = _residual_hook(taps, name, site.argument)
            return [module.register_forward_pre_hook(hook, with_kwargs=True).remove]
        case Output():
            return [module.register_forward_hook(_output_hook(taps, name)).remove]
        case GatedOutput():
            return _attach_gated(module, hf.get_submodule(site.gate), taps, name)
        case RouterLinear() if name == "router_logits":
            return [around(module, _through_linear(taps, module, site.columns))]
        case RouterOutput() if name == "router_logits":
            return [module.register_forward_hook(_logits_hook(taps)).remove]
        case RouterTopK() if name == "selection_scores":
            return [around(module, _through_choice(taps, site))]
        case RouterTopK() | RouterLinear() | RouterOutput() | ExpertsCall() | BlockCall():
            return []  # router_scores follow from the logits; the calls are replaced as a whole
    raise UnsupportedModel(f"no way to reach {name!r}", expected="a site this host knows", got=repr(site))


def around(module: nn.Module, wrapper: Callable[..., Any]) -> Undo:
    """Put ``wrapper(own, *args, **kwargs)`` around the whole call of a module, its hooks included.

    It goes where torch looks first when a module is called, as ``module.compile()`` does, so that the module's forward
    stays what others find, wrap and read the source of.

    Returns:
        What takes it away.
    """
    before: Any = vars(module).get("_compiled_call_impl")
    own = before or module._call_impl

    def called(*args: Any, **kwargs: Any) -> Any:
        return wrapper(own, *args, **kwargs)

    called.carries_points = True  # type: ignore[attr-defined]
    module._compiled_call_impl = called

    def undo() -> None:
        if vars(module).get("_compiled_call_impl") is not called:
            return  # somebody compiled it since
        if before is None:
            del module._compiled_call_impl
        else:
            module._compiled_call_impl = before

    return undo


def attach_grid(hf: nn.Module, taps: Taps) -> Undo:
    """Tell the flow of a layer how many texts and positions it is called with."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow = taps.now()
        if flow is not None:
            flow.enter(_argument(args, kwargs, 0))

    return hf.get_submodule(taps.layer.path).register_forward_pre_hook(enter, with_kwargs=True).remove


def attach_modality(hf: nn.Module, taps: Taps) -> list[Undo]:
    """Tell the flow of a layer which tokens its mixture is about to see."""
    modality = taps.layer.modality
    if modality is None:
        return []

    def split(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow, position = taps.now(), modality.position
        kinds = args[position] if len(args) > position else kwargs.get(modality.argument)
        # As the block does: where every token is of the first kind, all go to its mixture as they are.
        if flow is not None and kinds is not None and bool(kinds.any()):
            flow.rows = kinds.bool() == modality.kept

    return [hf.get_submodule(modality.module).register_forward_pre_hook(split, with_kwargs=True).remove]


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> Tensor:
    return args[number] if len(args) > number else kwargs["hidden_states"]


def _input_hook(taps: Taps, name: str) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flow = taps.now()
        if flow is None:
            return None
        value = _argument(args, kwargs, 0)
        changed = flow(name, value)
        if changed is value:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    return hook


def _residual_hook(taps: Taps, name: str, argument: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow = taps.now()
        if flow is None:
            return
        value = _argument(args, kwargs, argument)
        # Shown as a copy, because autograd must not find the original overwritten where it was needed.
        shown = value.clone() if flow.live(name) else value
        changed = flow(name, shown)
        if changed is not shown:
            value.copy_(changed)

    return hook


def _output_hook(taps: Taps, name: str) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        flow = taps.now()
        if flow is None:
            return None
        value = output[0] if isinstance(output, tuple) else output
        changed = flow(name, value)
        if changed is value:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _attach_gated(module: nn.Module, gate: nn.Module, taps: Taps, name: str) -> list[Undo]:
    """Take the product of a module's output and its sigmoid gate through a hook point.

    The block multiplies them itself. When the gate returns, the product is formed as the block would, passed through
    the point and written over the module's output, and the gate is opened (the sigmoid of infinity is exactly 1).
    """

    def remember(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        flow = taps.now()
        if flow is not None and flow.awaited(name):
            flow.ungated[name] = output

    def open_gate(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        flow = taps.now()
        ungated = None if flow is None else flow.ungated.pop(name, None)
        if flow is None or ungated is None:
            return None
        ungated.copy_(flow(name, functional.sigmoid(logits) * ungated.clone()))
        return torch.full_like(logits, torch.inf)

    return [module.register_forward_hook(remember).remove, gate.register_forward_hook(open_gate).remove]


def _through_linear(taps: Taps, module: nn.Module, columns: int | None) -> Callable[..., Any]:
    """Take the router's logits through their hook point before it selects."""
    outputs = {len(parameter) for parameter in module.parameters() if parameter.dim() == 2} or None

    def router(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        flow = taps.now()
        if flow is None or not (flow.awaited("router_logits") or flow.awaited("router_scores")):
            return own(*args, **kwargs)
        with FirstLinear(lambda logits: flow.routed(logits, columns), lambda: flow.now, outputs) as mode:
            output = own(*args, **kwargs)
        if not mode.met:
            raise UnsupportedModel(
                f"no router logits at layer {taps.layer.index}",
                expected="a router that computes them by F.linear",
                got="one that computes them in another way",
                do="If its forward returns them and nothing else, its adapter should say returns_logits=True.",
            )
        return output

    return router


def _through_choice(taps: Taps, site: RouterTopK) -> Callable[..., Any]:
    """Take a router's choice through its hook points."""

    def router(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        flow = taps.now()
        if flow is None or not any(map(flow.awaited, SELECTION)):
            return own(*args, **kwargs)
        with TopK(site, flow.chosen, lambda: flow.now):
            return own(*args, **kwargs)

    return router


def _logits_hook(taps: Taps) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        flow = taps.now()
        changed = output if flow is None else flow.routed(output)
        return None if changed is output else changed

    return hook
