"""How alike the experts of a layer are: by weights, by outputs on the same tokens, by router rows.

1. Weights. Neurons have no order, so those of two experts are matched first: neuron f is its rows of gate and up and
   its column of down, in one vector; the assignment of largest total scalar product (Hungarian) is taken, and the
   cosine of the matched matrices is the result. Matching finds likeness in noise too: `weights_null` matches with
   an expert whose hidden dimensions are permuted.
2. Outputs of all experts on the same sampled tokens, chosen or not: the mean cosine, beside that of *different*
   tokens; and linear CKA (Kornblith et al. 2019, arXiv 1905.00414), debiased with the unbiased HSIC of Song et al.
   2012, for the plain estimate of independent outputs is 0.89 at n = 256, d = 2,048; debiased it is 0.
3. Cosine of router rows, beside 1 / sqrt(D), the spread of that of random directions.

Intervals leave out blocks of documents in turn.
"""

from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

import moe_interp.stats as stats
from moe_interp.adapters.experts import ExpertWeights
from moe_interp.analyses.collect import Options, experts_of
from moe_interp.analyses.inputs import Inputs, every_expert, moe_layers, sample_inputs
from moe_interp.arguments import Count, Draws, Range, Seed, checked
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled
from moe_interp.run import Indices

BLOCKS = 20


