"""Intervals and debiasing by resampling documents.

1. `bootstrap_ratio`, `bootstrap_mean`: percentile intervals of sum/sum and of means, stratified by domain
   (Efron & Tibshirani 1993, ch. 13), expanded so that they cover with few documents too. Resampling is a
   matrix of draw counts times per-document sums, so that a thousand resamples are one product.
2. `jackknife`, `bootstrap_debias`: plug-in statistics of counts are biased, and percentile intervals around
   them miss; these take the estimated bias off. The jackknife (ibid. ch. 11) is the better one where the
   statistic is smooth, such as a divergence. Order statistics jump: there it scatters by several times the
   bias, and the bootstrap (ibid. ch. 10) is the one to take.
3. `block_jackknife`: estimate and interval of a statistic of tables too large to keep for every document, from
   the tables of a few blocks of documents (Kott 2001, "The delete-a-group jackknife", eq. 1).
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int, Num

from moe_interp.errors import BadInput
from moe_interp.stats.measures import ratio

Statistic = Callable[[np.ndarray], np.ndarray]
"""Totals [..., G, E] of the groups at one layer -> a value per group, [..., G]."""

_CHUNK = 1024  # documents left out at once: bounds the jackknife's memory


# Intervals


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
    """Expanded percentile interval of sum(numerator) / sum(denominator) over documents.

    Args:
        numerator: per document.
        denominator: per document; its further axes are the numerator's first ones, the others are shared.
        strata: a number per document; each resample has as many of a stratum as there are (None: one).
        resamples: how many.
        seed: of the resampling.
        level: coverage aimed at; `tails` says how it is kept with few documents.

    Returns:
        Lower and upper end, in the ratio's units. NaN where a stratum has fewer than two documents, which say
        nothing about the spread between documents, and where a resample's denominator is zero.
    """
    strata = np.zeros(len(numerator), int) if strata is None else strata
    ends = np.full((2, *numerator.shape[1:]), np.nan)
    if len(strata) == 0 or np.unique(strata, return_counts=True)[1].min() < 2:
        return ends
    weights = resampling_weights(strata, resamples, seed)
    quantiles = tails(strata, level)
    if numerator.ndim == 1:
        return np.quantile(_resampled_ratios(weights, numerator, denominator), quantiles, axis=0)
    for layer in range(numerator.shape[1]):  # one at a time: memory is resamples x experts
        bottom = denominator if denominator.ndim == 1 else denominator[:, layer]
        ends[:, layer] = np.quantile(_resampled_ratios(weights, numerator[:, layer], bottom), quantiles, axis=0)
    return ends


def tails(strata: Int[np.ndarray, " N"], level: float) -> tuple[float, float]:
    """Which quantiles of the resampled values bound the interval.

    Plain percentiles are too narrow with few documents: resampling has the spread of n in place of n - 1, and knows no
    t distribution. The expanded ones (Hesterberg 2015, Am. Stat. 69, 371, sec. 5.3) have the tail of the normal
    distribution at t_(n-1) sqrt(n / (n-1)); with S strata n - S takes the place of n - 1.
    """
    from scipy.stats import norm, t

    free = strata.size - np.unique(strata).size
    tail = float(norm.cdf(np.sqrt(strata.size / free) * t.ppf((1 - level) / 2, free)))
    return tail, 1 - tail


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

    Resamples of three or five values never leave their range, so that no quantile of theirs is wide enough.

    Returns:
        Lower and upper end; NaN for fewer than two values.
    """
    from scipy.stats import t

    if len(values) < 2:
        return np.full((2, *values.shape[1:]), np.nan)
    half = t.ppf((1 + level) / 2, len(values) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return np.stack([values.mean(axis=0) - half, values.mean(axis=0) + half])


# Bias


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
    for layer, (documents, totals) in enumerate(by_layer(counts, groups, num_groups)):
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
    for layer, (documents, totals) in enumerate(by_layer(counts, groups, num_groups)):
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


def by_layer(counts: np.ndarray, groups: np.ndarray, num_groups: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each layer's counts [N, E] and group totals [G, E], as floats."""
    for layer in range(counts.shape[1]):
        documents = counts[:, layer].astype(float)
        yield documents, group_totals(documents, groups, num_groups)


def block_jackknife(
    statistic: Callable[[np.ndarray], np.ndarray],
    blocks: Num[np.ndarray, "Z *table"],
    *,
    debias: bool = True,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, "*out"], Float[np.ndarray, "2 *out"]]:
    """A statistic of summed tables with an interval over blocks of documents, its bias of order 1/n taken off.

    theta - (Z - 1) (mean of theta without a block - theta), and that plus or minus the quantile of Student's t with
    Z - 1 degrees of freedom times the delete-a-group standard error.

    Args:
        statistic: of the sum of tables.
        blocks: a table for each block of documents; empty ones are left out, Z counts the others.
        debias: whether to take the bias off; not for a difference from a null with the same bias.
        level: coverage aimed at.

    Returns:
        The estimate, and lower and upper end of its interval; both may leave the statistic's range. NaN with fewer
        than two blocks that hold anything.
    """
    from scipy.stats import t

    held = blocks[blocks.reshape(len(blocks), -1).any(axis=1)]
    total = held.sum(axis=0)
    whole = np.asarray(statistic(total), float)
    count = len(held)
    if count < 2:
        return np.full_like(whole, np.nan), np.full((2, *whole.shape), np.nan)
    without = np.stack([statistic(total - one) for one in held])
    centre = without.mean(axis=0)
    error = np.sqrt((count - 1) / count * ((without - centre) ** 2).sum(axis=0))
    estimate = whole - (count - 1) * (centre - whole) if debias else whole
    half = t.ppf((1 + level) / 2, count - 1) * error
    return estimate, np.stack([estimate - half, estimate + half])
