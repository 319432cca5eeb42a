"""Intervals, nulls and measures of concentration, with the document as the unit. Pure numpy, seeded.

Tokens of one document are not independent: documents are resampled and their labels permuted, never tokens.

1. `bootstrap_ratio`, `bootstrap_mean`: percentile intervals of sum/sum and of means, stratified by domain
   (Efron & Tibshirani 1993, ch. 13). Resampling is a matrix of draw counts times per-document sums, so that
   a thousand resamples are one product.
2. `jackknife`, `bootstrap_debias`: plug-in statistics of counts are biased, and percentile intervals around
   them miss; these take the estimated bias off. The jackknife (ibid. ch. 11) is the better one where the
   statistic is smooth, such as a divergence. Order statistics jump: there it scatters by several times the
   bias, and the bootstrap (ibid. ch. 10) is the one to take.
3. `permutation_max`: permuted document labels, with single-step control over many tests at once by the
   permutation distribution of their maximum (Westfall & Young 1993, sec. 2.3).
4. `coverage`, `gini`, ...: how unequally counts are spread over experts.

Counts are [N, L, E]: documents, layers, experts. G groups are numbered 0 ... G-1 by an array [N].
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int, Num
from numpy.typing import ArrayLike

from moe_interp.errors import BadInput

Statistic = Callable[[np.ndarray], np.ndarray]
"""Totals [..., G, E] of the groups at one layer -> a value per group, [..., G]."""

Contrast = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Totals inside and outside a group at one layer, [R, E] each -> [R, E] (a value per expert) or [R]."""

_CHUNK = 1024  # documents left out at once: bounds the jackknife's memory


# 1. Intervals


def resampling_weights(strata: Int[np.ndarray, " N"], resamples: int, seed: int) -> Float[np.ndarray, "R N"]:
    """How often each resample draws each document: with replacement, as many per stratum as there are.

    Raises:
        BadInput: fewer than one resample.
    """
    if resamples < 1:
        raise BadInput("too few resamples", expected="at least 1", got=str(resamples))
    rng = np.random.default_rng(seed)
    weights = np.zeros((resamples, strata.size))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        equal = np.full(members.size, 1 / members.size)
        weights[:, members] = rng.multinomial(members.size, equal, size=resamples)
    return weights


