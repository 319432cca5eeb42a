"""Results over trials against slow references, on made-up trials where the answer is known."""

import numpy as np
import pytest
import xarray as xr

from moe_interp.analyses import class_routing as routing
from moe_interp.analyses.specialists import accuracies, attainable_information, depth, probed
from moe_interp.errors import BadInput
from moe_interp.results import Variable, labelled
from moe_interp.stats import jackknife_interval, student_interval
from tests.reference import vision as slow

CLASSES, EXPERTS, IMAGES = 6, 3, 240
GROUPS = ["even", "odd"] * 3


def trial(seed: int, *, slots: int = 1, order=None, structure: float = 4.0, experts: int = EXPERTS) -> xr.Dataset:
    """Images whose experts follow the group of their class, more or less, with experts numbered by ``order``."""
    labels = np.random.default_rng(99).integers(CLASSES, size=IMAGES)
    rng = np.random.default_rng(seed)
    taste = np.zeros((CLASSES, experts))
    taste[::2, 0], taste[1::2, 1] = structure, structure
    noisy = taste[labels] + rng.gumbel(size=(IMAGES, experts))
    ids = np.argsort(-noisy, axis=1)[:, :slots]
    if order is not None:
        ids = np.asarray(order)[ids]
    given = lambda dims, values: Variable(dims, values, "1", "made up")  # noqa: E731
    variables = {
        "label": given(("image",), labels),
        "expert_id": given(("image", "slot"), ids),
        "predicted": given(("image",), np.where(rng.random(IMAGES) < 0.8, labels, (labels + 2) % CLASSES)),
        "group": given(("class",), GROUPS),
        "accuracy": given(("condition",), 0.9 - 0.1 * np.arange(2) + 0.02 * rng.random(2)),
        "probe_accuracy": given(("probed",), 0.7 + 0.1 * rng.random(2)),
        "probe_information": given(("probed",), 0.8 + 0.6 * rng.random(2)),
    }
    coords = {
        "class": list("abcdef"),
        "expert": np.arange(experts),
        "condition": ["learned", "random"],
        "probed": ["input", "none"],
    }
    return labelled(variables, coords, analysis="trial", provenance={"model": "made up", "seed": seed})


def raw(trials) -> list:
    return [
        slow.table(one["label"].values.tolist(), one["expert_id"].values.tolist(), CLASSES, one.sizes["expert"])
        for one in trials
    ]


@pytest.fixture(params=[1, 2])
def trials(request):
    orders = ([0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1])
    return [trial(seed, slots=request.param, order=order, structure=1.5) for seed, order in enumerate(orders)]


def test_the_table_is_that_of_each_trial_with_experts_matched(trials):
    result = routing.class_routing(trials, permutations=9)
    for number, plain in enumerate(raw(trials)):
        matched = result["share_trials"].values[number]
        assert np.allclose(np.sort(matched.T, axis=0), np.sort(np.array(plain).T, axis=0), atol=1e-12)
        assert np.allclose(slow.closest(plain, result["share"].values.tolist()), matched, atol=1e-12)
    assert np.allclose(result["share"], result["share_trials"].mean("trial"))
    first = result["share_trials"].values[:, 2, 0]
    ends = np.clip(slow.interval(first.tolist()), 0, 1)
    assert np.allclose(result["share_interval"].values[:, 2, 0], ends, atol=1e-5)
    evens = result["share"].values[::2].mean(axis=0)
    assert (np.diff(evens) <= 0).all()  # the first expert has most of the first class's group


def test_numbers_of_experts_enter_nothing(trials):
    renamed = [
        one.assign(expert_id=(("image", "slot"), np.array([1, 2, 0])[one["expert_id"].values])) for one in trials
    ]
    one, other = (routing.class_routing(some, permutations=19) for some in (trials, renamed))
    for name in one:
        if one[name].dtype.kind == "f":
            assert np.allclose(one[name], other[name], atol=1e-12, equal_nan=True), name


