"""Measures of counts: how unequally they are spread over experts, how far two loads are apart, how two choices depend.

Pure functions of arrays whose last axes are experts; NaN where there are no counts. A single load or table gives an
array without axes (numpy would make a scalar of it, which is no array).
"""

import numpy as np
from jaxtyping import Float, Num
from numpy.typing import ArrayLike

from moe_interp.arguments import Fraction, checked


@checked
def ratio(top: ArrayLike, bottom: ArrayLike) -> Float[np.ndarray, "..."]:
    """top / bottom, where bottom may lack trailing axes; NaN where bottom is 0."""
    over, under = np.asarray(top), np.asarray(bottom)
    under = under.reshape(under.shape + (1,) * (over.ndim - under.ndim))
    return np.divide(over, under, out=np.full(over.shape, np.nan), where=under != 0)


@checked
def shares(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest E"]:
    """Each expert's share of the counts, 0 ... 1; NaN where there are none."""
    return ratio(counts, counts.sum(axis=-1))


@checked
def coverage(counts: Num[np.ndarray, "*rest E"], share: Fraction) -> Float[np.ndarray, "*rest"]:
    """Fewest experts that take a share of the decisions, 1 ... E; NaN where there are none."""
    taken = np.cumsum(-np.sort(-shares(counts), axis=-1), axis=-1)
    return np.where(np.isnan(taken[..., -1]), np.nan, (taken < share - 1e-12).sum(axis=-1) + 1.0)


@checked
def gini(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """Gini coefficient of the load: 0 (equal) ... 1 - 1/E (one expert takes all)."""
    experts = counts.shape[-1]
    rank = 2 * np.arange(1, experts + 1) - experts - 1
    return np.asarray((np.sort(shares(counts), axis=-1) * rank).sum(axis=-1) / experts)


@checked
def load_entropy(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """Entropy of the load over ln E: 0 (one expert takes all) ... 1 (equal)."""
    return np.asarray(_entropy(shares(counts)) / np.log(counts.shape[-1]))


@checked
def max_vio(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """Largest over mean load, minus 1 (arXiv 2408.15664): 0 (equal) ... E - 1."""
    return np.asarray(shares(counts).max(axis=-1) * counts.shape[-1] - 1)


@checked
def cv2(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """Squared coefficient of variation of the load: 0 (equal) ... E - 1."""
    return np.asarray(shares(counts).var(axis=-1) * counts.shape[-1] ** 2)


@checked
def dead_experts(counts: Num[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """How many experts get less than a tenth of the mean load, 0 ... E - 1; NaN where there is no load."""
    total = counts.sum(axis=-1)
    dead = 10 * counts.shape[-1] * counts < total[..., None]  # exact, where shares would be rounded
    return np.where(total == 0, np.nan, dead.sum(axis=-1))


@checked
def jensen_shannon(
    inside: Num[np.ndarray, "*rest E"], outside: Num[np.ndarray, "*rest E"]
) -> Float[np.ndarray, "*rest"]:
    """Jensen-Shannon divergence of two loads in nats: 0 (equal) ... ln 2 (no expert in common)."""
    p, q = shares(inside), shares(outside)
    return np.asarray(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


@checked
def divergence_from_rest(totals: Num[np.ndarray, "*rest G E"]) -> Float[np.ndarray, "*rest G"]:
    """Jensen-Shannon divergence of each group's load from that of all other groups pooled, in nats."""
    return jensen_shannon(totals, totals.sum(axis=-2, keepdims=True) - totals)


def _entropy(p: np.ndarray) -> np.ndarray:
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1))


@checked
def mutual_information(joint: Num[np.ndarray, "*rest E F"]) -> Float[np.ndarray, "*rest"]:
    """Mutual information of the two axes of a table of counts in nats: 0 (independent) ... ln min(E, F)."""
    p = ratio(joint, joint.sum(axis=(-2, -1)))
    return np.asarray(_entropy(p.sum(axis=-1)) + _entropy(p.sum(axis=-2)) - _entropy(p.reshape(*p.shape[:-2], -1)))


@checked
def lift(
    joint: Num[np.ndarray, "*rest E F"],
    rows: Num[np.ndarray, "*rest E"],
    columns: Num[np.ndarray, "*rest F"],
    total: ArrayLike,
) -> Float[np.ndarray, "*rest E F"]:
    """N_ij T / (N_i N_j): how many times as often two go together as if they were independent, 0 ...

    NaN if one of them never occurs. Independent is 1;
    K distinct draws of E equal experts are not independent and have (K - 1) E / (K (E - 1)).
    """
    expected = rows[..., :, None].astype(float) * columns[..., None, :]
    return ratio(joint * np.asarray(total, float)[..., None, None], expected)


@checked
def npmi(
    joint_lift: Float[np.ndarray, "*rest E F"], joint_share: Float[np.ndarray, "*rest E F"]
) -> Float[np.ndarray, "*rest E F"]:
    """Normalised pointwise mutual information, ln(lift) / -ln(N_ij / T): -1 (never together) ... 1 (always)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(joint_lift) / -np.log(joint_share)
    found = np.where(joint_share >= 1, 1.0, np.where(joint_share <= 0, -1.0, found))
    return np.where(np.isnan(joint_lift), np.nan, found)


def ranks(values: Float[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest E"]:
    """Ranks along the last axis, 1 for the smallest, ties shared (their mean)."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=-1))


@checked
def spearman(left: Float[np.ndarray, "*rest E"], right: Float[np.ndarray, "*rest E"]) -> Float[np.ndarray, "*rest"]:
    """Rank correlation along the last axis, -1 ... 1; NaN where one side does not vary."""
    one, other = (values - values.mean(axis=-1, keepdims=True) for values in (ranks(left), ranks(right)))
    return ratio((one * other).sum(axis=-1), np.sqrt((one**2).sum(axis=-1) * (other**2).sum(axis=-1)))


def spearman_interval(rho: float, count: int, level: Fraction = 0.95) -> Float[np.ndarray, "2"]:
    """Interval of Spearman's rank correlation of ``count`` independent pairs.

    Fisher's z with the standard error sqrt((1 + rho^2 / 2) / (n - 3)) (Bonett & Wright 2000, Psychometrika 65, 23).

    Returns:
        Lower and upper end, -1 ... 1; NaN for fewer than four pairs.
    """
    from scipy.stats import norm

    if count < 4 or np.isnan(rho):
        return np.full(2, np.nan)
    half = norm.ppf((1 + level) / 2) * np.sqrt((1 + rho**2 / 2) / (count - 3))
    with np.errstate(divide="ignore"):  # of -1 or 1, which is its own interval
        return np.tanh(np.arctanh(np.clip(rho, -1, 1)) + np.array([-half, half]))
