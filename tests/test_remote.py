"""A model on a server, over loopback: the same runs, generations and analyses, or a refusal that says why.

The server is a process in which moe_interp cannot be imported; the client's model has no weights.
"""

import json
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from nnsight import TransformersModel
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

import moe_interp as moe
from moe_interp.errors import BadInput, RemoteFailure, UnknownName, UnsupportedModel
from moe_interp.hosts.passes import _small
from moe_interp.remote import RemoteMoEModel
from tests import tiny
from tests.served import saved, tokenizer, unloaded
from tests.test_analyses_on_types import ANALYSES, IDS

TEXTS = ["hello there", "a text of another length"]
EXACT = 1e-6


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, address: str) -> Callable[[str], tuple[moe.MoEModel, moe.MoEModel]]:
    """A family's model here, and the same on the server."""

    @cache
    def models(family: str) -> tuple[moe.MoEModel, moe.MoEModel]:
        hf = tiny.build(family)
        lm = unloaded(saved(hf, tmp_path_factory.mktemp(family)))
        return moe.wrap(hf, tokenizer()), moe.wrap(lm, remote=address, trust_server=True)

    return models


each_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@each_family
def test_everything_read_is_what_is_read_here(pair, family):
    here, away = pair(family)
    one, other = (model.run(TEXTS, read=list(here.points)) for model in (here, away))
    assert torch.equal(one.logits[one.mask], other.logits[other.mask])
    assert one.values.keys() == other.values.keys() and torch.equal(one.mask, other.mask)
    for key, value in one.values.items():
        assert torch.equal(value[one.mask], other.values[key][one.mask]), key
        assert value.dtype == other.values[key].dtype
    for layer, route in one.routing.items():
        assert torch.equal(route.ids[one.mask], other.routing[layer].ids[one.mask])
        assert torch.equal(route.weights[one.mask], other.routing[layer].weights[one.mask])
    assert one.token_ids is not None and torch.equal(one.token_ids, other.token_ids)  # type: ignore[arg-type]


@each_family
def test_reads_in_part(pair, family):
    here, away = pair(family)
    layer = here.layers[-1]
    reads = [
        moe.select("expert_out", layers=[layer], positions=[0, -1]),
        moe.select("resid_post", positions=-1, top=4),
        moe.select("moe_out", layers=layer, top=2),
    ]
    one, other = (model.run(TEXTS, read=reads, output=False) for model in (here, away))
    assert torch.equal(one["expert_out", layer], other["expert_out", layer])
    assert one.tops.keys() == other.tops.keys() and len(one.tops) > 2
    for key, (ids, logprobs) in one.tops.items():
        seen = torch.ones(ids.shape[:2], dtype=torch.bool) if ids.shape[1] == 1 else one.mask
        assert torch.equal(ids[seen], other.tops[key].ids[seen])
        assert (logprobs - other.tops[key].logprobs)[seen].abs().max() <= 1e-5
    whole = here.run(TEXTS, read=moe.select("resid_post", layers=layer, positions=-1))
    expected = here.decode(whole["resid_post", layer]).log_softmax(-1).topk(4)
    found = one.top_tokens("resid_post", layer)
    assert torch.equal(found.ids, expected.indices) and torch.allclose(found.logprobs, expected.values, atol=1e-5)
    for run in (one, other):
        with pytest.raises(BadInput, match="no output.*output=False"):
            _ = run.logits


def edits_of(model: moe.MoEModel) -> dict[str, Any]:
    """Interventions of all kinds that a server can carry out."""
    layer, later = model.layers[1], model.layers[-1]
    run = model.run(TEXTS[0])
    expert = int(run.routing[layer].ids[0, -1, 0])
    other = (expert + 1) % 8
    elsewhere = model.run(TEXTS[0][::-1], read="expert_out")
    found = {
        "ablate": moe.ablate(layer=layer, expert=expert),
        "forbid": moe.mask(layer=layer, expert=expert),
        "scale": moe.scale(layer=[layer, later], expert=[expert, other], by=-2.0),
        "replace": moe.replace(torch.ones(64), layer=layer, expert=expert),
        "patch": moe.patch(elsewhere, layer=layer, expert=[expert, other]),
        "route": moe.patch_route(elsewhere, layer=layer),
        "steer": moe.steer(torch.ones(64), point="resid_post", layer=layer, by=0.5),
        "force": moe.force([other], layer=layer),
        "given weights": moe.force([other, expert], layer=layer, weights=[0.3, 0.7]),
        "bias": moe.bias(by=3.0, layer=layer, expert=other),
        "top_k": moe.top_k(1, renormalise=True),
        "share": moe.share(0.5),
        "randomize": moe.randomize(seed=3),
        "swap": moe.swap(layer=layer, experts=(expert, other)),
        "noise": moe.noise(0.3, point="resid_mid", layer=layer),
        "embed": moe.noise(0.3),
        "neurons": moe.apply("expert_act", lambda act: act * 1.5, layers=layer),
        "logits": moe.apply("router_logits", lambda logits: logits.flip(-1), layers=layer),
        "logits and choice": [
            moe.apply("router_logits", lambda logits: logits.flip(-1), layers=layer),
            moe.mask(layer=layer, expert=expert),
        ],
        "several": [
            moe.scale(layer=layer, expert=expert, by=2.0, positions=-1),
            moe.ablate(layer=later, expert=other),
            moe.apply("moe_out", torch.zeros_like, layers=later, positions=0),
        ],
    }
    if "shared_out" in model.points:
        found["shared"] = moe.apply("shared_out", lambda out: out * 1.5, layers=layer)
    return found


