"""The commands by label, by expert and over training: what they print and write is what the library gives."""

import re
from functools import cache

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

import moe_interp as moe
from moe_interp import cli, results
from moe_interp.checkpoint import REFERENCE

SMALL = ["--limit", "2", "--max-tokens", "24"]


@cache
def reference() -> moe.MoEModel:
    return moe.load()


def corpus() -> moe.Corpus:
    return moe.sample().take(2)


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch):
    monkeypatch.setattr(cli, "console", Console(width=240))


def run(capsys, *arguments: str, status: int = 0) -> str:
    """What the command line prints, and on errors what it says."""
    with pytest.raises(SystemExit) as done:
        cli.main(list(arguments))
    assert done.value.code == status
    told = capsys.readouterr()
    return told.err if status else told.out


def rows(printed: str) -> list[list[str]]:
    """The cells of every line of the table's body."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line[:1] == "│"]


def test_labels_shows_the_expert_that_each_label_has_most_of_its_own(capsys, tmp_path):
    printed = run(capsys, "labels", "punctuation", *SMALL, "-o", str(tmp_path / "labels.nc"))
    expected = moe.routing_by_label(reference(), corpus(), "punctuation", max_tokens=24)
    written = results.load(tmp_path / "labels.nc")
    xr.testing.assert_identical(written, expected)
    told = rows(printed)
    assert len(told) == 2 * 7
    for name, tokens, layer, expert, share, others, p in told:
        here = expected.sel(label=name, layer=int(layer))
        assert int(tokens) == int(here.tokens)
        lead = here.specialization - here.specialization_rest
        at = here.sel(expert=int(expert))
        assert float(lead.sel(expert=int(expert))) == float(lead.max())
        low, high = 100 * at.specialization_interval.values
        assert share == f"{100 * float(at.specialization):.1f} [{low:.1f}, {high:.1f}]"
        assert others == f"{100 * float(at.specialization_rest):.1f}"
        assert p == f"{float(at.specialization_p):.3f}"
    assert f"wrote {tmp_path / 'labels.nc'}" in printed
    assert "Under a uniform router: 9.4 %" in printed


def test_profile_prints_one_expert_and_writes_the_page_of_all(capsys, tmp_path):
    printed = run(capsys, "profile", "3", "5", *SMALL, "-o", str(tmp_path / "page.html"))
    expected = moe.expert_profiles(reference(), corpus(), max_tokens=24)
    assert printed.startswith(str(moe.profile(expected, 3, 5)) + "\n")
    assert f"wrote {tmp_path / 'page.html'}" in printed
    moe.profile_page(expected, tmp_path / "expected.html")
    page, other = ((tmp_path / name).read_text(encoding="utf-8") for name in ("page.html", "expected.html"))
    assert page == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["labels", "colour", *SMALL], "unknown label: expected one of kind, punctuation, script, position"),
        (["profile"], "which expert: expected a layer and an expert, or --output for a page of all"),
        (["profile", "3"], "or --output for a page of all, got a layer alone"),
        (["profile", "3", "64"], "unknown expert 64 at layer 3"),
        (["profile", "0", "1"], "layer 0 has no experts: expected one of the MoE layers [1, 2, 3, 4, 5, 6, 7]"),
        (["saturation", "--revision", "a"], "which checkpoints: expected folders or hub ids, got none, but options"),
        (["saturation", "--limit", "2"], "which checkpoints: expected folders or hub ids, got none, but options"),
        (["saturation", "a", "b", "--revision", "c"], "revisions of what: expected a single checkpoint, got 2"),
    ],
)
def test_what_cannot_be_asked_is_an_error_that_says_why(capsys, arguments, message):
    assert message in run(capsys, *arguments, status=2)


@pytest.mark.parametrize("command", ["labels", "profile", "saturation"])
def test_a_result_that_cannot_be_written_is_refused_first(capsys, command, tmp_path, monkeypatch):
    for name in ("load", "reference_saturation"):
        monkeypatch.setattr(moe, name, lambda *given, **named: pytest.fail("something was measured"), raising=True)
    target = str(tmp_path / "no" / "result")
    assert f"cannot write {target}" in run(capsys, command, "-o", target, status=2)


def cells(result: xr.Dataset, step) -> list[str]:
    at = result.sel(step=step)
    low, high = at.saturation_interval.values
    return [f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in zip(at.saturation.values, low, high, strict=True)]


def test_saturation_without_checkpoints_is_that_of_the_bundled_training(capsys, tmp_path):
    printed = run(capsys, "saturation", "-o", str(tmp_path / "saturation.nc"))
    expected = moe.reference_saturation()
    xr.testing.assert_identical(results.load(tmp_path / "saturation.nc"), expected)
    assert rows(printed) == [[str(step), *cells(expected, step)] for step in expected.step.values]
    first = float(expected.independent.isel(step=0).mean())
    assert f"Uniform router: 0.09; by loads alone at the first: {first:.2f}" in printed


def test_saturation_of_folders_compares_them_with_the_last(capsys, tmp_path):
    with moe.load() as model:
        rng = np.random.default_rng(0)
        for layer in model.hf.model.layers[1:]:
            weight = layer.mlp.gate.weight.data
            weight += weight.new_tensor(0.3 * rng.normal(size=weight.shape)) * weight.std()
        hf, tokenizer = model.hf, model.tokenizer
    hf.save_pretrained(tmp_path / "early")
    tokenizer.save_pretrained(tmp_path / "early")
    printed = run(capsys, "saturation", str(tmp_path / "early"), str(REFERENCE), "--limit", "2")
    expected = moe.router_saturation([tmp_path / "early", REFERENCE], corpus())
    assert ((expected.saturation[0] > 0.3) & (expected.saturation[0] < 1)).all()
    assert rows(printed) == [[step, *cells(expected, step)] for step in ("early", REFERENCE.name)]
    first, last = expected.independent.mean("layer").values
    assert f"{first:.2f}" != f"{last:.2f}"
    assert f"Uniform router: 0.09; by loads alone at the first: {first:.2f}" in printed
    assert re.search(r"│ reference +│ 1\.00 \[1\.00, 1\.00\] │", printed)
