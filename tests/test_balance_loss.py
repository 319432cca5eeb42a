"""``load_balance_as_coded`` is what each model's own code returns as ``aux_loss``, whatever its router scores by."""

import sys

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp.analyses.routing import RoutingCounts, balances, loss_as_coded
from tests.tiny_types import TYPES, build, inputs

NONE = {"jetmoe", "switch_transformers", "nllb-moe"}  # theirs is not of the routers of tokens alone


def own_loss(hf, given):
    """``aux_loss`` of the model as transformers runs it; None where it has none."""
    entry = next((one for one in (hf, *hf.children()) if "load_balancing_loss_func" in vars(_module(one))), None)
    if entry is None or (not hasattr(entry, "num_experts_per_tok") and not hasattr(entry.config, "text_config")):
        return None
    with torch.no_grad():
        returned = entry(**given, output_router_logits=True)
    return getattr(returned, "aux_loss", None)


def _module(one):
    return sys.modules[type(one).__module__]


def _masked(hf):
    given = inputs(hf)
    given["attention_mask"][1, 5:] = 0
    return given


def sharpened(model_type, **fields):
    """A model whose routers disagree with an even choice, so that scores and logits lead to other numbers."""
    hf = build(model_type, **fields)
    for name, parameter in hf.named_parameters():
        if "gate.weight" in name or "router" in name:
            parameter.data.mul_(5)
    return hf


@pytest.mark.parametrize("model_type", TYPES)
def test_as_coded_is_the_models_own(model_type):
    hf = sharpened(model_type)
    given = _masked(hf)
    expected = own_loss(hf, given)
    with moe.wrap(hf) as model:
        if expected is None and model_type not in NONE:
            assert all(
                one.top_k == model.spec.moe(layer).top_k
                for one, layer in zip(balances(model), model.layers, strict=True)
            )
            return
        run = model.run(given, read=["router_logits", "router_scores"])
        sums = RoutingCounts.empty(2, model.layers, model.spec.num_experts, model.spec.top_k, balances(model))
        sums.update(run, np.arange(2))
        got = float(loss_as_coded(sums))
        whole = RoutingCounts.empty(1, model.layers, model.spec.num_experts, model.spec.top_k, balances(model))
        for row in range(2):  # in two batches, it is the same
            one = model.run(
                {name: value[row : row + 1] for name, value in given.items()}, read=["router_logits", "router_scores"]
            )
            whole.update(one, np.zeros(1, int))
    if model_type in NONE:
        assert np.isnan(got)
        return
    assert got == pytest.approx(float(expected), rel=1e-5)
    if model_type != "doge":  # whose router mixes the tokens of a batch
        assert float(loss_as_coded(whole)) == pytest.approx(got, rel=1e-4)


def test_a_fixed_number_of_experts_is_not_the_losses_own():
    """phimoe runs two experts whatever its config says; its loss counts as many as the config says."""
    hf = sharpened("phimoe", num_experts_per_tok=3)
    given = _masked(hf)
    expected = float(own_loss(hf, given))
    with moe.wrap(hf) as model:
        run = model.run(given, read=["router_logits", "router_scores"])
        assert model.spec.top_k == run.routing[model.layers[0]].ids.shape[-1] == 2
        sums = RoutingCounts.empty(2, model.layers, 8, 2, balances(model))
        sums.update(run, np.arange(2))
    assert float(loss_as_coded(sums)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model_type", ["minimax_m2", "doge", "laguna", "deepseek_v4", "phimoe", "gpt_oss"])
def test_a_watch_tells_the_models_own(model_type):
    hf = sharpened(model_type)
    given = _masked(hf)
    expected = float(own_loss(hf, given))
    with moe.RoutingWatch(hf, every=1) as watch, watch.step(0):
        hf(**given)
    assert float(watch.table().load_balance_as_coded[0]) == pytest.approx(expected, rel=1e-5)


def test_sums_of_the_loss_merge_and_resume():
    hf = sharpened("minimax_m2")
    given = _masked(hf)
    with moe.wrap(hf) as model:
        read = ["router_logits", "router_scores"]
        rows = [model.run({name: value[row : row + 1] for name, value in given.items()}, read=read) for row in range(2)]
        parts = [RoutingCounts.empty(2, model.layers, 8, 3, balances(model)) for _ in range(2)]
    for row, (run, part) in enumerate(zip(rows, parts, strict=True)):
        part.update(run, np.array([row]))
    merged = parts[0].merge(RoutingCounts.from_state(parts[1].state()))
    one = RoutingCounts.empty(2, model.layers, 8, 3, balances(model))
    for row, run in enumerate(rows):
        one.update(run, np.array([row]))
    assert float(loss_as_coded(merged)) == float(loss_as_coded(one))
