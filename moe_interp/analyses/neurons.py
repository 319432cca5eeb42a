"""The neurons of an expert through the lens: which tokens the column of each neuron writes.

Neuron f adds its activation times column f of the down-projection to the residual. Decoded by the model's own final
norm and unembedding (Geva et al. 2022, arXiv 2203.14680, for dense layers) the column says which tokens it raises,
and its negative which it lowers. Every direction raises some token most: `z_null` is how far the first token of a
random direction stands out, and a neuron says something as far as its own ``z`` is above that.
"""

from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from moe_interp.analyses.decoding import check_top
from moe_interp.analyses.distributions import check_logits
from moe_interp.analyses.one_text import token_texts
from moe_interp.analyses.plain import check_plain, check_writes_text
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.measured import values_told
from moe_interp.model import MoEModel
from moe_interp.results import Description, described, labelled

_CHUNK = 256


@checked
@torch.no_grad()
def neuron_lens(
    model: MoEModel, layer: int, expert: int, *, top: Count = 5, null_directions: Draws = 1000, seed: Seed = 0
) -> xr.Dataset:
    """Which tokens every neuron of one expert raises and lowers.

    Args:
        model: any opened model; without a tokenizer tokens are shown by their ids.
        layer: an MoE layer.
        expert: one of its experts.
        top: how many tokens of each sign.
        null_directions: random directions of the control.
        seed: of these.

    Returns:
        Dims neuron, sign ("raises", "lowers"), top: ``token_id``, ``token``, ``logit`` (of the decoded column or its
        negative, of no absolute meaning). Dims neuron, sign: ``z``, how many standard deviations the first token's
        logit is above the mean over the vocabulary; ``z_p``, the share of random directions with one as large.
        ``z_null``: mean and 95th percentile of random directions (dim null: "mean", "q95"). ``norm`` of the column.

    Raises:
        UnknownName: no such layer or expert.
        BadInput: ``top`` out of range.
        UnsupportedModel: a layer that does something to the outputs of experts before it adds them.
    """
    check_top(top, model.spec.vocab_size)
    check_writes_text(model)
    check_plain(model, [layer])
    down = model.weights(layer, expert).down.T
    draw = torch.Generator().manual_seed(seed)
    random = torch.randn(null_directions, model.spec.d_model, generator=draw).to(down)
    null = np.sort(_decoded(model, random, 1)["z"].numpy())
    signs = [_decoded(model, sign * down, top) for sign in (1, -1)]
    found = {name: torch.stack([one[name] for one in signs], dim=1) for name in signs[0]}
    z = found["z"].numpy()
    values = {
        "token_id": found["ids"].numpy(),
        "token": token_texts(model, found["ids"]),
        "logit": found["logits"].numpy(),
        "z": z,
        "z_p": np.where(np.isnan(z), np.nan, (1 + len(null) - np.searchsorted(null, z)) / (1 + len(null))),
        "z_null": np.array([null.mean(), np.quantile(null, 0.95)]),
        "norm": down.float().norm(dim=1).cpu().numpy(),
    }
    coords: dict[str, Any] = {
        "neuron": np.arange(len(down)),
        "sign": ["raises", "lowers"],
        "top": np.arange(1, top + 1),
        "null": ["mean", "q95"],
    }
    where = {"layer": layer, "expert": expert, "top": top, "null_directions": null_directions, "seed": seed}
    about = {**model.provenance(), **where, "expert_weights": values_told(down)}
    return labelled(described(values, _VARIABLES), coords, analysis="neuron_lens", provenance=about)


def _decoded(model: MoEModel, rows: Float[Tensor, "F D"], top: int) -> dict[str, Tensor]:
    """First tokens of each row, their logits, and how far the first stands out."""
    parts = []
    for some in rows.split(_CHUNK):
        logits = model.decode(some.to(model.device)).float().cpu()
        check_logits(logits)
        best = logits.topk(top, dim=-1)
        finite = logits[:, logits.isfinite().any(dim=0)]  # without tokens that cannot come, which pad a vocabulary
        z = (best.values[:, 0] - finite.mean(dim=-1)) / finite.std(dim=-1)
        parts.append({"ids": best.indices, "logits": best.values, "z": z})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


_FST, _FS = ("neuron", "sign", "top"), ("neuron", "sign")
_VARIABLES: dict[str, Description] = {
    "token_id": (_FST, "token id", "tokens that the neuron's column, or its negative, raises most"),
    "token": (_FST, "text", "tokens that the neuron's column, or its negative, raises most"),
    "logit": (_FST, "logits", "their logits when the column is decoded alone"),
    "z": (
        _FS,
        "1",
        "standard deviations of the first token's logit above the mean over the vocabulary, where logits are finite",
    ),
    "z_p": (_FS, "1", "share of random directions whose first token stands out as much; not adjusted for the neurons"),
    "z_null": (("null",), "1", "z of random directions: mean and 95th percentile"),
    "norm": (("neuron",), "1", "norm of the neuron's column"),
}
