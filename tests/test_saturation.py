"""Router saturation: against loops over tokens, on routers with a known answer, and on the bundled training."""

import numpy as np
import pytest
import torch
import xarray as xr

import moe_interp as moe
from moe_interp import results
from moe_interp.analyses.saturation import reference_saturation, router_saturation, saturation_of_ids
from moe_interp.data import Corpus
from moe_interp.errors import BadInput
from moe_interp.stats import resampling_weights
from tests.reference.routing import bootstrap_interval
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

CORPUS = Corpus.from_texts({"plain": ["The cat sat", "so it goes"], "code": ["f(x)=2", "if a: b"]})


def drawn(rng, checkpoints, tokens, layers, top_k, experts):
    return rng.random((checkpoints, tokens, layers, experts)).argsort(axis=-1)[..., :top_k]


def test_saturation_equals_loops_over_tokens():
    rng = np.random.default_rng(0)
    ids, documents = drawn(rng, 3, 20, 2, 3, 8), np.repeat([5, 1, 9, 7], 5)
    result = saturation_of_ids(
        ids, documents, steps=[1, 10, 100], layers=[2, 4], experts=8, provenance={}, resamples=40, seed=3
    )
    draws = resampling_weights(np.zeros(4, int), 40, 3)
    for step in range(3):
        for layer in range(2):
            shares = [len(set(ids[step, t, layer].tolist()) & set(ids[2, t, layer].tolist())) / 3 for t in range(20)]
            here = result.isel(step=step, layer=layer)
            assert float(here.saturation) == pytest.approx(np.mean(shares))
            sums = [sum(s for s, d in zip(shares, documents, strict=True) if d == one) for one in (1, 5, 7, 9)]
            np.testing.assert_allclose(here.saturation_interval, bootstrap_interval(sums, [5] * 4, draws, 0.95))
            chosen = [[sum(e in row for row in ids[c, :, layer].tolist()) / 20 for e in range(8)] for c in (step, 2)]
            independent = sum(a * b for a, b in zip(*chosen, strict=True)) / 3
            assert float(here.independent) == pytest.approx(independent)
    assert result.saturation.values[-1].tolist() == [1.0, 1.0]
    assert float(result.saturation_baseline) == 3 / 8


def test_unrelated_routers_are_at_their_control_and_uniform_ones_at_k_over_e():
    rng = np.random.default_rng(1)
    popular = np.arange(16) < 6
    tokens = 4000
    uneven = np.stack([(rng.random((tokens, 1, 16)) + popular).argsort(axis=-1)[..., -4:] for _ in range(2)])
    documents = np.repeat(np.arange(40), 100)
    options = dict(steps=["a", "b"], layers=[0], experts=16, provenance={}, resamples=50)
    result = saturation_of_ids(uneven, documents, **options)
    assert float(result.saturation[0, 0]) == pytest.approx(float(result.independent[0, 0]), abs=0.01)
    assert float(result.saturation[0, 0]) > 0.6  # far above K/E, and still nothing but load
    even = saturation_of_ids(drawn(rng, 2, tokens, 1, 4, 16), documents, **options)
    assert float(even.saturation[0, 0]) == pytest.approx(0.25, abs=0.01)


def test_checkpoints_are_compared_on_the_same_tokens(tmp_path):
    models = [moe.wrap(build("olmoe", seed=seed), StubTokenizer(), name=f"step{seed}") for seed in (1, 0, 0)]
    result = router_saturation(models, CORPUS, tokens_per_document=99, resamples=20)
    assert result.step.values.tolist() == ["step1", "step0 (2)", "step0 (3)"]
    np.testing.assert_array_equal(result.saturation[1:], 1.0)
    for layer in models[0].layers:
        shares = []
        for text in CORPUS.texts:
            early, late = (model.run(text).routing[layer].ids[0].tolist() for model in (models[0], models[2]))
            shares += [len(set(a) & set(b)) / 3 for a, b in zip(early, late, strict=True)]
        assert float(result.saturation.sel(layer=layer)[0]) == pytest.approx(np.mean(shares))
    xr.testing.assert_identical(results.load(results.save(result, tmp_path / "saturation.nc")), result)


