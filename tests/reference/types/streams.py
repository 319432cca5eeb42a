"""Decoder layers that are not two branches added one after the other: parallel ones, single mixers, several residual
streams (hyper-connections, arXiv 2409.19606), gemma's router beside the MLP, longcat's shortcut, encoder-decoders.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference.types import routers
from tests.reference.types.blocks import chosen, run_experts
from tests.reference.types.layers import Call, attend, branch, mix, returned, sequential
from tests.reference.types.tape import Point, each_token, linear


def _minimax(layer: Any, hidden: Tensor, call: Call, point: Point) -> Tensor:
    """The residual is the normed stream."""
    residual = layer.input_layernorm(point("resid_pre", hidden))
    attn_out = point("attn_out", layer.self_attn(hidden_states=residual, **call.named, **call.rest)[0])
    added = layer.attn_alpha_factor * residual + layer.attn_beta_factor * attn_out
    resid_mid = point("resid_mid", layer.post_attention_layernorm(added))
    out = branch(layer.mlp, resid_mid, point, call)
    return point("resid_post", layer.mlp_alpha_factor * resid_mid + layer.mlp_beta_factor * out)


def _parallel(layer: Any, hidden: Tensor, call: Call, point: Point) -> Tensor:
    """Both branches read the same normed stream (cohere2_moe)."""
    resid_pre = point("resid_pre", hidden)
    normed = layer.input_layernorm(resid_pre)
    attn_out = point("attn_out", attend(layer, normed, call)[0])
    return point("resid_post", resid_pre + attn_out + branch(layer.mlp, normed, point, call))


def _one_mixer(layer: Any, hidden: Tensor, call: Call, point: Point) -> Tensor:
    """Attention, mamba, MLP or MoE: one a layer (nemotron_h)."""
    resid_pre = point("resid_pre", hidden)
    normed = layer.norm(resid_pre)
    if layer.block_type == "linear_attention":
        out = point("attn_out", mix(layer.mixer, normed, call)[0])
    elif layer.block_type == "full_attention":
        out = point("attn_out", layer.mixer(hidden_states=normed, **call.named, **call.rest)[0])
    else:
        out = branch(layer.mixer, normed, point, call)
    return point("resid_post", resid_pre + out)


def _dbrx(layer: Any, hidden: Tensor, call: Call, point: Point) -> Tensor:
    inner = layer.norm_attn_norm
    resid_pre = point("resid_pre", hidden)
    attended = inner.attn(hidden_states=inner.norm_1(resid_pre), **call.named, **call.rest)
    resid_mid = point("resid_mid", resid_pre + point("attn_out", attended[0]))
    return point("resid_post", resid_mid + branch(layer.ffn, inner.norm_2(resid_mid), point, call))


def _gemma(layer: Any, hidden: Tensor, call: Call, point: Point) -> Tensor:
    """Router and experts beside the dense MLP; the router reads the residual through a norm of its own."""
    resid_pre = point("resid_pre", hidden)
    attn_out = point("attn_out", attend(layer, layer.input_layernorm(resid_pre), call)[0])
    resid_mid = point("resid_mid", resid_pre + layer.post_attention_layernorm(attn_out))
    shared = layer.post_feedforward_layernorm_1(layer.mlp(layer.pre_feedforward_layernorm(resid_mid)))
    router = layer.router
    read = router.norm(resid_mid) * router.scale * router.scalar_root_size
    logits = point("router_logits", each_token(lambda row: linear(router.proj, row), read))
    x = point("moe_in", layer.pre_feedforward_layernorm_2(resid_mid))
    routed = run_experts(layer.experts, x, chosen(point, *routers.route(layer, router, logits)), point)
    moe_out = point("moe_out", point("shared_out", shared) + layer.post_feedforward_layernorm_2(routed))
    added = resid_mid + layer.post_feedforward_layernorm(moe_out)
    return point("resid_post", added * layer.layer_scalar)


# Several residual streams


def _hyper(layer: Any, hidden: Tensor, call: Call, point: Point) -> Any:
    """Streams [B, S, R, D]: one is read out of them for each branch, whose output is written to all; the streams are
    mixed by `comb` (deepseek_v4, glm5_next) or left as they are (hy_v4)."""
    resid_pre = point("resid_pre", hidden)
    *mixing, read = layer.attn_hc(resid_pre)
    attended = _attend_reading(layer, layer.input_layernorm(read), call)
    attn_out = point("attn_out", attended[0])
    resid_mid = point("resid_mid", _write(mixing, resid_pre, attn_out))
    *mixing, read = layer.ffn_hc(resid_mid)
    out = branch(layer.mlp, layer.post_attention_layernorm(read), point, call)
    return returned(layer, point("resid_post", _write(mixing, resid_mid, out)), attended, call)


def _attend_reading(layer: Any, normed: Tensor, call: Call) -> tuple[Any, ...]:
    if "input_ids" in call.named:  # deepseek_v4: for the hash routers only
        return layer.self_attn(normed, **call.rest)
    return attend(layer, normed, call)


def _write(mixing: list[Tensor], streams: Tensor, out: Tensor) -> Tensor:
    """Stream r gets post[r] * out, and sum over q of comb[q, r] * stream q."""
    post = mixing[0]
    written = torch.einsum("bsr,bsd->bsrd", post, out)
    kept = streams if len(mixing) == 1 else torch.einsum("bsqr,bsqd->bsrd", mixing[1], streams)
    return written + kept


def _qwen4(layer: Any, hidden: Tensor, call: Call, point: Point) -> Tensor:
    """The same with flat streams [B, S, R * D], and per-layer embeddings added before some layers."""
    width = hidden.shape[-1] // layer.attn_hyper_connection.hc_count

    def streams(name: str, flat: Tensor) -> Tensor:
        return point(name, flat.unflatten(-1, (-1, width))).flatten(-2)

    flat = streams("resid_pre", hidden)
    if layer.ple is not None:
        ids, cache, mask = call.get("ple_input_ids"), call.get("past_key_values"), call.get("conv_mask")
        flat = flat + layer.ple(flat, ids, cache, conv_mask=mask)
    read, kept, weights = layer.attn_hyper_connection(flat)
    attn_out = point("attn_out", _qwen4_attend(layer, read, call))
    flat = streams("resid_mid", kept + _injected(attn_out, weights))
    read, kept, weights = layer.mlp_hyper_connection(flat)
    out = branch(layer.mlp, read, point, call)
    return streams("resid_post", kept + _injected(out, weights))


def _qwen4_attend(layer: Any, read: Tensor, call: Call) -> Tensor:
    cache = call.get("past_key_values")
    if layer.layer_type == "linear_attention":
        return layer.linear_attn(read, cache_params=cache, attention_mask=call.get("conv_mask"), **call.rest)
    tables, mask = call.get("position_embeddings"), call.get("attention_mask")
    return layer.self_attn(read, tables, attention_mask=mask, past_key_values=cache, **call.rest)[0]


def _injected(out: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("bsr,bsd->bsrd", weights, out).flatten(-2)


def _inkling2(layer: Any, hidden: Tensor, call: Call, point: Point) -> Tensor:
    """Every branch reads a mixture of the streams at the block boundaries so far and its own. The boundaries are
    kept here after their edits: what the model hands over was taken before them."""
    resid_pre = point("resid_pre", hidden)
    boundaries: list[Tensor] = call.state["boundaries"]
    attn_out = point("attn_out", _inkling2_attend(layer, resid_pre, _stacked(boundaries, resid_pre), call))
    convolved = _convolved(layer.post_attention_convolution, attn_out, call)
    if layer.is_block_boundary:
        boundaries.append(resid_pre)
    resid_mid = point("resid_mid", convolved if layer.is_block_boundary else resid_pre + convolved)
    read = layer.mlp_input(_stacked(boundaries, resid_pre), resid_mid)[0]
    out = branch(layer.mlp, layer.post_attention_layernorm(read), point, call)
    return point("resid_post", resid_mid + _convolved(layer.post_mlp_convolution, out, call))


def _stacked(boundaries: list[Tensor], like: Tensor) -> Tensor:
    """The streams at the boundaries, [B, S, number of them, D]."""
    none_yet = like.new_zeros(*like.shape[:-1], 0, like.shape[-1])
    return torch.stack(boundaries, dim=-2) if boundaries else none_yet


def _inkling2_attend(layer: Any, resid_pre: Tensor, boundaries: Tensor, call: Call) -> Tensor:
    arguments = {name: call.get(name) for name in ("attention_mask", "conv_mask", "past_key_values")}
    mixed = None if layer.attention_input is None else layer.attention_input(boundaries, resid_pre)
    if hasattr(layer, "input_layernorm"):
        read = resid_pre if mixed is None else mixed[0]
        return layer.self_attn(hidden_states=layer.input_layernorm(read), **arguments, **call.rest)[0]
    query, key, value = (resid_pre,) * 3 if mixed is None else mixed
    return layer.self_attn(
        hidden_states=layer.q_input_layernorm(query), key_hidden_states=layer.k_input_layernorm(key),
        value_hidden_states=layer.v_input_layernorm(value), **arguments, **call.rest,
    )[0]  # fmt: skip


def _convolved(module: Any, x: Tensor, call: Call) -> Tensor:
    return module(x, past_key_values=call.get("past_key_values"), conv_mask=call.get("conv_mask"))


# Encoder-decoders


def _switch(layer: Any, hidden: Tensor, call: Call, point: Point) -> tuple[Tensor, Any, Any]:
    attention, feed_forward = layer.layer[0], layer.layer[-1]
    resid_pre = point("resid_pre", hidden)
    attended = attention.SelfAttention(
        attention.layer_norm(resid_pre), mask=call.get("attention_mask"), position_bias=call.get("position_bias"),
        past_key_values=call.get("past_key_values"), **call.rest,
    )  # fmt: skip
    added, cross_bias = resid_pre + point("attn_out", attended[0]), None
    if layer.is_decoder and call.get("encoder_hidden_states") is not None:
        added, cross_bias, _ = layer.layer[1](
            added, key_value_states=call.get("encoder_hidden_states"),
            attention_mask=call.get("encoder_attention_mask"),
            position_bias=call.get("encoder_decoder_position_bias"),
            past_key_values=call.get("past_key_values"), **call.rest,
        )  # fmt: skip
    resid_mid = point("resid_mid", added)
    out = branch(feed_forward.mlp, feed_forward.layer_norm(resid_mid), point, call)
    return point("resid_post", resid_mid + out), attended[1], cross_bias


def _nllb(layer: Any, hidden: Tensor, call: Call, point: Point) -> Tensor:
    resid_pre = point("resid_pre", hidden)
    cache = {} if "past_key_values" not in call.named else {"past_key_values": call.get("past_key_values")}
    attended = layer.self_attn(
        hidden_states=layer.self_attn_layer_norm(resid_pre), attention_mask=call.get("attention_mask"),
        **cache, **call.rest,
    )  # fmt: skip
    added = resid_pre + point("attn_out", attended[0])
    if call.get("encoder_hidden_states") is not None:
        added = added + layer.cross_attention(
            hidden_states=layer.cross_attention_layer_norm(added), key_value_states=call.get("encoder_hidden_states"),
            attention_mask=call.get("encoder_attention_mask"), **cache, **call.rest,
        )[0]  # fmt: skip
    resid_mid = point("resid_mid", added)
    return point("resid_post", resid_mid + branch(layer.ffn, layer.ff_layer_norm(resid_mid), point, call))


# Two layers in one


def longcat(layer: Any, hidden: Tensor, call: Call, first: Point, second: Point) -> Tensor:
    """Two attentions and two dense MLPs, one after the other; the MoE reads what the first MLP reads, and its output
    is added at the end."""
    resid_pre = first("resid_pre", hidden)
    attn_out = first("attn_out", _longcat_attend(layer, 0, resid_pre, call))
    resid_mid = first("resid_mid", resid_pre + attn_out)
    normed = layer.post_attention_layernorm[0](resid_mid)
    shortcut = branch(layer.mlp, normed, second, call)
    resid_post = first("resid_post", resid_mid + branch(layer.mlps[0], normed, first, call))

    resid_pre = second("resid_pre", resid_post)
    attn_out = second("attn_out", _longcat_attend(layer, 1, resid_pre, call))
    resid_mid = second("resid_mid", resid_pre + attn_out)
    out = branch(layer.mlps[1], layer.post_attention_layernorm[1](resid_mid), second, call)
    return second("resid_post", resid_mid + out + shortcut)


def _longcat_attend(layer: Any, half: int, resid_pre: Tensor, call: Call) -> Tensor:
    normed = layer.input_layernorm[half](resid_pre)
    return layer.self_attn[half](hidden_states=normed, **call.named, **call.rest)[0]


_LAYERS: dict[str, Callable[[Any, Tensor, Call, Point], Any]] = {
    "MiniMaxDecoderLayer": _minimax,
    "Cohere2MoeDecoderLayer": _parallel,
    "NemotronHBlock": _one_mixer,
    "DbrxBlock": _dbrx,
    "Gemma4TextDecoderLayer": _gemma,
    "DiffusionGemmaEncoderTextLayer": _gemma,
    "DiffusionGemmaDecoderTextLayer": _gemma,
    "DeepseekV4DecoderLayer": _hyper,
    "Glm5NextTextDecoderLayer": _hyper,
    "HYV4DecoderLayer": _hyper,
    "Qwen4ExpTextDecoderLayer": _qwen4,
    "Inkling2SlidingDecoderLayer": _inkling2,
    "Inkling2FullDecoderLayer": _inkling2,
    "SwitchTransformersBlock": _switch,
    "NllbMoeEncoderLayer": _nllb,
    "NllbMoeDecoderLayer": _nllb,
}


def layer_forward(layer: Any, hidden: Tensor, call: Call, point: Point) -> Any:
    """What `layer` returns for its residual stream, every value through `point`."""
    return _LAYERS.get(type(layer).__name__, sequential)(layer, hidden, call, point)
