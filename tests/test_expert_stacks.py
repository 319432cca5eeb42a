"""Stacks of what experts add, from a cache of TransformerLens: against loops over slots, residuals and real logits."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_interp as moe
from tests.bridges import bridge, bridged, plain
from tests.tiny import FAMILIES
from tests.tiny_types import build

IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(5))
NEXT = IDS.roll(-1, dims=1)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@cache
def tiny(family: str) -> Any:
    return bridge(family)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def added(values: Any, layer: int) -> tuple[Tensor, Tensor]:
    """What every slot [B, S, K, D] and every expert [B, S, E, D] added, in loops."""
    outputs, weights, ids = (values[point, layer] for point in ("expert_out", "gate_weights", "expert_ids"))
    slots = torch.zeros_like(outputs)
    experts = torch.zeros(*ids.shape[:2], 8, outputs.shape[-1])
    for text in range(ids.shape[0]):
        for position in range(ids.shape[1]):
            for slot, expert in enumerate(ids[text, position].tolist()):
                slots[text, position, slot] = weights[text, position, slot] * outputs[text, position, slot]
                experts[text, position, expert] += slots[text, position, slot]
    return slots, experts


@pytest.mark.parametrize("family", FAMILIES)
def test_components_are_what_slots_and_experts_added_and_the_rest_is_the_remainder(family):
    lens = tiny(family)
    with moe.attach(lens) as door:
        _, values = lens.run_with_cache(IDS)
        slots, names = moe.stack_expert_results(values, incl_remainder=True, return_labels=True)
        experts, labels = moe.stack_expert_results(values, by="expert", incl_remainder=True, return_labels=True)
        for layer in door.model.layers:
            by_slot, by_expert = added(values, layer)
            for slot in range(3):
                assert error(slots[names.index(f"L{layer}S{slot}")], by_slot[:, :, slot]) < 1e-6
            for expert in range(8):
                got = experts[labels.index(f"L{layer}E{expert}")]
                assert (got - by_expert[:, :, expert]).abs().max() < 1e-6 * by_expert.abs().max()
            assert (f"L{layer}shared" in names) == ("shared_out" in door.model.points)
            if f"L{layer}shared" in names:
                assert torch.equal(slots[names.index(f"L{layer}shared")], values["shared_out", layer])
        assert names[-1] == labels[-1] == "remainder"
        assert len(set(names)) == len(slots)
        last = values["resid_post", 3]
        assert error(slots.sum(0), last) < 1e-5
        assert error(experts.sum(0), last) < 1e-5
        rest = last - sum(values["moe_out", layer] for layer in door.model.layers)
        assert error(slots[-1], rest) < 1e-5
        some, few = moe.stack_expert_results(values, 2, incl_remainder=True, return_labels=True)
        assert {name[:2] for name in few} <= {"L0", "L1", "re"}
        assert error(some.sum(0), values["resid_post", 1]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_was_added_sums_to_the_residual_and_its_logits_to_the_logits(family):
    lens = tiny(family)
    with moe.attach(lens):
        logits, values = lens.run_with_cache(IDS)
        stack, labels = moe.decompose_resid(values, return_labels=True)
        assert error(stack.sum(0), values["resid_post", 3]) < 1e-5
        assert torch.equal(stack[labels.index("embed")], values["embed"])
        assert torch.equal(stack[labels.index("2_attn_out")], values["attn_out", 2])
        for layer in (0, 2):
            assert error(moe.decompose_resid(values, layer).sum(0), values["resid_pre", layer]) < 1e-5
            into_mlp = moe.decompose_resid(values, layer, mlp_input=True)
            assert error(into_mlp.sum(0), values["resid_mid", layer]) < 1e-5
        true = logits.gather(2, NEXT[..., None]).squeeze(2)
        assert error(moe.logit_attrs(values, stack, NEXT).sum(0), true) < 1e-5
        assert error(moe.logit_attrs(values, stack, 7).sum(0), logits[..., 7]) < 1e-5
        one_a_text = torch.tensor([7, 9])
        difference = torch.stack([logits[0, :, 7] - logits[0, :, 3], logits[1, :, 9] - logits[1, :, 4]])
        got = moe.logit_attrs(values, stack, one_a_text, torch.tensor([3, 4]))
        assert error(got.sum(0), difference) < 1e-5


def test_shares_are_those_of_logit_attribution():
    lens = tiny("qwen2_moe")
    with moe.attach(lens) as door:
        _, values = lens.run_with_cache(IDS[:1])
        stack, labels = moe.decompose_resid(values, return_labels=True)
        shares = moe.logit_attrs(values, stack, 7)[:, 0, -1]
        expected = moe.logit_attribution(door.model, IDS[0], [7])["attribution"].sel(token=7)
        for ours, theirs in (("embed", "embed"), ("1_attn_out", "1.attn_out"), ("1_mlp_out", "1.mlp_out")):
            assert shares[labels.index(ours)].item() == pytest.approx(expected.sel(part=theirs).item(), rel=1e-4)
        shared = shares[labels.index("L2shared")].item()
        assert shared == pytest.approx(expected.sel(part="2.shared_out").item(), rel=1e-4)
        of_layer = sum(shares[labels.index(f"L2S{slot}")].item() for slot in range(3))
        assert of_layer == pytest.approx(sum(expected.sel(part=f"2.c{j}").item() for j in (1, 2, 3)), rel=1e-4)


class Largest(TorchDispatchMode):
    """The most values that a tensor had that anything made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.numel = max(self.numel, found.numel())
        return found


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_projected_components_are_those_times_the_directions_and_take_no_vector_for_every_expert(family):
    lens = tiny(family)
    with moe.attach(lens):
        _, values = lens.run_with_cache(IDS)
        for directions in (moe.logit_directions(values, NEXT), torch.randn(64, generator=torch.Generator())):
            for by in ("slot", "expert"):
                whole = moe.stack_expert_results(values, by=by, incl_remainder=True)
                projected = moe.stack_expert_results(values, by=by, incl_remainder=True, directions=directions)
                assert error(projected, (whole * directions).sum(-1)) < 1e-5
            everything = moe.decompose_resid(values, by="expert", directions=directions)
            assert error(everything.sum(0), (values["resid_post", 3] * directions).sum(-1)) < 1e-5
        with Largest() as projecting:
            moe.stack_expert_results(values, by="expert", incl_remainder=True, directions=directions)
        with Largest() as holding:
            moe.stack_expert_results(values, by="expert")
        every_expert = 8 * IDS.numel() * 64
        assert holding.numel > every_expert > projecting.numel