def test_matching_is_the_best_of_all_assignments():
    rng = np.random.default_rng(3)
    for _ in range(20):
        one, other = rng.random((5, 4)), rng.random((5, 4))
        assert np.allclose(one[:, routing.best_assignment(one, other)], slow.closest(one.tolist(), other.tolist()))


@pytest.mark.parametrize("seed", range(6))
def test_trials_that_hardly_agree_are_matched_as_well_as_can_be_in_whatever_order_they_come(seed):
    rng = np.random.default_rng(seed)
    tables = rng.dirichlet([1.0] * 3, size=(4, 5)) + 0.3 * rng.dirichlet([1.0] * 3, size=5)

    def scatter(tables):
        matched = np.stack([table[:, order] for table, order in zip(tables, routing.match(tables), strict=True)])
        return ((matched - matched.mean(axis=0)) ** 2).sum()

    least = slow.least_scatter(tables.tolist())
    assert scatter(tables) == pytest.approx(least)
    for _ in range(5):
        assert scatter(tables[rng.permutation(4)]) == pytest.approx(least)


def test_correlation_and_covariance_of_classes(trials):
    result, tables = routing.class_routing(trials, permutations=9), raw(trials)
    for a in range(CLASSES):
        for b in range(CLASSES):
            assert float(result["covariance"][a, b]) == pytest.approx(slow.covariance(tables, a, b), abs=1e-12)
            assert float(result["correlation"][a, b]) == pytest.approx(slow.correlation(tables, a, b), abs=1e-12)
    one_by_one = [slow.covariance([table], 1, 4) for table in tables]
    assert np.allclose(result["covariance_interval"][:, 1, 4], slow.interval(one_by_one), atol=1e-6)


def test_an_uneven_load_correlates_all_classes_and_its_excess_does_not():
    loaded = [trial(seed, structure=0.0) for seed in range(3)]
    for one in loaded:
        one["expert_id"].values[np.random.default_rng(1).random(IMAGES) < 0.6] = 0
    result = routing.class_routing(loaded, permutations=9)
    other = ~np.eye(CLASSES, dtype=bool)
    assert result["correlation"].values[other].min() > 0.8
    assert result["correlation_excess"].values[other].mean() < 0.2


def test_silhouette_and_its_null_over_all_splits(trials):
    result, tables = routing.class_routing(trials, permutations=9), raw(trials)
    from itertools import combinations

    null = [slow.silhouette(tables, set(some)) for some in combinations(range(CLASSES), 3)]
    observed = slow.silhouette(tables, {0, 2, 4})
    assert float(result["silhouette"]) == pytest.approx(observed, abs=1e-12)
    assert float(result["silhouette_null"]) == pytest.approx(np.mean(null), abs=1e-12)
    assert float(result["silhouette_p"]) == pytest.approx(np.mean([x >= observed - 1e-12 for x in null]))
    assert float(result["silhouette_p"]) == pytest.approx(2 / 20)  # the split itself, named from either side
    assert result["cluster"].values[::2].tolist() != result["cluster"].values[1::2].tolist()
    assert len(set(result["cluster"].values[::2])) == len(set(result["cluster"].values[1::2])) == 1


def test_groups_that_experts_ignore_are_not_found():
    result = routing.class_routing([trial(seed, structure=0.0) for seed in range(4)], permutations=199)
    assert abs(float(result["silhouette"])) < 0.2 and float(result["silhouette_p"]) > 0.1
    assert float(result["consistency_p"]) > 0.05
    assert float(result["consistency"]) == pytest.approx(float(result["consistency_null"]), abs=0.25)
    assert float(result["information"]) < float(result["information_null"])


def test_consistency_of_trials_and_its_null(trials):
    result = routing.class_routing(trials, permutations=199)
    assert float(result["consistency"]) == pytest.approx(slow.consistency(raw(trials)), abs=1e-12)
    assert float(result["consistency_null"]) < float(result["consistency"]) - 0.2
    assert float(result["consistency_p"]) == pytest.approx(1 / 200)


