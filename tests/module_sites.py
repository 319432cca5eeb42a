"""Where the points of tests/reference/types are in the modules of a model, to be read and changed by plain hooks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.reference.types import stacks
from tests.tiny_types import inputs, runner


def run(model: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return output_of(runner(model)(**arguments, **cacheless(model)))


def cacheless(model: Any) -> dict[str, bool]:
    """diffusion_gemma's decoder reads the encoder's cache."""
    return {} if model.config.model_type == "diffusion_gemma" else {"use_cache": False}


def output_of(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


class Site(NamedTuple):
    """A value that a module is given (argument `index`) or returns (`index` None). `in_place`: others hold the very
    tensor that the module is given, and read it later."""

    module: Any
    index: int | None = None
    in_place: bool = False


ATTENTION = ("self_attn", "linear_attn", "mamba", "conv", "self_attention", "norm_attn_norm.attn",
             "layer.0.SelfAttention")  # fmt: skip
BRANCH = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "layer.1.mlp", "layer.2.mlp")
MIDDLE = ("pre_mlp_layernorm", "pre_feedforward_layernorm", "ffn_hc", "mlp_hyper_connection", "mlp_input", "ffn_norm",
          "pre_ff_layernorm", "ff_layer_norm", "norm_attn_norm.norm_2", "layer.2.layer_norm", "layer.1.layer_norm",
          "post_attention_layernorm")  # fmt: skip


def sites(model: Any) -> dict[tuple[str, int | None], Site]:
    layers = [layer for stack in stacks(model) for layer in stack]
    found: dict[tuple[str, int | None], Site] = {}
    for index, layer in enumerate(layers):
        if model.config.model_type == "longcat_flash":
            found.update(_longcat_sites(layer, index))
        else:
            found.update({(point, index): site for point, site in _layer_sites(layer).items()})
        if type(layer).__name__.startswith("Inkling2") and index > 0:  # the model keeps what it gave: too late there
            found["resid_pre", index] = Site(layers[index - 1])
    return found


def _layer_sites(layer: Any) -> dict[str, Site]:
    found = {"resid_pre": Site(layer, 0), "resid_post": Site(layer)}
    attention, block = _inner(layer, ATTENTION), _inner(layer, BRANCH)
    if hasattr(layer, "mixer"):
        mixes = layer.block_type.endswith("_attention")
        attention, block = (layer.mixer, None) if mixes else (None, layer.mixer)
    if attention is not None:
        found["attn_out"] = Site(attention)
    if not hasattr(layer, "mixer") and not type(layer).__name__.startswith("Cohere2"):
        found["resid_mid"] = _middle(layer)
    if hasattr(layer, "experts"):
        return found | {"router_logits": Site(layer.router.proj), **_experts_sites(layer.experts)}
    return found | ({} if block is None else _block_sites(block))


def _middle(layer: Any) -> Site:
    """Where the layer reads its residual stream between the branches, while it holds the tensor for later."""
    name = type(layer).__name__
    if name.startswith("FlexOlmo"):
        return Site(layer.mlp, 0, in_place=True)
    if name == "MiniMaxDecoderLayer":
        return Site(layer.post_attention_layernorm)
    return Site(_inner(layer, MIDDLE), 1 if name.startswith("Inkling2") else 0, in_place=True)


def _block_sites(block: Any) -> dict[str, Site]:
    dense = not any(hasattr(block, name) for name in ("experts", "text_moe", "input_linear", "router_gate"))
    if dense:
        return {"mlp_out": Site(block)}
    found = {"moe_in": Site(block, 0), "moe_out": Site(block)}
    experts = getattr(getattr(block, "text_moe", block), "experts", None)
    return found if experts is None else found | _experts_sites(experts)


def _experts_sites(experts: Any) -> dict[str, Site]:
    if type(experts).__name__.startswith(("Llama4", "NllbMoe", "SwitchTransformers")):
        return {}
    return {"expert_ids": Site(experts, 1), "gate_weights": Site(experts, 2), "routed_out": Site(experts)}


def _longcat_sites(layer: Any, index: int) -> dict[tuple[str, int | None], Site]:
    first, second = 2 * index, 2 * index + 1
    found = {("attn_out", number): Site(layer.self_attn[i]) for i, number in enumerate((first, second))}
    found |= {("mlp_out", number): Site(layer.mlps[i]) for i, number in enumerate((first, second))}
    found |= {("resid_pre", first): Site(layer, 0), ("resid_post", second): Site(layer)}
    found |= {
        ("resid_mid", number): Site(layer.post_attention_layernorm[i], 0, in_place=True)
        for i, number in enumerate((first, second))
    }
    return found | {(point, second): site for point, site in _block_sites(layer.mlp).items()}


def _inner(module: Any, paths: tuple[str, ...]) -> Any:
    def walk(path: str) -> Any:
        found = module
        for name in path.split("."):
            found = dict(found.named_children()).get(name) if found is not None else None
        return found

    return next((found for found in map(walk, paths) if found is not None), None)


ROUTERS = ("gate.wg", "gate.router_mlp.out_proj", "router.gate", "router.layer", "router.classifier", "router.proj",
           "text_moe.gate", "gate", "router", "router_gate")  # fmt: skip


def router_of(layer: Any) -> Any:
    """The module whose parameters make the layer's router logits, or None."""
    block = layer.mixer if hasattr(layer, "mixer") else _inner(layer, BRANCH)
    return _inner(layer if hasattr(layer, "experts") else block, ROUTERS)


def hooked(model: Any, at: dict[Any, Site], change: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """The model's output, with `change(key, value)` in place of the value at each site."""

    def handle(key: Any, site: Site) -> Any:
        def returned(_module: Any, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(key, output[0]), *output[1:])
            return change(key, output)

        def given(_module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            if site.in_place:
                args[site.index].copy_(change(key, args[site.index]))
                return args, kwargs
            if not args:
                return args, {**kwargs, "hidden_states": change(key, kwargs["hidden_states"])}
            return (*args[: site.index], change(key, args[site.index]), *args[site.index + 1 :]), kwargs

        if site.index is None:
            return site.module.register_forward_hook(returned)
        return site.module.register_forward_pre_hook(given, with_kwargs=True)

    handles = [handle(key, site) for key, site in at.items()]
    try:
        return run(model, inputs(model))
    finally:
        for handle_ in handles:
            handle_.remove()
