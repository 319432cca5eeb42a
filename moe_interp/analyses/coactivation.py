"""Which experts are chosen together: co-activation, lift and nPMI of every pair, with what load alone would give.

1. `PairCounts` counts, for every MoE layer, the tokens that chose both experts of a pair: all K (K - 1) / 2 slot pairs
   of a token. OLMoE's released script counts only pairs adjacent in rank, 7 of 28 for K = 8: `as_coded`.
2. From N_ij, N_i and the T tokens: the co-activation N_ij / N_i (Muennighoff et al. 2024, arXiv 2409.02060, section
   5.2), lift N_ij T / (N_i N_j) and nPMI.
3. Controls: lift under a router that draws K of E equal experts, (K - 1) E / (K (E - 1)); and under draws of K distinct
   experts with the layer's own loads and nothing else (`stats.draws`), which is below 1 for busy experts. Loads are
   those of the whole corpus: experts that share a topic go together by it, too.
4. A table per document would be too large: tables are kept for blocks of documents, and intervals come from leaving
   out blocks. p: the blocks' excess over the null of own loads with signs flipped, adjusted for the pairs of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

import moe_interp.stats as stats
from moe_interp.analyses.collect import Options, collect, sizes
from moe_interp.analyses.exact import Exact, Provenance, blocks_of, flat_counts, of_each, one_or_each, told_top_k
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.data import Corpus
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled
from moe_interp.run import Routing, Run

BLOCKS = 20


@dataclass
class PairCounts(Exact):
    """How often two experts are chosen for the same token, by blocks of documents.

    Holds 8 (Z + 1) L E^2 bytes: 19 MB for 20 blocks, 27 layers and 64 experts, 639 MB for 58 layers and 256.

    Attributes:
        layers: [L], MoE layer indices.
        top_k: [L], K.
        tokens: [Z], real tokens of each block of documents (`blocks_of`).
        pairs: [Z, L, E, E], tokens that chose both; on the diagonal those that chose the one.
        adjacent: [L, E, E], tokens in which the two were neighbours by weight.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    layers: tuple[int, ...]
    top_k: tuple[int, ...]
    tokens: Int[np.ndarray, " Z"]
    pairs: Int[np.ndarray, "Z L E E"]
    adjacent: Int[np.ndarray, "L E E"]

    @classmethod
    def empty(
        cls, layers: Sequence[int], experts: int, top_k: int | Sequence[int], *, blocks: int = BLOCKS
    ) -> "PairCounts":
        """Nothing counted yet; ``top_k`` is one for all layers, or one for each."""
        square = (len(layers), experts, experts)
        shapes = (blocks,), (blocks, *square), square
        return cls(tuple(layers), of_each(top_k, layers), *(np.zeros(shape, np.int64) for shape in shapes))

    def update(self, run: Run, documents: Int[np.ndarray, " B"]) -> None:
        """Adds a run; row b belongs to document ``documents[b]``."""
        blocks = torch.from_numpy(blocks_of(documents, len(self.tokens)))
        np.add.at(self.tokens, blocks.numpy(), run.mask.sum(dim=1).cpu().numpy())
        for index, layer in enumerate(self.layers):
            block, ids = _kept(run.routing[layer], blocks)
            self.pairs[:, index] += self._table(ids[:, :, None], ids[:, None, :], block)
            steps = self._table(ids[:, :-1, None], ids[:, 1:, None], torch.zeros_like(block))[0]
            self.adjacent[index] += steps + steps.T

    def _table(self, left: Int[Tensor, "T a b"], right: Int[Tensor, "T c d"], block: Int[Tensor, " T"]) -> np.ndarray:
        size = len(self.tokens), self.pairs.shape[-1], self.pairs.shape[-1]
        index = (block[:, None, None] * size[1] + left) * size[2] + right
        return flat_counts(index, size[0] * size[1] * size[2]).reshape(size)

    def result(self, *, provenance: Provenance, resamples: int = 1000, seed: int = 0) -> xr.Dataset:
        """The Dataset that `coactivation` gives."""
        parts = [self._layer(index, resamples, seed) for index in range(len(self.layers))]
        values = {name: np.stack([part[name] for part in parts], axis=_layer_axis(name)) for name in parts[0]}
        experts = self.pairs.shape[-1]
        values |= uniform(self.top_k, experts)
        variables = described(values, _VARIABLES)
        coords: dict[str, Any] = {
            "bound": ["low", "high"],
            "layer": np.array(self.layers, dtype=np.int64),
            "expert": np.arange(experts),
            "other": np.arange(experts),
        }
        how = {"tokens": int(self.tokens.sum()), "top_k": told_top_k(self.top_k), "blocks": len(self.tokens)}
        about = {**provenance, **how, "resamples": resamples, "seed": seed}
        return labelled(variables, coords, analysis="coactivation", provenance=about)

    def _layer(self, index: int, resamples: int, seed: int) -> dict[str, np.ndarray]:
        """Every value of one layer."""
        blocks, top_k = self.pairs[:, index], self.top_k[index]
        total = blocks.sum(axis=0)
        chosen = total.diagonal()
        own = blocks.diagonal(axis1=1, axis2=2).sum(axis=1) / top_k  # tokens that take experts
        tokens = own.sum()
        null = _null_of_loads(chosen / max(tokens, 1), top_k)
        lift = _lift(total)
        upper = np.triu_indices(len(total), 1)
        excess = (blocks - own[:, None, None] * null)[:, *upper]
        p = np.full_like(null, np.nan)
        p[upper] = p.T[upper] = stats.sign_flip_max(excess, flips=resamples, seed=seed)
        _, interval = stats.block_jackknife(_lift, blocks)
        return {
            "pairs": total,
            "coactivation": off_diagonal(stats.ratio(total, chosen)),
            "coactivation_as_coded": off_diagonal(stats.ratio(self.adjacent[index], chosen)),
            "lift": lift,
            "lift_interval": interval,
            "lift_load": off_diagonal(stats.lift(null * tokens, chosen, chosen, tokens)),
            "lift_p": p,
            "npmi": stats.npmi(lift, total / max(tokens, 1)),
        }


