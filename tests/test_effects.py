"""Exact effects of experts, against the slow reference and against whole passes."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import moe_interp as moe
from moe_interp.analyses.effects import Sweep
from moe_interp.analyses.metrics import LogitDifference
from moe_interp.encode import pad
from moe_interp.errors import BadInput, UnknownName, UnsupportedModel
from tests.reference import interventions as slow
from tests.reference.model import forward
from tests.tiny import FAMILIES, build
from tests.tiny_types import build as build_type

IDS = torch.randint(3, 90, (3, 5), generator=torch.Generator().manual_seed(6))
PADDED = pad([[5, 17, 33, 41, 8, 77], [60, 12, 9], [44, 51, 29, 30]])


def nll(logits: torch.Tensor) -> np.ndarray:
    """Nats per token of each text, token by token."""
    rows = [
        [functional.cross_entropy(logits[text, at], IDS[text, at + 1]) for at in range(4)] for text in range(len(IDS))
    ]
    return np.array(rows).mean(axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_are_those_of_the_reference_without_each_expert(family):
    hf = build(family)
    with torch.no_grad():
        clean = forward(hf, IDS)
    with moe.wrap(hf) as model:
        found = moe.expert_effects(model, IDS)
        layers = model.layers
    assert np.allclose(found.base, nll(clean.logits), atol=1e-5)
    for layer in (layers[0], layers[-2], layers[-1]):
        ids = clean.points["expert_ids", layer]
        for expert in range(8):
            used = (ids == expert).any(dim=2)
            assert int(found.tokens.sel(layer=layer, expert=expert)) == int(used.sum())
            kept = (ids != expert)[..., None]
            with torch.no_grad():
                without = forward(hf, IDS, edits={("expert_out", layer): lambda outputs, kept=kept: outputs * kept})
            expected = nll(without.logits) - nll(clean.logits)
            got = found.effect.sel(layer=layer, expert=expert).values
            assert np.abs(got - expected).max() < 1e-5
            assert (got[~used.any(dim=1).numpy()] == 0).all()
    assert np.abs(found.effect).max() > 0.05
    assert np.allclose(found.effect_mean, found.effect.mean("text"))


def whole_passes(model: moe.MoEModel, inputs, metric, layer: int, expert: int, **how) -> np.ndarray:
    """The effect of an ablation as two whole passes give it."""
    run = model.run(inputs)
    bound = metric.bind(run)
    return (bound.of(model.run(inputs, edit=moe.ablate(layer=layer, expert=expert, **how))) - bound.of(run)).numpy()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("how", ["zero", "forbid", "mean", "resample"])
def test_every_way_of_taking_out_is_that_of_ablate(how, side):
    inputs = pad([[5, 17, 33, 41, 8, 77], [60, 12, 9], [44, 51, 29, 30]], side)
    with moe.wrap(build("qwen2_moe")) as model:
        found = moe.expert_effects(model, inputs, LogitDifference((7,), (9,)), how, seed=3)
        run = model.run(inputs, read="expert_out")
        for layer in (0, 2, 3):
            for expert in run.routing[layer].ids[run.mask].unique().tolist():
                outputs, weights, used = run.contribution(layer, expert)
                more = {"mean": (outputs * weights[..., None])[used].mean(dim=0)} if how == "mean" else {}
                more = {"mean": {(layer, expert): more["mean"]}} if more else {"seed": 3}
                more |= {"run": run} if how == "resample" else {}
                expected = whole_passes(model, inputs, LogitDifference((7,), (9,)), layer, expert, how=how, **more)
                assert np.abs(found.effect.sel(layer=layer, expert=expert) - expected).max() < 2e-5
    assert np.abs(found.effect).max() > 0.1


def test_means_may_be_given():
    with moe.wrap(build("olmoe")) as model:
        given = {(2, expert): torch.full((64,), expert / 8) for expert in range(8)}
        found = moe.expert_effects(model, IDS, how="mean", mean=given, layers=2)
        expected = whole_passes(model, IDS, moe_nll(), 2, 1, how="mean", mean=given)
    assert np.abs(found.effect.sel(layer=2, expert=1) - expected).max() < 1e-5


def moe_nll():
    from moe_interp.analyses.metrics import NLL

    return NLL()


def test_a_function_of_all_logits_of_a_text_is_given_all_of_them():
    def spread(logits: torch.Tensor) -> torch.Tensor:
        return logits.std() * len(logits)

    with moe.wrap(build("mixtral")) as model:
        found = moe.expert_effects(model, PADDED, spread)
        clean = model.run(PADDED)
        edited = model.run(PADDED, edit=moe.ablate(layer=1, expert=2))
    mask = PADDED["attention_mask"].bool()
    before, after = ([spread(run.logits[text][mask[text]]) for text in range(3)] for run in (clean, edited))
    assert np.allclose(found.base, before, atol=1e-4)
    assert np.allclose(found.effect.sel(layer=1, expert=2), np.array(after) - np.array(before), atol=1e-4)


def test_standing_edits_stand_in_the_sweep():
    standing = moe.apply("resid_post", lambda value: 3 * value.tanh(), layers=1)
    with moe.wrap(build("mixtral")) as model, model.edit(standing):
        found = moe.expert_effects(model, IDS, layers=[1, 2])
        for layer in (1, 2):
            expected = whole_passes(model, IDS, moe_nll(), layer, 4)
            assert np.abs(found.effect.sel(layer=layer, expert=4) - expected).max() < 1e-5


@pytest.mark.parametrize("how", ["zero", "mean", "forbid"])
def test_a_standing_patch_gives_experts_something_to_lose_without_a_slot(how):
    hf, layer, others = build("olmoe"), 1, IDS.flip(0) + 1
    given = forward(hf, others).points

    def patch(table: slow.Table, at: slow.Where) -> None:
        for expert in range(8):
            rows = zip(*(given[name, layer][at] for name in ("expert_ids", "gate_weights", "expert_out")), strict=True)
            table.contribute(expert, sum((w * f for e, w, f in rows if e == expert), torch.zeros(64)))

    def losses(*more: slow.Op) -> np.ndarray:
        with torch.no_grad():
            return nll(slow.run(hf, IDS, layer, [("table", patch), *more]).logits)

    base = losses()
    with moe.wrap(hf) as model:
        standing = moe.patch(model.run(others, read="expert_out"), layer=layer, expert=range(8))
        with model.edit(standing):
            found = moe.expert_effects(model, IDS, how=how, layers=layer)
            chosen = model.run(IDS, read="expert_out").routing[layer].ids
            sets = moe.coalitions(model, IDS, [(layer, expert) for expert in range(8)], "nll", size=1)
            again = model.run(IDS, edit=moe.patch(model.run(others, read="expert_out"), layer=layer, expert=range(8)))
            assert torch.allclose(again.logits, model.run(IDS).logits, atol=1e-5)
            for expert in range(8):
                used = (chosen == expert).any(dim=2)
                if how == "zero":
                    expected = losses(("table", lambda table, at, expert=expert: table.scale(expert, 0.0))) - base
                    assert np.allclose(sets.effect[:, expert], expected, atol=1e-5)
                    assert np.allclose(sets.tokens[:, expert], (used | (moved(given, layer, expert))).sum(dim=1))
                elif how == "forbid":
                    expected = whole_passes(model, IDS, moe_nll(), layer, expert, how="forbid")
                else:
                    expected = whole_passes(model, IDS, moe_nll(), layer, expert, how=how, mean=means(model, layer))
                got = found.effect.sel(layer=layer, expert=expert)
                assert np.allclose(got, expected, atol=1e-5)
    if how == "zero":
        assert (np.abs(found.effect) > 1e-3).sum() > 3


def moved(given: dict, layer: int, expert: int) -> torch.Tensor:
    """Tokens of other texts that use an expert."""
    return (given["expert_ids", layer] == expert).any(dim=2)


def means(model: moe.MoEModel, layer: int) -> dict:
    """Mean contributions over the tokens that chose an expert, slot by slot; 0 of one that none chose."""
    run, found = model.run(IDS, read="expert_out"), {}
    for expert in range(8):
        ids, weights, outputs = run.routing[layer].ids, run.routing[layer].weights, run["expert_out", layer]
        rows = [weights[at] * outputs[at] for at in map(tuple, (ids == expert).nonzero().tolist())]
        found[layer, expert] = torch.stack(rows).mean(0) if rows else torch.zeros(64)
    return found


@pytest.mark.parametrize("dim", [0, 1])
def test_a_standing_edit_may_carry_effects_to_earlier_tokens_and_to_other_texts(dim):
    standing = moe.apply("resid_post", lambda value: value + value.flip(dim), layers=2)
    with moe.wrap(build("mixtral")) as model, model.edit(standing):
        found = moe.expert_effects(model, IDS, layers=1)
        for expert in range(8):
            expected = whole_passes(model, IDS, moe_nll(), 1, expert)
            assert np.abs(found.effect.sel(layer=1, expert=expert) - expected).max() < 1e-5


@pytest.mark.parametrize(
    "model_type", ["zaya", "switch_transformers", "granitemoe", "llama4_text", "gemma4", "dots3_note"]
)
def test_unusual_architectures_agree_with_whole_passes(model_type):
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model_type == "switch_transformers" else ids
    metric = LogitDifference((7,), (9,))
    with moe.wrap(build_type(model_type)) as model:
        found = moe.expert_effects(model, inputs, metric, batch_tokens=40)
        for layer in (model.layers[0], model.layers[-1]):
            for expert in np.flatnonzero(found.tokens.sel(layer=layer))[:2].tolist():
                expected = whole_passes(model, inputs, metric, layer, expert)
                got = found.effect.sel(layer=layer, expert=expert).values
                assert np.abs(got - expected).max() < 1e-5 * max(1, np.abs(found.base).max()), (layer, expert)


def test_only_what_a_change_can_reach_is_run(monkeypatch):
    with moe.wrap(build("qwen3_moe")) as model:
        sweep, seen = Sweep(model, PADDED, "nll"), []
        run = sweep.restart.run
        monkeypatch.setattr(
            sweep.restart,
            "run",
            lambda variants, *more, **options: seen.extend(variants) or run(variants, *more, **options),
        )
        from moe_interp.analyses.effects import removals

        changes = list(removals(sweep, (2, 3), "zero"))
        sweep.effects(changes, len(changes), 1024)
    real = PADDED["attention_mask"].bool()
    scored = real & torch.cat([real[:, 1:], torch.zeros(3, 1, dtype=torch.bool)], dim=1)
    for change, variant in zip(changes, seen, strict=True):
        after = change.used.cumsum(1) > 0 if change.layer == 2 else change.used
        assert torch.equal(variant.at, scored & after)
        assert torch.equal(variant.texts, (scored & after).any(1).nonzero().flatten())
        (edit,) = variant.edits
        assert (type(edit).__name__, edit.layers) == (("Apply", (3,)) if change.layer == 2 else ("Scale", (3,)))


def test_refusals():
    with moe.wrap(build("mixtral")) as model:
        with pytest.raises(BadInput, match="invalid how for expert_effects: expected one of 'zero'"):
            moe.expert_effects(model, IDS, how="gently")
        with pytest.raises(BadInput, match="unknown metric"):
            moe.expert_effects(model, IDS, "loss")
        with pytest.raises(BadInput, match="nothing to predict"):
            moe.expert_effects(model, IDS[:, :1])
        with pytest.raises(UnknownName, match="unknown layer 9"):
            moe.expert_effects(model, IDS, layers=9)
    with moe.wrap(build_type("openai_privacy_filter")) as model, pytest.raises(UnsupportedModel, match="next token"):
        moe.expert_effects(model, IDS)


def test_edits_of_modules_are_refused_before_anything_is_run():
    with (
        moe.wrap(build("olmoe")) as model,
        model.edit(moe.top_k(5)),
        pytest.raises(BadInput, match=r"not measured under edits of modules: .* got TopK\(.*k=5"),
    ):
        moe.expert_effects(model, IDS)


def test_edits_that_reach_one_text_alone_do_not_stop_the_others():
    marks = torch.zeros(3, 6, dtype=torch.bool)
    marks[0, 2] = True
    with moe.wrap(build("olmoe")) as model:
        plain = moe.expert_effects(model, PADDED)
        for edit in (
            moe.scale(layer=0, expert=None, by=0.5, positions=4),
            moe.scale(layer=0, expert=None, by=0.5, tokens=marks),
        ):
            with model.edit(edit):
                found = moe.expert_effects(model, PADDED)
            assert np.allclose(found.effect[..., 1:], plain.effect[..., 1:], atol=1e-6)
            assert not np.allclose(found.effect[..., 0], plain.effect[..., 0], atol=1e-6)
