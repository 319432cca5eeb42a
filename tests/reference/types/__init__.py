"""What each of the 90 mixture-of-experts model types computes, point by point: the slow reference.

1. Every decoder layer's `forward` is replaced on the instance by its residual formula (layers.py, streams.py), in
   which the MoE block is written out from its parameters, one token and one slot at a time (blocks.py, routers.py,
   experts.py); the token embedding's output passes through the tape. The rest of the model runs as it is.
2. Each value passes through the tape, which applies its edit and keeps the very tensor that the rest is computed
   from: `torch.autograd.grad(loss, points[...])` is the gradient at that point. Beside the path are `expert_ids`
   (integers) and `router_scores`.
3. The model is put back as it was.

Layers are numbered through the stacks, the encoder's first; longcat_flash's are two each.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.reference.types.layers import Call
from tests.reference.types.streams import layer_forward, longcat
from tests.reference.types.tape import Edit, Key, Tape

__all__ = ["Reference", "forward", "stacks"]


@dataclass(frozen=True)
class Reference:
    """Logits (or the last hidden state of a model without a head), and every point by (name, layer)."""

    output: Tensor
    points: dict[Key, Tensor]


def forward(model: PreTrainedModel, inputs: dict[str, Any], edits: dict[Key, Edit] | None = None) -> Reference:
    """Run `model` on `inputs`, with `edits` applied where each point is computed.

    Give it the plain model. An edit of `router_logits` re-routes; one of `expert_ids` runs other experts, each slot's
    weight kept. Raises ValueError for an edit of a point that the model does not have, or that changes a shape or
    dtype.
    """
    tape = Tape(edits or {})
    with ExitStack() as replaced:
        for module, function in _replacements(model, tape):
            replaced.enter_context(_instead(module, function))
        cache = {} if model.config.model_type == "diffusion_gemma" else {"use_cache": False}
        output = _runner(model)(**inputs, **cache)
    tape.require_all_applied()
    logits = getattr(output, "logits", None)
    return Reference(output.last_hidden_state if logits is None else logits, tape.points)


def stacks(model: PreTrainedModel) -> list[Any]:
    """The model's lists of decoder layers, in the order of their numbers."""
    found = [_at(_runner(model), paths) for paths in _STACKS]
    return next(group for group in found if all(layers is not None for layers in group))


_STACKS = (
    ("model.encoder.language_model.layers", "model.decoder.layers"),
    ("model.encoder.layers", "model.decoder.layers"),
    ("encoder.block", "decoder.block"),
    ("language_model.model.layers",),
    ("model.language_model.layers",),
    ("model.layers",),
    ("transformer.blocks",),
    ("layers",),
)


def _at(model: Any, paths: tuple[str, ...]) -> list[Any]:
    def walk(path: str) -> Any:
        module = model
        for name in path.split("."):
            module = getattr(module, name, None)
        return module

    return [walk(path) for path in paths]


def _runner(model: Any) -> Any:
    """What runs a text forward: the model, or its thinker where the model has no forward of its own."""
    return model.thinker if model.config.model_type == "qwen3_omni_moe" else model


def _embedding(model: Any) -> Any:
    """The token embedding: the decoder's, where there is an encoder as well."""
    for path in ("model.decoder.embed_tokens", "decoder.embed_tokens"):
        (module,) = _at(model, (path,))
        if module is not None:
            return module
    return _runner(model).get_input_embeddings()


def _replacements(model: PreTrainedModel, tape: Tape) -> Iterator[tuple[Any, Callable[..., Any]]]:
    embedding = _embedding(model)
    embed = embedding.forward
    yield embedding, lambda *args, **kwargs: tape.point("embed", None, embed(*args, **kwargs))
    layers = [layer for stack in stacks(model) for layer in stack]
    for index, layer in enumerate(layers):
        yield layer, _layer(layer, index, tape)
    final = next((m for name, m in model.named_modules() if name.endswith("final_input")), None)
    if final is not None:
        yield final, _after_boundaries(final, tape)


def _layer(layer: Any, index: int, tape: Tape) -> Callable[..., Any]:
    signature = inspect.signature(layer.forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        named = dict(signature.bind(*args, **kwargs).arguments)
        rest = named.pop("kwargs", {})
        hidden = named.pop("hidden_states")
        call = Call(named, rest, {"boundaries": tape.state.setdefault("boundaries", [])})
        if type(layer).__name__ == "LongcatFlashDecoderLayer":
            return longcat(layer, hidden, call, tape.at(2 * index), tape.at(2 * index + 1))
        return layer_forward(layer, hidden, call, tape.at(index))

    return run


def _after_boundaries(final: Any, tape: Tape) -> Callable[..., Any]:
    """inkling2's last mixture, of the streams at the boundaries after their edits."""
    plain = final.forward

    def run(_block_states: Tensor, hidden: Tensor) -> Any:
        return plain(torch.stack(tape.state["boundaries"], dim=-2), hidden)

    return run


@contextmanager
def _instead(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """`function` in place of this module's forward."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
