"""Laws that interventions obey on every family, to the last bit; conflicts; standing edits; what is not computed."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_interp as moe
from moe_interp.adapters.experts import Fused
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from tests.reference import interventions as slow
from tests.reference.model import forward
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import FAMILIES, build

IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(8))
LAYER = 2


@cache
def opened(family: str, dtype: torch.dtype = torch.float32) -> tuple[moe.MoEModel, moe.Run]:
    model = moe.wrap(build(family, dtype=dtype))
    return model, model.run(IDS, read=["expert_out", "resid_post"])


@st.composite
def places(draw: Any) -> dict[str, Any]:
    layers = draw(st.sampled_from([(2,), (3,), (2, 3)]))
    experts = draw(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
    positions = draw(st.none() | st.lists(st.integers(-7, 6), min_size=1, max_size=3, unique=True))
    return {"layer": layers, "expert": experts, "positions": positions}


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), ("deepseek_v3", torch.bfloat16)]
)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(where=places())
def test_laws_that_hold_to_the_last_bit(family, dtype, where):
    model, clean = opened(family, dtype)
    back = {"layer": where["layer"], "positions": where["positions"]}
    identities = {
        "scale by 1": [moe.scale(**where, by=1.0)],
        "push by 0": [moe.bias(**where, by=0.0)],
        "patch with itself": [moe.patch(clean, **where)],
        "ablate, then patch back": [moe.ablate(**where), moe.patch(clean, **where)],
        "ablate, then patch the point back": [moe.ablate(**where)]
        + [moe.patch(clean, layer=layer, point="resid_post") for layer in where["layer"]],
        "the model's own route": [
            moe.patch_route(clean, layer=layer, positions=where["positions"]) for layer in where["layer"]
        ],
        "the model's own ids": [
            moe.force(clean.routing[layer].ids, layer=layer, positions=where["positions"]) for layer in where["layer"]
        ],
        "all of the weight": [moe.share(1.0), moe.top_k(3)],
    }
    if len(where["expert"]) > 1:
        pair = {"experts": where["expert"][:2], **back}
        identities["swap twice"] = [moe.swap(**pair), moe.swap(**pair)]
    for name, edits in identities.items():
        run = model.run(IDS, edit=edits)
        assert torch.equal(run.logits, clean.logits), name
    first = {**where, "layer": where["layer"][0]}
    chosen = torch.isin(clean.routing[first["layer"]].ids, torch.tensor(where["expert"]))
    used = int(chosen[:, _columns(where["positions"])].sum())
    ablated = model.run(IDS, edit=moe.ablate(**first))
    assert ablated.touched == (used,)
    assert torch.equal(ablated.logits, clean.logits) is (used == 0)


def _columns(positions: list[int] | None) -> list[int]:
    return list(range(7)) if positions is None else sorted({position % 7 for position in positions})


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_multiply_and_a_forbidden_expert_is_nowhere(family):
    model, clean = opened(family)
    expert = int(clean.routing[LAYER].ids[0, 2, 0])
    one = {"layer": LAYER, "expert": expert}
    twice = model.run(IDS, edit=[moe.scale(**one, by=2.0), moe.scale(**one, by=4.0)]).logits
    assert torch.equal(twice, model.run(IDS, edit=moe.scale(**one, by=8.0)).logits)
    forbidden = model.run(IDS, edit=moe.ablate(**one, how="forbid")).routing[LAYER]
    assert not (forbidden.ids == expert).any()
    untouched = (clean.routing[LAYER].ids != expert).all(-1)
    before, after = (
        torch.zeros(2, 7, 8).scatter_add(-1, one.ids, one.weights) for one in (clean.routing[LAYER], forbidden)
    )  # the slots of an unsorted top-k may come in another order
    assert torch.equal(after[untouched], before[untouched])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_experts_are_not_computed(family, monkeypatch):
    rows: list[int] = []
    outputs = Fused.outputs

    def counted(self: Any, experts: Any, hidden: Any, ids: Any, on_act: Any = None) -> Any:
        rows.append(ids.numel())
        return outputs(self, experts, hidden, ids, on_act)

    monkeypatch.setattr(Fused, "outputs", counted)
    model, _ = opened(family)
    model.run(IDS, read="expert_out")
    whole = sum(rows)
    rows.clear()
    model.run(IDS)  # transformers' own run, where nobody looks
    assert not rows
    one = model.run(IDS, edit=moe.top_k(1)).logits
    assert sum(rows) == whole // 3
    rows.clear()
    again = model.run(IDS, edit=moe.top_k(1), read="expert_out").logits  # who looks at them gets them all
    assert sum(rows) == whole
    assert (one - again).abs().max() < 1e-5 * again.abs().max()
    rows.clear()
    model.run(IDS, edit=moe.top_k(1), grad=True)  # a dropped slot has a gradient
    assert sum(rows) == whole
    model.run(IDS, edit=moe.apply("gate_weights", torch.zeros_like))
    assert model.run(IDS, edit=moe.top_k(1, positions=[0])).touched[0] == 2 * 2 * len(model.layers)


def test_standing_edits_come_before_those_of_a_run():
    model, clean = opened("mixtral")
    expert = int(clean.routing[LAYER].ids[0, 2, 0])
    ablate, scale = moe.ablate(layer=LAYER, expert=expert), moe.scale(layer=3, expert=expert, by=2.0)
    force = moe.force([expert], layer=LAYER)
    both = model.run(IDS, edit=[ablate, scale, force])
    with torch.no_grad():
        plain = model.hf(input_ids=IDS, use_cache=False).logits
    with model.edit(ablate) as standing, model.edit([scale]) as second:
        run = model.run(IDS, edit=force)
        assert torch.equal(run.logits, both.logits)
        assert run.touched == both.touched
        assert standing.touched == second.touched == [0]
        with torch.no_grad():
            direct = model.hf(input_ids=IDS, use_cache=False).logits
        assert standing.touched[0] > 0 and second.touched[0] > 0
        written = model.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert model.hf(input_ids=IDS, use_cache=False).logits.requires_grad
    expected = model.run(IDS, edit=[ablate, scale])
    assert torch.equal(direct, expected.logits)
    assert torch.equal(
        written,
        model.generate(IDS[:1], edit=[ablate, scale], max_new_tokens=3, do_sample=False, eos_token_id=None),
    )
    with torch.no_grad():
        assert torch.equal(model.hf(input_ids=IDS, use_cache=False).logits, plain)
    with pytest.raises(moe.MoEError, match="unknown expert 8"), model.edit(moe.ablate(layer=LAYER, expert=8)):
        pass
    assert torch.equal(model.run(IDS).logits, clean.logits)


def test_an_error_inside_leaves_no_standing_edit():
    model, clean = opened("mixtral")
    with pytest.raises(ValueError, match="mine"), model.edit(moe.ablate(layer=LAYER, expert=0)):
        raise ValueError("mine")
    assert torch.equal(model.run(IDS).logits, clean.logits)
    assert model._standing == []


def test_an_edit_ends_with_its_own_with_in_whatever_order():
    hf = build("mixtral")
    with moe.wrap(hf) as model:
        ablate, wide, swap = moe.ablate(layer=LAYER, expert=1), moe.top_k(5), moe.swap(layers=(0, 1))
        clean, chosen = model.run(IDS), [layer.mlp.gate.top_k for layer in hf.model.layers]
        expected = {some: model.run(IDS, edit=some) for some in ((ablate, wide, swap), (ablate, swap), (ablate,))}
        with model.edit(ablate):
            first, second = model.edit(wide), model.edit(swap)
            first.__enter__()
            second.__enter__()
            found = [model.run(IDS)]
            first.__exit__(None, None, None)
            found.append(model.run(IDS))
            second.__exit__(None, None, None)
            found.append(model.run(IDS))
        for run, right in zip(found, expected.values(), strict=True):
            assert torch.equal(run.logits, right.logits) and run.touched == right.touched
        assert [layer.mlp.gate.top_k for layer in hf.model.layers] == chosen
        assert model._standing == []
        assert torch.equal(model.run(IDS).logits, clean.logits)
        assert torch.equal(hf(input_ids=IDS, use_cache=False).logits, clean.logits)


def test_standing_edits_reach_analyses():
    model, clean = opened("olmoe")
    expert = int(clean.routing[LAYER].ids[0, -1, 0])
    with model.edit(moe.ablate(layer=LAYER, expert=expert)):
        lens = moe.expert_lens(model, IDS[0])
    plain = moe.expert_lens(model, IDS[0])
    assert not lens["kl"].equals(plain["kl"])


def test_patching_across_padding_goes_by_the_number_of_the_token():
    model, _ = opened("deepseek_v3")
    short = IDS[:1, :4]
    left = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1]]),
    }
    other = torch.randint(3, 90, (1, 4), generator=torch.Generator().manual_seed(9))
    expert = int(model.run(short).routing[LAYER].ids[0, 1, 0])
    for source in (short, left):
        run = model.run(source, read=["expert_out", "resid_mid"])
        for edit in (
            moe.patch(run, layer=LAYER, expert=expert),
            moe.patch(run, layer=LAYER, point="resid_mid"),
            moe.patch_route(run, layer=LAYER),
        ):
            plain = model.run(other, edit=edit).logits
            padded = {"input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), other], 1)}
            got = model.run({**padded, "attention_mask": left["attention_mask"]}, edit=edit).logits[:, 3:]
            assert (got - plain).abs().max() < 1e-4 * plain.abs().max()
            assert (plain - model.run(other).logits).abs().max() > 1e-3


ONE = {"layer": LAYER, "expert": 1}


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (lambda run: [moe.top_k(4), moe.top_k(5)], "contradict each other at layer 0: expected one number of experts"),
        (lambda run: [moe.randomize(), moe.randomize(seed=1)], "contradict each other.*decides a token's experts"),
        (
            lambda run: [moe.force([0, 1, 2], layer=2), moe.patch_route(run, layer=2)],
            "contradict each other at layer 2",
        ),
        (
            lambda run: [moe.force([1], layer=2), moe.ablate(**ONE, how="forbid")],
            "an expert forced or forbidden, not both",
        ),
        (
            lambda run: [moe.mask(layer=2, expert=[0, 1, 2]), moe.mask(layer=2, expert=[3, 4, 5])],
            "too few experts left",
        ),
        (lambda run: moe.mask(layer=2, expert=range(6)), "too few experts left at layer 2: expected at least 3.*got 2"),
        (lambda run: moe.force([0, 1, 2, 3], layer=2), "4 experts cannot be forced at layer 2: expected up to 3"),
        (lambda run: moe.force([0, 1], layer=2, weights="kept"), "2 experts cannot be forced.*a slot each"),
        (lambda run: moe.force([0, 0], layer=2), "different expert ids"),
        (lambda run: moe.force([0], layer=2, weights=[0.5, 0.5]), "expected 1 weights"),
        (lambda run: moe.force([0], layer=2, weights="mine"), "unknown weights: expected one of 'own', 'kept'"),
        (
            lambda run: moe.force(torch.arange(2).expand(2, 7, 2), layer=2, weights="kept"),
            "3 slots a token, got 2",
        ),
        (lambda run: moe.swap(layer=2, experts=(1, 1)), "not two experts to swap"),
        (lambda run: moe.swap(), "expected layer and two experts, or two layers"),
        (lambda run: moe.swap(layers=(0, 9)), "unknown layer 9"),
        (lambda run: moe.share(0.0), "above 0 and up to 1"),
        (lambda run: moe.top_k(5, positions=0), "more experts at some tokens only"),
        (lambda run: moe.randomize(weights="new"), "invalid weights for randomize: expected one of 'kept', 'fresh'"),
        (lambda run: moe.mask(**ONE, on="scores"), "invalid on for mask: expected one of 'selection', 'logits'"),
        (lambda run: moe.ablate(**ONE, how="vanish"), "invalid how for ablate: expected one of 'zero'"),
        (lambda run: moe.ablate(**ONE, how="mean"), "needs more: expected mean=moe.mean_contributions"),
        (lambda run: moe.ablate(**ONE, how="resample"), "needs more: expected run="),
        (lambda run: moe.mask(layer=2, expert=None), "no expert: expected one expert or several.*A router must choose"),
        (lambda run: moe.ablate(layer=2, expert=None, how="forbid"), "no expert: expected one expert or several"),
        (lambda run: moe.ablate(layer=2, expert=None, how="resample", run=run), "no expert.*contribution of its own"),
        (lambda run: moe.ablate(layer=None, expert=1, how="mean", mean={}), "no layer: expected one layer or several"),
        (lambda run: moe.steer(torch.ones(64), layer=2), "no expert.*Name experts, or a point"),
        (lambda run: moe.patch(run, layer=2), "no expert.*Name experts, or a point"),
        (lambda run: moe.patch(run, layer=3, expert=1), "which layer of 'expert_out'.*got 3"),
        (lambda run: moe.patch(run, layer=2, expert=1, point="moe_out"), "a point or an expert"),
        (
            lambda run: moe.patch_route(run, layer=9),
            r"the run has no routing at layer 9: expected one of \[0, 1, 2, 3\]",
        ),
        (lambda run: moe.replace(torch.zeros(65), **ONE), r"values do not fit 'expert_out'.*B S K D"),
        (lambda run: moe.replace([float("nan")], **ONE), "values are not finite"),
        (lambda run: moe.replace("vector", **ONE), "not values: expected a tensor or numbers"),
        (
            lambda run: moe.replace(torch.zeros(3, 7, 64), layer=2, point="resid_mid"),
            "or of 2, as many as are run here, got values of 3",
        ),
        (lambda run: moe.replace(torch.zeros(64), layer=2, point="router_scores"), "cannot be edited"),
        (lambda run: moe.ablate(**ONE, tokens=torch.zeros(2, 7, dtype=torch.bool)), "can never touch anything"),
        (lambda run: moe.ablate(**ONE, tokens=torch.ones(2, 7)), "not marks of tokens: expected booleans"),
        (lambda run: moe.ablate(**ONE, tokens=torch.ones(3, 7) > 0), "marks for 3 texts"),
        (lambda run: moe.ablate(**ONE, tokens=torch.arange(9)[None] > 7), "marks from token 8 on"),
    ],
)
def test_what_cannot_be_is_an_error(edits, message):
    model, _ = opened("mixtral")
    clean = model.run(IDS, read=moe.select("expert_out", layers=2))
    with pytest.raises(moe.MoEError, match=message):
        model.run(IDS, edit=edits(clean))
    assert torch.equal(model.run(IDS).logits, clean.logits)


def test_interventions_that_cannot_meet_do_not_conflict():
    model, clean = opened("mixtral")
    first, second = moe.force([0, 1, 2], layer=2, positions=0), moe.force([3, 4, 5], layer=2, positions=[1, 2])
    ids = model.run(IDS, edit=[first, second]).routing[2].ids
    assert set(ids[:, 0].flatten().tolist()) == {0, 1, 2}
    assert set(ids[:, 1:3].flatten().tolist()) == {3, 4, 5}
    assert torch.equal(ids[:, 3:], clean.routing[2].ids[:, 3:])


def test_a_group_that_was_not_chosen_has_no_weight_to_give():
    hf = build("deepseek_v2", topk_method="group_limited_greedy")
    with moe.wrap(hf) as model:
        chosen = set(model.run(IDS[:1, :1]).routing[LAYER].ids.flatten().tolist())
        outside = 0 if min(chosen) > 3 else 7
        with pytest.raises(moe.MoEError, match="outside the groups that the router chose has no weight"):
            model.run(IDS[:1, :1], edit=moe.force([outside], layer=LAYER))
        run = model.run(IDS[:1, :1], edit=moe.force([outside], layer=LAYER, weights=[0.5]))
    assert run.routing[LAYER].ids[0, 0, 0] == outside
    inside = {0, 1, 2, 3} if outside == 7 else {4, 5, 6, 7}
    with moe.wrap(hf) as model:  # forbidding stays within the groups as long as there are enough
        left = model.run(IDS[:1, :1], edit=moe.mask(layer=LAYER, expert=min(chosen))).routing[LAYER].ids
    assert set(left.flatten().tolist()) == inside - {min(chosen)}


@pytest.mark.parametrize(
    ("family", "given"), [("deepseek_v3", {}), ("deepseek_v2", {"topk_method": "group_limited_greedy"})]
)
def test_forbidding_leaves_a_next_best_or_is_refused(family, given):
    """Groups of four, of which one is chosen, and K = 3: where that is the first, two of it cannot be forbidden."""
    hf, forbidden = build(family, **given), (0, 1, 5)

    def barred(row: torch.Tensor, at: slow.Where) -> torch.Tensor:
        return torch.stack([row.new_tensor(-torch.inf) if e in forbidden else score for e, score in enumerate(row)])

    with moe.wrap(hf) as model:
        ids = model.run(IDS).routing[LAYER].ids
        first = (ids < 4).all(dim=2)
        assert 0 < first.sum() < first.numel()
        text, position = first.nonzero()[0].tolist()
        message = f"too few experts left at layer 2 for token {position} of text {text}: expected at least 3.*got 2"
        for edits in (
            moe.mask(layer=LAYER, expert=forbidden),
            [moe.mask(layer=LAYER, expert=expert) for expert in forbidden],
            moe.mask(layer=LAYER, expert=forbidden, positions=position),
        ):
            with pytest.raises(BadInput, match=message):
                model.run(IDS, edit=edits)
        got = model.run(IDS, edit=moe.mask(layer=LAYER, expert=forbidden, tokens=~first))
    expected = slow.run(hf, IDS, LAYER, [("selection", barred)], lambda at: not bool(first[at]))
    assert (got.logits - expected.logits).abs().max() < 1e-5 * expected.logits.abs().max()
    assert (got.logits - forward(hf, IDS).logits).abs().max() > 1e-3


def test_without_groups_the_next_best_are_those_of_all():
    hf, forbidden = build("deepseek_v3", n_group=1, topk_group=1), (0, 1, 4, 6)

    def barred(row: torch.Tensor, at: slow.Where) -> torch.Tensor:
        return torch.stack([row.new_tensor(-torch.inf) if e in forbidden else score for e, score in enumerate(row)])

    with moe.wrap(hf) as model:
        got, clean = model.run(IDS, edit=moe.mask(layer=LAYER, expert=forbidden)), model.run(IDS)
    expected = slow.run(hf, IDS, LAYER, [("selection", barred)]).logits
    assert (got.logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (got.logits - clean.logits).abs().max() > 1e-3


def test_the_bias_of_a_router_beats_a_mask_of_its_logits():
    """Where a bias is added to the scores before the choice, minus infinity in the logits does not forbid."""
    hf = build("deepseek_v3")
    expert = 5
    hf.model.layers[LAYER].mlp.gate.e_score_correction_bias[expert] = 10.0
    with moe.wrap(hf) as model:
        one = {"layer": LAYER, "expert": expert}
        assert (model.run(IDS, edit=moe.mask(**one, on="logits")).routing[LAYER].ids == expert).any()
        assert not (model.run(IDS, edit=moe.mask(**one)).routing[LAYER].ids == expert).any()


def test_the_reference_selects_as_the_model_does():
    for family in FAMILIES:
        hf = build(family)
        ids = forward(hf, IDS).points["expert_ids", LAYER]
        assert torch.equal(opened(family)[1].routing[LAYER].ids, ids)


CORPUS = Corpus.from_texts({"a": ["ab cd ef gh", "hello there all"], "b": ["one two three", "xyz uvw rst"]})


@pytest.mark.parametrize(
    ("analysis", "message"),
    [
        (lambda model: moe.norm_and_weight(model, CORPUS), "outputs of all experts of layer 2"),
        (lambda model: moe.expert_similarity(model, CORPUS, weights=False), "outputs of all experts of layer 2"),
        (lambda model: moe.ensemble_similarity(model, CORPUS), "outputs of experts that were not chosen of layer 2"),
        (lambda model: moe.attribution_patching(model, IDS, neurons=True, sample=1), "shares of neurons of layer 2"),
    ],
)
def test_analyses_that_call_experts_themselves_refuse_standing_edits_of_these(analysis, message):
    message = f"{message} would not be those of the edited model"
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        for standing in (moe.scale(layer=2, expert=range(8), by=3.0), moe.swap(layers=(2, 3))):
            with model.edit(standing), pytest.raises(BadInput, match=message):
                analysis(model)
        with model.edit(moe.top_k(2)):
            analysis(model)


def test_layers_that_a_standing_edit_leaves_alone_are_measured_under_it():
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        with model.edit(moe.scale(layer=0, expert=range(8), by=3.0)):
            found = moe.norm_and_weight(model, CORPUS, layers=2, tokens_per_document=100, resamples=5)
            sums = moe.super_experts(model, CORPUS, resamples=5).norm.sel(layer=2)
        assert np.allclose(found.norm_chosen.sel(layer=2), sums, rtol=1e-4)


def test_attribution_refuses_standing_edits_that_set_contributions():
    model, clean = opened("olmoe")
    with model.edit(moe.patch(clean, layer=LAYER, expert=1)):
        with pytest.raises(BadInput, match="attributions of layer 2 would not be those of the edited model"):
            moe.attribution_patching(model, IDS, sample=1)
        found = moe.attribution_patching(model, IDS, layers=3, sample=None)
    assert float(found.rank_correlation) > 0.5


@pytest.mark.parametrize(
    "edits",
    [
        [moe.top_k(8), moe.mask(layer=0, expert=2)],
        [moe.mask(layer=0, expert=2, positions=0), moe.top_k(8)],
        [moe.top_k(6), moe.mask(layer=0, expert=range(4), tokens=torch.ones(2, 7) > 0)],
        [moe.top_k(8), moe.mask(layer=0, expert=2, on="logits")],
    ],
)
def test_a_wider_router_needs_as_many_experts_left(edits):
    model, clean = opened("olmoe")
    with pytest.raises(BadInput, match="too few experts left at layer 0.*expected at least [68].*got [74]"):
        model.run(IDS, edit=edits)
    left = model.run(IDS, edit=[moe.top_k(6), moe.mask(layer=0, expert=(2, 5))]).routing[0].ids
    assert set(left.flatten().tolist()) == {0, 1, 3, 4, 6, 7}
    assert torch.equal(model.run(IDS).logits, clean.logits)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_a_mask_of_logits_leaves_as_many_as_are_chosen(family):
    model, _ = opened(family)
    for experts in (range(8), range(6)):
        with pytest.raises(BadInput, match="too few experts left at layer 2 for token 3 of text 0: .*at least 3"):
            model.run(IDS, edit=moe.mask(layer=2, expert=experts, on="logits", positions=3))
    both = [moe.mask(layer=2, expert=range(first, first + 3), on="logits") for first in (0, 3)]
    with pytest.raises(BadInput, match="too few experts left at layer 2 for token 0 of text 0: .*got 2"):
        model.run(IDS, edit=both)
    left = model.run(IDS, edit=moe.mask(layer=2, expert=range(5), on="logits")).routing[2]
    if family == "olmoe":  # a selection bias is added later: it does not forbid
        assert (left.ids >= 5).all()


def test_more_experts_than_the_chosen_groups_have_are_refused():
    with moe.wrap(build("deepseek_v3")) as model:
        for k in (5, 6, 8):
            with pytest.raises(BadInput, match=f"too few experts .* at layer 1 for token 0 .*at least {k} .*got 4"):
                model.run(IDS, edit=moe.top_k(k))
        assert model.run(IDS, edit=moe.top_k(4)).routing[1].ids.shape[-1] == 4
    with moe.wrap(build("deepseek_v3", topk_group=2)) as model:
        assert model.run(IDS, edit=moe.top_k(8)).routing[1].ids.shape[-1] == 8


@pytest.mark.parametrize("given", [True, [True] * 7, torch.ones(7) > 0, torch.tensor(True), [0, False]])
def test_truth_values_are_no_positions_and_no_layers(given):
    for make in (
        lambda: moe.scale(layer=0, expert=0, by=2.0, positions=given),
        lambda: moe.scale(layer=given, expert=0, by=2.0),
        lambda: moe.scale(layer=0, expert=given, by=2.0),
        lambda: moe.select("moe_out", positions=given),
    ):
        with pytest.raises(BadInput, match="expected a whole number, a list of whole numbers or None, got .*tokens="):
            make()
    with pytest.raises(BadInput, match="expected a whole number"):
        moe.top_k(True)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: moe.scale(**ONE, by=NAN), "invalid by for scale: expected a finite number, got nan"),
        (lambda: moe.scale(**ONE, by="x"), "invalid by for scale: expected a finite number, got 'x'"),
        (lambda: moe.scale(**ONE, by=None), "invalid by for .*"),
        (lambda: moe.scale(**ONE, by=torch.ones(2)), "invalid by for .*"),
        (lambda: moe.steer(torch.ones(64), **ONE, by=NAN), "invalid by for .*"),
        (lambda: moe.steer(torch.ones(64), layer=2, point="resid_mid", by=-INF), "invalid by for .*.*got -inf"),
        (lambda: moe.bias(**ONE, by=INF), "invalid by for .*.*got inf"),
        (lambda: moe.noise(NAN), "invalid std"),
        (lambda: moe.noise(-1.0), "not a standard deviation: expected one from 0 on, got -1.0"),
        (lambda: moe.share("x"), "invalid of_weight for share"),
        (lambda: moe.force((0, 1, 2), layer=2, weights=(NAN, 1, 1)), "a weight is no number"),
        (lambda: moe.force((0,), layer=2, weights=["x"]), "a weight is no number"),
        (lambda: moe.force((0,), layer=2, weights=None), "weights to force: expected .*got None"),
        (lambda: moe.randomize(seed=2**63), "invalid seed for randomize: .*64 bits"),
        (lambda: moe.noise(1.0, seed=-(2**63) - 1), "invalid seed"),
        (lambda: moe.randomize(seed=0.5), "expected a whole number, got 0.5"),
        (lambda: moe.top_k(2, renormalise="no"), "invalid renormalise for top_k: expected True or False, got 'no'"),
    ],
)
def test_numbers_are_finite_when_an_intervention_is_made(make, message):
    with pytest.raises(BadInput, match=message):
        make()


def test_numbers_of_any_kind_are_numbers():
    vector = torch.ones(64)
    for one in (2, np.float32(2), torch.tensor(2)):
        assert moe.scale(**ONE, by=one) == moe.scale(**ONE, by=2.0)
        assert moe.steer(vector, **ONE, by=one) == moe.steer(vector, **ONE, by=2.0)
    given = moe.force((0, 1), layer=2, weights=torch.tensor([0.5, 0.25]))
    assert given == moe.force((0, 1), layer=2, weights=(0.5, 0.25))
    assert moe.force(0, layer=2, weights=1) == moe.force(0, layer=2, weights=[1.0])
    assert moe.noise(0.0).std == 0.0 and moe.randomize(seed=2**63 - 1).seed == 2**63 - 1


def test_contributions_of_another_width_are_refused():
    model, _ = opened("olmoe")
    for mean in (torch.ones(1), torch.ones(3)):
        with pytest.raises(BadInput, match=f"contributions do not fit .*expected 64.*got {len(mean)}"):
            model.run(IDS, edit=moe.ablate(layer=0, expert=0, how="mean", mean={(0, 0): mean}))
    for mean in (torch.ones(()), torch.ones(2, 64)):
        with pytest.raises(BadInput, match="no mean contribution of expert 0 of layer 0: expected a vector"):
            moe.ablate(layer=0, expert=0, how="mean", mean={(0, 0): mean})
    with pytest.raises(BadInput, match="means of several widths: expected one width, got 1 and 64"):
        moe.ablate(layer=0, expert=(0, 1), how="mean", mean={(0, 0): torch.ones(64), (0, 1): torch.ones(1)})
    with moe.wrap(build("olmoe", hidden_size=32)) as narrow:
        run = narrow.run(IDS, read="expert_out")
        for how in (
            moe.patch(run, layer=0, expert=int(run.routing[0].ids[0, 0, 0])),
            moe.ablate(layer=0, expert=int(run.routing[0].ids[0, 0, 0]), how="resample", run=run),
        ):
            with pytest.raises(BadInput, match="contributions do not fit .*expected 64.*got 32"):
                model.run(IDS, edit=how)


def test_values_and_marks_that_miss_every_text_are_refused():
    model, _ = opened("olmoe")
    short = model.run(IDS[:, :3], read=["expert_out", "resid_mid"])
    expert = int(short.routing[LAYER].ids[0, 0, 0])
    late = {"positions": [3, 4]}
    first = torch.zeros(2, 7, dtype=torch.bool)
    first[:, :2] = True
    ragged = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 7, [1, 1, 0, 0, 0, 0, 0]])}
    beyond = torch.zeros(2, 7, dtype=torch.bool)
    beyond[1, 4] = True  # which only the other text has
    for inputs, edit in (
        (IDS, moe.replace(0 * short["resid_mid", LAYER], layer=LAYER, point="resid_mid", **late)),
        (IDS, moe.replace(torch.zeros(2, 3, 64), layer=LAYER, expert=expert, **late)),
        (IDS, moe.patch(short, layer=LAYER, expert=expert, **late)),
        (IDS, moe.patch(short, layer=LAYER, point="resid_mid", **late)),
        (IDS, moe.patch_route(short, layer=LAYER, **late)),
        (IDS, moe.force(short.routing[LAYER].ids, layer=LAYER, **late)),
        (IDS, moe.patch(short, layer=LAYER, point="resid_mid", tokens=~first, positions=[0, 1])),
        (IDS, moe.scale(layer=LAYER, expert=expert, by=2.0, tokens=first, positions=-1)),
        (ragged, moe.scale(layer=LAYER, expert=expert, by=2.0, tokens=beyond)),
    ):
        with pytest.raises(BadInput, match="an edit can never touch anything"):
            model.run(inputs, edit=edit)
    reaching = moe.patch(short, layer=LAYER, point="resid_mid", positions=[2, 3])
    assert model.run(IDS, edit=reaching).touched == (2,)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    model.generate(IDS[:, :2], edit=moe.patch(short, layer=LAYER, point="resid_mid", positions=2), **options)


def each(*ids: int) -> torch.Tensor:
    return torch.tensor(ids).expand(2, 7, len(ids))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([moe.force((0, 1), layer=0), moe.force((2, 3), layer=0)], "too many experts forced at layer 0: .*got 4"),
        ([moe.force(e, layer=0, positions=[e, 5]) for e in range(4)], "too many experts forced at layer 0"),
        ([moe.force(0, layer=0), moe.randomize(layer=0)], "experts forced where another decides all"),
        ([moe.randomize(layer=0, weights="fresh"), moe.force(0, layer=0, positions=-1)], "another decides all"),
        ([moe.force(0, layer=0), moe.force((1, 2, 3), layer=0, weights="kept")], "another decides all"),
        ([moe.force(3, layer=0), moe.force(each(0, 1, 2), layer=0)], "another decides all"),
        ([moe.mask(layer=0, expert=0), moe.randomize(layer=0)], "an expert forced or forbidden, not both"),
        ([moe.mask(layer=0, expert=0), moe.force(each(0, 1, 2), layer=0)], "an expert forced or forbidden, not both"),
        ([moe.swap(layer=0, experts=(0, 1)), moe.force(0, layer=0)], "an expert forced or swapped for another"),
    ],
)  # fmt: skip
def test_contradictions_are_found_before_anything_runs(edits, message):
    model, _ = opened("olmoe")
    for some in (edits, edits[::-1]):
        with pytest.raises(BadInput, match=message):
            model.run(IDS, edit=some)


@pytest.mark.parametrize(
    "edits",
    [
        [moe.force((0, 1), layer=0, positions=0), moe.force((2, 3), layer=0, positions=[1, 2])],
        [moe.force((0, 1), layer=0), moe.force((1, 2), layer=0)],
        [moe.force((0, 1), layer=0), moe.force((2, 3), layer=1)],
        [moe.force(e, layer=0, positions=[e, e + 1]) for e in range(5)],
        [moe.force(0, layer=0, positions=0), moe.randomize(layer=0, positions=[1, 2])],
        [moe.force(0, layer=0), moe.force((0, 1, 2), layer=0, weights="kept")],
        [moe.force(0, layer=0), moe.force(each(0, 1, 2), layer=0)],
        [moe.mask(layer=0, expert=0, positions=0), moe.randomize(layer=0, positions=1)],
        [moe.mask(layer=0, expert=3), moe.force(each(0, 1, 2), layer=0)],
        [moe.mask(layer=0, expert=0, positions=0), moe.force(each(0, 1, 2), layer=0, positions=[1, 2])],
        [moe.swap(layer=0, experts=(0, 1)), moe.force((0, 1), layer=0)],
        [moe.swap(layer=0, experts=(0, 1)), moe.force(2, layer=0)],
    ],
)
def test_what_does_not_contradict_is_not_refused(edits):
    model, _ = opened("olmoe")
    for some in (edits, edits[::-1]):
        assert all(model.run(IDS, edit=some).touched)
