"""Switch Transformers and NLLB-MoE: encoder-decoders whose experts are modules, with a limit on tokens an expert.

Switch (arXiv 2101.03961): one expert a token; over its capacity a token gets none. It keeps its id, with weight 0.

NLLB-MoE is opened as transformers 5 runs it, which is not as it was trained. ``NllbMoeExperts.forward`` takes the 0/1
mask of each token's first expert for expert numbers: every token runs experts 0 and 1 and no other. Expert 1 gets the
router's weight for the token's first expert, expert 0 the sum of all other weights. So ``expert_ids`` is [0, 1] at
every token. In training mode ``expert_out`` is what the dropout of outputs leaves; else weights take its mean.
https://github.com/huggingface/transformers has the code; `moe_interp.adapters.families` says so too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_interp.adapters.experts import ExpertWeights, Kernel, OnAct, Separate, Tap, by_expert, run_experts
from moe_interp.adapters.family import At, Described, Family, never
from moe_interp.adapters.reading import text_config
from moe_interp.adapters.spec import ModelSpec
from moe_interp.adapters.sums import Sum

_SWITCH = Separate(up="wi", down="wo", key="expert_{}")
_NLLB = Separate(up="fc1", down="fc2", key="expert_{}")


def forward_switch(block: Any, tap: Tap, hidden_states: Tensor) -> Tensor:
    """``SwitchTransformersSparseMLP.forward``."""
    mask, weights, logits = block.router(hidden_states)
    kept = mask.sum(dim=-1).reshape(-1, 1)
    ids = logits.softmax(dim=-1, dtype=block.router.dtype).to(hidden_states.dtype).argmax(dim=-1).reshape(-1, 1)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    routed = run_experts(tap, _SWITCH, block.experts, hidden, ids, weights.reshape(-1, 1) * kept)
    return routed.view(hidden_states.shape)


def forward_nllb(block: Any, tap: Tap, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """``NllbMoeSparseMLP.forward``, with the experts that it runs."""
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    mask, probabilities, _ = block.router(hidden, padding_mask)
    first = mask.bool()
    weights = torch.stack(
        [probabilities.masked_fill(first, 0.0).sum(dim=1), probabilities.masked_fill(~first, 0.0).sum(dim=1)], dim=1
    )
    kernel: Kernel = _NLLB
    if block.experts.training:
        kernel = _Dropping(_NLLB)
    else:
        weights = weights * (1 - block.experts.moe_token_dropout)
    ids = torch.tensor([0, 1], device=hidden.device).expand(len(hidden), 2).contiguous()
    return run_experts(tap, kernel, block.experts, hidden, ids, weights).view(hidden_states.shape)


@dataclass(frozen=True)
class _Dropping:
    """NLLB-MoE's experts in training, with the dropout of their outputs."""

    own: Separate

    def outputs(self, experts: Any, hidden: Tensor, ids: Tensor, on_act: OnAct | None = None) -> Tensor:
        outputs = self.own.outputs(experts, hidden, ids, on_act)
        for _, slots in by_expert(ids):  # expert after expert, as transformers draws
            outputs = outputs.index_copy(0, slots, experts.token_dropout(outputs[slots]))
        return outputs

    def weights(self, experts: Any, expert: int) -> ExpertWeights:
        return self.own.weights(experts, expert)


def _switch(feed_forward: str, crossed: bool) -> Family:
    return Family(
        layers="block",
        norm="final_layer_norm",
        block=f"{feed_forward}.mlp",
        dense=lambda layer: f"{feed_forward}.mlp",
        router="router",
        attention=lambda layer: "layer.0.SelfAttention",
        mid=f"{feed_forward}.layer_norm",
        mid_join=None if crossed else lambda layer: Sum(),
        renormalises=False,
        kernel=_SWITCH,
        call=forward_switch,
        top_k=1,
        wide=never,
        selects=lambda router: None,
        balance=lambda router: None,  # of each text or batch apart, of encoder and decoder apart
        kind="encoder-decoder",
        padding_reaches="left",
        notes=(
            "Layers are numbered through encoder and decoder. A token over an expert's capacity has weight 0.",
            "Cross-attention adds to the decoder's residual between attn_out and resid_mid, and has no point.",
        ),
    )


def describe_switch(hf: nn.Module) -> ModelSpec:
    """What a Switch Transformers model computes, and where."""
    config = text_config(hf)
    return _encoder_decoder(
        hf,
        At(hf, "encoder"),
        At(hf, "decoder"),
        (_switch("layer.1", False), _switch("layer.2", True)),
        logit_scale=config.d_model**-0.5 if config.tie_word_embeddings else 1.0,
    )


def _nllb(crossed: bool) -> Family:
    return Family(
        norm="layer_norm",
        block="ffn",
        dense=lambda layer: "ffn",
        router="router",
        mid="ff_layer_norm",
        mid_join=None if crossed else lambda layer: Sum(),
        renormalises=False,
        proportional=False,
        runs=2,
        kernel=_NLLB,
        call=forward_nllb,
        top_k=2,
        wide=never,
        selects=lambda router: None,
        balance=lambda router: None,  # of encoder and decoder apart
        embedding=lambda body: None,
        kind="encoder-decoder",
        padding_reaches="ids",
        notes=(
            "transformers 5.23 runs experts 0 and 1 at every token, whatever the router chose: these are shown.",
            "Layers are numbered through encoder and decoder.",
            "Cross-attention adds to the decoder's residual between attn_out and resid_mid, and has no point.",
        ),
    )


def describe_nllb(hf: nn.Module) -> ModelSpec:
    """What an NLLB-MoE model computes in transformers 5, and where."""
    return _encoder_decoder(hf, At(hf, "model.encoder"), At(hf, "model.decoder"), (_nllb(False), _nllb(True)))


def _encoder_decoder(
    hf: nn.Module, encoder: At, decoder: At, families: tuple[Family, Family], **more: Any
) -> ModelSpec:
    """Both stacks, numbered one after the other."""
    first, second = families
    layers = first.stack(encoder.sub(first.layers), "encoder", 0)
    layers += second.stack(decoder.sub(second.layers), "decoder", len(layers))
    return second.model_spec(hf, decoder, layers, **more)


SWITCH = Described(describe_switch, _switch("layer.1", True).notes)
NLLB = Described(describe_nllb, _nllb(True).notes)
