"""Super experts: the few whose outputs hold the largest values, and what the model is without them.

1. The largest absolute value of each expert's output (what its down-projection returns) over all tokens that chose it.
2. A super expert is above the 99.5th percentile of all experts of all layers *and* above a tenth of the largest, in the
   first three quarters of the layers (Su et al. 2025, arXiv 2507.23279).
3. Each is removed alone (its contribution set to zero): the ratio of perplexities, on the same documents. The control
   removes, at the same layer, the expert that is no super expert and is chosen most nearly as often.
"""

from typing import Annotated, Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

import moe_interp.stats as stats
from moe_interp.analyses.collect import Options, Pass
from moe_interp.analyses.norms import OutputSums, collect_outputs, document_means
from moe_interp.analyses.perplexity import nll_sums
from moe_interp.arguments import Count, Draws, Fraction, Range, Seed, checked
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from moe_interp.interventions import Intervention, ablate
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled


@checked
def super_experts(
    model: MoEModel,
    corpus: Corpus,
    *,
    most: Count = 8,
    percentile: Annotated[float, Range(0, 100)] = 99.5,
    share_of_largest: Fraction = 0.1,
    special_tokens: bool = True,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Which experts' outputs hold the largest values, how large all are, and what removing the largest costs.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents; their domains are not used.
        most: at most so many super experts are removed, the largest first.
        percentile, share_of_largest: the two thresholds.
        special_tokens: whether special tokens count; they do, for the largest values are often at the first token.
        resamples: of documents, for the intervals.
        seed: of these.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims layer, expert: ``largest``, ``super`` (1 or 0), ``norm`` and ``contribution`` (mean weight times norm,
        REAP's saliency) over the tokens that chose it, ``tokens``. Dims rank, bound, for the super experts that were
        removed (none may be): ``super_layer``, ``super_expert``, ``ratio`` of the perplexity without it with
        ``ratio_interval``, and the same with ``control_``. ``threshold``, above which ``largest`` must be.

    Raises:
        BadInput: no tokenizer, or nothing to score.
    """
    options = Options(special_tokens, max_tokens, batch_tokens)
    sums, where = collect_outputs(model, corpus, options)
    flags, threshold = super_flags(
        sums.largest, model.layers, len(model.spec.main_layers), percentile, share_of_largest
    )
    found = np.argwhere(flags)
    ranked = found[np.argsort(-sums.largest[flags], kind="stable")][:most]
    chosen = sums.counts.sum(axis=0)
    controls = np.array(
        [_alike(chosen[layer], flags[layer], expert) for layer, expert in ranked.tolist()], dtype=np.int64
    )
    values = (
        _removed(model, corpus, options, ranked, controls, resamples, seed)
        | _sizes(sums)
        | {
            "super": flags.astype(np.int8),
            "threshold": np.array(threshold),
        }
    )
    coords: dict[str, Any] = {
        "bound": ["low", "high"],
        "layer": np.array(model.layers, dtype=np.int64),
        "expert": np.arange(model.spec.num_experts),
        "rank": np.arange(1, len(ranked) + 1),
    }
    how = {"most": most, "percentile": percentile, "share_of_largest": share_of_largest}
    how |= {"resamples": resamples, "seed": seed}
    return labelled(described(values, _VARIABLES), coords, analysis="super_experts", provenance={**where, **how})


def super_flags(
    largest: Float[np.ndarray, "L E"], layers: tuple[int, ...], num_layers: int, percentile: float, share: float
) -> tuple[Bool[np.ndarray, "L E"], float]:
    """Which experts are super experts, and the value that they exceed."""
    threshold = max(float(np.percentile(largest, percentile)), share * float(largest.max()))
    early = np.array(layers) < 0.75 * num_layers
    return (largest > threshold) & early[:, None], threshold


def _alike(chosen: Int[np.ndarray, " E"], flags: Bool[np.ndarray, " E"], expert: int) -> int:
    """The other expert that is chosen most nearly as often, no super expert where there is another."""
    distance = np.abs(chosen - chosen[expert]).astype(float)
    distance[flags] += chosen.sum() + 1.0  # more than any difference
    distance[expert] = np.inf
    return int(distance.argmin())


def _sizes(sums: OutputSums) -> dict[str, Any]:
    return {
        "largest": sums.largest,
        "norm": document_means(sums.norms, sums.counts),
        "contribution": document_means(sums.contributions, sums.counts),
        "tokens": sums.counts.sum(axis=0),
    }


def _removed(
    model: MoEModel,
    corpus: Corpus,
    options: Options,
    ranked: Int[np.ndarray, "R two"],
    controls: Int[np.ndarray, " R"],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Ratios of perplexity without each super expert, and without its control."""
    layers = [model.layers[place] for place in ranked[:, 0]]
    experts = [[int(expert) for expert in ranked[:, 1]], [int(expert) for expert in controls]]
    edits: list[Intervention] = [
        ablate(layer=layer, expert=expert) for some in experts for layer, expert in zip(layers, some, strict=True)
    ]
    ratio, interval = perplexity_ratios(model, corpus, options, edits, resamples, seed)
    half = len(layers)
    return {
        "super_layer": np.array(layers, dtype=np.int64),
        "super_expert": np.array(experts[0], dtype=np.int64),
        "control_expert": np.array(experts[1], dtype=np.int64),
        "ratio": ratio[:half],
        "ratio_interval": interval[:, :half],
        "control_ratio": ratio[half:],
        "control_ratio_interval": interval[:, half:],
    }


def perplexity_ratios(
    model: MoEModel, corpus: Corpus, options: Options, edits: list[Intervention], resamples: int, seed: int
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, "2 M"]]:
    """Perplexity under each edit over that of the model, and 95 % intervals over documents.

    Raises:
        BadInput: no document has two tokens.
    """
    if not edits:
        return np.zeros(0), np.zeros((2, 0))
    difference, tokens = _nll_differences(model, corpus, options, edits)
    interval = stats.bootstrap_ratio(difference.T, tokens, resamples=resamples, seed=seed)
    return np.exp(difference.sum(axis=1) / tokens.sum()), np.exp(interval)


def _nll_differences(
    model: MoEModel, corpus: Corpus, options: Options, edits: list[Intervention]
) -> tuple[Float[np.ndarray, "M N"], Int[np.ndarray, " N"]]:
    """Nats that each edit adds to each document, and the tokens scored; a document's first token is not."""
    work = Pass(model, corpus, options).batches
    found, tokens = np.zeros((len(edits), len(corpus))), np.zeros(len(corpus), np.int64)
    with tqdm(total=len(corpus) * len(edits), desc="without an expert", unit="document") as progress:
        for batch in work:
            ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
            tokens[batch.documents] = mask.sum(dim=1).numpy() - 1
            plain = nll_sums(model.run(batch.inputs).logits, ids, mask)
            for number, edit in enumerate(edits):
                edited = nll_sums(model.run(batch.inputs, edit=edit).logits, ids, mask)
                found[number, batch.documents] = edited - plain
                progress.update(len(batch.documents))
    if not tokens.any():
        raise BadInput("nothing to score", expected="a document of two or more tokens", got="none")
    return found, tokens


_LE, _R = ("layer", "expert"), ("rank",)
_REMOVED = "perplexity of the model without it over that of the whole model, 1 if it does nothing"
_VARIABLES: dict[str, Description] = {
    "largest": (_LE, "1", "largest absolute value in any output of the expert"),
    "super": (_LE, "1", "1 for a super expert"),
    "threshold": ((), "1", "what the largest value of a super expert exceeds"),
    "norm": (_LE, "1", "mean norm of the expert's output over the tokens that chose it"),
    "contribution": (_LE, "1", "mean of weight times norm over the tokens that chose it (REAP's saliency)"),
    "tokens": (_LE, "tokens", "tokens that chose it"),
    "super_layer": (_R, "layer", "layer of the super expert, largest value first"),
    "super_expert": (_R, "expert", "the super expert"),
    "ratio": (_R, "1", _REMOVED),
    "ratio_interval": (("bound", "rank"), "1", f"95 % interval over documents: {_REMOVED}"),
    "control_expert": (_R, "expert", "the expert of the layer, no super expert, that is chosen most nearly as often"),
    "control_ratio": (_R, "1", f"of the control: {_REMOVED}"),
    "control_ratio_interval": (("bound", "rank"), "1", f"95 % interval over documents, of the control: {_REMOVED}"),
}
