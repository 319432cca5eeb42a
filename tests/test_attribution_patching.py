"""Attribution patching, against gradients of the slow reference, exact effects, and what must hold of any estimate."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

import moe_interp as moe
from moe_interp.analyses.metrics import LogitDifference
from moe_interp.encode import pad
from moe_interp.errors import BadInput, UnsupportedModel
from tests.reference.model import Reference, forward
from tests.tiny import FAMILIES, build
from tests.tiny_types import build as build_type

DRAW = torch.Generator().manual_seed(8)
IDS, OTHER = torch.randint(3, 90, (2, 6), generator=DRAW), torch.randint(3, 90, (2, 6), generator=DRAW)
DIFFERENCE = LogitDifference((7,), (9,))


def difference(logits: Tensor) -> Tensor:
    """The same metric, summed over texts."""
    return (logits[:, -1, 7] - logits[:, -1, 9]).sum()


def nll(logits: Tensor) -> Tensor:
    """Nats per token of each text, summed over texts."""
    return sum(functional.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, IDS, strict=True))


def contributions(run: Reference, layer: int, expert: int) -> Tensor:
    """[B, S, D], weight times output, slot by slot."""
    ids, weights, outputs = (run.points[name, layer] for name in ("expert_ids", "gate_weights", "expert_out"))
    return ((ids == expert)[..., None] * weights[..., None] * outputs).sum(dim=2)


def per_text(products: Tensor) -> np.ndarray:
    return products.detach().flatten(1).sum(dim=1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_is_minus_contribution_times_gradient(family):
    hf = build(family)
    run = forward(hf, IDS)
    with moe.wrap(hf) as model:
        found = moe.attribution_patching(model, IDS, neurons=True, sample=4)
        downs = {(at, e): model.weights(at, e) for at in model.layers for e in range(8)}
        layers = model.layers
    for layer in layers:
        (slope,) = torch.autograd.grad(nll(run.logits), run.points["routed_out", layer], retain_graph=True)
        for expert in range(8):
            expected = -per_text(contributions(run, layer, expert) * slope)
            got = found.attribution.sel(layer=layer, expert=expert)
            assert np.abs(got - expected).max() < 2e-5 * max(1, np.abs(found.attribution).max())
            slots = run.points["expert_ids", layer] == expert
            acts = run.points["expert_act", layer] * run.points["gate_weights", layer][..., None]
            raised = (slope @ downs[layer, expert].down)[:, :, None]
            neurons = -(acts * raised * slots[..., None]).detach().sum(dim=(0, 1, 2)) / 2
            assert np.abs(found.neuron_attribution.sel(layer=layer, expert=expert) - neurons.numpy()).max() < 2e-5
    assert np.allclose(found.attribution_mean, found.attribution.mean("text"))
    total = found.neuron_attribution.sum("neuron") - found.attribution_mean
    assert (np.abs(total).max() < 1e-5) == (family != "gpt_oss")  # whose down-projection has a bias


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_patching_is_change_of_contribution_times_gradient(family):
    hf = build(family)
    run, other = forward(hf, IDS), forward(hf, OTHER)
    with moe.wrap(hf) as model:
        found = moe.attribution_patching(model, IDS, OTHER, DIFFERENCE, neurons=True, sample=4)
        layers, downs = model.layers, {(at, e): model.weights(at, e).down for at in model.layers for e in range(8)}
    for layer in layers:
        points = [run.points[name, layer] for name in ("routed_out", "router_logits")]
        slope, by_logit = torch.autograd.grad(difference(run.logits), points, retain_graph=True, allow_unused=True)
        by_logit = torch.zeros_like(points[1]) if by_logit is None else by_logit
        changes = (other.points["router_logits", layer] - points[1]) * by_logit
        for expert in range(8):
            change = contributions(other, layer, expert) - contributions(run, layer, expert)
            got = found.attribution.sel(layer=layer, expert=expert)
            assert np.abs(got - per_text(change * slope)).max() < 1e-4
            got = found.router_attribution.sel(layer=layer, expert=expert)
            assert np.abs(got - per_text(changes[..., expert])).max() < 1e-4
            sums = [
                side.points["expert_act", layer]
                * side.points["gate_weights", layer][..., None]
                * (side.points["expert_ids", layer] == expert)[..., None]
                for side in (run, other)
            ]
            neurons = ((sums[1].sum(2) - sums[0].sum(2)) * (slope @ downs[layer, expert])).detach().sum((0, 1)) / 2
            got = found.neuron_attribution.sel(layer=layer, expert=expert)
            assert np.abs(got - neurons.numpy()).max() < 1e-4
    assert np.abs(found.attribution).max() > 0.01


def test_routers_are_followed_at_the_run_itself_however_long_the_path():
    with moe.wrap(build("mixtral")) as model:
        one, more = (moe.attribution_patching(model, IDS, OTHER, DIFFERENCE, steps=n, sample=4) for n in (1, 3))
    assert np.abs(one.router_attribution).max() > 1e-3
    assert np.allclose(one.router_attribution, more.router_attribution, atol=1e-6)
    assert not np.allclose(one.attribution, more.attribution, atol=1e-6)


@pytest.mark.parametrize("corrupted", [None, OTHER])
def test_the_exact_effects_are_those_of_ablating_and_of_patching(corrupted):
    with moe.wrap(build("qwen3_moe")) as model:
        found = moe.attribution_patching(model, IDS, corrupted, DIFFERENCE, sample=None)
        base = DIFFERENCE.bind(model.run(IDS)).of(model.run(IDS)).mean()
        source = None if corrupted is None else model.run(corrupted, read="expert_out")
        for layer in (0, 3):
            for expert in np.flatnonzero(~np.isnan(found.effect_mean.sel(layer=layer))).tolist():
                at = {"layer": layer, "expert": expert}
                run = model.run(IDS, edit=moe.ablate(**at) if source is None else moe.patch(source, **at))
                expected = DIFFERENCE.bind(run).of(run).mean() - base
                assert abs(float(found.effect_mean.sel(**at)) - float(expected)) < 1e-5
    exact, estimate = found.effect_mean.values, found.attribution_mean.values
    there = ~np.isnan(exact)
    assert int(found.sampled) == there.sum() > 10
    if corrupted is None:
        assert np.array_equal(there, found.tokens > 0)
    rho = spearmanr(exact[there], estimate[there]).statistic
    assert float(found.rank_correlation) == pytest.approx(rho)
    low, high = found.rank_correlation_interval.values
    assert -1 <= low < rho < high <= 1


def test_the_sample_is_drawn_by_its_seed():
    with moe.wrap(build("olmoe")) as model:
        drawn = [
            ~np.isnan(moe.attribution_patching(model, IDS, sample=5, seed=seed).effect_mean.values)
            for seed in (1, 1, 2)
        ]
    assert [one.sum() for one in drawn] == [5, 5, 5]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


class Frozen(torch.nn.Module):
    """In place of the last norm: a linear map."""

    def __init__(self, like: torch.nn.Module):
        super().__init__()
        self.weight = like.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight


@pytest.mark.parametrize("corrupted", [None, OTHER])
def test_what_is_linear_is_exact(corrupted):
    """Contributions of the last layer go into a logit difference by a norm alone; without it the estimate is exact."""
    hf = build("mixtral")
    hf.model.norm = Frozen(hf.model.norm)
    with moe.wrap(hf) as model:
        found = moe.attribution_patching(model, IDS, corrupted, DIFFERENCE, layers=3, sample=None)
    there = ~np.isnan(found.effect_mean.values)
    scale = np.abs(found.attribution_mean.values).max()
    assert scale > 0.1
    assert np.abs(found.effect_mean - found.attribution_mean).values[there].max() < 1e-5 * scale
    assert float(found.rank_correlation) > 0.999


@pytest.mark.parametrize("corrupted", [None, OTHER])
def test_estimates_along_the_path_sum_to_the_effect_of_replacing_all(corrupted):
    with moe.wrap(build("qwen2_moe")) as model:
        base = float(difference(model.run(IDS).logits)) / 2
        source = None if corrupted is None else model.run(corrupted, read="routed_out")
        edits = [
            moe.scale(layer=layer, expert=range(8), by=0.0)
            if source is None
            else moe.replace(source["routed_out", layer], layer=layer, point="routed_out")
            for layer in model.layers
        ]
        whole = float(difference(model.run(IDS, edit=edits).logits)) / 2 - base
        errors = [
            abs(
                float(
                    moe.attribution_patching(
                        model, IDS, corrupted, DIFFERENCE, steps=m, sample=1
                    ).attribution_mean.sum()
                )
                - whole
            )
            for m in (1, 8, 32)
        ]
    assert errors[2] < 0.1 * abs(whole)
    assert errors[2] < errors[1] / 2 < errors[0] / 2


def test_two_steps_are_nearer_to_the_effect_of_ablating_one_alone_on_average():
    def mean_error(model: moe.MoEModel, steps: int) -> float:
        found = moe.attribution_patching(model, IDS, steps=steps, sample=None)
        return float(np.nanmean(np.abs(found.effect_mean - found.attribution_mean)))

    errors = []
    for seed in range(4):
        with moe.wrap(build("olmoe", seed=seed)) as model:
            errors.append([mean_error(model, steps) for steps in (1, 2)])
    one, two = np.mean(errors, axis=0)
    assert two < one


def test_padding_changes_nothing():
    with moe.wrap(build("deepseek_v2")) as model:
        sides = [pad([IDS[0].tolist(), IDS[1, :4].tolist()], side) for side in ("left", "right")]
        found = [moe.attribution_patching(model, one, sample=1).attribution.values for one in sides]
        alone = moe.attribution_patching(model, IDS[1, :4], sample=1).attribution.values
    assert np.allclose(found[0], found[1], atol=2e-5)
    assert np.allclose(found[0][..., 1:], alone, atol=2e-5)


def test_weights_on_inputs_are_taken_by_the_output():
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(2))
    with moe.wrap(build_type("llama4_text")) as model:
        found = moe.attribution_patching(model, ids, metric=DIFFERENCE, sample=1)
        layer = model.layers[-1]
        run = model.run(ids, read=["expert_out", "routed_out"], grad=True)
        (slope,) = torch.autograd.grad(difference(run.logits), run["routed_out", layer])
        slots = run.routing[layer].ids
    for expert in slots.unique().tolist():
        own = (run["expert_out", layer] * (slots == expert)[..., None]).sum(2)
        assert np.allclose(found.attribution.sel(layer=layer, expert=expert), -per_text(own * slope), atol=1e-4)


def test_parameters_keep_what_they_had():
    hf = build("olmoe")
    hf.lm_head.weight.requires_grad_(False)
    with moe.wrap(hf) as model:
        moe.attribution_patching(model, IDS, sample=1)
    assert not hf.lm_head.weight.requires_grad and hf.model.norm.weight.requires_grad
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_refusals():
    with moe.wrap(build("mixtral")) as model:
        with pytest.raises(BadInput, match="texts of other lengths"):
            moe.attribution_patching(model, IDS, OTHER[:, :5])
        with pytest.raises(BadInput, match="KL has no gradient at the run"):
            moe.attribution_patching(model, IDS, metric="kl")
        assert np.abs(moe.attribution_patching(model, IDS, metric="kl", steps=2, sample=1).attribution).max() > 1e-3
        with pytest.raises(BadInput, match="no gradient at the run"):
            moe.attribution_patching(model, IDS, metric=lambda logits: 3.0)
        with pytest.raises(BadInput, match="invalid steps"):
            moe.attribution_patching(model, IDS, steps=0)
        with pytest.raises(BadInput, match="invalid sample"):
            moe.attribution_patching(model, IDS, sample=0)
    with moe.wrap(build_type("openai_privacy_filter")) as model, pytest.raises(UnsupportedModel, match="next token"):
        moe.attribution_patching(model, IDS)