def test_agreement_on_images_and_what_class_and_load_alone_would_give(trials):
    result = routing.class_routing(trials, permutations=9)
    matched = result["share_trials"].values
    labels = trials[0]["label"].values
    sets = []
    for number, one in enumerate(trials):
        plain = np.array(raw([one])[0])
        columns = [int(np.abs(plain - matched[number][:, [e]]).sum(0).argmin()) for e in range(EXPERTS)]
        sets.append([{columns.index(expert) for expert in row} for row in one["expert_id"].values.tolist()])
    slots = trials[0].sizes["slot"]
    pairs = [(a, b) for a in range(4) for b in range(a)]
    same = [np.mean([len(x & y) / slots for x, y in zip(sets[a], sets[b], strict=True)]) for a, b in pairs]
    assert float(result["agreement"]) == pytest.approx(np.mean(same), abs=1e-12)
    by_class = [np.mean([slots * sum(matched[a][label] * matched[b][label]) for label in labels]) for a, b in pairs]
    assert float(result["agreement_class"]) == pytest.approx(np.mean(by_class), abs=1e-12)
    assert float(result["agreement_load"]) < float(result["agreement_class"])


def test_information_is_debiased_and_bounded(trials):
    result = routing.class_routing(trials, permutations=100)
    for number, one in enumerate(trials):
        labels, ids = one["label"].values.tolist(), one["expert_id"].values.tolist()
        plain = slow.plug_in_information(labels, ids, CLASSES, EXPERTS)
        counts = routing.class_counts(one)
        slots = one.sizes["slot"]
        distinct = (EXPERTS - slots) / (slots * (EXPERTS - 1))  # K of E drawn without replacement
        bias = distinct * ((counts > 0).sum() - CLASSES - EXPERTS + 1) / (2 * IMAGES)
        assert float(result["information_trials"][number]) == pytest.approx(plain - bias, abs=1e-12)
    assert float(result["information"]) > 3 * float(result["information_null"])
    assert float(result["information_cap"]) == pytest.approx(np.log(3 / trials[0].sizes["slot"]))
    perfect = np.diag([40, 40, 40])
    assert routing.debiased_information(perfect, 120) == pytest.approx(np.log(3), abs=0.01)


@pytest.mark.parametrize(("experts", "slots"), [(3, 1), (3, 2), (5, 2), (5, 4), (3, 3)])
def test_information_of_routing_that_knows_no_class_is_zero_whatever_the_slots(experts, slots):
    rng, images, found = np.random.default_rng(0), 300, []
    for _ in range(300):
        ids = rng.random((images, experts)).argsort(axis=1)[:, :slots]
        counts = np.zeros((10, experts), int)
        np.add.at(counts, (rng.integers(10, size=images)[:, None], ids), 1)
        found.append(routing.debiased_information(counts, images))
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(300) + 1e-4


def test_a_router_that_sends_all_to_one_expert_has_no_correlations():
    collapsed = [trial(seed).assign(expert_id=(("image", "slot"), np.zeros((IMAGES, 1), int))) for seed in range(2)]
    result = routing.class_routing(collapsed, permutations=9)
    assert float(result["information"]) == pytest.approx(0.0, abs=1e-12)
    for name in ("silhouette", "silhouette_p", "consistency", "consistency_p"):
        assert np.isnan(float(result[name])), name
    assert np.isnan(result["correlation_excess"]).all()


def test_a_trial_without_preferences_agrees_with_no_other(trials):
    collapsed = trials[0].assign(
        expert_id=(("image", "slot"), np.tile(np.arange(trials[0].sizes["slot"]), (IMAGES, 1)))
    )
    with_it = routing.class_routing([*trials[1:], collapsed], permutations=9)
    three = float(routing.class_routing(trials[1:], permutations=9)["consistency"])
    assert float(with_it["consistency"]) == pytest.approx(three * 3 / 6)


def test_one_trial_has_values_and_no_intervals():
    result = routing.class_routing([trial(0)], permutations=9)
    assert np.isnan(result["share_interval"]).all() and np.isnan(float(result["consistency"]))
    assert float(result["information"]) > 0.2


