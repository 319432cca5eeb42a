"""Intervals, debiasing and permutation tests: against loops, and on simulations whose answer is known.

Simulated documents are clustered (each has preferences of its own): what tokens taken as independent miss.
"""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.stats import t as student

from moe_interp import stats
from moe_interp.errors import BadInput
from tests.reference import routing as slow
from tests.reference import together


def clustered(rng, documents, layers, share, *, length=200, alike=30.0):
    """Counts [N, L, E]: every document draws its own shares around ``share`` at every layer."""
    own = rng.dirichlet(np.asarray(share) * alike, size=(documents, layers))
    return rng.multinomial(length, own)


# Against loops

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(RNG.gamma(0.5, 12.0, size=(11, 3, 6)))
GROUPS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0])


@pytest.mark.parametrize("strata", [None, GROUPS])
def test_bootstrap_ratio_is_the_studentised_interval_of_resampled_ratios(strata):
    tokens = COUNTS.sum(axis=(1, 2))
    ends = stats.bootstrap_ratio(COUNTS, tokens, strata=strata, resamples=60, seed=3, level=0.9)
    draws = stats.resampling_weights(np.zeros(11, int) if strata is None else strata, 60, 3)
    for layer, expert in np.ndindex(3, 6):
        expected = slow.bootstrap_interval(COUNTS[:, layer, expert].tolist(), tokens.tolist(), draws, 0.9, strata)
        np.testing.assert_allclose(ends[:, layer, expert], expected, rtol=1e-9, atol=1e-12)


def test_bootstrap_ratio_with_a_denominator_per_layer_and_bootstrap_mean():
    draws = stats.resampling_weights(np.zeros(11, int), 40, 0)
    per_layer = stats.bootstrap_ratio(COUNTS, COUNTS.sum(axis=2), resamples=40)
    top, bottom = COUNTS[:, 1, 2].tolist(), COUNTS.sum(axis=2)[:, 1].tolist()
    np.testing.assert_allclose(per_layer[:, 1, 2], slow.bootstrap_interval(top, bottom, draws, 0.95), rtol=1e-9)
    mean = stats.bootstrap_mean(COUNTS[:, 1, 2], resamples=40)
    np.testing.assert_allclose(mean, slow.bootstrap_interval(top, [1] * 11, draws, 0.95), rtol=1e-9)


def test_intervals_move_and_scale_with_the_values_and_stay_within_the_documents():
    values = RNG.gamma(2.0, size=(9, 4))
    ends = stats.bootstrap_mean(values, resamples=200)
    np.testing.assert_allclose(stats.bootstrap_mean(5 - 3 * values, resamples=200), 5 - 3 * ends[::-1], rtol=1e-9)
    lonely = np.zeros(9)
    lonely[4] = 0.5  # every third resample has no spread
    assert stats.bootstrap_mean(lonely, resamples=200).tolist() == [pytest.approx(0, abs=0.02), 0.5]
    assert stats.bootstrap_mean(np.array([0.3, 0.3, 0.3])).tolist() == [pytest.approx(0.3)] * 2


def test_p_of_one_test_counts_the_observed_one_too():
    assert stats.permutation_p(3.0, np.array([1.0, 2.0, 3.0, 4.0])) == 3 / 5
    assert stats.permutation_p(9.0, np.arange(9.0)) == 1 / 10  # never 0
    assert np.isnan(stats.permutation_p(np.nan, np.arange(9.0)))


def test_few_documents_have_students_interval():
    ends = stats.bootstrap_ratio(np.array([1, 4]), np.array([2, 4]))  # 5 / 6, residuals -+ 2 / 3 of 6
    half = student.ppf(0.975, 1) * np.sqrt(2 * 2 * (2 / 3) ** 2) / 6
    assert ends == pytest.approx([5 / 6 - half, 5 / 6 + half])
    means = RNG.gamma(2.0, size=(4000, 3)) @ np.eye(3)
    low, high = stats.bootstrap_mean(means.T[:, None])
    held = ((low <= 2.0) & (high >= 2.0)).mean()
    assert 0.88 < held < 0.97  # skew as they are; cut at the documents' range it is 0.75 at most
    strata = np.array([0, 0, 1, 1])
    values = np.array([1.0, 3.0, 10.0, 14.0])  # variances 2 and 8 around 2 and 12: 2 * (2 + 8) / 16 of their mean
    half = student.ppf(0.975, 2) * np.sqrt(2 * (2 + 8) / 16)
    assert stats.bootstrap_mean(values, strata=strata) == pytest.approx([7 - half, 7 + half])


