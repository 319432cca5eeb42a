"""What shared experts do that routed ones do not.

Per MoE layer, s the shared experts as added and y the weighted sum of the routed ones:

1. Size: the mean of ||s|| over that of ||y||.
2. Direction: the mean cosine of s and y, beside that of y and another token's s of the same document.
3. Constancy: ||mean s||^2 / mean ||s||^2, the share that is the same for every token, and the same of y; 1 over the
   number of tokens if there is none. What shared experts write at every token, the router need not repeat.
4. Use: the ratio of perplexities without shared experts, at one layer, and without routed ones; on the same documents.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

import moe_interp.stats as stats
from moe_interp.analyses.collect import Options, Pass
from moe_interp.analyses.inputs import moe_layers
from moe_interp.analyses.plain import check_plain_block
from moe_interp.analyses.super_experts import perplexity_ratios
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from moe_interp.interventions import Intervention, apply
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled
from moe_interp.run import Indices, Read, Run


@checked
def shared_experts(
    model: MoEModel,
    corpus: Corpus,
    *,
    layers: Indices = None,
    special_tokens: bool = False,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """What shared experts do that routed ones do not.

    Args:
        model: any opened model with a tokenizer and shared experts.
        corpus: documents; their domains are not used.
        layers: MoE layers (None: all).
        special_tokens: whether special tokens count (in perplexity they are never scored first, else as they come).
        resamples: of documents, for the intervals.
        seed: of these, and of the other tokens of the control.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims layer, bound: ``norm_ratio``, ``cosine`` (with ``_other_token``), ``constancy_shared`` and
        ``constancy_routed``, ``ratio_without_shared`` and ``ratio_without_routed``; the first two and the last two
        with ``_interval``.

    Raises:
        BadInput: no tokenizer, or a model without shared experts.
        UnknownName: a layer that is no MoE layer.
        UnsupportedModel: a block that does something to the sum of weight times output.
    """
    if "shared_out" not in model.points:
        raise BadInput("no shared experts", expected="a model with the point 'shared_out'", got=model.spec.model_type)
    chosen, options = moe_layers(model, layers), Options(special_tokens, max_tokens, batch_tokens)
    check_plain_block(model, chosen)
    going, sums = Pass(model, corpus, options), _Sums.empty(len(corpus), len(chosen), model.spec.d_model)
    read = [Read(point, chosen) for point in ("shared_out", "routed_out")]
    for run, batch in going.runs(read, "shared and routed experts"):
        for index, layer in enumerate(chosen):
            for row, document in enumerate(batch.documents.tolist()):
                _add(sums, run, layer, row, (document, index), np.random.default_rng([seed, document, layer]))
    values = _directions(sums, resamples, seed) | _without(model, corpus, options, chosen, resamples, seed)
    coords: dict[str, Any] = {"bound": ["low", "high"], "layer": np.array(chosen, dtype=np.int64)}
    how = {"resamples": resamples, "seed": seed}
    about = {**going.provenance, **how}
    return labelled(described(values, _VARIABLES), coords, analysis="shared_experts", provenance=about)


class _Sums(NamedTuple):
    """Per document and layer: tokens, and sums of norms, squares, cosines (and their number) and vectors."""

    tokens: np.ndarray
    norms: np.ndarray
    squares: np.ndarray
    cosines: np.ndarray
    others: np.ndarray
    vectors: np.ndarray

    @classmethod
    def empty(cls, documents: int, layers: int, width: int) -> "_Sums":
        one, two = (documents, layers), (2, documents, layers)
        sizes = (one, two, two, one, two, (2, layers, width))
        tokens, norms, squares, cosines, others, vectors = (np.zeros(size) for size in sizes)
        return cls(tokens, norms, squares, cosines, others, vectors)


def _add(sums: _Sums, run: Run, layer: int, row: int, at: tuple[int, int], rng: np.random.Generator) -> None:
    real = run.routing[layer].mask[row]
    shared, routed = (run[point, layer][row][real].double() for point in ("shared_out", "routed_out"))
    sums.tokens[at] += len(shared)
    for number, value in enumerate((shared, routed)):
        sums.norms[(number, *at)] += float(value.norm(dim=1).sum())
        sums.squares[(number, *at)] += float((value**2).sum())
        sums.vectors[number, at[1]] += value.sum(dim=0).cpu().numpy()
    sums.cosines[at] += float(_cosine(shared, routed).sum())
    if len(shared) > 1:
        turned = shared.roll(int(rng.integers(1, len(shared))), dims=0)
        sums.others[(0, *at)] += float(_cosine(turned, routed).sum())
        sums.others[(1, *at)] += len(shared)


def _cosine(left: Float[Tensor, "T D"], right: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
    return torch.nn.functional.cosine_similarity(left, right, dim=1)


def _directions(sums: _Sums, resamples: int, seed: int) -> dict[str, Any]:
    def both(name: str, top: np.ndarray, bottom: np.ndarray) -> dict[str, Any]:
        mean = stats.ratio(top.sum(axis=0), bottom.sum(axis=0))
        return {name: mean, f"{name}_interval": stats.bootstrap_ratio(top, bottom, resamples=resamples, seed=seed)}

    tokens = sums.tokens.sum(axis=0)
    constancy = (sums.vectors**2).sum(axis=-1) / tokens / sums.squares.sum(axis=1)
    return {
        **both("norm_ratio", sums.norms[0], sums.norms[1]),
        **both("cosine", sums.cosines, sums.tokens),
        "cosine_other_token": stats.ratio(sums.others[0].sum(axis=0), sums.others[1].sum(axis=0)),
        "constancy_shared": constancy[0],
        "constancy_routed": constancy[1],
    }


def _without(
    model: MoEModel, corpus: Corpus, options: Options, layers: tuple[int, ...], resamples: int, seed: int
) -> dict[str, Any]:
    """Ratios of perplexity without the shared experts of one layer, and without its routed ones."""
    points = ("shared_out", "routed_out")
    edits: list[Intervention] = [apply(point, torch.zeros_like, layers=layer) for point in points for layer in layers]
    ratio, interval = perplexity_ratios(model, corpus, options, edits, resamples, seed)
    half = len(layers)
    return {
        "ratio_without_shared": ratio[:half],
        "ratio_without_shared_interval": interval[:, :half],
        "ratio_without_routed": ratio[half:],
        "ratio_without_routed_interval": interval[:, half:],
    }


_L, _BL = ("layer",), ("bound", "layer")
_VARIABLES: dict[str, Description] = {
    "norm_ratio": (_L, "1", "mean norm of the shared experts over that of the routed ones' sum, 0 ..."),
    "norm_ratio_interval": (_BL, "1", "95 % interval over documents: norm ratio"),
    "cosine": (_L, "1", "mean cosine of the shared experts and the routed ones' sum, -1 ... 1"),
    "cosine_interval": (_BL, "1", "95 % interval over documents: cosine"),
    "cosine_other_token": (_L, "1", "control: the same with the shared experts of another token of the document"),
    "constancy_shared": (_L, "1", "share of the shared experts' squares that is the same for every token, 0 ... 1"),
    "constancy_routed": (_L, "1", "the same of the routed experts' sum"),
    "ratio_without_shared": (_L, "1", "perplexity without the layer's shared experts over that of the model"),
    "ratio_without_shared_interval": (_BL, "1", "95 % interval over documents: ratio without shared experts"),
    "ratio_without_routed": (_L, "1", "perplexity without the layer's routed experts over that of the model"),
    "ratio_without_routed_interval": (_BL, "1", "95 % interval over documents: ratio without routed experts"),
}
