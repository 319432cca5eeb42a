"""Do experts specialize? (Poetzscher) again, on a small convolutional mixture of experts, with the controls it lacks.

    python examples/vision_moe.py                               # scikit-learn's digits: under two minutes on one core
    python examples/vision_moe.py --data DIR --study small --workers 2     # CIFAR-10, narrow, few images: half an hour
    python examples/vision_moe.py --data DIR --study medium --workers 2    # the same longer: an hour and a half
    python examples/vision_moe.py --data DIR --study full --workers 8      # the paper's study: 20 minutes of a GPU
    python examples/vision_moe.py --from vision_full            # tables of trials that are there, without images

DIR holds CIFAR-10 as parquet (the hub's layout), as a folder a class, or as torchvision has it. Every trial is a file
in the work directory; a second start goes on where the first stopped. On CIFAR-10 the tables set the paper's figures
beside ours, cell by cell. Needs the extra, in a checkout: pip install -e ".[vision]".
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

import moe_interp as moe
from moe_interp.analyses.class_routing import class_counts
from moe_interp.analyses.specialists import Findings
from moe_interp.errors import BadInput
from moe_interp.paths import check_writable
from moe_interp.results import provenance_of
from moe_interp.stats import shares
from moe_interp.views.page import write
from moe_interp.views.specialists import page
from moe_interp.zoo.vision_images import read_images
from moe_interp.zoo.vision_paper import ACCURACY, THREE, TWO, between, claims, compare, group_rows
from moe_interp.zoo.vision_study import STUDIES, Study, findings, read_study, run_study

MARK = "<!-- tables -->"


@dataclass(frozen=True)
class Table:
    """Something to print: cells are text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


# Ours


def accuracy_table(result: xr.Dataset, published: bool) -> Table:
    """Table 1 and its controls."""
    rows = []
    for count in result["experts"].values:
        papers = dict(zip(("learned", "random"), ACCURACY[int(count)], strict=True)) if published else {}
        at = result.sel(experts=count)
        conditions = map(str, at["condition"].values)
        rows.append([str(count), *(_accuracy(at.sel(condition=name), papers.get(name)) for name in conditions)])
    columns = ["experts", *map(str, result["condition"].values)]
    note = (
        "Per cent of test images. Ours [95 % interval over trials] | the paper's, *: in our interval. Its random "
        "experts (here: fresh) are at about 10 %. Its random router may be either random or trained at random."
    )
    title = "Table 1: accuracy under other routings, and of dense models"
    return Table(title, columns, rows, note if published else "")


def _accuracy(at: xr.Dataset, paper: float | None, of: str = "accuracy") -> str:
    """Ours in per cent, and the paper's beside it."""
    ours, ends = 100 * float(at[of]), 100 * at[f"{of}_interval"].values
    said = between(ours, ends)
    return said if paper is None else f"{said} | {paper:.2f}" + (" *" if ends[0] <= paper <= ends[1] else "")


def gap_table(result: xr.Dataset, published: bool) -> Table:
    """What learned routing is worth."""
    rows = []
    for count in result["experts"].values:
        learned, random = ACCURACY[int(count)] if published else (0.0, 0.0)
        papers = dict.fromkeys(("random", "trained at random"), learned - random) if published else {}
        at = result.sel(experts=count)
        conditions = map(str, at["condition"].values[1:])
        rows.append([str(count), *(_accuracy(at.sel(condition=name), papers.get(name), "gap") for name in conditions)])
    columns = ["experts", *map(str, result["condition"].values[1:])]
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
                    between(n["consistency"], one["consistency_interval"].values, digits=2)
                    + f" ({n['consistency_null']:.2f}; p = {n['consistency_p']:.3f})",
                    between(n["agreement"], one["agreement_interval"].values, 100.0, 0)
                    + f" ({100 * n['agreement_class']:.0f}; {100 * n['agreement_load']:.0f})",
                    between(n["information"], one["information_interval"].values, digits=3)
                    + f" ({n['information_null']:.3f}; {n['information_cap']:.3f})",
                ]
            )
    columns = [
        "model",
        "silhouette of the two groups (all splits)",
        "table in two trials (permuted classes)",
        "images alike in two trials, % (by class; by load)",
        "information on the class, nats (95 % of permuted labels; ln E/K)",
    ]
    return Table("Which classes go together, and do trials agree", columns, rows, "Controls are in brackets.")


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
            ("covariance", 1.0, 3),
            ("covariance_excess", 1.0, 3),
            ("variance", 1.0, 3),
            ("information", 1.0, 3),
            ("accuracy", 100.0, 1),
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
            nats = [at.isel(probed=number) for number in range(at.sizes["probed"])]
            rows.append(
                [
                    f"{count} experts, {trunk} trunk",
                    between(float(nats[0]["accuracy"]), nats[0]["accuracy_interval"].values, 100.0),
                    *(
                        between(float(some["information"]), some["information_interval"].values, 1.0, 2)
                        for some in nats
                    ),
                    between(float(at["routed"]), at["routed_interval"].values, digits=2),
                    f"{float(at['attainable']):.2f} to {float(at['cap']):.2f}",
                    f"{100 * float(at['used_least']):.0f} to {100 * float(at['used_most']):.0f}",
                ]
            )
    columns = [
        "", "probe, % right", "probe, nats", "untrained trunk, nats", "permuted labels, nats", "expert tells, nats",
        "could tell, nats", "used, % of that",
    ]  # fmt: skip
    note = (
        "Probes are fitted on 10,000 training images at most; their nats are a lower bound on what is there. What a "
        "choice of experts could tell of the class is between what the model's predictions tell, merged into as many "
        "groups as experts can tell apart, and ln E/K."
    )
    return Table("Linear probes of the mixture's input, and what routing tells of the class", columns, rows, note)


