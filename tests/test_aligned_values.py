"""Values go to the expert, layer and token that they are of."""

import pytest
import torch

import moe_interp as moe
from moe_interp.errors import BadInput
from moe_interp.interventions.outputs import Mean
from moe_interp.interventions.values import Values
from tests.reference import interventions as slow
from tests.tiny import build

GENERATOR = torch.Generator().manual_seed(21)
IDS = torch.randint(3, 90, (2, 7), generator=GENERATOR)
OTHER = torch.randint(3, 90, (2, 7), generator=GENERATOR)
MEAN = {(layer, expert): torch.randn(64, generator=GENERATOR) for layer in range(4) for expert in range(8)}
LAYER = 2


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() < 1e-5 * expected.abs().max())


# ---- experts and layers named twice ------------------------------------------------------------------------


def test_an_expert_named_twice_is_named_once():
    hf = build("olmoe")

    def put(table: slow.Table, at: slow.Where) -> None:
        for expert in (3, 5):
            if table.uses(expert):
                table.contribute(expert, MEAN[LAYER, expert])

    expected = slow.run(hf, IDS, LAYER, [("table", put)]).logits
    with moe.wrap(hf) as model:
        got = model.run(IDS, edit=moe.ablate(layer=LAYER, expert=(3, 3, 5), how="mean", mean=MEAN)).logits
        assert (expected - model.run(IDS).logits).abs().max() > 1e-3
    assert close(got, expected)


def test_layers_and_experts_named_twice_make_the_same_intervention():
    with moe.wrap(build("olmoe")) as model:
        run = model.run(OTHER, read="expert_out")
        for make in (
            lambda **where: moe.ablate(**where, how="mean", mean=MEAN),
            lambda **where: moe.ablate(**where, how="resample", run=run),
            lambda **where: moe.patch(run, **where),
            lambda **where: moe.scale(**where, by=2.0),
        ):
            once, again = make(layer=(0, 1), expert=(3, 5)), make(layer=(0, 1, 0), expert=(3, 3, 5))
            assert once == again
            found = model.run(IDS, edit=once), model.run(IDS, edit=again)
            assert torch.equal(found[0].logits, found[1].logits)
            assert found[0].touched == found[1].touched


def test_means_that_are_not_one_for_each_layer_and_expert_are_refused():
    edit = Mean(layers=(0, 1), experts=(3, 3, 5), means=Values.of(torch.zeros(6, 64)))
    with moe.wrap(build("olmoe")) as model, pytest.raises(BadInput, match="expected 4 means, got 6"):
        model.run(IDS, edit=edit)
