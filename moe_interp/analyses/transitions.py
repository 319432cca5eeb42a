"""From layer to layer: which experts follow which, and how much one layer's choice says of the next.

1. `TransitionCounts` counts e -> e' over all K x K slots of every token, between consecutive MoE layers; and the same
   with the second layer's choices shuffled over the tokens of the document.
2. The shuffled table has the same margins in every document and the same number of pairs, so its mutual information has
   the bias of the plug-in estimate and whatever the topic of a document explains; `gain` is what is left for the token.
3. Tables are kept for blocks of documents, and intervals come from leaving out blocks.

Permutations depend on the seed, the document and the layer alone, so that batches and order change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int, Num
from torch import Tensor

import moe_interp.stats as stats
from moe_interp.analyses.coactivation import BLOCKS
from moe_interp.analyses.collect import Options, collect, sizes
from moe_interp.analyses.exact import Exact, Provenance, blocks_of, flat_counts, of_each, told_top_k
from moe_interp.arguments import Count, Parts, Seed, checked
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled
from moe_interp.run import Run


@dataclass
class TransitionCounts(Exact):
    """How often expert e of a layer is followed by expert e' of the next, by blocks of documents.

    Holds 16 Z (L - 1) E^2 bytes: 34 MB for 20 blocks, 27 layers and 64 experts, 1.2 GB for 58 layers and 256.

    Attributes:
        layers: [L], MoE layer indices.
        top_k: [L], K.
        seed: of the shuffles.
        flows: [Z, L - 1, E, E], token-slots of each block of documents (`blocks_of`).
        shuffled: [Z, L - 1, E, E], the same with the second layer's choices shuffled within the document.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    layers: tuple[int, ...]
    top_k: tuple[int, ...]
    seed: int
    flows: Int[np.ndarray, "Z M E E"]
    shuffled: Int[np.ndarray, "Z M E E"]

    @classmethod
    def empty(
        cls, layers: Sequence[int], experts: int, top_k: int | Sequence[int], *, blocks: int = BLOCKS, seed: int = 0
    ) -> "TransitionCounts":
        """Nothing counted yet; ``top_k`` is one for all layers, or one for each.

        Raises:
            BadInput: fewer than two layers.
        """
        if len(layers) < 2:
            raise BadInput("no transitions", expected="two MoE layers or more", got=str(list(layers)))
        size = (blocks, len(layers) - 1, experts, experts)
        return cls(tuple(layers), of_each(top_k, layers), seed, np.zeros(size, np.int64), np.zeros(size, np.int64))

    def update(self, run: Run, documents: Int[np.ndarray, " B"]) -> None:
        """Adds a run; row b belongs to document ``documents[b]``, which it holds whole."""
        blocks = blocks_of(documents, len(self.flows)).tolist()
        for row, (document, block) in enumerate(zip(documents.tolist(), blocks, strict=True)):
            for index, pair in enumerate(pairwise(self.layers)):
                before, after = self._ids(run, pair, row)
                order = np.random.default_rng([self.seed, document, index]).permutation(len(after))
                self.flows[block, index] += self._table(before, after)
                self.shuffled[block, index] += self._table(before, after[torch.from_numpy(order)])

    def _ids(self, run: Run, layers: tuple[int, int], row: int) -> tuple[Int[Tensor, "T K1"], Int[Tensor, "T K2"]]:
        """Of the tokens that experts of both layers take."""
        first, second = (run.routing[layer] for layer in layers)
        both = (first.mask & second.mask)[row].cpu()
        return first.ids[row].cpu()[both], second.ids[row].cpu()[both]

    def _table(self, before: Int[Tensor, "T K1"], after: Int[Tensor, "T K2"]) -> Int[np.ndarray, "E E"]:
        experts = self.flows.shape[-1]
        index = before[:, :, None] * experts + after[:, None, :]
        return flat_counts(index, experts**2).reshape(experts, experts)

    def result(self, *, provenance: Provenance) -> xr.Dataset:
        """The Dataset that `transitions` gives."""
        flows, shuffled = self.flows.sum(axis=0), self.shuffled.sum(axis=0)
        gain, interval = stats.block_jackknife(_gain, np.stack([self.flows, self.shuffled], axis=1), debias=False)
        rows, columns = flows.sum(axis=-1), flows.sum(axis=-2)
        values = {
            "next_layer": np.array(self.layers[1:], dtype=np.int64),
            "flows": flows,
            "flow": stats.ratio(flows, rows),
            "flow_shuffled": stats.ratio(shuffled, shuffled.sum(axis=-1)),
            "flow_independent": stats.ratio(columns, columns.sum(axis=-1)),
            "lift": stats.lift(flows, rows, columns, rows.sum(axis=-1)),
            "mutual_information": stats.mutual_information(flows),
            "mutual_information_shuffled": stats.mutual_information(shuffled),
            "gain": gain,
            "gain_interval": interval,
        }
        variables = described(values, _VARIABLES)
        coords: dict[str, Any] = {
            "bound": ["low", "high"],
            "layer": np.array(self.layers[:-1], dtype=np.int64),
            "expert": np.arange(flows.shape[-1]),
            "next_expert": np.arange(flows.shape[-1]),
        }
        tokens = int(flows[0].sum()) // (self.top_k[0] * self.top_k[1])
        how = {"tokens": tokens, "top_k": told_top_k(self.top_k), "blocks": len(self.flows)}
        about = {**provenance, **how, "seed": self.seed}
        return labelled(variables, coords, analysis="transitions", provenance=about)


