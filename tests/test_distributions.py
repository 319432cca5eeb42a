"""Logits that are minus infinity, plus infinity or NaN, in everything that measures distributions."""

import math

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp.adapters.formulas import out_of_range, watched
from moe_interp.analyses.decoding import decode_top
from moe_interp.analyses.distributions import check_logits, divergence, expected_log, log_probabilities
from moe_interp.analyses.metrics import LogitDifference, LogProbability
from moe_interp.analyses.tuned_lens import Rows, kl_to
from moe_interp.encode import check_room
from moe_interp.errors import BadCheckpoint, BadInput
from tests.test_inputs import CORPUS, LONG, tiny, words
from tests.tiny_types import build

REAL = 90  # of 96 tokens; the others pad the vocabulary
IDS = torch.tensor([LONG, LONG[::-1]])


def padded(hf=None):
    """A model whose last six logits are minus infinity."""
    hf = hf or tiny("OlmoeForCausalLM")
    pads = torch.arange(REAL, 96)
    hf.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, pads, float("-inf")))
    return hf


def loops(p, q):
    """KL of two lists of logits, in plain Python, in float64; a token with p 0 adds nothing."""
    log_p, log_q = ([x - math.log(math.fsum(math.exp(y) for y in row)) for x in row] for row in (p, q))
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True) if math.exp(a) > 0)


def test_measures_leave_out_what_cannot_come():
    p, q = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0)).double()
    full = [torch.cat([one, torch.full((4, 3), float("-inf"))], dim=1).float() for one in (p, q)]
    log_p, log_q = map(log_probabilities, full)
    for row in range(4):
        expected = loops(p[row].tolist(), q[row].tolist())
        assert float(divergence(log_p, log_q)[row]) == pytest.approx(expected, abs=1e-6)
        found = float((expected_log(log_p.exp(), log_p) - expected_log(log_p.exp(), log_q))[row])
        assert found == pytest.approx(expected, abs=1e-6)
    assert divergence(log_p, log_p).tolist() == [0] * 4
    # What only the second rules out is infinitely far.
    ruled = q.clone().float()
    ruled[:, 0] = float("-inf")
    assert divergence(log_probabilities(p), log_probabilities(ruled)).isposinf().all()


def test_measures_have_the_gradients_of_what_can_come():
    p, q = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(1))
    for measure in (divergence, lambda a, b: -expected_log(a.exp(), b)):
        slopes = []
        for width in (0, 3):
            tail = torch.full((4, width), float("-inf"))
            leaf = torch.cat([q, tail], dim=1).requires_grad_()
            measure(log_probabilities(torch.cat([p, tail], dim=1)), log_probabilities(leaf)).sum().backward()
            slopes.append(leaf.grad)
        assert torch.allclose(slopes[0], slopes[1][:, :20], atol=1e-7) and not slopes[1][:, 20:].any()


@pytest.mark.parametrize(
    "value, says", [(float("nan"), "NaN"), (float("inf"), "infinity"), (None, "minus infinity alone")]
)
def test_what_is_no_distribution_is_refused_everywhere(value, says):
    logits = torch.randn(3, 20)
    if value is None:
        logits[1] = float("-inf")
    else:
        logits[1, 7] = value
    for call in (log_probabilities, check_logits):
        with pytest.raises(BadCheckpoint, match=f"logits of {says}: expected finite logits, or minus infinity"):
            call(logits)
    check_logits(logits, torch.tensor([True, False, True]))  # padding may hold anything
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert out_of_range(logits[None], mask) == says
    mask[0, 1] = False
    assert out_of_range(logits[None], mask) is None


@pytest.mark.parametrize("value, says", [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_run_with_logits_out_of_range_is_refused(value, says):
    hf = tiny("OlmoeForCausalLM")
    # A single column, as an overflow in float16 would be.
    hf.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([55]), value))
    with moe.wrap(hf) as model, pytest.raises(BadCheckpoint, match=f"the model returned {says}"):
        model.run(IDS)
    assert moe.wrap(padded()).run(IDS).logits.isneginf().sum() == 2 * 9 * 6


def test_effects_by_kl_equal_those_of_the_vocabulary_alone():
    with moe.wrap(padded(build("olmoe"))) as model:
        base = model.run(IDS).logits[..., :REAL].double()
        got = moe.expert_effects(model, IDS, "kl")
        estimates = moe.attribution_patching(model, IDS, metric="kl", steps=3)
        assert np.isfinite(estimates.attribution).all() and float(estimates.rank_correlation) > 0.8
        for layer, expert in ((0, 0), (1, 3)):
            changed = model.run(IDS, edit=moe.ablate(layer=layer, expert=expert)).logits[..., :REAL].double()
            rows = zip(base.flatten(0, 1).tolist(), changed.flatten(0, 1).tolist(), strict=True)
            expected = np.mean([loops(p, q) for p, q in rows])
            assert float(got.effect_mean.sel(layer=layer, expert=expert)) == pytest.approx(expected, rel=1e-4)


def test_the_lens_decodes_as_without_the_padded_vocabulary():
    with moe.wrap(padded(), words()) as model, moe.wrap(tiny("OlmoeForCausalLM"), words()) as plain:
        got = moe.expert_lens(model, "w5 w6 w7 w8", top=3)
        # The same model without the hook, whose last six columns are cut off by hand.
        run = plain.run("w5 w6 w7 w8", read="resid_post")
        final = run.logits[0, :, :REAL].double()
        for layer in (0, 1):
            rows = plain.decode(run["resid_post", layer])[0, :, :REAL].double()
            here = got.sel(layer=layer, part="resid_post")
            for at in range(4):
                expected = loops(final[at].tolist(), rows[at].tolist())
                assert float(here.kl.isel(pos=at)) == pytest.approx(expected, abs=1e-6)
                rank = 1 + int((rows[at] > rows[at, final[at].argmax()]).sum())
                assert int(here.final_rank.isel(pos=at)) == rank
        assert np.isfinite(got.kl).all()


