"""Hooks on a model's own modules that carry values through a layer's hook points, a kind of site at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

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


def attach(hf: nn.Module, taps: Taps, name: str, site: Site) -> list[RemovableHandle]:
    """Hook the model's own modules so that the value at ``site`` passes through the hook point ``name``."""
    module = hf.get_submodule(site.module)
    match site:
        case Input():
            return [module.register_forward_pre_hook(_input_hook(taps, name), with_kwargs=True)]
        case ResidualInput():
            hook = _residual_hook(taps, name, site.argument)
            return [module.register_forward_pre_hook(hook, with_kwargs=True)]
        case Output():
            return [module.register_forward_hook(_output_hook(taps, name))]
        case GatedOutput():
            return _attach_gated(module, hf.get_submodule(site.gate), taps, name)
        case RouterLinear() if name == "router_logits":
            return _attach_router(module, taps, site.columns)
        case RouterOutput() if name == "router_logits":
            return [module.register_forward_hook(_logits_hook(taps))]
        case RouterTopK() if name == "selection_scores":
            return _attach_selection(module, taps, site)
        case RouterTopK() | RouterLinear() | RouterOutput() | ExpertsCall() | BlockCall():
            return []  # router_scores follow from the logits; the calls are replaced as a whole
    raise UnsupportedModel(f"no way to reach {name!r}", expected="a site this host knows", got=repr(site))


def attach_grid(hf: nn.Module, taps: Taps) -> RemovableHandle:
    """Tell the taps of a layer how many texts and positions it is called with."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taps.enter(_argument(args, kwargs, 0))

    return hf.get_submodule(taps.layer.path).register_forward_pre_hook(enter, with_kwargs=True)


def attach_modality(hf: nn.Module, taps: Taps) -> list[RemovableHandle]:
    """Tell the taps of a layer which tokens its mixture is about to see."""
    modality = taps.layer.modality
    if modality is None:
        return []

    def split(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position = modality.position
        kinds = args[position] if len(args) > position else kwargs.get(modality.argument)
        # As the block does: where every token is of the first kind, all go to its mixture as they are.
        if kinds is not None and bool(kinds.any()):
            taps.rows = kinds.bool() == modality.kept

    return [hf.get_submodule(modality.module).register_forward_pre_hook(split, with_kwargs=True)]


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> Tensor:
    return args[number] if len(args) > number else kwargs["hidden_states"]


def _input_hook(taps: Taps, name: str) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = _argument(args, kwargs, 0)
        changed = taps(name, value)
        if changed is value:
            return None
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    return hook


def _residual_hook(taps: Taps, name: str, argument: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = _argument(args, kwargs, argument)
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
    held: list[Tensor] = []

    def remember(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        held[:] = [output] if taps.awaited(name) else []

    def open_gate(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        if not held:
            return None
        ungated = held.pop()
        ungated.copy_(taps(name, functional.sigmoid(logits) * ungated.clone()))
        return torch.full_like(logits, torch.inf)

    return [module.register_forward_hook(remember), gate.register_forward_hook(open_gate)]


def _attach_router(router: nn.Module, taps: Taps, columns: int | None) -> list[RemovableHandle]:
    """Take the router's logits through their hook point before it selects."""
    entered: list[FirstLinear] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if taps.awaited("router_logits") or taps.awaited("router_scores"):
            entered.append(FirstLinear(lambda logits: taps.routed(logits, columns)))
            entered[-1].__enter__()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not entered:
            return
        mode = entered.pop()
        mode.__exit__(None, None, None)
        if not mode.met and output is not None:
            raise UnsupportedModel(
                f"no router logits at layer {taps.layer.index}",
                expected="a router that computes them by F.linear",
                got=type(module).__name__,
                do="If its forward returns them and nothing else, its adapter should say returns_logits=True.",
            )

    return [router.register_forward_pre_hook(enter), router.register_forward_hook(leave, always_call=True)]


def _attach_selection(module: nn.Module, taps: Taps, site: RouterTopK) -> list[RemovableHandle]:
    """Take a router's choice through its hook points."""
    entered: list[TopK] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if any(map(taps.awaited, SELECTION)):
            entered.append(TopK(site, taps.chosen))
            entered[-1].__enter__()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if entered:
            entered.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _logits_hook(taps: Taps) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        changed = taps.routed(output)
        return None if changed is output else changed

    return hook
