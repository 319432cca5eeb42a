"""The tables of docs/results.md: every public analysis is there, with variables, dims and units that its result has."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_type_hints

import numpy as np
import pytest
import xarray as xr

import moe_interp as moe
from moe_interp.analyses.collect import collect
from moe_interp.analyses.routing import RoutingCounts
from tests.stub_tokenizer import StubTokenizer
from tests.test_analyses_on_types import ANALYSES, CORPUS
from tests.tiny_types import build

PAGE = (Path(__file__).parent.parent / "docs" / "results.md").read_text("utf-8")


def health(model: moe.MoEModel) -> xr.Dataset:
    sums = RoutingCounts.empty(len(CORPUS), model.layers, model.spec.num_experts, model.spec.top_k)
    collect(model, CORPUS, {"routing": sums})
    return moe.routing_health(sums)


COUNTS = np.full((1, 1, 4), 2)
RUNS: dict[str, Callable[[moe.MoEModel], xr.Dataset]] = {
    "activation_patching": ANALYSES["experts"],
    "attribution_patching": ANALYSES["attribution patching"],
    "causal_trace": ANALYSES["trace"],
    "coactivation": ANALYSES["coactivation"],
    "coalitions": ANALYSES["coalitions"],
    "ensemble_similarity": ANALYSES["ensemble"],
    "expert_effects": ANALYSES["effects"],
    "expert_lens": ANALYSES["lens"],
    "expert_profiles": lambda model: moe.expert_profiles(model, CORPUS, resamples=5),
    "expert_similarity": ANALYSES["weights"],
    "logit_attribution": ANALYSES["attribution"],
    "mean_contributions": lambda model: moe.mean_contributions(model, CORPUS).dataset,
    "neuron_lens": ANALYSES["neurons"],
    "norm_and_weight": ANALYSES["norms"],
    "path_patching": ANALYSES["paths to experts"],
    "perplexity": ANALYSES["perplexity"],
    "reference_saturation": lambda model: moe.reference_saturation(resamples=5),
    "router_saturation": lambda model: moe.router_saturation([model, model], CORPUS, resamples=5),
    "routing": ANALYSES["routing"],
    "routing_by_label": lambda model: moe.routing_by_label(model, CORPUS, "punctuation", resamples=5),
    "routing_from_counts": lambda model: moe.routing_from_counts(COUNTS, tokens=4, domains=["a"], top_k=2),
    "routing_health": health,
    "routing_map": ANALYSES["map"],
    "score_audit": ANALYSES["audit"],
    "shared_experts": ANALYSES["shared"],
    "super_experts": ANALYSES["super"],
    "token_identity": lambda model: moe.token_identity(model, CORPUS, at_least=1, folds=2, resamples=5),
    "transitions": ANALYSES["transitions"],
    "tuned_lens_quality": lambda model: moe.tuned_lens_quality(model, moe.TunedLens.zeros(model), CORPUS, resamples=5),
    "vocabulary_specialization": lambda model: moe.vocabulary_specialization(model, CORPUS, at_least=2),
}

METRIC = {"activation_patching", "attribution_patching", "coalitions", "expert_effects", "path_patching"}


class Row(NamedTuple):
    """What the page says of one analysis: its main variables with dims and units, and names of controls."""

    variables: dict[str, tuple[tuple[str, ...], str]]
    controls: set[str]


def rows(page: str) -> dict[str, Row]:
    found = {}
    for line in re.findall(r"^\| `moe\..*\|$", page, re.MULTILINE):
        call, variables, _, controls, _ = (cell.strip() for cell in line.strip("|").split(" | ", 4))
        listed = {name: described(inside) for name, inside in re.findall(r"`(\w+)` \(([^)]*)\)", variables)}
        assert re.sub(r"`\w+` \([^)]*\)(, )?", "", variables) == "", variables
        name = call.removeprefix("`moe.").partition("(")[0]
        found[name] = Row(listed, set(re.findall(r"`(\w+)`", controls)))
    return found


def described(inside: str) -> tuple[tuple[str, ...], str]:
    dims, _, units = inside.partition("; ")
    return tuple(dims.split(", ")) if dims else (), units or "1"


@pytest.fixture(scope="module")
def results() -> dict[str, xr.Dataset]:
    """Of one tiny model that has shared experts, a dense layer and a plain residual."""
    with moe.wrap(build("deepseek_v3"), StubTokenizer()) as model:
        return {name: run(model) for name, run in RUNS.items()}


def public_analyses() -> set[str]:
    functions = {name: getattr(moe, name) for name in moe.__all__ if inspect.isfunction(getattr(moe, name))}
    return {name for name, function in functions.items() if get_type_hints(function).get("return") is xr.Dataset}


def test_every_public_analysis_is_in_the_tables_and_nothing_else():
    assert set(rows(PAGE)) == public_analyses() | {"mean_contributions"} == set(RUNS)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_row_names_variables_that_the_result_has(results, name):
    result, row = results[name], rows(PAGE)[name]
    assert row.variables
    for variable, (dims, units) in row.variables.items():
        assert variable in result.data_vars, variable
        assert result[variable].dims == dims, variable
        assert result[variable].attrs["units"] == units or (name in METRIC and units == "of the metric"), variable
    known = {str(one) for one in result.data_vars} | {str(one) for dim in result.indexes.values() for one in dim}
    assert row.controls <= known, row.controls - known


def test_the_page_says_for_which_analyses_special_tokens_count_unless_asked():
    said = {}
    for line in re.findall(r"^\| (?:left out|counted).*$", PAGE, re.MULTILINE):
        case, names = line.removeprefix("| ").split(" | ")
        said[case] = set(re.findall(r"`(\w+)`", names))
    by_default: dict[bool, set[str]] = {True: set(), False: set()}
    for name in RUNS:
        given = inspect.signature(getattr(moe, name)).parameters.get("special_tokens")
        if given is not None:
            by_default[given.default].add(name)
    assert by_default[False] == said["left out; counted with `special_tokens=True`"]
    assert by_default[True] == said["counted; left out with `special_tokens=False`"]
