"""Padding of a decoder is told by the decoder's own mask: nothing of it counts, is edited, or is the last position."""

import numpy as np
import pytest
import torch

import moe_interp as moe
from tests.tiny_types import build

ENCODER = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
DECODER = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(1))
READS = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
WRITES = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
INPUTS = {
    "input_ids": ENCODER,
    "attention_mask": READS,
    "decoder_input_ids": DECODER,
    "decoder_attention_mask": WRITES,
}


@pytest.fixture(params=["switch_transformers", "nllb-moe"])
def hf(request):
    model = build(request.param)
    model.config.decoder_start_token_id = 0
    return model


def stacks(model):
    """The MoE layers of the encoder, and of the decoder."""
    names = ("encoder", "decoder")
    return [[layer for layer in model.layers if model.spec.layers[layer].stack == name] for name in names]


def test_each_stack_has_its_own_mask(hf):
    with moe.wrap(hf) as model:
        run, (encoder, decoder) = model.run(INPUTS), stacks(model)
    assert torch.equal(run.mask, WRITES.bool())
    assert all(torch.equal(run.routing[layer].mask, READS.bool()) for layer in encoder)
    assert all(torch.equal(run.routing[layer].mask, WRITES.bool()) for layer in decoder)
    assert encoder and decoder


def test_the_last_position_is_the_last_token(hf):
    with moe.wrap(hf) as model:
        layer = stacks(model)[1][-1]
        whole = model.run(INPUTS, read=moe.select("resid_post", layers=layer))["resid_post", layer]
        last = model.run(INPUTS, read=moe.select("resid_post", layers=layer, positions=-1))["resid_post", layer]
        assert torch.equal(last[:, 0], whole[[0, 1], [4, 1]])
        changed = model.run(INPUTS, edit=moe.apply("resid_post", lambda value: 2 * value, layers=layer))
        assert changed.touched == (7,)
        with pytest.raises(moe.MoEError, match="position 2"):
            model.run(INPUTS, read=moe.select("resid_post", layers=layer, positions=2))


def chosen(model, run, experts=8):
    """Loads of every layer, over the tokens that are real in its own stack."""
    loads, (encoder, _) = [], stacks(model)
    for layer in model.layers:
        mask = READS if layer in encoder else WRITES
        ids = [one for b, s in mask.nonzero().tolist() for one in run.routing[layer].ids[b, s].tolist()]
        loads.append([ids.count(expert) / len(ids) for expert in range(experts)])
    return np.array(loads)


@pytest.mark.parametrize("given", ["ids", "labels"])
def test_a_watched_training_counts_each_stacks_own_tokens(hf, given):
    inputs = dict(INPUTS)
    if given == "labels":  # the model makes the decoder's input from them, and padding has none
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        inputs["labels"] = DECODER.masked_fill(WRITES == 0, -100)
    with moe.RoutingWatch(hf, every=1) as watch, watch.step(0):
        hf(**inputs)
    with moe.wrap(hf) as model:
        expected = chosen(model, model.run(inputs))
    report = watch.table().isel(step=0)
    np.testing.assert_allclose(report.utilisation, expected)
    assert int(report.tokens) == 7


def test_without_a_mask_every_token_of_the_decoder_is_real(hf):
    inputs = {name: value for name, value in INPUTS.items() if name != "decoder_attention_mask"}
    with moe.wrap(hf) as model:
        assert model.run(inputs).mask.all()