def bootstrap_ratio(
    numerator: Num[np.ndarray, "N *rest"],
    denominator: Num[np.ndarray, "N *shared"],
    *,
    strata: Int[np.ndarray, " N"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Float[np.ndarray, "2 *rest"]:
    """Percentile interval of sum(numerator) / sum(denominator) over documents.

    Args:
        numerator: per document.
        denominator: per document; its further axes are the numerator's first ones, the others are shared.
        strata: a number per document; each resample has as many of a stratum as there are (None: one).
        resamples: how many.
        seed: of the resampling.
        level: coverage aimed at; with few documents it is somewhat lower.

    Returns:
        Lower and upper end, in the ratio's units. NaN where a stratum has fewer than two documents, which say
        nothing about the spread between documents, and where a resample's denominator is zero.
    """
    strata = np.zeros(len(numerator), int) if strata is None else strata
    ends = np.full((2, *numerator.shape[1:]), np.nan)
    if len(strata) == 0 or np.unique(strata, return_counts=True)[1].min() < 2:
        return ends
    weights = resampling_weights(strata, resamples, seed)
    tails = [(1 - level) / 2, (1 + level) / 2]
    if numerator.ndim == 1:
        return np.quantile(_resampled_ratios(weights, numerator, denominator), tails, axis=0)
    for layer in range(numerator.shape[1]):  # one at a time: memory is resamples x experts
        bottom = denominator if denominator.ndim == 1 else denominator[:, layer]
        ends[:, layer] = np.quantile(_resampled_ratios(weights, numerator[:, layer], bottom), tails, axis=0)
    return ends


def _resampled_ratios(weights: np.ndarray, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    top = np.tensordot(weights, numerator.astype(float), 1)
    return ratio(top, np.tensordot(weights, denominator.astype(float), 1))


def bootstrap_mean(
    values: Num[np.ndarray, "N *rest"],
    *,
    strata: Int[np.ndarray, " N"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Float[np.ndarray, "2 *rest"]:
    """Percentile interval of the mean over documents, as `bootstrap_ratio`. For pairs, pass differences."""
    ones = np.ones(len(values))
    return bootstrap_ratio(values, ones, strata=strata, resamples=resamples, seed=seed, level=level)


def student_interval(values: Num[np.ndarray, "N *rest"], *, level: float = 0.95) -> Float[np.ndarray, "2 *rest"]:
    """Student's interval of the mean of a few independent values, such as trials; for documents see `bootstrap_mean`.

    With five or ten values the percentile bootstrap is far too narrow.

    Returns:
        Lower and upper end; NaN for fewer than two values.
    """
    from scipy.stats import t

    if len(values) < 2:
        return np.full((2, *values.shape[1:]), np.nan)
    half = t.ppf((1 + level) / 2, len(values) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return np.stack([values.mean(axis=0) - half, values.mean(axis=0) + half])


# 2. Bias


def jackknife(
    statistic: Statistic, counts: Num[np.ndarray, "N L E"], groups: Int[np.ndarray, " N"], num_groups: int
) -> Float[np.ndarray, "G L"]:
    """A smooth plug-in statistic of group totals, its bias of order 1/n taken off by leaving out documents.

    theta - sum over groups g of (n_g - 1) (mean of theta without one document of g - theta). May leave the
    statistic's range: an unbiased estimate of a divergence of 0 is negative half of the time.

    Returns:
        A value per group and layer, in the statistic's units; NaN if any group has fewer than two documents.
    """
    sizes = np.bincount(groups, minlength=num_groups)
    corrected = np.full((num_groups, counts.shape[1]), np.nan)
    if sizes.min() < 2:
        return corrected
    share = ((sizes - 1) / sizes)[groups]
    for layer, (documents, totals) in enumerate(_by_layer(counts, groups, num_groups)):
        corrected[:, layer] = plug_in = statistic(totals)
        for start in range(0, len(groups), _CHUNK):
            part = slice(start, start + _CHUNK)
            without = np.repeat(totals[None], len(groups[part]), axis=0)
            without[np.arange(len(without)), groups[part]] -= documents[part]
            corrected[:, layer] -= share[part] @ (statistic(without) - plug_in)
    return corrected


def bootstrap_debias(
    statistic: Statistic,
    counts: Num[np.ndarray, "N L E"],
    groups: Int[np.ndarray, " N"],
    num_groups: int,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Float[np.ndarray, "G L"]:
    """A plug-in statistic of group totals, its bootstrap bias taken off: 2 theta - mean of resampled theta.

    For statistics that jump, such as how many experts take half of the load: leaving out one document rarely
    moves them, and then by a whole step.

    Returns:
        A value per group and layer, in the statistic's units; NaN if any group has fewer than two documents.
    """
    corrected = np.full((num_groups, counts.shape[1]), np.nan)
    if np.bincount(groups, minlength=num_groups).min() < 2:
        return corrected
    weights = resampling_weights(groups, resamples, seed)
    members = [np.flatnonzero(groups == group) for group in range(num_groups)]
    for layer, (documents, totals) in enumerate(_by_layer(counts, groups, num_groups)):
        drawn = np.stack([weights[:, own] @ documents[own] for own in members], axis=1)
        corrected[:, layer] = 2 * statistic(totals) - statistic(drawn).mean(axis=0)
    return corrected


def group_totals(
    counts: Num[np.ndarray, "N *rest"], groups: Int[np.ndarray, " N"], num_groups: int
) -> Num[np.ndarray, "G *rest"]:
    """Sums over the documents of each group, in the dtype of the counts."""
    totals = np.zeros((num_groups, *counts.shape[1:]), counts.dtype)
    np.add.at(totals, groups, counts)
    return totals


def _by_layer(counts: np.ndarray, groups: np.ndarray, num_groups: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each layer's counts [N, E] and group totals [G, E], as floats."""
    for layer in range(counts.shape[1]):
        documents = counts[:, layer].astype(float)
        yield documents, group_totals(documents, groups, num_groups)


# 3. Permutation


def permutation_max(
    contrast: Contrast,
    counts: Num[np.ndarray, "N L E"],
    groups: Int[np.ndarray, " N"],
    num_groups: int,
    *,
    permutations: int = 1000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "G L *rest"], Float[np.ndarray, "G L *rest"]]:
    """Is a group's contrast to all other documents larger than permuted document labels make it?

    Labels are permuted over all documents: for each group a test of "these documents are like the others",
    whatever the other groups are. Each contrast is standardised by its permutations, and the largest one of
    a family is held against the permutation distribution of the largest. The family is a layer's experts
    where the contrast gives a value per expert, a group's layers where it gives one per layer. Documents of
    different groups should have similar lengths: else their spread under the null differs.

    Returns:
        p, one-sided (larger than the null), 1/(permutations + 1) ... 1, family-wise error controlled; and
        the mean contrast over permutations, its control. Both [G, L, E] or [G, L]; NaN for a single group.
    """
    labels = np.tile(groups, (permutations + 1, 1))
    np.random.default_rng(seed).permuted(labels[1:], axis=1, out=labels[1:])
    layers = [(documents, totals.sum(axis=0)) for documents, totals in _by_layer(counts, groups, num_groups)]
    p_values, controls = [], []
    for group in range(num_groups):
        member = (labels == group).astype(float)
        permuted = np.stack(
            [contrast(inside := member @ documents, total - inside) for documents, total in layers], axis=1
        )
        p_values.append(max_statistic_p(permuted))
        controls.append(permuted[1:].mean(axis=0))
    return np.stack(p_values), np.stack(controls)


def max_statistic_p(permuted: Float[np.ndarray, "R *family M"]) -> Float[np.ndarray, "*family M"]:
    """Single-step adjusted p of M tests; row 0 of R has the observed labels, the others are permutations.

    p is the share of rows whose largest standardised statistic reaches the observed one, 1/R ... 1. A
    statistic that never varies cannot be tested and gets 1.
    """
    centred = permuted - permuted.mean(axis=0)
    spread = permuted.std(axis=0)
    z = np.divide(centred, spread, out=np.zeros_like(centred), where=spread != 0)
    largest = np.sort(z.max(axis=-1), axis=0)
    p = np.empty(permuted.shape[1:])
    for family in np.ndindex(p.shape[:-1]):
        reached = z[0][family] - 1e-9  # a tie counts, also where rounding parts it
        below = np.searchsorted(largest[(slice(None), *family)], reached, side="left")
        p[family] = (len(permuted) - below) / len(permuted)
    return np.where(np.isnan(z[0]), np.nan, p)


def share_difference(inside: Num[np.ndarray, "R E"], outside: Num[np.ndarray, "R E"]) -> Float[np.ndarray, "R E"]:
    """Each expert's share of the decisions inside a group minus that outside, -1 ... 1; 0 under the null."""
    return shares(inside) - shares(outside)


# 4. Concentration


def ratio(top: ArrayLike, bottom: ArrayLike) -> Float[np.ndarray, "..."]:
    """top / bottom, where bottom may lack trailing axes; NaN where bottom is 0."""
    over, under = np.asarray(top), np.asarray(bottom)
    under = under.reshape(under.shape + (1,) * (over.ndim - under.ndim))
    return np.divide(over, under, out=np.full(over.shape, np.nan), where=under != 0)


def shares(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest E"]:
    """Each expert's share of the counts, 0 ... 1; NaN where there are none."""
    return ratio(counts, counts.sum(axis=-1))


def coverage(counts: Num[np.ndarray, "*rest E"], share: float) -> Float[np.ndarray, "*rest"]:
    """Fewest experts that take a share of the decisions, 1 ... E; NaN where there are none."""
    taken = np.cumsum(-np.sort(-shares(counts), axis=-1), axis=-1)
    return np.where(np.isnan(taken[..., -1]), np.nan, (taken < share - 1e-12).sum(axis=-1) + 1.0)


def gini(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """Gini coefficient of the load: 0 (equal) ... 1 - 1/E (one expert takes all)."""
    experts = counts.shape[-1]
    rank = 2 * np.arange(1, experts + 1) - experts - 1
    return (np.sort(shares(counts), axis=-1) * rank).sum(axis=-1) / experts


def load_entropy(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """Entropy of the load over ln E: 0 (one expert takes all) ... 1 (equal)."""
    return _entropy(shares(counts)) / np.log(counts.shape[-1])


def max_vio(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """Largest over mean load, minus 1 (arXiv 2408.15664): 0 (equal) ... E - 1."""
    return shares(counts).max(axis=-1) * counts.shape[-1] - 1


def cv2(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """Squared coefficient of variation of the load: 0 (equal) ... E - 1."""
    return shares(counts).var(axis=-1) * counts.shape[-1] ** 2


def dead_experts(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """How many experts get less than a tenth of the mean load, 0 ... E - 1; NaN where there is no load."""
    total = counts.sum(axis=-1)
    dead = 10 * counts.shape[-1] * counts < total[..., None]  # exact, where shares would be rounded
    return np.where(total == 0, np.nan, dead.sum(axis=-1))


def jensen_shannon(
    inside: Num[np.ndarray, "*rest E"], outside: Num[np.ndarray, "*rest E"]
) -> Float[np.ndarray, "*rest"]:
    """Jensen-Shannon divergence of two loads in nats: 0 (equal) ... ln 2 (no expert in common)."""
    p, q = shares(inside), shares(outside)
    return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2


def divergence_from_rest(totals: Num[np.ndarray, "*rest G E"]) -> Float[np.ndarray, "*rest G"]:
    """Jensen-Shannon divergence of each group's load from that of all other groups pooled, in nats."""
    return jensen_shannon(totals, totals.sum(axis=-2, keepdims=True) - totals)


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
