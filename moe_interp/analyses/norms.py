"""Does the router prefer experts with large outputs? And how large are they where they are used?

1. Within each of a sample of tokens all E experts run, chosen or not: Spearman's rank correlation between ||f_e(x)||
   and the router's score p_e over experts, averaged over tokens, with an interval over documents. Scores in random
   order give 0. Pooling tokens and experts first answers another question and can flip the sign: `pooled` shows it.
2. `OutputSums` adds up, over all tokens that chose an expert, the norm of its output, and weight times norm (REAP's
   saliency S_e, arXiv 2510.13999, is the mean of that); it keeps the largest absolute value of any output. Where
   weights act on the input (llama4), the output is that of the weighted input, and is the contribution already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int

import moe_interp.stats as stats
from moe_interp.analyses.collect import Options, Pass, experts_of
from moe_interp.analyses.exact import UNIT, Exact, add_fixed, fixed_by
from moe_interp.analyses.inputs import Inputs, every_expert, moe_layers, per_document, sample_inputs
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.data import Corpus
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled
from moe_interp.run import Indices, Read, Run

_HELD = 2**30  # bytes of expert outputs held at once; layers beyond it take another forward pass


@dataclass
class OutputSums(Exact):
    """How large the outputs of experts are where they are used, per document.

    Holds 8 N L 4 E bytes: 111 MB for 2,000 documents, 27 layers and 64 experts.

    Attributes:
        layers: [L], MoE layer indices.
        counts: [N, L, E], tokens that chose the expert.
        weights: [N, L, E], sum of its combine weights, in units of 2^-32.
        norms: [N, L, E], sum of the norms of its outputs as the model made them, in units of 2^-32.
        contributions: [N, L, E], sum of the norms of what it added, weight times output, in units of 2^-32.
        largest: [L, E], the largest |value| in any of its outputs.
    """

    reads: ClassVar[tuple[str, ...]] = ("expert_out",)
    maxima: ClassVar[tuple[str, ...]] = ("largest",)

    layers: tuple[int, ...]
    counts: Int[np.ndarray, "N L E"]
    weights: Int[np.ndarray, "N L E"]
    norms: Int[np.ndarray, "N L E"]
    contributions: Int[np.ndarray, "N L E"]
    largest: Float[np.ndarray, "L E"]

    @classmethod
    def empty(cls, documents: int, layers: Sequence[int], experts: int) -> "OutputSums":
        """Nothing added yet."""
        size = (documents, len(layers), experts)
        counts, weights, norms, contributions = np.zeros((4, *size), np.int64)
        return cls(tuple(layers), counts, weights, norms, contributions, np.zeros(size[1:]))

    def update(self, run: Run, documents: Int[np.ndarray, " B"]) -> None:
        """Adds a run that read expert_out, at those layers where it did.

        Raises:
            BadCheckpoint: an output of a real token that is not finite, or sums too large to be kept exactly.
        """
        for index, layer in enumerate(self.layers):
            if ("expert_out", layer) not in run.values:
                continue
            routing, outputs = run.routing[layer], run["expert_out", layer].float()
            real = routing.mask[..., None]
            norms = torch.where(real, outputs.norm(dim=-1), 0.0)
            weights = torch.where(real, routing.weights.float(), 0.0)
            added = norms.double() * weights.double() if routing.weighs_output else norms
            parts = {
                "weights": (weights, "the router"),
                "norms": (norms, "an expert"),
                "contributions": (added, "an expert"),
            }
            for name, (values, whose) in parts.items():
                sums = fixed_by(routing.ids, values, self.counts.shape[-1], whose)
                add_fixed(getattr(self, name)[:, index], documents, sums.cpu().numpy())
            counts = real.long().new_zeros(len(documents), self.counts.shape[-1])
            counts.scatter_add_(1, routing.ids.flatten(1), real.expand_as(norms).long().flatten(1))
            np.add.at(self.counts[:, index], documents, counts.cpu().numpy())
            peaks = torch.where(real, outputs.abs().amax(dim=-1), 0.0).double()
            largest = torch.from_numpy(self.largest[index]).to(peaks.device)
            self.largest[index] = (
                largest.scatter_reduce(0, routing.ids.flatten(), peaks.flatten(), "amax").cpu().numpy()
            )


def collect_outputs(
    model: MoEModel, corpus: Corpus, options: Options | None = None
) -> tuple[OutputSums, dict[str, Any]]:
    """The sums over a corpus; as many layers a pass as memory allows."""
    going = Pass(model, corpus, options)
    sums = OutputSums.empty(len(corpus), model.layers, model.spec.num_experts)
    most = max(batch.inputs["input_ids"].numel() for batch in going.batches)
    together = max(1, _HELD // (most * model.spec.top_k * model.spec.d_model * model.dtype.itemsize))
    for first in range(0, len(model.layers), together):
        part = model.layers[first : first + together]
        for run, batch in going.runs([Read("expert_out", part)], f"outputs of layers {part[0]} to {part[-1]}"):
            sums.update(run, batch.documents)
    return sums, going.provenance


@checked
def norm_and_weight(
    model: MoEModel,
    corpus: Corpus,
    *,
    layers: Indices = None,
    tokens_per_document: Count = 4,
    special_tokens: bool = False,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Does the router prefer experts with large outputs?

    Args:
        model: any opened model with a tokenizer.
        corpus: documents; their domains are not used.
        layers: MoE layers (None: all).
        tokens_per_document: how many tokens of each document all experts run on.
        special_tokens: whether the tokenizer's special tokens may be among them.
        resamples: of documents, for the intervals.
        seed: of the sample, the resamples and the control.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims layer, expert, bound: ``rank_correlation`` within tokens, -1 ... 1, with its interval, beside
        ``_shuffled`` (scores in random order) and ``_pooled`` (over tokens and experts at once); per expert ``norm``
        and ``score`` over all sampled tokens, ``norm_chosen`` and ``weight_chosen`` where it was chosen, NaN if never.

    Raises:
        BadInput: no tokenizer, or a standing edit of what experts of these layers put out.
        UnknownName: a layer that is no MoE layer.
        UnsupportedModel: layers with different numbers of experts.
    """
    chosen, options = moe_layers(model, layers), Options(special_tokens, max_tokens, batch_tokens)
    experts = experts_of(model, chosen)
    sample, where = sample_inputs(model, corpus, chosen, per_document=tokens_per_document, options=options, seed=seed)
    parts = [_layer(model, layer, sample[layer], resamples, seed) for layer in chosen]
    values = {name: np.stack([one[name] for one in parts], axis=-1 if "interval" in name else 0) for name in parts[0]}
    values["tokens"] = np.array([len(sample[layer].documents) for layer in chosen])
    coords: dict[str, Any] = {
        "bound": ["low", "high"],
        "layer": np.array(chosen, dtype=np.int64),
        "expert": np.arange(experts),
    }
    how = {"tokens_per_document": tokens_per_document, "resamples": resamples, "seed": seed}
    return labelled(described(values, _VARIABLES), coords, analysis="norm_and_weight", provenance={**where, **how})