def load_table(found: dict[str, list[xr.Dataset]], experts: tuple[int, ...], published: bool) -> Table:
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
    note = "E Σ f P, over the last epoch's batches, is 1 when loads are even and E when one expert gets everything."
    if published:
        note += " The loads of the paper's tables 2 and 3 are even: 50 and 50 %, 34, 32 and 33 %."
    return Table("Loads, by the weight that the chosen expert gets", columns, rows, note)


def claims_table(results: Findings) -> Table:
    """What tables 1 to 3 and figures 2 to 6 say, and whether it comes out."""
    columns = ["the paper", "verdict", "ours"]
    note = (
        "Criteria in brackets are ours, written down before the medium study was run; those marked LATER after it and "
        "before the full one, those marked AFTER when five trials of the full one had been seen. What we have of the "
        "paper says what figures 2 to 6 show, not every number in them, so that claims stand for them."
    )
    return Table("Claims", columns, [list(claim) for claim in claims(results)], note)


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


def tables(results: Findings, found: dict[str, list[xr.Dataset]]) -> list[Table]:
    """Every table of a study."""
    first = found["dense-1"][0]
    groups: dict[str, list[str]] = {}
    for name, group in zip(first["class"].values, first["group"].values, strict=True):
        groups.setdefault(str(group), []).append(str(name))
    where = provenance_of(next(iter(results.routing.values())))
    published = where["images"] == "CIFAR-10" and where["top_k"] == 1
    papers: dict[int, list[list[float]]] = {2: TWO, 3: THREE} if published else {}
    every = [*([claims_table(results)] if published and {2, 3, 5} <= set(results.routing) else [])]
    every += [accuracy_table(results.accuracies, published), gap_table(results.accuracies, published)]
    every += [class_table(count, one, papers.get(count)) for count, one in results.routing.items()]
    every += [structure_table(results), correlation_table(results, groups), depth_table(results), probe_table(results)]
    return [*every, load_table(found, tuple(results.routing), published)]


def _study(name: str, trials: int | None, top_k: int) -> Study:
    study = STUDIES[name]
    trials = study.trials if trials is None else trials
    if not 1 <= top_k <= min(study.experts):
        expected = f"1 to {min(study.experts)} experts an image"
        raise BadInput("not a study", expected=expected, got=str(top_k))
    return replace(study, trials=trials, plan=replace(study.plan, top_k=top_k))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", metavar="DIR", help="folder with CIFAR-10 (default: digits)")
    parser.add_argument("--from", type=Path, dest="made", metavar="DIR", help="train nothing: the trials in DIR")
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
    if options.threads < 1:
        parser.error("--threads: at least one")
    torch.set_num_threads(options.threads)
    name = options.study or ("digits" if options.data == "digits" else "small")
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        for target in (options.output, options.markdown):
            if target is not None:
                check_writable(target)
        if options.made:
            found, images = read_study(options.made), None
        else:
            study = _study(name, options.trials, options.top_k)
            images = read_images(options.data, train=study.train, test=study.test)
            folder = options.work_dir or Path(f"vision_{name}")
            found = run_study(study, images, folder, options.device, workers=options.workers)
        results = findings(found, images)
        every = tables(results, found)
        for table in every:
            show(console, table)
        if options.markdown:
            write_markdown(options.markdown, every)
        console.print(f"Figures: {page(results, options.output)}")
    except moe.MoEError as error:
        sys.exit(f"vision_moe.py: {error}")


if __name__ == "__main__":
    main()
