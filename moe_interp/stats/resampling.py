"""Intervals and debiasing by resampling documents.

1. `bootstrap_ratio`, `bootstrap_mean`: studentised intervals of sum/sum and of means, stratified by domain
   (Efron & Tibshirani 1993, sec. 12.5; Hall 1988, Ann. Stat. 16, 927); Student's with few documents. Resampling is a
   matrix of draw counts times per-document sums and products, so that a thousand resamples, and their standard
   errors, are a few products.
2. `jackknife`, `bootstrap_debias`: plug-in statistics of counts are biased, and intervals around
   them miss; these take the estimated bias off. The jackknife (ibid. ch. 11) is the better one where the
   statistic is smooth, such as a divergence. Order statistics jump: there it scatters by several times the
   bias, and the bootstrap (ibid. ch. 10) is the one to take.
3. `block_jackknife`: estimate and interval of a statistic of tables too large to keep for every document, from
   the tables of a few blocks of documents (Kott 2001, "The delete-a-group jackknife", eq. 1).
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from jaxtyping import Float, Int, Num

from moe_interp.arguments import Draws, Fraction, Seed, checked
from moe_interp.stats.measures import ratio

Statistic = Callable[[np.ndarray], np.ndarray]
"""Totals [..., G, E] of the groups at one layer -> a value per group, [..., G]."""

FEW = 5  # documents, below which resamples are too alike to say how far the truth may be
_CHUNK = 1024  # documents left out at once: bounds the jackknife's memory


# Intervals


@checked
def resampling_weights(strata: Int[np.ndarray, " N"], resamples: Draws, seed: Seed) -> Float[np.ndarray, "R N"]:
    """How often each resample draws each document: with replacement, as many per stratum as there are.

    Raises:
        BadInput: fewer than one resample.
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((resamples, strata.size))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        equal = np.full(members.size, 1 / members.size)
        weights[:, members] = rng.multinomial(members.size, equal, size=resamples)
    return weights


@checked
def bootstrap_ratio(
    numerator: Num[np.ndarray, "N *rest"],
    denominator: Num[np.ndarray, "N *shared"],
    *,
    strata: Int[np.ndarray, " N"] | None = None,
    resamples: Draws = 1000,
    seed: Seed = 0,
    level: Fraction = 0.95,
) -> Float[np.ndarray, "2 *rest"]:
    """Studentised interval of sum(numerator) / sum(denominator) over documents.

    The ratio minus the quantiles of t* times its standard error: t* is a resample's deviation over the resample's own
    standard error (of the linearised ratio, Cochran 1977, eq. 6.13). So it knows skewness and few documents, of which
    plain percentiles know nothing. Where denominators have one sign, no ratio of sums leaves the range of documents'
    ratios: the interval is cut there.

    With fewer than five documents that have a denominator resamples are too alike: cut at their range, two documents
    held the truth in half of all cases. There it is Student's interval with as many degrees of freedom as such
    documents less strata, and the same standard error, which may leave the ratio's range.

    Args:
        numerator: per document; 0 where the denominator is.
        denominator: per document; its further axes are the numerator's first ones, the others are shared.
        strata: a number per document; each resample has as many of a stratum as there are (None: one).
        resamples: how many.
        seed: of the resampling.
        level: coverage aimed at.

    Returns:
        Lower and upper end, in the ratio's units. NaN where a stratum has fewer than two documents, which say
        nothing about the spread between documents, and where fewer than two documents have a denominator. Resamples
        without one are left out.
    """
    strata = np.zeros(len(numerator), int) if strata is None else strata
    ends = np.full((2, *numerator.shape[1:]), np.nan)
    if len(strata) == 0 or np.unique(strata, return_counts=True)[1].min() < 2:
        return ends
    weights = resampling_weights(strata, resamples, seed) if len(strata) >= FEW else None
    interval = partial(_interval, weights, strata=strata, level=level)
    if numerator.ndim == 1:
        return interval(top=numerator, bottom=denominator)
    for layer in range(numerator.shape[1]):  # one at a time: memory is resamples x experts
        bottom = denominator if denominator.ndim == 1 else denominator[:, layer]
        ends[:, layer] = interval(top=numerator[:, layer], bottom=bottom)
    return ends


