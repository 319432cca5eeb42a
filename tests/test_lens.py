"""The expert lens and logit attribution, against the slow reference and the identities that they keep."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import moe_interp as moe
from moe_interp.analyses import decoding
from moe_interp.analyses.attribution import logit_attribution
from moe_interp.analyses.decoding import decode_top
from moe_interp.analyses.lens import expert_lens
from moe_interp.errors import BadInput, UnknownName, UnsupportedModel
from moe_interp.results import load, save
from tests.reference import lens as reference
from tests.reference.model import forward
from tests.tiny import build

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss")
SHARED = ("qwen2_moe", "deepseek_v3")
TOLERANCE = 1e-5
SLOTS = 3


@pytest.fixture(scope="module")
def tiny():
    """Models, one text each, and what the slow reference says about it; built once per family."""
    cache: dict[str, tuple] = {}

    def make(family: str):
        if family not in cache:
            hf = build(family)
            ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(1))
            cache[family] = (hf, ids, forward(hf, ids))
        return cache[family]

    return make


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE: the 256 bytes, and two merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "Ġc", "Ġca"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("Ġ", "c"), ("Ġc", "a")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def cells(result, variable: str) -> dict:
    """Values of a variable by (layer, part, pos)."""
    coords = [result[dim].values.tolist() for dim in ("layer", "part", "pos")]
    values = result[variable].transpose("layer", "part", "pos", ...).values
    return dict(zip(product(*coords), values.reshape(-1, *values.shape[3:]), strict=True))


def assert_rank(got: float, log_p: torch.Tensor, token: int) -> None:
    """The rank is right, allowing for logits that are equal but for rounding."""
    nearby = [1 + int((log_p > log_p[token] + slack).sum()) for slack in (TOLERANCE, -TOLERANCE)]
    assert nearby[0] <= got <= max(nearby[0], nearby[1] - 1)


@pytest.mark.parametrize("definition", ["paper", "as_coded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_equals_the_reference(tiny, family, definition):
    hf, ids, run = tiny(family)
    slow = reference.expert_lens if definition == "paper" else reference.expert_lens_as_coded
    rows = slow(hf, ids, run)
    with moe.wrap(hf) as model:
        result = expert_lens(model, ids, definition=definition, top=4)
    names = ("top_id", "top_probability", "kl", "true_rank", "final_rank")
    top_id, probability, kl, true_rank, final_rank = (cells(result, name) for name in names)
    assert set(kl) == set(rows)

    largest = max(row.kl for row in rows.values())
    predicted = run.logits[0].argmax(-1)
    for key, row in rows.items():
        position = key[2]
        assert len(set(top_id[key].tolist())) == 4
        np.testing.assert_allclose(probability[key], row.top(4), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(probability[key], row.log_p[top_id[key]].exp(), rtol=0, atol=TOLERANCE)
        assert abs(kl[key] - row.kl) < TOLERANCE * largest
        assert_rank(final_rank[key], row.log_p, int(predicted[position]))
        if position + 1 < ids.shape[1]:
            assert_rank(true_rank[key], row.log_p, int(ids[0, position + 1]))
        else:
            assert np.isnan(true_rank[key])
    np.testing.assert_array_equal(result["agreement"], result["final_rank"] == 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_stand_in_order_of_weight(tiny, family):
    hf, ids, run = tiny(family)
    with moe.wrap(hf) as model:
        result = expert_lens(model, ids)
    for layer in result["layer"].values.tolist():
        weights, order = run.points["gate_weights", layer][0].detach().sort(dim=-1, descending=True)
        np.testing.assert_allclose(result["gate_weight"].sel(layer=layer), weights, atol=TOLERANCE)
        chosen = run.points["expert_ids", layer][0].gather(1, order)
        np.testing.assert_array_equal(result["expert"].sel(layer=layer), chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_together_are_the_layer_and_the_last_layer_the_model(tiny, family):
    hf, ids, _ = tiny(family)
    with moe.wrap(hf) as model:
        result = expert_lens(model, ids, top=96)
    shared = "+shared" if family in SHARED else ""
    whole, post = (result.sel(part=name) for name in (f"resid_mid+c1..{SLOTS}{shared}", "resid_post"))
    np.testing.assert_allclose(whole["kl"], post["kl"], atol=TOLERANCE)
    np.testing.assert_allclose(whole["top_probability"], post["top_probability"], atol=TOLERANCE)

    last = post.isel(layer=-1)
    assert float(last["kl"].max()) < TOLERANCE
    assert (last["final_rank"] == 1).all() and (last["agreement"] == 1).all()
    np.testing.assert_allclose(last["top_probability"], result["final_probability"], atol=TOLERANCE)
    np.testing.assert_array_equal(last["true_rank"], result["final_true_rank"])
    np.testing.assert_array_equal(result["token_id"], ids[0])
    np.testing.assert_array_equal(result["next_id"], [*ids[0, 1:].tolist(), -1])


def test_parts_say_what_they_are(tiny):
    hf, ids, _ = tiny("deepseek_v3")
    with moe.wrap(hf) as model:
        result = expert_lens(model, ids, layers=[2], positions=0)
    told = {
        part: tuple(int(result[name].sel(part=part)) for name in ("part_rank", "part_sum", "part_shared"))
        for part in (
            "resid_mid",
            "resid_mid+c1",
            "resid_mid+c2",
            "c2",
            "f3",
            "resid_mid+c1..3+shared",
            "shared",
        )
    }
    assert told == {
        "resid_mid": (0, 0, 0),
        "resid_mid+c1": (1, 1, 0),
        "resid_mid+c2": (2, -1, 0),
        "c2": (2, -1, 0),
        "f3": (3, -1, 0),
        "resid_mid+c1..3+shared": (0, 3, 1),
        "shared": (0, -1, 1),
    }


def test_layers_and_positions_select_from_the_whole(tiny):
    hf, ids, _ = tiny("qwen2_moe")
    with moe.wrap(hf) as model:
        whole = expert_lens(model, ids)
        some = expert_lens(model, ids, layers=3, positions=[-1, 2])
    expected = whole.sel(layer=[3], pos=[6, 2])
    for name in some.data_vars:
        if some[name].dtype.kind == "f":
            np.testing.assert_allclose(some[name], expected[name].transpose(*some[name].dims), atol=TOLERANCE)
        else:
            np.testing.assert_array_equal(some[name], expected[name].transpose(*some[name].dims))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(tiny, side):
    hf, ids, _ = tiny("qwen2_moe")
    padding = torch.zeros(1, 3, dtype=torch.long)
    pair = [padding, ids] if side == "left" else [ids, padding]
    padded = {"input_ids": torch.cat(pair, 1), "attention_mask": torch.cat([(x > 0).long() for x in pair], 1)}
    with moe.wrap(hf) as model:
        expected, got = expert_lens(model, ids), expert_lens(model, padded)
        split = logit_attribution(model, padded, 5)
        unpadded = logit_attribution(model, ids, 5)
    assert got["pos"].values.tolist() == list(range(7))
    np.testing.assert_allclose(got["kl"], expected["kl"], atol=TOLERANCE)
    np.testing.assert_array_equal(got["true_rank"], expected["true_rank"])
    np.testing.assert_array_equal(got["next_id"], expected["next_id"])
    np.testing.assert_allclose(split["attribution"], unpadded["attribution"], atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 10, 100, 10_000])
def test_the_chunk_bounds_what_is_decoded_at_once_and_changes_nothing(chunk, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows, unembed = torch.randn(9, 20, 8, generator=generator), torch.randn(30, 8, generator=generator)
    final = torch.randn(9, 30, generator=generator).log_softmax(-1)
    targets = torch.tensor([0, 3, 29, 7, 7, 1, 2, 3, -1])
    sizes: list[int] = []

    def decode(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[0] * hidden.shape[1])
        return hidden @ unembed.T

    whole = decode_top(lambda hidden: hidden @ unembed.T, rows, final, targets, top=3, chunk=180)
    monkeypatch.setattr(decoding, "TILE", 1500)
    got = decode_top(decode, rows, final, targets, top=3, chunk=chunk)
    assert max(sizes) <= chunk and sum(sizes) == 180
    assert max(sizes) > chunk / 2 or len(sizes) == 1
    for name, values, expected in zip(whole._fields, got, whole, strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=TOLERANCE, equal_nan=True, msg=name)


def test_the_lens_passes_its_chunk_on(tiny):
    hf, ids, _ = tiny("deepseek_v3")
    with moe.wrap(hf) as model:
        sizes: list[int] = []
        handle = hf.lm_head.register_forward_pre_hook(lambda _, args: sizes.append(args[0][..., 0].numel()))
        small, large = (expert_lens(model, ids, chunk=chunk) for chunk in (5, 10_000))
        handle.remove()
    # Twice the forward pass (7 rows), and 3 layers x 7 positions of 27 parts.
    assert sorted(sizes)[-5:] == [7, 7, 189, 189, 189] and sum(size <= 5 for size in sizes) == 3 * 7 * 6
    np.testing.assert_allclose(small["kl"], large["kl"], atol=TOLERANCE)
    np.testing.assert_array_equal(small["top_id"], large["top_id"])


def test_decoded_rows_by_hand():
    final = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    rows = torch.tensor([[[0.5, 0.25, 0.125, 0.125], [0.125, 0.25, 0.125, 0.5], [0.25, 0.25, 0.25, 0.25]]]).log()
    got = decode_top(lambda hidden: hidden + 3.0, rows, final, torch.tensor([1]), top=1, chunk=2)
    assert got.ids[0, :2, 0].tolist() == [0, 3]
    torch.testing.assert_close(got.probabilities[0, :, 0], torch.tensor([0.5, 0.5, 0.25]))
    assert got.true_rank.tolist() == [[2.0, 2.0, 1.0]]
    assert got.final_rank.tolist() == [[1, 3, 1]]
    ln2 = float(np.log(2.0))
    # By hand: 1/2 ln 4 - 1/8 ln 4, and ln 4 less the entropy of the final distribution, 7/4 ln 2.
    torch.testing.assert_close(got.kl[0], torch.tensor([0.0, 0.75 * ln2, 0.25 * ln2]), atol=1e-6, rtol=0)


def test_tokens_are_readable(tokenizer):
    hf = build("olmoe", vocab_size=300)
    with moe.wrap(hf, tokenizer) as model:
        result = expert_lens(model, "a cat", top=300)
    assert result["token"].values.tolist() == ["a", " ca", "t"]
    texts = dict(zip(result["final_id"].values[0].tolist(), result["final_token"].values[0].tolist(), strict=True))
    assert texts[tokenizer.convert_tokens_to_ids("Ġca")] == " ca"
    assert texts[tokenizer.convert_tokens_to_ids("Ā")] == "\N{SYMBOL FOR NULL}"
    assert texts[299] == "299"  # the model's vocabulary is padded beyond the tokenizer's
    layer = result.isel(layer=0, part=0, pos=0)
    assert [texts[token] for token in layer["top_id"].values.tolist()] == layer["top_token"].values.tolist()


def test_without_a_tokenizer_tokens_are_ids(tiny):
    hf, ids, _ = tiny("olmoe")
    with moe.wrap(hf) as model:
        result = expert_lens(model, ids[0].tolist())
    assert result["token"].values.tolist() == [str(token) for token in ids[0].tolist()]
    np.testing.assert_array_equal(result["top_token"], result["top_id"].values.astype(str))


def test_results_survive_a_file(tiny, tokenizer, tmp_path):
    with moe.wrap(build("qwen2_moe", vocab_size=300), tokenizer) as model:
        results = (
            expert_lens(model, "a cat", positions=[0, -1]),
            logit_attribution(model, "a cat", [" ca", 7]),
        )
    for result in results:
        again = load(save(result, tmp_path / "result.nc"))
        assert result.identical(again)


def test_half_precision_stays_close():
    hf, exact = build("deepseek_v3", dtype=torch.bfloat16), build("deepseek_v3", dtype=torch.bfloat16).float()
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(1))
    with moe.wrap(hf) as model, moe.wrap(exact) as in_float:
        # At position 0 both models route alike; elsewhere rounding may flip a choice.
        got, expected = (expert_lens(one, ids, layers=1, positions=0) for one in (model, in_float))
        split, exact_split = (logit_attribution(one, ids, [5, 6], position=0) for one in (model, in_float))
    np.testing.assert_array_equal(got["expert"], expected["expert"])
    np.testing.assert_allclose(got["kl"], expected["kl"], atol=0.05)
    np.testing.assert_allclose(split["logit"], exact_split["logit"], atol=0.1)
    assert float(abs(split["remainder"]).max()) < 0.05


@pytest.mark.parametrize("position", [-1, 0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_equal_the_reference_and_sum_to_the_logit(tiny, family, position):
    hf, ids, run = tiny(family)
    tokens = [5, 0, 95]
    with moe.wrap(hf) as model:
        result = logit_attribution(model, ids, tokens, position=position)
    assert result["part"].values.tolist()[-1] == "bias"
    for token in tokens:
        shares = reference.attribution(hf, run, position, token)
        got = result["attribution"].sel(token=token)
        assert set(got["part"].values.tolist()) == set(shares) | {"bias"}
        for part, share in shares.items():
            assert abs(float(got.sel(part=part)) - share) < TOLERANCE
        logit = run.logits[0, position, token].item()
        assert abs(float(got.sum()) - logit) < 1e-4
        assert abs(float(result["logit"].sel(token=token)) - logit) < 1e-4
        assert abs(float(result["remainder"].sel(token=token))) < 1e-4


def test_attributions_name_their_experts(tiny):
    hf, ids, run = tiny("deepseek_v3")
    with moe.wrap(hf) as model:
        result = logit_attribution(model, ids, 5)
    weights, order = run.points["gate_weights", 2][0, -1].detach().sort(descending=True)
    for rank in range(1, SLOTS + 1):
        part = result.sel(part=f"2.c{rank}")
        assert (str(part["part_kind"].values), int(part["part_layer"]), int(part["part_rank"])) == ("expert", 2, rank)
        assert int(part["part_expert"]) == run.points["expert_ids", 2][0, -1, order[rank - 1]]
        assert abs(float(part["gate_weight"]) - float(weights[rank - 1])) < TOLERANCE


def test_a_final_layer_norm_with_biases_is_frozen_too():
    hf = build("olmoe")
    hf.model.norm = nn.LayerNorm(64)
    hf.lm_head = nn.Linear(64, 96)
    with torch.no_grad():
        for parameter in [*hf.model.norm.parameters(), *hf.lm_head.parameters()]:
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    with moe.wrap(hf) as model:
        ids = list(range(3, 9))
        logits = model.run(ids).logits[0, -1, [5, 6]]
        result = logit_attribution(model, ids, [5, 6])
    np.testing.assert_allclose(result["attribution"].sum("part"), logits, atol=1e-4)
    constant = hf.lm_head.weight[[5, 6]] @ hf.model.norm.bias + hf.lm_head.bias[[5, 6]]
    np.testing.assert_allclose(result["attribution"].sel(part="bias"), constant.detach(), atol=TOLERANCE)


def test_logits_are_split_with_their_scale_and_before_a_soft_cap(tiny):
    hf, ids, run = tiny("olmoe")
    with moe.wrap(hf) as model:
        model.spec = replace(model.spec, logit_scale=0.25, logit_softcap=2.0)
        result = logit_attribution(model, ids, [5, 6])
        capped = model.decode(run.points["resid_post", 3][0, -1])[[5, 6]].detach()
    total = result["attribution"].sum("part")
    np.testing.assert_allclose(total, 0.25 * run.logits[0, -1, [5, 6]].detach(), atol=1e-4)
    np.testing.assert_allclose(2.0 * np.tanh(total / 2.0), capped, atol=1e-4)


class Squash(nn.Module):
    """No norm that a scale could be frozen of."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.tanh()