def test_accuracies_are_paired_by_trial():
    mixtures = {3: [trial(seed) for seed in range(4)], 2: [trial(seed, experts=2) for seed in range(4, 8)]}
    dense = [trial(seed).sel(condition=["learned"]) for seed in range(10, 14)]
    others = {3: [trial(seed + 50) for seed in range(4)], 2: [trial(seed + 60) for seed in range(4)]}
    result = accuracies(mixtures, trained_random=others, dense_one=dense, dense_total={3: dense, 2: dense})
    names = ["learned", "random", "trained at random", "dense, one expert", "dense, total"]
    assert result["condition"].values.tolist() == names
    other = [float(one["accuracy"][1]) for one in others[2]]
    assert float(result["accuracy"].sel(experts=2, condition="trained at random")) == pytest.approx(np.mean(other))
    plain = [float(one["accuracy"][0]) for one in dense]
    for name in names[-2:]:
        assert float(result["accuracy"].sel(experts=3, condition=name)) == pytest.approx(np.mean(plain))
    learned, random = (np.array([float(one["accuracy"][at]) for one in mixtures[2]]) for at in (0, 1))
    here = result.sel(experts=2, condition="random")
    assert float(here["accuracy"]) == pytest.approx(random.mean())
    assert np.allclose(here["accuracy_interval"], slow.interval(random.tolist()), atol=1e-6)
    assert np.allclose(here["gap_interval"], slow.interval((learned - random).tolist()), atol=1e-6)
    with pytest.raises(BadInput, match="trials cannot be compared"):
        accuracies({3: mixtures[3][:2]}, dense_one=dense)


def test_depth_compares_trunks_with_welchs_interval():
    base, short = [trial(seed, structure=3) for seed in range(4)], [trial(seed, structure=0.5) for seed in range(4)]
    result = depth({"base": base, "short": short})
    for trunk, some in (("base", base), ("short", short)):
        tables = raw(some)
        variances = [np.mean([slow.covariance([t], c, c) for c in range(CLASSES)]) for t in tables]
        pairs = [(a, b) for a in range(CLASSES) for b in range(CLASSES) if a != b]
        both = [np.mean([abs(slow.covariance([t], a, b)) for a, b in pairs]) for t in tables]
        here = result.sel(trunk=trunk)
        assert float(here["variance"]) == pytest.approx(np.mean(variances))
        assert np.allclose(here["variance_interval"], slow.interval(variances), atol=1e-6)
        assert float(here["covariance"]) == pytest.approx(np.mean(both))
        even = [[[value + 1 / EXPERTS for value in row] for row in slow._excess(table)] for table in tables]
        both = [np.mean([abs(slow.covariance([t], a, b)) for a, b in pairs]) for t in even]
        assert float(here["covariance_excess"]) == pytest.approx(np.mean(both))
    one, other = ([routing.information(t) for t in some] for some in (short, base))
    v, w = np.var(one, ddof=1) / 4, np.var(other, ddof=1) / 4
    freedom = (v + w) ** 2 / (v**2 / 3 + w**2 / 3)
    from scipy.stats import t

    half = t.ppf(0.975, freedom) * np.sqrt(v + w)
    middle = np.mean(one) - np.mean(other)
    assert np.allclose(result["information_difference_interval"].sel(trunk="short"), [middle - half, middle + half])
    assert (result["information_difference_interval"].sel(trunk="short") < 0).all()
    learned = [float(one["accuracy"][0]) for one in base]
    assert float(result["accuracy"].sel(trunk="base")) == pytest.approx(np.mean(learned))


