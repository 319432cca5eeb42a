"""A sample of what the experts of each layer are given, to run all of them on, chosen or not.

A few tokens of every document, drawn by the seed and the document's number alone, the same at every layer. Tokens of
one document are alike, so that many documents with few tokens each say more than few with many.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_interp.analyses.collect import Options, Pass, over_experts
from moe_interp.analyses.plain import check_not_edited
from moe_interp.data import Corpus
from moe_interp.model import MoEModel
from moe_interp.run import Indices, Read, Run, positions_of

_HELD = 2**26  # values of expert outputs held at once: 256 MB in float32


class Inputs(NamedTuple):
    """T sampled tokens at one layer.

    Attributes:
        moe_in: [T, D], in the model's own dtype.
        scores: [T, E], the router's, over experts alone.
        chosen: [T, E], whether the router chose the expert.
        weights: [T, E], combine weights; 0 where it was not chosen.
        documents: [T], numbers in the corpus, ascending.
    """

    moe_in: Float[Tensor, "T D"]
    scores: Float[Tensor, "T E"]
    chosen: Bool[Tensor, "T E"]
    weights: Float[Tensor, "T E"]
    documents: Int[np.ndarray, " T"]


def moe_layers(model: MoEModel, layers: Indices) -> tuple[int, ...]:
    """The MoE layers asked for, each once; all for None.

    Raises:
        UnknownName: one is no MoE layer.
    """
    given = positions_of(layers)
    chosen = model.layers if given is None else tuple(dict.fromkeys(given))
    for layer in chosen:
        model.spec.moe(layer)
    return chosen


def sample_inputs(
    model: MoEModel,
    corpus: Corpus,
    layers: tuple[int, ...],
    *,
    per_document: int = 4,
    options: Options | None = None,
    seed: int = 0,
) -> tuple[dict[int, Inputs], dict[str, str | int | float]]:
    """Inputs of the MoE blocks at a few tokens of every document, by layer, and the provenance of the pass.

    Raises:
        BadInput: no tokenizer, fewer than one token a document, or standing edits of experts, which `every_expert`
            does not have.
    """
    check_not_edited(model, layers, ("expert_act", "expert_out"), "outputs of all experts")
    going = Pass(model, corpus, options)
    read = [Read(point, layers) for point in ("moe_in", "router_logits", "router_scores")]
    found: dict[int, list[tuple[int, Inputs]]] = {layer: [] for layer in layers}
    for run, batch in going.runs(read, "sample of inputs"):
        for row, document in enumerate(batch.documents.tolist()):
            real = run.mask[row].nonzero().flatten()
            rng = np.random.default_rng([seed, document])
            drawn = np.sort(rng.permutation(len(real))[:per_document])
            for layer in layers:
                columns, experts = real[torch.from_numpy(drawn)], model.spec.moe(layer).num_experts
                columns = columns[run.routing[layer].mask[row, columns]]  # not those that skip its experts
                found[layer].append((document, _at(run, layer, row, columns, document, experts)))
    return {layer: _joined(parts) for layer, parts in found.items()}, going.provenance


def _at(run: Run, layer: int, row: int, columns: Int[Tensor, " t"], document: int, experts: int) -> Inputs:
    routing = run.routing[layer]
    scores = over_experts(run["router_scores", layer][row, columns].float(), experts)
    ids, weights = routing.ids[row, columns], routing.weights[row, columns].float()
    return Inputs(
        run["moe_in", layer][row, columns],
        scores,
        torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True),
        torch.zeros_like(scores).scatter_add(1, ids, weights),
        np.full(len(columns), document),
    )


def _joined(parts: list[tuple[int, Inputs]]) -> Inputs:
    ordered = [one for _, one in sorted(parts, key=lambda part: part[0])]
    *tensors, documents = zip(*ordered, strict=True)
    moe_in, scores, chosen, weights = (torch.cat(list(values)) for values in tensors)
    return Inputs(moe_in, scores, chosen, weights, np.concatenate(documents))


def every_expert(model: MoEModel, layer: int, moe_in: Float[Tensor, "T D"]) -> Iterator[Float[Tensor, "t E D"]]:
    """Unweighted outputs of all experts of a layer, some tokens at a time, in float32."""
    count = model.spec.moe(layer).num_experts
    experts = model.experts(layer)
    for some in moe_in.split(max(1, _HELD // (count * moe_in.shape[1]))):
        with torch.no_grad():
            outputs = experts(some, torch.arange(count, device=some.device).expand(len(some), count)).float()
        yield outputs


def per_document(
    values: Float[np.ndarray, "T *rest"], documents: Int[np.ndarray, " T"]
) -> Float[np.ndarray, "N *rest"]:
    """Sums over the sampled tokens of each document that has some."""
    _, places = np.unique(documents, return_inverse=True)
    sums = np.zeros((places.max() + 1, *values.shape[1:]))
    np.add.at(sums, places, values)
    return sums
