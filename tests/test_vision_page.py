"""The page of figures and the tables of the example: the numbers shown are those of the results."""

import re
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import t as student

from examples import vision_moe as example
from moe_interp.analyses.class_routing import class_covariance
from moe_interp.errors import BadOutput
from moe_interp.views import specialists as views
from moe_interp.zoo import vision_paper as paper
from moe_interp.zoo.vision import Plan
from moe_interp.zoo.vision_images import CIFAR10, VEHICLES, read_images
from moe_interp.zoo.vision_study import Study, findings, run_study
from tests.reference import vision as slow

STUDY = Study("tiny", experts=(2, 3), trials=2, plan=Plan(width=8, neurons=8, epochs=1, batch=32))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pytest.importorskip("sklearn")
    images = read_images("digits", train=96, test=60)
    images = replace(images, classes=("<b>zero</b>", *images.classes[1:]))
    found = run_study(STUDY, images, tmp_path_factory.mktemp("study"), quiet=True)
    return findings(found, images), found, images


def test_bars_are_accuracies_with_their_intervals(study):
    result = study[0].accuracies
    bars = {trace.name: trace for trace in views.accuracies(result).data}
    assert set(bars) == {*result["condition"].values, "chance"}
    for name in result["condition"].values:
        at = result.sel(condition=name)
        assert np.allclose(bars[name].y, 100 * at["accuracy"])
        low, high = 100 * at["accuracy_interval"].values
        assert np.allclose(bars[name].y + bars[name].error_y.array, high)
        assert np.allclose(bars[name].y - bars[name].error_y.arrayminus, low)
    assert np.allclose(bars["chance"].y, 10)


def test_tables_and_matrices_show_their_values(study):
    routed, short = study[0].routing[3], study[0].short_routing[3]
    (table,) = views.class_table(routed).data
    assert np.allclose(table.z, 100 * routed["share"])
    assert table.colorscale[1][0] == pytest.approx(1 / 3)  # white is an even share
    assert table.y[0] == "&lt;b&gt;zero&lt;/b&gt;"
    left, right = views.correlations(routed).data
    assert np.array_equal(left.z, routed["correlation"].values, equal_nan=True)
    assert np.array_equal(right.z, routed["correlation_excess"].values, equal_nan=True)
    left, right = views.covariances(routed, short).data
    assert np.allclose(left.z, routed["covariance"]) and np.allclose(right.z, short["covariance"])
    assert left.zmax == right.zmax == -left.zmin  # one scale


def test_depth_and_probes_show_their_values(study):
    results = study[0]
    bars = [trace for trace in views.depth(results.depth).data if trace.type == "bar"]
    expected = [
        [float(one[name].sel(trunk=trunk)) for one in results.depth.values()]
        for name in ("covariance", "information")
        for trunk in ("base", "short")
    ]
    assert np.allclose([trace.y for trace in bars], expected)
    first = [trace for trace in views.probed(results.probed).data if trace.type == "bar"][:4]
    base = [one.sel(trunk="base") for one in results.probed.values()]
    assert np.allclose(first[0].y, [float(one["information"][0]) for one in base])
    assert np.allclose(first[3].y, [float(one["routed"]) for one in base])


def test_samples_are_pictures_of_their_expert():
    pictures = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.full((1, 3, 4, 4), 10, np.uint8)
    experts = np.array([0, 1, 0, 1, 0, 1])
    canvas = np.asarray(views.samples(pictures, experts, 2, each=4).data[0].z)
    assert canvas.shape == (12, 24, 3)
    rows = [{int(canvas[6 * expert, 6 * column, 0]) for column in range(4)} for expert in range(2)]
    assert rows == [{0, 20, 40, 255}, {10, 30, 50, 255}]


