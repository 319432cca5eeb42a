"""Intervals, nulls and measures, with the document as the unit. Pure numpy, seeded.

Tokens of one document are not independent: documents are resampled and their labels permuted, never tokens.

`resampling` has intervals and debiasing, `permutation` tests with control over many at once, `draws` what K distinct
experts would look like if nothing but the load of each mattered, `measures` the statistics themselves. Counts are
[N, L, E]: documents, layers, experts. G groups are numbered 0 ... G-1 by an array [N].
"""

from moe_interp.stats.draws import distinct_draws, inclusion_weights, largest_share_null, pair_inclusion, uniform_counts
from moe_interp.stats.measures import (
    coverage,
    cv2,
    dead_experts,
    divergence_from_rest,
    gini,
    jensen_shannon,
    lift,
    load_entropy,
    max_vio,
    mutual_information,
    npmi,
    ratio,
    shares,
    spearman,
    spearman_interval,
)
from moe_interp.stats.permutation import (
    max_statistic_p,
    permutation_max,
    permutation_p,
    share_difference,
    sign_flip_max,
)
from moe_interp.stats.resampling import (
    block_jackknife,
    bootstrap_by_group,
    bootstrap_debias,
    bootstrap_mean,
    bootstrap_ratio,
    group_totals,
    jackknife,
    jackknife_interval,
    resampling_weights,
    student_interval,
)

__all__ = [
    "block_jackknife",
    "bootstrap_by_group",
    "bootstrap_debias",
    "bootstrap_mean",
    "bootstrap_ratio",
    "coverage",
    "cv2",
    "dead_experts",
    "distinct_draws",
    "divergence_from_rest",
    "gini",
    "group_totals",
    "inclusion_weights",
    "jackknife",
    "jackknife_interval",
    "jensen_shannon",
    "largest_share_null",
    "lift",
    "load_entropy",
    "max_statistic_p",
    "max_vio",
    "mutual_information",
    "npmi",
    "pair_inclusion",
    "permutation_max",
    "permutation_p",
    "ratio",
    "resampling_weights",
    "share_difference",
    "shares",
    "sign_flip_max",
    "spearman",
    "spearman_interval",
    "student_interval",
    "uniform_counts",
]
