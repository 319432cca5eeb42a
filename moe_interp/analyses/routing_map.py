"""The routing map: for one text, tokens x layers, the heaviest expert and its share of the weight."""

import numpy as np
import xarray as xr
from jaxtyping import Bool
from torch import Tensor

from moe_interp.encode import token_text
from moe_interp.model import MoEModel
from moe_interp.results import Variable, labelled
from moe_interp.run import Routing


def routing_map(model: MoEModel, text: str) -> xr.Dataset:
    """Which expert weighs most, for every token and MoE layer of one text.

    Returns:
        Dims pos, layer: ``heaviest_expert``; ``heaviest_share`` of the token's combine weight, 1/K ... 1;
        ``token``, the text of each token.

    Raises:
        BadInput: an empty text, one over the context length, or a model without a tokenizer.
    """
    run = model.run(text, output=False)
    kept = run.mask[0].cpu()
    experts, shares = zip(*(_heaviest(run.routing[layer], kept) for layer in model.layers), strict=True)
    ids = [] if run.token_ids is None else run.token_ids[0].cpu()[kept].tolist()
    tokens = [token_text(model.tokenizer, token) for token in ids]
    dims = ("pos", "layer")
    variables = {
        "token": Variable(("pos",), tokens, "text", "text of the token"),
        "heaviest_expert": Variable(dims, np.stack(experts, 1), "expert", "expert with the largest combine weight"),
        "heaviest_share": Variable(dims, np.stack(shares, 1), "1", "its share of the combine weight, 1/K ... 1"),
    }
    coords = {"pos": np.arange(len(tokens)), "layer": np.array(model.layers, dtype=np.int64)}
    return labelled(variables, coords, analysis="routing_map", provenance=model.provenance())


def _heaviest(routing: Routing, kept: Bool[Tensor, " S"]) -> tuple[np.ndarray, np.ndarray]:
    weights, ids = routing.weights[0].cpu()[kept].double(), routing.ids[0].cpu()[kept]
    largest, slot = weights.max(dim=1)
    return ids.gather(1, slot[:, None])[:, 0].numpy(), (largest / weights.sum(dim=1)).numpy()