@checked
def bootstrap_by_group(
    numerator: Num[np.ndarray, "N *rest"],
    denominator: Num[np.ndarray, "N *shared"],
    groups: Int[np.ndarray, " N"],
    count: int,
    resamples: Draws,
    seed: Seed,
) -> Float[np.ndarray, "2 G *rest"]:
    """`bootstrap_ratio` of the documents of each group, 0 ... count - 1, which draws with a seed of its own."""
    parts = ((numerator[groups == group], denominator[groups == group]) for group in range(count))
    ends = [bootstrap_ratio(*part, resamples=resamples, seed=seed + group) for group, part in enumerate(parts)]
    return np.stack(ends, axis=1)


def _interval(
    weights: Float[np.ndarray, "R N"] | None,
    top: Num[np.ndarray, "N *rest"],
    bottom: Num[np.ndarray, "N *shared"],
    strata: Int[np.ndarray, " N"],
    level: Fraction,
) -> Float[np.ndarray, "2 *rest"]:
    """Studentised where enough documents have a denominator, else Student's."""
    few = np.asarray((bottom != 0).sum(axis=0) < FEW)
    if weights is None or few.all():
        return _student(top, bottom, strata, level)
    ends = _studentised(weights, top, bottom, strata, level)
    if not few.any():
        return ends
    few = few.reshape(few.shape + (1,) * (top.ndim - 1 - few.ndim))
    return np.where(few, _student(top, bottom, strata, level), ends)


def _studentised(
    weights: Float[np.ndarray, "R N"],
    top: Num[np.ndarray, "N *rest"],
    bottom: Num[np.ndarray, "N *shared"],
    strata: Int[np.ndarray, " N"],
    level: Fraction,
) -> Float[np.ndarray, "2 *rest"]:
    whole, residual, under = _linearised(top, bottom)
    drawn = np.tensordot(weights, under, 1)
    shift = ratio(np.tensordot(weights, residual, 1), drawn)
    squares = _spread(weights, residual, under, strata, shift)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample without spread is infinitely far away
        t = np.where(shift == 0, 0.0, shift * np.abs(drawn) / np.sqrt(squares))
        own = np.where(under != 0, top / under, np.nan)
        ends = whole - _outer(t, level) * _error(residual, under, strata)
    one_sign = (under >= 0).all(axis=0) | (under <= 0).all(axis=0)
    cut = np.clip(ends, np.fmin.reduce(own, axis=0), np.fmax.reduce(own, axis=0))
    return np.where(one_sign, cut, ends)


def _student(
    top: Num[np.ndarray, "N *rest"],
    bottom: Num[np.ndarray, "N *shared"],
    strata: Int[np.ndarray, " N"],
    level: Fraction,
) -> Float[np.ndarray, "2 *rest"]:
    from scipy.stats import t

    whole, residual, under = _linearised(top, bottom)
    freedom = (under != 0).sum(axis=0) - len(np.unique(strata))  # of documents that have anything; NaN if none is left
    with np.errstate(divide="ignore", invalid="ignore"):
        half = t.ppf((1 + level) / 2, freedom) * _error(residual, under, strata)
    return np.stack([whole - half, whole + half])


def _linearised(
    top: Num[np.ndarray, "N *rest"], bottom: Num[np.ndarray, "N *shared"]
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "N *rest"], Float[np.ndarray, "N *ones"]]:
    """The ratio, each document's residual of it, and the denominators, broadcast."""
    under = bottom.astype(float).reshape(bottom.shape + (1,) * (top.ndim - bottom.ndim))
    whole = ratio(top.sum(axis=0), bottom.sum(axis=0))
    return whole, top - whole * under, under  # residuals sum to 0, and are small: nothing cancels in their squares


def _error(residual: np.ndarray, under: np.ndarray, strata: np.ndarray) -> Float[np.ndarray, "*rest"]:
    """Standard error of the linearised ratio (Cochran 1977, eq. 6.13)."""
    squares = _spread(np.ones((1, len(residual))), residual, under, strata, np.zeros(1))[0]
    return np.asarray(np.sqrt(squares) / np.abs(under.sum(axis=0)))