def test_documents_without_a_denominator_say_nothing():
    assert np.isnan(stats.bootstrap_ratio(np.array([1, 0, 0]), np.array([4, 0, 0]))).all()
    top, bottom = np.array([1, 2, 1, 3, 0]), np.array([4, 9, 5, 8, 0])  # four that have one: Student's
    assert stats.bootstrap_ratio(top, bottom) == pytest.approx(slow.bootstrap_interval(top, bottom, []))
    tops, bottoms = np.zeros((2, 60), int)
    tops[::10], bottoms[::10] = [1, 2, 1, 3, 2, 4], [4, 9, 5, 8, 7, 9]  # six of sixty: some resamples have none of them
    draws = stats.resampling_weights(np.zeros(60, int), 2000, 0)
    assert (draws[:, ::10].sum(axis=1) == 0).any()
    ends = stats.bootstrap_ratio(tops, bottoms, resamples=2000)
    assert ends == pytest.approx(slow.bootstrap_interval(tops.tolist(), bottoms.tolist(), draws))
    columns = stats.bootstrap_ratio(np.stack([top, top], 1)[:, None], np.stack([bottom, bottom + 1], 1)[:, None])
    assert columns[:, 0, 0] == pytest.approx(stats.bootstrap_ratio(top, bottom))  # few in this column alone
    assert columns[:, 0, 1] == pytest.approx(stats.bootstrap_ratio(top, bottom + 1))


def test_the_interval_of_a_ratio_does_not_care_for_the_sign_of_both():
    rng = np.random.default_rng(5)
    bottom = rng.gamma(3.0, size=12)
    top = bottom * rng.normal(0.5, 0.2, size=12)
    ends = stats.bootstrap_ratio(top, bottom)
    np.testing.assert_allclose(stats.bootstrap_ratio(-top, -bottom), ends, rtol=1e-9)
    np.testing.assert_allclose(stats.bootstrap_ratio(top, -bottom), -ends[::-1], rtol=1e-9)
    few = slice(4)
    np.testing.assert_allclose(
        stats.bootstrap_ratio(-top[few], -bottom[few]), stats.bootstrap_ratio(top[few], bottom[few])
    )
    mixed = bottom * np.where(np.arange(12) == 3, -0.3, 1.0)
    draws = stats.resampling_weights(np.zeros(12, int), 300, 0)
    low, high = stats.bootstrap_ratio(-top, -mixed, resamples=300)
    assert low < top.sum() / mixed.sum() < high
    np.testing.assert_allclose([low, high], slow.bootstrap_interval(top, mixed, draws), rtol=1e-9)


def test_a_uniform_router_draws_as_enumeration_has_it():
    rng = np.random.default_rng(0)
    for experts, top_k in ((2, 1), (5, 2), (4, 3), (3, 3)):
        counts = stats.uniform_counts(np.array([40, 3, 0]), experts, top_k, 4000, rng)
        assert (counts.sum(axis=-1) == np.array([40, 3, 0]) * top_k).all()
        chance = top_k / experts
        np.testing.assert_allclose(counts[:, 0].mean(axis=0), 40 * chance, rtol=0.03)
        np.testing.assert_allclose(counts[:, 0].var(axis=0), 40 * chance * (1 - chance), rtol=0.1, atol=1e-12)
    one = stats.uniform_counts(np.array([1]), 5, 2, 20_000, rng)[:, 0]
    assert one.max() == 1
    pairs = one.T.astype(float) @ one / 20_000
    np.testing.assert_allclose(pairs[np.triu_indices(5, 1)], 1 / 10, atol=0.01)  # ten sets of two


def test_resamples_keep_the_size_of_each_stratum_and_repeat_with_the_seed():
    draws = stats.resampling_weights(GROUPS, 200, 5)
    for group in range(3):
        assert (draws[:, GROUPS == group].sum(axis=1) == (GROUPS == group).sum()).all()
    np.testing.assert_array_equal(draws, stats.resampling_weights(GROUPS, 200, 5))
    assert (draws != stats.resampling_weights(GROUPS, 200, 6)).any()


