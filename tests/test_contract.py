"""The contract of every point on every family, against the slow reference.

One table, point x family: what is read is right, what is edited arrives, gradients reach it. Errors are relative to the
largest absolute value of the reference, or to the edit's own effect where that is larger.
"""

import pytest
import torch

import moe_interp as moe
from moe_interp.points import POINTS
from tests.reference.model import forward
from tests.tiny import FAMILIES, build

TOLERANCE = 1e-5
SHARED = ("qwen2_moe", "deepseek_v2", "deepseek_v3")
LAYER = 2  # a MoE layer in every tiny model, with layers before and after it


def points_of(family: str) -> list[str]:
    """The points that the family must have, written out here and not asked of the package."""
    absent = {"shared_out"} if family not in SHARED else set()
    dense = {"mlp_out"} if family not in ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3") else set()
    return [name for name in POINTS if name not in absent | dense]


# Switches that the tiny models leave one way: renormalised weights off, groups of experts on.
VARIANTS = (
    ("olmoe", {"norm_topk_prob": False}),
    ("qwen2_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy"}),
)
CASES = [(family, point) for family in FAMILIES for point in points_of(family)]


@pytest.fixture(scope="module")
def tiny():
    """Models and inputs, built once per family."""
    cache: dict[str, tuple] = {}

    def make(family: str):
        if family not in cache:
            hf = build(family)
            ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))
            cache[family] = (hf, ids, forward(hf, ids))
        return cache[family]

    return make


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def layer_of(model: moe.MoEModel, point: str) -> int | None:
    layers = model.spec.layers_of(point)
    return LAYER if LAYER in layers else layers[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_points(tiny, family):
    with moe.wrap(tiny(family)[0]) as model:
        assert list(model.points) == points_of(family)


@pytest.mark.parametrize(("family", "point"), CASES)
def test_values_read_equal_the_reference(tiny, family, point):
    hf, ids, reference = tiny(family)
    with moe.wrap(hf) as model:
        run = model.run(ids, read=[point])
        layers = model.spec.layers_of(point)
        assert layers
        for layer in layers:
            got, expected = run.values[point, layer], reference.points[point, layer]
            assert got.shape == expected.shape
            if POINTS[point].integer:
                assert torch.equal(got, expected)
            else:
                assert error(got, expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_without_edits_is_bit_equal_to_the_plain_one(family, dtype):
    hf = build(family, dtype=dtype)
    hf.set_experts_implementation("grouped_mm")
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = hf(input_ids=ids, use_cache=False).logits
    with moe.wrap(hf) as model:
        assert torch.equal(model.run(ids).logits, plain)
        assert torch.equal(model.run(ids, read=list(model.points)).logits, plain)


@pytest.mark.parametrize(("family", "switch"), VARIANTS)
def test_switches_of_the_router_are_the_models_own(family, switch):
    hf = build(family, **switch)
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    reference, usual = forward(hf, ids), forward(build(family), ids)
    with moe.wrap(hf) as model:
        run = model.run(ids, read=["router_logits", "gate_weights"])
        edited = model.run(ids, edit=moe.apply("router_logits", change_of("router_logits"), layers=LAYER)).logits
    predicted = forward(hf, ids, edits={("router_logits", LAYER): change_of("router_logits")}).logits
    assert torch.equal(run.routing[LAYER].ids, reference.points["expert_ids", LAYER])
    assert error(run["gate_weights", LAYER], reference.points["gate_weights", LAYER]) < TOLERANCE
    assert error(run.logits, reference.logits) < TOLERANCE
    assert error(edited, predicted) < TOLERANCE
    assert error(usual.logits, reference.logits) > 1e-2


def change_of(point: str, wrong_slot: bool = False):
    """An edit of the point that matters, and the same one in another place as its negative control."""
    slot = 1 if wrong_slot else 0

    def rotate_ids(value: torch.Tensor) -> torch.Tensor:
        out = value.clone()
        out[..., slot] = (out[..., slot] + 1) % 8
        return out

    def boost(value: torch.Tensor) -> torch.Tensor:
        out = value.clone()
        out[..., slot] = out[..., slot] + 3.0
        return out

    def slots(value: torch.Tensor) -> torch.Tensor:
        out = value.clone()
        out[:, :, slot] = out[:, :, slot] * 3.0 + 0.5
        return out

    def columns(value: torch.Tensor) -> torch.Tensor:
        out = value.clone()
        out[:, 2 + slot] = out[:, 2 + slot] * 1.5 + 0.3
        return out

    if point == "expert_ids":
        return rotate_ids
    if point in ("router_logits", "gate_weights"):
        return boost
    return slots if POINTS[point].dims.startswith("B S K ") else columns


EDITS = [(family, point) for family, point in CASES if POINTS[point].editable]


@pytest.mark.parametrize(("family", "point"), EDITS)
def test_edits_move_the_logits_as_the_reference_predicts(tiny, family, point):
    hf, ids, clean = tiny(family)
    with moe.wrap(hf) as model:
        layer = layer_of(model, point)
        where = {} if layer is None else {"layers": layer}
        edited = model.run(ids, edit=moe.apply(point, change_of(point), **where)).logits
        other = model.run(ids, edit=moe.apply(point, change_of(point, wrong_slot=True), **where)).logits
    predicted = forward(hf, ids, edits={(point, layer): change_of(point)}).logits
    effect = (predicted - clean.logits).abs().max().item()
    scale = max(effect, clean.logits.abs().max().item())
    assert effect > 1e-2 * clean.logits.abs().max().item()
    assert (edited - predicted).abs().max().item() < TOLERANCE * scale
    assert (other - predicted).abs().max().item() > 100 * TOLERANCE * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_a_point_reads_what_an_edit_left_there(tiny, family):
    hf, ids, _ = tiny(family)
    with moe.wrap(hf) as model:
        for point in (name for name in model.points if POINTS[name].editable):
            layer = layer_of(model, point)
            where = {} if layer is None else {"layers": layer}
            clean = model.run(ids, read=[point]).values[point, layer]
            run = model.run(ids, read=[point], edit=moe.apply(point, change_of(point), **where))
            assert torch.equal(run.values[point, layer], change_of(point)(clean))


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_the_sum_of_their_parts(tiny, family):
    hf, ids, _ = tiny(family)
    with moe.wrap(hf) as model:
        run = model.run(ids, read=list(model.points))
        for layer in range(model.spec.num_layers):
            assert error(run["resid_pre", layer] + run["attn_out", layer], run["resid_mid", layer]) < TOLERANCE
            if layer not in model.layers:
                added = run["mlp_out", layer]
            else:
                routed = (run["gate_weights", layer][..., None] * run["expert_out", layer]).sum(2)
                added = routed + run["shared_out", layer] if "shared_out" in model.points else routed
            assert error(run["resid_mid", layer] + added, run["resid_post", layer]) < TOLERANCE


GRADIENTS = [(family, point) for family, point in EDITS if POINTS[point].differentiable]


@pytest.mark.parametrize(("family", "point"), GRADIENTS)
def test_gradients_reach_the_point_and_match_the_reference(tiny, family, point):
    hf, ids, reference = tiny(family)
    probe = torch.randn(reference.logits.shape, generator=torch.Generator().manual_seed(3))
    with moe.wrap(hf) as model:
        layer = layer_of(model, point)
        read = moe.select(point, layers=layer) if layer is not None else point
        run = model.run(ids, read=[read], grad=True)
        (got,) = torch.autograd.grad((run.logits * probe).sum(), run.values[point, layer])
    with torch.enable_grad():
        again = forward(hf, ids)
        (expected,) = torch.autograd.grad((again.logits * probe).sum(), again.points[point, layer])
    assert expected.abs().max() > 0
    assert error(got, expected) < TOLERANCE


def test_rows_of_ids_of_different_lengths_are_padded(tiny):
    hf, rows = tiny("qwen3_moe")[0], [[5, 9, 23, 7, 40, 11], [8, 3, 61]]
    ids, mask = torch.tensor([rows[0], [*rows[1], 0, 0, 0]]), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with moe.wrap(hf) as model:
        run = model.run(rows, read="resid_post")
        same = model.run({"input_ids": ids, "attention_mask": mask}, read="resid_post")
        alone = model.run(rows[1]).logits
        written = model.generate(rows, max_new_tokens=3, do_sample=False)
        expected = model.generate(rows[1], max_new_tokens=3, do_sample=False)
        even = model.encode([rows[1], rows[0][:3]])
    assert torch.equal(run.mask, mask.bool()) and torch.equal(run.token_ids, ids)
    assert torch.equal(run.logits, same.logits) and torch.equal(run["resid_post", 3], same["resid_post", 3])
    assert (run.logits[1, :3] - alone[0]).abs().max() < 1e-5 * alone.abs().max()
    assert torch.equal(written[1, -3:], expected[0, -3:])
    assert list(even) == ["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_for_real_tokens(tiny, family):
    hf, ids, _ = tiny(family)
    short = ids[1, :5]
    padded = {
        "left": (torch.cat([torch.zeros(3, dtype=torch.long), short]), [0, 0, 0, 1, 1, 1, 1, 1], slice(3, 8)),
        "right": (torch.cat([short, torch.zeros(3, dtype=torch.long)]), [1, 1, 1, 1, 1, 0, 0, 0], slice(0, 5)),
    }
    with moe.wrap(hf) as model:
        alone = model.run(short, read=["resid_post", "expert_out"])
        for row, mask, real in padded.values():
            inputs = {
                "input_ids": torch.stack([ids[0], row]),
                "attention_mask": torch.stack([torch.ones(8, dtype=torch.long), torch.tensor(mask)]),
            }
            reference = forward(hf, inputs["input_ids"], inputs["attention_mask"])
            read = ["resid_post", moe.select("expert_out", layers=LAYER, positions=-1)]
            run = model.run(inputs, read=read)
            assert error(run["resid_post", 3][1, real], alone["resid_post", 3][0]) < 1e-4
            assert error(run["resid_post", 3][1, real], reference.points["resid_post", 3][1, real]) < TOLERANCE
            last = reference.points["expert_out", LAYER][1, real][-1]
            assert error(run["expert_out", LAYER][1, 0], last) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_and_inference_mode(tiny, family):
    hf, ids, _ = tiny(family)
    reference = forward(hf, ids[:1, :1])
    with moe.wrap(hf) as model, torch.inference_mode():
        edit = moe.apply("resid_mid", lambda value: value * 1.5, layers=LAYER)
        run = model.run(ids[:1, :1], read=["expert_out"])
        edited = model.run(ids[:1, :1], edit=edit).logits
    assert error(run["expert_out", LAYER], reference.points["expert_out", LAYER]) < TOLERANCE
    expected = forward(hf, ids[:1, :1], edits={("resid_mid", LAYER): lambda value: value * 1.5}).logits
    assert error(edited, expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_makes_the_edit_at_every_step(tiny, family):
    hf, ids, _ = tiny(family)
    prompt = ids[:1, :6]

    def triple(value: torch.Tensor) -> torch.Tensor:
        return value * 3.0

    with moe.wrap(hf) as model:
        plain = model.generate(prompt, max_new_tokens=6, do_sample=False)
        edited = model.generate(
            prompt, max_new_tokens=6, do_sample=False, edit=moe.apply("moe_out", triple, layers=LAYER)
        )
    expected, clean = prompt, prompt
    for _ in range(6):
        step = forward(hf, expected, edits={("moe_out", LAYER): triple}).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, step], dim=1)
        clean = torch.cat([clean, forward(hf, clean).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if clean[0, -1] == 2 or expected[0, -1] == 2:
            break
    length = expected.shape[1]
    assert torch.equal(edited[:, :length], expected)
    assert torch.equal(plain[:, :length], clean)
    assert not torch.equal(clean, expected)
