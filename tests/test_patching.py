"""Activation patching, against edited forwards of the slow reference and against what must hold."""

import json

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp.analyses.metrics import KL, LogitDifference, LogProbability, Probability
from moe_interp.analyses.trials import contributions, differs
from moe_interp.errors import BadInput, UnknownName, UnsupportedModel
from moe_interp.run import Tokens
from moe_interp.stats import bootstrap_mean, bootstrap_ratio
from tests.reference import patching as slow
from tests.reference.patching import forward
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build
from tests.tiny_types import build as build_type

CLEAN = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(6))
CORRUPTED = CLEAN.clone()
CORRUPTED[:, 1] = torch.tensor([71, 12])
METRIC, SCORE = LogitDifference((5,), (9,)), slow.logit_difference(5, 9)
LAYERS = (2, 3)


def close(found, expected, scale: float = 1.0) -> bool:
    found, expected = (np.asarray(one, dtype=float) for one in (found, expected))
    return bool(np.abs(found - expected).max() < 1e-4 * max(scale, np.abs(expected).max()))


def both(hf, direction: str):
    """Ids and slow runs of the base and of the other."""
    ids = (CORRUPTED, CLEAN) if direction == "restore" else (CLEAN, CORRUPTED)
    return ids, [forward(hf, one) for one in ids]


@pytest.mark.parametrize(
    ("family", "direction"),
    [("olmoe", "restore"), ("deepseek_v3", "corrupt"), ("gpt_oss", "restore"), ("qwen2_moe", "corrupt")],
)
def test_every_expert_of_a_layer(family, direction):
    hf = build(family)
    (ids, _), (base, other) = both(hf, direction)
    start, end = SCORE(base.logits), SCORE(other.logits)
    with moe.wrap(hf) as model:
        result = moe.activation_patching(model, CLEAN, CORRUPTED, METRIC, layers=2, direction=direction, resamples=5)
    clean, corrupted = (end, start) if direction == "restore" else (start, end)
    assert close(result.clean, clean) and close(result.corrupted, corrupted)
    used = 0
    for expert in range(8):
        effect = SCORE(slow.patched_expert(hf, ids, base, other, 2, expert)) - start
        found = result.sel(layer=2, expert=expert)
        assert close(found.effect, effect)
        assert close(found.normalised, effect / (end - start))
        assert close(found.effect_mean, effect.mean())
        assert close(found.normalised_overall, effect.sum() / (end - start).sum())
        by = torch.stack([(run.points["expert_ids", 2] == expert).any(-1) for run in (base, other)]).any(0)
        sure = (base.points["resid_pre", 2] - other.points["resid_pre", 2]).abs().amax(-1) > 0.1
        assert (found.tokens.values <= by.sum(1).numpy()).all()
        assert (found.tokens.values >= (by & sure).sum(1).numpy()).all()
        used += int((effect.abs() > 1e-3).sum())
    assert used >= 4


def test_an_expert_that_neither_run_uses_is_not_run():
    hf = build("mixtral")
    base, other = (forward(hf, ids) for ids in (CORRUPTED[:1], CLEAN[:1]))
    with moe.wrap(hf) as model:
        result = moe.activation_patching(model, CLEAN[:1], CORRUPTED[:1], METRIC)
    unused = [
        (layer, expert)
        for layer in range(4)
        for expert in range(8)
        if not any((run.points["expert_ids", layer] == expert).any() for run in (base, other))
    ]
    for layer, expert in unused:
        found = result.sel(layer=layer, expert=expert)
        assert found.effect.values.tolist() == [0.0] and found.tokens.values.tolist() == [0]
    assert unused and np.isnan(result.effect_interval).all()


