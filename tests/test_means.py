"""Mean contributions, and the ablation that uses them."""

import numpy as np
import pytest
import torch

import moe_interp as moe
from moe_interp.analyses.collect import Options
from moe_interp.data import Corpus, Document
from tests.reference.model import forward
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

TEXTS = ["one two three four five", "six seven eight", "nine ten one two three four", "five"]
CORPUS = Corpus(tuple(Document(text, "a", text) for text in TEXTS), "test")


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_means_are_those_of_a_loop_over_tokens(family):
    hf, tokenizer = build(family), StubTokenizer()
    sums: dict[tuple[int, int], list[torch.Tensor]] = {}
    for text in TEXTS:
        points = forward(hf, torch.tensor([tokenizer(text)["input_ids"]])).points
        for layer in (layer for name, layer in points if name == "expert_out"):
            parts = (points[name, layer][0] for name in ("expert_ids", "gate_weights", "expert_out"))
            for ids, weights, outputs in zip(*parts, strict=True):
                for expert, weight, output in zip(ids.tolist(), weights, outputs, strict=True):
                    sums.setdefault((layer, expert), []).append(weight * output)
    options = Options(special_tokens=True, batch_tokens=12)
    with moe.wrap(hf, tokenizer) as model:
        means = moe.mean_contributions(model, CORPUS, options=options)
        one = next(iter(means))
        run = model.run(
            TEXTS[2], read="routed_out", edit=moe.ablate(layer=one[0], expert=one[1], how="mean", mean=means)
        )
    assert set(means) == set(sums)
    for pair, found in sums.items():
        expected = torch.stack(found).mean(0)
        assert (means[pair] - expected).abs().max() < 1e-5 * expected.abs().max()
        assert int(means.dataset["tokens"].sel(layer=pair[0], expert=pair[1])) == len(found)
    assert torch.isfinite(run.logits).all()


def test_a_mean_of_nothing_is_refused():
    with moe.wrap(build("mixtral"), StubTokenizer()) as model:
        means = moe.mean_contributions(model, Corpus((Document("one", "a", "one"),), "test"), layers=2)
        unused = next(e for e in range(8) if (2, e) not in set(means))
        assert np.isnan(means.dataset["mean"].sel(layer=2, expert=unused)).all()
        with pytest.raises(moe.MoEError, match=f"no token chose expert {unused} of layer 2"):
            moe.ablate(layer=2, expert=unused, how="mean", mean=means)
        with pytest.raises(moe.MoEError, match="no mean of that expert"):
            moe.ablate(layer=3, expert=0, how="mean", mean=means)
        assert (2, unused) not in means and (3, 0) not in means and all(pair in means for pair in means)
        with pytest.raises(moe.MoEError, match="no mean of expert 0 of layer 3: expected means by"):
            moe.ablate(layer=3, expert=0, how="mean", mean=dict(means))
        with pytest.raises(moe.MoEError, match="no mean of expert"):
            moe.expert_effects(model, torch.tensor([[5, 6, 7]]), how="mean", mean=dict(means))
