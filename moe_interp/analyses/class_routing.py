"""Where do the classes go, which of them go together, and do trials agree? A table of class and expert, over trials.

A trial is one model trained from its own seed, and the unit of every interval: a labelled result with ``label`` [image]
and ``expert_id`` [image, slot] on the same test images, ``group`` [class], a split of the classes in two, and a
dimension ``expert`` (`moe_interp.zoo.vision_trial` makes such). From "Do Experts Specialize?" (Poetzscher).

The numbers of experts mean nothing across trials. Either tables are matched, by the assignment of experts that brings
them closest (Kuhn 1955), or reduced to what numbers do not enter: correlation and covariance of classes over all
experts of all trials, and the mutual information of class and expert. Where trials differ much, nearly as good
assignments give other tables: what is said of matched tables holds given how they were matched.
"""

from collections.abc import Sequence
from itertools import combinations
from math import comb, log
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int, Num
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from moe_interp.errors import BadInput
from moe_interp.results import Variable, labelled, provenance_of
from moe_interp.stats import jackknife_interval, mutual_information, permutation_p, ratio, shares, student_interval

Trials = Sequence[xr.Dataset]
PERMUTATIONS = 999
SPLITS = 10_000
STARTS = 100  # random ones of the matching of experts
INTERVAL = "95 % interval over trials (Student's t, cut off at the ends of the range); NaN for one trial"
JACKKNIFE = "95 % interval over trials (jackknife, cut off at the ends of the range); NaN for fewer than three"