def _gain(tables: Num[np.ndarray, "two M E E"]) -> np.ndarray:
    real, shuffled = stats.mutual_information(tables)
    return np.asarray(real - shuffled)


_LEN = ("layer", "expert", "next_expert")
_VARIABLES: dict[str, Description] = {
    "next_layer": (("layer",), "layer", "the MoE layer that follows"),
    "flows": (_LEN, "token-slots", "slot pairs of tokens with the expert here and the other in the next MoE layer"),
    "flow": (_LEN, "1", "share of the expert's flow that goes to the other, 0 ... 1/K of the next layer"),
    "flow_shuffled": (_LEN, "1", "flow with the next layer's choices shuffled over the tokens of each document"),
    "flow_independent": (("layer", "next_expert"), "1", "flow if layers were independent: the next layer's load"),
    "lift": (_LEN, "1", "flow over that of independent layers, 0 ...; 1 under independence"),
    "mutual_information": (("layer",), "nats", "mutual information of the two layers' experts, 0 ... ln E"),
    "mutual_information_shuffled": (
        ("layer",),
        "nats",
        "the same with the next layer's choices shuffled over the tokens of each document: bias and topic",
    ),
    "gain": (
        ("layer",),
        "nats",
        "mutual information above the shuffle's, which has the same bias; 0 under the null",
    ),
    "gain_interval": (("bound", "layer"), "nats", "95 % interval over blocks of documents: gain"),
}


@checked
def transitions(
    model: MoEModel,
    corpus: Corpus,
    *,
    blocks: Parts = BLOCKS,
    special_tokens: bool = False,
    seed: Seed = 0,
    max_tokens: Count | None = None,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """Which experts a token goes to from one MoE layer to the next, and what a layer's choice says of the next one's.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents; their domains are not used.
        blocks: of documents, for the intervals; memory grows with them.
        special_tokens: whether the tokenizer's special tokens count.
        seed: of the shuffles.
        max_tokens, batch_tokens: as `moe_interp.data.batches` has them.

    Returns:
        Dims layer (the first of each pair), expert, next_expert, bound: ``flows``, ``flow`` beside ``flow_shuffled``
        and ``flow_independent``, ``lift``, ``mutual_information`` beside ``_shuffled``, ``gain`` with its interval.

    Raises:
        BadInput: no tokenizer, or a single MoE layer.
        UnsupportedModel: layers with different numbers of experts.
    """
    sums = TransitionCounts.empty(*sizes(model), blocks=blocks, seed=seed)
    where = collect(model, corpus, {"transitions": sums}, Options(special_tokens, max_tokens, batch_tokens))
    return sums.result(provenance=where)
