"""Coalitions, against edited forwards of the slow reference and against what must hold."""

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp.analyses.metrics import LogitDifference
from moe_interp.errors import BadInput, UnknownName, UnsupportedModel
from moe_interp.stats import bootstrap_mean
from tests.reference import patching as slow
from tests.reference.patching import forward
from tests.test_patching import CLEAN, METRIC, SCORE, close
from tests.tiny import build
from tests.tiny_types import build as build_type


def chosen(hf, layers) -> list[tuple[int, int]]:
    """The heaviest expert of the last token of the first text, at each layer in turn (another each time)."""
    points, found = forward(hf, CLEAN).points, []
    for layer in layers:
        ids, weights = points["expert_ids", layer][0, -1], points["gate_weights", layer][0, -1]
        order = ids[weights.argsort(descending=True)].tolist()
        found.append((layer, next(expert for expert in order if (layer, expert) not in found)))
    return found


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_effects_interactions_and_shapley_values(family):
    hf = build(family)
    experts = chosen(hf, (1 if family != "qwen2_moe" else 0, 2, 2))
    with moe.wrap(hf) as model:
        result = moe.coalitions(model, CLEAN, experts, METRIC, size=3, resamples=20, seed=1)
    base = SCORE(forward(hf, CLEAN).logits)
    values = {frozenset(): torch.zeros(2)}
    members = result.member.values
    for row in members:
        some = frozenset(np.flatnonzero(row).tolist())
        values[some] = SCORE(slow.without(hf, CLEAN, [experts[one] for one in some])) - base
    assert len(values) == 8
    names = [f"{layer}.{expert}" for layer, expert in experts]
    assert result.expert.values.tolist() == names
    assert result.coalition.values.tolist()[3] == "+".join(names[:2])
    for number, row in enumerate(members):
        some = frozenset(np.flatnonzero(row).tolist())
        assert close(result.effect[:, number], values[some])
        assert close(result.interaction[:, number], slow.interaction(values, some))
        assert int(result["size"][number]) == len(some)
    for one in range(3):
        assert close(result.shapley[:, one], slow.shapley(values, one, 3))
    assert np.abs(result.interaction.values[:, 3:]).max() > 1e-3
    assert np.allclose(result.shapley_interval.values, bootstrap_mean(result.shapley.values, resamples=20, seed=1))
    assert np.allclose(result.interaction_mean, result.interaction.mean("text"))
    assert close(result.base, base)


@pytest.mark.parametrize("size", [1, 2])
def test_sets_up_to_a_size(size):
    with moe.wrap(build("mixtral")) as model:
        result = moe.coalitions(model, CLEAN, [(0, 1), (1, 2), (2, 3)], "kl", size=size, resamples=5)
    assert result.sizes["coalition"] == (3, 6)[size - 1]
    assert "shapley" not in result and result["size"].values.max() == size
    assert np.array_equal(result.interaction[:, :3], result.effect[:, :3])


def test_the_last_layers_experts_add_up_where_logits_are_linear():
    """Nothing but the final norm, here none, stands between them and the logits."""
    hf = build("olmoe")
    hf.model.norm.forward = lambda hidden: hidden
    experts = chosen(hf, (3, 3, 3))
    with moe.wrap(hf) as model:
        result = moe.coalitions(model, CLEAN, experts, METRIC, size=3, resamples=5)
    assert close(result.interaction[:, 3:], np.zeros((2, 4)))
    assert close(result.shapley, result.effect[:, :3])
    assert np.abs(result.effect.values).max() > 1e-2


