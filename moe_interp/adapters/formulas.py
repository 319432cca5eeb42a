"""What follows from what, evaluated: the scores of a router, the output of a block, the sums of a layer.

Formulas of the data in `moe_interp.adapters.spec`, on the modules of a model and values of points.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_interp.adapters.spec import ModelSpec, MoESpec, Scores, Scoring
from moe_interp.adapters.sums import Join, follow
from moe_interp.errors import UnsupportedModel

_FUNCTIONS: dict[Scores, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: functional.softplus(logits).sqrt(),
}


def router_scores(scoring: Scoring, logits: Tensor) -> Tensor:
    """Scores [..., E] that weights come from, normalised to sum to 1 over experts, in float32."""
    scaled = logits.float() * scoring.scale
    if scoring.softcap is not None:
        scaled = scoring.softcap * (scaled / scoring.softcap).tanh()
    raw = _FUNCTIONS[scoring.function](scaled)
    return raw / raw.sum(dim=-1, keepdim=True)


def block_output(hf: nn.Module, moe: MoESpec, routed: Tensor, shared: Tensor | None) -> Tensor:
    """``moe_out`` from ``routed_out`` and, where the block adds them, ``shared_out``."""
    out = follow(hf, moe.routed_steps, routed)
    if shared is not None and moe.adds_shared:
        out = out + shared.to(out.dtype)
    return follow(hf, moe.whole_steps, out)


def joined(hf: nn.Module, join: Join, values: Callable[[str], Tensor]) -> Tensor:
    """The residual stream after a branch, from ``values(point)``."""
    branch = values(join.branches[0])
    for point in join.branches[1:]:
        branch = branch + values(point)
    return join.how(hf, values(join.base), branch)


def logits_of(spec: ModelSpec, unembedded: Tensor) -> Tensor:
    """Logits [..., V] from what the unembedding returns: the model's columns, scale and soft-cap."""
    logits = unembedded[..., : spec.logit_columns]
    logits = logits * spec.logit_scale if spec.logit_scale != 1.0 else logits
    cap = spec.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def output_of(spec: ModelSpec, returned: Any) -> Tensor:
    """What a forward pass gave: logits, or the last hidden states of a model without a head.

    Raises:
        UnsupportedModel: neither is in what it returned.
    """
    if isinstance(returned, Tensor):
        return returned
    name = "last_hidden_state" if spec.unembed is None else "logits"
    spans = [getattr(returned, f"{end}_logits", None) for end in ("start", "end")]
    if spec.head == "labels" and all(isinstance(one, Tensor) for one in spans):  # of answers in a text
        return torch.stack(spans, dim=-1)  # type: ignore[arg-type]
    if not hasattr(returned, name):
        raise UnsupportedModel(
            f"no output of {spec.model_type} to keep",
            expected=f"a forward that returns a tensor, or something with {name!r}",
            got=type(returned).__name__,
            do="Put the model into a module whose forward returns the tensor alone, and describe that.",
        )
    return getattr(returned, name)


def out_of_range(output: Tensor, mask: Tensor) -> str | None:
    """What a model's output [B, S, V] has at a real token that no output may have, in words; None if it is fine.

    Minus infinity is fine, as logits that pad a vocabulary are, but where it is alone. Padding may hold anything.
    """
    largest = output.detach().amax(dim=-1)
    return not_finite(largest[_seen(largest, output, mask)])


def not_finite(largest: Tensor) -> str | None:
    """What a row's largest value says is wrong with it: "NaN", "infinity", "minus infinity alone", or nothing."""
    if bool(largest.isfinite().all()):
        return None
    if bool(largest.isnan().any()):
        return "NaN"
    return "infinity" if bool(largest.isposinf().any()) else "minus infinity alone"


def watched(tell: Callable[[str], None]) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor for transformers' ``generate`` that calls ``tell`` at a step whose logits are out of range.

    ``tell`` is given the words of `not_finite`, and may raise. It must stand first, before processors that rule tokens
    out; the scores [B, V] are passed on as they are.
    """

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        found = not_finite(scores.detach().amax(dim=-1))
        if found is not None:
            tell(found)
        return scores

    return process


def _seen(rows: Tensor, output: Tensor, mask: Tensor) -> Tensor:
    """Which rows of an output are real tokens; all, where it has other dims than tokens."""
    seen = mask[:, -output.shape[1] :] if output.dim() == 3 else mask
    return seen.to(rows.device) if seen.shape == rows.shape else torch.ones_like(rows, dtype=torch.bool)
