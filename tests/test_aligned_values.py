"""Values go to the expert, layer and token that they are of: repeats, masks with holes, reads in part."""

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


# ---- masks with holes --------------------------------------------------------------------------------------

HOLES = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 1]])


def test_a_run_patched_into_itself_is_itself_whatever_its_mask():
    inputs = {"input_ids": IDS, "attention_mask": HOLES}
    with moe.wrap(build("olmoe")) as model:
        run = model.run(inputs, read=["expert_out", "resid_post"])
        for edit in (
            moe.patch(run, layer=1, point="resid_post"),
            moe.patch(run, layer=1, expert=range(8)),
            moe.patch_route(run, layer=1),
        ):
            assert close(model.run(inputs, edit=edit).logits[HOLES.bool()], run.logits[HOLES.bool()])


def test_values_of_a_run_with_holes_are_of_the_nth_real_token():
    with moe.wrap(build("olmoe")) as model:
        run = model.run({"input_ids": OTHER, "attention_mask": HOLES}, read="resid_mid")
        got = model.run(IDS, read="resid_mid", edit=moe.patch(run, layer=LAYER, point="resid_mid"))
        own = model.run(IDS, read="resid_mid")["resid_mid", LAYER]
    for text, mask in enumerate(HOLES):
        real = [column for column in range(7) if mask[column]]
        for number in range(7):
            there = number < len(real)
            expected = run["resid_mid", LAYER][text, real[number]] if there else own[text, number]
            assert torch.equal(got["resid_mid", LAYER][text, number], expected)


def test_values_of_a_run_that_goes_on_from_a_cache_are_refused():
    with moe.wrap(build("olmoe")) as model:
        cache = model.hf(input_ids=IDS[:, :4], use_cache=True).past_key_values
        rest = {"input_ids": IDS[:, 4:], "attention_mask": torch.ones(2, 7, dtype=torch.long), "past_key_values": cache}
        run = model.run(rest, read="resid_post")
        with pytest.raises(BadInput, match="values of the end of a text: expected a run of whole texts"):
            moe.patch(run, layer=1, point="resid_post")


# ---- reads in part -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [(2, 1, 0), (-1, 0), (1, 0)])
def test_a_read_at_some_positions_stands_for_no_whole(positions):
    read = [moe.select(point, positions=positions) for point in ("expert_out", "resid_mid", "router_logits")]
    with moe.wrap(build("olmoe")) as model:
        whole, run = model.run(IDS[:, :3], read="expert_out"), model.run(IDS[:, :3], read=read)
        expected = whole["expert_out", 1][:, list(positions)]
        assert torch.equal(run["expert_out", 1], expected)
        message = "expert_out of layer 1 was read in part: expected a read without positions, got positions "
        for ask in (
            lambda: run.expert(1, 0),
            lambda: run.contribution(1, 0),
            lambda: run.heaviest(1),
            lambda: moe.patch(run, layer=1, expert=0),
            lambda: moe.ablate(layer=1, expert=int(run.routing[1].ids[0, 0, 0]), how="resample", run=run),
        ):
            with pytest.raises(BadInput, match=message):
                ask()
        with pytest.raises(BadInput, match="resid_mid of layer 1 was read in part"):
            moe.patch(run, layer=1, point="resid_mid")
        assert run.routing[1].logits is None


def test_values_are_of_the_tokens_that_they_are_said_to_be_of():
    tokens = moe.wrap(build("olmoe")).run(IDS).tokens
    with pytest.raises(BadInput, match=r"values of other tokens: expected .* \(2, 7\), got \(2, 9\)"):
        moe.ByToken.of(torch.zeros(2, 9, 64), tokens)