def class_routing(trials: Trials, *, permutations: int = PERMUTATIONS, seed: int = 0) -> xr.Dataset:
    """Where each class goes, which classes go together, and how far trials agree on it.

    Experts are numbered alike in all trials: matched, the first takes most of the group that the first class is in.

    - ``share``: of a class's decisions that each expert gets; the null is ``expert_load``, the expert's share of all.
    - ``correlation``, ``covariance`` of two classes' shares over all experts of all trials, as published: about the
      mean 1/E, so that a load that is not even makes all classes correlate. ``correlation_excess`` is about the load.
    - ``silhouette`` of the two groups of classes by the distance of their shares, -1 ... 1. Null: all other splits into
      groups of these sizes. ``cluster``: the two groups that average linkage finds, without being told.
    - ``consistency``: correlation of two trials' tables of excess shares after the best assignment of experts, mean
      over pairs of trials. Null: permuted classes, matched anew, for a best assignment agrees somewhat with anything.
    - ``agreement``: share of test images that go to the same (matched) expert in two trials, mean over pairs.
      Controls: what it would be if the class alone decided, and if nothing did.
      Both have a jackknife interval over trials.
    - ``information``: mutual information of class and expert, less its bias (Miller 1955). Null: permuted labels.

    Args:
        trials: of models with the same number of experts, on the same test images.
        permutations: for the null of consistency and, a fifth of them, of information.
        seed: of these.

    Raises:
        BadInput: no trials, or other classes, experts or test images in some.
    """
    check_trials(trials)
    counts, ids = matched_trials(trials)
    rng = np.random.default_rng(seed)
    tables = shares(counts)
    variables = _shares_of(counts) | _together(tables) | _split(tables, trials[0]["group"].values)
    variables |= _consistency(tables, permutations, rng) | _agreement(ids, trials[0]["label"].values, tables.shape[2])
    variables |= _informations(trials, permutations // 5, rng)
    classes = trials[0]["class"].values
    coords = {"class": classes, "other": classes, "expert": np.arange(tables.shape[2])}
    coords |= {"bound": np.array(["low", "high"]), "trial": np.arange(len(trials))}
    provenance = common_provenance(trials, permutations=permutations, permutation_seed=seed)
    return labelled(variables, coords, analysis="class routing", provenance=provenance)


def check_images(trials: Trials) -> None:
    """Refuse trials, of whatever models, that were not measured on the same test images."""
    if not len(trials):
        raise BadInput("no trials", expected="at least one", got="none")
    for trial in trials:
        if not all(np.array_equal(trial[name].values, trials[0][name].values) for name in ("class", "label")):
            raise BadInput("trials cannot be compared", expected="the same classes and test images", got="others")


def check_trials(trials: Trials) -> None:
    """Refuse trials that are not of one kind, or not on the same test images."""
    check_images(trials)
    first = trials[0]
    for trial in trials:
        for name, what in (("expert", "experts"), ("slot", "experts an image")):
            if trial.sizes[name] != first.sizes[name]:
                raise BadInput(
                    "trials cannot be compared",
                    expected=f"{first.sizes[name]} {what} in all",
                    got=str(trial.sizes[name]),
                )


def class_counts(trial: xr.Dataset) -> Int[np.ndarray, "C E"]:
    """How many decisions of each class went to each expert."""
    ids = trial["expert_id"].values
    counts = np.zeros((trial.sizes["class"], trial.sizes["expert"]), dtype=np.int64)
    np.add.at(counts, (np.broadcast_to(trial["label"].values[:, None], ids.shape), ids), 1)
    return counts


def best_assignment(table: Float[np.ndarray, "C E"], reference: Float[np.ndarray, "C E"]) -> Int[np.ndarray, " E"]:
    """For each column of the reference the column of the table that it stands for, at the least squared distance."""
    return linear_sum_assignment(-reference.T @ table)[1]


def match(tables: Float[np.ndarray, "trials C E"]) -> Int[np.ndarray, "trials E"]:
    """An order of the columns of each table in which all tables come closest to their mean, by squared distance.

    One after the other each table is matched to the sum of the others, until nothing changes. That stops at a local
    optimum, so it is done from every table as the first reference and from `STARTS` random orders, and the best is
    kept. The optimum is not proven; how tables are listed does not enter but through ties and the random starts.
    """
    rng, count = np.random.default_rng(0), tables.shape[2]
    starts = [np.stack([best_assignment(table, reference) for table in tables]) for reference in tables]
    starts += [np.stack([rng.permutation(count) for _ in tables]) for _ in range(STARTS if len(tables) > 1 else 0)]
    return max((_refined(tables, start) for start in starts), key=lambda orders: _closeness(tables, orders))


def _ordered(tables: np.ndarray, orders: np.ndarray) -> Num[np.ndarray, "trials C E"]:
    return np.take_along_axis(tables, orders[:, None, :], axis=2)


def _closeness(tables: np.ndarray, orders: np.ndarray) -> float:
    """The larger, the less tables scatter about their mean: the squares of all and of their sum differ by that."""
    return float((_ordered(tables, orders).sum(axis=0) ** 2).sum())


def _refined(tables: np.ndarray, orders: np.ndarray) -> Int[np.ndarray, "trials E"]:
    orders, closest = orders.copy(), -1.0
    while (now := _closeness(tables, orders)) > closest * (1 + 1e-12):
        closest = now
        total = _ordered(tables, orders).sum(axis=0)
        for trial, table in enumerate(tables):
            others = total - table[:, orders[trial]]
            orders[trial] = best_assignment(table, others)
            total = others + table[:, orders[trial]]
    return orders


def matched_trials(trials: Trials) -> tuple[Int[np.ndarray, "trials C E"], Int[np.ndarray, "trials N K"]]:
    """Counts and expert ids of every trial, experts numbered alike."""
    counts = np.stack([class_counts(trial) for trial in trials])
    orders = match(shares(counts))
    matched = _ordered(counts, orders)
    groups = trials[0]["group"].values
    first = np.argsort(-shares(matched).mean(axis=0)[groups == groups[0]].mean(axis=0), kind="stable")
    orders, matched = orders[:, first], matched[:, :, first]
    ids = [
        np.argsort(order)[trial["expert_id"].values] for trial, order in zip(trials, orders, strict=True)
    ]  # argsort of an order is its inverse
    return matched, np.stack(ids)


def _shares_of(counts: Int[np.ndarray, "trials C E"]) -> dict[str, Variable]:
    tables, load = shares(counts), shares(counts.sum(axis=1))
    return {
        "share": Variable(("class", "expert"), tables.mean(0), "1", "share of a class's decisions, 0 ... 1"),
        "share_interval": Variable(("bound", "class", "expert"), student_interval(tables).clip(0, 1), "1", INTERVAL),
        "share_trials": Variable(("trial", "class", "expert"), tables, "1", "the same by trial, experts matched"),
        "expert_load": Variable(
            ("expert",), load.mean(0), "1", "share of all decisions, the null of share; even is 1/E"
        ),
        "expert_load_interval": Variable(("bound", "expert"), student_interval(load).clip(0, 1), "1", INTERVAL),
    }


def class_covariance(tables: Float[np.ndarray, "trials C E"]) -> Float[np.ndarray, "trials C C"]:
    """Covariance of classes' shares over the experts of each trial, about the mean share 1/E."""
    centred = tables - 1 / tables.shape[2]
    return centred @ centred.transpose(0, 2, 1) / tables.shape[2]


def class_correlation(tables: Float[np.ndarray, "trials C E"]) -> Float[np.ndarray, "C C"]:
    """Of classes over all experts of all trials: from covariances pooled over trials."""
    pooled = class_covariance(tables).mean(axis=0)
    spread = np.sqrt(np.diag(pooled))
    return _divided(pooled, np.outer(spread, spread))


def _divided(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 1e-15)


def excess_shares(tables: Float[np.ndarray, "trials C E"]) -> Float[np.ndarray, "trials C E"]:
    """Shares less the expert's mean over classes, about 1/E as `class_covariance` takes them."""
    return tables - tables.mean(axis=1, keepdims=True) + 1 / tables.shape[2]


def _together(tables: Float[np.ndarray, "trials C E"]) -> dict[str, Variable]:
    covariance = class_covariance(tables)
    pair = ("class", "other")
    return {
        "correlation": Variable(pair, class_correlation(tables), "1", "of shares over experts and trials, -1 ... 1"),
        "correlation_excess": Variable(
            pair,
            class_correlation(excess_shares(tables)),
            "1",
            "the same less the mean over classes, which leaves unrelated ones at -1 / (C - 1)",
        ),
        "covariance": Variable(pair, covariance.mean(0), "1", "of classes' shares over experts, -1/4 ... 1/4"),
        "covariance_interval": Variable(("bound", *pair), student_interval(covariance), "1", INTERVAL),
    }


def silhouette(distances: Float[np.ndarray, "C C"], inside: Any) -> float:
    """Mean silhouette (Rousseeuw 1987) of a split in two, given one side: -1 ... 1, NaN if all coincide."""
    member = np.zeros(len(distances), bool)
    member[list(inside)] = True
    same = member[:, None] == member[None, :]
    own = ratio((distances * same).sum(1), np.maximum(same.sum(1) - 1, 1))
    other = ratio((distances * ~same).sum(1), (~same).sum(1))
    width = _divided(other - own, np.maximum(own, other))
    return float(np.mean(np.where(same.sum(1) == 1, 0.0, width)))


def _split(tables: Float[np.ndarray, "trials C E"], groups: np.ndarray) -> dict[str, Variable]:
    """Do the classes of one group go together? Against all splits into groups of these sizes."""
    profiles = tables.transpose(1, 0, 2).reshape(tables.shape[1], -1)
    distances = cdist(profiles, profiles)
    first = np.flatnonzero(groups == groups[0])
    observed = silhouette(distances, first)
    splits = _splits(len(groups), len(first))
    null = np.array([silhouette(distances, some) for some in splits])
    sampled = not isinstance(splits, list)  # then the split itself is not among them
    p = (sampled + (null >= observed - 1e-12).sum()) / (sampled + len(null)) if np.isfinite(observed) else np.nan
    cluster = fcluster(linkage(profiles, "average"), 2, "maxclust").astype(np.int64)
    return {
        "silhouette": _number(observed, "1", "of the two groups of classes by their shares, -1 ... 1"),
        "silhouette_null": _number(null.mean(), "1", "its mean over all splits into groups of these sizes"),
        "silhouette_p": _number(p, "1", "share of all those splits, this one included, that reach it"),
        "cluster": Variable(("class",), cluster, "1", "the two clusters of average linkage"),
    }


def _splits(classes: int, size: int) -> list[tuple[int, ...]] | np.ndarray:
    if comb(classes, size) <= SPLITS:
        return list(combinations(range(classes), size))
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(classes)[:size] for _ in range(SPLITS)])