@each_family
def test_everything_edited_is_what_is_edited_here(pair, family):
    here, away = pair(family)
    plain = here.run(TEXTS)
    for name, edit in edits_of(here).items():
        one, other = here.run(TEXTS, edit=edit), away.run(TEXTS, edit=edit)
        difference = (one.logits - other.logits)[one.mask].abs().max()
        assert (one.logits - plain.logits)[one.mask].abs().max() > 1e-3, name
        assert difference <= EXACT * one.logits[one.mask].abs().max(), name
        assert one.touched == other.touched, name


def after_neurons(model: moe.MoEModel) -> dict[str, list[moe.Intervention]]:
    """Edits of neurons, with what else can be done to the same call of experts."""
    layer = model.layers[1]
    run, elsewhere = model.run(TEXTS[0]), model.run(TEXTS, read="expert_out")
    expert = int(run.routing[layer].ids[0, -1, 0])
    neurons = moe.apply("expert_act", lambda act: act * 1.5, layers=layer)
    return {
        "alone": [neurons],
        "scale": [neurons, moe.scale(layer=layer, expert=None, by=0.5)],
        "patch": [neurons, moe.patch(elsewhere, layer=layer, expert=expert)],
        "mean": [neurons, moe.ablate(layer=layer, expert=expert, how="mean", mean={(layer, expert): torch.ones(64)})],
        "before and after": [
            moe.scale(layer=layer, expert=expert, by=2.0),
            moe.apply("gate_weights", lambda weights: weights * 0.7, layers=layer),
            moe.apply("routed_out", lambda out: out * 1.2, layers=layer),
            neurons,
        ],
    }


@each_family
def test_what_follows_edited_neurons_is_made_of_them(pair, family):
    here, away = pair(family)
    near = moe.wrap(TransformersModel(tiny.build(family), tokenizer=tokenizer()), remote="local")
    reads = [moe.select(name, layers=here.layers[1]) for name in ("expert_act", "expert_out", "routed_out", "moe_out")]
    options = {"max_new_tokens": 6, "do_sample": False}
    for name, edit in after_neurons(here).items():
        one = here.run(TEXTS, edit=edit, read=reads)
        for kind, model in (("server", away), ("local", near)):
            other = model.run(TEXTS, edit=edit, read=reads)
            for key, value in (*one.values.items(), ("logits", one.logits)):
                found = other.logits if key == "logits" else other.values[key]
                difference = (found - value)[one.mask].abs().max()
                assert difference <= EXACT * value[one.mask].abs().max(), (name, kind, key)
            assert one.touched == other.touched, (name, kind)
    edit = after_neurons(here)["scale"]
    assert away.generate(TEXTS[1], edit=edit, **options) == here.generate(TEXTS[1], edit=edit, **options)


@each_family
def test_the_same_tokens_are_written(pair, family):
    here, away = pair(family)
    layer = here.layers[1]
    expert = int(here.run(TEXTS[0]).routing[layer].ids[0, -1, 0])
    edit = [moe.scale(layer=layer, expert=expert, by=-5.0), moe.bias(by=4.0, layer=here.layers[-1], expert=2)]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = here.generate(TEXTS, edit=edit, **options)
    assert expected != here.generate(TEXTS, **options)
    assert away.generate(TEXTS, edit=edit, **options) == expected
    with away.edit(edit):
        assert away.generate(TEXTS, **options) == expected
        assert torch.equal(away.run(TEXTS[0]).logits, away.run(TEXTS[0], edit=()).logits)
    assert away.generate(TEXTS[1], **options) == here.generate(TEXTS[1], **options)


def test_an_edit_ends_with_its_own_with_there_too(pair):
    away = pair("olmoe")[1]
    edits = [moe.ablate(layer=away.layers[1], expert=expert) for expert in (0, 1)]
    first, second = map(away.edit, edits)
    first.__enter__()
    second.__enter__()
    assert away._standing == edits
    first.__exit__(None, None, None)
    assert away._standing == edits[1:]
    second.__exit__(None, None, None)
    assert away._standing == []


