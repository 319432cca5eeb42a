"""Tests by permutation and by flipping signs, with the document as the unit and many tests controlled at once.

1. `permutation_max`: labels of whole documents are permuted.
2. `sign_flip_max`: labels of single tokens cannot be permuted, for neighbours are alike; each document's
   difference between its own tokens with and without the label has its sign flipped instead, as a whole.
3. Both control the family-wise error by the distribution of the largest standardised statistic, in a single
   step (Westfall & Young 1993, sec. 2.3).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Num

from moe_interp.arguments import Draws, Seed, checked
from moe_interp.stats.measures import shares
from moe_interp.stats.resampling import by_layer

Contrast = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Totals inside and outside a group at one layer, [R, E] each -> [R, E] (a value per expert) or [R]."""


@checked
def permutation_max(
    contrast: Contrast,
    counts: Num[np.ndarray, "N L E"],
    groups: Int[np.ndarray, " N"],
    num_groups: int,
    *,
    permutations: Draws = 1000,
    seed: Seed = 0,
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

    Raises:
        BadInput: no permutation.
    """
    labels = np.tile(groups, (permutations + 1, 1))
    np.random.default_rng(seed).permuted(labels[1:], axis=1, out=labels[1:])
    layers = [(documents, totals.sum(axis=0)) for documents, totals in by_layer(counts, groups, num_groups)]
    p_values, controls = [], []
    for group in range(num_groups):
        member = (labels == group).astype(float)
        permuted = np.stack(
            [contrast(inside := member @ documents, total - inside) for documents, total in layers], axis=1
        )
        p_values.append(max_statistic_p(permuted))
        controls.append(permuted[1:].mean(axis=0))
    return np.stack(p_values), np.stack(controls)


def permutation_p(observed: float, permuted: Float[np.ndarray, " M"]) -> float:
    """Share of permutations, the identity included, whose statistic reaches the observed one; NaN if that is NaN."""
    reached = (permuted >= observed - 1e-12).sum()
    return float((1 + reached) / (1 + len(permuted))) if np.isfinite(observed) else np.nan


@checked
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


@checked
def share_difference(inside: Num[np.ndarray, "R E"], outside: Num[np.ndarray, "R E"]) -> Float[np.ndarray, "R E"]:
    """Each expert's share of the decisions inside a group minus that outside, -1 ... 1; 0 under the null."""
    return shares(inside) - shares(outside)


@checked
def sign_flip_max(
    differences: Float[np.ndarray, "N *family M"], *, flips: Draws = 1000, seed: Seed = 0
) -> Float[np.ndarray, "*family M"]:
    """Is the sum of per-document differences larger than chance makes it?

    Under the null a document's difference is as likely to have either sign. All of a document's differences are
    flipped together, which keeps how they depend on each other; sums are divided by the root of the sum of squares,
    which no flip changes.

    Returns:
        p, one-sided (larger than 0), 1/(flips + 1) ... 1, adjusted for the M tests of a family by the largest
        statistic; 1 where all differences are 0, NaN with fewer than two documents.

    Raises:
        BadInput: no flip.
    """
    documents, *family, tests = differences.shape
    if documents < 2:
        return np.full((*family, tests), np.nan)
    if not tests:  # such as the pairs of a single expert
        return np.empty((*family, tests))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips + 1, documents))
    signs[0] = 1.0
    p = np.empty((*family, tests))
    for place in np.ndindex(*family):  # one family at a time: memory is flips x tests
        mine = differences[(slice(None), *place)]
        size = np.sqrt((mine**2).sum(axis=0))
        z = np.divide(signs @ mine, size, out=np.zeros((flips + 1, tests)), where=size > 0)
        largest = np.sort(z.max(axis=1))
        p[place] = np.where(size > 0, (flips + 1 - np.searchsorted(largest, z[0] - 1e-9)) / (flips + 1), 1.0)
    return p
