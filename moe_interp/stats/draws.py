"""K distinct experts drawn with given loads and nothing else: the null of everything about sets of experts.

Of all ways to draw K distinct of E experts in which expert e is among them with probability pi_e, the one of largest
entropy gives a set a probability proportional to the product of its weights w_e (conditional Poisson sampling; Chen,
Dempster & Liu 1994, Biometrika 81, 457). With R(k, A) the elementary symmetric polynomial of degree k of the weights in
A:

1. `inclusion_weights` finds w from pi: with p_e = w_e R(K-1, all but e) / R(K, all), the chance that w gives, each
   weight is multiplied by the root of the odds of pi_e over those of p_e until they agree. (The odds themselves are
   the exact step for one weight and overshoot when all move; the published step, pi_e / p_e, takes thousands of
   rounds where an expert is nearly always chosen.)
2. `pair_inclusion`: pi_ij = w_i w_j R(K-2, all but i and j) / R(K, all).
3. `distinct_draws` goes through the experts in turn and takes each with the probability that its weight and the sets
   still possible give it.
4. `uniform_counts`: how many of n tokens draw each expert where all are alike.
5. `largest_share_null`: the mean over draws of the largest count / n of n tokens, which is far above the largest pi
   where n is small.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_interp.arguments import Count, Draws, Number, Seed, checked

_ROUNDS = 2000


@checked
def inclusion_weights(inclusion: Float[np.ndarray, " E"]) -> Float[np.ndarray, " E"]:
    """Weights under which each expert is drawn with its given probability.

    Args:
        inclusion: 0 ... 1, summing to the whole number K. Probabilities above 1 - 1e-9 are taken for that.

    Returns:
        Weights that sum to K. An expert that is never drawn has weight 0.
    """
    draws = round(float(inclusion.sum()))
    if np.count_nonzero(inclusion) <= draws:
        return (inclusion > 0).astype(float)
    wanted = np.minimum(inclusion, 1 - 1e-9)
    certain = inclusion > wanted
    if not certain.all():
        wanted[~certain] *= (draws - wanted[certain].sum()) / max(wanted[~certain].sum(), 1e-300)
    weights = wanted.copy()
    for _ in range(_ROUNDS):
        found = _inclusion(weights, draws)
        if np.abs(found - wanted).max() < 1e-9:
            break
        odds = np.divide(wanted * (1 - found), found * (1 - wanted), out=np.zeros_like(weights), where=found > 0)
        weights *= np.sqrt(odds)
        weights *= draws / weights.sum()
    return weights


@checked
def pair_inclusion(weights: Float[np.ndarray, " E"], draws: Number) -> Float[np.ndarray, "E E"]:
    """Probability that two experts are among the K drawn; on the diagonal that of one."""
    experts = len(weights)
    without = np.where(np.eye(experts, dtype=bool), 0.0, weights)  # a weight of 0 is an expert left out
    whole = _suffixes(weights, draws)[0, draws]
    rest = _leave_one_out(without, draws)[..., draws - 2] if draws > 1 else np.zeros((experts, experts))
    pairs = weights[:, None] * weights * rest / whole
    np.fill_diagonal(pairs, _inclusion(weights, draws))
    return pairs


def _inclusion(weights: Float[np.ndarray, " E"], draws: Number) -> Float[np.ndarray, " E"]:
    return weights * _leave_one_out(weights, draws)[:, draws - 1] / _suffixes(weights, draws)[0, draws]


def _suffixes(weights: Float[np.ndarray, "*rest E"], degree: int) -> Float[np.ndarray, "n *rest k"]:
    """Elementary symmetric polynomials of degree 0 ... K of the weights from e on, for e = 0 ... E."""
    experts = weights.shape[-1]
    sums = np.zeros((experts + 1, *weights.shape[:-1], degree + 1))
    sums[experts, ..., 0] = 1.0
    for expert in reversed(range(experts)):
        sums[expert] = sums[expert + 1]
        sums[expert, ..., 1:] += weights[..., expert, None] * sums[expert + 1, ..., :-1]
    return sums


def _leave_one_out(weights: Float[np.ndarray, "*rest E"], degree: int) -> Float[np.ndarray, "*rest E k"]:
    """The same of all weights but one, each left out in turn: those before times those after, which cancels nothing."""
    after = _suffixes(weights, degree)[1:]
    before = _suffixes(weights[..., ::-1], degree)[:0:-1]
    products = np.zeros_like(after)
    for power in range(degree + 1):
        products[..., power:] += before[..., power, None] * after[..., : degree + 1 - power]
    return np.moveaxis(products, 0, -2)


@checked
def distinct_draws(
    weights: Float[np.ndarray, " E"], draws: Number, tokens: int, rng: np.random.Generator
) -> Bool[np.ndarray, "T E"]:
    """Which K experts each of T tokens draws, independently of each other."""
    sums = _suffixes(weights, draws)
    left = np.full(tokens, draws)
    taken = np.zeros((tokens, len(weights)), dtype=bool)
    for expert, weight in enumerate(weights):
        chance = weight * sums[expert + 1, np.maximum(left, 1) - 1] / sums[expert, left]
        taken[:, expert] = (rng.random(tokens) < chance) & (left > 0)
        left -= taken[:, expert]
    return taken


@checked
def uniform_counts(
    tokens: Int[np.ndarray, " X"], experts: int, draws: Number, repeats: Draws, rng: np.random.Generator
) -> Int[np.ndarray, "R X E"]:
    """How many of so many tokens draw each expert, where each draws K distinct ones and all are equally likely.

    One expert after the other: of the tokens that have k draws left, each takes the expert with chance k over the
    experts left.

    Args:
        tokens: of each case.
        experts: E.
        draws: K.
        repeats: R, how often all of it is drawn.
        rng: where from.
    """
    left = np.zeros((draws + 1, repeats, len(tokens)), np.int64)  # tokens with 0 ... K draws left
    left[draws] = tokens
    counts = np.empty((repeats, len(tokens), experts), np.int64)
    for expert in range(experts):
        chance = np.minimum(np.arange(1, draws + 1) / (experts - expert), 1.0)
        taken = rng.binomial(left[1:], chance[:, None, None])
        left[1:] -= taken
        left[:-1] += taken
        counts[..., expert] = taken.sum(axis=0)
    return counts


@checked
def largest_share_null(
    weights: Float[np.ndarray, " E"], draws: Number, *, longest: Count = 4096, repeats: Draws = 100, seed: Seed = 0
) -> Callable[[np.ndarray], np.ndarray]:
    """Mean over draws of max_e (tokens that drew e) / n, as a function of n, 1 or more tokens.

    Args:
        weights: of the experts.
        draws: K.
        longest: n up to 64 are all drawn, beyond only some are, up to this; others are interpolated in 1 / sqrt(n),
            and the limit is the largest probability.
        repeats: draws averaged over.
        seed: of the draws.
    """
    grid = np.unique(np.concatenate([np.arange(1, min(longest, 64) + 1), np.geomspace(1, longest, 40).astype(int)]))
    rng, means = np.random.default_rng(seed), np.zeros(len(grid))
    for _ in range(repeats):
        counts = distinct_draws(weights, draws, longest, rng).cumsum(axis=0)
        means += counts[grid - 1].max(axis=1) / grid / repeats
    places = np.array([0.0, *(1 / np.sqrt(grid[::-1]))])
    values = np.array([_inclusion(weights, draws).max(), *means[::-1]])
    return lambda sizes: np.interp(1 / np.sqrt(sizes), places, values)
