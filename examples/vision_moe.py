"""Do experts specialize? (Poetzscher) again, on a small convolutional mixture of experts, with the controls it lacks.

    python examples/vision_moe.py                               # scikit-learn's digits: under two minutes on two cores
    python examples/vision_moe.py --data DIR --study small --workers 2     # CIFAR-10, narrow, few images: half an hour
    python examples/vision_moe.py --data DIR --study medium --workers 2    # the same longer: two hours on two cores
    python examples/vision_moe.py --data DIR --study full --workers 8      # the paper's study: 20 minutes of an H100

DIR holds CIFAR-10 as parquet (the hub's layout), as a folder a class, or as torchvision has it. Every trial is a file
in the work directory; a second start goes on where the first stopped. On CIFAR-10 the tables set the paper's figures
beside ours, cell by cell. Needs the extra, in a checkout: pip install -e ".[vision]".
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

import moe_interp as moe
from moe_interp.analyses.class_routing import best_assignment, class_correlation, class_counts
from moe_interp.analyses.specialists import Findings
from moe_interp.errors import BadInput
from moe_interp.results import provenance_of
from moe_interp.stats import shares, student_interval
from moe_interp.views.page import check_writable, write
from moe_interp.views.specialists import page
from moe_interp.zoo.vision_images import VEHICLES, read_images
from moe_interp.zoo.vision_study import STUDIES, Study, findings, run_study

# Tables 1 to 3 of the paper, in per cent
ACCURACY = {2: (86.77, 83.77), 3: (86.78, 85.43), 5: (86.03, 85.57)}  # learned, random
TWO = [[96.3], [95.7], [31.7], [17.6], [11.3], [24.2], [3.2], [32.8], [96.5], [93.7]]  # expert 1
THREE = [
    [80.7, 17.8, 1.5], [60.5, 8.9, 30.6], [28.5, 44.6, 26.9], [10.0, 36.6, 53.4], [6.1, 62.3, 31.6],
    [12.8, 10.6, 76.6], [2.4, 92.1, 5.5], [12.7, 25.6, 61.7], [70.6, 21.9, 7.9], [58.6, 3.7, 37.2],
]  # fmt: skip
ANIMALS = (["bird", "deer", "frog"], ["cat", "dog", "horse"])  # that the second and third expert of table 3 take
PERMUTATIONS = 999
MARK = "<!-- tables -->"
YES, NO, UNKNOWN = "reproduces", "does not reproduce", "cannot be told"


@dataclass(frozen=True)
class Table:
    """Something to print: cells are text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def between(value: float, ends: np.ndarray, scale: float = 1.0, digits: int = 1) -> str:
    """A value with its interval."""
    low, high = scale * np.asarray(ends)
    return f"{scale * value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


# Ours


def accuracy_table(result: xr.Dataset, published: bool) -> Table:
    """Table 1 and its controls."""
    rows = []
    for count in result["experts"].values:
        at = result.sel(experts=count)
        cells = [
            between(float(one["accuracy"]), one["accuracy_interval"].values, 100)
            for one in (at.sel(condition=name) for name in at["condition"].values)
        ]
        learned, random = ACCURACY[int(count)] if published else ("–", "–")
        rows.append([str(count), *cells, f"{learned} / {random}"])
    columns = ["experts", *map(str, result["condition"].values), "paper: learned / random"]
    note = "Per cent of test images. Random experts (here: fresh) are about 10 % in the paper." if published else ""
    return Table("Table 1: accuracy under other routings, and of dense models", columns, rows, note)


def gap_table(result: xr.Dataset, published: bool) -> Table:
    """What learned routing is worth."""
    rows = []
    for count in result["experts"].values:
        at = result.sel(experts=count)
        cells = [
            between(float(one["gap"]), one["gap_interval"].values, 100)
            for one in (at.sel(condition=name) for name in at["condition"].values[1:])
        ]
        learned, random = ACCURACY[int(count)] if published else (np.nan, np.nan)
        rows.append([str(count), *cells, f"{learned - random:.2f}" if published else "–"])
    columns = ["experts", *map(str, result["condition"].values[1:]), "paper: over random"]
    return Table("Learned routing less ...: points of accuracy, paired by trial", columns, rows)