def test_jackknife_is_the_textbook_formula():
    found = stats.jackknife(stats.divergence_from_rest, COUNTS, GROUPS, 3)
    for layer in range(3):
        expected = slow.jackknife(slow.divergence_from_rest, COUNTS[:, layer].tolist(), GROUPS, 3)
        np.testing.assert_allclose(found[:, layer], expected, rtol=1e-9)


def test_jackknife_in_chunks_is_the_same(monkeypatch):
    whole = stats.jackknife(stats.divergence_from_rest, COUNTS, GROUPS, 3)
    monkeypatch.setattr(stats.resampling, "_CHUNK", 4)
    np.testing.assert_allclose(stats.jackknife(stats.divergence_from_rest, COUNTS, GROUPS, 3), whole, rtol=1e-12)


def test_bootstrap_debias_takes_off_the_mean_of_the_resampled_statistic():
    found = stats.bootstrap_debias(partial(stats.coverage, share=0.5), COUNTS, GROUPS, 3, resamples=30, seed=1)
    draws = stats.resampling_weights(GROUPS, 30, 1)
    for group, layer in np.ndindex(3, 3):
        own = np.flatnonzero(GROUPS == group)
        rows = COUNTS[own, layer].tolist()
        resampled = [
            slow.coverage(
                [sum(round(t) * row[e] for t, row in zip(drawn[own], rows, strict=True)) for e in range(6)],
                0.5,
            )
            for drawn in draws
        ]
        plug_in = slow.coverage(slow.summed(rows, range(len(rows))), 0.5)
        assert found[group, layer] == pytest.approx(2 * plug_in - sum(resampled) / 30)


def test_max_statistic_p_against_loops():
    rows = np.random.default_rng(1).normal(size=(41, 2, 5))
    rows[0, 1, 3] = 3.5
    rows[:, 0, 2] = 1.0  # never varies: cannot be tested
    found = stats.max_statistic_p(rows)
    for family in range(2):
        np.testing.assert_allclose(found[family], slow.max_statistic_p(rows[:, family].tolist()))
    assert found[0, 2] == 1.0
    assert found[1, 3] == found.min() < 0.1


def test_permutation_max_agrees_with_every_permutation():
    counts = np.array([[9, 3, 2], [8, 2, 3], [2, 5, 1], [1, 8, 2], [7, 3, 1], [4, 4, 3], [3, 5, 6]])[:, None]
    groups = np.array([0, 0, 0, 1, 1, 1, 1])
    p, control = stats.permutation_max(stats.share_difference, counts, groups, 2, permutations=20_000)
    np.testing.assert_allclose(p[0, 0], slow.exhaustive_p(counts[:, 0].tolist(), [0, 1, 2]), atol=0.02)
    np.testing.assert_allclose(p[1, 0], slow.exhaustive_p(counts[:, 0].tolist(), [3, 4, 5, 6]), atol=0.02)
    np.testing.assert_allclose(control, 0, atol=0.01)


def test_permutation_max_controls_over_layers_for_one_value_per_layer():
    p, control = stats.permutation_max(stats.jensen_shannon, COUNTS, GROUPS, 3, permutations=99)
    assert p.shape == control.shape == (3, 3)
    labels = np.tile(GROUPS, (100, 1))
    np.random.default_rng(0).permuted(labels[1:], axis=1, out=labels[1:])
    for group in range(3):
        table = [
            [
                slow.jensen_shannon(
                    slow.summed(COUNTS[:, layer].tolist(), np.flatnonzero(row == group)),
                    slow.summed(COUNTS[:, layer].tolist(), np.flatnonzero(row != group)),
                )
                for layer in range(3)
            ]
            for row in labels
        ]
        np.testing.assert_allclose(p[group], slow.max_statistic_p(table))
        np.testing.assert_allclose(control[group], np.mean(table[1:], axis=0))


