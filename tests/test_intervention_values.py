"""Every intervention, alone and in pairs, against the slow reference on seven families."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_interp as moe
from tests.reference import interventions as slow
from tests.reference.model import Reference, forward
from tests.tiny import FAMILIES, build

TOLERANCE = 1e-5
GENERATOR = torch.Generator().manual_seed(11)
IDS = torch.randint(3, 90, (2, 6), generator=GENERATOR)
OTHER = torch.randint(3, 90, (2, 6), generator=GENERATOR)
VECTOR = torch.randn(64, generator=GENERATOR)
LAYER = 2
POSITIONS = (1, 4, -1)  # of six tokens


@cache
def tiny(family: str) -> Any:
    return build(family)


@cache
def clean(family: str, ids: str = "IDS") -> Reference:
    with torch.no_grad():
        return forward(tiny(family), {"IDS": IDS, "OTHER": OTHER}[ids])


@cache
def pair(family: str) -> tuple[int, int]:
    """Two experts that tokens of both texts use: the most used, and one that shares a token with it."""
    ids = clean(family).points["expert_ids", LAYER]
    first = int(ids.flatten().bincount().argmax())
    text, position = (ids == first).any(-1).nonzero()[0].tolist()
    return first, next(int(e) for e in ids[text, position] if e != first)


@cache
def other_run(family: str) -> moe.Run:
    with moe.wrap(tiny(family)) as model:
        return model.run(OTHER, read=["expert_out", "resid_mid"])


def contribution(family: str, expert: int, at: slow.Where) -> Tensor:
    """What the expert adds at a token of the other texts, by the reference."""
    points = clean(family, "OTHER").points
    ids, weights, outputs = (points[name, LAYER][at] for name in ("expert_ids", "gate_weights", "expert_out"))
    return sum((w * f for e, w, f in zip(ids, weights, outputs, strict=True) if e == expert), torch.zeros(64))


def changed(row: Tensor, places: Any, value: Any) -> Tensor:
    out = row.clone()
    out[places] = torch.as_tensor(value, dtype=row.dtype)
    return out


def heaviest(row: Tensor, count: int) -> Tensor:
    kept = sorted(range(len(row)), key=lambda slot: -row[slot].item())[:count]
    return torch.stack([weight if slot in kept else weight * 0 for slot, weight in enumerate(row)])


def up_to(row: Tensor, share: float) -> Tensor:
    ordered = row.sort(descending=True).values
    count = next(n for n in range(1, len(row) + 1) if ordered[:n].sum() >= share * row.sum() - 1e-7)
    return heaviest(row, count)


def swapped(row: Tensor, first: int, second: int) -> Tensor:
    return torch.tensor([{first: second, second: first}.get(int(e), int(e)) for e in row])


def cases(family: str) -> dict[str, tuple[Any, list[slow.Op]]]:
    """Interventions by name, each with what it is in the reference."""
    first, second = pair(family)
    one = {"layer": LAYER, "expert": first}
    run = other_run(family)
    there = clean(family, "OTHER").points
    three = [first, second, next(e for e in range(8) if e not in (first, second))]
    inf = torch.inf
    return {
        "zero": (moe.ablate(**one), [("table", lambda t, at: t.scale(first, 0.0))]),
        "scale": (moe.scale(**one, by=2.5), [("table", lambda t, at: t.scale(first, 2.5))]),
        "mean": (
            moe.ablate(**one, how="mean", mean={(LAYER, first): VECTOR}),
            [("table", lambda t, at: t.contribute(first, VECTOR) if t.uses(first) else None)],
        ),
        "replace": (moe.replace(VECTOR, **one), [("table", lambda t, at: t.change(first, lambda f: VECTOR))]),
        "steer": (
            moe.steer(VECTOR, **one, by=2.0),
            [("table", lambda t, at: t.change(first, lambda f: f + 2 * VECTOR))],
        ),
        "patch": (
            moe.patch(run, **one),
            [("table", lambda t, at: t.contribute(first, contribution(family, first, at)))],
        ),
        "forbid": (moe.ablate(**one, how="forbid"), [("selection", lambda row, at: changed(row, first, -inf))]),
        "mask of logits": (
            moe.mask(**one, on="logits"),
            [("router_logits", lambda row, at: changed(row, first, -inf))],
        ),
        "bias": (moe.bias(**one, by=-2.0), [("selection", lambda row, at: changed(row, first, row[first] - 2))]),
        "bias of logits": (
            moe.bias(**one, by=-2.0, on="logits"),
            [("router_logits", lambda row, at: changed(row, first, row[first] - 2))],
        ),
        "force": (
            moe.force([first, second], layer=LAYER),
            [("selection", lambda row, at: changed(row, [first, second], inf))],
        ),
        "force, kept weights": (
            moe.force(three, layer=LAYER, weights="kept"),
            [("expert_ids", lambda row, at: torch.tensor(three))],
        ),
        "force, given weights": (
            moe.force([first, second], layer=LAYER, weights=[0.7, 0.2]),
            [
                ("expert_ids", lambda row, at: changed(row, [0, 1], [first, second])),
                ("gate_weights", lambda row, at: torch.tensor([0.7, 0.2, 0.0])),
            ],
        ),
        "force, ids of tokens": (
            moe.force(there["expert_ids", LAYER], layer=LAYER),
            [("selection", lambda row, at: changed(row, there["expert_ids", LAYER][at], inf))],
        ),
        "patch of routes": (
            moe.patch_route(run, layer=LAYER),
            [
                ("expert_ids", lambda row, at: there["expert_ids", LAYER][at]),
                ("gate_weights", lambda row, at: there["gate_weights", LAYER][at]),
            ],
        ),
        "swap": (
            moe.swap(layer=LAYER, experts=(first, second)),
            [("expert_ids", lambda row, at: swapped(row, first, second))],
        ),
        "top_k": (moe.top_k(2, layers=LAYER), [("gate_weights", lambda row, at: heaviest(row, 2))]),
        "share": (moe.share(0.6, layers=LAYER), [("gate_weights", lambda row, at: up_to(row, 0.6))]),
    }


CASES = tuple(cases("mixtral"))


def agree(family: str, got: Tensor, expected: Tensor) -> bool:
    base = clean(family).logits
    effect = (expected - base).abs().max().item()
    assert effect > 1e-3 * base.abs().max().item(), "the reference itself did not move"
    return (got - expected).abs().max().item() < TOLERANCE * max(effect, base.abs().max().item())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_intervention_does_what_the_reference_computes(family, case):
    edit, ops = cases(family)[case]
    expected = slow.run(tiny(family), IDS, LAYER, ops).logits
    with moe.wrap(tiny(family)) as model:
        run = model.run(IDS, edit=edit)
    assert agree(family, run.logits, expected)
    assert run.touched[0] > 0


ALL = {
    "zero": lambda where, run: moe.ablate(**where, positions=[1, -1]),
    "scale": lambda where, run: moe.scale(**where, by=-1.5),
    "bias": lambda where, run: moe.bias(**where, by=0.25),
    "bias of logits": lambda where, run: moe.bias(**where, by=0.25, on="logits", positions=2),
}
ALL_LAYERS = {
    "forbid": lambda layer, run: moe.ablate(layer=layer, expert=3, how="forbid"),
    "mask of logits": lambda layer, run: moe.mask(layer=layer, expert=[3, 5], on="logits"),
    "replace": lambda layer, run: moe.replace(VECTOR, layer=layer, expert=[3, 5]),
    "steer": lambda layer, run: moe.steer(VECTOR, layer=layer, expert=[0, 3, 5]),
    "patch": lambda layer, run: moe.patch(run, layer=layer, expert=[3, 5]),
    "force": lambda layer, run: moe.force([3, 5], layer=layer),
    "swap": lambda layer, run: moe.swap(layer=layer, experts=(3, 5)),
}


@pytest.mark.parametrize("case", [*ALL, *ALL_LAYERS])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_moe"])
def test_none_is_all_layers_and_all_experts(family, case):
    run = other_run(family)
    with moe.wrap(tiny(family)) as model:
        layers, experts = model.layers, range(model.spec.num_experts)
        if case in ALL:
            pairs = [(layers, experts), (None, experts), (layers, None), (None, None)]
            edits = [ALL[case]({"layer": layer, "expert": expert}, run) for layer, expert in pairs]
        else:
            edits = [ALL_LAYERS[case](layer, run) for layer in (layers, None)]
        runs = [model.run(IDS, edit=edit) for edit in edits]
        clean_logits = model.run(IDS).logits
    assert case.startswith("bias") or not torch.equal(runs[0].logits, clean_logits)
    assert runs[0].touched[0] > 0
    for one in runs[1:]:
        assert torch.equal(one.logits, runs[0].logits) and one.touched == runs[0].touched


def test_all_experts_are_also_those_that_another_intervention_speaks_for():
    run = other_run("mixtral")
    patch = moe.patch(run, layer=LAYER, expert=[3, 5])
    every = [moe.scale(layer=LAYER, expert=expert, by=2.0) for expert in (range(8), None)]
    with moe.wrap(tiny("mixtral")) as model:
        named, all_of_them = (model.run(IDS, edit=[patch, one], read="moe_out") for one in every)
        plain = model.run(IDS, edit=patch, read="moe_out")
    assert torch.equal(named["moe_out", LAYER], all_of_them["moe_out", LAYER])
    double = 2.0 * plain["moe_out", LAYER]
    assert (all_of_them["moe_out", LAYER] - double).abs().max() < 1e-5 * double.abs().max()


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_it_acts_at_the_tokens_it_is_given(family, case, marked):
    marks = torch.zeros(2, 6, dtype=torch.bool)
    marks[:, list(POSITIONS)] = True
    with moe.wrap(tiny(family)) as model:
        where = {"tokens": moe.ByToken.of(marks)} if marked else {"positions": POSITIONS}
        edit, ops = cases(family)[case]
        placed = type(edit)(**{**vars(edit), **where})
        got = model.run(IDS, edit=placed).logits
    expected = slow.run(tiny(family), IDS, LAYER, ops, lambda at: at[1] in (1, 4, 5)).logits
    assert agree(family, got, expected)


PAIRS = (
    ("patch", "scale"), ("scale", "patch"), ("mean", "zero"), ("zero", "steer"), ("steer", "zero"), ("forbid", "steer"),
    ("forbid", "top_k"), ("top_k", "scale"), ("swap", "zero"), ("patch of routes", "patch"), ("force", "share"),
    ("force, given weights", "scale"), ("bias of logits", "forbid"), ("replace", "scale"), ("swap", "swap"),
    ("mask of logits", "zero"), ("bias", "scale"), ("force, kept weights", "steer"), ("force, ids of tokens", "top_k"),
)  # fmt: skip


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_interventions_compose_in_order(family, first, second):
    (one, ops), (other, more) = cases(family)[first], cases(family)[second]
    with moe.wrap(tiny(family)) as model:
        got = model.run(IDS, edit=[one, other]).logits
    if first == second == "swap":
        assert torch.equal(got, moe.wrap(tiny(family)).run(IDS).logits)
        return
    assert agree(family, got, slow.run(tiny(family), IDS, LAYER, [*ops, *more]).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_ones_and_points_compose_with_a_scale(family):
    hf, (first, _) = tiny(family), pair(family)
    scale = moe.scale(layer=LAYER, expert=first, by=2.5)
    ops: list[slow.Op] = [("table", lambda t, at: t.scale(first, 2.5))]
    resample = moe.ablate(layer=LAYER, expert=first, how="resample", run=other_run(family))
    with moe.wrap(hf) as model:
        drawn = model.run(IDS, edit=[moe.randomize(layer=LAYER), scale])
        noised = model.run(IDS, read="embed", edit=[moe.noise(0.5), scale])
        alone, doubled = (model.run(IDS, read="expert_out", edit=edit) for edit in (resample, [resample, scale]))
        both = model.run(IDS, edit=[moe.steer(VECTOR, layer=LAYER, point="resid_mid"), scale])
    ids = drawn.routing[LAYER].ids
    expected = slow.run(hf, IDS, LAYER, [("expert_ids", lambda row, at: ids[at]), *ops])
    assert agree(family, drawn.logits, expected.logits)
    routed = [run.contribution(LAYER, first)[0] for run in (alone, doubled)]
    assert (routed[1] - 2.5 * routed[0]).abs().max() < 1e-5 * routed[1].abs().max()
    assert (doubled.logits - alone.logits).abs().max() > 1e-3

    def scaled(base: Reference) -> Any:
        return lambda value: torch.where((base.points["expert_ids", LAYER] == first)[..., None], value * 2.5, value)

    for got, edit in (
        (noised, {("embed", None): lambda value: noised["embed"]}),
        (both, {("resid_mid", LAYER): lambda value: value + VECTOR}),
    ):
        edits = {**edit, ("expert_out", LAYER): scaled(forward(hf, IDS, edits=edit))}
        assert agree(family, got.logits, forward(hf, IDS, edits=edits).logits)


@pytest.mark.parametrize("case", CASES)
def test_what_json_gives_back_is_the_same_and_does_the_same(case):
    edit, _ = cases("deepseek_v3")[case]
    again = moe.from_json(moe.to_json([edit]))
    assert again == [edit]
    assert hash(again[0]) == hash(edit)
    with moe.wrap(tiny("deepseek_v3")) as model:
        assert torch.equal(model.run(IDS, edit=again).logits, model.run(IDS, edit=edit).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_routes_are_uniform_distinct_and_the_tokens_own(family):
    with moe.wrap(tiny(family)) as model:
        base = model.run(IDS)
        kept = model.run(IDS, edit=moe.randomize(layer=LAYER, seed=3))
        fresh = model.run(IDS, edit=moe.randomize(layer=LAYER, seed=3, weights="fresh"))
        second = model.run(IDS[1:], edit=moe.randomize(layer=LAYER, seed=3))
        again = model.run(IDS[:, :4], edit=moe.randomize(layer=LAYER, seed=3))
        long = model.run(torch.randint(3, 90, (16, 64)), edit=moe.randomize(layer=LAYER, seed=4)).routing[LAYER].ids
    ids = kept.routing[LAYER].ids
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert torch.equal(kept.routing[LAYER].weights, base.routing[LAYER].weights)
    assert torch.equal(again.routing[LAYER].ids, ids[:, :4])
    assert torch.equal(second.routing[LAYER].ids[0], ids[1])  # whatever else is in the batch
    counts = long.flatten().bincount(minlength=8)  # 3,072 choices, 384 each, standard deviation 18
    assert (counts - 384).abs().max() < 90
    expected = slow.run(tiny(family), IDS, LAYER, [("expert_ids", lambda row, at: ids[at])])
    assert agree(family, kept.logits, expected.logits)
    drawn = fresh.routing[LAYER].ids
    assert torch.equal(drawn.sort(-1).values, ids.sort(-1).values)
    if family == "deepseek_v2":
        return  # its masked scores are 0, as its own recipe has them
    recipe = slow.run(tiny(family), IDS, LAYER, [("selection", lambda row, at: changed(row, drawn[at], torch.inf))])
    assert agree(family, fresh.logits, recipe.logits)


def test_random_draws_are_of_the_text_up_to_the_token():
    edits = [
        moe.randomize(layer=None, seed=1, weights="fresh"),
        moe.noise(0.5, seed=2),
        moe.ablate(layer=LAYER, expert=3, how="resample", run=other_run("olmoe"), seed=3),
    ]
    texts = [[5, 9, 40, 7, 80], [6, 9, 40, 7], [5, 9, 41, 7, 80, 30]]
    with moe.wrap(tiny("olmoe")) as model, model.edit(edits):
        alone = [model.run([text], read="embed") for text in texts]
        together = model.run(texts[::-1], read="embed")
        for number, one in enumerate(alone):
            row = together["embed"][2 - number, : len(texts[number])]
            torch.testing.assert_close(row, one["embed"][0])
            ids = together.routing[LAYER].ids[2 - number, : len(texts[number])]
            assert torch.equal(ids, one.routing[LAYER].ids[0])
    first, second, third = (one.routing[LAYER].ids[0] for one in alone)
    assert torch.equal(first[:2], third[:2]) and not torch.equal(first[2:], third[2:5])  # until they differ
    assert (first[:4] != second).any(dim=1).sum() >= 3  # as many ids, and places, of another text


def test_random_draws_go_on_step_by_step():
    edits = [moe.randomize(layer=None, seed=1), moe.noise(0.5, seed=2)]
    with moe.wrap(tiny("olmoe")) as model:
        whole = model.generate(IDS, edit=edits, max_new_tokens=6, do_sample=False)
        uncached = model.generate(IDS, edit=edits, max_new_tokens=6, do_sample=False, use_cache=False)
        logits = model.run(whole[:, :-1], edit=edits).logits
    assert torch.equal(whole, uncached)
    assert torch.equal(whole[:, -6:], logits[:, -6:].argmax(dim=-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_resampled_contributions_are_the_other_runs(family):
    first, _ = pair(family)
    run = other_run(family)
    outputs, weights, used = run.contribution(LAYER, first)
    pool = (outputs * weights[..., None])[used]
    with moe.wrap(tiny(family)) as model:
        base = model.run(IDS)
        edit = moe.ablate(layer=LAYER, expert=first, how="resample", run=run, seed=5)
        got = model.run(IDS, read="expert_out", edit=edit)
    own, weight, where = got.contribution(LAYER, first)
    assert torch.equal(where, (base.routing[LAYER].ids == first).any(-1))
    rows = (own * weight[..., None])[where]
    distance = (rows[:, None] - pool).abs().amax(-1).amin(-1)
    assert distance.max() < 1e-5 * pool.abs().max()
    assert not torch.equal(got.logits, base.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_swap_experts(family):
    first, second = (0, 2) if family not in ("deepseek_v2", "deepseek_v3") else (1, 2)
    hf, crossed = build(family), build(family)
    one, other = (crossed.model.layers[layer].mlp for layer in (first, second))
    one.experts, other.experts = other.experts, one.experts
    reference = forward(crossed, IDS)
    expected, ids = reference.logits, reference.points["expert_ids", second]
    expert = int(ids[0, 0, 0])
    edits = {("expert_out", second): lambda value: torch.where((ids == expert)[..., None], value * 3.0, value)}
    scaled = forward(crossed, IDS, edits=edits).logits
    with moe.wrap(hf) as model:
        pair_of = [moe.swap(layers=(first, second)), moe.scale(layer=second, expert=expert, by=3.0)]
        assert (model.run(IDS, edit=pair_of).logits - scaled).abs().max() < TOLERANCE * scaled.abs().max()
        assert (scaled - expected).abs().max() > 1e-3
        base = model.run(IDS).logits
        assert (expected - base).abs().max() > 1e-3
        got = model.run(IDS, edit=moe.swap(layers=(first, second))).logits
        twice = model.run(IDS, edit=[moe.swap(layers=(first, second))] * 2).logits
        assert torch.equal(model.run(IDS).logits, base)
    assert (got - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert torch.equal(twice, base)


@pytest.mark.parametrize("family", FAMILIES)
def test_points_are_patched_steered_replaced_and_noised(family):
    hf = tiny(family)
    there = clean(family, "OTHER").points["resid_mid", LAYER]
    with moe.wrap(hf) as model:
        run = other_run(family)
        for edit, fn in (
            (moe.patch(run, layer=LAYER, point="resid_mid"), lambda value: there),
            (moe.steer(VECTOR, layer=LAYER, point="resid_mid", by=3.0), lambda value: value + 3 * VECTOR),
            (moe.replace(VECTOR, layer=LAYER, point="resid_mid"), lambda value: VECTOR.expand_as(value)),
            (moe.replace(there, layer=LAYER, point="resid_mid"), lambda value: there),
        ):
            expected = forward(hf, IDS, edits={("resid_mid", LAYER): fn}).logits
            assert agree(family, model.run(IDS, edit=edit).logits, expected)
        noised = model.run(IDS, read="embed", edit=moe.noise(0.5, positions=[0, 2], seed=1))
        noise = noised["embed"] - model.run(IDS, read="embed")["embed"]
    assert (noise[:, [1, 3, 4, 5]] == 0).all()
    assert 0.4 < noise[:, [0, 2]].std() < 0.6  # 256 values
    assert (noise[0] - noise[1]).abs().max() > 0.5  # each text has its own


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_pass_through_interventions(family):
    hf = tiny(family)
    probe = torch.randn(clean(family).logits.shape, generator=torch.Generator().manual_seed(3))
    for case in ("scale", "patch", "steer", "forbid", "top_k"):
        edit, ops = cases(family)[case]
        with moe.wrap(hf) as model:
            run = model.run(IDS, read=[moe.select("resid_mid", layers=LAYER)], edit=edit, grad=True)
            (got,) = torch.autograd.grad((run.logits * probe).sum(), run["resid_mid", LAYER])
        with torch.enable_grad():
            again = slow.run(hf, IDS, LAYER, ops)
            (expected,) = torch.autograd.grad((again.logits * probe).sum(), again.points["resid_mid", LAYER])
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max(), case


@pytest.mark.parametrize("case", ["zero", "steer", "forbid", "bias of logits", "force", "swap", "share"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_generation_makes_them_at_every_step(family, case):
    hf, prompt = tiny(family), IDS[:1]
    edit, ops = cases(family)[case]
    with moe.wrap(hf) as model:
        got = model.generate(prompt, edit=edit, max_new_tokens=4, do_sample=False, eos_token_id=None)
        random = moe.randomize(seed=2)
        drawn = model.generate(prompt, edit=random, max_new_tokens=4, do_sample=False, eos_token_id=None)
        ids = prompt
        for _ in range(4):
            ids = torch.cat([ids, model.run(ids, edit=random).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(drawn, ids)
    expected = prompt
    for _ in range(4):
        logits = slow.run(hf, expected, LAYER, ops).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, expected)


def test_a_patch_of_a_prompt_ends_with_the_prompt():
    """Under generation a patch acts on the tokens it has values for."""
    hf = tiny("mixtral")
    first, _ = pair("mixtral")
    there = clean("mixtral", "OTHER").points["resid_mid", LAYER][:1]

    def patched(value: Tensor) -> Tensor:
        return torch.cat([there, value[:, 6:]], dim=1)

    with moe.wrap(hf) as model:
        run = model.run(OTHER[:1], read=["expert_out", "resid_mid"])
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        of_expert = model.generate(IDS[:1], edit=moe.patch(run, layer=LAYER, expert=first), **options)
        of_point = model.generate(IDS[:1], edit=moe.patch(run, layer=LAYER, point="resid_mid"), **options)
    expected, whole = IDS[:1], IDS[:1]
    for _ in range(3):
        ops = [("table", lambda t, at: t.contribute(first, contribution("mixtral", first, at)))]
        logits = slow.run(hf, expected, LAYER, ops, lambda at: at[1] < 6).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
        logits = forward(hf, whole, edits={("resid_mid", LAYER): patched}).logits
        whole = torch.cat([whole, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(of_expert, expected)
    assert torch.equal(of_point, whole)
