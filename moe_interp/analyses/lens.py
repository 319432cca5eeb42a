"""The expert lens: what every part of a mixture-of-experts layer says about the next token.

The logit lens decodes the residual stream between layers as if it were the last one: decode(h) = W_U norm(h),
with the model's own final norm, scale and soft-cap. MoE-Lens (Chaudhari et al., 2025) extends it to what
experts add. Let r be resid_mid, s the shared experts as added, f_j the unweighted output of a token's j-th
heaviest expert and c_j = w_j f_j its contribution. At every MoE layer and position, `expert_lens` decodes

1. resid_pre; r, the layer without any expert, which is the control of all that follows; resid_post;
2. each expert: r + c_j, c_j, f_j;
3. the partial sums r + c_1 + ... + c_k for k = 1 ... K;
4. r, 2. and 3. with s added, and s alone.

Through a tuned lens (`moe_interp.analyses.tuned_lens`) a part is translated before it is decoded: resid_pre by the
translator of the stream into the layer; everything that holds r, and resid_post, by that of the stream out of it, so
that all parts together still are resid_post; what stands without r (c_j, f_j, s) by the linear part of the latter, for
that is what it adds to the translated stream. Out of the last layer nothing is translated.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from moe_interp.analyses.decoding import CHUNK, Decode, Decoded, check_top, decode_top, describe
from moe_interp.analyses.distributions import log_probabilities
from moe_interp.analyses.inputs import moe_layers
from moe_interp.analyses.one_text import At, by_rank, expert_terms, next_ids, run_text, token_texts
from moe_interp.analyses.plain import check_adds_up, check_plain, check_same_parts, check_writes_text, final_modules
from moe_interp.analyses.tuned_lens import TunedLens
from moe_interp.arguments import Count, Draws, checked
from moe_interp.encode import Inputs
from moe_interp.errors import BadInput
from moe_interp.measured import inputs_told, values_told
from moe_interp.model import MoEModel
from moe_interp.results import Variable, labelled
from moe_interp.run import Indices, Run, positions_of

Definition = Literal["paper", "as_coded"]


@checked
@torch.no_grad()
def expert_lens(
    model: MoEModel,
    text: Inputs,
    *,
    layers: Indices = None,
    positions: Indices = None,
    top: Count = 5,
    definition: Definition = "paper",
    lens: TunedLens | None = None,
    chunk: Draws = CHUNK,
) -> xr.Dataset:
    """Decode every part of every MoE layer at every position of one text.

    ``definition="as_coded"`` is for comparison with the released MoE-Lens notebooks. Rows are brought to unit
    root mean square in place of the learned final norm (the notebooks do so with experts alone, and leave
    rows with the residual as they are; ranks are the same). Single experts are unweighted, also beside r;
    only sums are weighted. r is the *normed* input of the MoE block (as in the cosine notebook; the lens
    notebooks themselves add resid_mid). Shared experts are left out.

    Args:
        model: any opened model; without a tokenizer tokens are shown by their ids.
        text: one text, or its token ids.
        layers: MoE layers, as the checkpoint numbers them (None: all).
        positions: of real tokens, negative ones from the end (None: all).
        top: how many of the most probable tokens to keep.
        definition: "paper" or "as_coded".
        lens: a tuned lens of the model (None: the plain one). The module's docstring says which part takes which
            translator. Not with "as_coded".
        chunk: how many rows to decode at a time; beyond rounding the result does not depend on it.

    Returns:
        Dims layer, part, pos, top (1: the most probable) and rank (1: the heaviest expert).

        Of a part: ``top_id``, ``top_token``, ``top_probability`` (layer, part, pos, top); ``true_rank`` of
        the true next token (1 is first; NaN at the last token), ``final_rank`` of the model's own prediction,
        ``agreement`` (1 where that comes first), ``kl``, KL(final || part) in nats (layer, part, pos).
        Of an expert: ``expert``, ``gate_weight`` (layer, pos, rank).
        Of the model's output: ``final_id``, ``final_token``, ``final_probability`` (pos, top),
        ``final_true_rank``.
        Of the text: ``token_id``, ``token``, ``next_id`` (pos; -1 at the last token).

        A part is named for what it is the sum of: "resid_mid+c1..3+shared", "c2", "f2", "resid_post".
        ``part_rank``: the rank of its expert if it holds just one, else 0. ``part_sum``: k for r + c_1 + ...
        + c_k (0 for r), else -1. ``part_shared``: 1 if "shared" is in its name.

    Raises:
        BadInput: several texts, an empty or too long one, no such position, an option out of range, a tuned lens
            of another model.
        UnknownName: a layer that is no MoE layer.
        UnsupportedModel: a layer whose output is not the plain sum of its parts, or no causal language model.
    """
    chosen = _layers(model, layers)
    check_writes_text(model)
    check_plain(model, chosen)
    check_top(top, model.spec.vocab_size)
    if lens is not None:
        _check_lens(model, lens, definition)
    shared = "shared_out" in model.spec.layer(chosen[0]).sites
    run, at = run_text(model, text, _points(shared, definition), chosen, positions_of(positions))
    slots = run.routing[chosen[0]].ids.shape[-1]  # standing edits may widen the router
    parts = part_terms(slots, shared and definition == "paper", definition)
    targets = next_ids(run)[at.numbers]
    final = log_probabilities(run.logits[0, at.columns])
    decode = model.decode if definition == "paper" else _unit_decode(model)
    decoded = [
        decode_top(decode, _rows(model, run, layer, at, parts, lens), final, targets, top=top, chunk=chunk)
        for layer in chosen
    ]
    variables = _part_variables(parts) | _lens_variables(model, decoded) | _expert_variables(run, chosen, at)
    coords: dict[str, ArrayLike] = {
        "layer": list(chosen),
        "part": list(parts),
        "pos": at.numbers.tolist(),
        "top": list(range(1, top + 1)),
        "rank": list(range(1, slots + 1)),
    }
    return labelled(
        variables | _text_variables(model, run, at, describe(final[:, None], final, targets, top)),
        coords,
        analysis="expert_lens",
        provenance={
            **model.provenance(),
            **inputs_told(inputs=text),
            "definition": definition,
            "lens": "plain" if lens is None else f"tuned, {values_told(lens.weight, lens.bias)}",
            "top": top,
        },
    )


def part_terms(slots: int, shared: bool, definition: Definition = "paper") -> dict[str, tuple[str, ...]]:
    """What each part is the sum of, by the part's name, in the order of the result.

    Args:
        slots: K, experts of a token.
        shared: whether to repeat the parts with the shared experts added.
        definition: see `expert_lens`.
    """
    ranks = range(1, slots + 1)
    contributions, outputs = tuple(f"c{j}" for j in ranks), tuple(f"f{j}" for j in ranks)
    base, single = ("resid_mid", contributions) if definition == "paper" else ("moe_in", outputs)
    parts: dict[str, tuple[str, ...]] = {base: (base,)}
    parts.update((f"{base}+{one}", (base, one)) for one in single)
    parts.update((one, (one,)) for one in single + outputs)
    parts.update((f"{base}+c1" + f"..{k}" * (k > 1), (base, *contributions[:k])) for k in ranks)
    if shared:
        parts.update([(f"{name}+shared", (*terms, "shared")) for name, terms in parts.items()])
        parts["shared"] = ("shared",)
    return {"resid_pre": ("resid_pre",), **parts, "resid_post": ("resid_post",)}


def _unit_decode(model: MoEModel) -> Decode:
    unembed = model.hf.get_submodule(final_modules(model)[1])
    return lambda hidden: unembed(functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-6))


def _points(shared: bool, definition: Definition) -> list[str]:
    points = ["resid_pre", "resid_mid", "expert_out", "resid_post"]
    return points + ["shared_out"] * shared + ["moe_in"] * (definition == "as_coded")


def _rows(
    model: MoEModel, run: Run, layer: int, at: At, parts: Mapping[str, Sequence[str]], lens: TunedLens | None
) -> Float[Tensor, "N P D"]:
    """Every part of a layer as the sum of its terms, translated if a tuned lens is given, in the model's dtype."""
    terms = {
        point.replace("shared_out", "shared"): at.of(value, at.only).float()
        for (point, where), value in run.values.items()
        if where == layer and point != "expert_out"
    }
    outputs, contributions = expert_terms(run, layer, at)
    whole = terms["resid_mid"] + contributions.sum(1) + terms.get("shared", 0.0)
    expected = "resid_mid + contributions + shared experts"
    check_adds_up(f"resid_post of layer {layer}", expected, whole, terms["resid_post"], model)
    terms |= {f"f{j}": value for j, value in enumerate(outputs.unbind(1), start=1)}
    terms |= {f"c{j}": value for j, value in enumerate(contributions.unbind(1), start=1)}
    values = torch.stack(list(terms.values()), dim=1)
    sums = values.new_tensor([[name in part for name in terms] for part in parts.values()])
    rows = sums @ values
    return (rows if lens is None else _translated(rows, layer, parts, lens)).to(model.dtype)


