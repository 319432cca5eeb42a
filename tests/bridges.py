"""Bridges of TransformerLens around tiny models."""

from typing import Any

from transformers import PreTrainedModel

from tests.tiny import build


def bridged(hf: PreTrainedModel) -> Any:
    """The bridge around a model that it changes in place."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return build_bridge_from_module(hf, type(hf).__name__, hf_config=hf.config)


def bridge(family: str, **options: Any) -> Any:
    """A bridge of a family's tiny model."""
    return bridged(build(family, **options))


def plain(family: str, **options: Any) -> PreTrainedModel:
    """The same model without a bridge, with the attention that bridges compute."""
    hf = build(family, **options)
    hf.set_attn_implementation("eager")
    return hf
