"""Gemma 4 and DiffusionGemma: router and experts on the decoder layer, beside a dense MLP, with norms of their own.

The router reads the residual through its own norm, the experts through another: an edit of ``moe_in`` does not
re-route. The dense MLP is the shared expert; it and the sum over slots are normed, added and normed once more.
"""

from dataclasses import replace

from torch import nn

from moe_interp.adapters.family import At, Described, Family, never
from moe_interp.adapters.spec import Input, ModelSpec, Output, Site
from moe_interp.adapters.sums import Sum, Times
from moe_interp.errors import UnsupportedModel


def _sites(layer: At, mixture: bool) -> dict[str, Site]:
    if not mixture:
        return {}
    return {
        "moe_in": Output(layer("pre_feedforward_layernorm_2")),
        "shared_out": Output(layer("post_feedforward_layernorm_1")),
        "moe_out": Input(layer("post_feedforward_layernorm")),
    }


def _post(layer: At) -> Sum:
    if getattr(layer.module, "hidden_size_per_layer_input", 0):
        raise UnsupportedModel(
            f"cannot open {layer.path}",
            expected="layers without per-layer inputs",
            got=f"{layer.module.hidden_size_per_layer_input} of them, which add to the residual at no named point",
        )
    return Sum(branch=(layer.through("post_feedforward_layernorm"),), whole=(Times(layer("layer_scalar")),))


FAMILY = Family(
    mixture="",
    router="router",
    shared="mlp",
    mid="pre_feedforward_layernorm",
    mid_join=lambda layer: Sum(branch=(layer.through("post_attention_layernorm"),)),
    post_join=_post,
    routed_steps=lambda layer: (layer.through("post_feedforward_layernorm_2"),),
    top_k="router.config.top_k_experts",
    wide=never,
    renormalises=True,
    proportional=False,
    sites=_sites,
    moved={"shared_out": "router_logits", "moe_in": "expert_ids"},
    logits=lambda config: {"logit_softcap": config.final_logit_softcapping},
    notes=(
        "Router and experts read the residual through norms of their own: an edit of moe_in does not re-route.",
        "Weights are scaled for each expert after they are normalised, so they are not proportional to the scores.",
    ),
)


_DIFFUSION_NOTES = (*FAMILY.notes, "Layers are numbered through encoder (prompt) and decoder (canvas).")


_DIFFUSION = replace(FAMILY, moved={"shared_out": "moe_in"})


def describe_diffusion(hf: nn.Module) -> ModelSpec:
    """What a DiffusionGemma model computes: an encoder of the prompt, a decoder of the canvas."""
    encoder, decoder = At(hf, "model.encoder.language_model"), At(hf, "model.decoder")
    layers = _DIFFUSION.stack(encoder.sub("layers"), "encoder", 0)
    layers += _DIFFUSION.stack(decoder.sub("layers"), "decoder", len(layers))
    return _DIFFUSION.model_spec(
        hf,
        decoder,
        layers,
        embedding=None,  # self-conditioning comes between
        kind="encoder-decoder",
        options={},  # the decoder reads the encoder's cache
        padding_reaches="any",
        notes=_DIFFUSION_NOTES,
    )


DIFFUSION = Described(describe_diffusion, _DIFFUSION_NOTES)
