"""The routing map: for one text, tokens x layers, the heaviest expert and its share of the weight."""

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from torch import Tensor

from moe_interp.arguments import checked
from moe_interp.encode import Inputs, token_text
from moe_interp.errors import BadInput
from moe_interp.measured import inputs_told
from moe_interp.model import MoEModel
from moe_interp.results import Variable, labelled
from moe_interp.run import Routing, Run


@checked
def routing_map(model: MoEModel, text: Inputs) -> xr.Dataset:
    """Which expert weighs most, for every token and MoE layer of one text.

    Args:
        text: one text or its token ids; or a mapping of one input, for a model without tokens, whose positions take
            their place.

    Returns:
        Dims pos, layer: ``heaviest_expert``; ``heaviest_share`` of the token's combine weight, 1/K ... 1; -1 and NaN
        where the token skips all experts; ``token``, the text of each token (empty where there are positions and no
        tokens).

    Raises:
        BadInput: an empty text, one over the context length, text for a model without a tokenizer, more than one text
            or input, or layers that see different positions.
    """
    run = model.run(text, output=False)
    kept = _positions(run, model)
    experts, shares = zip(*(_heaviest(run.routing[layer], kept) for layer in model.layers), strict=True)
    dims = ("pos", "layer")
    variables = {
        "token": Variable(("pos",), _tokens(run, model, kept), "text", "text of the token, empty where there is none"),
        "heaviest_expert": Variable(
            dims, np.stack(experts, 1), "expert", "expert with the largest combine weight; -1: none"
        ),
        "heaviest_share": Variable(
            dims, np.stack(shares, 1), "1", "its share of the combine weight, 1/K ... 1; NaN: none"
        ),
    }
    coords = {"pos": np.arange(int(kept.sum())), "layer": np.array(model.layers, dtype=np.int64)}
    return labelled(variables, coords, analysis="routing_map", provenance=model.provenance() | inputs_told(inputs=text))


def _positions(run: Run, model: MoEModel) -> Bool[Tensor, " S"]:
    """Which positions of the one text are real."""
    shapes = {tuple(run.routing[layer].mask.shape) for layer in model.layers}
    if len(run.mask) != 1 or shapes != {tuple(run.mask.shape)}:
        raise BadInput(
            "no map of this",
            expected="one text or input, of which all layers see the same positions",
            got=f"{len(run.mask)} inputs, and layers that see {sorted(shapes)} inputs x positions",
            do="Give one: a text, or a mapping of inputs whose batch is 1.",
        )
    return run.mask[0].cpu()


def _tokens(run: Run, model: MoEModel, kept: Bool[Tensor, " S"]) -> list[str]:
    if run.token_ids is None:
        return [""] * int(kept.sum())
    return [token_text(model.tokenizer, token) for token in run.token_ids[0].cpu()[kept].tolist()]


def _heaviest(routing: Routing, kept: Bool[Tensor, " S"]) -> tuple[np.ndarray, np.ndarray]:
    weights, ids = routing.weights[0].cpu()[kept].double(), routing.ids[0].cpu()[kept]
    largest, slot = weights.max(dim=1)
    expert = ids.gather(1, slot[:, None])[:, 0].where(routing.mask[0].cpu()[kept], -1)
    return expert.numpy(), (largest / weights.sum(dim=1)).where(expert >= 0, torch.nan).numpy()
