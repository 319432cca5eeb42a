"""How well one expert stands for all of them: its cosine to the ensemble, the controls, and the sum by k.

For a token with experts in order of weight, contributions c_1 ... c_K (weight times unweighted output),
y = sum c_j, residual r (resid_mid) and shared experts s:

1. cos(b + v, b + y) over the background b = 0, s, r or r + s, for v one of: the heaviest, c_1; the lightest,
   c_K; a random expert that the router left out, at the heaviest's weight; c_1 of another token of the
   document; nothing. With r most of the cosine is r itself, so that of "none" is the one to compare with:
   `gain` is the difference, token by token.
2. ||y_k - y|| / ||y|| and <y_k, y> / ||y||^2 for y_k, the sum of k slots: the heaviest, and random ones.
3. Sums are kept per document, and intervals come from resampling documents. All tokens count, special ones too.

MoE-Lens published the cosine of c_1 with r, as 0.95 and without a control.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from moe_interp.analyses.inputs import moe_layers
from moe_interp.analyses.plain import check_not_edited, check_plain, check_same_parts
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.data import Batch, Corpus, batches
from moe_interp.model import MoEModel
from moe_interp.results import Variable, labelled
from moe_interp.run import Indices, Run, select
from moe_interp.stats import bootstrap_by_group, bootstrap_ratio, group_totals, ratio

CANDIDATES = ("heaviest", "lightest", "random_unselected", "other_token", "none")
KEPT = ("heaviest", "random")
WITH = ("with", "without")
_HELD = 2**30  # bytes of expert outputs held at once; layers beyond it take another forward pass


@checked
def ensemble_similarity(
    model: MoEModel,
    corpus: Corpus,
    *,
    layers: Indices = None,
    definition: Literal["paper", "as_coded"] = "paper",
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """One expert against the ensemble, over all tokens of a corpus, special ones too, per domain and MoE layer.

    ``definition="paper"`` takes every token, its contributions and resid_mid. ``"as_coded"`` is what the
    released MoE-Lens notebook computes, once per document: for each expert that the last token chose, the
    unweighted output of row 0 of that expert's own batch (the first token of the document routed to it,
    mostly not the last one); the last token's *post-norm* MoE input as r, added to every expert; shared
    experts left out; the heaviest against the mean by the last token's weights, normalised to sum to 1.
    Controls are made alike: the random expert runs on the row that the heaviest's output is of, the other
    token's output is unweighted.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents with domains.
        layers: MoE layers (None: all).
        definition: "paper" or "as_coded".
        resamples: of documents, for the intervals.
        seed: of the resamples and of the random controls, which depend on it, the document and the layer.
        max_tokens, batch_tokens: as in `moe_interp.data.batches`.

    Returns:
        Dims domain, layer (the model's own indices), candidate, residual and shared ("with", "without": r and
        s on both sides; "with" shared only where the model has shared experts), kept, k, bound.
        ``cosine``, -1 ... 1, and ``gain``, its difference from "none"; NaN where "none" is the zero vector.
        ``error`` and ``projection`` (kept: "heaviest", "random"), for "paper" alone: 0 and 1 at k = K.
        Each with ``_overall``, over all documents, and ``_interval``: 95 %, by bootstrap over documents, NaN
        where a domain has fewer than two. ``tokens``, ``documents``: how many were measured.

    Raises:
        BadInput: no tokenizer, no layers, layers with different parts, an unknown definition, or a standing edit of
            what experts put out, which the control by an expert that was not chosen would not have.
        UnknownName: a layer that is no MoE layer.
    """
    chosen = _layers(model, layers)
    sums, truncated = _Sums(len(corpus), len(chosen)), 0
    with tqdm(total=len(corpus), desc="similarity", unit="document") as progress:
        for batch in batches(model, corpus, max_tokens=max_tokens, batch_tokens=batch_tokens):
            for row, layer, slots in _documents(model, batch, chosen):
                document = int(batch.documents[row])
                measured = _measure(model, slots, definition, np.random.default_rng([seed, document, layer]))
                sums.add(document, chosen.index(layer), measured)
            truncated += batch.truncated
            progress.update(len(batch.documents))
    provenance = {
        **model.provenance(),
        **corpus.told,
        "max_tokens": max_tokens or "context length",
        "truncated": truncated,
        "definition": definition,
        "resamples": resamples,
        "seed": seed,
    }
    return _dataset(sums, corpus, chosen, resamples, seed, provenance)


def _layers(model: MoEModel, layers: Indices) -> tuple[int, ...]:
    chosen = moe_layers(model, layers)
    check_plain(model, chosen)
    check_same_parts(model, chosen)
    check_not_edited(model, chosen, ("expert_act", "expert_out"), "outputs of experts that were not chosen")
    return chosen


# ---- one document at one layer -----------------------------------------------------------------------------


class Slots(NamedTuple):
    """The real tokens of one document at one layer, slots from the heaviest to the lightest.

    Attributes:
        layer: its index.
        ids, weights: [T, K].
        outputs: [T, K, D], unweighted.
        moe_in: [T, D], in the model's own dtype; the other floats are float32.
        resid_mid: [T, D].
        shared: [T, D], None for a model without shared experts.
    """

    layer: int
    ids: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    outputs: Float[Tensor, "T K D"]
    moe_in: Float[Tensor, "T D"]
    resid_mid: Float[Tensor, "T D"]
    shared: Float[Tensor, "T D"] | None


def _documents(model: MoEModel, batch: Batch, layers: tuple[int, ...]) -> Iterator[tuple[int, int, Slots]]:
    """Row, layer and slots of every document of a batch; as many layers a forward pass as memory allows."""
    points = [name for name in ("expert_out", "moe_in", "resid_mid", "shared_out") if name in model.points]
    values = batch.inputs["input_ids"].numel() * (model.spec.top_k + len(points) - 1) * model.spec.d_model
    together = max(1, _HELD // (values * model.dtype.itemsize))
    for first in range(0, len(layers), together):
        part = layers[first : first + together]
        run = model.run(batch.inputs, read=[select(name, layers=part) for name in points], output=False)
        for layer in part:
            for row in range(len(batch.documents)):
                yield row, layer, _slots(run, layer, row)


def _slots(run: Run, layer: int, row: int) -> Slots:
    routing = run.routing[layer]
    real = run.mask[row].to(routing.ids.device)  # layers may lie on different devices
    order = routing.by_rank()[row][real]
    outputs = run["expert_out", layer][row][real]
    shared = run["shared_out", layer][row][real].float() if ("shared_out", layer) in run.values else None
    return Slots(
        layer,
        ids=routing.ids[row][real].gather(1, order),
        weights=routing.weights[row][real].gather(1, order).float(),
        outputs=outputs.gather(1, order[..., None].expand_as(outputs)).float(),
        moe_in=run["moe_in", layer][row][real],
        resid_mid=run["resid_mid", layer][row][real].float(),
        shared=shared,
    )


def _measure(
    model: MoEModel, slots: Slots, definition: str, rng: np.random.Generator
) -> dict[str, Float[Tensor, "T ..."]]:
    """Every measure for each token (for the last one alone as coded); NaN where it is not defined."""
    if definition == "as_coded":
        candidates, ensemble, backgrounds = _as_coded(model, slots, rng)
        return _similarities(candidates, ensemble, backgrounds)
    contributions = slots.weights[..., None] * slots.outputs
    shuffled = torch.from_numpy(rng.random(slots.ids.shape).argsort(axis=1)).to(slots.ids.device)
    candidates = torch.stack(
        [
            contributions[:, 0],
            contributions[:, -1],
            slots.weights[:, :1] * _unselected(model, slots.layer, slots.moe_in, slots.ids, rng),
            _of_other(contributions[:, 0], rng),
            torch.zeros_like(slots.resid_mid),
        ]
    )
    randomly = contributions.gather(1, shuffled[..., None].expand_as(contributions))
    backgrounds = _backgrounds(slots.resid_mid, slots.shared)
    by_k = _partial_sums(contributions), _partial_sums(randomly)
    return _similarities(candidates, contributions.sum(dim=1), backgrounds) | {
        name: torch.stack([one[name] for one in by_k], dim=1) for name in ("error", "projection")
    }


def _as_coded(
    model: MoEModel, slots: Slots, rng: np.random.Generator
) -> tuple[Float[Tensor, "C 1 D"], Float[Tensor, "1 D"], Float[Tensor, "R 1 1 D"]]:
    """Candidates, ensemble and backgrounds of the last token as the released notebook forms them."""
    experts, weights = slots.ids[-1], slots.weights[-1, :, None]
    routed_TKK = slots.ids[:, :, None] == experts  # token, slot, expert of the last token
    rows = routed_TKK.any(dim=1).int().argmax(dim=0)
    places = routed_TKK[rows, :, torch.arange(len(experts), device=rows.device)].int().argmax(dim=1)
    outputs = slots.outputs[rows, places]
    candidates = torch.stack(
        [
            outputs[:1],
            outputs[-1:],
            _unselected(model, slots.layer, slots.moe_in[rows[:1]], slots.ids[-1:], rng),
            _of_other(slots.outputs[:, 0], rng)[-1:],
            torch.zeros_like(outputs[:1]),
        ]
    )
    mean = (weights * outputs).sum(dim=0, keepdim=True) / weights.sum()
    return candidates, mean, _backgrounds(slots.moe_in[-1:].float(), None)


def _unselected(
    model: MoEModel,
    layer: int,
    inputs: Float[Tensor, "T D"],
    ids: Int[Tensor, "T K"],
    rng: np.random.Generator,
) -> Float[Tensor, "T D"]:
    """Unweighted output of an expert not among ``ids``, each as likely; NaN if all are."""
    count = model.spec.moe(layer).num_experts
    tokens, chosen = ids.shape
    if chosen == count:
        return torch.full_like(inputs, torch.nan, dtype=torch.float32)
    draw = torch.from_numpy(rng.integers(count - chosen, size=(tokens, 1))).to(ids.device)
    free = torch.ones(tokens, count, dtype=torch.bool, device=ids.device).scatter(1, ids, False)
    expert = (free & (free.cumsum(dim=1) == draw + 1)).int().argmax(dim=1, keepdim=True)
    with torch.no_grad():
        return model.experts(layer)(inputs, expert)[:, 0].float()


def _of_other(values: Float[Tensor, "T D"], rng: np.random.Generator) -> Float[Tensor, "T D"]:
    """For each token the value of another one of the document, each as likely; NaN if there is no other."""
    tokens = len(values)
    if tokens == 1:
        return torch.full_like(values, torch.nan)
    other = (np.arange(tokens) + rng.integers(1, tokens, size=tokens)) % tokens
    return values[torch.from_numpy(other).to(values.device)]


def _backgrounds(residual: Float[Tensor, "T D"], shared: Float[Tensor, "T D"] | None) -> Float[Tensor, "R H T D"]:
    """What is added on both sides: with and without the residual, with and without shared experts."""
    residuals = torch.stack([residual, torch.zeros_like(residual)])[:, None]
    if shared is None:
        return residuals
    return residuals + torch.stack([shared, torch.zeros_like(shared)])


def _similarities(
    candidates: Float[Tensor, "C T D"], ensemble: Float[Tensor, "T D"], backgrounds: Float[Tensor, "R H T D"]
) -> dict[str, Float[Tensor, "T C R H"]]:
    """Cosines over every background, and their gain over the last candidate, no expert."""
    cosines = [[_cosine(background + candidates, background + ensemble) for background in row] for row in backgrounds]
    cosine = torch.stack([torch.stack(row, dim=-1) for row in cosines], dim=-2).transpose(0, 1)
    return {"cosine": cosine, "gain": cosine - cosine[:, -1:]}


def _cosine(left: Float[Tensor, "C T D"], right: Float[Tensor, "T D"]) -> Float[Tensor, "C T"]:
    norms = left.norm(dim=-1) * right.norm(dim=-1)
    return torch.where(norms > 0, (left * right).sum(dim=-1) / norms, torch.nan)


def _partial_sums(contributions: Float[Tensor, "T K D"]) -> dict[str, Float[Tensor, "T K"]]:
    """Distance of the first k contributions' sum to that of all, and its projection on it, k = 1 ... K."""
    partial = contributions.cumsum(dim=1)
    whole = partial[:, -1:]
    size = whole.norm(dim=-1)
    return {
        "error": torch.where(size > 0, (partial - whole).norm(dim=-1) / size, torch.nan),
        "projection": torch.where(size > 0, (partial * whole).sum(dim=-1) / size**2, torch.nan),
    }


