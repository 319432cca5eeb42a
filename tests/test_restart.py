"""Restarts give what whole runs under the same edits give."""

import pytest
import torch

import moe_interp as moe
from moe_interp.restart import Restart, Variant
from tests.tiny import build
from tests.tiny_types import build as build_type

IDS = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(5))
BATCH = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 7, [0, 0] + [1] * 5, [1] * 7])}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_edits_that_stand_stay_under_those_of_a_variant(family):
    with (
        moe.wrap(build(family)) as model,
        model.edit(moe.scale(layer=1 if family == "mixtral" else 2, expert=2, by=3.0)),
    ):
        edit = moe.top_k(1, layers=3)
        expected = model.run(BATCH, edit=edit).logits
        restart = Restart(model, BATCH)
        assert restart.exact and restart.separable
        (found,) = restart.run([Variant([edit])])
    assert torch.allclose(found.logits, expected[found.texts, found.columns], atol=1e-4)


def test_marks_of_all_texts_fit_a_variant_of_some():
    marks = torch.zeros(3, 7, dtype=torch.bool)
    marks[1:, 2] = True
    edit = moe.top_k(1, layers=2, tokens=marks)
    with moe.wrap(build("olmoe")) as model:
        expected, clean = model.run(BATCH, edit=edit).logits, model.run(BATCH).logits
        (found,) = Restart(model, BATCH).run([Variant([edit], torch.tensor([1, 2]))])
    assert set(found.texts.tolist()) == {1, 2} and found.touched == (4,)
    assert torch.allclose(found.logits, expected[found.texts, found.columns], atol=1e-4)
    assert not torch.allclose(found.logits, clean[found.texts, found.columns], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_router_that_mixes_texts_is_run_one_variant_at_a_time(dtype):
    """Doge's view of its router's logits mixes the tokens of a batch, so that company changes what a text does."""
    with moe.wrap(build_type("doge", dtype=dtype)) as model:
        expected = [model.run(IDS[:1], edit=moe.top_k(k, layers=1)).logits[0] for k in (1, 2)]
        restart = Restart(model, IDS[:1])
        found = {one.number: one for one in restart.run([Variant([moe.top_k(k, layers=1)]) for k in (1, 2)])}
    assert not restart.separable
    for number, logits in enumerate(expected):
        assert torch.allclose(found[number].logits, logits, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_in_16_bits_is_no_reason_for_whole_passes(dtype):
    with moe.wrap(build("olmoe").to(dtype)) as model:
        restart = Restart(model, BATCH)
    assert restart.exact and restart.separable


def test_layers_that_hand_on_more_than_the_residual_are_found_out_in_16_bits_too():
    with moe.wrap(build_type("inkling2_text", dtype=torch.bfloat16)) as model:
        restart = Restart(model, IDS)
    assert restart.separable and not restart.exact
