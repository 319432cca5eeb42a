"""Restarts under other edits, against whole passes."""

import pytest
import torch

import moe_interp as moe
from moe_interp.errors import BadInput
from moe_interp.restart import Restart, Variant
from tests.tiny import build
from tests.tiny_types import build as build_type

IDS = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(6))
EDIT = moe.ablate(layer=2, expert=3)


def restarted(model: moe.MoEModel, base: moe.Intervention | None, standing: moe.Intervention | None) -> torch.Tensor:
    """Logits of a restart under an edit, at all tokens, and those of whole passes less them."""
    with model.edit(*([standing] if standing else [])):
        own = [base] if base else []
        whole = model.run(IDS, edit=[*own, EDIT]).logits
        restart = Restart(model, IDS, edit=own)
        (outcome,) = restart.run([Variant([EDIT])])
    assert restart.exact
    return outcome.logits - whole[outcome.texts, outcome.columns]


@pytest.mark.parametrize("stands", [True, False])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_restarts_go_on_under_other_edits_once(layer, stands):
    vector = torch.linspace(-2, 2, 64)
    other = moe.steer(vector, layer=layer, point="resid_pre")
    with moe.wrap(build("qwen3_moe")) as model:
        moved = model.run(IDS, edit=other).logits - model.run(IDS).logits
        difference = restarted(model, None if stands else other, other if stands else None)
    assert moved.abs().max() > 0.1
    assert difference.abs().max() < 1e-5


def test_restarts_refuse_standing_edits_of_modules():
    with (
        moe.wrap(build("qwen3_moe")) as model,
        model.edit(moe.top_k(5)),
        pytest.raises(BadInput, match="not measured under edits of modules"),
    ):
        Restart(model, IDS)


def test_a_variant_says_where_its_logits_are_wanted():
    at = torch.zeros(3, 7, dtype=torch.bool)
    at[1, 4] = at[2, 6] = True
    with moe.wrap(build("qwen3_moe")) as model:
        whole = model.run(IDS, edit=EDIT).logits
        some, rest = Restart(model, IDS).run([Variant([EDIT], torch.tensor([0, 2]), at), Variant([EDIT])], ~at)
    assert some.texts.tolist() == [2] and some.columns.tolist() == [6]
    assert torch.allclose(some.logits, whole[2, 6][None], atol=1e-5)
    assert len(rest.logits) == 19 and torch.allclose(rest.logits, whole[~at], atol=1e-5)


@pytest.mark.parametrize("texts", [1, 2])
def test_a_model_that_mixes_the_rows_of_a_batch_is_found_out(texts):
    ids = IDS[:texts]
    with moe.wrap(build_type("doge")) as model:
        restart = Restart(model, ids)
        edits = [moe.ablate(layer=0, expert=expert) for expert in model.run(ids).routing[0].ids[0, 0].tolist()]
        outcomes = list(restart.run([Variant([edit]) for edit in edits]))
        for one in outcomes:
            expected = model.run(ids, edit=edits[one.number]).logits[one.texts, one.columns]
            assert (one.logits - expected).abs().max() < 1e-5
    assert not restart.separable
