"""The decoder layer of each architecture: how attention and MLP branch are added to the residual stream.

Attention (or what mixes positions in its place), norms, dense MLPs and hyper-connections are the model's own modules;
the MoE block is tests/reference/types/blocks.py. `_RESIDUALS` holds the layers that add two branches one after the
other; those of another shape are in tests/reference/types/streams.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tests.reference.types.blocks import is_moe, moe
from tests.reference.types.experts import mlp as shared_mlp
from tests.reference.types.tape import Point, each_token


@dataclass
class Call:
    """The arguments of one layer's forward, but for the hidden states: by name, and the rest (its **kwargs)."""

    named: dict[str, Any]
    rest: dict[str, Any]
    state: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        return self.named.get(name, self.rest.get(name))


Add = Callable[[Any, str, Tensor, Tensor], Tensor]
"""(layer, "attention" or "mlp", residual, branch) -> residual stream."""


def attend(layer: Any, normed: Tensor, call: Call) -> tuple[Any, ...]:
    """All that the layer's attention returns, its raw output first."""
    for name in ("linear_attn", "mamba", "conv"):
        if getattr(layer, name, None) is not None:
            return mix(getattr(layer, name), normed, call)
    module = layer.self_attn if hasattr(layer, "self_attn") else layer.self_attention
    if getattr(layer, "block_type", None) == "linear_attention":
        return mix(module, normed, call)
    passed = {name: value for name, value in call.named.items() if name not in _KEPT_BY_THE_LAYER}
    return _as_tuple(module(hidden_states=normed, **passed, **call.rest))


_KEPT_BY_THE_LAYER = {
    "per_layer_input", "moe_mm_token_type_ids", "prev_router_hidden_states", "ple_input_ids", "block_states",
}  # fmt: skip


def mix(module: Any, normed: Tensor, call: Call) -> tuple[Any, ...]:
    """A recurrent or convolutional mixer in attention's place."""
    cache = "past_key_values" if type(module).__name__ == "Lfm2MoeShortConv" else "cache_params"
    cached = {cache: call.get("past_key_values")}
    mask = call.get("attention_mask")
    return _as_tuple(module(hidden_states=normed, attention_mask=mask, **cached, **call.rest))


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def branch(module: Any, x: Tensor, point: Point, call: Call) -> Tensor:
    """The MLP branch: an MoE block, or a dense MLP."""
    if not is_moe(module):
        return point("mlp_out", module(x))
    context = {**call.rest, **call.named, "router_state": call.get("prev_router_hidden_states")}
    out = moe(module, x, point, context)
    call.state["router_state"] = context["router_state"]
    return out


# Two branches, one after the other


def _plus(_layer: Any, _site: str, residual: Tensor, out: Tensor) -> Tensor:
    return residual + out


@dataclass(frozen=True)
class Residual:
    """Names of the layer's modules: the norm before each branch, what each branch passes before it is added ("" for
    none), the MLP; and how a branch is added."""

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    mlp: str = "mlp"
    add: Add = _plus


def sequential(layer: Any, hidden: Tensor, call: Call, point: Point) -> Any:
    """resid_mid = resid_pre + attention(norm(resid_pre)); resid_post = resid_mid + mlp(norm(resid_mid))."""
    form = _form(layer)
    resid_pre = point("resid_pre", hidden)
    attended = attend(layer, _apply(layer, form.before_attention, resid_pre, call), call)
    attn_out = point("attn_out", attended[0])
    added = _apply(layer, form.after_attention, attn_out, call)
    resid_mid = point("resid_mid", form.add(layer, "attention", resid_pre, added))
    out = _mlp_branch(layer, form, _apply(layer, form.before_mlp, resid_mid, call), call, point)
    added = _apply(layer, form.after_mlp, out, call)
    return returned(layer, point("resid_post", form.add(layer, "mlp", resid_mid, added)), attended, call)


