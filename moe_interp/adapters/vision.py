"""Vision experts: mixtures in a vision tower (dots3.note), and beside the text experts of a layer (ERNIE 4.5 VL).

They are layers of a stack of their own, numbered after the text layers, and run where the input has images.
"""

from dataclasses import replace

from torch import nn

from moe_interp.adapters.family import EXPERTS_POINTS, At, Described, Family, sigmoid
from moe_interp.adapters.sigmoid_families import DEEPSEEK3
from moe_interp.adapters.softmax_families import ERNIE
from moe_interp.adapters.spec import ExpertsCall, LayerSpec, Modality, ModelSpec, RouterLinear, Site

_NOTE = "Vision experts are layers after the text layers, and run where the input has images."
_TOWER = Family(attention=lambda layer: "attn", mid="norm2", scoring=sigmoid, renormalises=True)
_TEXT = replace(ERNIE, mixture="mlp.text_moe")
_IMAGE = replace(ERNIE, mixture="mlp.vision_moe", shared=None)


def describe_dots(hf: nn.Module) -> ModelSpec:
    """What a dots3.note model computes: text layers, and those of its vision tower if it has one."""
    spec = DEEPSEEK3.describe(hf)
    if not At(hf, "").has("model.vision_tower"):
        return spec
    tower = _TOWER.stack(At(hf, "model.vision_tower.blocks"), "vision", len(spec.layers))
    return replace(spec, layers=spec.layers + tower, notes=(_NOTE,))


def describe_ernie(hf: nn.Module) -> ModelSpec:
    """What an ERNIE 4.5 VL model computes: each sparse layer has text experts and vision experts."""
    spec = _TEXT.describe(hf)
    text = tuple(replace(layer, modality=_modality(layer, False)) if layer.moe else layer for layer in spec.layers)
    sparse = [layer for layer in text if layer.moe]
    images = tuple(_images(At(hf, layer.path), len(text) + number) for number, layer in enumerate(sparse))
    return replace(spec, layers=text + images, notes=(_NOTE,))


def _images(layer: At, index: int) -> LayerSpec:
    moe = _IMAGE.moe(layer)
    logits = RouterLinear(moe.router)
    sites: dict[str, Site] = {"router_logits": logits, "router_scores": logits}
    sites |= dict.fromkeys(EXPERTS_POINTS, ExpertsCall(moe.experts))
    spec = LayerSpec(index, layer.path, sites, moe, stack="vision", part=1)
    return replace(spec, modality=_modality(spec, True))


def _modality(layer: LayerSpec, kept: bool) -> Modality:
    return Modality(f"{layer.path}.mlp", "moe_mm_token_type_ids", position=1, kept=kept)


DOTS = Described(describe_dots, (_NOTE,))
ERNIE_VL = Described(describe_ernie, (_NOTE,))
