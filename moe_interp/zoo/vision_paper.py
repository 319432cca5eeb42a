"""What "Do Experts Specialize?" (Poetzscher) says, beside what a study of ours found: its tables, and claims on them.

1. `compare`: a table of classes and experts beside a published one, cell by cell, against two nulls: our classes
   permuted, and permuted within vehicles and within animals, which leaves the split between these.
2. `relations`: the same without numbers of experts: which classes go together in both, by covariance.
3. `claims`: every claim with a verdict. Criteria are in the claim's text: those without a mark were written down before
   the medium study was run, LATER after it and before the full one, AFTER when the full one had been seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from moe_interp.analyses.class_routing import best_assignment, class_correlation, class_covariance
from moe_interp.analyses.specialists import Findings, welch_interval
from moe_interp.stats import jackknife_interval, permutation_p
from moe_interp.zoo.vision_images import VEHICLES

# Tables 1 to 3 of the paper, in per cent
ACCURACY = {2: (86.77, 83.77), 3: (86.78, 85.43), 5: (86.03, 85.57)}  # learned, random
TWO = [[96.3], [95.7], [31.7], [17.6], [11.3], [24.2], [3.2], [32.8], [96.5], [93.7]]  # expert 1
THREE = [
    [80.7, 17.8, 1.5], [60.5, 8.9, 30.6], [28.5, 44.6, 26.9], [10.0, 36.6, 53.4], [6.1, 62.3, 31.6],
    [12.8, 10.6, 76.6], [2.4, 92.1, 5.5], [12.7, 25.6, 61.7], [70.6, 21.9, 7.9], [58.6, 3.7, 37.2],
]  # fmt: skip
ANIMALS = (["bird", "deer", "frog"], ["cat", "dog", "horse"])  # that the second and third expert of table 3 take
PERMUTATIONS = 999
YES, NO, PART, UNKNOWN = "reproduces", "does not reproduce", "in part", "cannot be told"
Claim = tuple[str, str, str]  # what the paper says and how it is judged, the verdict, our figures


def between(value: float, ends: np.ndarray, scale: float = 1.0, digits: int = 1) -> str:
    """A value with its interval."""
    low, high = scale * np.asarray(ends)
    return f"{scale * value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


# Tables 2 and 3


@dataclass(frozen=True)
class Cells:
    """Table 2 or 3 beside ours, in per cent, our experts in the order that comes closest.

    Attributes:
        ours, ends, published: shares of a class and, of ours, their intervals.
        null: correlations with our table under permuted classes, matched anew.
        within: the same, vehicles among vehicles and animals among animals.
    """

    ours: Float[np.ndarray, "C E"]
    ends: Float[np.ndarray, "2 C E"]
    published: Float[np.ndarray, "C E"]
    null: Float[np.ndarray, " permutations"]
    within: Float[np.ndarray, " permutations"]

    @property
    def same(self) -> Bool[np.ndarray, "C E"]:
        """Which are on the same side of an even share."""
        even = 100 / self.ours.shape[1]
        return (self.ours > even) == (self.published > even)

    @property
    def inside(self) -> Bool[np.ndarray, "C E"]:
        """Where the paper's value is in our interval."""
        return (self.ends[0] <= self.published) & (self.published <= self.ends[1])

    @property
    def width(self) -> float:
        """Of our intervals, in the median."""
        return float(np.median(self.ends[1] - self.ends[0]))

    @property
    def correlation(self) -> float:
        """Of all cells."""
        return cell_correlation(self.ours, self.published)

    def p(self, null: Float[np.ndarray, " permutations"]) -> float:
        """Of the correlation."""
        return permutation_p(self.correlation, null)

    def text(self, c: int, e: int) -> str:
        """Ours and theirs, with marks."""
        marks = ("✓" if self.same[c, e] else "✗") + ("*" if self.inside[c, e] else "")
        return f"{between(self.ours[c, e], self.ends[:, c, e])} | {self.published[c, e]:.1f} {marks}"

    def said(self) -> str:
        """All cells in a line."""
        return (
            f"{self.same.sum()} of {self.same.size} cells ✓, {self.inside.sum()} *; correlation "
            f"{self.correlation:.2f}, with permuted classes {self.null.mean():.2f} (p = {self.p(self.null):.3f}), "
            f"permuted within vehicles and within animals {self.within.mean():.2f} (p = {self.p(self.within):.3f})"
        )


