"""The vision mixture: its points against a slow reference, what it refuses, its training, its pictures, its study."""

import copy
import inspect
import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import types
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch.nn import functional

import moe_interp as moe
from moe_interp.adapters import FAMILIES, Scoring
from moe_interp.errors import BadData, BadInput, BadOutput, UnknownName, UnsupportedModel
from moe_interp.points import POINTS
from moe_interp.results import load, provenance_of, save
from moe_interp.zoo import vision, vision_study, vision_trial
from moe_interp.zoo.vision import Plan, VisionMoE, balance_loss, describe, train
from moe_interp.zoo.vision_images import Images, read_images
from moe_interp.zoo.vision_study import STUDIES, Study, run_study
from moe_interp.zoo.vision_trial import look, probe, routes
from tests.reference import vision as slow

TOLERANCE = 1e-5
TINY = Plan(experts=3, width=8, neurons=12, epochs=2, batch=16)
CASES = [
    {"top_k": top_k, "depth": depth, "renormalise": renormalise}
    for top_k in (1, 2)
    for depth in ("base", "short")
    for renormalise in (True, False)
]
IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
HAS = [
    "moe_in", "router_logits", "router_scores", "expert_ids", "gate_weights", "expert_act", "expert_out", "routed_out",
    "moe_out",
]  # fmt: skip


