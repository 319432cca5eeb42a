"""The page of figures and the tables of the example: the numbers shown are those of the results."""

import re
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from examples import vision_moe as example
from moe_interp.errors import BadOutput
from moe_interp.views import specialists as views
from moe_interp.zoo.vision import Plan
from moe_interp.zoo.vision_images import CIFAR10, VEHICLES, read_images
from moe_interp.zoo.vision_study import Study, findings, run_study

STUDY = Study("tiny", experts=(2, 3), trials=2, plan=Plan(width=8, neurons=8, epochs=1, batch=32))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pytest.importorskip("sklearn")
    images = read_images("digits", train=96, test=60)
    images = replace(images, classes=("<b>zero</b>", *images.classes[1:]))
    found = run_study(STUDY, images, tmp_path_factory.mktemp("study"), quiet=True)
    return findings(STUDY, found, images), found, images


def test_bars_are_accuracies_with_their_intervals(study):
    result = study[0].accuracies
    bars = {trace.name: trace for trace in views.accuracies(result).data}
    assert set(bars) == {*result["condition"].values, "chance"}
    for name in result["condition"].values:
        at = result.sel(condition=name)
        assert np.allclose(bars[name].y, 100 * at["accuracy"])
        low, high = 100 * at["accuracy_interval"].values.T
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
    assert f"{100 * float(results.probed[2]['used'][0]):.0f} %" in text
    with pytest.raises(BadOutput, match="cannot write"):
        views.page(results, tmp_path / "none" / "page.html")


def test_cells_are_judged_by_side_and_by_interval(study):
    routed = study[0].routing[2].copy(deep=True)
    routed["share"].values[:] = np.stack([np.linspace(0.1, 0.9, 10), np.linspace(0.9, 0.1, 10)], axis=1)
    routed["share_interval"].values[:] = routed["share"].values + np.array([-0.05, 0.05])[:, None, None]
    paper = [[100 * value] for value in np.linspace(0.1, 0.9, 10)]
    paper[0], paper[1] = [13.0], [70.0]  # in the interval; on the other side
    table = example.class_table(2, routed, paper)
    assert table.rows[0][1] == "10.0 [5.0, 15.0] | 13.0 ✓*"
    assert table.rows[1][1].endswith("| 70.0 ✗") and table.rows[1][2].endswith("| 30.0 ✗")
    assert "18 of 20 cells ✓, 18 *" in table.note
    swapped = routed.isel(expert=[1, 0])
    assert example.class_table(2, swapped, paper).rows == table.rows


def test_a_table_that_is_the_published_one_beats_permuted_classes_and_one_without_classes_does_not(study):
    routed = study[0].routing[3].isel(expert=[2, 0, 1]).copy(deep=True)
    routed["share"].values[:] = np.array(example.THREE)[:, [1, 2, 0]] / 100
    cells = example.compare(routed, example.THREE)
    assert np.allclose(cells.ours, example.THREE) and cells.same.all()
    assert cells.p(cells.null) == 1 / (1 + example.PERMUTATIONS) and "correlation 1.00" in cells.said()
    shuffled = np.random.default_rng(0).permutation(example.THREE)
    routed["share"].values[:] = shuffled / 100
    other = example.compare(routed, example.THREE)
    draws = [np.random.default_rng(1000 + seed).permutation(shuffled) for seed in range(300)]
    best = [
        max(np.corrcoef(table[:, order].ravel(), np.ravel(example.THREE))[0, 1] for order in permutations(range(3)))
        for table in (shuffled, *draws)
    ]
    p = other.p(other.null)
    assert p == pytest.approx(np.mean(np.array(best[1:]) >= best[0]), abs=0.1) and p > 0.05


def test_a_table_that_only_parts_vehicles_from_animals_says_nothing_beyond(study):
    routed = study[0].routing[3].isel({"class": slice(0, 10)}).copy(deep=True)
    routed = routed.assign_coords({"class": list(CIFAR10)})
    vehicle = np.isin(CIFAR10, VEHICLES)
    routed["share"].values[:] = np.where(vehicle[:, None], [0.9, 0.07, 0.03], [0.1, 0.45, 0.45])
    split = example.compare(routed, example.THREE)
    assert split.p(split.null) < 0.05 and split.p(split.within) > 0.5
    routed["share"].values[:] = np.array(example.THREE) / 100
    same = example.compare(routed, example.THREE)
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
            one[f"{name}_difference_interval"].values[-1] = ends
    return replace(results, routing=three, depth=depth)


def verdicts(results) -> dict[str, str]:
    return {claim: verdict for claim, verdict, _ in example.claims(results)}


def test_every_claim_can_come_out_either_way(study):
    vehicle = np.isin(CIFAR10, VEHICLES)
    together = np.where(vehicle[:, None] == vehicle, 0.9, -0.9)
    broken = np.where(np.outer(vehicle, vehicle), 0.9, 0.1)
    published = np.array(example.TWO)
    yes = made_up(
        study,
        routing={
            2: {"silhouette_p": 0.01, "share": np.hstack([published, 100 - published]) / 100},
            3: {"share": np.array(example.THREE) / 100, "share_trials": np.array(example.THREE) / 100},
            5: {"correlation": broken},
        },
        depth={name: [-0.2, -0.1] for name in ("covariance", "covariance_excess", "information")},
    )
    no = made_up(
        study,
        routing={
            2: {"silhouette_p": 0.5, "share": np.full((10, 2), 0.5) + 0.01 * np.arange(10)[:, None] % 3},
            3: {"share": np.random.default_rng(0).permutation(example.THREE) / 100},
            5: {"correlation": together},
        },
        depth={name: [0.1, 0.2] for name in ("covariance", "covariance_excess", "information")},
    )
    unknown = made_up(
        study,
        routing={2: {"silhouette_p": np.nan}, 5: {"correlation": np.nan}},
        depth={name: [-0.1, 0.2] for name in ("covariance", "covariance_excess", "information")},
    )
    good, bad, open_ = (verdicts(results) for results in (yes, no, unknown))
    assert len(good) == 15
    for claim in good:
        if claim.startswith("Table") and "Table 1" not in claim:
            assert (good[claim], bad[claim]) == (example.YES, example.NO), claim
        elif claim.startswith("Figure, three"):
            assert good[claim] == example.YES
        elif claim.startswith("Figure"):
            assert (good[claim], bad[claim], open_[claim]) == (example.YES, example.NO, example.UNKNOWN), claim


def test_claims_are_judged_by_their_intervals(study):
    results = study[0]
    accuracies = results.accuracies.copy(deep=True)
    at = {"condition": list(accuracies["condition"].values).index("random")}
    claim = lambda: next(iter(example.claims(replace(results, accuracies=accuracies))))[1]  # noqa: E731
    for ends, verdict in (((0.01, 0.05), example.YES), ((-0.01, 0.05), example.UNKNOWN), ((-0.05, -0.01), example.NO)):
        accuracies["gap_interval"][at] = np.tile(ends, (2, 1))
        assert claim() == verdict


def test_tables_go_after_the_mark_and_the_head_stays(study, tmp_path):
    results, found, images = study
    every = example.tables(
        results, found, {"with a loop": list(images.classes)[:2], "without": list(images.classes)[2:]}
    )
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
    results = findings(one, found, images)
    text = views.page(results, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a mixture of 3 experts (K = 2)" in text and "1 trials each" in text
    assert np.allclose(results.routing[3]["share"].sum("expert"), 1)
    every = example.tables(
        results, found, {"with a loop": list(images.classes)[:2], "without": list(images.classes)[2:]}
    )
    assert "[nan, nan]" in example.markdown(every[0])