def test_checkpoints_are_loaded_from_folders_and_closed(tmp_path):
    for name, seed in (("early", 3), ("late", 4)):
        build("mixtral", seed=seed).save_pretrained(tmp_path / name)
    from moe_interp.analyses import saturation

    opened = []
    real = saturation.load

    def load(source, **options):
        model = real(source, **options)
        model.tokenizer = StubTokenizer()
        opened.append(model)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saturation, "load", load)
        result = router_saturation([tmp_path / "early", tmp_path / "late"], CORPUS, resamples=5)
    assert result.step.values.tolist() == ["early", "late"]
    assert all(model._closed for model in opened)


def test_revisions_of_one_checkpoint_are_loaded_in_turn_and_may_be_named(monkeypatch):
    from moe_interp.analyses import saturation

    asked = []

    def load(source, *, revision, dtype):
        asked.append((source, revision, dtype))
        return moe.wrap(build("olmoe", seed=len(revision)), StubTokenizer(), name=source)

    monkeypatch.setattr(saturation, "load", load)
    options = dict(revisions=["a", "bb"], resamples=5, dtype="float32")
    result = router_saturation(["hub/one"], CORPUS, **options)
    assert asked == [("hub/one", "a", "float32"), ("hub/one", "bb", "float32")]
    assert result.step.values.tolist() == ["a", "bb"]
    assert (result.saturation[0] < 1).all()
    named = router_saturation(["hub/one"], CORPUS, names=[10, 20], **options)
    assert named.step.values.tolist() == [10, 20]
    np.testing.assert_array_equal(named.saturation, result.saturation)


def test_what_cannot_be_compared():
    two = [moe.wrap(build(family), StubTokenizer()) for family in ("olmoe", "qwen2_moe")]
    with pytest.raises(BadInput, match="checkpoints of different models"):
        router_saturation(two, CORPUS)
    with pytest.raises(BadInput, match="revisions of what: expected a single checkpoint, got 2 of them"):
        router_saturation(two, CORPUS, revisions=["a", "b"])
    for one in (two[:1], "hub/one", []):
        with pytest.raises(BadInput, match="too few checkpoints: expected at least two, the final one last, got [01]"):
            router_saturation(one, CORPUS)
    with pytest.raises(BadInput, match="too few checkpoints"):
        router_saturation("hub/one", CORPUS, revisions=["a"])


def test_names_are_as_many_as_the_checkpoints_and_differ():
    two = [moe.wrap(build("olmoe", seed=seed), StubTokenizer()) for seed in (0, 1)]
    for names in (["x"], ["x", "y", "z"], []):
        message = f"not a name for each checkpoint: expected 2 names, got {len(names)}"
        with pytest.raises(BadInput, match=message):
            router_saturation(two, CORPUS, names=names)
    with pytest.raises(BadInput, match=r"checkpoints of one name: expected names that differ, got \['x', 'x'\]"):
        router_saturation(two, CORPUS, names=["x", "x"])


def test_the_bundled_training_saturates():
    result = reference_saturation(resamples=200)
    assert result.step.values.tolist() == [36, 180, 540, 1260, 2340, 3200]
    assert result.layer.values.tolist() == list(range(1, 8))
    assert (np.diff(result.saturation.values, axis=0) > 0).all()
    low = result.saturation_interval.sel(bound="low", step=[180, 540, 1260, 2340])
    assert (low > result.independent.sel(step=[180, 540, 1260, 2340])).all()
    from safetensors.torch import load_file

    kept = load_file(moe.checkpoint.REFERENCE / "routing_checkpoints.safetensors")["expert_ids"]
    same = torch.tensor([[len(set(a) & set(b)) for a, b in zip(x, y, strict=True)]
                         for x, y in zip(kept[2].tolist(), kept[5].tolist(), strict=True)
                         for x, y in [([tuple(v) for v in x], [tuple(v) for v in y])]])  # fmt: skip
    np.testing.assert_allclose(result.saturation.sel(step=540), same.double().mean(dim=0) / 6)
