"""The example that holds published claims to figures: each verdict on figures that settle it, and the whole of it.

The recorded figures are not part of the repository; the environment variable MOE_INTERP_RECORDED names their folder.
"""

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xarray as xr

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = os.environ.get("MOE_INTERP_RECORDED")
published = pytest.mark.skipif(
    not FOLDER,
    reason="the environment variable MOE_INTERP_RECORDED names no folder with the recorded figures",
)


@cache
def example() -> ModuleType:
    """The script as a module; it imports the one beside it."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("published_claims", EXAMPLES / "published_claims.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["published_claims"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def dataset(coords: dict | None = None, **values) -> xr.Dataset:
    """Variables as (dims, values)."""
    variables = {name: ((), one) if np.isscalar(one) else one for name, one in values.items()}
    bounded = any("bound" in dims for dims, _ in variables.values())
    return xr.Dataset(variables, (coords or {}) | ({"bound": ["low", "high"]} if bounded else {}))


def ends(low, high, dim: str = "layer"):
    return ("bound", dim), np.array([low, high], float)


@pytest.mark.parametrize(
    ("low", "high", "below", "verdict"),
    [
        (0.7, 0.9, False, "holds"),
        (0.69, 0.9, False, "cannot be told"),
        (0.5, 0.69, False, "does not hold"),
        (1.0, 1.05, True, "holds"),
        (1.0, 1.06, True, "cannot be told"),
        (1.06, 1.2, True, "does not hold"),
    ],
)
def test_all_of_an_interval_decides(low, high, below, verdict):
    assert example().judged(low, high, 0.7 if not below else 1.05, below=below) == verdict


# One verdict after the other


def loads(n50, baseline=2 / 8):
    return dataset(
        specialization_baseline=baseline,
        n50_debiased=(("domain", "layer"), np.array(n50, float)),
        n50_uniform=(("domain",), [4.0, 4.0]),
        specialization=(("domain", "layer", "expert"), np.full((2, 2, 8), baseline)),
    )


def best(low, high, share=0.75):
    shares = np.full((2, 2, 8), 0.1)
    shares[1, 0, 5] = share
    p = np.full((2, 2, 8), 0.5)
    p[1, 0, 5] = 0.002
    interval = np.broadcast_to(np.array([low, high])[:, None, None, None], (2, 2, 2, 8))
    dims = ("domain", "layer", "expert")
    return dataset(
        {"domain": ["prose", "code"], "layer": [3, 4], "expert": np.arange(8)},
        specialization_baseline=0.25,
        specialization=(dims, shares),
        specialization_p=(dims, p),
        specialization_interval=(("bound", *dims), interval),
    )


def cosines(low, high):
    """Layers 0 and 1; the lowest decides."""
    dims = ("residual", "shared", "candidate", "layer")
    values = np.zeros((2, 2, 2, 2))
    values[1, 0] = [[0.99, 0.97], [0.9, 0.8]]
    values[0, 0, 0] = [0.5, 0.6]
    interval = np.zeros((2, *values.shape))
    interval[:, 1, 0, 0] = [[0.98, low], [0.995, high]]
    coords = {
        "residual": ["without", "with"], "shared": ["without", "with"], "candidate": ["heaviest", "none"],
    }  # fmt: skip
    return dataset(coords, cosine_overall=(dims, values), cosine_overall_interval=(("bound", *dims), interval))


def perplexities(low, high):
    return dataset(
        {"aggregate": ["token", "document"], "k": [1, 6], "domain": ["prose", "code"]},
        ratio=(("aggregate", "k", "domain"), np.array([[[9, 9], [1, 1]], [[1.1, 1.3], [1, 1]]], float)),
        ratio_overall=(("aggregate", "k"), np.array([[9, 1], [1.2, 1]], float)),
        ratio_overall_interval=(("aggregate", "k", "bound"), np.array([[[9, 9], [1, 1]], [[low, high], [1, 1]]])),
        ratio_random_overall=(("aggregate", "k"), np.full((2, 2), 1.5)),
        ratio_none_overall=(("aggregate",), [2.0, 2.0]),
    )


def gains(low, high):
    one = (("layer",), [0.4, 0.5])
    return dataset(specialization=one, gain=one, specialization_null=one, gain_interval=ends(low, high))


def identities(p):
    dims = ("domain", "layer", "expert")
    return dataset(
        gain_p=(dims, np.array(p)[..., None] * np.ones(3)),
        overlap=(("layer",), [0.4, 0.6]),
        overlap_interval=ends([0.3, 0.5], [0.5, 0.7]),
        overlap_load=(("layer",), [0.1, 0.2]),
    )


def pairs(first, second):
    """Smallest p of two layers, each of two experts."""
    p = np.full((2, 2, 2), np.nan)
    p[:, 0, 1] = p[:, 1, 0] = first, second
    dims = ("layer", "expert", "other")
    return dataset(
        lift_p=(dims, p),
        coactivation=(dims, np.full((2, 2, 2), 0.5)),
        coactivation_as_coded=(dims, np.full((2, 2, 2), 0.25)),
        coactivation_uniform=0.1,
    )


def saturations(low, high):
    """At the second of four checkpoints; the first layer's interval is [0.7, 0.8]."""
    values = np.linspace(0.1, 1, 8).reshape(4, 2)
    interval = np.zeros((2, 4, 2))
    interval[:, 1] = [[0.7, low], [0.8, high]]
    dims = ("step", "layer")
    return dataset(
        {"step": [36, 180, 1000, 5000]},
        saturation=(dims, values),
        saturation_interval=(("bound", *dims), interval),
        independent=(dims, values / 2),
    )