def test_tuned_lens_and_decoding_take_what_cannot_come():
    logits = torch.cat([torch.randn(3, 20), torch.full((3, 2), float("-inf"))], dim=1)
    other = torch.cat([torch.randn(3, 20), torch.full((3, 2), float("-inf"))], dim=1)
    log_p = log_probabilities(logits)
    rows = Rows((), log_p.exp(), expected_log(log_p.exp(), log_p), torch.arange(3))
    expected = [loops(a[:20], b[:20]) for a, b in zip(logits.tolist(), other.tolist(), strict=True)]
    np.testing.assert_allclose(kl_to(rows, other), expected, atol=1e-6)
    found = decode_top(lambda x: x, other[:, None], log_p, torch.tensor([1, 2, -1]), top=22)
    np.testing.assert_allclose(found.kl[:, 0], expected, atol=1e-6)
    with pytest.raises(BadCheckpoint, match="logits of infinity"):
        decode_top(lambda x: x / 0.0, other[:, None].abs(), log_p, torch.tensor([1, 2, -1]), top=2)


def test_neurons_stand_out_of_the_tokens_that_can_come():
    with moe.wrap(padded(), words()) as model, moe.wrap(tiny("OlmoeForCausalLM"), words()) as plain:
        got = moe.neuron_lens(model, 0, 0, top=2)
        down = plain.weights(0, 0).down.T
        logits = torch.stack([plain.decode(down[0]), plain.decode(-down[0])])[:, :REAL].double()
        for sign in (0, 1):
            z = (logits[sign].max() - logits[sign].mean()) / logits[sign].std()
            assert float(got.z[0, sign]) == pytest.approx(float(z), rel=1e-4)


def test_an_answer_that_cannot_come_is_refused():
    with moe.wrap(padded(), words()) as model:
        for metric in (LogitDifference((5,), (93,)), LogProbability((93,))):
            with pytest.raises(BadInput, match="an answer that the model cannot give: .*got id 93"):
                moe.expert_effects(model, IDS, metric)
        # Of those that can come, log-probabilities are those of the vocabulary alone.
        got = LogProbability((5,)).bind(model.run(IDS)).of(model.run(IDS))
        right = model.run(IDS).logits[:, -1, :REAL].double().log_softmax(-1)[:, 5]
        np.testing.assert_allclose(got, right, atol=1e-6)


def test_perplexity_is_that_of_the_vocabulary_alone():
    with moe.wrap(padded(), words()) as model:
        got = moe.perplexity(model, CORPUS, resamples=10)
        total, count = 0.0, 0
        for text in CORPUS.texts:
            run = model.run(text)
            log_p = run.logits[0, :, :REAL].double().log_softmax(-1)
            for at in range(run.token_ids.shape[1] - 1):
                total -= float(log_p[at, run.token_ids[0, at + 1]])
                count += 1
        pooled = float(got.perplexity_full_overall.isel(aggregate=0))
        assert pooled == pytest.approx(math.exp(total / count), rel=1e-6)
        assert all(np.isfinite(got[name]).all() for name in got)


# Generation


def test_a_step_out_of_range_is_told_and_scores_pass_as_they_are():
    told = []
    process = watched(told.append)
    scores = torch.randn(2, 8)
    scores[:, 5:] = float("-inf")
    assert process(torch.zeros(2, 1), scores) is scores and not told
    for value in ("nan", "inf"):
        process(torch.zeros(2, 1), scores.index_fill(1, torch.tensor([2]), float(value)))
    process(torch.zeros(2, 1), scores.fill_(float("-inf")))
    assert told == ["NaN", "infinity", "minus infinity alone"]


def test_generate_of_transformers_stops_at_the_first_such_step():
    hf = tiny("OlmoeForCausalLM")
    calls = []

    def hook(module, args, out):
        calls.append(out.shape)
        return out.index_fill(-1, torch.tensor([7]), float("nan")) if len(calls) == 3 else out

    hf.lm_head.register_forward_hook(hook)

    def tell(what):
        raise BadCheckpoint(f"the model returned {what}")

    with pytest.raises(BadCheckpoint, match="NaN"):
        hf.generate(IDS, max_new_tokens=9, do_sample=False, logits_processor=[watched(tell)], eos_token_id=None)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "options, allowed",
    [
        ({"max_new_tokens": 23}, True),
        ({"max_new_tokens": 24}, False),
        ({"max_length": 32}, True),
        ({"max_length": 33}, False),
        ({}, True),
    ],
)
def test_a_generation_fits_the_context_or_is_refused(options, allowed):
    hf = tiny("OlmoeForCausalLM", max_position_embeddings=32)
    with moe.wrap(hf) as model:
        given = model.encode(IDS)
        if allowed:
            check_room(given, model.spec, hf.generation_config, options)
            return
        with pytest.raises(BadInput, match=r"beyond the context length: expected at most 32 tokens.*got 9 \+ 24"):
            check_room(given, model.spec, hf.generation_config, options)


def test_padding_of_a_prompt_takes_no_room():
    hf = tiny("OlmoeForCausalLM", max_position_embeddings=32)
    with moe.wrap(hf) as model:
        given = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 0] + [1] * 7] * 2)}
        check_room(given, model.spec, hf.generation_config, {"max_new_tokens": 25})
        with pytest.raises(BadInput, match=r"got 7 \+ 26"):
            check_room(given, model.spec, hf.generation_config, {"max_new_tokens": 26})
