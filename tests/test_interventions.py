"""Named interventions, against the slow reference and against each other."""

import pytest
import torch

import moe_interp as moe
from moe_interp.errors import BadInput, UnsupportedModel
from tests.reference.model import forward
from tests.tiny import FAMILIES, build
from tests.tiny_types import build as build_type

IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(6))

LAYER = 2
WIDE = moe.top_k(5, renormalise=True)


def close(got: torch.Tensor, expected: torch.Tensor, clean: torch.Tensor) -> bool:
    scale = max((expected - clean).abs().max().item(), clean.abs().max().item())
    return (got - expected).abs().max().item() < 1e-5 * scale


def test_a_mask_given_by_its_place_is_a_mask():
    hf, mask = build("olmoe"), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    with moe.wrap(hf) as model, model.edit(moe.steer(torch.ones(64), layer=0, point="resid_mid", positions=0)):
        named, placed = hf(input_ids=IDS, attention_mask=mask).logits, hf(IDS, mask).logits
        torch.testing.assert_close(placed, named)


@pytest.mark.parametrize("family", FAMILIES)
def test_ablating_an_expert_zeroes_its_contribution_and_nothing_else(family):
    hf = build(family)
    clean = forward(hf, IDS)
    ids = clean.points["expert_ids", LAYER]
    expert = int(ids[0, 3, 1])

    def zero(outputs: torch.Tensor) -> torch.Tensor:
        return outputs * (ids != expert)[..., None]

    expected = forward(hf, IDS, edits={("expert_out", LAYER): zero}).logits
    with moe.wrap(hf) as model:
        run = model.run(IDS, edit=moe.ablate(layer=LAYER, expert=expert))
    assert run.touched == (int((ids == expert).sum()),)
    assert (expected - clean.logits).abs().max() > 1e-3
    assert close(run.logits, expected, clean.logits)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_top_k_keeps_the_heaviest(family, renormalise):
    hf = build(family)
    clean = forward(hf, IDS)

    def heaviest_two(weights: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in weights.flatten(0, 1):
            kept = row.clone()
            kept[row.argmin()] = 0.0
            rows.append(kept * (row.sum() / kept.sum()) if renormalise else kept)
        return torch.stack(rows).view_as(weights)

    edits = {("gate_weights", layer): heaviest_two for point, layer in clean.points if point == "gate_weights"}
    expected = forward(hf, IDS, edits=edits).logits
    with moe.wrap(hf) as model:
        got = model.run(IDS, edit=moe.top_k(2, renormalise=renormalise)).logits
    assert (expected - clean.logits).abs().max() > 1e-3
    assert close(got, expected, clean.logits)


def test_more_experts_than_the_model_chooses_follow_its_own_recipe():
    hf, wide = build("qwen3_moe"), build("qwen3_moe", num_experts_per_tok=5)
    expected = forward(wide, IDS)
    with moe.wrap(hf) as model:
        run = model.run(IDS, edit=moe.top_k(5))
        assert model.run(IDS).routing[LAYER].ids.shape[-1] == 3
    assert run.routing[LAYER].ids.shape[-1] == 5
    assert close(run.logits, expected.logits, expected.logits)


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_block_that_counts_the_routers_experts_counts_those_of_the_wider_router(renormalise):
    hf, wide = (build_type("openai_privacy_filter", num_experts_per_tok=k) for k in (3, 5))
    with torch.no_grad():
        expected, clean = wide(IDS).logits, hf(IDS).logits
    with moe.wrap(hf) as model:
        before = model.run(IDS).output
        got = model.run(IDS, edit=moe.top_k(5, renormalise=renormalise)).output
        assert torch.equal(model.run(IDS).output, before)
    assert close(got, expected, clean)
    assert (expected - clean).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "sums_to"), [("qwen3_moe", 1.0), ("mixtral", 1.0), ("gpt_oss", 1.0)])
