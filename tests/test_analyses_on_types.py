"""Every analysis on every model type: a result, or an error of ours that says why not; never a wrong number.

What is plain is written out here, not asked of the package: the types whose residual is ``resid_mid`` plus weighted
outputs plus shared experts, with nothing between.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import moe_interp as moe
from moe_interp.analyses.collect import collect
from moe_interp.analyses.labels import LabelCounts
from moe_interp.analyses.metrics import LogProbability
from moe_interp.analyses.token_counts import TokenCounts
from moe_interp.data import Corpus
from moe_interp.errors import UnsupportedModel
from tests.stub_tokenizer import StubTokenizer
from tests.tiny_types import TYPES, build, images

QUICK = (
    "dots3_note", "ernie4_5_vl_moe", "gemma4", "granitemoeshared", "llama4_text", "muse_spark", "nemotron_h", "olmoe",
    "openai_privacy_filter", "switch_transformers", "zaya",
)  # fmt: skip
EACH_TYPE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]
PLAIN = {
    "aria", "aria_text", "axk2", "bailing_hybrid", "dbrx", "deepseek_ocr2", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots1", "dots3_note", "dots3_note_text", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "flint",
    "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa", "gpt_oss", "hunyuan_v1_moe", "hy_v3",
    "jamba", "kimi_k25", "kimi_linear", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax_m2", "mistral4",
    "mistral_large4", "mistral_large4_text", "mixtral", "nllb-moe", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_vl_moe",
    "qwen3_vl_moe_text", "solar_open", "switch_transformers", "unlimited_ocr",
}  # fmt: skip
NO_HEAD = {"glm4v_moe_text", "glm5_next_text", "mistral_large4_text", "muse_spark_text", "qwen3_vl_moe_text"}
CROSSED = {"diffusion_gemma", "nllb-moe", "switch_transformers"}
NO_NEXT_TOKEN = NO_HEAD | CROSSED | {"openai_privacy_filter"}
# Several residual streams, or logits that use earlier residuals too.
NOT_FROM_ONE_STREAM = {
    "deepseek_v4", "glm5_next", "hy_v4", "inkling2", "inkling2_text", "qwen4_exp", "qwen4_exp_text",
}  # fmt: skip
CORPUS = Corpus.from_texts(
    {"a": ["ab cd ef gh" * 2, "hello there all" * 2], "b": ["one two three" * 2, "xyz uvw rst" * 2]}
)
SHORT = Corpus.from_texts({"a": ["ab cd"], "b": ["one two"]})
IDS = torch.arange(3, 11)[None]
CORRUPTED = torch.tensor([[3, 4, 40, 6, 7, 8, 9, 10]])
METRIC = LogProbability((7,))


def sender(model: moe.MoEModel) -> tuple[int, int]:
    """An expert of the first mixture that the token uses which differs, where the model writes text."""
    layer = model.layers[0]
    if model.spec.kind != "causal":
        return layer, 0
    return layer, int(model.run(CORRUPTED).routing[layer].ids[0, 2, 0])


ANALYSES: dict[str, Callable[[moe.MoEModel], Any]] = {
    "lens": lambda model: moe.expert_lens(model, IDS),
    "neurons": lambda model: moe.neuron_lens(model, model.layers[0], 0, null_directions=20),
    "ensemble": lambda model: moe.ensemble_similarity(model, CORPUS, resamples=5),
    "attribution": lambda model: moe.logit_attribution(model, IDS, 5),
    "tuned": lambda model: moe.train_tuned_lens(model, CORPUS, steps=2, every=1),
    "perplexity": lambda model: moe.perplexity(model, CORPUS, resamples=5),
    "routing": lambda model: moe.routing(model, CORPUS, resamples=5),
    "map": lambda model: moe.routing_map(model, "abcd"),
    "coactivation": lambda model: moe.coactivation(model, CORPUS, resamples=5),
    "transitions": lambda model: moe.transitions(model, CORPUS),
    "norms": lambda model: moe.norm_and_weight(model, CORPUS, resamples=5),
    "weights": lambda model: moe.expert_similarity(model, CORPUS),
    "shared": lambda model: moe.shared_experts(model, CORPUS, resamples=5),
    "super": lambda model: moe.super_experts(model, CORPUS, resamples=5),
    "experts": lambda model: moe.activation_patching(model, IDS, CORRUPTED, METRIC, layers=model.layers[0]),
    "ranks": lambda model: moe.activation_patching(model, IDS, CORRUPTED, METRIC, over="ranks"),
    "routes": lambda model: moe.activation_patching(model, IDS, CORRUPTED, METRIC, over="routes"),
    "positions": lambda model: moe.activation_patching(model, IDS, CORRUPTED, METRIC, over="positions"),
    "paths to experts": lambda model: moe.path_patching(model, IDS, CORRUPTED, sender(model), "experts", METRIC),
    "paths to routers": lambda model: moe.path_patching(model, IDS, CORRUPTED, sender(model), "routers", METRIC),
    "paths to logits": lambda model: moe.path_patching(model, IDS, CORRUPTED, sender(model), "logits", METRIC),
    "trace": lambda model: moe.causal_trace(model, IDS, (1, 2), 7, samples=2, layers=model.layers[0]),
    "coalitions": lambda model: moe.coalitions(model, IDS, [(model.layers[0], 0), (model.layers[-1], 1)], METRIC),
    "effects": lambda model: moe.expert_effects(model, IDS),
    "attribution patching": lambda model: moe.attribution_patching(model, IDS, IDS.flip(1), neurons=True, sample=4),
    "audit": lambda model: moe.score_audit(model, SHORT, resamples=5, random_routers=1),
}


@cache
def outcome(model_type: str) -> dict[str, str]:
    """ "ok" or the class of our error, by analysis; any other error fails."""
    found = {}
    with moe.wrap(build(model_type), StubTokenizer()) as model:
        for name, run in ANALYSES.items():
            try:
                run(model)
                found[name] = "ok"
            except moe.MoEError as error:
                found[name] = type(error).__name__
    return found


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_analyses_give_a_result_or_an_error_of_ours(model_type):
    found = outcome(model_type)
    for name in ("routing", "map", "coactivation", "transitions", "norms"):
        assert (found[name] == "ok") == (model_type not in CROSSED), (name, found)
    for name in ("perplexity", "effects", "audit"):
        assert found[name] == ("UnsupportedModel" if model_type in NO_NEXT_TOKEN else "ok"), name
    assert found["tuned"] == ("UnsupportedModel" if model_type in NO_NEXT_TOKEN | NOT_FROM_ONE_STREAM else "ok")


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_parts_are_added_up_only_where_they_are_plainly_added(model_type):
    found, plain = outcome(model_type), model_type in PLAIN
    decodes = plain and model_type not in NO_NEXT_TOKEN
    assert found["lens"] == found["neurons"] == ("ok" if decodes else "UnsupportedModel")
    if model_type in CROSSED:
        assert found["ensemble"] != "ok"
    else:
        assert found["ensemble"] == ("ok" if plain else "UnsupportedModel")


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_causes_are_sought_where_the_next_token_is_predicted(model_type):
    found, writes = outcome(model_type), model_type not in NO_NEXT_TOKEN
    for name in ("experts", "ranks", "routes", "positions", "trace", "coalitions"):
        assert found[name] == ("ok" if writes else "UnsupportedModel"), name
    for name in ("paths to experts", "paths to routers", "paths to logits"):
        assert found[name] == ("ok" if writes and model_type in PLAIN else "UnsupportedModel"), name


@pytest.mark.parametrize(
    "model_type", [case for case, name in zip(EACH_TYPE, TYPES, strict=True) if name not in NO_NEXT_TOKEN]
)
def test_a_patch_is_that_of_a_whole_run(model_type):
    with moe.wrap(build(model_type)) as model:
        layer = model.layers[0]
        result = moe.activation_patching(model, IDS, CORRUPTED, METRIC, layers=layer)
        clean = model.run(IDS, read=moe.select("expert_out", layers=layer))
        strongest = int(np.nanargmax(np.abs(result.effect[0, 0])))
        whole = model.run(CORRUPTED, edit=moe.patch(clean, layer=layer, expert=strongest)).logits
        expected = float(whole.log_softmax(-1)[0, -1, 7]) - float(result.corrupted[0])
    assert abs(expected) > 1e-3
    assert float(result.effect[0, 0, strongest]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("model_type", EACH_TYPE)
def test_effects_and_estimates_are_those_of_whole_passes_and_gradients(model_type):
    if model_type in NO_NEXT_TOKEN:
        pytest.skip("no next token: the test above holds that it is refused")
    hf = build(model_type)
    with moe.wrap(hf, StubTokenizer()) as model:
        effects = moe.expert_effects(model, IDS)
        estimates = moe.attribution_patching(model, IDS, sample=1).attribution
        run = model.run(IDS, read=["expert_out", "routed_out"], grad=True)
        loss = cross_entropy(run.logits[0, :-1].float(), IDS[0, 1:])
        scale = max(1.0, abs(float(loss.detach())))
        for layer in {model.layers[0], model.layers[-1]}:
            (slope,) = torch.autograd.grad(loss, run["routed_out", layer], retain_graph=True)
            for expert in np.flatnonzero(effects.tokens.sel(layer=layer))[:2].tolist():
                edited = model.run(IDS, edit=moe.ablate(layer=layer, expert=expert))
                expected = float(cross_entropy(edited.logits[0, :-1].float(), IDS[0, 1:]) - loss.detach())
                at = {"layer": layer, "expert": expert}
                assert abs(float(effects.effect_mean.sel(**at)) - expected) < 1e-5 * scale
                outputs, weights, _ = run.contribution(layer, expert)
                expected = -float((outputs * weights[..., None] * slope).sum())
                assert abs(float(estimates.sel(**at)[0]) - expected) < 1e-4 * scale


def test_the_refusal_says_what_stands_between():
    says = "layer 0 of granitemoeshared is not the plain sum of its parts"
    with moe.wrap(build("granitemoeshared"), StubTokenizer()) as model, pytest.raises(UnsupportedModel, match=says):
        moe.ensemble_similarity(model, CORPUS)


class WithSpecial(StubTokenizer):
    """One that has a special token, which no text holds."""

    all_special_ids = (1,)


@pytest.mark.parametrize("tokenizer", [StubTokenizer, WithSpecial])
def test_a_token_that_skips_all_experts_is_counted_nowhere(tokenizer):
    hf = build("zaya")
    taken, skipped = {}, 0
    with moe.wrap(hf, tokenizer()) as model:
        result = moe.routing(model, CORPUS, resamples=5)
        numbers = [np.zeros(len(model.tokenizer(document.text)["input_ids"]), int) for document in CORPUS.documents]
        labels = LabelCounts.empty(
            len(CORPUS), 1, model.layers, model.spec.num_experts, model.spec.top_k, numbers=numbers
        )
        tokens = TokenCounts.empty(model.layers, model.spec.num_experts, model.spec.top_k, model.spec.vocab_size)
        collect(model, CORPUS, {"labels": labels, "tokens": tokens})
        for document in CORPUS.documents:
            run = model.run(document.text, read=["router_logits"])
            for layer, routing in run.routing.items():
                biased = routing.logits.softmax(-1) + hf.model.layers[layer].mlp.gate.balancing_biases
                skips = biased.argmax(-1) == hf.config.num_experts
                assert torch.equal(routing.mask, ~skips)
                taken[layer] = taken.get(layer, 0) + int((~skips).sum())
                skipped += int(skips.sum())
    assert skipped > 0
    assert result["counts"].sum(["expert", "domain"]).values.tolist() == list(taken.values())
    assert labels.counts.sum(axis=(0, 1, 3)).tolist() == list(taken.values())
    for index, count in enumerate(taken.values()):
        assert sum(int(tokens.table(index, fold).sum()) for fold in range(tokens.folds)) == count


def test_a_watch_of_training_leaves_out_tokens_that_skip_all_experts():
    hf = build("zaya")
    with moe.wrap(hf, StubTokenizer()) as model:
        ids = torch.tensor([model.tokenizer(document.text)["input_ids"][:20] for document in CORPUS.documents])
        taken = [routing.ids[routing.mask].flatten() for routing in model.run(ids).routing.values()]
    assert sum(map(len, taken)) < len(taken) * ids.numel()
    with moe.RoutingWatch(hf, every=1) as watch, watch.step(0):
        hf(input_ids=ids)
    loads = np.stack([one.bincount(minlength=hf.config.num_experts) / len(one) for one in taken])
    assert np.allclose(watch.table()["utilisation"].values[0], loads)


def test_text_reaches_no_vision_expert_and_images_do():
    hf = build("ernie4_5_vl_moe")
    with moe.wrap(hf) as model:
        vision = [layer for layer in model.spec.moe_layers if layer not in model.layers]
        assert vision == [4, 5, 6]
        assert set(model.run(images(hf)).routing) == {*model.layers, *vision}
        assert np.array_equal(sorted(model.run(IDS).routing), model.layers)