@pytest.mark.parametrize(
    ("family", "point", "direction"),
    [
        ("mixtral", "resid_post", "restore"),
        ("gpt_oss", "router_logits", "corrupt"),
        ("qwen3_moe", "attn_out", "restore"),
    ],
)
def test_every_position_of_a_point(family, point, direction):
    hf = build(family)
    (ids, _), (base, other) = both(hf, direction)
    start = SCORE(base.logits)
    with moe.wrap(hf) as model:
        result = moe.activation_patching(
            model, CLEAN, CORRUPTED, METRIC, over="positions", point=point, layers=[2], direction=direction, resamples=5
        )
    expected = [SCORE(slow.patched_position(hf, ids, other, 2, point, position)) - start for position in range(5)]
    assert close(result.effect.sel(layer=2), torch.stack(expected, 1))
    assert result.tokens.values[:, 0, 1:].tolist() == [[1] * 4] * 2
    assert close(result.effect.isel(position=0), np.zeros((2, 1)))
    assert np.abs(result.effect.values).max() > 1e-2


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_every_rank_of_slots(family):
    hf = build(family)
    (ids, _), (base, other) = both(hf, "restore")
    with moe.wrap(hf) as model:
        result = moe.activation_patching(model, CLEAN, CORRUPTED, METRIC, over="ranks", layers=LAYERS, resamples=5)
    for layer in LAYERS:
        for rank in range(3):
            change = slow.ranked(other, layer, rank) - slow.ranked(base, layer, rank)
            logits = forward(hf, ids, edits={("routed_out", layer): slow.add(change)}).logits
            assert close(result.effect.sel(layer=layer, rank=rank + 1), SCORE(logits) - SCORE(base.logits))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_routes_are_patched_apart_from_values(family):
    hf = build(family)
    (ids, _), (base, other) = both(hf, "restore")
    with moe.wrap(hf) as model:
        result = moe.activation_patching(model, CLEAN, CORRUPTED, METRIC, over="routes", layers=LAYERS, resamples=5)
    for layer in LAYERS:
        edits = {(point, layer): slow.put(other.points[point, layer]) for point in ("expert_ids", "gate_weights")}
        effect = SCORE(forward(hf, ids, edits=edits).logits) - SCORE(base.logits)
        assert close(result.effect.sel(layer=layer), effect)
        assert effect.abs().max() > 1e-3


# ---- what must hold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_all_experts_and_the_shared_ones_are_the_whole_block(family):
    with moe.wrap(build(family)) as model:
        source = model.run(CLEAN, read=["expert_out", "moe_out", *{"shared_out"} & {*model.points}])
        parts = [moe.patch(source, layer=2, expert=range(8))]
        if "shared_out" in model.points:
            parts.append(moe.patch(source, layer=2, point="shared_out"))
        whole = model.run(CORRUPTED, edit=moe.patch(source, layer=2, point="moe_out")).logits
        assert torch.allclose(model.run(CORRUPTED, edit=parts).logits, whole, atol=1e-4)
        assert not torch.allclose(model.run(CORRUPTED).logits, whole, atol=1e-2)


@pytest.mark.parametrize("over", ["experts", "ranks", "routes", "positions"])
def test_a_run_patched_with_itself_is_unchanged(over):
    with moe.wrap(build("olmoe")) as model:
        result = moe.activation_patching(model, CLEAN, CLEAN, METRIC, over=over, resamples=5)
    assert (result.effect == 0).all() and (result.tokens == 0).all()
    assert np.isnan(result.normalised).all() and np.isnan(result.normalised_overall).all()


def test_the_last_residual_at_the_last_token_is_the_other_run():
    with moe.wrap(build("gpt_oss")) as model:
        result = moe.activation_patching(model, CLEAN, CORRUPTED, METRIC, over="positions", resamples=5)
    last = result.isel(layer=-1)
    assert close(last.normalised.isel(position=-1), [1.0, 1.0])
    assert close(last.effect.isel(position=-1), result.clean - result.corrupted)
    assert close(last.effect.isel(position=slice(-1)), np.zeros((2, 4)))