def compare(result: xr.Dataset, paper: list[list[float]]) -> Cells:
    """Our table (`moe_interp.analyses.class_routing`) beside a published one, of which two experts need one column."""
    published, ours, rng = whole(paper), 100 * result["share"].values, np.random.default_rng(0)
    null = [cell_correlation(rng.permutation(ours), published) for _ in range(PERMUTATIONS)]
    groups = vehicles_and_animals(result)
    within = [cell_correlation(ours[permuted_within(groups, rng)], published) for _ in range(PERMUTATIONS)]
    order = best_assignment(ours, published)
    ends = 100 * result["share_interval"].values[:, :, order]
    return Cells(ours[:, order], ends, published, np.array(null), np.array(within))


def whole(paper: list[list[float]]) -> Float[np.ndarray, "C E"]:
    """A published table with the column that two experts leave out."""
    return np.array(paper) if len(paper[0]) > 1 else np.hstack([paper, 100 - np.array(paper)])


def vehicles_and_animals(result: xr.Dataset) -> list[np.ndarray]:
    """The numbers of the classes of both groups."""
    vehicle = np.isin(result["class"].values, VEHICLES)
    return [np.flatnonzero(vehicle), np.flatnonzero(~vehicle)]


def permuted_within(groups: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """An order of all classes in which each group keeps its places."""
    order = np.arange(sum(map(len, groups)))
    for group in groups:
        order[group] = rng.permutation(group)
    return order


def cell_correlation(ours: Float[np.ndarray, "C E"], published: Float[np.ndarray, "C E"]) -> float:
    """Of all cells, our experts in the order that comes closest."""
    return float(np.corrcoef(ours[:, best_assignment(ours, published)].ravel(), published.ravel())[0, 1])


def relations(result: xr.Dataset, paper: list[list[float]]) -> tuple[float, float]:
    """Do the same classes go together? Needs no numbers of experts, so that nothing depends on how they were matched.

    Returns:
        Correlation of the covariances of two classes, ours with the published table's, over all pairs of classes; and
        its p, against classes permuted within vehicles and within animals.
    """
    ours, rng = result["covariance"].values, np.random.default_rng(0)
    (theirs,) = class_covariance(whole(paper)[None] / 100)
    pairs = np.triu_indices(len(ours), 1)
    groups = vehicles_and_animals(result)

    def correlation(order: np.ndarray) -> float:
        return float(np.corrcoef(ours[np.ix_(order, order)][pairs], theirs[pairs])[0, 1])

    observed = correlation(np.arange(len(ours)))
    null = [correlation(permuted_within(groups, rng)) for _ in range(PERMUTATIONS)]
    return observed, permutation_p(observed, np.array(null))


# Correlations within and between groups of classes


def group_rows(result: xr.Dataset, groups: list[list[str]], name: str = "correlation") -> tuple[list[float], float]:
    """Mean correlation of classes within each group, and between groups; NaN where none is defined."""
    return within_and_between(result[name].values, numbers(result, groups))


def numbers(result: xr.Dataset, groups: list[list[str]]) -> list[list[int]]:
    """Names of classes as their numbers."""
    classes = list(map(str, result["class"].values))
    return [[classes.index(name) for name in group] for group in groups]


def within_and_between(values: Float[np.ndarray, "C C"], groups: list[list[int]]) -> tuple[list[float], float]:
    within = [mean_of([values[a, b] for a in group for b in group if a != b]) for group in groups]
    across = [values[a, b] for i, one in enumerate(groups) for other in groups[i + 1 :] for a in one for b in other]
    return within, mean_of(across)


def mean_of(values: list[float]) -> float:
    """Mean of those that are defined; NaN if none is."""
    there = [value for value in values if np.isfinite(value)]
    return float(np.mean(there)) if there else np.nan


def animals_divide(result: xr.Dataset) -> Float[np.ndarray, " 2"]:
    """Interval over trials of the lower correlation within the groups of animals less that between them."""
    tables, groups = result["share_trials"].values, numbers(result, list(ANIMALS))

    def difference(kept: np.ndarray) -> float:
        within, across = within_and_between(class_correlation(tables[kept]), groups)
        return min(within) - across

    return jackknife_interval(difference, len(tables))


# Claims


def claims(results: Findings) -> Iterator[Claim]:
    """What tables 1 to 3 and figures 2 to 6 say, each with a verdict and our figures; needs 2, 3 and 5 experts."""
    yield from _learned(results.accuracies)
    for condition, how in (("random", "drawn after training"), ("trained at random", "drawn in training too")):
        yield from _random(results.accuracies, condition, how)
    yield from _fresh(results.accuracies)
    for count, paper in ((2, TWO), (3, THREE)):
        yield from _classes(results.routing[count], count, paper)
    yield from _groups(results)
    yield from _depth(results)


def _all_none_part(inside: np.ndarray) -> str:
    return YES if inside.all() else PART if inside.any() else NO


def _above(ends: Float[np.ndarray, "n 2"]) -> str:
    """Of claims that all of some values are above 0."""
    return YES if (ends[:, 0] > 0).all() else NO if (ends[:, 1] <= 0).any() else UNKNOWN


def _listed(values: np.ndarray, ends: np.ndarray, units: str) -> str:
    return "; ".join(between(float(one), some, 100.0) for one, some in zip(values, ends, strict=True)) + f" {units}"


def _inside(published: list[float], ends: Float[np.ndarray, "n 2"]) -> Bool[np.ndarray, " n"]:
    low, high = 100 * ends.T
    return (low <= published) & (published <= high)


def _learned(table: xr.Dataset) -> Iterator[Claim]:
    at = table.sel(condition="learned")
    counts, ends = at["experts"].values, at["accuracy_interval"].values.T
    yield (
        "Table 1: accuracy of 86.8, 86.8, 86.0 % at 2, 3, 5 experts (AFTER: in our intervals)",
        _all_none_part(_inside([ACCURACY[int(count)][0] for count in counts], ends)),
        _listed(at["accuracy"].values, ends, "%"),
    )


def _random(table: xr.Dataset, condition: str, how: str) -> Iterator[Claim]:
    at = table.sel(condition=condition)
    gaps, ends = at["gap"].values, at["gap_interval"].values.T
    said = _listed(gaps, ends, "points")
    published = [learned - random for learned, random in (ACCURACY[int(count)] for count in at["experts"].values)]
    yield f"Table 1: a random router costs accuracy ({how}: intervals above 0)", _above(ends), said
    yield (
        f"Table 1: 3.0, 1.4, 0.5 points at 2, 3, 5 experts ({how}; AFTER: in our intervals)",
        _all_none_part(_inside(published, ends)),
        said,
    )
    by_trial = table.sel(condition="learned")["accuracy_trials"].values - at["accuracy_trials"].values
    drops = np.stack([welch_interval(one, other) for one, other in pairwise(by_trial)])
    yield (
        f"Table 1: and the less the more experts there are ({how}; AFTER: intervals of both drops above 0)",
        _above(drops),
        _listed(gaps[:-1] - gaps[1:], drops, "points less"),
    )


def _fresh(table: xr.Dataset) -> Iterator[Claim]:
    fresh = table.sel(condition="fresh")
    near = (np.abs(100 * fresh["accuracy"].values - 10) < 3).all()
    yield (
        "Table 1: random experts are at about 10 % (within 3 points; so is whatever calls every image the same)",
        YES if near else NO,
        _listed(fresh["accuracy"].values, fresh["accuracy_interval"].values.T, "%"),
    )


def _classes(result: xr.Dataset, count: int, paper: list[list[float]]) -> Iterator[Claim]:
    cells = compare(result, paper)
    yield (
        f"Table {count}: where each class goes (correlation of cells above permuted classes, p < 0.05)",
        YES if cells.p(cells.null) < 0.05 else NO,
        cells.said(),
    )
    yield (
        f"Table {count}: beyond vehicles against animals (LATER: correlation above classes permuted within them, "
        "p < 0.05)",
        YES if cells.p(cells.within) < 0.05 else NO,
        f"p = {cells.p(cells.within):.3f}",
    )
    correlation, p = relations(result, paper)
    yield (
        f"Table {count}: which classes go together, beyond vehicles against animals, however experts are matched "
        "(AFTER: correlation of covariances above classes permuted within them, p < 0.05)",
        YES if p < 0.05 else NO,
        f"correlation {correlation:.2f}, p = {p:.3f}",
    )


def _groups(results: Findings) -> Iterator[Claim]:
    two, three, five = (results.routing[count] for count in (2, 3, 5))
    vehicles = list(VEHICLES)
    animals = [name for name in map(str, two["class"].values) if name not in vehicles]
    (inside, outside), across = group_rows(two, [vehicles, animals])
    p = float(two["silhouette_p"])
    yield (
        "Figure, two experts: vehicles against animals (silhouette above other splits, p < 0.05)",
        UNKNOWN if np.isnan(p) else YES if p < 0.05 else NO,
        f"correlation within vehicles {inside:.2f}, within animals {outside:.2f}, between {across:.2f}; silhouette "
        f"{float(two['silhouette']):.2f}, p = {p:.3f}",
    )
    (birds, cats), across = group_rows(three, list(ANIMALS))
    low, high = divided = animals_divide(three)
    yield (
        "Figure, three experts: animals divide, bird, deer, frog against cat, dog, horse (the lower correlation within "
        "less that between: interval above 0)",
        YES if low > 0 else NO if high < 0 else UNKNOWN,
        f"within {birds:.2f} and {cats:.2f}, between {across:.2f}; difference "
        f"{between(min(birds, cats) - across, divided, digits=2)}",
    )
    (inside, outside), across = group_rows(five, [vehicles, animals])
    yield (
        "Figure, five experts: vehicles still correlate, otherwise broken down (vehicles above 0.5, animals below)",
        UNKNOWN if np.isnan(inside + outside) else YES if inside > 0.5 > outside else NO,
        f"within vehicles {inside:.2f}, within animals {outside:.2f}, between {across:.2f}",
    )


def _depth(results: Findings) -> Iterator[Claim]:
    changes = [one.isel(trunk=-1) for one in results.depth.values()]
    for name, what in (
        ("covariance", "much smaller class covariance"),
        ("covariance_excess", "(ours) much smaller class covariance, loads taken off"),
        ("information", "(ours) less information"),
    ):
        ends = np.stack([one[f"{name}_difference_interval"].values for one in changes])
        verdict = YES if (ends[:, 1] < 0).all() else NO if (ends[:, 0] >= 0).any() else UNKNOWN
        listed = "; ".join(
            f"{count} experts: {float(one[name][0]):.3f} to {float(one[name][-1]):.3f}, difference "
            + between(float(change[f"{name}_difference"]), change[f"{name}_difference_interval"].values, digits=3)
            for (count, one), change in zip(results.depth.items(), changes, strict=True)
        )
        yield f"Figure, mixture after one convolution: {what} (difference below 0 at 2, 3 and 5)", verdict, listed
