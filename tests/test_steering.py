"""The steering example, on the bundled model, small."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import moe_interp as moe


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "steering.py"
    spec = importlib.util.spec_from_file_location("steering_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study(example):
    model = moe.load()
    setting = example.Setting("french_literature", 4, 1, 8, 6, (8.0,), 0)
    return example.Study(model, moe.sample().take(4), setting)


def test_experts_are_chosen_on_one_half_and_measured_on_the_other(example, study):
    first, second = example.halves(moe.sample().take(4))
    assert {one.text for one in first.documents}.isdisjoint({one.text for one in second.documents})
    assert len(first) == len(second) == len(study.ids) == 18
    counts = moe.routing(study.model, first, resamples=1)["utilisation"]
    for layer, experts in study.experts.items():
        at = counts.sel(layer=layer)
        gain = {
            e: float(at.sel(domain="french_literature", expert=e))
            - float(np.mean([at.sel(domain=d, expert=e) for d in counts.domain.values if d != "french_literature"]))
            for e in range(64)
        }
        assert set(experts) == set(sorted(gain, key=gain.get)[-4:])


def test_forbidding_them_hurts_the_domain_and_not_the_others(example, study):
    base, without = study.measure("none", []), study.measure("forbidden", example.forbidden(study.experts))
    assert np.exp((without.own - base.own).mean()) > 1.2
    assert np.exp((without.others - base.others).mean()) < 1.1
    run = study.model.run([study.ids[0][1][:8]], edit=example.forbidden(study.experts))
    for layer, experts in study.experts.items():
        assert not np.isin(run.routing[layer].ids.numpy(), experts).any()


def test_the_classifier_knows_the_domain_and_the_nats_are_the_models(example, study):
    own, others = study.calibration()
    assert own > 0.4 > others
    ids = study.ids[0][1]
    logits = study.model.run([ids]).logits[0].log_softmax(-1)
    expected = -np.mean([float(logits[place, token]) for place, token in enumerate(ids[1:])])
    assert abs(study.nats([ids], [])[0] - expected) < 1e-4


def test_the_page_gets_its_table_and_keeps_its_text(example, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{example.MARK}\nold\n{example.MARK}\nafter\n", encoding="utf-8")
    options = ["--documents", "2", "--draws", "1", "--written", "3", "--push", "8", "--markdown", str(page)]
    monkeypatch.setattr(sys, "argv", ["steering.py", *options])
    example.main()
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| preferred pushed by 8 |" in text
    assert text.count("| random") == 2
    assert text.count("preferred pushed by 8: ") == 1  # what it wrote