def test_directions_are_one_another_with_texts_swapped():
    with moe.wrap(build("mixtral")) as model:
        one = moe.activation_patching(model, CLEAN, CORRUPTED, METRIC, layers=1, resamples=5)
        other = moe.activation_patching(model, CORRUPTED, CLEAN, METRIC, layers=1, resamples=5, direction="corrupt")
    assert np.array_equal(one.effect, other.effect)
    assert np.array_equal(one.clean, other.corrupted)


@pytest.mark.parametrize("over", ["experts", "ranks", "positions", "routes"])
def test_padding_changes_nothing(over):
    pairs = [(CLEAN[0, :3], CORRUPTED[0, :3]), (CLEAN[1], CORRUPTED[1])]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    rows = [
        torch.stack([torch.cat([torch.tensor([0, 0]), first[side]]), second[side]])
        for side in (0, 1)
        for first, second in [pairs]
    ]
    clean, corrupted = ({"input_ids": row, "attention_mask": mask} for row in rows)
    with moe.wrap(build("deepseek_v2")) as model:
        together = moe.activation_patching(model, clean, corrupted, METRIC, over=over, resamples=5)
        for text, (one, other) in enumerate(pairs):
            alone = moe.activation_patching(model, one, other, METRIC, over=over)
            found = together.isel(text=text)
            if over == "positions":
                assert np.isnan(found.effect.isel(position=slice(len(one), None))).all()
                found = found.isel(position=slice(len(one)))
            assert close(found.effect, alone.effect[0], 0.1)
    if over == "positions":
        assert close(together.effect_mean.isel(position=4), together.effect.isel(position=4, text=1))


def test_means_shares_and_intervals_are_over_texts():
    clean = torch.randint(3, 90, (6, 5), generator=torch.Generator().manual_seed(2))
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] + 31) % 87 + 3
    with moe.wrap(build("mixtral")) as model:
        result = moe.activation_patching(model, clean, corrupted, METRIC, layers=2, resamples=50, seed=4)
    effect, gap = result.effect.values, (result.clean - result.corrupted).values
    assert np.allclose(result.effect_interval.values, bootstrap_mean(effect, resamples=50, seed=4))
    ends = bootstrap_ratio(effect, gap, resamples=50, seed=4)
    assert np.allclose(result.normalised_interval.values, ends)
    assert np.allclose(result.normalised_overall, effect.sum(0) / gap.sum())
    provenance = json.loads(result.attrs["provenance"])
    assert (provenance["metric"], provenance["direction"]) == ("logit_difference", "restore")
    assert result.effect.attrs["units"] == "logits"


def test_metrics_are_bound_to_the_clean_run():
    with moe.wrap(build("mixtral")) as model:
        nll, kl = (
            moe.activation_patching(model, CLEAN, CORRUPTED, name, over="routes", layers=0, resamples=5)
            for name in ("nll", "kl")
        )
        log_p = model.run(CORRUPTED).logits.log_softmax(-1)[:, :-1]
        clean = model.run(CLEAN).logits.log_softmax(-1)
    assert close(nll.corrupted, -log_p.gather(2, CLEAN[:, 1:, None])[..., 0].mean(1))
    assert close(nll.clean, -clean[:, :-1].gather(2, CLEAN[:, 1:, None])[..., 0].mean(1))
    assert close(kl.clean, [0.0, 0.0]) and (kl.corrupted > 0.01).all()


def test_the_probability_of_an_answer_is_that_of_its_log():
    with moe.wrap(build("mixtral")) as model:
        run = model.run(CLEAN)
        log, plain = (kind((7, 8), position=-2).bind(run).of(run) for kind in (LogProbability, Probability))
    assert torch.allclose(log.exp(), plain)
    assert torch.allclose(plain.float(), run.logits.softmax(-1)[[0, 1], 3, [7, 8]])


