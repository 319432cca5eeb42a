"""Direct logit attribution: what everything that was added to the residual gave to a token's logit.

With its scale frozen at the whole residual the final norm is linear, and so is the unembedding. The residual is the
sum of the embedding, attention outputs, dense MLPs, experts' contributions and shared experts of all layers, so each
has its exact share of the logit, and the shares (with the bias of norm and unembedding) sum to it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe_interp.adapters.reading import bare
from moe_interp.analyses.answers import answer_ids
from moe_interp.analyses.one_text import At, by_rank, expert_terms, run_text, token_texts
from moe_interp.analyses.plain import (
    check_adds_up,
    check_plain_model,
    check_writes_text,
    final_modules,
    tolerance,
)
from moe_interp.arguments import checked
from moe_interp.encode import Inputs
from moe_interp.errors import UnsupportedModel
from moe_interp.measured import inputs_told
from moe_interp.model import MoEModel
from moe_interp.results import Variable, labelled
from moe_interp.run import Run


@checked
@torch.no_grad()
def logit_attribution(
    model: MoEModel, text: Inputs, tokens: int | str | Sequence[int | str], *, position: int = -1
) -> xr.Dataset:
    """Direct logit attribution: what everything that was added to the residual gave to a token's logit.

    Args:
        model: any opened model.
        text: one text, or its token ids.
        tokens: whose logits to split: ids, or texts of exactly one token.
        position: of a real token, negative ones from the end; the logits are those that follow it.

    Returns:
        Dims part, token (ids). ``attribution`` (part, token); ``logit`` (token), before any soft-cap, which
        is not linear; ``remainder`` (token): logit less the sum of its parts, which is rounding, and largest
        where the model adds up its residual in 16 bits. All in logits.

        Parts are "embed", "3.attn_out", "3.mlp_out" (if layer 3 is dense), "3.c1" (the contribution of its
        heaviest expert), "3.shared_out", and "bias" (of final norm and unembedding; 0 where they have none).
        ``part_kind``: "embed", "attn_out", ..., "expert", "bias". ``part_layer``: -1 for embed and bias.
        ``part_rank``, ``part_expert``, ``gate_weight``: of an expert; otherwise 0, -1, NaN.

    Raises:
        BadInput: several texts, an empty or too long one, no such position or token.
        UnsupportedModel: parts that do not add up to the residual, a final norm that is neither a
            root-mean-square nor a layer norm, or an unembedding that is not linear.
    """
    check_writes_text(model)
    check_plain_model(model)
    ids = answer_ids(model, tokens)
    points = ["embed", "attn_out", "mlp_out", "expert_out", "shared_out", "resid_post"]
    run, at = run_text(model, text, [point for point in points if point in model.points], None, (position,))
    parts = _residual_parts(model, run, at)
    values = torch.stack([part.value for part in parts])
    residual = run["resid_post", model.spec.last(model.spec.main_stack)][0, 0].to(values.device)
    check_adds_up("the last resid_post", "embedding and all outputs", values.sum(0), residual.float(), model)
    split, logit = _split_logits(model, residual, values, ids)
    variables = {
        "attribution": Variable(("part", "token"), split.cpu().numpy(), "logits", "the part's share in the logit"),
        "logit": Variable(("token",), logit.cpu().numpy(), "logits", "the model's logit, before any soft-cap"),
        "remainder": Variable(
            ("token",),
            (logit - split.sum(0)).cpu().numpy(),
            "logits",
            "logit less the sum of its parts: rounding",
        ),
        "token_text": Variable(("token",), token_texts(model, ids), "text", "the tokens whose logits are split"),
    }
    listed = [*parts, _ResidualPart("bias", "bias", residual.new_zeros(0))]
    return labelled(
        variables | _attributed_variables(listed),
        {"part": [part.name for part in listed], "token": ids.tolist()},
        analysis="logit_attribution",
        provenance={**model.provenance(), **inputs_told(inputs=text, tokens=ids), "position": int(at.numbers)},
    )


class _ResidualPart(NamedTuple):
    """Something that was added to the residual: [D], in float32."""

    name: str
    kind: str
    value: Tensor
    layer: int = -1
    rank: int = 0
    expert: int = -1
    weight: float = float("nan")


def _residual_parts(model: MoEModel, run: Run, at: At) -> list[_ResidualPart]:
    """All that was added to the residual at the one selected position, in the order in which it was."""
    parts = [_ResidualPart("embed", "embed", at.of(run["embed"], at.only)[0].float())]
    for layer in (spec.index for spec in model.spec.main_layers):
        outputs = [
            _ResidualPart(f"{layer}.{point}", point, at.of(run[point, layer], at.only)[0].float(), layer)
            for point in ("attn_out", "mlp_out", "shared_out")
            if (point, layer) in run.values
        ]
        parts += [
            *outputs[:1],
            *(_expert_parts(run, layer, at) if layer in model.layers else ()),
            *outputs[1:],
        ]
    return parts


def _expert_parts(run: Run, layer: int, at: At) -> list[_ResidualPart]:
    values = expert_terms(run, layer, at)[1][0]
    experts, weights, _ = (found[0].tolist() for found in by_rank(run, layer, at))
    return [
        _ResidualPart(f"{layer}.c{rank}", "expert", value, layer, rank, expert, weight)
        for rank, (value, expert, weight) in enumerate(zip(values, experts, weights, strict=True), start=1)
    ]


def _split_logits(
    model: MoEModel, residual: Float[Tensor, " D"], parts: Float[Tensor, "P D"], ids: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "P1 N"], Float[Tensor, " N"]]:
    """The share of every part, and last of the biases, in the logits of some tokens; and these logits."""
    norm, unembed = linear_head(model)
    rows = unembed.weight[ids].float()
    bias = rows.new_zeros(len(ids)) if unembed.bias is None else unembed.bias[ids].float()
    frozen = freeze(norm, residual)
    split = torch.cat([frozen(parts) @ rows.T, (frozen.constant @ rows.T + bias)[None]])
    return split * model.spec.logit_scale, unembed(norm(residual))[ids].float() * model.spec.logit_scale


def linear_head(model: MoEModel) -> tuple[nn.Module, nn.Linear]:
    """The final norm and the unembedding.

    Raises:
        UnsupportedModel: there is no head, more than a norm before it, or it is not linear.
    """
    norm, unembed = (bare(model.hf.get_submodule(path)) for path in final_modules(model))
    if not isinstance(unembed, nn.Linear):
        raise UnsupportedModel("the unembedding is not linear", expected="nn.Linear", got=type(unembed).__name__)
    return norm, unembed


class Frozen(NamedTuple):
    """A norm with its scale frozen, which makes it affine: gain * (x - mean x, if centred) + constant.

    Attributes:
        gain: [..., D], scale and weight.
        centred: whether the mean is taken off.
        constant: [D], its bias.
    """

    gain: Float[Tensor, "... D"]
    centred: bool
    constant: Float[Tensor, " D"]

    def __call__(self, rows: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Its linear part."""
        return self.gain * self._centred(rows)

    def back(self, directions: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Its transpose: the products of what it gives with ``directions`` are those of its input with these."""
        return self._centred(self.gain * directions)

    def _centred(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows


def freeze(norm: nn.Module, residual: Float[Tensor, "*rows D"]) -> Frozen:
    """A norm with its scale frozen at that of each row of ``residual``.

    Its gain is found by a probe of alternating signs, which has unit root mean square and no mean. One
    number for each row, the scale, is then fitted to the norm of the residual itself, and a norm of another form does
    not fit.

    Raises:
        UnsupportedModel: the norm is neither a root-mean-square nor a layer norm.
    """
    signs = torch.ones_like(residual[(0,) * (residual.dim() - 1)])
    signs[1::2] = -1
    constant = norm(torch.zeros_like(signs)).float()
    gain = (norm(signs).float() - constant) * signs
    target = norm(residual).float() - constant
    for centred in (False, True):
        direction = Frozen(gain, centred, constant)(residual.float())
        scale = (target * direction).sum(-1, keepdim=True) / (direction * direction).sum(-1, keepdim=True)
        if (target - scale * direction).abs().max() <= tolerance(residual.dtype) * target.abs().max():
            return Frozen(scale * gain, centred, constant)
    raise UnsupportedModel(
        "the final norm cannot be frozen",
        expected="a root-mean-square or layer norm",
        got=type(norm).__name__,
    )


def _attributed_variables(parts: Sequence[_ResidualPart]) -> dict[str, Variable]:
    kinds = np.array([part.kind for part in parts])
    layers, ranks, experts = np.array([(part.layer, part.rank, part.expert) for part in parts], "int32").T
    weights = np.array([part.weight for part in parts], "float32")
    return {
        "part_kind": Variable(("part",), kinds, "text", "what kind of part it is"),
        "part_layer": Variable(("part",), layers, "layer", "the layer that added it, -1 for none"),
        "part_rank": Variable(("part",), ranks, "rank", "1 for a layer's heaviest expert, 0 for no expert"),
        "part_expert": Variable(("part",), experts, "expert", "the expert that wrote it, -1 for none"),
        "gate_weight": Variable(("part",), weights, "1", "that expert's combine weight, NaN for none"),
    }