def test_a_norm_of_another_form_is_refused():
    hf = build("olmoe")
    hf.model.norm = Squash()
    with (
        moe.wrap(hf) as model,
        pytest.raises(UnsupportedModel, match="final norm cannot be frozen.*got Squash"),
    ):
        logit_attribution(model, [3, 4, 5], 7)


def test_parts_that_do_not_add_up_are_refused():
    hf = build("olmoe")
    handle = hf.model.layers[2].mlp.register_forward_hook(lambda _, args, out: 1.01 * out)
    with moe.wrap(hf) as model:
        with pytest.raises(UnsupportedModel, match="resid_post of layer 2 is not the sum of its parts"):
            expert_lens(model, [3, 4, 5])
        with pytest.raises(UnsupportedModel, match="the last resid_post is not the sum of its parts"):
            logit_attribution(model, [3, 4, 5], 7)
    handle.remove()


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_parts_under_a_wider_router_are_as_many_as_it_chooses(tiny, family):
    hf, ids, _ = tiny(family)
    with moe.wrap(hf) as model:
        plain = expert_lens(model, ids)
        with model.edit(moe.top_k(5)):
            wide, run = expert_lens(model, ids), model.run(ids)
            attributed = logit_attribution(model, ids, 7)
        layer = int(wide.layer[-1])
        with model.edit(moe.top_k(5, layers=layer)), pytest.raises(BadInput, match="layers with different parts"):
            expert_lens(model, ids)
    assert (plain.sizes["rank"], wide.sizes["rank"]) == (3, 5)
    assert "resid_mid+c1..5" in wide.part
    order = run.routing[layer].by_rank()
    expected = run.routing[layer].ids.gather(-1, order)[0]
    np.testing.assert_array_equal(wide.expert.sel(layer=layer).transpose("pos", "rank"), expected)
    assert f"{layer}.c5" in attributed.part