def build(**changes) -> VisionMoE:
    """A model whose norms and router are not neutral, in eval mode."""
    hf = VisionMoE(3, 16, 5, replace(TINY, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in hf.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.copy_(noise + 0.5 if "running_var" in name else value + 0.3 * (noise - 0.5))
        hf.moe.router.weight.mul_(60)
        hf.head.weight.mul_(20)
        # Features are positive, so that one expert and one class would win everywhere: each gets some images.
        hf.moe.router.bias.sub_(hf.moe.router(hf.eval().trunk(IMAGES)).mean(dim=0))
        hf.head.bias.sub_(hf(IMAGES).mean(dim=0))
    return hf


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


# The model, opened


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_points_and_logits_equal_the_slow_reference(changes):
    hf = build(**changes)
    expected = slow.forward(hf, IMAGES)
    with torch.no_grad():
        assert error(hf(IMAGES), expected["logits"]) < TOLERANCE
    with moe.wrap(hf) as model:
        assert list(model.points) == HAS
        run = model.run({"images": IMAGES}, read=HAS)
        for name in HAS:
            got = run[name, 0]
            assert got.shape == expected[name].shape == (7, 1, *expected[name].shape[2:])
            if name == "expert_ids":
                assert torch.equal(got, expected[name]) and len(got.unique()) > 1
            else:
                assert error(got, expected[name]) < TOLERANCE, name
        assert error(run.logits, expected["logits"]) < TOLERANCE
        assert error(model.decode(run["moe_out", 0])[:, 0], run.logits) < TOLERANCE


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_audit_passes(changes):
    with moe.wrap(build(**changes)) as model:
        audit = model.audit({"images": IMAGES})
    assert audit.passed, str(audit)
    assert [check.name for check in audit.checks if check.name.startswith("edit of")] == [
        f"edit of {name} takes" for name in HAS if POINTS[name].editable
    ]


def test_the_audit_finds_a_wrong_description(monkeypatch):
    def wrong(hf):
        spec = describe(hf)
        moe_spec = replace(spec.layers[0].moe, scoring=Scoring("sigmoid"))
        return replace(spec, layers=(replace(spec.layers[0], moe=moe_spec),))

    monkeypatch.setitem(FAMILIES, "VisionMoE", None)  # restores what is there when the test ends
    moe.register_adapter("VisionMoE", wrong)
    with moe.wrap(build(top_k=2)) as model:
        failed = [check.name for check in model.audit({"images": IMAGES}).checks if not check.passed]
    assert "gate_weights ∝ router_scores of expert_ids" in failed


def test_the_adapter_is_one_public_call_of_less_than_forty_lines():
    source = inspect.getsource(vision)
    assert source.count("register_adapter(") == 1
    assert "from moe_interp import register_adapter" in source
    assert "from moe_interp.adapters import (" in source and "moe_interp.adapters." not in source
    assert len(inspect.getsource(describe).splitlines()) + 1 < 40


@pytest.mark.parametrize("point", [name for name in POINTS if name not in HAS])
def test_points_that_it_lacks_are_refused(point):
    with moe.wrap(build()) as model, pytest.raises(UnknownName, match=f"VisionMoE has no point '{point}'"):
        model.run({"images": IMAGES}, read=point)


def test_text_tokens_and_generation_are_refused():
    with moe.wrap(build()) as model:
        for given in ("a cat", [1, 2, 3], IMAGES):
            with pytest.raises(BadInput, match="VisionMoE takes no tokens: expected a mapping"):
                model.run(given)
        with pytest.raises(UnsupportedModel, match="VisionMoE generates nothing"):
            model.generate({"images": IMAGES})
        with pytest.raises(BadInput, match="what to run on"):
            model.audit()


def test_an_ablated_expert_is_missing_where_it_was_chosen_and_nowhere_else():
    hf = build()
    with moe.wrap(hf) as model:
        clean = model.run({"images": IMAGES}, read="expert_out")
        chosen = clean.routing[0].ids[:, 0, 0] == 1
        assert chosen.any() and not chosen.all()
        edited = model.run({"images": IMAGES}, edit=moe.ablate(layer=0, expert=1, positions=0))
        assert edited.touched == (int(chosen.sum()),)
        assert torch.equal(edited.logits[~chosen], clean.logits[~chosen])
        assert torch.allclose(edited.logits[chosen], hf.head.bias.expand(int(chosen.sum()), -1), atol=1e-6)
        values, used = clean.expert(0, 1)
        assert torch.equal(used[:, 0], chosen) and torch.equal(values[chosen], clean["expert_out", 0][chosen][:, :, 0])
        with pytest.raises(BadInput, match="can never touch"):
            model.run({"images": IMAGES}, edit=moe.ablate(layer=0, expert=1, positions=3))


def test_gradients_reach_the_mixture_and_more_experts_can_be_kept():
    with moe.wrap(build(top_k=2)) as model:
        run = model.run({"images": IMAGES}, read="moe_in", grad=True)
        (gradient,) = torch.autograd.grad(run.logits[:, 2].sum(), run["moe_in", 0])
        assert gradient.abs().max() > 0
        one = model.run({"images": IMAGES}, edit=moe.top_k(1, renormalise=True)).logits
    narrow = build(top_k=2)
    narrow.moe.top_k = 1
    assert error(one, slow.forward(narrow, IMAGES)["logits"]) < TOLERANCE


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="images of this size"):
        VisionMoE(3, 10, 5, TINY)
    for changes in ({"width": 6}, {"top_k": 4}, {"top_k": 0}):
        with pytest.raises(BadInput, match="not a vision model"):
            replace(TINY, **changes)


def test_the_papers_sizes_are_the_defaults():
    plan = Plan()
    assert (plan.learning_rate, plan.weight_decay, plan.epochs, plan.balance, plan.top_k) == (1e-2, 1e-4, 10, 1e-5, 1)
    base = VisionMoE(3, 32, 10, replace(plan, experts=5))
    filters = [module.out_channels for module in base.trunk if isinstance(module, torch.nn.Conv2d)]
    assert filters == [128, 256, 256, 512] and base.moe.router.in_features == 512 and len(base.moe.experts) == 5
    short = VisionMoE(3, 32, 10, replace(plan, depth="short"))
    pools = [module.kernel_size for module in short.trunk if isinstance(module, torch.nn.MaxPool2d)]
    assert pools == [8] and short.moe.router.in_features == 512
    full = STUDIES["full"]
    assert full == Study(plan=Plan(precision="bfloat16")) and full.experts == (2, 3, 5) and full.trials == 10
    kinds = [name.rpartition("-")[0] for name, _ in full.plans()]
    assert len(kinds) == 10 * (1 + 3 * 4) + 3 * 3
    assert (kinds.count("base-5"), kinds.count("dense-1"), kinds.count("scored-5")) == (10, 10, 3)


# Training


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_is_switchs(top_k):
    scores = torch.randn(30, 4, generator=torch.Generator().manual_seed(2)).softmax(dim=-1)
    assert balance_loss(scores, top_k).item() == pytest.approx(slow.balance(scores, top_k), abs=1e-6)
    collapsed = torch.tensor([[1.0, 0.0, 0.0]]).expand(8, 3)
    assert balance_loss(collapsed, 1).item() == pytest.approx(3.0)
    assert balance_loss(torch.eye(3).repeat(2, 1), 1).item() == pytest.approx(1.0)


def pictures(count: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes that differ in brightness."""
    labels = torch.arange(count) % 2
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return noise + 2.0 * labels[:, None, None, None] - 1.0, labels


def trained(plan: Plan) -> tuple[VisionMoE, dict[str, float]]:
    hf = VisionMoE(1, 8, 2, plan)
    return hf, train(hf, *pictures(), plan)


def test_training_learns_and_a_seed_decides_everything():
    plan = replace(TINY, epochs=6)
    (one, last), (other, again) = trained(plan), trained(plan)
    assert last == again and last["loss"] < 0.2
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    third, _ = trained(replace(plan, seed=1))
    assert not torch.equal(one.head.weight, third.head.weight)
    with torch.no_grad():
        images, labels = pictures()
        assert not one.training and (one(images).argmax(-1) == labels).float().mean() > 0.9


def test_one_renormalised_expert_is_routed_by_the_balance_loss_alone():
    plan = replace(TINY, epochs=4)
    ways = {
        (renormalise, balance): trained(replace(plan, renormalise=renormalise, balance=balance, weight_decay=0.0))[0]
        for renormalise in (True, False)
        for balance in (0.0, 1e-5)
    }
    start = VisionMoE(1, 8, 2, plan).moe.router.weight
    moved = {way: error(hf.moe.router.weight, start) for way, hf in ways.items()}
    assert moved[True, 0.0] == 0  # the weight is 1 whatever the router says: no gradient
    assert moved[True, 1e-5] > 0.1 and moved[False, 0.0] > 0.1  # AdamW: however small the loss's weight


def test_a_random_router_draws_anew_and_a_seed_decides_how():
    plan = replace(TINY, random=True)
    (one, last), (_, again) = trained(plan), trained(plan)
    assert last == again and not list(one.moe.router.parameters())
    images = torch.randn(3000, 1, 8, 8)
    with moe.wrap(one) as model:
        drawn = [model.run({"images": images}).routing[0].ids.flatten() for _ in range(2)]
    assert (drawn[0] == drawn[1]).float().mean() == pytest.approx(1 / 3, abs=0.05)
    assert (drawn[0].bincount(minlength=3) / 3000 - 1 / 3).abs().max() < 0.05


def test_products_in_bfloat16_train_as_well_and_leave_all_else_in_float32():
    plan = replace(TINY, epochs=6)
    hf, last = trained(replace(plan, precision="bfloat16"))
    assert {value.dtype for value in hf.parameters()} == {torch.float32}
    other, whole = trained(plan)
    assert last["loss"] < 0.2 and last["loss"] != whole["loss"]
    assert 1e-4 < error(hf.trunk[0].weight, other.trunk[0].weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="steps are recorded on a GPU")
def test_recorded_steps_are_the_plain_ones(monkeypatch):
    images, labels = (one.cuda() for one in pictures())
    losses = []
    for record in (vision._recorded, lambda step, batch: step):
        monkeypatch.setattr(vision, "_recorded", record)
        losses.append(train(VisionMoE(1, 8, 2, TINY).cuda(), images, labels, TINY)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_every_epoch_takes_every_image_once_in_whole_batches():
    plan = replace(TINY, epochs=3)
    steps = list(vision.batches(50, plan))
    assert len(steps) == 3 * vision.steps_per_epoch(50, plan) == 9
    for epoch in range(3):
        drawn = torch.cat(steps[3 * epoch : 3 * epoch + 3])
        assert len(drawn) == len(drawn.unique()) == 48
    assert not torch.equal(steps[0], steps[3])


# The measurements of a trial


def forced(model, images, ids):
    edit = moe.apply("expert_ids", lambda value: ids[:, None].expand_as(value).clone())
    return model.run({"images": images}, edit=edit).logits.argmax(dim=-1)


MANY = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("top_k", [1, 2])
def test_conditions_are_what_edits_of_the_points_do(top_k):
    plan = replace(TINY, top_k=top_k, experts=3)
    with moe.wrap(build(top_k=top_k)) as model:
        run = model.run({"images": MANY})
        ids = run.routing[0].ids[:, 0]
        draw = ids.clone().fill_(0) + torch.arange(top_k)
        labels = run.logits.argmax(dim=-1)  # right under one routing or another
        labels[::3] = forced(model, MANY, draw)[::3]
        labels[1::3] = forced(model, MANY, (ids + 1) % 3)[1::3]
        got = routes(model, MANY, labels, plan)["accuracy"].values
        share = lambda predicted: (predicted == labels).float().mean().item()  # noqa: E731
        draws = [torch.tensor(draw).expand_as(ids) for draw in permutations(range(3), top_k)]
        expected = {
            "learned": share(run.logits.argmax(-1)),
            "random": np.mean([share(forced(model, MANY, draw)) for draw in draws]),
            "permuted": np.mean([share(forced(model, MANY, (ids + shift) % 3)) for shift in (1, 2)]),
        }
    accuracy = dict(zip(vision_trial.CONDITIONS, got, strict=True))
    assert len({round(value, 6) for value in expected.values()}) == 3  # or the test could not tell them apart
    for name, value in expected.items():
        assert accuracy[name] == pytest.approx(value, abs=1e-6), name
    if top_k == 1:
        assert accuracy["random"] == pytest.approx(accuracy["learned"] / 3 + accuracy["permuted"] * 2 / 3, abs=1e-6)


def test_fresh_experts_are_other_experts_in_the_same_model():
    plan, hf, labels = TINY, build(), torch.arange(40) % 5
    with moe.wrap(hf) as model:
        got = float(routes(model, MANY, labels, plan)["accuracy"].values[-1])
    hits = []
    for number in range(vision_trial.FRESH):
        other = copy.deepcopy(hf)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * (number + 1) + plan.seed)
            other.moe.experts = vision.Mixture(32, plan).experts
        with torch.no_grad():
            hits.append((other(MANY).argmax(-1) == labels).float().mean().item())
    assert got == pytest.approx(np.mean(hits), abs=1e-6)


def test_every_expert_alone_by_class():
    plan = TINY
    with moe.wrap(build()) as model:
        labels = model.run({"images": MANY}).logits.argmax(dim=-1)
        labels[:5] = torch.arange(5)  # every class occurs
        alone = routes(model, MANY, labels, plan)["alone"].values
        for expert in range(3):
            right = forced(model, MANY, torch.full((40, 1), expert)) == labels
            for label in range(5):
                assert alone[expert, label] == pytest.approx(right[labels == label].float().mean().item())


def test_images_are_looked_at_in_chunks_without_a_seam(monkeypatch):
    with moe.wrap(build()) as model:
        whole = look(model, IMAGES)
        monkeypatch.setattr(vision_trial, "CHUNK", 3)
        parts = look(model, IMAGES)
    for name in ("hidden", "outputs", "ids", "weights"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-6), name


def test_many_draws_are_sampled_and_few_are_all():
    assert vision_trial._draws(5, 2) == list(permutations(range(5), 2))
    many = vision_trial._draws(9, 3)
    assert len(many) == vision_trial.DRAWS and all(len(set(draw)) == 3 for draw in many)


def test_a_probe_is_ridge_regression_of_the_softmax():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=400)
    inputs = rng.normal(size=(400, 6)) + np.eye(3, 6)[labels] * 1.5
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)
    accuracy, information = probe(x[:300], y[:300], x[300:], y[300:])
    mean, std = inputs[:300].mean(0), inputs[:300].std(0, ddof=1)
    scaled = (inputs - mean) / std
    fitted = linear.LogisticRegression(C=1 / (2 * vision_trial.RIDGE * 300), tol=1e-8, max_iter=2000)
    fitted.fit(scaled[:300], labels[:300])
    assert accuracy == pytest.approx(fitted.score(scaled[300:], labels[300:]), abs=0.011)
    loss = -fitted.predict_log_proba(scaled[300:])[np.arange(100), labels[300:]].mean()
    shares = np.bincount(labels[300:]) / 100
    assert information == pytest.approx(-(shares * np.log(shares)).sum() - loss, abs=0.01)


def contradicting() -> Images:
    """Bright and dark pictures, of which a test set calls the bright ones dark; a third class is never seen."""
    images, labels = pictures(96)
    bright = (60 * images + 128).clamp(0, 255).to(torch.uint8)
    return Images("bright and dark", bright, labels, bright[:40], 1 - labels[:40], ("dark", "bright"), ("one", "two"))


def test_a_trial_is_trained_on_the_training_images_and_measured_on_the_others():
    images = contradicting()
    tensors = (*images.normalised(), images.train_labels, images.test_labels)
    found = vision_trial.trial(images, tensors, replace(TINY, epochs=6), {"study": "made up"})
    assert float(found["accuracy"].sel(condition="learned")) < 0.1 and float(found["loss"]) < 0.2
    assert (found["predicted"].values == 1 - found["label"].values).mean() > 0.9
    probed = found["probe_accuracy"].sel(probed=list(vision_trial.PROBES)).values
    assert probed[0] < 0.1  # fitted on the training labels, too
    assert found["expert"].values.tolist() == [0, 1, 2] and found["class"].values.tolist() == ["dark", "bright"]


def test_probes_read_the_trained_and_the_untrained_trunk_and_permuted_labels(monkeypatch):
    given = []
    monkeypatch.setattr(vision_trial, "probe", lambda *some: given.append(some) or (0.0, 0.0))
    trained, before = build(), VisionMoE(3, 16, 5, TINY).eval()
    labels, tests = torch.arange(40) % 5, torch.arange(7) % 5
    vision_trial.probes(trained, before, (MANY, IMAGES, labels, tests), 3)
    with torch.no_grad():
        for (inputs, _, others, held_out), hf in zip(given, (trained, before, trained), strict=True):
            assert torch.allclose(inputs, hf.trunk(MANY)) and torch.allclose(others, hf.trunk(IMAGES))
            assert torch.equal(held_out, tests)
    assert torch.equal(given[0][1], labels) and torch.equal(given[1][1], labels)
    assert not torch.equal(given[2][1], labels) and torch.equal(given[2][1].sort().values, labels.sort().values)


def test_the_untrained_trunk_of_a_trial_is_the_one_before_training(monkeypatch):
    images, seen = contradicting(), []
    monkeypatch.setattr(vision_trial, "probes", lambda hf, before, *_: seen.append((hf, before)) or {})
    tensors = (*images.normalised(), images.train_labels, images.test_labels)
    vision_trial.trial(images, tensors, TINY, {})
    ((hf, before),) = seen
    assert torch.equal(before.trunk[0].weight, VisionMoE(1, 8, 2, TINY).trunk[0].weight) and not before.training
    assert not torch.equal(hf.trunk[0].weight, before.trunk[0].weight)


def test_accuracy_by_class_averages_to_the_accuracy_of_its_condition():
    with moe.wrap(build()) as model:
        labels = model.run({"images": MANY}).logits.argmax(dim=-1)
        labels[:10] = torch.arange(10) % 5
        found = routes(model, MANY, labels, TINY)
    sizes = torch.bincount(labels, minlength=5).numpy() / len(labels)
    assert np.allclose(found["class_accuracy"].values @ sizes, found["accuracy"].values, atol=1e-6)
    assert len(set(found["accuracy"].values.round(4))) > 2  # or conditions could stand in another order


def test_weights_decay():
    plan = replace(TINY, epochs=4)
    free, decayed = (trained(replace(plan, weight_decay=decay))[0].head.weight.norm() for decay in (0.0, 20.0))
    assert decayed < 0.5 * free  # of 12 steps at a learning rate up to 0.01, with a mean of about 0.005: exp(-1.2)


# The study


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return read_images("digits", train=96, test=40)


SMALL = Study("test", experts=(2,), trials=2, plan=Plan(width=8, neurons=8, epochs=1, batch=32))
ONE = replace(SMALL, trials=1)


@pytest.fixture(scope="module")
def made(digits, tmp_path_factory):
    """The small study: its folder and its trials, for tests that change neither."""
    folder = tmp_path_factory.mktemp("small")
    return folder, run_study(SMALL, digits, folder, quiet=True)


def test_a_study_resumes_where_it_stopped(digits, made, tmp_path, monkeypatch):
    trials, done = vision_study.trial, []

    def interrupted(*args, **options):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(args)
        return trials(*args, **options)

    monkeypatch.setattr(vision_study, "trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(ONE, digits, tmp_path, quiet=True)
    assert len(list(tmp_path.iterdir())) == 4  # and no half-written file
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(vision_study, "trial", trials)
    found = run_study(ONE, digits, tmp_path, quiet=True)
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in before.items())
    _, whole = made
    assert {kind: len(some) for kind, some in whole.items()} == {
        "dense-1": 2, "base-2": 2, "short-2": 2, "dense-2": 2, "random-2": 2, "scored-2": 2,
    }  # fmt: skip
    assert found.keys() == whole.keys()
    for kind, (first, second) in whole.items():
        assert first.equals(found[kind][0]) and not second.equals(first), kind


def test_workers_make_the_same_trials(digits, made, tmp_path):
    _, alone = made
    together = run_study(ONE, digits, tmp_path, workers=2, quiet=True)
    assert alone.keys() == together.keys()
    for kind, (one, _) in alone.items():
        assert one.equals(together[kind][0]), kind


def test_an_error_in_a_worker_ends_the_study_and_leaves_whole_trials(digits, tmp_path):
    study = replace(ONE, plan=replace(SMALL.plan, learning_rate=-1.0))
    with pytest.raises(ValueError, match="Invalid learning rate"):
        run_study(study, digits, tmp_path, workers=2, quiet=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="at least one"):
        run_study(SMALL, digits, tmp_path, workers=0, quiet=True)


def die(job):
    """What a worker does that runs out of memory: it ends without a word."""
    os._exit(1)


def test_a_worker_that_dies_is_told_of(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(vision_study, "_work", die)
    with pytest.raises(BadInput, match="Use fewer workers"):
        run_study(ONE, digits, tmp_path, workers=2, quiet=True)


def test_probes_are_fitted_on_all_classes_also_where_files_are_in_their_order(monkeypatch):
    monkeypatch.setattr(vision_trial, "PROBED", 20)
    seen = []
    monkeypatch.setattr(vision_trial, "probe", lambda inputs, labels, *_: seen.append(labels) or (0.0, 0.0))
    labels = torch.arange(5).repeat_interleave(8)
    vision_trial.probes(build(), build(), (MANY, MANY, labels, labels), 0)
    assert len(seen) == 3 and all(len(one) == 20 and len(one.unique()) == 5 for one in seen)


def test_a_folder_of_another_study_is_refused(digits, made, tmp_path):
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    other = replace(ONE, plan=replace(SMALL.plan, neurons=16))
    with pytest.raises(BadData, match=r"dense-1-00.nc is a trial of another study: expected \{'neurons': 16\}"):
        run_study(other, digits, tmp_path, quiet=True)
    for path in tmp_path.glob("base-2*"):
        path.unlink()  # one is missing: refused before it is trained
    with pytest.raises(BadData, match="is a trial of another study"):
        run_study(other, digits, tmp_path, quiet=True)
    assert not list(tmp_path.glob("base-2*"))


def test_trials_of_other_images_and_files_that_are_no_trials_are_refused(digits, made, tmp_path):
    study = ONE
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    darker = replace(digits, train=digits.train // 2)
    with pytest.raises(BadData, match="images_sha256"):
        run_study(study, darker, tmp_path, quiet=True)
    path = tmp_path / "base-2-00.nc"
    old = load(path)  # as files were before they said which images they saw
    provenance = {key: value for key, value in provenance_of(old).items() if key != "images_sha256"}
    save(old.assign_attrs(provenance=json.dumps(provenance)), path)
    assert run_study(study, digits, tmp_path, quiet=True)["base-2"][0].equals(old)
    others = replace(digits, test_labels=digits.test_labels.flip(0))
    with pytest.raises(BadData, match="expected the labels of these test images, in this order, got other labels"):
        vision_study._finished(vision_study._Job("", TINY, path, provenance | {"images_sha256": "any"}), others)
    for wrong in (b"", path.read_bytes()[:5000]):
        path.write_bytes(wrong)
        with pytest.raises(BadData, match=r"base-2-00.nc is no trial of a study.*Remove it"):
            run_study(study, digits, tmp_path, quiet=True)
    xr.Dataset({"a": 1}).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(BadData, match="is no trial of a study"):
        run_study(study, digits, tmp_path, quiet=True)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BadOutput, match="cannot make"):
        run_study(study, digits, tmp_path / "file", quiet=True)


def test_a_study_is_read_back_without_its_images(digits, made, tmp_path):
    folder, found = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "base-2-07.nc").write_bytes((tmp_path / "base-2-00.nc").read_bytes())  # of a seed that was cut short
    again = vision_study.read_study(tmp_path)
    assert again.keys() == found.keys()
    first = (tmp_path / "short-2-00.nc").rename(tmp_path / "kept.nc")  # seed 0 is no longer whole: 1 stays, for all
    for kind, (trial,) in vision_study.read_study(tmp_path).items():
        assert trial.equals(found[kind][1]), kind
    first.rename(tmp_path / "short-2-00.nc")
    for kind, trials in found.items():
        assert all(one.equals(other) for one, other in zip(trials, again[kind], strict=True)), kind
    results = vision_study.findings(again)
    assert results.name == "test study" and not results.samples and list(results.routing) == [2]
    del again["random-2"]
    with pytest.raises(BadInput, match=r"none of \['random-2'\]"):
        vision_study.findings(again)
    with pytest.raises(BadData, match="no study in"):
        vision_study.read_study(tmp_path / "empty")
    run_study(replace(ONE, plan=replace(SMALL.plan, batch=16)), digits, tmp_path / "other", quiet=True)
    (tmp_path / "other" / "base-2-00.nc").rename(tmp_path / "base-2-00.nc")
    with pytest.raises(BadData, match="trials of several studies in .*: expected one study, got different batch"):
        vision_study.read_study(tmp_path)


def test_studies_and_devices_that_cannot_be_are_refused(digits, tmp_path):
    for changes in ({"trials": 0}, {"experts": (1,)}, {"experts": (2, 2)}, {"experts": ()}):
        with pytest.raises(BadInput, match="not a study"):
            replace(SMALL, **changes)
    for device in ("nonsense", "cuda:77"):
        with pytest.raises(BadInput, match="no such device"):
            run_study(SMALL, digits, tmp_path, device, quiet=True)


def _parent(pipe):
    """Starts a worker, says which, and is then in no state to end it."""
    worker = multiprocessing.get_context("spawn").Process(target=_orphan, args=(pipe,))
    worker.start()
    time.sleep(60)


def _orphan(pipe):
    threading.Thread(target=vision_study._end_with_parent, daemon=True).start()
    pipe.send(os.getpid())
    time.sleep(60)


def test_workers_end_with_a_parent_that_is_killed():
    here, there = multiprocessing.Pipe()
    parent = multiprocessing.get_context("spawn").Process(target=_parent, args=(there,))
    parent.start()
    pid = here.recv()
    assert _runs(pid)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")  # ended, not collected


def test_plans_differ_in_what_their_names_say():
    plans = dict(Study(trials=2, plan=TINY).plans())
    assert len(plans) == 2 * (1 + 3 * 5)
    assert plans["base-3-01"] == replace(TINY, experts=3, seed=1)
    assert plans["short-5-00"] == replace(TINY, experts=5, depth="short")
    assert plans["random-2-00"] == replace(TINY, experts=2, random=True)
    assert plans["scored-2-00"] == replace(TINY, experts=2, renormalise=False)
    total = VisionMoE(3, 16, 5, plans["dense-3-00"]).moe.experts
    one = VisionMoE(3, 16, 5, plans["base-3-00"]).moe.experts
    weights = [sum(p.numel() for p in experts.parameters() if p.ndim == 2) for experts in (total, one)]
    assert weights[0] == weights[1]


# Pictures


def encoded(value: int) -> bytes:
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(("folder", "column", "wrapped"), [("", "image", False), ("data", "img", True)])
def test_parquet_as_hubs_lay_it_out(tmp_path, folder, column, wrapped):
    import pyarrow as pa
    from pyarrow import parquet

    place = tmp_path / folder
    place.mkdir(exist_ok=True)
    for split, count in (("train", 5), ("test", 3)):
        raw = [encoded(10 * row) for row in range(count)]
        given = [{"bytes": one, "path": None} for one in raw] if wrapped else raw
        table = pa.table({column: given, "label": [(row + 3) % 10 for row in range(count)]})
        parquet.write_table(table, place / f"{split}-00000-of-00001.parquet")
    images = read_images(tmp_path)
    assert images.train.shape == (5, 3, 32, 32) and images.test.shape == (3, 3, 32, 32)
    assert images.train[:, 1, 4, 4].tolist() == [0, 10, 20, 30, 40]
    assert images.train_labels.tolist() == [3, 4, 5, 6, 7]
    assert images.groups[:3] == ("vehicle", "vehicle", "animal") and images.classes[9] == "truck"
    some = read_images(tmp_path, train=2, test=1)
    assert len(some.train) == 2
    assert all((row == images.train.flatten(1)).all(1).any() for row in some.train.flatten(1))


def test_a_folder_for_each_class(tmp_path):
    from moe_interp.zoo.vision_images import CIFAR10

    for split in ("train", "test"):
        for number, name in enumerate(CIFAR10):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(encoded(number))
    images = read_images(tmp_path)
    assert images.train[:, 0, 0, 0].tolist() == images.train_labels.tolist() == list(range(10))


def test_the_folder_that_torchvision_reads(tmp_path, monkeypatch):
    with pytest.raises(BadData, match="expected train"):
        read_images(tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()

    class Dataset:
        """What torchvision.datasets.CIFAR10 has: data [N, 32, 32, 3] and targets."""

        def __init__(self, root, train, download):
            assert root == tmp_path and download is False
            self.data = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
            self.data[:, 5, 7, 2] = 200 if train else 100
            self.targets = [3, 0, 9]

    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(CIFAR10=Dataset))
    images = read_images(tmp_path)
    assert images.train.shape == (3, 3, 32, 32) and images.train_labels.tolist() == [3, 0, 9]
    assert images.train[2, 2, 5, 7] == 200 and images.test[2, 2, 5, 7] == 100 and images.train[2, 0, 5, 7] == 2
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(BadInput, match="torchvision"):
        read_images(tmp_path)


def test_pictures_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(BadData, match="no such folder"):
        read_images(tmp_path / "none")
    with pytest.raises(BadData, match="none of them"):
        read_images(tmp_path)
    import pyarrow as pa
    from pyarrow import parquet

    for bad, said in (
        ({"image": [b"no picture"], "label": [0]}, "cannot read a picture"),
        ({"image": [encoded(1)], "label": [11]}, "not CIFAR-10's"),
        ({"pixels": [encoded(1)], "label": [1]}, "columns image and label"),
    ):
        for split in ("train", "test"):
            parquet.write_table(pa.table(bad), tmp_path / f"{split}.parquet")
        with pytest.raises(BadData, match=said):
            read_images(tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(BadData, match="a parquet file"):
        read_images(tmp_path)


def test_digits_are_split_alike_every_time_and_normalised():
    pytest.importorskip("sklearn")
    one, other = read_images("digits"), read_images("digits")
    assert torch.equal(one.train, other.train) and len(one.train) == 1347 and len(one.test) == 450
    assert functional.one_hot(one.test_labels).sum(0).min() >= 43
    assert int(one.train.max()) == 255 and int(one.train.min()) == 0
    train_images, test_images = one.normalised()
    assert train_images.mean().abs() < 1e-4 and float(train_images.std()) == pytest.approx(1, abs=1e-4)
    mean, std = one.train.float().mean(), one.train.float().std()
    assert torch.allclose(test_images, (one.test.float() - mean) / std, atol=1e-5)
