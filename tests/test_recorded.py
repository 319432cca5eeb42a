"""Recorded counts and perplexities: the same definitions as measured ones, and files that cannot run code.

Tests of the published figures need the folder that holds them, which is not part of the repository; the
environment variable MOE_INTERP_RECORDED names it.
"""

import csv
import importlib.util
import io
import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from moe_interp import results, stats
from moe_interp.analyses.recorded import (
    perplexity_ratios,
    read_cosines,
    read_counts,
    read_denominators,
    read_perplexity,
    routing_from_counts,
)
from moe_interp.analyses.routing import RoutingCounts
from moe_interp.errors import BadData, BadInput
from tests.reference import routing as slow

TOKENS, TOP_K = [40, 25], 2
DOMAINS = ["prose", "code"]


def random_counts(seed: int, tokens=TOKENS, layers: int = 3, experts: int = 5, top_k: int = TOP_K) -> np.ndarray:
    """Every token draws K distinct experts, some more often than others."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((len(tokens), layers, experts), int)
    for domain, layer in np.ndindex(len(tokens), layers):
        for _ in range(tokens[domain]):
            share = rng.dirichlet(np.arange(1, experts + 1))
            counts[domain, layer, rng.choice(experts, top_k, replace=False, p=share)] += 1
    return counts


COUNTS = random_counts(0)


# The same Dataset as a corpus gives


def test_counts_alone_give_what_the_same_counts_with_documents_give():
    alone = routing_from_counts(COUNTS, tokens=TOKENS, domains=DOMAINS, top_k=TOP_K, layers=[1, 4, 9])
    zeros = np.zeros_like(COUNTS)
    empty = RoutingCounts.empty(2, (1, 4, 9), COUNTS.shape[-1], TOP_K)
    sums = replace(empty, tokens=np.array(TOKENS), counts=COUNTS, weights=zeros, scores=zeros)
    measured = sums.result(np.array([0, 1]), DOMAINS, provenance={}, resamples=2)
    assert set(alone.variables) == set(measured.variables)
    for name in alone.data_vars:
        assert alone[name].dims == measured[name].dims, name
        assert alone[name].attrs == measured[name].attrs, name
    needs_more = [name for name in alone.data_vars if bool(alone[name].isnull().all())]
    for name in set(alone.data_vars) - set(needs_more) - {"documents"}:
        xr.testing.assert_equal(alone[name], measured[name])
    assert set(needs_more) == {
        *(f"{name}_interval" for name in ("utilisation", "utilisation_overall", "weight_share", "specialization")),
        *(f"{name}{end}" for name in slow.PER_TOKEN for end in ("", "_interval")),
        *("weight_share", "specialization_p", "n50_debiased", "n90_debiased", "load_balance"),
        *("load_balance_as_coded", "divergence_debiased", "divergence_null", "divergence_p"),
    }
    assert alone.attrs["missing"].startswith("recorded counts have no documents")
    assert alone.documents.values.tolist() == [0, 0]


def test_specialization_coverage_and_divergence_against_loops():
    found = routing_from_counts(COUNTS, tokens=TOKENS, domains=DOMAINS, top_k=TOP_K)
    assert float(found.specialization_baseline) == TOP_K / 5
    for domain, layer in np.ndindex(2, 3):
        load = COUNTS[domain, layer].tolist()
        here = found.isel(domain=domain, layer=layer)
        np.testing.assert_allclose(here.specialization, [count / TOKENS[domain] for count in load])
        np.testing.assert_allclose(here.utilisation, [count / TOKENS[domain] / TOP_K for count in load])
        for name, of in slow.LOAD.items():
            assert float(here[name]) == pytest.approx(of(load)), name
    for layer in range(3):
        expected = slow.divergence_from_rest(COUNTS[:, layer].tolist())
        np.testing.assert_allclose(found.divergence[:, layer], expected)
        load = [sum(pair) for pair in zip(*COUNTS[:, layer].tolist(), strict=True)]
        for name, of in slow.LOAD.items():
            assert float(found[f"{name}_overall"][layer]) == pytest.approx(of(load)), name


def test_tokens_may_be_one_number_and_layers_are_numbered_as_told(tmp_path):
    counts = random_counts(1, tokens=[30, 30])
    found = routing_from_counts(counts, tokens=30, domains=DOMAINS, top_k=2, layers=(2, 5, 7), model="m")
    assert found.tokens.values.tolist() == [30, 30]
    assert found.layer.values.tolist() == [2, 5, 7]
    assert {"model": "m", "top_k": 2, "tokens": 60}.items() <= results.provenance_of(found).items()
    np.testing.assert_array_equal(found.counts.sel(domain="code", layer=7), counts[1, 2])
    xr.testing.assert_identical(results.load(results.save(found, tmp_path / "counts.nc")), found)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(5)))
def test_permuting_experts_permutes_the_result(seed, order):
    counts = random_counts(seed)
    before = routing_from_counts(counts, tokens=TOKENS, domains=DOMAINS, top_k=TOP_K)
    after = routing_from_counts(counts[:, :, order], tokens=TOKENS, domains=DOMAINS, top_k=TOP_K)
    expected = before.isel(expert=order).assign_coords(expert=before.expert)
    xr.testing.assert_allclose(after, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"counts": COUNTS + 1},
            r"counts of 'prose' at layer 0 do not add up: expected 40 tokens \* top-2 = 80",
        ),
        ({"counts": COUNTS * 0.5}, "not counts: expected whole numbers from 0"),
        ({"counts": -COUNTS}, "not counts: expected whole numbers from 0"),
        ({"counts": np.full(COUNTS.shape, np.nan)}, "not counts"),
        ({"counts": COUNTS[0]}, r"not counts: expected .*\[domain, layer, expert\], got shape \(3, 5\)"),
        ({"counts": [[[1, 2], [3]]]}, "not counts: expected numbers, as many in every row"),
        ({"counts": [[["many"]]]}, "not counts: expected numbers"),
        ({"tokens": [40]}, r"recorded counts do not fit: .* got \(2, 3, 5\), \(1,\)"),
        ({"tokens": [40, 26]}, "counts of 'code' at layer 0 do not add up"),
        ({"domains": ["prose"]}, "recorded counts do not fit"),
        ({"domains": ["prose", "prose"]}, "recorded counts do not fit"),
        ({"layers": [1, 2]}, "recorded counts do not fit"),
        ({"layers": [1, 1, 2]}, "recorded counts do not fit"),
        ({"top_k": 0}, "invalid top_k for routing_from_counts: .* at least 1, got 0"),
        ({"top_k": 6}, "top_k does not fit"),
        ({"top_k": 3}, "do not add up"),
    ],
)
def test_counts_that_cannot_be_right_are_refused(change, said):
    given_ = {"counts": COUNTS, "tokens": TOKENS, "domains": DOMAINS, "top_k": TOP_K} | change
    with pytest.raises(BadInput, match=said):
        routing_from_counts(given_.pop("counts"), **given_)


def test_an_expert_chosen_twice_by_a_token_is_refused():
    counts = np.zeros((1, 1, 4), int)
    counts[0, 0, :2] = 12, 8
    with pytest.raises(BadInput, match="none counted twice, got 20, 12 for one expert"):
        routing_from_counts(counts, tokens=[10], domains=["all"], top_k=2)


# Files: a folder of JSON and CSV, a clone of the authors' repository


def write_json(folder: Path, **change) -> None:
    rows = {d: {str(i + 1): row.tolist() for i, row in enumerate(c)} for d, c in zip(DOMAINS, COUNTS, strict=True)}
    record = {
        "model": "some/model",
        "top_k": TOP_K,
        "tokens": dict(zip(DOMAINS, TOKENS, strict=True)),
        "counts": rows,
    }
    (folder / "some.json").write_text(json.dumps(record | change))


def write_clone(folder: Path, tag: str = "qwen", top_k: int = 4) -> np.ndarray:
    counts = random_counts(2, tokens=[30], layers=2, experts=6, top_k=top_k)
    (folder / "data" / "routing").mkdir(parents=True)
    layers = {number + 1: torch.tensor(row, dtype=torch.float32) for number, row in enumerate(counts[0])}
    torch.save(layers, folder / "data" / "routing" / f"french-qa_expert_data_{tag}.pt")
    return counts


def test_counts_from_json(tmp_path):
    write_json(tmp_path)
    (tmp_path / "else.json").write_text('{"not": "ours"}')
    found = read_counts(tmp_path)["some/model"]
    np.testing.assert_array_equal(found.counts, COUNTS)
    assert found.layer.values.tolist() == [1, 2, 3]
    assert found.domain.values.tolist() == DOMAINS


@pytest.mark.parametrize(
    ("tag", "model", "top_k", "layers"),
    [
        ("base", "deepseek-ai/deepseek-moe-16b-base", 6, [1, 2]),
        ("deepseek-base", "deepseek-ai/deepseek-moe-16b-base", 6, [1, 2]),
        ("qwen", "Qwen/Qwen1.5-MoE-A2.7B", 4, [0, 1]),
    ],
)
def test_counts_from_a_clone_are_numbered_as_the_checkpoint_numbers_them(tmp_path, tag, model, top_k, layers):
    counts = write_clone(tmp_path, tag, top_k)
    found = read_counts(tmp_path)[model]
    np.testing.assert_array_equal(found.counts, counts)
    assert found.layer.values.tolist() == layers
    assert found.domain.values.tolist() == ["french-qa"]
    assert found.tokens.values.tolist() == [30]


class Harmful:
    """Unpickling it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    torch.save({1: Harmful(tmp_path / "ran")}, tmp_path / "french-qa_expert_data_base.pt")
    with pytest.raises(BadData, match="is not opened: expected plain tensors by layer, got a pickle that may run code"):
        read_counts(tmp_path)
    with open(tmp_path / "french-qa_expert_data_base.pt", "wb") as file:
        pickle.dump(Harmful(tmp_path / "ran"), file, protocol=2)
    with pytest.raises(BadData):
        read_counts(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counts": {"prose": {"1": [80, 0]}, "code": {"2": [50, 0]}}}, "recorded counts of some/model"),
        ({"tokens": {"prose": 40}}, "recorded counts of some/model"),
        ({"tokens": {"prose": 41, "code": 25}}, "do not add up"),
        ({"counts": [1, 2]}, "cannot read .*some.json"),
        ({"counts": {"prose": {"first": [1]}}}, "cannot read .*some.json"),
    ],
)
def test_json_that_cannot_be_right_is_refused(tmp_path, change, said):
    write_json(tmp_path, **change)
    with pytest.raises(BadData, match=said):
        read_counts(tmp_path)