def correlations(low, high):
    one = (("layer",), [0.1, 0.2])
    return dataset(
        rank_correlation=one, rank_correlation_shuffled=one, rank_correlation_interval=ends(low, high)
    )  # fmt: skip


def outliers(count):
    flags = np.zeros((2, 4), bool)
    flags[0, :count] = True
    return dataset(
        super=(("layer", "expert"), flags),
        ratio=(("super_expert",), [1.25] * count),
        largest=(("layer", "expert"), np.arange(8.0).reshape(2, 4)),
        threshold=99.0,
    )


def constancy(shared):
    one = (("layer",), [1.1, 1.2])
    return dataset(
        constancy_shared=(("layer",), shared),
        constancy_routed=(("layer",), [0.2, 0.2]),
        ratio_without_shared=one,
        ratio_without_routed=one,
        ratio_without_shared_interval=ends([1.05, 1.15], [1.2, 1.3]),
    )


HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"
CASES = [
    ("few_experts", loads([[1, 2], [2, 3]]), HOLDS, "1.0 to 3.0 experts (bias removed), median 2.0; 2 or fewer in 3"),
    ("few_experts", loads([[1, 2], [3, 3]]), FAILS, "2 or fewer in 2 of 4"),  # most means more than half
    ("one_expert_stands_out", best(0.71, 0.8), HOLDS, "code, layer 3, expert 5: 75.0% [71.0%, 80.0%], p = 0.002"),
    ("one_expert_stands_out", best(0.6, 0.8), UNKNOWN, "[60.0%, 80.0%]"),
    ("one_expert_stands_out", best(0.5, 0.69, share=0.6), FAILS, "60.0%"),
    ("cosine", cosines(0.96, 0.98), HOLDS, "0.970 to 0.990 by layer, with the residual; the experts' contrib"),
    ("cosine", cosines(0.94, 0.98), UNKNOWN, "0.970 to 0.990"),
    ("cosine", cosines(0.90, 0.94), FAILS, "0.970 to 0.990"),
    ("five_percent", perplexities(1.0, 1.04), HOLDS, "top-1 / top-6: 1.200 [1.000, 1.040]; most in code: 1.300"),
    ("five_percent", perplexities(1.0, 1.1), UNKNOWN, "[1.000, 1.100]"),
    ("five_percent", perplexities(1.06, 1.1), FAILS, "[1.060, 1.100]"),
    ("baseline", loads([[1, 2], [2, 3]], 6 / 64), HOLDS, "9.375%, and 9.375% is the mean"),
    ("baseline", loads([[1, 2], [2, 3]], 8 / 64), FAILS, "12.500%"),
    ("vocabulary", gains([0.1, 0.2], [0.3, 0.4]), HOLDS, "null by 0.40 to 0.50 (lowest interval [0.10, 0.30])"),
    ("vocabulary", gains([0.1, -0.1], [0.3, 0.4]), UNKNOWN, "(lowest interval [-0.10, 0.40])"),
    ("vocabulary", gains([0.1, -0.2], [0.3, -0.1]), FAILS, "(lowest interval [-0.20, -0.10])"),
    ("token", identities([[0.01, 0.05], [0.2, 0.01]]), HOLDS, "in 75% of domain-layers"),
    ("token", identities([[0.01, 0.05], [0.2, 0.1]]), UNKNOWN, "in 50% of domain-layers"),
    ("pairs", pairs(0.01, 0.05), HOLDS, "some in 2 of 2 layers; the largest co-activation is 50%, 25% as OLMoE"),
    ("pairs", pairs(0.01, 0.06), UNKNOWN, "50% of pairs go together more than their loads make them (p <="),
    ("saturation", saturations(0.61, 0.7), HOLDS, "36% to 49% by layer at step 180, 61% to 74% at step 1,000"),
    ("saturation", saturations(0.5, 0.7), UNKNOWN, "36% to 49%"),
    ("saturation", saturations(0.5, 0.59), FAILS, "36% to 49%"),
    ("norms", correlations([0.1, 0.1], [0.2, 0.2]), HOLDS, "0.10 to 0.20 by layer (lowest end of an interval 0.10)"),
    ("norms", correlations([0.1, -0.1], [0.2, 0.2]), UNKNOWN, "(lowest end of an interval -0.10)"),
    ("norms", correlations([-0.3, -0.2], [-0.1, -0.1]), FAILS, "(lowest end of an interval -0.30)"),
    ("supers", outliers(2), HOLDS, "largest value by layer: 3, 7; without the first perplexity is × 1.250"),
    ("supers", outliers(0), FAILS, "largest value by layer: 3, 7"),
    ("shared", constancy([0.3, 0.21]), HOLDS, "× 1.100 to 1.200 (lowest end of an interval 1.050)"),
    ("shared", constancy([0.3, 0.19]), FAILS, "19% to 30%"),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "figures", "verdict", "told"), CASES, ids=[f"{one[0]}-{one[2]}" for one in CASES])
