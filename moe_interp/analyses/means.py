"""Mean contributions of experts over a corpus: what a mean ablation puts in an expert's place.

The contribution of an expert to a token is what it adds to ``routed_out``: weight times output. Its mean is over the
tokens that chose it, so that the ablation removes what depends on the token and keeps what does not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from moe_interp.analyses.collect import Options, Pass
from moe_interp.analyses.inputs import moe_layers
from moe_interp.arguments import checked
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from moe_interp.model import MoEModel
from moe_interp.results import Variable, labelled
from moe_interp.run import Indices, Read, Run


@dataclass(frozen=True)
class MeanContributions(Mapping[tuple[int, int], Tensor]):
    """Mean contributions [D] by (layer, expert), of experts that some token chose.

    Attributes:
        dataset: dims layer, expert, d_model. ``mean``, NaN for an expert that no token chose; ``tokens`` (layer,
            expert), how many did.
    """

    dataset: xr.Dataset

    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        layer, expert = pair
        if layer not in self.dataset["layer"] or expert not in self.dataset["expert"]:
            raise BadInput(
                "no mean of that expert", expected=f"a layer of {self.dataset['layer'].values.tolist()}", got=str(pair)
            )
        if not int(self.dataset["tokens"].sel(layer=layer, expert=expert)):
            raise BadInput(
                f"no token chose expert {expert} of layer {layer}",
                expected="an expert that the corpus uses",
                got="no contribution to take the mean of",
                do="Take more documents, or another kind of ablation.",
            )
        return torch.from_numpy(self.dataset["mean"].sel(layer=layer, expert=expert).values.copy())

    def __contains__(self, pair: object) -> bool:
        return any(pair == one for one in self)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        used = self.dataset["tokens"].values.nonzero()
        layers, experts = (self.dataset[name].values for name in ("layer", "expert"))
        return ((int(layers[row]), int(experts[column])) for row, column in zip(*used, strict=True))

    def __len__(self) -> int:
        return int(np.count_nonzero(self.dataset["tokens"].values))


@checked
@torch.no_grad()
def mean_contributions(
    model: MoEModel, corpus: Corpus, *, layers: Indices = None, options: Options | None = None
) -> MeanContributions:
    """Mean contributions of all experts over the tokens of a corpus that choose them.

    Args:
        model: any opened model with a tokenizer.
        corpus: documents.
        layers: MoE layers (None: all).
        options: which tokens count.

    Raises:
        BadInput: no tokenizer.
        UnknownName: no such MoE layer.
    """
    chosen = moe_layers(model, layers)
    going = Pass(model, corpus, options)
    sums: dict[int, Tensor] = {}
    counts = {layer: torch.zeros(model.spec.num_experts, dtype=torch.long) for layer in chosen}
    for run, _ in going.runs([Read("expert_out", chosen)], "mean contributions"):
        for layer in chosen:
            _add(run, layer, sums, counts[layer])
    total = np.stack([sums[layer].cpu().numpy() for layer in chosen])
    tokens = np.stack([counts[layer].numpy() for layer in chosen])
    with np.errstate(invalid="ignore"):
        means = (total / tokens[..., None]).astype(np.float32)
    means[tokens == 0] = np.nan
    variables = {
        "mean": Variable(("layer", "expert", "d_model"), means, "1", "mean contribution over tokens that chose it"),
        "tokens": Variable(("layer", "expert"), tokens, "tokens", "tokens that chose the expert"),
    }
    coords = {"layer": np.array(chosen), "expert": np.arange(model.spec.num_experts)}
    return MeanContributions(labelled(variables, coords, analysis="mean_contributions", provenance=going.provenance))


def _add(run: Run, layer: int, sums: dict[int, Tensor], counts: Tensor) -> None:
    """Adds the contributions of a run, in double precision."""
    routing, outputs = run.routing[layer], run["expert_out", layer]
    real = routing.mask[..., None].expand_as(routing.ids)
    weights = routing.weights if routing.weighs_output else torch.ones_like(routing.weights)
    added = (outputs.double() * weights.double()[..., None])[real]
    ids = routing.ids[real]
    total = sums.setdefault(layer, torch.zeros(len(counts), added.shape[-1], dtype=torch.float64, device=added.device))
    total.index_add_(0, ids, added)
    counts += ids.bincount(minlength=len(counts)).cpu()