def test_files_that_are_not_there_or_not_whole_are_errors(tmp_path):
    for read in (read_counts, read_perplexity):
        with pytest.raises(BadData, match=f"no .* in {re.escape(str(tmp_path))}"):
            read(tmp_path)
    (tmp_path / "broken.json").write_text('{"model": ')
    with pytest.raises(BadData, match=r"cannot read .*broken\.json"):
        read_counts(tmp_path)
    (tmp_path / "broken.json").unlink()
    (tmp_path / "arxiv_expert_data_mixtral.pt").write_bytes(b"")
    with pytest.raises(BadData, match=r"whose counts are .*mixtral\.pt: expected one of base, .*, got mixtral"):
        read_counts(tmp_path)
    (tmp_path / "arxiv_expert_data_mixtral.pt").rename(tmp_path / "arxiv_expert_data_base.pt")
    with pytest.raises(BadData, match="cannot read|is not opened"):
        read_counts(tmp_path)


def write_perplexities(folder: Path, values: np.ndarray, domain: str = "french-qa") -> None:
    for k in range(values.shape[1]):
        with open(folder / f"{domain}_perplexity_top{k + 1}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow([f"{domain}_num", "perplexity"])
            rows.writerows([[i + 1, value] for i, value in enumerate(values[:, k])])


def test_perplexities_of_a_clone_and_of_one_table_are_the_same(tmp_path):
    values = np.random.default_rng(3).uniform(2, 30, size=(5, 3))
    (tmp_path / "clone").mkdir()
    write_perplexities(tmp_path / "clone", values)
    with open(tmp_path / "perplexity_by_top_k.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["domain", "sample", "top_k", "perplexity"])
        rows.writerows([["x", i + 1, k + 1, values[i, k]] for k in (2, 0) for i in reversed(range(5))])
    np.testing.assert_allclose(read_perplexity(tmp_path / "clone")["french-qa"], values)
    found = read_perplexity(tmp_path)["x"]
    np.testing.assert_allclose(found[:, [0, 2]], values[:, [0, 2]])
    assert np.isnan(found[:, 1]).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n,perplexity\n1,2.5\n2,many\n", r"cannot read line 3 of .*top2\.csv"),
        ("n,perplexity\n1\n2,3.0\n", r"cannot read line 2 of .*top2\.csv"),
        ("n,loss\n1,2.5\n2,3.0\n", r"cannot read line 2 of .*top2\.csv: expected perplexity"),
        (
            "n,perplexity\n1,2.5\n",
            "perplexities of x with 2 experts: expected positive ones of the same 2 samples",
        ),
        ("n,perplexity\n1,2.5\n2,-1.0\n", "perplexities of x with 2 experts"),
        ("n,perplexity\n1,2.5\n2,nan\n", "perplexities of x with 2 experts"),
    ],
)
def test_perplexities_that_cannot_be_right_are_refused(tmp_path, text, said):
    (tmp_path / "x_perplexity_top1.csv").write_text("n,perplexity\n1,3.0\n2,4.0\n")
    (tmp_path / "x_perplexity_top2.csv").write_text(text)
    with pytest.raises(BadData, match=said):
        read_perplexity(tmp_path)


