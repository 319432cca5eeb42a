"""Is it worth anything that experts specialize? Trials of one classifier in, labelled results with intervals out.

The experiments of "Do Experts Specialize?" (Poetzscher) around the table of `moe_interp.analyses.class_routing`; trials
are as there, and were classified under other routings too (`moe_interp.zoo.vision_trial`).

1. `accuracies`: the learned routing against random, permuted and fresh experts, and against models of other kinds.
2. `depth`: a short trunk against the base, by class covariance, whose scale depends on the load, and by mutual
   information, whose does not.
3. `probed`: how much of the class the router could have seen, and how much of what it could tell it told.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import xarray as xr
from jaxtyping import Float, Int, UInt8
from numpy.typing import ArrayLike
from scipy.stats import ttest_ind

from moe_interp.analyses.class_routing import (
    INTERVAL,
    Trials,
    check_images,
    check_trials,
    class_counts,
    class_covariance,
    common_provenance,
    excess_shares,
    information,
    information_cap,
)
from moe_interp.errors import BadInput
from moe_interp.results import Variable, labelled
from moe_interp.stats import mutual_information, shares, student_interval


@dataclass(frozen=True)
class Findings:
    """The results of one study, by number of experts, and pictures to show.

    Attributes:
        name: "full study", "small study", ...: it heads the page.
        samples: test pictures [M, C, H, W] and the expert of each in the first trial, by number of experts.
    """

    name: str
    accuracies: xr.Dataset
    routing: Mapping[int, xr.Dataset]
    short_routing: Mapping[int, xr.Dataset]
    depth: Mapping[int, xr.Dataset]
    probed: Mapping[int, xr.Dataset]
    samples: Mapping[int, tuple[UInt8[np.ndarray, "M C H W"], Int[np.ndarray, " M"]]] = field(default_factory=dict)


# 1. What the routing is worth


def accuracies(
    mixtures: Mapping[int, Trials],
    *,
    trained_random: Mapping[int, Trials] | None = None,
    dense_one: Trials = (),
    dense_total: Mapping[int, Trials] | None = None,
) -> xr.Dataset:
    """Accuracy of learned routing, of other routings of the same model, and of models trained otherwise.

    Args:
        mixtures: trials by number of experts, as many of each.
        trained_random: mixtures that were trained with random routing, by number of experts.
        dense_one: dense models as large as one expert.
        dense_total: dense models as large as all experts together, by number of experts.

    Returns:
        ``accuracy`` and ``gap`` (learned less the others, paired by trial) by experts and condition, with intervals;
        ``accuracy_trials``, every trial's. Shares of test images, 0 ... 1, chance 1 / classes.

    Raises:
        BadInput: no trials, different numbers of them, or other test images in some.
    """
    others = {"trained at random": trained_random, "dense, one expert": dense_one, "dense, total": dense_total}
    groups = [*mixtures.values()]
    for some in others.values():
        groups += some.values() if isinstance(some, Mapping) else [some] if some else []
    if len(counts := sorted({len(trials) for trials in groups})) != 1 or counts == [0]:
        raise BadInput("trials cannot be compared", expected="as many of every kind", got=str(counts))
    everything = [trial for trials in groups for trial in trials]
    check_images(everything)
    table = np.stack(
        [_accuracies(count, mixtures[count], [some for some in others.values() if some]) for count in mixtures]
    )
    first = next(iter(mixtures.values()))[0]
    names = [*map(str, first["condition"].values), *(name for name, some in others.items() if some)]
    coords: dict[str, ArrayLike] = {"experts": np.array(list(mixtures)), "condition": names, "bound": ["low", "high"]}
    coords["trial"] = np.arange(table.shape[-1])
    variables = _accuracy_variables(table, chance=1 / first.sizes["class"])
    return labelled(variables, coords, analysis="accuracies", provenance=common_provenance(everything))


def _accuracy_variables(table: Float[np.ndarray, "experts conditions trials"], chance: float) -> dict[str, Variable]:
    gap, dims = table[:, :1] - table, ("experts", "condition")
    return {
        "accuracy": Variable(dims, table.mean(-1), "1", f"share of test images classified right, chance {chance:.3g}"),
        "accuracy_interval": Variable((*dims, "bound"), _ends(table).clip(0, 1), "1", INTERVAL),
        "gap": Variable(dims, gap.mean(-1), "1", "accuracy of learned routing less this one, paired by trial"),
        "gap_interval": Variable((*dims, "bound"), _ends(gap), "1", INTERVAL),
        "accuracy_trials": Variable((*dims, "trial"), table, "1", "the accuracy of every trial"),
        "chance": Variable((), np.asarray(chance), "1", "accuracy of a guess"),
    }


def _accuracies(
    count: int, mixture: Trials, others: Sequence[Trials | Mapping[int, Trials]]
) -> Float[np.ndarray, "conditions trials"]:
    rows = list(np.stack([trial["accuracy"].values for trial in mixture], axis=-1))
    for some in others:
        trials = some[count] if isinstance(some, Mapping) else some
        random = "random" in trials[0]["condition"].values
        rows.append(
            np.array([float(trial["accuracy"].sel(condition="random" if random else "learned")) for trial in trials])
        )
    return np.stack(rows).astype(float)


def _ends(values: Float[np.ndarray, "*rest trials"]) -> Float[np.ndarray, "*rest 2"]:
    return np.moveaxis(student_interval(np.moveaxis(values, -1, 0)), 0, -1)


# 2. Depth


def depth(trials: Mapping[str, Trials]) -> xr.Dataset:
    """Trunks of different depth: class covariance, mutual information and accuracy, with the differences.

    Args:
        trials: by name, such as "base" and "short"; all differences are to the first.

    Returns:
        ``variance`` (mean over classes of the variance of a class's shares over experts) and ``covariance`` (mean
        absolute one of two classes), both about 1/E, as published; ``covariance_excess`` about the experts' loads;
        ``information`` in nats; ``accuracy``. Each with an interval, and its difference
        to the first trunk with Welch's.
    """
    said = {
        "variance": ("1", "mean over classes of the variance of a class's shares over experts, 0 ... 1/4"),
        "covariance": ("1", "mean absolute covariance of two classes' shares over experts, 0 ... 1/4"),
        "covariance_excess": ("1", "the same, experts' loads taken off"),
        "information": ("nats", "mutual information of class and expert, 0 ... ln E/K"),
        "accuracy": ("1", "share of test images classified right, 0 ... 1"),
    }
    values = [_depth_values(some) for some in trials.values()]
    everything = [trial for some in trials.values() for trial in some]
    check_images(everything)
    variables: dict[str, Variable] = {}
    for name, (units, meaning) in said.items():
        variables |= _compared(name, [some[name] for some in values], units, meaning)
    cap = np.asarray(information_cap(everything[0]))
    variables["information_cap"] = Variable((), cap, "nats", "ln E/K, the most that information can be")
    coords = {"trunk": list(trials), "bound": ["low", "high"]}
    return labelled(variables, coords, analysis="depth", provenance=common_provenance(everything))


def _depth_values(trials: Trials) -> dict[str, Float[np.ndarray, " trials"]]:
    """Each quantity in every trial."""
    check_trials(trials)
    tables = shares(np.stack([class_counts(trial) for trial in trials]))
    covariance, excess = class_covariance(tables), class_covariance(excess_shares(tables))
    diagonal = np.eye(covariance.shape[1], dtype=bool)
    return {
        "variance": covariance[:, diagonal].mean(1),
        "covariance": np.abs(covariance[:, ~diagonal]).mean(1),
        "covariance_excess": np.abs(excess[:, ~diagonal]).mean(1),
        "information": np.array([information(trial) for trial in trials]),
        "accuracy": np.array([float(trial["accuracy"].sel(condition="learned")) for trial in trials]),
    }


def _compared(name: str, values: list[np.ndarray], units: str, meaning: str) -> dict[str, Variable]:
    ends = np.stack([student_interval(some) for some in values])
    differences = np.stack([welch_interval(some, values[0]) for some in values])
    return {
        name: Variable(("trunk",), np.array([some.mean() for some in values]), units, meaning),
        f"{name}_interval": Variable(("trunk", "bound"), ends, units, INTERVAL),
        f"{name}_difference": Variable(
            ("trunk",), np.array([some.mean() - values[0].mean() for some in values]), units, "less the first trunk's"
        ),
        f"{name}_difference_interval": Variable(("trunk", "bound"), differences, units, "95 % (Welch's t)"),
    }


def welch_interval(one: Float[np.ndarray, " trials"], other: Float[np.ndarray, " trials2"]) -> Float[np.ndarray, " 2"]:
    """95 % interval of the difference of two means (Welch's t); zero for a sample and itself, NaN for one trial."""
    if one is other:
        return np.zeros(2)
    if min(len(one), len(other)) < 2:
        return np.full(2, np.nan)
    ends = ttest_ind(one, other, equal_var=False).confidence_interval()
    return np.array([ends.low, ends.high])


# 3. What the router could have used


def probed(trials: Mapping[str, Trials]) -> xr.Dataset:
    """Linear probes of the mixture's input beside what routing tells of the class, by trunk.

    What is there is known between bounds alone. The choice of an expert can tell at most ``cap``, ln E/K nats or the
    class's entropy. A router could tell at least ``attainable``: the model's own predictions, which are made of the
    mixture's input, merged into E/K groups.

    Returns:
        ``accuracy`` and ``information`` (a lower bound, nats) of the probe and its controls; ``routed``, the mutual
        information of class and expert; ``cap`` and ``attainable``; ``used_least``, routed over cap, and
        ``used_most``, routed over attainable (NaN where that is 0). Each by trial, with intervals over trials.

    Raises:
        BadInput: no trials, or other test images in some.
    """
    everything = [trial for some in trials.values() for trial in some]
    check_images(everything)
    variables: dict[str, Variable] = {}
    for name, units in (("accuracy", "1"), ("information", "nats")):
        probes = [np.stack([trial[f"probe_{name}"].values for trial in some]) for some in trials.values()]
        meaning = f"{name} of a linear probe of the mixture's input on test images"
        averages, ends = np.stack([some.mean(0) for some in probes]), [student_interval(some) for some in probes]
        variables[name] = Variable(("trunk", "probed"), averages, units, meaning)
        variables[f"{name}_interval"] = Variable(("trunk", "bound", "probed"), np.stack(ends), units, INTERVAL)
    cap = min(information_cap(everything[0]), _class_entropy(everything[0]))
    found = [_used(some, cap) for some in trials.values()]
    for name, units, said in (
        ("routed", "nats", "mutual information of class and expert"),
        ("attainable", "nats", "what the model's predictions, merged into E/K groups, tell of the class"),
        ("used_least", "1", "routed over cap: at least so much of what a choice could tell was used"),
        ("used_most", "1", "routed over attainable: at most so much was used"),
    ):
        means, ends = np.array([some[name].mean() for some in found]), [student_interval(some[name]) for some in found]
        variables[name] = Variable(("trunk",), means, units, said)
        variables[f"{name}_interval"] = Variable(("trunk", "bound"), np.stack(ends), units, INTERVAL)
    variables["cap"] = Variable((), np.asarray(cap), "nats", "ln E/K or H(class): the most that a choice can tell")
    names = everything[0]["probed"].values
    coords: dict[str, ArrayLike] = {"trunk": list(trials), "probed": names, "bound": ["low", "high"]}
    return labelled(variables, coords, analysis="probed", provenance=common_provenance(everything))


def _used(trials: Trials, cap: float) -> dict[str, Float[np.ndarray, " trials"]]:
    routed = np.array([information(trial) for trial in trials])
    attainable = np.array([attainable_information(trial) for trial in trials])
    most = np.divide(routed, attainable, out=np.full(len(routed), np.nan), where=attainable > 1e-12)
    return {"routed": routed, "attainable": attainable, "used_least": routed / cap, "used_most": most}


def _class_entropy(trial: xr.Dataset) -> float:
    share = np.bincount(trial["label"].values) / trial.sizes["image"]
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def attainable_information(trial: xr.Dataset) -> float:
    """What a router could tell of the class, in nats, at least: its own model's predictions in as many groups.

    K experts an image leave E // K groups of experts to tell apart. Of all predicted classes the two whose merging
    loses least go together, until so many are left (Slonim & Tishby 1999, "Agglomerative Information Bottleneck").
    """
    classes = trial.sizes["class"]
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (trial["label"].values, trial["predicted"].values), 1)
    while counts.shape[1] > trial.sizes["expert"] // trial.sizes["slot"]:
        merged = [_merged(counts, *pair) for pair in combinations(range(counts.shape[1]), 2)]
        counts = max(merged, key=mutual_information)
    return float(mutual_information(counts))


def _merged(counts: Int[np.ndarray, "C G"], one: int, other: int) -> Int[np.ndarray, "C H"]:
    found = np.delete(counts, other, axis=1)
    found[:, one] += counts[:, other]
    return found
