"""All architectures, keyed by the model type of the language model's config.

Most are rows of two tables, `softmax_families` and `sigmoid_families`. Blocks that compute in their own way have a
file each. `describe` finds what fits a model; `register_adapter` adds one.
"""

from collections.abc import Callable

from torch import nn

from moe_interp.adapters import (
    capacity,
    doge,
    gemma,
    jetmoe,
    llama4,
    longcat,
    sigmoid_families,
    softmax_families,
    vision,
)
from moe_interp.adapters.family import Described, Family, sigmoid
from moe_interp.adapters.reading import model_type, outline
from moe_interp.adapters.spec import ModelSpec
from moe_interp.adapters.sums import Plus, Sum, Times
from moe_interp.arguments import checked
from moe_interp.errors import BadInput, UnsupportedModel

Adapter = Family | Described

_OWN: dict[str, Adapter] = {
    "gemma4_text": gemma.FAMILY,
    "diffusion_gemma_text": gemma.DIFFUSION,
    "dots3_note_text": vision.DOTS,
    "ernie4_5_vl_moe_text": vision.ERNIE_VL,
    "longcat_flash": longcat.ADAPTER,
    "switch_transformers": capacity.SWITCH,
    "nllb-moe": capacity.NLLB,
    "llama4_text": Family(
        block="feed_forward",
        router="router",
        dense=lambda layer: "feed_forward",
        shared="feed_forward.shared_expert",
        scoring=sigmoid,
        renormalises=False,
        kernel=llama4.KERNEL,
        call=llama4.forward,
        weights_on="input",
        notes=("Weights multiply an expert's input; expert_out is what it gives on that.",),
    ),
    "jetmoe": Family(
        experts="",
        router="router",
        attention=lambda layer: "self_attention",
        renormalises=True,
        kernel=jetmoe.KERNEL,
        call=jetmoe.forward,
        balance=lambda router: None,  # it counts the routers of attention heads too
        num_experts="router.num_experts",
        whole_steps=lambda block: (Plus(block("bias")),),
        notes=("The mixture of attention heads is left alone: attn_out is its sum.",),
    ),
    "doge": Family(
        experts="",
        router="router_gate",
        renormalises=True,
        kernel=doge.KERNEL,
        call=doge.forward,
        num_experts="num_experts",
        top_k="top_k",
        mid_join=lambda layer: Sum(residual=(Times(layer("input_residual")),)),
        post_join=lambda layer: Sum(residual=(Times(layer("post_attention_residual")),)),
        sites=lambda layer, mixture: doge.sites(layer) if mixture else {},
        balance=lambda router: "decision",
        padding_reaches="any",
        notes=("Product keys: router_logits are the sums of both keys. The model's own router mixes tokens.",),
    ),
}

FAMILIES: dict[str, Adapter] = {**softmax_families.FAMILIES, **sigmoid_families.FAMILIES, **_OWN}


@checked
def register_adapter(model_type: str, adapter: Family | Callable[[nn.Module], ModelSpec]) -> None:
    """Open an architecture of one's own: remote code, a research model.

    Args:
        model_type: the ``model_type`` of its (text) config; for a model without a config, the name of its class.
        adapter: a `Family` row, or a function from the model to its `ModelSpec`.

    Raises:
        BadInput: not an adapter.
    """
    if not isinstance(adapter, Family) and not callable(adapter):
        raise BadInput("not an adapter", expected="a Family or a function that returns a ModelSpec", got=repr(adapter))
    FAMILIES[model_type] = adapter if isinstance(adapter, Family) else Described(adapter)


def is_known(hf: nn.Module) -> bool:
    """Whether a model's architecture is in the table."""
    return model_type(hf) in FAMILIES


def describe(hf: nn.Module) -> ModelSpec:
    """What the model ``hf`` computes, and where.

    Raises:
        UnsupportedModel: the model type is not in the table, or none of its layers is a mixture.
    """
    name = model_type(hf)
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"cannot open model type {name!r}",
            expected=f"one of {', '.join(sorted(FAMILIES))}",
            got=outline(hf),
            do=f"Describe it with moe.register_adapter({name!r}, moe.Family(...)); model.audit() says if it is right.",
        )
    return FAMILIES[name].describe(hf)