@given(
    arrays.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(2, 9)), elements=st.integers(0, 40)).filter(
        lambda counts: (counts.sum(axis=1) > 0).all()
    )
)
def test_concentration_against_loops(counts):
    found = {
        "n50": stats.coverage(counts, 0.5),
        "n90": stats.coverage(counts, 0.9),
        "gini": stats.gini(counts),
        "load_entropy": stats.load_entropy(counts),
        "max_vio": stats.max_vio(counts),
        "cv2": stats.cv2(counts),
        "dead_experts": stats.dead_experts(counts),
    }
    for name, values in found.items():
        expected = [slow.LOAD[name](row) for row in counts.tolist()]
        np.testing.assert_allclose(values, expected, atol=1e-12, err_msg=name)


@given(arrays.arrays(np.int64, (2, 6), elements=st.integers(0, 9)).filter(lambda pair: pair.sum(axis=1).all()))
def test_jensen_shannon_against_loops_symmetric_and_bounded(pair):
    left, right = pair[:1], pair[1:]
    found = stats.jensen_shannon(left, right)
    np.testing.assert_allclose(found, slow.jensen_shannon(left[0].tolist(), right[0].tolist()), atol=1e-12)
    np.testing.assert_allclose(found, stats.jensen_shannon(right, left), atol=1e-12)
    assert -1e-12 <= found[0] <= np.log(2) + 1e-12


def test_an_expert_with_a_tenth_of_the_mean_load_is_not_dead():
    assert stats.dead_experts(np.array([[1, 13, 13, 13], [0, 13, 13, 14]])).tolist() == [0, 1]
    assert stats.dead_experts(np.array([[10, 40, 40, 2, 16, 16, 16]])).tolist() == [0]  # 2 of 140: to the last bit


def test_disjoint_loads_are_ln_2_apart_and_no_load_has_no_statistics():
    assert stats.jensen_shannon(np.array([[1, 0]]), np.array([[0, 3]])) == pytest.approx(np.log(2))
    nothing = np.zeros((1, 4), int)
    for statistic in (
        partial(stats.coverage, share=0.5),
        stats.gini,
        stats.load_entropy,
        stats.max_vio,
        stats.cv2,
    ):
        assert np.isnan(statistic(nothing)).all()
    assert np.isnan(stats.dead_experts(nothing)).all()


@given(arrays.arrays(np.int64, (2, 3, 4), elements=st.integers(0, 9)).filter(lambda t: t.sum(axis=(1, 2)).all()))
def test_mutual_information_against_loops_of_one_table_and_of_several(tables):
    expected = [together.mutual_information(table) for table in tables.tolist()]
    np.testing.assert_allclose(stats.mutual_information(tables), expected, atol=1e-12)
    np.testing.assert_allclose(stats.mutual_information(tables[0]), expected[0], atol=1e-12)


def test_a_single_load_has_the_measures_of_a_row_of_loads():
    loads = np.array([[5, 0, 2, 1], [1, 1, 9, 3]])
    for measure in (
        partial(stats.coverage, share=0.5),
        stats.gini,
        stats.load_entropy,
        stats.max_vio,
        stats.cv2,
        stats.dead_experts,
    ):
        for load, expected in zip(loads, measure(loads), strict=True):
            one = measure(load)
            assert isinstance(one, np.ndarray)
            np.testing.assert_array_equal(one, expected)
    for measure in (stats.jensen_shannon, stats.spearman):
        one = measure(loads[0].astype(float), loads[1].astype(float))
        np.testing.assert_allclose(one, measure(loads[:1].astype(float), loads[1:].astype(float))[0], rtol=1e-12)


def test_sign_flip_max_against_loops():
    differences = RNG.normal(size=(9, 2, 5)) + 0.4
    differences[:, 1, 3] = 0.0  # nothing to test
    found = stats.sign_flip_max(differences, flips=60, seed=4)
    signs = np.random.default_rng(4).choice([-1.0, 1.0], size=(61, 9))
    signs[0] = 1.0
    for family in range(2):
        expected = slow.sign_flip_p(differences[:, family].tolist(), signs.tolist())
        np.testing.assert_allclose(found[family], expected)
    assert found[1, 3] == 1.0
    assert np.isnan(stats.sign_flip_max(differences[:1])).all()