def table_agreement(tables: Float[np.ndarray, "trials C E"]) -> float:
    """Correlation of excess shares after the best assignment of experts, mean over pairs of trials: -1 ... 1.

    A trial whose router treats all classes alike agrees with no other: 0. NaN if all do, and for one trial.
    """
    return mean_of_pairs(_agreements(tables))


def _agreements(tables: Float[np.ndarray, "trials C E"]) -> Float[np.ndarray, "trials trials"]:
    """Of each pair of trials; NaN if no pair has one."""
    excess = tables - tables.mean(axis=1, keepdims=True)
    values = np.full((len(tables), len(tables)), np.nan)
    for a, b in combinations(range(len(tables)), 2):
        one, other = excess[a], excess[b]
        values[a, b] = values[b, a] = _pearson(one, other[:, best_assignment(other, one)])
    return np.nan_to_num(values) if np.isfinite(values).any() else values


def mean_of_pairs(values: Float[np.ndarray, "trials trials"]) -> float:
    """Over pairs of different trials; NaN for one trial."""
    pairs = values[np.triu_indices(len(values), 1)]
    return float(pairs.mean()) if len(pairs) else np.nan


def pairs_interval(values: Float[np.ndarray, "trials trials"]) -> Float[np.ndarray, " 2"]:
    """Of a mean over pairs of trials: Student's of the jackknife's pseudo-values (Arvesen 1969); from three trials."""
    count = len(values)
    if count < 3:
        return np.full(2, np.nan)
    return jackknife_interval(lambda kept: mean_of_pairs(values[np.ix_(kept, kept)]), count)


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    """Of tables whose columns have mean 0."""
    scale = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / scale) if scale > 1e-12 else np.nan