# ---- sums per document, and the labelled result ------------------------------------------------------------


@dataclass
class _Sums:
    """Sum of each measure per document and layer over the tokens where it is defined, and their number."""

    documents: int
    layers: int

    def __post_init__(self) -> None:
        self.totals: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self.tokens = np.zeros(self.documents, np.int64)

    def add(self, document: int, layer: int, measured: dict[str, Float[Tensor, "T ..."]]) -> None:
        """Adds the tokens of one document at one layer."""
        for name, values in measured.items():
            found = values.cpu().double().numpy()
            shape = (self.documents, self.layers, *found.shape[1:])
            self.totals.setdefault(name, np.zeros(shape))[document, layer] = np.nansum(found, axis=0)
            self.counts.setdefault(name, np.zeros(shape))[document, layer] = (~np.isnan(found)).sum(axis=0)
            self.tokens[document] = len(found)


_CANDIDATE, _BY_K = ("layer", "candidate", "residual", "shared"), ("layer", "kept", "k")
_MEASURES = {
    "cosine": (
        _CANDIDATE,
        "mean cosine between one candidate and all routed experts, over the same background, -1 ... 1; to be "
        "compared with the candidates that are controls, above all with none",
    ),
    "gain": (
        _CANDIDATE,
        "mean cosine of the candidate minus that of no expert on the same tokens; 0 if it adds nothing",
    ),
    "error": (
        _BY_K,
        "mean distance of the sum of k slots to the sum of all, in norms of the latter: 1 at k = 0, 0 at K",
    ),
    "projection": (
        _BY_K,
        "mean projection of the sum of k slots on the sum of all, as a share of it; at random k/K expected",
    ),
}