@pytest.mark.parametrize("slots", [1, 2])
def test_probed_sets_what_was_used_between_its_bounds(slots):
    trials = [trial(seed, slots=slots, experts=4) for seed in range(3)]
    result = probed({"base": trials})
    routed = [routing.information(one) for one in trials]
    could = [
        slow.merged_information(one["label"].values.tolist(), one["predicted"].values.tolist(), CLASSES, 4 // slots)
        for one in trials
    ]
    cap = np.log(4 / slots)
    assert float(result["cap"]) == pytest.approx(cap) and float(result["routed"][0]) == pytest.approx(np.mean(routed))
    assert float(result["attainable"][0]) == pytest.approx(np.mean(could), rel=0.03)  # merged two by two, not all ways
    assert float(result["attainable"][0]) <= np.mean(could) + 1e-12
    assert float(result["used_least"][0]) == pytest.approx(np.mean(routed) / cap)
    assert np.allclose(result["used_least_interval"][:, 0], slow.interval([one / cap for one in routed]), atol=1e-5)
    most = [one / attainable_information(two) for one, two in zip(routed, trials, strict=True)]
    assert float(result["used_most"][0]) == pytest.approx(np.mean(most))
    accuracy = [float(one["probe_accuracy"][1]) for one in trials]
    assert float(result["accuracy"].sel(trunk="base", probed="none")) == pytest.approx(np.mean(accuracy))


def test_the_class_itself_is_the_most_that_many_experts_can_tell():
    trials = [trial(seed, experts=12) for seed in range(2)]
    share = np.bincount(trials[0]["label"].values) / IMAGES
    assert float(probed({"base": trials})["cap"]) == pytest.approx(-(share * np.log(share)).sum())


def test_intervals_over_pairs_of_trials_are_the_jackknifes(trials):
    result = routing.class_routing(trials, permutations=9)
    tables = raw(trials)
    whole, without = slow.consistency(tables), [slow.consistency(tables[:n] + tables[n + 1 :]) for n in range(4)]
    ends = slow.interval([4 * whole - 3 * one for one in without])
    assert np.allclose(result["consistency_interval"], np.clip(ends, -1, 1), atol=1e-5)
    ids = routing.matched_trials(trials)[1]
    alike = lambda kept: np.mean([  # noqa: E731
        len(set(ids[a, n]) & set(ids[b, n])) / ids.shape[2] for a in kept for b in kept if a < b for n in range(IMAGES)
    ])  # fmt: skip
    pseudo = [4 * alike(range(4)) - 3 * alike([a for a in range(4) if a != n]) for n in range(4)]
    assert np.allclose(result["agreement_interval"], np.clip(slow.interval(pseudo), 0, 1), atol=1e-5)
    assert np.isnan(routing.class_routing(trials[:2], permutations=9)["agreement_interval"]).all()


def test_a_jackknife_interval_of_a_variance_covers():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(1500):
        sample = rng.uniform(size=10)
        low, high = jackknife_interval(lambda kept, sample=sample: float(sample[kept].var(ddof=1)), 10)
        inside += low <= 1 / 12 <= high
    assert 0.93 < inside / 1500 < 0.97
    assert np.isnan(jackknife_interval(lambda kept: 1.0, 1)).all()


def test_trials_that_cannot_be_compared_are_refused():
    with pytest.raises(BadInput, match="no trials"):
        routing.class_routing([])
    other = trial(1)
    other["label"].values[0] += 1 if other["label"].values[0] == 0 else -1
    with pytest.raises(BadInput, match="the same classes and test images"):
        routing.class_routing([trial(0), other])
    for compared in (lambda: depth({"base": [trial(0)], "short": [other]}), lambda: probed({"a": [trial(0), other]}),
                     lambda: accuracies({3: [trial(0)]}, dense_one=[other])):  # fmt: skip
        with pytest.raises(BadInput, match="the same classes and test images"):
            compared()
    with pytest.raises(BadInput, match="3 experts in all"):
        routing.class_routing([trial(0), trial(1, experts=4)])


def test_students_interval_covers_where_a_bootstrap_of_three_would_not():
    values = np.random.default_rng(0).normal(size=(3, 4000))
    low, high = student_interval(values)
    assert np.mean((low <= 0) & (0 <= high)) == pytest.approx(0.95, abs=0.015)
    assert np.isnan(student_interval(values[:1])).all()