@checked
def expert_similarity(
    model: MoEModel,
    corpus: Corpus,
    *,
    layers: Indices = None,
    weights: bool = True,
    tokens: Draws = 256,
    null_pairs: Annotated[int, Range(0, 1_000_000)] = 64,
    special_tokens: bool = False,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """How alike the experts of a layer are.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents; their domains are not used.
        layers: MoE layers (None: all).
        weights: whether to compare weights, which takes an assignment for every pair (about F^3).
        tokens: n, about as many are sampled, as few a document as that takes. Memory grows with E n^2.
        null_pairs: pairs that are matched again with permuted dimensions, per layer.
        special_tokens: whether the tokenizer's special tokens may be among them.
        seed: of the sample and the controls.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims layer, expert, other, bound, NaN for an expert and itself: ``weights`` (NaN if not asked for) beside
        ``weights_unmatched`` and, per layer, ``weights_null``; ``output_cosine`` with its interval beside
        ``output_cosine_null``; ``output_cka`` with its interval; ``router_cosine`` beside ``router_cosine_null``.

    Raises:
        BadInput: no tokenizer, fewer than five tokens, a router without a row for each expert, or a standing edit of
            what experts of these layers put out.
        UnknownName: a layer that is no MoE layer.
        UnsupportedModel: layers with different numbers of experts.
    """
    chosen, options = moe_layers(model, layers), Options(special_tokens, max_tokens, batch_tokens)
    experts = np.arange(experts_of(model, chosen))
    each = -(-tokens // len(corpus))
    sample, where = sample_inputs(model, corpus, chosen, per_document=each, options=options, seed=seed)
    if (got := min(tokens, len(sample[chosen[0]].documents))) < 5:
        raise BadInput("too few tokens to compare outputs", expected="five or more", got=str(got))
    parts = []
    for layer in tqdm(chosen, desc="similarity of experts", unit="layer"):
        part = _by_outputs(model, layer, _first(sample[layer], tokens), seed) | {"router_cosine": _router(model, layer)}
        parts.append(part | _by_weights(model, layer, weights, null_pairs, seed))
    values = {name: np.stack([one[name] for one in parts], axis=1 if "interval" in name else 0) for name in parts[0]}
    values["router_cosine_null"] = np.array(model.spec.d_model**-0.5)
    coords: dict[str, Any] = {
        "bound": ["low", "high"],
        "layer": np.array(chosen, dtype=np.int64),
        "expert": experts,
        "other": experts,
    }
    how: dict[str, str | int] = {
        "tokens": got,
        "weights_compared": str(weights),
        "null_pairs": null_pairs,
        "seed": seed,
    }
    return labelled(described(values, _VARIABLES), coords, analysis="expert_similarity", provenance={**where, **how})


def _first(sample: Inputs, tokens: int) -> Inputs:
    """So many of the tokens, spread over the documents."""
    kept = np.unique(np.linspace(0, len(sample.documents) - 1, tokens).astype(int))
    where = torch.from_numpy(kept).to(sample.moe_in.device)
    moe_in, scores, chosen, weights = (values[where] for values in sample[:4])
    return Inputs(moe_in, scores, chosen, weights, sample.documents[kept])


# Outputs


def _by_outputs(model: MoEModel, layer: int, sample: Inputs, seed: int) -> dict[str, Any]:
    outputs = torch.cat(list(every_expert(model, layer, sample.moe_in))).transpose(0, 1)  # [E, T, D]
    order = torch.from_numpy(_other_tokens(sample.documents, np.random.default_rng([seed, layer])))
    units = torch.nn.functional.normalize(outputs, dim=-1)
    blocks = np.unique(sample.documents, return_inverse=True)[1] % BLOCKS
    cosine, cosine_interval = _mean_cosine(units, units, blocks)
    grams = _grams(outputs)
    return {
        "output_cosine": _off(cosine),
        "output_cosine_interval": cosine_interval,
        "output_cosine_null": _off(_mean_cosine(units, units[:, order.to(units.device)], blocks)[0]),
        "output_cka": _off(cka(grams)),
        "output_cka_interval": _cka_interval(grams, blocks),
    }


def _other_tokens(documents: Int[np.ndarray, " T"], rng: np.random.Generator) -> Int[np.ndarray, " T"]:
    """For each token one of another document, drawn at random; of its own where there is but one document."""
    order = np.argsort(documents, kind="stable")
    sizes = np.unique(documents, return_counts=True)[1]
    starts = np.cumsum(sizes) - sizes
    drawn = np.empty_like(order)
    for start, size in zip(starts, sizes, strict=True):  # documents lie together: skip the own one, go round
        others = len(order) - size if len(sizes) > 1 else size
        drawn[start : start + size] = (start + size + rng.integers(others, size=size)) % len(order)
    found = np.empty_like(order)
    found[order] = order[drawn]
    return found


def _mean_cosine(
    left: Float[Tensor, "E T D"], right: Float[Tensor, "E T D"], blocks: Int[np.ndarray, " T"]
) -> tuple[Float[np.ndarray, "E E"], Float[np.ndarray, "2 E E"]]:
    experts = len(left)
    sums = np.zeros((BLOCKS, experts * experts + 1))
    for block in np.unique(blocks):
        mine = torch.from_numpy(np.flatnonzero(blocks == block)).to(left.device)
        table = torch.einsum("itd,jtd->ij", left[:, mine].double(), right[:, mine].double())
        sums[block] = [*table.flatten().tolist(), len(mine)]
    mean, interval = stats.block_jackknife(lambda one: one[:-1] / one[-1], sums, debias=False)
    return mean.reshape(experts, experts), interval.reshape(2, experts, experts)


def _grams(outputs: Float[Tensor, "E T D"]) -> Float[np.ndarray, "E T T"]:
    """Scalar products of a expert's outputs at two tokens, 0 at one and the same."""
    grams = (outputs.double() @ outputs.double().transpose(1, 2)).cpu().numpy()
    grams[:, np.arange(grams.shape[1]), np.arange(grams.shape[1])] = 0.0
    return grams


def cka(grams: Float[np.ndarray, "E T T"]) -> Float[np.ndarray, "E E"]:
    """Debiased linear CKA of every pair, from Gram matrices with a zero diagonal; 1 for equal, 0 for independent."""
    tokens = grams.shape[1]
    if tokens < 4:  # the unbiased estimate of HSIC needs four
        return np.full((len(grams), len(grams)), np.nan)
    flat, rows = grams.reshape(len(grams), -1), grams.sum(axis=2)
    total = rows.sum(axis=1)
    products = flat @ flat.T
    products += np.outer(total, total) / ((tokens - 1) * (tokens - 2))
    products -= 2 / (tokens - 2) * rows @ rows.T
    own = np.sqrt(np.clip(products.diagonal(), 0.0, None))
    return stats.ratio(products, np.outer(own, own))


def _cka_interval(grams: Float[np.ndarray, "E T T"], blocks: Int[np.ndarray, " T"]) -> Float[np.ndarray, "2 E E"]:
    """Leaving out blocks of documents; the statistic is of tokens kept, so blocks are told by their number."""
    chosen = np.zeros((BLOCKS, grams.shape[1]))
    chosen[blocks, np.arange(len(blocks))] = 1.0

    def without(kept: Float[np.ndarray, " T"]) -> Float[np.ndarray, "E E"]:
        there = np.flatnonzero(kept)
        return cka(grams[:, there[:, None], there])

    return stats.block_jackknife(without, chosen, debias=False)[1]


# Weights and router rows


def neurons(weights: ExpertWeights) -> Float[Tensor, "F M"]:
    """Each neuron as one vector: its rows of gate and up, and its column of down."""
    parts = [weights.up, weights.down.T] if weights.gate is None else [weights.gate, weights.up, weights.down.T]
    return torch.cat([part.float() for part in parts], dim=1)


def matched_cosine(left: Float[Tensor, "F M"], right: Float[Tensor, "F M"]) -> float:
    """Cosine of two experts' weights, the neurons of the second in the order that makes it largest."""
    from scipy.optimize import linear_sum_assignment

    products = (left @ right.T).cpu().numpy()
    rows, columns = linear_sum_assignment(products, maximize=True)
    return float(products[rows, columns].sum() / (left.norm() * right.norm()).item())


def _by_weights(model: MoEModel, layer: int, wanted: bool, null_pairs: int, seed: int) -> dict[str, Any]:
    count = model.spec.moe(layer).num_experts
    matched, plain = np.full((2, count, count), np.nan)
    if not wanted:
        return {"weights": matched, "weights_unmatched": plain, "weights_null": np.array(np.nan)}
    experts = [neurons(model.weights(layer, expert)) for expert in range(count)]
    width = model.weights(layer, 0).up.shape[1]  # of what experts work in, which may be less than the residual
    for one in range(count):
        for other in range(one + 1, count):
            matched[one, other] = matched[other, one] = matched_cosine(experts[one], experts[other])
            product = (experts[one] * experts[other]).sum() / (experts[one].norm() * experts[other].norm())
            plain[one, other] = plain[other, one] = product.item()
    rng = np.random.default_rng([seed, layer])
    null = []
    for _ in range(null_pairs if count > 1 else 0):
        one, other = rng.choice(count, 2, replace=False)
        null.append(matched_cosine(experts[one], _permuted(experts[other], width, rng)))
    return {"weights": matched, "weights_unmatched": plain, "weights_null": np.mean(null) if null else np.array(np.nan)}


def _permuted(vectors: Float[Tensor, "F M"], width: int, rng: np.random.Generator) -> Float[Tensor, "F M"]:
    """The neurons with their hidden dimensions permuted, the same way in each of their parts."""
    order = rng.permutation(width)
    places = np.concatenate([order + start for start in range(0, vectors.shape[1], width)])
    return vectors[:, torch.from_numpy(places)]


def _router(model: MoEModel, layer: int) -> Float[np.ndarray, "E E"]:
    moe = model.spec.moe(layer)
    rows = getattr(model.hf.get_submodule(moe.router), "weight", None)
    if not isinstance(rows, Tensor) or rows.shape != (moe.num_experts, model.spec.d_model):
        raise BadInput(
            f"the router of layer {layer} has no row for each expert",
            expected=f"a weight of shape {(moe.num_experts, model.spec.d_model)}",
            got="none" if rows is None else str(tuple(rows.shape)),
        )
    units = torch.nn.functional.normalize(rows.detach().double(), dim=1)
    return _off((units @ units.T).cpu().numpy())


def _off(table: Float[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    found = table.copy()
    np.fill_diagonal(found, np.nan)
    return found


_LEO = ("layer", "expert", "other")
_VARIABLES: dict[str, Description] = {
    "weights": (_LEO, "1", "cosine of two experts' weights after matching neurons, -1 ... 1"),
    "weights_unmatched": (_LEO, "1", "the same in the order that neurons have"),
    "weights_null": (("layer",), "1", "mean after matching with an expert whose hidden dimensions are permuted"),
    "output_cosine": (_LEO, "1", "mean cosine of two experts' outputs on the same tokens, -1 ... 1"),
    "output_cosine_interval": (("bound", *_LEO), "1", "95 % interval over blocks of documents: output cosine"),
    "output_cosine_null": (_LEO, "1", "the same with the other expert on another document's token"),
    "output_cka": (
        _LEO,
        "1",
        "debiased linear CKA of two experts' outputs on the same tokens; 0 if independent, 1 if equal",
    ),
    "output_cka_interval": (("bound", *_LEO), "1", "95 % interval over blocks of documents: output CKA"),
    "router_cosine": (_LEO, "1", "cosine of two experts' router rows, -1 ... 1"),
    "router_cosine_null": ((), "1", "its standard deviation for random directions, 1 / sqrt(D)"),
}