def _layer(model: MoEModel, layer: int, sample: Inputs, resamples: int, seed: int) -> dict[str, Any]:
    norms = torch.cat([outputs.norm(dim=-1) for outputs in every_expert(model, layer, sample.moe_in)])
    size, score = norms.cpu().double().numpy(), sample.scores.cpu().double().numpy()
    shuffled = np.random.default_rng([seed, layer]).permuted(score, axis=1)
    return {
        **_correlations(size, score, sample.documents, resamples, seed),
        "rank_correlation_shuffled": _mean_of_defined(stats.spearman(size, shuffled)),
        "norm": size.mean(axis=0),
        "score": score.mean(axis=0),
        **_where_chosen(_as_made(model, layer, sample, size), sample),
    }


def _as_made(model: MoEModel, layer: int, sample: Inputs, size: Float[np.ndarray, "T E"]) -> Float[np.ndarray, "T E"]:
    """Norms of the outputs that the model made: where weights act on inputs, not those of the inputs as they are."""
    if model.spec.moe(layer).weights_on == "output":
        return size
    made, experts = np.zeros_like(size), model.experts(layer)
    for token, expert in sample.chosen.nonzero().tolist():
        weighted = sample.moe_in[token] * sample.weights[token, expert].to(sample.moe_in.dtype)
        with torch.no_grad():
            output = experts(weighted[None], torch.tensor([[expert]], device=weighted.device))
        made[token, expert] = output.float().norm().item()
    return made


def _mean_of_defined(rho: Float[np.ndarray, " T"]) -> np.float64:
    """Over tokens whose correlation is defined, as the estimate's mean is."""
    there = rho[~np.isnan(rho)]
    return there.mean() if there.size else np.float64(np.nan)


def _correlations(
    size: Float[np.ndarray, "T E"], score: Float[np.ndarray, "T E"], documents: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    rho = stats.spearman(size, score)
    there = ~np.isnan(rho)
    sums, counts = (per_document(part.astype(float), documents) for part in (np.where(there, rho, 0.0), there))
    return {
        "rank_correlation": stats.ratio(sums.sum(), counts.sum()),
        "rank_correlation_interval": stats.bootstrap_ratio(sums, counts, resamples=resamples, seed=seed),
        "rank_correlation_pooled": stats.spearman(size.ravel(), score.ravel()),
    }


def _where_chosen(size: Float[np.ndarray, "T E"], sample: Inputs) -> dict[str, Any]:
    chosen, weights = sample.chosen.cpu().numpy(), sample.weights.cpu().double().numpy()
    count = chosen.sum(axis=0)
    return {
        "norm_chosen": stats.ratio((size * chosen).sum(axis=0), count),
        "weight_chosen": stats.ratio(weights.sum(axis=0), count),
    }


_LE = ("layer", "expert")
_VARIABLES: dict[str, Description] = {
    "rank_correlation": (
        ("layer",),
        "1",
        "mean over tokens of Spearman's rank correlation, within the token and over all experts, of output norm and "
        "router score, -1 ... 1; 0 if the router does not care",
    ),
    "rank_correlation_interval": (("bound", "layer"), "1", "95 % interval over documents: rank correlation"),
    "rank_correlation_shuffled": (("layer",), "1", "control: the same with scores in random order within each token"),
    "rank_correlation_pooled": (("layer",), "1", "over tokens and experts at once, which mixes in tokens' own norms"),
    "norm": (
        _LE,
        "1",
        "mean norm of the expert's output, of its input as it is, over all sampled tokens, chosen or not",
    ),
    "score": (_LE, "1", "mean router score of the expert over all sampled tokens; 1/E if all are alike"),
    "norm_chosen": (
        _LE,
        "1",
        "mean norm of its output as the model made it, over the tokens that chose it; NaN if none did",
    ),
    "weight_chosen": (_LE, "1", "mean combine weight over the tokens that chose it; NaN if none did"),
    "tokens": (("layer",), "tokens", "tokens sampled"),
}


def document_means(sums: Int[np.ndarray, "N L E"], counts: Int[np.ndarray, "N L E"]) -> Float[np.ndarray, "L E"]:
    """Mean over all tokens of what was kept in units of 2^-32; NaN where there is no token."""
    return stats.ratio(sums.sum(axis=0) / UNIT, counts.sum(axis=0))