def test_a_claim_gets_the_verdict_that_its_figures_settle(claim, figures, verdict, told):
    found = getattr(example(), claim)(figures)
    assert found.verdict == verdict
    assert told in found.figures
    assert found.on == "reference model"
    assert found.control


def test_the_page_is_a_table_whatever_is_in_its_cells():
    one = example().Verdict("a | b", "here", HOLDS, "5 | 6", "7")
    *_, head, rule, row = example().page([one]).rstrip("\n").split("\n")
    assert head == "| claim | on | verdict | figures | control |"
    assert rule == "|---|---|---|---|---|"
    assert row == "| a \\| b | here | **holds** | 5 \\| 6 | 7 |"


@published
def test_every_recorded_claim_has_its_verdict_in_the_page():
    verdicts = example().on_recorded(Path(FOLDER))
    page = (EXAMPLES.parent / "docs" / "claims.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if "| recorded figures |" in line]
    assert rows == example().page(verdicts).splitlines()[-len(verdicts) :]


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "published_claims.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "MOE_INTERP_RECORDED"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.slow
def test_the_example_tests_every_claim_on_the_reference_model(tmp_path):
    done = run("--documents", "2", "--markdown", "claims.md", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "claims.md").read_text(encoding="utf-8")
    rows = [line for line in written.splitlines() if "| reference model |" in line]
    kept = (EXAMPLES.parent / "docs" / "claims.md").read_text(encoding="utf-8")
    assert [row.split(" |")[0] for row in rows] == [
        line.split(" |")[0] for line in kept.splitlines() if "| reference model |" in line
    ]
    # What the number of documents does not change: the bundled training, and K/E.
    for start in ("| routing is settled early", "| a uniform router"):
        (mine,), (other,) = ([line for line in text.splitlines() if line.startswith(start)] for text in (written, kept))
        assert mine == other
    assert "Published claims" in done.stdout


def test_a_folder_without_figures_is_an_error_without_a_traceback(tmp_path):
    done = run("--recorded", "nowhere", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("published_claims.py: ")
    assert "Traceback" not in done.stderr