@pytest.mark.parametrize("model_type", ["llama4_text", "zaya", "nemotron_h", "jetmoe", "longcat_flash"])
def test_contributions_add_up_to_what_is_routed(model_type):
    """Where weights multiply inputs, tokens skip all experts, or experts are narrower or return their input."""
    with moe.wrap(build_type(model_type)) as model:
        layer = model.layers[-1]
        run = model.run(CLEAN, read=["expert_out", "routed_out"])
        routed = run["routed_out", layer].masked_fill(~run.routing[layer].mask[..., None], 0.0)
        assert torch.allclose(contributions(run, layer).sum(2), routed, atol=1e-5)
        assert routed.abs().max() > 1e-2


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(over="neurons"), "invalid over .*: expected one of 'experts'.*got 'neurons'"),
        (dict(over="experts", point="moe_out"), "a point is patched over positions.*got experts"),
        (dict(direction="back"), "invalid direction .*: expected one of 'restore', 'corrupt', got 'back'"),
        (dict(over="positions", point="embed"), "point 'embed' is not of layers"),
        (dict(over="positions", point="router_scores"), "point 'router_scores' cannot be edited"),
        (
            dict(corrupted=CORRUPTED[:, :4]),
            "text 0 are not of one length: expected as many tokens.*got 5 clean and 4 corrupted",
        ),
        (
            dict(corrupted=CORRUPTED[:1]),
            "do not pair up: expected as many of one as of the other, got 2 clean and 1 corrupted",
        ),
        (dict(metric="perplexity"), "unknown metric"),
        (dict(metric=LogitDifference((1, 2, 3), (9,))), "answers do not fit the texts"),
        (dict(metric=Probability((1,), position=5)), "no position 5 in text 0: expected a position from -5 to 4"),
        (dict(metric=KL(position=-6)), "no position -6 in text 0"),
    ],
)
def test_what_cannot_be_right_is_refused(options, says):
    given = dict(clean=CLEAN, corrupted=CORRUPTED, metric=METRIC) | options
    with moe.wrap(build("mixtral")) as model, pytest.raises(Exception, match=says) as error:
        moe.activation_patching(model, **given)
    assert isinstance(error.value, BadInput) or "Literal" in str(error.value)


def test_other_refusals():
    left, right = (
        {"input_ids": CLEAN, "attention_mask": torch.tensor([mask, [1] * 5])}
        for mask in ([0, 1, 1, 1, 1], [1, 1, 1, 1, 0])
    )
    with moe.wrap(build("qwen2_moe"), StubTokenizer()) as model:
        with pytest.raises(BadInput, match="padded differently: expected the same attention mask"):
            moe.activation_patching(model, left, right, KL())
        with pytest.raises(BadInput, match="text 1 are not of one length.*Change words"):
            moe.activation_patching(model, ["abcd", "abc"], ["abce", "abcde"], KL())
        with pytest.raises(UnknownName, match="layer 1 has no experts"):
            moe.activation_patching(model, CLEAN, CORRUPTED, METRIC, layers=1)
        with pytest.raises(UnknownName, match="no point 'mlp_out' at layer 0"):
            moe.activation_patching(model, CLEAN, CORRUPTED, METRIC, over="positions", point="mlp_out", layers=0)
        with pytest.raises(UnknownName, match="unknown point 'mlp'"):
            moe.activation_patching(model, CLEAN, CORRUPTED, METRIC, over="positions", point="mlp")
    with moe.wrap(build_type("switch_transformers")) as model, pytest.raises(UnsupportedModel, match="no next token"):
        moe.activation_patching(model, CLEAN, CORRUPTED, METRIC)


def test_a_token_differs_where_any_entry_does():
    first = torch.zeros(1, 3, 2)
    second = first.clone()
    second[0, 0, 1] = second[0, 2, 0] = 1.0
    tokens = Tokens.from_mask(torch.tensor([[1, 1, 0]]), 3)
    assert differs(first, second, tokens).tolist() == [[True, False, False]]