def _outer(t: Float[np.ndarray, "R *rest"], level: Fraction) -> Float[np.ndarray, "2 *rest"]:
    """The values of rank (R + 1) (1 +- level) / 2 along the first axis, the higher first, of the R that are not NaN."""
    left = np.count_nonzero(~np.isnan(t), axis=0)
    rank = np.maximum(1, np.floor((left + 1) * (1 - level) / 2 + 1e-9)).astype(int)
    places = np.maximum(np.stack([left - rank, rank - 1]), 0)
    return np.take_along_axis(np.sort(t, axis=0), places, axis=0)  # which puts NaN last


def _spread(
    weights: np.ndarray, residual: np.ndarray, under: np.ndarray, strata: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Estimated variance of the sum of residual - shift * under within strata, for every resample."""
    total = np.zeros(1)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        one, other, drawn, count = residual[members], under[members], weights[:, members], len(members)
        sums = [np.tensordot(drawn, part, 1) for part in (one, other, one**2, one * other, other**2)]
        shift = shift.reshape(shift.shape + (1,) * (sums[0].ndim - shift.ndim))
        squares = sums[2] - 2 * shift * sums[3] + shift**2 * sums[4]
        total = total + count / (count - 1) * (squares - (sums[0] - shift * sums[1]) ** 2 / count)
    return np.maximum(total, 0.0)


@checked
def bootstrap_mean(
    values: Num[np.ndarray, "N *rest"],
    *,
    strata: Int[np.ndarray, " N"] | None = None,
    resamples: Draws = 1000,
    seed: Seed = 0,
    level: Fraction = 0.95,
) -> Float[np.ndarray, "2 *rest"]:
    """Interval of the mean over documents, as `bootstrap_ratio`. For pairs, pass differences."""
    ones = np.ones(len(values))
    return bootstrap_ratio(values, ones, strata=strata, resamples=resamples, seed=seed, level=level)


@checked
def student_interval(values: Num[np.ndarray, "N *rest"], *, level: Fraction = 0.95) -> Float[np.ndarray, "2 *rest"]:
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


@checked
def jackknife_interval(
    statistic: Callable[[Int[np.ndarray, " M"]], float], count: int, *, level: Fraction = 0.95
) -> Float[np.ndarray, " 2"]:
    """Student's interval of the pseudo-values of a smooth statistic of a few trials (Tukey 1958, Arvesen 1969).

    Pseudo-value i is N theta - (N - 1) theta without trial i. Where the statistic hardly depends on any one trial, as
    the correlation of two classes over two experts, which is 1 or -1, the interval is too narrow.

    Args:
        statistic: of the trials that are kept, given by number.
        count: N trials.

    Returns:
        Lower and upper end; NaN for fewer than two trials.
    """
    if count < 2:
        return np.full(2, np.nan)
    every = np.arange(count)
    without = np.array([statistic(np.delete(every, one)) for one in every])
    return student_interval(count * statistic(every) - (count - 1) * without, level=level)


# Bias


@checked
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


@checked
def bootstrap_debias(
    statistic: Statistic,
    counts: Num[np.ndarray, "N L E"],
    groups: Int[np.ndarray, " N"],
    num_groups: int,
    *,
    resamples: Draws = 1000,
    seed: Seed = 0,
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


@checked
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


@checked
def block_jackknife(
    statistic: Callable[[np.ndarray], np.ndarray],
    blocks: Num[np.ndarray, "Z *table"],
    *,
    debias: bool = True,
    level: Fraction = 0.95,
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
        The estimate, and lower and upper end of its interval; both may leave the statistic's range. With fewer than
        two blocks that hold anything the interval is NaN, and so is an estimate whose bias was to be taken off.
    """
    from scipy.stats import t

    held = blocks[blocks.reshape(len(blocks), -1).any(axis=1)]
    total = held.sum(axis=0)
    whole = np.asarray(statistic(total), float)
    count = len(held)
    if count < 2:
        return np.full_like(whole, np.nan) if debias else whole, np.full((2, *whole.shape), np.nan)
    without = np.stack([statistic(total - one) for one in held])
    centre = without.mean(axis=0)
    error = np.sqrt((count - 1) / count * ((without - centre) ** 2).sum(axis=0))
    estimate = whole - (count - 1) * (centre - whole) if debias else whole
    half = t.ppf((1 + level) / 2, count - 1) * error
    return estimate, np.stack([estimate - half, estimate + half])