def test_standing_edits_are_named_where_parts_do_not_add_up(tiny):
    hf, ids, _ = tiny("olmoe")
    with moe.wrap(hf) as model:
        other = model.run(ids.flip(1), read="resid_post")
        with model.edit(moe.patch(other, layer=3, point="resid_post")):
            for lens in (lambda: expert_lens(model, ids), lambda: logit_attribution(model, ids, 7)):
                with pytest.raises(
                    UnsupportedModel, match="not the sum of its parts.* under standing edits. Leave out"
                ):
                    lens()


BAD_LENS = [
    (dict(text=[[3, 4], [5, 6]]), BadInput, "one text.*got 2 texts"),
    (dict(text="hello"), BadInput, "needs a tokenizer"),
    (dict(text=[3, 96]), BadInput, "out of the vocabulary"),
    (dict(text=list(range(3, 90)) * 2), BadInput, "over the context length"),
    (dict(text={"inputs_embeds": torch.zeros(1, 2, 64)}), BadInput, "one text.*got inputs_embeds"),
    (dict(layers=[0]), UnknownName, "layer 0 has no experts"),
    (dict(layers=[9]), UnknownName, "unknown layer 9"),
    (dict(layers=[]), BadInput, "no layers"),
    (dict(positions=[]), BadInput, "no layers or positions"),
    (dict(positions=3), BadInput, "no position 3"),
    (dict(positions=[0, -4]), BadInput, "no position -4"),
    (dict(top=0), BadInput, "invalid top.*got 0"),
    (dict(top="5"), BadInput, "invalid top.*got '5'"),
    (dict(top=97), BadInput, "top out of range.*1 to 96.*got 97"),
    (dict(chunk=0), BadInput, "invalid chunk"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD_LENS)
def test_bad_input_to_the_lens_is_told(tiny, wrong, error, message):
    with moe.wrap(tiny("deepseek_v3")[0]) as model, pytest.raises(error, match=message):
        expert_lens(model, **{"text": [3, 4, 5], **wrong})


def test_layers_of_different_kinds_are_asked_for_apart(tiny):
    with moe.wrap(tiny("olmoe")[0]) as model:
        narrow = replace(model.spec.layers[1], moe=replace(model.spec.moe(1), top_k=2))
        model.spec = replace(model.spec, layers=(model.spec.layers[0], narrow, *model.spec.layers[2:]))
        with pytest.raises(BadInput, match="layers with different parts.*Ask for them apart"):
            expert_lens(model, [3, 4, 5])
        assert expert_lens(model, [3, 4, 5], layers=[0, 2, 2]).sizes["layer"] == 2


BAD_TOKENS = [
    ([], "no such tokens"),
    (96, "no such tokens.*0 to 95.*got \\[96\\]"),
    (-1, "no such tokens"),
    ("a", "text needs a tokenizer"),
]


@pytest.mark.parametrize(("tokens", "message"), BAD_TOKENS)
def test_bad_tokens_are_told(tiny, tokens, message):
    with moe.wrap(tiny("olmoe")[0]) as model, pytest.raises(BadInput, match=message):
        logit_attribution(model, [3, 4, 5], tokens)


def test_a_text_of_several_tokens_is_no_token(tokenizer):
    with moe.wrap(build("olmoe", vocab_size=300), tokenizer) as model:
        with pytest.raises(BadInput, match="' cat' is not one token"):
            logit_attribution(model, "a cat", " cat")
        assert logit_attribution(model, "a cat", [" ca"])["token_text"].values.tolist() == [" ca"]


def test_an_unknown_definition_is_told(tiny):
    expected = "invalid definition.*one of 'paper', 'as_coded', got 'tuned'"
    with moe.wrap(tiny("olmoe")[0]) as model, pytest.raises(BadInput, match=expected):
        expert_lens(model, [3, 4, 5], definition="tuned")