def test_block_jackknife_of_a_mean_is_the_textbook_interval():
    from scipy.stats import t

    blocks = RNG.normal(size=(12, 3))
    blocks = np.column_stack([blocks[:, :2], np.ones(12)])
    estimate, (low, high) = stats.block_jackknife(lambda total: total[:2] / total[2], blocks)
    mean, error = blocks[:, :2].mean(axis=0), blocks[:, :2].std(axis=0, ddof=1) / np.sqrt(12)
    np.testing.assert_allclose(estimate, mean)
    np.testing.assert_allclose(high - low, 2 * t.ppf(0.975, 11) * error)
    empty = np.concatenate([blocks, np.zeros((3, 3))])
    np.testing.assert_allclose(stats.block_jackknife(lambda total: total[:2] / total[2], empty)[0], mean)
    one, ends = stats.block_jackknife(lambda total: total[:2], blocks[:1], debias=False)
    assert np.array_equal(one, blocks[0, :2]) and np.isnan(ends).all()
    one, ends = stats.block_jackknife(lambda total: total[:2], blocks[:1])  # the bias takes a second block
    assert np.isnan(one).all() and np.isnan(ends).all()


# Where there is nothing to say


def test_a_stratum_of_one_document_has_no_interval_and_no_bias():
    groups = np.array([0, 0, 1])
    assert np.isnan(stats.bootstrap_ratio(COUNTS[:3], COUNTS[:3].sum(axis=(1, 2)), strata=groups)).all()
    assert np.isnan(stats.bootstrap_ratio(COUNTS[:1], COUNTS[:1].sum(axis=(1, 2)))).all()
    assert np.isnan(stats.jackknife(stats.divergence_from_rest, COUNTS[:3], groups, 2)).all()
    assert np.isnan(stats.bootstrap_debias(stats.gini, COUNTS[:3], groups, 2)).all()


def test_a_single_group_has_nothing_to_be_compared_with():
    p, control = stats.permutation_max(stats.share_difference, COUNTS, np.zeros(11, int), 1, permutations=9)
    assert np.isnan(p).all()
    assert np.isnan(control).all()


def test_no_resamples_is_an_error():
    with pytest.raises(BadInput, match="invalid resamples for bootstrap_mean: expected .* from 1 to 1000000, got 0"):
        stats.bootstrap_mean(np.arange(3.0), resamples=0)


# On simulations


def test_intervals_cover_clustered_documents_where_independent_tokens_would_not():
    rng, repeats, documents = np.random.default_rng(2), 600, 40
    length = rng.integers(50, 400, size=(documents, repeats))
    chose = rng.binomial(length, rng.beta(2.0, 8.0, size=length.shape))
    low, high = stats.bootstrap_ratio(chose[:, :, None], length, resamples=400)[..., 0]
    covered = ((low <= 0.2) & (high >= 0.2)).mean()
    assert 0.93 <= covered <= 0.97
    share = chose.sum(axis=0) / length.sum(axis=0)
    half = 1.96 * np.sqrt(share * (1 - share) / length.sum(axis=0))
    assert (np.abs(share - 0.2) <= half).mean() < 0.4


def test_intervals_of_few_skewed_documents_cover_where_plain_percentiles_do_not():
    rng, documents = np.random.default_rng(9), 14
    values = rng.exponential(size=(documents, 3000))
    low, high = stats.bootstrap_mean(values[:, None], resamples=999)[:, 0]
    assert 0.93 <= ((low <= 1) & (high >= 1)).mean() <= 0.97
    drawn = stats.resampling_weights(np.zeros(documents, int), 999, 0) @ values / documents
    plain = np.quantile(drawn, [0.025, 0.975], axis=0)
    assert ((plain[0] <= 1) & (plain[1] >= 1)).mean() < 0.91


def test_stratified_intervals_are_shorter_when_domains_differ_and_still_cover():
    rng, repeats = np.random.default_rng(3), 300
    groups = np.repeat([0, 1], 20)
    rate = np.where(groups[:, None] == 0, 0.1, 0.6) + rng.uniform(-0.05, 0.05, size=(40, repeats))
    chose = rng.binomial(100, rate)[:, :, None]
    tokens = np.full(40, 100)
    low, high = stats.bootstrap_ratio(chose, tokens, strata=groups, resamples=400)[..., 0]
    assert 0.89 <= ((low <= 0.35) & (high >= 0.35)).mean() <= 0.98
    loose = stats.bootstrap_ratio(chose, tokens, resamples=400)[..., 0]
    assert (high - low).mean() < 0.3 * (loose[1] - loose[0]).mean()