def class_table(count: int, result: xr.Dataset, paper: list[list[float]] | None) -> Table:
    """Tables 2 and 3: share of a class's images by expert, ours beside the paper's."""
    columns = ["class", *(f"expert {expert + 1}" for expert in range(count))]
    title = f"{count} experts: share of each class's images, per cent"
    if paper is None:
        ends, ours = 100 * result["share_interval"].values, 100 * result["share"].values
        rows = [
            [str(name), *(between(ours[c, e], ends[:, c, e]) for e in range(count))]
            for c, name in enumerate(result["class"].values)
        ]
        return Table(title, columns, rows)
    cells = compare(result, paper)
    rows = [[str(name), *(cells.text(c, e) for e in range(count))] for c, name in enumerate(result["class"].values)]
    note = (
        "Ours [95 % interval over trials, given how experts were matched] | the paper's. ✓: on the same side of an "
        "even share, ✗: on the other; *: the paper's value is in our interval, which is "
        f"{cells.width:.0f} points wide in the median. {cells.said()}."
        + (" The second column is 100 less the first." if count == 2 else "")
    )
    return Table(f"Table {count}: {title}", columns, rows, note)


@dataclass(frozen=True)
class Cells:
    """Table 2 or 3 beside ours [class, expert], in per cent, our experts in the order that comes closest."""

    ours: np.ndarray
    ends: np.ndarray
    published: np.ndarray
    null: np.ndarray  # correlations with our table under permuted classes, matched anew
    within: np.ndarray  # the same, vehicles among vehicles and animals among animals

    @property
    def same(self) -> np.ndarray:
        """Which are on the same side of an even share."""
        even = 100 / self.ours.shape[1]
        return (self.ours > even) == (self.published > even)

    @property
    def inside(self) -> np.ndarray:
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

    def p(self, null: np.ndarray) -> float:
        """Of the correlation."""
        return (1 + (null >= self.correlation - 1e-12).sum()) / (1 + len(null))

    def text(self, c: int, e: int) -> str:
        marks = ("✓" if self.same[c, e] else "✗") + ("*" if self.inside[c, e] else "")
        return f"{between(self.ours[c, e], self.ends[:, c, e])} | {self.published[c, e]:.1f} {marks}"

    def said(self) -> str:
        return (
            f"{self.same.sum()} of {self.same.size} cells ✓, {self.inside.sum()} *; correlation "
            f"{self.correlation:.2f}, with permuted classes {self.null.mean():.2f} (p = {self.p(self.null):.3f}), "
            f"permuted within vehicles and within animals {self.within.mean():.2f} (p = {self.p(self.within):.3f})"
        )


def compare(result: xr.Dataset, paper: list[list[float]]) -> Cells:
    """Our table beside a published one, of which two experts need but the first column."""
    published = np.array(paper) if len(paper[0]) > 1 else np.hstack([paper, 100 - np.array(paper)])
    ours, rng = 100 * result["share"].values, np.random.default_rng(0)
    null = [cell_correlation(rng.permutation(ours), published) for _ in range(PERMUTATIONS)]
    vehicle = np.isin(result["class"].values, VEHICLES)
    groups = [np.flatnonzero(vehicle), np.flatnonzero(~vehicle)]
    within = [cell_correlation(_permuted_within(ours, groups, rng), published) for _ in range(PERMUTATIONS)]
    order = best_assignment(ours, published)
    ends = 100 * result["share_interval"].values[:, :, order]
    return Cells(ours[:, order], ends, published, np.array(null), np.array(within))


