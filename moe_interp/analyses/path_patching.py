"""Path patching: what one expert says to one later expert, to one later router, or to the logits, and to nobody else.

Patching an expert changes all that comes after it. A path is narrower (Wang et al. 2022, arXiv 2211.00593, section 3.1;
Goldowsky-Dill et al. 2023, arXiv 2304.05969): with the residual stream a plain sum, the sender's contribution c reaches
every later layer as it is, beside what it makes others do.

1. delta = c(other run) - c(base run), [B, S, D].
2. All between sender and receiver is frozen at the base run, so that the receiver is given norm(resid_mid + delta) in
   place of norm(resid_mid): an expert computes its output anew (at the base's weights, for the tokens that chose it), a
   router its logits (its experts are given the base's input). For the logits the last residual is + delta.
3. The receiver's new output is put into the base run, and what comes after it runs freely.

Attention is never a receiver: the paths of this page stay at one token until the receiver.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from moe_interp.analyses.effects import contribution
from moe_interp.analyses.patching import experts_that_run
from moe_interp.analyses.plain import check_plain, check_plain_model, check_writes_text
from moe_interp.analyses.trials import (
    BOUNDS,
    Direction,
    Pair,
    Trial,
    effects,
    paired,
    put,
    summary,
)
from moe_interp.arguments import Count, Draws, Seed, checked
from moe_interp.encode import Inputs
from moe_interp.errors import BadInput
from moe_interp.interventions import Intervention, patch_route
from moe_interp.interventions.outputs import SetOutput
from moe_interp.interventions.values import ByToken
from moe_interp.model import MoEModel
from moe_interp.results import labelled
from moe_interp.run import Run, select

Receivers = Literal["experts", "routers", "logits"]


@checked
@torch.no_grad()
def path_patching(
    model: MoEModel,
    clean: Inputs,
    corrupted: Inputs,
    sender: tuple[int, int],
    receivers: Receivers,
    metric: Any,
    *,
    direction: Direction = "restore",
    resamples: Draws = 1000,
    seed: Seed = 0,
    batch_tokens: Count = 4096,
) -> xr.Dataset:
    """The effect of what one expert says directly to later experts, to later routers, or to the logits.

    Args:
        model: a causal language model whose residual stream is a plain sum.
        clean, corrupted, metric, direction, resamples, seed, batch_tokens: as in `activation_patching`.
        sender: layer and expert, whose contribution (0 where it was not chosen) is that of the other run.
        receivers: "experts": each expert of each later layer. "routers": each later router. "logits": the last residual
            alone, which is the direct effect.

    Returns:
        Dims text, layer and expert (of the receiver; routers have no expert, the logits no layer), bound (low, high).
        ``effect``, ``normalised``, their means and intervals, ``clean`` and ``corrupted`` as in `activation_patching`.
        ``tokens``: at how many tokens of a text the sender's contribution differs and (for experts) the receiver was
        chosen in the base run; where there are none the effect is 0 exactly.

    Raises:
        BadInput: texts that do not pair up, an unknown option or metric, a sender with no MoE layer after it.
        UnknownName: no such layer or expert.
        UnsupportedModel: a residual stream that is not a plain sum, or a model that does not predict the next token.
    """
    check_writes_text(model)
    model.spec.check_runs(*sender)
    check_plain_model(model)
    check_plain(model, model.layers)
    last = model.spec.last(model.spec.main_stack)
    later = [last] if receivers == "logits" else [layer for layer in model.layers if layer > sender[0]]
    if not later:
        raise BadInput(
            f"no {receivers} to receive anything",
            expected=f"a sender before MoE layer {model.layers[-1]}",
            got=f"one of layer {sender[0]}",
            do="receivers='logits' is the direct effect.",
        )
    frozen = select("resid_post" if receivers == "logits" else "resid_mid", layers=later)
    pair = paired(model, clean, corrupted, metric, direction, ["expert_out", frozen])
    groups = (_trials(pair, sender, receivers, number, layer) for number, layer in enumerate(later))
    most = max(experts_that_run(model, layer) for layer in model.layers)
    coords: dict[str, list[int]] = {
        "experts": {"layer": later, "expert": list(range(most))},
        "routers": {"layer": later},
        "logits": {},
    }[receivers]
    shape = tuple(map(len, coords.values()))
    found = effects(pair.restart, pair.bound, pair.base_values, groups, shape, batch_tokens=batch_tokens, name="paths")
    return labelled(
        pair.variables()
        | summary(found, tuple(coords), pair.metric.units, gap=pair.gap, resamples=resamples, seed=seed),
        {"text": list(range(len(pair.base_values))), **coords, "bound": list(BOUNDS)},
        analysis="path_patching",
        provenance={
            **pair.provenance(), "sender_layer": sender[0], "sender_expert": sender[1], "receivers": receivers,
            "resamples": resamples, "seed": seed,
        },
    )  # fmt: skip


def _trials(pair: Pair, sender: tuple[int, int], receivers: Receivers, number: int, layer: int) -> Iterator[Trial]:
    delta = contribution(pair.other, *sender) - contribution(pair.base, *sender)
    said = (delta != 0).any(dim=-1)
    if receivers == "logits":
        yield Trial((), said, partial(_shifted, pair, "resid_post", layer, delta))
        return
    heard = _heard(pair, layer, delta)
    if receivers == "routers":
        yield Trial((number,), said, partial(_new_logits, heard, layer, said))
        return
    for expert in range(experts_that_run(pair.restart.model, layer)):
        where = said & pair.base.expert(layer, expert)[1]
        yield Trial((number, expert), where, partial(_new_output, heard, layer, expert, said))


def _heard(pair: Pair, layer: int, delta: Float[Tensor, "B S D"]) -> Run:
    """The base run with delta in what a layer's mixture is given: the router's new logits, and under the base's route
    the experts' new outputs."""
    edits = [*_shifted(pair, "resid_mid", layer, delta), patch_route(pair.base, layer=layer)]
    read = [select("router_logits", layers=layer), select("expert_out", layers=layer)]
    return pair.restart.model.run(pair.restart.inputs, read=read, edit=edits, output=False)


def _shifted(pair: Pair, point: str, layer: int, delta: Float[Tensor, "B S D"]) -> list[Intervention]:
    residual = pair.base[point, layer]
    return [put(point, layer, residual + delta.to(residual.dtype), pair.base.tokens)]


def _new_logits(heard: Run, layer: int, said: Bool[Tensor, "B S"]) -> list[Intervention]:
    logits = put("router_logits", layer, heard["router_logits", layer], heard.tokens)
    return [dataclasses.replace(logits, tokens=ByToken.of(said, heard.tokens))]


def _new_output(heard: Run, layer: int, expert: int, said: Bool[Tensor, "B S"]) -> list[Intervention]:
    outputs, _ = heard.expert(layer, expert)
    values, marks = (ByToken.of(value, heard.tokens) for value in (outputs, said))
    return [SetOutput(experts=(expert,), layers=(layer,), values=values, tokens=marks)]