def test_edits_at_positions_that_are_still_to_be_written(pair):
    here, away = pair("olmoe")
    edit = moe.apply("resid_post", lambda value: -3.0 * value, layers=here.layers[0], positions=(5, 6))
    options = {"max_new_tokens": 6, "do_sample": False}
    plain, expected = (here.generate("abc", edit=some, **options) for some in ((), edit))
    assert plain != expected
    assert away.generate("abc", edit=edit, **options) == expected
    assert here.generate("abc", edit=edit, use_cache=False, **options) == expected
    for model in (here, away):
        with pytest.raises(BadInput, match="position"):
            model.run("abc", edit=edit)


REFUSED = {
    "lens": "unembedding",
    "neurons": "matrices",
    "ensemble": "experts on inputs",
    "attribution": "unembedding|modules",
    "tuned": "unembedding|modules|gradients",
    "norms": "experts on inputs",
    "weights": "matrices|experts on inputs",
    "trace": "modules",
    "attribution patching": "gradients|modules",
    "audit": "gradients|modules|unembedding|experts on inputs",
}


WITHOUT_WEIGHTS: dict[str, Callable[[moe.MoEModel], Any]] = {
    **ANALYSES,
    "trace of given noise": lambda model: moe.causal_trace(
        model, IDS, (1, 2), 7, noise=0.5, samples=2, layers=model.layers[0]
    ),
}


@pytest.mark.parametrize("name", list(WITHOUT_WEIGHTS))
def test_analyses_give_the_same_or_say_what_they_need(pair, name):
    here, away = pair("qwen3_moe")
    if name == "shared":
        here, away = pair("qwen2_moe")
    if name in REFUSED:
        with pytest.raises(UnsupportedModel, match=f"({REFUSED[name]}).* cannot be had of a model on a server"):
            WITHOUT_WEIGHTS[name](away)
        return
    one, other = WITHOUT_WEIGHTS[name](here), WITHOUT_WEIGHTS[name](away)
    assert isinstance(one, xr.Dataset) and one.sizes == other.sizes
    for variable, values in one.data_vars.items():
        assert values.dtype == other[variable].dtype
        if values.dtype.kind in "fiu":
            np.testing.assert_allclose(other[variable].values, values.values, rtol=1e-4, atol=1e-5, err_msg=variable)
        else:
            assert (values.values == other[variable].values).all(), variable


@pytest.mark.parametrize(
    "use, text",
    [
        (lambda model: model.decode(torch.zeros(64)), "unembedding.*top=5"),
        (lambda model: model.experts(1), "experts on inputs of one's own.*moe.force"),
        (lambda model: model.weights(1, 2), "matrices of experts"),
        (lambda model: model.hf, "modules of the model"),
        (lambda model: model.audit(), "an audit.*here"),
        (lambda model: model.plain(), "a plain model"),
        (lambda model: model.run("abc", grad=True), "gradients.*this process"),
        (lambda model: model.run("abc", edit=moe.top_k(5)), "edits of modules.*top_k above the model's own K"),
    ],
)
def test_what_needs_the_weights_is_refused(pair, use, text):
    with pytest.raises(UnsupportedModel, match=text):
        use(pair("qwen3_moe")[1])


def test_what_cannot_be_right_is_refused_before_it_is_sent(pair):
    _, away = pair("qwen3_moe")
    nowhere = RemoteMoEModel(away.lm, "http://127.0.0.1:9")  # type: ignore[attr-defined]
    for error, options in (
        (UnknownName, {"read": "shared_out"}),
        (UnknownName, {"edit": moe.ablate(layer=1, expert=0)}),
        (UnknownName, {"edit": moe.ablate(layer=0, expert=8)}),
        (BadInput, {"edit": moe.ablate(layer=0, expert=1, positions=7)}),
        (BadInput, {"read": moe.select("router_logits", top=3)}),
    ):
        with pytest.raises(error):
            nowhere.run("abc", **options)
    with pytest.raises(BadInput, match="text 0 is empty"):
        nowhere.run("")
    with pytest.raises(OSError):  # nobody there
        nowhere.run("abc")


def test_what_fails_on_the_server_says_so(pair):
    def broken(value):
        raise ValueError("no such thing as a free lunch")

    _, away = pair("olmoe")
    with pytest.raises(RemoteFailure, match="the server could not run this.*no such thing as a free lunch"):
        away.run("abc", edit=moe.apply("moe_out", broken))
    assert torch.isfinite(away.run("abc").logits).all()  # and the server goes on


def test_what_is_refused_on_the_server_is_our_own_error(pair):
    _, away = pair("olmoe")
    with pytest.raises(BadInput, match="texts cannot be told apart.*got num_beams=2. Repeat the text"):
        away.generate("abc", edit=moe.ablate(layer=1, expert=0), num_beams=2, max_new_tokens=2)