def _translated(
    rows: Float[Tensor, "N P D"], layer: int, parts: Mapping[str, Sequence[str]], lens: TunedLens
) -> Float[Tensor, "N P D"]:
    into, out = lens.into(layer), lens.out_of(layer)
    by_first = {"resid_pre": into, "resid_mid": out, "resid_post": out}
    taken = (by_first.get(terms[0], out.linear) for terms in parts.values())
    return torch.stack([translate(rows[:, number]) for number, translate in enumerate(taken)], dim=1)


def _layers(model: MoEModel, layers: Indices) -> tuple[int, ...]:
    chosen = moe_layers(model, layers)
    if not chosen:
        raise BadInput("no layers", expected=f"some of {list(model.layers)}, or None for all", got="none")
    check_same_parts(model, chosen)
    return chosen


def _check_lens(model: MoEModel, lens: TunedLens, definition: str) -> None:
    if definition != "paper":
        raise BadInput(
            "a tuned lens cannot be used as coded",
            expected='definition="paper": the released notebooks decode the normed input, which no translator is for',
            got=repr(definition),
        )
    lens.check(model)


def _part_variables(parts: Mapping[str, Sequence[str]]) -> dict[str, Variable]:
    experts = [[term for term in terms if term[0] in "cf"] for terms in parts.values()]
    ranks = [int(held[0][1:]) if len(held) == 1 else 0 for held in experts]
    sums = [
        len(held) if terms[0] in ("resid_mid", "moe_in") and held == [f"c{j + 1}" for j in range(len(held))] else -1
        for held, terms in zip(experts, parts.values(), strict=True)
    ]
    shared = ["shared" in terms for terms in parts.values()]
    return {
        "part_rank": Variable(("part",), np.array(ranks, "int32"), "rank", "rank of a part's only expert, else 0"),
        "part_sum": Variable(("part",), np.array(sums, "int32"), "experts", "k of r + c_1 + ... + c_k, else -1"),
        "part_shared": Variable(("part",), np.array(shared, "int8"), "1", "1 where shared experts are added"),
    }