def test_jackknife_removes_most_of_the_bias_of_the_divergence():
    rng = np.random.default_rng(4)
    share = rng.dirichlet(np.full(16, 0.8))
    other = 0.8 * share + 0.2 * rng.dirichlet(np.full(16, 0.8))
    truth = slow.jensen_shannon(share.tolist(), other.tolist())
    counts = np.concatenate([clustered(rng, 20, 300, share), clustered(rng, 20, 300, other)])
    groups = np.repeat([0, 1], 20)
    plug_in = stats.divergence_from_rest(stats.group_totals(counts, groups, 2).swapaxes(0, 1))
    biased = plug_in.mean() - truth
    left = stats.jackknife(stats.divergence_from_rest, counts, groups, 2).mean() - truth
    assert biased > 0.3 * truth
    assert abs(left) < 0.2 * biased


def test_bootstrap_debias_removes_most_of_the_bias_of_n90():
    rng = np.random.default_rng(5)
    share = rng.dirichlet(np.full(64, 0.8))
    truth = slow.coverage(share.tolist(), 0.9)
    counts = clustered(rng, 20, 200, share)
    one = np.zeros(20, int)
    plug_in = stats.coverage(counts.sum(axis=0), 0.9).mean() - truth
    left = stats.bootstrap_debias(partial(stats.coverage, share=0.9), counts, one, 1, resamples=200)
    assert plug_in < -1.0
    assert abs(left.mean() - truth) < 0.5 * abs(plug_in)


def test_permutation_rejects_at_its_level_where_independent_tokens_reject_nearly_always():
    from scipy.stats import chi2_contingency

    rng = np.random.default_rng(6)
    counts = clustered(rng, 45, 400, np.full(8, 1 / 8))
    groups = np.repeat([0, 1, 2], 15)
    p, _ = stats.permutation_max(stats.share_difference, counts, groups, 3, permutations=199)
    rejected = (p.min(axis=2) <= 0.05).mean()  # any expert of a layer: the family-wise rate
    assert 0.03 <= rejected <= 0.075
    totals = stats.group_totals(counts, groups, 3)
    naive = [chi2_contingency(totals[:, layer]).pvalue <= 0.05 for layer in range(400)]
    assert np.mean(naive) > 0.95


def test_permutation_of_the_divergence_rejects_at_its_level_over_layers():
    rng = np.random.default_rng(7)
    rejected = []
    for _ in range(150):
        counts = clustered(rng, 24, 4, np.full(6, 1 / 6), length=60)
        p, _ = stats.permutation_max(stats.jensen_shannon, counts, np.repeat([0, 1], 12), 2, permutations=99)
        rejected.append(p[0].min() <= 0.05)
    assert 0.01 <= np.mean(rejected) <= 0.1


def test_a_planted_specialist_is_found_and_its_neighbours_are_not():
    rng = np.random.default_rng(8)
    usual = np.full(16, 1 / 16)
    special = usual + np.where(np.arange(16) == 5, 0.15, -0.01)
    counts = np.concatenate([clustered(rng, 20, 3, usual), clustered(rng, 20, 3, usual)])
    counts[20:, 1] = clustered(rng, 20, 1, special)[:, 0]
    p, _ = stats.permutation_max(stats.share_difference, counts, np.repeat([0, 1], 20), 2, permutations=499)
    assert p[1, 1, 5] == 1 / 500
    others = np.delete(p[1, 1], 5)
    assert (others > 0.05).all()
    assert (p[:, [0, 2]] > 0.01).all()


def test_intervals_of_spearman_hold_the_truth_and_know_when_they_cannot():
    rng, rho, hits = np.random.default_rng(5), 0.7, 0
    truth = 6 / np.pi * np.arcsin(rho / 2)  # of bivariate normal pairs (Pearson 1907)
    for _ in range(400):
        pairs = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=40).T
        low, high = stats.spearman_interval(float(stats.spearman(*pairs)), 40)
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.98
    assert np.isnan(stats.spearman_interval(0.5, 3)).all() and np.isnan(stats.spearman_interval(np.nan, 9)).all()
    assert stats.spearman_interval(1.0, 9).tolist() == [1, 1]