def test_ratios_are_paired_and_against_the_largest_k_recorded():
    values = np.random.default_rng(4).lognormal(2, 1, size=(12, 1)) * [2.0, 1.2, 1.0]
    values *= np.random.default_rng(5).lognormal(0, 0.02, size=values.shape)
    short = values[:7, :2]
    found = perplexity_ratios({"long": values, "short": short}, resamples=80, seed=1)
    assert found.reference.values.tolist() == [3, 2]
    assert found.samples.values.tolist() == [12, 7]
    for k in range(3):
        expected = slow.mean_log_ratio(values[:, k].tolist(), values[:, 2].tolist())
        assert float(found.ratio.sel(domain="long", k=k + 1)) == pytest.approx(expected)
        draws = stats.resampling_weights(np.zeros(12, int), 80, 1)
        logs = np.log(values[:, k] / values[:, 2]).tolist()
        ends = slow.bootstrap_interval(logs, [1] * 12, draws, 0.95)
        np.testing.assert_allclose(found.ratio_interval.sel(domain="long", k=k + 1), np.exp(ends))
    assert float(found.ratio.sel(domain="short", k=1)) == pytest.approx(
        slow.mean_log_ratio(short[:, 0].tolist(), short[:, 1].tolist())
    )
    assert np.isnan(found.ratio.sel(domain="short", k=3))
    plain = sum(short[:, 0]) / sum(short[:, 1])
    assert float(found.ratio_as_coded.sel(domain="short", k=1)) == pytest.approx(plain)
    # Samples differ by a factor of e, pairs by 2 %: an interval that ignored the pairs would be far wider.
    low, high = found.ratio_interval.sel(domain="long", k=1).values
    assert high / low < 1.1