def returned(layer: Any, resid_post: Tensor, attended: tuple[Any, ...], call: Call) -> Any:
    """What the layer's forward returns: the residual stream, and what some hand to the next layer beside it."""
    name = type(layer).__name__
    if name.startswith(_HAND_ON_INDICES):
        return resid_post, attended[2] if len(attended) > 2 else None
    if name.startswith("Zaya"):
        return resid_post, call.state["router_state"]
    return resid_post


_HAND_ON_INDICES = ("GlmMoeDsa", "MistralLarge4", "Glm5Next", "HYV4")


def _apply(layer: Any, name: str, x: Tensor, call: Call) -> Tensor:
    if not name:
        return x
    module = getattr(layer, name)
    if name.endswith("_sconv"):
        return module(x, past_key_values=call.get("past_key_values"), conv_mask=call.get("conv_mask"))
    return module(x)


def _mlp_branch(layer: Any, form: Residual, normed: Tensor, call: Call, point: Point) -> Tensor:
    """The branch, with the shared MLP that granite keeps beside its block."""
    block, shared = getattr(layer, form.mlp, None), getattr(layer, "shared_mlp", None)
    if block is None:
        return point("mlp_out", shared(normed))
    out = branch(block, normed, point, call)
    if shared is None:
        return out
    return out + point("shared_out", each_token(lambda row: shared_mlp(shared, row), normed))


def _scaled(layer: Any, _site: str, residual: Tensor, out: Tensor) -> Tensor:
    return residual + layer.residual_multiplier * out


def _scaled_residual(layer: Any, site: str, residual: Tensor, out: Tensor) -> Tensor:
    scale = layer.input_residual if site == "attention" else layer.post_attention_residual
    return scale * residual + out


def _by_depth(layer: Any, site: str, residual: Tensor, out: Tensor) -> Tensor:
    n = layer.attn_residual_add_idx if site == "attention" else layer.mlp_residual_add_idx
    return residual * math.sqrt((n - 1) / n) + out / math.sqrt(n)


def _gated(layer: Any, site: str, residual: Tensor, out: Tensor) -> Tensor:
    gate = layer.post_attention_residual_gate if site == "attention" else layer.post_feedforward_residual_gate
    return gate(residual, out)


def _affine(layer: Any, site: str, residual: Tensor, out: Tensor) -> Tensor:
    scale = layer.post_attention_residual_scale if site == "attention" else layer.post_mlp_residual_scale
    return scale(out, residual)


def _no_add(_layer: Any, _site: str, _residual: Tensor, out: Tensor) -> Tensor:
    return out


_RESIDUALS: dict[str, Residual] = {
    "Afmoe": Residual(
        after_attention="post_attention_layernorm", before_mlp="pre_mlp_layernorm", after_mlp="post_mlp_layernorm"
    ),
    "Beam": Residual(
        after_attention="post_attention_layernorm", before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm", add=_by_depth,
    ),
    "Doge": Residual(add=_scaled_residual),
    "FlexOlmo": Residual(
        before_attention="", after_attention="post_attention_layernorm", before_mlp="",
        after_mlp="post_feedforward_layernorm",
    ),
    "Granite": Residual(mlp="block_sparse_moe", add=_scaled),
    "Inkling": Residual(after_attention="attn_sconv", after_mlp="mlp_sconv"),
    "Jamba": Residual(before_mlp="pre_ff_layernorm", mlp="feed_forward"),
    "Kolibri1": Residual(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
    "Lfm2Moe": Residual(before_attention="operator_norm", before_mlp="ffn_norm", mlp="feed_forward"),
    "Llama4": Residual(mlp="feed_forward"),
    "MuseSpark": Residual(
        after_attention="post_attention_layernorm", before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm", add=_gated,
    ),
    "Zaya": Residual(add=_affine),
}  # fmt: skip


def _form(layer: Any) -> Residual:
    name = type(layer).__name__
    return next((form for start, form in _RESIDUALS.items() if name.startswith(start)), Residual())
