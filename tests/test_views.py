"""The report: self-contained, whole or not at all, and safe with hostile tokens, domains and names."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console

import moe_interp as moe
from moe_interp import errors
from moe_interp.views import figures, tables
from moe_interp.views import report as page
from moe_interp.views.tokens import escaped, shown
from tests.stub_tokenizer import StubTokenizer
from tests.tiny import build

HOSTILE = "<script>alert(1)</script>"


class HostileTokenizer(StubTokenizer):
    """Every token's text is an attack."""

    def decode(self, ids, skip_special_tokens=False):
        return HOSTILE * len(ids)


class Seen(HTMLParser):
    """What a browser would load, and the scripts it would run."""

    def __init__(self):
        super().__init__()
        self.loads, self.scripts = [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.loads += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    texts = {
        f"{HOSTILE}a": ["first text of one domain", "another text of that domain"],
        "b&b": ["SOMETHING ELSE HERE 1234", "MORE OF THE SAME KIND 99"],
    }
    target = tmp_path_factory.mktemp("report") / "report.html"
    with moe.wrap(build("deepseek_v3"), HostileTokenizer(), name=HOSTILE) as model:
        corpus = moe.Corpus.from_texts(texts)
        options = {"resamples": 20, "seed": 0, "max_tokens": 20}
        results = page.Results(
            routing=moe.routing(model, corpus, **options),
            routing_map=moe.routing_map(model, "first text"),
            lens=moe.expert_lens(model, "first text"),
            similarity=moe.ensemble_similarity(model, corpus, **options),
            perplexity=moe.perplexity(model, corpus, renormalise="both", **options),
            coactivation=moe.coactivation(model, corpus, **options),
            transitions=moe.transitions(model, corpus, max_tokens=20),
            vocabulary=moe.vocabulary_specialization(model, corpus, at_least=3, max_tokens=20),
            norms=moe.norm_and_weight(model, corpus, **options),
            saturation=None,
        )
        moe.report(model, corpus, target, text="first text", resamples=20, max_tokens=20)
    return target.read_text(encoding="utf-8"), results


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("olmoe", ["no expert: resid_mid", "the heaviest expert"]),
        (
            "deepseek_v3",
            [
                "no expert: resid_mid",
                "no routed expert, shared ones only",
                "the heaviest expert and the shared ones",
            ],
        ),
    ],
)
def test_the_lens_names_its_control_with_and_without_shared_experts(family, names):
    with moe.wrap(build(family)) as model:
        result = moe.expert_lens(model, torch.arange(3, 11)[None])
    shared = ["+shared"] if family == "deepseek_v3" else []
    parts = ["resid_mid", *(f"resid_mid{one}" for one in shared), f"resid_mid+c1{''.join(shared)}"]
    lines = figures.lens(result).data
    assert [line.name for line in lines[: len(names)]] == names
    for line, part in zip(lines, parts, strict=False):
        np.testing.assert_allclose(line.y, result.kl.sel(part=part).mean("pos"))


def without_library(html: str) -> str:
    from plotly.offline import get_plotlyjs

    return html.replace(get_plotlyjs(), "")


def test_nothing_is_fetched_and_nothing_untrusted_is_run(made):
    html, _ = made
    seen = Seen()
    seen.feed(without_library(html))
    assert seen.loads == []
    assert "default-src 'none'" in html
    assert HOSTILE not in without_library(html)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    drawings = html.count("Plotly.newPlot(")
    assert seen.scripts == 1 + drawings


def test_the_four_questions_are_answered_by_the_datasets_own_numbers(made):
    html, results = made
    text = re.sub(r"\s+", " ", without_library(html))
    share = 100 * float(results.routing["specialization"].max())
    assert f"takes {share:.0f} %" in text
    one = results.perplexity.sel(aggregate="token", renormalise="no", k=1)
    assert f"× {float(one['ratio_overall']):.2f} [" in text
    assert f"× {float(one['ratio_random_overall']):.2f} with a random one" in text
    cosine = results.similarity["cosine_overall"].sel(residual="without", shared="without", candidate="heaviest")
    assert f"{float(cosine.mean('layer')):.2f} alone" in text
    for row in page._aggregates(results.perplexity):
        assert f"<td>{row['full']:.1f}</td>" in text