def test_renormalised_weights_of_more_experts_keep_the_total(family, sums_to):
    with moe.wrap(build(family)) as model:
        for renormalise in (False, True):
            run = model.run(IDS, edit=moe.top_k(6, renormalise=renormalise))
            total = run.routing[LAYER].weights.sum(-1)
            assert torch.allclose(total, torch.full_like(total, sums_to), atol=1e-5)
    with moe.wrap(build("qwen3_moe", norm_topk_prob=False)) as model:
        own = model.run(IDS, read="router_logits").routing[0].weights.sum(-1)
        wide = model.run(IDS, edit=moe.top_k(6, renormalise=True, layers=0)).routing[0].weights.sum(-1)
        assert torch.allclose(wide, own, atol=1e-5)


@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v3", "deepseek_v32", "glm4_moe", "dots1", "kimi_linear", "nemotron_h", "longcat_flash", "zaya", "jamba"],
)
def test_renormalised_weights_of_more_experts_sum_to_those_of_the_routers_own(model_type):
    """Where a bias or groups choose, the K that the router would choose are not the K heaviest of the k."""
    # All groups, of which one is too small for five.
    given = {} if model_type in ("longcat_flash", "zaya", "jamba") else {"norm_topk_prob": False, "topk_group": 2}
    with moe.wrap(build_type(model_type, **given)) as model:
        layer = model.layers[0]
        own, more, wide = (model.run(IDS, edit=edit).routing[layer] for edit in ((), moe.top_k(5), WIDE))
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(8)).tolist():
        rows = (routing.weights[at[0], at[1]] for routing in (own, more, wide))
        total, before, after = sum(next(rows).tolist()), next(rows).tolist(), next(rows).tolist()
        expected = [weight * total / sum(before) for weight in before]
        assert after == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_routers_own_are_those_that_it_would_choose_under_the_other_edits():
    with moe.wrap(build_type("deepseek_v3", norm_topk_prob=False, n_group=1)) as model:
        layer = model.layers[0]
        push = moe.bias(layer=layer, expert=2, by=-3.0)
        own = model.run(IDS, edit=push).routing[layer].weights.sum(-1)
        for edits in ([push, WIDE], [WIDE, push], [WIDE, push, moe.swap(layer=layer, experts=(0, 1))]):
            assert torch.allclose(model.run(IDS, edit=edits).routing[layer].weights.sum(-1), own, rtol=1e-5)
        assert not torch.allclose(model.run(IDS).routing[layer].weights.sum(-1), own, rtol=1e-2)


@pytest.mark.parametrize("model_type", ["dbrx", "inkling_text"])
def test_weights_that_depend_on_who_else_is_chosen_are_not_rescaled_to_fewer(model_type):
    with moe.wrap(build_type(model_type)) as model:
        with pytest.raises(UnsupportedModel, match="cannot be rescaled to the total of its own K: expected k up to 3"):
            model.run(IDS, edit=WIDE)
        assert model.run(IDS, edit=moe.top_k(5)).routing[model.layers[0]].ids.shape[-1] == 5


def test_positions_count_real_tokens_from_either_end():
    hf = build("olmoe")
    row = torch.cat([torch.zeros(3, dtype=torch.long), IDS[1, :5]])
    inputs = {
        "input_ids": torch.stack([IDS[0], row]),
        "attention_mask": torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]]),
    }
    with moe.wrap(hf) as model:
        clean = model.run(inputs, read="resid_post")
        for position, columns in ((0, (0, 3)), (-1, (7, 7)), (2, (2, 5)), (-5, (3, 3))):
            edit = moe.apply("resid_post", lambda value: value + 1.0, layers=3, positions=position)
            run = model.run(inputs, read="resid_post", edit=edit)
            moved = (run["resid_post", 3] - clean["resid_post", 3]).abs().amax(-1) > 0.5
            expected = torch.zeros(2, 8, dtype=torch.bool)
            expected[0, columns[0]] = expected[1, columns[1]] = True
            assert torch.equal(moved, expected)
            assert run.touched == (2,)


def test_interventions_compose_in_the_order_given():
    hf = build("mixtral")

    def add(value: torch.Tensor) -> torch.Tensor:
        return value + 1.0

    def double(value: torch.Tensor) -> torch.Tensor:
        return value * 2.0

    with moe.wrap(hf) as model:
        clean = model.run(IDS, read="moe_out")["moe_out", 1]
        first, second = (moe.apply("moe_out", fn, layers=1) for fn in (add, double))
        assert torch.equal(model.run(IDS, read="moe_out", edit=[first, second])["moe_out", 1], (clean + 1) * 2)
        assert torch.equal(model.run(IDS, read="moe_out", edit=[second, first])["moe_out", 1], clean * 2 + 1)