def _consistency(tables: np.ndarray, permutations: int, rng: np.random.Generator) -> dict[str, Variable]:
    pairs = _agreements(tables)
    observed = mean_of_pairs(pairs)
    null = np.array(
        [table_agreement(np.stack([rng.permutation(table) for table in tables])) for _ in range(permutations)]
    )
    return {
        "consistency": _number(observed, "1", "correlation of trials' matched tables, mean over pairs, -1 ... 1"),
        "consistency_interval": Variable(("bound",), pairs_interval(pairs).clip(-1, 1), "1", JACKKNIFE),
        "consistency_null": _number(null.mean(), "1", "its mean with permuted classes, matched anew"),
        "consistency_p": _number(permutation_p(observed, null), "1", "of the permutation test"),
    }


def _agreement(ids: Int[np.ndarray, "trials N K"], labels: np.ndarray, experts: int) -> dict[str, Variable]:
    """How often an image's experts are the same in two trials; by class and by load alone."""
    used = np.zeros((len(ids), ids.shape[1], experts))
    np.put_along_axis(used, ids, 1.0, axis=2)
    present, counts = np.unique(labels, return_counts=True)
    by_class = np.stack([used[:, labels == label].mean(axis=1) for label in present], axis=1)
    weights = (counts / len(labels))[:, None]
    values = {
        "agreement": _overlaps(used, np.full((len(labels), 1), 1 / len(labels))),
        "agreement_class": _overlaps(by_class, weights),
        "agreement_load": _overlaps((by_class * weights).sum(axis=1, keepdims=True), np.ones((1, 1))),
    }
    said = {
        "agreement": "share of an image's experts that are the same in two trials, mean over pairs, 0 ... 1",
        "agreement_class": "the same if the class alone decided",
        "agreement_load": "the same if nothing but the experts' loads did",
    }
    slots = ids.shape[2]
    variables = {name: _number(mean_of_pairs(some) / slots, "1", said[name]) for name, some in values.items()}
    ends = (pairs_interval(values["agreement"]) / slots).clip(0, 1)
    return variables | {"agreement_interval": Variable(("bound",), ends, "1", JACKKNIFE)}


def _overlaps(
    used: Float[np.ndarray, "trials R E"], weights: Float[np.ndarray, "R 1"]
) -> Float[np.ndarray, "trials trials"]:
    """How many experts two trials have in common, mean over rows."""
    flat = (used * np.sqrt(weights)).reshape(len(used), -1)
    return flat @ flat.T


def debiased_information(counts: Int[np.ndarray, "C E"], images: int) -> float:
    """Of class and expert in nats, less the bias of the plug-in estimate: about 0 ... min(ln E/K, H(class)).

    Miller's correction, (cells - rows - columns + 1) / 2N with those that occur, N images. The K experts of an image
    are distinct, which leaves (E - K) / K (E - 1) of it where loads are even: nothing when every image takes all.
    """
    experts, top_k = counts.shape[1], counts.sum() / max(images, 1)
    cells = (counts > 0).sum() - counts.any(axis=1).sum() - counts.any(axis=0).sum() + 1
    distinct = (experts - top_k) / (top_k * (experts - 1)) if experts > 1 and top_k else 0.0
    return float(mutual_information(counts) - cells * distinct / (2 * images))


def information(trial: xr.Dataset) -> float:
    """`debiased_information` of one trial."""
    return debiased_information(class_counts(trial), trial.sizes["image"])


def information_cap(trial: xr.Dataset) -> float:
    """The most that one decision can tell: ln E/K nats, because the K experts of an image are distinct."""
    return log(trial.sizes["expert"] / trial.sizes["slot"])


def _informations(trials: Trials, permutations: int, rng: np.random.Generator) -> dict[str, Variable]:
    values = np.array([information(trial) for trial in trials])
    shuffled = [
        information(trial.assign(label=("image", rng.permutation(trial["label"].values))))
        for trial in trials
        for _ in range(-(-permutations // len(trials)))
    ]
    said = "mutual information of class and expert, less its bias; at most ln E/K"
    return {
        "information": _number(values.mean(), "nats", said),
        "information_interval": Variable(("bound",), student_interval(values), "nats", INTERVAL),
        "information_null": _number(
            float(np.quantile(shuffled, 0.95)) if shuffled else np.nan, "nats", "95 % of permuted labels give less"
        ),
        "information_trials": Variable(("trial",), values, "nats", "in every trial"),
        "information_cap": _number(information_cap(trials[0]), "nats", "ln E/K"),
    }


def common_provenance(trials: Trials, **more: str | int | float) -> dict[str, str | int | float]:
    """What all trials have in common."""
    first, *rest = map(provenance_of, trials)
    same = {key: value for key, value in first.items() if all(other.get(key) == value for other in rest)}
    return same | {"trials": len(trials)} | more


def _number(value: float, units: str, meaning: str) -> Variable:
    return Variable((), np.asarray(value), units, meaning)