def test_figures_show_the_values_and_their_controls(made):
    _, results = made
    drawn = figures.perplexity(results.perplexity)
    expected = results.perplexity["ratio"].sel(aggregate="token", renormalise="no", domain="b&b").values
    assert [trace.name for trace in drawn.data[:2]] == [escaped(f"{HOSTILE}a", 40), "b&amp;b"]
    assert np.allclose(drawn.data[1].y, expected)
    controls = {trace.name: trace.y for trace in drawn.data[2:]}
    at = results.perplexity.sel(aggregate="token", renormalise="no")
    assert np.allclose(controls["k of the K at random, all domains"], at["ratio_random_overall"])
    assert np.allclose(controls["no routed expert, all domains"], at["ratio_none_overall"])
    curve = figures.coverage(results.routing).data[0].y
    assert np.isclose(curve[-1], 1.0)
    assert np.all(np.diff(np.diff(curve)) <= 1e-12)
    bars = figures.strongest(results.routing).data[0]
    best = results.routing["specialization"].values[0, 0].argmax()
    ends = 100 * results.routing["specialization_interval"].values[:, 0, 0, best]
    assert np.isclose(bars.y[0] - bars.error_y.arrayminus[0], ends[0])
    assert np.isclose(bars.y[0] + bars.error_y.array[0], ends[1])


def test_rows_of_domains_are_as_many_as_the_domains_and_no_dates():
    long = "a name that is longer than forty characters: "
    texts = {name: ["a text"] for name in (f"{long}one", f"{long}two", "2019-01", "2020-01")}
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        routing = moe.routing(model, moe.Corpus.from_texts(texts), resamples=2)
    figure = figures.specialization(routing)
    rows = list(figure.data[0].y)
    assert len(set(rows)) == 4
    assert rows[2:] == ["2019-01", "2020-01"]
    assert [row[:9] for row in rows[:2]] == ["0 a·name·", "1 a·name·"]
    assert figure.layout.yaxis.type == "category"


def test_the_headlines_of_a_single_document_have_no_interval():
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        corpus, options = moe.Corpus.from_texts({"a": ["a short text"]}), {"resamples": 2}
        results = page.Results(
            routing=moe.routing(model, corpus, **options),
            routing_map=moe.routing_map(model, "a text"),
            lens=moe.expert_lens(model, "a text"),
            similarity=moe.ensemble_similarity(model, corpus, **options),
            perplexity=moe.perplexity(model, corpus, renormalise="both", **options),
            coactivation=moe.coactivation(model, corpus, **options),
            transitions=None,
            vocabulary=None,
            norms=moe.norm_and_weight(model, corpus, **options),
            saturation=None,
        )
    told = [one.value for one in page.headlines(results)]
    assert not any("nan" in value for value in told)
    assert "% [–] of the tokens of a" in told[0]
    assert told[3].endswith("[–]")


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_refused_before_anything_is_measured(text, tmp_path):
    corpus = moe.Corpus.from_texts({"a": ["a text"]})
    message = "the text is empty: expected at least one character"
    with moe.wrap(build("olmoe"), StubTokenizer()) as model, pytest.raises(errors.BadInput, match=message):
        moe.report(model, corpus, tmp_path / "report.html", text=text)
    assert not list(tmp_path.iterdir())


def test_names_do_not_steer_a_terminal():
    name, told = "a b\x1b[31m\nred", r"a b\x1b[31m\x0ared"
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        corpus, options = moe.Corpus.from_texts({name: ["a text", "more of it"]}), {"resamples": 2}
        routing, perplexity = (measure(model, corpus, **options) for measure in (moe.routing, moe.perplexity))
        labels = moe.routing_by_label(model, corpus, lambda tokenized: [name] * len(tokenized.tokens), **options)
    steps = {
        "saturation": (("step", "layer"), [[1.0]]),
        "saturation_interval": (("bound", "step", "layer"), [[[1.0]]] * 2),
    }
    saturation = xr.Dataset(steps, {"step": [name], "layer": [1]})
    for table in (
        tables.routing(routing),
        tables.perplexity(perplexity),
        tables.labels(labels),
        tables.saturation(saturation),
    ):
        printed = io.StringIO()
        Console(file=printed, width=300).print(table)
        assert told in printed.getvalue()
        assert "\x1b" not in printed.getvalue()


def test_the_text_shown_is_short_with_and_without_spaces():
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        for text in ("no" * 2000, "some words of a text " * 200, "short"):
            found = page.opening(model, moe.Corpus.from_texts({"a": [text]}))
            assert text.startswith(found)
            assert 1 <= len(found) <= 24


def test_tokens_are_made_visible_and_cut():
    assert shown(" the\n") == "·the↵"
    assert shown("\x00\x1b") == "\\x00\\x1b"
    assert shown("") == "∅"
    assert shown("x" * 50, 10) == "x" * 9 + "…"
    assert escaped("<b>") == "&lt;b&gt;"


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    with moe.wrap(build("olmoe"), StubTokenizer()) as model:
        corpus = moe.Corpus.from_texts({"a": ["some text"]})
        for target in (tmp_path / "no" / "report.html", tmp_path):
            with pytest.raises(errors.BadOutput, match="cannot write"):
                moe.report(model, corpus, target)
    assert not list(tmp_path.iterdir())
