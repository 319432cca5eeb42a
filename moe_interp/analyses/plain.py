"""What an analysis takes for granted of a model, refused with a reason where it does not hold.

An analysis that adds up parts of the residual stream is right where they are added as they are. Where a factor, a norm,
a learned gate, a projection or several streams come between, its numbers would be of something else.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from moe_interp.adapters.sums import change_nothing
from moe_interp.analyses.collect import top_ks
from moe_interp.errors import BadInput, UnsupportedModel
from moe_interp.interventions import Intervention
from moe_interp.model import MoEModel


def check_plain(model: MoEModel, layers: Sequence[int]) -> None:
    """Refuse layers whose residual is not ``resid_mid`` plus the weighted outputs of experts and shared experts.

    Raises:
        UnsupportedModel: naming the first such layer.
    """
    for layer in layers:
        if not is_plain(model, layer):
            raise _refusal(model, f"layer {layer}", "resid_mid + the sum of weight times output + shared experts")


def is_plain(model: MoEModel, layer: int) -> bool:
    """Whether ``resid_post`` is ``resid_mid`` plus the weighted outputs of experts and shared experts."""
    spec = model.spec.layer(layer)
    parts = {"moe_out", "shared_out"}
    from_parts = spec.post is not None and spec.post.base == "resid_mid" and set(spec.post.branches) <= parts
    return spec.plain and from_parts and model.spec.streams == 1


def check_same_parts(model: MoEModel, layers: Sequence[int]) -> None:
    """Refuse layers that cannot stand beside each other in one result.

    Raises:
        BadInput: they have different numbers of slots, or only some have shared experts.
    """
    own = {layer: model.spec.moe(layer).top_k for layer in layers} | top_ks(model)
    kinds = {(own[layer], "shared_out" in model.spec.layer(layer).sites) for layer in layers}
    if len(kinds) > 1:
        raise BadInput(
            "layers with different parts",
            expected="as many slots in each, and all with or all without shared experts",
            got=f"(slots, shared experts): {sorted(kinds)}",
            do="Ask for them apart: layers=[...].",
        )


def check_plain_block(model: MoEModel, layers: Sequence[int]) -> None:
    """Refuse layers whose block does something to the sum of weight times output.

    Raises:
        UnsupportedModel: naming the first such layer.
    """
    for layer in layers:
        if not model.spec.moe(layer).plain:
            raise _refusal(model, f"the block of layer {layer}", "the sum of weight times output + shared experts")


def check_plain_model(model: MoEModel) -> None:
    """Refuse a model whose last residual is not the plain sum of the embedding and all that layers write.

    Raises:
        UnsupportedModel: it is not.
    """
    spec = model.spec
    embedded = spec.embedding is not None and change_nothing(spec.embedding)
    if not (embedded and spec.streams == 1 and all(layer.plain for layer in spec.main_layers)):
        raise _refusal(model, "the residual stream", "the plain sum of the embedding and all outputs")


def check_writes_text(model: MoEModel) -> None:
    """Refuse a model that does not predict the next token.

    Raises:
        UnsupportedModel: an encoder, an encoder-decoder, one without tokens or without a language-model head, such as a
            classifier or an embedding model.
    """
    if model.spec.kind != "causal" or not model.spec.predicts_tokens:
        raise UnsupportedModel(
            f"{model.spec.model_type} has no next token to predict",
            expected="a causal language model, with its language-model head",
            got=model.spec.gives,
            do="Open the checkpoint with its language-model head, or use an analysis of routing alone.",
        )


def check_decodes_stream(model: MoEModel) -> None:
    """Refuse a model whose logits do not follow from the last residual alone, or whose residual has several streams.

    Raises:
        UnsupportedModel: it does not.
    """
    check_writes_text(model)
    if model.spec.final is None or model.spec.streams != 1:
        raise UnsupportedModel(
            f"cannot decode the residual stream of {model.spec.model_type} by itself",
            expected="one stream, whose last value alone gives the logits",
            got="logits that use earlier ones too" if model.spec.final is None else f"{model.spec.streams} streams",
        )


def check_not_edited(model: MoEModel, layers: Sequence[int], points: Collection[str], what: str) -> None:
    """Refuse standing edits of some points of these layers, or of whose experts run there, which ``what`` would miss.

    Raises:
        BadInput: naming the first such edit.
    """
    for one in model._standing:
        edited = {edit.layer for edit in one.edits(model.spec) if edit.point in points}
        expected = f"none of {' and '.join(points)}, nor one that swaps layers"
        _refuse_standing(one, edited | {*one.exchanges(model.spec)}, layers, what, expected)


def check_sets_no_contribution(model: MoEModel, layers: Sequence[int], what: str) -> None:
    """Refuse standing edits that set contributions in these layers, which then follow from no output and no weight.

    Raises:
        BadInput: naming the first such edit.
    """
    for one in model._standing:
        edited = {edit.layer for edit in one.edits(model.spec) if one.adds}
        _refuse_standing(one, edited, layers, what, "none that sets contributions: of these moe.expert_effects tells")


def _refuse_standing(
    one: Intervention, edited: Collection[int | None], layers: Sequence[int], what: str, expected: str
) -> None:
    there = [layer for layer in layers if layer in edited]
    if there:
        raise BadInput(
            f"{what} of layer {there[0]} would not be those of the edited model",
            expected=f"standing edits there: {expected}",
            got=f"{type(one).__name__} at layers {there}",
            do="Leave the `with model.edit(...)`, or name other layers.",
        )


def tolerance(dtype: torch.dtype) -> float:
    """How far, relative to the largest value, a sum of parts may be from what was added up in ``dtype``."""
    return max(1e-4, 8 * torch.finfo(dtype).eps)


def check_adds_up(what: str, expected: str, parts: Tensor, whole: Tensor, model: MoEModel) -> None:
    """Refuse a whole that its parts do not add up to, which standing edits of either may be the cause of.

    Raises:
        UnsupportedModel: naming what and the error.
    """
    error = ((parts - whole).abs().max() / whole.abs().max()).item()
    if not error <= tolerance(model.dtype):
        raise UnsupportedModel(
            f"{what} is not the sum of its parts",
            expected=expected,
            got=f"a relative error of {error:.2g}" + " under standing edits" * bool(model._standing),
            do="Leave out edits that set the residual, or a sum in place of its parts." if model._standing else None,
        )


def final_modules(model: MoEModel) -> tuple[str, str]:
    """Paths of the final norm and the unembedding.

    Raises:
        UnsupportedModel: a model without a language-model head, or one where more than a norm stands before it.
    """
    if model.spec.unembed is None or not model.spec.predicts_tokens or model.spec.final_norm is None:
        raise UnsupportedModel(
            f"cannot decode the residual of {model.spec.model_type}",
            expected="a final norm and an unembedding, and nothing between",
            got="another way to the logits" if model.spec.predicts_tokens else model.spec.gives,
        )
    return model.spec.final_norm, model.spec.unembed


def _refusal(model: MoEModel, what: str, expected: str) -> UnsupportedModel:
    notes = " ".join(model.spec.notes)
    return UnsupportedModel(
        f"{what} of {model.spec.model_type} is not the plain sum of its parts",
        expected=expected,
        got="a factor, norm, gate, projection or several streams between" + (f" ({notes})" if notes else ""),
        do="Read the points and add them up as docs/points.md says.",
    )