def test_cosines_and_denominators_of_a_clone(tmp_path):
    assert read_cosines(tmp_path) == {}
    assert read_denominators(tmp_path) == {}
    for prompt, values in ((1, [0.5, 0.9]), (2, [0.7, 1.0])):
        lines = [f"{layer},0,0,{value}" for layer, value in enumerate(values, start=1)]
        text = "\n".join(["layer,final_vs_top1,final_vs_topk,top1_vs_topk", *lines])
        (tmp_path / f"french-qa_chunked_prompt_{prompt}_cos-sim.csv").write_text(text)
    found = read_cosines(tmp_path)
    assert sorted(found["french-qa"].tolist()) == [[0.5, 0.9], [0.7, 1.0]]
    printed = ["Total tokens in data/french-qa.txt: 850\n", "total_tokens: 850\n", "routed_tokens: 7690.0\n"]
    cells = [
        {"outputs": [{"text": printed}, {"text": ["Total tokens in data/arxiv.txt: 3"]}]},
        {"source": "1"},
    ]
    (tmp_path / "some.ipynb").write_text(json.dumps({"cells": cells}))
    assert read_denominators(tmp_path) == {("french-qa", 7690): 850}
    (tmp_path / "some.ipynb").write_text("{")
    with pytest.raises(BadData, match=r"cannot read .*some\.ipynb: expected a Jupyter notebook"):
        read_denominators(tmp_path)