def test_the_page_is_whole_escaped_and_says_which_study_it_is(study, tmp_path):
    results = study[0]
    text = views.page(results, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The tiny study on digits" in text and "2 trials each, 96 training and 60 test images" in text
    assert "<b>zero</b>" not in text
    outside_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "://" not in outside_scripts and "default-src 'none'" in text
    for count in (2, 3):
        for name in ("table", "correlation", "covariance", "samples"):
            assert f'id="{name}-{count}"' in text
    probe = results.probed[2].isel(trunk=0)
    assert f"{100 * float(probe['used_least']):.0f} to {100 * float(probe['used_most']):.0f} %" in text
    with pytest.raises(BadOutput, match="cannot write"):
        views.page(results, tmp_path / "none" / "page.html")


def test_cells_are_judged_by_side_and_by_interval(study):
    routed = study[0].routing[2].copy(deep=True)
    routed["share"].values[:] = np.stack([np.linspace(0.1, 0.9, 10), np.linspace(0.9, 0.1, 10)], axis=1)
    routed["share_interval"].values[:] = routed["share"].values + np.array([-0.05, 0.05])[:, None, None]
    published = [[100 * value] for value in np.linspace(0.1, 0.9, 10)]
    published[0], published[1] = [13.0], [70.0]  # in the interval; on the other side
    table = example.class_table(2, routed, published)
    assert table.rows[0][1] == "10.0 [5.0, 15.0] | 13.0 ✓*"
    assert table.rows[1][1].endswith("| 70.0 ✗") and table.rows[1][2].endswith("| 30.0 ✗")
    assert "18 of 20 cells ✓, 18 *" in table.note
    swapped = routed.isel(expert=[1, 0])
    assert example.class_table(2, swapped, published).rows == table.rows


def test_a_table_that_is_the_published_one_beats_permuted_classes_and_one_without_classes_does_not(study):
    routed = study[0].routing[3].isel(expert=[2, 0, 1]).copy(deep=True)
    routed["share"].values[:] = np.array(paper.THREE)[:, [1, 2, 0]] / 100
    cells = paper.compare(routed, paper.THREE)
    assert np.allclose(cells.ours, paper.THREE) and cells.same.all()
    assert cells.p(cells.null) == 1 / (1 + paper.PERMUTATIONS) and "correlation 1.00" in cells.said()
    shuffled = np.random.default_rng(0).permutation(paper.THREE)
    routed["share"].values[:] = shuffled / 100
    other = paper.compare(routed, paper.THREE)
    draws = [np.random.default_rng(1000 + seed).permutation(shuffled) for seed in range(300)]
    best = [
        max(np.corrcoef(table[:, order].ravel(), np.ravel(paper.THREE))[0, 1] for order in permutations(range(3)))
        for table in (shuffled, *draws)
    ]
    p = other.p(other.null)
    assert p == pytest.approx(np.mean(np.array(best[1:]) >= best[0]), abs=0.1) and p > 0.05


def test_a_table_that_only_parts_vehicles_from_animals_says_nothing_beyond(study):
    routed = study[0].routing[3].isel({"class": slice(0, 10)}).copy(deep=True)
    routed = routed.assign_coords({"class": list(CIFAR10)})
    vehicle = np.isin(CIFAR10, VEHICLES)
    routed["share"].values[:] = np.where(vehicle[:, None], [0.9, 0.07, 0.03], [0.1, 0.45, 0.45])
    split = paper.compare(routed, paper.THREE)
    assert split.p(split.null) < 0.05 and split.p(split.within) > 0.5
    routed["share"].values[:] = np.array(paper.THREE) / 100
    same = paper.compare(routed, paper.THREE)
    assert same.p(same.within) < 0.01


def made_up(study, **changes):
    """The study's results with 2, 3 and 5 experts, so that every claim is judged."""
    results = study[0]
    three = {2: results.routing[2], 3: results.routing[3], 5: results.routing[3]}
    three = {count: one.assign_coords({"class": list(CIFAR10)}) for count, one in three.items()}
    depth = {2: results.depth[2], 3: results.depth[3], 5: results.depth[3]}
    for count, values in changes.get("routing", {}).items():
        three[count] = three[count].copy(deep=True)
        for name, value in values.items():
            three[count][name].values[...] = value
    for name, ends in changes.get("depth", {}).items():
        depth = {count: one.copy(deep=True) for count, one in depth.items()}
        for one in depth.values():
            one[f"{name}_difference_interval"].values[:, -1] = ends
    accuracies = xr.concat([results.accuracies.isel(experts=[at]) for at in (0, 1, 1)], "experts", data_vars="minimal")
    accuracies = accuracies.assign_coords(experts=[2, 3, 5]).copy(deep=True)
    for (name, condition), value in changes.get("accuracies", {}).items():
        accuracies[name].loc[{"condition": condition}] = value
    return replace(results, routing=three, depth=depth, accuracies=accuracies)


def verdicts(results) -> dict[str, str]:
    return {claim: verdict for claim, verdict, _ in paper.claims(results)}


def ends(*middles: float, half: float = 0.001) -> np.ndarray:
    return np.array([[-half], [half]]) + np.array(middles)


def table_one(learned: np.ndarray, gaps: np.ndarray, noise: float = 0.0) -> dict:
    """Accuracies of three trials at 2, 3, 5 experts, with random routing so much worse in both readings."""
    spread = noise * np.array([[-1.0, 0.0, 1.0], [1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])[:, :TRIALS]
    found = {("accuracy_trials", "learned"): np.zeros((3, TRIALS)), ("accuracy_interval", "learned"): ends(*learned)}
    for condition in ("random", "trained at random"):
        found |= {
            ("accuracy_trials", condition): -gaps[:, None] + spread,
            ("gap", condition): gaps,
            ("gap_interval", condition): ends(*gaps, half=0.001 + 3 * noise),
        }
    return found


TRIALS = STUDY.trials
DIVIDED = {name: "fgh"[number] for number, names in enumerate(paper.ANIMALS) for name in names}


def animals(apart: bool) -> np.ndarray:
    """Trials [trial, class, expert] in which the two groups of animals have an expert each, or share both."""
    table = np.full((10, 3), 1 / 3)
    for number, name in enumerate(CIFAR10):
        first = DIVIDED.get(name, "v") == "f"
        if name in VEHICLES:
            table[number] = [1, 0, 0]
        elif apart:
            table[number] = [0, 1, 0] if first else [0, 0, 1]
        else:  # across the groups, not along them
            table[number] = [0, 1, 0] if name in ("bird", "cat", "deer") else [0, 0, 1]
    return np.stack([table] * TRIALS)


def test_every_claim_can_come_out_either_way(study):
    vehicle = np.isin(CIFAR10, VEHICLES)
    together = np.where(vehicle[:, None] == vehicle, 0.9, -0.9)
    broken = np.where(np.outer(vehicle, vehicle), 0.9, 0.1)
    published = np.hstack([paper.TWO, 100 - np.array(paper.TWO)]) / 100
    three = np.array(paper.THREE) / 100
    learned, random = np.array(list(paper.ACCURACY.values())).T / 100
    depths = ("covariance", "covariance_excess", "information")
    shuffled = np.random.default_rng(0).permutation(10)
    yes = made_up(
        study,
        routing={
            2: {"silhouette_p": 0.01, "share": published, "covariance": class_covariance(published[None])[0]},
            3: {"share": three, "share_trials": animals(apart=True), "covariance": class_covariance(three[None])[0]},
            5: {"correlation": broken},
        },
        depth={name: [-0.2, -0.1] for name in depths},
        accuracies=table_one(learned, learned - random) | {("accuracy", "fresh"): 0.12},
    )
    no = made_up(
        study,
        routing={
            2: {"silhouette_p": 0.5, "share": published[shuffled], "covariance": class_covariance(published[None])[0][
                np.ix_(shuffled, shuffled)]},
            3: {"share": three[shuffled], "share_trials": animals(apart=False),
                "covariance": class_covariance(three[None])[0][np.ix_(shuffled, shuffled)]},
            5: {"correlation": together},
        },
        depth={name: [0.1, 0.2] for name in depths},
        accuracies=table_one(learned - 0.1, np.array([-0.02, -0.01, 0.0]) - 0.01) | {("accuracy", "fresh"): 0.14},
    )  # fmt: skip
    unknown = made_up(
        study,
        routing={2: {"silhouette_p": np.nan}, 5: {"correlation": np.nan}},
        depth={name: [-0.1, 0.2] for name in depths},
        accuracies=table_one(learned, learned - random, noise=0.05),
    )
    good, bad, open_ = (verdicts(results) for results in (yes, no, unknown))
    assert len(good) == 20
    for claim in good:
        assert (good[claim], bad[claim]) == (paper.YES, paper.NO), claim
        if "costs accuracy" in claim or "the less the more" in claim or ("Figure" in claim and "three" not in claim):
            assert open_[claim] == paper.UNKNOWN, claim
    some = made_up(study, accuracies=table_one(learned - [0, 0.1, 0], (learned - random) + [0, 0.1, 0]))
    assert [verdict for claim, verdict in verdicts(some).items() if "in our intervals" in claim] == 3 * [paper.PART]


def test_whether_animals_divide_is_said_with_its_spread_over_trials(study):
    result = made_up(study).routing[3]
    tables = np.concatenate([animals(apart=True), animals(apart=False), animals(apart=True)])
    tables = tables + 0.05 * np.random.default_rng(0).normal(size=tables.shape)
    result = result.drop_dims("trial").assign(share_trials=(("trial", "class", "expert"), tables))
    groups = [[CIFAR10.index(name) for name in group] for group in paper.ANIMALS]

    def difference(kept):
        values = [[slow.correlation(tables[kept].tolist(), a, b) for b in range(10)] for a in range(10)]
        within = [np.mean([values[a][b] for a in group for b in group if a != b]) for group in groups]
        return min(within) - np.mean([values[a][b] for a in groups[0] for b in groups[1]])

    count = len(tables)
    every = np.arange(count)
    pseudo = [count * difference(every) - (count - 1) * difference(np.delete(every, one)) for one in every]
    mean, half = np.mean(pseudo), student.ppf(0.975, count - 1) * np.std(pseudo, ddof=1) / np.sqrt(count)
    assert np.allclose(paper.animals_divide(result), [mean - half, mean + half])


def test_which_classes_go_together_needs_no_numbers_of_experts(study):
    result = made_up(study).routing[3].copy(deep=True)
    shares = np.array(paper.THREE)[:, [2, 0, 1]] / 100
    result["covariance"].values[:] = class_covariance(shares[None])[0]
    correlation, p = paper.relations(result, paper.THREE)
    assert correlation == pytest.approx(1.0) and p == 1 / (1 + paper.PERMUTATIONS)
    vehicle = np.isin(CIFAR10, VEHICLES)
    only_groups = np.where(vehicle[:, None], [0.9, 0.05, 0.05], [0.1, 0.45, 0.45])
    result["covariance"].values[:] = class_covariance(only_groups[None])[0]
    correlation, p = paper.relations(result, paper.THREE)
    assert correlation > 0.5 and p == 1.0  # that vehicles part from animals says nothing beyond


def test_tables_go_after_the_mark_and_the_head_stays(study, tmp_path):
    results, found, _ = study
    every = example.tables(results, found)
    path = tmp_path / "page.md"
    path.write_text(f"# Head\n\n{example.MARK}\nold tables", encoding="utf-8")
    example.write_markdown(path, every)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Head\n") and "old tables" not in text and text.count(example.MARK) == 1
    accuracy = 100 * float(results.accuracies["accuracy"].sel(experts=3, condition="learned"))
    assert f"| 3 | {accuracy:.1f} [" in text
    example.write_markdown(path, every)
    assert path.read_text(encoding="utf-8") == text


def test_one_trial_of_two_experts_an_image_has_a_page_and_tables(study, tmp_path):
    images = study[2]
    one = replace(STUDY, experts=(3,), trials=1, plan=replace(STUDY.plan, top_k=2))
    found = run_study(one, images, tmp_path / "study", quiet=True)
    results = findings(found, images)
    text = views.page(results, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a mixture of 3 experts (K = 2)" in text and "1 trials each" in text
    assert np.allclose(results.routing[3]["share"].sum("expert"), 1)
    every = example.tables(results, found)
    assert "[nan, nan]" in example.markdown(every[0])