def test_scaling_by_one_is_the_identity_and_scales_compose():
    hf = build("deepseek_v2")
    with moe.wrap(hf) as model:
        expert = int(model.run(IDS).routing[LAYER].ids[0, 0, 0])
        clean = model.run(IDS).logits
        assert torch.equal(model.run(IDS, edit=moe.scale(layer=LAYER, expert=expert, by=1.0)).logits, clean)
        twice = [moe.scale(layer=LAYER, expert=expert, by=2.0)] * 2
        four = moe.scale(layer=LAYER, expert=expert, by=4.0)
        assert torch.equal(model.run(IDS, edit=twice).logits, model.run(IDS, edit=four).logits)
        assert not torch.equal(model.run(IDS, edit=four).logits, clean)


def test_an_edit_that_touched_nothing_says_so():
    hf = build("mixtral")
    with moe.wrap(hf) as model:
        run = model.run(IDS[:1, :1])
        unused = next(e for e in range(8) if e not in run.routing[0].ids)
        edited = model.run(IDS[:1, :1], edit=moe.ablate(layer=0, expert=unused))
    assert edited.touched == (0,)
    assert torch.equal(edited.logits, run.logits)


def test_json_round_trip_does_the_same_thing():
    edits = [moe.ablate(layer=2, expert=1, positions=(-1, 0)), moe.scale(layer=0, expert=3, by=2.5), moe.top_k(2)]
    assert moe.from_json(moe.to_json(edits)) == edits
    with pytest.raises(moe.MoEError, match="cannot be written to JSON"):
        moe.to_json([moe.apply("moe_out", torch.neg)])
    with pytest.raises(moe.MoEError, match="unknown intervention 'explode'"):
        moe.from_json('[{"kind": "explode"}]')
    with pytest.raises(moe.MoEError, match="cannot read interventions"):
        moe.from_json('[{"kind": "scale", "nonsense": 1}]')
    with pytest.raises(moe.MoEError, match="cannot read interventions"):
        moe.from_json("not json")


def test_json_of_other_types_is_refused():
    kind = '{"kind": "%s", "layers": [2], '
    scale, point = kind % "scale" + '"experts": [1], ', kind % "setpoint" + '"point": "resid_mid", '
    for text in (
        "{}",
        "3",
        "[[]]",
        '[[["kind", "topk"], ["k", 2]]]',
        "[" * 100_000 + "]" * 100_000,
        '[{"kind": "scale", "experts": [1], "layers": 2, "by": 1.0}]',
        "[" + scale + '"by": "x"}]',
        "[" + scale + '"by": true}]',
        "[" + scale + '"by": NaN}]',
        "[" + scale + '"by": 1.0, "positions": ["0"]}]',
        "[" + scale + '"by": 1.0, "tokens": [true]}]',
        "[" + point + '"values": 3}]',
        "[" + point + '"values": {"tensor": {"dtype": "float32"}}}]',
        "[" + point + '"values": {"by_token": {"values": 3, "lengths": 3}}}]',
        "[" + kind % "noise" + '"point": "embed", "std": 1.0, "seed": "a"}]',
        "[" + kind % "noise" + '"point": 3, "std": 1.0}]',
        "[" + kind % "topk" + '"k": 2, "renormalise": "no"}]',
        "[" + kind % "topk" + '"k": 2.0}]',
        "[" + kind % "force" + '"experts": [1], "weights": {"a": 1}}]',
        "[" + kind % "patch" + '"experts": [1], "outputs": [3], "weights": [3]}]',
        "[" + kind % "mean" + '"experts": [1], "means": [3.0]}]',
        "[" + kind % "apply" + '"point": "embed", "fn": "neg"}]',
    ):
        with pytest.raises(BadInput):
            moe.from_json(text)
    assert moe.from_json("[" + scale + '"by": 2}]') == [moe.scale(layer=2, expert=1, by=2.0)]