# The published figures

FOLDER = os.environ.get("MOE_INTERP_RECORDED")
published = pytest.mark.skipif(
    not FOLDER,
    reason="the environment variable MOE_INTERP_RECORDED names no folder with the recorded figures",
)


def example():
    path = Path(__file__).parent.parent / "examples" / "moe_lens.py"
    spec = importlib.util.spec_from_file_location("moe_lens", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@published
@pytest.mark.parametrize(
    ("name", "first", "baseline"), [("base", 1, 0.09375), ("olmoe", 0, 0.125), ("qwen", 0, 4 / 60)]
)
def test_published_counts_against_loops(name, first, baseline):
    record = json.loads((Path(FOLDER) / f"{name}.json").read_text())
    found = read_counts(FOLDER)[record["model"]]
    assert float(found.specialization_baseline) == pytest.approx(baseline)
    for domain, layers in record["counts"].items():
        for layer, load in layers.items():
            here = found.sel(domain=domain, layer=int(layer) - 1 + first)
            np.testing.assert_allclose(here.specialization, [one / record["tokens"][domain] for one in load])
            assert float(here.n50) == slow.coverage(load, 0.5)
            assert float(here.n90) == slow.coverage(load, 0.9)
            assert float(here.gini) == pytest.approx(slow.gini(load))


@published
def test_published_perplexity_ratios_against_loops():
    with open(Path(FOLDER) / "perplexity_by_top_k.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = perplexity_ratios(read_perplexity(FOLDER))
    for domain in found.domain.values:
        own = {
            k: [float(row["perplexity"]) for row in rows if row["domain"] == domain and row["top_k"] == str(k)]
            for k in range(1, 7)
        }
        last = max(k for k, values in own.items() if values)
        assert int(found.reference.sel(domain=domain)) == last == (4 if domain == "gsm8k" else 6)
        for k in range(1, last + 1):
            expected = slow.mean_log_ratio(own[k], own[last])
            assert float(found.ratio.sel(domain=domain, k=k)) == pytest.approx(expected)
    rounded = {d: round(float(found.ratio.sel(domain=d, k=1)), 2) for d in found.domain.values if d != "gsm8k"}
    assert rounded == {
        "english": 1.38,
        "github": 1.32,
        "arxiv-title-abs": 1.62,
        "aime-math": 1.64,
        "chinese": 1.69,
        "french-qa": 2.16,
    }
    assert (found.ratio_interval.sel(bound="low", k=1) > 1.05).all()


@published
def test_every_published_claim_gets_its_verdict():
    module = example()
    recorded = module.Recorded.read(Path(FOLDER))
    verdicts = {claim.said: claim.verdict for claim in module.claims(recorded)}
    starts = {
        "very few experts": "does not hold",
        "OLMoE alike": "does not hold",
        "Qwen1.5-MoE alike": "does not hold",
        "top-1 against the ensemble": "cannot be told",
        "perplexity increases by only 5 %": "does not hold",
        "layer 23 on arXiv": "does not hold",
        "layer 17 on French-QA": "holds",
        "layer 22 on GSM8K": "does not hold",
        "OLMoE-1B-7B-0924: French-QA": "holds",
        "Qwen1.5-MoE-A2.7B: French-QA": "does not hold",
        "uniform baselines": "holds",
    }
    assert len(verdicts) == len(starts)
    for said, verdict in verdicts.items():
        assert [expected for start, expected in starts.items() if said.startswith(start)] == [verdict], said


@published
def test_the_example_prints_its_tables():
    console = Console(width=200, record=True, file=io.StringIO())
    example().show_recorded(console, Path(FOLDER))
    text = console.export_text()
    for expected in (
        "2.164",
        "[2.133, 2.194]",
        "58.8%",
        "not recorded",
        "deepseek-moe-16b-base",
        "uniform router",
    ):
        assert expected in text


def test_the_example_says_what_a_folder_lacks(tmp_path):
    write_json(tmp_path)
    with pytest.raises(BadData, match="has not all of MoE-Lens: expected deepseek-ai/deepseek-moe-16b-base on arxiv"):
        example().Recorded.read(tmp_path)