def _dataset(
    sums: _Sums,
    corpus: Corpus,
    layers: tuple[int, ...],
    resamples: int,
    seed: int,
    provenance: Mapping[str, str | int | float],
) -> xr.Dataset:
    labels, domains = corpus.labels, corpus.domains
    tokens = group_totals(sums.tokens, labels, len(domains))
    variables = {
        "tokens": Variable(("domain",), tokens, "tokens", "tokens measured"),
        "documents": Variable(("domain",), np.bincount(labels), "documents", "documents measured"),
    }
    for name, totals in sums.totals.items():
        dims, meaning = _MEASURES[name]
        for part, (leading, values) in _means(totals, sums.counts[name], labels, resamples, seed).items():
            variables[name + part] = Variable((*leading, *dims), values, "1", _PARTS[part] + meaning)
    coords: dict[str, ArrayLike] = {
        "domain": list(domains),
        "layer": np.array(layers, dtype=np.int64),
        "bound": ["low", "high"],
        "candidate": list(CANDIDATES),
        "residual": list(WITH),
        "shared": list(WITH[-sums.totals["cosine"].shape[-1] :]),
    }
    if "error" in sums.totals:
        coords |= {"kept": list(KEPT), "k": np.arange(sums.totals["error"].shape[-1]) + 1}
    return labelled(variables, coords, analysis="ensemble_similarity", provenance=provenance)


_PARTS = {
    "": "",
    "_overall": "over all domains: ",
    "_interval": "95 % bootstrap interval over documents: ",
    "_overall_interval": "95 % bootstrap interval over documents, over all domains: ",
}


def _means(
    totals: Float[np.ndarray, "N *rest"],
    counts: Float[np.ndarray, "N *rest"],
    labels: Int[np.ndarray, " N"],
    resamples: int,
    seed: int,
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Means over tokens by domain and over all, with intervals; each with its leading dims."""
    groups = [labels == label for label in range(labels.max() + 1)]
    pooled = bootstrap_ratio(totals, counts, strata=labels, resamples=resamples, seed=seed)
    return {
        "": (
            ("domain",),
            np.stack([ratio(totals[one].sum(axis=0), counts[one].sum(axis=0)) for one in groups]),
        ),
        "_overall": ((), ratio(totals.sum(axis=0), counts.sum(axis=0))),
        "_interval": (
            ("bound", "domain"),
            bootstrap_by_group(totals, counts, labels, len(groups), resamples, seed),
        ),
        "_overall_interval": (("bound",), pooled),
    }
