"""Architectures that no row describes: what their structure and one forward pass show, to be checked before it is used.

transformers decorates its fused experts, so they are recognised for what they are, whatever they are called. Around
them only the commonest layer is taken for granted, and it is read off a run, not off names:

1. The experts' block is called on the output of a norm, which is called on the residual stream after a mixer of
   positions, which is called on the output of another norm. A layer that runs anything else is not proposed.
2. The router is the block's only other module with a row for each expert; shared experts are the module that is left,
   with or without a gate of one output.
3. Scores are a softmax or sigmoids.

Each way of reading it is a proposal. Whoever opens one must hold it against the model: ``moe.wrap`` opens the first
that `audit` passes, and refuses the model if none does.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.adapters.experts import LAYOUT
from moe_interp.adapters.family import At, Family
from moe_interp.adapters.reading import model_type, outline
from moe_interp.adapters.spec import ModelSpec, Scoring
from moe_interp.errors import UnsupportedModel

NOTE = "Not in the table of architectures: opened by its structure, and checked when it was opened."


def proposals(hf: nn.Module) -> list[ModelSpec]:
    """What a model of an unknown architecture may compute.

    Raises:
        UnsupportedModel: its structure is another; the message has the modules seen.
    """
    layers, block, experts = _where_experts_are(hf)
    layer = At(hf, layers).sub(_first_with(hf, layers, f"{block}.{experts}"))
    norm, mixer = _around(hf, layer, block)
    router, shared, gate = _inside(layer.sub(block), experts)
    body, _, stack = layers.rpartition(".")
    families = [
        Family(
            body=body,
            layers=stack,
            norm=_last_norm(hf, At(hf, body), stack),
            attention=lambda layer: mixer,
            block=block,
            dense=lambda layer: block,
            mid=norm,
            router=router,
            experts=experts,
            shared=shared and f"{block}.{shared}",
            shared_gate=gate and f"{block}.{gate}",
            scoring=lambda router, function=function: Scoring(function),  # type: ignore[misc]
            renormalises=renormalises,
            notes=(NOTE,),
        )
        for function in ("softmax", "sigmoid")
        for renormalises in (True, False)
    ]
    return [family.describe(hf) for family in families]


def _refusal(hf: nn.Module, expected: str, got: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"cannot open model type {model_type(hf)!r}, which is in no table",
        expected=expected,
        got=f"{got}; {outline(hf)}",
        do="Describe it by moe.register_adapter(model_type, moe.Family(...)); model.audit() says if it is right.",
    )


def _where_experts_are(hf: nn.Module) -> tuple[str, str, str]:
    """The stack of layers, and in a layer the block and the experts."""
    found = {
        (".".join(parts[:-3]), parts[-2], parts[-1])
        for path, module in hf.named_modules()
        if all(hasattr(module, name) for name in LAYOUT) and len(parts := path.split(".")) > 3
    }
    stacks = [at for at in found if isinstance(hf.get_submodule(at[0]), nn.ModuleList)]
    if not found and not any("expert" in name.lower() for name, _ in hf.named_parameters()):
        raise UnsupportedModel(
            f"model type {model_type(hf)!r} is dense",
            expected="a mixture-of-experts model",
            got=f"no parameters of experts in {outline(hf)}",
            do="`moe-interp models` lists what opens; moe.register_adapter describes experts of other names.",
        )
    if len(found) != 1 or len(stacks) != 1:
        raise _refusal(
            hf, "fused experts at one place in the layers of one stack", f"them at {sorted(found) or 'none'}"
        )
    return stacks[0]


def _first_with(hf: nn.Module, layers: str, inner: str) -> str:
    stack = At(hf, layers)
    return next(str(number) for number, _ in enumerate(stack.module) if stack.has(f"{number}.{inner}"))


def _around(hf: nn.Module, layer: At, block: str) -> tuple[str, str]:
    """The norm before the block, and what mixes positions, from the order in which a layer calls its modules."""
    calls = list(_calls(hf, layer.module))
    names = [name for name, _, _ in calls]
    chained = len(calls) == 4 and names[3] == block and calls[3][1] is calls[2][2] and calls[1][1] is calls[0][2]
    if not chained:
        raise _refusal(hf, f"layers that run norm, mixer, norm and {block!r}", f"layers that run {names}")
    return names[2], names[1]


def _calls(hf: nn.Module, layer: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """The modules of a layer in the order of their calls, with what each is given and returns."""
    calls: list[tuple[str, Any, Any]] = []

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            calls.append((name, given, output[0] if isinstance(output, tuple) else output))

        return hook

    handles = [child.register_forward_hook(record(name), with_kwargs=True) for name, child in layer.named_children()]
    device = next(hf.parameters()).device
    try:
        with torch.no_grad():
            hf(input_ids=torch.arange(4, device=device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    yield from calls


def _inside(block: At, experts: str) -> tuple[str, str | None, str | None]:
    """Router, shared experts and their gate."""
    others = {
        name: child
        for name, child in block.module.named_children()
        if name != experts and any(True for _ in child.parameters())
    }
    count = block.sub(experts).module.num_experts
    routers = [name for name, child in others.items() if any(len(p) == count for p in child.parameters(recurse=False))]
    gates = [name for name, child in others.items() if isinstance(child, nn.Linear) and child.out_features == 1]
    rest = [name for name in others if name not in {*routers, *gates}]
    if len(routers) != 1 or len(gates) > 1 or len(rest) > 1 or len(gates) > len(rest):
        raise _refusal(block.hf, "a router, and at most one shared expert", f"a block with {sorted(others)}")
    return routers[0], next(iter(rest), None), next(iter(gates), None)


def _last_norm(hf: nn.Module, body: At, stack: str) -> str:
    """The body's last module after its layers that has one vector of parameters."""
    norms = [
        name
        for name, child in body.module.named_children()
        if name != stack and [parameter.dim() for parameter in child.parameters()] in ([1], [1, 1])
    ]
    if len(norms) != 1:
        raise _refusal(hf, "one norm after the layers", f"{norms or 'none'}")
    return norms[0]
