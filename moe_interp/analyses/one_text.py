"""One forward pass over one text, and what its tokens' experts put out, in the order of their weights."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_interp.encode import Inputs, encode, token_text
from moe_interp.errors import BadInput
from moe_interp.model import MoEModel
from moe_interp.run import Read, Run


class At(NamedTuple):
    """The positions looked at.

    Attributes:
        numbers: [N], counted in real tokens.
        columns: [N], where they are in the padded text.
        only: whether the points were read at these positions only.
    """

    numbers: Tensor
    columns: Tensor
    only: bool

    def of(self, values: Tensor, only: bool = False) -> Tensor:
        """[N, ...] of [1, S, ...], or of [1, N, ...] if ``only`` these were read."""
        there = values[0].to(self.columns.device)
        return there if only else there[self.columns]


def run_text(
    model: MoEModel,
    text: Inputs,
    points: Sequence[str],
    layers: tuple[int, ...] | None,
    positions: tuple[int, ...] | None,
) -> tuple[Run, At]:
    """One forward pass over one text that reads ``points`` at the selected positions."""
    inputs = encode(text, model.tokenizer, model.spec, model.device)
    if "input_ids" not in inputs or len(inputs["input_ids"]) != 1:
        got = f"{len(inputs['input_ids'])} texts" if "input_ids" in inputs else ", ".join(inputs)
        raise BadInput("the lens looks at one text", expected="a text or its token ids", got=got)
    run = model.run(inputs, read=[Read(point, layers, positions) for point in points])
    columns = run.mask[0].nonzero().flatten() if positions is None else run.tokens.columns(positions)[0]
    return run, At(run.tokens.index[0, columns], columns, positions is not None)


def expert_terms(run: Run, layer: int, at: At) -> tuple[Float[Tensor, "N K D"], Float[Tensor, "N K D"]]:
    """Unweighted outputs and contributions, heaviest first, in float32."""
    _, weights, order = by_rank(run, layer, at)
    outputs = at.of(run["expert_out", layer], at.only).float()
    outputs = outputs.gather(1, order[..., None].expand_as(outputs))
    return outputs, outputs * weights[..., None]


def by_rank(run: Run, layer: int, at: At) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"], Int[Tensor, "N K"]]:
    """Expert ids, weights and slots, heaviest first."""
    routing = run.routing[layer]
    order = at.of(routing.by_rank())
    return at.of(routing.ids).gather(1, order), at.of(routing.weights).gather(1, order).float(), order


def next_ids(run: Run) -> Int[Tensor, " S"]:
    """The true next token of every real token, -1 for the last."""
    real = run.token_ids[0][run.mask[0]]  # type: ignore[index]
    return torch.cat([real[1:], real.new_tensor([-1])])


def token_texts(model: MoEModel, ids: Tensor) -> np.ndarray:
    """Readable strings of token ids, in their shape; the id itself where nothing decodes it."""
    unique, inverse = np.unique(ids.cpu().numpy(), return_inverse=True)
    return np.array([token_text(model.tokenizer, int(token)) for token in unique])[inverse.reshape(ids.shape)]