def uniform(top_k: Sequence[int], experts: int) -> dict[str, np.ndarray]:
    """Lift and co-activation under a router that draws K of E equal experts; by layer where K is not the same.

    NaN for a single expert, which has no other.
    """
    chosen = np.array(top_k)
    together = (chosen - 1) / (experts - 1) if experts > 1 else np.full(len(chosen), np.nan)
    return {
        "lift_uniform": one_or_each(together * experts / chosen),
        "coactivation_uniform": one_or_each(together),
    }


def _layer_axis(name: str) -> int:
    return 1 if name.endswith("_interval") else 0


def _kept(routing: Routing, blocks: Int[Tensor, " B"]) -> tuple[Int[Tensor, " T"], Int[Tensor, "T K"]]:
    """Block and experts, heaviest first, of every real token."""
    mask = routing.mask.cpu()
    ids = routing.ids.cpu().gather(2, routing.by_rank().cpu())
    return blocks[:, None].expand_as(mask)[mask], ids[mask]


def _lift(pairs: Int[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    chosen = pairs.diagonal()
    # Every token chose K, so that T follows from the diagonal and a block's own T is left out with it.
    top_k = pairs.sum() / max(chosen.sum(), 1)
    return off_diagonal(stats.lift(pairs, chosen, chosen, chosen.sum() / top_k if top_k else np.array(0.0)))


def _null_of_loads(inclusion: Float[np.ndarray, " E"], top_k: int) -> Float[np.ndarray, "E E"]:
    if not inclusion.any():
        return np.full((len(inclusion), len(inclusion)), np.nan)
    sure = inclusion == 1  # is there whoever else is drawn: the others draw what is left, and nothing is rounded
    pairs = np.outer(inclusion, inclusion)
    left = top_k - int(sure.sum())
    pairs[np.ix_(~sure, ~sure)] = stats.pair_inclusion(stats.inclusion_weights(inclusion[~sure]), left)
    return pairs


def off_diagonal(table: Float[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """The table with NaN for an expert and itself."""
    found = table.astype(float)
    np.fill_diagonal(found, np.nan)
    return found


_LEO = ("layer", "expert", "other")
_VARIABLES: dict[str, Description] = {
    "pairs": (_LEO, "tokens", "tokens that chose both experts; on the diagonal those that chose the one"),
    "coactivation": (_LEO, "1", "share of the expert's tokens that chose the other too, 0 ... 1"),
    "coactivation_uniform": (("layer?",), "1", "co-activation under a uniform router, (K - 1) / (E - 1)"),
    "coactivation_as_coded": (_LEO, "1", "the same from pairs adjacent in rank alone, as OLMoE's script has it"),
    "lift": (_LEO, "1", "how many times as often both are chosen as if they were independent, 0 ..."),
    "lift_interval": (("bound", *_LEO), "1", "95 % interval over blocks of documents, bias removed: lift"),
    "lift_uniform": (("layer?",), "1", "lift under a uniform router, (K - 1) E / (K (E - 1))"),
    "lift_load": (_LEO, "1", "lift under draws of K distinct experts by the layer's own loads and nothing else"),
    "lift_p": (
        _LEO,
        "1",
        "p that the two go together no more often than their loads over the corpus make them: signs of blocks of "
        "documents flipped, one-sided, adjusted for the pairs of the layer by the maximum statistic",
    ),
    "npmi": (_LEO, "1", "normalised pointwise mutual information, -1 (never together) ... 1 (always)"),
}


@checked
def coactivation(
    model: MoEModel,
    corpus: Corpus,
    *,
    blocks: int = BLOCKS,
    special_tokens: bool = False,
    resamples: Draws = 1000,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Which experts of a layer are chosen together.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents; their domains are not used.
        blocks: of documents, for the intervals; memory grows with them.
        special_tokens: whether the tokenizer's special tokens count.
        resamples: sign flips for the test.
        seed: of these.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims layer, expert, other, bound: ``pairs``, ``coactivation`` (``_as_coded``, ``_uniform``), ``lift`` with
        ``lift_interval``, ``lift_uniform``, ``lift_load``, ``lift_p``, and ``npmi``. NaN for an expert and itself, and
        where an expert is never chosen.

    Raises:
        BadInput: the model has no tokenizer.
        UnsupportedModel: layers with different numbers of experts.
    """
    sums = PairCounts.empty(*sizes(model), blocks=blocks)
    where = collect(model, corpus, {"pairs": sums}, Options(special_tokens, max_tokens, batch_tokens))
    return sums.result(provenance=where, resamples=resamples, seed=seed)