def _permuted_within(table: np.ndarray, groups: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    found = table.copy()
    for group in groups:
        found[group] = table[rng.permutation(group)]
    return found


def cell_correlation(ours: np.ndarray, published: np.ndarray) -> float:
    """Of all cells, our experts in the order that comes closest."""
    return float(np.corrcoef(ours[:, best_assignment(ours, published)].ravel(), published.ravel())[0, 1])


def structure_table(results: Findings) -> Table:
    """Do classes split as said, and do trials agree?"""
    rows = []
    for trunk, some in (("base", results.routing), ("short", results.short_routing)):
        for count, one in some.items():
            n = {name: float(one[name]) for name in one if one[name].ndim == 0}
            rows.append(
                [
                    f"{trunk}, {count} experts",
                    f"{n['silhouette']:.2f} ({n['silhouette_null']:.2f}; p = {n['silhouette_p']:.3f})",
                    f"{n['consistency']:.2f} ({n['consistency_null']:.2f}; p = {n['consistency_p']:.3f})",
                    f"{100 * n['agreement']:.0f} ({100 * n['agreement_class']:.0f}; {100 * n['agreement_load']:.0f})",
                    between(n["information"], one["information_interval"].values, digits=3)
                    + f" ({n['information_null']:.3f}; {n['information_cap']:.3f})",
                ]
            )
    columns = [
        "model",
        "silhouette of the two groups (all splits)",
        "table in two trials (permuted classes)",
        "images alike in two trials, % (by class; by load)",
        "information on the class, nats (95 % of permuted labels; ln E)",
    ]
    return Table("Which classes go together, and do trials agree", columns, rows, "Controls are in brackets.")


def group_rows(result: xr.Dataset, groups: list[list[str]], name: str = "correlation") -> tuple[list[float], float]:
    """Mean correlation of classes within each group, and between groups."""
    values, classes = result[name].values, list(map(str, result["class"].values))
    members = [[classes.index(one) for one in group] for group in groups]
    within = [mean_of([values[a, b] for a in group for b in group if a != b]) for group in members]
    across = [values[a, b] for i, one in enumerate(members) for other in members[i + 1 :] for a in one for b in other]
    return within, mean_of(across)


def mean_of(values: list[float]) -> float:
    """Mean of those that are defined; NaN if none is."""
    there = [value for value in values if np.isfinite(value)]
    return float(np.mean(there)) if there else np.nan


def correlation_table(results: Findings, groups: dict[str, list[str]]) -> Table:
    """Correlation of classes within the groups and between them."""
    rows = []
    for count, one in results.routing.items():
        for name in ("correlation", "correlation_excess"):
            within, across = group_rows(one, list(groups.values()), name)
            label = "as published" if name == "correlation" else "loads taken off"
            rows.append([f"{count} experts, {label}", *(f"{value:.2f}" for value in within), f"{across:.2f}"])
    columns = ["", *(f"within {name}" for name in groups), "between"]
    return Table("Mean correlation of two classes' shares", columns, rows)


def depth_table(results: Findings) -> Table:
    """Base against short."""
    rows = []
    for count, one in results.depth.items():
        for name, scale, digits in (
            ("covariance", 1, 3),
            ("covariance_excess", 1, 3),
            ("variance", 1, 3),
            ("information", 1, 3),
            ("accuracy", 100, 1),
        ):
            cells = [
                between(
                    float(one[name].sel(trunk=trunk)), one[f"{name}_interval"].sel(trunk=trunk).values, scale, digits
                )
                for trunk in one["trunk"].values
            ]
            short = one.isel(trunk=-1)
            change = between(
                float(short[f"{name}_difference"]), short[f"{name}_difference_interval"].values, scale, digits
            )
            rows.append([f"{count} experts: {name.replace('_', ', ')}", *cells, change])
    columns = ["", *(f"{name} trunk" for name in map(str, one["trunk"].values)), "difference"]
    note = (
        "Covariance: mean absolute one of two classes' shares, as published and (excess) with loads taken off; "
        "variance: mean over classes; information in nats; accuracy in per cent. Differences with Welch's interval."
    )
    return Table("Depth", columns, rows, note)


def probe_table(results: Findings) -> Table:
    """What the router could have used."""
    rows = []
    for count, one in results.probed.items():
        for trunk in one["trunk"].values:
            at = one.sel(trunk=trunk)
            first = at.isel(probed=0)
            rows.append(
                [
                    f"{count} experts, {trunk} trunk",
                    between(float(first["accuracy"]), first["accuracy_interval"].values, 100),
                    between(float(first["information"]), first["information_interval"].values, digits=2),
                    *(f"{float(at['information'].isel(probed=number)):.2f}" for number in (1, 2)),
                    between(float(at["routed"]), at["routed_interval"].values, digits=2)
                    + f" of {float(at['cap']):.2f}",
                    between(float(at["used"]), at["used_interval"].values, 100, 0),
                ]
            )
    columns = [
        "", "probe, % right", "probe, nats", "untrained trunk, nats", "permuted labels, nats", "expert tells, nats",
        "used, % of what one expert can tell, at most",
    ]  # fmt: skip
    return Table("Linear probes of the mixture's input, and what routing tells of the class", columns, rows)


def load_table(found: dict[str, list[xr.Dataset]], experts: tuple[int, ...]) -> Table:
    """Loads and accuracy under both readings of an expert's weight."""
    rows = []
    for count in experts:
        for kind, name in (("base", "1 (renormalised)"), ("scored", "its score (Switch)")):
            trials = found[f"{kind}-{count}"]
            busiest = [float(shares(class_counts(one).sum(axis=0)).max()) for one in trials]
            learned = [float(one["accuracy"][0]) for one in trials]
            balance = np.mean([float(one["balance"]) for one in trials])
            listed = (", ".join(f"{100 * value:.0f}" for value in values) for values in (busiest, learned))
            rows.append([str(count), name, f"{balance:.2f}", *listed])
    columns = ["experts", "weight of the expert", "E Σ f P"]
    columns += ["busiest expert, % of images, by trial", "accuracy, %, by trial"]
    note = (
        "E Σ f P, over the last epoch's batches, is 1 when loads are even and E when one expert gets everything. The "
        "loads of the paper's tables 2 and 3 are even: 50 and 50 %, 34, 32 and 33 %."
    )
    return Table("Loads, by the weight that the chosen expert gets", columns, rows, note)


# The paper's claims


def claims_table(results: Findings) -> Table:
    """What tables 1 to 3 and figures 2 to 6 say, and whether it comes out."""
    columns = ["the paper", "verdict", "ours"]
    note = (
        "Criteria in brackets are ours, written down before the medium study was run; those marked LATER after it and "
        "before the full one. What we have of the paper says what figures 2 to 6 show, not every number in them, so "
        "that claims stand for them."
    )
    return Table("Claims", columns, [list(claim) for claim in claims(results)], note)


def claims(results: Findings) -> Iterator[tuple[str, str, str]]:
    """Each claim with a verdict and our figures."""
    table = results.accuracies
    for condition, how in (("random", "drawn after training"), ("trained at random", "drawn in training too")):
        gaps = table.sel(condition=condition)
        values, ends = gaps["gap"].values, gaps["gap_interval"].values
        said = "; ".join(between(float(one), some, 100) for one, some in zip(values, ends, strict=True)) + " points"
        yield (
            f"Table 1: a random router costs accuracy, 3.0, 1.4, 0.5 points at 2, 3, 5 experts ({how}: intervals above "
            "0)",
            YES if (ends[:, 0] > 0).all() else NO if (ends[:, 1] <= 0).any() else UNKNOWN,
            said,
        )
        falls = all(one > other for one, other in pairwise(values))
        yield f"Table 1: and the less the more experts there are ({how}: means fall)", YES if falls else NO, said
    fresh = table.sel(condition="fresh")
    near = (np.abs(100 * fresh["accuracy"].values - 10) < 3).all()
    listed = "; ".join(
        between(float(value), some, 100)
        for value, some in zip(fresh["accuracy"].values, fresh["accuracy_interval"].values, strict=True)
    )
    yield "Table 1: random experts are at about 10 % (within 3 points)", YES if near else NO, f"{listed} %"
    for count, paper in ((2, TWO), (3, THREE)):
        cells = compare(results.routing[count], paper)
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
    yield from _figures(results)


def _figures(results: Findings) -> Iterator[tuple[str, str, str]]:
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


def animals_divide(result: xr.Dataset) -> np.ndarray:
    """Interval of the lower correlation within the groups of animals less that between: pseudo-values over trials."""
    trials, classes = result["share_trials"].values, list(map(str, result["class"].values))
    first, second = ([classes.index(name) for name in group] for group in ANIMALS)

    def difference(tables: np.ndarray) -> float:
        values = class_correlation(tables)
        within = [np.mean([values[a, b] for a in group for b in group if a != b]) for group in (first, second)]
        return float(min(within) - values[np.ix_(first, second)].mean())

    without = [difference(np.delete(trials, number, axis=0)) for number in range(len(trials))]
    count = len(trials)
    return student_interval(count * difference(trials) - (count - 1) * np.array(without))


# Printing


def show(console: Console, table: Table) -> None:
    shown = RichTable(title=table.title, caption=table.note or None)
    for name in table.columns:
        shown.add_column(escape(name))
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def markdown(table: Table) -> str:
    lines = [f"## {table.title}", "", *([table.note, ""] if table.note else [])]
    lines += [_row(table.columns), "|" + "---|" * len(table.columns), *map(_row, table.rows), ""]
    return "\n".join(lines)


def write_markdown(path: Path, every: list[Table]) -> None:
    """What a page says before the mark stays, the tables come after it."""
    head = path.read_text(encoding="utf-8").partition(MARK)[0] if path.exists() else ""
    write(f"{head}{MARK}\n\n" + "\n".join(map(markdown, every)), path)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables(results: Findings, found: dict[str, list[xr.Dataset]], groups: dict[str, list[str]]) -> list[Table]:
    where = provenance_of(next(iter(results.routing.values())))
    published = where["images"] == "CIFAR-10" and where["top_k"] == 1
    papers: dict[int, list[list[float]]] = {2: TWO, 3: THREE} if published else {}
    every = [*([claims_table(results)] if published and {2, 3, 5} <= set(results.routing) else [])]
    every += [accuracy_table(results.accuracies, published), gap_table(results.accuracies, published)]
    every += [class_table(count, one, papers.get(count)) for count, one in results.routing.items()]
    every += [structure_table(results), correlation_table(results, groups), depth_table(results), probe_table(results)]
    return [*every, load_table(found, tuple(results.routing))]


def _study(name: str, trials: int | None, top_k: int) -> Study:
    study = STUDIES[name]
    trials = study.trials if trials is None else trials
    if trials < 1 or not 1 <= top_k <= min(study.experts):
        raise BadInput(
            "not a study",
            expected=f"at least one trial, and 1 to {min(study.experts)} experts an image",
            got=f"{trials} trials, {top_k} experts",
        )
    return replace(study, trials=trials, plan=replace(study.plan, top_k=top_k))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", metavar="DIR", help="folder with CIFAR-10 (default: digits)")
    parser.add_argument("--study", choices=STUDIES, help="default: digits for digits, else small")
    parser.add_argument("--trials", type=int, help="another number of trials")
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="experts an image")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="a file a trial (default: vision_STUDY)")
    parser.add_argument("-o", "--output", type=Path, default=Path("vision_moe.html"), help="the page of figures")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="the tables once more, as Markdown, after what is there"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trials at a time; as many as cores pays")
    parser.add_argument(
        "--threads", type=int, default=1, help="of each: in models so small, two mostly wait for each other"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = options.study or ("digits" if options.data == "digits" else "small")
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        for target in (options.output, options.markdown):
            if target is not None:
                check_writable(target)
        study = _study(name, options.trials, options.top_k)
        images = read_images(options.data, train=study.train, test=study.test)
        folder = options.work_dir or Path(f"vision_{name}")
        found = run_study(study, images, folder, options.device, workers=options.workers)
        results = findings(study, found, images)
        groups = {group: [c for c, g in zip(images.classes, images.groups, strict=True) if g == group]
                  for group in dict.fromkeys(images.groups)}  # fmt: skip
        every = tables(results, found, groups)
        for table in every:
            show(console, table)
        if options.markdown:
            write_markdown(options.markdown, every)
        console.print(f"Figures: {page(results, options.output)}")
    except moe.MoEError as error:
        sys.exit(f"vision_moe.py: {error}")


if __name__ == "__main__":
    main()