def test_positions_are_sliced_and_caches_of_one_text_have_no_batch():
    lens = tiny("deepseek_v2")
    with moe.attach(lens):
        logits, values = lens.run_with_cache(IDS)
        whole = moe.decompose_resid(values)
        for pos_slice, expected in ((-1, whole[:, :, -1]), ((2, 5), whole[:, :, 2:5])):
            assert torch.equal(moe.decompose_resid(values, pos_slice=pos_slice), expected)
        last = moe.decompose_resid(values, pos_slice=-1)
        assert error(moe.logit_attrs(values, last, 7, pos_slice=-1).sum(0), logits[:, -1, 7]) < 1e-5
        directions = moe.logit_directions(values, IDS[:, 0], pos_slice=-1)
        projected = moe.stack_expert_results(values, by="expert", directions=directions, pos_slice=-1)
        assert projected.shape == (3 * 9, 2)
        _, one = lens.run_with_cache(IDS[:1], remove_batch_dim=True)
        assert error(moe.decompose_resid(one), whole[:, 0]) < 1e-5
        assert torch.equal(moe.decompose_resid(one, pos_slice=(2, 5)), moe.decompose_resid(one)[:, 2:5])
        shares = moe.logit_attrs(one, moe.decompose_resid(one), NEXT[0])
        assert error(shares.sum(0), logits[0].gather(1, NEXT[0][:, None]).squeeze(1)) < 1e-5


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_patching_every_expert_is_activation_patching(family):
    lens, corrupted = tiny(family), IDS[:1].flip(1)
    metric = lambda logits: logits[..., -1, 7].sum()  # noqa: E731
    with moe.attach(lens) as door, moe.wrap(plain(family)) as model:
        _, clean = lens.run_with_cache(IDS[:1], names_filter=door.names("expert_out", "expert_ids", "gate_weights"))
        got = moe.get_act_patch_expert_out(lens, corrupted, clean, metric)
        base = metric(lens(corrupted)).item()
        expected = moe.activation_patching(model, IDS[:1], corrupted, metric, over="experts")["effect"].values[0]
        assert got.shape == (len(model.layers), 8)
        assert np.abs(expected).max() > 0.01
        assert np.abs(got.numpy() - base - expected).max() < 1e-5 * abs(base)
        some = moe.get_act_patch_expert_out(lens, corrupted, clean, metric, layers=2)
        assert torch.equal(some[0], got[model.layers.index(2)])
        again, (rows, columns) = moe.get_act_patch_expert_out(lens, corrupted, clean, metric, return_labels=True)
        assert torch.equal(again, got) and columns == [f"E{expert}" for expert in range(8)]
        assert torch.equal(got[rows.index("L2")], some[0]) and rows == [f"L{layer}" for layer in model.layers]


def test_what_cannot_be_stacked_is_refused():
    lens = tiny("mixtral")
    with moe.attach(lens) as door:
        _, values = lens.run_with_cache(IDS, names_filter=door.names("expert_out"))
        with pytest.raises(moe.MoEError, match="the cache holds no 'blocks.0.mlp.hook_gate_weights'.*names_filter"):
            moe.stack_expert_results(values)
        _, values = lens.run_with_cache(IDS)
        for wrong, says in (
            (lambda: moe.stack_expert_results(values, 0), "no experts to stack"),
            (lambda: moe.stack_expert_results(values, 5), "no such layer: expected 0 to 4"),
            (
                lambda: moe.stack_expert_results(values, by="head"),
                "invalid by for stack_expert_results: expected one of 'slot', 'expert'",
            ),  # beartype may be first
            (lambda: moe.decompose_resid(values, mlp_input=True), "no MLP after the last layer"),
            (lambda: moe.decompose_resid(values, 0, incl_embeds=False), "nothing to stack"),
            (lambda: moe.logit_directions(values, torch.tensor([1, 2, 3])), "tokens do not fit the cache"),
            (lambda: moe.logit_directions(values, 96), "no such tokens"),
            (lambda: moe.get_act_patch_expert_out(lens, IDS[:, :4], values, torch.sum), "runs do not match"),
        ):
            with pytest.raises((moe.MoEError, TypeCheckError), match=says):
                wrong()


@pytest.mark.parametrize(
    ("model_type", "says"),
    [("granitemoe", "is not the plain sum of its parts"), ("switch_transformers", "no next token to predict")],
)
def test_a_model_that_does_not_add_plainly_or_has_two_stacks_is_refused(model_type, says):
    lens = bridged(build(model_type))
    more = {"decoder_input": IDS} if model_type == "switch_transformers" else {}
    with moe.attach(lens):
        _, values = lens.run_with_cache(IDS, **more)
        for stack in (moe.stack_expert_results, moe.decompose_resid):
            with pytest.raises(moe.MoEError, match=says):
                stack(values)