def test_experts_that_no_token_uses_change_nothing_exactly():
    hf = build("mixtral")
    ids = CLEAN[:1, :2]
    used = forward(hf, ids).points["expert_ids", 1].flatten().tolist()
    unused = [(1, one) for one in range(8) if one not in used][:2]
    assert len(unused) == 2
    with moe.wrap(hf) as model:
        for how in ("zero", "forbid"):
            result = moe.coalitions(model, ids, [*unused, (1, used[0])], METRIC, how=how)
            pair = "+".join(f"1.{expert}" for _, expert in unused)
            assert float(result.effect.sel(coalition=pair)[0]) == 0.0
            assert int(result.tokens.sel(coalition=pair)[0]) == 0
            assert abs(float(result.effect.sel(coalition=f"1.{used[0]}")[0])) > 1e-3


@pytest.mark.parametrize("how", ["mean", "resample", "forbid"])
def test_other_ablations_are_those_of_ablate(how):
    with moe.wrap(build("mixtral")) as model:
        source = model.run(CLEAN.flip(1), read="expert_out")
        ids = source.routing[2].ids.flatten().bincount().argsort(descending=True)[:2].tolist()
        experts = [(2, one) for one in ids]
        given = {
            "mean": dict(mean={one: torch.full((64,), 0.1 * one[1]) for one in experts}),
            "resample": dict(run=source, seed=4),
            "forbid": {},
        }[how]
        result = moe.coalitions(model, CLEAN, experts, METRIC, how=how, resamples=5, **given)
        base = SCORE(model.run(CLEAN).logits)
        edits = [moe.ablate(layer=2, expert=one, how=how, **given) for one in ids]
        for number, some in enumerate(([edits[0]], [edits[1]], edits)):
            assert close(result.effect[:, number], SCORE(model.run(CLEAN, edit=some).logits) - base)
    assert np.abs(result.effect.values).max() > 1e-3


def test_padding_changes_nothing():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    padded = {"input_ids": CLEAN.masked_fill(mask == 0, 0), "attention_mask": mask}
    with moe.wrap(build("gpt_oss")) as model:
        experts = [(1, int(model.run(padded).routing[1].ids[0, 3, slot])) for slot in range(2)]
        together = moe.coalitions(model, padded, experts, METRIC, resamples=5)
        alone = moe.coalitions(model, CLEAN[0, 2:], experts, METRIC)
    assert close(together.effect[0], alone.effect[0], 0.1)
    assert np.array_equal(together.tokens[0], alone.tokens[0])


def test_what_cannot_be_right_is_refused():
    with moe.wrap(build("mixtral")) as model:

        def refused(says, experts=((1, 2), (2, 3)), metric=METRIC, **options):
            with pytest.raises(Exception, match=says) as error:
                moe.coalitions(model, CLEAN, list(experts), metric, **options)
            assert isinstance(error.value, BadInput) or "Literal" in str(error.value)

        refused("not a set of experts: expected \\(layer, expert\\) of each, once, got \\[\\]", experts=[])
        refused("not a set of experts", experts=[(1, 2), (1, 2)])
        for wrong in ([5, 3], (5, 3), [(1, 2, 3)], [(1, "2")]):
            refused(
                "not a set of experts: expected \\(layer, expert\\) of each, got.*Write \\[\\(5, 3\\)", experts=wrong
            )
        refused("no sets of that size: expected 1 to 2, the experts given, got 3", size=3)
        refused("invalid size", size=0)
        refused(
            "too many sets: expected at most 4,096, got 8,191. Take fewer",
            experts=[(layer, one) for layer in (0, 1) for one in range(8)][:13], size=13,
        )  # fmt: skip
        refused("invalid how .*got 'hard'", how="hard")
        refused("ablation by mean needs more", how="mean")
        refused("unknown metric", metric="loss")
        refused("too few experts left at layer 1", experts=[(1, one) for one in range(6)], how="forbid", size=6)
        with pytest.raises(UnknownName, match="unknown expert 8 at layer 1"):
            moe.coalitions(model, CLEAN, [(1, 8)], LogitDifference((1,), (2,)), size=1)
    with moe.wrap(build_type("switch_transformers")) as model, pytest.raises(UnsupportedModel, match="no next token"):
        moe.coalitions(model, CLEAN, [(1, 0)], METRIC, size=1)