def test_the_client_has_no_weights(pair):
    for family in ("olmoe", "qwen3_moe"):
        _, away = pair(family)
        away.run("abc")
        assert all(parameter.is_meta for parameter in away.lm._module.parameters())  # type: ignore[attr-defined]


def test_requests_that_nobody_waits_for(pair, address):
    here, away = pair("olmoe")
    lm = away.lm  # type: ignore[attr-defined]
    points = moe.trace_points(lm)
    with lm.trace(TEXTS[0], use_cache=False, remote=address, blocking=False) as tracer:
        weights = points.layers[1].gate_weights.save()  # noqa: F841
    result = None
    while result is None:
        result = tracer.backend()
    assert torch.equal(result["weights"], here.run(TEXTS[0]).routing[1].weights)


def test_a_model_without_weights_is_not_opened_here(pair):
    with pytest.raises(BadInput, match="without weights.*dispatch=True, or moe.wrap"):
        moe.wrap(pair("olmoe")[1].lm)
    with pytest.raises(BadInput, match="only nnsight models run on a server"):
        moe.wrap(tiny.build("olmoe"), remote=True)


def test_an_nnsight_model_with_weights_is_opened_here():
    hf = tiny.build("mixtral")
    lm = TransformersModel(hf, tokenizer=tokenizer())
    with moe.wrap(lm) as model, moe.wrap(hf, tokenizer()) as plain:
        assert model.hf is hf
        assert torch.equal(model.run("hello").logits, plain.run("hello").logits)


@pytest.mark.parametrize(
    "most, dtype",
    [(255, torch.uint8), (256, torch.int16), (2**15 - 1, torch.int16), (2**15, torch.int32), (2**31 - 1, torch.int32)],
)
def test_whole_numbers_are_sent_in_few_bytes(most, dtype):
    ids = torch.tensor([[0, most]])
    assert _small(ids).dtype is dtype and torch.equal(_small(ids).long(), ids)
    for value in (torch.rand(2, 3), ids > 0, ids[:0]):
        assert _small(value) is value


def counted(address: str) -> dict[str, int]:
    """Bytes over the wire since the last time."""
    with urllib.request.urlopen(f"{address}/bytes") as response:
        return json.load(response)


def test_routing_of_a_thousand_tokens_on_27_layers_takes_few_bytes(tmp_path: Path, address: str):
    """The shape of DeepSeek-V2-Lite's routing: 6 of 64 experts, a large vocabulary; without its dense layer."""
    config = DeepseekV2Config(
        vocab_size=8192, hidden_size=32, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=27,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=None, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=1,
        first_k_dense_replace=0, n_group=1, topk_group=1, max_position_embeddings=1024,
    )  # fmt: skip
    folder = saved(DeepseekV2ForCausalLM(config).to(torch.bfloat16), tmp_path)
    hf = DeepseekV2ForCausalLM.from_pretrained(folder).eval()
    away = moe.wrap(unloaded(folder), remote=address, trust_server=True)
    ids = torch.randint(3, 92, (1, 1000), generator=torch.Generator().manual_seed(0))
    away.run(ids[:, :4])
    counted(address)
    run = away.run(ids, output=False)
    wire = counted(address)
    with moe.wrap(hf) as here:
        expected = here.run(ids, output=False)
    assert len(run.routing) == 27
    for layer, route in run.routing.items():
        assert torch.equal(route.ids, expected.routing[layer].ids)
        assert torch.equal(route.weights, expected.routing[layer].weights)
    chosen = 1000 * 27 * 6
    # An id in one byte and a weight in four, before compression.
    assert wire["out"] < 5 * chosen
    assert wire["in"] < 60_000
    print(f"routing of 1,000 tokens on 27 layers: {wire['in']:,} bytes sent, {wire['out']:,} received")


def test_an_address_needs_a_word_of_trust_for_its_replies_are_unpickled():
    lm = TransformersModel(tiny.build("olmoe"), tokenizer=tokenizer())
    for address in ("http://127.0.0.1:9", "https://me:word@host/x", "HTTP://host"):
        with pytest.raises(BadInput, match="could run any code in this process: expected trust_server=True") as error:
            moe.wrap(lm, remote=address)
        assert "word@" not in str(error.value)
        assert moe.wrap(lm, remote=address, trust_server=True).remote == address
    for remote in ("no", "host:80", 1, None):
        with pytest.raises(
            BadInput, match="not a server: expected True, or an address|invalid remote for wrap: expected"
        ):
            moe.wrap(lm, remote=remote)
    with pytest.raises(BadInput, match="invalid trust_server for wrap: expected True or False, got 'no'"):
        moe.wrap(lm, remote="http://host", trust_server="no")