def _lens_variables(model: MoEModel, decoded: Sequence[Decoded]) -> dict[str, Variable]:
    ids, probabilities, true_rank, final_rank, kl = (
        torch.stack(values).transpose(1, 2).cpu() for values in zip(*decoded, strict=True)
    )
    row, best = ("layer", "part", "pos"), ("layer", "part", "pos", "top")
    agreement, by_chance = (final_rank == 1).to(torch.int8), "1 for the first, half the vocabulary by chance"
    return {
        "top_id": Variable(best, ids.int().numpy(), "token id", "the part's most probable tokens"),
        "top_token": Variable(best, token_texts(model, ids), "text", "the part's most probable tokens"),
        "top_probability": Variable(best, probabilities.numpy(), "1", "their probabilities, 0 to 1"),
        "true_rank": Variable(row, true_rank.numpy(), "rank", f"rank of the true next token, {by_chance}; or NaN"),
        "final_rank": Variable(row, final_rank.int().numpy(), "rank", f"rank of the model's prediction, {by_chance}"),
        "agreement": Variable(row, agreement.numpy(), "1", "1 where the model's own prediction comes first"),
        "kl": Variable(row, kl.numpy(), "nats", "KL(final || part); 0 where the part says all that the model says"),
    }


def _expert_variables(run: Run, layers: Sequence[int], at: At) -> dict[str, Variable]:
    ranked = [by_rank(run, layer, at) for layer in layers]
    ids, weights, _ = (torch.stack(values).cpu() for values in zip(*ranked, strict=True))
    dims = ("layer", "pos", "rank")
    return {
        "expert": Variable(dims, ids.int().numpy(), "expert", "experts chosen, heaviest first"),
        "gate_weight": Variable(dims, weights.numpy(), "1", "their combine weights"),
    }


def _text_variables(model: MoEModel, run: Run, at: At, final: Decoded) -> dict[str, Variable]:
    ids, following = at.of(run.token_ids).cpu(), next_ids(run)[at.numbers].cpu()  # type: ignore[arg-type]
    best_ids, best, true_rank = (
        final.ids[:, 0].cpu(),
        final.probabilities[:, 0].cpu(),
        final.true_rank[:, 0].cpu(),
    )
    pos, top = ("pos",), ("pos", "top")
    return {
        "token_id": Variable(pos, ids.int().numpy(), "token id", "the text"),
        "token": Variable(pos, token_texts(model, ids), "text", "the text"),
        "next_id": Variable(pos, following.int().numpy(), "token id", "the true next token, -1 at the last token"),
        "final_id": Variable(top, best_ids.int().numpy(), "token id", "the model's most probable tokens"),
        "final_token": Variable(top, token_texts(model, best_ids), "text", "the model's most probable tokens"),
        "final_probability": Variable(top, best.numpy(), "1", "their probabilities, 0 to 1"),
        "final_true_rank": Variable(pos, true_rank.numpy(), "rank", "the model's rank of the true next token; or NaN"),
    }
