"""The commands by label, by expert and over training: what they print and write is what the library gives."""

import inspect
import io
import json
import re
from functools import cache

import numpy as np
import pytest
import xarray as xr

import moe_interp as moe
from moe_interp import cli, results
from moe_interp.checkpoint import REFERENCE
from moe_interp.views.terminal import Escaping, Terminal
from tests.tiny import build

SMALL = ["--limit", "2", "--max-tokens", "24"]


@cache
def reference() -> moe.MoEModel:
    return moe.load()


def corpus() -> moe.Corpus:
    return moe.sample().take(2)


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch):
    monkeypatch.setattr(cli, "console", Terminal(width=240))


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
        (["saturation", "a"], "too few checkpoints: expected at least two, the final one last, got 1"),
        (["saturation", "a", "--revision", "c"], "too few checkpoints: expected at least two"),
        (
            ["routing", "/no/such/model"],
            "cannot load '/no/such/model': expected a folder with config.json, got no such",
        ),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["labels", "colour"], "unknown label: expected one of kind, punctuation, script, position"),
        (["lens", " "], "the text is empty: expected at least one character, got ' '"),
        (["report", "--text", ""], "the text is empty: expected at least one character, got ''"),
        (["routing", "-o", "x.json"], "cannot write x.json: expected a name that ends in .nc"),
        (["perplexity", "-o", "x"], "cannot write x: expected a name that ends in .nc"),
        (["routing", "--text-field", "body", "--data", "DATA"], "a field 'body', got the fields 'content', 'domain'"),
    ],
)
def test_what_can_be_refused_is_refused_before_a_model_is_loaded(capsys, arguments, message, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text('{"content": "a text", "domain": "a"}\n')
    monkeypatch.setattr(moe, "load", lambda *given, **named: pytest.fail("a model was loaded"), raising=True)
    assert message in run(capsys, *[str(data) if one == "DATA" else one for one in arguments], status=2)


def test_a_model_without_a_tokenizer_is_told_what_can_be_done_about_it(capsys, tmp_path):
    build("olmoe").save_pretrained(tmp_path)
    for command in (["routing"], ["labels", "--model"], ["lens", "a text", "--model"]):
        assert "put its files into the folder of the checkpoint" in run(capsys, *command, str(tmp_path), status=2)


def test_a_single_document_has_no_interval_and_counts_are_whole(capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"content": "One text, and no other."}\n')
    options = ["--data", str(data), "--text-field", "content"]
    printed = run(capsys, "routing", *options)
    assert "nan" not in printed
    expected = moe.routing(reference(), moe.read_corpus(data, text="content"), max_tokens=256)
    told = rows(printed)
    assert [int(layer) for layer, *_ in told] == list(reference().layers)
    for layer, n50, n90, max_vio, dead, balance, peak in told:
        at = expected.sel(layer=int(layer))
        assert [int(n50), int(n90), int(dead)] == [at.n50_overall, at.n90_overall, at.dead_experts_overall]
        assert (max_vio, balance) == (f"{float(at.max_vio_overall):.2f}", f"{float(at.load_balance):.2f}")
        share = 100 * float(at.specialization.max())
        assert peak.endswith(f": {share:.0f} [–] % of data")


def test_similarity_and_perplexity_show_intervals(capsys):
    similar = moe.ensemble_similarity(reference(), corpus(), max_tokens=24)
    told = rows(run(capsys, "similarity", *SMALL))
    assert len(told) == 2 * 7
    for number, (layer, *cosines) in enumerate(told):
        at = similar.sel(layer=int(layer), residual="with" if number >= 7 else "without", shared="without")
        for name, cell in zip(similar.candidate.values, cosines, strict=True):
            low, high = at.cosine_overall_interval.sel(candidate=name).values
            mean = float(at.cosine_overall.sel(candidate=name))
            assert cell == (f"{mean:.3f} [{low:.3f}, {high:.3f}]" if np.isfinite(mean) else "–")
    result = moe.perplexity(reference(), corpus(), max_tokens=24).sel(aggregate="token")
    *domains, whole, control = rows(run(capsys, "perplexity", *SMALL))
    for name, perplexity, *ratios in domains:
        at = result.sel(domain=name)
        low, high = at.perplexity_full_interval.values
        assert perplexity == f"{float(at.perplexity_full):.1f} [{low:.1f}, {high:.1f}]"
        assert ratios == interval_cells(at.ratio, at.ratio_interval)
    assert whole[0] == "all" and whole[2:] == interval_cells(result.ratio_overall, result.ratio_overall_interval)
    assert control[2:] == interval_cells(result.ratio_random_overall, result.ratio_random_overall_interval)


def interval_cells(values: xr.DataArray, ends: xr.DataArray) -> list[str]:
    return [
        f"{float(values.sel(k=k)):.3f} [{float(ends.sel(k=k)[0]):.3f}, {float(ends.sel(k=k)[1]):.3f}]" for k in values.k
    ]


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


def test_the_version(capsys):
    assert run(capsys, "--version") == f"moe-interp {moe.__version__}\n"


@pytest.mark.parametrize("command", ["labels", "saturation", "routing", "lens"])
def test_no_cell_is_cut_in_80_columns(capsys, command, monkeypatch):
    """In a narrow terminal the table is as in a wide one."""
    arguments = {"saturation": [], "lens": ["The capital of France is"]}.get(command, SMALL)
    wide = run(capsys, command, *arguments)
    monkeypatch.setattr(cli, "console", Terminal(width=80))
    narrow = run(capsys, command, *arguments)
    assert rows(narrow) == rows(wide) and max(map(len, rows(wide))) > 3
    assert command == "lens" or "[" in rows(narrow)[0][-1] + rows(narrow)[0][4] + rows(narrow)[0][1]
    assert "…" not in narrow or command == "lens"


def test_words_go_on_in_the_next_line_and_are_not_cut(capsys, monkeypatch):
    monkeypatch.setattr(cli, "console", Terminal(width=40))
    printed = run(capsys, "models")
    assert max(map(len, printed.splitlines())) <= 40 and "…" not in printed
    names = "".join(row[0] for row in rows(printed))
    assert "switch_transformers" in names and "openai_privacy_filter" in names


def test_commands_and_python_read_as_many_tokens(capsys, tmp_path):
    data = tmp_path / "long.txt"
    data.write_text("the cat sat on the mat " * 100)
    run(capsys, "routing", "--data", str(data), "-o", str(tmp_path / "r.nc"))
    expected = moe.routing(reference(), moe.read_corpus(data))
    assert int(expected.tokens.sum()) > 256
    xr.testing.assert_identical(results.load(tmp_path / "r.nc"), expected)
    defaults = {
        name: [inspect.signature(one).parameters["max_tokens"].default for one in (getattr(cli, name), python)]
        for name, python in (
            ("report", moe.report),
            ("routing", moe.routing),
            ("labels", moe.routing_by_label),
            ("profile", moe.expert_profiles),
            ("similarity", moe.ensemble_similarity),
            ("perplexity", moe.perplexity),
            ("tuned_lens", moe.train_tuned_lens),
        )
    }
    assert all(command == python for command, python in defaults.values()), defaults


def test_the_domain_may_be_in_any_field(capsys, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("text,source\none text here,news\nand another,code\n")
    printed = run(capsys, "perplexity", "--data", str(data), "--domain-field", "source")
    assert [name for name, *_ in rows(printed)] == ["news", "code", "all", "random slots"]


ODD = "\x1b[31mred\x07\x9b2J\u202e"
SHOWN = "\\x1b[31mred\\x07\\x9b2J\\x202e"


def controls(text: str) -> set[str]:
    return {sign for sign in text if not sign.isprintable() and sign != "\n"}


def test_nothing_that_is_printed_can_steer_a_terminal(capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"{ODD} one {ODD}", "domain": f"{ODD}{n}"}) for n in "ab"))
    for command in (["perplexity"], ["routing"], ["profile", "3", "5"]):
        printed = run(capsys, *command, "--data", str(data), "--max-tokens", "24")
        assert not controls(printed), command
        assert SHOWN in printed or command == ["profile", "3", "5"]
    for name in (f"./{ODD}", f"{ODD}.nc"):
        said = run(capsys, "routing", name, status=2)
        assert "\\x1b[31mred\\x07" in said and not controls(said)
    for arguments in ([ODD], ["routing", f"--{ODD}"]):
        said = run(capsys, *arguments, status=2)
        assert "\\x1b[31mred\\x07" in said and not controls(said)


def test_warnings_and_what_others_write_are_escaped(capsys, tmp_path):
    folder = tmp_path / "odd\x1b[31m"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"text": "one text"}\n{"text": " "}\n')
    run_once = ["perplexity", "--data", str(folder / "data.jsonl")]
    with pytest.raises(SystemExit):
        cli.main(run_once)
    told = capsys.readouterr().err
    assert "1 empty texts of " in told and "odd\\x1b[31m" in told and "\x1b" not in told
    stream = io.StringIO()
    Escaping(stream).write("10 %\r20 %\n\x1b[0m")
    assert stream.getvalue() == "10 %\r20 %\n\\x1b[0m"
